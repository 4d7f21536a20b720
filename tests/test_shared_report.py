"""report.py: numbers, tables, a report in both forms and its copy, titles of figures, curves of training."""

import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from shared.report import ADVICE, NOT_A_RESULT, PHANTOM, Report, draw_history, markdown_table, number, p_value
from shared.report import percent, plain_text, save_figure, short_path, with_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# --- numbers ---


def test_numbers():
    assert [number(v) for v in (None, 0.12345, -0.0001, 2)] == ["–", "0.123", "0.000", "2.000"]
    assert number(1.25, 1) == "1.2" and [percent(v) for v in (None, 0.0123, 1)] == ["–", "1.2", "100.0"]
    assert [p_value(p) for p in (None, 0.00001, 0.02)] == ["–", "p < 0.0001", "p = 0.0200"]


def test_intervals():
    assert with_interval({"value": 0.642, "low": 0.58, "high": 0.701}) == "64.2 [58.0, 70.1]"
    assert with_interval({"value": 0.5, "low": None, "high": None}, number) == "0.500"
    assert with_interval({"value": 0.5, "t_low": 0.4, "t_high": 0.6}, number, "t_") == "0.500 [0.400, 0.600]"
    assert with_interval(None) == with_interval({"value": None, "low": 0}) == "–"


def test_a_table_survives_its_cells():
    assert markdown_table(["a|b", "n"], [["two\nlines", 3]]).splitlines() == [
        r"| a\|b | n |",
        "|---|---|",
        "| two lines | 3 |",
    ]


# --- reports ---


def a_report(**options):
    Path("run/figures").mkdir(parents=True, exist_ok=True)
    Path("run/figures/curve.png").write_bytes(b"picture")
    report = Report("Für <b>alle</b>", **options)
    report.text("**bold** and `code` and <script>alert(1)</script>")
    report.table(["what", "n"], [["<i>", 3]])
    report.figure(Path("run/figures/curve.png"), 'the "curve"')
    return report


def test_a_report_and_its_copy():
    report = a_report()
    report.write(Path("run"))
    text = Path("run/report.md").read_text("utf-8")
    assert text.startswith("# Für") and '![the "curve"](figures/curve.png)' in text and text.endswith(ADVICE + "\n")
    assert "PHANTOM" not in text and "| &lt;i> | 3 |" in text
    assert [p.name for p in Path().iterdir()] == ["run"] and not Path("run/report.html").exists()  # unless asked for
    report.write(Path("run"), Path("reports/task.md"), "task_", page=True)
    assert "](figures/task_curve.png)" in Path("reports/task.md").read_text("utf-8")
    assert [(p.name, p.read_bytes()) for p in Path("reports/figures").iterdir()] == [("task_curve.png", b"picture")]
    assert Path("run/report.html").exists()


def test_the_page_escapes_everything_and_holds_its_pictures():
    page = a_report().html()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<td>&lt;i&gt;</td>" in page
    assert "<strong>bold</strong>" in page and "<code>code</code>" in page and "Für &lt;b&gt;" in page
    assert "src='data:image/png;base64,cGljdHVyZQ=='" in page and "alt='the &quot;curve&quot;'" in page


def test_phantom_and_warnings_stand_first():
    report = a_report(phantom=True, warnings=["Only 96 films."])
    assert report.markdown().split("\n\n")[1] == f"{NOT_A_RESULT}\n**{PHANTOM}**\n**Only 96 films.**"
    assert f"<strong>{PHANTOM}</strong>" in report.html()


def test_a_report_with_warnings_never_takes_the_place_of_a_result():
    hand_in = Path("reports/task.md")
    assert a_report(phantom=True).write(Path("run"), hand_in) == f"hand-in report: {hand_in}"
    assert a_report(warnings=["Only 96 films."]).write(Path("run"), hand_in) == f"hand-in report: {hand_in}"
    assert "Only 96" in hand_in.read_text("utf-8")
    assert a_report().write(Path("run"), hand_in) == f"hand-in report: {hand_in}"
    before = hand_in.read_bytes()
    for options in ({"phantom": True}, {"warnings": ["Only 96 films."]}):
        report = a_report(**options)
        Path("run/figures/curve.png").write_bytes(b"of the phantom")
        assert "left alone: it is a result on real data" in report.write(Path("run"), hand_in)
        assert "Not a result" in Path("run/report.md").read_text("utf-8")
    assert hand_in.read_bytes() == before and Path("reports/figures/curve.png").read_bytes() == b"picture"


def test_names_are_shown_as_they_are():
    assert plain_text("<img src=x> and `<b>` <i>") == "&lt;img src=x> and `<b>` &lt;i>"
    assert "<b>" not in a_report().markdown()
    report = Report("x")
    report.figure(Path("a.png"), "a ](http://evil) [b\nc")
    assert "![a )(http://evil) (b c](figures/a.png)" in report.markdown()


def test_short_paths():
    assert short_path("runs/001/best.pt") == short_path(Path("runs/001/best.pt").absolute()) == "runs/001/best.pt"
    assert short_path("/far/away/data/a.npz") == "data/a.npz"


# --- figures ---


@pytest.fixture
def titles(monkeypatch):
    """The title of every figure that is saved."""
    seen, save = [], Figure.savefig

    def keep(self, *arguments, **options):
        seen.append(self.get_suptitle())
        return save(self, *arguments, **options | {"dpi": 20})

    monkeypatch.setattr(Figure, "savefig", keep)
    return seen


def test_titles_are_wrapped_and_say_phantom(titles):
    figure = plt.figure(figsize=(4, 3))
    assert save_figure(figure, "f/a.png", "word " * 40 + "end\nsecond line", phantom=True) == Path("f/a.png")
    lines = titles[0].split("\n")
    assert lines[0].startswith("PHANTOM") and max(map(len, lines)) <= 56 and lines[-1] == "second line"
    assert re.sub(r"\s+", " ", titles[0]).endswith("word end second line")  # nothing is cut
    assert Path("f/a.png").read_bytes().startswith(b"\x89PNG") and not plt.fignum_exists(figure.number)
    save_figure(plt.figure(), "f/b.png", "real")
    assert titles[1] == "real"


def test_curves_of_training(titles, monkeypatch):
    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, x, y, **o: drawn.append((list(x), list(y), o)) or plot(self, x, y, **o),
    )
    rows = [{"epoch": 1, "loss": 3.0, "auc": 0.5}, {"epoch": 2, "loss": None, "auc": 0.7}]
    panels = [("loss", {"loss": "training", "absent": "nowhere"}), ("AUC", {"auc": "validation"})]
    path = draw_history("curves.png", {0: rows, 1: rows[:1]}, panels, x="epoch", title="t", phantom=True)
    assert [d[:2] for d in drawn] == [([1], [3.0]), ([1], [3.0]), ([1, 2], [0.5, 0.7]), ([1], [0.5])]
    assert [d[2]["label"] for d in drawn] == ["training", None, "validation", None]  # one entry for all seeds
    assert path == Path("curves.png") and titles[0].startswith("PHANTOM")
    drawn.clear()
    draw_history("smooth.png", [{"step": i, "loss": i % 2} for i in range(10)], [("loss", {"loss": "l"})], smooth=2)
    assert drawn[0][1] == [0.0] + [0.5] * 9


def test_a_dollar_is_a_dollar(titles):
    figure, axis = plt.subplots()
    axis.set_xlabel("is it $x_1$ or $y^{2$ ?")
    save_figure(figure, "f/dollar.png", "and $z^{ in the title")
    assert Path("f/dollar.png").exists() and titles == ["and $z^{ in the title"]
