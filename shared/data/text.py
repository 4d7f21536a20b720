"""Tables of users (CSV), and what a value of a CSV or JSON file says: its text, or that it says nothing."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import csv
import io
import math
import re
from pathlib import Path

from shared.runtime import InputError

NOTHING = {"nan", "none", "null", "nil", "na"}


def text_of(value, none_is_missing=True):
    """
    A value as text; "" for one that says nothing: null, NaN, blanks, and the words "nan", "None", "null", "N/A", "-",
    ".", "XXXX", in any case and with marks around them. true and false are yes and no, 7.0 is 7, the items of a list
    are joined by commas. none_is_missing=False keeps the word "None" (not null): it is the gold answer of 45 questions
    of SLAKE and VQA-RAD. InputError for an object, which is no text.
    """
    if isinstance(value, dict):
        raise InputError(f"a text was expected, not {value}")
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, (text_of(item, none_is_missing) for item in value)))
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value).strip()
    words = re.sub(r"[\W_]+", " ", text.lower()).replace("n a", "na").split()
    if words == ["none"] and not none_is_missing:
        return text
    return "" if all(word in NOTHING or re.fullmatch("x{3,}", word) for word in words) else text


def base_name(path):
    r"""The last part of a path of any system: "C:\films\1.png" -> "1.png"."""
    return re.split(r"[\\/]", str(path).strip())[-1]


def read_table(path, columns, what="", optional=()):
    """
    A CSV file as spreadsheets write them -> [(number of the line, {column: text})]: with commas, semicolons or tabs, in
    UTF-8 (with or without its mark) or UTF-16; columns, and optional ones, are found in any case, blanks around values
    are taken off, empty lines left out. InputError: no such file, no text, a column missing or there twice, a line with
    more fields than columns, a quotation mark that is never closed.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="", strict=True)
        called = {name.lower(): name for name in (*columns, *optional)}
        names = [called.get(name.strip().lower(), name.strip()) for name in reader.fieldnames or ()]
        reader.fieldnames = names
        lines = [(reader.line_num, line.pop(None, ()), {k: v.strip() for k, v in line.items() if k}) for line in reader]
    except (OSError, UnicodeError, csv.Error) as error:
        why = "it is not in UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        raise InputError(f"{what}{path} cannot be read as a CSV file ({why})") from error
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise InputError(f"{what}{path} has two columns of one name, {twice[0]}: leave one of them out")
    missing = [name for name in columns if name not in names]
    if missing:
        lacking = f"column{'s' * (len(missing) > 1)} {', '.join(missing)}"
        raise InputError(f"{what}{path} lacks the {lacking}; it has {', '.join(filter(None, names)) or 'nothing'}")
    for number in (number for number, extra, _ in lines if any(extra)):
        raise InputError(
            f'{what}{path}: line {number} has too many fields; put " around one that holds a {delimiter!r}'
        )
    return [(number, line) for number, _, line in lines if any(line.values())]


def one_spelling(labels, known=()):
    """Labels in the spelling that comes first, known ones before: Normal and NORMAL are one class, so are 1 and 1.0."""
    keys = [re.sub(r"^(\d+)\.0*$", r"\1", label.lower()) for label in (*known, *labels)]
    first = dict(zip(reversed(keys), reversed((*known, *labels)), strict=True))
    return [first[key] for key in keys[len(known) :]]
