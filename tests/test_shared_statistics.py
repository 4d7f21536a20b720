"""Intervals and tests of shared/metrics/statistics.py: hand-worked cases, SciPy and scikit-learn, small simulations."""
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from shared.metrics.statistics import (
    bootstrap_interval,
    delong_auc,
    delong_test,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    resample_counts,
    wilson_interval,
)


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


@pytest.mark.parametrize("hits, n, confidence", [(0, 7, 0.95), (7, 7, 0.95), (577, 624, 0.95), (3, 20, 0.8)])
def test_wilson_agrees_with_scipy(hits, n, confidence):
    expected = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(hits, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


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


@pytest.mark.parametrize("labels, scores, message", [
    ([0, 1], [0.1, 0.2, 0.3], "length"),
    ([0, 2], [0.1, 0.2], "0 or 1"),
    ([0, np.nan], [0.1, 0.2], "0 or 1"),
    ([0, 1], [0.1, np.nan], "1 of 2 scores are NaN"),
    ([], [], "empty"),
    ([[0], [1]], [0.1, 0.2], r"shape \(N,\)"),
])
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
    stratified = bootstrap_interval(auc, [1, 0, 0, 0], [2, 1, 3, 0], strata=[1, 0, 0, 0], num_samples=100)
    assert stratified["num_undefined"] == 0
    never = bootstrap_interval(lambda y: None, [1, 0], num_samples=50)
    assert never == dict(value=None, low=None, high=None, num_samples=50, num_undefined=50)


def test_groups_and_strata_are_kept_whole():
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    strata = np.array([0, 0, 0, 1, 1, 1])
    drawn = np.array(list(resample_counts(6, 100, groups=groups)))
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 3] == drawn[:, 5]).all()
    assert set(drawn[:, 0] + drawn[:, 2] + drawn[:, 3]) == {3}  # three groups each time
    assert len(set(map(tuple, drawn.tolist()))) > 5
    drawn = np.array(list(resample_counts(6, 100, strata=strata)))
    assert (drawn[:, :3].sum(1) == 3).all() and (drawn[:, 3:].sum(1) == 3).all()
    drawn = np.array(list(resample_counts(6, 100, groups=groups, strata=strata)))
    assert (drawn[:, 3:] == 1).all() and set(drawn[:, 0] + drawn[:, 2]) == {2}
    with pytest.raises(ValueError, match="more than one stratum"):
        resample_counts(2, groups=["a", "a"], strata=[0, 1])
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


def accuracy(labels, scores):
    return np.mean((scores > 0.5) == labels)


def test_paired_bootstrap():
    labels, scores = made_up(300, effect=2)
    worse = np.random.default_rng(1).normal(1, 2, 300)  # unrelated to the label
    result = paired_bootstrap(accuracy, labels, scores, worse, num_samples=999)
    assert result["difference"] == pytest.approx(accuracy(labels, scores) - accuracy(labels, worse))
    assert 0 < result["low"] < result["difference"] < result["high"] and result["p"] == 2 / 1000
    same = paired_bootstrap(accuracy, labels, scores, scores, num_samples=100)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1.0)
    # p follows its formula: recompute from the differences of the same resamples
    close = scores + np.random.default_rng(2).normal(0, 0.5, 300)
    result = paired_bootstrap(accuracy, labels, scores, close, num_samples=200, seed=5)
    per_row = ((scores > 0.5) == labels) * 1.0 - ((close > 0.5) == labels)
    draws = np.array([(c * per_row).sum() for c in resample_counts(300, 200, seed=5)])
    assert result["p"] == pytest.approx(2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / 201)
    assert 0.01 < result["p"] < 1
    undefined = paired_bootstrap(lambda y, s: None, labels, scores, worse, num_samples=10)
    assert undefined["p"] is None and undefined["difference"] is None and undefined["num_undefined"] == 10


# --- tests ---


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
