"""
Small models of the real classes, built on disk in about a second, for use without a network, a licence or a GPU.

    folder = tiny_folder("tiny:qwen2vl")                      # built once, then found again
    folder = tiny_folder("tiny:gemma3", layers=2, seed=1)     # any size of SIZES can be changed

Usage:
    python -m shared.models.tiny  # builds all of them and prints folder, parameters, megabytes

| name | classes | stands in for |
|---|---|---|
| tiny:gemma3 | Gemma3ForConditionalGeneration, SigLIP tower, Gemma3Processor | MedGemma 4B |
| tiny:qwen2vl | Qwen2VLForConditionalGeneration, Qwen2VLProcessor | Qwen2-VL 2B |
| tiny:llava | LlavaForConditionalGeneration: CLIP tower, Mistral; LlavaProcessor | LLaVA-Med 7B |
| tiny:siglip | SiglipModel (both towers), SiglipProcessor | SigLIP |
| tiny:t5 | T5ForConditionalGeneration (Flan form: gated GELU, untied head) | Flan-T5 |
| tiny:bert | BertModel, BertTokenizer | BioBERT, PubMedBERT |

They have the chat template and the special tokens of the real ones, a tokenizer trained on phantom text, random
weights, and load through the same Auto classes. A folder's name holds a digest of everything it is made from (sizes,
training text, this file, the version of transformers); a list of SHA-256 sums inside tells whether it is whole, and it
is built again if not. They go to $MEDVLM_CACHE/tiny, else ~/.cache/medvlm-plain/tiny.
"""

import collections
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, BertTokenizer, CLIPImageProcessor, Gemma3Config
from transformers import Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor, GenerationConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
from transformers import Qwen2VLVideoProcessor, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from shared.phantom import phantom_study
from shared.runtime import InputError, read_json, write_json

# Every width is a multiple of 64, so that the same folder also loads in 4 bit: NF4 stores blocks of 64 numbers.
TEXT = dict(hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, vocab=1024)
VISION = dict(image_size=112, patch_size=14, vision_hidden=128, vision_layers=4, vision_heads=4, vision_mlp=256)
SIZES = {
    "qwen2vl": TEXT | VISION,  # 16 image tokens: 8x8 patches, merged 2x2
    "gemma3": (
        TEXT | VISION | dict(layers=6, mlp=256, image_tokens=16, sliding_window=512)
    ),  # 6 layers: 5 sliding, 1 full
    "llava": TEXT | VISION,  # 64 image tokens, one per patch
    "siglip": VISION | dict(vocab=1024),
    "t5": dict(hidden=128, layers=3, heads=4, mlp=256, vocab=1024),
    "bert": dict(hidden=128, layers=3, heads=4, mlp=256, vocab=1024),
}

INIT = 0.06  # standard deviation of random weights in tiny:qwen2vl; 0.02, made for widths of thousands, hardly lets 128 numbers through

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# What the templates of the real models write, in the few lines that these need.
GEMMA3_TEMPLATE = """{{ bos_token }}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set system.text = (message.content if message.content is string else message.content[0].text) + '\n\n' -%}
    {%- else -%}
        {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + system.text }}
        {%- set system.text = '' -%}
        {%- if message.content is string -%}{{ message.content | trim }}{%- else -%}
        {%- for part in message.content -%}{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{%- endfor -%}
        {%- endif -%}
        {{ '<end_of_turn>\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

QWEN2VL_TEMPLATE = """{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string -%}{{ message.content }}{%- else -%}
    {%- for part in message.content -%}
        {{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
    {%- endfor -%}
    {%- endif -%}
    {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# LLaVA-Med v1.5 was trained with Mistral's instruction form, the image on a line of its own before the question.
LLAVA_TEMPLATE = """{{ bos_token }}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set system.text = (message.content if message.content is string else message.content[0].text) + '\n\n' -%}
    {%- elif message.role == 'assistant' -%}
        {{ ' ' + (message.content if message.content is string else message.content[0].text) + eos_token }}
    {%- else -%}
        {{ '[INST] ' + system.text }}
        {%- set system.text = '' -%}
        {%- if message.content is string -%}{{ message.content }}{%- else -%}
        {%- for part in message.content -%}{{ '<image>\n' if part.type == 'image' else part.text }}{%- endfor -%}
        {%- endif -%}
        {{ ' [/INST]' }}
    {%- endif -%}
{%- endfor -%}"""


# ------------------------------------------------------------------------------------------------------------- folders


def cache_dir():
    """The folder for what can be built again."""
    return Path(os.environ.get("MEDVLM_CACHE") or Path.home() / ".cache" / "medvlm-plain").resolve()


def is_tiny(name):
    return str(name).split(":")[0] == "tiny"


def tiny_folder(name, seed=0, **sizes):
    """
    "tiny:qwen2vl" -> Path of the folder of such a model, built if it is not there. seed: of the random weights; sizes:
    see SIZES. InputError for a family or a size that does not exist.
    """
    family = str(name).removeprefix("tiny:")
    if family not in SIZES:
        raise InputError(f"there is no tiny model {name!r}; there are {', '.join('tiny:' + f for f in SIZES)}")
    unknown = set(sizes) - set(SIZES[family])
    if unknown:
        raise InputError(f"tiny:{family} has no size {sorted(unknown)[0]!r}; it has {', '.join(SIZES[family])}")
    sizes = SIZES[family] | sizes
    recipe = {"family": family, "sizes": sizes, "seed": seed, "transformers": transformers.__version__}
    parts = [json.dumps(recipe, sort_keys=True), inspect.getsource(sys.modules[__name__]), *phantom_text()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_dir() / "tiny" / f"{family}-{digest}"
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{family}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"cannot write {folder.parent}: {error.strerror}; set MEDVLM_CACHE to a folder that can be written"
        ) from error
    try:
        with quietly(), torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing was built
            torch.manual_seed(seed)
            BUILDERS[family](building, **sizes)
        write_json(building / "sha256.json", sums(building) | {"recipe": recipe})
        if folder.exists():
            shutil.rmtree(folder)  # damaged
        try:
            building.rename(folder)
        except OSError:  # another process was faster
            if not is_whole(folder):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


@contextlib.contextmanager
def quietly():
    """No progress bars and no remarks of transformers; errors still show."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def sums(folder):
    """File name -> SHA-256 of everything in a folder but the list itself."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.name != "sha256.json"
    }


def is_whole(folder):
    if not (folder / "sha256.json").is_file():
        return False
    listed = read_json(folder / "sha256.json")
    listed.pop("recipe", None)
    return sums(folder) == listed


# ----------------------------------------------------------------------------------------- text and tokenizers


@functools.lru_cache(maxsize=1)
def phantom_text():
    """
    Reports, questions and answers of 250 phantom studies, and what the chat templates add: the tokenizers' training
    text.
    """
    texts = []
    for index in range(250):
        study = phantom_study(seed=1234, index=index, size=64)
        texts.append(study.report.text)
        for question in study.questions:
            texts += [question.text, question.answer, question.answer.capitalize(), "Answer yes or no."]
            texts += [paraphrase.text for paraphrase in question.paraphrases]
    return tuple(
        texts
        + [
            "system\nYou are a helpful assistant.",
            "user\n",
            "model\n",
            "assistant\n",
            "[INST] ",
            " [/INST]",
            "\n\n",
            *FORMS,
        ]
        * 100
    )


# The fixed words of prompts and structured answers. Real tokenizers know them; here they would be spelled letter by
# letter, and an answer of twenty words would be longer than the text of a whole report.
FORMS = (
    (
        'Answer the question with one JSON object: "caption": what the image shows, "reasoning": what settles it,'
        ' "boxes": [[x0, y0, x1, y1], ...] where'
    ),
    (
        'to look, from 0 to 1000, "answer": a few words. First write what you see between <think> and </think>, then'
        " the answer in a few words"
    ),
    "between <answer> and </answer>.\nQuestion:",
    '{"caption": "Frontal',
    '.", "reasoning": "Seen:',
    '.", "boxes": [[',
    ']], "answer": "',
    '"}',
    '.", "answer": "',
    ".</think><answer>",
    "</answer>",
    "<think>Frontal",
)


def byte_bpe(vocab, special_tokens, bos=None):
    """
    Byte-level BPE: every text comes back exactly, nothing is unknown. With bos it is put first, as the real tokenizer
    does.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as Qwen2 and Gemma have them: a coordinate is then the same three tokens wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special_tokens,
        show_progress=False,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(phantom_text(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def frequent_words(count):
    """The most frequent words and punctuation marks of the phantom text, with how often they occur; a fixed order."""
    split = pre_tokenizers.BertPreTokenizer()
    words = collections.Counter(w for text in phantom_text() for w, _ in split.pre_tokenize_str(text))
    return sorted(words.items(), key=lambda item: (-item[1], item[0]))[:count]


PRINTABLE = [chr(c) for c in range(33, 127)]


def t5_tokenizer(vocab):
    """Unigram pieces in SentencePiece's form: whole words where they are frequent, else characters."""
    pieces = {"▁": -8.0} | dict.fromkeys(PRINTABLE, -12.0)
    words = frequent_words(vocab)
    total = sum(n for _, n in words)
    for word, n in words:
        if len(pieces) < vocab - 3:
            pieces.setdefault("▁" + word if word[0].isalnum() else word, math.log(n / total))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def bert_tokenizer(vocab):
    """WordPiece, lower case: frequent words, and every character as a start and as a continuation."""
    characters = sorted({c.lower() for c in PRINTABLE})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters)]
    words = dict.fromkeys(w.lower() for w, _ in frequent_words(4 * vocab))
    pieces += [w for w in words if w not in characters][: vocab - len(pieces)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=True, model_max_length=512)


def rounded(n):
    """Vocabulary sizes in multiples of 64, as the real models have them."""
    return -(-n // 64) * 64


def save(model, folder, processor, generation=None):
    model.eval()
    if generation is not None:
        model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- models


def build_gemma3(folder, image_tokens, sliding_window, **s):
    specials = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(s["vocab"], specials, bos="<bos>"),
        padding_side="left",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    ids = tokenizer.convert_tokens_to_ids
    image = Gemma3ImageProcessor(
        size={"height": s["image_size"], "width": s["image_size"]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    head_dim = s["hidden"] // s["heads"]
    text = dict(
        vocab_size=rounded(len(tokenizer)),
        hidden_size=s["hidden"],
        intermediate_size=s["mlp"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=sliding_window,
        layer_types=["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(s["layers"])],
        max_position_embeddings=8192,
        pad_token_id=ids("<pad>"),
        bos_token_id=ids("<bos>"),
        eos_token_id=ids("<eos>"),
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision_settings(s) | dict(vision_use_head=False),
        mm_tokens_per_image=image_tokens,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        eos_token_id=[ids("<eos>"), ids("<end_of_turn>")],
    )
    model = Gemma3ForConditionalGeneration(config)
    # The library initialises this matrix to zeros, since it expects pretrained weights: the model would not see the
    # image.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.05)
    processor = Gemma3Processor(image, tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=image_tokens)
    save(
        model,
        folder,
        processor,
        dict(pad_token_id=ids("<pad>"), bos_token_id=ids("<bos>"), eos_token_id=[ids("<eos>"), ids("<end_of_turn>")]),
    )


def build_qwen2vl(folder, **s):
    specials = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(s["vocab"], specials),
        padding_side="left",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    ids = tokenizer.convert_tokens_to_ids
    pixels = s["image_size"] ** 2  # the real one keeps sizes between 56*56 and 28*28*1280 pixels
    limits = dict(
        size={"shortest_edge": min(pixels, (4 * s["patch_size"]) ** 2), "longest_edge": pixels},
        patch_size=s["patch_size"],
    )
    image, video = Qwen2VLImageProcessor(**limits), Qwen2VLVideoProcessor(**limits)
    # Frequencies of the rotary positions, dealt out to time, height and width in turn. The real one gives them out in
    # blocks of 2:3:3, the lowest to the width, from a base of a million: in heads of 32 numbers the columns of 4 x 4
    # image tokens would lie 0.0005 radians apart, and left could hardly be told from right. Whole rounds of three, as
    # older releases of transformers need; the rest is for time.
    half = s["hidden"] // s["heads"] // 2
    section = [1] * (half // 3 * 3)
    section[-3] += half % 3
    text = dict(
        vocab_size=rounded(len(tokenizer)),
        hidden_size=s["hidden"],
        intermediate_size=s["mlp"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e3, "mrope_section": section},
        tie_word_embeddings=True,
        initializer_range=INIT,
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=ids("<|endoftext|>"),
        eos_token_id=ids("<|im_end|>"),
    )
    vision = dict(
        depth=s["vision_layers"],
        embed_dim=s["vision_hidden"],
        hidden_size=s["hidden"],
        num_heads=s["vision_heads"],
        mlp_ratio=s["vision_mlp"] // s["vision_hidden"],
        patch_size=s["patch_size"],
        initializer_range=INIT,
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    processor = Qwen2VLProcessor(image, tokenizer, video, chat_template=QWEN2VL_TEMPLATE)
    generation = dict(
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=ids("<|endoftext|>"),
        eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")],
    )
    save(Qwen2VLForConditionalGeneration(config), folder, processor, generation)


def build_llava(folder, **s):
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(s["vocab"], specials, bos="<s>"),
        padding_side="left",
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    ids = tokenizer.convert_tokens_to_ids
    size = s["image_size"]
    image = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    text = dict(
        model_type="mistral",
        vocab_size=rounded(len(tokenizer)),
        hidden_size=s["hidden"],
        intermediate_size=s["mlp"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        max_position_embeddings=4096,
        sliding_window=None,
        pad_token_id=ids("<pad>"),
        bos_token_id=ids("<s>"),
        eos_token_id=ids("</s>"),
    )
    vision = vision_settings(s) | dict(model_type="clip_vision_model", projection_dim=64)
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids("<image>"),
        image_seq_length=(size // s["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    # CLIP's class token is one image token more (num_additional_image_tokens), which "default" takes away again.
    processor = LlavaProcessor(
        image,
        tokenizer,
        patch_size=s["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    generation = dict(pad_token_id=ids("<pad>"), bos_token_id=ids("<s>"), eos_token_id=ids("</s>"))
    save(LlavaForConditionalGeneration(config), folder, processor, generation)


def vision_settings(s):
    """The settings that CLIP's and SigLIP's vision towers have in common."""
    return dict(
        hidden_size=s["vision_hidden"],
        intermediate_size=s["vision_mlp"],
        num_hidden_layers=s["vision_layers"],
        num_attention_heads=s["vision_heads"],
        image_size=s["image_size"],
        patch_size=s["patch_size"],
    )


def build_siglip(folder, **s):
    tokenizer = t5_tokenizer(s["vocab"])  # the real one is SentencePiece Unigram, too
    tokenizer.model_max_length = 64
    text = dict(
        vocab_size=rounded(len(tokenizer)),
        hidden_size=s["vision_hidden"],
        intermediate_size=s["vision_mlp"],
        num_hidden_layers=s["vision_layers"],
        num_attention_heads=s["vision_heads"],
        max_position_embeddings=64,
        projection_size=s["vision_hidden"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    image = SiglipImageProcessor(
        size={"height": s["image_size"], "width": s["image_size"]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    save(
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision_settings(s))),
        folder,
        SiglipProcessor(image, tokenizer),
    )


def build_t5(folder, **s):
    tokenizer = t5_tokenizer(s["vocab"])
    config = T5Config(
        vocab_size=rounded(len(tokenizer)),
        d_model=s["hidden"],
        d_kv=s["hidden"] // s["heads"],
        d_ff=s["mlp"],
        num_layers=s["layers"],
        num_decoder_layers=s["layers"],
        num_heads=s["heads"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    generation = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    save(T5ForConditionalGeneration(config), folder, tokenizer, generation)


def build_bert(folder, **s):
    tokenizer = bert_tokenizer(s["vocab"])
    config = BertConfig(
        vocab_size=rounded(len(tokenizer)),
        hidden_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        intermediate_size=s["mlp"],
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    save(BertModel(config), folder, tokenizer)


BUILDERS = {
    "qwen2vl": build_qwen2vl,
    "gemma3": build_gemma3,
    "llava": build_llava,
    "siglip": build_siglip,
    "t5": build_t5,
    "bert": build_bert,
}


def main():
    for family in SIZES:
        folder = tiny_folder(family)
        with open(folder / "model.safetensors", "rb") as file:  # the header lists every tensor with its shape
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        parameters = sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f"tiny:{family:8s} {parameters / 1e6:5.2f} M parameters  {size / 1e6:5.1f} MB  {folder}")


if __name__ == "__main__":
    main()
