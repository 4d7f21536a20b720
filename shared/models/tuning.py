"""
Fine-tuning of a vision-language model on texts about images: examples as tokens with weights, batches in an order that
can be resumed, their loss and its gradient. The loop stays in the scripts.

    store = ImageStore(vlm.processor, [row["image"] for row in rows], budget_gib=2)        # shared/models/inputs.py
    examples = [Example(i, "report", store.number_of[i], prompt_ids(...), target_ids, weights), ...]
    order = BatchOrder(examples, batch_size=32, per_image=4, seed=0, epochs=3)
    epoch, batch = order.at(step)
    loss = backward(vlm, batch, store, PartSize(8), scaler)

The loss is a weighted log-probability of the target's tokens; prompt and image are not learned. What prompts about one
image have in common is computed once (passes.py).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import itertools
import random
from dataclasses import dataclass

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.distributed as dist

from shared.models.passes import Prompt, features_of, in_parts, logprobs

BLOCK = 16  # batches whose examples are sorted by length together: more saves padding, fewer mixes better


@dataclass
class Example:
    """One row in one prompt style, as tokens."""

    row: int  # number of the row
    style: str  # prompts of one style begin alike
    image: int  # number in the ImageStore
    prompt: np.ndarray  # int32; as many image tokens as the grid has cells
    target: np.ndarray  # int32; the text to learn and the token that ends it
    weights: np.ndarray  # float32, of the target's tokens in the loss

    @property
    def length(self):
        return len(self.prompt) + len(self.target)


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

    def __init__(self, examples, batch_size, per_image=1, seed=0, epochs=1, steps=None):
        """steps: how many, in place of epochs."""
        self.examples, self.arguments, self.starts, self.epoch = examples, (batch_size, per_image, seed), [0], None
        self.num_steps = steps or self.count(lambda: len(self.starts) > epochs)

    def count(self, enough):
        """Go on to the epochs that follow, until it is enough -> steps up to there."""
        while not enough():
            self.starts.append(self.starts[-1] + len(self.load(len(self.starts) - 1)))
        return self.starts[-1]

    def load(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, epoch_batches(self.examples, *self.arguments, epoch)
        return self.batches

    def at(self, step):
        """-> (epoch, examples)."""
        self.count(lambda: self.starts[-1] > step)
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


def backward(vlm, batch, store, size, scaler, share=True, train_tower=False, rank=0, world_size=1):
    """
    Gradients of the mean loss over the batch (Examples) -> its loss; under torchrun each process does its part, and
    gets the gradients and the loss of all. size: PartSize, of examples per pass: out of GPU memory it is halved, and
    loss and gradient stay those of the whole batch, since each token's share does not change.
    """
    weight = sum(float(e.weights.sum()) for e in batch)  # of all processes
    mine = batch[rank * len(batch) // world_size : (rank + 1) * len(batch) // world_size]

    def work(part):
        loss, _ = batch_loss(vlm, part, store, share, train_tower)
        scaler.scale(loss / weight).backward()
        return [loss.detach() / weight]

    parts = in_parts(work, mine, size, undo=lambda: vlm.model.zero_grad(set_to_none=True))
    total = sum(parts, torch.zeros((), device=vlm.device))
    if world_size > 1:
        for p in vlm.model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # no examples in a short last batch
                dist.all_reduce(p.grad)
        dist.all_reduce(total)
    return total
