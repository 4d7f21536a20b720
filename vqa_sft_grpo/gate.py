"""
The gate of the reward: is a text one response in the form that was asked for, and nothing else?

    why = gate_problem(text, parse_response(text, "json"), "json", row)   # "" where it passes

It passes as one JSON object of the four known fields, each once, or <think>..</think><answer>..</answer>, at most in a
code fence; with an answer in plain words, and without image or chat tokens, characters that cannot be seen, letters of
another script or dozens of boxes. "reasoning" may be a list of texts, its steps.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
import re
import unicodedata

from vqa_sft_grpo.looking import gold_of
from vqa_sft_grpo.prompting import FIELDS, is_box

UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")  # categories of characters: control, zero-width, private ones
FILLERS = set("\u00ad\u034f\u115f\u1160\u2800\u3164\uffa0") | {chr(c) for c in range(0xFE00, 0xFE10)}  # not seen either
MARKS_OF_TEXT = set("\u2018\u2019\u201c\u201d\u2013\u2014\u00d7\u00b1\u2264\u2265\u00b0\u00b5\u03bc")
SPECIAL = re.compile(r"<\|[a-z_]+\|>|<(?:image|video|s|/s|pad)>", re.IGNORECASE)
MOST_BOXES = 12  # in a response, or twice those of the gold region
ODD = set('{}[]<>|\\`"~*_')  # in an answer: another object, code, marks


def gate_problem(text, found, style, row=None):
    """-> "" for a text that passes the gate, else why not. row: None: its boxes and odd letters are not looked at."""
    if SPECIAL.search(text):
        return "image or chat tokens in the text"
    fields = (written(found.data or {}, name) or "" for name in FIELDS)
    characters = set(text).union(*fields) - set("\n\r\t")
    if any(unicodedata.category(c) in UNSEEN or c in FILLERS for c in characters):
        return "characters that cannot be seen"
    if found.problem:
        return found.problem
    if found.answer is None:
        return "no answer"
    if found.level == 2:
        return "other text around the object, or an answer in another form"
    if not found.valid:
        return f"not strict (repair level {found.level})"
    if style == "json":
        data = found.data
        if set(data) - set(FIELDS):
            return f"unknown field '{min(set(data) - set(FIELDS))[:40]}'"
        if any(written(data, name) is None for name in ("answer", "caption", "reasoning") if name in data):
            return "a field that should be text is none"
        if "boxes" in data and not (isinstance(data["boxes"], list) and all(map(is_box, data["boxes"]))):
            return "boxes are not a list of [x0, y0, x1, y1]"
        if keys_twice(text):
            return "a field twice"
    if row is None:
        return ""
    if len(found.boxes) > max(MOST_BOXES, 2 * len(row.get("region") or ())):
        return f"{len(found.boxes)} boxes"
    known = gold_of(row) + row["question"]
    if odd := sorted(c for c in set(found.answer) - set(known) if c in ODD or ord(c) > 127 and c not in MARKS_OF_TEXT):
        return f"the answer has '{odd[0]}' in it"
    return ""


def written(data, name):
    """The text of a field, a reasoning in steps (a list of texts) as lines; None where it is something else."""
    value = data.get(name)
    if name == "reasoning" and isinstance(value, list) and all(isinstance(step, str) for step in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def keys_twice(text):
    """Has a strict object a key more than once, in any letter case?"""
    names = []
    json.loads(text[text.index("{") : text.rindex("}") + 1], object_pairs_hook=names.append)
    return any(len({key.lower() for key, _ in pairs}) < len(pairs) for pairs in names)
