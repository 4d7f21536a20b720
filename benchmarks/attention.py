"""
What reading attention costs, and whether attention_viz can tell a model that looks from one that does not.

Usage:
    python benchmarks/attention.py cost            # capture beside plain sdpa and output_attentions=True, all families
    python benchmarks/attention.py train           # the tiny pair, from nothing: each once to look, once blind
    python benchmarks/attention.py proof           # evaluate.py on these four; needs `train`
    python benchmarks/attention.py train proof --small        # the short form for tests: nothing is learned

cost: generation of --new-tokens tokens after about --prompt-tokens, image included; plain and with capture take turns,
medians of --rounds. Bytes are counted: of the rows that capture keeps for the image's columns, and of every matrix that
output_attentions=True returns. Memory: growth of the process's peak over that of plain sdpa (Linux).
train: tiny:gemma3 (64 image tokens) and tiny:llava learn to answer yes/no questions about three findings on phantom
films, in many wordings. "sees" has questions whose words do not tell the answer; "blind" has questions whose words
tell it (guessable), and a grey picture or another patient's film in place of every film. Seconds are counted.
proof: 100 studies x 6 wordings twice: as trained (the causal filter, methods ranked by hit rate) and guessable, where
both are right and only the report can tell them apart. Writes --out-dir/metrics.json beside the models and reports.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from attention_viz.cases import phantom_settings, wordings_of
from attention_viz.evaluate import main as evaluate
from attention_viz.maps import shares_in_boxes
from shared.models.capture import AttentionCapture
from shared.models.inputs import ImageStore, continuation, prompt_ids
from shared.models.loading import load_vlm, save_vlm
from shared.models.passes import PartSize, features_of, image_columns, make_prompts, margin, sample
from shared.models.tiny import tiny_folder
from shared.models.tuning import BatchOrder, Example, backward
from shared.phantom import phantom_study
from shared.report import number, with_interval
from shared.runtime import atomic_folder, pick_device, positive_float, positive_int, read_json, run_facts, script
from shared.runtime import seed_everything, write_json
from shared.training import GuardedStep, learning_rate

CONDITIONS = ["Pleural Effusion", "Pneumothorax", "Consolidation"]
TRAINED = {"gemma3": dict(image_tokens=64), "llava": {}}
WIDE = dict(hidden=512, layers=12, heads=8, mlp=1024, image_size=224)  # cost: wide enough that all else is not nothing
FAMILIES = ("gemma3", "qwen2vl", "qwen25vl", "qwen3vl", "llava")
SIZE, GRID = 112, (8, 8)  # pixels, image tokens
FRESH = 400_000  # index of the first film that training watches itself on


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("parts", nargs="+", choices=["cost", "train", "proof"], help="what to do, in this order")
    parser.add_argument("--models", nargs="+", default=list(TRAINED), choices=list(TRAINED),
        help="train, proof: which (%(default)s)")
    parser.add_argument("--films", type=positive_int, default=6000, help="train: phantom films (%(default)s)")
    parser.add_argument("--tower-steps", type=positive_int, default=600,
        help="train: steps of the tower alone, before (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=2000, help="train: optimiser steps (%(default)s)")
    parser.add_argument("--blind-steps", type=positive_int, default=1000, help="train: of the blind ones (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="train: questions per step (%(default)s)")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="train: highest learning rate (%(default)s)")
    parser.add_argument("--studies", type=positive_int, default=100, help="proof: studies of each set (%(default)s)")
    parser.add_argument("--prompt-tokens", type=positive_int, default=1000, help="cost: of the prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=positive_int, default=16, help="cost: generated (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=7, help="cost: turns of each (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a few steps of everything")
    # fmt: on
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/attention"))
    args = parser.parse_args(argv)
    if args.small:
        args.films, args.steps, args.blind_steps, args.batch_size, args.studies = 12, 2, 2, 4, 6
        args.tower_steps = 2
        args.prompt_tokens, args.new_tokens, args.rounds = 100, 3, 1
    return args


# ------------------------------------------------------------------------------------------------------------ training


def questions(films, settings, seed, start=0, variants=9):
    """
    -> films uint8 (N, 112, 112); (film, question, answer) about CONDITIONS in many wordings; and which cells of the
    token grid each finding covers, float32 (N, 64, 3). For training the answer goes on with what is on the film and
    where (tenths of its sides): one word alone is learned too late.
    """
    pixels, cases, cells = [], [], []
    for film in range(films):
        study = phantom_study(seed, start + film, SIZE, settings)
        pixels.append(study.image)
        places = [[b for f in study.drawn if f.condition == c for b in study.boxes[f.name]] for c in CONDITIONS]
        cells.append(np.stack([shares_in_boxes(p, GRID, (0, 0, SIZE, SIZE), 4).ravel() for p in places], 1) > 0.3)
        boxes = [(f.kind, box) for f in study.drawn for box in study.boxes[f.name]]
        seen = [f"{kind} {5 * (x0 + x1) // SIZE} {5 * (y0 + y1) // SIZE}" for kind, (x0, y0, x1, y1) in boxes]
        told = ". " + ("; ".join(seen) or "nothing") if variants > 1 else ""
        for q in study.questions:
            if q.content == "presence" and q.condition in CONDITIONS:
                words = wordings_of(q, film, variants)
                cases += [(film, w["question"], w["answer_gt"] + told) for w in [*words, words[0]][: variants + 1]]
    return pixels, cases, np.stack(cells).astype(np.float32)


def teach_tower(vlm, store, cells, steps, batch, lr, seed):
    """
    Vision tower and projector learn which cells the findings cover, through a linear layer that is then thrown away:
    what the towers of real models bring along from their own training, and without which tiny ones take far longer.
    """
    width = vlm.config.get_text_config().hidden_size
    head = torch.nn.Linear(width, len(CONDITIONS))
    weights = [p for part in (vlm.spec.tower, *vlm.spec.projector) for p in vlm.base.get_submodule(part).parameters()]
    optimizer = torch.optim.AdamW([*weights, *head.parameters()], lr=lr, weight_decay=0.01)
    draw, losses = np.random.default_rng(seed), []
    for step in range(steps):
        some = draw.integers(len(store), size=batch)
        features = torch.stack(features_of(vlm, store.get(some.tolist())))
        wanted = torch.from_numpy(cells[some])
        loss = F.binary_cross_entropy_with_logits(head(features), wanted, pos_weight=torch.tensor(5.0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, max(1, steps // 20), lr)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"tower: step {step + 1}/{steps}, loss {statistics.mean(losses[-50:]):.4f}", flush=True)


@torch.no_grad()
def accuracy(vlm, films, cases):
    """Share of yes/no questions answered rightly by the margin."""
    right = []
    for k in range(0, len(cases), 50):
        some = cases[k : k + 50]
        said = margin(vlm, make_prompts(vlm, [q for _, q, _ in some], [films[f] for f, _, _ in some]))
        right += [(m > 0) == (a == "yes") for m, (_, _, a) in zip(said.tolist(), some, strict=True)]
    return statistics.mean(right)


def train(family, blind, args):
    """-> folder of the model; beside it a JSON file with seconds and accuracy on films of other patients."""
    folder = args.out_dir / f"{family}-{'blind' if blind else 'sees'}"
    begin = time.time()
    seed_everything(args.seed)
    vlm = load_vlm(str(tiny_folder(f"tiny:{family}", **TRAINED[family])))
    settings = phantom_settings(CONDITIONS, severe=True, guessable=float(blind))
    films, cases, cells = questions(args.films, settings, args.seed)
    fresh_films, fresh, _ = questions(150, settings, args.seed, start=FRESH, variants=1)
    cases = [(film, q, a.partition(".")[0] if blind else a) for film, q, a in cases]
    steps, grey = args.blind_steps if blind else args.steps, np.full((SIZE, SIZE), 90, np.uint8)
    if blind:  # half of them grey, half from another patient: films alone would be unlike all it has seen
        films, fresh_films = (
            [grey if i % 2 else some[i - len(some) // 2] for i in range(len(some))] for some in (films, fresh_films)
        )
    store = ImageStore(vlm.processor, films, budget_gib=1.0)
    grid = tuple(store.grids[0])
    texts = {answer: np.array(continuation(vlm, answer, end=True)[0], np.int32) for _, _, answer in cases}
    prompts = {question: prompt_ids(vlm, question, (grid,)) for _, question, _ in cases}
    examples = [
        Example(
            i, "plain", store.number_of[film], prompts[question], texts[answer], np.ones_like(texts[answer], np.float32)
        )
        for i, (film, question, answer) in enumerate(cases)
    ]
    order = BatchOrder(examples, args.batch_size, 1, args.seed, steps=steps)  # many films a step
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.95))
    scaler, size = torch.amp.GradScaler("cpu", enabled=False), PartSize(args.batch_size)
    guard = GuardedStep(optimizer, scaler, vlm.model.parameters(), grad_clip=1.0)
    losses = []
    if not blind:
        vlm.model.train()
        teach_tower(vlm, store, cells, args.tower_steps, args.batch_size, args.lr, args.seed)
    for step in range(steps):
        vlm.model.train()
        loss = backward(vlm, order.at(step)[1], store, size, scaler, train_tower=True).item()
        guard.step(loss, learning_rate(step, steps, max(1, steps // 20), args.lr))
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            right = accuracy(vlm, fresh_films, fresh)
            print(f"{folder.name}: step {step + 1}/{steps}, loss {statistics.mean(losses[-50:]):.4f}, "
                  f"right on fresh films {right:.3f}, {time.time() - begin:.0f} s", flush=True)  # fmt: skip
    with atomic_folder(folder) as building:
        save_vlm(vlm, building)
    facts = dict(
        films=len(films), examples=len(examples), steps=steps, batch=args.batch_size, phantom=True, blind=blind
    )
    facts |= dict(conditions=CONDITIONS, seed=args.seed, loss=statistics.mean(losses[-50:]), fresh_accuracy=right)
    write_json(folder.with_suffix(".json"), facts | run_facts(begin, "cpu"))
    return folder


# --------------------------------------------------------------------------------------------------------------- proof


def prove(args):
    """evaluate.py on what `train` left -> a row per model and set of questions."""
    rows = []
    for family in args.models:
        for guessable in (0, 1):
            out = args.out_dir / f"{family}-{'guessable' if guessable else 'report'}"
            models = [str(args.out_dir / f"{family}-{kind}") for kind in ("sees", "blind")]
            begin = time.time()
            more = ["--bootstrap", 200] if args.small else [] if guessable else ["--faithfulness", 20]
            evaluate(["--models", *models, "--conditions", *CONDITIONS, "--severe", "--guessable", guessable,
                      "--image-size", SIZE, "--n-studies", args.studies, "--seed", args.seed, "--device", "cpu",
                      "--out-dir", out, "--overwrite", *more])  # fmt: skip
            stats = read_json(out / "stats.json")
            for name, m in stats["models"].items():
                group = next(iter(m["localisation"]), None)
                best = m["localisation"].get(group, {}).get(m["best_map"]) or {}
                rows.append({
                    "model": Path(name).name, "questions": "guessable" if guessable else "not guessable",
                    "accuracy": m["behaviour"]["accuracy"], "verdict": m["verdict"]["says"], "best_map": m["best_map"],
                    "group": group, "n": best.get("n"), "hit_over_chance": best.get("hit_over_chance"),
                    "above_mean_map": best.get("against_mean_map"), "seconds_of_both": time.time() - begin,
                })  # fmt: skip
    print("\n| model | questions | accuracy | verdict | best map | cases | hit / chance | above its mean map, % |")
    print("|---" * 8 + "|")
    for r in rows:
        shown = [r["model"], r["questions"], with_interval(r["accuracy"]), r["verdict"], r["best_map"],
                 f"{r['n']} {r['group']}", with_interval(r["hit_over_chance"], number),
                 with_interval(r["above_mean_map"])]  # fmt: skip
        print(f"| {' | '.join(map(str, shown))} |")
    return rows


# ---------------------------------------------------------------------------------------------------------------- cost


def memory(name):
    """VmRSS (now) or VmHWM (peak) of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def grown(work):
    """work() -> (what it returns, MiB by which the peak of this process rose meanwhile)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result = work()
    return result, max(0.0, memory("VmHWM") - before)


def cost(family, args):
    """-> a row: seconds and memory of generation, plain and captured, and the bytes either way of keeping attention."""
    sizes = {} if args.small else WIDE | (dict(image_tokens=256) if family == "gemma3" else {})
    vlm = load_vlm(str(tiny_folder(f"tiny:{family}", **sizes)))
    image = phantom_study(0, 0, 224).image
    question = "Is there a pleural effusion? "
    one = len(make_prompts(vlm, [question], [image])[0])
    each = (len(make_prompts(vlm, [question * 11], [image])[0]) - one) / 10
    question *= 1 + max(0, round((args.prompt_tokens - one) / each))
    prompts = make_prompts(vlm, [question], [image])
    keys = image_columns(vlm, prompts)

    def plain():
        return sample(vlm, prompts, 1, args.new_tokens)[0]

    def captured():
        with AttentionCapture(vlm.model, keys=keys) as capture:
            written = sample(vlm, prompts, 1, args.new_tokens)[0]
        return written, sum(step.weights.nbytes for step in capture.steps)

    assert plain() == captured()[0]
    seconds = {plain: [], captured: []}
    for _ in range(args.rounds):
        for work in seconds:
            begin = time.perf_counter()
            work()
            seconds[work].append(time.perf_counter() - begin)
    (_, plain_mib), ((_, kept), captured_mib) = grown(plain), grown(captured)
    (whole, steps), eager_mib = grown(lambda: all_attentions(vlm.source, question, image, args.new_tokens))
    times = [statistics.median(seconds[work]) for work in (plain, captured)]
    return {
        "family": family, "prompt_tokens": len(prompts[0]), "image_tokens": int((keys >= 0).sum()),
        "new_tokens": len(plain()[0][0]), "seconds_plain": times[0], "seconds_captured": times[1],
        "overhead": times[1] / times[0] - 1, "bytes_rows": kept, "bytes_all": whole, "fewer": whole / kept,
        "steps_of_eager": steps, "mib_plain": plain_mib, "mib_captured": captured_mib, "mib_eager": eager_mib,
    }  # fmt: skip


@torch.no_grad()
def all_attentions(source, question, image, new_tokens):
    """The same by generate(output_attentions=True) -> bytes of all matrices it returns, and how many steps."""
    vlm = load_vlm(source, attention="eager")
    content = [{"type": "image", "image": Image.fromarray(image).convert("RGB")}, {"type": "text", "text": question}]
    inputs = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")  # fmt: skip
    found = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, output_attentions=True,
                               return_dict_in_generate=True)  # fmt: skip
    return sum(layer.nbytes for step in found.attentions for layer in step), len(found.attentions)


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, _ = pick_device("cpu")
    path = args.out_dir / "metrics.json"
    found = read_json(path) if path.exists() else {}
    if "cost" in args.parts:
        found["cost"] = [cost(family, args) for family in FAMILIES]
        print("\n| family | prompt | plain s | captured s | more | bytes all / rows | MiB plain, captured, all |")
        print("|---" * 7 + "|")
        for r in found["cost"]:
            print(f"| {r['family']} | {r['prompt_tokens']} | {r['seconds_plain']:.3f} | {r['seconds_captured']:.3f} | "
                  f"{100 * r['overhead']:+.1f} % | {r['fewer']:.0f} | {r['mib_plain']:.0f}, {r['mib_captured']:.0f}, "
                  f"{r['mib_eager']:.0f} |")  # fmt: skip
    if "train" in args.parts:
        for family in args.models:
            for blind in (False, True):
                train(family, blind, args)
    if "proof" in args.parts:
        found["proof"] = prove(args)
    write_json(path, found | {"small": args.small, "phantom": True} | run_facts(started, device))
    print(f"results in {args.out_dir}")
    return found


if __name__ == "__main__":
    main()
