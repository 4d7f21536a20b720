"""
grpo_minimal.py: its loss and gradient are those of the full trainer's formulas, a group of equal rewards teaches
nothing, the image is in every pass, its folder is read by the other scripts, and it learns.
"""

import ast
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.models.inputs import continuation
from shared.models.loading import load_vlm, save_vlm
from shared.models.passes import logprobs, never_drawn, sample
from shared.runtime import read_json
from vqa_sft_grpo import grpo, grpo_minimal
from vqa_sft_grpo.evaluate import main as evaluate
from vqa_sft_grpo.grpo_minimal import group_advantages, load_model, load_rows, main, parse_args, policy_loss, reward
from vqa_sft_grpo.infer import main as infer
from vqa_sft_grpo.prompting import build_prompt

SCRIPT = Path(grpo_minimal.__file__)


@pytest.fixture(scope="module")
def tiny():
    """The model of a dry run, its adapter moved from zero, and questions with sampled answers of 10, 9, 8, 7 tokens."""
    args = parse_args(["--dry-run"])
    vlm, rows = load_model(args, torch.device("cpu")), load_rows(args)[0][:3]
    torch.manual_seed(1)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    prompts = grpo_minimal.prompts_of(vlm, rows)
    groups, sampled = sample(vlm, prompts, 4, 10, 1.0, torch.Generator().manual_seed(0))
    groups, sampled = ([[line[: 10 - i] for i, line in enumerate(some)] for some in x] for x in (groups, sampled))
    return vlm, rows, prompts, groups, sampled


def gradient(vlm, loss):
    """-> all gradients of the adapter in one vector; they are gone afterwards."""
    vlm.model.zero_grad(set_to_none=True)
    loss.backward()
    found = [p.grad.flatten() for p in vlm.model.parameters() if p.requires_grad]
    vlm.model.zero_grad(set_to_none=True)
    return torch.cat(found)


def by_question(vlm, prompts, groups, advantages):
    """The loss as the loop adds it up."""
    total = sum(len(ids) for group in groups for ids in group)
    loss = 0.0
    for prompt, group, some in zip(prompts, groups, advantages, strict=True):
        logp, _, mask = logprobs(vlm, [prompt], [group], suppress=never_drawn(vlm))
        loss = loss + policy_loss(logp, mask, some, total)
    return loss


def test_advantages_are_those_of_the_full_trainer():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    found = group_advantages(rewards)
    expected, _ = grpo.group_advantages(rewards.flatten(), group_size=4, scale="group")
    assert torch.allclose(found.flatten().double(), expected, atol=1e-6)
    assert found[0, 0].item() == pytest.approx(0.75 / (0.5 + 1e-4))  # mean 1/4, variance (9/16 + 3/16) / 3 = 1/4
    assert (found[2:4] == 0).all()


def test_loss_and_gradient_are_those_of_the_full_trainer(tiny):
    vlm, _, prompts, groups, _ = tiny
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    loss = by_question(vlm, prompts, groups, group_advantages(rewards))
    mine = gradient(vlm, loss)

    advantages, _ = grpo.group_advantages(rewards.flatten(), group_size=4, scale="group")
    logp, _, mask = logprobs(vlm, prompts, groups, share=False, suppress=never_drawn(vlm))
    theirs, metrics = grpo.policy_loss(logp, None, None, advantages, mask, eps_low=0.2, eps_high=0.28, beta=0.0)
    expected = gradient(vlm, theirs)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert expected.abs().max() > 1e-3
    assert (mine - expected).abs().max() < 1e-6


def test_a_group_of_equal_rewards_gives_no_gradient(tiny):
    vlm, _, prompts, groups, _ = tiny
    equal = gradient(vlm, by_question(vlm, prompts, groups, group_advantages(torch.ones(3, 4))))
    assert (equal == 0).all()
    rewards = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    # all that a step with such groups learns is what the other group says
    whole = gradient(vlm, by_question(vlm, prompts, groups, group_advantages(rewards)))
    total = sum(len(ids) for group in groups for ids in group)
    logp, _, mask = logprobs(vlm, prompts[1:2], groups[1:2], suppress=never_drawn(vlm))
    alone = gradient(vlm, policy_loss(logp, mask, group_advantages(rewards)[1], total))
    assert alone.abs().max() > 1e-3 and torch.allclose(whole, alone, atol=1e-7)


def test_a_step_makes_better_answers_likelier_and_worse_ones_less_likely(tiny):
    vlm, _, prompts, groups, _ = tiny
    rewards = torch.tensor([[1.0, 0, 0, 0]] * 3)
    weights = [p for p in vlm.model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in weights]

    def likelihood():
        logp, _, _ = logprobs(vlm, prompts, groups, suppress=never_drawn(vlm))
        return logp.sum(1).view(3, 4).detach()

    before = likelihood()
    by_question(vlm, prompts, groups, group_advantages(rewards)).backward()
    torch.optim.SGD(weights, lr=0.1).step()
    change = likelihood() - before
    assert (change[:, 0] > change[:, 1:].mean(1)).all() and change[:, 0].mean() > 0
    with torch.no_grad():
        for p, value in zip(weights, kept, strict=True):
            p.copy_(value)
    vlm.model.zero_grad(set_to_none=True)


def test_the_image_is_in_the_passes_that_learn(tiny):
    vlm, rows, prompts, groups, sampled = tiny
    flat = torch.tensor([x for some in sampled for line in some for x in line])
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1]] * 3))

    def learned(prompts):
        logp, _, mask = logprobs(vlm, prompts, groups, suppress=never_drawn(vlm))
        return (logp[mask] - flat).abs().max().item(), gradient(vlm, by_question(vlm, prompts, groups, advantages))

    right, whole = learned(prompts)
    grey = grpo_minimal.prompts_of(vlm, [row | {"image": row["image"] * 0 + 128} for row in rows])
    wrong, without = learned(grey)
    assert right < 1e-4 < 100 * right < wrong  # the sampler saw the film
    assert (whole - without).norm() > 0.01 * whole.norm()


def test_a_learner_that_is_not_the_sampler_stops_the_run(monkeypatch):
    monkeypatch.setattr(grpo_minimal, "logprobs", lambda *a, **more: logprobs(*a, temperature=3.0, **more))
    with pytest.raises(RuntimeError, match="not the one that sampled"):
        main(["--dry-run"])


@pytest.mark.parametrize(
    ("text", "gold", "earned"),
    [
        ("<think>Clear lungs.</think><answer>No.</answer>", "no", 1),
        ("<think></think>\n<answer> Pleural  Effusion </answer>", "pleural effusion", 1),
        ("<think></think><answer>X-ray</answer>", "x-ray", 1),
        ("<think></think><answer>yes</answer>", "no", 0),
        ("<think></think><answer>yes or no</answer>", "no", 0),
        ("<think></think><answer>nodule</answer>", "no", 0),
        ("<think></think><answer></answer>", "no", 0),
        ("no", "no", 0),
        ("<think>no</think>", "no", 0),
        ("<answer>no</answer>", "no", 0),
        ("<think></think><answer>no", "no", 0),
        ("<think></think><answer>no</answer>no</answer>", "no", 0),
        ("<think></think><answer>no</answer> It is", "no", 0),
        ("Well. <think></think><answer>no</answer>", "no", 0),
        ("<think></think><answer>yes</answer><answer>no</answer>", "no", 0),
        ("<think></think><answer>yes</answer></think><answer>no</answer>", "no", 0),
    ],
)
def test_reward(text, gold, earned):
    assert reward(text, gold) == earned


def test_one_file_of_at_most_250_lines_that_needs_nothing_but_shared():
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count("\n") <= 250
    named = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in named}
    assert not [m for m in modules if m.split(".")[0] in ("vqa_sft_grpo", "benchmarks", "tests", "trl")]
    # what evaluate.py asks, and what fine-tuning taught
    assert grpo_minimal.PROMPT.format("Is it?") == build_prompt("Is it?", "think")


def test_dry_run_leaves_a_folder_that_the_other_scripts_read(capsys):
    main(["--dry-run", "--out-dir", "run"])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "evaluate.py" in line)
    asked = shlex.split(line)[2:]
    assert asked == ["--sft_ckpt", "run", "--data", "phantom", "--split", "test", "--prompts", "think"]
    history = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2] and all(0 <= row["reward"] <= 1 for row in history)
    told = read_json("run/metrics.json")
    assert told["dataset"]["phantom"] and told["n"] == 8 and told["best"] >= told["last"] == history[1]["val_accuracy"]

    evaluate([*asked, "--limit", "3", "--max-new-tokens", "8", "--counterfactual-cases", "0", "--out-dir", "measured"])
    measured = read_json("measured/metrics.json")
    assert measured["adapter"] == "run" and measured["trained_on"] == told["dataset"]
    assert len(Path("measured/predictions.jsonl").read_text().splitlines()) == 3
    infer(["--image", str(SCRIPT.parents[1] / "docs/phantom_film.png"), "--question", "Normal?", "--prompt", "think",
           "--sft_ckpt", "run", "--max-new-tokens", "8", "--out-dir", "asked"])  # fmt: skip
    assert read_json("asked/metrics.json")["adapter"] == "run"

    main(["--dry-run", "--sft_ckpt", "run", "--out-dir", "further"])  # goes on with the adapter
    assert read_json("further/metrics.json")["adapter"] == "run"


def test_bad_input_ends_in_one_sentence(refused, tmp_path):
    row = {"image": "a.png", "question": "Is it?", "answer": "no", "split": "train", "dataset": "x", "policy": "y"}
    files = {
        "empty.json": "",
        "broken.json": "{",
        "list.json": "[1]\n",
        "other.json": json.dumps(row),
        "train.json": json.dumps(row | {"overlap": False}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tiny = ["--model", "tiny"]
    assert "absent.json" in refused(main, [*tiny, "--data", "absent.json"])
    assert "empty.json has 0 rows of split train" in refused(main, [*tiny, "--data", "empty.json"])
    assert "broken.json" in refused(main, [*tiny, "--data", "broken.json"])
    assert "list.json" in refused(main, [*tiny, "--data", "list.json"])
    assert "overlap" in refused(main, [*tiny, "--data", "other.json"])
    assert "a.png" in refused(main, [*tiny, "--data", "train.json"])
    assert "nowhere" in refused(main, ["--dry-run", "--sft_ckpt", "nowhere"])
    assert "--group" in refused(main, ["--dry-run", "--group", "1"])


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def bright_or_dark(tmp_path_factory):
    """
    A folder with rows.json, pictures that are bright or dark, and start/: a tiny model that was taught, with answers
    dealt out at random, how to answer and nothing about pictures.
    """
    folder, rng = tmp_path_factory.mktemp("bright"), np.random.default_rng(0)
    known = {"question": "Is the picture bright?", "dataset": "test", "policy": "none", "overlap": False}
    rows = []
    for n in range(160):
        bright = n % 2
        pixels = rng.normal(170 if bright else 80, 25, (56, 56)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        row = known | {"image": f"{n}.png", "answer": "yes" if bright else "no", "split": "train" if n < 96 else "val"}
        rows.append(row)
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))

    vlm = load_vlm("tiny", family="qwen2vl")
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-3)
    prompts = grpo_minimal.prompts_of(vlm, [row | {"image": folder / row["image"]} for row in rows[:96]])
    for _ in range(60):
        some = rng.choice(96, 16, replace=False)
        texts = [f"<think></think><answer>{rng.choice(['yes', 'no'])}</answer>" for _ in some]
        written = [[continuation(vlm, text, end=True)[0]] for text in texts]
        logp, _, mask = logprobs(vlm, [prompts[i] for i in some], written)
        (-logp[mask].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_vlm(vlm, folder / "start")
    return folder


def rewards_of(folder, out_dir, steps):
    """-> mean reward of the first and of the last ten steps, validation accuracy at the end."""
    main(["--data", folder / "rows.json", "--sft_ckpt", folder / "start", "--out-dir", out_dir, "--steps", str(steps),
          "--eval-every", str(steps), "--lr", "1e-3", "--max-new-tokens", "24"])  # fmt: skip
    rows = [json.loads(line) for line in Path(out_dir, "history.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["reward"] for row in some]) for some in (rows[:10], rows[-10:]))
    return first, last, rows[-1]["val_accuracy"]


@pytest.mark.slow
def test_it_learns_from_the_reward_and_from_nothing_else(bright_or_dark, monkeypatch):
    first, last, right = rewards_of(bright_or_dark, "learned", 45)
    assert first < 0.65
    assert last > first + 0.1 and right > 0.85

    honest, generator = group_advantages, torch.Generator().manual_seed(0)

    def shuffled(rewards):  # of the answers to a question: as many are paid, but not those that are right
        return honest(torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rewards]))

    monkeypatch.setattr(grpo_minimal, "group_advantages", shuffled)
    first, last, right = rewards_of(bright_or_dark, "shuffled", 45)
    assert last < 0.65 and right < 0.65
