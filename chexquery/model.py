"""
CheXQuery: films -> SigLIP patches -> 14 condition and 6 region queries -> a few visual tokens -> Flan-T5 -> report.

    model = build_model(settings, reports)               # reports: for the vocabulary of a text model built here
    seen = model(images, present)                        # Seen: visual tokens, label logits, region logits, maps
    loss = model.report_loss(seen.tokens, ids)
    texts = model.write(seen.tokens)

Shapes: B studies, V = 2 views (frontal, lateral), P patches per view, Q queries, D the width of the vision tower.
What is done on purpose: SigLIP has no class token, so all P positions are patches and the global token is what its
pooling head gives; the two views stay two sets of tokens, told apart by a view embedding, and an absent one is masked;
queries, head and targets share the order of CONDITIONS; the maps of every layer and head are kept.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
from collections import Counter
from dataclasses import dataclass, field
from math import log

import shared  # noqa: F401, isort: skip  # before transformers
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, SiglipVisionModel, T5ForConditionalGeneration
from transformers import T5Tokenizer
from transformers.modeling_outputs import BaseModelOutput

from chexquery.cases import REGIONS, VIEWS
from shared.metrics.labels import CONDITIONS
from shared.models.hub import explained, find_model, load_part
from shared.models.loading import add_lora, digest_of
from shared.models.tiny import PRINTABLE, is_tiny, quietly, tiny_folder
from shared.runtime import InputError

# What shapes the model; train.py has each of them as a flag, checkpoints hold them all.
SHAPE = (
    "vision_model text_model condition_model image_size patch_size width vision_layers text_layers vocabulary"
    " num_layers num_heads num_pool_queries dropout aux_dropout gate gate_hidden regions conditions query_attention"
    " query_init lora_rank lora_alpha lora_dropout prompt max_tokens seed"
).split()
LIMITS = {
    "image_size": (28, 1024), "patch_size": (1, 512), "width": (1, 8192), "vision_layers": (1, 100),
    "text_layers": (1, 100), "vocabulary": (128, 10**6), "num_layers": (1, 100), "num_heads": (1, 256),
    "num_pool_queries": (0, 256), "dropout": (0, 0.99), "aux_dropout": (0, 0.99), "gate_hidden": (1, 10**5),
    "lora_rank": (1, 1024), "lora_alpha": (1e-6, 1e6), "lora_dropout": (0, 0.99), "max_tokens": (2, 1024),
    "seed": (0, 2**32 - 1),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- parts


class Attention(nn.Module):
    """Multi-head attention that can tell its weights: (B, N, D) on (B, M, D) -> (B, N, D), (B, heads, N, M) or None."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)  # torch's own are so small that the start drowns what the film says

    def forward(self, x, memory, mask=None, maps=False):
        """mask: bool, broadcast to (B, N, M), true where attention is allowed."""
        q, k, v = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        mask = None if mask is None else mask[:, None]
        weights = None
        if maps:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights


class QueryLayer(nn.Module):
    """Post-norm: (self-attention between the queries,) cross-attention to the patches, feed-forward."""

    def __init__(self, width, heads, dropout, query_attention):
        super().__init__()
        self.among = Attention(width, heads, dropout) if query_attention else None
        self.norm_among = nn.LayerNorm(width) if query_attention else None
        self.cross = Attention(width, heads, dropout)
        self.norm_cross, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, queries, patches, mask, maps=False):
        if self.among is not None:
            queries = self.norm_among(queries + self.drop(self.among(queries, queries)[0]))
        found, weights = self.cross(queries, patches, mask, maps)
        queries = self.norm_cross(queries + self.drop(found))
        return self.norm(queries + self.drop(self.feed(queries))), weights


class Fusion(nn.Module):
    """Global vector (B, D) and queries (B, Q, D) -> 1 + num_pool visual tokens (B, T, width of the text model)."""

    def __init__(self, width, text_width, heads, num_pool, gate_hidden=None):
        super().__init__()
        self.gate = None
        if gate_hidden:  # one number per study: how much the whole film counts beside the queries
            self.gate = nn.Sequential(nn.Linear(2 * width, gate_hidden), nn.GELU(), nn.Linear(gate_hidden, 1))
        # Long: short ones weigh all queries alike, so that all tokens are their mean, and learning does not part them.
        self.pool_queries = nn.Parameter(torch.randn(num_pool, width) * 8) if num_pool else None
        self.pool = Attention(width, heads) if num_pool else None
        self.norm_pool = nn.LayerNorm(width) if num_pool else None
        self.project, self.norm = nn.Linear(width, text_width), nn.LayerNorm(text_width)

    def forward(self, whole, queries, maps=False):
        """-> tokens, gate (B, 1) or None, weights of the pooling (B, num_pool, Q), mean over heads, or None."""
        gate = weights = None
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(torch.cat([whole, queries.mean(1)], -1)))
            whole, queries = gate * whole, (1 - gate[:, None]) * queries
        tokens = whole[:, None]
        if self.pool is not None:
            pooled, weights = self.pool(self.pool_queries.expand(len(whole), -1, -1), queries, maps=maps)
            tokens = torch.cat([tokens, self.norm_pool(pooled)], 1)
            weights = None if weights is None else weights.mean(1)
        return self.norm(self.project(tokens)), gate, weights


def head(width, dropout):
    """One logit from one query's vector; the same for all queries, which therefore have to tell what they are."""
    return nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Dropout(dropout), nn.Linear(width // 2, 1))


@dataclass
class Seen:
    """What the model makes of a batch of films."""

    tokens: torch.Tensor  # (B, T, width of the text model)
    logits: torch.Tensor | None  # (B, 14) in the order of CONDITIONS; None without condition queries
    region_logits: torch.Tensor | None  # (B, 6): something abnormal is said of this region
    queries: torch.Tensor  # (B, Q, D) after the last layer
    whole: torch.Tensor  # (B, D) the global vector
    gate: torch.Tensor | None = None
    maps: list = field(default_factory=list)  # per layer (B, heads, Q, V * P), with maps=True
    pooling: torch.Tensor | None = None  # (B, num_pool, Q)


# --------------------------------------------------------------------------------------------------------------- model


class CheXQuery(nn.Module):
    """settings: plain dict with the names of SHAPE; frozen_base: vision and text model came with weights, so LoRA."""

    def __init__(self, settings, vision, text, tokenizer, starts, frozen_base):
        super().__init__()
        self.settings, self.tokenizer, self.frozen_base = settings, tokenizer, frozen_base
        self.vision, self.text = vision, text
        config, width = vision.config, vision.config.hidden_size
        self.image_size, self.grid = config.image_size, config.image_size // config.patch_size
        self.names = [*(CONDITIONS if settings["conditions"] else ()), *(REGIONS if settings["regions"] else ())]
        self.num_conditions = len(CONDITIONS) if settings["conditions"] else 0
        if len(self.prompt_ids) > 64:
            raise InputError(f"--prompt has {len(self.prompt_ids)} tokens: at most 64 can be given")
        heads = settings["num_heads"]
        if width % heads:
            raise InputError(f"--num-heads {heads} does not divide the width {width} of {settings['vision_model']}")
        self.views = nn.Parameter(torch.randn(len(VIEWS), width) * 0.02)
        self.queries = nn.Parameter(starts)  # (Q, D)
        layers = [QueryLayer(width, heads, settings["dropout"], settings["query_attention"])
                  for _ in range(settings["num_layers"])]  # fmt: skip
        self.layers = nn.ModuleList(layers)
        gate_hidden = settings["gate_hidden"] if settings["gate"] else None
        self.fusion = Fusion(width, text.config.d_model, heads, settings["num_pool_queries"], gate_hidden)
        self.aux = head(width, settings["aux_dropout"]) if settings["conditions"] else None
        self.region_head = head(width, settings["aux_dropout"]) if settings["regions"] else None
        self.register_buffer("mean", torch.tensor(settings["image_mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings["image_std"]).view(1, 3, 1, 1), persistent=False)

    def look(self, images, present):
        """
        images uint8 (B, V, S, S), present bool (B, V) -> what the tower alone makes of them: patches (B, V * P, D) and
        the pooled vector of each view (B, V, D), zeros where a view is absent.
        """
        pixels = images[present][:, None].float().div(255).expand(-1, 3, -1, -1)
        other_size = pixels.shape[-1] != self.image_size
        out = self.vision(pixel_values=(pixels - self.mean) / self.std, interpolate_pos_encoding=other_size)
        pooled = out.pooler_output if out.pooler_output is not None else out.last_hidden_state.mean(1)
        patches = out.last_hidden_state.new_zeros(*present.shape, *out.last_hidden_state.shape[1:])
        patches[present] = out.last_hidden_state
        whole = pooled.new_zeros(*present.shape, pooled.shape[-1])
        whole[present] = pooled
        return patches.flatten(1, 2), whole

    def forward(self, images=None, present=None, looked=None, maps=False, starts=None, put=None, apart=False):
        """
        looked: what look() gave, in place of images. starts (Q, D): other query starts; put: {query: vector (D) or
        (B, D)} that takes the place of a query's own after the last layer, to see what depends on it. apart: what the
        label heads learn stays in them. -> Seen
        """
        patches, whole = self.look(images, present) if looked is None else looked
        per_view = patches.shape[1] // len(VIEWS)
        mask = present.repeat_interleave(per_view, 1)[:, None]  # an absent view gets no attention
        patches = patches + self.views.repeat_interleave(per_view, 0)
        whole = ((whole + self.views) * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        queries = (self.queries if starts is None else starts).expand(len(patches), -1, -1)
        weights = []
        for layer in self.layers:
            queries, w = layer(queries, patches, mask, maps)
            weights.append(w)
        for place, vector in (put or {}).items():
            queries = queries.clone()
            queries[:, place] = vector
        tokens, gate, pooling = self.fusion(whole, queries, maps)
        read = queries.detach() if apart else queries
        logits = self.aux(read[:, : self.num_conditions]).squeeze(-1) if self.aux is not None else None
        rest = read[:, self.num_conditions :]
        regions = self.region_head(rest).squeeze(-1) if self.region_head is not None else None
        return Seen(tokens, logits, regions, queries, whole, gate, weights if maps else [], pooling)

    # -- text

    @functools.cached_property
    def prompt_ids(self):
        """Ids that every report begins with: given in training and in writing, and never learned."""
        text = self.settings["prompt"]
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def encode(self, reports):
        """-> (N, L) ids with the end token, the prompt in front, padded with -100; cut at max_tokens."""
        rows = self.tokenizer(list(reports), add_special_tokens=False).input_ids
        longest = self.settings["max_tokens"] - 1
        rows = [self.prompt_ids + row[:longest] + [self.tokenizer.eos_token_id] for row in rows]
        return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=-100)

    def decoder_logits(self, tokens, ids, attention=False):
        """Teacher forcing -> logits (N, L, vocabulary), and the cross-attention of every layer (N, heads, L, T)."""
        core = self.text.get_base_model() if self.frozen_base else self.text
        if attention:
            core.set_attn_implementation("eager")  # the fast kernels do not tell their weights
        out = self.text(encoder_outputs=BaseModelOutput(tokens), labels=ids, output_attentions=attention)
        core.set_attn_implementation("sdpa")
        return out.logits, out.cross_attentions if attention else None

    def report_loss(self, tokens, ids, smoothing=0.0):
        """Mean cross-entropy over the learned tokens: the report and its end, without prompt and padding."""
        logits, _ = self.decoder_logits(tokens, ids)
        skip = len(self.prompt_ids)
        logits, ids = logits[:, skip:].flatten(0, 1).float(), ids[:, skip:].flatten()
        return F.cross_entropy(logits, ids, ignore_index=-100, label_smoothing=smoothing)

    @torch.no_grad()
    def write(self, tokens, beams=1, min_tokens=0, length_penalty=1.1, max_tokens=None):
        """-> (reports, ids (N, L) as written, without start and prompt). min and max do not count the prompt."""
        start = [self.text.config.decoder_start_token_id, *self.prompt_ids]
        ids = self.text.generate(
            encoder_outputs=BaseModelOutput(tokens),  # a new one: generate() repeats it in place for beams
            attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
            decoder_input_ids=torch.tensor([start], device=tokens.device).expand(len(tokens), -1),
            num_beams=beams, do_sample=False, max_new_tokens=max_tokens or self.settings["max_tokens"],
            min_new_tokens=min_tokens or None, length_penalty=length_penalty if beams > 1 else 1.0,
        )[:, len(start) :]  # fmt: skip
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)], ids

    # -- phases

    def parts(self):
        """{name of a part: its parameters} of everything that can ever be trained."""
        found = {"vision": [], "text": [], "head": [], "query": []}
        for name, p in self.named_parameters():
            part = name.split(".")[0]
            if part not in ("vision", "text"):
                part = "head" if part in ("aux", "region_head") else "query"
            elif self.frozen_base and "lora_" not in name:
                continue
            found[part].append(p)
        return found

    def freeze(self, phase):
        """
        Leave trainable what this phase trains -> names of the parts. 1: queries, fusion, heads; 2: all of it, with LoRA
        where vision and text model came with weights; 3: vision is frozen, and the heads follow the queries, which they
        do not change (losses in train.py). What started from random weights is trained from phase 1 on.
        """
        parts = {1: ("query", "head"), 2: ("query", "head", "vision", "text"), 3: ("query", "head", "text")}[phase]
        if phase == 1 and not self.frozen_base:
            parts += ("vision", "text")
        self.requires_grad_(False)
        for name in parts:
            for p in self.parts()[name]:
                p.requires_grad_(True)
        return parts

    def train(self, mode=True):
        """Frozen parts do not drop anything out."""
        super().train(mode)
        for part in (self.vision, self.text):
            if mode and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def own_state(self):
        """What a checkpoint has to hold: all but the weights that came with vision and text model."""
        kept = {id(p) for part in self.parts().values() for p in part}
        return {name: p.detach() for name, p in self.named_parameters() if id(p) in kept}

    def load_own_state(self, state, path):
        """state: what a checkpoint holds; its weights must be of this model, its words and its frozen base."""
        ours, weights = self.own_state(), state["weights"]
        if set(ours) != set(weights) or any(ours[k].shape != weights[k].shape for k in ours):
            raise InputError(
                f"{path} holds a model of another size or with other parts; give the arguments that chose it"
            )
        if not all(value.isfinite().all() for value in weights.values()):
            raise InputError(f"{path} holds weights that are NaN or infinite: its training went wrong; train again")
        for key, what in (("pieces", "vocabulary"), ("base", "pretrained weights")):
            if state["chexquery"].get(key, self.settings[key]) != self.settings[key]:
                raise InputError(f"{path} was trained with another {what}; give the arguments that chose it")
        for name, value in weights.items():
            ours[name].copy_(value)


# ------------------------------------------------------------------------------------------------------------ building


def build_model(settings, reports=(), vocabulary=None):
    """
    settings: {name of SHAPE: value}; reports: training reports, from whose words the tokenizer of a text model built
    here is made, or the `vocabulary` of a checkpoint. -> CheXQuery on the CPU. Vision and text model are both
    pretrained (frozen, with LoRA) or both tiny: built here from random weights and trained whole.
    """
    settings = {name: settings[name] for name in SHAPE}
    for name, (low, high) in LIMITS.items():
        if not low <= settings[name] <= high:
            raise InputError(f"--{name.replace('_', '-')} must be between {low} and {high}, not {settings[name]}")
    if not 1 <= settings["image_size"] // settings["patch_size"] <= 64:
        raise InputError("--image-size must be 1 to 64 times --patch-size")
    if not (settings["conditions"] or settings["regions"]):
        raise InputError("--no-use-conditions and --no-regions leave no queries: keep one of the two")
    tiny = [is_tiny(settings[name]) for name in ("vision_model", "text_model")]
    if tiny[0] != tiny[1]:
        raise InputError(
            "--vision-model and --text-model: either both come with weights or both are tiny ones, built here"
        )
    torch.manual_seed(settings["seed"])
    vision, normal = load_vision(settings)
    settings |= dict(zip(("image_mean", "image_std"), normal, strict=True))
    text, tokenizer, settings["pieces"] = load_text(settings, reports, vocabulary)
    starts = query_starts(settings, vision.config.hidden_size)
    settings["base"] = None
    if not tiny[0]:
        sources = [find_model(settings[name])[0] for name in ("vision_model", "text_model")]
        settings["base"] = [digest_of(source) for source in sources]
        lora = dict(rank=settings["lora_rank"], alpha=settings["lora_alpha"], dropout=settings["lora_dropout"])
        vision = add_lora(vision, **lora, layers=r".*\.(q_proj|v_proj)", checkpointing=False)
        text = add_lora(text, **lora, layers=r".*decoder.*\.(q|k|v|o)", checkpointing=False)
    return CheXQuery(settings, vision, text, tokenizer, starts, frozen_base=not tiny[0])


def heads_of(width):
    """Attention heads of a tiny model: of 32 numbers each, or more where 32 does not divide the width."""
    return next(heads for heads in range(max(1, width // 32), 0, -1) if width % heads == 0)


def load_vision(settings):
    """-> (vision tower, (mean, standard deviation) of its images)."""
    name = settings["vision_model"]
    if is_tiny(name):
        width = settings["width"]
        sizes = dict(image_size=settings["image_size"], patch_size=settings["patch_size"], vision_hidden=width)
        sizes |= dict(vision_layers=settings["vision_layers"], vision_heads=heads_of(width), vision_mlp=2 * width)
        name = tiny_folder(name, settings["seed"], **sizes)
    vision = load_part(SiglipVisionModel, str(name), settings["vision_model"], unused_weights=True)
    with quietly(), explained(f"{settings['vision_model']} has no image processor"):
        processor = AutoImageProcessor.from_pretrained(find_model(str(name))[0])
    return vision, (list(processor.image_mean), list(processor.image_std))


def load_text(settings, reports, vocabulary):
    """-> (T5 without its encoder, tokenizer, [[piece, score], ...] where the tokenizer was made here)."""
    name = settings["text_model"]
    if is_tiny(name):
        pieces = vocabulary or vocabulary_of(reports, settings["vocabulary"])
        tokenizer = T5Tokenizer(vocab=[tuple(p) for p in pieces], extra_ids=0, model_max_length=1024)
        width = settings["width"]
        sizes = dict(hidden=width, layers=settings["text_layers"], heads=heads_of(width), mlp=2 * width)
        source = tiny_folder(name, settings["seed"], **sizes)
    else:
        source, pieces = find_model(name)[0], None
        with quietly(), explained(f"{name} has no tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source)
    text = load_part(T5ForConditionalGeneration, str(source), name)
    if pieces:
        with quietly():
            text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for module in text.modules():  # T5's own 0.1 keeps a small decoder from learning what the tokens say
            if isinstance(module, nn.Dropout):
                module.p = settings["dropout"]
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = settings["dropout"]
        nn.init.normal_(text.shared.weight)
        nn.init.normal_(text.lm_head.weight, std=text.config.d_model**-0.5)  # the library's 1.0 begins at a loss of 50
    text.encoder.block, text.encoder.final_layer_norm = nn.ModuleList(), nn.Identity()  # the visual tokens replace it
    return text, tokenizer, pieces


def vocabulary_of(reports, size):
    """Words of the reports, the most frequent first, and single characters for all others -> [[piece, score], ...]."""
    split, words = pre_tokenizers.BertPreTokenizer(), Counter()
    for text in reports:
        for word, (start, _) in split.pre_tokenize_str(text):
            words["▁" + word if start == 0 or text[start - 1].isspace() else word] += 1
    if not words:
        raise InputError("there are no training reports with text: nothing to make a vocabulary from")
    total = words.total()
    pieces = {"▁": -8.0} | dict.fromkeys(PRINTABLE, -12.0)
    for word, n in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if len(pieces) < size - 3:
            pieces[word] = max(pieces.get(word, -20.0), log(n / total))
    return [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([piece, score] for piece, score in pieces.items())]


def query_starts(settings, width):
    """
    (Q, D): conditions from the text model's first position for their lower-case names, or random; regions random. A
    text model of another width goes through a fixed random rotation. The mean of the 14 is taken off and the deviation
    made 1: position 0 hardly differs between names (mean cosine of a random BERT .9995), and queries that start alike
    stay alike for hundreds of steps. InputError when the text model is asked for and absent.
    """
    num_regions, starts = len(REGIONS) if settings["regions"] else 0, []
    if settings["conditions"] and settings["query_init"] == "text":
        name = settings["condition_model"]
        source = str(tiny_folder(name)) if is_tiny(name) else name
        encoder = load_part(AutoModel, source, name, unused_weights=True)
        with torch.no_grad(), explained(f"--condition-model {name} cannot read the names of the conditions"):
            tokenizer = AutoTokenizer.from_pretrained(find_model(source)[0])
            batch = tokenizer([condition.lower() for condition in CONDITIONS], padding=True, return_tensors="pt")
            found = encoder(**batch).last_hidden_state[:, 0]
        if found.shape[1] != width:
            rotation = torch.empty(found.shape[1], width)
            found = found @ nn.init.orthogonal_(rotation, generator=torch.Generator().manual_seed(0))
        starts.append(found - found.mean(0))
    elif settings["conditions"]:
        starts.append(nn.init.xavier_uniform_(torch.empty(len(CONDITIONS), width)))
    if num_regions:
        starts.append(nn.init.xavier_uniform_(torch.empty(num_regions, width)))
    return torch.cat([part / part.std() for part in starts])
