"""
LLaVA-Med and LLaVA-Rad as their authors stored them -> LlavaForConditionalGeneration.

Usage:
    python -m shared.models.llava_med LLAVA_MED_FOLDER OUT  # a stored copy; load_vlm needs none
    python -m shared.models.llava_med LLAVA_RAD_FOLDER OUT --base VICUNA_FOLDER

`microsoft/llava-med-v1.5-mistral-7b` has the names of the original LLaVA code: transformers would warn and go on with
random weights. `load_vlm` applies the key map below and refuses anything missing or left over. The converter writes the
same weights under the new names, one shard at a time, so memory holds one shard.

`microsoft/llava-rad` is published in parts: a LoRA adapter on lmsys/vicuna-7b-v1.5, the projector
(non_lora_trainables.bin) and a BiomedCLIP-CXR tower, a timm ViT of the DINOv2 form (518 pixels, patch 14: 37x37
tokens), inside an open_clip training checkpoint. The converter merges them; the grid is read from the tower's own
configuration, and the checkpoint must agree.

A generic LLaVA is never put in the place of either. What the tower sees: LLaVA-Med pads to a square with CLIP's mean
colour (image_aspect_ratio "pad"), LLaVA-Rad takes the central square.
"""

import argparse
import functools
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, CLIPVisionConfig, Dinov2Config, LlamaConfig
from transformers import LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor
from transformers import MistralConfig, PreTrainedTokenizerFast

from shared.models.hub import check_config, explained, load_part, weight_files
from shared.models.tiny import LLAVA_TEMPLATE, NAMES, chat_template, clip_processor, quietly
from shared.runtime import InputError, ScriptParser, load_checkpoint, read_json, script, write_json

PEFT_PREFIX = "base_model.model."
IMAGE_TOKEN = "<image>"  # the original code used the id -200; here it is the first id after the old ones
KEY_MAP = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}
TIMM_PREFIX = r"^(module\.)?visual\.trunk\.|^model\.vision_tower\.vision_tower\.vit\."
TIMM_MAP = {  # timm's VisionTransformer -> Dinov2Model; attn.qkv is cut in three besides
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.o_proj.",
    r"^blocks\.(\d+)\.ls([12])\.gamma$": r"encoder.layer.\1.layer_scale\2.lambda1",
    r"^blocks\.(\d+)\.": r"encoder.layer.\1.",
}
DERIVED = ("rotary_emb.inv_freq", "position_ids")  # computed from the configuration; old checkpoints store them
# CLIP ViT-L/14 at 336 pixels; LLaVA-Med's own config.json only names it.
CLIP_L_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
CLIP_L_336 |= dict(image_size=336, patch_size=14, projection_dim=768)
TIMM_SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}  # width, layers; a head is 64 wide
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
)
VICUNA_TEMPLATE = chat_template(
    """{{ bos_token }}{{ messages[0].content[0].text if messages[0].role == 'system' else "VICUNA" }}
{%- for message in messages if message.role != 'system' -%}
    {%- if message.role == 'assistant' -%}{{ ' ' + SAID + eos_token }}
    {%- else -%}{{ ' USER: ' }}WORDS{{ ' ASSISTANT:' }}{%- endif -%}
{%- endfor -%}""".replace("VICUNA", VICUNA_SYSTEM),
    image="<image>\n",
)


def is_original(config):
    """Is this config.json one of the original LLaVA code?"""
    return "mm_vision_tower" in config or config.get("model_type") in ("llava_mistral", "llava_llama")


# ------------------------------------------------------------------------------------------------------- configuration


def make_config(source, raw):
    """
    The LlavaConfig of an original folder, its vocabulary one longer for the image token. InputError for unknown towers.
    """
    other = raw.get("mm_use_im_start_end") or raw.get("mm_vision_select_feature", "patch") != "patch"
    if raw.get("mm_projector_type") != "mlp2x_gelu" or other:
        raise InputError(
            f"{source} is a LLaVA of another kind (projector {raw.get('mm_projector_type')}): only LLaVA-Med v1.5 and"
            " LLaVA-Rad are supported"
        )
    names = (
        *NAMES.values(),
        *"max_position_embeddings rms_norm_eps hidden_act bos_token_id eos_token_id sliding_window".split(),
        "tie_word_embeddings",
    )
    text = {n: raw[n] for n in names if n in raw}
    text |= dict(vocab_size=raw["vocab_size"] + 1, pad_token_id=raw.get("pad_token_id"))
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)}
    vision = tower_config(source, raw)
    return LlavaConfig(
        text_config=(MistralConfig if "mistral" in raw["model_type"] else LlamaConfig)(**text),
        vision_config=vision,
        image_token_index=raw["vocab_size"],
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def tower_config(source, raw):
    """
    The vision tower's configuration: CLIP's known one, or what a folder or open_clip file beside the weights says.
    """
    name = str(raw.get("mm_vision_tower"))
    if Path(name, "config.json").is_file():
        settings = read_json(Path(name, "config.json"))
        return CLIPVisionConfig(**settings.get("vision_config", settings))
    if name == "openai/clip-vit-large-patch14-336":
        return CLIPVisionConfig(**CLIP_L_336)
    if "clip" in name and "cxr" in name.lower():
        return biomedclip_config(source, raw)
    raise InputError(
        f"{source} needs the vision tower {name}, which is not supported: only CLIP ViT-L/14-336 (LLaVA-Med) and"
        " BiomedCLIP-CXR (LLaVA-Rad) are"
    )


def biomedclip_config(source, raw):
    named = Path(source, Path(str(raw.get("mm_vision_tower_config") or "")).name)
    found = [read_json(p, object) for p in (named, *sorted(Path(source).glob("*.json"))) if p.is_file()]
    vision = next((s["vision_cfg"] for s in found if isinstance(s, dict) and "vision_cfg" in s), None)
    if vision is None:
        raise InputError(
            f"{source}: the grid of the vision tower is unknown, since its open_clip configuration is not there; add"
            " biomedclipcxr_518.json from the model's page"
        )
    name, image = vision.get("timm_model_name", ""), vision.get("image_size")
    patch = vision.get("patch_size") or int((re.search(r"patch(\d+)", name) or [0, 0])[1])
    width, layers = next((size for n, size in TIMM_SIZES.items() if f"_{n}_" in name), (0, 0))
    width, layers = vision.get("width") or width, vision.get("layers") or layers
    if not (patch and image and width and layers) or image % patch:
        raise InputError(
            f"{source}: the grid of the vision tower cannot be read from its configuration"
            f" ({name or 'no timm_model_name'}, {image} pixels, patch {patch or 'unknown'})"
        )
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, mlp_ratio=4)
    return Dinov2Config(**sizes, image_size=image, patch_size=patch, use_mask_token=False)


# ------------------------------------------------------------------------------------------------- tokenizer, processor


def varint(data, at):
    """-> (a whole number of protobuf's variable length, the place behind it)."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """Bytes of a protobuf message -> pairs (number, value): a whole number or bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def read_sentencepiece(path):
    """
    tokenizer.model -> [(piece, score, kind)], without the sentencepiece package: field 1 of the message repeats for
    each piece, with text (1), score (2) and kind (3: 1 normal, 2 unknown, 3 control, 6 byte) inside.
    """
    try:
        pieces = [dict(fields(value)) for number, value in fields(path.read_bytes()) if number == 1]
        return [(p[1].decode(), struct.unpack("<f", p[2])[0] if 2 in p else 0.0, p.get(3, 1)) for p in pieces]
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise InputError(f"{path} is damaged, or is not a SentencePiece model") from error


def load_tokenizer(source, vocab_size):
    """
    The Llama tokenizer of a folder or hub name, with <image> as its last token. Text after a special token starts with
    a space piece (legacy=True), as in the original code, which tokenised the text before and after the image on their
    own.
    """
    if local_file(source, "tokenizer.json"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=Path(source).is_dir())
    else:
        path = local_file(source, "tokenizer.model")
        if path is None:
            raise InputError(f"{source} has no tokenizer: copy tokenizer.model from the model's page into it")
        pieces = read_sentencepiece(path)
        vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        # every way to put a piece together from two others; best score first, which is the order of learning
        halves = ((score, p[:i], p[i:]) for p, score, kind in pieces if kind == 1 for i in range(1, len(p)))
        merges = sorted((h for h in halves if h[1] in vocab and h[2] in vocab), key=lambda h: (-h[0], len(h[1])))
        tokenizer = LlamaTokenizer(vocab=vocab, merges=[(a, b) for _, a, b in merges], legacy=True, add_bos_token=True)
    if len(tokenizer) != vocab_size:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, and the model {vocab_size}; take the tokenizer from"
            " the model's page"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token  # as in the original code; padding is masked
    tokenizer.padding_side = "left"
    return tokenizer


def local_file(source, name):
    """Path of one file of a folder or hub name, or None."""
    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except OSError:  # not there, or offline
        return None


def make_processor(source, raw, config):
    tokenizer, vision = load_tokenizer(source, raw["vocab_size"]), config.vision_config
    pads = raw.get("image_aspect_ratio") == "pad"
    image, more = (LlavaImageProcessor, {"do_pad": True}) if pads else (CLIPImageProcessor, {})
    template = LLAVA_TEMPLATE if "mistral" in raw["model_type"] else VICUNA_TEMPLATE
    return clip_processor(image, vision.image_size, vision.patch_size, tokenizer, template, **more)


# ------------------------------------------------------------------------------------------------------------- loading


def load_original(source, raw, options):
    """
    -> (model, processor) of an original LLaVA-Med, for load_vlm. The weights keep their file; only their names are
    mapped.
    """
    config = make_config(source, raw)
    if Path(source, "adapter_config.json").is_file() or config.vision_config.model_type != "clip_vision_model":
        raise InputError(
            f"{source} is stored in parts: put them together first with `python -m shared.models.llava_med {source} OUT"
            " --base VICUNA_FOLDER`, then give --model OUT"
        )
    processor = make_processor(source, raw, config)
    before = make_config(source, raw)
    before.text_config.vocab_size -= 1
    model = load_part(LlavaForConditionalGeneration, source, config=before, key_mapping=KEY_MAP, **options)
    with quietly():
        model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=False)
    # The image token's row is replaced by image features, and its logit is suppressed.
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data[-1] = 0
    model.generation_config.update(**generation_settings(raw, processor))
    return model, processor


# ---------------------------------------------------------------------------------------------------------- conversion


def new_names(key, tensor):
    """
    One tensor of an original checkpoint -> {new name: tensor}; empty for what is derived or not part of the model.
    """
    if key.endswith(DERIVED) or re.match(r"(module\.)?(visual\.head|text\.|logit_scale)", key):  # open_clip's own
        return {}

    def renamed(key, patterns):
        return functools.reduce(lambda name, pair: re.sub(*pair, name), patterns.items(), key)

    timm, found = re.subn(TIMM_PREFIX, "", key)
    if not found:
        return {renamed(key, KEY_MAP): tensor}
    qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", timm)
    if qkv:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"model.vision_tower.encoder.layer.{qkv[1]}.attention.{n}_proj.{qkv[2]}": part for n, part in parts}
    return {"model.vision_tower." + renamed(timm, TIMM_MAP): tensor}


def shards_of(folder, what="model"):
    if files := weight_files(folder):
        return files
    raise InputError(f"{folder} has no weights of the {what} (model*.safetensors or pytorch_model*.bin)")


def read_shard(path):
    """Iterate over (key, tensor) of one file; nothing in it is ever run."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                yield key, file.get_tensor(key)
        return
    state = load_checkpoint(path, what="weights file")
    yield from state.get("state_dict", state).items()


def read_lora(folder):
    """adapter_config.json and adapter_model -> ({weight name: {"A": (r, in), "B": (out, r)}}, scale): W + scale B A."""
    factors = {}
    with explained(f"{folder} holds no LoRA adapter that can be merged"):
        settings = read_json(folder / "adapter_config.json")
        file = max(folder.glob("adapter_model.*"), default=None)  # safetensors before .bin
        if file is None or settings["peft_type"] != "LORA" or settings.get("bias", "none") != "none":
            raise ValueError("no adapter_model.safetensors, another kind, or one with biases")
        for key, tensor in read_shard(file):
            name = key.removeprefix(PEFT_PREFIX).replace(".default.", ".")
            name, which = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups()
            factors.setdefault(name + ".weight", {})[which] = tensor.float()
        scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
    return factors, scale


def weights_of(path, tower=False, factors=(), scale=1.0):
    """
    (key, tensor) of everything in a file. tower: it is CLIP's own, whose vision tower alone is taken, under the names
    that LLaVA gives it; factors of an adapter are taken out and added.
    """
    for key, tensor in read_shard(path):
        key = "model.vision_tower.vision_tower." + key if tower else key.removeprefix(PEFT_PREFIX)
        if key in factors:
            update = factors.pop(key)
            tensor = (tensor.float() + scale * (update["B"] @ update["A"])).to(tensor.dtype)
        if not tower or ".vision_model." in key:
            yield key, tensor


def write_weights(folder, shards, config, vocab):
    """
    shards: (path, (key, tensor) pairs) -> files and index in `folder`, and the names of weights that are missing.
    InputError for weights that have no place in the model, or another shape.
    """
    with torch.device("meta"), quietly():
        expected = {k: tuple(t.shape) for k, t in AutoModelForImageTextToText.from_config(config).state_dict().items()}
    where, total = {}, 0
    scales = [name for name in expected if "layer_scale" in name]

    def fitting(path, weights):
        """The weights of a file under their new names."""
        for key, tensor in weights:
            for name, value in new_names(key, tensor).items():
                if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") and len(value) == vocab:
                    value = torch.cat([value, torch.zeros_like(value[:1])])  # the image token
                if name not in expected:
                    raise InputError(
                        f"{path}: the weight {key} has no place in the model; this is not the layout of LLaVA-Med v1.5"
                        " or LLaVA-Rad"
                    )
                shape, wanted = tuple(value.shape), expected[name]
                if shape != wanted:
                    raise InputError(f"{path}: {key} has the shape {shape}, and the configuration says {wanted}")
                yield name, value.contiguous()

    def shards_and_scales():
        for path, weights in shards:
            yield path.name, dict(fitting(path, weights))
        if set(expected) - set(where) == set(scales):  # a plain ViT is one with scales of 1
            yield "scales of 1", {name: torch.ones(expected[name]) for name in scales}

    for what, shard in shards_and_scales():
        if shard:
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
            total += sum(t.nbytes for t in shard.values())
            print(f"{what}: {len(shard)} weights", flush=True)
            shard.clear()  # before the next one is read
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return sorted(set(expected) - set(where))


def convert(source, out, base=None, tower=None):
    """
    Write the model of the original folder `source` to the new folder `out`. base: the language model that an adapter in
    `source` belongs to; tower: folder of the CLIP tower, where the checkpoint has none. InputError when anything is
    missing.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise InputError(
            f"there is no model in {source}; fetch it first, for example with `hf download"
            f" microsoft/llava-med-v1.5-mistral-7b --local-dir {source}`"
        )
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty: give a new folder")
    raw = check_config(read_json(source / "config.json", object), source / "config.json")
    if not is_original(raw):
        raise InputError(
            f"{source} is not in the layout of the original LLaVA code (no mm_vision_tower in config.json); load it as"
            " it is"
        )
    with explained(f"{source}: no model can be built after its config.json"):
        config = make_config(source, raw)
    files, factors, scale = [], {}, 1.0
    if (source / "adapter_config.json").is_file():
        if base is None:
            name = read_json(source / "adapter_config.json").get("base_model_name_or_path")
            raise InputError(f"{source} is an adapter on {name}: fetch that as well and give its folder with --base")
        factors, scale = read_lora(source)
        files += shards_of(base, "base model") + sorted(source.glob("non_lora_trainables.*"))
    else:
        files += shards_of(source)
    files += sorted(source.glob("*_checkpoint.pt"))  # LLaVA-Rad's tower
    own = local_file(source, "tokenizer.model") or local_file(source, "tokenizer.json")
    processor = make_processor(source if own else base or source, raw, config)
    shards = [(path, weights_of(path, factors=factors, scale=scale)) for path in files]
    shards += [(path, weights_of(path, tower=True)) for path in (shards_of(tower, "vision tower") if tower else [])]

    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        missing = write_weights(building, shards, config, raw["vocab_size"])
        if missing:
            tower_only = all("vision_tower" in name for name in missing)
            tip = f"; give a folder of {raw['mm_vision_tower']} with --tower" if tower_only else ""
            raise InputError(
                f"{source} is not complete: {len(missing)} weights are missing, the first is {missing[0]}{tip}"
            )
        if factors:
            raise InputError(
                f"{len(factors)} adapter weights do not belong to the base model, the first is for {sorted(factors)[0]}"
            )
        config.dtype, config.architectures = torch.bfloat16, ["LlavaForConditionalGeneration"]
        config.save_pretrained(building)
        processor.save_pretrained(building)
        write_json(building / "generation_config.json", generation_settings(raw, processor))
        if out.exists():
            out.rmdir()
        building.chmod(0o755)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def generation_settings(raw, processor):
    tokenizer = processor.tokenizer
    bos, eos = raw.get("bos_token_id", tokenizer.bos_token_id), raw.get("eos_token_id", tokenizer.eos_token_id)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}


@script
def main(argv=None):
    parser = ScriptParser(
        prog="python -m shared.models.llava_med",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="folder in the layout of the original LLaVA code")
    parser.add_argument("out", metavar="OUT", help="new folder for the converted model")
    # fmt: off
    parser.add_argument("--base", metavar="DIR",
        help="folder of the language model that an adapter in IN belongs to (LLaVA-Rad: lmsys/vicuna-7b-v1.5)")
    # fmt: on
    parser.add_argument("--tower", metavar="DIR", help="folder of the CLIP tower, where IN has none")
    args = parser.parse_args(argv)
    out = convert(args.source, args.out, args.base, args.tower)
    print(f"converted: {out}; use it with --model {out}")


if __name__ == "__main__":
    sys.exit(main())
