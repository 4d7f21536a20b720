"""
Which share of several kinds of foreign images gets the warning "unlike the training images"
(task1_classification/model.py)?

Usage:
    MEDVLM_DATA=<folder> python benchmarks/task1_typicality.py

Fitted on the training images of PneumoniaMNIST, as train.py does. The photographs come with scikit-image; adult and
lateral films need the IU X-ray images in $MEDVLM_DATA and are left out, and said so, without them. Takes seconds.
"""

import csv
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip
import numpy as np
import torch
from skimage import data as photographs

from shared.data.image_sets import load_medmnist, load_phantom
from shared.data.images import read_image, to_square
from task1_classification.model import fit_typicality, unusualness

PHOTOGRAPHS = ("astronaut", "camera", "coffee", "chelsea", "coins", "page", "text", "rocket")


def main():
    folder = Path(os.environ.get("MEDVLM_DATA") or "data")
    data = load_medmnist("pneumoniamnist", folder)
    model = fit_typicality(data.images["train"], data.images["val"])
    val = data.images["val"]
    kinds = {
        "validation images": val,
        "test images": data.images["test"],
        "mirrored": val.flip(3),
        "upside down": val.flip(2),
        "turned by 90 degrees": val.transpose(2, 3),
        "inverted (white on black)": 255 - val,
        "noise": torch.randint(0, 256, val.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        "one grey": torch.full((1, 1, 28, 28), 128, dtype=torch.uint8),
        "photographs": squares(
            np.asarray(getattr(photographs, name)(), dtype=np.float32) / 255 for name in PHOTOGRAPHS
        ),
        "phantom films": load_phantom(28, {"train": 1, "val": 1, "test": 300}).images["test"],
    }
    iu = folder / "iu_xray"
    if (iu / "subset_200.csv").exists():
        with open(iu / "subset_200.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for kind, column in (
            ("adult frontal films (IU X-ray)", "frontal"),
            ("adult lateral films (IU X-ray)", "lateral"),
        ):
            kinds[kind] = squares(read_image(iu / "images_normalized" / row[column]) for row in rows if row[column])
    else:
        print(f"no IU X-ray images in {iu}: their rows are left out")
    print("| images | n | warned |\n|---|---|---|")
    for kind, images in kinds.items():
        print(f"| {kind} | {len(images)} | {(unusualness(model, images) > 1).float().mean():.0%} |")


def squares(images):
    return torch.from_numpy(np.stack([to_square(image, 28, 1) for image in images]))


if __name__ == "__main__":
    main()
