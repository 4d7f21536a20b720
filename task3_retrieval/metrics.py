"""
Metrics of retrieval by similarity: arrays in, numbers out. Pure NumPy / SciPy; undefined is NaN per query, None in a
summary.

    exclude = query_ids[:, None] == gallery_ids                   # the query itself, by id, never "the first hit"
    values = retrieval_values(similarity, labels, gallery_labels, num_classes, exclude)     # {"P@1": (Q,), "AP": ...}
    draws = query_draws(values, labels, num_classes)
    table = summarise(values, labels, num_classes, draws)         # micro, macro and per class, with intervals

Relevant = same label. Definitions, with R = relevant items of the gallery after exclusion:
    P@k       relevant among the first k, divided by k, also where fewer than k items are left
    R-prec    precision at rank R
    AP        mean over all R relevant items of the precision at their rank, over the full ranking
    RR        1 / rank of the first relevant item
    nDCG@k    gain 1, discount 1 / log2(rank + 1), ideal = min(R, k) relevant items first
    vote      is the majority of the first `vote_k` neighbours the query's class?
A query without any relevant item (R = 0) has no R-prec, AP, RR and nDCG: NaN, left out of the means.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np
from scipy.stats import hypergeom

from shared.metrics.statistics import none_if_nan, percentile_interval, resample_counts

KS = (1, 3, 5, 10)


def rank_gallery(similarity, exclude=None):
    """
    similarity (Q, N) finite, higher = more alike; exclude (Q, N) bool, items a query may not find (itself, its copies)
    -> order (Q, N) int64: gallery rows from most to least alike, excluded ones last; num_left (Q,): how many are not
    excluded. Equal similarities keep the order of the gallery: put the gallery in the order of its ids and every index
    type agrees.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or similarity.shape[1] == 0:
        raise ValueError(
            f"similarity must have shape (queries, gallery items) with at least one item, got {similarity.shape}"
        )
    if not np.isfinite(similarity).all():
        raise ValueError(f"{int((~np.isfinite(similarity)).sum())} similarities are NaN or infinite")
    if exclude is None:
        return np.argsort(-similarity, axis=1, kind="stable"), np.full(len(similarity), similarity.shape[1])
    exclude = np.asarray(exclude)
    if exclude.shape != similarity.shape or exclude.dtype != bool:
        raise ValueError(f"exclude must be bool of shape {similarity.shape}, got {exclude.dtype} {exclude.shape}")
    num_left = (~exclude).sum(axis=1)
    if (num_left == 0).any():
        raise ValueError(f"{int((num_left == 0).sum())} queries have an empty gallery after exclusion")
    return np.argsort(np.where(exclude, np.inf, -similarity), axis=1, kind="stable"), num_left


def relevance(order, num_left, query_labels, gallery_labels):
    """-> (Q, N) bool in rank order: has this item the query's label? False beyond num_left."""
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    in_gallery = np.arange(order.shape[1]) < np.asarray(num_left)[:, None]
    return (gallery_labels[order] == query_labels[:, None]) & in_gallery


def query_metrics(relevant, ks=KS):
    """relevant (Q, N) bool in rank order -> {name: (Q,) float64}; definitions at the top of this file."""
    relevant = np.asarray(relevant, dtype=bool)
    n = relevant.shape[1]
    ranks = np.arange(1, n + 1)
    hits = relevant.cumsum(axis=1, dtype=np.int32)  # relevant items up to each rank
    total = hits[:, -1]
    found = total > 0
    discount = 1 / np.log2(ranks + 1)

    def defined(values):
        return np.where(found, values, np.nan)

    values = {f"P@{k}": hits[:, min(k, n) - 1] / k for k in ks}
    divisor = np.maximum(total, 1)
    values["R-prec"] = defined(hits[np.arange(len(hits)), divisor - 1] / divisor)
    values["AP"] = defined(np.where(relevant, hits / ranks, 0).sum(axis=1) / divisor)
    values["RR"] = defined(1 / (relevant.argmax(axis=1) + 1))
    for k in ks:
        ideal = np.concatenate([[0], discount[:k].cumsum()])[np.minimum(divisor, min(k, n))]
        values[f"nDCG@{k}"] = defined((relevant[:, :k] * discount[:k]).sum(axis=1) / ideal)
    return values


def knn_vote(neighbours, num_left, similarity, gallery_labels, num_classes, k=5):
    """
    neighbours (Q, k or more): gallery rows by rank; similarity of the same shape, to these; num_left (Q,).
    Majority of the first k; equal counts go to the class with the larger summed similarity, and should these be equal
    too, to the nearer neighbour's. -> called (Q,) int64, share (Q, num_classes) of the neighbours, adding up to 1.
    Queries with fewer than k items left vote with what there is.
    """
    first = neighbours[:, :k]
    there = np.arange(first.shape[1]) < np.asarray(num_left)[:, None]
    member = (np.asarray(gallery_labels)[first][..., None] == np.arange(num_classes)) & there[..., None]  # (Q, k, C)
    counts = member.sum(axis=1)
    summed = np.where(member, np.asarray(similarity, dtype=np.float64)[:, :k, None], 0).sum(axis=1)
    nearest = np.where(member.any(axis=1), member.argmax(axis=1), k)  # rank of each class's first neighbour
    best = counts == counts.max(axis=1, keepdims=True)
    best &= summed == np.where(best, summed, -np.inf).max(axis=1, keepdims=True)
    return np.where(best, nearest, k + 1).argmin(axis=1), counts / counts.sum(axis=1, keepdims=True)


def first_of(similarity, order, k):
    """similarity (Q, N), order (Q, N or more) -> order and similarity of the first k ranks, (Q, k) each."""
    first = order[:, :k]
    return first, np.take_along_axis(np.asarray(similarity), first, axis=1)


def retrieval_values(similarity, query_labels, gallery_labels, num_classes, exclude=None, ks=KS, vote_k=5):
    """
    similarity (Q, N), query_labels (Q,), gallery_labels (N,) int, exclude (Q, N) bool or None -> {name: (Q,) float64}.
    """
    order, num_left = rank_gallery(similarity, exclude)
    values = query_metrics(relevance(order, num_left, query_labels, gallery_labels), ks)
    first, near = first_of(similarity, order, vote_k)
    called, _ = knn_vote(first, num_left, near, gallery_labels, num_classes, vote_k)
    return values | {"vote": (called == np.asarray(query_labels)).astype(np.float64)}


# --- means and intervals ---


def class_means(values, labels, num_classes, weights=None):
    """
    values (Q, M) with NaN for undefined, labels (Q,), weights (B, Q) or None (all 1, B = 1) -> means (B, 2 +
    num_classes, M): micro, macro, then every class. Macro = mean of the classes that have queries.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones((1, len(values))) if weights is None else np.asarray(weights, dtype=np.float64)
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0)
    groups = [np.ones(len(values), dtype=bool), *(np.asarray(labels) == c for c in range(num_classes))]
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN: a class without queries
        micro, *classes = ((weights[:, g] @ filled[g]) / (weights[:, g] @ defined[g]) for g in groups)
        classes = np.stack(classes, axis=1)  # (B, C, M)
        there = ~np.isnan(classes)
        macro = np.where(there, classes, 0).sum(axis=1) / there.sum(axis=1)
    return np.concatenate([micro[:, None], macro[:, None], classes], axis=1)


def query_draws(values, labels, num_classes, groups=None, num_samples=2000, seed=0):
    """
    Bootstrap over queries, the gallery held fixed: {name: (Q,)} -> (num_samples, 2 + num_classes, M) means as
    `class_means`. groups (Q,): draw whole groups, such as copies of one image. The same seed gives the same draws to
    every system.
    """
    counts = np.stack(list(resample_counts(len(labels), num_samples, seed, groups)))
    return class_means(np.stack(list(values.values()), axis=1), labels, num_classes, counts)


def leave_one_out_draws(similarity, labels, num_classes, exclude, ks=KS, vote_k=5, num_samples=500, seed=0):
    """
    Bootstrap of a set that is query and gallery at once, similarity (N, N): an image drawn twice counts twice as a
    query *and* stands twice in the gallery, one not drawn does neither; a query never finds its own copies (exclude has
    a true diagonal). Resampling the queries alone would treat the gallery as fixed although it is the same sample of
    films. -> (num_samples, 2 + num_classes, M). A resample holds about 63 % of the images, so that its near neighbours
    are a little further away and the interval lies a little low.
    """
    labels, similarity = np.asarray(labels), np.asarray(similarity)
    if similarity.shape != (len(labels), len(labels)) or not np.diagonal(exclude).all():
        raise ValueError("leave-one-out needs a square similarity, and every query excluded from its own gallery")
    order, num_left = rank_gallery(similarity, exclude)
    draws = []
    for counts in resample_counts(len(labels), num_samples, seed):
        copies = counts[order]  # (N, N), by rank
        left = np.where(np.arange(len(labels)) < num_left[:, None], copies, 0).sum(axis=1)
        rows = np.flatnonzero((counts > 0) & (left > 0))
        # each item as often as it was drawn; all rows get the same length, since excluded items stay, at the end
        drawn = np.repeat(order[rows].ravel(), copies[rows].ravel()).reshape(len(rows), -1)
        values = query_metrics(relevance(drawn, left[rows], labels[rows], labels), ks)
        first, near = first_of(similarity[rows], drawn, vote_k)
        called, _ = knn_vote(first, left[rows], near, labels, num_classes, vote_k)
        values["vote"] = (called == labels[rows]).astype(np.float64)
        draws.append(
            class_means(np.stack(list(values.values()), axis=1), labels[rows], num_classes, counts[None, rows])[0]
        )
    return np.stack(draws)


def summarise(values, labels, num_classes, draws=None, baseline=None):
    """
    {name: (Q,)} and its resampled means `draws` (None: no intervals); baseline: (values, draws) of another system,
    resampled by the same seed -> {"micro" | "macro" | 0 | 1 | ...: {name: dict(value, low, high)}}, 95 % percentile
    intervals; with a baseline also difference (system - baseline), difference_low, difference_high, p (paired).
    """

    def means(of):
        return class_means(np.stack(list(of.values()), axis=1), labels, num_classes)[0]

    mean = means(values)
    result = {row: {} for row in ("micro", "macro", *range(num_classes))}
    for i, row in enumerate(result):
        for j, name in enumerate(values):
            low, high = (None, None) if draws is None else percentile_interval(draws[:, i, j])[:2]
            result[row][name] = {"value": none_if_nan(mean[i, j]), "low": low, "high": high}
            if baseline is None:
                continue
            gaps = draws[:, i, j] - baseline[1][:, i, j]
            low, high, undefined = percentile_interval(gaps)
            tail, num_defined = min((gaps <= 0).sum(), (gaps >= 0).sum()), len(gaps) - undefined
            result[row][name] |= {
                "difference": none_if_nan(mean[i, j] - means(baseline[0])[i, j]),
                "difference_low": low,
                "difference_high": high,
                "p": min(1.0, float(2 * (1 + tail) / (num_defined + 1))) if num_defined else None,
            }
    return result


# --- chance ---


def chance(num_relevant, num_left, ks=KS):
    """
    Expected metrics of a random order, exactly, for queries with num_relevant (Q,) of num_left (Q,) items -> {name:
    (Q,)}.

    The item at any rank is relevant with R / N. Given that rank i holds one, a rank before it does with (R - 1) / (N -
    1), and i itself is uniform: E[AP] = a + (1 - a) H_N / N with a = (R - 1) / (N - 1). E[RR] sums P(first hit at rank
    i) / i.
    """
    unique, back = np.unique(np.stack([num_relevant, num_left], axis=1), axis=0, return_inverse=True)
    rows = []
    for total, n in unique.tolist():
        row = {f"P@{k}": total / n * min(k, n) / k for k in ks}
        harmonic = (1 / np.arange(1, n + 1)).sum()
        if total:
            a = (total - 1) / max(1, n - 1)
            # before rank i: i - 1 misses in a row, of N - R misses among N items
            i = np.arange(1, n - total + 1)
            misses = np.concatenate([[1.0], np.cumprod((n - total - i + 1) / (n - i + 1))])
            hit = total / (n - np.arange(n - total + 1))
            rr = float((misses * hit / np.arange(1, n - total + 2)).sum())
            row |= {"R-prec": total / n, "AP": a + (1 - a) * harmonic / n, "RR": rr}
        else:
            row |= dict.fromkeys(("R-prec", "AP", "RR"), np.nan)
        for k in ks:
            discount = 1 / np.log2(np.arange(1, min(k, n) + 1) + 1)
            row[f"nDCG@{k}"] = total / n * discount.sum() / discount[: min(total, k)].sum() if total else np.nan
        rows.append(list(row.values()))
    return dict(zip(row, np.array(rows)[back.ravel()].T, strict=True))


def chance_vote(num_relevant, num_left, k=5):
    """How often is the majority of k random items of the query's class? (Q,); two classes and odd k only."""
    if k % 2 == 0:
        raise ValueError(f"the chance of a vote is defined for odd k only, got {k}")
    return hypergeom.sf(k // 2, np.asarray(num_left), np.asarray(num_relevant), k)


# --- hubs and copies ---


def hubness(first, num_left, num_items, k=10):
    """
    Does the gallery have hubs, items that are everybody's neighbour (Radovanovic et al. 2010, JMLR 11:2487)?
    k-occurrence = in how many of the first-k lists an item stands. first (Q, k or more): gallery rows by rank, of
    num_items. -> dict(k, skewness of the k-occurrence, max and the item that has it, never: share of items in no list,
    top1_percent: share of all places held by the most frequent 1 % of the items).
    """
    first = first[:, :k]
    there = np.arange(first.shape[1]) < np.asarray(num_left)[:, None]
    occurrence = np.bincount(first[there], minlength=num_items)
    deviation = occurrence - occurrence.mean()
    spread = occurrence.std()
    few = max(1, round(len(occurrence) / 100))
    return {
        "k": k,
        "skewness": float((deviation**3).mean() / spread**3) if spread else None,
        "max": int(occurrence.max()),
        "item": int(occurrence.argmax()),
        "never": float((occurrence == 0).mean()),
        "top1_percent": float(np.sort(occurrence)[-few:].sum() / occurrence.sum()),
    }


def content_codes(*image_sets):
    """
    uint8 arrays (N, ...) -> one int64 array (N,) per set; equal codes = byte-identical images, within and between sets.
    """
    seen = {}
    codes = ([seen.setdefault(image.tobytes(), len(seen)) for image in images] for images in image_sets)
    return [np.array(of, dtype=np.int64) for of in codes]


def duplicate_report(codes, labels):
    """
    {split: codes (N,)}, {split: labels (N,)} -> dict(repeats {split: images that repeat an earlier one of their split},
    pairs {split: [[i, j], ...]}, shared {"a-b": different images that lie in both}, conflicting: images with two
    labels).
    """
    repeats = {s: len(c) - len(np.unique(c)) for s, c in codes.items()}
    pairs = {}
    for split, c in codes.items():
        order = np.argsort(c, kind="stable")
        same = np.flatnonzero(c[order][1:] == c[order][:-1])
        pairs[split] = sorted([int(order[i]), int(order[i + 1])] for i in same)
    names = list(codes)
    shared = {f"{a}-{b}": len(np.intersect1d(codes[a], codes[b])) for i, a in enumerate(names) for b in names[i + 1 :]}
    content, label = np.concatenate(list(codes.values())), np.concatenate([labels[s] for s in names])
    kinds = np.unique(np.stack([content, label], axis=1), axis=0)
    conflicting = int((np.unique(kinds[:, 0], return_counts=True)[1] > 1).sum())
    return {"repeats": repeats, "pairs": pairs, "shared": shared, "conflicting": conflicting}
