"""
Training the retrieval embedding: its losses by hand, that it learns, what a run writes, and that a stopped run goes on
exactly.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import task3_retrieval.train as train_script
from shared.data import image_sets
from shared.runtime import InputError
from task3_retrieval.metrics import class_means, retrieval_values
from task1_classification.train import main as train_classifier
from task3_retrieval.embed import find_cnn, load_embedder
from task3_retrieval.train import batch_hard_triplet, epoch_order, main, supervised_contrastive

ROOT = Path(__file__).resolve().parents[1]
FAST = [
    "--data",
    "pneumoniamnist",
    "--data-dir",
    "data",
    "--device",
    "cpu",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--cnn-weights",
    "task1",
]


def read(path):
    return json.loads(Path(path).read_text())


def history(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_same(a, b, where="checkpoint"):
    """Equal in every bit, apart from what the clock says."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"} - ({"sha256"} if where == "last.pt" else set()):
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a, b):
    for name in ("best.pt", "last.pt"):
        assert_same(*(torch.load(Path(folder) / name, weights_only=True) for folder in (a, b)), where=name)


@pytest.fixture
def start(small_network, train_cnn, write_medmnist):
    """A small data set in data/ and a classifier of it in task1/."""
    path = write_medmnist("data")
    train_cnn("task1", "--lr", "0.01")
    return path


# --- losses ---


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float64), dim=1)


def test_supervised_contrastive_by_hand():
    vectors, labels, t = unit([1.0, 0], [0.6, 0.8], [0, 1.0]), torch.tensor([0, 0, 1]), 0.5
    # cosines: 0-1 0.6, 0-2 0, 1-2 0.8; image 2 has no partner
    first = -math.log(math.exp(0.6 / t) / (math.exp(0.6 / t) + math.exp(0 / t)))
    second = -math.log(math.exp(0.6 / t) / (math.exp(0.6 / t) + math.exp(0.8 / t)))
    assert supervised_contrastive(vectors, labels, t).item() == pytest.approx((first + second) / 2)


def test_supervised_contrastive_at_its_ends():
    apart = unit([1.0, 0], [1, 0], [-1, 0], [-1, 0])
    good, bad = (supervised_contrastive(apart, torch.tensor(y), 0.1).item() for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    assert good < 1e-6 and bad > 15
    alone = supervised_contrastive(unit([1.0, 0], [0, 1.0]), torch.tensor([0, 1]))
    assert alone.item() == 0  # nobody has a partner
    same = unit([1.0, 0]).repeat(6, 1)
    assert supervised_contrastive(same, torch.zeros(6, dtype=torch.long)).item() == pytest.approx(
        math.log(5)
    )  # all alike: one of five


@pytest.mark.parametrize("loss", [supervised_contrastive, batch_hard_triplet])
def test_class_weights_make_the_mean_of_the_classes(loss):
    torch.manual_seed(0)
    vectors, labels = F.normalize(torch.randn(12, 3, dtype=torch.float64), dim=1), torch.tensor([0] * 3 + [1] * 9)
    first, second = (
        loss(vectors, labels, 0.5, torch.eye(2)[c]).item() for c in (0, 1)
    )  # only one class asks, both answer
    assert loss(vectors, labels, 0.5).item() == pytest.approx((3 * first + 9 * second) / 12, rel=1e-6)
    assert loss(vectors, labels, 0.5, 1 / torch.tensor([3.0, 9.0])).item() == pytest.approx(
        (first + second) / 2, rel=1e-6
    )


def test_triplet_by_hand():
    vectors, labels = unit([1.0, 0], [0, 1.0], [-1.0, 0]), torch.tensor([0, 0, 1])
    root2 = math.sqrt(2)
    # 0: furthest of its own root 2, nearest other 2; 1: root 2 and root 2; 2: has no partner
    expected = (max(0, root2 - 2 + 0.7) + 0.7) / 2
    assert batch_hard_triplet(vectors, labels, 0.7).item() == pytest.approx(expected)
    assert batch_hard_triplet(vectors, torch.tensor([0, 0, 0])).item() == 0


@pytest.mark.parametrize("loss", [supervised_contrastive, batch_hard_triplet])
def test_losses_have_finite_gradients_for_equal_vectors(loss):
    vectors = torch.ones(4, 3, requires_grad=True)
    loss(F.normalize(vectors, dim=1), torch.tensor([0, 0, 1, 1])).backward()
    assert vectors.grad.isfinite().all()


@pytest.mark.parametrize("loss", [supervised_contrastive, batch_hard_triplet])
def test_losses_pull_classes_apart(loss):
    torch.manual_seed(0)
    vectors, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) % 3
    optimizer = torch.optim.SGD([vectors], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(F.normalize(vectors, dim=1), labels).backward()
        optimizer.step()
    z = F.normalize(vectors, dim=1).detach().numpy()
    values = retrieval_values(z @ z.T, labels.numpy(), labels.numpy(), 3, np.eye(12, dtype=bool))
    assert values["AP"].min() == 1


def test_balanced_order_favours_no_class():
    labels = torch.tensor([0] * 30 + [1] * 270)
    order = epoch_order(labels, True, 0)
    assert len(order) == 300 and 100 < (labels[order] == 0).sum() < 200  # 30 without balance
    assert epoch_order(labels, False, 0).sort().values.equal(torch.arange(300))
    assert not epoch_order(labels, True, 0).equal(epoch_order(labels, True, 1))


# --- a run ---


def test_the_run_folder(start):
    main([*FAST, "--out-dir", "run"])
    metrics, rows, best = (
        read("run/metrics.json"),
        history("run/history.jsonl"),
        torch.load("run/best.pt", weights_only=True),
    )
    assert (
        [r["epoch"] for r in rows] == [0, 1, 2]
        and rows[0]["train_loss"] is None
        and all(math.isfinite(r["train_loss"]) for r in rows[1:])
    )
    chosen = max(rows, key=lambda r: (r["val_map_shifted"], r["val_p5_shifted"]))
    assert (
        metrics["best"] == chosen == best["validation"]
        and metrics["before_training"] == rows[0]
        and metrics["chosen_by"] == "val_map_shifted"
    )
    assert (metrics["split"], metrics["n"], metrics["gallery"], metrics["n_gallery"]) == ("val", 32, "train", 64)
    assert (best["kind"], best["head"], best["settings"]["dataset"]["name"]) == (
        "task3_embedding",
        {},
        "pneumoniamnist",
    )
    assert Path("run/figures/curves.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("models").exists()


def test_the_numbers_of_the_best_epoch_come_back_through_the_embedder(start):
    main([*FAST, "--out-dir", "run"])
    data = image_sets.load_medmnist("pneumoniamnist", "data")
    embed = load_embedder("cnn", "run", data)
    vectors = {s: embed(data.images[s][:, 0].numpy()).astype(np.float64) for s in ("train", "val")}
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors["val"], vectors["train"]))
    y = data.labels["val"].numpy()
    values = retrieval_values(a @ b.T, y, data.labels["train"].numpy(), 2)
    means = dict(zip(values, class_means(np.stack(list(values.values()), axis=1), y, 2)[0, 1], strict=True))
    best = read("run/metrics.json")["best"]
    for short, name in (("map", "AP"), ("p1", "P@1"), ("p5", "P@5"), ("vote", "vote")):
        assert means[name] == pytest.approx(best[f"val_{short}"], abs=1e-3), name


def test_a_run_that_never_gets_better_keeps_the_classifier(start, monkeypatch):
    judged = iter(range(100))
    monkeypatch.setattr(
        train_script,
        "judge",
        lambda *a: {
            f"val_{n}{s}": 1.0 / (1 + next(judged)) for n in ("map", "p1", "p5", "vote") for s in ("", "_shifted")
        },
    )
    main([*FAST, "--out-dir", "run"])
    best, classifier = torch.load("run/best.pt", weights_only=True), torch.load("task1/best.pt", weights_only=True)
    assert best["validation"]["epoch"] == 0
    for name, value in best["model"].items():
        assert torch.equal(value, classifier["state_dict"][name]), name


def test_copies_of_validation_images_in_the_gallery_do_not_count(start):
    arrays = dict(np.load(start))
    arrays["val_images"], arrays["val_labels"] = arrays["train_images"][:32].copy(), 1 - arrays["train_labels"][:32]
    np.savez_compressed(start, **arrays)  # every validation film lies in train, with the other label
    main([*FAST, "--epochs", "1", "--out-dir", "run"])
    with_copies = read("run/metrics.json")["before_training"]
    data = image_sets.load_medmnist("pneumoniamnist", "data")
    vectors = load_embedder("cnn", "task1", data)(data.images["train"][:, 0].numpy()).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    y, own = data.labels["val"].numpy(), np.eye(32, 64, dtype=bool)
    values = retrieval_values(vectors[:32] @ vectors.T, y, data.labels["train"].numpy(), 2, own)
    assert with_copies["val_p1"] == pytest.approx(class_means(values["P@1"][:, None], y, 2)[0, 1, 0], abs=1e-3)


@pytest.mark.parametrize(
    "more, width",
    [
        (["--loss", "triplet"], 24),
        (["--balance", "draws"], 24),
        (["--projection", "16", "8"], 8),
        (["--projection", "12", "--dtype", "bfloat16"], 12),
    ],
)
def test_losses_projections_and_precisions(start, more, width):
    main([*FAST, "--epochs", "1", "--out-dir", "run", *more])
    data = image_sets.load_medmnist("pneumoniamnist", "data")
    vectors = load_embedder("cnn", "run", data)(data.images["val"][:, 0].numpy())
    assert vectors.shape == (32, width) and np.isfinite(vectors).all()
    assert (
        read("run/metrics.json")["best"]["epoch"] == 1 or "--projection" not in more
    )  # a random projection is no candidate


def test_it_learns(small_network, write_medmnist):
    """The loss falls and the search of the validation images gets better than before; classes are bright patches."""
    write_medmnist("data", "breastmnist")
    start = ["--data", "breastmnist", "--data-dir", "data", "--device", "cpu"]
    train_classifier([*start, "--batch-size", "16", "--epochs", "1", "--lr", "0.01", "--out-dir", "task1"])
    main([*start, "--cnn-weights", "task1", "--epochs", "12", "--batch-size", "32", "--lr", "0.1", "--out-dir", "run"])
    rows = history("run/history.jsonl")
    assert rows[-1]["train_loss"] < rows[1]["train_loss"] - 0.1
    assert read("run/metrics.json")["best"]["val_map_shifted"] > rows[0]["val_map_shifted"] + 0.03


def test_the_test_split_is_never_read(start):
    main([*FAST, "--epochs", "1", "--out-dir", "a"])
    arrays = dict(np.load(start))
    arrays["test_images"], arrays["test_labels"] = 255 - arrays["test_images"], 1 - arrays["test_labels"]
    np.savez_compressed(start, **arrays)
    main([*FAST, "--epochs", "1", "--out-dir", "b"])
    a, b = (torch.load(f"{run}/best.pt", weights_only=True) for run in "ab")
    assert a["settings"]["dataset"].pop("sha256") != b["settings"]["dataset"].pop("sha256")
    assert_same(a, b)


def test_dry_run_needs_nothing(small_network, capsys):
    main(["--dry-run"])
    metrics = read("outputs/task3_retrieval/train/dry-run/metrics.json")
    assert metrics["dataset"]["phantom"] and metrics["started_from"] is None and metrics["n"] == 32
    assert "a random network" in capsys.readouterr().out


def test_other_sets(small_network, write_medmnist):
    write_medmnist("data", "bloodmnist", {"train": 64, "val": 32, "test": 16})
    train_classifier(
        [
            "--data",
            "bloodmnist",
            "--data-dir",
            "data",
            "--device",
            "cpu",
            "--batch-size",
            "16",
            "--epochs",
            "1",
            "--limit",
            "64",
            "--out-dir",
            "task1",
        ]
    )
    main(
        [
            "--cnn-weights",
            "task1",
            "--data-dir",
            "data",
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--batch-size",
            "16",
            "--out-dir",
            "run",
        ]
    )  # --data auto: the classifier's set
    assert read("run/metrics.json")["dataset"]["name"] == "bloodmnist"


def test_the_printed_commands_measure_and_search_what_was_trained(small_network, capsys):
    """Trained on the phantom: each printed command is run as it stands, and goes on with the same images."""
    from task3_retrieval.build_index import main as build
    from task3_retrieval.evaluate import main as evaluate
    from task3_retrieval.infer import main as infer

    train_classifier(["--data", "phantom", "--device", "cpu", "--epochs", "1", "--batch-size", "16"])
    main(["--device", "cpu", "--epochs", "1", "--batch-size", "16"])
    printed = capsys.readouterr().out
    assert "PHANTOM images: best epoch" in printed
    command = re.search(r"measure it with: python (\S+) (.*)", printed)
    assert command[1].endswith("task3_retrieval/evaluate.py")
    evaluate([*shlex.split(command[2]), "--device", "cpu", "--resamples", "20"])
    metrics = read("outputs/task3_retrieval/evaluate/001/metrics.json")
    assert metrics["headline"] == "trained embedding" and metrics["phantom"] and metrics["n"] == 48
    assert "PHANTOM" in Path("reports/task3_retrieval.md").read_text()
    capsys.readouterr()
    build(["--device", "cpu"])  # takes the embedding, and says so
    printed = capsys.readouterr().out
    assert "(trained embedding, there is no full run on real images" in printed and "PHANTOM images: 96" in printed
    infer([*shlex.split(re.search(r"infer.py (.*)", printed)[1]), "--device", "cpu", "-k", "60"])
    printed = capsys.readouterr().out
    assert "trained embedding" in printed and "PHANTOM" in printed and "probability of pneumonia" in printed
    page = Path("outputs/task3_retrieval/infer/001/page.html").read_text()
    assert "The nearest 20 of 60 neighbours are drawn" in page


def test_which_weights_are_taken(start, capsys):
    """Full runs on real images before others, the newest of them; a limited run never before a real classifier."""
    with pytest.raises(InputError, match="no task 1 weights"):
        find_cnn()
    Path("models").mkdir()
    shutil.copy("task1/best.pt", "models/task1_model.pth")
    main([*FAST, "--epochs", "1", "--limit", "40"])
    assert find_cnn("pneumoniamnist") == (
        Path("models/task1_model.pth"),
        "task 1's classifier: there is no full run of task3_retrieval/train.py for these images",
    )
    for _ in range(2):
        main([*FAST, "--epochs", "1"])
    main([*FAST, "--epochs", "1", "--limit", "40"])
    runs = Path("outputs/task3_retrieval/train")
    assert (
        find_cnn()
        == find_cnn("pneumoniamnist")
        == (runs / "003/best.pt", "trained embedding, the newest full run of train.py")
    )
    assert find_cnn("breastmnist")[0] == Path("models/task1_model.pth")  # of other images: the caller refuses it
    (runs / "003/metrics.json").unlink()  # not finished
    assert find_cnn()[0] == runs / "002/best.pt"


# --- stop and go on ---


def stop_at(monkeypatch, number):
    """The run gets SIGTERM before its `number`th training step; judging calls augment's neighbours, never augment."""
    whole, calls = train_script.augment, [0]

    def counted(*arguments):
        calls[0] += 1
        if calls[0] == 2 * number:  # two views per step
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(train_script, "augment", counted)


@pytest.mark.parametrize("step", [3, 11])
def test_a_stopped_run_goes_on_exactly(start, monkeypatch, step):
    main([*FAST, "--out-dir", "whole"])  # 8 steps an epoch
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(SystemExit) as stop:
            main([*FAST, "--out-dir", "parts"])
    assert stop.value.code == 128 + signal.SIGTERM and not Path("parts/best.pt").exists()
    assert torch.load("parts/last.pt", weights_only=True)["values"]["step"] == step % 8
    main([*FAST, "--resume", "parts"])
    assert_same_run("whole", "parts")
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in history("whole/history.jsonl")] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in history("parts/history.jsonl")
    ]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--lr", "0.5"], "was written with --lr 0.005 (now 0.5)"),
        (["--projection", "8"], "was written with --projection [] (now [8])"),
        (["--epochs", "1"], "already has 2 epochs; --epochs 1 is less"),
        (["--cnn-weights", "other"], "started from another classifier"),
    ],
)
def test_resuming_another_run_is_refused(start, train_cnn, refused, change, sentence):
    main([*FAST, "--out-dir", "run"])
    train_cnn("other", "--seed", "5")
    before = Path("run/last.pt").read_bytes()
    assert sentence in refused(main, [*FAST, "--resume", "run", *change])
    assert Path("run/last.pt").read_bytes() == before


# --- bad input ---


def test_bad_input(start, refused, write_medmnist):
    fast = [a for a in FAST if a not in ("--cnn-weights", "task1")]
    assert "there are no task 1 weights" in refused(main, fast)
    assert "there is no" in refused(main, [*fast, "--cnn-weights", "nowhere.pth"])
    Path("broken.pth").write_bytes(b"no checkpoint")
    assert "cannot be read as a task 1 classifier" in refused(main, [*fast, "--cnn-weights", "broken.pth"])
    write_medmnist("data", "breastmnist")
    assert "was trained on pneumoniamnist, not on breastmnist" in refused(main, [*FAST, "--data", "breastmnist"])
    assert "--batch-size must be at least 4" in refused(main, [*FAST, "--batch-size", "2"])
    assert "--projection: must be at least 1" in refused(main, [*FAST, "--projection", "0"])
    assert "widths of at most 8192" in refused(main, [*FAST, "--projection", "1000000"])
    assert not Path("outputs/task3_retrieval").exists()


def test_a_loss_that_is_not_finite_keeps_the_epochs_before(start, refused, monkeypatch):
    main([*FAST, "--epochs", "1", "--out-dir", "run"])
    monkeypatch.setattr(train_script, "supervised_contrastive", lambda vectors, *a, **k: vectors.sum() * math.nan)
    assert "not finite in every step of epoch 2: lower --lr" in refused(main, ["--resume", "run", "--epochs", "2"])
    assert torch.load("run/last.pt", weights_only=True)["values"]["epoch"] == 1


# --- real processes ---


@pytest.mark.slow
def test_two_processes_compute_the_gradient_of_one(small_network, tmp_path, start_script):
    """
    The loss compares all images of the batch: gathered vectors must send every gradient home, scaled as for one
    process.
    """
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.nn.functional import all_gather
from task3_retrieval.train import supervised_contrastive
dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Linear(5, 3).double(); x = torch.randn(8, 5).double(); y = torch.arange(8) % 2
alone = torch.autograd.grad(supervised_contrastive(F.normalize(net(x), dim=1), y), list(net.parameters()))
rank = dist.get_rank()
ddp = torch.nn.parallel.DistributedDataParallel(net)
vectors = torch.cat(all_gather(F.normalize(ddp(x[rank::2]), dim=1)))
supervised_contrastive(vectors, torch.cat([y[r::2] for r in range(2)])).backward()
for p, g in zip(net.parameters(), alone):
    torch.testing.assert_close(p.grad, g)
print(f"equal on rank {{rank}}\\n", end="", flush=True)
dist.barrier()
dist.destroy_process_group()
""")
    process = start_script([script], tmp_path, ranks=2)
    assert process.wait(900) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    text = (tmp_path / "output.txt").read_text()
    assert "equal on rank 0" in text and "equal on rank 1" in text


@pytest.mark.slow
def test_dry_run_as_a_process_from_another_folder(tmp_path, start_script):
    started = time.time()
    process = start_script([ROOT / "task3_retrieval" / "train.py", "--dry-run"], tmp_path)
    assert process.wait(900) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    assert read(tmp_path / "outputs/task3_retrieval/train/dry-run/metrics.json")["seconds"] <= time.time() - started
