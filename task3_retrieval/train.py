"""
Train the retrieval embedding: images of one class move together, starting from task 1's classifier.

Usage:
    python task3_retrieval/train.py  # supervised contrastive, from models/task1_model.pth
    python task3_retrieval/train.py --loss triplet
    python task3_retrieval/train.py --resume outputs/task3_retrieval/train/001
    python task3_retrieval/train.py --dry-run                          # phantom images, CPU, a few seconds
    torchrun --nproc-per-node 2 task3_retrieval/train.py

Every epoch is judged by what a user would do with it: validation images, and shifted copies of them, search the
training images. Epoch 0, the classifier as it came, takes part: if nothing beats it, it stays. The test split is never
read. Writes to the run folder: best.pt (the embedding: --cnn-weights of the other scripts), last.pt (to resume),
history.jsonl, metrics.json, figures/curves.png. Expected: see task3_retrieval/README.md.
"""

import copy
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

from shared.data.augment import STRENGTHS, augment, shifted_copies
from shared.data.image_sets import load_images, load_phantom
from task3_retrieval.metrics import class_means, content_codes, retrieval_values
from shared.runtime import InputError, add_resume, fraction, free_gpu, is_main_process, load_checkpoint, not_negative
from shared.runtime import open_run_dir, pick_device, positive_float, positive_int, run_facts, save_checkpoint, script
from shared.runtime import script_parser, seed_everything, start_distributed, write_json, write_jsonl
from shared.training import StopSignal, learning_rate, refuse_other_settings
from task1_classification.model import build_model, choose_stem, find_classifier, load_classifier, normalise
from task1_classification.model import predict_logits
from task3_retrieval.embed import EMBEDDING_KIND
from task3_retrieval.figures import draw_training

TASK = "task3_retrieval"
CHOSEN_BY = "val_map_shifted"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="PneumoniaMNIST")
    g = parser.add_argument_group("model")
    # fmt: off
    g.add_argument("--cnn-weights", metavar="FILE",
        help="task 1 classifier to start from (default: models/task1_model.pth, else ./task1_model.pth)")
    g.add_argument("--allow-other-dataset", action="store_true", help="start from a classifier of another data set")
    g.add_argument("--projection", type=int, nargs="*", default=[], metavar="WIDTH",
        help="widths of linear layers behind the 512 features, ReLU between them, kept for the search: 128, or 512 "
        "128 (default: none)")
    g = parser.add_argument_group("loss")
    g.add_argument("--loss", default="supcon", choices=["supcon", "triplet"],
        help="supervised contrastive, or batch-hard triplets (%(default)s)")
    g.add_argument("--temperature", type=positive_float, default=0.1,
        help="of supcon; lower looks harder at the nearest (%(default)s)")
    g.add_argument("--margin", type=positive_float, default=0.2,
        help="of triplet, in units of distance on the unit sphere (%(default)s)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=positive_int, default=3,
        help="passes over as many images as the training split has (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=64,
        help="images per step over all GPUs, each seen as two views (%(default)s)")
    g.add_argument("--lr", type=positive_float, default=0.005,
        help="highest learning rate of SGD with momentum 0.9 (%(default)s)")
    g.add_argument("--weight-decay", type=not_negative, default=5e-4, help="L2 penalty on all weights (%(default)s)")
    g.add_argument("--warmup-epochs", type=not_negative, default=0.5,
        help="epochs of rising learning rate before the cosine (%(default)s)")
    g.add_argument("--ema", type=fraction, default=0.99,
        help="decay per step of the averaged weights that are kept; 0 = off (%(default)s)")
    g.add_argument("--balance", default="anchors", choices=["anchors", "draws", "none"],
        help="anchors: batches with the classes as frequent as in the gallery, every class weighing the same in the "
        "loss; draws: every class drawn equally often; or none (%(default)s)")
    g.add_argument("--augment", default="full", choices=STRENGTHS, help="random changes of each view (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="computing precision; auto: 16 bit on CUDA only (%(default)s)")
    # fmt: on
    g = parser.add_argument_group("runs")
    add_resume(g)
    args = parser.parse_args(argv)
    if args.batch_size < 4:
        parser.error("--batch-size must be at least 4: the losses compare images with each other")
    if args.ema == 1:
        parser.error("--ema must be below 1")
    if any(width < 1 for width in args.projection):
        parser.error("--projection takes widths of at least 1")
    if args.dry_run:
        args.data, args.device, args.epochs, args.batch_size, args.allow_other_dataset = (
            "phantom",
            "cpu",
            min(args.epochs, 2),
            min(args.batch_size, 16),
            True,
        )
    return args


# -------------------------------------------------------------------------------------------------------------- losses


def supervised_contrastive(vectors, labels, temperature=0.1, class_weights=None):
    """
    vectors (N, D) of unit length, labels (N,) -> mean loss (Khosla et al. 2020, arXiv:2004.11362, the variant L_out):
    every other image of the class should hold a large share of the softmax over all other images. Images without a
    partner are left out; 0 when none has one. class_weights (number of classes,): what an image of each class counts in
    the mean.
    """
    logits = vectors @ vectors.T / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    log_share = F.log_softmax(logits.masked_fill(itself, -torch.inf), dim=1)
    partners = (labels[:, None] == labels) & ~itself
    counts = partners.sum(1)
    loss = -log_share.masked_fill(~partners, 0).sum(1) / counts.clamp(min=1)
    return weighted_mean(loss[counts > 0], labels[counts > 0], class_weights)


def batch_hard_triplet(vectors, labels, margin=0.2, class_weights=None):
    """
    vectors (N, D) of unit length, labels (N,) -> mean over images of max(0, distance to the furthest image of the class
    - distance to the nearest of another + margin) (Hermans et al. 2017, arXiv:1703.07737). Images without both are left
      out.
    """
    distance = (2 - 2 * vectors @ vectors.T).clamp(min=1e-8).sqrt()  # the floor keeps the gradient of the root finite
    same = labels[:, None] == labels
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    furthest = distance.masked_fill(~same | itself, -torch.inf).amax(1)
    nearest = distance.masked_fill(same, torch.inf).amin(1)
    usable = furthest.isfinite() & nearest.isfinite()
    return weighted_mean(F.relu(furthest[usable] - nearest[usable] + margin), labels[usable], class_weights)


def weighted_mean(losses, labels, class_weights):
    """losses (n,) of images of these labels (n,) -> mean; 0 for no images."""
    weights = torch.ones_like(losses) if class_weights is None else class_weights[labels].to(losses.dtype)
    return (weights * losses).sum() / weights.sum().clamp(min=1e-8)


class Embedding(nn.Module):
    """Task 1's ResNet without its last layer, and the projection -> (N, D) of unit length."""

    def __init__(self, classifier, widths):
        super().__init__()
        features = classifier.fc.in_features
        self.model = classifier
        self.model.fc = nn.Identity()
        layers = []
        for width in widths:
            layers += [nn.ReLU()] * bool(layers) + [nn.Linear(features, width)]
            features = width
        self.head = nn.Sequential(*layers)

    def forward(self, images):
        return F.normalize(self.head(self.model(images)).float(), dim=1)


# ------------------------------------------------------------------------------------------------------------ judgement


def embed(network, images, normalisation, device, dtype, batch_size=256):
    """images uint8 or float 0..1 (N, C, H, W) -> float32 (N, D) of unit length, on the CPU."""
    return predict_logits(network, images, normalisation, device, dtype, batch_size).numpy()


def judge(network, data, copies, copied, normalisation, device, dtype):
    """
    Validation images and their shifted copies search the training images (cosine; `copied` (val, train): byte-identical
    pairs, which are not allowed to find each other) -> macro numbers of the plain images, and their means over all
    copies.
    """
    gallery = embed(network, data.images["train"], normalisation, device, dtype)
    labels, gallery_labels = data.labels["val"].numpy(), data.labels["train"].numpy()
    num_classes = len(data.label_names)
    rows = []
    for images in copies.values():
        similarity = embed(network, images, normalisation, device, dtype) @ gallery.T
        values = retrieval_values(similarity, labels, gallery_labels, num_classes, copied)
        means = class_means(np.stack(list(values.values()), axis=1), labels, num_classes)[0, 1]
        rows.append(dict(zip(values, means.tolist(), strict=True)))
    names = {"P@1": "p1", "P@5": "p5", "AP": "map", "vote": "vote"}
    plain = {f"val_{short}": rows[0][name] for name, short in names.items()}
    return plain | {f"val_{short}_shifted": float(np.mean([r[name] for r in rows])) for name, short in names.items()}


def epoch_order(labels, balanced, seed):
    """
    Which training images an epoch shows, in which order: a permutation, or (balanced) draws that favour rare classes.
    """
    generator = torch.Generator().manual_seed(seed)
    if not balanced:
        return torch.randperm(len(labels), generator=generator)
    weights = 1 / torch.bincount(labels).float()
    return torch.multinomial(weights[labels], len(labels), replacement=True, generator=generator)


# ------------------------------------------------------------------------------------------------------------- training


def train(args, data, classifier, facts, weights, run_dir, device, dtype, rank, world_size):
    """The loop; returns (embedding checkpoint, history)."""
    seed_everything(args.seed)

    def say(*message):
        if rank == 0:
            print(*message, flush=True)

    images, labels, normalisation = data.images["train"], data.labels["train"], facts["normalisation"]
    copies = shifted_copies(data.images["val"])
    val_codes, train_codes = content_codes(data.images["val"].numpy(), images.numpy())
    copied = val_codes[:, None] == train_codes
    if device.type == "cuda" and images.numel() < 2 * 2**30:
        images = images.to(device)

    network = Embedding(classifier, args.projection).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(network)  # EMA of the weights: what is judged and kept
    averaged, current = ([v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, network))
    averaged_running, running = ([v for v in m.buffers() if v.is_floating_point()] for m in (average, network))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator(device)
    # A class that fills the gallery is often near by its number alone. Batches with the gallery's own shares let the
    # loss see that, and the weights keep it from giving up the rare class, which asks less often.
    class_weights = 1 / torch.bincount(labels).clamp(min=1).float().to(device) if args.balance == "anchors" else None

    batch_size = min(args.batch_size, len(images) // world_size * world_size)
    steps = len(images) // batch_size
    num_steps, warmup_steps = args.epochs * steps, round(args.warmup_epochs * steps)
    width = args.projection[-1] if args.projection else facts["features"]
    say(
        f"{args.loss} on {width} numbers per image; {args.epochs} epochs of {steps} steps of {batch_size} images, two"
        " views each"
    )

    first_epoch, first_step, totals, history, best = 0, 0, {"loss": 0.0, "steps": 0, "skipped": 0}, [], None
    last_path = run_dir / "last.pt"
    if args.resume and last_path.exists():
        state = load_checkpoint(last_path, ("settings", "network", "optimizer", "epoch"), what="training state")
        refuse_other_run(state, args, data, facts, last_path)
        for part, name in ((network, "network"), (average, "average"), (optimizer, "optimizer"), (scaler, "scaler")):
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
    trained = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network

    def keep_if_best(row):
        nonlocal best
        if best is None or (row[CHOSEN_BY], row["val_p5_shifted"]) > (
            best["row"][CHOSEN_BY],
            best["row"]["val_p5_shifted"],
        ):
            best = {"row": row, "model": plain_state(average.model), "head": plain_state(average.head)}
        say(
            f"epoch {row['epoch']:3d}/{args.epochs}  loss {row['train_loss'] or math.nan:.4f}  validation macro mAP"
            f" {row['val_map']:.4f} P@5 {row['val_p5']:.4f}  shifted mAP {row['val_map_shifted']:.4f} P@5"
            f" {row['val_p5_shifted']:.4f}  {row['seconds']:.1f} s{'  *' if best['row'] is row else ''}"
        )

    def save(epoch, step):
        """All it takes to go on exactly here."""
        if rank == 0:
            save_checkpoint(
                last_path,
                {
                    "network": network.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "epoch": epoch,
                    "step": step,
                    "totals": totals,
                    "history": history,
                    "best": best,
                    "settings": settings_of(args),
                    "sha256": data.sha256,
                    "start": facts["start"],
                },
            )

    with StopSignal() as stop:
        if not history:  # the classifier as it came; a random projection has no say before it is trained
            started = time.time()
            row = {
                "epoch": 0,
                "lr": None,
                "train_loss": None,
                **judge(average, data, copies, copied, normalisation, device, dtype),
                "skipped_steps": 0,
            }
            history.append(row | {"seconds": time.time() - started})
            if not args.projection:
                keep_if_best(history[-1])
        for epoch in range(first_epoch, args.epochs):
            # Every random choice depends on seed, epoch and step alone, so that a resumed run repeats the uninterrupted
            # one
            order = epoch_order(labels, args.balance == "draws", args.seed * 10_000 + epoch)
            started = time.time()
            network.train()
            for step in tqdm(
                range(first_step, steps),
                initial=first_step,
                total=steps,
                desc=f"epoch {epoch + 1}",
                leave=False,
                disable=None if rank == 0 else True,
            ):
                now = epoch * steps + step
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(now, num_steps, warmup_steps, args.lr)
                generator.manual_seed(args.seed * 10_000_000 + now)
                index = order[step * batch_size : (step + 1) * batch_size]
                batch = images[index.to(images.device)].to(device).float() / 255
                views = torch.stack(
                    [augment(batch, generator, args.augment) for _ in range(2)], dim=1
                )  # (n, 2, C, H, W)
                views = normalise(views[rank::world_size].flatten(0, 1), normalisation).contiguous(
                    memory_format=torch.channels_last
                )
                targets = labels[index].to(device)
                targets = torch.cat([targets[r::world_size] for r in range(world_size)]).repeat_interleave(
                    2
                )  # of all ranks, one after the other

                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    vectors = trained(views)
                if (
                    world_size > 1
                ):  # every rank compares the images of all; gradients flow back to the rank they came from
                    vectors = torch.cat(all_gather(vectors))
                if args.loss == "supcon":
                    loss = supervised_contrastive(vectors, targets, args.temperature, class_weights)
                else:
                    loss = batch_hard_triplet(vectors, targets, args.margin, class_weights)
                scaler.scale(loss).backward()
                if math.isfinite(value := loss.item()):
                    scaler.step(optimizer)
                    scaler.update()
                    decay = min(args.ema, (1 + now) / (10 + now))
                    torch._foreach_lerp_(averaged, current, 1 - decay)
                    totals["loss"] += value
                    totals["steps"] += 1
                else:
                    totals["skipped"] += 1
                    torch._foreach_copy_(
                        running, averaged_running
                    )  # the running statistics have seen the same infinities
                    if totals["skipped"] > 20 or totals["skipped"] == steps:
                        raise InputError(
                            f"the loss is not finite in epoch {epoch + 1} ({totals['skipped']} steps skipped); lower"
                            f" --lr. {run_dir} keeps the epochs before"
                        )
                if stop.requested():
                    save(epoch, step + 1)
                    say(f"stopped in epoch {epoch + 1}; go on with --resume {run_dir}")
                    stop.exit()

            numbers = judge(average, data, copies, copied, normalisation, device, dtype)
            history.append(
                {
                    "epoch": epoch + 1,
                    "lr": optimizer.param_groups[0]["lr"],
                    "train_loss": totals["loss"] / max(1, totals["steps"]),
                    **numbers,
                    "skipped_steps": totals["skipped"],
                    "seconds": time.time() - started,
                }
            )
            keep_if_best(history[-1])
            first_step, totals = 0, {"loss": 0.0, "steps": 0, "skipped": 0}
            save(epoch + 1, 0)
            if rank == 0:
                write_jsonl(run_dir / "history.jsonl", history)

    embedding = {
        "kind": EMBEDDING_KIND,
        "model": best["model"],
        "head": best["head"],
        "validation": best["row"],
        "loss": args.loss,
        "seed": args.seed,
        "started_from": weights,
        "settings": (
            {
                k: facts[k]
                for k in ("architecture", "stem", "channels", "image_size", "normalisation", "label_names", "task")
            }
            | {"dataset": data.facts()}
        ),
    }
    if rank == 0:
        save_checkpoint(run_dir / "best.pt", embedding)
    return embedding, history


def plain_state(module):
    return {k: v.clone().cpu() for k, v in module.state_dict().items()}


def settings_of(args):
    """The arguments that shape the result; a resumed run must agree with the first in all of them but epochs."""
    return {
        k: v
        for k, v in vars(args).items()
        if k not in ("data_dir", "out_dir", "resume", "overwrite", "config", "device", "cnn_weights")
    }


def refuse_other_run(state, args, data, facts, path):
    then = state["settings"]
    refuse_other_settings(settings_of(args), then, path, may_differ=("epochs",))
    if state["sha256"] != data.sha256:
        raise InputError(f"{path} was trained on other data than {data.source}; give the same file, or start a new run")
    if state["start"] != facts["start"]:
        raise InputError(f"{path} started from another classifier; give the same --cnn-weights, or start a new run")
    if args.epochs < state["epoch"]:
        raise InputError(f"{path} already has {state['epoch']} epochs; --epochs {args.epochs} is less")
    if args.epochs != then["epochs"]:
        print(f"--epochs {then['epochs']} -> {args.epochs}: the learning rate follows the new length from here on")


def starting_point(args, device):
    """--cnn-weights -> (classifier, its facts, path). A dry run without weights starts from a random network."""
    path = Path(args.cnn_weights) if args.cnn_weights else None if args.dry_run else find_classifier()
    if path is None and args.dry_run:
        classifier = build_model()
        facts = {
            "architecture": "resnet18",
            "stem": choose_stem("auto", 28),
            "channels": 1,
            "image_size": 28,
            "normalisation": {"mean": [0.5], "std": [0.25]},
            "dataset": {"name": "phantom"},
        }
    elif path is None:
        raise InputError(
            "there are no task 1 weights at models/task1_model.pth or ./task1_model.pth; train them with python"
            " task1_classification/train.py, or give --cnn-weights"
        )
    else:
        path = path / "best.pt" if path.is_dir() else path
        classifier, facts = load_classifier(path)
    facts["features"] = classifier.fc.in_features
    facts["start"] = float(
        sum(p.detach().double().sum() for p in classifier.parameters())
    )  # enough to notice another classifier on --resume
    if is_main_process():
        print(
            f"starting from {path or 'a random network'}: {facts['architecture']}, {facts['image_size']} px, trained on"
            f" {facts['dataset']['name'] if path else 'nothing'}"
        )
    return classifier, facts, path and str(path)


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, dtype = pick_device(args.device, args.dtype)
    rank, world_size = start_distributed(device)
    if args.batch_size < 2 * world_size or args.batch_size % world_size:
        raise InputError(
            f"--batch-size {args.batch_size} must be a multiple of the {world_size} processes, with two images or more"
            " for each"
        )
    classifier, facts, weights = starting_point(args, device)
    trained_on = facts["dataset"]["name"]
    name = trained_on if args.data.lower() == "auto" else args.data
    data = (
        load_phantom(28, {"train": 96, "val": 32, "test": 32})
        if args.dry_run
        else load_images(name, args.data_dir, facts["image_size"])
    )
    if data.name != trained_on and not args.allow_other_dataset:
        raise InputError(
            f"{weights} was trained on {trained_on}, not on {data.name}; give --cnn-weights trained on it, or"
            " --allow-other-dataset to start from them all the same"
        )
    if data.multi_label:
        raise InputError(
            f"{data.name} has several labels per image; similar cases are learned from one label per image"
        )
    if data.channels != facts["channels"]:
        raise InputError(
            f"{weights} reads images of {facts['channels']} channels, {data.name} has {data.channels}; give"
            " --cnn-weights that fit"
        )
    facts["label_names"], facts["task"] = data.label_names, data.task
    if args.limit:
        data.limit(args.limit)
    for split in ("train", "val"):
        if len(data.labels[split].unique()) < 2:
            raise InputError(
                f"the {split} images of {data.name} are all of one class{'; raise --limit' if args.limit else ''}"
            )
    if rank == 0:
        print(data)

    run_dir = open_run_dir(args, TASK, "train")
    embedding, history = train(args, data, classifier, facts, weights, run_dir, device, dtype, rank, world_size)
    free_gpu()
    if rank > 0:
        return
    best = embedding["validation"]
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": data.facts(),
            "split": "val",
            "n": len(data.labels["val"]),
            "gallery": "train",
            "n_gallery": len(data.labels["train"]),
            "model": facts["architecture"],
            "started_from": weights,
            "loss": args.loss,
            "seed": args.seed,
            "chosen_by": CHOSEN_BY,
            "best": best,
            "before_training": history[0],
            "settings": settings_of(args),
            **run_facts(started, device),
        },
    )
    draw_training(
        run_dir / "figures" / "curves.png",
        history,
        f"{'PHANTOM images, ' if data.phantom else ''}{data.name} {data.size} px, {args.loss}, seed {args.seed}:"
        " validation searches training",
    )
    if best["epoch"] == 0:
        print("no epoch was better than the classifier as it came: best.pt holds its features unchanged")
    print(
        f"best epoch {best['epoch']}: macro mAP over validation and its shifted copies {best[CHOSEN_BY]:.4f} (before"
        f" training {history[0][CHOSEN_BY]:.4f}); measure it with python task3_retrieval/evaluate.py\nresults in"
        f" {run_dir} ({time.time() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
