"""
evaluate.py of task 3: its numbers against a recomputation and against the index, what it excludes, what it must not
touch.
"""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import task3_retrieval.checks as checks
import task3_retrieval.evaluate as evaluate_script
from conftest import SmallNet
from shared.data import image_sets
from task3_retrieval.cases import classifier_answers as answers
from task3_retrieval.metrics import content_codes
from task3_retrieval.embed import load_embedder
from task3_retrieval.checks import explanation_checks, failures, foreign_images, prepare, search, similarities
from task3_retrieval.evaluate import main
from task3_retrieval.index import CaseIndex

ROOT = Path(__file__).resolve().parents[1]
HEADLINE, PIXELS, L2, RANDOM, CHANCE = (
    "task 1 features",
    "raw pixels, cosine",
    "raw pixels, L2",
    "untrained ResNet-18",
    "chance, exact",
)
FAST = [
    "--data",
    "pneumoniamnist",
    "--data-dir",
    "data",
    "--device",
    "cpu",
    "--resamples",
    "40",
    "--cases",
    "3",
    "--show",
    "0",
    "20",
]


def read(path):
    return json.loads(Path(path).read_text())


def predictions(run_dir):
    with open(Path(run_dir) / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def make_start(write_medmnist, train_cnn):
    """A small data set in data/ with one copied test film, and a classifier of it in task1/."""
    path = write_medmnist("data")
    arrays = dict(np.load(path))
    arrays["test_images"][7], arrays["test_labels"][7] = arrays["test_images"][3], arrays["test_labels"][3]
    np.savez_compressed(path, **arrays)
    train_cnn("task1", "--lr", "0.01")
    return path


def evaluate(*more):
    main(
        [
            *FAST,
            "--cnn-weights",
            "task1",
            "--classifier",
            "task1/best.pt",
            "--out-dir",
            "run",
            "--overwrite",
            *map(str, more),
        ]
    )
    return read("run/metrics.json")


@pytest.fixture
def start(small_network, write_medmnist, train_cnn):
    return make_start(write_medmnist, train_cnn)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, write_medmnist, train_cnn):
    """One evaluation with the small network, for all tests that only read it."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torchvision.models, "get_model", lambda name, weights=None: SmallNet())
        make_start(write_medmnist, train_cnn)
        metrics = evaluate()
    return SimpleNamespace(folder=folder, metrics=metrics, rows=predictions(folder / "run"))


@pytest.fixture
def there(evaluated, small_network, monkeypatch):
    """In the folder of that evaluation."""
    monkeypatch.chdir(evaluated.folder)
    return evaluated


def test_numbers_equal_a_recomputation_and_the_index(there):
    metrics, rows = there.metrics, there.rows
    data = image_sets.load_medmnist("pneumoniamnist", "data")
    y, gallery = data.labels["test"].numpy(), data.labels["train"].numpy()
    embed = load_embedder("cnn", "task1", data)
    vectors = {s: embed(data.images[s][:, 0].numpy()) for s in ("train", "test")}
    index = CaseIndex(
        vectors["train"], np.arange(64), gallery, [str(i) for i in range(64)], ["train"] * 64, metric="cosine"
    )
    similarity, ids = index.search(vectors["test"], 64)
    right = gallery[ids] == y[:, None]
    table = metrics["tables"]["across"][HEADLINE]
    for k in (1, 5, 10):
        assert table["micro"][f"P@{k}"]["value"] == pytest.approx(right[:, :k].mean())
        assert table["macro"][f"P@{k}"]["value"] == pytest.approx(np.mean([right[y == c, :k].mean() for c in (0, 1)]))
    ap = [(np.arange(1, r.sum() + 1) / (np.flatnonzero(r) + 1)).mean() for r in right]
    assert table["micro"]["AP"]["value"] == pytest.approx(np.mean(ap)) and table["0"]["AP"]["value"] == pytest.approx(
        np.mean(np.array(ap)[y == 0])
    )
    vote = (gallery[ids[:, :5]].sum(1) > 2).astype(int)
    assert table["micro"]["vote"]["value"] == pytest.approx((vote == y).mean())
    assert metrics["failures"]["n"] == (vote != y).sum() and len(rows) == len(y) == metrics["n"] == 40
    for q, row in enumerate(rows):
        assert row["id"] == f"test/{q}" and row["neighbours"] == " ".join(f"train/{i}" for i in ids[q, :5])
        assert int(row["correct"]) == (vote[q] == y[q]) and float(row["AP"]) == pytest.approx(ap[q], abs=1e-6)
        assert float(row["similarities"].split()[0]) == pytest.approx(similarity[q, 0], abs=1e-5)
        assert int(row["unlike_gallery"]) == (float(row["distance_k"]) > metrics["foreign"][HEADLINE]["limit"])
        assert int(row["agree"]) == (row["classifier"] == row["vote"])
    assert metrics["agreement"]["agree"] == pytest.approx(np.mean([int(r["agree"]) for r in rows]))
    for row, numbers in table.items():
        for name, of in numbers.items():
            assert of["low"] - 0.1 < of["value"] < of["high"] + 0.1, name
            assert of["difference"] == pytest.approx(
                of["value"] - metrics["tables"]["across"][PIXELS][row][name]["value"]
            )


def test_baselines_stand_in_the_same_table(there):
    tables = there.metrics["tables"]
    for protocol in ("across", "within"):
        assert list(tables[protocol]) == [HEADLINE, PIXELS, L2, RANDOM, CHANCE]
    y = image_sets.load_medmnist("pneumoniamnist", "data").labels
    share = np.array([(y["train"] == c).float().mean().item() for c in (0, 1)])
    test_share = np.array([(y["test"] == c).float().mean().item() for c in (0, 1)])
    assert tables["across"][CHANCE]["micro"]["P@5"]["value"] == pytest.approx((share * test_share).sum(), abs=1e-6)
    assert tables["across"][CHANCE]["macro"]["P@1"]["value"] == pytest.approx(0.5)
    pixels = image_sets.load_medmnist("pneumoniamnist", "data").images
    a, b = (pixels[s].flatten(1).double() for s in ("test", "train"))
    nearest = torch.cdist(a, b).argmin(1)
    assert tables["across"][L2]["micro"]["P@1"]["value"] == pytest.approx(
        (y["train"][nearest] == y["test"]).double().mean().item()
    )
    a, b = (torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (a, b))
    assert tables["across"][PIXELS]["micro"]["P@1"]["value"] == pytest.approx(
        (y["train"][(a @ b.T).argmax(1)] == y["test"]).double().mean().item()
    )


def test_a_query_finds_neither_itself_nor_its_copy(there):
    metrics = there.metrics
    assert metrics["duplicates"]["pairs"]["test"] == [[3, 7]] and metrics["duplicates"]["repeats"]["test"] == 1
    rows = metrics["duplicates"]["leave_one_out"]
    assert rows["query left in (wrong)"]["P@1"] == 1  # what the protocol is there to prevent
    assert rows["query and copies left out"]["P@1"] == pytest.approx(
        metrics["tables"]["within"][HEADLINE]["micro"]["P@1"]["value"]
    )
    data = image_sets.load_medmnist("pneumoniamnist", "data")
    x, y = data.images["test"].flatten(1).numpy().astype(np.float32), data.labels["test"].numpy()
    (codes,) = content_codes(data.images["test"].numpy())
    found = search(x, x, "l2", y, y, 2, (codes, codes), 5)
    assert found["left"][3] == found["left"][7] == 38 and (np.delete(found["left"], [3, 7]) == 39).all()
    for q in range(40):
        assert q not in found["first"][q, : found["left"][q]]
    assert 7 not in found["first"][3, :38] and 3 not in found["first"][7, :38]
    only_itself = search(x, x, "l2", y, y, 2, (np.arange(40), np.arange(40)), 5)
    assert only_itself["first"][3, 0] == 7 and only_itself["first"][7, 0] == 3


def test_blocks_and_equal_images(monkeypatch):
    """The search in blocks equals the search at once, and copies tie, so that the smaller id comes first."""
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(90, 37)).astype(np.float32), rng.normal(size=(11, 37)).astype(np.float32)
    gallery[60] = gallery[5]
    labels, y = rng.integers(2, size=90), rng.integers(2, size=11)
    whole = {
        m: search(queries, gallery, m, y, labels, 2, (np.arange(11) + 100, np.arange(90)), 5) for m in ("cosine", "l2")
    }
    monkeypatch.setattr(checks, "BLOCK", 200)
    for metric, found in whole.items():
        parts = search(queries, gallery, metric, y, labels, 2, (np.arange(11) + 100, np.arange(90)), 5)
        for key in ("first", "similarity", "called", "share", "left"):
            np.testing.assert_array_equal(found[key], parts[key])
        s = similarities(prepare(queries, metric), prepare(gallery, metric), metric)
        np.testing.assert_array_equal(s[:, 5], s[:, 60])


def test_labels_of_the_test_split_change_no_vector_no_vote_and_no_limit(start):
    before, rows = evaluate(), predictions("run")
    arrays = dict(np.load(start))
    arrays["test_labels"] = arrays["test_labels"][::-1].copy()
    np.savez_compressed(start, **arrays)
    after, rows_after = evaluate(), predictions("run")
    assert (
        before["foreign"][HEADLINE]["limit"] == after["foreign"][HEADLINE]["limit"]
        and before["view_recall"] == after["view_recall"]
    )
    for key in ("vote", "neighbours", "similarities", "classifier", "distance_k"):
        assert [r[key] for r in rows] == [r[key] for r in rows_after]
    assert before["tables"]["across"][HEADLINE]["micro"] != after["tables"]["across"][HEADLINE]["micro"]


def test_the_explanation_fails_when_the_labels_are_shuffled():
    """A gallery that separates the classes perfectly: the vote is right, and at chance with shuffled labels."""
    rng = np.random.default_rng(0)
    labels, y = np.repeat([0, 1], 100), np.repeat([0, 1], 60)
    centre = np.array([[5.0, 0], [0, 5.0]])
    found = search(
        (centre[y] + rng.normal(size=(120, 2))).astype(np.float32),
        (centre[labels] + rng.normal(size=(200, 2))).astype(np.float32),
        "l2",
        y,
        labels,
        2,
        (np.arange(120) + 1000, np.arange(200)),
        5,
    )
    checks = explanation_checks(found, y, labels, 2, 5, seed=0)
    assert (
        checks["vote"] == 1
        and checks["shuffled_mean"] == pytest.approx(0.5, abs=0.03)
        and checks["shuffled_high"] < 0.8
    )
    assert checks["vote_without_neighbours"] == 1 and checks["vote_stays_without_neighbours"] == 1


def test_foreign_images_are_noticed_by_pixels(there):
    images = image_sets.load_medmnist("pneumoniamnist", "data").images["test"]
    kinds = foreign_images(images, 0)
    assert torch.equal(kinds["inverted"], 255 - images) and torch.equal(kinds["upside down"].flip(2), images)
    assert all(x.shape == images.shape and x.dtype == torch.uint8 for x in kinds.values())
    kinds = there.metrics["foreign"][PIXELS]["kinds"]
    assert kinds["noise"]["auroc"] == 1 and kinds["noise"]["warned"] == 1 and kinds["inverted"]["auroc"] > 0.99
    assert "auroc" not in kinds["test"]


def test_view_recall_of_pixels(there):
    """Cosine of centred pixels does not see a flat change of exposure: each copy finds its original."""
    recall = there.metrics["view_recall"][PIXELS]
    assert recall["bright and flat"]["R@1"] > 0.9 and recall["blurred and noisy"]["R@1"] > 0.9
    assert recall["mean"]["R@1"] == pytest.approx(np.mean([v["R@1"] for k, v in recall.items() if k != "mean"]))
    assert all(v["R@1"] <= v["R@5"] for v in recall.values())


def test_failures_are_listed_by_rule():
    found = {
        "called": np.array([1, 0, 0, 1, 1]),
        "share": np.array([[0.4, 0.6], [0.8, 0.2], [1, 0], [0, 1], [0.4, 0.6]]),
        "values": {"AP": np.array([0.5, 0.9, 0.1, 0.1, 0.2])},
    }
    assert failures(found, np.array([0, 1, 1, 1, 0])).tolist() == [2, 1, 4, 0]  # share 1, .8, .6 (lower AP first), .6


def test_reports_and_what_writes_them(start):
    evaluate()
    report, hand_in = Path("run/report.md").read_text(), Path("reports/task3_retrieval.md").read_text()
    assert report.replace("(figures/", "(figures/task3_") == hand_in
    for name in ("visual_results", "precision", "map", "distances"):
        assert (Path("run/figures") / f"{name}.png").read_bytes().startswith(
            b"\x89PNG"
        ) and f"figures/task3_{name}.png" in hand_in
    assert (
        Path("reports/figures/task3_visual_results.png").read_bytes()
        == Path("run/figures/visual_results.png").read_bytes()
    )
    assert "medical device" in report and "PHANTOM" not in report
    Path("reports/task3_retrieval.md").unlink()
    evaluate("--limit", "30")
    assert evaluate("--queries", "val")["split"] == "val"
    assert not Path("reports/task3_retrieval.md").exists()  # neither a limited run nor one on validation is handed in


def test_classifiers_and_weights_that_say_less(small_network, write_medmnist, refused):
    """A classifier of other classes is compared with nothing; it reads images of its own size; --limit in training."""
    from task1_classification.train import main as classify
    from task3_retrieval.train import main as train

    write_medmnist("data")
    write_medmnist("data", "breastmnist")
    common = "--data-dir data --device cpu --batch-size 16 --epochs 1 --out-dir".split()
    for name in ("pneumoniamnist", "breastmnist"):
        classify(["--data", name, *common, name])
    train(["--cnn-weights", "pneumoniamnist", "--limit", "60", *common, "few"])
    other = [*FAST, "--backbone", "pixels", "--classifier", "breastmnist/best.pt", "--allow-other-dataset"]
    assert "not on pneumoniamnist (normal, pneumonia)" in refused(main, other)
    main([*FAST, "--cnn-weights", "few", "--out-dir", "run"])
    assert "trained with --limit 60" in Path("run/report.md").read_text()
    write_medmnist("data", size=64)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_script, "classifier_answers", lambda *a: seen.append(a[2].shape) or answers(*a))
        main([*FAST, "--backbone", "pixels", "--image-size", "64", "--classifier", "pneumoniamnist/best.pt"])
    assert seen == [(40, 1, 28, 28)]


def test_trained_embedding_stands_beside_the_features_it_came_from(start):
    from task3_retrieval.train import main as train

    train(
        [
            "--data",
            "pneumoniamnist",
            "--data-dir",
            "data",
            "--device",
            "cpu",
            "--batch-size",
            "16",
            "--epochs",
            "1",
            "--cnn-weights",
            "task1",
            "--projection",
            "8",
        ]
    )
    main(
        [*FAST, "--classifier", "task1/best.pt", "--metric", "l2", "--out-dir", "run"]
    )  # finds the newest run by itself
    metrics = read("run/metrics.json")
    assert (
        metrics["headline"] == "trained embedding"
        and metrics["model"]["dim"] == 8
        and metrics["metric"] == "l2"
        and not metrics["normalised"]
    )
    assert list(metrics["tables"]["across"])[:2] == ["trained embedding", "task 1 features"]
    a, b = (metrics["tables"]["across"][n]["micro"]["AP"]["value"] for n in ("trained embedding", "task 1 features"))
    assert metrics["against_task1"]["micro"]["AP"]["difference"] == pytest.approx(a - b)


def test_without_a_classifier_and_with_another_backbone(start, capsys):
    main([*FAST, "--backbone", "pixels", "--out-dir", "run"])
    metrics = read("run/metrics.json")
    assert metrics["headline"] == "pixels" and metrics["agreement"] is None and metrics["model"]["weights"] is None
    assert (
        metrics["tables"]["across"]["pixels"]["micro"]["AP"]["value"]
        == metrics["tables"]["across"][PIXELS]["micro"]["AP"]["value"]
    )
    assert "the vote is not compared" in capsys.readouterr().out
    assert predictions("run")[0]["classifier"] == ""


def test_several_classes(small_network, write_medmnist):
    write_medmnist("data", "bloodmnist", {"train": 80, "val": 40, "test": 40})
    main(
        [
            "--data",
            "bloodmnist",
            "--backbone",
            "pixels",
            "--data-dir",
            "data",
            "--device",
            "cpu",
            "--resamples",
            "20",
            "--out-dir",
            "run",
        ]
    )
    metrics = read("run/metrics.json")
    table = metrics["tables"]["across"]
    assert set(table[PIXELS]) == {"micro", "macro", *map(str, range(8))} and metrics["vote_auc"] is None
    assert table[PIXELS]["macro"]["P@1"]["value"] > 0.9  # each class brightens its own patch
    assert table[CHANCE]["macro"]["P@1"]["value"] == pytest.approx(1 / 8) and "vote" not in table[CHANCE]["micro"]


def test_dry_run(small_network):
    main(["--dry-run", "--resamples", "20"])
    metrics = read("outputs/task3_retrieval/evaluate/dry-run/metrics.json")
    assert metrics["dataset"]["phantom"] and metrics["headline"] == "pixels"
    assert "PHANTOM" in Path("outputs/task3_retrieval/evaluate/dry-run/report.md").read_text()
    assert not Path("reports").exists()


def test_bad_input(start, refused, write_medmnist):
    assert "--vote must be odd" in refused(main, [*FAST, "--vote", "4"])
    assert "--vote 41 neighbours are too many for 40 images" in refused(
        main, [*FAST, "--cnn-weights", "task1", "--vote", "41"]
    )
    assert "--show 41: the test split has images 0 to 39" in refused(
        main, [*FAST, "--cnn-weights", "task1", "--show", "41"]
    )
    assert "there are no task 1 weights" in refused(main, FAST)
    write_medmnist("data", "breastmnist")
    assert "was trained on pneumoniamnist, not on breastmnist" in refused(
        main, [*FAST, "--data", "breastmnist", "--cnn-weights", "task1"]
    )
    write_medmnist("data", "chestmnist")
    assert "several labels per image" in refused(main, [*FAST, "--data", "chestmnist", "--backbone", "pixels"])
    assert not Path("outputs/task3_retrieval").exists()


@pytest.mark.realdata
def test_the_floor_of_raw_pixels_through_the_script_itself(real_data, small_network, monkeypatch):
    """
    Read, embedded, searched and summarised: the published floor, with the untrained network left out to save time.
    """
    folder = real_data("pneumoniamnist/pneumoniamnist.npz").parent.parent
    monkeypatch.setattr(SmallNet, "forward", lambda net, x, whole=SmallNet.forward: whole(net, x[..., ::4, ::4]))
    monkeypatch.setattr(evaluate_script, "view_recall", lambda *a: {"mean": {"R@1": 0.0, "R@5": 0.0}})
    monkeypatch.setattr(
        evaluate_script,
        "foreign_detection",
        lambda *a: ({"k": 5, "limit": 1.0, "kinds": {"test": {"warned": 0.0}}}, {"test": np.array([0.0, 1.0])}),
    )
    main(
        [
            "--data",
            "pneumoniamnist",
            "--data-dir",
            str(folder),
            "--backbone",
            "pixels",
            "--device",
            "cpu",
            "--resamples",
            "40",
            "--out-dir",
            "run",
        ]
    )
    tables = read("run/metrics.json")["tables"]

    def row(protocol, name):
        t = tables[protocol][name]
        return [round(100 * t["micro"][m]["value"], 1) for m in ("P@1", "P@5", "P@10", "AP")] + [
            round(100 * t[c]["P@5"]["value"], 1) for c in ("0", "1")
        ]

    assert row("across", PIXELS) == [84.1, 83.8, 82.9, 69.6, 64.4, 95.5]
    assert row("across", L2) == [82.4, 81.4, 80.8, 66.4, 56.4, 96.4]
    assert row("across", CHANCE)[0] == 56.1
