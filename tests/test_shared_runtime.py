"""runtime.py: arguments, refusals, files that are whole or absent, run folders."""

import argparse
import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import runtime
from shared.runtime import InputError, add_resume, atomic_file, check_plain, fraction, load_checkpoint, newest_run
from shared.runtime import next_number, open_run_dir, peak_memory, pick_device, plain, positive_float, positive_int
from shared.runtime import read_json, resume_dir, run_facts, save_checkpoint, script, script_parser, seed_everything
from shared.runtime import start_distributed, write_csv, write_json, write_jsonl

# --- arguments ---


def parser():
    p = script_parser("A script.", task="task1_classification", data="PneumoniaMNIST")
    p.add_argument("--batch-size", type=positive_int, default=64)
    p.add_argument("--lr", type=positive_float, default=0.1)
    p.add_argument("--model", default="tiny")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--verbose", action="store_true")
    p.add_argument("--seeds", type=int, nargs="+")
    add_resume(p)
    return p


def parse(*arguments):
    return parser().parse_args([str(a) for a in arguments])


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "error: " in printed.err
    return printed.err


def test_underscores_and_aliases():
    assert (
        parse("--batch_size", "8").batch_size
        == parse("--batch_size=8").batch_size
        == parse("--batch-size=8").batch_size
        == 8
    )
    args = parse("--base_model", "a_b", "--output_dir=some_where", "--dataset", "Phantom_X")
    assert (args.model, args.out_dir, args.data) == ("a_b", "some_where", "Phantom_X")  # values keep their underscores


def test_no_abbreviations(capsys):
    assert "unrecognized arguments: --batch 3" in failure(capsys, "--batch", "3")


def test_values_that_cannot_be(capsys):
    assert "must be at least 1, not 0" in failure(capsys, "--batch-size", 0)
    assert "must be above 0" in failure(capsys, "--lr", "-1") and "must be above 0" in failure(capsys, "--lr", "inf")
    assert "invalid choice" in failure(capsys, "--device", "tpu") and "--batch-size" in failure(
        capsys, "--batch-size", "1.5"
    )


@pytest.mark.parametrize("text, value", [("0", 0), ("1", 1), ("0.25", 0.25)])
def test_fraction(text, value):
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan"])
def test_not_a_fraction(text):
    with pytest.raises(argparse.ArgumentTypeError, match="between 0 and 1"):
        fraction(text)


def test_help_names_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "A script." in text and "outputs/task1_classification/<script>/<number>" in text and "--data-dir" in text


def test_data_dir_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MEDVLM_DATA", "some/where")
    assert parse().data_dir == "some/where" and parse("--data-dir", "here").data_dir == "here"
    monkeypatch.delenv("MEDVLM_DATA")
    assert parse().data_dir == "data"


SETTINGS = {
    "batch_size": 8,
    "lr": 1e-3,
    "base_model": "x",
    "amp": False,
    "verbose": True,
    "seeds": [3, 4],
    "out-dir": None,
    "resume": "run",
}


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
@pytest.mark.parametrize("flag", ["--config", "--cfg"])
def test_config_file(name, flag):
    lines = [
        f"{k}: {'null' if v is None else str(v).lower() if isinstance(v, bool) else v}" for k, v in SETTINGS.items()
    ]
    Path(name).write_text(json.dumps(SETTINGS) if name.endswith("json") else "\n".join(lines))
    args = parse(flag, name)
    assert (args.batch_size, args.lr, args.model, args.amp, args.verbose, args.seeds, args.out_dir, args.resume) == (
        8,
        0.001,
        "x",
        False,
        True,
        [3, 4],
        None,
        "run",
    )
    args = parse(f"{flag}={name}", "--batch-size", "9", "--amp", "--seeds", "5")  # the command line wins
    assert (args.batch_size, args.amp, args.seeds, args.lr) == (9, True, [5], 0.001)


def test_config_beside_the_script(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "small.yaml").write_text("batch-size: 3")
    p = parser()
    p.script_dir = tmp_path / "task"
    assert p.parse_args(["--config", "small.yaml"]).batch_size == 3
    Path("small.yaml").write_text("batch-size: 4")
    assert p.parse_args(["--config", "small.yaml"]).batch_size == 4  # the working folder comes first
    assert parser().script_dir == Path(runtime.__file__).parents[1] / "task1_classification"


@pytest.mark.parametrize(
    "text, message",
    [
        ("batchsize: 3", "'batchsize' in settings.yaml is not an option of this script"),
        ("config: other.yaml", "'config' in settings.yaml is not an option"),
        ("batch_size: 0", "must be at least 1"),
        ("device: tpu", "invalid choice"),
        ("amp: 'no'", "'amp' in settings.yaml must be true or false, not 'no'"),
        ("verbose: 1", "'verbose' in settings.yaml must be true or false, not 1"),
        ("- a\n- b", "must hold names and values"),
        ("", "must hold names and values"),
        ("a: [1", "is not readable as YAML or JSON"),
    ],
)
def test_config_that_cannot_be_used(text, message, capsys):
    Path("settings.yaml").write_text(text)
    assert message in failure(capsys, "--config", "settings.yaml")


def test_config_that_is_nowhere(capsys):
    assert "there is no file nowhere.yaml" in failure(capsys, "--config", "nowhere.yaml")


# --- device and seed ---


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch sees no CUDA GPU; use --device cpu"):
        pick_device("cuda")
    with pytest.raises(InputError, match="--device mps: torch sees no Apple GPU"):
        pick_device("mps")


def test_the_choice_is_printed_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == (torch.device("cpu"), torch.float32)
    assert capsys.readouterr().out == "device: cpu (no GPU is there), dtype: float32 (the safe choice outside CUDA)\n"
    assert pick_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert capsys.readouterr().out == "device: cpu (asked for), dtype: bfloat16 (asked for)\n"
    monkeypatch.setenv("RANK", "1")
    pick_device()
    assert capsys.readouterr().out == ""  # one process speaks


def test_seed_everything():
    def draw():
        import random

        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(2**33 + 1)  # NumPy takes 32 bits
    assert draw() != first


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_distributed("cpu") == (0, 1) and not torch.distributed.is_initialized()


def test_run_facts():
    facts = run_facts(0, "cpu")
    assert facts["seconds"] > 1e9 and facts["peak_gpu_gib"] is None and 0.01 < facts["peak_ram_gib"] < 1000
    assert facts["hardware"]["device"] == "cpu" and facts["versions"]["torch"] == str(torch.__version__)
    json.dumps(facts, allow_nan=False)
    assert peak_memory("cpu")["peak_ram_gib"] >= facts["peak_ram_gib"]


# --- files ---


def test_a_failure_while_writing_leaves_the_old_file():
    Path("folder").mkdir()
    Path("folder/a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file("folder/a.txt", "w") as file:
        file.write("half")
        file.flush()
        assert [p.name for p in Path("folder").glob(".a.txt.*.part")] != []
        _ = 1 / 0
    assert [p.name for p in Path("folder").iterdir()] == ["a.txt"] and Path("folder/a.txt").read_text() == "old"
    with atomic_file("folder/deeper/a.bin") as file:
        file.write(b"new")
    assert Path("folder/deeper/a.bin").read_bytes() == b"new" and len(list(Path("folder/deeper").iterdir())) == 1


def test_checkpoints_hold_plain_values_only():
    state = {
        "a": torch.arange(3),
        "b": [1, 2.5, None, True, "x"],
        "c": {"d": (1, {"e": torch.zeros(0)})},
        3: "number as key",
    }
    save_checkpoint("a.pt", state)
    back = load_checkpoint("a.pt")
    assert (
        torch.equal(back["a"], state["a"])
        and back["b"] == state["b"]
        and back[3] == "number as key"
        and back["c"]["d"][0] == 1
    )
    for value, where in [
        ({"a": {"b": Path("x")}}, r"checkpoint\['a'\]\['b'\] is a PosixPath"),
        ([1, np.float64(2)], r"checkpoint\[1\] is a float64"),
        ({"n": torch.nn.Linear(1, 1)}, "Linear"),
    ]:
        with pytest.raises(TypeError, match=where):
            check_plain(value)
        before = Path("a.pt").read_bytes()
        with pytest.raises(TypeError):
            save_checkpoint("a.pt", value)
        assert Path("a.pt").read_bytes() == before and len(list(Path().iterdir())) == 1


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap-was-run"),)


def test_pickled_code_is_refused_and_never_run():
    for use_zip in (True, False):
        torch.save({"model": {"w": torch.zeros(1)}, "trap": Trap()}, "trap.pt", _use_new_zipfile_serialization=use_zip)
        with pytest.raises(
            InputError, match="trap.pt cannot be read as a classifier: it holds pickled Python code, which is never run"
        ):
            load_checkpoint("trap.pt", what="classifier")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    with pytest.raises(InputError, match="pickled Python code"):
        load_checkpoint("module.pt")
    assert not Path("trap-was-run").exists()
    torch.load("trap.pt", weights_only=False)  # the trap works
    assert Path("trap-was-run").exists()


def test_checkpoints_that_cannot_be_read():
    save_checkpoint("whole.pt", {"a": torch.randn(5000)})
    whole = Path("whole.pt").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1000], bytes(100)):
        Path("bad.pt").write_bytes(content)
        with pytest.raises(InputError, match="bad.pt cannot be read as a checkpoint"):
            load_checkpoint("bad.pt")
    with pytest.raises(InputError, match="there is no index at gone.pt; give the path of one, or train it first"):
        load_checkpoint("gone.pt", what="index")
    with pytest.raises(InputError, match="there is no checkpoint at folder"):
        Path("folder").mkdir()
        load_checkpoint("folder")


def test_checkpoints_that_lack_something():
    save_checkpoint("a.pt", {"a": 1, "b": 2})
    assert load_checkpoint("a.pt", ("a", "b")) == {"a": 1, "b": 2}
    with pytest.raises(InputError, match="a.pt is not a checkpoint of this script: it lacks c, d"):
        load_checkpoint("a.pt", ("a", "c", "d"))
    save_checkpoint("list.pt", [1, 2])
    with pytest.raises(InputError, match="it lacks a"):
        load_checkpoint("list.pt", ("a",))


def test_json_is_plain():
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "np": np.float32(0.5),
        "int": np.int64(7),
        "array": np.array([[1.0, np.nan]]),
        "bool": np.bool_(True),
        "tensor": torch.tensor([1, 2]),
        "path": Path("a/b"),
        "none": None,
        "tuple": (1, "x"),
        5: "key",
        "umlaut": "für",
    }
    write_json("a.json", value)
    expected = {
        "nan": None,
        "inf": [None, None],
        "np": 0.5,
        "int": 7,
        "array": [[1.0, None]],
        "bool": True,
        "tensor": [1, 2],
        "path": os.path.join("a", "b"),
        "none": None,
        "tuple": [1, "x"],
        "5": "key",
        "umlaut": "für",
    }
    assert (
        read_json("a.json") == expected == plain(value)
        and "NaN" not in Path("a.json").read_text()
        and "für" in Path("a.json").read_text("utf-8")
    )
    write_jsonl("a.jsonl", [{"a": np.float64("nan")}, {"a": 2}])
    assert Path("a.jsonl").read_text() == '{"a": null}\n{"a": 2}\n'


def test_csv_comes_back_as_it_was():
    rows = [{"path": 'a, "b".png', "error": "two\nlines"}, {"path": "für.png", "error": ""}]
    write_csv("a.csv", rows)
    with open("a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_json_that_cannot_be_read():
    Path("bad.json").write_text("{")
    Path("bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("bad.json", "bytes.json", "gone.json"):
        with pytest.raises(InputError, match=f"{name} cannot be read as JSON"):
            read_json(name)


# --- run folders ---


def test_folders_are_numbered(capsys):
    assert open_run_dir(parse(), "task", "train") == Path("outputs/task/train/001")
    assert open_run_dir(parse(), "task", "train") == Path("outputs/task/train/002")
    Path("outputs/task/train/0007").mkdir()
    Path("outputs/task/train/9notes").mkdir()
    assert open_run_dir(parse("--seed", 4), "task", "train") == Path("outputs/task/train/008")
    assert capsys.readouterr().out.splitlines()[-1] == "results go to outputs/task/train/008"
    settings = read_json("outputs/task/train/008/settings.json")
    assert settings["seed"] == 4 and settings["batch_size"] == 64 and "command" in settings and "config" not in settings
    assert next_number(Path("nowhere")) == Path("nowhere/001")


def test_a_folder_that_holds_a_run_is_not_written_over():
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    run = open_run_dir(parse("--out-dir", "mine"), "task", "train")  # a folder without a run may be used
    for name in (
        "last.pt",
        "metrics.json",
        "history.jsonl",
        "predictions.csv",
        "report.md",
        "figures/curves.png",
        "seed0/best.pt",
        "heatmaps/0.png",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("of the run")
    with pytest.raises(
        InputError,
        match="mine already holds a run; go on with --resume, replace it with --overwrite, or name another --out-dir",
    ):
        open_run_dir(parse("--out-dir", "mine"), "task", "train")
    assert (
        open_run_dir(parse("--out-dir", "mine", "--resume"), "task", "train") == Path("mine")
        and (run / "last.pt").exists()
    )
    open_run_dir(parse("--out-dir", "mine", "--overwrite"), "task", "train")
    assert sorted(str(p) for p in run.rglob("*")) == ["mine/notes.txt", "mine/settings.json"]


def test_resume_uses_the_folder_of_the_run():
    run = open_run_dir(parse("--out-dir", "run"), "task", "train")
    (run / "seed3").mkdir()
    for path in ("last.pt", "seed3/last.pt"):
        (run / path).touch()
    for path in ("run", "run/last.pt", "run/seed3", "run/seed3/last.pt"):
        assert resume_dir(path) == Path("run") == open_run_dir(parse("--resume", path), "task", "train")
    assert not Path("outputs").exists()
    with pytest.raises(InputError, match="--resume: there is nothing at gone.pt"):
        open_run_dir(parse("--resume", "gone.pt"), "task", "train")


def test_dry_runs_share_a_folder():
    run = open_run_dir(parse("--dry-run"), "task", "train")
    (run / "metrics.json").write_text("{}")
    assert open_run_dir(parse("--dry-run"), "task", "train") == run == Path("outputs/task/train/dry-run")
    assert [p.name for p in run.iterdir()] == ["settings.json"]
    assert open_run_dir(parse(), "task", "train") == Path("outputs/task/train/001")


def test_newest_run():
    assert newest_run("task", "train", "metrics.json") is None
    for name, finished in (("001", True), ("002", True), ("003", False), ("dry-run", True)):
        folder = Path("outputs/task/train") / name
        folder.mkdir(parents=True)
        if finished:
            (folder / "metrics.json").touch()
    assert newest_run("task", "train", "metrics.json") == Path("outputs/task/train/002")


def test_newest_of_a_thousand_runs():
    for name in ("998", "999", "1000"):
        Path("outputs/task/train", name).mkdir(parents=True)
        Path("outputs/task/train", name, "metrics.json").touch()
    assert newest_run("task", "train", "metrics.json").name == "1000"


# --- the decorator of every main ---


def ending(error, capsys):
    @script
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_failures_a_user_can_mend_are_one_sentence(capsys):
    assert ending(InputError("the file is empty"), capsys) == "error: the file is empty\n"
    assert (
        ending(torch.OutOfMemoryError("CUDA out of memory. Tried"), capsys)
        == "error: the GPU is out of memory: lower --batch-size, or close what else runs on the card\n"
    )
    assert (
        ending(PermissionError(13, "Permission denied", "locked/run"), capsys)
        == "error: cannot use locked/run: Permission denied; choose another folder with --out-dir\n"
    )
    assert (
        ending(NotADirectoryError(20, "Not a directory", "file/run"), capsys)
        == "error: cannot use file/run: Not a directory; choose another folder with --out-dir\n"
    )
    for number, text in ((30, "Read-only file system"), (28, "No space left on device")):
        assert (
            ending(OSError(number, text, "out/a.pt"), capsys)
            == f"error: cannot write out/a.pt: {text}; choose another --out-dir\n"
        )
        assert "cannot write the results" in ending(OSError(number, text), capsys)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("a bug"),
        OSError(5, "Input/output error"),
        AssertionError(),
        FileNotFoundError(2, "No such file or directory", "x"),
    ],
)
def test_other_failures_keep_their_traceback(error):
    @script
    def main(argv=None):
        raise error

    with pytest.raises(type(error)) as raised:
        main([])
    assert raised.value is error


def test_the_decorator_passes_arguments_results_and_exits_on():
    @script
    def main(argv=None):
        """What it does."""
        if argv:
            raise SystemExit(143)
        return 7

    assert main() == 7 and main.__doc__ == "What it does." and main.__name__ == "main"
    with pytest.raises(SystemExit) as stop:
        main(["x"])
    assert stop.value.code == 143


def test_a_place_that_cannot_be_written(monkeypatch, refused):
    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system", "locked/settings.json")

    @script
    def main(argv=None):
        args = parser().parse_args(argv)
        monkeypatch.setattr("builtins.open", read_only)
        try:
            open_run_dir(args, "task", "train")
        finally:
            monkeypatch.undo()

    assert "cannot write locked/settings.json: Read-only file system" in refused(main, ["--out-dir", "here"])
