"""
Supervised fine-tuning of a vision-language model on prepared questions, answers, captions and boxes; keep the best by
validation.

Usage:
    python vqa_sft_grpo/prepare_data.py --output data/train.json --dataset both --split train
    python vqa_sft_grpo/train_sft.py --cfg configs/sft.yaml --data data/train.json  # Qwen2-VL 2B, LoRA, one 16 GB GPU
    python vqa_sft_grpo/train_sft.py --cfg configs/sft.yaml --data data/train.json --quant nf4        # QLoRA
    python vqa_sft_grpo/train_sft.py --model tiny --data phantom  # offline, two cores, 20 minutes
    python vqa_sft_grpo/train_sft.py --resume outputs/vqa_sft_grpo/train_sft/001
    python vqa_sft_grpo/train_sft.py --dry-run                                              # everything once, seconds
    torchrun --nproc-per-node 2 vqa_sft_grpo/train_sft.py --cfg configs/sft.yaml --data data/train.json

Expected of these: see vqa_sft_grpo/README.md, where each number stands beside its command.
Writes to the run folder: best/ (the model with the best validation accuracy), last.pt (to resume), history.jsonl,
metrics.json, figures/curves.png; at the end best/ is copied to --save-to. best/ is a LoRA adapter as peft reads it, or
for a model trained whole a model folder; either way with the processor, and evaluate.py, infer.py and train_grpo.py
take it as --sft-ckpt.

What is trained. --train lora: low-rank adapters in the language model, all else frozen; the features of the frozen
vision tower can be computed once (--cache-features). --train full: everything, for models that start from random
weights. The loss is the mean over the learned tokens of the whole batch, however it is cut into passes: answer and end
token, never prompt or image. --blank-share adds rows whose image is a plain grey picture and whose target is their own
answer alone, with no caption and no box: over many rows these answers are those of the question's prior, so a model
that sees nothing is taught to give that prior and to describe nothing. Without it a grey picture is unlike all training
images, and what a model writes there is no baseline. Validation writes answers (greedy) and scores them strictly; the
test split is never read.
"""

import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from shared.data.download import sha256_of
from shared.models.inputs import ImageStore
from shared.models.loading import QUANTS, add_lora, count_parameters, load_vlm, save_vlm
from shared.models.passes import PartSize, features_of, in_parts
from shared.models.tiny import is_tiny
from shared.models.tuning import BatchOrder, backward, batch_loss
from shared.phantom import phantom_settings
from shared.report import PHANTOM, draw_history
from shared.runtime import InputError, add_resume, atomic_folder, fraction, not_negative, open_run_dir, pick_device
from shared.runtime import positive_float, positive_int, run_facts, script, script_parser, seed_everything
from shared.runtime import start_distributed, write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, Weights, adamw, learning_rate, load_state, save_state, settings_of
from vqa_sft_grpo.asking import BASE_MODEL, Answerer, check_resume, how_to_measure, limit_pixels
from vqa_sft_grpo.counterfactual import blank, region_iou
from vqa_sft_grpo.examples import make_examples
from vqa_sft_grpo.prompting import STYLES, boxes_from_model, build_prompt, parse_response
from vqa_sft_grpo.rows import make_rows, read_rows
from vqa_sft_grpo.scoring import score_answer

TASK = "vqa_sft_grpo"
ASIDE = ("data", "save_to", "cache_gib", "cache_features", "eval_batch")  # settings that a resumed run may change
PANELS = (
    ("loss per learned token", {"train_loss": "training", "val_loss": "validation"}),
    (
        "share of validation rows",
        {
            "val_accuracy": "all answers right",
            "val_closed_accuracy": "closed answers right",
            "val_valid": "readable without repair",
            "val_box_iou": "box overlap (IoU)",
        },
    ),
)


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("data")
    # fmt: off
    g.add_argument("--data", default="data/train.json", metavar="FILE",
        help="rows written by prepare_data.py, or phantom: drawn here (%(default)s)")
    g.add_argument("--films", type=positive_int, default=6000,
        help="phantom: films to draw, and a tenth more for validation (%(default)s)")
    g.add_argument("--conditions", nargs="+", metavar="NAME",
        help="phantom: draw and ask about these only (default: all)")
    g.add_argument("--styles", nargs="+", default=list(STYLES), choices=STYLES,
        help="prompt styles; each row is learned in each (default: both)")
    g.add_argument("--blank-share", type=fraction, default=0.0, metavar="P",
        help="add this share of the training rows once more, with a grey picture and the answer alone (%(default)s)")
    g.add_argument("--max-length", type=positive_int, default=2048, metavar="TOKENS",
        help="longest example, image included; a longer one stops the run (%(default)s)")
    g.add_argument("--max-pixels", type=positive_int, default=262_144,
        help="Qwen2-VL: images are scaled down to this area; 784 pixels are one token (%(default)s)")
    g.add_argument("--cache-gib", type=positive_float, default=2.0, metavar="GIB",
        help="memory for images prepared once, and for features (%(default)s)")
    g.add_argument("--cache-features", action="store_true",
        help="compute the features of the frozen vision tower once; equal losses")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default=BASE_MODEL, help="hub name, folder or tiny (%(default)s)")
    g.add_argument("--quant", default="none", choices=QUANTS, help="weights in 4 or 8 bit: QLoRA (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="computing precision (%(default)s)")
    g.add_argument("--train", default="auto", choices=["auto", "lora", "full"],
        help="what is trained; auto: full for a tiny model, else lora (%(default)s)")
    g.add_argument("--lora-rank", type=positive_int, default=8,
        help="rank of the adapters; alpha is twice that (%(default)s)")
    g.add_argument("--lora-dropout", type=fraction, default=0.05, help="dropout in front of the adapters (%(default)s)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=positive_int, default=3, help="passes over the examples (%(default)s)")
    g.add_argument("--steps", type=positive_int, help="optimiser steps, in place of --epochs")
    g.add_argument("--batch-size", type=positive_int, default=8,
        help="examples per step, over all processes (%(default)s)")
    g.add_argument("--micro-batch", type=positive_int, help="examples per pass; gradients add up to those of the "
        "batch (default: 1, for a model trained whole the batch)")
    g.add_argument("--per-image", type=positive_int, default=4,
        help="questions about one image kept side by side in a batch, which share its features (%(default)s)")
    g.add_argument("--lr", type=positive_float,
        help="highest learning rate of AdamW (default: 1e-4 for lora, 1e-3 for full)")
    g.add_argument("--warmup", type=fraction, default=0.1,
        help="share of the steps with rising learning rate, before a cosine to 0 (%(default)s)")
    g.add_argument("--weight-decay", type=not_negative, default=0.01, help="of AdamW, on matrices (%(default)s)")
    g.add_argument("--grad-clip", type=positive_float, default=1.0, help="largest norm of the gradient (%(default)s)")
    g.add_argument("--answer-weight", type=positive_float, default=1.0,
        help="weight of the answer's own tokens in the loss; all others have 1 (%(default)s)")
    g.add_argument("--box-weight", type=not_negative, default=1.0,
        help="weight of the box coordinates, whose last digits are mostly noise (%(default)s)")
    g.add_argument("--checkpointing", action="store_true", default=None,
        help="compute activations again in the backward pass (default: for lora on real models)")
    g.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep all activations")
    g = parser.add_argument_group("validation and saving")
    g.add_argument("--eval-every", type=positive_int, metavar="STEPS",
        help="steps between two validations (default: ten in a run)")
    g.add_argument("--eval-rows", type=positive_int, default=200, metavar="N",
        help="validation rows that are answered, drawn with --seed (%(default)s)")
    g.add_argument("--eval-style", default="json", choices=STYLES, help="prompt style of the validation (%(default)s)")
    g.add_argument("--eval-batch", type=positive_int, default=32, help="prompts answered at a time (%(default)s)")
    g.add_argument("--save-to", type=Path, default=Path("checkpoints/qwen2vl_sft"), metavar="FOLDER",
        help="where best/ is copied at the end (%(default)s)")
    # fmt: on
    add_resume(g)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.device, args.films, args.steps = "phantom", "cpu", 12, 3
        args.model = args.model if is_tiny(args.model) else "tiny"
        args.batch_size, args.eval_rows, args.eval_every = min(args.batch_size, 8), 4, 2
    if args.train == "auto":
        args.train = "full" if is_tiny(args.model) else "lora"
    if args.train == "full" and args.quant != "none":
        parser.error(
            f"--train full cannot change weights held in --quant {args.quant}: use --train lora, or --quant none"
        )
    if args.train == "full" and args.cache_features:
        parser.error(
            "--cache-features needs a frozen vision tower, and --train full trains it: use --train lora, or leave"
            " --cache-features out"
        )
    if args.eval_style not in args.styles:
        parser.error(f"--eval-style {args.eval_style} is not among the --styles that are trained")
    if args.lora_dropout == 1 or args.warmup == 1:
        parser.error("--lora-dropout and --warmup must be below 1")
    args.lr = args.lr or (1e-3 if args.train == "full" else 1e-4)
    args.micro_batch = min(args.batch_size, args.micro_batch or (args.batch_size if args.train == "full" else 1))
    return args


# ---------------------------------------------------------------------------------------------------------------- data


def load_rows(args):
    """-> (training rows, validation rows, facts for metrics.json)."""
    if args.data.lower() == "phantom":
        pictures, settings = Path("outputs") / TASK / "phantom_images", phantom_settings(args.conditions)
        rows, audit = make_rows("phantom", "train", seed=args.seed, image_dir=pictures, studies=args.films,
                                settings=settings)  # fmt: skip
        facts = {"name": "phantom", "policy": audit["policy"], "settings": audit["settings_of_phantom"]}
    else:
        rows = read_rows(args.data)
        names, policies = ("+".join(sorted({r[key] for r in rows})) for key in ("dataset", "policy"))
        facts = {
            "name": names,
            "policy": policies,
            "overlap": any(r["overlap"] for r in rows),
            "source": args.data,
            "sha256": sha256_of(Path(args.data)),
            "test_file": args.data if any(r["split"] == "test" for r in rows) else None,
        }
    train, held_out = ([r for r in rows if r["split"] == split][: args.limit] for split in ("train", "val"))
    blanks = blank_rows(train, args.blank_share, args.seed)
    if not train or not held_out:
        raise InputError(
            f"{args.data} has {len(train)} rows to train on and {len(held_out)} for validation, and both are needed:"
            " make it with prepare_data.py --split train"
        )
    chosen = sorted(random.Random(args.seed).sample(range(len(held_out)), min(args.eval_rows, len(held_out))))
    facts |= {"phantom": any(r["dataset"] == "phantom" for r in rows), "limit": args.limit}
    facts |= {"train_rows": len(train), "blank_rows": len(blanks), "val_rows": len(held_out)}
    return train + blanks, [held_out[i] for i in chosen], facts


def blank_rows(rows, share, seed):
    """
    A random share of the rows with a grey picture of their size in place of the image, and the answer as the whole
    target.
    """
    grey, blanks = {}, []
    for row in random.Random(seed).sample(rows, round(share * len(rows))):
        size = row["height"], row["width"]
        grey.setdefault(size, blank(np.empty(size, np.uint8)))  # one picture per size: it is prepared once
        blanks.append(row | {"image": grey[size], "output": json.dumps({"answer": row["answer"]}, ensure_ascii=False)})
    return blanks


# ---------------------------------------------------------------------------------------------------------- validation


def validate(vlm, rows, store, examples, args, max_new_tokens, rank, world_size):
    """
    Answers to validation rows, greedy -> (numbers, answered rows). Every row counts: what cannot be parsed is wrong, a
    missing box overlaps by 0. The loss is over the same rows, answers given.
    """
    vlm.model.eval()
    mine = list(range(rank, len(rows), world_size))
    prompts = [build_prompt(rows[i]["question"], args.eval_style) for i in mine]
    answerer = Answerer(vlm, args.eval_batch, max_new_tokens)
    with torch.no_grad():
        texts = answerer.generate(prompts, [store.read(store.number_of[i]) for i in mine])
        found = in_parts(lambda some: [batch_loss(vlm, some, store)], [examples[i] for i in mine], answerer.size)
    sums = sum((torch.stack(pair).double().cpu() for pair in found), torch.zeros(2, dtype=torch.float64))
    results = []
    for i, text in zip(mine, texts, strict=True):
        row, response = rows[i], parse_response(text, args.eval_style)
        score = score_answer(response.answer, row["answer"], row["answer_type"], row["question"])
        size, iou = (row["height"], row["width"]), None
        if row.get("region") and args.eval_style == "json":
            iou = region_iou(boxes_from_model(response.boxes, *size[::-1]), row["region"], *size)
        results.append({
            "index": i, "question": row["question"], "gold": row["answer"], "answer_type": row["answer_type"],
            "text": text, "valid": response.valid, "iou": iou, **{k: score[k] for k in ("parsed", "correct", "recall")},
        })  # fmt: skip
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, (results, sums))
        results, sums = (
            sorted((r for part, _ in parts for r in part), key=lambda r: r["index"]),
            sum(s for _, s in parts),
        )
    closed, opened = ([r for r in results if (r["answer_type"] != "open") == is_closed] for is_closed in (True, False))
    return {
        "val_loss": float(sums[0] / sums[1]),
        "val_accuracy": mean(r["correct"] for r in results),
        "val_closed_accuracy": mean(r["correct"] for r in closed),
        "val_open_recall": mean(r["recall"] for r in opened),
        "val_parsed": mean(r["parsed"] for r in results),
        "val_valid": mean(r["valid"] for r in results),
        "val_box_iou": mean(r["iou"] for r in results if r["iou"] is not None),
    }, results


def mean(values):
    """None where there are no values."""
    values = [float(v) for v in values]
    return statistics.mean(values) if values else None


def rank_of(row):
    """What the best validation is chosen by: accuracy, then readable answers, then the loss."""
    return row["val_accuracy"], row["val_valid"], -row["val_loss"]


# ------------------------------------------------------------------------------------------------------------ training


def save_model(vlm, folder, facts):
    """Adapter, or whole model, processor, and what it was trained on into `folder`, which is replaced in one go."""
    with atomic_folder(folder) as building:
        save_vlm(vlm, building)
        write_json(building / "training.json", {"dataset": facts})  # evaluate.py stamps results with it


def train(args, vlm, train_rows, val_rows, facts, run_dir, rank, world_size):
    """Train into run_dir -> (history, best row)."""
    say = print if rank == 0 else lambda *a, **k: None
    store = ImageStore(vlm.processor, [r["image"] for r in train_rows], args.cache_gib)
    val_store = ImageStore(vlm.processor, [r["image"] for r in val_rows], args.cache_gib)
    weighing = args.max_length, args.answer_weight, args.box_weight
    examples = make_examples(vlm, train_rows, store, args.styles, *weighing)
    val_examples = make_examples(vlm, val_rows, val_store, [args.eval_style], args.max_length)
    if args.cache_features:
        gib = sum(s.cache_features(lambda images: features_of(vlm, images), args.cache_gib) for s in (store, val_store))
        say(f"features of {len(store) + len(val_store)} images computed once, {gib:.2f} GiB")
    order = BatchOrder(examples, args.batch_size, args.per_image, args.seed, args.epochs, args.steps)
    longest_answer = max(len(e.target) for e in examples if e.style == args.eval_style)
    eval_every = args.eval_every or max(1, order.num_steps // 10)
    lengths = [e.length for e in examples]
    say(
        f"training: {store}; {len(examples)} examples of {statistics.mean(lengths):.0f} tokens (longest {max(lengths)},"
        f" --max-length {args.max_length}); validation: {len(val_examples)} rows, {len(val_store)} images"
    )

    weights = Weights(vlm.model)
    optimizer = adamw(weights, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(vlm.device.type, enabled=vlm.dtype == torch.float16)
    guard = GuardedStep(optimizer, scaler, weights.values(), args.grad_clip)
    warmup_steps, size = round(args.warmup * order.num_steps), PartSize(args.micro_batch)
    say(
        f"{args.train}: {count_parameters(vlm.model, trainable=True):,} of {count_parameters(vlm.model):,} parameters;"
        f" {order.num_steps} steps of {args.batch_size} examples, {size.now} per pass, lr {args.lr:g}"
    )

    step, history, best = 0, [], None
    totals = {"loss": 0.0, "steps": 0, "skipped": 0, "examples": 0, "tokens": 0, "seconds": 0.0}
    last_path, settings = run_dir / "last.pt", settings_of(args, ASIDE)
    saved = {"weights": weights, "optimizer": optimizer, "scaler": scaler}, settings, data_of(facts)
    if args.resume and last_path.exists():
        then = load_state(last_path, *saved)
        step, history, best, size.now, totals = (then[k] for k in ("step", "history", "best", "micro_batch", "totals"))
        say(f"resumed from {last_path} at step {step} of {order.num_steps}")
    elif args.resume:
        say(f"nothing was saved yet in {run_dir}: starting from the beginning")

    def save():
        """Random numbers and the order of the batches follow from seed and step."""
        save_state(last_path, *saved, step=step, history=history, best=best, micro_batch=size.now, totals=totals)

    hidden = None if rank == 0 else True
    bar = tqdm(initial=step, total=order.num_steps, desc="training", leave=False, disable=hidden)
    with StopSignal() as stop:
        while step < order.num_steps:
            begin = time.time()
            vlm.model.train()
            epoch, batch = order.at(step)
            torch.manual_seed(args.seed * 10_000_000 + step * world_size + rank)  # dropout: the same in a resumed run
            full = args.train == "full"
            loss = backward(vlm, batch, store, size, scaler, not args.checkpointing, full, rank, world_size)
            lr = learning_rate(step, order.num_steps, warmup_steps, args.lr)
            taken = guard.step(loss.item(), lr)
            step += 1
            totals["loss"] += loss.item() if taken else 0.0
            more = (("steps", taken), ("skipped", not taken), ("examples", len(batch)))
            for key, value in (*more, ("tokens", sum(e.length for e in batch)), ("seconds", time.time() - begin)):
                totals[key] += value
            bar.update()

            if step % eval_every == 0 or step == order.num_steps:
                numbers, answers = validate(
                    vlm, val_rows, val_store, val_examples, args, longest_answer + 8, rank, world_size
                )
                if not np.isfinite(numbers["val_loss"]):
                    raise InputError(
                        f"the validation loss is not finite at step {step}: lower --lr; {run_dir} keeps the best before"
                    )
                row = {"step": step, "epoch": epoch + 1, "lr": lr, **summary(totals), **numbers}
                history.append(row)
                better = best is None or rank_of(row) > rank_of(best)
                best = row if better else best
                say(line_of(row, order.num_steps) + ("  *" if better else ""), flush=True)
                totals = dict.fromkeys(totals, 0)
                if rank == 0:
                    if better:
                        save_model(vlm, run_dir / "best", facts)
                        write_jsonl(run_dir / "val_answers.jsonl", answers)
                    write_jsonl(run_dir / "history.jsonl", history)
                save()
            if stop.requested():
                save()
                stop.exit(run_dir)
    bar.close()
    return history, best


def summary(totals):
    """The sums since the last validation -> numbers of a row; the loss is None when every step was left out."""
    return {
        "train_loss": totals["loss"] / totals["steps"] if totals["steps"] else None,
        "skipped_steps": totals["skipped"],
        "seconds": totals["seconds"],
        "examples_per_second": totals["examples"] / totals["seconds"],
        "tokens_per_second": totals["tokens"] / totals["seconds"],
    }


def line_of(row, num_steps):
    shown = {
        "loss": "train_loss",
        "val loss": "val_loss",
        "accuracy": "val_accuracy",
        "valid": "val_valid",
        "IoU": "val_box_iou",
    }
    numbers = "  ".join(f"{name} {row[key]:.3f}" for name, key in shown.items() if row[key] is not None)
    return f"step {row['step']:5d}/{num_steps}  {numbers}  {row['examples_per_second']:.1f} examples/s"


def data_of(facts):
    """What tells one set of rows from another."""
    return facts.get("sha256") or facts["settings"]


# ------------------------------------------------------------------------------------------------------------- results


def publish(args, run_dir):
    """Copy best/ to --save-to, where the other scripts look, unless that would cost a model worth more."""
    if args.dry_run or args.limit:
        return print(f"{args.save_to} left alone: this was a {'dry run' if args.dry_run else 'run with --limit'}")
    kinds = {"adapter_config.json": "an adapter", "config.json": "a whole model"}
    there, ours = (
        next((kind for name, kind in kinds.items() if (folder / name).is_file()), "something else")
        for folder in (args.save_to, run_dir / "best")
    )
    if args.save_to.exists() and there != ours:
        print(
            f"{args.save_to} left alone: it holds {there}, and this run trained {ours}; delete it to have it replaced"
        )
        return
    with atomic_folder(args.save_to) as building:
        shutil.copytree(run_dir / "best", building, dirs_exist_ok=True)
    print(f"model for the other scripts: {args.save_to}")


@script(torchrun=True)
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    check_resume(args)
    device, _ = pick_device(args.device)
    rank, world_size = start_distributed(device)
    train_rows, val_rows, facts = load_rows(args)
    if facts["phantom"] and rank == 0:
        print(f"*** {PHANTOM} ***")
    seed_everything(args.seed)
    dtype = "float32" if args.train == "full" and args.dtype == "auto" else args.dtype
    vlm = load_vlm(args.model, quant=args.quant, device=device, dtype=dtype, family="qwen2vl")
    limit_pixels(vlm.processor, args.max_pixels)
    if args.checkpointing is None:
        args.checkpointing = args.train == "lora" and not vlm.tiny
    if args.train == "lora":
        add_lora(vlm, rank=args.lora_rank, dropout=args.lora_dropout, checkpointing=args.checkpointing)
    elif args.checkpointing:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run_dir = open_run_dir(args, TASK, "train_sft")

    history, best = train(args, vlm, train_rows, val_rows, facts, run_dir, rank, world_size)
    if rank > 0:
        return
    write_json(run_dir / "metrics.json", {
        "dataset": facts, "split": "val", "n": len(val_rows), "best": best, "last": history[-1], **vlm.facts(),
        "train": args.train, "trainable_parameters": count_parameters(vlm.model, trainable=True),
        "styles": args.styles, "seed": args.seed, "settings": settings_of(args, ASIDE), **run_facts(started, device),
    })  # fmt: skip
    title = f"{facts['name']}, {args.model}, {args.train}, {len(val_rows)} validation rows"
    draw_history(run_dir / "figures" / "curves.png", history, PANELS, "step", title, facts["phantom"])
    publish(args, run_dir)
    prompts = list(dict.fromkeys([args.eval_style, *args.styles]))
    print(
        f"best step {best['step']}: validation accuracy {best['val_accuracy']:.3f};"
        f" {how_to_measure(run_dir / 'best', facts, prompts, args.conditions)}\n"
        f"results in {run_dir} ({time.time() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
