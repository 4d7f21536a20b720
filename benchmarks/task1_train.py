"""
Speed of task 1's training loop against the usual one, in one run: a DataLoader over PIL images with torchvision transforms,
the same network, the same geometric and tonal changes, the same optimiser and batch size.

Usage:
    python benchmarks/task1_train.py                 # about 3 minutes on two cores; leave the machine alone meanwhile
    python benchmarks/task1_train.py --images 2048

Prints a table and writes outputs/benchmarks/task1_train.json: images per second of both loops and of their data paths alone
(images to normalised batches, no network), the ratios, and which share of the measured matrix-multiply peak the network's
arithmetic reaches. Each timing is the median of --repeats; one warm-up round is not counted.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before torchvision
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from shared.data.phantom import phantom_classification
from shared.runtime import peak_memory, positive_int, run_facts, seed_everything, write_json
from task1_classification.augment import augment
from task1_classification.model import build_model, normalise

NORMALISATION = {"mean": [0.57], "std": [0.17]}


class PilImages(Dataset):
    """What MedMNIST's own classes and most tutorials do: one PIL image at a time through torchvision transforms."""

    def __init__(self, images, labels, workers_import_shared=shared):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([
            transforms.RandomAffine(10, translate=(0.07, 0.07), scale=(0.9, 1.1), interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.ColorJitter(brightness=0.25, contrast=0.25),
            transforms.ToTensor(),
            transforms.Lambda(add_noise),
            transforms.Normalize(NORMALISATION["mean"], NORMALISATION["std"]),
        ])  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def add_noise(x):
    return x + 0.04 * torch.rand(()) * torch.randn(x.shape)


def usual_batches(images, labels, batch_size, workers):
    loader = DataLoader(PilImages(images.numpy()[:, 0], labels), batch_size, shuffle=True, num_workers=workers, drop_last=True)
    yield from loader


def our_batches(images, labels, batch_size):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    for i in range(len(images) // batch_size):
        index = order[i * batch_size : (i + 1) * batch_size]
        yield normalise(augment(images[index].float() / 255, generator), NORMALISATION), labels[index]


def train_on(batches, model, optimizer, channels_last):
    model.train()
    for x, y in batches:
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        loss = F.binary_cross_entropy_with_logits(model(x)[:, 0], y.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def seconds(function, repeats):
    """Median of `repeats` timings after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_peak():
    """Floating-point operations per second of a large float32 matrix product, the best of several."""
    a, b = torch.randn(3072, 3072), torch.randn(3072, 3072)
    best = min(seconds(lambda: a @ b, 1) for _ in range(5))
    return 2 * 3072**3 / best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive_int, default=1536, help="phantom images per pass (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timings per row (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes of the usual loop's DataLoader, which share the cores with the training (%(default)s)")
    args = parser.parse_args()
    started = time.time()
    seed_everything(0)
    arrays = phantom_classification(0, {"train": args.images, "val": 8, "test": 8}, 28)
    images, labels = torch.from_numpy(arrays["train_images"])[:, None], torch.from_numpy(arrays["train_labels"][:, 0])
    n = len(images) // args.batch_size * args.batch_size

    model = build_model()
    model_cl = build_model().to(memory_format=torch.channels_last)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4) for m in (model, model_cl)]

    def drain(batches):
        for _ in batches:
            pass

    rows = {
        "usual, data path": seconds(lambda: drain(usual_batches(images, labels, args.batch_size, args.workers)), args.repeats),
        "ours, data path": seconds(lambda: drain(our_batches(images, labels, args.batch_size)), args.repeats),
        "usual, training": seconds(lambda: train_on(usual_batches(images, labels, args.batch_size, args.workers), model, optimizers[0], False), args.repeats),
        "ours, training": seconds(lambda: train_on(our_batches(images, labels, args.batch_size), model_cl, optimizers[1], True), args.repeats),
    }
    with FlopCounterMode(display=False) as counter:
        train_on([(torch.randn(args.batch_size, 1, 28, 28), labels[: args.batch_size])], model_cl, optimizers[1], True)
    flops = counter.get_total_flops() / args.batch_size  # forward and backward, per image
    peak = matmul_peak()
    rates = {name: n / s for name, s in rows.items()}
    result = {
        "images_per_second": rates,
        "ratio_data_path": rates["ours, data path"] / rates["usual, data path"],
        "ratio_training": rates["ours, training"] / rates["usual, training"],
        "gflop_per_image": flops / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "share_of_peak": rates["ours, training"] * flops / peak,
        "images": n, "batch_size": args.batch_size, "workers": args.workers, **peak_memory("cpu"), **run_facts(started, "cpu"),
    }  # fmt: skip
    print("| | images per second |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    print(f"data path {result['ratio_data_path']:.1f} x, training {result['ratio_training']:.2f} x the usual loop")
    print(f"network: {flops / 1e9:.3f} GFLOP per image, {rates['ours, training'] * flops / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f} measured = {result['share_of_peak']:.0%}")
    write_json(Path("outputs/benchmarks/task1_train.json"), result)


if __name__ == "__main__":
    main()
