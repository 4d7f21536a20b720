"""
What a GRPO run tells: numbers of a step, a line per rollout, a table of completions, curves, and the edited images
behind a reward.

Used by train_grpo.py; nothing here changes the training.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
from collections import Counter

import numpy as np

from shared.report import draw_history, markdown_table, number
from shared.runtime import atomic_file, plain
from vqa_sft_grpo.report import draw_strip
from vqa_sft_grpo.looking import gold_of
from vqa_sft_grpo.scoring import normalise

HISTORY = {
    "step": "1, 2, ...",
    "reward": "mean over the rollouts",
    "reward_std": "its sample standard deviation over the rollouts",
    "frac_reward_zero_std": "share of groups with equal rewards",
    "gate": "share of rollouts that pass the gate",
    "correct": "share of rollouts that are right",
    "box": "mean overlap with the gold region, where there is one",
    "contradiction": "share of rollouts whose reasoning contradicts the answer",
    "penalty": "mean penalty for length, repetition, copying",
    "v": "mean V of the rollouts that have one",
    "v_clipped": "share at -1 or 1 of those with a region to take out",
    "gap": (
        "mean over these of the statement's drop without the region minus its mean drop without a random one, nats, not"
        " clipped"
    ),
    "explained": "share of the rollouts that V reads whose text before the answer names what is asked about",
    "gap_response": "of these, where a region is taken out: as gap, of the whole response",
    "most_frequent_answer": "share of the rollouts with the most frequent answer",
    "most_frequent_gold": "share of the most frequent gold answer",
    "length": "mean tokens of a rollout",
    "length_min": "shortest",
    "length_max": "longest",
    "truncated": "share without end token",
    "entropy": "nats per token, of the policy",
    "kl": "from the reference, nats per token",
    "clip_low": "share of ratios below the clip, advantage negative",
    "clip_high": "above, advantage positive",
    "clip_region": "either",
    "ratio_mean": "of the policy to the policy that sampled",
    "ratio_min": "lowest",
    "ratio_max": "highest",
    "loss": "of the last inner step",
    "cf_loss": "second part of the gradient's loss, --cf-gradient",
    "grad_norm": "before clipping",
    "lr": "learning rate",
    "skipped": "1: not finite, nothing changed",
    "tokens": "sampled in this step",
    "seconds": "of this step",
    "seconds_sample": "of that, for sampling",
    "seconds_score": "for rewards",
    "seconds_update": "for gradients",
    "peak_gib": "peak memory so far (GPU; without one, of the process)",
    "val_accuracy": "validation rows answered right, greedy (every --eval-every steps)",
    "val_v": "mean V of these answers; the adapter with the largest sum of the two is kept",
    "val_valid": "readable without repair",
    "val_iou": "box overlap",
    "val_gap": "as gap, of the greedy answers",
    "alarms": "names of the alarms that ring (alarms.py)",
}


def mean(values):
    """Of what is not None; None where there is nothing."""
    values = [float(v) for v in values if v is not None]
    return sum(values) / len(values) if values else None


def describe(batch, advantages, stats):
    """The numbers of HISTORY that come from the rollouts."""
    terms, flat = batch.terms, [ids for group in batch.groups for ids in group]
    v = [t["counterfactual"] for t in terms if t["counterfactual"] is not None]
    said, gold = (
        Counter(" ".join(normalise(a or "")) for a in answers)
        for answers in ([t["said"] for t in terms], [gold_of(r) for r in batch.rows])
    )
    lengths = [len(ids) for ids in flat]
    return {
        "reward": stats["reward"],
        "reward_std": stats["reward_std"],
        "frac_reward_zero_std": stats["frac_reward_zero_std"],
        "gate": mean(t["gate"] for t in terms),
        "correct": mean(t["correct"] for t in terms),
        "box": mean(t["box"] for t in terms),
        "contradiction": mean(None if t["contradiction"] is None else -t["contradiction"] for t in terms),
        "penalty": mean(t["penalty"] for t in terms),
        "v": mean(v),
        "v_clipped": mean(abs(t["counterfactual"]) >= 1 for t in terms if t["d_roi"] is not None),
        "gap": mean(t["d_roi"] - t["d_rand"] for t in terms if t["d_roi"] is not None),
        "explained": mean(t["explained"] for t in terms),
        "gap_response": mean(t["gap_response"] for t in terms),
        "most_frequent_answer": said.most_common(1)[0][1] / len(terms),
        "most_frequent_gold": gold.most_common(1)[0][1] / len(batch.rows),
        "length": mean(lengths),
        "length_min": min(lengths),
        "length_max": max(lengths),
        "tokens": sum(lengths),
    }


def log_rollouts(path, batch, advantages, step, size):
    """
    One line per rollout: id, question, response, every term and the advantage; and how to make its edited images again.
    """
    with path.open("a", encoding="utf-8") as file:
        for n, (text, terms) in enumerate(zip(batch.texts, batch.terms, strict=True)):
            q, row = n // size, batch.rows[n // size]
            head = {
                "id": f"{step}.{q}.{n % size}",
                "step": step,
                "place": batch.places[q],
                "row": row.get("id"),
                "image": row.get("image_path") or row["image"],
                "question": row["question"],
                "gold": gold_of(row),
                "response": text,
            }
            file.write(
                json.dumps(plain({**head, "advantage": round(advantages[n].item(), 6), **terms}), ensure_ascii=False)
                + "\n"
            )


def cut_rollouts(path, step):
    """Drop what a killed run wrote after its last checkpoint; it comes again."""
    if not path.exists():
        return
    with atomic_file(path, "w") as kept, path.open(encoding="utf-8") as file:
        for line in file:
            try:
                if json.loads(line)["step"] <= step:
                    kept.write(line)
            except ValueError:  # cut off in the middle by the kill
                continue


def write_completions(path, batch, advantages, step, size, most=8):
    """The rollouts of some questions as Markdown tables, those first whose rewards differ most."""
    blocks = [f"Answers of step {step}. V: how much more the gold region matters than random ones."]
    for q in sorted(range(len(batch.rows)), key=lambda q: -np.ptp(batch.rewards[q * size : (q + 1) * size]))[:most]:
        rows = []
        for n in range(q * size, (q + 1) * size):
            t = batch.terms[n]
            shown = (
                t["reward"],
                advantages[n].item(),
                float(t["correct"]),
                t["box"],
                t["counterfactual"],
                t["penalty"],
            )
            numbers = ["" if x is None else number(x, 2) for x in shown]
            rows.append([f"{step}.{q}.{n - q * size}", *numbers, batch.texts[n][:300]])
        question = " ".join(f"**{batch.rows[q]['question']}** gold: {gold_of(batch.rows[q])}".split())
        blocks += [question, markdown_table("id reward advantage right box V penalty text".split(), rows)]
    with atomic_file(path, "w") as file:
        file.write("\n\n".join([*blocks, ""]))


PANELS = [
    ("reward", {"reward": "mean reward", "reward_std": "its spread"}),
    ("share right", {"correct": "sampled answers", "val_accuracy": "validation, greedy"}),
    ("gap: region minus random, nats", {"gap": "training", "val_gap": "validation"}),
    ("nats per token", {"entropy": "entropy", "kl": "KL"}),
    ("tokens", {"length": "mean length", "length_max": "longest"}),
    ("shares", {"gate": "pass the gate", "frac_reward_zero_std": "groups of equal rewards", "truncated": "cut off"}),
]


def draw_curves(path, history, title, phantom=False):
    """Six panels over the steps; running means of 20 steps."""
    return draw_history(path, history, PANELS, title=title, phantom=phantom, smooth=20)


def draw_edits(path, plan, drops):
    """
    The images of a plan side by side, each with its box and what its edit did to the log-probability of what the
    rollout says (nats, None: not measured).
    """
    panels = []
    taken_out = [plan.roi] * bool(plan.roi) + plan.random
    names = ["without the region"] * bool(plan.roi) + [f"without random {k + 1}" for k in range(len(plan.random))]
    for image, boxes, name, drop in zip(plan.images, [plan.roi, *taken_out], ["as it is", *names], drops, strict=True):
        colour = "tab:blue" if "random" in name else "red"
        panel = {"image": image, "name": name, "below": "" if drop is None else f"{drop:+.3f} nats", "changed": False}
        panels.append(panel | {"boxes": [(box, colour) for box in boxes]})
    draw_strip(path, [{"text": "", "panels": panels}], f"What the statement loses without a region (fill: {plan.fill})")
