"""
build_index.py: the plain index of a split, folders of files, adding and removing, refusals; and the benchmark's short
form.
"""

import csv
import fcntl
import json
import os
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image

from benchmarks.retrieval import main as benchmark
from task3_retrieval.build_index import main
from task3_retrieval.index import CaseIndex

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds for a process of a few, on a machine that is busy


def build(*arguments, folder="built"):
    main([*map(str, arguments), "--device", "cpu", "--out-dir", folder])
    return CaseIndex.load(folder), json.loads((Path(folder) / "metrics.json").read_text())


def save_films(tiny_run, n=6, folder="films"):
    Path(folder).mkdir()
    films = tiny_run.data.images["test"][:n, 0].numpy()
    for i, film in enumerate(films):
        Image.fromarray(film).save(f"{folder}/{i:02d}.png")
    return films


def test_an_update_keeps_the_errors_of_before(tiny_run):
    save_films(tiny_run, 4)
    Path("films/broken.png").write_text("none")
    build("--images", "films", "--backbone", "pixels")
    save_films(tiny_run, 2, "more")
    Path("more/torn.png").write_text("none")
    main(["--update", "built", "--add", "--images", "more"])
    with open("built/errors.csv", newline="") as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["broken.png", "torn.png"]
    assert json.loads(Path("built/metrics.json").read_text())["n_errors"] == 2


def test_plain_index_of_the_test_images(tiny_run, capsys):
    index, metrics = build(
        "--data",
        "phantom",
        "--split",
        "test",
        "--index",
        "flat",
        "--metric",
        "l2",
        "--cnn-weights",
        tiny_run.checkpoint,
    )
    n = len(tiny_run.data.labels["test"])
    assert (metrics["n"], metrics["dim"], metrics["index"], metrics["metric"]) == (n, 512, "flat", "l2")
    assert index.ids.tolist() == list(range(n)) and index.labels.tolist() == tiny_run.data.labels["test"].tolist()
    assert (
        index.names[20] == "phantom/test/00020"
        and set(index.splits) == {"test"}
        and index.metadata["datasets"]["phantom"]["phantom"]
    )
    assert index.metadata["embedder"]["trained_on"] == "phantom" and index.metadata["typical"]["k"] == 10
    out = capsys.readouterr().out
    assert f"CNN weights: {tiny_run.checkpoint}\n" in out and f"{n} images of 512 numbers" in out
    plain = faiss.read_index(str(next(Path("built/index").glob("index-*.faiss"))))  # anybody's FAISS reads it
    distances, ids = plain.search(index.vectors[:5], 1)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4] and np.allclose(distances, 0, atol=1e-3)


def test_all_splits_and_weights_at_their_usual_place(tiny_run, capsys):
    Path("models").mkdir()
    Path("models/task1_model.pth").write_bytes(tiny_run.checkpoint.read_bytes())
    index, _ = build(
        "--split", "all", "--metric", "cosine", "--limit", "12"
    )  # auto: the set the weights were trained on
    assert "CNN weights: models/task1_model.pth" in capsys.readouterr().out
    assert (
        len(index) == 36
        and list(index.splits[[0, 12, 24]]) == ["train", "val", "test"]
        and np.allclose(np.linalg.norm(index.vectors, axis=1), 1)
    )


def test_other_backbones_and_colour(write_medmnist):
    write_medmnist("data", "bloodmnist", {"train": 24, "val": 16, "test": 16})
    index, metrics = build("--data", "bloodmnist", "--backbone", "pixels", "--split", "val", "--data-dir", "data")
    assert metrics["dim"] == 3 * 28 * 28 and len(index.label_names) == 8 and len(index) == 16
    index, metrics = build(
        "--data",
        "bloodmnist",
        "--backbone",
        "random:resnet18",
        "--input-size",
        "32",
        "--split",
        "val",
        "--data-dir",
        "data",
        folder="random",
    )
    assert metrics["dim"] == 512 and metrics["model"]["settings"]["image_size"] == 32


def test_a_folder_of_files_with_labels_and_bad_files(tiny_run, capsys):
    films = save_films(tiny_run, 6)
    Path("films/deeper").mkdir()
    Image.fromarray(films[0]).convert("RGB").resize((100, 80)).save("films/deeper/wide.jpg")
    Path("films/text.png").write_text("no image")
    Path("labels.csv").write_text(
        "file,label,split\n00.png,ill,a\n01.png,well,a\n02.png,,b\ndeeper/wide.jpg,ill,b\ngone.png,ill,b\n"
    )
    index, metrics = build("--images", "films", "--labels", "labels.csv", "--cnn-weights", tiny_run.checkpoint)
    assert metrics["n"] == 7 and metrics["n_errors"] == 1 and metrics["labels"] == {"ill": 2, "well": 1, "unknown": 4}
    by_name = {Path(n).name: i for i, n in enumerate(index.names)}
    assert index.label_of(by_name["wide.jpg"]) == "ill" and index.label_of(by_name["02.png"]) == "unknown"
    assert [index.splits[by_name[n]] for n in ("00.png", "02.png", "05.png")] == ["a", "b", "files"]
    (row,) = csv.DictReader(Path("built/errors.csv").open(newline=""))
    assert Path(row["path"]).name == "text.png" and "not an image" in row["error"]
    assert "labels of 3 of 8 images" in capsys.readouterr().out
    dataset, _ = build("--data", "phantom", "--split", "test", "--cnn-weights", tiny_run.checkpoint, folder="dataset")
    np.testing.assert_allclose(
        index.vectors[by_name["03.png"]], dataset.vectors[3], atol=1e-4
    )  # a film from a file is the film of the set


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_add_and_remove_in_place(kind, tiny_run, refused, capsys):
    weights = ["--cnn-weights", tiny_run.checkpoint]
    build("--data", "phantom", "--split", "val", "--index", kind, *weights)
    main(["--update", "built", "--add", "--split", "test", "--device", "cpu"])
    main(["--update", "built/index", "--remove", "0", "5", "40"])
    assert "80 images before, 77 now" in capsys.readouterr().out
    index = CaseIndex.load("built")
    assert (
        len(index) == 77
        and index.names[30] == "phantom/test/00000"
        and index.ids[30] == 32
        and not np.isin([0, 5, 40], index.ids).any()
    )
    whole, _ = build("--data", "phantom", "--split", "test", *weights, folder="whole")
    np.testing.assert_allclose(index.vectors[30:38], whole.vectors[:8], atol=1e-5)
    holder = os.open("built", os.O_RDONLY)  # as another process would
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert "another process is writing into built" in refused(main, ["--update", "built", "--remove", "1"])
    os.close(holder)
    assert "are in the index already" in refused(main, ["--update", "built", "--add", "--split", "test"])
    assert "no image with the id 999" in refused(main, ["--update", "built", "--remove", "999", "1"])
    assert "would be empty" in refused(main, ["--update", "whole", "--remove", *range(48)])
    save_films(tiny_run, 2)
    main(["--update", "built", "--add", "--images", "films"])
    index = CaseIndex.load("built")
    assert (
        len(index) == 79
        and index.ids[-1] == 81
        and index.labels[-1] == -1
        and index.label_names == ["normal", "pneumonia"]
    )


def test_updating_with_other_weights_changes_nothing(tiny_run, refused):
    from shared.runtime import digest, load_checkpoint, save_checkpoint

    build("--data", "phantom", "--split", "val", "--cnn-weights", tiny_run.checkpoint)
    state = load_checkpoint(tiny_run.checkpoint)
    state["state_dict"]["conv1.weight"] += 0.01
    state["weights_sha256"] = digest(state["state_dict"])
    save_checkpoint("other.pt", state)
    before = Path("built/index/manifest.json").read_bytes()
    assert "the queries are embedded with cnn other.pt" in refused(
        main, ["--update", "built", "--add", "--split", "test", "--cnn-weights", "other.pt"]
    )
    assert Path("built/index/manifest.json").read_bytes() == before


def test_refusals(tiny_run, refused, write_medmnist, own_folder):
    write_medmnist("data", "pneumoniamnist")
    write_medmnist("data", "chestmnist", {"train": 16, "val": 8, "test": 8})
    assert (
        "no task 1 weights at models/task1_model.pth or ./task1_model.pth; train them with python"
        " task1_classification/train.py" in refused(main, [])
    )
    message = refused(main, ["--data", "pneumoniamnist", "--data-dir", "data", "--cnn-weights", tiny_run.checkpoint])
    assert "was trained on phantom, not on pneumoniamnist" in message and "--allow-other-dataset" in message
    assert "several labels per image" in refused(
        main, ["--data", "chestmnist", "--data-dir", "data", "--backbone", "pixels"]
    )
    assert "at least 1,024 images" in refused(
        main, ["--data", "pneumoniamnist", "--data-dir", "data", "--backbone", "pixels", "--index", "ivfpq"]
    )
    assert "there is no task 1 classifier or task 3 embedding at gone.pt" in refused(main, ["--cnn-weights", "gone.pt"])
    assert "name it with --update" in refused(main, ["--add"])
    assert "needs --add, --remove" in refused(main, ["--update", "x"])
    assert "leave --metric out" in refused(main, ["--update", "x", "--add", "--metric", "l2"])
    assert "there is no finished index in gone" in refused(main, ["--update", "gone", "--remove", "1"])
    assert "leave --data, --split" in refused(main, ["--images", "x", "--split", "val"])
    assert "belongs to --images" in refused(main, ["--labels", "x.csv"])
    save_films(tiny_run, 1)
    Path("labels.csv").write_text("name,label\n00.png,ill\n")
    assert "labels.csv lacks the column file; it has name, label" in refused(
        main, ["--images", "films", "--labels", "labels.csv", "--backbone", "pixels"]
    )
    Path("labels.csv").write_text("file,label\nother.png,ill\n")
    assert "none of the 1 files named in labels.csv" in refused(
        main, ["--images", "films", "--labels", "labels.csv", "--backbone", "pixels"]
    )
    Path("labels.csv").write_text("file,label\n00.png,ill\n00.png,well\n")
    assert "00.png twice, with different labels" in refused(
        main, ["--images", "films", "--labels", "labels.csv", "--backbone", "pixels"]
    )
    Path("films/00.png").write_text("no image")
    assert "none of the 1 images could be used" in refused(main, ["--images", "films", "--backbone", "pixels"])
    assert not (own_folder / "outputs").exists()


def class_folders(tiny_run, folder="chest"):
    """Ten test films of each class as folder/NORMAL/0.png, folder/PNEUMONIA/0.png, ...; the same names in both."""
    images, labels = tiny_run.data.images["test"][:, 0].numpy(), tiny_run.data.labels["test"].numpy()
    for label, name in enumerate(("NORMAL", "PNEUMONIA")):
        Path(folder, name).mkdir(parents=True)
        for i, film in enumerate(images[labels == label][:10]):
            Image.fromarray(film).save(f"{folder}/{name}/{i}.png")


def test_folders_named_like_classes_give_the_labels(tiny_run, capsys):
    class_folders(tiny_run)
    class_folders(tiny_run, "split/train")
    class_folders(tiny_run, "split/Test")
    for folder, splits in (("chest", {"files"}), ("split", {"train", "test"})):
        index, metrics = build("--images", folder, "--backbone", "pixels", "--overwrite")
        assert metrics["labels"] == dict.fromkeys(("NORMAL", "PNEUMONIA"), 10 * len(splits))
        assert all(index.label_of(i) == Path(name).parent.name for i, name in enumerate(index.names))
        assert set(index.splits) == splits and "from the names of their folders" in capsys.readouterr().out
    save_films(tiny_run, 4)
    Path("films/patient1").mkdir()
    Path("films/00.png").rename("films/patient1/00.png")
    assert build("--images", "films", "--backbone", "pixels", "--overwrite")[1]["labels"] == {"unknown": 4}


def test_own_folders_are_a_data_set(tiny_run):
    class_folders(tiny_run)
    index, metrics = build("--data", "chest/", "--split", "all", "--backbone", "pixels")
    assert metrics["labels"] == {"NORMAL": 10, "PNEUMONIA": 10} and metrics["datasets"] == ["chest"]
    assert index.names[0] == "chest/train/00000" and not metrics["phantom"]


def test_names_that_could_be_two_images_are_refused(tiny_run, refused):
    class_folders(tiny_run)
    Path("labels.csv").write_text("file,label\n1.png,normal\n")
    for images in (["chest"], ["chest/NORMAL", "chest/PNEUMONIA"]):
        message = refused(main, ["--images", *images, "--labels", "labels.csv", "--backbone", "pixels"])
        assert "names 1.png, which could be" in message and "NORMAL/1.png" in message
    Path("labels.csv").write_text("\ufefffile,label\nNORMAL\\1.png,a\nPNEUMONIA/1.png,b\n3.PNG,nan\n", "utf-8")
    Path("chest/NORMAL/3.png").unlink()
    index, metrics = build("--images", "chest", "--labels", "labels.csv", "--backbone", "pixels")
    assert metrics["labels"] == {"a": 1, "b": 1, "unknown": 17}


@pytest.mark.parametrize("blank", ["", "nan", "NaN", "None", "N/A", "-", "XXXX", " "])
def test_blank_labels_are_unknown(tiny_run, refused, blank):
    save_films(tiny_run, 3)
    Path("labels.csv").write_text(f"file,label\n00.png,ill\n01.png,{blank}\n02.png,{blank}\n")
    labels = ["--images", "films", "--labels", "labels.csv", "--backbone", "pixels"]
    assert build(*labels)[1]["labels"] == {"ill": 1, "unknown": 2}
    Path("labels.csv").write_text(f"file,label\n00.png,{blank}\n01.png,{blank}\n02.png,{blank}\n")
    assert "there is no label in it" in refused(main, labels)


def test_file_names_of_any_bytes(tiny_run):
    films = save_films(tiny_run, 2)
    name = os.fsencode("films/") + b"a\xff" + "é".encode() * 60 + b".png"
    with open(name, "wb") as file:
        Image.fromarray(films[0]).save(file, format="png")
    index, _ = build("--images", "films", "--backbone", "pixels")
    assert len(index) == 3 and os.fsencode(index.names[2]).endswith(name[6:])
    Path("loop.png").symlink_to("loop.png")
    assert build("--images", "films", "loop.png", "--backbone", "pixels", "--overwrite")[1]["n_errors"] == 1


def test_sizes_that_a_network_cannot_take(refused):
    arguments = ["--data", "phantom", "--backbone", "random:vit_b_16"]
    assert "cannot take images of 64 pixels" in refused(main, [*arguments, "--input-size", "64"])
    assert "must be between 8 and 2048" in refused(main, [*arguments, "--input-size", "1000000000"])
    assert "must be between 1 and 65536" in refused(main, [*arguments, "--batch-size", "1000000000"])


def test_a_folder_that_holds_a_run_is_kept(refused):
    arguments = ["--data", "phantom", "--backbone", "pixels", "--split", "val"]
    build(*arguments)
    assert "already holds a run" in refused(main, [*arguments, "--out-dir", "built"])
    index, _ = build(*arguments, "--overwrite", "--metric", "cosine")
    assert index.metric == "cosine" and len(list(Path("built/index").iterdir())) == 4


def test_dry_run(own_folder):
    main(["--dry-run"])
    index = CaseIndex.load("outputs/task3_retrieval/build_index/dry-run")
    assert (
        len(index) == 96 and index.metadata["embedder"]["backbone"] == "pixels" and not (own_folder / "models").exists()
    )


def test_short_benchmark(capsys):
    result = benchmark(["--small", "--out-dir", "measured", "--cache", "cache", "--device", "cpu"])
    assert (
        json.loads(Path("measured/retrieval.json").read_text())["large_gallery"]["rows"]
        == result["large_gallery"]["rows"]
    )
    rows = {r["way"]: r for r in result["large_gallery"]["rows"]}
    assert all(
        r["recall_at_10"] == 1
        for name, r in rows.items()
        if name.startswith(("FAISS flat", "NumPy", "torch", "scikit"))
    )
    hnsw = [r["recall_at_10"] for name, r in rows.items() if name.startswith("HNSW")]
    assert len(hnsw) == 6 and hnsw[-1] > 0.95 and hnsw[-1] >= hnsw[0]
    assert all(r["same_lists"] > 0.99 for r in result["small_gallery"]["ways"].values() if "same_lists" in r)
    files = {p: p.stat().st_mtime_ns for p in Path("cache").iterdir()}
    benchmark(["--small", "--out-dir", "measured", "--cache", "cache", "--device", "cpu"])
    assert files == {p: p.stat().st_mtime_ns for p in Path("cache").iterdir()}  # built once


@pytest.mark.realdata
@pytest.mark.slow
def test_the_624_real_test_images(real_data):
    folder = real_data("pneumoniamnist/pneumoniamnist.npz").parent
    index, metrics = build(
        "--data",
        "pneumoniamnist",
        "--data-dir",
        folder,
        "--split",
        "test",
        "--backbone",
        "random:resnet18",
        "--input-size",
        "28",
    )
    assert len(index) == 624 and metrics["dim"] == 512 and metrics["labels"] == {"normal": 234, "pneumonia": 390}


@pytest.mark.slow
def test_two_processes_build_the_same_index(start_script, own_folder):
    command = [
        ROOT / "task3_retrieval" / "build_index.py",
        "--data",
        "phantom",
        "--limit",
        "41",
        "--backbone",
        "pixels",
        "--device",
        "cpu",
    ]
    main([*map(str, command[1:]), "--out-dir", "alone"])
    two = start_script([*command, "--out-dir", "two"], own_folder, ranks=2)
    assert two.wait(PATIENCE) == 0, Path("output.txt").read_text()
    alone, two = CaseIndex.load("alone"), CaseIndex.load("two")
    assert (alone.vectors == two.vectors).all() and (alone.names == two.names).all() and len(two) == 41


def test_an_update_keeps_files_of_others_and_tells_what_the_index_holds_now(tiny_run, refused):
    build("--data", "phantom", "--split", "test", "--backbone", "pixels")
    for name in ("cases-reviewed.csv", "vectors-mine.npy"):
        Path("built/index", name).write_text("mine")
    main(["--update", "built", "--remove", "3", "5"])
    metrics = json.loads(Path("built/metrics.json").read_text())
    assert metrics["n"] == 46 and sum(metrics["labels"].values()) == 46 and metrics["phantom"]
    assert {p.name for p in Path("built/index").glob("*-*") if p.read_bytes() == b"mine"} == {
        "cases-reviewed.csv",
        "vectors-mine.npy",
    }
    for flags in (["--split", "val"], ["--images", "films"], ["--limit", "3"]):
        assert "give --add too" in refused(main, ["--update", "built", "--remove", "7", *flags])


def test_labels_as_people_write_them(tiny_run, capsys):
    save_films(tiny_run, 6)
    Path("films/05.png").rename("films/e\u0301.png")  # as macOS writes it
    Path("labels.csv").write_text(
        "File;Label;Split\n00.png;Ill;Training\n01.png;ILL;train\n02.png;unknown;\n\u00e9.png;well;\nx.png;well;\n",
        "utf-16",
    )
    index, metrics = build("--images", "films", "--labels", "labels.csv", "--backbone", "pixels")
    assert metrics["labels"] == {"Ill": 2, "well": 1, "unknown": 3} and list(index.splits[:2]) == ["train", "train"]
    assert "1 of the 5 files named in labels.csv are not among the images" in capsys.readouterr().out
