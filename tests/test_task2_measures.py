"""Task 2: what answers and reports are worth, by cases worked out by hand."""

import numpy as np
import pytest
import torch

from shared.phantom import phantom_settings, phantom_study
from shared.runtime import InputError
from task2_report import measures
from task2_report.cases import SEVERE, Case
from task2_report.label_cnn import LabelCNN, best_thresholds
from task2_report.label_stage import learn_labels, targets_of
from task2_report.pages import image_sentence, warnings_of
from task2_report.report_task import MODEL, SHUFFLED, other_films
from task2_report.scores import errors_of, f1_of, film_sides, findings_of, measure_reports, sides_of, stated, truth_of


@pytest.mark.parametrize(
    "text, expected",
    [
        ("There is a large left pleural effusion.", {"Pleural Effusion": {"left"}}),
        ("No left pleural effusion.", {}),
        ("Bilateral pleural effusions.", {"Pleural Effusion": {"left", "right"}}),
        ("Left effusion and right pneumothorax.", {"Pleural Effusion": {"left"}, "Pneumothorax": {"right"}}),
        ("Consolidation in the lingula.", {"Consolidation": {"left"}}),
        ("A large pneumothorax is seen on the right.", {"Pneumothorax": {"right"}}),
        ("Severe cardiomegaly, left more than right.", {}),  # has no side
        ("Left base opacity. Pleural effusion.", {"Lung Opacity": {"left"}}),
        ("Right effusion. Left effusion.", {"Pleural Effusion": {"left", "right"}}),
        ("Effusion of 2.5 cm on the left.", {"Pleural Effusion": {"left"}}),
    ],
)
def test_sides_are_those_of_the_finding(text, expected):
    assert sides_of(text) == {k: frozenset(v) for k, v in expected.items()}


def test_the_phantoms_own_reports_are_right():
    """Truth against the reference texts: labels, sides and errors agree for every report that doubts nothing."""
    settings = phantom_settings(**SEVERE)
    compared = 0
    for i in range(120):
        study = phantom_study(3, i, 28, settings)
        case = Case("a", "b", "test", None, study.report.findings, study.report.impression, study=study)
        truth, sides = truth_of(case, tuple(SEVERE["conditions"]))
        found = errors_of(case.report, truth, sides)
        assert (found["missed"], found["invented"], found["wrong side"]) == (0, 0, 0), case.report
        assert film_sides(study) == sides
        compared += found["sides compared"]
    assert compared > 30


def test_errors_and_f1():
    names = ("Pleural Effusion", "Edema", "Pneumothorax")
    truth, sides = dict(zip(names, (True, True, False), strict=True)), {"Pleural Effusion": frozenset({"left"})}
    found = errors_of("Right pleural effusion. Left pneumothorax.", truth, sides)
    assert found == {"missed": 1, "invented": 1, "wrong side": 1, "sides compared": 1}
    says = stated("Right pleural effusion. Left pneumothorax.", names)
    assert f1_of([(says, truth)]) == pytest.approx(2 * 1 / (2 + 2))
    assert f1_of([(dict.fromkeys(names, False),) * 2]) is None


def test_reports_are_measured_beside_their_references():
    cases = [
        Case(str(i), f"p{i}", "test", None, f, "") for i, f in enumerate(["Left effusion.", "No effusion.", "Edema."])
    ]
    own = measure_reports([case.report for case in cases], cases)
    assert own["conditions"]["value"] == own["clinical"]["f1_micro_13"] == pytest.approx(own["words"]["bleu_1"]) == 1
    assert own["sides"] == {"right": 1.0, "compared": 1} and own["error_histogram"] == {"0": 3}
    wrong = measure_reports(["FINDINGS: Right effusion.", "FINDINGS: No effusion.", ""], cases)
    assert wrong["sides"] == {"right": 0.0, "compared": 1} and wrong["empty"] == 1
    assert wrong["conditions"]["value"] == pytest.approx(2 / 3) and wrong["error_histogram"] == {"0": 1, "1": 2}
    assert findings_of("IMPRESSION: x") == "" and findings_of("just words") == "just words"


def test_claims_by_what_pixels_can_bear():
    text = "Haze in the right lung with an air bronchogram. No pneumothorax. The heart is enlarged. No rib fracture."
    found = {(name, polarity, tier) for name, polarity, tier, _ in measures.claims_of(text)}
    assert ("Pneumothorax", "negated", "unresolvable") in found and ("Cardiomegaly", "affirmed", "borderline") in found
    assert ("Fracture", "negated", "unresolvable") in found and ("air bronchogram", "affirmed", "unresolvable") in found
    assert not any(name == "bones" for name, *_ in found)  # "rib" is part of the fracture
    assert measures.unsupported(text) == {"affirmed": 1, "negated": 2}
    for name, _, _, (start, end) in measures.claims_of("The costophrenic angles are not seen."):
        assert name == "costophrenic angle" and "The costophrenic angles are"[start:end] == "costophrenic angles"


def test_calls_count_what_was_not_called():
    found = measures.score_calls([1, 1, 0, 0], ["pneumonia", None, "uncertain", "normal"])
    assert found["shares"] == {"normal": 0.25, "pneumonia": 0.25, "uncertain": 0.25, "unread": 0.25}
    assert found["sensitivity"]["value"] == found["specificity"]["value"] == found["accuracy"]["value"] == 0.5


def test_agreement_with_the_cnn():
    labels, cnn = [1, 1, 0, 0], ["pneumonia", "normal", "normal", "pneumonia"]  # wrong on the second and fourth
    found = measures.agreement(labels, ["pneumonia", "pneumonia", "normal", "pneumonia"], cnn)
    assert found["right_where_cnn_wrong"]["value"] == 0.5 and found["right"]["value"] == 0.75
    assert (found["mcnemar"]["only_a"], found["mcnemar"]["only_b"]) == (1, 0)
    assert found["kappa"] == pytest.approx(0.5)
    assert measures.agreement([1, 0], ["normal"] * 2, ["normal"] * 2)["kappa"] is None


def test_following_a_wrong_opinion():
    labels, told = [1, 1, 0, 0], ["normal", "pneumonia", "pneumonia", "pneumonia"]  # wrong: 0, 2, 3
    assert measures.follow_rate(told, ["normal", "pneumonia", "normal", None], labels)["value"] == pytest.approx(1 / 3)
    assert measures.follow_rate(["pneumonia"], ["pneumonia"], [1])["value"] is None


def test_image_dependence_and_flips():
    assert measures.image_dependence(["a b c"], ["a b c"]) == 0 and measures.image_dependence(["a b"], ["c d"]) == 1
    assert measures.similarity("", "") == 1
    margins = np.array([[1, 1, -1], [2, -1, -1], [-1, -1, 1]])  # the third question is the other way round
    assert measures.flips(margins, [False, False, True]) == pytest.approx(1 / 3)


def test_confidence_beside_margin():
    found = measures.confidence_against_margin(
        ["pneumonia", "normal", "pneumonia", None], [0.9, 0.6, 0.5, 0.9], [3.0, -1.0, 0.5, 1.0], [1, 0, 0, 1]
    )
    assert found["n"] == 3 and found["rank_correlation"] == pytest.approx(1)
    assert found["auc_of_right"] == {"stated": 1.0, "margin": 1.0}
    assert measures.confidence_against_margin([None], [None], [1.0], [1])["rank_correlation"] is None


def test_margins_and_the_pixel_baseline():
    found = measures.score_margins([0, 0, 1, 1], [-1.0, 0.5, 0.2, 2.0])
    assert found["auc"]["value"] == 0.75 and found["accuracy"]["value"] == 0.75 and found["share_yes"] == 0.75
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    images = (rng.integers(0, 60, (80, 1, 6, 6)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    p = measures.pixel_baseline(images[:40], labels[:40], images[40:])
    assert measures.score_margins(labels[40:], p - 0.5)["auc"]["value"] == 1


def test_another_patients_film():
    cases = [Case(str(i), patient, "test", i, "", "") for i, patient in enumerate("aabb")]
    assert [str(film) for film in other_films(cases)] == ["2", "2", "0", "0"]


def test_the_label_cnn_learns_what_is_there_to_see():
    rng = np.random.default_rng(0)
    labels = rng.random((96, 2)) < 0.5
    films = rng.integers(0, 60, (96, 64, 64)).astype(np.uint8)
    films[labels[:, 0], 10:30, 10:30] += 150
    films[labels[:, 1], 40:60, 30:50] += 150
    images = torch.from_numpy(films)[:, None]
    net = LabelCNN(images, labels, steps=15, batch_size=16)
    p, features = net.run(images)
    cuts = best_thresholds(labels, p)
    assert ((p >= cuts) == labels).mean() > 0.9 and features.shape == (96, 512)
    assert best_thresholds(np.zeros((3, 1), bool), np.ones((3, 1)))[0] == 0.5


def test_labels_of_the_label_stage():
    row = targets_of(["Large left pleural effusion."])[0]
    assert row.sum() == 2 and targets_of(["Left and right effusions."])[0].sum() == 3
    assert targets_of(["No effusion."])[0].sum() == 0
    with pytest.raises(InputError, match="no training report states a condition"):
        learn_labels(None, None, [0], ["Normal chest."], steps=1)


def test_few_patients_are_not_taken_for_nothing_stated():
    few = {"conditions": {"value": 0.5, "low": None, "high": None}}
    said = image_sentence({MODEL: few, SHUFFLED: {"conditions": {"value": 0.2, "low": None, "high": None}}})
    assert "few patients" in said and "0.500" in said and "nothing was stated" not in said
    found = measures.score_margins([0, 0, 1, 1], [-2.0, -1.0, 1.0, 2.0])["auc"]
    assert found == {"value": 1.0, "low": None, "high": None}  # a perfect order is no certainty


def test_a_hand_in_report_says_what_makes_it_less_than_a_result():
    numbers = {"dataset": {"phantom": False, "limit": 5}, "untrained": False, "n": 5, "split": "val"}
    told = " ".join(warnings_of(numbers | {"trained_on": {"phantom": True}}))
    assert "--limit 5" in told and "validation films" in told and "drawn by this project" in told
    whole = {"dataset": {"phantom": False}, "n": 600, "split": "test", "trained_on": None}
    assert warnings_of(numbers | whole) == []
