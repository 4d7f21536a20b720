"""
Model families, and where a model comes from: a folder, a name on the hub, or a tiny one. Everything is read with its
refusals (InputError, one sentence), and nothing that a model brings along is ever run: `trust_remote_code` is never
used, weights are safetensors or weights_only=True, and attention kernels are not fetched.

    source, config = find_model("tiny:qwen2vl")                      # folder or hub name, and its config.json
    family = family_of(config, source)                               # one of FAMILIES
    encoder = load_part(AutoModel, "tiny:bert", device=device)       # one encoder or decoder: SigLIP, T5, BERT

A new family is one entry in FAMILIES and one tiny model (shared/models/tiny.py).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoProcessor

from shared.models.tiny import is_tiny, quietly, tiny_folder
from shared.runtime import InputError, read_json

QUANTS = ("none", "nf4", "nf4-text", "int8")
LORA_LAYERS = (  # plain names would hit the tower too
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
GATED = ("google/medgemma", "google/gemma")  # starts of names known to be gated; offline the hub cannot tell


@dataclass(frozen=True)
class Family:
    """
    The one entry of a model family: everything in which it differs from the others. Names of modules are those inside
    the ...ForConditionalGeneration class; the language model is model.language_model in all of them.
    """

    name: str  # also the tiny model: tiny:<name>
    model_type: str  # in config.json
    tower: str
    projector: tuple  # one module or several
    image_tokens: tuple  # special tokens that stand for parts of an image and must never be generated
    framed: bool = False  # the processor puts the image tokens between boi and eoi tokens and blank lines
    kinds: str | None = None  # name of the argument that tells image tokens from text
    rope: bool = False  # positions in rows and columns (get_rope_index); images are patch rows with image_grid_thw
    stacked: bool = False  # get_image_features returns one stacked tensor instead of one per image
    cls_token: bool = False  # the tower's first token stands for no place
    float16: bool = True  # False: the residual stream goes beyond 65504


GEMMA_TOKENS = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
QWEN = dict(
    tower="model.visual",
    image_tokens=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    kinds="mm_token_type_ids",
    rope=True,
)
MERGERS = ("model.visual.merger", "model.visual.deepstack_merger_list")
CLIP = ("model.vision_tower", ("model.multi_modal_projector",))
GEMMA3 = Family(
    "gemma3", "gemma3", *CLIP, GEMMA_TOKENS, framed=True, kinds="token_type_ids", stacked=True, float16=False
)
FAMILIES = {
    f.name: f
    for f in (
        GEMMA3,
        Family("qwen2vl", "qwen2_vl", projector=MERGERS[:1], **QWEN),
        Family("qwen25vl", "qwen2_5_vl", projector=MERGERS[:1], **QWEN),
        Family("qwen3vl", "qwen3_vl", projector=MERGERS, **QWEN),
        Family("llava", "llava", *CLIP, ("<image>",), cls_token=True),
    )
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
    folder = folder_of(name)
    if folder:
        if (folder / "config.json").is_file():
            return str(folder), check_config(read_json(folder / "config.json", object), folder / "config.json")
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{folder} holds an adapter, not a model: give the model it was trained on with --model, and this"
                " folder with --adapter"
            )
        raise InputError(f"{folder} holds no model: there is no config.json in it")
    if not is_hub_name(name):
        raise InputError(f"there is no model folder {name[:200]}{try_tiny()}")
    try:
        path = fetch_config(name)
    except Exception as error:  # the hub's library passes on those of whichever HTTP library it uses
        raise InputError(why_absent(name, error) + try_tiny()) from error
    return name, check_config(read_json(path, object), f"config.json of {name}")


def fetch_config(name):
    """
    The config.json of a hub name, downloaded where it is not on this computer yet. One look comes first: where the hub
    cannot be reached, hf_hub_download would go on trying for half a minute.
    """
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    return hf_hub_download(name, "config.json")


def folder_of(name):
    """A name as the user gave it -> Path, or None where that is no folder, or no path at all."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user, a zero byte
        return None


def is_hub_name(name):
    return len(name) < 200 and name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def why_absent(name, error):
    """The sentence for what hf_hub_download raised."""
    page = f"https://huggingface.co/{name}"
    licence = f"accept its licence at {page}, "
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: {licence}then set HF_TOKEN or run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name} is not on the Hugging Face hub, or is private: check the name at {page}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{name} has no config.json, so it is not a model for transformers; see {page}"
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a folder nor a name on the Hugging Face hub"
    # every failure of the network, and LocalEntryNotFoundError offline
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    return (
        f"{name} is not on this computer and {'HF_HUB_OFFLINE is set' if offline else 'the hub cannot be reached'}:"
        f" {licence if name.startswith(GATED) else ''}fetch it elsewhere with `hf download {name} --local-dir FOLDER`"
        " and give --model FOLDER"
    )


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


def check_config(config, where):
    """
    config.json as it was read -> the same. InputError for one that is no object, that names an attention kernel (code
    that transformers would fetch and run), or sizes that would keep a computer busy until it runs out of memory.
    """
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a model's configuration: it holds a {type(config).__name__}, not an object")
    parts = [config]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if "_implementation" in key and value not in (None, "eager", "sdpa"):
                raise InputError(f"{where} asks for {value} ({key}), which is never fetched or run; take that line out")
            low = 0 if "layers" in key or "ngram" in key else 1
            high = 1000 if "layers" in key or key == "depth" else 10**6 if key.endswith("_size") else None
            if high and isinstance(value, (int, float)) and not low <= value <= high:
                raise InputError(f"{where} cannot be right: {key} is {value}")
    return config


def family_of(config, name):
    """config.json -> Family. InputError for text-only models and for families nobody has tried here."""
    model_type, known = config.get("model_type"), ", ".join(FAMILIES)
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    if "vision_config" not in config and "mm_vision_tower" not in config:
        raise InputError(f"{name} is a text-only model ({model_type}): it cannot see images; use one of {known}")
    raise InputError(
        f"{name} is of the family {model_type}, which nobody has tried with these scripts; use one of {known}"
    )


def kept_whole(quant, family):
    """
    Modules that are not quantised, by full name. This list replaces the library's own, so the head has to be in it. The
    projector is small (0.05 GB) and is what a frozen model is adapted with, so it stays trainable.
    """
    family = FAMILIES[family]
    return ["lm_head", *family.projector] + ([family.tower] if quant == "nf4-text" else [])


def stored_quant(config):
    """The quantisation a folder was saved in: nf4, nf4-text or int8, or None."""
    plan = config.get("quantization_config")
    if not plan:
        return None
    method = plan.get("quant_method") if isinstance(plan, dict) else plan
    if method != "bitsandbytes":
        raise InputError(f"weights quantised by {method} are not supported; take the model in 16 bit and --quant nf4")
    if plan.get("load_in_8bit"):
        return "int8"
    skipped = str(plan.get("llm_int8_skip_modules"))
    return "nf4-text" if any(f"'{f.tower}'" in skipped for f in FAMILIES.values()) else "nf4"


# ------------------------------------------------------------------------------------------------------------- reading


def weight_files(source):
    """Files with the weights of a folder or hub name, as far as they are on this computer."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(hf_hub_download(source, "config.json")).parent
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def load_processor(source, name):
    """Image processor, tokenizer and chat template, tried once. InputError where one is missing or cannot be used."""
    end = ": copy preprocessor_config.json (or processor_config.json), tokenizer and chat_template.jinja from its page"
    with explained(f"{name} has no complete processor", end):
        processor = AutoProcessor.from_pretrained(source, local_files_only=Path(source).is_dir())
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError("no image processor")
    with explained(f"{name} has no chat template that can be used", end):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "?"}]}], tokenize=False)
    processor.tokenizer.padding_side = "left"  # generation goes on from the last column
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_part(auto_class, source, name=None, device=None, unused_weights=False, **options):
    """
    auto_class.from_pretrained with the refusals of this file; for a single encoder or decoder give its name as source.
    Missing, unexpected or misshapen weights are refused: transformers only warns, and goes on with random ones.
    unused_weights: the folder may hold more than the class needs, such as SigLIP's text tower beside SiglipVisionModel.
    """
    name = name or source
    source, _ = find_model(source)
    if Path(source, "adapter_config.json").is_file():  # transformers would load that adapter's base instead
        raise InputError(f"{name} holds a model and an adapter: move the adapter to a folder of its own")
    # ignore_mismatched_sizes: they are then listed beside the missing ones, and refused below
    options |= dict(local_files_only=Path(source).is_dir(), ignore_mismatched_sizes=True)
    with quietly(), explained(f"config.json or the weights of {name} are damaged or cut short", "; fetch them again"):
        try:
            model, info = auto_class.from_pretrained(source, output_loading_info=True, **options)
        except OSError as error:
            raise InputError(f"{name} has no weights that can be read ({first_line(error)})") from error
    check_keys(info, name, unused_weights)
    return model.eval() if device is None else model.eval().to(device)


def check_keys(info, name, unused_weights=False):
    """info: what from_pretrained tells about keys. InputError when the weights are not those of the model."""
    for what in ("missing_keys", "mismatched_keys") + (() if unused_weights else ("unexpected_keys",)):
        names = sorted(k if isinstance(k, str) else k[0] for k in info.get(what) or ())  # mismatched: (key, shapes)
        keys = [k for k in names if not k.endswith(("position_ids", "inv_freq"))]  # computed, not learned
        if keys:
            raise InputError(
                f"{name} is not a complete model of its class: {len(keys)} {what.replace('_', ' ')}, the first is"
                f" {keys[0]}; fetch it again, or convert it (shared/models/llava_med.py)"
            )


@contextlib.contextmanager
def explained(sentence, end=""):
    """
    For reading what others wrote: whatever libraries raise inside becomes InputError(sentence (its first line) end).
    They raise many kinds for a file that is not right, and none of these is a bug of the script.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{sentence} ({first_line(error)}){end}") from error


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
