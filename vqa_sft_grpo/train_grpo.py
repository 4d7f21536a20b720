"""
GRPO: let a fine-tuned vision-language model answer each question several times, and make the better answers likelier.

Usage:
    python vqa_sft_grpo/prepare_data.py --output data/train.json --dataset both --split train --grpo_output data/grpo_data.jsonl
    python vqa_sft_grpo/train_grpo.py --base_model Qwen/Qwen2-VL-2B-Instruct --sft_ckpt checkpoints/qwen2vl_sft \
        --data_jsonl data/grpo_data.jsonl --out_dir checkpoints/qwen2vl_grpo --steps 1000 --batch_size 2 --lr 1e-6
        --weights "0.2,0.4,0.2,0.2"
    python vqa_sft_grpo/train_grpo.py --sft_ckpt checkpoints/tiny_sft --data_jsonl data/phantom_grpo.jsonl --batch_size 16 --num_generations 8 --lr 5e-4
    python vqa_sft_grpo/train_grpo.py --resume checkpoints/qwen2vl_grpo
    python vqa_sft_grpo/train_grpo.py --explain 12.1.3 --out_dir checkpoints/qwen2vl_grpo  # step 12, prompt 1, rollout 3: why it earned what it earned
    python vqa_sft_grpo/train_grpo.py --dry-run  # everything once, seconds

Expected of these: see vqa_sft_grpo/README.md, where each number stands beside its command.
Writes to the run folder: the adapter with the best validation accuracy (evaluate.py and infer.py take the folder as
--sft_ckpt), rollouts.jsonl (every rollout with every term of its reward), completions.md (the last ones as a table),
history.jsonl and meanings.json (what its names mean), figures/curves.png, last.pt (to resume), metrics.json.

One step
    1  --batch-size questions; the vision tower sees each image once, the prompt goes through the model once, and
       --num-generations answers are sampled from it
    2  rewards.py scores each answer. For V, the answer's log-probability is measured again without the gold region and
       without --cf-regions random ones of the same size
    3  advantages: better or worse than the other answers to the same question
    4  one gradient step (--inner-steps: several) on grpo.policy_loss, image included, --micro-batch rollouts at a time

How this differs from the textbook (GRPO in DeepSeekMath, arXiv 2402.03300; trl 1.16.0; formulas in grpo.py)
    loss       dapo: every token of a step counts alike, also that of a long answer; trl's default as well
    scaling    none: advantages are not divided by the spread of the group, which would make a difference of 0.01 in box
               overlap as large as right against wrong (and hide V, see rewards.py). --scale-rewards group is the
               textbook and trl's default
    clipping   1 - 0.2 to 1 + 0.28; it only matters with --inner-steps above 1, since otherwise every ratio is 1
    KL         0.02 of the corrected k3 estimate from the model as it was given: the adapter switched off, or where
               training goes on with an SFT adapter, a frozen copy of it. trl's default is none
    V          is part of the reward, and depends on the weights by itself, so the gradient of the expected reward has a
               second part, E[dR/dV grad V]: --cf-gradient 1 adds it, 0 leaves it out as usual. An answer counts once in
               it, whatever its length, where most losses divide the first part by the number of tokens
    sampling   from the model's own distribution: no top-k or top-p, with which log-probabilities would not be those of
               what was drawn
    vision     the tower is frozen: its features are computed once per step and serve sampling, scoring, policy and
               reference
    dropout    off, so that the policy that learns is the one that sampled; the first step of every run compares its
               log-probabilities with the sampler's own, and checks ratios, clipping and KL: a mistake stops the run
"""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from tqdm import tqdm

from shared.data.download import sha256_of
from shared.models.loading import LORA_LAYERS, QUANTS, add_lora, count_parameters, load_vlm
from shared.models.tiny import is_tiny, quietly
from shared.runtime import InputError, add_resume, fraction, free_gpu, load_checkpoint, not_negative, open_run_dir
from shared.runtime import peak_memory, pick_device, positive_float, positive_int, read_json, run_facts, save_checkpoint
from shared.runtime import script, script_parser, seed_everything, write_json, write_jsonl
from shared.training import StopSignal, learning_rate, refuse_other_settings
from vqa_sft_grpo.alarms import alarms
from vqa_sft_grpo.counterfactual import FILLS, region_iou
from vqa_sft_grpo.examples import read_pixels
from vqa_sft_grpo.grpo import SCALES, check_first_step, combine_metrics, group_advantages, policy_loss
from vqa_sft_grpo.grpo_log import HISTORY, cut_rollouts, describe, draw_curves, draw_edits, log_rollouts, mean
from vqa_sft_grpo.grpo_log import write_completions
from vqa_sft_grpo.infer import BASE_MODEL, model_of
from vqa_sft_grpo.rows import GRPO_FIELDS, make_rows, phantom_settings, read_rows
from vqa_sft_grpo.prompting import STYLES, boxes_from_model, parse_response
from vqa_sft_grpo.rewards import COMPOSITIONS, MEANINGS, NATS, AnswerFrequencies, RewardSettings, answer_to_score
from vqa_sft_grpo.rewards import explain, gold_of, ignored_fields, images_of_v, lend_regions, measure_drops, plan_edits
from vqa_sft_grpo.rewards import score_rollouts, slope
from vqa_sft_grpo.rollouts import Fits, answer_logprobs, completion_logprobs, make_prompts, never_drawn, sample
from vqa_sft_grpo.rollouts import stop_tokens
from vqa_sft_grpo.train_sft import limit_pixels, restore

TASK = "vqa_sft_grpo"
MOST_SKIPPED = 20  # steps in a row without a finite loss or gradient
TOLERANCE = {
    torch.float32: 1e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.1,
}  # mean distance in nats of log-probabilities computed token by token and all at once


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("data")
    # fmt: off
    g.add_argument("--data-jsonl", "--data", dest="data_jsonl", default="data/grpo_data.jsonl", metavar="FILE",
        help="rows of prepare_data.py --grpo_output (--output does as well), or phantom: drawn here (%(default)s)")
    g.add_argument("--films", type=positive_int, default=2000,
        help="phantom: films to draw, and a tenth more for validation (%(default)s)")
    g.add_argument("--conditions", nargs="+", metavar="NAME",
        help="phantom: draw and ask about these only (default: all)")
    g.add_argument("--style", default="json", choices=STYLES, help="prompt style (%(default)s)")
    g.add_argument("--max-pixels", type=positive_int, default=262_144,
        help="Qwen2-VL: images are scaled down to this area; 784 pixels are one token (%(default)s)")
    g = parser.add_argument_group("model")
    g.add_argument("--model", help=f"hub name, folder or tiny (default: what --sft-ckpt was trained on, else "
        f"{BASE_MODEL}); also --base-model")
    g.add_argument("--sft-ckpt", metavar="FOLDER",
        help="of train_sft.py: an adapter, which is trained on, or a whole model, which gets a new one")
    g.add_argument("--quant", default="none", choices=QUANTS, help="weights in 4 or 8 bit (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="computing precision (%(default)s)")
    g.add_argument("--lora-rank", type=positive_int, default=16,
        help="of a new adapter; alpha is twice that (%(default)s)")
    g = parser.add_argument_group("rollouts")
    g.add_argument("--num-generations", type=positive_int, default=4, metavar="G",
        help="answers per question, at least 2; 8 is better where memory allows (%(default)s)")
    g.add_argument("--max-new-tokens", type=positive_int, default=256, metavar="TOKENS",
        help="longest answer (%(default)s)")
    g.add_argument("--temperature", type=positive_float, default=1.0,
        help="of sampling and of all log-probabilities (%(default)s)")
    g = parser.add_argument_group("reward", "see rewards.py")
    g.add_argument("--weights", default="0.2,0.4,0.2,0.2", help="of format, answer, consistency, counterfactual "
        "(%(default)s); 0 for the last: edited images are not looked at")
    g.add_argument("--composition", default="gated", choices=COMPOSITIONS,
        help="how the terms make up the reward (%(default)s)")
    g.add_argument("--cf-regions", type=positive_int, default=4, metavar="K",
        help="random regions to compare the gold one with (%(default)s)")
    g.add_argument("--cf-fill", default="mixed", choices=[*FILLS, "mixed"],
        help="what an edit puts into a region; mixed: another one for each row (%(default)s)")
    g.add_argument("--cf-gradient", type=not_negative, default=1.0,
        help="weight of the reward's own gradient through V, 0 leaves it out (%(default)s)")
    g = parser.add_argument_group("loss", "see grpo.py")
    g.add_argument("--scale-rewards", default="none", choices=SCALES,
        help="what advantages are divided by (%(default)s)")
    g.add_argument("--eps-low", type=positive_float, default=0.2, help="ratios are clipped at 1 - this (%(default)s)")
    g.add_argument("--eps-high", type=positive_float, default=0.28, help="and at 1 + this (%(default)s)")
    g.add_argument("--beta", type=not_negative, default=0.02,
        help="weight of the KL from the reference; 0: it is not computed (%(default)s)")
    g.add_argument("--inner-steps", type=positive_int, default=1, metavar="N",
        help="gradient steps on the same answers (%(default)s)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=positive_int, default=1000, help="steps (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=2, metavar="P", help="questions per step (%(default)s)")
    g.add_argument("--micro-batch", type=positive_int, help="answers (or edited images) per pass; the result stays "
        "the same (default: --num-generations, for small models all)")
    g.add_argument("--lr", type=positive_float, default=1e-6,
        help="highest learning rate of AdamW; an adapter bears 1e-5, the tiny model 5e-4 (%(default)s)")
    g.add_argument("--warmup", type=fraction, default=0.05,
        help="share of the steps with rising learning rate, before a cosine to 0 (%(default)s)")
    g.add_argument("--grad-clip", type=positive_float, default=1.0, help="largest norm of the gradient (%(default)s)")
    g.add_argument("--checkpointing", action="store_true",
        help="compute activations again in the backward pass; prompts are then not shared there")
    g = parser.add_argument_group("validation, saving, looking")
    g.add_argument("--eval-every", type=positive_int, metavar="STEPS",
        help="steps between two validations (default: ten in a run)")
    g.add_argument("--eval-rows", type=positive_int, default=100, metavar="N",
        help="validation rows that are answered, drawn with --seed (%(default)s)")
    g.add_argument("--save-every", type=positive_int, default=25, metavar="STEPS",
        help="steps between two last.pt: what a killed run repeats (%(default)s)")
    g.add_argument("--explain", metavar="ID", help="no training: print why a rollout of --out-dir "
        "(step.prompt.rollout, as in rollouts.jsonl) earned what it earned, and draw its edited images")
    # fmt: on
    add_resume(g)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data_jsonl, args.model, args.device, args.films, args.steps = (
            "phantom",
            args.model if args.model and is_tiny(args.model) else None if args.sft_ckpt else "tiny",
            "cpu",
            12,
            3,
        )
        args.batch_size, args.eval_rows, args.eval_every, args.max_new_tokens = (
            min(args.batch_size, 2),
            4,
            2,
            min(args.max_new_tokens, 32),
        )
    if args.num_generations < 2:
        parser.error("--num-generations must be at least 2: an answer alone has nothing to be compared with")
    if args.explain and not args.out_dir:
        parser.error("--explain needs the run's folder: --out-dir FOLDER")
    if args.eps_low >= 1 or args.warmup == 1:
        parser.error("--eps-low and --warmup must be below 1")
    return args


# ---------------------------------------------------------------------------------------------------------------- rows


def load_rows(args):
    """
    -> (training rows, validation rows, facts for metrics.json). Rows of a test split are left out, whatever the file
    holds.
    """
    if args.data_jsonl.lower() == "phantom":
        rows, audit = make_rows(
            "phantom",
            "train",
            seed=args.seed,
            image_dir=Path("outputs") / TASK / "phantom_images",
            studies=args.films,
            settings=phantom_settings(args.conditions),
        )
        facts = {
            "name": "phantom",
            "policy": audit["policy"],
            "sha256": f"drawn: {audit['settings_of_phantom']}, {args.films} films, seed {args.seed}",
        }
    else:
        rows = read_rows(args.data_jsonl, fields=("question",))
        for number, row in enumerate(rows, 1):
            if not {"image", "image_path"} & row.keys() or not {"answer", "gold"} & row.keys():
                raise InputError(
                    f"{args.data_jsonl}, row {number} lacks {' or '.join(GRPO_FIELDS)}; make the file again with"
                    " vqa_sft_grpo/prepare_data.py"
                )
        names = "+".join(sorted({r.get("dataset", "unknown") for r in rows}))
        facts = {
            "name": names,
            "policy": "+".join(sorted({r.get("policy", "unknown") for r in rows})),
            "source": args.data_jsonl,
            "sha256": sha256_of(Path(args.data_jsonl)),
        }
        if note := ignored_fields(rows):
            print(f"note: {note}")
    train = [r for r in rows if r.get("split", "train") == "train"]
    held_out = [r for r in rows if r.get("split") == "val"]
    if train and not held_out:  # files of before, without splits: a tenth of the images
        groups = sorted({group_of(r) for r in train})
        chosen = set(random.Random(args.seed).sample(groups, len(groups) // 10))
        train, held_out = ([r for r in train if (group_of(r) in chosen) == taken] for taken in (False, True))
    train, held_out = train[: args.limit], held_out[: args.limit]
    if not train or not held_out:
        raise InputError(
            f"{args.data_jsonl} has {len(train)} rows to train on and {len(held_out)} for validation, and both are"
            " needed: make it with prepare_data.py --split train --grpo_output FILE"
        )
    lend_regions(train + held_out, train)
    held_out = [
        held_out[i]
        for i in sorted(random.Random(args.seed).sample(range(len(held_out)), min(args.eval_rows, len(held_out))))
    ]
    facts |= {
        "phantom": any(r.get("dataset") == "phantom" for r in rows),
        "train_rows": len(train),
        "val_rows": len(held_out),
        "with_region": sum(bool(r.get("region")) for r in train),
    }
    return train, held_out, facts


def group_of(row):
    return str(row.get("group") or row.get("image_path") or row["image"])


def image_of(row):
    """-> uint8 (H, W) or (H, W, 3)."""
    return np.array(read_pixels(row.get("image_path") or row["image"]))


def with_size(row, image):
    """Rows of older files do not say how large their image is; boxes need it."""
    return row | {"height": image.shape[0], "width": image.shape[1]}


def row_at(place, count, seed):
    """
    The row of a place in the endless stream of questions: every row once per epoch, each epoch in an order of its own.
    """
    return int(order_of(count, seed, place // count)[place % count])


@functools.lru_cache(maxsize=2)
def order_of(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


# --------------------------------------------------------------------------------------------------------------- policy


def load_policy(args, device):
    """-> VLM whose adapter is trained; dropout is off, so that the policy that learns is the one that samples."""
    name, adapter = model_of(args.model, args.sft_ckpt)
    tiny = is_tiny(name)
    vlm = load_vlm(
        name,
        quant=args.quant,
        device=device,
        dtype="float32" if tiny and args.dtype == "auto" else args.dtype,
        adapter=adapter,
        family="qwen2vl",
        trainable_adapter=True,
    )
    if adapter:
        vlm.model.load_adapter(adapter, "reference", is_trainable=False)
    else:
        add_lora(vlm, rank=args.lora_rank, dropout=0.0, layers=LORA_LAYERS, checkpointing=False)
    if args.checkpointing:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    limit_pixels(vlm.processor, args.max_pixels)
    vlm.model.train(
        args.checkpointing
    )  # without dropout the two modes compute the same; only training recomputes activations
    for module in vlm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return vlm


@contextlib.contextmanager
def as_reference(vlm):
    """The model as it was given: its adapter off, or the frozen copy of the adapter that it came with."""
    if "reference" not in vlm.model.peft_config:
        with vlm.model.disable_adapter():
            yield
        return
    vlm.model.set_adapter("reference")
    try:
        yield
    finally:
        vlm.model.set_adapter("default")


def trained_parameters(vlm):
    return {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}


def text_of(vlm, ids):
    """
    New tokens as text: without the one that ends them, but with any other special token, which the reward must see.
    """
    return vlm.tokenizer.decode(ids[:-1] if ids[-1] in stop_tokens(vlm) else ids, skip_special_tokens=False)


# ------------------------------------------------------------------------------------------------------------- rollouts


class Batch:
    """
    The questions of a step with their rollouts. Lists by question: rows, prompts, plans, edited (Prompts of the plan's
    images), groups, logps; by rollout: texts, terms.
    """

    def __init__(self, **fields):
        self.__dict__.update(fields)

    @property
    def rewards(self):
        return [t["reward"] for t in self.terms]


def roll_out(vlm, rows, places, args, settings, frequencies, fits, generator):
    """Sample answers to rows and score them -> Batch. generator None: one answer each, the most likely one."""
    begin = time.time()
    images = [image_of(row) for row in rows]
    rows = [with_size(row, image) for row, image in zip(rows, images, strict=True)]
    prompts = make_prompts(vlm, [r["question"] for r in rows], args.style, images, fits.size)
    group_size = args.num_generations if generator is not None else 1
    groups, logps = [], []

    def some(start, stop):
        found = sample(
            vlm,
            prompts[start:stop],
            group_size,
            args.max_new_tokens,
            args.temperature if generator is not None else 1.0,
            generator,
            never_drawn(vlm),
            stop_tokens(vlm),
        )
        return list(zip(*found, strict=True))

    for ids, logp in fits.parts(some, len(prompts), each=group_size):
        groups.append(ids)
        logps.append(logp)
    sampled = time.time()

    of_rollout = [row for row in rows for _ in range(group_size)]
    texts = [text_of(vlm, ids) for group in groups for ids in group]
    plans, edited, drops = [None] * len(rows), [None] * len(rows), None
    if settings.weights[3] > 0:
        plans = [
            plan_edits(row, image, args.cf_regions, args.cf_fill, [args.seed, place])
            for row, image, place in zip(rows, images, places, strict=True)
        ]
        drops, edited = drops_of(vlm, rows, texts, plans, group_size, settings, fits)
    terms = score_rollouts(
        of_rollout, texts, settings, frequencies, drops, [len(ids) for group in groups for ids in group]
    )
    seconds = {"seconds_sample": sampled - begin, "seconds_score": time.time() - sampled}
    return Batch(
        rows=rows,
        places=places,
        prompts=prompts,
        plans=plans,
        edited=edited,
        groups=groups,
        logps=logps,
        texts=texts,
        terms=terms,
        seconds=seconds,
    )


def drops_of(vlm, rows, texts, plans, group_size, settings, fits):
    """-> what measure_drops gives for the rollouts, and per row the Prompts of its edited images."""
    answers = [answer_to_score(text, settings) for text in texts]
    needed = [
        bool(plan.images) and any(a is not None for a in answers[i * group_size : (i + 1) * group_size])
        for i, plan in enumerate(plans)
    ]
    pairs = [(rows[i]["question"], image) for i, plan in enumerate(plans) if needed[i] for image in plan.images]
    prompts = (
        make_prompts(vlm, [q for q, _ in pairs], settings.style, [image for _, image in pairs], fits.size)
        if pairs
        else []
    )
    place = {id(image): n for n, (_, image) in enumerate(pairs)}

    @torch.no_grad()
    def score(images, questions, said):
        jobs = {}  # by image: its answers share one pass over the prompt
        for n, (image, answer) in enumerate(zip(images, said, strict=True)):
            jobs.setdefault(place[id(image)], []).append((n, answer))
        flat = list(jobs.items())

        def some(start, stop):
            part = flat[start:stop]
            found = answer_logprobs(
                vlm,
                [prompts[i] for i, _ in part],
                [[answer for _, answer in of_image] for _, of_image in part],
                settings.style,
                never_drawn(vlm),
            )
            return list(zip([n for _, of_image in part for n, _ in of_image], found.tolist(), strict=True))

        return [value for _, value in sorted(fits.parts(some, len(flat)))]

    drops = measure_drops(
        score,
        [row["question"] for row in rows for _ in range(group_size)],
        answers,
        [plan for plan in plans for _ in range(group_size)],
    )
    edited = [
        [prompts[place[id(image)]] for image in plan.images] if needed[i] else None for i, plan in enumerate(plans)
    ]
    return drops, edited


# ------------------------------------------------------------------------------------------------------------- learning


def logprobs_of(vlm, batch, start, stop, args, share=True):
    """-> logp, entropy, mask (stop - start, T) of the rollouts start .. stop - 1, padded to the longest of them."""
    size = args.num_generations
    first, last = start // size, (stop - 1) // size + 1
    groups = [batch.groups[q][max(0, start - q * size) : stop - q * size] for q in range(first, last)]
    return completion_logprobs(vlm, batch.prompts[first:last], groups, args.temperature, never_drawn(vlm), share)


@torch.no_grad()
def fixed_logprobs(vlm, batch, args, fits):
    """Log-probabilities that no gradient goes through -> list of (tokens of the rollout,) tensors."""

    def some(start, stop):
        logp, _, mask = logprobs_of(vlm, batch, start, stop, args)
        return [line[keep] for line, keep in zip(logp, mask, strict=True)]

    return fits.parts(some, len(batch.texts))


def check_sampler(vlm, batch, args, fits):
    """
    -> fixed_logprobs of the policy, after a look whether they are those that the sampler found token by token: if not,
    the two see different inputs (image, positions, temperature), and training would go astray in silence. RuntimeError.
    """
    lines = fixed_logprobs(vlm, batch, args, fits)
    sampled = torch.tensor([logp for group in batch.logps for line in group for logp in line], device=vlm.device)
    distance = (torch.cat(lines) - sampled).abs().mean().item()
    if not distance <= TOLERANCE[vlm.dtype]:
        raise RuntimeError(
            f"The policy that learns must be the policy that sampled: their log-probabilities differ by {distance:.3g}"
            " nats on average. The passes see different inputs or settings."
        )
    return lines


def padded_logprobs(lines, start, stop, like):
    """Lines start .. stop - 1 -> (B, T) as `like`, 0 behind the ends."""
    out = torch.zeros_like(like)
    for row, line in zip(out, lines[start:stop], strict=True):
        row[: len(line)] = line
    return out


def loss_and_gradient(vlm, batch, advantages, old, ref, args, fits, scaler):
    """Adds the gradient of policy_loss over all rollouts to the parameters -> (loss, metrics)."""
    n = len(batch.texts)
    total_tokens = sum(len(ids) for group in batch.groups for ids in group)
    while True:
        total, parts, failed = 0.0, [], None
        try:
            for start in range(0, n, fits.size):
                stop = min(n, start + fits.size)
                logp, entropy, mask = logprobs_of(vlm, batch, start, stop, args, share=not args.checkpointing)
                loss, metrics = policy_loss(
                    logp,
                    None if old is None else padded_logprobs(old, start, stop, logp),
                    None if ref is None else padded_logprobs(ref, start, stop, logp),
                    advantages[start:stop],
                    mask,
                    eps_low=args.eps_low,
                    eps_high=args.eps_high,
                    beta=args.beta,
                    total_tokens=total_tokens,
                    entropy=entropy,
                )
                scaler.scale(loss).backward()
                total += loss.item()
                parts.append(metrics)
            return total, combine_metrics(parts)
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)
        vlm.model.zero_grad(set_to_none=True)
        free_gpu()
        fits.halve(failed)


def reward_gradient(vlm, batch, args, settings, fits, scaler):
    """
    Adds the gradient of -mean reward through V -> its loss: right answers become less likely without their gold region
    (where that is at its limit, or there is none, on the image as it is) and likelier without the random region that
    they depend on most.
    """
    n, size, jobs = len(batch.texts), args.num_generations, {}
    for i, terms in enumerate(batch.terms):
        if batch.edited[i // size] and (by_v := slope(terms, settings)):
            key = (
                i // size,
                terms["said"],
                *images_of_v(terms, batch.plans[i // size]),
            )  # equal answers to a question share a pass
            jobs[key] = jobs.get(key, 0.0) + args.cf_gradient * by_v / NATS / n
    jobs = [
        (batch.edited[q][less], batch.edited[q][more], said, weight) for (q, said, less, more), weight in jobs.items()
    ]
    total, start = 0.0, 0
    while start < len(jobs):
        part, failed = jobs[start : start + max(1, fits.size // 2)], None
        kept = (
            [None if p.grad is None else p.grad.clone() for p in trained_parameters(vlm).values()]
            if vlm.device.type == "cuda"
            else None
        )
        try:
            prompts, said = (
                [p for less, more, *_ in part for p in (less, more)],
                [[said] for _, _, said, _ in part for _ in range(2)],
            )
            less, more = (
                answer_logprobs(vlm, prompts, said, settings.style, never_drawn(vlm), share=not args.checkpointing)
                .view(-1, 2)
                .T
            )
            loss = (torch.tensor([weight for *_, weight in part]).to(less) * (less - more)).sum()
            scaler.scale(loss).backward()
            total += loss.item()
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)
        if failed is not None:  # what the part had added already goes
            for p, grad in zip(trained_parameters(vlm).values(), kept, strict=True):
                p.grad = grad
            free_gpu()
            fits.halve(failed)
            continue
        start += len(part)
    return total


def validate(vlm, rows, args, settings, fits):
    """
    Greedy answers to validation rows -> {val_accuracy, val_valid, val_iou, val_gap}. Every row counts; what cannot be
    read is wrong.
    """
    numbers = []
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        batch = roll_out(vlm, some, list(range(start, start + len(some))), args, settings, None, fits, None)
        for row, text, terms in zip(batch.rows, batch.texts, batch.terms, strict=True):
            found = parse_response(text, args.style)
            boxes = boxes_from_model(found.boxes, row["width"], row["height"])
            iou = (
                region_iou(boxes, row["region"], row["height"], row["width"])
                if row.get("region") and args.style == "json"
                else None
            )
            numbers.append(
                (
                    terms["correct"],
                    found.valid,
                    iou,
                    None if terms["d_roi"] is None else terms["d_roi"] - terms["d_rand"],
                )
            )
    return dict(
        zip(("val_accuracy", "val_valid", "val_iou", "val_gap"), map(mean, zip(*numbers, strict=True)), strict=True)
    )


def rank_of(row):
    return row["val_accuracy"], row["val_valid"], row["val_gap"] or 0.0


# ------------------------------------------------------------------------------------------------------------- training


def train(args, vlm, train_rows, val_rows, facts, run_dir):
    """Train into run_dir -> (history, best row)."""
    settings = RewardSettings(args.composition, args.weights, args.max_new_tokens, args.style)
    frequencies = AnswerFrequencies(train_rows)
    named = trained_parameters(vlm)
    optimizer = torch.optim.AdamW(list(named.values()), lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(vlm.device.type, enabled=vlm.dtype == torch.float16)
    fits = Fits(
        args.micro_batch
        or (args.batch_size * args.num_generations if count_parameters(vlm.base) < 100e6 else args.num_generations)
    )
    eval_every = args.eval_every or max(1, args.steps // 10)
    print(
        f"{count_parameters(vlm.model, trainable=True):,} of {count_parameters(vlm.model):,} parameters are trained;"
        f" {len(train_rows)} questions, {facts['with_region']} with a region; {args.steps} steps of {args.batch_size} x"
        f" {args.num_generations} answers, {fits.size} per pass, lr {args.lr:g}",
        flush=True,
    )
    step, place, history, best, told, last_path = 0, 0, [], None, set(), run_dir / "last.pt"
    if args.resume and last_path.exists():
        state = load_checkpoint(last_path, ("settings", "weights", "optimizer", "step"), what="training state")
        refuse_other_settings(settings_of(args), state["settings"], last_path)
        if state["data"] != facts["sha256"]:
            raise InputError(
                f"{last_path} was trained on other rows than those of {args.data_jsonl}; give the same file, or start a"
                " new run"
            )
        restore(state, named, optimizer, scaler, last_path)
        step, place, history, best, fits.size = (state[k] for k in ("step", "place", "history", "best", "fits"))
        cut_rollouts(run_dir / "rollouts.jsonl", step)
        print(f"resumed from {last_path} at step {step} of {args.steps}")
    elif args.resume:
        cut_rollouts(run_dir / "rollouts.jsonl", 0)
        print(f"nothing was saved yet in {run_dir}: starting from the beginning")
    write_json(run_dir / "meanings.json", {"history.jsonl": HISTORY, "rollouts.jsonl": MEANINGS})

    def save():
        """
        All it takes to go on exactly here; which questions come, and every random number, follow from seed, step and
        place.
        """
        save_checkpoint(
            last_path,
            {
                "weights": {n: p.detach() for n, p in named.items()},
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "step": step,
                "place": place,
                "history": history,
                "best": best,
                "fits": fits.size,
                "settings": settings_of(args),
                "data": facts["sha256"],
            },
        )
        write_jsonl(run_dir / "history.jsonl", history)

    def look(row):
        """Validation: the best adapter is kept."""
        nonlocal best
        row |= validate(vlm, val_rows, args, settings, fits)
        better = best is None or rank_of(row) > rank_of(best)
        if better:
            best = dict(row)
            save_adapter(vlm, run_dir, facts)
        return "  *" if better else ""

    if step == 0:
        start = {"step": 0}
        look(start)
        history = [start]
        print(
            f"before: validation accuracy {start['val_accuracy']:.3f}, valid {start['val_valid']:.3f}"
            + ("" if start["val_gap"] is None else f", gap {start['val_gap']:.3f}")
        )
    bad_in_a_row = 0
    bar = tqdm(initial=step, total=args.steps, desc="GRPO", leave=False, disable=None)
    with StopSignal() as stop:
        while step < args.steps:
            begin = time.time()
            generator = torch.Generator(vlm.device).manual_seed(args.seed * 10_000_000 + step)
            places, place = list(range(place, place + args.batch_size)), place + args.batch_size
            batch = roll_out(
                vlm,
                [train_rows[row_at(p, len(train_rows), args.seed)] for p in places],
                places,
                args,
                settings,
                frequencies,
                fits,
                generator,
            )
            advantages, stats = group_advantages(batch.rewards, args.num_generations, args.scale_rewards)
            advantages = advantages.float().to(vlm.device)
            scored = time.time()

            ref = old = None
            if args.beta > 0:
                with as_reference(vlm):
                    ref = fixed_logprobs(vlm, batch, args, fits)
            if step == 0:
                old = check_sampler(vlm, batch, args, fits)
            elif args.inner_steps > 1:
                old = fixed_logprobs(vlm, batch, args, fits)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, round(args.warmup * args.steps), args.lr)
            skipped = 0
            for inner in range(args.inner_steps):
                loss, metrics = loss_and_gradient(vlm, batch, advantages, old, ref, args, fits, scaler)
                if step == inner == 0:
                    check_first_step(metrics, TOLERANCE[vlm.dtype])
                cf_loss = (
                    reward_gradient(vlm, batch, args, settings, fits, scaler)
                    if args.cf_gradient > 0 and settings.weights[3] > 0
                    else None
                )
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(list(named.values()), args.grad_clip)
                if math.isfinite(loss) and torch.isfinite(norm):
                    scaler.step(optimizer)
                    bad_in_a_row = 0
                else:  # nothing is changed; float16 also lowers its scale
                    skipped, bad_in_a_row = 1, bad_in_a_row + 1
                    if bad_in_a_row >= MOST_SKIPPED:
                        raise InputError(
                            f"loss or gradient was not finite {bad_in_a_row} times in a row, up to step {step + 1}:"
                            f" lower --lr, or use --dtype float32; {run_dir} keeps what was saved before"
                        )
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
            step += 1

            ends = set(stop_tokens(vlm))
            row = {
                "step": step,
                **describe(batch, advantages, stats),
                "truncated": mean(ids[-1] not in ends for group in batch.groups for ids in group),
            }
            row |= {
                k: metrics.get(k)
                for k in (
                    "entropy",
                    "kl",
                    "clip_low",
                    "clip_high",
                    "clip_region",
                    "ratio_mean",
                    "ratio_min",
                    "ratio_max",
                )
            }
            row |= {
                "loss": loss,
                "cf_loss": cf_loss,
                "grad_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "skipped": skipped,
                **batch.seconds,
                "seconds_update": time.time() - scored,
            }
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            peak = peak_memory(vlm.device)
            row |= {"seconds": time.time() - begin, "peak_gib": peak["peak_gpu_gib"] or peak["peak_ram_gib"]}
            found = alarms([*history, row])
            for name in found.keys() - told:  # once a run; history.jsonl has every step's
                print(f"ALARM at step {step}, {name}: {found[name]}", flush=True)
            told |= found.keys()
            row["alarms"] = sorted(found)
            log_rollouts(run_dir / "rollouts.jsonl", batch, advantages, step, args.num_generations)
            if step == 1:
                print(
                    f"first answers, rewards {', '.join(f'{r:.2f}' for r in batch.rewards[: args.num_generations])}:"
                    f" {[t[:80] for t in batch.texts[: min(2, args.num_generations)]]}"
                )
            star = None
            if step % eval_every == 0 or step == args.steps:
                star = look(row)
            history.append(row)
            bar.update()
            if star is not None:
                recent = history[-min(len(history) - 1, eval_every) :]
                say = {
                    name: mean(r.get(name) for r in recent)
                    for name in ("reward", "correct", "entropy", "kl", "length", "seconds")
                }
                print(
                    f"step {step:5d}/{args.steps}  "
                    + "  ".join(f"{k} {v:.3f}" for k, v in say.items() if v is not None)
                    + f"  val accuracy {row['val_accuracy']:.3f}"
                    + ("" if row["val_gap"] is None else f"  gap {row['val_gap']:.3f}")
                    + star,
                    flush=True,
                )
                write_completions(run_dir / "completions.md", batch, advantages, step, args.num_generations)
                draw_curves(
                    run_dir / "figures" / "curves.png",
                    history,
                    f"{'PHANTOM films' if facts['phantom'] else facts['name']}, {vlm.name}",
                )
            if stop.requested() or step == args.steps or step % args.save_every == 0:
                save()
            if stop.requested():
                print(f"stopped after step {step}; go on with --resume {run_dir}")
                stop.exit()
    bar.close()
    return history, best


SETTINGS_ASIDE = (
    "config",
    "data_jsonl",
    "out_dir",
    "resume",
    "overwrite",
    "device",
    "micro_batch",
    "save_every",
    "explain",
)


def settings_of(args):
    """The arguments that shape the result; a resumed run must agree with the first in all of them."""
    return {k: v for k, v in vars(args).items() if k not in SETTINGS_ASIDE}


# --------------------------------------------------------------------------------------------------------------- output


def save_adapter(vlm, run_dir, facts):
    """Adapter and processor into the run folder itself, each file replaced whole: --sft_ckpt RUN then finds them."""
    building = run_dir / ".adapter.part"
    shutil.rmtree(building, ignore_errors=True)
    with quietly():
        vlm.model.save_pretrained(building, selected_adapters=["default"])
        vlm.processor.save_pretrained(building)
    write_json(building / "training.json", {"dataset": facts})  # evaluate.py stamps results with it
    for path in sorted(
        building.iterdir(), key=lambda p: p.name == "adapter_config.json"
    ):  # the file that makes it an adapter comes last
        os.replace(path, run_dir / path.name)
    building.rmdir()


def explain_rollout(args):
    """--explain ID: the summands of a rollout's reward, and the images on which its V was measured."""
    run_dir = Path(args.out_dir)
    path = run_dir / "rollouts.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir} holds no run of train_grpo.py: there is no rollouts.jsonl in it")
    was = read_json(run_dir / "settings.json")
    with path.open(encoding="utf-8") as file:
        found = next(
            (r for line in file if line.startswith(f'{{"id": "{args.explain}"') for r in [json.loads(line)]), None
        )
    if found is None:
        raise InputError(f"{path} has no rollout {args.explain}; ids are step.prompt.rollout, such as 1.0.0")
    settings = RewardSettings(was["composition"], was["weights"], was["max_new_tokens"], was["style"])
    rows, _, _ = load_rows(SimpleNamespace(**was))
    row = rows[row_at(found["place"], len(rows), was["seed"])]
    if row["question"] != found["question"] or gold_of(row) != found["gold"]:
        raise InputError(f"{was['data_jsonl']} is not the file that {run_dir} was trained on")
    print("\n".join(explain(row, found["text"], found, settings)))
    print(f"  advantage {found['advantage']:+.3f}: against the other answers to this question")
    image = image_of(row)
    plan = plan_edits(with_size(row, image), image, was["cf_regions"], was["cf_fill"], [was["seed"], found["place"]])
    if settings.weights[3] == 0 or not plan.images:
        return print(f"no edited images: {plan.why or 'the weight of the counterfactual term is 0'}")
    target = run_dir / "figures" / f"explain_{args.explain}.png"
    draw_edits(
        target, plan, [None] + [found["d_roi"]] * bool(plan.roi) + (found["d_rand_each"] or [None] * len(plan.random))
    )
    print(f"edited images (fill: {plan.fill}): {target}")


@script
def main(argv=None):
    args = parse_args(argv)
    if args.explain:
        return explain_rollout(args)
    started = time.time()
    RewardSettings(
        args.composition, args.weights, args.max_new_tokens, args.style
    )  # a mistake in --weights shows before anything is loaded
    device, _ = pick_device(args.device)
    train_rows, val_rows, facts = load_rows(args)
    seed_everything(args.seed)
    vlm = load_policy(args, device)
    run_dir = open_run_dir(args, TASK, "train_grpo")
    history, best = train(args, vlm, train_rows, val_rows, facts, run_dir)
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": facts,
            "split": "val",
            "n": len(val_rows),
            "first": history[0],
            "best": best,
            "last": history[-1],
            **vlm.facts(),
            "trainable_parameters": count_parameters(vlm.model, trainable=True),
            "seed": args.seed,
            "settings": settings_of(args),
            **run_facts(started, device),
        },
    )
    print(
        f"validation accuracy {history[0]['val_accuracy']:.3f} before, {best['val_accuracy']:.3f} at best (step"
        f" {best['step']}); measure it on the test rows with python vqa_sft_grpo/evaluate.py --sft_ckpt"
        f" {run_dir}\nresults in {run_dir} ({time.time() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
