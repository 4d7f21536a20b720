"""
infer.py: neighbours of files and data set images, vote and classifier, warning, filters, figure and page, bad items.
"""

import base64
import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from shared.runtime import InputError, digest, load_checkpoint, save_checkpoint
from task3_retrieval.build_index import main as build
from task3_retrieval.gallery import Pictures
from task3_retrieval.index import CaseIndex
from task3_retrieval.infer import main, parse_args

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds for a process of a few, on a machine that is busy


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def built(tiny_run, tmp_path_factory):
    """An index of the training images, and one of the test images; do not write into them."""
    folder = tmp_path_factory.mktemp("indexes")
    common = ["--data", "phantom", "--cnn-weights", str(tiny_run.checkpoint), "--device", "cpu"]
    build([*common, "--out-dir", str(folder / "train")])
    build([*common, "--split", "all", "--metric", "cosine", "--out-dir", str(folder / "all")])
    return SimpleNamespace(train=folder / "train", all=folder / "all")


def infer(index, *arguments):
    """One case on the page unless `arguments` say more. -> (rows of predictions.csv by file, neighbours by file)"""
    words = ["--show", "1", *map(str, arguments), "--index", str(index), "--device", "cpu"]
    main([*words, "--out-dir", "found", "--overwrite"])
    neighbours = {}
    for row in rows_of("found/neighbours.csv"):
        neighbours.setdefault(Path(row["query"]).name, []).append(row)
    return {Path(r["query"]).name: r for r in rows_of("found/predictions.csv")}, neighbours


def save_films(tiny_run, n=6, folder="films"):
    Path(folder).mkdir()
    films = tiny_run.data.images["test"][:n, 0].numpy()
    for i, film in enumerate(films):
        Image.fromarray(film).save(f"{folder}/{i:02d}.png")
    return films


def test_k_can_stand_in_a_config_file():
    Path("c.yaml").write_text("k: 3\n")
    assert parse_args(["film.png", "--config", "c.yaml"]).k == 3


def test_demonstration_queries(built, tiny_run, capsys):
    predictions, neighbours = infer(built.train, "--query-index", 0, 20, 40, "-k", 4)
    assert list(predictions) == ["00000", "00020", "00040"]
    index = CaseIndex.load(built.train)
    test = CaseIndex.load(built.all).rows_of([96 + 32 + i for i in (0, 20, 40)])  # train, val, test one after the other
    assert [CaseIndex.load(built.all).names[r] for r in test] == [f"phantom/test/000{i}" for i in ("00", "20", "40")]
    for i, (name, found) in enumerate(neighbours.items()):
        assert [int(r["rank"]) for r in found] == [1, 2, 3, 4] and {r["split"] for r in found} == {"train"}
        distances = [float(r["distance"]) for r in found]
        assert distances == sorted(distances)
        for r in found:
            row = index.rows_of([int(r["id"])])[0]
            assert index.names[row] == r["name"] and index.label_of(row) == r["label"]
        labels = [r["label"] for r in found]
        vote, count = max(((c, labels.count(c)) for c in set(labels)), key=lambda pair: pair[1])
        if count != 2:
            assert predictions[name]["vote"] == vote and float(predictions[name]["vote_share"]) == count / 4
        assert (
            predictions[name]["label"] == tiny_run.data.label_names[int(tiny_run.data.labels["test"][(0, 20, 40)[i]])]
        )
    metrics = json.loads(Path("found/metrics.json").read_text())
    assert (
        metrics["n"] == 3
        and metrics["gallery"] == 96
        and metrics["n_queries_in_gallery"] == 0
        and metrics["n_pictures_missing"] == 0
    )
    assert "3 queries, 0 skipped" in capsys.readouterr().out


def test_files_get_the_neighbours_of_the_same_images_in_the_set(built, tiny_run):
    save_films(tiny_run, 5)
    _, from_set = infer(built.train, "--query-index", *range(5))
    _, from_files = infer(built.train, "films")
    for a, b in zip(from_set.values(), from_files.values(), strict=True):
        assert [r["id"] for r in a] == [r["id"] for r in b]
        np.testing.assert_allclose([float(r["distance"]) for r in a], [float(r["distance"]) for r in b], atol=1e-3)


def test_a_query_of_the_gallery_is_not_its_own_neighbour(built, tiny_run):
    predictions, neighbours = infer(built.all, "--query-index", *range(10))
    assert all(r["name"] != r["query"] for found in neighbours.values() for r in found)
    assert json.loads(Path("found/metrics.json").read_text())["n_queries_in_gallery"] == 10
    save_films(tiny_run, 4)
    build(["--images", "films", "--backbone", "pixels", "--device", "cpu", "--out-dir", "files"])
    predictions, neighbours = infer("files", "films/02.png", "-k", 3)
    assert sorted(Path(r["name"]).name for r in neighbours["02.png"]) == ["00.png", "01.png", "03.png"]
    assert predictions["02.png"]["vote"] == "" and "classifier" not in predictions["02.png"]  # no labels, no classifier
    copied = Path("copy.png")
    copied.write_bytes(Path("films/02.png").read_bytes())
    assert Path(infer("files", "copy.png", "-k", 1)[1]["copy.png"][0]["name"]).name == "02.png"


def test_good_and_bad_queries_of_one_batch(built, tiny_run, capsys):
    save_films(tiny_run, 3)
    Path("films/text.png").write_text("no image")
    Path("films/empty.png").write_bytes(b"")
    predictions, _ = infer(built.train, "films", "gone.png", "--query-index", 7, 999)
    assert sorted(predictions) == ["00.png", "00007", "01.png", "02.png"]
    errors = {Path(r["path"]).name: r["error"] for r in rows_of("found/errors.csv")}
    assert sorted(errors) == ["00999", "empty.png", "gone.png", "text.png"] and "images 0 to 47" in errors["00999"]
    assert "4 queries, 4 skipped" in capsys.readouterr().out
    assert json.loads(Path("found/metrics.json").read_text())["n_errors"] == 4


def test_filters(built):
    _, plain = infer(built.all, "--query-index", 0, 1, "-k", 6)
    for arguments, column, values in (
        (["--only-label", "normal"], "label", {"normal"}),
        (["--only-split", "val", "test"], "split", {"val", "test"}),
    ):
        predictions, found = infer(built.all, "--query-index", 0, 1, "-k", 6, *arguments)
        assert {r[column] for rows in found.values() for r in rows} <= values
        if column == "label":
            assert {p["vote"] for p in predictions.values()} == values
        for query, rows in found.items():  # what passes the filter keeps its order
            kept = [r["id"] for r in plain[query] if r[column] in values]
            assert [r["id"] for r in rows][: len(kept)] == kept
    assert json.loads(Path("found/metrics.json").read_text())["where"] == {"split": ["val", "test"]}


def test_vote_against_the_classifier(built, tiny_run):
    """
    A vote that follows the labels: with every label of the gallery turned round, each unanimous vote turns round too.
    """
    predictions, _ = infer(built.train, "--query-index", *range(20), "-k", 5)
    assert all((p["agree"] == "True") == (p["vote"] == p["classifier"]) for p in predictions.values())
    index = CaseIndex.load(built.train)
    index.labels = 1 - index.labels
    index.save("turned")
    turned, _ = infer("turned", "--query-index", *range(20), "-k", 5)
    for name, p in predictions.items():
        assert {p["vote"], turned[name]["vote"]} == {"normal", "pneumonia"} and p["classifier"] == turned[name][
            "classifier"
        ]
        assert (p["agree"] == "True") != (turned[name]["agree"] == "True")
    assert json.loads(Path("found/metrics.json").read_text())["n_disagree"] == sum(
        p["agree"] == "False" for p in turned.values()
    )


def test_the_classifier_gives_the_probability_of_task_1(built, tiny_run):
    from task1_classification.infer import main as classify

    save_films(tiny_run, 6)
    classify(["films", "--checkpoint", str(tiny_run.checkpoint), "--device", "cpu", "--out-dir", "classified"])
    predictions, _ = infer(built.train, "films")
    for row in rows_of("classified/predictions.csv"):
        mine = predictions[Path(row["path"]).name]
        assert mine["classifier"] == row["decision"] and mine["probability_of"] == "pneumonia"
        assert float(mine["classifier_probability"]) == pytest.approx(float(row["probability"]), abs=1e-4)


def test_images_unlike_the_gallery_are_marked(built, tiny_run):
    """
    The limit is that of the gallery's own images; in pixel space inverted films must exceed it and most ordinary films
    must not.
    """
    build(["--data", "phantom", "--backbone", "pixels", "--device", "cpu", "--out-dir", "pixels"])
    films = save_films(tiny_run, 20)
    for i, film in enumerate(films[:6]):
        Image.fromarray(255 - film).save(f"films/inverted-{i}.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save("films/noise.png")
    predictions, _ = infer("pixels", "films")
    marked = {name for name, p in predictions.items() if p["unlike_gallery"] == "True"}
    assert {f"inverted-{i}.png" for i in range(6)} <= marked and sum(
        not n.startswith(("inverted", "noise")) for n in marked
    ) <= 4
    index = CaseIndex.load("pixels")
    assert float(predictions["noise.png"]["limit"]) == pytest.approx(
        index.metadata["typical"]["distance"]["0.95"], abs=1e-5
    )
    milder, _ = infer("pixels", "films", "--warn-at", "0.99")
    assert float(milder["noise.png"]["limit"]) > float(predictions["noise.png"]["limit"])
    again, _ = infer("pixels", "films", "-k", 2, "--only-label", "normal")  # neither k nor a filter moves the warning
    assert {n: p["distance_to_kth"] for n, p in again.items()} == {
        n: p["distance_to_kth"] for n, p in predictions.items()
    }


def test_figures_and_page(built, tiny_run):
    save_films(tiny_run, 2)
    Path("films/<b>&.png").write_bytes(Path("films/00.png").read_bytes())
    infer(built.train, "films", "--query-index", *range(5), "--show", 7, "-k", 3, "--heatmaps")
    figures = sorted(p.name for p in Path("found/figures").iterdir())
    assert figures == [f"query_0{i}.png" for i in range(1, 8)]
    assert np.asarray(Image.open("found/figures/query_01.png").convert("L")).std() > 20
    page = Path("found/page.html").read_text()
    assert page.count("<h2>") == 7 and "<b>&.png" not in page and "PHANTOM" in page and "7 of 8 queries" in page
    assert (
        not re.search(r"(src|href)=(?!'data:)", page)
        and "<script" not in page
        and "@import" not in page
        and "url(" not in page
        and str(Path.cwd()) not in page
    )
    pictures = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert len(pictures) == 7
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).height > 75  # of 25 an inch: the heat maps are below


def test_pictures_that_are_gone_leave_the_tables_whole(tiny_run, capsys):
    films = save_films(tiny_run, 5)
    build(["--images", "films", "--backbone", "pixels", "--device", "cpu", "--out-dir", "files"])
    Image.fromarray(films[0]).save("query.png")
    Path("films/00.png").unlink()
    _, neighbours = infer("files", "query.png", "-k", 5)
    assert len(neighbours["query.png"]) == 5 and Path(neighbours["query.png"][0]["name"]).name == "00.png"
    assert json.loads(Path("found/metrics.json").read_text())["n_pictures_missing"] == 1
    assert (
        "1 pictures of the gallery could not be found" in capsys.readouterr().err
        and "grey square" in Path("found/page.html").read_text()
    )


def test_weights_that_changed_or_moved(built, tiny_run, refused, own_folder):
    state = load_checkpoint(tiny_run.checkpoint)
    save_checkpoint("moved.pt", state)
    predictions, _ = infer(built.train, "--query-index", 0, "--cnn-weights", "moved.pt")
    assert len(predictions) == 1
    state["state_dict"]["conv1.weight"] += 0.01
    state["weights_sha256"] = digest(state["state_dict"])
    save_checkpoint("other.pt", state)
    assert "was built with cnn" in refused(
        main, ["--query-index", 0, "--index", built.train, "--cnn-weights", "other.pt"]
    )
    build(["--data", "phantom", "--limit", "20", "--cnn-weights", "moved.pt", "--device", "cpu", "--out-dir", "lost"])
    Path("moved.pt").unlink()
    assert "no task 1 weights" in refused(main, ["--query-index", 0, "--index", "lost"])


def test_refusals(built, tiny_run, refused, own_folder):
    assert "there is no index here; build one with python task3_retrieval/build_index.py" in refused(main, ["x.png"])
    assert "there is no finished index in gone" in refused(main, ["x.png", "--index", "gone"])
    assert "name an image file" in refused(main, [])
    assert "none of the 1 queries could be used; gone.png: the file does not exist" in refused(
        main, ["gone.png", "--index", built.train]
    )
    assert "k must be from 1 to 96" in refused(main, ["--query-index", 0, "-k", 97, "--index", built.train])
    assert "no label 'cat'; it has normal, pneumonia" in refused(
        main, ["--query-index", 0, "--only-label", "cat", "--index", built.train]
    )
    assert "no split 'val'; it has train" in refused(
        main, ["--query-index", 0, "--only-split", "val", "--index", built.train]
    )
    save_films(tiny_run, 3)
    build(["--images", "films", "--backbone", "pixels", "--device", "cpu", "--out-dir", "files"])
    assert "built from files" in refused(main, ["--query-index", 0, "--index", "files"])
    assert "--heatmaps needs a task 1 classifier" in refused(
        main, ["films", "--heatmaps", "-k", "1", "--index", "files"]
    )
    assert not (own_folder / "outputs").exists()


def test_another_file_of_the_same_name_is_refused(write_medmnist, refused):
    write_medmnist("data", "pneumoniamnist")
    build(
        [
            "--data",
            "pneumoniamnist",
            "--data-dir",
            "data",
            "--backbone",
            "pixels",
            "--device",
            "cpu",
            "--out-dir",
            "built",
        ]
    )
    write_medmnist("changed", "pneumoniamnist", seed=1)
    assert "not the file the index was built from" in refused(
        main, ["--query-index", 0, "--index", "built", "--data-dir", "changed"]
    )


def test_dry_run_and_the_newest_index(own_folder, refused):
    main(["--dry-run"])
    assert len(rows_of("outputs/task3_retrieval/infer/dry-run/predictions.csv")) == 3
    assert "there is no index here" in refused(main, ["--query-index", 0])  # a dry run's index is nobody's gallery
    build(["--data", "phantom", "--backbone", "pixels", "--device", "cpu"])
    main(["--query-index", "0", "--device", "cpu"])
    assert (
        json.loads(Path("outputs/task3_retrieval/infer/001/metrics.json").read_text())["index"]
        == "outputs/task3_retrieval/build_index/001/index"
    )


@pytest.mark.slow
def test_from_another_folder(built, tiny_run, own_folder, start_script):
    save_films(tiny_run, 2)
    command = [ROOT / "task3_retrieval" / "infer.py", "--index", built.train, "--device", "cpu"]
    assert start_script([*command, "films", "--heatmaps"], own_folder).wait(PATIENCE) == 0, Path(
        "output.txt"
    ).read_text()
    assert len(rows_of("outputs/task3_retrieval/infer/001/predictions.csv")) == 2


def test_a_vote_that_could_not_be_another_is_compared_with_nothing(built, tiny_run):
    predictions, _ = infer(built.train, "--query-index", 0, 1, 2, "--only-label", "normal", "--limit", 2)
    assert [(p["vote"], p["agree"]) for p in predictions.values()] == [("normal", "")] * 2
    page = Path("found/page.html").read_text()
    assert "images with the label normal only" in page and "agrees" not in page.lower()
    assert json.loads(Path("found/metrics.json").read_text())["n_disagree"] == 0


def test_run_folders_that_are_none(built, tiny_run, refused):
    save_films(tiny_run, 1)
    for name, text in (("1\u00b2", "{}"), ("001", "[]")):
        run = Path("outputs/task3_retrieval/build_index", name)
        (run / "index").mkdir(parents=True)
        (run / "index/manifest.json").write_text("{}")
        (run / "metrics.json").write_text(text)
    assert "there is no index here" in refused(main, ["films"])


@pytest.mark.parametrize("change", [
    lambda m: m["metadata"].update(embedder={}),
    lambda m: m["metadata"]["embedder"].update(settings={}),
    lambda m: m["metadata"]["embedder"].update(backbone="cnn", weights=None),
    lambda m: m["metadata"]["embedder"]["settings"].update(image_size=None),
    lambda m: m["metadata"]["typical"]["distance"].update({"0.95": -5}),
    lambda m: m["metadata"].update(label_names="ab"),
])  # fmt: skip
def test_manifests_that_no_index_has(change, tiny_run, refused):
    from task3_retrieval.index import digest_of_manifest

    build(["--data", "phantom", "--backbone", "pixels", "--out-dir", "pixels"])
    path = Path("pixels/index/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(json.dumps(manifest | {"sha256": digest_of_manifest(manifest)}))
    assert "is damaged" in refused(main, ["--query-index", "0", "--index", "pixels"])


def test_a_set_that_is_another_is_read_once(monkeypatch):
    reads = []

    def read(name, folder, size):
        reads.append(name)
        return SimpleNamespace(sha256="other", source="a file")

    monkeypatch.setattr("task3_retrieval.gallery.load_images", read)
    facts = {"phantom": {"size": 28, "sha256": "this one"}}
    pictures = Pictures(SimpleNamespace(metadata={"datasets": facts}), "data")
    for position in range(3):
        with pytest.raises(InputError, match="a file is not the file the index was built from"):
            pictures(f"phantom/test/{position:05d}")
    assert len(reads) == 1
