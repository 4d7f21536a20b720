"""
Build an index of labelled images for the search for similar cases, or change one.

Usage:
    python task3_retrieval/build_index.py  # training images; the embedding of train.py, else task 1's network
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

from shared.data.image_sets import SPLITS
from shared.runtime import InputError, bounded, command, lock_run, open_run_dir, pick_device, read_json, run_facts
from shared.runtime import script, script_parser, seed_everything, start_distributed, write_csv, write_json
from task3_retrieval.cases import add_embedding_options, dataset_cases, embedder_and_data, file_cases, index_of
from task3_retrieval.cases import load_data, read_files
from task3_retrieval.embed import embedder_like
from task3_retrieval.index import KINDS, METRICS, CaseIndex, find_index

TASK = "task3_retrieval"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="what the CNN was trained on (other backbones: PneumoniaMNIST)")
    add_embedding_options(parser)
    g = parser.add_argument_group("images")
    # fmt: off
    g.add_argument("--split", default=None, choices=[*SPLITS, "all"],
        help="images of the data set to put in (default: train)")
    g.add_argument("--images", nargs="+", metavar="PATH",
        help="instead of a data set: image files, folders (searched through) or glob patterns")
    g.add_argument("--labels", metavar="CSV",
        help="labels of --images: columns file, label and, if there are several, split")
    g.add_argument("--input-size", type=bounded(int, 8, 2048), metavar="PIXELS",
        help="side of the network's input (default: torchvision 224, pixels the image's own)")
    g = parser.add_argument_group("index")
    g.add_argument("--index", default=None, choices=KINDS,
        help="flat: exact; hnsw, ivfpq: approximate, for large galleries (default: flat)")
    g.add_argument("--metric", default=None, choices=METRICS,
        help="Euclidean distance, or cosine similarity (default: l2)")
    g.add_argument("--update", metavar="INDEX", help="an index, or its run folder, to change in place")
    g.add_argument("--add", action="store_true", help="with --update: add the images of --split or --images")
    g.add_argument("--remove", type=bounded(int, 0, 2**62), nargs="+", metavar="ID",
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
        if not args.add and (args.images or args.split or args.image_size or args.limit or args.data != "auto"):
            parser.error("--images, --split, --data, --image-size and --limit say what to add: give --add too")
    if args.images and (args.data != "auto" or args.split or args.image_size):
        parser.error("--images stands instead of a data set: leave --data, --split and --image-size out")
    if args.labels and not args.images:
        parser.error("--labels belongs to --images; a data set has its own labels")
    args.split, args.index, args.metric = args.split or "train", args.index or "flat", args.metric or "l2"
    if args.dry_run:
        args.device = "cpu"
    return args


@script(torchrun=True)
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    rank, world_size = start_distributed(device)
    if args.update is not None:
        return update(args, device, rank, world_size)

    embedder, data = embedder_and_data(args, device, args.input_size, files=bool(args.images))
    cases = dataset_cases(data, args.split) if data else file_cases(args.images, args.labels, args.limit)
    vectors, good, errors = embed_cases(embedder, cases, rank, world_size)
    embedded = time.time()
    index = index_of(vectors, cases, embedder, good, args.index, args.metric)
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
            **told_by(index),
            "n_errors": len(errors),
            "dim": index.dim,
            "index": args.index,
            "metric": args.metric,
            "split": args.split if not args.images else None,
            "limited": args.limit is not None,
            "model": embedder.facts(),
            "seconds_embedding": round(embedded - started, 3),
            "seconds_building": round(built - embedded, 3),
            "bytes": sum(p.stat().st_size for p in (run_dir / "index").iterdir()),
            **run_facts(started, device),
        },
    )
    counts = ", ".join(f"{n} {c}" for n, c in index.label_counts().items())
    skipped = f", {len(errors)} files skipped (errors.csv)" if errors else ""
    about = f"{index.dim} numbers ({embedder.title}), {args.index} with {args.metric}: {counts}"
    print(f"{'PHANTOM images: ' * told_by(index)['phantom']}{len(index)} images of {about}")
    seconds = f"embedded in {embedded - started:.1f} s, indexed in {built - embedded:.1f} s"
    print(f"{seconds}{skipped}; index in {run_dir / 'index'}")
    if data is not None and not args.dry_run:
        place = ["--data-dir", args.data_dir] if data.path else []
        query = ("--query-index", 0, "--index", run_dir, *place)
        print(f"ask it with a film of yours, or: {command('task3_retrieval/infer.py', *query)}")


def update(args, device, rank, world_size):
    """--update: remove, then add, then save in place; nothing is written when one of them fails."""
    folder = find_index(args.update)
    if rank == 0:
        lock_run(folder.parent)
    index = CaseIndex.load(folder)
    before, errors, known = len(index), [], index.metadata["datasets"]
    if args.remove:
        if len(set(args.remove)) >= len(index) and not args.add:
            raise InputError(f"{folder} would be empty after that; delete the folder instead")
        index.remove(args.remove)
    if args.add:
        embedder = embedder_like(index.metadata.get("embedder"), args.cnn_weights, device, args.batch_size)
        index.check_embedder(embedder, folder)
        if args.images:
            cases = file_cases(args.images, args.labels, args.limit, index.metadata["label_names"])
        else:
            data = load_data(args, embedder, next(iter(known), None))
            if data.name in known and known[data.name]["sha256"] != data.sha256:
                raise InputError(f"{data.source} is not the file the index was built from (other SHA-256)")
            embedder.check_dataset(data.name, args.allow_other_dataset)
            cases = dataset_cases(data, args.split)
            if index.metadata["label_names"] not in ([], cases["label_names"]):
                raise InputError(
                    f"the index has the labels {', '.join(index.metadata['label_names'])}, {data.name} has"
                    f" {', '.join(cases['label_names'])}; build an index of its own"
                )
        vectors, good, errors = embed_cases(embedder, cases, rank, world_size)
        index.metadata["label_names"] = cases["label_names"]
        columns = [[cases[c][i] for i in good] for c in ("labels", "names", "splits")]
        index.add(vectors, index.next_id() + np.arange(len(good)), *columns)
        index.metadata["datasets"] = known | cases["datasets"]
    index.fit_typical()
    if rank > 0:
        return
    index.save(folder)
    path, old = folder.parent / "metrics.json", folder.parent / "errors.csv"
    before_these = list(csv.DictReader(old.read_text("utf-8").splitlines())) if old.is_file() else []
    if path.is_file() and "typical_distance" in (metrics := read_json(path)):
        limited = metrics.get("limited") or args.limit is not None
        n_errors = len(before_these) + len(errors)
        write_json(path, metrics | told_by(index) | {"limited": limited, "n_errors": n_errors})
    if errors:
        write_csv(old, [*before_these, *errors])
    counts = ", ".join(f"{n} {c}" for n, c in index.label_counts().items())
    skipped = f", {len(errors)} files skipped ({folder.parent}/errors.csv)" if errors else ""
    print(f"{folder}: {before} images before, {len(index)} now{skipped}: {counts}")


def told_by(index):
    """What metrics.json says of an index, also after an update."""
    sets = index.metadata["datasets"]
    facts = {"n": len(index), "dataset": sets, "datasets": list(sets), "labels": index.label_counts()}
    phantom = any(d["phantom"] for d in sets.values())
    return facts | {"phantom": phantom, "typical_distance": index.metadata["typical"]}


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
        vectors = np.concatenate([e[0] for e in everyone])
        good, errors = (sum((e[i] for e in everyone), []) for i in (1, 2))
        order = np.argsort(good)
        vectors, good = vectors[order], [good[i] for i in order]
    if not good:
        raise InputError(
            f"none of the {len(cases['images'])} images could be used; {errors[0]['path']}: {errors[0]['error']}"
        )
    for error in errors if rank == 0 else ():
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    return vectors, good, errors


if __name__ == "__main__":
    main()
