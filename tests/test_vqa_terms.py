"""
vqa_sft_grpo/terms.py: on how many rows each part of the reward is defined, and regions from a CSV.
"""

import json
import re

import numpy as np
import pytest
from PIL import Image

from shared.runtime import InputError
from vqa_sft_grpo.looking import lend_regions
from vqa_sft_grpo.prepare_data import main as prepare
from vqa_sft_grpo.rewards import RewardSettings
from vqa_sft_grpo.rows import read_rows
from vqa_sft_grpo.terms import add_regions, settle_terms
from vqa_sft_grpo.train_grpo import load_rows, main, parse_args

BOX = [[10, 10, 40, 30]]


@pytest.fixture
def rows_file(tmp_path):
    """Four films of 100 x 80 pixels, two of the same name in two folders, with three questions each; no region."""
    rows = []
    for i, name in enumerate(["a/film.png", "b/film.png", "c.png", "d.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(40, 90, (80, 100), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        for q, (question, gold) in enumerate(
            [("Is there an effusion?", "yes"), ("Is there a fracture?", "no"), ("Which organ is it?", "lung")]
        ):
            rows.append({"id": f"{i}-{q}", "image_path": name, "question": question, "gold": gold})
    rows[-1]["needs_image"] = False
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settled(rows, weights="0.2,0.4,0.2,0.2", **settings):
    lend_regions(rows, rows)
    return settle_terms(rows, RewardSettings(weights=weights, **settings))


# --- the terms ---


def test_the_table_counts_by_hand(rows_file):
    rows = read_rows(rows_file)
    rows[0]["region"], rows[3]["region"] = BOX, [[0, 0, 100, 80]]  # the whole image: no box, nothing to take out
    weights, lines, facts = settled(rows)
    # V: the one region of a place, and the four gold "no" that are lent one of two, half of them too large perhaps
    lent = sum(row.get("lent") == [[0.1, 0.125, 0.4, 0.375]] for row in rows)
    assert weights == (0.2, 0.4, 0.2, 0.2) and facts["dropped"] == []
    assert facts["defined"] == {
        "answer, closed": 8,
        "answer, open": 4,
        "box": 1,
        "V": 1 + lent,
        "text against the answer": 12,
        "text against the truth": 0,
    }
    assert "| box | 0.2 | 1 | 8% |" in lines[0] and sum(facts["reward"].values()) == 12
    assert facts["reward"]["answer + box + V + text against the answer"] == 1
    assert "on 1 (8%)" in lines[-1]


def test_a_term_without_rows_is_dropped_by_name_or_refused(rows_file):
    rows = read_rows(rows_file)
    weights, lines, facts = settled(rows)
    assert weights == (0.2, 0.4, 0.2, 0) and facts["dropped"] == ["counterfactual"]
    assert any("counterfactual is dropped" in line for line in lines)
    assert any("box is no part of consistency" in line for line in lines)
    assert facts["reward"] == {"answer + text against the answer": 12}
    with pytest.raises(InputError, match="asks for 0.5 of counterfactual, which is defined on none of the 12 rows"):
        settled(rows, "0.2,0.4,0.2,0.5")
    assert settled(rows, "0.2,0.4,0.2,0")[2]["dropped"] == []  # nobody asked
    weights, lines, _ = settled([row | {"region": BOX, "findings": []} for row in rows], style="think")
    assert weights[3] == 0.2 and any("box is no part of consistency" in line for line in lines)  # it has no boxes
    assert not any("truth is no part" in line for line in lines)


def test_the_trainer_says_it_before_the_model_is_loaded(rows_file, capsys, refused):
    args = parse_args(["--data-jsonl", str(rows_file), "--model", "tiny"])
    _, _, facts = load_rows(args)
    printed = capsys.readouterr().out
    assert (
        "| V | 0 | 0 | 0% |" in printed.replace("| V | 0.2 |", "| V | 0 |") and "counterfactual is dropped" in printed
    )
    assert args.weights == "0.2,0.4,0.2,0" and facts["terms"]["dropped"] == ["counterfactual"]
    assert "--regions FILE" in refused(main, ["--data-jsonl", rows_file, "--weights", "0.2,0.4,0.2,0.3"])


# --- the regions ---


def test_regions_go_to_the_rows_that_are_meant(rows_file, capsys):
    rows = read_rows(rows_file)
    path = rows_file.with_name("regions.csv")
    path.write_text(
        "image,x0,y0,x1,y1,question\n"
        "a/film.png,10,10,40,30,\n"
        "a/film.png,50,10,60,30,\n"
        "a/film.png,1,2,3,4,is there an EFFUSION\n"
        "d.png,5,5,50,50,\n"
    )
    assert add_regions(rows, path) == 5
    assert "4 boxes for 5 rows" in capsys.readouterr().out
    of = {row["id"]: row["region"] for row in rows}
    assert of["0-0"] == [[1, 2, 3, 4]] and of["0-1"] == of["0-2"] == [*map(list, BOX), [50, 10, 60, 30]]
    assert of["1-0"] is None and of["3-0"] == [[5, 5, 50, 50]] and of["3-2"] is None  # its answer needs no image
    path.write_text("id,x0,y0,x1,y1\n3-2,0,0,9,9\n")
    add_regions(rows, path)
    assert rows[-1]["region"] == [[0, 0, 9, 9]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,x0,y0,x1\na/film.png,1,2,3\n", "lacks the column y1"),
        ("name,x0,y0,x1,y1\nx,1,2,3,4\n", "lacks the column image or id"),
        ("image,x0,y0,x1,y1\ngone.png,1,2,3,4\n", "line 2: no row is about the image 'gone.png'"),
        ("image,x0,y0,x1,y1\nlm.png,1,2,3,4\n", "no row is about the image 'lm.png'"),
        ("image,x0,y0,x1,y1\nfilm.png,1,2,3,4\n", "2 images are called 'film.png'; give more of its path"),
        ("id,x0,y0,x1,y1\n77,1,2,3,4\n", "no row has the id '77'"),
        ("image,x0,y0,x1,y1,question\nc.png,1,2,3,4,Why?\n", "no row asks 'Why?' about"),
        ("image,x0,y0,x1,y1\nc.png,1,2,3,4\nc.png,90,2,101,4\n", "line 3: the box 90, 2, 101, 4 must lie inside"),
        ("image,x0,y0,x1,y1\nc.png,9,2,3,4\n", "with x0 < x1"),
        ("image,x0,y0,x1,y1\nc.png,1,2,3,nan\n", "must be four numbers"),
        ("image,x0,y0,x1,y1\nc.png,1,2,3\n", "must be four numbers"),
        ("image,x0,y0,x1,y1\nc.png,0.1,0.2,0.5,1\n", "not shares of the image"),
        (None, "cannot be read"),
    ],
)
def test_bad_regions_get_one_sentence(rows_file, text, message):
    path = rows_file.with_name("regions.csv")
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        add_regions(read_rows(rows_file), path)
    assert "\n" not in str(error.value)


def test_given_regions_define_the_terms(rows_file, capsys):
    path = rows_file.with_name("regions.csv")
    path.write_text(
        "image,x0,y0,x1,y1\n" + "".join(f"{n},10,10,40,30\n" for n in ("a/film.png", "b/film.png", "c.png"))
    )
    args = parse_args(["--data-jsonl", str(rows_file), "--regions", str(path), "--weights", "0.2,0.4,0.2,0.5"])
    train, _, facts = load_rows(args)
    assert facts["terms"]["dropped"] == [] and facts["terms"]["defined"]["V"] == len(train) > 0
    assert "regions" in facts["sha256"] and args.weights == "0.2,0.4,0.2,0.5"


# --- the real sets ---


@pytest.mark.realdata
def test_vqa_rad_defines_no_region(real_data, tmp_path, capsys):
    """What the documented commands leave of VQA-RAD: 1,023 training rows with answers, and nothing to look at."""
    files = ["--output", str(tmp_path / "rad.json"), "--grpo-output", str(tmp_path / "rad.jsonl")]
    prepare(["--dataset", "vqa_rad", "--data-dir", str(real_data("vqa_rad").parent), *files])
    args = parse_args(["--data-jsonl", str(tmp_path / "rad.jsonl")])
    train, _, facts = load_rows(args)
    assert len(train) == 1023 and facts["terms"]["dropped"] == ["counterfactual"]
    assert facts["terms"]["defined"]["box"] == facts["terms"]["defined"]["V"] == 0
    image = train[0]["image"]
    (tmp_path / "mine.csv").write_text(f"image,x0,y0,x1,y1\n{image.rsplit('/', 1)[1]},10,10,120,120\n")
    args = parse_args(["--data-jsonl", str(tmp_path / "rad.jsonl"), "--regions", str(tmp_path / "mine.csv")])
    _, _, facts = load_rows(args)
    assert facts["terms"]["dropped"] == [] and 0 < facts["terms"]["defined"]["box"] < 40
