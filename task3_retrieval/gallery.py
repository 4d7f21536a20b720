"""
Similar cases side by side: finds the pictures of an index again, draws them as a figure and as a page that needs
nothing else.

An index does not copy images. Those of a data set are read from --data-dir (and must be the file the index was built
from), others from where they were when the index was built.
"""

import base64
import html
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from shared.data.image_sets import load_images
from shared.data.images import read_image, to_square
from shared.runtime import InputError, atomic_file
from task1_classification.explain import GradCAM, overlay
from task1_classification.model import normalise
from task3_retrieval.embed import fit_images

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
)  # by label
UNKNOWN_COLOR = "tab:gray"
FILE_SIZE = 224  # pixels per side at which image files are shown
PAGE = 6  # queries per figure
DATASET_NAME = re.compile(r"(\w+)/(train|val|test)/(\d+)")


class Pictures:
    """index, --data-dir -> pictures of its cases by name, read when asked for."""

    def __init__(self, index, data_dir):
        self.facts, self.data_dir, self.sets = index.metadata.get("datasets", {}), data_dir, {}

    def dataset(self, name):
        """The ImageSet of that name, once read. InputError when it is not the file the index was built from."""
        if name not in self.sets:
            facts = self.facts[name]
            data = load_images(name, self.data_dir, facts["size"])
            if data.sha256 != facts["sha256"]:
                raise InputError(
                    f"{data.source} is not the file the index was built from (other SHA-256); give its folder with"
                    " --data-dir"
                )
            self.sets[name] = data
        return self.sets[name]

    def __call__(self, name):
        """Case name -> uint8 tensor (C, H, W). InputError when it cannot be had."""
        found = DATASET_NAME.fullmatch(name)
        if found and found[1] in self.facts:
            images, position = self.dataset(found[1]).images[found[2]], int(found[3])
            if position >= len(images):
                raise InputError(f"{name} is not in the data set")
            return images[position]
        return file_picture(name)


def file_picture(path):
    pixels = read_image(path)
    return torch.from_numpy(to_square(pixels, FILE_SIZE, 1 if pixels.ndim == 2 else 3))


def grey_tile(size=28):
    """Stands for a picture that cannot be found any more."""
    return torch.full((1, size, size), 200, dtype=torch.uint8)


def to_rgb(picture, side=224):
    """
    uint8 tensor (C, H, W) -> array (side, side, 3); enlarged without smoothing, so that 28 pixels look like 28 pixels.
    """
    array = picture.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return np.array(
        Image.fromarray(np.ascontiguousarray(array)).resize(
            (side, side), Image.NEAREST if array.shape[0] < side else Image.BICUBIC
        )
    )


def heat_maps(classifier, facts, pictures, layer="auto", device="cpu"):
    """
    pictures: uint8 tensors (C, H, W) -> arrays (224, 224, 3) with the classifier's Grad-CAM for the class it calls.
    """
    inputs = torch.cat([fit_images(p[None], facts["image_size"], facts["channels"]) for p in pictures])
    out = []
    with GradCAM(classifier, layer, facts["image_size"], facts["channels"]) as cam:
        for some in inputs.split(64):
            out.append(cam(normalise(some.to(device), facts["normalisation"])).cpu())
    maps = torch.cat(out)
    return [
        overlay(torch.from_numpy(to_rgb(p)).permute(2, 0, 1)[None], m[None])[0]
        for p, m in zip(pictures, maps, strict=True)
    ]


def color_of(label, label_names):
    return COLORS[label_names.index(label) % len(COLORS)] if label in label_names else UNKNOWN_COLOR


def draw_gallery(path, cases, label_names, title, unit):
    """
    cases: dicts with name, label ("" when not known), picture (H, W, 3), heat (or None), verdict (lines of text), warn,
    and neighbours: dicts with rank, name, label, distance, picture, heat. One row per case, the heat map below each
    picture. The frame has the colour of the label.
    """
    heat = cases[0]["heat"] is not None
    columns = 1 + max(len(c["neighbours"]) for c in cases)
    figure, axes = plt.subplots(
        len(cases),
        columns,
        figsize=(max(1.55 * columns, 6.5), (1.55 * (1 + heat) + 0.75) * len(cases) + 0.8),
        layout="constrained",
        squeeze=False,
    )
    for row, case in zip(axes, cases, strict=True):
        tiles = [case, *case["neighbours"]]
        for axis, tile in zip(row, tiles, strict=False):
            axis.imshow(
                np.concatenate([tile["picture"], np.full_like(tile["heat"][:6], 255), tile["heat"]])
                if heat
                else tile["picture"]
            )
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=color_of(tile["label"], label_names), linewidth=3.5)
            if tile is case:
                axis.set_title(
                    f"query {short(case['name'])}\n{case['label'] or 'label not known'}",
                    fontsize=7.5,
                    fontweight="bold",
                    loc="left",
                    color="tab:red" if case["warn"] else "black",
                )
            else:
                axis.set_title(f"{tile['rank']}: {tile['distance']:#.3g}\n{tile['label']}", fontsize=7.5)
        for axis in row[len(tiles) :]:
            axis.axis("off")
        row[0].set_xlabel("\n".join(case["verdict"]), fontsize=6.5, loc="left")
    handles = [plt.Line2D([], [], color=color_of(n, label_names), linewidth=4, label=n) for n in label_names]
    figure.legend(handles=handles, loc="outside lower right", ncols=min(len(handles), 5), fontsize=8, frameon=False)
    figure.suptitle(f"{title}\nabove each neighbour: rank, {unit}, label", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def short(name, length=18):
    """The end of a name, which is what tells files apart."""
    name = "/".join(Path(name).parts[-2:]) if DATASET_NAME.fullmatch(name) else Path(name).name
    return name if len(name) <= length else "..." + name[-length + 3 :]


def write_page(path, cases, label_names, title, unit, notes):
    """The same as one HTML file: pictures inside, no script, nothing fetched from anywhere."""
    parts = [PAGE_HEAD.format(title=html.escape(title))]
    parts += [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(n)}</p>" for n in notes)]
    for case in cases:
        verdict = "".join(
            f"<li{' class=warn' if case['warn'] and 'unlike' in line else ''}>{html.escape(line)}</li>"
            for line in case["verdict"]
        )
        parts.append(f"<section><h2>{html.escape(case['name'])}</h2><ul>{verdict}</ul><div class=row>")
        parts.append(tile_html(case, "query", case["label"] or "label not known", label_names))
        for n in case["neighbours"]:
            parts.append(
                tile_html(n, f"{n['rank']}: {unit} {n['distance']:#.4g}", f"{n['label']} ({n['split']})", label_names)
            )
        parts.append("</div></section>")
    parts.append("</body></html>\n")
    with atomic_file(path, "w") as file:
        file.write("\n".join(parts))


def tile_html(tile, head, label, label_names):
    color = matplotlib.colors.to_hex(color_of(tile["label"], label_names))
    pictures = "".join(
        f'<img src="{data_uri(tile[key])}" style="border-color:{color}" alt="{html.escape(key)}">'
        for key in ("picture", "heat")
        if tile[key] is not None
    )
    return (
        f"<figure>{pictures}<figcaption><b>{html.escape(head)}</b><br>{html.escape(label)}<br><span"
        f' title="{html.escape(tile["name"])}">{html.escape(short(tile["name"], 28))}</span></figcaption></figure>'
    )


def data_uri(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PAGE_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 1.5em; background: #fff; color: #222; }}
h1 {{ font-size: 1.3em; }} h2 {{ font-size: 1em; margin: 0 0 .3em; overflow-wrap: anywhere; }}
section {{ border-top: 1px solid #ccc; padding: .8em 0; }} ul {{ margin: 0 0 .6em; padding-left: 1.2em; font-size: .9em; }}
.row {{ display: flex; flex-wrap: wrap; gap: .6em; }} figure {{ margin: 0; width: 148px; }} figcaption {{ font-size: .75em; overflow-wrap: anywhere; }}
img {{ width: 140px; height: 140px; border: 4px solid; display: block; margin-bottom: 3px; image-rendering: pixelated; }} .warn {{ color: #b00; font-weight: bold; }}
</style></head><body>"""
