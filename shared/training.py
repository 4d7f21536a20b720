"""
What every trainer must do alike: stop when told to, save and go on exactly, refuse another run's checkpoint, leave out
a step that is not finite. The loops themselves stay in the scripts.

    guard = GuardedStep(optimizer, scaler, weights, grad_clip=1.0)
    parts = {"weights": weights, "optimizer": optimizer, "scaler": scaler}            # whatever has a state_dict()
    values = load_state(last_path, parts, settings, data) if args.resume else {}      # plain values as they were saved
    with StopSignal() as stop:
        for step in range(values.get("step", 0), num_steps):
            ...
            scaler.scale(loss).backward()
            guard.step(loss.item())
            if stop.requested():
                save_state(last_path, parts, settings, data, step=step + 1)
                stop.exit(run_dir)
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import contextlib
import math
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from shared.runtime import InputError, command, digest, is_main_process, load_checkpoint, read_json, save_checkpoint


def learning_rate(step, num_steps, warmup_steps, highest):
    """Of step 0 .. num_steps - 1: a linear warm-up to `highest`, then a cosine down to zero."""
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


class GuardedStep:
    """
    One optimiser step. Where loss or gradient is not finite nothing is changed (float16 also lowers its scale), and
    after `most` such steps in a row the run ends with one sentence.

    parameters: those whose gradient norm is clipped to grad_clip (None: not clipped). skipped: steps left out so far.
    """

    def __init__(self, optimizer, scaler, parameters, grad_clip=None, most=20):
        self.optimizer, self.scaler, self.most = optimizer, scaler, most
        self.parameters, self.grad_clip = list(parameters), grad_clip
        self.skipped = self.in_a_row = 0

    def step(self, loss, lr=None):
        """loss: a number, the same on all processes; lr: set before the step -> was it taken?"""
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or math.inf).item()
        finite = math.isfinite(loss) and math.isfinite(self.norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row >= self.most:
            raise InputError(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row: lower --lr, or use --dtype"
                " float32; the run folder keeps what was saved before"
            )
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


def moving_average(network, decay):
    """
    A copy of the network that follows it, batch statistics too: call its update_parameters(network) after every step
    taken. The memory is short at first, while the weights move fast: after n steps the decay is n / (n + 9), at most
    `decay`.
    """

    @torch.no_grad()
    def follow(averaged, current, n):
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(decay, float(n / (n + 9))))
        else:
            torch._foreach_copy_(averaged, current)

    average = AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
    average.update_parameters(network)  # the network as it came is the first of those that count
    return average


def adamw(weights, lr, weight_decay, **more):
    """AdamW over Weights, with weight decay on matrices alone: not on biases and norms."""
    matrices, vectors = ([p for p in weights.values() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, **more)


class Weights(dict):
    """The trained parameters {name: parameter} as a part of a checkpoint: an adapter without its frozen model."""

    def __init__(self, model):
        super().__init__((name, p) for name, p in model.named_parameters() if p.requires_grad)

    def state_dict(self):
        return {name: p.detach() for name, p in self.items()}

    def load_state_dict(self, state):
        if set(state) != set(self) or any(state[name].shape != p.shape for name, p in self.items()):
            raise ValueError("other names or shapes")
        with torch.no_grad():
            for name, p in self.items():
                p.copy_(state[name])


def save_state(path, parts, settings, data, **values):
    """
    All it takes to go on exactly: the states of the parts {name: module, optimiser, ...}, the settings and what tells
    the data from another (plain values), and plain values of the loop. Written by the main process, atomically.
    """
    if is_main_process():
        states = {name: part.state_dict() for name, part in parts.items()}
        rest = {"settings": settings, "data": data, "values": values}
        save_checkpoint(path, {"parts": states, "sha256": digest(rest), **rest})


def load_state(path, parts, settings, data, may_differ=()):
    """
    Put the states back -> the plain values. InputError for another run's checkpoint (see refuse_other_settings), and
    for one that was changed after it was written.
    """
    state = load_checkpoint(path, ("parts", "sha256", "settings", "data", "values"), what="training state")
    if digest({key: state[key] for key in ("settings", "data", "values")}) != state["sha256"]:
        raise InputError(f"{path} was changed after it was written, or is damaged; start a new run")
    refuse_other_settings(settings, state["settings"], path, may_differ)
    if state["data"] != data:
        raise InputError(f"{path} was trained on other data; give the same data to resume, or start a new run")
    try:
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
            for p, memory in part.state.items() if isinstance(part, torch.optim.Optimizer) else ():
                if any(torch.is_tensor(v) and v.ndim and v.shape != p.shape for v in memory.values()):
                    raise ValueError("the optimiser's memory has another shape")
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} holds the weights of another model; give the arguments that chose it, or start a new run"
        ) from error
    return state["values"]


def settings_of(args, aside=()):
    """The arguments that shape a result, by name: a resumed run must agree with the first in all of them."""
    never = {"config", "out_dir", "resume", "overwrite", "device", "data_dir", *aside}
    return {k: v for k, v in vars(args).items() if k not in never}


def refuse_other_settings(now, then, path, may_differ=()):
    """To resume, the settings given now must be those of the checkpoint at `path`, all but those in `may_differ`."""
    changed = [
        f"--{k.replace('_', '-')} {then.get(k)} (now {v})"
        for k, v in now.items()
        if k not in may_differ and then.get(k) != v
    ]
    if changed:
        raise InputError(f"{path} was written with {', '.join(changed)}; give the same to resume, or start a new run")


class StopSignal:
    """
    Lets a loop finish its step and save when the run is told to stop:

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.requested():    # SIGTERM (SLURM, docker) or Ctrl-C; under torchrun all ranks agree
                    save(); stop.exit(run_dir)

    A second signal ends the process at once; what was saved before stays whole, as checkpoints are renamed into place.
    """

    def __enter__(self):
        self.signal = None
        self.previous = {}
        with contextlib.suppress(ValueError):  # not the main thread (some notebooks): signals keep their usual meaning
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.signal is not None:
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.signal = number
        print(f"\n{signal.Signals(number).name}: saving after this step (once more to quit at once)", file=sys.stderr)

    def requested(self):
        if dist.is_initialized():  # otherwise one rank would leave the others waiting in all_reduce
            flag = torch.tensor(self.signal or 0, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.signal = int(flag) or None
        return self.signal is not None

    def exit(self, run_dir):
        """Say how to go on, with the command of the script that opened this run folder, and end."""
        if is_main_process():
            path = run_dir / "settings.json"
            script = read_json(path).get("script") if path.exists() else None
            go_on = command(script, "--resume", run_dir) if script else f"--resume {run_dir}"
            if script and dist.is_initialized():
                go_on = go_on.replace("python", f"torchrun --nproc-per-node {dist.get_world_size()}", 1)
            print(f"stopped; go on with: {go_on}", flush=True)
        raise SystemExit(128 + self.signal)

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()
