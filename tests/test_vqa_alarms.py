"""alarms.py: each rule rings on the run it is for, and a healthy run is silent."""

import pytest

from vqa_sft_grpo.alarms import WINDOW, alarms

HEALTHY = {
    "truncated": 0.05,
    "frac_reward_zero_std": 0.4,
    "entropy": 0.5,
    "most_frequent_answer": 0.5,
    "most_frequent_gold": 0.5,
    "length": 40.0,
    "gate": 0.98,
    "reward_std": 0.5,
    "clip_region": 0.01,
    "kl": 0.02,
    "lr": 1e-5,
    "gap": 0.3,
    "correct": 0.6,
    "v_clipped": 0.1,
    "contradiction": 0.02,
    "skipped": 0,
}

LAST = {  # rule: what the last steps are like
    "truncated": {"truncated": 0.7},
    "zero_variance": {"frac_reward_zero_std": 0.9},
    "entropy": {"entropy": 0.01},
    "one_answer": {"most_frequent_answer": 0.95},
    "length_collapse": {"length": 10.0},
    "length_growth": {"length": 100.0},
    "unreadable": {"gate": 0.7},
    "reward_variance": {"reward_std": 0.01},
    "clipping": {"clip_region": 0.4},
    "kl": {"kl": 0.5},
    "not_moving": {"kl": 1e-6},
    "not_looking": {"gap": 0.05, "correct": 0.8},
    "v_at_clip": {"v_clipped": 0.9},
    "contradictions": {"contradiction": 0.3},
    "skipped": {"skipped": 1},
}


def run_of(last):
    return [dict(HEALTHY)] * (2 * WINDOW) + [HEALTHY | last] * WINDOW


@pytest.mark.parametrize("name", LAST)
def test_a_rule_rings_on_its_run_alone(name):
    found = alarms(run_of(LAST[name]))
    assert set(found) == {name} and len(found[name]) > 30
    assert not alarms(run_of(LAST[name])[: 2 * WINDOW])


def test_silence():
    assert alarms(run_of({})) == {} and alarms([]) == {}
    assert alarms(run_of({"entropy": 0.01})[-WINDOW + 1 :]) == {}  # too few steps to say
    assert alarms(run_of({"gap": 0.05})) == {}  # accuracy did not rise
    assert alarms(run_of({"correct": 0.9, "gap": 0.6})) == {}
    assert alarms(run_of({"most_frequent_answer": 0.9, "most_frequent_gold": 0.85})) == {}  # so are the gold answers


def test_a_policy_that_does_not_move_is_named_after_the_warm_up():
    rows = [HEALTHY | {"kl": 1e-8, "lr": 1e-6 * min(1.0, step / 50)} for step in range(1, 120)]
    assert alarms(rows[:60]) == {}  # the learning rate still rose in the last 20 steps
    assert set(alarms(rows[:71])) == {"not_moving"}
    assert "does not move" in alarms(rows)["not_moving"] and "--lr" in alarms(rows)["not_moving"]
    assert alarms([row | {"kl": None} for row in rows]) == {}  # without a reference nothing is known


def test_numbers_that_are_undefined_ring_nothing():
    assert alarms([dict.fromkeys(HEALTHY)] * (3 * WINDOW)) == {}
    assert alarms([{"step": 0, "val_accuracy": 0.5}] + run_of({})) == {}
