"""
Measure trained classifiers on the test images, beside trivial baselines, and write the hand-in report.

Usage:
    python task1_classification/evaluate.py                # the newest full run on real data, all its seeds
    python task1_classification/evaluate.py --checkpoint models/task1_model.pth
    python task1_classification/evaluate.py --checkpoint outputs/task1_classification/train/001 --split val

Threshold and temperature come from the checkpoint, where validation chose them; nothing is chosen here. The pixel
baseline is fitted on the training images and its threshold on the validation images, as the network's was.
Writes to the run folder: metrics.json, predictions.csv, report.md, figures/*.png and MedMNIST's result file; and the
hand-in copy reports/task1_classification_report.md with reports/figures/task1_*.png. A run on phantom images, or of a
network trained with --limit, says so in report and figures and never replaces a hand-in report that is neither.
"""

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

from shared.data.image_sets import CHANGED, INFO, load_images, load_phantom, set_name
from shared.metrics.classification import binary_intervals, binary_metrics, choose_threshold, multiclass_metrics
from shared.metrics.classification import multilabel_metrics, official_auc_accuracy, prior_correction
from shared.metrics.statistics import bootstrap_interval, delong_test, mcnemar_exact
from shared.report import PHANTOM, markdown_table
from shared.runtime import InputError, bounded, command, free_gpu, newest_run, open_run_dir, pick_device, positive_int
from shared.runtime import read_json, record, run_facts, run_kind, script, script_parser, seed_everything, write_csv
from shared.runtime import write_json
from task1_classification.explain import GradCAM
from task1_classification.model import DRY_RUN, find_classifier, load_classifier, predict_logits, to_probabilities
from task1_classification.model import untrained_classifier
from task1_classification.report import BINARY_COLUMNS, CORRECTED, HALF, HAND_IN, NETWORK, PIXELS, draw_all
from task1_classification.report import failure_groups, make_report, results_table, warnings_of

TASK, TRAIN = "task1_classification", "task1_classification/train.py"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="the set the classifier was trained on")
    g = parser.add_argument_group("model")
    # fmt: off
    g.add_argument("--checkpoint", nargs="+", metavar="PATH",
        help="best.pt files or training run folders (default: the newest full run on real data, else"
        " models/task1_model.pth, else the newest run)")
    g.add_argument("--split", default="test", choices=["train", "val", "test"],
        help="images to measure on (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=256,
        help="images at a time; lower it if out of memory (%(default)s)")
    g = parser.add_argument_group("report")
    g.add_argument("--layer", default="auto",
        help="layer of the heat maps; auto: the deepest with a map of at least 7x7 (%(default)s)")
    # fmt: on
    g.add_argument("--cases", type=bounded(int, 1, 24), default=6, help="films per row of the gallery (%(default)s)")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.device = "cpu"
    return args


def find_checkpoints(args):
    """
    --checkpoint -> (list of files, seeds of the training run that are still missing); a run folder stands for all its
    seeds. Without it, a full run on real data comes before the published model, and that before any other run.
    """
    if not args.checkpoint:
        if args.dry_run:
            return [untrained_classifier()], []
        run, model = newest_run(TASK, "train", "metrics.json"), find_classifier()
        if run is None and model is None:
            raise InputError(f"there is no trained classifier here; run {command(TRAIN)} first, or give --checkpoint")
        less = run is None or run_kind(run)["limit"] or run_kind(run)["phantom"]
        if model and less and not (run and load_classifier(model)[1]["dataset"]["phantom"]):
            print(f"taking {model}" + (f" in place of {run}: it was trained on real data" if run else ""))
            run = model
        args.checkpoint = [str(run)]
    files, missing = [], []
    for path in map(Path, args.checkpoint):
        here = sorted([*path.glob("best.pt"), *path.glob("seed*/best.pt")]) if path.is_dir() else [path]
        if not here:
            raise InputError(f"{path} holds no best.pt; is it the folder of a finished training run?")
        seeds = read_json(path / "settings.json").get("seeds") if (path / "settings.json").is_file() else None
        if isinstance(seeds, list) and len(seeds) > 1:
            missing += [s for s in seeds if not (path / f"seed{s}" / "best.pt").exists()]
        files += here
    return files, missing


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
    corrected = prior_correction(np.clip(probabilities, 1e-7, 1 - 1e-7), float(labels["train"].mean()))
    pixels, pixels_val = pixel_baseline(data, labels, split)
    threshold, pixel_threshold = facts["threshold"], choose_threshold(labels["val"], pixels_val)
    majority = np.full(len(y), float(np.bincount(labels["train"]).argmax()))
    rows = {
        NETWORK: binary_metrics(y, probabilities, threshold),
        HALF: binary_metrics(y, probabilities, 0.5),
        CORRECTED: binary_metrics(y, corrected["probabilities"], 0.5) | {"estimated_prevalence": corrected["prior"]},
        PIXELS: binary_metrics(y, pixels, pixel_threshold),
        "baseline: mean brightness": brightness_row(data, labels, split),
        "baseline: always the majority class": binary_metrics(y, majority, 0.5),
    }
    right = mcnemar_exact((probabilities > threshold) == y, (pixels > pixel_threshold) == y)
    return {
        "rows": rows,
        "intervals": binary_intervals(y, probabilities, threshold),
        "intervals_at_0.5": binary_intervals(y, probabilities, 0.5),
        "against_pixels": {"auc": delong_test(y, probabilities, pixels), "accuracy": right},
        "pixel_scores": pixels,
    }


def brightness_row(data, labels, split):
    """How far does the mean grey value alone get? Its direction and threshold come from validation."""
    means = {s: data.images[s].float().mean((1, 2, 3)).numpy() / 255 for s in (split, "val")}
    brighter = binary_metrics(labels["val"], means["val"])["auc"] >= 0.5
    scores = {s: m if brighter else 1 - m for s, m in means.items()}
    return binary_metrics(labels[split], scores[split], choose_threshold(labels["val"], scores["val"]))


def measure_classes(data, labels, probabilities, facts, split):
    """Multi-class, ordinal and multi-label sets: the fitting metrics beside pixels and majority."""
    y, multi = labels[split], data.multi_label

    def metrics(scores, thresholds=None):
        if multi:
            return multilabel_metrics(y, scores, thresholds)
        return multiclass_metrics(y, scores, ordinal=data.task == "ordinal-regression")

    rows = {"network": metrics(probabilities, facts["threshold"])}
    if multi:
        rates = np.tile(labels["train"].mean(0), (len(y), 1))
        rows["baseline: each label's rate in training"] = metrics(rates, 0.5)
    else:
        pixels = np.zeros_like(probabilities)  # classes absent from a limited training set keep 0
        pixels[:, np.unique(labels["train"][:10_000])] = pixel_baseline(data, labels, split)[0]
        majority = np.full(len(y), np.bincount(labels["train"]).argmax())
        rows[PIXELS] = metrics(pixels)
        rows["baseline: always the majority class"] = metrics(np.eye(len(data.label_names))[majority])

    def official(name):
        return lambda y, p: official_auc_accuracy(y, p, data.task)[name]

    few = 200 if len(y) > 5000 else 1000  # resamples; each of them sorts every class anew
    both = {k: bootstrap_interval(official(k), y, probabilities, num_samples=few) for k in ("auc", "accuracy")}
    return {"rows": rows, "intervals": both}


def medmnist_result(data, scores, split, run_dir, run):
    """MedMNIST's own evaluator, which also writes its result file; its numbers must be ours to 1e-12."""
    evaluator = medmnist.Evaluator(data.name, split, size=data.size, root=str(data.path.parent))
    theirs = evaluator.evaluate(scores.reshape(len(scores), -1), str(run_dir), run=str(run))
    ours = official_auc_accuracy(data.labels[split].numpy(), scores, data.task)
    for path in run_dir.glob(f"{data.name}*@{run}.csv"):
        record(path)
    aucs = 0.0 if ours["auc"] is None else abs(theirs.AUC - ours["auc"])  # None: a class is absent from this split
    difference = max(aucs, abs(theirs.ACC - ours["accuracy"]))
    if difference > 1e-12:
        raise AssertionError(f"medmnist.Evaluator gives AUC {theirs.AUC} and ACC {theirs.ACC}, we {ours}")
    return {**ours, "largest_difference_to_medmnist": difference}


def predict(files, data, args, device, dtype, labels):
    """Every checkpoint on the same images -> (rows of numbers, [(seed, probabilities, uncalibrated ones)], limits)."""
    runs, predictions, limits, seen = [], [], [], set()
    for path in files:
        model, facts = load_classifier(path, device)
        pairs = {"pixels": (facts["image_size"], data.size), "channels": (facts["channels"], data.channels)}
        pairs |= {"classes": (facts["label_names"], data.label_names)}
        same = args.dry_run or facts["dataset"]["sha256"] == data.sha256  # a folder may be called by another path
        pairs |= {} if same else {"data": (facts["dataset"]["name"], data.name)}
        if wrong := ", ".join(f"{k} {a} (now {b})" for k, (a, b) in pairs.items() if a != b):
            apart = "; evaluate them apart" if len(files) > 1 else "; train it again"
            raise InputError(f"{path} does not fit these images: it was trained with {wrong}{apart}")
        if facts["weights_sha256"] in seen:
            raise InputError(f"{path} is a network that --checkpoint names twice; name it once")
        seen.add(facts["weights_sha256"])
        logits = predict_logits(model, data.images[args.split], facts["normalisation"], device, dtype, args.batch_size)
        probabilities, raw = (to_probabilities(logits, data.task, t).numpy() for t in (facts["temperature"], 1.0))
        kept = {"checkpoint": str(path)} | {k: facts[k] for k in ("seed", "threshold", "temperature")}
        numbers = headline(labels, probabilities, facts, data.task)
        runs.append(kept | numbers)
        predictions.append((facts["seed"], probabilities, raw))
        limits.append(facts["limit"])
        shown = [k for k in ("auc", "accuracy", "recall", "specificity") if numbers.get(k) is not None]
        print(f"seed {facts['seed']} ({path}): " + ", ".join(f"{k} {numbers[k]:.4f}" for k in shown))
        del model
        free_gpu()
    return runs, predictions, limits


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, dtype = pick_device(args.device)
    files, missing = find_checkpoints(args)
    model, facts = load_classifier(files[0], device)
    trained_on = facts["dataset"]
    name, size, given = trained_on["name"], facts["image_size"], set_name(args.data)
    own = name not in (*INFO, "phantom")
    if given not in ("auto", name) and not (own and Path(given).is_dir()):
        raise InputError(f"{files[0]} was trained on {name}, not on {args.data}; leave --data out")
    name = name if given == "auto" else given
    if own and not Path(name).is_dir():
        raise InputError(f"{files[0]} was trained on the folder {name}, which is not here: give it with --data FOLDER")
    data = load_phantom(size, DRY_RUN) if args.dry_run else load_images(name, args.data_dir, size)
    if args.limit:
        data.limit(args.limit)
    labels = {split: data.labels[split].numpy() for split in ("train", "val", args.split)}
    if not data.multi_label and any(len(np.unique(y)) < 2 for y in labels.values()):
        raise InputError(f"a split of {data.name} has only one class{'; raise --limit' if args.limit else ''}")
    print(*[PHANTOM] * data.phantom, data, sep="\n")
    changed = data.sha256 != trained_on["sha256"] and not args.dry_run
    if changed:
        print(f"note: {data.source} is not what this classifier was trained on (other SHA-256)")
    channels = facts["channels"]
    with GradCAM(model, args.layer, size, channels) as cam:  # an unknown layer is refused before any work
        map_size = cam(torch.zeros(1, channels, size, size, device=device)).shape[1:]
    runs, predictions, limits = predict(files, data, args, device, dtype, labels[args.split])
    facts["limit"] = next((limit for limit in limits if limit), None)

    # numbers first
    run_dir = open_run_dir(args, TASK, "evaluate")
    seed, probabilities, raw = predictions[0]
    measure = measure_binary if data.task == "binary-class" else measure_classes
    measured = measure(data, labels, probabilities, facts, args.split)
    pixel_scores = measured.pop("pixel_scores", None)
    if data.path and not args.limit:
        measured["medmnist"] = medmnist_result(data, raw, args.split, run_dir, run=f"seed{seed}")
    groups = failure_groups(labels[args.split], probabilities, facts, args.cases, args.seed)
    measured |= {"heat_maps": {"layer": cam.name, "native_size": list(map_size)}, "failure_cases": groups[0]}
    write_predictions(run_dir / "predictions.csv", predictions, labels[args.split], facts, data.files.get(args.split))
    spread, warnings = summary_over(runs), warnings_of(facts, args, missing)
    if changed:
        warnings.append(CHANGED)
    write_json(
        run_dir / "metrics.json",
        {
            **{"dataset": data.facts(), "split": args.split, "n": len(labels[args.split])},
            "same_file_as_in_training": data.sha256 == trained_on["sha256"],
            "trained_on": {k: facts[k] for k in ("dataset", "cases", "limit")},
            "warnings": warnings + ["phantom images"] * data.phantom,
            **{"model": facts["architecture"], "checkpoint": str(files[0])},
            **{k: facts[k] for k in ("stem", "seed", "threshold", "temperature")},
            **measured,
            **{"runs": runs, "over_seeds": spread},
            "settings": {k: v for k, v in vars(args).items() if k != "config"},
            **run_facts(started, device),
        },
    )

    # then pictures and text
    of = f"{data.name} {args.split} (n = {len(labels[args.split])}), {facts['architecture']}, seed {seed}"
    where = "\n".join([of, *warnings])
    drawn = (probabilities, raw, pixel_scores, measured, groups, where, device)
    figures = draw_all(run_dir / "figures", model, facts, data, args, *drawn)
    report = make_report(data, args, facts, files, measured, runs, spread, figures, warnings)
    line = report.write(run_dir, None if args.dry_run or args.limit or args.split != "test" else HAND_IN, "task1_")
    print(markdown_table(*results_table(measured["rows"], data.task)))
    if spread:
        print("over seeds: " + ", ".join(f"{k} {v['mean']:.4f} ± {v['std']:.4f}" for k, v in spread.items()))
    last = f"results in {run_dir} ({time.time() - started:.0f} s)"
    print(*(f"note: {warning}" for warning in warnings), *[line] * bool(line), last, sep="\n")


def headline(labels, probabilities, facts, task):
    """The few numbers that are averaged over seeds."""
    if task == "binary-class":
        metrics, at_half = (binary_metrics(labels, probabilities, t) for t in (facts["threshold"], 0.5))
        numbers = {k: metrics[k] for k in (*BINARY_COLUMNS, "brier", "ece")}
        return numbers | {f"{k}_at_0.5": at_half[k] for k in ("accuracy", "specificity")}
    return {k: v for k, v in official_auc_accuracy(labels, probabilities, task).items() if v is not None}


def summary_over(runs):
    """Mean and standard deviation over seeds of every number that all runs have; empty for a single run."""
    if len(runs) < 2:
        return {}
    keys = [k for k in runs[0] if k not in ("checkpoint", "seed", "threshold", "temperature")]
    columns = {k: [r.get(k) for r in runs] for k in keys}
    return {
        k: {"mean": statistics.mean(v), "std": statistics.stdev(v)}
        for k, v in columns.items()
        if all(isinstance(x, float) for x in v)
    }


def write_predictions(path, predictions, labels, facts, files=None):
    """One row per image and seed, with probabilities as they were used, so that a decision can be checked by hand."""
    rows = []
    for seed, probabilities, raw in predictions:
        for i, (y, p, r) in enumerate(zip(labels.tolist(), probabilities.tolist(), raw.tolist(), strict=True)):
            row = {"seed": seed, "index": i, "label": y if not isinstance(y, list) else " ".join(f"{v:.0f}" for v in y)}
            row |= {"file": files[i]} if files else {}
            names = [f"p_{name}" for name in facts["label_names"]]
            binary = facts["task"] == "binary-class"
            rows.append(row | ({"probability": p, "uncalibrated": r} if binary else dict(zip(names, p, strict=True))))
    write_csv(path, rows)


if __name__ == "__main__":
    main()
