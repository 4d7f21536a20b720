"""
What goes into an index and what is asked of it: images of a data set, or files of one's own with their labels.

Labels of files come from a CSV (columns file, label and perhaps split), or from the folders they lie in.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import os
import time
import unicodedata
from pathlib import Path

import numpy as np

from shared.data.image_sets import SIZES, SPLIT_NAMES, SPLITS, labels_by_folder, load_images, load_phantom, set_name
from shared.data.images import find_images, read_image, to_square
from shared.data.text import one_spelling, read_table, text_of
from shared.runtime import InputError, bounded, load_checkpoint
from task1_classification.model import KEYS, find_classifier, load_classifier, predict_logits, to_probabilities
from task3_retrieval.embed import channels_last, load_embedder
from task3_retrieval.index import UNKNOWN, CaseIndex

DRY_RUN = {"train": 96, "val": 32, "test": 48}  # phantom images


# ------------------------------------------------------------------------------------- the embedding, the classifier


def add_embedding_options(parser):
    g = parser.add_argument_group("embedding")
    # fmt: off
    g.add_argument("--backbone",
        help="cnn, pixels, a torchvision name, random:NAME, a SigLIP or CLIP model folder, vlm:MODEL (default: cnn)")
    g.add_argument("--cnn-weights", metavar="PATH", help="best.pt or run folder of train.py, or a task 1 classifier "
        "(default: the newest full run of train.py, else models/task1_model.pth)")
    g.add_argument("--allow-other-dataset", action="store_true",
        help="use weights that were trained on another data set")
    g.add_argument("--image-size", type=int, choices=SIZES,
        help="pixels per side of the data set's images (default: the CNN's; else 28)")
    g.add_argument("--batch-size", type=bounded(int, 1, 65536), default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    # fmt: on


def embedder_and_data(args, device, input_size=None, files=False):
    """
    The options above and --data -> (Embedder, ImageSet; None where `files` are embedded instead). --data auto is the
    set that the weights were trained on, else PneumoniaMNIST. A dry run without weights takes pixels.
    """
    if args.backbone is None:
        args.backbone = "pixels" if args.dry_run and args.cnn_weights is None else "cnn"
        if args.dry_run:
            print(f"dry run: --backbone {args.backbone}")
    data, named = None, set_name(args.data) if args.data.lower() != "auto" and not files else None
    if args.backbone == "pixels" and not files:  # they have the data's own size
        data = load_data(args)
    embedder = load_embedder(
        args.backbone, args.cnn_weights, data, device, input_size, batch_size=args.batch_size, dataset=named
    )
    if not files:
        data = data or load_data(args, embedder)
        embedder.check_dataset(data.name, args.allow_other_dataset or args.dry_run)
    return embedder, data


def load_data(args, embedder=None, known=None):
    """--data -> ImageSet, at the size of the CNN; auto: the set `known` to the index, that of the CNN, or any."""
    if args.dry_run:
        return load_phantom(28, DRY_RUN)
    size = embedder.settings["image_size"] if embedder is not None else None
    home = known or (embedder is not None and embedder.trained_on)
    name = home if home and args.data.lower() == "auto" else args.data
    data = load_images(name, args.data_dir, args.image_size or (size if size in SIZES else 28))
    if data.multi_label:
        raise InputError(f"{data.name} has several labels per image; similar cases are told by one label per image")
    if args.limit:
        data.limit(args.limit)
    print(data)
    return data


def choose_classifier(asked, fits, unlike, device, own=None):
    """
    --classifier, else the weights `own` of the embedding where they are a whole classifier, else the one at its usual
    place -> (model, facts and "path"); twice None where there is none for which fits(facts) holds. InputError with the
    sentence `unlike` where that is the one asked for.
    """
    candidates = [asked] if asked else [p for p in (own, find_classifier()) if p is not None]
    path = next((p for p in candidates if asked or {*KEYS} <= {*load_checkpoint(p)}), None)
    if path is None:
        return None, None
    model, facts = load_classifier(path, device)
    if fits(facts):
        return model, facts | {"path": str(path)}
    if asked:
        raise InputError(
            f"{path} was trained on {facts['dataset']['name']} ({', '.join(facts['label_names'])}){unlike}"
        )
    return None, None


def classifier_answers(classifier, facts, images, device, dtype, batch_size):
    """
    images uint8 (N, C, H, W) -> (numbers of the called classes (N,), probabilities (N,)): of the second class of a
    binary set, as task 1 has it, else of the called one.
    """
    logits = predict_logits(classifier, images, facts["normalisation"], device, dtype, batch_size)
    p = to_probabilities(logits, facts["task"], facts["temperature"]).numpy()
    if facts["task"] == "binary-class":
        return (p > facts["threshold"]).astype(np.int64), p
    return p.argmax(1), p.max(1)


# ---------------------------------------------------------------------------------------------------------------- cases


def dataset_cases(data, split):
    """
    An ImageSet -> what goes into the index: images uint8 (N, H, W) or (N, H, W, 3), and a list each of labels, names,
    splits.
    """
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


def file_cases(patterns, labels, limit, label_names=()):
    """
    --images and --labels -> cases whose "images" are paths; labels are numbered on from `label_names`. Without a CSV
    the folders tell the labels where they look like classes: see labels_by_folder.
    """
    paths = [Path(os.path.realpath(p)) for p in find_images(patterns)][:limit]
    roots = [Path(os.path.realpath(p)) for p in patterns if os.path.isdir(p)]
    if labels:
        found, source = labels_from_csv(labels, paths, roots), labels
    else:
        found, source = {}, "the names of their folders"
        for root in roots:
            found |= labels_by_folder(root, [p for p in paths if p.is_relative_to(root)])
    splits, labels = zip(*(found.get(path, ("", "")) for path in paths), strict=True)
    labels = one_spelling(["" if label.lower() == "unknown" else label for label in labels], label_names)
    names = list(label_names) + sorted({*labels} - {"", *label_names}, key=str.lower)
    known = sum(map(bool, labels))
    print(f"labels of {known} of {len(paths)} images from {source}" if known else "no image has a label")
    return {
        "images": paths,
        "labels": [names.index(label) if label else UNKNOWN for label in labels],
        "label_names": names,
        "names": [str(p) for p in paths],
        "splits": [split or "files" for split in splits],
        "datasets": {},
    }


def labels_from_csv(csv_path, paths, roots):
    """
    -> {path: (split, label)}. A row names a file by its whole path, relative to one of the folders, or by its name
    alone. InputError for a name that could be several images, and where nothing is labelled.
    """
    rows, exact, by_name, found, absent = read_labels(csv_path), {}, {}, {}, 0
    for path in paths:
        relative = {file_key(path.relative_to(root)) for root in roots if path.is_relative_to(root)}
        keys = {file_key(path), *relative} & rows.keys()
        for key in keys:
            exact.setdefault(key, []).append(path)
        if not keys:
            by_name.setdefault(file_key(path.name).lower(), []).append(path)
    for name, entry in rows.items():
        same = exact.get(name) or by_name.get(Path(name).name.lower(), [])
        if len(same) > 1:
            raise InputError(
                f"{csv_path} names {name}, which could be {printable(same[0])} or {printable(same[1])}: name files"
                " relative to --images, with their folder"
            )
        absent += not same
        if same and found.setdefault(same[0], entry) != entry:
            raise InputError(f"{csv_path} has two different rows for {printable(same[0])}; keep one of them")
    if not found:
        raise InputError(
            f"none of the {len(rows)} files named in {csv_path} is among the {len(paths)} images; name them relative to"
            " --images"
        )
    if not any(label for _, label in found.values()):
        raise InputError(f"{csv_path}: there is no label in it")
    if absent:
        print(f"{absent} of the {len(rows)} files named in {csv_path} are not among the images")
    return found


def read_labels(path):
    """
    CSV with the columns file, label and perhaps split -> {file: (split, label)}; blanks and words such as nan, None,
    N/A, - or XXXX are unknown labels.
    """
    rows = {}
    for _, row in read_table(path, ("file", "label"), "--labels: ", ("split",)):
        split = text_of(row.get("split"))
        entry = (SPLIT_NAMES.get(split.lower(), split), text_of(row["label"]))
        if rows.setdefault(file_key(row["file"].replace("\\", "/")), entry) != entry:
            raise InputError(f"{path} names {row['file']} twice, with different labels; keep one of the rows")
    return rows


def file_key(path):
    """A path to be compared: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", Path(path).as_posix())


def printable(path):
    """File names that are not UTF-8 can be opened, but not printed."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_files(paths, embedder):
    """Image files -> (uint8 (n, size, size) or (n, size, size, 3), which of the paths these are, errors as rows)."""
    images, read, errors = [], [], []
    channels = 1 if embedder.settings["channels"] == 1 else 3
    for i, path in enumerate(paths):
        try:
            images.append(to_square(read_image(path), embedder.read_size, channels))
            read.append(i)
        except InputError as error:
            errors.append({"path": printable(path), "error": str(error)})
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
