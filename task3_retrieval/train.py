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

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from shared.data.augment import augment, shifted_copies
from shared.data.image_sets import load_images, load_phantom
from shared.report import draw_history, number
from shared.runtime import InputError, add_resume, command, digest, free_gpu, is_main_process, open_run_dir
from shared.runtime import pick_device, positive_float, positive_int, run_facts, save_checkpoint, script, script_parser
from shared.runtime import seed_everything, start_distributed, write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, learning_rate, load_state, moving_average, save_state, settings_of
from task1_classification.model import build_model, choose_stem, find_classifier, load_classifier, normalise
from task1_classification.model import predict_logits
from task3_retrieval.embed import EMBEDDING_KIND, EMBEDDING_SETTINGS, Embedding
from task3_retrieval.metrics import class_means, content_codes, retrieval_values

TASK = "task3_retrieval"
CHOSEN_BY = "val_map_shifted"
TEMPERATURE = 0.1  # of supcon; lower looks harder at the nearest
MARGIN = 0.2  # of triplet, in units of distance on the unit sphere
WEIGHT_DECAY, WARMUP_EPOCHS = 5e-4, 0.5
EMA = 0.99  # decay per step of the averaged weights, which are judged and kept


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="PneumoniaMNIST")
    g = parser.add_argument_group("model")
    # fmt: off
    g.add_argument("--cnn-weights", metavar="FILE",
        help="task 1 classifier to start from (default: models/task1_model.pth, else ./task1_model.pth)")
    g.add_argument("--allow-other-dataset", action="store_true", help="start from a classifier of another data set")
    g.add_argument("--projection", type=positive_int, nargs="*", default=[], metavar="WIDTH",
        help="widths of linear layers behind the 512 features, ReLU between them, kept for the search: 128, or 512 "
        "128 (default: none)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--loss", default="supcon", choices=["supcon", "triplet"],
        help="supervised contrastive, or batch-hard triplets (%(default)s)")
    g.add_argument("--balance", default="anchors", choices=["anchors", "draws"],
        help="anchors: batches with the classes as frequent as in the gallery, every class weighing the same in the "
        "loss; draws: every class drawn equally often (%(default)s)")
    g.add_argument("--epochs", type=positive_int, default=3,
        help="passes over as many images as the training split has (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=64,
        help="images per step over all GPUs, each seen as two views (%(default)s)")
    g.add_argument("--lr", type=positive_float, default=0.005,
        help="highest learning rate of SGD with momentum 0.9 (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="computing precision; auto: 16 bit on CUDA only (%(default)s)")
    # fmt: on
    g = parser.add_argument_group("runs")
    add_resume(g)
    args = parser.parse_args(argv)
    if args.batch_size < 4:
        parser.error("--batch-size must be at least 4: the losses compare images with each other")
    if any(width > 8192 for width in args.projection):
        parser.error("--projection takes widths of at most 8192")
    if args.dry_run:
        args.data, args.device, args.allow_other_dataset = "phantom", "cpu", True
        args.epochs, args.batch_size = min(args.epochs, 2), min(args.batch_size, 16)
    return args


# -------------------------------------------------------------------------------------------------------------- losses


def supervised_contrastive(vectors, labels, temperature=TEMPERATURE, class_weights=None):
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


def batch_hard_triplet(vectors, labels, margin=MARGIN, class_weights=None):
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


# ------------------------------------------------------------------------------------------------------------ judgement


def embed(network, images, normalisation, device, dtype):
    """images uint8 or float 0..1 (N, C, H, W) -> float32 (N, D) of unit length, on the CPU. InputError for NaN."""
    return F.normalize(predict_logits(network, images, normalisation, device, dtype), dim=1).numpy()


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


def train(args, data, classifier, facts, run_dir, device, dtype, rank, world_size):
    """
    The loop -> (the best epoch: {"row", "model", "head"}, all rows). It is long because a training loop is easiest to
    read in one piece.
    """
    seed_everything(args.seed)
    images, labels, normalisation = data.images["train"], data.labels["train"], facts["normalisation"]
    copies = shifted_copies(data.images["val"])
    val_codes, train_codes = content_codes(data.images["val"].numpy(), images.numpy())
    judged = (data, copies, val_codes[:, None] == train_codes, normalisation, device, dtype)
    if device.type == "cuda" and images.numel() < 2 * 2**30:
        images = images.to(device)

    network = Embedding(classifier, args.projection).to(device, memory_format=torch.channels_last)
    average = moving_average(network, EMA)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    guard = GuardedStep(optimizer, scaler, network.parameters())
    generator = torch.Generator(device)
    # A class that fills the gallery is often near by its number alone. Batches with the gallery's own shares let the
    # loss see that, and the weights keep it from giving up the rare class, which asks less often.
    class_weights = 1 / torch.bincount(labels).clamp(min=1).float().to(device) if args.balance == "anchors" else None

    batch_size = min(args.batch_size, len(images) // world_size * world_size)
    steps = len(images) // batch_size
    num_steps, warmup_steps = args.epochs * steps, round(WARMUP_EPOCHS * steps)
    if rank == 0:
        print(f"{args.loss} on {network.dim} numbers per image, {args.epochs} epochs of {steps} steps", end=" ")
        print(f"of {batch_size} images, two views each", flush=True)

    state = {"epoch": 0, "step": 0, "loss": 0.0, "taken": 0, "history": [], "best": None, "start": facts["start"]}
    parts = {"network": network, "average": average, "optimizer": optimizer, "scaler": scaler}
    settings, last_path = settings_of(args, aside=("cnn_weights",)), run_dir / "last.pt"
    if args.resume and last_path.exists():
        state = load_state(last_path, parts, settings, data.sha256, may_differ=("epochs",))
        check_resumed(state, args, facts, last_path)
    history = state["history"]
    trained = DistributedDataParallel(network) if world_size > 1 else network

    def finish_epoch(epoch, started, **row):
        """Judge the averaged weights, keep them where they are the best so far, print and write."""
        row = {"epoch": epoch, **row, **judge(average.module, *judged), "seconds": time.time() - started}
        history.append(row)
        best = state["best"]
        # the classifier as it came takes part; a random projection has no say before it is trained
        if (epoch or not args.projection) and (best is None or rank_of(row) > rank_of(best["row"])):
            state["best"] = {"row": row} | {k: plain_state(getattr(average.module, k)) for k in ("model", "head")}
        if rank == 0:
            print_epoch(row, args.epochs, state["best"] is not None and state["best"]["row"] is row)

    with StopSignal() as stop:
        if not history:
            finish_epoch(0, time.time(), lr=None, train_loss=None, skipped_steps=0)
        for epoch in range(state["epoch"], args.epochs):
            # Random choices depend on seed, epoch and step alone, so that a resumed run repeats the uninterrupted one
            order = epoch_order(labels, args.balance == "draws", args.seed * 10_000 + epoch)
            started = time.time()
            network.train()
            bar = dict(initial=state["step"], total=steps, desc=f"epoch {epoch + 1}", leave=False)
            for step in tqdm(range(state["step"], steps), disable=None if rank == 0 else True, **bar):
                now = epoch * steps + step
                generator.manual_seed(args.seed * 10_000_000 + now)
                index = order[step * batch_size : (step + 1) * batch_size]
                batch = images[index.to(images.device)].to(device).float() / 255
                views = torch.stack([augment(batch, generator) for _ in range(2)], dim=1)  # (n, 2, C, H, W)
                views = normalise(views[rank::world_size].flatten(0, 1), normalisation)
                targets = labels[index].to(device)  # of all ranks, one after the other
                targets = torch.cat([targets[r::world_size] for r in range(world_size)]).repeat_interleave(2)

                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    vectors = trained(views.contiguous(memory_format=torch.channels_last))
                vectors = F.normalize(vectors.float(), dim=1)
                if world_size > 1:  # every rank compares the images of all; gradients flow back where they came from
                    vectors = torch.cat(all_gather(vectors))
                loss_of = supervised_contrastive if args.loss == "supcon" else batch_hard_triplet
                loss = loss_of(vectors, targets, class_weights=class_weights)
                scaler.scale(loss).backward()
                if guard.step(loss.item(), learning_rate(now, num_steps, warmup_steps, args.lr)):
                    average.update_parameters(network)
                    state["loss"], state["taken"] = state["loss"] + loss.item(), state["taken"] + 1
                else:  # the batch statistics have seen the same infinities
                    for mine, whole in zip(network.buffers(), average.module.buffers(), strict=True):
                        mine.copy_(whole)
                if stop.requested():
                    save_state(last_path, parts, settings, data.sha256, **state | {"epoch": epoch, "step": step + 1})
                    stop.exit(run_dir)

            if not state["taken"]:
                raise InputError(
                    f"loss or gradient was not finite in every step of epoch {epoch + 1}: lower --lr, or use --dtype"
                    f" float32; {run_dir} keeps the epochs before"
                )
            skipped, mean_loss = steps - state["taken"], state["loss"] / state["taken"]
            finish_epoch(
                epoch + 1, started, lr=optimizer.param_groups[0]["lr"], train_loss=mean_loss, skipped_steps=skipped
            )
            state |= {"epoch": epoch + 1, "step": 0, "loss": 0.0, "taken": 0}
            save_state(last_path, parts, settings, data.sha256, **state)
            if rank == 0:
                write_jsonl(run_dir / "history.jsonl", history)
    return state["best"], history


def rank_of(row):
    return row[CHOSEN_BY], row["val_p5_shifted"]


def print_epoch(row, epochs, is_best):
    names = {"val_map": "mAP", "val_p5": "P@5", "val_map_shifted": "shifted mAP", "val_p5_shifted": "P@5"}
    numbers = " ".join(f"{name} {number(row[key], 4)}" for key, name in names.items())
    loss, mark = number(row["train_loss"], 4), "  *" if is_best else ""
    print(
        f"epoch {row['epoch']:3d}/{epochs}  loss {loss}  validation macro {numbers}  {row['seconds']:.1f} s{mark}",
        flush=True,
    )


def plain_state(module):
    return {k: v.clone().cpu() for k, v in module.state_dict().items()}


def check_resumed(state, args, facts, path):
    if state["start"] != facts["start"]:
        raise InputError(f"{path} started from another classifier; give the same --cnn-weights, or start a new run")
    if args.epochs < state["epoch"]:
        raise InputError(f"{path} already has {state['epoch']} epochs; --epochs {args.epochs} is less")
    if is_main_process():
        done = state["epoch"] >= args.epochs
        print(f"{path} has all its epochs" if done else f"resumed from {path}: epoch {state['epoch'] + 1}", flush=True)


def starting_point(args):
    """--cnn-weights -> (classifier, its facts, path). A dry run without weights starts from a random network."""
    path = Path(args.cnn_weights) if args.cnn_weights else None if args.dry_run else find_classifier()
    if path is None and args.dry_run:
        classifier, facts = build_model(), dict(architecture="resnet18", stem=choose_stem("auto", 28), channels=1)
        facts |= dict(image_size=28, normalisation={"mean": [0.5], "std": [0.25]}, dataset={"name": "phantom"})
    elif path is None:
        raise InputError(
            "there are no task 1 weights at models/task1_model.pth or ./task1_model.pth; train them with python"
            " task1_classification/train.py, or give --cnn-weights"
        )
    else:
        path = path / "best.pt" if path.is_dir() else path
        classifier, facts = load_classifier(path)
    facts["start"] = digest(classifier.state_dict())  # to notice another classifier on --resume
    if is_main_process():
        print(
            f"starting from {path or 'a random network'}: {facts['architecture']}, {facts['image_size']} px, trained on"
            f" {facts['dataset']['name'] if path else 'nothing'}"
        )
    return classifier, facts, path and str(path)


def load_data(args, facts, weights):
    """--data -> ImageSet that the classifier can be trained on. InputError where the two do not fit."""
    trained_on = facts["dataset"]["name"]
    if args.dry_run:
        data = load_phantom(28, {"train": 96, "val": 32, "test": 32})
    else:
        data = load_images(trained_on if args.data.lower() == "auto" else args.data, args.data_dir, facts["image_size"])
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
    if args.limit:
        data.limit(args.limit)
    for split in ("train", "val"):
        if len(data.labels[split].unique()) < 2:
            raise InputError(
                f"the {split} images of {data.name} are all of one class{'; raise --limit' if args.limit else ''}"
            )
    return data


@script(torchrun=True)
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
    classifier, facts, weights = starting_point(args)
    data = load_data(args, facts, weights)
    if rank == 0:
        print(data)
    run_dir = open_run_dir(args, TASK, "train")
    best, history = train(args, data, classifier, facts, run_dir, device, dtype, rank, world_size)
    free_gpu()
    if rank > 0:
        return

    about = {"loss": args.loss, "seed": args.seed, "started_from": weights}
    settings = {k: facts[k] for k in EMBEDDING_SETTINGS if k != "dataset"}
    settings |= {"label_names": data.label_names, "task": data.task, "dataset": data.facts()}
    settings |= {"limit": args.limit or facts.get("limit")}
    embedding = {"kind": EMBEDDING_KIND, "model": best["model"], "head": best["head"], "validation": best["row"]}
    embedding["weights_sha256"] = digest(best["model"] | best["head"])
    save_checkpoint(run_dir / "best.pt", embedding | about | {"settings": settings})
    title = f"{data.name} {data.size} px, {args.loss}, seed {args.seed}: validation searches training"
    names = {"": "validation", "_shifted": "and its shifted copies"}
    panels = [("loss (changed images)", {"train_loss": "loss"})]
    panels += [
        (f"macro {name}", {f"val_{key}{end}": label for end, label in names.items()})
        for name, key in (("mAP", "map"), ("P@5", "p5"))
    ]
    draw_history(run_dir / "figures" / "curves.png", history, panels, "epoch", title, data.phantom)
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": data.facts(),
            "datasets": [data.name],
            "phantom": data.phantom,
            "limited": args.limit is not None,
            "split": "val",
            "n": len(data.labels["val"]),
            "gallery": "train",
            "n_gallery": len(data.labels["train"]),
            "model": facts["architecture"],
            **about,
            "chosen_by": CHOSEN_BY,
            "best": best["row"],
            "before_training": history[0],
            "settings": settings_of(args),
            **run_facts(started, device),
        },
    )
    if best["row"]["epoch"] == 0:
        print("no epoch was better than the classifier as it came: best.pt holds its features unchanged")
    print(
        f"{'PHANTOM images: ' * data.phantom}best epoch {best['row']['epoch']}: macro mAP over validation and its"
        f" shifted copies {best['row'][CHOSEN_BY]:.4f} (before training {history[0][CHOSEN_BY]:.4f})"
    )
    place = ["--data-dir", args.data_dir] if data.path else []
    evaluate = command("task3_retrieval/evaluate.py", "--cnn-weights", run_dir / "best.pt", "--data", data.name, *place)
    print(f"results in {run_dir} ({time.time() - started:.0f} s); measure it with: {evaluate}")


if __name__ == "__main__":
    main()
