"""
V: which tokens of a rollout state its answer, the films they are read again with, and what they lose there.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.models.loading import load_vlm
from shared.models.passes import logprobs, make_prompts, never_drawn, places_of
from shared.phantom import phantom_study
from shared.runtime import InputError
from vqa_sft_grpo import looking
from vqa_sft_grpo.counterfactual import FILLS
from vqa_sft_grpo.looking import EditPlan, Statement, fields_of, lend_regions, measure_drops, plan_edits, read_statement
from vqa_sft_grpo.prompting import build_prompt
from vqa_sft_grpo.rewards import rollout_terms, score_rollouts
from vqa_sft_grpo.rollouts import score_statements
from vqa_sft_grpo.rows import grpo_row, phantom_study_rows

YES_NO = {"id": "a", "question": "Is there a pleural effusion?", "gold": "yes", "answer_type": "closed"}


def written(**fields):
    return json.dumps(fields)


# --- edited images ---


@pytest.fixture(scope="module")
def film():
    for index in range(100):
        study = phantom_study(0, index, 64)
        for row in phantom_study_rows(study, "train", Path("x")):
            if row["region"] and not plan_edits(row, study.image).why:
                return grpo_row(row, Path(".")), study.image
    raise AssertionError("no phantom row with room for random regions")


def test_plan_edits(film):
    row, image = film
    plan = plan_edits(row, image, k=3, seed=5)
    assert len(plan.images) == 5 and plan.images[0] is image and not plan.why and plan.fill == "inpaint"
    for number, (edited, boxes) in enumerate(zip(plan.images[1:], [plan.roi, *plan.random], strict=True)):
        inside = np.zeros(image.shape[:2], bool)
        for x0, y0, x1, y1 in boxes:
            inside[y0:y1, x0:x1] = True
        changed = edited != image if image.ndim == 2 else (edited != image).any(2)
        assert changed.any() and not (changed & ~inside).any(), number
    again, other = plan_edits(row, image, k=3, seed=5), plan_edits(row, image, k=3, seed=6)
    assert (
        all((a == b).all() for a, b in zip(plan.images, again.images, strict=True))
        and plan.random == again.random != other.random
    )
    assert {plan_edits(row, image, fill="mixed", seed=[1, step]).fill for step in range(12)} <= set(FILLS)
    assert len({plan_edits(row, image, fill="mixed", seed=[1, step]).fill for step in range(12)}) > 1
    assert plan_edits(dict(row, region=None), image) == EditPlan(why="no gold region")
    assert plan_edits(dict(row, region=[[0, 0, 64, 64]]), image).why == "region too large"
    no = dict(row, gold="no", region=[[0, 0, 64, 64]])  # where something would be: nothing is taken out there
    assert "no other row" in plan_edits(no, image).why
    lend_regions([no, row], [row])
    assert "lent" not in row
    of_no = plan_edits(no, image, k=3, seed=5)
    assert not of_no.roi and of_no.random == plan.random and len(of_no.images) == 4
    with pytest.raises(InputError, match="no fill 'black'"):
        plan_edits(row, image, fill="black")


def test_edits_are_made_at_the_size_that_the_model_sees(monkeypatch):
    """Pixels are counted, not seconds: of a film of 1,024 x 2,048 no more than --max-pixels are filled in."""
    image, seen = np.random.default_rng(0).integers(0, 255, (1024, 2048), dtype=np.uint8), []
    real = looking.fill_region
    monkeypatch.setattr(
        looking, "fill_region", lambda image, *rest, **how: seen.append(image) or real(image, *rest, **how)
    )
    row = YES_NO | {"region": [[200, 400, 600, 500]]}
    plan = plan_edits(row, image, k=2, fill="mean", most=262_144)
    assert len(seen) == 3 and all(i.size <= 262_144 for i in seen) and {i.shape for i in plan.images} == {(362, 724)}
    (x0, y0, x1, y1) = plan.roi[0]  # the region has become smaller with it, outwards to whole pixels
    assert (x0, y0, x1, y1) == (70, 141, 213, 177) and plan.images[1][150, 100] != plan.images[0][150, 100]
    lent = plan_edits(YES_NO | {"gold": "no", "lent": [[0.1, 0.4, 0.3, 0.5]]}, image, k=2, fill="mean", most=262_144)
    assert lent.images[0].shape == (362, 724) and len(lent.images) == 3
    small = image[:100, :100]
    plan = plan_edits(YES_NO | {"region": [[20, 40, 60, 60]]}, small, k=2, most=262_144)
    assert plan.images[0] is small and plan.roi == [[20, 40, 60, 60]]


# --- what a response says ---


def places(text, size=3):
    """Tokens of three characters each."""
    return [(i, min(i + size, len(text))) for i in range(0, len(text), size)]


def said_of(text, question=YES_NO["question"], style="json"):
    """-> (the text that V reads, explained), with tokens of one letter."""
    found = read_statement(range(len(text)), places(text, 1), text, question, style)
    return "".join(c for c, s in zip(text, found.said, strict=True) if s), found.explained


@pytest.mark.parametrize("answer", ["yes", 'the "left" lung', "línea\u00e9", "a\\b", "5 < 6"])
def test_the_answer_is_found_in_its_own_field(answer):
    for fields in ({"answer": answer}, {"caption": 'the "answer": no', "boxes": [[1, 2, 3, 4]], "answer": answer}):
        for text in (json.dumps(fields), "```json\n" + json.dumps(fields, indent=2, ensure_ascii=False) + "\n```"):
            first, last = fields_of(text, "json")["answer"]
            assert json.loads(f'"{text[first:last]}"') == answer
    text = f"<think>the answer is no</think><answer>{answer}</answer>"
    first, last = fields_of(text, "think")["answer"]
    assert text[first:last] == answer
    turned = written(answer="yes", caption="the answer is no")  # an answer in front is not looked for behind
    assert said_of(turned) == ("yes", False)


def test_a_caption_that_names_the_finding_is_part_of_what_is_said():
    assert said_of(written(caption="A film of the chest, upright.", answer="yes")) == ("yes", False)
    text = written(caption="Heart normal. Left effusion; ribs whole.", answer="yes")
    assert said_of(text) == (" Left effusionyes", True)  # and none of the other clauses
    assert said_of(text, "Is the heart enlarged?") == ("Heart normalyes", True)
    assert said_of(written(answer="yes", reasoning="Left effusion.")) == ("yes", False)  # said after the answer
    which = written(caption="Something on the left.", answer="left")  # a word of the answer
    assert said_of(which, "Which side is ill?") == ("Something on the leftleft", True)
    assert said_of("<think>No effusion.</think><answer>no</answer>", style="think") == ("No effusionno", True)
    found = read_statement(range(9), places("0123", 3) * 4 + [(30, 33)], written(answer="yes"), YES_NO["question"])
    assert not any(found.said)  # tokens elsewhere


@pytest.fixture(scope="module")
def vlm():
    return load_vlm("tiny:qwen2vl", quant="none", device="cpu", family="qwen2vl")


@torch.no_grad()
def plain(vlm, image, question, ids):
    """Log-probability of each token of a response, alone."""
    prompts = make_prompts(vlm, [build_prompt(question)], [image])
    return logprobs(vlm, prompts, [[ids]], False, suppress=never_drawn(vlm))[0][0].tolist()


def test_a_statement_is_read_after_the_rollouts_own_tokens(vlm):
    """Sums over the tokens of the answer, the rest of the response as it was written in front of them."""
    image = np.random.default_rng(0).integers(0, 255, (56, 56), dtype=np.uint8)
    text = written(caption="A film.", answer="yes")
    ids = vlm.tokenizer(text)["input_ids"]
    odd = [i for letter in text for i in vlm.tokenizer(letter)["input_ids"]]  # the same text, sampled letter by letter
    assert odd != ids
    statements = [read_statement(some, places_of(vlm, some), text, YES_NO["question"]) for some in (ids, odd)]
    prompts = make_prompts(vlm, [build_prompt(YES_NO["question"])], [image])
    with torch.no_grad():
        found = score_statements(vlm, prompts, [statements]).tolist()
    for (said, whole), statement in zip(found, statements, strict=True):
        each = plain(vlm, image, YES_NO["question"], list(statement.ids))
        answer = [logp for logp, counts in zip(each, statement.said, strict=True) if counts]
        assert said == pytest.approx(sum(answer), abs=1e-3) and whole == pytest.approx(sum(each), abs=1e-3)
    assert sum(statements[1].said) == 3 and abs(found[0][0] - found[1][0]) > 0.01


# --- drops ---


def statement(answer="yes", explained=False, number=0):
    return Statement((answer, number), (True, False), explained)


class Scorer:
    """score() of a model whose answer hangs on the brightness of one place, and that likes `believes`."""

    def __init__(self, boxes, image, believes):
        self.boxes, self.level, self.believes, self.calls, self.images = boxes, self.look(boxes, image), believes, 0, 0

    @staticmethod
    def look(boxes, image):
        return np.mean([image[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes])

    def __call__(self, images, statements):
        self.calls, self.images = self.calls + 1, self.images + len(images)
        seen = [abs(self.look(self.boxes, image) - self.level) for image in images]
        believed = [statement.ids[0] == self.believes for statement in statements]
        said = [-0.1 - change if right else -2.0 + change for change, right in zip(seen, believed, strict=True)]
        return [[logp, 3 * logp] for logp in said]


def test_drops_tell_where_a_policy_looks(film):
    row, image = film
    row = dict(row, question="Is there an effusion?", gold="yes", answer_type="closed")
    plan, nothing = plan_edits(row, image, k=4), EditPlan(why="no gold region")
    score = Scorer(plan.roi, image, "yes")
    texts = [written(answer="yes"), written(answer="no"), "no object", written(answer="yes")]
    statements = [statement("yes"), statement("no"), None, statement("yes"), statement("yes", True), statement("yes")]
    drops = measure_drops(score, statements, [plan] * 5 + [nothing])
    assert score.calls == 1 and score.images == 3 * 6  # three distinct responses, 2 + 4 images each
    expected = abs(Scorer.look(plan.roi, plan.images[1]) - score.level)
    assert drops[0]["d_roi"] == pytest.approx(expected) and drops[0] == drops[3] and len(drops[0]["d_rand_each"]) == 4
    assert drops[1]["d_roi"] == pytest.approx(-expected)
    assert drops[2]["d_roi"] is None and "no answer" in drops[2]["counterfactual_why"]
    assert drops[5]["counterfactual_why"] == "no gold region"
    # of an explained one also the whole response, apart: it has no part in what V is made of
    assert drops[4]["explained"] and drops[4]["d_roi"] == drops[0]["d_roi"] and drops[0]["gap_response"] is None
    assert drops[4]["gap_response"] == pytest.approx(3 * (expected - np.mean(drops[0]["d_rand_each"])))
    terms = score_rollouts([row] * 4, texts, drops=drops[:4])
    assert terms[0]["counterfactual"] > 0.5 and terms[0]["reward"] > 1.1 and terms[1]["counterfactual"] < 0
    (whole,) = score_rollouts([row], texts[:1], drops=drops[4:5])
    assert whole["gap_response"] == drops[4]["gap_response"] and whole["reward"] == terms[0]["reward"]

    elsewhere = Scorer(plan.random[0], image, "yes")  # right, for what stands somewhere else
    (found,) = score_rollouts([row], texts[:1], drops=measure_drops(elsewhere, statements[:1], [plan]))
    assert found["counterfactual"] < 0 and found["reward"] < 1
    sees_both = rollout_terms(
        row, texts[0], d_roi=3.0, d_rand=[0.0, 0.0, 0.8, 0.0]
    )  # one random region covered something else that counts: neither the mean nor a large d_roi hides it
    assert sees_both["counterfactual"] == pytest.approx(0.2) and sees_both["d_rand"] == pytest.approx(0.2)
    no = dict(row, gold="no")
    lend_regions([no], [row])
    plan_of_no = plan_edits(no, image, k=4)
    for boxes, believes, lowest, highest in (
        (plan.roi, "no", -0.1, 0.0),
        (plan_of_no.random[0], "no", -1.0, -0.01),
    ):  # the random regions change nothing, or they do
        (drop,) = measure_drops(Scorer(boxes, image, believes), [statement("no", True)], [plan_of_no])
        (found,) = score_rollouts([no], [written(answer="no")], drops=[drop])
        assert drop["d_roi"] is None and len(drop["d_rand_each"]) == 4 and lowest <= found["counterfactual"] <= highest
        assert drop["gap_response"] is None
    same = measure_drops(lambda images, said: [[-0.3, -1.0]] * len(images), [statement()], [plan])
    (blind,) = score_rollouts([row], texts[:1], drops=same)
    assert blind["counterfactual"] == 0 and blind["reward"] == 1


def test_scores_that_are_no_numbers(film):
    row, image = film
    plan = plan_edits(row, image, k=2)
    for bad in (float("nan"), float("-inf"), None):
        logps = [[-1.0, -1.0], [bad, -1.0], [-1.0, -1.0], [-1.0, -1.0]]
        (found,) = measure_drops(lambda images, said, logps=logps: logps, [statement()], [plan])
        assert found["d_roi"] is None and "not finite" in found["counterfactual_why"]
    with pytest.raises(ValueError, match="3 log-probabilities for 4 images"):
        measure_drops(lambda images, said: [[0.0, 0.0]] * 3, [statement()], [plan])
    assert measure_drops(None, [None], [plan])[0]["d_roi"] is None  # nothing to score: not called
    terms = rollout_terms(YES_NO, written(answer="yes"), d_roi=float("nan"), d_rand=[0.0])
    assert terms["counterfactual"] is None and terms["reward"] == 1 and terms["counterfactual_why"]


def test_padding_an_answer_does_not_raise_v():
    """
    A policy that looks elsewhere says its answer once, or six times: all but the first are nearly certain whatever the
    film. Their mean per token, a sixth of the drop, would make V -0.1 in place of -0.6.
    """
    plan = EditPlan(images=[0, 1, 2], roi=[[0, 0, 1, 1]], random=[[[1, 1, 2, 2]]])
    by_image = {0: -0.1, 1: -0.1, 2: -0.7}  # the random region takes its clue away
    found = []
    for times in (1, 6):

        def score(images, said, times=times):
            each = [[by_image[image], *[-0.001] * (times - 1)] for image in images]
            return [[sum(logps), sum(logps)] for logps in each]

        (drop,) = measure_drops(score, [statement(number=times)], [plan])
        found.append(rollout_terms(YES_NO, written(answer=" ".join(["yes"] * times)), d_roi=drop["d_roi"],
                                   d_rand=drop["d_rand_each"])["counterfactual"])  # fmt: skip
    assert found == pytest.approx([-0.6, -0.6])
