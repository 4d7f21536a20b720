"""
Retrieval metrics: cases by hand, closed forms, invariances, scikit-learn, and the floors of raw pixels on the real
films.
"""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from task3_retrieval.metrics import chance, chance_vote, class_means, content_codes, duplicate_report, hubness
from task3_retrieval.metrics import knn_vote, leave_one_out_draws, query_draws, query_metrics, rank_gallery, relevance
from task3_retrieval.metrics import retrieval_values, summarise


def problem(seed=0, q=40, n=60, classes=2):
    rng = np.random.default_rng(seed)
    return (
        rng.random((q, n)),
        rng.integers(classes, size=q),
        np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)]),
    )


def only(values, names):
    return [values[n][0] for n in names]


# --- by hand ---


def test_metrics_by_hand():
    values = query_metrics([[1, 0, 1, 0, 0, 1]], ks=(1, 3, 5))
    assert only(values, ["P@1", "P@3", "P@5"]) == pytest.approx([1, 2 / 3, 2 / 5])
    assert values["AP"][0] == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)  # hits at ranks 1, 3, 6
    assert values["R-prec"][0] == pytest.approx(2 / 3) and values["RR"][0] == 1  # R = 3: two of the first three
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@3"][0] == pytest.approx((1 + 1 / math.log2(4)) / ideal)
    assert values["nDCG@5"][0] == pytest.approx((1 + 1 / math.log2(4)) / ideal)  # the ideal has min(R, 5) = 3 items


def test_first_hit_late_and_none_at_all():
    values = query_metrics([[0, 0, 1, 0], [0, 0, 0, 0]], ks=(1, 2))
    assert (
        values["RR"][0] == pytest.approx(1 / 3)
        and values["AP"][0] == pytest.approx(1 / 3)
        and values["P@2"].tolist() == [0, 0]
    )
    for name in ("AP", "RR", "R-prec", "nDCG@1", "nDCG@2"):
        assert np.isnan(values[name][1]), name
    assert class_means(np.stack([values["AP"]], axis=1), [0, 0], 1)[0, 0, 0] == pytest.approx(
        1 / 3
    )  # the mean leaves it out


def test_short_galleries_divide_by_k():
    assert query_metrics([[1, 1]], ks=(5,))["P@5"][0] == pytest.approx(2 / 5)
    assert query_metrics([[1, 1]], ks=(5,))["nDCG@5"][0] == 1  # nothing better was possible


def test_ties_go_to_the_earlier_item_and_excluded_ones_to_the_end():
    order, left = rank_gallery(np.array([[0.5, 0.9, 0.5, 0.9]]), np.array([[False, True, False, False]]))
    assert order.tolist() == [[3, 0, 2, 1]] and left.tolist() == [3]
    assert relevance(order, left, [1], [1, 1, 0, 1]).tolist() == [
        [True, True, False, False]
    ]  # the excluded hit does not count


def test_self_is_excluded_by_id_and_not_by_rank():
    """A copy with a smaller id is ranked before the query itself: dropping the first hit would drop the wrong one."""
    vectors = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    similarity = vectors @ vectors.T
    order, _ = rank_gallery(similarity, np.eye(3, dtype=bool))
    assert order[1].tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "similarity, exclude, sentence",
    [
        (np.array([[np.nan, 1.0]]), None, "NaN or infinite"),
        (np.zeros((1, 0)), None, "at least one item"),
        (np.zeros((2, 2)), np.array([[True, True], [False, True]]), "1 queries have an empty gallery"),
        (np.zeros((2, 2)), np.eye(2), "must be bool"),
    ],
)
def test_unusable_similarities(similarity, exclude, sentence):
    with pytest.raises(ValueError, match=sentence):
        rank_gallery(similarity, exclude)


def test_vote():
    labels = np.array([0, 0, 1, 1, 1])
    first, near = np.array([[0, 2, 1, 3, 4]]), np.array([[0.9, 0.8, 0.7, 0.2, 0.1]])
    called, share = knn_vote(first, [5], near, labels, 2, k=3)
    assert called.tolist() == [0] and share[0] == pytest.approx([2 / 3, 1 / 3])
    assert knn_vote(first, [5], near, labels, 2, k=5)[0].tolist() == [1]
    assert knn_vote(first, [5], near, labels, 2, k=4)[0].tolist() == [0]  # two each: 0.9 + 0.7 beats 0.8 + 0.2
    assert knn_vote(first[:, ::-1], [5], 1 - near[:, ::-1], labels, 2, k=4)[0].tolist() == [1]  # three of four
    assert knn_vote(first, [5], np.ones((1, 5)), labels[[2, 3, 0, 1, 4]], 2, k=4)[0].tolist() == [
        1
    ]  # all equal: the nearest
    assert knn_vote(first, [1], near, labels, 2, k=5)[1].tolist() == [[1, 0]]  # a single one left


# --- against scikit-learn ---


def test_average_precision_and_ndcg_agree_with_scikit_learn():
    similarity, y, gallery = problem()
    values = retrieval_values(similarity, y, gallery, 2, ks=(1, 7))
    for q in range(len(y)):
        assert values["AP"][q] == pytest.approx(average_precision_score(gallery == y[q], similarity[q]), abs=1e-12)
        assert values["nDCG@7"][q] == pytest.approx(
            ndcg_score([(gallery == y[q]).astype(int)], [similarity[q]], k=7), abs=1e-12
        )


# --- invariances ---


def test_monotone_similarities_and_gallery_order_do_not_matter():
    similarity, y, gallery = problem()
    a = retrieval_values(similarity, y, gallery, 2, vote_k=5)
    b = retrieval_values(np.exp(3 * similarity), y, gallery, 2, vote_k=5)
    shuffle = np.random.default_rng(1).permutation(len(gallery))
    c = retrieval_values(similarity[:, shuffle], y, gallery[shuffle], 2, vote_k=5)
    for name in a:
        np.testing.assert_allclose(a[name], b[name])
        np.testing.assert_allclose(a[name], c[name])


def test_excluding_an_item_equals_a_gallery_without_it():
    similarity, y, gallery = problem()
    exclude = np.zeros(similarity.shape, dtype=bool)
    exclude[:, 7] = True
    a = retrieval_values(similarity, y, gallery, 2, exclude)
    b = retrieval_values(np.delete(similarity, 7, axis=1), y, np.delete(gallery, 7), 2)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], err_msg=name)


def test_perfect_and_worst_ranking():
    y, gallery = np.array([0, 1]), np.array([0, 0, 1, 1, 1])
    same = (y[:, None] == gallery).astype(float)
    best = retrieval_values(same, y, gallery, 2, ks=(1, 2), vote_k=1)
    assert all((v == 1).all() for v in best.values())
    worst = retrieval_values(-same, y, gallery, 2, ks=(1, 2), vote_k=1)
    assert worst["AP"][0] == pytest.approx((1 / 4 + 2 / 5) / 2) and worst["vote"].sum() == worst["P@2"].sum() == 0


# --- chance ---


def test_chance_is_the_mean_of_many_random_orders():
    rng = np.random.default_rng(0)
    relevant = np.zeros(12, dtype=bool)
    relevant[:5] = True
    draws = np.stack([rng.permutation(relevant) for _ in range(40_000)])
    mean, expected = query_metrics(draws, ks=(1, 3, 20)), chance([5], [12], ks=(1, 3, 20))
    assert list(mean) == list(expected)
    for name in expected:
        assert expected[name][0] == pytest.approx(mean[name].mean(), abs=4 * mean[name].std() / 200 + 1e-9), name
    vote = draws[:, :3].sum(1) >= 2
    assert chance_vote([5], [12], 3)[0] == pytest.approx(vote.mean(), abs=0.01)


def test_chance_at_the_ends():
    full, none = chance([4], [4]), chance([0], [4])
    assert all(full[n][0] == pytest.approx(1) for n in ("P@1", "P@3", "AP", "RR", "R-prec", "nDCG@5"))
    assert full["P@5"][0] == pytest.approx(4 / 5)  # four items, divided by five
    assert none["P@1"][0] == 0 and np.isnan(none["AP"][0]) and np.isnan(none["RR"][0])
    with pytest.raises(ValueError, match="odd k"):
        chance_vote([1], [2], 4)


# --- means and intervals ---


def test_micro_macro_and_classes():
    means = class_means(np.array([[1.0], [0.0], [0.0], [np.nan]]), [0, 0, 1, 1], 3)[0, :, 0]
    assert means[:4] == pytest.approx([1 / 3, (1 / 2 + 0) / 2, 1 / 2, 0]) and np.isnan(means[4])  # class 2 has no query


def test_query_bootstrap_of_a_proportion_is_binomial():
    values = {"hit": np.repeat([1.0, 0.0], [70, 30])}
    draws = query_draws(values, np.zeros(100, dtype=int), 1, num_samples=4000)[:, 0, 0]
    assert draws.mean() == pytest.approx(0.7, abs=0.005) and draws.std() == pytest.approx(
        math.sqrt(0.7 * 0.3 / 100), rel=0.05
    )
    row = summarise(values, np.zeros(100, dtype=int), 1, draws[:, None, None].repeat(3, axis=1))["micro"]["hit"]
    assert (
        row["value"] == pytest.approx(0.7)
        and row["low"] == pytest.approx(0.61, abs=0.02)
        and row["high"] == pytest.approx(0.79, abs=0.02)
    )


def test_grouped_queries_are_drawn_together():
    values = {"hit": np.repeat([1.0, 0.0], 10)}
    alone = query_draws(values, np.zeros(20, dtype=int), 1, num_samples=2000)[:, 0, 0]
    together = query_draws(values, np.zeros(20, dtype=int), 1, groups=np.arange(20) // 5, num_samples=2000)[:, 0, 0]
    assert together.std() == pytest.approx(alone.std() * math.sqrt(5), rel=0.1)


def test_paired_difference_of_a_system_with_itself_and_with_a_shifted_one():
    similarity, y, gallery = problem()
    values = retrieval_values(similarity, y, gallery, 2)
    draws = query_draws(values, y, 2, num_samples=200)
    same = summarise(values, y, 2, draws, (values, draws))["macro"]["AP"]
    assert same["difference"] == same["difference_low"] == same["difference_high"] == 0 and same["p"] == 1
    lower = {n: v - 0.1 for n, v in values.items()}
    row = summarise(values, y, 2, draws, (lower, query_draws(lower, y, 2, num_samples=200)))["micro"]["AP"]
    # the same draws on both sides: a constant gap has no spread, however wide either interval is
    assert row["difference_low"] == pytest.approx(0.1) == row["difference_high"] and row["high"] - row["low"] > 0.01


def test_leave_one_out_draws_equal_a_literal_resample():
    """Build every resampled data set for real, copies and all, and measure it the plain way."""
    rng = np.random.default_rng(3)
    vectors, labels = rng.normal(size=(14, 3)), np.arange(14) % 2
    vectors[5] = vectors[3]  # a byte-identical pair
    codes = np.arange(14)
    codes[5] = 3
    similarity = vectors @ vectors.T
    draws = leave_one_out_draws(
        similarity, labels, 2, codes[:, None] == codes, ks=(1, 3), vote_k=3, num_samples=20, seed=5
    )
    from shared.metrics.statistics import resample_counts

    for counts, draw in zip(resample_counts(14, 20, 5), draws, strict=True):
        rows = np.repeat(np.arange(14), counts)
        values = retrieval_values(
            similarity[np.ix_(rows, rows)],
            labels[rows],
            labels[rows],
            2,
            codes[rows][:, None] == codes[rows],
            ks=(1, 3),
            vote_k=3,
        )
        np.testing.assert_allclose(
            draw, class_means(np.stack(list(values.values()), axis=1), labels[rows], 2)[0], atol=1e-12
        )


def test_leave_one_out_needs_the_query_excluded():
    with pytest.raises(ValueError, match="excluded from its own gallery"):
        leave_one_out_draws(np.eye(3), [0, 1, 0], 2, np.zeros((3, 3), dtype=bool))


# --- hubs and copies ---


def test_hubness():
    even = hubness(np.array([[1], [2], [0]]), [1, 1, 1], 3, k=1)
    assert even["skewness"] is None and even["max"] == 1 and even["never"] == 0
    hub = hubness(np.array([[0, 1], [0, 2], [0, 3], [0, 1]]), [2, 2, 2, 2], 10, k=2)
    assert (
        (hub["max"], hub["item"], hub["never"]) == (4, 0, 0.6) and hub["top1_percent"] == 0.5 and hub["skewness"] > 1.5
    )
    assert (
        hubness(np.array([[0, 1]]), [1], 2, k=2)["max"] == 1
        and hubness(np.array([[0, 1]]), [1], 2, k=2)["never"] == 0.5
    )  # one left


def test_copies_are_found_within_and_between_sets():
    a = np.zeros((4, 2, 2), dtype=np.uint8)
    a[1], a[3] = 1, 1
    a[2] = 2
    b = np.full((2, 2, 2), 2, dtype=np.uint8)
    codes = dict(zip("ab", content_codes(a, b), strict=True))
    report = duplicate_report(codes, {"a": np.array([0, 0, 1, 1]), "b": np.array([1, 1])})
    assert report["repeats"] == {"a": 1, "b": 1} and report["pairs"] == {"a": [[1, 3]], "b": [[0, 1]]}
    assert report["shared"] == {"a-b": 1} and report["conflicting"] == 1  # images 1 and 3 have two labels


# --- the real films ---

# similarity, queries, gallery, query excluded: P@1, P@5, P@10, mAP, R-prec, MRR, 5-NN vote, P@5 normal, P@5 pneumonia
FLOORS = [
    ("cosine", "test", "test", True, (88.8, 84.6, 83.1, 68.9, 64.0, 92.9, 90.2, 77.9, 88.7)),
    ("l2", "test", "test", True, (87.8, 84.5, 83.0, 65.9, 59.9, 92.2, 89.6, 73.9, 90.8)),
    ("l2", "test", "test", False, (100, 87.9, 84.9, 66.2, 60.1, 100, 92.0, 80.2, 92.5)),
    ("cosine", "test", "test", False, (100, 88.4, 85.0, 69.2, 64.2, 100, 92.9, 83.4, 91.4)),
    ("cosine", "test", "val", True, (84.9, 82.8, 80.9, 69.8, 64.6, 89.2, 86.2, 64.8, 93.5)),
    ("l2", "test", "val", True, (84.0, 80.1, 79.1, 66.6, 61.6, 88.3, 82.2, 55.6, 94.8)),
    ("cosine", "test", "train", True, (84.1, 83.8, 82.9, 69.6, 64.6, 88.3, 85.7, 64.4, 95.5)),
    ("l2", "test", "train", True, (82.4, 81.4, 80.8, 66.4, 61.1, 87.0, 82.2, 56.4, 96.4)),
    ("cosine", "val", "train", True, (93.5, 92.4, 91.5, 76.2, 70.7, 95.9, 94.3, 88.1, 93.8)),
]


@pytest.fixture(scope="module")
def films():
    cache = {}

    def load(path):
        if not cache:
            with np.load(path) as arrays:
                for split in ("train", "val", "test"):
                    images = arrays[f"{split}_images"]
                    cache[split] = (
                        images.reshape(len(images), -1).astype(np.float64),
                        arrays[f"{split}_labels"][:, 0].astype(int),
                        images,
                    )
        return cache

    return load


@pytest.mark.realdata
@pytest.mark.parametrize(
    "metric, queries, gallery, without_itself, expected",
    FLOORS,
    ids=[f"{m}-{q}-{g}{'' if e else '-query-left-in'}" for m, q, g, e, _ in FLOORS],
)
def test_floors_of_raw_pixels(real_data, films, metric, queries, gallery, without_itself, expected):
    """An independent implementation measured these once, to a tenth of a per cent."""
    data = films(real_data("pneumoniamnist/pneumoniamnist.npz"))
    (a, y, _), (b, gallery_labels, _) = data[queries], data[gallery]
    if metric == "cosine":
        a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        similarity = a @ b.T
    else:
        similarity = 2 * a @ b.T - (a**2).sum(1)[:, None] - (b**2).sum(1)
    exclude = np.eye(len(y), dtype=bool) if queries == gallery and without_itself else None
    values = retrieval_values(similarity, y, gallery_labels, 2, exclude, ks=(1, 5, 10))
    means = dict(
        zip(values, 100 * class_means(np.stack(list(values.values()), axis=1), y, 2)[0].T, strict=True)
    )  # {name: micro, macro, normal, pneumonia}
    got = [means[n][0] for n in ("P@1", "P@5", "P@10", "AP", "R-prec", "RR", "vote")] + [
        means["P@5"][2],
        means["P@5"][3],
    ]
    assert np.round(got, 1).tolist() == pytest.approx(expected, abs=0.051)
    if (metric, queries, gallery) == ("cosine", "test", "train"):
        assert [round(means[n][1], 1) for n in ("P@1", "P@5", "AP")] == [80.1, 79.9, 64.9]  # macro
        table = summarise(values, y, 2, query_draws(values, y, 2))["micro"]
        for name, low, high in (("P@1", 81.3, 86.9), ("P@5", 81.5, 86.2), ("AP", 67.8, 71.2)):
            assert (100 * table[name]["low"], 100 * table[name]["high"]) == (
                pytest.approx(low, abs=0.4),
                pytest.approx(high, abs=0.4),
            )


@pytest.mark.realdata
def test_chance_and_copies_of_the_real_films(real_data, films):
    data = films(real_data("pneumoniamnist/pneumoniamnist.npz"))
    y, n = data["test"][1], np.bincount(data["test"][1])
    assert 100 * chance(n[y] - 1, np.full(624, 623))["P@1"].mean() == pytest.approx(53.0, abs=0.06)
    assert 100 * chance(np.bincount(data["train"][1])[y], np.full(624, 4708))["P@5"].mean() == pytest.approx(
        56.1, abs=0.06
    )
    codes = dict(zip(data, content_codes(*(x for _, _, x in data.values())), strict=True))
    report = duplicate_report(codes, {s: labels for s, (_, labels, _) in data.items()})
    assert report["repeats"] == {"train": 18, "val": 0, "test": 3} and report["conflicting"] == 0
    assert report["pairs"]["test"] == [[170, 311], [302, 401], [440, 538]]
    assert report["shared"] == {"train-val": 8, "train-test": 0, "val-test": 0}
