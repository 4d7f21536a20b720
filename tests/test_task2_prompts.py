"""Task 2: prompts, what is read from answers, thoughts, squares and boxes."""

import numpy as np
import pytest

from shared.models.loading import load_vlm
from task2_report.cases import as_report, sections_of
from task2_report.prompts import CONTEXTS, STRATEGIES, YES_NO, ask, cnn_sentence, context_probability, pixel_box
from task2_report.prompts import read_boxes, read_class, read_confidence, read_response, yes_no_question
from task2_report.writer import Writer, to_square_with_zeros, without_thoughts


def test_strategies_of_the_design_and_more():
    assert {"zero_shot", "clinical_role", "context_aware"} <= set(STRATEGIES) and len(STRATEGIES) >= 9
    for name in STRATEGIES:
        context = cnn_sentence(0.93)
        assert "93%" in ask(name, context, "Fever.") and "Fever." in ask(name, context, "Fever.")
        question = yes_no_question(name, context)
        assert question.count("yes or no") == 1 and "93%" in question and "CLASSIFICATION: normal, pneu" not in question
    assert yes_no_question("yes_no") == YES_NO


def test_context_is_what_it_says():
    assert [context_probability(c, 0.9) for c in CONTEXTS] == [None, 0.9, pytest.approx(0.1), 0.5]
    assert context_probability("cnn", None) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("FINDINGS: a b\nIMPRESSION: c", {"findings": "a b", "impression": "c"}),
        ("**Findings:**\nClear.\n\n**Impression:** Normal.", {"findings": "Clear.", "impression": "Normal."}),
        ("FINDINGS: a. IMPRESSION: b. CONFIDENCE: 8", {"findings": "a.", "impression": "b.", "confidence": "8"}),
        ("## Impression\nPneumonia", {"impression": "Pneumonia"}),
        ("Clear lungs.", {"findings": "Clear lungs."}),
        ("FINDINGS: first\nFINDINGS: second", {"findings": "first"}),
        ("The findings are normal.", {"findings": "The findings are normal."}),
        ("", {"findings": ""}),
    ],
)  # fmt: skip
def test_sections(text, expected):
    assert sections_of(text) == expected


def test_a_report_is_read_as_it_was_written():
    assert sections_of(as_report("Heart  large.\nLungs clear.", "Cardiomegaly.")) == {
        "findings": "Heart large. Lungs clear.",
        "impression": "Cardiomegaly.",
    }
    assert as_report("Clear.", "") == "FINDINGS: Clear."


@pytest.mark.parametrize(
    "text, expected",
    [
        ("pneumonia", "pneumonia"), ("**Normal**", "normal"), ("no pneumonia", "normal"), ("uncertain", "uncertain"),
        ("no evidence of pneumonia", "normal"), ("normal or pneumonia", None), ("normal, pneumonia or uncertain", None),
        ("normal pneumonia", None), ("fine", None), ("", None), ("positive", "pneumonia"),
        ("free of pneumonia", "normal"), ("Pneumonia: no", "normal"), ("pneumonia is ruled out", "normal"),
        ("pneumonia unlikely", "normal"), ("not normal", "pneumonia"), ("likely pneumonia", "pneumonia"),
        ("bronchopneumonia", "pneumonia"), ("pneumonia cannot be excluded", "uncertain"), ("possible pneumonia",
        "uncertain"), ("normal, pneumonia not likely", "normal"), ("neither normal nor pneumonia", None),
    ],
)  # fmt: skip
def test_a_class_is_read_or_is_none(text, expected):
    assert read_class(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [("85 %", 0.85), ("85", 0.85), ("0.85", 0.85), ("85/100", 0.85), ("100", 1.0), ("250", None), ("1 %", 0.01)],
)  # fmt: skip
def test_confidence(text, expected):
    assert read_confidence(text) == expected


def test_a_response_is_read_whole():
    found = read_response(
        "FINDINGS: Haze. IMPRESSION: x. \n**CLASSIFICATION:** Pneumonia.\nConfidence: 70%", "structured"
    )
    assert (found.classification, found.confidence, found.complies) == ("pneumonia", 0.7, True)
    assert read_response("Clear lungs.", "structured").classification is None
    assert not read_response("CLASSIFICATION: normal", "structured").complies  # findings and impression are missing
    assert read_response("CLASSIFICATION: normal", "zero_shot").complies
    assert [read_response(t, "yes_no").classification for t in ("Yes", "no.", "**Yes**")] == [
        "pneumonia",
        "normal",
        "pneumonia",
    ]
    long = "There is no pneumonia to be seen here and nothing else either."
    assert read_response(long, "zero_shot").classification is None  # free text is no classification
    echoed = "CLASSIFICATION: normal, pneumonia or uncertain.\nHaze.\nCLASSIFICATION: pneumonia"
    assert read_response(echoed, "zero_shot").classification == "pneumonia"
    both = "CLASSIFICATION: normal.\nCLASSIFICATION: pneumonia."
    assert read_response(both, "zero_shot").classification is None


def test_thoughts_are_cut_and_counted():
    assert without_thoughts([1, 2, 3], 94, 95) == ([1, 2, 3], 0, False)
    assert without_thoughts([94, 7, 8, 95, 1, 2], 94, 95) == ([1, 2], 4, False)
    assert without_thoughts([1, 94, 7, 95, 2, 94, 8, 95, 3], 94, 95) == ([1, 2, 3], 6, False)
    assert without_thoughts([1, 94, 7, 8], 94, 95) == ([1], 3, True)  # never ends: nothing of it is an answer
    assert without_thoughts([94, 5], None, None) == ([94, 5], 0, False)


def test_medgemma15_gets_squares_and_other_models_do_not():
    film = np.full((2, 5), 9, np.uint8)
    square = to_square_with_zeros(film)
    assert square.shape == (5, 5) and square[1:3].min() == 9 and square[[0, 3, 4]].max() == 0
    assert to_square_with_zeros(np.full((4, 2, 3), 9, np.uint8)).shape == (4, 4, 3)
    vlm = load_vlm("tiny:gemma3")
    plain = Writer(vlm, 4, 4)
    vlm.name = "google/medgemma-1.5-4b-it"
    newer = Writer(vlm, 4, 4)
    assert plain.marks == newer.marks == [None, None]  # the tiny vocabulary has no thoughts
    tall = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (112, 1))
    kept, squared = (newer.prompts(["a"], [some])[0].features[0] for some in (to_square_with_zeros(tall), tall))
    assert kept.equal(squared)


def test_boxes_in_medgemmas_order():
    text = '[{"box_2d": [100, 200, 500, 600], "label": "haze"}, {"box_2d": [1, 2]}]'
    assert read_boxes(text) == [{"box": [200, 100, 600, 500], "label": "haze"}]
    assert pixel_box([200, 100, 600, 500], 100, 200, squared=False) == [40, 10, 120, 50]
    # padded to 200x200: 50 black rows above the film
    assert pixel_box([0, 250, 1000, 750], 100, 200, squared=True) == [0, 0, 200, 100]
    assert pixel_box([0, 0, 1000, 1000], 100, 200, squared=True) == [0, 0, 200, 100]
