"""The pictures of evaluate.py and infer.py: queries beside their neighbours, precision by rank, map, distances."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import textwrap

import matplotlib.pyplot as plt
import numpy as np

from shared.report import save_figure

COLORS = [f"tab:{name}" for name in "green red blue purple brown pink olive cyan orange".split()]  # by label
UNKNOWN_COLOR = "tab:gray"
PER_LINE = 5  # neighbours side by side


def color_of(label, label_names):
    return COLORS[label_names.index(label) % len(COLORS)] if label in label_names else UNKNOWN_COLOR


def draw_cases(path, cases, label_names, title, phantom=False):
    """
    Each query at the left, in bold, its neighbours from most to least alike, five to a line, heat maps below the
    pictures. cases: dicts of picture uint8 (H, W) or (H, W, 3), heat (likewise, or left out), label, text (what stands
    above) and neighbours: dicts of the same. The frame has the colour of the label, which the text names too.
    """
    lines = [max(1, -(-len(case["neighbours"]) // PER_LINE)) for case in cases]
    columns = 1 + min(PER_LINE, max(len(case["neighbours"]) for case in cases))
    high = 1.45 * (1 + (cases[0].get("heat") is not None)) + 0.5
    size = (max(7.5, 1.6 * columns), high * sum(lines) + 0.9)
    figure, axes = plt.subplots(sum(lines), columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for case, line, count in zip(cases, np.cumsum([0, *lines]), lines, strict=False):
        places = axes[line : line + count, 1:].flat
        for axis, tile in zip([axes[line, 0], *places], [case, *case["neighbours"]], strict=False):
            picture = tile["picture"]
            if tile.get("heat") is not None:
                picture = np.concatenate([picture, np.full_like(tile["heat"][:6], 255), tile["heat"]])
            axis.axis("on")
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=color_of(tile["label"], label_names), linewidth=3.5)
            words = "\n".join(textwrap.fill(part, 22) for part in tile["text"].split("\n"))
            axis.set_title(words, fontsize=7, fontweight="bold" if tile is case else "normal")
    save_figure(figure, path, title, phantom)


def draw_precision(path, curves, names, title, phantom=False):
    """curves {system: (classes, K)}: mean precision among the first k, one panel per class (of at most 6)."""
    shown = range(min(len(names), 6))
    size = (4.2 * len(shown), 3.9)
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for c, axis in zip(shown, axes[0], strict=True):
        for name, curve in curves.items():
            axis.plot(np.arange(1, curve.shape[1] + 1), curve[c], label=name, linewidth=1.5)
        axis.set(title=f"{names[c]} queries", xlabel="neighbours k", xscale="log")
        axis.set_xticks([1, 5, 10, 50], ["1", "5", "10", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("P@k")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path, title, phantom)


def draw_map(path, study, flat, wrong, explained, title):
    """Principal components {split: (N, 2)}, fitted on the gallery: it is faint, queries strong, wrong votes circled."""
    figure, axis = plt.subplots(figsize=(6.6, 5.4), layout="constrained")
    for c, name in enumerate(study.names):
        color = COLORS[c % len(COLORS)]
        axis.scatter(*flat["train"][study.gallery == c].T, s=4, color=color, alpha=0.15, linewidths=0)
        queries = flat[study.queries][study.y == c]
        axis.scatter(*queries.T, s=10, color=color, label=f"{name}, {study.queries}", linewidths=0)
    circles = flat[study.queries][wrong]
    axis.scatter(*circles.T, s=45, facecolors="none", edgecolors="black", linewidths=0.8, label="vote is wrong")
    axis.set_xlabel(f"first component ({explained[0]:.0%} of the variance)")
    axis.set_ylabel(f"second component ({explained[1]:.0%})")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    words = "faint: gallery. An illustration: distances on the map are not the distances of the search"
    save_figure(figure, path, f"{title}\n{words}", study.data.phantom)


def draw_distances(path, distances, numbers, unit, title, phantom=False):
    """Distance to the k-th neighbour of real queries and foreign images {kind: (n,)}, with the limit of the warning."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    everything = np.concatenate(list(distances.values()))
    bins = np.linspace(everything.min(), np.quantile(everything, 0.999), 60)
    for kind, values in distances.items():
        auroc = numbers["kinds"][kind].get("auroc")
        label = kind if auroc is None else f"{kind} (AUROC {auroc:.3f})"
        axis.hist(values, bins=bins, histtype="step", linewidth=1.5, density=True, label=label)
    axis.axvline(numbers["limit"], color="black", linestyle=":", linewidth=1, label="95 % of validation lie below")
    axis.set(xlabel=f"{unit}, neighbour {numbers['k']}", ylabel="density", yscale="log")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axis.grid(alpha=0.3)
    save_figure(figure, path, title, phantom)
