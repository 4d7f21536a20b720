"""
What a rollout earns: formulas worked out by hand, each term on cases for and against, and the report of why.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from shared.phantom import phantom_study
from shared.runtime import InputError
from shared.phantom.words import NORMAL_MORE, NOUNS, OPPOSITE, PRESENCE_MORE
from vqa_sft_grpo import rewards
from vqa_sft_grpo.looking import nothing_to_take_out
from vqa_sft_grpo.rows import make_rows, phantom_study_rows
from vqa_sft_grpo.prompting import boxes_to_model, build_prompt, build_target, instruction
from vqa_sft_grpo.rewards import AnswerFrequencies, RewardSettings, answer_to_score, explain
from vqa_sft_grpo.rewards import ignored_fields, parse_weights, rollout_terms
from vqa_sft_grpo.text_worth import padding_term, truth

YES_NO = {
    "id": "a",
    "question": "Is there a pleural effusion?",
    "gold": "yes",
    "answer_type": "closed",
    "region": [[20, 40, 60, 80]],
    "width": 100,
    "height": 100,
}
SIDE = {"id": "b", "question": "Is the nodule on the left or the right?", "gold": "left", "answer_type": "closed"}
OPEN = {
    "id": "c",
    "question": "What abnormality is seen in the left lower zone?",
    "gold": "pleural effusion",
    "answer_type": "open",
}


ZONE = {"question": "In which zone is the nodule: upper, mid or lower?", "gold": "lower", "answer_type": "closed"}
NORMAL = {"question": "Is this film normal?", "gold": "yes", "answer_type": "closed"}
LESION = {"question": "Is there a lung nodule or mass?", "gold": "yes", "answer_type": "closed"}
FREE = {"question": "Is this film free of consolidation?", "gold": "yes", "answer_type": "closed"}
SIZE = {"question": "How large is the pleural effusion?", "gold": "small", "answer_type": "open"}
LEFT_PNEUMOTHORAX = dict(YES_NO, question="Is there a pneumothorax in the left lung?")
PLACE = {"question": "Where is the mass?", "gold": "left lung", "answer_type": "open"}
MODALITY = {"question": "What modality is this?", "gold": "MRI", "answer_type": "open"}
LIVER = {"question": "Is the liver normal?", "gold": "yes", "answer_type": "closed"}
ORGAN = {"question": "Which organ is abnormal?", "gold": "liver", "answer_type": "open"}


def written(**fields):
    return json.dumps(fields)


def earned(row, settings=None, drops=(None, None), frequencies=None, tokens=None, **fields):
    return rollout_terms(row, written(**fields), settings or RewardSettings(), frequencies, *drops, tokens)


# --- composition ---


def test_gated_by_hand():
    boxes = boxes_to_model([[20, 40, 60, 60]], 100, 100)  # half of the gold box: IoU 0.5
    right = earned(YES_NO, drops=(0.9, [0.1, 0.2]), boxes=boxes, answer="yes")  # V = 0.9 - 0.2, the larger
    assert right["reward"] == pytest.approx(1 * (1 + 0.3 * 0.7) + 0.25 * 0.5)
    assert (right["format"], right["answer"], right["consistency"], right["counterfactual"]) == (
        1.0,
        1.0,
        0.5,
        pytest.approx(0.7),
    )
    assert earned(YES_NO, drops=(0.1, [0.5]), boxes=boxes, answer="yes")["reward"] == pytest.approx(
        1 + 0.25 * 0.5 - 0.3 * 0.4
    )
    assert earned(YES_NO, drops=(0.9, [0.2]), boxes=boxes, answer="no")["reward"] == pytest.approx(
        0.25 * 0.5
    )  # looking is no income
    assert earned(YES_NO, drops=(0.1, [0.5]), boxes=boxes, answer="no")["reward"] == pytest.approx(
        0.25 * 0.5 - 0.3 * 0.4
    )
    assert earned(YES_NO, drops=(9.0, [0.0]), answer="yes")["reward"] == pytest.approx(
        1.3
    )  # V is at most 1, no box earns 0
    assert earned(YES_NO, drops=(-9.0, [0.0]), answer="no")["reward"] == pytest.approx(-0.3)
    assert earned(YES_NO, answer="yes", reasoning="No pleural effusion.")["reward"] == pytest.approx(1 - 0.2)
    assert earned(YES_NO, answer="yes", caption=YES_NO["question"])["reward"] == pytest.approx(1 - 0.2)
    closed = earned(YES_NO, drops=(-9.0, [0.0]), answer="yes", boxes=boxes, extra=1)
    assert closed["gate"] == 0 and closed["reward"] == 0  # neither income nor V behind a closed gate
    assert earned(YES_NO, answer="yes", extra=1, caption=YES_NO["question"])["reward"] == pytest.approx(-0.2)


def test_additive_by_hand():
    settings = RewardSettings("additive")
    boxes = boxes_to_model([[20, 40, 60, 60]], 100, 100)
    assert earned(YES_NO, settings, (0.9, [0.2]), boxes=boxes, answer="yes")["reward"] == pytest.approx(
        0.2 + 0.4 + 0.2 * 0.5 + 0.2 * 0.7
    )
    assert earned(YES_NO, settings, (0.9, [0.2]), boxes=boxes, answer="no")["reward"] == pytest.approx(
        0.2 + 0.2 * 0.5 + 0.2 * 0.7
    )
    assert earned(YES_NO, settings, reasoning="No pleural effusion.", answer="yes")["reward"] == pytest.approx(
        0.2 + 0.4 - 0.2
    )
    assert rollout_terms(YES_NO, "yes", settings)["reward"] == pytest.approx(0.4)  # no gate: a bare answer is paid
    assert earned(YES_NO, RewardSettings("additive", "1,0,0,0"), answer="no")["reward"] == 1.0


def test_weights_scale_their_own_terms():
    case = dict(
        row=YES_NO,
        drops=(0.9, [0.2]),
        boxes=boxes_to_model([[20, 40, 60, 60]], 100, 100),
        answer="yes",
        caption=YES_NO["question"],
    )
    assert earned(settings=RewardSettings(weights="0.4,0.4,0.2,0.2"), **case)["reward"] == pytest.approx(
        1.21 + 0.125 - 0.4
    )
    assert earned(settings=RewardSettings(weights="0.2,0.2,0.2,0.2"), **case)["reward"] == pytest.approx(
        0.605 + 0.125 - 0.2
    )
    assert earned(settings=RewardSettings(weights="0.2,0.4,0.4,0.2"), **case)["reward"] == pytest.approx(
        1.21 + 0.25 - 0.2
    )
    assert earned(settings=RewardSettings(weights="0.2,0.4,0.2,0"), **case)["reward"] == pytest.approx(
        1.0 + 0.125 - 0.2
    )
    assert earned(settings=RewardSettings(weights="0,0.8,0,0"), **case)["reward"] == pytest.approx(2.0)


def test_cap_hides_no_deduction():
    frequencies = AnswerFrequencies([dict(OPEN, gold="x-ray")] * 40 + [OPEN])
    target = dict(OPEN, region=[[20, 40, 60, 80]], width=100, height=100)
    best = earned(
        target,
        None,
        (1.0, [0.0]),
        frequencies,
        boxes=boxes_to_model([[20, 40, 60, 80]], 100, 100),
        answer="pleural effusion",
    )
    assert best["class_weight"] == 2.0 and best["reward"] == pytest.approx(1.5 + 0.25)
    assert earned(target, None, (1.0, [0.0]), frequencies, answer="pleural effusion")["reward"] == pytest.approx(1.5)
    assert earned(target, None, (0.0, [1.0]), frequencies, answer="pleural effusion", tokens=256)[
        "reward"
    ] == pytest.approx(1.5 - 0.3 - 0.2)


@pytest.mark.parametrize(
    "weights", ["0.2,0.4,0.2", "a,b,c,d", "0.2,0.4,0.2,-1", "0,0,0,0", "nan,1,1,1", "inf,1,1,1", None, 3]
)
def test_wrong_weights(weights):
    with pytest.raises(InputError, match="four numbers"):
        parse_weights(weights)


def test_settings():
    assert parse_weights(" 0.2, 0.4,0.2,0.2") == rewards.DEFAULT_WEIGHTS == RewardSettings().weights
    with pytest.raises(InputError, match="gated and additive"):
        RewardSettings("product")
    with pytest.raises(InputError, match="style"):
        RewardSettings(style="xml")


# --- rows of older files ---


def test_older_rows():
    old = {"image_path": "x.png", "question": OPEN["question"], "gold": "pleural effusion"}
    terms = rollout_terms(old, written(answer="pleural effusion"))
    assert terms["reward"] == 1.0 and terms["kind"] == "open"
    assert terms["box"] is terms["consistency"] is terms["counterfactual"] is None
    assert rollout_terms(dict(old, gold="No", question="Is it big?"), written(answer="no"))["kind"] == "yes/no"
    assert rollout_terms(dict(old, gold="left", question=SIDE["question"]), written(answer="left"))["kind"] == "choice"
    scored = old | {"delta_cf_roi": 0.9, "delta_cf_rand": 0.1, "valid_json": True, "answer_correct": True}
    assert rollout_terms(scored, written(answer="pleural effusion")) == terms
    note = ignored_fields([old, scored, scored])
    assert (
        all(f"{name} (2 rows)" in note for name in ("delta_cf_roi", "delta_cf_rand", "valid_json", "answer_correct"))
        and "ignored" in note
    )
    assert ignored_fields([old, YES_NO]) == ""


# --- frequency ---


def test_frequencies_by_hand():
    def asked(answer, n, **more):
        return [dict(YES_NO, gold=answer, split="train") | more] * n

    frequencies = AnswerFrequencies(
        asked("yes", 2) + asked("No", 7) + asked("yes", 99, split="val") + asked("yes", 99, split="test")
    )
    assert frequencies.weight(dict(YES_NO, gold="yes")) == pytest.approx((9 + 2) / (2 * 3))
    assert frequencies.weight(dict(YES_NO, gold="no")) == pytest.approx((9 + 2) / (2 * 8))
    assert frequencies.weight(SIDE) == 1.0  # no such question in training
    assert AnswerFrequencies(asked("yes", 1) + asked("no", 500)).weight(YES_NO) == 2.0
    choices = AnswerFrequencies([dict(SIDE, gold="left")] * 100)
    assert choices.weight(SIDE) == pytest.approx(102 / (2 * 101)) and choices.weight(dict(SIDE, gold="right")) == 2.0
    opened = AnswerFrequencies(
        [dict(OPEN, gold=f"finding {i % 20}") for i in range(20)] + [dict(OPEN, gold="x-ray")] * 60
    )
    assert opened.weight(dict(OPEN, gold="x-ray")) == 0.5 and opened.weight(dict(OPEN, gold="never seen")) == 2.0
    assert earned(YES_NO, frequencies=frequencies, answer="yes")["answer"] == pytest.approx(11 / 6)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.99])
def test_constant_answer_earns_a_half_at_most(share):
    rows = [dict(YES_NO, gold="no" if i < 1000 * share else "yes") for i in range(1000)]
    frequencies = AnswerFrequencies(rows)
    weights = np.array([frequencies.weight(row) for row in rows])
    right = np.array([row["gold"] == "no" for row in rows])
    assert (weights * right).mean() < 0.505
    assert weights.mean() - (weights * right).mean() > min(0.4, 1.5 * (1 - share))  # what seeing would add


# --- gate ---


@pytest.mark.parametrize(
    "text, why",
    [
        (written(answer="yes"), ""),
        ("```json\n" + written(answer="yes") + "\n```", ""),
        (written(caption="Film.", reasoning="Seen.", boxes=[[1, 2, 3, 4]], answer="yes"), ""),
        ("", "no answer"),
        ("yes", "strict"),
        ("The answer is " + written(answer="yes"), "other text"),
        (written(answer="yes") * 2, "other text"),
        (written(answer="yes", confidence=1), "unknown field"),
        (written(caption="Film."), "no answer"),
        (written(answer=["yes", "no"]), "another form"),
        (written(answer=[{"text": "yes"}]), "another form"),
        (written(result=[{"answer": "yes"}]), "another form"),
        ("{'answer': ('yes')}", "strict"),
        (written(Answer="yes"), "another form"),
        (written(answer="yes", boxes=[["1", "2", "3", "4"]]), "boxes"),
        (written(answer="yes", bbox=[1, 2, 3, 4]), "unknown field"),
        (written(answer=True), "text"),
        (written(answer="yes", caption=["Film."]), "text"),
        (written(answer="yes", boxes=[1, 2, 3, 4]), "boxes"),
        (written(answer="yes", boxes=[[1, 2, 3]]), "boxes"),
        (written(answer="yes", boxes="none"), "boxes"),
        ('{"answer": "yes", "answer": "no"}', "two different"),
        ('{"answer": "yes",}', "strict"),
        ('{"answer": "yes"', "strict"),
        (written(answer="yes", caption="<|image_pad|>"), "tokens"),
        (written(answer="yes", caption="<image>"), "tokens"),
        (build_prompt(YES_NO["question"]), ""),
        ("<think>x</think><answer>yes</answer>", "strict"),
        (written(reasoning=["Both angles.", "Blunted on the left."], answer="yes"), ""),
        (written(reasoning=["Both angles.", 1], answer="yes"), "text"),
        (written(answer="yes")[:-1] + ', "answer": "yes"}', "twice"),
        (written(answer="yes")[:-1] + ', "\\u0061nswer": "yes"}', "twice"),
        (written(answer="yes\u200b"), "cannot be seen"),
        (written(answer="yes", caption="Film.\u2060"), "cannot be seen"),
        (written(answer="yes", reasoning=["Film.\u2060"]), "cannot be seen"),
        (written(answer="yes", caption="Film.\x07"), "cannot be seen"),
        (written(answer="yes", caption="A film.\n\tOf a chest."), ""),
        (written(answer="yes", boxes=[[1, 2, 3, 4]] * 100), "100 boxes"),
        (written(answer=written(answer="yes")), "has '\"' in it"),
        (written(answer="**yes**"), "has '*' in it"),
        (written(answer="yes, \u662f"), "in it"),
    ],
)
def test_gate(text, why):
    terms = rollout_terms(YES_NO, text)
    if text == build_prompt(YES_NO["question"]):
        assert terms["gate"] == 0 and terms["reward"] < 0
        return
    assert (terms["gate"] == 1) == (why == "") and why in terms["gate_why"]
    assert (terms["reward"] > 0) == (terms["gate"] == 1)
    assert (answer_to_score(text, row=YES_NO) is not None) == (terms["gate"] == 1)


def test_think_style():
    settings = RewardSettings(style="think")
    terms = rollout_terms(YES_NO, "<think>There is fluid.</think><answer>yes</answer>", settings)
    assert terms["gate"] == 1 and terms["reward"] == 1.0 and terms["box"] is None
    assert (
        rollout_terms(YES_NO, "<think>No pleural effusion.</think><answer>yes</answer>", settings)["contradiction"]
        == -1
    )
    assert rollout_terms(YES_NO, "<answer>yes</answer><answer>no</answer>", settings)["reward"] <= 0
    assert rollout_terms(YES_NO, written(answer="yes"), settings)["gate"] == 0


# --- answer ---


@pytest.mark.parametrize(
    "row, answer, accuracy",
    [
        (YES_NO, "yes", 1),
        (YES_NO, "Yes, a small one.", 1),
        (YES_NO, "no", 0),
        (YES_NO, "yes or no", 0),
        (YES_NO, "yes and no", 0),
        (YES_NO, "possibly yes", 0),
        (YES_NO, "y\u0435s", 0),
        (YES_NO, "not yes", 0),
        (YES_NO, YES_NO["question"], 0),
        (YES_NO, "unclear", 0),
        (YES_NO, "", 0),
        (SIDE, "left", 1),
        (SIDE, "on the left", 1),
        (SIDE, "left or right", 0),
        (SIDE, "left, right", 0),
        (SIDE, "both", 0),
        (SIDE, "not right", 0),
        (SIDE, "probably left", 0),
        (SIDE, "other than right", 0),
        (SIDE, "right, no wait, left", 0),
        (YES_NO, "no, wait, yes", 0),
        (YES_NO, "yes, it cannot be excluded", 0),
        (YES_NO, "There is an effusion. There is no effusion.", 0),
        (OPEN, "pleural effusion", 1),
        (OPEN, "Pleural effusions.", 1),
        (OPEN, "effusion", (2 / 3) ** 2),
        (OPEN, "pleural effusion pleural effusion", (2 / 3) ** 2),
        (OPEN, "no pleural effusion", 0),
        (OPEN, "pleural effusion or nodule", 0),
        (OPEN, "maybe pleural effusion", 0),
        (OPEN, "nodule", 0),
        (OPEN, "pleural effusion, nodule", 0.32),
        (dict(OPEN, gold="left lung"), "right lung", 0),
        (dict(OPEN, gold="mass or nodule"), "mass or nodule", 1),
        (dict(OPEN, gold="possible pneumonia"), "possible pneumonia", 1),
        (dict(OPEN, gold="hyperdense"), "hypodense", 0),
        (dict(OPEN, gold="hyperdense"), "hyperdense and hypodense", 0),
        # hedges, in any kind of answer
        *(
            (row, form.format(row["gold"]), 0)
            for row in (YES_NO, SIDE, OPEN)
            for form in (
                "cannot be determined, {}",
                "{}, impossible to say",
                "I guess {}",
                "apparently {}",
                "if seen then {}",
                "{}, low confidence",
                "{}?",
                "{} ...",
                "{} (not sure)",
                "presumably {}",
                "{}, unless I am wrong",
                "I think {}",
                "it seems {}",
                "more likely {}",
                "{} und nein",
                "{} ou droite",
                "{} cannot be excluded",
            )
        ),
        (YES_NO, "No doubt, yes", 0.85),
        (NORMAL, "The lungs are not clear", 0),
        (dict(NORMAL, gold="no", question="Are the lungs clear?"), "The lungs are not clear", 1),
        (dict(YES_NO, gold="no"), "It can not be seen", 1),
        (dict(OPEN, gold="suspected pneumonia"), "suspected pneumonia", 1),
        # words beside a closed answer
        (dict(YES_NO, gold="no"), "No, the lungs are clear", 1),
        (YES_NO, "Yes, there is a small pleural effusion on the left side", 1),
        (YES_NO, "yes, thanks for asking", 0.7),
        (YES_NO, "yes " + "because of what was said and thought about this picture " * 3, 0),
        (SIDE, "left, as always", 0.85),
        # places
        (dict(OPEN, gold="Left Lung, Right"), "Right Lung, Left", 0),
        (dict(OPEN, gold="Left Lung, Right"), "right, left lung", 1),
        (dict(OPEN, gold="right kidney, left lung"), "left kidney, right lung", 0),
        (dict(OPEN, gold="right kidney, left lung"), "left lung and right kidney", 1),
        (dict(OPEN, gold="left lung, right lung"), "left and right lung", 1),
        (dict(OPEN, gold="bilateral lungs"), "both lungs", 1),
        (dict(OPEN, gold="left lower lung zone"), "left mid lung zone", 0),
        (dict(OPEN, gold="left lower lung zone"), "lower left lung zone", 1),
        (dict(OPEN, gold="bilateral"), "left", 0.5 * 0.25),
    ],
)
def test_accuracy(row, answer, accuracy):
    assert earned(row, answer=answer)["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "gold", ["left lung", "right upper lobe", "left lower lung zone", "mass in the left upper lobe"]
)
def test_a_place_left_out_earns_less_than_a_guess(gold):
    row = dict(OPEN, gold=gold)
    for places in (["left", "right"], ["upper", "mid", "lower"]):
        if not set(places) & set(gold.split()):
            continue
        (right,) = set(places) & set(gold.split())
        guessed = [earned(row, answer=gold.replace(right, place))["accuracy"] for place in places]
        assert earned(row, answer=gold.replace(right + " ", ""))["accuracy"] < 0.9 * np.mean(guessed)
        both = earned(row, answer=gold.replace(right, " and ".join(places)))["accuracy"]
        assert both < np.mean(guessed)


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_listing_earns_less_than_guessing(k):
    candidates = ["nodule", "atelectasis", "consolidation", "pneumothorax", "mass", "edema"][:k]
    listed = [earned(dict(OPEN, gold=gold), answer=", ".join(candidates))["reward"] for gold in candidates]
    assert np.mean(listed) < 1 / k - 0.02


# --- box ---


@pytest.mark.parametrize(
    "boxes, value",
    [
        ([[200, 400, 600, 800]], 1.0),
        ([[200, 400, 600, 600]], 0.5),
        ([[200, 400, 400, 800], [400, 400, 600, 800]], 1.0),
        ([[600, 800, 1000, 1000]], 0.0),
        ([], 0.0),
        ([[0, 0, 1000, 1000]], 0.0),
        ([[100, 100, 900, 950]], 0.0),
        ([[0, 0, 100, 100]], 0.0),
        ([[200, 400, 600, 800], [0, 0, 100, 100]], 0.0),
        ([[1200, 1200, 1400, 1400]], 0.0),
        ([[600, 800, 200, 400]], 0.0),
        ([[200, 400, 600, 800]] * 4, 0.5),
    ],
)
def test_box(boxes, value):
    terms = earned(YES_NO, boxes=boxes, answer="yes")
    assert terms["box"] == pytest.approx(value, abs=0.01)
    assert bool(terms["box_why"]) == (value == 0 or len(boxes) > 2)


def test_box_undefined():
    for row in (SIDE, dict(YES_NO, region=None), dict(YES_NO, width=None), dict(YES_NO, region=[[0, 0, 100, 90]])):
        assert earned(row, boxes=[[200, 400, 600, 800]], answer="yes")["box"] is None


# --- contradiction ---


@pytest.mark.parametrize(
    "row, reasoning, answer, value",
    [
        (YES_NO, "No pleural effusion.", "yes", -1),
        (YES_NO, "There is no effusion.", "yes", -1),
        (YES_NO, "Seen: left pleural effusion.", "no", -1),
        (YES_NO, "Yes.", "no", -1),
        (YES_NO, "No pleural effusion.", "no", 0),
        (YES_NO, "Seen: left pleural effusion.", "yes", 0),
        (YES_NO, "Seen: nodule.", "no", 0),
        (YES_NO, "The heart is large.", "yes", 0),
        (YES_NO, "Pleural effusion, no pneumothorax.", "yes", 0),
        (YES_NO, "", "yes", None),
        (YES_NO, None, "yes", None),
        (LESION, "Seen: nodule in the right upper lung zone.", "yes", 0),
        (LESION, "No lung nodules or masses.", "no", 0),
        (LESION, "No lung nodules or masses.", "yes", -1),
        (LESION, "A lung nodule, no mass.", "yes", 0),
        (NORMAL, "Nothing abnormal.", "yes", 0),
        (NORMAL, "The film is abnormal.", "yes", -1),
        (NORMAL, "Seen: cardiomegaly.", "no", 0),
        (NORMAL, "The film is normal.", "no", -1),
        (FREE, "No consolidation.", "yes", 0),
        (FREE, "Seen: consolidation.", "no", 0),
        (SIDE, "Seen: nodule in the right upper lung zone.", "left", -1),
        (SIDE, "Seen: nodule in the left upper lung zone.", "left", 0),
        (SIDE, "Right effusion and left nodule.", "left", 0),
        (ZONE, "Seen: nodule in the right upper lung zone.", "lower", -1),
        (ZONE, "Seen: nodule in the right lower lung zone.", "lower", 0),
        (ZONE, "It is not upper.", "lower", 0),
        (OPEN, "No pleural effusion.", "pleural effusion", -1),
        (OPEN, "Seen: pleural effusion, no nodule.", "pleural effusion", 0),
        (OPEN, "Fluid along the chest wall.", "pleural effusion", 0),
        (ORGAN, "The spleen is enlarged.", "liver", -1),
        (ORGAN, "The liver is enlarged, the spleen is not.", "liver", 0),
        (ORGAN, "It is enlarged.", "liver", 0),
        (SIZE, "Seen: large pleural effusion.", "small", -1),
        (SIZE, "Seen: small pleural effusion in the large left lung.", "small", 0),
        # agreeing texts
        (LEFT_PNEUMOTHORAX, "There is a pneumothorax in the left lung.", "yes", 0),
        (LEFT_PNEUMOTHORAX, "The pneumothorax that was asked about is absent.", "no", 0),
        (YES_NO, "Looking for effusion: both angles sharp", "no", 0),
        (YES_NO, "No right effusion, but there is a left effusion.", "yes", 0),
        (YES_NO, "No effusion is seen on either side.", "no", 0),
        (YES_NO, "The question is whether there is an effusion. There is none.", "no", 0),
        (PLACE, "Left of the heart there is a mass", "left lung", 0),
        (PLACE, "The right lung is clear. Mass in the left lung.", "left lung", 0),
        (MODALITY, "It is not a CT but an MRI.", "MRI", 0),
        (LIVER, "The liver is enlarged.", "no", 0),
        (NORMAL, "The heart is normal. There is an effusion.", "no", 0),
        (FREE, "There is consolidation in the left lung.", "no", 0),
        # contradictions, yes and no alike
        (YES_NO, "Effusion absent", "yes", -1),
        (YES_NO, "Effusion present", "no", -1),
        (YES_NO, "Effusion. No effusion.", "yes", -1),
        (YES_NO, "Effusion. No effusion.", "no", -1),
        (YES_NO, "It is yes. It is no.", "yes", -1),
        (YES_NO, "Seen: left pleural effusion. So no.", "yes", -1),
        (YES_NO, "No effusion. None of this is true.", "no", -1),
        (YES_NO, "It is not the case that there is an effusion.", "yes", -1),
        (YES_NO, "Another patient had this: a pleural effusion.", "yes", -1),
        (YES_NO, "A pleural effusion. But that was only a joke.", "yes", -1),
        (NORMAL, "Nothing abnormal.", "no", -1),
        (NORMAL, "There is a large effusion.", "yes", -1),
        (LIVER, "The liver is abnormal.", "yes", -1),
        (LIVER, "The liver is normal.", "no", -1),
        (FREE, "Consolidation in the left lung.", "yes", -1),
        (FREE, "No consolidation.", "no", -1),
        (MODALITY, "It is a CT", "MRI", -1),
        (dict(YES_NO, question="Is this a CT?"), "It is an MRI.", "yes", -1),
        (SIDE, "It is left or right.", "left", -1),
        (PLACE, "The mass is in the right lung.", "left lung", -1),
        (PLACE, "It is in the left lung or the liver.", "left lung", -1),
    ],
)
def test_contradiction(row, reasoning, answer, value):
    if value == -1:  # a caption is held against the answer too
        assert earned(row, caption=reasoning, answer=answer)["contradiction"] == -1
    terms = earned(row, reasoning=reasoning, answer=answer) if reasoning is not None else earned(row, answer=answer)
    assert terms["contradiction"] == value, terms["contradiction_why"]
    assert bool(terms["contradiction_why"]) == (value == -1)


# --- truth of caption and reasoning ---

EFFUSION = {"condition": "Pleural Effusion", "kind": "effusion", "side": "left", "zone": "", "size": "small"}
NODULE = {"condition": "Lung Lesion", "kind": "nodule", "side": "right", "zone": "upper", "size": "large"}
TUBE = {"condition": "Support Devices", "kind": "chest tube", "side": "left", "zone": "", "size": "moderate"}
TWO = "Frontal chest x-ray with left pleural effusion and nodule in the right upper lung zone."


@pytest.mark.parametrize(
    "findings, caption, value",
    [
        ([EFFUSION, NODULE], TWO, 1),
        ([EFFUSION, NODULE], "Small left pleural effusion, large nodule in the right upper lung zone. No edema.", 1),
        ([EFFUSION, NODULE], "Left pleural effusion.", 0.5),  # half of the findings
        ([EFFUSION, NODULE], TWO.replace("left", "right"), 0.5 * 0.5 - 0.5),  # one of two statements true
        ([EFFUSION, NODULE], TWO.replace("upper", "lower"), 0.5 * 0.5 - 0.5),
        ([EFFUSION], "Large left pleural effusion.", -1),
        ([EFFUSION], "Effusions on the left and right.", -1),
        ([EFFUSION, dict(EFFUSION, side="right")], "Bilateral pleural effusion.", 1),
        ([EFFUSION], TWO, 0.5 * 1 - 0.5),
        ([EFFUSION], "Left pleural effusion. No pleural effusion.", 0.5 * 1 - 0.5),
        ([EFFUSION], "Frontal chest x-ray without findings.", -1),
        ([EFFUSION], "Left pleural effusion. Nothing abnormal.", 0),
        ([EFFUSION], "No pleural effusion.", -1),
        ([EFFUSION], "No right pleural effusion.", 0),  # true, and says nothing of what is there
        ([EFFUSION], "Possible left pleural effusion.", 0),
        ([EFFUSION], "Presumably a left pleural effusion.", 0),
        ([EFFUSION], "Lung opacity.", -1),
        ([dict(NODULE, condition="Pneumonia", kind="pneumonia")], "Lung opacity.", 1),  # what it implies
        ([EFFUSION], "Chest x-ray.", 0),
        ([EFFUSION], "A picture of great beauty, taken with care.", 0),
        ([EFFUSION], "", 0),
        ([EFFUSION], "CT of the brain of a dog.", -1),
        ([], "Frontal chest x-ray without findings.", 1),
        ([], "No pneumothorax, no effusion.", 0.5),
        ([], "Chest x-ray.", 0),
        ([], TWO, -1),
        ([TUBE], "Left chest tube.", 1),
        ([TUBE], "Endotracheal tube.", -1),
        ([TUBE], "Normal heart and lungs.", 0),  # no finding, but the tube is not named
    ],
)
def test_truth_of_a_caption(findings, caption, value):
    row = dict(YES_NO, findings=findings)
    terms = earned(row, caption=caption, answer="yes")
    assert terms["caption_truth"] == pytest.approx(value) and terms["reasoning_truth"] == 0
    assert terms["text"] == pytest.approx(value / 2)
    added = terms["reward"] - earned(row, answer="yes")["reward"] - 0.2 * (terms["contradiction"] or 0)
    assert added + 0.2 * terms["copying"] == pytest.approx(0.5 * value / 2)
    wrong = earned(row, caption=caption, answer="no")  # with a wrong answer truth earns nothing, and falsehood costs
    assert wrong["reward"] - 0.2 * (wrong["contradiction"] or 0) == pytest.approx(0.5 * min(0, value) / 2)


@pytest.mark.parametrize(
    "row, reasoning, value",
    [
        (YES_NO, "Seen: left pleural effusion.", 1),
        (YES_NO, ["Both angles.", "Left pleural effusion."], 1),
        (YES_NO, "Seen: right pleural effusion.", -1),
        (YES_NO, "Seen: nodule in the right upper lung zone.", 0),  # true, but not what is asked
        (YES_NO, "Seen: left rib fracture.", -1),
        (YES_NO, "No pleural effusion.", -1),
        (YES_NO, "See image.", 0),
        (dict(YES_NO, question="Is there edema?"), "No edema.", 1),
        (dict(YES_NO, question="Is there edema?"), "No fracture.", 0),
        (dict(YES_NO, question="Is there a lung opacity?"), "Seen: nodule in the right upper lung zone.", 1),
        (NORMAL, "Seen: left pleural effusion.", 1),
        (NORMAL, "Nothing abnormal.", -1),
        (dict(OPEN, gold="nodule", question="What is seen in the right upper zone?"), "Seen: nodule.", 1),
        (MODALITY, "Seen: nodule.", 0),  # nothing on the film settles this
        (MODALITY, "Seen: left rib fracture.", -1),
    ],
)
def test_truth_of_a_reasoning(row, reasoning, value):
    terms = earned(dict(row, findings=[EFFUSION, NODULE]), reasoning=reasoning, answer="yes")
    assert terms["reasoning_truth"] == pytest.approx(value)


def test_what_stands_behind_the_answer_did_not_lead_to_it():
    row = dict(YES_NO, findings=[EFFUSION])
    before = earned(row, caption="Left pleural effusion.", answer="yes")
    behind = earned(row, answer="yes", caption="Left pleural effusion.")
    assert (before["text"], behind["text"]) == (0.5, 0) and before["reward"] == behind["reward"] + 0.25


def test_of_other_rows_nothing_is_checked():
    false, true = (earned(YES_NO, caption=text, answer="yes") for text in ("A dog.", "Left pleural effusion."))
    assert false["reward"] == true["reward"] and false["text"] is true["text"] is false["caption_truth"] is None
    lines = explain(YES_NO, written(answer="yes", caption="A dog."), false)
    assert any("nothing is checked" in line for line in lines)


# --- what there is to take out ---


def test_evidence_for_no():
    for texts, answers in (
        ([("Is there {a}?", "", False), *PRESENCE_MORE], {"yes": False, "no": True}),
        ([("Is this film normal?", "", False), *NORMAL_MORE], {"yes": True, "no": False}),
    ):
        for text, _, turned in texts:
            for a, n in NOUNS.values():
                for answer, nothing in answers.items():  # OPPOSITE: the same film, asked the other way round
                    row = {"question": text.format(a=a, n=n), "gold": OPPOSITE[answer] if turned else answer}
                    assert nothing_to_take_out(row) == nothing, row
    assert not nothing_to_take_out(SIDE) and not nothing_to_take_out(dict(OPEN, gold="normal"))


@pytest.mark.realdata
@pytest.mark.parametrize("name, share", [("slake", (0.1, 0.5)), ("vqa_rad", (0.05, 0.2))])
def test_evidence_for_no_in_real_questions(name, share, real_data):
    rows = [row for row in make_rows(name, "all", str(real_data(name).parent), "official")[0]]
    no = [row for row in rows if row["answer"].lower().strip(" .") == "no"]
    there = [row for row in no if not nothing_to_take_out(row)]
    print(f"{name}: {len(there)} of {len(no)} questions with the answer no have their evidence on the image")
    asked = {row["question"] for row in there}
    assert share[0] < len(there) / len(no) < share[1], (len(there), len(no))
    assert all(re.search("normal|healthy|clear|free o|symmet|sharp|patent|no|without", q, re.I) for q in asked), asked
    plain = [row for row in no if re.match("(is|are) there (an?|any) ", row["question"], re.I)]
    assert all(map(nothing_to_take_out, plain)) and len(plain) + len(there) > 9


# --- penalties ---


def test_copying():
    for caption in (
        YES_NO["question"],
        "Is there pleural effusion",
        "A film. Is there a pleural effusion? Yes.",
        re.search('"caption": ([^,]+)', instruction("json"))[1],
    ):
        assert earned(YES_NO, caption=caption, answer="yes")["copying"] == 1, caption
    for caption in (
        "There is a pleural effusion.",
        "There is no pleural effusion.",
        "Frontal chest x-ray with left pleural effusion.",
        "Pleural effusion",
        "",
    ):
        assert earned(YES_NO, caption=caption, answer="yes")["copying"] == 0, caption
    assert rollout_terms(YES_NO, build_prompt(YES_NO["question"]))["copying"] == 1


def test_repetition():
    def share(**fields):
        return earned(OPEN, **fields)["repetition"]

    assert share(answer="effusion effusion effusion effusion") == 1.0
    assert share(answer="pleural effusion") == share(answer="no") == 0
    assert share(caption="The lungs are clear. " * 20, answer="x") > 0.9
    assert (
        share(
            caption=(
                "Frontal chest x-ray with cardiomegaly, left pleural effusion and nodule in the right upper lung zone."
            ),
            answer="x",
        )
        == 0
    )
    assert share(caption="Mass in the left upper lung zone and nodule in the left upper lung zone.", answer="x") == 0
    # 10 words, 8 triples, 4 different: half of them repeat, which is 0.1 above 0.4
    assert share(caption="b c d e b c d e b c", answer="x") == pytest.approx(0.1 / 0.6)


def test_padding():
    plain = written(caption="A film.", answer="yes")
    for text in (plain, plain + "\n", json.dumps(json.loads(plain), indent=4)):
        assert rollout_terms(YES_NO, text)["padding"] == 0, text
    spaced = written(caption="A film." + " " * 50, answer="yes")
    for text in (f"```json\n{plain}\n```", plain + "\n\n", plain + " " * 300, "\t" * 40 + plain, spaced):
        terms = rollout_terms(YES_NO, text)
        assert terms["padding"] == 1 and terms["gate"] == 1 and terms["reward"] == pytest.approx(1 - 0.2), text


def test_length():
    values = [earned(YES_NO, answer="yes", tokens=n)["length"] for n in (1, 128, 160, 192, 256, 400)]
    assert values == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert earned(YES_NO, RewardSettings(max_tokens=64), answer="yes", tokens=48)["length"] == pytest.approx(0.5)
    assert earned(YES_NO, answer="yes", caption=" ".join(f"word{i}" for i in range(300)))["penalty"] == 1.0


# --- what gold and noise earn ---


def gold_terms(row):
    terms = rollout_terms(row, build_target(row))
    return (
        terms["gate"],
        terms["accuracy"],
        terms["penalty"],
        terms["contradiction"] in (0, None),
        terms["box"] in (None, 1.0),
    )


def test_gold_of_the_phantom_earns_everything():
    rows = [row for i in range(120) for row in phantom_study_rows(phantom_study(3, i, 64), "train", Path("x"))]
    bad = [
        (row["question"], row["output"], found) for row in rows if (found := gold_terms(row)) != (1, 1, 0, True, True)
    ]
    assert len(rows) > 500 and not bad, bad[:3]


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("name, folder, least", [("vqa_rad", "vqa_rad", 0.97), ("slake", "slake", 0.99)])
def test_gold_of_real_rows(name, folder, least, real_data):
    rows, _ = make_rows(name, "all", str(real_data(folder).parent))
    found = [gold_terms(row) for row in rows]
    print(name, len(rows), [row["answer"] for row, f in zip(rows, found, strict=True) if f[1] != 1][:20])
    assert all(f[0] == 1 for f in found) and all(f[3] for f in found)
    assert np.mean([f[1] == 1 for f in found]) >= least
    assert np.mean([f[2] == 0 for f in found]) >= 0.999


def test_any_text():
    draw = random.Random(0)
    pieces = [
        *'{}[]",:',
        "yes",
        " no ",
        "left",
        "\u200b",
        "\ud800",
        "NaN",
        '"answer": ',
        '"boxes": ',
        "[[0, 0, 1e999, 1]]",
        "<answer>",
        "\n",
        "or",
        "```",
        "caption",
        "1" * 30,
        "\x00",
    ]
    for _ in range(400):
        text = "".join(draw.choices(pieces, k=draw.randrange(25)))
        if draw.random() < 0.3:
            text = '{"answer": "' + text.replace('"', "") + '"}'
        for row in (YES_NO, SIDE, OPEN):
            terms = rollout_terms(row, text, d_roi=draw.uniform(-5, 5), d_rand=[draw.uniform(-5, 5)])
            assert -1.2 - 1e-9 <= terms["reward"] <= 2.25 + 1e-9
            json.dumps(terms, allow_nan=False)
            assert set(terms) == set(rewards.MEANINGS)


# --- why ---


@pytest.mark.parametrize("composition", ["gated", "additive"])
def test_explanation_adds_up(composition):
    settings = RewardSettings(composition)
    frequencies = AnswerFrequencies([YES_NO] * 3 + [dict(YES_NO, gold="no")])
    boxes = boxes_to_model([[20, 40, 60, 60]], 100, 100)
    for text, drops, words in [
        (
            written(boxes=boxes, answer="yes"),
            (0.9, [0.15, 0.1]),
            ["'yes' is right", "IoU 0.5", "V +0.75", "+0.900", "no caption or reasoning"],
        ),
        (
            written(reasoning="No pleural effusion.", answer="yes"),
            (0.1, [0.4]),
            ["the text says no, the answer yes", "V -0.30", "no box"],
        ),
        (
            written(answer="possibly yes", caption=YES_NO["question"]),
            (None, None),
            ["hedged", "V undefined: not measured", "copied 1"],
        ),
        (
            written(answer="no", boxes=[[0, 0, 1000, 1000]]),
            (0.5, [0.0]),
            ["the opposite", "more than 60% of the image"],
        ),
        ("yes!", (None, None), ["gate 0: not strict"]),
    ]:
        terms = rollout_terms(YES_NO, text, settings, frequencies, *drops)
        lines = explain(YES_NO, text, terms, settings)
        summands = [float(m[1]) for line in lines if (m := re.match(r"  ([+-]\d+\.\d{3}) ", line))]
        assert (
            sum(summands) == pytest.approx(terms["reward"], abs=0.003)
            and f"reward {terms['reward']:+.3f} ({composition})" in lines
        )
        assert all(word in "\n".join(lines) for word in words), (words, lines)
    opened = explain(OPEN, written(answer="effusion"), rollout_terms(OPEN, written(answer="effusion")))
    assert any("right in part, squared F1 0.44" in line for line in opened)


def test_explain_says_why_no_box_counts():
    thought = "<think>I see it.</think><answer>yes</answer>"
    large = [[0, 0, YES_NO["width"], YES_NO["height"]]]
    for row, text, settings, said in (
        (YES_NO, thought, RewardSettings(style="think"), "the think prompt asks for no boxes"),
        (YES_NO | {"region": None}, written(answer="yes"), RewardSettings(), "no gold region"),
        (YES_NO | {"region": large}, written(answer="yes"), RewardSettings(), "a gold region of more than 60% of"),
    ):
        lines = explain(row, text, rollout_terms(row, text, settings), settings)
        assert any(f"box: {said}" in line for line in lines), lines


@pytest.mark.parametrize("text", ["The heart is normal in size.", "Right lung clear.", "Normal lung markings."])
def test_a_normal_part_is_no_normal_film(text):
    effusion = {
        "condition": "Pleural Effusion",
        "kind": "pleural effusion",
        "side": "left",
        "zone": "",
        "size": "small",
    }
    assert truth(text, [effusion], frozenset({"Cardiomegaly"}))[0] >= 0
    assert truth("The lungs are clear.", [effusion])[0] == -1


@pytest.mark.parametrize("answer", ["yes!!!!", "yes . . . .", "yes----"])
def test_rows_of_marks_are_padding(answer):
    assert padding_term(f'{{"answer": "{answer}"}}', [answer]) == 1.0
    assert padding_term('{"boxes": [[[[1, 2, 3, 4]]]], "answer": "yes"}', ["yes..."]) == 0.0
