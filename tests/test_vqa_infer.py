"""infer.py: questions about image files, boxes drawn on them, bad files set aside."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqa_sft_grpo import infer as script
from shared.runtime import InputError
from vqa_sft_grpo.asking import BASE_MODEL, model_of
from vqa_sft_grpo.infer import answer_row
from vqa_sft_grpo.pictures import draw_boxes, with_caption


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (60, 120)).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def speaking(monkeypatch):
    """speaking(text): the model writes this text for every prompt."""

    def use(text):
        monkeypatch.setattr(script.Answerer, "generate", lambda self, prompts, images: [text for _ in prompts])

    return use


def rows_of(run):
    return [json.loads(line) for line in Path(run, "answers.jsonl").read_text().splitlines()]


def test_answer_json_and_box_on_the_image(film, speaking, capsys):
    speaking('{"caption": "a film", "boxes": [[250, 500, 750, 1000]], "answer": "yes"}')
    script.main(
        ["--image", str(film), "--question", "Is it?", "--model", "tiny", "--out-dir", "run", "--device", "cpu"]
    )
    (row,) = rows_of("run")
    assert row["answer"] == "yes" and row["data"]["caption"] == "a film" and row["repair_level"] == 0
    assert row["boxes"] == [[30, 30, 90, 60]]  # pixels of the 120 x 60 image
    with Image.open(Path("run", row["picture"])) as picture:
        pixels = np.asarray(picture).astype(int)
    red = (pixels[..., 0] > 220) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    rows, columns = np.nonzero(red)
    scale = 448 / 120
    assert (
        abs(columns.min() - 30 * scale) < 3 and abs(columns.max() - 90 * scale) < 3 and abs(rows.min() - 30 * scale) < 3
    )
    assert '"caption": "a film"' in capsys.readouterr().out


def test_every_question_is_asked_of_every_image_and_bad_files_are_set_aside(film, speaking, tmp_path, capsys):
    speaking('{"answer": "no"}')
    (tmp_path / "broken.png").write_bytes(b"nothing")
    script.main(
        [
            "--image",
            str(film),
            str(tmp_path / "broken.png"),
            "missing.png",
            "--question",
            "Is it?",
            "Where?",
            "--model",
            "tiny",
            "--out-dir",
            "run",
            "--device",
            "cpu",
        ]
    )
    rows = rows_of("run")
    assert [(Path(r["image"]).name, r["question"]) for r in rows] == [("film.png", "Is it?"), ("film.png", "Where?")]
    assert not Path("run/boxes").exists() and all(r["picture"] is None for r in rows)
    errors = Path("run/errors.csv").read_text().splitlines()
    assert len(errors) == 3 and "broken.png" in errors[1] and "does not exist" in errors[2]
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["n"] == 2 and metrics["n_errors"] == 2 and metrics["n_without_answer"] == 0


def test_the_real_path_with_a_tiny_model(film):
    """The model itself, untrained: whatever it writes is read without a traceback, in both prompts."""
    for style in ("json", "think"):
        script.main(
            [
                "--image",
                str(film),
                "--question",
                "Is there a nodule?",
                "--prompt",
                style,
                "--model",
                "tiny",
                "--out-dir",
                style,
                "--device",
                "cpu",
                "--max-new-tokens",
                "8",
            ]
        )
        (row,) = rows_of(style)
        assert set(row) == {"image", "question", "answer", "data", "boxes", "repair_level", "response", "picture"}


def test_dry_run():
    script.main(["--dry-run", "--out-dir", "run"])
    assert len(rows_of("run")) == 2


def test_refusals(film, refused):
    assert "--image" in refused(script.main, ["--question", "Is it?"])
    assert "--question" in refused(script.main, ["--image", film, "--question", "  "])
    assert "none of the 1 images" in refused(
        script.main, ["--image", "missing.png", "--question", "x", "--model", "tiny", "--device", "cpu"]
    )
    assert "no adapter folder" in refused(
        script.main, ["--image", film, "--question", "x", "--model", "tiny", "--sft_ckpt", "nowhere", "--device", "cpu"]
    )


def test_model_and_adapter(tmp_path):
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    adapter.mkdir()
    whole.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (whole / "config.json").write_text("{}")
    assert model_of(None, None) == (BASE_MODEL, None)
    assert model_of(None, str(adapter)) == ("some/base", str(adapter))
    assert model_of("other", str(adapter)) == ("other", str(adapter))
    assert model_of(None, str(whole)) == (str(whole), None)
    with pytest.raises(InputError, match="leave --model out"):
        model_of("other", str(whole))


def test_unread_responses_have_no_answer():
    row = answer_row("a", "b", "{" * 500, (10, 20), "json")
    assert row["answer"] is None and row["boxes"] == [] and not row["data"]


def test_pictures_are_large_enough_to_read():
    picture = draw_boxes(np.zeros((28, 28), np.uint8), [[0, 0, 28, 28]])
    assert picture.size == (448, 448) and picture.getpixel((0, 0)) == (255, 64, 64)
    assert with_caption(picture, "word " * 60).height > 448 + 60
    assert with_caption(picture, "\u0434") != with_caption(picture, "\u0436")  # letters, and not the same square


def test_long_names_have_pictures_and_long_questions_no_run_folder(film, speaking, refused):
    speaking('{"boxes": [[250, 500, 750, 1000]], "answer": "yes"}')
    named = film.rename(film.with_name("\u753b" * 83 + ".png"))  # 253 bytes
    asked = ["--image", str(named), "--model", "tiny", "--device", "cpu", "--out-dir", "long", "--question"]
    assert "at most 2,000" in refused(script.main, [*asked, "x" * 3000]) and not Path("long").exists()
    script.main([*asked, "Is it?"])
    assert Path("long", rows_of("long")[0]["picture"]).is_file()
