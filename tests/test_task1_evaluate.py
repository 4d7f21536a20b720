"""
evaluate.py: its numbers against a recomputation from predictions.csv, MedMNIST's evaluator, and what it must not touch.
"""

import csv
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import task1_classification.evaluate as evaluate_script
from shared.data.image_sets import load_medmnist
from shared.report import PHANTOM
from shared.runtime import save_checkpoint
from task1_classification.evaluate import main, summary_over
from task1_classification.report import HALF, NETWORK, PIXELS, failure_groups
from task1_classification.train import main as train

BRIGHTNESS, MAJORITY = "baseline: mean brightness", "baseline: always the majority class"


def read(path):
    return json.loads(Path(path).read_text())


def predictions(run_dir):
    with open(Path(run_dir) / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def columns(rows, *names):
    return [np.array([float(r[name]) for r in rows]) for name in names]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """
    The bootstrap of the multi-class sets sorts every class a thousand times; its numbers are tested with the
    statistics.
    """
    whole = evaluate_script.bootstrap_interval
    monkeypatch.setattr(
        evaluate_script, "bootstrap_interval", lambda *arguments, num_samples: whole(*arguments, num_samples=10)
    )


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """The run folder of one evaluation of the real network, for all tests that only read."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["--checkpoint", str(tiny_run.run_dir), "--device", "cpu", "--out-dir", "run", "--cases", "4"])
    return folder / "run"


@pytest.fixture
def trained(small_network, write_medmnist):
    """trained(name, ...) -> train the small network on a small set of that name into the folder `trained`."""

    def run(name="pneumoniamnist", folder="trained", *more, counts=None):
        write_medmnist("data", name, counts)
        train(
            [
                "--data",
                name,
                "--data-dir",
                "data",
                "--limit",
                "500",
                "--epochs",
                "2",
                "--batch-size",
                "16",
                "--lr",
                "0.01",
                "--device",
                "cpu",
                "--out-dir",
                folder,
                *more,
            ]
        )

    return run


def evaluate(*arguments):
    main(["--device", "cpu", "--data-dir", "data", "--out-dir", "measured", "--overwrite", *map(str, arguments)])
    return read("measured/metrics.json")


# --- the numbers ---


def test_metrics_equal_a_recomputation_from_predictions(evaluated, tiny_run):
    metrics, rows = read(evaluated / "metrics.json"), predictions(evaluated)
    y, p, raw = columns(rows, "label", "probability", "uncalibrated")
    assert y.tolist() == tiny_run.data.labels["test"].tolist() and [int(r["index"]) for r in rows] == list(
        range(len(y))
    )
    t, temperature = metrics["threshold"], metrics["temperature"]
    np.testing.assert_allclose(np.log(p / (1 - p)), np.log(raw / (1 - raw)) / temperature, atol=1e-4)
    for name, threshold in ((NETWORK, t), (HALF, 0.5)):
        row, called = metrics["rows"][name], p > threshold
        tp, fp, tn, fn = (
            (called & (y == 1)).sum(),
            (called & (y == 0)).sum(),
            (~called & (y == 0)).sum(),
            (~called & (y == 1)).sum(),
        )
        assert (row["tp"], row["fp"], row["tn"], row["fn"]) == (tp, fp, tn, fn)
        assert row["accuracy"] == pytest.approx((tp + tn) / len(y)) and row["recall"] == pytest.approx(tp / (tp + fn))
        assert row["specificity"] == pytest.approx(tn / (tn + fp))
        assert row["precision"] == (pytest.approx(tp / (tp + fp)) if tp + fp else None)
        assert row["auc"] == pytest.approx(roc_auc_score(y, p)) and row["brier"] == pytest.approx(np.mean((p - y) ** 2))
    assert metrics["n"] == len(y) == 48 and metrics["split"] == "test" and metrics["same_file_as_in_training"]
    assert metrics["runs"][0]["auc"] == metrics["rows"][NETWORK]["auc"] and metrics["over_seeds"] == {}
    for name, interval in metrics["intervals"].items():
        value = metrics["rows"][NETWORK]["auc" if name == "auc_bootstrap" else name]
        assert value is None or interval["low"] <= value <= interval["high"], name


def test_threshold_and_temperature_are_those_of_the_checkpoint(evaluated, tiny_run):
    state = torch.load(tiny_run.checkpoint, weights_only=True)
    metrics = read(evaluated / "metrics.json")
    assert (metrics["threshold"], metrics["temperature"]) == (state["threshold"], state["temperature"])
    y, p = columns(predictions(evaluated), "label", "probability")
    state["threshold"] = float(np.sort(p)[10])  # 37 of 48 lie above
    save_checkpoint("changed.pt", state)
    changed = evaluate("--checkpoint", "changed.pt")
    assert changed["threshold"] == state["threshold"] != metrics["threshold"]
    assert changed["rows"][NETWORK]["tp"] + changed["rows"][NETWORK]["fp"] == (p > state["threshold"]).sum()
    assert changed["rows"][HALF] == metrics["rows"][HALF]


def test_baselines(evaluated, tiny_run):
    rows, y = read(evaluated / "metrics.json")["rows"], tiny_run.data.labels
    share = y["test"].double().mean().item()
    majority = int(y["train"].double().mean() > 0.5)
    assert (
        rows[MAJORITY]["accuracy"] == pytest.approx(share if majority else 1 - share) and rows[MAJORITY]["auc"] == 0.5
    )
    means = tiny_run.data.images["test"].double().mean((1, 2, 3)).numpy()
    auc = roc_auc_score(y["test"].numpy(), means)
    assert rows[BRIGHTNESS]["auc"] == pytest.approx(auc, abs=1e-6) or rows[BRIGHTNESS]["auc"] == pytest.approx(
        1 - auc, abs=1e-6
    )
    assert 0 <= rows[PIXELS]["auc"] <= 1 and rows[PIXELS]["n"] == 48


def test_another_split(tiny_run):
    metrics = evaluate("--checkpoint", tiny_run.checkpoint, "--split", "val")
    assert metrics["split"] == "val" and metrics["n"] == 32
    validation = torch.load(tiny_run.checkpoint, weights_only=True)["validation"]
    assert metrics["rows"][NETWORK]["auc"] == pytest.approx(validation["val_auc"])  # the same images as in training
    assert "Measured on the val images" in metrics["warnings"][-2] and not Path("reports").exists()


def test_nothing_is_chosen_on_the_test_split(trained):
    trained()
    before, rows = evaluate("--checkpoint", "trained"), predictions("measured")
    arrays = dict(np.load("data/pneumoniamnist.npz"))
    arrays["test_labels"] = arrays["test_labels"][::-1].copy()
    np.savez_compressed("data/pneumoniamnist.npz", **arrays)
    after = evaluate("--checkpoint", "trained")
    assert not after["same_file_as_in_training"] and after["rows"][NETWORK]["auc"] != before["rows"][NETWORK]["auc"]
    for key in ("threshold", "temperature"):
        assert after[key] == before[key]
    for name in (NETWORK, PIXELS, BRIGHTNESS, MAJORITY):
        assert after["rows"][name]["threshold"] == before["rows"][name]["threshold"], name
    corrected = "network, prior corrected, threshold 0.5"
    assert after["rows"][corrected]["estimated_prevalence"] == before["rows"][corrected]["estimated_prevalence"]
    assert [r["probability"] for r in predictions("measured")] == [r["probability"] for r in rows]
    assert after["failure_cases"]["random"] == before["failure_cases"]["random"]


@pytest.mark.parametrize("name", ["pneumoniamnist", "bloodmnist", "retinamnist", "chestmnist"])
def test_medmnist_agrees_and_reads_its_file(name, trained):
    trained(name, counts={"train": 96, "val": 48, "test": 48})
    metrics = evaluate("--checkpoint", "trained")
    assert metrics["medmnist"]["largest_difference_to_medmnist"] <= 1e-12
    (file,) = Path("measured").glob(f"{name}_test_*@seed0.csv")

    class Here(medmnist.Evaluator):  # parse_and_evaluate looks in the home folder
        def __init__(self, flag, split, size=None):
            super().__init__(flag, split, size, root="data")

    theirs = Here.parse_and_evaluate(str(file.resolve()))
    assert theirs.AUC == pytest.approx(metrics["medmnist"]["auc"], abs=1e-12) and theirs.ACC == pytest.approx(
        metrics["medmnist"]["accuracy"], abs=1e-12
    )


def test_multi_class_numbers_equal_a_recomputation(trained):
    trained("bloodmnist", counts={"train": 96, "val": 48, "test": 48})
    metrics, rows = evaluate("--checkpoint", "trained"), predictions("measured")
    names = list(medmnist.INFO["bloodmnist"]["label"].values())
    p, y = np.stack(columns(rows, *[f"p_{n}" for n in names]), axis=1), columns(rows, "label")[0]
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    network, majority = metrics["rows"]["network"], metrics["rows"][MAJORITY]
    assert network["accuracy"] == pytest.approx((p.argmax(1) == y).mean()) and majority["accuracy"] == pytest.approx(
        1 / 8
    )
    assert np.sum(network["confusion_matrix"]) == 48 and metrics["threshold"] is None
    assert metrics["rows"][PIXELS]["accuracy"] > 0.9  # each class brightens its own patch: pixels tell them apart


def test_multi_label_numbers_equal_a_recomputation(trained):
    trained("chestmnist", counts={"train": 96, "val": 48, "test": 48})
    metrics, rows = evaluate("--checkpoint", "trained"), predictions("measured")
    names = list(medmnist.INFO["chestmnist"]["label"].values())
    p, y = (
        np.stack(columns(rows, *[f"p_{n}" for n in names]), axis=1),
        np.array([[int(v) for v in r["label"].split()] for r in rows]),
    )
    called = p > np.array(metrics["threshold"])
    network = metrics["rows"]["network"]
    assert network["mean_label_accuracy"] == pytest.approx((called == y).mean())
    assert network["macro_auc"] == pytest.approx(np.mean([roc_auc_score(a, b) for a, b in zip(y.T, p.T, strict=True)]))
    assert metrics["rows"]["baseline: each label's rate in training"]["macro_auc"] == 0.5


def test_ordinal_metrics(trained):
    trained("retinamnist", counts={"train": 96, "val": 40, "test": 40})
    network = evaluate("--checkpoint", "trained")["rows"]["network"]
    rows = predictions("measured")
    p = np.stack(columns(rows, *[k for k in rows[0] if k.startswith("p_")]), axis=1)
    assert network["mean_absolute_error"] == pytest.approx(np.abs(p.argmax(1) - columns(rows, "label")[0]).mean())
    assert (
        -1 <= network["quadratic_weighted_kappa"] <= 1
        and "quadratic weighted kappa" in Path("measured/report.md").read_text()
    )


# --- several checkpoints ---


def test_several_seeds_give_mean_and_standard_deviation(trained):
    trained("pneumoniamnist", "trained", "--seeds", "0", "5", "7")
    metrics = evaluate("--checkpoint", "trained")
    assert [r["seed"] for r in metrics["runs"]] == [0, 5, 7] and {r["seed"] for r in predictions("measured")} == {
        "0",
        "5",
        "7",
    }
    for key in ("auc", "accuracy", "specificity", "brier"):
        values = [r[key] for r in metrics["runs"]]
        assert metrics["over_seeds"][key] == {
            "mean": pytest.approx(statistics.mean(values)),
            "std": pytest.approx(statistics.stdev(values)),
        }
    rows = [r for r in predictions("measured") if r["seed"] == "5"]
    y, p = columns(rows, "label", "probability")
    assert metrics["runs"][1]["auc"] == pytest.approx(roc_auc_score(y, p))
    assert "Over 3 seeds (0, 5, 7)" in Path("measured/report.md").read_text()
    alone = evaluate("--checkpoint", "trained/seed7/best.pt")
    assert alone["runs"][0]["auc"] == metrics["runs"][2]["auc"] and alone["over_seeds"] == {}


def test_summary_skips_what_a_run_lacks():
    runs = [{"seed": 0, "auc": 0.5, "mcc": None, "f1": 0.2}, {"seed": 1, "auc": 0.7, "mcc": 0.1, "f1": 0.4}]
    assert summary_over(runs) == {
        "auc": {"mean": pytest.approx(0.6), "std": pytest.approx(0.1 * 2**0.5)},
        "f1": {"mean": pytest.approx(0.3), "std": pytest.approx(0.1 * 2**0.5)},
    }


def full_run(folder, seed, name="pneumoniamnist"):
    arguments = ["--data", name, "--data-dir", "data", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    train([*arguments, "--out-dir", folder, "--seed", str(seed)])


def test_a_full_run_on_real_data_comes_before_newer_others(trained, write_medmnist, capsys):
    runs = "outputs/task1_classification/train/00"
    trained("pneumoniamnist", f"{runs}1", "--seed", "1")
    trained("pneumoniamnist", f"{runs}2", "--seed", "2")
    assert evaluate()["seed"] == 2 and "taking outputs/task1_classification/train/002 (--limit 500)" in (
        capsys.readouterr().out
    )
    full_run(f"{runs}3", 3)
    trained("pneumoniamnist", f"{runs}4", "--seed", "4")
    full_run(f"{runs}5", 5, "phantom")
    capsys.readouterr()
    assert evaluate()["seed"] == 3
    assert f"taking {runs}3 (real data); passed over 005 (phantom), 004 (--limit 500)" in capsys.readouterr().out
    shutil.rmtree(f"{runs}3")
    assert evaluate()["seed"] == 3  # models/task1_model.pth, the published copy of run 3
    assert f"taking models/task1_model.pth in place of {runs}5: it was trained on real data" in capsys.readouterr().out
    Path("models/task1_model.pth").unlink()
    assert evaluate()["seed"] == 5


def test_an_unfinished_run_is_marked(trained):
    trained("pneumoniamnist", "trained", "--seeds", "0", "5")
    Path("trained/seed5/best.pt").unlink()
    metrics = evaluate("--checkpoint", "trained")
    assert "The training run is not finished: seed 5 has no best.pt." in metrics["warnings"]
    assert "seed 5 has no best.pt" in Path("measured/report.md").read_text()


def test_a_real_hand_in_report_is_never_replaced_by_less(trained, small_network, write_medmnist, capsys):
    write_medmnist("data")
    full_run("real", 0)
    hand_in = Path("reports/task1_classification_report.md")
    evaluate("--checkpoint", "real")
    pictures = {p.name: p.read_bytes() for p in Path("reports/figures").glob("task1_*.png") if "curves" not in p.name}
    before = hand_in.read_bytes()
    assert b"Not a result" not in before and len(pictures) == 4
    trained("pneumoniamnist", "limited")
    full_run("phantom", 0, "phantom")
    for run in ("limited", "phantom"):
        capsys.readouterr()
        evaluate("--checkpoint", run)
        assert "left alone: it is a result on real data, this run is not" in capsys.readouterr().out
        assert hand_in.read_bytes() == before and "Not a result to hand in" in Path("measured/report.md").read_text()
    assert all(Path("reports/figures", name).read_bytes() == picture for name, picture in pictures.items())


def test_the_command_that_training_prints_measures_its_run(small_network, write_medmnist, capsys):
    for arguments in (["--data", "phantom"], ["--data-dir", "data folder"], ["--data", "phantom", "--limit", "60"]):
        write_medmnist("data folder")
        capsys.readouterr()
        train(
            [*arguments, "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out-dir", "a run", "--overwrite"]
        )
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
        _, script_path, *printed = shlex.split(line)
        assert Path(script_path) == Path(evaluate_script.__file__)
        main([*printed, "--device", "cpu", "--out-dir", "measured", "--overwrite"])
        metrics, trained_run = read("measured/metrics.json"), read("a run/metrics.json")
        assert metrics["dataset"] == trained_run["dataset"] and metrics["same_file_as_in_training"]
        assert metrics["trained_on"]["cases"] == trained_run["cases"]
        assert metrics["checkpoint"] == "a run/best.pt" and (PHANTOM in capsys.readouterr().out) == (
            "phantom" in arguments
        )


def test_cases_have_a_limit(refused):
    assert "must be between 1 and 24, not 624" in refused(main, ["--cases", "624"])


# --- the report ---


@pytest.mark.parametrize("name", ["phantom", "bloodmnist", "chestmnist"])
def test_the_report_and_its_pictures(name, evaluated, trained):
    if name == "phantom":
        folder, files = evaluated, ("confusion", "roc_pr", "calibration", "failures")
    else:
        trained(name, counts={"train": 96, "val": 48, "test": 48})
        evaluate("--checkpoint", "trained")
        folder, files = (
            Path("measured"),
            ("confusion", "roc_pr", "failures") if name == "bloodmnist" else ("roc_pr", "failures"),
        )
    text = (folder / "report.md").read_text()
    assert re.findall(r"!\[[^]]*]\(([^)]*)\)", text) == [f"figures/{f}.png" for f in files]
    assert all((folder / "figures" / f"{f}.png").read_bytes().startswith(b"\x89PNG") for f in files)
    assert (PHANTOM in text) == (name == "phantom") and "trained with --limit" in text
    assert "on 96 images" in text and "96 training and" in text  # not the 2,400 of the whole set
    assert not re.search(r"[\s`(]/\w", text)  # no path of this machine
    metrics = read(folder / "metrics.json")
    for row, values in metrics["rows"].items():
        shown = values["accuracy" if name != "chestmnist" else "mean_label_accuracy"]
        assert f"| {row} |" in text and f"{shown:.3f}" in text
    assert f"have {metrics['heat_maps']['native_size'][1]}x" in text


def test_the_hand_in_report_stands_on_its_own(evaluated):
    reports = evaluated.parent / "reports"
    text = (reports / "task1_classification_report.md").read_text()
    pictures = re.findall(r"!\[[^]]*]\(([^)]*)\)", text)
    assert len(pictures) == 4 and all((reports / p).is_file() for p in pictures)


def test_limit_writes_no_hand_in_report(tiny_run, own_folder):
    metrics = evaluate("--checkpoint", tiny_run.checkpoint, "--limit", "20", "--cases", "2")
    assert metrics["n"] == 20 and not (own_folder / "reports").exists()


def test_dry_run(small_network, own_folder):
    main(["--dry-run"])
    metrics = read("outputs/task1_classification/evaluate/dry-run/metrics.json")
    assert metrics["dataset"]["phantom"] and metrics["n"] == 32
    assert not (own_folder / "reports").exists() and not (own_folder / "models").exists()


def test_failure_groups_by_hand():
    labels, p = np.array([1, 0, 1, 0, 1, 0]), np.array([0.1, 0.9, 0.62, 0.3, 0.95, 0.7])
    facts = {"label_names": ["normal", "ill"], "task": "binary-class", "threshold": 0.6}
    groups, called, captions = failure_groups(labels, p, facts, 2, 0)
    # wrong: 0 (called normal), 1 and 5 (called ill). Way from the threshold to 0 or 1: .5 / .6 = .83, .3 / .4 = .75, .1
    # / .4 = .25
    assert groups["most confident errors"].tolist() == [0, 1]
    assert groups["nearest to the threshold"].tolist() == [2, 5]  # .02 / .4 and .1 / .4
    assert called.tolist() == [0, 1, 1, 0, 1, 1] and captions[1] == "#1 true normal, p(ill) 0.90"
    assert len(set(groups["random"].tolist())) == 2


def test_failure_groups_without_errors():
    facts = {"label_names": ["a", "b", "c"], "task": "multi-class", "threshold": None}
    groups, called, _ = failure_groups(np.array([0, 2]), np.array([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]]), facts, 5, 0)
    assert (
        groups["most confident errors"].tolist() == []
        and groups["closest calls"].tolist() == [1, 0]
        and called.tolist() == [0, 2]
    )


def test_a_class_that_is_absent_from_the_test_images(write_medmnist):
    path = write_medmnist("data", "bloodmnist")
    with np.load(path) as arrays:
        arrays = dict(arrays)
    arrays["test_labels"][arrays["test_labels"] == 3] = 2
    np.savez(path, **arrays)
    data, scores = load_medmnist("bloodmnist", "data"), np.random.default_rng(0).dirichlet(np.ones(8), 40)
    Path("run").mkdir()
    found = evaluate_script.medmnist_result(data, scores, "test", Path("run"), "x")
    assert found["auc"] is None and found["accuracy"] == (scores.argmax(1) == data.labels["test"].numpy()).mean()


def test_a_label_that_was_not_called_is_no_confident_error():
    """Multi-label: a film stands for the label furthest on the wrong side of its threshold, called or missed."""
    facts = {"label_names": ["a", "b"], "task": "multi-label, binary-class", "threshold": [0.2, 0.5]}
    labels, p = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.19, 0.95], [0.1, 0.2]])
    groups, named, captions = failure_groups(labels, p, facts, 1, 0)
    assert named[0] == 1 and groups["most confident errors"].tolist() == [0] and captions[0] == "#0 b: true 0, p 0.95"


def test_data_that_changed_since_the_training(small_network, own_folder, refused):
    def film(name, seed, bright):
        Path("own", name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 100, (28, 28)) + 100 * bright
        Image.fromarray(pixels.astype(np.uint8)).save(Path("own", name))

    for i in range(12):
        film(f"{'ill' if i % 2 else 'well'}/{i}.png", i, i % 2)
    Path("own/nobody").mkdir()
    train(["--data", "own", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--out-dir", "run"])
    same = evaluate("--checkpoint", "run", "--data", str(Path("own").resolve()))  # the same films by another path
    assert same["same_file_as_in_training"] and not same["warnings"]
    Path("elsewhere").mkdir()
    film("ill/new.png", 99, 1)
    changed = evaluate("--checkpoint", "run")
    assert not changed["same_file_as_in_training"] and "may have been trained on" in changed["warnings"][0]
    shutil.rmtree("own")
    assert "give it with --data FOLDER" in refused(main, ["--checkpoint", "run"])


# --- refusals ---


def test_other_data_than_the_classifier_was_trained_on(tiny_run, refused, own_folder):
    assert "was trained on phantom, not on bloodmnist" in refused(
        main, ["--checkpoint", tiny_run.checkpoint, "--data", "bloodmnist"]
    )
    assert list(own_folder.iterdir()) == []


def test_the_name_of_the_data_in_any_case(tiny_run):
    assert evaluate("--checkpoint", tiny_run.checkpoint, "--data", "Phantom")["n"] == 48


def test_classifiers_of_different_sets_are_evaluated_apart(trained, refused):
    trained()
    trained("breastmnist", "other")
    assert "evaluate them apart" in refused(
        main, ["--checkpoint", "trained", "other", "--data-dir", "data", "--device", "cpu"]
    )
    assert not Path("outputs").exists()


def test_checkpoints_that_are_none(tiny_run, refused, own_folder):
    assert "there is no trained classifier here" in refused(main, [])
    assert "there is no task 1 classifier at nowhere.pt" in refused(main, ["--checkpoint", "nowhere.pt"])
    Path("empty").mkdir()
    assert "holds no best.pt" in refused(main, ["--checkpoint", "empty"])
    Path("text.pt").write_text("not a checkpoint")
    assert "text.pt cannot be read" in refused(main, ["--checkpoint", "text.pt"])
    assert "is not a task 1 classifier" in refused(main, ["--checkpoint", tiny_run.run_dir / "last.pt"])
    assert sorted(p.name for p in own_folder.iterdir()) == ["empty", "text.pt"]


def test_a_set_that_is_gone_is_not_replaced(trained, refused, monkeypatch):
    trained()
    Path("data/pneumoniamnist.npz").unlink()
    monkeypatch.setattr(medmnist, "PneumoniaMNIST", lambda **options: (_ for _ in ()).throw(RuntimeError("no network")))
    assert "could not be downloaded" in refused(main, ["--checkpoint", "trained", "--data-dir", "data"])


def test_an_unknown_layer_leaves_nothing_half_written(tiny_run, refused, own_folder):
    assert "no layer 'layer9'" in refused(main, ["--checkpoint", tiny_run.checkpoint, "--layer", "layer9"])
    assert not any(own_folder.rglob("predictions.csv"))


def test_a_network_named_twice_is_refused(tiny_run, refused):
    assert "names twice" in refused(main, ["--checkpoint", tiny_run.run_dir, tiny_run.checkpoint])


def test_folders_whose_classes_changed_are_refused(small_network, refused):
    rng = np.random.default_rng(0)
    for name in ("ill", "well"):
        Path("own", name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (40, 40)).astype(np.uint8)).save(f"own/{name}/{i}.png")
    options = ["--data", "own", "--device", "cpu"]
    train([*options, "--epochs", "1", "--batch-size", "8", "--out-dir", "trained"])
    Path("own/ill").rename("own/zill")  # the order of the classes turns round
    message = refused(main, [*options, "--checkpoint", "trained"])
    assert "classes ['ill', 'well'] (now ['well', 'zill'])" in message
    Path("own/zill").rename("own/ill")
    Image.fromarray(rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save("own/ill/color.png")
    assert "channels 1 (now 3)" in refused(main, [*options, "--checkpoint", "trained"])
    Path("trained/settings.json").write_text("[]")
    assert "it holds a list, not an object" in refused(main, [*options, "--checkpoint", "trained"])


def test_a_split_with_one_class_of_several(trained, refused):
    trained("bloodmnist")
    options = ["--checkpoint", "trained", "--data-dir", "data", "--device", "cpu"]
    assert "only one class; raise --limit" in refused(main, [*options, "--limit", "1"])


def test_a_split_with_one_class(tiny_run, refused):
    assert "only one class; raise --limit" in refused(main, ["--checkpoint", tiny_run.checkpoint, "--limit", "1"])
