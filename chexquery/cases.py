"""
The studies that CheXQuery trains on and is measured on: rows of IU X-ray or the phantom, their labels, their films.

A row is a dict:
    uid, patient, split, dataset
    films          {"frontal": path or None, "lateral": path or None}; of the phantom {"seed", "index"} to draw it from
    report         what the model learns to write: the section(s), sentences with removed words (XXXX) left out
    reference      the same text untouched, which scores are computed against
    labels         the 14 conditions by name: 1, 0, -1 (suspected) or None (not mentioned)
    truth          phantom only: the 14 conditions as 1 or 0, what the film shows
    regions        the 6 regions by name: 1 a sentence says something abnormal of it, 0 only normal things, None nothing
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import re

import numpy as np
import torch
from PIL import Image

from shared.data.audit import RowSet, repeats, seen, shared_between_splits
from shared.data.augment import affine
from shared.data.images import find_images, read_image
from shared.data.iu_xray import load_iu_xray, mesh_labels
from shared.metrics.labels import CONDITIONS, PARENTS, label_report
from shared.phantom import phantom_settings, phantom_study
from shared.runtime import DataNotFound, InputError, bounded, fraction, read_json, seed_number, write_json

REGIONS = {  # words that tell which region a sentence speaks of; a mirror pair, then the unpaired ones
    "cardiac": r"heart|cardiac|cardiomegaly|cardiomediastin\w*|pericard\w*",
    "left_lung": r"left|bilateral(?:ly)?|both|lungs|bibasilar|pulmonary",
    "right_lung": r"right|bilateral(?:ly)?|both|lungs|bibasilar|pulmonary",
    "mediastinum": r"mediastin\w*|cardiomediastin\w*|hil(?:a|ar|um)|aort\w*",
    "diaphragm": r"diaphragm\w*|hemidiaphragm\w*|costophrenic",
    "spine": r"spine|spinal|vertebra\w*|thoracic|scoliosis|degenerative",
}
VIEWS = ("frontal", "lateral")
SECTIONS = ("findings", "impression", "findings+impression")
LABELS = ("labeller", "mesh", "chexbert", "truth")
# Options that say which studies there are; a checkpoint holds them, so that evaluate.py takes the same.
AGAIN = tuple("data splits_file section labels films phantom_seed conditions prevalence severe".split())
PHANTOM_START = {"train": 0, "val": 8_000_000, "test": 16_000_000}  # studies of the splits are never the same patients


# --------------------------------------------------------------------------------------------------------------- texts


def target_text(findings, impression, section, filled=True):
    """The text of one section, or both in one line. filled: without sentences in which words were removed."""
    findings, impression = ((drop_removed(t) if filled else t) or "" for t in (findings, impression))
    if section == "findings+impression":
        if not (findings or impression):
            return ""
        findings = findings or "No detailed findings documented."
        impression = impression or "No specific impression documented."
        return f"Findings: {findings} | Impression: {impression}"
    return findings if section == "findings" else impression


def sections_of(text, section):
    """What target_text put together, apart again -> {"findings": text, "impression": text}, those there are."""
    if section != "findings+impression":
        return {section: text}
    findings, _, impression = text.partition(" | Impression: ")
    return {"findings": findings.removeprefix("Findings: "), "impression": impression}


def drop_removed(text):
    parts = re.split(r"(?<=[.!?])\s+", text or "")
    return " ".join(part for part in parts if not re.search(r"x{3,}", part, re.IGNORECASE)).strip()


def sentences_of(text):
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\s\|\s", text) if part.strip()]


@functools.lru_cache(maxsize=100_000)
def sentence_labels(sentence):
    return label_report(sentence)


def is_abnormal(sentence):
    """Does it state or suspect something abnormal?"""
    return any(v in (1, -1) for k, v in sentence_labels(sentence).items() if k not in ("No Finding", "Support Devices"))


def abnormal_sentences(text):
    """The sentences of a report that state or suspect something abnormal; where there are none, that."""
    return " ".join(filter(is_abnormal, sentences_of(text))) or "No abnormality."


def region_labels(text):
    """Weak targets from words: does a sentence that names the region state or suspect something abnormal?"""
    found = dict.fromkeys(REGIONS)
    for sentence in sentences_of(text):
        for name, words in REGIONS.items():
            if re.search(rf"\b(?:{words})\b", sentence, re.IGNORECASE):
                found[name] = max(found[name] or 0, int(is_abnormal(sentence)))
    return found


# ---------------------------------------------------------------------------------------------------------------- rows


def hospital(conditions=None, prevalence=None, severe=False):
    """The phantom's settings; severe: severe findings only."""
    return phantom_settings(conditions, prevalence, (0, 0, 1) if severe else None)


def phantom_rows(films, seed=0, section="findings", labels="labeller", **drawn):
    """films: studies of train; val gets a tenth, test three tenths. drawn: of `hospital`. -> RowSet"""
    if labels not in ("labeller", "truth"):
        raise InputError(
            f"--labels {labels}: the phantom has labeller, and truth, what was drawn; it has no MeSH terms"
        )
    settings, rows = hospital(**drawn), []
    for split, n in {"train": films, "val": max(8, films // 10), "test": max(8, 3 * films // 10)}.items():
        for index in range(PHANTOM_START[split], PHANTOM_START[split] + n):
            study = phantom_study(seed, index, 64, settings)
            text = target_text(study.report.findings, study.report.impression, section)
            row = {"uid": f"{seed}-{index}", "patient": study.patient_id, "split": split, "dataset": "phantom"}
            row |= {"films": {"seed": seed, "index": index}, "report": text, "reference": text, "truth": study.labels}
            row |= {"labels": study.labels if labels == "truth" else label_report(text), "regions": region_labels(text)}
            rows.append(row)
    notes = {"drawn": drawn, "phantom": True, "section": section, "labels": labels}
    return RowSet("phantom", "shared/phantom", rows, version=f"{films} films, seed {seed}", notes=notes)


def iu_rows(data_dir, section="findings", split="r2gen", reports="auto", labels="labeller", labeller=None, seed=0):
    """split: r2gen or patient (70/15/15 of the uids). labeller: texts -> label dicts, for labels chexbert. -> RowSet"""
    if labels == "truth" or (labels == "chexbert" and labeller is None):
        more = (
            "make the rows with prepare.py --chexbert FILE DIR" if labels == "chexbert" else "only the phantom has it"
        )
        raise InputError(f"--labels {labels}: {more}")
    either = section == "findings+impression"  # a filler stands for the section that a report lacks
    shares = {"train": 0.7, "val": 0.15, "test": 0.15}
    studies = load_iu_xray(data_dir, "findings" if either else section, split, (), reports, shares=shares, seed=seed)
    studies.keep(
        lambda row: row["image_path"] or row["lateral_path"], "no film on disk that is known as frontal or lateral"
    )
    rows = []
    for study in studies.rows:
        texts = study["findings"], study["impression"], section
        films = {"frontal": study["image_path"], "lateral": study["lateral_path"]}
        row = {"uid": study["uid"], "patient": study["patient"], "split": study["split"], "dataset": "iu_xray"}
        row |= {"films": {view: str(path) if path else None for view, path in films.items()}}
        row |= {"reference": target_text(*texts, filled=False), "mesh": study["mesh"]}
        # No test study is left out: what is learned needs a sentence without removed words, what is scored does not.
        row["report"] = target_text(*texts) or (row["reference"] if row["split"] == "test" else "")
        rows.append(row)
    studies.rows = rows
    studies.keep(lambda row: row["report"], "no sentence without removed words")
    found = labeller([row["report"] for row in studies.rows]) if labels == "chexbert" else None
    for i, row in enumerate(studies.rows):
        row["regions"] = region_labels(row["report"])
        row["labels"] = (
            found[i] if found else mesh_labels(row["mesh"]) if labels == "mesh" else label_report(row["report"])
        )
    studies.notes |= {"phantom": False, "section": section, "labels": labels}
    return studies


def audit(rows):
    """What the splits share, and how many reports of val and test stand in train word for word."""
    by_split = {name: [row for row in rows if row["split"] == name] for name in ("train", "val", "test")}
    return {
        "patients in two splits": shared_between_splits(rows, "patient"),
        "reports": {name: repeats(part, ("report",)) for name, part in by_split.items()},
        "reports that occur in train": {n: seen(by_split[n], by_split["train"], ("report",)) for n in ("val", "test")},
    }


def write_splits(path, studies, **more):
    facts = studies.facts() | {"audit": audit(studies.rows)} | more
    write_json(path, {"facts": facts, "rows": studies.rows})


def wrong_in(row, phantom):
    """-> what is missing from a row of a splits file, or cannot be right, or None. phantom: are its films drawn?"""
    if not isinstance(row, dict):
        return "all its fields"
    films, kinds = row.get("films"), {"uid": (str, int), "patient": (str, int), "report": str, "reference": str}
    drawn = isinstance(films, dict) and set(films) == {"seed", "index"}
    known = {name: (1, 0, -1, None) for name in CONDITIONS}, {name: (1, 0, None) for name in REGIONS}
    right = {name: isinstance(row.get(name), kind) and row[name] != "" for name, kind in kinds.items()}
    right |= {"report": isinstance(row.get("report"), str), "split": row.get("split") in ("train", "val", "test")}
    for name in ("report", "reference"):  # half a character cannot be tokenized
        right[name] = right[name] and not re.search("[\ud800-\udfff]", row[name])
    right["films"] = (
        isinstance(films, dict)
        and drawn == phantom
        and (
            all(type(value) is int for value in films.values())
            if drawn
            else set(films) <= set(VIEWS) and all(isinstance(path, (str, type(None))) for path in films.values())
        )
    )
    for name, values in zip(("labels", "regions"), known, strict=True):
        found = row.get(name)
        right[name] = isinstance(found, dict) and all(k in found and found[k] in v for k, v in values.items())
    right["truth"] = not drawn or isinstance(row.get("truth"), dict) and set(CONDITIONS) <= set(row["truth"])
    return next((name for name, fine in right.items() if not fine), None)


def read_splits(path):
    """-> RowSet. InputError for a file that is not of prepare.py, for splits that overlap, for reports without text."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list) or not found["rows"]:
        raise InputError(f"{path} was not written by chexquery/prepare.py: it lacks facts or rows; make it again")
    rows, facts, uids = found["rows"], found.get("facts"), set()
    try:
        notes, said = facts["notes"], isinstance(facts["name"], str) and "labels" in facts["notes"]
        said = said and notes["section"] in SECTIONS and type(notes["phantom"]) is bool
        hospital(**(notes.get("drawn") or {}))
    except (KeyError, TypeError, AttributeError):
        said = False
    if not said:
        raise InputError(f"{path}: its facts do not say what the rows are; make the file again with prepare.py")
    for row in rows:
        if wrong := wrong_in(row, notes["phantom"]):
            raise InputError(f"{path}: a row lacks {wrong}, or it cannot be right; make the file again with prepare.py")
        if not row["report"].strip():
            raise InputError(f"{path}: the report of study {row['uid']} has no text; leave that study out")
        uids.add(str(row["uid"]))
    patients = [{"split": row["split"], "patient": str(row["patient"])} for row in rows]
    for pair, shared in shared_between_splits(patients, "patient").items():
        if shared["shared"]:
            raise InputError(
                f"{path}: {shared['shared']} patients are both in {pair.replace(', ', ' and in ')}, the first is"
                f" {shared['ids'][0]}; make the file again with chexquery/prepare.py"
            )
    if len(uids) < len(rows):
        raise InputError(f"{path}: {len(rows) - len(uids)} studies stand there twice; make it again with prepare.py")
    return RowSet(facts["name"], facts.get("source", str(path)), rows, facts.get("version", ""), notes=facts["notes"])


def load_studies(args):
    """
    The rows of train.py, evaluate.py, visualize.py: of --splits-file where it is given or there; else --data phantom
    (auto: IU X-ray where it is at hand, else the phantom) made on the spot as prepare.py would. -> RowSet
    """
    name = args.data.lower()
    if args.splits_file and name not in ("auto", "file"):
        raise InputError("--data and --splits-file both say which studies: give one of the two")
    if args.splits_file:
        studies = read_splits(args.splits_file)
    elif name in ("auto", "iu_xray"):
        try:
            studies = iu_rows(args.data_dir, args.section, labels=args.labels)
        except DataNotFound:
            if name != "auto":
                raise
            print(f"no IU X-ray in {args.data_dir}: taking the phantom")
            name = "phantom"
    elif name != "phantom":
        raise InputError(
            f"--data {args.data}: there are auto, iu_xray and phantom, and --splits-file FILE of prepare.py"
        )
    if name == "phantom":
        studies = phantom_rows(
            args.films, args.phantom_seed, args.section, args.labels, conditions=args.conditions,
            prevalence=args.prevalence, severe=args.severe,
        )  # fmt: skip
    if args.limit:
        studies.limit(args.limit)
    no_film = f"no film of the views {', '.join(args.views)}"
    studies.keep(lambda row: "index" in row["films"] or paths_of(row, args.views), no_film)
    broken = {row["uid"]: wrong for row in studies.rows if (wrong := unreadable(row, args.views))}
    if broken:
        first = f"a film cannot be read, the first {next(iter(broken.values()))}"
        studies.keep(lambda row: row["uid"] not in broken, first)
    return studies


def paths_of(row, views):
    return [path for view in views if (path := row["films"].get(view))]


def unreadable(row, views):
    """-> the first film that cannot be read, and why, or None. Looked at before the work begins, not at its turn."""
    for path in paths_of(row, views):
        try:
            read_image(path)
        except InputError as error:
            return f"{path}: {error}"
    return None


def add_data_options(group):
    # fmt: off
    group.add_argument("--splits-file", metavar="FILE", help="rows of prepare.py; without it they are made here")
    group.add_argument("--section", default="findings", choices=SECTIONS,
        help="what the reports hold; both: 'Findings: ... | Impression: ...' (%(default)s)")
    group.add_argument("--labels", default="labeller", choices=LABELS,
        help="label targets: rules on the text, MeSH terms, CheXbert (prepare.py), or what was drawn (%(default)s)")
    group.add_argument("--films", type=bounded(int, 1, 10**6, "must be at least 1"), default=4000,
        help="phantom: studies to train on (%(default)s)")
    group.add_argument("--phantom-seed", type=seed_number, default=0, help="phantom: which hospital (%(default)s)")
    group.add_argument("--conditions", nargs="+", metavar="NAME", help="phantom: draw these only (default: all 13)")
    group.add_argument("--prevalence", type=fraction, metavar="SHARE", help="phantom: chance of each of them")
    group.add_argument("--severe", action="store_true", help="phantom: severe findings only")
    # fmt: on


# --------------------------------------------------------------------------------------------------------------- films


def study_of(row, drawn, size):
    """The phantom study of a row; drawn: notes["drawn"] of its RowSet."""
    return phantom_study(row["films"]["seed"], row["films"]["index"], size, hospital(**drawn))


def square(pixels, size):
    """float (H, W) or (H, W, 3) in 0..1 -> uint8 (size, size): the whole film, squeezed to a square as for SigLIP."""
    if pixels.ndim == 3:
        pixels = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32)).resize((size, size), Image.BICUBIC)
    return np.clip(np.asarray(image) * 255, 0, 255).round().astype(np.uint8)


class Films:
    """The films of rows as uint8 (N, 2, size, size), read or drawn when first asked for, kept while they fit `gib`."""

    def __init__(self, rows, size, drawn=None, views=VIEWS, gib=4.0):
        self.rows, self.size, self.views, self.drawn = rows, size, views, drawn or {}
        shape = (len(rows), len(VIEWS), size, size)
        self.kept = np.zeros(shape, np.uint8) if np.prod(shape) < gib * 2**30 else None
        self.known, self.present = np.zeros(len(rows), bool), np.zeros((len(rows), len(VIEWS)), bool)

    def __len__(self):
        return len(self.rows)

    def read(self, row):
        """-> uint8 (2, size, size), bool (2,)"""
        images, present = np.zeros((len(VIEWS), self.size, self.size), np.uint8), np.zeros(len(VIEWS), bool)
        for i, view in enumerate(VIEWS):
            if view not in self.views:
                continue
            if "index" in row["films"]:
                study = study_of(row, self.drawn, self.size)
                images[i], present[i] = (study.image if view == "frontal" else study.lateral), True
            elif row["films"].get(view):
                try:
                    images[i], present[i] = square(read_image(row["films"][view]), self.size), True
                except InputError as error:
                    raise InputError(f"study {row['uid']}: {row['films'][view]}: {error}") from error
        if not present.any():
            raise InputError(f"study {row['uid']} has no film of the views {', '.join(self.views)}: leave it out")
        return images, present

    def get(self, indices):
        """-> uint8 (n, 2, size, size), bool (n, 2)"""
        if self.kept is None:
            found = [self.read(self.rows[i]) for i in indices]
            return np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
        for i in indices:
            if not self.known[i]:
                self.kept[i], self.present[i] = self.read(self.rows[i])
                self.known[i] = True
        return self.kept[indices], self.present[indices]


def add_file_options(group):
    # fmt: off
    group.add_argument("--images", nargs="+", metavar="FILE", help="frontal films: files, folders, patterns")
    group.add_argument("--lateral", nargs="+", metavar="FILE",
        help="their lateral films, as many, in the same order; or, without --images, lateral films alone")
    # fmt: on


def read_files(args, size, views):
    """
    --images and --lateral, as pairs or one of them -> (rows {"uid", "patient", "films"}, uint8 (N, 2, size, size),
    bool (N, 2), errors [{"image", "error"}]). A study with a film that cannot be read is an error. InputError when none
    is left, or for films of another view than the model was trained on.
    """
    for view, files in zip(VIEWS, (args.images, args.lateral), strict=True):
        if files and view not in views:
            option = "--images" if views[0] == VIEWS[0] else "--lateral"
            raise InputError(f"this model was trained on {views[0]} films alone: give {option} and no {view} ones")
    given = [files for files in (args.images, args.lateral) if files]
    found = [find_images(given[0])[: args.limit]]
    if len(given) > 1:  # pairs: a film may stand there twice
        found = [[path for name in files for path in find_images([name])][: args.limit] for files in given]
    if len(found[-1]) != len(found[0]):
        raise InputError(f"{len(found[0])} frontal and {len(found[1])} lateral films: give one lateral film for each")
    none = [None] * len(found[0])
    frontal, lateral = (found.pop(0) if files else none for files in (args.images, args.lateral))
    rows, images, errors = [], [], []
    for pair in zip(frontal, lateral, strict=True):
        both = np.zeros((len(VIEWS), size, size), np.uint8)
        try:
            for i, file in enumerate(pair):
                if file is not None:
                    both[i] = square(read_image(file), size)
        except InputError as error:
            errors.append({"image": str(file), "error": str(error)})
            continue
        films = {view: None if file is None else str(file) for view, file in zip(VIEWS, pair, strict=True)}
        name = (pair[0] or pair[1]).name
        rows.append({"uid": name, "patient": name, "films": films})
        images.append(both)
    if not rows:
        raise InputError(f"none of the films can be used; the first: {errors[0]['image']}: {errors[0]['error']}")
    return rows, np.stack(images), np.array([[f is not None for f in r["films"].values()] for r in rows]), errors


def changed(images):
    """uint8 (B, V, S, S) -> float 0..255: turned up to 5 degrees, moved 3 %, zoomed 3 %, 5 % brighter and harder."""
    n = images.shape[0] * images.shape[1]
    draw = (torch.rand(6, n, 1, 1, 1) * 2 - 1).to(images.device)
    x = affine(images.reshape(n, 1, *images.shape[2:]).float() / 255, 5 * draw[0], 0.03 * draw[1], 0.03 * draw[2],
               1 + 0.03 * draw[3])  # fmt: skip
    x = ((x - 0.5) * (1 + 0.05 * draw[4]) + 0.5 + 0.05 * draw[5]).clamp(0, 1)
    return x.view(images.shape) * 255


def epoch_order(rows, seed, balanced):
    """Indices of one epoch; balanced: with repetition, abnormal and normal studies alike often."""
    generator = torch.Generator().manual_seed(seed)
    abnormal = torch.tensor([row["labels"]["No Finding"] != 1 for row in rows])
    if not balanced or abnormal.all() or not abnormal.any():
        return torch.randperm(len(rows), generator=generator).tolist()
    weights = torch.where(abnormal, 1 / abnormal.sum(), 1 / (~abnormal).sum())
    return torch.multinomial(weights, len(rows), replacement=True, generator=generator).tolist()


# ------------------------------------------------------------------------------------------------------------- targets


def label_targets(rows, uncertain="positive"):
    """
    -> float32 (N, 14) in the order of CONDITIONS and its mask. In a report that says anything at all, what is not
    mentioned counts as absent; a report without any label is masked whole. uncertain: positive, negative or ignore.
    """
    values = np.array([[row["labels"][name] if row["labels"][name] is not None else np.nan for name in CONDITIONS]
                       for row in rows], dtype=np.float32).reshape(-1, len(CONDITIONS))  # fmt: skip
    mask = np.repeat(~np.isnan(values).all(1, keepdims=True), len(CONDITIONS), 1)
    doubtful = values == -1
    targets = np.nan_to_num((values == 1).astype(np.float32))
    if uncertain == "positive":
        targets[doubtful] = 1
    return targets, (mask & ~doubtful if uncertain == "ignore" else mask).astype(np.float32)


def region_targets(rows):
    values = np.array([[row["regions"][r] if row["regions"][r] is not None else np.nan for r in REGIONS]
                       for row in rows], dtype=np.float32).reshape(-1, len(REGIONS))  # fmt: skip
    return np.nan_to_num(values), (~np.isnan(values)).astype(np.float32)


def closed_upwards(labels):
    """Labels of a text as labels of a film: a stated child makes its parents true (1 or 0, by name)."""
    true = {name for name in CONDITIONS if labels[name] in (1, -1)}
    for name in list(true):
        while name in PARENTS:
            name = PARENTS[name]
            true.add(name)
    return {name: int(name in true) for name in CONDITIONS}
