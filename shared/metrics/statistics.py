"""
Intervals and tests for metrics on small test sets. Pure NumPy / SciPy; results are plain floats, undefined is None.

Which one to use:
    proportion (accuracy, recall, ...)   wilson_interval
    AUC, independent cases               delong_auc; two models on the same cases: delong_test
    any other metric                     bootstrap_interval; two models: paired_bootstrap
    several images per patient           the bootstraps with groups=patient, for every metric
    two models, right or wrong           mcnemar_exact
    several p values                     holm
"""
import math

import numpy as np
from scipy.stats import binomtest, norm, rankdata


def check_binary(labels, scores):
    """labels (N,) of 0/1, scores (N,) finite -> int64 labels and float64 scores; ValueError says what is wrong."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or scores.ndim != 1:
        raise ValueError(f"labels and scores must have shape (N,), got {labels.shape} and {scores.shape}")
    if len(labels) != len(scores):
        raise ValueError(f"labels and scores differ in length: {len(labels)} and {len(scores)}")
    if len(labels) == 0:
        raise ValueError("labels and scores are empty")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1; leave out unknown and uncertain cases first")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are NaN or infinite")
    return labels.astype(np.int64), scores


def _check_confidence(confidence):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


def wilson_interval(successes, n, confidence=0.95):
    """
    Score interval of a proportion (Wilson 1927) -> (low, high); n = 0 -> (None, None).
    Unlike the textbook p +- 1.96 se it keeps its coverage near 0 and 1 and does not shrink to a point there.
    """
    _check_confidence(confidence)
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    if n == 0:
        return None, None
    z, p = norm.ppf((1 + confidence) / 2), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else centre - half  # exact ends, free of rounding
    high = 1.0 if successes == n else centre + half
    return float(low), float(high)


# --- AUC: DeLong 1988 with the midranks of Sun & Xu 2014 (IEEE Signal Processing Letters 21:1389) ---


def _auc_components(labels, scores):
    """
    -> auc, share of negatives below each positive (P,), share of positives above each negative (N,); ties count half.
    Both shares average to the AUC; their variances give its standard error. O(n log n).
    """
    positive, negative = scores[labels == 1], scores[labels == 0]
    ranks = rankdata(np.concatenate([positive, negative]))
    p, n = len(positive), len(negative)
    above = (ranks[:p] - rankdata(positive)) / n
    below = 1 - (ranks[p:] - rankdata(negative)) / p
    return above.mean(), above, below


def _standard_error(above, below):
    """None with fewer than two positives or two negatives."""
    if min(len(above), len(below)) < 2:
        return None
    return math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))


def delong_auc(labels, scores, confidence=0.95):
    """
    labels (N,) 0/1, scores (N,) -> dict(auc, se, low, high), interval auc +- z se clipped to [0, 1].
    One class only: all None. A single positive or negative: auc alone.
    With perfect separation se is 0 and the interval a point: that is the method's limit, not certainty.
    """
    _check_confidence(confidence)
    labels, scores = check_binary(labels, scores)
    if labels.min() == labels.max():
        return dict(auc=None, se=None, low=None, high=None)
    auc, above, below = _auc_components(labels, scores)
    se = _standard_error(above, below)
    if se is None:
        return dict(auc=float(auc), se=None, low=None, high=None)
    half = norm.ppf((1 + confidence) / 2) * se
    return dict(auc=float(auc), se=se, low=float(max(0, auc - half)), high=float(min(1, auc + half)))


def delong_test(labels, scores_a, scores_b, confidence=0.95):
    """
    Two models on the same cases -> dict(auc_a, auc_b, difference = a - b, low, high, z, p), p two-sided.
    One class only: all None. Equal rankings: z = 0, p = 1. A difference without variance has no z and no p (None).
    """
    _check_confidence(confidence)
    labels, scores_a = check_binary(labels, scores_a)
    labels, scores_b = check_binary(labels, scores_b)
    result = dict.fromkeys(("auc_a", "auc_b", "difference", "low", "high", "z", "p"))
    if labels.min() == labels.max():
        return result
    auc_a, above_a, below_a = _auc_components(labels, scores_a)
    auc_b, above_b, below_b = _auc_components(labels, scores_b)
    difference = float(auc_a - auc_b)
    result.update(auc_a=float(auc_a), auc_b=float(auc_b), difference=difference)
    # Var(a) + Var(b) - 2 Cov(a, b), taken as the variance of the paired differences: exactly 0 for equal rankings
    se = _standard_error(above_a - above_b, below_a - below_b)
    if se is None:
        return result
    half = norm.ppf((1 + confidence) / 2) * se
    result.update(low=float(max(-1, difference - half)), high=float(min(1, difference + half)))
    if se > 1e-12:
        result.update(z=difference / se, p=float(2 * norm.sf(abs(difference / se))))
    elif abs(difference) < 1e-12:
        result.update(z=0.0, p=1.0)
    return result


# --- bootstrap ---


def _codes(values, n, name):
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {values.shape}")
    if any(v is None or v != v for v in values.tolist()):  # NaN differs from itself
        raise ValueError(f"{name} has missing values; give every row one")
    return np.unique(values, return_inverse=True)[1]


def resample_counts(n, num_samples=2000, seed=0, groups=None, strata=None):
    """
    Yield num_samples times how often each of n rows is drawn, (n,) int64.

    groups (n,): whole groups are drawn (patients, images), so that rows of one patient stay together.
    strata (n,): each stratum keeps its number of rows or groups; a group must lie in one stratum.
    """
    if n < 1 or num_samples < 1:
        raise ValueError(f"need at least one row and one sample, got {n} and {num_samples}")
    unit = np.arange(n) if groups is None else _codes(groups, n, "groups")
    stratum = np.zeros(n, dtype=np.int64) if strata is None else _codes(strata, n, "strata")
    pairs = np.unique(np.stack([unit, stratum]), axis=1)  # each unit once, with its stratum
    if pairs.shape[1] != unit.max() + 1:
        raise ValueError("a group lies in more than one stratum")
    pools = [pairs[0, pairs[1] == s] for s in np.unique(pairs[1])]
    return _draw(unit, pools, num_samples, np.random.default_rng(seed))


def _draw(unit, pools, num_samples, rng):  # apart from resample_counts so that its checks run before the first draw
    counts = np.zeros(unit.max() + 1, dtype=np.int64)
    for _ in range(num_samples):
        for pool in pools:
            counts[pool] = np.bincount(rng.integers(len(pool), size=len(pool)), minlength=len(pool))
        yield counts[unit]


def percentile_interval(draws, confidence=0.95):
    """draws: floats, undefined ones None, NaN or infinite -> (low, high, number undefined); None, None if all are."""
    _check_confidence(confidence)
    draws = np.array([_number(d) for d in draws])
    defined = draws[~np.isnan(draws)]
    if len(defined) == 0:
        return None, None, len(draws)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high), len(draws) - len(defined)


def _number(value):
    return float(value) if value is not None and np.isfinite(value) else np.nan


def _or_none(value):
    return None if np.isnan(value) else float(value)


def _same_length(arrays):
    arrays = [np.asarray(a) for a in arrays]
    if not arrays or any(a.ndim == 0 for a in arrays) or len({len(a) for a in arrays}) != 1:
        raise ValueError(f"need arrays of one length, got shapes {[a.shape for a in arrays]}")
    if len(arrays[0]) == 0:
        raise ValueError("the arrays are empty")
    return arrays


def bootstrap_interval(metric, *arrays, groups=None, strata=None, num_samples=2000, confidence=0.95, seed=0):
    """
    Percentile bootstrap of metric(*arrays), a float or None; rows come in stored order, drawn ones repeated.
    For ragged data pass np.arange(n) and look the rows up inside metric.
    -> dict(value, low, high, num_samples, num_undefined): resamples where metric is None or NaN are left out of the
    interval and counted; many of them mean that the interval describes only the favourable part of the resamples.
    """
    arrays = _same_length(arrays)
    value = _number(metric(*arrays))
    rows = np.arange(len(arrays[0]))
    draws = []
    for counts in resample_counts(len(rows), num_samples, seed, groups, strata):
        drawn = np.repeat(rows, counts)
        draws.append(metric(*(a[drawn] for a in arrays)))
    low, high, num_undefined = percentile_interval(draws, confidence)
    return dict(value=_or_none(value), low=low, high=high, num_samples=num_samples, num_undefined=num_undefined)


def paired_bootstrap(metric, labels, scores_a, scores_b, groups=None, strata=None, num_samples=2000, confidence=0.95,
                     seed=0):
    """
    metric(labels, scores) of two models on the same resamples
    -> dict(value_a, value_b, difference = a - b, low, high, p, num_samples, num_undefined).

    p = min(1, 2 min(1 + #{d* <= 0}, 1 + #{d* >= 0}) / (B + 1)) over the B defined resampled differences d*:
    the level at which the percentile interval just reaches 0. It cannot fall below 2 / (B + 1).
    """
    labels, scores_a, scores_b = _same_length([labels, scores_a, scores_b])

    def both(y, a, b):
        return _number(metric(y, a)), _number(metric(y, b))

    value_a, value_b = both(labels, scores_a, scores_b)
    rows = np.arange(len(labels))
    draws = []
    for counts in resample_counts(len(rows), num_samples, seed, groups, strata):
        drawn = np.repeat(rows, counts)
        a, b = both(labels[drawn], scores_a[drawn], scores_b[drawn])
        draws.append(a - b)
    low, high, num_undefined = percentile_interval(draws, confidence)
    draws = np.array(draws)
    num_defined = num_samples - num_undefined
    tail = min((draws <= 0).sum(), (draws >= 0).sum())  # NaN is in neither
    p = min(1.0, float(2 * (1 + tail) / (num_defined + 1))) if num_defined else None
    return dict(value_a=_or_none(value_a), value_b=_or_none(value_b), difference=_or_none(value_a - value_b),
                low=low, high=high, p=p, num_samples=num_samples, num_undefined=num_undefined)


# --- tests ---


def mcnemar_exact(correct_a, correct_b):
    """correct_a, correct_b (N,) bool: was each model right? -> dict(only_a, only_b, p), exact two-sided binomial."""
    correct_a, correct_b = _same_length([correct_a, correct_b])
    if correct_a.ndim != 1 or not (np.isin(correct_a, (0, 1)).all() and np.isin(correct_b, (0, 1)).all()):
        raise ValueError("correct_a and correct_b must be (N,) true/false values")
    only_a = int(((correct_a == 1) & (correct_b == 0)).sum())
    only_b = int(((correct_a == 0) & (correct_b == 1)).sum())
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return dict(only_a=only_a, only_b=only_b, p=p)


def holm(p_values):
    """p values -> Holm-adjusted ones in the same order. None stays None and still counts as one of the tests."""
    p = np.array([1.0 if v is None else v for v in p_values], dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():  # NaN fails too
        raise ValueError("p values must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    steps = p[order] * np.arange(len(p), 0, -1)  # smallest times m, next times m - 1, ...
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return [None if v is None else float(a) for v, a in zip(p_values, adjusted, strict=True)]
