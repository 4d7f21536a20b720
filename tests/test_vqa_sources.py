"""
vqa.py: made-up questions with every quirk of the real files, the phantom in both formats, and the real files with their
counts.
"""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from shared.data.audit import plain_text, repeats, seen, shared_between_splits, shared_values
from shared.data.__main__ import main as audit_main
from shared.runtime import DataNotFound, InputError
from vqa_sft_grpo.leaks import audit_slake, audit_vqa_rad, conflicts, frames_in, reworded, word_overlap
from vqa_sft_grpo.sources import files_in, mask_names, read_rows
from vqa_sft_grpo.sources import PUBLIC, boxes_in, load_slake, load_vqa_rad, make_row, read_boxes, read_mask


def rad(qid, image, question, answer, split="freeform", kind="CLOSED", type_="PRES", frame="NULL", linked=None):
    return {
        "qid": qid,
        "phrase_type": split,
        "qid_linked_id": linked or f"link{qid}",
        "image_case_url": f"case{image}",
        "image_name": f"synpic{image}.jpg",
        "image_organ": "CHEST",
        "question": question,
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": frame,
        "question_type": type_,
        "answer": answer,
        "answer_type": kind,
    }


RAD = [
    rad("0", 1, "Is there a nodule? ", "Yes", frame="Does the image show a nodule?"),
    rad(1, 1, "Is a nodule there?", "yes", "para", kind="CLOSED "),
    rad(2, 1, "Is there a mass?", "no", "test_freeform", frame="Does the image show a mass?", type_="PRSE"),
    rad(3, 2, "How many ribs?", 12, kind="OPEN", type_="COUNT"),
    rad(4, 2, "Where is the tube?", "left lung", "test_para", kind="OPEN", type_="PRES, ATRIB"),
    rad(5, 3, "Is the heart large?", "No", type_="ATTRIB, PRES"),
    rad(6, 4, "Is it an x-ray?", "Yes", type_="Other"),
]
RAD[1].pop("question_rephrase")  # two real rows lack it


def short(row, **changes):
    row = {
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
    } | changes
    return row | {"phrase_type": row["phrase_type"].removeprefix("test_")}


@pytest.fixture
def rad_dir(tmp_path):
    folder = tmp_path / "data" / "vqa_rad"
    (folder / "images").mkdir(parents=True)
    for i in range(1, 5):
        noise = Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 9), dtype=np.uint8))
        noise.resize((96, 128), Image.BICUBIC).save(folder / "images" / f"synpic{i}.jpg")  # smooth, as images are
    frames = [
        short(row, qid=100 + i, question=row["question_frame"], phrase_type="frame")
        for i, row in enumerate(RAD)
        if row["question_frame"] != "NULL"
    ]
    test = [row["phrase_type"].startswith("test_") for row in RAD]
    (folder / PUBLIC).write_text(json.dumps(RAD))
    (folder / "trainset.json").write_text(
        json.dumps([short(row) for row, t in zip(RAD, test, strict=True) if not t] + frames)
    )
    (folder / "testset.json").write_text(json.dumps([short(row) for row, t in zip(RAD, test, strict=True) if t]))
    return tmp_path / "data"


def slake(qid, image, question, answer, lang="en", kind="CLOSED", base="vqa", content="Organ"):
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": question,
        "answer": answer,
        "q_lang": lang,
        "location": "Lung",
        "modality": "CT",
        "answer_type": kind,
        "base_type": base,
        "content_type": content,
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    }


@pytest.fixture
def slake_dir(tmp_path):
    """Images 1 (train), 2 (validate), 3 (test) of 100 x 80 pixels; the Chinese question on image 3 is in train."""
    folder = tmp_path / "data" / "slake"
    files = {
        "train": [
            slake(0, 1, "Is this a CT?", "Yes"),
            slake(1, 1, "is this a CT", "yes"),
            slake(2, 3, "这是CT吗?", "是", "zh"),
        ],
        "validate": [
            slake(3, 2, "Which organ is it?", "Lung", kind="OPEN"),
            slake(4, 2, "这是什么?", "肺", "zh", "OPEN"),
        ],
        "test": [
            slake(5, 3, "Is this a CT?", "No"),
            slake(6, 3, "What does it do?", "Breathe", kind="OPEN", base="kvqa", content="KG"),
            slake(7, 1, "这是肺吗?", "是", "zh"),
        ],
    }
    for i in (1, 2, 3):
        (folder / "imgs" / f"xmlab{i}").mkdir(parents=True)
        Image.new("L", (100, 80), 40 * i).save(folder / "imgs" / f"xmlab{i}" / "source.jpg")
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return tmp_path / "data"


def detection(data_dir, number, value):
    (data_dir / "slake" / "imgs" / f"xmlab{number}" / "detection.json").write_text(
        value if isinstance(value, str) else json.dumps(value)
    )


NOTHING = {"no question": 0, "no answer": 0, "image missing": 0}  # left out


def qids(rows):
    return [row["qid"] for row in rows]


# -------------------------------------------------------------------------------------------------------------- VQA-RAD


def test_rad_rows(rad_dir):
    public, files = load_vqa_rad(rad_dir, "public"), load_vqa_rad(rad_dir)
    assert (
        public.counts() == {"train": 5, "test": 2}
        and files.counts() == {"train": 7, "test": 2}
        and "version files" in files.version
    )
    rows = {row["qid"]: row for row in public.rows}
    assert rows[0] == make_row(
        dataset="vqa_rad",
        split="train",
        qid=0,
        image_id="synpic1.jpg",
        image_path=rad_dir / "vqa_rad" / "images" / "synpic1.jpg",
        image_group="synpic1.jpg",
        question="Is there a nodule?",
        answer="Yes",
        answer_type="closed",
        question_type="PRES",
        question_type_raw="PRES",
        phrase_type="freeform",
        organ="CHEST",
        language="en",
        question_frame="Does the image show a nodule?",
        linked_id="link0",
        case="case1",
    )
    assert (
        rows[1]["answer_type"] == "closed"
        and rows[1]["question_rephrase"] is None
        and rows[1]["question_frame"] is None
    )
    assert rows[3]["answer"] == "12" and rows[3]["answer_type"] == "open"
    assert [rows[i]["question_type"] for i in (2, 4, 5, 6)] == ["PRES", "ATTRIB+PRES", "ATTRIB+PRES", "OTHER"] and rows[
        4
    ]["question_type_raw"] == "PRES, ATRIB"
    assert [rows[i]["phrase_type"] for i in (1, 2, 4)] == ["para", "freeform", "para"] and rows[2]["split"] == rows[4][
        "split"
    ] == "test"
    assert qids(files.split("test")) == [2, 4] and files.rows[0].keys() == public.rows[0].keys()
    assert not files.official and json.dumps(files.facts())


def test_rad_policies(rad_dir):
    def load(policy, **settings):
        return load_vqa_rad(rad_dir, policy=policy, **settings)

    assert qids(load("official").split("train")) == [0, 1, 3, 5, 6, 100, 102]
    some = load("no_test_frames")
    assert qids(some.split("train")) == [0, 1, 3, 5, 6, 100] and some.left_out["frame row of a test question"] == 1
    assert qids(load("no_frames").split("train")) == [0, 1, 3, 5, 6]
    assert qids(load("clean_train").split("train")) == [5, 6] and qids(load("clean_train").split("test")) == [2, 4]
    apart = load("image_disjoint", shares={"train": 0.5, "val": 0.25, "test": 0.25})
    assert (
        len(apart.rows) == 9
        and all(pair["shared"] == 0 for pair in shared_between_splits(apart.rows).values())
        and set(apart.counts()) == {"train", "val", "test"}
    )
    with pytest.raises(InputError, match="there is no policy 'strict'"):
        load("strict")
    (rad_dir / "vqa_rad" / PUBLIC).unlink()
    with pytest.raises(InputError, match="Public.json cannot be read"):
        load("no_test_frames")


def test_rad_image_disjoint_keeps_copies_together(rad_dir):
    folder = rad_dir / "vqa_rad" / "images"
    with Image.open(folder / "synpic1.jpg") as image:
        image.resize((60, 80)).save(folder / "synpic4.jpg", quality=80)  # image 4 is now a small copy of image 1
    for seed in range(6):
        questions = load_vqa_rad(
            rad_dir, policy="image_disjoint", shares={"train": 0.4, "val": 0.3, "test": 0.3}, seed=seed
        )
        assert questions.notes["clusters of near-identical images"] == [["synpic1.jpg", "synpic4.jpg"]]
        split = {row["image_id"]: row["split"] for row in questions.rows}
        assert split["synpic1.jpg"] == split["synpic4.jpg"] and len(set(split.values())) == 3


def test_rad_validation_rows_are_whole_images(rad_dir):
    questions = load_vqa_rad(rad_dir, "public", val_share=0.25)
    assert {row["image_id"] for row in questions.split("val")} == {"synpic4.jpg"} and questions.counts() == {
        "train": 4,
        "val": 1,
        "test": 2,
    }
    assert (
        shared_values(questions.split("train"), questions.split("val"))["shared"] == 0
        and "val 0.25" in questions.version
    )
    assert load_vqa_rad(rad_dir, "public", val_share=0.25).rows == questions.rows


def test_rad_missing_images(rad_dir):
    folder = rad_dir / "vqa_rad" / "images"
    (folder / "synpic1.jpg").unlink()
    questions = load_vqa_rad(rad_dir, "public")
    assert questions.left_out == NOTHING | {"image missing": 3} and qids(questions.rows) == [3, 4, 5, 6]
    every = load_vqa_rad(rad_dir, "public", allow_missing_images=True)
    assert len(every.rows) == 7 and every.rows[0]["image_path"] is None
    assert (
        load_vqa_rad(
            rad_dir,
            policy="image_disjoint",
            shares={"train": 0.5, "val": 0.25, "test": 0.25},
            allow_missing_images=True,
        ).counts()["train"]
        > 0
    )
    folder.rename(folder.with_name("VQA_RAD Image Folder"))  # the name in the published archive
    assert len(load_vqa_rad(rad_dir, "public").rows) == 4
    for path in folder.with_name("VQA_RAD Image Folder").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="none of the 7 questions has its image"):
        load_vqa_rad(rad_dir, "public")


def test_rad_refusals(rad_dir, tmp_path):
    with pytest.raises(DataNotFound, match="https://osf.io/89kps/ and put the files into that folder"):
        load_vqa_rad(tmp_path / "none")
    with pytest.raises(InputError, match="there is no version 'hf'"):
        load_vqa_rad(rad_dir, "hf")
    path = rad_dir / "vqa_rad" / PUBLIC
    for rows, message in [
        ({}, "must hold a list of rows"),
        ([*RAD, {"qid": 9}], "row 7 lacks image_name"),
        ([{**RAD[0], "answer_type": "MAYBE"}], "it must be OPEN or CLOSED"),
        ([{**RAD[0], "qid": "nine"}], "it must be a whole number"),
        (RAD[:1], "no test question"),
    ]:
        path.write_text(json.dumps(rows))
        with pytest.raises(InputError, match=message):
            load_vqa_rad(rad_dir, "public")
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_vqa_rad(rad_dir, "public")
    (rad_dir / "vqa_rad" / "testset.json").unlink()
    with pytest.raises(
        InputError, match="cannot be read as JSON"
    ):  # "auto" now takes the public file, and that is broken
        load_vqa_rad(rad_dir)


def rewrite(path, change, encoding="utf-8"):
    rows = [change(dict(row)) for row in json.loads(path.read_text(encoding="utf-8-sig"))]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)


@pytest.mark.parametrize(
    "answer, gold",
    [
        (True, "yes"),
        (False, "no"),
        (["left", "right"], "left, right"),
        ("None", "None"),
        (2.0, "2"),
        *((blank, None) for blank in (None, "", "  ", "nan", "N/A", "-", ".", "XXXX", [], float("nan"))),
    ],
    ids=repr,
)
def test_gold_answers_are_what_the_file_means(rad_dir, slake_dir, answer, gold):
    rewrite(rad_dir / "vqa_rad" / PUBLIC, lambda row: row | ({"answer": answer} if str(row["qid"]) == "3" else {}))
    rewrite(slake_dir / "slake" / "validate.json", lambda row: row | {"answer": answer})
    for found, qid in ((load_vqa_rad(rad_dir, "public"), 3), (load_slake(slake_dir), 3)):
        answers = {row["qid"]: row["answer"] for row in found.rows}
        assert answers.get(qid) == gold and found.left_out["no answer"] == (gold is None)


def test_answers_and_names_of_wrong_types_are_refused(rad_dir, slake_dir):
    rewrite(rad_dir / "vqa_rad" / PUBLIC, lambda row: row | {"answer": {"text": "yes"}})
    with pytest.raises(InputError, match="a text was expected"):
        load_vqa_rad(rad_dir, "public")
    for name in ({"a": 1}, None, [], "", "."):
        rewrite(slake_dir / "slake" / "test.json", lambda row, name=name: row | {"img_name": name})
        with pytest.raises(InputError, match="img_name|a text was expected"):
            load_slake(slake_dir)
    for change in ({"img_name": 5}, {"img_name": ["a", "b"]}):
        rewrite(slake_dir / "slake" / "test.json", lambda row, change=change: row | change)
        assert load_slake(slake_dir).left_out["image missing"] == 2
    rewrite(
        slake_dir / "slake" / "test.json",
        lambda row: row | {"answer": None, "img_name": "xmlab3/source.jpg", "triple": 3},
    )
    assert load_slake(slake_dir).left_out["no answer"] == 2


@pytest.mark.parametrize(
    "name", ["../../secret/source.jpg", "..\\source.jpg", "/etc/source.jpg", "C:\\x\\source.jpg", "a//b"]
)
def test_slake_names_that_leave_the_folder_are_refused(slake_dir, name):
    rewrite(slake_dir / "slake" / "train.json", lambda row: row | {"img_name": name})
    with pytest.raises(InputError, match="must be the path of an image below imgs/"):
        load_slake(slake_dir)


def test_files_with_a_byte_order_mark(rad_dir, slake_dir):
    expected = [load_vqa_rad(rad_dir).rows, load_vqa_rad(rad_dir, "public").rows, load_slake(slake_dir).rows]
    for path in (*(rad_dir / "vqa_rad").glob("*.json"), *(slake_dir / "slake").glob("*.json")):
        rewrite(path, lambda row: row, encoding="utf-8-sig")
    detection(slake_dir, 1, "\ufeff[]")
    found = [load_vqa_rad(rad_dir).rows, load_vqa_rad(rad_dir, "public").rows, load_slake(slake_dir).rows]
    assert found[:2] == expected[:2] and qids(found[2]) == qids(expected[2]) and found[2][0]["boxes"] == []


def test_rad_takes_the_folder_that_holds_the_images(rad_dir):
    folder = rad_dir / "vqa_rad"
    (folder / "images").rename(folder / "VQA_RAD Image Folder")
    (folder / "images").mkdir()
    (folder / "images" / "readme.txt").write_text("put the images here")
    assert load_vqa_rad(rad_dir).left_out == NOTHING
    (folder / "VQA_RAD Image Folder" / "synpic1.jpg").rename(folder / "images" / "synpic1.jpg")
    assert {row["image_path"].parent.name for row in load_vqa_rad(rad_dir).rows} == {"VQA_RAD Image Folder"}


def test_files_copied_through_windows(rad_dir, slake_dir):
    for path in list(rad_dir.rglob("*.jpg")):  # of both sets
        path.rename(path.with_name(path.name.upper()))
    assert load_vqa_rad(rad_dir).left_out == load_slake(slake_dir).left_out == NOTHING
    for change in ("D:\\data\\VQA_RAD Image Folder\\{}", "images/{}", "images\\{}"):
        rewrite(
            rad_dir / "vqa_rad" / "testset.json",
            lambda row, c=change: row | {"image_name": c.format(row["image_name"].split("\\")[-1].split("/")[-1])},
        )
        rows = load_vqa_rad(rad_dir).rows
        assert {row["image_id"] for row in rows} == {f"synpic{i}.jpg" for i in range(1, 5)}
    for change in ("xmlab{}\\source.jpg", "D:\\Slake1.0\\imgs\\xmlab{}\\source.jpg", "/data/imgs/xmlab{}/source.jpg"):
        rewrite(slake_dir / "slake" / "test.json", lambda row, c=change: row | {"img_name": c.format(row["img_id"])})
        assert {row["image_id"] for row in load_slake(slake_dir).split("test")} == {"xmlab3/source.jpg"}


def test_slake_languages_in_any_case(slake_dir):
    for name in ("train", "validate", "test"):
        rewrite(slake_dir / "slake" / f"{name}.json", lambda row: row | {"q_lang": f"{row['q_lang'].upper()} "})
    assert qids(load_slake(slake_dir).rows) == [0, 1, 3, 5, 6] and qids(load_slake(slake_dir, "zh").rows) == [2, 4, 7]
    for name in ("train", "validate", "test"):
        rewrite(slake_dir / "slake" / f"{name}.json", lambda row: row | {"q_lang": "fr"})
    with pytest.raises(InputError, match="no question whose q_lang is en"):
        load_slake(slake_dir)


def test_slake_is_known_by_its_content(slake_dir, tmp_path):
    """prepare_data.py writes a train.json as well."""
    (slake_dir / "train.json").write_text('[{"id": 1, "image": "a.png", "question": "?", "answer": "yes"}]')
    assert len(load_slake(slake_dir).rows) == 5
    (slake_dir / "slake").rename(tmp_path / "elsewhere")
    with pytest.raises(DataNotFound, match="SLAKE is not in"):
        load_slake(slake_dir)


def test_rad_audit(rad_dir):
    found = audit_vqa_rad(rad_dir, hash_images=True)
    assert found["images in two splits"]["train, test"] == {
        "a": 4,
        "b": 2,
        "shared": 2,
        "ids": ["synpic1.jpg", "synpic2.jpg"],
    }
    assert found["test questions whose stock wording is in train"] == {"rows": 1, "of": 2, "ids": [2]}
    assert found["test rows with the same image, question and answer in train"]["rows"] == 0
    assert found["images"]["images"] == 4 and found["images"]["similar"] == []


# ---------------------------------------------------------------------------------------------------------------- SLAKE


def test_slake_rows(slake_dir):
    english = load_slake(slake_dir)
    assert english.counts() == {"train": 2, "val": 1, "test": 2} and qids(english.rows) == [0, 1, 3, 5, 6]
    row = english.rows[4]
    assert (row["image_id"], row["image_group"], row["question_type"], row["answer_type"], row["needs_image"]) == (
        "xmlab3/source.jpg",
        "xmlab3/source.jpg",
        "KG",
        "open",
        False,
    )
    assert (row["organ"], row["modality"], row["language"], row["boxes"], row["mask_path"]) == (
        "Lung",
        "CT",
        "en",
        None,
        None,
    )
    assert english.rows[0].keys() == make_row().keys() and english.rows[0]["needs_image"]
    assert qids(load_slake(slake_dir, "zh").rows) == [2, 4, 7] and len(load_slake(slake_dir, None).rows) == 8
    (slake_dir / "slake" / "validate.json").rename(slake_dir / "slake" / "validation.json")
    assert qids(load_slake(slake_dir).split("val")) == [3]


def test_slake_missing_images(slake_dir, tmp_path):
    (slake_dir / "slake" / "imgs" / "xmlab3" / "source.jpg").unlink()
    english = load_slake(slake_dir)
    assert english.left_out == NOTHING | {"image missing": 2} and english.counts() == {"train": 2, "val": 1}
    assert len(load_slake(slake_dir, allow_missing_images=True).rows) == 5
    with pytest.raises(DataNotFound, match="med-vqa.com"):
        load_slake(tmp_path / "none")
    with pytest.raises(InputError, match="languages en and zh"):
        load_slake(slake_dir, "de")
    (slake_dir / "slake" / "imgs").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="none of the 5 questions has its image"):
        load_slake(slake_dir)


def test_slake_boxes(slake_dir):
    detection(slake_dir, 1, [{"Left Lung": [10, 20, 60, 50]}, {"Heart": [5.5, 6, 20, 20]}, {"Heart": [0, 0, 4, 4]}])
    detection(slake_dir, 2, [])
    english = load_slake(slake_dir)
    assert english.rows[0]["boxes"] == [
        {"organ": "Left Lung", "box": [10, 20, 70, 70]},
        {"organ": "Heart", "box": [5.5, 6, 25.5, 26]},
        {"organ": "Heart", "box": [0, 0, 4, 4]},
    ]
    assert english.split("val")[0]["boxes"] == [] and english.split("test")[0]["boxes"] is None
    assert english.notes == {
        "detection files": 2,
        "boxes read as": "xywh",
        "boxes beyond their image": 0,
        "boxes without area": 0,
        "unusable": [],
    }


def test_slake_corners_are_noticed_by_the_image_size(slake_dir):
    detection(slake_dir, 1, {"Left Lung": [10, 20, 30, 40]})  # fits both readings
    detection(
        slake_dir, 2, {"Lung": [[50, 40, 99, 79], [10, 10, 30, 70]]}
    )  # 50 + 99 is beyond the 100 pixels: corners, in all files
    english = load_slake(slake_dir)
    assert english.notes["boxes read as"] == "xyxy"
    assert english.rows[0]["boxes"] == [{"organ": "Left Lung", "box": [10, 20, 30, 40]}]
    assert [box["box"] for box in english.split("val")[0]["boxes"]] == [[50, 40, 99, 79], [10, 10, 30, 70]]


def test_slake_odd_detections_are_counted(slake_dir):
    detection(
        slake_dir, 1, {"Lung": [60, 50, 100, 20], "Liver": [90, 5, 0, 5]}
    )  # fits neither way: cut at the image's edge
    detection(slake_dir, 2, '[{"Lung": [1, 2, 3]}]')
    detection(slake_dir, 3, "{")
    english = load_slake(slake_dir)
    assert english.rows[0]["boxes"] == [{"organ": "Lung", "box": [60, 50, 100, 70]}]
    assert english.notes["boxes beyond their image"] == 2 and english.notes["boxes without area"] == 1
    assert (
        english.notes["unusable"] == ["xmlab2/source.jpg", "xmlab3/source.jpg"]
        and english.split("val")[0]["boxes"] is None
    )
    for bad in ("text", [1], {"Lung": None}, {"Lung": [1, 2, 3, "4"]}, {"Lung": [1, 2, 3, float("nan")]}):
        with pytest.raises(InputError):
            boxes_in(bad)
    assert (
        boxes_in({}) == [] and boxes_in([{}]) == [] and read_boxes({}) == ({}, {"detection files": 0, "unusable": []})
    )


def test_slake_masks(slake_dir):
    place = slake_dir / "slake" / "imgs" / "xmlab1"
    mask = np.zeros((80, 100), np.uint8)
    mask[10:20, 30:50] = 155
    Image.fromarray(mask).save(place / "mask.png")
    row = load_slake(slake_dir).rows[0]
    assert row["mask_path"] == place / "mask.png" and np.array_equal(read_mask(row), mask)
    Image.fromarray(np.stack([mask] * 3, -1)).save(place / "mask.png")
    assert np.array_equal(read_mask(row), mask)
    Image.fromarray(mask[:40]).save(place / "mask.png")
    with pytest.raises(InputError, match="has 100x40 pixels, its image 100x80"):
        read_mask(row)
    with pytest.raises(InputError, match="cannot be read"):
        read_mask(load_slake(slake_dir).split("test")[0])


def test_slake_masks_give_the_boxes_of_their_organs(slake_dir):
    """Two lungs are two boxes; what the mask does not name stays as detection.json has it; without names, all of it."""
    place = slake_dir / "slake" / "imgs" / "xmlab1"
    mask = np.zeros((80, 100), np.uint8)
    mask[10:60, 5:40] = mask[12:58, 60:95] = 2
    mask[30:50, 42:58] = 3
    mask[0, 0] = 2  # a stray pixel
    Image.fromarray(mask).save(place / "mask.png")
    detection(slake_dir, 1, [{"lung": [0, 0, 99, 79]}, {"Pneumonia": [10, 20, 5, 5]}])
    only = load_slake(slake_dir)
    assert [b["organ"] for b in only.rows[0]["boxes"]] == ["lung", "Pneumonia"] and "masks" not in only.notes
    (slake_dir / "slake" / "mask.txt").write_text("1:Liver\n2:Lung\nHeart:3\n\n")
    Image.fromarray(mask[:40]).save(slake_dir / "slake" / "imgs" / "xmlab2" / "mask.png")
    english = load_slake(slake_dir)
    assert english.rows[0]["boxes"] == [
        {"organ": "Lung", "box": [5, 10, 40, 60]},
        {"organ": "Lung", "box": [60, 12, 95, 58]},
        {"organ": "Heart", "box": [42, 30, 58, 50]},
        {"organ": "Pneumonia", "box": [10, 20, 15, 25]},
    ]
    assert english.notes["masks"] == 1 and english.notes["unusable masks"] == ["xmlab2/source.jpg"]


def test_slake_audit(slake_dir, capsys):
    found = audit_slake(slake_dir, hash_images=True)
    assert found["English test images in Chinese train"] == {"a": 1, "b": 1, "shared": 1, "ids": ["xmlab3/source.jpg"]}
    assert found["Chinese test images in English train"]["shared"] == 1 and found["train rows"]["ids"] == [[0, 1]]
    assert found["test questions that occur in train"] == {"rows": 1, "of": 2, "ids": [5]}
    assert len(found["images"]["similar across splits"]) == 1  # three plain grey images: their hashes are alike
    audit_main(["audit", "slake", "--data-dir", str(slake_dir)])
    assert "English test images in Chinese train / shared: 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ audits, by hand


def row(qid, image, question, answer, frame=None):
    return make_row(qid=qid, image_id=image, question=question, answer=answer, question_frame=frame)


def test_plain_text():
    assert plain_text(" Is it a T2-weighted  image? ") == "is it a t2 weighted image"
    assert plain_text(12) == "12" and plain_text("这是CT吗?") == "这是ct吗"


def test_word_overlap():
    assert word_overlap("Is there a mass?", "a mass is THERE") == 1
    assert word_overlap("is there a mass", "is there a nodule") == 3 / 5
    assert word_overlap("mass", "nodule") == 0 and word_overlap("?", "!") == 1


def test_audits_by_hand():
    train = [
        row(1, "a", "Is there a mass?", "Yes"),
        row(2, "a", "Does it show a mass?", "yes"),
        row(3, "b", "Is there a mass?", "no"),
        row(4, "a", "is there a mass", "No"),
    ]
    test = [
        row(5, "a", "is there a mass", "yes.", "Does it show a mass?"),
        row(6, "b", "Is there a mass here?", "no", "Is it a mass?"),
        row(7, "c", "Is there a mass?", "no"),
    ]
    assert seen(test, train) == {"rows": 1, "of": 3, "ids": [5]} and seen(test, train, ("question",))["ids"] == [5, 7]
    assert repeats(train)["ids"] == [] and repeats(train, ("image_id", "question"))["ids"] == [[1, 4]]
    assert frames_in(test, train) == {"rows": 1, "of": 3, "ids": [5]}
    assert reworded(test, train, 0.8) == {"rows": 2, "of": 3, "pairs": [(5, 1, 1.0), (6, 3, 0.8)]}
    assert reworded(test, train, 0.81)["rows"] == 1
    assert conflicts(train) == {"pairs": 1, "ids": [[1, 4]]}
    assert shared_values(test, train) == {"a": 3, "b": 2, "shared": 2, "ids": ["a", "b"]}


# ------------------------------------------------------------------------------------------------ phantom, both formats


def test_the_phantom_as_vqa_rad(tmp_path):
    export = pytest.importorskip("phantom_files")
    export.export_vqa_rad(tmp_path / "vqa_rad", seed=1, count=4, size=64)
    files, public = load_vqa_rad(tmp_path), load_vqa_rad(tmp_path, "public")
    assert files.left_out == NOTHING and len(public.split("test")) == len(files.split("test")) > 0
    assert {row["answer_type"] for row in public.rows} == {"open", "closed"} and all(
        isinstance(row["answer"], str) for row in public.rows
    )
    stock = frames_in(public.split("test"), files.split("train"))
    assert stock["rows"] == stock["of"] > 0
    left = load_vqa_rad(tmp_path, policy="no_test_frames")
    assert frames_in(public.split("test"), left.split("train"))["rows"] == 0


def test_the_phantom_as_slake(tmp_path):
    export = pytest.importorskip("phantom_files")
    export.export_slake(tmp_path / "slake", seed=1, counts={"train": 3, "validate": 2, "test": 2}, size=64)
    english = load_slake(tmp_path)
    assert (
        english.left_out == NOTHING
        and english.notes["boxes read as"] == "xywh"
        and english.notes["boxes beyond their image"] == 0
    )
    assert all(pair["shared"] == 0 for pair in shared_between_splits(english.rows).values())
    row = english.rows[0]
    mask = read_mask(row)
    for item in row["boxes"]:
        x0, y0, x1, y1 = (int(n) for n in item["box"])
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64 and mask[y0:y1, x0:x1].any()


# ----------------------------------------------------------------------------------------------------------- real files


@pytest.fixture
def real_rad(real_data):
    return real_data("vqa_rad/trainset.json").parents[1]


@pytest.fixture
def real_slake(real_data):
    return real_data("slake/train.json").parents[1]


def by(rows, key):
    return Counter(row[key] for row in rows)


@pytest.mark.realdata
def test_real_rad_counts(real_rad):
    public, files = load_vqa_rad(real_rad, "public"), load_vqa_rad(real_rad, "files")
    assert public.official and files.official
    assert public.counts() == {"train": 1797, "test": 451} and files.counts() == {"train": 3064, "test": 451}
    assert len({row["image_id"] for row in public.rows}) == 314 and public.left_out == NOTHING
    assert by(public.split("test"), "phrase_type") == {"freeform": 308, "para": 143} and by(
        public.split("train"), "phrase_type"
    ) == {"freeform": 1206, "para": 591}
    test = files.split("test")
    assert by(test, "answer_type") == {"closed": 272, "open": 179} and by(test, "organ") == {
        "CHEST": 174,
        "ABD": 158,
        "HEAD": 119,
    }
    assert (
        by(files.split("train"), "answer_type") == {"closed": 1823, "open": 1241}
        and by(files.split("train"), "phrase_type")["frame"] == 1267
    )
    closed = Counter(plain_text(row["answer"]) for row in test if row["answer_type"] == "closed")
    assert (closed["no"], closed["yes"], sum(closed.values()) - closed["no"] - closed["yes"]) == (133, 118, 21)
    assert by(public.rows, "answer_type") == {"closed": 1299, "open": 949}
    assert sum(row["answer"].isdigit() and row["qid"] in (1511, 1568, 1683, 2234, 2235) for row in public.rows) == 5
    assert by(public.rows, "question_type") == {
        "PRES": 801,
        "POS": 316,
        "ABN": 202,
        "OTHER": 196,
        "MODALITY": 185,
        "SIZE": 171,
        "PLANE": 120,
        "ATTRIB": 88,
        "ORGAN": 59,
        "COLOR": 52,
        "COUNT": 24,
        "POS+PRES": 10,
        "ATTRIB+PRES": 10,
        "ABN+POS": 5,
        "PRES+SIZE": 2,
        "COLOR+PRES": 3,
        "COLOR+SIZE": 2,
        "ATTRIB+SIZE": 1,
        "ABN+PRES": 1,
    }
    same = [
        Counter(
            (row["image_id"], plain_text(row["question"]), plain_text(row["answer"]))
            for row in s.rows
            if row["phrase_type"] != "frame"
        )
        for s in (public, files)
    ]
    assert same[0] == same[1]


@pytest.mark.realdata
def test_real_rad_leaks(real_rad):
    found = audit_vqa_rad(real_rad)
    assert found["images in two splits"]["train, test"] == found["images in two splits"]["train, test"] | {
        "a": 314,
        "b": 203,
        "shared": 203,
    }
    assert found["test questions whose stock wording is in train"]["rows"] == 284
    assert found["test rows with the same image, question and answer in train"]["rows"] == 16
    assert (
        found["test rows reworded in train, word overlap 0.8"]["rows"] == 65
        and found["test rows reworded in train, word overlap 0.5"]["rows"] == 146
    )
    assert found["test rows with the same image, answer and types in train"]["rows"] == 301
    assert found["open test answers that train has for the same image"]["rows"] == 105
    assert found["conflicting answers in train"]["pairs"] == 24
    assert found["linked questions in two splits"]["train, test"]["shared"] == 0
    questions = load_vqa_rad(real_rad)
    known = {plain_text(row["answer"]) for row in questions.split("train")}
    opened = [plain_text(row["answer"]) for row in questions.split("test") if row["answer_type"] == "open"]
    assert (
        sum(answer not in known for answer in opened) == 39 and sum(len(answer.split()) > 3 for answer in opened) == 36
    )


@pytest.mark.realdata
def test_real_rad_policies(real_rad):
    clean = load_vqa_rad(real_rad, policy="clean_train")
    assert (
        clean.counts() == {"train": 1152, "test": 451} and len({row["image_id"] for row in clean.split("train")}) == 111
    )
    assert load_vqa_rad(real_rad, policy="no_frames").counts() == {"train": 1797, "test": 451}
    some = load_vqa_rad(real_rad, policy="no_test_frames")
    # the 284 and one frame row of a training question that reads the same, about the same image and with the same
    # answer (qid 674)
    assert some.left_out["frame row of a test question"] == 285
    assert (
        frames_in(
            load_vqa_rad(real_rad, "public").split("test"),
            [r for r in some.split("train") if r["phrase_type"] == "frame"],
        )["rows"]
        == 0
    )
    apart = load_vqa_rad(real_rad, policy="image_disjoint", seed=1)
    assert (
        all(pair["shared"] == 0 for pair in shared_between_splits(apart.rows).values())
        and sum(apart.counts().values()) == 3515
    )
    assert apart.notes == {"clusters of near-identical images": []}  # no two of the 314 are copies of each other
    assert load_vqa_rad(real_rad, val_share=0.1).counts()["val"] > 200


@pytest.mark.realdata
def test_real_slake_counts(real_slake):
    english = load_slake(real_slake, allow_missing_images=True)
    assert english.official and english.counts() == {"train": 4918, "val": 1053, "test": 1061}
    assert [len({row["image_id"] for row in english.split(split)}) for split in ("train", "val", "test")] == [
        450,
        96,
        96,
    ]
    kinds = [by(english.split(split), "answer_type") for split in ("train", "val", "test")]
    assert [(kind["open"], kind["closed"]) for kind in kinds] == [(2975, 1943), (631, 422), (645, 416)]
    test = english.split("test")
    assert by(test, "modality") == {"CT": 472, "X-Ray": 361, "MRI": 228}
    assert by(test, "question_type") == {
        "Organ": 253,
        "Position": 186,
        "Abnormality": 150,
        "KG": 148,
        "Modality": 108,
        "Size": 65,
        "Plane": 58,
        "Quantity": 52,
        "Color": 34,
        "Shape": 7,
    }
    assert sum(not row["needs_image"] for row in test) == 148
    answers = by([row for row in test if row["answer_type"] == "closed"], "answer")
    assert (answers["Yes"], answers["No"], sum(answers.values()) - 355) == (175, 180, 61)
    assert (
        sum(plain_text(r["answer"]) in ("yes", "no") for r in english.split("train") if r["answer_type"] == "closed")
        == 1681
    )
    assert english.left_out == {"no question": 0, "no answer": 1} and 1622 not in qids(english.rows)
    assert sum(row["answer"] == "None" for row in english.rows) == 44  # an answer: "which disease is it?" "None"
    assert load_slake(real_slake, "zh", allow_missing_images=True).counts() == {
        "train": 4916,
        "val": 1046,
        "test": 1033,
    }
    assert len({row["qid"] for row in load_slake(real_slake, None, allow_missing_images=True).rows}) == 14027


@pytest.mark.realdata
def test_real_slake_leaks(real_slake):
    found = audit_slake(real_slake, allow_missing_images=True)
    assert all(pair["shared"] == 0 for pair in found["images in two splits"].values())
    assert (
        found["English test images in Chinese train"]["shared"] == 72
        and found["English test images in Chinese val"]["shared"] == 12
    )
    assert found["Chinese test images in English train"]["shared"] == 70
    assert found["train rows"]["repeats"] == 7 and found["test questions that occur in train"]["rows"] == 999


@pytest.mark.realdata
def test_real_slake_images(real_slake, real_data):
    listed = json.loads(real_data("slake/with_images_en.json").read_text(encoding="utf-8"))
    test = load_slake(real_slake)
    here = {row["qid"] for row in listed if (real_slake / "slake" / "imgs" / row["img_name"]).is_file()}
    assert here <= {row["qid"] for row in test.rows} and test.left_out["image missing"] == 7032 - len(test.rows)
    if len(test.rows) == 257:  # the 20 images of the copy the counts were made on
        assert {row["qid"] for row in test.rows} == {row["qid"] for row in listed} and by(test.rows, "answer_type") == {
            "open": 166,
            "closed": 91,
        }


def test_odd_values_of_slake_are_read_past(tmp_path):
    (tmp_path / "mask.txt").write_text("1:Liver\n\u00b2:x\n" + "9" * 5000 + ":y\n", "utf-8")
    assert mask_names(tmp_path / "mask.txt") == {1: "Liver"}
    with pytest.raises(InputError, match="four numbers"):
        boxes_in([{"Liver": [5, 5, 10**400, 20]}])
    assert files_in(tmp_path / ("x" * 300)) == {}


def test_an_object_where_a_text_should_be_is_named_with_its_row(tmp_path):
    (tmp_path / "t.json").write_text('[{"qid": 1, "image_organ": {}}]')
    with pytest.raises(InputError, match=r"t.json, row 0, image_organ: a text was expected"):
        read_rows(tmp_path / "t.json", ["qid", "image_organ"])
