"""
Rows for training and evaluation: the documented commands, what targets may say, splits and audit, files read back, bad
input.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phantom_files import MASK_VALUES, export_slake, export_vqa_rad
from shared.phantom import phantom_settings, phantom_study
from shared.runtime import InputError
from vqa_sft_grpo.counterfactual import region_mask
from vqa_sft_grpo.prepare_data import main
from vqa_sft_grpo.rows import PHANTOM_START, ROW_FIELDS, ancestors, grpo_row, make_rows
from vqa_sft_grpo.rows import read_rows, slake_region, write_rows
from vqa_sft_grpo.prompting import FIELDS, build_target, parse_response
from vqa_sft_grpo.scoring import score_answer
from vqa_sft_grpo.train_grpo import load_rows as grpo_rows
from vqa_sft_grpo.train_grpo import parse_args as grpo_args
from vqa_sft_grpo.train_sft import load_rows as sft_rows
from vqa_sft_grpo.train_sft import parse_args as sft_args

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A data folder with both sets, written from the phantom in their formats."""
    folder = tmp_path_factory.mktemp("data")
    export_slake(folder / "slake", seed=0, counts={"train": 10, "validate": 3, "test": 4}, size=64)
    export_vqa_rad(folder / "vqa_rad", seed=1, count=16, size=64)
    return folder


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """(rows, audit) of a small phantom, all splits."""
    return make_rows("phantom", "all", image_dir=tmp_path_factory.mktemp("films"), studies=30, image_size=56)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def shared_groups(rows):
    groups = {split: {row["group"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    return {(a, b): groups[a] & groups[b] for a, b in (("train", "val"), ("train", "test"), ("val", "test"))}


# --- the documented command ---


def test_documented_command(made_up, monkeypatch, capsys):
    monkeypatch.setenv("MEDVLM_DATA", str(made_up))
    main(
        [
            "--output",
            "data/train.json",
            "--dataset",
            "BOTH",
            "--split",
            "train",
            "--grpo_output",
            "data/grpo_data.jsonl",
            "--data-dir",
            str(made_up),
            "--policy",
            "image-disjoint",
        ]
    )
    rows = lines_of("data/train.json")
    assert {row["dataset"] for row in rows} == {"vqa_rad", "slake"} and {row["split"] for row in rows} == {
        "train",
        "val",
    }
    assert all(set(ROW_FIELDS) <= set(row) for row in rows) and len({row["id"] for row in rows}) == len(rows)
    grpo = lines_of("data/grpo_data.jsonl")
    assert [(r["image_path"], r["question"], r["gold"], r["region"], r["group"], r["split"]) for r in grpo] == [
        (r["image"], r["question"], r["answer"], r["region"], r["group"], r["split"]) for r in rows
    ]
    audit = json.loads(Path("data/train.audit.json").read_text())
    assert audit["policy"] == "image-disjoint" and audit["settings"]["seed"] == 0 and not audit["overlap"]
    assert audit["counts"]["train"]["rows"] == sum(row["split"] == "train" for row in rows)
    printed = capsys.readouterr().out
    assert (
        "images in both train and test: 0" in printed
        and f"{len(rows)} rows in data/train.json, data/grpo_data.jsonl" in printed
    )
    assert len(read_rows("data/train.json")) == len(rows) == len(read_rows("data/grpo_data.jsonl"))


@pytest.mark.slow
def test_from_another_folder(tmp_path, start_script):
    process = start_script([ROOT / "vqa_sft_grpo" / "prepare_data.py", "--dry-run"], tmp_path)
    assert process.wait() == 0, Path("output.txt").read_text()
    assert len(read_rows(tmp_path / "outputs" / "vqa_sft_grpo" / "prepare_data" / "dry-run" / "train.json")) > 10


def test_auto_says_that_it_draws(capsys):
    main(["--output", "rows.json", "--data-dir", "nowhere", "--studies", "4", "--image-size", "32"])
    assert "PHANTOM" in capsys.readouterr().out and {row["dataset"] for row in lines_of("rows.json")} == {"phantom"}


def test_auto_takes_what_is_there(made_up):
    rows, audit = make_rows("auto", "train", made_up / "slake")
    assert {row["dataset"] for row in rows} == {"slake"} and "VQA-RAD is not in" in audit["absent"][0]


# --- targets ---


def test_phantom_targets_are_its_truth(phantom):
    rows, _ = phantom
    for row in rows:
        number, index = int(row["id"].rsplit("-", 1)[1]), int(Path(row["image"]).stem.split("_")[1])
        study = phantom_study(0, index, 56)
        question = study.questions[number]
        assert (row["question"], row["answer"]) == (question.text, question.answer) and row["region"] == question.region
        target = json.loads(row["output"])
        assert (
            list(target) == [field for field in FIELDS if field in target]
            and target["answer"] == row["answer"]
            and target.get("boxes") == row["region"]
        )
        for finding in study.drawn:
            assert (
                finding.kind.split()[-1] in target["caption"]
                or finding.kind in ("large heart", "wide mediastinum", "thickening", "edema")
                or "collapse" in finding.kind
            ), (finding, target)
        assert ("without findings" in target["caption"]) == (not study.drawn)
        if row["content_type"] == "side":
            assert row["answer"] in target["reasoning"]
        if row["content_type"] == "presence":
            assert target["reasoning"].startswith("No ") == (row["answer"] == "no")
        assert ("reasoning" in target) == (row["content_type"] not in ("modality", "view")) == row["needs_image"]


def test_boxes_lie_on_what_was_drawn(phantom):
    """Removing the finding changes the film inside the row's region and hardly anywhere else."""
    rows, _ = phantom
    checked = 0
    for row in rows:
        if row["content_type"] in ("side", "zone", "abnormality") and checked < 8:
            index = int(Path(row["image"]).stem.split("_")[1])
            study = phantom_study(0, index, 56)
            shown = [f for f in study.drawn if study.boxes[f.name] == row["region"]]
            change = np.abs(study.image.astype(int) - study.without(*[f.name for f in shown]).image.astype(int))
            inside = sum(change[y0:y1, x0:x1].sum() for x0, y0, x1, y1 in row["region"])
            assert inside > 0.8 * change.sum() > 0, row
            checked += 1
    assert checked >= 4


def test_films_drawn_anew_lack_what_was_asked_and_nothing_else(tmp_path):
    """Checked against the study itself: outside of the finding's box the film is the same, inside it is not."""
    settings = phantom_settings(["Pleural Effusion", "Consolidation"], 0.6, (0, 0, 1))
    rows, _ = make_rows("phantom", "test", image_dir=tmp_path / "films", studies=16, settings=settings)
    drawn = {
        row["image"]: phantom_study(0, PHANTOM_START["test"] + i, 112, settings)
        for i in range(16)
        for row in rows
        if f"_{PHANTOM_START['test'] + i}_" in row["image"]
    }
    asked = [row for row in rows if "redrawn" in row]
    assert len(asked) >= 5 and all(
        (row in asked) == (row["content_type"] == "presence" and row["answer"] == "yes") for row in rows
    )
    assert any("redrawn_other" in row for row in asked) and any("redrawn_other" not in row for row in asked)
    for row in asked:
        study = drawn[row["image"]]
        condition = next(q.condition for q in study.questions if q.text == row["question"])
        gone = [f.name for f in study.truth if condition in ancestors(f.condition)]
        film, without = (np.asarray(Image.open(row[field])).astype(int) for field in ("image", "redrawn"))
        assert (without == study.without(*gone).image).all() and study.without(*gone).labels[condition] == 0
        change = np.abs(film - without)
        mask = region_mask(row["region"], 112, 112)
        assert change[mask].sum() > 0.9 * change.sum() > 1000
        if "redrawn_other" in row:
            kept = [name for f in study.truth if (name := f.name) not in gone]
            assert (
                np.asarray(Image.open(row["redrawn_other"])) == study.without(kept[0]).image
            ).all() and study.without(kept[0]).labels[condition] == 1
    write_rows(tmp_path / "rows.json", rows)
    again = {row["id"]: row for row in read_rows(tmp_path / "rows.json")}
    assert all(
        again[row["id"]].get(field) == row.get(field) for row in rows for field in ("image", "redrawn", "redrawn_other")
    )
    assert not any(
        "redrawn" in row
        for row in make_rows("phantom", "train", image_dir=tmp_path / "train", studies=10, settings=settings)[0]
        if row["split"] == "train"
    )
    Path(asked[0]["redrawn"]).unlink()
    with pytest.raises(InputError, match="images of .* are not there"):
        read_rows(tmp_path / "rows.json")


def test_phantom_films_and_splits(phantom):
    rows, audit = phantom
    assert not any(shared_groups(rows).values()) and audit["phantom"] and not audit["overlap"]
    assert {split: found["images"] for split, found in audit["counts"].items()} == {"train": 30, "val": 3, "test": 9}
    for row in rows:
        with Image.open(row["image"]) as image:
            assert image.size == (row["width"], row["height"]) == (56, 56)
    assert all(start % 8 == 0 for start in PHANTOM_START.values())  # patients live in groups of eight


def test_phantom_is_balanced_and_needs_its_image():
    """Closed questions: yes as often as no for each wording, so the best constant per question stays near a half."""
    from shared.phantom import DEFAULT

    settings = phantom_settings()
    assert settings is DEFAULT
    counts = Counter()
    for index in range(600):
        for question in phantom_study(5, index, 28).questions:
            if question.kind == "closed":
                counts[question.text, question.answer] += 1
    total = sum(counts.values())
    best = sum(max(counts[text, "yes"], counts[text, "no"]) for text in {text for text, _ in counts})
    assert total > 2000 and best / total < 0.55, best / total


def test_same_films_for_any_number_of_studies(tmp_path):
    few = make_rows("phantom", "train", image_dir=tmp_path / "a", studies=3, image_size=28)[0]
    many = make_rows("phantom", "train", image_dir=tmp_path / "b", studies=5, image_size=28)[0]
    strip = [{k: v for k, v in row.items() if k != "image"} for row in few if row["split"] == "train"]
    assert (
        strip
        == [{k: v for k, v in row.items() if k != "image"} for row in many if row["split"] == "train"][: len(strip)]
    )


def test_chosen_conditions_only(tmp_path):
    rows, _ = make_rows(
        "phantom",
        "test",
        image_dir=tmp_path,
        studies=25,
        image_size=28,
        settings=phantom_settings(["Cardiomegaly", "Pleural Effusion"], 0.6),
    )
    asked = {row["question"] for row in rows if row["content_type"] == "presence"}
    assert (
        asked
        <= {
            "Is there an enlarged heart?",
            "Is there a pleural effusion?",
            "Is there an enlarged cardiomediastinal silhouette?",
        }
        and len(asked) >= 2
    )
    yes = Counter(row["answer"] for row in rows if row["content_type"] == "presence")
    assert min(yes.values()) > 0.25 * sum(yes.values())


def test_vqa_rad_targets_hold_no_boxes_and_no_reasoning(made_up):
    rows, _ = make_rows("vqa_rad", "all", made_up, "image-disjoint")
    for row in rows:
        target = json.loads(row["output"])
        assert set(target) <= {"caption", "answer"} and row["region"] is None and row["needs_image"] is None
    assert {json.loads(row["output"]).get("caption") for row in rows} <= {
        "Image of the chest.",
        "Image of the abdomen.",
        "Image of the head.",
        None,
    }


def test_slake_targets_hold_annotated_boxes(made_up):
    rows, audit = make_rows("slake", "all", made_up)
    with_region = [row for row in rows if row["region"]]
    assert with_region and audit["data"]["slake"]["rows with a region"]["train"] > 0
    for row in rows:
        target = json.loads(row["output"])
        assert (
            target["caption"] == "X-Ray of the lung."
            and target.get("boxes") == row["region"]
            and "reasoning" not in target
        )
        if row["content_type"] in ("Modality", "Plane", "KG"):
            assert row["region"] is None
    heart = next(row for row in rows if row["question"] == "Is the heart larger than normal?")
    y, x = np.nonzero(np.asarray(Image.open(Path(heart["image"]).parent / "mask.png")) == MASK_VALUES["heart"])
    assert heart["region"] == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
    assert all(row["needs_image"] == (row["question_type"] == "vqa") for row in rows) and any(
        row["question_type"] == "kvqa" for row in rows
    )


LUNGS = [
    {"organ": "Left Lung", "box": [60, 10, 90, 80]},
    {"organ": "Right Lung", "box": [10, 10, 40, 80]},
    {"organ": "Heart", "box": [30, 40, 70, 80]},
    {"organ": "Lung Cancer", "box": [12, 20, 20, 30]},
]


@pytest.mark.parametrize(
    "question, answer, kind, content, organs",
    [
        ("Are the lungs healthy?", "No", "closed", "Abnormality", ["Left Lung", "Right Lung"]),
        ("Is the left lung healthy?", "No", "closed", "Abnormality", ["Left Lung"]),
        (
            "Which side of lung is abnormal in this image,left or right?",
            "Right",
            "closed",
            "Position",
            ["Left Lung", "Right Lung"],
        ),
        ("Is there a lung cancer?", "Yes", "closed", "Abnormality", ["Left Lung", "Right Lung", "Lung Cancer"]),
        ("Which organ is abnormal?", "Heart", "open", "Organ", ["Heart"]),
        ("Which organ is abnormal?", "Heart", "closed", "Organ", None),  # only the question may choose the place then
        ("Is there a tumor in the liver?", "No", "closed", "Abnormality", None),
        ("Is this a CT of the lung?", "No", "closed", "Modality", None),
        ("What does the heart do?", "Pump", "open", "KG", None),
    ],
)
def test_slake_region(question, answer, kind, content, organs):
    row = {
        "boxes": LUNGS,
        "question": question,
        "answer": answer,
        "answer_type": kind,
        "question_type": content,
        "triple": ["vhead", "_", "_"],
        "needs_image": True,
    }
    expected = organs and [entry["box"] for entry in LUNGS if entry["organ"] in organs]
    assert slake_region(row) == expected and slake_region(row | {"boxes": None}) is None


def test_targets_read_back_as_right_answers(phantom, made_up):
    rows = phantom[0] + make_rows("both", "all", made_up, "image-disjoint")[0]
    for row in rows:
        for style in ("json", "think"):
            found = parse_response(build_target(row, style), style)
            assert found.level == 0 and found.valid
            assert score_answer(found.answer, row["answer"], row["answer_type"], row["question"])["correct"], row
        assert parse_response(row["output"]).valid


# --- splits and audit ---


@pytest.mark.parametrize("policy", ["clean-train", "image-disjoint"])
def test_no_policy_but_the_official_ones_shares_images(made_up, policy):
    rows, audit = make_rows("slake", "all", made_up, policy)
    assert not any(shared_groups(rows).values()) and not audit["overlap"] and not any(row["overlap"] for row in rows)
    assert {row["split"] for row in rows} == {"train", "val", "test"}


def test_copies_of_test_images_leave_training(made_up, tmp_path):
    """A test image that is also in training under another name, as JPEG of lower quality, is found and taken out."""
    shutil.copytree(made_up / "slake", tmp_path / "slake")
    rows = json.loads((tmp_path / "slake" / "test.json").read_text(encoding="utf-8"))
    trained = json.loads((tmp_path / "slake" / "train.json").read_text(encoding="utf-8"))
    copy, source = (
        tmp_path / "slake" / "imgs" / trained[0]["img_name"],
        tmp_path / "slake" / "imgs" / rows[0]["img_name"],
    )
    with Image.open(source) as image:
        image.save(copy, quality=70)
    found, audit = make_rows("slake", "train", tmp_path)
    affected = sum(row["img_name"] == trained[0]["img_name"] and row["q_lang"] == "en" for row in trained)
    assert audit["data"]["slake"]["left_out"]["near copy of a test image"] == affected > 0
    assert str(copy.resolve()) not in {row["image"] for row in found} and not audit["overlap"]
    official, audit = make_rows("slake", "train", tmp_path, "official")
    assert (
        audit["overlap"]
        and all(row["overlap"] and row["policy"] == "official" for row in official)
        and str(copy.resolve()) in {row["image"] for row in official}
    )


def test_unreadable_image_is_left_out_and_counted(made_up, tmp_path):
    shutil.copytree(made_up / "slake", tmp_path / "slake")
    name = json.loads((tmp_path / "slake" / "train.json").read_text(encoding="utf-8"))[0]["img_name"]
    (tmp_path / "slake" / "imgs" / name).write_bytes(b"no image")
    rows, audit = make_rows("slake", "train", tmp_path)
    assert audit["data"]["slake"]["left_out"]["image cannot be read"] > 0 and not any(
        name in row["image"] for row in rows
    )


def test_limit_and_seed(made_up):
    rows, _ = make_rows("both", "train", made_up, "image-disjoint", limit=3)
    assert Counter((row["dataset"], row["split"]) for row in rows) == {
        (name, split): 3 for name in ("vqa_rad", "slake") for split in ("train", "val")
    }
    a, b = (make_rows("slake", "train", made_up, "image-disjoint", seed=seed)[0] for seed in (0, 1))
    assert [row["id"] for row in a] != [row["id"] for row in b]


# --- files ---


def test_rows_move_with_their_images(tmp_path):
    rows, _ = make_rows("phantom", "train", image_dir=tmp_path / "a" / "phantom_images", studies=2, image_size=28)
    write_rows(tmp_path / "a" / "train.json", rows)
    assert lines_of(tmp_path / "a" / "train.json")[0]["image"].startswith("phantom_images/")
    (tmp_path / "a").rename(tmp_path / "b")
    back = read_rows(tmp_path / "b" / "train.json", "train")
    assert all(Path(row["image"]).is_file() and row["split"] == "train" for row in back)
    assert [r | {"image": ""} for r in back] == [r | {"image": ""} for r in rows if r["split"] == "train"]
    (tmp_path / "b" / "list.json").write_text(json.dumps(lines_of(tmp_path / "b" / "train.json")))
    assert read_rows(tmp_path / "b" / "list.json", ("train", "val")) == read_rows(tmp_path / "b" / "train.json")
    outside = grpo_row(rows[0], tmp_path / "elsewhere")
    assert Path(outside["image_path"]).is_absolute()


GOOD = {
    "id": "1",
    "dataset": "phantom",
    "split": "train",
    "instruction": "?",
    "input": "?",
    "output": '{"answer": "yes"}',
    "image": "x.png",
    "question": "?",
    "answer": "yes",
    "answer_type": "closed",
    "question_type": "yes_no",
    "content_type": "presence",
    "group": "P",
    "region": [[0, 0, 5, 5]],
    "width": 8,
    "height": 8,
    "policy": "by patient",
    "overlap": False,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": None}, "'answer' must be a text"),
        ({"question": " "}, "'question' must be a text"),
        ({"answer_type": "CLOSED"}, "it must be closed or open"),
        ({"region": [[5, 0, 0, 5]]}, "'region' must be null or boxes"),
        ({"region": []}, "'region' must be null or boxes"),
        ({"region": [[0.1, 0.2, 0.5, 0.9]]}, "not in shares of the image"),
        ({"region": [[0, 0, float("nan"), 5]]}, "'region' must be null or boxes"),
        ({"output": "{"}, "'output' must be a JSON object"),
        ({"output": '{"caption": "x"}'}, "'output' must be a JSON object"),
        ({"image": "gone.png"}, "1 of the 1 images of"),
        ({"split": "test"}, "has no rows of train"),
        ({"answer": ...}, "lacks answer or gold"),
        ({"image": ...}, "lacks image or image_path"),
        ({"output": '{"answer": "yes", "boxes": [[5, 0, 0, 5]]}'}, "the boxes of 'output'"),
        ({"width": None, "region": [[0, 0, 9, 5]]}, "lies outside of the image, 8 x 8"),
        ({"split": "training"}, "'split' is \"training\"; it must be train, val or test"),
        ({"split": None}, "'split' is null"),
        ({"width": 80, "height": 80}, "the image is 8 x 8 and not 80 x 80"),
        ({"width": 0}, "whole numbers of pixels"),
        ({"width": "8"}, "whole numbers of pixels"),
        ({"height": float("nan")}, "whole numbers of pixels"),
        ({"region": [[0, 0, 9, 5]]}, "lies outside of the image, 8 x 8"),
        ({"region": [[-1, 0, 5, 5]]}, "lies outside of the image"),
        ({"region": [[0, 0, 10**400, 5]]}, "'region' must be null or boxes"),
        ({"region": [[0, 0, True, 5]]}, "'region' must be null or boxes"),
        ({"output": '{"answer": "no"}'}, "'output' answers 'no', 'answer' says otherwise"),
        ({"output": "[" * 100_000}, "'output' must be a JSON object"),
        ({"dataset": None}, "'dataset' must be a text"),
        ({"policy": ["by patient"]}, "'policy' must be a text"),
        ({"group": []}, "'group' must be a text"),
        ({"content_type": "\ud800"}, "half a character"),
        ({"question": "?" * 200_000}, "has 200,000 characters; at most 2,000"),
        ({"q_lang": "en", "img_name": "xmlab1/source.jpg"}, "is a row of slake's own files: give --data slake"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(tmp_path, change, message):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(GOOD))
    assert len(read_rows(path, "train")) == 1
    path.write_text(json.dumps({k: v for k, v in (GOOD | change).items() if v is not ...}))
    with pytest.raises(InputError, match=message) as error:
        read_rows(path, "train")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_id_twice_is_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in (GOOD, GOOD | {"id": "2"}, GOOD)))
    with pytest.raises(InputError, match="row 3 has the id of row 1, '1'"):
        read_rows(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": ' * 100_000, "is not JSON"),
        (b'{"a": ' + b"1" * 6000 + b"}", "is not JSON"),
        (None, "cannot be read"),
        (b"", "has no rows"),
        (b"{\n", "line 1, is not JSON"),
        (b"[1]", "is not an object"),
        (b"\xff\xfe\x00", "cannot be read: they are not UTF-8 text; save the file as UTF-8"),
        (b"[1, 2", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_rows_made_elsewhere_are_read_as_they_are(tmp_path, capsys):
    """The two documented forms, each with fewer fields than prepare_data.py writes; their images are held out alike."""
    (tmp_path / "images").mkdir()
    told, older = [], []
    for i in range(12):
        Image.new("L", (8, 6), i).save(tmp_path / "images" / f"{i}.png")
        question, answer = ("Is it dark?", "Yes") if i % 2 else ("What is it?", "a film")
        target = {"caption": "A film.", "reasoning": ["It is grey.", "It is flat."], "boxes": [], "answer": answer}
        told.append({"instruction": "Look.", "input": question, "output": json.dumps(target), "question": question})
        told[-1] |= {"image": f"images/{i}.png", "answer": answer}
        older.append({"image_path": f"images/{i}.png", "question": question, "gold": answer, "valid_json": True})
    (tmp_path / "told.json").write_text(json.dumps(told))
    (tmp_path / "older.jsonl").write_text("\n".join(map(json.dumps, older)))
    rows, others = read_rows(tmp_path / "told.json"), read_rows(tmp_path / "older.jsonl")
    assert "split (12), group (12), answer_type (12)" in capsys.readouterr().out
    held = [{r["group"] for r in some if r["split"] == "val"} for some in (rows, others)]
    assert held[0] == held[1] and len(held[0]) == 1
    for row, other in zip(rows, others, strict=True):
        assert set(ROW_FIELDS) <= row.keys() & other.keys() and (row["width"], row["height"]) == (8, 6)
        assert row["answer"] == other["answer"] == other["gold"] and row["image"] == other["image"]
        assert row["answer_type"] == other["answer_type"] == ("closed" if row["answer"] == "Yes" else "open")
        assert json.loads(other["output"]) == {"answer": row["answer"]}
        assert json.loads(row["output"])["reasoning"] == "It is grey. It is flat." and row["instruction"] == "Look."
        assert build_target(row, "think") == (
            f"<think>A film. It is grey. It is flat.</think><answer>{row['answer']}</answer>"
        )
    assert len({row["id"] for row in rows}) == 12


def test_boxes_of_the_output_are_the_region_unless_they_are_a_template(tmp_path, capsys):
    rows = []
    for i in range(3):
        Image.new("L", (20, 20), i).save(tmp_path / f"{i}.png")
        target = {"boxes": [[1, 1, 5 + i, 9]], "answer": "yes"}
        rows.append({"image": f"{i}.png", "question": "?", "answer": "yes", "output": json.dumps(target)})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert [row["region"] for row in read_rows(path)] == [[[1, 1, 5 + i, 9]] for i in range(3)]
    path.write_text(json.dumps([row | {"output": rows[0]["output"]} for row in rows]))
    assert [row["region"] for row in read_rows(path)] == [None] * 3 and "a template" in capsys.readouterr().out
    path.write_text(json.dumps([row | {"region": None} for row in rows]))
    assert [row["region"] for row in read_rows(path)] == [None] * 3  # the row says that there is none
    path.write_text(json.dumps(rows[0] | {"output": '{"answer": "yes", "boxes": [[1, 1, 30, 9]]}'}))
    with pytest.raises(InputError, match="lies outside of the image, 20 x 20"):
        read_rows(path)


@pytest.mark.parametrize("form", ["told", "older"])
def test_both_trainers_take_both_forms(form):
    """What is documented elsewhere, without conversion: rows to train on, examples of them, and a measuring command."""
    main(["--dataset", "phantom", "--studies", "12", "--image-size", "56", "--output", "rows.json"])
    rows = []
    for row in lines_of("rows.json"):
        target = json.loads(row["output"])
        target["reasoning"] = [target.get("reasoning", "A film."), "So."]
        told = {k: row[k] for k in ("instruction", "input", "image", "question", "answer")}
        older = {"image_path": row["image"], "question": row["question"], "gold": row["answer"], "valid_json": True}
        rows.append(told | {"output": json.dumps(target)} if form == "told" else older)
    Path("made.json").write_text(json.dumps(rows))
    fine, held_out, facts = sft_rows(sft_args(["--model", "tiny", "--data", "made.json"]))
    policy, validation, more = grpo_rows(grpo_args(["--model", "tiny", "--data-jsonl", "made.json"]))
    assert [row["id"] for row in fine] == [row["id"] for row in policy] and held_out and facts["name"] == "made.json"
    assert {row["image"] for row in held_out} == {row["image"] for row in validation}
    assert not {row["image"] for row in fine} & {row["image"] for row in validation}
    assert parse_response(build_target(fine[0], "json")).answer == fine[0]["answer"]
    assert (more["terms"]["defined"]["box"] > 0) == (form == "told")


def test_images_may_lie_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "data" / "rows.json").write_text(json.dumps(GOOD))
    monkeypatch.chdir(tmp_path)
    assert read_rows("data/rows.json")[0]["image"] == str(tmp_path / "x.png")


def test_documented_files_are_not_taken_for_slake(capsys):
    """data/train.json and data/test.json, as the README writes them, lie where SLAKE's files of these names may lie."""
    for split in ("train", "test"):
        main(["--output", f"data/{split}.json", "--dataset", "phantom", "--studies", "2", "--split", split])
    with pytest.raises(InputError, match="SLAKE is not in"):
        make_rows("slake", "test", "data")
    rows, audit = make_rows("auto", "test", "data", image_dir=Path("films"), studies=2, image_size=28)
    assert audit["phantom"] and "PHANTOM" in capsys.readouterr().out
    assert {row["split"] for row in read_rows("data/test.json")} == {"test"}


def test_a_file_is_replaced_only_when_that_is_said(refused):
    arguments = ["--dataset", "phantom", "--studies", "2", "--image-size", "28"]
    Path("mine.json").write_text("my rows")
    Path("other.audit.json").write_text("mine too")
    for more in (
        ["--output", "mine.json"],
        ["--output", "a.json", "--grpo-output", "mine.json"],
        ["--output", "other.json"],
    ):
        assert "is there already: replace it with --overwrite" in refused(main, arguments + more)
    assert Path("mine.json").read_text() == "my rows" and not Path("phantom_images").exists()
    main([*arguments, "--output", "mine.json", "--overwrite"])
    assert len(read_rows("mine.json")) > 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "pathvqa"], "there is no such data set"),
        (["--dataset", "slake", "--data-dir", "nowhere"], "SLAKE is not in"),
        (
            ["--dataset", "slake", "--policy", "official"],
            "SLAKE (split by image) images nearly identical to test ones: add --allow-overlap",
        ),
        (["--dataset", "phantom", "--image-size", "8"], "between 28 and 512"),
        (["--dataset", "phantom", "--conditions", "Flu"], "--conditions Flu"),
        (["--dataset", "slake", "--studies", "3"], "are for --data phantom"),
        (["--dataset", "phantom", "--output", "a.json", "--grpo-output", "./a.json"], "must be two files"),
        (["--dataset", "phantom", "--output", "."], "is a folder"),
    ],
)
def test_bad_arguments(refused, arguments, message):
    assert message in refused(main, arguments)
    assert not Path("data").exists() and not Path("phantom_images").exists()


def test_no_image_of_the_split(made_up, tmp_path, refused):
    shutil.copytree(made_up / "slake", tmp_path / "only" / "slake")
    for row in json.loads((made_up / "slake" / "train.json").read_text(encoding="utf-8")) + json.loads(
        (made_up / "slake" / "validate.json").read_text(encoding="utf-8")
    ):
        (tmp_path / "only" / "slake" / "imgs" / row["img_name"]).unlink(missing_ok=True)
    message = refused(main, ["--dataset", "slake", "--data-dir", tmp_path / "only", "--output", "train.json"])
    assert (
        "slake has no train question with its image" in message
        and "image missing" in message
        and not Path("train.json").exists()
    )


# --- the real sets ---


@pytest.mark.realdata
def test_real_clean_train(real_data):
    rows, audit = make_rows("vqa_rad", "all", real_data("vqa_rad").parent)
    learned = [row for row in rows if row["split"] != "test"]
    assert len(learned) == 1152 and len({row["image"] for row in learned}) == 111 and len(rows) - len(learned) == 451
    assert not any(shared_groups(rows).values()) and not audit["overlap"]
    assert 8 <= len({row["image"] for row in learned if row["split"] == "val"}) <= 14
    found = audit["data"]["vqa_rad"]
    assert (
        found["test questions whose stock wording is in train"]["rows"] == 0
        and found["test rows reworded in train, word overlap 0.5"]["rows"] == 0
    )
    assert len({row["id"] for row in rows}) == len(rows) and all(row["region"] is None for row in rows)


@pytest.mark.realdata
def test_real_official_audit(real_data):
    rows, audit = make_rows("vqa_rad", "all", real_data("vqa_rad").parent, "official")
    found = audit["data"]["vqa_rad"]
    assert len(rows) == 3515 and audit["overlap"] and len({row["id"] for row in rows}) == len(rows)
    numbers = [found[key]["rows"] for key in found if isinstance(found[key], dict) and "of" in found[key]]
    assert (
        numbers[:3] == [16, 65, 146]
        and numbers[-1] == 284
        and found["test questions whose stock wording is in train"]["of"] == 451
    )
    assert (
        found["images in two splits"]["train, test"]["shared"] + found["images in two splits"]["val, test"]["shared"]
        == 203
    )


@pytest.mark.realdata
def test_real_slake_test_rows(real_data):
    rows, audit = make_rows("slake", "test", real_data("slake").parent)
    assert len({row["group"] for row in rows}) == audit["counts"]["test"]["images"] and len(rows) >= 257
    assert {json.loads(row["output"])["caption"] for row in rows} >= {"CT of the abdomen.", "X-Ray of the lung."}


OWN = {"image": "a.png", "question": "Is there a mass?", "answer": "yes"}
FINDING = {"condition": "Edema", "kind": "edema", "side": "", "zone": ""}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"id": [1]}, "'id' is"),
        ({"id": True}, "'id' is"),
        ({"overlap": "false"}, "'overlap' is \"false\"; it must be true or false"),
        ({"answer": True}, "'answer' must be a text that is not empty; it is true"),
        ({"output": {"answer": "yes"}}, "'output' must be a text that is not empty; it is an object"),
        ({"width": 5.5}, "whole numbers of pixels, not 5.5 and null"),
        ({"answer_type": 3}, "'answer_type' is 3; it must be closed or open, or null"),
        ({"answer": "nan"}, "'answer' must be a text"),
        ({"gold": "no"}, "'gold' is 'no'"),
        ({"output": '{"answer": "yes", "boxes": 5}'}, "the boxes of 'output'"),
        ({"output": '{"answer": "yes", "caption": 5}'}, "the caption of 'output'"),
        ({"output": json.dumps({"answer": "yes", "caption": "\ud800"})}, "'output' must be a JSON object"),
        ({"findings": ["x"]}, "'findings' must be null or a list"),
        ({"findings": [FINDING]}, "'findings' must be null or a list"),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path, change, said):
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps(OWN | change))
    with pytest.raises(InputError, match=said):
        read_rows(tmp_path / "rows.json")


def test_rows_written_on_windows_are_read(tmp_path):
    (tmp_path / "img").mkdir()
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "img" / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps(OWN | {"image": "img\\a.png", "answer_type": None}))
    (row,) = read_rows(tmp_path / "rows.json")
    assert row["image"] == str(tmp_path / "img" / "a.png") and row["answer_type"] == "closed"


def test_rows_made_elsewhere_that_overlap_or_cannot_be_measured(tmp_path, capsys):
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")
    bad = OWN | {"image": "bad.png", "region": [[0, 0, 5, 5]], "id": 7}
    rows = [OWN | {"split": "train"}, OWN | {"split": "test"}, bad]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    found = read_rows(tmp_path / "rows.json")
    assert "OVERLAP" in capsys.readouterr().out and all(row["overlap"] for row in found)
    assert found[2]["region"] is None and found[2]["id"] == "7"


def test_the_audit_replaces_no_rows(tmp_path, refused):
    argv = ["--dataset", "phantom", "--studies", "1", "--output", str(tmp_path / "a.json")]
    assert "must be two files" in refused(main, [*argv, "--grpo_output", str(tmp_path / "a.audit.json")])
