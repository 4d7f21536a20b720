"""
From images and texts to what a vision-language model takes, for every family alike; and a store of a data set's images.

    images = preprocess_images(vlm.processor, films)             # films: uint8 arrays, tensors or PIL images
    images.values, images.grids                                  # pixels; (rows, columns) of each image's tokens

    prompt_ids(vlm, "Is there a nodule?", images.grids[:1])      # as tokens, the image's included
    continuation(vlm, "yes", end=True)                           # a response as tokens, and where each stands in it

    store = ImageStore(vlm.processor, [row["image"] for row in rows], budget_gib=2)
    store.cache_features(lambda images: features_of(vlm, images), budget_gib=2)      # of a frozen tower, once

Images go through the model's own processor, many in one call: in a loop it takes several times as long, as much as the
step of a small model (benchmarks/loading.py).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import math
from dataclasses import dataclass

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from shared.data.images import image_size, read_pixels
from shared.runtime import InputError

CHUNK = 64  # images resized at once: 64 films of 896 px are 0.6 GB


@dataclass
class Images:
    """
    Preprocessed images. values: float32 (N, 3, H, W), or the patch rows (sum of patches, 1176) of Qwen2-VL with
    grid_thw (N, 3); grids: (rows, columns) of each image's tokens.
    """

    values: torch.Tensor
    grids: list
    grid_thw: torch.Tensor | None = None

    def __len__(self):
        return len(self.grids)

    def pick(self, rows):
        """The images with these numbers, in this order; repeats are allowed."""
        rows = [int(r) for r in rows]
        grids = [self.grids[r] for r in rows]
        if self.grid_thw is None:
            return Images(self.values[rows], grids)
        counts = self.grid_thw.prod(1)
        starts = (counts.cumsum(0) - counts).tolist()
        values = [self.values[starts[r] : starts[r] + int(counts[r])] for r in rows]
        return Images(torch.cat(values) if values else self.values[:0], grids, self.grid_thw[rows])


# -------------------------------------------------------------------------------------------------------------- images


def preprocess_images(processor, images):
    """
    Images as the model takes them, in one call of its processor. images: PIL images, arrays or uint8 tensors (H, W),
    (H, W, 3) or (3, H, W); also one array or tensor (N, H, W).
    """
    ip = getattr(processor, "image_processor", processor)
    if getattr(ip, "do_pan_and_scan", None):
        raise InputError(
            "pan-and-scan is on in preprocessor_config.json: it adds image blocks whose place cannot be told; set"
            " do_pan_and_scan to false"
        )
    pixels = [as_pixels(image).expand(3, -1, -1) for image in images]
    if not pixels:
        raise InputError("there are no images")
    parts = [one_call(ip, pixels[start : start + CHUNK]) for start in range(0, len(pixels), CHUNK)]
    values = torch.cat([part["pixel_values"] for part in parts])
    if "image_grid_thw" not in parts[0]:
        return Images(values, [grid_of(processor, values.shape[-2:])] * len(pixels))
    thw = torch.cat([part["image_grid_thw"] for part in parts])
    return Images(values, [(h // ip.merge_size, w // ip.merge_size) for _, h, w in thw.tolist()], thw)


def one_call(ip, pixels):
    try:
        return ip(images=pixels, return_tensors="pt")
    except ValueError as error:  # Qwen: more than 200 to 1
        raise InputError(f"an image cannot be prepared: {error}") from error


def as_pixels(image):
    """PIL image, array or tensor -> uint8 tensor (C, H, W), C 1 or 3; what is not 8-bit goes through the one reader."""
    if isinstance(image, Image.Image) or (isinstance(image, np.ndarray) and image.dtype != np.uint8):
        image = read_pixels(image)
    pixels = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    if not isinstance(pixels, torch.Tensor):
        raise InputError(f"an image is a PIL image, an array or a tensor, not {type(image).__name__}")
    if pixels.dtype != torch.uint8:
        raise InputError(f"tensors of images must be 8-bit (0 to 255), not {str(pixels.dtype).removeprefix('torch.')}")
    if pixels.ndim == 3 and pixels.shape[-1] in (1, 3) and pixels.shape[0] not in (1, 3):
        pixels = pixels.permute(2, 0, 1)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise InputError(f"an image has the shape (H, W), (H, W, 3) or (3, H, W), this one {tuple(pixels.shape)}")
    return pixels


def grid_of(processor, size):
    """(rows, columns) of the image tokens of a Gemma 3, LLaVA or plain encoder image of `size` pixels."""
    if getattr(processor, "image_seq_length", None):  # Gemma 3: a square, whatever the number of patches
        side = math.isqrt(processor.image_seq_length)
        return side, side
    patch = getattr(processor, "patch_size", None)
    return (size[0] // patch, size[1] // patch) if patch else None


def token_grid(processor, height, width):
    """(rows, columns) of image tokens of an image of this size, without preparing it."""
    ip = processor.image_processor
    size, crop = dict(ip.size), ip.crop_size if getattr(ip, "do_center_crop", None) else None
    if getattr(ip, "merge_size", None):  # Qwen: about the same shape, within limits on the area
        side = ip.patch_size * ip.merge_size
        h, w = smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
        return h // side, w // side
    return grid_of(processor, (crop["height"], crop["width"]) if crop else (size["height"], size["width"]))


# ---------------------------------------------------------------------------------------------------------------- text


def prompt_ids(vlm, text, grids=(), system=None):
    """The user's turn as token ids, int32 (L,), with as many image tokens as the grids (rows, columns) have cells."""
    check_text(vlm, text, system or "")
    rendered = render(vlm.processor, vlm.processor.chat_template, text, len(grids), system)
    mark = vlm.tokenizer.boi_token if vlm.spec.framed else vlm.spec.image_tokens[0]
    if rendered.count(mark) != len(grids):
        raise InputError(
            f"the chat template leaves room for {rendered.count(mark)} images, and there are {len(grids)}: not the"
            " template of this model"
        )
    if vlm.spec.framed:
        rendered = rendered.replace(mark, f"\n\n{mark}{vlm.tokenizer.image_token}{vlm.tokenizer.eoi_token}\n\n")
    # a template that writes the start token itself must not get a second one from the tokenizer
    written = vlm.tokenizer.bos_token is not None and rendered.startswith(vlm.tokenizer.bos_token)
    counts = iter([rows * columns for rows, columns in grids])
    ids = []
    for i in vlm.tokenizer(rendered, add_special_tokens=not written)["input_ids"]:
        ids += [i] * next(counts, 1) if i == vlm.image_token_id else [i]
    return np.array(ids, np.int32)


def check_text(vlm, *texts):
    """InputError for a text with a token that stands for an image, or with half a character."""
    for text in texts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"the text {ascii(text[:60])} is not UTF-8: write it anew")
        if found := next((t for t in vlm.spec.image_tokens if t in text), None):
            raise InputError(f"the text {text[:60]!r} contains {found}, which stands for an image; take it out")


@functools.lru_cache(maxsize=4096)  # questions repeat, and a template takes 0.1 ms
def render(processor, template, text, num_images=0, system=None, answer=None):
    """By the model's own chat template: the prompt as text; with an answer, what follows the prompt."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    messages.append({"role": "user", "content": content})
    apply = functools.partial(processor.apply_chat_template, chat_template=template, tokenize=False)
    prompt = apply(messages, add_generation_prompt=True)
    if answer is None:
        return prompt
    whole = apply([*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}])
    if not whole.startswith(prompt):
        raise InputError(
            "the chat template writes a conversation with an answer differently from the prompt; take the one from"
            " the model's page"
        )
    return whole[len(prompt) :].rstrip("\n")


def around_answer(vlm):
    """-> what the chat template writes in front of an answer, and after it: what ends it."""
    stand_in = "\u00a4answer\u00a4"
    return render(vlm.processor, vlm.processor.chat_template, "?", answer=stand_in).split(stand_in)


def continuation(vlm, text, end=False):
    """
    A response as token ids (list), `end`: with what ends it; and where each token stands in `text` (first and one past
    the last character; what the template adds lies outside).
    """
    before, after = around_answer(vlm)
    encoded = vlm.tokenizer(before + text + after * end, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [(a - len(before), b - len(before)) for a, b in encoded["offset_mapping"]]


# -------------------------------------------------------------------------------------------------------------- store


class ImageStore:
    """
    The images of a data set by number, each file once. Preprocessed once and kept where all of them fit into budget_gib
    GiB, else kept as decoded pixels where those fit, else read again for each batch; `kept` says which.

    images: paths, or uint8 arrays (H, W) or (H, W, 3); equal paths are one image. number_of[i]: the number of the i-th.
    """

    def __init__(self, processor, images, budget_gib=2.0):
        keys = [id(image) if isinstance(image, np.ndarray) else str(image) for image in images]
        first = {}
        for key, image in zip(keys, images, strict=True):
            first.setdefault(key, image)
        numbers = {key: i for i, key in enumerate(first)}
        self.processor, self.sources = processor, list(first.values())
        self.number_of = [numbers[key] for key in keys]
        self.sizes = [size_of(source) for source in self.sources]  # (height, width)
        self.grids = [token_grid(processor, *size) for size in self.sizes]
        self.features = None
        shapes = {
            size: preprocess_images(processor, [np.zeros(size, np.uint8)]).values.nbytes for size in set(self.sizes)
        }
        prepared = sum(shapes[size] for size in self.sizes)
        self.gib = {"preprocessed": prepared / 2**30, "decoded": sum(3 * h * w for h, w in self.sizes) / 2**30}
        self.kept = next((how for how, gib in self.gib.items() if gib <= budget_gib), "on disk")
        self.values = self.pixels = None
        if self.kept == "preprocessed":
            self.values = preprocess_images(processor, [self.read(i) for i in range(len(self.sources))])
        elif self.kept == "decoded":
            self.pixels = [self.read(i) for i in range(len(self.sources))]

    def __len__(self):
        return len(self.sources)

    def __str__(self):
        how = (
            f"{self.kept}, {self.gib[self.kept]:.2f} GiB"
            if self.kept in self.gib
            else "on disk and read for each batch"
        )
        return f"{len(self)} images, kept {how}"

    def read(self, number):
        source = self.sources[number]
        if isinstance(source, np.ndarray) and source.dtype == np.uint8:
            return as_pixels(source)
        try:
            return as_pixels(read_pixels(source))
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def get(self, numbers):
        """-> Images of these numbers, in this order."""
        if self.values is not None:
            return self.values.pick(numbers)
        return preprocess_images(
            self.processor, [self.pixels[n] if self.pixels is not None else self.read(n) for n in numbers]
        )

    @torch.no_grad()
    def cache_features(self, compute, budget_gib, batch_size=16):
        """
        Run a frozen tower over all images once and keep what it gives, on the CPU -> GiB. compute: Images -> one tensor
        per image, such as features_of of passes.py. InputError when they would not fit into budget_gib GiB.
        """
        found, need = [], 0.0
        for start in range(0, len(self), batch_size):
            found += [f.cpu() for f in compute(self.get(range(start, min(len(self), start + batch_size))))]
            need = sum(f.nbytes for f in found) / len(found) * len(self) / 2**30
            if need > budget_gib:
                raise InputError(
                    f"the features of {len(self)} images take {need:.2f} GiB, more than --cache-gib {budget_gib:g}:"
                    " raise it, lower --max-pixels, or leave --cache-features out"
                )
        self.features = found
        return need


def size_of(source):
    """(height, width) of an array, or of an image file, without decoding it where Pillow can tell. InputError."""
    if isinstance(source, np.ndarray):
        return source.shape[:2]
    try:
        width, height = image_size(source)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return height, width
