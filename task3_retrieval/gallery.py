"""
The pictures of an index, found again, and heat maps of them.

An index does not copy images. Those of a data set are read from --data-dir (and must be the file the index was built
from), others from where they were when the index was built.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared.data.image_sets import load_images
from shared.data.images import read_image, to_square
from shared.runtime import InputError
from task1_classification.explain import GradCAM, overlay
from task1_classification.model import normalise
from task3_retrieval.embed import fit_images

FILE_SIZE = 224  # pixels per side at which pictures are shown
DATASET_NAME = re.compile(r"(.+)/(train|val|test)/(\d{5,})")


class Pictures:
    """index, --data-dir -> pictures of its cases by name, read when asked for."""

    def __init__(self, index, data_dir):
        self.facts, self.data_dir, self.sets = index.metadata.get("datasets", {}), data_dir, {}

    def dataset(self, name):
        """The ImageSet of that name, or InputError when it is not the file the index was built from: read once."""
        if name not in self.sets:
            try:
                self.sets[name] = self.read(name)
            except InputError as error:
                self.sets[name] = error
        if isinstance(self.sets[name], InputError):
            raise self.sets[name]
        return self.sets[name]

    def read(self, name):
        facts = self.facts[name]
        data = load_images(name, self.data_dir, facts["size"])
        if data.sha256 != facts["sha256"]:
            raise InputError(
                f"{data.source} is not the file the index was built from (other SHA-256); give its folder with"
                " --data-dir"
            )
        return data

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


def to_rgb(picture):
    """uint8 (C, H, W) -> array (224, 224, 3); enlarged without smoothing, so that 28 pixels look like 28 pixels."""
    array = np.ascontiguousarray(picture.expand(3, -1, -1).permute(1, 2, 0).numpy())
    how = Image.NEAREST if len(array) < FILE_SIZE else Image.BICUBIC
    return np.array(Image.fromarray(array).resize((FILE_SIZE, FILE_SIZE), how))


def heat_maps(classifier, facts, pictures, device="cpu"):
    """
    pictures: uint8 tensors (C, H, W) -> arrays (224, 224, 3) with the classifier's Grad-CAM for the class it calls.
    """
    inputs, maps = torch.cat([fit_images(p[None], facts["image_size"], facts["channels"]) for p in pictures]), []
    with GradCAM(classifier, "auto", facts["image_size"], facts["channels"]) as cam:
        for some in inputs.split(64):
            maps.append(cam(normalise(some.to(device), facts["normalisation"])).cpu())
    shown = torch.from_numpy(np.stack([to_rgb(p) for p in pictures])).permute(0, 3, 1, 2)
    return list(overlay(shown, torch.cat(maps)))


def short(name, length=28):
    """The end of a name, which is what tells files apart: test/00020 of a data set, else the file's own name."""
    name = "/".join(Path(name).parts[-2:]) if DATASET_NAME.fullmatch(name) else Path(name).name
    return name if len(name) <= length else "..." + name[-length + 3 :]
