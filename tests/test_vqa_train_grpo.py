"""
train_grpo.py: gradients are those of the formulas however a step is cut, the reference is the model as it was given,
and a killed run goes on as if nothing had happened.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.models.loading import add_lora, load_vlm
from shared.models.passes import PartSize, logprobs, make_prompts, never_drawn
from shared.runtime import InputError
from shared.training import Weights
from vqa_sft_grpo import rollouts
from vqa_sft_grpo.asking import model_of
from vqa_sft_grpo.prepare_data import main as prepare
from vqa_sft_grpo.prompting import build_prompt
from vqa_sft_grpo.looking import EditPlan, Statement, images_of_v, plan_edits
from vqa_sft_grpo.rewards import AnswerFrequencies, RewardSettings, compose
from vqa_sft_grpo.rewards import rollout_terms, slope
from vqa_sft_grpo.rollouts import Batch, Policy, as_reference, image_of, row_at, score_statements
from vqa_sft_grpo.train_grpo import load_policy, load_rows, main, parse_args, rank_of

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    prepare(
        [
            "--data",
            "phantom",
            "--studies",
            "10",
            "--image-size",
            "56",
            "--output",
            str(folder / "train.json"),
            "--grpo-output",
            str(folder / "grpo.jsonl"),
        ]
    )
    return folder / "grpo.jsonl"


def options(rows_file, *more):
    return [
        "--model",
        "tiny",
        "--data-jsonl",
        str(rows_file),
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--num-generations",
        "3",
        "--max-new-tokens",
        "10",
        "--cf-regions",
        "2",
        "--eval-rows",
        "4",
        *map(str, more),
    ]


WRITTEN = [
    '{"answer": "yes"}',
    '{"answer": "no"}',
    '{"answer": "yes", "boxes": [[100, 100, 700, 900]]}',
    '{"caption": "a film", "answer": "no"}',
    "nothing to read",
]


@pytest.fixture(scope="module")
def step(rows_file):
    """
    A policy that is not its reference any more, and a batch whose rollouts are readable answers: what an untrained
    model never writes.
    """
    args = parse_args(options(rows_file, "--scale-rewards", "group", "--beta", "0.1", "--cf-gradient", "1"))
    rows, _, _ = load_rows(args)
    torch.manual_seed(1)
    vlm = load_policy(args, CPU)
    with torch.no_grad():
        for p in Weights(vlm.model).values():
            p.add_(0.05 * torch.randn_like(p))
    policy = Policy(vlm, args, RewardSettings(max_tokens=args.max_new_tokens), AnswerFrequencies(rows))
    policy.size = PartSize(5)

    def has_room(r):
        return plan_edits(r, image_of(r), 2, "mixed", [args.seed, 3]).images

    of_no = next(r for r in rows if r["gold"] == "no" and has_room(r))  # with room for random regions
    chosen = [r for r in rows if r["region"] and r["gold"] == "yes"][:3] + [of_no]

    def scripted(vlm, prompts, n, *rest):
        end = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
        first = 4 - len(prompts) if len(prompts) < 4 else 0
        groups = [
            [vlm.tokenizer(WRITTEN[(i + j) % 5])["input_ids"] + [end] * (j != 1) for j in range(n)]
            for i in range(first, first + len(prompts))
        ]
        logp, _, mask = logprobs(vlm, prompts, groups, True, args.temperature, never_drawn(vlm))
        lines = [line[m].tolist() for line, m in zip(logp, mask, strict=True)]
        return groups, [lines[i : i + n] for i in range(0, len(lines), n)]

    patch = pytest.MonkeyPatch()
    patch.setattr(rollouts, "sample", torch.no_grad()(scripted))
    policy.size, policy.sampling = PartSize(12), PartSize(12)
    batch = policy.roll_out(chosen, list(range(4)), torch.Generator())
    patch.undo()
    return policy, batch


def with_options(policy, *more, size=12):
    """The same policy under other options."""
    args = parse_args(["--num-generations", "3", "--max-new-tokens", "10", *more])
    other = Policy(policy.vlm, args, policy.settings, policy.frequencies)
    other.size = PartSize(size)
    return other


def gradient(vlm, work):
    vlm.model.zero_grad(set_to_none=True)
    result = work()
    found = {n: p.grad.clone() for n, p in Weights(vlm.model).items() if p.grad is not None}
    vlm.model.zero_grad(set_to_none=True)
    return result, found


def assert_same(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and max(g.abs().max() for g in a.values()) > 100 * tolerance
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=tolerance, msg=name)


# --- one step ---


def test_rollouts_are_scored_on_what_the_policy_wrote(step):
    policy, batch = step
    assert len(batch.terms) == len(batch.texts) == 12 and batch.texts[0] == WRITTEN[0]
    by_text = {(n // 3, text): terms for n, (text, terms) in enumerate(zip(batch.texts, batch.terms, strict=True))}
    assert by_text[0, WRITTEN[0]]["correct"] and by_text[0, WRITTEN[0]]["counterfactual"] is not None
    # a gold no: random regions alone
    assert any(t["counterfactual"] is not None and t["d_roi"] is None for t in batch.terms[9:])
    vlm, ids = policy.vlm, batch.flat[5]  # d_roi of the log, from scratch: the answer after the rollout's own caption
    assert batch.texts[5] == '{"caption": "a film", "answer": "no"}'
    before = len(vlm.tokenizer('{"caption": "a film", "answer": "')["input_ids"])
    assert vlm.tokenizer.decode(ids[before - 1 : before + 1]).endswith("no")
    prompt, found = build_prompt(batch.rows[1]["question"], "json"), []
    for image in batch.plans[1].images[:2]:
        with torch.no_grad():
            logp = logprobs(vlm, make_prompts(vlm, [prompt], [image]), [[ids]], False, suppress=never_drawn(vlm))[0][0]
        found.append(sum(x.item() for x, said in zip(logp, batch.statements[5].said, strict=True) if said))
    assert sum(batch.statements[5].said) == 1 and batch.statements[5].said[before - 1 : before + 1].count(True) == 1
    assert by_text[1, batch.texts[5]]["d_roi"] == pytest.approx(found[0] - found[1], abs=1e-3)


def test_all_questions_of_a_step_are_sampled_together(step, monkeypatch):
    """However small the passes are: so that --micro-batch changes neither what is drawn nor how long drawing takes."""
    policy, batch = step
    asked, other, sampled = [], with_options(policy, "--micro-batch", "1", "--batch-size", "4"), rollouts.sample

    def watched(vlm, prompts, *rest):
        asked.append(len(prompts))
        return sampled(vlm, prompts, *rest)

    monkeypatch.setattr(rollouts, "sample", watched)
    other.roll_out(batch.rows, batch.places, torch.Generator().manual_seed(0))
    assert asked == [4]


def test_gradient_does_not_depend_on_how_a_step_is_cut(step):
    """
    One pass, five rollouts at a time (groups of three are cut in the middle), whole texts instead of shared prompts.
    """
    policy, batch = step
    advantages = torch.linspace(-1, 1, 12)
    with torch.no_grad():
        with as_reference(policy.vlm):
            ref = with_options(policy, size=4).fixed_logprobs(batch)
        old = [line + 0.1 for line in with_options(policy).fixed_logprobs(batch)]
    found = []
    for size, more in ((12, ()), (5, ()), (12, ("--checkpointing",))):
        other = with_options(policy, "--beta", "0.1", *more, size=size)
        found.append(
            gradient(policy.vlm, lambda other=other: other.loss_and_gradient(batch, advantages, old, ref, SCALER))
        )
    for (value, metrics), grads in found[1:]:
        assert value == pytest.approx(found[0][0][0], abs=1e-5)
        assert metrics["kl"] == pytest.approx(found[0][0][1]["kl"], abs=1e-5)
        assert metrics["tokens"] == sum(map(len, batch.flat))
        assert_same(found[0][1], grads)


def test_out_of_memory_changes_nothing_but_the_size_of_a_pass(step, monkeypatch):
    policy, batch = step
    advantages = torch.linspace(-1, 1, 12)

    def run():
        plain = with_options(policy, "--beta", "0")
        plain.loss_and_gradient(batch, advantages, None, None, SCALER)
        policy.size = plain.size
        policy.reward_gradient(batch, SCALER)
        return plain.size.now

    wanted = gradient(policy.vlm, run)
    real, calls = rollouts.score_statements, []

    def tight(vlm, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return real(vlm, prompts, *rest)

    policy_loss, losses = rollouts.policy_loss, []

    def tight_loss(logp, *rest, **options):
        losses.append(len(logp))
        if len(losses) == 2 or len(logp) > 6:
            raise torch.OutOfMemoryError("no room")
        return policy_loss(logp, *rest, **options)

    monkeypatch.setattr(rollouts, "policy_loss", tight_loss)
    found = gradient(policy.vlm, run)
    assert wanted[0] == 12 and found[0] == 3 and losses == [12, 6, 3, 3, 3, 3]
    assert_same(wanted[1], found[1])
    monkeypatch.undo()
    monkeypatch.setattr(rollouts, "score_statements", tight)
    found = gradient(policy.vlm, run)  # the policy's gradient is there before: it stays, the other part is done again
    assert calls[0] > calls[1]
    assert_same(wanted[1], found[1])


def test_reward_gradient_is_that_of_the_mean_reward_through_v(step):
    """
    By finite differences: the rollouts fixed, the weights moved along a direction, V and reward computed anew. Yes, yes
    at the limit, and no.
    """
    policy, batch = step
    vlm, settings = policy.vlm, policy.settings
    vlm.model.double()  # in float32 the differences would be mostly rounding
    vlm.dtype = torch.float64
    policy.size = PartSize(8)
    _, edited = policy.drops_of(batch.rows, batch.statements, batch.plans)
    terms = [dict(t) for t in batch.terms]
    limited = next(n for n, t in enumerate(terms) if slope(t, settings))
    # at its limit: the random region against the film as it is
    terms[limited] |= {"d_roi": 2.0, "d_rand_each": [0.7, 0.5], "counterfactual": 0.3}
    of_no = next(n for n, t in enumerate(terms) if t["correct"] and n // 3 == 3)
    terms[of_no] |= {"d_rand_each": [-0.1, 0.2], "counterfactual": -0.2}  # a gold no: the same
    batch = Batch(**batch.__dict__ | {"terms": terms, "edited": edited})
    counted = [n for n, t in enumerate(terms) if slope(t, settings)]
    assert len(counted) > 2 and batch.plans[3].images and not batch.plans[3].roi

    @torch.no_grad()
    def drops():
        """-> (without the region or None, [without random ones]) of each rollout that counts."""
        found = []
        for n in counted:
            images = edited[n // 3]
            logp, *others = score_statements(vlm, images, [[batch.statements[n]]] * len(images))[:, 0].tolist()
            found.append((None if n == of_no else logp - others[0], [logp - other for other in others[-2:]]))
        return found

    start = drops()

    def mean_reward():
        """The drops of the terms, and by how much they have changed."""
        total = 0.0
        for n, (roi, random), (roi_then, random_then) in zip(counted, drops(), start, strict=True):
            changes = zip(terms[n]["d_rand_each"], random, random_then, strict=True)
            d_rand = max(d + now - then for d, now, then in changes)
            best = 0.0 if n == of_no else min(1.0, terms[n]["d_roi"] + roi - roi_then)
            total += compose(terms[n] | {"counterfactual": best - d_rand}, settings)
        return total / sum(map(len, batch.flat))  # in the unit of the policy's loss

    policy.size = PartSize(7)
    _, grads = gradient(vlm, lambda: policy.reward_gradient(batch, SCALER))
    torch.manual_seed(0)
    direction = {n: torch.randn_like(p) for n, p in Weights(vlm.model).items()}
    h, values = 1e-5, []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for n, p in Weights(vlm.model).items():
                p.add_(sign * h * direction[n])
        if sign != 1 or not values:
            values.append(mean_reward())
    wanted = -(values[0] - values[1]) / (2 * h)
    got = sum((grads[n] * direction[n]).sum().item() for n in grads)
    assert abs(wanted) > 1e-4 and got == pytest.approx(wanted, rel=0.01)
    vlm.model.float()
    vlm.dtype = torch.float32


def lengthened(batch, tokens):
    """Every rollout with this many more tokens in front of its answer."""
    more = [(5,) * tokens + s.ids if s else None for s in batch.statements]
    statements = [
        s and Statement(ids, (False,) * tokens + s.said, s.explained)
        for s, ids in zip(batch.statements, more, strict=True)
    ]
    flat = [ids or (5,) * tokens + tuple(old) for ids, old in zip(more, batch.flat, strict=True)]
    groups = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    return Batch(**batch.__dict__ | {"statements": statements, "groups": groups})


def test_v_weighs_the_same_against_the_policy_at_any_length(step, monkeypatch):
    """
    How much the last token of a response weighs in each part of the loss: a model whose log-probabilities are one
    parameter there. More tokens in front of the answer change both weights alike, as a table of the results shows.
    """
    policy, batch = step
    advantages, table = torch.tensor([1.0, -0.5, -0.5]).repeat(4), {}

    for tokens in (0, 8, 30, 113):
        longer = lengthened(batch, tokens)
        weight = torch.nn.Parameter(torch.zeros(()))

        def logp(vlm, prompts, groups, *rest, weight=weight, **options):
            flat = [ids for group in groups for ids in group]
            mask = torch.arange(max(map(len, flat))) < torch.tensor([len(ids) for ids in flat])[:, None]
            last = torch.tensor([[n == len(ids) - 1 for n in range(mask.shape[1])] for ids in flat])
            return weight * last, torch.zeros(mask.shape), mask

        def statement(vlm, prompts, statements, share, weight=weight):  # one image of the two that V looks at
            sign = torch.tensor([1.0, 0.0]).repeat(len(prompts) // 2)
            return torch.stack([weight * sign, weight * sign], 1)

        monkeypatch.setattr(rollouts, "logprobs", logp)
        monkeypatch.setattr(rollouts, "score_statements", statement)
        with_options(policy, "--beta", "0").loss_and_gradient(longer, advantages.abs(), None, None, SCALER)
        of_policy, weight.grad = weight.grad.item(), None
        with_options(policy).reward_gradient(longer, SCALER)
        table[tokens] = weight.grad.item() / of_policy
    assert abs(table[0]) > 1e-3 and list(table.values()) == pytest.approx([table[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("composition", ["gated", "additive"])
def test_slope_is_the_derivative_of_the_reward_by_v(composition):
    settings = RewardSettings(composition, (0.2, 0.6, 0.2, 0.3))
    row = {"id": "1", "question": "Is there an effusion?", "gold": "yes", "answer_type": "closed"}

    def terms_at(d_roi, d_rand, answer="yes", gold="yes"):
        return rollout_terms(
            row | {"gold": gold}, json.dumps({"answer": answer}), settings, d_roi=d_roi, d_rand=[d_rand - 0.2, d_rand]
        )

    def derivative(a, b, d_roi, d_rand, gold="yes"):
        h = 1e-6
        return (
            terms_at(d_roi + h * a, d_rand + h * b, gold, gold)["reward"]
            - terms_at(d_roi - h * a, d_rand - h * b, gold, gold)["reward"]
        ) / (2 * h)

    taken, not_taken = EditPlan(roi=[[0, 0, 1, 1]], random=[0, 0]), EditPlan(random=[0, 0])
    for d_roi, d_rand in ((0.5, 0.1), (0.1, 0.5), (0.3, -0.2), (4.0, 0.3), (4.0, 1.7)):
        terms = terms_at(d_roi, d_rand)
        by_roi, by_rand = derivative(1, 0, d_roi, d_rand), derivative(0, 1, d_roi, d_rand)
        assert slope(terms, settings) == pytest.approx(-by_rand, abs=1e-6) and by_rand < -0.05
        assert by_roi == pytest.approx(
            -by_rand if d_roi < 1 else 0, abs=1e-6
        )  # a drop of 4 nats does not hide the random one's
        assert images_of_v(terms, taken) == (1 if d_roi < 1 else 0, 3)
    assert images_of_v(terms | {"d_rand_each": [0.4, 0.3]}, taken) == (0, 2)
    by_rand = derivative(0, 1, 0.5, 0.3, "no")
    assert (
        derivative(1, 0, 0.5, 0.3, "no") == 0 and by_rand < -0.05
    )  # of a gold no: only the random regions, against the film as it is
    of_no = terms_at(0.5, 0.3, "no", "no")
    assert slope(of_no, settings) == pytest.approx(-by_rand, abs=1e-6) and images_of_v(of_no, not_taken) == (0, 2)
    assert (
        slope(terms_at(-0.5, 0.6), settings) > 0.05 and terms_at(-0.5, 0.6)["counterfactual"] == -1
    )  # where it is needed most
    for none in (
        terms_at(None, 0.1),
        terms_at(1.0, -0.1),
        terms_at(0.5, 0.1, "no"),
        terms_at(0.5, -0.1, "no", "no"),
        terms_at(0.5, 0.3, "yes", "no"),
    ):
        assert slope(none, settings) == 0
    assert slope(terms_at(0.5, 0.1) | {"gate": 0.0}, RewardSettings()) == 0
    assert slope(terms_at(0.5, 0.1) | {"answer": 2.0}, RewardSettings()) == 0  # the answer's part is capped


# --- policy and reference ---


def forward(vlm, image):
    prompts = make_prompts(vlm, [build_prompt("Is there an effusion?", "json")], [image])
    return logprobs(vlm, prompts, [[[15, 16, 17]]])[0]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "adapter"
    vlm = add_lora(load_vlm("tiny:qwen2vl"), rank=4, dropout=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in Weights(vlm.model).values():
            p.add_(0.05 * torch.randn_like(p))
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["new adapter", "SFT adapter"])
def test_reference_is_the_model_as_it_was_given(kind, adapter, rows_file):
    more = ["--sft-ckpt", str(adapter)] if kind == "SFT adapter" else []
    vlm = load_policy(parse_args([*options(rows_file), *more]), CPU)
    image = np.random.default_rng(0).integers(0, 255, (56, 56), dtype=np.uint8)
    given = forward(load_vlm("tiny:qwen2vl", adapter=str(adapter) if more else None), image).detach()
    names = set(Weights(vlm.model))
    assert names and all("lora_" in n and "reference" not in n for n in names)
    torch.testing.assert_close(forward(vlm, image), given)  # also: no dropout
    with torch.no_grad():
        for p in Weights(vlm.model).values():
            p.add_(0.1)
    moved = forward(vlm, image)
    with as_reference(vlm):
        torch.testing.assert_close(forward(vlm, image).detach(), given)
        assert (forward(vlm, 255 - image) - given).abs().max() > 1e-4  # the reference sees the image too
    assert (moved - given).abs().max() > 1e-2 and set(Weights(vlm.model)) == names
    torch.testing.assert_close(forward(vlm, image), moved)
    moved.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in vlm.model.parameters())


# --- whole runs ---


@pytest.fixture(scope="module", autouse=True)
def rewards_that_differ():
    """
    An untrained model writes nothing that earns anything: here it also earns by the letters it uses, so that there is
    something to learn.
    """

    def spelled(rows, texts, *rest):
        return [
            terms | {"reward": terms["reward"] + len(set(text)) / 20}
            for text, terms in zip(texts, real(rows, texts, *rest), strict=True)
        ]

    patch, real = pytest.MonkeyPatch(), rollouts.score_rollouts
    patch.setattr(rollouts, "score_rollouts", spelled)
    yield
    patch.undo()


SHORT = ("--steps", 4, "--lr", "1e-2", "--warmup", 0, "--save-every", 2, "--eval-every", 2)


def run(rows_file, folder, *more):
    main(options(rows_file, *SHORT, "--out-dir", folder, *more))


def finals(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    return (
        state["parts"]["weights"],
        rollouts,
        [{k: v for k, v in r.items() if not k.startswith(("seconds", "peak"))} for r in state["values"]["history"]],
    )


@pytest.fixture(scope="module")
def finished(rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    run(rows_file, folder)
    return folder


def test_a_run_leaves_what_it_says(finished, capsys):
    weights, rollouts, history = finals(finished)
    assert [r["step"] for r in history] == [0, 1, 2, 3, 4] and len(rollouts) == 4 * 2 * 3
    meanings = json.loads((finished / "meanings.json").read_text())
    assert {k for r in history for k in r} <= set(meanings["history.jsonl"])
    assert set(rollouts[0]) - {
        "id",
        "step",
        "place",
        "row",
        "image",
        "question",
        "gold",
        "response",
        "advantage",
    } == set(meanings["rollouts.jsonl"])
    assert history[1]["ratio_min"] == pytest.approx(1, abs=1e-4) and history[1]["kl"] == pytest.approx(0, abs=1e-6)
    for name in (
        "completions.md",
        "figures/curves.png",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "training.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.glob(".adapter*")) and not (finished / "reference").exists()
    name, adapter = model_of(None, finished)
    assert load_vlm(name, adapter=adapter).adapter == str(finished)  # peft reads it


@pytest.mark.parametrize("where", ["between two steps", "in the middle of a rollout"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(where, rows_file, finished, tmp_path, monkeypatch):
    real, calls = rollouts.sample, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 5:  # validation, steps 1, 2, validation, step 3 in the middle
            if where.startswith("between"):
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(rollouts, "sample", dying)
    with pytest.raises((SystemExit, MemoryError)):
        run(rows_file, tmp_path / "run")
    monkeypatch.undo()
    if not where.startswith("between"):
        with (tmp_path / "run" / "rollouts.jsonl").open("a") as file:
            file.write(
                '{"id": "3.0.0", "step": 3}\n{"id": "3.0.1", "st'
            )  # written after the last checkpoint, and cut off
    main([*options(rows_file, *SHORT), "--resume", str(tmp_path / "run")])
    found, wanted = finals(tmp_path / "run"), finals(finished)
    assert found[1] == wanted[1] and found[2] == wanted[2]
    assert all(torch.equal(found[0][n], wanted[0][n]) for n in wanted[0]) and any(
        w.any() for n, w in wanted[0].items() if "lora_B" in n
    )


def test_the_adapter_kept_is_not_that_of_a_shortcut():
    """One that validation shares is right more often, and looks elsewhere."""
    shortcut = {"val_accuracy": 1.0, "val_v": -0.1, "val_valid": 1.0}
    assert rank_of(shortcut | {"val_accuracy": 0.9, "val_v": 0.3}) > rank_of(shortcut)
    assert rank_of(shortcut | {"val_v": None}) > rank_of({"val_accuracy": 0.9, "val_v": None, "val_valid": 1.0})


def test_a_run_to_resume_that_is_not_there_is_named_before_a_model_is_loaded(refused):
    assert "there is nothing at nowhere" in refused(main, ["--resume", "nowhere"])


def test_resume_refuses_other_settings_and_rows(rows_file, finished, tmp_path, capsys):
    for more, words in (
        (["--lr", "1e-3"], "--lr"),
        (["--num-generations", "4"], "--num-generations"),
        (["--data-jsonl", str(rows_file.with_name("train.json"))], "other data"),
    ):
        with pytest.raises(SystemExit):
            main([*options(rows_file, *SHORT, *more), "--resume", str(finished)])
        assert words in capsys.readouterr().err


def test_explain_says_why(finished, capsys):
    rollout = finals(finished)[1][5]
    main(["--explain", rollout["id"], "--out-dir", str(finished)])
    said = capsys.readouterr().out
    assert (
        rollout["question"] in said
        and f"reward {rollout['reward']:+.3f}" in said
        and f"advantage {rollout['advantage']:+.3f}" in said
    )
    with pytest.raises(SystemExit):
        main(["--explain", "99.0.0", "--out-dir", str(finished)])
    assert "no rollout 99.0.0" in capsys.readouterr().err


def test_explain_draws_the_edited_images(rows_file, tmp_path, capsys):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    chosen = [r for r in rows if r["gold"] == "yes" and r["region"] and r["split"] == "train"][:2] + [
        r for r in rows if r["split"] == "val"
    ][:2]
    path = rows_file.with_name("few.jsonl")
    path.write_text("\n".join(map(json.dumps, chosen)))
    run(path, tmp_path / "run", "--steps", 1)
    main(["--explain", "1.0.0", "--out-dir", str(tmp_path / "run")])
    capsys.readouterr()
    picture = Image.open(tmp_path / "run" / "figures" / "explain_1.0.0.png")
    assert picture.width > 6 * 25 and np.asarray(picture).std() > 20


def test_inner_steps_and_other_options(rows_file, tmp_path):
    run(
        rows_file,
        tmp_path / "run",
        "--steps",
        2,
        "--inner-steps",
        2,
        "--composition",
        "additive",
        "--style",
        "think",
        "--scale-rewards",
        "group",
    )
    history = finals(tmp_path / "run")[2]
    assert history[2]["ratio_max"] != 1


def test_a_loss_that_is_not_finite_changes_nothing(rows_file, tmp_path, monkeypatch):
    real, calls = rollouts.policy_loss, []

    def broken(*arguments, **settings):
        loss, metrics = real(*arguments, **settings)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 2 else loss), metrics

    monkeypatch.setattr(rollouts, "policy_loss", broken)
    run(rows_file, tmp_path / "run", "--steps", 3)
    weights, _, history = finals(tmp_path / "run")
    assert [r.get("skipped") for r in history[1:]] == [0, 1, 0] and history[2]["loss"] is None
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_first_step_is_checked(rows_file, tmp_path, monkeypatch):
    """Log-probabilities at another temperature than the sampler's: the run stops at once."""
    real = rollouts.logprobs

    def hotter(vlm, prompts, groups, share, temperature, *rest, **options):
        return real(vlm, prompts, groups, share, 2 * temperature, *rest, **options)

    monkeypatch.setattr(rollouts, "logprobs", hotter)
    with pytest.raises(RuntimeError, match="policy that sampled"):
        run(rows_file, tmp_path / "run")


# --- rows and mistakes ---


def test_test_rows_are_never_trained_on(rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    path = rows_file.with_name("mixed.jsonl")
    path.write_text(
        "\n".join(
            json.dumps(r | ({"split": "test", "question": "Test?"} if i % 3 == 0 else {})) for i, r in enumerate(rows)
        )
    )
    train, held_out, _ = load_rows(parse_args(options(path)))
    assert all(r["question"] != "Test?" for r in train + held_out) and len(train) > 20


def test_older_files_get_a_tenth_of_their_images_for_validation(rows_file, capsys):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    path = rows_file.with_name("old.jsonl")
    path.write_text(
        "\n".join(
            json.dumps({k: r[k] for k in ("image_path", "question", "gold")} | {"delta_cf_roi": 0.9}) for r in rows
        )
    )
    train, held_out, _ = load_rows(parse_args(options(path)))
    assert held_out and not {r["image_path"] for r in train} & {r["image_path"] for r in held_out}
    assert "delta_cf_roi" in capsys.readouterr().out


def test_every_row_comes_once_per_epoch():
    assert sorted(row_at(p, 7, 3) for p in range(7, 14)) == list(range(7))
    assert [row_at(p, 50, 3) for p in range(50)] != [row_at(p, 50, 3) for p in range(50, 100)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num-generations", "1"], "at least 2"),
        (["--weights", "1,2"], "four numbers"),
        (["--explain", "1.0.0"], "--out-dir"),
        (["--data-jsonl", "no_such_file.jsonl"], "cannot be read"),
        (["--sft-ckpt", "no_such_folder"], "no adapter folder"),
        (["--eps-low", "1.5"], "below 1"),
    ],
)
def test_mistakes_get_one_sentence(more, words, rows_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*options(rows_file), *([] if "--explain" in more else ["--out-dir", str(tmp_path / "run")]), *more])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_a_damaged_image_is_named_before_the_first_step(rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    whole = rows_file.parent / rows[0]["image_path"]
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:200])
    path = rows_file.with_name("cut.jsonl")
    path.write_text("\n".join(map(json.dumps, [rows[0] | {"image_path": str(tmp_path / "cut.png")}, *rows[1:]])))
    with pytest.raises(InputError, match="1 of .* images cannot be read; .*cut.png"):
        load_rows(parse_args(options(path)))


def test_rows_without_an_answer_are_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"question": "Is it?", "gold": "yes"}))
    with pytest.raises(InputError, match="image_path"):
        load_rows(parse_args(options(path)))


@pytest.mark.slow
def test_a_real_kill(rows_file, tmp_path, start_script):
    """As a user runs it: a process, killed hard after its first checkpoint, and resumed."""
    script = ROOT / "vqa_sft_grpo" / "train_grpo.py"
    command = [script, *options(rows_file, "--steps", 6, "--save-every", 1, "--eval-every", 6)]
    process = start_script([*command, "--out-dir", "run"], tmp_path)
    while not Path("run/last.pt").exists():
        assert process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert start_script([*command, "--resume", "run"], tmp_path).wait() == 0, Path("output.txt").read_text()
    assert "resumed from" in Path("output.txt").read_text()
    assert [r["step"] for r in finals(tmp_path / "run")[2]] == list(range(7))
