"""
What a model's answers about normal or pneumonia are worth: pure functions on lists and arrays.

labels, 1 for pneumonia. A classification is "normal", "pneumonia", "uncertain" or None (cannot be read); uncertain and
None are never right, and are counted on their own.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from difflib import SequenceMatcher
from functools import lru_cache

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from shared.metrics.classification import binary_metrics
from shared.metrics.labels import CONDITIONS, NEGATIVE, UNKNOWN, label_report
from shared.metrics.statistics import delong_auc, mcnemar_exact, wilson_interval


# ----------------------------------------------------------------------------------- claims that pixels cannot bear

# What can be told on a child's chest film of 28x28 pixels, one pixel being about a centimetre.
TIERS = {
    "unresolvable": ("Lung Lesion", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"),
    "borderline": ("Cardiomegaly", "Enlarged Cardiomediastinum"),
    "resolvable": ("Lung Opacity", "Consolidation", "Pneumonia", "Edema", "Atelectasis"),
}
TIER_OF = {name: tier for tier, names in TIERS.items() for name in names}
assert set(TIER_OF) == set(CONDITIONS[1:])
OTHER_STRUCTURES = {
    "air bronchogram": ("unresolvable", r"air bronchograms?"),
    "costophrenic angle": ("unresolvable", r"costophrenic (?:angles?|sulc[iu]s?)"),
    "fissure": ("unresolvable", r"fissures?"),
    "trachea": ("unresolvable", r"trachea|carina"),
    "bones": ("unresolvable", r"(?:ribs?|clavicles?|bones?|bony|osseous)(?: structures?)?"),
    "hemidiaphragm": ("borderline", r"(?:hemi)?diaphragms?"),
}
DENIAL = re.compile(r"\b(?:no|not|without|absent|absence of|free of|negative for|cannot|clear of|nor)\b")


@lru_cache(maxsize=100_000)
def claims_of(text):
    """
    -> tuple of (structure, polarity: affirmed, negated or doubted, tier, (start, end)). The conditions come from the
    report labeller, six structures that it does not know from their words. "No pneumothorax" at 28 px is as
    unsupported as "pneumothorax".
    """
    _, spans = label_report(text, evidence=True)
    found = []
    for span in spans:
        if span["condition"] in TIER_OF and span["label"] is not UNKNOWN:
            polarity = {NEGATIVE: "negated", 1: "affirmed"}.get(span["label"], "doubted")
            found.append((span["condition"], polarity, TIER_OF[span["condition"]], (span["start"], span["end"])))
    taken = [span for *_, span in found]
    for name, (tier, pattern) in OTHER_STRUCTURES.items():
        for hit in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            if any(a < hit.end() and hit.start() < b for a, b in taken):
                continue
            before = re.split(r"[.\n;]", text[: hit.start()].lower())[-1]
            found.append((name, "negated" if DENIAL.search(before) else "affirmed", tier, hit.span()))
    return tuple(sorted(found, key=lambda claim: claim[-1]))


def unsupported(text):
    """-> {"affirmed": number, "negated": number} of claims about unresolvable structures; doubted ones make none."""
    polarities = [polarity for _, polarity, tier, _ in claims_of(text) if tier == "unresolvable"]
    return {kind: polarities.count(kind) for kind in ("affirmed", "negated")}


def claims_table(texts):
    """-> {tier: {polarity: claims per text}}"""
    all_claims = [claim for text in texts for claim in claims_of(text)]
    return {
        tier: {
            kind: sum(c[1] == kind and c[2] == tier for c in all_claims) / max(1, len(texts))
            for kind in ("affirmed", "negated", "doubted")
        }
        for tier in TIERS
    }


# ----------------------------------------------------------------------------------------------------- right and wrong


CALLS = ("normal", "pneumonia", "uncertain", "unread")


def proportion(hits, n):
    low, high = wilson_interval(int(hits), int(n))
    return {"value": hits / n if n else None, "low": low, "high": high, "n": int(n)}


def score_margins(labels, margins):
    """-> AUC with DeLong interval, accuracy where the margin is above 0 = pneumonia, with Wilson interval."""
    labels, margins = np.asarray(labels), np.asarray(margins)
    auc = delong_auc(labels, margins)
    if auc["auc"] in (0, 1):  # perfect order leaves DeLong without variance, which is no certainty
        auc |= {"low": None, "high": None}
    right = ((margins > 0) == (labels == 1)).sum()
    return {
        "auc": {"value": auc["auc"], "low": auc["low"], "high": auc["high"]},
        "accuracy": proportion(right, len(labels)),
        "share_yes": float((margins > 0).mean()),
    }


def score_calls(labels, calls):
    """Classifications -> shares of each answer, sensitivity and specificity (what is not called counts as wrong)."""
    labels = np.asarray(labels)
    said = np.array([call or "unread" for call in calls])
    ill, well = labels == 1, labels == 0
    return {
        "shares": {name: float((said == name).mean()) for name in CALLS},
        "sensitivity": proportion((said[ill] == "pneumonia").sum(), ill.sum()),
        "specificity": proportion((said[well] == "normal").sum(), well.sum()),
        "accuracy": proportion(right_calls(labels, calls).sum(), len(labels)),
    }


def right_calls(labels, calls):
    return np.array([call == ("pneumonia" if y else "normal") for y, call in zip(labels, calls, strict=True)], bool)


def agreement(labels, calls, cnn_calls):
    """
    VLM against CNN on the same cases -> Cohen's kappa of the two, exact McNemar of who is right, and complementarity:
    P(VLM right | CNN wrong) beside P(VLM right), without which the first says nothing.
    """
    right, cnn_right = right_calls(labels, calls), right_calls(labels, cnn_calls)
    a, b = ([call or "unread" for call in some] for some in (calls, cnn_calls))
    kappa = None if len(set(a) | set(b)) < 2 else float(cohen_kappa_score(a, b))
    return {
        "kappa": kappa,
        "mcnemar": mcnemar_exact(right, cnn_right),
        "right_where_cnn_wrong": proportion((right & ~cnn_right).sum(), (~cnn_right).sum()),
        "right": proportion(right.sum(), len(right)),
    }


def follow_rate(cnn_calls_told, calls, labels):
    """
    Of cases where the opinion that was told is wrong -> share in which the answer is that opinion, with what it is
    without being told left to the caller.
    """
    rows = zip(labels, cnn_calls_told, calls, strict=True)
    followed = [call == told for y, told, call in rows if (told == "pneumonia") != y]
    return proportion(sum(followed), len(followed))


def similarity(a, b):
    """0 to 1, by the words the two texts have in common in order; two empty texts are the same."""
    a, b = a.split(), b.split()
    return SequenceMatcher(None, a, b, autojunk=False).ratio() if a or b else 1.0


def image_dependence(texts, blind):
    """1 - mean similarity of the texts about the films with those about something else: 0 is blind."""
    return 1 - float(np.mean([similarity(a, b) for a, b in zip(texts, blind, strict=True)]))


def flips(margins, turned):
    """margins (questions, cases), turned: questions the other way round -> share of cases with both answers."""
    answers = (np.asarray(margins) > 0) != np.asarray(turned)[:, None]
    return float((answers.any(0) & ~answers.all(0)).mean())


def confidence_against_margin(calls, confidences, margins, labels):
    """Stated confidence beside the size of the margin, over cases with both: rank correlation, AUC of being right."""
    rows = [i for i, c in enumerate(confidences) if c is not None and calls[i] in ("normal", "pneumonia")]
    stated, size = [float(confidences[i]) for i in rows], [float(abs(margins[i])) for i in rows]
    right = right_calls([labels[i] for i in rows], [calls[i] for i in rows]).astype(int)
    both = len(set(right.tolist())) == 2
    varied = len(set(stated)) > 1 and len(set(size)) > 1
    return {
        "n": len(rows),
        "distinct_confidences": len(set(stated)),
        "rank_correlation": float(spearmanr(stated, size).statistic) if varied else None,
        "auc_of_right": {
            name: binary_metrics(right, values)["auc"] if both else None
            for name, values in (("stated", stated), ("margin", size))
        },
    }


def pixel_baseline(train_images, train_labels, images, most=5000):
    """
    uint8 (N, C, H, W) -> probability of class 1 by logistic regression on the pixels: what no model may lose to. One
    half where the training films are of one class.
    """
    if len(set(np.asarray(train_labels[:most]).ravel().tolist())) < 2:
        return np.full(len(images), 0.5)
    flat = [np.asarray(x, np.float32).reshape(len(x), -1) / 255 for x in (train_images[:most], images)]
    model = LogisticRegression(C=0.01, max_iter=300).fit(flat[0], np.asarray(train_labels[:most]))
    return model.predict_proba(flat[1])[:, 1]
