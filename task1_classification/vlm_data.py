"""
Films with several labels each, for the vlm_ scripts: IU X-ray with labels from its index, the phantom, MedMNIST sets,
or a table of one's own, in one form.

    films = load_films("films.csv")                                   # as vlm_prepare.py writes it
    films = load_films("iu_xray", "data", split="patient", labels="mesh14")
    films.truth[films.rows_of("train")]                               # float32 (n, L): 1, 0, NaN for unknown

A table has a row per film and the columns id, patient, split (train, val, test), image (a path, from the table's folder
where it is relative) and, if there is one, report; every other column is a label: 1, 0, or empty for unknown.

Labels of IU X-ray. The indexers wrote terms such as "Opacity/lung/base"; a label is positive where an item has the head
and all the qualifiers named in MESH14 (shared/data/iu_xray.py) or MESH9; one marked "No Indexing" is unknown.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.data.image_sets import INFO, SPLITS, load_images
from shared.data.images import read_image
from shared.data.iu_xray import MESH14, add_image_paths, find_iu_xray, mesh_labels, r2gen_split, read_reports
from shared.data.text import read_table, text_of
from shared.metrics.labels import CONDITIONS, label_report
from shared.metrics.statistics import auroc
from shared.phantom import phantom_settings, phantom_study
from shared.report import PHANTOM
from shared.runtime import DataNotFound, InputError, bounded, command, newest_run, positive_int

LABEL_SOURCES = ("mesh14", "mesh9", "reports")
SPLIT_KINDS = ("patient", "r2gen", "small")
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}
SMALL_TEST = 100  # studies; only to compare with work that used so few
COLUMNS = ("id", "patient", "split", "image")
NOT_LABELS = (*COLUMNS, "report", "study")
# Far apart and multiples of eight, the phantom's groups of patients: no patient is in two splits.
PHANTOM_START = {"train": 0, "val": 8_000_000, "test": 16_000_000}

MESH9 = {  # as MESH14: the nine of earlier work, a blunted angle counted as an effusion
    "Atelectasis": "Pulmonary Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation; Infiltrate; Airspace Disease",
    "Edema": "Pulmonary Edema; Pulmonary Congestion",
    "Pleural Effusion": "Pleural Effusion; Costophrenic Angle/blunted",
    "Pneumonia": "Pneumonia",
    "Granuloma": "Calcified Granuloma; Granulomatous Disease",
    "Emphysema": "Emphysema; Pulmonary Emphysema",
    "No Finding": "normal",
}
MAPPINGS = {"mesh14": MESH14, "mesh9": MESH9}


@dataclass
class Films:
    """rows: dicts with id, patient, split, image (path, or uint8 array), report; truth (N, L): 1, 0, NaN unknown."""

    name: str
    labels: tuple
    rows: list
    truth: np.ndarray
    again: dict  # arguments of load_films that give the same films
    phantom: bool = False
    notes: dict = field(default_factory=dict)
    whole: dict | None = None  # facts of the set that this is a part of

    def part(self, *splits):
        """The films of these splits, which still says of itself what the whole set does."""
        rows = self.rows_of(*splits)
        some, facts = [self.rows[i] for i in rows], self.facts()
        return Films(self.name, self.labels, some, self.truth[rows], self.again, self.phantom, self.notes, facts)

    def rows_of(self, *splits):
        return np.array([i for i, row in enumerate(self.rows) if row["split"] in splits], int)

    def column(self, name, rows=None):
        return [self.rows[i][name] for i in (range(len(self.rows)) if rows is None else rows)]

    def only(self, names):
        """Keep these labels, in this order. InputError for one that is not there."""
        names = list(dict.fromkeys(names))
        for name in names:
            if name not in self.labels:
                raise InputError(f"there is no label {name!r} in {self.name}; there are {', '.join(self.labels)}")
        self.truth = self.truth[:, [self.labels.index(name) for name in names]]
        self.labels, self.again = tuple(names), self.again | {"only": list(names)}
        return self

    def limit(self, n):
        """Keep the first n films of every split."""
        keep = sorted(i for split in SPLITS for i in self.rows_of(split)[:n])
        self.rows, self.truth, self.again = [self.rows[i] for i in keep], self.truth[keep], self.again | {"limit": n}
        return self

    def readable(self):
        """Leave out films whose file is damaged, counted and said. InputError where none is left."""
        whole, reason = [], ""
        for i, row in enumerate(self.rows):
            try:
                if not isinstance(row["image"], np.ndarray):
                    read_image(row["image"])
                whole.append(i)
            except InputError as error:
                reason = reason or f"{row['image']}: {error}"
        if not whole:
            raise InputError(f"none of the {len(self.rows)} films of {self.name} can be read; {reason}")
        if reason:
            print(f"left out: {len(self.rows) - len(whole)} films that cannot be read; {reason}")
            self.notes = self.notes | {"damaged_films": len(self.rows) - len(whole)}
        self.rows, self.truth = [self.rows[i] for i in whole], self.truth[whole]
        return self

    def usable(self, *splits):
        """Labels (L,) bool with films of both kinds in each of these splits; the others can be neither learned nor
        measured."""
        parts = [self.truth[self.rows_of(split)] for split in splits]
        return np.array([all({0.0, 1.0} <= set(part[:, j]) for part in parts) for j in range(len(self.labels))])

    def fingerprint(self):
        """Films, splits and labels as one number; the pictures themselves are not read."""
        if self.whole is not None:
            return self.whole["fingerprint"]
        text = repr([self.labels, [(row["id"], row["patient"], row["split"]) for row in self.rows]])
        return hashlib.sha256(text.encode() + np.nan_to_num(self.truth, nan=-1).astype("<f4").tobytes()).hexdigest()

    def facts(self):
        if self.whole is not None:
            return self.whole
        splits = {s: {"films": len(r), "patients": len({self.rows[i]["patient"] for i in r})}
                  for s in SPLITS if len(r := self.rows_of(s))}  # fmt: skip
        told = {"name": self.name, "phantom": self.phantom, "labels": list(self.labels), "splits": splits}
        return told | {"again": self.again, "fingerprint": self.fingerprint(), **self.notes}

    def __str__(self):
        counts = ", ".join(f"{s} {len(self.rows_of(s))}" for s in SPLITS)
        return f"{self.name}: films {counts}; labels {', '.join(self.labels)}"


# -------------------------------------------------------------------------------------------------------------- loading


def load_films(name, data_dir="data", only=None, limit=None, **options):
    """
    -> Films. name: a CSV file, iu_xray (options split, labels, seed, shares), phantom (films, image_size, seed,
    conditions, severe), a 2-D MedMNIST set (image_size), or auto: iu_xray where it is there, else the
    phantom, said aloud; options of other sets are ignored. only: names of the labels to keep. InputError for all that
    cannot be used.
    """
    name, kind = str(name), str(name).lower()

    def own(*names):
        return {key: options[key] for key in names if options.get(key) is not None}

    if kind in ("auto", "iu_xray"):
        try:
            films = iu_films(data_dir, **own("split", "labels", "seed", "shares"))
        except DataNotFound as error:
            if kind != "auto":
                raise
            print(f"{error}: taking the phantom")
            kind = "phantom"
    if kind == "phantom":
        films = phantom_films(**own("films", "image_size", "seed", "conditions", "severe"))
    elif kind in INFO:
        films = medmnist_films(kind, data_dir, **own("image_size"))
    elif kind not in ("auto", "iu_xray"):
        films = table_films(Path(name))
    films = films.only(only) if only else films
    films = (films.limit(limit) if limit else films).readable()
    if films.phantom:
        print(f"*** {PHANTOM} ***")
    return films


def add_film_options(parser):
    """What the vlm_ scripts ask alike; a table of vlm_prepare.py as --data fixes all but --only."""
    g = parser.add_argument_group("films and labels", "a table of vlm_prepare.py as --data fixes all but --only")
    # fmt: off
    g.add_argument("--only", nargs="+", metavar="LABEL", help="these labels only")
    g.add_argument("--labels", choices=LABEL_SOURCES, help="IU X-ray (mesh14)")
    g.add_argument("--split", choices=SPLIT_KINDS, help="IU X-ray: by patient, each label alike in every split;"
        " R2Gen's; or with 100 test studies (patient)")
    g.add_argument("--films", type=bounded(int, 1, 100_000),
        help="phantom: films to train on; a quarter each for val, test (2000)")
    g.add_argument("--image-size", type=positive_int, help="phantom and MedMNIST: pixels per side (112; 28)")
    g.add_argument("--conditions", nargs="+", metavar="NAME", help="phantom: draw these only")
    g.add_argument("--severe", action="store_true", help="phantom: all findings severe, each with a chance of .25")
    # fmt: on


def films_of(args, task=None, **options):
    """
    The films that the options name, printed; --data auto with a task: the newest table of vlm_prepare.py, where there
    is one.
    """
    if task and args.data == "auto" and not getattr(args, "resume", None):
        run = newest_run(task, "vlm_prepare", "films.csv")
        args.data = str(run / "films.csv") if run else "auto"
    names = ("labels", "split", "films", "image_size", "conditions", "severe", "seed")
    own = {name: vars(args)[name] for name in names} | options
    films = load_films(args.data, args.data_dir, args.only, args.limit, **own)
    print(films, flush=True)
    return films


def mean_of(values):
    """Of those that are not None; None without one."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def auc_by_label(truth, scores, labels):
    """truth (n, L) with NaN for unknown, scores (n, L) -> {label: AUC, None where only one kind is known}."""
    found = {}
    for j, label in enumerate(labels):
        known = ~np.isnan(truth[:, j])
        found[label] = auroc(truth[known, j] == 1, scores[known, j])
    return found


def measure_line(run_dir, films, args):
    """The command that measures a run on its test films, for the console."""
    place = ["--data-dir", args.data_dir] if films.again["name"] in (*INFO, "iu_xray") else []
    return f"measure on test: {command('task1_classification/vlm_evaluate.py', '--runs', run_dir, *place)}"


def load_again(facts, data_dir):
    """The films of a run, from the facts that it wrote down. InputError when they have changed since."""
    films = load_films(**({"data_dir": data_dir} | facts["again"]))
    if films.fingerprint() != facts["fingerprint"]:
        raise InputError(f"{films.name} has changed since the run: films, splits or labels differ; train again")
    return films


def table_films(path):
    if not os.path.isfile(path):
        raise InputError(f"there is no table {path}; python task1_classification/vlm_prepare.py writes one, and --data"
                         " phantom needs none")  # fmt: skip
    lines = read_table(path, COLUMNS, optional=("report", "study"))
    labels = tuple(name for name in (lines[0][1] if lines else ()) if name not in NOT_LABELS)
    if not labels:
        raise InputError(f"{path} lacks columns with labels (1, 0 or empty), or has no row")
    values = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": np.nan}
    truth, rows, seen, ids = np.empty((len(lines), len(labels)), np.float32), [], {}, set()
    for i, (number, line) in enumerate(lines):
        for j, label in enumerate(labels):
            if text_of(line[label]) not in values:
                raise InputError(f"{path}, line {number}: {label} is {line[label]!r}, not 1, 0 or empty for unknown")
            truth[i, j] = values[text_of(line[label])]
        for name in ("id", "patient"):
            if not text_of(line[name]):
                raise InputError(f"{path}, line {number}: {name} says nothing")
        if line["id"] in ids:
            raise InputError(f"{path}, line {number}: a film with the id {line['id']} stood there before")
        ids.add(line["id"])
        if line["split"] not in SPLITS:
            raise InputError(f"{path}, line {number}: the split is {line['split']!r}, not train, val or test")
        if seen.setdefault(line["patient"], line["split"]) != line["split"]:
            raise InputError(f"{path}: patient {line['patient']} is in {seen[line['patient']]} and in {line['split']}")
        row = {name: line.get(name, "") for name in (*COLUMNS, "report")}
        image = path.parent / line["image"]
        rows.append(row | {"image": image if os.path.isfile(image) else path.parent / line["image"].replace("\\", "/")})
    absent = [row["image"] for row in rows if not os.path.isfile(row["image"])]
    if absent:
        raise InputError(f"{len(absent)} of {len(rows)} images of {path} are missing, such as {absent[0]}: put them"
                         " there, or take their lines out")  # fmt: skip
    study = lines[0][1].get("study")
    return Films(study or path.stem, labels, rows, truth, {"name": str(path.absolute())}, phantom=study == "phantom")


def medmnist_films(name, data_dir, image_size=28):
    data = load_images(name, data_dir, image_size)
    rows, truth = [], []
    for split in SPLITS:
        labels = data.labels[split].numpy()
        if data.task == "binary-class":
            labels = labels[:, None]
        elif not data.multi_label:
            labels = np.eye(len(data.label_names))[labels]
        truth.append(labels.astype(np.float32))
        for i, image in enumerate(data.images[split].numpy()):
            pixels = np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            case = f"{split}-{i}"  # MedMNIST tells no patients: each image counts as one
            rows.append({"id": case, "patient": case, "split": split, "image": pixels, "report": ""})
    labels = tuple(data.label_names[1:] if data.task == "binary-class" else data.label_names)
    return Films(name, labels, rows, np.concatenate(truth), {"name": name, "image_size": image_size})


def phantom_films(films=2000, image_size=112, seed=0, conditions=None, severe=False, splits=SPLITS):
    """films: to train on; a quarter each for val and test. severe: all findings severe, each with a chance of .25."""
    again = dict(name="phantom", films=films, image_size=image_size, seed=seed, conditions=conditions, severe=severe)
    settings = phantom_settings(conditions, 0.25 if severe else None, (0, 0, 1) if severe else None)
    labels = tuple(dict.fromkeys(conditions or CONDITIONS))
    rows, truth = [], []
    for split in splits:
        for number in range(films if split == "train" else max(2, films // 4)):
            study = phantom_study(seed, PHANTOM_START[split] + number, image_size, settings)
            row = {"id": study.study_id, "patient": f"{split}-{study.patient_id}", "split": split}
            rows.append(row | {"image": study.image, "report": study.report.text})
            truth.append([study.labels[name] for name in labels])
    return Films("phantom", labels, rows, np.array(truth, np.float32), again, phantom=True)


# ------------------------------------------------------------------------------------------------------------- IU X-ray


def text_labels(text):
    """Report -> {condition: 1, 0 or None}: what is not mentioned is absent, what is only suspected unknown."""
    if not text.strip():
        return dict.fromkeys(CONDITIONS)
    return {name: {1: 1, 0: 0, -1: None, None: 0}[value] for name, value in label_report(text).items()}


def iu_films(data_dir, split="patient", labels="mesh14", seed=0, shares=None):
    """Every frontal film on disk with the labels of its study; a uid is a patient, and never in two splits."""
    folder = find_iu_xray(data_dir)
    studies, _ = read_reports(folder)
    where = add_image_paths(studies, folder)
    rows, values = [], []
    names = tuple(MAPPINGS.get(labels, dict.fromkeys(CONDITIONS)))
    left_out = {"no frontal film on disk": 0, "not in the R2Gen split": 0}
    places = r2gen_split(folder) if split == "r2gen" else {}
    for study in studies:
        films = [image for image in study["images"] if image["projection"] == "Frontal" and image["path"]]
        left_out["no frontal film on disk"] += not films
        if split == "r2gen" and study["uid"] not in places:
            left_out["not in the R2Gen split"] += bool(films)
            continue
        text = " ".join(study[name] for name in ("findings", "impression") if study[name])
        found = text_labels(text) if labels == "reports" else mesh_labels(study["mesh"], MAPPINGS[labels])
        for film in films:
            rows.append({"id": film["name"], "patient": study["patient"], "split": places.get(study["uid"]),
                         "image": film["path"], "report": text, "mesh": study["mesh"]})  # fmt: skip
            values.append([found[name] for name in names])
    if not rows:
        raise InputError(f"no frontal film of {folder} is on disk ({where}): put the films there")
    truth = np.array(values, np.float32)
    if split != "r2gen":
        split_by_patient(rows, truth, shares or SHARES, seed, SMALL_TEST if split == "small" else None)
    again = dict(name="iu_xray", split=split, labels=labels, seed=seed, shares=shares)
    notes = {"label_source": labels, "mapping": MAPPINGS.get(labels), "split": split, "left_out": left_out}
    return Films("iu_xray", names, rows, truth, again, notes=notes | {"images": where})


def split_by_patient(rows, truth, shares, seed, test_patients=None):
    """Fill in row["split"], each label shared out alike; test_patients: so many in test, the rest as usual."""
    patients = list(dict.fromkeys(row["patient"] for row in rows))
    number = {patient: i for i, patient in enumerate(patients)}
    has = np.zeros((len(patients), truth.shape[1]), bool)
    for row, labels in zip(rows, truth, strict=True):
        has[number[row["patient"]]] |= labels == 1
    if test_patients:
        if len(patients) <= 2 * test_patients:
            raise InputError(f"--split small takes {test_patients} patients for test, and there are {len(patients)}")
        test = test_patients / len(patients)
        rest = (1 - test) / (shares["train"] + shares["val"])
        shares = {"train": shares["train"] * rest, "val": shares["val"] * rest, "test": test}
    places = iterative_stratification(has, [shares[split] for split in SPLITS], seed)
    for row in rows:
        row["split"] = SPLITS[places[number[row["patient"]]]]


def iterative_stratification(has, shares, seed=0):
    """
    has bool (G, L), shares (K,) that add up to 1 -> (G,) numbers of subsets. Sechidis, Tsoumakas & Vlahavas 2011 (ECML
    PKDD): the rarest label that is left is dealt out first, each case to the subset that lacks it most, then the cases
    without a label to the subset that lacks most cases; ties are drawn.
    """
    shares, draw = np.asarray(shares, float), np.random.default_rng(seed)
    lacks, lacks_label = shares * len(has), np.outer(shares, has.sum(0))
    place = np.full(len(has), -1)

    def put(case, wanted):
        best = np.flatnonzero(wanted >= wanted.max() - 1e-9)
        best = best[lacks[best] >= lacks[best].max() - 1e-9]
        k = place[case] = draw.choice(best)
        lacks[k] -= 1
        lacks_label[k] -= has[case]

    while (left := (has & (place < 0)[:, None]).sum(0)).any():
        rarest = np.argmin(np.where(left > 0, left, len(has) + 1))
        for case in draw.permutation(np.flatnonzero(has[:, rarest] & (place < 0))):
            put(case, lacks_label[:, rarest])
    for case in draw.permutation(np.flatnonzero(place < 0)):
        put(case, lacks)
    return place
