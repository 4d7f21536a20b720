"""
Train the chest X-ray classifier (PneumoniaMNIST, or any other 2-D MedMNIST set) and keep the best epoch by validation.

Usage:
    python task1_classification/train.py --epochs 15
    python task1_classification/train.py --epochs 15 --batch_size 32 --lr 0.005
    python task1_classification/train.py --epochs 15 --seeds 0 1 2 3 4
    python task1_classification/train.py --resume outputs/task1_classification/train/001
    python task1_classification/train.py --dry-run         # phantom images, CPU, a few seconds
    torchrun --nproc-per-node 2 task1_classification/train.py --epochs 15

Expected of these: see task1_classification/README.md, where each number stands beside its command.
Writes to the run folder: best.pt (the classifier, 45 MB), last.pt (to resume, 179 MB), history.jsonl, metrics.json,
figures/curves.png (with several --seeds the first three in seed0/, seed1/, ...), and besides models/task1_model.pth and
reports/figures/task1_curves.png. Never reads the test split: evaluate.py does.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from shared.data.augment import STRENGTHS, augment, shifted_copies
from shared.data.image_sets import SIZES, load_images, load_phantom
from shared.metrics.classification import official_auc_accuracy
from shared.report import PHANTOM, draw_history, number
from shared.runtime import InputError, add_resume, atomic_file, bounded, command, fraction, free_gpu, load_checkpoint
from shared.runtime import not_negative, open_run_dir, pick_device, positive_float, positive_int, read_json, run_facts
from shared.runtime import save_checkpoint, script, script_parser, seed_everything, seed_number, start_distributed
from shared.runtime import write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, learning_rate, load_state, moving_average, save_state, settings_of
from task1_classification.model import ARCHITECTURES, DRY_RUN, MODEL_PATH, STEMS, build_model, choose_stem
from task1_classification.model import classifier_checkpoint, normalise, predict_logits, to_probabilities

TASK = "task1_classification"
REPORT_CURVES = Path("reports/figures/task1_curves.png")
PANELS = [
    ("loss", {"train_loss": "training (changed images)", "val_loss": "validation"}),
    ("AUC", {"val_auc": "validation", "val_auc_shifted": "validation and its shifted copies"}),
]


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="PneumoniaMNIST")
    g = parser.add_argument_group("images")
    g.add_argument("--image-size", type=int, default=28, choices=SIZES, help="pixels per side (%(default)s)")
    # fmt: off
    g.add_argument("--augment", default="full", choices=STRENGTHS, help="changes of training images (%(default)s)")
    g = parser.add_argument_group("model")
    g.add_argument("--arch", default="resnet18", choices=ARCHITECTURES, help="network (%(default)s)")
    g.add_argument("--stem", default="auto", choices=STEMS,
        help="first layer; auto: 3x3-stride2 up to 64 pixels, else 7x7 (%(default)s)")
    g.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights (a download)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=bounded(int, 1, 100_000), default=10, help="passes over the images (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=64,
        help="images per step over all GPUs; at least 2 (%(default)s)")
    g.add_argument("--lr", type=positive_float, default=0.05, help="highest learning rate of SGD (%(default)s)")
    g.add_argument("--weight-decay", type=not_negative, default=5e-4, help="L2 penalty on all weights (%(default)s)")
    g.add_argument("--warmup-epochs", type=not_negative, default=1.0,
        help="epochs of rising learning rate before the cosine (%(default)s)")
    g.add_argument("--label-smoothing", type=fraction, default=0.0,
        help="share of each label spread over all classes (%(default)s)")
    g.add_argument("--class-weights", action="store_true", help="weigh every class alike in the loss")
    g.add_argument("--ema", type=fraction, default=0.99,
        help="decay per step of the averaged weights that are kept; 0 = off (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="computing precision; auto: 16 bit on CUDA only (%(default)s)")
    # fmt: on
    g = parser.add_argument_group("runs")
    g.add_argument("--seeds", type=seed_number, nargs="+", metavar="SEED", help="train once per seed, not with --seed")
    add_resume(g)
    args = parser.parse_args(argv)
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2: batch normalisation needs two images")
    if args.ema == 1 or args.label_smoothing == 1:
        parser.error("--ema and --label-smoothing must be below 1")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds names a seed twice")
    if args.dry_run:
        args.data, args.device = "phantom", "cpu"
        args.epochs, args.batch_size = min(args.epochs, 2), min(args.batch_size, 16)
    return args


def loss_of(logits, labels, task, class_weights, smoothing):
    """logits (N, outputs), labels (N,) or (N, L) -> mean loss. class_weights: None, or one per class or label."""
    if task in ("multi-class", "ordinal-regression"):
        return F.cross_entropy(logits, labels, weight=class_weights, label_smoothing=smoothing)
    targets = labels.float().view(len(labels), -1)  # (N, 1) for a binary set
    weights = class_weights
    if weights is not None:
        weights = weights[labels][:, None] if task == "binary-class" else torch.where(targets == 1, weights, 1.0)
    return F.binary_cross_entropy_with_logits(logits, targets * (1 - smoothing) + smoothing / 2, weight=weights)


def weights_of_classes(labels, num_classes, task):
    """Weights inversely proportional to the class counts, mean 1; multi-label: negatives per positive, at most 20."""
    if task.startswith("multi-label"):
        positives = labels.sum(0).clamp(min=1)
        return ((len(labels) - positives) / positives).clamp(max=20)
    counts = torch.bincount(labels, minlength=num_classes).float().clamp(min=1)
    return len(labels) / (num_classes * counts)


def pixel_statistics(images, most=20_000):
    """uint8 (N, C, H, W) -> mean and standard deviation per channel, pixels as 0..1, over at most `most` images."""
    pixels = images[:most].transpose(0, 1).flatten(1).float() / 255  # (C, N * H * W)
    return {"mean": pixels.mean(1).tolist(), "std": pixels.std(1).tolist()}


def validate(model, data, copies, normalisation, device, dtype):
    """
    -> (numbers: loss, AUC and accuracy on the validation images and the mean AUC over them and their shifted copies,
    logits of the plain images, logits of all copies one after the other).
    """
    labels, task = data.labels["val"], data.task
    logits = [predict_logits(model, images, normalisation, device, dtype) for images in copies.values()]  # plain first
    scores = [official_auc_accuracy(labels.numpy(), to_probabilities(z, task).numpy(), task) for z in logits]
    numbers = {
        "val_loss": float(loss_of(logits[0], labels, task, None, 0.0)),
        "val_auc": scores[0]["auc"],
        "val_accuracy": scores[0]["accuracy"],
        "val_auc_shifted": statistics.mean(s["auc"] for s in scores),
    }
    return numbers, logits[0], torch.cat(logits)


def score(row):
    """What epochs and seeds are chosen by: the mean AUC over validation images and shifted copies, then the loss."""
    return row["val_auc_shifted"], -row["val_loss"]


def train_one(args, data, seed, run_dir, place, device, dtype, rank, world_size, stop):
    """
    Train one network into `place` -> (its classifier checkpoint, its rows of history). Longer than other functions,
    because the loop and all it works on are to be read in one piece.
    """
    seed_everything(seed)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *a: None
    images, labels = data.images["train"], data.labels["train"]
    normalisation, copies = pixel_statistics(images), shifted_copies(data.images["val"])
    if device.type == "cuda" and images.numel() < 2 * 2**30:  # small sets live on the GPU, larger ones come by batches
        images, labels = images.to(device), labels.to(device)

    model = build_model(args.arch, data.num_outputs, data.channels, data.size, args.stem, args.pretrained)
    model = model.to(device, memory_format=torch.channels_last)
    average = moving_average(model, args.ema)  # steadier than any single step; this is what is validated and kept
    rule = dict(lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), **rule)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    guard = GuardedStep(optimizer, scaler, model.parameters())
    generator = torch.Generator(device)
    class_weights = None
    if args.class_weights:
        class_weights = weights_of_classes(labels, max(2, data.num_outputs), data.task).to(device)
    loss_settings = dict(task=data.task, class_weights=class_weights, smoothing=args.label_smoothing)
    loss_function = functools.partial(loss_of, **loss_settings)

    batch_size = min(args.batch_size, len(images))
    steps = len(images) // batch_size  # per epoch; the few images left over by an epoch's order are left out of it
    num_steps, warmup_steps = args.epochs * steps, round(args.warmup_epochs * steps)
    say(
        f"seed {seed}: {args.arch}, {sum(p.numel() for p in model.parameters()):,} parameters, stem"
        f" {choose_stem(args.stem, data.size)}; {args.epochs} epochs of {steps} steps of {batch_size} images"
    )

    parts = {"model": model, "average": average, "optimizer": optimizer, "scaler": scaler}
    kept = (place / "last.pt", parts, settings_of(args, aside=("seeds",)) | {"seed": seed}, data.sha256)
    run = start_or_resume(args, kept, steps, say)
    network = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    micro_batch = batch_size
    for epoch in range(run["epoch"], args.epochs):
        # Every random choice depends on seed, epoch and step alone, so that a resumed run repeats the uninterrupted one
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
        order, started, first_step, totals = order.to(images.device), time.time(), run["step"], run["totals"]
        model.train()
        quiet = None if rank == 0 else True  # None: only where there is no terminal
        bar = tqdm(range(first_step, steps), f"epoch {epoch + 1}", steps, False, initial=first_step, disable=quiet)
        for step in bar:
            now = epoch * steps + step
            generator.manual_seed(seed * 10_000_000 + now)
            index = order[step * batch_size : (step + 1) * batch_size]
            batch = augment(images[index].to(device).float() / 255, generator, args.augment)
            batch = normalise(batch, normalisation)[rank::world_size].contiguous(memory_format=torch.channels_last)
            target = labels[index][rank::world_size].to(device)
            loss, micro_batch = backward(network, batch, target, micro_batch, optimizer, scaler, dtype, loss_function)
            if world_size > 1:
                dist.all_reduce(loss)  # so that all ranks report, and skip, alike
                loss /= world_size
            if guard.step(loss := loss.item(), learning_rate(now, num_steps, warmup_steps, args.lr)):
                average.update_parameters(model)
                totals["loss"] += loss
                totals["steps"] += 1
            else:
                totals["skipped"] += 1
                for running, averaged in zip(model.buffers(), average.module.buffers(), strict=True):
                    running.copy_(averaged)  # the running statistics have seen the same infinities
            if stop.requested():
                save_state(*kept, **run | {"epoch": epoch, "step": step + 1})
                say(f"stopped in epoch {epoch + 1}, after step {step + 1} of {steps}")
                stop.exit(run_dir)

        try:
            numbers, plain_logits, all_logits = validate(average.module, data, copies, normalisation, device, dtype)
        except InputError as error:
            raise InputError(f"validation after epoch {epoch + 1}: {error}; {place} keeps the epochs before") from error
        seconds = time.time() - started
        row = {
            "epoch": epoch + 1,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": totals["loss"] / totals["steps"] if totals["steps"] else None,
            **numbers,
            "skipped_steps": totals["skipped"],
            "seconds": seconds,
            "images_per_second": (steps - first_step) * batch_size / seconds,
        }
        run |= {"epoch": epoch + 1, "step": 0, "totals": {"loss": 0.0, "steps": 0, "skipped": 0}}
        run["history"].append(row)
        if is_best := run["best"] is None or score(row) > score(run["best"]["row"]):
            weights = {k: v.clone().cpu() for k, v in average.module.state_dict().items()}
            run["best"] = {"row": row, "weights": weights, "val_logits": plain_logits, "all_logits": all_logits}
        say(
            f"epoch {epoch + 1:3d}/{args.epochs}  loss {number(row['train_loss'], 4)}  val loss {row['val_loss']:.4f}"
            f"  AUC {row['val_auc']:.4f}  shifted {row['val_auc_shifted']:.4f}  accuracy {row['val_accuracy']:.4f}"
            f"  {seconds:.1f} s{'  *' if is_best else ''}"
        )
        save_state(*kept, **run)  # best.pt and history.jsonl are written from the same state, and after it
        if rank == 0:
            write_jsonl(place / "history.jsonl", run["history"])

    best = run["best"]
    facts = {"architecture": args.arch, "stem": choose_stem(args.stem, data.size), "augment": args.augment}
    facts |= {"seed": seed, "limit": args.limit, "validation": best["row"]}
    logits = (best["val_logits"], best["all_logits"])
    classifier = classifier_checkpoint(best["weights"], *logits, data, normalisation, **facts)
    if rank == 0:
        save_checkpoint(place / "best.pt", classifier)
    return classifier, run["history"]


def start_or_resume(args, kept, steps, say):
    """The values of the loop, as they are at the start of a run or, with --resume, as its last.pt has them."""
    run = {"epoch": 0, "step": 0, "epochs": args.epochs, "totals": {"loss": 0.0, "steps": 0, "skipped": 0}}
    run |= {"history": [], "best": None}
    path = kept[0]
    if not args.resume:
        return run
    if not path.exists():
        say(f"no epoch was finished in {path.parent}: starting from the beginning")
        return run
    then = load_state(*kept, may_differ=("epochs",))
    if args.epochs < then["epoch"]:
        raise InputError(f"{path} already has {then['epoch']} epochs; --epochs {args.epochs} is less")
    if args.epochs != then["epochs"]:
        say(f"--epochs {then['epochs']} -> {args.epochs}: the learning rate follows the new length from here on")
    at = f"epoch {then['epoch'] + 1}, step {then['step']} of {steps}"
    say(f"resumed from {path}: {at if then['epoch'] < args.epochs else 'it has all its epochs'}")
    return then | {"epochs": args.epochs}


def backward(network, images, labels, micro_batch, optimizer, scaler, dtype, loss_function):
    """
    Gradients of the mean loss over the batch -> (loss tensor, micro-batch that fitted). Out of GPU memory: the batch is
    taken in halves, quarters, ... from here on; the gradient stays that of the whole batch (batch statistics are of the
    parts).
    """
    while True:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=images.device)
        try:
            for x, y in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
                with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                    logits = network(x)
                loss = loss_function(logits.float(), y) * (len(x) / len(images))
                scaler.scale(loss).backward()
                total += loss.detach()
            return total, micro_batch
        except torch.OutOfMemoryError:
            if micro_batch <= 4:
                raise
            micro_batch //= 2
            free_gpu()
            print(f"out of GPU memory: going on with {micro_batch} images at a time", flush=True)


def publish(classifier, args, run_dir):
    """The classifier where the other tasks look, its curves beside the reports, unless that costs something better."""
    if args.dry_run or args.limit:
        return print(f"{MODEL_PATH} left alone: this was a {'dry run' if args.dry_run else 'run with --limit'}")
    if MODEL_PATH.exists():
        mine = classifier["dataset"]["name"]
        try:
            there = load_checkpoint(MODEL_PATH, ("dataset",))["dataset"]
            trained_on = mine if there["phantom"] else there["name"]
        except (InputError, TypeError, KeyError):  # of another program, or damaged: not ours to replace
            trained_on = "something unknown"
        if trained_on != mine:
            return print(
                f"{MODEL_PATH} left alone: it was trained on {trained_on}, this run on {mine}; delete it to have it"
                f" replaced, or give {run_dir}/best.pt to the other scripts"
            )
    with atomic_file(REPORT_CURVES) as file:
        file.write((run_dir / "figures" / "curves.png").read_bytes())
    save_checkpoint(MODEL_PATH, classifier)
    print(f"classifier for the other tasks: {MODEL_PATH}")


def load_data(args, rank):
    """-> ImageSet, printed; InputError when its training or validation labels cannot be trained on."""
    size = args.image_size
    data = load_phantom(size, DRY_RUN) if args.dry_run else load_images(args.data, args.data_dir, size)
    if args.limit:
        data.limit(args.limit)
    if rank == 0:
        print(*[PHANTOM] * data.phantom, data, *(f"  {s}: {counts_of(data, s)}" for s in ("train", "val")), sep="\n")
    more = "; raise --limit" if args.limit else ""
    for split in ("train", "val"):
        if data.task == "binary-class" and len(data.labels[split].unique()) < 2:
            raise InputError(f"the {split} images of {data.name} are all of one class{more}")
    labels = data.labels["val"].numpy()
    guess = torch.full((len(labels), data.num_outputs), 0.5).squeeze(1).numpy()
    if official_auc_accuracy(labels, guess, data.task)["auc"] is None:
        raise InputError(
            f"a label of {data.name} has no positive, or no negative, validation image, so that there is no AUC to"
            f" choose by{more}"
        )
    return data


@script(torchrun=True)
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, dtype = pick_device(args.device, args.dtype)
    rank, world_size = start_distributed(device)
    if args.batch_size < 2 * world_size:
        raise InputError(f"--batch-size must be at least {2 * world_size}: each process needs two images")
    data = load_data(args, rank)
    seeds = args.seeds or [args.seed]
    run_dir = open_run_dir(args, TASK, "train")
    then = read_json(run_dir / "settings.json")
    if seeds != (then.get("seeds") or [then.get("seed")]):
        raise InputError(f"{run_dir} was started with other seeds; resume it with its own, or start a new run")
    classifiers, histories = [], {}
    with StopSignal() as stop:  # until all is written: a signal during the last epoch's validation costs nothing either
        for seed in seeds:
            place = run_dir if len(seeds) == 1 else run_dir / f"seed{seed}"
            found = train_one(args, data, seed, run_dir, place, device, dtype, rank, world_size, stop)
            classifiers.append(found[0])
            histories[seed] = found[1]
            free_gpu()
        if rank == 0:
            finish(args, data, classifiers, histories, run_dir, started, device)


def finish(args, data, classifiers, histories, run_dir, started, device):
    """metrics.json, curves, the published model, and the command that comes next."""
    seeds, best = list(histories), max(classifiers, key=lambda c: score(c["validation"]))
    rows = [{"seed": c["seed"]} | c["validation"] for c in classifiers]
    rows = [row | {k: c[k] for k in ("threshold", "temperature")} for row, c in zip(rows, classifiers, strict=True)]
    summary = {}
    for key in ("val_auc", "val_auc_shifted", "val_accuracy", "val_loss"):
        values = [row[key] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary |= {f"{key}_mean": statistics.mean(values), f"{key}_std": spread}
    write_json(
        run_dir / "metrics.json",
        {"dataset": data.facts(), "cases": best["cases"], "limit": args.limit, "finished": True, "split": "val"}
        | {"n": len(data.labels["val"]), "model": args.arch, "seeds": seeds, "best_seed": best["seed"], "runs": rows}
        | summary
        | {"settings": settings_of(args, aside=("seed", "seeds")), **run_facts(started, device)},
    )
    title = f"{data.name} {data.size} px, {args.arch}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    title += f", --limit {args.limit}" if args.limit else ""
    draw_history(run_dir / "figures" / "curves.png", histories, PANELS, "epoch", title, data.phantom)
    publish(best, args, run_dir)
    next_one = ["task1_classification/evaluate.py", "--checkpoint", run_dir]
    next_one += ["--dry-run"] if args.dry_run else ["--data-dir", args.data_dir] if data.path else []
    print(
        f"best epoch of seed {best['seed']}: {best['validation']['epoch']}, validation AUC"
        f" {best['validation']['val_auc']:.4f}; measure it on the test images with\n{command(*next_one)}\n"
        f"results in {run_dir} ({time.time() - started:.0f} s)"
    )


def counts_of(data, split):
    labels = data.labels[split] if data.multi_label else F.one_hot(data.labels[split], len(data.label_names))
    counts = zip(data.label_names, labels.sum(0).int().tolist(), strict=True)
    return f"{len(labels)} images; " + ", ".join(f"{name} {count}" for name, count in counts)


if __name__ == "__main__":
    main()
