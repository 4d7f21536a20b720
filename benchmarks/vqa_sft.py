"""
Supervised fine-tuning of train_sft.py against trl's SFTTrainer: the same tiny model, rows, batch size, optimiser and
loss, in one run.

Usage:
    pip install -r requirements-dev.txt
    python benchmarks/vqa_sft.py                   # 8 minutes on two cores; leave the machine alone meanwhile
    python benchmarks/vqa_sft.py --small           # the short form for tests: everything runs, the numbers mean nothing

Rows:
    ours                    whole tiny:qwen2vl trained; images and beginnings of prompts shared by the questions of an
                            image
    ours, nothing shared    the same examples in any order: --per-image 1, no shared prompts
    trl                     SFTTrainer on prompt-completion rows with images, loss on the completion, no gradient
                            checkpointing
    trl, checkpointing      the same as it comes: SFTTrainer recomputes activations unless told otherwise
    ours, LoRA              adapters on the language model, frozen vision tower run on every batch
    ours, LoRA, cached      the same with --cache-features; computing them is in "before"

Each row runs in a process of its own, once per round, taking turns, so that a machine that slows down slows all of
them. examples/s: over the steps after the first ones, median of the rounds. Memory: growth of the process's peak over
what it held with model, rows and libraries loaded (Linux resets its peak for that). "before": seconds from there to the
first step. Prints a table and writes --out-dir/metrics.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from PIL import Image

from shared.models.inputs import ImageStore
from shared.models.loading import add_lora, load_vlm
from shared.models.passes import PartSize, features_of
from shared.models.tuning import BatchOrder, backward
from shared.runtime import InputError, positive_int, run_facts, script, seed_everything, write_json
from vqa_sft_grpo.examples import make_examples
from vqa_sft_grpo.prompting import build_prompt, build_target
from vqa_sft_grpo.rows import make_rows, read_rows, write_rows

ROWS = ("ours", "ours, nothing shared", "trl", "trl, checkpointing", "ours, LoRA", "ours, LoRA, cached")
LR = 1e-3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=positive_int, default=200, help="phantom films to train on (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=30, help="steps that are timed (%(default)s)")
    parser.add_argument("--skip", type=positive_int, default=3, help="steps before the clock starts (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="examples per step (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of each row (%(default)s)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="which rows (all)")
    parser.add_argument("--small", action="store_true", help="a few steps of each row, once")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/vqa_sft"))
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args(argv)
    if args.small:
        args.studies, args.steps, args.skip, args.batch_size, args.rounds = 6, 2, 1, 4, 1
    return args


# -------------------------------------------------------------------------------------------------------------- memory


def reset_peak():
    """From here on the peak of this process counts anew (Linux). -> MiB it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise InputError(
            "this benchmark needs Linux: it resets the process's peak memory through /proc/self/clear_refs"
        ) from error
    return memory("VmRSS")


def memory(name):
    """VmRSS (now) or VmHWM (peak) of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


# ---------------------------------------------------------------------------------------------------------------- rows


class Clock:
    """Notes when each step ended."""

    def __init__(self, skip):
        self.begin, self.skip, self.ends = time.perf_counter(), skip, []

    def tick(self):
        self.ends.append(time.perf_counter())

    def seconds(self):
        return self.ends[-1] - self.ends[self.skip - 1]


def train_ours(args, rows, vlm, clock, lora, share, cache):
    size = PartSize(args.batch_size)
    store = ImageStore(vlm.processor, [r["image"] for r in rows])
    examples = make_examples(vlm, rows, store, ("json",))
    if cache:
        store.cache_features(lambda images: features_of(vlm, images), 2.0)
    order = BatchOrder(examples, args.batch_size, 4 if share else 1, steps=args.skip + args.steps)
    trainable = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    vlm.model.train()
    count = 0
    clock.ready = time.perf_counter()
    for step in range(order.num_steps):
        batch = order.at(step)[1]
        backward(vlm, batch, store, size, scaler, share, not lora)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
        count += len(batch) if step >= args.skip else 0
    return count


def train_trl(args, rows, vlm, clock, checkpointing):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Tick(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            clock.ready = time.perf_counter()

        def on_step_end(self, *arguments, **options):
            clock.tick()

    def row_of(row):
        return {
            "images": [Image.open(row["image"]).convert("RGB")],
            "prompt": [{"role": "user", "content": build_prompt(row["question"], "json")}],
            "completion": [{"role": "assistant", "content": build_target(row, "json")}],
        }

    config = SFTConfig(
        output_dir=str(args.out_dir / "trl"),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.skip + args.steps,
        learning_rate=LR,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=checkpointing,
        completion_only_loss=True,
        max_length=None,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        tf32=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=vlm.model,
        args=config,
        train_dataset=Dataset.from_list([row_of(r) for r in rows]),
        processing_class=vlm.processor,
        callbacks=[Tick()],
    )
    trainer.train()
    return args.steps * args.batch_size


def run_one(args):
    """One row in this process; prints its numbers as the last line."""
    seed_everything(0)
    rows = read_rows(args.out_dir / "rows.json", "train")
    vlm = load_vlm("tiny:qwen2vl")
    if "LoRA" in args.one:
        add_lora(vlm, dropout=0.0, checkpointing=False)
    if args.one.startswith("trl"):
        import datasets  # noqa: F401  # libraries are loaded before the memory is read
        from trl import SFTTrainer  # noqa: F401
    held, clock = reset_peak(), Clock(args.skip)
    if args.one.startswith("trl"):
        count = train_trl(args, rows, vlm, clock, args.one != "trl")
    else:
        count = train_ours(
            args, rows, vlm, clock, "LoRA" in args.one, "nothing shared" not in args.one, "cached" in args.one
        )
    print(
        json.dumps(
            {
                "examples_per_second": count / clock.seconds(),
                "peak_growth_mib": memory("VmHWM") - held,
                "before_seconds": clock.ready - clock.begin,
            }
        )
    )


@script
def main(argv=None):
    args = parse_args(argv)
    if args.one:
        return run_one(args)
    started = time.time()
    rows, _ = make_rows("phantom", "train", image_dir=args.out_dir / "phantom_images", studies=args.studies)
    write_rows(args.out_dir / "rows.json", rows)
    found = {name: [] for name in args.rows}
    same = [f"--{key}={getattr(args, key.replace('-', '_'))}" for key in ("steps", "skip", "batch-size", "out-dir")]
    for _ in range(args.rounds):
        for name in args.rows:
            done = subprocess.run([sys.executable, __file__, "--one", name, *same], capture_output=True, text=True)
            if done.returncode:
                raise InputError(
                    f"the row '{name}' ended with: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}"
                )
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    table = {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in found.items()
    }
    print("| row | examples/s | peak growth MiB | before, s |\n|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['examples_per_second']:.1f} | {row['peak_growth_mib']:.0f} |"
            f" {row['before_seconds']:.1f} |"
        )
    ratios = {}
    for a, b in (
        ("ours", "trl"),
        ("ours", "trl, checkpointing"),
        ("ours, nothing shared", "trl"),
        ("ours, LoRA, cached", "ours, LoRA"),
    ):
        if a in table and b in table:
            ratios[f"{a} / {b}"] = {
                "speed": table[a]["examples_per_second"] / table[b]["examples_per_second"],
                "memory": table[a]["peak_growth_mib"] / table[b]["peak_growth_mib"],
            }
            print(
                f"{a} against {b}: {ratios[f'{a} / {b}']['speed']:.2f} x the speed,"
                f" {ratios[f'{a} / {b}']['memory']:.2f} x the memory growth"
            )
    facts = {
        "dataset": "phantom",
        "rows_of_data": len([r for r in rows if r["split"] == "train"]),
        "model": "tiny:qwen2vl",
        "settings": vars(args) | {"out_dir": str(args.out_dir)},
    }
    write_json(
        args.out_dir / "metrics.json",
        {"rows": table, "rounds": found, "ratios": ratios} | facts | run_facts(started, "cpu"),
    )
    print(f"results in {args.out_dir}")
    return table


if __name__ == "__main__":
    main()
