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
    findings                     phantom only: what the film shows, [{condition, kind, side, zone, size}], all texts
    redrawn, redrawn_other       validation and test rows of the phantom whose answer is yes to a condition: the same
                                 film drawn without what the question asks about, and without another finding (where
                                 there is one): the same patient, position and noise, and no trace of an edit
    policy, overlap              the split policy, and whether it lets images of the test set into training

Rows made elsewhere need an image, a question and an answer (or image_path and gold); read_rows fills in the rest.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
import os
import random
from collections import Counter
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before torchvision
from PIL import Image

from shared.data.audit import RowSet, plain_text, repeats, seen, shared_between_splits, similar_images, values_of
from shared.data.download import DataNotFound
from shared.data.images import image_size
from shared.data.text import text_of
from shared.phantom import DEFAULT, phantom_study
from shared.phantom.words import NOUNS, SIZES, SUMMARY
from shared.runtime import InputError, atomic_file, write_jsonl
from vqa_sft_grpo import sources as vqa
from vqa_sft_grpo.leaks import conflicts, frames_in, reworded
from vqa_sft_grpo.prompting import FIELDS, check_question, instruction
from vqa_sft_grpo.rewards import answer_type_of
from vqa_sft_grpo.scoring import normalise
from vqa_sft_grpo.text_worth import ancestors

NAMES = ("vqa_rad", "slake", "both", "phantom", "auto")
POLICIES = {
    "clean-train": "clean_train",
    "image-disjoint": "image_disjoint",
    "official-noframe": "no_frames",
    "official": "official",
}
OFFICIAL = (
    "--policy official keeps in training what the test set shows, of VQA-RAD its images and reworded questions, of"
    " SLAKE (split by image) images nearly identical to test ones: add --allow-overlap if that is meant, or take"
    " clean-train"
)
SPLITS = {"train": ("train", "val"), "val": ("val",), "test": ("test",), "all": ("train", "val", "test")}
VAL_SHARE = 0.1
PHANTOM_STUDIES = {"train": 1000, "val": 100, "test": 300}
# far apart and multiples of eight: no patient is in two splits
PHANTOM_START = {"train": 0, "val": 8_000_000, "test": 16_000_000}
SHARED_FIELDS = ("id", "dataset", "split", "question", "answer_type", "group")
ROW_FIELDS = (
    *SHARED_FIELDS,
    *"instruction input output image answer question_type content_type region width height policy overlap".split(),
)
TOLD = ("split", "group", "answer_type", "region")  # what a row made elsewhere lacks and its reader should know
REDRAWN = ("redrawn", "redrawn_other")
FILMS = ("image", *REDRAWN)  # fields with a path

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
    if policy == "image-disjoint":
        vqa.split_by_image(found, vqa.SHARES, seed)
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
    for row in (row for found in sets for row in found.rows):
        key = (row["dataset"], row["image_id"])
        row["copies"] = group_of.get(key, key)
    tested = {row["copies"] for found in sets for row in found.rows if row["split"] == "test"}
    sizes = {key: size_of(path) for key, path in images.items() if key not in copies["unreadable"]}
    for found in sets:
        found.left_out |= {"image cannot be read": 0, "near copy of a test image": 0}
        kept = []
        for row in found.rows:
            row["size"] = sizes.get((row["dataset"], row["image_id"]))
            if row["size"] is None:
                found.left_out["image cannot be read"] += 1
            elif policy in ("clean-train", "image-disjoint") and row["split"] != "test" and row["copies"] in tested:
                found.left_out["near copy of a test image"] += 1
            else:
                kept.append(row)
        found.rows = kept
        if limit:
            found.limit(limit)
    every = [row for found in sets for row in found.rows]
    audit = {"phantom": False, "policy": policy, "split": split, "absent": list(absent)}
    audit["images"] = {k: v for k, v in copies.items() if k != "pairs"}
    audit["data"] = {found.name: audit_of(found) for found in sets}
    audit["near-identical images in two splits"] = pairs = shared_between_splits(every, "copies")
    audit["overlap"] = any(pair["shared"] for name, pair in pairs.items() if "test" in name)
    rows = []
    for found in sets:
        chosen = [row for row in found.rows if row["split"] in SPLITS[split]]
        if not chosen:
            reasons = ", ".join(f"{n}: {reason}" for reason, n in found.left_out.items() if n) or "nothing"
            audit["absent"].append(
                f"{found.name} has no {split} question with its image in {found.source} (left out: {reasons})"
            )
        rows += [real_row(row, policy, audit["overlap"]) for row in chosen]
    ids = Counter()
    for row in rows:  # files number some questions twice, and rows are told apart by their ids
        ids[row["id"]] += 1
        row["id"] += f"-{ids[row['id']]}" if ids[row["id"]] > 1 else ""
    if not rows:
        raise InputError(
            f"nothing to write: {'; '.join(audit['absent'])}; put the missing images there, or take another --split,"
            " --policy or --data"
        )
    audit["counts"] = counts_of(rows)
    return rows, audit


def size_of(path):
    """(width, height) of an image, or None where it cannot be read."""
    try:
        return image_size(path)
    except InputError:
        return None


def real_row(row, policy, overlap):
    """A row of vqa_sft_grpo/sources.py -> ours."""
    slake = row["dataset"] == "slake"
    width, height = row["size"]
    region = slake_region(row) if slake else None
    question_type = row["question_type"]
    if slake:
        question_type = "vqa" if row["needs_image"] else "kvqa"
    return finished(
        {"caption": slake_caption(row) if slake else rad_caption(row), "boxes": region},
        id=f"{row['dataset']}-{row['qid']}" + ("" if slake else f"-{row['phrase_type']}"),
        dataset=row["dataset"],
        split=row["split"],
        image=str(Path(row["image_path"]).resolve()),
        question=row["question"],
        answer=row["answer"],
        answer_type=row["answer_type"],
        question_type=question_type,
        content_type=row["question_type"] if slake else row["organ"],
        needs_image=row["needs_image"],
        group=f"{row['dataset']}/{row['image_group']}",
        region=region,
        width=width,
        height=height,
        policy=policy,
        overlap=overlap,
    )


def finished(known, **row):
    """
    A row with its instruction, input and output. known: what the data set knows of caption, reasoning and boxes; None
    and "" are left out of the output.
    """
    target = {field: value for field in FIELDS if (value := (known | {"answer": row["answer"]}).get(field))}
    task = {"instruction": instruction("json", units="pixels"), "input": row["question"]}
    return row | task | {"output": json.dumps(target, ensure_ascii=False)}


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
    audit = {"phantom": True, "policy": "by patient", "split": split, "overlap": False, "absent": [], "seed": seed}
    audit |= {"image_size": image_size, "settings_of_phantom": settings.key()}
    return rows, audit | {"groups in two splits": shared_between_splits(rows, "group"), "counts": counts_of(rows)}


def phantom_study_rows(study, split, image_dir):
    """The questions of one film as rows, with the film's truth as caption, reasoning and boxes."""
    path = image_dir.resolve() / f"{study.study_id}_{study.index}_{study.size}.png"
    named = [finding_phrase(finding) for finding in study.drawn]
    caption = f"Frontal chest x-ray with {listed(named)}." if named else "Frontal chest x-ray without findings."
    rows = []
    for number, question in enumerate(study.questions):
        region = [list(map(int, box)) for box in question.region] if question.region else None
        rows.append(
            finished(
                {"caption": caption, "reasoning": phantom_reasoning(study, question), "boxes": region},
                id=f"phantom-{study.study_id}-{number}",
                dataset="phantom",
                split=split,
                image=str(path),
                question=question.text,
                answer=question.answer,
                answer_type="open" if question.kind == "open" else "closed",
                question_type={"closed": "yes_no"}.get(question.kind, question.kind),
                content_type=question.content,
                needs_image=question.content not in ("modality", "view"),
                group=study.patient_id,
                region=region,
                width=study.size,
                height=study.size,
                policy="by patient",
                overlap=False,
                findings=[finding_facts(finding) for finding in study.drawn],
            )
        )
    return rows


def finding_facts(finding):
    """Texts by name, side "bilateral" or "midline" too, zone "" where it makes no sense, size of words.SIZES."""
    facts = {name: getattr(finding, name) for name in ("condition", "kind", "side", "zone")}
    return facts | {"size": SIZES[finding.severity]}


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


# --------------------------------------------------------------------------------------------------------------- audit


def audit_of(found: RowSet):
    """What the splits of one data set share. Ids are those of the files (qid)."""
    # validation rows choose the checkpoint: they count as training here
    train, test = found.split("train") + found.split("val"), found.split("test")
    splits = ("train", "val", "test")
    result = {
        **found.facts(),
        "images": {split: len({row["image_id"] for row in found.split(split)}) for split in splits},
        "images in two splits": shared_between_splits(found.rows),
        "groups in two splits": shared_between_splits(found.rows, "image_group"),
        "test rows with the same image, question and answer in train": seen(test, train),
        "test rows reworded in train, word overlap 0.8": reworded(test, train, 0.8),
        "test rows reworded in train, word overlap 0.5": reworded(test, train, 0.5),
        "test questions that occur in train, on any image": seen(test, train, ("question",)),
        "train rows that repeat another": repeats(train),
        "conflicting answers in train": conflicts(train),
    }
    result["rows with a region"] = {
        split: sum(bool(row["boxes"]) and slake_region(row) is not None for row in found.split(split))
        for split in splits
    }
    if found.name == "vqa_rad":  # only the public file says which stock wording a test question has
        try:
            public = vqa.load_vqa_rad(found.source, version="public")
        except InputError:
            return result
        key = ("image_id", "question", "answer")  # the files number their questions in different ways
        frames = {values_of(row, key, plain_text): row["question_frame"] for row in public.rows}
        asked = [row | {"question_frame": frames.get(values_of(row, key, plain_text))} for row in test]
        result["test questions whose stock wording is in train"] = frames_in(asked, train)
    return result


COUNTED = ("dataset", "answer_type", "content_type")


def counts_of(rows):
    """Rows, images, groups, answer types and the balance of yes and no of each split."""
    counts = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        answers = Counter(row["answer"].strip(" .").lower() for row in part if row["answer_type"] == "closed")
        yes, no = answers["yes"], answers["no"]
        counts[split] = {
            "rows": len(part),
            "images": len({row["image"] for row in part}),
            "groups": len({row["group"] for row in part}),
            **{f"by {kind.replace('_', ' ')}": dict(Counter(row[kind] for row in part)) for kind in COUNTED},
            "closed answers": {"yes": yes, "no": no, "other": answers.total() - yes - no},
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
    folder = Path(path).parent
    write_jsonl(path, [row | {key: portable(row[key], folder) for key in FILMS if key in row} for row in rows])


def grpo_row(row, folder):
    """What train_grpo.py reads of a row; folder: of the file that it will stand in."""
    kept = "region width height question_type content_type needs_image policy overlap findings".split()
    first = {"image_path": portable(row["image"], folder), "question": row["question"], "gold": row["answer"]}
    return first | {key: row.get(key) for key in (*SHARED_FIELDS, *kept)}


MAKE = "make the file again with vqa_sft_grpo/prepare_data.py"


def read_rows(path, splits=None):
    """
    The rows of a file -> list of dicts with absolute image paths and all of ROW_FIELDS. splits: keep only these
    ("train", ("train", "val"), ...). Lines of JSON, or one JSON list: of prepare_data.py, or rows made elsewhere, which
    complete() fills in and says so. Where a file has neither validation nor test rows, a tenth of its images, always
    the same ones, are held out as "val". InputError, one sentence, for: no file, no JSON, a data set's own file, a row
    that check_row refuses, an id twice, an image that is not there or not of the size that its rows say, no row left.
    """
    path = Path(path)
    wanted = (splits,) if isinstance(splits, str) else splits
    rows, images, ids, absent, guessed, number, unsaid = [], {}, {}, Counter(), [], 0, 0
    for number, row in numbered_rows(path):
        where = f"{path}, row {number}"
        check_row(row, where)
        row = dict(row)
        absent.update(field for field in TOLD if field not in row)
        unsaid += "overlap" not in row
        for key in {"image_path", *FILMS} & row.keys():
            row[key] = located(row[key], path.resolve().parent)
        if complete(row, f"{path.stem}-{number}", path, where):
            guessed.append(row)
        if (first := ids.setdefault(row["id"], number)) != number:
            raise InputError(f"{where} has the id of row {first}, {row['id']!r}; {MAKE}")
        for key in set(FILMS) & row.keys():
            images.setdefault(row[key], []).append((where, row) if key == "image" else None)
        rows.append(row)
    if absent:
        named = ", ".join(f"{field} ({n})" for field, n in absent.items())
        print(f"note: of the {number} rows of {path} so many lack a field, which is filled in: {named}")
    if len({row["image"] for row in guessed}) > 1 and len({str(row["region"]) for row in guessed}) == 1:
        print(f"note: the boxes of 'output' in {path} are the same for every image: a template, and no gold region")
        for row in guessed:
            row["region"] = None
    if rows and all(row["split"] == "train" for row in rows):
        hold_out(rows, path)
    told = {(row["split"] == "test", row[name]) for row in rows for name in ("image", "group")}
    if any((not test, name) in told for test, name in told) and unsaid == len(rows):
        print(f"*** OVERLAP: test rows of {path} share images or groups with its training and validation rows ***")
        for row in rows:
            row["overlap"] = True
    rows = [row for row in rows if wanted is None or row["split"] in wanted]
    if not rows:
        what = f"no rows of {' or '.join(wanted)}" if wanted and number else "no rows"
        raise InputError(f"{path} has {what}; make them with vqa_sft_grpo/prepare_data.py")
    used = {row[key] for row in rows for key in FILMS if key in row}
    missing = [image for image in images if image in used and not os.path.isfile(image)]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(used)} images of {path} are not there, the first is {missing[0]}; put them"
            " back, or make the rows again with vqa_sft_grpo/prepare_data.py"
        )
    for image in used:
        if of := list(filter(None, images[image])):
            check_size(of, size_of(image))
    return rows


def located(image, folder):
    """The path of an image: from the folder of its rows, or where only that is there, from the working folder."""
    if "\\" in image and not os.path.isfile(folder / image):
        image = image.replace("\\", "/")  # written on Windows
    found = os.path.normpath(folder / image)
    return os.path.abspath(image) if not os.path.isfile(found) and os.path.isfile(image) else found


def check_size(of, found):
    """of: [(where, row)] of one image, found: its (width, height), None: unreadable. Rows without a size get it."""
    for where, row in of:
        said = [row["width"], row["height"]]
        if None in said and found:
            row["width"], row["height"] = found
            check_region(row, where)
        elif None in said:
            row["region"] = None  # nobody can say where in the image it lies
        elif found and sorted(said) != sorted(found):  # an image may be stored turned by its EXIF
            raise InputError(f"{where}: the image is {found[0]} x {found[1]} and not {said[0]} x {said[1]}; {MAKE}")


def complete(row, name, path, where):
    """
    Gives a checked row what it lacks of ROW_FIELDS: image and answer from image_path and gold, an output that holds the
    answer alone, answer_type from answer and question (rewards.answer_type_of), the boxes of the output as region, the
    image as group, the file as dataset, and None for the rest. Reasoning in a list of sentences becomes one text. ->
    whether the region is a guess.
    """
    row.setdefault("image", row.get("image_path"))
    row.setdefault("answer", row.get("gold"))
    target = json.loads(row["output"]) if "output" in row else {"answer": row["answer"]}
    for field in ("caption", "reasoning"):
        if isinstance(target.get(field), list) and all(isinstance(part, str) for part in target[field]):
            target[field] = " ".join(target[field])
        if not isinstance(target.get(field) or "", str):
            raise InputError(f"{where}: the {field} of 'output' must be a text, or left out")
    target = {field: value for field, value in target.items() if value or field == "answer"}
    if not isinstance(target.get("boxes", []), list) or not all(map(is_pixel_box, target.get("boxes", ()))):
        raise InputError(f"{where}: the boxes of 'output' must be [[x0, y0, x1, y1]] in pixels, not in shares")
    guessed = "region" not in row and "boxes" in target
    given = {"id": name, "dataset": str(path), "split": "train", "group": row["image"], "policy": "unknown"}
    given |= {"instruction": instruction("json", units="pixels"), "input": row["question"], "overlap": False}
    given["region"] = target.get("boxes")
    for field in ROW_FIELDS:
        row.setdefault(field, given.get(field))
    row["id"], row["answer_type"] = name if row["id"] in (None, "") else str(row["id"]), answer_type_of(row)
    row["output"] = json.dumps(target, ensure_ascii=False)
    return guessed


def hold_out(rows, path):
    """A tenth of the image groups, at least one of two, become "val": which ones does not depend on any seed."""
    groups = sorted({row["group"] for row in rows})
    if len(groups) < 2:
        return
    chosen = set(random.Random(0).sample(groups, max(1, len(groups) // 10)))
    for row in rows:
        row["split"] = "val" if row["group"] in chosen else "train"
    number = sum(row["split"] == "val" for row in rows)
    images = f"{len(chosen)} of the {len(groups)} images"
    print(f"note: {path} has no validation rows; {images} ({number} of the {len(rows)} rows) are held out for that")


def numbered_rows(path):
    """The lines, or the items of the one list, of a JSON file -> [(number from 1, value)]."""
    what = "vqa_sft_grpo/prepare_data.py"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), 1))
    except UnicodeDecodeError as error:
        raise InputError(f"the rows {path} cannot be read: they are not UTF-8 text; save the file as UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the rows {path} cannot be read ({error}); make them with {what}") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}, is not JSON ({error}); {MAKE}") from error
    return found


OWN_FILES = {"slake": {"q_lang", "img_name"}, "vqa_rad": {"phrase_type", "image_name"}}  # fields that tell a data set
SAID = {"answer", "gold"}
FULL_TEXTS = {"image_path", *FILMS, *SAID, "question", "output", "dataset", "policy", "group"}
KINDS = {"id": (str, int), "overlap": (bool,), "needs_image": (bool,)}  # or null
FINDING = ("condition", "kind", "side", "zone", "size")
NEEDED = (("image", "image_path"), ("question",), ("answer", "gold"))  # one of each must be there


def check_row(row, where):
    """
    InputError, one sentence, where the row lacks a field, has one of the wrong kind, or says what cannot be: another
    split, a region outside of the image, an output with another answer.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with names and values")
    for name, own in OWN_FILES.items():
        if own <= row.keys():
            raise InputError(
                f"{where} is a row of {name}'s own files: give --data {name} --data-dir FOLDER, or make rows of it with"
                " vqa_sft_grpo/prepare_data.py"
            )
    missing = [" or ".join(names) for names in NEEDED if not row.keys() & set(names)]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; {MAKE}")
    for key, value in row.items():
        said = isinstance(value, str) and (text_of(value, none_is_missing=False) if key in SAID else value.strip())
        if key in FULL_TEXTS and not said:
            raise InputError(f"{where}: '{key}' must be a text that is not empty; it is {named(value)}")
        if key in KINDS and value is not None and type(value) not in KINDS[key]:
            kinds = "a text or a whole number" if key == "id" else "true or false"
            raise InputError(f"{where}: '{key}' is {named(value)}; it must be {kinds}, or null")
        if isinstance(value, str) and value != value.encode("utf-8", "replace").decode():
            raise InputError(f"{where}: '{key}' holds half a character (a lone surrogate)")
    check_question(row.get("question", ""), where)
    if row.get("answer_type") not in ("closed", "open", None):
        raise InputError(f"{where}: 'answer_type' is {named(row['answer_type'])}; it must be closed or open, or null")
    if row.get("split", "train") not in SPLITS["all"]:
        raise InputError(f"{where}: 'split' is {named(row['split'])}; it must be train, val or test")
    size = [row.get(key) for key in ("width", "height")]
    if any(n is not None and not (type(n) is int and 0 < n < 2**20) for n in size):
        found = " and ".join(map(named, size))
        raise InputError(f"{where}: 'width' and 'height' must be whole numbers of pixels, not {found}")
    region = row.get("region")
    if region is not None:
        if not (isinstance(region, list) and region and all(is_pixel_box(box) for box in region)):
            raise InputError(
                f"{where}: 'region' must be null or boxes [[x0, y0, x1, y1]] with x0 < x1 and y0 < y1, in pixels,"
                f" not in shares of the image; it is {named(region)}"
            )
        if None not in size:
            check_region(row, where)
    if "output" in row:
        try:
            target = json.loads(row["output"])
            json.dumps(target, ensure_ascii=False).encode()  # ValueError for half a character
        except (ValueError, RecursionError):
            target = None
        if not isinstance(target, dict) or not isinstance(target.get("answer"), str):
            raise InputError(f"{where}: 'output' must be a JSON object with an answer, not {row['output'][:60]!r}")
        if target["answer"] != row.get("answer", row.get("gold", target["answer"])):
            raise InputError(f"{where}: 'output' answers {target['answer'][:60]!r}, 'answer' says otherwise; {MAKE}")
    if {"gold", "answer"} <= row.keys() and row["gold"] != row["answer"]:
        raise InputError(f"{where}: 'gold' is {row['gold'][:60]!r}, 'answer' says otherwise; {MAKE}")
    findings = [] if row.get("findings") is None else row["findings"]
    whole = isinstance(findings, list) and all(isinstance(finding, dict) for finding in findings)
    if not whole or not all(isinstance(finding.get(name), str) for finding in findings for name in FINDING):
        raise InputError(f"{where}: 'findings' must be null or a list of objects with {', '.join(FINDING)}; {MAKE}")


def named(value):
    """A value of a file in words, for a refusal."""
    if isinstance(value, dict) or isinstance(value, list) and not value:
        return "an object" if value else "empty"
    return "empty" if isinstance(value, str) and not value.strip() else json.dumps(value)[:60]


def check_region(row, where):
    width, height = row["width"], row["height"]
    if any(b[0] < 0 or b[1] < 0 or b[2] > width or b[3] > height for b in row.get("region") or ()):
        raise InputError(f"{where}: 'region' {row['region']} lies outside of the image, {width} x {height}")


def is_pixel_box(box):
    if not (isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) and abs(n) < 2**20 for n in box)):
        return False
    return box[0] < box[2] and box[1] < box[3] and max(box) > 1  # shares of the image, 0 to 1, are not pixels
