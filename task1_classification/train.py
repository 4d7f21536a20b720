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
Writes to the run folder: best.pt (the classifier), last.pt (to resume), history.jsonl, metrics.json, figures/curves.png
(with several --seeds in seed0/, seed1/, ...), and besides models/task1_model.pth and reports/figures/task1_curves.png.
Never reads the test split: evaluate.py does.
"""

import copy
import functools
import math
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
from shared.runtime import InputError, add_resume, atomic_file, fraction, free_gpu, load_checkpoint, not_negative
from shared.runtime import open_run_dir, pick_device, positive_float, positive_int, run_facts, save_checkpoint, script
from shared.runtime import script_parser, seed_everything, start_distributed, write_json, write_jsonl
from shared.training import StopSignal, learning_rate, refuse_other_settings
from task1_classification.figures import draw_training
from task1_classification.model import ARCHITECTURES, STEMS, build_model, choose_stem, classifier_checkpoint, normalise
from task1_classification.model import predict_logits, to_probabilities

TASK = "task1_classification"
MODEL_PATH = Path("models/task1_model.pth")  # where tasks 2 and 3 look
REPORT_CURVES = Path("reports/figures/task1_curves.png")


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="PneumoniaMNIST")
    g = parser.add_argument_group("images")
    g.add_argument("--image-size", type=int, default=28, choices=SIZES, help="pixels per side (%(default)s)")
    # fmt: off
    g.add_argument("--augment", default="full", choices=STRENGTHS,
        help="random changes of the training images (%(default)s)")
    g = parser.add_argument_group("model")
    g.add_argument("--arch", default="resnet18", choices=ARCHITECTURES, help="network (%(default)s)")
    g.add_argument("--stem", default="auto", choices=STEMS,
        help="first layer; auto: 3x3-stride2 up to 64 pixels, else 7x7 (%(default)s)")
    g.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights (a download)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=64,
        help="images per step over all GPUs; at least 2 (%(default)s)")
    g.add_argument("--lr", type=positive_float, default=0.05,
        help="highest learning rate of SGD with momentum 0.9 (%(default)s)")
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
    g.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="train once per seed, in place of --seed")
    add_resume(g)
    args = parser.parse_args(argv)
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2: batch normalisation needs two images")
    if args.ema == 1 or args.label_smoothing == 1:
        parser.error("--ema and --label-smoothing must be below 1")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds names a seed twice")
    if args.dry_run:
        args.data, args.device, args.epochs, args.batch_size = (
            "phantom",
            "cpu",
            min(args.epochs, 2),
            min(args.batch_size, 16),
        )
    return args


def loss_of(logits, labels, task, class_weights, smoothing):
    """
    logits (N, outputs), labels (N,) or (N, L) -> mean loss. class_weights: None, or one weight per class or label.
    """
    if task in ("multi-class", "ordinal-regression"):
        return F.cross_entropy(logits, labels, weight=class_weights, label_smoothing=smoothing)
    targets = labels.float().view(len(labels), -1)  # (N, 1) for a binary set
    weights = None
    if class_weights is not None:
        weights = (
            class_weights[labels][:, None] if task == "binary-class" else torch.where(targets == 1, class_weights, 1.0)
        )
    return F.binary_cross_entropy_with_logits(logits, targets * (1 - smoothing) + smoothing / 2, weight=weights)


def weights_of_classes(labels, num_classes, task):
    """
    Weights inversely proportional to the class counts, mean 1; for a multi-label set negatives per positive, at most
    20.
    """
    if task.startswith("multi-label"):
        positives = labels.sum(0).clamp(min=1)
        return ((len(labels) - positives) / positives).clamp(max=20)
    counts = torch.bincount(labels, minlength=num_classes).float().clamp(min=1)
    return len(labels) / (num_classes * counts)


def pixel_statistics(images, most=20_000):
    """
    Mean and standard deviation per channel, pixels as 0..1, over at most `most` images: uint8 (N, C, H, W) -> dict of
    lists.
    """
    pixels = images[:most].transpose(0, 1).flatten(1).float() / 255  # (C, N * H * W)
    return {"mean": pixels.mean(1).tolist(), "std": pixels.std(1).tolist()}


def validate(model, data, copies, normalisation, device, dtype):
    """
    -> (numbers: loss, AUC and accuracy on the validation images and the mean AUC over them and their shifted copies,
    logits of the plain images, logits of all copies one after the other).
    """
    labels, task = data.labels["val"], data.task
    logits = [
        predict_logits(model, images, normalisation, device, dtype) for images in copies.values()
    ]  # plain images first
    scores = [official_auc_accuracy(labels.numpy(), to_probabilities(z, task).numpy(), task) for z in logits]
    if None in (s["auc"] for s in scores):
        raise InputError(
            f"a label of {data.name} has no positive, or no negative, validation image, so that there is no AUC to"
            " choose by; raise --limit"
        )
    numbers = {
        "val_loss": float(loss_of(logits[0], labels, task, None, 0.0)),
        "val_auc": scores[0]["auc"],
        "val_accuracy": scores[0]["accuracy"],
        "val_auc_shifted": statistics.mean(s["auc"] for s in scores),
    }
    return numbers, logits[0], torch.cat(logits)


def train_one(args, data, seed, run_dir, device, dtype, rank, world_size):
    """Train one network into run_dir; returns its classifier checkpoint."""
    seed_everything(seed)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *a: None
    images, labels = data.images["train"], data.labels["train"]
    normalisation = pixel_statistics(images)
    copies = shifted_copies(data.images["val"])
    if (
        device.type == "cuda" and images.numel() < 2 * 2**30
    ):  # small sets live on the GPU, larger ones go over batch by batch
        images, labels = images.to(device), labels.to(device)

    model = build_model(args.arch, data.num_outputs, data.channels, data.size, args.stem, args.pretrained)
    model = model.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(
        model
    )  # EMA of the weights: steadier than any single step; this is what is validated and kept
    averaged, current = ([v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, model))
    averaged_running, running = ([v for v in m.buffers() if v.is_floating_point()] for m in (average, model))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator(device)
    class_weights = (
        weights_of_classes(labels, max(2, data.num_outputs), data.task).to(device) if args.class_weights else None
    )

    batch_size = min(args.batch_size, len(images))
    steps = len(images) // batch_size  # per epoch; the few images left over by an epoch's order are left out of it
    num_steps, warmup_steps = args.epochs * steps, round(args.warmup_epochs * steps)
    say(
        f"seed {seed}: {args.arch}, {sum(p.numel() for p in model.parameters()):,} parameters, stem"
        f" {choose_stem(args.stem, data.size)}; {args.epochs} epochs of {steps} steps of {batch_size} images"
    )

    first_epoch, first_step, totals, history, best = 0, 0, {"loss": 0.0, "steps": 0, "skipped": 0}, [], None
    last_path = run_dir / "last.pt"
    if args.resume and last_path.exists():
        state = load_checkpoint(last_path, ("settings", "model", "optimizer", "epoch"), what="training state")
        refuse_other_run(state, args, data, seed, last_path)
        for part, name in ((model, "model"), (average, "average"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(state[name])
        first_epoch, first_step, totals, history, best = (
            state[k] for k in ("epoch", "step", "totals", "history", "best")
        )
        say(
            f"resumed from {last_path}: epoch {first_epoch + 1}, step {first_step} of {steps}"
            if first_epoch < args.epochs
            else f"{last_path} has all its epochs"
        )
        del state
    elif args.resume:
        say(f"no epoch was finished in {run_dir}: starting from the beginning")
    network = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    def save(epoch, step):
        """
        All it takes to go on exactly here. best.pt and history.jsonl are written from the same state, and after it.
        """
        if rank > 0:
            return
        save_checkpoint(
            last_path,
            {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch": epoch,
                "step": step,
                "totals": totals,
                "history": history,
                "best": best,
                "seed": seed,
                "settings": settings_of(args),
                "sha256": data.sha256,
            },
        )

    micro_batch = batch_size
    with StopSignal() as stop:
        for epoch in range(first_epoch, args.epochs):
            # Every random choice depends on seed, epoch and step alone, so that a resumed run repeats the uninterrupted
            # one
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 10_000 + epoch)).to(
                images.device
            )
            started = time.time()
            model.train()
            bar = tqdm(
                range(first_step, steps),
                initial=first_step,
                total=steps,
                desc=f"epoch {epoch + 1}",
                leave=False,
                disable=None if rank == 0 else True,
            )
            for step in bar:
                now = epoch * steps + step
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(now, num_steps, warmup_steps, args.lr)
                generator.manual_seed(seed * 10_000_000 + now)
                index = order[step * batch_size : (step + 1) * batch_size]
                batch = augment(images[index].to(device).float() / 255, generator, args.augment)
                batch = normalise(batch, normalisation)[rank::world_size].contiguous(memory_format=torch.channels_last)
                target = labels[index][rank::world_size].to(device)

                loss, micro_batch = backward(
                    network,
                    batch,
                    target,
                    micro_batch,
                    optimizer,
                    scaler,
                    dtype,
                    functools.partial(
                        loss_of, task=data.task, class_weights=class_weights, smoothing=args.label_smoothing
                    ),
                )
                if world_size > 1:
                    dist.all_reduce(loss)  # so that all ranks report, and skip, alike
                    loss /= world_size
                if math.isfinite(loss := loss.item()):
                    scaler.step(optimizer)
                    scaler.update()
                    decay = min(
                        args.ema, (1 + now) / (10 + now)
                    )  # a short memory at first, while the weights move fast
                    torch._foreach_lerp_(averaged, current, 1 - decay)
                    totals["loss"] += loss
                    totals["steps"] += 1
                else:
                    totals["skipped"] += 1
                    torch._foreach_copy_(
                        running, averaged_running
                    )  # the running statistics have seen the same infinities
                    if totals["skipped"] > 20 or totals["skipped"] == steps:
                        raise InputError(
                            f"the loss is not finite in epoch {epoch + 1} ({totals['skipped']} steps skipped); lower"
                            f" --lr. {last_path.parent} keeps the epochs before"
                        )
                if stop.requested():
                    save(epoch, step + 1)
                    say(f"stopped in epoch {epoch + 1}; go on with --resume {run_dir}")
                    stop.exit()

            numbers, plain_logits, all_logits = validate(average, data, copies, normalisation, device, dtype)
            seconds = time.time() - started
            row = {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": totals["loss"] / max(1, totals["steps"]),
                **numbers,
                "skipped_steps": totals["skipped"],
                "seconds": seconds,
                "images_per_second": (steps - first_step) * batch_size / seconds,
            }
            history.append(row)
            if best is None or (row["val_auc_shifted"], -row["val_loss"]) > (
                best["row"]["val_auc_shifted"],
                -best["row"]["val_loss"],
            ):
                best = {
                    "row": row,
                    "state_dict": {k: v.clone().cpu() for k, v in average.state_dict().items()},
                    "val_logits": plain_logits,
                    "all_logits": all_logits,
                }
            say(
                f"epoch {epoch + 1:3d}/{args.epochs}  loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  AUC"
                f" {row['val_auc']:.4f}  shifted {row['val_auc_shifted']:.4f}  accuracy {row['val_accuracy']:.4f} "
                f" {seconds:.1f} s{'  *' if best['row'] is row else ''}"
            )
            first_step, totals = 0, {"loss": 0.0, "steps": 0, "skipped": 0}
            save(epoch + 1, 0)
            if rank == 0:
                write_jsonl(run_dir / "history.jsonl", history)

    classifier = classifier_checkpoint(best, args, data, normalisation, seed)
    if rank == 0:
        save_checkpoint(run_dir / "best.pt", classifier)
    return classifier, history


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


def settings_of(args):
    """The arguments that shape the result; a resumed run must agree with the first in all of them but epochs."""
    return {
        k: v
        for k, v in vars(args).items()
        if k not in ("data_dir", "out_dir", "resume", "overwrite", "config", "device", "seed", "seeds")
    }


def refuse_other_run(state, args, data, seed, path):
    then = state["settings"]
    refuse_other_settings(
        settings_of(args) | {"seed": seed}, then | {"seed": state["seed"]}, path, may_differ=("epochs",)
    )
    if state["sha256"] != data.sha256:
        raise InputError(f"{path} was trained on other data than {data.source}; give the same file, or start a new run")
    if args.epochs < state["epoch"]:
        raise InputError(f"{path} already has {state['epoch']} epochs; --epochs {args.epochs} is less")
    if args.epochs != then["epochs"]:
        print(f"--epochs {then['epochs']} -> {args.epochs}: the learning rate follows the new length from here on")


def publish(classifier, args, run_dir):
    """
    Put the classifier where the other tasks look, unless that would cost something better, and the curves beside the
    reports.
    """
    if args.dry_run or args.limit:
        return print(f"{MODEL_PATH} left alone: this was a {'dry run' if args.dry_run else 'run with --limit'}")
    with atomic_file(REPORT_CURVES) as file:
        file.write((run_dir / "figures" / "curves.png").read_bytes())
    if MODEL_PATH.exists():
        there, mine = load_checkpoint(MODEL_PATH, ("dataset",), what="classifier")["dataset"], classifier["dataset"]
        if not there["phantom"] and there["name"] != mine["name"]:
            return print(
                f"{MODEL_PATH} left alone: it was trained on {there['name']}, this run on {mine['name']}; delete it to"
                f" have it replaced, or give {run_dir}/best.pt to the other scripts"
            )
    save_checkpoint(MODEL_PATH, classifier)
    print(f"classifier for the other tasks: {MODEL_PATH}")


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, dtype = pick_device(args.device, args.dtype)
    rank, world_size = start_distributed(device)
    if args.batch_size < 2 * world_size:
        raise InputError(
            f"--batch-size {args.batch_size} is too small for {world_size} processes; each needs two images"
        )
    data = (
        load_phantom(args.image_size, {"train": 96, "val": 32, "test": 32})
        if args.dry_run
        else load_images(args.data, args.data_dir, args.image_size)
    )
    if args.limit:
        data.limit(args.limit)
    if rank == 0:
        print(data, *(f"  {split}: {counts_of(data, split)}" for split in ("train", "val")), sep="\n")
    for split in ("train", "val"):
        if data.task == "binary-class" and len(data.labels[split].unique()) < 2:
            raise InputError(
                f"the {split} images of {data.name} are all of one class{'; raise --limit' if args.limit else ''}"
            )

    seeds = args.seeds or [args.seed]
    run_dir = open_run_dir(args, TASK, "train")
    classifiers, histories = [], {}
    for seed in seeds:
        classifier, histories[seed] = train_one(
            args, data, seed, run_dir if len(seeds) == 1 else run_dir / f"seed{seed}", device, dtype, rank, world_size
        )
        classifiers.append(classifier)
        free_gpu()
    if rank > 0:
        return

    rows = [
        {"seed": c["seed"], **c["validation"], "threshold": c["threshold"], "temperature": c["temperature"]}
        for c in classifiers
    ]
    best = max(classifiers, key=lambda c: (c["validation"]["val_auc_shifted"], -c["validation"]["val_loss"]))
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": data.facts(),
            "split": "val",
            "n": len(data.labels["val"]),
            "model": args.arch,
            "seeds": seeds,
            "best_seed": best["seed"],
            "runs": rows,
            **{
                f"{key}_{name}": f([r[key] for r in rows])
                for key in ("val_auc", "val_auc_shifted", "val_accuracy", "val_loss")
                for name, f in (("mean", statistics.mean), ("std", spread))
            },
            "settings": settings_of(args),
            **run_facts(started, device),
        },
    )
    title = (
        f"{'PHANTOM images, ' if data.phantom else ''}{data.name} {data.size} px, {args.arch}, {len(seeds)}"
        f" seed{'s' if len(seeds) > 1 else ''}"
    )
    draw_training(run_dir / "figures" / "curves.png", histories, title)
    publish(best, args, run_dir)
    print(
        f"best epoch of seed {best['seed']}: {best['validation']['epoch']}, validation AUC"
        f" {best['validation']['val_auc']:.4f}; measure it on the test images with python"
        f" task1_classification/evaluate.py\nresults in {run_dir} ({time.time() - started:.0f} s)"
    )


def spread(values):
    """Standard deviation over seeds; None for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def counts_of(data, split):
    labels = data.labels[split]
    counts = (
        labels.sum(0).int().tolist()
        if data.multi_label
        else torch.bincount(labels, minlength=len(data.label_names)).tolist()
    )
    return f"{len(labels)} images; " + ", ".join(
        f"{name} {count}" for name, count in zip(data.label_names, counts, strict=True)
    )


if __name__ == "__main__":
    main()
