"""text.py: what a value of a JSON or CSV file says, and what says nothing."""

import pytest

from shared.data.text import base_name, text_of
from shared.runtime import InputError

BLANK = [None, float("nan"), "", "  ", "\n", "nan", "NaN", "None", "null", "NULL", "N/A", "n.a.", "NA", "-", "--", "."]
BLANK += ["XXXX", "xxxx.", "[XXXX]", "XXXX XXXX", "None.", "?", [], [None, ""], ["nan"]]


@pytest.mark.parametrize("value", BLANK, ids=repr)
def test_what_says_nothing(value):
    assert text_of(value) == ""


@pytest.mark.parametrize(
    "value, text",
    [
        (True, "yes"),
        (False, "no"),
        (["left", "right"], "left, right"),
        ([True, None, 2], "yes, 2"),
        (7, "7"),
        (7.0, "7"),
        (0.5, "0.5"),
        (0, "0"),
        (" Left lung \n", "Left lung"),
        ("no", "no"),
        ("Nan Goldin", "Nan Goldin"),
        ("XXXX-year-old", "XXXX-year-old"),
        ("XX", "XX"),
        ("None of these", "None of these"),
        ("肺", "肺"),
        ("x" * 50_000 + "y", "x" * 50_000 + "y"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_says_something(value, text):
    assert text_of(value) == text


def test_none_as_an_answer():
    assert text_of("None", none_is_missing=False) == "None" and text_of(None, none_is_missing=False) == ""
    assert text_of("nan", none_is_missing=False) == text_of("N/A", none_is_missing=False) == ""


def test_an_object_is_no_text():
    with pytest.raises(InputError, match="a text was expected"):
        text_of({"answer": "yes"})


def test_base_name():
    for name in ("1.png", "films/1.png", "C:\\films\\1.png", "..\\1.png", " a/b\\1.png "):
        assert base_name(name) == "1.png"
