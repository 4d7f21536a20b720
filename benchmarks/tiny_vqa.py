"""
Does a tiny model learn to look? tiny:qwen2vl, from random weights, on yes/no questions about phantom films, on a CPU.

Usage:
    python benchmarks/tiny_vqa.py                          # the claim: 1200 steps of 32, several minutes on two cores
    python benchmarks/tiny_vqa.py --steps 20 --studies 64  # the short form for tests: nothing is learned
    python benchmarks/tiny_vqa.py --model tiny:gemma3      # another family

The phantom asks so that yes and no are equally frequent for each wording: whoever does not see the film is right half
of the time. So the table has, on studies of other patients than the training: the accuracy with the film, with a grey
picture in its place, and with the film of another patient. Only the first may leave 50 %. Expect a plateau at chance
for some hundred steps.

An answer is read off as the likelier of "yes" and "no" after the prompt. Writes --out-dir/metrics.json and
history.jsonl.
"""

import argparse
import functools
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch

from shared.metrics.statistics import wilson_interval
from shared.models.inputs import ImageStore, continuation, prompt_ids
from shared.models.loading import load_vlm
from shared.models.passes import Prompt, features_of, logprobs, make_prompts, margin
from shared.phantom import phantom_study
from shared.runtime import pick_device, positive_float, positive_int, run_facts, script, seed_everything, write_json
from shared.runtime import write_jsonl

SIZE = 112  # pixels per side
TEST_START = 800_000  # index of the first study of the test; patients are groups of neighbouring studies


def make_cases(start, studies, conditions, seed=0):
    """
    -> films uint8 (N, 112, 112), and (film number, question, answer) of their yes/no questions about these conditions.
    """
    films, cases = [], []
    for index in range(start, start + studies):
        study = phantom_study(seed, index, SIZE)
        films.append(study.image)
        asked = [q for q in study.questions if q.kind == "closed" and (not conditions or q.condition in conditions)]
        cases += [(len(films) - 1, q.text, q.answer) for q in asked]
    return np.stack(films), cases


@torch.inference_mode()
def accuracy(vlm, films, cases, batch_size=64):
    """-> (correct, number) of the cases; films: uint8, one per film number."""
    vlm.model.eval()
    correct = 0
    for i in range(0, len(cases), batch_size):
        some = cases[i : i + batch_size]
        prompts = make_prompts(vlm, [q for _, q, _ in some], [films[f] for f, _, _ in some])
        said = (margin(vlm, prompts, ("yes",), ("no",)) > 0).tolist()
        correct += sum(s == (a == "yes") for s, (_, _, a) in zip(said, some, strict=True))
    return correct, len(cases)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:qwen2vl", help="tiny:qwen2vl, tiny:gemma3 or tiny:llava (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=1200, help="optimiser steps (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="questions per step (%(default)s)")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate of AdamW (%(default)s)")
    # fmt: off
    parser.add_argument("--studies", type=positive_int, default=12000,
        help="phantom studies to train on; drawing 1000 takes 6 s (%(default)s)")
    parser.add_argument("--test-studies", type=positive_int, default=1000,
        help="phantom studies of other patients (%(default)s)")
    parser.add_argument("--conditions", nargs="*", default=["Cardiomegaly", "Enlarged Cardiomediastinum", "Edema"],
        help="which conditions are asked about; none named: all. These three are what any network sees first "
        "(%(default)s)")
    parser.add_argument("--eval-every", type=positive_int, default=100,
        help="steps between two looks at 300 training questions and 300 fresh ones (%(default)s)")
    # fmt: on
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/tiny_vqa"))
    return parser.parse_args(argv)


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device("cpu")
    films, cases = make_cases(0, args.studies, args.conditions)
    watch_films, watch_cases = make_cases(
        TEST_START // 2, max(8, args.test_studies // 4), args.conditions
    )  # to follow the training
    test_films, test_cases = make_cases(TEST_START, args.test_studies, args.conditions)
    print(
        f"{len(films)} films with {len(cases)} questions to train on, {len(test_films)} with {len(test_cases)} to test;"
        f" {time.time() - started:.0f} s"
    )

    vlm = load_vlm(args.model, device=device)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.95))
    warmup = min(50, args.steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * step / args.steps)))
    )
    store = ImageStore(vlm.processor, list(films))
    tokens_of = functools.cache(lambda question, grid: prompt_ids(vlm, question, (grid,)))
    asked = {(f, q): tokens_of(q, tuple(store.grids[f])) for f, q, _ in cases}
    ends = {answer: continuation(vlm, answer, end=True)[0] for answer in ("yes", "no")}
    draw = random.Random(args.seed)
    history, total, begin = [], 0.0, time.time()
    for step in range(1, args.steps + 1):
        vlm.model.train()
        some = draw.choices(cases, k=args.batch_size)
        seen = list(dict.fromkeys(f for f, _, _ in some))
        features = dict(zip(seen, features_of(vlm, store.get(seen)), strict=True))
        prompts = [Prompt(asked[f, q], (store.grids[f],), (features[f],)) for f, q, _ in some]
        logp, _, mask = logprobs(vlm, prompts, [[ends[a]] for _, _, a in some])
        loss = -logp.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if step % args.eval_every == 0 or step == args.steps:
            seen, watched = (accuracy(vlm, f, c[:300]) for f, c in ((films, cases), (watch_films, watch_cases)))
            row = {
                "step": step,
                "loss": total / ((step - 1) % args.eval_every + 1),
                "train_accuracy": seen[0] / seen[1],
                "fresh_accuracy": watched[0] / watched[1],
            }
            history.append(row | {"seconds": round(time.time() - begin, 1)})
            total = 0.0
            print(
                "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in history[-1].items()),
                flush=True,
            )

    grey = np.full_like(test_films, int(test_films.mean()))
    rows = {}
    for name, shown in (
        ("its own film", test_films),
        ("a grey picture", grey),
        ("another patient's film", np.roll(test_films, len(test_films) // 2, axis=0)),
    ):
        correct, n = accuracy(vlm, shown, test_cases)
        rows[name] = {"accuracy": correct / n, "ci": wilson_interval(correct, n), "n": n}
    yes = sum(a == "yes" for _, _, a in test_cases)
    rows["always the more frequent answer"] = {
        "accuracy": max(yes, len(test_cases) - yes) / len(test_cases),
        "ci": None,
        "n": len(test_cases),
    }
    print("\n| shown | accuracy | 95 % interval |\n|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['accuracy']:.3f} | "
            + (f"{row['ci'][0]:.3f} to {row['ci'][1]:.3f} |" if row["ci"] else "|")
        )
    facts = {
        "dataset": "phantom",
        "split": "test (other patients)",
        "settings": vars(args) | {"out_dir": str(args.out_dir)},
        "seed": args.seed,
    }
    write_jsonl(args.out_dir / "history.jsonl", history)
    write_json(
        args.out_dir / "metrics.json",
        {"rows": rows, "seconds_per_step": (time.time() - begin) / args.steps}
        | facts
        | vlm.facts()
        | run_facts(started, device),
    )
    print(f"results in {args.out_dir}")
    return rows


if __name__ == "__main__":
    main()
