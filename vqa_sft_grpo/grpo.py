"""
Group relative policy optimisation (GRPO): advantages and loss, as plain functions of tensors.

    advantages, reward_stats = group_advantages(rewards, group_size=4, scale="group")
    loss, metrics = policy_loss(logp, old_logp, ref_logp, advantages, mask, beta=0.02, entropy=entropy)

Shapes: N rollouts, prompt-major (the G rollouts of a prompt are neighbours); a micro-batch has B of them, right-padded
to T completion tokens. Log-probabilities are natural logarithms and belong to sampled tokens. Rewards and advantages:
one per rollout.

How this differs from the textbook (GRPO as in DeepSeekMath, arXiv 2402.03300)

    advantage  (r - mean) / (std + 1e-4), std being the sample standard deviation (n - 1) of the group's defined
               rewards; the paper does not say which one and adds nothing. "none" divides by nothing (Dr. GRPO,
               2503.20783: the division weighs easy and hard prompts up).
    undefined  a reward of None or NaN is left out of mean and std and its rollout gets advantage 0, as does every
               rollout of a group with equal rewards or fewer than two defined ones: such a group has nothing to say
               (the paper has neither case).
    loss       the sum over tokens / tokens of the whole step (DAPO, 2503.14476). The textbook takes each rollout's mean
               over its tokens first, which punishes long wrong answers less per token.
    clipping   two numbers: 1 - eps_low and 1 + eps_high (2503.14476).
    KL         of the policy from the reference, estimated at the sampled tokens, d = ref - logp:
               (e^d - d - 1) * ratio (DeepSeek-V3.2, 2512.02556). The textbook's k3 = e^d - d - 1 estimates the same
               number, but its expected gradient is that of KL(ref || policy); with the ratio it is that of
               KL(policy || ref), off policy too.
    on policy  old_logp=None: the ratio is exp(logp - logp.detach()), which is 1 and has the gradient of logp.
    steps      the losses of a step's micro-batches add up to the loss of the step, given its total_tokens; where
               gradients are averaged over processes, pass it divided by their number.

TRL 1.16.0 has the same definitions (loss_type "dapo", use_bias_correction_kl); where the papers leave room its choice
was taken, and the tests compare the two. Other than there, values at masked positions may be anything (-inf and NaN
too), a group of equal rewards has advantages of exactly 0, and log-probabilities know tokens that the sampler never
draws.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np
import torch

SCALES = ("group", "none")
STD_EPSILON = 1e-4  # added to a standard deviation before dividing
EQUAL = 1e-6  # rewards closer than this are equal: what sums in another order differ by

# ---------------------------------------------------------------------------------------------------------- advantages


def _groups(rewards, group_size):
    """N numbers, None or NaN -> float64 (N / G, G), NaN where undefined."""
    # an array of NumPy first, for which None is NaN
    rewards = np.array(rewards.tolist() if torch.is_tensor(rewards) else rewards, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have 1 dimension, got shape {rewards.shape}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}: one alone has nothing to be compared with")
    if len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size}")
    if np.isinf(rewards).any():
        raise ValueError("a reward is infinite")
    return torch.from_numpy(rewards).unflatten(0, (-1, group_size))


def _std(x, dim):
    """Sample standard deviation (n - 1) of what is not NaN, the dimension kept; NaN for fewer than two values."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    squares = ((x - x.nanmean(dim, keepdim=True)) ** 2).nansum(dim, keepdim=True)
    return torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)


def group_advantages(rewards, group_size, scale="group"):
    """
    rewards (N,), a tensor or a list, None or NaN = undefined -> advantages float64 (N,), stats.
    scale: "group" or "none" (see above). stats: mean and sample std of the defined rewards (None if undefined), groups,
    zero_variance_groups (no two defined rewards that differ), frac_reward_zero_std (their share), undefined_rewards.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, not {scale!r}")
    grouped = _groups(rewards, group_size)
    undefined = grouped.isnan()
    highest = grouped.masked_fill(undefined, -torch.inf).amax(1, keepdim=True)  # -inf where none is defined
    signal = highest - grouped.masked_fill(undefined, torch.inf).amin(1, keepdim=True) > EQUAL
    advantages = grouped - grouped.nanmean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (_std(grouped, 1) + STD_EPSILON)
    advantages = advantages.masked_fill(undefined | ~signal, 0).flatten()
    mean, std = (None if v.isnan() else v.item() for v in (grouped.nanmean(), _std(grouped.flatten(), 0)[0]))
    zero = int((~signal).sum())
    stats = {"reward": mean, "reward_std": std, "groups": len(grouped), "zero_variance_groups": zero}
    stats |= {"frac_reward_zero_std": zero / len(grouped), "undefined_rewards": int(undefined.sum())}
    return advantages, stats


# ---------------------------------------------------------------------------------------------------------------- loss


def policy_loss(
    logp, old_logp, ref_logp, advantages, mask, *, eps_low=0.2, eps_high=0.2, beta=0.0, total_tokens=None, entropy=None
):
    """
    Loss of one micro-batch of rollouts, to be minimised -> scalar (differentiable in logp), metrics.

    logp, old_logp, ref_logp (B, T): log-probabilities of the sampled tokens under the policy, the policy that sampled
    them (None: the same, on policy) and the reference (None only if beta is 0; given with beta 0, its KL is measured
    and not minimised). advantages (B,), mask (B, T) true or 1 at tokens that count, entropy (B, T) in nats or None
    (measured only). eps_low, eps_high, beta: see above. total_tokens: mask.sum() of the whole optimiser step if this is
    a part of it.

    metrics, floats over the tokens that count (None if there is none; combine_metrics joins micro-batches):
        ratio_mean, ratio_min, ratio_max        of the policy to the old policy, before clipping
        clip_low, clip_high, clip_region        share of ratios below 1 - eps_low with a negative advantage, above 1 +
                                                eps_high with a positive one, either: those that give no gradient
        kl, entropy                             mean per token
        tokens                                  how many the means are over
    """
    if logp.ndim != 2 or mask.shape != logp.shape or advantages.shape != logp.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logp, mask, advantages))
        raise ValueError(f"logp and mask must be (B, T) and advantages (B,), got {shapes}")
    if any(x is not None and x.shape != logp.shape for x in (old_logp, ref_logp, entropy)):
        raise ValueError(f"old_logp, ref_logp and entropy must have the shape of logp, {tuple(logp.shape)}")
    if ref_logp is None and beta != 0:
        raise ValueError("beta needs ref_logp")

    keep = mask.bool()
    dtype = torch.promote_types(logp.dtype, torch.float32)
    # What stands at padding must not matter, not even as 0 * NaN; selecting first makes its gradient exactly 0 as well.
    logp, old_logp, ref_logp, entropy = (
        None if x is None else torch.where(keep, x.to(dtype), 0) for x in (logp, old_logp, ref_logp, entropy)
    )
    advantages = advantages.to(logp)[:, None]
    ratio = (logp - (logp.detach() if old_logp is None else old_logp.detach())).exp()
    per_token = -torch.min(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    kl = None
    if ref_logp is not None:
        d = ref_logp.detach() - logp
        kl = (d.exp() - d - 1) * ratio
        if beta != 0:
            per_token = per_token + beta * kl
    value = torch.where(keep, per_token, 0).sum() / max(int(keep.sum()) if total_tokens is None else total_tokens, 1)
    return value, _measure(ratio, advantages, keep, kl, entropy, eps_low, eps_high)


@torch.no_grad()
def _measure(ratio, advantages, keep, kl, entropy, eps_low, eps_high):
    low, high = (ratio < 1 - eps_low) & (advantages < 0), (ratio > 1 + eps_high) & (advantages > 0)
    means = {"ratio_mean": ratio, "clip_low": low, "clip_high": high, "clip_region": low | high}
    means |= {name: x for name, x in (("kl", kl), ("entropy", entropy)) if x is not None}
    values = {name: torch.where(keep, x.to(ratio), 0).sum() / keep.sum() for name, x in means.items()}
    values["ratio_min"] = torch.where(keep, ratio, torch.inf).min()
    values["ratio_max"] = torch.where(keep, ratio, -torch.inf).max()
    values["tokens"] = keep.sum()
    # one transfer, not ten
    numbers = dict(zip(values, torch.stack([v.to(ratio) for v in values.values()]).tolist(), strict=True))
    tokens = round(numbers.pop("tokens"))
    return {name: value if tokens else None for name, value in numbers.items()} | {"tokens": tokens}


def combine_metrics(parts):
    """
    Metrics of the micro-batches of a step -> those of the whole step: means by their tokens, extremes and sums as such.
    """
    counted = [part for part in parts if part["tokens"]]
    if not counted:
        return dict(parts[0])
    whole = {"tokens": sum(part["tokens"] for part in counted)}
    for name in counted[0].keys() - whole.keys():
        if name.endswith(("_min", "_max")):
            whole[name] = (min if name.endswith("_min") else max)(part[name] for part in counted)
        else:
            whole[name] = sum(part[name] * part["tokens"] for part in counted) / whole["tokens"]
    return whole


def check_first_step(metrics, tolerance=1e-3):
    """
    What holds at the first update on fresh rollouts, whatever the rewards: every ratio is 1, nothing is clipped, and
    the KL, if there is one, is 0, since the policy still is the reference. If not, the passes differ in something
    (image, dropout, padding, temperature) and training would go astray in silence: RuntimeError. tolerance: of ratio
    and KL, by the precision of the model.
    """
    if not metrics["tokens"]:
        return
    faults = [
        f"{name} {metrics[name]:.6g} instead of 1"
        for name in ("ratio_min", "ratio_max")
        if not abs(metrics[name] - 1) <= tolerance
    ]
    faults += [f"a share of {metrics['clip_region']:.3g} of the ratios clipped"] * (metrics["clip_region"] != 0)
    if "kl" in metrics and not abs(metrics["kl"]) <= tolerance:
        faults.append(f"KL {metrics['kl']:.6g} instead of 0")
    if faults:
        raise RuntimeError(
            f"The first update must see the policy that sampled: {', '.join(faults)}. The passes see different inputs"
            " or settings."
        )
