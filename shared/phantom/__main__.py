"""
A labelled gallery of the phantom: films, findings with their boxes, side views, reports.

Usage:
    python -m shared.phantom --preview
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from shared.phantom.findings import ORDER, SEVERITIES
from shared.phantom.study import PhantomSettings, phantom_study
from shared.runtime import script


def preview(folder, seed=0, size=320):
    """
    Write a gallery: normal.png, findings.png (each kind in three severities, with its box), lateral.png, reports.md.

    Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def sheet(tiles, columns):
        rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
        return Image.fromarray(np.vstack(rows))

    def labelled(image, text, boxes=()):
        picture = Image.fromarray(image).convert("RGB")
        pen = ImageDraw.Draw(picture)
        for x0, y0, x1, y1 in boxes:
            pen.rectangle([x0, y0, x1 - 1, y1 - 1], outline=(255, 70, 70))
        pen.rectangle([0, size - 14, size, size], fill=(0, 0, 0))
        pen.text((3, size - 13), text, fill=(255, 230, 120))
        return np.asarray(picture)

    healthy = PhantomSettings(normal=1.0)
    tiles = [phantom_study(seed, 8 * i, size, healthy) for i in range(8)]
    sheet([labelled(s.image, f"normal, {s.study_id}") for s in tiles], 4).save(folder / "normal.png")

    tiles = []
    for name in ORDER:
        settings = PhantomSettings(prevalence={name: 1.0}, together={}, normal=0.0)
        found = {}
        for i in range(0, 1200, 8):  # one visit per patient
            study = phantom_study(seed, i, size, settings)
            for f in study.truth:
                found.setdefault(f.kind, {}).setdefault(f.severity or str(len(found[f.kind])), (study, f))
        for kind in sorted(found):
            shown = sorted(found[kind].items(), key=lambda item: (SEVERITIES + (item[0],)).index(item[0]))[:3]
            shown += shown[-1:] * (3 - len(shown))
            for _, (study, f) in shown:
                label = f"{name}: {f.name} {f.severity}" if name.lower() not in f.name else f"{f.name} {f.severity}"
                tiles += [labelled(study.image, label), labelled(study.image, "its box", study.boxes[f.name])]
    sheet(tiles, 6).save(folder / "findings.png")

    ill = PhantomSettings(normal=0.0)
    studies = [phantom_study(seed, 8 * i, size, ill) for i in range(8)]
    tiles = []
    for s in studies:
        names, boxes = ", ".join(f.name for f in s.truth) or "nothing", [b for some in s.boxes.values() for b in some]
        tiles += [labelled(s.image, names, boxes), labelled(s.lateral, s.study_id)]
    sheet(tiles, 4).save(folder / "lateral.png")

    lines = ["# Phantom: made-up studies, no patients", ""]
    for s in studies:
        r, names = s.report, ", ".join(f"{f.name} ({f.severity})" for f in s.truth) or "nothing"
        lines += [f"## {s.study_id}", "", f"Drawn: {names}.", ""]
        lines += [f"*Indication:* {r.indication} *Comparison:* {r.comparison}", ""]
        lines += [f"*Findings:* {r.findings}", "", f"*Impression:* {r.impression}", ""]
        lines += ["States: " + ", ".join(f"{k} {v}" for k, v in r.labels.items() if v is not None) + ".", ""]
        for q in s.questions:
            last, where = q.paraphrases[-1], q.region_name or "no place"
            lines.append(f"* {q.text} {q.answer} ({q.kind}, look at: {where}). {last.text} {last.answer}")
        lines.append("")
    (folder / "reports.md").write_text("\n".join(lines), encoding="utf-8")
    return folder


@script
def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m shared.phantom", description=__doc__, formatter_class=form)
    parser.add_argument("--preview", action="store_true", help="write the gallery")
    parser.add_argument("--out-dir", default="outputs/phantom", help="folder to write to (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which hospital, a whole number >= 0 (%(default)s)")
    parser.add_argument("--size", type=int, default=320, help="pixels per side, 28 to 512 (%(default)s)")
    args = parser.parse_args(argv)
    if not args.preview:
        parser.error("nothing to do: give --preview")
    if args.seed < 0 or not 28 <= args.size <= 512:
        parser.error("--seed must be >= 0, --size between 28 and 512 pixels")
    print("gallery in", preview(args.out_dir, args.seed, args.size))


if __name__ == "__main__":
    main()
