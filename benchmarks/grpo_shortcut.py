"""
Does the reward keep a model from learning a shortcut? GRPO on made-up films where a black mark gives the answer away.

Usage:
    python benchmarks/grpo_shortcut.py                     # three seeds; the README says how long
    python benchmarks/grpo_shortcut.py --agreement 0.5     # GRPO's mark says nothing: does it learn to see?
    python benchmarks/grpo_shortcut.py --small --seeds 96 --arms answer default   # the short form for tests

"Is there a pleural effusion?" on films with a severe effusion or none, half and half. A weak model is fine-tuned until
the effusion and the mark begin to mean something to it, equally much. GRPO then trains it on films where the mark is
there exactly when the effusion is:

    answer      the reward is the answer alone (weights 0,1,0,0 of the additive composition)
    default     the reward as it comes: gated, with V, and its own gradient
    no gradient the default without the reward's own gradient (--cf-gradient 0)

Measured on films of other patients, greedy: accuracy with the mark as in training, without any mark, and with the mark
turned round; and on films with an effusion how many answers change when its region is filled in, minus the same for
random regions. Beside the greedy accuracy without mark stands the sampled one, the mean probability of the right one of
yes and no, which is what GRPO raises: a weak start that leans by a hair to the right side is right on many films when
greedy, and on half of them when sampled. Intervals draw patients. Writes metrics.json and shortcut.png to --out-dir.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from PIL import Image

from shared.metrics.statistics import bootstrap_interval
from shared.data.images import read_pixels
from shared.models.inputs import ImageStore
from shared.models.loading import load_vlm
from shared.models.passes import PartSize, make_prompts, write
from shared.phantom import PhantomSettings
from shared.models.tuning import BatchOrder, backward
from shared.report import plt, save_figure
from shared.runtime import InputError, fraction, load_checkpoint, positive_int, run_facts, script
from shared.runtime import seed_everything, write_json
from shared.training import Weights
from vqa_sft_grpo import train_grpo, train_sft
from vqa_sft_grpo.examples import make_examples
from vqa_sft_grpo.prompting import build_prompt, parse_response
from vqa_sft_grpo.looking import plan_edits
from vqa_sft_grpo.rollouts import score_answers
from vqa_sft_grpo.rows import make_rows, write_rows
from vqa_sft_grpo.scoring import score_answer

CONDITION = "Pleural Effusion"
ARMS = {
    "answer": ["--composition", "additive", "--weights", "0,1,0,0"],
    "default": [],
    "no gradient": ["--cf-gradient", "0"],
}
# x0, y0, x1, y1 in pixels, of 112: a black square between the lungs of a marked film; effusions lie lower
MARK = (46, 26, 66, 46)
# share of fine-tuning's films whose mark says what is true: while the mark means more to the model than the effusion,
# or less
HINTS = (0.5, 1.0)
# its steps on shuffled answers; nats by which effusion and mark move the log-odds of yes when it stops
WRITING, SEEING = 50, 0.05
FINE_TUNING = 600  # most steps of it
MARKS = {"mark says it": 1.0, "no mark": None, "mark turned round": 0.0}  # agreement of the mark with the effusion


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="(%(default)s)")
    # fmt: off
    parser.add_argument("--agreement", type=fraction, default=1.0,
        help="share of GRPO's films whose mark says what is true (%(default)s)")
    parser.add_argument("--films", type=positive_int, default=2000, help="training films (%(default)s)")
    parser.add_argument("--test-films", type=positive_int, default=600, help="(%(default)s)")
    parser.add_argument("--sft-batch-size", type=positive_int, default=32,
        help="films per step of fine-tuning (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=300,
        help="of GRPO, 16 films x 8 answers each (%(default)s)")
    # fmt: on
    parser.add_argument("--lr", type=float, default=5e-4, help="of GRPO (%(default)s)")
    parser.add_argument("--small", action="store_true", help="fewer films and steps, smaller batches")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/grpo_shortcut"))
    args = parser.parse_args(argv)
    if args.small:
        args.films, args.test_films, args.sft_batch_size, args.steps = 600, 80, 16, 60
    return args


# ---------------------------------------------------------------------------------------------------------------- films


def film_rows(split, films, seed, folder):
    """One question about the effusion per film, answered with the answer alone -> rows of prepare_data.py."""
    settings = PhantomSettings(prevalence={CONDITION: 0.75}, together={}, severities=(0, 0, 1))
    rows, _ = make_rows("phantom", split, seed=seed, image_dir=folder / "films", studies=films, settings=settings)
    asked = {
        r["image"]: r for r in reversed(rows) if r["content_type"] == "presence" and "effusion" in r["question"].lower()
    }
    return [r | {"output": json.dumps({"answer": r["answer"]})} for r in asked.values()]


def marked(rows, agreement, seed, folder):
    """
    The same rows with marked films. agreement: share of films whose mark says what is true (a mark for yes, none for
    no); 0.5: by chance; None: no mark at all.
    """
    if agreement is None:
        return rows
    folder = folder / f"marked_{seed}_{agreement}"
    folder.mkdir(parents=True, exist_ok=True)
    draw, out = random.Random(seed), []
    for row in rows:
        image = read_pixels(row["image"])
        if (row["answer"] == "yes") == (draw.random() < agreement):
            image[MARK[1] : MARK[3], MARK[0] : MARK[2]] = 0
        path = folder / Path(row["image"]).name
        Image.fromarray(image).save(path)
        out.append(row | {"image": str(path.resolve())})
    return out


# ----------------------------------------------------------------------------------------------------------- weak model


def fine_tune_weakly(args, folder, seed):
    """
    A model that writes well and to which effusion and mark mean little, and about equally much -> (its folder,
    {effusion, mark}: by how many nats each moves the log-odds of yes on validation films). First the answers are
    shuffled, so that it learns to write. Then they are right, and the mark says what is true or says nothing (HINTS),
    whichever keeps its effect beside the effusion's, until both have reached SEEING. Its answers are still a matter of
    chance. (Accuracy cannot tell that moment: the model says now yes, now no, to everything.)
    """
    rows = film_rows("train", args.films, 10 * seed, folder)
    train_rows, val_rows = ([r for r in rows if r["split"] == split] for split in ("train", "val"))
    well, ill = ([r for r in val_rows if r["answer"] == answer][:50] for answer in ("no", "yes"))
    ill_and_marked = marked(ill, 1.0, 10 * seed, folder)
    hinted = [marked(train_rows, hint, 10 * seed, folder) for hint in HINTS]
    shuffled = [r["output"] for r in train_rows]
    random.Random(seed).shuffle(shuffled)
    hinted.append([r | {"output": output} for r, output in zip(hinted[0], shuffled, strict=True)])
    seed_everything(seed)
    vlm = load_vlm("tiny:qwen2vl")
    store = ImageStore(vlm.processor, [r["image"] for some in hinted for r in some])
    examples = make_examples(vlm, sum(hinted, []), store, ("json",))
    chance, tells, scrambled = (
        BatchOrder(examples[k : k + len(train_rows)], args.sft_batch_size, 1, seed, steps=FINE_TUNING)
        for k in range(0, len(examples), len(train_rows))
    )
    parameters = list(vlm.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    effusion, mark, size = 0.0, 0.0, PartSize(args.sft_batch_size)
    for step in range(FINE_TUNING):
        vlm.model.train()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / WRITING)
        order = scrambled if step < WRITING else tells if mark < effusion else chance
        backward(vlm, order.at(step)[1], store, size, scaler, train_tower=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= WRITING and step % 4 == 3:
            vlm.model.eval()
            effusion, mark = np.diff(
                [float(log_odds(vlm, some).mean()) for some in (well, ill, ill_and_marked)]
            ).tolist()
            if min(effusion, mark) >= SEEING:
                break
    else:
        raise InputError(
            f"seed {seed}: after {FINE_TUNING} steps of fine-tuning the effusion moves the log-odds by"
            f" {effusion:.3f} nats and the mark by {mark:.3f}; more --films may help"
        )
    print(
        f"seed {seed}: fine-tuned for {step + 1} steps; the effusion moves the log-odds by {effusion:.2f} nats, the"
        f" mark by {mark:.2f}",
        flush=True,
    )
    train_sft.save_model(vlm, folder / f"sft_{seed}", {"name": "phantom with marks"})
    return folder / f"sft_{seed}", {"effusion": effusion, "mark": mark}


@torch.no_grad()
def log_odds(vlm, rows):
    """Log-odds of yes against no, of the answers as whole responses -> float32 (N,)."""
    found = []
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        asked = [build_prompt(r["question"], "json") for r in some]
        prompts = make_prompts(vlm, asked, [read_pixels(r["image"]) for r in some])
        yes, no = score_answers(vlm, prompts, [["yes", "no"]] * len(some), "json").view(-1, 2).T
        found.append((yes - no).numpy())
    return np.concatenate(found)


# --------------------------------------------------------------------------------------------------------------- tests


def answers_to(vlm, rows, regions=0, seed=0):
    """
    Greedy answers to rows -> (right (N,), flips (M, 2), groups of those M): for films with an effusion, whether the
    answer changes when its region is filled in, and the share of `regions` random regions whose filling changes it.
    """
    images = [read_pixels(r["image"]) for r in rows]
    said = write_answers(vlm, [r["question"] for r in rows], images)
    right = np.array(
        [
            bool(score_answer(a, r["answer"], r["answer_type"], r["question"])["correct"])
            for a, r in zip(said, rows, strict=True)
        ]
    )
    flips, groups = [], []
    if regions:
        for row, image, answer in zip(rows, images, said, strict=True):
            plan = plan_edits(row, image, regions, "mixed", seed) if row["answer"] == "yes" else None
            if plan is not None and plan.images:
                edited = write_answers(vlm, [row["question"]] * (1 + regions), plan.images[1:])
                flips.append((edited[0] != answer, np.mean([e != answer for e in edited[1:]])))
                groups.append(row["group"])
    return right, np.array(flips, float).reshape(-1, 2), groups


@torch.no_grad()
def write_answers(vlm, questions, images):
    texts = []
    for start in range(0, len(questions), 64):
        asked = [build_prompt(question, "json") for question in questions[start : start + 64]]
        texts += write(vlm, make_prompts(vlm, asked, images[start : start + 64]), 16)
    return [parse_response(text).answer for text in texts]


def interval(values, groups):
    """Mean with its interval over patients -> {value, low, high, n}."""
    values = np.asarray(values, float)
    found = bootstrap_interval(np.mean, values, groups=np.array(groups))
    return {name: found[name] for name in ("value", "low", "high")} | {"n": len(values)}


def measure(vlm, films):
    """-> accuracy per kind of mark, sampled without mark, and flips on the films marked as in training."""
    numbers = {}
    for name, rows in films.items():
        right, flips, groups = answers_to(vlm, rows, regions=5 if name == "mark says it" else 0)
        numbers[name] = interval(right, [r["group"] for r in rows])
        if len(flips):
            numbers["flips"] = {
                "region": float(flips[:, 0].mean()),
                "random": float(flips[:, 1].mean()),
                "difference": interval(flips[:, 0] - flips[:, 1], groups),
            }
    rows = films["no mark"]
    towards = log_odds(vlm, rows) * [1 if r["answer"] == "yes" else -1 for r in rows]
    numbers["no mark, sampled"] = interval(1 / (1 + np.exp(-towards)), [r["group"] for r in rows])
    return numbers


# ---------------------------------------------------------------------------------------------------------------- main


def draw(path, results):
    """Accuracy per kind of mark and flip difference: one dot per seed, a bar at their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained", width_ratios=(3, 1))
    arms = list(next(iter(results.values())))
    for axis, columns in ((axes[0], list(MARKS)), (axes[1], ["flips"])):
        for a, arm in enumerate(arms):
            for c, column in enumerate(columns):
                numbers = [
                    r[arm][column]["difference"] if column == "flips" else r[arm][column]
                    for r in results.values()
                    if arm in r
                ]
                values = [n["value"] for n in numbers]
                x = c + (a - (len(arms) - 1) / 2) * 0.8 / len(arms)
                axis.bar(x, np.mean(values), 0.7 / len(arms), color=f"C{a}", alpha=0.45, label=arm if c == 0 else None)
                for k, n in enumerate(numbers):
                    at = x + (k - (len(numbers) - 1) / 2) * 0.12 / len(arms)
                    axis.errorbar(
                        at,
                        n["value"],
                        [[n["value"] - n["low"]], [n["high"] - n["value"]]],
                        fmt="o",
                        ms=3,
                        lw=1,
                        color=f"C{a}",
                    )
        axis.set_xticks(range(len(columns)), columns if columns != ["flips"] else ["region - random"])
        axis.grid(axis="y", alpha=0.3)
    axes[0].axhline(0.5, color="grey", lw=0.8)
    axes[0].set(ylim=(0, 1.02), ylabel="share right", title="accuracy, by mark on the test films")
    axes[1].axhline(0, color="grey", lw=0.8)
    axes[1].set(ylabel="share of answers that change", title="flips")
    axes[0].legend(frameon=False, fontsize=8, ncols=len(arms), loc="upper right")
    save_figure(figure, path, "what GRPO learns when a mark gives the answer away", phantom=True)


@script
def main(argv=None):
    args = parse_args(argv)
    started, folder = time.time(), args.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in args.seeds:
        test_rows = film_rows("test", args.test_films, 10 * seed + 2, folder)
        films = {name: marked(test_rows, agreement, 10 * seed + 2, folder) for name, agreement in MARKS.items()}
        write_rows(
            folder / "grpo.json",
            marked(film_rows("train", args.films, 10 * seed + 1, folder), args.agreement, 10 * seed + 1, folder),
        )
        weak, nats = fine_tune_weakly(args, folder, seed)
        results[seed] = {"before": measure(load_vlm(weak), films) | {"nats": nats}}
        for arm in args.arms:
            run = folder / f"{arm.replace(' ', '_')}_{seed}"
            train_grpo.main(
                [
                    "--sft-ckpt",
                    str(weak),
                    "--data-jsonl",
                    str(folder / "grpo.json"),
                    "--out-dir",
                    str(run),
                    "--overwrite",
                    "--batch-size",
                    "16",
                    "--num-generations",
                    "8",
                    "--lora-rank",
                    "32",
                    "--max-new-tokens",
                    "16",
                    "--steps",
                    str(args.steps),
                    "--eval-every",
                    str(args.steps),
                    "--lr",
                    str(args.lr),
                    "--seed",
                    str(seed),
                    "--device",
                    "cpu",
                    *ARMS[arm],
                ]
            )
            results[seed][arm] = measure(last_policy(weak, run), films)
            show(seed, results[seed])
            write_json(
                folder / "metrics.json",
                {
                    "dataset": "phantom",
                    "condition": CONDITION,
                    "results": results,
                    "settings": vars(args) | {"out_dir": str(folder)},
                    **run_facts(started, "cpu"),
                },
            )
            draw(folder / "shortcut.png", results)
    print(f"results in {folder} ({time.time() - started:.0f} s)")
    return results


def last_policy(weak, run):
    """The policy after the last step: the one that validation would choose looks best where the mark is."""
    vlm = train_grpo.load_policy(
        train_grpo.parse_args(["--sft-ckpt", str(weak), "--lora-rank", "32"]), torch.device("cpu")
    )
    Weights(vlm.model).load_state_dict(load_checkpoint(run / "last.pt", ("parts",))["parts"]["weights"])
    return vlm


def show(seed, of_seed):
    columns = list(MARKS)
    columns.insert(columns.index("no mark") + 1, "no mark, sampled")
    print(
        f"| seed {seed} | {' | '.join(columns)} | flips: region | random | difference |\n|{'---|' * (len(columns) + 4)}"
    )
    for arm, numbers in of_seed.items():
        shares, flips = [numbers[name] for name in columns] + [numbers["flips"]["difference"]], numbers["flips"]
        *shares, difference = [f"{n['value']:.1%} [{100 * n['low']:.1f}, {100 * n['high']:.1f}]" for n in shares]
        print(
            f"| {arm} | {' | '.join(shares)} | {flips['region']:.1%} | {flips['random']:.1%} | {difference} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
