"""shared/metrics/classification.py: hand-worked cases, scikit-learn, MedMNIST's evaluator, properties."""

import json
import time

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import metrics as sk

from shared.metrics.classification import binary_intervals, binary_metrics, choose_threshold, expected_calibration_error
from shared.metrics.classification import fit_temperature, multiclass_metrics, multilabel_metrics, official_auc_accuracy
from shared.metrics.classification import prior_correction, reliability_bins
from shared.metrics.statistics import bootstrap_interval, delong_auc, wilson_interval


def binary_case(n=300, seed=0, decimals=8):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.6).astype(int)
    return labels, expit(rng.normal(2 * labels - 1, 1.5)).round(decimals)


def class_case(n=200, c=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    return labels, softmax(rng.normal(2 * np.eye(c)[labels], 1.5), axis=1)


# --- binary ---


def test_binary_by_hand():
    #  score  .9 .8 .6 .5 .4 .2     > .5 calls the first three; .5 itself is not called
    #  label   1  1  0  1  0  0     tp 2 fp 1 fn 1 tn 2
    m = binary_metrics([1, 1, 0, 1, 0, 0], [0.9, 0.8, 0.6, 0.5, 0.4, 0.2], 0.5)
    assert (m["tp"], m["fp"], m["fn"], m["tn"]) == (2, 1, 1, 2)
    assert (m["n"], m["num_positive"], m["prevalence"], m["threshold"]) == (6, 3, 0.5, 0.5)
    for name in ("accuracy", "precision", "recall", "specificity", "npv", "f1", "balanced_accuracy"):
        assert m[name] == pytest.approx(2 / 3), name
    assert m["mcc"] == pytest.approx((2 * 2 - 1 * 1) / 9)  # (tp tn - fp fn) / sqrt(3 3 3 3)
    assert m["auc"] == pytest.approx(8 / 9)  # one of nine pairs is wrong: .5 below .6
    assert m["pr_auc"] == pytest.approx((1 + 1 + 3 / 4) / 3)  # precision at each positive
    assert m["brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.25 + 0.16 + 0.04) / 6)
    assert m["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.5, 0.6, 0.8]).mean())
    assert m["ece"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.5 + 0.4 + 0.2) / 6)  # 15 bins: every row its own


@pytest.mark.parametrize("decimals", [8, 1])
def test_binary_agrees_with_sklearn(decimals):
    labels, scores = binary_case(decimals=decimals)
    called = scores > 0.3
    m = binary_metrics(labels, scores, 0.3)
    expected = dict(
        accuracy=sk.accuracy_score(labels, called),
        precision=sk.precision_score(labels, called),
        recall=sk.recall_score(labels, called),
        specificity=sk.recall_score(labels, called, pos_label=0),
        npv=sk.precision_score(labels, called, pos_label=0),
        f1=sk.f1_score(labels, called),
        balanced_accuracy=sk.balanced_accuracy_score(labels, called),
        mcc=sk.matthews_corrcoef(labels, called),
        brier=sk.brier_score_loss(labels, scores),
        log_loss=sk.log_loss(labels, scores),
    )
    for name, value in expected.items():
        assert m[name] == pytest.approx(value, abs=1e-12), name


def test_binary_undefined_is_none_and_json_is_plain():
    m = binary_metrics([1, 1], [0.2, 0.9], 0.5)
    assert [m[k] for k in ("specificity", "auc", "pr_auc", "balanced_accuracy", "mcc")] == [None] * 5
    assert m["npv"] == 0.0  # one negative call, wrong
    m = binary_metrics([1, 0], [0.2, 0.1], 0.5)
    assert m["precision"] is None and m["f1"] == 0.0 and m["mcc"] == 0.0
    m = binary_metrics([1, 0], [3.0, -2.0], 0)  # logits
    assert m["auc"] == 1.0 and m["log_loss"] is m["brier"] is m["ece"] is None
    m = binary_metrics(np.array([True, False]), np.float32([1, 0]), np.float32(0.5))
    assert json.loads(json.dumps(m, allow_nan=False)) == m and m["log_loss"] < 1e-12
    assert binary_metrics([1] * 50_000 + [0] * 50_000, np.linspace(1, 0, 100_000), 0.25)["mcc"] == pytest.approx(
        1 / 3**0.5, abs=1e-4
    )  # tp 50, fp 25, tn 25, fn 0 thousand: 50 * 25 / sqrt(75 * 50 * 50 * 25)


def test_binary_properties():
    labels, scores = binary_case()
    order = np.random.default_rng(1).permutation(300)
    assert binary_metrics(labels[order], scores[order], 0.4) == pytest.approx(binary_metrics(labels, scores, 0.4))
    for transform in (np.sqrt, np.log, lambda s: 5 * s - 3):
        m = binary_metrics(labels, transform(scores), transform(0.4))
        assert {k: m[k] for k in ("auc", "pr_auc", "tp", "fp")} == pytest.approx(
            {k: binary_metrics(labels, scores, 0.4)[k] for k in ("auc", "pr_auc", "tp", "fp")}
        )
    labels, scores = binary_case(4000)
    assert binary_metrics(labels[np.random.default_rng(0).permutation(4000)], scores)["auc"] == pytest.approx(
        0.5, abs=0.03
    )
    turned, m = binary_metrics(1 - labels, 1 - scores), binary_metrics(labels, scores)
    assert (turned["recall"], turned["npv"]) == pytest.approx((m["specificity"], m["precision"]))
    assert turned["mcc"] == pytest.approx(m["mcc"]) and turned["auc"] == pytest.approx(m["auc"])


@pytest.mark.parametrize("function", [binary_metrics, binary_intervals, choose_threshold])
@pytest.mark.parametrize(
    "labels, scores, message",
    [
        ([0, 1], [0.5], "length"),
        ([0, -1], [0.1, 0.2], "0 or 1"),
        ([0, 1], [0.1, np.nan], "NaN"),
        ([], [], "empty"),
        ([[0, 1]], [[0.1, 0.2]], "shape"),
    ],
)
def test_bad_binary_input_is_refused(function, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        function(labels, scores)


def test_bad_threshold_is_refused():
    with pytest.raises(ValueError, match="finite"):
        binary_metrics([0, 1], [0, 1], np.nan)


@pytest.mark.parametrize("decimals", [8, 1])  # 1: many ties
def test_intervals_equal_the_plain_bootstrap(decimals):
    labels, scores = binary_case(60, decimals=decimals)
    fast = binary_intervals(labels, scores, 0.4, num_samples=150, seed=3)
    plain = dict(
        auc_bootstrap=sk.roc_auc_score,
        pr_auc=sk.average_precision_score,
        f1=lambda y, s: sk.f1_score(y, s > 0.4),
        mcc=lambda y, s: sk.matthews_corrcoef(y, s > 0.4),
        balanced_accuracy=lambda y, s: sk.balanced_accuracy_score(y, s > 0.4),
    )
    for name, metric in plain.items():
        slow = bootstrap_interval(metric, labels, scores, num_samples=150, seed=3)
        assert (fast[name]["low"], fast[name]["high"]) == pytest.approx((slow["low"], slow["high"]), abs=1e-12), name
        assert fast[name]["method"] == "bootstrap" and fast[name]["num_undefined"] == 0
    m, delong = binary_metrics(labels, scores, 0.4), delong_auc(labels, scores)
    assert fast["auc"] == dict(low=delong["low"], high=delong["high"], method="delong")
    for name, hits, n in (
        ("recall", m["tp"], m["tp"] + m["fn"]),
        ("specificity", m["tn"], m["tn"] + m["fp"]),
        ("precision", m["tp"], m["tp"] + m["fp"]),
        ("npv", m["tn"], m["tn"] + m["fn"]),
        ("accuracy", m["tp"] + m["tn"], 60),
    ):
        low, high = wilson_interval(hits, n)
        assert fast[name] == dict(low=low, high=high, method="wilson"), name


def test_intervals_with_groups():
    labels, scores = binary_case(100)
    copies = [np.repeat(a, 4) for a in (labels, scores)]  # each row four times: nothing new is known
    once = binary_intervals(labels, scores, num_samples=400)
    fooled = binary_intervals(*copies, num_samples=400)
    grouped = binary_intervals(*copies, num_samples=400, groups=np.repeat(np.arange(100), 4))
    for name in ("accuracy", "auc", "pr_auc", "f1", "recall"):
        width = {k: v[name]["high"] - v[name]["low"] for k, v in dict(o=once, f=fooled, g=grouped).items()}
        assert width["f"] < 0.6 * width["o"] and width["g"] == pytest.approx(width["o"], rel=0.2), name
        assert grouped[name]["method"] == "cluster bootstrap"


def test_intervals_of_one_class():
    result = binary_intervals([1, 1, 1], [0.2, 0.7, 0.8], num_samples=20)
    assert result["auc"] == dict(low=None, high=None, method="delong")
    assert result["specificity"] == dict(low=None, high=None, method="wilson")
    assert result["pr_auc"] == dict(low=None, high=None, method="bootstrap", num_undefined=20)
    json.dumps(result, allow_nan=False)


def test_intervals_are_quick():
    labels, scores = binary_case(624)
    start = time.process_time()
    result = binary_intervals(labels, scores)
    assert time.process_time() - start < 5
    assert result["auc"]["low"] == pytest.approx(result["auc_bootstrap"]["low"], abs=0.01)


# --- thresholds ---


def test_threshold_by_hand():
    labels = [0, 0, 1, 0, 1, 1]
    scores = [0.1, 0.2, 0.4, 0.5, 0.72, 0.9]
    # errors by gap: below .1 3, .1-.2 2, .2-.4 1, .4-.5 2, .5-.72 1, .72-.9 2, above .9 3
    # two best gaps, balanced accuracy 5/6 in both; the second is wider
    assert choose_threshold(labels, scores) == pytest.approx(0.61)


def test_threshold_in_the_middle_of_a_plateau():
    # as good in the gaps .2-.4, .4-.6, .6-.8, because .4 and .6 each hold one of either class
    labels, scores = [0, 0, 1, 0, 1, 1], [0.2, 0.4, 0.4, 0.6, 0.6, 0.8]
    assert choose_threshold(labels, scores) == pytest.approx(0.5)


def test_threshold_is_the_best_of_all():
    def balanced(t):
        return (np.mean(scores[labels == 1] > t) + np.mean(scores[labels == 0] <= t)) / 2

    for seed in range(20):
        labels, scores = binary_case(80, seed, decimals=1 + seed % 2)
        chosen = balanced(choose_threshold(labels, scores))
        assert chosen == pytest.approx(max(balanced(t) for t in [-1, *scores]), abs=1e-12)


def test_threshold_at_the_ends_and_between_adjacent_floats():
    # the wrong way round: between the scores it is worse than calling all positive, just below the lowest score
    scores = np.float32([0.1, 0.2, 0.3])
    threshold = choose_threshold([1, 0, 0], scores)
    assert (scores > np.float32(threshold)).all() and threshold == pytest.approx(0.1, abs=1e-5)
    for low in (1.0, np.nextafter(1.0, 2)):
        scores = np.array([low, np.nextafter(low, 2)])
        assert (scores > choose_threshold([0, 1], scores)).tolist() == [False, True]


def test_threshold_refuses():
    with pytest.raises(ValueError, match="both classes"):
        choose_threshold([1, 1], [0.1, 0.2])


# --- several classes ---


def test_multiclass_by_hand():
    # true   0 0 1 1 2
    # called 0 1 1 1 0
    calls = np.array([0, 1, 1, 1, 0])
    m = multiclass_metrics([0, 0, 1, 1, 2], np.eye(4)[calls] * 0.7 + 0.075, ordinal=True)  # class 3 never occurs
    assert m["accuracy"] == 3 / 5
    assert m["confusion_matrix"] == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert m["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert m["macro_precision"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert m["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert m["weighted_f1"] == pytest.approx((2 * 1 / 2 + 2 * 4 / 5 + 0) / 5)
    assert [row["precision"] for row in m["per_class"]] == pytest.approx([1 / 2, 2 / 3, None, None])
    assert [row["recall"] for row in m["per_class"]] == pytest.approx([1 / 2, 1, 0, None])
    assert m["skipped_classes"] == [3] and m["per_class"][3]["auc"] is None
    # class 0: pairs (called, not) .775 > .075; auc = (1*2/3 + half ties) over 2*3: hits 2 wins 3 ties = (2 + 1.5) / 6
    assert m["per_class"][0]["auc"] == pytest.approx(3.5 / 6)
    assert m["macro_auc"] == pytest.approx(np.mean([m["per_class"][c]["auc"] for c in range(3)]))
    assert m["mean_absolute_error"] == pytest.approx((1 + 2) / 5)
    assert m["ece"] == pytest.approx(abs(0.775 - 3 / 5))  # one tied confidence, one bin
    json.dumps(m, allow_nan=False)


def test_multiclass_agrees_with_sklearn():
    labels, p = class_case()
    calls = p.argmax(1)
    m = multiclass_metrics(labels, p, ordinal=True)
    assert m["macro_auc"] == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr"), abs=1e-12)
    assert m["macro_f1"] == pytest.approx(sk.f1_score(labels, calls, average="macro"), abs=1e-12)
    assert m["weighted_recall"] == pytest.approx(m["accuracy"], abs=1e-12)
    assert m["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, calls), abs=1e-12)
    assert m["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, calls), abs=1e-12)
    matrix, d = np.array(m["confusion_matrix"]), np.subtract.outer(np.arange(4), np.arange(4)) ** 2
    expected = np.outer(matrix.sum(1), matrix.sum(0)) / matrix.sum()
    assert m["quadratic_weighted_kappa"] == pytest.approx(1 - (d * matrix).sum() / (d * expected).sum(), abs=1e-12)
    renamed = multiclass_metrics(3 - labels, p[:, ::-1], ordinal=True)  # class names carry no meaning, order reversed
    for name in ("accuracy", "macro_f1", "macro_auc", "mcc", "ece", "quadratic_weighted_kappa", "mean_absolute_error"):
        assert renamed[name] == pytest.approx(m[name], abs=1e-12), name


def test_two_classes_as_multiclass_equal_binary():
    labels, scores = binary_case()
    two, one = multiclass_metrics(labels, np.stack([1 - scores, scores], axis=1)), binary_metrics(labels, scores)
    assert two["per_class"][1]["f1"] == pytest.approx(one["f1"]) and two["mcc"] == pytest.approx(one["mcc"])
    assert two["macro_auc"] == pytest.approx(one["auc"])


def test_multiclass_one_class_and_refusals():
    m = multiclass_metrics([1, 1], [[0.2, 0.8], [0.1, 0.9]], ordinal=True)
    assert m["macro_auc"] is m["mcc"] is m["quadratic_weighted_kappa"] is None and m["skipped_classes"] == [0, 1]
    assert multiclass_metrics([0, 1], [[3.0, 1.0], [0.0, 2.0]])["ece"] is None  # logits
    for labels, p, message in (
        ([0, 2], np.eye(2), "from 0 to 1"),
        ([0], np.eye(2), "need labels"),
        ([0.5, 1], np.eye(2), "whole numbers"),
        ([0, 1], np.full((2, 2), np.nan), "NaN"),
        ([0, 1], np.ones((2, 1)), "two classes"),
    ):
        with pytest.raises(ValueError, match=message):
            multiclass_metrics(labels, p)


def test_multilabel_by_hand():
    nan = np.nan
    labels = np.array([[1, 0, 1, nan], [0, 0, nan, nan], [1, 0, 0, nan], [0, 0, 1, nan], [nan] * 4])
    scores = np.array(
        [[0.9, 0.1, 0.4, 0.5], [0.2, 0.8, 0.9, 0.5], [0.6, 0.3, 0.1, 0.5], [0.7, 0.2, 0.8, 0.5], [0.9, 0.9, 0.9, 0.9]]
    )
    m = multilabel_metrics(labels, scores, [0.5, 0.5, 0.3, 0.5])
    # label 0: tp 2 fp 1 tn 1, auc 3/4, f1 4/5, ap (1 + 2/3) / 2.   label 1: no positive, one fp.
    # label 2 (three known): tp 2 tn 1, auc 1.   label 3: nothing known.
    assert m["skipped_labels"] == [1, 3] and m["num_unknown"] == 4 + 1 + 4
    assert m["macro_auc"] == pytest.approx((3 / 4 + 1) / 2)
    assert m["macro_pr_auc"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert m["macro_f1"] == pytest.approx((4 / 5 + 1) / 2)
    assert m["micro_f1"] == pytest.approx(2 * 4 / (2 * 4 + 2 + 0))
    assert m["mean_label_accuracy"] == pytest.approx((3 / 4 + 3 / 4 + 1) / 3)
    assert m["exact_match"] == pytest.approx(2 / 4)  # rows 0 and 2 right; row 4 has nothing known
    assert m["per_label"][3] == dict(label=3, n=0, num_positive=0, num_unknown=5)
    json.dumps(m, allow_nan=False)
    # a label that is always positive is skipped too: its F1 of 1 would lift the mean
    m = multilabel_metrics([[1, 1], [0, 1]], [[0.2, 0.9], [0.6, 0.9]])
    assert m["skipped_labels"] == [1] and m["macro_f1"] == 0.0
    assert m["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_multilabel_agrees_with_sklearn():
    rng = np.random.default_rng(0)
    labels = (rng.random((150, 5)) < 0.3).astype(float)
    scores = expit(rng.normal(labels))
    m, called = multilabel_metrics(labels, scores, 0.6), scores > 0.6
    assert m["macro_auc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert m["macro_pr_auc"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
    assert m["micro_f1"] == pytest.approx(sk.f1_score(labels, called, average="micro"), abs=1e-12)
    assert m["macro_f1"] == pytest.approx(sk.f1_score(labels, called, average="macro"), abs=1e-12)
    assert m["exact_match"] == pytest.approx(sk.accuracy_score(labels, called), abs=1e-12)
    masked = labels.copy()
    masked[:50, 2] = np.nan  # equals leaving those rows out of that label
    assert multilabel_metrics(masked, scores)["per_label"][2]["auc"] == pytest.approx(
        sk.roc_auc_score(labels[50:, 2], scores[50:, 2]), abs=1e-12
    )
    for y, s, t, message in (
        (labels - 1, scores, 0.5, "0, 1 or NaN"),
        (labels[:9], scores, 0.5, "one shape"),
        (labels, scores * np.nan, 0.5, "NaN"),
        (labels, scores, [0.5] * 4, "thresholds?"),
    ):
        with pytest.raises(ValueError, match=message):
            multilabel_metrics(y, s, t)


# --- MedMNIST ---


def official_cases():
    labels, scores = binary_case()
    yield "binary-class", labels[:, None], scores
    yield "binary-class", labels[:, None], scores[:, None].astype(np.float32)
    yield "binary-class", labels, np.stack([1 - scores, scores], axis=1)
    classes, p = class_case()
    yield "multi-class", classes[:, None], p
    yield "multi-class", classes[:, None], p.round(1)  # ties in the arg max
    yield "ordinal-regression", classes, np.log(p)
    many = (np.random.default_rng(1).random((300, 6)) < 0.4).astype(int)
    scores = np.random.default_rng(2).normal(0.3 + 0.4 * many, 0.5).round(1)  # some exactly at .5
    yield "multi-label, binary-class", many, scores


@pytest.mark.parametrize("task, labels, scores", list(official_cases()))
def test_official_numbers_are_medmnists(task, labels, scores):
    evaluator = pytest.importorskip("medmnist.evaluator")
    ours = official_auc_accuracy(labels, scores, task)
    assert ours["auc"] == pytest.approx(evaluator.getAUC(labels, scores, task), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(evaluator.getACC(labels, scores, task), abs=1e-12)


def test_official_by_hand_and_refusals():
    assert official_auc_accuracy([[1], [0]], [0.5, 0.2], "binary-class") == dict(auc=1.0, accuracy=0.5)  # .5 is no call
    assert official_auc_accuracy([0, 1], np.eye(3)[:2], "multi-class") == dict(auc=None, accuracy=1.0)  # class 2 absent
    assert official_auc_accuracy([[1]], [0.9], "binary-class") == dict(auc=None, accuracy=1.0)  # a single row
    for labels, scores, task, message in (
        ([0, 1], [0.1], "binary-class", "as many"),
        ([0, 1], [0.1, 0.2], "binary", "unknown MedMNIST task"),
        ([0, 1], np.eye(2), "multi-label, binary-class", "does not fit"),
        ([0, 1], [np.nan, 1], "binary-class", "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            official_auc_accuracy(labels, scores, task)


# --- calibration ---


def test_ece_by_hand():
    # two bins of three: mean .2 against rate 1/3, mean .8 against rate 2/3
    labels, p = [0, 1, 0, 1, 1, 0], [0.1, 0.2, 0.3, 0.7, 0.8, 0.9]
    bins = reliability_bins(labels, p, num_bins=2)
    assert [(b["n"], b["confidence"], b["rate"]) for b in bins] == [
        (3, pytest.approx(0.2), pytest.approx(1 / 3)),
        (3, pytest.approx(0.8), pytest.approx(2 / 3)),
    ]
    assert (bins[0]["low"], bins[0]["high"]) == wilson_interval(1, 3)
    assert expected_calibration_error(labels, p, num_bins=2) == pytest.approx(0.4 / 3)
    # top label: calls 0 (.8, right) and 1 (.6, wrong) -> gaps .2 and .6
    assert expected_calibration_error([0, 0], [[0.8, 0.2], [0.4, 0.6]]) == pytest.approx(0.4)


def test_ece_with_ties():
    labels = np.array([1] * 30 + [0] * 70)
    assert expected_calibration_error(labels, np.full(100, 0.3)) == pytest.approx(0)  # one bin, whatever the order
    p = np.round(np.random.default_rng(0).random(100), 1)
    order = np.random.default_rng(1).permutation(100)
    assert expected_calibration_error(labels[order], p[order]) == pytest.approx(expected_calibration_error(labels, p))
    for b in (1, 7, 15):  # no ties: sizes differ by one at most, nothing is lost
        sizes = [row["n"] for row in reliability_bins(labels, np.linspace(0, 1, 100), b)]
        assert len(sizes) == b and sum(sizes) == 100 and max(sizes) - min(sizes) <= 1


def test_ece_of_a_perfect_and_an_overconfident_model():
    rng = np.random.default_rng(0)
    p = rng.random(15_000)
    labels = (rng.random(15_000) < p).astype(int)
    assert expected_calibration_error(labels, p) == pytest.approx(0.3 * (15 / 15_000) ** 0.5, abs=0.005)
    assert expected_calibration_error(labels, (p > 0.5) * 1.0) == pytest.approx(0.25, abs=0.01)  # E min(p, 1 - p)
    for bad, message in (([0.1, 1.2], "in .0, 1."), ([[0.5, 0.9], [0.5, 0.5]], "sum to 1")):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error([0, 1], bad)
    with pytest.raises(ValueError, match="num_bins"):
        reliability_bins([0, 1], [0.1, 0.2], 0)


def test_temperature_by_hand():
    # margin 2 for all, right 3 times of 4: best when sigmoid(2 / T) = 3/4, T = 2 / ln 3
    assert fit_temperature([2, 2, 2, -2], [1, 1, 1, 1]) == pytest.approx(2 / np.log(3), rel=1e-5)
    logits = np.array([[1.0, -1], [1, -1], [1, -1], [-1, 1]])  # the same margins as two classes
    assert fit_temperature(logits, [0, 0, 0, 0], "multi-class") == pytest.approx(2 / np.log(3), rel=1e-5)
    pair = np.array([[2, 2.0], [2, -2]])
    many = fit_temperature(pair, [[1, 1], [1, 1]], "multi-label, binary-class")
    assert many == pytest.approx(2 / np.log(3), rel=1e-5)
    unknown = fit_temperature([[2, 2.0], [2, -2], [9, 9]], [[1, 1], [1, 1], [np.nan] * 2], "multi-label, binary-class")
    assert unknown == pytest.approx(2 / np.log(3), rel=1e-5)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_temperature_recovers_a_known_scale(scale):
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 4000)
    labels = (rng.random(4000) < expit(margin)).astype(int)
    assert fit_temperature(scale * margin, labels) == pytest.approx(scale, rel=0.1)
    logits = rng.normal(0, 2, (4000, 3))
    classes = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # draws from the softmax
    assert fit_temperature(scale * logits, classes, "ordinal-regression") == pytest.approx(scale, rel=0.1)


def test_temperature_without_a_minimum():
    assert fit_temperature([3, -2, 1], [1, 0, 1]) == 1.0  # all right
    assert fit_temperature([[3, 0], [0, 2]], [0, 1], "multi-class") == 1.0
    assert fit_temperature([0, 0], [1, 0]) == 1.0
    assert fit_temperature([-3, 2, -1], [1, 0, 1]) == pytest.approx(100, rel=1e-3)  # all wrong: the upper bound
    for logits, labels, task, message in (
        ([1, 2], [0, 1], "binary", "unknown MedMNIST task"),
        ([[1, 2]], [0], "binary-class", "do not fit"),
        ([1, np.inf], [0, 1], "binary-class", "infinite"),
        ([[1, 2]], [2], "multi-class", "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_temperature(logits, labels, task)


def test_prior_correction_by_hand():
    # one step from prior 1/2 with train_prior 1/2 changes nothing but the prior: mean(.9, .2, .1) = .4;
    # the second step scales the odds by (.4 / .6) / 1 = 2/3: .9 -> 9 * 2/3 = 6 -> 6/7
    one = prior_correction([0.9, 0.2, 0.1], 0.5, max_iter=1)
    assert one["prior"] == pytest.approx(0.4) and one["probabilities"] == pytest.approx([0.9, 0.2, 0.1])
    two = prior_correction([0.9, 0.2, 0.1], 0.5, max_iter=2)
    assert two["probabilities"][0] == pytest.approx(6 / 7) and two["iterations"] == 2


def test_prior_correction_finds_a_moved_prior():
    # two normal classes one unit either side of 0, trained at 74 % positives, tested at 30 %
    rng = np.random.default_rng(0)
    labels = (rng.random(5000) < 0.3).astype(int)
    x = rng.normal(2 * labels - 1)
    before = expit(2 * x + np.log(0.74 / 0.26))
    result = prior_correction(before, 0.74)
    assert result["prior"] == pytest.approx(0.3, abs=0.02) and 1 < result["iterations"] < 1000
    assert result["prior"] == pytest.approx(result["probabilities"].mean(), abs=1e-9)  # a fixed point
    assert result["probabilities"] == pytest.approx(expit(2 * x + np.log(0.3 / 0.7)), abs=0.03)
    after = expected_calibration_error(labels, result["probabilities"])
    assert after < 0.3 * expected_calibration_error(labels, before)


def test_prior_correction_at_the_ends_and_refusals():
    assert prior_correction([0.0, 0.0], 0.5)["prior"] == 0.0 and prior_correction([1.0], 0.5)["prior"] == 1.0
    assert prior_correction([1.0, 0.0, 0.0, 0.0], 0.5)["prior"] == pytest.approx(0.25)
    for p, prior, message in (
        ([1.2], 0.5, "within"),
        ([np.nan], 0.5, "within"),
        ([], 0.5, "non-empty"),
        ([0.5], 1, "train_prior"),
    ):
        with pytest.raises(ValueError, match=message):
            prior_correction(p, prior)
