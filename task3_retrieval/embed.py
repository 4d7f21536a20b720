"""
Images -> vectors, for retrieval. One function for every backbone, one object that knows how it was made.

    embed = load_embedder("cnn", data=data)          # task 1's ResNet-18 without its head: 512 numbers per image
    vectors = embed(images)                          # images uint8 (N, H, W) or (N, H, W, 3) -> float32 (N, embed.dim)

--backbone cnn                  task 1's classifier, or what task 3's train.py made of it (--cnn-weights)
           pixels               the picture itself, each image's mean subtracted: the floor that every network has to
                                beat
           resnet50, vit_b_16   any torchvision classifier with its published weights, last layer taken off
           random:resnet18      the same, untrained: what the architecture alone does
           FOLDER, owner/name   SigLIP- or CLIP-type model, through get_image_features; tiny:siglip offline
           vlm:FOLDER           vision tower of a vision-language model, mean over its tokens; tiny:gemma3 offline

Vectors are not normalised here: the index does that, and writes down whether it did.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from shared.runtime import InputError, load_checkpoint
from task1_classification.model import build_model, find_classifier, load_classifier, normalise

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
EMBEDDING_KIND = "task3_embedding"  # "kind" of the checkpoints of task3_retrieval/train.py
EMBEDDING_KEYS = ("kind", "model", "head", "settings")
RANDOM_SEED = 0  # of random:<name>, so that the same untrained network comes back


@dataclass
class Embedder:
    """
    Call it with images uint8 (N, H, W) or (N, H, W, 3) -> float32 (N, dim), in their order, not normalised. Images of
    another size are resized to settings["image_size"] first (bicubic, antialiased).
    """

    name: str  # as asked for with --backbone
    dim: int
    digest: str  # sha256 of the weights that were used, or of the recipe
    settings: dict  # image_size, channels, normalisation, ...: plain values, compared when an index is opened
    weights: str | None  # where they came from
    trained_on: str | None  # data set of task 1 or task 3 weights
    function: object = field(repr=False)  # uint8 tensor (n, C, H, W) -> float tensor (n, dim)
    batch_size: int = 256
    device: torch.device = torch.device("cpu")

    @torch.inference_mode()
    def __call__(self, images):
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise InputError(f"images must be uint8 (N, H, W) or (N, H, W, 3), not {images.dtype} {images.shape}")
        out = np.empty((len(images), self.dim), dtype=np.float32)
        for start in range(0, len(images), self.batch_size):
            batch = channels_first(images[start : start + self.batch_size]).to(self.device)
            batch = fit_images(batch, self.settings["image_size"], self.settings["channels"])
            out[start : start + len(batch)] = self.function(batch).float().cpu().numpy()
        return out

    @property
    def read_size(self):
        """Pixels per side at which image files are read."""
        return self.settings["image_size"] or self.settings["read_size"]

    def check_dataset(self, name, allow_other=False):
        """InputError when the weights were trained on another data set than `name`, unless that is allowed."""
        if self.trained_on not in (None, name) and not allow_other:
            raise InputError(
                f"{self.weights} was trained on {self.trained_on}, not on {name}; give --cnn-weights trained on it, or"
                " --allow-other-dataset to use them all the same"
            )

    def facts(self):
        """What an index and metrics files say about where the vectors came from."""
        return {
            "backbone": self.name,
            "dim": self.dim,
            "digest": self.digest,
            "settings": self.settings,
            "weights": self.weights,
            "trained_on": self.trained_on,
        }


def channels_first(images):
    """uint8 array (n, H, W) or (n, H, W, 3) -> tensor (n, C, H, W)."""
    images = torch.from_numpy(np.ascontiguousarray(images))
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def fit_images(images, size, channels):
    """uint8 (n, C, H, W) -> uint8 (n, channels, size, size); size None: as it is."""
    if images.shape[1] == 3 and channels == 1:  # ITU-R 601 luma, as shared/data/images.py has it
        luma = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
        images = (images * luma).sum(1, keepdim=True).round().to(torch.uint8)
    if size is not None and images.shape[2:] != (size, size):
        images = (
            F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
            .clamp(0, 255)
            .round()
            .to(torch.uint8)
        )
    return images.expand(-1, channels, -1, -1)


def load_embedder(
    backbone="cnn",
    cnn_weights=None,
    data=None,
    device="cpu",
    image_size=None,
    allow_other_dataset=False,
    batch_size=256,
):
    """
    backbone: see the top of this file; cnn_weights: checkpoint of task 1 or task 3, or its run folder (default:
    models/task1_model.pth, else ./task1_model.pth); data: the ImageSet to be embedded, against which the weights' data
    set is checked; image_size: pixels per side at the network's input (default: what the weights were trained at;
    pixels: 28). -> Embedder. InputError when weights are missing, of another kind or of another data set.
    """
    device = torch.device(device)
    common = dict(batch_size=batch_size, device=device)
    if cnn_weights is not None and backbone != "cnn":
        raise InputError(f"--cnn-weights belongs to --backbone cnn, not to {backbone}; leave one of them out")
    if backbone == "cnn":
        return load_cnn(cnn_weights, data, image_size, allow_other_dataset, common)
    if backbone == "pixels":
        return load_pixels(
            image_size or (data.size if data is not None else 28), data.channels if data is not None else 1, common
        )
    name = backbone.removeprefix("random:")
    if name in torchvision.models.list_models(module=torchvision.models):
        return load_torchvision(backbone, name, image_size, common)
    if backbone.startswith("random:"):
        raise InputError(f"--backbone {backbone}: torchvision has no classifier of that name; try random:resnet18")
    if image_size is not None:
        raise InputError(f"--backbone {backbone} has its own image size; leave the size out")
    return load_transformer(backbone, device, common)


def embedder_like(facts, cnn_weights=None, device="cpu", batch_size=256):
    """
    The Embedder that an index was built with, from what Embedder.facts() said of it; cnn_weights: where its CNN lies
    now. Whether it is the same is checked by CaseIndex.load and check_embedder, by digest.
    """
    backbone, settings = facts["backbone"], facts["settings"]
    if backbone == "pixels":
        return load_pixels(
            settings["image_size"], settings["channels"], dict(batch_size=batch_size, device=torch.device(device))
        )
    if backbone == "cnn" and cnn_weights is None and Path(facts["weights"]).is_file():
        cnn_weights = facts["weights"]
    size = settings["image_size"] if backbone != "cnn" else None
    return load_embedder(backbone, cnn_weights, None, device, size, batch_size=batch_size)


def load_pixels(size, channels, common):
    settings = {"image_size": size, "channels": channels, "recipe": "pixels / 255, minus the mean of each image"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def vectors(images):
        x = images.flatten(1).float() / 255
        return x - x.mean(1, keepdim=True)

    return Embedder("pixels", channels * size * size, digest, settings, None, None, vectors, **common)


def load_cnn(path, data, image_size, allow_other_dataset, common):
    """The global average pool of task 1's ResNet, and task 3's projection behind it where the checkpoint has one."""
    path = Path(path) if path is not None else find_classifier()
    if path is None:
        raise InputError(
            "there are no task 1 weights at models/task1_model.pth or ./task1_model.pth; train them with python"
            " task1_classification/train.py, give --cnn-weights, or use --backbone pixels, which needs none"
        )
    path = path / "best.pt" if path.is_dir() else path
    print(f"CNN weights: {path}", flush=True)
    state = load_checkpoint(path, what="task 1 classifier or task 3 embedding")
    if isinstance(state, dict) and state.get("kind") == EMBEDDING_KIND:
        model, head, facts = build_embedding(state, path)
    else:
        model, facts = load_classifier(path)
        head = nn.Identity()
    size = facts["image_size"]
    if image_size not in (None, size):
        raise InputError(
            f"{path} was trained at {size} px, not {image_size}; leave the size out, or give other --cnn-weights"
        )
    model.fc = nn.Identity()
    model.to(common["device"], memory_format=torch.channels_last).eval()
    head.to(common["device"]).eval()
    normalisation = facts["normalisation"]

    def vectors(images):
        return head(model(normalise(images, normalisation).contiguous(memory_format=torch.channels_last)))

    settings = {
        "image_size": size,
        "channels": facts["channels"],
        "architecture": facts["architecture"],
        "stem": facts["stem"],
        "normalisation": normalisation,
        "projection": [list(layer.weight.shape) for layer in head.modules() if isinstance(layer, nn.Linear)],
    }
    dim = (
        settings["projection"][-1][0]
        if settings["projection"]
        else model_width(vectors, settings["channels"], settings["image_size"], common["device"])
    )
    embedder = Embedder(
        "cnn", dim, digest_of(model, head), settings, str(path), facts["dataset"]["name"], vectors, **common
    )
    if data is not None:
        embedder.check_dataset(data.name, allow_other_dataset)
    return embedder


def build_embedding(state, path):
    """Checkpoint of task3_retrieval/train.py -> (ResNet with its weights, projection, settings)."""
    missing = [k for k in EMBEDDING_KEYS if k not in state]
    missing += [
        f"settings[{k!r}]"
        for k in ("architecture", "stem", "channels", "image_size", "normalisation", "dataset")
        if k not in state.get("settings", {})
    ]
    if missing:
        raise InputError(
            f"{path} is not a task 3 embedding of this version: it lacks {', '.join(missing)}; train it again with"
            " python task3_retrieval/train.py"
        )
    settings = state["settings"]
    model = build_model(settings["architecture"], 1, settings["channels"], settings["image_size"], settings["stem"])
    model.fc = nn.Identity()
    head = build_head(state["head"])
    try:
        model.load_state_dict({k: v for k, v in state["model"].items() if not k.startswith("fc.")})
        head.load_state_dict(state["head"])
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit the {settings['architecture']} it says it holds") from error
    return model, head, settings


def build_head(state):
    """
    State of an nn.Sequential of Linear layers with ReLU between them ("0.weight", "0.bias", "2.weight", ...) -> that
    module, random; {} -> nn.Identity().
    """
    layers = []
    for key in sorted((k for k in state if k.endswith(".weight")), key=lambda k: int(k.split(".")[0])):
        out_features, in_features = state[key].shape
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Linear(in_features, out_features, bias=key.replace("weight", "bias") in state))
    return nn.Sequential(*layers) if layers else nn.Identity()


def load_torchvision(backbone, name, image_size, common):
    """Any torchvision classifier without its last linear layer; grey images are repeated into three channels."""
    if backbone.startswith("random:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = torchvision.models.get_model(name, weights=None)
        weights, normalisation = None, IMAGENET
    else:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            model = torchvision.models.get_model(name, weights=weights)
        except OSError as error:  # URLError, HTTPError, and a cache folder that cannot be written
            raise InputError(
                f"--backbone {name}: its weights could not be fetched ({error}); save {weights.url} in"
                f" {torch.hub.get_dir()}/checkpoints, or use random:{name} for the untrained network"
            ) from error
        preset = weights.transforms()
        normalisation = {"mean": list(preset.mean), "std": list(preset.std)}
    last = next((n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), None)
    if last is None:
        raise InputError(f"--backbone {name} has no linear layer at its end that could be taken off; use another")
    model.set_submodule(last, nn.Identity())
    model.to(common["device"]).eval()

    def vectors(images):
        return model(normalise(images, normalisation))

    settings = {
        "image_size": image_size or 224,
        "channels": 3,
        "normalisation": normalisation,
        "without": last,
        "weights": str(weights) if weights else f"random, seed {RANDOM_SEED}",
    }
    return Embedder(
        backbone,
        model_width(vectors, settings["channels"], settings["image_size"], common["device"]),
        digest_of(model),
        settings,
        weights and weights.url,
        None,
        vectors,
        **common,
    )


def load_transformer(backbone, device, common):
    """
    Model folders and hub names: one with both towers (SigLIP, CLIP) by its image features, a VLM by its vision tower.
    """
    from transformers import AutoImageProcessor, AutoModel  # takes seconds to import

    from shared.models.inputs import preprocess_images
    from shared.models.loading import FAMILIES, find_model, load_part, load_vlm

    name = backbone.removeprefix("vlm:")
    if not Path(name).expanduser().is_dir() and not name.startswith("tiny:") and "/" not in name:
        raise InputError(
            f"there is no --backbone {backbone}: it is cnn, pixels, a torchvision name such as resnet50,"
            " random:resnet18, a model folder, or vlm: and a model"
        )
    try:
        source, config = find_model(name)
    except InputError as error:  # its advice is about --model, which scripts with a language model have
        raise InputError(
            str(error).split("; to try")[0].split("; --model tiny")[0].replace("--model", "--backbone")
            + "; tiny:siglip works without it"
        ) from error
    common["batch_size"] = min(common["batch_size"], 32)  # large images: 32 of 896 px are 0.3 GB before the first layer
    if backbone.startswith("vlm:") or config.get("model_type") in {f.model_type for f in FAMILIES.values()}:
        vlm = load_vlm(name, device=device)
        tower, processor = vlm.base.get_submodule(FAMILIES[vlm.family].tower), vlm.processor

        def vectors(images):
            inputs = preprocess_images(processor, list(images.cpu()))
            values = inputs.values.to(device, vlm.dtype)
            if inputs.grid_thw is not None:  # Qwen2-VL: the patch rows of all images one after the other
                tokens = tower(values, grid_thw=inputs.grid_thw.to(device)).last_hidden_state
                return torch.stack([t.float().mean(0) for t in tokens.split(inputs.grid_thw.prod(1).tolist())])
            tokens = tower(values).last_hidden_state.float()
            return (
                tokens[:, 1:].mean(1) if vlm.family == "llava" else tokens.mean(1)
            )  # CLIP's first token stands for no place

        model, processing = tower, processor.image_processor
    else:
        model = load_part(AutoModel, source, name=name, device=device)
        if not hasattr(model, "get_image_features"):
            raise InputError(
                f"{name} is a {config.get('model_type')} model without image features; give a SigLIP- or CLIP-type"
                " model, or vlm: and a vision-language model"
            )
        try:
            processing = AutoImageProcessor.from_pretrained(source, local_files_only=Path(source).is_dir())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name} has no image processor: copy preprocessor_config.json from the model's page into it"
            ) from error
        dtype = next(model.parameters()).dtype

        def vectors(images):
            features = model.get_image_features(
                pixel_values=preprocess_images(processing, list(images.cpu())).values.to(device, dtype)
            )
            return getattr(features, "pooler_output", features)  # a tensor before transformers 5

    size = {k: v for k, v in dict(processing.size).items() if v is not None}
    side = size.get("height") or size["shortest_edge"]
    settings = {
        "image_size": None,
        "read_size": side if side <= 1024 else 448,  # Qwen2-VL's sizes are areas: it takes images as they come
        "channels": 3,
        "model_type": config.get("model_type"),
        "processor": type(processing).__name__,
        "processor_size": size,
        "normalisation": {"mean": list(processing.image_mean), "std": list(processing.image_std)},
    }
    return Embedder(
        backbone, model_width(vectors, 3, 56, device), digest_of(model), settings, str(source), None, vectors, **common
    )


@torch.inference_mode()
def model_width(vectors, channels, side, device):
    return vectors(torch.zeros(1, channels, side, side, dtype=torch.uint8, device=device)).shape[1]


def digest_of(*modules):
    """sha256 of names and values of all weights and buffers, in the order of their names."""
    sha256 = hashlib.sha256()
    for i, module in enumerate(modules):
        for name, value in sorted(module.state_dict().items()):
            sha256.update(f"{i}.{name}".encode())
            sha256.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()
