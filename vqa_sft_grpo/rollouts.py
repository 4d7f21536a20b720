"""
The passes of a vision-language model that GRPO needs: sampling, log-probabilities of what was sampled, and of answers
on edited images.

    prompts = make_prompts(vlm, questions, "json", images)                 # the vision tower runs once per image
    groups, logps = sample(vlm, prompts, group_size=8, max_new_tokens=256, temperature=1.0, generator=generator)
    logp, entropy, mask = completion_logprobs(vlm, prompts, groups, temperature=1.0)        # (N, T), with gradient

All samples of a prompt share one pass over it: its keys and values are computed once and given to each. The
log-probabilities of the sampled tokens are computed the same way, and only for them, so that no (tokens x vocabulary)
array is ever whole. Equal to the plain way (share=False: every rollout a text of its own) to rounding; the tests say
1e-5 for all three families.

The vision tower is not trained here: its features are numbers that policy, reference and scoring passes share.
"""

from dataclasses import dataclass

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from transformers import DynamicCache

from shared.models.inputs import preprocess_images
from shared.runtime import free_gpu
from vqa_sft_grpo.examples import KINDS, around_answer, image_features, image_tensors, padded, prompt_tokens
from vqa_sft_grpo.examples import ready_features
from vqa_sft_grpo.grpo import selected_logprobs
from vqa_sft_grpo.rewards import answer_alone


@dataclass
class Prompt:
    """A question about an image, as the language model gets it."""

    ids: np.ndarray  # int32 (L,), with the image tokens
    grid: tuple  # (rows, columns) of the image tokens
    features: torch.Tensor  # (rows * columns, width) of the image, without gradient


@torch.no_grad()
def make_prompts(vlm, questions, style, images, chunk=32):
    """
    Questions and uint8 images (H, W) or (H, W, 3), one each -> Prompts. Equal images (the same object) are looked at
    once; `chunk` at a time.
    """
    distinct = list({id(image): image for image in images}.values())
    found = {}
    for start in range(0, len(distinct), chunk):
        some = preprocess_images(vlm.processor, distinct[start : start + chunk])
        for image, grid, features in zip(
            distinct[start : start + chunk], some.grids, image_features(vlm, some), strict=True
        ):
            found[id(image)] = tuple(grid), features
    return [
        Prompt(prompt_tokens(vlm, question, style, found[id(image)][0]), *found[id(image)])
        for question, image in zip(questions, images, strict=True)
    ]


def stop_tokens(vlm):
    """Ids that end a completion."""
    ids = vlm.model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


def never_drawn(vlm):
    """Ids of image placeholders: a text with one could not be scored, since there is no image for it."""
    return list(vlm.model.generation_config.suppress_tokens or ())


class Fits:
    """
    How many rollouts (or edited images) go through the model at a time: halved when the GPU memory runs out, and so for
    the rest of the run.

        results = fits.parts(work, n)           # work(start, stop) -> list; the results of all parts, joined
        fits.parts(work, n, each=8)             # items that stand for eight rollouts each
    """

    def __init__(self, size):
        self.size = size

    def halve(self, error):
        if self.size == 1:
            raise error
        self.size //= 2
        print(f"out of GPU memory: going on with {self.size} at a time", flush=True)

    def parts(self, work, n, each=1):
        results, start = [], 0
        while start < n:
            stop, failed = min(n, start + max(1, self.size // each)), None
            try:
                results += work(start, stop)
            except torch.OutOfMemoryError as error:
                failed = error.with_traceback(None)  # its frames would hold on to the memory
            if failed is not None:
                if stop - start == 1:
                    raise failed
                free_gpu()
                self.halve(failed)
                continue
            start = stop
        return results


# ------------------------------------------------------------------------------------------------------- the two passes


def lay_out(vlm, prompts):
    """Left-padded -> ids, mask, is_image (P, L) and positions (P, L), for Qwen2-VL (3, P, L)."""
    ids = padded([p.ids for p in prompts], -1, "left").to(vlm.device)
    mask = (ids >= 0).long()
    ids = ids.masked_fill(mask == 0, vlm.tokenizer.pad_token_id)
    is_image = ((ids == vlm.image_token_id) & mask.bool()).long()
    if vlm.family == "qwen2vl":
        grids = image_tensors(vlm, [p.grid for p in prompts])["image_grid_thw"]
        return (
            ids,
            mask,
            is_image,
            vlm.base.model.get_rope_index(ids, is_image, image_grid_thw=grids, attention_mask=mask)[0],
        )
    return ids, mask, is_image, (mask.cumsum(1) - 1).clamp(min=0)


def kinds(vlm, is_image):
    return {KINDS[vlm.family]: is_image} if vlm.family in KINDS else {}


def prefill(vlm, prompts):
    """
    All tokens of the prompts but the last -> cache, mask (P, L - 1), and ids and positions of the last ones (P, 1) or
    (3, P, 1).
    """
    ids, mask, is_image, positions = lay_out(vlm, prompts)
    cache = DynamicCache(config=vlm.config.get_text_config())
    with ready_features(vlm, [p.features for p in prompts]):
        vlm.base.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[..., :-1],
            past_key_values=cache,
            use_cache=True,
            **kinds(vlm, is_image[:, :-1]),
            **image_tensors(vlm, [p.grid for p in prompts]),
        )
    return cache, mask[:, :-1], ids[:, -1:], positions[..., -1:]


def continued(vlm, cache, ids, mask, positions):
    """Last hidden states (N, T, D) of tokens that follow what the cache holds."""
    return vlm.base.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **kinds(vlm, torch.zeros_like(ids)),
    ).last_hidden_state


def completion_hidden(vlm, prompts, groups, share=True):
    """
    groups[i]: the completions of prompts[i], lists of token ids -> hidden (N, T, D), of which hidden[n, t] predicts
    token t of completion n; ids (N, T), -1 behind the end of a completion; in the order of the prompts.
    """
    rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor([len(g) for g in groups])).to(vlm.device)
    targets = padded([completion for group in groups for completion in group], -1, "right").to(vlm.device)
    inputs = targets[:, :-1].clamp(min=0)  # what is behind an end is seen by nothing that counts
    steps = torch.arange(targets.shape[1], device=vlm.device)
    if share:
        cache, mask, last, positions = prefill(vlm, prompts)
        cache.batch_select_indices(rows)
        mask = torch.cat([mask[rows], torch.ones_like(targets)], 1)
        return continued(vlm, cache, torch.cat([last[rows], inputs], 1), mask, positions[..., rows, :] + steps), targets
    ids, mask, is_image, positions = lay_out(vlm, prompts)
    length, behind = ids.shape[1], torch.zeros_like(inputs)
    repeated = [prompts[r] for r in rows.tolist()]
    with ready_features(vlm, [p.features for p in repeated]):
        hidden = vlm.base.model(
            input_ids=torch.cat([ids[rows], inputs], 1),
            attention_mask=torch.cat([mask[rows], behind + 1], 1),
            use_cache=False,
            position_ids=torch.cat([positions[..., rows, :], positions[..., rows, -1:] + steps[1:]], -1),
            **kinds(vlm, torch.cat([is_image[rows], behind], 1)),
            **image_tensors(vlm, [p.grid for p in repeated]),
        ).last_hidden_state
    return hidden[:, length - 1 :], targets


def completion_logprobs(vlm, prompts, groups, temperature=1.0, suppress=(), share=True, with_entropy=True):
    """
    groups as above -> logp and entropy (N, T) of the completions' tokens, 0 behind their ends, and mask (N, T).
    Differentiable in logp.
    """
    hidden, targets = completion_hidden(vlm, prompts, groups, share)
    mask = targets >= 0
    head = vlm.base.lm_head
    logp, entropy = selected_logprobs(
        hidden[mask],
        head.weight,
        targets[mask],
        temperature,
        bias=head.bias,
        suppress=suppress,
        with_entropy=with_entropy,
    )
    logp, entropy = (None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (logp, entropy))
    return logp, entropy, mask


@torch.no_grad()
def sample(vlm, prompts, group_size, max_new_tokens, temperature=1.0, generator=None, suppress=(), stop_ids=()):
    """
    group_size completions of each prompt -> groups of lists of token ids, with the token that ends them if they end,
    and the same with the log-probability of each token. generator: torch.Generator on the device; None: the most likely
    token (greedy). All tokens can be drawn but those of `suppress`: with top-k or top-p, log-probabilities would be
    those of another distribution.
    """
    cache, mask, ids, positions = prefill(vlm, prompts)
    rows = torch.arange(len(prompts), device=vlm.device).repeat_interleave(group_size)
    cache.batch_select_indices(rows)
    mask, ids, positions = mask[rows], ids[rows], positions[..., rows, :]
    head, stops, suppress = (
        vlm.base.lm_head,
        torch.tensor(list(stop_ids), device=vlm.device),
        torch.tensor(list(suppress), dtype=torch.long, device=vlm.device),
    )
    written, logps = ([[] for _ in rows] for _ in range(2))
    going = list(range(len(rows)))  # which rollout each row of the batch is
    for _ in range(max_new_tokens):
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        scores = head(continued(vlm, cache, ids, mask, positions)[:, -1]).float() / temperature
        scores = scores.index_fill_(1, suppress, -torch.inf).log_softmax(-1)
        ids = (
            scores.argmax(-1, keepdim=True)
            if generator is None
            else torch.multinomial(scores.exp(), 1, generator=generator)
        )
        for row, token, logp in zip(going, ids[:, 0].tolist(), scores.gather(1, ids)[:, 0].tolist(), strict=True):
            written[row].append(token)
            logps[row].append(logp)
        positions = positions + 1
        unfinished = (~torch.isin(ids[:, 0], stops)).nonzero()[:, 0]
        if len(unfinished) < len(going):  # rows that are done make room
            if not len(unfinished):
                break
            cache.batch_select_indices(unfinished)
            mask, ids, positions = mask[unfinished], ids[unfinished], positions[..., unfinished, :]
            going = [going[i] for i in unfinished.tolist()]
    return tuple([x[i : i + group_size] for i in range(0, len(x), group_size)] for x in (written, logps))


# ------------------------------------------------------------------------------------------------ answers, on their own


def answer_tokens(vlm, answer, style):
    """An answer as a whole response -> token ids, and which of them belong to the answer itself (bool list)."""
    text, (first, last) = answer_alone(answer, style)
    before = around_answer(vlm)[0]
    encoded = vlm.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    first, last = first + len(before), last + len(before)
    return encoded["input_ids"], [
        begin < last and end > first and end > begin for begin, end in encoded["offset_mapping"]
    ]


def answer_logprobs(vlm, prompts, answers, style, suppress=(), share=True):
    """
    answers[i]: answers (texts) to prompts[i] -> float32 (N,): mean log-probability, in nats, of the tokens of each
    answer. Differentiable.
    """
    tokens = [[answer_tokens(vlm, answer, style) for answer in some] for some in answers]
    logp, _, mask = completion_logprobs(
        vlm, prompts, [[ids for ids, _ in some] for some in tokens], suppress=suppress, share=share, with_entropy=False
    )
    chosen = padded([[bool(c) for c in of_answer] for some in tokens for _, of_answer in some], 0, "right").to(
        vlm.device
    )
    return (logp * chosen).sum(1) / chosen.sum(1)
