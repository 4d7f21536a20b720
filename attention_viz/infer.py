"""
Ask one question about one image, of two models side by side: the answer, and where each of them looked.

Usage:
    python attention_viz/infer.py --image film.png --question "Is there a pleural effusion?"
    python attention_viz/infer.py --image film.png --question "..." --models tiny           # offline: the tiny pair
    python attention_viz/infer.py --image film.png --question "..." --models FOLDER --methods mean occlusion
    python attention_viz/infer.py --image film.png --question "..." --head-mode per-head --colormap viridis
    python attention_viz/infer.py --dry-run

The models are MedGemma and LLaVA-Med unless named; they are loaded one after the other. LLaVA-Rad: convert it first
(python -m shared.models.llava_med IN OUT --base VICUNA) and give the folder. --finding: the words whose tokens are the
query "finding", such as "pleural effusion". Where a map cannot be made there is a status in its place.
Writes to the run folder: record.json (answers, margins, statuses, maps as numbers), overlays/*.png, figures/maps.png.
For research and teaching only: this is not a medical device, and no output of it is medical advice.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from attention_viz.cases import LONGEST
from attention_viz.maps import METHODS, OF_ROWS, PAIR, TINY_PAIR, ask, attention_map, check_colormap, overlay
from attention_viz.maps import shortened
from shared.data.images import read_pixels
from shared.models.hub import find_model
from shared.models.loading import QUANTS, load_vlm
from shared.models.passes import make_prompts, write
from shared.phantom import phantom_study
from shared.report import PHANTOM, save_figure
from shared.runtime import InputError, atomic_file, bounded, free_gpu, open_run_dir, pick_device, read_json, run_facts
from shared.runtime import script, script_parser, seed_everything, write_json

TASK = "attention_viz"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("what to ask")
    # fmt: off
    g.add_argument("--image", metavar="FILE", help="PNG, JPEG, TIFF, .npy or DICOM")
    g.add_argument("--question", default="Is there a pleural effusion?",
        help="a question that yes or no answers (%(default)s)")
    g.add_argument("--finding", default="", metavar="WORDS",
        help="words of the question that name what is asked about, for --query finding")
    g = parser.add_argument_group("models")
    g.add_argument("--models", "--model", nargs="+", default=PAIR, metavar="NAME",
        help="hub names, folders or tiny (the tiny pair) (%(default)s)")
    g.add_argument("--quant", default="none", choices=QUANTS, help="weights in 4 or 8 bit (%(default)s)")
    g.add_argument("--max-new-tokens", type=bounded(int, 1, 4096), default=64, metavar="TOKENS",
        help="longest answer (%(default)s)")
    g = parser.add_argument_group("maps")
    g.add_argument("--methods", nargs="+", default=["mean", "relative", "gradient_weighted"], choices=list(METHODS),
        help="which maps (%(default)s)")
    g.add_argument("--query", default="last", choices=["last", "finding", "answer"],
        help="row of the attention: the token that predicts the answer, the finding's words, or the answer's own "
        "tokens (%(default)s)")
    g.add_argument("--head-mode", default="mean", choices=["mean", "max", "per-head"],
        help="the attention map over heads; per-head adds a picture of each layer and head (%(default)s)")
    g.add_argument("--colormap", default="hot", help="a colour map of matplotlib (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.dry_run:
        args.device, args.models = "cpu", ["tiny"]
    elif args.image is None:
        parser.error("give one --image and a --question (or --dry-run)")
    if not 1 <= len(args.question.strip()) <= LONGEST:
        parser.error(f"--question must have 1 to {LONGEST} characters, not {len(args.question.strip())}")
    check_colormap(args.colormap)
    if args.query == "finding" and not (args.finding.strip() and args.finding.lower() in args.question.lower()):
        parser.error("--query finding needs --finding: words of the --question")
    args.models = TINY_PAIR if args.models == ["tiny"] else args.models
    args.methods = list(dict.fromkeys("max" if (m, args.head_mode) == ("mean", "max") else m for m in args.methods))
    if "heads" in args.methods:
        parser.error("heads are chosen on calibration patients: run attention_viz/evaluate.py for that map")
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    image, phantom = read(args)
    for name in args.models:
        find_model(name)  # is the second one there? Not to be found out when the first is done
    run_dir, records, panels, all_heads = None, [], [], {}
    for name in args.models:
        vlm = load_vlm(name, quant=args.quant, device=device)
        run_dir = run_dir or open_run_dir(args, TASK, "infer")
        record, maps, heads = look(vlm, image, args)
        number = len(records)
        told = f"{record['answer']}, margin {record['margin']:+.2f} nats{', untrained' * vlm.tiny}"
        print(f"  {name}: {told}; wrote: {record['text'][:150]!r}")
        if "note" in record:
            print(f"    {record['note']}")
        for method, found in maps.items():
            if found.values is None:
                print(f"    {method}: no map ({found.status})")
                continue
            path = record["maps"][method]["picture"] = f"overlays/{number}_{vlm.family}_{method}.png"
            with atomic_file(run_dir / path) as file:
                picture = Image.fromarray(overlay(image, found, args.colormap))
                if phantom:
                    ImageDraw.Draw(picture).text((3, 3), "PHANTOM", "white", stroke_width=1, stroke_fill="black")
                picture.save(file, "PNG")
        if heads is not None:
            all_heads[name, run_dir / "figures" / f"heads_{number}_{vlm.family}.png"] = heads
        records.append(record)
        panels.append((f"{shortened(name, 30)}\n{told}", maps))
        del vlm
        free_gpu()
    write_json(run_dir / "record.json", {
        "image": args.image, "question": args.question, "query": args.query, "phantom": phantom, "models": records,
        **run_facts(started, device),
    })  # fmt: skip
    for (name, path), heads in all_heads.items():
        draw_heads(heads, path, args, name, phantom)
    draw_panels(image, panels, run_dir / "figures" / "maps.png", args, phantom)
    if phantom:
        print(f"*** {PHANTOM} ***")
    print(f"a map says where attention or influence lay, not why the model answered; results in {run_dir}")


def read(args):
    """-> (uint8 image, is it a phantom?)."""
    if args.image is None:
        return phantom_study(args.seed, 3, 224).image, True
    try:
        return read_pixels(args.image), False
    except InputError as error:
        raise InputError(f"{args.image}: {error}") from error


def learned_from_phantom(folder):
    """Does a training.json beside the model say that it was trained on the phantom?"""
    path = Path(folder) / "training.json"
    told = read_json(path) if path.is_file() else {}
    told = told.get("dataset", told)
    return isinstance(told, dict) and told.get("phantom") is True


def look(vlm, image, args):
    """-> (record for record.json, {method: Map}, rows (layers, heads, h, w) for --head-mode per-head or None)."""
    case = ask(vlm, image, args.question, finding=args.finding)
    maps = {method: attention_map(case, method, args.query) for method in args.methods}
    text = write(vlm, make_prompts(vlm, [args.question], [image]), args.max_new_tokens)[0]
    record = vlm.facts() | {"answer": case.answer, "margin": case.margin, "text": text, "grid": case.grid,
                            "view": case.view}  # fmt: skip
    if vlm.tiny:
        record["note"] = "an untrained tiny model: its answer and its maps mean nothing"
    elif learned_from_phantom(vlm.name):
        record["note"] = "trained on films drawn by this project: what it says of a real one means nothing"
    record["maps"] = {}
    for method, found in maps.items():
        values = None if found.values is None else found.values.round(6)
        query = args.query if method in (*OF_ROWS, "rollout", "gradient_weighted") else None
        record["maps"][method] = {"status": found.status, "query": query, "image_mass": found.image_mass,
                                  "values": values, "picture": None}  # fmt: skip
    rows = case.rows.get(args.query) if args.head_mode == "per-head" else None
    return record, maps, None if rows is None else rows.reshape(*rows.shape[:2], *case.grid)


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_panels(image, panels, path, args, phantom):
    """A line per model: the image, then its maps; what has no map shows its status."""
    count = 1 + len(args.methods)
    size = (2.6 * count, 2.9 * len(panels) + 0.4)
    figure, axes = plt.subplots(len(panels), count, figsize=size, layout="constrained", squeeze=False)
    for line, (title, maps) in zip(axes, panels, strict=True):
        line[0].imshow(image, cmap="gray")
        line[0].set_title(title, fontsize=7)
        for axis, (method, found) in zip(line[1:], maps.items(), strict=True):
            if found.values is None:
                axis.text(0.5, 0.5, f"no map:\n{found.status}", ha="center", va="center", transform=axis.transAxes)
            else:
                axis.imshow(overlay(image, found, args.colormap))
            axis.set_title(method, fontsize=8)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    save_figure(figure, path, args.question, phantom)


def draw_heads(rows, path, args, name, phantom):
    """rows (layers, heads, h, w): each layer a line, each head a column; each map has its own scale."""
    layers, heads, height, width = rows.shape
    low, high = rows.min((2, 3), keepdims=True), rows.max((2, 3), keepdims=True)
    maps = (rows - low) / np.maximum(high - low, 1e-12)
    maps = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)  # a line between them
    whole = maps.transpose(0, 2, 1, 3).reshape(layers * (height + 1), heads * (width + 1))
    size = (max(4, 0.7 * heads), max(2, 0.7 * layers) + 0.6)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(whole, cmap=args.colormap)
    axis.set_facecolor("0.6")  # between the maps: no colour of theirs
    axis.set_xticks(np.arange(heads) * (width + 1) + width / 2, range(heads), fontsize=7)
    axis.set_yticks(np.arange(layers) * (height + 1) + height / 2, range(layers), fontsize=7)
    save_figure(figure, path, f"{name}: layers down, heads across; {args.question}", phantom)


if __name__ == "__main__":
    main()
