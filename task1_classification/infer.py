"""
Classify image files with a trained classifier: one CSV row per image, heat maps on request.

Usage:
    python task1_classification/infer.py film.png
    python task1_classification/infer.py folder/ "more/*.jpg" --heatmaps
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
from PIL import Image

from shared.data.images import find_images, read_image, to_square
from shared.runtime import InputError, open_run_dir, pick_device, positive_int, run_facts, script, script_parser
from shared.runtime import write_csv, write_json
from task1_classification.explain import GradCAM, overlay
from task1_classification.model import find_classifier, load_classifier, normalise, predict_logits, to_probabilities
from task1_classification.typicality import unusualness

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
    print(
        f"classifier: {facts['architecture']}, trained on"
        f" {'PHANTOM images' if facts['dataset']['phantom'] else facts['dataset']['name']} at {facts['image_size']} px,"
        f" answers {', '.join(facts['label_names'])}"
    )
    paths = find_images(args.images)[: args.limit] if args.images else []
    inputs, names, errors = [], [], []
    if args.dry_run:
        from shared.phantom import phantom_study

        inputs = [
            torch.from_numpy(
                to_square(phantom_study(args.seed, i, 224).image / 255, facts["image_size"], facts["channels"])
            )
            for i in range(4)
        ]
        names = [f"phantom-{i}" for i in range(4)]
    for path in paths:
        try:
            inputs.append(torch.from_numpy(to_square(read_image(path), facts["image_size"], facts["channels"])))
            names.append(str(path))
        except InputError as error:
            errors.append({"path": str(path), "error": str(error)})
    if not inputs:
        detail = f"; {errors[0]['path']}: {errors[0]['error']}" if errors else ""
        raise InputError(f"none of the {len(paths)} files could be used{detail}")

    if args.heatmaps:
        GradCAM(
            model, args.layer, facts["image_size"], facts["channels"]
        )  # an unknown layer is refused before anything is written
    run_dir = open_run_dir(args, TASK, "infer")
    images = torch.stack(inputs)  # uint8 (N, C, size, size)
    logits = predict_logits(model, images, facts["normalisation"], device, dtype, args.batch_size)
    probabilities = to_probabilities(logits, facts["task"], facts["temperature"])
    odd = unusualness(facts["typicality"], images)
    rows = [
        {
            "path": name,
            **decision_of(p, facts),
            "unusualness": round(min(float(u), 999.0), 3),
            "unlike_training": bool(u > 1),
        }
        for name, p, u in zip(names, probabilities, odd, strict=True)
    ]

    write_csv(run_dir / "predictions.csv", rows)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    if args.heatmaps:
        write_heatmaps(run_dir / "heatmaps", model, images, names, facts, args.layer, device, args.batch_size)
    write_json(
        run_dir / "metrics.json",
        {
            "n": len(rows),
            "n_errors": len(errors),
            "n_unlike_training": sum(r["unlike_training"] for r in rows),
            "dataset": facts["dataset"],
            "model": facts["architecture"],
            **run_facts(started, device),
        },
    )
    for row in rows[:20]:
        print(
            f"  {row['path']}: {row['decision']}"
            f" ({row['probability']:.3f}){'  WARNING: unlike the training images' if row['unlike_training'] else ''}"
        )
    if len(rows) > 20:
        print(f"  ... and {len(rows) - 20} more")
    for error in errors:
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    print(
        f"{len(rows)} images classified, {len(errors)} skipped, {sum(r['unlike_training'] for r in rows)} unlike the"
        f" training images; results in {run_dir}"
    )


def classifier_for(args, device):
    """The classifier asked for, else the one at its usual place, else (dry run) a random one."""
    path = Path(args.checkpoint) if args.checkpoint else find_classifier()
    if path is None and args.dry_run:
        from task1_classification.train import main as train  # two small epochs on phantom images

        train(["--dry-run"])
        path = Path("outputs") / TASK / "train" / "dry-run" / "best.pt"
    if path is None:
        raise InputError(
            "there is no classifier at models/task1_model.pth; train one with python task1_classification/train.py, or"
            " give --checkpoint"
        )
    print(f"checkpoint: {path}")
    return load_classifier(path, device)


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
    """One overlay per image, numbered as the rows of predictions.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    with GradCAM(model, layer, facts["image_size"], facts["channels"]) as cam:
        for batch in images.split(batch_size):
            maps = cam(normalise(batch.to(device), facts["normalisation"]))
            for picture in overlay(batch, maps.cpu(), scale=max(1, 448 // facts["image_size"])):
                Image.fromarray(picture).save(folder / f"{number:05d}_{Path(names[number]).stem}.png")
                number += 1
        print(
            f"heat maps: Grad-CAM on {cam.name}, {maps.shape[2]}x{maps.shape[1]} cells, each"
            f" {facts['image_size'] / maps.shape[2]:.1f} of {facts['image_size']} pixels wide"
        )


if __name__ == "__main__":
    main()
