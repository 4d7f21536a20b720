"""
medmnist.py: every kind of set read as it lies there, nothing downloaded that is present, nothing replaced in silence.
"""

import hashlib
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch

from shared.data import image_sets
from shared.data.image_sets import INFO, DataNotFound, load_images, load_medmnist, load_phantom
from shared.runtime import InputError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every download fails, and is counted."""
    calls = []

    def fail(**options):
        calls.append(options)
        raise RuntimeError("Something went wrong when downloading! Go to the homepage to download manually.")

    for info in INFO.values():
        monkeypatch.setattr(medmnist, info["python_class"], fail)
    return calls


# --- reading ---

KINDS = {
    "binary, grey": ("breastmnist", 28, torch.int64, 1),
    "multi-class, colour": ("bloodmnist", 28, torch.int64, 8),
    "multi-class, grey, 64": ("octmnist", 64, torch.int64, 4),
    "ordinal, colour, 64": ("retinamnist", 64, torch.int64, 5),
    "multi-label, grey": ("chestmnist", 28, torch.float32, 14),
}


@pytest.mark.parametrize("name, size, label_type, outputs", KINDS.values(), ids=KINDS)
def test_every_kind_of_set(name, size, label_type, outputs, write_medmnist, no_network):
    counts = {"train": 20, "val": 15, "test": 16}
    path = write_medmnist("folder", name, counts, size)
    data, arrays = load_images(name.capitalize(), "folder", size), np.load(path)
    assert (data.name, data.size, data.path, data.num_outputs) == (name, size, path, outputs)
    assert data.task == INFO[name]["task"] and data.label_names == list(INFO[name]["label"].values())
    for split, n in counts.items():
        images, labels = data.images[split], data.labels[split]
        assert images.shape == (n, data.channels, size, size) and images.dtype == torch.uint8 and images.is_contiguous()
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).squeeze(-1).numpy(), arrays[f"{split}_images"])
        assert labels.dtype == label_type
        np.testing.assert_array_equal(labels.reshape(n, -1).numpy(), arrays[f"{split}_labels"])
    assert data.multi_label == (name == "chestmnist") and not data.phantom
    assert no_network == []
    assert name in str(data) and f"train {counts['train']}" in str(data) and str(path) in str(data)


def test_limit(write_medmnist):
    write_medmnist("folder", "breastmnist")
    data = load_images("breastmnist", "folder")
    first = data.images["val"][:7]
    data.limit(7)
    assert [len(v) for v in (*data.images.values(), *data.labels.values())] == [7] * 6 and torch.equal(
        data.images["val"], first
    )


def test_a_folder_of_its_own_below_the_data_folder(write_medmnist):
    inside = write_medmnist("folder/breastmnist", "breastmnist")
    assert load_images("breastmnist", "folder").path == inside
    above = write_medmnist("folder", "breastmnist", seed=1)
    assert load_images("breastmnist", "folder").path == above


def test_digest_and_whether_it_is_the_official_file(write_medmnist, monkeypatch):
    path = write_medmnist("folder", "breastmnist")
    content = path.read_bytes()
    data = load_images("breastmnist", "folder")
    assert (
        data.sha256 == hashlib.sha256(content).hexdigest()
        and data.official is False
        and "not the official file" in data.source
    )
    monkeypatch.setitem(INFO, "breastmnist", INFO["breastmnist"] | {"MD5": hashlib.md5(content).hexdigest()})
    data = load_images("breastmnist", "folder")
    assert data.official is True and data.source == f"{path} (the official file)"
    assert data.facts() == {
        "name": "breastmnist",
        "size": 28,
        "sha256": data.sha256,
        "official": True,
        "source": data.source,
        "phantom": False,
    }


def test_the_size_has_its_own_official_digest(write_medmnist, monkeypatch):
    path = write_medmnist("folder", "breastmnist", size=64)
    monkeypatch.setitem(
        INFO, "breastmnist", INFO["breastmnist"] | {"MD5_64": hashlib.md5(path.read_bytes()).hexdigest()}
    )
    assert load_images("breastmnist", "folder", 64).official is True


def test_every_set_of_the_package_is_known():
    assert {"pneumoniamnist", "chestmnist", "pathmnist", "retinamnist", "tissuemnist"} <= set(INFO) and not any(
        name.endswith("3d") for name in INFO
    )
    for info in INFO.values():
        assert info["task"] in ("binary-class", "multi-class", "ordinal-regression", "multi-label, binary-class")
        assert {"MD5", "MD5_64", "MD5_128", "MD5_224", "url", "url_64", "url_128", "url_224"} <= set(info)


# --- files that cannot be used ---


def change(path, **arrays):
    np.savez(path, **(dict(np.load(path)) | arrays))


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"val_images": np.zeros((32, 32, 32), np.uint8)}, "not uint8 (28, 28)"),
        ({"val_images": np.zeros((32, 28, 28, 3), np.uint8)}, "not uint8 (28, 28)"),
        ({"val_images": np.zeros((32, 28, 28), np.float32)}, "not uint8 (28, 28)"),
        ({"val_images": np.zeros((31, 28, 28), np.uint8)}, "with 1 label each"),
        (
            {"test_images": np.zeros((0, 28, 28), np.uint8), "test_labels": np.zeros((0, 1), np.uint8)},
            "not uint8 (28, 28)",
        ),
        ({"val_labels": np.zeros(32, np.uint8)}, "with 1 label each"),
        ({"val_labels": np.zeros((32, 2), np.uint8)}, "with 1 label each"),
        ({"val_labels": np.full((32, 1), 2, np.uint8)}, "labels uint8 from 2 to 2, which breastmnist does not have"),
        ({"val_labels": np.full((32, 1), 0.5)}, "which breastmnist does not have"),
        ({"val_labels": np.array([[{}]] * 32, object)}, "is not a MedMNIST file, or is damaged"),
    ],
)
def test_wrong_arrays(arrays, message, write_medmnist, no_network):
    change(write_medmnist("folder", "breastmnist"), **arrays)
    with pytest.raises(InputError) as error:
        load_images("breastmnist", "folder")
    assert message in str(error.value) and not isinstance(error.value, DataNotFound) and no_network == []


def test_wrong_labels_of_a_multi_label_set(write_medmnist):
    path = write_medmnist("folder", "chestmnist")
    change(path, val_labels=np.full((32, 14), 2, np.uint8))
    with pytest.raises(InputError, match="labels uint8 from 2 to 2"):
        load_images("chestmnist", "folder")
    change(path, val_labels=np.zeros((32, 13), np.uint8))
    with pytest.raises(InputError, match="with 14 labels each"):
        load_images("chestmnist", "folder")


def test_damaged_files_are_refused_and_left_alone(write_medmnist, no_network):
    path = write_medmnist("folder", "breastmnist")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200:400] = bytes(200)  # inside of the compressed training images
    without = {k: v for k, v in dict(np.load(path)).items() if k != "test_labels"}
    np.savez("without.npz", **without)
    np.save("array.npy", np.zeros((3, 3)))
    for content in (
        b"",
        b"not a zip file",
        whole[: len(whole) // 2],
        whole[:-30],
        bytes(flipped),
        Path("without.npz").read_bytes(),
        Path("array.npy").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a MedMNIST file, or is damaged; delete it") as error:
            load_images("breastmnist", "folder")
        assert not isinstance(error.value, DataNotFound) and path.read_bytes() == content
        with pytest.raises(InputError):  # and auto does not pass over it either
            load_images("auto", "folder", auto="breastmnist")
    assert no_network == []


# --- names, sizes, and what is not there ---


@pytest.mark.parametrize("name", ["mnist", "organmnist3d", "", "pneumonia"])
def test_unknown_names(name):
    with pytest.raises(InputError, match="there is no 2-D MedMNIST set .*; there are .*pneumoniamnist.*, and phantom"):
        load_images(name, "folder")


def test_unknown_size():
    with pytest.raises(InputError, match="not 32"):
        load_images("pneumoniamnist", "folder", 32)


def test_a_set_asked_for_by_name_that_is_nowhere(no_network, own_folder):
    with pytest.raises(DataNotFound) as error:
        load_images("pneumoniamnist", "folder", 64)
    assert (
        str(error.value) == "pneumoniamnist (64 px) is not in folder and could not be downloaded; fetch"
        f" {INFO['pneumoniamnist']['url_64']} and save it as folder/pneumoniamnist_64.npz"
    )
    assert no_network == [{"split": "train", "download": True, "root": "folder", "size": 64}]


def test_auto_falls_back_to_the_phantom_and_says_so(no_network, capsys):
    data = load_images("auto", "folder")
    assert data.phantom and data.name == "phantom" and data.official is None and len(no_network) == 1
    printed = capsys.readouterr().out
    assert "PHANTOM DATA: going on with drawn images. No number of this run says anything about real X-rays." in printed
    assert "pneumoniamnist (28 px) is not in folder" in printed and "*" * 50 in printed


def test_auto_takes_the_file_that_is_there(write_medmnist, no_network, capsys):
    write_medmnist("folder")
    assert (
        load_images("auto", "folder").name == "pneumoniamnist"
        and no_network == []
        and "PHANTOM" not in capsys.readouterr().out
    )


def test_what_is_absent_is_downloaded_to_its_place(write_medmnist, monkeypatch):
    def fetch(split, download, root, size):
        write_medmnist(root, "breastmnist", size=size)

    monkeypatch.setattr(medmnist, "BreastMNIST", fetch)
    data = load_images("breastmnist", "new/folder", 64)
    assert data.path == Path("new/folder/breastmnist_64.npz") and data.size == 64


def test_a_data_folder_that_cannot_be_made():
    Path("file").write_text("taken")
    with pytest.raises(DataNotFound, match="that folder cannot be written; choose another --data-dir"):
        load_images("breastmnist", "file")


# --- the phantom ---


def test_the_phantom_has_the_same_form():
    data = load_images("phantom", "nowhere", 32)
    assert (data.task, data.num_outputs, data.channels, data.path, data.size) == ("binary-class", 1, 1, None, 32)
    assert {s: len(x) for s, x in data.images.items()} == image_sets.PHANTOM_COUNTS
    for split, images in data.images.items():
        assert (
            images.shape[1:] == (1, 32, 32)
            and images.dtype == torch.uint8
            and set(data.labels[split].tolist()) == {0, 1}
        )
    assert data.facts()["phantom"] is True and not Path("nowhere").exists()


def test_the_phantom_is_the_same_for_everybody_and_its_digest_tells():
    counts = {"train": 6, "val": 3, "test": 3}
    first, again, other = load_phantom(28, counts), load_phantom(28, counts), load_phantom(28, counts, seed=1)
    assert torch.equal(first.images["train"], again.images["train"]) and first.sha256 == again.sha256 != other.sha256
    assert load_phantom(28, counts | {"test": 2}).sha256 != first.sha256


# --- the real file ---


@pytest.mark.realdata
def test_the_real_file(real_data, no_network):
    path = real_data("pneumoniamnist/pneumoniamnist.npz")
    data = load_medmnist("pneumoniamnist", path.parent.parent)
    assert data.path == path and no_network == []
    assert {split: len(x) for split, x in data.images.items()} == {"train": 4708, "val": 524, "test": 624}
    assert data.sha256 == "ce8250bf5debc3c389b89affcc1d9feac579b26e875a848301e9f937bb0c2eee" and data.official is False
    pixels = data.images["train"].float() / 255
    assert round(pixels.mean().item(), 4) == 0.5719 and round(pixels.std().item(), 4) == 0.1684
    assert [int(data.labels[s].sum()) for s in ("train", "val", "test")] == [3494, 389, 390] and data.label_names == [
        "normal",
        "pneumonia",
    ]
