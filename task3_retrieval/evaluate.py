"""
Measure retrieval of similar cases: every test image searches the training images, and the other test images.

Usage:
    python task3_retrieval/evaluate.py  # newest embedding of train.py, else task 1's features
    python task3_retrieval/evaluate.py --cnn-weights models/task1_model.pth
    python task3_retrieval/evaluate.py --backbone google/siglip-base-patch16-224
    python task3_retrieval/evaluate.py --queries val                    # for choosing; the test split stays unread
    python task3_retrieval/evaluate.py --dry-run                        # phantom images, CPU, a few seconds

Similar = same label. Rankings are exact and over the whole gallery, ties go to the smaller id; a query never finds
itself or a byte-identical copy. Chance, raw pixels and an untrained network are searched in the same way and stand in
the same table. Nothing is chosen or fitted here, except the limit of the warning for foreign images, which comes from
the validation images. Writes to the run folder: metrics.json, predictions.csv (one row per query), report.md,
figures/*.png; and the hand-in copy reports/task3_retrieval.md with reports/figures/task3_*.png.
"""

import csv
import dataclasses
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from shared.data.augment import shifted_copies  # the same changes that validation is judged under, see train.py
from shared.data.image_sets import load_images, load_phantom
from task3_retrieval.metrics import chance, chance_vote, content_codes, duplicate_report, first_of, hubness, knn_vote
from task3_retrieval.metrics import leave_one_out_draws, query_draws, query_metrics, rank_gallery, relevance, summarise
from shared.metrics.statistics import bootstrap_interval, mcnemar_exact, wilson_interval
from shared.report import write_report
from shared.runtime import InputError, atomic_file, free_gpu, load_checkpoint, newest_run, open_run_dir, pick_device
from shared.runtime import positive_int, run_facts, script, script_parser, seed_everything, write_json
from task1_classification.model import find_classifier, load_classifier, predict_logits, to_probabilities
from task3_retrieval.embed import EMBEDDING_KIND, load_embedder
from task3_retrieval.figures import draw_distances, draw_map, draw_neighbours, draw_precision
from task3_retrieval.report import HAND_IN, report_text, table

TASK = "task3_retrieval"
SCALE = {"cosine": "cosine {:.3f}", "l2": "distance {:.2f}"}
BLOCK = 2**24  # similarities held at once
DEMONSTRATION = (0, 20, 70)
MOST_LOO = 2000  # images up to which leave-one-out resamples the gallery too


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="PneumoniaMNIST")
    g = parser.add_argument_group("embedding")
    # fmt: off
    g.add_argument("--backbone", default="cnn",
        help="what makes the vectors; cnn, pixels, a torchvision name, a model folder: see embed.py (%(default)s)")
    g.add_argument("--cnn-weights", metavar="PATH", help="best.pt or run folder of train.py, or a task 1 classifier "
        "(default: newest run of train.py, else models/task1_model.pth)")
    g.add_argument("--classifier", metavar="FILE",
        help="task 1 classifier to compare the vote with (default: models/task1_model.pth, else ./task1_model.pth)")
    g.add_argument("--allow-other-dataset", action="store_true",
        help="use weights that were trained on another data set")
    g.add_argument("--metric", default="cosine", choices=["cosine", "l2"],
        help="similarity of the vectors (%(default)s)")
    g.add_argument("--image-size", type=int, default=28, choices=[28, 64, 128, 224],
        help="pixels per side of the data file (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    g = parser.add_argument_group("search")
    g.add_argument("--queries", default="test", choices=["test", "val"], help="images that ask (%(default)s)")
    g.add_argument("--vote", type=positive_int, default=5, metavar="K", help="neighbours that vote; odd (%(default)s)")
    g.add_argument("--resamples", type=positive_int, default=2000,
        help="bootstrap resamples; leave-one-out takes a quarter of them (%(default)s)")
    g = parser.add_argument_group("report")
    g.add_argument("--show", type=int, nargs="+", metavar="INDEX",
        help="queries of the demonstration picture (default: 0 20 70)")
    # fmt: on
    g.add_argument("--cases", type=positive_int, default=6, help="failures shown and listed (%(default)s)")
    args = parser.parse_args(argv)
    if args.vote % 2 == 0:
        parser.error("--vote must be odd, so that two classes cannot tie")
    if args.dry_run:
        args.device, args.data, args.resamples = "cpu", "phantom", min(args.resamples, 200)
    return args


# -------------------------------------------------------------------------------------------------------------- search


def prepare(vectors, metric):
    """
    float32 (N, D) -> float64; for cosine of unit length (a vector of zeros stays one), rounded to float32 as in
    index.py.
    """
    vectors = vectors.astype(np.float64)
    if metric == "cosine":
        vectors = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)).astype(np.float32)
    return vectors.astype(np.float64)


def similarities(queries, gallery, metric):
    """
    (Q, D), (N, D), both prepared -> float32 (Q, N): cosine, or minus the Euclidean distance. Computed in float64 and
    rounded, so that copies of one image tie, and then the smaller id comes first, as in index.py.
    """
    product = queries @ gallery.T
    if metric == "cosine":
        return product.astype(np.float32)
    squared = (queries**2).sum(1)[:, None] + (gallery**2).sum(1) - 2 * product
    return -np.sqrt(np.maximum(squared, 0)).astype(np.float32)


def search(queries, gallery, metric, query_labels, gallery_labels, num_classes, same, k):
    """
    Rank the gallery for every query, block by block. `same` (Q,), (N,): content codes; equal ones must not find each
    other. -> dict of values {metric: (Q,)}, first (Q, most) gallery rows, left (Q,), similarity (Q, most) of these,
    called (Q,), share (Q, C); most = 50 or the size of the gallery.
    """
    queries, gallery = prepare(queries, metric), prepare(gallery, metric)
    query_codes, gallery_codes = same
    most, parts = min(50, len(gallery)), []
    step = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similarity = similarities(queries[rows], gallery, metric)
        order, left = rank_gallery(similarity, query_codes[rows, None] == gallery_codes)
        values = query_metrics(relevance(order, left, query_labels[rows], gallery_labels))
        first, near = first_of(similarity, order, most)
        called, share = knn_vote(first, left, near, gallery_labels, num_classes, k)
        values["vote"] = (called == query_labels[rows]).astype(np.float64)
        parts.append({**values, "first": first, "left": left, "similarity": near, "called": called, "share": share})
    joined = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    found = {key: joined.pop(key) for key in ("first", "left", "similarity", "called", "share")}
    return {"values": joined, **found}


def as_distance(similarity, metric):
    """What `similarities` returns -> what grows with the distance: 1 - cosine, or the Euclidean distance."""
    return 1 - similarity if metric == "cosine" else -similarity


def evaluate_system(embed, metric, data, args, codes, labels):
    """Vectors of one system -> its searches: queries in training, queries among themselves, validation in training."""
    print(f"  {embed.name}, {metric}: {embed.dim} numbers per image", flush=True)
    num_classes, queries = len(data.label_names), args.queries
    vectors = {split: embed(pictures(data.images[split])) for split in {"train", "val", queries}}
    settings = dict(metric=metric, num_classes=num_classes, k=args.vote)
    system = {"embed": embed, "metric": metric, "vectors": vectors}
    for name, (split, gallery) in {
        "across": (queries, "train"),
        "within": (queries, queries),
        "val": ("val", "train"),
    }.items():
        system[name] = search(
            vectors[split],
            vectors[gallery],
            query_labels=labels[split],
            gallery_labels=labels[gallery],
            same=(codes[split], codes[gallery]),
            **settings,
        )
    return system


def pictures(images):
    """uint8 tensor (N, C, H, W) -> array (N, H, W) or (N, H, W, 3), what an embedder takes."""
    return images[:, 0].numpy() if images.shape[1] == 1 else images.permute(0, 2, 3, 1).numpy()


# ----------------------------------------------------------------------------------------------------- what is measured


def compare_all(systems, data, args, codes, labels):
    """
    Tables {protocol: {system: {"micro" | "macro" | class: {metric: numbers}}}}; the floor of all differences is pixels,
    cosine.
    """
    queries, num_classes, tables = args.queries, len(data.label_names), {}
    y, floor = labels[queries], "raw pixels, cosine"
    for protocol, gallery in (("across", "train"), ("within", queries)):
        draws = {}
        for name, system in systems.items():
            if protocol == "within" and len(y) <= MOST_LOO:
                v = prepare(system["vectors"][queries], system["metric"])
                draws[name] = leave_one_out_draws(
                    similarities(v, v, system["metric"]),
                    y,
                    num_classes,
                    codes[queries][:, None] == codes[queries],
                    vote_k=args.vote,
                    num_samples=max(1, args.resamples // 4),
                    seed=args.seed,
                )
            else:
                draws[name] = query_draws(
                    system[protocol]["values"], y, num_classes, codes[queries], args.resamples, args.seed
                )
        rows = tables[protocol] = {}
        for name, system in systems.items():
            baseline = None if name == floor else (systems[floor][protocol]["values"], draws[floor])
            rows[name] = summarise(system[protocol]["values"], y, num_classes, draws[name], baseline)
        left = systems[floor][protocol]["left"]
        same = np.bincount(labels[gallery], minlength=num_classes)[y] - (
            len(labels[gallery]) - left
        )  # copies have the same label
        expected = chance(same, left)
        if num_classes == 2:
            expected["vote"] = chance_vote(same, left, args.vote)
        rows["chance, exact"] = summarise(expected, y, num_classes)
    return tables


def against(systems, args, labels, codes, num_classes, first, second):
    """Paired difference of two systems on the headline protocol."""
    y = labels[args.queries]
    draws = [
        query_draws(systems[name]["across"]["values"], y, num_classes, codes[args.queries], args.resamples, args.seed)
        for name in (first, second)
    ]
    return summarise(
        systems[first]["across"]["values"], y, num_classes, draws[0], (systems[second]["across"]["values"], draws[1])
    )


def view_recall(system, data, queries, codes):
    """
    A similarity that needs no label: a changed copy of every query image searches the unchanged query images. How often
    does it find its own original (or a byte-identical one) first, and among the first five? {change: {"R@1", "R@5"}}
    and their mean.
    """
    gallery = prepare(system["vectors"][queries], system["metric"])
    rows = {}
    for name, images in shifted_copies(data.images[queries]).items():
        if name == "as it is":
            continue
        vectors = prepare(system["embed"](pictures((images * 255).round().to(torch.uint8))), system["metric"])
        order, _ = rank_gallery(similarities(vectors, gallery, system["metric"]))
        own = codes[queries][order] == codes[queries][:, None]
        rows[name] = {"R@1": float(own[:, 0].mean()), "R@5": float(own[:, :5].any(1).mean())}
    rows["mean"] = {key: float(np.mean([r[key] for r in rows.values()])) for key in ("R@1", "R@5")}
    return rows


def foreign_images(images, seed):
    """uint8 (N, C, H, W) -> {kind: images of the same shape that are no upright chest films}."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "noise": torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8),
        "turned by 90 degrees": images.rot90(1, (2, 3)).contiguous(),
        "upside down": images.flip(2),
        "inverted": 255 - images,
    }


def foreign_detection(system, data, args):
    """
    Does the distance to the k-th neighbour tell foreign images from real queries? AUROC, interval over images; and the
    share warned of at the limit that 95 % of the *validation* images stay below. -> ({kind: numbers}, {kind:
    distances})
    """
    k = min(args.vote, system["across"]["similarity"].shape[1]) - 1
    gallery = prepare(system["vectors"]["train"], system["metric"])
    usual = as_distance(system["across"]["similarity"][:, k], system["metric"])
    limit = float(np.quantile(as_distance(system["val"]["similarity"][:, k], system["metric"]), 0.95))
    n, result, distances = len(usual), {}, {args.queries: usual}
    result[args.queries] = {"warned": float((usual > limit).mean())}
    for kind, images in foreign_images(data.images[args.queries], args.seed).items():
        vectors = prepare(system["embed"](pictures(images)), system["metric"])
        step = max(1, BLOCK // len(gallery))
        nearest = [
            np.partition(similarities(vectors[i : i + step], gallery, system["metric"]), -1 - k, axis=1)[:, -1 - k]
            for i in range(0, n, step)
        ]
        far = as_distance(np.concatenate(nearest), system["metric"])
        interval = bootstrap_interval(
            roc_auc_score,
            np.repeat([0, 1], n),
            np.concatenate([usual, far]),
            groups=np.tile(np.arange(n), 2),
            num_samples=min(500, args.resamples),
            seed=args.seed,
        )
        result[kind] = {
            "auroc": interval["value"],
            "low": interval["low"],
            "high": interval["high"],
            "warned": float((far > limit).mean()),
        }
        distances[kind] = far
    return {"k": k + 1, "limit": limit, "kinds": result}, distances


def explanation_checks(found, y, gallery_labels, num_classes, k, seed, times=200):
    """
    Can the explanation fail? With shuffled gallery labels the vote must fall to chance, and without its neighbours it
    has to be found again from the next ones. Balanced accuracy of the vote; share of queries whose vote stays.
    """
    first, similarity, left = found["first"], found["similarity"], found["left"]
    rng = np.random.default_rng(seed)
    classes = [c for c in range(num_classes) if (y == c).any()]

    def balanced(called):
        return float(np.mean([(called[y == c] == c).mean() for c in classes]))

    shuffled = [
        balanced(knn_vote(first, left, similarity, rng.permutation(gallery_labels), num_classes, k)[0])
        for _ in range(times)
    ]
    result = {
        "vote": balanced(found["called"]),
        "shuffled_mean": float(np.mean(shuffled)),
        "shuffled_low": float(np.quantile(shuffled, 0.025)),
        "shuffled_high": float(np.quantile(shuffled, 0.975)),
        "num_shuffles": times,
    }
    if (np.minimum(left, first.shape[1]) >= 2 * k).all():
        next_called, _ = knn_vote(first[:, k:], left - k, similarity[:, k:], gallery_labels, num_classes, k)
        result |= {
            "vote_stays_without_neighbours": float((next_called == found["called"]).mean()),
            "vote_without_neighbours": balanced(next_called),
        }
    return result


def agreement(found, y, classifier, facts, images, device, dtype, batch_size):
    """
    The vote beside the classifier's own answer on the same queries -> (numbers, its answers (Q,), probability of them).
    """
    logits = predict_logits(classifier, images, facts["normalisation"], device, dtype, batch_size)
    probabilities = to_probabilities(logits, facts["task"], facts["temperature"]).numpy()
    if facts["task"] == "binary-class":
        answers = (probabilities > facts["threshold"]).astype(np.int64)
    else:
        answers, probabilities = probabilities.argmax(1), probabilities.max(1)
    same, n = answers == found["called"], len(y)
    low, high = wilson_interval(int(same.sum()), n)
    right, vote_right = answers == y, found["called"] == y
    numbers = {
        "agree": float(same.mean()),
        "low": low,
        "high": high,
        "kappa": (
            float(cohen_kappa_score(answers, found["called"]))
            if len(np.unique([answers, found["called"]])) > 1
            else None
        ),
        "accuracy_classifier": float(right.mean()),
        "accuracy_vote": float(vote_right.mean()),
        "mcnemar": mcnemar_exact(vote_right, right),
        "num_disagree": int((~same).sum()),
        "accuracy_when_agreed": float(vote_right[same].mean()) if same.any() else None,
        "accuracy_vote_when_not": float(vote_right[~same].mean()) if (~same).any() else None,
    }
    return numbers, answers, probabilities


def copies_matter(system, labels, codes, args, num_classes):
    """
    What the treatment of copies does to leave-one-out: P@1 and mAP with copies out, only the query out, nothing out.
    """
    y, vectors, own = labels[args.queries], system["vectors"][args.queries], np.arange(len(labels[args.queries]))
    cases = {
        "query and copies left out": (codes[args.queries], codes[args.queries]),
        "only the query left out": (own, own),
        "query left in (wrong)": (own, own + len(own)),
    }
    rows = {}
    for name, same in cases.items():
        values = search(vectors, vectors, system["metric"], y, y, num_classes, same, args.vote)["values"]
        rows[name] = {key: float(np.nanmean(values[key])) for key in ("P@1", "P@5", "AP", "vote")}
    return rows


def failures(found, y):
    """
    Queries whose vote is wrong, most confident first: largest share of the vote, then lowest average precision, then
    index.
    """
    wrong = np.flatnonzero(found["called"] != y)
    return wrong[np.lexsort((wrong, found["values"]["AP"][wrong], -found["share"].max(1)[wrong]))]


def write_predictions(path, found, system, data, labels, args, answers, probabilities, limit):
    """One row per query: what it found, how the neighbours voted, how far away they are."""
    names, k = data.label_names, args.vote
    with atomic_file(path, "w") as file:
        writer = csv.writer(file)
        values = [n for n in found["values"] if n != "vote"]
        writer.writerow(
            [
                "id",
                "label",
                "vote",
                "vote_share",
                "correct",
                "neighbours",
                "neighbour_labels",
                "similarities",
                "distance_k",
                "unlike_gallery",
                *values,
                "classifier",
                "classifier_probability",
                "agree",
            ]
        )
        for q, y in enumerate(labels[args.queries]):
            n = min(k, found["left"][q])
            rows, similarity = found["first"][q, :n], found["similarity"][q, :n]
            distance = as_distance(similarity[-1], system["metric"])
            answer = (
                ["", "", ""]
                if answers is None
                else [names[answers[q]], f"{probabilities[q]:.6f}", int(answers[q] == found["called"][q])]
            )
            writer.writerow(
                [
                    f"{args.queries}/{q}",
                    names[y],
                    names[found["called"][q]],
                    f"{found['share'][q].max():.3f}",
                    int(found["called"][q] == y),
                    " ".join(f"train/{r}" for r in rows),
                    " ".join(str(v) for v in labels["train"][rows]),
                    " ".join(f"{s:.5f}" for s in similarity),
                    f"{distance:.5f}",
                    int(distance > limit),
                    *("" if np.isnan(found["values"][v][q]) else f"{found['values'][v][q]:.6f}" for v in values),
                    *answer,
                ]
            )


# ---------------------------------------------------------------------------------------------------------------- main


def headline_embedder(args, data, device):
    """--backbone and --cnn-weights -> (its name in the tables, Embedder)."""
    weights = args.cnn_weights
    if args.backbone == "cnn" and weights is None:
        if args.dry_run:
            from task3_retrieval.train import main as train  # two small epochs on phantom images

            train(["--dry-run", "--seed", str(args.seed)])
            weights = Path("outputs") / TASK / "train" / "dry-run"
        else:
            weights = newest_run(TASK, "train", "best.pt") or find_classifier()
    embed = load_embedder(
        args.backbone, weights, data, device, allow_other_dataset=args.allow_other_dataset, batch_size=args.batch_size
    )
    if args.backbone != "cnn":
        return args.backbone, embed
    return (
        "trained embedding" if load_checkpoint(embed.weights).get("kind") == EMBEDDING_KIND else "task 1 features"
    ), embed


def draw_all(folder, systems, title, data, labels, args, wrong, detected, where):
    """All figures of the run -> {name: file name}."""
    found, names, figures = systems[title]["across"], data.label_names, {}
    queries, gallery = pictures(data.images[args.queries]), pictures(data.images["train"])
    y = labels[args.queries]

    def path(name):
        figures[name] = f"{name}.png"
        return folder / figures[name]

    def row(q):
        n = min(args.vote, found["left"][q])
        neighbours = [
            (gallery[r], labels["train"][r], f"train {r}\n{SCALE[args.metric].format(s)}")
            for r, s in zip(found["first"][q, :n], found["similarity"][q, :n], strict=True)
        ]
        return (
            queries[q],
            y[q],
            f"{args.queries} {q}: {names[y[q]]}\nvote: {names[found['called'][q]]} {found['share'][q].max():.0%}",
        ), neighbours

    draw_neighbours(path("visual_results"), [row(q) for q in args.show], names, where)
    if len(wrong):
        draw_neighbours(
            path("failures"),
            [row(q) for q in wrong[: args.cases]],
            names,
            f"{where}\nwrong votes, most confident first ({min(len(wrong), args.cases)} of {len(wrong)})",
        )
    draw_precision(
        path("precision"),
        {name: precision_curve(s["across"], y, labels["train"], len(names)) for name, s in systems.items()},
        names,
        where,
    )
    project = PCA(n_components=2, random_state=args.seed).fit(prepare(systems[title]["vectors"]["train"], args.metric))
    flat = {
        split: project.transform(prepare(systems[title]["vectors"][split], args.metric))
        for split in ("train", args.queries)
    }
    draw_map(
        path("map"),
        flat["train"],
        labels["train"],
        flat[args.queries],
        y,
        wrong,
        names,
        args.queries,
        project.explained_variance_ratio_,
        where,
    )
    numbers, distances = detected
    draw_distances(
        path("distances"),
        distances,
        numbers,
        {"cosine": "1 - cosine similarity", "l2": "Euclidean distance"}[args.metric],
        where,
    )
    return figures


def precision_curve(found, y, gallery_labels, num_classes):
    """Mean precision among the first 1, 2, ... 50 neighbours, per class: (num_classes, most)."""
    right = (gallery_labels[found["first"]] == y[:, None]).cumsum(1) / np.arange(1, found["first"].shape[1] + 1)
    return np.stack(
        [right[y == c].mean(0) if (y == c).any() else np.full(right.shape[1], np.nan) for c in range(num_classes)]
    )


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, dtype = pick_device(args.device)
    data = (
        load_phantom(28, {"train": 96, "val": 32, "test": 48})
        if args.dry_run
        else load_images(args.data, args.data_dir, args.image_size)
    )
    if data.multi_label:
        raise InputError(f"{data.name} has several labels per image; similar cases are judged by one label per image")
    if args.limit:
        data.limit(args.limit)
    labels = {split: data.labels[split].numpy() for split in data.labels}
    y, num_classes = labels[args.queries], len(data.label_names)
    if any(len(np.unique(labels[s])) < 2 for s in ("train", args.queries)):
        raise InputError(f"a split of {data.name} has only one class{'; raise --limit' if args.limit else ''}")
    for index in args.show or []:
        if not 0 <= index < len(y):
            raise InputError(f"--show {index}: the {args.queries} split has images 0 to {len(y) - 1}")
    args.show = args.show or [index for index in DEMONSTRATION if index < len(y)]
    if args.vote >= min(len(y), len(labels["train"])):
        raise InputError(f"--vote {args.vote} neighbours are too many for {min(len(y), len(labels['train']))} images")
    print(data)
    codes = dict(zip(data.images, content_codes(*(x.numpy() for x in data.images.values())), strict=True))

    title, embed = headline_embedder(args, data, device)
    classifier_path = Path(args.classifier) if args.classifier else find_classifier()
    classifier = facts = None
    if classifier_path is not None:
        classifier, facts = load_classifier(classifier_path, device)
        if facts["dataset"]["name"] != data.name and not args.allow_other_dataset:
            if args.classifier:
                raise InputError(
                    f"{classifier_path} was trained on {facts['dataset']['name']}, not on {data.name}; give the"
                    " classifier of that set"
                )
            classifier = None
    run_dir = open_run_dir(args, TASK, "evaluate")

    print("searching:")
    plan = {title: (embed, args.metric)}
    if classifier is not None and title == "trained embedding":
        plan["task 1 features"] = (
            load_embedder(
                "cnn",
                classifier_path,
                data,
                device,
                allow_other_dataset=args.allow_other_dataset,
                batch_size=args.batch_size,
            ),
            args.metric,
        )
    pixels = load_embedder("pixels", data=data, device=device)
    plan |= {
        "raw pixels, cosine": (pixels, "cosine"),
        "raw pixels, L2": (
            dataclasses.replace(
                pixels, name="pixels, not centred", function=lambda images: images.flatten(1).float() / 255
            ),
            "l2",
        ),
    }
    plan["untrained ResNet-18"] = (
        load_embedder(
            "random:resnet18", data=data, device=device, image_size=max(64, data.size), batch_size=args.batch_size
        ),
        "cosine",
    )
    systems = {name: evaluate_system(e, metric, data, args, codes, labels) for name, (e, metric) in plan.items()}
    found = systems[title]["across"]

    measured = {
        "headline": title,
        "tables": compare_all(systems, data, args, codes, labels),
        "intervals": {
            "across": (
                f"percentile bootstrap over queries ({args.resamples} resamples, gallery fixed, byte-identical queries"
                " drawn together)"
            ),
            "within": (
                f"percentile bootstrap over images as queries and gallery at once ({max(1, args.resamples // 4)}"
                " resamples)"
                if len(y) <= MOST_LOO
                else f"percentile bootstrap over queries ({args.resamples} resamples, gallery fixed)"
            ),
        },
        "against_task1": (
            against(systems, args, labels, codes, num_classes, title, "task 1 features")
            if title == "trained embedding" and "task 1 features" in systems
            else None
        ),
        "vote_auc": (
            {name: float(roc_auc_score(y, s["across"]["share"][:, 1])) for name, s in systems.items()}
            if num_classes == 2
            else None
        ),
        "view_recall": {name: view_recall(s, data, args.queries, codes) for name, s in systems.items()},
        "explanation": explanation_checks(found, y, labels["train"], num_classes, args.vote, args.seed),
        "hubness": {
            name: {
                p: hubness(s[p]["first"], s[p]["left"], len(labels[g]))
                for p, g in (("across", "train"), ("within", args.queries))
            }
            for name, s in systems.items()
        },
        "duplicates": (
            duplicate_report(codes, labels)
            | {"leave_one_out": copies_matter(systems[title], labels, codes, args, num_classes)}
        ),
    }
    detected = {name: foreign_detection(s, data, args) for name, s in systems.items() if name != "untrained ResNet-18"}
    measured["foreign"] = {name: numbers for name, (numbers, _) in detected.items()}
    answers = probabilities = None
    measured["agreement"] = None
    if classifier is None:
        print("no task 1 classifier for this data set: the vote is not compared with one")
    else:
        measured["agreement"], answers, probabilities = agreement(
            found, y, classifier, facts, data.images[args.queries], device, dtype, args.batch_size
        )
    wrong = failures(found, y)
    measured["failures"] = {"n": len(wrong), "shown": wrong[: args.cases].tolist()}
    del classifier
    free_gpu()

    write_predictions(
        run_dir / "predictions.csv",
        found,
        systems[title],
        data,
        labels,
        args,
        answers,
        probabilities,
        measured["foreign"][title]["limit"],
    )
    where = (
        f"{'PHANTOM images, ' if data.phantom else ''}{data.name} {data.size} px: {args.queries} (n = {len(y)})"
        f" searches train (n = {len(labels['train'])}), {title}, {args.metric}"
    )
    figures = draw_all(run_dir / "figures", systems, title, data, labels, args, wrong, detected[title], where)
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": data.facts(),
            "split": args.queries,
            "gallery": "train",
            "n": len(y),
            "n_gallery": len(labels["train"]),
            "metric": args.metric,
            "normalised": args.metric == "cosine",
            "model": embed.facts(),
            "classifier": classifier_path and str(classifier_path),
            "seed": args.seed,
            "vote_k": args.vote,
            **measured,
            "settings": {k: v for k, v in vars(args).items() if k != "config"},
            **run_facts(started, device),
        },
    )
    hand_in = not (args.dry_run or args.limit or args.queries != "test")
    write_report(
        run_dir,
        report_text(data, args, embed, measured, labels, figures),
        figures,
        HAND_IN if hand_in else None,
        "task3_",
    )
    print(table(measured["tables"]["across"], data.label_names))
    print(f"results in {run_dir} ({time.time() - started:.0f} s)" + (f"; hand-in report: {HAND_IN}" if hand_in else ""))


if __name__ == "__main__":
    main()
