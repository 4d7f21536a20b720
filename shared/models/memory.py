"""
How much memory a model will need, from its configuration alone; nothing is downloaded or allocated.

Usage:
    python -m shared.models.memory --model google/medgemma-4b-it --quant nf4
    python -m shared.models.memory --model Qwen/Qwen2-VL-2B-Instruct --train lora --batch-size 2 --image-size 448
    python -m shared.models.memory --model Qwen/Qwen2-VL-2B-Instruct --train grpo --num-generations 4 --no-checkpointing

The model is built on torch's meta device (shapes without numbers), so parameters are counted exactly and weights follow
to the byte. Cache, adapters and optimiser state are exact too, given the batch. Activations are an estimate: the peak
of the vision tower, of the prompt pass and of the output; for training what autograd saves, fitted to tiny models on a
CPU (compared again in tests/test_shared_models_memory.py). They have not been compared with a GPU. `other` is the CUDA
context and 5 % for fragmentation.

Training counts prompt and answer (--new-tokens) alike. --train grpo takes the largest of its passes: sampling, with its
cache; the update, where the answers to a question share one pass over its prompt (not with checkpointing); and V, the
counterfactual term, where each answer stands behind an edited image of its own, so that nothing is shared
(vqa_sft_grpo/looking.py). It has two adapters, the second one frozen, and V keeps a copy of the gradients.

Known without a network: those of KNOWN. Other names need their config.json: a folder, or the hub.
"""

import argparse
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, Gemma3Config, LlavaConfig
from transformers import MistralConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from shared.models import llava_med
from shared.models.hub import FAMILIES, LORA_LAYERS, QUANTS, explained, family_of, find_model, kept_whole
from shared.models.passes import CHUNK_NUMBERS
from shared.models.tiny import NAMES, quietly
from shared.runtime import ScriptParser, positive_int, script

GIB = 2**30


def sizes(hidden, layers, heads, mlp=None, kv_heads=None, **more):
    """Settings of a transformer under their usual names."""
    found = dict(hidden=hidden, layers=layers, heads=heads, mlp=mlp, kv_heads=kv_heads)
    return {NAMES[name]: value for name, value in found.items() if value is not None} | more


def gemma3_4b():
    text = sizes(2560, 34, 8, 10240, 4, head_dim=256, vocab_size=262208, sliding_window=1024)
    vision = sizes(1152, 27, 16, 4304, image_size=896, patch_size=14, vision_use_head=False)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


def qwen(config_class, section, hidden, layers, heads, mlp, kv_heads, vision, **more):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    text = sizes(hidden, layers, heads, mlp, kv_heads, vocab_size=151936, rope_parameters=rope, **more)
    text["tie_word_embeddings"] = True
    return config_class(text_config=text, vision_config=vision | {"num_heads": 16}, tie_word_embeddings=True)


def qwen2vl_2b():
    vision = dict(depth=32, embed_dim=1280, hidden_size=1536, mlp_ratio=4, patch_size=14)
    return qwen(Qwen2VLConfig, [16, 24, 24], 1536, 28, 12, 8960, 2, vision)


def qwen25vl_3b():
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=2048)
    return qwen(Qwen2_5_VLConfig, [16, 24, 24], 2048, 36, 16, 11008, 2, vision)


def qwen3vl_2b():
    vision = dict(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2048)
    vision["deepstack_visual_indexes"] = [5, 11, 17]
    return qwen(Qwen3VLConfig, [24, 20, 20], 2048, 28, 16, 6144, 8, vision, head_dim=128)


def llava_med_7b():
    text = MistralConfig(**sizes(4096, 32, 32, 14336, 8, vocab_size=32001, sliding_window=None))
    vision = CLIPVisionConfig(**llava_med.CLIP_L_336)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000, tie_word_embeddings=False)


KNOWN = {
    "google/medgemma-4b-it": gemma3_4b,
    "google/medgemma-1.5-4b-it": gemma3_4b,
    "google/gemma-3-4b-it": gemma3_4b,
    "Qwen/Qwen2-VL-2B-Instruct": qwen2vl_2b,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen25vl_3b,
    "Qwen/Qwen3-VL-2B-Instruct": qwen3vl_2b,
    "microsoft/llava-med-v1.5-mistral-7b": llava_med_7b,
}
# Memory that torch can give out, in GiB: less than the number on the box.
CARDS = {"T4 (16 GB)": 14.6, "L4 (24 GB)": 22.0, "RTX 3090/4090 (24 GB)": 23.5}


# Family -> bytes per number -> bytes saved per token and layer, for each number of (hidden + queries, MLP, keys and
# values) of a layer; fitted to what autograd saved in 42 tiny models. Gemma has four norms a layer and two in
# attention, computed in float32; below float32 the adapters, which are float32, keep a copy of each input besides.
SAVED = {"": {4: (12.1, 16.1, 4.0), 2: (18.1, 10.1, 2.0)}, "gemma3": {4: (18.8, 16.8, 6.7), 2: (24.5, 10.5, 4.4)}}


@dataclass
class Layout:
    """
    What a configuration says about memory. linears: (name, in, out) of every linear layer but a tied head; other:
    parameters elsewhere.
    """

    family: str
    parameters: int
    linears: list = field(repr=False)
    other: int
    config: object = field(repr=False)


def read_layout(source, raw=None):
    """Hub name or folder, with its config.json where it was read already -> Layout."""
    with explained(f"{source}: no model can be built after its config.json"), quietly():
        config = read_config(source, raw)
        family = family_of(config.to_dict(), source).name
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
        model.tie_weights()
    embedding = model.get_input_embeddings().weight  # a head tied to it is no weight of its own
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m.weight is not embedding}
    total = sum(p.numel() for p in model.parameters())
    rest = total - sum(m.weight.numel() for m in linears.values())
    return Layout(family, total, [(n, m.in_features, m.out_features) for n, m in linears.items()], rest, config)


def read_config(source, raw=None):
    if not Path(source).is_dir() and source in KNOWN:
        return KNOWN[source]()
    if raw is None:
        source, raw = find_model(source)
    if llava_med.is_original(raw):
        return llava_med.make_config(source, raw)
    family_of(raw, source)
    config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    if raw.get("quantization_config"):
        del config.quantization_config  # the shapes are those of the whole weights
    return config


# ---------------------------------------------------------------------------------------------------------- prediction


@dataclass(frozen=True)
class Setting:
    """
    What decides the memory besides the model. batch: cases (for grpo: questions) in one pass; tokens: of text in the
    prompt; new_tokens: of an answer, generated or learned; image_size: pixels per side (Qwen2-VL only); generations,
    counterfactual: of grpo, answers to a question, and whether V has a gradient.
    """

    quant: str = "none"
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    tokens: int = 128
    new_tokens: int = 256
    images: int = 1
    image_size: int = 448
    train: str = "none"
    generations: int = 4
    counterfactual: bool = True
    rank: int = 8
    checkpointing: bool = True


def nf4_bytes(n):
    """
    Bytes of n weights in NF4 with double quantisation: half a byte each, one byte per block of 64 for its scale, one
    float32 per 256 scales, and the tables of 16 and 256 float32 with the scales' mean that every layer keeps.
    """
    blocks = -(-n // 64)
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def is_quantised(name, quant, family):
    return quant != "none" and not any(name == k or name.startswith(k + ".") for k in kept_whole(quant, family))


def weight_bytes(layout, quant, dtype):
    """Bytes of the weights; tied ones once."""
    total = layout.other * dtype.itemsize
    for name, n_in, n_out in layout.linears:
        n = n_in * n_out
        if not is_quantised(name, quant, layout.family):
            total += n * dtype.itemsize
        elif quant == "int8":
            total += n + 4 * n_out
        else:
            total += nf4_bytes(n)
    return total


def predict(layout, setting):
    """-> bytes by kind: weights, cache, activations, adapter, gradients, optimizer, other, total."""
    text, vision = layout.config.get_text_config(), layout.config.vision_config
    size, s = setting.dtype.itemsize, setting
    image_tokens, patches = image_counts(layout, s.image_size)
    length = s.tokens + s.images * image_tokens
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    total_length = length + s.new_tokens
    cached = sum(min(total_length, text.sliding_window) if k == "sliding_attention" else total_length for k in kinds)
    answers = s.batch * (s.generations if s.train == "grpo" else 1)
    cache = 2 * answers * cached * text.num_key_value_heads * head_dim * size
    out = {"weights": weight_bytes(layout, s.quant, s.dtype), "cache": cache if s.train == "none" else 0}

    v_hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    v_mlp = getattr(vision, "intermediate_size", None) or int(v_hidden * vision.mlp_ratio)
    queries, keys = text.num_attention_heads * head_dim, 2 * text.num_key_value_heads * head_dim
    seen, rows = s.batch * s.images * patches, s.batch * length
    # Kept at once in one layer's forward pass: residual, norm, and the widest of attention and MLP.
    tower = seen * (4 * v_hidden + max(2 * v_mlp, 4 * v_hidden))
    decoder = rows * (4 * text.hidden_size + max(3 * text.intermediate_size, 3 * queries + keys))
    forward = max(tower, decoder) * size
    # One quantised weight at a time is unpacked for its product.
    unpacked = max((i * o for n, i, o in layout.linears if is_quantised(n, s.quant, layout.family)), default=0) * size
    lora = lora_parameters(layout, s.rank)
    trainable = {"none": 0, "lora": lora, "grpo": lora, "full": layout.parameters}[s.train]
    generating = forward + answers * text.vocab_size * 4
    if s.train == "none":
        out["activations"] = generating + unpacked
    else:
        layers, row = text.num_hidden_layers, text.hidden_size * size
        layer = saved_per_token(layout.family, size, text.hidden_size, text.intermediate_size, queries, keys)

        def saved(tokens, shared=0):
            """By autograd for so many tokens; shared: columns of a prompt whose keys and values answers attend to."""
            copies = layers * shared * (keys + 2 * queries) * size  # gathered, and repeated for the heads of queries
            return copies + tokens * (layers * row + layer if s.checkpointing else layers * layer)

        learned = answers * s.new_tokens
        whole = saved(answers * total_length)  # nothing is shared
        passes = [whole]
        if s.train == "grpo":
            update = whole if s.checkpointing else saved(rows + learned, answers * length)
            passes = [update, whole if s.counterfactual else 0]
        if s.train == "full":  # a frozen tower saves nothing; two matrices in its MLP, not three
            of_tower = saved_per_token("", size, v_hidden, v_mlp / 2, v_hidden, 2 * v_hidden)
            depth = getattr(vision, "depth", None) or vision.num_hidden_layers
            passes[0] += seen * (depth * v_hidden * size + of_tower if s.checkpointing else depth * of_tower)
        # of so many rows as are computed at once: as computed, as float32, and their gradient (passes.py)
        logits = min(learned * text.vocab_size, CHUNK_NUMBERS) * (size + 4 + 4)
        sampling = generating + cache if s.train == "grpo" else 0
        out["activations"] = int(max(forward, sampling, max(passes) + logits) + unpacked)
    copies = 2 if s.train == "grpo" else 1  # adapters; gradients, where V may have to take its own back
    out["adapter"] = copies * trainable * 4 if s.train in ("lora", "grpo") else 0
    gradients = trainable * (size if s.train == "full" else 4)
    out["gradients"] = gradients * (2 if s.train == "grpo" and s.counterfactual else 1)
    out["optimizer"] = 2 * gradients  # Adam: two numbers for each weight
    out["other"] = int(0.5 * GIB + 0.05 * sum(out.values()))
    return out | {"total": sum(out.values())}


def saved_per_token(family, itemsize, hidden, mlp, queries, keys):
    """Bytes that one decoder layer with LoRA on all its linear layers saves for the backward pass, per token."""
    a, b, c = SAVED.get(family, SAVED[""])[itemsize]
    return a * (hidden + queries) + b * mlp + c * keys


def image_counts(layout, image_size):
    """-> (image tokens, patches) of one image."""
    vision = layout.config.vision_config
    if FAMILIES[layout.family].rope:
        side = max(1, round(image_size / vision.patch_size / vision.spatial_merge_size))
        return side**2, (side * vision.spatial_merge_size) ** 2
    patches = (vision.image_size // vision.patch_size) ** 2
    return getattr(layout.config, "mm_tokens_per_image", patches), patches


def lora_parameters(layout, rank):
    return sum(rank * (i + o) for name, i, o in layout.linears if re.fullmatch(LORA_LAYERS, name))


def nearest_that_fits(layout, setting, limit):
    """The change closest to a setting that brings the total under `limit` bytes, in words, or None."""
    lora = {"train": "lora"} if setting.train == "full" else {}
    smaller = {"none": ["int8", "nf4-text", "nf4"], "nf4": []}.get(setting.quant, ["nf4"])
    steps = [lora, {"checkpointing": True}, *(lora | {"quant": quant} for quant in smaller)]
    steps.append(steps[-1] | lora | {"batch": 1, "checkpointing": True})
    if setting.train == "grpo":
        steps.append(steps[-1] | {"generations": 2})
    words = {"quant": "--quant", "train": "--train", "batch": "--batch-size", "checkpointing": "gradient checkpointing"}
    words["generations"] = "--num-generations"
    for step in steps:
        changed = replace(setting, **step)
        if changed != setting and predict(layout, changed)["total"] <= limit:
            new = {name: getattr(changed, name) for name in words if getattr(changed, name) != getattr(setting, name)}
            return " ".join(words[n] if n == "checkpointing" else f"{words[n]} {value}" for n, value in new.items())
    return None


def too_large(name, layout, quant, device, dtype):
    """A warning, before anything is read, about a model that will not fit, with the nearest setting that does."""
    free, setting = free_bytes(device), Setting(quant=quant, dtype=dtype)
    need = predict(layout, setting)["total"]
    if free is None or need <= free:
        return ""
    words = nearest_that_fits(layout, setting, free)
    fits = f"{words} would fit" if words else "no setting of these scripts fits; take a smaller model or a larger card"
    return (
        f"WARNING: {name} will need about {need / GIB:.1f} GiB with --quant {quant}, and {free / GIB:.1f} GiB are free"
        f" on {device}; {fits}"
    )


def free_bytes(device):
    """Memory that is free on a device, in bytes; None where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def parse_args(argv=None):
    parser = ScriptParser(
        prog="python -m shared.models.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    parser.add_argument("--config", help="YAML or JSON file with the same names; flags given here win")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default="google/medgemma-4b-it", help="hub name, folder, or tiny:<family> (%(default)s)")
    g.add_argument("--quant", default="none", choices=QUANTS, help="how the weights are held (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the computation; auto: what load_vlm takes on each card (%(default)s)")
    g = parser.add_argument_group("use")
    g.add_argument("--batch-size", type=positive_int, default=1,
        help="cases at once; grpo: questions, with all their answers, in one pass (%(default)s)")
    g.add_argument("--tokens", type=positive_int, default=128,
        help="text tokens of one prompt, image tokens not counted (%(default)s)")
    g.add_argument("--new-tokens", type=positive_int, default=256,
        help="tokens of an answer, generated or learned (%(default)s)")
    g.add_argument("--image-size", type=positive_int, default=448,
        help="pixels per side, where the family keeps the image's own size: Qwen (%(default)s)")
    g.add_argument("--train", default="none", choices=["none", "lora", "full", "grpo"],
        help="none: only generate (%(default)s)")
    g.add_argument("--num-generations", dest="generations", type=positive_int, default=4, metavar="G",
        help="grpo: answers to a question (%(default)s)")
    g.add_argument("--counterfactual", action=argparse.BooleanOptionalAction, default=True,
        help="grpo: V has a gradient (train_grpo.py --cf-gradient)")
    g.add_argument("--rank", type=positive_int, default=8, help="of the LoRA adapters (%(default)s)")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations in the backward pass")
    # fmt: on
    args = parser.parse_args(argv)
    if args.train == "full" and args.quant != "none":
        parser.error("--train full needs --quant none: quantised weights cannot be trained, only adapters on them")
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    layout = read_layout(args.model)
    tokens, patches = image_counts(layout, args.image_size)
    print(
        f"{args.model}: {layout.family}, {layout.parameters:,} parameters, {tokens} tokens and {patches} patches per"
        " image\n"
    )
    same = {name: value for name, value in vars(args).items() if name in Setting.__dataclass_fields__}
    rows = []
    for card, gib in CARDS.items():
        small = "float16" if FAMILIES[layout.family].float16 else "float32"  # a T4 does not compute bfloat16
        dtype = args.dtype if args.dtype != "auto" else small if "T4" in card else "bfloat16"
        setting = Setting(**same | {"dtype": getattr(torch, dtype), "batch": args.batch_size})
        need = predict(layout, setting)
        better = nearest_that_fits(layout, setting, gib * GIB) or "nothing here"
        fits = "yes" if need["total"] <= gib * GIB else f"no; {better} would"
        rows.append([card, *(f"{value / GIB:.2f}" for value in need.values()), dtype, fits])
    head = ["GiB", *need, "computing in", "fits?"]
    for row in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
