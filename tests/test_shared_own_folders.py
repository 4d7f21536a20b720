"""Folders of one's own as a data set: classes from folder names, splits, what is refused; trained and searched."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data.image_sets import load_images
from shared.runtime import InputError
from task1_classification.train import main as train_classifier
from task3_retrieval.infer import main as infer
from task3_retrieval.train import main as train_embedding


def write_folder(folder, counts, seed=0, size=40, color=False):
    """{class: number}: noise, brighter from class to class."""
    rng = np.random.default_rng(seed)
    for level, (name, n) in enumerate(counts.items()):
        Path(folder, name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(60 * level, 60 * level + 80, (size, size) + (3,) * color).astype(np.uint8)
            Image.fromarray(pixels).save(Path(folder, name, f"{i}.png"))


def test_classes_and_splits(capsys):
    write_folder("chest", {"PNEUMONIA": 40, "NORMAL": 20})
    Path("chest/NORMAL/bad.png").write_text("no image")
    Path("chest/notes.txt").write_text("no image")
    data = load_images("chest/", "data", 64)
    assert (data.name, data.task, data.label_names) == ("chest", "binary-class", ["NORMAL", "PNEUMONIA"])
    assert {s: np.bincount(y).tolist() for s, y in data.labels.items()} == {
        "train": [14, 28],
        "val": [3, 6],
        "test": [3, 6],
    }
    assert all(x.shape[1:] == (1, 64, 64) for x in data.images.values()) and not data.phantom and data.official is False
    for split, images in data.images.items():  # NORMAL is the brighter one here
        means = images.float().mean((1, 2, 3))
        assert (means[data.labels[split] == 0] > means[data.labels[split] == 1].max()).all()
    assert len(data.labels["train"][:10].unique()) == 2  # mixed, so that --limit has both
    captured = capsys.readouterr()
    assert "1 files of chest were left out; bad.png" in captured.err and "notes.txt" in captured.out
    again = load_images("chest", "data", 64)
    assert again.sha256 == data.sha256 and (again.images["val"] == data.images["val"]).all()


def test_splits_that_are_there_are_kept():
    write_folder("chest/train", {"a": 20, "b": 20, "c": 20}, color=True)
    write_folder("chest/test", {"a": 3, "b": 4, "c": 5}, 1)
    data = load_images("chest", "data")
    assert {s: np.bincount(y).tolist() for s, y in data.labels.items()} == {
        "train": [17] * 3, "val": [3] * 3, "test": [3, 4, 5]
    }  # fmt: skip
    assert data.channels == 3 and data.task == "multi-class"


def test_copies_stay_in_one_split():
    write_folder("chest", {"a": 20, "b": 20})
    for i in range(20):
        Path(f"chest/a/copy{i}.png").write_bytes(Path(f"chest/a/{i}.png").read_bytes())
    data = load_images("chest", "data")
    contents = [{image.numpy().tobytes() for image in images} for images in data.images.values()]
    assert not contents[0] & contents[1] | contents[0] & contents[2] | contents[1] & contents[2]


def test_folders_that_are_no_data_set():
    write_folder("one", {"a": 5})
    write_folder("few", {"a": 8, "b": 2})
    for folder, sentence in (("one", "two or more folders of images"), ("few", "not every class has an image")):
        with pytest.raises(InputError, match=sentence):
            load_images(folder, "data")
    with pytest.raises(InputError, match="there is no 2-D MedMNIST set 'nothing'.*one folder of images per class"):
        load_images("nothing", "data")


def test_trained_and_searched(small_network):
    write_folder("chest", {"NORMAL": 40, "PNEUMONIA": 40})
    train = ["--data", "chest", "--device", "cpu", "--epochs", "1", "--batch-size", "16"]
    train_classifier([*train, "--out-dir", "task1"])
    train_embedding([*train, "--cnn-weights", "task1/best.pt"])
    run = json.loads(Path("outputs/task3_retrieval/train/001/metrics.json").read_text())
    assert run["dataset"]["name"] == "chest" and run["datasets"] == ["chest"] and not run["phantom"]

    from task3_retrieval.build_index import main as build
    from task3_retrieval.evaluate import main as evaluate

    evaluate(["--device", "cpu", "--resamples", "20", "--out-dir", "measured"])  # the embedding, and its own data
    measured = json.loads(Path("measured/metrics.json").read_text())
    assert measured["headline"] == "trained embedding" and measured["dataset"]["name"] == "chest"
    build(["--device", "cpu"])
    infer(["chest/PNEUMONIA", "--limit", "3", "--device", "cpu", "--out-dir", "found"])
    found = Path("found/predictions.csv").read_text().splitlines()
    assert len(found) == 4 and all(",PNEUMONIA," in row for row in found[1:])
    assert json.loads(Path("found/metrics.json").read_text())["n_pictures_missing"] == 0


def test_layouts_of_folders(capsys):
    """Splits by other names, below the classes, in other letters; films beside the classes; a set inside of itself."""
    for split in ("Training", "valid", "testing"):
        write_folder(f"names/{split}", {"a": 6, "b": 6})
    for name in ("a", "b"):
        write_folder(f"below/{name}", {"train": 6, "val": 6, "test": 6})
    write_folder("letters/train", {"NORMAL": 8, "ILL": 8})
    write_folder("letters/test", {"Normal": 6, "Ill": 6}, 1)
    for split in ("train", "val", "test"):
        write_folder(f"double/{split}", {"a": 6, "b": 6})
        write_folder(f"double/double/{split}", {"a": 6, "b": 6})
    Path("double/train/loose.png").write_bytes(Path("double/train/a/0.png").read_bytes())
    counts = {"names": [12, 12, 12], "below": [12, 12, 12], "letters": [14, 2, 12], "double": [12, 12, 12]}
    for folder, expected in counts.items():
        data = load_images(folder, "data")
        assert len(data.label_names) == 2 and [len(data.labels[s]) for s in ("train", "val", "test")] == expected
    assert "37 files of double were left out" in capsys.readouterr().err
