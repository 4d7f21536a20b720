"""attention_viz/evaluate.py and infer.py: whole runs with untrained tiny models."""

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import shared  # noqa: F401, isort: skip  # before transformers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from attention_viz import evaluate as script
from attention_viz import infer as infer_script
from attention_viz import maps as maps_module
from attention_viz import report
from attention_viz.cases import export_csv, phantom_cases, phantom_settings
from attention_viz.evaluate import main as evaluate
from attention_viz.infer import main as infer
from shared.phantom import phantom_study
from shared.runtime import read_json

CONDITIONS = ["Pleural Effusion", "Pneumothorax", "Consolidation"]
SMALL = ["--conditions", *CONDITIONS, "--severe", "--image-size", "112", "--bootstrap", "200", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """One run with both families, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("attention") / "run"
    evaluate(["--models", "tiny", "--n-studies", "8", "--faithfulness", "1", *SMALL, "--out-dir", str(folder)])
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_whole_run(run):
    stats, report = read_json(run / "stats.json"), (run / "report.md").read_text()
    assert stats["phantom"] and "PHANTOM" in report and set(stats["models"]) == {"tiny:gemma3", "tiny:llava"}
    assert stats["n_cases"] == 6 and stats["n_wordings"] == 36 and stats["bootstrap"] == 200
    assert {p.name for p in (run / "figures").glob("*.png")} == {"panels.png", "moves.png", "forest.png"}
    assert (run / "report.html").is_file() and not (run / "errors.csv").exists()
    answers = read_csv(run / "answers.csv")
    assert len(answers) == 2 * 48 and {r["strategy"] for r in answers} >= {"original", "negation", "synonym"}
    rows = read_csv(run / "maps.csv")
    tables = {r["method"] for r in rows}
    assert tables >= {"mean", "heads", "rollout", "occlusion", "grad_cam", "integrated_gradients"}
    for m in stats["models"].values():
        assert m["status"] == {"ok": 8} and m["tiny"] and len(m["heads"]) == 3
        table = m["localisation"]["all yes cases"]
        assert table.keys() >= {"mean", "occlusion", "null: intensity"}
        for row in table.values():
            assert 0 <= row["hit"]["value"] <= 1 and 0 < row["chance"] < 0.6
        moves = m["similarity"]["mean"]
        assert moves.keys() >= {"other patient's image", "blank image", "unrelated question", "cells shuffled",
                                "brightness of the film", "paraphrase: negation"}  # fmt: skip
        assert m["faithfulness"]["n"] == 1 and m["faithfulness"]["randomisation"]["mean"].keys() >= {
            "1.00",
            "other images",
        }
        assert m["verdict"]["says"] in ("needs the image", "does not need the image", "undecided")
    assert len(stats["tests"]) == 4 + 2  # best map and movement of each model, and two differences between them
    for t in stats["tests"].values():
        assert t is None or t["p_holm"] >= t["p"]
    assert "Not a result to hand in" in report and "untrained tiny model" in report


def test_numbers_agree_with_the_rows(run):
    """The report's accuracy and flip rate are those of answers.csv, over patients that nothing was chosen on."""
    stats = read_json(run / "stats.json")["models"]["tiny:llava"]["behaviour"]
    rows = [r for r in read_csv(run / "answers.csv") if r["model"] == "tiny:llava" and r["calibration"] == "False"]
    assert stats["accuracy"]["value"] == pytest.approx(np.mean([r["correct"] == "True" for r in rows]))
    flips = [r["flip"] == "True" for r in rows if r["variant_id"] != "0"]
    assert stats["flip_rate"]["value"] == pytest.approx(np.mean(flips))
    by_kind = stats["flip_by_kind"]["negation"]["value"]
    assert by_kind == pytest.approx(np.mean([r["flip"] == "True" for r in rows if r["strategy"] == "negation"]))
    assert sum(stats["quadrants"].values()) == len({r["study_id"] for r in rows})


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    """Killed in the middle of a line of the third study: what is resumed equals what ran through."""
    arguments = [
        "--models",
        "tiny:llava",
        "--n-studies",
        "5",
        "--methods",
        "mean",
        "occlusion",
        "--variants",
        "3",
        *SMALL,
    ]
    evaluate([*arguments, "--out-dir", "whole"])
    evaluate([*arguments, "--out-dir", "cut"])
    path = Path("cut/records/0.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:100]]))
    asked, counted = script.study_record, []
    monkeypatch.setattr(script, "study_record", lambda *a: counted.append(1) or asked(*a))
    evaluate(["--resume", "cut"])
    assert len(counted) == 3
    one, two = (read_json(Path(name) / "stats.json") for name in ("whole", "cut"))
    for key in ("models", "tests", "clusters"):
        assert one[key] == two[key]
    assert Path("whole/maps.csv").read_text() == Path("cut/maps.csv").read_text()


def test_refusals(refused, tmp_path, capsys):
    assert "--real-only needs --csv" in refused(evaluate, ["--real-only"])
    assert "lacks the column" in refused(evaluate, ["--csv", bad_csv(tmp_path)])
    assert "no condition 'Flu'" in refused(evaluate, ["--models", "tiny", "--conditions", "Flu"])
    assert "there is nothing at" in refused(evaluate, ["--resume", "nowhere"])
    assert "matplotlib has no colour map" in refused(infer, ["--image", "x.png", "--colormap", "hott"])
    assert "give one --image" in refused(infer, ["--question", "Normal?"])
    assert "the file does not exist" in refused(infer, ["--image", "x.png", "--models", "tiny"])
    for more in ([], ["--finding", "nodule"]):
        assert "words of the --question" in refused(infer, ["--dry-run", "--query", "finding", *more])
    assert "evaluate.py for that map" in refused(infer, ["--dry-run", "--methods", "heads"])
    for question in ("", " ", "why? " * 300):
        assert "must have 1 to 1000 characters" in refused(infer, ["--dry-run", "--question", question])
    for flags in (["--export", "set"], ["--severe"], ["--guessable", "1"], ["--conditions", "Edema"]):
        assert "are for the phantom" in refused(evaluate, ["--csv", bad_csv(tmp_path), *flags])
    assert "--dry-run asks about films of the phantom" in refused(evaluate, ["--dry-run", "--csv", bad_csv(tmp_path)])
    assert not Path("outputs").exists() and not Path("set").exists()


def test_what_cannot_be_right_is_refused_before_the_work(refused, tmp_path):
    """Another model, other questions and damaged records on --resume; a file in the way of --export."""
    tiny = ["--models", "tiny:gemma3", "--n-studies", "3", "--image-size", "64"]
    assert "no model folder nope" in refused(evaluate, [*tiny[:2], "nope", *tiny[2:]])
    assert "no colour map" in refused(evaluate, ["--colormap", "hott"])
    evaluate([*tiny, "--export", str(tmp_path / "set")])
    again = ["--csv", tmp_path / "set" / "questions.csv", "--real-only"]
    assert "has films of the phantom (its column source)" in refused(evaluate, [*tiny[:2], *again])
    assert "holds a questions.csv already" in refused(evaluate, [*tiny, "--export", tmp_path / "set"])
    evaluate([*tiny, "--methods", "mean", "--variants", "2", "--bootstrap", "20", "--device", "cpu", "--out-dir", "r"])
    assert "no model folder nope" in refused(evaluate, ["--models", "nope", "--out-dir", "r", "--overwrite"])
    path = Path("r/records/0-chosen.json")
    chosen = read_json(path)
    for changed, words in (
        (chosen | {"of": ["other", "weights"]}, "was begun on other questions"),
        ([1], "is damaged"),
    ):
        path.write_text(json.dumps(changed))
        assert words in refused(evaluate, ["--resume", "r"])


def bad_csv(folder):
    path = folder / "bad.csv"
    path.write_text("study_id,image_path\n1,a.png\n")
    return path


def test_a_csv_with_a_broken_image_and_a_model_that_hides_attention(tmp_path, monkeypatch):
    """Answers are there and counted, maps are not, and nothing is made up."""
    cases = phantom_cases(5, settings=phantom_settings(CONDITIONS), size=112, variants=3)
    path = export_csv(cases, tmp_path / "set")
    (tmp_path / "set" / "images" / f"{cases[1].study_id}.png").write_bytes(b"not a picture")
    monkeypatch.setattr(maps_module.AttentionCapture, "record", lambda *arguments: None)
    evaluate(["--csv", str(path), "--models", "tiny:llava", "--methods", "mean", "--out-dir", "r", "--device", "cpu",
              "--bootstrap", "100"])  # fmt: skip
    stats, report = read_json("r/stats.json"), Path("r/report.md").read_text()
    assert stats["phantom"] and stats["errors"] == 1 and "damaged" in read_csv("r/errors.csv")[0]["error"]
    assert stats["models"]["tiny:llava"]["status"] == {"no_attn": 4}
    assert "No attention for 4 cases (no_attn: 4): they have answers and no maps." in report
    assert {r["status"] for r in read_csv("r/maps.csv")} == {"no_attn"}
    assert stats["models"]["tiny:llava"]["behaviour"]["accuracy"]["n"] == 3 * stats["n_cases"]


def test_regions_beyond_the_image_are_no_boxes(tmp_path):
    """Boxes in the pixels of the original, and a film made smaller: they would hit nothing, by chance too."""
    cases = phantom_cases(4, settings=phantom_settings(CONDITIONS, severe=True), size=64)
    pixels = {}
    for case in cases:
        case.boxes = [[700, 800, 1200, 1300]] if case.boxes else []
    wrong, notes = sum(bool(c.boxes) for c in cases), []
    cases[1].boxes = [[-0.5, 3, 64.5, 40]]  # rounded outwards
    cases, pixels = script.read_images(cases, [], notes)
    assert [bool(c.boxes) for c in cases] == [False, True, False, False] and len(pixels) == 4 and wrong
    assert f"{wrong} questions have a region that reaches beyond the image" in notes[0]


def test_methods_named_twice_count_once_and_the_query_chooses_too(monkeypatch):
    """--query finding: heads and sinks are chosen on the rows that are shown; a map that is not there is told."""
    shown, choose = [], script.choose_heads
    monkeypatch.setattr(script, "choose_heads", lambda rows, k: shown.append(rows) or choose(rows, k))
    options = ["--models", "tiny:gemma3", "--n-studies", "4", "--variants", "2", "--methods", "mean", "mean", "heads"]
    options += [*SMALL, "--out-dir"]
    evaluate([*options, "last"])
    evaluate([*options, "finding", "--query", "finding"])
    assert read_json("last/stats.json")["models"]["tiny:gemma3"]["similarity"]["mean"]["blank image"]["js"]["n"] == 3
    assert not np.allclose(shown[0][0], shown[1][0])
    monkeypatch.setattr(maps_module, "tokens_of", lambda case, words: [])
    evaluate([*options, "absent", "--query", "finding"])
    text = Path("absent/report.md").read_text()
    assert "Maps that could not be made, of test cases: `mean` no_query: 3, `heads` no_query: 3." in text


def test_a_planted_sink_is_found_and_filtered(monkeypatch):
    """One cell of every map gets a hundred times the mass: the report says so and shows the map without it."""

    class Sinks(maps_module.AttentionCapture):
        @property
        def steps(self):
            found = super().steps
            for step in found:
                step.weights[..., 5] += 100 * step.weights.mean()
            return found

    monkeypatch.setattr(maps_module, "AttentionCapture", Sinks)
    evaluate(["--models", "tiny:llava", "--n-studies", "6", "--methods", "mean", *SMALL, "--out-dir", "r"])
    m = read_json("r/stats.json")["models"]["tiny:llava"]
    assert m["sinks"] == 1 and m["sink_mass"]["value"] > 0.5 and m["attention_of"] == "mean_without_sinks"
    assert m["similarity"]["mean"]["other patient's image"]["pearson"]["value"] > 0.99  # the published defect
    assert m["similarity"]["mean_without_sinks"]["other patient's image"]["pearson"]["value"] < 0.9
    assert "1 cell(s) of the mean map are sinks" in Path("r/report.md").read_text()


def test_export_writes_a_csv_that_can_be_evaluated(capsys):
    evaluate(["--export", "set", "--n-studies", "3", "--image-size", "64"])
    assert "3 questions in set/questions.csv" in capsys.readouterr().out and len(read_csv("set/questions.csv")) == 18
    assert not Path("outputs").exists()


def test_figures_leave_nothing_out(monkeypatch, tmp_path):
    """Every kind of map, small shifts beside large ones, and one group of cases for all models, by name."""
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, *rest: figures.append(figure))
    film, kinds = np.full((32, 32), 99, np.uint8), [m for m in maps_module.METHODS if m != "own_box"]
    maps = dict.fromkeys(kinds, np.full((16, 16), 1 / 256))
    words = {"answer": "yes", "answer_gt": "yes", "maps": {m: {"status": "ok"} for m in kinds}}
    words["maps"]["own_box"] = {"status": "no_box"}
    moved = [["paraphrase: voice", "mean", js, 1] for js in (0, 4e-4)] + [["brightness of the film", "mean", 0.09, 1]]
    record = dict(key="k", finding="Edema", calibration=False, evidence_using=True, has_boxes=True, wordings=[words],
                  moved=moved)  # fmt: skip
    models = {"m" * 60 + "/best": {"records": [record], "maps": {"k": maps}}}
    stats = {"phantom": False, "models": dict.fromkeys(models, {"attention_of": "mean"})}
    case = SimpleNamespace(key="k", boxes=[(1, 1, 9, 9)])
    report.draw_panels(tmp_path, stats, models, [case], {"k": film}, SimpleNamespace(colormap="hot"))
    titles = [axis.get_title() for axis in figures[0].axes]
    assert set(titles) >= set(maps_module.METHODS) and titles[0].startswith("mmm") and "…" in titles[0]
    report.draw_moves(tmp_path, stats, models)
    assert figures[1].axes[0].get_xscale() == "log" and len(figures[1].axes[0].get_yticks()) == 2
    row = {"hit_over_chance": {"value": 2, "low": 1, "high": 3, "n": 5}}
    one = {"evidence-using cases": {"mean": row}, "all yes cases": {"mean": row}}
    two = {"evidence-using cases": {"mean": {"hit_over_chance": None}}, "all yes cases": {"mean": row}}
    report.draw_forest(tmp_path, {"phantom": False, "models": {"a": {"localisation": one}, "b": {"localisation": two}}})
    axis = figures[2].axes[0]
    assert axis.get_xlabel().endswith(", all yes cases") and len(axis.get_yticks()) == 2
    plt.close("all")


def test_long_names_lose_their_middle():
    assert [maps_module.shortened(t, 9) for t in ("short", "nine char", "outputs/of/me/best")] == [
        "short", "nine char", "outp…best",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- infer


def test_a_model_that_learned_from_the_phantom_is_told():
    for told, found in (({"dataset": {"phantom": True}}, True), ({"phantom": True}, True), ({"dataset": "x"}, False)):
        Path("training.json").write_text(json.dumps(told))
        assert infer_script.learned_from_phantom(".") is found
    assert not infer_script.learned_from_phantom("google/medgemma-4b-it")


def test_infer_shows_both_models_side_by_side(capsys):
    Image.fromarray(phantom_study(0, 3, 150).image[:, :120]).save("film.png")
    infer(["--image", "film.png", "--question", "Is there a pleural effusion?", "--models", "tiny", "--device", "cpu",
           "--finding", "pleural effusion", "--query", "finding", "--head-mode", "per-head", "--out-dir", "r",
           "--methods", "mean", "gradient_weighted", "own_box"])  # fmt: skip
    found = read_json("r/record.json")
    assert [m["family"] for m in found["models"]] == ["gemma3", "llava"] and not found["phantom"]
    for m in found["models"]:
        assert m["answer"] == ("yes" if m["margin"] > 0 else "no") and "mean nothing" in m["note"]
        values = np.array(m["maps"]["mean"]["values"])
        assert values.shape == tuple(m["grid"]) and values.sum() == pytest.approx(1, abs=1e-3)
        assert Image.open(Path("r") / m["maps"]["mean"]["picture"]).size == (120, 150)
        assert m["maps"]["own_box"] == {"status": "no_box", "query": None, "image_mass": None, "values": None,
                                        "picture": None}  # fmt: skip
    assert {p.name for p in Path("r/figures").iterdir()} == {"maps.png", "heads_0_gemma3.png", "heads_1_llava.png"}
    assert "own_box: no map (no_box)" in capsys.readouterr().out


def test_infer_dry_run(capsys):
    infer(["--dry-run", "--head-mode", "max"])
    out, folder = capsys.readouterr().out, Path("outputs/attention_viz/infer/dry-run")
    assert "PHANTOM" in out and out.count("nats, untrained;") == 2
    picture = np.array(Image.open(folder / read_json(folder / "record.json")["models"][0]["maps"]["max"]["picture"]))
    assert (picture[:16, :70] == 0).all(2).sum() > 20  # PHANTOM, rimmed in black; the map is yellow there
    infer(["--dry-run", "--methods", "mean", "max", "mean", "--head-mode", "max"])
    assert "max" in read_json("outputs/attention_viz/infer/dry-run/record.json")["models"][0]["maps"]


def test_all_heads_of_a_large_model_are_one_picture(monkeypatch):
    """1,024 small axes took minutes. Each map has its own scale, and a line parts it from the next."""
    figures = []
    monkeypatch.setattr(infer_script, "save_figure", lambda figure, *rest: figures.append(figure))
    rows = np.random.default_rng(0).random((32, 30, 24, 24))
    infer_script.draw_heads(rows, "heads.png", infer_script.parse_args(["--dry-run"]), "model", False)
    whole = np.ma.filled(figures[0].axes[0].images[0].get_array(), np.nan)
    assert len(figures[0].axes) == 1 and whole.shape == (32 * 25, 30 * 25)
    second = whole[50:74, 25:49]  # layer 2, head 1
    assert second == pytest.approx((rows[2, 1] - rows[2, 1].min()) / np.ptp(rows[2, 1])) and np.isnan(whole[24]).all()


def test_five_lines_of_the_readme(monkeypatch):
    """The README's Python, with a tiny model and a film of the phantom in place of what it names."""
    text = (Path(__file__).parents[1] / "attention_viz" / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "attention_map(" in b)
    lines = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) == 5 and "medgemma" in block
    Image.fromarray(phantom_study(0, 3, 150).image).save("film.png")
    exec(block.replace("google/medgemma-4b-it", "tiny:gemma3").replace(', device="cuda"', ""), {})
    assert Image.open("map.png").size == (150, 150)


@pytest.mark.slow
def test_from_another_folder(start_script, tmp_path):
    root = Path(__file__).parents[1]
    process = start_script([root / "attention_viz" / "evaluate.py", "--dry-run"], tmp_path)
    assert process.wait(300) == 0
    assert json.loads((tmp_path / "outputs/attention_viz/evaluate/dry-run/stats.json").read_text())["phantom"]


@pytest.mark.slow
def test_the_benchmark_in_its_short_form():
    from benchmarks.attention import main as benchmark

    found = benchmark(["train", "proof", "--small", "--models", "llava", "--out-dir", "b"])
    assert [(r["model"], r["questions"]) for r in found["proof"]] == [
        ("llava-sees", "not guessable"), ("llava-blind", "not guessable"), ("llava-sees", "guessable"),
        ("llava-blind", "guessable"),
    ]  # fmt: skip
    if sys.platform == "linux":
        row = benchmark(["cost", "--small", "--out-dir", "b"])["cost"][0]
        assert row["bytes_all"] > row["bytes_rows"] > 0
    assert torch.is_grad_enabled()
