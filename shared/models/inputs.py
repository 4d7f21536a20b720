"""
From images and texts to what a vision-language model takes, for every family alike; and a store of a data set's images.

    images = preprocess_images(vlm.processor, films)             # films: uint8 arrays, tensors or PIL images
    images.values, images.grids                                  # pixels; (rows, columns) of each image's tokens

    prompt_ids(vlm, "Is there a nodule?", images.grids[:1])      # as tokens, the image's included
    continuation(vlm, "yes", end=True)                           # a response as tokens, and where each stands in it

    store = ImageStore(vlm.processor, [row["image"] for row in rows], budget_gib=2)
    store.cache_features(lambda images: features_of(vlm, images), budget_gib=2)      # of a frozen tower, once

Values equal the processor's own to the last bit (tests/test_shared_models_inputs.py). In a loop that takes 0.7 ms per
image on an idle core and 20 ms on busy ones, as much as the step of a small model; here images are handled together,
grey ones as one channel (benchmarks/loading.py).
"""

import functools
import math
from dataclasses import dataclass

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
from PIL import Image

from shared.data.images import read_pixels
from shared.runtime import InputError

try:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv
except ImportError:  # without torchvision the processors' Pillow classes do the work
    tv = None

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
    Images as the model takes them. images: PIL images, uint8 arrays or tensors (H, W), (H, W, 3) or (3, H, W); also one
    array or tensor (N, H, W). Equal to the processor's own output to the last bit.
    """
    ip = getattr(processor, "image_processor", processor)
    pixels = [as_pixels(image) for image in images]
    if not pixels:
        raise InputError("there are no images")
    if tv is None or unusual(ip):
        return by_processor(processor, ip, pixels)
    groups = {}
    for i, p in enumerate(pixels):
        groups.setdefault(tuple(p.shape), []).append(i)
    order, values, thw = [], [], []
    for group in groups.values():
        for start in range(0, len(group), CHUNK):
            some = group[start : start + CHUNK]
            done, grid = transform(ip, torch.stack([pixels[i] for i in some]))
            order += some
            values.append(done)
            thw += [grid] * len(some)
    back = np.argsort(order).tolist() if len(groups) > 1 else None
    if thw[0] is None:
        values = torch.cat(values) if len(values) > 1 else values[0].contiguous()
        values = values if back is None else values[back]
        return Images(values, [grid_of(processor, values.shape[-2:])] * len(values))
    if back is not None:
        rows = [row for done in values for row in done]
        values, thw = [rows[i] for i in back], [thw[i] for i in back]
        values = torch.cat(values)
    else:
        values = torch.cat([done.flatten(0, 1) for done in values]) if len(values) > 1 else values[0].flatten(0, 1)
    return Images(values, [(h // ip.merge_size, w // ip.merge_size) for _, h, w in thw], torch.tensor(thw))


def unusual(ip):
    """Settings that transform() does not follow; the processor itself then does the work."""
    crop = dict(ip.crop_size) if getattr(ip, "do_center_crop", None) else None
    size = dict(ip.size)
    side = size.get("shortest_edge") or size.get("height")
    enlarging = crop is not None and (side is None or max(crop["height"], crop["width"]) > side)
    return (
        getattr(ip, "backend", "torchvision") != "torchvision"
        or getattr(ip, "do_pan_and_scan", None)
        or enlarging
        or not (ip.do_resize and ip.do_rescale and ip.do_normalize)
    )


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


def transform(ip, pixels):
    """
    uint8 (N, C, H, W) of one size -> float32 (N, 3, h, w) and None, or patch rows (N, patches, dim) and their (t, h,
    w).
    """
    height, width = pixels.shape[-2:]
    if getattr(ip, "do_pad", None) and height != width:  # LLaVA's "pad": a square with the mean colour around the image
        side, fill = max(height, width), [int(255 * m) for m in ip.image_mean]
        left, top = (side - width) // 2, (side - height) // 2
        pixels = tv.pad(pixels.expand(-1, 3, -1, -1), [left, top, side - width - left, side - height - top], fill=fill)
        height = width = side
    merge = getattr(ip, "merge_size", None)
    size = target_size(ip, height, width)
    pixels = tv.resize(pixels, list(size), interpolation=INTERPOLATION[int(ip.resample)], antialias=True)
    if getattr(ip, "do_center_crop", None):
        crop = ip.crop_size["height"], ip.crop_size["width"]
        top, left = (
            (size[0] - crop[0]) // 2,
            (size[1] - crop[1]) // 2,
        )  # torchvision's own center_crop rounds halves differently
        pixels = pixels[..., top : top + crop[0], left : left + crop[1]]
    mean, std = (torch.tensor(v) * (1 / ip.rescale_factor) for v in (ip.image_mean, ip.image_std))
    if merge is None:
        if (mean == mean[0]).all() and (std == std[0]).all():  # then grey stays one channel until the end
            mean, std = mean[:1], std[:1]
        return pixels.float().sub(mean[:, None, None]).div_(std[:, None, None]).expand(-1, 3, -1, -1), None
    p, rows, columns = ip.patch_size, size[0] // ip.patch_size, size[1] // ip.patch_size
    # (N, C, rows/m, m, p, columns/m, m, p) -> cells of m x m patches one after the other: (N, patches, C, 1, p, p)
    blocks = pixels.reshape(len(pixels), -1, rows // merge, merge, p, columns // merge, merge, p).permute(
        0, 2, 5, 3, 6, 1, 4, 7
    )
    blocks = blocks.reshape(
        len(pixels), rows * columns, -1, 1, p, p
    )  # still bytes: this is the copy that jumps about in memory
    values = blocks.float().sub(mean[:, None, None, None]).div_(std[:, None, None, None])
    values = values.expand(-1, -1, 3, ip.temporal_patch_size, -1, -1)  # a still is a film of two equal frames
    return values.reshape(len(values), rows * columns, -1), (1, rows, columns)


INTERPOLATION = (
    {}
    if tv is None
    else {
        2: InterpolationMode.BILINEAR,
        3: InterpolationMode.BICUBIC,
        0: InterpolationMode.NEAREST,
        1: InterpolationMode.LANCZOS,
    }
)


def target_size(ip, height, width):
    """(height, width) that the processor resizes an image to."""
    size = dict(ip.size)
    if getattr(
        ip, "merge_size", None
    ):  # Qwen2-VL: multiples of 28 px with about the same shape, within limits on the area
        factor, low, high = ip.patch_size * ip.merge_size, size["shortest_edge"], size["longest_edge"]
        if max(height, width) > 200 * min(height, width):
            raise InputError(
                f"an image of {width}x{height} pixels is too long and narrow for Qwen2-VL: at most 200 to 1"
            )
        h, w = round(height / factor) * factor, round(width / factor) * factor
        if h * w > high:
            scale = math.sqrt(height * width / high)
            h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
        elif h * w < low:
            scale = math.sqrt(low / (height * width))
            h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
        return h, w
    if size.get("height"):
        return size["height"], size["width"]
    short, long = min(height, width), max(height, width)
    new_short, new_long = size["shortest_edge"], int(size["shortest_edge"] * long / short)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def by_processor(processor, ip, pixels):
    """The processor's own way, all images in one call."""
    rgb = [Image.fromarray(p.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()) for p in pixels]
    if getattr(ip, "do_pan_and_scan", None):
        raise InputError(
            "pan-and-scan is on in preprocessor_config.json: it adds image blocks whose place cannot be told; set"
            " do_pan_and_scan to false"
        )
    done = ip(images=rgb, return_tensors="pt")
    if "image_grid_thw" in done:
        return Images(
            done["pixel_values"],
            [(h // ip.merge_size, w // ip.merge_size) for _, h, w in done["image_grid_thw"].tolist()],
            done["image_grid_thw"],
        )
    return Images(done["pixel_values"], [grid_of(processor, done["pixel_values"].shape[-2:])] * len(rgb))


def grid_of(processor, size):
    """(rows, columns) of the image tokens of a Gemma 3, LLaVA or plain encoder image of `size` pixels."""
    if getattr(processor, "image_seq_length", None):  # Gemma 3: a square, whatever the number of patches
        side = math.isqrt(processor.image_seq_length)
        return side, side
    patch = getattr(processor, "patch_size", None)
    return (size[0] // patch, size[1] // patch) if patch else None


# ---------------------------------------------------------------------------------------------------------------- text


def prompt_ids(vlm, text, grids=(), system=None):
    """The user's turn as token ids, int32 (L,), with as many image tokens as the grids (rows, columns) have cells."""
    check_text(vlm, text, system or "")
    rendered = render(vlm.processor, vlm.processor.chat_template, text, len(grids), system)
    mark = vlm.tokenizer.boi_token if vlm.family == "gemma3" else vlm.spec.image_tokens[0]
    if rendered.count(mark) != len(grids):
        raise InputError(
            f"the chat template leaves room for {rendered.count(mark)} images, and there are {len(grids)}: not the"
            " template of this model"
        )
    if vlm.family == "gemma3":
        rendered = rendered.replace(mark, f"\n\n{mark}{vlm.tokenizer.image_token}{vlm.tokenizer.eoi_token}\n\n")
    # a template that writes the start token itself must not get a second one from the tokenizer
    written = vlm.tokenizer.bos_token is not None and rendered.startswith(vlm.tokenizer.bos_token)
    counts = iter([rows * columns for rows, columns in grids])
    ids = []
    for i in vlm.tokenizer(rendered, add_special_tokens=not written)["input_ids"]:
        ids += [i] * next(counts, 1) if i == vlm.image_token_id else [i]
    return np.array(ids, np.int32)


def check_text(vlm, *texts):
    """InputError for a text with a token that stands for an image."""
    for text in texts:
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
        ip = processor.image_processor
        if getattr(ip, "merge_size", None):
            values = (
                sum(r * c for r, c in self.grids) * ip.merge_size**2 * 3 * ip.temporal_patch_size * ip.patch_size**2
            )
        else:
            h, w = pixel_size(ip, *self.sizes[0]) if self.sizes else (0, 0)
            values = len(self.sizes) * 3 * h * w
        self.gib = {"preprocessed": values * 4 / 2**30, "decoded": sum(3 * h * w for h, w in self.sizes) / 2**30}
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
        with Image.open(source) as image:
            turned = image.getexif().get(274, 1) > 4  # the camera lay on its side
            return image.size if turned else image.size[::-1]
    except (OSError, SyntaxError, ValueError):  # DICOM and .npy; missing and damaged files get their sentence
        try:
            return read_pixels(source).shape[:2]
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def pixel_size(ip, height, width):
    """(height, width) of what the model gets for an image of this size (all families but Qwen2-VL get one size)."""
    crop = ip.crop_size if getattr(ip, "do_center_crop", None) else None
    return (crop["height"], crop["width"]) if crop else target_size(ip, height, width)


def token_grid(processor, height, width):
    """(rows, columns) of image tokens of an image of this size."""
    ip = processor.image_processor
    h, w = pixel_size(ip, height, width)
    side = getattr(ip, "merge_size", None) and ip.patch_size * ip.merge_size
    return (h // side, w // side) if side else grid_of(processor, (h, w))
