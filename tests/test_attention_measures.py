"""attention_viz/measures.py and cases.py: numbers worked out by hand, and what is left out of a CSV."""

import contextlib
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from attention_viz import faithful, measures, report
from attention_viz.cases import COLUMNS, export_csv, phantom_cases, phantom_settings, read_cases, strategy_of
from shared.data.images import read_pixels
from shared.runtime import InputError, write_csv

CONDITIONS = ["Pleural Effusion", "Pneumothorax", "Consolidation"]


def one_cell(row, column, side=4):
    grid = np.zeros((side, side))
    grid[row, column] = 1.0
    return grid


FLAT = np.full((4, 4), 1 / 16)


def test_numbers_of_one_map():
    assert measures.entropy(FLAT) == pytest.approx(1) and measures.entropy(one_cell(0, 0)) == pytest.approx(0)
    assert measures.gini(FLAT) == pytest.approx(0) and measures.gini(one_cell(0, 0)) == pytest.approx(15 / 16)
    assert measures.top_mass(FLAT, 0.25) == pytest.approx(0.25) and measures.top_mass(one_cell(1, 1)) == 1
    assert measures.js_divergence(FLAT, FLAT) == pytest.approx(0)
    assert measures.js_divergence(one_cell(0, 0), one_cell(3, 3)) == pytest.approx(1)
    half = (one_cell(0, 0) + one_cell(0, 1)) / 2  # against one of its cells: (log2(4/3) + (log2(2/3) + log2 2) / 2) / 2
    expected = (np.log2(4 / 3) + (np.log2(2 / 3) + 1) / 2) / 2
    assert measures.js_divergence(one_cell(0, 0), half) == pytest.approx(expected)
    assert measures.pearson(FLAT, half) is None and measures.pearson(half, 3 * half) == pytest.approx(1)
    ranks = np.arange(16.0).reshape(4, 4)
    assert measures.spearman(ranks, ranks**3) == pytest.approx(1) and measures.spearman(ranks, -ranks) == pytest.approx(
        -1
    )


def test_localisation_by_hand():
    shares = np.zeros((4, 4))
    shares[0, :2] = 1.0
    shares[1, 0] = 0.5  # 2.5 of 16 cells
    found = measures.localisation(one_cell(1, 0), shares)
    assert found == {"hit": 0.5, "chance": 2.5 / 16, "mass_ratio": pytest.approx(0.5 / (2.5 / 16))}
    flat = measures.localisation(FLAT, shares)
    assert flat["hit"] == flat["chance"] and flat["mass_ratio"] == pytest.approx(1)
    assert measures.localisation(FLAT, np.zeros((4, 4)))["mass_ratio"] is None


def test_a_sink_is_found_and_taken_out():
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(64), 20).reshape(20, 8, 8)
    assert not measures.find_sinks(maps).any()
    maps[:, 0, 0] = 0.7 * maps.sum((1, 2)) / 0.3
    sinks = measures.find_sinks(maps)
    assert sinks[0, 0] and sinks.sum() == 1
    maps[:12, 0, 0] = 0
    assert not measures.find_sinks(maps).any()  # in fewer than half of the images
    left = measures.without_sinks(maps[19] / maps[19].sum(), sinks)
    assert left[0, 0] == pytest.approx(1 / 64) and left.sum() == pytest.approx(1)
    assert measures.without_sinks(one_cell(0, 0, 8), sinks) is None


def test_means_and_differences_draw_patients():
    found = measures.mean_of([1, 0, None, 1], ["a", "a", "b", "b"], draws=500)
    assert found["value"] == pytest.approx(2 / 3) and found["n"] == 3 and found["low"] <= 2 / 3 <= found["high"]
    assert measures.mean_of([1, 0], ["a", "a"])["low"] is None and measures.mean_of([None], ["a"]) is None
    paired = measures.paired([1.0] * 6, [0.0] * 6, list("abcdef"), draws=200)
    assert paired["p"] == pytest.approx(2 / 64) and paired["value"] == 1
    together = measures.with_holm([("x", paired), ("y", None)])
    assert together["x"]["p_holm"] == pytest.approx(4 / 64) and together["y"] is None


def a_record(number, answers, truths=("yes", "yes"), **more):
    words = [
        {"variant_id": i, "question": "?" * (i + 3), "answer_gt": t, "strategy": "original" if i == 0 else "synonym",
         "answer": a, "margin": 1.0 if a == "yes" else -1.0, "correct": a == t, "maps": {},
         "flip": a != (answers[0] if t == truths[0] else {"yes": "no", "no": "yes"}[answers[0]])}
        for i, (a, t) in enumerate(zip(answers, truths, strict=True))
    ]  # fmt: skip
    base = dict(key=str(number), patient_id=f"p{number}", wordings=words, moved=[], located={}, has_boxes=True)
    return base | dict(evidence_using=False, text_only=1.0, blank=1.0, other=1.0, without_other=None) | more


def test_behaviour_and_quadrants():
    records = [
        a_record(0, ("yes", "yes")),  # consistent, keeps its answer without the image
        a_record(1, ("no", "no"), text_only=1.0),  # consistent, another answer without the image
        a_record(2, ("yes", "no"), blank=-1.0),
        a_record(3, ("yes", "yes"), truths=("yes", "no")),  # a negated wording that changed nothing: a flip
    ]
    asked_once = [*records, a_record(4, ("yes",), truths=("yes",))]  # neither consistent nor not
    found = measures.behaviour(records, draws=200)
    assert found["quadrants"] == {
        "consistent, relies on the image": 1, "consistent, does not": 1, "flips, relies on the image": 1,
        "flips, does not": 1,
    }  # fmt: skip
    more = measures.behaviour(asked_once, draws=200)
    assert more["quadrants"] == found["quadrants"] and more["without_paraphrase"] == 1
    assert found["accuracy"]["value"] == pytest.approx(4 / 8) and found["flip_rate"]["value"] == pytest.approx(2 / 4)
    assert found["changes_text_only"]["value"] == pytest.approx(1 / 4)


def test_the_verdict_tells_a_blind_model_from_one_that_looks():
    blind = [a_record(i, ("yes", "yes"), without=1.0, without_other=1.0) for i in range(40)]
    sees = [
        a_record(i, ("yes", "yes"), without=-1.0, without_other=1.0, text_only=-1.0, other=-1.0, evidence_using=True)
        for i in range(40)
    ]
    mixed = [
        a_record(i, ("yes", "yes"), text_only=-1.0, blank=-1.0) for i in range(40)
    ]  # another answer without an image: no proof
    says = [measures.verdict(measures.behaviour(r, draws=300)) for r in (blind, sees, mixed)]
    odd = [r | {"blank": -1.0} for r in blind]  # a blank image is unlike all it has seen, and that is all
    assert measures.verdict(measures.behaviour(odd, draws=300))[0] == "does not need the image"
    assert [s for s, _ in says] == ["does not need the image", "needs the image", "undecided"]
    assert "100 % when the finding is drawn away" in says[1][1]
    # as right with another patient's image: what turns may turn for any reason
    as_right = [r | {"other": 1.0} for r in sees]
    assert measures.verdict(measures.behaviour(as_right, draws=300))[0] == "undecided"
    for many, one in ((7, "undecided"), (40, "does not need the image")):  # no change in 7 patients: up to 43 %
        assert measures.verdict(measures.behaviour(blind[:many], draws=300))[0] == one
    assert measures.verdict(measures.behaviour(sees[:4], draws=300))[0] == "undecided"  # p = 2 / 16
    few = measures.verdict(measures.behaviour(sees[:1], draws=50))
    assert few[0] == "undecided" and "too few patients" in few[1]


def test_attention_that_moves_as_much_as_between_images_is_no_match():
    def moved(paraphrase, other):
        return [["paraphrase: synonym", "mean", paraphrase, 0.9], ["other patient's image", "mean", other, 0.1]]

    rng = np.random.default_rng(0)
    still = [a_record(i, ("yes", "yes"), moved=moved(0.02 + 0.01 * rng.random(), 0.4)) for i in range(40)]
    loose = [a_record(i, ("yes", "yes"), moved=moved(0.3, 0.3 + 0.1 * rng.random())) for i in range(40)]
    for r in (*still, *loose):
        r["wordings"][1]["maps"]["mean"] = {"js": r["moved"][0][2]}
    one, two = (measures.attention_tests(r, "mean", draws=300) for r in (still, loose))
    assert one["equivalent"] and one["paraphrase_minus_other_image"]["p"] < 0.01
    shifts = [(0.1, 0.5), (0.5, 0.4), (0.2, 0.6), (0.7, 0.3), (0.1, 0.4), (0.3, 0.4)]
    wide = [r | {"moved": moved(*js)} for r, js in zip(loose, shifts, strict=False)]
    wide = measures.attention_tests(wide, "mean", draws=300)
    few = measures.attention_tests(still[:3], "mean", draws=300)
    for found, words in ((one, "counts as unchanged"), (wide, "in 6 cases of 6 patients, p = 0."),
                         (few, "too few to tell")):  # fmt: skip
        assert words in report.attention_sentence({"attention": found, "attention_of": "mean"})
    same = measures.attention_tests([r | {"moved": moved(0.3 + 0.01 * (-1) ** i, 0.3)} for i, r in enumerate(loose)],
                                    "mean", 300)  # fmt: skip
    assert "says little about" in report.attention_sentence({"attention": same, "attention_of": "mean"})
    assert not two["equivalent"] and one["flip_auroc"]["shift of the map (JS)"]["value"] is None  # nothing flipped


def test_other_images_of_the_sanity_check_are_of_other_patients(monkeypatch):
    """Two questions about the first film: their maps are alike, and say nothing about maps of different films."""
    rng = np.random.default_rng(0)
    film, other = rng.random((2, 4, 4))
    monkeypatch.setattr(faithful, "ask", lambda vlm, image, question, finding: image)
    monkeypatch.setattr(faithful, "attention_map", lambda image, method, query: SimpleNamespace(values=image))
    monkeypatch.setattr(faithful, "on_common_grid", lambda found: found.values)
    monkeypatch.setattr(faithful, "shuffled_layers", lambda vlm, share: contextlib.nullcontext())
    cases = [SimpleNamespace(key=key, patient_id=key[0], finding="", wordings=[{"question": "?"}])
             for key in ("p1", "p2", "q1")]  # fmt: skip
    args = SimpleNamespace(methods=["mean"], query="last")
    pixels = {"p1": film, "p2": film, "q1": other}
    found = faithful.randomisation(SimpleNamespace(quant="none"), cases, pixels, args)["mean"]
    assert found["other images"] == pytest.approx(measures.pearson(film, other)) and found["1.00"] == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------------- cases


def test_the_phantoms_set_turns_answers_of_negated_wordings():
    cases = phantom_cases(24, settings=phantom_settings(CONDITIONS, severe=True), size=64)
    assert len({c.patient_id for c in cases}) == 24
    answers = [c.wordings[0]["answer_gt"] for c in cases]
    assert 8 <= answers.count("yes") <= 16
    for case in cases:
        assert [w["variant_id"] for w in case.wordings] == list(range(6)) and case.finding in CONDITIONS
        turned = [w["answer_gt"] != case.wordings[0]["answer_gt"] for w in case.wordings]
        assert turned == [w["strategy"] == "negation" for w in case.wordings] and any(turned)
        assert bool(case.boxes) == (case.wordings[0]["answer_gt"] == "yes") == (case.without is not None)
        for x0, y0, x1, y1 in case.boxes:
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            changed = np.abs(case.pixels().astype(int) - case.without)  # what was drawn away lies in its boxes
            assert changed[y0:y1, x0:x1].max() > 10


def test_a_csv_gives_the_same_cases_back(tmp_path):
    cases = phantom_cases(5, settings=phantom_settings(CONDITIONS), size=64)
    found, errors, notes = read_cases(export_csv(cases, tmp_path))
    assert not errors and not notes and [c.key for c in found] == [c.key for c in cases]
    for a, b in zip(found, cases, strict=True):
        assert a.wordings == b.wordings and a.boxes == [[float(v) for v in box] for box in b.boxes]
        assert np.array_equal(a.pixels(), b.pixels()) and np.array_equal(read_pixels(a.image), b.image)
        assert b.phantom  # the column source
    few, _, notes = read_cases(tmp_path / "questions.csv", n_studies=2)
    assert len(few) == 2 and notes == ["The first 2 of 5 studies were read; --n-studies takes more."]


@pytest.fixture
def rows(tmp_path):
    cases = phantom_cases(3, settings=phantom_settings(CONDITIONS), size=64, variants=2)
    export_csv(cases, tmp_path)
    import csv

    with open(tmp_path / "questions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_that_cannot_be_used_are_counted(tmp_path, rows):
    rows[0]["variant_id"] = "1"  # the first study: no original, and then a variant twice
    rows[2]["answer_gt"] = "maybe"
    rows.append(rows[5])
    write_csv(tmp_path / "q.csv", rows + [rows[4] | {"study_id": "x", "image_path": "gone.png"}])
    with pytest.raises(InputError, match="has one patient"):
        read_cases(tmp_path / "q.csv")
    more = [r | {"study_id": r["study_id"] + "b", "patient_id": "other"} for r in rows[4:6]]
    write_csv(tmp_path / "q.csv", rows + more + [rows[4] | {"study_id": "x", "image_path": "gone.png"}])
    found, errors, _ = read_cases(tmp_path / "q.csv")
    assert len(found) == 2
    told = " ".join(sorted({e["error"] for e in errors}))
    assert "no variant 0" in told and "not yes or no" in told and "stood in the file before" in told
    assert "no image gone.png" in told and len(errors) == 6 and all(e["line"] > 1 for e in errors)


def test_patients_of_a_csv(tmp_path, rows):
    """A study is of one patient, else it stands on both sides of the split; rows without one are told."""
    write_csv(tmp_path / "q.csv", [rows[0], rows[1] | {"patient_id": "another"}, *rows[2:]])
    found, errors, notes = read_cases(tmp_path / "q.csv")
    assert len(found) == 3 and len(found[0].wordings) == 1 and not notes
    assert errors[0]["line"] == 3 and "with another patient_id" in errors[0]["error"]
    write_csv(tmp_path / "q.csv", [r | {"patient_id": "nan"} for r in rows[:2]] + rows[2:])
    assert "2 of 6 rows have no patient_id" in read_cases(tmp_path / "q.csv")[2][0]
    merged = [r | {"patient_id": ""} if i % 2 else r for i, r in enumerate(rows)]  # cells joined in a spreadsheet
    write_csv(tmp_path / "q.csv", merged)
    again, errors, notes = read_cases(tmp_path / "q.csv")
    assert [vars(c) for c in again] == [vars(c) for c in cases_of(tmp_path, rows)] and not errors and not notes
    gone = [rows[0] | {"study_id": f"x{i}", "patient_id": "", "image_path": "gone.png"} for i in range(4)]
    write_csv(tmp_path / "q.csv", rows + gone)  # rows that are left out need no patient
    assert len(read_cases(tmp_path / "q.csv")[1]) == 4 and not read_cases(tmp_path / "q.csv")[2]


def cases_of(folder, rows):
    write_csv(folder / "all.csv", rows)
    return read_cases(folder / "all.csv")[0]


def test_lines_of_errors_are_those_of_the_file(tmp_path, rows):
    write_csv(tmp_path / "q.csv", [rows[0], rows[1] | {"answer_gt": "maybe"}, *rows[2:]])
    head, first, rest = (tmp_path / "q.csv").read_text().split("\n", 2)
    (tmp_path / "q.csv").write_text("\n".join([head, "", first, "", rest]))
    assert [e["line"] for e in read_cases(tmp_path / "q.csv")[1]] == [5]


def test_refusals(tmp_path, rows):
    for name in COLUMNS:
        write_csv(tmp_path / "q.csv", [{k: v for k, v in r.items() if k != name} for r in rows])
        with pytest.raises(InputError, match=f"lacks the column {name}"):
            read_cases(tmp_path / "q.csv")
    write_csv(tmp_path / "q.csv", [{k: v for k, v in r.items() if k != "patient_id"} for r in rows])
    assert "6 of 6 rows have no patient_id" in read_cases(tmp_path / "q.csv")[2][0]
    write_csv(tmp_path / "q.csv", [r | {"image_path": "gone.png"} for r in rows])
    with pytest.raises(InputError, match="no row of .* can be used; line 2: there is no image gone.png"):
        read_cases(tmp_path / "q.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_cases(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="no condition 'Flu'"):
        phantom_settings(["Flu"])
    for region in ("here", "[1," * 5000, "[[1, 2, NaN, 4]]", "[[5, 5, 1, 1]]", "[3]", "[[0.1, 0.2, 0.5, 0.9]]"):
        write_csv(tmp_path / "q.csv", [r | {"region": region} for r in rows])
        cases, _, notes = read_cases(tmp_path / "q.csv")
        assert all(case.boxes == [] for case in cases) and f"{len(rows)} regions are no lists of boxes" in notes[-1]
    for change, words in (
        ({"question": "Is <image> ill?"}, "holds a token that stands for an image"),
        ({"question": "y" * 100_000}, "longer than 1000 characters"),
        ({"question": "N/A"}, "question or study_id is empty"),
        ({"variant_id": "9" * 5000}, "not a whole number"),
        ({"image_path": "x" * 5000}, "there is no image xxx"),
    ):
        write_csv(tmp_path / "q.csv", [r | change for r in rows[:1]] + [r for r in rows if r is not rows[0]])
        found, errors, _ = read_cases(tmp_path / "q.csv")
        assert len(found) == 2 and words in errors[0]["error"], words


def test_a_csv_of_a_spreadsheet(tmp_path, rows):
    """Semicolons, numbers with a point, back slashes, names in capitals."""
    for row in rows:
        row |= {"variant_id": f"{row['variant_id']}.0", "image_path": row["image_path"].replace("/", "\\")}
        row |= {"answer_gt": "1.0" if row["answer_gt"] == "yes" else "No."}
    write_csv(tmp_path / "q.csv", rows)
    read = read_cases(tmp_path / "q.csv")
    text = (tmp_path / "q.csv").read_text()
    assert ";" not in text and '"' in text  # regions are quoted
    with open(tmp_path / "q.csv", newline="") as file:
        lines = list(csv.reader(file))
    with open(tmp_path / "s.csv", "w", newline="", encoding="utf-16") as file:
        csv.writer(file, delimiter=";").writerows([[name.upper() if name in COLUMNS else name for name in lines[0]]])
        csv.writer(file, delimiter=";").writerows(lines[1:])
    again = read_cases(tmp_path / "s.csv")
    assert len(read[0]) == 3 and not read[1] and [vars(c) for c in again[0]] == [vars(c) for c in read[0]]


def test_strategies_in_free_words():
    assert [strategy_of(t) for t in ("Negated form", "lexical_substitution", "passive voice", "")] == [
        "negation", "synonym", "voice", "other",
    ]  # fmt: skip
    json.dumps(strategy_of("x"))
