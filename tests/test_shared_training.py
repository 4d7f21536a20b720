"""training.py: the learning rate, steps that are left out, states that come back, refusals, signals."""

import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared.runtime import InputError, load_checkpoint, save_checkpoint, write_json
from shared.training import GuardedStep, StopSignal, Weights, learning_rate, load_state, refuse_other_settings
from shared.training import save_state, settings_of


def test_learning_rate():
    assert [learning_rate(step, 12, 4, 0.8) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert learning_rate(8, 12, 4, 0.8) == pytest.approx(0.4)  # half of the cosine: half of the rate
    assert learning_rate(6, 12, 4, 0.8) == pytest.approx(0.8 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(12, 12, 4, 0.8) == pytest.approx(0)
    assert learning_rate(0, 10, 0, 0.8) == pytest.approx(0.8) and learning_rate(0, 1, 1, 0.8) == pytest.approx(0.8)


def test_settings_that_differ_are_named():
    then = {"lr": 0.1, "batch_size": 8, "epochs": 3, "gone": True}
    refuse_other_settings({"lr": 0.1, "batch_size": 8, "epochs": 5}, then, "last.pt", may_differ=("epochs",))
    with pytest.raises(
        InputError,
        match=(
            r"^last.pt was written with --batch-size 8 \(now 16\), --new None \(now 1\); give the same to resume, or"
            r" start a new run$"
        ),
    ):
        refuse_other_settings(
            {"lr": 0.1, "batch_size": 16, "epochs": 5, "new": 1}, then, "last.pt", may_differ=("epochs",)
        )
    with pytest.raises(InputError, match=r"--epochs 3 \(now 5\)"):
        refuse_other_settings({"epochs": 5}, then, "last.pt")


def test_settings_of_leaves_out_what_shapes_no_result():
    args = SimpleNamespace(
        lr=0.1, out_dir="x", resume=True, overwrite=False, device="cpu", data_dir="d", config=None, a=1
    )
    assert settings_of(args, aside=("a",)) == {"lr": 0.1}


# --- steps that are not finite ---


def guarded(most=3, grad_clip=None, lr=0.5):
    """w = 2 with the loss w^2 / 2, whose gradient is w."""
    w = torch.nn.Parameter(torch.tensor(2.0))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return w, GuardedStep(torch.optim.SGD([w], lr=lr), scaler, [w], grad_clip, most)


def one_step(w, guard, factor=1.0, lr=None):
    loss = w**2 / 2 * factor
    loss.backward()
    return guard.step(loss.item(), lr)


def test_a_step_is_taken_and_its_norm_kept():
    w, guard = guarded()
    assert one_step(w, guard) and w.item() == 1.0 and guard.norm == 2.0 and w.grad is None
    assert one_step(w, guard, lr=0.25) and w.item() == 0.75 and guard.optimizer.param_groups[0]["lr"] == 0.25
    assert guard.skipped == 0


def test_the_gradient_is_clipped_to_its_norm():
    w, guard = guarded(grad_clip=0.5)
    one_step(w, guard)
    assert guard.norm == 2.0 and w.item() == pytest.approx(2 - 0.5 * 0.5, abs=1e-5)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing_and_many_in_a_row_end_the_run(factor):
    w, guard = guarded(most=3)
    assert not one_step(w, guard, factor) and not one_step(w, guard, factor)
    assert w.item() == 2.0 and guard.skipped == guard.in_a_row == 2 and w.grad is None
    assert one_step(w, guard) and guard.in_a_row == 0 and guard.skipped == 2  # a good one starts the count anew
    for _ in range(2):
        one_step(w, guard, factor)
    with pytest.raises(InputError, match="not finite in 3 steps in a row: lower --lr, or use --dtype float32"):
        one_step(w, guard, factor)
    assert w.item() == 1.0


def test_a_finite_loss_with_an_infinite_gradient_is_left_out_too():
    w, guard = guarded()
    w.grad = torch.tensor(math.inf)
    assert not guard.step(1.0) and w.item() == 2.0 and guard.skipped == 1


# --- states ---


def parts(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_a_state_comes_back_as_it_was():
    one, other = parts(0), parts(1)
    save_state("last.pt", one, {"lr": 0.1}, {"sha256": "a"}, step=3, history=[{"loss": None}])
    assert load_state("last.pt", other, {"lr": 0.1}, {"sha256": "a"}) == {"step": 3, "history": [{"loss": None}]}
    assert torch.equal(one["model"].weight, other["model"].weight)
    momenta = [p["optimizer"].state_dict()["state"][0]["momentum_buffer"] for p in (one, other)]
    assert torch.equal(*momenta)


def test_states_of_other_runs_are_refused():
    save_state("last.pt", parts(), {"lr": 0.1}, "data", step=3)
    with pytest.raises(InputError, match=r"--lr 0.1 \(now 0.2\); give the same to resume"):
        load_state("last.pt", parts(), {"lr": 0.2}, "data")
    assert load_state("last.pt", parts(), {"lr": 0.2}, "data", may_differ=("lr",)) == {"step": 3}
    with pytest.raises(InputError, match="was trained on other data"):
        load_state("last.pt", parts(), {"lr": 0.1}, "others")
    for change in ({"model": torch.nn.Linear(3, 5)}, {"another": torch.nn.Linear(3, 2)}):
        with pytest.raises(InputError, match="holds the weights of another model"):
            load_state("last.pt", parts() | change, {"lr": 0.1}, "data")
    state = load_checkpoint("last.pt")
    for key, value in (("settings", {"lr": 0.2}), ("data", "others"), ("values", {"step": [3]}), ("values", None)):
        save_checkpoint("changed.pt", state | {key: value})
        with pytest.raises(InputError, match="changed.pt was changed after it was written, or is damaged"):
            load_state("changed.pt", parts(), {"lr": 0.2}, "others")
    save_checkpoint("other.pt", {"model": {}})
    with pytest.raises(InputError, match="is not a training state of this script: it lacks parts"):
        load_state("other.pt", parts(), {}, "data")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(values=[]),
        lambda state: state.update(parts={"model": 5, "optimizer": 5}),
        lambda state: state["parts"].update(optimizer={"state": {}, "param_groups": None}),
        lambda state: state["parts"]["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(7)),
        lambda state: state["parts"]["model"].update(weight=torch.zeros(7)),
        lambda state: state["parts"]["model"].pop("bias"),
    ],
)
def test_states_with_something_else_inside_are_refused(change):
    save_state("last.pt", parts(), {}, "data", step=3)
    state = load_checkpoint("last.pt")
    change(state)
    save_checkpoint("last.pt", state)
    with pytest.raises(InputError, match="last.pt"):
        load_state("last.pt", parts(), {}, "data")


def test_one_process_writes_the_state(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    save_state("last.pt", parts(), {}, "data")
    assert not Path("last.pt").exists()


def test_weights_hold_what_is_trained_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    weights = Weights(model)
    assert set(weights.state_dict()) == {"1.weight", "1.bias"}
    changed = {name: value + 1 for name, value in weights.state_dict().items()}
    weights.load_state_dict(changed)
    assert torch.equal(model[1].weight, changed["1.weight"]) and torch.equal(model[1].bias, changed["1.bias"])
    for wrong in ({}, changed | {"0.weight": torch.zeros(2, 2)}, changed | {"1.bias": torch.zeros(3)}):
        with pytest.raises(ValueError):
            weights.load_state_dict(wrong)
    save_state("last.pt", {"weights": weights}, {}, "data")
    assert set(load_checkpoint("last.pt")["parts"]["weights"]) == set(weights)


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number, capsys):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested() and stop.requested()
        with pytest.raises(SystemExit) as end:
            stop.exit(Path("run"))
        assert end.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"{signal.Signals(number).name}: saving after this step" in capsys.readouterr().err


def test_the_command_to_go_on_is_whole(capsys):
    write_json("run/settings.json", {"script": "task1_classification/train.py"})
    with StopSignal() as stop, pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
        stop.exit(Path("run"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("stopped; go on with: python ")
    assert line.endswith("task1_classification/train.py --resume run")


def test_the_second_signal_ends_at_once():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *a: seen.append("usual"))
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert seen == [] and stop.requested()
            signal.raise_signal(signal.SIGTERM)
            assert seen == ["usual"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_come_back_after_a_failure_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignal():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) is before
