"""
What a small model from random weights needs before it can learn to write: eyes. Vision tower and projector learn the
labels and sides of the training reports, through one linear layer that is thrown away afterwards.

The loss of a report is mostly that of its wording, and the few tokens that depend on the film teach a random tower
very slowly. This stage does the tower's share of the work at about a third of the cost per film. The linear layer
reads the mean of the image tokens, so that a finding looks alike in every token and any attention can find it.
Reading what the tower sees is the language model's share, and sentences teach it as slowly; so each film is asked a
second question during training, LIST, whose answer (list_of) has hardly a token that does not depend on the film. The
labels come from the texts alone (shared/metrics/labels.py): nothing is used that report writing would not use.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import contextlib
import time

import shared  # noqa: F401, isort: skip  # before torch
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from shared.metrics.labels import CONDITIONS
from shared.models.passes import features_of
from shared.runtime import InputError
from shared.training import GuardedStep, StopSignal, learning_rate, load_state, save_state
from task2_report.scores import SIDED, sides_of, stated

LIST = "List what this chest radiograph shows."


def list_of(report):
    """What a report states, as short as can be: "Edema; Pleural Effusion left"."""
    says, sides = stated(report), sides_of(report)
    return "; ".join(" ".join([name, *sorted(sides.get(name, ()))]) for name in says if says[name]) or "nothing"


def targets_of(reports):
    """Texts -> float32 (N, L): conditions that are stated, and those with a side once more for left and right."""
    rows = []
    for text in reports:
        says, sides = stated(text), sides_of(text)
        row = [says[name] for name in CONDITIONS[1:]]
        rows.append(row + [side in sides.get(name, ()) for name in SIDED for side in ("left", "right")])
    return np.array(rows, np.float32)


def learn_labels(vlm, store, numbers, reports, steps, batch_size=64, lr=1e-3, seed=0, hidden=False, save=None):
    """
    numbers: of the films in the ImageStore; reports: their texts. Trains tower and projector in place -> mean loss of
    the last tenth of the steps, beside that of the label shares alone. save: (path, settings, facts of the data) of a
    state written every minute and when the run is told to stop, from which the stage goes on; None: none.
    """
    targets = torch.from_numpy(targets_of(reports))
    learned = targets.sum(0).nonzero()[:, 0]
    if not len(learned):
        raise InputError("no training report states a condition, so there is nothing to see: give --label-steps 0")
    targets, started = targets[:, learned].to(vlm.device), time.time()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    width = features_of(vlm, store.get(numbers[:1]))[0].shape[-1]
    head = torch.nn.Linear(width, targets.shape[1]).to(vlm.device)
    parts = [vlm.base.get_submodule(name) for name in (vlm.spec.tower, *vlm.spec.projector)]
    parameters = list({id(p): p for part in [*parts, head] for p in part.parameters()}.values())
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05), []
    guard = GuardedStep(optimizer, torch.amp.GradScaler(vlm.device.type, enabled=False), parameters, 1.0)
    state = save and (save[0], {"parts": torch.nn.ModuleList([*parts, head]), "optimizer": optimizer}, *save[1:])
    if save and save[0].exists():
        losses = load_state(*state)["losses"]
    vlm.model.train()
    begun, written = len(losses), time.time()
    with StopSignal() if save else contextlib.nullcontext() as stop:
        for step in tqdm(range(steps), desc="labels", leave=False, disable=True if hidden else None):
            rows = torch.randint(len(numbers), (batch_size,), generator=generator).tolist()
            if step < begun:
                continue
            seen = torch.stack([f.mean(0) for f in features_of(vlm, store.get([numbers[r] for r in rows]))])
            loss = F.binary_cross_entropy_with_logits(head(seen.float()), targets[rows])
            loss.backward()
            guard.step(loss.item(), learning_rate(step, steps, steps // 20, lr))
            losses.append(loss.item())
            told_to_stop = save and stop.requested()
            if save and (told_to_stop or time.time() - written > 60):
                save_state(*state, losses=losses)
                written = time.time()
            if told_to_stop:
                stop.exit(save[0].parent)
    shares = targets.mean(0).clamp(1e-6, 1 - 1e-6)
    chance = F.binary_cross_entropy(shares.expand_as(targets), targets).item()
    last = losses[-max(1, steps // 10) :]
    return {"steps": steps, "loss": float(np.mean(last)), "loss_of_shares": chance, "seconds": time.time() - started}
