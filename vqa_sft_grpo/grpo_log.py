"""
What a GRPO run tells: numbers of a step, a line per rollout, a table of completions, curves, and the edited images
behind a reward.

Used by train_grpo.py; nothing here changes the training.
"""

import json
from collections import Counter

import matplotlib
import numpy as np
from PIL import Image

from shared.runtime import atomic_file, plain
from vqa_sft_grpo.infer import draw_boxes, with_caption
from vqa_sft_grpo.rewards import gold_of
from vqa_sft_grpo.scoring import normalise

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
        "mean over these of drop without the region minus mean drop without a random one, nats per token, not clipped"
    ),
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
        "most_frequent_answer": said.most_common(1)[0][1] / len(terms),
        "most_frequent_gold": gold.most_common(1)[0][1] / len(batch.rows),
        "length": mean(lengths),
        "length_min": min(lengths),
        "length_max": max(lengths),
        "tokens": sum(lengths),
    }


def log_rollouts(path, batch, advantages, step, size):
    """
    One line per rollout: id, question, text, every term and the advantage; and how to make its edited images again.
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
                "text": text,
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

    def cell(text):
        return str(text).replace("|", "\\|").replace("\n", " ")

    lines = [f"Answers of step {step}. V: how much more the gold region matters than random ones.", ""]
    for q in sorted(range(len(batch.rows)), key=lambda q: -np.ptp(batch.rewards[q * size : (q + 1) * size]))[:most]:
        row = batch.rows[q]
        lines += [
            f"**{cell(row['question'])}** gold: {cell(gold_of(row))}",
            "",
            "| id | reward | advantage | right | box | V | penalty | text |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for n in range(q * size, (q + 1) * size):
            t = batch.terms[n]
            numbers = [
                "" if x is None else f"{x:.2f}"
                for x in (
                    t["reward"],
                    advantages[n].item(),
                    float(t["correct"]),
                    t["box"],
                    t["counterfactual"],
                    t["penalty"],
                )
            ]
            lines.append(f"| {step}.{q}.{n - q * size} | {' | '.join(numbers)} | {cell(batch.texts[n][:300])} |")
        lines.append("")
    with atomic_file(path, "w") as file:
        file.write("\n".join(lines))


CURVES = (
    (("reward", "mean reward"), ("reward_std", "its spread")),
    (("correct", "sampled answers"), ("val_accuracy", "validation, greedy")),
    (("gap", "training"), ("val_gap", "validation")),
    (("entropy", "entropy"), ("kl", "KL")),
    (("length", "mean length"), ("length_max", "longest")),
    (("gate", "pass the gate"), ("frac_reward_zero_std", "groups of equal rewards"), ("truncated", "cut off")),
)
CURVE_TITLES = ("reward", "share right", "gap: region minus random, nats", "nats per token", "tokens", "shares")


def draw_curves(path, history, title):
    """Six panels over the steps; training numbers as running means of up to 20 steps."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for axis, lines, name in zip(axes.flat, CURVES, CURVE_TITLES, strict=True):
        for key, label in lines:
            points = [(r["step"], r[key]) for r in history if r.get(key) is not None]
            if not points:
                continue
            steps, values = map(np.array, zip(*points, strict=True))
            if not key.startswith("val_") and len(values) > 40:
                values = np.array([values[max(0, i - 19) : i + 1].mean() for i in range(len(values))])
            axis.plot(
                steps,
                values,
                marker="." if key.startswith("val_") or len(values) < 3 else None,
                label=label,
                linewidth=1.3,
            )
        axis.set(title=name, xlabel="step")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def draw_edits(path, plan, drops):
    """
    The images of a plan side by side, each with its box and what its edit did to the log-probability of the answer
    (nats per token, None: not measured).
    """
    names = (
        ["as it is"]
        + ["without the region"] * bool(plan.roi)
        + [f"without random {k + 1}" for k in range(len(plan.random))]
    )
    pages = [
        with_caption(
            draw_boxes(picture, boxes, width=224), name + ("" if drop is None else f"\n{drop:+.3f} nats"), size=12
        )
        for picture, boxes, name, drop in zip(
            plan.images, [plan.roi] + [plan.roi] * bool(plan.roi) + plan.random, names, drops, strict=True
        )
    ]
    sheet = Image.new(
        "RGB", (sum(p.width for p in pages) + 6 * (len(pages) - 1), max(p.height for p in pages)), "white"
    )
    left = 0
    for page in pages:
        sheet.paste(page, (left, 0))
        left += page.width + 6
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
