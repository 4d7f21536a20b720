"""
V, the counterfactual term of the reward: does what a response says hang on the region that the question needs?

    plan = plan_edits(row, image, k=4, seed=0)     # once per prompt: the film without the region, without random ones
    said = read_statement(ids, places, text, question)  # which tokens of a rollout state the answer
    drops = measure_drops(score, statements, plans)  # one call of score() for all rollouts of a step

V is measured on the response as it was written: the rollout's own tokens are read again with each edited film, and the
log-probabilities of those count that state the answer. These are the tokens of the answer itself, after the rollout's
own caption and reasoning; and where these name what is asked about (a content word of the question or of the answer
stands in them), also the clauses that do. After "Seen: left effusion." the answer "yes" follows from the text, whatever
the film shows: measured on the answer alone, V would be 0 for every such response, and a caption that names the finding
would be the way out of it. A caption that says nothing of the matter has no part in V. "explained" in the log says
which of the two it was, and the drop of the whole response stands beside it ("gap_response") and counts for nothing.
Words are compared as the strict score does, without synonyms: "fluid" does not name an effusion.

Log-probabilities are added up over these tokens, not averaged: the sum is that of the statement, and tokens that follow
from others (an answer said six times) add nothing to it, where in a mean they would thin out what the first one lost.

What V means, and what it can do, stands in rewards.py; the fills stand in counterfactual.py.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
import math
import re
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from shared.runtime import InputError
from vqa_sft_grpo.counterfactual import FILLS, fill_region, plan_regions
from vqa_sft_grpo.scoring import COMMON, NEGATORS, asks_for_absence, normalise, words_and_marks

NATS = 1.0  # a drop of the statement's log-probability by this much makes V = 1; no larger one counts for more
CLAUSE = re.compile(r"[^.;:,!?\n\\]+")
NO_CONTENT = COMMON | NEGATORS | {".", "yes"}  # words that name nothing


def gold_of(row):
    return row["gold"] if "gold" in row else row["answer"]


def nothing_to_take_out(row):
    """
    Is what the question asks about absent from the image, by the gold answer? "Is there a nodule?" no; "Is this film
    normal?" yes; "Is it free of effusion?" yes. Where "Is this film normal?" has the answer no, the finding is there.
    """
    gold = normalise(gold_of(row))
    return gold in (["yes"], ["no"]) and (gold == ["yes"]) == asks_for_absence(row["question"])


@dataclass
class EditPlan:
    """
    images: [as it is, without the region if roi names one, without random region 1, ... K], uint8; empty where `why`
    says that none can be made.
    """

    images: list = field(default_factory=list)
    why: str = ""
    roi: list = field(default_factory=list)
    random: list = field(default_factory=list)
    fill: str = ""


def plan_edits(row, image, k=4, fill="inpaint", seed=0, most=None):
    """
    The 2 + k images on which each answer to this row is scored; they do not depend on the rollout. image: uint8 (H, W)
    or (H, W, 3); row: its "region" is the gold region in pixels. With nothing to take out they are 1 + k, the random
    regions being of the size and shape of "lent", the gold region of another row in shares of width and height. fill:
    one of counterfactual.FILLS, or "mixed": drawn by the seed (with the step in the seed, a policy cannot get used to
    one). most: pixels that the model sees of an image; a larger one is scaled down to that first, with its region,
    since what an edit does beyond that is work for nothing. -> EditPlan, in pixels of its images.
    """
    if fill != "mixed" and fill not in FILLS:
        raise InputError(f"there is no fill '{fill}'; there are {', '.join(FILLS)} and mixed")
    seed = [*np.atleast_1d(seed).tolist(), zlib.crc32(f"{row.get('id', '')} {row['question']}".encode())]
    nothing = nothing_to_take_out(row)  # its own region, if any, is where something would be
    boxes = row.get("region")
    image, boxes = at_size_seen(image, boxes, most)
    height, width = image.shape[:2]
    if nothing:
        boxes = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in row.get("lent") or ()]
    if not boxes and nothing:
        return EditPlan(
            why="the gold answer is no: there is nothing to take out, and no other row has a region to lend"
        )
    if not boxes:
        return EditPlan(why="no gold region")
    plan = plan_regions(image, boxes, k, seed)
    if plan.why:
        return EditPlan(why=plan.why)
    if fill == "mixed":
        fill = FILLS[np.random.default_rng(seed).integers(len(FILLS))]
    roi = [] if nothing else plan.roi
    regions = [roi] * bool(roi) + plan.random
    edited = [fill_region(image, region, fill, seed=[*seed, number]) for number, region in enumerate(regions)]
    return EditPlan([image, *edited], "", roi, plan.random, fill)


def at_size_seen(image, boxes, most):
    """Image and boxes (or None), scaled down where the image has more than `most` pixels (None: never)."""
    height, width = image.shape[:2]
    if most is None or height * width <= most:
        return image, boxes
    share = math.sqrt(most / (height * width))
    size = max(1, int(width * share)), max(1, int(height * share))
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    across, down = size[0] / width, size[1] / height
    return scaled, boxes and [[x0 * across, y0 * down, x1 * across, y1 * down] for x0, y0, x1, y1 in boxes]


def lend_regions(rows, lenders):
    """
    Gives each row with nothing to take out a "lent": the gold region of one of `lenders` (training rows), of the same
    question if there is one, in shares of width and height. Which one follows from the row's id. Rows without a lender
    stay as they are.
    """
    pool = {}
    for row in lenders:
        if row.get("region") and row.get("width") and row.get("height") and not nothing_to_take_out(row):
            w, h = row["width"], row["height"]
            shares = [[x0 / w, y0 / h, x1 / w, y1 / h] for x0, y0, x1, y1 in row["region"]]
            for key in (row["question"], None):
                pool.setdefault(key, []).append(shares)
    for row in rows:
        if nothing_to_take_out(row) and (some := pool.get(row["question"]) or pool.get(None)):
            row["lent"] = some[zlib.crc32(f"lent {row.get('id', '')} {row['question']}".encode()) % len(some)]


# ------------------------------------------------------------------------------------------------- what a response says


@dataclass(frozen=True)
class Statement:
    """
    A rollout as V reads it. ids: its token ids; said: of each whether it states the answer, what V is measured on;
    explained: the text before the answer names what is asked about.
    """

    ids: tuple
    said: tuple
    explained: bool


def fields_of(text, style):
    """
    A response that passes the gate (rewards.py) -> {field: (first, one past the last) character of its value}, of texts
    without their quotes.
    """
    if style == "think":
        spans = {name: re.search(f"<{mark}>(.*?)</{mark}>", text, re.DOTALL) for name, mark in THINK_MARKS.items()}
        return {name: found.span(1) for name, found in spans.items() if found}
    found, decoder, at = {}, json.JSONDecoder(), text.index("{") + 1
    while key := re.compile(r'[\s,]*(?=")').match(text, at):
        name, at = decoder.raw_decode(text, key.end())
        at = re.compile(r"\s*:\s*").match(text, at).end()
        value, end = decoder.raw_decode(text, at)
        quote = isinstance(value, str)
        found[name], at = (at + quote, end - quote), end
    return found


THINK_MARKS = {"reasoning": "think", "answer": "answer"}


def read_statement(ids, places, text, question, style="json"):
    """
    ids: tokens of a response that passes the gate; places: where each stands in `text` (passes.places_of) -> Statement.
    """
    spans = fields_of(text, style)
    first, last = spans["answer"]
    named = set(words_and_marks(question)) | set(words_and_marks(text[first:last]))
    named -= NO_CONTENT
    clauses = [
        (start + clause.start(), start + clause.end())
        for name, (start, end) in spans.items()
        if name in ("caption", "reasoning") and end <= first
        for clause in CLAUSE.finditer(text[start:end])
        if named & set(words_and_marks(clause[0]))
    ]
    said = [any(max(a, c) < min(b, d) for c, d in [*clauses, (first, last)]) for a, b in places]
    return Statement(tuple(ids), tuple(said), bool(clauses))


def measure_drops(score, statements, plans):
    """
    statements, plans: one per rollout; a statement of None, and a plan without images, is not scored. score(images,
    statements) -> per image [log-probability of what the statement says, of the whole response], in nats (None or a
    number that is not finite: cannot be scored). It is called once, with every distinct (plan, response) as often as
    there are plan.images, in their order. -> per rollout a dict: "d_roi", "d_rand_each": drops of what is said,
    original minus edited, d_roi None where the plan takes no region out; "explained"; "gap_response": where explained,
    drop of the whole response without the region minus the mean of those without random ones; "counterfactual_why".
    """
    jobs = {}
    for statement, plan in zip(statements, plans, strict=True):
        if statement is not None and plan.images:
            jobs.setdefault((id(plan), statement), plan)
    flat = [(image, statement) for (_, statement), plan in jobs.items() for image in plan.images]
    logps = list(score(*map(list, zip(*flat, strict=True)))) if flat else []
    if len(logps) != len(flat):
        raise ValueError(f"score() gave {len(logps)} log-probabilities for {len(flat)} images")
    found, start = {}, 0
    for key, plan in jobs.items():
        part = np.array(logps[start : start + len(plan.images)], float)  # (images, 2), NaN for None
        start += len(plan.images)
        found[key] = part[0] - part[1:] if np.isfinite(part).all() else None
    return [drops_of(statement, plan, found) for statement, plan in zip(statements, plans, strict=True)]


def drops_of(statement, plan, found):
    """found: {(id of a plan, statement): drops (edited images, 2), or None} -> one dict of measure_drops."""
    drops, why = found.get((id(plan), statement)), "no answer to score" if statement is None else plan.why
    if not why and drops is None:
        why = "the log-probability of the answer is not finite"
    out = dict.fromkeys(("d_roi", "d_rand_each", "gap_response")) | {"counterfactual_why": why}
    out["explained"] = None if statement is None else statement.explained
    if why:
        return out
    said, whole = drops.T.tolist()
    out["d_rand_each"] = said[len(plan.roi) > 0 :]
    if plan.roi:
        out["d_roi"] = said[0]
        out["gap_response"] = whole[0] - float(np.mean(whole[1:])) if statement.explained else None
    return out


# ------------------------------------------------------------------------------------------------------------- the term


def counterfactual_term(no, d_roi, d_rand, why):
    """
    -> (V, d_roi, [d_rand], why it is undefined). no: the gold answer is no, so that nothing was taken out. None: not
    measured.
    """
    d_roi = None if no else d_roi
    if not d_rand or not no and d_roi is None:
        return None, d_roi, d_rand, why or "not measured"
    if not all(math.isfinite(d) for d in (d_roi or 0.0, *d_rand)):
        return None, None, None, "a drop is not finite"
    value = ((0.0 if no else min(d_roi, NATS)) - max(d_rand)) / NATS
    return min(0.0 if no else 1.0, max(-1.0, value)), d_roi, d_rand, ""


def images_of_v(terms, plan):
    """
    Places in plan.images of the two on which V rises when the rollout's statement becomes less likely on the first, and
    likelier on the second, each by 1 / NATS per nat: without the gold region and without the random one that matters
    most. Where d_roi is at its limit, or nothing is taken out, the first is the image as it is. (So V never makes an
    answer likelier everywhere: without that first part a model that is asked to bear random regions learned to say no
    to everything, within 25 steps of GRPO.)
    """
    worst = 1 + bool(plan.roi) + max(range(len(plan.random)), key=terms["d_rand_each"].__getitem__)
    return (0 if terms["d_roi"] is None or terms["d_roi"] >= NATS else 1), worst
