"""
Intervals and tests for metrics on small test sets. Pure NumPy / SciPy; results are plain floats, undefined is None.

Which one to use:
    proportion (accuracy, recall, ...)   wilson_interval
    AUC, independent cases               delong_auc; two models on the same cases: delong_test
    any other metric                     bootstrap_interval; two models: of metric(a) - metric(b)
    several rows per patient or image    bootstrap_interval with groups=patient, for every metric, proportions and AUC
                                         too
    few patients (below about 30)        bootstrap_interval with groups and method="jackknife"; effective_clusters
                                         counts them
    two models, right or wrong           mcnemar_exact; with groups: sign_flip_test
    paired differences of any kind       sign_flip_test
    how many cases a comparison needs    cases_needed
    several p values                     holm

benchmarks/coverage.py simulates how often each interval holds the truth.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
import warnings

import numpy as np
from scipy.stats import binomtest, norm, rankdata
from scipy.stats import t as student_t


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


def _codes(values, n, name):
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {values.shape}")
    if any(v is None or v != v for v in values.tolist()):  # NaN differs from itself
        raise ValueError(f"{name} has missing values; give every row one")
    return np.unique(values, return_inverse=True)[1]


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
    low, high = binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
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


def auroc(labels, scores):
    """labels (N,) 0/1 or bool, scores (N,) -> AUC alone, for thousands of resamples. None without both classes."""
    labels = np.asarray(labels, bool)
    n = int(labels.sum())
    if n in (0, len(labels)):
        return None
    return float((rankdata(scores)[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


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


# --- clusters: rows of one patient, study or image ---

# Below this number intervals are noticeably short. benchmarks/coverage.py, clustered data: percentile intervals of
# nominal 95 % held the truth in 86-93 % with an effective number of 24 and in 66-88 % with 4 to 8. Cameron et al. 2008
# call 5 to 30 few.
FEW_CLUSTERS = 30


def effective_clusters(groups, values=None):
    """
    groups (N,): the patient, study or image of each row -> dict(num_rows, num_groups, effective_groups, warning).

    effective_groups = (sum n)^2 / sum n^2 over group sizes n (Kish): num_groups where all are of one size, near 1 where
    one holds most rows. warning: a sentence when it is below FEW_CLUSTERS, else None.
    values (N,), e.g. 1 for a right answer, adds icc (one-way analysis of variance), design_effect = 1 + (sum n^2 / N -
    1) icc, the factor on the variance of their mean, and effective_rows = N / design_effect; None where undefined.
    """
    unit = _codes(groups, len(groups), "groups")
    if len(unit) == 0:
        raise ValueError("groups is empty")
    sizes = np.bincount(unit)
    n, k = len(unit), len(sizes)
    effective = float(n**2 / np.sum(sizes**2))
    warning = None
    if effective < FEW_CLUSTERS:
        warning = (
            f"{k} groups count like {effective:.1f} of equal size: below {FEW_CLUSTERS} intervals come out too short, "
            "percentile ones most; the p values of sign flips stay valid"
        )
    result = dict(num_rows=n, num_groups=k, effective_groups=effective, warning=warning)
    if values is None:
        return result
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (n,) or not np.isfinite(values).all():
        raise ValueError(f"values must be ({n},) finite numbers, one per row")
    icc = design = None
    if 1 < k < n:
        means = np.bincount(unit, values) / sizes
        between = np.sum(sizes * (means - values.mean()) ** 2) / (k - 1)
        within = np.sum((values - means[unit]) ** 2) / (n - k)
        size = (n - np.sum(sizes**2) / n) / (k - 1)  # the mean size, corrected for its spread
        if between + (size - 1) * within > 0:
            icc = float((between - within) / (between + (size - 1) * within))
            design = float(1 + (np.sum(sizes**2) / n - 1) * icc)
    rows = n / design if design is not None and design > 0 else None
    return result | dict(icc=icc, design_effect=design, effective_rows=rows)


# --- bootstrap ---


def _units(n, groups):
    """-> what is drawn for each row, (n,) 0..G-1: the row itself or its group."""
    if n < 1:
        raise ValueError(f"need at least one row, got {n}")
    return np.arange(n) if groups is None else _codes(groups, n, "groups")


def resample_counts(n, num_samples=2000, seed=0, groups=None):
    """
    Yield num_samples times how often each of n rows is drawn, (n,) int64.
    groups (n,): whole groups are drawn (patients, images), so that rows of one patient stay together.
    """
    unit = _units(n, groups)
    blocks = _draw(unit.max() + 1, num_samples, seed)
    return (counts[unit] for block in blocks for counts in block)


def _draw(num_units, num_samples, seed):
    """-> iterator over blocks (M, G) int64 of how often each of G units is drawn, G times in all."""
    if num_samples < 1:
        raise ValueError(f"need at least one sample, got {num_samples}")
    size = max(1, 2**20 // num_units)  # 8 MiB at a time
    rng = np.random.default_rng(seed)

    def block(m):
        drawn = rng.integers(num_units, size=(m, num_units)) + np.arange(m)[:, None] * num_units
        return np.bincount(drawn.ravel(), minlength=m * num_units).reshape(m, num_units)

    return (block(min(size, num_samples - start)) for start in range(0, num_samples, size))


def percentile_interval(draws, confidence=0.95):
    """draws: floats, undefined ones None, NaN or infinite -> (low, high, number undefined); None, None if all are."""
    _check_confidence(confidence)
    draws = _numbers(draws)
    defined = draws[~np.isnan(draws)]
    if len(defined) == 0:
        return None, None, len(draws)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high), len(draws) - len(defined)


def _number(value):
    return float(value) if value is not None and np.isfinite(value) else np.nan


def _numbers(values):
    values = np.array(list(values), dtype=np.float64)  # None becomes NaN
    return np.where(np.isfinite(values), values, np.nan)


def none_if_nan(value):
    """A number as a float that JSON can hold; None where it is undefined (NaN)."""
    return None if np.isnan(value) else float(value)


def _same_length(arrays):
    arrays = [np.asarray(a) for a in arrays]
    if not arrays or any(a.ndim == 0 for a in arrays) or len({len(a) for a in arrays}) != 1:
        raise ValueError(f"need arrays of one length, got shapes {[a.shape for a in arrays]}")
    if len(arrays[0]) == 0:
        raise ValueError("the arrays are empty")
    return arrays


METHODS = ("percentile", "jackknife")


def bootstrap_interval(
    metric, *arrays, groups=None, num_samples=2000, confidence=0.95, seed=0, method="percentile", of_sums=False
):
    """
    Interval of metric(*arrays), a float or None; rows come in stored order, drawn ones repeated.
    For ragged data pass np.arange(n) and look the rows up inside metric.
    -> dict(value, low, high, num_samples, num_undefined): resamples where metric is None or NaN are left out of the
    interval and counted; many of them mean that the interval describes only the favourable part of the resamples.

    groups (N,): whole groups are drawn, and every method counts in groups; warns when there are few
    (effective_clusters).
    method: "percentile"   quantiles of the resampled metric
            "jackknife"    value +- t(G - 1) x jackknife error over the G groups, nothing drawn: the closest for few
                           groups, though with five it may hold in 85 % only; not for medians and other jumping metrics
        None where the metric without one of the groups is undefined.
    of_sums: metric is a function of the sums of the arrays, which takes and returns arrays: thousands of resamples in
        milliseconds. lambda right, n: right / n for a mean (n: ones), lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn)
        for F1, lambda a, b, n: (a - b) / n for a paired difference.
    """
    arrays = _same_length(arrays)
    _check_confidence(confidence)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    unit = _units(len(arrays[0]), groups)
    _warn_if_few(groups)
    values, without_each = (_by_sums if of_sums else _by_rows)(metric, arrays, unit)
    num_units = unit.max() + 1
    value = values(np.ones((1, num_units), dtype=np.int64))[0]
    if method == "jackknife":
        left_out = without_each() if num_units > 1 else np.array([np.nan])
        error = math.sqrt((num_units - 1) / num_units * ((left_out - left_out.mean()) ** 2).sum())
        half = error * student_t.ppf((1 + confidence) / 2, max(1, num_units - 1))
        low, high, num_samples = none_if_nan(value - half), none_if_nan(value + half), 0
        num_undefined = int(np.isnan(left_out).sum())
    else:
        draws = np.concatenate([values(counts) for counts in _draw(num_units, num_samples, seed)])
        low, high, num_undefined = percentile_interval(draws, confidence)
    return dict(value=none_if_nan(value), low=low, high=high, num_samples=num_samples, num_undefined=num_undefined)


def mean_interval(values, groups, fewest=2, num_samples=2000):
    """
    Mean of at least one value (numbers or booleans), whole groups drawn -> dict(value, low, high, n: of values). No
    interval and no warning where there are fewer groups than `fewest`: n stands beside it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sums = np.asarray(values, float), np.ones(len(values))
        found = bootstrap_interval(lambda v, n: v / n, *sums, groups=groups, num_samples=num_samples, of_sums=True)
    ends = {name: found[name] if len(set(groups)) >= fewest else None for name in ("low", "high")}
    return {"value": found["value"], **ends, "n": len(values)}


def _warn_if_few(groups):
    """Only where groups are given: the number of rows stands beside every result, the number that counts does not."""
    warning = None if groups is None else effective_clusters(groups)["warning"]
    if warning:
        warnings.warn(warning, stacklevel=3)


# Both give two functions: values(counts (M, G), how often each unit is taken in each of M samples) -> metric of each
# sample, (M,); without_each() -> metric without each unit, (G,). Undefined is NaN.


def _by_rows(metric, arrays, unit):
    def one(rows):
        return _number(metric(*(a[rows] for a in arrays)))

    def values(counts):
        return np.array([one(np.repeat(np.arange(len(unit)), c[unit])) for c in counts])

    def without_each():
        return np.array([one(unit != g) for g in range(unit.max() + 1)])

    return values, without_each


def _by_sums(metric, arrays, unit):
    if any(a.ndim != 1 for a in arrays):
        raise ValueError(f"of_sums needs arrays of shape (N,), got {[a.shape for a in arrays]}")
    sums = np.stack([np.bincount(unit, a) for a in arrays], axis=1)  # (G, K)

    def call(totals):  # (M, K) -> (M,)
        with np.errstate(divide="ignore", invalid="ignore"):
            result = np.asarray(metric(*totals.T), dtype=np.float64)
        if result.shape != totals.shape[:1]:
            raise ValueError(
                f"with of_sums, metric must return one value per sum, {totals.shape[:1]}: got {result.shape}"
            )
        return np.where(np.isfinite(result), result, np.nan)

    return (lambda counts: call(counts @ sums)), (lambda: call(sums.sum(axis=0) - sums))


# --- tests ---


EXACT_UP_TO = 20  # groups: 2^19 sums, by symmetry


def sign_flip_test(differences, groups=None, num_samples=9999, seed=0):
    """
    Paired permutation test: is the mean of differences (N,), a_i - b_i, 0?
    -> dict(difference, p, exact, num_groups, num_samples), p two-sided; num_groups: those whose sum is not 0.

    Under the null hypothesis a and b could change places: the sum of each row, or of each group (N,) as a whole, keeps
    its size and takes either sign. All signs are tried for up to 20 groups; beyond that num_samples random ones, and
    p = (1 + those at least as far from 0) / (num_samples + 1). With G groups p is at least 2 / 2^G: five cannot reach
    0.05. On right-or-wrong differences of independent rows it equals mcnemar_exact; with groups it is the version for
    clusters.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or len(differences) == 0 or not np.isfinite(differences).all():
        raise ValueError("differences must be a non-empty (N,) array of finite numbers")
    unit = _units(len(differences), groups)
    sums = np.bincount(unit, differences)
    tolerance = 1e-9 * np.abs(differences).sum()  # sums in another order differ in their last digits
    sums = sums[np.abs(sums) > tolerance]
    bound = abs(sums.sum()) - tolerance
    exact = len(sums) <= EXACT_UP_TO
    if exact:
        totals = sums[:1]  # its sign stays: turning all of them changes no distance from 0
        for s in sums[1:]:
            totals = np.concatenate([totals + s, totals - s])
        p = float(np.mean(np.abs(totals) >= bound)) if len(sums) else 1.0
        num_samples = len(totals)
    else:
        if num_samples < 1:
            raise ValueError(f"need at least one sample, got {num_samples}")
        rng = np.random.default_rng(seed)
        size = max(1, 2**20 // len(sums))
        far = 0
        for start in range(0, num_samples, size):
            flips = rng.integers(2, size=(min(size, num_samples - start), len(sums)), dtype=np.int8)
            far += int((np.abs(sums.sum() - 2 * (flips @ sums)) >= bound).sum())
        p = (1 + far) / (num_samples + 1)
    return dict(difference=float(differences.mean()), p=p, exact=exact, num_groups=len(sums), num_samples=num_samples)


def cases_needed(delta, discordant, power=0.8, alpha=0.05):
    """
    Cases for McNemar's test to find a difference of delta between two paired proportions with this power (Connor 1987,
    Biometrics 43:207), two-sided -> int. discordant: share of cases where the two differ, at least |delta|.
    For correlated cases multiply by the design_effect of effective_clusters. The exact test falls short of the power by
    a few points at this number (0.785 and 0.776 where 940 and 234 cases give 0.8).
    """
    for name, value in (("|delta|", abs(delta)), ("discordant", discordant), ("power", power), ("alpha", alpha)):
        if not 0 < value < 1 and not (value == 1 and name in ("|delta|", "discordant")):
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if discordant < abs(delta):
        raise ValueError(f"proportions {abs(delta)} apart differ on at least that share of cases, not on {discordant}")
    null, alternative = math.sqrt(discordant), math.sqrt(discordant - delta**2)
    return math.ceil(((norm.ppf(1 - alpha / 2) * null + norm.ppf(power) * alternative) / delta) ** 2)


def mcnemar_exact(correct_a, correct_b):
    """
    correct_a, correct_b (N,) bool: was each model right? -> dict(only_a, only_b, p), exact two-sided binomial.
    Rows must be independent; several per patient or image: sign_flip_test.
    """
    correct_a, correct_b = _same_length([correct_a, correct_b])
    if correct_a.ndim != 1 or not (np.isin(correct_a, (0, 1)).all() and np.isin(correct_b, (0, 1)).all()):
        raise ValueError("correct_a and correct_b must be (N,) true/false values")
    only_a = int(((correct_a == 1) & (correct_b == 0)).sum())
    only_b = int(((correct_a == 0) & (correct_b == 1)).sum())
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return dict(only_a=only_a, only_b=only_b, p=p)


def holm(p_values):
    """
    p values -> Holm-adjusted ones in the same order: those <= 0.05 hold at a chance of 5 % for any false one among
    them. None stays None and still counts as one of the tests.
    """
    p = np.array([1.0 if v is None else v for v in p_values], dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():  # NaN fails too
        raise ValueError("p values must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)  # smallest times m, next times m - 1, ...
    adjusted = np.minimum(1, np.maximum.accumulate(steps))[np.argsort(order, kind="stable")]
    return [None if v is None else float(a) for v, a in zip(p_values, adjusted, strict=True)]
