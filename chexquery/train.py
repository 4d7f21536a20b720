"""
Train CheXQuery in three phases; keep the checkpoint of each whose validation reports are clinically best and varied.

Usage:
    python chexquery/train.py --all-phases --model tiny --data phantom    # offline, two cores
    python chexquery/prepare.py --splits-file outputs/splits/data_splits.json && \\
        python chexquery/train.py --all-phases --splits-file outputs/splits/data_splits.json   # SigLIP, Flan-T5: a GPU
    python chexquery/train.py --phase 2 --resume outputs/chexquery/train/001
    python chexquery/train.py --dry-run                                   # everything once, seconds
    torchrun --nproc-per-node 2 chexquery/train.py --all-phases --model tiny --data phantom

Expected of these: see chexquery/README.md, where each number stands beside its command.
Writes to the run folder: phase1/, phase2/, phase3/, each with best.pt (for evaluate.py, infer.py, visualize.py),
last.pt (to resume), history.jsonl, val_reports.jsonl; metrics.json, figures/curves.png.

Phase 1 aligns the queries: a pretrained vision tower and text model are frozen, and the tower's features are computed
once (--cache-features). Phase 2 trains all of it, with LoRA in both, on report and labels together. Phase 3 trains the
report alone; the tower is frozen, and the heads only follow the queries. What starts from random weights (--model tiny,
small) is trained from phase 1 on. Phase N starts from the best of phase N - 1. --model: chexquery/configs/<model>.yaml.
"""

import argparse
import hashlib
import math
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from tqdm import tqdm

from chexquery.cases import AGAIN, Films, abnormal_sentences, add_data_options, changed, epoch_order, label_targets
from chexquery.cases import load_studies, region_targets
from chexquery.checkpoints import save_model
from chexquery.model import SHAPE, build_model
from shared.metrics.classification import choose_threshold
from shared.metrics.clinical import averages, positive_matrix
from shared.metrics.labels import CONDITIONS, label_report
from shared.metrics.report_baselines import diversity
from shared.models.hub import explained
from shared.report import PHANTOM, draw_history
from shared.runtime import InputError, add_resume, bounded, command, fraction, load_checkpoint, not_negative
from shared.runtime import open_run_dir, pick_device, positive_float, positive_int, run_facts, script, script_parser
from shared.runtime import seed_everything, start_distributed, write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, Weights, adamw, learning_rate, load_state, save_state, settings_of

TASK = "chexquery"
ASIDE = ("phase", "splits_file", "cache_gib", "start_from", "eval_batch")  # settings that a resumed run may change
PHASES = (1, 2, 3)
PER_PHASE = ("epochs", "batch_size", "accumulate", "lr", "warmup", "aux_weight", "label_smoothing")
# Rare and urgent findings count more in the label loss; the rest counts 1 (the published design).
LABEL_WEIGHTS = {"Cardiomegaly": 2.0, "Pneumothorax": 2.5, "Pleural Effusion": 2.5}
LABEL_WEIGHTS |= dict.fromkeys(("Edema", "Consolidation", "Pneumonia"), 1.8)
PANELS = (
    ("loss", {"train_loss": "training", "val_loss": "validation, report"}),
    ("validation F1 of the reports", {"f1_micro_13": "micro, 13", "f1_macro": "macro, those that occur"}),
    ("share of validation reports", {"distinct": "distinct", "share_most_frequent": "equal to the most frequent"}),
)


# ----------------------------------------------------------------------------------------------------------- arguments


def build_parser():
    parser = script_parser(__doc__, task=TASK, data="IU X-ray")
    # fmt: off
    g = parser.add_argument_group("what is trained")
    g.add_argument("--model", default="full", choices=["tiny", "small", "full"],
        help="a set of options, chexquery/configs/<model>.yaml; other flags and --config win (%(default)s)")
    g.add_argument("--phase", type=int, default=0, choices=(0, *PHASES), help="this phase only (0: all of them)")
    g.add_argument("--all-phases", dest="phase", action="store_const", const=0, help="1, 2 and 3 in turn (the default)")
    g.add_argument("--start-from", metavar="PATH", help="best.pt of the phase before, from another run")
    g = parser.add_argument_group("reports")
    add_data_options(g)
    g.add_argument("--views", nargs="+", default=["frontal", "lateral"], choices=["frontal", "lateral"],
        help="films that are looked at, where a study has them (%(default)s)")
    g.add_argument("--uncertain", default="positive", choices=["positive", "negative", "ignore"],
        help="what a suspected condition is in the label loss (%(default)s)")
    g.add_argument("--phase1-text", default="report", choices=["report", "findings"],
        help="what phase 1 writes: the report, or those of its sentences that state something abnormal (%(default)s)")
    g.add_argument("--shuffle-regions", action="store_true",
        help="control: region targets of another study, so that region queries learn nothing of their region")
    g = parser.add_argument_group("model")
    g.add_argument("--vision-model", default="tiny:siglip", help="hub name, folder or tiny:siglip (%(default)s)")
    g.add_argument("--text-model", default="tiny:t5", help="Flan-T5: hub name, folder or tiny:t5 (%(default)s)")
    g.add_argument("--condition-model", default="tiny:bert", help="BERT that gives the query starts (%(default)s)")
    g.add_argument("--query-init", default="text", choices=["text", "random"], help="start of the condition queries")
    g.add_argument("--image-size", type=positive_int, default=112, help="tiny tower: pixels per side (%(default)s)")
    g.add_argument("--patch-size", type=positive_int, default=14, help="tiny tower: pixels per side (%(default)s)")
    g.add_argument("--width", type=positive_int, default=192, help="tiny models: numbers per token (%(default)s)")
    g.add_argument("--vision-layers", type=positive_int, default=4, help="tiny tower (%(default)s)")
    g.add_argument("--text-layers", type=positive_int, default=4, help="tiny decoder (%(default)s)")
    g.add_argument("--vocabulary", type=positive_int, default=1024, help="tiny: pieces, of the reports (%(default)s)")
    g.add_argument("--num-layers", type=positive_int, default=2, help="layers of the queries (%(default)s)")
    g.add_argument("--num-heads", type=positive_int, default=8, help="attention heads of the queries (%(default)s)")
    g.add_argument("--num-pool-queries", type=bounded(int, 0, 256), default=10,
        help="visual tokens beside the global one (%(default)s)")
    g.add_argument("--dropout", type=fraction, default=0.1, help="in the query layers and a tiny decoder (%(default)s)")
    g.add_argument("--aux-dropout", type=fraction, default=0.2, help="in the label heads (%(default)s)")
    g.add_argument("--gate", action=argparse.BooleanOptionalAction, default=True, help="weigh film against queries")
    g.add_argument("--gate-hidden", type=positive_int, default=512, help="width inside the gate (%(default)s)")
    g.add_argument("--regions", action=argparse.BooleanOptionalAction, default=True, help="the 6 region queries")
    g.add_argument("--use-conditions", dest="use_conditions", action=argparse.BooleanOptionalAction, default=True,
        help="the 14 condition queries and their head")
    g.add_argument("--query-attention", action=argparse.BooleanOptionalAction, default=True,
        help="self-attention between the queries in each layer")
    g.add_argument("--lora-rank", type=positive_int, default=16, help="of pretrained models (%(default)s)")
    g.add_argument("--lora-alpha", type=positive_float, default=32.0, help="of pretrained models (%(default)s)")
    g.add_argument("--lora-dropout", type=fraction, default=0.05, help="of pretrained models (%(default)s)")
    g.add_argument("--prompt", default="", help="words every report begins with: given, not learned ('%(default)s')")
    g.add_argument("--max-tokens", type=positive_int, default=128, help="longest report, in tokens (%(default)s)")
    g = parser.add_argument_group("optimisation: one value, or one for each phase")
    for name, kind, default, text in (
        ("epochs", positive_int, [15, 30, 15], "passes over the training studies"),
        ("batch-size", positive_int, [16, 4, 8], "studies per pass; lower it first when memory runs out"),
        ("accumulate", positive_int, [2, 8, 4], "passes per step"),
        ("lr", positive_float, [1e-4, 3e-5, 2e-5], "highest learning rate, then a cosine down to zero"),
        ("warmup", bounded(int, 0, 10**9), [200, 500, 0], "steps of linear warm-up"),
        ("aux-weight", not_negative, [0.7, 0.3, 0.0], "of the label loss beside 1 for the report"),
        ("label-smoothing", fraction, [0.0, 0.05, 0.1], "of the report loss"),
    ):
        g.add_argument(f"--{name}", type=kind, nargs="+", default=default, help=f"{text} (%(default)s)")
    g.add_argument("--region-weight", type=not_negative, default=0.2, help="of the region loss, times --aux-weight")
    g.add_argument("--weight-decay", type=not_negative, default=0.01, help="of matrices (%(default)s)")
    g.add_argument("--grad-clip", type=positive_float, default=1.0, help="highest norm of the gradient (%(default)s)")
    g.add_argument("--balanced", action=argparse.BooleanOptionalAction, default=True,
        help="draw as many abnormal as normal studies")
    g.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="turn, move, zoom, brighten a little; never mirrored, since reports name sides")
    g.add_argument("--cache-features", action=argparse.BooleanOptionalAction, default=True,
        help="phase 1 with a frozen tower: its features once, without --augment")
    g.add_argument("--cache-gib", type=positive_float, default=4.0, help="GiB for kept films or features (%(default)s)")
    g = parser.add_argument_group("validation")
    g.add_argument("--eval-studies", type=positive_int, default=200, help="validation studies (%(default)s)")
    g.add_argument("--eval-batch", type=positive_int, default=50, help="reports written at once (%(default)s)")
    g.add_argument("--beams", type=bounded(int, 1, 32), default=1,
        help="of evaluate.py and infer.py; validation is greedy")
    g.add_argument("--min-tokens", type=bounded(int, 0, 1024), default=0,
        help="shortest report, in tokens (%(default)s)")
    g.add_argument("--patience", type=positive_int, default=5, help="epochs without a better one that end a phase")
    # fmt: on
    add_resume(g)
    return parser


def parse_args(argv=None):
    parser = build_parser()
    chosen = parser.parse_args(argv)
    path = ROOT / TASK / "configs" / f"{'tiny' if chosen.dry_run else chosen.model}.yaml"
    preset = {key.replace("-", "_"): value for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items()}
    parser.set_defaults(**preset)  # flags, --config and the settings of a resumed run win
    args = parser.parse_args(argv)
    for name in PER_PHASE:
        values = getattr(args, name)
        if len(values) not in (1, 3):
            parser.error(f"--{name.replace('_', '-')} takes one value or three, one for each phase")
        setattr(args, name, values * 3 if len(values) == 1 else values)
    if args.dry_run:
        args.model, args.data, args.device, args.films = "tiny", "phantom", "cpu", 32
        args.epochs, args.eval_studies = [1] * 3, 8
        args.splits_file, args.width, args.vision_layers, args.text_layers, args.gate_hidden = None, 64, 1, 1, 32
    if args.min_tokens >= args.max_tokens:
        parser.error("--min-tokens must be below --max-tokens")
    if args.start_from and args.phase in (0, 1):
        parser.error("--start-from needs --phase 2 or 3: phase 1 starts from the models as they come")
    return args


def shape_of(args):
    return {name: getattr(args, "use_conditions" if name == "conditions" else name) for name in SHAPE}


# ---------------------------------------------------------------------------------------------------------------- data


class Split:
    """One split on the way into the model: films, targets, and the vision tower's features where they are kept."""

    def __init__(self, rows, model, args, drawn, shuffle_regions=False):
        self.rows = rows
        self.films = Films(rows, model.image_size, drawn, args.views, args.cache_gib)
        reports = [row["report"] for row in rows]
        first = list(map(abnormal_sentences, reports)) if args.phase1_text == "findings" else reports
        self.wanted = {1: first, 2: reports, 3: reports}  # what each phase writes
        self.ids = {phase: model.encode(texts) for phase, texts in self.wanted.items()}
        self.labels, self.label_mask = (torch.from_numpy(a) for a in label_targets(rows, args.uncertain))
        self.regions, self.region_mask = (torch.from_numpy(a) for a in region_targets(rows))
        if shuffle_regions:
            order = np.random.default_rng(args.seed).permutation(len(rows))
            self.regions, self.region_mask = self.regions[order], self.region_mask[order]
        self.patches = self.whole = None

    def cache(self, model, device, batch, gib):
        """Features of the frozen tower, in half the bytes -> GiB, or None when they do not fit."""
        config = model.vision.config
        each = 2 * (config.image_size // config.patch_size) ** 2 * config.hidden_size * 2
        if each * len(self.rows) > gib * 2**30:
            return None
        parts = []
        for start in range(0, len(self.rows), batch):
            images, present = self.films.get(range(start, min(start + batch, len(self.rows))))
            with torch.no_grad():
                looked = model.look(torch.from_numpy(images).to(device), torch.from_numpy(present).to(device))
            parts.append([part.to("cpu", torch.bfloat16) for part in looked])
        self.patches, self.whole = (torch.cat(part) for part in zip(*parts, strict=True))
        return each * len(self.rows) / 2**30

    def texts(self, indices, phase, device):
        """-> ids of what is written about these rows in a phase, (N, longest of them), padded with -100."""
        ids = self.ids[phase][indices]
        return ids[:, : (ids != -100).any(0).sum()].contiguous().to(device)

    def num_tokens(self, model, indices, phase):
        """How many tokens of these texts are learned: all but prompt and padding."""
        return int((self.ids[phase][list(indices), len(model.prompt_ids) :] != -100).sum())

    def inputs(self, indices, device, augmenting=False):
        """-> the arguments of the model for these rows."""
        images, present = self.films.get(indices)
        present = torch.from_numpy(present).to(device)
        if self.patches is not None:
            looked = [part[indices].to(device, torch.float32) for part in (self.patches, self.whole)]
            return {"looked": looked, "present": present}
        images = torch.from_numpy(images).to(device)
        return {"images": changed(images) if augmenting else images, "present": present}


# ---------------------------------------------------------------------------------------------------------------- loss


def losses(model, split, indices, args, phase, device, dtype, augmenting=False, of=None):
    """
    -> (loss to minimise, {"report", "labels", "regions"}) of these rows: means over the tokens and labels of the batch
    `of` (default: these alone), to which its passes add up, however it is cut. Where labels have no weight, the heads
    alone learn them: left as they are, they would misread queries that go on learning.
    """
    of = indices if of is None else of
    tokens, all_tokens = (split.num_tokens(model, rows, phase) for rows in (indices, of))
    weights = torch.tensor([LABEL_WEIGHTS.get(name, 1.0) for name in CONDITIONS], device=device)
    aux = args.aux_weight[phase - 1]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        seen = model(**split.inputs(indices, device, augmenting), apart=not aux)
        report = model.report_loss(seen.tokens, split.texts(indices, phase, device), args.label_smoothing[phase - 1])
    found = {"report": report * (tokens / all_tokens)}
    for name, logits, target, mask, weight in (
        ("labels", seen.logits, split.labels, split.label_mask, weights),
        ("regions", seen.region_logits, split.regions, split.region_mask, None),
    ):
        if logits is not None:
            wanted = target[indices].to(device)
            each = F.binary_cross_entropy_with_logits(logits.float(), wanted, weight, reduction="none")
            found[name] = (each * mask[indices].to(device)).sum() / mask[of].sum().clamp(min=1).item()
    told = found.get("labels", 0) + args.region_weight * found.get("regions", 0)
    total = found["report"] + (aux * told if aux else told - told.detach())  # a gradient, and nothing in the sum
    return total, {name: value.item() for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(model, split, args, phase, device, dtype):
    """Reports (greedy) and losses of the validation studies -> (numbers, rows with the text written)."""
    model.eval()
    texts, logits, report_loss = [], [], 0.0
    for start in range(0, len(split.rows), args.eval_batch):
        indices = list(range(start, min(start + args.eval_batch, len(split.rows))))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            seen = model(**split.inputs(indices, device))
            loss = model.report_loss(seen.tokens, split.texts(indices, phase, device)).item()
        report_loss += loss * split.num_tokens(model, indices, phase)
        texts += model.write(seen.tokens.float())[0]
        logits += [] if seen.logits is None else [seen.logits.float().cpu()]
    if not math.isfinite(report_loss):
        raise InputError("the validation loss is not finite: lower --lr; the run folder keeps what was saved before")
    written = [label_report(text) for text in texts]
    found, true = positive_matrix(written), positive_matrix([row["labels"] for row in split.rows])
    occurring = [j for j in range(1, len(CONDITIONS)) if true[:, j].any()]
    tp, both = (found & true).sum(0), found.sum(0) + true.sum(0)
    macro = float(np.mean(2 * tp[occurring] / np.maximum(both[occurring], 1))) if occurring else 0.0
    spread, numbers = diversity(texts, split.wanted[phase]), averages(found, true)
    score = macro + 0.1 * min(1.0, spread["distinct_reports"] / spread["reference_distinct_reports"])
    alike = max(Counter(split.wanted[phase]).values()) / len(texts)  # normal studies may well be told alike
    thresholds = None
    if logits:  # a condition that no study has is never called, one that all have always
        scores = torch.cat(logits).sigmoid().numpy().astype(float)
        thresholds = [choose_threshold(t.astype(int), s) if 0 < t.sum() < len(t) else 1.0 - float(t.mean())
                      for t, s in zip(true.T, scores.T, strict=True)]  # fmt: skip
    rows = [{"uid": r["uid"], "reference": r["reference"], "text": t} for r, t in zip(split.rows, texts, strict=True)]
    loss = report_loss / split.num_tokens(model, range(len(texts)), phase)
    return {
        "val_loss": loss, "score": score, "f1_macro": macro, "f1_micro_13": numbers["f1_micro_13"],
        "distinct": spread["distinct_reports"] / len(texts), "share_most_frequent": spread["share_most_frequent"],
        "collapsed": spread["share_most_frequent"] > max(0.5, 1.25 * alike) and len(texts) >= 8,
        "thresholds": thresholds,
    }, rows  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ training


def optimizer_of(weights, args, phase):
    fused = {p.device.type for p in weights.values()} <= {"cpu", "cuda"}  # one pass over all weights
    return adamw(weights, args.lr[phase - 1], args.weight_decay, fused=fused)


def take_step(model, split, batch, args, phase, work, augmenting):
    """Gradients of the mean loss of the batch, in passes, over all processes -> its loss and parts."""
    device, dtype, scaler, rank, world_size = work
    size, totals = args.batch_size[phase - 1], {}
    mine = batch[rank::world_size]
    for start in range(0, len(mine), size):
        indices = mine[start : start + size]
        loss, parts = losses(model, split, indices, args, phase, device, dtype, augmenting, of=batch)
        scaler.scale(loss).backward()
        for name, value in ({"loss": loss.item()} | parts).items():
            totals[name] = totals.get(name, 0.0) + value
    if world_size > 1:
        for p in (p for p in model.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        gathered = [None] * world_size
        dist.all_gather_object(gathered, totals)
        totals = {name: sum(g.get(name, 0.0) for g in gathered) for name in gathered[0]}
    return totals


def train_phase(args, phase, model, train, val, facts, run_dir, work):
    """One phase into run_dir/phaseN -> (history, best row). The model is left as it is after the last step."""
    device, dtype, scaler, rank, world_size = work
    say, folder = (print if rank == 0 else lambda *a, **k: None), run_dir / f"phase{phase}"
    trained = model.freeze(phase)
    weights = Weights(model)
    train.patches = val.patches = None
    if phase == 1 and "vision" not in trained and args.cache_features:
        kept = [split.cache(model.eval(), device, args.eval_batch, args.cache_gib / 2) for split in (train, val)]
        say("features of the tower do not fit --cache-gib: computed for every batch" if None in kept else
            f"features of the frozen tower kept, {sum(kept):.2f} GiB; films are not changed in this phase")  # fmt: skip
    augmenting = args.augment and train.patches is None
    effective = args.batch_size[phase - 1] * args.accumulate[phase - 1]
    per_epoch = math.ceil(len(train.rows) / effective)
    num_steps = args.epochs[phase - 1] * per_epoch
    optimizer = optimizer_of(weights, args, phase)
    apart = set() if args.aux_weight[phase - 1] else set(model.parts()["head"])  # their gradient shortens no other's
    guard = GuardedStep(optimizer, scaler, [p for p in weights.values() if p not in apart], args.grad_clip)
    values = {"step": 0, "history": [], "best": None, "since_best": 0, "totals": {}, "done": False}
    last_path = folder / "last.pt"
    saved = {"weights": weights, "optimizer": optimizer, "scaler": scaler}, settings_of(args, ASIDE), facts["of"]
    if args.resume and last_path.exists():
        values |= load_state(last_path, *saved)
        say(f"resumed from {last_path} at step {values['step']} of {num_steps}")
    count = sum(p.numel() for p in weights.values())
    say(f"phase {phase}: trains {', '.join(trained)}: {count:,} of {sum(p.numel() for p in model.parameters()):,}"
        f" parameters; {num_steps} steps of {effective} studies, lr {args.lr[phase - 1]:g}", flush=True)  # fmt: skip
    step, order_of = values["step"], None
    bar = tqdm(initial=step, total=num_steps, desc=f"phase {phase}", leave=False, disable=None if rank == 0 else True)
    with StopSignal() as stop:
        while step < num_steps and not values["done"]:
            begin, (epoch, place) = time.time(), divmod(step, per_epoch)
            if order_of != epoch:
                order, order_of = epoch_order(train.rows, args.seed + 1000 * phase + epoch, args.balanced), epoch
            model.train()
            torch.manual_seed(args.seed * 10_000_000 + phase * 1_000_000 + step * world_size + rank)
            batch = order[place * effective : (place + 1) * effective]
            found = take_step(model, train, batch, args, phase, work, augmenting)
            lr = learning_rate(step, num_steps, args.warmup[phase - 1], args.lr[phase - 1])
            taken = guard.step(found["loss"], lr)
            step += 1
            done = {"steps": 1, "studies": len(batch), "seconds": time.time() - begin}
            for name, value in (found | done if taken else {"skipped": 1}).items():
                values["totals"][name] = values["totals"].get(name, 0) + value
            bar.update()
            if step % per_epoch == 0:
                row = {"step": step, "epoch": epoch + 1, "lr": lr}
                finish_epoch(args, phase, model, val, facts, folder, work, values, row)
            values |= {"step": step, "done": step == num_steps or values["done"]}
            stopping = stop.requested()
            if step % per_epoch == 0 or stopping:
                save_state(last_path, *saved, **values)
            if stopping:
                stop.exit(run_dir)
    bar.close()
    return values["history"], values["best"]


def finish_epoch(args, phase, model, val, facts, folder, work, values, row):
    """Validate, keep the best, stop early; values are changed in place."""
    device, dtype, _, rank, world_size = work
    numbers, reports = validate(model, val, args, phase, device, dtype) if rank == 0 else (None, None)
    if world_size > 1:
        dist.broadcast_object_list(box := [numbers], src=0)
        numbers = box[0]
    totals, thresholds = values["totals"], numbers.pop("thresholds")
    if "steps" not in totals:
        raise InputError(f"no step of epoch {row['epoch']} was finite: lower --lr; {folder} keeps the best before")
    row |= {"phase": phase, "skipped_steps": totals.get("skipped", 0), **numbers}
    row |= {f"train_{name}": totals[name] / totals["steps"] for name in ("loss", "report", "labels", "regions")
            if name in totals}  # fmt: skip
    row |= {"seconds": totals["seconds"], "studies_per_second": totals["studies"] / totals["seconds"]}
    values["history"].append(row)
    best = values["best"]
    # A collapsed epoch is never better than one that is not; then clinical F1 and diversity, then the loss.
    rank_of = lambda r: (not r["collapsed"], r["score"], -r["val_loss"])  # noqa: E731
    better = best is None or rank_of(row) > rank_of(best)
    values |= {"best": row if better else best, "since_best": 0 if better else values["since_best"] + 1, "totals": {}}
    values["done"] = values["since_best"] >= args.patience
    if rank > 0:
        return
    print(f"phase {phase} epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}"
          f"  F1 micro {row['f1_micro_13']:.3f} macro {row['f1_macro']:.3f}  distinct {row['distinct']:.2f}"
          f"  {row['studies_per_second']:.1f} studies/s{'  *' * better}", flush=True)  # fmt: skip
    if row["collapsed"]:
        print(f"*** collapse: {row['share_most_frequent']:.0%} of the validation reports are one and the same ***")
    if values["done"]:
        print(f"phase {phase} ends: no better epoch in the last {args.patience}")
    if better:
        more = {"thresholds": thresholds, "best": row, "data": facts, "decoding": [args.beams, args.min_tokens]}
        save_model(folder / "best.pt", model, phase, **more)
        write_jsonl(folder / "val_reports.jsonl", reports)
    write_jsonl(folder / "history.jsonl", values["history"])


def start_phase(args, phase, model, run_dir, rank):
    """Put the best of the phase before into the model. InputError where there is none, or one of another phase."""
    if phase == 1:
        return None
    path = Path(args.start_from or run_dir / f"phase{phase - 1}" / "best.pt")
    if not path.is_file():
        go = command("chexquery/train.py", "--phase", phase - 1, "--resume", run_dir)
        raise InputError(f"phase {phase} starts from phase {phase - 1}'s best, and there is no {path}: first {go}")
    state = load_checkpoint(path, ("chexquery", "phase", "weights"), what="CheXQuery model (best.pt)")
    if state["phase"] != phase - 1:
        raise InputError(f"phase {phase} starts from phase {phase - 1}'s best, and {path} is of phase {state['phase']}")
    with explained(f"{path} is damaged, or of another version"):
        model.load_own_state(state, path)
    if rank == 0:
        print(f"phase {phase} starts from {path}")


@script(torchrun=True)
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, dtype = pick_device(args.device)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # T5 overflows in float16
    rank, world_size = start_distributed(device)
    studies = load_studies(args)
    phantom, drawn = bool(studies.notes.get("phantom")), studies.notes.get("drawn")
    if rank == 0:
        print(f"*** {PHANTOM} ***" if phantom else "", studies, sep="\n" if phantom else "")
    train_rows, val_rows = studies.split("train"), studies.split("val")[: args.eval_studies]
    if not train_rows or not val_rows:
        raise InputError(f"{len(train_rows)} studies to train on and {len(val_rows)} for validation: both are needed")
    seed_everything(args.seed)
    model = build_model(shape_of(args), [row["report"] for row in train_rows]).to(device)
    rows_digest = hashlib.sha256(repr([(r["uid"], r["report"], r["films"]) for r in train_rows + val_rows]).encode())
    of = f"{studies.name}, {studies.version}, labels {studies.notes['labels']}, rows {rows_digest.hexdigest()[:16]}"
    facts = {"name": studies.name, "phantom": phantom, "section": studies.notes["section"], "views": args.views}
    facts |= {"drawn": drawn, "of": of, "again": {name: vars(args)[name] for name in AGAIN}}
    facts["patients"] = sorted({str(row["patient"]) for row in train_rows})  # none of them may be measured on
    run_dir = open_run_dir(args, TASK, "train")
    train = Split(train_rows, model, args, drawn, args.shuffle_regions)
    val = Split(val_rows, model, args, drawn)
    work, histories, best = (device, dtype, torch.amp.GradScaler(device.type, enabled=False), rank, world_size), {}, {}
    for phase in PHASES if args.phase == 0 else [args.phase]:
        start_phase(args, phase, model, run_dir, rank)
        history, best[phase] = train_phase(args, phase, model, train, val, facts, run_dir, work)
        histories[phase] = [row | {"total epoch": row["epoch"] + sum(map(len, histories.values()))} for row in history]
        args.start_from = None
        if world_size > 1:
            dist.barrier()
    if rank > 0:
        return
    write_json(run_dir / "metrics.json", {
        "dataset": {k: v for k, v in facts.items() if k != "patients"}, "split": "val",
        "n": len(val_rows), "best": best, "model": args.model,
        "query_start": "random" if args.query_init == "random" else f"position 0 of {args.condition_model}",
        "parameters": sum(p.numel() for p in model.parameters()), "trained": {p: model.freeze(p) for p in best},
        "settings": settings_of(args), "seed": args.seed, **run_facts(started, device),
    })  # fmt: skip
    place = [] if phantom or args.splits_file else ["--data-dir", args.data_dir]
    title = f"{studies.name}, {args.model}, {len(val_rows)} validation studies; a line for each phase"
    draw_history(run_dir / "figures" / "curves.png", histories, PANELS, "total epoch", title, phantom)
    last = max(best)
    print(f"best of phase {last}: F1 micro {best[last]['f1_micro_13']:.3f}; measure it on test studies with\n"
          f"{command('chexquery/evaluate.py', '--checkpoint', run_dir / f'phase{last}' / 'best.pt', *place)}\n"
          f"results in {run_dir} ({time.time() - started:.0f} s)")  # fmt: skip


if __name__ == "__main__":
    main()
