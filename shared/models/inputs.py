"""
From questions and images to what a model takes, for every family alike, and where in it the image tokens are.

    inputs = build_inputs(vlm, ["Is there a nodule?", "Is this film normal?"], [image, other_image])
    vlm.model(**inputs.tensors)                      # left-padded batch
    inputs.image_positions[0][0]                     # columns of the first case's image tokens, row by row of its grid
    inputs.grids[0][0]                               # (rows, columns) of that grid
    generate_text(vlm, inputs, max_new_tokens=20)    # -> ["yes", "no"]

For training, preprocess all images once, in one go, and pick from them; give the answers to get labels:

    images = preprocess_images(vlm.processor, films)             # films: uint8 arrays, tensors or PIL images
    inputs = build_inputs(vlm, questions, images.pick(rows), answers=answers)
    loss = vlm.model(**inputs.tensors).loss                      # labels are -100 but for the answer and the token that
    ends it

Text and tensors equal those of the processor's own apply_chat_template (tests/test_shared_models_inputs.py). In a loop
that takes 0.7 ms per case on an idle core and 20 ms on busy ones, as much as the step of a small model; here it is 0.1
to 0.2 ms, and 0.04 with the images ready (benchmarks/loading.py). What is different: images are handled together, grey
ones as one channel, and the number of image tokens is checked against the grid, so that a template applied twice or not
at all stops.
"""

import functools
import math
from dataclasses import dataclass, field

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
from PIL import Image

from shared.models.loading import FAMILIES
from shared.runtime import InputError

try:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv
except ImportError:  # without torchvision the processors' Pillow classes do the work
    tv = None

IGNORED = -100  # label of tokens that are not learned: prompt, image, padding
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


@dataclass
class Inputs:
    """
    One left-padded batch. image_positions[case][image]: columns (tokens,) of its tokens; grids[case][image]: (rows,
    columns).
    """

    tensors: dict = field(repr=False)
    image_positions: list = field(repr=False)
    grids: list

    @property
    def length(self):
        """Columns of the batch: what generate returns goes on from here."""
        return self.tensors["input_ids"].shape[1]

    def to(self, device):
        return Inputs({k: v.to(device) for k, v in self.tensors.items()}, self.image_positions, self.grids)

    def repeat(self, n):
        """
        Each case n times in a row (a, a, b, b), for several completions of one prompt. Qwen2-VL's pixel values are
        patch rows of all images one after the other, so whole blocks are repeated; repeating the tensor as it is mixes
        up the images.
        """
        blocks = [len(case) for case in self.grids]  # images per case
        out = {}
        for name, value in self.tensors.items():
            if name == "pixel_values":
                parts = (
                    [1] * sum(blocks)
                    if "image_grid_thw" not in self.tensors
                    else self.tensors["image_grid_thw"].prod(1).tolist()
                )
            elif name == "image_grid_thw":
                parts = [1] * sum(blocks)
            else:
                out[name] = value.repeat_interleave(n, 0)
                continue
            images, cases = iter(value.split(parts)), []
            for count in blocks:
                case = [next(images) for _ in range(count)]
                cases += case * n
            out[name] = torch.cat(cases)
        many = [i for i in range(len(self.grids)) for _ in range(n)]
        return Inputs(out, [self.image_positions[i] for i in many], [self.grids[i] for i in many])


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
    """-> uint8 tensor (C, H, W), C 1 or 3."""
    if isinstance(image, Image.Image):
        image = np.array(image if image.mode == "L" else image.convert("RGB"))
    pixels = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    if not isinstance(pixels, torch.Tensor):
        raise InputError(f"an image is a PIL image, an array or a tensor, not {type(image).__name__}")
    if pixels.dtype != torch.uint8:
        raise InputError(
            f"images must be 8-bit (0 to 255), not {str(pixels.dtype).removeprefix('torch.')}: scale them first"
            " (shared/data/images.py)"
        )
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


def build_inputs(vlm, questions, images=None, answers=None, system=None):
    """
    questions: texts; images: Images with one image per question, or a list with one image, a list of images, or None
    each; answers: texts, for training (adds `labels`); system: instruction in front. -> Inputs on the model's device,
    left-padded. InputError when text and images do not fit together.
    """
    cases = len(questions)
    if answers is not None and len(answers) != cases:
        raise InputError(f"there are {cases} questions and {len(answers)} answers")
    images, per_case = as_images(vlm.processor, images, cases)
    placeholders = FAMILIES[vlm.family].image_tokens
    for text in [*questions, *([system] if system else []), *(answers or ())]:
        found = next((t for t in placeholders if t in text), None)
        if found:
            raise InputError(f"the text {text[:60]!r} contains {found}, which stands for an image; take it out")
    grids = iter(images.grids if images else ())
    case_grids = [[next(grids) for _ in range(n)] for n in per_case]

    template = vlm.processor.chat_template
    texts = [
        render(vlm.processor, template, q, n, system, None if answers is None else answers[i])
        for i, (q, n) in enumerate(zip(questions, per_case, strict=True))
    ]
    rows = token_ids(
        vlm.tokenizer,
        [mark_images(vlm.family, vlm.tokenizer, prompt, n) for (prompt, _), n in zip(texts, per_case, strict=True)],
    )
    rows = [spread(row, vlm.image_token_id, case) for row, case in zip(rows, case_grids, strict=True)]
    starts = [len(row) for row in rows]
    if answers is not None:
        rows = [
            r + a
            for r, a in zip(
                rows, vlm.tokenizer([a for _, a in texts], add_special_tokens=False)["input_ids"], strict=True
            )
        ]
    longest = max(map(len, rows))
    pad = vlm.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    is_image = (ids == vlm.image_token_id) & mask.bool()
    tensors = {"input_ids": ids, "attention_mask": mask}
    # Gemma 3 lets image tokens see each other both ways, Qwen2-VL counts positions in rows and columns: both need to
    # know.
    kinds = {"gemma3": "token_type_ids", "qwen2vl": "mm_token_type_ids"}.get(vlm.family)
    if kinds:
        tensors[kinds] = is_image.long()
    if answers is not None:
        labels = torch.full_like(ids, IGNORED)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            labels[i, longest - len(row) + start :] = torch.tensor(row[start:])
        tensors["labels"] = labels
    if images:
        tensors["pixel_values"] = images.values.to(vlm.dtype)
        if images.grid_thw is not None:
            tensors["image_grid_thw"] = images.grid_thw
    return Inputs(tensors, positions_of(is_image, case_grids), case_grids).to(vlm.device)


def as_images(processor, images, cases):
    """-> (Images or None, number of images of each case)."""
    if images is None:
        return None, [0] * cases
    if isinstance(images, Images):
        if len(images) != cases:
            raise InputError(f"there are {cases} questions and {len(images)} images")
        return images, [1] * cases
    if len(images) != cases:
        raise InputError(f"there are {cases} questions and {len(images)} images")
    nested = [[] if image is None else list(image) if isinstance(image, (list, tuple)) else [image] for image in images]
    flat = [image for case in nested for image in case]
    return (preprocess_images(processor, flat) if flat else None), [len(case) for case in nested]


@functools.lru_cache(maxsize=4096)  # questions repeat, and a template takes 0.1 ms
def render(processor, template, question, num_images, system, answer):
    """
    -> (prompt as text, what follows it: answer and the token that ends it, or None), by the model's own chat template.
    """
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": content})
    prompt = processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    if answer is None:
        return prompt, None
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    whole = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
    if not whole.startswith(prompt):
        raise InputError(
            "the chat template writes a conversation with an answer differently from the prompt alone; take the one"
            " from the model's page"
        )
    return prompt, whole[len(prompt) :].rstrip("\n")


def mark_images(family, tokenizer, text, num_images):
    """
    The prompt with one image token per image, as the processor frames it. InputError when the template has other
    places.
    """
    mark = tokenizer.boi_token if family == "gemma3" else FAMILIES[family].image_tokens[0]
    if text.count(mark) != num_images:
        raise InputError(
            f"the chat template leaves room for {text.count(mark)} images, and there are {num_images}: it is not the"
            " template of this model"
        )
    return (
        text.replace(mark, f"\n\n{mark}{tokenizer.image_token}{tokenizer.eoi_token}\n\n")
        if family == "gemma3"
        else text
    )


def spread(ids, image_token_id, grids):
    """
    One image token per image -> as many as its grid has cells. The same ids as from a text with that many, and faster.
    """
    counts = iter([rows * columns for rows, columns in grids])
    out = []
    for i in ids:
        out += [i] * next(counts, 1) if i == image_token_id else [i]
    return out


def token_ids(tokenizer, texts):
    """A template that writes the start token itself must not get a second one from the tokenizer."""
    written = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    return tokenizer(texts, add_special_tokens=not written)["input_ids"]


def positions_of(is_image, grids):
    """bool (B, L) -> per case and image the columns of its tokens. InputError when their number is not the grid's."""
    positions = []
    for i, (row, case) in enumerate(zip(is_image, grids, strict=True)):
        columns = row.nonzero()[:, 0]
        sizes = [r * c for r, c in case]
        if len(columns) != sum(sizes):
            raise InputError(
                f"case {i} has {len(columns)} image tokens, and its images need {sum(sizes)}: processor and model do"
                " not belong together"
            )
        parts = list(columns.split(sizes)) if sizes else []
        if any(len(p) and int(p[-1] - p[0]) != len(p) - 1 for p in parts):
            raise InputError(
                f"case {i}: the tokens of an image do not stand together: processor and model do not belong together"
            )
        positions.append(parts)
    return positions


# ---------------------------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate_text(vlm, inputs, max_new_tokens=64, **options):
    """
    What the model writes for each case (list of texts); options go to generate(). Greedy unless do_sample is given.
    """
    sequences = vlm.model.generate(
        **{k: v for k, v in inputs.tensors.items() if k != "labels"},
        max_new_tokens=max_new_tokens,
        **{"do_sample": False} | options,
    )
    return decode(vlm, sequences, inputs.length)


def decode(vlm, sequences, start=0):
    """Token ids (B, L) from column `start` on -> texts without special tokens."""
    return [text.strip() for text in vlm.tokenizer.batch_decode(sequences[:, start:], skip_special_tokens=True)]
