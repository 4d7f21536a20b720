"""
The report labeller: sentences written for the purpose, exact samples, the phantom's reports, other labellers' labels.

The comparison with radlabels needs its 1,000 machine-labelled sample reports: pip install --no-deps radlabels==0.2.0
(its own dependencies conflict with current torch and transformers; only its data files are read).
"""

import csv
import importlib.util
import json
import random
import re
import textwrap
from pathlib import Path

import pytest

from shared.metrics.labels import CHEXBERT_ORDER, CONDITIONS, LABELLER_ORDER, condition_name, from_row, label_report
from shared.metrics.labels import to_row
from shared.phantom import phantom_study

HARD = json.loads((Path(__file__).parent / "data" / "label_sentences.json").read_text(encoding="utf-8"))
SHORT = {
    "NF": "No Finding",
    "ECM": "Enlarged Cardiomediastinum",
    "CM": "Cardiomegaly",
    "OPA": "Lung Opacity",
    "LES": "Lung Lesion",
    "EDE": "Edema",
    "CON": "Consolidation",
    "PNE": "Pneumonia",
    "ATE": "Atelectasis",
    "PTX": "Pneumothorax",
    "EFF": "Pleural Effusion",
    "PLE": "Pleural Other",
    "FRA": "Fracture",
    "DEV": "Support Devices",
}

# Sentence -> labels other than "not mentioned" (No Finding is checked apart).
CUES = [
    # stated
    ("There is a small left pleural effusion.", "EFF 1"),
    ("Moderate cardiomegaly.", "CM 1"),
    ("The heart is enlarged.", "CM 1"),
    ("The cardiac silhouette is mildly to moderately enlarged.", "CM 1"),
    ("Enlarged heart.", "CM 1"),
    ("Enlargement of the cardiac silhouette.", "CM 1"),
    ("Stable cardiomegaly.", "CM 1"),
    ("Unchanged bibasilar atelectasis.", "ATE 1"),
    ("Persistent right upper lobe collapse.", "ATE 1"),
    ("Left lower lobe consolidation is again seen.", "CON 1"),
    ("The right lower lobe is consolidated.", "CON 1"),
    ("Opacity at the right base consistent with pneumonia.", "OPA 1 PNE 1"),
    ("Findings compatible with pulmonary edema.", "EDE 1"),
    ("Mild pulmonary vascular congestion.", "EDE 1"),
    ("Mild interstitial oedema.", "EDE 1"),
    ("A 2.5 cm nodule projects over the left upper lobe.", "LES 1"),
    ("Nodular opacity in the lingula.", "LES 1"),
    ("Widened mediastinum.", "ECM 1"),
    ("The superior mediastinum is widened.", "ECM 1"),
    ("Enlarged cardiomediastinal silhouette.", "ECM 1"),
    ("Healing fracture of the left sixth rib.", "FRA 1"),
    ("Compression deformity of T8.", "FRA 1"),
    ("Biapical pleural thickening.", "PLE 1"),
    ("Right hydropneumothorax.", "PTX 1"),
    ("Large left haemothorax.", "EFF 1"),
    ("Patchy bibasilar infiltrates.", "OPA 1"),
    ("Retrocardiac density.", "OPA 1"),
    ("Endotracheal tube 4 cm above the carina.", "DEV 1"),
    ("Right-sided PICC ends in the SVC.", "DEV 1"),
    ("Dual-lead pacemaker in place.", "DEV 1"),
    # denied before
    ("No pneumothorax.", "PTX 0"),
    ("There is no evidence of pneumothorax.", "PTX 0"),
    ("No focal consolidation, pleural effusion, or pneumothorax.", "CON 0 EFF 0 PTX 0"),
    ("No effusion, consolidation, edema or pneumonia is identified.", "EFF 0 CON 0 EDE 0 PNE 0"),
    ("No effusion or pneumothorax is seen, and the heart is enlarged.", "EFF 0 PTX 0 CM 1"),
    ("No effusion and no pneumothorax.", "EFF 0 PTX 0"),
    ("Neither consolidation nor effusion is present.", "CON 0 EFF 0"),
    ("Cardiomegaly without overt edema.", "CM 1 EDE 0"),
    ("Negative for pneumonia.", "PNE 0"),
    ("The lungs are free of focal airspace opacity.", "OPA 0"),
    ("The lungs are clear of focal airspace disease, pneumothorax, or pleural effusion.", "OPA 0 PTX 0 EFF 0"),
    ("Absence of pleural effusion.", "EFF 0"),
    ("No pleural or pericardial effusion.", "EFF 0"),
    ("No new consolidation.", "CON 0"),
    ("No large pleural effusion.", "EFF 0"),
    ("No definite pneumothorax.", "PTX 0"),
    ("No lines or tubes.", "DEV 0"),
    ("The heart is not enlarged.", "CM 0"),
    ("No mediastinal widening.", "ECM 0"),
    # denied behind
    ("The left pleural effusion has resolved.", "EFF 0"),
    ("Pneumothorax is not seen.", "PTX 0"),
    ("Pleural effusion and pneumothorax are not identified.", "EFF 0 PTX 0"),
    ("The previously seen consolidation is no longer visible.", "CON 0"),
    ("Interval resolution of the right pneumothorax.", "PTX 0"),
    ("The endotracheal tube has been removed.", "DEV 0"),
    ("Interval removal of the right chest tube.", "DEV 0"),
    ("Pneumothorax: none.", "PTX 0"),
    # a denial that ends, or is none
    ("No pneumothorax, but a small effusion.", "PTX 0 EFF 1"),
    ("No pneumothorax, small left effusion.", "PTX 0 EFF 1"),
    ("Right chest tube in place with no pneumothorax.", "DEV 1 PTX 0"),
    ("No pneumothorax after chest tube placement.", "PTX 0 DEV 1"),
    ("No pneumothorax with right chest tube in place.", "PTX 0 DEV 1"),
    ("No change in the small left effusion.", "EFF 1"),
    ("No significant interval change in cardiomegaly.", "CM 1"),
    ("The effusion has not changed.", "EFF 1"),
    ("Effusion has not resolved.", "EFF 1"),
    ("Near complete resolution of the edema.", "EDE 1"),
    ("The pneumothorax has nearly resolved.", "PTX 1"),
    ("The tip of the endotracheal tube is not seen.", "DEV 1"),
    ("Improving pulmonary edema.", "EDE 1"),
    # doubted
    ("Possible small left pleural effusion.", "EFF -1"),
    ("Pneumonia cannot be excluded.", "PNE -1"),
    ("Cannot exclude pneumonia.", "PNE -1"),
    ("A small pneumothorax is not excluded.", "PTX -1"),
    ("It is difficult to exclude a small effusion.", "EFF -1"),
    ("Left basilar opacity may represent atelectasis or pneumonia.", "OPA 1 ATE -1 PNE -1"),
    ("Opacity concerning for pneumonia.", "OPA 1 PNE -1"),
    ("Bibasilar opacities, likely atelectasis.", "OPA 1 ATE -1"),
    ("Atelectasis versus pneumonia at the left base.", "ATE -1 PNE -1"),
    ("Atelectasis vs. pneumonia at the left base.", "ATE -1 PNE -1"),
    ("Questionable nodule in the right apex.", "LES -1"),
    ("Suspected left rib fracture.", "FRA -1"),
    ("The mediastinum may be widened.", "ECM -1"),
    ("Probable mild edema with small effusions.", "EDE -1 EFF 1"),
    ("Possible edema and cardiomegaly.", "EDE -1 CM 1"),
    ("Borderline cardiomegaly.", "CM -1"),
    ("Borderline heart size.", "CM -1"),
    ("Pleural effusions, if any, are small.", "EFF -1"),
    ("Small effusions are presumed.", "EFF -1"),
    ("Opacity at the base, although pneumonia cannot be entirely excluded.", "OPA 1 PNE -1"),
    ("No effusion, but pneumonia should be considered.", "EFF 0 PNE -1"),
    ("Congestive heart failure.", "CM -1"),
    # anatomy
    ("Heart size is normal.", "CM 0"),
    ("The heart is normal in size and the mediastinum is unremarkable.", "CM 0 ECM 0"),
    ("Heart size and mediastinal contours are within normal limits.", "CM 0 ECM 0"),
    ("The heart, pulmonary vessels and mediastinum are normal.", "CM 0 ECM 0"),
    ("Normal heart size and mediastinal contours.", "CM 0 ECM 0"),
    ("Normal cardiomediastinal silhouette.", "ECM 0"),
    ("The cardiac silhouette is top normal in size.", "CM 0"),
    ("Heart size is at the upper limits of normal.", "CM 0"),
    ("Heart size normal, lungs clear.", "CM 0"),
    ("The cardiac silhouette is unchanged.", ""),
    ("The heart is stable and the lungs are normal.", ""),
    ("Normal hila and enlarged heart.", "CM 1"),
    ("The aorta is tortuous and the heart size is normal.", "CM 0"),
    ("Enlarged pulmonary arteries.", ""),
    ("Clear lungs.", ""),
    # neither
    ("Evaluate for pneumothorax.", ""),
    ("Recommend follow-up to exclude pneumonia.", ""),
    ("The sensitivity to detect pneumothorax is diminished.", ""),
    ("History of pneumonia.", ""),
    ("Small pericardial effusion.", ""),
    ("Calcified nodule in the right apex.", ""),
    ("Residuals of prior granulomatous infection.", ""),
    ("Decreased bone density.", ""),
    ("Sclerotic bone lesion.", ""),
    ("Kyphosis and scoliosis.", ""),
    ("", ""),
]


def stated(text):
    """The labels other than No Finding and not mentioned."""
    return {name: value for name, value in label_report(text).items() if value is not None and name != "No Finding"}


def expected(short):
    words = short.split()
    return {SHORT[n]: None if value == "N" else int(value) for n, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("text, labels", CUES)
def test_cue_sentences(text, labels):
    assert stated(text) == expected(labels)


def test_there_are_enough_cue_sentences_and_every_condition_is_in_them():
    assert len({text for text, _ in CUES}) == len(CUES) >= 80
    seen = {(name, value) for _, labels in CUES for name, value in expected(labels).items()}
    assert {(name, 1) for name in CONDITIONS[1:]} <= seen  # each of them denied and doubted: next test


@pytest.mark.parametrize("row", HARD, ids=[row["text"] for row in HARD])
def test_hard_sentences(row):
    found = label_report(row["text"])
    assert {name: found[name] for name in row["expected"]} == row["expected"]


def test_more_hard_sentences():
    """
    685 sentences of the same kinds, kept so that they stay right. Of 110 of them, written after the rules and read
    once, 105 were right at first; of 234 that were written to be harder, 180; of 297 more, 267. Of the next 46, 43 were
    wrong at first: one or two of each kind that was found in 780 sentences of our own and 1,100 of real reports. The
    next 11 were wrong at first, found in 406 more of our own; so were the next 27, found in 480,
    and the next 43, found in 245 in the manner of vision-language models. Of the next 60, 57 were wrong at first,
    found in 826: dictation without stops, templates, translated reports. Of 394 more of all kinds 377 were right at
    first; the last 17 are the others, and neighbours of theirs.
    """
    path = Path(__file__).parent / "data" / "more_label_sentences.txt"
    rows = [line.split(" | ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    wrong = []
    for short, text in rows:
        found, wanted = label_report(json.loads(f'"{text}"')), expected(short)
        wrong += [text] * ({name: found[name] for name in wanted} != wanted)
    assert len(rows) > 400 and not wrong


# More of the kinds that the hard sentences show: how a clause, a line, a bracket or a template ends what was open.
LAYOUT = [
    ("No evidence of pneumothorax or\npleural effusion.", "PTX 0 EFF 0"),  # the sentence goes on
    ("no focal consolidation\nsmall right pleural effusion\ncardiomegaly", "CON 0 EFF 1 CM 1"),
    ("Findings:\r\n1) No edema\r\n2) Cardiomegaly", "EDE 0 CM 1"),
    ("**Absent findings:**\r\n- Pneumothorax\r\n- Effusion\r\n\r\nCardiomegaly", "PTX 0 EFF 0 CM 1"),
    ("No pneumothorax (or effusion).", "PTX 0 EFF 0"),
    ("No pneumothorax (the tube is in place) or effusion.", "PTX 0 DEV 1 EFF 0"),
    ("No effusion(s) or nodule(s).", "EFF 0 LES 0"),
    ("No mid- and lower-lung consolidation.", "CON 0"),
    ("Negative for: effusion, pneumothorax.", "EFF 0 PTX 0"),
    ("Small nodule, effusion: none.", "LES 1 EFF 0"),
    ("Consolidation and effusion: none.", "CON 0 EFF 0"),
    ("Mild cardiomegaly - no acute disease.", "CM 1"),
    ("Opacity at the base ? pneumonia.", "OPA 1 PNE -1"),
    ("Nodule on the frontal view, not seen on the lateral view.", "LES 1"),
    ("No effusion and pneumothorax is seen.", "EFF 0 PTX 0"),
    ("No effusion, pneumothorax, or edema is unchanged from before.", "EFF 0 PTX 0 EDE 0"),
    ("The cardiac silhouette is stable, the effusion increased.", "EFF 1"),
    ("No pneumothorax, chest tube in place.", "PTX 0 DEV 1"),
    ("Pneumonia should be excluded.", "PNE -1"),
    ("The study is negative for pneumothorax.", "PTX 0"),
    ("Exclude pneumonia? Cannot exclude effusion.", "PNE -1 EFF -1"),
    ("Plural effusion as evidenced by opacified base.", "EFF 1 OPA 1"),
]


@pytest.mark.parametrize("text, labels", LAYOUT)
def test_layout_and_clauses(text, labels):
    assert stated(text) == expected(labels)


NOUNS = {
    "Enlarged Cardiomediastinum": "mediastinal widening",
    "Cardiomegaly": "cardiomegaly",
    "Lung Opacity": "focal opacity",
    "Lung Lesion": "pulmonary nodule",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
    "Support Devices": "endotracheal tube",
}


@pytest.mark.parametrize("name", CONDITIONS[1:])
def test_a_word_in_front_flips_the_label(name):
    noun = NOUNS[name]
    assert stated(f"{noun.capitalize()}.") == {name: 1}
    assert stated(f"No {noun}.") == stated(f"No evidence of {noun}.") == stated(f"Without {noun}.") == {name: 0}
    assert (
        stated(f"Possible {noun}.")
        == stated(f"Cannot exclude {noun}.")
        == stated(f"{noun} cannot be excluded.")
        == {name: -1}
    )
    assert stated(f"Evaluate for {noun}.") == {}


def test_several_mentions_positive_then_uncertain_then_negative():
    assert stated("No effusion. Possible effusion.") == {"Pleural Effusion": -1}
    assert stated("Possible effusion. Small effusion. No effusion.") == {"Pleural Effusion": 1}


@pytest.mark.parametrize(
    "text, label",
    [
        ("The heart and lungs are normal.", 1),
        ("No pneumothorax.", 1),
        ("Endotracheal tube in place. Lungs are clear.", 1),  # devices alone leave a normal film
        ("Possible nodule.", None),
        ("Emphysema.", None),  # abnormal, though none of the 13
        ("Degenerative changes of the spine.", None),
        ("Calcified granuloma.", None),
        ("No hiatal hernia.", 1),
        ("Borderline heart size.", None),
        ("Fracture.", None),
        ("", None),
        (" \n. 1.", None),
        ("XXXX XXXX. N/A", None),
        ("nan", None),
    ],
)
def test_no_finding(text, label):
    labels, spans = label_report(text, evidence=True)
    assert labels["No Finding"] == label == label_report(text)["No Finding"]
    assert [s["rule"] for s in spans if s["condition"] == "No Finding"] == ["nothing abnormal stated or doubted"] * (
        label == 1
    )


# --- evidence ---


def test_evidence_names_the_words_and_the_rule():
    text = "FINDINGS:  Cardio-\nmegaly?  No  effusion; the Heart is\tenlarged. Possible nodule. Evaluate for pneumonia."
    labels, spans = label_report(text, evidence=True)
    assert labels == label_report(text)
    told = [(s["condition"], s["label"], s["rule"], s["text"], s["cue"]) for s in spans]
    assert told == [
        ("Cardiomegaly", -1, "uncertainty", "Cardio-\nmegaly", "?"),
        ("Pleural Effusion", 0, "negation", "effusion", "No"),
        ("Cardiomegaly", 1, "enlarged anatomy", "Heart is\tenlarged", None),
        ("Lung Lesion", -1, "uncertainty", "nodule", "Possible"),
        ("Pneumonia", None, "not described", "pneumonia", "Evaluate for"),
    ]
    for s in spans:
        assert text[s["start"] : s["end"]] == s["text"]
        assert s["cue"] is None or text[s["cue_start"] : s["cue_end"]] == s["cue"]


def test_every_label_has_a_span_that_gives_it():
    for index in range(60):
        text = phantom_study(31, index, 28).report.text
        labels, spans = label_report(text, evidence=True)
        for name, value in labels.items():
            given = [s["label"] for s in spans if s["condition"] == name]
            assert (value in given) if value is not None else not {1, 0, -1} & set(given)


def test_letters_that_grow_in_lower_case_do_not_move_the_evidence():
    text = "İİİ no pneumothorax."
    span, _ = label_report(text, evidence=True)[1]
    assert (span["text"], span["cue"]) == ("pneumothorax", "no")


@pytest.mark.parametrize(
    "first", ["Pneumothorax: -.", "Pneumothorax (-).", "-ve for edema.", "\u2610 Edema.", "Edema [ ]."]
)
def test_a_sign_that_means_no_does_not_move_the_evidence_behind_it(first):
    labels, spans = label_report(f"{first} Small effusion.", evidence=True)
    assert [(s["label"], s["text"]) for s in spans][-1] == (1, "effusion")
    assert labels["Pneumothorax"] == 0 or labels["Edema"] == 0


def test_sections_that_are_not_read():
    text = (
        "INDICATION: Pneumonia, rule out effusion. Known nodule.\nCOMPARISON: Chest with edema. The heart is"
        " enlarged.\nFINDINGS: No pneumothorax."
    )
    assert stated(text) == {"Cardiomegaly": 1, "Pneumothorax": 0}
    assert stated("History: pneumonia. Small effusion.") == {
        "Pleural Effusion": 1
    }  # no other header: one sentence is left out
    assert stated("Impression: pneumonia.") == {"Pneumonia": 1}


def test_not_a_text():
    with pytest.raises(TypeError, match="float"):
        label_report(float("nan"))


# --- properties ---


def texts_for_properties():
    return [text for text, _ in CUES if text] + [phantom_study(32, index, 28).report.text for index in range(40)]


def test_case_and_whitespace_change_nothing():
    for text in texts_for_properties():
        labels = label_report(text)
        for other in (
            text.upper(),
            text.lower(),
            text.title(),
            f"  {text}\n",
            textwrap.fill(text, 60),  # a line that is full does not end a sentence
            textwrap.fill(text.upper(), 60),
            textwrap.fill(text, 80, initial_indent="    ", subsequent_indent="  "),
            text.replace(" ", " \t "),
        ):
            assert label_report(other) == labels, other


def test_the_order_of_sentences_changes_nothing():
    rng = random.Random(0)
    for index in range(60):
        text = phantom_study(33, index, 28).report.text
        sentences = re.findall(r"[A-Z][^.]*(?:\.\d[^.]*)*\.", text)
        shuffled = " ".join(rng.sample(sentences, len(sentences)))
        assert len(sentences) > 1 and label_report(shuffled) == label_report(" ".join(sentences))
    cues = [text for text, _ in CUES if text]
    assert stated(" ".join(cues)) == stated(" ".join(reversed(cues)))


def test_adding_a_normal_report_removes_no_positive():
    normal = (
        "The heart is normal in size. The lungs are clear. No consolidation, edema, effusion or pneumothorax. No"
        " fracture. No lines or tubes."
    )
    assert 1 not in stated(normal).values()
    for text in texts_for_properties():
        for both in (f"{text} {normal}", f"{normal} {text}"):
            for name, value in stated(text).items():
                assert stated(both)[name] == value


# --- other people's labels ---


@pytest.mark.realdata
def test_sample_reports_of_the_chexpert_labeller(real_data):
    path = real_data("report_labels/chexpert_labeler_labeled_reports.csv")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        assert label_report(row["Reports"]) == from_row([row[name] for name in LABELLER_ORDER], LABELLER_ORDER)


def test_two_thousand_phantom_reports():
    agree = dict.fromkeys(CONDITIONS, 0)
    for index in range(2000):
        report = phantom_study(4001, index, 28).report
        read = label_report(report.text)
        for name in CONDITIONS:
            agree[name] += read[name] == report.labels[name]  # one of four: stated, denied, doubted, not mentioned
    assert min(agree.values()) >= 0.99 * 2000


def f1(called, true):
    tp = len(called & true)
    return 2 * tp / (len(called) + len(true))


# Condition -> column of the index and the F1 reached at least on all 3,851 reports, -1 counted as not positive. The
# index holds what somebody found worth indexing: congestion is not edema there, and a "possible pneumonia" may be
# either.
INDEXED = {
    "Atelectasis": ("Atelectasis", 0.91),
    "Cardiomegaly": ("Cardiomegaly", 0.89),
    "Pleural Effusion": ("Effusion", 0.89),
    "Pneumonia": ("Pneumonia", 0.70),
    "Pneumothorax": ("Pneumothorax", 0.82),
    "Consolidation": ("Consolidation", 0.87),
    "Edema": ("Edema", 0.60),
}


@pytest.mark.realdata
def test_indexed_labels_of_all_iu_reports(real_data):
    with open(real_data("iu_xray/labels/openi_gld_std14.csv"), encoding="utf-8", newline="") as file:
        gold = {int(row["filename"].removeprefix("CXR")): row for row in csv.DictReader(file)}
    with open(real_data("iu_xray/indiana_reports.csv"), encoding="utf-8", newline="") as file:
        read = {int(row["uid"]): label_report(f"{row['findings']} {row['impression']}") for row in csv.DictReader(file)}
    assert read.keys() == gold.keys() and len(read) == 3851
    reached = {}
    for name, (column, least) in INDEXED.items():
        reached[name] = f1(
            {uid for uid, labels in read.items() if labels[name] == 1},
            {uid for uid, row in gold.items() if row[column] == "1"},
        )
        assert reached[name] >= least, (name, reached[name])
    print({name: round(value, 3) for name, value in reached.items()})


# Condition -> the labels of radlabels that mean it. It lets "consolidation" and "pneumonia" state an air-space opacity;
# for Lung Opacity ours are joined in the same way.
RADLABELS = {
    "Atelectasis": ["atelectasis", "lobar_segmental_collapse", "whole_lung_or_majority_collapse"],
    "Cardiomegaly": ["cardiomegaly"],
    "Consolidation": ["consolidation"],
    "Edema": ["pulmonary_edema"],
    "Fracture": ["fracture_generic", "acute_rib_fracture", "non_acute_rib_fracture"],
    "Lung Opacity": ["lung_opacity", "air_space_opacity", "ground_glass_opacity", "infiltration"],
    "Pleural Effusion": ["pleural_effusion"],
    "Pneumonia": ["pneumonia"],
    "Pneumothorax": ["pneumothorax"],
    "Support Devices": [
        "central_venous_catheter",
        "endotracheal_tube",
        "enteric_tube",
        "implantable_electronic_device",
        "intercostal_drain",
        "tracheostomy_tube",
        "pacemaker_electronic_cardiac_device_or_wires",
        "support_devices_generic",
        "nonsurgical_internal_foreign_body",
    ],
}


def radlabels_f1(half):
    """
    F1 per condition on the reports with an even (half = 0, used for tuning) or odd number. Stated and doubted are
    positive on both sides: most of what a report doubts ("could reflect pneumonia") is "definitely present" there.
    """
    found = importlib.util.find_spec(
        "radlabels"
    )  # found, not imported: its own imports need packages nothing else here needs
    if found is None:
        pytest.skip("needs radlabels 0.2.0's sample reports: pip install --no-deps radlabels==0.2.0")
    samples = Path(found.submodule_search_locations[0]) / "samples"
    theirs = json.loads((samples / "synthetic_labels.json").read_text(encoding="utf-8"))
    names = [name for name in theirs if int(name[-4:]) % 2 == half]
    assert len(names) == 500
    read = {
        name: label_report((samples / "synthetic_reports" / f"{name}.txt").read_text(encoding="utf-8"))
        for name in names
    }
    result = {}
    for condition, keys in RADLABELS.items():
        ours = ("Lung Opacity", "Consolidation", "Pneumonia") if condition == "Lung Opacity" else (condition,)
        true = {
            name for name in names if any(theirs[name].get(key) in ("definitely present", "uncertain") for key in keys)
        }
        called = {name for name in names if any(read[name][c] in (1, -1) for c in ours)}
        result[condition] = f1(called, true)
    return result


@pytest.mark.parity
def test_agreement_with_radlabels_on_the_held_out_half():
    result = radlabels_f1(1)
    print({name: round(value, 3) for name, value in result.items()})
    assert len(result) == 10 and sum(result.values()) / 10 >= 0.93
    assert min(result.values()) >= 0.85


# --- names and orders ---


def test_orders_and_rows_map_by_name():
    labels = label_report("Right effusion. No pneumothorax. Possible pneumonia.")
    for order in (CONDITIONS, LABELLER_ORDER, CHEXBERT_ORDER):
        row = to_row(labels, order)
        assert sorted(order) == sorted(CONDITIONS) and row[order.index("Pleural Effusion")] == 1
        assert from_row(row, order) == labels
    assert from_row(["", float("nan"), None, "1.0"] + [-1] * 10, CONDITIONS)["Lung Opacity"] == 1
    assert condition_name("pleural_effusion") == "Pleural Effusion" and condition_name("Oedema") == "Edema"
    with pytest.raises(ValueError, match="14 CheXpert"):
        condition_name("gout")
