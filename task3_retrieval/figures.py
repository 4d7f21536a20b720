"""
The pictures of train.py and evaluate.py: curves, galleries of queries with their neighbours, precision by rank, map,
distances.
"""

import matplotlib
import numpy as np

from task1_classification.figures import save

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = (
    "tab:green",
    "tab:red",
    "tab:blue",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
    "tab:orange",
    "tab:gray",
)  # by class


def draw_training(path, history, title):
    """Loss, and macro mAP and P@5 of validation against training, by epoch; epoch 0 is the classifier as it came."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    trained = [r for r in history if r["train_loss"] is not None]
    left.plot([r["epoch"] for r in trained], [r["train_loss"] for r in trained], marker=".")
    for key, name, color in (("map", "mAP", "tab:orange"), ("p5", "P@5", "tab:green")):
        for suffix, style in (("", ":"), ("_shifted", "-")):
            right.plot(
                [r["epoch"] for r in history],
                [r[f"val_{key}{suffix}"] for r in history],
                style,
                color=color,
                marker=".",
                label=f"{name}, {'validation and its shifted copies' if suffix else 'validation'}",
            )
    left.set(xlabel="epoch", ylabel="loss (changed images)")
    right.set(xlabel="epoch", ylabel="macro mean over classes")
    figure.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower right", ncols=2)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    save(figure, path, title)


def draw_neighbours(path, rows, names, title):
    """
    One row per query: the query, a gap, its neighbours from most to least alike. rows: [((image, label, caption), [the
    same for each neighbour]), ...]; image uint8 (H, W) or (H, W, 3). The frame's colour is the label.
    """
    columns = max(len(neighbours) for _, neighbours in rows)
    figure, axes = plt.subplots(
        len(rows),
        columns + 2,
        figsize=(1.45 * columns + 1.9, 1.75 * len(rows) + 0.8),
        layout="constrained",
        squeeze=False,
        width_ratios=[1, 0.12] + [1] * columns,
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, (query, neighbours) in zip(axes, rows, strict=True):
        for axis, (image, label, caption) in zip([line[0], *line[2:]], [query, *neighbours], strict=False):
            axis.axis("on")
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(caption, fontsize=7)
            for side in axis.spines.values():
                side.set(color=COLORS[label % len(COLORS)], linewidth=3)
    handles = [
        plt.Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=3, label=name) for i, name in enumerate(names)
    ]
    axes[0, 0].set_title("query", fontsize=8)
    axes[0, 2].set_title("nearest", fontsize=8)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=8)
    save(figure, path, title)


def draw_precision(path, curves, names, title):
    """
    curves {system: (classes, K)}: mean precision among the first k neighbours, one panel per class (of at most 6).
    """
    shown = range(min(len(names), 6))
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.2 * len(shown), 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for c, axis in zip(shown, axes[0], strict=True):
        for name, curve in curves.items():
            axis.plot(np.arange(1, curve.shape[1] + 1), curve[c], label=name, linewidth=1.5)
        axis.set(title=f"{names[c]} queries", xlabel="neighbours k", xscale="log")
        axis.set_xticks([1, 5, 10, 50], ["1", "5", "10", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("P@k")
    axes[0, 0].legend(fontsize=8, frameon=False)
    save(figure, path, title)


def draw_map(path, gallery, gallery_labels, queries, query_labels, wrong, names, split, explained, title):
    """Two principal components (N, 2), fitted on the gallery: gallery faint, queries strong, wrong votes circled."""
    figure, axis = plt.subplots(figsize=(6.6, 5), layout="constrained")
    for c, name in enumerate(names):
        color = COLORS[c % len(COLORS)]
        axis.scatter(*gallery[gallery_labels == c].T, s=4, color=color, alpha=0.15, linewidths=0)
        axis.scatter(*queries[query_labels == c].T, s=10, color=color, label=f"{name}, {split}", linewidths=0)
    axis.scatter(*queries[wrong].T, s=45, facecolors="none", edgecolors="black", linewidths=0.8, label="vote is wrong")
    axis.set(
        xlabel=f"first component ({explained[0]:.0%} of the variance)", ylabel=f"second component ({explained[1]:.0%})"
    )
    axis.legend(fontsize=8, frameon=False)
    save(
        figure,
        path,
        f"{title}\nfaint: gallery. An illustration: distances on the map are not the distances of the search",
    )


def draw_distances(path, distances, numbers, unit, title):
    """Distance to the k-th neighbour of real queries and foreign images {kind: (n,)}, with the limit of the warning."""
    figure, axis = plt.subplots(figsize=(7.2, 4.3), layout="constrained")
    everything = np.concatenate(list(distances.values()))
    bins = np.linspace(everything.min(), np.quantile(everything, 0.999), 60)
    for kind, values in distances.items():
        auroc = numbers["kinds"][kind].get("auroc")
        axis.hist(
            values,
            bins=bins,
            histtype="step",
            linewidth=1.5,
            density=True,
            label=kind if auroc is None else f"{kind} (AUROC {auroc:.3f})",
        )
    axis.axvline(numbers["limit"], color="black", linestyle=":", linewidth=1, label="95 % of validation lie below")
    axis.set(xlabel=f"{unit}, neighbour {numbers['k']}", ylabel="density", yscale="log")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    axis.grid(alpha=0.3)
    save(figure, path, title)
