"""
Classify image files with a trained classifier: one CSV row per image, heat maps on request.

Usage:
    python task1_classification/infer.py docs/phantom_film.png
    python task1_classification/infer.py docs/ "docs/*film.png" --heatmaps
    python task1_classification/infer.py film.dcm --checkpoint outputs/task1_classification/train/001/best.pt

Reads PNG, JPEG, TIFF, BMP and .npy of any size, grey or colour, 8 or 16 bit (DICOM where pydicom is installed); takes
the central square and scales it to the size the network was trained on.
Writes to the run folder: predictions.csv; errors.csv with the files that could not be used; heatmaps/*.png.
For research and teaching only: this is not a medical device, and no output of it is medical advice.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import torch
from PIL import Image, ImageDraw

from shared.data.images import find_images, read_image, to_square
from shared.report import PHANTOM
from shared.runtime import InputError, atomic_file, command, open_run_dir, pick_device, positive_int, run_facts
from shared.runtime import script, script_parser, write_csv, write_json
from task1_classification.explain import GradCAM, overlay
from task1_classification.model import find_classifier, load_classifier, normalise, predict_logits
from task1_classification.model import to_probabilities, unusualness, untrained_classifier

TASK = "task1_classification"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("images")
    g.add_argument("images", nargs="*", metavar="PATH", help="image files, folders (searched through) or glob patterns")
    # fmt: off
    g.add_argument("--batch-size", type=positive_int, default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    g = parser.add_argument_group("model")
    g.add_argument("--checkpoint", metavar="FILE",
        help="best.pt of a training run (default: models/task1_model.pth, else ./task1_model.pth)")
    g = parser.add_argument_group("output")
    g.add_argument("--heatmaps", action="store_true", help="also write Grad-CAM overlays, 448 pixels wide")
    g.add_argument("--layer", default="auto",
        help="layer of the heat maps; auto: the deepest with a map of at least 7x7 (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.images and not args.dry_run:
        parser.error("name at least one image file, folder or pattern (or --dry-run)")
    if args.dry_run:
        args.device = "cpu"
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, dtype = pick_device(args.device)
    model, facts = classifier_for(args, device)
    phantom, names = facts["dataset"]["phantom"], facts["label_names"]
    print(
        f"classifier: {facts['architecture']}, trained on {facts['dataset']['name']} at {facts['image_size']} px"
        f" ({facts['cases']['train']} images), answers {', '.join(names)}"
    )
    if phantom:
        print(PHANTOM)
    inputs, paths, errors = read_all(args, facts)
    if args.heatmaps:  # an unknown layer is refused before anything is written
        GradCAM(model, args.layer, facts["image_size"], facts["channels"])
    images = torch.stack(inputs)  # uint8 (N, C, size, size)
    logits = predict_logits(model, images, facts["normalisation"], device, dtype, args.batch_size)
    probabilities = to_probabilities(logits, facts["task"], facts["temperature"])
    odd = unusualness(facts["typicality"], images).clamp(max=999).tolist()
    rows = [
        {"path": path, **decision_of(p, facts), "unusualness": round(u, 3), "unlike_training": u > 1}
        for path, p, u in zip(paths, probabilities, odd, strict=True)
    ]
    num_odd = sum(row["unlike_training"] for row in rows)

    run_dir = open_run_dir(args, TASK, "infer")
    write_csv(run_dir / "predictions.csv", rows)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    write_json(
        run_dir / "metrics.json",
        {"n": len(rows), "n_errors": len(errors), "n_unlike_training": num_odd, "phantom": phantom}
        | {"model": facts["architecture"], **{k: facts[k] for k in ("dataset", "cases", "limit")}}
        | run_facts(started, device),
    )
    if args.heatmaps:
        write_heatmaps(run_dir / "heatmaps", model, images, paths, facts, args.layer, device, args.batch_size)
    for row in rows[:20]:
        odd = "  WARNING: unlike the training images" if row["unlike_training"] else ""
        print(f"  {row['path']}: {in_words(row, facts)}{odd}")
    if len(rows) > 20:
        print(f"  ... and {len(rows) - 20} more")
    for error in errors:
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    counts = f"{len(rows)} images classified, {len(errors)} skipped, {num_odd} unlike the training images"
    print(f"{counts}; results in {run_dir}")


def classifier_for(args, device):
    """The classifier asked for, else the one at its usual place, else (dry run) one of random weights."""
    path = Path(args.checkpoint) if args.checkpoint else find_classifier()
    if path is None and args.dry_run:
        path = untrained_classifier()
    if path is None:
        train = command("task1_classification/train.py")
        raise InputError(
            f"there is no classifier at models/task1_model.pth; train one with {train}, or give --checkpoint"
        )
    print(f"checkpoint: {path}")
    return load_classifier(path, device)


def read_all(args, facts):
    """-> (images uint8 (C, size, size), their paths, rows of those that cannot be used); InputError when none can."""
    inputs, names, errors = [], [], []
    sources = [(str(path), path) for path in find_images(args.images)[: args.limit]] if args.images else []
    if args.dry_run:
        from shared.phantom import phantom_study

        sources += [(f"phantom-{i}", phantom_study(args.seed, i, 224).image) for i in range(4)]
    for name, source in sources:
        try:
            inputs.append(torch.from_numpy(to_square(read_image(source), facts["image_size"], facts["channels"])))
            names.append(name)
        except InputError as error:
            errors.append({"path": name, "error": str(error)})
    if not inputs:
        detail = f"; {errors[0]['path']}: {errors[0]['error']}" if errors else ""
        raise InputError(f"none of the {len(sources)} files could be used{detail}")
    return inputs, names, errors


def in_words(row, facts):
    """The decision, and the probability of what: of the second class of a binary set, else of what was called."""
    names = facts["label_names"]
    if facts["task"] == "binary-class":
        return (
            f"{row['decision']} (probability of {names[1]} {row['probability']:.3f}, threshold {row['threshold']:.3f})"
        )
    if facts["task"].startswith("multi-label"):
        highest = max(names, key=lambda name: row[f"p_{name}"])
        return f"{row['decision']} (highest probability: {highest} {row['probability']:.3f})"
    return f"{row['decision']} (probability {row['probability']:.3f})"


def decision_of(probability, facts):
    """
    One row: the probability (of the positive class; of the called one), the decision, and every class's probability.
    """
    names = facts["label_names"]
    if facts["task"] == "binary-class":
        p = float(probability)
        return {"probability": p, "decision": names[int(p > facts["threshold"])], "threshold": facts["threshold"]}
    columns = {f"p_{name}": float(p) for name, p in zip(names, probability, strict=True)}
    if facts["task"].startswith("multi-label"):
        called = [n for n, p, t in zip(names, probability.tolist(), facts["threshold"], strict=True) if p > t]
        return {"probability": float(probability.max()), "decision": "; ".join(called) or "none", **columns}
    best = int(probability.argmax())
    return {"probability": float(probability[best]), "decision": names[best], **columns}


def write_heatmaps(folder, model, images, names, facts, layer, device, batch_size):
    """One overlay per image, numbered as the rows of predictions.csv; a classifier of drawn films says so on it."""
    number = 0
    with GradCAM(model, layer, facts["image_size"], facts["channels"]) as cam:
        for batch in images.split(batch_size):
            maps = cam(normalise(batch.to(device), facts["normalisation"]))
            for array in overlay(batch, maps.cpu(), scale=max(1, 448 // facts["image_size"])):
                picture = Image.fromarray(array)
                if facts["dataset"]["phantom"]:
                    draw = ImageDraw.Draw(picture)
                    draw.rectangle((0, 0, 240, 19), fill="black")
                    draw.text((4, 1), "PHANTOM: trained on drawn films", fill="white", font_size=14)
                with atomic_file(folder / f"{number:05d}_{Path(names[number]).stem[:50]}.png") as file:
                    picture.save(file, "PNG")
                number += 1
    height, width = maps.shape[1:]
    print(
        f"heat maps: Grad-CAM on {cam.name}, {width}x{height} cells, each {facts['image_size'] / width:.1f} of"
        f" {facts['image_size']} pixels wide"
    )


if __name__ == "__main__":
    main()
