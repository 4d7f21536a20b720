"""
The 14 CheXpert conditions, and the four things a label can be.

Three orders of the same names are in use, and mixing them up swaps columns without any error: the CheXpert CSV, the
CheXpert labeller's output (Lung Lesion before Lung Opacity) and CheXbert (No Finding last). So labels are dicts by
name here, and an array is made only at the very end, with `to_row(labels, order)`.

Source of names and orders: Irvin et al. 2019, CheXpert (arXiv 1901.07031), and Smit et al. 2020, CheXbert (arXiv
2004.09167).
"""

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, None  # unknown: the text does not mention it

# Order of the CheXpert CSV, the one used in our files.
CONDITIONS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

LABELLER_ORDER = CONDITIONS[:3] + ("Lung Lesion", "Lung Opacity") + CONDITIONS[5:]
CHEXBERT_ORDER = CONDITIONS[1:] + ("No Finding",)

# The five that CheXpert's leaderboard and most report papers score.
TOP_FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

# What a condition is a kind of (CheXpert's hierarchy). A positive child makes its parent true of the image, but a
# report that says "edema" has not said "opacity": only labels of images are closed upwards, labels of texts are not.
PARENTS = {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    "Lung Lesion": "Lung Opacity",
    "Edema": "Lung Opacity",
    "Consolidation": "Lung Opacity",
    "Pneumonia": "Consolidation",
    "Atelectasis": "Lung Opacity",
}

_SAME_NAME = {
    "enlarged cardiom.": "Enlarged Cardiomediastinum",
    "enlarged mediastinum": "Enlarged Cardiomediastinum",
    "airspace opacity": "Lung Opacity",
    "opacity": "Lung Opacity",
    "lesion": "Lung Lesion",
    "oedema": "Edema",
    "pulmonary edema": "Edema",
    "effusion": "Pleural Effusion",
    "normal": "No Finding",
    "devices": "Support Devices",
}
_SAME_NAME.update({name.lower(): name for name in CONDITIONS})


def condition_name(text):
    """
    Any usual spelling ("pleural_effusion", "Oedema") -> the name in CONDITIONS; ValueError if it is none of the 14.
    """
    key = " ".join(str(text).replace("_", " ").replace("-", " ").lower().split())
    if key not in _SAME_NAME:
        raise ValueError(f"{text!r} is not one of the 14 CheXpert conditions: {', '.join(CONDITIONS)}")
    return _SAME_NAME[key]


def from_row(values, order):
    """Values in a given order of names -> dict by our names. Blank (None, "", NaN) is unknown; else 1, 0 or -1."""
    values = list(values)
    if len(values) != len(order):
        raise ValueError(f"{len(values)} values for {len(order)} condition names")
    labels = dict.fromkeys(CONDITIONS, UNKNOWN)
    for value, name in zip(values, order, strict=True):
        if value is None or value == "" or value != value:  # NaN is not equal to itself
            continue
        number = float(value)
        if number not in (POSITIVE, NEGATIVE, UNCERTAIN):
            raise ValueError(f"label {value!r} of {name}: expected 1, 0, -1 or blank")
        labels[condition_name(name)] = int(number)
    return labels


def to_row(labels, order=CONDITIONS):
    """Dict by name -> list in `order`; names that are missing are unknown (None)."""
    named = {condition_name(name): value for name, value in labels.items()}
    return [named.get(condition_name(name), UNKNOWN) for name in order]
