"""
What the splits of VQA-RAD and SLAKE share: `python -m shared.data audit vqa_rad` prints it, prepare_data.py notes it.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from collections import defaultdict

from shared.data.audit import id_of, plain_text, repeats, seen, shared_between_splits, shared_values
from shared.data.audit import similar_across_splits, similar_images, values_of
from shared.runtime import InputError
from vqa_sft_grpo.sources import load_slake, load_vqa_rad


def frames_in(test, train):
    """Rows of `test` whose question_frame is a question of `train`, with the same image and answer (VQA-RAD)."""
    framed = [row | {"question": row["question_frame"]} for row in test if row.get("question_frame")]
    return seen(framed, train) | {"of": len(test)}


def word_overlap(a, b):
    """Jaccard index of the two sets of words: 1 for the same words in any order, 0 for none in common."""
    a, b = set(plain_text(a).split()), set(plain_text(b).split())
    return len(a & b) / len(a | b) if a | b else 1.0


def reworded(test, train, threshold=0.5):
    """
    Rows of `test` for which `train` has the same image and answer and a question with a word overlap of at least
    `threshold`; pairs: (test id, train id, overlap) of the closest one.
    """
    known = defaultdict(list)
    for row in train:
        known[values_of(row, ("image_id", "answer"))].append(row)
    pairs = []
    for row in test:
        others = known.get(values_of(row, ("image_id", "answer")), [])
        overlaps = [word_overlap(row["question"], other["question"]) for other in others]
        if overlaps and max(overlaps) >= threshold:
            pairs.append((id_of(row), id_of(others[overlaps.index(max(overlaps))]), max(overlaps)))
    return {"rows": len(pairs), "of": len(test), "pairs": pairs}


def conflicts(rows):
    """Pairs of image and question that have more than one answer, and the ids of their rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[values_of(row, ("image_id", "question"))].append(row)
    found = [group for group in groups.values() if len({plain_text(row["answer"]) for row in group}) > 1]
    return {"pairs": len(found), "ids": [[id_of(row) for row in group] for group in found]}


def audit_vqa_rad(data_dir, allow_missing_images=False, hash_images=False):
    """What the official split of VQA-RAD hides."""
    questions = load_vqa_rad(data_dir, allow_missing_images=allow_missing_images)
    train, test = questions.split("train"), questions.split("test")
    types = ("image_id", "answer", "question_type_raw", "answer_type")
    opened = [row for row in test if row["answer_type"] == "open"]
    found = {
        "data": questions.facts(),
        "images in two splits": shared_between_splits(questions.rows),
        "test rows with the same image, question and answer in train": seen(test, train),
        "test rows reworded in train, word overlap 0.8": reworded(test, train, 0.8),
        "test rows reworded in train, word overlap 0.5": reworded(test, train, 0.5),
        "test rows with the same image, answer and types in train": seen(test, train, types),
        "open test answers that train has for the same image": seen(opened, train, ("image_id", "answer")),
        "conflicting answers in train": conflicts(train),
    }
    try:
        public = load_vqa_rad(data_dir, version="public", allow_missing_images=allow_missing_images)
    except InputError:  # trainset.json and testset.json are there without it
        public = None
    if public is not None:
        found["test questions whose stock wording is in train"] = frames_in(public.split("test"), train)
        found["linked questions in two splits"] = shared_between_splits(public.rows, "linked_id")
    if hash_images:
        paths = {row["image_id"]: row["image_path"] for row in questions.rows if row["image_path"]}
        found["images"] = similar_images(paths)
    return found


def audit_slake(data_dir, allow_missing_images=False, hash_images=False):
    """What the split of SLAKE hides, English first, then against the Chinese rows."""
    english, chinese = (load_slake(data_dir, language, allow_missing_images) for language in ("en", "zh"))
    train, test = english.split("train"), english.split("test")
    found = {
        "data": english.facts(),
        "images in two splits": shared_between_splits(english.rows),
        "English test images in Chinese train": shared_values(test, chinese.split("train")),
        "English test images in Chinese val": shared_values(test, chinese.split("val")),
        "Chinese test images in English train": shared_values(chinese.split("test"), train),
        "train rows": repeats(train),
        "test questions that occur in train": seen(test, train, ("question",)),
    }
    if hash_images:
        paths = {row["image_id"]: row["image_path"] for row in english.rows if row["image_path"]}
        found["images"] = similar_across_splits([(row["image_id"], row["split"]) for row in english.rows], paths)
    return found
