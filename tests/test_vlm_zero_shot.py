"""vlm_zero_shot.py: what is asked, what is read, and that its numbers are those of the engine."""

import csv
import json

import numpy as np
import pytest
import torch

from shared.models.inputs import preprocess_images
from shared.models.loading import load_vlm
from shared.models.passes import PartSize, make_prompts, margin
from shared.phantom import phantom_study
from task1_classification.vlm_data import load_films
from task1_classification.vlm_model import load_encoder
from task1_classification.vlm_zero_shot import NORMAL, QUESTIONS, Statements, ask_vlm, content_free, main, parse_answer
from task1_classification.vlm_zero_shot import facts_of, question, statements

ANSWERS = {
    1: "1|**1**|Answer: 1|Yes.|yes, a small one on the left|The answer is yes|It is present|'1'|1.|Final answer: 1|YES",
    0: "0|**0**|Answer: 0|No.|no, there is no effusion|There is no effusion.|It is absent|[0]|false|I see no",
    None: "|10|1 or 0|yes or no|I am not sure|0.5|the heart|yes/no|2|There is no way to tell|it is not present?|01|???",
}


@pytest.mark.parametrize("expected", ANSWERS)
def test_an_answer_is_read_or_nothing(expected):
    for text in ANSWERS[expected].split("|"):
        assert parse_answer(text) is expected or parse_answer(text) == expected, text
    assert parse_answer(None) is None


def test_questions():
    assert question("1-0", "Edema") == "Is there edema in this X-ray? Answer 1 or 0."
    assert question("no-yes", "Fracture") == "Does this chest X-ray show a fracture? Answer no or yes."
    assert "No Finding" not in question("yes-no", "No Finding") and set(NORMAL) == set(QUESTIONS)
    assert statements("Edema")[0] == ("a chest X-ray with edema", "a chest X-ray without edema")
    assert statements("No Finding")[0][0] == "a normal chest X-ray"


@torch.no_grad()
def test_margins_are_those_of_the_engine():
    vlm = load_vlm("tiny:gemma3")
    films, labels, names = [phantom_study(0, i, 112).image for i in range(2)], ("Edema", "No Finding"), ["1-0", "B-A"]
    found, texts = ask_vlm(vlm, films, labels, names, PartSize(3), text=True)
    assert found.shape == (2, 2, 2) and np.shape(texts) == (2, 2)
    for i, film in enumerate(films):
        for j, label in enumerate(labels):
            for k, name in enumerate(names):
                alone = margin(vlm, make_prompts(vlm, [question(name, label)], [film]), **QUESTIONS[name][1])
                assert found[i, j, k] == pytest.approx(alone.item(), abs=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3  # the film counts


@torch.no_grad()
def test_statements_are_compared_as_siglip_does():
    encoder = load_encoder("tiny:siglip")
    films = [phantom_study(0, i, 112).image for i in range(2)]
    found = Statements(encoder, ("Edema",))(films)
    assert found.shape == (2, 1, 3)
    texts = list(statements("Edema")[1])
    ids = encoder.processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    pixels = preprocess_images(encoder.processor, films).values
    scores = encoder.dual(input_ids=ids, pixel_values=pixels).logits_per_image
    np.testing.assert_allclose(found[:, 0, 1], (scores[:, 0] - scores[:, 1]).numpy(), atol=1e-4)


def test_content_free_films():
    black, grey, noise = content_free((20, 30))
    assert black.max() == 0 and set(grey.flat) == {128} and noise.std() > 60 and noise.shape == (20, 30)


def run(*arguments):
    main(["--dry-run", "--out-dir", "run", "--overwrite", *arguments])
    with open("run/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open("run/metrics.json") as file:
        return rows, json.load(file)


@pytest.mark.parametrize("model", ["tiny:gemma3", "tiny:siglip"])
def test_dry_run(model):
    rows, metrics = run("--model", model, "--only", "Edema", "No Finding")
    assert len(rows) == 4 * 2 and {row["split"] for row in rows} == {"val", "test"}  # never train
    assert metrics["dataset"]["phantom"] and metrics["family"] == model.removeprefix("tiny:")
    shift = {row["label"]: float(row["raw_score"]) - float(row["score"]) for row in rows}
    for row in rows:  # one number per label is subtracted, the same for every film
        assert float(row["raw_score"]) - float(row["score"]) == pytest.approx(shift[row["label"]], abs=1e-5)
    assert shift["Edema"] == pytest.approx(metrics["bias"][0], abs=1e-5)


def test_text_and_no_calibration():
    rows, metrics = run("--model", "tiny:llava", "--only", "Edema", "--text", "--no-calibrate", "--questions", "1-0")
    assert all(row["raw_score"] == row["score"] and row["answer"] in ("", "0", "1") for row in rows)
    val = [row for row in rows if row["split"] == "val"]
    assert metrics["unparsed"] == np.mean([row["answer"] == "" for row in val]) and metrics["bias"] is None


def test_shares_are_of_validation_films_alone():
    rows, metrics = run("--model", "tiny:gemma3", "--only", "Edema", "Fracture", "--questions", "1-0", "--no-calibrate")
    scores = {s: [float(row["score"]) > 0 for row in rows if row["split"] == s] for s in ("val", "test")}
    assert metrics["share_of_yes"] == {"raw": np.mean(scores["val"]), "calibrated": np.mean(scores["val"])}
    films = load_films("phantom", films=8, severe=True).part("val", "test")
    numbers, split = np.arange(len(films.rows)), np.array(films.column("split"))
    margins = np.where(split == "val", 1.0, -1.0)[:, None, None].repeat(len(films.labels), 1).repeat(2, 2)
    answers = [[None if s == "test" else 1] * len(films.labels) for s in split]
    told = facts_of(films, numbers, margins, margins, answers, ["1-0", "0-1"])
    assert told["share_of_yes"] == {"raw": 1, "calibrated": 1} and told["unparsed"] == 0
    told = facts_of(films, numbers[split == "test"], margins[split == "test"], margins[split == "test"], None, ["1-0"])
    assert told["share_of_yes"]["raw"] is None and told["val_auc"] is None


def test_answers_that_are_not_finite_are_refused(refused, monkeypatch):
    monkeypatch.setattr(Statements, "__call__", lambda self, images: np.full((len(images), 14, 3), np.nan))
    assert "are not finite" in refused(main, ["--dry-run", "--out-dir", "run", "--model", "tiny:siglip"])


def test_refusals(refused):
    dry = ["--dry-run", "--out-dir", "run"]
    assert "there is no label 'Edoema'" in refused(main, [*dry, "--only", "Edoema"])
    assert "writes nothing" in refused(main, [*dry, "--model", "tiny:siglip", "--text"])
    assert "invalid choice" in refused(main, [*dry, "--questions", "why"])
