"""
VQA-RAD (Lau et al. 2018, doi:10.1038/sdata.2018.251; CC0) and SLAKE (Liu et al. 2021, arXiv:2102.09542): one row per
question.

    questions = load_vqa_rad("data", val_share=0.1)        # or load_slake("data")
    for row in questions.split("train"):
        row["image_path"], row["question"], row["answer"]

A row of either set is a dict with these keys; None where the set does not say:
    dataset, split (train, val, test), qid (int)
    image_id, image_path           name within the set; Path, or None where it is missing and that is allowed
    image_group                    what must stay on one side of a split: the image, or a cluster of near-identical ones
    question, answer               texts, stripped; the answer is not lower-cased
    answer_type                    "closed" or "open", as the file says
    question_type                  VQA-RAD: PRES, ABN, ... with typos mended, several joined in order of the alphabet
                                   ("ATTRIB+PRES"); SLAKE: content_type (Organ, Position, ..., KG)
    question_type_raw              as in the file
    phrase_type                    VQA-RAD: freeform, para, or frame (the question in a stock wording)
    organ, modality, language      VQA-RAD: CHEST, ABD, HEAD and no modality; SLAKE: location and CT, MRI, X-Ray; "en"
                                   or "zh"
    needs_image                    SLAKE: False for base_type kvqa, which asks for knowledge; VQA-RAD: None
    boxes                          SLAKE: [{"organ", "box": [x0, y0, x1, y1] in pixels of the image}], None without
                                   mask and detection.json: of the parts of an organ's mask where there is one, else of
                                   detection.json
    mask_path                      SLAKE: Path of mask.png, see read_mask
    triple                         SLAKE: [head, relation, tail] of the knowledge graph
    question_frame, question_rephrase, question_relation, linked_id, case      VQA-RAD's public file only

Files, in <data-dir>/vqa_rad and <data-dir>/slake, or <data-dir> itself:
    VQA-RAD   "VQA_RAD Dataset Public.json"; trainset.json and testset.json (of MEVF, used by most papers); images/ or
              "VQA_RAD Image Folder/"
    SLAKE     train.json, validate.json, test.json; imgs/xmlabN/source.jpg, mask.png, detection.json; mask.txt (the
              organs' grey levels in the masks, "3:Heart" a line)
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from shared.data import download as downloads
from shared.data.audit import RowSet, similar_images, split_groups, values_of
from shared.data.images import image_size
from shared.data.text import base_name, text_of
from shared.runtime import DataNotFound, InputError, read_json
from vqa_sft_grpo.prompting import MAX_QUESTION

RAD_PAGE, SLAKE_PAGE = "https://osf.io/89kps/", "https://www.med-vqa.com/slake/"  # the latter not verified
RAD_ADDRESS = "https://files.osf.io/v1/resources/89kps/providers/osfstorage/?zip="  # not verified
SLAKE_ADDRESS = "https://huggingface.co/datasets/BoKelvin/SLAKE/resolve/main/"  # not verified
PUBLIC = "VQA_RAD Dataset Public.json"
RAD_IMAGES = ("images", "VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "")
RAD_POLICIES = ("official", "no_test_frames", "no_frames", "clean_train", "image_disjoint")
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
SMALLEST_PART = 0.001  # of the image: a part of a mask below that is a stray pixel, and no place
TYPOS = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
# sha256 of the files for which the counts in tests/test_vqa_sources.py were made
KNOWN = {
    PUBLIC: "948b7156059b864cf72344fb10669233526b175c243e5a046d20d4201d297a95",
    "trainset.json": "dc0e09c6750bd593bfe566c20b875b6485f80b712ff9ac6fdf4f19ca3c263923",
    "testset.json": "533388b3242ca5ad7e6436093fb4d11adb928ba8def501054f722c7cedff13a5",
    "train.json": "7a9fb81f9d7bb145c3d7e9bc8d3b9016ba18b6539ea5031a53bae8fd3cd991c3",
    "validate.json": "32b016440b0c3be11056a78a18eeab46333268407fbb6e6b32f9f4c2debc50f6",
    "test.json": "6be8f7b4c5a46cdbc713a5210a25b6ed5aa1fd1574c83cefb4f998131f17c2c3",
}
ROW = """dataset split qid image_id image_path image_group question answer answer_type question_type question_type_raw
    phrase_type organ modality language needs_image boxes mask_path triple question_frame question_rephrase
    question_relation linked_id case""".split()
RAD_FIELDS = "qid image_name image_organ question answer answer_type question_type phrase_type".split()
RAD_FRAMES = ("question_frame", "question_rephrase", "question_relation")
SLAKE_FIELDS = "qid img_name question answer q_lang location modality answer_type base_type content_type".split()


def make_row(**values):
    """A row with every key, in one order."""
    assert set(values) <= set(ROW)
    return dict.fromkeys(ROW) | values


def read_rows(path, keys):
    """A JSON list of dicts that have all of `keys`; InputError otherwise."""
    rows = read_json(path, object)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold a list of rows")
    for number, row in enumerate(rows):
        if missing := [key for key in keys if key not in row]:
            raise InputError(f"{path}: row {number} lacks {', '.join(missing)}")
        for key in {*keys, *RAD_FRAMES} & row.keys():
            try:
                text_of(row[key])
            except InputError as error:
                raise InputError(f"{path}, row {number}, {key}: {error}") from error
    return rows


def common(raw, path):
    """What both sets say in the same way: qid, question, answer, answer_type; "" for a text that is missing."""
    kind = text_of(raw["answer_type"]).lower()  # "CLOSED " once
    if kind not in ("closed", "open"):
        raise InputError(f"{path}: answer_type is {raw['answer_type']!r}; it must be OPEN or CLOSED")
    try:
        qid = int(text_of(raw["qid"]))  # one row of VQA-RAD's public file has it as a string
    except ValueError as error:
        raise InputError(f"{path}: qid is {raw['qid']!r}; it must be a whole number") from error
    texts = text_of(raw["question"]), text_of(raw["answer"], none_is_missing=False)
    question, answer = (
        text.encode("utf-8", "replace").decode() for text in texts
    )  # a lone surrogate fits into no file
    return {"qid": qid, "question": question, "answer": answer, "answer_type": kind}


def given(raw, key):
    """A text, or None where there is nothing; the public file writes NULL there."""
    return text_of(raw.get(key)) or None


def files_in(folder):
    """{name in lower case: path}: copies made through Windows may have .JPG for .jpg."""
    return {path.name.lower(): path for path in sorted(folder.iterdir())} if os.path.isdir(folder) else {}


def usable(found, paths, allow_missing_images, images):
    """Leave out and count rows without question, answer or (unless allowed) image; note the digests of the files."""
    found.keep(lambda row: row["question"], "no question")
    found.keep(lambda row: row["answer"], "no answer")
    if any(len(row["question"]) > MAX_QUESTION for row in found.rows):
        found.keep(lambda row: len(row["question"]) <= MAX_QUESTION, f"question of over {MAX_QUESTION} characters")
    n = len(found.rows)
    if not allow_missing_images:
        found.keep(lambda row: row["image_path"] is not None, "image missing")
    if not n:
        raise InputError(f"no row of {', '.join(map(str, paths))} has a question and an answer")
    if not found.rows:
        raise InputError(
            f"none of the {n} questions has its image in {images}; put the images there, or allow missing images for"
            " work on texts"
        )
    found.sha256 = {path.name: downloads.sha256_of(path) for path in paths}
    found.official = found.sha256.items() <= KNOWN.items()


def hold_out(rows, share, seed=0):
    """Move `share` of the image groups of train to "val" (VQA-RAD has none). Nothing else changes."""
    train = [row for row in rows if row["split"] == "train"]
    split_of = split_groups([row["image_group"] for row in train], {"train": 1 - share, "val": share}, seed)
    for row in train:
        row["split"] = split_of[row["image_group"]]


def split_by_image(found, shares, seed):
    """Split all rows anew, by image and by clusters of near-identical images."""
    paths = {row["image_id"]: row["image_path"] for row in found.rows if row["image_path"]}
    clusters = similar_images(paths)["similar"]
    group_of = {name: group[0] for group in clusters for name in group}
    for row in found.rows:
        row["image_group"] = group_of.get(row["image_id"], row["image_id"])
    split_of = split_groups([row["image_group"] for row in found.rows], shares, seed)
    for row in found.rows:
        row["split"] = split_of[row["image_group"]]
    found.notes["clusters of near-identical images"] = clusters


# -------------------------------------------------------------------------------------------------------------- VQA-RAD


def load_vqa_rad(
    data_dir, version="auto", policy="official", val_share=0.0, shares=SHARES, seed=0, allow_missing_images=False
):
    """
    -> RowSet. Rows whose image is missing are left out and counted, unless that is allowed (work on texts only).

    version: "files" (trainset.json 3,064 rows, testset.json 451), "public" (2,248 rows, test where phrase_type begins
    with test_: 451), "auto" (files where both are there). The Hugging Face copy is a third one and not read here.
    Numbers on them differ.

    policy: what may be trained on. Every image of the official test set is in the official training set, and 284 of its
    451 questions are there in a stock wording, with the answer:
        official        as published
        no_test_frames  without the frame rows that reword a test question (needs the public file, which says which they
                        are)
        no_frames       without all frame rows
        clean_train     official test; train rows of other images only
        image_disjoint  all rows split anew with `shares` and `seed`, by image and by clusters of near-identical images
    val_share: this share of the training images, chosen with `seed`, becomes "val"; for image_disjoint `shares` says
    it.
    """
    if version not in ("auto", "files", "public"):
        raise InputError(f"there is no version '{version}' of VQA-RAD; there are files and public")
    if policy not in RAD_POLICIES:
        raise InputError(f"there is no policy '{policy}' for VQA-RAD; there are {', '.join(RAD_POLICIES)}")
    folder = downloads.find_folder(
        data_dir, ("vqa_rad", "VQA_RAD", "VQA-RAD"), (PUBLIC, "trainset.json"), "VQA-RAD", RAD_PAGE
    )
    both = [folder / "trainset.json", folder / "testset.json"]
    if version == "auto":
        version = "files" if all(path.is_file() for path in both) else "public"
    paths = both if version == "files" else [folder / PUBLIC]
    paths += [folder / PUBLIC] if policy == "no_test_frames" and version == "files" else []  # says which they are
    wanted = {base_name(row["image_name"]).lower() for path in paths for row in read_rows(path, RAD_FIELDS)}
    folders = [folder / name for name in RAD_IMAGES]
    images = max(folders, key=lambda images: len(wanted & files_in(images).keys()))
    parts = [read_rad(path, files_in(images)) for path in paths]
    found = RowSet("vqa_rad", str(folder), parts[0] + parts[1] if version == "files" else parts[0])
    usable(found, paths, allow_missing_images, images)
    if policy == "no_test_frames" and version == "files":
        asked = [row for row in parts[2] if row["split"] == "test" and row["question_frame"]]
        framed = {values_of(row, ("image_id", "question_frame", "answer")) for row in asked}
        found.keep(
            lambda row: (
                row["phrase_type"] != "frame" or values_of(row, ("image_id", "question", "answer")) not in framed
            ),
            "frame row of a test question",
        )
    elif policy == "no_frames":
        found.keep(lambda row: row["phrase_type"] != "frame", "frame row")
    elif policy == "clean_train":
        tested = {row["image_id"] for row in found.split("test")}
        found.keep(lambda row: row["split"] == "test" or row["image_id"] not in tested, "train row of a test image")
    elif policy == "image_disjoint":
        split_by_image(found, shares, seed)
    found.version = f"version {version}, policy {policy}"
    if val_share and policy != "image_disjoint":
        hold_out(found.rows, val_share, seed)
        found.version += f", val {val_share:g} of the training images with seed {seed}"
    if not found.split("train") or not found.split("test"):
        raise InputError(f"no training or no test question of {folder} is left under the policy {policy}")
    return found


def read_rad(path, images):
    """One of the three files -> rows. images: {name in lower case: path}."""
    rows = []
    for raw in read_rows(path, RAD_FIELDS):
        phrase, name = text_of(raw["phrase_type"]), base_name(raw["image_name"])
        row = make_row(
            **common(raw, path),
            dataset="vqa_rad",
            split="test" if phrase.startswith("test_") or path.name == "testset.json" else "train",
            image_id=name,
            image_path=images.get(name.lower()),
            image_group=name,
            question_type=rad_type(text_of(raw["question_type"])),
            question_type_raw=raw["question_type"],
            phrase_type=phrase.removeprefix("test_"),
            organ=given(raw, "image_organ"),
            language="en",
            linked_id=raw.get("qid_linked_id"),
            case=raw.get("image_case_url"),
        )
        rows.append(row | {k: given(raw, k) for k in RAD_FRAMES})
    return rows


def rad_type(text):
    """ "PRES, ATRIB" -> "ATTRIB+PRES"."""
    parts = {part.strip().upper() for part in text.split(",")}
    return "+".join(sorted(TYPOS.get(part, part) for part in parts))


# ---------------------------------------------------------------------------------------------------------------- SLAKE


def load_slake(data_dir, language="en", allow_missing_images=False):
    """
    -> RowSet with the published splits. Rows whose image is missing are left out and counted, unless that is allowed.

    language: "en" (4,919 / 1,053 / 1,061 rows on 450 / 96 / 96 images; one, qid 1622, has no answer and is left out),
    "zh", or None for both. Each language alone is split by image; the two together are not: 72 of the 96 English test
    images are in the Chinese training split. qid 0 to 14,027 are unique over the three files.
    """
    if language not in ("en", "zh", None):
        raise InputError(f"SLAKE has the languages en and zh, not {language}")
    names, address = ("slake", "SLAKE", "slake/Slake1.0", "Slake1.0"), f"{SLAKE_PAGE} or {SLAKE_ADDRESS}"
    folder = downloads.find_folder(data_dir, names, ("train.json", "test.json"), "SLAKE", address, is_slake)
    paths = {"train": folder / "train.json", "val": folder / "validate.json", "test": folder / "test.json"}
    if not paths["val"].is_file() and (folder / "validation.json").is_file():
        paths["val"] = folder / "validation.json"
    images, places = folder / "imgs", {}
    found = RowSet("slake", str(folder), version=f"language {language or 'en and zh'}")
    for split, path in paths.items():
        for raw in read_rows(path, SLAKE_FIELDS):
            spoken = text_of(raw["q_lang"]).lower()
            if language not in (None, spoken):
                continue
            name, triple = inside(raw["img_name"], path), raw.get("triple")
            if name not in places:
                here = files_in((images / name).parent)
                files = {"image": Path(name).name.lower(), "mask": "mask.png", "boxes": "detection.json"}
                places[name] = {kind: here.get(file) for kind, file in files.items()}
            found.rows.append(
                make_row(
                    **common(raw, path),
                    dataset="slake",
                    split=split,
                    image_id=name,
                    image_path=places[name]["image"],
                    image_group=name,
                    question_type=given(raw, "content_type"),
                    question_type_raw=raw["content_type"],
                    organ=given(raw, "location"),
                    modality=given(raw, "modality"),
                    language=spoken,
                    needs_image=raw["base_type"] != "kvqa",
                    mask_path=places[name]["mask"],
                    triple=[part for part in triple if isinstance(part, str)] if isinstance(triple, list) else None,
                )
            )
    if not found.rows:
        raise InputError(f"{folder} has no question whose q_lang is {language or 'en or zh'}")
    usable(found, paths.values(), allow_missing_images, images)
    used = {row["image_id"] for row in found.rows}
    boxes, found.notes = read_boxes({name: place for name, place in places.items() if name in used})
    masks = add_masks(boxes, {row["image_id"]: row for row in found.rows}, mask_names(folder / "mask.txt"))
    found.notes |= masks if masks["masks"] else {}
    for row in found.rows:
        row["boxes"] = boxes.get(row["image_id"])
    return found


def is_slake(path):
    """Whether a file has rows of SLAKE (prepare_data.py writes a train.json of its own)."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return '"img_name"' in file.read(10_000)


def inside(name, path):
    """img_name, also that of another disk -> "xmlab1/source.jpg"; InputError when it leads out of imgs/."""
    parts = re.split(r"[\\/]", re.sub(r".*[\\/]imgs[\\/]", "", text_of(name)))
    if ".." in parts or "" in parts or any(":" in part for part in parts):
        raise InputError(f"{path}: img_name {name!r} must be the path of an image below imgs/")
    return "/".join(parts)


def read_boxes(places):
    """
    {name: {"image", "boxes"}: paths} -> ({name: [{"organ", "box": [x0, y0, x1, y1]}]}, notes). A file that cannot be
    used is counted and left out; one without boxes gives [].

    Four numbers may mean [x, y, width, height], which is how SLAKE describes them, or two corners. A single small box
    fits both readings, so all files are looked at together: corners are taken when they contradict no image and x, y,
    width, height some.
    """
    found, sizes, unreadable = {}, {}, []
    for name, place in places.items():
        if place["boxes"] is not None:
            try:
                found[name] = boxes_in(read_json(place["boxes"], object))
                if place["image"] is not None:
                    sizes[name] = image_size(place["image"])
            except InputError:
                unreadable.append(name)
                found.pop(name, None)
    if not found:
        return {}, {"detection files": 0, "unusable": unreadable}
    wrong = {"xywh": 0, "xyxy": 0}
    for name, boxes in found.items():
        width, height = sizes.setdefault(name, (math.inf, math.inf))
        for _, (a, b, c, d) in boxes:  # one pixel more than the image is rounding
            wrong["xywh"] += not (c > 0 and d > 0 and a + c <= width + 1 and b + d <= height + 1)
            wrong["xyxy"] += not (c > a and d > b and c <= width + 1 and d <= height + 1)
    form = "xyxy" if wrong["xyxy"] == 0 < wrong["xywh"] else "xywh"
    result, empty = {name: [] for name in found}, 0
    for name, organ, (a, b, c, d) in ((name, *box) for name, boxes in found.items() for box in boxes):
        x1, y1 = (a + c, b + d) if form == "xywh" else (c, d)
        box = [max(a, 0.0), max(b, 0.0), min(x1, sizes[name][0]), min(y1, sizes[name][1])]
        if box[2] > box[0] and box[3] > box[1]:
            result[name].append({"organ": organ, "box": box})
        else:
            empty += 1
    notes = {"detection files": len(found), "boxes read as": form, "boxes beyond their image": wrong[form]}
    return result, notes | {"boxes without area": empty, "unusable": unreadable}


def boxes_in(value):
    """[{organ: [a, b, c, d]}, ...] or {organ: [a, b, c, d] or a list of such} -> [(organ, [a, b, c, d])]."""
    boxes = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict):
            raise InputError("detection.json must hold names and boxes")
        for organ, numbers in entry.items():
            several = isinstance(numbers, list) and numbers and isinstance(numbers[0], list)
            for box in numbers if several else [numbers]:
                four = isinstance(box, list) and len(box) == 4
                if not four or not all(type(n) in (int, float) and abs(n) < 2**31 for n in box):
                    raise InputError(f"the box of {organ} must be four numbers")
                boxes.append((organ, [float(n) for n in box]))
    return boxes


def mask_names(path):
    """mask.txt -> {grey level: organ}, {} where there is none. A line is "3:Heart" (or "Heart:3")."""
    if not path.is_file():
        return {}
    names = {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        first, _, second = (part.strip() for part in line.partition(":"))
        level, name = (first, second) if first.isdecimal() else (second, first)
        if level.isdecimal() and len(level) < 6 and name:
            names[int(level)] = name
    return names


def add_masks(boxes, row_of, names):
    """
    The organs of mask.png take the place of those of the same name in boxes {image: [{"organ", "box"}]}, which is
    changed: one box around each connected part of SMALLEST_PART of the image or more, so that "Lung" is two lungs and
    not what lies between them. What only detection.json has (findings) stays. row_of: {image: a row of it}; names: of
    mask_names -> notes. Masks that cannot be used are counted.
    """
    used, unusable = 0, []
    for image, row in row_of.items() if names else ():
        if row["mask_path"] is None or row["image_path"] is None:
            continue
        try:
            mask = read_mask(row)
        except InputError:
            unusable.append(image)
            continue
        parts = [
            {"organ": names[level], "box": [float(x.start), float(y.start), float(x.stop), float(y.stop)]}
            for level in np.unique(mask).tolist()
            if level in names
            for y, x in parts_of(mask == level)
        ]
        drawn = {part["organ"].lower() for part in parts}
        boxes[image] = parts + [box for box in boxes.get(image) or () if box["organ"].lower() not in drawn]
        used += 1
    return {"masks": used, "unusable masks": unusable}


def parts_of(mask):
    """bool (H, W) -> slices (rows, columns) of its connected parts, those below SMALLEST_PART of the image left out."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    return [s for n, s in enumerate(ndimage.find_objects(labels), 1) if sizes[n] >= SMALLEST_PART * mask.size]


def read_mask(row):
    """
    -> uint8 (H, W), a grey level per organ (SLAKE's mask.txt names them), as large as the image. InputError when it is
    not.
    """
    try:
        with Image.open(row["mask_path"]) as image:  # P: the palette's indices are the labels
            mask = np.asarray(image if image.mode in ("L", "P") else image.convert("L"))
        size = image_size(row["image_path"])
    except (OSError, AttributeError, TypeError, InputError) as error:
        raise InputError(f"the mask of {row['image_id']} cannot be read ({error})") from error
    if mask.shape != size[::-1]:
        raise InputError(
            f"{row['mask_path']} has {mask.shape[1]}x{mask.shape[0]} pixels, its image {size[0]}x{size[1]}"
        )
    return mask


# ------------------------------------------------------------------------------------------------------------- download


def download_vqa_rad(data_dir):
    """
    Fetch everything from the Open Science Framework, which packs it on the way (so no checksum, and no going on after a
    cut); returns the folder. trainset.json and testset.json are not there: they come with
    https://github.com/aioz-ai/MICCAI19-MedVQA. Addresses not verified.
    """
    folder = Path(data_dir) / "vqa_rad"
    if not (folder / PUBLIC).is_file() or not any((folder / name).is_dir() for name in RAD_IMAGES):
        archive = downloads.fetch(RAD_ADDRESS, folder / "VQA_RAD.zip")
        downloads.unpack(archive, folder)
        archive.unlink()
    return expected(folder, (PUBLIC,), RAD_PAGE)


def download_slake(data_dir):
    """
    Fetch questions and images (about 210 MB) from the authors' copy on Hugging Face; returns the folder. Addresses not
    verified.
    """
    folder = Path(data_dir) / "slake"
    for name in ("train.json", "validate.json", "test.json"):
        try:
            downloads.fetch(SLAKE_ADDRESS + name, folder / name)
        except DataNotFound:
            if name != "validate.json":
                raise  # which of the two names that one has there is not verified
            downloads.fetch(SLAKE_ADDRESS + "validation.json", folder / name)
    if not (folder / "imgs").is_dir():
        archive = downloads.fetch(SLAKE_ADDRESS + "imgs.zip", folder / "imgs.zip")
        temporary = folder / "imgs.unpacked"
        downloads.unpack(archive, temporary)
        inner = temporary / "imgs"
        (inner if inner.is_dir() else temporary).rename(folder / "imgs")  # the archive may hold imgs/xmlab1 or xmlab1
        if temporary.is_dir():
            temporary.rmdir()
        archive.unlink()
    return expected(folder, ("train.json", "validate.json", "test.json"), SLAKE_PAGE)


def expected(folder, names, page):
    """The folder, if the files are there; says so when one is not the file that the tests know."""
    for name in names:
        if not (folder / name).is_file():
            raise DataNotFound(
                f"what was downloaded has no {name}; get the files from {page} and put them into {folder}"
            )
        if downloads.sha256_of(folder / name) != KNOWN[name]:
            print(
                f"{folder / name} is not byte for byte the file known here: check the counts printed when it is loaded"
            )
    return folder
