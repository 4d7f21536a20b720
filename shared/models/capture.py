"""
Attention weights of a few query rows, while the model runs as it always does.

    prompts = make_prompts(vlm, [question], [film])                      # shared/models/passes.py
    with AttentionCapture(vlm.model, keys=image_columns(vlm, prompts)) as capture:
        sample(vlm, prompts, max_new_tokens=20)
    capture.steps[0].weights            # (layers, B, heads, rows, keys): the last prompt token but one, see below
    capture.steps[1].weights            # the prompt's last token, which the first answer token is drawn after
    capture.layer_kinds                 # "full_attention" or "sliding_attention", per layer

    last = len(prompts[0]) - 1
    with AttentionCapture(vlm.model, queries=[last], keys=np.flatnonzero(prompts[0].ids == vlm.image_token_id)) as c:
        margin(vlm, prompts, share=False)                                # one pass over the whole prompt
    with WholeAttention(vlm.model) as whole:                             # every row, with gradient: not sdpa
        torch.autograd.grad(margin(vlm, prompts, share=False, gradient=True).sum(), whole.layers)

sample() reads all but the last token of the prompts first, and then goes on token by token: its first pass ends one
token before the prompt's end. Anything else that runs the model, such as generate(), is captured alike.

sdpa and flash attention never hold the weights, and eager, which does, holds all of them (layers x heads x L x L) and
rounds differently. Here sdpa runs unchanged, so the text is the same to the last bit, and beside it the softmax of the
chosen rows is computed from the same queries and keys (after rotary embedding and norms), scale and mask, in float32.

Columns are those of the padded batch, counted from the start of the prompt, in decoding as in the prompt. Sliding
layers keep only the last keys: a column that has left the window has weight 0 there. A row that may look at nothing
(padding) is all 0.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from dataclasses import dataclass

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_with_rows"
_active = None  # the capture that is on; attention functions are found by name and get no other context


@dataclass
class Step:
    """One forward pass. The row at column p predicts the token at p + 1."""

    rows: list  # columns of the recorded queries
    weights: torch.Tensor  # float32 (layers, B, heads, rows, keys), on the CPU


class AttentionCapture:
    """
    Context manager. model: a model loaded with attention="sdpa", with or without an adapter.

    queries: "last" (of every forward pass: the prompt's last token, then each generated one), or a list of columns, of
    which each pass records those it computes. keys: columns (K,) for all cases, or (B, K) with -1 as filler; None:
    every column.
    """

    def __init__(self, model, queries="last", keys=None):
        self.language = language_model(model)
        self.queries = queries if queries == "last" else sorted(int(q) for q in queries)
        self.keys = None if keys is None else torch.atleast_2d(torch.as_tensor(keys))
        settings = self.language.config
        kinds = getattr(settings, "layer_types", None) or ["full_attention"] * settings.num_hidden_layers
        self.layer_kinds, self._passes, self._now = list(kinds), [], None

    def __enter__(self):
        global _active
        if _active is not None:
            raise RuntimeError("an AttentionCapture is on already; they cannot be nested")
        self._before = self.language.config._attn_implementation
        if self._before != "sdpa":
            raise ValueError(
                f"the model runs {self._before!r} attention; load it with attention='sdpa' to capture rows"
            )
        self.language.set_attn_implementation(NAME)
        self._hook = self.language.register_forward_pre_hook(self._start_pass, with_kwargs=True)
        _active = self
        return self

    def __exit__(self, *error):
        global _active
        _active = None
        self._hook.remove()
        self.language.set_attn_implementation(self._before)

    def _start_pass(self, module, args, kwargs):
        """Before a forward pass of the language model: which columns it computes."""
        given = kwargs.get("inputs_embeds")
        embeddings = kwargs.get("input_ids", args[0] if args else None) if given is None else given
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        total = start + embeddings.shape[1]
        rows = [total - 1] if self.queries == "last" else [q for q in self.queries if start <= q < total]
        self._now = (start, total, rows, {})
        self._passes.append(self._now)

    def record(self, module, query, key, mask, scaling):
        """
        query (B, H, Q, D), key (B, H / groups, N, D), mask bool or additive (B, 1 or H, Q, N) or None; keeps the chosen
        rows.
        """
        start, total, rows, layers = self._now
        if not rows:
            return
        batch, heads, length, width = query.shape
        groups, stored = heads // key.shape[1], key.shape[2]
        if stored > total:
            raise RuntimeError("capture reads a growing cache (DynamicCache), and this one has a fixed length")
        index = torch.tensor(rows, device=query.device) - start
        # grouped heads share their keys
        chosen = query[:, :, index].float().reshape(batch, -1, groups * len(rows), width)
        scores = (chosen @ key.float().transpose(2, 3)).reshape(batch, heads, len(rows), stored) * scaling
        if mask is not None:
            some = mask[:, :, index, :stored]
            scores = scores.masked_fill(~some, -torch.inf) if some.dtype == torch.bool else scores + some.float()
        elif length > 1:  # sdpa is told "causal" instead of getting a mask
            columns = torch.arange(stored, device=query.device) + total - stored
            scores = scores.masked_fill(columns > (index + start)[:, None], -torch.inf)
        hidden = torch.isneginf(scores).all(-1, keepdim=True)  # softmax makes NaN of them
        layers[module.layer_idx] = self.pick(scores.softmax(-1).masked_fill(hidden, 0.0), total)

    def pick(self, weights, total):
        """
        weights (B, H, R, N) over the last N of `total` columns -> the chosen columns, 0 for those that are not among
        them.
        """
        gone = total - weights.shape[-1]  # columns that left the window
        if self.keys is None:
            return torch.nn.functional.pad(weights, (gone, 0))
        keys = self.keys.to(weights.device)
        if len(keys) not in (1, len(weights)):  # several sequences per case
            keys = keys.repeat_interleave(len(weights) // len(keys), 0)
        place = keys.expand(len(weights), -1) - gone
        there = (place >= 0) & (place < weights.shape[-1]) & (keys >= 0)
        place = place.clamp(0, weights.shape[-1] - 1)[:, None, None, :].expand(*weights.shape[:3], -1)
        return weights.gather(-1, place) * there[:, None, None, :]

    def attend(self, module, query, key, value, mask, scaling, options):
        """Attention of one layer: sdpa, untouched, with the rows beside it."""
        with torch.no_grad():
            self.record(module, query.detach(), key.detach(), mask, scaling)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)

    @property
    def steps(self):
        """One Step per forward pass that had a chosen row."""
        found = [(rows, layers) for _, _, rows, layers in self._passes if layers]
        return [Step(rows, torch.stack([layers[i] for i in sorted(layers)]).cpu()) for rows, layers in found]

    @property
    def status(self):
        """
        "ok", "no_attn" when nothing was recorded, or "nan": for tables, where a failed extraction has to stay visible.
        """
        steps = self.steps
        if not steps or any(len(s.weights) != len(self.layer_kinds) for s in steps):
            return "no_attn"
        return "ok" if all(torch.isfinite(s.weights).all() for s in steps) else "nan"


class WholeAttention(AttentionCapture):
    """
    All weights of one forward pass without a cache, as part of its graph: layers[i] (B, heads, L, L), float32, in the
    order of the layers, for torch.autograd.grad. They are computed in place of sdpa, which rounds differently, and take
    layers x heads x L x L numbers: for one prompt at a time.
    """

    def __init__(self, model):
        super().__init__(model, queries=())
        self._layers = {}

    def attend(self, module, query, key, value, mask, scaling, options):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = (query.float() @ key.float().transpose(2, 3)) * scaling
        if mask is not None:
            mask = mask[..., : key.shape[2]]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        elif query.shape[2] > 1:
            ahead = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -torch.inf)
        weights = scores.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0).softmax(-1)
        if torch.is_grad_enabled() and not weights.requires_grad:  # frozen or 4-bit weights, and no gradient before
            weights.requires_grad_()
        self._layers[module.layer_idx] = weights
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    @property
    def layers(self):
        return [self._layers[i] for i in sorted(self._layers)]

    @property
    def status(self):
        if len(self._layers) != len(self.layer_kinds):
            return "no_attn"
        return "ok" if all(torch.isfinite(w).all() for w in self.layers) else "nan"


def language_model(model):
    """The decoder inside a vision-language model, below peft's wrapper where there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.language_model


def sdpa_with_rows(module, query, key, value, attention_mask, scaling=None, **options):
    if _active is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active.attend(module, query, key, value, attention_mask, factor, options)


AttentionInterface.register(NAME, sdpa_with_rows)
AttentionMaskInterface.register(NAME, sdpa_mask)
