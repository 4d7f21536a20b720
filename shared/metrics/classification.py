"""
Metrics of binary, multi-class, ordinal and multi-label classifiers: arrays in, plain numbers out, undefined is None.

Scores above the threshold are positive (score > threshold, as in MedMNIST). Wrong input raises ValueError.
scikit-learn computes what it defines the same way; the rest says where it comes from.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, cohen_kappa_score, confusion_matrix, log_loss, matthews_corrcoef
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from shared.metrics.statistics import auroc, check_binary, delong_auc, percentile_interval, resample_counts
from shared.metrics.statistics import wilson_interval

# --- binary ---


def binary_metrics(labels, scores, threshold=0.5):
    """
    labels (N,) 0/1, scores (N,) -> dict of counts and metrics.

    log_loss, brier and ece need probabilities and are None when a score lies outside [0, 1].
    auc, pr_auc (average precision), balanced_accuracy and mcc need both classes; precision needs a positive call.
    """
    labels, scores = check_binary(labels, scores)
    _check_threshold(threshold)
    called = scores > threshold
    tp, fp = int((called & (labels == 1)).sum()), int((called & (labels == 0)).sum())
    counts = dict(tp=tp, fp=fp, tn=int((1 - labels).sum()) - fp, fn=int(labels.sum()) - tp)
    num_positive, threshold = int(labels.sum()), float(threshold)
    result = dict(n=len(labels), num_positive=num_positive, prevalence=num_positive / len(labels), threshold=threshold)
    result |= counts | _rates(**counts) | dict.fromkeys(("auc", "pr_auc", "log_loss", "brier", "ece"))
    if 0 < num_positive < len(labels):
        result["auc"] = float(roc_auc_score(labels, scores))
        result["pr_auc"] = float(average_precision_score(labels, scores))
    if scores.min() >= 0 and scores.max() <= 1:
        result["log_loss"] = float(log_loss(labels, scores, labels=[0, 1]))  # clipped at 2e-16: at most 36
        result["brier"] = float(np.mean((scores - labels) ** 2))
        result["ece"] = expected_calibration_error(labels, scores)
    return result


def _check_threshold(threshold):
    if not np.isfinite(threshold).all():
        raise ValueError(f"threshold must be a finite number, got {threshold}")


def _ratio(a, b):
    return float(a / b) if b else None


def _rates(tp, fp, tn, fn):
    recall, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    balanced = mcc = None
    if recall is not None and specificity is not None:
        balanced = (recall + specificity) / 2
        spread = float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn)  # float: int64 overflows near 50,000
        mcc = float((tp * tn - fp * fn) / spread**0.5) if spread else 0.0  # one answer for all cases: no correlation
    return dict(
        accuracy=_ratio(tp + tn, tp + fp + tn + fn),
        precision=_ratio(tp, tp + fp),
        recall=recall,
        specificity=specificity,
        npv=_ratio(tn, tn + fn),
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        balanced_accuracy=balanced,
        mcc=mcc,
    )


def binary_intervals(labels, scores, threshold=0.5, num_samples=2000, seed=0, groups=None, confidence=0.95):
    """
    -> {metric: {"low", "high", "method"}}; bootstrap entries also have "num_undefined" (resamples without a value).

    Wilson for proportions, DeLong for auc, percentile bootstrap for auc_bootstrap, pr_auc, f1, balanced_accuracy, mcc.
    Wilson and DeLong take the rows as independent. With groups (N,), e.g. patients, they would be too narrow, so every
    interval then comes from a bootstrap of whole groups (a point where no error was made: judge that one by n).
    """
    labels, scores = check_binary(labels, scores)
    _check_threshold(threshold)
    called = scores > threshold
    cells = np.stack([labels * called, (1 - labels) * called, (1 - labels) * ~called, labels * ~called])  # tp fp tn fn
    # Row weights in place of copied rows: sorted once, each resample costs a few passes over the data.
    values, rank = np.unique(scores, return_inverse=True)
    draws = {}
    for weight in resample_counts(len(labels), num_samples, seed, groups):
        sample = _rates(*(cells @ weight).tolist())
        positive = np.bincount(rank, weight * labels, minlength=len(values))
        negative = np.bincount(rank, weight * (1 - labels), minlength=len(values))
        sample["auc_bootstrap"], sample["pr_auc"] = _weighted_areas(positive, negative)
        for name, value in sample.items():
            draws.setdefault(name, []).append(value)

    intervals = {}
    for name, values in draws.items():
        low, high, num_undefined = percentile_interval(values, confidence)
        method = "bootstrap" if groups is None else "cluster bootstrap"
        intervals[name] = dict(low=low, high=high, method=method, num_undefined=num_undefined)
    intervals["auc"] = dict(intervals["auc_bootstrap"])
    if groups is None:
        tp, fp, tn, fn = cells.sum(axis=1).tolist()
        shares = dict(accuracy=(tp + tn, len(labels)), precision=(tp, tp + fp), recall=(tp, tp + fn))
        shares |= dict(specificity=(tn, tn + fp), npv=(tn, tn + fn))
        for name, (hits, n) in shares.items():
            low, high = wilson_interval(hits, n, confidence)
            intervals[name] = dict(low=low, high=high, method="wilson")
        delong = delong_auc(labels, scores, confidence)
        intervals["auc"] = dict(low=delong["low"], high=delong["high"], method="delong")
    return intervals


def _weighted_areas(positive, negative):
    """positive, negative (U,): weight of each class at every distinct score, ascending -> (auc, average precision)."""
    num_positive, num_negative = positive.sum(), negative.sum()
    if not num_positive or not num_negative:
        return None, None
    negatives_below = np.cumsum(negative) - negative / 2  # ties count half
    auc = positive @ negatives_below / (num_positive * num_negative)
    tp, called = np.cumsum(positive[::-1]), np.cumsum((positive + negative)[::-1])
    precision = tp / np.maximum(called, 1)  # called = 0: scores above all drawn rows, which weigh nothing
    return float(auc), float(positive[::-1] @ precision / num_positive)


def choose_threshold(labels, scores):
    """
    Threshold with the best balanced accuracy, for score > threshold, to be chosen on validation cases: labels (N,) 0/1,
    scores (N,) -> float. The best by Youden's index (recall + specificity - 1) is the same.

    The midpoint between two neighbouring scores, in the middle of the best plateau (of several: the widest). If calling
    all (or no) cases positive is best, the threshold lies just below the lowest (at the highest) score.
    """
    labels, scores = check_binary(labels, scores)
    if labels.min() == labels.max():
        raise ValueError("a threshold needs cases of both classes")
    values, rank = np.unique(scores, return_inverse=True)
    # Gap k lies below values[k] and above values[k - 1]; the two outer ones get a small width of their own.
    below_all = values[0] - 1e-6 * max(1, abs(values[0]))  # visible in float32 too
    edges = np.concatenate([[below_all], values, [values[-1]]])
    thresholds = edges[:-1] / 2 + edges[1:] / 2
    thresholds = np.where(thresholds < edges[1:], thresholds, edges[:-1])  # adjacent floats: the midpoint rounds up
    thresholds[0] = below_all
    positives_below = np.concatenate([[0], np.cumsum(np.bincount(rank, labels))])
    negatives_below = np.concatenate([[0], np.cumsum(np.bincount(rank, 1 - labels))])
    value = negatives_below / (1 - labels).sum() - positives_below / labels.sum()  # Youden's index
    best = np.flatnonzero(value >= value.max() - 1e-9)
    plateaus = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(plateaus, key=lambda gaps: edges[gaps[-1] + 1] - edges[gaps[0]])  # the first of equal ones
    middle = (edges[widest[0]] + edges[widest[-1] + 1]) / 2
    return float(thresholds[widest[np.argmin(np.abs(thresholds[widest] - middle))]])


def prior_correction(probabilities, train_prior, max_iter=1000, tolerance=1e-10):
    """
    Adapt probabilities (N,) of the positive class to an unknown share of positives, without labels: the EM of
    Saerens, Latinne & Decaestecker 2002 (Neural Computation 14:21). train_prior: share of positives in training.
    -> dict(probabilities (N,) array, prior, iterations); iterations = max_iter: stopped early.
    Assumes calibrated probabilities and that only the share of positives moved, not how the classes look.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or len(p) == 0 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must be a non-empty (N,) array within [0, 1]")
    if not 0 < train_prior < 1:
        raise ValueError(f"train_prior must lie between 0 and 1, got {train_prior}")
    if max_iter < 1:
        raise ValueError("max_iter must be at least 1")
    prior, iterations, change = train_prior, 0, 1.0
    while change > tolerance and iterations < max_iter:
        positive, negative = p * prior / train_prior, (1 - p) * (1 - prior) / (1 - train_prior)
        adapted = positive / (positive + negative)
        change, prior, iterations = abs(adapted.mean() - prior), adapted.mean(), iterations + 1
    return dict(probabilities=adapted, prior=float(prior), iterations=iterations)


# --- several classes, several labels ---


def _check_classes(labels, probabilities):
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if labels.ndim != 1 or probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ValueError(f"need labels (N,) and probabilities (N, C), got {labels.shape} and {probabilities.shape}")
    if len(labels) == 0 or probabilities.shape[1] < 2:
        raise ValueError(f"need at least one row and two classes, got probabilities {probabilities.shape}")
    if not np.isin(labels, np.arange(probabilities.shape[1])).all():
        raise ValueError(f"labels must be whole numbers from 0 to {probabilities.shape[1] - 1}")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities contain NaN or infinite values")
    return labels.astype(np.int64), probabilities


def _is_distribution(p):
    return p.min() >= 0 and p.max() <= 1 and np.allclose(p.sum(axis=1), 1, atol=1e-3)


def multiclass_metrics(labels, probabilities, ordinal=False):
    """
    labels (N,) in 0..C-1, probabilities (N, C); the call is the arg max -> dict, with a table per class.

    Macro precision, recall and F1 are scikit-learn's: over classes that occur in labels or calls, 0 for one never
    called. Balanced accuracy is the mean recall of the classes in labels alone. skipped_classes have no AUC, because
    either no case or every case is theirs. ece is None unless the rows sum to 1. kappa and mcc are None on one class.
    """
    labels, probabilities = _check_classes(labels, probabilities)
    classes = range(probabilities.shape[1])
    calls = probabilities.argmax(axis=1)
    matrix = confusion_matrix(labels, calls, labels=list(classes))
    support, num_called, hits = matrix.sum(axis=1), matrix.sum(axis=0), np.diag(matrix)
    table = []
    for c in classes:
        is_c = labels == c
        auc = float(roc_auc_score(is_c, probabilities[:, c])) if 0 < support[c] < len(labels) else None
        precision, recall = _ratio(hits[c], num_called[c]), _ratio(hits[c], support[c])
        f1 = _ratio(2 * hits[c], support[c] + num_called[c])
        table.append(dict(label=c, n=int(support[c]), precision=precision, recall=recall, f1=f1, auc=auc))
    result = dict(n=len(labels), accuracy=float((calls == labels).mean()))
    for average in ("macro", "weighted"):
        scores = precision_recall_fscore_support(labels, calls, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), scores[:3], strict=True):
            result[f"{average}_{name}"] = float(value)
    varied = (support > 0).sum() > 1
    result.update(
        balanced_accuracy=_mean(row["recall"] for row in table),
        mcc=float(matthews_corrcoef(labels, calls)) if varied else None,
        macro_auc=_mean(row["auc"] for row in table),
        skipped_classes=[row["label"] for row in table if row["auc"] is None],
        ece=expected_calibration_error(labels, probabilities) if _is_distribution(probabilities) else None,
        per_class=table,
        confusion_matrix=matrix.tolist(),  # [true][called]
    )
    if ordinal:
        kappa = cohen_kappa_score(labels, calls, weights="quadratic", labels=list(classes)) if varied else None
        result.update(
            quadratic_weighted_kappa=None if kappa is None else float(kappa),
            mean_absolute_error=float(np.abs(calls - labels).mean()),
        )
    return result


def _mean(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def multilabel_metrics(labels, scores, thresholds=0.5):
    """
    labels (N, L) of 0, 1 and NaN for unknown; scores (N, L); thresholds one number or (L,) -> dict, a table per label.

    Unknown entries are left out. skipped_labels have a single known class and are left out of macro_auc, macro_pr_auc
    and macro_f1; micro_f1 pools all known entries. mean_label_accuracy is MedMNIST's; exact_match asks for every known
    label of a row and leaves out rows without any.
    """
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 2 or labels.shape != scores.shape or labels.size == 0:
        raise ValueError(f"need labels and scores of one shape (N, L), got {labels.shape} and {scores.shape}")
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        raise ValueError("labels must be 0, 1 or NaN (unknown); decide about uncertain cases first")
    if not np.isfinite(scores).all():
        raise ValueError("scores contain NaN or infinite values")
    _check_threshold(thresholds)
    if np.ndim(thresholds) and np.shape(thresholds) != (labels.shape[1],):
        raise ValueError(f"need one threshold or {labels.shape[1]}, got shape {np.shape(thresholds)}")
    thresholds = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), labels.shape[1])

    table = []
    for j, threshold in enumerate(thresholds):
        rows = known[:, j]
        row = binary_metrics(labels[rows, j], scores[rows, j], threshold) if rows.any() else dict(n=0, num_positive=0)
        table.append(dict(label=j, **row, num_unknown=int((~rows).sum())))
    skipped = [row["label"] for row in table if row["num_positive"] in (0, row["n"])]
    used = [row for row in table if row["label"] not in skipped]
    tp, fp, fn = (sum(row.get(name, 0) for row in table) for name in ("tp", "fp", "fn"))
    right = ((scores > thresholds) == labels) | ~known
    return dict(
        n=len(labels),
        macro_auc=_mean(row["auc"] for row in used),
        macro_pr_auc=_mean(row["pr_auc"] for row in used),
        micro_f1=_ratio(2 * tp, 2 * tp + fp + fn),
        macro_f1=_mean(row["f1"] for row in used),
        mean_label_accuracy=_mean(row.get("accuracy") for row in table),
        exact_match=_mean(right[known.any(axis=1)].all(axis=1)),
        skipped_labels=skipped,
        num_unknown=int((~known).sum()),
        per_label=table,
    )


def official_auc_accuracy(labels, scores, task):
    """
    AUC and accuracy as medmnist.Evaluator (3.0.2) defines them -> dict(auc, accuracy).

    task: MedMNIST's name. "binary-class": last column, > 0.5. "multi-label, binary-class": mean over labels, > 0.5.
    "multi-class", "ordinal-regression": mean one-vs-rest AUC over the score columns, arg max.
    labels (N,), (N, 1) or (N, L); scores (N,) or (N, columns). auc is None where one of its parts is undefined.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if len(labels) != len(scores) or len(labels) == 0:
        raise ValueError(f"need as many labels as scores and at least one, got {labels.shape} and {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores contain NaN or infinite values")
    labels = labels.reshape(len(labels), -1)
    scores = scores.reshape(len(scores), -1)
    if task == "binary-class":
        scores = scores[:, -1:]
        correct = labels == (scores > 0.5)
    elif task == "multi-label, binary-class":
        correct = labels == (scores > 0.5)
    elif task in ("multi-class", "ordinal-regression"):
        labels, correct = labels == np.arange(scores.shape[1]), labels[:, 0] == scores.argmax(axis=1)
    else:
        raise ValueError(f"unknown MedMNIST task '{task}'")
    if labels.shape != scores.shape:
        raise ValueError(f"task '{task}' does not fit labels {labels.shape} and scores {scores.shape}")
    varied = [len(np.unique(labels[:, j])) > 1 for j in range(labels.shape[1])]
    auc = _mean(auroc(y, s) for y, s in zip(labels.T, scores.T, strict=True)) if all(varied) else None
    return dict(auc=auc, accuracy=float(correct.mean()))


# --- calibration ---


def _confidence_and_outcome(labels, probabilities):
    if np.ndim(probabilities) == 2:  # top label: how sure was the call, was it right
        labels, probabilities = _check_classes(labels, probabilities)
        if not _is_distribution(probabilities):
            raise ValueError("the rows of probabilities must sum to 1")
        return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(np.int64)
    labels, probabilities = check_binary(labels, probabilities)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError("probabilities must lie in [0, 1]; apply sigmoid or softmax first")
    return probabilities, labels


def reliability_bins(labels, probabilities, num_bins=15):
    """
    Points of a reliability diagram -> list of dict(n, confidence, rate, low, high), by rising confidence.

    probabilities (N,): mean probability of the positive class against its rate. (N, C): top label against accuracy.
    Bins hold equally many cases; equal probabilities share a bin, so fewer bins can come out and row order is
    irrelevant. low, high: 95 % Wilson interval of the rate.
    """
    if num_bins < 1:
        raise ValueError("num_bins must be at least 1")
    confidence, outcome = _confidence_and_outcome(labels, probabilities)
    doubled = (2 * rankdata(confidence)).astype(np.int64)  # midranks end in .0 or .5: whole numbers keep bins exact
    which = (doubled - 1) * num_bins // (2 * len(confidence))
    bins = []
    for b in np.unique(which):
        inside = which == b
        n, mean, rate = int(inside.sum()), float(confidence[inside].mean()), float(outcome[inside].mean())
        low, high = wilson_interval(int(outcome[inside].sum()), n)
        bins.append(dict(n=n, confidence=mean, rate=rate, low=low, high=high))
    return bins


def expected_calibration_error(labels, probabilities, num_bins=15):
    """
    Mean gap between confidence and rate over reliability_bins, weighted by cases -> float in [0, 1].
    Positive even for a perfect model, by chance alone (about 0.3 sqrt(bins / n) for evenly spread probabilities):
    compare models at equal n and bins.
    """
    bins = reliability_bins(labels, probabilities, num_bins)
    return sum(b["n"] * abs(b["confidence"] - b["rate"]) for b in bins) / sum(b["n"] for b in bins)


def fit_temperature(logits, labels, task="binary-class", bounds=(0.01, 100.0)):
    """
    T > 0 minimising the mean NLL of logits / T on validation cases (Guo et al. 2017, arXiv:1706.04599).

    task is MedMNIST's. "binary-class": margins (N,), labels 0/1. "multi-label, binary-class": margins (N, L), one T for
    all labels, NaN labels left out. "multi-class", "ordinal-regression": softmax logits (N, C), labels (N,).
    If every case is on the right side, the NLL falls for ever as T -> 0 and says nothing about calibration:
    T is then 1, the logits stay as they are. Otherwise the minimum is unique, sought within bounds.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if task in ("multi-class", "ordinal-regression"):
        labels, logits = _check_classes(labels, logits)
        true = logits[np.arange(len(labels)), labels]
        margins = true - np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits).max(axis=1)

        def loss(log_t):
            return np.mean(logsumexp(logits / np.exp(log_t), axis=1) - true / np.exp(log_t))

    elif task in ("binary-class", "multi-label, binary-class"):
        if logits.ndim != 1 + (task != "binary-class") or logits.shape != labels.shape:
            raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not fit task '{task}'")
        if task != "binary-class":
            known = ~np.isnan(labels.astype(np.float64))
            labels, logits = labels[known], logits[known]
        labels, logits = check_binary(labels, logits)
        margins = np.where(labels == 1, logits, -logits)

        def loss(log_t):
            return np.mean(np.logaddexp(0, -margins / np.exp(log_t)))

    else:
        raise ValueError(f"unknown MedMNIST task '{task}'")
    if margins.min() >= 0:
        return 1.0
    found = minimize_scalar(loss, bounds=np.log(bounds), method="bounded", options=dict(xatol=1e-8))
    return float(np.exp(found.x))
