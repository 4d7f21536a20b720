"""The report of evaluate.py: its table, its text, and its pictures."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_curve, roc_curve

from shared.metrics.classification import binary_metrics, reliability_bins
from shared.report import Report, number, p_value, save_figure, short_path
from task1_classification.explain import GradCAM, overlay
from task1_classification.model import normalise

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HAND_IN = Path("reports/task1_classification_report.md")
NETWORK, HALF = "network, threshold from validation", "network, threshold 0.5"
CORRECTED = "network, prior corrected, threshold 0.5"
PIXELS = "baseline: logistic regression on pixels"
BINARY_COLUMNS = tuple("accuracy precision recall specificity f1 balanced_accuracy mcc auc pr_auc".split())
COLUMNS = {
    "binary-class": BINARY_COLUMNS,
    "multi-label, binary-class": "macro_auc macro_pr_auc micro_f1 macro_f1 mean_label_accuracy exact_match".split(),
    "multi-class": "accuracy balanced_accuracy macro_precision macro_recall macro_f1 mcc macro_auc".split(),
}
COLUMNS["ordinal-regression"] = COLUMNS["multi-class"] + ["quadratic_weighted_kappa", "mean_absolute_error"]


def results_table(rows, task):
    """-> header and rows of the table of results."""
    columns = COLUMNS[task]
    header = ["", *(column.replace("_", " ") for column in columns)]
    return header, [[name, *(number(row[column]) for column in columns)] for name, row in rows.items()]


def warnings_of(facts, args, seeds_missing=()):
    """What makes this less than a result on all the images, a sentence each."""
    limit, seeds = facts["limit"], ", ".join(map(str, seeds_missing))
    sentences = {
        "A dry run: the weights are random.": not facts["validation"],
        f"The network was trained with --limit {limit}: on {facts['cases']['train']} images.": limit,
        f"The training run is not finished: seed {seeds} has no best.pt.": seeds_missing,
        f"Measured with --limit {args.limit}.": args.limit,
        f"Measured on the {args.split} images, on which the network was fitted or chosen.": args.split != "test",
    }
    return [sentence for sentence, holds in sentences.items() if holds]


def make_report(data, args, facts, files, measured, runs, spread, figures, warnings):
    """The report as shared.report.Report; figures {caption: path}."""
    rows, n, validation = measured["rows"], len(data.images[args.split]), facts["validation"]
    report = Report(f"{data.name}: classification report", data.phantom, warnings)
    chosen = f", epoch {validation['epoch']}, validation AUC {number(validation['val_auc'], 4)}" if validation else ""
    origin = {True: "MedMNIST's official file", False: "not MedMNIST's official file", None: "drawn here"}
    origin = origin.get(facts["dataset"].get("official")) if data.path or data.phantom else "a folder of one's own"
    report.text(
        f"{facts['architecture']} (stem {facts['stem']}), {data.size} pixels, trained on {facts['dataset']['name']}"
        f" ({origin}): {facts['cases']['train']} training and {facts['cases']['val']} validation images; checkpoint"
        f" `{short_path(files[0])}`, seed {facts['seed']}{chosen}."
    )
    chosen = "Epoch and temperature" if one_of_many(data.task) else "Epoch, threshold and temperature"
    report.text(f"Measured on {n} {args.split} images. {chosen} come from validation alone.")
    report.heading("Results")
    report.table(*results_table(rows, data.task))
    (binary_text if data.task == "binary-class" else classes_text)(report, data, facts, measured)
    if "medmnist" in measured:
        auc, accuracy = (number(measured["medmnist"][k], 4) for k in ("auc", "accuracy"))
        cut = "uncalibrated" if one_of_many(data.task) else "threshold 0.5, uncalibrated"
        report.text(f"By `medmnist.Evaluator` ({cut}): AUC {auc}, ACC {accuracy}.")
    if spread:
        report.heading(f"Over {len(runs)} seeds ({', '.join(str(r['seed']) for r in runs)})")
        table = [[k.replace("_", " "), number(v["mean"], 4), number(v["std"], 4)] for k, v in spread.items()]
        report.table(["", "mean", "standard deviation"], table)
    report.heading("Figures")
    for caption, path in figures.items():
        report.figure(path, caption)
    height, width = measured["heat_maps"]["native_size"]
    report.text(
        f"The heat maps come from {measured['heat_maps']['layer']} and have {width}x{height} cells; they show where"
        " this layer's evidence for the call lies, not where the disease is."
    )
    return report


def one_of_many(task):
    """Is the call the largest of several probabilities, so that there is no threshold?"""
    return task in ("multi-class", "ordinal-regression")


def shortened(name, most=18):
    return name if len(name) <= most else name[: most - 1] + "…"


def binary_text(report, data, facts, measured):
    chosen, auc, accuracy = measured["rows"][NETWORK], *(measured["against_pixels"][k] for k in ("auc", "accuracy"))
    report.text(
        f"Threshold from validation: {number(facts['threshold'])}; temperature {number(facts['temperature'])}."
        f" A probability of {data.label_names[1]} above the threshold is called {data.label_names[1]}."
    )
    table = []
    for name, interval in measured["intervals"].items():
        value, low, high = chosen["auc" if name == "auc_bootstrap" else name], interval["low"], interval["high"]
        table.append([name.replace("_", " "), number(value), f"{number(low)} to {number(high)}", interval["method"]])
    report.table(["threshold from validation", "value", "95 % interval", "method"], table)
    report.text(
        f"Counts: {chosen['tp']} true positives, {chosen['fp']} false positives, {chosen['tn']} true negatives,"
        f" {chosen['fn']} false negatives. Brier score {number(chosen['brier'], 4)}, expected calibration error"
        f" {number(chosen['ece'], 4)}."
    )
    report.text(
        f"Against the pixel baseline: AUC difference {number(auc['difference'], 4)} [{number(auc['low'], 4)},"
        f" {number(auc['high'], 4)}] (DeLong, {p_value(auc['p'])}); {accuracy['only_a']} images only the network gets"
        f" right, {accuracy['only_b']} only the baseline (exact McNemar, {p_value(accuracy['p'])})."
    )
    report.text(
        'The row "prior corrected" adapts the probabilities to the share of ill cases estimated from these images'
        " without their labels (Saerens et al. 2002)."
    )


def classes_text(report, data, facts, measured):
    auc, accuracy = (measured["intervals"][k] for k in ("auc", "accuracy"))
    report.text(
        "In MedMNIST's definition, from the calibrated probabilities, with 95 % bootstrap intervals: AUC"
        f" {number(auc['value'])} [{number(auc['low'])}, {number(auc['high'])}], accuracy"
        f"{' at 0.5' * data.multi_label} {number(accuracy['value'])} [{number(accuracy['low'])},"
        f" {number(accuracy['high'])}]."
    )
    table = measured["rows"]["network"].get("per_class") or measured["rows"]["network"]["per_label"]
    report.table(
        ["class", "n", "recall", "precision", "F1", "AUC"],
        [
            [data.label_names[r["label"]], r.get("num_positive", r["n"])]
            + [number(r.get(k)) for k in ("recall", "precision", "f1", "auc")]
            for r in table
        ],
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def failure_groups(labels, probabilities, facts, cases, seed):
    """
    Which films to look at, by rule: the most confident errors, the calls nearest to the threshold, random ones.
    -> ({name: indices}, called class (N,), captions). Multi-label: each film stands for the label it is furthest off
    in.
    """
    names, n, near = list(map(shortened, facts["label_names"])), len(labels), "nearest to the threshold"
    if facts["task"] == "binary-class":
        called = (probabilities > facts["threshold"]).astype(int)
        wrong, t = called != labels, facts["threshold"]  # confidence: how far from the threshold towards 0 or 1
        confidence = np.where(called == 1, (probabilities - t) / max(1 - t, 1e-9), (t - probabilities) / max(t, 1e-9))
        captions = [f"true {names[y]}, p({names[1]}) {p:.2f}" for y, p in zip(labels, probabilities, strict=True)]
    elif facts["task"].startswith("multi-label"):
        t = np.asarray(facts["threshold"])  # how far on the wrong side of it, towards 0 or 1
        off = (probabilities - t) / np.where(labels == 1, -np.maximum(t, 1e-9), np.maximum(1 - t, 1e-9))
        called = off.argmax(1)
        p, y = probabilities[np.arange(n), called], labels[np.arange(n), called]
        wrong, confidence = (p > t[called]) != y, np.abs(off[np.arange(n), called])
        captions = [f"{names[c]}: true {v:.0f}, p {q:.2f}" for c, v, q in zip(called, y, p, strict=True)]
    else:
        called, order, near = probabilities.argmax(1), np.sort(probabilities, axis=1), "closest calls"
        wrong, confidence = called != labels, order[:, -1] - order[:, -2]
        triples = zip(labels, called, order[:, -1], strict=True)
        captions = [f"true {names[y]}\ncalled {names[c]} {p:.2f}" for y, c, p in triples]
    captions = [f"#{i} {caption}" for i, caption in enumerate(captions)]
    errors = np.flatnonzero(wrong)
    groups = {
        "most confident errors": errors[np.argsort(-confidence[errors], kind="stable")][:cases],
        near: np.argsort(confidence, kind="stable")[:cases],
        "random": np.sort(np.random.default_rng(seed).choice(n, size=min(cases, n), replace=False)),
    }
    return groups, called, captions


def draw_all(folder, model, facts, data, args, probabilities, raw, pixel_scores, measured, groups, where, device):
    """All figures of the run -> {caption: path}. groups: what failure_groups gives; where: the title of each."""
    names, rows, figures, labels = data.label_names, measured["rows"], {}, data.labels[args.split].numpy()

    def keep(caption, name, figure, title=where):
        figures[caption] = save_figure(figure, folder / f"{name}.png", title, data.phantom)

    if data.task == "binary-class":
        chosen, threshold = rows[NETWORK], facts["threshold"]
        matrix = [[chosen["tn"], chosen["fp"]], [chosen["fn"], chosen["tp"]]]
        title = f"{where}\nthreshold {threshold:.3f} from validation"
        keep("Confusion matrix", "confusion", draw_confusion(matrix, names), title)
        curves = {
            f"network (AUC {number(chosen['auc'])})": (labels, probabilities),
            f"pixels (AUC {number(rows[PIXELS]['auc'])})": (labels, pixel_scores),
        }
        points = {f"threshold {threshold:.3f} (validation)": rows[NETWORK], "threshold 0.5": rows[HALF]}
        keep("ROC and precision-recall curves", "roc_pr", draw_curves(curves, chosen["prevalence"], points))
        versions = {
            f"as trained (ECE {binary_metrics(labels, raw)['ece']:.3f})": raw,
            f"temperature {facts['temperature']:.2f} (ECE {chosen['ece']:.3f})": probabilities,
        }
        figure = draw_calibration(labels, versions, names[1])
        keep("Calibration before and after temperature scaling", "calibration", figure)
    else:
        if not data.multi_label:
            figure = draw_confusion(rows["network"]["confusion_matrix"], names)
            keep("Confusion matrix", "confusion", figure)
        columns = labels.T if data.multi_label else labels == np.arange(len(names))[:, None]
        pairs = enumerate(zip(names, columns, strict=True))
        curves = {shortened(name, 24): (y, probabilities[:, j]) for j, (name, y) in pairs if 0 < y.sum() < len(y)}
        title = f"{where}; each class against the rest"
        keep("ROC and precision-recall curves", "roc_pr", draw_curves(curves, None, {}), title)
    with GradCAM(model, args.layer, data.size, data.channels) as cam:
        figure = draw_gallery(*groups, data.images[args.split], cam, facts["normalisation"], device)
    height, width = measured["heat_maps"]["native_size"]
    of = "label named below" if data.multi_label else "called class"
    note = f"Grad-CAM for the {of} on {cam.name}: {width}x{height} cells, each {data.size / width:.0f} pixels"
    keep("Films chosen by rule, with Grad-CAM", "failures", figure, f"{where}\n{note} wide")
    return figures


def draw_confusion(matrix, names):
    """matrix[true][called]: counts, and the share of each true class as the shade."""
    matrix, n, names = np.asarray(matrix), len(names), list(map(shortened, names))
    straight = n <= 3 and max(map(len, names)) <= 10
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(1.6 + 0.75 * max(n, 3), 1.3 + 0.62 * max(n, 3)), layout="constrained")
    shown = ConfusionMatrixDisplay(share, display_labels=names)
    shown.plot(ax=axis, cmap="Blues", colorbar=False, im_kw=dict(vmin=0, vmax=1))
    for place, text in np.ndenumerate(shown.text_):
        text.set_color("white" if share[place] > 0.5 else "black")  # not by the largest share: shades go up to 1
        text.set(text=f"{matrix[place]}\n{share[place]:.0%}" if n <= 4 else matrix[place], fontsize=10 if n <= 4 else 7)
    axis.set_xticks(range(n), names, rotation=0 if straight else 45, ha="center" if straight else "right")
    axis.set(xlabel="called", ylabel="true")
    return figure


def draw_curves(curves, prevalence, points):
    """
    ROC and precision-recall. curves {name: (labels, scores)}; points {name: row of the table} are marked; `prevalence`
    is the precision of guessing, None where it differs by curve.
    """
    figure, (roc, pr) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    lowest = min(0.5, (prevalence or 0) - 0.05)
    for nth, (name, (labels, scores)) in enumerate(curves.items()):
        line = dict(label=name, linewidth=1.5, linestyle="-" if nth < 10 else "--")  # there are ten colours
        fpr, tpr, _ = roc_curve(labels, scores)
        roc.plot(fpr, tpr, **line)
        precision, recall, _ = precision_recall_curve(labels, scores)
        pr.plot(recall[:-1], precision[:-1], drawstyle="steps-post", **line)
        lowest = min(lowest, precision[:-1].min() - 0.05)
    for name, row in points.items():
        roc.plot(1 - row["specificity"], row["recall"], "o", label=name, markersize=6)
        if row["precision"] is not None:
            pr.plot(row["recall"], row["precision"], "o", label=name, markersize=6)
    guessing = dict(color="grey", linewidth=0.8, linestyle=":", label="guessing")
    roc.plot([0, 1], [0, 1], **guessing)
    if prevalence is not None:
        pr.axhline(prevalence, **guessing)
    roc.set(xlabel="1 - specificity", ylabel="recall (sensitivity)", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    pr.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.01, 1.01), ylim=(lowest, 1.01))
    roc.set_aspect("equal")
    for axis in (roc, pr):
        axis.grid(alpha=0.3)
    handles = roc.get_legend_handles_labels()  # below both, where it crosses no curve
    figure.legend(*handles, loc="outside lower center", ncols=min(4, len(handles[0])), fontsize=7, frameon=False)
    return figure


def draw_calibration(labels, versions, ill):
    """Reliability diagram of {name: probabilities (N,)}, in bins of equally many cases, with Wilson intervals."""
    figure, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="perfect")
    for name, probabilities in versions.items():
        bins = reliability_bins(labels, probabilities, 10)
        x, y = [b["confidence"] for b in bins], [b["rate"] for b in bins]
        error = np.maximum([[b["rate"] - b["low"] for b in bins], [b["high"] - b["rate"] for b in bins]], 0)
        axis.errorbar(x, y, error, marker="o", markersize=4, linewidth=1, capsize=2, alpha=0.8, label=name)
    axis.set(xlabel=f"predicted probability of {ill}", ylabel=f"share that is {ill}")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False)
    return figure


def draw_gallery(groups, called, captions, images, cam, normalisation, device):
    """
    One row per group {name: indices}: each film beside the same film under its Grad-CAM for the class that was called
    (N,). images uint8 (N, C, H, W).
    """
    columns = max(len(v) for v in groups.values())
    size = (max(6, 2.05 * columns), 1.55 * len(groups) + 0.5)
    figure, axes = plt.subplots(len(groups), columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, indices) in zip(axes, groups.items(), strict=True):
        row[0].set_title(name, fontsize=8, loc="left", fontweight="bold")
        if not len(indices):
            row[0].text(0, 0.5, "none", fontsize=8)
            continue
        chosen = images[indices]
        maps = cam(normalise(chosen.to(device), normalisation), torch.from_numpy(called[indices]).to(device))
        scale = max(1, 112 // chosen.shape[-1])
        plain = overlay(chosen, torch.zeros_like(maps).cpu(), scale=scale)
        heated = overlay(chosen, maps.cpu(), scale=scale)
        for axis, index, left, right in zip(row, indices, plain, heated, strict=False):
            axis.axis("on")
            axis.imshow(np.concatenate([left, right], axis=1))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(captions[index], fontsize=6)
    return figure
