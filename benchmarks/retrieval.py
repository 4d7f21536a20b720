"""
What the search for similar cases costs: seconds to index, milliseconds per query, and recall against latency for large
galleries.

Usage:
    python benchmarks/retrieval.py --cnn-weights models/task1_model.pth   # a million vectors: tens of minutes, 8 GB
    python benchmarks/retrieval.py --count 50000                          # minutes
    python benchmarks/retrieval.py --small                                # the short form for tests

1. Seconds to embed and index the 4,708 training images. 2. Median time of a query among the 624 test images, inside the
process: CaseIndex, beside FAISS alone, a NumPy argsort and scikit-learn; the aim is below 1 ms. 3. --count
vectors drawn from a Gaussian mixture fitted to the real embeddings (--covariance: of the clusters; queries come from
the same mixture): FAISS flat, HNSW for several efSearch, IVF-PQ for several nprobe, without and with the exact
comparison of its 100 best that CaseIndex makes, beside NumPy, torch and scikit-learn. recall@10 = share of the ten
exact neighbours that were found. The aim is HNSW with a recall of at least 0.95 at ten times the queries per second of
the flat index. Queries come one at a time, as a reader asks them. Vectors and indexes are built once and kept in
--cache, named by a digest of what they are made from; their build time is kept with them. Writes
outputs/benchmarks/retrieval.json.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from shared.data.image_sets import load_images
from shared.runtime import InputError, atomic_file, pick_device, positive_int, read_json, run_facts, script, write_json
from task3_retrieval.cases import dataset_cases
from task3_retrieval.embed import load_embedder
from task3_retrieval.index import SETTINGS, CaseIndex, faiss, inner, new_faiss

K, REFINE = 10, 10  # neighbours; IVF-PQ proposes REFINE times as many
DRAW = 50_000  # vectors drawn at once


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pneumoniamnist")
    # fmt: off
    parser.add_argument("--data-dir", default=os.environ.get("MEDVLM_DATA") or "data",
        help="folder with the data files; $MEDVLM_DATA, else data")
    parser.add_argument("--cnn-weights",
        help="a task 1 classifier or an embedding of train.py (default: as build_index.py)")
    parser.add_argument("--count", type=positive_int, default=1_000_000,
        help="vectors of the large gallery (%(default)s)")
    parser.add_argument("--queries", type=positive_int, default=500, help="queries to the large gallery (%(default)s)")
    parser.add_argument("--clusters", type=positive_int, default=16, help="Gaussians of the mixture (%(default)s)")
    parser.add_argument("--covariance", default="tied", choices=["tied", "diag"],
        help="one full matrix for all clusters, or a diagonal each (%(default)s)")
    parser.add_argument("--links", type=positive_int, default=32, help="HNSW: links per vector, M (%(default)s)")
    parser.add_argument("--ef-construction", type=positive_int, default=100,
        help="HNSW: candidates while building (%(default)s)")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(),
        help="threads of FAISS, torch and scikit-learn (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("outputs/benchmarks/retrieval_cache"),
        help="folder for vectors and indexes, 5 GB at a million (%(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
        help="where the images are embedded (%(default)s)")
    # fmt: on
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--small", action="store_true", help="1,200 vectors of phantom pixels, for tests")
    args = parser.parse_args(argv)
    if args.small:
        args.data, args.count, args.queries, args.clusters = "phantom", 1200, 20, 2
    return args


# ------------------------------------------------------------------------------------------------------- real images


def real_index(args, device):
    """Embed and index the training images -> (embedder, data, vectors, what it took)."""
    data = load_images(args.data, args.data_dir)
    if args.small:
        data.limit(300)
    backbone = "pixels" if args.small else "cnn"
    embedder = load_embedder(backbone, args.cnn_weights, data, device)
    cases = dataset_cases(data, "train")
    started = time.perf_counter()
    vectors = embedder(cases["images"])
    embedded = time.perf_counter()
    plain_index(vectors, cases)
    seconds = {"seconds_embedding": embedded - started, "seconds_indexing": time.perf_counter() - embedded}
    return embedder, data, vectors, {"images": len(vectors), "dim": embedder.dim, **seconds}


def plain_index(vectors, cases):
    return CaseIndex(vectors, np.arange(len(vectors)), *(cases[c] for c in ("labels", "names", "splits")))


def small_gallery(embedder, data):
    """
    Milliseconds per query among the test images, median and 95th percentile; every way must find the same first
    neighbour.
    """
    cases = dataset_cases(data, "test")
    vectors = embedder(cases["images"])
    index = plain_index(vectors, cases)
    forest = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(vectors)
    ways = {
        "CaseIndex": lambda q: index.search(q, K)[1],
        "FAISS flat alone": lambda q: index.faiss_index.search(q, K)[1],
        "NumPy, all distances and argsort": lambda q: np.argsort(((vectors - q) ** 2).sum(1), kind="stable")[None, :K],
        "scikit-learn NearestNeighbors, brute": lambda q: forest.kneighbors(q, return_distance=False),
    }
    rows = {name: timed(search, vectors) for name, search in ways.items()}
    found = {name: row.pop("found") for name, row in rows.items()}
    for name, row in rows.items():
        row["same_lists"] = float((found[name] == found["CaseIndex"]).all(1).mean())
    one = []
    for image in cases["images"][:50]:
        started = time.perf_counter()
        embedder(image[None])
        one.append(1000 * (time.perf_counter() - started))
    rows["embedding one image"] = {"ms_median": float(np.median(one))}
    return {"gallery": len(vectors), "queries": len(vectors), "k": K, "ways": rows}


def timed(search, queries):
    """One query at a time -> {"ms_median", "ms_p95", "found" (Q, K)}."""
    for q in queries[:3]:  # warm up
        search(q[None])
    seconds, found = [], []
    for q in queries:
        started = time.perf_counter()
        result = search(q[None])
        seconds.append(time.perf_counter() - started)
        found.append(np.asarray(result)[0, :K])
    ms = 1000 * np.array(seconds)
    return {"ms_median": float(np.median(ms)), "ms_p95": float(np.quantile(ms, 0.95)), "found": np.stack(found)}


# ------------------------------------------------------------------------------------------------------ large gallery


class Mixture:
    """
    Gaussian mixture fitted to real embeddings; draws float32 vectors in chunks that depend on seed and number alone.
    """

    def __init__(self, vectors, clusters, covariance):
        fitted = GaussianMixture(clusters, covariance_type=covariance, reg_covar=1e-4, random_state=0, max_iter=20).fit(
            vectors.astype(np.float64)
        )
        self.tied = covariance == "tied"
        self.weights, self.means = fitted.weights_ / fitted.weights_.sum(), fitted.means_.astype(np.float32)
        self.spread = (np.linalg.cholesky(fitted.covariances_) if self.tied else np.sqrt(fitted.covariances_)).astype(
            np.float32
        )
        self.digest = hashlib.sha256(
            b"".join(np.ascontiguousarray(a).tobytes() for a in (self.weights, self.means, self.spread))
        ).hexdigest()

    def draw(self, n, seed):
        rng = np.random.default_rng(seed)
        cluster = rng.choice(len(self.weights), n, p=self.weights)
        noise = rng.standard_normal((n, self.means.shape[1]), dtype=np.float32)
        return self.means[cluster] + (noise @ self.spread.T if self.tied else noise * self.spread[cluster])


def gallery_vectors(mixture, args):
    """The drawn gallery (count, D), from the cache or made there."""
    path = args.cache / f"vectors-{mixture.digest[:12]}-{args.count}.npy"
    if not path.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (args.count, mixture.means.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            for number, start in enumerate(range(0, args.count, DRAW)):
                file.write(mixture.draw(min(DRAW, args.count - start), [1, number]).tobytes())
    return np.load(path)


def cached_faiss(kind, vectors, settings, mixture, args):
    """A FAISS index from the cache, or built there -> (index, seconds it took to build, bytes of its file)."""
    recipe = json.dumps(
        {
            "kind": kind,
            "vectors": mixture.digest,
            "count": args.count,
            **{k: v for k, v in settings.items() if k not in ("ef_search", "probes", "refine")},
        },
        sort_keys=True,
    )
    name = f"{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    path, note = args.cache / f"{name}.faiss", args.cache / f"{name}.json"
    if not note.exists():
        print(f"building {kind} over {len(vectors):,} vectors ...", flush=True)
        started = time.perf_counter()
        index = new_faiss(kind, "l2", vectors, dict(settings))
        for start in range(0, len(vectors), DRAW):
            part = vectors[start : start + DRAW]
            index.add_with_ids(part, np.arange(start, start + len(part)))
            print(f"  {start + len(part):,} in {time.perf_counter() - started:.0f} s", flush=True)
        seconds = time.perf_counter() - started
        with atomic_file(path) as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        write_json(
            note, {"recipe": recipe, "seconds": seconds, "threads": args.threads, "date": time.strftime("%Y-%m-%d")}
        )
        del index
    return faiss.read_index(str(path)), read_json(note), path.stat().st_size


def flat_search(vectors, queries, few):
    """-> (exact neighbours of all queries (Q, K), times of the few, seconds to build)."""
    started = time.perf_counter()
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    seconds = time.perf_counter() - started
    return index.search(queries, K)[1], timed(lambda q: index.search(q, K)[1], few), seconds


def brute_force(vectors):
    """What one would write without FAISS: name -> function of a query (1, D)."""
    norms = np.einsum("nd,nd->n", vectors, vectors)
    tensor, tensor_norms = torch.from_numpy(vectors), torch.from_numpy(norms)
    neighbours = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(vectors)

    def with_numpy(q):
        d = norms - 2 * (vectors @ q[0])
        first = np.argpartition(d, K)[:K]
        return first[np.argsort(d[first])][None]

    def with_torch(q):
        return (tensor_norms - 2 * (tensor @ torch.from_numpy(q[0]))).topk(K, largest=False).indices[None]

    def with_scikit_learn(q):
        return neighbours.kneighbors(q, return_distance=False)

    return {
        "NumPy, product and argpartition": with_numpy,
        "torch, product and topk": with_torch,
        "scikit-learn NearestNeighbors, brute": with_scikit_learn,
    }


def large_gallery(mixture, args):
    """Rows of recall@10, latency and bytes per vector, each measured alone in memory beside the vectors themselves."""
    check_memory(args.count * mixture.means.shape[1] * 4)
    vectors, queries = gallery_vectors(mixture, args), mixture.draw(args.queries, [2, 0])
    few = queries[: max(5, min(len(queries), 20_000_000 // args.count))]  # the slow ways get fewer queries
    rows = []

    def row(name, measured, truth, size, **facts):
        found = measured.pop("found")
        recall = float(np.mean([len(set(f) & set(t)) / K for f, t in zip(found, truth[: len(found)], strict=True)]))
        rows.append(
            {
                "way": name,
                "recall_at_10": recall,
                **measured,
                "queries": len(found),
                "queries_per_second": 1000 / measured["ms_median"],
                "bytes_per_vector": size / args.count,
                **facts,
            }
        )
        r = rows[-1]
        print(
            f"| {name} | {recall:.4f} | {r['ms_median']:.3f} | {r['ms_p95']:.3f} | {r['queries_per_second']:,.0f} |"
            f" {r['bytes_per_vector']:,.0f} | {facts.get('seconds_building', 0):,.0f} |",
            flush=True,
        )

    print(
        "\n| way | recall@10 | ms per query, median | ms, 95 % | queries per s | bytes per vector | s to build"
        " |\n|---|---|---|---|---|---|---|"
    )
    truth, measured, seconds = flat_search(vectors, queries, few)
    row("FAISS flat", measured, truth, vectors.nbytes, seconds_building=seconds)
    for name, search in brute_force(vectors).items():
        row(name, timed(search, few), truth, vectors.nbytes)

    settings = SETTINGS["hnsw"] | {"links": args.links, "ef_construction": args.ef_construction}
    index, note, size = cached_faiss("hnsw", vectors, settings, mixture, args)
    for ef in (16, 32, 64, 128, 256, 512):
        inner(index).hnsw.efSearch = ef
        row(
            f"HNSW M {args.links}, efSearch {ef}",
            timed(lambda q: index.search(q, K)[1], queries),
            truth,
            size,
            seconds_building=note["seconds"],
            ef_search=ef,
        )
    del index

    index, note, size = cached_faiss("ivfpq", vectors, SETTINGS["ivfpq"], mixture, args)

    def refined(q):
        ids = index.search(q, K * REFINE)[1][0]
        ids = ids[ids >= 0]
        d = ((vectors[ids] - q) ** 2).sum(1)
        return np.pad(ids[np.argsort(d, kind="stable")[:K]], (0, max(0, K - len(ids))), constant_values=-1)[None]

    lists, parts = index.nlist, index.pq.M
    for probes in (1, 4, 16, 64, 256):
        if probes > lists:
            break
        index.nprobe = probes
        row(
            f"IVF {lists}, PQ {parts} bytes, nprobe {probes}",
            timed(lambda q: index.search(q, K)[1], queries),
            truth,
            size,
            seconds_building=note["seconds"],
            probes=probes,
        )
        row(
            f"the same, {K * REFINE} compared exactly",
            timed(refined, queries),
            truth,
            size + vectors.nbytes,
            seconds_building=note["seconds"],
            probes=probes,
        )
    return rows


def check_memory(size):
    """InputError where the vectors, a copy inside FAISS, and the distances to them do not fit."""
    needed = 2.5 * size
    try:
        available = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):  # not Linux: nothing is known, and nothing is promised
        return
    if needed > available:
        raise InputError(
            f"the large gallery needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are free: lower"
            " --count"
        )


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, _ = pick_device(args.device)
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    embedder, data, vectors, indexing = real_index(args, device)
    print(
        f"{indexing['images']:,} images of {data.name}: embedded ({embedder.name}) in"
        f" {indexing['seconds_embedding']:.2f} s, indexed in {indexing['seconds_indexing']:.3f} s; {args.threads}"
        " threads"
    )
    small = small_gallery(embedder, data)
    print(
        f"\namong {small['gallery']} images, one query at a time, k = {K}\n\n| way | ms, median | ms, 95 % | same lists"
        " |\n|---|---|---|---|"
    )
    for name, r in small["ways"].items():
        print(
            f"| {name} | {r['ms_median']:.3f} | "
            + (f"{r['ms_p95']:.3f} | {r['same_lists']:.1%} |" if "ms_p95" in r else "| |")
        )
    fitting = time.perf_counter()
    mixture = Mixture(vectors, args.clusters, args.covariance)
    fitting = time.perf_counter() - fitting
    print(
        f"\n{args.count:,} vectors from {args.clusters} Gaussians ({args.covariance}), fitted to {len(vectors):,} in"
        f" {fitting:.0f} s; {args.queries} queries"
    )
    rows = large_gallery(mixture, args)
    flat = rows[0]["queries_per_second"]
    good = [r for r in rows if "ef_search" in r and r["recall_at_10"] >= 0.95]
    best = max(good, key=lambda r: r["queries_per_second"], default=None)
    print(
        "\nHNSW with recall@10 of at least 0.95: "
        + (
            f"efSearch {best['ef_search']}, recall {best['recall_at_10']:.3f}, {best['queries_per_second'] / flat:.1f}"
            " times the queries per second of the flat index (aim: 10)"
            if best
            else "not reached"
        )
    )
    result = {
        "indexing": indexing,
        "small_gallery": small,
        "large_gallery": {
            "count": args.count,
            "dim": embedder.dim,
            "clusters": args.clusters,
            "covariance": args.covariance,
            "rows": rows,
        },
        "hnsw_times_flat": best and best["queries_per_second"] / flat,
        "model": embedder.facts(),
        "dataset": data.facts(),
        "threads": args.threads,
        "faiss": faiss.__version__,
        **run_facts(started, device),
    }
    write_json(args.out_dir / "retrieval.json", result)
    print(f"results in {args.out_dir / 'retrieval.json'}")
    return result


if __name__ == "__main__":
    main()
