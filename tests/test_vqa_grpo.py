import itertools
import json
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.models.passes import selected_logprobs
from vqa_sft_grpo.grpo import SCALES, check_first_step, combine_metrics, group_advantages, policy_loss

EPS = {"eps_low": 0.2, "eps_high": 0.28}


# ------------------------------------------- the definitions once more, in numpy, rollout by rollout and token by token


def numpy_advantages(rewards, group_size, scale):
    out = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        defined = [r for r in group if not math.isnan(r)]
        for r in group:
            if math.isnan(r) or len(set(defined)) < 2:
                out.append(0.0)
            else:
                divisor = np.std(defined, ddof=1) + 1e-4 if scale == "group" else 1.0
                out.append((r - np.mean(defined)) / divisor)
    return np.array(out)


def numpy_loss(logp, old, ref, advantages, mask, beta, eps_low=0.2, eps_high=0.28):
    total, tokens = 0.0, 0
    for i, t in np.argwhere(mask):
        ratio = math.exp(logp[i, t] - old[i, t])
        surrogate = min(ratio * advantages[i], min(max(ratio, 1 - eps_low), 1 + eps_high) * advantages[i])
        x = ref[i, t] - logp[i, t]
        total += -surrogate + beta * (math.exp(x) - x - 1) * ratio
        tokens += 1
    return total / tokens


def numpy_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def rollouts(seed=6, b=8, t=6, spread=0.35):
    """
    Log-probabilities of three policies whose ratios lie below, in and above the clipping range; rewards, mask with gaps
    of length.
    """
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.0, (b, t))
    drift = rng.standard_normal((b, 1)) + rng.standard_normal(
        (b, t)
    )  # a part per rollout, so that their means differ too
    old, ref = logp + spread * drift, logp + 0.5 * rng.standard_normal((b, t))
    mask = np.arange(t) < rng.integers(1, t + 1, (b, 1))
    mask[0], mask[3] = True, False  # a full one, and one that was taken out
    rewards = rng.choice([0, 0.3, 1, 1.5], b).astype(float)
    rewards[:2] = 0, 1
    return logp, old, ref, mask, rewards


def tensors(*arrays):
    return [torch.from_numpy(a) for a in arrays]


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("scale", SCALES)
def test_loss_and_gradient_equal_the_closed_form_and_its_finite_differences(scale):
    logp, old, ref, mask, rewards = rollouts()
    rewards[5] = np.nan
    advantages, _ = group_advantages(rewards, 4, scale)
    assert advantages.dtype == torch.float64 and np.abs(numpy_advantages(rewards, 4, scale)).max() > 0.5
    np.testing.assert_allclose(advantages, numpy_advantages(rewards, 4, scale), atol=1e-12)

    x = torch.from_numpy(logp).requires_grad_()
    value, metrics = policy_loss(x, *tensors(old, ref), advantages, torch.from_numpy(mask), beta=0.3, **EPS)
    value.backward()

    def closed_form(z):
        return numpy_loss(z, old, ref, advantages.numpy(), mask, 0.3)

    assert value.item() == pytest.approx(closed_form(logp), abs=1e-12)
    np.testing.assert_allclose(x.grad, numpy_gradient(closed_form, logp), atol=2e-8)
    assert torch.all(x.grad[torch.from_numpy(~mask)] == 0)
    assert metrics["clip_low"] and metrics["clip_high"]  # the rollouts hold all cases
    assert metrics["tokens"] == mask.sum()


def test_gradcheck():
    logp, old, ref, mask, rewards = tensors(*rollouts(1, b=4, t=4))
    advantages, _ = group_advantages(rewards, 4)
    x = logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: policy_loss(z, old, ref, advantages, mask, beta=0.5, **EPS)[0], x)


def test_a_case_by_hand():
    # Two rollouts, A = +1 and -1; ratios 1.5 (clipped to 1.28), 1 | 0.5 (clipped to 0.8). Losses of the tokens: -1.28,
    # -1 | 0.8.
    old = torch.zeros(2, 2, dtype=torch.float64) - 1
    logp = old + torch.tensor([[1.5, 1.0], [0.5, 9.0]], dtype=torch.float64).log()
    mask, advantages = torch.tensor([[1, 1], [1, 0]]), torch.tensor([1.0, -1.0])
    value, metrics = policy_loss(logp, old, None, advantages, mask, **EPS)
    assert value.item() == pytest.approx(-1.48 / 3)
    assert metrics == pytest.approx(
        {"clip_low": 1 / 3, "clip_high": 1 / 3, "clip_region": 2 / 3, "ratio_mean": 1, "ratio_min": 0.5}
        | {"ratio_max": 1.5, "tokens": 3}
    )

    # The ratio of a negative advantage is not bounded from above.
    value, metrics = policy_loss(old + math.log(5), old, None, torch.tensor([-1.0, -1.0]), mask, **EPS)
    assert value.item() == pytest.approx(5) and metrics["clip_region"] == 0


def test_first_step_has_ratio_1_kl_0_nothing_clipped_and_the_policy_gradient():
    logp, _, _, mask, rewards = tensors(*rollouts(2))
    advantages, _ = group_advantages(rewards, 4)
    gradients = []
    for old in (None, logp.clone()):
        x = logp.clone().requires_grad_()
        value, metrics = policy_loss(x, old, x.detach().clone(), advantages, mask, beta=0.7, **EPS)
        value.backward()
        check_first_step(metrics, tolerance=0)
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["clip_region"] == 0 and metrics["kl"] == 0
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0], -advantages[:, None] * mask / mask.sum(), rtol=0, atol=1e-15)


def test_check_first_step_says_what_is_wrong():
    logp, old, ref, mask, rewards = map(torch.from_numpy, rollouts())
    advantages = group_advantages(rewards, 4)[0]
    check_first_step(policy_loss(logp, logp + 5e-4, logp, advantages, mask)[1])
    check_first_step(policy_loss(logp, None, None, advantages, mask)[1])
    check_first_step(policy_loss(logp, old, ref, advantages, torch.zeros_like(mask))[1])  # no token, nothing to check
    with pytest.raises(RuntimeError, match="KL 0.* instead of 0"):
        check_first_step(policy_loss(logp, None, ref, advantages, mask)[1])
    with pytest.raises(RuntimeError, match="ratio_min .* ratio_max .* clipped"):
        check_first_step(policy_loss(logp, old, logp, advantages, mask)[1])
    with pytest.raises(RuntimeError, match="ratio_min nan"):
        check_first_step(policy_loss(logp * torch.nan, None, None, advantages, mask)[1])


def test_loss_does_not_depend_on_padding_or_order():
    logp, old, ref, mask, rewards = rollouts(3)
    advantages = group_advantages(rewards, 4)[0]

    def run(*arrays):
        x, old, ref, mask, advantages = tensors(*arrays)
        x.requires_grad_()
        value, metrics = policy_loss(x, old, ref, advantages, mask, entropy=-ref, beta=0.2, **EPS)
        value.backward()
        return value.item(), x.grad.numpy(), metrics

    value, gradient, metrics = run(logp, old, ref, mask, advantages.numpy())
    rubbish = np.where(mask, 0, np.resize([np.nan, np.inf, -np.inf, 1e9], mask.shape))
    beyond = np.full((len(mask), 3), np.nan)
    padded = [np.concatenate([a + rubbish, beyond], 1) for a in (logp, old, ref)]
    value_2, gradient_2, metrics_2 = run(*padded, np.concatenate([mask, beyond > 0], 1), advantages.numpy())
    assert value_2 == pytest.approx(value, rel=1e-14) and metrics_2 == pytest.approx(metrics, rel=1e-14)
    np.testing.assert_allclose(gradient_2, np.pad(gradient, ((0, 0), (0, 3))), atol=1e-16)

    order = np.random.default_rng(0).permutation(len(logp))
    value_3, gradient_3, metrics_3 = run(logp[order], old[order], ref[order], mask[order], advantages.numpy()[order])
    assert value_3 == pytest.approx(value, rel=1e-13) and metrics_3 == pytest.approx(metrics, rel=1e-13)
    np.testing.assert_allclose(gradient_3, gradient[order], atol=1e-15)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 2, 5)])
def test_micro_batches_add_up_to_the_step(sizes):
    logp, old, ref, mask, rewards = tensors(*rollouts(4))
    advantages = group_advantages(rewards, 4)[0]
    settings = EPS | {"beta": 0.2}
    x = logp.clone().requires_grad_()
    value, metrics = policy_loss(x, old, ref, advantages, mask, entropy=-ref, **settings)
    value.backward()

    y, losses, parts = logp.clone().requires_grad_(), [], []
    for part in torch.arange(8).split(sizes):
        settings |= {"entropy": -ref[part], "total_tokens": int(mask.sum())}
        piece, m = policy_loss(y[part], old[part], ref[part], advantages[part], mask[part], **settings)
        piece.backward()
        losses.append(piece.item())
        parts.append(m)
    assert combine_metrics(parts) == pytest.approx(metrics, rel=1e-12)
    assert sum(losses) == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=1e-15)


def test_kl_measured_with_beta_0_changes_nothing():
    logp, old, ref, mask, rewards = tensors(*rollouts(6))
    values = []
    for reference in (None, ref):
        x = logp.clone().requires_grad_()
        value, metrics = policy_loss(x, old, reference, group_advantages(rewards, 4)[0], mask, **EPS)
        value.backward()
        values.append((value.item(), x.grad.tolist()))
    assert values[0] == values[1]
    assert metrics["kl"] == pytest.approx(
        (((ref - logp).exp() - (ref - logp) - 1) * (logp - old).exp())[mask].mean().item()
    )


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_the_kl_estimate_descends_on_the_kl(shift):
    """
    One token of five, so the expectation over samples of the old policy is a sum: the claim of the module's docstring,
    exactly; without the ratio (the textbook) it would be the gradient of the other KL, and only on policy.
    """
    generator = torch.Generator().manual_seed(0)
    scores, other, noise = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    scores.requires_grad_()
    ref, old = other.log_softmax(0), (scores.detach() + shift * noise).log_softmax(0)  # shift 0: on policy
    logp = scores.log_softmax(0)

    def of_token(i):  # five rollouts of one token, each counted by how often the old policy draws it
        row = (logp[i].view(1, 1), old[i].view(1, 1), ref[i].view(1, 1))
        return policy_loss(*row, torch.zeros(1), torch.ones(1, 1), beta=1.0)[0]

    def gradient(value):
        return torch.autograd.grad(value, scores, retain_graph=True)[0]

    estimate = sum(old[i].exp() * of_token(i) for i in range(5))
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    torch.testing.assert_close(estimate, reverse)
    torch.testing.assert_close(gradient(estimate), gradient(reverse), rtol=0, atol=1e-14)
    textbook = (old.exp() * ((ref - logp).exp() - (ref - logp) - 1)).sum()
    assert torch.allclose(gradient(textbook), gradient(forward), atol=1e-14) == (shift == 0)


def test_a_micro_batch_without_tokens_has_loss_0_and_no_gradient():
    logp, old, ref, mask, rewards = tensors(*rollouts())
    logp.requires_grad_()
    advantages = group_advantages(rewards, 4)[0]
    value, nothing = policy_loss(logp, old, ref, advantages, torch.zeros_like(mask), beta=0.1, **EPS)
    assert value.item() == 0 and torch.equal(torch.autograd.grad(value, logp)[0], torch.zeros_like(logp))
    assert nothing["tokens"] == 0 and nothing["kl"] is None and nothing["ratio_max"] is None
    full = policy_loss(logp, old, ref, advantages, mask)[1]
    assert combine_metrics([nothing, full]) == pytest.approx(full) and combine_metrics([nothing] * 2) == nothing


def test_low_precision_is_computed_in_float32():
    logp, old, ref, mask, rewards = tensors(*rollouts())
    low = [x.bfloat16() for x in (logp, old, ref)]
    value, _ = policy_loss(*low, group_advantages(rewards, 4)[0], mask, beta=0.1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(),
        policy_loss(*(x.double() for x in low), group_advantages(rewards, 4)[0], mask, beta=0.1)[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_policy_loss_refuses():
    x, a, m = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3)
    for words, settings in {
        "beta needs ref_logp": {"beta": 0.1},
        "must have the shape of logp": {"entropy": torch.zeros(2, 1)},
    }.items():
        with pytest.raises(ValueError, match=words):
            policy_loss(x, None, None, a, m, **settings)
    with pytest.raises(ValueError, match="advantages \\(B,\\)"):
        policy_loss(x, None, None, a[:, None], m)


# ------------------------------------------------------------------------------------------------- advantages and masks


def test_advantages_by_hand():
    # Group 1: mean 0.5, sample std sqrt(1/3). Group 2: 2 and 4, mean 3, sample std sqrt(2); one undefined. 3 and 4:
    # nothing to compare.
    rewards = [0, 1, 0, 1, 2, None, 4, None, 1, 1, 1, 1, float("nan"), None, 5, None]
    advantages, stats = group_advantages(rewards, 4)
    one, two = 0.5 / ((1 / 3) ** 0.5 + 1e-4), 1 / (2**0.5 + 1e-4)
    np.testing.assert_allclose(advantages, [-one, one, -one, one, -two, 0, two, 0] + [0] * 8, atol=1e-15)
    known = [0, 1, 0, 1, 2, 4, 1, 1, 1, 1, 5]
    assert stats == {
        "reward": pytest.approx(np.mean(known)),
        "reward_std": pytest.approx(np.std(known, ddof=1)),
        "groups": 4,
        "zero_variance_groups": 2,
        "frac_reward_zero_std": 0.5,
        "undefined_rewards": 5,
    }
    np.testing.assert_allclose(group_advantages(rewards, 4, "none")[0][:8], [-0.5, 0.5, -0.5, 0.5, -1, 0, 1, 0])
    assert json.loads(json.dumps(stats)) == stats
    empty = group_advantages([None] * 4, 2)
    assert empty[0].tolist() == [0] * 4 and empty[1]["reward"] is None and empty[1]["reward_std"] is None


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_sum_to_0_and_see_only_differences_within_a_prompt(scale):
    rng = np.random.default_rng(0)
    rewards = rng.random((5, 4))
    rewards[1, 2] = np.nan
    advantages = group_advantages(rewards.ravel(), 4, scale)[0].view(5, 4)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-12)
    everywhere = group_advantages(rewards.ravel() + 7.5, 4, scale)[0].view(5, 4)
    np.testing.assert_allclose(everywhere, advantages, atol=1e-9)

    rewards[3] += 2  # one prompt is easier
    changed = group_advantages(rewards.ravel(), 4, scale)[0].view(5, 4)
    np.testing.assert_allclose(changed, advantages, atol=1e-9)

    rows, columns = rng.permutation(5), rng.permutation(4)
    shuffled = group_advantages(rewards[rows][:, columns].ravel(), 4, scale)[0].view(5, 4)
    np.testing.assert_allclose(shuffled, changed[rows][:, columns], atol=1e-12)


def test_equal_rewards_up_to_rounding_have_no_advantage():
    rewards = [0.1 + 0.2, 0.3, 0.3, 0.3, 0, 0, 0, 1e-5]
    advantages, stats = group_advantages(rewards, 4)
    assert advantages[:4].tolist() == [0] * 4 and advantages[7] > 0.04 and stats["zero_variance_groups"] == 1


def test_advantages_take_tensors_and_refuse_what_is_no_group():
    assert torch.equal(group_advantages(torch.tensor([0.0, 1.0]), 2)[0], group_advantages([0, 1], 2)[0])
    for rewards, size, words in (
        ([1, 2, 3], 2, "not whole groups of 2"),
        ([], 2, "not whole groups"),
        ([1, 2], 1, "at least 2"),
        ([1, torch.inf], 2, "infinite"),
        ([[1], [2]], 2, "1 dimension, got shape \\(2, 1\\)"),
    ):
        with pytest.raises(ValueError, match=words):
            group_advantages(rewards, size)
    with pytest.raises(ValueError, match="scale is one of"):
        group_advantages([1, 2], 2, "std")


# --------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.parity
@pytest.mark.parametrize(("beta", "on_policy"), list(itertools.product((0.0, 0.3), (False, True))))
def test_loss_gradient_and_metrics_equal_trl(beta, on_policy):
    """TRL's own loss method on made-up log-probabilities: a micro-batch of 8 of a step of 24 rollouts and 77 tokens."""
    trl = pytest.importorskip("trl")
    logp, old, ref, mask, rewards = tensors(*rollouts())
    mask[3, :2] = True  # for TRL an empty rollout has an undefined share of clipped tokens
    advantages = group_advantages(rewards, 4)[0]
    entropy = -ref
    x = logp.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, x=x, **o: (x, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="dapo",
        epsilon_low=EPS["eps_low"],
        epsilon_high=EPS["eps_high"],
        use_vllm=False,
        max_completion_length=9,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=3),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda v, reduction: v, gather=lambda v: v),
        current_gradient_accumulation_steps=3,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": mask[:, :1].long(),
        "prompt_mask": mask[:, :1],
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
    }
    inputs |= {
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(77),
        "ref_per_token_logps": ref,
        "old_per_token_logps": None if on_policy else old,
    }
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    settings = EPS | {"beta": beta, "total_tokens": 77, "entropy": entropy}
    ours, metrics = policy_loss(x, None if on_policy else old, ref, advantages, mask, **settings)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    gradients = [torch.autograd.grad(value, x)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    pairs = {
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
        "clip_region": "clip_ratio/region_mean",
        "entropy": "entropy",
    } | ({"kl": "kl"} if beta else {})
    for name, their_name in pairs.items():
        assert metrics[name] == pytest.approx(logged[their_name], rel=1e-5), name  # they average in float32


@pytest.mark.parity
@pytest.mark.slow
def test_a_run_of_trl_has_our_advantages_log_probabilities_losses_and_gradients(tmp_path):
    """
    Two prompts with images, G = 4, one rollout phase of two micro-batches, taken twice: the second pass has ratios
    other than 1.
    """
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from peft import LoraConfig
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

    from shared.models.tiny import tiny_folder

    seen = SimpleNamespace(rewards=None, advantages=[], losses=[], logps=[], gradients=[], metrics=[], clipped=[])

    class Compared(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            seen.advantages.append((out["advantages"], group_advantages(seen.rewards, 4)[0]))
            return out

        def _compute_loss(self, model, inputs):
            theirs = super()._compute_loss(model, inputs)
            base = self.accelerator.unwrap_model(model).get_base_model()
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            length = inputs["completion_ids"].shape[1]
            names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
            hidden = base.model(
                input_ids=ids, attention_mask=attention, use_cache=False, **{n: inputs[n] for n in names}
            ).last_hidden_state[:, -length - 1 : -1]
            ids_of_rows = inputs["completion_ids"]
            logp, entropy = selected_logprobs(
                hidden.flatten(0, 1), base.lm_head.weight, ids_of_rows.flatten(), 0.9, entropy=True, chunk=5
            )
            logp, entropy = logp.view(ids_of_rows.shape), entropy.view(ids_of_rows.shape)
            with torch.no_grad():
                their_logp, their_entropy, _ = self._get_per_token_logps_and_entropies(
                    model,
                    ids,
                    attention,
                    length,
                    compute_entropy=True,
                    num_images=inputs["num_images"],
                    **{n: inputs[n] for n in names},
                )
            mask = inputs["completion_mask"].bool()
            seen.logps.append(
                max((logp - their_logp)[mask].abs().max().item(), (entropy - their_entropy)[mask].abs().max().item())
            )
            ours, metrics = policy_loss(
                logp,
                inputs.get("old_per_token_logps"),
                inputs["ref_per_token_logps"],
                inputs["advantages"],
                mask,
                eps_low=0.05,
                eps_high=0.08,
                beta=0.04,
                total_tokens=inputs["num_items_in_batch"].item(),
                entropy=entropy,
            )
            seen.losses.append((ours.item(), theirs.item()))
            seen.metrics.append((metrics, {name: values[-1] for name, values in self._metrics["train"].items()}))
            parameters = [p for p in model.parameters() if p.requires_grad]
            seen.gradients.append(
                [
                    torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                    for loss in (ours, theirs)
                ]
            )
            return theirs

    def reward(completion_ids, **_):
        seen.rewards = [None if i == 6 else len(set(ids)) / 10 + sum(ids) % 7 for i, ids in enumerate(completion_ids)]
        return seen.rewards

    folder = tiny_folder("tiny:qwen2vl")
    set_seed(0)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (56, 56), dtype=np.uint8)).convert("RGB")
        for i in range(2)
    ]
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in ("Is there an effusion?", "Which side?")],
        "image": images,
    }
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        num_iterations=2,
        max_completion_length=8,
        temperature=0.9,
        beta=0.04,
        epsilon=0.05,
        epsilon_high=0.08,
        gradient_checkpointing=False,
        logging_steps=100,
        dataloader_pin_memory=False,
    )
    trainer = Compared(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        processing_class=AutoProcessor.from_pretrained(folder),
        args=config,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()

    (theirs, ours), *more = seen.advantages
    assert not more and len(seen.losses) == 4 and theirs[6] == ours[6] == 0 and ours.abs().max() > 0.5
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-5)
    assert max(seen.logps) < 1e-5
    for (ours, theirs), gradients, (metrics, logged) in zip(seen.losses, seen.gradients, seen.metrics, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert gradients[1].abs().max() > 1e-3
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
        for name, their_name in {"kl": "kl", "entropy": "entropy", "clip_region": "clip_ratio/region_mean"}.items():
            assert metrics[name] == pytest.approx(logged[their_name], abs=1e-5)
    first, last = seen.metrics[0][0], seen.metrics[3][0]
    check_first_step(first, tolerance=1e-5)
    assert last["ratio_max"] > 1.01 and last["kl"] > 1e-4 and last["clip_region"] > 0
