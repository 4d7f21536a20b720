"""The report of evaluate.py, once as Markdown and once as HTML in a single file, and its pictures."""

import base64
import html
import re
import textwrap

import matplotlib
import numpy as np

from shared.runtime import atomic_file
from vqa_sft_grpo.prompting import REPAIR_LEVELS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEW_GROUPS = 30  # below that, percentile intervals are too short (shared/metrics/statistics.py)
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}th{background:#f3f3f3}img{max-width:100%}figcaption{color:#555}strong{color:#a00}"""


# -------------------------------------------------------------------------------------------------------------- numbers


def number(value, digits=3):
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.000"


def percent(value):
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def with_interval(rate, show=percent):
    """{"value", "low", "high"} -> "64.2 [58.0, 70.1]"."""
    if rate is None or rate["value"] is None:
        return "–"
    return show(rate["value"]) + (
        f" [{show(rate['low'])}, {show(rate['high'])}]" if rate.get("low") is not None else ""
    )


def p_value(p):
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


# --------------------------------------------------------------------------------------- a document as a list of blocks


class Document:
    """Headings, paragraphs, tables and figures in order; `**bold**` and `code` in paragraphs are the only marks."""

    def __init__(self):
        self.blocks = []

    def heading(self, text, level=2):
        self.blocks.append(("heading", level, text))

    def text(self, text):
        self.blocks.append(("text", text))

    def table(self, header, rows):
        self.blocks.append(("table", header, rows))

    def figure(self, path, caption):
        self.blocks.append(("figure", path, caption))

    def markdown(self):
        out = []
        for kind, *what in self.blocks:
            if kind == "heading":
                out += ["#" * what[0] + " " + what[1], ""]
            elif kind == "text":
                out += [what[0], ""]
            elif kind == "table":
                header, rows = (
                    [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in part]
                    for part in ([what[0]], what[1])
                )
                out += [
                    "| " + " | ".join(header[0]) + " |",
                    "|---" * len(what[0]) + "|",
                    *("| " + " | ".join(row) + " |" for row in rows),
                    "",
                ]
            else:
                out += [f"![{what[1]}](figures/{what[0].name})", "", what[1], ""]
        return "\n".join(out)

    def html(self, title):
        def marked(text):
            text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
            return re.sub(r"`(.+?)`", r"<code>\1</code>", text)

        out = [
            "<!doctype html><html lang='en'><meta"
            f" charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style><body>"
        ]
        for kind, *what in self.blocks:
            if kind == "heading":
                out.append(f"<h{what[0]}>{html.escape(what[1])}</h{what[0]}>")
            elif kind == "text":
                out.append(f"<p>{marked(what[0])}</p>")
            elif kind == "table":
                cells = [
                    f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in row)}</tr>"
                    for tag, row in (("th", what[0]), *(("td", row) for row in what[1]))
                ]
                out.append(f"<table>{''.join(cells)}</table>")
            else:
                data = base64.b64encode(what[0].read_bytes()).decode()
                out.append(
                    f"<figure><img alt='{html.escape(what[1], quote=True)}'"
                    f" src='data:image/png;base64,{data}'><figcaption>{html.escape(what[1])}</figcaption></figure>"
                )
        return "\n".join([*out, "</body></html>", ""])


def write_report(run_dir, metrics, figures):
    """figures {name: path} -> report.md and report.html in run_dir."""
    document = build(metrics, figures)
    for name, text in (
        ("report.md", document.markdown()),
        ("report.html", document.html(f"{metrics['dataset']['name']} {metrics['split']}: medical VQA")),
    ):
        with atomic_file(run_dir / name, "w") as file:
            file.write(text)


# --------------------------------------------------------------------------------------------------------- the sections


def build(metrics, figures):
    doc = Document()
    data = metrics["dataset"]
    doc.heading(f"{data['name']} {metrics['split']}: {metrics['n']} questions", 1)
    for warning in metrics["warnings"]:
        doc.text(f"**{warning}**")
    clusters = metrics["clusters"]
    doc.text(
        f"Model `{metrics['model']}`"
        + (f", adapter `{metrics['adapter']}`" if metrics["adapter"] else "")
        + f"; {data['version']}; seed {metrics['seed']}. {metrics['n']} questions in {clusters['num_groups']} image"
        f" groups (which count like {clusters['effective_groups']:.1f} of equal size); {metrics['n_errors']} rows"
        " without a readable image, counted as wrong. Square brackets: 95 % intervals, whole image groups resampled."
        " Numbers in percent unless said otherwise; greedy decoding."
        + (
            " With so few groups the intervals are too short; the p values of the sign-flip tests hold."
            if clusters["warning"]
            else ""
        )
    )
    answers_section(doc, metrics)
    json_section(doc, metrics)
    if metrics["boxes"]:
        boxes_section(doc, metrics["boxes"])
    counterfactual_section(doc, metrics["counterfactual"], figures)
    if metrics["redrawn"]:
        redrawn_section(doc, metrics["redrawn"], figures)
    confidence_section(doc, metrics, figures)
    strata_section(doc, metrics)
    doc.text(
        f"{metrics['seconds']:.0f} s on {metrics['hardware']['gpu'] or metrics['hardware']['device']},"
        f" {metrics['date']}. For research and teaching only; not a medical device, no medical advice."
    )
    return doc


def answers_section(doc, metrics):
    rows, main = metrics["rows"], f"{metrics['main_prompt']} prompt"
    n = rows[main]
    doc.heading("Answers and controls")
    doc.text(
        f"All: closed strict and open exact together, n = {n['n']}. Closed n = {n['closed']['n']}, open n ="
        f" {n['open_exact']['n']}. The controls use the {metrics['main_prompt']} prompt; the majority answer is the"
        " most frequent one that training rows give to the same question, else to that kind of question."
    )
    header = [
        "",
        "all",
        "closed",
        "open exact",
        "open recall",
        "open precision",
        "open F1",
        "unparsed",
        "contradictions",
    ]
    columns = ("accuracy", "closed", "open_exact", "open_recall")
    doc.table(
        header,
        [
            [
                name,
                *(with_interval(r[c]) for c in columns),
                percent(r["open_precision"]["value"]),
                with_interval(r["open_f1"]),
                percent(None if r["parsed"]["value"] is None else 1 - r["parsed"]["value"]),
                percent(r["contradiction"]["value"]),
            ]
            for name, r in rows.items()
        ],
    )
    taught = (metrics["trained_on"] or {}).get("blank_rows")
    doc.text(
        "What the image adds: accuracy with the image minus the control, on the same rows."
        + (
            f" This model was shown {taught} grey pictures in training, with answers of the training rows"
            " (--blank-share): that it gives the most likely answer there was taught. The images of other groups were"
            " not."
            if taught
            else ""
        )
    )
    doc.table(
        ["control", "difference", "p (sign flip over groups)"],
        [[name, with_interval(d), p_value(d["p"])] for name, d in metrics["needs_image"].items()],
    )
    doc.heading("Other ways of counting", 3)
    doc.text(
        f"Synonyms: the strict score after the word list `{metrics['synonyms']}`. The LLaVA-Med and MedEvalKit columns"
        " count as those scripts do, faults included, on the answer read from the response: LLaVA-Med's closed score"
        " leaves some wrong answers out of its denominator and its recall rewards repetition; MedEvalKit's precision,"
        " recall and F1 stand under each other's names. For reading beside published numbers only."
    )
    header = [
        "",
        "synonyms, all",
        "LLaVA-Med closed",
        "its n",
        "LLaVA-Med open recall",
        "LLaVA-Med open F1",
        "MedEvalKit closed",
        "its n",
        "MedEvalKit exact",
        'MedEvalKit "precision"',
        'MedEvalKit "recall"',
        'MedEvalKit "F1"',
    ]
    doc.table(
        header,
        [
            [
                name,
                with_interval(r["synonyms"]),
                percent(r["llava_med"].get("closed")),
                r["llava_med"]["n_closed"],
                percent(r["llava_med"].get("recall")),
                percent(r["llava_med"].get("f1")),
                percent(r["medevalkit"].get("closed")),
                r["medevalkit"]["n_closed"],
                *(percent(r["medevalkit"].get(c)) for c in ("exact", "precision", "recall", "f1")),
            ]
            for name, r in rows.items()
        ],
    )


def json_section(doc, metrics):
    doc.heading("Form of the responses")
    styles = metrics["json"]
    doc.text(
        "Valid: "
        + ", ".join(f"{percent(s['valid'])} % with the {name} prompt" for name, s in styles.items())
        + " (levels 0 and 1, with an answer). What had to be mended before a response could be read:"
    )
    doc.table(
        ["level", *(f"{name} prompt" for name in styles)],
        [
            [f"{level} {meaning}", *(s["levels"][str(level)] for s in styles.values())]
            for level, meaning in REPAIR_LEVELS.items()
        ],
    )


def boxes_section(doc, boxes):
    doc.heading("Boxes")
    rows = [["responses with a box", with_interval(boxes["box_rate"]), boxes["box_rate"]["n"]]]
    for of, part in (("the gold region", boxes), ("a gold region of at most a quarter of the image", boxes["places"])):
        if part["iou"]["n"]:
            rows.append([f"mean IoU with {of} (no box: 0)", with_interval(part["iou"], number), part["iou"]["n"]])
            if part["constant_box"]:
                rows.append(
                    [
                        "the same of its best constant box",
                        with_interval(part["iou_constant_box"], number),
                        part["iou_constant_box"]["n"],
                    ]
                )
                rows.append(
                    [
                        "difference",
                        with_interval(part["iou_over_constant_box"], number),
                        part["iou_over_constant_box"]["n"],
                    ]
                )
    doc.table(["", "value", "n"], rows)
    if not boxes["iou"]["n"]:
        doc.text("No gold regions are known for these rows: no IoU.")
    elif boxes["constant_box"]:
        doc.text(
            f"The constant box, {', '.join(f'{v:.2f}' for v in boxes['constant_box'])} in shares of width and height,"
            " was chosen on training rows, and for the smaller regions another. Several boxes count as their union."
        )
    else:
        doc.text("No training row has a region, so there is no constant box to compare with.")


def verdict(source, test):
    delta, fills = test["all_fills"]["delta"], test["by_fill"].values()
    clear = delta["low"] is not None and (delta["low"] > 0 or delta["high"] < 0)
    whose = {"gold": "the gold region", "self": "the model's own region"}[source]
    floor = max(edit["flipped"] for edit in test["identity"].values())
    if floor and floor >= test["all_fills"]["flip_roi"]:
        return (
            f"Nothing is shown: {percent(floor)} % of the answers change when the image is only saved again or shifted"
            f" by a pixel, and {percent(test['all_fills']['flip_roi'])} % without {whose}."
        )
    if clear and delta["value"] > 0 and test["fills_agree_in_sign"]:
        return f"Answers change more often without {whose} than without random regions of its size, with every fill."
    if clear and delta["value"] > 0:
        return (
            f"On average answers change more often without {whose}, but not with every fill: part of it may be the"
            f" fills' own oddity ({sum(f['delta']['value'] > 0 for f in fills)} of {len(fills)} fills above 0)."
        )
    if clear:
        return f"Answers change less often without {whose} than without random regions: they do not come from there."
    return f"No difference between {whose} and random regions is shown: answers change about as often without either."


def counterfactual_section(doc, cf, figures):
    doc.heading("Counterfactual test: does the answer depend on the region?")
    refused = "; ".join(
        f"{source}: " + ", ".join(f"{reason} {n}" for reason, n in reasons.items())
        for source, reasons in cf["not_taken"].items()
        if reasons
    )
    doc.text(
        f"{cf['cases']} cases (at most {cf['asked_for']} asked for, drawn by the seed among rows with a parsed answer"
        f" and a region), each region against {cf['random_regions']} random ones of its area and share of foreground"
        " that hardly touch it. "
        + (f"Not taken: {refused}. " if refused else "")
        + "Only the difference has a meaning: taking anything out changes some answers."
    )
    if not cf["cases"]:
        doc.text("No case could be tested.")
    for source, name in (
        ("gold", "gold regions"),
        ("self", "the model's own boxes (self: chosen by the model, so not evidence on the level of gold ones)"),
    ):
        if source not in cf:
            continue
        test = cf[source]
        every = test["all_fills"]
        doc.heading(f"With {name}", 3)
        doc.text(verdict(source, test))
        header = [
            "fill",
            "n",
            "changed, region",
            "changed, random",
            "difference",
            "p",
            "p Holm",
            "unparsed region / random",
            "McNemar region / random only, p",
        ]
        drops = [
            "fill",
            "n",
            "answer, region",
            "answer, random",
            "difference",
            "p",
            "response, region",
            "response, random",
            "difference",
            "p",
        ]

        def line(label, t):
            m = t.get("mcnemar")
            return [
                label,
                t["n"],
                percent(t["flip_roi"]),
                percent(t["flip_random"]),
                with_interval(t["delta"]),
                p_value(t["delta"]["p"]),
                p_value(t["delta"].get("p_holm")),
                f"{percent(t['unparsed_roi'])} / {percent(t['unparsed_random'])}",
                f"{m['only_a']} / {m['only_b']}, {p_value(m['p'])}" if m else "–",
            ]

        def drop_line(label, t):
            parts = (t["necessity"], t["necessity_response"])
            return [
                label,
                parts[0]["n"],
                *(
                    cell
                    for part in parts
                    for cell in (
                        number(part["roi"]),
                        number(part["random"]),
                        with_interval(part, number),
                        p_value(part["p"]),
                    )
                ),
            ]

        doc.table(header, [line("all fills", every), *(line(fill, t) for fill, t in test["by_fill"].items())])
        doc.text(
            "How much less likely the model finds its own answer, and its own response, when it sees the edited image"
            " (drop of the log-probability, nats per token). An answer that follows from reasoning written before it"
            " stays likely whatever the image shows; then the response's drop tells more."
        )
        doc.table(drops, [drop_line("all fills", every), *(drop_line(fill, t) for fill, t in test["by_fill"].items())])
        floor = test["identity"]
        ctw = every["correct_to_wrong"]
        needed = (
            f"{every['cases_needed']} independent cases would show the difference seen with 80 % power"
            if every["cases_needed"]
            else "The difference seen is 0, so no number of cases would show it"
        )
        design = every["design_effect"]
        few = (
            ", so few that the intervals are too short: go by the p values" if every["num_groups"] < FEW_GROUPS else ""
        )
        doc.text(
            f"{every['n']} cases on {every['num_groups']} image groups{few}. Identity floor:"
            f" {percent(floor['jpeg']['flipped'])} changed by JPEG of quality 95, {percent(floor['shift']['flipped'])}"
            f" by a shift of one pixel. Right answers that become wrong: {percent(ctw['roi'])} without the region,"
            f" {percent(ctw['random'])} without a random one, difference {with_interval(ctw)} (n = {ctw['n']})."
            f" {needed}"
            + (
                f"; several questions per image make that {design:.2f} times as many"
                if design and design > 1 and every["cases_needed"]
                else ""
            )
            + "."
        )
        doc.table(
            ["asked about", "n", "changed, region", "changed, random", "difference", "p", "p Holm"],
            [
                [
                    t,
                    r["n"],
                    percent(r["flip_roi"]),
                    percent(r["flip_random"]),
                    with_interval(r["delta"]),
                    p_value(r["delta"]["p"]),
                    p_value(r["delta"].get("p_holm")),
                ]
                for t, r in test["by_type"].items()
            ],
        )
    if "strip" in figures:
        doc.figure(
            figures["strip"],
            "Cases chosen by rule: the largest and the smallest difference between region and random regions. Red:"
            " region of interest; blue: random regions; below each picture the answer given to it.",
        )


def redrawn_section(doc, test, figures):
    doc.heading("When the finding is really not there")
    doc.text(
        "Films of the phantom drawn anew, same patient, position and noise: without what the question asks about, and"
        " without another finding. Questions whether a condition is there, all with the answer yes. A model that sees"
        " the finding says no in the first case and yes in the second; no fill is involved, and these shares are not"
        " comparable with those of the fills above. Answers that cannot be read have not changed:"
        f" {test['unparsed']['redrawn']} and {test['unparsed']['redrawn_other']}."
    )
    lines = (
        ("answers change without the finding asked about", test["without"]),
        ("answers change without another finding", test["other"]),
        ("difference, films that have both", test["difference"]),
        ("right about both films: yes with it, no without it", test["both_right"]),
        ("the same where nothing else is on the film", test["only_finding"]),
        ("the same where other findings are left", test["others_left"]),
    )
    doc.table(
        ["", "share", "n", "p"],
        [
            [name, with_interval(value), value["n"], p_value(value.get("p")) if "p" in value else ""]
            for name, value in lines
        ],
    )
    if "redrawn" in figures:
        doc.figure(
            figures["redrawn"],
            "The first two films on which the answer changes without the finding and stays without another one, and the"
            " first two of the others. Red: the region of the question; red text: the answer has changed.",
        )


def confidence_section(doc, metrics, figures):
    confidence = metrics["confidence"]
    doc.heading("Confidence: which answers to keep")
    doc.text(
        "AURC is the mean error rate over all coverages when rows are answered in order of the signal (lower is better;"
        " in percent). It lies between that of a perfect order and the error rate (no order)."
    )
    table = []
    for scope in ("all rows", "counterfactual cases"):
        table += [
            [
                f"{name} ({scope})",
                r["n"],
                with_interval(r),
                percent(r["perfect"]),
                percent(r["no_order"]),
                r["n_without_value"],
            ]
            for name, r in confidence.get(scope, {}).items()
        ]
    doc.table(["signal", "n", "AURC", "perfect", "no order", "rows without the signal (put last)"], table)
    if "risk_coverage" in figures:
        doc.figure(figures["risk_coverage"], "Error rate among the rows answered, against the share of rows answered.")
    encoder = metrics["sentence_encoder"]
    if "thresholds" not in confidence:
        doc.text("Caption-question similarity: not measured, no --sentence-encoder was given.")
        return
    doc.text(
        f"Caption-question similarity by `{encoder}`; {confidence['rows_with_caption']} of {metrics['n']} responses"
        " have a caption."
        + (
            " **This encoder has random weights: the numbers show that the code runs, nothing else.**"
            if encoder.startswith("tiny")
            else ""
        )
        + " A caption that repeats the question is similar to it, so similarity is no evidence by itself."
    )
    doc.table(
        ["threshold", "n kept", "coverage", "accuracy", "accuracy on as many rows by log-probability"],
        [
            [r["threshold"], r["n"], percent(r["coverage"]), percent(r["accuracy"]), percent(r["accuracy_by_logprob"])]
            for r in confidence["thresholds"]
        ],
    )


def strata_section(doc, metrics):
    doc.heading("By type")
    for key, table in metrics["strata"].items():
        doc.table(
            [key.replace("_", " "), "n", "accuracy", "unparsed", "open recall", "open F1"],
            [
                [
                    name,
                    r["accuracy"]["n"],
                    with_interval(r["accuracy"]),
                    r["unparsed"],
                    with_interval(r["open_recall"]),
                    with_interval(r["open_f1"]),
                ]
                for name, r in table.items()
            ],
        )


# -------------------------------------------------------------------------------------------------------------- figures


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_risk_coverage(path, curves, title):
    """curves {scope: {signal: (coverage, risk)}}: one panel per scope."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4.8 * len(curves), 3.6), layout="constrained", squeeze=False)
    for axis, (scope, signals) in zip(axes[0], curves.items(), strict=True):
        for name, (coverage, risk) in signals.items():
            axis.plot(np.asarray(coverage) * 100, np.asarray(risk) * 100, label=name, linewidth=1.5)
        axis.axhline(
            100 * float(next(iter(signals.values()))[1][-1]),
            color="grey",
            linewidth=0.8,
            linestyle="--",
            label="no order",
        )
        axis.set(
            xlabel="rows answered, %",
            ylabel="errors among them, %",
            xlim=(0, 100),
            ylim=(-2, 102),
            title=f"{scope}, n = {len(next(iter(signals.values()))[0])}",
        )
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def draw_strip(path, strips, title):
    """
    strips: [{"text", "panels": [{"image", "name", "below", "changed", "boxes": [(box, colour)]}]}]: a row of pictures
    per case, changed answers in red.
    """
    columns, side, head = (
        max(len(strip["panels"]) for strip in strips),
        1.9,
        0.8,
    )  # inches per picture, above and below it
    height = len(strips) * (side + head) + 0.4
    figure, axes = plt.subplots(len(strips), columns, figsize=(side * columns, height), squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.85 / height, bottom=0.35 / height, wspace=0.06, hspace=head / side
    )
    for line, strip in zip(axes, strips, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, panel in zip(line, strip["panels"], strict=False):
            axis.imshow(panel["image"], cmap="gray", vmin=0, vmax=255)
            for (x0, y0, x1, y1), colour in panel["boxes"]:
                axis.add_patch(
                    plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1)
                )
            axis.set_title(panel["name"], fontsize=8, pad=3)
            below = "\n".join(textwrap.wrap(panel["below"], 26)[:2])
            axis.text(
                0.5,
                -0.03,
                below,
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                color="tab:red" if panel["changed"] else "black",
            )
        line[0].text(
            0,
            1.14,
            textwrap.shorten(strip["text"], 22 * columns, placeholder=" ..."),
            transform=line[0].transAxes,
            ha="left",
            va="bottom",
            fontsize=8.5,
            fontweight="bold",
        )
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / height, va="top")
    return save(figure, path)
