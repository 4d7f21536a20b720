"""
Attention weights of a few query rows, while the model runs as it always does.

    with AttentionCapture(vlm.model, keys=inputs.image_positions[0][0]) as capture:
        vlm.model.generate(**inputs.tensors, max_new_tokens=20)
    capture.steps[0].weights            # (layers, B, heads, rows, keys): the prompt's last token, looking at the image
    capture.steps[3].weights            # the fourth generated token
    capture.layer_kinds                 # "full_attention" or "sliding_attention", per layer

sdpa and flash attention never hold the weights, and eager, which does, holds all of them (layers x heads x L x L) and
rounds differently. Here sdpa runs unchanged, so the text is the same to the last bit, and beside it the softmax of the
chosen rows is computed from the same queries and keys (after rotary embedding and norms), scale and mask, in float32.

Columns are those of the padded batch, counted from the start of the prompt, in decoding as in the prompt. Sliding
layers keep only the last keys: a column that has left the window has weight 0 there. A row that may look at nothing
(padding) is all 0.
"""

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


def language_model(model):
    """The decoder inside a vision-language model, below peft's wrapper where there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.language_model


def sdpa_with_rows(module, query, key, value, attention_mask, scaling=None, **options):
    if _active is not None:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.no_grad():
            _active.record(module, query.detach(), key.detach(), attention_mask, factor)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


AttentionInterface.register(NAME, sdpa_with_rows)
AttentionMaskInterface.register(NAME, sdpa_mask)
