"""
The experiments about GRPO in their short forms: a shortcut is learned by one reward and not by the other, and the
comparison with trl runs.
"""

import pytest
import torch

from benchmarks import grpo, grpo_shortcut


@pytest.fixture
def two_threads():
    """Another order of summation is another run, and of so few steps one run learns sooner than another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_default_reward_looks_where_the_answer_alone_takes_the_shortcut(tmp_path, two_threads):
    found = grpo_shortcut.main(["--small", "--seeds", "96", "--arms", "answer", "default", "--out-dir", str(tmp_path)])[
        96
    ]
    answer, default = found["answer"], found["default"]
    assert answer["mark says it"]["value"] > 0.85 and answer["mark turned round"]["value"] < 0.4  # it follows the mark
    assert answer["flips"]["difference"]["low"] <= 0  # and no answer depends on the region
    assert default["flips"]["difference"]["low"] > 0
    assert default["mark turned round"]["value"] > answer["mark turned round"]["value"] + 0.2
    assert default["no mark"]["value"] > answer["no mark"]["value"] + 0.1
    assert (tmp_path / "shortcut.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parity
def test_the_comparison_with_trl_runs(tmp_path, capsys):
    pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")
    table = grpo.main(["--small", "--out-dir", str(tmp_path)])
    assert set(table) == set(grpo.ROWS) and all(
        row["tokens_per_rollout"] == 6 and row["seconds_per_step"] > 0 for row in table.values()
    )
    assert "as fast" in capsys.readouterr().out
