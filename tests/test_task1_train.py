"""
train.py: what a run writes, what it refuses, that it learns, and that a killed run goes on as if nothing had happened.
"""

import contextlib
import functools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import task1_classification.train as train_script
from shared.report import PHANTOM
from shared.runtime import save_checkpoint
from shared.training import learning_rate
from task1_classification.model import load_classifier, normalise, predict_logits
from task1_classification.train import backward, loss_of, main, parse_args, weights_of_classes

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds for a process of a few, on a machine that is busy
FAST = ["--data-dir", "data", "--data", "pneumoniamnist", "--device", "cpu", "--batch-size", "8", "--limit", "32"]


def read(path):
    return json.loads(Path(path).read_text())


def history(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same(a, b, where="checkpoint"):
    """Equal in every number and bit, apart from what the clock says."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        clock = {"seconds", "images_per_second", "source"} | ({"sha256"} if where == "last.pt" else set())
        for key in a.keys() - clock:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a, b):
    for name in ("best.pt", "last.pt"):
        assert_same(*(torch.load(Path(folder) / name, weights_only=True) for folder in (a, b)), where=name)
    assert without_clock(history(Path(a) / "history.jsonl")) == without_clock(history(Path(b) / "history.jsonl"))


def test_train_draws_in_few_files():
    """A reader of the script needs these and no others; the phantom is drawn only where it is asked for."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import task1_classification.train\n"
        "files = {m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)}\n"
        f"print(*sorted(f for f in files if f.startswith({str(ROOT)!r})), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    files = [Path(line).relative_to(ROOT).as_posix() for line in result.stdout.splitlines()]
    assert "task1_classification/train.py" in files and len(files) <= 12, files
    assert not any(f.startswith(("shared/phantom", "shared/models")) for f in files)


# --- what a run writes ---


def test_the_run_folder_of_a_short_run(tiny_run):
    metrics, rows = read(tiny_run.run_dir / "metrics.json"), history(tiny_run.run_dir / "history.jsonl")
    assert metrics["dataset"] == tiny_run.data.facts() and metrics["dataset"]["phantom"]
    assert (metrics["split"], metrics["n"], metrics["model"]) == ("val", len(tiny_run.data.labels["val"]), "resnet18")
    assert [r["epoch"] for r in rows] == [1, 2] and all(math.isfinite(v) for r in rows for v in r.values())
    best = max(rows, key=lambda r: (r["val_auc_shifted"], -r["val_loss"]))
    assert metrics["runs"][0] == {
        "seed": 0,
        **best,
        "threshold": metrics["runs"][0]["threshold"],
        "temperature": metrics["runs"][0]["temperature"],
    }
    assert metrics["finished"] and metrics["limit"] == 96
    assert metrics["cases"] == {split: len(tiny_run.data.labels[split].numpy()[:96]) for split in ("train", "val")}
    assert metrics["val_auc_mean"] == best["val_auc"] and metrics["val_auc_std"] is None
    assert (
        metrics["seconds"] > 0
        and metrics["peak_ram_gib"] > 0
        and metrics["versions"]["torch"] == str(torch.__version__)
    )
    assert read(tiny_run.run_dir / "settings.json")["limit"] == 96
    assert (tiny_run.run_dir / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tiny_run.folder / "models").exists() and not (tiny_run.folder / "reports").exists()  # a --limit run


def test_the_checkpoint_is_the_best_epoch_and_holds_what_later_tasks_need(tiny_run):
    model, facts = load_classifier(tiny_run.checkpoint)
    data = tiny_run.data
    logits = predict_logits(model, data.images["val"], facts["normalisation"])
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], data.labels["val"].float())
    assert float(loss) == pytest.approx(facts["validation"]["val_loss"], abs=1e-5)
    pixels = data.images["train"].double() / 255
    assert facts["normalisation"]["mean"] == pytest.approx([pixels.mean().item()], abs=1e-6)
    assert facts["normalisation"]["std"] == pytest.approx([pixels.std().item()], abs=1e-6)
    assert facts["label_names"] == ["normal", "pneumonia"] and facts["dataset"]["sha256"] == data.sha256
    assert (
        0 < facts["threshold"] < 1 and facts["temperature"] > 0 and (facts["image_size"], facts["channels"]) == (28, 1)
    )


def test_dry_run_is_a_run_in_small_and_publishes_nothing(small_network, capsys):
    main(["--dry-run", "--epochs", "50"])
    run_dir = Path("outputs/task1_classification/train/dry-run")
    metrics = read(run_dir / "metrics.json")
    assert metrics["dataset"]["phantom"] and metrics["n"] == 32 and metrics["settings"]["epochs"] == 2
    assert len(history(run_dir / "history.jsonl")) == 2
    assert (run_dir / "figures" / "curves.png").exists() and load_classifier(run_dir / "best.pt")[1]["dataset"][
        "phantom"
    ]
    assert not Path("models").exists() and not Path("reports").exists()
    printed = capsys.readouterr().out
    assert "left alone: this was a dry run" in printed and PHANTOM in printed.splitlines()
    main(["--dry-run"])  # again: replaces its own folder and asks for nothing
    assert [p.name for p in run_dir.parent.iterdir()] == ["dry-run"]


def test_runs_are_numbered(small_network, write_medmnist, capsys):
    write_medmnist("data")
    for _ in range(2):
        main([*FAST, "--epochs", "1"])
    assert sorted(p.name for p in Path("outputs/task1_classification/train").iterdir()) == ["001", "002"]
    assert_same_run(
        "outputs/task1_classification/train/001", "outputs/task1_classification/train/002"
    )  # same seed, same weights
    assert "results in outputs/task1_classification/train/002" in capsys.readouterr().out.splitlines()[-1]


def test_seeds(small_network, write_medmnist):
    write_medmnist("data")
    main([*FAST, "--epochs", "1", "--seeds", "3", "1", "--out-dir", "several"])
    main([*FAST, "--epochs", "1", "--seed", "1", "--out-dir", "alone"])
    metrics = read("several/metrics.json")
    assert metrics["seeds"] == [3, 1] and [r["seed"] for r in metrics["runs"]] == [3, 1]
    losses = [r["val_loss"] for r in metrics["runs"]]
    assert losses[0] != losses[1]
    assert metrics["val_loss_mean"] == pytest.approx(statistics.mean(losses)) and metrics[
        "val_loss_std"
    ] == pytest.approx(statistics.stdev(losses))
    assert metrics["best_seed"] == max(metrics["runs"], key=lambda r: (r["val_auc_shifted"], -r["val_loss"]))["seed"]
    assert_same_run("several/seed1", "alone")  # the seeds do not touch each other
    assert torch.load("several/seed3/best.pt", weights_only=True)["seed"] == 3


def test_the_test_split_is_never_read(small_network, write_medmnist):
    path = write_medmnist("data")
    main([*FAST, "--epochs", "1", "--out-dir", "a"])
    arrays = dict(np.load(path))
    arrays["test_images"] = 255 - arrays["test_images"]
    arrays["test_labels"] = 1 - arrays["test_labels"]
    np.savez_compressed(path, **arrays)
    main([*FAST, "--epochs", "1", "--out-dir", "b"])
    a, b = (torch.load(f"{run}/best.pt", weights_only=True) for run in "ab")
    assert a["dataset"].pop("sha256") != b["dataset"].pop("sha256")
    assert_same(a, b)


# --- models/task1_model.pth ---


def run_without_limit(name, write_medmnist, *more):
    write_medmnist("data")
    main(["--data", name, "--data-dir", "data", "--device", "cpu", "--batch-size", "16", "--epochs", "1", *more])
    return torch.load("models/task1_model.pth", weights_only=True)["dataset"]


@pytest.mark.parametrize(
    "state", [3, {"dataset": "pneumoniamnist"}, {"dataset": {}}, {"state_dict": {}}, None], ids=repr
)
def test_a_model_of_another_program_is_left_alone(state, small_network, write_medmnist, capsys):
    Path("models").mkdir()
    torch.save(state, "models/task1_model.pth") if state else Path("models/task1_model.pth").write_bytes(b"")
    before = Path("models/task1_model.pth").read_bytes()
    write_medmnist("data")
    main("--data pneumoniamnist --data-dir data --device cpu --batch-size 16 --epochs 1 --out-dir run".split())
    assert Path("models/task1_model.pth").read_bytes() == before and Path("run/metrics.json").exists()
    assert "left alone: it was trained on something unknown" in capsys.readouterr().out


def test_a_phantom_run_never_replaces_a_real_model(small_network, write_medmnist, capsys):
    save_checkpoint(Path("models/task1_model.pth"), {"dataset": {"name": "pneumoniamnist", "phantom": False}})
    before = Path("models/task1_model.pth").read_bytes()
    run_without_limit("phantom", write_medmnist)
    assert Path("models/task1_model.pth").read_bytes() == before
    assert "left alone: it was trained on pneumoniamnist" in capsys.readouterr().out


def test_a_real_run_replaces_a_phantom_model_and_a_phantom_its_like(small_network, write_medmnist):
    assert run_without_limit("phantom", write_medmnist)["phantom"]
    first = Path("models/task1_model.pth").read_bytes()
    assert run_without_limit("phantom", write_medmnist, "--seed", "1")["phantom"]
    assert Path("models/task1_model.pth").read_bytes() != first
    real = run_without_limit("pneumoniamnist", write_medmnist)
    assert real["name"] == "pneumoniamnist" and not real["phantom"]
    assert load_classifier("models/task1_model.pth")[1]["task"] == "binary-class"
    assert Path("reports/figures/task1_curves.png").exists()


def test_a_run_on_another_set_leaves_the_model_alone(small_network, write_medmnist, capsys):
    run_without_limit("pneumoniamnist", write_medmnist)
    write_medmnist("data", "breastmnist")
    main(["--data", "breastmnist", "--data-dir", "data", "--device", "cpu", "--batch-size", "16", "--epochs", "1"])
    assert torch.load("models/task1_model.pth", weights_only=True)["dataset"]["name"] == "pneumoniamnist"
    assert "left alone" in capsys.readouterr().out
    main([*FAST, "--epochs", "1", "--seed", "9"])  # and so does a run with --limit
    assert torch.load("models/task1_model.pth", weights_only=True)["seed"] == 0


# --- every kind of set ---


@pytest.mark.parametrize(
    "name, outputs", [("breastmnist", 1), ("bloodmnist", 8), ("retinamnist", 5), ("chestmnist", 14)]
)
def test_every_kind_of_set_trains(name, outputs, small_network, write_medmnist):
    write_medmnist("data", name, {"train": 96, "val": 48, "test": 16})
    main(
        [
            "--data",
            name.upper(),
            "--data-dir",
            "data",
            "--epochs",
            "3",
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--lr",
            "0.01",
            "--augment",
            "none",
            "--class-weights",
            "--out-dir",
            "run",
        ]
    )
    rows, (model, facts) = history("run/history.jsonl"), load_classifier("run/best.pt")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and 0 <= rows[-1]["val_auc"] <= 1
    assert model.fc.out_features == outputs == facts["num_outputs"]
    thresholds = facts["threshold"]
    assert thresholds is None if outputs in (8, 5) else len(thresholds) == 14 if outputs == 14 else 0 <= thresholds <= 1


def test_64_pixels(small_network, write_medmnist):
    write_medmnist("data", size=64)
    main([*FAST, "--image-size", "64", "--epochs", "1", "--out-dir", "run"])
    assert load_classifier("run/best.pt")[1]["image_size"] == 64


# --- it learns ---


@pytest.mark.slow
def test_it_learns_the_phantom_and_not_shuffled_labels(small_network, write_medmnist):
    path = write_medmnist("data", counts={"train": 1024, "val": 200, "test": 8})
    options = "--data pneumoniamnist --data-dir data --device cpu --epochs 8 --batch-size 32 --augment geometry".split()
    main([*options, "--out-dir", "true"])
    arrays = dict(np.load(path))
    arrays["train_labels"] = np.random.default_rng(0).permutation(arrays["train_labels"])
    np.savez_compressed(path, **arrays)
    main([*options, "--out-dir", "shuffled"])
    # the last epoch: nothing is chosen
    true, shuffled = (history(f"{run}/history.jsonl")[-1]["val_auc"] for run in ("true", "shuffled"))
    # standard deviation of a guessed AUC, sqrt((n0 + n1 + 1) / (12 n0 n1)) with about 80 + 120 films
    guess = math.sqrt(201 / (12 * 80 * 120))
    assert true > 0.5 + 6 * guess and true > shuffled + 4 * guess


# --- stopped and resumed ---


@contextlib.contextmanager
def signal_at(call):
    """A real SIGTERM to this process while it prepares the batch number `call`."""
    original, calls = train_script.augment, []

    def with_signal(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_script, "augment", with_signal)
        yield


def stopped_at(call, arguments):
    with signal_at(call), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 128 + signal.SIGTERM


@pytest.fixture
def interrupted(small_network, write_medmnist, capsys):
    """The run `parts`, stopped in its second epoch of three (4 steps each); returns its options."""
    write_medmnist("data")
    options = [*FAST, "--epochs", "3", "--label-smoothing", "0.1", "--class-weights"]
    stopped_at(6, [*options, "--out-dir", "parts"])
    assert "stopped in epoch 2, after step 2 of 4\nstopped; go on with: python " in capsys.readouterr().out
    return options


def test_stopped_by_a_signal_and_resumed_twice_equals_the_uninterrupted_run(interrupted):
    state = torch.load("parts/last.pt", weights_only=True)["values"]
    assert (state["epoch"], state["step"]) == (1, 2) and len(state["history"]) == 1
    assert not Path("parts/best.pt").exists() and not Path("parts/metrics.json").exists()
    stopped_at(4, [*interrupted, "--resume", "parts/last.pt"])  # the fourth batch from there on: epoch 3, step 2
    state = torch.load("parts/last.pt", weights_only=True)["values"]
    assert (state["epoch"], state["step"]) == (2, 2) and len(state["history"]) == 2
    main([*interrupted, "--resume", "--out-dir", "parts"])
    main([*interrupted, "--out-dir", "whole"])
    assert_same_run("parts", "whole")
    assert not Path("outputs").exists()  # resumed in place


def test_stopped_in_the_second_of_three_seeds(small_network, write_medmnist):
    write_medmnist("data")
    options = [*FAST, "--epochs", "2", "--seeds", "0", "1", "2"]
    stopped_at(8 + 3, [*options, "--out-dir", "parts"])
    assert (
        Path("parts/seed0/best.pt").exists()
        and not Path("parts/seed1/best.pt").exists()
        and not Path("parts/seed2").exists()
    )
    main([*options, "--resume", "parts/seed1/last.pt"])
    main([*options, "--out-dir", "whole"])
    for seed in range(3):
        assert_same_run(f"parts/seed{seed}", f"whole/seed{seed}")
    assert read("parts/metrics.json")["seeds"] == [0, 1, 2]


def test_a_finished_run_is_lengthened(interrupted, capsys):
    main([*interrupted, "--resume", "parts"])
    first = torch.load("parts/last.pt", weights_only=True)["values"]["history"]
    capsys.readouterr()
    main([*interrupted, "--epochs", "4", "--resume", "parts"])
    assert "--epochs 3 -> 4: the learning rate follows the new length" in capsys.readouterr().out
    rows = history("parts/history.jsonl")
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4] and rows[:3] == first


def test_what_a_resumed_run_is_refused(interrupted, refused, write_medmnist):
    stopped_at(4, [*interrupted, "--resume", "parts"])
    before = Path("parts/last.pt").read_bytes()
    resume = [*interrupted, "--resume", "parts"]
    assert "(now 0.0123)" in refused(main, [*resume, "--lr", "0.0123"])
    message = refused(main, [*resume, "--augment", "none", "--stem", "7x7"])
    assert "--augment" in message and "--stem" in message
    assert "already has 2 epochs; --epochs 1 is less" in refused(main, [*resume, "--epochs", "1"])
    assert "there is nothing at nowhere" in refused(main, [*interrupted, "--resume", "nowhere"])
    assert "already holds a run" in refused(main, [*interrupted, "--out-dir", "parts"])
    write_medmnist("data", seed=1)
    assert "other data" in refused(main, resume)
    assert Path("parts/last.pt").read_bytes() == before and not Path("parts/best.pt").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_a_damaged_training_state_is_refused(content, interrupted, refused):
    whole = Path("parts/last.pt").read_bytes()
    Path("parts/last.pt").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert "cannot be read as a training state" in refused(main, [*interrupted, "--resume", "parts"])


def test_resuming_with_another_seed_is_refused(interrupted, refused):
    assert "seed" in refused(main, [*interrupted, "--seed", "1", "--resume", "parts"])


def test_a_refused_resume_leaves_the_settings_alone(interrupted, refused):
    before = read("parts/settings.json")
    refused(main, [*interrupted, "--lr", "0.0123", "--resume", "parts"])
    assert read("parts/settings.json") == before


def test_resume_alone_without_a_folder_is_refused(interrupted, refused):
    assert "--out-dir" in refused(main, [*interrupted, "--resume"])


def test_resume_where_no_run_is_is_refused(small_network, write_medmnist, refused):
    write_medmnist("data")
    assert "nothing" in refused(main, [*FAST, "--epochs", "1", "--resume", "--out-dir", "typing-error"])


def test_resume_into_another_folder_is_refused_or_goes_on(interrupted):
    with contextlib.suppress(SystemExit):
        main([*interrupted, "--resume", "parts", "--out-dir", "elsewhere"])
    main([*interrupted, "--out-dir", "whole"])
    assert (
        not Path("elsewhere/history.jsonl").exists()
        or history("elsewhere/history.jsonl")[0]
        == torch.load("parts/last.pt", weights_only=True)["values"]["history"][0]
    )


def test_resume_alone_is_the_same_run(interrupted):
    main(["--resume", "parts"])  # no other flag: the settings are those of the run
    main([*interrupted, "--out-dir", "whole"])
    assert_same_run("parts", "whole")


def test_the_printed_command_goes_on(small_network, write_medmnist, capsys):
    write_medmnist("data")
    stopped_at(3, [*FAST, "--epochs", "1", "--out-dir", "my run"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped; go on with: ")]
    _, python, script_path, *arguments = shlex.split(line.removeprefix("stopped; go on with"))
    assert (python, Path(script_path)) == ("python", ROOT / "task1_classification" / "train.py")
    main(arguments)
    assert read("my run/metrics.json")["finished"]


@pytest.mark.parametrize("more", [["--seeds", "0", "1"], ["--seeds", "3"], ["--seed", "3"]])
def test_a_run_is_resumed_with_its_own_seeds(more, interrupted, refused):
    assert "parts was started with other seeds" in refused(main, ["--resume", "parts", *more])
    assert not list(Path("parts").glob("seed*"))
    main(["--resume", "parts", "--seeds", "0"])
    assert read("parts/metrics.json")["seeds"] == [0]


@contextlib.contextmanager
def signal_in_validation(call):
    """A real Ctrl-C to this process during validation number `call`."""
    original, calls = train_script.validate, []

    def with_signal(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_script, "validate", with_signal)
        yield


def test_ctrl_c_loses_nothing_between_and_after_the_epochs(small_network, write_medmnist):
    write_medmnist("data")
    options = [*FAST, "--epochs", "2", "--seeds", "0", "1"]
    for call in (1, 2):  # after the first epoch; after the last of the first seed
        with signal_in_validation(call), pytest.raises(SystemExit) as stop:
            main([*options, "--out-dir", f"stopped{call}"])
        assert stop.value.code == 128 + signal.SIGINT
        main(["--resume", f"stopped{call}"])
    with signal_in_validation(4):  # all is done but writing: it is written
        main([*options, "--out-dir", "stopped4"])
    main([*options, "--out-dir", "whole"])
    for call in (1, 2, 4):
        for seed in (0, 1):
            assert_same_run(f"stopped{call}/seed{seed}", f"whole/seed{seed}")
        assert read(f"stopped{call}/metrics.json")["finished"]


def test_values_of_a_training_state_are_checked(interrupted, refused):
    state = torch.load("parts/last.pt", weights_only=True)
    history = [{**row, "val_auc": "high"} for row in state["values"]["history"]]
    for change in ({"epoch": "one"}, {"history": None}, {"history": history}):
        save_checkpoint("parts/last.pt", state | {"values": state["values"] | change})
        assert "was changed after it was written, or is damaged" in refused(main, ["--resume", "parts"])


def wait_until(condition, process, seconds=PATIENCE):
    """Poll until the condition holds; the process must still be running then."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (
            f"the run ended before the moment came:\n{Path('output.txt').read_text()[-2000:]}"
        )
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def rows_in(folder):
    path = Path(folder) / "history.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def real_run(tmp_path_factory, start_script, write_medmnist):
    """
    The command of a short run of the real network in a process of its own, and the folder of such a run left alone.
    """
    folder = tmp_path_factory.mktemp("whole")
    data = write_medmnist(folder / "data", counts={"train": 48, "val": 24, "test": 8})
    command = [
        ROOT / "task1_classification" / "train.py",
        "--data",
        "pneumoniamnist",
        "--data-dir",
        data.parent,
        "--limit",
        "48",
        "--epochs",
        "3",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    assert start_script([*command, "--out-dir", "run"], folder).wait(PATIENCE) == 0, (folder / "output.txt").read_text()
    yield command, folder / "run"
    (folder / "run" / "last.pt").unlink()


def finish(command, own_folder, start_script, whole):
    assert start_script([*command, "--resume", "run"], own_folder).wait(PATIENCE) == 0, Path("output.txt").read_text()
    assert_same_run("run", whole)
    assert read("run/metrics.json")["runs"][0]["val_loss"] == read(whole / "metrics.json")["runs"][0]["val_loss"]


@pytest.mark.slow
def test_killed_terminated_and_killed_while_saving(real_run, own_folder, start_script):
    command, whole = real_run
    process = start_script([*command, "--out-dir", "run"], own_folder)
    wait_until(lambda: "seed 0:" in Path("output.txt").read_text(), process)
    process.kill()  # SIGKILL: nothing was saved yet
    assert process.wait() == -signal.SIGKILL and Path("run/settings.json").exists() and not Path("run/last.pt").exists()

    process = start_script([*command, "--resume", "run"], own_folder)
    wait_until(lambda: rows_in("run") == 1, process)
    process.send_signal(signal.SIGTERM)  # in the middle of the second epoch
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    state = torch.load("run/last.pt", weights_only=True)["values"]
    assert (state["epoch"], state["step"] > 0) == (1, True)
    assert "train.py --resume run" in Path("output.txt").read_text()

    process = start_script([*command, "--resume", "run"], own_folder)
    wait_until(lambda: list(Path("run").glob(".last.pt*.part")), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not Path("run/best.pt").exists()
    state = torch.load("run/last.pt", weights_only=True)["values"]
    assert 1 <= state["epoch"] < 3  # whole, although a later one was being written
    finish(command, own_folder, start_script, whole)


# --- several processes ---


@pytest.mark.slow
def test_two_processes_train_one_network(real_run, own_folder, start_script):
    command, whole = real_run
    Path("ranks.py").write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import task1_classification.train as train, torch\n"
        "validate = train.validate\n"
        "def keep(model, *rest):\n"
        "    torch.save([p.detach() for p in model.parameters()], f'rank{os.environ[\"RANK\"]}.pt')\n"
        "    return validate(model, *rest)\n"
        "train.validate = keep\n"
        "train.main(sys.argv[1:])\n"
    )
    process = start_script(["ranks.py", *command[1:]], own_folder, ranks=2)
    assert process.wait(PATIENCE) == 0, Path("output.txt").read_text()[-3000:]
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    runs = list(Path("outputs/task1_classification/train").iterdir())
    assert [r.name for r in runs] == ["001"] and load_classifier(runs[0] / "best.pt")
    together, alone = history(runs[0] / "history.jsonl"), history(whole / "history.jsonl")
    assert [r["epoch"] for r in together] == [1, 2, 3]
    # the same images in the same order, but batch statistics of 4 in place of 8 images: close, not equal
    assert together[0]["train_loss"] == pytest.approx(alone[0]["train_loss"], abs=0.3)
    assert Path("output.txt").read_text().count("results in outputs") == 1  # one process speaks


# --- the parts, against closed forms ---


def test_the_epochs_report_the_learning_rate_of_their_last_step(small_network, write_medmnist):
    write_medmnist("data")
    main([*FAST, "--epochs", "3", "--lr", "0.02", "--warmup-epochs", "1", "--out-dir", "run"])
    assert [r["lr"] for r in history("run/history.jsonl")] == pytest.approx(
        [learning_rate(step, 12, 4, 0.02) for step in (3, 7, 11)]
    )


def test_loss_of_a_binary_set():
    # logit 0 costs log 2 for either label; logit 2 costs log(1 + e^-2) = 0.126928 for label 1 and 2 more for label 0
    logits, labels = torch.tensor([[0.0], [2.0], [2.0]]), torch.tensor([1, 1, 0])
    losses = [math.log(2), 0.126928, 2.126928]
    assert loss_of(logits, labels, "binary-class", None, 0.0).item() == pytest.approx(sum(losses) / 3, abs=1e-6)
    weighted = (3 * losses[0] + 3 * losses[1] + 0.5 * losses[2]) / 3
    assert loss_of(logits, labels, "binary-class", torch.tensor([0.5, 3.0]), 0.0).item() == pytest.approx(
        weighted, abs=1e-6
    )
    smooth = [0.9 * losses[1] + 0.1 * losses[2]]  # smoothing 0.2: targets 0.9 and 0.1
    assert loss_of(logits[1:2], labels[1:2], "binary-class", None, 0.2).item() == pytest.approx(smooth[0], abs=1e-6)


def test_loss_of_classes_and_of_labels():
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    first = -math.log(math.e / (math.e + 2))
    for task in ("multi-class", "ordinal-regression"):
        assert loss_of(logits, torch.tensor([0, 2]), task, None, 0.0).item() == pytest.approx(
            (first + math.log(3)) / 2, abs=1e-6
        )
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    each = torch.tensor([[math.log(1 + math.exp(-1)), math.log(2), math.log(2)], [math.log(2)] * 3])
    assert loss_of(logits, labels, "multi-label, binary-class", None, 0.0).item() == pytest.approx(
        each.mean().item(), abs=1e-6
    )
    weighted = each.clone()
    weighted[0, 0] *= 5  # positives alone are weighted
    weighted[1, 1] *= 7
    assert loss_of(
        logits, labels, "multi-label, binary-class", torch.tensor([5.0, 7.0, 9.0]), 0.0
    ).item() == pytest.approx(weighted.mean().item(), abs=1e-6)


def test_weights_of_classes():
    labels = torch.tensor([0] * 6 + [1] * 2)
    assert weights_of_classes(labels, 2, "binary-class").tolist() == pytest.approx([8 / 12, 2])  # each class 4 in sum
    assert weights_of_classes(labels, 3, "multi-class").tolist() == pytest.approx(
        [8 / 18, 8 / 6, 8 / 3]
    )  # an absent class: as one case
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert weights_of_classes(labels.repeat(10, 1), 2, "multi-label, binary-class").tolist() == pytest.approx([1, 20])


class Greedy(torch.nn.Module):
    """Has memory for five images."""

    def __init__(self, most=5):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.most = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4 * 36, 1), most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.linear(self.conv(x).tanh().flatten(1))


def gradients(most, micro_batch=23):
    torch.manual_seed(1)
    images, labels = torch.randn(23, 1, 8, 8), (torch.arange(23) % 2)
    network = Greedy(most)
    loss_function = functools.partial(
        loss_of, task="binary-class", class_weights=torch.tensor([0.5, 2.0]), smoothing=0.1
    )
    loss, fitted = backward(
        network,
        images,
        labels,
        micro_batch,
        torch.optim.SGD(network.parameters()),
        torch.amp.GradScaler("cpu", enabled=False),
        torch.float32,
        loss_function,
    )
    return loss.item(), fitted, [p.grad for p in network.parameters()]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(capsys):
    whole, parts = gradients(most=100), gradients(most=5)
    assert whole[1] == 23 and parts[1] == 5  # 23 -> 11 -> 5
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[2], parts[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().out.splitlines() == [
        f"out of GPU memory: going on with {n} images at a time" for n in (11, 5)
    ]


def test_out_of_memory_with_four_images_ends_the_run(small_network, write_medmnist, refused, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        gradients(most=1)
    write_medmnist("data")
    monkeypatch.setattr(train_script, "backward", lambda *a: gradients(most=1))
    assert "out of memory: lower --batch-size" in refused(main, [*FAST, "--epochs", "1"])


def break_the_loss(monkeypatch, steps):
    """The loss of these training steps is infinite."""
    calls = []

    def broken(logits, *arguments, **options):
        loss = loss_of(logits, *arguments, **options)
        if logits.requires_grad:
            calls.append(1)
            if len(calls) in steps:
                return loss * math.inf
        return loss

    monkeypatch.setattr(train_script, "loss_of", broken)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(small_network, write_medmnist, monkeypatch):
    write_medmnist("data")
    break_the_loss(monkeypatch, {2, 5, 6})
    main([*FAST, "--epochs", "2", "--out-dir", "run"])
    rows = history("run/history.jsonl")
    assert [r["skipped_steps"] for r in rows] == [1, 2] and all(math.isfinite(r["train_loss"]) for r in rows)
    assert all(v.isfinite().all() for v in load_classifier("run/best.pt")[0].state_dict().values())


def test_a_loss_that_stays_not_finite_ends_the_run(small_network, write_medmnist, monkeypatch, refused):
    write_medmnist("data")
    break_the_loss(monkeypatch, range(40, 1000))  # from the second epoch on
    message = refused(main, [*FAST, "--limit", "64", "--batch-size", "2", "--epochs", "3", "--out-dir", "run"])
    assert "not finite in 20 steps in a row: lower --lr" in message
    assert (
        len(history("run/history.jsonl")) == 1 and torch.load("run/last.pt", weights_only=True)["values"]["epoch"] == 1
    )


def test_an_epoch_without_a_single_finite_step_has_no_loss(small_network, write_medmnist, monkeypatch, capsys):
    write_medmnist("data")
    break_the_loss(monkeypatch, range(1, 5))
    main([*FAST, "--epochs", "2", "--out-dir", "run"])
    rows = history("run/history.jsonl")
    assert rows[0]["train_loss"] is None and rows[0]["skipped_steps"] == 4 and math.isfinite(rows[1]["train_loss"])
    assert "loss –  val loss" in capsys.readouterr().out


@pytest.mark.parametrize("lr", ["50", "1e6"])
def test_a_learning_rate_that_is_too_high_is_a_sentence_and_publishes_nothing(lr, small_network, write_medmnist):
    write_medmnist("data")
    arguments = ["--data", "phantom", "--device", "cpu", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0"]
    try:
        main([*arguments, "--lr", lr, "--limit", "32", "--out-dir", "run"])
    except SystemExit as stop:
        assert stop.code == 2 and not Path("run/best.pt").exists() and not Path("run/metrics.json").exists()
    else:
        load_classifier("run/best.pt")  # bad, but a network with finite weights
    assert not Path("models").exists()


def test_a_validation_that_is_not_finite_is_a_sentence(small_network, write_medmnist, refused, monkeypatch):
    write_medmnist("data")
    original, calls = train_script.validate, []

    def spoilt(model, *rest):
        calls.append(1)
        if len(calls) == 2:
            model.fc.bias.data.fill_(math.nan)
        return original(model, *rest)

    monkeypatch.setattr(train_script, "validate", spoilt)
    message = refused(main, [*FAST, "--epochs", "3", "--out-dir", "run"])
    assert "validation after epoch 2: the network answers 32 of 32 images with NaN or infinity" in message
    assert "run keeps the epochs before" in message and not Path("run/best.pt").exists()
    assert len(history("run/history.jsonl")) == 1


def test_a_batch_that_overflows_does_not_spoil_the_steps_after_it(small_network, write_medmnist, monkeypatch):
    write_medmnist("data")
    original, calls = train_script.augment, []

    def overflowing(images, *rest):
        calls.append(1)
        return original(images, *rest) * (math.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(train_script, "augment", overflowing)
    main([*FAST, "--epochs", "2", "--out-dir", "run"])
    rows = history("run/history.jsonl")
    assert rows[0]["skipped_steps"] == 1 and all(math.isfinite(r["val_loss"]) for r in rows)


def test_normalisation_comes_from_the_training_images_alone(write_medmnist):
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8)
    normalised = normalise(images, train_script.pixel_statistics(images))
    assert normalised.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert normalised.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


# --- bad input ---

BAD = {
    "no epochs": (["--epochs", "0"], "must be between 1 and 100000"),
    "no images per step": (["--batch-size", "0"], "must be at least 1"),
    "one image per step": (["--batch_size", "1"], "--batch-size must be at least 2"),
    "words": (["--epochs", "many"], "--epochs"),
    "no learning rate": (["--lr", "0"], "must be above 0"),
    "not a number": (["--lr", "nan"], "must be above 0"),
    "smoothing of all": (["--label-smoothing", "1"], "must be below 1"),
    "smoothing of more": (["--label-smoothing", "1.5"], "between 0 and 1"),
    "negative": (["--weight-decay", "-1"], "must be 0 or more"),
    "a seed of 64 bits": (["--seed", str(2**63 - 1)], "must be between 0 and 4294967295"),
    "a negative seed": (["--seeds", "-1"], "must be between 0 and 4294967295"),
    "too many epochs": (["--epochs", "9" * 30], "must be between 1 and 100000"),
    "huge": (["--lr", "1e300"], "must be at most 1e+06"),
    "long": (["--warmup-epochs", "1e308"], "must be at most 1e+06"),
    "float16 on a CPU": (["--dtype", "float16"], "--dtype float16 is for GPUs"),
    "a seed twice": (["--seeds", "1", "1"], "names a seed twice"),
    "unknown network": (["--arch", "vgg16"], "invalid choice"),
    "unknown size": (["--image-size", "32"], "invalid choice"),
    "unknown option": (["--epoch", "3"], "unrecognized arguments: --epoch"),
    "unknown data": (["--data", "xraymnist"], "there is no 2-D MedMNIST set 'xraymnist'"),
    "three dimensions": (["--data", "organmnist3d"], "there is no 2-D MedMNIST set 'organmnist3d'"),
    "one class": (["--data", "phantom", "--limit", "1"], "all of one class; raise --limit"),
    "resume nothing": (["--data", "phantom", "--resume", "nowhere/last.pt"], "there is nothing at nowhere/last.pt"),
    "config": (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, message, refused, own_folder):
    assert message in refused(main, [*arguments, "--device", "cpu"])
    assert list(own_folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--weight-decay", "nan"], ["--warmup-epochs", "nan"], ["--warmup-epochs", "inf"]]
)
def test_numbers_that_are_none_are_refused(arguments):
    with pytest.raises(SystemExit) as stop:
        parse_args(arguments)
    assert stop.value.code == 2


def test_cuda_without_a_gpu(refused, own_folder):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    assert "--device cuda: torch sees no CUDA GPU" in refused(main, ["--device", "cuda", "--data", "phantom"])
    assert list(own_folder.iterdir()) == []


def test_an_output_folder_that_is_a_file(refused, write_medmnist):
    write_medmnist("data")
    Path("taken").write_text("mine")
    assert "cannot use taken" in refused(main, [*FAST, "--out-dir", "taken"])
    assert "cannot use taken" in refused(main, [*FAST, "--out-dir", "taken/run"])
    assert Path("taken").read_text() == "mine"


def test_an_output_folder_that_cannot_be_written(refused, write_medmnist):
    write_medmnist("data")
    Path("locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "choose another place (--out-dir" in refused(main, [*FAST, "--out-dir", "locked/run"])


def test_a_set_asked_for_by_name_is_never_replaced(refused, own_folder, monkeypatch):
    import medmnist

    def no_network(**options):
        raise RuntimeError("no network")

    monkeypatch.setattr(medmnist, "PneumoniaMNIST", no_network)
    message = refused(main, ["--data", "PneumoniaMNIST", "--data-dir", "data", "--device", "cpu"])
    assert "is not in data and could not be downloaded; fetch https://" in message and message.endswith(
        "data/pneumoniamnist.npz"
    )
    assert not any(own_folder.rglob("*.*"))


def test_validation_without_a_class_is_refused(small_network, write_medmnist, refused):
    path = write_medmnist("data", "bloodmnist")
    arrays = dict(np.load(path))
    arrays["val_labels"][:] = 3
    np.savez_compressed(path, **arrays)
    arguments = ["--data", "bloodmnist", "--data-dir", "data", "--epochs", "1", "--device", "cpu", "--batch-size", "16"]
    assert "no AUC to choose by" in refused(main, arguments)
    assert not Path("outputs").exists()


# --- from another folder ---


@pytest.mark.slow
def test_a_dry_run_from_another_folder(own_folder, start_script):
    assert start_script([ROOT / "task1_classification" / "train.py", "--dry_run"], own_folder).wait(PATIENCE) == 0, (
        Path("output.txt").read_text()
    )
    metrics = read("outputs/task1_classification/train/dry-run/metrics.json")
    assert metrics["dataset"]["phantom"] and metrics["runs"][0]["val_auc"] >= 0
    assert sorted(p.name for p in own_folder.iterdir()) == ["output.txt", "outputs"]
