"""
The phantom written in the file formats of the real datasets, so that the loaders of those can be tested on complete
data.

    from phantom_files import export_slake
    export_slake("data/phantom_slake", seed=0, counts={"train": 40, "validate": 8, "test": 8})

Layouts follow the official files as they are distributed, with the columns, key names and habits they have; facts that
come with them are noted at each function. Texts and numbers are those of the phantom. Every function returns the
folder it wrote.
"""

import csv
import io
import json
import tarfile
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from shared.phantom import DEFAULT, patient_of, phantom_classification, phantom_study

MASK_VALUES = {
    "right lung": 1,
    "left lung": 2,
    "heart": 3,
    "mediastinum": 4,
    "spine": 5,
}  # grey levels in SLAKE's mask.png
SLAKE_ORGANS = {
    "right lung": "Right Lung",
    "left lung": "Left Lung",
    "heart": "Heart",
    "mediastinum": "Mediastinum",
    "spine": "Spine",
}


def phantom_splits(seed, counts):
    """
    Study indices per split; no patient is in two splits. counts: {"train": n, ...} in studies, taken one split after
    the other.

    A patient whose further visits would be too many for a split loses them: the next split starts with the next
    patient.
    """
    splits, index = {}, 0
    for name, n in counts.items():
        chosen = []
        while len(chosen) < n:
            chosen.append(index)
            index += 1
        while index and patient_of(seed, index)[1] > 0:  # rest of the last patient
            index += 1
        splits[name] = chosen
    return splits


def export_medmnist(folder, seed=0, counts=None, size=28, flag="pneumoniamnist"):
    """
    One npz with the six MedMNIST arrays. Named like the official editions: flag.npz at 28 px, flag_64.npz and so on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"
    np.savez_compressed(folder / name, **phantom_classification(seed, counts, size))
    return folder


# -------------------------------------------------------------------------------------------------- IU X-ray (Open-i)

_MESH = {
    "Cardiomegaly": "Cardiomegaly",
    "Enlarged Cardiomediastinum": "Mediastinum/enlarged",
    "Pleural Effusion": "Pleural Effusion",
    "Pneumothorax": "Pneumothorax",
    "Consolidation": "Consolidation",
    "Pneumonia": "Pneumonia",
    "Lung Opacity": "Opacity",
    "Edema": "Pulmonary Edema",
    "Atelectasis": "Pulmonary Atelectasis",
    "Pleural Other": "Thickening/pleura",
    "Fracture": "Fractures, Bone",
}


def _mesh_terms(study):
    """
    Indexing terms as in the MeSH column: "Pleural Effusion/right/small". Indexers only note what the report states.
    """
    terms = []
    for f in study.truth:
        if study.report_labels[f.condition] != 1:
            continue
        head = _MESH.get(f.condition) or {"nodule": "Nodule", "mass": "Mass"}.get(f.kind)
        if head is None:
            head = {"pacemaker": "Implanted Medical Device", "chest tube": "Tube, Inserted"}.get(
                f.kind, "Catheters, Indwelling"
            )
        where = [] if f.side == "midline" else [f.side]
        if f.condition in ("Consolidation", "Pneumonia", "Lung Opacity", "Lung Lesion", "Atelectasis"):
            head = f"{head}/lung" if f.condition != "Pneumonia" else head
            where = [f"{f.zone} lobe" if f.zone != "mid" else "middle lobe", f.side]
        terms.append("/".join([head, *where, *([f.severity] if f.severity else [])]))
    return terms or ["normal"]


def _iu_xml(uid, study, names, terms):
    """One report file of the archive: the parts that loaders read, with the nesting of the real ones."""
    sections = (
        ("COMPARISON", study.report.comparison),
        ("INDICATION", study.report.indication),
        ("FINDINGS", study.report.findings),
        ("IMPRESSION", study.report.impression),
    )
    text = "\n".join(
        f'            <AbstractText Label="{label}">{escape(words)}</AbstractText>' for label, words in sections
    )
    mesh = "\n".join(f"      <major>{escape(term)}</major>" for term in terms)
    images = "\n".join(
        f"""   <parentImage id="CXR{name.removesuffix(".dcm.png")}">
      <figureId>F{i}</figureId>
      <caption>Xray Chest PA and Lateral</caption>
      <panel type="single"><url>/phantom/CXR{name.removesuffix(".dcm.png")}.jpg</url></panel>
   </parentImage>"""
        for i, name in enumerate(names, 1)
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{uid}"/>
   <pmcId id="{uid}"/>
   <docSource>CXR</docSource>
   <IUXRId id="{uid}"/>
   <licenseType>open-access</licenseType>
   <title>Phantom Chest X-ray Collection</title>
   <note>Made-up studies, no patient data.</note>
   <MedlineCitation Owner="phantom" Status="made up">
      <Article PubModel="Electronic">
         <Abstract>
{text}
         </Abstract>
         <Language>eng</Language>
      </Article>
   </MedlineCitation>
   <MeSH>
{mesh}
   </MeSH>
{images}
</eCitation>
"""


def export_iu_xray(folder, seed=0, count=60, size=256, settings=DEFAULT):
    """
    indiana_reports.csv, indiana_projections.csv, images_normalized/*.dcm.png, NLMCXR_reports.tgz
    (ecgen-radiology/N.xml).

    uid is a patient there (3,851 reports, as many patients), so only first visits are taken. Most studies have two
    views, some one.
    """
    folder = Path(folder)
    images = folder / "images_normalized"
    images.mkdir(parents=True, exist_ok=True)
    reports, projections, index, uid = [], [], -1, 0
    with tarfile.open(folder / "NLMCXR_reports.tgz", "w:gz") as archive:
        while uid < count:
            index += 1
            if patient_of(seed, index)[1] > 0:
                continue
            uid += 1
            study = phantom_study(seed, index, size, settings)
            terms = _mesh_terms(study)
            views = [("1001", "Frontal", study.image)]
            if uid % 8:
                views.append(("2001", "Lateral", study.lateral))
            names = []
            for number, projection, image in views:
                name = f"{uid}_IM-{index:04d}-{number}.dcm.png"
                Image.fromarray(image).save(images / name)
                projections.append([uid, name, projection])
                names.append(name)
            r = study.report
            problems = ";".join(dict.fromkeys(term.split("/")[0] for term in terms))
            reports.append(
                [
                    uid,
                    ";".join(terms),
                    problems,
                    "Xray Chest PA and Lateral",
                    r.indication,
                    r.comparison,
                    r.findings,
                    r.impression,
                ]
            )
            data = _iu_xml(uid, study, names, terms).encode()
            entry = tarfile.TarInfo(f"ecgen-radiology/{uid}.xml")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    header = ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"]
    _write_csv(folder / "indiana_reports.csv", header, reports)
    _write_csv(folder / "indiana_projections.csv", ["uid", "filename", "projection"], projections)
    return folder


def _write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------------------------ VQA-RAD

_RAD_TYPES = {
    "presence": "PRES",
    "side": "POS",
    "zone": "POS",
    "size": "SIZE",
    "abnormality": "ABN",
    "device": "PRES",
    "normality": "ABN",
    "modality": "MODALITY",
    "view": "PLANE",
}


def export_vqa_rad(folder, seed=0, count=40, size=256, settings=DEFAULT):
    """
    "VQA_RAD Dataset Public.json" (phrase types freeform, para, test_freeform, test_para), trainset.json, testset.json,
    images/synpic*.jpg.

    As in the real set, train and test questions share their images, and trainset.json also holds "frame" rows: the
    questions in a stock wording, those of test questions included. A few of its quirks are repeated: an answer that is
    a number, a "CLOSED " with a space. Every fifth question is a test question.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    public, train, test = [], [], []
    qid = 0
    for index in range(count):
        study = phantom_study(seed, index, size, settings)
        name = f"synpic{10000 + index}.jpg"
        Image.fromarray(study.image).convert("RGB").save(images / name, quality=92)
        for question in study.questions:
            in_test = qid % 5 == 4
            other = next(p for p in question.paraphrases if p.answer == question.answer)
            frame = question.paraphrases[1].text
            link = f"{seed:08x}-phantom-{qid:06d}"
            for place, text in enumerate((question.text, other.text)):
                phrase = ("test_" if in_test else "") + ("freeform" if place == 0 else "para")
                answer = "X-ray" if question.answer == "x-ray" else question.answer.capitalize()
                kind = "OPEN" if question.kind == "open" else "CLOSED"
                row = {
                    "qid": str(qid),
                    "phrase_type": phrase,
                    "qid_linked_id": link,
                    "image_case_url": "https://example.org/phantom",
                    "image_name": name,
                    "image_organ": "CHEST",
                    "evaluation": "evaluated",
                    "question": text,
                    "question_rephrase": other.text if place == 0 else question.text,
                    "question_relation": "strict agreement",
                    "question_frame": frame,
                    "question_type": _RAD_TYPES[question.content],
                    "answer": answer,
                    "answer_type": kind,
                }
                public.append(row)
                short = {
                    k: row[k]
                    for k in (
                        "qid",
                        "image_name",
                        "image_organ",
                        "answer",
                        "answer_type",
                        "question_type",
                        "question",
                        "phrase_type",
                    )
                }
                short["qid"] = qid
                (test if in_test else train).append(short)
                if place == 0:
                    train.append({**short, "question": frame, "phrase_type": "frame"})
            qid += 1
    closed = [row for row in public if row["answer_type"] == "CLOSED"]
    closed[-1]["answer_type"] = "CLOSED "
    numbered = {
        **public[0],
        "qid": qid,
        "question": "How many lungs are shown?",
        "question_rephrase": "NULL",
        "question_frame": "NULL",
        "question_type": "COUNT",
        "answer": 2,
        "answer_type": "OPEN",
        "phrase_type": "freeform",
    }
    public.append(numbered)
    train.append({k: numbered[k] for k in train[0]})
    for filename, rows in (("VQA_RAD Dataset Public.json", public), ("trainset.json", train), ("testset.json", test)):
        (folder / filename).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder


# -------------------------------------------------------------------------------------------------------------- SLAKE

_SLAKE_TYPES = {
    "presence": "Abnormality",
    "side": "Position",
    "zone": "Position",
    "size": "Size",
    "abnormality": "Abnormality",
    "device": "Organ",
    "normality": "Abnormality",
    "modality": "Modality",
    "view": "Plane",
}


def export_slake(folder, seed=0, counts=None, size=256, settings=DEFAULT):
    """
    train.json, validate.json, test.json; imgs/xmlabN/ with source.jpg, mask.png, detection.json; mask.txt.

    detection.json is a list of one-key dicts {organ: [x, y, width, height]} in pixels; mask.png holds the grey levels
    of MASK_VALUES (written in mask.txt). Splits share no patient. Each image has one Chinese question too, and two
    that need knowledge and no image (base_type "kvqa"), as in the real set. Answers are capitalised as there.
    """
    folder = Path(folder)
    counts = {"train": 40, "validate": 8, "test": 8} if counts is None else counts
    qid, number = 0, 0
    for split, indices in phantom_splits(seed, counts).items():
        rows = []
        for index in indices:
            study = phantom_study(seed, index, size, settings)
            number += 1
            place = folder / "imgs" / f"xmlab{number}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(study.image).convert("RGB").save(place / "source.jpg", quality=95)
            mask = np.zeros((size, size), np.uint8)
            boxes = []
            for organ in ("spine", "mediastinum", "heart", "right lung", "left lung"):  # later ones lie on top
                mask[study.organ_masks[organ]] = MASK_VALUES[organ]
                x0, y0, x1, y1 = study.organ_boxes[organ]
                boxes.append({SLAKE_ORGANS[organ]: [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]})
            Image.fromarray(mask).save(place / "mask.png")
            (place / "detection.json").write_text(json.dumps(boxes))
            asked = []
            for question in study.questions:
                answer = "X-Ray" if question.answer == "x-ray" else question.answer.capitalize()
                asked.append(
                    (
                        question.text,
                        answer,
                        "OPEN" if question.kind == "open" else "CLOSED",
                        _SLAKE_TYPES[question.content],
                    )
                )
            large = "Yes" if study.labels["Cardiomegaly"] else "No"
            asked += [
                ("Is the heart larger than normal?", large, "CLOSED", "Size"),
                ("Which organ lies between the lungs?", "Heart", "OPEN", "Organ"),
                ("What is the effect of the main organ in this picture?", "Breathe", "OPEN", "KG"),
                ("Does the heart belong to the circulatory system?", "Yes", "CLOSED", "KG"),
                ("这张图片的成像方式是什么?", "X-Ray", "OPEN", "Modality"),
            ]
            for text, answer, kind, content in asked:
                knowledge = content == "KG"
                rows.append(
                    {
                        "img_id": number,
                        "img_name": f"xmlab{number}/source.jpg",
                        "question": text,
                        "answer": answer,
                        "q_lang": "en" if text.isascii() else "zh",
                        "location": "Lung",
                        "modality": "X-Ray",
                        "answer_type": kind,
                        "base_type": "kvqa" if knowledge else "vqa",
                        "content_type": content,
                        "triple": (
                            ["vhead", "effect" if kind == "OPEN" else "system", "ktail"]
                            if knowledge
                            else ["vhead", "_", "_"]
                        ),
                        "qid": qid,
                    }
                )
                qid += 1
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "mask.txt").write_text(
        "".join(f"{SLAKE_ORGANS[organ]}:{value}\n" for organ, value in MASK_VALUES.items())
    )
    return folder
