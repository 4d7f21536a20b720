"""
The rows that training and evaluation read: made of VQA-RAD, SLAKE or the phantom, written to a file and read again.

    rows, audit = make_rows("slake", "all", data_dir)          # what a split policy leaves of a data set
    write_rows("data/slake.json", rows)
    rows = read_rows("data/slake.json", ("train", "val"))      # checked, with absolute image paths

A row:
    instruction, input, output   task text, question, and what to answer: a JSON text with those of caption, reasoning,
                                 boxes and answer that the data set knows. Nothing is made up: VQA-RAD has no boxes and
                                 no reasoning.
    image, question, answer      path (relative to the file where the image lies below it), and the two texts as
                                 published
    id, dataset, split, group    group: the image, cluster of near-identical images, or phantom patient: the unit of
                                 splits and intervals
    answer_type                  "closed" (yes or no, one of several) or "open"
    question_type                VQA-RAD: PRES, ABN, ...; SLAKE: vqa, kvqa; phantom: yes_no, choice, open
    content_type                 VQA-RAD: CHEST, ABD, HEAD; SLAKE: Organ, Position, ..., KG; phantom: presence, side,
                                 zone, size, ...
    needs_image                  false where the image does not matter (SLAKE's knowledge questions; modality and view
                                 of the phantom, which are always the same); null: not known (VQA-RAD)
    region                       gold boxes [[x0, y0, x1, y1]] in pixels of the stored image that the answer needs, or
                                 null
    width, height                of the image, pixels
    redrawn, redrawn_other       validation and test rows of the phantom whose answer is yes to a condition: the same
                                 film drawn without what the question asks about, and without another finding (where
                                 there is one): the same patient, position and noise, and no trace of an edit
    policy, overlap              the split policy, and whether it lets images of the test set into training
"""

import json
import os
from collections import Counter
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
from PIL import Image

from shared.data.audit import RowSet, conflicts, frames_in, plain_text, repeats, reworded, seen, shared_between_splits
from shared.data.audit import similar_images, split_groups, values_of
from shared.data.download import DataNotFound
from shared.metrics.labels import PARENTS
from shared.phantom import DEFAULT, PREVALENCE, TOGETHER, PhantomSettings, phantom_study
from shared.phantom.findings import LEVELS, ORDER
from shared.phantom.words import NOUNS, SIZES, SUMMARY
from shared.runtime import InputError, atomic_file, write_jsonl
from vqa_sft_grpo import sources as vqa
from vqa_sft_grpo.prompting import FIELDS, instruction
from vqa_sft_grpo.scoring import normalise

NAMES = ("vqa_rad", "slake", "both", "phantom", "auto")
POLICIES = {
    "clean-train": "clean_train",
    "image-disjoint": "image_disjoint",
    "official-noframe": "no_frames",
    "official": "official",
}
SPLITS = {"train": ("train", "val"), "val": ("val",), "test": ("test",), "all": ("train", "val", "test")}
VAL_SHARE = 0.1
PHANTOM_STUDIES = {"train": 1000, "val": 100, "test": 300}
PHANTOM_START = {
    "train": 0,
    "val": 8_000_000,
    "test": 16_000_000,
}  # far apart and multiples of eight: no patient is in two splits
SHARED_FIELDS = ("id", "dataset", "split", "question", "answer_type", "group")
ROW_FIELDS = (
    *SHARED_FIELDS,
    "instruction",
    "input",
    "output",
    "image",
    "answer",
    "question_type",
    "content_type",
    "region",
    "width",
    "height",
    "policy",
)
REDRAWN = ("redrawn", "redrawn_other")
FILMS = ("image", *REDRAWN)  # fields with a path
GRPO_FIELDS = ("image_path", "question", "gold")


# --------------------------------------------------------------------------------------------------------- all the rows


def make_rows(
    data,
    split="train",
    data_dir="data",
    policy="clean-train",
    seed=0,
    image_dir=None,
    studies=None,
    image_size=112,
    settings=DEFAULT,
    limit=None,
):
    """
    -> (rows as described above, with absolute image paths; audit, a dict of plain numbers and ids).

    data: a name of NAMES; split: a key of SPLITS; policy: a key of POLICIES ("official" without further question).
    image_dir: where phantom films are written; studies, image_size, settings: see phantom_rows. limit: the first so
    many rows of each split of each data set. InputError when the data are not there or nothing is left.
    """
    if data not in NAMES or split not in SPLITS or policy not in POLICIES:
        raise InputError(
            f"there is no data '{data}', split '{split}' or policy '{policy}'; there are {', '.join(NAMES)};"
            f" {', '.join(SPLITS)}; {', '.join(POLICIES)}"
        )
    sets, absent = [], []
    for name in {"both": ("vqa_rad", "slake"), "auto": ("vqa_rad", "slake"), "phantom": ()}.get(data, (data,)):
        try:
            sets.append(load(name, data_dir, policy, seed))
        except DataNotFound as error:
            if data != "auto":
                raise
            absent.append(str(error))
    if sets:
        return real_rows(sets, split, policy, limit, absent)
    if data == "auto":
        print(
            f"*** {data_dir} has neither VQA-RAD nor SLAKE: these rows are of the PHANTOM, made-up films of no"
            " patients ***"
        )
    return phantom_rows(split, seed, Path(image_dir or "phantom_images"), studies, image_size, settings, limit)


def load(name, data_dir, policy, seed):
    """One real data set under a policy -> RowSet."""
    if name == "vqa_rad":
        return vqa.load_vqa_rad(
            data_dir, policy=POLICIES[policy], val_share=0.0 if policy == "image-disjoint" else VAL_SHARE, seed=seed
        )
    found = vqa.load_slake(data_dir)
    found.rows, n = [row for row in found.rows if row["answer"]], len(found.rows)  # qid 1622 has none
    found.left_out["no answer"] = n - len(found.rows)
    if policy == "image-disjoint":
        clusters = similar_images({row["image_id"]: row["image_path"] for row in found.rows})["similar"]
        group_of = {image: group[0] for group in clusters for image in group}
        for row in found.rows:
            row["image_group"] = group_of.get(row["image_id"], row["image_id"])
        split_of = split_groups([row["image_group"] for row in found.rows], vqa.SHARES, seed)
        for row in found.rows:
            row["split"] = split_of[row["image_group"]]
    found.version += f", policy {policy}"
    return found


def real_rows(sets, split, policy, limit, absent=()):
    """
    RowSets -> (rows, audit). Near-identical images across splits and data sets are looked for, and taken out of
    training where the policy says so.
    """
    images = {(row["dataset"], row["image_id"]): row["image_path"] for found in sets for row in found.rows}
    copies = similar_images(images)
    group_of = {image: group[0] for group in copies["similar"] for image in group}
    tested = {
        group_of.get(key, key)
        for found in sets
        for row in found.rows
        if row["split"] == "test"
        for key in [(row["dataset"], row["image_id"])]
    }
    sizes = {}
    for key, path in images.items():
        if key not in copies["unreadable"]:
            with Image.open(path) as image:
                sizes[key] = image.size
    for found in sets:
        found.left_out |= {"image cannot be read": 0, "near copy of a test image": 0}
        kept = []
        for row in found.rows:
            key = (row["dataset"], row["image_id"])
            row["copies"] = group_of.get(key, key)
            if key in copies["unreadable"]:
                found.left_out["image cannot be read"] += 1
            elif policy in ("clean-train", "image-disjoint") and row["split"] != "test" and row["copies"] in tested:
                found.left_out["near copy of a test image"] += 1
            else:
                kept.append(row)
        found.rows = kept
        if limit:
            found.limit(limit)
    audit = {
        "phantom": False,
        "policy": policy,
        "split": split,
        "absent": list(absent),
        "images": {k: v for k, v in copies.items() if k != "pairs"},
        "data": {found.name: audit_of(found) for found in sets},
    }
    every = [row for found in sets for row in found.rows]
    audit["near-identical images in two splits"] = shared_between_splits(every, "copies")
    audit["overlap"] = any(
        pair["shared"] for name, pair in audit["near-identical images in two splits"].items() if "test" in name
    )
    rows = []
    for found in sets:
        chosen = [row for row in found.rows if row["split"] in SPLITS[split]]
        if not chosen:
            reasons = ", ".join(f"{n}: {reason}" for reason, n in found.left_out.items() if n)
            audit["absent"].append(
                f"{found.name} has no {split} question with its image in {found.source} (left out:"
                f" {reasons or 'nothing'})"
            )
        rows += [real_row(row, sizes[row["dataset"], row["image_id"]], policy, audit["overlap"]) for row in chosen]
    if not rows:
        raise InputError(
            f"nothing to write: {'; '.join(audit['absent'])}; put the missing images there, or take another --split,"
            " --policy or --data"
        )
    audit["counts"] = counts_of(rows)
    return rows, audit


def real_row(row, size, policy, overlap):
    """A row of vqa_sft_grpo/sources.py -> ours."""
    slake = row["dataset"] == "slake"
    region = slake_region(row) if slake else None
    name = f"{row['dataset']}-{row['qid']}" + ("" if slake else f"-{row['phrase_type']}")
    return make_row(
        name,
        row["dataset"],
        row["split"],
        str(Path(row["image_path"]).resolve()),
        size,
        row["question"],
        row["answer"],
        row["answer_type"],
        ("vqa" if row["needs_image"] else "kvqa") if slake else row["question_type"],
        row["question_type"] if slake else row["organ"],
        row["needs_image"],
        f"{row['dataset']}/{row['image_group']}",
        region,
        {"caption": slake_caption(row) if slake else rad_caption(row), "boxes": region},
        policy,
        overlap,
    )


def make_row(
    name,
    dataset,
    split,
    image,
    size,
    question,
    answer,
    answer_type,
    question_type,
    content_type,
    needs_image,
    group,
    region,
    known,
    policy,
    overlap,
):
    """known: what the data set knows of caption, reasoning and boxes; None and "" are left out of the output."""
    target = {field: value for field in FIELDS if (value := (known | {"answer": answer}).get(field))}
    return {
        "id": name,
        "dataset": dataset,
        "split": split,
        "instruction": instruction("json", units="pixels"),
        "input": question,
        "output": json.dumps(target, ensure_ascii=False),
        "image": image,
        "question": question,
        "answer": answer,
        "answer_type": answer_type,
        "question_type": question_type,
        "content_type": content_type,
        "needs_image": needs_image,
        "group": group,
        "region": region,
        "width": size[0],
        "height": size[1],
        "policy": policy,
        "overlap": overlap,
    }


# -------------------------------------------------------------------------------------------------- what real sets know

RAD_BODY = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}
SLAKE_BODY = {
    "Brain_Tissue": "brain",
    "Brain_Face": "brain and face",
    "Chest_lung": "lungs in the chest",
    "Chest_heart": "heart in the chest",
    "Chest_mediastinal": "mediastinum in the chest",
}


def rad_caption(row):
    """VQA-RAD annotates the body part and nothing else about an image."""
    return f"Image of the {RAD_BODY[row['organ']]}." if row["organ"] in RAD_BODY else None


def slake_caption(row):
    """SLAKE annotates modality and body part."""
    place = SLAKE_BODY.get(row["organ"], str(row["organ"] or "").replace("_", " ").lower())
    return f"{row['modality']} of the {place}." if row["modality"] and place else None


NO_PLACE = ("Modality", "Plane", "KG")  # content types that no place in the image settles


def slake_region(row):
    """
    Boxes [[x0, y0, x1, y1]] of the annotated objects that question and triple name, or None: no box file, no object
    named, or a question about modality, plane or knowledge. For an open question that names none ("Which organ is
    abnormal?"), those that the answer names. "lung" means both lungs, "left lung" the left one; a side that is asked
    for ("left or right lung?") both.
    """
    if not row["boxes"] or row["question_type"] in NO_PLACE or not row["needs_image"]:
        return None
    texts = [f"{row['question']} . {' . '.join(row['triple'] or ())}"]
    if row["answer_type"] == "open":
        texts.append(row["answer"])
    for text in texts:
        tokens = normalise(text)
        sides = {"left", "right"} & set(tokens)
        boxes = []
        for entry in row["boxes"]:
            label = normalise(entry["organ"].replace("_", " "))
            side = {"left", "right"} & set(label)
            noun = [token for token in label if token not in side]
            named = noun and any(tokens[i : i + len(noun)] == noun for i in range(len(tokens)))
            if named and (not side or not sides or side & sides):
                boxes.append(entry["box"])
        if boxes:
            return boxes
    return None


# ------------------------------------------------------------------------------------------------------------- phantom


def phantom_settings(conditions=None, prevalence=None, severities=None):
    """The default hospital, or one that has only some conditions, each with the given chance, of these severities."""
    if conditions is None and prevalence is None and severities is None:
        return DEFAULT
    chosen = conditions or [name for name in ORDER if name in PREVALENCE]
    return PhantomSettings(
        prevalence={name: PREVALENCE[name] if prevalence is None else prevalence for name in chosen},
        together={pair: chance for pair, chance in TOGETHER.items() if set(pair) <= set(chosen)},
        severities=severities or LEVELS,
    )


def phantom_rows(split, seed, image_dir, studies=None, image_size=112, settings=DEFAULT, limit=None):
    """
    -> (rows, audit) of made-up films, written to image_dir as PNG. studies: films of the first split asked for; of
    "train" and "all", validation gets a tenth and test three tenths of that. A split's films do not depend on how many
    the others have.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    first = {"val": "val", "test": "test"}.get(split, "train")
    numbers = dict(PHANTOM_STUDIES)
    if studies is not None:
        numbers = {"train": studies, "val": max(1, studies // 10), "test": max(1, 3 * studies // 10)} | {first: studies}
    rows = []
    for part in SPLITS[split]:
        part_rows = []
        for number in range(numbers[part]):
            study = phantom_study(seed, PHANTOM_START[part] + number, image_size, settings)
            asked = phantom_study_rows(study, part, image_dir)
            if asked:
                save_film(study, asked[0]["image"])
            if part != "train":  # nothing is measured there
                for row, question in zip(asked, study.questions, strict=True):
                    row |= redrawn_films(study, question, row["image"])
            part_rows += asked
            if limit and len(part_rows) >= limit:
                break
        rows += part_rows[:limit]
    if not rows:
        raise InputError("these phantom studies have no questions; ask for more --studies")
    audit = {
        "phantom": True,
        "policy": "by patient",
        "split": split,
        "overlap": False,
        "absent": [],
        "seed": seed,
        "image_size": image_size,
        "settings_of_phantom": settings.key(),
        "groups in two splits": shared_between_splits(rows, "group"),
        "counts": counts_of(rows),
    }
    return rows, audit


def phantom_study_rows(study, split, image_dir):
    """The questions of one film as rows, with the film's truth as caption, reasoning and boxes."""
    path = image_dir.resolve() / f"{study.study_id}_{study.index}_{study.size}.png"
    named = [finding_phrase(finding) for finding in study.drawn]
    caption = f"Frontal chest x-ray with {listed(named)}." if named else "Frontal chest x-ray without findings."
    rows = []
    for number, question in enumerate(study.questions):
        kind = {"closed": "yes_no"}.get(question.kind, question.kind)
        region = [list(map(int, box)) for box in question.region] if question.region else None
        rows.append(
            make_row(
                f"phantom-{study.study_id}-{number}",
                "phantom",
                split,
                str(path),
                (study.size, study.size),
                question.text,
                question.answer,
                "open" if question.kind == "open" else "closed",
                kind,
                question.content,
                question.content not in ("modality", "view"),
                study.patient_id,
                region,
                {"caption": caption, "reasoning": phantom_reasoning(study, question), "boxes": region},
                "by patient",
                False,
            )
        )
    return rows


def save_film(study, path):
    with atomic_file(Path(path)) as file:
        Image.fromarray(study.image).save(file, "PNG")


def redrawn_films(study, question, path):
    """
    For "is there a ...?" with the answer yes: {"redrawn": film without all findings that make it true, "redrawn_other":
    film without one other finding, if there is one}, paths beside the film's own; {} for other questions. The right
    answers there are no and yes.
    """
    if question.content != "presence" or question.answer != "yes":
        return {}
    asked = [f.name for f in study.drawn if question.condition in ancestors(f.condition)]
    others = [f.name for f in study.drawn if f.name not in asked]
    films = {}
    for field, names in zip(REDRAWN, (asked, others[:1]), strict=True):
        if names:
            films[field] = path.removesuffix(".png") + f"_without_{'_'.join(names)}.png".replace(" ", "-")
            save_film(study.without(*names), films[field])
    return films


def finding_phrase(finding, with_size=False):
    """ "left pleural effusion", "nodule in the right upper lung zone", "pacemaker"."""
    phrase = SUMMARY.get(finding.kind, finding.kind).format(
        side=finding.side, loc=f"{finding.side} {finding.zone} lung zone"
    )
    return f"{SIZES[finding.severity]} {phrase}".strip() if with_size else phrase


def listed(phrases):
    phrases = list(dict.fromkeys(phrases))  # both lungs may have the same thing
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


def phantom_reasoning(study, question):
    """What was drawn that settles the question, from the truth of the study; None for modality and view."""
    if question.content in ("modality", "view"):
        return None
    if question.content == "normality":
        shown = [finding for finding in study.drawn if finding.condition != "Support Devices"]
    elif question.content == "presence":
        shown = [finding for finding in study.drawn if question.condition in ancestors(finding.condition)]
    else:  # about one finding: the one whose boxes the question names
        shown = [finding for finding in study.drawn if study.boxes[finding.name] == question.region]
    if shown:
        return f"Seen: {listed([finding_phrase(f, question.content == 'size') for f in shown])}."
    return "Nothing abnormal." if question.content == "normality" else f"No {NOUNS[question.condition][1]}."


def ancestors(condition):
    """A condition and those it implies: Pneumonia, Consolidation, Lung Opacity."""
    found = []
    while condition:
        found.append(condition)
        condition = PARENTS.get(condition)
    return found


# --------------------------------------------------------------------------------------------------------------- audit


def audit_of(found: RowSet):
    """What the splits of one data set share. Ids are those of the files (qid)."""
    train, test = (
        found.split("train") + found.split("val"),
        found.split("test"),
    )  # validation rows choose the checkpoint: they count as training here
    result = {
        **found.facts(),
        "images": {split: len({row["image_id"] for row in found.split(split)}) for split in ("train", "val", "test")},
        "images in two splits": shared_between_splits(found.rows),
        "groups in two splits": shared_between_splits(found.rows, "image_group"),
        "test rows with the same image, question and answer in train": seen(test, train),
        "test rows reworded in train, word overlap 0.8": reworded(test, train, 0.8),
        "test rows reworded in train, word overlap 0.5": reworded(test, train, 0.5),
        "test questions that occur in train, on any image": seen(test, train, ("question",)),
        "train rows that repeat another": repeats(train),
        "conflicting answers in train": conflicts(train),
        "rows with a region": {
            split: sum(bool(row["boxes"]) and slake_region(row) is not None for row in found.split(split))
            for split in ("train", "val", "test")
        },
    }
    if found.name == "vqa_rad":  # only the public file says which stock wording a test question has
        try:
            public = vqa.load_vqa_rad(found.source, version="public")
        except InputError:
            public = None
        if public:
            key = ("image_id", "question", "answer")  # the files number their questions in different ways
            frames = {values_of(row, key, plain_text): row["question_frame"] for row in public.rows}
            asked = [row | {"question_frame": frames.get(values_of(row, key, plain_text))} for row in test]
            result["test questions whose stock wording is in train"] = frames_in(asked, train)
    return result


def counts_of(rows):
    """Rows, images, groups, answer types and the balance of yes and no of each split."""
    counts = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        answers = Counter(row["answer"].strip(" .").lower() for row in part if row["answer_type"] == "closed")
        counts[split] = {
            "rows": len(part),
            "images": len({row["image"] for row in part}),
            "groups": len({row["group"] for row in part}),
            "by dataset": dict(Counter(row["dataset"] for row in part)),
            "by answer type": dict(Counter(row["answer_type"] for row in part)),
            "by content type": dict(Counter(row["content_type"] for row in part)),
            "closed answers": {
                "yes": answers["yes"],
                "no": answers["no"],
                "other": sum(answers.values()) - answers["yes"] - answers["no"],
            },
            "with region": sum(row["region"] is not None for row in part),
            "image known not to matter": sum(row["needs_image"] is False for row in part),
        }
    return counts


# ---------------------------------------------------------------------------------------------------------------- files


def portable(image, folder):
    """Relative where the image lies below the folder, so that both can be moved together; else absolute."""
    image, folder = Path(image).resolve(), Path(folder).resolve()
    return image.relative_to(folder).as_posix() if folder in image.parents else str(image)


def write_rows(path, rows):
    """One JSON object per line, atomically."""
    write_jsonl(
        path, [row | {key: portable(row[key], Path(path).parent) for key in FILMS if key in row} for row in rows]
    )


def grpo_row(row, folder):
    kept = {
        key: row[key]
        for key in (
            *SHARED_FIELDS,
            "region",
            "width",
            "height",
            "question_type",
            "content_type",
            "needs_image",
            "policy",
            "overlap",
        )
    }
    return {"image_path": portable(row["image"], folder), "question": row["question"], "gold": row["answer"], **kept}


def read_rows(path, splits=None, fields=ROW_FIELDS):
    """
    The rows of a file of this script -> list of dicts with absolute image paths. splits: keep only these ("train",
    ("train", "val"), ...). fields: what a row must have; GRPO_FIELDS for the other file, whose older versions had
    nothing more. Lines of JSON, or one JSON list. InputError, one sentence, for: no file, no JSON, a row without a
    field or with one of the wrong kind, an image that is not there, no row left.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = json.loads(text) if text.lstrip().startswith("[") else None
        numbered = list(enumerate(lines, 1)) if lines is not None else []
    except (OSError, ValueError) as error:
        raise InputError(
            f"the rows {path} cannot be read ({error}); make them with vqa_sft_grpo/prepare_data.py"
        ) from error
    if lines is None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number}, is not JSON ({error}); make the file again with"
                        " vqa_sft_grpo/prepare_data.py"
                    ) from error
    wanted = (splits,) if isinstance(splits, str) else splits
    rows, here = [], {}
    for number, row in numbered:
        check_row(row, fields, f"{path}, row {number}")
        if wanted is None or row.get("split") in wanted:
            row = dict(row)
            for key in {"image_path", *FILMS} & row.keys():
                row[key] = os.path.normpath(path.resolve().parent / row[key])
                if row[key] not in here:
                    here[row[key]] = os.path.isfile(row[key])
            rows.append(row)
    if not rows:
        what = f"no rows of {' or '.join(wanted)}" if wanted and numbered else "no rows"
        raise InputError(f"{path} has {what}; make them with vqa_sft_grpo/prepare_data.py")
    absent = [image for image, there in here.items() if not there]
    if absent:
        raise InputError(
            f"{len(absent)} of the {len(here)} images of {path} are not there, the first is {absent[0]}; put them back,"
            " or make the rows again with vqa_sft_grpo/prepare_data.py"
        )
    return rows


def check_row(row, fields, where):
    """InputError where the row lacks a field or has one of the wrong kind."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with names and values")
    missing = [field for field in fields if field not in row]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; make the file again with vqa_sft_grpo/prepare_data.py")
    for key in {"image_path", *FILMS, "question", "answer", "gold", "output"} & row.keys():
        if not isinstance(row[key], str) or not row[key].strip():
            raise InputError(f"{where}: '{key}' must be a text that is not empty")
    if row.get("answer_type", "open") not in ("closed", "open"):
        raise InputError(f"{where}: 'answer_type' is {row['answer_type']!r}; it must be closed or open")
    region = row.get("region")
    if region is not None and not (isinstance(region, list) and region and all(is_pixel_box(box) for box in region)):
        raise InputError(
            f"{where}: 'region' must be null or boxes [[x0, y0, x1, y1]] in pixels with x0 < x1 and y0 < y1"
        )
    if "output" in row:
        try:
            target = json.loads(row["output"])
        except ValueError:
            target = None
        if not isinstance(target, dict) or not isinstance(target.get("answer"), str):
            raise InputError(f"{where}: 'output' must be a JSON object with an answer")


def is_pixel_box(box):
    numbers = (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) and np.isfinite(n) for n in box)
    )
    return bool(numbers and box[0] < box[2] and box[1] < box[3])
