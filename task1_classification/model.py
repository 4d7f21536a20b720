"""
The classifier of task 1: a torchvision ResNet with a stem for small images, its preprocessing, and its checkpoint.

Tasks 2 and 3 read the checkpoint through `load_classifier` too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before torchvision
import torch
import torchvision
from torch import nn

from shared.metrics.classification import choose_threshold, fit_temperature
from shared.runtime import InputError, load_checkpoint
from task1_classification.typicality import fit_typicality

ARCHITECTURES = ("resnet18", "resnet50")
STEMS = ("auto", "3x3", "3x3-stride2", "7x7")
FORMAT = "task1-classifier-1"
KEYS = (
    "format",
    "architecture",
    "stem",
    "num_outputs",
    "channels",
    "image_size",
    "task",
    "label_names",
    "state_dict",
    "normalisation",
    "temperature",
    "threshold",
    "dataset",
    "seed",
    "validation",
    "typicality",
)


def build_model(architecture="resnet18", num_outputs=1, channels=1, image_size=28, stem="auto", pretrained=False):
    """
    A ResNet for (N, channels, image_size, image_size) that returns (N, num_outputs) logits.

    Stems: "7x7" is torchvision's (stride 2, then max-pooling: a 28-pixel image reaches the last block as 1x1);
    "3x3" keeps the full resolution (the CIFAR stem of the ResNet paper, last block 4x4 at 28 pixels);
    "3x3-stride2" halves it once (last block 2x2) and costs a quarter. "auto": 3x3-stride2 up to 64 pixels, 7x7 above.
    `pretrained` loads torchvision's ImageNet weights; InputError when they cannot be had.
    """
    weights = None
    if pretrained:
        weights = torchvision.models.get_model_weights(architecture).DEFAULT
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
    """
    images uint8, or float in 0..1, (N, C, H, W) -> float (N, C, H, W) with the mean and spread of the training images.
    """
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


def classifier_checkpoint(best, args, data, normalisation, seed):
    """
    What evaluate.py, infer.py and tasks 2 and 3 read: the network, how to feed it, and how to decide with it. The
    temperature is fitted on the validation images; the threshold on them and their shifted copies, because on the 524
    plain images alone the best cut jumps between .2 and .7 from seed to seed.
    """
    labels, task = data.labels["val"], data.task
    temperature = fit_temperature(best["val_logits"].squeeze(1).numpy(), labels.numpy(), task)
    repeats = len(best["all_logits"]) // len(labels)
    return {
        "format": FORMAT,
        "architecture": args.arch,
        "stem": choose_stem(args.stem, data.size),
        "num_outputs": data.num_outputs,
        "channels": data.channels,
        "image_size": data.size,
        "task": task,
        "label_names": data.label_names,
        "state_dict": best["state_dict"],
        "normalisation": normalisation,
        "temperature": temperature,
        "threshold": decision_threshold(
            to_probabilities(best["all_logits"], task, temperature), torch.cat([labels] * repeats), task
        ),
        "dataset": data.facts(),
        "seed": seed,
        "validation": best["row"],
        "augment": args.augment,
        "typicality": fit_typicality(data.images["train"], data.images["val"]),
    }


@torch.inference_mode()
def predict_logits(model, images, normalisation, device="cpu", dtype=torch.float32, batch_size=256):
    """images uint8 or float 0..1 (N, C, H, W), on the CPU -> logits float32 (N, outputs), on the CPU."""
    model.eval()
    logits = []
    for batch in images.split(batch_size):
        batch = normalise(batch.to(device), normalisation).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            logits.append(model(batch).float().cpu())
    return torch.cat(logits)


def load_classifier(path, device="cpu"):
    """
    Read a checkpoint of train.py -> (model in eval mode on `device`, its facts: architecture, task, label_names,
    image_size, channels, normalisation, threshold, temperature, dataset, validation, ...). InputError when it is
    something else.
    """
    state = load_checkpoint(path, KEYS, what="task 1 classifier")
    if state["format"] != FORMAT:
        raise InputError(f"{path} is a '{state['format']}' file, not a '{FORMAT}'; train the classifier again")
    if state["architecture"] not in ARCHITECTURES:
        raise InputError(
            f"{path} holds a {state['architecture']}, which this version does not know ({', '.join(ARCHITECTURES)})"
        )
    model = build_model(
        state["architecture"], state["num_outputs"], state["channels"], state["image_size"], state["stem"]
    )
    try:
        model.load_state_dict(state.pop("state_dict"))
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit the {state['architecture']} it says it holds") from error
    return model.to(device, memory_format=torch.channels_last).eval(), state


def find_classifier():
    """Where tasks look for the classifier when no path is given: the first that exists, None without one."""
    return next((p for p in (Path("models/task1_model.pth"), Path("task1_model.pth")) if p.is_file()), None)
