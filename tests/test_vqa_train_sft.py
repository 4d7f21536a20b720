"""
train_sft.py and examples.py: the loss is the model's own, nothing is cut off, a killed run goes on as if nothing had
happened, and it learns.
"""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from plain_forward import build_inputs

import vqa_sft_grpo.train_sft as train_script
from shared.models.inputs import ImageStore
from shared.models.loading import add_lora, load_vlm
from shared.models.passes import PartSize, features_of
from shared.models import tuning
from shared.models.tuning import backward, batch_loss, epoch_batches
from shared.training import GuardedStep, settings_of
from vqa_sft_grpo.examples import make_examples
from vqa_sft_grpo.asking import model_of
from vqa_sft_grpo.prepare_data import main as prepare
from vqa_sft_grpo.rows import read_rows
from vqa_sft_grpo.prompting import build_prompt, build_target
from vqa_sft_grpo.train_sft import main, parse_args

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds for a process of a few, on a machine that is busy


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.json"
    prepare(["--data", "phantom", "--studies", "10", "--image-size", "56", "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def rows(rows_file):
    return read_rows(rows_file, "train")


@pytest.fixture(scope="module")
def vlm():
    return load_vlm("tiny:qwen2vl")


def short(rows_file, *more):
    return [
        "--model",
        "tiny",
        "--data",
        str(rows_file),
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "--steps",
        "4",
        "--limit",
        "12",
        "--eval-every",
        "2",
        "--eval-rows",
        "2",
        "--styles",
        "json",
        *map(str, more),
    ]


def examples_of(vlm, rows, styles=("json", "think"), **options):
    store = ImageStore(vlm.processor, [r["image"] for r in rows], **options)
    return store, make_examples(vlm, rows, store, styles)


def gradients(vlm):
    return {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}


def assert_close(a, b, tolerance=2e-6):
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() < tolerance, name


# --- rows without an image ---


def test_blank_rows_are_grey_and_say_nothing_but_the_answer(rows_file, rows):
    args = parse_args(short(rows_file, "--blank-share", "0.5"))
    train, _, facts = train_script.load_rows(args)
    assert len(train) == 18 and facts["train_rows"] == 12 and facts["blank_rows"] == 6
    for row in train[12:]:
        first = next(r for r in train[:12] if r["id"] == row["id"])
        assert (
            json.loads(row["output"]) == {"answer": first["answer"]}
            and (row["image"] == 128).all()
            and row["image"].shape == (first["height"], first["width"])
        )
    assert len({id(row["image"]) for row in train[12:]}) == 1  # prepared once
    other, again = train_script.blank_rows(rows, 0.5, 1), train_script.blank_rows(rows, 0.5, 0)
    assert (
        [r["id"] for r in other] != [r["id"] for r in again] == [r["id"] for r in train_script.blank_rows(rows, 0.5, 0)]
    )
    assert train_script.blank_rows(rows, 0.0, 0) == []


def test_a_run_with_blank_rows(rows_file):
    main(short(rows_file, "--blank-share", "0.5", "--steps", "2", "--out-dir", "blank"))
    assert json.loads(Path("blank/metrics.json").read_text())["dataset"]["blank_rows"] == 6


# --- loss ---


@pytest.mark.parametrize("family", ["qwen2vl", "gemma3", "llava"])
def test_loss_and_gradient_are_those_of_the_model_itself(family, rows):
    """Shared image features and shared beginnings of prompts change nothing but the time."""
    vlm = load_vlm(f"tiny:{family}")
    store, examples = examples_of(vlm, rows)
    batch = [examples[i] for i in epoch_batches(examples, 12, 4)[1]]
    assert len({(e.image, e.style) for e in batch}) <= 0.75 * len(batch)  # there is something to share
    inputs = build_inputs(
        vlm,
        [build_prompt(rows[e.row]["question"], e.style) for e in batch],
        [Image.open(rows[e.row]["image"]) for e in batch],
        answers=[build_target(rows[e.row], e.style) for e in batch],
    )
    loss = vlm.model(**inputs.tensors, use_cache=False).loss
    loss.backward()
    wanted = gradients(vlm)
    for share in (False, True):
        vlm.model.zero_grad()
        total, weight = batch_loss(vlm, batch, store, share=share, train_tower=True)
        assert weight == sum(len(e.target) for e in batch)
        assert torch.allclose(total / weight, loss, atol=1e-5)
        (total / weight).backward()
        assert_close(gradients(vlm), wanted)


@pytest.mark.parity
def test_the_loss_is_that_of_trl(vlm, rows):
    """
    trl's collator and the model's own loss on the same rows; the only difference is the line break after the end token.
    """
    pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    chosen = rows[:6]
    collator = DataCollatorForVisionLanguageModeling(vlm.processor, completion_only_loss=True)
    batch = collator(
        [
            {
                "images": [Image.open(r["image"]).convert("RGB")],
                "prompt": [{"role": "user", "content": build_prompt(r["question"], "json")}],
                "completion": [{"role": "assistant", "content": build_target(r, "json")}],
            }
            for r in chosen
        ]
    )
    end = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    after = torch.roll(batch["labels"], 1, 1)
    batch["labels"][after == end] = -100  # trl also teaches the line break that its template writes after the end
    store, examples = examples_of(vlm, chosen, ("json",))
    with torch.no_grad():
        loss = vlm.model(**batch).loss
        total, weight = batch_loss(vlm, examples, store)
    assert weight == (batch["labels"] >= 0).sum() and torch.allclose(total / weight, loss, atol=1e-5)


def test_images_of_different_sizes(vlm, rows, tmp_path):
    """Each image has a beginning of its own."""
    changed = [dict(r) for r in rows[:8]]
    for i, row in enumerate(changed[:4]):
        row["image"] = str(tmp_path / "wide.png")
        Image.fromarray(np.full((60, 110), 40 + i, np.uint8)).save(row["image"])
    store, examples = examples_of(vlm, changed, ("json",))
    assert (
        len({len(e.prompt) - len(build_prompt(changed[e.row]["question"], "json")) for e in examples}) > 1
        and len(set(store.grids)) == 2
    )
    for batch in (examples, examples[::-1]):  # whichever image comes first
        plain, shared = (batch_loss(vlm, batch, store, share=share) for share in (False, True))
        assert torch.allclose(plain[0], shared[0], rtol=1e-6)


def test_answer_and_boxes_have_weights_of_their_own(vlm, rows):
    store, examples = examples_of(vlm, rows)
    weighted = make_examples(vlm, rows, store, ("json", "think"), answer_weight=3.0, box_weight=0.25)
    with_boxes = 0
    for plain, e in zip(examples, weighted, strict=True):
        answer, boxes = (vlm.tokenizer.decode(e.target[e.weights == w], skip_special_tokens=True) for w in (3.0, 0.25))
        assert answer.strip(' "}').removesuffix("</answer>") == rows[e.row]["answer"] and (plain.weights == 1).all()
        known = json.loads(build_target(rows[e.row], "json")).get("boxes") if e.style == "json" else None
        # Brackets may share a token with what follows; the numbers do not
        assert [int(n) for n in re.findall(r"\d+", boxes)] == [n for box in known or () for n in box]
        with_boxes += bool(known)
    assert with_boxes > 5
    with torch.no_grad():
        one, three, double = (
            batch_loss(vlm, make_examples(vlm, rows[:6], store, ("think",), answer_weight=w), store)
            for w in (1.0, 3.0, 2.0)
        )
    assert three[1] - one[1] == 2 * (double[1] - one[1]) and torch.allclose(
        three[0] - one[0], 2 * (double[0] - one[0]), rtol=1e-3
    )


def test_targets_are_whole_and_end(vlm, rows):
    _, examples = examples_of(vlm, rows)
    for e in examples:
        assert vlm.tokenizer.decode(e.target) == build_target(rows[e.row], e.style) + "<|im_end|>"
        assert (e.prompt == vlm.image_token_id).sum() == 2 * 2  # 56 px: 4 x 4 patches of 14, merged 2 x 2


def test_a_long_example_stops_the_run_with_the_numbers(rows_file, refused):
    message = refused(main, short(rows_file, "--max-length", "150"))
    assert "4 of the image" in message and "--max-length is 150" in message and "--max-pixels" in message


def test_cached_features_give_equal_losses(rows):
    vlm = add_lora(load_vlm("tiny:qwen2vl"), dropout=0.0)
    store, examples = examples_of(vlm, rows[:12])
    before = batch_loss(vlm, examples, store, share=True)[0]
    before.backward()
    gradient = gradients(vlm)
    vlm.model.zero_grad()
    store.cache_features(lambda images: features_of(vlm, images), 1.0)
    store.get = None  # pixels are not looked at any more
    after = batch_loss(vlm, examples, store, share=True)[0]
    assert torch.allclose(before, after, rtol=1e-6)
    after.backward()
    assert_close(gradients(vlm), gradient, 1e-3)  # of sums over a thousand tokens


# --- images and batches ---


def test_batches_hold_every_example_once_and_little_padding(vlm, rows):
    _, examples = examples_of(vlm, rows * 6)
    batches = epoch_batches(examples, 8, per_image=2, seed=1, epoch=2)
    assert sorted(i for b in batches for i in b) == list(range(len(examples))) and max(map(len, batches)) == 8
    assert batches == epoch_batches(examples, 8, 2, 1, 2)
    assert batches != epoch_batches(examples, 8, 2, 1, 3) and batches != epoch_batches(examples, 8, 2, 2, 2)

    def columns(batches):
        return sum(max(examples[i].length for i in b) * len(b) for b in batches)

    unsorted = [list(range(i, len(examples)))[:8] for i in range(0, len(examples), 8)]
    unsorted = np.random.default_rng(0).permutation(len(examples))
    unsorted = [unsorted[i : i + 8] for i in range(0, len(examples), 8)]
    tokens = sum(e.length for e in examples)
    assert columns(batches) - tokens < 0.5 * (columns(unsorted) - tokens)


# --- steps ---


def setup_step(vlm, rows):
    store, examples = examples_of(vlm, rows[:6], ("json",))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(micro_batch):
        vlm.model.zero_grad(set_to_none=True)
        size = PartSize(micro_batch)
        return (backward(vlm, examples, store, size, scaler), size.now), gradients(vlm)

    return step


def test_micro_batches_add_up_to_the_batch(vlm, rows):
    step = setup_step(vlm, rows)
    (whole, _), wanted = step(6)
    for size in (1, 4):
        (parts, kept), found = step(size)
        assert kept == size and torch.allclose(parts, whole, atol=1e-5)
        assert_close(found, wanted)


def test_out_of_memory_takes_smaller_parts_and_the_same_gradient(vlm, rows, monkeypatch, capsys):
    step = setup_step(vlm, rows)
    (whole, _), wanted = step(6)
    calls = []

    def limited(vlm, batch, *more, **options):
        calls.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("made up")
        return batch_loss(vlm, batch, *more, **options)

    monkeypatch.setattr(tuning, "batch_loss", limited)
    (total, kept), found = step(6)
    assert kept == 1 and calls == [6, 3] + [1] * 6 and "going on with 1" in capsys.readouterr().out
    assert torch.allclose(total, whole, atol=1e-5)
    assert_close(found, wanted)


def poisoned(monkeypatch, bad):
    """The loss is NaN in the passes whose number, counted while training, is in `bad`."""
    count = iter(range(10_000))

    def loss(vlm, batch, *more, **options):
        total, weight = batch_loss(vlm, batch, *more, **options)
        return (total * float("nan") if vlm.model.training and next(count) in bad else total), weight

    monkeypatch.setattr(tuning, "batch_loss", loss)


def test_a_loss_that_is_not_finite_stops_the_step_only(rows_file, monkeypatch):
    poisoned(monkeypatch, {1})
    main(short(rows_file, "--out-dir", "run"))
    history = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [r["skipped_steps"] for r in history] == [1, 0] and all(np.isfinite(r["train_loss"]) for r in history)
    assert all(
        torch.isfinite(w).all() for w in torch.load("run/last.pt", weights_only=True)["parts"]["weights"].values()
    )


def test_losses_that_stay_so_stop_the_run(rows_file, monkeypatch, refused):
    poisoned(monkeypatch, set(range(1000)))
    monkeypatch.setattr(train_script, "GuardedStep", functools.partial(GuardedStep, most=3))
    assert "not finite in 3 steps in a row" in refused(main, short(rows_file, "--out-dir", "run"))


# --- runs ---


def state_of(folder):
    state = torch.load(Path(folder) / "last.pt", weights_only=True)
    state |= state.pop("values")
    del state["sha256"]  # of the clock, too
    for row in [state["totals"], *state["history"], state["best"]]:
        for key in ("seconds", "examples_per_second", "tokens_per_second"):
            row.pop(key, None)
    return state


def assert_same(a, b, where=""):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, rows_file):
    """An uninterrupted run with LoRA and dropout; do not write into it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(short(rows_file, *LORA, "--out-dir", folder, "--save-to", folder.parent / "published"))
    return folder


LORA = ("--train", "lora", "--lora-rank", "4", "--lora-dropout", "0.1", "--lr", "0.01")


def test_what_a_run_writes(whole_run):
    metrics = json.loads((whole_run / "metrics.json").read_text())
    assert (
        metrics["dataset"]["name"] == "phantom"
        and metrics["dataset"]["phantom"]
        and metrics["split"] == "val"
        and metrics["n"] == 2
    )
    assert metrics["train"] == "lora" and 0 < metrics["trainable_parameters"] < 0.1 * metrics["parameters"]
    assert metrics["seconds"] > 0 and metrics["best"]["step"] in (2, 4) and metrics["last"]["step"] == 4
    history = [json.loads(line) for line in (whole_run / "history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in history] == [2, 4] and history[1]["train_loss"] < history[0]["train_loss"]
    assert Image.open(whole_run / "figures" / "curves.png").width > 6 * 25  # inches
    assert not (whole_run.parent / "published").exists()  # a run with --limit is not published


def test_the_adapter_is_read_by_peft_and_changes_the_model(whole_run, rows):
    base = load_vlm("tiny:qwen2vl")
    model, adapter = model_of("tiny", str(whole_run / "best"))
    inputs = build_inputs(base, [rows[0]["question"]], [np.asarray(Image.open(rows[0]["image"]))])
    with torch.no_grad():
        before = base.model(**inputs.tensors).logits
        found = PeftModel.from_pretrained(base.model, whole_run / "best")
        after = found(**inputs.tensors).logits
        assert not torch.allclose(before, after, atol=1e-3)
        assert torch.equal(load_vlm(model, adapter=adapter, family="qwen2vl").model(**inputs.tensors).logits, after)
    trained = torch.load(whole_run / "last.pt", weights_only=True)["parts"]["weights"]
    assert all("lora_" in name and "language_model" in name for name in trained)


def test_the_same_with_cached_features(whole_run, rows_file):
    main(short(rows_file, *LORA, "--cache-features", "--out-dir", "cached"))
    a, b = (state_of(f) for f in (whole_run, "cached"))
    assert abs(a["history"][-1]["val_loss"] - b["history"][-1]["val_loss"]) < 1e-4
    assert (
        max(float((a["parts"]["weights"][n] - b["parts"]["weights"][n]).abs().max()) for n in a["parts"]["weights"])
        < 1e-4
    )


def stop_after(step, monkeypatch):
    """SIGTERM while the pass of this step (counted from 1) runs."""
    count = iter(range(1, 10_000))

    def loss(vlm, *more, **options):
        if vlm.model.training and next(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(vlm, *more, **options)

    monkeypatch.setattr(tuning, "batch_loss", loss)


def test_stopped_twice_and_resumed_equals_the_uninterrupted_run(whole_run, rows_file, monkeypatch, capsys):
    command = short(rows_file, *LORA, "--micro-batch", "1")
    for step, more in (
        (2, ("--out-dir", "parts")),
        (5, ("--resume", "parts")),
    ):  # passes of one example, four a step: steps 1 and 2
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(SystemExit) as stop:
                main([*command, *more])
        assert stop.value.code == 128 + signal.SIGTERM and "--resume parts" in capsys.readouterr().out
    main([*command, "--resume", "--out-dir", "parts"])
    assert_same(state_of(whole_run), state_of("parts"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (whole_run / "best" / name).read_bytes() == Path("parts/best", name).read_bytes()
    answers = [Path(f, "val_answers.jsonl").read_text() for f in (whole_run, "parts")]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_killed_without_warning_and_resumed(own_folder, rows_file, start_script):
    """A whole tiny model, two processes: SIGKILL right after the first saved state."""
    command = [ROOT / "vqa_sft_grpo" / "train_sft.py", *short(rows_file)]
    assert start_script([*command, "--out-dir", "whole"], own_folder).wait(PATIENCE) == 0, Path(
        "output.txt"
    ).read_text()
    process = start_script([*command, "--out-dir", "parts"], own_folder)
    until = time.time() + PATIENCE
    while not Path("parts/last.pt").exists() and time.time() < until:
        assert process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.01)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert start_script([*command, "--resume", "parts"], own_folder).wait(PATIENCE) == 0, Path("output.txt").read_text()
    assert_same(state_of("whole"), state_of("parts"))
    assert Path("whole/best/model.safetensors").read_bytes() == Path("parts/best/model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(own_folder, rows_file, start_script):
    command = [ROOT / "vqa_sft_grpo" / "train_sft.py", *short(rows_file)]
    assert start_script([*command, "--out-dir", "one"], own_folder).wait(PATIENCE) == 0, Path("output.txt").read_text()
    two = start_script([*command, "--out-dir", "two"], own_folder, ranks=2)
    assert two.wait(PATIENCE) == 0, Path("output.txt").read_text()
    one, two = state_of("one"), state_of("two")
    for a, b in zip(one["history"], two["history"], strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-3 and abs(a["val_loss"] - b["val_loss"]) < 1e-2
    assert (
        max(
            float((one["parts"]["weights"][n] - two["parts"]["weights"][n]).abs().max())
            for n in one["parts"]["weights"]
        )
        < 5e-3
    )


def test_a_run_to_resume_that_is_not_there_is_named_before_a_model_is_loaded(own_folder, refused):
    assert "there is nothing at nowhere" in refused(main, ["--resume", "nowhere"])
    Path("empty").mkdir()
    assert "there is no run in empty" in refused(main, ["--resume", "empty"])
    assert "there is no run in empty" in refused(main, ["--resume", "--out-dir", "empty"])


def test_other_settings_and_other_rows_are_refused(whole_run, rows_file, refused, tmp_path):
    shutil.copytree(whole_run, "copy")
    assert "--lr 0.01 (now 0.02)" in refused(main, short(rows_file, *LORA, "--lr", "0.02", "--resume", "copy"))
    other = rows_file.with_name("other.json")
    other.write_text("".join(reversed(rows_file.read_text().splitlines(keepends=True))))
    assert "other data" in refused(main, short(other, *LORA, "--resume", "copy"))
    assert_same(state_of(whole_run), state_of("copy"))


def test_the_command_printed_last_measures_this_model_on_its_own_test_rows(capsys):
    from vqa_sft_grpo.evaluate import main as evaluate

    drawn = ["--data", "phantom", "--split", "all", "--studies", "20", "--image-size", "56", "--output", "rows.json"]
    prepare(drawn)
    main(short("rows.json", "--out-dir", "run", "--steps", "1", "--eval-rows", "1"))
    line = next(line for line in capsys.readouterr().out.splitlines() if "evaluate.py" in line)
    words = shlex.split(line)
    assert words[0] == "python" and Path(words[1]).samefile(ROOT / "vqa_sft_grpo" / "evaluate.py")
    evaluate([*words[2:], "--limit", "2", "--counterfactual-cases", "0", "--max-new-tokens", "4", "--out-dir", "found"])
    metrics = json.loads(Path("found/metrics.json").read_text())
    assert metrics["dataset"]["source"] == "rows.json" and metrics["adapter"] is None
    assert metrics["model"] == "run/best" and metrics["trained_on"]["phantom"] and metrics["main_prompt"] == "json"
    assert metrics["warnings"][0].startswith("PHANTOM") and metrics["n"] == 2


def test_publishing(rows_file, capsys):
    """A whole run replaces an earlier model of its kind in --save-to, and nothing else."""
    command = [
        a
        for a in short(
            rows_file, "--save-to", "out/model", "--steps", "1", "--eval-rows", "1", "--overwrite", "--out-dir", "run"
        )
        if a not in ("--limit", "12")
    ]
    main(command)
    assert "out/model" in capsys.readouterr().out
    assert model_of(None, "out/model") == ("out/model", None)
    assert load_vlm("out/model").family == "qwen2vl"
    Path("out/model/config.json").unlink()
    Path("out/model/adapter_config.json").write_text("{}")
    main(command)
    assert (
        "left alone: it holds an adapter" in capsys.readouterr().out
        and Path("out/model/adapter_config.json").read_text() == "{}"
    )


def test_dry_run(capsys):
    main(["--dry-run"])
    metrics = json.loads(Path("outputs/vqa_sft_grpo/train_sft/dry-run/metrics.json").read_text())
    assert metrics["tiny"] and metrics["dataset"]["phantom"] and metrics["last"]["step"] == 3
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_a_short_run_learns_what_answers_look_like(own_folder):
    """
    50 steps teach the form of the answers and the usual places of boxes: 1.2 nats a token where guessing costs 6.9.
    That says nothing about looking: so early the model answers without the film.
    """
    drawn = ["--conditions", "Support Devices", "Cardiomegaly", "--prevalence", "0.5"]
    prepare(["--data", "phantom", "--studies", "300", *drawn, "--output", "rows.json"])
    main(["--model", "tiny", "--data", "rows.json", "--device", "cpu", "--styles", "json", "--batch-size", "16",
          "--steps", "50", "--eval-every", "25", "--eval-rows", "40", "--out-dir", "run"])  # fmt: skip
    history = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert history[-1]["val_loss"] < 1.5 and history[-1]["val_loss"] < 0.95 * history[0]["val_loss"]


# --- arguments ---


def test_the_documented_command_finds_its_settings(own_folder):
    args = parse_args(["--cfg", "configs/sft.yaml", "--data", "data/train.json", "--lr", "3e-4"])
    assert args.data == "data/train.json" and args.lr == 3e-4 and args.model == "Qwen/Qwen2-VL-2B-Instruct"
    assert args.train == "lora" and args.micro_batch == 1 and args.save_to == Path("checkpoints/qwen2vl_sft")
    plain = settings_of(parse_args([]), train_script.ASIDE)
    changed = {
        k
        for k, v in settings_of(parse_args(["--cfg", "configs/sft.yaml"]), train_script.ASIDE).items()
        if v != plain[k]
    }
    assert not changed, "configs/sft.yaml and the defaults are the same settings"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "full", "--quant", "nf4"], "--train lora"),
        (["--model", "tiny", "--cache-features"], "needs a frozen vision tower"),
        (["--styles", "think"], "--eval-style json is not among"),
        (["--data", "nowhere.json", "--model", "tiny"], "prepare_data.py"),
    ],
)
def test_what_is_refused(arguments, words, refused):
    assert words in refused(main, arguments)
