"""
Find the cases most similar to an image: table, gallery and page, what the neighbours' labels say, and a warning.

Usage:
    python task3_retrieval/infer.py film.png                                     # in the newest index
    python task3_retrieval/infer.py films/ "more/*.jpg" --index outputs/task3_retrieval/build_index/001 -k 10
    python task3_retrieval/infer.py --query-index 0 20 70 --heatmaps  # test images of the index's data set, by number
    python task3_retrieval/infer.py film.png --only-label pneumonia --only-split train

A query that is itself in the index is not among its own neighbours. The warning "unlike the gallery": the distance to
the 10th neighbour is above what 95 % of the gallery's own images have, each without itself; filters do not matter. It
is a coarse check, and 5 % of ordinary images are meant to get it: a network may put a picture of something else close
to a class (README). Writes to the run folder: neighbours.csv, predictions.csv (vote, classifier, warning), errors.csv
with what could not be used, figures/gallery_*.png, page.html, metrics.json. Figures and page show the films of the
gallery: treat them like the films. For research and teaching only: this is not a medical device, and no output of it is
medical advice.
"""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch

from shared.data.image_sets import SPLITS, load_phantom
from shared.data.images import find_images
from task3_retrieval.metrics import knn_vote
from shared.runtime import InputError, load_checkpoint, newest_run, open_run_dir, pick_device, positive_int, run_facts
from shared.runtime import script, script_parser, write_csv, write_json
from task1_classification.explain import GradCAM
from task1_classification.model import KEYS, find_classifier, load_classifier, predict_logits, to_probabilities
from task3_retrieval.build_index import DRY_RUN, case_name, channels_last, read_files
from task3_retrieval.embed import channels_first, embedder_like, fit_images
from task3_retrieval.gallery import PAGE, Pictures, draw_gallery, file_picture, grey_tile, heat_maps, to_rgb, write_page
from task3_retrieval.index import BACKENDS, UNKNOWN, CaseIndex, find_index

TASK = "task3_retrieval"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("queries")
    g.add_argument("query", nargs="*", metavar="PATH", help="image files, folders (searched through) or glob patterns")
    # fmt: off
    g.add_argument("--query-index", type=int, nargs="+", metavar="N",
        help="images of the index's data set, by their number in --query-split, from 0")
    g.add_argument("--query-split", default="test", choices=SPLITS,
        help="split that --query-index counts in (%(default)s)")
    g.add_argument("--data-dir", metavar="DIR", default=os.environ.get("MEDVLM_DATA") or "data",
        help="folder with the data files; $MEDVLM_DATA, else data (%(default)s)")
    g = parser.add_argument_group("search")
    g.add_argument("--index", metavar="DIR", help="folder of an index (default: the newest run of build_index.py)")
    g.add_argument("-k", type=positive_int, default=5, help="neighbours per query (%(default)s)")
    g.add_argument("--only-label", nargs="+", metavar="LABEL", help="search among images with these labels")
    g.add_argument("--only-split", nargs="+", metavar="SPLIT", help="search among images of these splits")
    g.add_argument("--backend", default="auto", choices=BACKENDS,
        help="auto: faiss where it is installed (%(default)s)")
    g.add_argument("--warn-at", default="0.95", choices=["0.95", "0.99"],
        help="share of the gallery that the warning spares (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    g = parser.add_argument_group("model")
    g.add_argument("--cnn-weights", metavar="FILE",
        help="where the weights of the index lie now (default: where they lay)")
    g.add_argument("--classifier", metavar="FILE",
        help="task 1 checkpoint to compare the vote with (default: the index's own, or models/task1_model.pth)")
    g = parser.add_argument_group("output")
    g.add_argument("--heatmaps", action="store_true",
        help="also show where the classifier looks (Grad-CAM), on queries and neighbours")
    g.add_argument("--layer", default="auto",
        help="layer of the heat maps; auto: the deepest with a map of at least 7x7 (%(default)s)")
    g.add_argument("--show", type=positive_int, default=24, metavar="N",
        help="queries to draw, the first N; the tables hold all (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.query and not args.query_index and not args.dry_run:
        parser.error("name an image file, folder or pattern, or --query-index (or --dry-run)")
    if args.dry_run:
        args.device = "cpu"
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, _ = pick_device(args.device)
    index_dir = find_index(choose_index(args))
    print(f"index: {index_dir}")
    index = CaseIndex.load(index_dir, backend=args.backend)
    embedder = embedder_like(index.metadata["embedder"], args.cnn_weights, device, args.batch_size)
    index.check_embedder(embedder, index_dir)
    classifier, facts = choose_classifier(args, index, embedder, device)
    print(
        f"{index}; the vote is compared with"
        f" {facts['path'] if facts else 'no classifier: there is none for these labels'}"
    )
    if args.heatmaps:
        if classifier is None:
            raise InputError(
                "--heatmaps needs a task 1 classifier with the labels of the index: give --classifier, or leave"
                " --heatmaps out"
            )
        GradCAM(
            classifier, args.layer, facts["image_size"], facts["channels"]
        )  # an unknown layer is refused before anything is written
    where = {f: v for f, v in (("label", args.only_label), ("split", args.only_split)) if v} or None

    pictures = Pictures(index, args.data_dir)
    if args.dry_run:
        pictures.sets["phantom"] = load_phantom(28, DRY_RUN)
    queries, errors = read_queries(args, index, embedder, pictures)
    vectors = embed_queries(embedder, queries)
    itself = index.ids_of([q["name"] for q in queries])
    search_started = time.perf_counter()
    distances, ids = index.search(vectors, args.k, exclude=itself, where=where)
    search_ms = 1000 * (time.perf_counter() - search_started) / len(queries)
    far, limit = distance_to_gallery(index, vectors, itself, args.warn_at)

    rows = index.rows_of(ids)  # (Q, k)
    called = classifier_calls(classifier, facts, queries, device, args.batch_size) if classifier is not None else None
    with np.errstate(invalid="ignore"):  # no share where no neighbour has a label
        votes, shares = knn_vote(
            rows, np.full(len(rows), args.k), -index.far(distances), index.labels, len(index.label_names), args.k
        )
    cases = []  # what is known of each query: a row of predictions.csv, its rows of neighbours.csv, its picture
    for i, query in enumerate(queries):
        known = (index.labels[rows[i]] != UNKNOWN).any()
        row = {
            "query": query["name"],
            "label": query["label"],
            "vote": index.label_names[votes[i]] if known else "",
            "vote_share": round(float(shares[i, votes[i]]), 4) if known else "",
        }
        if called is not None:
            row |= {
                "classifier": called[i][0],
                "classifier_probability": round(called[i][1], 4),
                "agree": row["vote"] == called[i][0],
            }
        if limit is not None:
            row |= {
                "distance_to_kth": round(float(far[i]), 6),
                "limit": round(limit, 6),
                "unlike_gallery": bool(far[i] > limit),
            }
        found = [
            {
                "query": query["name"],
                "rank": rank,
                "id": int(index.ids[r]),
                "name": index.names[r],
                "split": index.splits[r],
                "label": index.label_of(r),
                unit_of(index): float(d),
            }
            for rank, (r, d) in enumerate(zip(rows[i], distances[i], strict=True), 1)
        ]
        cases.append({"row": row, "found": found, "picture": query["picture"]})

    run_dir = open_run_dir(args, TASK, "infer")
    predictions = [c["row"] for c in cases]
    write_csv(run_dir / "predictions.csv", predictions)
    write_csv(run_dir / "neighbours.csv", [n for c in cases for n in c["found"]])
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    missing = show(args, run_dir, index, cases, pictures, classifier, facts, device)
    write_json(
        run_dir / "metrics.json",
        {
            "n": len(cases),
            "n_errors": len(errors),
            "k": args.k,
            "where": where,
            "n_queries_in_gallery": int((itself >= 0).sum()),
            "n_pictures_missing": missing,
            "n_unlike_gallery": sum(p["unlike_gallery"] for p in predictions) if limit is not None else None,
            "n_disagree": sum(not p["agree"] for p in predictions) if called is not None else None,
            "index": str(index_dir),
            "index_kind": index.kind,
            "metric": index.metric,
            "backend": index.backend,
            "gallery": len(index),
            "dataset": index.metadata["datasets"],
            "model": embedder.facts(),
            "classifier": facts and facts["path"],
            "search_ms_per_query": round(search_ms, 4),
            **run_facts(started, device),
        },
    )
    for row in predictions[:20]:
        print(f"  {row['query']}: {'; '.join(verdict(row))}")
    if len(predictions) > 20:
        print(f"  ... and {len(predictions) - 20} more")
    print(
        f"{len(cases)} queries, {len(errors)} skipped, {args.k} neighbours each; results in {run_dir} (page.html opens"
        " in any browser)"
    )


def choose_index(args):
    if args.index:
        return args.index
    if args.dry_run:
        from task3_retrieval.build_index import main as build

        build(["--dry-run"])
        return Path("outputs") / TASK / "build_index" / "dry-run"
    run = newest_run(TASK, "build_index", "index/manifest.json")
    if run is None:
        raise InputError(
            "there is no index here; build one with python task3_retrieval/build_index.py, or give --index"
        )
    return run


def choose_classifier(args, index, embedder, device):
    """
    --classifier, else the CNN of the index where it is a whole classifier, else the one at its usual place if it knows
    the labels.
    """
    path = args.classifier
    if path is None:
        own = embedder.weights if embedder.name == "cnn" else None
        candidates = [p for p in (own, find_classifier()) if p is not None]
        path = next((p for p in candidates if all(k in load_checkpoint(p) for k in KEYS)), None)
    if path is None:
        return None, None
    model, facts = load_classifier(path, device)
    if facts["label_names"] != index.label_names:
        if args.classifier:
            raise InputError(
                f"{path} answers {', '.join(facts['label_names'])}, the index has {', '.join(index.label_names)}; leave"
                " --classifier out"
            )
        return None, None
    return model, facts | {"path": str(path)}


def read_queries(args, index, embedder, pictures):
    """-> (dicts with name, label, picture uint8 (C, H, W), image for the embedder), errors as rows."""
    queries, errors = [], []
    numbers = args.query_index or ([0, 1, 2] if args.dry_run and not args.query else [])
    if numbers:
        if not index.metadata["datasets"]:
            raise InputError("--query-index: the index was built from files, not from a data set; name files instead")
        name = next(iter(index.metadata["datasets"]))
        data = pictures.dataset(name)
        images, labels = data.images[args.query_split], data.labels[args.query_split]
        for n in numbers:
            case = case_name(name, args.query_split, n)
            if not 0 <= n < len(images):
                errors.append(
                    {
                        "path": case,
                        "error": f"the {args.query_split} split of {name} has the images 0 to {len(images) - 1}",
                    }
                )
                continue
            queries.append(
                {
                    "name": case,
                    "label": data.label_names[int(labels[n])],
                    "picture": images[n],
                    "image": channels_last(images[n][None])[0],
                }
            )
    for path in find_images(args.query)[: args.limit] if args.query else []:
        images, read, bad = read_files([path], embedder)
        errors += bad
        if read:
            name = str(path.resolve())
            known = index.rows_of(index.ids_of([name]))[0]
            queries.append(
                {
                    "name": name,
                    "label": index.label_of(known) if known >= 0 and index.labels[known] != UNKNOWN else "",
                    "picture": file_picture(path),
                    "image": images[0],
                }
            )
    if not queries:
        raise InputError(f"none of the {len(errors)} queries could be used; {errors[0]['path']}: {errors[0]['error']}")
    for error in errors:
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    return queries, errors


def embed_queries(embedder, queries):
    """
    -> float32 (Q, dim). Images of a data set and files may differ in size and colour: each kind on its own, the order
    kept.
    """
    vectors = np.empty((len(queries), embedder.dim), dtype=np.float32)
    shapes = [q["image"].shape for q in queries]
    for shape in set(shapes):
        members = [i for i, s in enumerate(shapes) if s == shape]
        vectors[members] = embedder(np.stack([queries[i]["image"] for i in members]))
    return vectors


def distance_to_gallery(index, vectors, itself, quantile):
    """
    -> (distance of each query to its k-th neighbour, limit), or (None, None) for a gallery too small to have a limit.
    """
    typical = index.metadata.get("typical")
    if not typical or typical["k"] >= len(index):
        return None, None
    distances, _ = index.search(vectors, typical["k"], exclude=itself)
    return index.far(distances[:, -1]), typical["distance"][quantile]


def classifier_calls(classifier, facts, queries, device, batch_size):
    """-> (name of the called class, its probability) per query."""
    images = torch.cat(
        [fit_images(channels_first(q["image"][None]), facts["image_size"], facts["channels"]) for q in queries]
    )
    p = to_probabilities(
        predict_logits(classifier, images, facts["normalisation"], device, batch_size=batch_size),
        facts["task"],
        facts["temperature"],
    ).numpy()
    names = facts["label_names"]
    if facts["task"] == "binary-class":
        return [(names[int(x > facts["threshold"])], float(x if x > facts["threshold"] else 1 - x)) for x in p]
    return [(names[int(x.argmax())], float(x.max())) for x in p]


def unit_of(index):
    return "similarity" if index.metric == "cosine" else "distance"


def verdict(row):
    """A row of predictions.csv in words."""
    lines = [f"neighbours: {row['vote']} ({row['vote_share']:.0%})" if row["vote"] else "no labelled neighbour"]
    if "classifier" in row:
        lines.append(
            f"classifier: {row['classifier']} ({row['classifier_probability']:.2f}),"
            f" {'agrees' if row['agree'] else 'DISAGREES'}"
        )
    if row.get("unlike_gallery"):
        lines.append(f"WARNING: unlike the gallery ({row['distance_to_kth']:.3g}, limit {row['limit']:.3g})")
    return lines


def show(args, run_dir, index, cases, pictures, classifier, facts, device):
    """Figures and page of the first --show queries; returns how many pictures of the gallery could not be found."""
    unit, missing, drawn = unit_of(index), {}, []
    for case in cases[: args.show]:
        row = case["row"]
        drawn.append(
            {
                "name": row["query"],
                "label": row["label"],
                "picture": case["picture"],
                "verdict": verdict(row),
                "warn": row.get("unlike_gallery", False),
                "neighbours": [],
            }
        )
        for n in case["found"]:
            try:
                picture = pictures(n["name"])
            except InputError as error:
                missing.setdefault(n["name"], str(error))
                picture = grey_tile()
            drawn[-1]["neighbours"].append(n | {"distance": n[unit], "picture": picture})
    for name, error in list(missing.items())[:1]:
        print(f"  {len(missing)} pictures of the gallery could not be found; {name}: {error}", file=sys.stderr)
    tiles = [tile for case in drawn for tile in (case, *case["neighbours"])]
    heat = (
        heat_maps(classifier, facts, [t["picture"] for t in tiles], args.layer, device)
        if args.heatmaps
        else [None] * len(tiles)
    )
    for tile, h in zip(tiles, heat, strict=True):
        tile["heat"], tile["picture"] = h, to_rgb(tile["picture"])
    phantom = any(d["phantom"] for d in index.metadata["datasets"].values())
    title = (
        f"{'PHANTOM images, ' if phantom else ''}the {args.k} most similar of {len(index)}"
        f" ({', '.join(index.metadata['datasets']) or 'files'}), {index.metadata['embedder']['backbone']},"
        f" {index.metric}"
    )
    for page, start in enumerate(range(0, len(drawn), PAGE), 1):
        draw_gallery(
            run_dir / "figures" / f"gallery_{page:02d}.png", drawn[start : start + PAGE], index.label_names, title, unit
        )
    notes = [
        "Research and teaching only: not a medical device. The page holds pictures of the gallery: share it only where"
        " the images may be shared."
    ]
    if len(cases) > len(drawn):
        notes.append(f"The first {len(drawn)} of {len(cases)} queries (--show); all are in neighbours.csv.")
    if missing:
        notes.append(f"{len(missing)} pictures of the gallery could not be found; a grey square stands for them.")
    write_page(run_dir / "page.html", drawn, index.label_names, title, unit, notes)
    return len(missing)


if __name__ == "__main__":
    main()
