"""text.py: what a value of a JSON or CSV file says, and what says nothing."""

import csv

import pytest

from shared.data.text import base_name, one_spelling, read_table, text_of
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


@pytest.mark.parametrize("encoding, delimiter", [("utf-8", ";"), ("utf-8-sig", "\t"), ("utf-16", ",")])
def test_tables_as_spreadsheets_write_them(tmp_path, encoding, delimiter):
    lines = [["Id ", "Text"], ["1", "é, or; more\nlines"], ["", ""], [" 2 ", "b"]]
    with open(tmp_path / "t.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    found = read_table(tmp_path / "t.csv", ("id",))
    assert found == [(3, {"id": "1", "Text": "é, or; more\nlines"}), (5, {"id": "2", "Text": "b"})]


@pytest.mark.parametrize("content, words", [
    (b"id,text\n1,a\n", "lacks the column name; it has id, text"),
    (b"id,name,id\n1,a,2\n", "two columns of one name, id"),
    (b"id,name\n1,\xe9\n", "not in UTF-8"),
    (b"", "it has nothing"),
    (b"id,name\n1,a,b.png\n", "line 2 has too many fields"),
    (b'id,name\n1,"a\n2,b\n', "cannot be read as a CSV file"),
])  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path, content, words):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "t.csv", ("id", "name"))


def test_one_spelling():
    assert one_spelling(["Ill", "well", "ILL", "1.0", "1", "1.5"]) == ["Ill", "well", "Ill", "1.0", "1.0", "1.5"]
    assert one_spelling(["ILL"], ["ill", "well"]) == ["ill"]
