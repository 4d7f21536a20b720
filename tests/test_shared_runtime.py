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
from shared.runtime import atomic_folder, clear_run, command, new_numbered, not_negative, open_run_dir, peak_memory
from shared.runtime import pick_device, plain, positive_float, positive_int, read_json, record, resume_dir, run_facts
from shared.runtime import run_kind, save_checkpoint, script, script_parser, seed_everything, seed_number
from shared.runtime import start_distributed
from shared.runtime import write_csv, write_json, write_jsonl

# --- arguments ---


def parser():
    p = script_parser("A script.", task="task1_classification", data="PneumoniaMNIST")
    p.add_argument("--batch-size", type=positive_int, default=64)
    p.add_argument("--lr", type=positive_float, default=0.1)
    p.add_argument("--model", default="tiny")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--verbose", action="store_true")
    p.add_argument("--seeds", type=seed_number, nargs="+")
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
    assert "must be at most 1e+06, not 1e300" in failure(capsys, "--lr", "1e300")
    assert "must be at most 1e+09" in failure(capsys, "--limit", 10**30)
    for seed in ("-1", 2**32, 2**63 - 1, 10**30):
        assert f"must be between 0 and 4294967295, not {seed}" in failure(capsys, f"--seed={seed}")
    assert "holds a NUL character" in failure(capsys, "--out-dir", "a\0b")
    assert "invalid choice" in failure(capsys, "--device", "tpu") and "--batch-size" in failure(
        capsys, "--batch-size", "1.5"
    )


@pytest.mark.parametrize("text, value", [("0", 0), ("1", 1), ("0.25", 0.25)])
def test_fraction(text, value):
    assert fraction(text) == value


def test_not_negative():
    assert not_negative("0") == 0 and not_negative("2.5") == 2.5
    for text in ("-0.1", "nan", "inf", "1e308"):
        with pytest.raises(argparse.ArgumentTypeError):
            not_negative(text)


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
        ("seeds: [a]", "invalid number value: 'a'"),
        ("seeds: []", "'seeds' in settings.yaml cannot be []"),
        ("lr: [1, 2]", "'lr' in settings.yaml cannot be [1, 2]"),
        ("lr: {a: 1}", "'lr' in settings.yaml cannot be {'a': 1}"),
        ("a: [1", "is not readable as YAML or JSON"),
    ],
)
def test_config_that_cannot_be_used(text, message, capsys):
    Path("settings.yaml").write_text(text)
    assert message in failure(capsys, "--config", "settings.yaml")


def test_deep_and_odd_files_are_refused(capsys):
    for text in ("[" * 5000, "seed: 2024-13-45", "seed: !!int abc", "seed: " + "9" * 6000):
        Path("settings.yaml").write_text(text)
        failure(capsys, "--config", "settings.yaml")
    Path("deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="deep.json cannot be read as JSON"):
        read_json("deep.json")


def test_a_list_in_a_config_leaves_the_positional_arguments_alone():
    p = parser()
    p.add_argument("images", nargs="*")
    Path("settings.yaml").write_text("seeds: [3, 4]")
    args = p.parse_args(["--config", "settings.yaml", "a.png", "b.png"])
    assert (args.seeds, args.images) == ([3, 4], ["a.png", "b.png"])
    assert p.parse_args(["a.png", "--config", "settings.yaml", "--seeds", "5"]).seeds == [5]


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
    with pytest.raises(InputError, match="--dtype float16 is for GPUs"):
        pick_device("cpu", "float16")
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


def test_a_flipped_byte_is_noticed():
    save_checkpoint("whole.pt", {"a": torch.randn(5000), "b": 1})
    whole, rng = Path("whole.pt").read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 40):
        Path("bad.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        try:
            assert torch.equal(load_checkpoint("bad.pt")["a"], load_checkpoint("whole.pt")["a"])  # padding, a date
        except InputError as error:
            assert "pickled" not in str(error)
    place = whole.index(load_checkpoint("whole.pt")["a"].numpy().tobytes()) + 7000
    Path("bad.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
    with pytest.raises(InputError, match="bad.pt cannot be read as a checkpoint: the file is damaged"):
        load_checkpoint("bad.pt")


def test_a_full_disk_while_saving_is_said_so(monkeypatch):
    save_checkpoint("a.pt", {"a": 1})

    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device: 'a.pt'"):
        save_checkpoint("a.pt", {"a": 2})
    assert load_checkpoint("a.pt") == {"a": 1} and [p.name for p in Path().iterdir()] == ["a.pt"]


def test_a_folder_is_whole_or_absent():
    for text in ("old", "new"):
        with atomic_folder("run/adapter") as folder:
            (folder / f"{text}.txt").write_text(text)
    with pytest.raises(ZeroDivisionError), atomic_folder("run/adapter") as folder:
        (folder / "half.txt").write_text("half")
        _ = 1 / 0
    assert files_of("run") == ["adapter", "adapter/new.txt"]


def test_names_of_any_bytes_can_be_written():
    name = os.fsdecode(b"caf\xe9.png")
    write_csv("a.csv", [{"path": name}])
    write_json("a.json", {"path": name})
    assert "caf\\udce9.png" in Path("a.csv").read_text("utf-8") and read_json("a.json")["path"] == name


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
    Path("outputs/task/train/1²").mkdir()  # a digit, and no number
    assert new_numbered(Path("outputs/task/train")) == Path("outputs/task/train/009")


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.name != ".written")


def test_a_folder_that_holds_a_run_is_not_written_over():
    mine = ["notes.txt", "my_patients.csv", "report.md", "figures/mine.png", "seed_images/a.png", "seedlist.txt"]
    for name in mine:
        Path("mine", name).parent.mkdir(parents=True, exist_ok=True)
        Path("mine", name).write_text("keep")
    run = open_run_dir(parse("--out-dir", "mine"), "task", "train")  # a folder without a run may be used
    for name in ("metrics.json", "figures/curves.png", "seed0/deep/best.pt", "odd\n$name.csv"):
        with atomic_file(run / name, "w") as file:
            file.write("of the run")
    (run / "heatmaps").mkdir()
    (run / "heatmaps/0.png").write_text("written without atomic_file")
    record(run / "heatmaps")
    with pytest.raises(
        InputError,
        match="mine already holds a run; go on with --resume, replace it with --overwrite, or name another --out-dir",
    ):
        open_run_dir(parse("--out-dir", "mine"), "task", "train")
    assert open_run_dir(parse("--out-dir", "mine", "--resume"), "task", "train") == Path("mine")
    write_json(run / "later.json", {})  # what the resumed run adds is written down too
    (run / "figures/mine later.png").write_text("keep")
    open_run_dir(parse("--out-dir", "mine", "--overwrite"), "task", "train")
    folders = ["figures", "seed_images"]
    assert files_of("mine") == sorted([*mine, *folders, "figures/mine later.png", "settings.json"])


def test_what_is_written_down_never_leads_out_of_the_folder():
    run = open_run_dir(parse("--out-dir", "mine"), "task", "train")
    Path("precious.txt").write_text("keep")
    Path("elsewhere").mkdir()
    Path("elsewhere/a.txt").write_text("keep")
    (run / "link").symlink_to(Path("elsewhere").absolute())
    with open(run / ".written", "a") as file:
        file.write('"../precious.txt"\n"link/a.txt"\n"' + str(Path("precious.txt").absolute()) + '"\n5\n"cut sho')
    clear_run(run)
    assert Path("precious.txt").exists() and Path("elsewhere/a.txt").exists() and not (run / "settings.json").exists()


def test_a_run_that_was_refused_before_it_wrote_leaves_its_folder_free():
    open_run_dir(parse("--out-dir", "mine"), "task", "train")
    assert open_run_dir(parse("--out-dir", "mine", "--seed", 3), "task", "train") == Path("mine")
    assert read_json("mine/settings.json")["seed"] == 3
    Path("old").mkdir()
    Path("old/settings.json").write_text("{}")  # not one of ours, or of an older version
    with pytest.raises(InputError, match="old already holds a run"):
        open_run_dir(parse("--out-dir", "old"), "task", "train")


def test_overwrite_does_not_remove_what_is_read():
    run = open_run_dir(parse("--out-dir", "mine"), "task", "train")
    write_json(run / "best/model.json", {})
    for name in ("mine/best/model.json", "mine/best", "mine"):
        args = parse("--out-dir", "mine", "--overwrite")
        args.images = ["elsewhere.png", name]
        with pytest.raises(InputError, match=f"mine holds {name}, which is read here"):
            open_run_dir(args, "task", "train")
    assert files_of("mine") == ["best", "best/model.json", "settings.json"]
    args.images = ["elsewhere.png", "."]  # a folder around the run is not read from the run
    assert open_run_dir(args, "task", "train") == run and files_of("mine") == ["settings.json"]


def test_parts_of_a_killed_process_are_removed():
    run = open_run_dir(parse("--out-dir", "mine"), "task", "train")
    (run / "seed0").mkdir()
    (run / "seed0/.last.pt.123.part").write_text("half")
    (run / ".adapter.123.part").mkdir()
    (run / ".adapter.123.part/a").write_text("half")
    write_json(run / "metrics.json", {})
    open_run_dir(parse("--out-dir", "mine", "--resume"), "task", "train")
    assert files_of("mine") == ["metrics.json", "seed0", "settings.json"]


HOLDS_A_FOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from shared.runtime import open_run_dir, script, script_parser, add_resume

@script
def main(argv=None):
    parser = script_parser("A script.", task="task")
    add_resume(parser)
    run_dir = open_run_dir(parser.parse_args(argv), "task", "train")
    (run_dir / (sys.argv[-1] + ".here")).touch()
    time.sleep({seconds})

main(sys.argv[1:-1])
"""


@pytest.mark.slow
def test_processes_never_share_a_run_folder(own_folder, start_script):
    root = str(Path(runtime.__file__).parents[1])
    Path("hold.py").write_text(HOLDS_A_FOLDER.format(root=root, seconds=2))
    numbered = [start_script(["hold.py", str(i)], own_folder) for i in range(4)]
    assert [p.wait(300) for p in numbered] == [0] * 4
    runs = sorted(Path("outputs/task/train").iterdir())
    assert [r.name for r in runs] == ["001", "002", "003", "004"] and all(
        len(list(r.glob("*.here"))) == 1 for r in runs
    )
    Path("hold.py").write_text(HOLDS_A_FOLDER.format(root=root, seconds=600))
    first = start_script(["hold.py", "--out-dir", "mine", "a"], own_folder)
    while not Path("mine/a.here").exists():
        assert first.poll() is None, Path("output.txt").read_text()
    for more in ([], ["--overwrite"], ["--resume"]):
        with pytest.raises(InputError, match="another process is writing into mine"):
            open_run_dir(parse("--out-dir", "mine", *more), "task", "train")
    first.kill()
    first.wait()
    open_run_dir(parse("--out-dir", "mine", "--resume"), "task", "train")  # the lock went with the process


def test_places_that_no_folder_can_have(refused):
    @script
    def main(argv=None):
        open_run_dir(parser().parse_args(argv), "task", "train")

    Path("file").write_text("mine")
    for place in ("x" * 300, "file", "file/run", "a/" * 3000):
        assert "cannot use " in refused(main, ["--out-dir", place])
    assert Path("file").read_text() == "mine"


def test_a_refusal_leaves_no_empty_run(refused):
    @script
    def main(argv=None):
        open_run_dir(parser().parse_args(argv), "task", "train")
        raise InputError("later")

    for arguments in ([], ["--out-dir", "mine"], ["--dry-run"]):
        assert refused(main, arguments) == "error: later"
    assert not Path("mine").exists() and not any(p.is_file() for p in Path("outputs").rglob("*"))
    run = open_run_dir(parse("--out-dir", "mine"), "task", "train")  # killed before it saved anything ...
    runtime.RUNS.clear()
    refused(main, ["--out-dir", "mine", "--resume"])
    assert (run / "settings.json").exists()  # ... can still be resumed


def test_the_lock_ends_with_the_script():
    @script
    def main(argv=None):
        run_dir = open_run_dir(parser().parse_args(argv), "task", "train")
        assert Path("mine").absolute() in runtime.RUNS
        write_json(run_dir / "metrics.json", {})
        raise InputError("later")

    with pytest.raises(SystemExit):
        main(["--out-dir", "mine"])
    assert Path("mine").absolute() not in runtime.RUNS


def test_resume_in_a_config_takes_the_settings_of_the_run_too(tmp_path):
    run = tmp_path / "run"
    write_json(run / "settings.json", {"batch_size": 8, "lr": 0.5, "model": "big", "out_dir": "elsewhere"})
    (tmp_path / "on.yaml").write_text(f"resume: {run}\nlr: 0.25\n")
    for given in (["--resume", run, "--lr", 0.25], ["--config", tmp_path / "on.yaml"]):
        args = parse(*given)
        assert (args.batch_size, args.lr, args.model, args.out_dir) == (8, 0.25, "big", None)


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
    write_json(run / "metrics.json", {})
    assert open_run_dir(parse("--dry-run"), "task", "train") == run == Path("outputs/task/train/dry-run")
    assert files_of(run) == ["settings.json"]
    assert open_run_dir(parse(), "task", "train") == Path("outputs/task/train/001")


def finished_run(name, limit=None, phantom=False, finished=True):
    folder = Path("outputs/task/train") / name
    write_json(folder / "settings.json", {"limit": limit})
    if finished:
        write_json(folder / "metrics.json", {"dataset": {"phantom": phantom}})
    return folder


def test_the_newest_of_the_best_runs_is_taken_and_said_so(capsys):
    assert newest_run("task", "train", "metrics.json") is None and capsys.readouterr().out == ""
    finished_run("dry-run", phantom=True)
    limited = finished_run("998", limit=96)
    assert newest_run("task", "train", "metrics.json") == limited
    phantom = finished_run("999", phantom=True)
    assert newest_run("task", "train", "metrics.json") == phantom
    real = finished_run("1000")
    assert newest_run("task", "train", "metrics.json") == real  # 1000 is newer than 999
    capsys.readouterr()
    finished_run("1001", phantom=True)
    finished_run("1002", limit=96, phantom=True)
    finished_run("1003", finished=False)
    assert newest_run("task", "train", "*.json") == Path("outputs/task/train/1003") and capsys.readouterr()
    assert newest_run("task", "train", "metrics.json") == real
    assert capsys.readouterr().out == (
        "taking outputs/task/train/1000 (real data); passed over 1002 (--limit 96, phantom), 1001 (phantom)\n"
    )
    assert run_kind("outputs/task/train/1003") == {"limit": None, "phantom": False, "finished": False}
    assert run_kind("outputs/task/train/1002") == {"limit": 96, "phantom": True, "finished": True}


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
        == "error: cannot use locked/run: Permission denied; choose another place (--out-dir, or what named this one)\n"
    )
    assert (
        ending(NotADirectoryError(20, "Not a directory", "file/run"), capsys)
        == "error: cannot use file/run: Not a directory; choose another place (--out-dir, or what named this one)\n"
    )
    for number, text in ((30, "Read-only file system"), (28, "No space left on device")):
        assert (
            ending(OSError(number, text, "out/a.pt"), capsys)
            == f"error: cannot write out/a.pt: {text}; choose another place (--out-dir, or what named this one)\n"
        )
        assert "cannot write the results" in ending(OSError(number, text), capsys)
    assert "cannot write the results: No space left" in ending(OSError("19200 requested and 4000 written"), capsys)
    assert "File name too long" in ending(OSError(36, "File name too long", "x" * 300), capsys)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):
        assert ending(error, capsys).startswith("error: there is not enough memory: lower --batch-size")


def test_ctrl_c_and_a_closed_pipe_are_no_bugs(capsys):
    for error, code, says in ((KeyboardInterrupt(), 130, "error: interrupted\n"), (BrokenPipeError(32, "x"), 141, "")):

        @script
        def main(argv=None, error=error):
            raise error

        with pytest.raises(SystemExit) as stop:
            main([])
        assert stop.value.code == code and capsys.readouterr().err == says


def test_commands_can_be_pasted(monkeypatch):
    root = Path(runtime.__file__).parents[1]
    assert command("a/b.py", "--data", "x y", 3) == f"python {root}/a/b.py --data 'x y' 3"
    monkeypatch.chdir(root)
    assert command("a/b.py") == "python a/b.py"


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
