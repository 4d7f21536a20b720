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
with what could not be used, figures/query_*.png, page.html (all of them in one file), metrics.json. Figures and page
show the films of the gallery: treat them like the films. For research and teaching only: this is not a medical device,
and no output of it is medical advice.
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
from shared.report import Report, number, short_path
from shared.runtime import InputError, atomic_file, bounded, open_run_dir, pick_device, positive_int, run_facts, script
from shared.runtime import script_parser, write_csv, write_json
from task3_retrieval.cases import DRY_RUN, case_name, choose_classifier, classifier_answers, dataset_cases, index_of
from task3_retrieval.cases import printable, read_files
from task3_retrieval.embed import channels_first, channels_last, embedder_like, find_cnn, fit_images, load_embedder
from task3_retrieval.embed import preferred_run
from task3_retrieval.figures import PER_LINE, draw_cases
from task3_retrieval.gallery import Pictures, file_picture, grey_tile, heat_maps, short, to_rgb
from task3_retrieval.index import UNKNOWN, CaseIndex, find_index
from task3_retrieval.metrics import knn_vote

TASK = "task3_retrieval"
MOST_DRAWN = 4 * PER_LINE  # neighbours of one picture; the tables hold all


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
    g.add_argument("--index", metavar="DIR", help="folder of an index (default: the newest full run of build_index.py)")
    g.add_argument("-k", type=positive_int, default=5, help="neighbours per query (%(default)s)")
    g.add_argument("--only-label", nargs="+", metavar="LABEL", help="search among images with these labels")
    g.add_argument("--only-split", nargs="+", metavar="SPLIT", help="search among images of these splits")
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
    g.add_argument("--show", type=bounded(int, 0, 200), default=24, metavar="N",
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
    index, index_dir, embedder = open_index(args, device)
    phantom = any(d["phantom"] for d in index.metadata["datasets"].values())
    print(f"index: {index_dir} ({index}; {embedder.title}){'; PHANTOM images, drawn by this project' * phantom}")
    for warning in embedder.warnings(phantom):
        print(f"WARNING: {warning}")

    def fits(facts):
        return facts["label_names"] == index.label_names

    unlike = f", the index has {', '.join(index.label_names)}; leave --classifier out"
    own = embedder.weights if embedder.name == "cnn" else None
    classifier, facts = choose_classifier(args.classifier, fits, unlike, device, own)
    print(f"the vote is compared with {facts['path'] if facts else 'no classifier: there is none for these labels'}")
    if args.heatmaps and classifier is None:
        raise InputError(
            "--heatmaps needs a task 1 classifier with the labels of the index: give --classifier, or leave --heatmaps"
            " out"
        )
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
    called = calls_of(classifier, facts, queries, device, args.batch_size) if classifier is not None else None
    rows = index.rows_of(ids)
    predictions = list(predictions_of(index, queries, rows, distances, called, far, limit, not args.only_label))
    neighbours = list(neighbours_of(index, queries, rows, distances))

    run_dir = open_run_dir(args, TASK, "infer")
    write_csv(run_dir / "predictions.csv", predictions)
    write_csv(run_dir / "neighbours.csv", sum(neighbours, []))
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    drawn = zip(queries[: args.show], predictions, neighbours, strict=False)
    shown, missing = find_pictures([q | {"row": row, "found": found} for q, row, found in drawn], pictures)
    write_json(
        run_dir / "metrics.json",
        {
            "n": len(queries),
            "n_errors": len(errors),
            "k": args.k,
            "where": where,
            "n_queries_in_gallery": int((itself >= 0).sum()),
            "n_pictures_missing": missing,
            "n_unlike_gallery": sum(p["unlike_gallery"] for p in predictions) if limit is not None else None,
            "n_disagree": sum(p["agree"] is False for p in predictions) if called is not None else None,
            "index": str(index_dir),
            "index_kind": index.kind,
            "metric": index.metric,
            "gallery": len(index),
            "dataset": index.metadata["datasets"],
            "phantom": phantom,
            "model": embedder.facts(),
            "classifier": facts and facts["path"],
            "search_ms_per_query": round(search_ms, 4),
            **run_facts(started, device),
        },
    )
    for row in predictions[:20]:
        print(f"  {short_path(row['query'])}: {'; '.join(verdict(row))}")
    if len(predictions) > 20:
        print(f"  ... and {len(predictions) - 20} more")
    if shown:
        write_page(args, run_dir, index, shown, len(queries), missing, (classifier, facts, device), phantom, embedder)
    print(
        f"{len(queries)} queries, {len(errors)} skipped, {args.k} neighbours each; results in {run_dir}"
        f"{' (page.html opens in any browser)' if shown else ''}"
    )


# -------------------------------------------------------------------------------------------- the index, the classifier


def open_index(args, device):
    """--index -> (CaseIndex, its folder, the Embedder it was built with). A dry run builds one in memory."""
    if args.dry_run and not args.index:
        data = load_phantom(28, DRY_RUN)
        embedder, cases = load_embedder("pixels", data=data, device=device), dataset_cases(data, "train")
        return index_of(embedder(cases["images"]), cases, embedder), "made for this dry run", embedder
    place, full = (args.index, True) if args.index else preferred_run("build_index", "index/manifest.json")
    if place is None:
        raise InputError(
            "there is no index here; build one with python task3_retrieval/build_index.py, or give --index"
        )
    if not full:
        print("there is no index of a full run on real images: this one is limited, or of the phantom")
    folder = find_index(place)
    index = CaseIndex.load(folder)
    embedder = embedder_like(index.metadata.get("embedder"), args.cnn_weights, device, args.batch_size)
    index.check_embedder(embedder, folder)
    run, _ = preferred_run("train", "best.pt", embedder.trained_on)
    if embedder.title == "task 1 features" and run and find_cnn(embedder.trained_on)[0] == run / "best.pt":
        print(f"this index holds task 1's features; build_index.py would now take the trained embedding {run}")
    return index, folder, embedder


# ---------------------------------------------------------------------------------------------------------- the queries


def read_queries(args, index, embedder, pictures):
    """-> (dicts with name, label, picture uint8 (C, H, W), image for the embedder), errors as rows."""
    queries, errors = [], []
    numbers = (args.query_index or ([0, 1, 2] if args.dry_run and not args.query else []))[: args.limit]
    if numbers:
        if not index.metadata["datasets"]:
            raise InputError("--query-index: the index was built from files, not from a data set; name files instead")
        name, split = next(iter(index.metadata["datasets"])), args.query_split
        data = pictures.dataset(name)
        images, labels = data.images[split], data.labels[split]
        for n in numbers:
            case = case_name(name, split, n)
            if not 0 <= n < len(images):
                sentence = f"the {split} split of {name} has the images 0 to {len(images) - 1}"
                errors.append({"path": case, "error": sentence})
                continue
            label, image = data.label_names[int(labels[n])], channels_last(images[n][None])[0]
            queries.append({"name": case, "label": label, "picture": images[n], "image": image})
    for path in find_images(args.query)[: args.limit] if args.query else []:
        images, read, bad = read_files([path], embedder)
        errors += bad
        if read:
            name, folder = os.path.realpath(path), path.absolute().parent.name
            known = index.rows_of(index.ids_of([name]))[0]
            label = folder if folder in index.label_names else ""  # own folders: one per class
            if known >= 0 and index.labels[known] != UNKNOWN:
                label = index.label_of(known)
            queries.append({"name": name, "label": label, "picture": file_picture(path), "image": images[0]})
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


# ---------------------------------------------------------------------------------------------------------- the answers


def distance_to_gallery(index, vectors, itself, quantile):
    """
    -> (distance of each query to its k-th neighbour, limit), or (None, None) for a gallery too small to have a limit.
    """
    typical = index.metadata.get("typical")
    if not typical or typical["k"] >= len(index):
        return None, None
    distances, _ = index.search(vectors, typical["k"], exclude=itself)
    return index.far(distances[:, -1]), typical["distance"][quantile]


def calls_of(classifier, facts, queries, device, batch_size):
    """
    -> (called class, probability, the class it is the probability of) per query: of a binary set that of the second
    class, as task 1 has it, else that of the called one.
    """
    sizes = facts["image_size"], facts["channels"]
    images = torch.cat([fit_images(channels_first(q["image"][None]), *sizes) for q in queries])
    answers, probabilities = classifier_answers(classifier, facts, images, device, torch.float32, batch_size)
    of = np.ones_like(answers) if facts["task"] == "binary-class" else answers
    names = np.array(facts["label_names"], dtype=object)
    return list(zip(names[answers], probabilities.tolist(), names[of], strict=True))


def predictions_of(index, queries, rows, distances, called, far, limit, free=True):
    """
    Rows of predictions.csv. rows, distances (Q, k); called: see calls_of, or None; free: could the vote be any label?
    """
    k, num_classes = rows.shape[1], max(1, len(index.label_names))
    with np.errstate(invalid="ignore"):  # no share where no neighbour has a label
        votes, shares = knn_vote(rows, np.full(len(rows), k), -index.far(distances), index.labels, num_classes, k)
    for i, query in enumerate(queries):
        known = (index.labels[rows[i]] != UNKNOWN).any()
        vote = index.label_names[votes[i]] if known else ""
        share = round(float(shares[i, votes[i]]), 4) if known else ""
        row = {"query": printable(query["name"]), "label": query["label"], "vote": vote, "vote_share": share}
        if called is not None:
            name, probability, of = called[i]
            row |= {"classifier": name, "classifier_probability": round(probability, 4), "probability_of": of}
            row["agree"] = vote == name if known and free else ""
        if limit is not None:
            row |= {"distance_to_kth": round(float(far[i]), 6), "limit": round(limit, 6)}
            row["unlike_gallery"] = bool(far[i] > limit)
        yield row


def neighbours_of(index, queries, rows, distances):
    """Rows of neighbours.csv, one list per query."""
    for query, found, away in zip(queries, rows, distances, strict=True):
        yield [
            {"query": printable(query["name"]), "rank": rank, "id": int(index.ids[r]), "name": index.names[r]}
            | {"split": index.splits[r], "label": index.label_of(r), unit_of(index): float(d)}
            for rank, (r, d) in enumerate(zip(found, away, strict=True), 1)
        ]


def unit_of(index):
    return "similarity" if index.metric == "cosine" else "distance"


def verdict(row):
    """A row of predictions.csv in words."""
    lines = [f"neighbours: {row['vote']} ({row['vote_share']:.0%})" if row["vote"] else "no labelled neighbour"]
    if "classifier" in row:
        probability = f"probability of {row['probability_of']} {number(row['classifier_probability'])}"
        agrees = {True: ", agrees", False: ", DISAGREES", "": ""}[row["agree"]]
        lines.append(f"classifier: {row['classifier']} ({probability}){agrees}")
    if row.get("unlike_gallery"):
        lines.append(f"WARNING: unlike the gallery ({row['distance_to_kth']:.3g}, limit {row['limit']:.3g})")
    return lines


# ------------------------------------------------------------------------------------------------------------- the page


def find_pictures(cases, pictures):
    """
    -> (the cases, each neighbour that is drawn with its picture, number of pictures that are gone: grey squares).
    """
    missing = {}
    for case in cases:
        case["found"] = case["found"][:MOST_DRAWN]
        for tile in case["found"]:
            try:
                tile["picture"] = pictures(tile["name"])
            except InputError as error:
                missing.setdefault(tile["name"], str(error))
                tile["picture"] = grey_tile()
    for name, error in list(missing.items())[:1]:
        print(f"  {len(missing)} pictures of the gallery could not be found; {name}: {error}", file=sys.stderr)
    return cases, len(missing)


def write_page(args, run_dir, index, cases, num_cases, missing, explained_by, phantom, embedder):
    """A figure per query, and page.html with all of them. explained_by: (classifier, facts, device) of heat maps."""
    unit = unit_of(index)
    title = (
        f"The {args.k} most similar of {len(index)} ({', '.join(index.metadata['datasets']) or 'files'}),"
        f" {embedder.title}, {index.metric}"
    )
    page = Report(title, phantom, embedder.warnings(phantom))
    page.text("The page holds pictures of the gallery: share it only where the images may be shared.")
    for what, only in (("label", args.only_label), ("split", args.only_split)):
        if only:
            page.text(f"Searched: images with the {what} {' or '.join(only)} only (--only-{what}).")
    if num_cases > len(cases):
        page.text(f"The first {len(cases)} of {num_cases} queries (--show); all are in neighbours.csv.")
    if args.k > MOST_DRAWN:
        page.text(f"The nearest {MOST_DRAWN} of {args.k} neighbours are drawn; all are in neighbours.csv.")
    if missing:
        page.text(f"{missing} pictures of the gallery could not be found; a grey square stands for them.")
    for number_of_case, case in enumerate(cases, 1):
        row, tiles = case["row"], case["found"]
        found = [case["picture"], *(tile["picture"] for tile in tiles)]
        heat = heat_maps(*explained_by[:2], found, explained_by[2]) if args.heatmaps else [None] * len(found)
        words = [f"query {short(row['query'])}\n{case['label'] or 'label not known'}"]
        words += [f"{tile['rank']}: {tile['label']}\n{unit} {tile[unit]:#.3g}" for tile in tiles]
        labels = [case["label"], *(tile["label"] for tile in tiles)]
        query, *neighbours = (
            {"picture": to_rgb(p), "heat": h, "label": label, "text": text}
            for p, h, label, text in zip(found, heat, labels, words, strict=True)
        )
        path = run_dir / "figures" / f"query_{number_of_case:02d}.png"
        above = f"{short(row['query'])}: {'; '.join(verdict(row))}"
        draw_cases(path, [query | {"neighbours": neighbours}], index.label_names, above, phantom)
        page.heading(short(row["query"], 60))
        page.text("; ".join(f"**{line}**" if line.startswith("WARNING") else line for line in verdict(row)))
        page.figure(path, f"The query, then its neighbours by {unit}; the frames repeat the labels as colours.")
        header = ["rank", "id", "name", "split", "label", unit]
        page.table(header, [[short(str(tile[c])) if c == "name" else tile[c] for c in header] for tile in tiles])
    with atomic_file(run_dir / "page.html", "w") as file:
        file.write(page.html())


if __name__ == "__main__":
    main()
