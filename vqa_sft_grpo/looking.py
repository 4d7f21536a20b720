"""
V, the counterfactual term of the reward: does an answer hang on the region that the question needs?

    plan = plan_edits(row, image, k=4, seed=0)     # once per prompt: the film without the region, without random ones
    drops = measure_drops(score, questions, answers, plans)  # one call of score() for all rollouts of a step

What V means, and what it can do, stands in rewards.py; the fills stand in counterfactual.py.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
import math
import zlib
from dataclasses import dataclass, field

import numpy as np

from shared.runtime import InputError
from vqa_sft_grpo.counterfactual import FILLS, fill_region, plan_regions
from vqa_sft_grpo.scoring import normalise

NATS = 1.0  # a drop of the log-probability by this much makes V = 1; no larger one counts for more


def gold_of(row):
    return row["gold"] if "gold" in row else row["answer"]


def is_no(row):
    return normalise(gold_of(row)) == ["no"]


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


def plan_edits(row, image, k=4, fill="inpaint", seed=0):
    """
    The 2 + k images on which each answer to this row is scored; they do not depend on the rollout. image: uint8 (H, W)
    or (H, W, 3); row: its "region" is the gold region in pixels. Where the gold answer is no they are 1 + k, the random
    regions being of the size and shape of "lent", the gold region of another row in shares of width and height. fill:
    one of counterfactual.FILLS, or "mixed": drawn by the seed (with the step in the seed, a policy cannot get used to
    one). -> EditPlan.
    """
    if fill != "mixed" and fill not in FILLS:
        raise InputError(f"there is no fill '{fill}'; there are {', '.join(FILLS)} and mixed")
    seed = [*np.atleast_1d(seed).tolist(), zlib.crc32(f"{row.get('id', '')} {row['question']}".encode())]
    height, width = image.shape[:2]
    nothing = is_no(row)  # its own region, if any, is where something would be
    boxes = row.get("region")
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


def lend_regions(rows, lenders):
    """
    Gives each row with the gold answer no a "lent": the gold region of one of `lenders` (training rows), of the same
    question if there is one, in shares of width and height. Which one follows from the row's id. Rows without a lender
    stay as they are.
    """
    pool = {}
    for row in lenders:
        if row.get("region") and row.get("width") and row.get("height") and not is_no(row):
            w, h = row["width"], row["height"]
            shares = [[x0 / w, y0 / h, x1 / w, y1 / h] for x0, y0, x1, y1 in row["region"]]
            for key in (row["question"], None):
                pool.setdefault(key, []).append(shares)
    for row in rows:
        if is_no(row) and (some := pool.get(row["question"]) or pool.get(None)):
            row["lent"] = some[zlib.crc32(f"lent {row.get('id', '')} {row['question']}".encode()) % len(some)]


def answer_alone(answer, style="json"):
    """
    The answer as a whole response, for scoring it without the rollout's reasoning (see above) -> (text, (first, one
    past the last) character of the answer).
    """
    if style == "json":
        shown = json.dumps(answer, ensure_ascii=False)[1:-1]
        before, after = '{"answer": "', '"}'
    else:
        shown, before, after = answer, "<think></think><answer>", "</answer>"
    return before + shown + after, (len(before), len(before) + len(shown))


def measure_drops(score, questions, answers, plans):
    """
    score(images, questions, answers) -> log-probabilities, one float each (mean nats per token of the answer; None or a
    number that is not finite: cannot be scored). questions, answers, plans: one per rollout; an answer of None, and a
    plan without images, is not scored. score() is called once, with every distinct (plan, answer) as often as there are
    plan.images, in their order. -> per rollout {"d_roi", "d_rand_each", "counterfactual_why"}: drops, original minus
    edited; d_roi None where the plan takes no region out.
    """
    jobs = {}
    for question, answer, plan in zip(questions, answers, plans, strict=True):
        if answer is not None and plan.images:
            jobs.setdefault((id(plan), answer), (question, answer, plan))
    flat = [(image, question, answer) for question, answer, plan in jobs.values() for image in plan.images]
    logps = list(score(*map(list, zip(*flat, strict=True)))) if flat else []
    if len(logps) != len(flat):
        raise ValueError(f"score() gave {len(logps)} log-probabilities for {len(flat)} images")
    found, start = {}, 0
    for key, (_, _, plan) in jobs.items():
        first, *others = part = logps[start : start + len(plan.images)]
        start += len(plan.images)
        finite = all(p is not None and math.isfinite(p) for p in part)
        found[key] = [float(first) - float(p) for p in others] if finite else None
    results = []
    for answer, plan in zip(answers, plans, strict=True):
        drops, why = found.get((id(plan), answer)), "no answer to score" if answer is None else plan.why
        if not why and drops is None:
            why = "the log-probability of the answer is not finite"
        d_roi = drops[0] if not why and plan.roi else None
        d_rand = None if why else drops[len(plan.roi) > 0 :]
        results.append({"d_roi": d_roi, "d_rand_each": d_rand, "counterfactual_why": why})
    return results


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
    Places in plan.images of the two on which V rises when the rollout's answer becomes less likely on the first, and
    likelier on the second, each by 1 / NATS per nat: without the gold region and without the random one that matters
    most. Where d_roi is at its limit, or nothing is taken out, the first is the image as it is. (So V never makes an
    answer likelier everywhere: without that first part a model that is asked to bear random regions learned to say no
    to everything, within 25 steps of GRPO.)
    """
    worst = 1 + bool(plan.roi) + max(range(len(plan.random)), key=terms["d_rand_each"].__getitem__)
    return (0 if terms["d_roi"] is None or terms["d_roi"] >= NATS else 1), worst
