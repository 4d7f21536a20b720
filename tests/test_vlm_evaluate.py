"""vlm_evaluate.py: its measures by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from task1_classification.vlm_data import Films
from task1_classification.vlm_evaluate import areas, baselines, best_f1_threshold, interval, label_numbers, over_seeds


def test_areas_of_many_weightings_are_scikit_learns():
    draw = np.random.default_rng(0)
    truth, scores = draw.integers(0, 2, 60), draw.integers(0, 9, 60) / 4  # many ties
    weights = draw.integers(0, 4, (25, 60))
    auc, ap = areas(truth, scores, weights)
    for w, a, p in zip(weights, auc, ap, strict=True):
        assert a == pytest.approx(roc_auc_score(truth, scores, sample_weight=w))
        assert p == pytest.approx(average_precision_score(truth, scores, sample_weight=w))
    assert np.isnan(areas(truth, scores, truth[None])[0]).all()  # positives alone


def test_the_f1_threshold_is_the_best_one():
    draw = np.random.default_rng(1)
    truth = draw.integers(0, 2, 80)
    scores = truth + draw.normal(size=80)
    best = max(f1_score(truth, scores >= cut) for cut in scores)
    assert f1_score(truth, scores > best_f1_threshold(truth, scores)) == pytest.approx(best)


def test_numbers_of_a_label_by_hand():
    """Scores that part the validation films at 0.5: of the test films one of two positives is found, no negative."""
    val = np.array([0, 0, 1, 1]), np.array([-1.0, 0.0, 1.0, 2.0])
    test = np.array([1, 1, 0, 0]), np.array([2.0, -0.5, -1.0, 0.2])
    row = label_numbers(val, test)
    assert row["balanced_accuracy"] == 0.75 and row["f1"] == pytest.approx(2 / 3) and row["auc"] == 0.75
    assert row["prevalence"] == 0.5 and row["yes"] == 0.5 and row["unparsed"] is None
    row = label_numbers(val, test, np.array([1, np.nan, 0, 0]))
    assert row["unparsed"] == 0.25 and row["yes"] == pytest.approx(1 / 3)


def test_seeds_are_resampled_together_and_the_last_column_is_the_mean():
    draws = np.random.default_rng(0).normal(size=(3, 2, 101))
    found = over_seeds(draws, 0)
    assert found[:, -1] == pytest.approx(draws[:, :, -1].mean(0))
    assert np.ptp(over_seeds(draws + 5, 0) - found - 5) < 1e-12  # the same seeds: a constant stays one
    assert over_seeds(draws[:1], 0) == pytest.approx(draws[0])


def test_the_mean_over_labels_leaves_out_what_a_draw_does_not_have():
    draws = np.array([[0.5, np.nan, 0.7], [0.7, 0.9, 0.9], [9.0, 9.0, 9.0]])
    found = interval(draws, np.array([True, True, False]))
    assert found["value"] == pytest.approx(0.8) and found["low"] == pytest.approx(0.6, abs=0.01)
    assert found["high"] == pytest.approx(0.9, abs=0.01)
    assert interval(draws, np.zeros(3, bool))["value"] is None


@pytest.mark.filterwarnings("error")
def test_the_text_oracle_says_what_it_cannot_read():
    rows = [{"id": str(i), "patient": str(i), "split": "test", "image": "", "report": text}
            for i, text in enumerate(("There is pulmonary edema.", "No edema."))]  # fmt: skip
    films = Films("own", ("Edema", "Granuloma"), rows, np.array([[1, 0], [0, 1]], np.float32), {"name": "own"})
    usual, oracle = baselines(films, np.array([[1, np.nan], [0, np.nan]]))
    assert usual.scores[0].tolist() == [[0, 0], [0, 0]]  # half of them positive; and nothing known
    assert oracle.scores[0].tolist() == [[3, 0], [-3, 0]]
    assert "cannot tell Granuloma, which count as .5" in oracle.note
    films.labels = ("Granuloma", "Other")
    assert [m.name for m in baselines(films, films.truth)] == ["majority"]
