"""
Build an index of labelled images for the search for similar cases, or change one.

Usage:
    python task3_retrieval/build_index.py  # training images, task 1's network
    python task3_retrieval/build_index.py --split test --index flat --metric l2  # the 624 test images, 512 numbers each
    python task3_retrieval/build_index.py --data phantom --backbone pixels  # needs neither data, weights nor network
    python task3_retrieval/build_index.py --images films/ --labels films.csv --index hnsw --metric cosine
    python task3_retrieval/build_index.py --update outputs/task3_retrieval/build_index/001 --add --split val
    python task3_retrieval/build_index.py --update outputs/task3_retrieval/build_index/001 --remove 17 40

A gallery of up to about 10,000 images is searched in under a millisecond by flat; hnsw and ivfpq are for much larger
ones. The labels file has the columns file and label, and split where wanted; a file is named relative to --images or by
its name. Writes to the run folder: index/ (manifest.json, vectors, cases, FAISS's file), metrics.json. The images are
not copied: index/ holds their vectors, names and labels. Vectors can tell whose film it is: treat an index like the
images it was made from.
"""

import csv
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch.distributed as dist

from shared.data.image_sets import SIZES, SPLITS, load_images, load_phantom
from shared.data.images import find_images, read_image, to_square
from shared.runtime import InputError, open_run_dir, pick_device, positive_int, run_facts, script, script_parser
from shared.runtime import seed_everything, start_distributed, write_csv, write_json
from task1_classification.model import find_classifier
from task3_retrieval.embed import embedder_like, load_embedder
from task3_retrieval.index import BACKENDS, KINDS, METRICS, UNKNOWN, CaseIndex, find_index

TASK = "task3_retrieval"
DRY_RUN = {"train": 96, "val": 32, "test": 32}  # phantom images


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="what the CNN was trained on (other backbones: PneumoniaMNIST)")
    g = parser.add_argument_group("images")
    # fmt: off
    g.add_argument("--split", default=None, choices=[*SPLITS, "all"],
        help="images of the data set to put in (default: train)")
    g.add_argument("--image-size", type=int, choices=SIZES,
        help="pixels per side of the data set's images (default: the CNN's; else 28)")
    g.add_argument("--images", nargs="+", metavar="PATH",
        help="instead of a data set: image files, folders (searched through) or glob patterns")
    g.add_argument("--labels", metavar="CSV",
        help="labels of --images: columns file, label and, if there are several, split")
    g = parser.add_argument_group("vectors")
    g.add_argument("--backbone",
        help="cnn, pixels, a torchvision name, random:NAME, a SigLIP or CLIP model folder, vlm:MODEL (default: cnn)")
    g.add_argument("--cnn-weights", metavar="FILE", help="checkpoint of task 1 or of task3_retrieval/train.py "
        "(default: models/task1_model.pth, else ./task1_model.pth)")
    g.add_argument("--allow-other-dataset", action="store_true",
        help="use weights that were trained on another data set")
    g.add_argument("--input-size", type=positive_int, metavar="PIXELS",
        help="side of the network's input (default: torchvision 224, pixels the image's own)")
    g.add_argument("--batch-size", type=positive_int, default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    g = parser.add_argument_group("index")
    g.add_argument("--index", default=None, choices=KINDS,
        help="flat: exact; hnsw, ivfpq: approximate, for large galleries (default: flat)")
    g.add_argument("--metric", default=None, choices=METRICS,
        help="Euclidean distance, or cosine similarity (default: l2)")
    g.add_argument("--backend", default="auto", choices=BACKENDS,
        help="auto: faiss where it is installed (%(default)s)")
    g.add_argument("--update", metavar="INDEX", help="an index, or its run folder, to change in place")
    g.add_argument("--add", action="store_true", help="with --update: add the images of --split or --images")
    g.add_argument("--remove", type=int, nargs="+", metavar="ID",
        help="with --update: remove these ids (see index/cases-*.csv)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.update is None and (args.add or args.remove):
        parser.error("--add and --remove change an existing index: name it with --update")
    if args.update is not None:
        if not args.add and not args.remove:
            parser.error("--update needs --add, --remove, or both")
        fixed = [
            f"--{n}" for n in ("index", "metric", "backbone", "input_size", "out_dir") if getattr(args, n) is not None
        ]
        if fixed or args.dry_run:
            parser.error(
                "--update keeps what the index was built with and changes it in place: leave"
                f" {(fixed or ['--dry-run'])[0].replace('_', '-')} out"
            )
    if args.images and (args.data != "auto" or args.split or args.image_size):
        parser.error("--images stands instead of a data set: leave --data, --split and --image-size out")
    if args.labels and not args.images:
        parser.error("--labels belongs to --images; a data set has its own labels")
    args.split, args.index, args.metric = args.split or "train", args.index or "flat", args.metric or "l2"
    if args.dry_run:
        args.device = "cpu"
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    rank, world_size = start_distributed(device)
    if args.update is not None:
        return update(args, device, rank, world_size)

    if args.backbone is None:
        args.backbone = "cnn"
        if args.dry_run and args.cnn_weights is None and find_classifier() is None:
            args.backbone = "pixels"
            print("dry run without task 1 weights: --backbone pixels")
    embedder = None
    if args.backbone == "cnn" or args.images:
        embedder = load_embedder(
            args.backbone, args.cnn_weights, None, device, args.input_size, batch_size=args.batch_size
        )
    if args.images:
        cases = file_cases(args, [])
    else:
        data = load_data(args, embedder)
        if embedder is None:
            embedder = load_embedder(
                args.backbone, args.cnn_weights, data, device, args.input_size, batch_size=args.batch_size
            )
        embedder.check_dataset(data.name, args.allow_other_dataset or args.dry_run)
        cases = dataset_cases(data, args.split)
    vectors, good, errors = embed_cases(embedder, cases, rank, world_size)
    embedded = time.time()

    metadata = {
        "embedder": embedder.facts(),
        "label_names": cases["label_names"],
        "datasets": cases["datasets"],
        "date": time.strftime("%Y-%m-%d"),
    }
    columns = [[cases[c][i] for i in good] for c in ("labels", "names", "splits")]
    index = CaseIndex(
        vectors,
        np.arange(len(good)),
        np.array(columns[0]),
        *columns[1:],
        metadata,
        args.index,
        args.metric,
        args.backend,
    )
    index.fit_typical()
    built = time.time()
    run_dir = open_run_dir(args, TASK, "build_index")
    if rank > 0:
        return
    index.save(run_dir / "index")
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    write_json(
        run_dir / "metrics.json",
        {
            "n": len(index),
            "n_errors": len(errors),
            "dim": index.dim,
            "index": args.index,
            "metric": args.metric,
            "backend": index.backend,
            "split": args.split if not args.images else None,
            "dataset": cases["datasets"],
            "labels": label_counts(index),
            "model": embedder.facts(),
            "typical_distance": index.metadata["typical"],
            "seconds_embedding": round(embedded - started, 3),
            "seconds_building": round(built - embedded, 3),
            "bytes": sum(p.stat().st_size for p in (run_dir / "index").iterdir()),
            **run_facts(started, device),
        },
    )
    print(
        f"{len(index)} images of {index.dim} numbers, {args.index} with {args.metric} ({index.backend}): "
        + ", ".join(f"{n} {c}" for n, c in label_counts(index).items())
    )
    print(
        f"embedded in {embedded - started:.1f} s, indexed in {built - embedded:.1f}"
        f" s{f', {len(errors)} files skipped (errors.csv)' if errors else ''}; index in {run_dir / 'index'}"
    )


def update(args, device, rank, world_size):
    """--update: remove, then add, then save in place; nothing is written when one of them fails."""
    folder = find_index(args.update)
    index = CaseIndex.load(folder, backend=args.backend)
    before, errors = len(index), []
    if args.remove:
        if len(set(args.remove)) >= len(index) and not args.add:
            raise InputError(f"{folder} would be empty after that; delete the folder instead")
        index.remove(args.remove)
    if args.add:
        embedder = embedder_like(index.metadata["embedder"], args.cnn_weights, device, args.batch_size)
        index.check_embedder(embedder, folder)
        if args.images:
            cases = file_cases(args, index.metadata["label_names"])
        else:
            data = load_data(args, embedder, next(iter(index.metadata["datasets"]), None))
            known = index.metadata["datasets"].get(data.name)
            if known and known["sha256"] != data.sha256:
                raise InputError(f"{data.source} is not the file the index was built from (other SHA-256)")
            embedder.check_dataset(data.name, args.allow_other_dataset)
            cases = dataset_cases(data, args.split)
            if index.metadata["label_names"] not in ([], cases["label_names"]):
                raise InputError(
                    f"the index has the labels {', '.join(index.metadata['label_names'])}, {data.name} has"
                    f" {', '.join(cases['label_names'])}; build an index of its own"
                )
        vectors, good, errors = embed_cases(embedder, cases, rank, world_size)
        columns = [[cases[c][i] for i in good] for c in ("labels", "names", "splits")]
        index.add(vectors, index.next_id() + np.arange(len(good)), np.array(columns[0]), *columns[1:])
        index.metadata["label_names"] = cases["label_names"]
        index.metadata["datasets"] |= cases["datasets"]
    index.fit_typical()
    if rank > 0:
        return
    index.save(folder)
    if errors:
        write_csv(folder.parent / "errors.csv", errors)
    print(
        f"{folder}: {before} images before, {len(index)}"
        f" now{f', {len(errors)} files skipped ({folder.parent}/errors.csv)' if errors else ''}: "
        + ", ".join(f"{n} {c}" for n, c in label_counts(index).items())
    )


# ---------------------------------------------------------------------------------------------------------------- cases


def load_data(args, embedder, known=None):
    """
    --data -> ImageSet, at the size of the CNN where there is one; auto: the set of the index, of the CNN, else
    PneumoniaMNIST.
    """
    if args.dry_run:
        return load_phantom(28, DRY_RUN)
    size = args.image_size or (
        embedder.settings["image_size"] if embedder is not None and embedder.settings["image_size"] in SIZES else 28
    )
    home = known or (embedder is not None and embedder.trained_on)
    data = load_images(home if home and args.data.lower() == "auto" else args.data, args.data_dir, size)
    if args.limit:
        data.limit(args.limit)
    print(data)
    return data


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
    images = np.concatenate([channels_last(data.images[s]) for s in splits])
    return {
        "images": images,
        "labels": np.concatenate([data.labels[s].numpy() for s in splits]).tolist(),
        "label_names": list(data.label_names),
        "names": [case_name(data.name, s, i) for s in splits for i in range(len(data.images[s]))],
        "splits": [s for s in splits for _ in range(len(data.images[s]))],
        "datasets": {data.name: data.facts()},
    }


def case_name(dataset, split, position):
    """How an image of a data set is called in an index; gallery.py finds the image by it."""
    return f"{dataset}/{split}/{position:05d}"


def channels_last(images):
    """uint8 tensor (N, C, H, W) -> array (N, H, W), or (N, H, W, 3)."""
    return images[:, 0].numpy() if images.shape[1] == 1 else images.permute(0, 2, 3, 1).contiguous().numpy()


def file_cases(args, label_names):
    """--images and --labels -> cases whose "images" are paths; labels are numbered on from `label_names`."""
    paths = [p.resolve() for p in find_images(args.images)][: args.limit]
    rows = read_labels(args.labels) if args.labels else {}
    roots = [Path(p).resolve() for p in args.images if Path(p).is_dir()]
    found = []
    for path in paths:
        keys = [path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)] + [path.name]
        found.append(next((rows[k] for k in keys if k in rows), {"label": "", "split": ""}))
    if rows and not any(r["label"] for r in found):
        raise InputError(
            f"none of the {len(rows)} files named in {args.labels} is among the {len(paths)} images; name them relative"
            " to --images"
        )
    label_names = list(label_names) + sorted({r["label"] for r in found} - set(label_names) - {""})
    if args.labels:
        print(f"labels of {sum(bool(r['label']) for r in found)} of {len(paths)} images from {args.labels}")
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


def embed_cases(embedder, cases, rank=0, world_size=1):
    """
    -> (vectors (n, D), numbers of the n cases that could be read, errors as rows). Under torchrun each process embeds
    every world_size-th case, and all get the whole.
    """
    mine = range(rank, len(cases["images"]), world_size)
    errors = []
    if isinstance(cases["images"], np.ndarray):
        good, vectors = list(mine), embedder(cases["images"][rank::world_size])
    else:
        good, parts = [], [np.empty((0, embedder.dim), dtype=np.float32)]
        for start in range(0, len(mine), embedder.batch_size):  # large files: never all of them in memory
            numbers = mine[start : start + embedder.batch_size]
            images, read, bad = read_files([cases["images"][i] for i in numbers], embedder)
            good += [numbers[i] for i in read]
            errors += bad
            if read:
                parts.append(embedder(images))
        vectors = np.concatenate(parts)
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, (vectors, good, errors))
        vectors, good, errors = (
            np.concatenate([e[0] for e in everyone]),
            sum((e[1] for e in everyone), []),
            sum((e[2] for e in everyone), []),
        )
        order = np.argsort(good)
        vectors, good = vectors[order], [good[i] for i in order]
    if not good:
        raise InputError(
            f"none of the {len(cases['images'])} images could be used; {errors[0]['path']}: {errors[0]['error']}"
        )
    for error in errors if rank == 0 else ():
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    return vectors, good, errors


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


def label_counts(index):
    counts = {name: int((index.labels == i).sum()) for i, name in enumerate(index.label_names)}
    unknown = int((index.labels == UNKNOWN).sum())
    return counts | ({"unknown": unknown} if unknown else {})


if __name__ == "__main__":
    main()
