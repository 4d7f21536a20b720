"""
Show where each query of a trained CheXQuery looked, and what the decoder looked at for each word it wrote.

Usage:
    python chexquery/visualize.py --checkpoint outputs/chexquery/train/001 --images docs/phantom_film.png
    python chexquery/visualize.py --checkpoint RUN --data phantom --studies 3      # with the boxes that were drawn

Maps belong to the text shown: it is written once, and its own ids go through the decoder again to read the attention.
The decoder's map of a word is its cross-attention to the visual tokens, carried on through the pooling to the condition
and region queries and through their attention to the patches; the global token has no place and is left out, its share
is said. Conditions are ranked by probability, never by how much attention they get.
Writes to the run folder: report.md, report.html, figures/*.png, maps.npz, metrics.json (deletion for every film;
pointing where lesions are known).
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

from chexquery.cases import REGIONS, VIEWS, Films, add_file_options, phantom_rows, read_files, study_of
from chexquery.checkpoints import MADE_UP, add_writing_options, open_model
from chexquery.faithfulness import KINDS, deletion, maps_of, pointing, pointing_summary
from shared.metrics.labels import CONDITIONS
from shared.report import Report, number, percent, save_figure, short_path
from shared.runtime import atomic_file, bounded, open_run_dir, run_facts, script, script_parser, seed_everything
from shared.runtime import write_csv, write_json

TASK = "chexquery"
MOST = 40  # words of a report that are drawn; maps.npz holds all


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("what is shown")
    add_writing_options(g)
    add_file_options(g)
    # fmt: off
    g.add_argument("--data", choices=["phantom"], help="phantom: test films like those it was trained on")
    g.add_argument("--studies", type=bounded(int, 1, 1000), default=3, help="phantom: how many (%(default)s)")
    g.add_argument("--kind", default="attention", choices=KINDS, help="of maps (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.device, args.studies = "phantom", "cpu", 1
    if bool(args.images or args.lateral) == bool(args.data):
        parser.error("give --images FILE ... (--lateral FILE ...) or --data phantom, one of the two")
    return args


def films_of(args, model, told):
    """-> (rows, images uint8 (N, 2, S, S), present bool (N, 2), rows of errors.csv, drawn settings or None)."""
    if not args.data:
        return *read_files(args, model.image_size, told["data"]["views"]), None
    drawn, views = told["data"]["drawn"] or {}, told["data"]["views"]
    seed = told["data"]["again"].get("phantom_seed", 0)
    rows = phantom_rows(8 * args.studies, seed, **drawn).split("test")
    rows = [row for row in rows if row["labels"]["No Finding"] != 1][: args.studies] or rows[: args.studies]
    images, present = Films(rows, model.image_size, drawn, views).get(list(range(len(rows))))
    return rows, images, present, [], drawn


def word_maps(model, seen, ids, maps):
    """
    ids (L,) of one written report, seen and maps of its study alone -> (words, maps (W, V, g, g), share of attention on
    the global token (W,)). A word's map is the mean over its pieces, all layers and heads of the decoder. Nothing for
    an empty report, nor without pooling: then the text has the global token alone, which has no place.
    """
    ids = ids[(ids != model.tokenizer.pad_token_id) & (ids != model.tokenizer.eos_token_id)]
    if not len(ids) or seen.pooling is None:
        return [], np.zeros((0, *maps.shape[2:])), None
    full = torch.tensor([*model.prompt_ids, *ids.tolist()], device=ids.device)[None]
    with torch.no_grad():
        attention = model.decoder_logits(seen.tokens, full, attention=True)[1]
    attention = torch.stack(attention).mean((0, 2))[0, len(model.prompt_ids) :].float()  # (L, T)
    places = torch.einsum("lq,qvgh->lvgh", attention[:, 1:] @ seen.pooling[0].float(), maps[0])
    words, spans = [], []
    for i, piece in enumerate(model.tokenizer.convert_ids_to_tokens(ids.tolist())):
        if piece.startswith("▁") or not words:
            words.append(piece.lstrip("▁"))
            spans.append([i])
        else:
            words[-1] += piece
            spans[-1].append(i)
    return words, torch.stack([places[s].mean(0) for s in spans]), torch.stack([attention[s, 0].mean() for s in spans])


def overlay(axis, image, map_, boxes=(), title=""):
    """A map over its film: film in grey, map in red where it is high, relative to its own maximum."""
    size = image.shape[0]
    axis.imshow(image, cmap="gray", vmin=0, vmax=255)
    heat = map_ / max(map_.max(), 1e-12)
    axis.imshow(
        heat, cmap="inferno", alpha=0.5 * heat / max(heat.max(), 1e-12), extent=(0, size, size, 0), vmin=0, vmax=1
    )
    for x0, y0, x1, y1 in boxes:
        axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="cyan", linewidth=1))
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def grid_figure(panels, columns, image_of):
    """panels: (view, map, boxes, title) -> a figure with as many rows as it takes."""
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1.75 * columns, 1.95 * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (view, map_, boxes, title) in zip(axes.flat, panels, strict=False):
        overlay(axis, image_of(view), map_, boxes, title)
    return figure


def show_study(n, row, images, present, model, seen, maps, text, ids, drawn, run_dir, report, phantom):
    """Figures and text of one study into the report -> its maps for maps.npz."""
    report.heading(f"Study {row['uid']}")
    report.text(text or "(nothing was written)")
    boxes = {}
    if drawn is not None:
        study = study_of(row, drawn, model.image_size)
        for f in study.drawn:
            boxes.setdefault(f.condition, []).extend(study.boxes[f.name])
        report.text(f"What was drawn: {', '.join(f.name for f in study.drawn) or 'nothing'}.")

    def picture(name, panels, columns, title, caption):
        figure = grid_figure(panels, columns, lambda view: images[view])
        report.figure(save_figure(figure, run_dir / "figures" / f"study{n}_{name}.png", title, phantom), caption)

    numbers = maps[0].cpu().numpy()
    views = [v for v in range(len(VIEWS)) if present[v]]
    if seen.logits is not None:
        chances = seen.logits[0].sigmoid().tolist()
        ranked = sorted(range(len(CONDITIONS)), key=lambda k: -chances[k])
        for view in views:
            panels = [(view, numbers[k, view], () if view else boxes.get(CONDITIONS[k], ()),
                       f"{CONDITIONS[k]}\np = {chances[k]:.2f}") for k in ranked]  # fmt: skip
            title = f"Condition queries, {VIEWS[view]}"
            caption = f"Condition queries on the {VIEWS[view]} film, most probable first; box: what was drawn."
            picture(f"conditions_{VIEWS[view]}", panels, 7, title, caption)
    regions = [q for q, name in enumerate(model.names) if name in REGIONS]
    if regions:
        panels = [(v, numbers[q, v], (), f"{model.names[q]}\n{VIEWS[v]}") for v in views for q in regions]
        picture("regions", panels, 6, "Region queries", "Region queries.")
    words, places, whole = word_maps(model, seen, ids, maps)
    if seen.pooling is None:
        report.text("No maps of words: this model writes from the global token alone, which has no place on the film.")
    if words:
        places, view = places.cpu().numpy(), views[0]
        panels = [(view, places[i, view], (), w if len(w) < 18 else w[:16] + "…") for i, w in enumerate(words[:MOST])]
        shown = f"the first {MOST} of {len(words)} words" if len(words) > MOST else "each word"
        share = float(whole[:MOST].mean())
        caption = f"The decoder's cross-attention for {shown}; {share:.0%} of it went to the global token."
        if len(views) > 1:
            caption += f" On the {VIEWS[view]} film; maps.npz holds both views."
        if len(words) > 1:
            alike = np.corrcoef(places.reshape(len(words), -1))[np.triu_indices(len(words), 1)].mean()
            caption += f" Maps of two words correlate by {alike:.2f} on average: near 1 they tell no word apart."
        picture("words", panels, min(10, len(panels)), f"The decoder, word by word, {VIEWS[view]}", caption)
    return {f"study{n}_queries": numbers, f"study{n}_words": places}


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    model, told, decoding = open_model(args)
    device = told["device"]
    rows, images, present, errors, drawn = films_of(args, model, told)
    run_dir = open_run_dir(args, TASK, "visualize")
    phantom, x, there = drawn is not None, torch.from_numpy(images).to(device), torch.from_numpy(present).to(device)
    with torch.no_grad():
        looked = model.look(x, there)
    scores = {}
    if model.num_conditions:
        thresholds = told["thresholds"] or [0.5] * len(CONDITIONS)
        rng = np.random.default_rng(args.seed)
        scores["deletion"] = deletion(model, x, looked, there, rows, thresholds, rng)
    if phantom and present[:, 0].all():
        rng = np.random.default_rng(args.seed)
        scores["pointing"] = pointing_summary(pointing(model, rows, x, looked, there, drawn, rng))
    facts = {"phantom": phantom, "n": len(rows), "n_errors": len(errors), "kind": args.kind}
    facts |= {"checkpoint": told["path"], "trained_on_phantom": told["data"]["phantom"]}
    write_json(run_dir / "metrics.json", facts | scores | run_facts(started, device))
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    warnings = [MADE_UP] * (told["data"]["phantom"] and not phantom)
    report = Report("CheXQuery: where the queries looked", phantom, warnings)
    report.text(f"Checkpoint `{short_path(told['path'])}`; maps: {args.kind}.")
    arrays = {}
    for n, row in enumerate(rows):
        part, one = [p[n : n + 1] for p in looked], there[n : n + 1]
        seen, maps = maps_of(model, part, one, args.kind, x[n : n + 1])
        with torch.no_grad():
            seen = model(looked=part, present=one, maps=True)
            texts, ids = model.write(seen.tokens, **decoding)
        arrays |= show_study(
            n + 1, row, images[n], present[n], model, seen, maps, texts[0], ids[0], drawn, run_dir, report, phantom
        )
        print(f"{row['uid']}: {texts[0] or '(nothing was written)'}")
    if "deletion" in scores:
        report.heading("Deletion: a tenth of the patches erased, fall of the condition's logit")
        keys, head = ("own", "other", "random"), ["study", "condition", "ranked by its own map", "by another query's"]
        report.table(
            [*head, "random patches"],
            [[c["study"], c["condition"], *(number(c[f"{k}_drop"], 2) for k in keys)] for c in scores["deletion"]],
        )
    if "pointing" in scores:
        report.heading("Pointing")
        lines = [[what, name, row["hit"]["n"], percent(row["hit"]["value"]), percent(row["area"]["value"])]
                 for what, names in scores["pointing"][args.kind].items() for name, row in names.items()]  # fmt: skip
        report.table(["queries", "", "cases", "hits, %", "chance, %"], lines)
    report.write(run_dir, page=True)
    with atomic_file(run_dir / "maps.npz") as file:
        np.savez_compressed(file, **arrays)
    print(f"{len(errors)} films left out; results in {run_dir} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()
