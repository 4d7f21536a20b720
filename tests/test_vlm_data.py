"""vlm_data.py and vlm_prepare.py: labels from index terms, splits by patient, tables that are read back, refusals."""

import csv
import json

import numpy as np
import pytest

from shared.data.iu_xray import read_reports
from shared.metrics.labels import CONDITIONS
from shared.data.iu_xray import MESH14, item_matches, mesh_labels
from shared.runtime import InputError
from task1_classification.vlm_data import MESH9, SHARES, SPLITS, iterative_stratification, load_again
from task1_classification.vlm_data import load_films, phantom_films, split_by_patient, text_labels
from task1_classification.vlm_prepare import agreement, main
from task1_classification.vlm_train import main as train
from task1_classification.vlm_zero_shot import main as ask


def table(path, lines, columns="id,patient,split,image,Edema"):
    path.write_text("\n".join([columns, *lines]) + "\n")
    return path


def film(folder, name="a.png"):
    from PIL import Image

    Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / name)
    return name


# --- labels ---


def test_items_are_compared_whole_and_with_all_qualifiers():
    assert item_matches("Opacity/lung/base/round", "Opacity/lung/round") and item_matches("Opacity/lung", "Opacity")
    assert item_matches("Subcutaneous  Emphysema", "subcutaneous emphysema")
    assert not item_matches("Opacity/breast", "Opacity/lung")
    assert not item_matches("Pulmonary Emphysema", "Emphysema")
    assert not item_matches("Lung/emphysema", "Emphysema")


def test_mesh_labels_by_hand():
    found = mesh_labels(["Cardiac Shadow/enlarged/mild", "Costophrenic Angle/left/blunted"], MESH14)
    assert [name for name, value in found.items() if value] == ["Cardiomegaly"]
    found = mesh_labels(["Cardiac Shadow/obscured", "Costophrenic Angle/left/blunted"], MESH9)
    assert [name for name, value in found.items() if value] == ["Pleural Effusion"]
    assert mesh_labels(["Costophrenic Angle/obscured"], MESH9)["Pleural Effusion"] == 0
    assert mesh_labels(["normal"], MESH14) == dict.fromkeys(MESH14, 0) | {"No Finding": 1}
    assert set(mesh_labels(["No Indexing"], MESH14).values()) == {None} == set(mesh_labels([], MESH9).values())
    assert tuple(MESH14) == CONDITIONS


def test_text_labels_know_what_is_only_suspected():
    found = text_labels("There is a left pleural effusion. Pneumonia cannot be excluded. No pneumothorax.")
    assert found["Pleural Effusion"] == 1 and found["Pneumonia"] is None and found["Pneumothorax"] == 0
    assert found["Fracture"] == 0
    assert set(text_labels(" ").values()) == {None}


@pytest.mark.realdata
def test_nine_labels_of_all_reports_of_iu_xray(real_data):
    """Counted by hand from the column Problems; the angle is less than 79, since 6 of them are not blunted."""
    rows, _ = read_reports(real_data("iu_xray"))
    counts = {name: sum(mesh_labels(r["mesh"], MESH9)[name] or 0 for r in rows) for name in MESH9}
    expected = {"Atelectasis": 315, "Cardiomegaly": 345, "Consolidation": 185, "Edema": 92, "Pneumonia": 40}
    assert counts.items() >= (expected | {"Granuloma": 359, "Emphysema": 96, "No Finding": 1379}).items()
    assert counts["Pleural Effusion"] <= 192


@pytest.mark.realdata
@pytest.mark.parametrize("split", ["patient", "r2gen", "small"])
def test_iu_films_are_split_by_patient(real_data, split):
    films = load_films("iu_xray", real_data("iu_xray").parent, split=split)
    patients = {s: set(films.column("patient", films.rows_of(s))) for s in SPLITS}
    assert not patients["train"] & patients["test"] and not patients["train"] & patients["val"]
    if split == "patient":
        assert {s: len(p) for s, p in patients.items()} == {"train": 2566, "val": 550, "test": 550}
        assert len(films.rows) == 3794 and np.isnan(films.truth).all(1).sum() == 91
        share = [np.nanmean(films.truth[films.rows_of(s)], 0) for s in SPLITS]
        assert np.abs(share[0] - share[2]).max() < 0.01  # every label alike
    if split == "small":
        assert len(patients["test"]) == 100
    if split == "r2gen":
        assert len(patients["test"]) == 590 and films.notes["left_out"]["not in the R2Gen split"] > 500


@pytest.mark.realdata
def test_index_and_report_labeller_agree_where_both_have_words(real_data):
    found = {row["label"]: row for row in agreement(load_films("iu_xray", real_data("iu_xray").parent))}
    assert found["Cardiomegaly"]["kappa"] > 0.95 and found["Atelectasis"]["kappa"] > 0.95
    assert found["No Finding"]["text only"] > found["No Finding"]["index only"]  # the index has more to say


# --- splits ---


def test_stratification_shares_out_every_label():
    draw = np.random.default_rng(0)
    has = draw.random((1000, 5)) < [0.5, 0.2, 0.05, 0.02, 0.01]
    place = iterative_stratification(has, [0.7, 0.15, 0.15], seed=1)
    assert np.array_equal(place, iterative_stratification(has, [0.7, 0.15, 0.15], seed=1))
    assert not np.array_equal(place, iterative_stratification(has, [0.7, 0.15, 0.15], seed=2))
    assert np.abs(np.bincount(place) - [700, 150, 150]).max() <= 5
    for label in has.T:
        counts = np.bincount(place[label], minlength=3)
        assert np.abs(counts - label.sum() * np.array([0.7, 0.15, 0.15])).max() <= 1.5


def test_phantom_patients_are_in_one_split():
    films = phantom_films(16, 32, conditions=["Cardiomegaly", "Consolidation"])
    where = {}
    for row in films.rows:
        assert where.setdefault(row["patient"], row["split"]) == row["split"]
    assert films.truth.shape == (24, 2) and len(set(films.column("id"))) == 24


# --- tables ---


def test_a_prepared_table_is_read_back(own_folder):
    main(["--dry-run", "--out-dir", "run"])
    films, drawn = load_films("run/films.csv"), phantom_films(16, 64)
    assert films.phantom and films.labels == drawn.labels and np.array_equal(films.truth, drawn.truth)
    assert [row["report"] for row in films.rows] == [row["report"] for row in drawn.rows]
    metrics = json.loads((own_folder / "run/metrics.json").read_text())
    assert metrics["audit"]["patients in two splits"] == 0
    assert metrics["dataset"]["fingerprint"] == films.fingerprint() == load_again(films.facts(), "data").fingerprint()
    counts = {row["label"]: row["train_positive"] for row in metrics["counts"]}
    assert counts["Cardiomegaly"] == drawn.truth[drawn.rows_of("train"), 2].sum()


def test_unknown_stays_unknown_and_limit_and_only_are_kept(own_folder):
    name = film(own_folder)
    path = table(own_folder / "t.csv", [f"{i},{i},train,{name},{v},0" for i, v in enumerate(["1", "0", "", "1.0"])],
                 "id,patient,split,image,Edema,Mass")  # fmt: skip
    films = load_films(path)
    assert films.truth[:, 0].tolist()[:2] == [1, 0] and np.isnan(films.truth[2, 0]) and films.truth[3, 0] == 1
    assert films.usable("train").tolist() == [True, False]
    again = load_again(load_films(path, only=["Mass"], limit=2).facts(), "data")
    assert again.labels == ("Mass",) and len(again.rows) == 2


def test_medmnist_is_a_set_with_one_label(own_folder, write_medmnist):
    write_medmnist(own_folder / "data")
    films = load_films("pneumoniamnist", "data")
    assert films.labels == ("pneumonia",) and len(films.rows_of("test")) == 40 and set(films.truth[:, 0]) == {0, 1}
    write_medmnist(own_folder / "data", "bloodmnist")
    films = load_films("bloodmnist", "data")
    assert len(films.labels) == 8 and (films.truth.sum(1) == 1).all() and films.rows[0]["image"].shape == (28, 28, 3)


REFUSALS = {
    "lacks columns with labels": ("id,patient,split,image,report", "1,1,train,a.png,text"),
    "lacks the column split; it has id, patient, image, Edema": ("id,patient,image,Edema", "1,1,a.png,1"),
    "is '2', not 1, 0 or empty": ("id,patient,split,image,Edema", "1,1,train,a.png,2"),
    "not train, val or test": ("id,patient,split,image,Edema", "1,1,dev,a.png,1"),
    "patient 1 is in train and in test": ("id,patient,split,image,Edema", "1,1,train,a.png,1\n2,1,test,a.png,0"),
    "id says nothing": ("id,patient,split,image,Edema", "-,1,train,a.png,1"),
    "patient says nothing": ("id,patient,split,image,Edema", "1,nan,train,a.png,1"),
    "the id 1 stood there before": ("id,patient,split,image,Edema", "1,1,train,a.png,1\n1,2,test,a.png,0"),
    "1 of 1 images": ("id,patient,split,image,Edema", "1,1,train,gone.png,1"),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_tables_that_cannot_be_used(own_folder, refused, sentence):
    film(own_folder)
    columns, lines = REFUSALS[sentence]
    path = table(own_folder / "t.csv", [lines], columns)
    assert sentence in refused(main, ["--data", path])


def test_damaged_films_are_left_out_and_counted(own_folder, capsys):
    name = film(own_folder)
    (own_folder / "cut.png").write_bytes((own_folder / name).read_bytes()[:45])
    path = table(own_folder / "t.csv", [f"1,1,train,{name},nan", "2,2,train,cut.png,0", f"3,3,test,{name},1"])
    films = load_films(path)
    assert films.column("id") == ["1", "3"] and np.isnan(films.truth[0, 0]) and films.notes["damaged_films"] == 1
    assert "1 films that cannot be read" in capsys.readouterr().out


def test_blanks_do_not_make_another_patient(own_folder, refused):
    name = film(own_folder)
    path = table(own_folder / "t.csv", [f"1,7,train,{name},1", f"2,7 , test,{name} ,0"])
    assert "patient 7 is in train and in test" in refused(main, ["--data", path])
    path = table(own_folder / "phantom.csv", [f"1,7,train,{name},1"])
    assert not load_films(path).phantom  # by its column study, not by its name
    table(path, [f"1,7,train,{name},1,0"], "id,patient,split,image,Edema,Edema")
    assert "two columns of one name" in refused(main, ["--data", path])


def test_overwrite_spares_what_is_read(own_folder, refused):
    main(["--dry-run", "--out-dir", "run"])
    before = sorted(own_folder.rglob("run/**/*"))
    over, small = ["--data", "run/films.csv", "--out-dir", "run", "--overwrite"], ["--model", "tiny:siglip"]
    for script, more in ((main, []), (train, [*small, "--mode", "head"]), (ask, small)):
        assert "which is read here" in refused(script, [*over, *more])
        assert sorted(own_folder.rglob("run/**/*")) == before


def test_other_refusals(own_folder, refused):
    assert "28 to 512 pixels" in refused(main, ["--data", "phantom", "--image-size", "1"])
    assert "there is no table" in refused(main, ["--data", "nothing.csv"])
    for shares in (["0.5", "0.1", "0.1"], ["0", "0", "1"]):
        assert "must add up to 1" in refused(main, ["--split", "small", "--shares", *shares])
    assert "leave --shares out" in refused(main, ["--split", "r2gen", "--shares", "0.5", "0.25", "0.25"])
    rows = [{"patient": str(i)} for i in range(150)]
    with pytest.raises(InputError, match="takes 100 patients for test, and there are 150"):
        split_by_patient(rows, np.zeros((150, 1)), SHARES, 0, 100)
    name = film(own_folder)
    path = table(own_folder / "t.csv", [f"1,1,train,{name},1"])
    assert "no film in one of" in refused(main, ["--data", path])
    with open(path, newline="") as file:
        assert len(list(csv.reader(file))) == 2
