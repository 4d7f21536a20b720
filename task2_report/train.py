"""
Teach a vision-language model to write the findings and the impression of a chest film; keep the best by validation.

Usage:
    python task2_report/train.py                                       # MedGemma 4B, IU X-ray, QLoRA, one 16 GB GPU
    python task2_report/train.py --model tiny --data phantom           # offline: a small model from random weights
    python task2_report/train.py --model tiny --data iu_xray --steps 1500
    python task2_report/train.py --resume outputs/task2_report/train/001
    python task2_report/train.py --dry-run                             # everything once, seconds
    torchrun --nproc-per-node 2 task2_report/train.py

Expected of these: see task2_report/README.md, where each number stands beside its command.
Writes to the run folder: best/ (adapter or whole model, with the processor and training.json; evaluate.py and infer.py
take it as --adapter), last.pt (to resume), history.jsonl, val_reports.jsonl, metrics.json, figures/curves.png.

What is trained. --train lora: low-rank adapters in the language model, all else frozen; --train full: everything, for
models that start from random weights. The loss is the mean over the tokens of the reports of the whole batch, however
it is cut into passes: never prompt or image. Validation writes reports (greedy) and reads their labels; the epoch is
chosen by their F1, at equal F1 by the number of distinct reports. The test split is never read.
--blank-share adds rows whose film is plain grey and whose report is that of a random other case: a model that sees
nothing is so taught to write what is usual, and what it writes there is a baseline.
"""

import random
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

from shared.metrics.labels import CONDITIONS
from shared.models.inputs import ImageStore, continuation, prompt_ids
from shared.models.loading import add_lora, count_parameters, save_vlm
from shared.models.passes import PartSize, features_of, in_parts
from shared.models.tiny import is_tiny
from shared.models.tuning import BatchOrder, Example, backward, batch_loss
from shared.report import PHANTOM, draw_history
from shared.runtime import InputError, add_resume, atomic_folder, bounded, command, fraction, not_negative, open_run_dir
from shared.runtime import pick_device, positive_float, positive_int, run_facts, script, script_parser
from shared.runtime import seed_everything, start_distributed, write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, Weights, adamw, learning_rate, load_state, save_state, settings_of
from task2_report.cases import SEVERE, load_reports
from task2_report.label_cnn import small_films
from task2_report.label_stage import LIST, learn_labels, list_of
from task2_report.prompts import REPORT, ask
from task2_report.scores import f1_of, stated, truth_of
from task2_report.writer import Writer, add_model_options, film_for, load_model

TASK = "task2_report"
ASIDE = ("cache_gib", "cache_features", "eval_batch")  # settings that a resumed run may change
PANELS = (
    ("loss per token", {"train_loss": "training", "val_loss": "validation"}),
    ("labels of the written reports", {"val_f1": "micro-F1"}),
    ("reports", {"val_distinct": "share of distinct ones"}),
)


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="iu_xray")
    g = parser.add_argument_group("films and reports")
    # fmt: off
    g.add_argument("--films", type=bounded(int, 1, 10**6, "must be at least 1"), default=8000,
        help="phantom: films to train on; a tenth more for validation (%(default)s)")
    g.add_argument("--image-size", type=positive_int, default=112, help="phantom: pixels per side (%(default)s)")
    g.add_argument("--conditions", nargs="+", default=SEVERE["conditions"], metavar="NAME",
        help="phantom: draw these only, all of them severe (default: the five of the README)")
    g.add_argument("--indication", action="store_true", help="put the clinical question into the prompt")
    g.add_argument("--blank-share", type=fraction, default=0.05, metavar="P",
        help="so many rows more, of the training rows, with a grey film and another's report (%(default)s)")
    g.add_argument("--max-length", type=positive_int, default=1024, metavar="TOKENS",
        help="longest example, image included; longer ones are left out and counted (%(default)s)")
    g.add_argument("--cache-gib", type=positive_float, default=2.0, metavar="GIB",
        help="memory for films prepared once, and for features (%(default)s)")
    g.add_argument("--cache-features", action="store_true",
        help="compute the features of the frozen vision tower once; equal losses")
    g = add_model_options(parser)
    g.add_argument("--train", default="auto", choices=["auto", "lora", "full"],
        help="what is trained; auto: full for a tiny model, else lora (%(default)s)")
    g.add_argument("--lora-rank", type=bounded(int, 1, 1024), default=16,
        help="rank of the adapters; alpha is twice that (%(default)s)")
    g.add_argument("--lora-dropout", type=bounded(float, 0, 0.99), default=0.05,
        help="dropout in front of the adapters (%(default)s)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--label-steps", type=bounded(int, 0, 10**9), metavar="STEPS",
        help="--train full: steps of 64 films in which tower and projector first learn the labels of the reports; see"
        " label_stage.py (default: 2000; 0: without)")
    g.add_argument("--epochs", type=positive_int, default=3, help="passes over the examples (%(default)s)")
    g.add_argument("--steps", type=positive_int, help="optimiser steps, in place of --epochs")
    g.add_argument("--batch-size", type=positive_int, default=16,
        help="examples per step, over all processes (%(default)s)")
    g.add_argument("--micro-batch", type=positive_int, help="examples per pass; gradients add up to those of the "
        "batch (default: 1, for a model trained whole the batch)")
    g.add_argument("--lr", type=positive_float,
        help="highest learning rate of AdamW (default: 1e-4 for lora, 1e-3 for full)")
    g.add_argument("--warmup", type=bounded(float, 0, 0.99), default=0.05,
        help="share of the steps with rising learning rate, before a cosine to 0 (%(default)s)")
    g.add_argument("--weight-decay", type=not_negative, default=0.01, help="of AdamW, on matrices (%(default)s)")
    g.add_argument("--grad-clip", type=positive_float, default=1.0, help="largest norm of the gradient (%(default)s)")
    g.add_argument("--checkpointing", action="store_true",
        help="compute activations again in the backward pass; on for lora on models of more than 100 M parameters")
    g = parser.add_argument_group("validation and saving")
    g.add_argument("--eval-every", type=positive_int, metavar="STEPS",
        help="steps between two validations (default: eight in a run)")
    g.add_argument("--eval-cases", type=positive_int, default=200, metavar="N",
        help="validation cases for which reports are written, the first ones (%(default)s)")
    g.add_argument("--eval-batch", type=positive_int, default=64, help="reports written at a time (%(default)s)")
    # fmt: on
    add_resume(g)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.device, args.films, args.steps = "phantom", "cpu", 16, 3
        args.model = args.model if args.model and is_tiny(args.model) else "tiny"
        args.batch_size, args.eval_cases, args.eval_every, args.max_new_tokens = min(args.batch_size, 4), 2, 2, 16
    if args.adapter:
        parser.error("training starts from --model; to go on with a run, give --resume")
    if args.train == "auto":
        args.train = "full" if args.model and is_tiny(args.model) else "lora"
    if args.train == "full" and args.quant not in ("none", "auto"):
        parser.error(f"--train full cannot change weights held in --quant {args.quant}: use --train lora")
    if args.train == "full":
        args.quant, usual = "none", 2 if args.dry_run else 2000
        args.label_steps = usual if args.label_steps is None else args.label_steps
        if args.cache_features:
            parser.error("--cache-features needs a frozen vision tower, and --train full trains it")
    elif args.label_steps:
        parser.error("--label-steps trains the vision tower, which --train lora keeps frozen")
    args.conditions = list(dict.fromkeys(args.conditions))
    args.lr = args.lr or (1e-3 if args.train == "full" else 1e-4)
    args.micro_batch = min(args.batch_size, args.micro_batch or (args.batch_size if args.train == "full" else 1))
    return args


# ---------------------------------------------------------------------------------------------------------------- data


def make_examples(vlm, cases, store, args, texts=None, question=REPORT):
    """
    One Example per case whose length fits -> Examples. store.number_of[i] is the film of case i; texts {i: text}: to
    learn in place of the case's report, where the question is another one or the film is grey.
    """
    examples = []
    for i, case in enumerate(cases):
        number = store.number_of[i]
        prompt = prompt_ids(vlm, ask(question, indication=args.indication and case.indication), (store.grids[number],))
        ids, _ = continuation(vlm, (texts or {}).get(i) or case.report, end=True)
        weights = np.ones(len(ids), np.float32)
        example = Example(i, question, number, prompt, np.array(ids, np.int32), weights)
        if example.length <= args.max_length:
            examples.append(example)
    if not examples:
        raise InputError(f"every example is longer than --max-length {args.max_length}: raise it")
    return examples


def with_blanks(cases, share, seed):
    """
    What stands behind the cases: [(case, grey film)], a share of them, and {number of the row: report of another case}.
    """
    draw, more = random.Random(seed), round(share * len(cases))
    grey, blanks, reports = np.full((112, 112), 128, np.uint8), [], {}
    for k in range(more):
        other = draw.choice(cases)
        reports[len(cases) + k] = other.report
        blanks.append((other, grey))
    return blanks, reports


def prepare(args, vlm, data, say):
    """-> cases, their ImageStore (grey films behind them) and Examples; the same three of validation."""
    cases, val_cases = data.split("train"), data.split("val")[: args.eval_cases]
    if not cases or not val_cases:
        raise InputError(f"{data.name} has {len(cases)} cases to train on and {len(val_cases)} for validation")
    if not data.facts["phantom"]:  # a damaged film shows here, and not at the step that draws it
        (_, cases, errors), (_, val_cases, more) = small_films(cases), small_films(val_cases)
        for error in errors + more:
            say(f"left out: {error['path']}: {error['error']}")
    blanks, reports = with_blanks(cases, args.blank_share, args.seed)
    films, val_films = ([film_for(vlm, case.film) for case in some] for some in (cases, val_cases))
    store = ImageStore(vlm.processor, films + [film for _, film in blanks], args.cache_gib)
    val_store = ImageStore(vlm.processor, val_films, args.cache_gib)
    rows = cases + [case for case, _ in blanks]
    examples, wanted = make_examples(vlm, rows, store, args, reports), len(rows)
    if args.label_steps:  # a second, short question about each film: see label_stage.py
        wanted += len(cases)
        examples += make_examples(vlm, cases, store, args, {i: list_of(c.report) for i, c in enumerate(cases)}, LIST)
    val_examples = make_examples(vlm, val_cases, val_store, args)
    if args.cache_features:
        gib = sum(s.cache_features(lambda images: features_of(vlm, images), args.cache_gib) for s in (store, val_store))
        say(f"features of {len(store) + len(val_store)} films computed once, {gib:.2f} GiB")
    lengths = [example.length for example in examples]
    say(
        f"training: {store}; {len(examples)} examples of {np.mean(lengths):.0f} tokens (longest {max(lengths)}),"
        f" {wanted - len(examples)} longer than --max-length left out, {len(blanks)} with a grey film"
    )
    return cases, store, examples, val_cases, val_store, val_examples


# ---------------------------------------------------------------------------------------------------------- validation


def validate(vlm, cases, store, examples, args, conditions, rank, world_size):
    """Reports of validation cases, greedy -> (numbers, rows with the texts)."""
    vlm.model.eval()
    writer = Writer(vlm, args.eval_batch, args.max_new_tokens)
    mine = list(range(rank, len(cases), world_size))
    turns = [ask(REPORT, indication=args.indication and cases[i].indication) for i in mine]
    written = writer.write(turns, [store.read(store.number_of[i]) for i in mine])
    with torch.no_grad():
        found = in_parts(lambda some: [batch_loss(vlm, some, store)], examples[rank::world_size], writer.size)
    sums = sum((torch.stack(pair).double().cpu() for pair in found), torch.zeros(2, dtype=torch.float64))
    texts = {i: row["text"] for i, row in zip(mine, written, strict=True)}
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, (texts, sums))
        texts = {i: text for part, _ in parts for i, text in part.items()}
        sums = sum(part for _, part in parts)
    rows = [{"id": cases[i].id, "report": cases[i].report, "text": texts[i]} for i in sorted(texts)]
    pairs = [(stated(r["text"], conditions), truth_of(c, conditions)[0]) for r, c in zip(rows, cases, strict=True)]
    numbers = {"val_loss": float(sums[0] / sums[1]), "val_f1": f1_of(pairs) or 0.0}
    return numbers | {"val_distinct": len({row["text"] for row in rows}) / len(rows)}, rows


def rank_of(row):
    """What the best validation is chosen by: F1 of the labels, then distinct reports, then the loss."""
    return round(row["val_f1"], 3), row["val_distinct"], -row["val_loss"]


# ------------------------------------------------------------------------------------------------------------ training


def train(args, vlm, data, run_dir, rank, world_size):
    """Train into run_dir -> (history, best row)."""
    say = print if rank == 0 else lambda *a, **k: None
    conditions = tuple(args.conditions) if data.facts["phantom"] else CONDITIONS[1:]
    cases, store, examples, val_cases, val_store, val_examples = prepare(args, vlm, data, say)
    order = BatchOrder(examples, args.batch_size, 1, args.seed, args.epochs, args.steps)
    eval_every = args.eval_every or max(1, order.num_steps // 8)
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
    totals = {"loss": 0.0, "steps": 0, "skipped": 0, "examples": 0, "seconds": 0.0}
    last_path = run_dir / "last.pt"
    facts = {k: data.facts.get(k) for k in ("name", "settings", "sha256", "version")}
    saved = {"weights": weights, "optimizer": optimizer, "scaler": scaler}, settings_of(args, ASIDE), facts
    if args.resume and last_path.exists():
        then = load_state(last_path, *saved)
        step, history, best, size.now, totals = (then[k] for k in ("step", "history", "best", "micro_batch", "totals"))
        say(f"resumed from {last_path} at step {step} of {order.num_steps}")

    def save():
        """Random numbers and the order of the batches follow from seed and step."""
        save_state(last_path, *saved, step=step, history=history, best=best, micro_batch=size.now, totals=totals)

    if args.label_steps and not last_path.exists():
        state = run_dir / "labels.pt", *saved[1:]
        told = learn_labels(
            vlm, store, store.number_of[: len(cases)], [c.report for c in cases], args.label_steps, seed=args.seed,
            hidden=rank > 0, save=state,
        )  # fmt: skip
        save()
        state[0].unlink(missing_ok=True)
        say("labels: loss {loss:.3f} (shares alone {loss_of_shares:.3f}), {seconds:.0f} s".format(**told), flush=True)
    bar = tqdm(initial=step, total=order.num_steps, desc="training", leave=False, disable=None if rank == 0 else True)
    with StopSignal() as stop:
        while step < order.num_steps:
            begin = time.time()
            vlm.model.train()
            epoch, batch = order.at(step)
            torch.manual_seed(args.seed * 10_000_000 + step * world_size + rank)  # dropout: the same in a resumed run
            loss = backward(
                vlm, batch, store, size, scaler, not args.checkpointing, args.train == "full", rank, world_size
            ).item()
            taken = guard.step(loss, learning_rate(step, order.num_steps, warmup_steps, args.lr))
            step += 1
            totals["loss"] += loss if taken else 0.0
            for key, value in (("steps", taken), ("skipped", not taken), ("examples", len(batch))):
                totals[key] += value
            totals["seconds"] += time.time() - begin
            bar.update()
            if step % eval_every == 0 or step == order.num_steps:
                numbers, texts = validate(vlm, val_cases, val_store, val_examples, args, conditions, rank, world_size)
                row = {"step": step, "epoch": epoch + 1, "skipped_steps": totals["skipped"], **numbers}
                row["train_loss"] = totals["loss"] / totals["steps"] if totals["steps"] else None
                row["examples_per_second"] = totals["examples"] / totals["seconds"]
                history.append(row)
                better = best is None or rank_of(row) > rank_of(best)
                best = row if better else best
                say(line_of(row, order.num_steps) + "  *" * better, flush=True)
                totals = dict.fromkeys(totals, 0)
                if rank == 0:
                    if better:
                        save_model(vlm, run_dir / "best", args, data, row)
                        write_jsonl(run_dir / "val_reports.jsonl", texts)
                    write_jsonl(run_dir / "history.jsonl", history)
                save()
            if stop.requested():
                save()
                stop.exit(run_dir)
    bar.close()
    return history, best


def line_of(row, num_steps):
    shown = {"loss": "train_loss", "val loss": "val_loss", "F1": "val_f1", "distinct": "val_distinct"}
    numbers = "  ".join(f"{name} {row[key]:.3f}" for name, key in shown.items() if row[key] is not None)
    return f"step {row['step']:5d}/{num_steps}  {numbers}  {row['examples_per_second']:.1f} examples/s"


def save_model(vlm, folder, args, data, row):
    """Adapter, or whole model, processor, and what it was trained on into `folder`, which is replaced in one go."""
    with atomic_folder(folder) as building:
        save_vlm(vlm, building)
        told = {"dataset": data.facts, "prompt": REPORT, "indication": args.indication, "step": row["step"]}
        told["conditions"] = args.conditions if data.facts["phantom"] else None
        write_json(building / "training.json", told)


@script(torchrun=True)
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, _ = pick_device(args.device)
    rank, world_size = start_distributed(device)
    chosen = SEVERE | {"conditions": args.conditions}
    data = load_reports(
        args.data, args.data_dir, args.films, args.seed, args.image_size, chosen, args.limit, ("train", "val")
    )
    if data.facts["phantom"] and rank == 0:
        print(f"*** {PHANTOM} ***")
    seed_everything(args.seed)
    vlm = load_model(args, device, "float32" if args.train == "full" and args.dtype == "auto" else args.dtype)
    if args.train == "lora":
        args.checkpointing = args.checkpointing or count_parameters(vlm.base) > 100e6
        add_lora(vlm, rank=args.lora_rank, dropout=args.lora_dropout, checkpointing=args.checkpointing)
    elif args.checkpointing:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run_dir = open_run_dir(args, TASK, "train")
    history, best = train(args, vlm, data, run_dir, rank, world_size)
    if rank > 0:
        return
    write_json(run_dir / "metrics.json", {
        "dataset": data.facts, "split": "val", "best": best, "last": history[-1], **vlm.facts(), "train": args.train,
        "trainable_parameters": count_parameters(vlm.model, trainable=True), "seed": args.seed,
        "settings": settings_of(args, ASIDE), **run_facts(started, device),
    })  # fmt: skip
    title = f"{data.name}, {args.model or vlm.name}, {args.train}"
    draw_history(run_dir / "figures" / "curves.png", history, PANELS, "step", title, data.facts["phantom"])
    place = [] if data.facts["phantom"] else ["--data-dir", args.data_dir]
    measure = command("task2_report/evaluate.py", "--task", "report", "--adapter", run_dir / "best", *place)
    print(
        f"best step {best['step']}: micro-F1 of the labels {best['val_f1']:.3f} on validation; measure it on test films"
        f" with\n  {measure}\nresults in {run_dir} ({time.time() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
