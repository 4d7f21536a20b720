"""infer.py: good and bad files of one folder, the same answer as evaluate.py, warnings for foreign images."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.report import PHANTOM
from shared.runtime import save_checkpoint
from task1_classification.evaluate import main as evaluate
from task1_classification.infer import decision_of, main
from task1_classification.model import load_classifier
from task1_classification.train import main as train

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds for a process of a few, on a machine that is busy


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def infer(tiny_run, *arguments):
    main(
        [
            "--checkpoint",
            str(tiny_run.checkpoint),
            "--device",
            "cpu",
            "--out-dir",
            "found",
            "--overwrite",
            *map(str, arguments),
        ]
    )
    return {Path(r["path"]).name: r for r in rows_of("found/predictions.csv")}


def save_films(tiny_run, n=6, folder="films"):
    Path(folder).mkdir()
    films = tiny_run.data.images["test"][:n, 0].numpy()
    for i, film in enumerate(films):
        Image.fromarray(film).save(f"{folder}/{i:02d}.png")
    return films


def test_good_and_bad_files_of_a_folder(tiny_run, capsys):
    save_films(tiny_run, 3)
    Path("films/deeper").mkdir()
    Image.open("films/00.png").convert("RGB").resize((300, 280)).save("films/deeper/colour.jpg", quality=95)
    Path("films/text.png").write_text("no image")
    Path("films/empty.png").touch()
    Path("films/cut.png").write_bytes(Path("films/01.png").read_bytes()[:150])
    Image.new("L", (1, 1)).save("films/dot.png")
    np.save("films/nan.npy", np.full((28, 28), np.nan))
    Path("films/notes.txt").write_text("ignored")
    found = infer(tiny_run, "films", "films/missing.png")
    assert sorted(found) == ["00.png", "01.png", "02.png", "colour.jpg"]
    errors = {Path(r["path"]).name: r["error"] for r in rows_of("found/errors.csv")}
    assert sorted(errors) == ["cut.png", "dot.png", "empty.png", "missing.png", "nan.npy", "text.png"]
    assert (
        "too small: 1x1" in errors["dot.png"]
        and "empty" in errors["empty.png"]
        and "NaN" in errors["nan.npy"]
        and "does not exist" in errors["missing.png"]
    )
    metrics = json.loads(Path("found/metrics.json").read_text())
    assert (metrics["n"], metrics["n_errors"]) == (4, 6) and metrics["dataset"]["phantom"]
    printed = capsys.readouterr()
    assert "4 images classified, 6 skipped" in printed.out and printed.err.count("skipped ") == 6
    threshold = torch.load(tiny_run.checkpoint, weights_only=True)["threshold"]
    for row in found.values():
        assert float(row["threshold"]) == threshold and row["decision"] == (
            "pneumonia" if float(row["probability"]) > threshold else "normal"
        )


def test_the_same_probability_as_evaluate(tiny_run):
    save_films(tiny_run, 6)
    evaluate(["--checkpoint", str(tiny_run.checkpoint), "--device", "cpu", "--out-dir", "measured", "--limit", "20"])
    expected = [float(r["probability"]) for r in rows_of("measured/predictions.csv")][:6]
    together = infer(tiny_run, "films/*.png")
    assert [float(together[f"{i:02d}.png"]["probability"]) for i in range(6)] == pytest.approx(expected, abs=1e-6)
    one_by_one = infer(tiny_run, "films", "--batch-size", "1")
    assert [float(r["probability"]) for r in one_by_one.values()] == pytest.approx(expected, abs=1e-6)
    assert len(infer(tiny_run, "films", "--limit", "2")) == 2


def test_sixteen_bits_and_arrays_give_the_decision_of_eight_bits(tiny_run):
    for i, film in enumerate(save_films(tiny_run, 4)):
        low, high = np.percentile(film, (3, 97))
        stretched = (
            (np.clip((film - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
        )  # black and white are both there
        Image.fromarray(stretched).save(f"films/{i}-8.png")
        Image.fromarray(stretched.astype(np.uint16) * 257).save(f"films/{i}-16.png")
        Image.fromarray(stretched.astype(np.uint16) * 16).save(f"films/{i}-12.tif")
        np.save(f"films/{i}-float.npy", stretched / 255)
        np.save(f"films/{i}-colour.npy", np.repeat(stretched[..., None], 3, axis=2))
    found = infer(tiny_run, "films")
    for i in range(4):
        eight = float(found[f"{i}-8.png"]["probability"])
        for other in ("16.png", "12.tif", "float.npy", "colour.npy"):
            assert float(found[f"{i}-{other}"]["probability"]) == pytest.approx(eight, abs=1e-5), other
            assert found[f"{i}-{other}"]["decision"] == found[f"{i}-8.png"]["decision"]


def test_foreign_images_are_marked(tiny_run, capsys):
    films = save_films(tiny_run, 20)
    for i, film in enumerate(films):
        Image.fromarray(255 - film).save(f"films/inverted-{i}.png")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save("films/noise.png")
    Image.new("L", (50, 50), 90).save("films/grey.png")
    found = infer(tiny_run, "films")
    marked = {name for name, row in found.items() if row["unlike_training"] == "True"}
    assert {"noise.png", "grey.png"} <= marked and sum(name.startswith("inverted") for name in marked) >= 18
    assert (
        sum(not name.startswith(("inverted", "noise", "grey")) for name in marked) <= 5
    )  # of 20 films like the training images
    assert all(math.isfinite(float(r["unusualness"])) for r in found.values())
    assert json.loads(Path("found/metrics.json").read_text())["n_unlike_training"] == len(marked)
    infer(tiny_run, "films/noise.png")
    assert (
        "noise.png: " in (out := capsys.readouterr().out)
        and "WARNING: unlike the training images" in out.split("noise.png: ")[-1]
    )


def test_heat_maps(tiny_run):
    save_films(tiny_run, 3)
    infer(tiny_run, "films", "--heatmaps", "--batch-size", "2")
    pictures = sorted(Path("found/heatmaps").iterdir())
    assert [p.name for p in pictures] == ["00000_00.png", "00001_01.png", "00002_02.png"]
    assert all(Image.open(p).size == (448, 448) and Image.open(p).mode == "RGB" for p in pictures)
    corner = np.asarray(Image.open(pictures[0]))[:20, :240].astype(int)
    assert (corner.max(-1) == 0).sum() > 1000 and (corner.min(-1) > 200).sum() > 200  # PHANTOM, in white on black
    assert json.loads(Path("found/metrics.json").read_text())["phantom"] is True
    infer(tiny_run, "films/00.png", "--heatmaps", "--layer", "layer4")
    assert len(list(Path("found/heatmaps").iterdir())) == 1  # those of the run before are gone


def test_what_a_probability_is_of_is_said(tiny_run, capsys):
    save_films(tiny_run, 1)
    row = infer(tiny_run, "films")["00.png"]
    said = f"{row['decision']} (probability of pneumonia {float(row['probability']):.3f}, threshold "
    assert f"films/00.png: {said}" in capsys.readouterr().out


def test_odd_names_do_not_end_a_batch(tiny_run, capsys):
    save_films(tiny_run, 1)
    film = Path("films/00.png").read_bytes()
    for name in (b"caf\xe9.png", b"x" * 250 + b".png", "ü$_{\n.png".encode()):
        with open(os.path.join(b"films", name), "wb") as file:
            file.write(film)
    assert len(infer(tiny_run, "films", "--heatmaps")) == 4 and len(list(Path("found/heatmaps").iterdir())) == 4


def test_nothing_usable_ends_with_one_sentence_and_no_run_folder(tiny_run, refused, own_folder):
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    Path("bad/b.npy").write_bytes(b"")
    message = refused(main, ["bad", "--checkpoint", tiny_run.checkpoint, "--device", "cpu"])
    assert "none of the 2 files could be used; bad/a.png: the file is not an image" in message
    assert "none of the 1 files could be used; gone.png: the file does not exist" in refused(
        main, ["gone.png", "--checkpoint", tiny_run.checkpoint]
    )
    Path("nothing").mkdir()
    assert "there is no image in nothing" in refused(main, ["nothing", "--checkpoint", tiny_run.checkpoint])
    assert "no file matches gone/*.png" in refused(main, ["gone/*.png", "--checkpoint", tiny_run.checkpoint])
    assert sorted(p.name for p in own_folder.iterdir()) == ["bad", "nothing"]


def test_missing_and_wrong_classifiers(tiny_run, refused, own_folder):
    save_films(tiny_run, 1)
    assert "there is no classifier at models/task1_model.pth; train one with python " in refused(main, ["films"])
    assert "there is no task 1 classifier at gone.pt" in refused(main, ["films", "--checkpoint", "gone.pt"])
    assert "is not a task 1 classifier" in refused(main, ["films", "--checkpoint", tiny_run.run_dir / "last.pt"])
    assert "cannot be read as a task 1 classifier" in refused(main, ["films", "--checkpoint", "films/00.png"])
    assert "name at least one image" in refused(main, [])
    assert [p.name for p in own_folder.iterdir()] == ["films"]


def test_an_unknown_layer_leaves_nothing_half_written(tiny_run, refused, own_folder):
    save_films(tiny_run, 1)
    assert "no layer 'layer9'" in refused(
        main, ["films", "--heatmaps", "--layer", "layer9", "--checkpoint", tiny_run.checkpoint]
    )
    assert [p.name for p in own_folder.iterdir()] == ["films"]


def test_the_classifier_at_its_usual_place_is_found(tiny_run, capsys):
    save_films(tiny_run, 2)
    state = torch.load(tiny_run.checkpoint, weights_only=True)
    save_checkpoint("models/task1_model.pth", state)
    main(["films", "--device", "cpu"])
    assert (
        "checkpoint: models/task1_model.pth" in (out := capsys.readouterr().out)
        and "trained on phantom at 28 px (96 images)" in out
    )
    assert PHANTOM in out
    assert len(rows_of("outputs/task1_classification/infer/001/predictions.csv")) == 2


@pytest.mark.parametrize("name", ["bloodmnist", "chestmnist"])
def test_several_classes_and_labels(name, small_network, write_medmnist):
    write_medmnist("data", name, {"train": 64, "val": 48, "test": 16})
    train(
        [
            "--data",
            name,
            "--data-dir",
            "data",
            "--limit",
            "64",
            "--epochs",
            "1",
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--out-dir",
            "run",
        ]
    )
    for i, image in enumerate(np.load(f"data/{name}.npz")["test_images"][:3]):
        Image.fromarray(image).save(f"{i}.png")
    main(["0.png", "1.png", "2.png", "--checkpoint", "run/best.pt", "--device", "cpu", "--out-dir", "found"])
    rows = rows_of("found/predictions.csv")
    names = [k.removeprefix("p_") for k in rows[0] if k.startswith("p_")]
    for row in rows:
        p = {n: float(row[f"p_{n}"]) for n in names}
        assert float(row["probability"]) == pytest.approx(max(p.values()))
        if name == "bloodmnist":
            assert sum(p.values()) == pytest.approx(1, abs=1e-5) and row["decision"] == max(p, key=p.get)
        else:
            thresholds = torch.load("run/best.pt", weights_only=True)["threshold"]
            assert row["decision"] == (
                "; ".join(n for n, t in zip(names, thresholds, strict=True) if p[n] > t) or "none"
            )


def test_decisions_by_hand():
    binary = {"task": "binary-class", "label_names": ["normal", "ill"], "threshold": 0.3}
    assert (
        decision_of(torch.tensor(0.31), binary)["decision"] == "ill"
        and decision_of(torch.tensor(0.29), binary)["decision"] == "normal"
    )
    labels = {"task": "multi-label, binary-class", "label_names": ["a", "b"], "threshold": [0.5, 0.9]}
    assert (
        decision_of(torch.tensor([0.6, 0.8]), labels)["decision"] == "a"
        and decision_of(torch.tensor([0.1, 0.8]), labels)["decision"] == "none"
    )
    assert decision_of(torch.tensor([0.6, 0.95]), labels)["decision"] == "a; b"


def test_dry_run(small_network, own_folder):
    main(["--dry-run"])
    rows = rows_of("outputs/task1_classification/infer/dry-run/predictions.csv")
    assert [r["path"] for r in rows] == [f"phantom-{i}" for i in range(4)] and not (own_folder / "models").exists()


def test_the_folder_of_a_run_is_its_best_checkpoint(tiny_run):
    by_folder, by_file = (load_classifier(path)[1] for path in (tiny_run.run_dir, tiny_run.checkpoint))
    assert by_folder["weights_sha256"] == by_file["weights_sha256"]


@pytest.mark.slow
def test_from_another_folder(tiny_run, own_folder, start_script):
    save_films(tiny_run, 2)
    command = [ROOT / "task1_classification" / "infer.py", "--checkpoint", tiny_run.checkpoint, "--device", "cpu"]
    assert start_script([*command, "films", "--heatmaps"], own_folder).wait(PATIENCE) == 0, Path(
        "output.txt"
    ).read_text()
    assert len(rows_of("outputs/task1_classification/infer/001/predictions.csv")) == 2
    assert start_script([*command, "gone.png"], own_folder).wait(PATIENCE) == 2
    assert "Traceback" not in Path("output.txt").read_text()
