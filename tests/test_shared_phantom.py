"""
The phantom: same seed same study, truth that matches pixels, text that matches labels, questions one cannot guess.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from shared.metrics.labels import CHEXBERT_ORDER, CONDITIONS, LABELLER_ORDER, PARENTS, condition_name, from_row, to_row
from shared.phantom import PhantomSettings, patient_of, phantom_classification, phantom_study
from shared.phantom.findings import ORDER
from shared.phantom.study import label_rates
from shared.phantom.words import DENIED, LISTED, STATED, SUSPECTED, UNCHANGED
from shared.runtime import InputError

ROOT = Path(__file__).resolve().parents[1]


def as_record(study):
    """What is known about a study besides its pixels, as plain lists, dicts and numbers that JSON can hold."""
    report = study.report
    return {
        "study_id": study.study_id,
        "patient_id": study.patient_id,
        "seed": study.seed,
        "index": study.index,
        "truth": [
            {k: getattr(f, k) for k in ("name", "condition", "kind", "side", "zone", "severity")} for f in study.truth
        ],
        "labels": study.labels,
        "report_labels": study.report_labels,
        "report": {k: getattr(report, k) for k in ("indication", "comparison", "findings", "impression")},
        "boxes": study.boxes,
        "organ_boxes": study.organ_boxes,
        "questions": [{**vars(q), "paraphrases": [vars(p) for p in q.paraphrases]} for q in study.questions],
        "shortcut": study.shortcut,
    }


def only(name, **more):
    """A hospital where everybody has this one condition."""
    return PhantomSettings(prevalence={name: 1.0}, together={}, normal=0.0, **more)


# ------------------------------------------------------------------------------------------------ table of conditions


def test_the_14_conditions_are_mapped_by_name():
    assert len(CONDITIONS) == 14 and set(LABELLER_ORDER) == set(CHEXBERT_ORDER) == set(CONDITIONS)
    assert LABELLER_ORDER[3:5] == ("Lung Lesion", "Lung Opacity") and CHEXBERT_ORDER[-1] == "No Finding"
    assert condition_name("pleural_effusion") == "Pleural Effusion" and condition_name("Oedema") == "Edema"
    assert set(PARENTS) | set(PARENTS.values()) <= set(CONDITIONS)
    with pytest.raises(ValueError, match="not one of the 14"):
        condition_name("pericardial effusion")


def test_rows_in_another_order_give_the_same_labels():
    labels = {**dict.fromkeys(CONDITIONS), "Edema": 1, "Lung Lesion": 0, "Pneumonia": -1}
    for order in (CONDITIONS, LABELLER_ORDER, CHEXBERT_ORDER):
        assert from_row(to_row(labels, order), order) == labels
    assert from_row(["", float("nan"), None, "1.0", *[""] * 10], CONDITIONS)["Lung Opacity"] == 1
    with pytest.raises(ValueError, match="expected 1, 0, -1"):
        from_row([2, *[None] * 13], CONDITIONS)


# ------------------------------------------------------------------------------------------------------ MedMNIST form


def test_classification_has_medmnist_form():
    data = phantom_classification(3, {"train": 60, "val": 10, "test": 20})
    for split, n in (("train", 60), ("val", 10), ("test", 20)):
        assert data[f"{split}_images"].shape == (n, 28, 28) and data[f"{split}_images"].dtype == np.uint8
        assert data[f"{split}_labels"].shape == (n, 1) and data[f"{split}_labels"].dtype == np.uint8
    assert 0.4 < data["train_labels"].mean() < 0.8
    images = np.concatenate([data[f"{s}_images"] for s in ("train", "val", "test")]).reshape(90, -1)
    assert len(np.unique(images, axis=0)) == 90
    again = phantom_classification(3, {"train": 5})
    assert np.array_equal(again["train_images"], data["train_images"][:5])
    assert not np.array_equal(phantom_classification(4, {"train": 5})["train_images"], again["train_images"])


def test_classification_masks():
    data = phantom_classification(0, {"train": 12}, 64, masks=True)
    assert data["train_masks"].shape == (12, 64, 64) and data["train_masks"].dtype == bool
    assert np.array_equal(data["train_masks"].any((1, 2)), data["train_labels"][:, 0] == 1)
    plain = phantom_classification(0, {"train": 12}, 64)
    assert np.array_equal(plain["train_images"], data["train_images"]) and "train_masks" not in plain


@pytest.mark.slow
def test_pixels_alone_do_not_solve_the_classification():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    data = phantom_classification(0, {"train": 1500, "test": 500})
    train, test = (data[f"{s}_images"].reshape(len(data[f"{s}_images"]), -1) / 255.0 for s in ("train", "test"))
    scale = StandardScaler().fit(train)
    model = LogisticRegression(C=0.01, max_iter=300).fit(scale.transform(train), data["train_labels"][:, 0])
    auc = roc_auc_score(data["test_labels"], model.decision_function(scale.transform(test)))
    assert 0.6 < auc < 0.9


# -------------------------------------------------------------------------------------------------------- determinism


def test_a_study_is_reproducible_at_every_size():
    for index in range(4):
        first, again = phantom_study(0, index, 64), phantom_study(0, index, 64)
        assert np.array_equal(first.image, again.image) and as_record(first) == as_record(again)
        for size in (28, 97, 224):
            other = phantom_study(0, index, size)
            assert other.image.shape == (size, size) and other.image.dtype == np.uint8
            assert other.labels == first.labels and [f.name for f in other.truth] == [f.name for f in first.truth]
            assert other.report == first.report
            assert [q.text for q in other.questions] == [q.text for q in first.questions]


def test_text_labels_and_boxes_are_the_recorded_ones():
    """
    Written down once, so that another platform or a careless change shows. Raise phantom.VERSION when this must
    change.
    """
    digest = hashlib.sha256()
    for index in range(60):
        digest.update(json.dumps(as_record(phantom_study(11, index, 224)), sort_keys=True).encode())
    assert digest.hexdigest()[:16] == RECORDED, f"phantom text or boxes changed: {digest.hexdigest()[:16]}"


RECORDED = "d069722c2a67c316"


def test_boxes_scale_with_the_image():
    small, large = phantom_study(2, 5, 100, only("Pneumonia")), phantom_study(2, 5, 400, only("Pneumonia"))
    for name, boxes in small.boxes.items():
        for a, b in zip(boxes, large.boxes[name], strict=True):
            assert np.abs(4 * np.array(a) - b).max() <= 4


def test_settings_do_not_move_the_anatomy():
    plain, ill = phantom_study(1, 3, 64, PhantomSettings(normal=1.0)), phantom_study(1, 3, 64, only("Lung Lesion"))
    assert plain.anatomy == ill.anatomy and plain.position == ill.position
    assert np.array_equal(plain.image, ill.without("Lung Lesion").image)


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="28 to 512"):
        phantom_study(0, 0, size=20)
    with pytest.raises(ValueError, match="unknown split"):
        phantom_classification(0, {"training": 5})
    with pytest.raises(InputError, match="prevalence of Edema"):
        PhantomSettings(prevalence={"Edema": 1.5})
    with pytest.raises(ValueError, match="no condition"):
        PhantomSettings(prevalence={"Scoliosis": 0.1})
    with pytest.raises(ValueError, match="cause must come before"):
        PhantomSettings(together={("Support Devices", "Edema"): 0.5})
    with pytest.raises(ValueError, match="no finding"):
        phantom_study(0, 0, 28, PhantomSettings(normal=1.0)).without("Edema")


def test_patients_have_several_studies_of_the_same_body():
    visits = defaultdict(list)
    for index in range(400):
        patient, visit = patient_of(5, index)
        assert visit == len(visits[patient])
        visits[patient].append(index)
    assert {1, 2, 3} <= {len(v) for v in visits.values()}
    assert 200 < len(visits) < 350
    several = next(v for v in visits.values() if len(v) >= 3)
    studies = [phantom_study(5, i, 64, only("Cardiomegaly")) for i in several]
    assert len({s.patient_id for s in studies}) == 1 and len({s.study_id for s in studies}) == len(studies)
    assert all(s.anatomy == studies[0].anatomy for s in studies)
    assert studies[0].position != studies[1].position
    assert {f.severity for s in studies for f in s.truth} == {studies[0].truth[0].severity}  # a chronic finding stays


# --------------------------------------------------------------------------------------------------- truth and pixels


def kinds(size=224, patients=40, seed=1):
    """One study and finding of each kind and severity."""
    found = {}
    for name in ORDER:
        for index in range(0, 8 * patients, 8):
            study = phantom_study(seed, index, size, only(name))
            for finding in study.truth:
                found.setdefault((finding.kind, finding.severity), (study, finding))
    return found


def share_in_boxes(study, name):
    """Share of the absolute pixel change of removing a finding that lies in its boxes, and the mean change in them."""
    change = np.abs(study.image.astype(int) - study.without(name).image)
    inside = np.zeros(change.shape, bool)
    for x0, y0, x1, y1 in study.boxes[name]:
        inside[y0:y1, x0:x1] = True
    return change[inside].sum() / max(1, change.sum()), change[inside].mean()


def test_removing_a_finding_changes_its_box_and_nothing_else():
    found = kinds(patients=12)
    assert len({kind for kind, _ in found}) == 20
    for (kind, severity), (study, finding) in found.items():
        share, change = share_in_boxes(study, finding.name)
        assert share >= 0.95, f"{severity} {kind}: only {share:.3f} of the change is in the box"
        assert change > 0.3, f"{severity} {kind} does not show"


@pytest.mark.slow
def test_removal_stays_in_the_box_when_findings_overlap():
    for index in range(250):
        study = phantom_study(9, index, 224, PhantomSettings(normal=0.0))
        for finding in study.truth:
            share, _ = share_in_boxes(study, finding.name)
            assert share >= 0.95, f"{study.study_id}, {finding.name} among {[f.name for f in study.truth]}: {share:.3f}"


def test_masks_lie_in_their_boxes_and_on_the_right_side():
    for (kind, _), (study, finding) in kinds(size=128, patients=6).items():
        mask = study.masks[finding.name]
        assert mask.shape == (128, 128) and mask.dtype == bool and mask.any(), kind
        grown = np.zeros_like(mask)
        for x0, y0, x1, y1 in study.boxes[finding.name]:
            grown[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = True
        assert (mask & grown).sum() >= 0.97 * mask.sum(), kind
        if finding.side in ("left", "right") and "catheter" not in kind and kind != "pacemaker":
            columns = np.nonzero(mask)[1]
            middle = np.nonzero(study.organ_masks["spine"])[1].mean()
            assert (columns.mean() < middle) == (finding.side == "right"), kind  # image left is the patient's right


def test_organs_are_where_they_belong():
    for size in (28, 224):
        study = phantom_study(3, 2, size, PhantomSettings(normal=1.0))
        masks, boxes = study.organ_masks, study.organ_boxes
        assert set(masks) == set(boxes) == {"right lung", "left lung", "heart", "mediastinum", "diaphragm", "spine"}
        for name, mask in masks.items():
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = boxes[name]
            tolerance = 2 + size // 20  # the box of a lung goes on behind the heart, its mask does not
            assert abs(columns.min() - x0) <= tolerance and abs(columns.max() + 1 - x1) <= tolerance, name
            assert rows.min() >= y0 - tolerance and rows.max() < y1 + tolerance, name
        centre = {name: np.argwhere(mask).mean(0) for name, mask in masks.items()}
        assert centre["right lung"][1] < centre["heart"][1] < centre["left lung"][1]  # (row, column)
        assert centre["heart"][1] > centre["spine"][1]  # the heart lies to the patient's left
        assert centre["diaphragm"][0] > centre["right lung"][0]
        assert not (masks["right lung"] & masks["left lung"]).any() and not (masks["right lung"] & masks["heart"]).any()
        assert study.image[masks["right lung"]].mean() < study.image[masks["heart"]].mean() - 40  # air is dark


def test_cardiothoracic_ratio_decides_cardiomegaly():
    for index in range(0, 80, 8):
        for study, large in (
            (phantom_study(6, index, 256, PhantomSettings(normal=1.0)), False),
            (phantom_study(6, index, 256, only("Cardiomegaly")), True),
        ):
            heart, right, left = (study.organ_boxes[k] for k in ("heart", "right lung", "left lung"))
            ratio = (heart[2] - heart[0]) / (left[2] - right[0])
            assert (ratio > 0.5) == large, ratio


def test_prevalence_and_co_occurrence_follow_the_settings():
    settings = PhantomSettings(
        prevalence={"Edema": 0.3, "Pneumothorax": 0.1}, together={("Edema", "Pleural Effusion"): 0.5}, normal=0.0
    )
    counts, n = Counter(), 1500
    for index in range(n):
        names = {f.condition for f in phantom_study(0, index, 28, settings).truth}
        counts.update(names)
        counts["both"] += {"Edema", "Pleural Effusion"} <= names
    assert set(counts) - {"both"} == {"Edema", "Pneumothorax", "Pleural Effusion"}
    assert abs(counts["Edema"] / n - 0.3) < 0.04 and abs(counts["Pneumothorax"] / n - 0.1) < 0.03
    assert abs(counts["both"] / counts["Edema"] - 0.5) < 0.08 and counts["both"] == counts["Pleural Effusion"]
    rates = label_rates(settings)
    assert abs(rates["Edema"] - 0.3) < 0.03 and abs(rates["Lung Opacity"] - 0.3) < 0.03


def test_image_labels_close_upwards_and_no_finding_is_what_is_left():
    pneumonia = phantom_study(0, 0, 28, only("Pneumonia")).labels
    assert [k for k, v in pneumonia.items() if v] == ["Lung Opacity", "Consolidation", "Pneumonia"]
    devices = phantom_study(0, 0, 28, only("Support Devices")).labels
    assert devices["No Finding"] == 1 and devices["Support Devices"] == 1
    study = phantom_study(0, 0, 28, only("Edema"))
    assert study.labels["No Finding"] == 0 and study.without("Edema").labels["No Finding"] == 1


def test_shortcut_marker_follows_the_label():
    settings = PhantomSettings(shortcut=("Pleural Effusion", 0.9))
    agree = []
    for index in range(400):
        study = phantom_study(0, index, 28, settings)
        agree.append(study.shortcut == bool(study.labels["Pleural Effusion"]))
    assert 0.85 < np.mean(agree) < 0.95
    on = next(s for s in (phantom_study(0, i, 64, settings) for i in range(99)) if s.shortcut)
    off = phantom_study(0, on.index, 64)
    assert on.report == off.report
    changed = np.argwhere(on.image != off.image)
    assert len(changed) and changed[:, 0].min() > 50 and changed[:, 1].max() < 14  # lower left corner only


def test_lateral_view():
    study = phantom_study(0, 0, 96)
    assert study.lateral.shape == (96, 96) and study.lateral.dtype == np.uint8
    assert study.lateral.std() > 30 and not np.array_equal(study.lateral, study.image)
    assert np.array_equal(study.lateral, phantom_study(0, 0, 96).lateral)
    large = phantom_study(0, 16, 96, only("Pleural Effusion"))
    assert not np.array_equal(large.lateral, large.without("Pleural Effusion").lateral)


# ------------------------------------------------------------------------------------------------------------ reports


def naive_mentions(text):
    """
    A second, much simpler reading of a report: which conditions appear in a sentence without and with a word of denial
    or doubt.

    It knows nothing of the templates' own labels; it only knows CheXpert-like key words.
    """
    words = {
        "Cardiomegaly": r"cardiomegaly|heart|cardiac",
        "Pneumothorax": r"pneumothorax",
        "Pleural Effusion": r"effusion|pleural fluid",
        "Edema": r"edema",
        "Consolidation": r"consolidat",
        "Pneumonia": r"pneumonia",
        "Atelectasis": r"atelecta|collapse",
        "Lung Opacity": r"opacity|infiltrate",
        "Lung Lesion": r"nodule|\bmass\b",
        "Pleural Other": r"thickening",
        "Fracture": r"fracture",
        "Enlarged Cardiomediastinum": r"mediastin",
        "Support Devices": r"tube|catheter|pacemaker|\blines?\b in place|central line|lines or tubes",
    }
    denied = r"\bno\b|normal|unremarkable|negative for|free of|without focal|resolved"
    doubt = r"possible|may |cannot be excluded|questionable"
    rank, found = {None: 0, 0: 1, -1: 2, 1: 3}, dict.fromkeys(CONDITIONS)
    for sentence in re.split(r"(?<=[a-z])\.(?:\s|$)", text):
        s = sentence.lower().replace("right heart", "")
        value = 0 if re.search(denied, s) else -1 if re.search(doubt, s) else 1
        for name, pattern in words.items():
            if re.search(pattern, s) and rank[value] > rank[found[name]]:
                found[name] = value
    return found


def test_report_labels_agree_with_the_words():
    settings = PhantomSettings(uncertain=0.25, omitted=0.1, normal=0.2)
    for index in range(1200):
        study = phantom_study(4, index, 28, settings)
        read = naive_mentions(study.report.text)
        stated = {k: v for k, v in study.report_labels.items() if k != "No Finding"}
        # "There is a patchy opacity. This may represent pneumonia." is the one wording of two sentences.
        assert {k: v for k, v in read.items() if k != "No Finding"} == stated, study.report.text


def test_no_finding_needs_silence_about_all_others():
    for index in range(300):
        labels = phantom_study(8, index, 28).report_labels
        others = [v for k, v in labels.items() if k not in ("No Finding", "Support Devices")]
        assert labels["No Finding"] == (None if 1 in others or -1 in others else 1)


def test_reports_vary_and_say_all_four_things():
    texts, values = set(), defaultdict(set)
    for index in range(800):
        study = phantom_study(2, index, 28)
        texts.add(study.report.findings)
        for name, value in study.report_labels.items():
            values[name].add(value)
        if not study.settings.omitted:  # nothing that was drawn is denied or forgotten
            for finding in study.truth:
                assert study.report_labels[finding.condition] in (1, -1)
    assert len(texts) > 650
    for name in CONDITIONS:
        wanted = {1, None} if name == "No Finding" else {1, 0, None} if name == "Support Devices" else {1, 0, -1, None}
        assert values[name] == wanted, name


def test_omitted_findings_stay_in_the_truth():
    study = phantom_study(0, 0, 28, only("Pneumonia", omitted=1.0))
    assert study.labels["Pneumonia"] == 1 and study.report_labels["Pneumonia"] is None
    assert study.report_labels["No Finding"] == 1


def test_every_wording_can_be_filled_and_is_known_to_no_one_else():
    assert set(STATED) >= set(SUSPECTED) and set(STATED) >= set(UNCHANGED)
    sentences = [
        t[0] if isinstance(t, tuple) else t
        for table in (STATED, SUSPECTED, UNCHANGED)
        for ts in table.values()
        for t in ts
    ]
    assert len(sentences) == len(set(sentences)) and all(s.endswith(".") for s in sentences)
    assert set(DENIED) | set(LISTED) == set(CONDITIONS) - {"No Finding"}


# ---------------------------------------------------------------------------------------------------------- questions


def test_questions_have_paraphrases_and_regions():
    seen = Counter()
    for index in range(300):
        study = phantom_study(0, index, 224)
        for q in study.questions:
            seen[q.kind, q.content] += 1
            assert len({q.text, *(p.text for p in q.paraphrases)}) == len(q.paraphrases) + 1 >= 7
            assert any(p.strategy == "negation" for p in q.paraphrases)
            assert "{" not in q.text + q.answer + "".join(p.text + p.answer for p in q.paraphrases)
            if q.kind == "closed":
                assert q.answer in ("yes", "no") and any(p.answer != q.answer for p in q.paraphrases)
            if q.kind == "choice":
                assert q.answer in q.options
            if q.content in ("modality", "view", "normality"):
                assert q.region is None
            else:
                assert q.region and all(0 <= x0 < x1 <= 224 and 0 <= y0 < y1 <= 224 for x0, y0, x1, y1 in q.region)
            if q.content == "presence":
                assert (q.answer == "yes") == bool(study.labels[q.condition])
    assert {kind for kind, _ in seen} == {"closed", "choice", "open"}
    assert {content for _, content in seen} == {
        "presence",
        "side",
        "zone",
        "size",
        "abnormality",
        "device",
        "normality",
        "modality",
        "view",
    }


def text_only_accuracy(settings, n=900):
    """Closed questions answered by the most frequent answer to the same words among other patients."""
    votes, rows = defaultdict(Counter), []
    for index in range(n):
        study = phantom_study(0, index, 28, settings)
        for q in study.questions:
            if q.kind == "closed":
                if index < 0.6 * n:
                    votes[q.text][q.answer] += 1
                else:
                    rows.append(votes[q.text].most_common(1)[0][0] == q.answer if votes[q.text] else False)
    return np.mean(rows)


def test_a_model_that_cannot_see_stays_at_chance_unless_questions_are_guessable():
    assert text_only_accuracy(PhantomSettings()) < 0.58
    assert text_only_accuracy(PhantomSettings(guessable=1.0)) == 1.0
    assert 0.6 < text_only_accuracy(PhantomSettings(guessable=0.6)) < 0.85


def test_removing_the_finding_turns_the_answer():
    study = phantom_study(0, 0, 64, only("Pneumothorax"))
    asked = {
        q.text: q.answer
        for s in (study, study.without("Pneumothorax"))
        for q in s.questions
        if q.content == "normality"
    }
    assert study.labels["Pneumothorax"] == 1 and study.without("Pneumothorax").labels["Pneumothorax"] == 0
    assert set(asked.values()) <= {"yes", "no"}


# ------------------------------------------------------------------------------------------------------------ gallery


@pytest.mark.slow
def test_preview_as_a_process(tmp_path, capsys):
    from shared.phantom.__main__ import main as gallery

    command = [sys.executable, "-m", "shared.phantom", "--preview", "--out-dir", str(tmp_path), "--size", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"normal.png", "findings.png", "lateral.png", "reports.md"}
    with pytest.raises(SystemExit) as stop:
        gallery([])
    assert stop.value.code == 2 and "nothing to do" in capsys.readouterr().err
