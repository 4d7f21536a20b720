"""
Reports of chest films: a vision-language model writes findings, impression and a classification, and the CNN of task 1
says what it makes of the same film; where they disagree there is a flag.

Usage:
    python task2_report/infer.py docs/phantom_film.png                          # MedGemma 4B, needs a GPU of 16 GB
    python task2_report/infer.py docs/phantom_film.png --model tiny --max-new-tokens 40      # offline, untrained
    python task2_report/infer.py films/ --adapter outputs/task2_report/train/001/best        # a model of train.py
    python task2_report/infer.py --data pneumoniamnist --split test --limit 8 --strategy structured
    python task2_report/infer.py film.png --indication "Fever and cough." --context none --cnn none

Reads PNG, JPEG, TIFF, BMP, .npy and (with pydicom) DICOM. The CNN is models/task1_model.pth, else ./task1_model.pth;
its data set is printed, and one trained on other films than --data names is refused unless --allow-mismatch. CNN and
model are held together where they fit; where they do not, the CNN is released before the model is loaded.
Writes to the run folder: records.jsonl and records/<n>.json (fields: records.py), report.md, report.html (one file,
with film, heat map and both opinions), figures/, metrics.json, errors.csv with the files that could not be used.
For research and teaching only: this is not a medical device, and no output of it is medical advice.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import matplotlib
import numpy as np

from shared.data.image_sets import SIZES, SPLITS, load_images
from shared.data.images import find_images, read_pixels
from shared.models.hub import find_model
from shared.models.inputs import preprocess_images
from shared.models.memory import Setting, free_bytes, predict, read_layout
from shared.phantom import phantom_study
from shared.report import PHANTOM, Report, number, percent, save_figure
from shared.runtime import InputError, free_gpu, open_run_dir, peak_words, pick_device, positive_int, run_facts, script
from shared.runtime import script_parser, seed_everything, write_csv, write_json, write_jsonl
from task1_classification.model import untrained_classifier
from task2_report.cases import as_films
from task2_report.opinion import find_cnn
from task2_report.prompts import CONTEXTS, STRATEGIES
from task2_report.records import judge
from task2_report.writer import Writer, add_model_options, load_model, quant_of, source_of, training_of, untrained

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASK = "task2_report"
MADE_UP = "Model or CNN learned from films drawn by this project: what they say of real films means nothing."
CNN_BYTES = 2**29  # a ResNet-18, its activations and what CUDA needs for it


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="pneumoniamnist")
    parser.set_defaults(data=None)  # files are the rule; --data takes rows of an image set in their place
    g = parser.add_argument_group("films")
    # fmt: off
    g.add_argument("images", nargs="*", metavar="PATH", help="image files, folders (searched through) or patterns")
    g.add_argument("--split", default="test", choices=SPLITS, help="of --data (%(default)s)")
    g.add_argument("--image-size", type=int, default=28, choices=SIZES, help="of --data, pixels (%(default)s)")
    g.add_argument("--indication", default="", metavar="TEXT", help="the clinical question, put into every prompt")
    g = parser.add_argument_group("prompt")
    g.add_argument("--strategy", choices=list(STRATEGIES), metavar="NAME",
        help=f"of {', '.join(STRATEGIES)} (default: report for a model of train.py, else context_aware)")
    g.add_argument("--context", choices=CONTEXTS,
        help="what the prompt says of the CNN's opinion (default: cnn; none for the strategy report)")
    g = parser.add_argument_group("the CNN of task 1")
    g.add_argument("--cnn", metavar="FILE", help="classifier of task 1, or none (default: models/task1_model.pth)")
    g.add_argument("--allow-mismatch", action="store_true", help="take a CNN that was trained on another data set")
    g.add_argument("--together", default="auto", choices=["auto", "yes", "no"],
        help="hold CNN and model at once; auto: where both fit (%(default)s)")
    g = add_model_options(parser)
    g.add_argument("--batch-size", type=positive_int,
        help="prompts at a time; halved by itself when memory runs out (4; 64 below 100 M parameters)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.dry_run:
        args.device, args.model, args.max_new_tokens = "cpu", args.model or (None if args.adapter else "tiny"), 12
    if bool(args.images) + bool(args.data) != 1 and not args.dry_run:
        parser.error("name image files, folders or patterns, or --data NAME (or --dry-run)")
    args.strategy = args.strategy or ("report" if training_of(args.adapter) else "context_aware")
    args.context = args.context or ("none" if args.strategy == "report" else "cnn")
    return args


def read_films(args):
    """-> names, films (uint8), labels or None, rows of errors.csv, name of the data set or None."""
    if args.data:
        data = load_images(args.data, args.data_dir, args.image_size)
        print(data)
        n = min(args.limit or 16, len(data.images[args.split]))
        labels = data.labels[args.split][:n].tolist() if data.task == "binary-class" else None
        names = [f"{data.name}-{args.split}-{i}" for i in range(n)]
        return names, as_films(data.images[args.split][:n]), labels, [], data.name
    if args.dry_run and not args.images:
        films = [phantom_study(args.seed, i, 112).image for i in range(2)]
        return ["phantom-0", "phantom-1"], films, None, [], "phantom"
    names, films, errors = [], [], []
    paths = find_images(args.images)[: args.limit]
    for path in paths:
        try:
            films.append(read_pixels(path))
            names.append(str(path))
        except InputError as error:
            errors.append({"path": str(path), "error": str(error)})
    if not films:
        detail = f"; {errors[0]['path']}: {errors[0]['error']}" if errors else ""
        raise InputError(f"none of the {len(paths)} films could be used{detail}")
    return names, films, None, errors, None


def without_odd_shapes(vlm, names, films, labels, errors):
    """Leave out films that this model's processor refuses (Qwen: more than 200 to 1) -> the rest."""
    kept = []
    for i, film in enumerate(films):
        try:
            preprocess_images(vlm.processor, [film])
            kept.append(i)
        except InputError as error:
            errors.append({"path": names[i], "error": str(error)})
    if not kept:
        raise InputError(f"none of the {len(films)} films could be used; {names[0]}: {errors[-1]['error']}")
    return kept, [names[i] for i in kept], [films[i] for i in kept], labels and [labels[i] for i in kept]


def fits_together(args, device):
    """Do model and CNN fit into the memory that is free? By prediction, before anything is loaded."""
    if args.together != "auto":
        return args.together == "yes"
    name, _ = source_of(args)
    setting = Setting(quant_of(args, name, device), batch=args.batch_size or 4, new_tokens=args.max_new_tokens)
    need = predict(read_layout(*find_model(name, "gemma3")), setting)["total"]
    free = free_bytes(device)
    return free is None or need + CNN_BYTES < free


def draw_film(path, film, name, overlay, phantom):
    """Film, and where there is a CNN its heat map beside it."""
    pictures = [film] + [overlay] * (overlay is not None)
    figure, axes = plt.subplots(
        1, len(pictures), figsize=(3.4 * len(pictures), 3.6), layout="constrained", squeeze=False
    )
    for axis, picture, title in zip(axes[0], pictures, ("film", "CNN: heat map"), strict=False):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    return save_figure(figure, path, name, phantom)


def make_page(run_dir, records, films, overlays, cnn, phantom, warnings, indication):
    report = Report(f"Reports of {len(records)} films", phantom, warnings)
    first = records[0]
    report.text(
        f"{first['model']} ({first['backend']}, weights {first['quant']}, {first['dtype']}), strategy"
        f" {first['strategy']}, context {first['context']}; {cnn or 'no CNN'}."
    )
    flagged = [r for r in records if "disagrees with the CNN" in r["flags"]]
    both = [r for r in records if r["classification"] in ("normal", "pneumonia")]
    if cnn:
        report.text(f"The model and the CNN disagree on {len(flagged)} of {len(both)} films that both classify.")
    names = [r["image_id"] for r in records]
    short = [Path(name).name if [Path(n).name for n in names].count(Path(name).name) == 1 else name for name in names]
    for number_of, (record, film) in enumerate(zip(records, films, strict=True)):
        report.heading(short[number_of])
        if indication:
            report.text(f"Indication given: {indication}")
        for flag in record["flags"]:
            report.text(f"**{flag}**")
        path = run_dir / "figures" / f"{number_of:04d}.png"
        report.figure(draw_film(path, film, short[number_of], overlays[number_of], phantom), record["resize"])
        rows = [["model", record["classification"] or "–", number(record["p_yes_logit"], 2) + " (log-odds of yes)"]]
        if record["cnn"]:
            rows.append(["CNN", record["cnn"]["call"], percent(record["cnn"]["probability"]) + " % pneumonia"])
        report.table(["", "classification", "how sure"], rows)
        if record["boxes"]:
            report.table(["box", "pixels"], [[b["label"], b["box"]] for b in record["boxes"]])
        note = record["text"].removesuffix(record["raw_text"])
        for name in ("Findings", "Impression"):
            if text := record[name.lower()]:
                report.text(f"**{name}** {note}{' '.join(text.split()).replace('**', '').replace('`', ' ')}")
    report.write(run_dir, page=True)


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    names, films, labels, errors, dataset = read_films(args)
    checkpoint = args.cnn or (untrained_classifier() if args.dry_run else None)
    cnn = find_cnn(checkpoint, dataset, args.allow_mismatch, device)
    opinions, told = (cnn.opinions(films, heat_maps=True), cnn.told()) if cnn else (None, None)
    line, together = str(cnn) if cnn else None, cnn is not None and fits_together(args, device)
    if cnn and not together:
        cnn = None
        free_gpu()
        print(f"CNN released before the model is loaded: both do not fit; peak so far {peak_words(device)}")
    vlm = load_model(args, device)
    kept, names, films, labels = without_odd_shapes(vlm, names, films, labels, errors)
    opinions = opinions and [opinions[i] for i in kept]
    run_dir = open_run_dir(args, TASK, "infer")
    writer = Writer(vlm, args.batch_size, args.max_new_tokens)
    records = judge(
        writer, names, films, args.strategy, args.context if opinions else "none", opinions, labels,
        [args.indication] * len(films),
    )  # fmt: skip
    write_jsonl(run_dir / "records.jsonl", records)
    for i, record in enumerate(records):
        write_json(run_dir / "records" / f"{i:04d}.json", record)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    seconds = float(np.mean([r["seconds"] for r in records]))
    trained_on = training_of(args.adapter).get("dataset")
    phantom = bool(dataset == "phantom" or (trained_on and trained_on["phantom"]) or (told and told["phantom"]))
    write_json(run_dir / "metrics.json", {
        "n": len(records), "n_errors": len(errors), "phantom": phantom, "dataset": dataset, "trained_on": trained_on,
        "n_disagree": sum("disagrees with the CNN" in r["flags"] for r in records), "cnn": told, "together": together,
        "seconds_per_report": seconds, **vlm.facts(),
        **run_facts(started, device),
    })  # fmt: skip
    drawn = dataset == "phantom"
    if phantom:
        print(f"*** {PHANTOM if drawn else MADE_UP} ***")
    warnings = ["The model is untrained: its words mean nothing."] * untrained(vlm)
    warnings += [MADE_UP] * (phantom and not drawn)
    overlays = [o.get("overlay") for o in opinions] if opinions else [None] * len(films)
    make_page(run_dir, records, films, overlays, line, drawn, warnings, args.indication)
    for record in records[:10]:
        flags = f"  [{', '.join(record['flags'])}]" if record["flags"] else ""
        beside = f"; CNN {record['cnn']['call']} {record['cnn']['probability']:.2f}" if record["cnn"] else ""
        print(f"  {record['image_id']}: {record['classification'] or 'no classification'}{beside}{flags}")
    for error in errors:
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    print(
        f"{len(records)} reports, {len(errors)} films skipped, {seconds:.1f} s a report; peak {peak_words(device)};"
        f" results in {run_dir}, {run_dir / 'report.html'}"
    )


if __name__ == "__main__":
    main()
