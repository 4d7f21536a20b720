"""
evaluate.py: measured on scripted answerers whose flip rates are known, and once from end to end with a tiny model.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from plain_forward import plain_logprobs

from shared.metrics.statistics import cases_needed
from shared.models.inputs import continuation
from shared.models.loading import load_vlm
from shared.models.tiny import tiny_folder
from shared.runtime import InputError
from vqa_sft_grpo import evaluate as script
from vqa_sft_grpo.answers import load_images, majority_answers, record_of, scores_of, shuffled_images, telling_cases
from vqa_sft_grpo.asking import Answerer, answer_span, how_to_measure, model_of, pixel_boxes
from vqa_sft_grpo.evaluate import evaluate
from vqa_sft_grpo.glance import glance_table, write_comparison
from vqa_sft_grpo.measures import aurc_row, best_constant_box, risk_coverage, summarise
from vqa_sft_grpo.prompting import boxes_to_model, build_prompt, parse_response

QUESTION = "Is there a bright patch?"
ALSO = "What is the colour of the sky?"


def make_row(number, answer, region=None, image="", answer_type="closed", question=QUESTION, group=None, **more):
    return {
        "id": f"r{number}",
        "dataset": "phantom",
        "split": "test",
        "image": str(image),
        "question": question,
        "answer": answer,
        "answer_type": answer_type,
        "question_type": "yes_no",
        "content_type": "presence",
        "group": group or f"g{number // 2}",
        "region": region,
        "width": 96,
        "height": 80,
        "policy": "by patient",
        "overlap": False,
        "output": json.dumps({"answer": answer}),
        "needs_image": True,
        "instruction": "",
        "input": question,
    } | more


@pytest.fixture
def films(tmp_path):
    """
    24 grey films: half of them with a bright patch of 24 x 20 pixels at a place of its own, which is the region of
    their question.
    """
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        image = rng.integers(60, 90, (80, 96)).astype(np.uint8)
        region = None
        if i % 2 == 0:
            x, y = int(rng.integers(0, 70)), int(rng.integers(0, 58))
            image[y : y + 20, x : x + 24] = 230
            region = [[x, y, x + 24, y + 20]]
        path = tmp_path / f"film{i}.png"
        Image.fromarray(image).save(path)
        rows.append(make_row(i, "yes" if region else "no", region, path))
    return rows


OPTIONS = {
    "prompts": ["json"], "counterfactual_cases": 100, "random_regions": 5, "seed": 0,
    "fills": ["inpaint", "mean", "noise"],
}  # fmt: skip


def measure(respond, rows, train=(), encoder=None, **changes):
    """evaluate() with a scripted model, and all that it returns."""
    images, _ = load_images(rows)
    return evaluate(Scripted(respond), rows, images, list(train), SimpleNamespace(**OPTIONS | changes), encoder)


def boxes_of(bright):
    """bool (H, W) -> the box around what is true, in thousandths, in a list; [] where nothing is."""
    rows, columns = np.nonzero(bright)
    if not len(rows):
        return []
    box = [int(n) for n in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
    return boxes_to_model([box], *bright.shape[::-1])


class Scripted:
    """
    A model in the form evaluate() wants: respond(image or None) -> yes, no or None (says nothing), how sure it is
    (log-probability) and boxes.
    """

    def __init__(self, respond):
        self.respond, self.seen = respond, []

    def generate(self, prompts, images):
        self.seen += [image is None for image in images]
        return [self.text(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def text(self, prompt, image):
        answer, _, boxes = self.respond(image)
        if answer is None:
            return ""
        if prompt.startswith(build_prompt(QUESTION, "json")[:40]) and "JSON" in prompt:
            return json.dumps({"caption": "a film", "boxes": boxes, "answer": answer})
        return f"<think>I look.</think><answer>{answer}</answer>"

    def score(self, prompts, images, texts):
        out = []
        for image, text in zip(images, texts, strict=True):
            answer, sure, _ = self.respond(image)
            said = parse_response(text).answer
            score = None if said is None else -sure if said == answer else -3.0
            out.append({"answer": score, "response": score and score / 2})
        return out


def looks(image):
    """Says yes where it sees a bright patch."""
    if image is None:
        return "no", 0.5, []
    bright = image > 170
    return ("yes", 0.1, boxes_of(bright)) if bright.sum() > 100 else ("no", 0.2, [])


def blind(image):
    return "yes", 0.1, []


class AnyEdit:
    """Changes its answer for every picture that it has not seen at first: sensitive, but not to the region."""

    def __init__(self, images):
        self.known = {image.tobytes() for image in images}

    def __call__(self, image):
        return ("yes", 0.1, []) if image is None or image.tobytes() in self.known else ("no", 0.1, [])


# --- the counterfactual test has known answers here ---


def test_who_looks_at_the_region_has_a_delta_of_one(films):
    metrics, predictions, cases, _, _ = measure(looks, films)
    test = metrics["counterfactual"]["gold"]
    every = test["all_fills"]
    assert 8 <= every["n"] <= 12 and len(cases) == every["n"] == every["necessity_response"]["n"]
    assert (every["flip_roi"], every["flip_random"]) == (1, 0) and every["delta"]["value"] == every["delta"]["low"] == 1
    assert every["delta"]["p"] == pytest.approx(2 / 2 ** len({films[c["row"]]["group"] for c in cases}))
    assert every["necessity"]["value"] == pytest.approx(2.9)  # from -0.1 to -3.0
    assert every["necessity_response"]["value"] == pytest.approx(1.45) and every["correct_to_wrong"]["value"] == 1
    assert test["fills_agree_in_sign"] and {edit["flipped"] for edit in test["identity"].values()} == {0}
    for one in test["by_fill"].values():
        assert one["mcnemar"]["only_a"] == one["n"] and one["mcnemar"]["only_b"] == 0
        assert one["cases_needed"] == cases_needed(1.0, 1.0)
    assert "self" not in metrics["counterfactual"]  # who says no has no box
    told = [t for p in predictions if (t := p["json prompt"]["counterfactual"])]
    assert all(t["delta_cf_roi"] == pytest.approx(2.9) and t["delta_cf_rand"] == pytest.approx(0) for t in told)
    assert {t["stability"] for t in told} == {1}


def test_who_does_not_look_has_a_delta_of_zero(films):
    metrics = measure(blind, films)[0]
    test = metrics["counterfactual"]["gold"]
    every = test["all_fills"]
    assert every["flip_roi"] == every["flip_random"] == every["delta"]["value"] == every["necessity"]["value"] == 0
    assert every["delta"]["p"] == 1 and every["cases_needed"] is None and not test["fills_agree_in_sign"]
    assert metrics["rows"]["json prompt"]["closed"]["value"] == 0.5
    assert metrics["needs_image"]["blank image"]["value"] == metrics["needs_image"]["question only"]["value"] == 0


def test_who_changes_with_every_edit_has_a_delta_of_zero_and_a_high_floor(films):
    test = measure(AnyEdit(load_images(films)[0]), films)[0]["counterfactual"]["gold"]
    assert test["all_fills"]["flip_roi"] == test["all_fills"]["flip_random"] == 1
    assert test["all_fills"]["delta"]["value"] == 0 and {edit["flipped"] for edit in test["identity"].values()} == {1}


def test_silence_after_an_edit_is_unparsed_and_no_flip(films):
    known = {image.tobytes() for image in load_images(films)[0]}

    def falls_silent(image):
        return ("yes" if image is None or image.tobytes() in known else None), 0.1, []

    every = measure(falls_silent, films)[0]["counterfactual"]["gold"]["all_fills"]
    assert every["unparsed_roi"] == every["unparsed_random"] == 1 and every["flip_roi"] == every["delta"]["value"] == 0


def test_own_boxes_are_used_where_gold_is_unknown_and_marked(films):
    metrics = measure(looks, [row | {"region": None} for row in films])[0]
    found = metrics["counterfactual"]
    assert "gold" not in found and found["self"]["all_fills"]["delta"]["value"] == 1
    assert found["not_taken"]["self"]["no box of its own"] == 12
    glance = metrics["glance"]["json"]
    assert (glance["own minus random"]["value"], glance["own minus random"]["n"]) == (1, found["cases"])
    assert "gold minus random" not in glance


def test_cases_are_drawn_by_the_seed_and_capped(films):
    drawn = [[c["row"] for c in measure(looks, films, counterfactual_cases=4, seed=seed)[2]] for seed in (0, 0, 5)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[2]) == 4


def test_pictures_of_cases_without_any_difference_say_so(films):
    images, args = load_images(films)[0], SimpleNamespace(**OPTIONS)
    for respond, said in ((looks, "largest difference: "), (blind, "largest difference (none in any case): ")):
        _, _, cases, records, _ = measure(respond, films)
        strips = telling_cases(cases, films, records, images, args)
        assert strips[0]["text"].startswith(said)
    assert {panel["below"] for panel in strips[0]["panels"][1:]} == {"yes (0.00)"}


# --- at a glance ---


def encode(texts):
    """A sentence encoder that knows one caption and one question; their cosine is 0.45."""
    vectors = {"a film": [1.0, 0.0], QUESTION: [0.45, np.sqrt(1 - 0.45**2)]}
    return np.array([vectors[text] for text in texts])


def test_the_table_holds_both_prompts(films):
    """
    This model looks with the json prompt, where it draws its box beside the patch, and says yes with the other. Its own
    box, taken out, changes nothing; the gold region does.
    """

    class Split(Scripted):
        def text(self, prompt, image):
            return super().text(prompt, image) if "JSON" in prompt else "<think>I guess.</think><answer>yes</answer>"

    def looks_elsewhere(image):
        answer, sure, boxes = looks(image)
        x, y = (0, 0) if boxes and boxes[0][0] > 500 else (700, 700)  # thousandths, far from the patch
        return answer, sure, [[x, y, x + 250, y + 250]] if boxes else []

    images, _ = load_images(films)
    asked = SimpleNamespace(**OPTIONS | {"prompts": ["json", "think"]})
    metrics, predictions, *_ = evaluate(Split(looks_elsewhere), films, images, [], asked, encode)
    found, think = ({k: v["value"] for k, v in metrics["glance"][style].items()} for style in ("json", "think"))
    assert (found["right"], think["right"]) == (1, 0.5)
    assert found["valid form (JSON success)"] == think["valid form (JSON success)"] == 1
    assert (found["response has a box"], think["response has a box"]) == (0.5, 0)
    assert found["box IoU with the gold region"] < 0.01
    assert found["caption-question similarity"] == pytest.approx(0.45)
    assert [found[f"coverage at similarity {t}"] for t in (0.3, 0.4, 0.5, 0.6)] == [1, 1, 0, 0]
    assert found["right at similarity 0.4"] == 1 and "right at similarity 0.5" not in found
    assert think["coverage at similarity 0.3"] == 0  # no caption
    assert found["answer changes without the gold region"] == 1
    assert found["answer changes without its own boxes, same rows"] == 0
    assert found["answer changes without random regions as large as gold"] == 0
    assert found["right, more than with a grey picture"] == 0.5
    assert think["gold minus random"] == 0 and "right, more than with a grey picture" not in think
    header, lines = glance_table(metrics["glance"])
    assert header == ["", "json prompt", "think prompt"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["right"] == ["100.0 [100.0, 100.0]", "50.0 [50.0, 50.0]"]  # a film with a patch in each group
    assert cells["right at similarity 0.4"][1] == "–" and cells["gold minus random"][0].endswith("n = 12")
    assert predictions[0]["json prompt"]["iou"] < 0.1 and predictions[0]["think prompt"]["iou"] is None


# --- films drawn anew ---


def with_redrawn(films, folder):
    """
    The question of each film with a patch gets it without the patch, and (but for the first) without a corner that
    nobody asks about.
    """
    rows = []
    for number, row in enumerate(films):
        if row["region"]:
            image = np.asarray(Image.open(row["image"])).copy()
            other = image.copy()
            other[:4, :4] = 0
            x0, y0, x1, y1 = row["region"][0]
            image[y0:y1, x0:x1] = 75
            for field, pixels in (("redrawn", image), ("redrawn_other", other)):
                if field == "redrawn" or number:
                    row = row | {field: str(folder / f"{field}{number}.png")}
                    Image.fromarray(pixels).save(row[field])
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("respond", "without", "other", "both"), [(looks, 1, 0, 1), (blind, 0, 0, 0), (AnyEdit, 1, 1, 1)]
)
def test_films_drawn_anew_tell_who_sees_the_finding(films, tmp_path, respond, without, other, both):
    rows = with_redrawn(films, tmp_path)
    respond = AnyEdit(load_images(rows)[0]) if respond is AnyEdit else respond
    metrics, predictions, *_ = measure(respond, rows)
    test = metrics["redrawn"]
    assert (test["without"]["value"], test["other"]["value"], test["both_right"]["value"]) == (without, other, both)
    assert test["without"]["n"] == test["both_right"]["n"] == 12 and test["other"]["n"] == test["difference"]["n"] == 11
    assert (test["only_finding"]["n"], test["others_left"]["n"]) == (1, 11)
    assert test["only_finding"]["value"] == test["others_left"]["value"] == both
    assert test["difference"]["value"] == without - other and test["unparsed"] == {"redrawn": 0, "redrawn_other": 0}
    assert predictions[0]["redrawn"]["answer"] and "redrawn_other" not in predictions[0]
    assert "redrawn" not in predictions[1]


def test_no_answer_about_a_film_drawn_anew_is_no_change(films, tmp_path):
    rows = with_redrawn(films, tmp_path)
    Path(rows[0]["redrawn"]).write_bytes(b"no picture")
    test = measure(looks, rows)[0]["redrawn"]
    assert test["without"]["value"] == test["both_right"]["value"] == pytest.approx(11 / 12)
    assert test["unparsed"]["redrawn"] == 1
    assert measure(looks, films)[0]["redrawn"] is None


# --- controls, denominators ---


def test_controls_show_what_the_image_adds(films):
    train = [make_row(100 + i, "no") for i in range(3)] + [make_row(110, "blue", question=ALSO, answer_type="open")]
    metrics, predictions, *_ = measure(looks, films, train, prompts=["json", "think"], counterfactual_cases=0)
    rows = {name: found["accuracy"]["value"] for name, found in metrics["rows"].items()}
    assert rows == {
        "json prompt": 1, "think prompt": 1, "question only": 0.5, "blank image": 0.5,
        "shuffled image": rows["shuffled image"], "majority answer": 0.5,
    }  # fmt: skip
    assert metrics["needs_image"]["blank image"]["value"] == 0.5 and metrics["needs_image"]["blank image"]["low"] > 0
    assert metrics["json"]["json"]["valid"] == metrics["json"]["think"]["valid"] == 1
    boxes = metrics["boxes"]
    assert boxes["box_rate"]["value"] == 0.5 and boxes["iou"]["n"] == 12 and boxes["iou"]["value"] > 0.9
    assert boxes["constant_box"] is None
    assert predictions[0]["json prompt"]["correct"] and predictions[0]["gold"] == "yes"
    assert predictions[0]["majority answer"]["answer"] == "no"


def test_unreadable_images_and_silence_stay_in_the_denominator(films, tmp_path):
    bad = tmp_path / "broken.png"
    bad.write_bytes(b"no picture")
    rows = films + [make_row(99, "yes", [[1, 1, 30, 30]], bad, group="g99")]
    images, errors = load_images(rows)
    assert images[-1] is None and [e["path"] for e in errors] == [str(bad)]
    metrics, predictions, *_ = measure(looks, rows)
    for name, row in metrics["rows"].items():
        assert row["n"] == row["accuracy"]["n"] == 25, name
    assert metrics["rows"]["json prompt"]["accuracy"]["value"] == pytest.approx(24 / 25)
    assert not predictions[-1]["json prompt"]["parsed"] and metrics["boxes"]["iou"]["n"] == 13
    silent = measure(lambda image: (None, 0.0, []), films)[0]
    assert silent["rows"]["json prompt"]["accuracy"]["value"] == 0 and silent["counterfactual"]["cases"] == 0
    assert silent["confidence"]["all rows"]["answer log-probability"]["n_without_value"] == 24


def test_a_shuffled_image_is_of_another_group(films):
    images, _ = load_images(films)
    moved = shuffled_images(films, images, seed=0)
    own = {}
    for row, image in zip(films, images, strict=True):
        own.setdefault(row["group"], []).append(image)
    for row, image in zip(films, moved, strict=True):
        assert not any(image is mine for mine in own[row["group"]])
    assert len({id(image) for image in moved}) == 12  # every group lends one
    assert shuffled_images(films[:2], images[:2], seed=0) is None


def test_majority_is_per_question_then_per_kind():
    train = [make_row(i, a) for i, a in enumerate(["no", "no", "yes"])] + [
        make_row(5, "blue", question=ALSO, answer_type="open"),
        make_row(6, "red", question="Which colour?", answer_type="open"),
        make_row(7, "red", question="Which colour?", answer_type="open"),
    ]
    asked = [
        make_row(10, "yes"),
        make_row(11, "yes", question="Is it new?"),
        make_row(12, "x", question=ALSO.upper(), answer_type="open"),
        make_row(13, "x", question="What else?", answer_type="open"),
    ]
    assert majority_answers(asked, train) == ["no", "no", "blue", "red"]
    assert majority_answers(asked, []) is None


def test_summary_by_hand():
    rows = [
        make_row(0, "yes"),
        make_row(1, "no"),
        make_row(2, "left lung", answer_type="open"),
        make_row(3, "heart", answer_type="open"),
    ]
    image = np.zeros((10, 10), np.uint8)
    texts = ["yes or no", "no", "left left left left", "heart"]
    records = [
        record_of(row, json.dumps({"answer": text}), "json", image) for row, text in zip(rows, texts, strict=True)
    ]
    table = summarise(rows, records)
    value = {name: found["value"] for name, found in table.items() if isinstance(found, dict) and "value" in found}
    assert (value["closed"], table["closed"]["n"]) == (0.5, 2)  # both yes and no is wrong
    assert value["open_exact"] == value["accuracy"] == 0.5 and value["parsed"] == 0.75
    assert value["open_recall"] == pytest.approx((0.5 + 1) / 2)
    assert value["open_precision"] == pytest.approx((0.25 + 1) / 2)
    assert table["llava_med"]["closed"] == 1 and table["medevalkit"]["closed"] == 0.5  # their rules, their numbers
    assert table["llava_med"]["recall"] == pytest.approx((0.8 + 1) / 2)


def test_intervals_draw_whole_groups():
    rows = [make_row(i, "yes", group=f"g{i // 10}") for i in range(200)]
    records = [
        record_of(row, "yes" if (i // 10) % 2 else "no", "json", None) for i, row in enumerate(rows)
    ]  # all rows of a group agree
    clustered = summarise(rows, records)["accuracy"]
    alone = summarise([row | {"group": row["id"]} for row in rows], records)["accuracy"]
    assert clustered["value"] == alone["value"] == 0.5
    assert clustered["high"] - clustered["low"] > 2.5 * (alone["high"] - alone["low"])  # sqrt(10) = 3.2


# --- boxes ---


def test_best_constant_box_is_found_on_training_rows():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        dx, dy = rng.integers(-2, 3, 2)
        rows.append(make_row(i, "yes", [[24 + int(dx), 20 + int(dy), 72 + int(dx), 60 + int(dy)]]))
    x0, y0, x1, y1 = best_constant_box(rows)
    assert abs(x0 * 96 - 24) <= 6 and abs(x1 * 96 - 72) <= 6 and abs(y0 * 80 - 20) <= 5 and abs(y1 * 80 - 60) <= 5
    assert best_constant_box([make_row(0, "yes")]) is None


def test_boxes_of_a_response_are_pixels_in_order():
    found = parse_response('{"boxes": [[500, 0, 0, 1000], [10, 10, 10, 500]], "answer": "yes"}')
    assert pixel_boxes(found, (80, 96)) == [[0, 0, 48, 80]]


# --- confidence ---


def test_risk_coverage_by_hand():
    coverage, risk, aurc = risk_coverage([0.9, 0.8, 0.7, None], [True, False, True, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and risk == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert (
        risk_coverage([1, 1, 1, 1], [True, False, False, True])[2] == 0.5
    )  # ties share their errors: no order, the error rate


def test_aurc_lies_between_perfect_and_no_order():
    rng = np.random.default_rng(0)
    correct = rng.random(300) < 0.7
    row = aurc_row(list(correct + rng.normal(0, 1, 300)), correct, np.arange(300))
    assert row["perfect"] < row["low"] < row["value"] < row["high"] < row["no_order"]


def test_similarity_thresholds_use_all_rows_as_coverage(films):
    found = measure(looks, films, encoder=encode)[0]["confidence"]
    kept = [(r["threshold"], r["n"], r["coverage"], r["accuracy"]) for r in found["thresholds"]]
    assert kept == [(0.3, 24, 1, 1), (0.4, 24, 1, 1), (0.5, 0, 0, None), (0.6, 0, 0, None)]
    assert set(found["counterfactual cases"]) == {
        "answer log-probability", "response log-probability", "caption-question similarity",
        "stability under random edits",
    }  # fmt: skip


# --- the model's own log-probabilities ---


@pytest.fixture(scope="module")
def tiny():
    return load_vlm("tiny:qwen2vl", device="cpu")


def test_scores_are_the_mean_log_probabilities_of_the_answers_tokens(tiny):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (112, 112)).astype(np.uint8) for _ in range(3)]
    images.append(images[0])
    prompts = [build_prompt(q, "json") for q in (QUESTION, "Is it?", ALSO, QUESTION)]
    texts = ['{"caption": "yes yes", "answer": "yes"}', '{"answer": "no effusion"}', "", '{"answer": "left"}']
    scores = Answerer(tiny, batch_size=3).score(prompts, images, texts)
    assert scores[2] == {"answer": None, "response": None}
    for i in (0, 1, 3):  # one at a time, without padding, by the logits of the whole text
        ids, places = continuation(tiny, texts[i])
        with torch.no_grad():
            values, _ = plain_logprobs(tiny, prompts[i], images[i], ids)
        assert scores[i]["response"] == pytest.approx(values.mean().item(), abs=1e-4)
        first, last = answer_span(texts[i])
        chosen = [v for v, (a, b) in zip(values.tolist(), places, strict=True) if a < last and b > first]
        assert scores[i]["answer"] == pytest.approx(np.mean(chosen), abs=1e-4)
    other = Answerer(tiny, 4).score([prompts[0]], [images[1]], [texts[0]])[0]
    assert abs(scores[0]["answer"] - other["answer"]) > 1e-3  # the image counts


def test_answers_keep_their_order_in_batches_and_without_image(tiny):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (60 + 20 * i, 90)).astype(np.uint8) for i in range(5)]
    prompts = [build_prompt(QUESTION + " Really?" * i, "think") for i in range(5)]
    together, alone = (Answerer(tiny, batch_size=n, max_new_tokens=6).generate(prompts, images) for n in (3, 1))
    assert together == alone
    assert len(Answerer(tiny, 2, 4).generate(prompts, [None] * 5)) == 5


def test_a_batch_that_does_not_fit_is_halved(tiny, capsys):
    answerer, seen = Answerer(tiny, batch_size=8), []

    def work(rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        seen.append(rows)
        return [10 * r for r in rows]

    assert answerer.longest_first(work, list(range(5)), [1, 5, 3, 2, 4]) == [0, 10, 20, 30, 40]
    assert seen == [[1, 4], [2, 3], [0]] and answerer.size.now == 2


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ('{"caption": "no effusion", "answer": "no"}', "no"),
        ("<think>yes it is</think><answer>yes</answer>", "yes"),
        ("maybe left", "maybe left"),
        ("{{{", "{{{"),
    ],
)
def test_answer_span(text, span):
    first, last = answer_span(text)
    assert text[first:last] == span and (first > text.find("answer") or "answer" not in text)


# --- the script ---


@pytest.fixture
def rows_file(films, tmp_path):
    train = [dict(films[i], id=f"t{i}", split="train", group=f"t{i}") for i in range(6)]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in films + train))
    return path


@pytest.fixture
def scripted_model(monkeypatch, tiny):
    """The script with a scripted answerer in place of the model's answers."""
    monkeypatch.setattr(script, "Answerer", lambda *a: Scripted(looks))
    monkeypatch.setattr(script, "load_model", lambda args, device: tiny)


def run(rows_file, *more, out="run", cases=0, model=("--model", "tiny")):
    """The script with a scripted model -> (metrics, report)."""
    script.main(
        ["--data", str(rows_file), *model, "--out-dir", out, "--device", "cpu", "--counterfactual-cases", str(cases)]
        + [str(a) for a in more]
    )
    return json.loads(Path(out, "metrics.json").read_text()), Path(out, "report.md").read_text()


def test_script_on_a_file_of_rows(rows_file, scripted_model, capsys):
    metrics, report = run(rows_file, "--seed", 3, cases=6)
    assert (metrics["n"], metrics["counterfactual"]["cases"], metrics["seed"]) == (24, 6, 3)
    assert metrics["dataset"]["train_rows"] == 6 and metrics["overlap"] is False
    assert metrics["boxes"]["constant_box"] and metrics["boxes"]["iou_over_constant_box"]["value"] > 0
    assert metrics["sentence_encoder"] == "tiny:bert"
    assert any("sentence encoder tiny:bert has random weights" in warning for warning in metrics["warnings"])
    lines = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and sum(line["json prompt"]["counterfactual"] is not None for line in lines) == 6
    page = Path("run/report.html").read_text()
    assert (
        "Answers change more often without the gold region than without random regions of its size, with every fill."
        in report
    )
    assert "random weights" in report and "PHANTOM" in report and "figures/strip.png" in report
    assert "| gold minus random | 100.0 [100.0, 100.0], n = 6 | 100.0 [100.0, 100.0], n = 6 |" in report
    assert "| response has a box | 50.0" in capsys.readouterr().out
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.(?!data:)", page)  # nothing is loaded from elsewhere
    with Image.open("run/figures/strip.png") as picture:
        assert picture.width > 4 * 25  # inches


def test_films_drawn_anew_are_in_the_report(films, rows_file, scripted_model, tmp_path):
    lines = rows_file.read_text().splitlines()
    rows_file.write_text("\n".join([*map(json.dumps, with_redrawn(films, tmp_path)), *lines[24:]]))
    _, report = run(rows_file, "--prompts", "json")
    assert "| right about both films: yes with it, no without it | 100.0 [100.0, 100.0] | 12 |" in report
    assert "figures/redrawn.png" in report
    with Image.open("run/figures/redrawn.png") as picture:
        assert min(picture.size) > 3 * 25  # inches: two films, three pictures each


def test_a_model_taught_on_grey_pictures_is_marked(rows_file, scripted_model):
    Path("model").mkdir()
    for rows, marked in ((0, False), (7, True)):
        Path("model/training.json").write_text(json.dumps({"dataset": {"policy": "by patient", "blank_rows": rows}}))
        _, report = run(rows_file, "--prompts", "json", out=f"run{rows}", model=("--sft-ckpt", "model"))
        assert ("This model was shown 7 grey pictures in training" in report) == marked


def test_a_control_that_cannot_be_read_shows_nothing(rows_file, scripted_model, monkeypatch, capsys):
    """Silent where the picture is grey: all 24 answers to it are wrong, and nothing is learned about the image."""

    class Silent(Scripted):
        def text(self, prompt, image):
            return "" if image is not None and np.ptp(image) == 0 else super().text(prompt, image)

    monkeypatch.setattr(script, "Answerer", lambda *a: Silent(looks))
    Path("model").mkdir()
    Path("model/training.json").write_text(json.dumps({"dataset": {"policy": "by patient", "blank_rows": 7}}))
    metrics, report = run(rows_file, "--prompts", "json", model=("--sft-ckpt", "model"))
    said = "Unreadable controls: blank image (100.0 % of the answers); an answer that cannot be read counts as wrong"
    assert list(metrics["unreadable_controls"]) == ["blank image"]
    assert f"**{said}" in report and f"*** {said}" in capsys.readouterr().out
    assert "| blank image, unreadable |" in report and "was taught" not in report
    glance = metrics["glance"]["json"]
    assert "right, more than with a grey picture" not in glance
    assert glance["right, more than with the image of another group"]["value"] > 0


def test_the_think_prompt_alone_has_no_boxes(rows_file, scripted_model):
    metrics, report = run(rows_file, "--prompts", "think", "--limit", 10, cases=2)
    assert metrics["boxes"] is None and metrics["main_prompt"] == "think" and metrics["n"] == 10
    assert metrics["rows"]["think prompt"]["accuracy"]["value"] == 1
    assert metrics["confidence"]["rows_with_caption"] == 0 and "## Boxes" not in report


def test_export_for_grpo(rows_file, scripted_model, refused, capsys):
    out = refused(script.main, ["--data", rows_file, "--model", "tiny", "--export-grpo", "g.jsonl", "--out-dir", "x"])
    assert "--split train or val" in out
    run(rows_file, "--split", "train", "--export-grpo", "made/g.jsonl", cases=100)
    rows = [json.loads(line) for line in Path("made/g.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {(r["valid_json"], r["answer_correct"], r["caption"]) for r in rows} == {
        (True, True, "a film")
    }
    assert {"image_path", "question", "gold", "region", "group"} <= rows[0].keys()
    again = ["--data", rows_file, "--split", "train", "--model", "tiny", "--export-grpo", "made/g.jsonl"]
    assert "is there already" in refused(script.main, again)  # before any answer
    assert "is there already" in refused(script.main, [*again[:-1], "made", "--overwrite"])
    tested = [row for row in rows if row["delta_cf_roi"] is not None]
    assert tested and {row["gold"] for row in tested} == {"yes"}
    assert [row["delta_cf_roi"] for row in tested] == pytest.approx([2.9] * len(tested))
    assert [row["delta_cf_rand"] for row in tested] == pytest.approx([0] * len(tested))


def test_overlap_is_stamped(films, rows_file, scripted_model):
    rows_file.write_text("\n".join(json.dumps(row | {"policy": "official", "overlap": True}) for row in films))
    metrics, report = run(rows_file)
    assert metrics["overlap"] is True and metrics["policy"] == "official"
    assert any("OVERLAP" in w for w in metrics["warnings"]) and "**OVERLAP" in report
    assert "No case could be tested." in report


def test_given_regions_are_tested(films, rows_file, scripted_model):
    """Rows without regions of their own: the user's boxes on two films are what the test takes out."""
    rows_file.write_text("\n".join(json.dumps(row | {"region": None}) for row in films))
    lines = [f"{row['image']},{','.join(map(str, row['region'][0]))}\n" for row in films[:4] if row["region"]]
    Path("mine.csv").write_text("image,x0,y0,x1,y1\n" + "".join(lines))
    metrics, _ = run(rows_file, "--regions", "mine.csv", cases=100)
    assert metrics["dataset"]["with_given_region"] == metrics["counterfactual"]["gold"]["all_fills"]["n"] == 2


def test_the_default_encoder_may_be_out_of_reach(rows_file, monkeypatch, tiny, refused, capsys):
    def absent(name, device):
        raise InputError(f"{name} cannot be had: fetch it and give --model FOLDER; or add --model tiny")

    monkeypatch.setattr(script, "Answerer", lambda *a: Scripted(looks))
    monkeypatch.setattr(script, "load_model", lambda args, device: replace(tiny, tiny=False))
    monkeypatch.setattr(script, "SentenceEncoder", absent)
    metrics, report = run(rows_file)
    said = "sentence-transformers/all-MiniLM-L6-v2 cannot be had); give --sentence-encoder FOLDER, or tiny:bert"
    assert metrics["sentence_encoder"] is None and said in metrics["no_sentence_encoder"] and said in report
    assert "--model" not in metrics["no_sentence_encoder"]
    assert said in capsys.readouterr().out and "coverage at similarity 0.3" not in report
    assert "--sentence-encoder: mine cannot be had; give --sentence-encoder FOLDER, or tiny:bert" in refused(
        script.main, ["--data", rows_file, "--model", "tiny", "--sentence-encoder", "mine", "--out-dir", "x"]
    )


def test_a_folder_without_a_model_is_named(rows_file, tmp_path, refused):
    (tmp_path / "run" / "best").mkdir(parents=True)
    said = refused(script.main, ["--data", rows_file, "--sft-ckpt", "run", "--out-dir", "x"])
    assert "run is neither an adapter nor a model" in said and "the model of that run is run/best" in said


def test_an_adapter_of_a_tiny_model_is_tiny(tmp_path):
    for base, model in ((tiny_folder("tiny:qwen2vl"), "tiny:qwen2vl"), ("some/qwen2vl-2b", "some/qwen2vl-2b")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        assert model_of(None, str(tmp_path)) == (model, str(tmp_path))


def test_rows_without_test_rows_are_measured_on_validation():
    facts = {"name": "mine.json", "source": "mine.json", "test_file": None}
    assert "validation rows with\n" in how_to_measure("best", facts, ["json"])
    assert how_to_measure("best", facts, ["json"]).endswith("--data mine.json --split val --prompts json")
    for more in ({"name": "slake"}, {"test_file": "mine.json"}):
        assert "--split" not in how_to_measure("best", facts | more, ["json"])


# --- two runs ---


def test_differences_are_shown_by_the_adjusted_p_values(tmp_path):
    """Five groups, all in one direction: the interval is above 0, and p cannot fall below 1 in 16."""
    change = {"value": 0.25, "low": 0.2, "high": 0.4, "n": 20, "p": 0.06, "p_holm": 0.6}
    of_run = {"dataset": {"name": "d"}, "split": "test", "n": 20, "adapter": None, "model": "m"}
    runs, named = [of_run | {"clusters": {"num_groups": 5}}] * 2, {"value": 0.5, "low": 0.4, "high": 0.6, "n": 20}
    for p, said in ((0.6, "More in B: nothing. Less"), (0.03, "More in B: right; right, closed. Less")):
        both = {"a": named, "b": named, "difference": change | {"p_holm": p}}
        printed = write_comparison(tmp_path, runs, {"json": {"right": both, "right, closed": both}}, [])
        assert said in printed and "There are only 5 image groups" in printed


@pytest.mark.slow
def test_two_runs_side_by_side(rows_file, monkeypatch, tiny, refused, capsys):
    """The base model says yes to everything, the trained one looks: paired differences by hand, and bad pairs."""
    monkeypatch.setattr(script, "load_model", lambda args, device: tiny)
    for name, respond in (("base", blind), ("trained", looks)):
        monkeypatch.setattr(script, "Answerer", lambda *a: Scripted(respond))  # noqa: B023, called at once
        run(rows_file, "--prompts", "json", out=name, cases=6)
    capsys.readouterr()
    script.main(["--compare", "base", "trained", "--out-dir", "both"])
    printed, report = capsys.readouterr().out, Path("both/report.md").read_text()
    found = json.loads(Path("both/metrics.json").read_text())["compared"]["json"]
    right = found["right"]
    assert (right["a"]["value"], right["b"]["value"], right["difference"]["value"]) == (0.5, 1, 0.5)
    assert right["difference"]["n"] == 24 and right["difference"]["low"] > 0
    assert right["difference"]["p"] == pytest.approx(2 / 2**12)  # twelve groups, all in one direction
    assert found["gold minus random"]["difference"]["value"] == 1
    assert found["right, more than with a grey picture"]["difference"]["value"] == 0.5
    assert "| right | 50.0" in printed and "More in B: right; right, closed;" in report and "PHANTOM" in report
    assert "Less in B: nothing" in report
    script.main(["--compare", "trained", "trained", "--out-dir", "same"])
    same = json.loads(Path("same/metrics.json").read_text())["compared"]["json"]
    assert {f["difference"]["value"] for f in same.values()} <= {0, None}
    few = "There are only 12 image groups, so few that the intervals are too short: go by the p values."
    assert few in report and f"p after Holm is above 0.05. {few}" in report
    run(rows_file, "--prompts", "json", "--limit", 10, out="few")
    assert "about different rows (24 and 10)" in refused(script.main, ["--compare", "base", "few"])
    assert "is no run folder of evaluate.py" in refused(script.main, ["--compare", "base", "nowhere"])
    run(rows_file, "--prompts", "think", out="other")
    assert "no prompt in common" in refused(script.main, ["--compare", "base", "other"])


def test_bad_arguments_and_files_are_refused(refused, tmp_path):
    assert "--allow-overlap" in refused(script.main, ["--policy", "official"])
    assert "no such file or data set" in refused(script.main, ["--data", "mnist"])
    assert "at least 5" in refused(script.main, ["--random-regions", "2"])
    assert "at least two" in refused(script.main, ["--fills", "mean"])
    (tmp_path / "empty.json").write_text("")
    assert "no rows" in refused(script.main, ["--data", tmp_path / "empty.json", "--model", "tiny"])


def test_dry_run_of_everything(capsys):
    """An untrained model: hardly an answer can be read, and the report has to live with that."""
    script.main(["--dry-run", "--studies", "2", "--limit", "4", "--out-dir", "run"])
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (
        metrics["n"] == metrics["rows"]["json prompt"]["n"] == 4 and metrics["tiny"] and metrics["dataset"]["phantom"]
    )
    assert sum(metrics["json"]["json"]["levels"].values()) == 4 and Path("run/report.html").stat().st_size > 10_000
    assert "The tiny model is untrained" in Path("run/report.md").read_text()


@pytest.mark.realdata
def test_real_vqa_rad_rows_and_their_question_only_baseline(real_data):
    """The most frequent answer per question, from the training rows of the official split, is a known number."""
    folder = real_data("vqa_rad").parent
    asked = {"data": "vqa_rad", "split": "test", "policy": "official", "seed": 0, "data_dir": str(folder)}
    args = SimpleNamespace(**asked, studies=None, limit=None, regions=None)
    rows, train_rows, facts = script.load_rows(args)
    assert len(rows) == 451 and len(train_rows) > 2500 and facts["overlap"] and not any(row["region"] for row in rows)
    majority = majority_answers(rows, train_rows)
    right = [scores_of(row, answer)["correct"] for row, answer in zip(rows, majority, strict=True)]
    closed = np.mean([r for r, row in zip(right, rows, strict=True) if row["answer_type"] == "closed"])
    assert 0.45 < closed < 0.60


def test_responses_with_other_ends_of_lines_can_be_compared(tmp_path, refused):
    from vqa_sft_grpo.glance import read_run

    (tmp_path / "metrics.json").write_text('{"glance": {}}')
    (tmp_path / "predictions.jsonl").write_text('{"response": "a\u2028b\x85c"}\n{"response": "d"}\n', "utf-8")
    assert len(read_run(tmp_path)[1]) == 2
    (tmp_path / "predictions.jsonl").write_text('{"response": "a', "utf-8")
    with pytest.raises(InputError, match="is damaged"):
        read_run(tmp_path)
