"""
Write reports about films with a trained CheXQuery.

Usage:
    python chexquery/infer.py --checkpoint outputs/chexquery/train/001 --images docs/phantom_film.png folder/ "*.dcm"
    python chexquery/infer.py --checkpoint RUN --images frontal.png --lateral lateral.png --beams 4

Each file is the frontal film of a study of its own; --lateral gives their lateral films, in the same order.
Writes to the run folder: reports.txt, reports.json (text, probability of each condition, files), report.html, errors.csv.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import matplotlib.pyplot as plt
import numpy as np
import torch

from chexquery.cases import VIEWS, square
from chexquery.model import load_model
from shared.data.images import find_images, read_image
from shared.metrics.labels import CONDITIONS, label_report
from shared.report import Report, number, plain_text, save_figure
from shared.runtime import InputError, atomic_file, newest_run, open_run_dir, pick_device, positive_int, run_facts, script
from shared.runtime import script_parser, seed_everything, write_csv, write_json

TASK = "chexquery"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    # fmt: off
    g = parser.add_argument_group("what is written")
    g.add_argument("--checkpoint", metavar="PATH", help="best.pt, or a run folder (default: the newest run)")
    g.add_argument("--images", nargs="+", metavar="FILE", help="frontal films: files, folders, patterns")
    g.add_argument("--lateral", nargs="+", metavar="FILE", help="their lateral films, as many, in the same order")
    g.add_argument("--batch-size", type=positive_int, default=16, help="reports at once (%(default)s)")
    g.add_argument("--beams", type=positive_int, help="1 is greedy (default: as trained)")
    g.add_argument("--min-tokens", type=int, help="shortest report, in tokens (default: as trained)")
    g.add_argument("--length-penalty", type=float, default=1.1, help="above 1: longer reports, with beams (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.images:
        parser.error("--images names the films to write about")
    return args


def read_studies(args, size):
    """-> (studies {"files", "images" uint8 (2, S, S), "present" (2,)}, errors [{"image", "error"}])."""
    frontal = find_images(args.images)
    lateral = find_images(args.lateral) if args.lateral else [None] * len(frontal)
    if len(lateral) != len(frontal):
        raise InputError(f"{len(frontal)} frontal and {len(lateral)} lateral films: give one lateral film for each")
    studies, errors = [], []
    for files in zip(frontal, lateral, strict=True):
        images, present = np.zeros((2, size, size), np.uint8), np.array([f is not None for f in files])
        try:
            for i, file in enumerate(files):
                if file is not None:
                    images[i] = square(read_image(file), size)
        except InputError as error:
            errors.append({"image": str(file), "error": str(error)})
            continue
        names = {view: str(file) for view, file in zip(VIEWS, files, strict=True) if file is not None}
        studies.append({"files": names, "images": images, "present": present})
    return studies, errors


def open_model(args):
    """-> (model, what its checkpoint says, device, decoding)."""
    path = args.checkpoint or newest_run(TASK, "train", "phase1/best.pt")
    if path is None:
        raise InputError("there is no trained model: train one with chexquery/train.py, or give --checkpoint PATH")
    device, _ = pick_device(args.device)
    model, told = load_model(path, device)
    beams, shortest = told.get("decoding", [1, 0])
    decoding = {"beams": args.beams or beams, "min_tokens": shortest if args.min_tokens is None else args.min_tokens}
    return model, told, device, decoding | {"length_penalty": args.length_penalty}


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    model, told, device, decoding = open_model(args)
    studies, errors = read_studies(args, model.image_size)
    studies = studies[: args.limit]
    if not studies:
        raise InputError(f"none of the films can be used; the first: {errors[0]['image']}: {errors[0]['error']}")
    run_dir = open_run_dir(args, TASK, "infer")
    results = []
    for start in range(0, len(studies), args.batch_size):
        part = studies[start : start + args.batch_size]
        images, present = (torch.from_numpy(np.stack([s[k] for s in part])).to(device) for k in ("images", "present"))
        with torch.inference_mode():
            seen = model(images, present)
        texts = model.write(seen.tokens, **decoding)[0]
        for i, (study, text) in enumerate(zip(part, texts, strict=True)):
            chances = {} if seen.logits is None else dict(zip(CONDITIONS, seen.logits[i].sigmoid().tolist(), strict=True))
            ranked = dict(sorted(chances.items(), key=lambda item: -item[1]))
            said = {k: v for k, v in label_report(text).items() if v is not None}
            results.append({"files": study["files"], "report": text, "probabilities": ranked, "labels_of_the_text": said})
    write_json(run_dir / "reports.json", {"checkpoint": told["path"], "phantom": told["data"]["phantom"], "reports": results,
                                          **run_facts(started, device)})  # fmt: skip
    with atomic_file(run_dir / "reports.txt", "w") as file:
        file.write("\n\n".join(f"{r['files']['frontal']}\n{r['report']}" for r in results) + "\n")
    write_report(run_dir, studies, results, told)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    for r in results:
        best = ", ".join(f"{name} {chance:.2f}" for name, chance in list(r["probabilities"].items())[:3])
        print(f"{r['files']['frontal']}\n  {r['report']}\n  {best}")
    print(f"{len(results)} reports, {len(errors)} films left out; results in {run_dir} ({time.time() - started:.1f} s)")


def write_report(run_dir, studies, results, told):
    trained_on = "the model was trained on films drawn by this project" if told["data"]["phantom"] else ""
    report = Report("CheXQuery: reports", phantom=False, warnings=[trained_on] if trained_on else [])
    for i, (study, result) in enumerate(zip(studies, results, strict=True)):
        shown = [image for image, there in zip(study["images"], study["present"], strict=True) if there]
        figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.4), squeeze=False)
        for axis, image in zip(axes.flat, shown, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.axis("off")
        report.heading(plain_text(result["files"]["frontal"]))
        report.figure(save_figure(figure, run_dir / "figures" / f"film{i + 1}.png"), "the film as the model gets it")
        report.text(result["report"] or "(nothing was written)")
        if result["probabilities"]:
            report.table(["condition, by the label head", "probability"],
                         [[name, number(chance, 2)] for name, chance in result["probabilities"].items()])  # fmt: skip
    report.write(run_dir, page=True)


if __name__ == "__main__":
    main()
