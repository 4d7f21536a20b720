"""
GRPO: let a fine-tuned vision-language model answer each question several times, and make the better answers likelier.

Usage:
    python vqa_sft_grpo/prepare_data.py --output data/train.json --dataset both --split train \
        --grpo_output data/grpo_data.jsonl
    python vqa_sft_grpo/train_grpo.py --base_model Qwen/Qwen2-VL-2B-Instruct --sft_ckpt checkpoints/qwen2vl_sft \
        --data_jsonl data/grpo_data.jsonl --out_dir checkpoints/qwen2vl_grpo --steps 1000 --batch_size 2 \
        --lr 1e-6 --weights "0.2,0.4,0.2,0.2"
    python vqa_sft_grpo/train_grpo.py --sft_ckpt checkpoints/tiny_sft --data_jsonl data/phantom_grpo.jsonl \
        --batch_size 16 --num_generations 8 --lr 5e-4
    python vqa_sft_grpo/train_grpo.py --resume checkpoints/qwen2vl_grpo
    python vqa_sft_grpo/train_grpo.py --explain 12.1.3 --out_dir checkpoints/qwen2vl_grpo
    python vqa_sft_grpo/train_grpo.py --dry-run  # everything once, seconds

Expected of these: see vqa_sft_grpo/README.md, where each number stands beside its command.
Writes to the run folder: the adapter with the best validation accuracy plus V (evaluate.py and infer.py take the folder
as --sft_ckpt), rollouts.jsonl (every rollout with every term of its reward), completions.md (the last ones as a table),
history.jsonl and meanings.json (what its names mean), figures/curves.png, last.pt (to resume), metrics.json.

One step
    1  --batch-size questions; the vision tower sees each image once, the prompt goes through the model once, and
       --num-generations answers are sampled from it
    2  rewards.py scores each answer. For V, the log-probability of what the response says, after its own caption and
       reasoning, is measured again without the gold region and without --cf-regions random ones of the same size
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
               second part, E[dR/dV grad V]: --cf-gradient 1 adds it, 0 leaves it out as usual. Both parts are divided
               by the tokens of the step, so that neither gains on the other as responses grow (rollouts.py). The
               default of 8 is a choice, not part of that gradient: with 1 a shortcut was learned before the finding
    sampling   from the model's own distribution: no top-k or top-p, with which log-probabilities would not be those of
               what was drawn
    vision     the tower is frozen: its features are computed once per step and serve sampling, scoring, policy and
               reference
    dropout    off, so that the policy that learns is the one that sampled; the first step of every run compares its
               log-probabilities with the sampler's own, and checks ratios, clipping and KL: a mistake stops the run
"""

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
import torch
from tqdm import tqdm

from shared.data.download import sha256_of
from shared.models.loading import QUANTS, add_lora, count_parameters, load_vlm, save_vlm
from shared.models.passes import stop_tokens
from shared.models.tiny import is_tiny
from shared.phantom import phantom_settings
from shared.report import PHANTOM, short_path
from shared.runtime import InputError, add_resume, fraction, not_negative, open_run_dir, peak_memory, pick_device
from shared.runtime import positive_float, positive_int, read_json, record, run_facts, script, script_parser
from shared.runtime import seed_everything, write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, Weights, learning_rate, load_state, save_state, settings_of
from vqa_sft_grpo.alarms import alarms
from vqa_sft_grpo.asking import BASE_MODEL, check_resume, how_to_measure, limit_pixels, model_of, training_of
from vqa_sft_grpo.counterfactual import FILLS, region_iou
from vqa_sft_grpo.grpo import SCALES, check_first_step, group_advantages
from vqa_sft_grpo.grpo_log import HISTORY, cut_rollouts, describe, draw_curves, draw_edits, log_rollouts, mean
from vqa_sft_grpo.grpo_log import write_completions
from vqa_sft_grpo.prompting import STYLES, boxes_from_model, parse_response
from vqa_sft_grpo.looking import gold_of
from vqa_sft_grpo.rewards import COMPOSITIONS, MEANINGS, AnswerFrequencies, RewardSettings, explain
from vqa_sft_grpo.looking import lend_regions, plan_edits
from vqa_sft_grpo.rewards import ignored_fields
from vqa_sft_grpo.rollouts import TOLERANCE, Policy, as_reference, check_images, image_of, row_at, with_size
from vqa_sft_grpo.rows import make_rows, read_rows
from vqa_sft_grpo.terms import add_regions, settle_terms

TASK = "vqa_sft_grpo"
ASIDE = ("data_jsonl", "micro_batch", "save_every", "explain")  # settings that a resumed run may change
MEASURED = ("entropy", "kl", "clip_low", "clip_high", "clip_region", "ratio_mean", "ratio_min", "ratio_max")


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
    g.add_argument("--regions", metavar="FILE",
        help="gold regions of your own, a CSV: image (or id), x0, y0, x1, y1 in pixels of the stored image, and "
        "question where a box is for that question only")
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
    g.add_argument("--cf-gradient", type=not_negative, default=8.0,
        help="weight of the reward's own gradient through V; 1: as the mean reward has it, 0: none (%(default)s)")
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
        args.data_jsonl, args.device, args.films, args.steps = "phantom", "cpu", 12, 3
        args.model = args.model if args.model and is_tiny(args.model) else None if args.sft_ckpt else "tiny"
        args.batch_size, args.max_new_tokens = min(args.batch_size, 2), min(args.max_new_tokens, 32)
        args.eval_rows, args.eval_every = 4, 2
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
    holds. A term of the reward that no row defines is refused, or dropped from args.weights (terms.py).
    """
    if args.data_jsonl.lower() == "phantom":
        pictures, settings = Path("outputs") / TASK / "phantom_images", phantom_settings(args.conditions)
        rows, audit = make_rows("phantom", "train", seed=args.seed, image_dir=pictures, studies=args.films,
                                settings=settings)  # fmt: skip
        drawn = f"drawn: {audit['settings_of_phantom']}, {args.films} films, seed {args.seed}"
        facts = {"name": "phantom", "policy": audit["policy"], "sha256": drawn}
    else:
        rows = read_rows(args.data_jsonl)
        names, policies = ("+".join(sorted({r[key] for r in rows})) for key in ("dataset", "policy"))
        facts = {
            "name": names,
            "policy": policies,
            "source": args.data_jsonl,
            "sha256": sha256_of(Path(args.data_jsonl)),
            "test_file": args.data_jsonl if any(r["split"] == "test" for r in rows) else None,
        }
        if note := ignored_fields(rows):
            print(f"note: {note}")
    if args.regions:
        facts["with_given_region"] = add_regions(rows, args.regions)
        facts["sha256"] += f", regions {sha256_of(Path(args.regions))}"
    train, held_out = ([r for r in rows if r["split"] == split][: args.limit] for split in ("train", "val"))
    if not train or not held_out:
        raise InputError(
            f"{args.data_jsonl} has {len(train)} rows to train on and {len(held_out)} for validation, and both are"
            " needed: make it with prepare_data.py --split train --grpo_output FILE"
        )
    check_images(train + held_out)
    lend_regions(train + held_out, train)
    settings = RewardSettings(args.composition, args.weights, args.max_new_tokens, args.style)
    weights, lines, facts["terms"] = settle_terms(train, settings)
    print("\n".join(lines), flush=True)
    args.weights = ",".join(f"{w:g}" for w in weights)
    chosen = sorted(random.Random(args.seed).sample(range(len(held_out)), min(args.eval_rows, len(held_out))))
    facts |= {"phantom": any(r.get("dataset") == "phantom" for r in rows), "limit": args.limit}
    facts |= {
        "train_rows": len(train),
        "val_rows": len(chosen),
        "with_region": sum(bool(r.get("region")) for r in train),
    }
    return train, [held_out[i] for i in chosen], facts


# --------------------------------------------------------------------------------------------------------------- policy


def load_policy(args, device):
    """-> VLM whose adapter is trained; dropout is off, so that the policy that learns is the one that samples."""
    name, adapter = model_of(args.model, args.sft_ckpt)
    dtype = "float32" if is_tiny(name) and args.dtype == "auto" else args.dtype
    place = dict(quant=args.quant, device=device, dtype=dtype, family="qwen2vl")
    vlm = load_vlm(name, adapter=adapter, trainable_adapter=True, **place)
    if adapter:
        vlm.model.load_adapter(adapter, "reference", is_trainable=False)
    else:
        add_lora(vlm, rank=args.lora_rank, dropout=0.0, checkpointing=False)
    if args.checkpointing:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    limit_pixels(vlm.processor, args.max_pixels)
    # without dropout the two modes compute the same; only training recomputes activations
    vlm.model.train(args.checkpointing)
    for module in vlm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return vlm


# ------------------------------------------------------------------------------------------------------------- training


def validate(policy, rows):
    """
    Greedy answers to validation rows -> {val_accuracy, val_v, val_valid, val_iou, val_gap}. Every row counts; what
    cannot be read is wrong.
    """
    numbers, style = [], policy.args.style
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        batch = policy.roll_out(some, list(range(start, start + len(some))), None)
        for row, text, terms in zip(batch.rows, batch.texts, batch.terms, strict=True):
            found, size, iou = parse_response(text, style), (row["height"], row["width"]), None
            if row.get("region") and style == "json":
                iou = region_iou(boxes_from_model(found.boxes, *size[::-1]), row["region"], *size)
            gap = None if terms["d_roi"] is None else terms["d_roi"] - terms["d_rand"]
            numbers.append((terms["correct"], terms["counterfactual"], found.valid, iou, gap))
    names = ("val_accuracy", "val_v", "val_valid", "val_iou", "val_gap")
    return dict(zip(names, map(mean, zip(*numbers, strict=True)), strict=True))


def rank_of(row):
    """
    Share right plus mean V, where V is asked for: accuracy alone, and the reward too, in which V weighs a third, would
    keep a shortcut that the validation rows share.
    """
    return row["val_accuracy"] + (row["val_v"] or 0.0), row["val_valid"]


def train(args, vlm, train_rows, val_rows, facts, run_dir):
    """Train into run_dir -> (history, best row)."""
    settings = RewardSettings(args.composition, args.weights, args.max_new_tokens, args.style)
    policy = Policy(vlm, args, settings, AnswerFrequencies(train_rows))
    judge = Policy(vlm, args, settings)  # validation: rewards without the frequencies of the training answers
    judge.size, judge.sampling = policy.size, policy.sampling
    weights = Weights(vlm.model)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(vlm.device.type, enabled=vlm.dtype == torch.float16)
    guard = GuardedStep(optimizer, scaler, weights.values(), args.grad_clip)
    eval_every = args.eval_every or max(1, args.steps // 10)
    print(
        f"{count_parameters(vlm.model, trainable=True):,} of {count_parameters(vlm.model):,} parameters are trained;"
        f" {len(train_rows)} questions, {facts['with_region']} with a region; {args.steps} steps of {args.batch_size} x"
        f" {args.num_generations} answers, {policy.size.now} per pass, lr {args.lr:g}",
        flush=True,
    )
    step, place, history, best, told, last_path = 0, 0, [], None, set(), run_dir / "last.pt"
    saved = {"weights": weights, "optimizer": optimizer, "scaler": scaler}, settings_of(args, ASIDE), facts["sha256"]
    if args.resume:
        if last_path.exists():
            then = load_state(last_path, *saved)
            step, place, history, best, policy.size.now = (
                then[k] for k in ("step", "place", "history", "best", "size")
            )
        cut_rollouts(run_dir / "rollouts.jsonl", step)
        print(f"resumed from {last_path} at step {step} of {args.steps}" if step else f"{run_dir}: from the beginning")
    write_json(run_dir / "meanings.json", {"history.jsonl": HISTORY, "rollouts.jsonl": MEANINGS})

    def save():
        """Which questions come, and every random number, follow from seed, step and place."""
        save_state(last_path, *saved, step=step, place=place, history=history, best=best, size=policy.size.now)
        write_jsonl(run_dir / "history.jsonl", history)

    def look(row):
        """Validation: the best adapter is kept."""
        nonlocal best
        row |= validate(judge, val_rows)
        better = best is None or rank_of(row) > rank_of(best)
        if better:
            best = dict(row)
            save_adapter(vlm, run_dir, facts)
        gap = "" if row["val_gap"] is None else f"  V {row['val_v']:.3f}  gap {row['val_gap']:.3f}"
        return f"val accuracy {row['val_accuracy']:.3f}  valid {row['val_valid']:.3f}{gap}" + "  *" * better

    if step == 0:
        history = [{"step": 0}]
        print(f"before: {look(history[0])}", flush=True)
    bar = tqdm(initial=step, total=args.steps, desc="GRPO", leave=False, disable=None)
    with StopSignal() as stop:
        while step < args.steps:
            begin = time.time()
            generator = torch.Generator(vlm.device).manual_seed(args.seed * 10_000_000 + step)
            places, place = list(range(place, place + args.batch_size)), place + args.batch_size
            chosen = [train_rows[row_at(p, len(train_rows), args.seed)] for p in places]
            batch = policy.roll_out(chosen, places, generator)
            advantages, stats = group_advantages(batch.rewards, args.num_generations, args.scale_rewards)
            advantages = advantages.float().to(vlm.device)
            scored = time.time()

            ref = old = None
            if args.beta > 0:
                with as_reference(vlm):
                    ref = policy.fixed_logprobs(batch)
            if step == 0:
                old = policy.check_sampler(batch)
            elif args.inner_steps > 1:
                old = policy.fixed_logprobs(batch)
            lr, left_out = learning_rate(step, args.steps, round(args.warmup * args.steps), args.lr), guard.skipped
            for inner in range(args.inner_steps):
                loss, metrics = policy.loss_and_gradient(batch, advantages, old, ref, scaler)
                if step == inner == 0:
                    check_first_step(metrics, TOLERANCE[vlm.dtype])
                through_v = args.cf_gradient > 0 and settings.weights[3] > 0
                cf_loss = policy.reward_gradient(batch, scaler) if through_v else None
                guard.step(loss, lr)
            step += 1

            row = {"step": step, **describe(batch, advantages, stats)} | {k: metrics.get(k) for k in MEASURED}
            ends, peak = set(stop_tokens(vlm)), peak_memory(vlm.device)
            row |= {"truncated": mean(ids[-1] not in ends for ids in batch.flat), "loss": loss, "cf_loss": cf_loss}
            row |= {"grad_norm": guard.norm, "lr": lr, "skipped": guard.skipped - left_out, **batch.seconds}
            row |= {"seconds_update": time.time() - scored, "seconds": time.time() - begin}
            row |= {"peak_gib": peak["peak_gpu_gib"] or peak["peak_ram_gib"]}
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            found = alarms([*history, row])
            for name in found.keys() - told:  # once a run; history.jsonl has every step's
                print(f"ALARM at step {step}, {name}: {found[name]}", flush=True)
            told |= found.keys()
            row["alarms"] = sorted(found)
            log_rollouts(run_dir / "rollouts.jsonl", batch, advantages, step, args.num_generations)
            if step == 1:
                rewards = ", ".join(f"{r:.2f}" for r in batch.rewards[: args.num_generations])
                print(f"first answers, rewards {rewards}: {[text[:80] for text in batch.texts[:2]]}")
            history.append(row)
            bar.update()
            if step % eval_every == 0 or step == args.steps:
                print(f"step {step:5d}/{args.steps}  {look(row)}  {recent(history, eval_every)}", flush=True)
                write_completions(run_dir / "completions.md", batch, advantages, step, args.num_generations)
                title = f"{facts['name']}, {short_path(args.sft_ckpt or vlm.name)}"
                draw_curves(run_dir / "figures" / "curves.png", history, title, facts["phantom"])
            if stop.requested() or step == args.steps or step % args.save_every == 0:
                save()
            if stop.requested():
                stop.exit(run_dir)
    bar.close()
    return history, best


def recent(history, steps):
    """Means over the last steps, for the console."""
    rows = history[-min(len(history) - 1, steps) :]
    names = ("reward", "correct", "entropy", "kl", "length", "seconds")
    means = {name: mean(r.get(name) for r in rows) for name in names}
    return "  ".join(f"{name} {value:.3f}" for name, value in means.items() if value is not None)


# --------------------------------------------------------------------------------------------------------------- output


def save_adapter(vlm, run_dir, facts):
    """Adapter and processor into the run folder itself, each file replaced whole: --sft_ckpt RUN then finds them."""
    building = run_dir / ".adapter.part"
    shutil.rmtree(building, ignore_errors=True)
    save_vlm(vlm, building)
    write_json(building / "training.json", {"dataset": facts})  # evaluate.py stamps results with it
    # the file that makes it an adapter comes last
    for path in sorted(building.iterdir(), key=lambda p: p.name == "adapter_config.json"):
        os.replace(path, run_dir / path.name)
        record(run_dir / path.name)
    building.rmdir()


def explain_rollout(args):
    """--explain ID: the summands of a rollout's reward, and the images on which its V was measured."""
    run_dir = Path(args.out_dir)
    path = run_dir / "rollouts.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir} holds no run of train_grpo.py: there is no rollouts.jsonl in it")
    was = read_json(run_dir / "settings.json")
    with path.open(encoding="utf-8") as file:
        found = next((json.loads(line) for line in file if line.startswith(f'{{"id": "{args.explain}"')), None)
    if found is None:
        raise InputError(f"{path} has no rollout {args.explain}; ids are step.prompt.rollout, such as 1.0.0")
    settings = RewardSettings(was["composition"], was["weights"], was["max_new_tokens"], was["style"])
    rows, _, _ = load_rows(SimpleNamespace(**was))
    row = rows[row_at(found["place"], len(rows), was["seed"])]
    if row["question"] != found["question"] or gold_of(row) != found["gold"]:
        raise InputError(f"{was['data_jsonl']} is not the file that {run_dir} was trained on")
    print("\n".join(explain(row, found["response"], found, settings)))
    print(f"  advantage {found['advantage']:+.3f}: against the other answers to this question")
    image = image_of(row)
    how = was["cf_regions"], was["cf_fill"], [was["seed"], found["place"]], was["max_pixels"]
    plan = plan_edits(with_size(row, image), image, *how)
    if settings.weights[3] == 0 or not plan.images:
        return print(f"no edited images: {plan.why or 'the weight of the counterfactual term is 0'}")
    target = run_dir / "figures" / f"explain_{args.explain}.png"
    drops = [None] + [found["d_roi"]] * bool(plan.roi) + (found["d_rand_each"] or [None] * len(plan.random))
    draw_edits(target, plan, drops)
    print(f"edited images (fill: {plan.fill}): {target}")


@script
def main(argv=None):
    args = parse_args(argv)
    if args.explain:
        return explain_rollout(args)
    started = time.time()
    check_resume(args)
    RewardSettings(args.composition, args.weights, args.max_new_tokens, args.style)  # a mistake shows before loading
    device, _ = pick_device(args.device)
    train_rows, val_rows, facts = load_rows(args)
    told = (training_of(args.sft_ckpt) if args.sft_ckpt else None) or {}  # fine-tuning's file may have test rows
    if told.get("test_file") and told.get("name") == facts["name"]:
        facts["test_file"] = told["test_file"]
    if facts["phantom"]:
        print(f"*** {PHANTOM} ***")
    seed_everything(args.seed)
    vlm = load_policy(args, device)
    run_dir = open_run_dir(args, TASK, "train_grpo")
    history, best = train(args, vlm, train_rows, val_rows, facts, run_dir)
    write_json(run_dir / "metrics.json", {
        "dataset": facts, "split": "val", "n": len(val_rows), "first": history[0], "best": best, "last": history[-1],
        **vlm.facts(), "trainable_parameters": count_parameters(vlm.model, trainable=True), "seed": args.seed,
        "settings": settings_of(args, ASIDE), **run_facts(started, device),
    })  # fmt: skip
    if best["step"] == 0:
        print("*** no step was better than the start: the adapter saved is the one that came in ***")
    print(
        f"validation accuracy {history[0]['val_accuracy']:.3f} before, {best['val_accuracy']:.3f} at best (step"
        f" {best['step']}); {how_to_measure(run_dir, facts, [args.style], args.conditions)}\n"
        f"results in {run_dir} ({time.time() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
