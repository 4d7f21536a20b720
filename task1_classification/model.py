"""
The classifier of task 1: a torchvision ResNet with a stem for small images, its preprocessing, what it finds unusual,
and its checkpoint. Tasks 2 and 3 read the checkpoint through `load_classifier` too.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before torchvision
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from shared.data.image_sets import load_phantom
from shared.metrics.classification import choose_threshold, fit_temperature
from shared.runtime import InputError, digest, load_checkpoint, save_checkpoint

ARCHITECTURES = ("resnet18", "resnet50")
STEMS = ("auto", "3x3", "3x3-stride2", "7x7")
MODEL_PATH = Path("models/task1_model.pth")  # where tasks 2 and 3 look
DRY_RUN = {"train": 96, "val": 32, "test": 32}  # phantom images of a --dry-run
FORMAT = "task1-classifier-2"
KEYS = tuple(
    "format architecture stem num_outputs channels image_size task label_names state_dict weights_sha256 normalisation"
    " temperature threshold dataset cases limit seed validation typicality".split()
)

# ---------------------------------------------------------------------------------------------------------- the network


def build_model(architecture="resnet18", num_outputs=1, channels=1, image_size=28, stem="auto", pretrained=False):
    """
    A ResNet for (N, channels, image_size, image_size) that returns (N, num_outputs) logits.

    Stems: "7x7" is torchvision's (stride 2, then max-pooling: a 28-pixel image reaches the last block as 1x1);
    "3x3" keeps the full resolution (the CIFAR stem of the ResNet paper, last block 4x4 at 28 pixels);
    "3x3-stride2" halves it once (last block 2x2) and costs a quarter. "auto": 3x3-stride2 up to 64 pixels, 7x7 above.
    `pretrained` loads torchvision's ImageNet weights; InputError when they cannot be had.
    """
    weights = torchvision.models.get_model_weights(architecture).DEFAULT if pretrained else None
    try:
        model = torchvision.models.get_model(architecture, weights=weights)
    except OSError as error:  # URLError, HTTPError, and a cache folder that cannot be written
        raise InputError(
            f"--pretrained: the ImageNet weights could not be fetched ({error}); save {weights.url} in"
            f" {torch.hub.get_dir()}/checkpoints, or leave --pretrained out"
        ) from error
    stem = choose_stem(stem, image_size)
    old = model.conv1
    if stem == "7x7":
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        if pretrained:  # grey images: the sum over the colours answers as the colour filter does to a grey picture
            with torch.no_grad():
                model.conv1.weight.copy_(old.weight if channels == 3 else old.weight.sum(1, keepdim=True))
    else:
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=2 if stem == "3x3-stride2" else 1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if not pretrained or stem != "7x7":
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as in torchvision's ResNet
    model.fc = nn.Linear(model.fc.in_features, num_outputs)
    return model


def choose_stem(stem, image_size):
    return stem if stem != "auto" else "3x3-stride2" if image_size <= 64 else "7x7"


def normalise(images, normalisation):
    """images uint8, or float in 0..1, (N, C, H, W) -> float, with the mean and spread of the training images."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(normalisation[k], device=images.device).view(1, -1, 1, 1) for k in ("mean", "std"))
    return (images - mean) / std


def to_probabilities(logits, task, temperature=1.0):
    """
    logits (N, outputs) -> float64 (N,) probability of the second class of a binary set, else (N, C): softmax or,
    multi-label, sigmoid. In float64, because float32 rounds every logit above 17 to a probability of 1, and ties change
    an AUC.
    """
    logits = logits.double() / temperature
    if task == "binary-class":
        return logits[:, 0].sigmoid()
    return logits.sigmoid() if task.startswith("multi-label") else logits.softmax(dim=1)


def decision_threshold(probabilities, labels, task):
    """
    Where to cut: highest balanced accuracy, which does not depend on how many of the cases are ill. One number for a
    binary set, one per label for a multi-label set, None for a multi-class one, where the highest probability decides.
    """
    if task == "binary-class":
        return choose_threshold(labels.numpy(), probabilities.numpy())
    if not task.startswith("multi-label"):
        return None
    columns = zip(labels.numpy().T, probabilities.numpy().T, strict=True)
    return [choose_threshold(y, p) if 0 < y.sum() < len(y) else 0.5 for y, p in columns]


@torch.inference_mode()
def predict_logits(model, images, normalisation, device="cpu", dtype=torch.float32, batch_size=256):
    """
    images uint8 or float 0..1 (N, C, H, W), on the CPU -> logits float32 (N, outputs), on the CPU. InputError when one
    of them is not finite: no probability can be made of it.
    """
    model.eval()
    logits = []
    for batch in images.split(batch_size):
        batch = normalise(batch.to(device), normalisation).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            logits.append(model(batch).float().cpu())
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise InputError(
            f"the network answers {(~logits.isfinite()).any(1).sum()} of {len(logits)} images with NaN or infinity (in"
            f" {str(dtype).removeprefix('torch.')}): it was trained with too high an --lr, or overflows in 16 bits"
        )
    return logits


# ------------------------------------------------------------------------------------------------------ unusual images
# A classifier answers for anything, a photograph of a cat included. Two probabilistic principal component models
# (Tipping & Bishop 1999) of the 28x28 grey picture, one of the pixels as they are and one after setting mean and spread
# of each picture to 0 and 1: the first notices other exposure and framing, the second an inverted, turned or altogether
# different picture. The unusualness of an image is the larger of its two Mahalanobis distances, each as a multiple of
# what 99.5 % of the validation images stay below; above 1 it gets a warning. It is a coarse check:
# docs/results/task1_classification.md gives the share of several kinds of foreign images that it notices.

NUM_COMPONENTS = 16
SIDE = 28
QUANTILE = 0.995
VIEWS = {
    "pixels": lambda x: x,
    "standardised": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3),
}


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


# ------------------------------------------------------------------------------------------------------ the checkpoint


def classifier_checkpoint(state_dict, val_logits, all_logits, data, normalisation, **facts):
    """
    What evaluate.py, infer.py and tasks 2 and 3 read: the network, how to feed it, and how to decide with it. The
    temperature is fitted on the logits of the validation images; the threshold on those of the images and their shifted
    copies, one after the other, because on the 524 plain images alone the best cut jumps between .2 and .7 from seed to
    seed. facts: architecture, stem, seed, limit, validation (the row of the chosen epoch), and what else is to be kept.
    """
    labels, task = data.labels["val"], data.task
    temperature = fit_temperature(val_logits.squeeze(1).numpy(), labels.numpy(), task)
    probabilities = to_probabilities(all_logits, task, temperature)
    return {
        "format": FORMAT,
        "num_outputs": data.num_outputs,
        "channels": data.channels,
        "image_size": data.size,
        "task": task,
        "label_names": data.label_names,
        "state_dict": state_dict,
        "weights_sha256": digest(state_dict),
        "normalisation": normalisation,
        "temperature": temperature,
        "threshold": decision_threshold(probabilities, torch.cat([labels] * (len(all_logits) // len(labels))), task),
        "dataset": data.facts(),
        "cases": {split: len(data.labels[split]) for split in ("train", "val")},
        "typicality": fit_typicality(data.images["train"], data.images["val"]),
        **facts,
    }


def untrained_classifier():
    """For a --dry-run without a classifier: one of random weights, written like a trained one -> its path."""
    torch.manual_seed(0)
    data, path = load_phantom(28, DRY_RUN), Path("outputs/task1_classification/untrained.pt")
    model, normalisation = build_model(), {"mean": [0.5], "std": [0.25]}
    logits = predict_logits(model, data.images["val"], normalisation)
    facts = dict(architecture="resnet18", stem=choose_stem("auto", data.size), seed=0, limit=None, validation={})
    save_checkpoint(path, classifier_checkpoint(model.state_dict(), logits, logits, data, normalisation, **facts))
    return path


def load_classifier(path, device="cpu"):
    """
    Read a checkpoint of train.py, or best.pt of a run folder -> (model in eval mode on `device`, its facts: all of KEYS
    but the weights).
    InputError when it is something else, or holds a value that no classifier can have.
    """
    path = Path(path) / "best.pt" if Path(path).is_dir() else path
    state = load_checkpoint(path, KEYS, what="task 1 classifier")
    if state["format"] != FORMAT:
        raise InputError(f"{path} is a '{state['format']}' file, not a '{FORMAT}'; train the classifier again")
    if state["architecture"] not in ARCHITECTURES:
        raise InputError(
            f"{path} holds a {state['architecture']}, which this version does not know ({', '.join(ARCHITECTURES)})"
        )
    if wrong := wrong_facts(state):
        raise InputError(f"{path} is damaged or was changed: no classifier has such values of {', '.join(wrong)}")
    facts, weights = state, state.pop("state_dict")
    model = build_model(*(facts[k] for k in ("architecture", "num_outputs", "channels", "image_size", "stem")))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # other names, shapes or things than weights
        raise InputError(f"the weights in {path} do not fit the {facts['architecture']} it says it holds") from error
    if not all(v.isfinite().all() for v in weights.values()):
        raise InputError(f"weights in {path} are NaN or infinite: its training went wrong; train the classifier again")
    if digest(weights) != facts["weights_sha256"]:
        raise InputError(f"the weights in {path} are not those that were saved (another SHA-256); train it again")
    return model.to(device, memory_format=torch.channels_last).eval(), facts


def wrong_facts(state):
    """Names of the entries of a checkpoint whose values no classifier can have."""

    def inner(name, key):
        return state[name].get(key) if isinstance(state[name], dict) else None

    def number(value, low, high):
        return type(value) in (int, float) and low <= value <= high  # NaN is neither

    def numbers(values, n, low, high):
        return isinstance(values, list) and len(values) == n and all(number(v, low, high) for v in values)

    def view(part):
        parts = [part.get(k) for k in ("mean", "components", "variance", "noise", "limit")] if part else [None]
        if not all(torch.is_tensor(p) and p.isfinite().all() for p in parts):
            return False
        k = parts[2].numel()
        return [tuple(p.shape) for p in parts] == [(SIDE**2,), (k, SIDE**2), (k,), (), ()]

    task, threshold, channels, outputs = (state[k] for k in ("task", "threshold", "channels", "num_outputs"))
    names = state["label_names"] if isinstance(state["label_names"], list) else []
    binary, multi_label = task == "binary-class", task == "multi-label, binary-class"
    cuts = [threshold] if binary else threshold
    right = {
        "task": binary or multi_label or task in ("multi-class", "ordinal-regression"),
        "stem": state["stem"] in STEMS[1:],
        "channels": channels in (1, 3),
        "image_size": type(state["image_size"]) is int and 8 <= state["image_size"] <= 1024,
        "label_names": len(names) >= 2 and all(isinstance(name, str) for name in names),
        "num_outputs": outputs == (1 if binary else len(names)) and (len(names) == 2 or not binary),
        "normalisation": numbers(inner("normalisation", "mean"), channels, -10, 10)
        and numbers(inner("normalisation", "std"), channels, 1e-6, 10),
        "temperature": number(state["temperature"], 1e-6, 1e6),
        "threshold": numbers(cuts, outputs, -1e-3, 1) if binary or multi_label else threshold is None,
        "dataset": isinstance(inner("dataset", "name"), str) and type(inner("dataset", "phantom")) is bool,
        "cases": all(number(inner("cases", split), 1, 1e12) for split in ("train", "val")),
        "limit": state["limit"] is None or number(state["limit"], 1, 1e12),
        "seed": number(state["seed"], 0, 2**63),
        "validation": isinstance(state["validation"], dict),
        "typicality": all(view(inner("typicality", name)) for name in VIEWS),
    }
    return [name for name, fine in right.items() if not fine]


def find_classifier():
    """Where tasks look for the classifier when no path is given: the first that exists, None without one."""
    return next((p for p in (MODEL_PATH, Path(MODEL_PATH.name)) if p.is_file()), None)
