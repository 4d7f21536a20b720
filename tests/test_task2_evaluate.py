"""Task 2: evaluation of prompts and of written reports."""

import json

import numpy as np
import pytest

from shared.data.image_sets import load_phantom
from shared.runtime import InputError
from task2_report.cases import Case, load_reports
from task2_report.evaluate import blind_films, main, plan, sizes_there, stratified
from task2_report.label_cnn import best_thresholds, small_films
from task2_report.measures import pixel_baseline
from task2_report.pages import verdict
from task2_report.report_task import GREY, MODEL, SHUFFLED, make_baselines, measure_redrawn, other_films
from shared.metrics.statistics import mean_interval
from task2_report.scores import FEW, measure_reports
from task2_report.train import main as train


def test_stratified_keeps_the_shares_and_the_order():
    labels = [1] * 60 + [0] * 40
    chosen = stratified(labels, 20, 0)
    assert len(set(chosen)) == 20 and chosen == sorted(chosen) and sum(labels[i] for i in chosen) == 12
    assert stratified(labels, 20, 0) == chosen != stratified(labels, 20, 1)
    assert [len(stratified([1] * 45 + [0] * 15, n, 0)) for n in (1, 2, 3, 60)] == [1, 2, 3, 60]


def test_blind_films_and_sizes():
    films = [np.full((4, 4), i, np.uint8) for i in range(3)]
    blind = blind_films(films, 0)
    assert [f[0, 0] for f in blind["another image"]] == [1, 2, 0] and blind["text only"] == [None] * 3
    assert max(f.max() for f in blind["black image"]) == 0 and blind["noise"][0].std() > 0
    data = load_phantom(28)
    found = sizes_there(data, "data", [0, 5], "test")
    assert list(found) == [28, 64, 128, 224] and found[224][1].shape == (224, 224)
    small = found[224][1].reshape(28, 8, 28, 8).mean((1, 3))  # the same person, drawn larger
    assert np.corrcoef(small.ravel(), found[28][1].astype(float).ravel())[0, 1] > 0.9


def test_classify_end_to_end(own_folder, capsys):
    main(["--dry-run", "--strategies", "zero_shot", "yes_no", "--contexts", "none", "swapped"])
    said, run = capsys.readouterr().out, own_folder / "outputs/task2_report/evaluate/dry-run"
    assert "planned: 6 films, 2 strategies, contexts none, swapped: 48 texts and 102 yes/no questions" in said
    told = json.loads((run / "metrics.json").read_text())
    assert set(told["pairs"]) == {f"{s} / {c}" for s in ("zero_shot", "yes_no") for c in ("none", "swapped")}
    assert told["untrained"] and set(told["controls"]["blind"]) == {
        "black image",
        "noise",
        "another image",
        "text only",
    }
    assert set(told["ladder"]) == {"28", "64", "128", "224"} and "cnn" in told["baselines"]
    # the same words without any image: an AUC of exactly one half
    assert told["controls"]["blind"]["text only"]["margin"]["auc"]["value"] == 0.5
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 4
    for row in rows:
        swapped = row["context"] == "swapped"
        assert row["told_probability"] == (pytest.approx(1 - row["cnn"]["probability"]) if swapped else None)
        assert set(row) >= {"prompt_sha", "raw_text", "claims", "unsupported_claims", "flags", "seconds", "tokens"}
    page = (own_folder / "reports/task2_report_generation.md").read_text()
    assert "Not a result to hand in" in page and "PHANTOM" in page and "means nothing" not in page
    assert (own_folder / "reports/figures/task2_auc.png").is_file()


def test_one_film_and_an_opinion_of_one_half(own_folder):
    """One class on the films is no traceback after all answers; "50 %" is no opinion that an answer could follow."""
    quick = "--dry-run --limit 1 --strategies yes_no --out-dir run".split()
    main([*quick, "--contexts", "swapped", "constant"])
    told = json.loads((own_folder / "run/metrics.json").read_text())
    assert told["n"] == 1 and told["baselines"]["pixels"]["auc"]["value"] is None
    assert "follows_wrong_opinion" in told["pairs"]["yes_no / swapped"]
    assert "follows_wrong_opinion" not in told["pairs"]["yes_no / constant"]


def test_the_verdict_needs_prompts_without_a_hint():
    auc = {"value": 0.7, "low": 0.6, "high": 0.8}
    numbers = {"pairs": {"yes_no / cnn": {"margin": {"auc": auc}}}, "baselines": {"pixels": {"auc": auc}}}
    assert verdict(numbers).startswith("Every prompt held a hint") and "0.700" in verdict(numbers)
    numbers["pairs"]["yes_no / none"] = {"margin": {"auc": auc}}
    assert "highest AUC is that of yes_no / none" in verdict(numbers)


def test_pixels_of_one_class():
    images = np.zeros((4, 1, 2, 2), np.uint8)
    assert (pixel_baseline(images, [1] * 4, images[:2]) == 0.5).all()


def test_the_plan_counts_every_pass():
    class Args:
        strategies = ["a", "b"]

    assert plan(Args, 10, ["none"], 4) == (10 * (2 + 4), 10 * (2 + 4 + 6 + 3))


def test_another_patients_film():
    cases = [Case(str(i), patient, "test", i, "x", "") for i, patient in enumerate("aab")]
    assert other_films(cases) == [2, 2, 0] and other_films(cases[:2]) is None  # the same patient is no control


def test_thresholds_are_reached_by_the_score_they_were_chosen_at():
    labels, scores = np.array([[0, 1, 1, 0]], bool).T, np.array([[0.1, 0.6, 0.9, 0.2]]).T
    cut = best_thresholds(labels, scores)
    assert cut == [0.6] and ((scores >= cut) == labels).all()
    assert best_thresholds(labels & False, scores) == [0.5]


def test_shares_draw_patients():
    few, many = (
        mean_interval([1, 0], ["a", "b"], FEW),
        mean_interval([1] * 40 + [0] * 40, [i // 2 for i in range(80)], FEW),
    )
    assert few == {"value": 0.5, "low": None, "high": None, "n": 2}
    alone = mean_interval([1] * 40 + [0] * 40, list(range(80)), FEW)
    assert many["value"] == alone["value"] == 0.5 and many["high"] - many["low"] > 1.2 * (alone["high"] - alone["low"])


@pytest.fixture
def trained(own_folder):
    train("--dry-run --films 20".split())
    return own_folder / "outputs/task2_report/train/dry-run/best"


def test_reports_end_to_end(own_folder, trained):
    main(["--task", "report", "--adapter", str(trained), "--dry-run", "--out-dir", "run"])
    told = json.loads((own_folder / "run/metrics.json").read_text())
    lines = {
        MODEL,
        SHUFFLED,
        GREY,
        "constant",
        "most frequent",
        "random",
        "nearest neighbour",
        "oracle labels, canned report",
    }
    assert set(told["rows"]) == lines and told["cnn"]["steps"] == 2 and set(told["grey"]) == set(told["conditions"])
    oracle, constant = (
        told["rows"][name]["conditions"]["value"] or 0 for name in ("oracle labels, canned report", "constant")
    )
    assert oracle >= constant
    rows = [json.loads(line) for line in (own_folder / "run/reports.jsonl").read_text().splitlines()]
    assert len(rows) == told["n"] and {"text", "shuffled", "grey", "reference", "nearest"} <= set(rows[0])
    assert "Errors per report" in (own_folder / "run/report.md").read_text()
    main(["--task", "report", "--adapter", str(trained), "--dry-run", "--limit", "1", "--out-dir", "one"])
    assert SHUFFLED not in json.loads((own_folder / "one/metrics.json").read_text())["rows"]
    assert "all films are of one patient" in (own_folder / "one/report.md").read_text()


def test_one_bad_film_is_left_out_and_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no film")
    good = Case("a", "p", "test", np.zeros((80, 80), np.uint8), "x", "")
    images, kept, errors = small_films([good, Case("b", "q", "test", tmp_path / "bad.png", "x", "")])
    assert kept == [good] and images.shape == (1, 1, 64, 64) and errors[0]["path"].endswith("bad.png")
    with pytest.raises(InputError, match="none of the 1 films can be read"):
        small_films([Case("b", "q", "test", tmp_path / "bad.png", "x", "")])


def test_redrawn_films_are_asked_about_what_was_taken_out():
    """A writer that sees: it reads the film's brightness against the original and answers as a perfect model would."""
    data = load_reports("phantom", "data", 40, seed=1, splits=("test", "train"))
    conditions = tuple(data.facts["again"]["chosen"]["conditions"])
    cases = [c for c in data.split("train") if len({f.condition for f in c.study.drawn}) >= 2][:4]
    truth = {}
    for case in cases:
        for names in [(), *[(f.condition,) for f in case.study.drawn]]:
            study = case.study.without(*names) if names else case.study
            said = [f.condition for f in study.drawn]
            truth[study.image.tobytes()] = "FINDINGS: " + " ".join(f"There is {name.lower()}." for name in said)

    class Sees:
        def write(self, turns, films, system=None):
            return [{"text": truth[film.tobytes()]} for film in films]

    texts = [truth[case.study.image.tobytes()] for case in cases]
    found = measure_redrawn(Sees(), cases, texts, conditions, False, 100)
    assert found["gone"]["value"] == 1 and found["other"]["value"] == 0 and found["gone"]["n"] >= 4

    class Blind:
        def write(self, turns, films, system=None):
            return [{"text": texts[0]}] * len(films)

    same = [cases[0]] * 2
    assert measure_redrawn(Blind(), same, [texts[0]] * 2, conditions, False, 100)["gone"]["value"] == 0


def test_reports_of_iu_xray(own_folder, real_data):
    folder = str(real_data("iu_xray/indiana_reports.csv").parent.parent)
    same = ["--model", "tiny", "--data", "iu_xray", "--data-dir", folder, "--max-new-tokens", "6", "--device", "cpu"]
    main(["--task", "report", *same, "--limit", "5", "--cnn-steps", "1", "--out-dir", "run"])
    told = json.loads((own_folder / "run/metrics.json").read_text())
    assert told["n"] == 5 and told["n_errors"] == 0 and "redrawn" not in told
    assert len(json.loads((own_folder / "run/rexrank.json").read_text())) == 5
    assert "No use of the film is shown" in (own_folder / "run/report.md").read_text() or told["untrained"]


def test_bad_input(refused, own_folder, write_medmnist):
    assert "no trained model" in refused(main, ["--task", "report"])
    (own_folder / "run").mkdir()
    for name in ("run", "nowhere"):  # not best/: the hub is not asked for another model
        said = refused(main, ["--task", "report", "--data", "phantom", "--limit", 2, "--adapter", name])
        assert "no model and no adapter is there; name the best/" in said
    write_medmnist(own_folder / "data", "bloodmnist", {"train": 16, "val": 8, "test": 8})
    said = refused(main, ["--model", "tiny", "--data", "bloodmnist", "--data-dir", "data", "--device", "cpu"])
    assert "the prompts ask for pneumonia" in said


def test_oracle_and_constant_lines_on_the_phantom():
    """The true labels in words, read again, are the true labels; one report for everybody states nothing."""
    data = load_reports("phantom", "data", 300, splits=("train", "val", "test"))
    conditions = tuple(data.facts["again"]["chosen"]["conditions"])
    train_cases, val, test = (data.split(name) for name in ("train", "val", "test"))
    texts, cnn = make_baselines(train_cases, val, test, None, conditions, 0, 0, "cpu")
    assert cnn is None and "nearest neighbour" not in texts
    found = {name: measure_reports(some, test, conditions, intervals=False) for name, some in texts.items()}
    assert found["oracle labels, canned report"]["conditions"]["value"] > 0.9
    assert found["constant"]["conditions"]["value"] < 0.5
    assert found["constant"]["diversity"]["distinct_reports"] == 1
