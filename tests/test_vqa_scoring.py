"""
Right or wrong: hand-written answers for every pitfall, laws that must hold for any text, real gold answers, and two
published scripts' columns.
"""

import random
import time
import unicodedata

import pytest

from vqa_sft_grpo.scoring import OPPOSITE, SYNONYMS, asks_for_absence, choice, column_means, fold_synonyms
from vqa_sft_grpo.scoring import llava_med_scores
from vqa_sft_grpo.scoring import medevalkit_scores, normalise, options_of, overlap, polarity, score_answer
from vqa_sft_grpo.scoring import score_with_synonyms
from vqa_sft_grpo.sources import load_slake, load_vqa_rad

# --- texts ---


@pytest.mark.parametrize(
    "a, b",
    [
        ("X-ray", "xray"),
        ("x rays", "X-Ray"),
        ("T2-weighted", "T2"),
        ("t2 weighted", "T2w"),
        ("T1WI", "t1"),
        ("The left lungs.", "left lung"),
        ("hyper-dense", "Hyperdense"),
        ("non contrast", "non-contrast"),
        ("two masses", "2 mass"),
        ("5cm", "5 centimetres"),
        ("5.0 cm", "5 cm"),
        (".5 mm", "0.5 millimeter"),
        ("1,000", "1000"),
        ("opacities", "opacity"),
        ("patient\u2019s left", "patient's left"),
        ("ＭＲＩ", "mri"),
        ("It isn't", "it is not"),
        ("left/right", "left, right"),
        (" Yes ! ", "yes"),
        ("90%", "90 percent"),
        ("5 cm", "50 mm"),
        ("3 x 4.5 cm", "30 x 45 mm"),
        ("3 cm x 4 cm", "3 \u00d7 4 cm"),
        ("3x4 mm", "3 by 4 mm"),
        ("3-5 cm", "3 to 5 cm"),
        (">= 5 mm", "\u2265 5 mm"),
        ("at least 5 mm", "\u2265 5 mm"),
        ("larger than 5 mm", "> 5 mm"),
        ("left-sided", "left"),
        ("Rt lung", "right lung"),
        ("diverticula", "diverticulum"),
        ("vertebrae", "vertebra"),
        ("metastases", "metastasis"),
        ("thirty", "30"),
        ("the fourth rib", "4th rib"),
    ],
)
def test_same(a, b):
    assert normalise(a) == normalise(b) != []


@pytest.mark.parametrize(
    "a, b",
    [
        ("left lung", "right lung"),
        ("T1", "T2"),
        ("1.5", "15"),
        ("<5 mm", ">5 mm"),
        ("\u2265 5 mm", "5 mm"),
        ("\u2264 5 mm", "5 mm"),
        ("\u2265 5 mm", "> 5 mm"),
        ("pelvis", "pelvi"),
        ("mass", "mas"),
        ("pus", "pu"),
        ("axial", "transverse"),
        ("y\u0435s", "yes"),  # with a Cyrillic letter
        ("hyperdense", "hypodense"),
        ("lung left", "left lung"),
        ("3.5", "3 5"),
    ],
)
def test_different(a, b):
    assert normalise(a) != normalise(b)


@pytest.mark.parametrize(
    "text, tokens", [("A", ["a"]), ("+", ["+"]), ("", []), (None, []), ("肺", ["肺"]), ("The", ["the"]), (0, ["0"])]
)
def test_nothing_else_disappears(text, tokens):
    assert normalise(text) == tokens


# --- yes or no: text, question, what it says ---

AIR = "Is there free air under the diaphragm?"
EFFUSION, NORMAL = "Is there a pleural effusion?", "Is this chest x-ray normal?"
YES_NO = [
    ("yes", "", "yes"),
    ("No.", "", "no"),
    ("YES!", "", "yes"),
    ("The answer is no", "", "no"),
    ("Yes yes", "", "yes"),
    ("no, it is not", "", "no"),
    # whole words only
    ("n", "", None),
    ("y", "", None),
    ("normal", "", None),
    ("normal", NORMAL, None),
    ("none", "", None),
    ("nodule", "", None),
    ("nothing", "", None),
    ("knot", "", None),
    ("eyes", "", None),
    ("yesterday", "", None),
    ("cannot say", "", None),
    ("unknown", "", None),
    ("", "", None),
    ("123", "", None),
    # both
    ("yes or no", "", None),
    ("no or yes", "", None),
    ("yes/no", "", None),
    ("Yes. No.", "", None),
    ("yes and no", EFFUSION, None),
    ("not yes", "", None),
    ("not no", "", None),
    # a negation answers what it is about
    ("no evidence of effusion", EFFUSION, "no"),
    ("There is no evidence of pleural effusion.", EFFUSION, "no"),
    ("No pleural effusions are seen", EFFUSION, "no"),
    ("There is no fracture", EFFUSION, None),
    ("No abnormality", NORMAL, None),
    ("not normal", NORMAL, "no"),
    ("It is not a normal film", NORMAL, "no"),
    ("clear lungs without effusion", EFFUSION, "no"),
    ("no pneumothorax or effusion", EFFUSION, "no"),
    ("no pneumothorax but an effusion", EFFUSION, None),
    ("Yes, there is no midline shift", "Is there a mass?", "yes"),
    ("Yes, there is no effusion", EFFUSION, None),
    ("No, there is no effusion", EFFUSION, "no"),
    ("No, there is a pleural effusion", EFFUSION, None),
    ("No, the heart is enlarged", "Is the heart enlarged?", None),
    ("No, the heart is normal", "Is the heart enlarged?", "no"),
    ("No, this chest x-ray is normal", NORMAL, None),
    ("No. There is a mass.", "Is there a fracture?", "no"),
    ("no doubt there is an effusion", EFFUSION, None),
    ("not only an effusion", EFFUSION, None),
    ("an effusion cannot be excluded", EFFUSION, None),
    ("No, the lungs are clear", EFFUSION, "no"),
    ("no I do not see one", EFFUSION, "no"),
    ("yes, without doubt", EFFUSION, "yes"),
    # the answer and the whole sentence behind it
    ("No, there is no pleural effusion.", EFFUSION, "no"),
    ("No, there is no evidence of an effusion in this image.", EFFUSION, "no"),
    ("Yes, there is no pleural effusion.", EFFUSION, None),
    ("No, there is a pleural effusion.", EFFUSION, None),
    ("No, there is an effusion but no pneumothorax.", "Is there a pneumothorax?", "no"),
    ("Yes, no abnormalities are seen in the lungs.", "Are the lungs normal?", "yes"),
    ("No, there is no abnormality.", "Are the lungs normal?", None),
    ("Yes, there is a lack of vessels.", "Is there a lack of vessels?", "yes"),
    ("No, there is no free air.", AIR, "no"),
    ("There is no free air under the diaphragm.", AIR, "no"),
    ("Free air is seen under the diaphragm.", AIR, "yes"),
    # without a question a "no" before other words counts where nothing else does
    ("no evidence of effusion", "", "no"),
    ("Yes, there is no shift", "", "yes"),
    # words that say it alone, beside words of the question only
    ("Negative", EFFUSION, "no"),
    ("Positive.", EFFUSION, "yes"),
    ("true", EFFUSION, "yes"),
    ("False", EFFUSION, "no"),
    ("Absent", EFFUSION, "no"),
    ("Effusion: present", EFFUSION, "yes"),
    ("The effusion is absent", EFFUSION, "no"),
    ("There is none", EFFUSION, "no"),
    ("none present", EFFUSION, "no"),
    ("Neither", "Is there an effusion or a pneumothorax?", "no"),
    ("Not seen.", EFFUSION, "no"),
    ("It is not", EFFUSION, "no"),
    ("negative for effusion", EFFUSION, "no"),
    ("free of effusion", EFFUSION, "no"),
    ("negative for fracture", EFFUSION, None),
    ("negative mass", EFFUSION, None),
    ("nothing", "Is there anything abnormal?", "no"),
    ("none", "Is the film free of effusion?", None),
    # the question as a statement
    ("It is normal", NORMAL, "yes"),
    ("The chest x-ray is normal", NORMAL, "yes"),
    ("It is abnormal", NORMAL, "no"),
    ("It is normal and abnormal", NORMAL, None),
    ("The heart is enlarged", "Is the heart enlarged?", "yes"),
    ("There is a pleural effusion.", EFFUSION, "yes"),
    ("There is a mass", EFFUSION, None),
    ("Is there a pleural effusion?", EFFUSION, None),
    ("is there a pleural effusion", EFFUSION, None),
    ("Pleural effusion", EFFUSION, None),  # nothing is stated
    ("There is possibly a pleural effusion", EFFUSION, None),
    ("A pleural effusion is ruled out", EFFUSION, None),
    # denied denials, conditions, and what cannot be said
    ("no evidence of no effusion", EFFUSION, None),
    ("not without effusion", EFFUSION, None),
    ("no absence of effusion", EFFUSION, None),
    ("neither effusion nor pneumothorax", EFFUSION, "no"),
    ("I am not sure, yes", EFFUSION, None),
    ("if effusion then yes", EFFUSION, None),
    ("I cannot say yes", EFFUSION, None),
    ("It is not possible to say yes or no", EFFUSION, None),
    ("yes; impossible to say", EFFUSION, None),
    ("I don't know", EFFUSION, None),
    ("Yes, it contains liver; it does not contain kidney", "Does the picture contain liver?", "yes"),
    ("The picture does not contain liver", "Does the picture contain liver?", "no"),
    ("no effusion, no pneumothorax", EFFUSION, "no"),
    # a question that denies: only a plain yes or no is safe
    ("no effusion", "Is the film free of effusion?", None),
    ("yes", "Is the film free of effusion?", "yes"),
    ("no effusion", "Is there no effusion?", None),
    ("The film is not free of effusion", "Is the film free of effusion?", "no"),
    ("No, it is not free of effusion", "Is the film free of effusion?", "no"),
    ("Yes, it is not free of effusion", "Is the film free of effusion?", None),
    ("Pneumonia is not absent", "Is pneumonia absent?", "no"),
    ("Yes, no effusion", "Is the film free of effusion?", "yes"),
    # a question with its answers behind it
    ("The ventricles are not symmetric", "Is/Are the ventricles symmetric? -yes/no", "no"),
    ("The mass is cystic", "Is/Are the mass cystic? -yes/no", "yes"),
    # a denial of something else: a finding where normal is asked after, another plane, another side
    ("Yes, the lungs are clear; no lung nodule is seen", "Are the lungs clear?", "yes"),
    ("No lung nodule or mass", "Are the lungs clear?", None),
    ("Yes, a coronal plane, not a sagittal plane", "Is this a coronal plane?", "yes"),
    ("No right effusion", "Is there a left effusion?", None),
    ("No effusion on the left or right", EFFUSION, "no"),
    ("Yes, an effusion on the right; no effusion on the left", EFFUSION, "yes"),
    ("No effusion on the left, but there is a pleural effusion on the right", EFFUSION, "yes"),
    ("Yes, a nodule; no other abnormality", "Are there abnormalities in this image?", "yes"),
    ("There is a pleural effusion, but no mass.", EFFUSION, "yes"),
    ("The heart is enlarged, without effusion.", "Is the heart enlarged?", "yes"),
    ("There is a pleural effusion. There is no pleural effusion.", EFFUSION, None),
    ("No mass. The heart is not enlarged.", "Is the heart enlarged?", "no"),
    # who sees no film answers nothing about it
    ("I cannot see the image", EFFUSION, None),
    ("I do not see any image.", EFFUSION, None),
    ("The image is not visible", EFFUSION, None),
    ("No image was provided.", EFFUSION, None),
    ("I don't see an effusion in the image", EFFUSION, "no"),
    ("It is not visible on the film", EFFUSION, "no"),
    ("No, but there is a small effusion", EFFUSION, None),
    ("No; however, effusion is seen on the left", EFFUSION, None),
    # how far a denial reaches
    ("No nodules, masses, or effusions are seen.", EFFUSION, "no"),
    ("No, there is a mass, nodule or effusion.", "Is there a fracture?", "no"),
    ("I don't think there is an effusion", EFFUSION, "no"),
    ("There is no sign that there is an effusion", EFFUSION, "no"),
    ("There is no way there is an effusion", EFFUSION, "no"),
    ("No sign of either", "Is there an effusion or a mass?", "no"),
    ("That is not the case", EFFUSION, "no"),
    ("Not true", EFFUSION, "no"),
    ("I cannot rule out an effusion", EFFUSION, None),
    ("No effusion can be excluded", EFFUSION, None),
    # statements, and doubt in them
    ("It's normal", NORMAL, "yes"),
    ("The liver looks normal.", "Does the liver look normal?", "yes"),
    ("The brain looks unhealthy.", "Does the brain look healthy?", "no"),
    ("The image includes the kidney", "Does the picture contain kidney?", "yes"),
    ("There is air outside the bowel.", "Is there air outside the bowel?", "yes"),
    ("No fracture shown on this film is seen.", "Is there a fracture shown on this film?", "no"),
    ("No, there are no other cysts.", "Are there other cysts?", "no"),
    ("The kidney is missing", "Does the picture contain kidney?", None),
    ("There is concern for a pleural effusion", EFFUSION, None),
    ("There is likely a pleural effusion", EFFUSION, None),
    ("A pleural effusion was seen on the prior film", EFFUSION, None),
]


@pytest.mark.parametrize("text, question, expected", YES_NO)
def test_polarity(text, question, expected):
    assert polarity(text, question) == expected
    for gold in ("yes", "No"):
        found = score_answer(text, gold, "closed", question)
        assert (
            found["kind"] == "yes/no"
            and found["parsed"] == (expected is not None)
            and found["correct"] == (expected == gold.lower())
        )
        assert found["contradiction"] == (expected is not None and expected != gold.lower())


@pytest.mark.parametrize(
    "question, absence",
    [
        ("Is there a nodule?", False),
        ("Is this film normal?", True),
        ("Is this film not normal?", False),
        ("Is there anything abnormal on this film?", False),
        ("Are the lungs clear?", True),
        ("Is the heart clearly visible?", False),
        ("Is the lung healthy?", True),
        ("Is the heart larger than normal?", False),
        ("Is the aorta of normal size and contour?", True),
        ("Is the film free of consolidation?", True),
        ("Is there free air under the diaphragm?", False),
        ("Is there no evidence of blunting?", True),
        ("Is pneumonia absent?", True),
        ("Was it taken without contrast?", True),
        ("Is there no normal lung?", False),
        ("Is/Are the mass cystic? -yes/no", False),
        ("Is/Are the liver normal? -yes/no", True),
        ("Is the costophrenic angle sharp?", True),
        ("", False),
    ],
)
def test_what_yes_would_mean(question, absence):
    assert asks_for_absence(question) == absence


# --- A or B: question, options, then texts and the number they name ---

CHOICES = [
    (
        "Is this a CT or an MRI?",
        ["ct", "mri"],
        [
            ("CT", 0),
            ("It is an MRI scan", 1),
            ("CT or MRI", None),
            ("x-ray", None),
            ("not a CT, an MRI", 1),
            ("yes", None),
        ],
    ),
    (
        "Is the lesion on the left or right side of the brain?",
        ["left", "right"],
        [("left side", 0), ("the right", 1), ("both", None), ("bright", None), ("left and right", None)],
    ),
    (
        "Was this image taken with or without contrast?",
        ["with", "without"],
        [("with contrast", 0), ("Without", 1), ("contrast", None)],
    ),
    (
        "Was this a contrast CT or a non-contrast CT?",
        ["contrast", "noncontrast"],
        [("non contrast", 1), ("contrast CT", 0)],
    ),
    (
        "Which plane is the image scanned, transverse plane or coronal plane?",
        ["transverse", "coronal"],
        [("Coronal Plane", 1), ("transverse", 0), ("axial", None)],
    ),
    (
        "Which is the biggest in this image,lung,liver or heart?",
        ["lung", "liver", "heart"],
        [("Lungs", 0), ("the heart", 2), ("lung, liver", None), ("spleen", None)],
    ),
    (
        "Where is the spleen in this image, right or lower right?",
        ["right", "lower right"],
        [("lower right", 1), ("right", 0)],
    ),
    (
        "Which is bigger in this image, left kidney or spleen?",
        ["left kidney", "spleen"],
        [("kidney", 0), ("spleen", 1), ("left kidney", 0)],
    ),
    (
        "Is this image modality T1, T2, or FLAIR?",
        ["t1", "t2", "flair"],
        [("T2 weighted", 1), ("flair", 2), ("T1 and T2", None)],
    ),
    (
        "In which zone is the nodule: upper, mid or lower?",
        ["upper", "mid", "lower"],
        [("lower zone", 2), ("mid", 1), ("upper or mid", None)],
    ),
    ("Upper, mid or lower: which zone holds the nodule?", ["upper", "mid", "lower"], [("lower", 2)]),
    ("Where does it lie, in the upper, mid or lower zone?", None, [("upper zone", 0), ("lower zone", 2), ("mid", 1)]),
    (
        "Is this a pneumonia vs. pleural effusion?",
        ["pneumonia", "pleural"],
        [("pleural effusion", 1), ("pneumonia", 0)],
    ),
    ("Is the lung hyperinflated on one or both sides?", ["1", "both"], [("both sides", 1), ("one side", 0)]),
    (
        "Is the abnormality hyper dense or hypo dense?",
        ["hyperdense", "hypodense"],
        [("Hypodense", 1), ("hyper-dense", 0)],
    ),
    (
        "What is denser, the mass or the surrounding brain tissue?",
        ["mass", "surrounding brain tissue"],
        [("surrounding tissue", 1), ("the mass", 0)],
    ),
    (
        "Does the appendix appear normal or abnormal?",
        ["normal", "abnormal"],
        [("abnormal", 1), ("It appears normal", 0)],
    ),
    (
        "Does this CT have contrast or no contrast?",
        ["contrast", "no contrast"],
        [("contrast was used", 0), ("none", None)],
    ),
    ("Is the left kidney smaller or larger than the other?", None, [("larger than the other", 1), ("smaller", 0)]),
    ("Is the lesion in the heart or the lung?", ["heart", "lung"], [("anything other than heart", None)]),
    ("Is there an effusion?", [], [("left", None)]),
]


@pytest.mark.parametrize("question, options, texts", CHOICES)
def test_choice(question, options, texts):
    if options is not None:
        assert [" ".join(tokens) for tokens, _ in options_of(question)] == options
    for text, expected in texts:
        assert choice(text, question) == expected, text


def test_choice_scores():
    question = "Is the lesion on the left or right side?"
    good = score_answer("on the left", "Left side", "closed", question)
    assert good["correct"] and good["parsed"] and not good["exact"] and good["kind"] == "choice"
    wrong = score_answer("right", "Left side", "closed", question)
    assert wrong["parsed"] and not wrong["correct"] and wrong["contradiction"]
    for text in ("left or right", "central", "", None):
        unparsed = score_answer(text, "Left side", "choice", question)
        assert not unparsed["parsed"] and not unparsed["correct"], text
    # a gold answer that is none of the options is compared as a text
    assert score_answer("both", "Both", "closed", "Was oral or IV contrast used?") | {
        "kind": "closed",
        "correct": True,
    } == score_answer("both", "Both", "closed", "Was oral or IV contrast used?")


# --- open ---


def test_open_counts_words_once():
    found = score_answer("left left left left", "left lung", "open")
    assert (found["recall"], found["precision"], found["f1"], found["correct"]) == (
        0.5,
        0.25,
        pytest.approx(1 / 3),
        False,
    )
    found = score_answer("the right upper lobe", "Right Upper Lobe", "open")
    assert found["exact"] and found["correct"] and found["recall"] == found["f1"] == 1 and found["kind"] == "open"
    found = score_answer("liver spleen heart lung kidney", "lung", "open")  # a list of all organs
    assert found["recall"] == 1 and found["precision"] == 0.2 and not found["correct"]
    empty = score_answer(None, "lung", "open")
    assert not any(empty[key] for key in ("parsed", "correct", "exact", "recall", "precision", "f1", "contradiction"))


@pytest.mark.parametrize(
    "text, gold, question, equal",
    [
        ("left lung", "lung, left", "Where is the nodule?", True),
        ("Liver, Spleen, Kidney", "Kidney, liver, spleen", "", True),
        ("Liver and spleen", "Spleen, Liver", "", True),
        ("left kidney, right lung", "right kidney, left lung", "", False),
        ("liver, spleen", "liver", "", False),
        ("liver or spleen", "liver, spleen", "", False),
        ("anterior to posterior", "posterior to anterior", "", False),
        ("mass without edema", "edema without mass", "", False),
        ("It is an MRI", "MRI", "What modality?", True),
        ("in the left lung", "left lung", "", True),
        ("the nodule is in the left lung", "left lung", "Where is the nodule?", True),
        ("2 lesions", "2", "How many lesions are there?", True),
        ("two", "2 lesions", "How many lesions are there?", False),
        ("pleural effusion", "Effusion", "What is abnormal?", False),
        ("no mass", "mass", "What mass is there?", False),
        ("left right", "left", "Is the mass on the left or right?", False),
        ("Transverse", "Transverse Plane", "Which plane is it, transverse plane or coronal plane?", True),
        ("Transverse, and a mass", "Transverse Plane", "Which plane is it, transverse plane or coronal plane?", False),
        ("R lung", "right lung", "", True),
        ("R lung", "left lung", "", False),
        ("MRI scan", "MRI", "What is this?", False),  # a synonym
        ("the", "a", "", False),
    ],
)
def test_open_answers_that_are_the_same(text, gold, question, equal):
    found = score_answer(text, gold, "open", question)
    assert (found["correct"], found["exact"]) == (equal, equal)
    assert found["f1"] == 1 if equal else found["f1"] < 1 or not equal


@pytest.mark.parametrize("text, expected", [("L", 0), ("R.", 1), ("L or R", None), ("Lt side", 0), ("LR", None)])
def test_letters_of_sides(text, expected):
    assert choice(text, "Is the mass on the left or right?") == expected


CASES = """
The heart is enlarged | No | closed | Is the heart enlarged? | - -
Negative | No | closed | Is there a fracture? | + +
Positive | Yes | closed | Is there a fracture? | + +
There is no pneumothorax | No | closed | Is there a pneumothorax? | + +
no evidence of no effusion | No | closed | Is there an effusion? | - -
Yes - no pneumothorax is present, but an effusion is | Yes | closed | Is there an effusion? | + +
Yes, but without pneumothorax | Yes | closed | Is there an effusion? | + +
No, both lungs are clear | No | closed | Is there an effusion? | + +
No. There is a mass. | No | closed | Is there a fracture? | + +
if effusion then yes | Yes | closed | Is there an effusion? | - -
true | Yes | closed | Is there an effusion? | + +
Absent | No | closed | Is there an effusion? | + +
without effusion | No | closed | Is there an effusion? | + +
Neither | No | closed | Is there an effusion or pneumothorax? | + +
The picture does not contain liver | No | closed | Does the picture contain liver? | + +
Yes, it contains liver; it does not contain kidney | Yes | closed | Does the picture contain liver? | + +
left-sided | Left | closed | Is the mass on the left or right? | + +
L | Left | closed | Is the mass on the left or right? | + +
PA | PA | closed | Is this a PA or AP film? | + +
axial | Transverse Plane | open | Which plane is the image scanned, transverse plane or coronal plane? | - +
Heart | Heart | closed | Which is bigger in this image, lung or heart? | + +
left lung | lung, left | open | Where is the nodule? | + +
Liver, Spleen, Kidney | Kidney, liver, spleen | open | Which organs are in the image? | + +
Liver and spleen | Liver, Spleen | open | Which organs are in the image? | + +
xray | X-Ray | open | What modality is used? | + +
Chest radiograph | Chest X-ray | open | What is this? | - +
MR | MRI | open | What modality is used? | - +
computed tomography | CT | open | What modality? | - +
2 lesions | 2 | open | How many lesions are there? | + +
5 cm | 5cm | open | How big is the mass? | + +
3-5 cm | 3 to 5 cm | open | How big? | + +
T2 weighted | T2 | open | MR weighting? | + +
the right upper lobe | Right upper lobe | open | Where is the mass? | + +
right-upper-lobe | Right upper lobe | open | Where? | + +
opacities | opacity | open | What is seen? | + +
diverticula | diverticulum | open | What is seen? | + +
pneumothoraces | pneumothorax | open | What is seen? | + +
pelvis | pelvi | open | What? | - -
pleural effusion | Effusion | open | What is abnormal? | - -
no mass | mass | open | What? | - -
brain oedema | Brain Edema | open | Disease? | - +
Brain Non-enhancing Tumor | Brain Non-enhancing Tumor | open | Disease? | + +
brain nonenhancing tumour | Brain Non-enhancing Tumor | open | Disease? | - +
Eyes | Eye | open | Organ? | + +
L1-L2 | L1/L2 | open | Level? | + +
oesophagus | esophagus | open | Organ? | - +
paediatric chest | pediatric chest | open | What? | - +
tumours, colour of diarrhoea | tumor, color of diarrhea | open | What? | - +
centre | center | open | Where? | - +
third ventricle | 3rd ventricle | open | Where? | + +
It is an MRI | MRI | open | What modality? | + +
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_answers_as_a_reader_takes_them(case):
    """Answer, gold, type, question; right (+) or not in the strict column and in that of the synonyms."""
    text, gold, kind, question, expected = case.split(" | ")
    found = [score(text, gold, kind, question)["correct"] for score in (score_answer, score_with_synonyms)]
    assert found == [mark == "+" for mark in expected.split()]


def test_overlap_by_hand():
    # common: one of the two "a", one "b"; gold has 4 words, the prediction 3
    assert overlap(["a", "b", "x"], ["a", "a", "b", "c"]) == (0.5, pytest.approx(2 / 3), pytest.approx(4 / 7))
    assert overlap([], ["a"]) == overlap(["a"], []) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "text, gold, expected",
    [
        ("right lung", "left lung", True),
        ("left and right lung", "left lung", True),
        ("left lung", "left lung", False),
        ("lung", "left lung", False),
        ("both lungs, left and right", "left and right", False),
        ("hypodense", "hyperdense", True),
        ("hyperdense lesion", "hyperdense", False),
        ("lower lobe", "upper lobe", True),
        ("without contrast", "with contrast", True),
        ("increased density", "decreased density", True),
        ("no mass", "mass", True),
        ("mass", "no mass", True),
        ("no mass", "no mass seen", False),
        ("there is no mass in the liver", "liver mass", True),
        ("abnormal", "normal", True),
        ("edema", "mass", False),
    ],
)
def test_contradiction(text, gold, expected):
    assert score_answer(text, gold, "open")["contradiction"] is expected


@pytest.mark.parametrize("said, gold", OPPOSITE.items())
def test_opposites_earn_no_match(said, gold):
    found = score_answer(f"{said} side", f"{gold} side", "open")
    assert found["contradiction"] and not found["correct"] and found["f1"] == 0.5


# --- laws ---


def random_texts(n, seed):
    rng = random.Random(seed)
    words = [
        "left",
        "lung",
        "no",
        "yes",
        "not",
        "or",
        "a",
        "the",
        ",",
        ".",
        "5",
        "5cm",
        "X-ray",
        "hyper dense",
        "é",
        "肺",
        "\u200b",
        "\x00",
        "T2-weighted",
        "'s",
        "?",
        "/",
        "lungs",
        "with",
        "without",
        "mass",
    ]
    return [
        (
            "".join(chr(rng.randrange(32, 0x3000)) for _ in range(rng.randint(0, 12)))
            if rng.random() < 0.2
            else " ".join(rng.choices(words, k=rng.randint(0, 8)))
        )
        for _ in range(n)
    ]


def test_laws_for_any_text():
    rng = random.Random(3)
    texts = random_texts(500, 4)
    for gold in texts:
        text, question, kind = (
            rng.choice(texts),
            rng.choice([*texts, "left lung or right lung?"]),
            rng.choice(["open", "closed", "CHOICE "]),
        )
        found = score_answer(text, gold, kind, question)
        assert list(found) == ["parsed", "correct", "exact", "recall", "precision", "f1", "contradiction", "kind"]
        assert all(type(found[key]) is bool for key in ("parsed", "correct", "exact", "contradiction"))
        assert all(0 <= found[key] <= 1 for key in ("recall", "precision", "f1"))
        assert found["parsed"] or not found["correct"]  # nothing unparsed is right
        assert not (found["correct"] and found["contradiction"] and found["kind"] in ("yes/no", "open"))
        assert (
            found == score_answer(unicodedata.normalize("NFD", text).upper(), gold, kind, question)
            or not text.isascii()
        )  # case never matters
        if normalise(gold):
            same = score_answer(gold, gold, kind, question)
            assert same["exact"] and same["correct"] and same["f1"] == 1 and not same["contradiction"], gold
        back = score_answer(gold, text, "open")
        assert (back["recall"], back["precision"]) == (
            score_answer(text, gold, "open")["precision"],
            score_answer(text, gold, "open")["recall"],
        )


def test_wrong_answer_type():
    with pytest.raises(ValueError, match="must be closed, choice or open"):
        score_answer("yes", "yes", "maybe")


@pytest.mark.parametrize(
    "unit",
    [
        "no ",
        "a",
        "x ",
        "0",
        ".0",
        "hyper-",
        "yes,",
        "not left or ",
        "'",
        "> ",
        "magnetic ",
        "5 x ",
        "3-",
        "1 cm ",
        "left, ",
    ],
)
def test_a_long_text_is_no_problem(unit):
    start = time.process_time()
    text = unit * (200_000 // len(unit))
    for gold, question in (("no", EFFUSION), ("left", "left or right?")):
        score_answer(text, gold, "closed", question)
    score_with_synonyms(text, "left lung", "open")
    assert time.process_time() - start < 10


# --- synonyms: a column of their own ---


def test_synonyms_only_in_their_column():
    assert (
        not score_answer("computed tomography", "CT", "open")["correct"]
        and score_with_synonyms("computed tomography", "CT", "open")["correct"]
    )
    assert (
        score_with_synonyms("Tumours", "tumor", "open")["correct"]
        and score_with_synonyms("axial", "Transverse Plane", "closed", "transverse plane or coronal plane?")["correct"]
    )
    assert score_with_synonyms("nope", "no", "closed")["correct"] and not score_answer("nope", "no", "closed")["parsed"]
    assert (
        not score_with_synonyms("left", "right", "open")["correct"]
        and not score_with_synonyms(None, "ct", "open")["parsed"]
    )


def test_synonyms_are_stable_and_never_opposites():
    for phrase, word in SYNONYMS.items():
        assert fold_synonyms(phrase) == word and fold_synonyms(word) == word  # no chains
    for a, b in OPPOSITE.items():
        assert fold_synonyms(a) != fold_synonyms(b)


# --- columns of other scripts, faults included ---


@pytest.mark.parametrize(
    "text, gold, expected",
    [
        ("yes or no", "yes", 1.0),
        ("yes or no", "no", 1.0),
        ("it is normal", "no", 1.0),
        ("no", "no", 1.0),
        ("yes", "no", None),  # left out instead of wrong
        ("left", "right", 0.0),
        ("maybe", "yes", 0.0),
    ],
)
def test_llava_med_closed(text, gold, expected):
    assert llava_med_scores(text, gold, "CLOSED")["closed"] == expected


def test_llava_med_open():
    found = llava_med_scores("left left left left", "left lung", "OPEN")
    assert found["recall"] == 0.8 and found["precision"] == 1 and found["exact"] == 0.25 and found["closed"] is None
    assert llava_med_scores("none", "zero", "open")["f1"] == 1  # its word list
    assert llava_med_scores("", "lung", "open") == {
        "closed": None,
        "exact": 0.0,
        "recall": 0.0,
        "precision": 0.0,
        "f1": 0.0,
    }
    assert llava_med_scores("spleen", "lung", "open")["recall"] == 0


def test_medevalkit():
    assert medevalkit_scores("Yes, it is abnormal.", "yes", "closed", "vqa_rad")["closed"] == 0  # "no" is in abnormal
    assert (
        medevalkit_scores("Yes.", "Yes", "closed", "vqa_rad")["closed"] == 1
        and medevalkit_scores("It is normal", "no", "closed", "vqa_rad")["closed"] == 1
    )
    assert (
        medevalkit_scores("Yes, it is.", "Yes", "closed", "slake")["closed"] == 0
    )  # compared as a whole, "Yes" not being "yes"
    assert (
        medevalkit_scores("Yes.", "Yes", "closed", "slake")["closed"] == 1
        and medevalkit_scores("Left", "left", "closed", "vqa_rad")["exact"] == 1
    )
    found = medevalkit_scores(
        "left upper lung zone", "left lung", "open", "slake"
    )  # 2 of 4 words, both gold words: F1 2/3
    assert (found["precision"], found["recall"], found["f1"], found["exact"]) == (pytest.approx(2 / 3), 0.5, 1.0, 0.0)
    assert medevalkit_scores("The answer is: no", "no", "closed", "vqa_rad")["closed"] == 1
    assert medevalkit_scores(None, "lung", "open", "slake")["f1"] == 0


def test_column_means_skip_what_does_not_count():
    rows = [{"closed": 1.0, "f1": None}, {"closed": None, "f1": 0.5}, {"closed": 0.0, "f1": None}]
    assert (
        column_means(rows) == {"closed": {"mean": 0.5, "n": 2}, "f1": {"mean": 0.5, "n": 1}} and column_means([]) == {}
    )


# --- the real sets ---


@pytest.fixture(scope="module")
def rows_of():
    cache = {}

    def load(folder, name):
        if name not in cache:
            found = (
                load_vqa_rad(folder, allow_missing_images=True)
                if name == "vqa_rad"
                else load_slake(folder, allow_missing_images=True)
            )
            cache[name] = [row for row in found.rows if row["answer"]]
        return cache[name]

    return load


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["vqa_rad", "slake"])
def test_every_gold_answer_is_right(rows_of, real_data, name):
    rows = rows_of(real_data(name).parent, name)
    assert len(rows) > 3000
    for row in rows:
        for score in (score_answer, score_with_synonyms):
            found = score(row["answer"], row["answer"], row["answer_type"], row["question"])
            assert found["parsed"] and found["correct"] and found["exact"] and not found["contradiction"], (
                row["question"],
                row["answer"],
            )


@pytest.mark.realdata
@pytest.mark.parametrize("name, yes, no", [("vqa_rad", 43.4, 48.9), ("slake", 42.1, 43.3)])
def test_constant_answers(rows_of, real_data, name, yes, no):
    test = [row for row in rows_of(real_data(name).parent, name) if row["split"] == "test"]
    closed = [row for row in test if row["answer_type"] == "closed"]

    def accuracy(text, rows):
        return (
            100
            * sum(score_answer(text, row["answer"], row["answer_type"], row["question"])["correct"] for row in rows)
            / len(rows)
        )

    assert round(accuracy("yes", closed), 1) == yes and round(accuracy("No.", closed), 1) == no
    assert (
        accuracy("yes or no", closed)
        == accuracy("n", test)
        == accuracy("y", test)
        == accuracy("normal or abnormal", [r for r in closed if r["answer"].lower() in ("yes", "no")])
        == 0
    )
    llava = column_means([llava_med_scores("yes", row["answer"], "closed") for row in closed])["closed"]
    assert llava["mean"] > 0.8 and llava["n"] < len(closed)  # the fault: a constant "yes" looks excellent
    assert all(
        llava_med_scores("yes or no", row["answer"], "closed")["closed"] == 1
        for row in closed
        if row["answer"].lower() in ("yes", "no")
    )


@pytest.mark.realdata
def test_first_letters_would_mislead(rows_of, real_data):
    test = [row for row in rows_of(real_data("vqa_rad").parent, "vqa_rad") if row["split"] == "test"]
    for letter, share in (("n", 30.2), ("y", 26.2)):
        assert round(100 * sum(row["answer"].lower().startswith(letter) for row in test) / len(test), 1) == share
    odd = [
        row
        for row in rows_of(real_data("vqa_rad").parent, "vqa_rad")
        if row["answer"].lower()[0] in "yn" and normalise(row["answer"]) not in (["yes"], ["no"])
    ]
    assert odd and all(
        score_answer(row["answer"], row["answer"], row["answer_type"], row["question"])["kind"] != "yes/no"
        for row in odd
    )


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["vqa_rad", "slake"])
def test_choices_are_found_in_real_questions(rows_of, real_data, name):
    """Where gold is one of the options, another option is parsed and wrong, and both at once are unparsed."""
    rows = [
        row
        for row in rows_of(real_data(name).parent, name)
        if row["answer_type"] == "closed" and normalise(row["answer"]) not in (["yes"], ["no"])
    ]
    found = [(row, choice(row["answer"], row["question"])) for row in rows]
    chosen = [(row, right) for row, right in found if right is not None]
    assert len(chosen) > 0.7 * len(rows)  # the others: gold "both" or "maybe", or a stock wording without the options
    for row, right in chosen:
        options = [" ".join(tokens) for tokens, _ in options_of(row["question"])]
        for number, option in enumerate(options):
            assert score_answer(option, row["answer"], "closed", row["question"])["correct"] == (number == right), (
                row["question"],
                option,
            )
        both = score_answer(" and ".join(options), row["answer"], "closed", row["question"])
        assert not both["correct"] and not both["parsed"], row["question"]


ONE = "Is there an effusion?"
BIGGER = "Which is bigger in this image, lung or heart?"


@pytest.mark.parametrize(
    "text, gold, kind, question, right",
    [
        ("no - normal film", "No", "closed", ONE, True),  # a dash ends a clause
        ("No\u2014normal film", "No", "closed", ONE, True),
        ("There isn't one", "No", "closed", ONE, True),
        ("Not at all.", "No", "closed", ONE, True),
        ("maybe no", "No", "closed", ONE, False),
        ("perhaps yes", "Yes", "closed", ONE, False),
        ("Yes, possibly a cyst", "Yes", "closed", "Is there a mass?", True),
        ("Yes, it could be", "Yes", "closed", "Could this be a tumor?", True),
        ("Yes, the effusion is absent", "Yes", "closed", ONE, False),
        ("neither of them", "No", "closed", "Is there an effusion or a mass?", True),
        ("P.A.", "PA", "closed", "Is this a PA or AP film?", True),
        ("cystic rather than solid", "Cystic", "closed", "Is the lesion solid or cystic?", True),
        ("the lung is bigger than the heart", "Lung", "closed", BIGGER, True),
        ("the heart is bigger than the lung", "Lung", "closed", BIGGER, False),
        ("the heart is smaller than the lung", "Heart", "closed", BIGGER, False),
        ("left side", "left", "open", "Is the lesion left or right?", True),
        ("twenty-five", "25", "open", "How many?", True),
        ("20 5", "25", "open", "How many?", False),
        ("five cm", "50 mm", "open", "How big?", True),
        ("between 3 and 5 cm", "3-5 cm", "open", "How big?", True),
        ("3 cm to 5 cm", "3-5 cm", "open", "How big?", True),
        ("~2", "2", "open", "How many?", False),
        ("5+", "5", "open", "How many?", False),
        ("-5", "5", "open", "Which level?", False),
        ("1/3", "3/1", "open", "Which ratio?", False),
        ("50 per cent", "50%", "open", "How much?", True),
        ("$\\boxed{\\text{liver}}$", "liver", "open", "Which organ?", True),
    ],
)
def test_other_wordings(text, gold, kind, question, right):
    assert score_answer(text, gold, kind, question)["correct"] == right


def test_phrases_of_the_synonyms_may_have_hyphens():
    assert score_with_synonyms("posterior-anterior", "PA", "open")["correct"]
