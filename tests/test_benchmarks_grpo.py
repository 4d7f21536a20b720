"""benchmarks/grpo.py in its short form."""
import pytest

from benchmarks import grpo


@pytest.mark.slow
@pytest.mark.parity
def test_the_comparison_with_trl_runs(tmp_path, capsys):
    pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")
    table = grpo.main(["--small", "--out-dir", str(tmp_path)])
    assert set(table) == set(grpo.ROWS) and all(row["tokens_per_rollout"] == 6 and row["seconds_per_step"] > 0 for row in table.values())
    assert "as fast" in capsys.readouterr().out
