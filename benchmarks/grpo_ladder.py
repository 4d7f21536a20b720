"""
What each idea of the full trainer adds to GRPO in one file, one rung at a time, from one weak start.

Usage:
    python benchmarks/grpo_ladder.py                        # seeds 90 91; docs/results/vqa_sft_grpo.md says how long
    python benchmarks/grpo_ladder.py --rungs minimal kl --seeds 92
    python benchmarks/grpo_ladder.py --small --seeds 90 --rungs minimal "dealt out"

"Is there a pleural effusion?" on films with a severe effusion or none, half and half; a tiny model is fine-tuned for
--sft-steps on right answers alone and stopped while they are nearly a matter of chance. Every rung starts from it, with
a new LoRA adapter and --steps of 16 questions x 8 answers:

    minimal         grpo_minimal.py as it comes: the whole response is right, or earns nothing
    anywhere        the same, paid for the right answer wherever it stands between its marks
    dealt out       control: minimal, the rewards of a group dealt out at random among its answers
    full            train_grpo.py with all of its additions off but warm-up and decay, and its reward for the answer
    lr 1e-5         full, with the learning rate of a 2B model's adapter
    kl              full, with the KL to the start (--beta 0.02)
    no division     kl, and advantages that are not divided by the spread of their group
    gated           no division, and the reward of format, answer and consistency, gated
    V               gated, and V with its gradient: train_grpo.py as it comes

Measured is the adapter saved, on films of other patients: right (greedy, strict score of evaluate.py); P, the mean
probability of the right one of the two whole responses given that it is one of them, which a change of threshold does
not move; form, the mean probability of exactly the right response. Intervals draw patients; gains are paired. Writes
metrics.json to --out-dir.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import torch

from shared.data.images import read_pixels
from shared.models.passes import logprobs, make_prompts, stop_tokens
from shared.phantom import PhantomSettings
from shared.report import markdown_table
from shared.runtime import positive_int, run_facts, script, write_json
from vqa_sft_grpo import grpo_minimal, train_grpo, train_sft
from vqa_sft_grpo.answers import ask, load_images
from vqa_sft_grpo.asking import Answerer, load_model
from vqa_sft_grpo.measures import rate
from vqa_sft_grpo.prompting import build_prompt, build_target
from vqa_sft_grpo.rows import make_rows, write_rows

KL, UNDIVIDED = ["--beta", "0.02"], ["--scale-rewards", "none"]
ANSWER_ALONE = ["--composition", "additive", "--weights", "0,1,0,0"]
RUNGS = {  # flags of train_grpo.py; None: grpo_minimal.py
    "minimal": None,
    "anywhere": None,
    "dealt out": None,
    "full": [*ANSWER_ALONE, "--beta", "0", "--scale-rewards", "group"],
    "lr 1e-5": [*ANSWER_ALONE, "--beta", "0", "--scale-rewards", "group", "--lr", "1e-5"],
    "kl": [*ANSWER_ALONE, *KL, "--scale-rewards", "group"],
    "no division": [*ANSWER_ALONE, *KL, *UNDIVIDED],
    "gated": ["--weights", "0.2,0.4,0.2,0", *KL, *UNDIVIDED],
    "V": [*KL, *UNDIVIDED],
}
TOKENS = 24  # longest answer; the right one has 13


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--seeds", type=int, nargs="+", default=[90, 91], help="(%(default)s)")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=RUNGS, help="(all)")
    parser.add_argument("--films", type=positive_int, default=2000, help="drawn, all splits together (%(default)s)")
    parser.add_argument("--sft-steps", type=positive_int, default=64, help="of the weak start (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=40, help="of every rung (%(default)s)")
    parser.add_argument("--lr", default="1e-3", help="of every rung but that with its own (%(default)s)")
    parser.add_argument("--small", action="store_true", help="few films and steps: the numbers mean nothing")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/grpo_ladder"))
    # fmt: on
    args = parser.parse_args(argv)
    if args.small:
        args.films, args.sft_steps, args.steps = 80, 2, 2
    return args


def make_data(args, seed, folder):
    """The file of all splits' questions about the effusion, answered by the answer alone -> (path, rows of test)."""
    settings = PhantomSettings(prevalence={"Pleural Effusion": 0.5}, together={}, severities=(0, 0, 1))
    rows, _ = make_rows("phantom", "all", seed=seed, image_dir=folder / "films", studies=args.films, settings=settings)
    rows = [row | {"output": json.dumps({"answer": row["answer"]})} for row in rows]
    rows = [row for row in rows if row["content_type"] == "presence" and "effusion" in row["question"].lower()]
    write_rows(folder / "rows.json", rows)
    return folder / "rows.json", [row for row in rows if row["split"] == "test"]


# ---------------------------------------------------------------------------------------------------------------- rungs


def paid_anywhere(text, gold):
    """The first form of grpo_minimal.reward: the answer between the first marks, whatever else is written."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    said, right = (re.findall(r"\w+", answer.lower()) for answer in (found[1] if found else "", gold))
    return float(found is not None and said == right)


def dealt_out(rewards):
    """grpo_minimal.group_advantages of each row of rewards (Q, G) in another order."""
    return compare(torch.stack([row[torch.randperm(len(row))] for row in rewards]))


compare = grpo_minimal.group_advantages


def climb(args, rung, seed, weak, data, run):
    """Train a rung from the weak start into the folder run, by the script a user would run."""
    same = ["--sft-ckpt", weak, "--seed", seed, "--lr", args.lr, "--steps", args.steps, "--eval-every",
            max(1, args.steps // 2), "--max-new-tokens", TOKENS, "--out-dir", run, "--overwrite", "--device",
            "cpu"]  # fmt: skip
    if RUNGS[rung] is None:
        changed = {"anywhere": {"reward": paid_anywhere}, "dealt out": {"group_advantages": dealt_out}}.get(rung, {})
        with mock.patch.dict(vars(grpo_minimal), changed):
            grpo_minimal.main(list(map(str, [*same, "--data", data, "--questions", 16])))
    else:
        shape = ["--data-jsonl", data, "--style", "think", "--batch-size", 16, "--num-generations", 8, "--eval-rows",
                 122]  # fmt: skip
        train_grpo.main(list(map(str, [*same, *shape, *RUNGS[rung]])))


# -------------------------------------------------------------------------------------------------------------- measure


@torch.no_grad()
def probabilities(vlm, rows):
    """-> (probability of the whole response with the gold answer, the same of the other), lists."""
    ids = {
        answer: vlm.tokenizer(build_target({"output": json.dumps({"answer": answer})}, "think"))["input_ids"]
        + stop_tokens(vlm)[:1]
        for answer in ("yes", "no")
    }
    right, wrong = [], []
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        asked = [build_prompt(row["question"], "think") for row in some]
        prompts = make_prompts(vlm, asked, [read_pixels(row["image"]) for row in some])
        logp, _, mask = logprobs(vlm, prompts, [[ids["yes"], ids["no"]]] * len(some))
        both = (logp * mask).sum(1).exp().view(-1, 2).tolist()
        right += [pair[row["answer"] == "no"] for pair, row in zip(both, some, strict=True)]
        wrong += [pair[row["answer"] == "yes"] for pair, row in zip(both, some, strict=True)]
    return right, wrong


def measure(adapter, rows):
    """The model that evaluate.py would load -> {what: one value a row}."""
    vlm = load_model(SimpleNamespace(model=None, adapter=str(adapter), quant="none"), torch.device("cpu"))
    records = ask(Answerer(vlm, max_new_tokens=TOKENS), rows, load_images(rows)[0], "think")
    right, wrong = probabilities(vlm, rows)
    return {"right": [float(record["correct"]) for record in records],
            "P": [a / max(a + b, 1e-30) for a, b in zip(right, wrong, strict=True)], "form": right}  # fmt: skip


def summary(values, start, groups):
    """-> {what: share with its interval; gain: the same of the paired difference to the start}."""
    found = {name: rate(some, groups) for name, some in values.items()}
    gains = {name: [a - b for a, b in zip(some, start[name], strict=True)] for name, some in values.items()}
    return found | {"gain": {name: rate(some, groups) for name, some in gains.items()}}


def percent(numbers):
    return f"{100 * numbers['value']:.1f} [{100 * numbers['low']:.1f}, {100 * numbers['high']:.1f}]"


@script
def main(argv=None):
    args = parse_args(argv)
    started, results, lines = time.time(), {}, []
    for seed in args.seeds:
        folder = args.out_dir / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        data, test_rows = make_data(args, seed, folder)
        groups, weak = [row["group"] for row in test_rows], folder / "weak"
        train_sft.main(list(map(str, [
            "--model", "tiny", "--data", data, "--styles", "think", "--eval-style", "think", "--batch-size", 16,
            "--per-image", 1, "--steps", args.sft_steps, "--eval-every", args.sft_steps, "--warmup", 0.05,
            "--eval-rows", 400, "--eval-batch", 200, "--seed", seed, "--device", "cpu", "--save-to", weak, "--out-dir",
            folder / "sft", "--overwrite",
        ])))  # fmt: skip
        start = measure(weak, test_rows)
        results[seed] = {"start": summary(start, start, groups)}
        for rung in ["start", *args.rungs]:
            if rung != "start":
                run, begin = folder / rung.replace(" ", "_"), time.time()
                climb(args, rung, seed, weak, data, run)
                seconds = time.time() - begin
                results[seed][rung] = summary(measure(run, test_rows), start, groups) | {"seconds": seconds}
            row = results[seed][rung]
            gains = [percent(row["gain"][name]) for name in ("right", "P")] if rung != "start" else ["", ""]
            lines.append([seed, rung, percent(row["right"]), gains[0], percent(row["P"]), gains[1],
                          f"{row['form']['value']:.2f}", f"{row.get('seconds', 0):.0f}"])  # fmt: skip
            print(markdown_table(["seed", "rung", "right", "gain", "P", "gain", "form", "seconds"], lines), flush=True)
            write_json(args.out_dir / "metrics.json", {
                "dataset": "phantom", "n": len(test_rows), "results": results,
                "settings": vars(args) | {"out_dir": str(args.out_dir)}, **run_facts(started, "cpu"),
            })  # fmt: skip
    print(f"results in {args.out_dir} ({time.time() - started:.0f} s)")
    return results


if __name__ == "__main__":
    main()
