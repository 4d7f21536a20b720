"""
An index of labelled images: vectors, what they show, and how they were made, kept together and checked together.

    index = CaseIndex(vectors, ids, labels, names, splits, metadata, kind="flat", metric="l2")
    index.save("folder")                                        # whole or not at all
    index = CaseIndex.load("folder", embedder)                  # refuses damaged files and vectors of another model
    distances, ids = index.search(queries, k=5, exclude=own_ids, where={"label": "pneumonia"})

metric l2: Euclidean distance, the root and not FAISS's square, smallest first. cosine: similarity, largest first.
Ties go to the smaller id, so that every kind gives the same list: FAISS only proposes a few more candidates than asked
for, their distances are computed again from the stored vectors in float64, and where a candidate beyond the last one
fetched could still belong into the list, all vectors are compared. What is compared is rounded to float32.

kind flat    every vector is compared; exact. With a filter (`where`) every kind is exact: the filtered vectors are
             compared.
     hnsw    graph (Malkov & Yashunin 2018), (4 d + 8 M) bytes per vector and the vectors; cannot forget: removed ids
             are skipped
     ivfpq   lists and product codes (Jegou et al. 2011), d / 8 + 8 bytes per vector; needs 1,024 vectors to train on

Files: manifest.json with a digest of itself and of the others, vectors-*.npy (row by row, unit length for cosine),
cases-*.csv and index-*.faiss, named by what is in them. The manifest is written last and in one step, so an interrupted
save leaves the index before it untouched.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import csv
import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist

from shared.data.download import sha256_of
from shared.runtime import InputError, atomic_file, plain, read_json, record, write_json

try:
    import faiss
except ImportError as error:  # at import no script can catch it yet
    print(f"error: faiss cannot be imported ({error}); pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2) from error

FORMAT = "task3-index-2"
KINDS, METRICS = ("flat", "hnsw", "ivfpq"), ("l2", "cosine")
MEASURES = {"l2": faiss.METRIC_L2, "cosine": faiss.METRIC_INNER_PRODUCT}
UNKNOWN = -1  # label of an image without one
SPARE = 16  # candidates fetched beyond k
MIN_IVFPQ = 1024  # vectors; fewer cannot train 256 codes per part
SETTINGS = {
    "flat": {},
    "hnsw": {"links": 32, "ef_construction": 200, "ef_search": 64},
    "ivfpq": {"lists": None, "parts": None, "probes": 16, "refine": 10},
}
OWN_FILES = re.compile(r"(vectors|cases|index)-[0-9a-f]{12}\.(npy|csv|faiss)|\..*\.part")  # what save writes
CHUNK = 2**24  # float64 numbers compared at once (128 MiB)
TYPICAL_K, TYPICAL_SAMPLE, TYPICAL_SHARES = 10, 5000, ("0.95", "0.99")


class CaseIndex:
    """
    vectors float (N, D); ids int64 (N,), unique and not negative; labels int64 (N,), -1 unknown, names of the classes
    in metadata["label_names"]; names and splits: N texts; metadata: a dict that JSON can hold, such as {"embedder":
    embedder.facts(), "label_names": [...], "datasets": {...}}. InputError for whatever does not fit together.
    """

    def __init__(self, vectors, ids, labels, names, splits, metadata=None, kind="flat", metric="l2", settings=None):
        if kind not in KINDS or metric not in METRICS:
            raise InputError(
                f"an index is of the kind {', '.join(KINDS)} with the metric {' or '.join(METRICS)}, not {kind} with"
                f" {metric}"
            )
        self.kind, self.metric, self.settings = kind, metric, SETTINGS[kind] | (settings or {})
        self.metadata = {"label_names": [], "datasets": {}} | dict(metadata or {})
        self.retired = set()  # ids an HNSW graph still holds but must not answer with
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] == 0:
            raise InputError(f"vectors have the shape (N, D), not {vectors.shape}")
        if len(vectors) == 0:
            raise InputError("an index needs at least one image")
        self.dim = vectors.shape[1]
        self.vectors = self.prepare(vectors)
        self.set_cases(*self.check_cases(ids, labels, names, splits, len(vectors)))
        self.faiss_index = new_faiss(kind, metric, self.vectors, self.settings)
        self.faiss_index.add_with_ids(self.vectors, self.ids)

    # ------------------------------------------------------------------------------------------------------ the cases

    def check_cases(self, ids, labels, names, splits, n):
        ids, labels = np.asarray(ids), np.asarray(labels)
        names, splits = list(map(str, names)), list(map(str, splits))
        if not len(ids) == len(labels) == len(names) == len(splits) == n:
            raise InputError(
                f"there are {n} vectors, {len(ids)} ids, {len(labels)} labels, {len(names)} names and {len(splits)}"
                " splits"
            )
        if ids.dtype.kind not in "iu" or labels.dtype.kind not in "iu" or ids.ndim != 1 or labels.ndim != 1:
            raise InputError("ids and labels are whole numbers, one per image")
        if len(np.unique(ids)) < n or ids.min(initial=0) < 0:
            raise InputError("ids must be unique and not negative")
        most = len(self.metadata["label_names"]) if self.metadata.get("label_names") else np.inf
        if labels.min(initial=0) < UNKNOWN or labels.max(initial=0) >= most:
            raise InputError(f"labels are numbers of the {most} label names, or {UNKNOWN}")
        texts = (np.array(values, dtype=object) for values in (names, splits))
        return ids.astype(np.int64), labels.astype(np.int64), *texts

    def set_cases(self, ids, labels, names, splits):
        self.ids, self.labels, self.names, self.splits = ids, labels, names, splits
        self.order = np.argsort(ids, kind="stable")
        self.sorted_ids = ids[self.order]
        self.largest_norm = float(np.sqrt(np.einsum("nd,nd->n", self.vectors, self.vectors).max())) if len(ids) else 0.0

    def __len__(self):
        return len(self.ids)

    def __repr__(self):
        return f"CaseIndex({self.kind}, {self.metric}: {len(self)} x {self.dim})"

    @property
    def label_names(self):
        return self.metadata.get("label_names") or [str(i) for i in range(int(self.labels.max(initial=UNKNOWN)) + 1)]

    def label_of(self, row):
        return self.label_names[self.labels[row]] if self.labels[row] != UNKNOWN else "unknown"

    def label_counts(self):
        """{name: number of images}, "unknown" among them only where there are some."""
        counts = {name: int((self.labels == i).sum()) for i, name in enumerate(self.label_names)}
        unknown = int((self.labels == UNKNOWN).sum())
        return counts | ({"unknown": unknown} if unknown else {})

    def rows_of(self, ids):
        """ids (any shape) -> rows, -1 where the index does not hold the id."""
        ids = np.asarray(ids, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.sorted_ids, ids), len(self) - 1)
        return np.where(self.sorted_ids[place] == ids, self.order[place], -1)

    def ids_of(self, names):
        """File names -> int64 ids, -1 for one the index does not hold: whom to exclude when the gallery asks."""
        known = dict(zip(self.names, self.ids.tolist(), strict=True))
        return np.array([known.get(str(n), -1) for n in names], dtype=np.int64)

    def prepare(self, vectors):
        """-> float32 (n, D), contiguous, for cosine of unit length (a vector of zeros stays one, similarity 0)."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(
                f"the index holds vectors of {self.dim} numbers, not {vectors.shape[-1]}: they come from another model"
            )
        if not np.isfinite(vectors).all():
            raise InputError("the vectors hold NaN or infinite numbers")
        if self.metric == "cosine":
            vectors = vectors / np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True), 1e-30)
        return vectors.astype(np.float32, copy=False)

    # ----------------------------------------------------------------------------------------------------- the search

    def search(self, queries, k, exclude=None, where=None):
        """
        queries float (Q, D), not normalised; exclude: the id that each query must not find, int (Q,), -1 for none;
        where: a dict of "label" and "split" with one value or several each. -> (distances or similarities float32 (Q,
        k), ids int64 (Q, k)), best first. InputError when fewer than k are left.
        """
        queries = self.prepare(np.atleast_2d(np.asarray(queries)))
        if len(queries) == 0:
            raise InputError("there is no query")
        if len(self) == 0:
            raise InputError("the index is empty: add images to it")
        pool = self.rows_where(where or {})
        if len(pool) == 0:
            raise InputError(f"no image of the index fits the filter {where}")
        out = np.full(len(queries), -1) if exclude is None else self.rows_of(exclude)  # rows
        if out.shape != (len(queries),):
            raise InputError(f"there are {len(queries)} queries and {len(out)} ids to exclude")
        most = int(np.isin(out, pool).any())
        if k < 1 or k > len(pool) - most:
            raise InputError(
                f"k must be from 1 to {len(pool) - most}, the number of images to choose"
                f" from{' after the query itself' if most else ''}; not {k}"
            )

        scores, rows = np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
        fetch = k + SPARE + most
        rest = np.arange(len(queries))  # the queries that need a comparison with everything
        if 2 * fetch < len(pool):
            found, far = self.propose(queries, fetch, None if len(pool) == len(self) else pool)
            for part in np.array_split(rest, math.ceil(found.size * self.dim / CHUNK)):
                s = self.compare(queries[part], found[part])
                s[found[part] < 0] = -np.inf
                scores[part], rows[part] = self.best(s, found[part], k, out[part])
            exact = self.kind == "flat" or len(pool) < len(self)
            rest = np.flatnonzero(~self.settled(queries, scores[:, -1], far, exact))
        for part in np.array_split(rest, math.ceil(len(rest) * len(pool) / CHUNK)) if len(rest) else ():
            s = self.compare_all(queries[part], pool)
            scores[part], rows[part] = self.best(s, np.broadcast_to(pool, s.shape), k, out[part])
        return (-scores if self.metric == "l2" else scores), self.ids[rows]

    def rows_where(self, where):
        """{"label": ..., "split": ...} -> the rows that fit."""
        mask = np.ones(len(self), dtype=bool)
        for field, values in where.items():
            values = [values] if isinstance(values, str) else list(values)
            if field == "label":
                mask &= np.isin(self.labels, [self.label_number(v) for v in values])
            elif field == "split":
                missing = sorted(set(values) - set(self.splits))
                if missing:
                    raise InputError(
                        f"the index has no split {missing[0]!r}; it has {', '.join(sorted(set(self.splits)))}"
                    )
                mask &= np.isin(self.splits.astype(str), values)
            else:
                raise InputError(f"images are filtered by label and split, not by {field!r}")
        return np.flatnonzero(mask)

    def label_number(self, label):
        if label == "unknown" and label not in self.label_names:
            return UNKNOWN
        if label not in self.label_names:
            raise InputError(f"the index has no label {label!r}; it has {', '.join(self.label_names)}")
        return self.label_names.index(label)

    def propose(self, queries, fetch, pool):
        """
        The `fetch` nearest or so -> (rows (Q, fetch), -1 where there was none; worst approximate score (Q,): the
        negative square of the distance, or the similarity). pool: rows to search exactly; None: the whole index.
        """
        if pool is not None:
            distances, found = faiss.knn(queries, self.vectors[pool], fetch, metric=MEASURES[self.metric])
            rows = pool[found]
        else:
            if self.kind == "hnsw":  # some will be retired
                total = self.faiss_index.ntotal
                fetch = min(math.ceil(fetch * total / len(self)), total)
                inner(self.faiss_index).hnsw.efSearch = max(self.settings["ef_search"], fetch)
            elif self.kind == "ivfpq":
                fetch = min(max(fetch, (fetch - SPARE) * self.settings["refine"]), len(self))
                self.faiss_index.nprobe = self.settings["probes"]
            distances, ids = self.faiss_index.search(queries, fetch)
            rows = np.where(ids >= 0, self.rows_of(ids), -1)
        return rows, (-distances if self.metric == "l2" else distances)[:, -1]

    def compare(self, queries, rows):
        """queries (Q, D), rows (Q, F) -> scores float32 (Q, F), computed in float64: larger is nearer."""
        v, q = self.vectors[rows].astype(np.float64), queries[:, None].astype(np.float64)
        if self.metric == "cosine":
            return np.einsum("qfd,qfd->qf", v, np.broadcast_to(q, v.shape)).clip(-1, 1).astype(np.float32)
        v -= q
        return -np.sqrt(np.einsum("qfd,qfd->qf", v, v)).astype(np.float32)

    def compare_all(self, queries, pool):
        """queries (Q, D) -> scores float32 (Q, n) against the n rows of `pool`, computed in float64."""
        q, out = queries.astype(np.float64), []
        step = max(1, CHUNK // self.dim)
        for start in range(0, len(pool), step):
            v = self.vectors[pool[start : start + step]].astype(np.float64)
            out.append((q @ v.T).clip(-1, 1) if self.metric == "cosine" else -cdist(q, v))
        return np.concatenate(out, axis=1).astype(np.float32)

    def best(self, scores, rows, k, out):
        """The k best of each query, without the row `out` (Q,) of each, ties by id."""
        scores[rows == out[:, None]] = -np.inf
        order = np.lexsort((self.ids[rows], -scores), axis=-1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def settled(self, queries, last, far, exact):
        """
        Is the list final? It is not when fewer than k were found; nor, in an exact search, when what was not fetched
        could be as near as the last of the list, given how far float32 products of such long vectors can be off.
        """
        full = np.isfinite(last)
        if not exact:
            return full
        with np.errstate(invalid="ignore"):
            last = -np.square(last.astype(np.float64)) if self.metric == "l2" else last.astype(np.float64)
        slack = 4e-6 * (np.square(np.linalg.norm(queries, axis=1)) + self.largest_norm**2)
        return full & (far + slack < last)

    # ------------------------------------------------------------------------------------------------- adding, removing

    def add(self, vectors, ids, labels, names, splits):
        """More images, without building anew. InputError when an id or a file name is there already."""
        vectors = self.prepare(vectors)
        new = self.check_cases(ids, labels, names, splits, len(vectors))
        known = np.isin(new[0], self.ids) | np.isin(new[0], list(self.retired))
        if known.any():
            raise InputError(
                f"the index already has, or had, the id {new[0][known][0]}; new ids start at {self.next_id()}"
            )
        repeated = set(new[2]) & set(self.names)
        if repeated:
            raise InputError(f"{len(repeated)} of the images are in the index already, {min(repeated)} among them")
        self.faiss_index.add_with_ids(vectors, new[0])
        self.vectors = np.concatenate([self.vectors, vectors])
        old = (self.ids, self.labels, self.names, self.splits)
        self.set_cases(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))

    def remove(self, ids):
        """Forget images, without building anew. InputError for an id the index does not hold."""
        ids = np.unique(np.asarray(list(ids), dtype=np.int64))
        rows = self.rows_of(ids) if len(self) else np.full(len(ids), -1)
        if (rows < 0).any():
            raise InputError(f"the index has no image with the id {ids[rows < 0][0]}")
        if self.kind == "hnsw":
            self.retired |= set(ids.tolist())
        else:
            self.faiss_index.remove_ids(ids)
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        self.vectors = np.ascontiguousarray(self.vectors[keep])
        self.set_cases(self.ids[keep], self.labels[keep], self.names[keep], self.splits[keep])

    def next_id(self):
        return int(max(self.ids.max(initial=-1), max(self.retired, default=-1))) + 1

    def fit_typical(self, k=TYPICAL_K, seed=0):
        """
        How far an image of the gallery has its own k-th neighbour, itself left out: quantiles over the gallery (over
        5,000 of it where it is larger), kept in metadata["typical"]. An image further away than that is unlike the
        gallery. For cosine the distance is 1 - similarity. Nothing is kept where the gallery has fewer than 20 images.
        """
        self.metadata["typical"] = None
        if len(self) < 20:
            return
        k, rows = min(k, len(self) - 1), np.arange(len(self))
        if len(self) > TYPICAL_SAMPLE:
            rows = np.sort(np.random.default_rng(seed).choice(len(self), TYPICAL_SAMPLE, replace=False))
        far = self.far(self.search(self.vectors[rows], k, exclude=self.ids[rows])[0][:, -1])
        limits = {share: float(np.quantile(far, float(share))) for share in TYPICAL_SHARES}
        self.metadata["typical"] = {"k": k, "n": len(rows), "distance": limits}

    def far(self, distances):
        """What search returns -> something that grows with the distance, for both metrics."""
        return 1 - distances if self.metric == "cosine" else distances

    # ------------------------------------------------------------------------------------------------------------ files

    def save(self, folder):
        """Write everything into `folder` (created), replacing the index it may hold in one step."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "vectors": write_named(folder, "vectors-{}.npy", lambda file: np.save(file, self.vectors)),
            "cases": write_named(folder, "cases-{}.csv", self.write_cases),
            "faiss": write_named(
                folder,
                "index-{}.faiss",
                lambda file: faiss.write_index(self.faiss_index, faiss.PyCallbackIOWriter(file.write)),
            ),
        }
        manifest = {
            "format": FORMAT,
            "kind": self.kind,
            "metric": self.metric,
            "normalised": self.metric == "cosine",
            "dim": self.dim,
            "count": len(self),
            "settings": self.settings,
            "retired": sorted(self.retired),
            "files": files,
            "metadata": self.metadata,
        }
        write_json(folder / "manifest.json", manifest | {"sha256": digest_of_manifest(manifest)})
        kept = {f["name"] for f in files.values()}
        for path in folder.iterdir():  # of earlier and interrupted saves
            if OWN_FILES.fullmatch(path.name) and path.name not in kept:
                path.unlink()

    def write_cases(self, file):
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")  # names of any bytes
        writer = csv.writer(text)
        writer.writerow(["id", "label", "split", "name"])
        writer.writerows(zip(self.ids.tolist(), self.labels.tolist(), self.splits, self.names, strict=True))
        text.flush()
        text.detach()

    @classmethod
    def load(cls, folder, embedder=None):
        """
        Read an index that save wrote, after checking the SHA-256 of every file and that all of them fit together; with
        an Embedder, also that it is the one the vectors came from. InputError with one sentence otherwise.
        """
        folder = find_index(folder)
        manifest = read_json(folder / "manifest.json", object)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"{folder}/manifest.json is not that of a '{FORMAT}' index; build it again")
        if manifest.pop("sha256", None) != digest_of_manifest(manifest):
            raise InputError(f"{folder}/manifest.json is damaged: its SHA-256 is another; build the index again")
        try:
            check_manifest(manifest)
            self = cls.__new__(cls)
            self.kind, self.metric, self.dim, self.settings, self.metadata = (
                manifest[k] for k in ("kind", "metric", "dim", "settings", "metadata")
            )
            self.retired, count = set(manifest["retired"]), manifest["count"]
            paths = {part: checked_file(folder, manifest["files"][part]) for part in ("vectors", "cases", "faiss")}
            self.vectors = np.load(paths["vectors"], allow_pickle=False)
            with open(paths["cases"], encoding="utf-8", errors="surrogateescape", newline="") as file:
                cases = list(csv.DictReader(file))
            if self.vectors.dtype != np.float32 or self.vectors.shape != (count, self.dim) or len(cases) != count:
                raise ValueError(f"it should hold {count} x {self.dim} numbers and as many cases")
            if any(None in (*case, *case.values()) for case in cases):
                raise ValueError("a row of its cases is too short or too long")
            if not np.isfinite(norms := np.linalg.norm(self.vectors, axis=1)).all():
                raise ValueError("its vectors hold NaN or infinite numbers")
            if self.metric == "cosine" and (np.abs(norms - 1)[norms > 0] > 1e-3).any():
                raise ValueError("its vectors are not of unit length")
            ids, labels = (np.array([int(c[name]) for c in cases], dtype=np.int64) for name in ("id", "label"))
            texts = ([c[name] for c in cases] for name in ("name", "split"))
            self.set_cases(*self.check_cases(ids, labels, *texts, count))
            self.faiss_index = faiss.read_index(str(paths["faiss"]))
            check_faiss(self)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError, InputError) as error:
            why = str(error) if isinstance(error, (InputError, ValueError)) else f"{type(error).__name__}: {error}"
            raise InputError(f"the index in {folder} is damaged ({why.splitlines()[0]}); build it again") from error
        if embedder is not None:
            self.check_embedder(embedder, folder)
        return self

    def check_embedder(self, embedder, folder="this index"):
        """InputError when queries of this Embedder cannot be compared with the vectors of the index."""
        made = self.metadata.get("embedder") or {}
        if made.get("digest") != embedder.digest:
            raise InputError(
                f"{folder} was built with {describe(made)}, the queries are embedded with {describe(embedder.facts())}:"
                " give the same weights, or build the index again"
            )
        then, now = made["settings"], embedder.settings
        changed = [f"{k} {then.get(k)}, now {now.get(k)}" for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
        if changed:
            raise InputError(f"{folder} was built with other preprocessing ({', '.join(changed)}); build it again")


# ------------------------------------------------------------------------------------------------- what a folder holds


def find_index(folder):
    """The folder that holds manifest.json: `folder` itself or its index/. InputError when neither does."""
    folder = Path(folder)
    place = next((p for p in (folder, folder / "index") if (p / "manifest.json").is_file()), None)
    if place is None:
        raise InputError(
            f"there is no finished index in {folder}; build one with python task3_retrieval/build_index.py"
        )
    return place


def digest_of_manifest(manifest):
    return hashlib.sha256(json.dumps(plain(manifest), sort_keys=True).encode()).hexdigest()


def check_manifest(manifest):
    """ValueError for a manifest whose values no index can have, though every digest is right."""

    def whole(value, least=0):
        return type(value) is int and value >= least

    metadata, settings, usual = manifest["metadata"], manifest["settings"], SETTINGS.get(manifest["kind"])
    names, sets = metadata.setdefault("label_names", []), metadata.setdefault("datasets", {})
    typical = metadata.get("typical") or {"k": 1, "distance": dict.fromkeys(TYPICAL_SHARES, 0)}
    embedder = metadata.get("embedder", dict(backbone="", digest="", settings={}, weights=None, trained_on=None))
    optional = (str, type(None))
    kinds = dict(backbone=str, digest=str, settings=dict, weights=optional, trained_on=optional)
    checks = {
        "kind": usual is not None,
        "metric": manifest["metric"] in METRICS,
        "dim": whole(manifest["dim"], 1),
        "count": whole(manifest["count"]),
        "settings": usual is not None and {*settings} == {*usual} and all(whole(v, 1) for v in settings.values()),
        "retired": all(map(whole, manifest["retired"])),
        "label_names": isinstance(names, list)
        and len(set(names)) == len(names)
        and all(isinstance(n, str) for n in names),
        "datasets": all(whole(d["size"], 1) and isinstance(d["sha256"], str) and "phantom" in d for d in sets.values()),
        "embedder": all(isinstance(embedder[key], kind) for key, kind in kinds.items())
        and (embedder["backbone"] != "cnn" or embedder["weights"])
        and (
            embedder["backbone"] != "pixels"
            or all(whole(embedder["settings"][k], 1) for k in ("image_size", "channels"))
        ),
        "typical": whole(typical["k"], 1) and all(-1e-3 < typical["distance"][q] < math.inf for q in TYPICAL_SHARES),
    }
    for name, right in checks.items():
        if not right:
            raise ValueError(f"{name!r} in manifest.json is nothing that an index has")


def check_faiss(index):
    """ValueError when the FAISS part is not that of the vectors: kind, metric, size, ids, and some of the vectors."""
    part, n = index.faiss_index, len(index)
    core = faiss.downcast_index(part.index) if isinstance(part, faiss.IndexIDMap2) else part
    kinds = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSWFlat, "ivfpq": faiss.IndexIVFPQ}
    right = isinstance(core, kinds[index.kind]) and part.metric_type == MEASURES[index.metric] and part.d == index.dim
    right = right and part.ntotal == n + (len(index.retired) if index.kind == "hnsw" else 0)
    if right and index.kind == "ivfpq":  # its codes are not checked: they only propose
        lists = part.invlists
        ids = [
            faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)) for i in range(part.nlist) if lists.list_size(i)
        ]
        right = set(np.concatenate(ids).tolist()) == set(index.ids.tolist())
    elif right:
        some = np.unique(np.linspace(0, n - 1, min(n, 200), dtype=np.int64))
        right = set(faiss.vector_to_array(part.id_map).tolist()) == {*index.ids.tolist(), *index.retired}
        right = right and np.array_equal(part.reconstruct_batch(index.ids[some]), index.vectors[some])
    if not right:
        raise ValueError(f"its FAISS part does not hold the {n} x {index.dim} vectors")


def describe(facts):
    parts = (facts.get("backbone"), facts.get("weights"), f"(digest {str(facts.get('digest'))[:12]})")
    return " ".join(str(p) for p in parts if p)


def new_faiss(kind, metric, vectors, settings):
    """
    An empty FAISS index that takes ids, trained on `vectors` (prepared, float32) where the kind needs it; fills in
    settings.
    """
    (n, dim), measure = vectors.shape, MEASURES[metric]
    if kind == "flat":
        return faiss.IndexIDMap2(faiss.IndexFlat(dim, measure))
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, settings["links"], measure)
        index.hnsw.efConstruction = settings["ef_construction"]
        return faiss.IndexIDMap2(index)
    if n < MIN_IVFPQ:
        raise InputError(
            f"--index ivfpq needs at least {MIN_IVFPQ:,} images to train its codes, there are {n:,}; use --index flat"
        )
    # at least 39 vectors for each list, and 8 numbers to a byte of the code
    settings["lists"] = settings["lists"] or max(1, min(round(4 * math.sqrt(n)), n // 39))
    settings["parts"] = settings["parts"] or next(dim // d for d in range(min(8, dim), dim + 1) if dim % d == 0)
    index = faiss.IndexIVFPQ(faiss.IndexFlat(dim, measure), dim, settings["lists"], settings["parts"], 8, measure)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # a small gallery: no warning
    index.train(vectors[np.random.default_rng(0).permutation(n)[: max(256 * 100, 64 * settings["lists"])]])
    return index


def inner(index):
    """The index inside IndexIDMap2, by its own class."""
    return faiss.downcast_index(index.index)


def write_named(folder, pattern, write):
    """Write a file whose name holds a digest of its content -> {"name", "sha256", "bytes"}."""
    temporary = folder / f".{pattern.format('new')}.part"
    try:
        with atomic_file(temporary) as file:
            write(file)
        digest = sha256_of(temporary)
        path = folder / pattern.format(digest[:12])
        temporary.replace(path)
        record(path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": path.name, "sha256": digest, "bytes": path.stat().st_size}


def checked_file(folder, entry):
    path = folder / Path(entry["name"]).name
    if not path.is_file():
        raise InputError(f"it is incomplete: {path.name} is missing")
    if sha256_of(path) != entry["sha256"]:
        raise InputError(f"the SHA-256 of {path.name} is not the one written down when it was saved")
    return path
