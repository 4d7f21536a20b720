"""vlm_train.py and vlm_evaluate.py together: every mode end to end, exact resume, one table, refusals."""

import csv
import json
import shutil
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import pytest
import torch
import torchvision
from conftest import SmallNet

import task1_classification.vlm_train as script
from shared.runtime import InputError
from shared.training import StopSignal
from task1_classification.vlm_data import phantom_films
from task1_classification.vlm_evaluate import main as evaluate
from task1_classification.vlm_evaluate import parse_args as parse_evaluate
from task1_classification.vlm_model import MODES, load_encoder, load_probe, restore_probe
from task1_classification.vlm_prepare import main as prepare
from task1_classification.vlm_train import auc_by_label, main, parse_args
from task1_classification.vlm_zero_shot import main as ask
from task1_classification.vlm_zero_shot import parse_args as parse_zero_shot

TINY = "--device cpu --model tiny:siglip --mode head --seeds 1 --head-epochs 2 --tower-films 8 --tower-steps 1".split()
CHEAP = ["head", "projector-head", "random-projector", "projector"]


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Task 1's network is a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", lambda name, weights=None: SmallNet())
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_networks):
    """The folder of a dry run of every mode, and of a zero-shot run on the same films: read only."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["--dry-run", "--out-dir", "run", "--mode", *MODES])
        model = str(folder / "run" / "model")
        ask([*"--data phantom --films 24 --severe --device cpu --questions 1-0 --out-dir asked --model".split(), model])
    return folder


def read(path):
    return json.loads(Path(path).read_text())


def weights(folder):
    return {p.parent.name: load_probe(p)["weights"] for p in sorted(Path(folder).glob("seed*/best.pt"))}


def test_a_run_says_what_was_trained(trained):
    metrics = read(trained / "run/metrics.json")
    assert [(t["mode"], t["seed"]) for t in metrics["trainings"]] == [(m, s) for s in (0, 1) for m in MODES]
    numbers = {t["mode"]: t["trainable_parameters"] for t in metrics["trainings"]}
    assert numbers["head"] == 128 * 14 + 14 == numbers["projector-head"] == numbers["random-projector"]
    assert numbers["projector"] == numbers["head"] + 2 * (128 * 128 + 128)
    assert abs(numbers["lora"] - numbers["projector"]) < numbers["projector"] / 4
    assert metrics["dataset"]["phantom"] and metrics["tower_trained_here"]["seconds"] > 0
    assert metrics["features_seconds"]["train"] < metrics["features_seconds"]["train_and_val"]
    assert (trained / "run/figures/curves.png").is_file() and not list((trained / "run").glob("seed*/last.pt"))


def test_c_and_d_count_b_as_their_epoch_0(trained):
    rows = [json.loads(line) for line in (trained / "run/history.jsonl").read_text().splitlines()]
    b = min((r for r in rows if r["run"] == "seed 0, projector-head" and r["epoch"]), key=lambda r: r["val_loss"])
    for mode in ("projector", "lora"):
        first = next(r for r in rows if r["run"] == f"seed 0, {mode}")
        assert first["epoch"] == 0 and first["val_auc"] == pytest.approx(b["val_auc"])


TOWER = parse_args(["--dry-run"]).tower_steps


@pytest.mark.parametrize("stop_at", [1 - TOWER, 1, 3, 6])  # in the tower; after an epoch of head, of B, of projector
def test_a_resumed_run_equals_the_uninterrupted_one(trained, own_folder, monkeypatch, stop_at):
    # asked twice a step of the tower and twice an epoch: to save, and to leave
    stops = iter([False] * (2 * (TOWER + stop_at)) + [True] * 2)
    monkeypatch.setattr(StopSignal, "requested", lambda self: setattr(self, "signal", 15) or next(stops))
    with pytest.raises(SystemExit) as end:
        main(["--dry-run", "--out-dir", "run", "--seeds", "1", "--mode", *CHEAP])
    monkeypatch.undo()
    monkeypatch.chdir(own_folder)
    left = "run/tower.pt" if stop_at < 1 else "run/seed0-*/last.pt"
    assert end.value.code == 128 + 15 and list(own_folder.glob(left))
    main(["--resume", "run"])
    expected = weights(trained / "run")
    for name, found in weights("run").items():
        for key, value in found.items():
            assert torch.equal(value, expected[name][key]), (name, key)
    assert len(weights("run")) == 4


def test_more_seeds_and_modes_can_be_added_but_nothing_else_changed(own_folder, refused):
    main(["--dry-run", "--out-dir", "run", "--seeds", "1", "--mode", "head"])
    before = weights("run")["seed0-head"]
    main(["--resume", "run", "--seeds", "2", "--mode", "head", "projector-head"])
    after = weights("run")
    assert len(after) == 4 and torch.equal(after["seed0-head"]["head.weight"], before["head.weight"])
    assert "--lr 0.01 (now 0.02)" in refused(main, ["--resume", "run", "--lr", "0.02"])


def test_a_run_does_not_go_on_with_another_table(own_folder, refused):
    prepare(["--dry-run", "--out-dir", "table"])
    main(["--data", "table/films.csv", *TINY, "--out-dir", "run"])
    lines = Path("table/films.csv").read_text()
    Path("table/films.csv").write_text(lines.replace(",0\n", ",1\n", 3))
    assert "was trained on other films, labels or weights" in refused(main, ["--resume", "run", "--seeds", "2"])
    Path("table/films.csv").write_text(lines)
    refused_by = refused(evaluate, ["--runs", "run", "--out-dir", "run", "--overwrite"])
    assert "run holds run, which is read here" in refused_by and Path("run/metrics.json").is_file()
    for flags in (["--data", "table/films.csv"], ["--limit", "3"]):
        assert "the films are those of the runs" in refused(evaluate, ["--runs", "run", *flags])


def test_a_training_state_that_lacks_its_history_is_refused(own_folder, refused, monkeypatch):
    stops = iter([False] * (2 * TOWER + 2) + [True] * 2)
    monkeypatch.setattr(StopSignal, "requested", lambda self: setattr(self, "signal", 15) or next(stops))
    arguments = ["--dry-run", "--out-dir", "run", "--seeds", "1", "--mode", "head", "--model", "tiny:siglip"]
    with pytest.raises(SystemExit):
        main(arguments)
    path = next(own_folder.glob("run/seed0-head/last.pt"))
    state = torch.load(path, weights_only=True)
    torch.save(state | {"values": {"history": state["values"]["history"]}}, path)
    assert "was changed after it was written" in refused(main, ["--resume", "run"])


def test_everything_stands_in_one_table(trained, own_folder):
    runs = [str(trained / name) for name in ("run", "asked")]
    evaluate(["--runs", *runs, *"--samples 50 --out-dir ev --device cpu".split()])
    metrics = read("ev/metrics.json")
    assert list(metrics["methods"]) == [*MODES, "zero-shot", "majority", "text oracle"]
    for name, method in metrics["methods"].items():
        assert method["seeds"] == (2 if name in MODES else 1)
        assert method["macro"]["auc"]["low"] <= method["macro"]["auc"]["value"] <= method["macro"]["auc"]["high"]
    assert metrics["methods"]["majority"]["macro"]["auc"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    pairs = {row["pair"]: row["macro"] for row in metrics["differences"]}
    a, b = (metrics["methods"][m]["macro"]["auc"]["value"] for m in ("projector", "projector-head"))
    assert pairs["C - B: tuning the projector"]["value"] == pytest.approx(a - b)
    report = Path("ev/report.md").read_text()
    assert "PHANTOM" in report and "| projector (C) |" in report and "not an image model" in report
    assert Path("ev/figures/differences.png").is_file() and Path("ev/report.html").is_file()
    films = phantom_films(24, severe=True)
    rows, test = films.rows_of("val", "test"), films.rows_of("test")
    with open("ev/predictions/head-seed1.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == films.column("id", rows)
    scores = np.array([[float(line[label]) for label in films.labels] for line in lines])[-len(test) :]
    aucs = auc_by_label(films.truth[test], scores, films.labels)
    with open("ev/labels.csv", newline="") as file:
        told = {r["label"]: float(r["auc"]) for r in csv.DictReader(file) if r["method"] == "head"}
    with open("ev/predictions/head-seed0.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    other = np.array([[float(line[label]) for label in films.labels] for line in lines])[-len(test) :]
    others = auc_by_label(films.truth[test], other, films.labels)
    assert told == pytest.approx({label: (aucs[label] + others[label]) / 2 for label in told})


def test_configurations_name_options_that_there_are():
    for name in ("vlm_head", "vlm_projector"):
        args = script.parse_args(["--config", f"configs/{name}.yaml"])
        assert args.model == "google/medgemma-4b-it" and args.seeds == 5
    assert "projector" in args.mode and args.cache_gib == 40
    assert parse_zero_shot(["--config", "configs/vlm_zero_shot.yaml"]).text
    assert parse_evaluate(["--config", "configs/vlm_test.yaml"]).samples == 2000


def test_refusals_of_training(own_folder, refused):
    dry = ["--dry-run", "--out-dir", "run"]
    assert "has no projector" in refused(main, [*dry, "--model", "tiny:siglip", "--mode", "projector"])
    assert "stands alone" in refused(main, [*dry, "--mode", "tower", "head"])
    assert "both kinds of films" in refused(main, [*dry, "--limit", "1"])
    assert "no label 'Flu'" in refused(main, [*dry, "--only", "Flu"])
    assert "no model folder" in refused(main, ["--data", "phantom", "--films", "8", "--model", "nothing/here/at/all"])


def test_refusals_of_evaluation(trained, own_folder, refused):
    assert "there is no run to measure" in refused(evaluate, [])
    (own_folder / "empty").mkdir()
    assert "is no finished run" in refused(evaluate, ["--runs", "empty"])
    main(["--dry-run", "--out-dir", "other", "--seeds", "1", "--mode", "head", "--seed", "5"])
    assert "other films, splits or labels" in refused(evaluate, ["--runs", trained / "run", "other"])


def test_a_checkpoint_of_another_kind_is_refused(trained):
    path = trained / "run/seed0-projector/best.pt"
    for name, value in {"mode": "head", "family": "gemma3", "labels": ["Edema"]}.items():
        with pytest.raises(InputError, match=f"is of the {name}"):
            load_probe(path, **{name: value})
    with pytest.raises(InputError, match="was trained on the family llava"):
        restore_probe(load_probe(path), load_encoder("tiny:gemma3"), path)
    with pytest.raises(InputError, match="trained on other weights"):
        restore_probe(load_probe(path), load_encoder("tiny:llava"), path)
    state = load_probe(path)
    del state["weights"]["projector.linear_1.weight"]
    with pytest.raises(InputError, match="does not fit"):
        restore_probe(state, load_encoder(str(trained / "run/model")), path)


@pytest.mark.parametrize("name, value", [
    ("weights", {"head.weight": torch.full((1, 2), float("nan"))}), ("weights", {"std": torch.zeros(2)}),
    ("weights", {"head.weight": "x"}), ("mode", "foo"), ("seed", "0"), ("data", None), ("told", [1]),
])  # fmt: skip
def test_values_that_no_checkpoint_has_are_refused(trained, name, value, tmp_path):
    state = load_probe(trained / "run/seed0-head/best.pt")
    torch.save(state | {name: value}, tmp_path / "best.pt")
    with pytest.raises(InputError, match="is damaged or was changed"):
        load_probe(tmp_path / "best.pt")


def test_runs_that_were_changed_are_refused(trained, refused, tmp_path):
    run, asked = (shutil.copytree(trained / name, tmp_path / name) for name in ("run", "asked"))
    command = ["--samples", "20", "--runs"]
    shutil.copytree(run / "seed0-head", run / "seed7-head")
    assert "put there from elsewhere" in refused(evaluate, [*command, run])
    lines = (asked / "predictions.csv").read_text().splitlines()
    (asked / "predictions.csv").write_text("\n".join([*lines, lines[-1]]))
    assert "or has them twice" in refused(evaluate, [*command, asked])
    for told in ([1], {}, {"dataset": None}, read(run / "metrics.json") | {"model": 3}):
        (run / "metrics.json").write_text(json.dumps(told))
        assert "is damaged, or of another kind of run" in refused(evaluate, [*command, run])


def test_a_dual_encoder_is_trained_by_its_tower_and_the_cnn_alone_loads_no_model(own_folder):
    main(["--dry-run", "--out-dir", "dual", "--model", "tiny:siglip", "--mode", "head", "--seeds", "1"])
    main(["--dry-run", "--out-dir", "cnn", "--mode", "cnn", "--seeds", "1"])
    assert read("cnn/metrics.json")["family"] == "" and not Path("cnn/model").exists()
    evaluate(["--runs", "dual", "cnn", "--samples", "20", "--out-dir", "ev", "--device", "cpu"])
    assert set(read("ev/metrics.json")["methods"]) == {"head", "cnn", "majority", "text oracle"}
