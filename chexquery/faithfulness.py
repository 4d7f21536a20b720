"""
What CheXQuery's queries do, in numbers: where their maps lie; what goes when a query, its pixels or the lesion goes.

    found = faithfulness(model, rows, notes, ...)     # phantom: all tests; real films: those that need no drawn truth

Maps come in three kinds: "attention", the mean over the heads of the last layer; "gradient", attention times the
positive gradient of the query's own logit, over all layers; "occlusion", how far the query's logit falls when a place
of the film is erased. Attention of a transformer need not lie where the evidence is: its tower may carry what it saw to
any patch. Every number stands beside a control: the map or the vector of a random other query, random patches, the
share of the film that the true boxes cover.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np
import torch

from chexquery.cases import REGIONS, VIEWS, Films, study_of
from shared.metrics.labels import CONDITIONS, label_report
from shared.metrics.statistics import mean_interval
from shared.report import number, percent, with_interval

KINDS = ("attention", "gradient", "occlusion")
ORGANS = dict(zip(REGIONS, ("heart", "left lung", "right lung", "mediastinum", "diaphragm", "spine"), strict=True))
ERASED = 0.1  # share of the patches that are erased


def maps_of(model, looked, present, kind="attention", images=None):
    """-> (Seen, maps float (B, Q, V, g, g), each adding up to 1 over the views there are); occlusion needs images."""
    if kind == "attention":
        with torch.no_grad():
            seen = model(looked=looked, present=present, maps=True)
        maps = seen.maps[-1].mean(1)
    elif kind == "occlusion":
        seen, maps = occlusion(model, looked, images, present)
    else:
        with torch.enable_grad():
            seen = model(looked=[part.detach() for part in looked], present=present, maps=True)
            logits, maps = logits_of(seen), []
            for q in range(logits.shape[1]):
                slopes = torch.autograd.grad(logits[:, q].sum(), seen.maps, retain_graph=True)
                # All query rows of a layer may carry a query's logit on; what counts is which patches they read.
                maps.append(sum((w * s.clamp(min=0)).sum((1, 2)) for w, s in zip(seen.maps, slopes, strict=True)))
            maps = torch.stack(maps, 1).detach()
    maps = maps / maps.sum(-1, keepdim=True).clamp(min=1e-12)
    side = round((maps.shape[-1] // len(VIEWS)) ** 0.5)
    return seen, maps.detach().float().unflatten(-1, (len(VIEWS), side, side))


def logits_of(seen):
    """(B, Q): of conditions and regions, those there are."""
    return torch.cat([part for part in (seen.logits, seen.region_logits) if part is not None], 1)


def occlusion(model, looked, images, present):
    """
    Fall of each query's logit when the two by two patches around a place take the mean of the film, 0 where it does not
    fall -> (Seen, (B, Q, V * P)). A pass of the model for every patch: slow, and about the film itself.
    """
    with torch.no_grad():
        seen = model(looked=looked, present=present)
        side = round((looked[0].shape[1] // len(VIEWS)) ** 0.5)
        plain = logits_of(seen)
        maps = plain.new_zeros(*plain.shape, len(VIEWS), side, side)
        for view in [v for v in range(len(VIEWS)) if present[:, v].any()]:
            for row in range(side):
                for column in range(side):
                    gone = torch.zeros(len(images), len(VIEWS), side, side, dtype=torch.bool, device=images.device)
                    rows, columns = slice(max(0, row - 1), row + 1), slice(max(0, column - 1), column + 1)
                    gone[:, view, rows, columns] = True
                    new = model(erased(images, gone, side), present)
                    fall = (plain - logits_of(new)).clamp(min=0) * present[:, view, None]
                    # Each patch of the square carries its share of the fall.
                    maps[:, :, view, rows, columns] += fall[..., None, None]
    return seen, maps.flatten(2)


def inside(map_, mask):
    """map (g, g), mask bool (S, S) -> (is the highest patch's centre inside?, share of the map's weight inside)."""
    side, size = map_.shape[0], mask.shape[0]
    edges = np.linspace(0, size, side + 1).round().astype(int)
    share = np.add.reduceat(np.add.reduceat(mask.astype(float), edges[:-1], 0), edges[:-1], 1) / (size / side) ** 2
    row, column = np.unravel_index(np.argmax(map_), map_.shape)
    centre = [int((edges[i] + edges[i + 1]) / 2) for i in (row, column)]
    return bool(mask[centre[0], centre[1]]), float((map_ * share).sum() / max(map_.sum(), 1e-12))


def box_mask(boxes, size):
    mask = np.zeros((size, size), bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = True
    return mask


def mean_of(rows, key):
    """Mean over rows with its interval, patients drawn; None without rows."""
    values = [(float(r[key]), r["patient"]) for r in rows if r.get(key) is not None]
    if not values:
        return None
    return mean_interval(*zip(*values, strict=True), num_samples=1000)


def pointing(model, rows, images, looked, present, drawn, rng):
    """Phantom: do condition maps lie on the lesions, region maps on their organs? -> rows, one a (study, query)."""
    found = []
    size = model.image_size
    for kind in KINDS:
        maps = maps_of(model, looked, present, kind, images)[1][:, :, 0].cpu().numpy()
        for i, row in enumerate(rows):
            study = study_of(row, drawn, size)
            targets = []
            for condition in {f.condition for f in study.drawn} if model.num_conditions else ():
                boxes = [box for f in study.drawn if f.condition == condition for box in study.boxes[f.name]]
                targets.append(("condition", condition, box_mask(boxes, size)))
            organs = study.organ_masks if len(model.names) > model.num_conditions else {}
            targets += [("region", name, organs[organ]) for name, organ in ORGANS.items() if organ in organs]
            for what, name, mask in targets:
                q = model.names.index(name)
                same = [j for j, n in enumerate(model.names) if j != q and (n in CONDITIONS) == (what == "condition")]
                hit, mass = inside(maps[i, q], mask)
                other_hit, other_mass = inside(maps[i, rng.choice(same)], mask)
                found.append({
                    "patient": row["patient"], "kind": kind, "what": what, "name": name, "hit": hit, "mass": mass,
                    "other_hit": other_hit, "other_mass": other_mass, "area": float(mask.mean()),
                })  # fmt: skip
    return found


def pointing_summary(found):
    """-> {kind: {"condition" / "region": {...}}} with the ratio of hits to chance, overall and by name."""
    summary = {}
    for kind in KINDS:
        for what in ("condition", "region"):
            part = [r for r in found if r["kind"] == kind and r["what"] == what]
            for name in ["all", *dict.fromkeys(r["name"] for r in part)] if part else ():
                some = [r for r in part if name in ("all", r["name"])]
                row = {key: mean_of(some, key) for key in ("hit", "mass", "other_hit", "other_mass", "area")}
                row["times_chance"] = row["hit"]["value"] / row["area"]["value"] if row["area"]["value"] else None
                row["mass_times_chance"] = row["mass"]["value"] / row["area"]["value"] if row["area"]["value"] else None
                summary.setdefault(kind, {}).setdefault(what, {})[name] = row
    return summary


def said(text, condition):
    return label_report(text)[condition] in (1, -1)


def redrawing(model, rows, texts, drawn, device, decoding):
    """
    Phantom: the film drawn anew without a lesion that the report names; without another finding, its sentence should
    stay. -> rows
    """
    films, cases = [], []
    for row, text in zip(rows, texts, strict=True):
        study = study_of(row, drawn, model.image_size)
        for condition in dict.fromkeys(f.condition for f in study.drawn):
            if not said(text, condition):
                continue
            others = [f.condition for f in study.drawn if f.condition != condition]
            for what, gone in (("lesion", condition), ("other finding", others[0] if others else None)):
                if gone is not None:
                    new = study.without(gone)
                    films.append([new.image, new.lateral])
                    cases.append({"patient": row["patient"], "condition": condition, "what": what})
    views = torch.tensor([view in rows[0]["seen_views"] for view in VIEWS])
    for start in range(0, len(films), 50):
        images = torch.from_numpy(np.array(films[start : start + 50])).to(device)
        with torch.inference_mode():
            tokens = model(images, views.expand(len(images), -1).to(device)).tokens
        for case, text in zip(cases[start : start + 50], model.write(tokens, **decoding)[0], strict=True):
            case["gone"] = not said(text, case["condition"])
    return cases


def removal(model, texts, looked, present, rows, thresholds, decoding, rng):
    """
    The vector of query k replaced by its mean over studies for which the head denies k; the same with a random other
    query. Cases: the head and the text both say k. -> rows
    """
    with torch.no_grad():
        seen = model(looked=looked, present=present)
    probabilities, vectors = seen.logits.sigmoid(), seen.queries
    positive = probabilities > torch.tensor(thresholds, device=probabilities.device)
    absent = [vectors[~positive[:, k], k].mean(0) if (~positive[:, k]).any() else vectors[:, k].mean(0)
              for k in range(len(CONDITIONS))]  # fmt: skip
    found = []
    for k, condition in enumerate(CONDITIONS[1:], 1):
        chosen = [i for i in range(len(rows)) if positive[i, k] and said(texts[i], condition)]
        if not chosen:
            continue
        part, there = [p[chosen] for p in looked], present[chosen]
        other = int(rng.choice([j for j in range(1, len(CONDITIONS)) if j != k]))
        results = {}
        for name, q in (("own", k), ("other", other)):
            with torch.no_grad():
                new = model(looked=part, present=there, put={q: absent[q]})
            results[name] = new.logits[:, k], model.write(new.tokens, **decoding)[0]
        for n, i in enumerate(chosen):
            case = {"patient": rows[i]["patient"], "condition": condition}
            for name, (logits, new_texts) in results.items():
                case[f"{name}_drop"] = float(seen.logits[i, k] - logits[n])
                case[f"{name}_gone"] = not said(new_texts[n], condition)
                case[f"{name}_label_gone"] = bool(logits[n].sigmoid() <= thresholds[k])
            found.append(case)
    return found


def erased(images, patches, grid):
    """images uint8 (B, V, S, S), patches bool (B, V, g, g): these squares take the mean of their film."""
    size = images.shape[-1]
    widths = torch.linspace(0, size, grid + 1).round().long().diff().to(patches.device)
    where = patches.repeat_interleave(widths, -1).repeat_interleave(widths, -2)
    means = images.float().mean((-1, -2), keepdim=True).round().to(images.dtype)
    return torch.where(where, means, images)


def deletion(model, images, looked, present, rows, thresholds, rng):
    """The tenth of the patches that query k's map ranks highest erased; a random other query's; random ones. -> rows"""
    maps = maps_of(model, looked, present)[1]
    with torch.no_grad():
        seen = model(looked=looked, present=present)
    positive, found = seen.logits.sigmoid() > torch.tensor(thresholds, device=present.device), []
    grid, there = maps.shape[-1], present[:, :, None, None].expand(-1, -1, maps.shape[-1], maps.shape[-1]).flatten(1)
    for k, condition in enumerate(CONDITIONS[1:], 1):
        chosen = torch.nonzero(positive[:, k]).flatten()
        if not len(chosen):
            continue
        other = int(rng.choice([j for j in range(1, len(CONDITIONS)) if j != k]))
        chance = torch.from_numpy(rng.random((len(chosen), there.shape[1]))).to(maps)
        ranks = {"own": maps[chosen, k].flatten(1), "other": maps[chosen, other].flatten(1), "random": chance}
        drops = {}
        for name, rank in ranks.items():
            rank = rank.masked_fill(~there[chosen], -1)
            count = (there[chosen].sum(1) * ERASED).round().long()
            order = rank.argsort(1, descending=True).argsort(1)
            gone = (order < count[:, None]).view(-1, len(VIEWS), grid, grid)
            with torch.no_grad():
                logits = model(erased(images[chosen], gone, grid), present[chosen]).logits[:, k]
            drops[name] = (seen.logits[chosen, k] - logits).tolist()
        for n, i in enumerate(chosen.tolist()):
            falls = {f"{name}_drop": values[n] for name, values in drops.items()}
            found.append({"patient": rows[i]["patient"], "study": rows[i]["uid"], "condition": condition, **falls})
    return found


def swapping(model, looked, present, rng, pairs=5):
    """Starts of two condition queries swapped: do their logits swap? -> largest difference from an exact swap."""
    with torch.no_grad():
        plain = model(looked=looked, present=present).logits
        worst = 0.0
        for _ in range(pairs):
            j, k = rng.choice(len(CONDITIONS), 2, replace=False)
            order = np.arange(len(model.names))
            order[[j, k]] = order[[k, j]]
            swapped = model(looked=looked, present=present, starts=model.queries[torch.from_numpy(order)]).logits
            expected = plain[:, torch.from_numpy(order[: len(CONDITIONS)])]
            worst = max(worst, (swapped - expected).abs().max().item())
    return worst


def sides(model, looked, present):
    """Region maps of the lungs: share of their weight in the frontal films that lies in that half of it."""
    there = present[:, 0]
    if not set(REGIONS) <= set(model.names) or not there.any():
        return None
    maps = maps_of(model, looked, present)[1][there, :, 0]
    left = maps[..., maps.shape[-1] // 2 :].sum((-1, -2)) / maps.sum((-1, -2)).clamp(min=1e-9)  # the image's right half
    left_lung, right_lung = (left[:, model.names.index(name)].mean().item() for name in ("left_lung", "right_lung"))
    return {"left_lung": left_lung, "right_lung": 1 - right_lung}


def faithfulness(model, rows, notes, args, told, device, decoding):
    """All tests on these rows -> dict of plain numbers."""
    rng = np.random.default_rng(args.seed)
    rows = [row | {"seen_views": args.views} for row in rows]
    films = Films(rows, model.image_size, notes.get("drawn"), args.views)
    images, present = (torch.from_numpy(a).to(device) for a in films.get(list(range(len(rows)))))
    with torch.no_grad():
        parts = [model.look(images[i : i + 50], present[i : i + 50]) for i in range(0, len(rows), 50)]
        looked = [torch.cat(part) for part in zip(*parts, strict=True)]
        texts = model.write(model(looked=looked, present=present).tokens, **decoding)[0]
    found = {"n": len(rows), "lung maps in their half": sides(model, looked, present)}
    if model.num_conditions:
        thresholds = told.get("thresholds") or [0.5] * len(CONDITIONS)
        cases = removal(model, texts, looked, present, rows, thresholds, decoding, rng)
        keys = [f"{who}_{what}" for who in ("own", "other") for what in ("drop", "gone", "label_gone")]
        found["removal"] = {key: mean_of(cases, key) for key in keys}
        cases = deletion(model, images, looked, present, rows, thresholds, rng)
        found["deletion"] = {key: mean_of(cases, key) for key in ("own_drop", "other_drop", "random_drop")}
        found["swap"] = swapping(model, looked, present, rng)
    if notes.get("phantom"):
        if present[:, 0].all():  # boxes are drawn on frontal films
            found["pointing"] = pointing_summary(pointing(model, rows, images, looked, present, notes["drawn"], rng))
        cases = redrawing(model, rows, texts, notes["drawn"], device, decoding)
        found["redrawn"] = {
            what: mean_of([c for c in cases if c["what"] == what], "gone") for what in ("lesion", "other finding")
        }
    return found


def faithfulness_tables(found):
    """-> [(heading, sentence, header, rows)] for the report."""
    tables = []
    if "redrawn" in found:
        rows = [
            [f"without the {w}", with_interval(v, percent), v["n"] if v else 0] for w, v in found["redrawn"].items()
        ]
        tables.append(
            ("Film drawn anew", "Share of named conditions whose sentence goes.", ["", "gone, %", "cases"], rows)
        )
    if "removal" in found:
        columns = ("drop", number), ("label_gone", percent), ("gone", percent)
        rows = [[name, *(with_interval(found["removal"][f"{who}_{key}"], show) for key, show in columns)]
                for who, name in (("own", "its own query"), ("other", "a random other query"))]  # fmt: skip
        text, header = (
            "Cases: head and text both say k.",
            ["", "fall of logit k", "label k gone, %", "sentence gone, %"],
        )
        tables.append(("Query k replaced by its mean over studies without k", text, header, rows))
        rows = [[who, with_interval(found["deletion"][f"{who}_drop"], number)] for who in ("own", "other", "random")]
        text, header = "Ranked by the map of query k, of a random other query, or at random.", ["", "fall of logit k"]
        tables.append((f"{ERASED:.0%} of the patches erased", text, header, rows))
        text = "Their logits swap, up to this difference; the text cannot change: pooling has no order."
        tables.append(("Two condition queries swapped", text, ["largest difference"], [[f"{found['swap']:.1e}"]]))
    rows = [
        [kind, what, name, row["hit"]["n"], with_interval(row["hit"], percent), percent(row["area"]["value"]),
         number(row["times_chance"], 2), percent(row["other_hit"]["value"]), number(row["mass_times_chance"], 2)]
        for kind, parts in found.get("pointing", {}).items() for what, names in parts.items()
        for name, row in names.items()
    ]  # fmt: skip
    if rows:
        header = "map|queries||cases|hits, %|chance, %|times chance|another query's hits, %|weight, times chance".split(
            "|"
        )
        text = "Hit: the highest patch lies in the true box (conditions) or in the organ (regions)."
        tables.append(("Do the maps lie on what was drawn?", text, header, rows))
    return tables
