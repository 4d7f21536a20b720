"""
Does an image look like the training images at all? A classifier answers for anything, a photograph of a cat included.

Two probabilistic principal component models (Tipping & Bishop 1999) of the 28x28 grey picture, one of the pixels as
they are and one after setting mean and spread of each picture to 0 and 1: the first notices other exposure and framing,
the second an inverted, turned or altogether different picture. The unusualness of an image is the larger of its two
Mahalanobis distances, each as a multiple of what 99.5 % of the validation images stay below; above 1 it gets a warning.
It is a coarse check: the README gives the share of several kinds of foreign images that it notices.
"""

import torch
import torch.nn.functional as F

NUM_COMPONENTS = 16
SIDE = 28
QUANTILE = 0.995


def fit_typicality(train, validation):
    """train, validation uint8 (N, C, H, W) -> plain tensors for the checkpoint."""
    model = {}
    for name, view in VIEWS.items():
        x = view(small_grey(train[:20_000]))
        mean = x.mean(0)
        _, singular, components = torch.linalg.svd(x - mean, full_matrices=False)
        variance = singular**2 / len(x)
        k = min(NUM_COMPONENTS, len(variance) - 1)
        part = {
            "mean": mean,
            "components": components[:k].clone(),  # (k, 784)
            "variance": variance[:k].clone().clamp(min=1e-6),
            "noise": (variance[k:].sum() / (SIDE * SIDE - k)).clamp(min=1e-6),  # of each direction that is left
        }
        part["limit"] = distances(part, view(small_grey(validation))).quantile(QUANTILE)
        model[name] = part
    return model


def unusualness(model, images):
    """images uint8 (N, C, H, W) -> (N,): above 1 is unlike the training images; infinite for a picture of one grey."""
    grey = small_grey(images)
    ratios = [distances(model[name], view(grey)) / model[name]["limit"] for name, view in VIEWS.items()]
    return torch.stack(ratios).amax(0).masked_fill(grey.std(1) < 0.02, torch.inf)


def distances(part, x):
    """Squared Mahalanobis distance of x (N, 784) under one model, (N,)."""
    x = x - part["mean"]
    scores = x @ part["components"].T
    rest = (x**2).sum(1) - (scores**2).sum(1)
    return (scores**2 / part["variance"]).sum(1) + rest / part["noise"]


def small_grey(images):
    """uint8 (N, C, H, W) -> float (N, 784) in 0..1."""
    images = images.float().mean(1, keepdim=True) / 255
    return F.interpolate(images, size=(SIDE, SIDE), mode="area").flatten(1)


def standardised(x):
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


VIEWS = {"pixels": lambda x: x, "standardised": standardised}
