"""What several test files share: a folder of their own, small data sets, a small network, one trained classifier."""

import ctypes
import functools
import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
if os.environ.get("MEDVLM_DATA"):  # the tests change folder: a relative path has to be followed before
    os.environ["MEDVLM_DATA"] = str(Path(os.environ["MEDVLM_DATA"]).resolve())

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn

from shared.data import image_sets
from shared.phantom import phantom_classification

# Freed memory stays with the process: to take it from the system anew is half the time of tests with large arrays.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    for option, value in zip((-1, -3), KEEP_MEMORY.values(), strict=True):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, int(value))
# Side by side (pytest -n 2) each process has one core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
gc.collect()
gc.freeze()  # the scripts collect often, and need not look through all modules each time


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Scripts write outputs/, models/ and reports/ where they are started: here, never in the repository."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.rglob("*.pt*"):  # a training state has 200 MB, and pytest keeps the folders of three runs
        if path.is_file():
            path.unlink()


@pytest.fixture(scope="session", autouse=True)
def small_phantom():
    """`--data phantom` draws few images, and the same ones once."""

    def draw(seed, counts, size):
        return {name: array.copy() for name, array in films(seed, tuple(counts.items()), size).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sets, "PHANTOM_COUNTS", {"train": 96, "val": 32, "test": 48})
        patch.setattr("shared.phantom.phantom_classification", draw)
        yield


@pytest.fixture(scope="session", autouse=True)
def coarse_figures():
    """Figures of a fifth of their pixels a side, laid out once: what is drawn is tested, not how finely."""
    save = Figure.savefig

    def coarsely(figure, path, **options):
        figure.set_layout_engine("none")
        save(figure, path, **options | {"dpi": 25})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", coarsely)
        yield


@pytest.fixture
def real_data():
    """real_data("pneumoniamnist/pneumoniamnist.npz") -> its path; skips where $MEDVLM_DATA does not have it."""

    def find(name):
        folder = os.environ.get("MEDVLM_DATA")
        if not folder:
            pytest.skip("needs the real data: set MEDVLM_DATA to the folder that holds them")
        path = Path(folder) / name
        if not path.exists():
            pytest.skip(f"MEDVLM_DATA has no {name}")
        return path

    return find


# --- running scripts ---


@pytest.fixture
def refused(capsys):
    """refused(main, arguments) -> the one sentence with which the script ends, exit code 2, no traceback."""

    def run(main, arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "error: " in lines[0], lines
        return lines[0]

    return run


@pytest.fixture(scope="session")
def start_script():
    """start_script([path, arguments], folder, ranks=1) -> a running Script, its output in folder/output.txt."""
    import processes

    processes.start_server(**KEEP_MEMORY, OMP_NUM_THREADS="1")
    return processes.Script


# --- data and network ---


@functools.lru_cache
def films(seed, counts, size):
    return phantom_classification(seed, dict(counts), size)


@pytest.fixture(scope="session")
def write_medmnist():
    """
    write_medmnist(folder, name, counts) -> path of a small file in MedMNIST's layout. PneumoniaMNIST gets phantom
    films; elsewhere each class or label brightens its own patch, and every class is in every split.
    """

    def write(folder, name="pneumoniamnist", counts=None, size=28, seed=0):
        counts = counts or {"train": 64, "val": 32, "test": 40}
        info = image_sets.INFO[name]
        if name == "pneumoniamnist":
            arrays = films(5 + seed, tuple(counts.items()), size)
        else:
            rng, num_labels, multi = (
                np.random.default_rng(seed),
                len(info["label"]),
                info["task"].startswith("multi-label"),
            )
            arrays = {}
            for split, n in counts.items():
                images = rng.integers(20, 90, (n, size, size) + (3,) * (info["n_channels"] == 3))
                labels = (
                    (rng.random((n, num_labels)) < 0.4).astype(np.uint8)
                    if multi
                    else rng.permutation(np.arange(n) % num_labels)[:, None].astype(np.uint8)
                )
                present = labels if multi else labels == np.arange(num_labels)
                side = size // 4
                for patch in range(num_labels):
                    row, column = divmod(patch, 4)
                    images[:, row * side : (row + 1) * side, column * side : (column + 1) * side][
                        present[:, patch] == 1
                    ] += 120
                arrays[f"{split}_images"], arrays[f"{split}_labels"] = images.astype(np.uint8), labels
        path = Path(folder) / f"{name}{'' if size == 28 else f'_{size}'}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)
        return path

    return write


class SmallNet(nn.Module):
    """The parts of a ResNet that build_model and GradCAM know by name, at a hundredth of the cost."""

    def __init__(self):
        super().__init__()
        self.conv1, self.maxpool = nn.Conv2d(3, 64, 3), nn.MaxPool2d(2)
        for i, (before, after) in enumerate([(64, 12), (12, 12), (12, 24), (24, 24)], start=1):
            block = nn.Sequential(
                nn.Conv2d(before, after, 3, stride=1 if i == 1 else 2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            setattr(self, f"layer{i}", block)
        self.fc = nn.Linear(24, 1000)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.conv1(x)))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


@pytest.fixture
def small_network(monkeypatch):
    """Every architecture is the small one: for tests of what the scripts do around the network."""
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None: SmallNet())


@pytest.fixture(scope="session")
def train_cnn():
    """train_cnn(folder, *more): one short epoch on the PneumoniaMNIST-like set in data/, for tests of what reads it."""
    from task1_classification.train import main as train

    options = "--data pneumoniamnist --data-dir data --device cpu --batch-size 16 --epochs 1 --limit 64".split()
    return lambda folder, *more: train([*options, *more, "--out-dir", folder])


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, small_phantom):
    """One real training run on phantom images, shared by all tests that read a classifier: do not write into it."""
    from task1_classification.train import main as train  # here, so that other tests run when this script is broken

    folder = tmp_path_factory.mktemp("tiny_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(
            [
                "--data",
                "phantom",
                "--limit",
                "96",
                "--epochs",
                "2",
                "--batch-size",
                "16",
                "--lr",
                "0.005",
                "--device",
                "cpu",
                "--out-dir",
                "run",
            ]
        )
        data = image_sets.load_phantom()
    yield SimpleNamespace(folder=folder, run_dir=folder / "run", checkpoint=folder / "run" / "best.pt", data=data)
    (folder / "run" / "last.pt").unlink()
