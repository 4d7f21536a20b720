"""
Films and their reports: IU X-ray or the phantom, by split, in one form for training and evaluation.

    data = load_reports("phantom", "data", films=8000, seed=0)      # or "iu_xray", or "auto"
    for case in data.split("train"):
        case.film, case.report

A report is written with its sections named, so that both can be read again from what a model writes:
    FINDINGS: The heart is large. IMPRESSION: Cardiomegaly.                 (each on a line of its own)
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from dataclasses import dataclass, field

from shared.data.iu_xray import load_iu_xray
from shared.models.hub import explained
from shared.phantom import phantom_settings, phantom_study
from shared.report import PHANTOM
from shared.runtime import DataNotFound, InputError

NAMES = ("iu_xray", "phantom", "auto")
# far apart and multiples of eight: no patient is in two splits
PHANTOM_START = {"train": 0, "val": 8_000_000, "test": 16_000_000}
# The five that a small model can learn when they are severe.
SEVERE = dict(
    conditions=["Pleural Effusion", "Pneumothorax", "Consolidation", "Cardiomegaly", "Edema"],
    prevalence=0.25,
    severities=[0, 0, 1],
)
SECTIONS = ("findings", "impression")


@dataclass
class Case:
    """One study with its report."""

    id: str
    patient: str
    split: str
    film: object  # path of the frontal film, or uint8 (H, W)
    findings: str
    impression: str
    indication: str = ""  # the clinical question
    study: object = field(default=None, repr=False)  # of the phantom: everything that is true of the film

    @property
    def report(self):
        return as_report(self.findings, self.impression)


@dataclass
class Reports:
    name: str
    cases: list
    facts: dict  # for metrics.json, and what load_again needs

    def split(self, name):
        return [case for case in self.cases if case.split == name]


def as_report(findings, impression):
    """The target of the training: sections that are there, named, a line each."""
    parts = zip(SECTIONS, (findings, impression), strict=True)
    return "\n".join(f"{name.upper()}: {' '.join(text.split())}" for name, text in parts if text)


NAMED = "findings|impression|classification|confidence"
HEADS = re.compile(rf"(?im)^[\s*#>_-]*({NAMED})\b[\s*_]*[:\n-][\s*_:]*|(?-i:\b({NAMED.upper()}))\**:\s*")


def sections_of(text):
    """
    What a model wrote -> {"findings", "impression", ...: text} by the headings found: at the beginning of lines in any
    usual dress ("**Findings:**", "IMPRESSION -"), in capitals with a colon anywhere. The first of two with one name
    counts; without any heading everything is findings.
    """
    found = list(HEADS.finditer(text))
    if not found:
        return {"findings": text.strip()}
    parts = {}
    for head, after in zip(found, [*found[1:], None], strict=True):
        body = text[head.end() : after.start() if after else len(text)].strip().strip("*_").strip()
        parts.setdefault((head[1] or head[2]).lower(), body)
    return parts


def load_reports(name, data_dir, films=4000, seed=0, image_size=112, chosen=None, limit=None, splits=None):
    """
    -> Reports. name: iu_xray (R2Gen's split; findings must be there, the impression may be missing), phantom (films to
    train on, and a tenth each for validation and test, of other patients; chosen: arguments of phantom_settings, by
    default SEVERE), or auto: IU X-ray where it is in data_dir, else the phantom, said aloud. splits: those to be
    loaded. limit: the first so many cases of each. InputError when nothing can be had.
    """
    splits = splits or ("train", "val", "test")
    if str(name).lower() not in NAMES:
        raise InputError(f"--data {name}: reports are in {', '.join(NAMES)}")
    name = str(name).lower()
    if name != "phantom":
        try:
            return iu_reports(data_dir, splits, limit)
        except DataNotFound as error:
            if name != "auto":
                raise
            print(f"{'*' * 100}\n{error}\n{PHANTOM}\n{'*' * 100}")
    return phantom_reports(films, seed, image_size, chosen or SEVERE, splits, limit)


def iu_reports(data_dir, splits, limit=None):
    studies = load_iu_xray(data_dir, section="findings", split="r2gen")
    if limit:
        studies.limit(limit)
    print(studies)
    cases = [
        Case(
            str(row["uid"]), row["patient"], row["split"], row["image_path"], row["findings"], row["impression"],
            row["indication"],
        )
        for row in studies.rows
        if row["split"] in splits
    ]  # fmt: skip
    return Reports("iu_xray", cases, studies.facts() | {"phantom": False, "limit": limit})


def phantom_reports(films, seed, image_size, chosen, splits, limit=None):
    settings, cases = phantom_settings(**chosen), []
    numbers = {"train": films, "val": max(2, films // 10), "test": max(2, films // 10)}
    for split in splits:
        for number in range(min(numbers[split], limit or films)):
            study = phantom_study(seed, PHANTOM_START[split] + number, image_size, settings)
            told, name = study.report, f"phantom-{study.study_id}"
            texts = told.findings, told.impression, told.indication
            cases.append(Case(name, study.patient_id, split, study.image, *texts, study))
            del study.__dict__["_film"]  # masks of 8,000 films are a gigabyte; the film itself stays in the case
    counts = {split: sum(case.split == split for case in cases) for split in splits}
    words = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"phantom ({words} films of {image_size} px): {', '.join(chosen.get('conditions') or ['all conditions'])}")
    facts = {"name": "phantom", "phantom": True, "counts": counts, "limit": limit, "settings": settings.key()}
    again = {"films": films, "seed": seed, "image_size": image_size, "chosen": chosen}
    return Reports("phantom", cases, facts | {"again": again})


def load_again(facts, data_dir, splits=None, limit=None):
    """The data that a model was trained on, from the facts in its training.json."""
    with explained("training.json does not say which films the model was trained on"):
        return load_reports(facts["name"], data_dir, limit=limit, splits=splits, **facts.get("again", {}))


def as_films(images):
    """uint8 (N, C, H, W) -> arrays (H, W) or (H, W, 3)."""
    return [image[0].numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).numpy() for image in images]
