"""
One way to load a vision-language model, real or tiny, whole or quantised, with or without an adapter.

    vlm = load_vlm("google/medgemma-4b-it", quant="nf4", device=device)     # or a folder, or "tiny:gemma3"
    vlm = load_vlm("tiny", family="qwen2vl", device=device)                 # bare tiny: the task's own family
    vlm.model, vlm.processor, vlm.family, vlm.dtype

    add_lora(vlm, rank=8)                                                   # train: adapters on the language model
    vlm.model.save_pretrained("run/adapter")
    vlm = load_vlm("google/medgemma-4b-it", quant="nf4", device=device, adapter="run/adapter")

    encoder = load_part(AutoModel, "tiny:bert", device=device)              # one encoder or decoder: SigLIP, T5, BERT

--quant none     weights in the compute dtype
        nf4      4 bit with double quantisation: language model and vision tower; head, embeddings and projector stay
                 whole
        nf4-text the same with the vision tower in 16 bit
        int8     8 bit (LLM.int8), the same layers as nf4

Nothing falls back in silence: what cannot be had ends in one sentence (InputError), and what was chosen is printed.
`trust_remote_code` is never used. Gated models read HF_TOKEN or the stored login through huggingface_hub; the token is
neither printed nor stored here.
"""

import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it warns at every 8-bit product, and on import about an optional kernel

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from shared.models.tiny import is_tiny, quietly, tiny_folder
from shared.runtime import InputError, is_main_process, read_json

QUANTS = ("none", "nf4", "nf4-text", "int8")


@dataclass(frozen=True)
class Family:
    """
    The one entry of a model family: everything in which it differs from the others. Names of modules are those inside
    the ...ForConditionalGeneration class.
    """

    name: str  # also the tiny model: tiny:<name>
    model_type: str  # in config.json
    tower: str
    projector: str
    image_tokens: tuple  # special tokens that stand for parts of an image and must never be generated
    framed: bool = False  # the processor puts the image tokens between boi and eoi tokens and blank lines
    kinds: str | None = None  # name of the argument that tells image tokens from text
    rope: bool = (
        False  # positions in rows and columns (base.model.get_rope_index); images are patch rows with image_grid_thw
    )
    stacked: bool = False  # get_image_features returns one stacked tensor instead of one per image
    cls_token: bool = False  # the tower's first token stands for no place
    float16: bool = True  # False: the residual stream goes beyond 65504


IMAGE_TOKENS = {
    "gemma": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    "qwen": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
}
FAMILIES = {
    f.name: f
    for f in (
        Family(
            "gemma3",
            "gemma3",
            "model.vision_tower",
            "model.multi_modal_projector",
            IMAGE_TOKENS["gemma"],
            framed=True,
            kinds="token_type_ids",
            stacked=True,
            float16=False,
        ),
        Family(
            "qwen2vl",
            "qwen2_vl",
            "model.visual",
            "model.visual.merger",
            IMAGE_TOKENS["qwen"],
            kinds="mm_token_type_ids",
            rope=True,
        ),
        Family("llava", "llava", "model.vision_tower", "model.multi_modal_projector", ("<image>",), cls_token=True),
    )
}
GATED = {"google/medgemma", "google/gemma"}  # starts of names known to be gated; offline the hub cannot tell


@dataclass
class VLM:
    """A loaded model with everything that belongs to it."""

    model: nn.Module
    processor: object
    family: str  # gemma3, qwen2vl or llava
    name: str  # as the user gave it
    quant: str
    device: torch.device
    dtype: torch.dtype  # of the computation
    tiny: bool
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
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def facts(self):
        """What metrics files say about the model."""
        return {
            "model": self.name,
            "family": self.family,
            "tiny": self.tiny,
            "quant": self.quant,
            "dtype": str(self.dtype).removeprefix("torch."),
            "adapter": self.adapter,
            "parameters": count_parameters(self.base),
        }


# ------------------------------------------------------------------------------------------------------------- finding


def find_model(name, family=None):
    """
    --model NAME -> (folder or hub name, contents of its config.json). Bare "tiny" is the tiny model of `family`.
    InputError with one sentence when it is not there, gated, or cannot be downloaded.
    """
    name = str(name)
    if is_tiny(name):
        name = str(tiny_folder(f"tiny:{family}" if name == "tiny" and family else name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise InputError(
                    f"{folder} holds an adapter, not a model: give the model it was trained on with --model, and this"
                    " folder with --adapter"
                )
            raise InputError(f"{folder} holds no model: there is no config.json in it")
        return str(folder), read_json(folder / "config.json")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or folder.exists():
        raise InputError(f"there is no model folder {name}{try_tiny()}")
    page = f"https://huggingface.co/{name}"
    try:
        return name, read_json(hf_hub_download(name, "config.json"))
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated: accept its licence at {page}, then set HF_TOKEN or run `hf auth login`{try_tiny()}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is not on the Hugging Face hub, or is private: check the name at {page}{try_tiny()}"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise InputError(
            f"{name} has no config.json, so it is not a model for transformers; see {page}{try_tiny()}"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{name!r} is neither a folder nor a name on the Hugging Face hub{try_tiny()}") from error
    except OSError as error:  # every failure of the network, and LocalEntryNotFoundError offline
        gated = f"accept its licence at {page}, " if name.startswith(tuple(GATED)) else ""
        why = (
            "HF_HUB_OFFLINE is set"
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            else "the hub cannot be reached"
        )
        raise InputError(
            f"{name} is not on this computer and {why}: {gated}fetch it elsewhere with `hf download {name} --local-dir"
            f" FOLDER` and give --model FOLDER{try_tiny()}"
        ) from error


def try_tiny():
    """The end of a refusal: the same command with --model tiny."""
    words, skip = [], False
    for word in sys.argv:
        if skip or word in ("--model", "--base-model", "--base_model"):
            skip = not skip
        elif not word.startswith(("--model=", "--base-model=", "--base_model=")):
            words.append(word)
    if not words or not words[0].endswith(".py"):
        return "; --model tiny works without it"
    return f"; to try the same without it: python {shlex.join(words)} --model tiny"


def family_of(config, name):
    """config.json -> Family. InputError for text-only models and for families nobody has tried here."""
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    if "vision_config" not in config and "mm_vision_tower" not in config:
        raise InputError(
            f"{name} is a text-only model ({model_type}): it cannot see images; use one of the families"
            f" {', '.join(FAMILIES)}"
        )
    raise InputError(
        f"{name} is of the family {model_type}, which these scripts have not been tried with; there are"
        f" {', '.join(FAMILIES)}"
    )


def load_processor(source, name):
    try:
        processor = AutoProcessor.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError, KeyError, TypeError) as error:  # whichever file is missed first
        raise InputError(
            f"{name} has no complete processor ({first_line(error)}): copy preprocessor_config.json, tokenizer and chat"
            " template from the model's page into it"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(
            f"{name} has no image processor: copy preprocessor_config.json (or processor_config.json) from the model's"
            " page into it"
        )
    if not processor.chat_template:
        raise InputError(
            f"{name} has no chat template: copy chat_template.jinja (or chat_template.json) from the model's page"
            " into it"
        )
    processor.tokenizer.padding_side = "left"  # generation goes on from the last column
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ------------------------------------------------------------------------------------------------------ dtype and quant


def choose_dtype(family, device, parameters, asked="auto"):
    """
    -> (torch.dtype to compute in, reason). parameters: how many the model has. InputError for a combination known to
    fail.

    float16 ends at 65504, and the residual stream of Gemma 3 goes beyond it: NaN, or text like "!!!!". A T4 has no
    bfloat16.
    """
    device = torch.device(device)
    bf16_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if asked != "auto":
        dtype = getattr(torch, asked) if isinstance(asked, str) else asked
        if dtype == torch.float16 and family == "gemma3":
            raise InputError("Gemma 3 overflows in float16: use --dtype bfloat16, or float32 on a T4")
        if dtype == torch.bfloat16 and device.type == "cuda" and not bf16_gpu:
            raise InputError(
                f"{torch.cuda.get_device_name(device)} does not compute bfloat16: use --dtype"
                f" {'float32' if family == 'gemma3' else 'float16'}"
            )
        return dtype, "asked for"
    if device.type == "cuda":
        if bf16_gpu:
            return torch.bfloat16, "this GPU computes bfloat16"
        if family == "gemma3":
            return torch.float32, "this GPU has no bfloat16, and Gemma 3 overflows in float16"
        return torch.float16, "this GPU has no bfloat16"
    if parameters < 500e6:
        return torch.float32, "exact, and small models lose nothing by it"
    return torch.bfloat16, "half the memory of float32"


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
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def kept_whole(quant, family):
    """
    Modules that are not quantised, by full name. This list replaces the library's own, so the head has to be in it. The
    projector is small (0.05 GB) and is what a frozen model is adapted with, so it stays trainable.
    """
    family = FAMILIES[family]
    return ["lm_head", family.projector] + ([family.tower] if quant == "nf4-text" else [])


def guard_cpu(model):
    """
    Keep 4-bit layers on the plain CPU path; nothing changes on a GPU.

    On processors with avx512_bf16, bitsandbytes repacks the weights at the first forward pass in evaluation. It then
    refuses widths that are no multiple of 64 (SigLIP's 4304), fails in the next training step, and saves damaged
    weights.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def probe_quantised(model, name, quant):
    """
    Send one row through a quantised layer of each shape: a layer that cannot hold 4 bit shows here, not an hour later.
    """
    import bitsandbytes as bnb

    seen = set()
    for layer, module in model.named_modules():
        shape = (type(module), getattr(module, "in_features", 0), getattr(module, "out_features", 0))
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) or shape in seen:
            continue
        seen.add(shape)
        try:
            with torch.inference_mode():
                module(
                    torch.zeros(
                        1,
                        module.in_features,
                        dtype=torch.float16 if quant == "int8" else module.compute_dtype,
                        device=module.weight.device,
                    )
                )
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(
                f"{name}: the layer {layer} ({module.in_features} -> {module.out_features}) cannot be held in --quant"
                f" {quant} here ({first_line(error)}); use --quant nf4-text or none"
            ) from error
    if not seen:
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
    from shared.models import llava_med, memory  # both import this module

    device = torch.device(device)
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
    say(
        f"model: {name} ({found.name}, {layout.parameters / 1e6:,.1f} M parameters), weights {stored or quant},"
        f" computing in {str(dtype).removeprefix('torch.')} ({why})"
    )
    memory.warn_if_too_large(name, layout, stored or quant, device, dtype)

    options = dict(dtype=dtype, attn_implementation=attention)
    if plan is not None:  # given as None it would hide the plan that a folder stores
        options["quantization_config"] = plan
    if device.type == "cuda" or plan or stored:
        options["device_map"] = {"": device}  # straight to the card, never a whole copy in memory
    if original:
        model, processor = llava_med.load_original(source, config, options)
    else:
        processor = load_processor(source, name)
        model = load_part(AutoModelForImageTextToText, source, name=name, **options)
    quant = stored or quant
    if quant != "none":
        guard_cpu(model)
        probe_quantised(model, name, quant)
    else:
        model.to(device)
    vlm = VLM(model.eval(), processor, found.name, str(name), quant, device, dtype, is_tiny(name))
    suppress_image_tokens(vlm)
    if adapter is not None:
        load_adapter(vlm, adapter, trainable_adapter)
        if any((Path(adapter) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            vlm.processor = load_processor(adapter, adapter)
    return vlm


def load_part(auto_class, source, name=None, device=None, unused_weights=False, **options):
    """
    auto_class.from_pretrained with the refusals of this file; for a single encoder or decoder give its name as source.
    Missing, unexpected or misshapen weights are refused: transformers only warns, and goes on with random ones.
    unused_weights: the folder may hold more than the class needs, such as SigLIP's text tower beside SiglipVisionModel.
    """
    name = name or source
    if not Path(source).is_dir():
        source, _ = find_model(source)
    try:
        with quietly():
            # ignore_mismatched_sizes: they are then listed beside the missing ones, and refused below
            where = dict(local_files_only=Path(source).is_dir(), ignore_mismatched_sizes=True)
            model, info = auto_class.from_pretrained(source, output_loading_info=True, **where, **options)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"the weights of {name} are damaged or cut short ({first_line(error)}); fetch them again"
        ) from error
    except OSError as error:
        raise InputError(f"{name} has no weights that can be read ({first_line(error)})") from error
    check_keys(info, name, unused_weights)
    return model.eval() if device is None else model.eval().to(device)


def check_keys(info, name, unused_weights=False):
    for what in ("missing_keys", "mismatched_keys") + (() if unused_weights else ("unexpected_keys",)):
        keys = sorted(
            k if isinstance(k, str) else k[0] for k in info.get(what) or ()
        )  # mismatched: (key, shape, shape)
        keys = [k for k in keys if not k.endswith(("position_ids", "inv_freq"))]  # computed, not learned
        if keys:
            raise InputError(
                f"{name} is not a complete model of its class: {len(keys)} {what.replace('_', ' ')}, the first is"
                f" {keys[0]}; fetch it again, or convert it (shared/models/llava_med.py)"
            )


def stored_quant(config):
    """The quantisation a folder was saved in: nf4, nf4-text or int8, or None."""
    plan = config.get("quantization_config")
    if not plan:
        return None
    if plan.get("quant_method") != "bitsandbytes":
        raise InputError(
            f"weights quantised by {plan.get('quant_method')} are not supported; take the model in 16 bit and"
            " --quant nf4"
        )
    if plan.get("load_in_8bit"):
        return "int8"
    towers = {f.tower for f in FAMILIES.values()}
    return "nf4-text" if towers & set(plan.get("llm_int8_skip_modules") or ()) else "nf4"


def suppress_image_tokens(vlm):
    """A sampled image placeholder would make every later forward pass of the text fail: there is no image for it."""
    tokenizer = vlm.tokenizer
    known = tokenizer.get_vocab()
    ids = {known[t] for t in FAMILIES[vlm.family].image_tokens if t in known} | {vlm.image_token_id}
    vlm.model.generation_config.suppress_tokens = sorted(ids | set(vlm.model.generation_config.suppress_tokens or ()))


def say(text):
    if is_main_process():
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ adapters

LORA_LAYERS = (  # plain names would hit the tower too
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)


def add_lora(vlm, rank=8, alpha=None, dropout=0.05, layers=LORA_LAYERS, checkpointing=None):
    """
    Freeze the model and add LoRA to the layers that match the regular expression; alpha: 2 x rank unless given;
    checkpointing: recompute activations in the backward pass (default: for real models). -> vlm, with trainable
    adapters.

    peft's prepare_model_for_kbit_training is left out on purpose: it turns norms, embeddings and head into float32,
    which costs 2.7 GB more in MedGemma-4B and makes a model with the adapter loaded differ from the one that was
    trained. The adapters themselves are float32.
    """
    vlm.model.requires_grad_(False)
    if checkpointing if checkpointing is not None else not vlm.tiny:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=layers,
        task_type="CAUSAL_LM",
    )
    vlm.model = get_peft_model(vlm.model, settings)
    vlm.adapter = "new"
    return vlm


def load_adapter(vlm, adapter, trainable=False):
    """Put a trained LoRA adapter on the model. InputError when it is not one, or was trained on another model."""
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"{adapter} holds no adapter: there is no adapter_config.json in it")
    if not Path(adapter).is_dir() and (str(adapter).count("/") != 1 or Path(adapter).exists()):
        raise InputError(f"there is no adapter folder {adapter}; train one first, or check --adapter")
    try:
        vlm.model = PeftModel.from_pretrained(vlm.model, str(adapter), is_trainable=trainable)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise InputError(
            f"the adapter {adapter} does not fit {vlm.name} ({first_line(error)}): give --model the one it was"
            " trained on"
        ) from error
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
