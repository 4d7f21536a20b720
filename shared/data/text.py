"""What a value of a JSON or CSV file says: its text, or that it says nothing."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
import re

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
