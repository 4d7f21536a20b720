"""
How many phantom studies per second one core makes, with everything materialised: film, masks, boxes, labels, report,
questions. And, with --learn, how well a small network learns the 14 conditions from the films.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/phantom.py
    OMP_NUM_THREADS=1 python benchmarks/phantom.py --sizes 28 64 224 512 --seconds 20
    python benchmarks/phantom.py --learn 4000 --epochs 8     # 224 px, needs torch, minutes

Targets: 500 studies/s at 28 px, 40 studies/s at 224 px; AUC of at least 0.95 for the common findings. Compared with
what a user would pick instead: scikit-image's Shepp-Logan head phantom, resized. That is one fixed slice of a head,
loaded from a file, without findings, text or truth; it only shows what reading and resizing one picture costs.
Processor seconds are counted, so that other programs on the machine matter less; wall seconds are printed beside them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

from shared.phantom import phantom_classification, phantom_study


def everything(seed, index, size):
    """Touch all parts of a study, since they are made on demand."""
    study = phantom_study(seed, index, size)
    return (
        study.image,
        study.masks,
        study.organ_masks,
        study.boxes,
        study.labels,
        study.report,
        study.report_labels,
        study.questions,
    )


def rate(make, seconds, start=0):
    """(studies per processor second, studies per wall second, studies made)"""
    for i in range(3):  # tables and caches of this size
        make(start + i)
    wall, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        make(start + 3 + n)
        n += 1
    return n / (time.process_time() - cpu), n / (time.perf_counter() - wall), n


def learn(train_size, epochs, size=224, test_size=800, seed=7):
    """Train a small residual network on films of one hospital, new patients for the test; AUC per condition."""
    import numpy as np
    import torch
    from torch import nn

    from shared.metrics.labels import CONDITIONS
    from shared.phantom import patient_of

    torch.manual_seed(0)
    shift = np.random.default_rng(0)
    start = train_size
    while patient_of(seed, start)[1] > 0:  # the last patient of the training set keeps all visits there
        start += 1

    def films(indices):
        studies = [phantom_study(seed, i, size) for i in indices]
        labels = torch.tensor([[float(s.labels[name]) for name in CONDITIONS] for s in studies])
        images = torch.empty(len(studies), 1, size, size, dtype=torch.uint8)
        for i in range(len(studies)):
            images[i, 0] = torch.from_numpy(studies[i].image)
            studies[i] = None  # its masks are not needed
        return images, labels

    def layer(a, b, kernel=3, stride=1):
        return nn.Sequential(
            nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
        )

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = layer(width, width), layer(width, width)

        def forward(self, x):
            return x + self.b(self.a(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            parts = [layer(1, 16, 5, 2), layer(16, 24, 3, 2)]
            for a, b in ((24, 48), (48, 96), (96, 128)):
                parts += [layer(a, b, 3, 2), Block(b)]
            self.body, self.head = nn.Sequential(*parts), nn.Linear(256, len(CONDITIONS))

        def forward(self, images):  # uint8 (B, 1, H, W) -> logits (B, 14)
            x = self.body(images.float() / 255 - 0.5)
            return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    (images, labels), (test_images, test_labels) = films(range(train_size)), films(range(start, start + test_size))
    net, batch = Net(), 32
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * (train_size // batch))
    aucs = {}
    for epoch in range(epochs):
        net.train()
        for rows in torch.randperm(train_size)[: train_size // batch * batch].split(batch):
            x = torch.roll(images[rows], shift.integers(-8, 9, 2).tolist(), (2, 3))  # no flips: sides matter
            loss = nn.functional.binary_cross_entropy_with_logits(net(x), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.inference_mode():
            scores = torch.cat([net(x) for x in test_images.split(64)])
        for k, name in enumerate(CONDITIONS):
            positive, negative = scores[test_labels[:, k] == 1, k], scores[test_labels[:, k] == 0, k]
            if len(positive) and len(negative):  # share of pairs in the right order
                aucs[name] = (positive[:, None] > negative).float().mean().item()
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {auc:.3f}" for name, auc in aucs.items()), flush=True)
    return aucs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[28, 224], help="pixels per side (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="wall seconds per row (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--learn", type=int, metavar="N", help="train on N studies instead of measuring speed")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the N studies (%(default)s)")
    args = parser.parse_args(argv)
    if args.learn:
        return learn(args.learn, args.epochs)
    rows = []

    def row(what, size, numbers):
        rows.append(
            {
                "what": what,
                "size": size,
                "per_cpu_second": numbers[0],
                "per_wall_second": numbers[1],
                "made": numbers[2],
            }
        )
        print(
            f"{what:34s} {size:4d} px  {numbers[0]:9.1f} /s processor  {numbers[1]:9.1f} /s wall   ({numbers[2]} made)",
            flush=True,
        )

    for size in args.sizes:
        row("study with everything", size, rate(lambda i, s=size: everything(0, i, s), args.seconds))
        row("film alone", size, rate(lambda i, s=size: phantom_study(0, i, s).image, args.seconds))
        row("lateral film alone", size, rate(lambda i, s=size: phantom_study(0, i, s).lateral, args.seconds))
        wall, cpu = time.perf_counter(), time.process_time()
        n = 200 if size <= 64 else 40
        phantom_classification(0, {"train": n}, size)
        row("phantom_classification", size, (n / (time.process_time() - cpu), n / (time.perf_counter() - wall), n))
        try:
            from skimage.data import shepp_logan_phantom
            from skimage.transform import resize
        except ImportError:
            continue
        row(
            "Shepp-Logan, read and resized",
            size,
            rate(lambda i, s=size: resize(shepp_logan_phantom(), (s, s)), args.seconds),
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
