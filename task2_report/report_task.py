"""
evaluate.py --task report: reports of test films beside reports written without looking, and whether the film matters.

Rows of the table: the model; the model with another patient's film and with a grey one; the best constant (chosen on
validation), a random training report, the report of the nearest training film (features of label_cnn.py), the true
labels in canned words (oracle). Beside them the F1 of the CNN's labels, which is the upper line of this file.
Phantom: each film drawn anew without one finding, and without another one: its sentence must go, or stay.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import shared  # noqa: F401, isort: skip  # before torch
import numpy as np

from shared.metrics.report_baselines import baseline_reports
from shared.metrics.statistics import mean_interval
from task2_report.label_cnn import LabelCNN, best_thresholds, small_films
from task2_report.prompts import REPORT, ask
from task2_report.scores import FEW, measure_reports, stated, truth_of

MODEL, SHUFFLED, GREY = "the model", "the model, another patient's film", "the model, a grey film"


def write_all(writer, cases, films, indication, prompt=REPORT):
    turns = [ask(prompt, indication=case.indication if indication else "") for case in cases]
    return writer.write(turns, films)


def other_films(cases):
    """Each case's film becomes that of the next case of another patient -> films, None where all are of one patient."""
    if len({case.patient for case in cases}) < 2:
        return None
    turned = (cases[i + 1 :] + cases[:i] for i in range(len(cases)))
    return [
        next(other.film for other in others if other.patient != case.patient)
        for case, others in zip(cases, turned, strict=True)
    ]


def make_baselines(train, val, test, images, conditions, steps, seed, device):
    """images: their films as small_films gives them -> {name: texts of the test cases}, numbers of the label CNN."""
    truth = [np.array([list(truth_of(c, conditions)[0].values()) for c in some]) for some in (train, val, test)]
    reports = [case.report for case in train]
    options = dict(seed=seed, tokenizer="r2gen")
    cnn = None
    if steps:
        net = LabelCNN(images[0], truth[0], steps=steps, seed=seed, device=device)
        (_, known), (p_val, _), (p_test, asked) = (net.run(some) for some in images)
        called = p_test >= best_thresholds(truth[1], p_val)
        positives = int(called.sum() + truth[2].sum())
        f1 = 2 * int((called & truth[2]).sum()) / positives if positives else None
        cnn = {"f1": f1, "seconds": net.seconds, "steps": steps}
        options |= dict(train_vectors=known, vectors=asked)
    found = baseline_reports(
        reports, [c.report for c in val], len(test), train_labels=truth[0].tolist(), labels=truth[2].tolist(), **options
    )
    return found, cnn


def measure_redrawn(writer, cases, texts, conditions, indication, most):
    """
    Phantom films whose report states a drawn condition, drawn anew without it, and without another finding
    -> {"gone": share of sentences that go, "other": share that change though another finding is gone, ...}.
    """
    tasks = []  # (case, condition asked about, film, is it the one that was taken out?)
    for case, text in zip(cases, texts, strict=True):
        says, drawn = stated(text, conditions), list(dict.fromkeys(f.condition for f in case.study.drawn))
        for name in (name for name in drawn if name in conditions and says[name]):
            tasks.append((case, name, case.study.without(name).image, True))
            other = next((c for c in drawn if c != name), None)
            if other:
                tasks.append((case, name, case.study.without(other).image, False))
    tasks = tasks[:most]
    written = write_all(writer, [t[0] for t in tasks], [t[2] for t in tasks], indication)
    gone = [not stated(row["text"], conditions)[t[1]] for t, row in zip(tasks, written, strict=True)]
    found = {}
    for key, own in (("gone", True), ("other", False)):
        some = [(g, t[0].patient) for g, t in zip(gone, tasks, strict=True) if t[3] is own]
        found[key] = mean_interval(*zip(*some, strict=True), FEW) if some else {"value": None, "n": 0}
    return found


def prior_of(cases, conditions):
    """How often a training report states each condition: what may be said of a film that shows nothing."""
    rows = [truth_of(case, conditions)[0] for case in cases]
    return {name: sum(row[name] for row in rows) / len(rows) for name in conditions}


def run_report_task(writer, data, test, conditions, indication=False, cnn_steps=600, redrawn=400, seed=0, device="cpu"):
    """-> (numbers for metrics.json, rows for reports.jsonl, test cases that can be read, rows of errors.csv)."""
    found = [small_films(some) for some in (data.split("train"), data.split("val"), test)]
    images, (train, val, test), errors = zip(*found, strict=True)
    films, grey = [case.film for case in test], np.full((112, 112), 128, np.uint8)
    written = {MODEL: write_all(writer, test, films, indication)}
    if others := other_films(test):
        written[SHUFFLED] = write_all(writer, test, others, indication)
    written[GREY] = write_all(writer, test, [grey] * len(test), indication)
    texts = {name: [row["text"] for row in rows] for name, rows in written.items()}
    baselines, cnn = make_baselines(train, val, test, images, conditions, cnn_steps, seed, device)
    texts |= baselines
    ill = [i for i, case in enumerate(test) if any(truth_of(case, conditions)[0].values())]
    numbers = {
        "rows": {name: measure_reports(some, test, conditions) for name, some in texts.items()},
        "abnormal": {
            name: measure_reports([some[i] for i in ill], [test[i] for i in ill], conditions, intervals=False)
            for name, some in texts.items()
            if len(ill) > 1
        },
        "n_abnormal": len(ill),
        "cnn": cnn,
        "prior": prior_of(train, conditions),
        "grey": {c: float(np.mean([stated(t, conditions)[c] for t in texts[GREY]])) for c in conditions},
        "unfinished": sum(row["unfinished"] for row in written[MODEL]),
        "thoughts": sum(row["thoughts"] for row in written[MODEL]),
    }
    if test[0].study is not None and redrawn:
        numbers["redrawn"] = measure_redrawn(writer, test, texts[MODEL], conditions, indication, redrawn)
    keys = {"text": MODEL, "shuffled": SHUFFLED, "grey": GREY, "nearest": "nearest neighbour"}
    rows = [
        {"id": case.id, "reference": case.report, **{k: texts[n][i] for k, n in keys.items() if n in texts}}
        for i, case in enumerate(test)
    ]
    return numbers, rows, test, sum(errors, [])
