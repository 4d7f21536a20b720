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

if __name__ == "__main__":
    raise SystemExit(__doc__)

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
    2: "embedded: other text around it (of several objects the last one with an answer counts), marks in other letter"
    " case, or an answer under another name or in a list",
    3: "commas and line breaks: trailing commas, raw line breaks in strings",
    4: "Python or loose quotes: single or curly quotes, None, True, False, names without quotes",
    5: "truncated: the end is missing and was added",
    6: "plain text: no object; what follows 'answer:', or a text of at most 200 characters as it stands",
    7: "nothing: no answer can be read, or two that contradict each other",
}
VALID_LEVEL = 1  # up to here a response counts as valid JSON (Response.valid)
PLAIN_LENGTH = 200  # characters; a longer text without any mark is not an answer
MAX_QUESTION = 2000  # characters; the longest of VQA-RAD and SLAKE have 200
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
    return f"{instruction(style)}\nQuestion: {check_question(question).strip()}"


def check_question(question, where="a question"):
    """-> the question; InputError for one that no data set asks and that would fill memory and figures for minutes."""
    if len(str(question)) > MAX_QUESTION:
        raise InputError(f"{where} has {len(question):,} characters; at most {MAX_QUESTION:,} are asked")
    return str(question)


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
    """
    What parse_response read. data: the object, or {"reasoning", "answer"} of a <think> text, None where there is none;
    boxes: [[x0, y0, x1, y1]] of finite numbers as written (the model's units, unsorted); level: of REPAIR_LEVELS;
    problem: why an object was refused, "" where none was.
    """

    data: dict | None = None
    answer: str | None = None
    boxes: list = field(default_factory=list)
    level: int = 7
    problem: str = ""

    @property
    def valid(self):
        """An object that needed no repair, with an answer: what the JSON success rate and the training reward count."""
        return self.level <= VALID_LEVEL and self.data is not None and self.answer is not None


class Refused(Exception):
    """The object says two things at once, or what no JSON says: it is not mended."""


NUMBER = r"-?\d{1,7}(?:\.\d{1,20})?"
SPACE = r"\s{0,3}"
PAIR = rf"\({SPACE}{NUMBER}{SPACE},{SPACE}{NUMBER}{SPACE}\)"
# boxes in running text: (100,200),(300,400), which Qwen2-VL writes between marks, [1, 2, 3, 4], and in [[ ]] or ( )
FOUR = rf"{NUMBER}(?:{SPACE},{SPACE}{NUMBER}){{3}}"
BOX_TEXT = re.compile(rf"{PAIR}{SPACE},?{SPACE}{PAIR}|[\[(]{{1,2}}{SPACE}{FOUR}{SPACE}[\])]{{1,2}}")
# marks of things and boxes: Qwen's <|box_start|>, <box>, DeepSeek's <|det|>
GROUNDING = re.compile(r"<\|?/?(?:object_ref|ref|bbox|box|det)(?:_start|_end)?\|?>")
BOXED = re.compile(r"<\|?(?:bbox|box|det)(?:_start)?\|?>([^<]{0,400})<\|?/?(?:bbox|box|det)(?:_end)?\|?>")
# the thing that a yes or no is about: "Yes <|object_ref_start|>nodule<|object_ref_end|>"
NAMED = re.compile(
    r"\A(\s{0,9}(?:yes|no)\b[\s.,:;]{0,9})<\|?(?:object_ref_start|ref)\|?>[^<]{0,200}(?=<)", re.IGNORECASE
)
END_TOKENS = re.compile(r"<\|[a-z_]{1,30}\|>|</?s>|<(?:pad|eos|end_of_turn)>")
MARKS = re.compile(r"[<\u25c1]\s{0,3}(/?)\s{0,3}(?:final[_ ])?(think|answer)(?:ing)?\s{0,3}[>\u25b7]", re.IGNORECASE)


def parse_response(text, style=None):
    """
    The new text of a model -> Response. Never raises, whatever the text; time grows linearly with its length.

    style: the one that was asked for; None: <answer> marks are looked for first, then an object. A text in the other
    style is read as plain text (level 6). Marks count in any letter case; Qwen's own marks of things and boxes are
    taken out, and the boxes kept. Conflicting values for one key, more than MAX_DEPTH nested brackets and two different
    <answer> marks are refused: no answer, level 7. NaN, infinities and numbers too large stand for nothing (null): an
    answer beside a nonsense box is still an answer. str and bytes; anything else, None too, is an empty text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = text if isinstance(text, str) else ""
    text = written = text.encode("utf-8", "replace").decode("utf-8").strip()  # lone surrogates fit into no file
    boxes = []
    if GROUNDING.search(text):
        boxes = [box for inside in BOXED.findall(text) for box in fours(inside)]
        text = GROUNDING.sub("", BOXED.sub("", NAMED.sub(r"\1", text))).strip()
    text = MARKS.sub(lambda mark: f"<{mark[1]}{mark[2].lower()}>", text)
    if re.match(r'"?\{\s*\\"', text):  # an object written as a text in an object
        text = text.strip('"').replace('\\"', '"').replace("\\n", "\n")
    try:
        found = read(text, style)
    except Refused as refusal:
        return Response(problem=str(refusal))
    if text != written:
        found.level, found.boxes = max(found.level, 2), found.boxes or boxes
    return found


def read(text, style):
    """A text with marks in lower case and without Qwen's -> Response; Refused."""
    if style is None:
        style = "think" if "<answer>" in text and not text.startswith("{") else "json"
    found = read_marks(text) if style == "think" else read_object(text)
    if found is not None:
        return found
    other = read_object(text) if style == "think" else read_marks(text)
    said = text.rpartition("</think>")[2].partition("<think>")[0]  # a thought without its end is no answer
    return plain_response(said) if other is None else as_plain(other.answer, [])


def as_plain(answer, boxes):
    return Response(answer=answer, boxes=boxes, level=6 if answer is not None else 7)


def plain_response(text):
    return as_plain(plain_answer(BOX_TEXT.sub(" ", END_TOKENS.sub("", text)).strip(" ,;:\n")), boxes_in(text))


def boxes_in(text):
    return [[float(n) if "." in n else int(n) for n in re.findall(NUMBER, box)] for box in BOX_TEXT.findall(text)]


def read_marks(text):
    """<think>..</think><answer>..</answer> -> Response, or None without <answer>."""
    before, *parts = text.split("<answer>")
    if not parts:
        return None
    answers = [part.partition("</answer>") for part in parts if part.strip()] or [("", "", "")]
    if len({answer.strip(" .\n").casefold() for answer, _, _ in answers}) > 1:
        raise Refused("two different <answer> marks")
    answer, closed, rest = answers[-1]
    before, begun, thought = before.partition("<think>")
    thought, _, between = thought.partition("</think>")
    strict = begun and text.count("<think>") == text.count("</think>") == len(parts) == 1
    strict = strict and not (before.strip() or between.strip() or rest.strip() or "</answer>" in thought)
    data = {"reasoning": thought.strip(), "answer": answer.strip()}
    return Response(data, data["answer"] or None, [], 5 if not closed else 0 if strict else 2)


# -------------------------------------------------------------------------------------------------------------- objects

FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n?")


def read_object(text):
    """The JSON object of a text -> Response, or None where there is none that can be mended."""
    fence, outer = FENCE.match(text), 0
    if fence and text.endswith("```") and len(text) >= fence.end() + 3:
        text, outer = text[fence.end() : -3].strip(), 1
    best, outside = None, ""
    for start, end, complete in object_spans(text):
        whole = start == 0 and end == len(text)
        try:
            data, level = read_span(text[start:end], complete)
        except (ValueError, RecursionError):
            continue
        answer, plainly = answer_of(data)
        level = max(level, outer if whole and plainly else 2)
        found = Response(data, answer, boxes_of(data), level)
        if found.answer is not None:
            return found
        if best is None:
            best, outside = found, FENCE.sub("", text[:start] + text[end:]).strip(" []\n")
    if best is not None and (answer := plain_answer(outside)) is not None:  # boxes as an object, the answer behind it
        return as_plain(answer, best.boxes)
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


def read_span(text, complete):
    """-> (dict, level). Strict JSON first, then what mended() makes of it; ValueError where that is none either."""
    if complete:
        try:
            return load_json(text), 0
        except (ValueError, RecursionError):
            pass
    text, level = mended(text)
    return load_json(text), max(level, 3)


def load_json(text):
    def no_constant(name):
        raise ValueError(f"{name} is no JSON")  # mended() makes it null

    data = json.loads(text, object_pairs_hook=no_conflicts, parse_constant=no_constant, parse_float=finite)
    return check_depth(data)


def no_conflicts(pairs):
    """Names that differ in letter case only are one name here: who writes "answer" and "Answer" says two things."""
    data, said = {}, {}
    for key, value in pairs:
        if said.setdefault(key.lower(), value) != value:
            raise Refused(f"two different values for '{key[:40]}'")
        data[key] = value
    return data


def finite(text):
    value = float(text)
    return value if math.isfinite(value) else None


def check_depth(value, depth=1):
    """Refuses what is nested too deeply, and cleans texts of lone surrogates (\\ud800), which no file could hold."""
    if depth > MAX_DEPTH:
        raise Refused("nested too deeply")
    if isinstance(value, dict):
        return {check_depth(key): check_depth(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [check_depth(item, depth + 1) for item in value]
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


CLOSING = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "«": "»", "„": "“", "「": "」"}
INSIDE = {  # of a text in quotes; the apostrophe of "the patient's" does not end one
    quote: re.compile(
        rf"(?:[^\\{close}]|\\.|{close}(?=\w))*" if close in "'\u2019" else rf"(?:[^\\{close}]|\\.)*", re.S
    )
    for quote, close in CLOSING.items()
}
ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
TOKEN = re.compile(  # comments are no JSON, and are passed over
    r"""(?:\s|//[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*(?:(?P<mark>[{}\[\]:,()])|(?P<quote>["'\u201c\u2018«„「])"""
    r"""|(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w.])"""
    r"""|(?P<bare>-?[A-Za-z_][^,:{}\[\]"\n]*))"""
)
BARE = {"true": ("true", 0), "false": ("false", 0), "null": ("null", 0)}
BARE |= {"True": ("true", 4), "False": ("false", 4), "None": ("null", 4)}
BARE |= dict.fromkeys("NaN nan Infinity -Infinity inf -inf".split(), ("null", 4))


def mended(text):
    """
    An object with small faults, perhaps without its end -> (strict JSON, highest repair level that it needed). One pass
    over its tokens: texts get double quotes, the last comma before a bracket goes, what is cut off is closed, and a
    name without its value goes. Other faults stay, for json.loads to find; ValueError for what is no token.
    """
    out, stack, level, at, last = [], [], 0, 0, ""
    while match := TOKEN.match(text, at):
        at, kind = match.end(), match.lastgroup
        token = match[kind]
        if kind == "mark":
            if token in "()":  # a tuple of Python
                token, level = "[]"["()".index(token)], max(level, 4)
            if token in "}]":
                if last == ",":
                    out.pop()
                    level = max(level, 3)
                if not stack or stack.pop() != token:
                    raise ValueError("brackets do not fit")
            elif token in "{[":
                stack.append("}" if token == "{" else "]")
                if len(stack) > MAX_DEPTH:
                    raise Refused("nested too deeply")
            out.append(token)
            last = token
            if not stack:  # the object is whole; what follows it is not part of it
                break
            continue
        key = bool(stack) and stack[-1] == "}" and last in ("{", ",")
        if kind == "quote":
            inner = INSIDE[token].match(text, at)
            closed = text[inner.end() : inner.end() + 1] == CLOSING[token]
            at = inner.end() + 1 if closed else len(text)
            level = max(level, 4 if token != '"' else 0, 0 if closed else 5)
            token = json.dumps(ESCAPE.sub(unescaped, inner[0]))
        elif kind == "number":
            token = json.dumps(finite(token) if len(token) > 15 or not token.lstrip("-").isdigit() else int(token))
        else:
            token, needed = BARE.get(token.strip(), (json.dumps(token.strip()), 4))
            level = max(level, needed)
        out.append(token)
        last = "key" if key else "value"
    if stack:
        if text[at:].strip():
            raise ValueError("no token")
        while last in (",", ":", "key"):  # cut off after a name, or within one: nothing is known
            out.pop()
            last = "key" if last == ":" else "," if last == "key" and out[-1:] == [","] else ""
        out, level = out + stack[::-1], 5
    return " ".join(out), level


def unescaped(match):
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) == 5 else ESCAPED.get(code, code)


# -------------------------------------------------------------------------------------------------- what an object says

# in any letter case, with or without blanks, hyphens and underscores
ANSWER_NAMES = ("answer", "finalanswer")
BOX_NAMES = "boxes box bbox2d bbox bboxes box2d boundingbox boundingboxes coordinates coords region regions roi loc"
BOX_NAMES = BOX_NAMES.split()
CORNERS = [names.split() for names in ("x0 y0 x1 y1", "x1 y1 x2 y2", "xmin ymin xmax ymax", "left top right bottom")]
CORNERS.append(["topleft", "bottomright"])
SIZED = [names.split() for names in ("x y width height", "x y w h", "left top width height")]


def holder(data):
    """The object with the answer: this one, or where it has none the first inside it that has, alone in a list too."""
    if named(data, ANSWER_NAMES) is not None:
        return data
    inside = (value[0] if isinstance(value, list) and len(value) == 1 else value for value in data.values())
    found = (holder(value) for value in inside if isinstance(value, dict))
    return next((value for value in found if named(value, ANSWER_NAMES) is not None), data)


def named(data, names):
    """The value of the first of these names that an object has; None where it has none."""
    plain = plain_names(data)
    return next((plain[name] for name in names if name in plain), None)


def plain_names(data):
    return {re.sub(r"[\W_]", "", key).lower(): value for key, value in data.items()}


def answer_of(data):
    """
    -> (the answer of an object as text, or None; whether it stands there plainly: a text, a number, or true and false
    for yes and no under the name "answer"). A list is joined by commas; of an object inside, its answer or its only
    value counts.
    """
    value = named(holder(data), ANSWER_NAMES)
    return answer_text(value), "answer" in data and not isinstance(value, (list, dict)) or value is None


def answer_text(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:.15g}" if abs(value) < 1e15 else None
    if isinstance(value, list) and len(value) > 3 and all(isinstance(item, (int, float)) for item in value):
        return None  # a box
    if isinstance(value, list) and (len(value) == 1 or not any(isinstance(item, (list, dict)) for item in value)):
        return ", ".join(filter(None, map(answer_text, value))) or None
    if isinstance(value, dict):
        inner = named(value, (*ANSWER_NAMES, "text", "value", "label"))
        return answer_text(inner if inner is not None or len(value) != 1 else next(iter(value.values())))
    return (value.strip() or None) if isinstance(value, str) else None


def boxes_of(data):
    """
    The boxes of an object under a name of BOX_NAMES: one box, a list of them, or an object {what: box}. A box is four
    numbers (or texts of numbers, or one text of four), two points, or an object with a box, with corners or with a
    corner and a size in it; the order of four numbers is x0, y0, x1, y1, as the prompt asks for, whatever the name.
    What is none is left out.
    """
    data = holder(data)
    value = named(data, BOX_NAMES)
    if value is None:  # corners beside the answer
        value = data
    if isinstance(value, str):  # "100, 200, 300, 400", "(100,200),(300,400)", several of them
        return fours(value)
    if (one := box_of(value)) is not None:
        return [one]
    if isinstance(value, list) and value and all(isinstance(n, (int, float)) for n in value):
        return fours(str(value))
    items = (
        value if isinstance(value, list) else value.values() if isinstance(value, dict) and value is not data else ()
    )
    return [box for item in items if (box := box_of(item)) is not None]


def box_of(value):
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        plain = plain_names(value)
        for names in CORNERS + SIZED:
            if all(name in plain for name in names):
                box = box_of([plain[name] for name in names])
                sized = box is not None and names in SIZED
                return [*box[:2], box[0] + box[2], box[1] + box[3]] if sized else box
        inner = named(value, BOX_NAMES)
        return None if inner is None else box_of(inner)
    if isinstance(value, str):
        value = numbers_of(value)
    if isinstance(value, list) and len(value) == 2:  # two points
        value = [numbers_of(p) if isinstance(p, str) else p for p in value]
        value = [*value[0], *value[1]] if all(isinstance(p, list) and len(p) == 2 for p in value) else None
    if isinstance(value, list) and len(value) == 4:
        value = [(numbers_of(n) or [None])[0] if isinstance(n, str) else n for n in value]
    return value if is_box(value) else None


def numbers_of(text):
    """The numbers of a text that has nothing else but brackets, commas and spaces; [] for any other."""
    if len(text) > 1000 or re.sub(rf"{NUMBER}|[\s,;()\[\]]", "", text):
        return []
    return [float(n) if "." in n else int(n) for n in re.findall(NUMBER, text)]


def fours(text):
    """The boxes of a text of numbers, four after four."""
    numbers = numbers_of(text)
    return [numbers[i : i + 4] for i in range(0, len(numbers), 4) if is_box(numbers[i : i + 4])]


def is_box(value):
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < 1e6 for n in value)
    )


# ---------------------------------------------------------------------------------------------------------- plain text

ANSWER_IS = r"\banswer\b[\"'*]{0,4}[ \t]{0,4}(?:is\b(?! (?:based|because|supported|derived))|[:=]|-(?= )):?\s{0,4}"
ANSWER_IS = re.compile(ANSWER_IS + r"((?:(?!\banswer ?:)[^\n])*)", re.IGNORECASE)
NO_ANSWER = re.compile(r"[-\d.,\s\[\]]{12,}\Z|[^\n]{0,40}\":\s{0,3}\[")  # boxes, cut off or under the wrong name
HEADING = re.compile(r"^[#*_ ]{0,9}(?:final )?answer[*_ ]{0,9}\n", re.IGNORECASE | re.MULTILINE)
QUOTED = re.compile(r'\A"(.*?)"\s{0,3}(?:[}\]].*|[,;]{0,3}\s{0,9}"\w{1,30}"\s{0,3}:.*)?$')
IN_LATEX = re.compile(r"\\boxed\{(?:\\[a-z]{1,20}\{)?([^{}\n]{0,200})\}")  # \boxed{yes}, \boxed{\text{yes}}


def plain_answer(text):
    """
    The answer of a text without an object: what is in the last box of LaTeX, what follows the last 'answer:' or
    'answer is' of a line, else a short text itself, if there is a letter or a digit in it.
    """
    text = HEADING.sub("answer: ", text)
    said = IN_LATEX.findall(text) or [QUOTED.sub(r"\1", words) for words in ANSWER_IS.findall(text)]
    said = (words.strip(" \t\"'*`.,{}[]") for words in said)
    if said := [words for words in said if words and not NO_ANSWER.match(words)]:
        return said[-1][:PLAIN_LENGTH]
    if len(text) > PLAIN_LENGTH or set(text) & set("{}[]<>") or not re.search(r"[^\W_]", text):
        return None
    return text
