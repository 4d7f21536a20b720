"""The report of evaluate.py, as Markdown and as one HTML file, and its pictures."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from shared.metrics.statistics import FEW_CLUSTERS
from shared.report import Report, number, p_value, percent, save_figure, short_path, with_interval
from vqa_sft_grpo.glance import glance_section, unreadable_note
from vqa_sft_grpo.prompting import REPAIR_LEVELS

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def columns(text):
    """The cells of a table's first line."""
    return ["" if cell == "-" else cell for cell in text.split(" | ")]


def write_report(run_dir, metrics, figures):
    """figures {name: path} -> report.md and report.html in run_dir."""
    data, clusters = metrics["dataset"], metrics["clusters"]
    report = Report(f"{data['name']} {metrics['split']}: {metrics['n']} questions", warnings=metrics["warnings"])
    adapter = f", adapter `{metrics['adapter']}`" if metrics["adapter"] else ""
    too_few = "With so few groups the intervals are too short; the p values of the sign-flip tests hold."
    report.text(
        f"Model `{metrics['model']}`{adapter}; {data['version']}; seed {metrics['seed']}. {metrics['n']} questions in"
        f" {clusters['num_groups']} image groups (which count like {clusters['effective_groups']:.1f} of equal size);"
        f" {metrics['n_errors']} rows without a readable image, counted as wrong. Square brackets: 95 % intervals,"
        " whole image groups resampled. Numbers in percent unless said otherwise; greedy decoding."
        f" {too_few if clusters['warning'] else ''}".rstrip()
    )
    glance_section(report, metrics["glance"])
    answers_section(report, metrics)
    counting_section(report, metrics)
    json_section(report, metrics["json"])
    if metrics["boxes"]:
        boxes_section(report, metrics["boxes"])
    counterfactual_section(report, metrics["counterfactual"], figures)
    if metrics["redrawn"]:
        redrawn_section(report, metrics["redrawn"], figures)
    confidence_section(report, metrics, figures)
    strata_section(report, metrics["strata"])
    device = metrics["hardware"]["gpu"] or metrics["hardware"]["device"]
    report.text(f"{metrics['seconds']:.0f} s on {device}, {metrics['date']}.")
    report.write(run_dir, page=True)


# --------------------------------------------------------------------------------------------------------- the sections


def answers_section(report, metrics):
    report.heading("Answers and controls")
    first = metrics["rows"][f"{metrics['main_prompt']} prompt"]
    report.text(
        f"All: closed strict and open exact together, n = {first['n']}. Closed n = {first['closed']['n']}, open n ="
        f" {first['open_exact']['n']}. The controls use the {metrics['main_prompt']} prompt; the majority answer is the"
        " most frequent one that training rows give to the same question, else to that kind of question."
    )
    rows = []
    for name, found in metrics["rows"].items():
        parsed = found["parsed"]["value"]
        rows.append([name, *(with_interval(found[key]) for key in "accuracy closed open_exact open_recall".split())])
        rows[-1] += [percent(found["open_precision"]["value"]), with_interval(found["open_f1"])]
        rows[-1] += [percent(None if parsed is None else 1 - parsed), percent(found["contradiction"]["value"])]
    report.table(
        columns("- | all | closed | open exact | open recall | open precision | open F1 | unparsed | contradictions"),
        rows,
    )
    taught, unreadable = (metrics["trained_on"] or {}).get("blank_rows"), metrics["unreadable_controls"]
    was_taught = (
        f" This model was shown {taught} grey pictures in training, with answers of the training rows (--blank-share):"
        " that it gives the most likely answer there was taught. The images of other groups were not."
    ) * (bool(taught) and "blank image" not in unreadable)
    report.text("What the image adds: accuracy with the image minus the control, on the same rows." + was_taught)
    if unreadable:
        report.text(f"**{unreadable_note(unreadable)}**")
    report.table(
        columns("control | difference | sign flip over groups"),
        [
            [name + ", unreadable" * (name in unreadable), with_interval(found), p_value(found["p"])]
            for name, found in metrics["needs_image"].items()
        ],
    )


def counting_section(report, metrics):
    report.heading("Other ways of counting", 3)
    report.text(
        f"Synonyms: the strict score after the word list `{metrics['synonyms']}`. The LLaVA-Med and MedEvalKit columns"
        " count as those scripts do, faults included, on the answer read from the response: LLaVA-Med's closed score"
        " leaves some wrong answers out of its denominator and its recall rewards repetition; MedEvalKit's precision,"
        " recall and F1 stand under each other's names. For reading beside published numbers only."
    )
    rows = []
    for name, found in metrics["rows"].items():
        llava, kit = found["llava_med"], found["medevalkit"]
        rows.append([name, with_interval(found["synonyms"]), percent(llava.get("closed")), llava["n_closed"]])
        rows[-1] += [percent(llava.get(key)) for key in ("recall", "f1")]
        rows[-1] += [percent(kit.get("closed")), kit["n_closed"]]
        rows[-1] += [percent(kit.get(key)) for key in ("exact", "precision", "recall", "f1")]
    report.table(
        columns(
            "- | synonyms, all | LLaVA-Med closed | its n | LLaVA-Med open recall | LLaVA-Med open F1"
            " | MedEvalKit closed | its n | MedEvalKit exact"
            ' | MedEvalKit "precision" | MedEvalKit "recall" | MedEvalKit "F1"'
        ),
        rows,
    )


def json_section(report, styles):
    report.heading("Form of the responses")
    valid = ", ".join(f"{percent(found['valid'])} % with the {name} prompt" for name, found in styles.items())
    report.text(
        f"Valid: {valid} (levels 0 and 1, with an answer). What had to be mended before a response could be read:"
    )
    report.table(
        ["level", *(f"{name} prompt" for name in styles)],
        [
            [f"{level} {meaning}", *(found["levels"][str(level)] for found in styles.values())]
            for level, meaning in REPAIR_LEVELS.items()
        ],
    )


def boxes_section(report, boxes):
    report.heading("Boxes")
    rows = [["responses with a box", with_interval(boxes["box_rate"]), boxes["box_rate"]["n"]]]
    for of, part in (("the gold region", boxes), ("a gold region of at most a quarter of the image", boxes["places"])):
        names = {"iou": f"mean IoU with {of} (no box: 0)", "iou_constant_box": "the same of its best constant box"}
        for key, name in (names | {"iou_over_constant_box": "difference"}).items() if part["iou"]["n"] else ():
            if key in part:
                rows.append([name, with_interval(part[key], number), part[key]["n"]])
    report.table(["", "value", "n"], rows)
    if not boxes["iou"]["n"]:
        report.text("No gold regions are known for these rows: no IoU.")
    elif boxes["constant_box"]:
        report.text(
            f"The constant box, {', '.join(f'{v:.2f}' for v in boxes['constant_box'])} in shares of width and height,"
            " was chosen on training rows, and for the smaller regions another. Several boxes count as their union."
        )
    else:
        report.text("No training row has a region, so there is no constant box to compare with.")


def verdict(source, test):
    """The test of one source of regions in one sentence."""
    delta, fills = test["all_fills"]["delta"], test["by_fill"].values()
    clear = delta["low"] is not None and (delta["low"] > 0 or delta["high"] < 0)
    whose = {"gold": "the gold region", "self": "the model's own region"}[source]
    floor, flipped = max(edit["flipped"] for edit in test["identity"].values()), test["all_fills"]["flip_roi"]
    if floor and floor >= flipped:
        return (
            f"Nothing is shown: {percent(floor)} % of the answers change when the image is only saved again or shifted"
            f" by a pixel, and {percent(flipped)} % without {whose}."
        )
    if not clear:
        return f"No difference between {whose} and random regions is shown: its interval holds 0."
    if delta["value"] < 0:
        return f"Answers change less often without {whose} than without random regions: they do not come from there."
    if test["fills_agree_in_sign"]:
        return f"Answers change more often without {whose} than without random regions of its size, with every fill."
    return (
        f"On average answers change more often without {whose}, but not with every fill: part of it may be the"
        f" fills' own oddity ({sum(f['delta']['value'] > 0 for f in fills)} of {len(fills)} fills above 0)."
    )


CF_SOURCES = {
    "gold": "gold regions",
    "self": "the model's own boxes (self: chosen by the model, so not evidence on the level of gold ones)",
}


def counterfactual_section(report, cf, figures):
    report.heading("Counterfactual test: does the answer depend on the region?")
    refused = "; ".join(
        f"{source}: {', '.join(f'{reason} {n}' for reason, n in reasons.items())}"
        for source, reasons in cf["not_taken"].items()
        if reasons
    )
    report.text(
        f"{cf['cases']} cases (at most {cf['asked_for']} asked for, drawn by the seed among rows with a parsed answer"
        f" and a region), each region against {cf['random_regions']} random ones of its area and share of foreground"
        f" that hardly touch it. {f'Not taken: {refused}. ' if refused else ''}Only the difference has a meaning:"
        " taking anything out changes some answers."
    )
    if not cf["cases"]:
        report.text("No case could be tested.")
    for source, name in CF_SOURCES.items():
        if source in cf:
            report.heading(f"With {name}", 3)
            report.text(verdict(source, cf[source]))
            one_source(report, cf[source])
    if "strip" in figures:
        report.figure(
            figures["strip"],
            "Cases chosen by rule: the largest and the smallest difference between region and random regions. Red:"
            " region of interest; blue: random regions; below each picture the answer given to it.",
        )


def flip_cells(test):
    """n, changed without the region, without random ones, difference, p, p after Holm."""
    shares = [percent(test["flip_roi"]), percent(test["flip_random"]), with_interval(test["delta"])]
    return [test["n"], *shares, p_value(test["delta"]["p"]), p_value(test["delta"].get("p_holm"))]


def one_source(report, test):
    """The tables and the small print of the regions of one source."""
    every = test["all_fills"]
    by_fill = {"all fills": every, **test["by_fill"]}
    flips = columns("n | changed, region | changed, random | difference | sign flip | after Holm")
    rows = []
    for label, found in by_fill.items():
        unparsed, m = [percent(found[key]) for key in ("unparsed_roi", "unparsed_random")], found.get("mcnemar")
        mcnemar = f"{m['only_a']} / {m['only_b']}, {p_value(m['p'])}" if m else "–"
        rows.append([label, *flip_cells(found), " / ".join(unparsed), mcnemar])
    report.table(["fill", *flips, "unparsed region / random", "McNemar region / random only"], rows)
    report.text(
        "How much less likely the model finds its own answer, and its own response, when it sees the edited image"
        " (drop of the log-probability, nats per token). An answer that follows from reasoning written before it"
        " stays likely whatever the image shows; then the response's drop tells more."
    )
    rows = []
    for label, found in by_fill.items():
        rows.append([label, found["necessity"]["n"]])
        for part in (found["necessity"], found["necessity_response"]):
            rows[-1] += [number(part["roi"]), number(part["random"]), with_interval(part, number), p_value(part["p"])]
    report.table(
        columns(
            "fill | n | answer, region | answer, random | difference | sign flip | response, region | response, random"
            " | difference | sign flip"
        ),
        rows,
    )
    jpeg, shift = (percent(test["identity"][name]["flipped"]) for name in ("jpeg", "shift"))
    few = ", so few that the intervals are too short: go by the p values" if every["num_groups"] < FEW_CLUSTERS else ""
    wrong, design = every["correct_to_wrong"], every["design_effect"]
    needed = "The difference seen is 0, so no number of cases would show it"
    if every["cases_needed"]:
        needed = f"{every['cases_needed']} independent cases would show the difference seen with 80 % power"
        if design and design > 1:
            needed += f"; several questions per image make that {design:.2f} times as many"
    report.text(
        f"{every['n']} cases on {every['num_groups']} image groups{few}. Identity floor: {jpeg} changed by JPEG of"
        f" quality 95, {shift} by a shift of one pixel. Right answers that become wrong: {percent(wrong['roi'])}"
        f" without the region, {percent(wrong['random'])} without a random one, difference {with_interval(wrong)} (n ="
        f" {wrong['n']}). {needed}."
    )
    report.table(["asked about", *flips], [[kind, *flip_cells(found)] for kind, found in test["by_type"].items()])


def redrawn_section(report, test, figures):
    report.heading("When the finding is really not there")
    report.text(
        "Films of the phantom drawn anew, same patient, position and noise: without what the question asks about, and"
        " without another finding. Questions whether a condition is there, all with the answer yes. A model that sees"
        " the finding says no in the first case and yes in the second; no fill is involved, and these shares are not"
        " comparable with those of the fills above. Answers that cannot be read have not changed:"
        f" {test['unparsed']['redrawn']} and {test['unparsed']['redrawn_other']}."
    )
    names = {
        "without": "answers change without the finding asked about",
        "other": "answers change without another finding",
        "difference": "difference, films that have both",
        "both_right": "right about both films: yes with it, no without it",
        "only_finding": "the same where nothing else is on the film",
        "others_left": "the same where other findings are left",
    }
    rows = []
    for key, name in names.items():
        p = p_value(test[key]["p"]) if "p" in test[key] else ""
        rows.append([name, with_interval(test[key]), test[key]["n"], p])
    report.table(columns("- | share | n | sign flip"), rows)
    if "redrawn" in figures:
        report.figure(
            figures["redrawn"],
            "The first two films on which the answer changes without the finding and stays without another one, and the"
            " first two of the others. Red: the region of the question; red text: the answer has changed.",
        )


def confidence_section(report, metrics, figures):
    confidence = metrics["confidence"]
    report.heading("Confidence: which answers to keep")
    report.text(
        "AURC is the mean error rate over all coverages when rows are answered in order of the signal (lower is better;"
        " in percent). It lies between that of a perfect order and the error rate (no order)."
    )
    rows = []
    for scope in ("all rows", "counterfactual cases"):
        for name, found in confidence.get(scope, {}).items():
            bounds = [percent(found["perfect"]), percent(found["no_order"]), found["n_without_value"]]
            rows.append([f"{name} ({scope})", found["n"], with_interval(found), *bounds])
    report.table(columns("signal | n | AURC | perfect | no order | rows without the signal (put last)"), rows)
    if "risk_coverage" in figures:
        caption = "Error rate among the rows answered, against the share of rows answered."
        report.figure(figures["risk_coverage"], caption)
    if "thresholds" not in confidence:
        report.text(f"Caption-question similarity: not measured; {metrics['no_sentence_encoder']}.")
        return
    encoder = metrics["sentence_encoder"]
    encoder = short_path(encoder) if Path(encoder).is_absolute() else encoder
    made_up = " **This encoder has random weights: the numbers show that the code runs, nothing else.**"
    report.text(
        f"Caption-question similarity by `{encoder}`; {confidence['rows_with_caption']} of {metrics['n']} responses"
        f" have a caption.{made_up * encoder.startswith('tiny')} A caption that repeats the question is similar to it,"
        " so similarity is no evidence by itself."
    )
    rows = []
    for found in confidence["thresholds"]:
        shares = [percent(found[key]) for key in ("coverage", "accuracy", "accuracy_by_logprob")]
        rows.append([found["threshold"], found["n"], *shares])
    report.table(
        columns("threshold | n kept | coverage | accuracy | accuracy on as many rows by log-probability"), rows
    )


def strata_section(report, strata):
    report.heading("By type")
    for key, table in strata.items():
        rows = []
        for name, found in table.items():
            rows.append([name, found["accuracy"]["n"], with_interval(found["accuracy"]), found["unparsed"]])
            rows[-1] += [with_interval(found["open_recall"]), with_interval(found["open_f1"])]
        report.table([key.replace("_", " "), *columns("n | accuracy | rows unparsed | open recall | open F1")], rows)


# -------------------------------------------------------------------------------------------------------------- figures


def draw_risk_coverage(path, curves, title):
    """curves {scope: {signal: (coverage, risk)}}: one panel per scope -> path."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4.8 * len(curves), 4.2), layout="constrained", squeeze=False)
    for axis, (scope, signals) in zip(axes[0], curves.items(), strict=True):
        for nth, (name, (coverage, risk)) in enumerate(signals.items()):  # later ones are thinner: none hides another
            line = dict(linewidth=4 - 0.8 * nth, linestyle="-" if nth % 2 == 0 else "--")
            axis.plot(np.asarray(coverage) * 100, np.asarray(risk) * 100, label=name, **line)
        first = next(iter(signals.values()))[1]
        axis.axhline(100 * float(first[-1]), color="grey", linewidth=0.8, linestyle="--", label="no order")
        axis.set(xlabel="rows answered, %", ylabel="errors among them, %", title=f"{scope}, n = {len(first)}")
        axis.set(xlim=(0, 100), ylim=(-2, 102))
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        axis.grid(alpha=0.3)
    return save_figure(figure, path, title, dpi=110)


def draw_strip(path, strips, title):
    """
    strips: [{"text", "panels": [{"image", "name", "below", "changed", "boxes": [(box, colour)]}]}]: a row of pictures
    per case, changed answers in red -> path.
    """
    count, side = max(len(strip["panels"]) for strip in strips), 1.9  # inches per picture
    head = 0.8 if any(strip["text"] for strip in strips) else 0.45  # and above it: a text, and the name of the picture
    height = len(strips) * (side + head) + 0.45
    figure, axes = plt.subplots(len(strips), count, figsize=(side * count, height), squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - (head + 0.1) / height, bottom=0.35 / height, wspace=0.06, hspace=head / side
    )
    for line, strip in zip(axes, strips, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, panel in zip(line, strip["panels"], strict=False):
            axis.imshow(panel["image"], cmap="gray", vmin=0, vmax=255)
            for (x0, y0, x1, y1), colour in panel["boxes"]:
                outline = dict(fill=False, edgecolor=colour, linewidth=1)
                axis.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **outline))
            axis.set_title(panel["name"], fontsize=8, pad=3)
            colour = "tab:red" if panel["changed"] else "black"
            below = "\n".join(textwrap.wrap(panel["below"][:200], 26)[:2])
            place = dict(transform=axis.transAxes, ha="center", va="top", fontsize=8)
            axis.text(0.5, -0.03, below, color=colour, **place)
        text = textwrap.shorten(strip["text"][:1000], 22 * count, placeholder=" ...")
        place = dict(transform=line[0].transAxes, ha="left", va="bottom", fontsize=8.5)
        line[0].text(0, 1.14, text, fontweight="bold", **place)
    return save_figure(figure, path, title, dpi=110)
