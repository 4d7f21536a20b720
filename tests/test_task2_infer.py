"""Task 2: reports of films with both opinions."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from shared.phantom import phantom_study
from shared.runtime import InputError, load_checkpoint, save_checkpoint
from task1_classification.model import untrained_classifier
from task2_report.infer import main as infer
from task2_report.infer import parse_args
from task2_report.opinion import CNN
from task2_report.records import UNTRAINED, class_of_report, flags_of
from task2_report.writer import training_of

QUICK = "--model tiny --max-new-tokens 6 --device cpu".split()


@pytest.fixture
def films(own_folder):
    (own_folder / "films").mkdir()
    for i in range(2):
        Image.fromarray(phantom_study(0, i, 112).image).save(own_folder / f"films/{i}.png")
    (own_folder / "films/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return own_folder / "films"


def records_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_both_opinions_in_one_run(films, own_folder, capsys):
    checkpoint = untrained_classifier()
    infer([str(films), *QUICK, "--cnn", str(checkpoint), "--indication", "Fever.", "--out-dir", "run"])
    said, run = capsys.readouterr().out, own_folder / "run"
    assert f"CNN: {checkpoint}" in said and "trained on phantom" in said and "GiB RAM" in said
    records = records_of(run)
    assert len(records) == 2 and "broken.png" in (run / "errors.csv").read_text()  # one bad film stops nothing
    cnn, _ = CNN(checkpoint), None
    for i, record in enumerate(records):
        expected = cnn.opinions([phantom_study(0, i, 112).image])[0]
        assert record["cnn"]["probability"] == pytest.approx(expected["probability"], abs=1e-6)
        assert record["cnn"]["feature_norm"] > 0 and record["cnn"]["map_shape"] == [512, 2, 2]
        assert f"{expected['probability']:.0%}" in record["prompt"] and "Fever." in record["prompt"]
        assert record["text"].startswith(UNTRAINED) and not record["raw_text"].startswith(UNTRAINED)
        assert record["backend"] == "transformers gemma3: untrained, random weights"
        assert "untrained model" in record["flags"] and isinstance(record["p_yes_logit"], float)
        assert json.loads((run / f"records/{i:04d}.json").read_text()) == record
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2 and "<img alt" in page and "http" not in page
    assert "learned from films drawn" in page and "PHANTOM" not in page  # of the CNN, not of the user's films
    told = json.loads((run / "metrics.json").read_text())
    assert told["n_errors"] == 1 and told["together"] is True and told["phantom"]


def test_the_cnn_is_released_first_where_both_do_not_fit(films, own_folder, capsys):
    checkpoint = str(untrained_classifier())
    infer([str(films), *QUICK, "--cnn", checkpoint, "--together", "no", "--out-dir", "one"])
    assert "CNN released before the model is loaded" in capsys.readouterr().out
    infer([str(films), *QUICK, "--cnn", checkpoint, "--together", "yes", "--out-dir", "both"])
    one, both = (records_of(own_folder / name) for name in ("one", "both"))
    for a, b in zip(one, both, strict=True):
        assert a["raw_text"] == b["raw_text"] and a["cnn"] == b["cnn"]


def test_without_a_cnn_it_says_so_in_one_sentence(films, own_folder, capsys):
    infer([str(films / "0.png"), *QUICK, "--out-dir", "run"])
    said = capsys.readouterr().out
    assert "no CNN beside the model" in said and "task1_classification/train.py" in said
    record = records_of(own_folder / "run")[0]
    assert record["cnn"] is None and record["context"] == "none" and record["told_probability"] is None


def test_a_cnn_at_its_usual_place_is_found(films, own_folder, capsys):
    save_checkpoint(own_folder / "task1_model.pth", load_checkpoint(untrained_classifier()))
    infer([str(films / "0.png"), *QUICK, "--out-dir", "run"])
    assert "CNN: task1_model.pth" in capsys.readouterr().out


def test_rows_of_a_data_set(own_folder, write_medmnist):
    write_medmnist(own_folder / "data")
    infer(["--data", "phantom", *QUICK, "--limit", "3", "--out-dir", "run", "--strategy", "yes_no"])
    records = records_of(own_folder / "run")
    assert [r["image_id"] for r in records] == [f"phantom-test-{i}" for i in range(3)]
    assert all(r["label"] in (0, 1) and r["strategy"] == "yes_no" for r in records)


def test_bad_input(films, own_folder, refused, write_medmnist):
    checkpoint, one = untrained_classifier(), str(films / "0.png")
    write_medmnist(own_folder / "data")
    said = refused(infer, ["--data", "pneumoniamnist", *QUICK, "--cnn", checkpoint, "--limit", 2])
    assert "was trained on phantom" in said and "--allow-mismatch" in said
    infer([str(a) for a in ["--data", "pneumoniamnist", *QUICK, "--cnn", checkpoint, "--limit", 2, "--allow-mismatch"]])
    assert "none" not in refused(infer, [one, *QUICK, "--cnn", films / "no.pth"])
    (own_folder / "empty").mkdir()
    refused(infer, [own_folder / "empty", *QUICK])
    said = refused(infer, [films / "broken.png", *QUICK])
    assert "could be used" in said
    refused(infer, [one, "--model", "tiny:bert", "--device", "cpu"])  # a text-only model
    assert "no model folder" in refused(infer, [one, "--model", "nowhere", "--device", "cpu"])
    (own_folder / "other.pth").write_bytes(b"not a checkpoint")
    refused(infer, [one, *QUICK, "--cnn", own_folder / "other.pth"])
    with pytest.raises(SystemExit) as stop:
        parse_args([])
    assert stop.value.code == 2


def test_a_gated_model_without_a_token_is_one_sentence(films, refused, monkeypatch):
    no = GatedRepoError("no", response=SimpleNamespace(headers={}, request=None, status_code=403))
    monkeypatch.setattr("shared.models.hub.get_hf_file_metadata", lambda *a, **k: (_ for _ in ()).throw(no))
    said = refused(infer, [films / "0.png", "--device", "cpu"])
    assert "google/medgemma-4b-it" in said and "is gated" in said and "--model tiny" in said


@pytest.mark.parametrize("change", [[1], {}, {"dataset": None}, {"dataset": [1]}, {"conditions": ["Foo"]},
                                    {"dataset": {"name": "phantom", "phantom": "yes"}}])  # fmt: skip
def test_a_damaged_training_json_is_refused(tmp_path, change):
    fine = {"dataset": {"name": "phantom", "phantom": True, "again": {}}, "indication": False, "conditions": None}
    (tmp_path / "training.json").write_text(json.dumps(fine))
    assert training_of(tmp_path) == fine and training_of(None) == {}
    (tmp_path / "training.json").write_text(
        json.dumps(fine | change if change and isinstance(change, dict) else change)
    )
    with pytest.raises(InputError, match="is damaged, or of another version"):
        training_of(tmp_path)


def test_odd_names_and_texts(films, own_folder, refused, capsys):
    """A name that is not UTF-8, or of 250 characters, costs nothing; half a character in a prompt is a sentence."""
    names = [os.fsdecode(b"f\xff$x_{2$ [1].png"), "n" * 250 + ".png"]
    for name in names:
        shutil.copy(films / "0.png", own_folder / name)
    infer([*names, *QUICK, "--cnn", "none", "--strategy", "zero_shot", "--out-dir", "run"])
    assert len(records_of(own_folder / "run")) == 2
    assert "is not UTF-8" in refused(infer, [films / "0.png", *QUICK, "--cnn", "none", "--indication", "\udc80"])
    (own_folder / "adapter").mkdir()
    (own_folder / "adapter/adapter_config.json").write_text("[1]")
    said = refused(infer, [films / "0.png", "--device", "cpu", "--cnn", "none", "--adapter", "adapter"])
    assert "holds no adapter that can be read" in said


def test_flags():
    class Vlm:
        tiny, adapter, name, source = False, None, "google/medgemma-1.5-4b-it", ""

    written = {"unfinished": True, "thoughts": 3}
    cnn = {"call": "pneumonia", "unlike_training": True}
    record = {"cnn": cnn, "classification": "normal", "complies": False, "strategy": "clinical_role"}
    flags = flags_of(Vlm, record, written)
    assert flags == [
        "disagrees with the CNN", "format not kept", "text cut off", "thought trace cut off",
        "system prompt: not as MedGemma 1.5 was trained", "the CNN finds the film unlike its training films",
    ]  # fmt: skip
    assert "uncertain" in flags_of(Vlm, record | {"classification": "uncertain"}, written)


def test_the_cnn_sees_the_pixels_it_was_trained_on():
    """A film of the network's own size goes in as it is, uint8 and all."""
    cnn = CNN(untrained_classifier())
    film = np.arange(28 * 28, dtype=np.uint32).reshape(28, 28).astype(np.uint8)
    assert (cnn.inputs([film])[0, 0].numpy() == film).all()


def test_a_report_is_classified_by_its_labels():
    texts = "There is pneumonia.|Pneumonia cannot be excluded.|Normal chest.|Large effusion.|Effusion. No pneumonia.|"
    found = [class_of_report(text) for text in texts.split("|")]
    assert found == ["pneumonia", "uncertain", "normal", None, "normal", None]
    for text in ("help help help", "I cannot analyse medical images.", "IMPRESSION: Aortic aneurysm."):
        assert class_of_report(text) is None  # nothing is said, and nothing said to be fine
    for text in ("No acute disease.", "Lungs are clear.", "No effusion."):
        assert class_of_report(text) == "normal"
