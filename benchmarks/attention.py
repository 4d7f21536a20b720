"""
What reading attention costs, and whether attention_viz can tell a model that looks from one that does not.

Usage:
    python benchmarks/attention.py cost            # capture beside plain sdpa and output_attentions=True, all families
    python benchmarks/attention.py train           # the tiny pair, from nothing: each once to look, once blind
    python benchmarks/attention.py proof           # evaluate.py on these four; needs `train`
    python benchmarks/attention.py train proof --small        # the short form for tests: nothing is learned

cost: generation of --new-tokens tokens after about --prompt-tokens, image included; plain and with capture take turns,
medians of --rounds. Bytes are counted: of the rows that capture keeps for the image's columns, and of every matrix that
output_attentions=True returns. Memory: growth of the process's peak over that of plain sdpa (Linux).
train: tiny:gemma3 (64 image tokens) and tiny:llava learn to answer yes/no questions about three findings on phantom
films, in many wordings. "sees" has questions whose words do not tell the answer; "blind" has questions whose words
tell it (guessable), and a grey picture in place of every film. Seconds are counted.
proof: 100 studies x 6 wordings twice: as trained (the causal filter, methods ranked by hit rate) and guessable, where
both are right and only the report can tell them apart. Writes --out-dir/metrics.json beside the models and reports.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch

from attention_viz.cases import phantom_settings, wordings_of
from attention_viz.evaluate import main as evaluate
from attention_viz.maps import NEUTRAL
from shared.models.capture import AttentionCapture
from shared.models.inputs import ImageStore, continuation, prompt_ids
from shared.models.loading import load_vlm, save_vlm
from shared.models.passes import PartSize, image_columns, make_prompts, margin, sample
from shared.models.tiny import tiny_folder
from shared.models.tuning import BatchOrder, Example, backward
from shared.phantom import phantom_study
from shared.runtime import atomic_folder, pick_device, positive_float, positive_int, read_json, run_facts, script
from shared.runtime import seed_everything, write_json
from shared.training import GuardedStep, learning_rate

CONDITIONS = ["Pleural Effusion", "Pneumothorax", "Consolidation"]
TRAINED = {"gemma3": dict(image_tokens=64), "llava": {}}
FAMILIES = ("gemma3", "qwen2vl", "qwen25vl", "qwen3vl", "llava")
SIZE = 112
FRESH = 400_000  # index of the first film that training watches itself on
WIDER = 3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("parts", nargs="+", choices=["cost", "train", "proof"], help="what to do, in this order")
    parser.add_argument("--models", nargs="+", default=list(TRAINED), choices=list(TRAINED),
        help="train, proof: which (%(default)s)")
    parser.add_argument("--films", type=positive_int, default=5000, help="train: phantom films (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=1800, help="train: optimiser steps (%(default)s)")
    parser.add_argument("--blind-steps", type=positive_int, default=300, help="train: of the blind ones (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="train: questions per step (%(default)s)")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="train: highest learning rate (%(default)s)")
    parser.add_argument("--studies", type=positive_int, default=100, help="proof: studies of each set (%(default)s)")
    parser.add_argument("--prompt-tokens", type=positive_int, default=1000, help="cost: of the prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=positive_int, default=16, help="cost: generated (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=7, help="cost: turns of each (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a few steps of everything")
    # fmt: on
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/attention"))
    args = parser.parse_args(argv)
    if args.small:
        args.films, args.steps, args.blind_steps, args.batch_size, args.studies = 12, 2, 2, 4, 10
        args.prompt_tokens, args.new_tokens, args.rounds = 100, 3, 1
    return args


# ------------------------------------------------------------------------------------------------------------ training


def questions(films, settings, seed, start=0, variants=9):
    """
    -> films uint8 (N, 112, 112), and (film, text, answer) of their yes/no questions about CONDITIONS in many wordings,
    with a description of each film: where each finding is. Answers of one token alone are learned too late.
    """
    pixels, cases = [], []
    for number in range(films):
        study = phantom_study(seed, start + number, SIZE, settings)
        pixels.append(study.image)
        for q in study.questions:
            if q.content == "presence" and q.condition in CONDITIONS:
                cases += [(number, w["question"], w["answer_gt"]) for w in wordings_of(q, number, variants)]
                cases += [(number, q.text, q.answer)] * (variants > 1)  # the original twice
        seen = "; ".join(f"{f.kind}, {f.side} {f.zone}".strip() for f in study.drawn) or "nothing"
        cases += [(number, NEUTRAL, seen)] * (4 if variants > 1 else 0)
    return pixels, cases


@torch.no_grad()
def accuracy(vlm, films, cases):
    """Share of yes/no questions answered rightly by the margin."""
    right = []
    for k in range(0, len(cases), 50):
        some = cases[k : k + 50]
        said = margin(vlm, make_prompts(vlm, [q for _, q, _ in some], [films[f] for f, _, _ in some]))
        right += [(m > 0) == (a == "yes") for m, (_, _, a) in zip(said.tolist(), some, strict=True)]
    return statistics.mean(right)


def train(family, blind, args):
    """-> folder of the model; beside it a JSON file with seconds and accuracy on films of other patients."""
    folder = args.out_dir / f"{family}-{'blind' if blind else 'sees'}"
    begin = time.time()
    seed_everything(args.seed)
    vlm = load_vlm(str(tiny_folder(f"tiny:{family}", **TRAINED[family])))
    with torch.no_grad():  # deviations of 0.02, made for thousands of numbers, hardly let 128 through
        for p in vlm.model.parameters():
            p.mul_(WIDER if p.ndim > 1 else 1)
    settings = phantom_settings(CONDITIONS, severe=True, guessable=float(blind))
    films, cases = questions(args.films, settings, args.seed)
    fresh_films, fresh = questions(100, settings, args.seed, start=FRESH, variants=1)
    cases = [case for case in cases if not (blind and case[1] == NEUTRAL)]
    steps, grey = args.blind_steps if blind else args.steps, np.full((SIZE, SIZE), 90, np.uint8)
    films, fresh_films = ([grey] * len(some) if blind else some for some in (films, fresh_films))
    store = ImageStore(vlm.processor, films, budget_gib=1.0)
    grid = tuple(store.grids[0])
    texts = {answer: np.array(continuation(vlm, answer, end=True)[0], np.int32) for _, _, answer in cases}
    prompts = {question: prompt_ids(vlm, question, (grid,)) for _, question, _ in cases}
    examples = [
        Example(
            i, "plain", store.number_of[film], prompts[question], texts[answer], np.ones_like(texts[answer], np.float32)
        )
        for i, (film, question, answer) in enumerate(cases)
    ]
    order = BatchOrder(examples, args.batch_size, 4, args.seed, steps=steps)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.95))
    scaler, size = torch.amp.GradScaler("cpu", enabled=False), PartSize(args.batch_size)
    guard = GuardedStep(optimizer, scaler, vlm.model.parameters(), grad_clip=1.0)
    losses = []
    for step in range(steps):
        vlm.model.train()
        loss = backward(vlm, order.at(step)[1], store, size, scaler, train_tower=True).item()
        guard.step(loss, learning_rate(step, steps, max(1, steps // 20), args.lr))
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            right = accuracy(vlm, fresh_films, fresh)
            print(f"{folder.name}: step {step + 1}/{steps}, loss {statistics.mean(losses[-50:]):.4f}, "
                  f"right on fresh films {right:.3f}, {time.time() - begin:.0f} s", flush=True)  # fmt: skip
    with atomic_folder(folder) as building:
        save_vlm(vlm, building)
    facts = dict(
        films=len(films), examples=len(examples), steps=steps, batch=args.batch_size, phantom=True, blind=blind
    )
    facts |= dict(conditions=CONDITIONS, seed=args.seed, loss=statistics.mean(losses[-50:]), fresh_accuracy=right)
    write_json(folder.with_suffix(".json"), facts | run_facts(begin, "cpu"))
    return folder
