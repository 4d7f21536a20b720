"""
Every 2-D MedMNIST set (Yang et al. 2023, doi:10.1038/s41597-022-01721-8) as uint8 tensors held in memory, and the
phantom in the same form. A file that is present is used as it is; only an absent one is downloaded, through the
medmnist package.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import medmnist
import numpy as np
import torch

from shared.runtime import DataNotFound, InputError

INFO = {name: info for name, info in medmnist.INFO.items() if not name.endswith("3d")}
SIZES = (28, 64, 128, 224)  # pixels per side
SPLITS = ("train", "val", "test")
PHANTOM_COUNTS = {"train": 2400, "val": 400, "test": 600}
PHANTOM_SEED = 20231  # one phantom set for everybody; --seed varies the training, not the data


@dataclass
class ImageSet:
    """images[split] uint8 (N, C, H, W); labels[split] int64 (N,), or float32 (N, L) for a multi-label set."""

    name: str
    task: str  # MedMNIST's words: binary-class, multi-class, ordinal-regression, "multi-label, binary-class"
    label_names: list
    images: dict
    labels: dict
    size: int
    channels: int
    sha256: str  # of the file, or of the pixels and labels of the phantom
    official: bool | None  # does the file have the MD5 sum that MedMNIST publishes? None: phantom
    source: str  # where it came from, for people
    path: Path | None = None  # the npz file; None: phantom

    @property
    def phantom(self):
        return self.official is None

    @property
    def multi_label(self):
        return self.task.startswith("multi-label")

    @property
    def num_outputs(self):
        """Logits a classifier needs: one for a binary set, one per label or class otherwise."""
        return 1 if self.task == "binary-class" else len(self.label_names)

    def limit(self, n):
        """Keep the first n cases of every split."""
        self.images = {split: images[:n] for split, images in self.images.items()}
        self.labels = {split: labels[:n] for split, labels in self.labels.items()}

    def facts(self):
        """What checkpoints and metrics files say about the data."""
        return {name: getattr(self, name) for name in ("name", "size", "sha256", "official", "source", "phantom")}

    def __str__(self):
        counts = ", ".join(f"{split} {len(images)}" for split, images in self.images.items())
        return f"{self.name} ({self.task}, {self.channels}x{self.size}x{self.size}; {counts}) from {self.source}"


def load_images(name, data_dir, size=28, auto="pneumoniamnist"):
    """
    --data NAME -> ImageSet. "auto" takes the set `auto` from `data_dir`, else downloads it, else makes phantom images
    and says so; a set asked for by its own name is never replaced by another.
    """
    name = name.lower()
    if name == "phantom":
        return load_phantom(size)
    if name != "auto":
        return load_medmnist(name, data_dir, size)
    try:
        return load_medmnist(auto, data_dir, size)
    except DataNotFound as error:
        line = "*" * 100
        print(
            f"{line}\n{error}\nPHANTOM DATA: going on with drawn images. No number of this run says anything about real"
            f" X-rays.\n{line}"
        )
        return load_phantom(size)


def load_medmnist(name, data_dir, size=28):
    """
    Read <data_dir>/<file> or <data_dir>/<name>/<file>, where <file> is MedMNIST's own: pneumoniamnist.npz at 28 pixels,
    pneumoniamnist_64.npz at 64. DataNotFound when it is absent and the download fails; InputError when it is damaged.
    """
    if name not in INFO:
        raise InputError(f"there is no 2-D MedMNIST set '{name}'; there are {', '.join(INFO)}, and phantom")
    if size not in SIZES:
        raise InputError(f"MedMNIST images come in {SIZES} pixels, not {size}")
    suffix = "" if size == 28 else f"_{size}"
    file_name = name + suffix + ".npz"
    places = [Path(data_dir) / file_name, Path(data_dir) / name / file_name]
    path = next((p for p in places if p.is_file()), None) or download(name, size, Path(data_dir), file_name)

    info = INFO[name]
    multi_label = info["task"].startswith("multi-label")
    images, labels = {}, {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for split in SPLITS:
                x, y = arrays[f"{split}_images"], arrays[f"{split}_labels"]
                shape, width = (size, size) + (3,) * (info["n_channels"] == 3), len(info["label"]) if multi_label else 1
                if x.dtype != np.uint8 or x.shape[1:] != shape or len(x) == 0 or y.shape != (len(x), width):
                    raise InputError(
                        f"{path}: {split} has images {x.dtype} {x.shape} and labels {y.shape}, not uint8 {shape} images"
                        f" with {width} label{'s' * (width > 1)} each"
                    )
                if y.dtype.kind not in "ui" or not 0 <= y.min() <= y.max() < (2 if multi_label else len(info["label"])):
                    raise InputError(
                        f"{path}: {split} has labels {y.dtype} from {y.min()} to {y.max()}, which {name} does not have"
                    )
                images[split] = as_channels_first(x)
                labels[split] = torch.from_numpy(y.astype(np.float32) if multi_label else y[:, 0].astype(np.int64))
    except InputError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds for damaged files
        raise InputError(
            f"{path} is not a MedMNIST file, or is damaged; delete it and run again to download it ({error})"
        ) from error
    official = digest(path, "md5") == info["MD5" + suffix]
    source = f"{path} ({'the official file' if official else 'not the official file: its MD5 sum differs'})"
    names, channels = list(info["label"].values()), info["n_channels"]
    return ImageSet(
        name, info["task"], names, images, labels, size, channels, digest(path, "sha256"), official, source, path
    )


def digest(path, kind):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def as_channels_first(images):
    """uint8 (N, H, W) or (N, H, W, 3) -> tensor (N, C, H, W)."""
    images = torch.from_numpy(images)
    return images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images[:, None]


def download(name, size, data_dir, file_name):
    """Fetch one file through the medmnist package, which checks its MD5 sum."""
    address = INFO[name]["url" if size == 28 else f"url_{size}"]
    place = data_dir / file_name
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        getattr(medmnist, INFO[name]["python_class"])(split="train", download=True, root=str(data_dir), size=size)
    except (OSError, RuntimeError) as error:  # medmnist turns every failure of the network into a RuntimeError
        if isinstance(error, OSError) and error.filename:
            raise DataNotFound(
                f"{name} is not in {data_dir} and that folder cannot be written; choose another --data-dir"
            ) from error
        raise DataNotFound(
            f"{name} ({size} px) is not in {data_dir} and could not be downloaded; fetch {address} and save it as"
            f" {place}"
        ) from error
    return place


def load_phantom(size=28, counts=None, seed=PHANTOM_SEED):
    """Drawn chest films, normal or pneumonia, in the form of PneumoniaMNIST."""
    from shared.phantom import phantom_classification  # 3,000 lines that most runs do without

    arrays = phantom_classification(seed, counts or PHANTOM_COUNTS, size)
    sha256 = hashlib.sha256()
    for key in sorted(arrays):
        sha256.update(np.ascontiguousarray(arrays[key]).tobytes())
    images = {s: as_channels_first(arrays[f"{s}_images"]) for s in SPLITS}
    labels = {s: torch.from_numpy(arrays[f"{s}_labels"][:, 0].astype(np.int64)) for s in SPLITS}
    names, source = ["normal", "pneumonia"], f"shared/phantom/, seed {seed}"
    return ImageSet("phantom", "binary-class", names, images, labels, size, 1, sha256.hexdigest(), None, source)
