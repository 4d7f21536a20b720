"""
The experiments about GRPO in their short forms: the shortcut experiment runs with an untrained model in place of the
weak one, the ladder climbs without learning, and the comparison with trl runs.
"""

import json

import numpy as np
import pytest
import torch

from benchmarks import grpo, grpo_ladder, grpo_shortcut
from shared.data.images import read_pixels
from shared.models.loading import load_vlm
from vqa_sft_grpo import grpo_minimal, train_sft
from vqa_sft_grpo.prompting import build_target


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("shortcut"))
    return grpo_shortcut.parse_args(["--films", "60", "--test-films", "10", "--steps", "2", "--out-dir", folder])


@pytest.fixture(scope="module")
def rows(args):
    return grpo_shortcut.film_rows("train", 60, 3, args)


def test_marks_say_what_they_are_told_to(args, rows):
    """Black between the lungs exactly where the answer is yes, or never."""
    x0, y0, x1, y1 = grpo_shortcut.MARK
    assert {r["answer"] for r in rows} == {"yes", "no"} and all("caption" in json.loads(r["output"]) for r in rows)
    for agreement in (1.0, 0.0):
        for row in grpo_shortcut.marked(rows, agreement, 5, args.out_dir):
            black = not read_pixels(row["image"])[y0:y1, x0:x1].any()
            assert black == ((row["answer"] == "yes") == bool(agreement))


def test_edited_films_have_their_right_answers(args, rows):
    settings = grpo_shortcut.train_grpo.parse_args([])
    ill = [r for r in rows if r["answer"] == "yes"][:4]
    images = [read_pixels(r["image"]) for r in ill]
    more, films = grpo_shortcut.with_edits(ill, images, range(4), settings)
    assert len(more) == len(films) > 8 and more[:4] == ill
    for row, film in zip(more[4:], films[4:], strict=True):
        n = next(i for i, r in enumerate(ill) if r["image"] == row["image"])
        (x0, y0, x1, y1), changed = map(round, ill[n]["region"][0]), np.argwhere(film != images[n])
        inside = ((changed >= (y0 - 1, x0 - 1)) & (changed <= (y1 + 1, x1 + 1))).all(1).mean()
        assert json.loads(build_target(row))["answer"] == ("no" if inside > 0.4 else "yes"), inside


@pytest.mark.slow
def test_the_shortcut_experiment_measures_the_adapter_in_the_run_folder(args, tmp_path, monkeypatch):
    """All five arms with an untrained model; the figures mean nothing, but each arm's adapter is its own."""
    seen, real = [], grpo_shortcut.load_model
    monkeypatch.setattr(grpo_shortcut, "load_model", lambda a, device: seen.append(a.adapter) or real(a, device))

    def untrained(args, folder, seed):
        train_sft.save_model(load_vlm("tiny:qwen2vl"), folder / "sft", {"name": "phantom"})
        return folder / "sft", {}

    monkeypatch.setattr(grpo_shortcut, "fine_tune_weakly", untrained)
    found = grpo_shortcut.main(["--films", "40", "--test-films", "8", "--steps", "1", "--seeds", "5",
                                "--lr", "0.01", "--out-dir", str(tmp_path)])  # fmt: skip
    assert list(found[5]) == ["before", *grpo_shortcut.ARMS] and len(set(seen)) == 6
    for numbers in found[5].values():
        assert all(0 <= numbers[name]["value"] <= 1 for name in ("mark says it", "no mark", "redrawn"))
        assert numbers["gap"]["not_measured"] + numbers["gap"]["n"] > 0
    for arm in grpo_shortcut.ARMS:
        assert (tmp_path / f"{arm.replace(chr(32), chr(95))}_5" / "adapter_config.json").is_file()
    assert (tmp_path / "shortcut.png").stat().st_size > 2_000


@pytest.mark.slow
@pytest.mark.parity
def test_the_comparison_with_trl_runs(tmp_path, capsys):
    pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")
    rows = ["ours", "trl"]
    table = grpo.main(["--small", "--rows", *rows, "--out-dir", str(tmp_path)])
    assert set(table) == set(rows) and all(
        row["tokens_per_rollout"] == 6 and row["seconds_per_step"] > 0 for row in table.values()
    )
    assert "as fast" in capsys.readouterr().out


def test_rungs_of_grpo_minimal_differ_in_what_they_say():
    behind = "<think></think><answer>yes</answer>no</answer>"
    assert grpo_ladder.paid_anywhere(behind, "yes") == 1 and grpo_minimal.reward(behind, "yes") == 0
    assert grpo_ladder.paid_anywhere("yes", "yes") == grpo_ladder.paid_anywhere("<answer>no</answer>", "yes") == 0
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]).repeat(50, 1)
    dealt, real = grpo_ladder.dealt_out(rewards), grpo_minimal.group_advantages(rewards)
    assert torch.equal(dealt.sort(1).values, real.sort(1).values)
    assert 0 < (dealt[:, 0] == real[:, 0]).float().mean() < 0.5  # an eighth by chance


@pytest.mark.slow
def test_the_ladder_in_short(tmp_path):
    before = grpo_minimal.reward, grpo_minimal.group_advantages
    rungs = ["minimal", "dealt out", "V"]
    found = grpo_ladder.main(["--small", "--seeds", "5", "--rungs", *rungs, "--out-dir", str(tmp_path)])
    assert list(found[5]) == ["start", *rungs] and (grpo_minimal.reward, grpo_minimal.group_advantages) == before
    for numbers in found[5].values():
        assert all(0 <= numbers[name]["value"] <= 1 for name in ("right", "P", "form"))
    assert found[5]["start"]["gain"]["P"]["value"] == 0
