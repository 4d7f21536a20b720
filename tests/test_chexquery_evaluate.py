"""evaluate.py, infer.py and visualize.py of CheXQuery: numbers by hand, lines of the table, maps, what queries do."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import shared  # noqa: F401, isort: skip  # before transformers
import torch
from PIL import Image

from chexquery import cases, evaluate, faithfulness, infer, prepare, scoring, train, visualize
from chexquery.checkpoints import load_model, untrained
from chexquery.model import CheXQuery
from shared.metrics.clinical import averages
from shared.metrics.labels import CONDITIONS, label_report
from shared.metrics.text import score_reports
from shared.phantom import phantom_study
from shared.runtime import load_checkpoint, read_json, save_checkpoint, write_json

TEXTS = ["The heart is enlarged. No effusion.", "There is pulmonary edema.", "Normal chest."]
REFERENCES = ["There is cardiomegaly. No pleural effusion.", "Pulmonary edema is present.", "There is a pneumothorax."]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chexquery") / "run"
    train.main(["--dry-run", "--out-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    small = "--films 24 --faithfulness 6 --num-samples 50 --device cpu".split()
    arguments = [*small, "--checkpoint", trained, "--out-dir", folder / "run"]
    evaluate.main([str(a) for a in arguments])
    return folder


# --- scores


def test_values_are_those_of_the_shared_metrics():
    written, true = [label_report(t) for t in TEXTS], [label_report(t) for t in REFERENCES]
    table, _ = scoring.score_lines({"model": TEXTS}, REFERENCES, {"model": written}, true, num_samples=40)
    expected = score_reports(TEXTS, REFERENCES, tokenizer="r2gen")
    expected |= {k: v for k, v in averages(scoring.positive_matrix(written), scoring.positive_matrix(true)).items()
                 if k.startswith("f1_")}  # fmt: skip
    assert set(expected) <= set(table["model"])
    for key, value in expected.items():
        found = table["model"][key]
        assert found["value"] == pytest.approx(value, abs=1e-12), key
        assert found["low"] - 1e-9 <= found["high"]
    assert table["model"]["diversity"]["distinct_reports"] == 3


def test_resamples_draw_whole_patients():
    resamples = scoring.Resamples(4, ["a", "a", "b", "c"], 200)
    assert (resamples.counts[0] == 1).all() and (resamples.counts[:, 0] == resamples.counts[:, 1]).all()
    again = resamples.mean(np.array([0.0, 0.0, 1.0, 1.0]))
    assert again[0] == 0.5 and len(set(again)) > 3


def test_image_use_says_what_the_intervals_show():
    rng = np.random.default_rng(0)
    model, blind = 0.6 + 0.02 * rng.standard_normal(101), 0.2 + 0.02 * rng.standard_normal(101)
    draws = {
        "model": {"f1_micro_13": model},
        "shuffled images": {"f1_micro_13": blind},
        "constant": {"f1_micro_13": 0 * blind},
    }
    gains, sentence = scoring.image_use(draws)
    assert sentence.startswith("The model uses the films") and gains["shuffled images"]["low"] > 0.3
    draws["shuffled images"]["f1_micro_13"] = model - 1e-4 * rng.standard_normal(101)
    assert "do not show" in scoring.image_use(draws)[1] and "shuffled images" in scoring.image_use(draws)[1]


def test_consistency_by_hand():
    logits = np.full((3, 14), -5.0)
    logits[0, CONDITIONS.index("Cardiomegaly")] = 5
    logits[1, CONDITIONS.index("Fracture")] = 5
    found = scoring.consistency(logits, [0.5] * 14, [label_report(t) for t in TEXTS])
    assert found["Cardiomegaly"] == {"both": 1, "head only": 0, "text only": 0, "neither": 2, "agreement": 1}
    assert found["Fracture"]["head only"] == 1 and found["Edema"]["text only"] == 1
    assert found["all"]["agreement"] == pytest.approx(37 / 39) and "No Finding" not in found


def test_another_patient():
    rows = [{"patient": p} for p in "aabbccdd"]
    order = evaluate.another_patient(rows)
    assert sorted(order) == list(range(8)) and all(
        rows[i]["patient"] != rows[j]["patient"] for i, j in enumerate(order)
    )
    order = evaluate.another_patient(rows[:3])
    assert [rows[j]["patient"] for j in order] == ["b", "b", "a"]
    assert evaluate.another_patient(rows[:2]) is None  # a film of the same patient is no control


# --- evaluate.py


def test_table_has_every_line(measured):
    metrics = read_json(measured / "run" / "metrics.json")
    lines = metrics["lines"]
    expected = "model|shuffled images|blank images|constant|most frequent|random|nearest neighbour"
    expected += "|oracle labels, canned report"
    assert list(lines) == expected.split("|")
    for line in lines.values():
        assert {"bleu_1", "bleu_4", "rouge_l", "cider", "f1_macro_14", "f1_example_13", "f1_micro_drawn"} <= set(line)
        assert line["bleu_4"]["low"] <= line["bleu_4"]["value"] <= line["bleu_4"]["high"]
    oracle = lines["oracle labels, canned report"]["f1_micro_14"]
    assert lines["constant"]["diversity"]["distinct_reports"] == 1
    assert oracle["value"] > max(0.5, lines["model"]["f1_micro_14"]["value"])
    assert metrics["dataset"]["phantom"] and metrics["n"] == 8 and metrics["abnormal"]["n"] > 0
    assert (
        "do not show that the model uses the films" in metrics["image_use"]["sentence"]
    )  # it was trained for two steps
    assert set(metrics["consistency"]) == {*CONDITIONS[1:], "all"}
    report = (measured / "run" / "report.md").read_text()
    assert "PHANTOM" in report and "Abnormal studies only" in report and "Film drawn anew" in report
    rows = [json.loads(line) for line in open(measured / "run" / "predictions.jsonl")]
    assert len(rows) == 8 and set(expected.split("|")) <= set(rows[0])


def test_the_studies_are_those_of_the_training(refused, tmp_path):
    """What the printed command measures on, and that nobody is measured on who was trained on."""
    path, swapped, folder = (str(tmp_path / name) for name in ("splits.json", "swapped.json", "run"))
    prepare.main(["--data", "phantom", "--films", "16", "--splits-file", path])
    small = "--model tiny --width 64 --vision-layers 1 --text-layers 1 --epochs 1 --eval-studies 4 --phase 1 --limit 8"
    train.main([*small.split(), "--splits-file", path, "--device", "cpu", "--out-dir", folder])
    told = load_model(folder)[1]["data"]
    assert told["again"]["splits_file"] == path and len(told["patients"]) > 1
    found = read_json(path)
    other = {"train": "test", "test": "train", "val": "val"}
    write_json(swapped, found | {"rows": [row | {"split": other[row["split"]]} for row in found["rows"]]})
    again = ["--checkpoint", folder, "--num-samples", "20", "--faithfulness", "0", "--out-dir"]
    assert "were trained on: give the --splits-file" in refused(evaluate.main, [*again, "e", "--splits-file", swapped])
    evaluate.main([*again, "e"])
    assert read_json("e/metrics.json")["settings"]["splits_file"] == path


def test_one_patient_and_validation_studies(trained, tmp_path):
    """Without another patient there is no such line; studies that the model was chosen on are named."""
    some = ["--checkpoint", trained, "--limit", 1, "--split", "val", "--num-samples", 5, "--faithfulness", 0]
    evaluate.main([str(a) for a in (*some, "--device", "cpu", "--out-dir", tmp_path / "e")])
    lines = read_json(tmp_path / "e" / "metrics.json")["lines"]
    assert "shuffled images" not in lines and "blank images" in lines
    report = (tmp_path / "e" / "report.md").read_text()
    assert "1 val studies" in report and "on which the model was chosen" in report


def test_the_studies_of_auto_are_those_that_were_found(refused, trained, tmp_path):
    state = load_checkpoint(trained / "phase3" / "best.pt")
    state["data"] |= {"name": "iu_xray", "phantom": False, "again": state["data"]["again"] | {"data": "auto"}}
    save_checkpoint(tmp_path / "best.pt", state)
    said = refused(evaluate.main, ["--checkpoint", tmp_path / "best.pt", "--data-dir", tmp_path])
    assert "IU X-ray is not in" in said  # and not the phantom in its place


@pytest.mark.parametrize("change", [{"section": "all"}, {"drawn": [1]}, {"again": [1]}, {"patients": 5}, {"name": None},
                                    {"views": 5}])  # fmt: skip
def test_a_checkpoint_that_does_not_say_what_it_saw(refused, trained, tmp_path, change):
    state = load_checkpoint(trained / "phase1" / "best.pt")
    state["data"] |= change
    save_checkpoint(tmp_path / "best.pt", state)
    assert "is damaged, or of another version" in refused(evaluate.main, ["--checkpoint", tmp_path / "best.pt"])


def test_a_model_of_lateral_films(trained, tmp_path):
    """infer.py and visualize.py take them without frontal ones, and draw the film that is there."""
    film, state = tmp_path / "side.png", load_checkpoint(trained / "phase1" / "best.pt")
    Image.fromarray(phantom_study(0, 3, 112).lateral).save(film)
    state["data"]["views"] = ["lateral"]
    save_checkpoint(tmp_path / "best.pt", state)
    some = ["--checkpoint", str(tmp_path / "best.pt"), "--lateral", str(film), "--out-dir"]
    infer.main([*some, str(tmp_path / "i")])
    assert read_json(tmp_path / "i" / "reports.json")["reports"][0]["films"] == {"frontal": None, "lateral": str(film)}
    args = SimpleNamespace(images=None, lateral=[str(film)], limit=None)
    _, images, present, _ = cases.read_files(args, 112, ["lateral"])
    assert present.tolist() == [[False, True]] and images[0, 1].any() and not images[0, 0].any()
    visualize.main([*some, str(tmp_path / "v")])
    assert "study1_conditions_lateral.png" in {path.name for path in (tmp_path / "v" / "figures").iterdir()}
    assert "frontal" not in (tmp_path / "v" / "report.md").read_text()


def test_a_film_may_stand_in_two_pairs(tmp_path):
    a, b = (str(tmp_path / name) for name in ("a.png", "b.png"))
    for path in (a, b):
        Image.fromarray(phantom_study(0, 3, 64).image).save(path)
    args = SimpleNamespace(images=[a, b], lateral=[b, b], limit=None)
    rows = cases.read_files(args, 56, cases.VIEWS)[0]
    assert [row["films"] for row in rows] == [{"frontal": a, "lateral": b}, {"frontal": b, "lateral": b}]


def test_views_that_the_model_never_saw(refused, trained, tmp_path):
    film = tmp_path / "film.png"
    Image.fromarray(phantom_study(0, 3, 64).image).save(film)
    state = load_checkpoint(trained / "phase1" / "best.pt")
    for views, files in ((["frontal"], ["--images", film, "--lateral", film]), (["lateral"], ["--images", film])):
        state["data"]["views"] = views
        save_checkpoint(tmp_path / "best.pt", state)
        assert f"trained on {views[0]} films alone" in refused(
            infer.main, ["--checkpoint", tmp_path / "best.pt", *files]
        )
        assert "alone" in refused(visualize.main, ["--checkpoint", tmp_path / "best.pt", *files])


@pytest.mark.realdata
def test_export_for_rexrank(trained, tmp_path, real_data, refused):
    """What ReXrank's own script reads: the sections of the reference, by study, and the text written."""
    folder, out = real_data("iu_xray/annotation.json").parent, tmp_path / "rexrank.json"
    small = ["--checkpoint", trained, "--device", "cpu", "--num-samples", "5", "--export-rexrank", out]
    assert "test studies of phantom" in refused(evaluate.main, small)
    evaluate.main([*map(str, small), "--data", "iu_xray", "--data-dir", str(folder), "--limit", "4",
                   "--out-dir", str(tmp_path / "run")])  # fmt: skip
    rows, found = [json.loads(line) for line in open(tmp_path / "run" / "predictions.jsonl")], read_json(out)
    texts = {name.split("_")[0]: study["model_prediction"] for name, study in found.items()}
    assert texts == {f"CXR{row['uid']}": f"Findings: {row['model']}".strip() if row["model"] else "" for row in rows}
    assert all(study["section_findings"] and "_IM-" in name for name, study in found.items())


def test_sections_of_a_written_text():
    for section in cases.SECTIONS:
        parts = cases.sections_of(cases.target_text("Clear lungs.", "Normal.", section), section)
        assert all({"findings": "Clear lungs.", "impression": "Normal."}[k] == v for k, v in parts.items())
        assert set(parts) == set(section.split("+"))


def test_dry_run_needs_no_checkpoint(tmp_path):
    evaluate.main(["--dry-run", "--out-dir", str(tmp_path / "e")])
    assert read_json(tmp_path / "e" / "metrics.json")["checkpoint"] == "untrained"
    infer.main(["--dry-run", "--out-dir", str(tmp_path / "i")])
    assert read_json(tmp_path / "i" / "reports.json")["n"] == 1
    visualize.main(["--dry-run", "--out-dir", str(tmp_path / "v")])
    assert read_json(tmp_path / "v" / "metrics.json")["phantom"]


def test_bad_input(refused, trained, tmp_path):
    assert "there is no trained model" in refused(evaluate.main, ["--data", "phantom"])
    assert "there is no CheXQuery model" in refused(evaluate.main, ["--checkpoint", tmp_path / "no.pt"])
    last = trained / "phase1" / "last.pt"
    assert "it lacks chexquery, phase, weights" in refused(infer.main, ["--checkpoint", last, "--images", "x.png"])
    assert "--images names the films" in refused(infer.main, ["--checkpoint", trained])
    assert "none of the films can be used" in refused(
        infer.main, ["--checkpoint", trained, "--images", tmp_path / "no.png"]
    )
    assert "one of the two" in refused(visualize.main, ["--checkpoint", trained])
    film = tmp_path / "film.png"
    Image.fromarray(phantom_study(0, 3, 64).image).save(film)
    assert "must be between 1 and 32" in refused(infer.main, ["--images", film, "--beams", 10**9])
    seen = ["--checkpoint", trained, "--phantom-seed", "3", "--min-tokens", 1000]
    assert "this model writes at most" in refused(evaluate.main, seen)
    two = ["--checkpoint", trained, "--images", film, "--lateral", film, tmp_path / "other.png"]
    assert "give one lateral film for each" in refused(infer.main, two)


# --- infer.py


def test_infer_writes_the_reports_of_files(trained, tmp_path):
    film, lateral = tmp_path / "a.png", tmp_path / "b.png"
    study = phantom_study(0, 7, 112)
    for path, pixels in ((film, study.image), (lateral, study.lateral)):
        Image.fromarray(pixels).save(path)
    (tmp_path / "broken.png").write_text("no image")
    infer.main(
        [
            "--checkpoint",
            str(trained),
            "--images",
            str(film),
            str(tmp_path / "broken.png"),
            "--out-dir",
            str(tmp_path / "one"),
        ]
    )
    found = read_json(tmp_path / "one" / "reports.json")
    assert found["n"] == 1 and found["left_out"] == 1 and "broken.png" in (tmp_path / "one" / "errors.csv").read_text()
    chances = list(found["reports"][0]["probabilities"].values())
    assert chances == sorted(chances, reverse=True) and len(chances) == 14
    assert found["reports"][0]["report"] in (tmp_path / "one" / "reports.txt").read_text()
    assert "<img" in (tmp_path / "one" / "report.html").read_text()
    both = ["--images", film, "--lateral", lateral, "--beams", 2, "--out-dir", tmp_path / "two"]
    infer.main([str(a) for a in ("--checkpoint", trained, *both)])
    assert read_json(tmp_path / "two" / "reports.json")["reports"][0]["films"]["lateral"] == str(lateral)


def test_pictures_of_films_name_file_and_views(tmp_path, monkeypatch):
    kept, save = [], infer.save_figure
    monkeypatch.setattr(infer, "save_figure", lambda f, path, *title: kept.append((f, *title)) or save(f, path, *title))
    result = {"films": {"frontal": "x/a.png", "lateral": "x/b.png"}, "report": "", "probabilities": {}}
    images, present = np.zeros((1, 2, 56, 56), np.uint8), np.ones((1, 2), bool)
    infer.make_report(tmp_path, images, present, [result], untrained()[1])
    assert [axis.get_title() for axis in kept[0][0].axes] == ["frontal", "lateral"] and kept[0][1:] == ("a.png",)


# --- maps and queries


def small():
    model, told = untrained()
    studies = cases.phantom_rows(8, conditions=["Cardiomegaly", "Pleural Effusion"], prevalence=0.9, severe=True)
    rows = studies.split("test")
    images, present = (
        torch.from_numpy(a) for a in cases.Films(rows, 56, studies.notes["drawn"]).get(list(range(len(rows))))
    )
    return model, rows, images, present, model.look(images, present), studies.notes["drawn"]


@pytest.mark.parametrize("kind", faithfulness.KINDS)
def test_maps_add_up_to_one_and_leave_absent_views_out(kind):
    model, _, images, present, _, _ = small()
    present = present.clone()
    present[:, 1] = False
    _, maps = faithfulness.maps_of(model, model.look(images, present), present, kind, images)
    assert maps.shape == (8, 20, 2, 4, 4) and maps[:, :, 1].abs().max() == 0
    sums = maps.sum((-1, -2, -3))
    assert torch.all(((sums - 1).abs() < 1e-4) | ((sums == 0) & (kind == "occlusion")))  # no place may matter


def test_a_model_of_lateral_films_is_not_asked_about_frontal_ones():
    model, rows, _, _, _, drawn = small()
    args = SimpleNamespace(seed=0, views=["lateral"])
    notes = {"phantom": True, "drawn": drawn}
    found = faithfulness.faithfulness(model, rows, notes, args, {}, "cpu", {"max_tokens": 3})
    assert found["lung maps in their half"] is None and "pointing" not in found and "redrawn" in found


def test_gradient_maps_find_the_patch_that_counts():
    """A head that reads one direction, and patches of which one holds it: that patch gets the weight."""
    model, _, images, present, looked, _ = small()
    patches = looked[0].detach().clone()
    patches[:, 5] *= 4
    _, plain = faithfulness.maps_of(model, [looked[0], looked[1]], present, "gradient")
    _, changed = faithfulness.maps_of(model, [patches, looked[1]], present, "gradient")
    assert not torch.allclose(plain, changed)


def test_inside_by_hand():
    mask = np.zeros((8, 8), bool)
    mask[:4, 4:] = True
    map_ = np.array([[0.1, 0.6], [0.2, 0.1]])
    assert faithfulness.inside(map_, mask) == (True, pytest.approx(0.6))
    assert faithfulness.inside(map_.T, mask) == (False, pytest.approx(0.2))
    assert faithfulness.box_mask([[4, 0, 8, 4]], 8).tolist() == mask.tolist()
    thirds = faithfulness.inside(np.full((3, 3), 1 / 9), np.ones((8, 8), bool))
    assert thirds[0] and thirds[1] == pytest.approx(1, abs=0.15)  # patches of 3, 2 and 3 pixels


def test_erased_patches_take_the_mean():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(1, 2, 1, 1)
    patches = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    patches[0, 0, 1, 2] = True
    gone = faithfulness.erased(images, patches, 4)
    assert (gone[0, 0, 2:4, 4:6] == 32).all() and torch.equal(gone[0, 1], images[0, 1])
    assert (gone != images).sum() <= 4


def test_summary_of_pointing_by_hand():
    row = dict(
        patient="a",
        kind="attention",
        what="condition",
        name="Edema",
        hit=True,
        mass=0.4,
        other_hit=False,
        other_mass=0.1,
        area=0.2,
    )
    found = faithfulness.pointing_summary([row, row | {"patient": "b", "hit": False}])["attention"]["condition"]
    assert found["all"]["hit"]["value"] == 0.5 and found["Edema"]["times_chance"] == pytest.approx(2.5)
    assert found["all"]["mass_times_chance"] == pytest.approx(2)


def test_pointing_and_redrawing_run_over_what_was_drawn():
    model, rows, images, present, looked, drawn = small()
    found = faithfulness.pointing(model, rows, images, looked, present, drawn, np.random.default_rng(0))
    shown = {name for row in rows for name in ("Cardiomegaly", "Pleural Effusion") if row["truth"][name]}
    assert {r["name"] for r in found if r["what"] == "condition"} == shown
    assert {r["name"] for r in found if r["what"] == "region"} == set(faithfulness.ORGANS)
    both = [row | {"seen_views": ["frontal"]} for row in rows]
    again = faithfulness.redrawing(model, both, ["There is cardiomegaly."] * len(rows), drawn, "cpu", {"max_tokens": 4})
    with_heart = sum(row["truth"]["Cardiomegaly"] for row in rows)
    assert sum(c["what"] == "lesion" for c in again) == with_heart and all(
        c["condition"] == "Cardiomegaly" for c in again
    )
    assert all(c["gone"] for c in again)  # four tokens of an untrained model name nothing


def test_removal_and_deletion_count_cases():
    model, rows, images, present, looked, _ = small()
    rng, low = np.random.default_rng(0), [0.0] * 14
    found = faithfulness.removal(
        model, ["There is edema."] * len(rows), looked, present, rows, low, {"max_tokens": 3}, rng
    )
    assert (
        len(found) == len(rows) and {c["condition"] for c in found} == {"Edema"} and all(c["own_gone"] for c in found)
    )
    dropped = faithfulness.deletion(model, images, looked, present, rows, low, rng)
    assert len(dropped) == 13 * len(rows) and set(dropped[0]) == {
        "patient",
        "study",
        "condition",
        "own_drop",
        "other_drop",
        "random_drop",
    }
    assert faithfulness.swapping(model, looked, present, rng) < 1e-5


# --- visualize.py


def test_word_maps_belong_to_the_text(trained):
    model = load_model(trained)[0]
    images, present = torch.randint(0, 255, (1, 2, 112, 112), dtype=torch.uint8), torch.ones(1, 2, dtype=torch.bool)
    seen, maps = faithfulness.maps_of(model, model.look(images, present), present)
    ids = model.encode(["The heart is normal."])[0]
    words, places, whole = visualize.word_maps(model, seen, ids, maps)
    assert "".join(words).replace(" ", "") == "Theheartisnormal." and len(places) == len(words) == len(whole)
    torch.testing.assert_close(places.sum((1, 2, 3)) + whole, torch.ones(len(words)), atol=1e-4, rtol=1e-4)


def test_visualize_of_an_empty_report(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CheXQuery, "write", lambda self, tokens, **_: ([""], torch.ones(1, 1, dtype=torch.long)))
    out = ["--data", "phantom", "--studies", "1", "--out-dir", str(tmp_path / "v")]
    visualize.main(["--checkpoint", str(trained), *out])
    assert "(nothing was written)" in capsys.readouterr().out
    assert not (tmp_path / "v" / "figures" / "study1_words.png").exists()
    assert np.load(tmp_path / "v" / "maps.npz")["study1_words"].shape == (0, 2, 8, 8)


def words_drawn(model, told, tmp_path, monkeypatch, name, text):
    """Panels of the picture of words, its title, and the page, of one phantom film with this text."""
    drawn, ids = [], model.encode([text])
    monkeypatch.setattr(visualize, "open_model", lambda args: (model, told | {"device": "cpu"}, {}))
    monkeypatch.setattr(CheXQuery, "write", lambda self, tokens, **_: ([text], ids))
    old = visualize.grid_figure
    monkeypatch.setattr(visualize, "grid_figure", lambda p, *a: drawn.append(p) or old(p, *a))
    visualize.main(["--dry-run", "--out-dir", str(tmp_path / name)])
    return drawn, (tmp_path / name / "report.md").read_text()


def test_words_of_a_model_without_pooling(tmp_path, monkeypatch, recwarn):
    page = words_drawn(*untrained(num_pool_queries=0), tmp_path, monkeypatch, "v", "The heart is enlarged.")[1]
    assert "No maps of words" in page and "nan" not in page and not any("divide" in str(w.message) for w in recwarn)
    assert not (tmp_path / "v" / "figures" / "study1_words.png").exists()


def test_words_are_drawn_on_the_film_that_is_there(tmp_path, monkeypatch):
    model, told = untrained(max_tokens=90)
    told["data"]["views"] = ["lateral"]
    text = "heart " * 44 + "pneumothoraxpneumothoraxpneumothorax"
    panels, page = words_drawn(model, told, tmp_path, monkeypatch, "v", text)
    assert {view for view, *_ in panels[-1]} == {1} and "the first 40 of 45 words" in page
    panels = words_drawn(model, told, tmp_path, monkeypatch, "w", "pneumothoraxpneumothoraxpneumothorax heart")[0]
    assert max(len(title) for *_, title in panels[-1]) == 17


def test_visualize_of_files(trained, tmp_path):
    film = tmp_path / "film.png"
    Image.fromarray(phantom_study(0, 7, 112).image).save(film)
    visualize.main(
        ["--checkpoint", str(trained), "--images", str(film), "--kind", "gradient", "--out-dir", str(tmp_path / "v")]
    )
    names = {path.name for path in (tmp_path / "v" / "figures").iterdir()}
    assert {"study1_conditions_frontal.png", "study1_regions.png"} <= names and not any("lateral" in n for n in names)
    maps = np.load(tmp_path / "v" / "maps.npz")["study1_queries"]
    assert maps.shape == (20, 2, 8, 8) and maps[:, 1].max() == 0
    report = (tmp_path / "v" / "report.md").read_text()
    assert "| study | condition | ranked" in report
    assert "Deletion" in report and "Pointing" not in report  # nothing is known of a file
