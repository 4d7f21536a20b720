"""
Does the reward keep a model from learning a shortcut? Training on made-up films where a black mark gives the answer
away, of a model that writes a caption before it answers.

Usage:
    python benchmarks/grpo_shortcut.py                     # three seeds; docs/results/vqa_sft_grpo.md says how long
    python benchmarks/grpo_shortcut.py --agreement 0.5     # the mark says nothing: what is learned then?
    python benchmarks/grpo_shortcut.py --small --seeds 96 --arms answer default   # the short form for tests

"Is there a pleural effusion?" on films with a severe effusion or none, half and half, answered as {"caption": ...,
"answer": ...}. A weak model is fine-tuned until the effusion and the mark begin to mean something to it, equally much.
Then it is trained on other films, where the mark is there exactly when the effusion is, in one of these ways, each as
many steps of 8 films and with a LoRA adapter of the same size:

    fine-tuning      cross entropy on the right responses
    edited films     the same, and each film twice more: without its effusion, which makes the answer no, and without a
                     random region of that size, which leaves it as it is (for a "no" the latter alone)
    fine-tuning + V  cross entropy on the right responses, and V's gradient on them; nothing is sampled
    answer           GRPO, the reward is the answer alone (weights 0,1,0,0 of the additive composition)
    default          GRPO, the reward as it comes: gated, with V, and its own gradient

All but the first and the fourth know the gold regions. Measured is what a user gets: the adapter with the best
validation (on marked films, as in training), loaded as evaluate.py loads it, greedy, on films of other patients:
accuracy with the mark as in training, without any mark, and with the mark turned round; without any mark the share of
the films with an effusion that are answered yes, and no when drawn anew without it; and the gap, on the films as in
training: by how much more the log-probability of what the response says falls without the effusion's region than
without random ones. Intervals draw patients. Writes metrics.json and shortcut.png to --out-dir.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from PIL import Image

from shared.data.images import read_pixels
from shared.models.inputs import ImageStore
from shared.models.loading import load_vlm
from shared.models.passes import PartSize, make_prompts, stop_tokens
from shared.models.tuning import BatchOrder, backward
from shared.phantom import PhantomSettings
from shared.report import plt, save_figure
from shared.runtime import InputError, fraction, not_negative, positive_int, run_facts, script, seed_everything
from shared.runtime import write_json
from shared.training import GuardedStep, Weights, learning_rate
from vqa_sft_grpo import train_grpo, train_sft
from vqa_sft_grpo.answers import ask, load_images
from vqa_sft_grpo.asking import Answerer, load_model
from vqa_sft_grpo.examples import make_examples
from vqa_sft_grpo.looking import Statement, plan_edits
from vqa_sft_grpo.measures import rate
from vqa_sft_grpo.prompting import build_prompt, build_target
from vqa_sft_grpo.rewards import AnswerFrequencies, RewardSettings
from vqa_sft_grpo.rollouts import Batch, Policy, image_of, row_at, score_statements, with_size
from vqa_sft_grpo.rows import make_rows, write_rows

CONDITION = "Pleural Effusion"
CAPTIONS = "Frontal film.", "Frontal film of the chest."  # in front of the answer; they say nothing of the matter
TAUGHT = ("fine-tuning", "edited films", "fine-tuning + V")
SAMPLED = {"answer": ["--composition", "additive", "--weights", "0,1,0,0"], "default": []}
ARMS = (*TAUGHT, *SAMPLED)
# x0, y0, x1, y1 in pixels, of 112: a black square between the lungs of a marked film; effusions lie lower
MARK = (46, 26, 66, 46)
# share of fine-tuning's films whose mark says what is true: while the mark means more to the model than the effusion,
# or less
HINTS = (0.5, 1.0)
# its steps on shuffled responses; nats by which effusion and mark move the log-odds of yes when it stops
WRITING, SEEING = 50, 0.3
FINE_TUNING = 600  # most steps of it
BATCH = 8  # films per step of every arm
ANSWER_WEIGHT = 5.0  # of the answer in its loss: one token of a dozen that say nothing
MARKS = {"mark says it": 1.0, "no mark": None, "mark turned round": 0.0}  # agreement of the mark with the effusion


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 14, 15], help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="(all)")
    parser.add_argument("--agreement", type=fraction, default=1.0,
        help="share of the films trained on whose mark says what is true (%(default)s)")
    parser.add_argument("--films", type=positive_int, default=1000, help="training films (%(default)s)")
    parser.add_argument("--test-films", type=positive_int, default=200, help="(%(default)s)")
    parser.add_argument("--sft-batch-size", type=positive_int, default=16,
        help="films per step of the weak model's fine-tuning (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=240,
        help="of every arm, 8 films each; GRPO writes 8 responses to each (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of every arm (%(default)s)")
    parser.add_argument("--cf-gradient", type=not_negative, default=8.0, help="of the arms with V (%(default)s)")
    parser.add_argument("--small", action="store_true", help="fewer films and steps, smaller batches")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/grpo_shortcut"))
    # fmt: on
    args = parser.parse_args(argv)
    if args.small:
        args.films, args.test_films, args.steps = 600, 80, 40
    return args


# ---------------------------------------------------------------------------------------------------------------- films


def film_rows(split, films, seed, args):
    """One question about the effusion per film, answered with a caption and the answer -> rows of prepare_data.py."""
    settings = PhantomSettings(prevalence={CONDITION: 0.75}, together={}, severities=(0, 0, 1))
    pictures = args.out_dir / "films"
    rows, _ = make_rows("phantom", split, seed=seed, image_dir=pictures, studies=films, settings=settings)
    asked = {
        r["image"]: r for r in reversed(rows) if r["content_type"] == "presence" and "effusion" in r["question"].lower()
    }
    draw = random.Random(seed)
    for row in asked.values():
        row["output"] = json.dumps({"caption": draw.choice(CAPTIONS), "answer": row["answer"]})
    return list(asked.values())


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
    rows = film_rows("train", args.films, 10 * seed, args)
    train_rows, val_rows = ([r for r in rows if r["split"] == split] for split in ("train", "val"))
    well, ill = ([r for r in val_rows if r["answer"] == answer][:25] for answer in ("no", "yes"))
    ill_and_marked = marked(ill, 1.0, 10 * seed, folder)
    hinted = [marked(train_rows, hint, 10 * seed, folder) for hint in HINTS]
    shuffled = [r["output"] for r in train_rows]
    random.Random(seed).shuffle(shuffled)
    hinted.append([r | {"output": output} for r, output in zip(hinted[0], shuffled, strict=True)])
    seed_everything(seed)
    vlm = load_vlm("tiny:qwen2vl")
    store = ImageStore(vlm.processor, [r["image"] for some in hinted for r in some])
    examples = make_examples(vlm, sum(hinted, []), store, ("json",), answer_weight=ANSWER_WEIGHT)
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


def response(vlm, answer):
    """-> Statement of a whole response, with the token that ends it."""
    ids = vlm.tokenizer(json.dumps({"caption": CAPTIONS[0], "answer": answer}))["input_ids"] + stop_tokens(vlm)[:1]
    return Statement(tuple(ids), (True,) * len(ids), False)


@torch.no_grad()
def log_odds(vlm, rows):
    """Log-odds of a response that says yes against one that says no, nats -> float32 (N,)."""
    pair = [response(vlm, answer) for answer in ("yes", "no")]
    found = []
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        asked = [build_prompt(r["question"], "json") for r in some]
        prompts = make_prompts(vlm, asked, [read_pixels(r["image"]) for r in some])
        yes, no = score_statements(vlm, prompts, [pair] * len(some))[:, 1].view(-1, 2).T
        found.append((yes - no).numpy())
    return np.concatenate(found)


# ----------------------------------------------------------------------------------------------------------------- arms


def options(args, weak, seed, arm, run):
    """The command line of train_grpo.py for an arm; the taught ones take their settings from it too."""
    # fmt: off
    return [
        "--sft-ckpt", str(weak), "--data-jsonl", str(args.out_dir / "train.json"), "--out-dir", str(run), "--overwrite",
        "--batch-size", str(BATCH), "--num-generations", "8", "--lora-rank", "32", "--max-new-tokens", "24",
        "--steps", str(args.steps), "--eval-every", str(max(1, args.steps // 4)), "--eval-rows", "60",
        "--lr", str(args.lr), "--cf-gradient", str(args.cf_gradient), "--seed", str(seed), "--device", "cpu",
        *SAMPLED.get(arm, []),
    ]
    # fmt: on


def teach(arm, settings, run):
    """
    The arms without sampling: cross entropy on the right responses, in the same loop and with the same validation as
    GRPO's. The policy's loss with an advantage of 1 for every response, on policy and without KL, is their cross
    entropy, and V's gradient the same as there. settings: of options() -> the folder with the best adapter.
    """
    args = train_grpo.parse_args(settings)
    rows, val_rows, facts = train_grpo.load_rows(args)
    seed_everything(args.seed)
    vlm = train_grpo.load_policy(args, torch.device("cpu"))
    reward = RewardSettings(args.composition, args.weights, args.max_new_tokens, args.style)
    judge = Policy(vlm, args, reward)
    plain = SimpleNamespace(**vars(args) | {"beta": 0.0, "num_generations": 1, "micro_batch": 128})
    policy = Policy(vlm, plain, reward, AnswerFrequencies(rows))
    weights = Weights(vlm.model)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard, best = GuardedStep(optimizer, scaler, weights.values(), args.grad_clip), None
    for step in range(args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            found = train_grpo.validate(judge, val_rows)
            if best is None or train_grpo.rank_of(found) > train_grpo.rank_of(best):
                best = found
                train_grpo.save_adapter(vlm, run, facts)
            told = {name: found[name] for name in ("val_accuracy", "val_v", "val_gap") if found[name] is not None}
            told = "  ".join(f"{name} {value:.3f}" for name, value in told.items())
            print(f"{arm}, step {step}: {told}", flush=True)
        if step == args.steps:
            break
        places = list(range(step * args.batch_size, (step + 1) * args.batch_size))
        shown = [rows[row_at(p, len(rows), args.seed)] for p in places]
        images = [image_of(row) for row in shown]
        shown = [with_size(row, image) for row, image in zip(shown, images, strict=True)]
        if arm == "edited films":
            shown, images = with_edits(shown, images, places, args)
        prompts = policy.prompts_of([row["question"] for row in shown], images)
        groups = [[vlm.tokenizer(build_target(row))["input_ids"] + stop_tokens(vlm)[:1]] for row in shown]
        if arm == "fine-tuning + V":
            batch = policy.score(shown, images, places, prompts, groups)
        else:
            batch = Batch(rows=shown, prompts=prompts, groups=groups, texts=[""] * len(shown))
        loss, _ = policy.loss_and_gradient(batch, torch.ones(len(shown)), None, None, scaler)
        if arm == "fine-tuning + V":
            policy.reward_gradient(batch, scaler)
        guard.step(loss, learning_rate(step, args.steps, round(args.warmup * args.steps), args.lr))
    return run


def with_edits(rows, images, places, args):
    """Each film, and where it has them, without its effusion (the answer is no then) and without a random region."""
    more, edited = list(rows), list(images)
    for row, image, place in zip(rows, images, places, strict=True):
        plan = plan_edits(row, image, 1, args.cf_fill, [args.seed, place])
        for n, film in enumerate(plan.images[1:]):
            gone = {"answer": "no"} if plan.roi and n == 0 else {}
            more.append(row | {"output": json.dumps(json.loads(row["output"]) | gone)})
            edited.append(film)
    return more, edited


# --------------------------------------------------------------------------------------------------------------- tests


def measure(adapter, films):
    """The model that evaluate.py would load from a folder -> its numbers on {kind of mark: rows}."""
    vlm = load_model(SimpleNamespace(model=None, adapter=str(adapter), quant="none"), torch.device("cpu"))
    answerer, numbers = Answerer(vlm, max_new_tokens=24), {}
    for name, rows in films.items():
        records = ask(answerer, rows, load_images(rows)[0], "json")
        numbers[name] = rate([r["correct"] for r in records], [r["group"] for r in rows])
        if name == "no mark":
            ill = [i for i, row in enumerate(rows) if row.get("redrawn")]
            gone = [rows[i] | {"image": rows[i]["redrawn"]} for i in ill]
            without = ask(answerer, gone, load_images(gone)[0], "json")
            both = [bool(records[i]["correct"]) and r["key"] == "no" for i, r in zip(ill, without, strict=True)]
            numbers["redrawn"] = rate(both, [rows[i]["group"] for i in ill])
        if name == "mark says it":
            numbers["gap"] = gap(vlm, [row for row in rows if row["answer"] == "yes"])
    return numbers


def gap(vlm, rows):
    """nats, on the greedy responses to films with an effusion; one that cannot be read is left out and counted."""
    args = train_grpo.parse_args(["--max-new-tokens", "24"])
    policy, found = Policy(vlm, args, RewardSettings(max_tokens=24)), []
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        found += policy.roll_out(some, list(range(start, start + len(some))), None).terms
    known = [i for i, t in enumerate(found) if t["d_roi"] is not None]
    values = [found[i]["d_roi"] - found[i]["d_rand"] for i in known]
    return rate(values, [rows[i]["group"] for i in known]) | {"not_measured": len(rows) - len(known)}


# ---------------------------------------------------------------------------------------------------------------- main


COLUMNS = (*MARKS, "redrawn", "gap")


def draw(path, results):
    """One dot per seed with its interval, a bar at their mean; accuracies on the left, the gap on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(5, 1.4))
    arms = [arm for arm in ("before", *ARMS) if any(arm in r for r in results.values())]
    for axis, columns in ((axes[0], [c for c in COLUMNS if c != "gap"]), (axes[1], ["gap"])):
        for a, arm in enumerate(arms):
            for c, column in enumerate(columns):
                numbers = [r[arm][column] for r in results.values() if arm in r and r[arm][column]["n"]]
                if not numbers:
                    continue
                x = c + (a - (len(arms) - 1) / 2) * 0.85 / len(arms)
                mean = np.mean([n["value"] for n in numbers])
                axis.bar(x, mean, 0.75 / len(arms), color=f"C{a}", alpha=0.45, label=arm if c == 0 else None)
                for k, n in enumerate(numbers):
                    at = x + (k - (len(numbers) - 1) / 2) * 0.15 / len(arms)
                    span = [[n["value"] - n["low"]], [n["high"] - n["value"]]]
                    axis.errorbar(at, n["value"], span, fmt="o", ms=2.5, lw=0.8, color=f"C{a}")
        axis.set_xticks(range(len(columns)), columns)
        axis.grid(axis="y", alpha=0.3)
    axes[0].axhline(0.5, color="grey", lw=0.8)
    axes[0].set(
        ylim=(0, 1.25),
        yticks=np.linspace(0, 1, 6),
        ylabel="share of films",
        title="right, by mark; right with the effusion and without it (redrawn)",
    )
    axes[1].axhline(0, color="grey", lw=0.8)
    axes[1].set(ylabel="nats", title="region - random")
    axes[0].legend(frameon=False, fontsize=8, ncols=len(arms), loc="upper right")
    save_figure(figure, path, "what is learned where a mark gives the answer away", phantom=True)


@script
def main(argv=None):
    args = parse_args(argv)
    started, folder = time.time(), args.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in args.seeds:
        test_rows = film_rows("test", args.test_films, 10 * seed + 2, args)
        films = {name: marked(test_rows, agreement, 10 * seed + 2, folder) for name, agreement in MARKS.items()}
        rows = marked(film_rows("train", args.films, 10 * seed + 1, args), args.agreement, 10 * seed + 1, folder)
        write_rows(folder / "train.json", rows)
        weak, nats = fine_tune_weakly(args, folder, seed)
        results[seed] = {"before": measure(weak, films) | {"nats": nats}}
        for arm in args.arms:
            run, begin = folder / f"{arm.replace(' ', '_')}_{seed}", time.process_time()
            settings = options(args, weak, seed, arm, run)
            if arm in SAMPLED:
                train_grpo.main(settings)
            else:
                run.mkdir(parents=True, exist_ok=True)
                teach(arm, settings, run)
            seconds = time.process_time() - begin
            results[seed][arm] = measure(run, films) | {"seconds": seconds}
            show(seed, results[seed])
            write_json(folder / "metrics.json", {
                "dataset": "phantom", "condition": CONDITION, "results": results,
                "settings": vars(args) | {"out_dir": str(folder)}, **run_facts(started, "cpu"),
            })  # fmt: skip
            draw(folder / "shortcut.png", results)
    print(f"results in {folder} ({time.time() - started:.0f} s)")
    return results


def show(seed, of_seed):
    print(f"| seed | training | {' | '.join(COLUMNS)} | seconds |\n|{'---|' * (len(COLUMNS) + 3)}")
    for arm, numbers in of_seed.items():
        cells = []
        for name in COLUMNS:
            n, times, digits = numbers[name], *((1, 2) if name == "gap" else (100, 0))
            value, low, high = (f"{times * (n[k] or 0):.{digits or 1}f}" for k in ("value", "low", "high"))
            cells.append(f"{value} [{low}, {high}]" if n["n"] else "nothing to measure")
        print(f"| {seed} | {arm} | {' | '.join(cells)} | {numbers.get('seconds', 0):.0f} |", flush=True)


if __name__ == "__main__":
    main()
