"""Intervals and tests of shared/metrics/statistics.py: hand-worked cases, SciPy and scikit-learn, small simulations."""

import json
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score

from benchmarks import coverage
from shared.metrics.statistics import FEW_CLUSTERS, METHODS, auroc, bootstrap_interval
from shared.metrics.statistics import cases_needed, delong_auc, delong_test, effective_clusters, holm, mcnemar_exact
from shared.metrics.statistics import percentile_interval, resample_counts, sign_flip_test
from shared.metrics.statistics import wilson_interval


def made_up(n=200, effect=1.0, seed=0, decimals=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(int)
    scores = rng.normal(effect * labels)
    return labels, scores if decimals is None else scores.round(decimals)


# --- Wilson ---


def test_wilson_by_hand():
    # 5 of 10, z^2 = 3.8415: centre = (.5 + .19207) / 1.38415 = .5
    # half = 1.95996 / 1.38415 * sqrt(.025 + 3.8415 / 400) = 1.41601 * .186024 = .263413
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)


def test_wilson_at_the_ends():
    assert wilson_interval(0, 9)[0] == 0.0 and wilson_interval(9, 9)[1] == 1.0
    assert 0 < wilson_interval(0, 9)[1] < 0.35  # not a point
    assert wilson_interval(0, 0) == (None, None)
    for bad in [(5, 4), (-1, 4), (0, -1)]:
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(*bad)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


def test_wilson_coverage():
    hits = np.random.default_rng(0).binomial(60, 0.9, size=4000)
    bounds = {k: wilson_interval(k, 60) for k in range(61)}
    covered = np.mean([bounds[k][0] <= 0.9 <= bounds[k][1] for k in hits])
    assert 0.93 < covered < 0.98


# --- DeLong ---


def test_delong_by_hand():
    # positives 3, 2; negatives 1, 2.   pairs: 3>1, 3>2, 2>1 win, 2=2 half -> auc = 3.5 / 4
    # per positive: 1, .75  variance .03125; per negative: 1, .75  variance .03125
    # se = sqrt(.03125 / 2 + .03125 / 2) = .176777; auc + 1.96 se > 1 is clipped
    result = delong_auc([1, 1, 0, 0], [3, 2, 1, 2])
    assert result["auc"] == 0.875
    assert result["se"] == pytest.approx(0.03125**0.5, abs=1e-12)
    assert result["low"] == pytest.approx(0.875 - 1.959964 * 0.1767767, abs=1e-6)
    assert result["high"] == 1.0


@pytest.mark.parametrize("decimals", [None, 0])  # 0: many ties
def test_delong_equals_the_pairwise_definition(decimals):
    labels, scores = made_up(decimals=decimals)
    a, b = scores[labels == 1][:, None], scores[labels == 0][None]
    wins = (a > b) + 0.5 * (a == b)  # (P, N), the definition in O(PN)
    variance = wins.mean(1).var(ddof=1) / wins.shape[0] + wins.mean(0).var(ddof=1) / wins.shape[1]
    result = delong_auc(labels, scores)
    assert result["auc"] == pytest.approx(wins.mean(), abs=1e-12)
    assert result["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["se"] == pytest.approx(variance**0.5, abs=1e-12)


def test_delong_ignores_row_order_and_monotone_transforms():
    labels, scores = made_up()
    order = np.random.default_rng(1).permutation(len(labels))
    expected = delong_auc(labels, scores)
    assert delong_auc(labels[order], scores[order]) == pytest.approx(expected, abs=1e-12)
    assert delong_auc(labels, np.exp(scores)) == pytest.approx(expected, abs=1e-12)
    turned = delong_auc(1 - labels, -scores)  # the other class as the positive one
    assert turned == pytest.approx(expected, abs=1e-12)


def test_delong_of_shuffled_labels_covers_half():
    labels, scores = made_up(2000, effect=2)
    np.random.default_rng(0).shuffle(labels)
    result = delong_auc(labels, scores)
    assert abs(result["auc"] - 0.5) < 0.04 and result["low"] < 0.5 < result["high"]


def test_delong_coverage_and_test_level():
    # binormal scores one unit apart: true AUC = Phi(1 / sqrt 2) = .76025
    covered = rejected = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        labels = np.arange(120) % 3 == 0
        scores = rng.normal(labels)
        result = delong_auc(labels, scores)
        covered += result["low"] <= 0.76025 <= result["high"]
        noisy_a, noisy_b = scores + rng.normal(size=(2, 120))  # equally good, correlated
        rejected += delong_test(labels, noisy_a, noisy_b)["p"] < 0.05
    assert 0.92 < covered / 600 < 0.98
    assert 0.025 < rejected / 600 < 0.08


def test_delong_undefined():
    assert delong_auc([1, 1], [0.2, 0.3]) == dict(auc=None, se=None, low=None, high=None)
    assert delong_auc([1, 0, 0], [2, 1, 3]) == dict(auc=0.5, se=None, low=None, high=None)
    perfect = delong_auc([1, 1, 0, 0], [3, 2, 1, 0])
    assert (perfect["auc"], perfect["se"], perfect["low"], perfect["high"]) == (1.0, 0.0, 1.0, 1.0)
    assert set(delong_test([0, 0], [1, 2], [2, 1]).values()) == {None}


def test_delong_test_variance_is_that_of_the_pairwise_covariance():
    labels, scores = made_up()
    rng = np.random.default_rng(3)
    a, b = scores + rng.normal(size=200), scores
    wins = [(s[labels == 1][:, None] > s[labels == 0]) for s in (a, b)]
    s10, s01 = np.cov([w.mean(1) for w in wins]), np.cov([w.mean(0) for w in wins])  # DeLong's matrices
    s = s10 / (labels == 1).sum() + s01 / (labels == 0).sum()
    result = delong_test(labels, a, b)
    z = (wins[0].mean() - wins[1].mean()) / (s[0, 0] + s[1, 1] - 2 * s[0, 1]) ** 0.5
    assert result["z"] == pytest.approx(z, abs=1e-9)
    assert result["difference"] < 0 and result["low"] < result["difference"] < result["high"]
    swapped = delong_test(labels, b, a)
    assert swapped["z"] == pytest.approx(-z, abs=1e-9) and swapped["p"] == pytest.approx(result["p"], abs=1e-12)


def test_delong_test_without_variance():
    labels, scores = made_up()
    same = delong_test(labels, scores, scores * 3 + 1)
    assert (same["difference"], same["z"], same["p"]) == (0.0, 0.0, 1.0)
    opposite = delong_test([1, 1, 0, 0], [3, 2, 1, 0], [0, 1, 2, 3])  # 1 against 0, no spread to judge it by
    assert (opposite["difference"], opposite["z"], opposite["p"]) == (1.0, None, None)


@pytest.mark.parametrize(
    "labels, scores, message",
    [
        ([0, 1], [0.1, 0.2, 0.3], "length"),
        ([0, 2], [0.1, 0.2], "0 or 1"),
        ([0, np.nan], [0.1, 0.2], "0 or 1"),
        ([0, 1], [0.1, np.nan], "1 of 2 scores are NaN"),
        ([], [], "empty"),
        ([[0], [1]], [0.1, 0.2], r"shape \(N,\)"),
    ],
)
def test_bad_input_is_refused(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        delong_auc(labels, scores)


# --- bootstrap ---


def test_bootstrap_of_a_mean_matches_the_normal_interval():
    x = np.random.default_rng(0).normal(size=400)
    result = bootstrap_interval(np.mean, x)
    half = 1.96 * x.std() / 400**0.5
    assert result["value"] == pytest.approx(x.mean())
    assert (result["low"], result["high"]) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.012)
    assert result == bootstrap_interval(np.mean, x)
    assert result != bootstrap_interval(np.mean, x, seed=1)


def test_bootstrap_enumerated_by_hand():
    # two rows 0 and 1: resampled means 0, .5, 1 with chances 1/4, 1/2, 1/4
    draws = []
    result = bootstrap_interval(lambda x: draws.append(x.mean()) or x.mean(), np.array([0.0, 1.0]), num_samples=4000)
    shares = [np.mean(np.array(draws[1:]) == v) for v in (0, 0.5, 1)]  # the first call is the sample itself
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert (result["value"], result["low"], result["high"]) == (0.5, 0.0, 1.0)


def test_bootstrap_counts_undefined_resamples():
    # four rows, one positive: missing from a resample with chance (3/4)^4 = .316, all four with chance 1/256
    def auc(y, s):
        return roc_auc_score(y, s) if 0 < y.sum() < len(y) else None

    result = bootstrap_interval(auc, [1, 0, 0, 0], [2, 1, 3, 0], num_samples=1000)
    assert result["num_undefined"] / 1000 == pytest.approx(0.316 + 1 / 256, abs=0.05)
    assert result["value"] == pytest.approx(2 / 3) and result["low"] is not None
    none = bootstrap_interval(lambda y: y.mean() or None, [1, 0, 0, 0], num_samples=300)
    nan = bootstrap_interval(lambda y: y.mean() or np.nan, [1, 0, 0, 0], num_samples=300)
    assert none == nan and 50 < none["num_undefined"] < 150 and none["low"] == 0.25  # means of 0 are left out
    never = bootstrap_interval(lambda y: None, [1, 0], num_samples=50)
    assert never == dict(value=None, low=None, high=None, num_samples=50, num_undefined=50)


def test_resamples_are_those_of_one_draw_after_the_other():
    # the stream of random numbers is part of every published interval: drawing in blocks must not change it
    rng = np.random.default_rng(7)
    expected = [np.bincount(rng.integers(5000, size=5000), minlength=5000) for _ in range(300)]  # more than one block
    assert all((a == b).all() for a, b in zip(resample_counts(5000, 300, seed=7), expected, strict=True))


def test_groups_are_kept_whole():
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    drawn = np.array(list(resample_counts(6, 100, groups=groups)))
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 3] == drawn[:, 5]).all()
    assert set(drawn[:, 0] + drawn[:, 2] + drawn[:, 3]) == {3}  # three groups each time
    assert len(set(map(tuple, drawn.tolist()))) > 5
    with pytest.raises(ValueError, match="missing"):
        resample_counts(2, groups=["a", None])
    with pytest.raises(ValueError, match="groups must have shape"):
        resample_counts(3, groups=["a", "b"])


def test_cluster_bootstrap_is_wider_on_clustered_rows():
    # 40 patients with 10 nearly equal rows each: the mean has 40 independent values, so sqrt(10) = 3.2 times the width
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=40), 10) + 0.1 * rng.normal(size=400)
    rows = bootstrap_interval(np.mean, x, num_samples=800)
    patients = bootstrap_interval(np.mean, x, groups=np.repeat(np.arange(40), 10), num_samples=800)
    assert (patients["high"] - patients["low"]) / (rows["high"] - rows["low"]) == pytest.approx(10**0.5, rel=0.2)


def test_bootstrap_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="one length"):
        bootstrap_interval(np.mean, [1, 2], [1])
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval(np.mean, [])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(np.mean, [1, 2], num_samples=0)


def skewed(n=60, seed=0):
    return np.random.default_rng(seed).exponential(size=n)


def clustered(num_groups=40, seed=0):
    """Labels and calls whose rates differ from group to group, groups of 1 to 9 rows in mixed order."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(num_groups), rng.integers(1, 10, num_groups)))
    labels = rng.random(len(groups)) < rng.beta(1, 1, num_groups)[groups]
    calls = rng.random(len(groups)) < np.where(labels, 0.8, 0.2)
    return groups, labels, calls


def mean_of_sums(total, n):
    return total / n


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_percentile_equals_scipy_on_the_same_draws(confidence):
    theirs = stats.bootstrap(
        (skewed(),),
        np.mean,
        n_resamples=999,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    ours = percentile_interval(theirs.bootstrap_distribution, confidence)
    assert ours == pytest.approx((*theirs.confidence_interval, 0), abs=1e-12)


def test_jackknife_of_a_mean_is_the_t_interval():
    x = skewed(12)
    expected = stats.t.interval(0.9, 11, x.mean(), stats.sem(x))
    result = bootstrap_interval(np.mean, x, method="jackknife", confidence=0.9)
    assert (result["low"], result["high"]) == pytest.approx(expected, abs=1e-12) and result["num_samples"] == 0
    # groups of equal size: the same over the group means
    groups = np.arange(12) % 4
    means = [x[groups == g].mean() for g in range(4)]
    expected = stats.t.interval(0.9, 3, np.mean(means), stats.sem(means))
    with pytest.warns(UserWarning, match="4 groups count like 4.0"):
        result = bootstrap_interval(
            mean_of_sums, x, np.ones(12), groups=groups, method="jackknife", confidence=0.9, of_sums=True
        )
    assert (result["low"], result["high"]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_sums_and_rows_give_the_same_interval(method):
    groups, labels, calls = clustered()

    def f1(tp, fp, fn):
        return 2 * tp / (2 * tp + fp + fn)

    arguments = dict(groups=groups, method=method, num_samples=40, seed=2)
    rows = bootstrap_interval(lambda y, c: 2 * (y & c).sum() / (y.sum() + c.sum()), labels, calls, **arguments)
    sums = bootstrap_interval(f1, labels & calls, ~labels & calls, labels & ~calls, of_sums=True, **arguments)
    assert sums == pytest.approx(rows, abs=1e-12)
    assert sums["value"] == pytest.approx(f1_score(labels, calls)) and sums["low"] < sums["value"] < sums["high"]


@pytest.mark.parametrize("method", METHODS)
def test_row_order_and_names_of_groups_change_nothing(method):
    groups, labels, calls = clustered()
    right = labels == calls
    order = np.random.default_rng(5).permutation(len(groups))
    names = np.array([f"patient {g:03d}" for g in groups])
    one = bootstrap_interval(mean_of_sums, right, np.ones(len(right)), groups=groups, method=method, of_sums=True)
    other = bootstrap_interval(
        mean_of_sums, right[order], np.ones(len(right)), groups=names[order], method=method, of_sums=True
    )
    assert one == pytest.approx(other, abs=1e-12)


def test_a_point_and_undefined_intervals():
    ones = np.ones(50)
    for method in ("percentile", "jackknife"):  # no error made: a point, as documented of binary_intervals too
        assert bootstrap_interval(np.mean, ones, method=method, num_samples=50)["low"] == 1.0
    # one positive row: undefined without it
    result = bootstrap_interval(lambda hits, n: hits / n, [1, 0, 0], [1, 0, 0], method="jackknife", of_sums=True)
    assert (result["value"], result["low"], result["high"]) == (1.0, None, None)
    with pytest.warns(UserWarning, match="1 groups"):
        assert bootstrap_interval(np.mean, [1.0, 2.0], groups=["a", "a"], method="jackknife")["low"] is None


def test_bootstrap_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="percentile, jackknife"):
        bootstrap_interval(np.mean, [1, 2], method="BCa")
    with pytest.raises(ValueError, match="of_sums needs arrays"):
        bootstrap_interval(mean_of_sums, np.ones((3, 2)), np.ones(3), of_sums=True)
    with pytest.raises(ValueError, match="one value per sum"):
        bootstrap_interval(lambda a: a.mean(), [1, 2, 3], of_sums=True)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(np.mean, [1, 2], method="jackknife", confidence=95)


# --- clusters ---


def test_effective_clusters_by_hand():
    # sizes 3 and 1: 4^2 / (9 + 1) = 1.6
    assert effective_clusters(["a", "a", "b", "a"]) == dict(
        num_rows=4, num_groups=2, effective_groups=1.6, warning=effective_clusters(["a", "a", "b", "a"])["warning"]
    )
    assert effective_clusters(np.arange(90) // 3)["effective_groups"] == pytest.approx(30)
    # constant within groups: icc 1, design effect sum n^2 / N; no rows gained over the groups
    all_alike = effective_clusters(np.arange(12) // 3, [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    assert (all_alike["icc"], all_alike["design_effect"], all_alike["effective_rows"]) == pytest.approx((1, 3, 4))
    # groups (0, 1), (1, 1), (0, 0): means .5, 1, 0 -> between = 2 * .5 / 2 = .5, within = .5 / 3; icc = (1/3) / (2/3)
    mixed = effective_clusters([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 0])
    assert (mixed["icc"], mixed["design_effect"], mixed["effective_rows"]) == pytest.approx((0.5, 1.5, 4))
    # sizes 3, 1, 2; means 1/3, 1, 1 around 2/3 -> between = 6/9 / 2 = 1/3, within = 6/9 / 3 = 2/9, size = (6 - 14/6) /
    # 2 = 11/6 icc = (1/3 - 2/9) / (1/3 + 5/6 * 2/9) = 3/14; design effect 1 + (14/6 - 1) * 3/14 = 9/7
    uneven = effective_clusters([0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1])
    assert (uneven["icc"], uneven["design_effect"], uneven["effective_rows"]) == pytest.approx((3 / 14, 9 / 7, 14 / 3))
    for groups in (np.arange(5), np.zeros(5)):  # one row each, or one group: nothing to compare
        assert effective_clusters(groups, np.arange(5))["icc"] is None
    assert effective_clusters([0, 0, 1, 1], [1, 1, 1, 1])["design_effect"] is None


def test_icc_and_design_effect_recover_the_truth():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 12, 4000)
    groups = np.repeat(np.arange(4000), sizes)
    values = 0.5**0.5 * rng.normal(size=4000)[groups] + 0.5**0.5 * rng.normal(size=len(groups))
    result = effective_clusters(groups, values)
    assert result["icc"] == pytest.approx(0.5, abs=0.03)
    # variance of the mean: sum n^2 * .5 + N * .5 over N^2, against 1 / N for independent rows
    assert result["design_effect"] == pytest.approx(0.5 * (sizes**2).sum() / sizes.sum() + 0.5, rel=0.05)


def test_few_clusters_are_said():
    few, enough = np.arange(2 * FEW_CLUSTERS - 2) // 2, np.arange(2 * FEW_CLUSTERS) // 2
    assert "29 groups count like 29.0" in effective_clusters(few)["warning"]
    assert effective_clusters(enough)["warning"] is None
    lopsided = np.concatenate([enough, np.zeros(50, int)])  # as many groups, but one of them has 52 rows
    assert effective_clusters(lopsided)["effective_groups"] < 10 and effective_clusters(lopsided)["warning"]
    with pytest.warns(UserWarning, match="29 groups"):
        bootstrap_interval(np.mean, few, groups=few, num_samples=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bootstrap_interval(np.mean, enough, groups=enough, num_samples=5)
        bootstrap_interval(np.mean, [1, 2], num_samples=5)  # no groups: n stands beside the result anyway
    with pytest.raises(ValueError, match="missing"):
        effective_clusters(["a", None])
    with pytest.raises(ValueError, match="empty"):
        effective_clusters([])
    with pytest.raises(ValueError, match="one per row"):
        effective_clusters([0, 1], [1, np.nan])


# --- tests ---


def test_sign_flip_by_hand():
    # 1, 2, 3: of the 8 sign patterns only +++ and --- reach |6|
    assert sign_flip_test([1, 2, 3]) == dict(difference=2.0, p=0.25, exact=True, num_groups=3, num_samples=4)
    # 1, -2, 3: |sum| = 2 or more unless 1 + 2 - 3 = 0 or its mirror image
    assert sign_flip_test([1, -2, 3])["p"] == 0.75
    assert sign_flip_test([0, 0])["p"] == 1.0 and sign_flip_test([0, 0])["num_groups"] == 0
    # two groups of sums 3 and 3: one of two patterns
    assert sign_flip_test([1, 2, 4, -1], groups=["a", "a", "b", "b"])["p"] == 0.5
    tenths = np.array([2, 1, 1, 6, -3, 4, 2, -6])  # many equal sums, which in tenths differ in their last digits
    assert sign_flip_test(tenths / 10)["p"] == sign_flip_test(tenths)["p"] == 150 / 256
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            sign_flip_test(bad)
    with pytest.raises(ValueError, match="at least one sample"):
        sign_flip_test(np.ones(30), num_samples=0)


@pytest.mark.parametrize("n", [5, 11])
def test_exact_sign_flip_equals_scipy(n):
    x = np.random.default_rng(n).normal(0.4, size=n).round(1)
    theirs = stats.permutation_test(
        (x, np.zeros(n)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    ours = sign_flip_test(x)
    assert ours["exact"] and ours["p"] == pytest.approx(theirs.pvalue, abs=1e-12) and 0 < ours["p"] < 1


def test_random_sign_flips_approach_the_exact_ones(monkeypatch):
    x = np.random.default_rng(3).normal(0.4, size=18)
    exact = sign_flip_test(x)["p"]
    monkeypatch.setattr("shared.metrics.statistics.EXACT_UP_TO", 0)
    random = sign_flip_test(x, num_samples=20000)
    assert not random["exact"] and random["p"] == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 20000) ** 0.5)
    assert random == sign_flip_test(x, num_samples=20000)
    assert sign_flip_test(np.ones(40), num_samples=999)["p"] == 1 / 1000  # never 0
    # 15 of 25 for a: as far or farther, 2 P(K >= 15) = .424; farther alone would be .230
    votes = np.repeat([1, -1], [15, 10])
    assert sign_flip_test(votes, num_samples=20000)["p"] == pytest.approx(2 * stats.binom.sf(14, 25, 0.5), abs=0.011)


def test_sign_flip_of_right_and_wrong_is_mcnemar():
    rng = np.random.default_rng(0)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    assert 10 < mcnemar_exact(a, b)["only_a"] + mcnemar_exact(a, b)["only_b"]
    keep = np.flatnonzero(a != b)[:16]  # few enough to try all signs
    ours, theirs = sign_flip_test(a[keep] * 1.0 - b[keep]), mcnemar_exact(a[keep], b[keep])
    assert ours["p"] == pytest.approx(theirs["p"], abs=1e-12) and 0.001 < ours["p"] < 1
    # every row three times: McNemar believes it has three times the cases, the test by group is not moved
    tripled = np.repeat(keep, 3)
    assert sign_flip_test(a[tripled] * 1.0 - b[tripled], groups=tripled)["p"] == pytest.approx(ours["p"])
    assert mcnemar_exact(a[tripled], b[tripled])["p"] < theirs["p"] / 2


def exact_mcnemar_power(n, delta, discordant):
    power = 0.0
    for d in range(n + 1):  # number of discordant cases; of these Binomial(d, share) favour a
        k = np.arange(d + 1)
        p = np.minimum(1, 2 * np.minimum(stats.binom.cdf(k, d, 0.5), stats.binom.sf(k - 1, d, 0.5)))
        power += (
            stats.binom.pmf(d, n, discordant) * stats.binom.pmf(k, d, 0.5 + delta / discordant / 2)[p <= 0.05].sum()
        )
    return power


def test_cases_needed():
    assert cases_needed(0.05, 0.30) == 940 and cases_needed(-0.10, 0.30) == 234
    assert 0.75 < exact_mcnemar_power(234, 0.10, 0.30) < 0.81  # as the docstring says, a few points short of 0.8
    assert cases_needed(0.1, 0.3, power=0.9) > 234 > cases_needed(0.1, 0.3, alpha=0.1)
    # everything discordant and all for one side: z_a^2 = 3.84 -> 4
    assert cases_needed(1.0, 1.0) == 4
    for arguments, message in [
        ((0.0, 0.3), "delta"),
        ((0.4, 0.3), "at least that share"),
        ((0.1, 1.2), "discordant"),
        ((0.1, 0.3, 1.0), "power"),
        ((0.1, 0.3, 0.8, 0.0), "alpha"),
    ]:
        with pytest.raises(ValueError, match=message):
            cases_needed(*arguments)


def test_mcnemar_by_hand():
    # a alone right 1 time, b alone 5 times: two-sided 2 * (C(6,0) + C(6,1)) / 2^6 = 14 / 64
    a = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0])
    b = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0])
    assert mcnemar_exact(a, b) == dict(only_a=1, only_b=5, p=pytest.approx(14 / 64))
    assert mcnemar_exact(b == 1, a == 1) == dict(only_a=5, only_b=1, p=pytest.approx(14 / 64))
    assert mcnemar_exact([True, False], [True, False]) == dict(only_a=0, only_b=0, p=1.0)
    with pytest.raises(ValueError, match="true/false"):
        mcnemar_exact([0.3, 1], [0, 1])


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04; never falling -> .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.01, None]) == [0.02, None]  # the undefined one still counts
    assert holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, float("nan")])


# --- coverage of all intervals: benchmarks/coverage.py with fewer repetitions ---


def test_coverage_truths_are_those_of_a_large_sample():
    for name, draw in coverage.SCENARIOS.items():
        case = draw(np.random.default_rng(0), 60_000)
        value = case.metric(*(np.sum(c) for c in case.columns))
        assert value == pytest.approx(case.truth, abs=0.04 if name.startswith("heavy") else 0.012), name


@pytest.mark.slow
def test_coverage_of_every_interval(tmp_path, capsys):
    coverage.main(
        ["--repetitions", "200", "--clusters", "5", "100", "--num-samples", "500", "--out-dir", str(tmp_path)]
    )
    result = json.loads((tmp_path / "coverage.json").read_text())
    held = {
        (data, name): (cells["5"]["coverage"], cells["100"]["coverage"])
        for data, rows in result["coverage"].items()
        for name, cells in rows.items()
    }
    slack = 2 * (0.05 * 0.95 / 200) ** 0.5  # two Monte Carlo standard errors
    for (data, name), (five, hundred) in held.items():
        if name.endswith("rows"):  # the groups ignored
            assert hundred < 0.93, (data, name)
        elif not data.startswith("heavy"):
            assert 0.93 - slack < hundred < 0.97 + slack, (data, name)
        if name == "percentile" and data.endswith("clustered"):
            assert five < 0.90, (data, name)
    assert held["share 0.8, clustered", "jackknife"][0] > held["share 0.8, clustered", "percentile"][0] + 0.02
    assert result["rejection_rates"]["sign_flip_test, by group"]["100"]["rejected"] < 0.05 + slack
    assert result["rejection_rates"]["mcnemar_exact, rows"]["100"]["rejected"] > 0.08
    assert result["rejection_rates"]["sign_flip_test, by group"]["5"]["rejected"] == 0
    assert "| share 0.8, clustered | Wilson, rows |" in capsys.readouterr().out


def test_auroc_equals_sklearns_with_and_without_ties():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10**6):
        labels, scores = np.r_[0, 1, rng.integers(0, 2, 98)], rng.integers(0, levels, 100).astype(float)
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc([0, 0, 1, 1], [1, 2, 2, 3]) == pytest.approx(3.5 / 4) and auroc([1, 1], [0, 1]) is None
