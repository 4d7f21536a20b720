"""
Task 1's CNN beside the VLM: its probability, its heat map, and proof that its features were really computed.

    cnn = find_cnn(checkpoint=None)                       # models/task1_model.pth, else ./task1_model.pth, else None
    opinions = cnn.opinions(films)                        # [{"probability", "call", "feature_norm", "map_shape", ...}]
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch

from shared.data.images import read_image, to_square
from shared.runtime import InputError, command
from task1_classification.explain import GradCAM, overlay
from task1_classification.model import find_classifier, load_classifier, normalise, predict_logits, to_probabilities
from task1_classification.model import unusualness

ABSENT = "no CNN beside the model: there is no models/task1_model.pth and no task1_model.pth here; train one with {}"


class CNN:
    def __init__(self, path, device="cpu"):
        self.path, self.device = Path(path), device
        self.model, self.facts = load_classifier(path, device)
        names = [name.lower() for name in self.facts["label_names"]]
        if self.facts["task"] != "binary-class" or names != ["normal", "pneumonia"]:
            raise InputError(
                f"{path} answers {', '.join(self.facts['label_names'])}; here a classifier of normal and pneumonia is"
                " needed: give one with --cnn, or --cnn none"
            )
        self.dataset = self.facts["dataset"]

    def __str__(self):
        facts, dataset = self.facts, self.dataset
        return (
            f"CNN: {self.path}, {facts['architecture']}, trained on {dataset['name']} at {facts['image_size']} px"
            f" ({facts['cases']['train']} images)"
        )

    def told(self):
        """For records and metrics."""
        keys = ("architecture", "image_size", "weights_sha256", "threshold", "temperature", "seed")
        return {"path": str(self.path), "dataset": self.dataset["name"], "phantom": self.dataset["phantom"]} | {
            k: self.facts[k] for k in keys
        }

    def inputs(self, films):
        size, channels = self.facts["image_size"], self.facts["channels"]
        return torch.from_numpy(np.stack([to_square(read_image(film), size, channels) for film in films]))

    def opinions(self, films, heat_maps=False):
        """
        films: uint8 arrays -> one dict each; heat_maps adds "overlay", uint8 (H, W, 3). The features that the last
        layer sees are caught on the way: their norm, and the shape of the map before pooling, stand in every record.
        """
        images = self.inputs(films)
        kept = {"norm": [], "map": None}

        def catch(module, inputs, output):
            kept["map"] = list(output.shape[1:])
            kept["norm"] += output.float().mean((2, 3)).norm(dim=1).cpu().tolist()

        hook = self.model.layer4.register_forward_hook(catch)
        try:
            logits = predict_logits(self.model, images, self.facts["normalisation"], self.device)
        finally:
            hook.remove()
        p = to_probabilities(logits, "binary-class", self.facts["temperature"]).tolist()
        odd = unusualness(self.facts["typicality"], images).clamp(max=999).tolist()
        found = [
            {
                "probability": p[i],
                "call": "pneumonia" if p[i] > self.facts["threshold"] else "normal",
                "threshold": self.facts["threshold"],
                "feature_norm": kept["norm"][i],
                "map_shape": kept["map"],
                "unlike_training": odd[i] > 1,
            }
            for i in range(len(films))
        ]
        if heat_maps:
            self.add_overlays(found, images)
        return found

    def add_overlays(self, found, images):
        with GradCAM(self.model, "auto", self.facts["image_size"], self.facts["channels"]) as cam:
            for start in range(0, len(images), 64):
                some = images[start : start + 64]
                maps = cam(normalise(some.to(self.device), self.facts["normalisation"])).cpu()
                pictures = overlay(some, maps, scale=8 if some.shape[-1] < 64 else 2)
                for row, picture in zip(found[start : start + 64], pictures, strict=True):
                    row |= {"overlay": picture, "heat_map": list(maps.shape[1:])}


def find_cnn(checkpoint=None, dataset=None, allow_mismatch=False, device="cpu"):
    """
    --cnn -> CNN, or None where none is wanted or there is none, which is said. dataset: name of the set whose films
    are judged (None: unknown films). InputError where the CNN was trained on another one, unless allowed.
    """
    if checkpoint == "none":
        return None
    path = Path(checkpoint) if checkpoint else find_classifier()
    if path is None:
        print(ABSENT.format(command("task1_classification/train.py")))
        return None
    cnn = CNN(path, device)
    print(cnn)
    if dataset is not None and cnn.dataset["name"] != dataset and not allow_mismatch:
        raise InputError(
            f"{path} was trained on {cnn.dataset['name']}, and these films are of {dataset}: give another classifier"
            " with --cnn, --cnn none, or --allow-mismatch"
        )
    return cnn
