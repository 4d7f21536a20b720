"""
One way to load a vision-language model, real or tiny, whole or quantised, with or without an adapter.

    vlm = load_vlm("google/medgemma-4b-it", quant="nf4", device=device)     # or a folder, or "tiny:gemma3"
    vlm = load_vlm("tiny", family="qwen2vl", device=device)                 # bare tiny: the task's own family
    vlm.model, vlm.processor, vlm.spec, vlm.dtype

    add_lora(vlm, rank=8)                                                   # train: adapters on the language model
    unfreeze(vlm, "projector")                                              # or "tower", "language"
    save_vlm(vlm, "run/adapter")
    vlm = load_vlm("google/medgemma-4b-it", quant="nf4", device=device, adapter="run/adapter")

    encoder = load_part(SiglipVisionModel, "google/siglip-base-patch16-224", device=device, unused_weights=True)
    encoder = add_lora(encoder, rank=4, layers=r".*(q_proj|v_proj)")        # any module

--quant none     weights in the compute dtype
        nf4      4 bit with double quantisation: language model and vision tower; head, embeddings and projector stay
                 whole
        nf4-text the same with the vision tower in 16 bit
        int8     8 bit (LLM.int8), the same layers as nf4

Nothing falls back in silence: what cannot be had ends in one sentence (InputError), and what was chosen is printed.
Gated models read HF_TOKEN or the stored login through huggingface_hub; the token is neither printed nor stored here.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every 8-bit product, and on import

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from shared.models import llava_med, memory
from shared.models.hub import FAMILIES, LORA_LAYERS, QUANTS, explained, family_of, find_model, first_line, folder_of
from shared.models.hub import is_hub_name, kept_whole, load_part, load_processor, stored_quant, weight_files
from shared.models.tiny import is_tiny, quietly
from shared.runtime import InputError, is_main_process, read_json, write_json

DTYPES = ("float32", "bfloat16", "float16")
BASE_FILE = "base.json"  # beside an adapter: name and digest of the model it was trained on


@dataclass
class VLM:
    """A loaded model with everything that belongs to it."""

    model: nn.Module
    processor: object
    family: str  # a name of FAMILIES
    name: str  # as the user gave it
    quant: str
    device: torch.device
    dtype: torch.dtype  # of the computation
    tiny: bool
    source: str = ""  # folder or hub name of the weights
    adapter: str | None = None

    @property
    def spec(self):
        """The Family: what differs between the model families."""
        return FAMILIES[self.family]

    @property
    def config(self):
        return self.model.config

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def image_token_id(self):
        return self.model.config.image_token_id

    @property
    def base(self):
        """The ...ForConditionalGeneration module itself, below peft's wrapper where there is one."""
        return self.model if self.adapter is None else self.model.get_base_model()

    def facts(self):
        """What metrics files say about the model."""
        dtype, parameters = str(self.dtype).removeprefix("torch."), count_parameters(self.base)
        facts = {"model": self.name, "family": self.family, "tiny": self.tiny, "quant": self.quant, "dtype": dtype}
        return facts | {"adapter": self.adapter, "parameters": parameters}


# ------------------------------------------------------------------------------------------------------ dtype and quant


def choose_dtype(family, device, parameters, asked="auto"):
    """
    -> (torch.dtype to compute in, reason). parameters: how many the model has; asked: "auto", the name of a dtype or
    one of torch. InputError for a combination known to fail.

    float16 ends at 65504, and the residual stream of Gemma 3 goes beyond it: NaN, or text like "!!!!". A T4 has no
    bfloat16. On CPUs float16 is so slow that a script seems to hang.
    """
    device, overflows = torch.device(device), not FAMILIES[family].float16
    bf16_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    asked = str(asked).removeprefix("torch.")
    if asked != "auto":
        if asked not in DTYPES:
            raise InputError(f"there is no --dtype {asked}; there are auto, {', '.join(DTYPES)}")
        if asked == "float16" and overflows:
            raise InputError("Gemma 3 overflows in float16: use --dtype bfloat16, or float32 on a T4")
        if asked == "float16" and device.type == "cpu":
            raise InputError("--dtype float16 is for GPUs, and hopelessly slow on a CPU: use float32 or bfloat16")
        if asked == "bfloat16" and device.type == "cuda" and not bf16_gpu:
            name, instead = torch.cuda.get_device_name(device), "float32" if overflows else "float16"
            raise InputError(f"{name} does not compute bfloat16: use --dtype {instead}")
        return getattr(torch, asked), "asked for"
    if device.type == "cuda":
        if bf16_gpu:
            return torch.bfloat16, "this GPU computes bfloat16"
        if overflows:
            return torch.float32, "this GPU has no bfloat16, and Gemma 3 overflows in float16"
        return torch.float16, "this GPU has no bfloat16"
    if parameters < 500e6:
        return torch.float32, "exact, and small models lose nothing by it"
    return torch.bfloat16, "half the memory of float32"


def check_device(device):
    """A torch.device or its name -> torch.device. InputError when there is none of that name."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, index = str(device).partition(":")
    if kind not in counts or not (index or "0").isdecimal():
        raise InputError(f"there is no device {device}: use {', '.join(counts)}")
    if int(index or 0) >= counts[kind]:
        raise InputError(f"torch sees {counts[kind] or 'no'} {kind} device(s), so there is no {device}; use cpu")
    return torch.device(device)


def quantisation(quant, family, dtype, device):
    """--quant -> BitsAndBytesConfig, or None. InputError where bitsandbytes cannot work."""
    if quant == "none":
        return None
    if quant not in QUANTS:
        raise InputError(f"there is no --quant {quant}; there are {', '.join(QUANTS)}")
    if torch.device(device).type == "mps":
        raise InputError(f"--quant {quant} needs a CUDA GPU or the CPU: bitsandbytes does not run on Apple GPUs")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(f"--quant {quant} needs bitsandbytes: pip install bitsandbytes") from error
    skip = kept_whole(quant, family)
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    four = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": dtype}
    four = {"bnb_4bit_" + name: value for name, value in four.items()}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **four)


def settle_quantised(model, name, quant):
    """
    Keep 4-bit layers on the plain CPU path (nothing changes on a GPU), and send one row through a quantised layer of
    each shape: a layer that cannot hold 4 bit shows here, not an hour later.

    On processors with avx512_bf16, bitsandbytes repacks the weights at the first forward pass in evaluation. It then
    refuses widths that are no multiple of 64 (SigLIP's 4304), fails in the next training step, and saves damaged
    weights.
    """
    import bitsandbytes as bnb

    layers = {}
    for layer, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            module.support_avx512bf16_for_cpu = False
            layers.setdefault((module.in_features, module.out_features), (layer, module))
    for (n_in, n_out), (layer, module) in layers.items():
        dtype = torch.float16 if quant == "int8" else module.compute_dtype
        try:
            with torch.inference_mode():
                module(torch.zeros(1, n_in, dtype=dtype, device=module.weight.device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(
                f"{name}: the layer {layer} ({n_in} -> {n_out}) cannot be held in --quant {quant} here"
                f" ({first_line(error)}); use --quant nf4-text or none"
            ) from error
    if not layers:
        raise InputError(f"{name}: --quant {quant} found no layer to quantise")


# ------------------------------------------------------------------------------------------------------------- loading


def load_vlm(
    name, quant="none", device="cpu", dtype="auto", adapter=None, family=None, attention="sdpa", trainable_adapter=False
):
    """
    Load a vision-language model -> VLM, in evaluation mode, nothing frozen.

    name: hub name, folder, "tiny:<family>" or "tiny" (then `family` says which); quant: see QUANTS; device:
    torch.device or its name; dtype: "auto", or the name of one to compute in; adapter: folder or hub name of a LoRA
    adapter, whose own processor is taken where its folder holds one: it has the image size of the training; attention:
    "sdpa" or "eager". InputError for everything a user can mend.
    """
    device = check_device(device)
    if attention not in ("sdpa", "eager"):
        raise InputError(f"there is no attention {attention!r} here; there are sdpa and eager")
    source, config = find_model(name, family)
    original = llava_med.is_original(config)
    found = FAMILIES["llava"] if original else family_of(config, name)
    stored = stored_quant(config)
    if stored and quant not in ("none", stored):
        raise InputError(
            f"{name} is stored in {stored} and cannot become {quant}: give --quant {stored}, or the original model"
        )
    layout = memory.read_layout(source, config)
    dtype, why = choose_dtype(found.name, device, layout.parameters, dtype)
    plan = quantisation(quant, found.name, dtype, device) if not stored else None
    quant = stored or quant
    kept = "as they are" if quant == "none" else quant
    say(
        f"model: {name} ({found.name}, {layout.parameters / 1e6:,.1f} M parameters), weights {kept}, computing in"
        f" {str(dtype).removeprefix('torch.')} ({why})"
    )
    say(memory.too_large(name, layout, quant, device, dtype))

    options = dict(dtype=dtype, attn_implementation=attention)
    if plan is not None:  # given as None it would hide the plan that a folder stores
        options["quantization_config"] = plan
    if device.type == "cuda" or quant != "none":
        options["device_map"] = {"": device}  # straight to the card, never a whole copy in memory
    if original:
        model, processor = llava_med.load_original(source, config, options)
    else:
        size = sum(file.stat().st_size for file in weight_files(source))
        if 0 < 2.5 * size < layout.parameters:  # 4 bit needs 0.53 bytes each; all others would be filled at random
            described = f"config.json describes {layout.parameters:,} parameters, and its weights are {size:,} bytes"
            raise InputError(f"{name} cannot be right: {described}")
        processor = load_processor(source, name)
        model = load_part(AutoModelForImageTextToText, source, name=name, **options)
    if quant != "none":
        settle_quantised(model, name, quant)
    else:
        model.to(device)
    vlm = VLM(model.eval(), processor, found.name, str(name), quant, device, dtype, is_tiny(name), source)
    check_tokens(vlm)
    if adapter is not None:
        load_adapter(vlm, adapter, trainable_adapter)
        folder = folder_of(adapter) or Path(adapter)
        if any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
            vlm.processor = load_processor(folder, adapter)
    return vlm


def check_tokens(vlm):
    """
    What ends a text has to be known. Image placeholders are never drawn: one would make every later forward pass of
    the text fail, since there is no image for it.
    """
    known, settings = vlm.tokenizer.get_vocab(), vlm.model.generation_config
    if known.get(vlm.spec.image_tokens[0]) != vlm.image_token_id:
        raise InputError(f"{vlm.name}: tokenizer and config.json have different image tokens; take both from one page")
    if settings.eos_token_id is None:
        settings.eos_token_id = vlm.tokenizer.eos_token_id
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if not stops or not all(isinstance(i, int) and 0 <= i < len(known) for i in stops):
        raise InputError(f"{vlm.name} has no token that ends a text: eos_token_id in generation_config.json is {stops}")
    ids = {known[t] for t in vlm.spec.image_tokens if t in known}
    settings.suppress_tokens = sorted(ids | set(settings.suppress_tokens or ()))


def say(text):
    if text and is_main_process():
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ training


def add_lora(target, rank=8, alpha=None, dropout=0.05, layers=None, checkpointing=None):
    """
    Freeze a VLM or any module and add LoRA -> the VLM, or the module wrapped by peft, with trainable adapters.

    layers: regular expression of whole layer names; default: LORA_LAYERS of a VLM, all linear layers of a module but
    its head; alpha: 2 x rank unless given; checkpointing: recompute activations in the backward pass (default: for
    real VLMs). InputError when no layer has such a name.

    peft's prepare_model_for_kbit_training is left out on purpose: it turns norms, embeddings and head into float32,
    which costs 2.7 GB more in MedGemma-4B and makes a model with the adapter loaded differ from the one that was
    trained. The adapters themselves are float32.
    """
    import peft  # takes seconds, and only what has an adapter needs it

    is_vlm = isinstance(target, VLM)
    model = target.model if is_vlm else target
    layers = layers or (LORA_LAYERS if is_vlm else "all-linear")
    model.requires_grad_(False)
    if checkpointing if checkpointing is not None else is_vlm and not target.tiny:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alpha = 2 * rank if alpha is None else alpha
    task = "CAUSAL_LM" if is_vlm else None
    with explained(f"LoRA cannot be put on {layers}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5 for a property by its old name
        settings = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers, task_type=task
        )
        model = peft.get_peft_model(model, settings)
    if not is_vlm:
        return model
    target.model, target.adapter = model, "new"
    return target


def unfreeze(vlm, part):
    """
    Make one part of the model trainable -> its parameters. part: "tower" (without the projector), "projector", or
    "language" (with the head). InputError where there is no such part, or where it is held in 4 or 8 bit.
    """
    projector, tower = vlm.spec.projector, (vlm.spec.tower,)
    names, but = {
        "tower": (tower, projector),
        "projector": (projector, ()),
        "language": (("model.language_model", "lm_head"), ()),
    }.get(part, ((), ()))

    def inside(name, modules):
        return any(name.startswith(module + ".") for module in modules)

    found = [p for name, p in vlm.base.named_parameters() if inside(name, names) and not inside(name, but)]
    if not found:
        raise InputError(f"{vlm.name} has no part {part!r} that could be trained; there are tower, projector, language")
    if not all(p.is_floating_point() for p in found):
        raise InputError(f"--quant {vlm.quant} holds the {part} in whole numbers, which cannot be trained; use none")
    for p in found:
        p.requires_grad_(True)
    return found


# ------------------------------------------------------------------------------------------------------------ adapters


def digest_of(source):
    """
    Digest of the weights of a folder or hub name: all bytes up to 64 MiB a file, of larger ones 1,024 blocks of 4 KiB
    spread evenly (another training changes nearly every number). The same whatever --dtype and --quant make of them.
    """
    sha256 = hashlib.sha256()
    for path in weight_files(source):
        size = path.stat().st_size
        sha256.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= 2**26:
                sha256.update(file.read())
            for k in range(1024 if size > 2**26 else 0):
                file.seek((size - 4096) * k // 1023)
                sha256.update(file.read(4096))
    return sha256.hexdigest()


def save_vlm(vlm, folder):
    """
    Write a model and its processor to a folder that load_vlm reads: of a model with an adapter only the adapter, with
    the digest of the model below it.
    """
    with quietly():
        if vlm.adapter is not None:
            if any(p.requires_grad and "lora_" not in name for name, p in vlm.base.named_parameters()):
                raise ValueError("an adapter holds LoRA alone: the other trained parameters would be lost")
            vlm.model.save_pretrained(folder, selected_adapters=["default"])
            write_json(Path(folder) / BASE_FILE, {"model": vlm.name, "sha256": digest_of(vlm.source)})
        else:
            vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)


def load_adapter(vlm, adapter, trainable=False):
    """
    Put a trained LoRA adapter on the model. InputError when it is not one, when its keys are not those of this model,
    when it holds numbers that are not finite, or when it was trained on other weights.
    """
    import peft

    folder, instead = folder_of(adapter), "give --model the one it was trained on"
    if folder is None and not is_hub_name(str(adapter)):
        raise InputError(f"there is no adapter folder {str(adapter)[:200]}; train one first, or check --adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors") if folder else ():
        if not (folder / file).is_file() and not (folder / file).with_suffix(".bin").is_file():
            raise InputError(f"{adapter} holds no adapter: there is no {file} in it")
    if folder and (folder / BASE_FILE).is_file():
        told = read_json(folder / BASE_FILE)
        if not isinstance(told, dict) or told.get("sha256") != digest_of(vlm.source):
            known = told.get("model") if isinstance(told, dict) else None
            raise InputError(
                f"the adapter {adapter} was trained on other weights than those of {vlm.name}: {instead} ({known});"
                f" if these are the same, stored in another way, remove {folder / BASE_FILE}"
            )
    with explained(f"the adapter {adapter} does not fit {vlm.name}", f": {instead}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keys, which are refused below
        stored = peft.load_peft_weights(str(folder or adapter), device="cpu")
        vlm.model = peft.PeftModel.from_pretrained(vlm.model, str(folder or adapter), is_trainable=trainable)
    expected = set(peft.get_peft_model_state_dict(vlm.model, save_embedding_layers=False))
    for what, keys in (("missing", expected - set(stored)), ("unexpected", set(stored) - expected)):
        if keys:
            raise InputError(
                f"the adapter {adapter} does not fit {vlm.name}: {len(keys)} {what} keys, the first is"
                f" {min(keys)}; {instead}"
            )
    broken = next((key for key, value in stored.items() if not value.isfinite().all()), None)
    if broken:
        raise InputError(f"the adapter {adapter} holds numbers that are not finite ({broken}); train it again")
    vlm.model.eval()
    vlm.adapter = str(adapter)


def count_parameters(model, trainable=False):
    """Parameters of a model, shared ones once; 4-bit weights are counted as the numbers they stand for."""
    total = 0
    for p in model.parameters():  # a parameter that two modules share comes once
        if not trainable or p.requires_grad:
            state = getattr(p, "quant_state", None)
            total += state.shape.numel() if state is not None else p.numel()
    return total
