"""
Measure a vision-language model on chest films: prompt strategies for normal or pneumonia beside the CNN of task 1, or
the reports of a model that train.py taught.

Usage:
    python task2_report/evaluate.py                                          # MedGemma 4B, PneumoniaMNIST, 100 images
    python task2_report/evaluate.py --full --strategies zero_shot structured yes_no --contexts none cnn swapped
    python task2_report/evaluate.py --model tiny --data phantom --max-new-tokens 24         # offline, a few minutes
    python task2_report/evaluate.py --task report --adapter outputs/task2_report/train/001/best
    python task2_report/evaluate.py --dry-run                                # the smallest of it, a minute

--task classify: every strategy of prompts.py with every context (nothing, the CNN's probability, the opposite, one
half). What is planned is printed first, with the time it will take. The CNN is models/task1_model.pth.
--task report: the films of the test split that belong to the model's training data (training.json beside it, or
--data), the reports beside constant, random, nearest-neighbour and oracle-label ones, and whether the film matters.
Writes to the run folder: metrics.json, predictions.jsonl (one record per film, strategy and context) or reports.jsonl
(rexrank.json for IU X-ray), report.md, report.html, figures/; and reports/task2_report_generation.md, respectively
reports/task2_trained_reports.md.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np

from shared.data.image_sets import PHANTOM_SEED, SIZES, load_images, load_medmnist
from shared.data.iu_xray import rexrank_entries
from shared.metrics.labels import CONDITIONS
from shared.phantom import phantom_classification
from shared.report import PHANTOM, number, percent, with_interval
from shared.runtime import InputError, bounded, newest_run, open_run_dir, peak_words, pick_device, positive_int
from shared.runtime import run_facts, script, script_parser, seed_everything, write_csv, write_json, write_jsonl
from shared.training import settings_of
from task1_classification.model import untrained_classifier
from task2_report import measures
from task2_report.cases import as_films, load_again, load_reports, sections_of
from task2_report.opinion import find_cnn
from task2_report.pages import classify_page, report_page
from task2_report.prompts import CONTEXTS, PARAPHRASES, STRATEGIES, ask, yes_no_question
from task2_report.records import judge
from task2_report.report_task import MODEL, SHUFFLED, run_report_task
from task2_report.writer import Writer, add_model_options, load_model, training_of, untrained

TASK = "task2_report"
DEFAULT_STRATEGIES = [name for name in STRATEGIES if name != "report"]
count = bounded(int, 0, 10**9)
BLIND = ("black image", "noise", "another image", "text only")


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="pneumoniamnist")
    g = parser.add_argument_group("what is measured")
    # fmt: off
    g.add_argument("--task", default="classify", choices=["classify", "report"], help="see above (%(default)s)")
    g.add_argument("--split", default="test", choices=["val", "test"], help="which split (%(default)s)")
    g.add_argument("--cases", type=positive_int, default=100,
        help="classify: images, as many of each class as in the split (%(default)s)")
    g.add_argument("--full", action="store_true", help="classify: all images of the split")
    g.add_argument("--image-size", type=int, default=28, choices=SIZES, help="classify: pixels (%(default)s)")
    g.add_argument("--strategies", nargs="+", default=DEFAULT_STRATEGIES, choices=list(STRATEGIES), metavar="NAME",
        help=f"classify: of {', '.join(STRATEGIES)} (default: all but report)")
    g.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=CONTEXTS,
        help="classify: what the prompt says of the CNN (default: all)")
    g.add_argument("--control", default="structured", choices=list(STRATEGIES), metavar="NAME",
        help="classify: the strategy whose dependence on the image is tested (%(default)s)")
    g.add_argument("--cnn-steps", type=count, default=600,
        help="report: training steps of the label CNN, the upper line and the features of the nearest film, at most 30"
        " epochs; 0: without (%(default)s)")
    g.add_argument("--redrawn", type=count, default=400,
        help="report, phantom: films drawn anew without a finding (%(default)s)")
    g = parser.add_argument_group("the CNN of task 1")
    g.add_argument("--cnn", metavar="FILE", help="classifier of task 1, or none (default: models/task1_model.pth)")
    g.add_argument("--allow-mismatch", action="store_true", help="take a CNN that was trained on another data set")
    g = add_model_options(parser)
    g.add_argument("--batch-size", type=positive_int,
        help="prompts at a time; halved by itself when memory runs out (4; 64 below 100 M parameters)")
    # fmt: on
    args = parser.parse_args(argv)
    args.strategies, args.contexts = (list(dict.fromkeys(some)) for some in (args.strategies, args.contexts))
    if args.dry_run:
        args.device, args.model, args.data = "cpu", args.model or (None if args.adapter else "tiny"), "phantom"
        args.cases, args.max_new_tokens, args.cnn_steps, args.redrawn = 6, 8, min(args.cnn_steps, 2), 4
        args.limit = min(args.limit or 8, 8)
    return args


# ------------------------------------------------------------------------------------------------- normal or pneumonia


def stratified(labels, n, seed):
    """Indices of n cases with about the same share of each class, in order."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    counts = np.maximum(1, np.round(n * sizes / len(labels)).astype(int))
    counts[counts.argmax()] += n - counts.sum()  # what rounding took or gave
    rows = [rng.choice(np.flatnonzero(labels == c), k, replace=False) for c, k in zip(classes, counts, strict=True)]
    return sorted(np.concatenate(rows).tolist())


def blind_films(films, seed):
    """-> {control: films}: the same questions about something that is not the film."""
    rng = np.random.default_rng(seed)
    return {
        "black image": [np.zeros_like(film) for film in films],
        "noise": [rng.integers(0, 256, film.shape, np.uint8) for film in films],
        "another image": films[1:] + films[:1],
        "text only": [None] * len(films),
    }


def sizes_there(data, data_dir, indices, split):
    """-> {pixels: films of the same cases} for the sizes that are there; nothing is downloaded."""
    found = {}
    for size in SIZES:
        if size == data.size:
            found[size] = as_films(data.images[split][indices])
        elif data.phantom:
            arrays = phantom_classification(PHANTOM_SEED, {split: max(indices) + 1}, size)
            found[size] = [arrays[f"{split}_images"][i] for i in indices]
        elif data.path is not None:
            name = f"{data.name}{'' if size == 28 else f'_{size}'}.npz"
            if any((folder / name).is_file() for folder in (Path(data_dir), Path(data_dir) / data.name)):
                found[size] = as_films(load_medmnist(data.name, data_dir, size).images[split][indices])
    return found


def plan(args, n, contexts, num_sizes):
    """-> texts to be written and yes/no questions to be asked, in all."""
    pairs = len(args.strategies) * len(contexts)
    written = n * (pairs + len(BLIND))
    asked = n * (pairs + len(BLIND) + len(PARAPHRASES) + num_sizes - 1)
    return written, asked


def measure_pair(records, labels, cnn_calls):
    """The records of one strategy with one context -> its numbers."""
    calls, texts = [r["classification"] for r in records], [r["raw_text"] for r in records]
    margins = [r["p_yes_logit"] for r in records]
    told, stated = ([r[key] for r in records] for key in ("told_probability", "verbal_confidence"))
    found = {
        "margin": measures.score_margins(labels, margins),
        "calls": measures.score_calls(labels, calls),
        "complies": float(np.mean([r["complies"] for r in records])),
        "claims": measures.claims_table(texts),
        "unsupported": {
            kind: float(np.mean([measures.unsupported(t)[kind] for t in texts])) for kind in ("affirmed", "negated")
        },
        "words": float(np.mean([len(t.split()) for t in texts])),
        "distinct_texts": len(set(texts)),
        "confidence": measures.confidence_against_margin(calls, stated, margins, labels),
    }  # fmt: skip
    if cnn_calls:
        found["agreement"] = measures.agreement(labels, calls, cnn_calls)
        if records[0]["context"] in ("cnn", "swapped"):  # one half is no opinion
            said = ["pneumonia" if p > 0.5 else "normal" for p in told]
            found["follows_wrong_opinion"] = measures.follow_rate(said, calls, labels)
    return found


def run_classify(args, device, started):
    data = load_images(args.data, args.data_dir, args.image_size)
    if [name.lower() for name in data.label_names] != ["normal", "pneumonia"]:
        raise InputError(f"{data.name} has the classes {', '.join(data.label_names)}; the prompts ask for pneumonia")
    print(data)
    if data.phantom:
        print(f"*** {PHANTOM} ***")
    if args.limit:
        data.limit(args.limit)
    labels = data.labels[args.split].tolist()
    indices = list(range(len(labels))) if args.full else stratified(labels, min(args.cases, len(labels)), args.seed)
    labels, films = [labels[i] for i in indices], as_films(data.images[args.split][indices])
    checkpoint = args.cnn or (untrained_classifier() if args.dry_run else None)
    cnn = find_cnn(checkpoint, data.name, args.allow_mismatch, device)
    opinions = cnn.opinions(films) if cnn else None
    contexts = [c for c in args.contexts if opinions or c == "none"] or ["none"]
    ladder = sizes_there(data, args.data_dir, indices, args.split)
    vlm = load_model(args, device)
    writer = Writer(vlm, args.batch_size, args.max_new_tokens)
    written, asked = plan(args, len(films), contexts, len(ladder))
    begin = time.time()
    some = min(len(films), writer.size.now)
    judge(writer, indices[:some], films[:some], args.strategies[0])
    minutes = (time.time() - begin) / some * (written + asked) / 2 / 60
    print(
        f"planned: {len(films)} films, {len(args.strategies)} strategies, contexts {', '.join(contexts)}: {written:,}"
        f" texts and {asked:,} yes/no questions, about {minutes:.0f} minutes at the speed of the first batch",
        flush=True,
    )
    run_dir = open_run_dir(args, TASK, "evaluate")
    records = {}
    for strategy in args.strategies:
        for context in contexts:
            records[strategy, context] = judge(writer, indices, films, strategy, context, opinions, labels)
            write_jsonl(run_dir / "predictions.jsonl", [r for some in records.values() for r in some])
            print(f"  {strategy}, context {context}: {time.time() - started:.0f} s", flush=True)
    cnn_calls = [o["call"] for o in opinions] if opinions else None
    pairs = {f"{s} / {c}": measure_pair(rows, labels, cnn_calls) for (s, c), rows in records.items()}
    pixels = measures.pixel_baseline(data.images["train"], data.labels["train"], data.images[args.split][indices])
    numbers = {
        "task": "classify", "n": len(films), "prevalence": float(np.mean(labels)), "pairs": pairs,
        "controls": measure_controls(args, writer, indices, films, labels),
        "ladder": {str(s): ask_yes_no(writer, some, labels, args.control) for s, some in ladder.items()},
        "sizes_missing": [s for s in SIZES if s not in ladder],
        "baselines": {"pixels": measures.score_margins(labels, pixels - 0.5)},
    }  # fmt: skip
    if opinions:
        shifted = [o["probability"] - o["threshold"] for o in opinions]
        numbers["baselines"]["cnn"] = measures.score_margins(labels, shifted)
    numbers |= {
        "dataset": data.facts() | {"limit": args.limit}, "split": args.split, "cnn": cnn and cnn.told(),
        "untrained": untrained(vlm), "trained_on": training_of(args.adapter).get("dataset"), **vlm.facts(),
        "seed": args.seed, "settings": settings_of(args), **run_facts(started, device),
    }  # fmt: skip
    write_json(run_dir / "metrics.json", numbers)
    print(classify_page(run_dir, numbers, records, films))
    return run_dir


def ask_yes_no(writer, films, labels, strategy):
    margins = writer.margins([yes_no_question(strategy)] * len(films), films, STRATEGIES[strategy].system)
    return measures.score_margins(labels, margins)


def measure_controls(args, writer, indices, films, labels):
    """One strategy, without context: what it writes and answers about things that are not the film; paraphrases."""
    real = judge(writer, indices, films, args.control, labels=labels)
    texts = [r["raw_text"] for r in real]
    blind = {}
    for name, others in blind_films(films, args.seed).items():
        rows = judge(writer, indices, others, args.control)
        margins = [r["p_yes_logit"] for r in rows]
        blind[name] = {
            "image_dependence": measures.image_dependence(texts, [r["raw_text"] for r in rows]),
            "same_text": float(np.mean([r["raw_text"] == t for r, t in zip(rows, texts, strict=True)])),
            "margin": measures.score_margins(labels, margins),
            "calls": measures.score_calls(labels, [r["classification"] for r in rows]),
        }
    margins = [writer.margins([ask(text)] * len(films), films) for text, _ in PARAPHRASES]
    return {
        "strategy": args.control,
        "real": {"margin": measures.score_margins(labels, [r["p_yes_logit"] for r in real])},
        "blind": blind,
        "flip_rate": measures.flips(margins, [turned for _, turned in PARAPHRASES]),
        "flip_rate_same_polarity": measures.flips(margins[:4], [False] * 4),
        "paraphrases": [text for text, _ in PARAPHRASES],
    }


# ------------------------------------------------------------------------------------------------------------- reports


def run_report(args, device, started):
    if not args.adapter and not args.model:
        run = newest_run(TASK, "train", "best")
        if run is None:
            raise InputError("there is no trained model: train one with train.py, or give --adapter or --model")
        args.adapter = run / "best"
    told = training_of(args.adapter)
    if args.data == "auto" and told:
        data = load_again(told["dataset"], args.data_dir, ("train", "val", args.split), args.limit)
    else:
        films = {"films": 24} if args.dry_run else {}
        data = load_reports(args.data, args.data_dir, limit=args.limit, splits=("train", "val", args.split), **films)
    test = data.split(args.split)
    conditions = tuple(told.get("conditions") or ()) or CONDITIONS[1:]
    if data.facts["phantom"]:
        print(f"*** {PHANTOM} ***")
        conditions = tuple(data.facts["again"]["chosen"]["conditions"])
    vlm = load_model(args, device)
    writer = Writer(vlm, args.batch_size, args.max_new_tokens)
    print(f"planned: {3 * len(test):,} reports of {len(test)} films (own, another's, grey), then the baselines")
    run_dir = open_run_dir(args, TASK, "evaluate")
    numbers, rows, test, errors = run_report_task(
        writer, data, test, conditions, told.get("indication", False), args.cnn_steps, args.redrawn, args.seed, device
    )
    write_jsonl(run_dir / "reports.jsonl", rows)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
        print(f"{len(errors)} films cannot be read and are left out; the first: {errors[0]['error']}", file=sys.stderr)
    if data.name == "iu_xray" and args.split == "test":
        written = {row["id"]: sections_of(row["text"]) for row in rows}
        write_json(run_dir / "rexrank.json", rexrank_entries(written, args.data_dir))
    numbers |= {
        "task": "report", "n": len(test), "n_errors": len(errors), "conditions": list(conditions),
        "dataset": data.facts, "split": args.split, "trained_on": told.get("dataset"),
        "untrained": untrained(vlm), **vlm.facts(), "seed": args.seed, "settings": settings_of(args),
        **run_facts(started, device),
    }  # fmt: skip
    write_json(run_dir / "metrics.json", numbers)
    print("\n".join(headlines(numbers)))
    print(report_page(run_dir, numbers, rows, test))
    return run_dir


def headlines(numbers):
    """The lines that a reader of the console wants."""
    found, redrawn, cnn = numbers["rows"][MODEL], numbers.get("redrawn"), numbers["cnn"]
    other, constant = numbers["rows"].get(SHUFFLED, {"conditions": {"value": None}}), numbers["rows"]["constant"]
    upper = number(cnn["f1"]) if cnn else "not trained"
    beyond = max(numbers["grey"][name] - numbers["prior"][name] for name in numbers["conditions"])
    lines = [
        f"micro-F1 over {len(numbers['conditions'])} conditions: {with_interval(found['conditions'], number)}; with"
        f" another patient's film {number(other['conditions']['value'])}; CNN that reads labels {upper}",
        f"sides right: {percent(found['sides']['right'])} % of {found['sides']['compared']}; BLEU-4"
        f" {number(found['words']['bleu_4'])}, constant report {number(constant['words']['bleu_4'])}",
        f"grey film: at most {percent(beyond)} points beyond the share of a condition in training"
        if beyond > 0
        else "grey film: no condition is stated more often than in training",
    ]
    if redrawn and redrawn["gone"]["n"]:
        lines.append(
            f"drawn anew: the sentence goes in {with_interval(redrawn['gone'])} % without its finding, in"
            f" {with_interval(redrawn['other'])} % without another"
        )
    return lines


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    run_dir = (run_classify if args.task == "classify" else run_report)(args, device, started)
    print(f"peak memory {peak_words(device)}; results in {run_dir} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()
