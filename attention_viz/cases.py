"""
Which questions are asked of which images: rows of a CSV, or the phantom's paraphrase set. One Asked is one question
about one study in all its wordings, variant 0 the original; on the phantom also with the boxes of the finding and the
film drawn anew without it, and without another one.

The CSV: study_id, image_path (from the folder of the CSV), finding, variant_id (0 the original), question, answer_gt
(yes or no, of this wording); and where they are known patient_id, strategy, region (a JSON list of pixel boxes), source
("phantom": drawn by this project).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from shared.data.images import read_pixels
from shared.data.text import read_table, text_of
from shared.metrics.labels import CONDITIONS
from shared.models.hub import FAMILIES
from shared.phantom import DEFAULT, PhantomSettings, phantom_study
from shared.runtime import InputError, atomic_file, write_csv

COLUMNS = "study_id image_path finding variant_id question answer_gt".split()
MORE = "patient_id strategy region source".split()
STRATEGIES = "original synonym clause_order register voice negation other".split()
TEST_START = 700_000  # index of the phantom's first study here; training takes those from 0 on
LONGEST = 1000  # characters of a question
IMAGE_TOKENS = {token for family in FAMILIES.values() for token in family.image_tokens}  # none may stand in a text
YES_NO = {"yes": "yes", "no": "no", "1": "yes", "0": "no", "true": "yes", "false": "no", "y": "yes", "n": "no"}


@dataclass
class Asked:
    """One question about one study. wordings: dicts variant_id, question, answer_gt, strategy; the original first."""

    study_id: str
    patient_id: str
    finding: str
    image: object  # path, or uint8 array
    wordings: list
    boxes: list = field(default_factory=list)  # where the finding asked about is, in pixels of the image; [] unknown
    without: np.ndarray | None = None  # phantom: the film without the finding asked about
    without_other: np.ndarray | None = None  # phantom: the film without another finding
    phantom: bool = False

    @property
    def key(self):
        return f"{self.study_id}|{self.finding}"

    def pixels(self):
        return self.image if isinstance(self.image, np.ndarray) else read_pixels(self.image)


# ------------------------------------------------------------------------------------------------------------- phantom


def phantom_settings(conditions=None, severe=False, guessable=0.0):
    """What the made-up hospital sees: everything, or these conditions alone, each in a quarter of those not well."""
    more = dict(guessable=guessable, severities=(0, 0, 1) if severe else DEFAULT.severities)
    if not conditions:
        return PhantomSettings(**more)
    wrong = [name for name in conditions if name not in CONDITIONS[1:]]
    if wrong:
        raise InputError(f"no condition {wrong[0]!r} to draw; there are {', '.join(CONDITIONS[1:])}")
    return PhantomSettings(prevalence=dict.fromkeys(conditions, 0.35), together={}, normal=0.2, **more)


def wordings_of(question, number, most):
    """A closed question of the phantom -> its original and up to most - 1 paraphrases, one of each kind in turn."""
    kinds = {}
    for p in question.paraphrases:
        kinds.setdefault(p.strategy, []).append(p)
    first = {kind: found[number % len(found)] for kind, found in kinds.items()}
    order = [first[k] for k in ("negation", "synonym", "clause order", "register", "voice") if k in first]
    order += [p for p in question.paraphrases if p not in order]
    found = [(question.text, question.answer, "original")]
    found += [(p.text, p.answer, p.strategy.replace(" ", "_")) for p in order[: most - 1]]
    names = ("question", "answer_gt", "strategy")
    return [{"variant_id": i, **dict(zip(names, words, strict=True))} for i, words in enumerate(found)]


def phantom_cases(count, seed=0, settings=DEFAULT, size=224, variants=6, start=TEST_START):
    """One yes/no question about each of `count` studies that have one, yes and no in turn."""
    cases, index, passed = [], start, 0
    while len(cases) < count:
        study = phantom_study(seed, index, size, settings)
        index += 1
        if study.visit:
            continue  # one study of each patient
        asked = [q for q in study.questions if q.content == "presence" and settings.prevalence.get(q.condition)]
        if not asked:
            if index - start > 50 * (count + 20):
                raise InputError("these phantom settings leave nothing to ask about: name other --conditions")
            continue
        wanted = "no" if len(cases) % 2 else "yes"
        q = next((q for q in asked if q.answer == wanted), None)
        if q is None and passed < 20:
            passed += 1
            continue
        q, passed = q or asked[0], 0
        case = Asked(study.study_id, study.patient_id, q.condition, study.image, wordings_of(q, index, variants),
                     phantom=True)  # fmt: skip
        if q.answer == "yes":
            boxes = {f.name: study.boxes[f.name] for f in study.drawn}
            names = {name for name, found in boxes.items() if found and all(box in q.region for box in found)}
            others = [name for name in boxes if name not in names]
            case.boxes, case.without = q.region, study.without(*names).image
            case.without_other = study.without(others[0]).image if others else None
        cases.append(case)
    return cases


def export_csv(cases, folder):
    """Cases as a user would give them: questions.csv and images/ -> path of the CSV."""
    folder, rows = Path(folder), []
    for case in cases:
        path = f"images/{case.study_id}.png"
        with atomic_file(folder / path) as file:
            Image.fromarray(case.pixels()).save(file, "PNG")
        fixed = dict(study_id=case.study_id, image_path=path, finding=case.finding, patient_id=case.patient_id)
        fixed["source"] = "phantom" if case.phantom else ""
        rows += [fixed | w | {"region": json.dumps(case.boxes)} for w in case.wordings]
    write_csv(folder / "questions.csv", [{name: row[name] for name in (*COLUMNS, *MORE)} for row in rows])
    return folder / "questions.csv"


# ----------------------------------------------------------------------------------------------------------------- CSV


def read_cases(path, n_studies=None):
    """
    A CSV -> (cases, rows of errors.csv, sentences about what is not known). Rows that cannot be used are left out and
    counted. InputError: no such file, a column that is not there, nothing left, or fewer than two patients.
    """
    path, notes = Path(path), []
    rows = read_table(path, COLUMNS, "--csv ", MORE)
    for _, row in rows:
        row |= {name: re.sub(r"\.0*$", "", row[name]) for name in ("variant_id", "answer_gt")}  # 1.0 is 1
        if not os.path.isfile(path.parent / row["image_path"]):
            row["image_path"] = row["image_path"].replace("\\", "/")
    studies = list(dict.fromkeys(row["study_id"] for _, row in rows))
    if n_studies and len(studies) > n_studies:
        notes.append(f"The first {n_studies} of {len(studies)} studies were read; --n-studies takes more.")
    studies = set(studies[:n_studies])
    rows = [(line, row) for line, row in rows if row["study_id"] in studies]
    patients = {}  # merged cells of a spreadsheet: the first row of a study names its patient, the others are empty
    for _, row in rows:
        patients[row["study_id"]] = patients.get(row["study_id"]) or text_of(row.get("patient_id"))
    for _, row in rows:
        row["patient_id"] = text_of(row.get("patient_id")) or patients[row["study_id"]]
    groups, errors, seen = {}, [], {}
    for line, row in rows:
        problem = check_row(row, path.parent, seen)
        if problem:
            errors.append({"line": line, "study_id": row["study_id"], "error": problem})
        else:
            groups.setdefault((row["study_id"], row["finding"]), []).append((line, row))
    cases, used = [], []
    for lines in groups.values():
        found = [row for _, row in lines]
        original = next((row for row in found if int(row["variant_id"]) == 0), None)
        if original is not None and len({row["image_path"] for row in found}) == 1:
            cases.append(case_of(original, found, path.parent))
            used += found
            continue
        why = "this question has no variant 0 to compare with" if original is None else "its wordings differ in image"
        errors += [{"line": line, "study_id": row["study_id"], "error": why} for line, row in lines]
    unnamed = sum(not row["patient_id"] for row in used)
    if unnamed:
        notes.append(f"{unnamed} of {len(used)} rows have no patient_id: each study of theirs counts as a patient, so"
                     " intervals may be too short.")  # fmt: skip
    odd = sum(boxes_of(row) is None for _, row in rows)
    if odd:
        told = "are no lists of boxes [x0, y0, x1, y1] in pixels: their questions count as without boxes"
        notes.append(f"{odd} regions {told}.")
    if not cases:
        first = f"; line {errors[0]['line']}: {errors[0]['error']}" if errors else ""
        raise InputError(f"no row of {path} can be used{first}")
    if len({case.patient_id for case in cases}) < 2:
        raise InputError(f"{path} has one patient: nothing can be compared between patients; give at least two")
    return cases, errors, notes


def check_row(row, folder, seen):
    """-> what is wrong with a row, or None."""
    if not text_of(row["question"]) or not text_of(row["study_id"]):
        return "question or study_id is empty"
    if len(row["question"]) > LONGEST or any(token in row["question"] for token in IMAGE_TOKENS):
        return f"the question is longer than {LONGEST} characters, or holds a token that stands for an image"
    if not row["variant_id"].isdecimal() or len(row["variant_id"]) > 6:
        return f"variant_id is {row['variant_id'][:20]!r}, not a whole number"
    if row["answer_gt"].lower() not in YES_NO:
        return f"answer_gt is {row['answer_gt']!r}, not yes or no"
    if not os.path.isfile(folder / row["image_path"]):
        return f"there is no image {row['image_path'][:200]}"
    if seen.setdefault(row["study_id"], row["patient_id"]) != row["patient_id"]:
        return "this study stood in the file before with another patient_id"
    key = row["study_id"], row["finding"], int(row["variant_id"])
    if key in seen:
        return "this study, finding and variant_id stood in the file before"
    seen[key] = True
    return None


def boxes_of(row):
    """-> list of boxes, [] where no region is given, None where it cannot be read."""
    try:
        boxes = json.loads(text_of(row.get("region")) or "[]")
        boxes = [[float(v) for v in box] for box in boxes]
    except (ValueError, TypeError, RecursionError):
        return None
    finite = all(len(b) == 4 and all(map(math.isfinite, b)) for b in boxes)
    fine = finite and all(b[0] < b[2] and b[1] < b[3] and max(b) > 1 for b in boxes)  # to 1: shares of the image
    return boxes if fine else None


def case_of(original, rows, folder):
    wordings = []
    for row in sorted(rows, key=lambda row: int(row["variant_id"])):
        answer, known = YES_NO[row["answer_gt"].lower()], strategy_of(row.get("strategy", ""))
        turned = answer != YES_NO[original["answer_gt"].lower()]
        strategy = "original" if row is original else "negation" if turned else known
        variant, question = int(row["variant_id"]), row["question"]
        wordings.append(dict(variant_id=variant, question=question, answer_gt=answer, strategy=strategy))
    yes = YES_NO[original["answer_gt"].lower()] == "yes"  # a no points at nothing
    boxes = boxes_of(original) or [] if yes else []
    patient, path = original["patient_id"] or original["study_id"], folder / original["image_path"]
    drawn = any(row.get("source", "").lower() == "phantom" for row in rows)
    return Asked(original["study_id"], patient, original["finding"], path, wordings, boxes, phantom=drawn)


def strategy_of(text):
    """Free words -> one of STRATEGIES; public files spell them in a hundred ways."""
    text = text.lower().replace("_", " ")
    table = {"negat": "negation", "synonym": "synonym", "lexical": "synonym", "order": "clause_order",
             "syntact": "clause_order", "passive": "voice", "voice": "voice", "register": "register",
             "formal": "register", "colloquial": "register", "clinical": "register"}  # fmt: skip
    return next((kind for word, kind in table.items() if word in text), "other")
