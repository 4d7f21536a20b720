"""
What the reward can be made of, before the first step: on how many rows each of its terms is defined, and regions that a
user gives to rows that have none.

    add_regions(rows, "regions.csv")                       # image or id, x0, y0, x1, y1, and where wanted question
    weights, lines = settle_terms(rows, RewardSettings())  # lines: a table and what follows from it, to be printed
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
import os
from collections import Counter
from pathlib import Path

from shared.data.text import read_table
from shared.report import markdown_table
from shared.runtime import InputError
from vqa_sft_grpo.counterfactual import LARGEST, SMALLEST, region_mask, whole_boxes
from vqa_sft_grpo.looking import nothing_to_take_out
from vqa_sft_grpo.prompting import parse_response
from vqa_sft_grpo.rewards import DEFAULT_WEIGHTS, TERMS, answer_type_of, box_term
from vqa_sft_grpo.rows import NO_PLACE
from vqa_sft_grpo.scoring import normalise

# ------------------------------------------------------------------------------------------------------------ the terms


def v_is_defined(row):
    """
    Is there a region to take out (where nothing is there to take out: one lent by another row), small enough to leave
    room for random ones? Whether there is room for all of them is seen at the step, on the image itself.
    """
    width, height = row["width"], row["height"]
    boxes = row.get("region")
    if nothing_to_take_out(row):
        boxes = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in row.get("lent") or ()]
    whole = whole_boxes(boxes, height, width)
    return bool(whole) and SMALLEST <= region_mask(whole, height, width).mean() <= LARGEST


def parts_of(row, style):
    """-> {part of the reward: is it defined on this row?}."""
    closed, nothing = answer_type_of(row) == "closed", parse_response("", style)
    return {
        "answer, closed": closed,
        "answer, open": not closed,
        "box": style == "json" and box_term(row, nothing)[0] is not None,
        "V": v_is_defined(row),
        "text against the answer": True,
        "text against the truth": row.get("findings") is not None,
    }


TERM_OF = {  # part -> the term of --weights that it belongs to
    "answer, closed": "answer",
    "answer, open": "answer",
    "box": "consistency",
    "V": "counterfactual",
    "text against the answer": "consistency",
    "text against the truth": "consistency",
}
WHY = {
    "box": "no row has a gold region that is less than most of its image, or the prompt asks for none",
    "V": "no row has a gold region of a size that can be taken out",
    "text against the truth": "no row says what its image shows, so nobody knows whether a caption is true",
}


def settle_terms(rows, settings):
    """
    rows: those to train on, with what lend_regions lent them -> (weights, lines to print, facts for metrics.json).

    A term of weight above 0 that is defined on no row would be silent. Where its weight is another than the default it
    was asked for, and InputError says so; a default weight becomes 0, by name.
    """
    found, style = [parts_of(row, settings.style) for row in rows], settings.style
    counts = {part: sum(f[part] for f in found) for part in TERM_OF}
    weights = dict(zip(TERMS, settings.weights, strict=True))
    dead, lines = [], []
    for term, default in zip(TERMS, DEFAULT_WEIGHTS, strict=True):
        parts = [part for part, of in TERM_OF.items() if of == term]
        absent = [part for part in parts if not counts[part]]
        if not weights[term] or term == "answer":
            continue
        if parts and absent == parts:
            why = "; ".join(WHY[part] for part in parts)
            if weights[term] != default:
                raise InputError(
                    f"--weights asks for {weights[term]:g} of {term}, which is defined on none of the {len(rows)} rows:"
                    f" {why}; give it the weight 0, or regions with --regions FILE"
                )
            lines.append(f"*** {term} is dropped, its weight is 0 in this run: {why} ***")
            dead.append(term)
        else:
            lines += [f"*** {part} is no part of {term} in this run: {WHY[part]} ***" for part in absent]
    weights |= dict.fromkeys(dead, 0.0)
    names = [part for part, term in TERM_OF.items() if weights[term] and counts[part] and term != "answer"]
    kinds = Counter(" + ".join(["answer", *(part for part in names if f[part])]) for f in found)
    table = [
        [part, f"{weights[term]:g}", f"{counts[part]:,}", f"{counts[part] / len(rows):.0%}"]
        for part, term in TERM_OF.items()
    ]
    head = ["part of the reward", "weight of its term", f"rows of {len(rows):,}", "share"]
    made = ", ".join(f"{kind} on {n:,} ({n / len(rows):.0%})" for kind, n in kinds.most_common())
    lines = [markdown_table(head, table), *lines, f"so the reward, behind the gate of the {style} form, is: {made}"]
    return (
        tuple(weights.values()),
        lines,
        {"rows": len(rows), "defined": counts, "reward": dict(kinds), "dropped": dead},
    )


# ---------------------------------------------------------------------------------------------------------- the regions

CORNERS = ("x0", "y0", "x1", "y1")


def add_regions(rows, path):
    """
    Gives rows the boxes of a CSV as their gold region, in place of any that they have; changes them -> number of rows.

    A line: image (file name, with as much of its path as tells it from others) or id of a row; x0, y0, x1, y1 in pixels
    of the stored image; question, where the box is for that question only. Lines about the same are one region of
    several boxes; a question's own lines come before those of its image. A line without question leaves out questions
    that no place in the image settles (modality, plane, knowledge). InputError, one sentence: a column missing, an
    image, id or question that no row has, a name that several images have, a box outside of its image.
    """
    by_image, boxes = {}, {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    endings = {image: Path(image).parts for image in by_image}
    lines = read_table(path, CORNERS, "--regions ", ("image", "id", "question"))
    if lines and not {"image", "id"} & set(lines[0][1]):
        raise InputError(f"--regions {path} lacks the column image or id; it has {', '.join(lines[0][1])}")
    for number, line in lines:
        where = f"{path}, line {number}"
        key, some = rows_of(line, rows, by_image, endings, Path(path).parent, where)
        if question := " ".join(normalise(line.get("question"))):
            some = [row for row in some if " ".join(normalise(row["question"])) == question]
            if not some:
                raise InputError(f"{where}: no row asks {line['question']!r} about {key}")
        boxes.setdefault((key, question), (some, []))[1].append(box_of(line, some[0], where))
    changed = {}
    for (key, question), (some, found) in sorted(boxes.items(), key=lambda item: bool(item[0][1])):
        for row in some:
            by_id = key == row["id"]
            if question or by_id or not (row.get("needs_image") is False or row["content_type"] in NO_PLACE):
                row["region"] = found
                changed[id(row)] = True
    print(f"{path}: {sum(len(found) for _, found in boxes.values())} boxes for {len(changed)} rows")
    return len(changed)


def rows_of(line, rows, by_image, endings, folder, where):
    """-> (id or image, the rows that a line is about)."""
    if name := line.get("id"):
        some = [row for row in rows if row["id"] == name]
        if not some:
            raise InputError(f"{where}: no row has the id {name!r}")
        return name, some
    name = line.get("image", "")
    parts = Path(name.replace("\\", "/")).parts
    exact = os.path.normpath(folder.resolve() / name)
    found = [exact] if exact in by_image else [i for i, of in endings.items() if parts and of[-len(parts) :] == parts]
    if len(found) != 1:
        told = "no row is about the image" if not found else f"{len(found)} images are called"
        raise InputError(f"{where}: {told} {name!r}" + "; give more of its path" * (len(found) > 1))
    return found[0], by_image[found[0]]


def box_of(line, row, where):
    """-> [x0, y0, x1, y1] of a line, inside the image of the row."""
    try:
        box = [float(line[name]) for name in CORNERS]
    except ValueError:
        box = [math.nan]
    if not all(map(math.isfinite, box)) or max(box) <= 1:
        raise InputError(f"{where}: x0, y0, x1, y1 must be four numbers of pixels, not shares of the image")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= row["width"] and 0 <= y0 < y1 <= row["height"]):
        told = ", ".join(f"{n:g}" for n in box)
        raise InputError(
            f"{where}: the box {told} must lie inside of the image, {row['width']} x {row['height']} pixels, with"
            " x0 < x1 and y0 < y1"
        )
    return box
