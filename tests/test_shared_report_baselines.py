"""Baselines and collapse numbers against slow, plain versions of the same definitions."""

import numpy as np
import pytest

from shared.metrics.report_baselines import baseline_reports, best_constant, diversity, most_frequent, nearest_reports
from shared.metrics.report_baselines import oracle_reports, random_reports, self_bleu
from shared.metrics.text import score_reports

WORDS = "the no is are lungs effusion normal clear heart . . . of".split()


def random_texts(n, seed, longest=15, shortest=1):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, longest + 1))) for _ in range(n)]


# ------------------------------------------------------------------------------------------------------------- constant


@pytest.mark.parametrize("metric", ["bleu_1", "bleu_2", "bleu_4"])
def test_the_best_constant_is_that_of_scoring_every_candidate(metric):
    for seed in range(5):
        candidates, references = (
            random_texts(20, seed),
            [random_texts(1 + i % 3, 100 + 10 * seed + i) for i in range(12)],
        )
        scores = [score_reports([text] * 12, references, metrics=("bleu",))[metric] for text in candidates]
        assert best_constant(candidates, references, metric=metric) == candidates[int(np.argmax(scores))]


def test_the_constant_is_returned_as_it_was_written():
    assert best_constant(["Lungs clear.", "Heart."], ["lungs clear ."], tokenizer="r2gen") == "Lungs clear."
    assert best_constant(["a b", "x"], ["x", "x", "a b"], metric="bleu_1") == "x"


def test_bad_input_for_a_constant():
    with pytest.raises(ValueError, match="no candidates"):
        best_constant([], ["a"])
    with pytest.raises(ValueError, match="empty"):
        best_constant(["a"], [])
    with pytest.raises(ValueError, match="not by 'cider'"):
        best_constant(["a"], ["a"], metric="cider")


# ---------------------------------------------------------------------------------------------- mode, random, neighbour


def test_most_frequent():
    assert most_frequent(["b", "a", "c", "a", "c"]) == "a"  # the first of two that occur twice
    with pytest.raises(ValueError, match="no reports"):
        most_frequent([])


def test_random_reports_follow_the_seed_and_the_frequencies():
    reports = ["common"] * 9 + ["rare"]
    drawn = random_reports(reports, 2000, seed=3)
    assert drawn == random_reports(reports, 2000, seed=3) != random_reports(reports, 2000, seed=4)
    assert 0.87 < drawn.count("common") / 2000 < 0.93
    with pytest.raises(ValueError, match="no reports"):
        random_reports([], 1)


def test_nearest_reports_by_angle_not_by_length():
    reports, vectors = ["right", "up", "diagonal"], [[100.0, 0], [0, 0.1], [1, 1]]
    assert nearest_reports(reports, vectors, [[0.01, 0.0], [0, 5], [3, 2.5], [1, 1]]) == [
        "right",
        "up",
        "diagonal",
        "diagonal",
    ]
    with pytest.raises(ValueError, match="do not fit"):
        nearest_reports(reports, vectors, [[1.0, 0, 0]])
    with pytest.raises(ValueError, match="do not fit"):
        nearest_reports(reports[:2], vectors, [[1.0, 0]])
    for bad in ([0, 0], [np.nan, 1]):
        with pytest.raises(ValueError, match="zero or not finite"):
            nearest_reports(reports, vectors, [bad])


# --------------------------------------------------------------------------------------------------------------- oracle


def test_oracle_gives_the_canned_report_of_the_same_labels():
    reports = [
        "lungs clear no effusion",
        "lungs clear no disease",
        "lungs clear no effusion seen",
        "effusion left",
        "effusion on the left",
    ]
    labels = [(0, 0)] * 3 + [(0, 1)] * 2
    found = oracle_reports(reports, labels, [(0, 1), (0, 0), (0, 0), (1, 1)])
    assert found[1] == found[2] == best_constant(reports[:3], reports[:3])
    assert (
        found[0] in reports[3:] and found[3] == found[0]
    )  # nobody has (1, 1): one difference to (0, 1), two to (0, 0)


def test_oracle_takes_the_more_frequent_of_equally_near_label_sets():
    reports = ["a", "b", "b", "c"]
    assert oracle_reports(reports, [(1, 0), (0, 1), (0, 1), (0, 0)], [(1, 1)]) == ["b"]


def test_bad_input_for_the_oracle():
    with pytest.raises(ValueError, match="2 reports and 1 rows"):
        oracle_reports(["a", "b"], [(0,)], [(0,)])
    with pytest.raises(ValueError, match="differ in length"):
        oracle_reports(["a"], [(0,)], [(0, 1)])


def test_all_baselines_by_name():
    train = ["lungs clear", "lungs clear", "effusion left", "heart large"]
    vectors, labels = np.eye(4)[[0, 0, 1, 2]], [(0, 0), (0, 0), (1, 0), (0, 1)]
    found = baseline_reports(
        train,
        ["effusion left side"],
        2,
        train_vectors=vectors,
        vectors=vectors[2:],
        train_labels=labels,
        labels=[(1, 0), (0, 1)],
    )
    assert found["constant"] == ["effusion left"] * 2 and found["most frequent"] == ["lungs clear"] * 2
    assert found["nearest neighbour"] == found["oracle labels, canned report"] == ["effusion left", "heart large"]
    assert len(found["random"]) == 2 and set(found["random"]) <= set(train)
    assert set(baseline_reports(train, ["effusion"], 2)) == {"constant", "most frequent", "random"}
    with pytest.raises(ValueError, match="has 1 reports for 2 cases"):
        baseline_reports(train, ["effusion"], 2, train_labels=labels, labels=[(1, 0)])


# ------------------------------------------------------------------------------------------------------------ diversity


def test_self_bleu_is_the_mean_bleu_against_all_others():
    for texts in (
        random_texts(12, 0),
        random_texts(6, 1) * 2,
        ["a b c d", "a b c d", "x"],
        ["a", "b"],
        ["", "a b c d e"],
        ["", ""],
    ):
        others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
        expected = score_reports(texts, others, metrics=("bleu",), per_report=True)["bleu_4"].mean()
        assert self_bleu(texts) == pytest.approx(expected, abs=1e-12)


def test_diversity_of_a_collapsed_and_of_a_varied_model():
    collapsed = diversity(
        ["lungs are clear . no effusion ."] * 5, ["lungs are clear . no effusion or pneumothorax ."] * 4 + ["other"]
    )
    assert (
        collapsed["n"] == 5
        and collapsed["distinct_reports"] == 1
        and collapsed["distinct_sentences"] == 2
        and collapsed["sentences"] == 10
    )
    assert (
        collapsed["share_most_frequent"] == 1
        and collapsed["self_bleu"] == pytest.approx(1, abs=1e-8)
        and collapsed["words"] == 7
    )
    assert collapsed["length_ratio"] == pytest.approx(35 / 37) and collapsed["reference_distinct_reports"] == 2
    varied = diversity(["lungs are clear . no effusion .", "heart large .", "no effusion .", "heart large ."])
    assert (
        varied["distinct_reports"] == 3
        and varied["share_most_frequent"] == 0.5
        and varied["distinct_sentences"] == 3
        and varied["sentences"] == 5
    )
    assert "length_ratio" not in varied and varied["self_bleu"] < 1


def test_diversity_of_odd_reports():
    assert diversity(["a"])["self_bleu"] is None
    assert (
        diversity(["Clear. 1.5 cm nodule.\nClear."])["distinct_sentences"] == 2
    )  # the dot of a number ends no sentence
    empty = diversity(["", ""], ["", ""])
    assert empty["sentences"] == 0 and empty["length_ratio"] is None and empty["distinct_reports"] == 1
    assert diversity(["Clear.", "clear ."], tokenizer="r2gen")["distinct_reports"] == 1
    with pytest.raises(ValueError, match="empty"):
        diversity([])


def test_the_order_of_reports_changes_nothing():
    texts = random_texts(20, 5)
    assert diversity(texts) == pytest.approx(diversity(texts[::-1]))
