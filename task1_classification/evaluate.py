"""
Measure trained classifiers on the test images, beside trivial baselines, and write the hand-in report.

Usage:
    python task1_classification/evaluate.py                                   # the newest training run, all its seeds
    python task1_classification/evaluate.py --checkpoint models/task1_model.pth
    python task1_classification/evaluate.py --checkpoint outputs/task1_classification/train/001 --split val

Threshold and temperature come from the checkpoint, where validation chose them; nothing is chosen here. The pixel
baseline is fitted on the training images and its threshold on the validation images, as the network's was.
Writes to the run folder: metrics.json, predictions.csv, report.md, figures/*.png and MedMNIST's result file; and the
hand-in copy reports/task1_classification_report.md with reports/figures/task1_*.png.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import medmnist
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shared.data.image_sets import load_images, load_phantom
from shared.metrics.classification import binary_intervals, binary_metrics, choose_threshold, multiclass_metrics
from shared.metrics.classification import multilabel_metrics, official_auc_accuracy, prior_correction
from shared.metrics.statistics import bootstrap_interval, delong_test, mcnemar_exact
from shared.report import write_report
from shared.runtime import InputError, atomic_file, free_gpu, newest_run, open_run_dir, pick_device, positive_int
from shared.runtime import run_facts, script, script_parser, seed_everything, write_json
from task1_classification.explain import GradCAM
from task1_classification.figures import draw_calibration, draw_confusion, draw_curves, draw_gallery
from task1_classification.model import find_classifier, load_classifier, predict_logits, to_probabilities
from task1_classification.report import BINARY_COLUMNS, HAND_IN, report_table, report_text

TASK = "task1_classification"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="the set the classifier was trained on")
    g = parser.add_argument_group("model")
    # fmt: off
    g.add_argument("--checkpoint", nargs="+", metavar="PATH",
        help="best.pt files or training run folders (default: the newest run, else models/task1_model.pth)")
    g.add_argument("--split", default="test", choices=["train", "val", "test"],
        help="images to measure on (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    g = parser.add_argument_group("report")
    g.add_argument("--layer", default="auto",
        help="layer of the heat maps; auto: the deepest with a map of at least 7x7 (%(default)s)")
    # fmt: on
    g.add_argument("--cases", type=positive_int, default=6, help="films per row of the failure gallery (%(default)s)")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.device = "cpu"
    return args


def find_checkpoints(args):
    """--checkpoint -> list of files; a run folder stands for all its seeds."""
    if not args.checkpoint:
        if args.dry_run:
            from task1_classification.train import main as train  # two small epochs on phantom images

            train(["--dry-run"])
            return [Path("outputs") / TASK / "train" / "dry-run" / "best.pt"]
        run, model = newest_run(TASK, "train", "metrics.json"), find_classifier()
        if run is None and model is None:
            raise InputError(
                "there is no trained classifier here; run python task1_classification/train.py first, or give"
                " --checkpoint"
            )
        args.checkpoint = [str(run or model)]
    files = []
    for path in map(Path, args.checkpoint):
        here = sorted([*path.glob("best.pt"), *path.glob("seed*/best.pt")]) if path.is_dir() else [path]
        if not here:
            raise InputError(f"{path} holds no best.pt; is it the folder of a finished training run?")
        files += here
    return files


def pixel_baseline(data, labels, split):
    """
    Logistic regression on at most 10,000 training images of 28x28 grey pixels -> scores for `split` and `val`, numpy
    (N,) or (N, C).
    """

    def features(images):
        return F.interpolate(images.float().mean(1, keepdim=True), size=(28, 28), mode="area").flatten(1).numpy() / 255

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.01))
    regression.fit(features(data.images["train"][:10_000]), labels["train"][:10_000])
    scores = [regression.predict_proba(features(data.images[s])) for s in (split, "val")]
    return [s[:, 1] if data.task == "binary-class" else s for s in scores]


def measure_binary(data, labels, probabilities, facts, split):
    """Rows of the table: the network at both thresholds and after prior correction, then the baselines."""
    y = labels[split]
    train_prior = float(labels["train"].mean())
    corrected = prior_correction(np.clip(probabilities, 1e-7, 1 - 1e-7), train_prior)
    pixels, pixels_val = pixel_baseline(data, labels, split)
    pixel_threshold = choose_threshold(labels["val"], pixels_val)
    majority = float(np.bincount(labels["train"]).argmax())
    rows = {
        "network, threshold from validation": binary_metrics(y, probabilities, facts["threshold"]),
        "network, threshold 0.5": binary_metrics(y, probabilities, 0.5),
        "network, prior corrected, threshold 0.5": (
            binary_metrics(y, corrected["probabilities"], 0.5) | {"estimated_prevalence": corrected["prior"]}
        ),
        "baseline: logistic regression on pixels": binary_metrics(y, pixels, pixel_threshold),
        "baseline: mean brightness": brightness_row(data, labels, split),
        "baseline: always the majority class": binary_metrics(y, np.full(len(y), majority), 0.5),
    }
    network, pixel_calls = probabilities > facts["threshold"], pixels > pixel_threshold
    return {
        "rows": rows,
        "intervals": binary_intervals(y, probabilities, facts["threshold"]),
        "intervals_at_0.5": binary_intervals(y, probabilities, 0.5),
        "against_pixels": {
            "auc": delong_test(y, probabilities, pixels),
            "accuracy": mcnemar_exact(network == y, pixel_calls == y),
        },
        "pixel_scores": pixels,
    }


def brightness_row(data, labels, split):
    """How far does the mean grey value alone get? Its direction and threshold come from validation."""
    means = {s: data.images[s].float().mean((1, 2, 3)).numpy() / 255 for s in (split, "val")}
    sign = 1 if binary_metrics(labels["val"], means["val"])["auc"] >= 0.5 else -1
    offset = 0 if sign == 1 else 1
    scores = {s: offset + sign * m for s, m in means.items()}
    return binary_metrics(labels[split], scores[split], choose_threshold(labels["val"], scores["val"]))


def measure_classes(data, labels, probabilities, facts, split):
    """Multi-class, ordinal and multi-label sets: the fitting metrics beside pixels and majority."""
    y, multi = labels[split], data.multi_label

    def metrics(scores, thresholds):
        return (
            multilabel_metrics(y, scores, thresholds)
            if multi
            else multiclass_metrics(y, scores, ordinal=data.task == "ordinal-regression")
        )

    rows = {"network": metrics(probabilities, facts["threshold"])}
    if multi:
        rates = labels["train"].mean(0)
        rows["baseline: each label's rate in training"] = metrics(np.tile(rates, (len(y), 1)), 0.5)
    else:
        pixels, _ = pixel_baseline(data, labels, split)
        full = np.zeros_like(probabilities)  # classes absent from a limited training set keep 0
        full[:, np.unique(labels["train"][:10_000])] = pixels
        rows["baseline: logistic regression on pixels"] = metrics(full, None)
        rows["baseline: always the majority class"] = metrics(
            np.eye(len(data.label_names))[np.full(len(y), np.bincount(labels["train"]).argmax())], None
        )

    def official(name):
        return lambda y, p: official_auc_accuracy(y, p, data.task)[name]

    few = 200 if len(y) > 5000 else 1000  # resamples; each of them sorts every class anew
    intervals = {
        name: bootstrap_interval(official(name), y, probabilities, num_samples=few) for name in ("auc", "accuracy")
    }
    return {"rows": rows, "intervals": intervals}


def medmnist_result(data, scores, split, run_dir, run):
    """MedMNIST's own evaluator, which also writes its result file; its numbers must be ours to 1e-12."""
    evaluator = medmnist.Evaluator(data.name, split, size=data.size, root=str(data.path.parent))
    theirs = evaluator.evaluate(scores.reshape(len(scores), -1), str(run_dir), run=str(run))
    ours = official_auc_accuracy(data.labels[split].numpy(), scores, data.task)
    difference = max(abs(theirs.AUC - ours["auc"]), abs(theirs.ACC - ours["accuracy"]))
    if difference > 1e-12:
        raise AssertionError(f"medmnist.Evaluator gives AUC {theirs.AUC} and ACC {theirs.ACC}, we {ours}")
    return {**ours, "largest_difference_to_medmnist": difference}


def failure_groups(labels, probabilities, facts, cases, seed):
    """
    Which films to look at, by rule: the most confident errors, the calls nearest to the threshold, random ones.
    -> ({name: indices}, called class (N,), captions). Multi-label: each film stands for the label it is furthest off
    in.
    """
    names, n = facts["label_names"], len(labels)
    if facts["task"] == "binary-class":
        called = (probabilities > facts["threshold"]).astype(int)
        wrong, true = called != labels, labels
        t = facts["threshold"]  # confidence: how far from the threshold towards 0 or 1
        confidence = np.where(called == 1, (probabilities - t) / max(1 - t, 1e-9), (t - probabilities) / max(t, 1e-9))
        captions = [
            f"#{i} true {names[y]}, p({names[1]}) {p:.2f}"
            for i, (y, p) in enumerate(zip(true, probabilities, strict=True))
        ]
    elif facts["task"].startswith("multi-label"):
        called = np.abs(probabilities - labels).argmax(1)
        p, y = probabilities[np.arange(n), called], labels[np.arange(n), called]
        thresholds = np.asarray(facts["threshold"])[called]
        wrong, confidence = (p > thresholds) != y, np.abs(p - thresholds)
        captions = [
            f"#{i} {names[c]}: true {int(v)}, p {q:.2f}" for i, (c, v, q) in enumerate(zip(called, y, p, strict=True))
        ]
    else:
        called, order = probabilities.argmax(1), np.sort(probabilities, axis=1)
        wrong, confidence = called != labels, order[:, -1] - order[:, -2]
        captions = [
            f"#{i} true {names[y]}\ncalled {names[c]} {probabilities[i, c]:.2f}"
            for i, (y, c) in enumerate(zip(labels, called, strict=True))
        ]
    errors = np.flatnonzero(wrong)
    groups = {
        "most confident errors": errors[np.argsort(-confidence[errors], kind="stable")][:cases],
        "nearest to the threshold": np.argsort(confidence, kind="stable")[:cases],
        "random": np.sort(np.random.default_rng(seed).choice(n, size=min(cases, n), replace=False)),
    }
    return groups, called, captions


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, dtype = pick_device(args.device)
    files = find_checkpoints(args)
    model, facts = load_classifier(files[0], device)
    trained_on = facts["dataset"]
    if args.data.lower() not in ("auto", trained_on["name"]):
        raise InputError(
            f"{files[0]} was trained on {trained_on['name']}, not on {args.data}; give the classifier of that set, or"
            " leave --data out"
        )
    data = (
        load_phantom(28, {"train": 96, "val": 32, "test": 32})
        if args.dry_run
        else load_images(trained_on["name"], args.data_dir, facts["image_size"])
    )
    if args.limit:
        data.limit(args.limit)
    labels = {split: data.labels[split].numpy() for split in ("train", "val", args.split)}
    if data.task == "binary-class" and any(len(np.unique(y)) < 2 for y in labels.values()):
        raise InputError(f"a split of {data.name} has only one class{'; raise --limit' if args.limit else ''}")
    print(data)
    if data.sha256 != trained_on["sha256"]:
        print(f"note: {data.source} is not the file this classifier was trained on (other SHA-256)")

    # every checkpoint on the same images; the first one gets the figures
    runs, predictions = [], []
    for path in files:
        if path != files[0]:
            del model
            free_gpu()
            model, other = load_classifier(path, device)
            if other["dataset"]["name"] != trained_on["name"] or other["image_size"] != facts["image_size"]:
                raise InputError(
                    f"{path} was trained on {other['dataset']['name']} at {other['image_size']} px, {files[0]} on"
                    f" {trained_on['name']} at {facts['image_size']} px; evaluate them apart"
                )
        else:
            other = facts
        logits = predict_logits(model, data.images[args.split], other["normalisation"], device, dtype, args.batch_size)
        probabilities = to_probabilities(logits, data.task, other["temperature"]).numpy()
        raw = to_probabilities(logits, data.task).numpy()
        runs.append(
            {
                "checkpoint": str(path),
                "seed": other["seed"],
                "threshold": other["threshold"],
                "temperature": other["temperature"],
                **headline(labels[args.split], probabilities, other, data.task),
            }
        )
        predictions.append((other["seed"], probabilities, raw))
        print(
            f"seed {other['seed']} ({path}): "
            + ", ".join(
                f"{k} {v:.4f}" for k, v in runs[-1].items() if k in ("auc", "accuracy", "recall", "specificity")
            )
        )
    model, facts = load_classifier(files[0], device)
    seed, probabilities, raw = predictions[0]

    GradCAM(model, args.layer, data.size, data.channels)  # an unknown layer is refused before anything is written
    run_dir = open_run_dir(args, TASK, "evaluate")
    measured = (measure_binary if data.task == "binary-class" else measure_classes)(
        data, labels, probabilities, facts, args.split
    )
    pixel_scores = measured.pop("pixel_scores", None)
    if data.path and not args.limit:
        measured["medmnist"] = medmnist_result(data, raw, args.split, run_dir, run=f"seed{seed}")
    write_predictions(run_dir / "predictions.csv", predictions, labels[args.split], facts)

    where = (
        f"{'PHANTOM images, ' if data.phantom else ''}{data.name} {args.split} (n = {len(labels[args.split])}),"
        f" {facts['architecture']}, seed {seed}"
    )
    figures = draw_all(
        run_dir / "figures",
        model,
        facts,
        data,
        args,
        labels[args.split],
        probabilities,
        raw,
        pixel_scores,
        measured,
        where,
        device,
    )
    spread = summary_over(runs)
    write_json(
        run_dir / "metrics.json",
        {
            "dataset": data.facts(),
            "same_file_as_in_training": data.sha256 == trained_on["sha256"],
            "split": args.split,
            "n": len(labels[args.split]),
            "model": facts["architecture"],
            "stem": facts["stem"],
            "checkpoint": str(files[0]),
            "seed": seed,
            "threshold": facts["threshold"],
            "temperature": facts["temperature"],
            **measured,
            "runs": runs,
            "over_seeds": spread,
            "settings": {k: v for k, v in vars(args).items() if k != "config"},
            **run_facts(started, device),
        },
    )
    hand_in = not (args.dry_run or args.limit)
    report = report_text(data, args, facts, files, measured, runs, spread, figures)
    write_report(run_dir, report, figures, HAND_IN if hand_in else None, "task1_")
    print(report_table(measured["rows"], data.task))
    if len(runs) > 1:
        print("over seeds: " + ", ".join(f"{k} {v['mean']:.4f} ± {v['std']:.4f}" for k, v in spread.items()))
    print(f"results in {run_dir} ({time.time() - started:.0f} s)" + (f"; hand-in report: {HAND_IN}" if hand_in else ""))


def headline(labels, probabilities, facts, task):
    """The few numbers that are averaged over seeds."""
    if task == "binary-class":
        metrics = binary_metrics(labels, probabilities, facts["threshold"])
        at_half = binary_metrics(labels, probabilities, 0.5)
        keys = (*BINARY_COLUMNS, "brier", "ece")
        return {k: metrics[k] for k in keys} | {
            "accuracy_at_0.5": at_half["accuracy"],
            "specificity_at_0.5": at_half["specificity"],
        }
    return {k: v for k, v in official_auc_accuracy(labels, probabilities, task).items() if v is not None}


def summary_over(runs):
    """Mean and standard deviation over seeds of every number that all runs have; empty for a single run."""
    if len(runs) < 2:
        return {}
    keys = [
        k
        for k, v in runs[0].items()
        if k not in ("checkpoint", "seed", "threshold", "temperature")
        and all(isinstance(r.get(k), float) for r in runs)
    ]
    return {k: {"mean": statistics.mean(r[k] for r in runs), "std": statistics.stdev(r[k] for r in runs)} for k in keys}


def write_predictions(path, predictions, labels, facts):
    """One row per image and seed; a threshold column, so that the decision can be checked by hand."""
    names = facts["label_names"]
    with atomic_file(path, "w") as file:
        writer = csv.writer(file)
        binary = facts["task"] == "binary-class"
        writer.writerow(
            ["seed", "index", "label", *(["probability", "uncalibrated"] if binary else [f"p_{n}" for n in names])]
        )
        for seed, probabilities, raw in predictions:
            for i, (y, p, r) in enumerate(zip(labels, probabilities, raw, strict=True)):
                writer.writerow(
                    [seed, i, y if np.ndim(y) == 0 else " ".join(str(int(v)) for v in y), *([p, r] if binary else p)]
                )


def draw_all(folder, model, facts, data, args, labels, probabilities, raw, pixel_scores, measured, where, device):
    """All figures of the run -> {name: file name}."""
    names, rows, figures = data.label_names, measured["rows"], {}

    def path(name):
        figures[name] = f"{name}.png"
        return folder / figures[name]

    if data.task == "binary-class":
        chosen, half = rows["network, threshold from validation"], rows["network, threshold 0.5"]
        draw_confusion(
            path("confusion"),
            [[chosen["tn"], chosen["fp"]], [chosen["fn"], chosen["tp"]]],
            names,
            f"{where}\nthreshold {facts['threshold']:.3f} from validation",
        )
        curves = {
            f"network (AUC {chosen['auc']:.3f})": (labels, probabilities),
            f"pixels (AUC {rows['baseline: logistic regression on pixels']['auc']:.3f})": (labels, pixel_scores),
        }
        points = {
            f"threshold {t:.2f}": (r["recall"], r["specificity"], r["precision"])
            for t, r in ((facts["threshold"], chosen), (0.5, half))
        }
        draw_curves(path("roc_pr"), curves, chosen["prevalence"], points, where)
        draw_calibration(
            path("calibration"),
            labels,
            {
                f"as trained (ECE {binary_metrics(labels, raw)['ece']:.3f})": raw,
                f"temperature {facts['temperature']:.2f} (ECE {chosen['ece']:.3f})": probabilities,
            },
            where,
        )
    else:
        if not data.multi_label:
            draw_confusion(path("confusion"), rows["network"]["confusion_matrix"], names, where)
        columns = labels.T if data.multi_label else labels == np.arange(len(names))[:, None]
        curves = {
            name: (y, probabilities[:, j])
            for j, (name, y) in enumerate(zip(names, columns, strict=True))
            if 0 < y.sum() < len(y)
        }
        draw_curves(path("roc_pr"), curves, None, {}, f"{where}; each class against the rest")
    groups, called, captions = failure_groups(labels, probabilities, facts, args.cases, args.seed)
    with GradCAM(model, args.layer, data.size, data.channels) as cam:
        size = cam(torch.zeros(1, data.channels, data.size, data.size, device=device)).shape[1:]
        note = (
            f"Grad-CAM for the called class on {cam.name}: a map of {size[1]}x{size[0]} cells, each"
            f" {data.size / size[1]:.0f} pixels wide"
        )
        draw_gallery(
            path("failures"),
            groups,
            data.images[args.split],
            captions,
            cam,
            torch.from_numpy(called).to(device),
            facts["normalisation"],
            device,
            f"{where}\n{note}",
        )
    measured["heat_maps"] = {"layer": args.layer if args.layer != "auto" else cam.name, "native_size": list(size)}
    measured["failure_cases"] = {name: indices for name, indices in groups.items()}
    print(note)
    return figures


if __name__ == "__main__":
    main()
