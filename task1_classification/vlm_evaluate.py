"""
Measure trained heads, projectors, adapters and zero-shot answers on the test films, in one table.

Usage:
    python task1_classification/vlm_evaluate.py                  # the newest runs of vlm_train.py and vlm_zero_shot.py
    python task1_classification/vlm_evaluate.py --runs TRAIN_RUN ZERO_SHOT_RUN ...
    python task1_classification/vlm_evaluate.py --dry-run        # of vlm_train.py --dry-run

Per label and as a mean over labels: AUC, average precision, balanced accuracy and F1 at thresholds chosen on
validation, share of yes, unparsed answers, calibration (ECE of the raw probabilities, and after Platt scaling on
validation). Intervals: 95 %, patients resampled, and the seeds with them where a method has several; differences are
paired: both methods see the same patients and seeds. A label with one kind of film in val or test is left out.

Beside the methods: what is usual (majority), and a text oracle, the report labeller on the report itself: it sees no
film, and is no competitor but what the labels agree with words.

Writes to the run folder: report.md and report.html, figures/differences.png and figures/labels.png, metrics.json,
labels.csv (every number of every label), predictions/<method>-seed<n>.csv (a row per film of val and test).
"""

import csv
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

from shared.metrics.classification import binary_metrics, choose_threshold
from shared.metrics.labels import CONDITIONS
from shared.metrics.statistics import percentile_interval, resample_counts
from shared.models.hub import explained
from shared.report import Report, number, percent, save_figure, with_interval
from shared.runtime import InputError, bounded, newest_run, open_run_dir, pick_device, positive_float, positive_int
from shared.runtime import read_json, run_facts, script, script_parser, write_csv, write_json
from task1_classification.vlm_data import load_again, mean_of, text_labels
from task1_classification.vlm_model import MODES, Bank, Encoder, load_encoder, load_probe, make_store, predict
from task1_classification.vlm_model import restore_probe

TASK = "task1_classification"
MODE_ORDER = (*MODES, "zero-shot")
LETTERS = dict(zip(MODES, ("A", "B", "B random", "C", "D", ""), strict=True))
PAIRS = (  # first minus second
    ("projector", "projector-head", "C - B: tuning the projector"),
    ("lora", "projector-head", "D - B: adapters in the tower"),
    ("projector-head", "head", "B - A: behind the projector or before it"),
    ("projector", "head", "C - A"),
    ("projector-head", "random-projector", "B - a random projector"),
    ("head", "zero-shot", "A - zero-shot"),
    ("projector", "zero-shot", "C - zero-shot"),
    ("cnn", "head", "CNN - A"),
)
NAMES = {"auc": "AUC", "pr_auc": "AP", "balanced_accuracy": "balanced accuracy", "f1": "F1", "yes": "share of yes",
         "unparsed": "unparsed", "ece": "ECE", "ece_platt": "ECE, scaled"}  # fmt: skip


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="that of the runs")
    # fmt: off
    g = parser.add_argument_group("what to measure")
    g.add_argument("--runs", nargs="+", metavar="DIR",
        help="run folders of vlm_train.py and vlm_zero_shot.py on the same films (default: the newest of each)")
    g.add_argument("--samples", type=bounded(int, 1, 100_000), default=1000,
        help="resamples of the patients (%(default)s)")
    g.add_argument("--min-positives", type=positive_int, default=10, metavar="N",
        help="a second mean over the labels with so many positive test films (%(default)s)")
    g.add_argument("--cache-gib", type=positive_float, default=4.0, metavar="GIB",
        help="memory for tokens, as in vlm_train.py (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.data != "auto" or args.limit:
        parser.error("the films are those of the runs, all of them: leave --data and --limit out")
    if args.dry_run:
        args.samples = 20
        args.runs = args.runs or [f"outputs/{TASK}/vlm_train/dry-run"]
    return args


# ---------------------------------------------------------------------------------------------------------- predictions


@dataclass
class Method:
    """scores: by seed (n, L), of val and test films in order; answers: (n, L) of 1, 0, NaN, or None."""

    name: str
    mode: str
    model: str
    scores: dict
    answers: np.ndarray | None = None
    trainable: int | None = None
    note: str = ""
    seconds: float | None = None


def told_by(run):
    """metrics.json of a run of vlm_train.py or vlm_zero_shot.py. InputError where what is needed of it is not there."""
    with explained(f"{run / 'metrics.json'} is damaged, or of another kind of run"):
        metrics = read_json(run / "metrics.json", object)
        facts, tower = metrics["dataset"], metrics.get("tower_trained_here")
        texts, numbers = [facts["fingerprint"], facts["again"]["name"], metrics["model"]], [metrics["seconds"]]
        numbers += [tower["seconds"]] if tower else []
        if {*map(type, texts)} != {str} or {*map(type, numbers)} != {float} or type(facts["again"]) is not dict:
            raise ValueError("a text, a number or an object is something else")
    return metrics


def of_training(run, metrics, films, args, device):
    """-> the Methods of a run of vlm_train.py."""
    states = [(path, load_probe(path, labels=films.labels)) for path in run.glob("seed*-*/best.pt")]
    states.sort(key=lambda pair: (pair[1]["seed"], str(pair[0])))
    for path, state in states:
        if path.parent.name != f"seed{state['seed']}-{state['mode']}":
            raise InputError(f"{path} is of seed {state['seed']}, {state['mode']}: it was put there from elsewhere")
        if state["data"].get("fingerprint") != films.fingerprint():
            raise InputError(f"{path} was trained on other films or labels than {run}: train again")
    name = str(run / "model") if (run / "model" / "config.json").is_file() else metrics["model"]
    asked = {state["family"] for _, state in states if state["mode"] != "cnn"}
    encoder, bank = Encoder(device=device), None
    if asked:
        encoder = load_encoder(name, metrics.get("quant"), metrics.get("dtype"), device)
        needs = any(state["mode"] in ("random-projector", "projector") for _, state in states)
        bank = Bank(encoder, make_store(encoder, films, args.cache_gib), args.cache_gib, tokens=needs)
    found = {}
    for path, state in states:
        probe, take_off = restore_probe(state, encoder, path)
        if state["mode"] == "random-projector":
            bank.look_through(probe)
        logits = predict(state["mode"], probe, bank, films, np.arange(len(films.rows)), encoder).numpy()
        take_off()
        here = metrics.get("tower_trained_here") if state["mode"] != "cnn" else None
        note = f"tower trained on drawn films in {here['seconds']:.0f} s" if here else ""
        new = Method(state["mode"], state["mode"], metrics["model"], {}, None, state["trainable"], note, 0)
        method = found.setdefault(state["mode"], new)
        method.scores[state["seed"]] = logits
        method.seconds += state["told"].get("seconds") or 0
    return list(found.values())


def of_zero_shot(run, metrics, films):
    """-> the Method of a run of vlm_zero_shot.py, read from its predictions."""
    place = {row["id"]: n for n, row in enumerate(films.rows)}
    column = {label: j for j, label in enumerate(films.labels)}
    scores = np.full(films.truth.shape, np.nan)
    answers = scores.copy()
    with open(run / "predictions.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        try:
            where = place[line["id"]], column[line["label"]]
            scores[where] = float(line["score"])
            answers[where] = {"": np.nan, "0": 0, "1": 1}[line.get("answer") or ""]
        except (KeyError, ValueError) as error:
            raise InputError(f"{run / 'predictions.csv'} does not fit the films ({error}): ask again") from error
    if len(lines) != scores.size or not np.isfinite(scores).all():
        raise InputError(f"{run / 'predictions.csv'} lacks films or labels of {films.name}, or has them twice or"
                         " without a number: ask again on the same table")  # fmt: skip
    note = "random weights: nothing to be learned from it" if metrics.get("untrained") else ""
    answers = answers if "answer" in lines[0] else None
    return Method("zero-shot", "zero-shot", metrics["model"], {0: scores}, answers, 0, note, metrics["seconds"])


def baselines(films, train):
    """Majority, and the report labeller on the report where there are reports."""
    known = (~np.isnan(train)).sum(0)
    share = np.where(known > 0, np.nansum(train, 0) / np.maximum(known, 1), 0.5)
    usual = np.tile(np.log(np.clip(share, 1e-3, 1 - 1e-3) / np.clip(1 - share, 1e-3, 1)), (len(films.rows), 1))
    found = [Method("majority", "majority", "", {0: usual}, note="the same for every film")]
    unread = [name for name in films.labels if name not in CONDITIONS]
    if any(films.column("report")) and len(unread) < len(films.labels):
        said, values = [text_labels(text) for text in films.column("report")], {1: 3.0, 0: -3.0, None: 0.0}
        scores = np.array([[values[labels.get(name)] for name in films.labels] for labels in said])
        note = "reads the report, sees no film: not an image model"
        note += f"; it cannot tell {', '.join(unread)}, which count as .5" if unread else ""
        found.append(Method("text oracle", "text", "", {0: scores}, note=note))
    return found


# ------------------------------------------------------------------------------------------------------------- measures


def areas(truth, scores, weights):
    """
    AUC and average precision of many weightings at once: truth (n,) 0/1, scores (n,), weights (M, n), how often each
    film is drawn -> two (M,), NaN where a draw has one kind only. Ties count half.
    """
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    weights = weights[:, order].astype(np.float64)
    positive = np.add.reduceat(weights * truth[order], first, axis=1)
    negative = np.add.reduceat(weights * (1 - truth[order]), first, axis=1)
    num_positive, num_negative = positive.sum(1), negative.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (positive * (negative.cumsum(1) - negative / 2)).sum(1) / (num_positive * num_negative)
        hits, called = positive[:, ::-1].cumsum(1), (positive + negative)[:, ::-1].cumsum(1)
        precision = (positive[:, ::-1] * hits / np.maximum(called, 1e-9)).sum(1) / num_positive
    none = (num_positive == 0) | (num_negative == 0)
    return np.where(none, np.nan, auc), np.where(none, np.nan, precision)


def best_f1_threshold(truth, scores):
    precision, recall, cuts = precision_recall_curve(truth, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-9)
    return float(np.nextafter(cuts[int(np.argmax(f1))], -np.inf))  # binary_metrics calls what lies above


def label_numbers(val, test, answers=None):
    """val, test: (truth, scores) of one label, known films only -> dict of its numbers at thresholds chosen on val."""
    found = binary_metrics(*test, choose_threshold(*val))
    row = {"n": found["n"], "positives": found["num_positive"], "prevalence": found["prevalence"]}
    row |= {key: found[key] for key in ("auc", "pr_auc", "balanced_accuracy")}
    row["f1"] = binary_metrics(*test, best_f1_threshold(*val))["f1"] or 0.0
    said = test[1] > 0 if answers is None else answers[~np.isnan(answers)] > 0
    row["yes"] = float(said.mean()) if len(said) else None
    row["unparsed"] = None if answers is None else float(np.isnan(answers).mean())
    row["ece"] = binary_metrics(test[0], expit(test[1]))["ece"]
    platt = LogisticRegression(C=1e3).fit(val[1][:, None], val[0])
    row["ece_platt"] = binary_metrics(test[0], platt.predict_proba(test[1][:, None])[:, 1])["ece"]
    return row


def measure(method, films, usable, weights):
    """
    Numbers of a method, averaged over its seeds, into method.labels {label: row} and method.draws (2, seeds, L, M + 1):
    AUC and average precision of every resample, the last being the films as they are.
    """
    split = np.array(films.column("split"))
    truth, val, test = films.truth, split == "val", split == "test"
    each, method.draws = [], np.full((2, len(method.scores), len(films.labels), len(weights)), np.nan)
    for s, scores in enumerate(method.scores.values()):
        found = {}
        for j in np.flatnonzero(usable):
            known = ~np.isnan(truth[:, j])
            parts = [(truth[w & known, j].astype(int), scores[w & known, j].astype(np.float64)) for w in (val, test)]
            answers = None if method.answers is None else method.answers[test & known, j]
            found[films.labels[j]] = label_numbers(*parts, answers)
            inside = known[test]
            method.draws[:, s, j] = areas(*parts[1], weights[:, inside])
        each.append(found)
    method.labels = {
        label: {key: mean_of([found[label][key] for found in each]) for key in each[0][label]} for label in each[0]
    }
    method.spread = float(np.std([mean_of([row["auc"] for row in found.values()]) for found in each], ddof=1)) \
        if len(each) > 1 else None  # fmt: skip


def over_seeds(draws, seed):
    """draws (S, L, M + 1) -> (L, M + 1): mean over the seeds, which are resampled too; methods with equally many seeds
    get the same ones, so that B and C of one seed stay together."""
    count, samples = draws.shape[0], draws.shape[2]
    pick = np.random.default_rng([seed, count]).integers(count, size=(count, samples))
    pick[:, -1] = np.arange(count)
    return np.take_along_axis(draws, pick[:, None, :], axis=0).mean(0)


def interval(draws, labels):
    """draws (L, M + 1) -> {value, low, high} of the mean over these labels (bool)."""
    if not labels.any():
        return {"value": None, "low": None, "high": None}
    with np.errstate(invalid="ignore"):
        known = ~np.isnan(draws[labels])
        averages = np.where(known, draws[labels], 0).sum(0) / np.maximum(known.sum(0), 1)
    averages = np.where(known.any(0), averages, np.nan)
    low, high, _ = percentile_interval(averages[:-1])
    return {"value": float(averages[-1]), "low": low, "high": high}


def compare(methods, usable, often, labels, seed):
    """-> rows of paired differences of AUC: the mean over labels, and each label."""
    rows = []
    for first, second, words in PAIRS:
        for a in (m for m in methods if m.mode == first):
            for b in (m for m in methods if m.mode == second):
                if a.model != b.model and not {"zero-shot", "cnn"} & {first, second}:
                    continue
                difference = over_seeds(a.draws[0], seed) - over_seeds(b.draws[0], seed)
                each = zip(labels, np.eye(len(labels), dtype=bool), usable, strict=True)
                rows.append({
                    "pair": words, "first": a.name, "second": b.name, "macro": interval(difference, usable),
                    "macro_often": interval(difference, often),
                    "labels": {label: interval(difference, one) for label, one, fine in each if fine},
                })  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- the report


def forest(path, rows, title, phantom):
    """rows: [(name, {value, low, high})] of differences of AUC."""
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * len(rows)), layout="constrained")
    for y, (_, found) in enumerate(reversed(rows)):
        if found["low"] is not None:
            clear = found["low"] > 0 or found["high"] < 0
            axis.plot([found["low"], found["high"]], [y, y], color="C0" if clear else "0.6", linewidth=2)
            axis.plot(found["value"], y, "o", color="C0" if clear else "0.6")
            axis.annotate(f"{found['value']:+.3f}", (found["high"], y), (8, 0), textcoords="offset points", fontsize=8,
                          va="center")  # fmt: skip
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axis.set(xlabel="difference of AUC, 95 % interval", ylim=(-0.7, len(rows) - 0.3))
    axis.margins(x=0.15)
    axis.grid(axis="x", alpha=0.3)
    return save_figure(figure, path, title, phantom)


def write_report(run_dir, films, methods, usable, often, left, differences):
    test = films.rows_of("test")
    patients = len({films.rows[i]["patient"] for i in test})
    warnings = []
    if limit := films.again.get("limit"):
        warnings.append(f"Measured with --limit {limit}.")
    if patients < 500:
        warnings.append(f"{patients} test patients are few: an AUC over 12 positives is known to about .12 at best.")
    if any(m.note.startswith("tower trained on drawn") for m in methods) and not films.phantom:
        warnings.append("Towers trained on drawn films: this shows the method, not what a medical model can do.")
    report = Report(f"{films.name}: vision-language models as classifiers", films.phantom, warnings)
    report.text(f"{len(test)} test films of {patients} patients. Mean over {int(usable.sum())} labels, and over the"
                f" {int(often.sum())} of them with enough positive test films; 95 % intervals, patients and seeds"
                " resampled. Thresholds and scaling from validation.")  # fmt: skip
    if left:
        report.text(f"Left out, one kind of film only in val or test: {', '.join(left)}.")
    header = ["", "numbers trained", "seeds", "AUC", "over frequent labels", "AP", *list(NAMES.values())[2:], "remark"]
    body = []
    for m in methods:
        macro = {key: mean_of([row[key] for row in m.labels.values()]) for key in NAMES}
        cells = [number(macro[key]) for key in list(NAMES)[2:]]
        title = f"{m.name} ({LETTERS[m.mode]})" if LETTERS.get(m.mode) else m.name
        body.append([title, f"{m.trainable:,}" if m.trainable else "–", len(m.scores),
                     with_interval(m.macro["auc"], number), with_interval(m.macro["auc_often"], number),
                     with_interval(m.macro["pr_auc"], number), *cells, m.note])  # fmt: skip
    report.table(header, body)
    if differences:
        report.heading("What one adds to the other")
        report.text("Paired differences of AUC: the same patients and seeds in both; an interval with 0 in it says"
                    " nothing.")  # fmt: skip
        lines = [[d["pair"], d["first"], d["second"], with_interval(d["macro"], number),
                  with_interval(d["macro_often"], number)] for d in differences]  # fmt: skip
        report.table(["", "first", "second", "difference", "over frequent labels"], lines)
        pairs = [d["pair"] for d in differences]
        shown = [(d["pair"] if pairs.count(d["pair"]) == 1 else f"{d['first']} - {d['second']}", d["macro"])
                 for d in differences]  # fmt: skip
        path = forest(run_dir / "figures/differences.png", shown, f"{films.name}: paired differences", films.phantom)
        report.figure(path, "Paired differences of the mean AUC.")
        main_pair = differences[0]
        shown = [("{} ({positives:.0f} of {n:.0f})".format(label, **methods[0].labels[label]), found)
                 for label, found in main_pair["labels"].items()]  # fmt: skip
        path = forest(run_dir / "figures/labels.png", shown, f"{films.name}: {main_pair['pair']}", films.phantom)
        report.figure(path, f"{main_pair['pair']}, each label, with its positive test films.")
    report.heading("AUC of each label")
    lines = [[label, f"{methods[0].labels[label]['positives']:.0f}", percent(methods[0].labels[label]["prevalence"]),
              *(number(m.labels[label]["auc"]) for m in methods)] for label in methods[0].labels]  # fmt: skip
    report.table(["label", "positive", "%", *(m.name for m in methods)], lines)
    if films.notes.get("mapping"):
        report.heading("Labels, from index terms")
        report.table(["label", "items"], list(films.notes["mapping"].items()))
    report.write(run_dir, page=True)


def write_predictions(run_dir, films, method):
    for seed, scores in method.scores.items():
        lines = [{name: row[name] for name in ("id", "patient", "split")}
                 | {label: round(float(v), 5) for label, v in zip(films.labels, values, strict=True)}
                 for row, values in zip(films.rows, scores, strict=True)]  # fmt: skip
        name = re.sub(r"[^\w-]+", "-", method.name)
        write_csv(run_dir / "predictions" / f"{name}-seed{seed}.csv", lines)


def find_runs(args):
    if args.runs:
        runs = [Path(run) for run in args.runs]
    else:
        found = newest_run(TASK, "vlm_train", "metrics.json"), newest_run(TASK, "vlm_zero_shot", "predictions.csv")
        runs = [run for run in found if run is not None]
    if not runs:
        raise InputError("there is no run to measure: python task1_classification/vlm_train.py makes one, or give"
                         " --runs")  # fmt: skip
    for run in runs:
        results = (run / "predictions.csv").is_file() or list(run.glob("seed*-*/best.pt"))
        if not results or not (run / "metrics.json").is_file():
            raise InputError(f"{run} is no finished run of vlm_train.py or vlm_zero_shot.py")
    return runs


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    args.runs = runs = list(dict.fromkeys(find_runs(args)))
    device, _ = pick_device(args.device)
    metrics = [told_by(run) for run in runs]
    told = [facts["dataset"] for facts in metrics]
    films = load_again(told[0], args.data_dir)
    for run, facts in zip(runs, told, strict=True):
        if facts["fingerprint"] != told[0]["fingerprint"]:
            raise InputError(f"{run} was made on other films, splits or labels than {runs[0]}: they cannot stand in"
                             " one table")  # fmt: skip
    films.notes |= {"mapping": told[0].get("mapping")} if told[0].get("mapping") else {}
    print(films, flush=True)
    train, films, methods = films.truth[films.rows_of("train")], films.part("val", "test"), []
    usable = films.usable("val", "test")
    left = [label for label, fine in zip(films.labels, usable, strict=True) if not fine]
    if not usable.any():
        raise InputError(f"no label of {films.name} has both kinds of films in val and in test: nothing can be"
                         " measured")  # fmt: skip
    for run, of in zip(runs, metrics, strict=True):
        zero_shot = (run / "predictions.csv").is_file()
        methods += [of_zero_shot(run, of, films)] if zero_shot else of_training(run, of, films, args, device)
    methods.sort(key=lambda m: MODE_ORDER.index(m.mode))
    for mode in MODE_ORDER:  # of two models, or two questionings, each has a name of its own
        same = [m for m in methods if m.mode == mode]
        names = [f"{mode} {Path(m.model).name}" for m in same]
        for k, method in enumerate(same if len(same) > 1 else ()):
            method.name = names[k] + (f" ({k + 1})" if names.count(names[k]) > 1 else "")
    methods += baselines(films, train)
    run_dir = open_run_dir(args, TASK, "vlm_evaluate")
    test = films.rows_of("test")
    draws = list(resample_counts(len(test), args.samples, args.seed, films.column("patient", test)))
    weights = np.array([*draws, np.ones(len(test), int)])
    often = usable & (np.nansum(films.truth[test], 0) >= args.min_positives)
    for method in methods:
        measure(method, films, usable, weights)
        auc, ap = (over_seeds(d, args.seed) for d in method.draws)
        method.macro = {"auc": interval(auc, usable), "auc_often": interval(auc, often), "pr_auc": interval(ap, usable)}
        write_predictions(run_dir, films, method)
        print(f"  {method.name:28} AUC {with_interval(method.macro['auc'], number)}", flush=True)
    differences = compare(methods, usable, often, films.labels, args.seed)
    for d in differences:
        print(f"  {d['pair']:42} {with_interval(d['macro'], number)}")
    write_csv(run_dir / "labels.csv", [
        {"method": m.name, "label": label, **row} for m in methods for label, row in m.labels.items()])  # fmt: skip
    write_json(run_dir / "metrics.json", {
        "dataset": films.facts(), "split": "test", "runs": runs, "left_out_labels": left,
        "methods": {m.name: {"mode": m.mode, "model": m.model, "trainable_parameters": m.trainable, "note": m.note,
                             "seeds": len(m.scores), "auc_spread_over_seeds": m.spread, "seconds": m.seconds,
                             "macro": m.macro, "labels": m.labels} for m in methods},
        "differences": differences, "seed": args.seed, "samples": args.samples, **run_facts(started, device),
    })  # fmt: skip
    write_report(run_dir, films, methods, usable, often, left, differences)
    print(f"results in {run_dir} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()
