"""
What evaluate.py measures on one system, or on all of them: the search itself, and whether what it says can be trusted.

A system is an Embedder with a metric, and what its vectors found: {"embed", "metric", "vectors": {split: (N, D)},
"across": queries in train, "within": queries among themselves, "val": validation in train}, the last three as `search`
returns them.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score
from tqdm import tqdm

from shared.data.augment import shifted_copies  # the same changes that validation is judged under, see train.py
from shared.data.image_sets import ImageSet
from shared.metrics.statistics import auroc, bootstrap_interval, mcnemar_exact, wilson_interval
from task3_retrieval.embed import channels_last
from task3_retrieval.metrics import chance, chance_vote, content_codes, first_of, knn_vote, leave_one_out_draws
from task3_retrieval.metrics import query_draws, query_metrics, rank_gallery, relevance, summarise

BLOCK = 2**24  # similarities held at once
MOST_LOO = 2000  # images up to which leave-one-out resamples the gallery too
FLOOR = "raw pixels, cosine"  # the system that all are compared with


@dataclass
class Study:
    """What every system is measured on, and how: the same images, labels, copies, votes and resamples for all."""

    data: ImageSet
    queries: str  # the split that asks
    k: int  # neighbours that vote
    resamples: int
    seed: int

    def __post_init__(self):
        self.labels = {split: labels.numpy() for split, labels in self.data.labels.items()}
        codes = content_codes(*(x.numpy() for x in self.data.images.values()))
        self.codes = dict(zip(self.data.images, codes, strict=True))  # equal = byte-identical images
        self.names = self.data.label_names
        self.y, self.gallery = self.labels[self.queries], self.labels["train"]


# -------------------------------------------------------------------------------------------------------------- search


def prepare(vectors, metric):
    """float32 (N, D) -> float64; for cosine of unit length (zeros stay), rounded to float32 as in index.py."""
    vectors = vectors.astype(np.float64)
    if metric == "cosine":
        vectors = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)).astype(np.float32)
    return vectors.astype(np.float64)


def similarities(queries, gallery, metric):
    """
    (Q, D), (N, D), both prepared -> float32 (Q, N): cosine, or minus the Euclidean distance. Computed in float64 and
    rounded, so that copies of one image tie, and then the smaller id comes first, as in index.py.
    """
    product = queries @ gallery.T
    if metric == "cosine":
        return product.astype(np.float32)
    squared = (queries**2).sum(1)[:, None] + (gallery**2).sum(1) - 2 * product
    return -np.sqrt(np.maximum(squared, 0)).astype(np.float32)


def as_distance(similarity, metric):
    """What `similarities` returns -> what grows with the distance: 1 - cosine, or the Euclidean distance."""
    return 1 - similarity if metric == "cosine" else -similarity


def search(queries, gallery, metric, query_labels, gallery_labels, num_classes, same, k):
    """
    Rank the gallery for every query, block by block. `same` (Q,), (N,): content codes; equal ones must not find each
    other. -> dict of values {metric: (Q,)}, first (Q, most) gallery rows, left (Q,), similarity (Q, most) of these,
    called (Q,), share (Q, C); most = 50 or the size of the gallery.
    """
    queries, gallery = prepare(queries, metric), prepare(gallery, metric)
    query_codes, gallery_codes = same
    most, parts = min(50, len(gallery)), []
    step = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similarity = similarities(queries[rows], gallery, metric)
        order, left = rank_gallery(similarity, query_codes[rows, None] == gallery_codes)
        values = query_metrics(relevance(order, left, query_labels[rows], gallery_labels))
        first, near = first_of(similarity, order, most)
        called, share = knn_vote(first, left, near, gallery_labels, num_classes, k)
        values["vote"] = (called == query_labels[rows]).astype(np.float64)
        parts.append({**values, "first": first, "left": left, "similarity": near, "called": called, "share": share})
    joined = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    found = {key: joined.pop(key) for key in ("first", "left", "similarity", "called", "share")}
    return {"values": joined, **found}


def each(systems, doing):
    """The items of a dict one by one: a line that says what is done, and in a terminal a bar with the time left."""
    print(f"  {doing}", flush=True)
    return tqdm(systems.items(), desc=f"  {doing}", leave=False, disable=None)


def evaluate_system(embed, metric, study):
    """Vectors of one system -> the system with its three searches."""
    tqdm.write(f"  {embed.name}, {metric}: {embed.dim} numbers per image")
    queries, images = study.queries, study.data.images
    vectors = {split: embed(channels_last(images[split])) for split in {"train", "val", queries}}
    system = {"embed": embed, "metric": metric, "vectors": vectors}
    for name, query, gallery in (("across", queries, "train"), ("within", queries, queries), ("val", "val", "train")):
        same, labels = ((of[query], of[gallery]) for of in (study.codes, study.labels))
        system[name] = search(vectors[query], vectors[gallery], metric, *labels, len(study.names), same, study.k)
    return system


def compare_all(systems, study):
    """Tables {protocol: {system: {"micro" | "macro" | class: {metric: numbers}}}}, differences to FLOOR."""
    y, codes, num_classes = study.y, study.codes[study.queries], len(study.names)
    tables = {}
    for protocol, gallery in (("across", "train"), ("within", study.queries)):
        draws = {}
        for name, system in each(systems, f"intervals, {protocol}"):
            if protocol == "within" and len(y) <= MOST_LOO:
                v = prepare(system["vectors"][study.queries], system["metric"])
                similarity, copies = similarities(v, v, system["metric"]), codes[:, None] == codes
                draws[name] = leave_one_out_draws(
                    similarity, y, num_classes, copies, vote_k=study.k, num_samples=max(1, study.resamples // 4),
                    seed=study.seed,
                )  # fmt: skip
            else:
                draws[name] = query_draws(
                    system[protocol]["values"], y, num_classes, codes, study.resamples, study.seed
                )
        rows = tables[protocol] = {}
        for name, system in systems.items():
            baseline = None if name == FLOOR else (systems[FLOOR][protocol]["values"], draws[FLOOR])
            rows[name] = summarise(system[protocol]["values"], y, num_classes, draws[name], baseline)
        left, labels = systems[FLOOR][protocol]["left"], study.labels[gallery]
        same = np.bincount(labels, minlength=num_classes)[y] - (len(labels) - left)  # copies have the same label
        expected = chance(same, left) | ({"vote": chance_vote(same, left, study.k)} if num_classes == 2 else {})
        rows["chance, exact"] = summarise(expected, y, num_classes)
    return tables


def paired_difference(systems, study, first, second):
    """Two systems on the headline protocol, by the same resamples."""
    values = [systems[name]["across"]["values"] for name in (first, second)]
    settings = (study.y, len(study.names), study.codes[study.queries], study.resamples, study.seed)
    draws = [query_draws(v, *settings) for v in values]
    return summarise(values[0], study.y, len(study.names), draws[0], (values[1], draws[1]))


# ---------------------------------------------------------------------------------------------------- what it is worth


def view_recall(system, study):
    """
    A similarity that needs no label: a changed copy of every query image searches the unchanged query images. How often
    does it find its own original (or a byte-identical one) first, and among the first five? {change: {"R@1", "R@5"}}
    and their mean.
    """
    metric, codes, rows = system["metric"], study.codes[study.queries], {}
    gallery = prepare(system["vectors"][study.queries], metric)
    for name, images in shifted_copies(study.data.images[study.queries]).items():
        if name != "as it is":
            vectors = system["embed"](channels_last((images * 255).round().to(torch.uint8)))
            order, _ = rank_gallery(similarities(prepare(vectors, metric), gallery, metric))
            own = codes[order] == codes[:, None]
            rows[name] = {"R@1": float(own[:, 0].mean()), "R@5": float(own[:, :5].any(1).mean())}
    rows["mean"] = {key: float(np.mean([r[key] for r in rows.values()])) for key in ("R@1", "R@5")}
    return rows


def foreign_images(images, seed):
    """uint8 (N, C, H, W) -> {kind: images of the same shape that are no upright chest films}."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "noise": torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8),
        "turned by 90 degrees": images.rot90(1, (2, 3)).contiguous(),
        "upside down": images.flip(2),
        "inverted": 255 - images,
    }


def foreign_detection(system, study):
    """
    Does the distance to the k-th neighbour tell foreign images from real queries? AUROC, interval over images; and the
    share warned of at the limit that 95 % of the *validation* images stay below. -> ({"k", "limit", "kinds": {kind:
    numbers}}, {kind: distances})
    """
    metric, k = system["metric"], min(study.k, system["across"]["similarity"].shape[1]) - 1
    gallery = prepare(system["vectors"]["train"], metric)
    usual, val = (as_distance(system[protocol]["similarity"][:, k], metric) for protocol in ("across", "val"))
    limit, n, step = float(np.quantile(val, 0.95)), len(usual), max(1, BLOCK // len(gallery))
    distances = {study.queries: usual}
    result = {study.queries: {"warned": float((usual > limit).mean())}}
    for kind, images in foreign_images(study.data.images[study.queries], study.seed).items():
        vectors = prepare(system["embed"](channels_last(images)), metric)
        blocks = (similarities(vectors[i : i + step], gallery, metric) for i in range(0, n, step))
        nearest = np.concatenate([np.partition(s, -1 - k, axis=1)[:, -1 - k] for s in blocks])
        far = distances[kind] = as_distance(nearest, metric)
        interval = bootstrap_interval(
            auroc, np.repeat([0, 1], n), np.concatenate([usual, far]), groups=np.tile(np.arange(n), 2),
            num_samples=min(500, study.resamples), seed=study.seed,
        )  # fmt: skip
        result[kind] = {"auroc": interval["value"], "low": interval["low"], "high": interval["high"]}
        result[kind]["warned"] = float((far > limit).mean())
    return {"k": k + 1, "limit": limit, "kinds": result}, distances


def explanation_checks(found, y, gallery_labels, num_classes, k, seed, times=200):
    """
    Can the explanation fail? With shuffled gallery labels the vote must fall to chance, and without its neighbours it
    has to be found again from the next ones. Balanced accuracy of the vote; share of queries whose vote stays.
    """
    first, similarity, left = found["first"], found["similarity"], found["left"]
    rng = np.random.default_rng(seed)
    classes = [c for c in range(num_classes) if (y == c).any()]

    def balanced(called):
        return float(np.mean([(called[y == c] == c).mean() for c in classes]))

    def vote(labels, start=0):
        return knn_vote(first[:, start:], left - start, similarity[:, start:], labels, num_classes, k)[0]

    shuffled = [balanced(vote(rng.permutation(gallery_labels))) for _ in range(times)]
    result = {
        "vote": balanced(found["called"]),
        "shuffled_mean": float(np.mean(shuffled)),
        "shuffled_low": float(np.quantile(shuffled, 0.025)),
        "shuffled_high": float(np.quantile(shuffled, 0.975)),
        "num_shuffles": times,
    }
    if (np.minimum(left, first.shape[1]) >= 2 * k).all():
        following = vote(gallery_labels, k)
        result["vote_stays_without_neighbours"] = float((following == found["called"]).mean())
        result["vote_without_neighbours"] = balanced(following)
    return result


def agreement(called, answers, y):
    """The vote of the neighbours (Q,) beside the classifier's answers (Q,) on the same queries of labels y (Q,)."""
    same, right, vote_right = answers == called, answers == y, called == y
    low, high = wilson_interval(int(same.sum()), len(y))
    several = len(np.unique([answers, called])) > 1
    return {
        "agree": float(same.mean()),
        "low": low,
        "high": high,
        "kappa": float(cohen_kappa_score(answers, called)) if several else None,
        "accuracy_classifier": float(right.mean()),
        "accuracy_vote": float(vote_right.mean()),
        "mcnemar": mcnemar_exact(vote_right, right),
        "num_disagree": int((~same).sum()),
        "accuracy_when_agreed": float(vote_right[same].mean()) if same.any() else None,
        "accuracy_vote_when_not": float(vote_right[~same].mean()) if (~same).any() else None,
    }


def copies_matter(system, study):
    """What the treatment of copies does to leave-one-out: copies out, only the query out, nothing out."""
    vectors, codes = system["vectors"][study.queries], study.codes[study.queries]
    own = np.arange(len(codes))
    ways = {
        "query and copies left out": (codes, codes),
        "only the query left out": (own, own),
        "query left in (wrong)": (own, own + len(own)),
    }
    rows = {}
    for name, same in ways.items():
        found = search(vectors, vectors, system["metric"], study.y, study.y, len(study.names), same, study.k)
        rows[name] = {key: float(np.nanmean(found["values"][key])) for key in ("P@1", "P@5", "AP", "vote")}
    return rows


def failures(found, y):
    """Queries whose vote is wrong: largest share of the vote first, then lowest average precision, then index."""
    wrong = np.flatnonzero(found["called"] != y)
    return wrong[np.lexsort((wrong, found["values"]["AP"][wrong], -found["share"].max(1)[wrong]))]


def precision_curve(found, y, gallery_labels, num_classes):
    """Mean precision among the first 1, 2, ... 50 neighbours, per class: (num_classes, most)."""
    right = (gallery_labels[found["first"]] == y[:, None]).cumsum(1) / np.arange(1, found["first"].shape[1] + 1)
    nothing = np.full(right.shape[1], np.nan)
    return np.stack([right[y == c].mean(0) if (y == c).any() else nothing for c in range(num_classes)])
