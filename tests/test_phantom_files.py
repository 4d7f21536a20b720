"""The phantom in the file formats of the real sets: names, columns, splits and habits."""

import csv
import json
import tarfile
import xml.etree.ElementTree as ElementTree

import numpy as np
from PIL import Image

from phantom_files import MASK_VALUES, SLAKE_ORGANS, export_iu_xray, export_medmnist, export_slake, export_vqa_rad
from phantom_files import phantom_splits
from shared.phantom import patient_of, phantom_classification, phantom_study


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_splits_share_no_patient():
    splits = phantom_splits(0, {"train": 50, "val": 11, "test": 13})
    assert [len(v) for v in splits.values()] == [50, 11, 13]
    patients = [{patient_of(0, i)[0] for i in indices} for indices in splits.values()]
    assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])


def test_medmnist_file(tmp_path):
    export_medmnist(tmp_path, seed=1, counts={"train": 12, "val": 3, "test": 4})
    with np.load(tmp_path / "pneumoniamnist.npz") as data:
        assert set(data) == {f"{s}_{k}" for s in ("train", "val", "test") for k in ("images", "labels")}
        assert data["train_images"].shape == (12, 28, 28) and data["test_labels"].shape == (4, 1)
        assert np.array_equal(data["val_images"], phantom_classification(1, {"val": 3})["val_images"])
    export_medmnist(tmp_path, counts={"train": 2, "val": 1, "test": 1}, size=64)
    with np.load(tmp_path / "pneumoniamnist_64.npz") as data:
        assert data["train_images"].shape == (2, 64, 64)


def test_iu_xray_files_agree_with_each_other(tmp_path):
    export_iu_xray(tmp_path, seed=0, count=20, size=64)
    reports, projections = read_csv(tmp_path / "indiana_reports.csv"), read_csv(tmp_path / "indiana_projections.csv")
    assert list(reports[0]) == [
        "uid",
        "MeSH",
        "Problems",
        "image",
        "indication",
        "comparison",
        "findings",
        "impression",
    ]
    assert list(projections[0]) == ["uid", "filename", "projection"]
    assert [r["uid"] for r in reports] == [str(i) for i in range(1, 21)]
    files = {p.name for p in (tmp_path / "images_normalized").iterdir()}
    assert files == {p["filename"] for p in projections} and all(name.endswith(".dcm.png") for name in files)
    views = [p["projection"] for p in projections]
    assert views.count("Frontal") == 20 and 15 <= views.count("Lateral") < 20
    assert any(r["Problems"] == "normal" for r in reports) and any(r["Problems"] != "normal" for r in reports)
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz") as archive:
        assert len(archive.getnames()) == 20
        root = ElementTree.parse(archive.extractfile("ecgen-radiology/3.xml")).getroot()
    parts = {e.get("Label"): e.text for e in root.iter("AbstractText")}
    row = reports[2]
    assert parts == {k.upper(): row[k] for k in ("comparison", "indication", "findings", "impression")}
    assert root.find("uId").get("id") == "CXR3"
    assert ";".join(e.text for e in root.iter("major")) == row["MeSH"]
    names = {f"{e.get('id')[3:]}.dcm.png" for e in root.iter("parentImage")}
    assert names == {p["filename"] for p in projections if p["uid"] == "3"}


def test_vqa_rad_has_the_official_columns_and_habits(tmp_path):
    export_vqa_rad(tmp_path, seed=0, count=12, size=64)
    public, train, test = (
        json.loads((tmp_path / name).read_text(encoding="utf-8"))
        for name in ("VQA_RAD Dataset Public.json", "trainset.json", "testset.json")
    )
    assert set(public[0]) == {
        *("qid", "phrase_type", "qid_linked_id", "image_case_url", "image_name", "image_organ", "evaluation"),
        *("question", "question_rephrase", "question_relation", "question_frame", "question_type", "answer"),
        "answer_type",
    }
    assert (
        set(train[0])
        == set(test[0])
        == {*("qid", "image_name", "image_organ", "answer", "answer_type", "question_type", "question", "phrase_type")}
    )
    assert {r["phrase_type"] for r in public} == {"freeform", "para", "test_freeform", "test_para"}
    held_out = [r for r in public if r["phrase_type"].startswith("test_")]
    assert [(r["question"], r["answer"]) for r in held_out] == [(r["question"], r["answer"]) for r in test]
    assert {r["phrase_type"] for r in train} == {"freeform", "para", "frame"}
    frames = {r["question"] for r in train if r["phrase_type"] == "frame"}
    assert all(r["question_frame"] in frames for r in held_out)  # the leak of the real file
    assert {r["image_name"] for r in test} <= {r["image_name"] for r in train}  # and the other one
    assert any(isinstance(r["answer"], int) for r in public) and any(r["answer_type"] == "CLOSED " for r in public)
    for r in public:
        assert (tmp_path / "images" / r["image_name"]).exists()


def test_slake_boxes_masks_and_splits(tmp_path):
    counts = {"train": 10, "validate": 3, "test": 4}
    export_slake(tmp_path, seed=0, counts=counts, size=96)
    seen, qids, indices = set(), [], phantom_splits(0, counts)
    for split, n in counts.items():
        rows = json.loads((tmp_path / f"{split}.json").read_text(encoding="utf-8"))
        images = {r["img_name"] for r in rows}
        assert len(images) == n and not images & seen
        seen |= images
        qids += [r["qid"] for r in rows]
        assert {r["q_lang"] for r in rows} == {"en", "zh"} and {r["base_type"] for r in rows} == {"vqa", "kvqa"}
        assert {r["answer_type"] for r in rows} == {"OPEN", "CLOSED"}
        assert all(r["answer"][0].isupper() for r in rows if r["q_lang"] == "en")
    assert len(qids) == len(set(qids))
    assert [p.name for p in (tmp_path / "imgs").iterdir() if not (p / "source.jpg").exists()] == []
    folder = tmp_path / "imgs" / "xmlab1"
    study = phantom_study(0, indices["train"][0], 96)
    mask = np.asarray(Image.open(folder / "mask.png"))
    boxes = json.loads((folder / "detection.json").read_text())
    assert mask.shape == (96, 96) and set(np.unique(mask)) == {0, *MASK_VALUES.values()}
    for entry in boxes:
        ((organ, (x, y, w, h)),) = entry.items()
        name = next(k for k, v in SLAKE_ORGANS.items() if v == organ)
        assert [x, y, x + w, y + h] == study.organ_boxes[name]
    lung = mask == MASK_VALUES["left lung"]
    assert (lung & study.organ_masks["left lung"]).sum() >= 0.98 * lung.sum()
