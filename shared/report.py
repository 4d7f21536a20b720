"""
What every script tells, and must tell alike: numbers with intervals, tables, figures, a report as Markdown and as HTML.

    report = Report(f"{data.name}: classification report", phantom=data.phantom)
    report.text(f"Measured on {n} images.")
    report.table(["", "AUC"], [[name, with_interval(row["auc"], number)] for name, row in rows.items()])
    report.figure(save_figure(figure, run_dir / "figures" / "roc.png", "ROC curves", data.phantom), "ROC curves.")
    report.write(run_dir, hand_in=Path("reports/task1.md"), prefix="task1_")

An undefined number is "–". Whatever was measured on made-up films says PHANTOM: in reports and above every figure.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import base64
import contextlib
import html
import re
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from shared.runtime import atomic_file

PHANTOM = "PHANTOM: films drawn by this project; nothing here says anything about real images."
NOT_A_RESULT = "**Not a result to hand in.**"
ADVICE = "For research and teaching only; not a medical device, no medical advice."
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: right } th { background: #f3f3f3 }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } figcaption { color: #555 }
strong { color: #a00 }
"""

# ------------------------------------------------------------------------------------------------------------- numbers


def number(value, digits=3):
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.000"


def percent(value, digits=1):
    return "–" if value is None else number(100 * value, digits)


def with_interval(found, show=percent, prefix=""):
    """{"value", "low", "high"} -> "64.2 [58.0, 70.1]"; prefix: of the names low and high, for others in one dict."""
    if found is None or found.get("value") is None:
        return "–"
    low, high = found.get(f"{prefix}low"), found.get(f"{prefix}high")
    return show(found["value"]) + ("" if low is None else f" [{show(low)}, {show(high)}]")


def p_value(p):
    return "–" if p is None else "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def plain_text(text):
    """A user's words in Markdown: no HTML but what stands between back-quotes, where it is shown as it is."""
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(str(text).split("`")))


def markdown_table(header, rows):
    """Cells of any kind -> the lines of a Markdown table, as one text."""
    cells = [[plain_text(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in (header, *rows)]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|---" * len(header) + "|", *body])


def short_path(path):
    """A path for people: from the working folder where it lies below it, else its last two names."""
    path = Path(path)
    with contextlib.suppress(ValueError):
        path = path.absolute().relative_to(Path.cwd())
    return str(path if not path.is_absolute() else Path(*path.parts[-2:]))


# ------------------------------------------------------------------------------------------------------------- reports


class Report:
    """
    Headings, paragraphs, tables and figures in order; `**bold**` and `code` in paragraphs are the only marks.

    phantom, warnings: what makes this less than a result on real data (a sentence each); they stand first, and such a
    report never takes the place of a hand-in report that has none.
    """

    def __init__(self, title, phantom=False, warnings=()):
        self.title, self.blocks = title, []
        self.warnings = [PHANTOM] * bool(phantom) + list(warnings)
        self.heading(title, 1)
        if self.warnings:
            self.text("\n".join([NOT_A_RESULT, *(f"**{warning}**" for warning in self.warnings)]))

    def heading(self, text, level=2):
        self.blocks.append(("heading", level, text))

    def text(self, text):
        self.blocks.append(("text", text))

    def table(self, header, rows):
        self.blocks.append(("table", list(header), [list(row) for row in rows]))

    def figure(self, path, caption):
        """path: of a PNG in the run folder's figures/."""
        self.blocks.append(("figure", Path(path), caption))

    def markdown(self, figures="figures/"):
        """figures: what stands in front of a picture's name."""
        out = []
        for kind, *what in self.blocks:
            if kind == "heading":
                out.append("#" * what[0] + " " + " ".join(plain_text(what[1]).split()))
            elif kind == "text":
                out.append(plain_text(what[0]))
            elif kind == "table":
                out.append(markdown_table(*what))
            else:
                caption = plain_text(what[1]).replace("\n", " ")
                out += [f"![{caption.replace('[', '(').replace(']', ')')}]({figures}{what[0].name})", caption]
        return "\n\n".join([*out, ADVICE]) + "\n"

    def html(self):
        """One page with its pictures inside, to be sent as a single file."""

        def marked(text):
            text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
            return re.sub(r"`(.+?)`", r"<code>\1</code>", text)

        def line(tag, row):
            return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in row)}</tr>"

        out = ["<!doctype html><html lang='en'><meta charset='utf-8'>"]
        out.append(f"<title>{html.escape(self.title)}</title><style>{STYLE}</style><body>")
        for kind, *what in self.blocks:
            if kind == "heading":
                out.append(f"<h{what[0]}>{html.escape(what[1])}</h{what[0]}>")
            elif kind == "text":
                out.append(f"<p>{marked(what[0])}</p>")
            elif kind == "table":
                out.append(f"<table>{line('th', what[0])}{''.join(line('td', row) for row in what[1])}</table>")
            else:
                picture, caption = base64.b64encode(what[0].read_bytes()).decode(), html.escape(what[1], quote=True)
                out.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{picture}'>")
                out.append(f"<figcaption>{caption}</figcaption></figure>")
        return "\n".join([*out, f"<p>{ADVICE}</p></body></html>", ""])

    def write(self, run_dir, hand_in=None, prefix="", page=False):
        """
        report.md in the run folder, with `page` report.html too; with hand_in, a path such as reports/task.md, a copy
        there with its pictures in figures/ beside it, their names beginning with `prefix` -> a line for the console.
        """
        texts, line = {run_dir / "report.md": self.markdown()}, ""
        if page:
            texts[run_dir / "report.html"] = self.html()
        if hand_in is not None and self.warnings and is_result(hand_in):
            line = f"{hand_in} left alone: it is a result on real data, this run is not"
        elif hand_in is not None:
            for kind, *what in self.blocks:
                if kind == "figure":
                    with atomic_file(hand_in.parent / "figures" / f"{prefix}{what[0].name}") as file:
                        file.write(what[0].read_bytes())
            texts[hand_in] = self.markdown(f"figures/{prefix}")
            line = f"hand-in report: {hand_in}"
        for path, text in texts.items():
            with atomic_file(path, "w") as file:
                file.write(text)
        return line


def is_result(path):
    """Is there a report at `path` that was written without warnings?"""
    return Path(path).is_file() and NOT_A_RESULT not in Path(path).read_text(encoding="utf-8", errors="replace")


# ------------------------------------------------------------------------------------------------------------- figures


def save_figure(figure, path, title="", phantom=False, dpi=130):
    """
    Title, wrapped to the figure's width, with PHANTOM in front where it is due; then the file, whole or not at all ->
    path. Numbers are written before figures: a figure that fails must cost nothing but itself.
    """
    title = f"PHANTOM, drawn and not taken: {title}" if phantom else title
    wide = max(30, int(figure.get_figwidth() * 14))  # characters of 10 points that fit side by side
    figure.suptitle("\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, wide)), fontsize=10)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a question or a file name is a $ ...
        if not text.get_text().isprintable():  # nor can half a character, of a file name that is not UTF-8, be drawn
            text.set_text(text.get_text().encode("utf-8", "replace").decode())
    for axis in (a for axes in figure.axes for a in (axes.xaxis, axes.yaxis) if a.get_scale() == "log"):
        for label in axis.get_ticklabels(which="both"):
            label.set_parse_math(True)  # ... and 10^2 beside an axis a power
    with atomic_file(path) as file:
        figure.savefig(file, dpi=dpi, format="png")
    plt.close(figure)
    return Path(path)


def draw_history(path, histories, panels, x="step", title="", phantom=False, smooth=1):
    """
    Curves of training. histories {name: rows}, or one list of rows; panels [(label of the y axis, {key: label})], side
    by side, at most three in a line; keys that no row has are left out. smooth: running mean over so many rows where a
    key has more than twice that many values.
    """
    histories = histories if isinstance(histories, dict) else {"": histories}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.9 * columns, 3.1 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (ylabel, curves) in zip(axes.flat, panels, strict=False):
        named = set()
        for color, (key, label) in enumerate(curves.items()):
            for rows in histories.values():
                points = [(row[x], row[key]) for row in rows if row.get(key) is not None]
                if not points:
                    continue
                steps, values = map(np.array, zip(*points, strict=True))
                if len(values) > 2 * smooth:
                    values = np.array([values[max(0, i - smooth + 1) : i + 1].mean() for i in range(len(values))])
                marker = "." if len(values) < 12 else None
                axis.plot(
                    steps, values, color=f"C{color}", marker=marker, alpha=0.8, label=None if key in named else label
                )
                named.add(key)
        axis.set(xlabel=x, ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
        else:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="grey")
    return save_figure(figure, path, title, phantom)
