"""
Clinical efficacy of generated reports: precision, recall and F1 of the labels read from them, whatever read them.

    hypotheses = [label_report(text) for text in generated]     # or CheXbertLabeller.label(generated)
    references = [label_report(text) for text in written]
    clinical_efficacy(hypotheses, references)["uncertain_positive"]["f1_micro_14"]
    clinical_interval("f1_micro_13", hypotheses, references)

Papers print very different numbers under the name "clinical F1". So every key says what it is:
    f1_micro_14   average (micro, macro, weighted, example) and conditions: 14, 13 (without No Finding) or 5 (TOP_FIVE)
    uncertain_positive, uncertain_negative   what a -1 counts as: the first is the "rrg" convention, the second R2Gen's
Negative and not mentioned are both "not positive". As in scikit-learn with zero_division=0, a ratio without a case
counts as 0 in the averages; `num_without_positive_*` says how many conditions have no positive reference.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np

from shared.metrics.labels import CONDITIONS, NEGATIVE, POSITIVE, TOP_FIVE, UNCERTAIN, UNKNOWN
from shared.metrics.statistics import bootstrap_interval

SUBSETS = {"14": CONDITIONS, "13": CONDITIONS[1:], "5": TOP_FIVE}
UNCERTAIN_AS = {"uncertain_positive": (POSITIVE, UNCERTAIN), "uncertain_negative": (POSITIVE,)}


def positive_matrix(labels, uncertain="uncertain_positive"):
    """labels: N dicts by condition name -> bool (N, 14) in the order of CONDITIONS: is the condition positive?"""
    if uncertain not in UNCERTAIN_AS:
        raise ValueError(f"uncertain is {uncertain!r}, expected {' or '.join(UNCERTAIN_AS)}")
    for row in labels:
        for name in CONDITIONS:
            value = row.get(name, "nothing")
            if value not in (POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN):
                raise ValueError(f"label of {name}: expected 1, 0, -1 or None, got {value!r}")
    positive = [[row[name] in UNCERTAIN_AS[uncertain] for name in CONDITIONS] for row in labels]
    return np.array(positive, dtype=bool).reshape(-1, 14)


def _ratio(a, b):
    """a / b, 0 where b is 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)


def _scores(hypothesis, reference, axis):
    """bool (N, C) twice -> precision, recall, F1 over `axis` (None: over everything)."""
    tp, called, true = (hypothesis & reference).sum(axis), hypothesis.sum(axis), reference.sum(axis)
    return {"precision": _ratio(tp, called), "recall": _ratio(tp, true), "f1": _ratio(2 * tp, called + true)}


def averages(hypothesis, reference):
    """bool (N, 14) twice, in the order of CONDITIONS -> flat dict of floats, keys as in the module's docstring."""
    result = {}
    for subset, names in SUBSETS.items():
        columns = [CONDITIONS.index(name) for name in names]
        h, r = hypothesis[:, columns], reference[:, columns]
        support = r.sum(0)
        each = _scores(h, r, 0)
        kinds = {"micro": _scores(h, r, None), "macro": {k: v.mean() for k, v in each.items()}}
        kinds["weighted"] = {k: _ratio((v * support).sum(), support.sum()) for k, v in each.items()}
        kinds["example"] = {k: v.mean() for k, v in _scores(h, r, 1).items()}
        for kind, scores in kinds.items():
            result |= {f"{metric}_{kind}_{subset}": float(v) for metric, v in scores.items()}
        result[f"exact_match_{subset}"] = float((h == r).all(1).mean())
        result[f"num_without_positive_{subset}"] = int((support == 0).sum())
    return result


def per_condition(hypothesis, reference):
    """-> {condition: dict(tp, fp, fn, tn, precision, recall, f1)}; here a ratio without a case is None."""
    result = {}
    for j, name in enumerate(CONDITIONS):
        h, r = hypothesis[:, j], reference[:, j]
        tp, fp, fn, tn = (int(n) for n in ((h & r).sum(), (h & ~r).sum(), (~h & r).sum(), (~h & ~r).sum()))
        ratios = dict(precision=(tp, tp + fp), recall=(tp, tp + fn), f1=(2 * tp, 2 * tp + fp + fn))
        ratios = {key: a / b if b else None for key, (a, b) in ratios.items()}
        result[name] = dict(tp=tp, fp=fp, fn=fn, tn=tn) | ratios
    return result


def clinical_efficacy(hypotheses, references):
    """
    hypotheses, references: N label dicts each (1, 0, -1, None by condition name), one pair per report
    -> {"n": N, "uncertain_positive": {..averages.., "per_condition": {..}}, "uncertain_negative": the same}.
    """
    hypotheses, references = list(hypotheses), list(references)
    if len(hypotheses) != len(references) or not references:
        sizes = f"{len(hypotheses)} and {len(references)}"
        raise ValueError(f"need as many hypotheses as references and at least one, got {sizes}")
    result = {"n": len(references)}
    for uncertain in UNCERTAIN_AS:
        h, r = positive_matrix(hypotheses, uncertain), positive_matrix(references, uncertain)
        result[uncertain] = averages(h, r) | {"per_condition": per_condition(h, r)}
    return result


def clinical_interval(
    key, hypotheses, references, uncertain="uncertain_positive", groups=None, num_samples=1000, confidence=0.95, seed=0
):
    """
    Bootstrap interval of one key of `averages`, by report or, with groups (N,), by study or patient
    -> dict of statistics.bootstrap_interval: value, low, high, num_samples, num_undefined.
    """
    h, r = positive_matrix(hypotheses, uncertain), positive_matrix(references, uncertain)
    known = averages(h, r)
    if key not in known:
        raise ValueError(f"there is no {key!r}; there are {', '.join(known)}")
    return bootstrap_interval(
        lambda a, b: averages(a, b)[key], h, r, groups=groups, num_samples=num_samples, confidence=confidence, seed=seed
    )
