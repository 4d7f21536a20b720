"""
One made-up study: who the patient is, what is wrong, and everything that follows from it.

What depends on what. Random numbers come in separate streams (anatomy, position, findings, noise, words), and truth,
text and boxes never look at a pixel: they are the same for every image size. Only plain uniform draws decide them,
since those are the same on every platform.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from shared.metrics.labels import CONDITIONS
from shared.phantom.body import CHRONIC_FINDINGS, CLASSES, FINDINGS, PATIENTS, QUESTIONS, WORDS, Anatomy, Draws, Frame
from shared.phantom.body import Position, box_of, develop, draw_anatomy, draw_position, organ_boxes
from shared.phantom.findings import CHRONIC, LEVELS, ORDER, SEVERITIES, SIGN, ZONES, Finding, place, place_blob
from shared.phantom.lateral import lateral_film
from shared.phantom.words import upwards, write_questions, write_report
from shared.runtime import InputError

VERSION = 1  # raise it when the same (seed, index) gives another study

# ------------------------------------------------------------------------------------------------- what is in a study

PREVALENCE = {
    "Enlarged Cardiomediastinum": 0.07,
    "Cardiomegaly": 0.20,
    "Lung Opacity": 0.09,
    "Lung Lesion": 0.12,
    "Edema": 0.10,
    "Consolidation": 0.09,
    "Pneumonia": 0.12,
    "Atelectasis": 0.12,
    "Pneumothorax": 0.10,
    "Pleural Effusion": 0.18,
    "Pleural Other": 0.07,
    "Fracture": 0.08,
    "Support Devices": 0.18,
}

# (cause, effect): chance that the cause alone brings the effect along. Causes come first in ORDER.
TOGETHER = {
    ("Cardiomegaly", "Edema"): 0.20,
    ("Cardiomegaly", "Pleural Effusion"): 0.12,
    ("Edema", "Pleural Effusion"): 0.45,
    ("Pneumonia", "Pleural Effusion"): 0.15,
    ("Fracture", "Pneumothorax"): 0.20,
    ("Pneumothorax", "Support Devices"): 0.35,
    ("Edema", "Support Devices"): 0.25,
    ("Pleural Effusion", "Atelectasis"): 0.12,
}


@dataclass(frozen=True, eq=False)
class PhantomSettings:
    """
    What the made-up hospital sees. All are shares between 0 and 1.

    prevalence, together: chance of each condition, and of an effect given its cause (dicts; they replace the defaults
    above). normal: share of patients to whom nothing of this applies. uncertain: share of findings that the report
    only suspects. omitted: share of findings the report forgets. shortcut: (condition, agreement): a bright triangle
    in a lower corner that is there as often as `agreement` when the condition is, and as rarely when it is not; 0.5 is
    no shortcut. severities: how often findings are mild, moderate and severe, as weights: (0, 0, 1) for a course that a
    small model can pass. guessable: 0: the words of a closed question do not tell its answer; 1: they tell it always.
    """

    prevalence: dict = field(default_factory=lambda: dict(PREVALENCE))
    together: dict = field(default_factory=lambda: dict(TOGETHER))
    normal: float = 0.35
    uncertain: float = 0.12
    omitted: float = 0.0
    shortcut: tuple = ()
    guessable: float = 0.0
    severities: tuple = LEVELS

    def __post_init__(self):
        for name, value in self.prevalence.items():
            if name not in ORDER:
                raise ValueError(f"no condition {name!r} to draw; there are {', '.join(ORDER)}")
            if not 0.0 <= value <= 1.0:
                raise InputError(f"prevalence of {name} is {value}, not between 0 and 1")
        for cause, effect in self.together:
            if cause not in ORDER or effect not in ORDER or ORDER.index(cause) >= ORDER.index(effect):
                order = f"the cause must come before its effect in {', '.join(ORDER)}"
                raise ValueError(f"({cause!r}, {effect!r}): {order}")
        for name in ("normal", "uncertain", "omitted", "guessable"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, not between 0 and 1")
        if len(self.severities) != 3 or min(self.severities) < 0 or not sum(self.severities):
            raise ValueError(f"severities are {self.severities!r}, expected three weights: mild, moderate, severe")
        if self.shortcut and (len(self.shortcut) != 2 or self.shortcut[0] not in CONDITIONS):
            raise ValueError(f"shortcut is {self.shortcut!r}, expected (condition, agreement)")
        object.__setattr__(self, "severities", tuple(self.severities))
        object.__setattr__(self, "_key", self.key())

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, PhantomSettings) and self._key == other._key

    def key(self):
        """The same text for the same settings."""
        shares = self.normal, self.uncertain, self.omitted, tuple(self.shortcut), self.guessable, self.severities
        return repr([sorted(self.prevalence.items()), sorted(self.together.items()), *shares])


DEFAULT = PhantomSettings()


def phantom_settings(conditions=None, prevalence=None, severities=None):
    """
    The default hospital, or one that has only some conditions, each with the given chance, of these severities.
    InputError for a condition that it does not draw.
    """
    if conditions is None and prevalence is None and severities is None:
        return DEFAULT
    for name in conditions or ():
        if name not in ORDER:
            raise InputError(f"--conditions {name}: the phantom draws {', '.join(ORDER)}")
    chosen = conditions or [name for name in ORDER if name in PREVALENCE]
    return PhantomSettings(
        prevalence={name: PREVALENCE[name] if prevalence is None else prevalence for name in chosen},
        together={pair: chance for pair, chance in TOGETHER.items() if set(pair) <= set(chosen)},
        severities=severities or LEVELS,
    )


# Studies come in groups of eight; these are the ways a group is shared out among patients.
_GROUPS = ((1, 1, 2, 4), (2, 1, 3, 1, 1), (1, 1, 1, 1, 1, 1, 2), (1, 2, 1, 3, 1), (5, 1, 1, 1), (1, 1, 2, 1, 1, 2))


@lru_cache(maxsize=1024)
def _group(seed, group):
    return Draws(seed, group, PATIENTS).pick(_GROUPS)


def patient_of(seed, index):
    """Index of a study -> (patient, visit): the patient's number and which of their studies this is, from 0."""
    group, place = divmod(index, 8)
    first = 0
    for count in _group(seed, group):
        if place < first + count:
            return group * 8 + first, place - first
        first += count
    raise AssertionError("groups hold eight studies")


def _present(settings, personal, acute, well):
    """Which conditions a study has. personal, acute: one uniform number per condition in ORDER."""
    found = []
    if well:
        return found
    for i, name in enumerate(ORDER):
        p = settings.prevalence.get(name, 0.0)
        for cause in found:
            extra = settings.together.get((cause, name), 0.0)
            if extra:
                p = 1.0 - (1.0 - p) * (1.0 - extra)
        if (personal if name in CHRONIC else acute)[i] < p:
            found.append(name)
    return found


@lru_cache(maxsize=64)
def label_rates(settings):
    """How often each of the 14 labels of the image is true with these settings (from 4000 made-up visits)."""
    d = Draws(0, 0, CLASSES)
    counts, n = Counter(), 4000
    for _ in range(n):
        well = d.chance(settings.normal)
        names = _present(settings, [d.u() for _ in ORDER], [d.u() for _ in ORDER], well)
        true = {label for name in names for label in upwards(name)}
        if not true - {"Support Devices"}:
            true.add("No Finding")
        counts.update(true)
    return {name: counts[name] / n for name in CONDITIONS}


@dataclass(eq=False)
class Study:
    """One visit of one patient. What costs time (film, masks, words) is made when it is asked for, and kept."""

    seed: int
    index: int
    size: int
    settings: PhantomSettings
    patient: int
    visit: int
    truth: tuple  # Finding objects: condition, kind, side, zone, severity
    shortcut: bool  # the corner triangle is there
    anatomy: Anatomy = field(repr=False)
    position: Position = field(repr=False)
    erased: tuple = ()  # names of findings left out of the picture by without()

    @property
    def patient_id(self):
        return f"P{self.seed}-{self.patient:06d}"

    @property
    def study_id(self):
        return f"{self.patient_id}-{self.visit + 1}"

    @cached_property
    def frame(self):
        """Geometry of this film, with what the findings do to heart, mediastinum and diaphragm."""
        frame = Frame(self.anatomy, self.position)
        for finding in self.drawn:
            frame.heart_ratio = max(frame.heart_ratio, finding.shape.get("ratio", 0.0))
            if finding.kind == "wide mediastinum":
                frame.widening = finding.shape["width"]
            if finding.condition == "Atelectasis":
                sign = SIGN[finding.side]
                frame.lift[sign] = max(frame.lift[sign], finding.shape["lift"])
        return frame

    @property
    def drawn(self):
        """The part of truth that is in the picture: all of it, but for without()."""
        return [finding for finding in self.truth if finding.name not in self.erased]

    @cached_property
    def labels(self):
        """The 14 conditions as 1 or 0: what the image shows. A drawn condition makes its parents true."""
        labels = dict.fromkeys(CONDITIONS, 0)
        for finding in self.drawn:
            labels |= dict.fromkeys(upwards(finding.condition), 1)
        labels["No Finding"] = int(not any(labels[name] for name in CONDITIONS if name != "Support Devices"))
        return labels

    @cached_property
    def report(self):
        """Report with indication, comparison, findings, impression, text and the labels it states."""
        before = _plan(self.seed, self.index - 1, self.settings)[4] if self.visit and self.index else ()
        return write_report(self, Draws(self.seed, self.index, WORDS), before)

    @property
    def report_labels(self):
        """The 14 conditions as the report states them: 1, 0, -1 (suspected) or None (not mentioned)."""
        return self.report.labels

    @cached_property
    def questions(self):
        """Question objects with answer, kind, region and paraphrases."""
        return write_questions(self, Draws(self.seed, self.index, QUESTIONS), label_rates(self.settings))

    @cached_property
    def _film(self):
        image, masks, organs = develop(self.frame, self.drawn, self.size, self.seed, self.index, want_masks=True)
        if self.shortcut:
            _draw_shortcut(image)
        return image, masks, organs

    @property
    def image(self):
        """Frontal film, uint8 (size, size). Image left is the patient's right."""
        return self._film[0]

    @cached_property
    def lateral(self):
        """Lateral film, uint8 (size, size), the patient facing left."""
        return lateral_film(self.frame, self.drawn, self.size, self.seed, self.index)

    @property
    def masks(self):
        """Name of a finding -> bool (size, size)."""
        return self._film[1]

    @property
    def organ_masks(self):
        """Name of an organ (right lung, left lung, heart, mediastinum, diaphragm, spine) -> bool (size, size)."""
        return self._film[2]

    @cached_property
    def boxes(self):
        """Name of a finding -> list of pixel boxes [x0, y0, x1, y1]; x1 and y1 are one past the last pixel."""
        return {f.name: [box_of(self.frame, points, self.size) for points in f.outlines] for f in self.drawn}

    @cached_property
    def organ_boxes(self):
        """Name of an organ -> pixel box [x0, y0, x1, y1]."""
        return organ_boxes(self.frame, self.size)

    def without(self, *names):
        """
        The same film with some findings (names, or conditions) not drawn: same person, position and noise.

        `truth` and everything said about the study stays; `labels`, `boxes`, `masks` and `image` are those of the new
        picture.
        """
        gone = {f.name for f in self.truth if f.name in names or f.condition in names}
        known = {name for f in self.truth for name in (f.name, f.condition)}
        if wrong := [name for name in names if name not in known]:
            has = [f.name for f in self.truth]
            raise ValueError(f"study {self.study_id} has no finding {wrong[0]!r}; it has {has}")
        return replace(self, erased=tuple(sorted({*self.erased, *gone})))


def _draw_shortcut(image):
    """A bright triangle in the lower left corner of the film, about 4 % of its width: for experiments on shortcuts."""
    size = image.shape[0]
    k = max(2, round(size * 0.07))
    rows, columns = np.arange(k)[:, None], np.arange(k)
    corner = image[size - 1 - k : size - 1, 1 : k + 1]
    corner[columns <= rows] = 245


def phantom_study(seed, index, size=224, settings=DEFAULT):
    """
    The study number `index` of the hospital `seed`; any index >= 0, in any order, gives the same study every time.

    size: pixels per side, 28 to 512. See Study for what it holds.
    """
    if not 28 <= size <= 512:
        raise InputError(f"phantom images can be 28 to 512 pixels, not {size}")
    if seed < 0 or not 0 <= index < CLASSIFICATION_START:
        last = CLASSIFICATION_START - 1
        raise InputError(f"seed {seed} and index {index}: seed must be >= 0, index between 0 and {last}")
    patient, visit, anatomy, position, truth, shortcut = _plan(seed, index, settings)
    return Study(seed, index, size, settings, patient, visit, truth, shortcut, anatomy, position)


@lru_cache(maxsize=16)
def _anatomy(seed, patient):
    return draw_anatomy(seed, patient)


@lru_cache(maxsize=16)  # a follow-up looks at the study before it
def _plan(seed, index, settings):
    """Everything about a study that does not depend on its size: patient, visit, anatomy, position, truth, shortcut."""
    patient, visit = patient_of(seed, index)
    anatomy = _anatomy(seed, patient)
    position = draw_position(seed, index, anatomy)
    personal, acute = Draws(seed, patient, CHRONIC_FINDINGS), Draws(seed, index, FINDINGS)
    well = personal.chance(settings.normal)
    names = _present(settings, [personal.u() for _ in ORDER], [acute.u() for _ in ORDER], well)
    truth = []
    for name in names:
        # Each condition has its own stream: where the effusion is does not depend on whether there is a nodule as well.
        number = 100 + ORDER.index(name)
        d = Draws(seed, patient, number) if name in CHRONIC else Draws(seed, index, number)
        # Placed in the plain frame, so that removing a large heart moves nothing else.
        truth += place(name, d, Frame(anatomy, position), settings.severities)
    shortcut = False
    if settings.shortcut:
        name, agreement = settings.shortcut
        present = any(f.condition == name for f in truth) or (name == "No Finding" and not truth)
        shortcut = acute.chance(agreement if present else 1.0 - agreement)
    return patient, visit, anatomy, position, tuple(truth), shortcut


# ----------------------------------------------------------------------------------------------- MedMNIST-like images


def phantom_classification(seed, counts=None, size=28, pneumonia=0.6, masks=False):
    """
    Pneumonia (1) against normal (0), in MedMNIST's form.

    seed: whole number >= 0; counts: images per split, default {"train": 2000, "val": 300, "test": 600}; size: pixels
    per side; pneumonia: share of positives. Returns a dict of arrays: train_images uint8 (N, size, size), train_labels
    uint8 (N, 1), and the same for val and test. Every image is another patient, so splits share none. The first images
    of a split do not depend on how many are asked for. Normal films vary as people do: large breasts, nipples that
    look like nodules, borderline hearts, poor breath, exposure.
    masks: also train_masks bool (N, size, size) and so on, true where the pneumonia is.
    """
    counts = {"train": 2000, "val": 300, "test": 600} if counts is None else counts
    if not 28 <= size <= 512:
        raise InputError(f"phantom images can be 28 to 512 pixels, not {size}")
    if unknown := set(counts) - {"train", "val", "test"}:
        raise ValueError(f"unknown split {sorted(unknown)[0]!r}: use train, val, test")

    data = {}
    for number, split in enumerate(("train", "val", "test")):
        n = counts.get(split, 0)
        images, labels = np.empty((n, size, size), np.uint8), np.empty((n, 1), np.uint8)
        where = np.zeros((n, size, size), bool)
        for i in range(n):
            index = CLASSIFICATION_START + 3 * i + number  # three interleaved rows of people
            frame, findings = _pneumonia_or_not(seed, index, pneumonia)
            labels[i, 0] = bool(findings)
            images[i], drawn, _ = develop(frame, findings, size, seed, index, want_masks=masks)
            for mask in drawn.values() if masks else ():
                where[i] |= mask
        data |= {f"{split}_images": images, f"{split}_labels": labels} | ({f"{split}_masks": where} if masks else {})
    return data


def _pneumonia_or_not(seed, index, pneumonia):
    """Frame and findings of one person who has pneumonia with the given chance, in one place or two."""
    d = Draws(seed, index, CLASSES)
    ill = d.chance(pneumonia)
    anatomy = draw_anatomy(seed, index)
    frame = Frame(anatomy, draw_position(seed, index, anatomy))
    findings = []
    for _ in range(ill * (1 + d.chance(0.25))):
        side, zone = d.pick(("right", "left")), d.pick(ZONES, (25, 35, 40))
        severity = d.pick(SEVERITIES, (15, 35, 50))
        blob = place_blob(d, frame, side, zone, severity)
        findings.append(Finding("Pneumonia", "pneumonia", side, zone, severity, *blob))
    return frame, findings


CLASSIFICATION_START = 2**31  # far from the indices of phantom_study, so that no person is in both
