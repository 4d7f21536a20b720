"""The reports of evaluate.py: tables, sentences that follow from the numbers, and figures."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

import matplotlib
import numpy as np

from shared.data.images import read_image
from shared.report import Report, number, p_value, percent, save_figure, with_interval
from task2_report.measures import CALLS, TIERS
from task2_report.report_task import GREY, MODEL, SHUFFLED
from task2_report.scores import ERRORS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HAND_IN = {"classify": Path("reports/task2_report_generation.md"), "report": Path("reports/task2_trained_reports.md")}


def warnings_of(numbers, usual=100):
    limit = numbers["dataset"].get("limit")
    sentences = {
        "The model is untrained: its words mean nothing.": numbers["untrained"],
        f"Measured with --limit {limit}.": limit,
        f"Measured on {numbers['n']} cases only.": numbers["n"] < usual and not limit,
        "Measured on validation films, on which the model was chosen.": numbers["split"] == "val",
        "The model was trained on films drawn by this project.": (numbers["trained_on"] or {}).get("phantom")
        and not numbers["dataset"]["phantom"],
    }
    return [sentence for sentence, holds in sentences.items() if holds]


def model_line(numbers):
    return (
        f"{numbers['model']} ({numbers['family']}, {numbers['parameters'] / 1e6:,.1f} M parameters, weights"
        f" {numbers['quant']}, {numbers['dtype']}), {numbers['hardware']['gpu'] or 'CPU'}, seed {numbers['seed']},"
        f" {numbers['date']}, {numbers['seconds'] / 60:.0f} minutes."
    )


# ------------------------------------------------------------------------------------------------- normal or pneumonia


def classify_page(run_dir, numbers, records, films):
    data, pairs = numbers["dataset"], numbers["pairs"]
    report = Report(
        f"{data['name']}: what the VLM makes of {numbers['n']} films", data["phantom"], warnings_of(numbers)
    )
    report.text(model_line(numbers))
    told = numbers["cnn"]
    beside = f"the CNN of task 1 (`{told['path']}`, trained on {told['dataset']})" if told else "no CNN"
    report.text(
        f"{numbers['n']} {numbers['split']} films of {data['size']} px, {percent(numbers['prevalence'])} % pneumonia;"
        f" beside the model stands {beside}. Intervals of 95 %: DeLong for AUC, Wilson for shares."
    )
    report.heading("Yes or no: margin of the first token")
    rows = [[name, *margin_cells(pair["margin"])] for name, pair in pairs.items()]
    rows += [[{"pixels": "logistic regression on pixels", "cnn": "the CNN"}[name], *margin_cells(row)]
             for name, row in numbers["baselines"].items()]  # fmt: skip
    report.table(["strategy / context", "AUC", "accuracy", "answers yes"], rows)
    report.text(verdict(numbers))
    report.heading("Written answers")
    head = ["strategy / context", *CALLS, "sensitivity", "specificity", "format kept"]
    report.table(head, [call_cells(name, pair) for name, pair in pairs.items()])
    if any("agreement" in pair for pair in pairs.values()):
        agreement_section(report, pairs)
    claims_section(report, pairs)
    controls_section(report, numbers)
    rows = []
    for name, c in ((name, pair["confidence"]) for name, pair in pairs.items() if pair["confidence"]["n"]):
        areas = [number(c["auc_of_right"][k]) for k in ("stated", "margin")]
        rows.append([name, c["n"], c["distinct_confidences"], number(c["rank_correlation"]), *areas])
    if rows:
        report.heading("Stated confidence against the margin")
        head = ["strategy / context", "answers with a confidence", "different values", "rank correlation"]
        report.table([*head, "AUC of being right: stated", "margin"], rows)
    title = f"{data['name']}, {numbers['model']}"
    figures = run_dir / "figures"
    report.heading("Figures")
    report.figure(draw_auc(figures / "auc.png", numbers, title), "AUC of the margin with its interval.")
    if len(numbers["ladder"]) > 1:
        report.figure(draw_ladder(figures / "ladder.png", numbers, title), "The same cases at several resolutions.")
    report.figure(draw_samples(figures / "samples.png", records, films, data["phantom"]), "Sample answers.")
    samples_section(report, records)
    return report.write(run_dir, HAND_IN["classify"], "task2_", page=True)


def margin_cells(row):
    return [with_interval(row["auc"], number), with_interval(row["accuracy"]), percent(row["share_yes"])]


def call_cells(name, pair):
    calls = pair["calls"]
    shares = [percent(calls["shares"][k]) for k in CALLS]
    rates = [with_interval(calls[k]) for k in ("sensitivity", "specificity")]
    return [name, *shares, *rates, percent(pair["complies"])]


def verdict(numbers):
    """Which strategy has the highest AUC, and whether the pixel baseline lies within or beyond its interval."""
    pixels = numbers["baselines"]["pixels"]["auc"]["value"]
    if pixels is None:
        return "No AUC: the films are of one class."
    known = {name: p["margin"]["auc"] for name, p in numbers["pairs"].items() if "/ none" in name}
    if not known:
        return f"Every prompt held a hint (--contexts). Logistic regression on the pixels: {number(pixels)}."
    best = max(known, key=lambda name: known[name]["value"])
    auc = known[best]
    high, low = (auc["value"] if auc[k] is None else auc[k] for k in ("high", "low"))
    where = "lies above" if pixels > high else "lies below" if pixels < low else "lies within"
    return (
        f"Without a hint the highest AUC is that of {best}: {with_interval(auc, number)}, the best of {len(known)}"
        f" and so a little too good. Logistic regression on the pixels: {number(pixels)}, which {where} this interval."
    )


def agreement_section(report, pairs):
    report.heading("Beside the CNN")
    rows = []
    for name, pair in pairs.items():
        a = pair.get("agreement")
        if a:
            m = a["mcnemar"]
            rows.append([
                name, number(a["kappa"]), f"{m['only_a']} / {m['only_b']}, {p_value(m['p'])}",
                with_interval(a["right_where_cnn_wrong"]), with_interval(a["right"]),
                with_interval(pair.get("follows_wrong_opinion")),
            ])  # fmt: skip
    head = ["strategy / context", "kappa", "right: only VLM / only CNN, McNemar", "right where the CNN is wrong"]
    report.table([*head, "right at all", "follows a wrong opinion that it is told"], rows)
    report.text(
        "Right where the CNN is wrong means something only beside how often the answer is right at all. A model that"
        " follows a swapped probability as often as the true one repeats what it is told."
    )


def claims_section(report, pairs):
    report.heading("Claims per text, by what the pixels can bear")
    rows = []
    for name, pair in pairs.items():
        cells = [
            f"{number(pair['claims'][t]['affirmed'], 2)} / {number(pair['claims'][t]['negated'], 2)}" for t in TIERS
        ]
        rows.append([name, *cells, number(pair["words"], 0), pair["distinct_texts"]])
    report.table(["strategy / context", *(f"{t}: affirmed / negated" for t in TIERS), "words", "different texts"], rows)
    report.text(
        f"Unresolvable at 28 px: {', '.join(TIERS['unresolvable'])}, costophrenic angles, fissures, trachea, bones,"
        " air bronchograms. Denying them is as unsupported as stating them. The tiers were made for 28 px."
    )


def controls_section(report, numbers):
    controls = numbers["controls"]
    report.heading(f"Does the image matter? ({controls['strategy']}, no context)")
    rows = [["the film", "–", "–", *margin_cells(controls["real"]["margin"])]]
    for name, row in controls["blind"].items():
        rows.append([name, number(row["image_dependence"]), percent(row["same_text"]), *margin_cells(row["margin"])])
    report.table(["shown", "1 - similarity to the film's text", "same text", "AUC", "accuracy", "answers yes"], rows)
    black = controls["blind"]["black image"]
    report.text(
        f"With a black image {percent(black['same_text'])} % of the texts stay word for word. Over"
        f" {len(controls['paraphrases'])} wordings of one question, {percent(controls['flip_rate'])} % of the films get"
        f" both answers ({percent(controls['flip_rate_same_polarity'])} % over the four of the same direction)."
    )
    if numbers["sizes_missing"]:
        report.text(f"Resolution: sizes not there: {', '.join(map(str, numbers['sizes_missing']))} px.")


def samples_section(report, records, most=3):
    report.heading("Sample records")
    for (strategy, context), rows in list(records.items())[:6]:
        for row in rows[:: max(1, len(rows) // most)][:most]:
            said = " ".join(row["text"].split())[:400].replace("**", "").replace("`", "'")
            flags = f" [{', '.join(row['flags'])}]" if row["flags"] else ""
            truth = {0: "normal", 1: "pneumonia"}.get(row["label"], "")
            report.text(f"{strategy}, context {context}, film {row['image_id']} ({truth}): {said}{flags}")


def draw_auc(path, numbers, title):
    rows = {name: pair["margin"]["auc"] for name, pair in numbers["pairs"].items()}
    rows |= {name: row["auc"] for name, row in numbers["baselines"].items()}
    rows = {name: auc for name, auc in rows.items() if auc["value"] is not None}
    figure, axis = plt.subplots(figsize=(7, 1.4 + 0.22 * len(rows)), layout="constrained")
    for y, (name, auc) in enumerate(rows.items()):
        color = "C1" if name in numbers["baselines"] else "C0"
        if auc["low"] is not None:
            axis.plot([auc["low"], auc["high"]], [y, y], color=color, alpha=0.6)
        axis.plot(auc["value"], y, "o", color=color, markersize=4)
    axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="AUC (dotted: chance)", xlim=(0, 1.02))
    return save_figure(figure, path, title, numbers["dataset"]["phantom"])


def draw_ladder(path, numbers, title):
    rows = {int(size): row["auc"] for size, row in numbers["ladder"].items() if row["auc"]["value"] is not None}
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    sizes, values = list(rows), [auc["value"] for auc in rows.values()]
    errors = np.array([[a["value"] - (a["low"] or 0), (a["high"] or 1) - a["value"]] for a in rows.values()]).T
    axis.errorbar(sizes, values, yerr=errors if len(rows) else None, fmt="o-", capsize=3)
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="pixels per side", ylabel="AUC", xscale="log", ylim=(0, 1.02))
    axis.set_xticks(sizes, [str(s) for s in sizes])
    axis.minorticks_off()
    return save_figure(
        figure, path, f"{title}: the same cases, {numbers['controls']['strategy']}", numbers["dataset"]["phantom"]
    )


def draw_samples(path, records, films, phantom, most=4):
    (strategy, context), rows = next(iter(records.items()))
    chosen = list(range(0, len(rows), max(1, len(rows) // most)))[:most]
    figure, axes = plt.subplots(1, len(chosen), figsize=(2.6 * len(chosen), 3.6), layout="constrained", squeeze=False)
    for axis, i in zip(axes[0], chosen, strict=True):
        axis.imshow(films[i], cmap="gray", vmin=0, vmax=255)
        axis.axis("off")
        truth = {0: "normal", 1: "pneumonia"}[rows[i]["label"]]
        cnn = f"\nCNN {rows[i]['cnn']['probability']:.2f}" if rows[i]["cnn"] else ""
        axis.set_title(f"truth: {truth}\nVLM: {rows[i]['classification'] or 'unread'}{cnn}", fontsize=8)
    return save_figure(figure, path, f"{strategy}, context {context}", phantom)


# ------------------------------------------------------------------------------------------------------------- reports


def report_page(run_dir, numbers, rows, test):
    data, found = numbers["dataset"], numbers["rows"]
    title = f"{data['name']}: reports written by {Path(str(numbers['model'])).name}"
    report = Report(title, data["phantom"], warnings_of(numbers, 50))
    report.text(model_line(numbers))
    of_film = "what is drawn on the film" if data["phantom"] else "what the reference report states or doubts"
    report.text(
        f"{numbers['n']} {numbers['split']} films of patients who are not in training. Labels are read from the texts"
        f" by `shared/metrics/labels.py`; the truth over {len(numbers['conditions'])} conditions is {of_film}; words"
        " are compared in the findings, cleaned as R2Gen does. Intervals of 95 % draw patients."
    )
    report.heading("Results")
    head = ["", "micro-F1", "F1 micro 13", "macro 14", "side right", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR 1.5"]
    head.append("distinct")
    report.table(head, [report_cells(name, row) for name, row in found.items()])
    cnn = numbers["cnn"]
    if cnn:
        report.text(
            f"Upper line: a CNN that only reads the labels of the same films has micro-F1 {number(cnn['f1'])} over the"
            f" same conditions ({cnn['steps']} steps, {cnn['seconds']:.0f} s)."
        )
    report.text(image_sentence(found))
    if numbers["n_abnormal"] > 1:
        report.heading(f"Abnormal films only ({numbers['n_abnormal']})")
        report.table(head, [report_cells(name, row) for name, row in numbers["abnormal"].items()])
    report.heading("Errors per report")
    report.table(
        ["", *ERRORS, "reports without any"],
        [[name, *(number(row["errors"][e], 2) for e in ERRORS),
          percent(row["error_histogram"].get("0", 0) / row["n"])] for name, row in found.items()],
    )  # fmt: skip
    if empty := sum(not row["text"].strip() for row in rows):
        report.text(f"**{empty} of {len(rows)} reports of the model are empty: they invent nothing and say nothing.**")
    redrawn = numbers.get("redrawn")
    if redrawn and redrawn["gone"]["n"]:
        report.heading("Films drawn anew")
        report.text(
            f"The sentence of a finding goes in {with_interval(redrawn['gone'])} % of {redrawn['gone']['n']} films that"
            f" were drawn without it, and in {with_interval(redrawn['other'])} % of {redrawn['other']['n']} that were"
            " drawn without another finding."
        )
    report.heading("A grey film")
    report.table(
        ["condition", "states it, %", "share of the training films, %"],
        [[name, percent(numbers["grey"][name]), percent(numbers["prior"][name])] for name in numbers["conditions"]],
    )
    report.heading("Figures")
    figures = run_dir / "figures"
    report.figure(
        draw_errors(figures / "errors.png", numbers, title), "Errors per report: how many reports have how many."
    )
    report.figure(draw_reports(figures / "samples.png", rows, test, data["phantom"]), "Films of the samples below.")
    report.heading("Samples")
    for i in sample_rows(test):
        said = {"reference": rows[i]["reference"], "written": rows[i]["text"]}
        for name, text in said.items():
            report.text(f"{rows[i]['id']}, {name}: {' '.join(text.split())[:600]}")
    return report.write(run_dir, HAND_IN["report"], "task2_reports_", page=True)


def report_cells(name, row):
    cells = [name, with_interval(row["conditions"], number)]
    cells += [number(row["clinical"][key]) for key in ("f1_micro_13", "f1_macro_14")]
    cells.append(f"{percent(row['sides']['right'])} ({row['sides']['compared']})")
    cells += [number(row["words"][key]) for key in ("bleu_4", "rouge_l", "cider", "meteor_15")]
    return [*cells, f"{row['diversity']['distinct_reports']} of {row['n']}"]


def image_sentence(found):
    """Plainly, from the intervals: is the film used?"""
    if SHUFFLED not in found:
        return "Whether the film is used cannot be told: all films are of one patient."
    own, other = (found[name]["conditions"] for name in (MODEL, SHUFFLED))
    if own["value"] is None or other["value"] is None:
        return "Whether the film is used cannot be told: nothing was stated."
    if own.get("low") is None or other.get("high") is None:
        return (
            "Whether the film is used cannot be told from so few patients: F1"
            f" {number(own['value'])} with the own film, {number(other['value'])} with another's."
        )
    if own["low"] > other["high"]:
        return (
            f"The film is used: with another patient's film the F1 falls from {number(own['value'])} to"
            f" {number(other['value'])}, and the intervals do not meet."
        )
    constant = found["constant"]["words"]["bleu_4"]
    return (
        f"No use of the film is shown: F1 {with_interval(own, number)} with the patient's own film,"
        f" {with_interval(other, number)} with another's. BLEU-4 {number(found[MODEL]['words']['bleu_4'])} must be read"
        f" beside {number(constant)} of one constant report."
    )


def draw_errors(path, numbers, title):
    names = [name for name in (MODEL, SHUFFLED, GREY, "constant", "nearest neighbour") if name in numbers["rows"]]
    most = max(int(k) for name in names for k in numbers["rows"][name]["error_histogram"])
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    width = 0.8 / len(names)
    for nth, name in enumerate(names):
        row = numbers["rows"][name]
        heights = [row["error_histogram"].get(str(k), 0) / row["n"] for k in range(most + 1)]
        axis.bar(np.arange(most + 1) + (nth - (len(names) - 1) / 2) * width, heights, width, label=name)
    axis.set(xlabel="missed, invented and wrong-sided findings of a report", ylabel="share of reports")
    axis.set_xticks(range(most + 1))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)  # below, where it covers no bar
    return save_figure(figure, path, title, numbers["dataset"]["phantom"])


def sample_rows(test, most=4):
    return list(range(0, len(test), max(1, len(test) // most)))[:most]


def draw_reports(path, rows, test, phantom):
    chosen = sample_rows(test)
    figure, axes = plt.subplots(1, len(chosen), figsize=(2.6 * len(chosen), 3), layout="constrained", squeeze=False)
    for axis, i in zip(axes[0], chosen, strict=True):
        axis.imshow(read_image(test[i].film), cmap="gray", vmin=0, vmax=1)
        axis.set_title(rows[i]["id"], fontsize=8)
        axis.axis("off")
    return save_figure(figure, path, "Films of the samples", phantom)
