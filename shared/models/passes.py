"""
The one engine: everything that puts (images, prompt, continuation) through a vision-language model, for every family
alike.

    prompts = make_prompts(vlm, ["Is there an effusion?", "Which side?"], [film, film])   # the tower sees each image
    once
    write(vlm, prompts, max_new_tokens=64)                                # -> ["yes", "the left side"], greedy
    groups, logps = sample(vlm, prompts, 8, 256, temperature=1.0, generator=generator)    # token ids, eight of each
    logp, entropy, mask = logprobs(vlm, prompts, groups)                  # (N, T) each, differentiable
    score(vlm, prompts, [["yes", "no"], ["left"]])                        # mean log-probability of texts, (N, 1)
    margin(vlm, prompts)                                                  # log-odds of yes against no, (P,)

Training losses are weighted logprobs; sampling, scoring, policy, reference and validation are these same passes.

What prompts have in common is computed once: an image's features, and with `share` the beginning that several texts
about one image begin with, whose keys and values serve them all. Only log-probabilities of the continuations are
computed, a part of the vocabulary's rows at a time. Equal to the plain forward pass over whole texts to 1e-5 in value
and gradient, and greedy sampling to generate() (tests/test_shared_models_passes.py).

Layout of a pass: [shared beginning, padded on the left][the rest and its continuation, padded on the right]. No padding
stands between tokens of one text, so that a sliding window sees what it sees in the whole text.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import contextlib
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import DynamicCache

from shared.models.inputs import check_text, continuation, preprocess_images, prompt_ids
from shared.runtime import InputError, free_gpu

# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass
class Prompt:
    """The user's turn as the language model gets it."""

    ids: np.ndarray  # int32 (L,), with as many image tokens as the grids have cells
    grids: tuple = ()  # (rows, columns) of each image
    features: tuple = ()  # of each image (rows * columns, width)

    def __len__(self):
        return len(self.ids)


def features_of(vlm, images):
    """
    Images (see inputs.py) -> one (tokens, width) tensor per image: tower and projector, deep-stack features behind.
    """
    extra = {} if images.grid_thw is None else {"image_grid_thw": images.grid_thw.to(vlm.device)}
    found = vlm.base.model.get_image_features(images.values.to(vlm.device, vlm.dtype), return_dict=True, **extra)
    deep = getattr(found, "deepstack_features", None) or ()  # Qwen3-VL: one (tokens, width) per image for each layer
    return [torch.cat(parts, -1) for parts in zip(found.pooler_output, *deep, strict=True)]


@torch.no_grad()
def make_prompts(vlm, texts, images=None, system=None, batch_size=32):
    """
    texts: user's turns; images: for each one image, a list of images, or None (uint8 arrays (H, W) or (H, W, 3), PIL
    images or tensors; the same object is looked at once); system: an instruction in front -> Prompts.
    InputError when text and images do not fit together.
    """
    images = [None] * len(texts) if images is None else list(images)
    if len(images) != len(texts):
        raise InputError(f"there are {len(texts)} texts and {len(images)} images")
    cases = [
        () if image is None else tuple(image) if isinstance(image, (list, tuple)) else (image,) for image in images
    ]
    distinct = list({id(image): image for case in cases for image in case}.values())
    known = {}
    for start in range(0, len(distinct), batch_size):
        some = distinct[start : start + batch_size]
        ready = preprocess_images(vlm.processor, some)
        for image, grid, features in zip(some, ready.grids, features_of(vlm, ready), strict=True):
            known[id(image)] = tuple(grid), features
    prompts = []
    for text, case in zip(texts, cases, strict=True):
        grids, features = zip(*(known[id(image)] for image in case), strict=True) if case else ((), ())
        prompts.append(Prompt(prompt_ids(vlm, text, grids, system), grids, features))
    return prompts


def stop_tokens(vlm):
    """Ids that end a response, by the checkpoint."""
    ids = vlm.base.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


def never_drawn(vlm):
    """Ids of image placeholders: a text with one could not be scored, since there is no image for it."""
    return list(vlm.base.generation_config.suppress_tokens or ())


def text_of(vlm, ids, skip_special_tokens=True):
    """Written tokens as text, without the one that ends them; skip_special_tokens=False shows any others."""
    ids = ids[:-1] if len(ids) and ids[-1] in stop_tokens(vlm) else ids
    text = vlm.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return text.strip() if skip_special_tokens else text


def places_of(vlm, ids):
    """
    Where each written token stands in text_of(vlm, ids, skip_special_tokens=False) -> (first, one past the last)
    character of each; several tokens of one character (bytes of a letter) all stand at it.
    """
    ids, places, before = list(ids), [], ""
    for end in range(1, len(ids) + 1):
        text = vlm.tokenizer.decode(ids[:end])
        places.append((len(before.rstrip("\ufffd")), len(text)))
        before = text
    return places


# ------------------------------------------------------------------------------------------------------- what fits


class PartSize:
    """How many items go through the model at a time: halved when memory runs out, and so for the rest of the run."""

    def __init__(self, size):
        self.now = size


def in_parts(work, items, size, each=1, undo=None):
    """
    work(part of the items) -> list; the results of all parts, joined. Out of GPU memory: the part is halved and done
    again. size: PartSize or a number; each: so many an item stands for. undo: work leaves traces, such as gradients;
    undo() takes back those of all parts, and the work starts over.
    """
    size = size if isinstance(size, PartSize) else PartSize(size)
    results, start = [], 0
    while start < len(items):
        part, failed = items[start : start + max(1, size.now // each)], None
        try:
            results += work(part)
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)  # its frames would hold on to the memory
        if failed is None:
            start += len(part)
            continue
        if len(part) == 1:
            raise failed
        size.now = max(1, len(part) * each // 2)
        free_gpu()
        print(f"out of GPU memory: going on with {size.now} at a time", flush=True)
        if undo is not None:
            undo()
            results, start = [], 0
    return results


# ------------------------------------------------------------------------------------------------------- the passes


def padded(rows, fill, side="right"):
    """Rows of different lengths -> int64 (B, longest)."""
    longest = max(map(len, rows))
    out = np.full((len(rows), longest), fill, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[slice(longest - len(row), None) if side == "left" else slice(len(row))] = row
    return torch.from_numpy(out)


class _ready_features:
    """with _ready_features(vlm, features): the model takes these, one tensor per image, in place of its tower's."""

    def __init__(self, vlm, features):
        self.model, width = vlm.base.model, vlm.config.get_text_config().hidden_size
        parts = [f.to(vlm.device).split(width, dim=-1) for f in features]
        whole = torch.stack([p[0] for p in parts]) if vlm.spec.stacked else [p[0] for p in parts]
        deep = [list(layer) for layer in zip(*(p[1:] for p in parts), strict=True)]
        self.output = SimpleNamespace(pooler_output=whole, deepstack_features=deep)

    def __enter__(self):
        self.model.get_image_features = lambda *args, **options: self.output

    def __exit__(self, *exception):
        del self.model.get_image_features


def _image_tensors(vlm, prompts):
    """What the forward pass wants to see of images whose features are ready: any pixels, and the size of each."""
    grids = [grid for p in prompts for grid in p.grids]
    if not grids:
        return {}
    tensors = {"pixel_values": torch.zeros(1, device=vlm.device, dtype=vlm.dtype)}
    if vlm.spec.rope:
        merge = vlm.processor.image_processor.merge_size
        tensors["image_grid_thw"] = torch.tensor([[1, r * merge, c * merge] for r, c in grids], device=vlm.device)
    return tensors


def _positions(vlm, prompts):
    """Of each prompt's tokens: (L,), or (3, L) where the family counts image tokens in rows and columns."""
    if not vlm.spec.rope:
        return [torch.arange(len(p), device=vlm.device) for p in prompts]
    ids = padded([p.ids for p in prompts], -1).to(vlm.device)
    mask = (ids >= 0).long()
    is_image = ((ids == vlm.image_token_id) & mask.bool()).long()
    grids = _image_tensors(vlm, prompts).get("image_grid_thw")
    found = vlm.base.model.get_rope_index(ids.clamp(min=0), is_image, image_grid_thw=grids, attention_mask=mask)[0]
    return [found[:, i, : len(p)] for i, p in enumerate(prompts)]


def _forward(vlm, ids, mask, positions, prompts=(), cache=None):
    """
    ids (B, T), -1 where nothing stands; mask (B, columns of the cache + T); prompts: those whose images the ids hold ->
    last hidden states (B, T, D).
    """
    is_image = (ids == vlm.image_token_id).long() if prompts else torch.zeros_like(ids)
    tensors = {vlm.spec.kinds: is_image} if vlm.spec.kinds else {}
    tensors |= _image_tensors(vlm, prompts)
    features = [f for p in prompts for f in p.features]
    with _ready_features(vlm, features) if features else contextlib.nullcontext():
        return vlm.base.model(
            input_ids=ids.masked_fill(ids < 0, vlm.tokenizer.pad_token_id), attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=cache is not None, **tensors
        ).last_hidden_state  # fmt: skip


def _stack(rows, side="right"):
    """Positions (..., L) of different lengths -> (B, longest) or (3, B, longest), 0 where nothing stands."""
    longest = max(r.shape[-1] for r in rows)
    pad = [(longest - r.shape[-1], 0) if side == "left" else (0, longest - r.shape[-1]) for r in rows]
    return torch.stack([F.pad(r, p) for r, p in zip(rows, pad, strict=True)], dim=-2)


def _prefill(vlm, prompts, lengths, positions):
    """The first `lengths` tokens of each prompt -> cache and mask (P, longest), padded on the left."""
    ids = padded([p.ids[:n] for p, n in zip(prompts, lengths, strict=True)], -1, "left").to(vlm.device)
    mask, cache = (ids >= 0).long(), DynamicCache(config=vlm.config.get_text_config())
    where = _stack([p[..., :n] for p, n in zip(positions, lengths, strict=True)], "left")
    _forward(vlm, ids, mask, where, prompts, cache)
    return cache, mask


def _shared_beginnings(vlm, prompts, counts):
    """
    Which prompts begin alike, about the same images -> for each the number of a group, and of each group the first
    prompt and the length of the beginning; None where that saves little. counts: continuations of each prompt.
    """
    groups = []  # [first prompt, length, key]
    member = []
    for i, p in enumerate(prompts):
        images = tuple(map(id, p.features))
        last = int(np.flatnonzero(p.ids == vlm.image_token_id)[-1]) if images else -1
        for number, group in enumerate(groups):
            if group[2] != images:
                continue
            other = prompts[group[0]].ids[: group[1]]
            n = min(len(other), len(p) - 1)
            differ = np.flatnonzero(other[:n] != p.ids[:n])
            n = int(differ[0]) if len(differ) else n
            if n > last and n >= len(p) // 2:
                group[1] = n
                member.append(number)
                break
        else:
            groups.append([i, len(p) - 1, images])
            member.append(len(groups) - 1)
    if len(groups) > 0.75 * sum(counts) or min(g[1] for g in groups) < 1:
        return None
    return member, [g[0] for g in groups], [g[1] for g in groups]


def _hidden(vlm, prompts, groups, share):
    """
    groups[i]: continuations of prompts[i], lists of token ids -> hidden (tokens, D) that predict their tokens, one text
    after the other, targets (tokens,), and mask (N, T) of where those stand.
    """
    rows = [i for i, group in enumerate(groups) for _ in group]
    texts = [np.asarray(ids, np.int64) for group in groups for ids in group]
    positions = _positions(vlm, prompts)
    if vlm.base.training and checkpointing(vlm.base):
        share = False  # what is computed again in the backward pass cannot be kept for others
    found = _shared_beginnings(vlm, prompts, [len(g) for g in groups]) if share else None
    cache = past = None
    cut = [0] * len(prompts)
    if found is not None:
        member, first, lengths = found
        cache, past = _prefill(vlm, [prompts[i] for i in first], lengths, [positions[i] for i in first])
        back = torch.tensor([member[i] for i in rows], device=vlm.device)
        cache.batch_select_indices(back)
        past, cut = past[back], [lengths[m] for m in member]
    ids, targets, where = [], [], []
    for i, text in zip(rows, texts, strict=True):
        rest = prompts[i].ids[cut[i] :]
        ids.append(np.concatenate([rest, text[:-1]]))
        targets.append(np.concatenate([np.full(len(rest) - 1, -1), text]))
        steps = torch.arange(1, len(text), device=vlm.device)
        where.append(torch.cat([positions[i][..., cut[i] :], positions[i][..., -1:] + steps], -1))
    ids, targets = (padded(x, -1).to(vlm.device) for x in (ids, targets))
    mask = (ids >= 0).long()
    images = [prompts[i] for i in rows] if cache is None else ()
    mask = mask if cache is None else torch.cat([past, mask], 1)
    hidden = _forward(vlm, ids, mask, _stack(where), images, cache)
    lengths = torch.tensor([len(t) for t in texts], device=vlm.device)
    inside = torch.arange(int(lengths.max()), device=vlm.device) < lengths[:, None]
    return hidden[targets >= 0], targets[targets >= 0], inside


def checkpointing(model):
    """Are activations computed again in the backward pass? transformers 5 has renamed the property."""
    name = (
        "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return getattr(model, name)


def logprobs(vlm, prompts, continuations, share=True, temperature=1.0, suppress=(), entropy=False):
    """
    continuations[i]: token ids, several lists of them, that may follow prompts[i] -> logp (N, T) of their tokens in the
    order of the prompts, 0 behind the end of each, entropy (N, T) in nats or None, mask (N, T). Differentiable in logp.
    share: compute a common beginning once (see above); the numbers stay the same.
    """
    hidden, targets, mask = _hidden(vlm, prompts, continuations, share)
    head = vlm.base.lm_head
    logp, spread = selected_logprobs(hidden, head.weight, targets, temperature, head.bias, suppress, entropy)
    spread = None if spread is None else spread.new_zeros(mask.shape).masked_scatter(mask, spread)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp), spread, mask


def score(vlm, prompts, texts, spans=None, share=True, suppress=()):
    """
    texts[i]: responses that may follow prompts[i]; spans[i][j]: of each some (first, one past the last) characters, as
    many for every text (None: the whole text) -> float32 (N, spans): mean log-probability in nats of the tokens that
    touch them, NaN where none does. Differentiable.
    """
    flat = [text for some in texts for text in some]
    spans = [span for some in spans for span in some] if spans is not None else [[(0, len(text))] for text in flat]
    check_text(vlm, *flat)
    written = [continuation(vlm, text) for text in flat]
    ids = iter([ids for ids, _ in written])
    logp, _, _ = logprobs(vlm, prompts, [[next(ids) for _ in some] for some in texts], share, suppress=suppress)
    chosen = torch.zeros(*logp.shape, len(spans[0]), dtype=torch.bool)
    for line, (_, places), some in zip(chosen, written, spans, strict=True):
        for s, (first, last) in enumerate(some):
            line[: len(places), s] = torch.tensor([max(a, first) < min(b, last) for a, b in places])
    chosen = chosen.to(logp.device)
    return torch.where(chosen, logp[..., None], 0).sum(1) / chosen.sum(1)


@torch.no_grad()
def sample(vlm, prompts, n=1, max_new_tokens=256, temperature=1.0, generator=None):
    """
    n continuations of each prompt -> groups of lists of token ids, with the token that ends them if they end, and the
    same with the log-probability of each token. generator: torch.Generator on the device; None: the most likely token
    (greedy). All tokens can be drawn but image placeholders: with top-k or top-p, log-probabilities would be those of
    another distribution. What ends a text is what the checkpoint says. InputError when the model gives no finite
    numbers.
    """
    with _evaluating(vlm):
        positions = _positions(vlm, prompts)
        cache, mask = _prefill(vlm, prompts, [len(p) - 1 for p in prompts], positions)
        rows = torch.arange(len(prompts), device=vlm.device).repeat_interleave(n)
        cache.batch_select_indices(rows)
        mask, ids = mask[rows], torch.tensor([[int(p.ids[-1])] for p in prompts], device=vlm.device)[rows]
        where = torch.stack([p[..., -1:] for p in positions], dim=-2)[..., rows, :]
        stops, never = (torch.tensor(x(vlm), dtype=torch.long, device=vlm.device) for x in (stop_tokens, never_drawn))
        written, logps = ([[] for _ in rows] for _ in range(2))
        going = list(range(len(rows)))  # which text each row of the batch is
        for step in range(max_new_tokens):
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
            scores = vlm.base.lm_head(_forward(vlm, ids, mask, where, cache=cache)[:, -1]).float() / temperature
            if step == 0:
                _check_finite(vlm, scores)
            scores = scores.index_fill_(1, never, -torch.inf).log_softmax(-1)
            if generator is None:
                ids = scores.argmax(-1, keepdim=True)
            else:
                ids = torch.multinomial(scores.exp(), 1, generator=generator)
            for row, token, logp in zip(going, ids[:, 0].tolist(), scores.gather(1, ids)[:, 0].tolist(), strict=True):
                written[row].append(token)
                logps[row].append(logp)
            where = where + 1
            unfinished = (~torch.isin(ids[:, 0], stops)).nonzero()[:, 0]
            if len(unfinished) < len(going):  # rows that are done make room
                if not len(unfinished):
                    break
                cache.batch_select_indices(unfinished)
                mask, ids, where = mask[unfinished], ids[unfinished], where[..., unfinished, :]
                going = [going[i] for i in unfinished.tolist()]
    return tuple([x[i : i + n] for i in range(0, len(x), n)] for x in (written, logps))


def image_columns(vlm, prompts):
    """Columns of sample() where the image tokens of each prompt are -> (P, most of them), -1 behind the last."""
    longest = max(map(len, prompts))
    return padded([np.flatnonzero(p.ids == vlm.image_token_id) + longest - len(p) for p in prompts], -1)


def write(vlm, prompts, max_new_tokens=256):
    """What the model most likely answers to each prompt -> texts without special tokens."""
    return [text_of(vlm, group[0]) for group in sample(vlm, prompts, 1, max_new_tokens)[0]]


def answer_sides(vlm, yes=("yes", "Yes", "YES"), no=("no", "No", "NO"), start=""):
    """
    Where an answer is read -> ids that the response begins with (start, and what the template writes in front of an
    answer), and the ids of yes and of no at the next position, each a spelling. A spelling that is not one token here
    is named and left out; InputError when none is left.
    """
    ids, _ = continuation(vlm, start)
    found = {text: continuation(vlm, start + text)[0] for text in (*yes, *no)}

    def single(before):
        """Of yes and of no: the tokens that follow these, each a spelling."""
        return [sorted({found[text][-1] for text in some if found[text][:-1] == before}) for some in (yes, no)]

    # a blank that the template writes in front of an answer may be part of the answer's first token
    ids = max((ids, ids[:-1]), key=lambda before: (min(map(len, single(before))), sum(map(len, single(before)))))
    sides = single(ids)
    longer = [text for text, tokens in found.items() if tokens[:-1] != ids]
    if not all(sides):
        raise InputError(
            f"none of {', '.join(yes if not sides[0] else no)} is one token of {vlm.name}: give other spellings"
        )
    if longer:
        print_once(f"margin: {', '.join(longer)} left out, more than one token of {vlm.name}")
    return ids, *sides


@functools.cache
def print_once(text):
    print(text, flush=True)


def begun(prompts, ids):
    """Prompts whose response begins with these ids."""
    return [Prompt(np.concatenate([p.ids, np.array(ids, np.int32)]), p.grids, p.features) for p in prompts]


def margin(vlm, prompts, yes=("yes", "Yes", "YES"), no=("no", "No", "NO"), start="", share=True, gradient=False):
    """
    Log-odds of yes against no at the first position of the answer -> float32 (P,) in nats: logsumexp over the spellings
    of yes minus that of no. start: what the response has written before its answer, such as '{"answer": "'; spellings:
    see answer_sides. share=False: one pass over whole prompts, whose columns are those of each prompt itself.
    """
    ids, *sides = answer_sides(vlm, yes, no, start)
    with _evaluating(vlm), torch.set_grad_enabled(gradient):
        any_token = [[sides[0][0]]]
        hidden, _, _ = _hidden(vlm, begun(prompts, ids), [any_token for _ in prompts], share)  # (P, D) before the token
        scores = vlm.base.lm_head(hidden).float()
    _check_finite(vlm, scores)
    return scores[:, sides[0]].logsumexp(1) - scores[:, sides[1]].logsumexp(1)


@contextlib.contextmanager
def _evaluating(vlm):
    """Evaluation mode for a while: without dropout, and with the cache that gradient checkpointing switches off."""
    was = vlm.model.training
    vlm.model.eval()
    try:
        yield
    finally:
        vlm.model.train(was)


def _check_finite(vlm, scores):
    if not torch.isfinite(scores).all():
        name = str(vlm.dtype).removeprefix("torch.")
        why = "its weights are damaged, in the file or by too high an --lr"
        raise InputError(
            f"{vlm.name} gives numbers that are not finite, computing in {name}: "
            + ("use --dtype bfloat16 or float32" if vlm.dtype == torch.float16 else why)
        )


# --------------------------------------------------------------------------------------------------- log-probabilities

CHUNK_NUMBERS = 2**24  # largest (rows x vocabulary) array: 64 MiB in float32


def selected_logprobs(hidden, weight, ids, temperature=1.0, bias=None, suppress=(), entropy=False, chunk=None):
    """
    Log-probabilities of chosen tokens without the logits of all of them: log_softmax(F.linear(hidden, weight, bias) /
    temperature), of which only `chunk` rows exist at a time, forward and backward (computed again there), so that
    memory grows with chunk * V and not with tokens * V. The result does not depend on chunk.

    hidden (N, D): hidden[i] predicts ids[i]; weight (V, D), bias (V,) or None: a linear head with nothing behind it
    (Gemma 3, Qwen and LLaVA have no soft-capping). suppress: ids that the sampler never draws; their probability is 0
    here too -> logp and entropy (N,), the latter in nats without gradient, or None; float32 (float64 for float64
    weights). The product is computed in the head's precision, also under autocast. Gradients: hidden, weight, bias.
    """
    if hidden.ndim != 2 or ids.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, ids, weight))
        raise ValueError(f"hidden, ids and weight {shapes} do not fit: want (N, D), (N,), (V, D)")
    if temperature <= 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"temperature must be above 0 and chunk at least 1, got {temperature} and {chunk}")
    chunk = chunk or max(16, CHUNK_NUMBERS // len(weight))
    never = torch.as_tensor(list(suppress), dtype=torch.long, device=hidden.device)
    logp, spread = _SelectedLogprobs.apply(
        hidden.to(weight.dtype), weight, bias, ids, never, temperature, chunk, entropy
    )
    return logp, spread if entropy else None


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, never, temperature, chunk, entropy):
        ctx.temperature, ctx.chunk = temperature, chunk
        dtype = torch.promote_types(weight.dtype, torch.float32)
        logp, log_sum, spread = (torch.empty(len(ids), dtype=dtype, device=ids.device) for _ in range(3))
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            scores = _scores(hidden[part], weight, bias, never, temperature)
            log_sum[part] = scores.logsumexp(1)
            scores -= log_sum[part, None]  # in place: one more (chunk, V) array would be half as much again
            logp[part] = scores.gather(1, ids[part, None])[:, 0]
            if entropy:
                spread[part] = torch.special.entr(scores.exp_()).sum(1)  # -p log p, 0 where p is 0
        ctx.save_for_backward(hidden, weight, bias, ids, never, log_sum)
        ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, bias, ids, never, log_sum = ctx.saved_tensors
        wants = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        # sums over chunks: bfloat16 would lose the later ones
        d_weight = torch.zeros_like(weight, dtype=grad.dtype) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=grad.dtype) if wants[2] else None
        for start in range(0, len(ids), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            outer = grad[part, None] / ctx.temperature
            d_scores = _scores(hidden[part], weight, bias, never, ctx.temperature)
            d_scores.sub_(log_sum[part, None]).exp_().mul_(-outer)
            d_scores.scatter_add_(1, ids[part, None], outer)  # (one-hot - softmax) * outer
            if wants[2]:
                d_bias += d_scores.sum(0)
            d_scores = d_scores.to(weight.dtype)
            with torch.autocast(weight.device.type, enabled=False):
                if wants[0]:
                    d_hidden[part] = d_scores @ weight
                if wants[1]:
                    d_weight += d_scores.T @ hidden[part]
        pairs = ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        return *(None if g is None else g.to(x.dtype) for g, x in pairs), None, None, None, None, None


def _scores(hidden, weight, bias, never, temperature):
    """hidden (c, D) -> what goes into the softmax, a new (c, V) array in at least float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        scores = F.linear(hidden, weight, bias)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).div_(temperature)
    return scores.index_fill_(1, never, -torch.inf) if len(never) else scores
