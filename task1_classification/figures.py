"""
The pictures of train.py and evaluate.py: training curves, confusion matrix, ROC and precision-recall curves,
calibration, and Grad-CAM of failures.
"""

import matplotlib
import numpy as np
import torch
from sklearn.metrics import precision_recall_curve, roc_curve

from shared.metrics.classification import reliability_bins
from task1_classification.explain import overlay
from task1_classification.model import normalise

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save(figure, path, title):
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_training(path, histories, title):
    """Loss and AUC by epoch, one line per seed; histories {seed: rows}."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, rows in enumerate(histories.values()):
        epochs = [r["epoch"] for r in rows]
        for axis, key, color, label in (
            (left, "train_loss", "tab:blue", "training (changed images)"),
            (left, "val_loss", "tab:orange", "validation"),
            (right, "val_auc", "tab:orange", "validation"),
            (right, "val_auc_shifted", "tab:green", "validation and its shifted copies"),
        ):
            axis.plot(
                epochs,
                [r[key] for r in rows],
                color=color,
                alpha=0.8,
                marker="." if len(rows) < 3 else None,
                label=label if i == 0 else None,
            )
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="AUC")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    save(figure, path, title)


def draw_confusion(path, matrix, names, title):
    """matrix[true][called]: counts, and the share of each true class as the shade."""
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    n = len(names)
    figure, axis = plt.subplots(figsize=(1.6 + 0.75 * max(n, 3), 1.3 + 0.62 * max(n, 3)), layout="constrained")
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(n):
        for j in range(n):
            axis.text(
                j,
                i,
                f"{matrix[i, j]}\n{share[i, j]:.0%}" if n <= 4 else str(matrix[i, j]),
                ha="center",
                va="center",
                fontsize=10 if n <= 4 else 7,
                color="white" if share[i, j] > 0.6 else "black",
            )
    axis.set_xticks(range(n), names, rotation=0 if n <= 3 else 45, ha="center" if n <= 3 else "right")
    axis.set_yticks(range(n), names)
    axis.set(xlabel="called", ylabel="true")
    save(figure, path, title)


def draw_curves(path, curves, prevalence, points, title):
    """
    ROC and precision-recall. curves {name: (labels, scores)}; points {name: (recall, specificity, precision)} are
    marked; `prevalence` is the precision of guessing, None where it differs by curve.
    """
    figure, (roc, pr) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for name, (labels, scores) in curves.items():
        fpr, tpr, _ = roc_curve(labels, scores)
        roc.plot(fpr, tpr, label=name, linewidth=1.5)
        precision, recall, _ = precision_recall_curve(labels, scores)
        pr.plot(recall[:-1], precision[:-1], label=name, linewidth=1.5, drawstyle="steps-post")
    for name, (recall, specificity, precision) in points.items():
        roc.plot(1 - specificity, recall, "o", label=name, markersize=6)
        if precision is not None:
            pr.plot(recall, precision, "o", label=name, markersize=6)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="guessing")
    if prevalence is not None:
        pr.axhline(prevalence, color="grey", linewidth=0.8, linestyle=":", label="guessing")
    roc.set(
        xlabel="1 - specificity", ylabel="recall (sensitivity)", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal"
    )
    pr.set(
        xlabel="recall (sensitivity)",
        ylabel="precision",
        xlim=(-0.01, 1.01),
        ylim=(min(0.5, (prevalence or 0) - 0.05), 1.01),
    )
    for axis in (roc, pr):
        axis.legend(fontsize=7, frameon=False, loc="lower right" if axis is roc else "lower left")
        axis.grid(alpha=0.3)
    save(figure, path, title)


def draw_calibration(path, labels, versions, title):
    """Reliability diagram of {name: probabilities (N,)}, in bins of equally many cases, with Wilson intervals."""
    figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="perfect")
    for name, probabilities in versions.items():
        bins = reliability_bins(labels, probabilities, 10)
        x, y = [b["confidence"] for b in bins], [b["rate"] for b in bins]
        error = [[b["rate"] - b["low"] for b in bins], [b["high"] - b["rate"] for b in bins]]
        axis.errorbar(
            x, y, np.maximum(error, 0), marker="o", markersize=4, linewidth=1, capsize=2, alpha=0.8, label=name
        )
    axis.set(xlabel="predicted probability", ylabel="share that is ill", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.3)
    save(figure, path, title)


def draw_gallery(path, groups, images, captions, cam, targets, normalisation, device, title):
    """
    One row per group {name: indices}: each film beside the same film under its Grad-CAM for the class that was called.
    images uint8 (N, C, H, W), captions and targets by index.
    """
    columns = max(len(v) for v in groups.values())
    figure, axes = plt.subplots(
        len(groups), columns, figsize=(2.05 * columns, 1.55 * len(groups) + 0.5), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, indices) in zip(axes, groups.items(), strict=True):
        row[0].set_title(name, fontsize=8, loc="left", fontweight="bold")
        if not len(indices):
            row[0].text(0, 0.5, "none", fontsize=8)
            continue
        chosen = images[indices]
        maps = cam(normalise(chosen.to(device), normalisation), targets[indices])
        scale = max(1, 112 // chosen.shape[-1])
        plain = overlay(chosen, torch.zeros_like(maps).cpu(), scale=scale)
        heated = overlay(chosen, maps.cpu(), scale=scale)
        for axis, index, left, right in zip(row, indices, plain, heated, strict=False):
            axis.axis("on")
            axis.imshow(np.concatenate([left, right], axis=1))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(captions[index], fontsize=6)
    save(figure, path, title)
