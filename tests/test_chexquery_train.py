"""train.py and prepare.py of CheXQuery: rows and targets, three phases, resuming, settings, sampler, selection."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shared  # noqa: F401, isort: skip  # before transformers
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from chexquery import cases, train
from chexquery.checkpoints import load_model, untrained
from chexquery.model import heads_of
from chexquery.prepare import main as prepare
from shared.metrics.labels import CONDITIONS, TOP_FIVE
from shared.models import hub
from shared.runtime import InputError, load_checkpoint, read_json, write_json
from shared.training import StopSignal, learning_rate


def run(*arguments):
    train.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chexquery") / "run"
    run("--dry-run", "--out-dir", folder)
    return folder


# --- rows


def test_text_of_a_section():
    findings, impression = "The heart is large. XXXX seen. No effusion.", "Normal chest."
    assert cases.target_text(findings, impression, "findings") == "The heart is large. No effusion."
    assert cases.target_text(findings, impression, "findings", filled=False) == findings
    both = cases.target_text(findings, "", "findings+impression")
    assert both == "Findings: The heart is large. No effusion. | Impression: No specific impression documented."
    assert cases.target_text("", impression, "findings+impression").startswith(
        "Findings: No detailed findings documented."
    )
    assert cases.target_text("", "XXXX.", "impression") == ""


def test_region_labels_of_sentences():
    found = cases.region_labels(
        "The heart is enlarged. There is a large left pleural effusion. The mediastinum is normal."
    )
    assert found == {
        "cardiac": 1,
        "left_lung": 1,
        "right_lung": None,
        "mediastinum": 0,
        "diaphragm": None,
        "spine": None,
    }
    assert cases.region_labels("Both lungs are clear.")["right_lung"] == 0


def test_abnormal_sentences():
    text = "Heart size is normal. Large right pneumothorax. No effusion. Possible consolidation in the left base."
    assert cases.abnormal_sentences(text) == "Large right pneumothorax. Possible consolidation in the left base."
    assert cases.abnormal_sentences("The lungs are clear. No effusion.") == "No abnormality."


def test_label_targets():
    def row(**labels):
        return {"labels": dict.fromkeys(CONDITIONS) | {k.replace("_", " "): v for k, v in labels.items()}}

    rows = [row(Edema=1, Pneumonia=-1, Cardiomegaly=0), row()]
    edema, pneumonia = (CONDITIONS.index(name) for name in ("Edema", "Pneumonia"))
    for policy, value, counts in (("positive", 1, 1), ("negative", 0, 1), ("ignore", 0, 0)):
        targets, mask = cases.label_targets(rows, policy)
        assert targets[0, edema] == 1 and targets[0].sum() == 1 + value
        assert targets[0, pneumonia] == value and mask[0, pneumonia] == counts
        assert mask[0].sum() == 13 + counts and mask[1].sum() == 0  # a report that says nothing is not all-negative


def test_closed_upwards():
    true = cases.closed_upwards(dict.fromkeys(CONDITIONS) | {"Pneumonia": -1})
    assert {k for k, v in true.items() if v} == {"Pneumonia", "Consolidation", "Lung Opacity"}


def test_phantom_rows():
    studies = cases.phantom_rows(16, conditions=["Edema"], prevalence=0.5, severe=True)
    assert studies.counts() == {"train": 16, "val": 8, "test": 8}
    assert (
        len({row["patient"] for row in studies.split("val")} & {row["patient"] for row in studies.split("train")}) == 0
    )
    shown = {name for row in studies.rows for name, value in row["truth"].items() if value}
    assert shown == {"Edema", "Lung Opacity", "No Finding"}
    films = cases.Films(studies.rows, 56, studies.notes["drawn"])
    images, present = films.get([0, 1])
    study = cases.study_of(studies.rows[1], studies.notes["drawn"], 56)
    assert (images[1, 0] == study.image).all() and (images[1, 1] == study.lateral).all() and present.all()


def test_prepare_and_its_refusals(refused, tmp_path, capsys):
    path = tmp_path / "splits.json"
    prepare(["--data", "phantom", "--films", "16", "--splits-file", str(path)])
    assert "patients" not in capsys.readouterr().err
    studies = cases.read_splits(path)
    assert studies.counts() == {"train": 16, "val": 8, "test": 8} and studies.notes["phantom"]
    assert "is there already" in refused(prepare, ["--data", "phantom", "--films", 16, "--splits-file", path])
    found = read_json(path)
    assert found["facts"]["audit"]["patients in two splits"]["train, test"]["shared"] == 0
    twice = [row | {"split": "test"} for row in found["rows"][:2]]
    for change, sentence in (
        ({"rows": found["rows"] + twice}, "2 patients are both in train and in test"),
        ({"rows": [found["rows"][0] | {"report": " "}]}, "has no text"),
        ({"rows": [{"uid": 1}]}, "a row lacks patient"),
        ({"rows": [[1]]}, "a row lacks all its fields"),
        ({"rows": [found["rows"][0] | {"labels": {"Edema": 1}}]}, "a row lacks labels"),
        ({"rows": [found["rows"][0] | {"films": {"frontal": 3}}]}, "a row lacks films"),
        ({"rows": [found["rows"][0] | {"split": "training"}]}, "a row lacks split"),
        ({"rows": [found["rows"][0] | {"report": None}]}, "a row lacks report"),
        ({"rows": found["rows"][:1] * 2}, "1 studies stand there twice"),
        ({"facts": {}}, "do not say what the rows are"),
        ({"facts": found["facts"] | {"name": None}}, "do not say what the rows are"),
        ({"facts": found["facts"] | {"notes": found["facts"]["notes"] | {"drawn": [1]}}}, "do not say what the rows"),
        ({"facts": found["facts"] | {"notes": found["facts"]["notes"] | {"section": "all"}}}, "do not say what the ro"),
        ({"facts": found["facts"] | {"notes": found["facts"]["notes"] | {"phantom": False}}}, "a row lacks films"),
        ({"rows": 5}, "was not written by chexquery/prepare.py"),
        ({"rows": [found["rows"][0] | {"report": "A \ud800."}]}, "a row lacks report"),
        ({"rows": [found["rows"][0] | {"uid": uid} for uid in (7, "7")]}, "1 studies stand there twice"),
        ({"rows": [row | {"patient": 1 if row["split"] == "val" else "1"} for row in found["rows"]]}, "1 patients are"),
        ({"rows": []}, "was not written by chexquery/prepare.py"),
    ):
        path.write_text(json.dumps(found | change))
        assert sentence in refused(train.main, ["--model", "tiny", "--splits-file", path])
    assert "needs --chexbert" in refused(prepare, ["--labels", "chexbert"])
    assert "name it with --splits-file" in refused(prepare, ["--data", "phantom", "--out-dir", tmp_path / "run"])
    assert "no MeSH" in refused(
        prepare, ["--data", "phantom", "--labels", "mesh", "--splits-file", tmp_path / "x.json"]
    )


def test_prepared_rows_train_a_model(tmp_path):
    path = tmp_path / "splits.json"
    prepare(["--data", "phantom", "--films", "16", "--splits-file", str(path), "--section", "findings+impression"])
    small = "--model tiny --width 64 --vision-layers 1 --text-layers 1 --epochs 1 --eval-studies 8 --phase 1".split()
    run(*small, "--splits-file", path, "--device", "cpu", "--out-dir", tmp_path / "run")
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["dataset"]["section"] == "findings+impression" and metrics["n"] == 8
    references = [json.loads(line)["reference"] for line in open(tmp_path / "run" / "phase1" / "val_reports.jsonl")]
    assert all(text.startswith("Findings: ") and " | Impression: " in text for text in references)


def test_studies_with_a_damaged_film_are_left_out_before_the_work_begins(tmp_path):
    prepare(["--data", "phantom", "--films", "16", "--splits-file", str(tmp_path / "splits.json")])
    found = read_json(tmp_path / "splits.json")
    film = tmp_path / "film.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(film)
    (tmp_path / "cut.png").write_bytes(film.read_bytes()[:60])
    found["facts"]["notes"]["phantom"] = False
    for i, row in enumerate(found["rows"]):
        row["films"] = {"frontal": str(tmp_path / "cut.png" if i == 3 else film), "lateral": None}
    found["rows"][4]["films"]["frontal"] = None
    write_json(tmp_path / "splits.json", found)
    args = train.parse_args(["--model", "tiny", "--splits-file", str(tmp_path / "splits.json")])
    studies = cases.load_studies(args)
    assert len(studies.split("train")) == 14
    assert studies.left_out.pop("no film of the views frontal, lateral") == 1
    reason, n = studies.left_out.popitem()
    assert n == 1 and reason.startswith(f"a film cannot be read, the first {tmp_path / 'cut.png'}: ")


def test_a_study_without_its_film(tmp_path):
    row = {"uid": 7, "films": {"frontal": str(tmp_path / "no.png"), "lateral": None}}
    with pytest.raises(InputError, match="study 7: .*no.png: the file does not exist"):
        cases.Films([row], 56).get([0])
    with pytest.raises(InputError, match="study 7 has no film of the views lateral"):
        cases.Films([row], 56, views=["lateral"]).get([0])


def test_iu_rows(real_data):
    folder = real_data("iu_xray").parent
    studies = cases.iu_rows(folder)
    counts = studies.counts()  # 2,069, 296 and 590 studies, without those whose films are not in the folder
    assert counts["test"] > 580 and counts["val"] > 285 and counts["train"] > 2040
    assert not any("xxxx" in row["report"].lower() for row in studies.split("train"))
    assert any("xxxx" in row["reference"].lower() for row in studies.split("test"))
    again = cases.audit(studies.rows)
    assert again["patients in two splits"]["train, test"]["shared"] == 0
    assert again["reports that occur in train"]["test"]["rows"] > 150  # half of the test reports stand in train
    by_patient = cases.iu_rows(folder, "findings+impression", split="patient", labels="mesh")
    assert by_patient.counts()["train"] > 2000 and by_patient.rows[0]["report"].startswith("Findings: ")


# --- training


def test_dry_run_leaves_all_it_promises(trained):
    metrics = read_json(trained / "metrics.json")
    for phase in (1, 2, 3):
        for name in ("best.pt", "last.pt", "history.jsonl", "val_reports.jsonl"):
            assert (trained / f"phase{phase}" / name).is_file()
        assert load_model(trained / f"phase{phase}" / "best.pt")[1]["phase"] == phase
    assert metrics["dataset"]["phantom"] and metrics["trained"]["1"] == ["query", "head", "vision", "text"]
    assert metrics["trained"]["3"] == ["query", "head", "text"]
    assert metrics["query_start"] == "position 0 of tiny:bert"
    assert (trained / "figures" / "curves.png").stat().st_size > 2_000


def test_rates_follow_warm_up_and_cosine(trained):
    rows = [json.loads(line) for n in (1, 2, 3) for line in open(trained / f"phase{n}" / "history.jsonl")]
    highest = {1: 3e-4, 2: 3e-4, 3: 1e-4}
    for row in rows:
        warm = {1: 200, 2: 100, 3: 20}[row["phase"]]
        assert row["lr"] == pytest.approx(learning_rate(row["step"] - 1, 2, warm, highest[row["phase"]]))


def test_curves_have_a_line_for_each_phase(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "draw_history", lambda path, histories, *_: drawn.append(histories))
    run("--dry-run", "--out-dir", tmp_path / "run")
    assert {phase: [row["total epoch"] for row in rows] for phase, rows in drawn[0].items()} == {1: [1], 2: [2], 3: [3]}


def states(folder):
    return {n: load_checkpoint(folder / f"phase{n}" / "last.pt")["parts"]["weights"] for n in (1, 2, 3)}


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    options = ["--dry-run", "--batch-size", "8"]  # one epoch a phase: four steps of eight studies each
    run(*options, "--out-dir", tmp_path / "whole")
    asked = iter([False] * 5 + [True] + [False] * 99)  # in the middle of phase 2
    monkeypatch.setattr(StopSignal, "requested", lambda self: next(asked) and setattr(self, "signal", 15) is None)
    with pytest.raises(SystemExit):
        run(*options, "--out-dir", tmp_path / "parts")
    assert not (tmp_path / "parts" / "metrics.json").exists() and (tmp_path / "parts" / "phase2" / "last.pt").exists()
    run("--resume", tmp_path / "parts")
    a, b = states(tmp_path / "whole"), states(tmp_path / "parts")
    for phase in a:
        for name in a[phase]:
            assert torch.equal(a[phase][name], b[phase][name]), (phase, name)
    assert (
        read_json(tmp_path / "whole" / "metrics.json")["best"]["3"]["score"]
        == read_json(tmp_path / "parts" / "metrics.json")["best"]["3"]["score"]
    )


def test_phase_by_phase_and_refusals(trained, refused, tmp_path, capsys):
    folder = tmp_path / "run"
    assert "starts from phase 1's best" in refused(train.main, ["--dry-run", "--phase", 2, "--out-dir", folder])
    run("--dry-run", "--phase", 1, "--out-dir", folder)
    run("--phase", 2, "--resume", folder)
    assert f"phase 2 starts from {folder / 'phase1' / 'best.pt'}" in capsys.readouterr().out
    wrong = ["--dry-run", "--phase", 2, "--start-from", trained / "phase3" / "best.pt", "--out-dir", tmp_path / "b"]
    assert "is of phase 3" in refused(train.main, wrong)
    run("--dry-run", "--phase", 2, "--start-from", trained / "phase1" / "best.pt", "--out-dir", tmp_path / "c")
    bigger = ["--dry-run", "--phase", 2, "--start-from", trained / "phase1" / "best.pt", "--num-layers", 3]
    assert "another size" in refused(train.main, [*bigger, "--out-dir", tmp_path / "d"])
    assert "was written with" in refused(train.main, ["--resume", trained, "--seed", 3])


@pytest.mark.parametrize("name", ["tiny", "small", "full"])
def test_configs_name_real_options(name):
    args = train.parse_args(["--model", name])
    preset = yaml.safe_load((train.ROOT / "chexquery" / "configs" / f"{name}.yaml").read_text())
    assert all(getattr(args, key.replace("-", "_")) == value for key, value in preset.items())
    assert train.parse_args(["--model", name, "--num-layers", "5", "--epochs", "3"]).epochs == [3, 3, 3]


def test_settings_reach_the_model(tmp_path):
    """Flags and --config alike; read back from the modules, not from the arguments."""
    config = tmp_path / "own.yaml"
    config.write_text(
        "num-layers: 3\nnum-pool-queries: 7\nnum-heads: 4\ndropout: 0.25\naux-dropout: 0.35\ngate: false\n"
    )
    args = train.parse_args(
        ["--dry-run", "--config", str(config), "--no-query-attention", "--no-regions", "--prompt", "The"]
    )
    model = train.build_model(train.shape_of(args), ["The heart."])
    assert len(model.layers) == 3 and model.fusion.pool_queries.shape[0] == 7 and model.layers[0].cross.heads == 4
    decoder = {m.p for m in model.text.modules() if isinstance(m, torch.nn.Dropout)}
    assert (
        decoder == {0.25}
        and model.layers[0].drop.p == 0.25
        and model.layers[0].feed[2].p == 0.25
        and model.aux[2].p == 0.35
    )
    assert model.fusion.gate is None and model.layers[0].among is None and model.region_head is None
    assert model.prompt_ids and model.names == list(CONDITIONS)


@pytest.mark.parametrize("arguments, sentence", [
    (["--epochs", "1", "2"], "takes one value or three"),
    (["--phase", "1", "--start-from", "x.pt"], "needs --phase 2 or 3"),
    (["--num-pool-queries", "-1"], "between 0 and 256"),
    (["--dry-run", "--no-use-conditions", "--no-regions"], "--no-use-conditions and --no-regions leave no queries"),
    (["--dry-run", "--condition-model", "tiny:siglip"], "cannot read the names of the conditions"),
    (["--model", "tiny", "--films", "9000000"], "must be at most 1e+06"),  # the validation studies begin at 8 million
    (["--dry-run", "--condition-model", "./no-such/biobert"], "there is no model folder ./no-such/biobert"),
    (["--model", "tiny", "--data", "phantom", "--splits-file", "x.json"], "give one of the two"),
    (["--model", "tiny", "--data", "phantom", "--prevalence", "nan"], "must be between 0 and 1"),
    (["--model", "tiny", "--data", "phantom", "--films", "-3"], "must be at least 1"),
    (["--model", "tiny", "--min-tokens", "96"], "must be below --max-tokens"),
    (["--model", "tiny", "--warmup", "-5"], "must be between 0"),
    (["--model", "tiny", "--data", "mimic"], "there are auto, iu_xray and phantom"),
    (["--model", "tiny", "--data", "phantom", "--labels", "chexbert"], "the phantom has labeller, and truth"),
])  # fmt: skip
def test_bad_input(refused, arguments, sentence):
    assert sentence in refused(train.main, arguments)


def test_the_real_model_that_cannot_be_had(refused, monkeypatch):
    def download(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "get_hf_file_metadata", download)
    sentence = refused(train.main, ["--data", "phantom", "--films", 8])
    assert "google/siglip-base-patch16-384" in sentence and "--model tiny" in sentence


# --- sampler, augmentation, validation


def test_sampler_is_half_abnormal_and_repeatable():
    rows = [{"labels": {"No Finding": None if i < 50 else 1}} for i in range(500)]
    order = train.epoch_order(rows, 5, balanced=True)
    assert order == train.epoch_order(rows, 5, balanced=True) != train.epoch_order(rows, 6, balanced=True)
    assert 0.42 < np.mean([i < 50 for i in order]) < 0.58 and len(order) == 500
    assert sorted(train.epoch_order(rows, 5, balanced=False)) == list(range(500))


def test_augmentation_never_mirrors():
    images = torch.zeros(64, 2, 32, 32, dtype=torch.uint8)
    images[..., :16] = 200
    changed = train.changed(images)
    assert changed.shape == images.shape and 0 <= changed.min() and changed.max() <= 255
    assert (changed[..., :14].mean((-1, -2)) > changed[..., 18:].mean((-1, -2)) + 100).all()
    assert (changed != images).any()


def small_split():
    model = untrained()[0]
    args = SimpleNamespace(
        views=["frontal"], cache_gib=1.0, uncertain="positive", seed=0, eval_batch=5, label_smoothing=[0.0] * 3,
        aux_weight=[0.7, 0.3, 0.0], region_weight=0.2, phase1_text="findings",
    )  # fmt: skip
    studies = cases.phantom_rows(8, conditions=list(TOP_FIVE), prevalence=0.4, severe=True)
    return model, args, train.Split(studies.split("val"), model, args, studies.notes["drawn"]), studies


def test_validation_counts_labels_and_alarms(monkeypatch):
    model, args, split, _ = small_split()
    told = [row["reference"] for row in split.rows]

    def say(texts):
        given = iter(texts)
        monkeypatch.setattr(model, "write", lambda tokens, **k: ([next(given) for _ in tokens], None))
        return train.validate(model, split, args, 1, torch.device("cpu"), torch.float32)[0]

    perfect, constant = say(told), say(["The heart is normal."] * 8)
    assert perfect["f1_micro_13"] == perfect["f1_macro"] == 1 and perfect["score"] == pytest.approx(1.1)
    assert not perfect["collapsed"] and constant["collapsed"] and constant["share_most_frequent"] == 1
    assert constant["f1_micro_13"] == 0 and len(perfect["thresholds"]) == 14
    shown = train.positive_matrix([row["labels"] for row in split.rows]).any(0)
    assert [cut == 1 for cut in perfect["thresholds"]] == (~shown).tolist()  # what no study has is never called
    split.wanted[1] = ["No abnormality."] * 5 + told[5:]  # where most studies are told alike, that is no collapse
    assert not say(split.wanted[1])["collapsed"] and say(["No abnormality."] * 8)["collapsed"]


def test_phase_1_may_write_the_findings_alone():
    model, args, split, _ = small_split()
    for phase, wanted in ((1, [cases.abnormal_sentences(r["report"]) for r in split.rows]),
                          (2, [r["report"] for r in split.rows])):  # fmt: skip
        ids = split.texts([1, 4], phase, torch.device("cpu"))
        assert (ids[:, -1] != -100).any() and wanted[1] != wanted[4]
        told = model.tokenizer.batch_decode(ids.clamp(min=0), skip_special_tokens=True)  # cut at max_tokens
        assert all(len(t) > 10 and w.startswith(t) for t, w in zip(told, (wanted[1], wanted[4]), strict=True))


def test_losses_weigh_and_mask():
    model, args, split, _ = small_split()
    cpu = torch.device("cpu"), torch.float32
    total, parts = train.losses(model, split, [0, 1, 2], args, 1, *cpu)
    assert total.item() == pytest.approx(parts["report"] + 0.7 * (parts["labels"] + 0.2 * parts["regions"]), rel=1e-5)
    logits = model(**split.inputs([0, 1, 2], cpu[0])).logits
    weights = torch.tensor([train.LABEL_WEIGHTS.get(name, 1.0) for name in CONDITIONS])
    target = split.labels[:3]
    each = -weights * (target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log())
    assert parts["labels"] == pytest.approx(each.mean().item(), rel=1e-4)
    split.label_mask[:] = 0
    assert train.losses(model, split, [0], args, 3, *cpu)[1]["labels"] == 0
    assert train.losses(model, split, [0], args, 3, *cpu)[0].item() == pytest.approx(
        train.losses(model, split, [0], args, 3, *cpu)[1]["report"]
    )


def test_heads_follow_the_queries_where_labels_have_no_weight():
    """They learn, and the rest learns what it learns without them."""
    model, args, split, _ = small_split()
    cpu, found = (torch.device("cpu"), torch.float32), {}
    assert {"query", "head", "text"} == set(model.freeze(3))
    for with_labels in (True, False):
        split.label_mask[:] = split.region_mask[:] = float(with_labels)
        model.zero_grad(set_to_none=True)
        total, parts = train.losses(model, split, [0, 1, 2], args, 3, *cpu)
        total.backward()
        assert total.item() == pytest.approx(parts["report"]) and (parts["labels"] > 0) == with_labels
        found[with_labels] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    heads = [name for name in found[True] if name.startswith(("aux.", "region_head."))]
    assert len(heads) == 8 and all(found[True][name].any() and not found[False][name].any() for name in heads)
    assert all(torch.equal(found[True][name], grad) for name, grad in found[False].items() if name not in heads)


def test_heads_do_not_count_in_the_clipped_norm(tmp_path, monkeypatch):
    clipped, guarded = [], train.GuardedStep
    monkeypatch.setattr(train, "GuardedStep", lambda a, b, ps, clip: guarded(a, b, clipped.append(ps) or ps, clip))
    run("--dry-run", "--out-dir", tmp_path / "run")
    now = states(tmp_path / "run")
    heads = {name for name in now[3] if name.startswith(("aux.", "region_head."))}
    assert len(heads) == 8 and [len(ps) for ps in map(list, clipped)][1:] == [len(now[2]), len(now[3]) - 8]
    before = load_checkpoint(tmp_path / "run" / "phase2" / "best.pt")["weights"]
    assert not any(torch.equal(now[3][name], before[name]) for name in heads)


def test_a_batch_weighs_the_same_however_it_is_cut():
    """The passes of a batch add up to the loss of the batch, and the validation loss does not know its batch size."""
    model, args, split, _ = small_split()
    cpu, batch = (torch.device("cpu"), torch.float32), [0, 1, 2, 3, 4]
    split.label_mask[0], split.ids[1][0, 4:] = 0, -100  # one text is shorter, and has no labels
    whole, parts = train.losses(model, split, batch, args, 1, *cpu)
    cut = [train.losses(model, split, some, args, 1, *cpu, of=batch) for some in ([0], [1, 2, 3], [4])]
    assert sum(loss.item() for loss, _ in cut) == pytest.approx(whole.item(), rel=1e-5)
    assert sum(found["labels"] for _, found in cut) == pytest.approx(parts["labels"], rel=1e-5)
    found = [train.validate(model, split, args, 1, *cpu)[0]["val_loss"] for args.eval_batch in (1, 3, 8)]
    assert found[0] == pytest.approx(found[1], rel=1e-5) == pytest.approx(found[2], rel=1e-5)


def test_a_validation_that_is_not_finite_ends_the_run():
    model, args, split, _ = small_split()
    with torch.no_grad():
        model.fusion.project.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="validation loss is not finite: lower --lr"):
        train.validate(model, split, args, 1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("width, heads", [(192, 6), (256, 8), (100, 2), (33, 1), (7, 1)])
def test_any_width_has_heads(width, heads):
    assert heads_of(width) == heads


def test_kept_features_are_those_of_the_tower():
    model, args, split, _ = small_split()
    plain = model(**split.inputs([0, 3], torch.device("cpu")))
    assert split.cache(model, torch.device("cpu"), 3, 1.0) > 0
    kept = model(**split.inputs([0, 3], torch.device("cpu")))
    torch.testing.assert_close(kept.tokens, plain.tokens, atol=0.05, rtol=0.05)  # kept in half the bytes
    assert split.cache(model, torch.device("cpu"), 3, 1e-9) is None


def test_shuffled_regions_are_a_control():
    model, args, split, studies = small_split()
    other = train.Split(split.rows, model, args, studies.notes["drawn"], shuffle_regions=True)
    assert torch.equal(other.labels, split.labels) and not torch.equal(other.regions, split.regions)
    assert other.region_mask.sum() == split.region_mask.sum()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    options = ["--dry-run", "--no-augment", "--phase", "1", "--films", "24", "--batch-size", "8", "--aux-dropout", "0"]
    run(*options, "--batch-size", "16", "--out-dir", tmp_path / "one")
    script = Path(train.__file__)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671", str(script),
         *options, "--accumulate", "2", "--out-dir", str(tmp_path / "two")],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    a, b = (load_checkpoint(tmp_path / name / "phase1" / "last.pt")["parts"]["weights"] for name in ("one", "two"))
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 2e-3
