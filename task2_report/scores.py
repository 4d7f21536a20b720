"""
How good are written reports: the labels they state, sides, errors, words, and how many differ.

    found = measure_reports(texts, references, groups=patients)
    found["clinical"]["f1_micro_13"], found["errors"], found["words"]["bleu_4"], found["diversity"]

Labels are read from the whole text by shared/metrics/labels.py; word scores compare the findings alone with R2Gen's
cleaning, as the papers on IU X-ray do. A side is right when the sides that a text states for a condition are exactly
those of the reference (of the phantom: of the film); conditions without a stated side on either part do not count.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from collections import Counter
from functools import lru_cache

import numpy as np

from shared.metrics.clinical import averages, per_condition, positive_matrix
from shared.metrics.labels import CONDITIONS, POSITIVE, UNCERTAIN, label_report
from shared.metrics.report_baselines import diversity
from shared.metrics.statistics import bootstrap_interval
from shared.metrics.text import score_reports
from task2_report.cases import sections_of

FEW = 30  # patients; below, an interval says less than it seems to
ERRORS = ("missed", "invented", "wrong side")


@lru_cache(maxsize=100_000)
def labels_of(text):
    """-> {condition: 1, 0, -1 or None}; do not change it."""
    return label_report(text)


# -------------------------------------------------------------------------------------------------------------- sides

SENTENCE_END = re.compile(r"\.(?!\d)|\n|$")  # not the stop of "2.5 cm"
PIECE = re.compile(r",|;|(?<!left )(?<!right )\band\b|\bwith\b", re.IGNORECASE)
SIDE_WORDS = {"right": {"right"}} | dict.fromkeys(("left", "lingula", "lingular"), {"left"})
SIDE_WORDS |= dict.fromkeys(("bilateral", "bilaterally", "both", "bibasilar"), {"left", "right"})
SIDED = tuple(c for c in CONDITIONS if c not in ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Edema"))


def sides_in(text):
    words = re.findall(r"[a-z]+", text.lower())
    return set().union(*(SIDE_WORDS.get(word, set()) for word in words))


@lru_cache(maxsize=100_000)
def sides_of(text):
    """
    {condition: frozenset of "left", "right"} where a text states or doubts a condition with a side: in the same piece
    of the sentence (between commas, "and", "with"), else anywhere in the sentence.
    """
    found = {}
    _, spans = label_report(text, evidence=True)
    for span in spans:
        if span["condition"] not in SIDED or span["label"] not in (POSITIVE, UNCERTAIN):
            continue
        start = max(text.rfind(". ", 0, span["start"]), text.rfind("\n", 0, span["start"])) + 1
        end = SENTENCE_END.search(text, span["end"]).start()
        before = [m.end() + start for m in PIECE.finditer(text[start : span["start"]])]
        after = PIECE.search(text[span["end"] : end])
        piece = text[before[-1] if before else start : span["end"] + after.start() if after else end]
        sides = sides_in(piece) or sides_in(text[start:end])
        if sides:
            found[span["condition"]] = found.get(span["condition"], frozenset()) | sides
    return found


def film_sides(study):
    """The same for what is drawn on a film of the phantom."""
    found = {}
    for finding in study.drawn:
        if finding.condition in SIDED and finding.side in ("left", "right"):
            found[finding.condition] = found.get(finding.condition, frozenset()) | {finding.side}
    return found


# -------------------------------------------------------------------------------------------------------------- truth


def truth_of(case, conditions=CONDITIONS[1:]):
    """
    What a report of this case should state -> ({condition: bool}, {condition: sides}): of the phantom what is drawn,
    else what the reference report states or doubts.
    """
    if case.study is not None:
        drawn = {finding.condition for finding in case.study.drawn}
        return {name: name in drawn for name in conditions}, film_sides(case.study)
    return stated(case.report, conditions), sides_of(case.report)


def stated(text, conditions=CONDITIONS[1:]):
    """{condition: stated or doubted?}"""
    labels = labels_of(text)
    return {name: labels[name] in (POSITIVE, UNCERTAIN) for name in conditions}


def f1_of(pairs):
    """Pairs ({condition: bool} written, {condition: bool} true) -> micro-F1, None without a positive on either part."""
    tp = sum(w[c] and t[c] for w, t in pairs for c in t)
    wrong = sum(w[c] != t[c] for w, t in pairs for c in t)
    return 2 * tp / (2 * tp + wrong) if 2 * tp + wrong else None


def errors_of(text, truth, sides):
    """One text against the truth -> {"missed", "invented", "wrong side": number}, and sides right and compared."""
    says, said_sides = stated(text, tuple(truth)), sides_of(text)
    both = [c for c in truth if says[c] and truth[c] and said_sides.get(c) and sides.get(c)]
    right = sum(said_sides[c] == sides[c] for c in both)
    return {
        "missed": sum(truth[c] and not says[c] for c in truth),
        "invented": sum(says[c] and not truth[c] for c in truth),
        "wrong side": len(both) - right,
        "sides compared": len(both),
    }


# ------------------------------------------------------------------------------------------------------ all the numbers


def findings_of(text):
    """The findings of a written report; without headings the whole text."""
    parts = sections_of(text)
    return parts.get("findings") or ("" if "impression" in parts else text)


def measure_reports(texts, cases, conditions=CONDITIONS[1:], intervals=True):
    """
    texts: one written report per case -> dict of plain numbers: "conditions" (micro-F1 over `conditions` against
    truth_of, interval by patient), "clinical" (averages of all 14 labels against the reference report),
    "per_condition", "sides", "errors" (per report and as a histogram), "words", "diversity", "empty".
    """
    truths = [truth_of(case, conditions) for case in cases]
    says = [stated(text, conditions) for text in texts]
    groups = [case.patient for case in cases]
    counted = [errors_of(text, *truth) for text, truth in zip(texts, truths, strict=True)]
    w, t = (np.array([[row[c] for c in conditions] for row in rows]) for rows in (says, [t for t, _ in truths]))
    sums = (w & t).sum(1), w.sum(1) + t.sum(1)
    f1 = {"value": f1_of([(a, b) for a, (b, _) in zip(says, truths, strict=True)]), "low": None, "high": None}
    if intervals and f1["value"] is not None and len(set(groups)) >= FEW:
        f1 = bootstrap_interval(lambda tp, n: 2 * tp / n, *sums, groups=groups, of_sums=True)
    h, r = (positive_matrix([labels_of(text) for text in some]) for some in (texts, [c.report for c in cases]))
    compared = sum(row["sides compared"] for row in counted)
    wrong = sum(row["wrong side"] for row in counted)
    found, references = [findings_of(text) for text in texts], [case.findings for case in cases]
    return {
        "n": len(texts),
        "conditions": f1,
        "clinical": averages(h, r),
        "per_condition": per_condition(h, r),
        "sides": {"right": 1 - wrong / compared if compared else None, "compared": compared},
        "errors": {name: sum(row[name] for row in counted) / len(counted) for name in ERRORS},
        "error_histogram": {
            str(k): n for k, n in sorted(Counter(sum(row[name] for name in ERRORS) for row in counted).items())
        },
        "words": {k: float(v) for k, v in score_reports(found, references, tokenizer="r2gen").items()},
        "diversity": diversity(found, references, tokenizer="r2gen"),
        "empty": sum(not text.strip() for text in texts),
    }
