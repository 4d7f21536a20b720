"""
Every 2-D MedMNIST set (Yang et al. 2023, doi:10.1038/s41597-022-01721-8) as uint8 tensors held in memory, and the
phantom and folders of one's own in the same form. A file that is present is used as it is; only an absent one is
downloaded, through the medmnist package.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import medmnist
import numpy as np
import torch
from tqdm import tqdm

from shared.runtime import DataNotFound, InputError

INFO = {name: info for name, info in medmnist.INFO.items() if not name.endswith("3d")}
SIZES = (28, 64, 128, 224)  # pixels per side
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}
PHANTOM_COUNTS = {"train": 2400, "val": 400, "test": 600}
# a warning for reports: splits of a folder follow its images, so that new ones move others
CHANGED = "The data have changed since the training (other SHA-256): test images may have been trained on."
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
    files: dict = field(default_factory=dict)  # {split: [name of the file in the folder]} of an own folder

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
        self.files = {split: files[:n] for split, files in self.files.items()}

    def facts(self):
        """What checkpoints and metrics files say about the data."""
        return {name: getattr(self, name) for name in ("name", "size", "sha256", "official", "source", "phantom")}

    def __str__(self):
        counts = ", ".join(f"{split} {len(images)}" for split, images in self.images.items())
        return f"{self.name} ({self.task}, {self.channels}x{self.size}x{self.size}; {counts}) from {self.source}"


def load_images(name, data_dir, size=28, auto="pneumoniamnist"):
    """
    --data NAME -> ImageSet. "auto" takes the set `auto` from `data_dir`, else downloads it, else makes phantom images
    and says so; a set asked for by its own name is never replaced by another. A path is a folder of one's own.
    """
    name = set_name(name)
    if name not in ("auto", "phantom", "", *INFO) and Path(name).is_dir():
        return load_folder(name, size)
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


def set_name(name):
    """--data as ImageSet.name has it: names in lower case, folders as a path without a slash at its end."""
    lower = name.lower()
    return Path(name).as_posix() if lower not in ("auto", "phantom", "", *INFO) and Path(name).is_dir() else lower


def labels_by_folder(root, paths):
    """
    Labels of images from the folders they lie in: root/CLASS/film.png, or root/SPLIT/CLASS/film.png (or CLASS/SPLIT)
    with the splits train, val and test -> {path: (split or "", class)}; where there is a split train, images outside
    of the splits are left out. {} where the folders do not look like classes (fewer than two, or more than half as many
    as images).
    """
    found = {}
    for path in paths:
        first, *others = path.relative_to(root).parts[:-1] or ("",)
        split, other = (SPLIT_NAMES.get(name.lower(), "") for name in (first, others[0] if len(others) == 1 else ""))
        label = (others or [""])[0] if split else first
        if label:
            found[path] = (split or other, label)
    if any(split == "train" for split, _ in found.values()):
        found = {path: entry for path, entry in found.items() if entry[0]}
    return found if 1 < len({label for _, label in found.values()}) <= max(2, len(found) / 2) else {}


def load_folder(folder, size=28):
    """
    A folder with one folder of images per class, or with train/, val/ and test/ of such folders -> ImageSet, the
    classes in alphabetical order. A split that is missing is taken out of train by the content of the images (15 % of
    each class, always the same ones): keep the films of one patient together by making the splits yourself. Files that
    cannot be read are left out and counted.
    """
    from shared.data.images import find_images, read_image, to_square  # MedMNIST's files do without
    from shared.data.text import one_spelling

    paths, rows = find_images([folder]), []
    where = labels_by_folder(folder, paths)
    skipped = [f"{path.name}: it lies in no folder of a class" for path in paths if path not in where]
    for path, (split, label) in tqdm(where.items(), desc=f"reading {folder}", leave=False, disable=None):
        try:
            pixels = read_image(path)
        except InputError as error:
            skipped.append(f"{path.name}: {error}")
            continue
        pixels = to_square(pixels, size, 1 if pixels.ndim == 2 else 3)
        name = path.relative_to(folder).as_posix()
        rows.append((label, hashlib.sha256(pixels.tobytes()).hexdigest(), split, pixels, name))
    labels = one_spelling([row[0] for row in rows])
    rows = [(label, *row[1:]) for label, row in zip(labels, rows, strict=True)]
    names = sorted({*labels}, key=str.lower)
    if len(names) < 2:
        raise InputError(f"{folder} is no data set: it needs two or more folders of images, one per class")
    if skipped:
        print(f"{len(skipped)} files of {folder} were left out; {skipped[0]}", file=sys.stderr)
    used = {path.parent for path in where}
    empty = [d.name for d in Path(folder).rglob("*") if d.is_dir() and d not in used and not any(d.glob("*/"))]
    if empty:
        print(f"no image in the folders {', '.join(sorted(empty)[:5])} of {folder}: no classes", file=sys.stderr)
    rows.sort(key=lambda row: row[1])  # by content: classes are mixed, and copies lie side by side
    splits = assigned_splits(rows)
    channels = max(len(row[3]) for row in rows)
    images, labels, files, sha256 = {}, {}, {}, hashlib.sha256()
    for split in SPLITS:
        mine = [row for row, place in zip(rows, splits, strict=True) if place == split]
        if len({row[0] for row in mine}) < len(names):
            raise InputError(f"{folder}: not every class has an image in {split}; a class needs three different images")
        stack = np.stack([np.broadcast_to(row[3], (channels, size, size)) for row in mine])
        images[split], files[split] = torch.from_numpy(stack), [row[4] for row in mine]
        labels[split] = torch.tensor([names.index(row[0]) for row in mine])
        sha256.update(stack.tobytes() + labels[split].numpy().tobytes())
    task = "binary-class" if len(names) == 2 else "multi-class"
    counts = Counter(row[0] for row in rows)
    source = f"the folder {folder} ({', '.join(f'{counts[name]} {name}' for name in names)})"
    return ImageSet(folder, task, names, images, labels, size, channels, sha256.hexdigest(), False, source, files=files)


def assigned_splits(rows):
    """rows (label, digest, split, ...) sorted by digest -> the split of each; see load_folder."""
    missing = [s for s in ("val", "test") if s not in {row[2] for row in rows}]
    digests = {}  # of each class, those that may be moved
    for label, digest, split, *_ in rows:
        if split in ("", "train"):
            digests.setdefault(label, {})[digest] = None
    place = {}
    for own in map(list, digests.values()):
        count = max(1, round(0.15 * len(own)))
        for i, split in enumerate(missing):
            place |= dict.fromkeys(own[i * count : (i + 1) * count], split)
    return [split if split in ("val", "test") else place.get(digest, "train") for _, digest, split, *_ in rows]


def load_medmnist(name, data_dir, size=28):
    """
    Read <data_dir>/<file> or <data_dir>/<name>/<file>, where <file> is MedMNIST's own: pneumoniamnist.npz at 28 pixels,
    pneumoniamnist_64.npz at 64. DataNotFound when it is absent and the download fails; InputError when it is damaged.
    """
    if name not in INFO:
        raise InputError(
            f"there is no 2-D MedMNIST set '{name}'; there are {', '.join(INFO)}, and phantom; or give a folder with"
            " one folder of images per class"
        )
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
