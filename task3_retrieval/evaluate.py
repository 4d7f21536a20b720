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

import dataclasses
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from shared.data.image_sets import CHANGED
from shared.report import markdown_table
from shared.runtime import InputError, bounded, free_gpu, open_run_dir, pick_device, positive_int, run_facts, script
from shared.runtime import script_parser, seed_everything, write_csv, write_json
from task3_retrieval.cases import add_embedding_options, choose_classifier, classifier_answers, embedder_and_data
from task3_retrieval.checks import MOST_LOO, Study, agreement, as_distance, compare_all, copies_matter, each
from task3_retrieval.checks import evaluate_system, explanation_checks, failures, foreign_detection, paired_difference
from task3_retrieval.checks import precision_curve, prepare, view_recall
from task3_retrieval.embed import channels_last, fit_images, load_embedder
from task3_retrieval.figures import draw_cases, draw_distances, draw_map, draw_precision
from task3_retrieval.metrics import duplicate_report, hubness
from task3_retrieval.report import HAND_IN, make_report, systems_table

TASK = "task3_retrieval"
DEMONSTRATION = (0, 20, 70)
MOST_SHOWN = 24  # queries of one picture


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="PneumoniaMNIST")
    add_embedding_options(parser)
    g = parser.add_argument_group("compared")
    # fmt: off
    g.add_argument("--classifier", metavar="FILE",
        help="task 1 classifier to compare the vote with (default: models/task1_model.pth, else ./task1_model.pth)")
    g.add_argument("--metric", default="cosine", choices=["cosine", "l2"],
        help="similarity of the vectors (%(default)s)")
    g = parser.add_argument_group("search")
    g.add_argument("--queries", default="test", choices=["test", "val"], help="images that ask (%(default)s)")
    g.add_argument("--vote", type=positive_int, default=5, metavar="K", help="neighbours that vote; odd (%(default)s)")
    g.add_argument("--resamples", type=bounded(int, 1, 100_000), default=2000,
        help="bootstrap resamples; leave-one-out takes a quarter of them (%(default)s)")
    g = parser.add_argument_group("report")
    g.add_argument("--show", type=int, nargs="+", metavar="INDEX",
        help="queries of the demonstration picture (default: 0 20 70)")
    g.add_argument("--cases", type=bounded(int, 1, MOST_SHOWN), default=6,
        help="failures shown and listed (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.vote % 2 == 0:
        parser.error("--vote must be odd, so that two classes cannot tie")
    if len(args.show or []) > MOST_SHOWN:
        parser.error(f"--show takes at most {MOST_SHOWN} queries: a picture of more cannot be read")
    if args.dry_run:
        args.device, args.data, args.resamples = "cpu", "phantom", min(args.resamples, 200)
    return args


# ----------------------------------------------------------------------------------------------------- what is compared


def study_of(args, data):
    """-> Study. InputError for a number of votes or a query that the data set does not have; fills in args.show."""
    study = Study(data, args.queries, args.vote, args.resamples, args.seed)
    n, smallest = len(study.y), min(len(study.y), len(study.gallery))
    if any(len(np.unique(labels)) < 2 for labels in (study.y, study.gallery)):
        raise InputError(f"a split of {data.name} has only one class{'; raise --limit' if args.limit else ''}")
    if args.vote >= smallest:
        raise InputError(f"--vote {args.vote} neighbours are too many for {smallest} images")
    for index in args.show or []:
        if not 0 <= index < n:
            raise InputError(f"--show {index}: the {args.queries} split has images 0 to {n - 1}")
    args.show = args.show or [index for index in DEMONSTRATION if index < n]
    return study


def systems_to_compare(args, embed, classifier, data, device):
    """{name in the tables: (Embedder, metric)}: the headline first, then what it is compared with."""
    plan = {embed.title: (embed, args.metric)}
    settings = dict(data=data, device=device, batch_size=args.batch_size)
    if classifier is not None and embed.title == "trained embedding":
        features = load_embedder("cnn", classifier, allow_other_dataset=args.allow_other_dataset, **settings)
        plan["task 1 features"] = (features, args.metric)
    pixels = load_embedder("pixels", **settings)
    plain = dataclasses.replace(pixels, name="pixels, not centred", function=lambda x: x.flatten(1).float() / 255)
    untrained = load_embedder("random:resnet18", image_size=max(64, data.size), **settings)
    plan |= {"raw pixels, cosine": (pixels, "cosine"), "raw pixels, L2": (plain, "l2")}
    return plan | {"untrained ResNet-18": (untrained, "cosine")}


def measure(study, systems, title):
    """All numbers that need no classifier -> (dict for metrics.json, distances of foreign images for the figure)."""
    found, (y, gallery, k) = systems[title]["across"], (study.y, study.gallery, study.k)
    loo = max(1, study.resamples // 4) if len(y) <= MOST_LOO else study.resamples
    unit = "images as queries and gallery at once" if len(y) <= MOST_LOO else "queries, gallery fixed"
    trusted = {name: s for name, s in systems.items() if name != "untrained ResNet-18"}
    detected = {name: foreign_detection(s, study) for name, s in each(trusted, "foreign images")}
    trained = title == "trained embedding" and "task 1 features" in systems
    protocols = {"across": gallery, "within": y}
    measured = {
        "headline": title,
        "tables": compare_all(systems, study),
        "intervals": {
            "across": (
                f"percentile bootstrap over queries, {study.resamples} resamples, gallery fixed, byte-identical queries"
                " drawn together"
            ),
            "within": f"percentile bootstrap over {unit}, {loo} resamples",
        },
        "against_task1": paired_difference(systems, study, title, "task 1 features") if trained else None,
        "vote_auc": (
            {name: float(roc_auc_score(y, s["across"]["share"][:, 1])) for name, s in systems.items()}
            if len(study.names) == 2
            else None
        ),
        "view_recall": {name: view_recall(s, study) for name, s in each(systems, "changed copies")},
        "explanation": explanation_checks(found, y, gallery, len(study.names), k, study.seed),
        "hubness": {
            name: {p: hubness(s[p]["first"], s[p]["left"], len(labels)) for p, labels in protocols.items()}
            for name, s in systems.items()
        },
        "duplicates": duplicate_report(study.codes, study.labels)
        | {"leave_one_out": copies_matter(systems[title], study)},
        "foreign": {name: numbers for name, (numbers, _) in detected.items()},
    }
    return measured, detected[title][1]


# ------------------------------------------------------------------------------------------------------ what is written


def predictions_of(study, system, limit, answers, probabilities):
    """Rows of predictions.csv: what each query found, how the neighbours voted, how far away they are."""
    found, names = system["across"], study.names
    values = [n for n in found["values"] if n != "vote"]
    for q, y in enumerate(study.y):
        n = min(study.k, found["left"][q])
        rows, similarity, called = found["first"][q, :n], found["similarity"][q, :n], found["called"][q]
        distance = as_distance(similarity[-1], system["metric"])
        row = {
            "id": f"{study.queries}/{q}",
            "label": names[y],
            "vote": names[called],
            "vote_share": f"{found['share'][q].max():.3f}",
            "correct": int(called == y),
            "neighbours": " ".join(f"train/{r}" for r in rows),
            "neighbour_labels": " ".join(str(v) for v in study.gallery[rows]),
            "similarities": " ".join(f"{s:.5f}" for s in similarity),
            "distance_k": f"{distance:.5f}",
            "unlike_gallery": int(distance > limit),
        }
        row |= {v: "" if np.isnan(found["values"][v][q]) else f"{found['values'][v][q]:.6f}" for v in values}
        row |= dict.fromkeys(("classifier", "classifier_probability", "agree"), "")
        if answers is not None:
            row |= {"classifier": names[answers[q]], "classifier_probability": f"{probabilities[q]:.6f}"}
            row["agree"] = int(answers[q] == called)
        yield row


def draw_all(folder, study, systems, title, args, wrong, foreign, distances, where):
    """All figures of the run -> {name: path}."""
    system, names, queries = systems[title], study.names, study.queries
    found, phantom = system["across"], study.data.phantom
    images = {split: channels_last(study.data.images[split]) for split in ("train", queries)}
    scale = "cosine {:.3f}" if args.metric == "cosine" else "distance {:.2f}"
    paths = {name: folder / f"{name}.png" for name in ("visual_results", "failures", "precision", "map", "distances")}

    def case(q):
        n = min(args.vote, found["left"][q])
        neighbours = [
            {"picture": images["train"][r], "label": names[study.gallery[r]], "text": text}
            for r, s in zip(found["first"][q, :n], np.abs(found["similarity"][q, :n]), strict=True)
            for text in [f"train {r}: {names[study.gallery[r]]}\n{scale.format(s)}"]
        ]
        vote = f"vote: {names[found['called'][q]]} {found['share'][q].max():.0%}"
        label, text = names[study.y[q]], f"{queries} {q}: {names[study.y[q]]}\n{vote}"
        return {"picture": images[queries][q], "label": label, "text": text, "neighbours": neighbours}

    draw_cases(paths["visual_results"], [case(q) for q in args.show], names, where, phantom)
    if len(wrong):
        words = f"wrong votes, most confident first ({min(len(wrong), args.cases)} of {len(wrong)})"
        draw_cases(paths["failures"], [case(q) for q in wrong[: args.cases]], names, f"{where}\n{words}", phantom)
    else:
        del paths["failures"]
    curves = {name: precision_curve(s["across"], study.y, study.gallery, len(names)) for name, s in systems.items()}
    draw_precision(paths["precision"], curves, names, where, phantom)
    vectors = {split: prepare(system["vectors"][split], args.metric) for split in ("train", queries)}
    project = PCA(n_components=2, random_state=args.seed).fit(vectors["train"])
    flat = {split: project.transform(v) for split, v in vectors.items()}
    draw_map(paths["map"], study, flat, wrong, project.explained_variance_ratio_, where)
    unit = "1 - cosine similarity" if args.metric == "cosine" else "Euclidean distance"
    draw_distances(paths["distances"], distances, foreign, unit, where, phantom)
    return paths


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, dtype = pick_device(args.device)
    embed, data = embedder_and_data(args, device)
    study = study_of(args, data)

    def fits(facts):
        same = facts["dataset"]["name"] == data.name or args.allow_other_dataset
        return same and facts["label_names"] == data.label_names

    unlike = f", not on {data.name} ({', '.join(data.label_names)}); give the classifier of that set"
    classifier, facts = choose_classifier(args.classifier, fits, unlike, device)
    plan = systems_to_compare(args, embed, facts and facts["path"], data, device)
    run_dir = open_run_dir(args, TASK, "evaluate")

    title = embed.title
    systems = {name: evaluate_system(*pair, study) for name, pair in each(plan, "searching:")}
    print("measuring (the longer half):", flush=True)
    measured, distances = measure(study, systems, title)
    found, limit = systems[title]["across"], measured["foreign"][title]["limit"]
    answers = probabilities = measured["agreement"] = None
    if classifier is None:
        print("no task 1 classifier for this data set: the vote is not compared with one")
    else:
        images = fit_images(data.images[args.queries], facts["image_size"], facts["channels"])
        answers, probabilities = classifier_answers(classifier, facts, images, device, dtype, args.batch_size)
        measured["agreement"] = agreement(found["called"], answers, study.y)
    del classifier
    free_gpu()
    wrong = failures(found, study.y)
    measured["failures"] = {"n": len(wrong), "shown": wrong[: args.cases].tolist()}

    rows = predictions_of(study, systems[title], limit, answers, probabilities)
    write_csv(run_dir / "predictions.csv", list(rows))
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": data.facts(),
            "phantom": data.phantom,
            "limited": args.limit is not None,
            "split": args.queries,
            "gallery": "train",
            "n": len(study.y),
            "n_gallery": len(study.gallery),
            "metric": args.metric,
            "normalised": args.metric == "cosine",
            "model": embed.facts(),
            "classifier": facts and facts["path"],
            "seed": args.seed,
            "vote_k": args.vote,
            **measured,
            "settings": {k: v for k, v in vars(args).items() if k != "config"},
            **run_facts(started, device),
        },
    )
    where = (
        f"{data.name} {data.size} px: {args.queries} (n = {len(study.y)}) searches train (n = {len(study.gallery)}),"
        f" {title}, {args.metric}"
    )
    if args.limit:
        where += f", --limit {args.limit}"
    foreign = measured["foreign"][title]
    figures = draw_all(run_dir / "figures", study, systems, title, args, wrong, foreign, distances, where)
    warnings = [f"Limited to the first {args.limit} images of each split (--limit)."] if args.limit else []
    warnings += embed.warnings(data.phantom)
    if embed.trained_on == data.name and embed.trained_sha not in (None, data.sha256) and not args.dry_run:
        warnings.append(CHANGED)
    if args.queries != "test":
        warnings.append("Measured on the validation images, on which choices are made.")
    report = make_report(study, args, embed, measured, figures, warnings)
    hand_in = None if args.dry_run or args.limit or args.queries != "test" else HAND_IN
    line = report.write(run_dir, hand_in, "task3_")
    print(f"{'PHANTOM images: ' if data.phantom else ''}{where}, per cent")
    print(markdown_table(*systems_table(measured["tables"]["across"], study.names)))
    print(f"results in {run_dir} ({time.time() - started:.0f} s){f'; {line}' if line else ''}")


if __name__ == "__main__":
    main()
