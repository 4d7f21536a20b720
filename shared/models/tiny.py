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
| tiny:qwen25vl | Qwen2_5_VLForConditionalGeneration: attention in windows in the tower | Qwen2.5-VL 3B |
| tiny:qwen3vl | Qwen3VLForConditionalGeneration: image features in several layers | Qwen3-VL 2B |
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
from transformers import Qwen2VLImageProcessor, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from shared.phantom import phantom_study
from shared.runtime import InputError, read_json, write_json

# Every width is a multiple of 64, so that the same folder also loads in 4 bit: NF4 stores blocks of 64 numbers.
WORDS = dict(hidden=128, layers=3, heads=4, mlp=256, vocab=1024)
TEXT = dict(hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, vocab=1024)
VISION = dict(image_size=112, patch_size=14, vision_hidden=128, vision_layers=4, vision_heads=4, vision_mlp=256)
SIZES = {
    "qwen2vl": TEXT | VISION,  # 16 image tokens: 8x8 patches, merged 2x2
    "qwen25vl": TEXT | VISION | dict(window=56),  # the same in 4 windows of 4 merged patches
    "qwen3vl": TEXT | VISION | dict(image_size=128, patch_size=16),
    "gemma3": TEXT | VISION | dict(layers=6, mlp=256, image_tokens=16, sliding_window=512),  # 5 sliding, 1 full
    "llava": TEXT | VISION,  # 64 image tokens, one per patch
    "siglip": VISION | dict(vocab=1024),
    "t5": WORDS,
    "bert": WORDS,
}
INIT = 0.06  # deviation of random weights of language models; 0.02, made for thousands, hardly lets 128 numbers through
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def chat_template(text, image, trim=""):
    """
    What the templates of the real models write, in the few lines that these need. WORDS: what one message says, with
    `image` in the place of each image; SAID: the text of one without images; SYSTEM keeps an instruction for the next
    user's turn.
    """
    said = "(message.content if message.content is string else message.content[0].text)"
    words = f"""{{%- if message.content is string -%}}{{{{ message.content{trim} }}}}{{%- else -%}}
        {{%- for part in message.content -%}}
        {{{{ '{image}' if part.type == 'image' else part.text{trim} }}}}{{%- endfor -%}}{{%- endif -%}}"""
    system = "{%- set system.text = SAID + '\n\n' -%}"
    return text.replace("WORDS", words).replace("SYSTEM", system).replace("SAID", said)


GEMMA3_TEMPLATE = chat_template(
    """{{ bos_token }}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}SYSTEM{%- else -%}
        {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + system.text }}
        {%- set system.text = '' -%}WORDS{{ '<end_of_turn>\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}""",
    image="<start_of_image>",
    trim=" | trim",
)
QWEN3VL_TEMPLATE = chat_template(
    """{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' }}WORDS{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}""",
    image="<|vision_start|><|image_pad|><|vision_end|>",
)
QWEN2VL_TEMPLATE = (  # Qwen2-VL and Qwen2.5-VL have an instruction of their own
    "{%- if messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}" + QWEN3VL_TEMPLATE
)
# LLaVA-Med v1.5 was trained with Mistral's instruction form, the image on a line of its own before the question.
LLAVA_TEMPLATE = chat_template(
    """{{ bos_token }}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}SYSTEM
    {%- elif message.role == 'assistant' -%}{{ ' ' + SAID + eos_token }}
    {%- else -%}
        {{ '[INST] ' + system.text }}{%- set system.text = '' -%}WORDS{{ ' [/INST]' }}
    {%- endif -%}
{%- endfor -%}""",
    image="<image>\n",
)


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
            globals()["build_" + family](building, **sizes)
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
    files = [p for p in sorted(folder.iterdir()) if p.name != "sha256.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


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
    turns = ["system\nYou are a helpful assistant.", "user\n", "model\n", "assistant\n", "[INST] ", " [/INST]", "\n\n"]
    return tuple(texts + [*turns, *FORMS] * 100)


# The fixed words of prompts and structured answers. Real tokenizers know them; here they would be spelled letter by
# letter, and an answer of twenty words would be longer than the text of a whole report.
FORMS = (
    'Answer the question with one JSON object: "caption": what the image shows, "reasoning": what settles it, "boxes":'
    " [[x0, y0, x1, y1], ...] where",
    'to look, from 0 to 1000, "answer": a few words. First write what you see between <think> and </think>, then the'
    " answer in a few words",
    "between <answer> and </answer>.\nQuestion:",
    *'{"caption": "Frontal|.", "reasoning": "Seen:|.", "boxes": [[|]], "answer": "|"}|.", "answer": "'.split("|"),
    *".</think><answer>|</answer>|<think>Frontal".split("|"),
)


def byte_bpe(vocab, special_tokens, bos=None):
    """
    Byte-level BPE: every text comes back exactly, nothing is unknown. With bos it is put first, as the real tokenizer
    does.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as Qwen2 and Gemma have them: a coordinate is then the same three tokens wherever it stands.
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = dict(vocab_size=vocab, special_tokens=special_tokens, show_progress=False, min_frequency=2)
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
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


def save(model, folder, processor, special=None):
    """special: ids of the tokens that generation starts with, ends with and pads with."""
    model.eval()
    if special is not None:
        model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- models

NAMES = dict(  # of SIZES -> in most configurations
    hidden="hidden_size", mlp="intermediate_size", layers="num_hidden_layers", heads="num_attention_heads",
    kv_heads="num_key_value_heads",
)  # fmt: skip


def settings(s, prefix="", **more):
    """Sizes -> settings of a transformer; prefix "vision_" for those of the tower."""
    return {new: s[prefix + old] for old, new in NAMES.items() if prefix + old in s} | more


def vision_settings(s, **more):
    """Of CLIP's and SigLIP's vision towers."""
    return settings(s, "vision_", image_size=s["image_size"], patch_size=s["patch_size"], **more)


def grey_square(image_processor, s):
    """Images as SigLIP takes them: a square, each channel from -1 to 1."""
    half = [0.5] * 3
    size = {"height": s["image_size"], "width": s["image_size"]}
    return image_processor(size=size, image_mean=half, image_std=half, do_convert_rgb=True)


def make_tokenizer(s, specials, pad, eos, bos=None, unk=None, **extra):
    """
    -> (tokenizer, settings of a language model of that vocabulary, ids of its special tokens). specials: all special
    tokens; extra: names for some of them. A start token is put first, as the real tokenizers do.
    """
    bpe = byte_bpe(s["vocab"], specials.split(), bos=bos)
    roles = {"pad_token": pad, "eos_token": eos} | ({"bos_token": bos, "unk_token": unk} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", extra_special_tokens=extra, **roles)
    ids = tokenizer.convert_tokens_to_ids
    special = dict(pad_token_id=ids(pad), bos_token_id=ids(bos or pad), eos_token_id=ids(eos))
    text = settings(s, vocab_size=rounded(len(tokenizer)), max_position_embeddings=8192, initializer_range=INIT)
    return tokenizer, text | special, special


def build_gemma3(folder, image_tokens, sliding_window, **s):
    specials = (
        "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>"
    )
    marks = dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    tokenizer, text, special = make_tokenizer(s, specials, "<pad>", "<eos>", "<bos>", "<unk>", **marks)
    ids = tokenizer.convert_tokens_to_ids
    head_dim = s["hidden"] // s["heads"]
    text |= dict(head_dim=head_dim, query_pre_attn_scalar=head_dim, sliding_window=sliding_window)
    text["layer_types"] = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(s["layers"])]
    vision = vision_settings(s, vision_use_head=False)
    marks = {name.replace("token", "token_index"): ids(mark) for name, mark in marks.items()}
    stops = [ids("<eos>"), ids("<end_of_turn>")]
    more = dict(mm_tokens_per_image=image_tokens, eos_token_id=stops, **marks)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **more))
    # The library fills this matrix with zeros, since it expects pretrained weights: the model would not see the image.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.05)
    image = grey_square(Gemma3ImageProcessor, s)
    processor = Gemma3Processor(image, tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=image_tokens)
    save(model, folder, processor, special | {"eos_token_id": stops})


def build_qwen(folder, stem, vision, template, section, text_more, limits_more, video="Qwen2VL", **s):
    """The three Qwen families: classes are named after `stem`; the rest is what differs between them."""
    names = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
    specials = " ".join(f"<|{name}|>" for name in names)
    marks = {n.replace("_pad", "") + "_token": f"<|{n}|>" for n in names[3:] if n != "vision_pad"}
    tokenizer, text, special = make_tokenizer(s, specials, "<|endoftext|>", "<|im_end|>", **marks)
    ids = {name + "_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    pixels = s["image_size"] ** 2  # the real one keeps sizes between 56*56 and 28*28*1280 pixels
    size = {"shortest_edge": min(pixels, (4 * s["patch_size"]) ** 2), "longest_edge": pixels}
    limits = dict(size=size, patch_size=s["patch_size"], **limits_more)
    rope = {"rope_type": "default", "rope_theta": 1e3, "mrope_section": section}
    text |= dict(rope_parameters=rope, tie_word_embeddings=True, **text_more)
    vision |= dict(depth=s["vision_layers"], num_heads=s["vision_heads"], patch_size=s["patch_size"])
    vision |= dict(initializer_range=INIT)
    classes = [getattr(transformers, stem + kind) for kind in ("Config", "ForConditionalGeneration", "Processor")]
    config = classes[0](text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    video = getattr(transformers, video + "VideoProcessor")(**limits)
    processor = classes[2](Qwen2VLImageProcessor(**limits), tokenizer, video, chat_template=template)
    special["eos_token_id"] = [special["eos_token_id"], special["pad_token_id"]]
    save(classes[1](config), folder, processor, special)


def dealt_out(s):
    """
    Frequencies of the rotary positions, dealt out to time, height and width in turn. The real ones give them out in
    blocks of 2:3:3, the lowest to the width, from a base of a million: in heads of 32 numbers the columns of 4 x 4
    image tokens would lie 0.0005 radians apart, and left could hardly be told from right. Whole rounds of three, as
    older releases of transformers need; the rest is for time.
    """
    half = s["hidden"] // s["heads"] // 2
    section = [1] * (half // 3 * 3)
    section[-3] += half % 3
    return section


def build_qwen2vl(folder, **s):
    ratio = s["vision_mlp"] // s["vision_hidden"]
    vision = dict(embed_dim=s["vision_hidden"], hidden_size=s["hidden"], mlp_ratio=ratio)
    build_qwen(folder, "Qwen2VL", vision, QWEN2VL_TEMPLATE, dealt_out(s), {}, {}, **s)


def build_qwen25vl(folder, window, **s):
    vision = dict(hidden_size=s["vision_hidden"], intermediate_size=s["vision_mlp"], out_hidden_size=s["hidden"])
    vision |= dict(window_size=window, fullatt_block_indexes=list(range(1, s["vision_layers"], 2)), tokens_per_second=2)
    build_qwen(folder, "Qwen2_5_VL", vision, QWEN2VL_TEMPLATE, dealt_out(s), {}, {}, **s)


def build_qwen3vl(folder, **s):
    vision = dict(hidden_size=s["vision_hidden"], intermediate_size=s["vision_mlp"], out_hidden_size=s["hidden"])
    layers = s["vision_layers"]
    vision["deepstack_visual_indexes"] = sorted({layers // 3, 2 * layers // 3})
    vision["num_position_embeddings"] = (s["image_size"] // s["patch_size"]) ** 2
    head_dim = s["hidden"] // s["heads"]
    third = head_dim // 2 // 3  # this family deals the frequencies out in turn by itself
    section = [head_dim // 2 - 2 * third, third, third]
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    more = dict(head_dim=head_dim)
    build_qwen(folder, "Qwen3VL", vision, QWEN3VL_TEMPLATE, section, more, half, video="Qwen3VL", **s)


def build_llava(folder, **s):
    tokenizer, text, special = make_tokenizer(
        s, "<unk> <s> </s> <pad> <image>", "<pad>", "</s>", "<s>", "<unk>", image_token="<image>"
    )
    size, patch = s["image_size"], s["patch_size"]
    config = LlavaConfig(
        text_config=text | dict(model_type="mistral", max_position_embeddings=4096, sliding_window=None),
        vision_config=vision_settings(s, model_type="clip_vision_model", projection_dim=64),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size // patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = clip_processor(CLIPImageProcessor, size, patch, tokenizer, LLAVA_TEMPLATE)
    save(LlavaForConditionalGeneration(config), folder, processor, special)


def clip_processor(image_class, size, patch, tokenizer, template, **more):
    """
    LLaVA's processor for a tower with a class token: that is one image token more (num_additional_image_tokens), which
    "default" takes away again.
    """
    crop = {"height": size, "width": size}
    image = image_class(size={"shortest_edge": size}, crop_size=crop, image_mean=CLIP_MEAN, image_std=CLIP_STD, **more)
    tokens = dict(patch_size=patch, num_additional_image_tokens=1, vision_feature_select_strategy="default")
    return LlavaProcessor(image, tokenizer, chat_template=template, **tokens)


def build_siglip(folder, **s):
    tokenizer = t5_tokenizer(s["vocab"])  # the real one is SentencePiece Unigram, too
    tokenizer.model_max_length = 64
    text = settings(s, "vision_", vocab_size=rounded(len(tokenizer)), max_position_embeddings=64)
    text |= dict(projection_size=s["vision_hidden"], pad_token_id=tokenizer.pad_token_id)
    text |= dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision_settings(s)))
    save(model, folder, SiglipProcessor(grey_square(SiglipImageProcessor, s), tokenizer))


def build_t5(folder, **s):
    tokenizer = t5_tokenizer(s["vocab"])
    special = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    sizes = dict(d_model=s["hidden"], d_kv=s["hidden"] // s["heads"], d_ff=s["mlp"], num_heads=s["heads"])
    sizes |= dict(num_layers=s["layers"], num_decoder_layers=s["layers"], vocab_size=rounded(len(tokenizer)))
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **special)
    save(T5ForConditionalGeneration(config), folder, tokenizer, special)


def build_bert(folder, **s):
    tokenizer = bert_tokenizer(s["vocab"])
    more = dict(max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id)
    save(BertModel(BertConfig(**settings(s, vocab_size=rounded(len(tokenizer)), **more))), folder, tokenizer)


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
