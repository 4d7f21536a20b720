"""
Speed of task 1's training loop against the usual one, in one run: a DataLoader over PIL images with torchvision
transforms, the same network, the same geometric and tonal changes, the same optimiser and batch size.

Usage:
    python benchmarks/task1_train.py                 # about 3 minutes on two cores; leave the machine alone meanwhile
    python benchmarks/task1_train.py --images 2048

Prints a table and writes outputs/benchmarks/task1_train.json: images per second of both loops and of their data paths
alone (images to normalised batches, no network), the ratios, and which share of the measured matrix-multiply peak the
network's arithmetic reaches. The rows take turns, so that a machine that slows down slows all of them; each is the
median of --repeats rounds after one that is not counted. The last row is ours with --dtype bfloat16, worth it on
processors that compute it.
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

from shared.data.augment import augment
from shared.phantom import phantom_classification
from shared.runtime import positive_int, run_facts, seed_everything, write_json
from task1_classification.model import build_model, normalise

NORMALISATION = {"mean": [0.57], "std": [0.17]}


class PilImages(Dataset):
    """What MedMNIST's own classes and most tutorials do: one PIL image at a time through torchvision transforms."""

    def __init__(self, images, labels, workers_import_shared=shared):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomAffine(
                    10, translate=(0.07, 0.07), scale=(0.9, 1.1), interpolation=transforms.InterpolationMode.BILINEAR
                ),
                transforms.ColorJitter(brightness=0.25, contrast=0.25),
                transforms.ToTensor(),
                transforms.Lambda(add_noise),
                transforms.Normalize(NORMALISATION["mean"], NORMALISATION["std"]),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def add_noise(x):
    return x + 0.04 * torch.rand(()) * torch.randn(x.shape)


def usual_batches(images, labels, batch_size, workers):
    loader = DataLoader(
        PilImages(images.numpy()[:, 0], labels), batch_size, shuffle=True, num_workers=workers, drop_last=True
    )
    yield from loader


def our_batches(images, labels, batch_size):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    for i in range(len(images) // batch_size):
        index = order[i * batch_size : (i + 1) * batch_size]
        yield normalise(augment(images[index].float() / 255, generator), NORMALISATION), labels[index]


def train_on(batches, model, optimizer, channels_last, dtype=torch.float32):
    model.train()
    for x, y in batches:
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(x)
        loss = F.binary_cross_entropy_with_logits(logits[:, 0].float(), y.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def matmul(a, b, times=4):
    for _ in range(times):
        a @ b


def median_seconds(functions, repeats):
    """{name: function} -> {name: median seconds}, the functions taking turns; a first round is not counted."""
    times = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive_int, default=640, help="phantom images per pass (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=7, help="timings per row (%(default)s)")
    # fmt: off
    parser.add_argument("--workers", type=int, default=0,
        help="processes of the usual loop's DataLoader, which share the cores with the training (%(default)s)")
    # fmt: on
    args = parser.parse_args()
    started = time.time()
    seed_everything(0)
    arrays = phantom_classification(0, {"train": args.images, "val": 8, "test": 8}, 28)
    images, labels = torch.from_numpy(arrays["train_images"])[:, None], torch.from_numpy(arrays["train_labels"][:, 0])
    n = len(images) // args.batch_size * args.batch_size

    networks = [build_model(), *(build_model().to(memory_format=torch.channels_last) for _ in range(2))]
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4) for m in networks
    ]

    def usual():
        return usual_batches(images, labels, args.batch_size, args.workers)

    def ours():
        return our_batches(images, labels, args.batch_size)

    def drain(batches):
        for _ in batches:
            pass

    a, b = torch.randn(3072, 3072), torch.randn(3072, 3072)
    times = median_seconds(
        {
            "usual, data path": lambda: drain(usual()),
            "ours, data path": lambda: drain(ours()),
            "usual, training": lambda: train_on(usual(), networks[0], optimizers[0], channels_last=False),
            "ours, training": lambda: train_on(ours(), networks[1], optimizers[1], channels_last=True),
            "ours, training in bfloat16": lambda: train_on(
                ours(), networks[2], optimizers[2], channels_last=True, dtype=torch.bfloat16
            ),
            "matmul": lambda: matmul(a, b),
        },
        args.repeats,
    )
    peak = 4 * 2 * 3072**3 / times.pop("matmul")  # floating-point operations per second, float32
    rates = {name: n / s for name, s in times.items()}
    with FlopCounterMode(display=False) as counter:
        train_on(
            [(torch.randn(args.batch_size, 1, 28, 28), labels[: args.batch_size])], networks[1], optimizers[1], True
        )
    flops = counter.get_total_flops() / args.batch_size  # forward and backward, per image
    result = {
        "images_per_second": rates,
        "ratio_data_path": rates["ours, data path"] / rates["usual, data path"],
        "ratio_training": rates["ours, training"] / rates["usual, training"],
        "ratio_training_bfloat16": rates["ours, training in bfloat16"] / rates["usual, training"],
        "gflop_per_image": flops / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "share_of_peak": rates["ours, training"] * flops / peak,
        "images": n,
        "batch_size": args.batch_size,
        "workers": args.workers,
        **run_facts(started, "cpu"),
    }
    print("| | images per second |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    print(
        f"data path {result['ratio_data_path']:.1f} x, training {result['ratio_training']:.2f} x, in bfloat16"
        f" {result['ratio_training_bfloat16']:.2f} x the usual loop"
    )
    print(
        f"network: {flops / 1e9:.3f} GFLOP per image, {rates['ours, training'] * flops / 1e9:.0f} GFLOP/s of"
        f" {peak / 1e9:.0f} measured = {result['share_of_peak']:.0%}"
    )
    write_json(Path("outputs/benchmarks/task1_train.json"), result)


if __name__ == "__main__":
    main()
