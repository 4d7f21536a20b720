"""
Images -> vectors, for retrieval. One function for every backbone, one object that knows how it was made.

    embed = load_embedder("cnn", data=data)          # the trained embedding, else task 1's ResNet-18 without its head
    vectors = embed(images)                          # images uint8 (N, H, W) or (N, H, W, 3) -> float32 (N, embed.dim)

--backbone cnn                  what train.py made of task 1's classifier, or that classifier (--cnn-weights)
           pixels               the picture itself, each image's mean subtracted: the floor that every network has to
                                beat
           resnet50, vit_b_16   any torchvision classifier with its published weights, last layer taken off
           random:resnet18      the same, untrained: what the architecture alone does
           FOLDER, owner/name   SigLIP- or CLIP-type model, through get_image_features; tiny:siglip offline
           vlm:FOLDER           vision tower of a vision-language model, mean over its tokens; tiny:gemma3 offline

Vectors are not normalised here: the index does that, and writes down whether it did.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from shared.runtime import InputError, digest, load_checkpoint, read_json, run_kind
from task1_classification.model import build_model, find_classifier, load_classifier, normalise

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
EMBEDDING_KIND = "task3_embedding"  # "kind" of the checkpoints of task3_retrieval/train.py
EMBEDDING_SETTINGS = ("architecture", "stem", "channels", "image_size", "normalisation", "dataset")
RANDOM_SEED = 0  # of random:<name>, so that the same untrained network comes back
RUNS = Path("outputs/task3_retrieval")


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
    title: str = ""  # what the tables call it
    limit: int | None = None  # --limit of the run that trained the weights
    trained_sha: str | None = None  # of the data they were trained on

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

    def warnings(self, phantom):
        """Sentences for reports on images that are drawn (phantom) or not: what the weights were trained on."""
        drawn = self.trained_on == "phantom" and not phantom
        limited = [f"The network was trained with --limit {self.limit}."] * bool(self.limit)
        return ["The network was trained on drawn films (phantom)."] * drawn + limited

    def facts(self):
        """What an index and metrics files say about where the vectors came from."""
        names = ("dim", "digest", "settings", "weights", "trained_on", "title")
        return {"backbone": self.name} | {name: getattr(self, name) for name in names}


def channels_first(images):
    """uint8 array (n, H, W) or (n, H, W, 3) -> tensor (n, C, H, W)."""
    images = torch.from_numpy(np.ascontiguousarray(images))
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def channels_last(images):
    """uint8 tensor (n, C, H, W) -> array (n, H, W), or (n, H, W, 3)."""
    return images[:, 0].numpy() if images.shape[1] == 1 else images.permute(0, 2, 3, 1).contiguous().numpy()


def fit_images(images, size, channels):
    """uint8 (n, C, H, W) -> uint8 (n, channels, size, size); size None: as it is."""
    if images.shape[1] == 3 and channels == 1:  # ITU-R 601 luma, as shared/data/images.py has it
        luma = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
        images = (images * luma).sum(1, keepdim=True).round().to(torch.uint8)
    if size is not None and images.shape[2:] != (size, size):
        images = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        images = images.clamp(0, 255).round().to(torch.uint8)
    return images.expand(-1, channels, -1, -1)


# ------------------------------------------------------------------------------------------------ which weights to take


def preferred_run(script, holding, dataset=None):
    """
    The run of this task's script to go on with, of those that are finished, hold the file `holding` and are of
    `dataset` (None: any): full runs on real images first, then the newest -> (its folder, is it such a full run), or
    (None, False).
    """
    found = []
    for run in (RUNS / script).glob("[0-9]*"):
        if re.fullmatch("[0-9]+", run.name) and (run / holding).is_file() and (kind := run_kind(run))["finished"]:
            if dataset is None or dataset in (read_json(run / "metrics.json").get("datasets") or ()):
                found.append((not (kind["phantom"] or kind["limit"]), int(run.name), run))
    full, _, run = max(found, default=(False, 0, None))
    return run, full


def find_cnn(dataset=None):
    """
    Weights for --backbone cnn where none are named: the embedding that train.py made, for `dataset` where that is
    given, else task 1's classifier -> (path, the reason in words). A run with --limit or on the phantom does not stand
    in for a classifier of real images. InputError where there is neither.
    """
    (run, full), classifier = preferred_run("train", "best.pt", dataset), find_classifier()
    if run is not None and (full or classifier is None or load_classifier(classifier)[1]["dataset"]["phantom"]):
        kind = "the newest full run of" if full else "there is no full run on real images of"
        return run / "best.pt", f"trained embedding, {kind} train.py"
    if classifier is None:
        raise InputError(
            "there are no task 1 weights at models/task1_model.pth or ./task1_model.pth; train them with python"
            " task1_classification/train.py, give --cnn-weights, or use --backbone pixels, which needs none"
        )
    return classifier, "task 1's classifier: there is no full run of task3_retrieval/train.py for these images"


def load_embedder(
    backbone="cnn", cnn_weights=None, data=None, device="cpu", image_size=None, allow_other_dataset=False,
    batch_size=256, dataset=None,
):  # fmt: skip
    """
    backbone: see the top of this file; cnn_weights: checkpoint of task 1 or task 3, or its run folder (default: see
    find_cnn); data: the ImageSet to be embedded, against which the weights' data set is checked; dataset: its name
    where it is not read yet; image_size: pixels per side at the network's input (default: what the weights were
    trained at; pixels: 28). -> Embedder. InputError when weights are missing, of another kind or of another data set.
    """
    common = dict(batch_size=batch_size, device=torch.device(device))
    if cnn_weights is not None and backbone != "cnn":
        raise InputError(f"--cnn-weights belongs to --backbone cnn, not to {backbone}; leave one of them out")
    if backbone == "cnn":
        name = data.name if data is not None else dataset
        path, why = (Path(cnn_weights), "") if cnn_weights is not None else find_cnn(name)
        path = path / "best.pt" if path.is_dir() else path
        print(f"CNN weights: {path}{f' ({why})' if why else ''}", flush=True)
        embedder = load_cnn(path, image_size, common)
        if data is not None:
            embedder.check_dataset(data.name, allow_other_dataset)
        return embedder
    if backbone == "pixels":
        size, channels = (data.size, data.channels) if data is not None else (28, 1)
        return load_pixels(image_size or size, channels, common)
    name = backbone.removeprefix("random:")
    if name in torchvision.models.list_models(module=torchvision.models):
        return load_torchvision(backbone, name, image_size or 224, common)
    if backbone.startswith("random:"):
        raise InputError(f"--backbone {backbone}: torchvision has no classifier of that name; try random:resnet18")
    if image_size is not None:
        raise InputError(f"--backbone {backbone} has its own image size; leave the size out")
    return load_transformer(backbone, common)


def embedder_like(facts, cnn_weights=None, device="cpu", batch_size=256):
    """
    The Embedder that an index was built with, from what Embedder.facts() said of it; cnn_weights: where its CNN lies
    now. Whether it is the same is checked by CaseIndex.load and check_embedder, by digest.
    """
    if not facts:
        raise InputError("this index does not say what its vectors were made with; build it again")
    backbone, size = facts["backbone"], facts["settings"].get("image_size")
    if backbone == "pixels":
        return load_pixels(
            size, facts["settings"]["channels"], dict(batch_size=batch_size, device=torch.device(device))
        )
    if backbone == "cnn":
        size = None
        if cnn_weights is None and Path(facts["weights"]).is_file():
            cnn_weights = facts["weights"]
    return load_embedder(backbone, cnn_weights, None, device, size, batch_size=batch_size)


# ------------------------------------------------------------------------------------------------------------ backbones


def load_pixels(size, channels, common):
    settings = {"image_size": size, "channels": channels, "recipe": "pixels / 255, minus the mean of each image"}
    recipe = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def vectors(images):
        x = images.flatten(1).float() / 255
        return x - x.mean(1, keepdim=True)

    return Embedder("pixels", channels * size * size, recipe, settings, None, None, vectors, **common, title="pixels")


class Embedding(nn.Module):
    """Task 1's ResNet without its last layer, and linear layers of these widths behind it with ReLU between them."""

    def __init__(self, classifier, widths=()):
        super().__init__()
        sizes = [classifier.fc.in_features, *widths]
        self.model = classifier
        self.model.fc = nn.Identity()
        layers = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.ReLU()] * bool(layers) + [nn.Linear(before, after)]
        self.head = nn.Sequential(*layers)
        self.widths, self.dim = list(widths), sizes[-1]

    def forward(self, images):
        """float (N, C, H, W), normalised -> (N, dim)."""
        return self.head(self.model(images))


def load_cnn(path, image_size, common):
    """The global average pool of task 1's ResNet, and task 3's projection behind it where the checkpoint has one."""
    state = load_checkpoint(path, what="task 1 classifier or task 3 embedding")
    if isinstance(state, dict) and state.get("kind") == EMBEDDING_KIND:
        network, facts, title = *read_embedding(state, path), "trained embedding"
    else:
        classifier, facts = load_classifier(path)
        network, title = Embedding(classifier), "task 1 features"
    size, normalisation = facts["image_size"], facts["normalisation"]
    if image_size not in (None, size):
        raise InputError(
            f"{path} was trained at {size} px, not {image_size}; leave the size out, or give other --cnn-weights"
        )
    sha256 = digest(network.state_dict())
    network.to(common["device"], memory_format=torch.channels_last).eval()

    def vectors(images):
        return network(normalise(images, normalisation).contiguous(memory_format=torch.channels_last))

    settings = {key: facts[key] for key in ("image_size", "channels", "architecture", "stem", "normalisation")}
    settings |= {"projection": network.widths}
    trained_on = facts["dataset"]["name"]
    common = common | {"title": title, "limit": facts.get("limit"), "trained_sha": facts["dataset"]["sha256"]}
    return Embedder("cnn", network.dim, sha256, settings, str(path), trained_on, vectors, **common)


def read_embedding(state, path):
    """Checkpoint of task3_retrieval/train.py -> (Embedding, settings). InputError for one that cannot be."""
    missing = [k for k in ("model", "head", "settings") if not isinstance(state.get(k), dict)]
    missing += [f"settings[{k!r}]" for k in EMBEDDING_SETTINGS if not missing and k not in state["settings"]]
    if missing:
        raise InputError(
            f"{path} is not a task 3 embedding of this version: it lacks {', '.join(missing)}; train it again with"
            " python task3_retrieval/train.py"
        )
    settings, head = state["settings"], state["head"]
    if state.get("weights_sha256") != digest(state["model"] | head):
        raise InputError(f"the weights in {path} are not those that were saved (another SHA-256); train it again")
    try:
        weights = sorted((k for k in head if k.endswith(".weight")), key=lambda k: int(k.split(".")[0]))
        model = build_model(settings["architecture"], 1, settings["channels"], settings["image_size"], settings["stem"])
        network = Embedding(model, [head[k].shape[0] for k in weights])
        network.model.load_state_dict({k: v for k, v in state["model"].items() if not k.startswith("fc.")})
        network.head.load_state_dict(head)
        mean, std = (torch.tensor(settings["normalisation"][k]).expand(settings["channels"]) for k in ("mean", "std"))
        usable = all(v.isfinite().all() for v in (mean, std, *network.state_dict().values())) and (std > 0).all()
        usable = usable and isinstance(settings["dataset"]["name"], str)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"the weights in {path} do not fit the network that it says it holds") from error
    if not usable:
        raise InputError(f"{path} is damaged: a weight or a setting of it is no usable number; train it again")
    return network, settings


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
        "image_size": image_size,
        "channels": 3,
        "normalisation": normalisation,
        "without": last,
        "weights": str(weights) if weights else f"random, seed {RANDOM_SEED}",
    }
    try:
        dim = model_width(vectors, 3, image_size, common["device"])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"--backbone {backbone} cannot take images of {image_size} pixels ({str(error).splitlines()[0]}); give"
            " another size, or leave it out for 224"
        ) from error
    url = weights and weights.url
    return Embedder(backbone, dim, digest(model.state_dict()), settings, url, None, vectors, **common, title=backbone)


def load_transformer(backbone, common):
    """
    Model folders and hub names: one with both towers (SigLIP, CLIP) by its image features, a VLM by its vision tower.
    """
    from transformers import AutoImageProcessor, AutoModel  # takes seconds to import

    from shared.models.inputs import preprocess_images
    from shared.models.loading import FAMILIES, find_model, load_part, load_vlm

    name, device = backbone.removeprefix("vlm:"), common["device"]
    if not Path(name).expanduser().is_dir() and not name.startswith("tiny:") and "/" not in name:
        raise InputError(
            f"there is no --backbone {backbone}: it is cnn, pixels, a torchvision name such as resnet50,"
            " random:resnet18, a model folder, or vlm: and a model"
        )
    try:
        source, config = find_model(name)
    except InputError as error:  # its advice is about --model, which scripts with a language model have
        advice = str(error).split("; to try")[0].split("; --model tiny")[0].replace("--model", "--backbone")
        raise InputError(f"{advice}; tiny:siglip works without it") from error
    common["batch_size"] = min(common["batch_size"], 32)  # large images: 32 of 896 px are 0.3 GB before the first layer
    if backbone.startswith("vlm:") or config.get("model_type") in {f.model_type for f in FAMILIES.values()}:
        vlm = load_vlm(name, device=device)
        model, processing = vlm.base.get_submodule(FAMILIES[vlm.family].tower), vlm.processor.image_processor

        def vectors(images):
            inputs = preprocess_images(vlm.processor, list(images.cpu()))
            values = inputs.values.to(device, vlm.dtype)
            if inputs.grid_thw is not None:  # Qwen2-VL: the patch rows of all images one after the other
                tokens = model(values, grid_thw=inputs.grid_thw.to(device)).last_hidden_state
                return torch.stack([t.float().mean(0) for t in tokens.split(inputs.grid_thw.prod(1).tolist())])
            tokens = model(values).last_hidden_state.float()
            return tokens[:, int(vlm.family == "llava") :].mean(1)  # CLIP's first token stands for no place

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
            values = preprocess_images(processing, list(images.cpu())).values.to(device, dtype)
            features = model.get_image_features(pixel_values=values)
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
    dim = model_width(vectors, 3, 56, device)
    return Embedder(
        backbone, dim, digest(model.state_dict()), settings, str(source), None, vectors, **common, title=backbone
    )


@torch.inference_mode()
def model_width(vectors, channels, side, device):
    return vectors(torch.zeros(1, channels, side, side, dtype=torch.uint8, device=device)).shape[1]
