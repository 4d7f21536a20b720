"""
index.py and embed.py: exact lists with and without faiss, ties by id, save and load, damage, add and remove; the
backbones.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.data.image_sets import load_phantom
from shared.runtime import InputError, digest, load_checkpoint, save_checkpoint
from task1_classification.model import load_classifier, normalise
from task3_retrieval import index as index_module
from task3_retrieval.embed import EMBEDDING_KIND, embedder_like, load_embedder
from task3_retrieval.index import CaseIndex

KINDS = ("flat", "hnsw", "ivfpq")


def make(kind="flat", metric="l2", n=1100, dim=16, seed=0, **settings):
    """An index with ids 3, 6, 9, ...; rows 10 and 500, and 3 and 700, are byte-identical."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, dim)).astype(np.float32)
    if n > 700:
        vectors[500], vectors[700] = vectors[10], vectors[3]
    labels = rng.integers(0, 2, n)
    return CaseIndex(
        vectors,
        3 + 3 * np.arange(n),
        labels,
        [f"{i}.png" for i in range(n)],
        ["train" if i % 4 else "val" for i in range(n)],
        {"label_names": ["normal", "pneumonia"]},
        kind,
        metric,
        settings,
    )


def some_queries(n=25, dim=16):
    return np.concatenate(
        [
            np.random.default_rng(0).normal(size=(11, dim))[[3, 10]].astype(np.float32),
            np.random.default_rng(1).normal(size=(n, dim)).astype(np.float32),
        ]
    )


def by_hand(vectors, ids, queries, k, metric):
    """Double precision, every vector, sorted by distance and then id."""
    v, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        score = -(q / np.linalg.norm(q, axis=1, keepdims=True)) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    else:
        score = np.sqrt(((q[:, None] - v[None]) ** 2).sum(-1))
    order = np.lexsort((np.broadcast_to(ids, score.shape), score.round(9)), axis=-1)[:, :k]
    return np.take_along_axis(score, order, 1) * (-1 if metric == "cosine" else 1), ids[order]


# --- search ---


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("filtered", [False, True])  # a filter that keeps everything but two takes another way
def test_exact_lists(metric, filtered):
    index, keep = make(metric=metric), np.ones(1100, dtype=bool)
    keep[[8, 900]] = not filtered
    index.splits[~keep] = "other"
    queries = some_queries()
    for k in (1, 10, 1098):  # a short list and the full ranking take different ways
        distances, ids = index.search(queries, k, where={"split": ["train", "val"]} if filtered else None)
        expected, expected_ids = by_hand(index.vectors[keep], index.ids[keep], queries, k, metric)
        # float32 has ties among 30,000 that float64 has not
        assert (ids == expected_ids).mean() > (0.99 if k == 1098 else 0.9999)
        np.testing.assert_allclose(distances, expected, atol=2e-6)
    assert distances.dtype == np.float32 and ids.dtype == np.int64


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equal_lists_even_among_many_copies(metric):
    """Forty copies of each vector, shuffled ids: only the order of the ids can decide, also where the list is cut."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(30, 32)), 40, axis=0).astype(np.float32) * 5
    ids, n = rng.permutation(len(vectors)) * 7, len(vectors)
    splits = ["b" if i == ids.max() else "a" for i in ids]
    index = CaseIndex(vectors, ids, np.zeros(n, int), range(n), splits, {}, "flat", metric)
    expected = np.sort(ids.reshape(30, 40), axis=1)[:, :10]
    for where in (None, {"split": "a"}):
        distances, found = index.search(vectors[::40], 10, where=where)
        assert (found == expected).all()
        np.testing.assert_allclose(distances, 0 if metric == "l2" else 1, atol=1e-6)


def test_distance_is_the_root_and_not_the_square():
    index = CaseIndex([[0, 0], [3, 4], [6, 8]], [0, 1, 2], [0, 0, 1], "abc", "xxx")
    distances, ids = index.search([[0, 0]], 3)
    assert distances.tolist() == [[0, 5, 10]] and ids.tolist() == [[0, 1, 2]]
    cosine = CaseIndex([[0, 0], [3, 4], [-3, -4]], [0, 1, 2], [0, 0, 1], "abc", "xxx", metric="cosine")
    similarities, ids = cosine.search([[6, 8]], 3)
    np.testing.assert_allclose(similarities, [[1, 0, -1]], atol=1e-7)  # zeros have similarity 0 to everything
    assert ids.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(cosine.far(similarities), [[0, 1, 2]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_itself_is_excluded_by_id_and_its_copy_is_found(kind):
    index = make(kind, probes=1000)
    queries = index.vectors[[10, 500, 3]]
    _, found = index.search(queries, 2)
    assert found[:, 0].tolist() == [33, 33, 12] and found[:, 1].tolist() == [
        1503,
        1503,
        2103,
    ]  # copies tie: the smaller id first
    distances, found = index.search(queries, 2, exclude=np.array([33, 1503, -1]))
    assert found[:, 0].tolist() == [1503, 33, 12] and distances[:, 0].tolist() == [0, 0, 0]
    assert index.search(queries, 2, exclude=[999_999, -1, 12])[1][:, 0].tolist() == [33, 33, 2103]


@pytest.mark.parametrize("kind", KINDS)
def test_filters_search_exactly_among_what_is_left(kind):
    index = make(kind)
    queries = some_queries()
    for where, mask in (
        ({"label": "pneumonia"}, index.labels == 1),
        ({"label": ["normal"], "split": "val"}, (index.labels == 0) & (index.splits == "val")),
    ):
        distances, ids = index.search(queries, 6, where=where)
        expected, expected_ids = by_hand(index.vectors[mask], index.ids[mask], queries, 6, "l2")
        assert (ids == expected_ids).all()
        np.testing.assert_allclose(distances, expected, atol=2e-6)
    own = index.ids[:20]
    index.splits[:40] = "few"
    _, ids = index.search(index.vectors[:20], 39, exclude=own, where={"split": "few"})
    assert all(sorted([*found, o]) == index.ids[:40].tolist() for found, o in zip(ids, own, strict=True))


def test_approximate_kinds_find_most_and_report_true_distances():
    exact = make("flat", n=3000, dim=32)
    queries = some_queries(200, 32)
    truth = exact.search(queries, 10)[1]
    recall = {}
    for kind in ("hnsw", "ivfpq"):
        index = make(kind, n=3000, dim=32)
        distances, ids = index.search(queries, 10)
        recall[kind] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, truth, strict=True)])
        rows = index.rows_of(ids)
        np.testing.assert_allclose(
            distances, np.linalg.norm(index.vectors[rows] - queries[:, None], axis=-1), rtol=1e-5, atol=1e-5
        )
        assert (np.diff(distances, axis=1) >= 0).all()
    assert recall["hnsw"] > 0.95 and recall["ivfpq"] > 0.5
    all_lists = make("ivfpq", n=3000, dim=32, probes=10_000, refine=100)
    assert (all_lists.search(queries, 10)[1] == truth).mean() > 0.99


def test_k_and_queries_that_cannot_be_answered():
    index = make(n=30)
    for k in (0, 31):
        with pytest.raises(InputError, match="k must be from 1 to 30"):
            index.search(index.vectors[:1], k)
    with pytest.raises(InputError, match="k must be from 1 to 29.*after the query itself"):
        index.search(index.vectors[:1], 30, exclude=[3])
    with pytest.raises(InputError, match="1 queries and 2 ids"):
        index.search(index.vectors[:1], 1, exclude=[3, 6])
    with pytest.raises(InputError, match="16 numbers, not 5.*another model"):
        index.search(np.zeros((1, 5)), 1)
    with pytest.raises(InputError, match="NaN"):
        index.search(np.full((1, 16), np.nan), 1)
    with pytest.raises(InputError, match="no split 'test'; it has train, val"):
        index.search(index.vectors[:1], 1, where={"split": "test"})
    with pytest.raises(InputError, match="no label 'cat'; it has normal, pneumonia"):
        index.search(index.vectors[:1], 1, where={"label": "cat"})
    with pytest.raises(InputError, match="no image of the index fits"):
        index.search(index.vectors[:1], 1, where={"label": "unknown"})
    with pytest.raises(InputError, match="at least one image"):
        CaseIndex(np.zeros((0, 4)), [], [], [], [])
    with pytest.raises(InputError, match="unique"):
        CaseIndex(np.zeros((2, 4)), [1, 1], [0, 0], "ab", "xx")
    index.remove(index.ids)
    with pytest.raises(InputError, match="index is empty"):
        index.search(np.zeros((1, 16)), 1)


# --- adding, removing, saving ---


@pytest.mark.parametrize("kind", KINDS)
def test_add_and_remove_equal_a_new_index(kind):
    index, queries = make(kind, probes=1000, refine=200), some_queries()
    new = np.random.default_rng(5).normal(size=(4, 16)).astype(np.float32)
    index.add(new, [5000, 5001, 5002, 5003], [1, 1, 0, -1], ["a", "b", "c", "d"], ["test"] * 4)
    assert index.search(new, 1)[1][:, 0].tolist() == [5000, 5001, 5002, 5003] and index.next_id() == 5004
    gone = [5001, 12, *range(300, 900, 3)]
    index.remove(gone)
    distances, ids = index.search(queries, 10)
    expected, expected_ids = by_hand(index.vectors, index.ids, queries, 10, "l2")
    assert not np.isin(ids, gone).any() and len(index) == 1104 - len(gone)
    if kind == "flat":
        assert (ids == expected_ids).all()
    else:
        assert (ids == expected_ids).mean() > 0.9
    with pytest.raises(InputError, match="no image with the id 12"):
        index.remove([12])
    with pytest.raises(InputError, match="are in the index already, a among them"):
        index.add(new[:1], [6000], [0], ["a"], ["x"])
    with pytest.raises(InputError, match="new ids start at 5004"):
        index.add(new[:1], [5003], [0], ["e"], ["x"])
    if kind == "hnsw":
        with pytest.raises(InputError, match="has, or had, the id 12"):
            index.add(new[:1], [12], [0], ["e"], ["x"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_saved_and_loaded(kind, metric):
    index, queries = make(kind, metric), some_queries()
    index.remove([12, 33])
    index.fit_typical()
    index.save("here")
    again = CaseIndex.load("here")
    for name in ("kind", "metric", "dim", "metadata", "retired", "settings"):
        assert getattr(again, name) == getattr(index, name)
    for name in ("ids", "labels", "names", "splits", "vectors"):
        assert (getattr(again, name) == getattr(index, name)).all()
    for a, b in zip(index.search(queries, 8), again.search(queries, 8), strict=True):
        assert (a == b).all()
    assert json.loads(Path("here/manifest.json").read_text())["normalised"] == (metric == "cosine")
    again.remove([15])
    again.save("here")
    assert (
        len(list(Path("here").iterdir())) == 4 and len(CaseIndex.load("here")) == 1097
    )  # files of the first save are gone


def test_an_interrupted_save_leaves_the_index_before(monkeypatch):
    index = make(n=50)
    index.save("here")
    index.remove([3])
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index.save("here")
    assert len(CaseIndex.load("here")) == 50
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index.save("there")
    assert list(Path("there").iterdir()) == []
    with pytest.raises(InputError, match="no finished index in there"):
        CaseIndex.load("there")
    index.save("here")
    assert len(CaseIndex.load("here")) == 49 and not [p for p in Path("here").iterdir() if p.name.startswith(".")]


def test_damaged_files_are_refused():
    index = make(n=60)
    for pattern in ("vectors-*.npy", "cases-*.csv", "index-*.faiss"):
        index.save("here")
        path = next(Path("here").glob(pattern))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"damaged .the SHA-256 of {path.name}"):
            CaseIndex.load("here")
        path.unlink()
        with pytest.raises(InputError, match=f"incomplete: {path.name} is missing"):
            CaseIndex.load("here")
    index.save("here")
    for text, sentence in (
        (Path("here/manifest.json").read_text().replace('"l2"', '"cosine"'), "manifest.json is damaged: its SHA-256"),
        ("{", "cannot be read as JSON"),
        ("[]", "not that of a"),
    ):
        Path("here/manifest.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            CaseIndex.load("here")


def rewrite(change, folder="here"):
    """The manifest with other values and a digest that is right again."""
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text()) | change
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"sha256": index_module.digest_of_manifest(manifest)}))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"format": "other"}, "not that of a"),
        ({"metric": "foo"}, "'metric' in manifest.json"),
        ({"metric": "cosine"}, "not of unit length"),
        ({"kind": "hnsw", "settings": {"links": 32, "ef_construction": 200, "ef_search": 64}}, "FAISS part"),
        ({"kind": ["flat"]}, "is damaged"),
        ({"count": 61}, "should hold 61 x 16"),
        ({"dim": -1}, "'dim' in manifest.json"),
        ({"retired": None}, "is damaged"),
        ({"settings": {"ef_search": 1}}, "'settings' in manifest.json"),
        ({"metadata": {"label_names": ["normal"]}}, "labels are numbers of the 1 label names"),
        ({"metadata": {"label_names": ["a", "a"]}}, "'label_names' in manifest.json"),
        ({"metadata": {"embedder": {"backbone": "pixels"}}}, "is damaged"),
        ({"metadata": {"typical": {"k": 10, "distance": {"0.95": "far", "0.99": 1}}}}, "is damaged"),
        ({"metadata": {"datasets": {"phantom": {"size": "28"}}}}, "'datasets' in manifest.json"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_though_its_digest_is_right(change, sentence):
    make(n=60).save("here")
    rewrite(change)
    with pytest.raises(InputError, match=sentence):
        CaseIndex.load("here")


def test_files_that_do_not_belong_together_are_refused_though_their_digests_are_right():
    index, other = make(n=60), make(n=60, seed=1)

    def put(part, content):
        files = json.loads(Path("here/manifest.json").read_text())["files"]
        path = Path("here") / files[part]["name"]
        path.write_bytes(content)
        rewrite({"files": files | {part: files[part] | {"sha256": index_module.sha256_of(path)}}})

    other.save("other")
    index.save("here")
    put("faiss", next(Path("other").glob("*.faiss")).read_bytes())
    with pytest.raises(InputError, match="FAISS part does not hold the 60 x 16 vectors"):
        CaseIndex.load("here")
    index.save("here")
    put("faiss", b"no index")
    with pytest.raises(InputError, match="is damaged"):
        CaseIndex.load("here")
    for find, change, sentence in (
        ("3,", "6,", "unique"),
        (",val,", ",val", "is damaged"),
        ("3,1,", "3,7,", "labels are"),
    ):
        index.labels[0] = 1
        index.save("here")
        text = next(Path("here").glob("cases-*.csv")).read_text()
        head, body = text.split("\n", 1)
        put("cases", (head + "\n" + body.replace(find, change, 1)).encode())
        with pytest.raises(InputError, match=sentence):
            CaseIndex.load("here")
    index.vectors[5, 5] = np.nan
    index.save("here")
    with pytest.raises(InputError, match="NaN or infinite"):
        CaseIndex.load("here")
    cosine = make(n=60, metric="cosine")
    cosine.vectors *= 2
    cosine.save("here")
    with pytest.raises(InputError, match="not of unit length"):
        CaseIndex.load("here")
    index, other = make("ivfpq"), make("ivfpq", seed=1)
    other.remove(other.ids[:5])
    other.add(np.ones((5, 16)), range(9000, 9005), [0] * 5, "abcde", "xxxxx")
    other.save("other")
    index.save("here")
    put("faiss", max(Path("other").glob("*.faiss"), key=lambda p: p.stat().st_mtime).read_bytes())
    with pytest.raises(InputError, match="FAISS part does not hold"):
        CaseIndex.load("here")


def test_the_usual_distance_is_that_of_the_gallery_itself():
    index = make(n=200)
    index.fit_typical(k=3)
    d = np.linalg.norm(index.vectors[:, None].astype(np.float64) - index.vectors[None], axis=-1)
    third = np.sort(d, axis=1)[:, 3]  # the first is the image itself
    for q in ("0.95", "0.99"):
        assert index.metadata["typical"]["distance"][q] == pytest.approx(np.quantile(third, float(q)), rel=1e-5)
    few = make(n=19)
    few.fit_typical()
    assert few.metadata["typical"] is None


# --- embedders ---


@pytest.fixture(scope="module")
def phantom():
    return load_phantom(28, {"train": 20, "val": 4, "test": 6})


@pytest.fixture(scope="module")
def pictures(phantom):
    return phantom.images["train"][:, 0].numpy()


def test_cnn_is_the_classifier_without_its_head(tiny_run, pictures):
    embed = load_embedder("cnn", tiny_run.checkpoint)
    vectors = embed(pictures)
    model, facts = load_classifier(tiny_run.checkpoint)
    with torch.inference_mode():
        logits = model(normalise(torch.from_numpy(pictures)[:, None], facts["normalisation"]))
        from_vectors = model.fc(torch.from_numpy(vectors))
    assert vectors.shape == (20, 512) and vectors.dtype == np.float32 and embed.dim == 512
    np.testing.assert_allclose(from_vectors, logits, atol=1e-4)
    assert embed.trained_on == "phantom" and embed.settings["image_size"] == 28
    small_batches = load_embedder("cnn", tiny_run.run_dir, batch_size=7)
    np.testing.assert_allclose(small_batches(pictures), vectors, atol=1e-5)
    assert small_batches.digest == embed.digest and small_batches.settings == embed.settings
    np.testing.assert_allclose(embed(np.repeat(pictures[..., None], 3, 3)), vectors, atol=1e-3)


def test_task3_checkpoint_with_a_projection(tiny_run, pictures):
    state = load_checkpoint(tiny_run.checkpoint)
    head = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 8))
    settings = {k: state[k] for k in ("architecture", "stem", "channels", "image_size", "normalisation", "dataset")}
    plain = {"kind": EMBEDDING_KIND, "model": state["state_dict"], "head": {}, "settings": settings}
    whole = plain | {"head": dict(head.state_dict())}
    for name, checkpoint in (("plain.pt", plain), ("best.pt", whole)):
        sha256 = digest(checkpoint["model"] | checkpoint["head"])
        save_checkpoint(name, checkpoint | {"weights_sha256": sha256})
    plain, projected, task1 = (
        load_embedder("cnn", "plain.pt"),
        load_embedder("cnn", "best.pt"),
        load_embedder("cnn", tiny_run.checkpoint),
    )
    np.testing.assert_array_equal(plain(pictures), task1(pictures))
    assert plain.digest == task1.digest and projected.digest != plain.digest and projected.dim == 8
    with torch.inference_mode():
        np.testing.assert_allclose(projected(pictures), head(torch.from_numpy(plain(pictures))), atol=1e-4)
    again = embedder_like(json.loads(json.dumps(projected.facts())))
    assert again.digest == projected.digest and again.settings == projected.settings
    save_checkpoint("lacks.pt", {"kind": EMBEDDING_KIND, "model": state["state_dict"], "head": {}, "settings": {}})
    with pytest.raises(InputError, match="lacks settings"):
        load_embedder("cnn", "lacks.pt")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"head": {"0.weight": torch.full((8, 512), torch.nan), "0.bias": torch.zeros(8)}}, "no usable number"),
        ({"head": {"0.weight": torch.zeros(8, 512)}}, "do not fit"),
        ({"head": {"a.weight": torch.zeros(8, 512), "a.bias": torch.zeros(8)}}, "do not fit"),
        ({"normalisation": {"mean": [0.5], "std": [0.0]}}, "no usable number"),
        ({"normalisation": {"mean": [0.5, 0.5], "std": [1.0, 1.0]}}, "do not fit"),
        ({"normalisation": {"mean": ["a"], "std": [1.0]}}, "do not fit"),
        ({"architecture": 5}, "do not fit"),
        ({"architecture": "resnet50"}, "do not fit"),
        ({"dataset": {"name": None}}, "no usable number"),
        ({"settings": 3}, "lacks settings"),
        ({"weights_sha256": "0"}, "not those that were saved"),
    ],
)
def test_an_embedding_that_cannot_be_is_refused(tiny_run, change, sentence):
    state = load_checkpoint(tiny_run.checkpoint)
    settings = {k: state[k] for k in ("architecture", "stem", "channels", "image_size", "normalisation", "dataset")}
    settings |= {k: v for k, v in change.items() if k in settings}
    embedding = {"kind": EMBEDDING_KIND, "model": state["state_dict"], "head": {}, "settings": settings}
    embedding |= {k: v for k, v in change.items() if k in ("head", "settings")}
    sha256 = digest(embedding["model"] | embedding["head"])
    save_checkpoint("best.pt", embedding | {"weights_sha256": change.get("weights_sha256", sha256)})
    with pytest.raises(InputError, match=sentence):
        load_embedder("cnn", "best.pt")


def test_pixels_by_hand(pictures):
    embed = load_embedder("pixels")
    flat = pictures.reshape(20, -1) / 255
    np.testing.assert_allclose(embed(pictures), flat - flat.mean(1, keepdims=True), atol=1e-6)
    assert embed.dim == 784 and load_embedder("pixels", image_size=14).digest != embed.digest
    assert load_embedder("pixels", image_size=14)(pictures).shape == (20, 196)


def test_random_torchvision_network_is_the_same_every_time(pictures):
    first, second = (load_embedder("random:resnet18", image_size=32) for _ in range(2))
    assert first.digest == second.digest and first.dim == 512 and first.trained_on is None
    np.testing.assert_array_equal(first(pictures[:3]), second(pictures[:3]))
    assert embedder_like(first.facts()).settings == first.settings


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dim", [("tiny:siglip", 128), ("tiny:gemma3", 128), ("vlm:tiny:qwen2vl", 128), ("tiny:llava", 128)]
)
def test_model_folders(name, dim, pictures):
    embed = load_embedder(name)
    vectors = embed(pictures[:4])
    assert vectors.shape == (4, dim) == (4, embed.dim) and np.isfinite(vectors).all()
    np.testing.assert_allclose(embed(pictures[2:3]), vectors[2:3], atol=1e-5)  # images of a batch do not meet
    assert np.abs(embed(255 - pictures[:1]) - vectors[:1]).max() > 1e-3


def test_refusals_of_backbones(tiny_run, phantom, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="train them with python task1_classification/train.py.*--backbone pixels"):
        load_embedder("cnn")
    with pytest.raises(InputError, match="no --backbone resnet999"):
        load_embedder("resnet999")
    with pytest.raises(InputError, match="no model folder|--backbone FOLDER"):
        load_embedder("./nothing")
    with pytest.raises(InputError, match="random:resnet18"):
        load_embedder("random:nothing")
    with pytest.raises(InputError, match="belongs to --backbone cnn"):
        load_embedder("pixels", cnn_weights="x.pt")
    with pytest.raises(InputError, match="trained at 28 px, not 64"):
        load_embedder("cnn", tiny_run.checkpoint, image_size=64)
    phantom_by_another_name = load_phantom(28, {"train": 2, "val": 1, "test": 1})
    phantom_by_another_name.name = "pneumoniamnist"
    with pytest.raises(InputError, match="was trained on phantom, not on pneumoniamnist.*--allow-other-dataset"):
        load_embedder("cnn", tiny_run.checkpoint, phantom_by_another_name)
    assert (
        load_embedder("cnn", tiny_run.checkpoint, phantom_by_another_name, allow_other_dataset=True).trained_on
        == "phantom"
    )
    with pytest.raises(InputError, match="must be uint8"):
        load_embedder("pixels")(np.zeros((2, 28, 28)))


def test_torchvision_weights_that_cannot_be_fetched(monkeypatch):
    def offline(name, weights=None):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    with pytest.raises(InputError, match="could not be fetched.*random:resnet18"):
        load_embedder("resnet18")


def test_an_index_of_another_model_is_refused(tiny_run, pictures):
    embed = load_embedder("cnn", tiny_run.checkpoint)
    CaseIndex(embed(pictures), range(20), np.zeros(20, int), range(20), ["a"] * 20, {"embedder": embed.facts()}).save(
        "here"
    )
    assert len(CaseIndex.load("here", embed)) == 20
    with pytest.raises(InputError, match="here was built with cnn .*, the queries are embedded with pixels"):
        CaseIndex.load("here", load_embedder("pixels"))
    embed.settings = embed.settings | {"image_size": 64}
    with pytest.raises(InputError, match="other preprocessing .image_size 28, now 64"):
        CaseIndex.load("here", embed)


# --- real images ---


@pytest.mark.realdata
def test_pixel_neighbours_of_real_images_reach_the_known_floor(real_data):
    """P@1 of raw pixels, cosine, test images against training images: 84.1 %, computed independently of this code."""
    with np.load(real_data("pneumoniamnist/pneumoniamnist.npz")) as data:
        embed = load_embedder("pixels")
        train, test, labels = (
            embed(data["train_images"]),
            embed(data["test_images"]),
            data["train_labels"][:, 0].astype(int),
        )
        index = CaseIndex(
            train, np.arange(len(train)), labels, range(len(train)), ["train"] * len(train), metric="cosine"
        )
        _, ids = index.search(test, 5)
        hits = labels[ids] == data["test_labels"]
    assert 100 * hits[:, 0].mean() == pytest.approx(84.1, abs=0.06) and 100 * hits.mean() == pytest.approx(
        83.8, abs=0.06
    )
