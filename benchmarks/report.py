"""
Report generation against what a user would write instead, on the same tiny model: batches with a shared cache against
one film after the other, and training against trl's SFTTrainer.

Usage:
    pip install -r requirements-dev.txt
    python benchmarks/report.py                    # 10 minutes on two cores; leave the machine alone meanwhile
    python benchmarks/report.py --small            # the short form for tests: everything runs, the numbers mean nothing
    python benchmarks/report.py --rows "written, batches" "written, one by one"

Rows:
    written, batches        Writer of task2_report: --batch-size films at a time, keys and values kept
    written, one by one     model.generate() film by film, keys and values kept, as most scripts do
    written, no cache       the same without keys and values
    trained, ours           steps of train.py (no label stage), whole model
    trained, trl            SFTTrainer on the same rows: prompt, film, completion; loss on the completion

Every row writes or learns the same texts: greedy texts of all ways are compared, and texts have at most --new-tokens
tokens. Each row runs in a process of its own, once per round, taking turns. The numbers are reports or examples a
second, median of the rounds. Prints a table and writes --out-dir/metrics.json.
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
import numpy as np
import torch
from PIL import Image

from shared.models.inputs import ImageStore, continuation, prompt_ids
from shared.models.loading import load_vlm
from shared.models.passes import PartSize, text_of
from shared.models.tuning import BatchOrder, Example, backward
from shared.runtime import InputError, positive_int, run_facts, script, seed_everything, write_json
from task2_report.cases import load_reports
from task2_report.prompts import REPORT, ask
from task2_report.writer import Writer

WRITTEN = ("written, batches", "written, one by one", "written, no cache")
TRAINED = ("trained, ours", "trained, trl")
ROWS = WRITTEN + TRAINED


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:gemma3", help="a tiny model (%(default)s)")
    parser.add_argument("--films", type=positive_int, default=64, help="films to write about (%(default)s)")
    parser.add_argument("--new-tokens", type=positive_int, default=80, help="longest text (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=25, help="training steps that are timed (%(default)s)")
    parser.add_argument("--skip", type=positive_int, default=3, help="steps before the clock starts (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="films or examples at a time (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of each row (%(default)s)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="which rows (all)")
    parser.add_argument("--small", action="store_true", help="a few of everything, once")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/report"))
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args(argv)
    if args.small:
        args.films, args.new_tokens, args.steps, args.skip, args.batch_size, args.rounds = 4, 6, 2, 1, 4, 1
    return args


def write_batches(args, vlm, films):
    return [
        row["text"] for row in Writer(vlm, args.batch_size, args.new_tokens).write([ask(REPORT)] * len(films), films)
    ]


def write_one_by_one(args, vlm, films, cache):
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REPORT}]}]
    prompt = vlm.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    bos, texts = vlm.tokenizer.bos_token or "", []
    for film in films:
        inputs = vlm.processor(
            text=prompt.removeprefix(bos), images=Image.fromarray(film).convert("RGB"), return_tensors="pt"
        )
        with torch.inference_mode():
            ids = vlm.model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False, use_cache=cache)
        texts.append(text_of(vlm, ids[0, inputs["input_ids"].shape[1] :].tolist()))
    return texts


def train_ours(args, vlm, cases):
    store, size = ImageStore(vlm.processor, [case.film for case in cases]), PartSize(args.batch_size)
    examples = []
    for i, case in enumerate(cases):
        ids = np.array(continuation(vlm, case.report, end=True)[0], np.int32)
        prompt = prompt_ids(vlm, ask(REPORT), (store.grids[store.number_of[i]],))
        examples.append(Example(i, "report", store.number_of[i], prompt, ids, np.ones(len(ids), np.float32)))
    order = BatchOrder(examples, args.batch_size, steps=args.skip + args.steps)
    trained = list(vlm.model.parameters())
    optimizer, scaler = (
        torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    vlm.model.train()
    count = 0
    for step in range(order.num_steps):
        if step == args.skip:
            begin = time.perf_counter()
        batch = order.at(step)[1]
        backward(vlm, batch, store, size, scaler, True, True)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += len(batch) * (step >= args.skip)
    return count / (time.perf_counter() - begin)


def train_trl(args, vlm, cases):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends = []

    class Tick(TrainerCallback):
        def on_step_end(self, *arguments, **options):
            ends.append(time.perf_counter())

    rows = [
        {
            "images": [Image.fromarray(case.film).convert("RGB")],
            "prompt": [{"role": "user", "content": REPORT}],
            "completion": [{"role": "assistant", "content": case.report}],
        }
        for case in cases
    ]
    config = SFTConfig(
        output_dir=str(args.out_dir / "trl"), per_device_train_batch_size=args.batch_size,
        max_steps=args.skip + args.steps, learning_rate=1e-3, weight_decay=0.01, max_grad_norm=1.0,
        gradient_checkpointing=False, completion_only_loss=True, max_length=None, optim="adamw_torch",
        lr_scheduler_type="constant", use_cpu=True, bf16=False, tf32=False, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True, dataloader_drop_last=True, dataloader_pin_memory=False,
    )  # fmt: skip
    SFTTrainer(
        model=vlm.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=vlm.processor,
        callbacks=[Tick()],
    ).train()  # fmt: skip
    return args.steps * args.batch_size / (ends[-1] - ends[args.skip - 1])


def run_one(args):
    """One row in this process; prints its numbers as the last line."""
    seed_everything(0)
    vlm = load_vlm(args.model)
    training = args.one in TRAINED
    number = max(args.films, args.batch_size * 4) if training else args.films
    cases = load_reports("phantom", "", number, splits=("train",)).cases
    if training:
        return {"per_second": (train_ours if args.one == TRAINED[0] else train_trl)(args, vlm, cases)}
    films = [case.film for case in cases]
    work = {
        WRITTEN[0]: lambda some: write_batches(args, vlm, some),
        WRITTEN[1]: lambda some: write_one_by_one(args, vlm, some, True),
        WRITTEN[2]: lambda some: write_one_by_one(args, vlm, some, False),
    }[args.one]
    work(films[:2])  # what is compiled or filled once is not timed
    if args.one == WRITTEN[2]:
        films = films[: max(2, len(films) // 8)]  # slow: fewer of them
    begin = time.perf_counter()
    texts = work(films)
    return {"per_second": len(films) / (time.perf_counter() - begin), "texts": texts}


@script
def main(argv=None):
    args = parse_args(argv)
    if args.one:
        return print(json.dumps(run_one(args)))
    started, found = time.time(), {name: [] for name in args.rows}
    same = [
        f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in ("rows", "rounds", "small", "one")
    ]
    for _ in range(args.rounds):
        for name in args.rows:
            done = subprocess.run([sys.executable, __file__, "--one", name, *same], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                raise InputError(f"the row '{name}' ended with: {last}")
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    texts = {name: rounds[0]["texts"] for name, rounds in found.items() if "texts" in rounds[0]}
    shortest = min(map(len, texts.values()), default=0)
    equal = len({tuple(some[:shortest]) for some in texts.values()}) <= 1
    table = {name: statistics.median(r["per_second"] for r in rounds) for name, rounds in found.items()}
    print("| row | a second |\n|---|---|\n" + "\n".join(f"| {name} | {value:.2f} |" for name, value in table.items()))
    ratios = {
        f"{a} / {b}": table[a] / table[b]
        for a, b in ((WRITTEN[0], WRITTEN[1]), (WRITTEN[0], WRITTEN[2]), TRAINED)
        if a in table and b in table
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} x")
    print(f"texts of all ways equal: {equal}")
    rounds = {name: [r["per_second"] for r in some] for name, some in found.items()}
    write_json(args.out_dir / "metrics.json", {
        "rows": table, "rounds": rounds, "ratios": ratios, "texts_equal": equal, "dataset": "phantom", "phantom": True,
        "model": args.model, "settings": vars(args) | {"out_dir": str(args.out_dir)}, **run_facts(started, "cpu"),
    })  # fmt: skip
    print(f"results in {args.out_dir}")
    return table


if __name__ == "__main__":
    main()
