"""
A small CNN that reads the labels of films: the upper line beside written reports, since it only has to see and not to
write, and the features by which the nearest training film is found.

    images, cases, errors = small_films(cases)             # those that can be read
    net = LabelCNN(images, labels, seed=0)                 # labels: bool (N, L)
    probabilities, features = net.run(images)              # (N, L) and (N, 512)

The network is task 1's ResNet-18 on 64 px. Thresholds per label are chosen for F1 on validation.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
import time

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import precision_recall_curve

from shared.data.images import read_image, to_square
from shared.runtime import InputError
from shared.training import learning_rate
from task1_classification.model import build_model, normalise

SIZE = 64
MOST_EPOCHS = 30  # of few films, such as with --limit; from 1,300 on the steps end first


def small_films(cases):
    """-> (uint8 tensor (N, 1, SIZE, SIZE), cases whose film can be read, rows of errors.csv for the others)."""
    small, kept, errors = [], [], []
    for case in cases:
        try:
            small.append(to_square(read_image(case.film), SIZE, 1))
            kept.append(case)
        except InputError as error:
            errors.append({"path": str(case.film), "error": str(error)})
    if not kept:
        first = f"; {errors[0]['path']}: {errors[0]['error']}" if errors else ""
        raise InputError(f"none of the {len(cases)} films can be read{first}")
    return torch.from_numpy(np.stack(small)), kept, errors


class LabelCNN:
    def __init__(self, images, labels, steps=600, batch_size=64, lr=2e-3, seed=0, device="cpu"):
        torch.manual_seed(seed)
        targets = torch.from_numpy(np.asarray(labels)).float()
        scaled = images.float() / 255
        self.normalisation = {"mean": [float(scaled.mean())], "std": [float(scaled.std()) or 1.0]}
        self.model = build_model("resnet18", targets.shape[1], 1, SIZE, stem="7x7").to(device)
        self.device, generator = device, torch.Generator().manual_seed(seed)
        steps = min(steps, MOST_EPOCHS * math.ceil(len(images) / batch_size))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.05)
        started = time.time()
        for step in range(steps):
            rows = torch.randint(len(images), (batch_size,), generator=generator)
            shift = torch.randint(-3, 4, (2,), generator=generator).tolist()  # no flips: left and right matter
            batch = torch.roll(images[rows], shift, (2, 3)).to(device)
            loss = F.binary_cross_entropy_with_logits(
                self.model(normalise(batch, self.normalisation)), targets[rows].to(device)
            )
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, steps // 20, lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        self.seconds = time.time() - started

    @torch.inference_mode()
    def run(self, images):
        """-> probabilities (N, L), features (N, 512) of the last layer but one, as float32 arrays."""
        kept, hook = [], self.model.fc.register_forward_pre_hook(lambda m, inputs: kept.append(inputs[0].float().cpu()))
        out = []
        for batch in images.split(256):
            out.append(self.model(normalise(batch.to(self.device), self.normalisation)).sigmoid().float().cpu())
        hook.remove()
        return torch.cat(out).numpy(), torch.cat(kept).numpy()


def best_thresholds(labels, probabilities):
    """bool (N, L), (N, L) of validation -> (L,): highest F1 of each label, for p >= cut; 0.5 where none occurs."""
    cuts = []
    for y, p in zip(labels.T, probabilities.T, strict=True):
        if not y.any():
            cuts.append(0.5)
            continue
        precision, recall, at = precision_recall_curve(y, p)  # one more than the thresholds: the last is no threshold
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        cuts.append(at[np.argmax(f1[:-1])])
    return np.array(cuts)
