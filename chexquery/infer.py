"""
Write reports about films with a trained CheXQuery.

Usage:
    python chexquery/infer.py --checkpoint outputs/chexquery/train/001 --images docs/phantom_film.png folder/ "*.dcm"
    python chexquery/infer.py --checkpoint RUN --images frontal.png --lateral lateral.png --beams 4

Each file is the frontal film of a study of its own; --lateral gives their lateral films, in the same order, or alone
the only films there are.
Writes to the run folder: reports.txt, reports.json (text, probability of each condition, files), report.md,
report.html, figures/, and errors.csv for films that cannot be read.
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

from chexquery.cases import VIEWS, add_file_options, read_files
from chexquery.checkpoints import MADE_UP, add_writing_options, open_model
from shared.metrics.labels import CONDITIONS, label_report
from shared.report import Report, number, save_figure, short_path
from shared.runtime import atomic_file, open_run_dir, run_facts, script, script_parser, seed_everything, write_csv
from shared.runtime import write_json

TASK = "chexquery"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("what is written")
    add_writing_options(g)
    add_file_options(g)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.device = "cpu"
        args.images = args.images or (None if args.lateral else [str(ROOT / "docs" / "phantom_film.png")])
    if not (args.images or args.lateral):
        parser.error("--images names the films to write about (--lateral lateral ones)")
    return args


def write_about(model, rows, images, present, batch_size, device, decoding):
    """-> one dict a study: files, report, probabilities of the label head (highest first), labels the text states."""
    results = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        with torch.inference_mode():
            seen = model(*(torch.from_numpy(a[part]).to(device) for a in (images, present)))
        for i, text in enumerate(model.write(seen.tokens, **decoding)[0]):
            chances = [] if seen.logits is None else seen.logits[i].sigmoid().tolist()
            ranked = sorted(zip(CONDITIONS, chances, strict=False), key=lambda item: -item[1])
            said = {k: v for k, v in label_report(text).items() if v is not None}
            found = {"films": rows[start + i]["films"], "report": text, "probabilities": dict(ranked)}
            results.append(found | {"labels_of_the_text": said})
    return results


def named(result):
    return result["films"]["frontal"] or result["films"]["lateral"]


def make_report(run_dir, images, present, results, told):
    phantom = told["data"]["phantom"]
    report = Report("CheXQuery: reports", warnings=[MADE_UP] * phantom)
    for n, (films, there, result) in enumerate(zip(images, present, results, strict=True), 1):
        size = (3.2 * there.sum(), 3.8)
        figure, axes = plt.subplots(1, int(there.sum()), figsize=size, squeeze=False, layout="constrained")
        for axis, view in zip(axes.flat, np.flatnonzero(there), strict=True):
            axis.imshow(films[view], cmap="gray", vmin=0, vmax=255)
            axis.set_title(VIEWS[view], fontsize=9)
            axis.axis("off")
        report.heading(short_path(named(result)))
        picture = save_figure(figure, run_dir / "figures" / f"film{n}.png", Path(named(result)).name)
        report.figure(picture, "The film as the model gets it.")
        report.text(result["report"] or "(nothing was written)")
        if result["probabilities"]:
            rows = [[name, number(chance, 2)] for name, chance in result["probabilities"].items()]
            report.table(["condition, by the label head", "probability"], rows)
    report.write(run_dir, page=True)


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    model, told, decoding = open_model(args)
    rows, images, present, errors = read_files(args, model.image_size, told["data"]["views"])
    run_dir = open_run_dir(args, TASK, "infer")
    results = write_about(model, rows, images, present, args.batch_size, told["device"], decoding)
    facts = {"checkpoint": told["path"], "phantom": told["data"]["phantom"], "n": len(rows), "left_out": len(errors)}
    write_json(run_dir / "reports.json", facts | {"reports": results, **run_facts(started, told["device"])})
    with atomic_file(run_dir / "reports.txt", "w") as file:
        file.write("\n\n".join(f"{named(r)}\n{r['report']}" for r in results) + "\n")
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    make_report(run_dir, images, present, results, told)
    for r in results:
        best = ", ".join(f"{name} {chance:.2f}" for name, chance in list(r["probabilities"].items())[:3])
        print(f"{named(r)}\n  {r['report']}\n  {best}")
    print(f"{len(results)} reports, {len(errors)} films left out; results in {run_dir} ({time.time() - started:.1f} s)")


if __name__ == "__main__":
    main()
