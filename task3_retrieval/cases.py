"""
What goes into an index and what is asked of it: images of a data set, or files of one's own with their labels.

Labels of files come from a CSV (columns file, label and perhaps split), or from the folders they lie in.
"""

import csv
import time
from pathlib import Path

import numpy as np

from shared.data.image_sets import SPLITS
from shared.data.images import find_images, read_image, to_square
from shared.runtime import InputError
from task3_retrieval.embed import channels_last
from task3_retrieval.index import UNKNOWN, CaseIndex

DRY_RUN = {"train": 96, "val": 32, "test": 48}  # phantom images


def dataset_cases(data, split):
    """
    An ImageSet -> what goes into the index: images uint8 (N, H, W) or (N, H, W, 3), and a list each of labels, names,
    splits.
    """
    if data.multi_label:
        raise InputError(
            f"{data.name} has several labels per image; the search counts and filters by one, so take a set with one"
        )
    splits = SPLITS if split == "all" else (split,)
    return {
        "images": np.concatenate([channels_last(data.images[s]) for s in splits]),
        "labels": np.concatenate([data.labels[s].numpy() for s in splits]).tolist(),
        "label_names": list(data.label_names),
        "names": [case_name(data.name, s, i) for s in splits for i in range(len(data.images[s]))],
        "splits": [s for s in splits for _ in range(len(data.images[s]))],
        "datasets": {data.name: data.facts()},
    }


def case_name(dataset, split, position):
    """How an image of a data set is called in an index; gallery.py finds the image by it."""
    return f"{dataset}/{split}/{position:05d}"


def file_cases(patterns, labels, limit, label_names):
    """--images and --labels -> cases whose "images" are paths; labels are numbered on from `label_names`."""
    paths = [p.resolve() for p in find_images(patterns)][:limit]
    rows = read_labels(labels) if labels else {}
    roots = [Path(p).resolve() for p in patterns if Path(p).is_dir()]
    found = []
    for path in paths:
        keys = [path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)] + [path.name]
        found.append(next((rows[k] for k in keys if k in rows), {"label": "", "split": ""}))
    if rows and not any(r["label"] for r in found):
        raise InputError(
            f"none of the {len(rows)} files named in {labels} is among the {len(paths)} images; name them relative to"
            " --images"
        )
    label_names = list(label_names) + sorted({r["label"] for r in found} - set(label_names) - {""})
    if labels:
        print(f"labels of {sum(bool(r['label']) for r in found)} of {len(paths)} images from {labels}")
    return {
        "images": paths,
        "labels": [label_names.index(r["label"]) if r["label"] else UNKNOWN for r in found],
        "label_names": label_names,
        "names": [str(p) for p in paths],
        "splits": [r["split"] or "files" for r in found],
        "datasets": {},
    }


def read_labels(path):
    """
    CSV with the columns file, label and perhaps split -> {file: {"label", "split"}}; an empty label is an unknown one.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"file", "label"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path} has no column {' and no column '.join(sorted(missing))}; it has"
                    f" {', '.join(reader.fieldnames or ['nothing'])}"
                )
            rows = {}
            for row in reader:
                entry = {"label": (row["label"] or "").strip(), "split": (row.get("split") or "").strip()}
                name = Path((row["file"] or "").strip()).as_posix()
                if rows.get(name, entry) != entry:
                    raise InputError(f"{path} names {name} twice, with different labels; keep one of the rows")
                rows[name] = entry
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--labels: {path} cannot be read as a CSV file ({error})") from error
    return rows


def read_files(paths, embedder):
    """Image files -> (uint8 (n, size, size) or (n, size, size, 3), which of the paths these are, errors as rows)."""
    images, read, errors = [], [], []
    channels = 1 if embedder.settings["channels"] == 1 else 3
    for i, path in enumerate(paths):
        try:
            images.append(to_square(read_image(path), embedder.read_size, channels))
            read.append(i)
        except InputError as error:
            errors.append({"path": str(path), "error": str(error)})
    stack = np.stack(images) if images else np.empty((0, channels, 1, 1), dtype=np.uint8)
    return (stack[:, 0] if channels == 1 else stack.transpose(0, 2, 3, 1)), read, errors


def index_of(vectors, cases, embedder, good=None, kind="flat", metric="l2"):
    """vectors (n, D) of the cases numbered `good` (default: all) -> CaseIndex with ids 0, 1, ..., n - 1."""
    good = range(len(vectors)) if good is None else good
    metadata = {"embedder": embedder.facts(), "date": time.strftime("%Y-%m-%d")}
    metadata |= {key: cases[key] for key in ("label_names", "datasets")}
    columns = [[cases[c][i] for i in good] for c in ("labels", "names", "splits")]
    index = CaseIndex(vectors, np.arange(len(vectors)), *columns, metadata, kind, metric)
    index.fit_typical()
    return index
