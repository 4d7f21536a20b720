"""
From prepared rows to training batches and their loss: tokens with weights, in an order that can be resumed.

    store = ImageStore(vlm.processor, [row["image"] for row in rows], budget_gib=2)        # shared/models/inputs.py
    examples = make_examples(vlm, rows, store, styles=("json", "think"), max_length=2048)
    order = BatchOrder(examples, args)                          # args: steps or epochs, batch_size, per_image, seed
    epoch, batch = order.at(step)
    total, weight = batch_loss(vlm, batch, store)
    (total / weight).backward()

An example is one row in one prompt style. The loss is a weighted log-probability of the answer and the token that ends
it; prompt and image are not learned. What questions about one image have in common is computed once (passes.py).
"""

import functools
import itertools
import random
import re
from dataclasses import dataclass

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch

from shared.models.inputs import check_text, continuation, prompt_ids
from shared.models.passes import Prompt, features_of, logprobs
from shared.runtime import InputError
from vqa_sft_grpo.prompting import build_prompt, build_target

BLOCK = 16  # batches whose examples are sorted by length together: more saves padding, fewer mixes better
MARKS = {"json": '"answer":', "think": "<answer>"}  # where the answer begins in a target
BOXES = re.compile(r'(?<="boxes": )\[\[[\d, \[\]]*\]\]')


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


def make_examples(vlm, rows, store, styles, max_length=2048, answer_weight=1.0, box_weight=1.0):
    """
    rows of prepare_data.py, store.number_of[i] being the image of row i -> Examples, row by row, style by style.
    answer_weight, box_weight: weights in the loss of the tokens of the answer itself and of the boxes; all others have
    1. InputError, with the numbers, for an example longer than max_length tokens: cutting it would leave image tokens
    without their features, or an answer without its end.
    """
    tokens_of = functools.cache(functools.partial(prompt_ids, vlm))
    examples = []
    for i, row in enumerate(rows):
        grid = tuple(store.grids[store.number_of[i]])
        for style in styles:
            target = build_target(row, style)
            check_text(vlm, target)
            ids, places = continuation(vlm, target, end=True)
            characters = np.ones(len(target) + 1, np.float32)  # the last: of what ends the answer
            if boxes := style == "json" and BOXES.search(target):
                characters[boxes.start() : boxes.end()] = box_weight
            characters[target.rfind(MARKS[style]) + len(MARKS[style]) :] = answer_weight
            weights = np.array([characters[min(max(last - 1, 0), len(target))] for _, last in places], np.float32)
            prompt = tokens_of(build_prompt(row["question"], style), (grid,))
            example = Example(i, style, store.number_of[i], prompt, np.array(ids, np.int32), weights)
            if example.length > max_length:
                tokens = grid[0] * grid[1]
                raise InputError(
                    f"row {i} ({row['image']}) has {example.length} tokens, {tokens} of the image,"
                    f" {len(prompt) - tokens} of the question and {len(ids)} of the answer, and --max-length is"
                    f" {max_length}: raise it, or lower --max-pixels; nothing is ever cut off"
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


class BatchOrder:
    """
    The batch of every step of a run, known from seed and step alone: nothing has to be stored to go on in the middle.
    """

    def __init__(self, examples, args):
        self.examples, self.args, self.starts, self.epoch, self.batches = examples, args, [0], None, None
        while (self.starts[-1] < args.steps) if args.steps else (len(self.starts) <= args.epochs):
            self.starts.append(self.starts[-1] + len(self.load(len(self.starts) - 1)))
        self.num_steps = args.steps or self.starts[-1]

    def load(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.batches = (
                epoch,
                epoch_batches(self.examples, self.args.batch_size, self.args.per_image, self.args.seed, epoch),
            )
        return self.batches

    def at(self, step):
        """-> (epoch, examples)."""
        epoch = next(e for e in range(len(self.starts) - 1) if step < self.starts[e + 1])
        return epoch, [self.examples[i] for i in self.load(epoch)[step - self.starts[epoch]]]


def batch_loss(vlm, batch, store, share=True, train_tower=False):
    """
    batch: Examples -> (sum over learned tokens of weight * cross entropy, sum of the weights), scalars on the device.
    share: compute what prompts about one image begin with once; train_tower: gradients go into the vision tower,
    otherwise it runs without them, or its cached features are taken.
    """
    seen = list(dict.fromkeys(e.image for e in batch))
    if store.features is not None:
        features = [store.features[n].to(vlm.device) for n in seen]
    else:
        with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
            features = features_of(vlm, store.get(seen))
    of = dict(zip(seen, features, strict=True))
    prompts = [Prompt(e.prompt, (store.grids[e.image],), (of[e.image],)) for e in batch]
    logp, _, mask = logprobs(vlm, prompts, [[e.target] for e in batch], share)
    weights = torch.from_numpy(np.concatenate([e.weights for e in batch])).to(logp)
    return -(logp[mask] * weights).sum(), weights.sum()
