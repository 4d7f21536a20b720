"""
Is a map faithful to the answer? Deletion and insertion on the margin against random orders, and parameter
randomisation: a map that stays as it is when the weights are shuffled says nothing about the model.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import contextlib
import zlib

import numpy as np
import torch

from attention_viz import measures
from attention_viz.maps import METHODS, OF_ROWS, answers_to, ask, attention_map, filled, on_common_grid
from shared.models.capture import language_model

STEPS = 8  # filled images per curve
ORDERS = 3  # random orders, the control
FILLS = ("mean", "blur")


def curve(case, order, fill, insertion):
    """
    order: cells, the most important first -> mean margin towards the answer while cells are filled in this order
    (deletion), or while all others are (insertion), in shares of the margin on the whole image.
    """
    images = []
    for k in range(1, STEPS + 1):
        hidden = np.zeros(len(order), bool)
        hidden[order[: round(k * len(order) / (STEPS + 1))]] = True
        hidden = (~hidden if insertion else hidden).reshape(case.grid)
        images.append(filled(case.image, case.grid, case.view, hidden, fill))
    return float(answers_to(case, images).mean() / max(abs(case.margin), 1e-6))


def faithfulness(vlm, cases, pixels, heads, args):
    """
    -> {"methods": {method: {"deletion", "insertion": {"right", "wrong"}: gap to random orders, positive is faithful}}}.
    Gaps are means over FILLS, for cases answered right and wrong apart, with intervals over patients.
    """
    gaps, used = {}, 0
    for case in cases:
        asked = ask(vlm, pixels[case.key], case.wordings[0]["question"], finding=case.finding)
        if asked.status != "ok":
            continue
        used += 1
        rng = np.random.default_rng(zlib.crc32(case.key.encode()))
        random_orders = [rng.permutation(len(asked.columns)) for _ in range(ORDERS)]
        side = "right" if asked.answer == case.wordings[0]["answer_gt"] else "wrong"
        control = {(fill, insertion): np.mean([curve(asked, order, fill, insertion) for order in random_orders])
                   for fill in FILLS for insertion in (False, True)}  # fmt: skip
        for method in args.methods:
            found = attention_map(asked, method, args.query, heads)
            if found.values is None:
                continue
            order = np.argsort(-found.values.ravel(), kind="stable")
            for insertion, what in ((False, "deletion"), (True, "insertion")):
                difference = [curve(asked, order, fill, insertion) - control[fill, insertion] for fill in FILLS]
                gap = float(np.mean(difference)) * (1 if insertion else -1)
                gaps.setdefault((method, what, side), []).append((gap, case.patient_id))
    table = {}
    for (method, what, side), rows in gaps.items():
        found = measures.mean_of(*zip(*rows, strict=True), draws=args.bootstrap)
        table.setdefault(method, {}).setdefault(what, {})[side] = found
    return {"methods": {m: table[m] for m in METHODS if m in table}, "n": used}


@contextlib.contextmanager
def shuffled_layers(vlm, share):
    """The weights of the last share of the decoder's layers, each matrix's numbers in random places; put back after."""
    layers = language_model(vlm.model).layers
    weights = [p for layer in layers[len(layers) - round(share * len(layers)) :] for p in layer.parameters()]
    kept = [p.detach().clone() for p in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in weights:
                order = torch.randperm(p.numel(), generator=generator).to(p.device)
                p.copy_(p.flatten()[order].reshape(p.shape))
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)


def randomisation(vlm, cases, pixels, args):
    """
    Cascading, from the last layer down -> {method: {share of the layers: mean correlation with the map of the trained
    weights}}, and "other images": that between different patients' images, which a sane map must fall below. None for
    weights in 4 or 8 bit.
    """
    if vlm.quant != "none":
        return None
    methods = [m for m in args.methods if m in (*OF_ROWS, "rollout", "gradient_weighted") and m != "heads"]

    def maps():
        found = {}
        for case in cases:
            asked = ask(vlm, pixels[case.key], case.wordings[0]["question"], finding=case.finding)
            for method in methods:
                made = attention_map(asked, method, args.query)
                if made.values is not None:
                    found[method, case.key] = on_common_grid(made)
        return found

    before, table = maps(), {method: {} for method in methods}
    pairs = [(a.key, b.key) for i, a in enumerate(cases) for b in cases[i + 1 : i + 6] if a.patient_id != b.patient_id]
    for method in methods:
        both = [(before[method, a], before[method, b]) for a, b in pairs if {(method, a), (method, b)} <= set(before)]
        table[method]["other images"] = mean_or_none([measures.pearson(a, b) for a, b in both])
    for share in (1 / 3, 2 / 3, 1.0):
        with shuffled_layers(vlm, share):
            after = maps()
        for method in methods:
            keys = [k for k in before if k[0] == method and k in after]
            table[method][f"{share:.2f}"] = mean_or_none([measures.pearson(before[k], after[k]) for k in keys])
    return table


def mean_or_none(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None
