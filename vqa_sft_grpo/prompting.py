"""
What the model is asked, what it is taught to answer, and how its text is read.

    build_prompt(question, "json")            -> text of the user's turn (the image goes in front of it)
    build_target(row, "json")                 -> text that training teaches for a prepared row
    parse_response(text, "json")              -> Response: .data, .answer, .boxes, .level; never raises

Two styles. "json": one JSON object with caption, reasoning, boxes and answer, of which only the answer must be there.
"think": <think>...</think><answer>...</answer>, the form of MedVLM-R1 and R1-V; it has no boxes.

Boxes are pixels of the stored image in every file of ours and thousandths of width and height (0 to 1000, as Qwen2-VL
writes them) in everything that a model reads or writes; boxes_to_model and boxes_from_model stand between the two.

parse_response takes the new tokens only: with the prompt in front, the schema in the prompt would be read as an answer.
"""

import json
import math
import re
from dataclasses import dataclass, field

from shared.runtime import InputError

STYLES = ("think", "json")
FIELDS = ("caption", "reasoning", "boxes", "answer")  # of the JSON object, in this order

# Response.level, lowest first: what had to be mended before the text could be read. GRPO's reward takes 0 and 1 only.
REPAIR_LEVELS = {
    0: "strict: one JSON object, or <think>..</think><answer>..</answer>, and nothing else",
    1: "fenced: that in a Markdown code fence",
    2: "embedded: other text around it; of several objects the last one with an answer counts",
    3: "commas and line breaks: trailing commas, raw line breaks in strings",
    4: "Python or loose quotes: single or curly quotes, None, True, False, names without quotes",
    5: "truncated: the end is missing and was added",
    6: "plain text: no object; what follows 'answer:', or a text of at most 200 characters as it stands",
    7: "nothing: no answer can be read, or two that contradict each other",
}
VALID_LEVEL = 1  # up to here a response counts as valid JSON (Response.valid)
PLAIN_LENGTH = 200  # characters; a longer text without any mark is not an answer
MAX_DEPTH = 16  # nested brackets; ours has 3
MAX_OBJECTS = 50  # of the objects in one text, so many from the end are looked at

UNITS = {"model": "from 0 to 1000", "pixels": "in pixels"}
INSTRUCTIONS = {
    "json": (
        'Answer the question with one JSON object: "caption": what the image shows, "reasoning": what settles it, '
        '"boxes": [[x0, y0, x1, y1], ...] where to look, {units}, "answer": a few words.'
    ),
    "think": (
        "Answer the question. First write what you see between <think> and </think>, "
        "then the answer in a few words between <answer> and </answer>."
    ),
}


def check_style(style):
    if style not in STYLES:
        raise InputError(f"there is no prompt style '{style}'; there are {' and '.join(STYLES)}")
    return style


def instruction(style="json", units="model"):
    """The fixed part of the prompt. units: "model" (0 to 1000) for everything a model reads, "pixels" in our files."""
    return INSTRUCTIONS[check_style(style)].replace("{units}", UNITS[units])


def build_prompt(question, style="json"):
    """-> the text of the user's turn, the same for training, evaluation and use."""
    return f"{instruction(style)}\nQuestion: {str(question).strip()}"


def build_target(row, style="json"):
    """
    -> the text that a model is taught for a row of prepare_data.py: its `output` with the boxes in the model's units,
    or the same in the other style. What the row does not know is left out; "think" without caption and reasoning has an
    empty thought.
    """
    check_style(style)
    known = json.loads(row["output"])
    if style == "think":
        thought = " ".join(known[name].strip() for name in ("caption", "reasoning") if known.get(name))
        return f"<think>{thought}</think><answer>{known['answer']}</answer>"
    if "boxes" in known:
        known["boxes"] = boxes_to_model(known["boxes"], row["width"], row["height"])
    return json.dumps({name: known[name] for name in FIELDS if name in known}, ensure_ascii=False)


def boxes_to_model(boxes, width, height):
    """
    [[x0, y0, x1, y1]] in pixels of an image of width x height -> whole thousandths of width and height, within 0 to
    1000.
    """

    def scaled(value, side):
        return min(1000, max(0, round(1000 * value / side)))

    return [[scaled(x0, width), scaled(y0, height), scaled(x1, width), scaled(y1, height)] for x0, y0, x1, y1 in boxes]


def boxes_from_model(boxes, width, height):
    """
    The way back: thousandths -> pixels (floats), within the image. A box written with its corners swapped stays
    swapped.
    """

    def pixels(value, side):
        return min(1.0, max(0.0, value / 1000)) * side

    return [[pixels(x0, width), pixels(y0, height), pixels(x1, width), pixels(y1, height)] for x0, y0, x1, y1 in boxes]


# --------------------------------------------------------------------------------------------------- reading a response


@dataclass
class Response:
    """What parse_response read."""

    data: dict | None = None  # the object, or {"reasoning", "answer"} of a <think> text; None where there is none
    answer: str | None = None
    boxes: list = field(
        default_factory=list
    )  # [[x0, y0, x1, y1]] of finite numbers as written: the model's units, unsorted
    level: int = 7  # a key of REPAIR_LEVELS
    problem: str = ""  # why an object was refused, "" where none was

    @property
    def valid(self):
        """An object that needed no repair, with an answer: what the JSON success rate and the training reward count."""
        return self.level <= VALID_LEVEL and self.data is not None and self.answer is not None


class Refused(Exception):
    """The object says two things at once, or what no JSON says: it is not mended."""


class Unreadable(Exception):
    """This is not an object, mended or not."""


def parse_response(text, style=None):
    """
    The new text of a model -> Response. Never raises, whatever the text; time grows linearly with its length.

    style: the one that was asked for; None: <answer> marks are looked for first, then an object. A text in the other
    style is read as plain text (level 6). Conflicting values for one key, NaN and infinities, more than MAX_DEPTH
    nested brackets and two different <answer> marks are refused: no answer, level 7. str and bytes; anything else, None
    too, is an empty text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = text if isinstance(text, str) else ""
    text = text.encode("utf-8", "replace").decode("utf-8").strip()  # lone surrogates could not be written to a file
    try:
        if style is None:
            style = "think" if "<answer>" in text and not text.startswith("{") else "json"
        found = read_marks(text) if style == "think" else read_object(text)
        if found is None:
            other = read_object(text) if style == "think" else read_marks(text)
            answer = plain_answer(text) if other is None else other.answer
            return Response(answer=answer, level=6 if answer is not None else 7)
        return found
    except Refused as refusal:
        return Response(problem=str(refusal))


def read_marks(text):
    """<think>..</think><answer>..</answer> -> Response, or None without <answer>."""
    parts = text.split("<answer>")
    if len(parts) == 1:
        return None
    answers = [part.partition("</answer>") for part in parts[1:]]
    if len({answer.strip() for answer, _, _ in answers}) > 1:
        raise Refused("two different <answer> marks")
    answer, closed, rest = answers[-1]
    thought, before = "", parts[0]
    if "<think>" in before:
        before, _, thought = before.partition("<think>")
        thought, _, between = thought.partition("</think>")
        strict = not before.strip() and not between.strip() and text.count("<think>") == text.count("</think>") == 1
    else:
        strict = False
    strict = strict and len(answers) == 1 and not rest.strip() and "</answer>" not in before
    level = 5 if not closed else 0 if strict else 2
    data = {"reasoning": thought.strip(), "answer": answer.strip()}
    return Response(data, data["answer"] or None, [], level)


FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n?")


def read_object(text):
    """The JSON object of a text -> Response, or None where there is none that can be mended."""
    fence = FENCE.match(text)
    if fence and text.endswith("```") and len(text) >= fence.end() + 3:
        text, outer = text[fence.end() : -3].strip(), 1
    else:
        outer = 0
    best = None
    for start, end, complete in object_spans(text):
        whole = start == 0 and end == len(text)
        try:
            data, level = read_span(text, start, end, complete)
        except Unreadable:
            continue
        level = max(level, outer if whole else 2)
        found = Response(data, answer_of(data), boxes_of(data), level)
        if found.answer is not None:
            return found
        best = best or found
    return best


def object_spans(text):
    """
    Where objects may lie: (start, end, complete), in the order to try them. First what was cut off: of the braces never
    closed the first and the last. Then balanced braces that lie in no other balanced ones, the last first, MAX_OBJECTS
    at most. Braces within double quotes do not count. One pass over the text.
    """
    stack, spans, quoted = [], [], False
    for match in re.finditer(r'\\.|["{}]', text, re.DOTALL):
        mark = match[0]
        if mark == '"':
            quoted = bool(stack) and not quoted
        elif quoted:
            continue
        elif mark == "{":
            stack.append(match.start())
        elif mark == "}" and stack:
            start = stack.pop()
            while spans and spans[-1][0] > start:  # those lie within this one
                spans.pop()
            spans.append((start, match.end(), True))
    cut = [(start, len(text), False) for start in dict.fromkeys([*stack[:1], *stack[-1:]])]
    return [*cut, *reversed(spans[-MAX_OBJECTS:])]


def read_span(text, start, end, complete):
    """-> (dict, level). Strict JSON first, then with repairs."""
    if complete:
        try:
            data = json.loads(
                text[start:end], object_pairs_hook=no_conflicts, parse_constant=refuse_constant, parse_float=finite
            )
            return check_depth(data), 0
        except (ValueError, RecursionError):
            pass
    reader = LooseReader(text, start, end)
    return check_depth(reader.object(1)), reader.level


def no_conflicts(pairs):
    data = {}
    for key, value in pairs:
        if key in data and data[key] != value:
            raise Refused(f"two different values for '{key[:40]}'")
        data[key] = value
    return data


def refuse_constant(name):
    raise Refused(f"{name} is not a number")


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise Refused("a number too large")
    return value


def check_depth(value, depth=1):
    """Refuses what is nested too deeply, and cleans texts of lone surrogates (\\ud800), which no file could hold."""
    if depth > MAX_DEPTH:
        raise Refused("nested too deeply")
    if isinstance(value, dict):
        return {check_depth(key): check_depth(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [check_depth(item, depth + 1) for item in value]
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


class LooseReader:
    """
    Reads one object from text[start:end] with small repairs, in one pass; `level` is the highest repair it needed.
    """

    CLOSING = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
    WORDS = {"true": True, "false": False, "null": None}
    PYTHON = {"True": True, "False": False, "None": None}
    SPACE = re.compile(r"\s*")
    NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,20})?([eE][-+]?\d{1,2})?(?![\w.])")
    BARE = re.compile(r"[A-Za-z_][^,:{}\[\]\"\n]*")
    ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}

    def __init__(self, text, start, end):
        self.text, self.at, self.end, self.level = text, start, end, 0

    def mend(self, level):
        self.level = max(self.level, level)

    def peek(self):
        """The next character after white space, "" at the end."""
        self.at = self.SPACE.match(self.text, self.at, self.end).end()
        return self.text[self.at] if self.at < self.end else ""

    def items(self, close, depth, read_item):
        """Comma-separated items up to `close`; the end of the text closes everything."""
        if depth > MAX_DEPTH:
            raise Refused("nested too deeply")
        self.at += 1
        while True:
            mark = self.peek()
            if mark == close:
                self.at += 1
                return
            if not mark:
                self.mend(5)
                return
            read_item()
            mark = self.peek()
            if mark == ",":
                self.at += 1
                if self.peek() == close:
                    self.mend(3)
            elif mark and mark != close:
                raise Unreadable

    def object(self, depth):
        pairs = []

        def pair():
            key = self.string() if self.peek() in self.CLOSING else self.bare()
            if not isinstance(key, str):
                raise Unreadable
            mark = self.peek()
            if not mark:  # cut off after a name, or within one: nothing is known
                self.mend(5)
                return
            if mark != ":":
                raise Unreadable
            self.at += 1
            if not self.peek():
                self.mend(5)
                return
            pairs.append((key, self.value(depth)))

        self.items("}", depth, pair)
        return no_conflicts(pairs)

    def array(self, depth):
        values = []
        self.items("]", depth, lambda: values.append(self.value(depth)))
        return values

    def value(self, depth):
        mark = self.peek()
        if mark == "{":
            return self.object(depth + 1)
        if mark == "[":
            return self.array(depth + 1)
        if mark in self.CLOSING:
            return self.string()
        number = self.NUMBER.match(self.text, self.at, self.end)
        if number:
            self.at = number.end()
            if self.at == self.end:  # 12 may be the beginning of 123
                self.mend(5)
            return float(number[0]) if number[1] or number[2] else int(number[0])
        return self.bare()

    def bare(self):
        """true, None, or words without quotes."""
        match = self.BARE.match(self.text, self.at, self.end)
        if not match:
            raise Unreadable
        self.at = match.end()
        word = match[0].strip()
        if word in self.WORDS:
            return self.WORDS[word]
        if word in ("NaN", "nan", "Infinity", "inf"):
            raise Refused(f"{word} is not a number")
        self.mend(5 if self.at == self.end else 4)
        return self.PYTHON.get(word, word)

    def string(self):
        """A quoted text; one that is cut off ends with the text."""
        quote = self.text[self.at]
        close = self.CLOSING[quote]
        if quote != '"':
            self.mend(4)
        parts, begin = [], self.at + 1
        for match in re.compile(rf"\\|\n|{close}").finditer(self.text, begin, self.end):
            if match.start() < begin:  # the second half of an escape
                continue
            mark = match[0]
            if mark == "\n":
                self.mend(3)
            elif mark == close:
                if close in "'\u2019" and self.inside_word(match.end()):
                    continue  # the apostrophe of the patient's
                self.at = match.end()
                return "".join([*parts, self.text[begin : match.start()]])
            else:
                parts.append(self.text[begin : match.start()])
                escaped = self.text[match.end() : match.end() + 1]
                code = self.text[match.end() + 1 : match.end() + 5] if escaped == "u" else ""
                if re.fullmatch(r"[0-9a-fA-F]{4}", code):
                    parts.append(chr(int(code, 16)))
                    begin = match.end() + 5
                else:
                    parts.append(self.ESCAPES.get(escaped, escaped))
                    begin = match.end() + 1
        self.mend(5)
        self.at = self.end
        return "".join([*parts, self.text[begin : self.end]])

    def inside_word(self, at):
        return at < self.end and self.text[at].isalnum()


def answer_of(data):
    """The answer of an object as text: a text, a number, or true and false as yes and no; None for anything else."""
    value = data.get("answer")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:.15g}" if abs(value) < 1e15 else None
    return (value.strip() or None) if isinstance(value, str) else None


def boxes_of(data):
    """
    The boxes of an object: a list of boxes, one box, or {"box": ...} and Qwen's {"bbox_2d": ...}; what is none is left
    out.
    """
    value = data.get("boxes", data.get("box", data.get("bbox_2d")))
    values = [value] if is_box(value) or isinstance(value, dict) else value if isinstance(value, list) else []
    values = [item.get("box", item.get("bbox_2d")) if isinstance(item, dict) else item for item in values]
    return [item for item in values if is_box(item)]


def is_box(value):
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < 1e6 for n in value)
    )


MARKED = re.compile(r"\banswer\b[\"'*]{0,4}[ \t]{0,4}(?:is\b:?|:)[ \t]{0,4}([^\n]*)", re.IGNORECASE)


def plain_answer(text):
    """
    The answer of a text without an object: what follows the last 'answer:' or 'answer is' of a line, else a short text
    itself.
    """
    marked = [m[1].strip(" \t\"'*`.,{}[]") for m in MARKED.finditer(text)]
    marked = [m for m in marked if m]
    if marked:
        return marked[-1][:PLAIN_LENGTH]
    return text if 0 < len(text) <= PLAIN_LENGTH and not set(text) & set("{}[]<>") else None
