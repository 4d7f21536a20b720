"""
What evaluate.py computes from answers: rates with intervals, boxes, confidence, and the comparison of region and random
regions.

Every rate is over all rows it speaks of, and its interval draws whole image groups.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import warnings
from collections import Counter
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from shared.metrics.statistics import bootstrap_interval, cases_needed, effective_clusters, holm, mcnemar_exact
from shared.metrics.statistics import sign_flip_test
from shared.models.loading import load_part
from shared.models.tiny import is_tiny, tiny_folder
from shared.runtime import InputError
from vqa_sft_grpo.counterfactual import region_iou
from vqa_sft_grpo.prompting import REPAIR_LEVELS
from vqa_sft_grpo.scoring import column_means

THRESHOLDS = (0.3, 0.4, 0.5, 0.6)  # of the caption-question similarity
SMALL_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # 90 MB: the default where the hub can be reached


# -------------------------------------------------------------------------------------------------------------- metrics


def interval_of(metric, *values, groups, **how):
    """{"value", "low", "high"} of bootstrap_interval; the report says how few groups there are, so it need not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap_interval(metric, *values, groups=groups, **how)
    return {k: found[k] for k in ("value", "low", "high")}


def rate(values, groups):
    """
    Mean of values (booleans or numbers, every row) with its interval over groups -> {"value", "low", "high", "n"}.
    """
    if len(values) == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    sums = (np.asarray(values, float), np.ones(len(values)))
    return interval_of(lambda v, n: v / n, *sums, groups=groups, of_sums=True) | {"n": len(values)}


def is_open(row):
    return row["answer_type"].lower() == "open"


COLUMNS = {  # of summarise: (field of a record, rows it is over)
    "accuracy": ("correct", "all"),
    "closed": ("correct", "closed"),
    **{f"open_{name}": (name, "open") for name in ("exact", "recall", "precision", "f1")},
    **{name: (name, "all") for name in ("parsed", "contradiction", "synonyms")},
}


def summarise(rows, records):
    """Everything that is measured of one set of answers."""
    groups = np.array([row["group"] for row in rows])
    opened = np.array([is_open(row) for row in rows], dtype=bool)
    parts = {"all": np.ones(len(rows), dtype=bool), "closed": ~opened, "open": opened}
    found = {"n": len(rows)}
    for name, (field, part) in COLUMNS.items():
        chosen = parts[part]
        found[name] = rate([r[field] for r, c in zip(records, chosen, strict=True) if c], groups[chosen])
    for script in ("llava_med", "medevalkit"):
        means = column_means([r[script] for r in records])
        found[script] = {name: value["mean"] for name, value in means.items()}
        found[script]["n_closed"] = means.get("closed", {"n": 0})["n"]
    return found


def strata(rows, records):
    """Per answer, question and content type: n, accuracy, and for open rows recall and F1."""
    tables = {}
    for key in ("answer_type", "question_type", "content_type"):
        for name in sorted({str(row[key]) for row in rows if row.get(key)}):
            chosen = [i for i, row in enumerate(rows) if str(row.get(key)) == name]
            opened = [i for i in chosen if is_open(rows[i])]

            def over(some, field):
                return rate([records[i][field] for i in some], [rows[i]["group"] for i in some])

            line = {"accuracy": over(chosen, "correct"), "unparsed": sum(not records[i]["parsed"] for i in chosen)}
            line |= {f"open_{field}": over(opened, field) for field in ("recall", "f1")}
            tables.setdefault(key, {})[name] = line
    return tables


def paired_difference(a, b, groups):
    """Mean of a - b over rows with its interval, and the sign-flip test over groups."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    return rate(difference, groups) | {"p": sign_flip_test(difference, groups)["p"] if len(difference) else None}


def best_constant_box(rows, cells=16):
    """
    The box [x0, y0, x1, y1], in shares of width and height, with the best mean IoU over the regions of training rows,
    of all boxes on a grid of cells x cells; None when no row has a region.
    """
    known = [row for row in rows if row.get("region")]
    if not known:
        return None
    edges = np.arange(cells)

    def cover(low, high):  # share of each cell between low and high
        return np.clip(np.minimum(edges + 1, high * cells) - np.maximum(edges, low * cells), 0, 1)

    gold = np.zeros((len(known), cells + 1, cells + 1))
    for sums, row in zip(gold, known, strict=True):
        w, h = row["width"], row["height"]
        boxes = [np.outer(cover(y0 / h, y1 / h), cover(x0 / w, x1 / w)) for x0, y0, x1, y1 in row["region"]]
        sums[1:, 1:] = np.max(boxes, axis=0).cumsum(0).cumsum(1)
    first, last = np.triu_indices(cells + 1, 1)  # all intervals of an axis
    area = gold[:, -1, -1][:, None]
    best, box = -1.0, None
    for y0, y1 in zip(first, last, strict=True):
        band = gold[:, y1] - gold[:, y0]
        inside = band[:, last] - band[:, first]  # (rows, intervals of x)
        ious = (inside / (area + (y1 - y0) * (last - first) - inside)).mean(0)
        if ious.max() > best:
            best, i = float(ious.max()), int(ious.argmax())
            box = [float(edge / cells) for edge in (first[i], y0, last[i], y1)]
    return box


# a region up to this share of the image is a place; a larger one, such as both lungs, says where to search
PLACE = 0.25


def is_place(row):
    """Is the row's region a place in the image, rather than most of it?"""
    area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in row.get("region") or ())
    return 0 < area <= PLACE * row["width"] * row["height"]


def measure_boxes(rows, records, images, train_rows):
    """
    Box rate over all rows; IoU with the gold region over all rows that have one (no box: 0) and, as "places", over
    those whose region is one: a box that always covers both lungs is nearly right for every "no". Each beside its own
    best constant box.
    """
    known = [i for i, row in enumerate(rows) if row.get("region")]
    places, train_places = [i for i in known if is_place(rows[i])], [row for row in train_rows if is_place(row)]
    return {
        "box_rate": rate([bool(r["boxes"]) for r in records], [row["group"] for row in rows]),
        **against_constant_box(known, rows, records, images, train_rows),
        "places": against_constant_box(places, rows, records, images, train_places),
    }


def against_constant_box(chosen, rows, records, images, train_rows):
    """Mean IoU over the rows with these numbers, and of the constant box that is best for the training rows."""
    constant, groups = best_constant_box(train_rows), [rows[i]["group"] for i in chosen]

    def ious(boxes_of):
        seen = ((i, None if images[i] is None else images[i].shape[:2]) for i in chosen)
        return [0.0 if size is None else region_iou(boxes_of(i, *size), rows[i]["region"], *size) for i, size in seen]

    model = ious(lambda i, h, w: records[i]["boxes"])
    found = {"iou": rate(model, groups), "constant_box": constant}
    if constant:
        fixed = ious(lambda i, h, w: [[share * side for share, side in zip(constant, (w, h, w, h), strict=True)]])
        found["iou_constant_box"] = rate(fixed, groups)
        found["iou_over_constant_box"] = paired_difference(model, fixed, groups)
    return found


def json_success(records):
    """Share of valid responses (levels 0 and 1) and how many needed which repair."""
    levels = Counter(r["level"] for r in records)
    return {
        "valid": sum(r["valid"] for r in records) / len(records),
        "levels": {str(level): levels.get(level, 0) for level in REPAIR_LEVELS},
    }


# ----------------------------------------------------------------------------------------------------------- confidence


class SentenceEncoder:
    """Texts -> unit vectors: mean of a BERT-like encoder's last layer over the tokens."""

    def __init__(self, name, device):
        self.name = name
        folder = str(tiny_folder(name)) if is_tiny(name) else name
        self.model = load_part(AutoModel, folder, name=name, device=device, unused_weights=True)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=Path(folder).is_dir())
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"--sentence-encoder: {name} has no tokenizer that can be read; copy its tokenizer files into it"
            ) from error
        self.device = device

    @torch.inference_mode()
    def __call__(self, texts, batch_size=64):
        distinct = list(dict.fromkeys(texts))
        vectors = []
        for start in range(0, len(distinct), batch_size):
            tokens = self.tokenizer(
                distinct[start : start + batch_size], padding=True, truncation=True, max_length=256, return_tensors="pt"
            ).to(self.device)
            mask = tokens["attention_mask"][..., None]
            hidden = self.model(**tokens).last_hidden_state.float()
            vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).cpu())
        place = {text: i for i, text in enumerate(distinct)}
        return torch.cat(vectors)[[place[t] for t in texts]].numpy()


def caption_similarity(rows, records, encoder):
    """Cosine of caption and question per row, None without a caption."""
    has = [i for i, r in enumerate(records) if r["caption"]]
    similarity = [None] * len(rows)
    if has:
        cosines = (encoder([records[i]["caption"] for i in has]) * encoder([rows[i]["question"] for i in has])).sum(1)
        for i, c in zip(has, cosines, strict=True):
            similarity[i] = float(c)
    return similarity


def risk_coverage(confidence, correct):
    """
    confidence (N,) numbers or None (least of all), correct (N,) booleans -> (coverage (N,), risk (N,), AURC). risk[k]:
    error rate of the k + 1 rows answered first; equal confidences share their errors evenly. AURC: mean risk (Geifman &
    El-Yaniv 2017).
    """
    c = np.array([-np.inf if v is None else v for v in confidence], dtype=float)
    order = np.argsort(-c, kind="stable")
    errors = 1.0 - np.asarray(correct, float)[order]
    _, tie = np.unique(-c[order], return_inverse=True)
    errors = (np.bincount(tie, errors) / np.bincount(tie))[tie]
    ranks = np.arange(1, len(c) + 1)
    risk = errors.cumsum() / ranks
    return ranks / len(c), risk, float(risk.mean())


def aurc_row(confidence, correct, groups):
    """AURC with its interval, beside those of a perfect order and of no order (the error rate)."""
    correct = np.asarray(correct, bool)
    values = np.array([-np.inf if v is None else v for v in confidence], dtype=float)
    found = interval_of(lambda v, y: risk_coverage(v, y)[2], values, correct, groups=groups, num_samples=500)
    return found | {
        "n": len(correct),
        "n_without_value": int(np.isneginf(values).sum()),
        "perfect": risk_coverage(correct.astype(float), correct)[2],
        "no_order": float(1 - correct.mean()),
    }


def at_thresholds(similarity, logprob, correct):
    """
    Answer only where caption and question are at least this similar: coverage of all rows and accuracy there, beside
    the accuracy on as many rows chosen by the answer's log-probability.
    """
    _, risk, _ = risk_coverage(logprob, correct)
    rows = []
    for t in THRESHOLDS:
        kept = [c for s, c in zip(similarity, correct, strict=True) if s is not None and s >= t]
        n = len(kept)
        row = {"threshold": t, "n": n, "coverage": n / len(correct), "accuracy": sum(kept) / n if n else None}
        rows.append(row | {"accuracy_by_logprob": float(1 - risk[n - 1]) if n else None})
    return rows


# ------------------------------------------------------------------------------------------------------- counterfactual
#
# A case: {"row": number of its row, "source": "gold" or "self", "plan": Plan, "own": boxes, "was_correct": bool,
# "edits": {(what, fill, number): {"answer", "flipped", "unparsed", "wrong_now", "drop", "drop_response"}}} with what
# "identity", "roi", "random" or, where a gold case has own boxes, "own" (see answers.py).


def edit_values(case, what, key, fills, numbers):
    """Values of one key over fills and random regions -> float (fills, numbers), NaN where undefined."""
    return np.array(
        [[np.nan if (v := case["edits"][what, fill, n][key]) is None else v for n in range(numbers)] for fill in fills],
        dtype=float,
    )


def paired(roi, rand, groups):
    """paired_difference with the two means beside it."""
    both = {"roi": float(roi.mean()), "random": float(rand.mean())} if len(roi) else {"roi": None, "random": None}
    return paired_difference(roi, rand, groups) | both


def compare_cases(cases, rows, fills, k):
    """
    Region against random regions, averaged over `fills`, for one set of cases -> dict. delta: share of answers that
    change without the region minus the mean share without a random one; unparsed answers do not count as changed and
    are given apart. necessity: the same of the drops in log-probability of the answer, necessity_response: of the whole
    response. McNemar's test pairs the region with the first random one, which needs a single fill.
    """
    if not cases:
        return {"n": 0}
    groups = np.array([rows[case["row"]]["group"] for case in cases])
    roi, rand = {}, {}  # per key: (cases, fills, 1) and (cases, fills, k)
    for key in ("flipped", "unparsed", "wrong_now", "drop", "drop_response"):
        roi[key] = np.array([edit_values(c, "roi", key, fills, 1) for c in cases])
        rand[key] = np.array([edit_values(c, "random", key, fills, k) for c in cases])
    result = {"n": len(cases), "num_groups": len(set(groups.tolist()))}
    for name, key in (("flip", "flipped"), ("unparsed", "unparsed")):
        result |= {f"{name}_roi": float(roi[key].mean()), f"{name}_random": float(rand[key].mean())}
    case_roi, case_rand = ({key: v.mean((1, 2)) for key, v in table.items()} for table in (roi, rand))
    result["delta"] = paired_difference(case_roi["flipped"], case_rand["flipped"], groups)
    right = np.array([c["was_correct"] for c in cases])
    result["correct_to_wrong"] = paired(case_roi["wrong_now"][right], case_rand["wrong_now"][right], groups[right])
    for name, key in (("necessity", "drop"), ("necessity_response", "drop_response")):
        known = ~np.isnan(case_roi[key]) & ~np.isnan(case_rand[key])
        result[name] = paired(case_roi[key][known], case_rand[key][known], groups[known])
    flips, others = roi["flipped"], rand["flipped"]
    if len(fills) == 1:
        result["mcnemar"] = mcnemar_exact(flips[:, 0, 0] == 1, others[:, 0, 0] == 1)
    delta, discordant = result["delta"]["value"], float((flips != others).mean())
    result["discordant"] = discordant
    result["cases_needed"] = cases_needed(delta, max(discordant, abs(delta))) if abs(delta) > 1e-9 else None
    spread = case_roi["flipped"] - case_rand["flipped"]
    result["design_effect"] = effective_clusters(groups, spread)["design_effect"] if len(cases) > 1 else None
    return result


def kind_of(row):
    """What is asked about: SLAKE's and the phantom's content type; VQA-RAD has that as its question type."""
    return str(row["question_type"] if row["dataset"] == "vqa_rad" else row["content_type"])


def measure_counterfactual(cases, rows, fills, k):
    """
    Per source of the region (gold, self): all fills together, each alone, by kind of question, and the floor of the
    identity edits.
    """
    measured = {}
    for source in dict.fromkeys(case["source"] for case in cases):
        some = [c for c in cases if c["source"] == source]
        kinds = sorted({kind_of(rows[c["row"]]) for c in some})
        by_fill = {fill: compare_cases(some, rows, [fill], k) for fill in fills}
        by_type = {
            kind: compare_cases([c for c in some if kind_of(rows[c["row"]]) == kind], rows, fills, k) for kind in kinds
        }
        for table in (by_fill, by_type):
            for found, p in zip(table.values(), holm([f["delta"]["p"] for f in table.values()]), strict=True):
                found["delta"]["p_holm"] = p
        signs = {np.sign(found["delta"]["value"]) for found in by_fill.values()}
        measured[source] = {
            "all_fills": compare_cases(some, rows, fills, k),
            "by_fill": by_fill,
            "by_type": by_type,
            "fills_agree_in_sign": len(signs) == 1 and 0 not in signs,
            "identity": {name: floor_of([c["edits"]["identity", name, 0] for c in some]) for name in ("jpeg", "shift")},
        }
    return measured


def floor_of(edits):
    """How much answers change by themselves."""
    drops = [abs(e["drop"]) for e in edits if e["drop"] is not None]
    shares = {key: float(np.mean([e[key] for e in edits])) for key in ("flipped", "unparsed")}
    return shares | {"mean_absolute_drop": float(np.mean(drops)) if drops else None}


def measure_redrawn(rows, records, redrawn):
    """
    Answers about films drawn anew without a finding (see prepare_data.py) -> dict, or None where there are none.
    redrawn: {"redrawn", "redrawn_other": {row number: record}}. without: share of answers that change when the finding
    asked about is gone, other: when another one is gone, difference: on the rows that have both; both_right: yes with
    the finding and no without it, also for the films that are normal then (only_finding) and those that are not
    (others_left): who says yes for any ill film is right about the first only. Every row with such a film counts; an
    answer that cannot be read has not changed, and is counted apart.
    """
    if not redrawn["redrawn"]:
        return None

    def changed(i, record):
        return None not in (record["key"], records[i]["key"]) and record["key"] != records[i]["key"]

    def over(values):  # {row number: value}
        return rate(list(values.values()), [rows[i]["group"] for i in values])

    without, other = (
        {i: changed(i, record) for i, record in redrawn[field].items()} for field in ("redrawn", "redrawn_other")
    )
    both = {i: bool(records[i]["correct"]) and record["key"] == "no" for i, record in redrawn["redrawn"].items()}
    paired = [i for i in without if i in other]
    pairs = ([some[i] for i in paired] for some in (without, other))
    return {
        "without": over(without),
        "other": over(other),
        "difference": paired_difference(*pairs, [rows[i]["group"] for i in paired]),
        "both_right": over(both),
        "only_finding": over({i: v for i, v in both.items() if i not in other}),
        "others_left": over({i: both[i] for i in paired}),
        "unparsed": {field: sum(record["key"] is None for record in some.values()) for field, some in redrawn.items()},
    }


def case_summary(case, fills, k):
    """What predictions.jsonl says of a case; stability: share of random-region edits that leave the answer as it is."""

    def values(what, key):
        return edit_values(case, what, key, fills, k if what == "random" else 1)

    def mean(what, key):
        found = values(what, key)
        return None if np.isnan(found).any() else float(found.mean())

    changed = (values("random", "flipped") + values("random", "unparsed")) > 0
    return {
        "source": case["source"],
        "roi": case["plan"].roi,
        "random": case["plan"].random,
        "flip_roi": mean("roi", "flipped"),
        "flip_random": mean("random", "flipped"),
        "flip_own": mean("own", "flipped") if case["own"] else None,
        "delta_cf_roi": mean("roi", "drop"),
        "delta_cf_rand": mean("random", "drop"),
        "stability": float(1 - changed.mean()),
        "answers": {f"{what} {fill} {number}": e["answer"] for (what, fill, number), e in case["edits"].items()},
    }
