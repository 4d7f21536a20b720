"""
The frozen half of the vlm_ scripts, and what is trained on it.

    encoder = load_encoder("google/medgemma-4b-it", device=device)        # or a folder, tiny:llava, MedSigLIP
    tokens = encoder.tower(images)                                        # one (T, D) per image, before the projector
    seen = encoder.project(encoder.projector, tokens)                     # one (T', W) per image, what the LLM gets
    bank = Bank(encoder, store, keep_gib=2)                               # all films through the tower once
    probe = make_probe(encoder, "projector", num_labels, width, seed=0)   # logits: probe(inputs_of("projector", ...))

What the modes train, on top of the mean over the tokens of an image:
    head              A  a linear head on the tower's tokens; the projector plays no part
    projector-head    B  a linear head on the projector's output, the projector frozen
    random-projector     B with a projector of random numbers, frozen: what the projector's training is worth
    projector         C  B and the projector
    lora              D  B and low-rank adapters in the tower
    cnn                  task 1's ResNet-18 on the same films at 64 px, for comparison
Every head stands on features with mean 0 and spread 1 over the training films of B (or A), which stay what they are
while the projector moves, so that C and D begin as B exactly.

A linear head on a mean sees no more behind a projector that is linear than before it: Gemma 3's is a norm and one
matrix (B and C differ from A in scaling and in the course of training alone), LLaVA's and Qwen's have a hidden layer.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import copy
import functools
import math
import re
import warnings

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoProcessor

from shared.data.images import read_image, to_square
from shared.models.hub import explained, find_model, load_part
from shared.models.inputs import ImageStore
from shared.models.loading import VLM, add_lora, count_parameters, digest_of, load_vlm
from shared.models.passes import features_of
from shared.models.tiny import quietly
from shared.runtime import InputError, load_checkpoint
from task1_classification.model import build_model, normalise

FORMAT = "vlm-classifier-1"
KINDS = {  # of what a checkpoint holds
    "format": str, "mode": str, "family": str, "model": str, "quant": str, "dtype": str, "labels": list,
    "weights": dict, "lora_rank": (int, type(None)), "validation": dict, "seed": int, "trainable": int, "data": dict,
    "told": dict, "history": list, "settings": dict,
}  # fmt: skip
DUAL = ("siglip", "siglip2", "clip")  # model_type of dual encoders
MODES = ("head", "projector-head", "random-projector", "projector", "lora", "cnn")
NEED_PROJECTOR = MODES[1:5]
MEANS = {"head": "before", "projector-head": "behind", "random-projector": "random"}  # below the head, computed once
CNN_SIZE = 64
LORA_LAYERS = r".*(vision_tower|visual)\..*\.(q_proj|v_proj|qkv)"


# ------------------------------------------------------------------------------------------------------------- encoders


class Encoder:
    """Vision tower and, of a vision-language model, projector (frozen, as it came)."""

    def __init__(self, vlm=None, dual=None, processor=None, name="", family="", device="cpu", source=None):
        self.vlm, self.dual, self.processor = vlm, dual, processor or (vlm and vlm.processor)
        self.name, self.family, self.device, self.source = name, family, torch.device(device), source
        self.dtype = vlm.dtype if vlm else torch.float32
        if self.model is not None:
            self.model.requires_grad_(False)

    @property
    def model(self):
        """The whole model; None where there is a CNN alone."""
        return self.vlm.base if self.vlm else self.dual

    @property
    def projector(self):
        """The first module of the family's projector. InputError for a dual encoder."""
        if self.vlm is None:
            raise InputError(f"{self.name} ({self.family}) has no projector: a dual encoder can be trained with --mode"
                             " head alone")  # fmt: skip
        return self.vlm.base.get_submodule(self.vlm.spec.projector[0])

    def tower(self, images):
        """Images (shared/models/inputs.py) -> list of (T, D): the tokens that the projector is given."""
        if self.vlm is None:
            found = self.dual.vision_model(images.values.to(self.device, self.dtype)).last_hidden_state
            return list(found)
        seen = []
        hook = self.projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            features_of(self.vlm, images)
        finally:
            hook.remove()
        if seen[0].ndim == 3:
            return list(seen[0])
        return list(seen[0].split(images.grid_thw.prod(1).tolist()))  # Qwen: the patches of all images in one row

    def project(self, projector, tokens):
        """tokens: list of (T, D) -> list of (T', W)."""
        tokens = [t.to(self.device) for t in tokens]
        if not self.vlm.spec.rope:
            return list(projector(torch.stack(tokens)))
        merged = self.processor.image_processor.merge_size**2
        return list(projector(torch.cat(tokens)).split([len(t) // merged for t in tokens]))

    @property
    def parameters(self):
        return count_parameters(self.model) if self.model is not None else None

    @property
    def small(self):
        """Too small to be pretrained anywhere but here: its projector takes larger steps."""
        return self.model is not None and self.parameters < 100e6

    @functools.cached_property
    def digest(self):
        """Of the weights as they came: a head belongs to these and no others."""
        return digest_of(self.source)

    def facts(self):
        known = {"model": self.name, "family": self.family, "quant": self.vlm.quant if self.vlm else "none"}
        return known | {"dtype": str(self.dtype).removeprefix("torch."), "parameters": self.parameters}


def load_encoder(name, quant="none", dtype="auto", device="cpu", family="gemma3"):
    """--model -> Encoder. family: of bare "tiny"."""
    source, config = find_model(name, family)
    if config.get("model_type") not in DUAL:
        vlm = load_vlm(name, quant, device, dtype, family=family)
        return Encoder(vlm, name=str(name), family=vlm.family, device=vlm.device, source=vlm.source)
    if quant != "none" or dtype not in ("auto", "float32"):
        raise InputError(f"{name} is a dual encoder, small enough to stay whole: leave --quant and --dtype out")
    with quietly(), explained(f"{name} has no complete processor"):
        processor = AutoProcessor.from_pretrained(source)
    dual = load_part(AutoModel, source, name=str(name), device=device)
    return Encoder(None, dual, processor, str(name), config["model_type"], device, source)


def random_like(projector, seed):
    """A projector of the same shape whose matrices are drawn anew; biases 0, norms as they came."""
    new, generator = copy.deepcopy(projector).float(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(min(p.shape)))
        for module in new.modules():
            if getattr(module, "bias", None) is not None and isinstance(module, nn.Linear):
                module.bias.zero_()
    return new


# ----------------------------------------------------------------------------------------------------------------- bank


class Bank:
    """
    What the frozen tower says of all films, computed once: the mean over the tokens of each, before the projector
    (`before` (N, D)) and behind it (`behind` (N, W), None without one), and the tokens themselves where `tokens` asks
    for them and they fit into keep_gib GiB; otherwise the tower runs again for each batch that needs them.
    """

    def __init__(self, encoder, store, keep_gib=2.0, tokens=True, batch_size=16):
        self.encoder, self.store, self.batch_size = encoder, store, batch_size
        projector = encoder.projector if encoder.vlm else None
        one = sum(t.nbytes for t in self.look(range(1))) / 2**30 if len(store) else 0
        self.gib = one * len(store)
        self.keeps = tokens and self.gib <= keep_gib
        before, behind = [], []

        def compute(images):
            found = encoder.tower(images)
            before.extend(t.float().mean(0).cpu() for t in found)
            if projector is not None:
                behind.extend(t.float().mean(0).cpu() for t in encoder.project(projector, found))
            return found if self.keeps else [t.new_zeros(1) for t in found]

        store.cache_features(compute, max(keep_gib, 1e-3) if self.keeps else 1.0, batch_size)
        self.before, self.behind = torch.stack(before), torch.stack(behind) if behind else None

    @torch.no_grad()
    def look(self, numbers):
        return self.encoder.tower(self.store.get(numbers))

    def tokens(self, rows):
        """rows: films by number -> list of (T, D)."""
        numbers = [self.store.number_of[int(r)] for r in rows]
        return [self.store.features[n] for n in numbers] if self.keeps else self.look(numbers)

    def means(self, rows, of="behind"):
        """of: before, behind, or random, see look_through."""
        return getattr(self, of)[[self.store.number_of[int(r)] for r in rows]]

    @torch.no_grad()
    def look_through(self, probe):
        """Means behind the frozen projector of a probe, computed once -> self.random."""
        rows = [self.store.number_of.index(n) for n in range(len(self.store))]
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        self.random = torch.cat([probe.pooled(self.tokens(part)).cpu() for part in parts])


# --------------------------------------------------------------------------------------------------------------- probes


class Probe(nn.Module):
    """Films -> logits (B, L). Input: means (B, D), or a list of tokens that go through the projector first."""

    def __init__(self, width, num_labels, projector=None, project=None):
        super().__init__()
        self.projector, self.project = projector, project
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.head = nn.Linear(width, num_labels)
        nn.init.zeros_(self.head.weight)  # every film is as likely ill as not, whatever the seed
        nn.init.zeros_(self.head.bias)

    def standardise(self, features):
        """features (N, D) of the training films."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp(min=1e-6))

    def pooled(self, tokens):
        weights = next(self.projector.parameters())
        tokens = [t.to(weights.device, weights.dtype) for t in tokens]
        return torch.stack([t.mean(0) for t in self.project(self.projector, tokens)]).float()

    def forward(self, x):
        x = x.to(self.mean.device) if torch.is_tensor(x) else self.pooled(x)
        return self.head((x - self.mean) / self.std)


class CNN(nn.Module):
    """Task 1's network on uint8 films (B, 1, 64, 64) -> logits (B, L)."""

    def __init__(self, num_labels, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = build_model("resnet18", num_labels, 1, CNN_SIZE, stem="7x7")
        self.register_buffer("scale", torch.tensor([0.5, 0.25]))  # mean and spread of the training films

    def forward(self, images):
        mean, std = self.scale.tolist()
        return self.network(normalise(images.to(self.scale.device), {"mean": [mean], "std": [std]}))


def make_probe(encoder, mode, num_labels, width, seed):
    """An untrained Probe or CNN of this mode on the encoder's device. width: of the features below the head."""
    if mode == "cnn":
        return CNN(num_labels, seed).to(encoder.device)
    projector = None
    if mode in ("projector", "lora"):
        projector = copy.deepcopy(encoder.projector).float()  # float32: steps of 1e-4 are lost on 16-bit weights
    elif mode == "random-projector":
        projector = random_like(encoder.projector, seed)
    probe = Probe(width, num_labels, projector, encoder.project if projector is not None else None)
    probe.requires_grad_(False)
    probe.head.requires_grad_(True)
    if mode == "projector":
        probe.projector.requires_grad_(True)
    return probe.to(encoder.device)


def put_lora(encoder, rank, seed):
    """Adapters in the tower, drawn from the seed -> how to take them off again."""
    vlm: VLM = encoder.vlm
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a property that transformers has renamed
        torch.manual_seed(seed)
        add_lora(vlm, rank=rank, dropout=0.0, layers=LORA_LAYERS, checkpointing=False)

    def take_off():
        vlm.model = vlm.model.unload()
        vlm.adapter = None
        vlm.model.requires_grad_(False)

    return take_off


def lora_weights(encoder):
    return {name: p for name, p in encoder.vlm.base.named_parameters() if "lora_" in name}


def matching_rank(encoder):
    """The rank at which the adapters have about as many parameters as the projector."""
    layers = [m for name, m in encoder.vlm.base.named_modules() if re.fullmatch(LORA_LAYERS, name)]
    each = sum(m.in_features + m.out_features for m in layers)
    return max(1, round(sum(p.numel() for p in encoder.projector.parameters()) / each))


def check_gradients(mode, probe, encoder):
    """
    After a backward pass: what is trained has a gradient that is not zero, and nothing else has one; else RuntimeError,
    a bug. False where that cannot be told yet: through a head of zeros (B learned nothing) no gradient passes.
    """
    if mode in ("projector", "lora") and not any(p.any() for p in probe.head.parameters() if p.ndim > 1):
        return False
    trained = {"head": probe.head} if mode != "cnn" else {"network": probe.network}
    if mode == "projector":
        trained["projector"] = probe.projector
    for name, module in trained.items():
        if not any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()):
            raise RuntimeError(f"--mode {mode}: no gradient reaches the {name}")
    if mode == "lora":  # B of each adapter is 0 at first, so that A has no gradient yet
        grads = [p.grad for name, p in lora_weights(encoder).items() if "lora_B" in name]
        if not any(g is not None and g.abs().max() > 0 for g in grads):
            raise RuntimeError("--mode lora: no gradient reaches the adapters")
    frozen = [] if mode == "cnn" else list(encoder.model.named_parameters())
    if mode in ("head", "projector-head", "random-projector", "lora") and getattr(probe, "projector", None) is not None:
        frozen += list(probe.projector.named_parameters())
    for name, p in frozen:
        if "lora_" not in name and (p.requires_grad or p.grad is not None):
            raise RuntimeError(f"--mode {mode}: {name} is frozen and has a gradient")
    return True


def inputs_of(mode, bank, films, rows, encoder):
    """What a probe of this mode is given for these films."""
    if mode == "cnn":
        return small_films(films)[rows]
    if mode in MEANS:
        return bank.means(rows, MEANS[mode])
    if mode == "lora":
        return encoder.tower(bank.store.get([bank.store.number_of[int(r)] for r in rows]))
    return bank.tokens(rows)


def small_films(films):
    """Films -> uint8 tensor (N, 1, 64, 64), read once and kept with them."""
    if not hasattr(films, "small"):
        images = [row["image"] for row in films.rows]
        pixels = [to_square(x if isinstance(x, np.ndarray) else read_image(x), CNN_SIZE, 1) for x in images]
        films.small = torch.from_numpy(np.stack(pixels))
    return films.small


@torch.no_grad()
def predict(mode, probe, bank, films, rows, encoder, batch_size=64):
    """-> logits float32 (n, L) on the CPU. InputError where they are not finite."""
    probe.eval()
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    logits = torch.cat([probe(inputs_of(mode, bank, films, part, encoder)).float().cpu() for part in parts])
    if not logits.isfinite().all():
        raise InputError(f"{mode}: the outputs are not finite: lower --lr, or the weights of"
                         f" {encoder.name or 'the CNN'} are damaged or overflow in --dtype")  # fmt: skip
    return logits


def masked_loss(logits, truth, positive_weight):
    """Mean binary cross-entropy over what is known; logits, truth (B, L) with NaN for unknown, positive_weight (L,)."""
    known = ~torch.isnan(truth)
    losses = F.binary_cross_entropy_with_logits(
        logits, torch.nan_to_num(truth), reduction="none", pos_weight=positive_weight
    )
    return (losses * known).sum() / known.sum().clamp(min=1)


def class_weights(truth, highest=20.0):
    """truth (N, L) with NaN -> weight of the positives (L,): as much as the negatives together, at most `highest`."""
    positives, negatives = (truth == 1).sum(0), (truth == 0).sum(0)
    return (negatives / positives.clamp(min=1)).clamp(1 / highest, highest)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def load_probe(path, mode=None, family=None, labels=None):
    """
    A best.pt of vlm_train.py -> its dict. InputError when it is something else, or of another mode, family or labels
    than those asked for.
    """
    state = load_checkpoint(path, KINDS, what="checkpoint of vlm_train.py")
    if state["format"] != FORMAT:
        raise InputError(f"{path} is a {state['format']!r} file, not a {FORMAT!r}: train again")
    wrong = [name for name, kind in KINDS.items() if not isinstance(state[name], kind)]
    weights = {} if "weights" in wrong else state["weights"]
    finite = all(torch.is_tensor(w) and w.isfinite().all() for w in weights.values())
    if wrong or state["mode"] not in MODES or not finite or ("std" in weights and not (weights["std"] > 0).all()):
        raise InputError(f"{path} is damaged or was changed: {', '.join(wrong) or 'mode or weights'} cannot be right;"
                         " train again")  # fmt: skip
    wanted = {"mode": mode, "family": family, "labels": list(labels) if labels is not None else None}
    for name, value in wanted.items():
        if value is not None and state[name] != value:
            raise InputError(f"{path} is of the {name} {state[name]}, not {value}: give one that is")
    return state


def restore_probe(state, encoder, path="the checkpoint"):
    """
    A checkpoint's dict -> its Probe, or CNN, in evaluation mode; adapters are put on the encoder -> also how to take
    them off. InputError when it does not fit the encoder.
    """
    mode, weights, take_off = state["mode"], state["weights"], lambda: None
    if mode != "cnn" and state["family"] != encoder.family:
        raise InputError(f"{path} was trained on the family {state['family']}, and {encoder.name} is {encoder.family}")
    if mode != "cnn" and state.get("base", encoder.digest) != encoder.digest:
        raise InputError(f"{path} was trained on other weights than those of {encoder.name}: give the --model it was"
                         " trained on")  # fmt: skip
    try:
        width = 0 if mode == "cnn" else len(weights["mean"])
        probe = make_probe(encoder, mode, len(state["labels"]), width, state["seed"])
        own = {k: v for k, v in weights.items() if "lora_" not in k}
        missing, unexpected = probe.load_state_dict(own, strict=False)
        frozen = "projector." if mode in ("random-projector", "lora") else "nothing"  # made again, not stored
        if unexpected or any(not name.startswith(frozen) for name in missing):
            raise RuntimeError(f"{[*missing, *unexpected][0]}")
        if mode == "lora":
            take_off = put_lora(encoder, state["lora_rank"], state["seed"])
            for name, p in lora_weights(encoder).items():
                p.data.copy_(weights[name])
    except (RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not fit {encoder.name} ({str(error).splitlines()[0][:120]}): give the --model it"
                         " was trained on") from error  # fmt: skip
    return probe.eval(), take_off


def make_store(encoder, films, budget_gib=2.0):
    return ImageStore(encoder.processor, [row["image"] for row in films.rows], budget_gib)
