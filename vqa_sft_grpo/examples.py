"""
From prepared rows to training batches: tokens with weights, images kept in memory, batches in an order that can be
resumed.

    images = ImageStore(vlm.processor, [row["image"] for row in rows], budget_gib=2)
    examples = make_examples(vlm, rows, images, styles=("json", "think"), max_length=2048)
    for batch in epoch_batches(examples, batch_size=32, per_image=4, seed=0, epoch=3):     # lists of numbers of
    examples
        total, weight = batch_loss(vlm, [examples[i] for i in batch], images)
        (total / weight).backward()

An example is one row in one prompt style. The loss is on the answer and the token that ends it; prompt and image are
not learned.

What questions about one image have in common is computed once: the image goes through the vision tower once per batch,
and with share_prompt the beginning of the prompt (system text, image, instruction) goes through the language model
once, its keys and values serving all its questions. The loss and its gradient are those of the plain way to rounding
(tests).
"""

import functools
import itertools
import random
import re
from dataclasses import dataclass
from types import SimpleNamespace

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DynamicCache

from shared.models.inputs import IGNORED, as_pixels, grid_of, mark_images, preprocess_images, render, spread
from shared.models.inputs import target_size, token_ids
from shared.models.loading import FAMILIES
from shared.runtime import InputError
from vqa_sft_grpo.prompting import build_prompt, build_target

BLOCK = 16  # batches whose examples are sorted by length together: more saves padding, fewer mixes better
MARKS = {"json": '"answer":', "think": "<answer>"}  # where the answer begins in a target
BOXES = re.compile(r'(?<="boxes": )\[\[[\d, \[\]]*\]\]')


# -------------------------------------------------------------------------------------------------------------- images


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
        held = {
            "preprocessed": f"preprocessed, {self.gib['preprocessed']:.2f} GiB",
            "decoded": f"decoded, {self.gib['decoded']:.2f} GiB",
        }
        return f"{len(self)} images, kept {held.get(self.kept, 'on disk and read for each batch')}"

    def read(self, number):
        source = self.sources[number]
        return as_pixels(source) if isinstance(source, np.ndarray) else as_pixels(read_pixels(source))

    def get(self, numbers):
        """-> Images of these numbers, in this order."""
        if self.values is not None:
            return self.values.pick(numbers)
        return preprocess_images(
            self.processor, [self.pixels[n] if self.pixels is not None else self.read(n) for n in numbers]
        )

    @torch.no_grad()
    def cache_features(self, vlm, budget_gib, batch_size=16):
        """
        Run the frozen tower and projector over all images once and keep what they give, in the computing dtype on the
        CPU.
        """
        config = vlm.config.get_text_config()
        need = sum(r * c for r, c in self.grids) * config.hidden_size * torch.finfo(vlm.dtype).bits / 8 / 2**30
        if need > budget_gib:
            raise InputError(
                f"--cache-features: the features of {len(self)} images take {need:.2f} GiB and --cache-gib is"
                f" {budget_gib:g}; raise it, lower --max-pixels, or leave --cache-features out"
            )
        features = []
        for start in range(0, len(self), batch_size):
            numbers = range(start, min(len(self), start + batch_size))
            features += [f.cpu() for f in image_features(vlm, self.get(numbers))]
        self.features = features
        return need


def size_of(source):
    """
    (height, width) of an array, or of an image file without decoding it. InputError when it is missing or not an image.
    """
    if isinstance(source, np.ndarray):
        return source.shape[:2]
    try:
        with Image.open(source) as image:
            return image.size[::-1]
    except FileNotFoundError as error:
        raise InputError(
            f"the image {source} is not there; make the rows again with prepare_data.py, or run from the folder where"
            " that was done"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the image {source} cannot be read ({str(error).splitlines()[0]})") from error


def read_pixels(path):
    try:
        with Image.open(path) as image:
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the image {path} is damaged or cut short ({str(error).splitlines()[0]})") from error


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


def image_features(vlm, images):
    """Images -> list of (tokens, width) tensors, one per image: tower and projector."""
    extra = {} if images.grid_thw is None else {"image_grid_thw": images.grid_thw.to(vlm.device)}
    found = vlm.base.model.get_image_features(
        images.values.to(vlm.device, vlm.dtype), return_dict=True, **extra
    ).pooler_output
    return list(found)


# ------------------------------------------------------------------------------------------------------------ examples


@dataclass
class Example:
    """One row in one prompt style, as tokens."""

    row: int  # number of the row
    style: str
    image: int  # number in the ImageStore
    prompt: np.ndarray  # int32; as many image tokens as the grid has cells
    target: np.ndarray  # int32; the text to learn and the token that ends it
    weights: np.ndarray  # float32, of the target's tokens in the loss

    @property
    def length(self):
        return len(self.prompt) + len(self.target)


def prompt_tokens(vlm, question, style, grid):
    """
    The user's turn about one image -> int32 (L,), with as many image tokens as the grid (rows, columns) has cells.
    """
    text, _ = render(vlm.processor, vlm.processor.chat_template, build_prompt(question, style), 1, None, None)
    marked = mark_images(vlm.family, vlm.tokenizer, text, 1)
    return np.array(spread(token_ids(vlm.tokenizer, [marked])[0], vlm.image_token_id, [grid]), np.int32)


def around_answer(vlm):
    """-> what the chat template writes in front of an answer and after it."""
    stand_in = "\u00a4answer\u00a4"
    _, ending = render(vlm.processor, vlm.processor.chat_template, "?", 1, None, stand_in)
    return ending.split(stand_in)


def make_examples(vlm, rows, images, styles, max_length=2048, answer_weight=1.0, box_weight=1.0):
    """
    rows of prepare_data.py, images.number_of[i] being the image of row i -> Examples, row by row, style by style.
    answer_weight, box_weight: weights in the loss of the tokens of the answer itself and of the boxes; all others have
    1. InputError, with the numbers, for an example longer than max_length tokens: cutting it would leave image tokens
    without their features, or an answer without its end.
    """
    placeholders = FAMILIES[vlm.family].image_tokens
    tokenizer = vlm.tokenizer
    before, after = around_answer(vlm)
    tokens_of = functools.cache(functools.partial(prompt_tokens, vlm))
    examples = []
    for i, row in enumerate(rows):
        grid = images.grids[images.number_of[i]]
        for style in styles:
            target = build_target(row, style)
            found = next((t for t in placeholders if t in target or t in row["question"]), None)
            if found:
                raise InputError(f"row {i} contains {found}, which stands for an image; take it out")
            encoded = tokenizer(before + target + after, add_special_tokens=False, return_offsets_mapping=True)
            characters = np.ones(len(before + target + after), np.float32)
            if boxes := style == "json" and BOXES.search(target):
                characters[len(before) + boxes.start() : len(before) + boxes.end()] = box_weight
            characters[len(before) + target.rfind(MARKS[style]) + len(MARKS[style]) :] = answer_weight
            weights = np.array([characters[end - 1] for _, end in encoded["offset_mapping"]], np.float32)
            example = Example(
                i,
                style,
                images.number_of[i],
                tokens_of(row["question"], style, grid),
                np.array(encoded["input_ids"], np.int32),
                weights,
            )
            if example.length > max_length:
                tokens = grid[0] * grid[1]
                raise InputError(
                    f"row {i} ({row['image']}) has {example.length} tokens, {tokens} of the image,"
                    f" {len(example.prompt) - tokens} of the question and {len(example.target)} of the answer, and"
                    f" --max-length is {max_length}: raise it, or lower --max-pixels; nothing is ever cut off"
                )
            examples.append(example)
    return examples


def epoch_batches(examples, batch_size, per_image=1, seed=0, epoch=0):
    """
    Every example once -> list of lists of numbers of examples. It depends on the arguments alone, so a run is resumed
    at batch k by taking the batches from k on.

    Up to per_image questions about one image in one style stay side by side, so that what they share is computed once.
    Those groups are shuffled; within BLOCK batches they are sorted by length, so that little is padding; the batches
    are shuffled.
    """
    draw = random.Random(f"{seed} {epoch}")
    order = list(range(len(examples)))
    draw.shuffle(order)
    groups = {}
    for i in order:
        groups.setdefault((examples[i].image, examples[i].style), []).append(i)
    units = [members[k : k + per_image] for members in groups.values() for k in range(0, len(members), per_image)]
    draw.shuffle(units)
    batches, block, size = [], [], 0
    for n, unit in enumerate(units):
        block.append(unit)
        size += len(unit)
        if size >= BLOCK * batch_size or n == len(units) - 1:
            block.sort(key=lambda u: max(examples[i].length for i in u))
            flat = list(itertools.chain.from_iterable(block))
            batches += [flat[k : k + batch_size] for k in range(0, len(flat), batch_size)]
            block, size = [], 0
    draw.shuffle(batches)
    return batches


# ---------------------------------------------------------------------------------------------------------------- loss


class ready_features:
    """
    with ready_features(vlm, features): the model takes these features, one (tokens, width) tensor per image, for its
    images.
    """

    def __init__(self, vlm, features):
        self.model = vlm.base.model
        stacked = torch.stack(features) if vlm.family == "gemma3" else features  # as each class expects its own output
        self.output = SimpleNamespace(pooler_output=stacked)

    def __enter__(self):
        self.model.get_image_features = lambda *args, **options: self.output

    def __exit__(self, *exception):
        del self.model.get_image_features


def batch_loss(vlm, batch, images, share_prompt=False, train_tower=False):
    """
    batch: Examples -> (sum over learned tokens of weight * cross entropy, sum of the weights), float32 scalars on the
    device. share_prompt: compute the common beginning of the prompts once per image (needs activations kept, no
    checkpointing). train_tower: gradients go into the vision tower; otherwise it runs without them, or its cached
    features are taken.
    """
    unique = list(dict.fromkeys(e.image for e in batch))
    if images.features is not None:
        features = [images.features[n].to(vlm.device) for n in unique]
    else:
        with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
            features = image_features(vlm, images.get(unique))
    feature_of = dict(zip(unique, features, strict=True))
    cut = shared_lengths(batch, vlm.image_token_id) if share_prompt else None
    if cut is not None:
        logits, targets, weights = shared_prompt_logits(vlm, batch, images, feature_of, cut)
    else:
        logits, targets, weights = plain_logits(vlm, batch, images, feature_of)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return (losses * weights.flatten()).sum(), weights.sum()


def padded(rows, fill, side):
    """Rows of different lengths -> int64 (B, longest); side "left": the padding comes first."""
    longest = max(map(len, rows))
    out = np.full((len(rows), longest), fill, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[slice(longest - len(row), None) if side == "left" else slice(len(row))] = row
    return torch.from_numpy(out)


def image_tensors(vlm, grids):
    """
    What the forward pass wants to see of images whose features are ready: any value in place of the pixels, and the
    (rows, columns) of each.
    """
    tensors = {"pixel_values": torch.zeros(1, device=vlm.device, dtype=vlm.dtype)}
    if vlm.family == "qwen2vl":
        merge = vlm.processor.image_processor.merge_size
        tensors["image_grid_thw"] = torch.tensor([[1, r * merge, c * merge] for r, c in grids], device=vlm.device)
    return tensors


KINDS = {
    "gemma3": "token_type_ids",
    "qwen2vl": "mm_token_type_ids",
}  # where the image tokens are, as each family wants to be told


def plain_logits(vlm, batch, images, feature_of):
    """
    Left-padded whole texts -> logits (B, T, vocabulary) that predict the last T tokens, targets and weights (B, T).
    """
    pad = vlm.tokenizer.pad_token_id
    rows = [np.concatenate([e.prompt, e.target]) for e in batch]
    ids, mask = (
        padded(rows, pad, "left").to(vlm.device),
        padded([np.ones(len(r)) for r in rows], 0, "left").to(vlm.device),
    )
    longest = max(len(e.target) for e in batch)
    targets = padded([e.target for e in batch], IGNORED, "left").to(vlm.device)
    weights = padded_weights([e.weights for e in batch], longest, "left").to(vlm.device)
    tensors = {"input_ids": ids, "attention_mask": mask} | image_tensors(vlm, [images.grids[e.image] for e in batch])
    if vlm.family in KINDS:
        tensors[KINDS[vlm.family]] = (ids == vlm.image_token_id).long()
    with ready_features(vlm, [feature_of[e.image] for e in batch]):
        # Logits of the prompt are not needed: with 150,000 words they would be most of the memory.
        logits = vlm.model(**tensors, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    return logits, targets, weights


def padded_weights(rows, longest, side):
    out = torch.zeros(len(rows), longest)
    for line, row in zip(out, rows, strict=True):
        line[slice(longest - len(row), None) if side == "left" else slice(len(row))] = torch.from_numpy(row)
    return out


def shared_lengths(batch, image_token_id):
    """
    Examples -> {style: how many first tokens all prompts of that style have in common}; None where sharing saves
    little, or where the common part ends before the image does (images with different numbers of tokens).
    """
    if len({(e.image, e.style) for e in batch}) > 0.75 * len(batch):
        return None
    lengths = {}
    for style in {e.style for e in batch}:
        prompts = [e.prompt for e in batch if e.style == style]
        shortest = min(map(len, prompts))
        same = np.all([p[:shortest] == prompts[0][:shortest] for p in prompts], axis=0)
        common = min(shortest - 1, shortest if same.all() else int(same.argmin()))
        if common <= max(int(np.flatnonzero(p == image_token_id)[-1]) for p in prompts):
            return None
        lengths[style] = common
    return lengths


def shared_prompt_logits(vlm, batch, images, feature_of, cut):
    """
    As plain_logits, with the common beginning of the prompts computed once per image and style. Columns are
    [beginning, left-padded][rest of the prompt, left-padded][target, right-padded]; positions are given, so padding
    anywhere is harmless.
    """
    pad, kind = vlm.tokenizer.pad_token_id, KINDS.get(vlm.family)
    begin = padded([e.prompt[: cut[e.style]] for e in batch], -1, "left")
    rest = padded([e.prompt[cut[e.style] :] for e in batch], -1, "left")
    targets = padded([e.target for e in batch], -1, "right")
    ids = torch.cat([begin, rest, targets], 1).to(vlm.device)
    mask = (ids >= 0).long()
    ids = ids.clamp(min=0).masked_fill(mask == 0, pad)
    is_image = ((ids == vlm.image_token_id) & mask.bool()).long()
    extra = image_tensors(vlm, [images.grids[e.image] for e in batch])
    if vlm.family == "qwen2vl":
        positions = vlm.base.model.get_rope_index(
            ids, is_image, image_grid_thw=extra["image_grid_thw"], attention_mask=mask
        )[0]  # (3, B, L)
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)

    groups = list(dict.fromkeys((e.image, e.style) for e in batch))
    number = {group: i for i, group in enumerate(groups)}
    first = [next(i for i, e in enumerate(batch) if (e.image, e.style) == group) for group in groups]
    columns = begin.shape[1]
    tensors = {
        "input_ids": ids[first, :columns],
        "attention_mask": mask[first, :columns],
        "position_ids": positions[..., first, :columns],
    }
    tensors |= image_tensors(vlm, [images.grids[image] for image, _ in groups])
    if kind:
        tensors[kind] = is_image[first, :columns]
    cache = DynamicCache(config=vlm.config.get_text_config())
    with ready_features(vlm, [feature_of[image] for image, _ in groups]):
        vlm.model(**tensors, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.tensor([number[e.image, e.style] for e in batch], device=vlm.device))
    tensors = {"input_ids": ids[:, columns:], "attention_mask": mask, "position_ids": positions[..., columns:]}
    if kind:
        tensors[kind] = is_image[:, columns:]
    logits = vlm.model(**tensors, past_key_values=cache, use_cache=True, logits_to_keep=targets.shape[1] + 1).logits[
        :, :-1
    ]
    weights = padded_weights([e.weights for e in batch], targets.shape[1], "right")
    return logits, targets.masked_fill(targets < 0, IGNORED).to(vlm.device), weights.to(vlm.device)
