"""
What the model is asked, by name: each strategy is a few lines to be edited. And how its answer is read.

    ask("context_aware", context=cnn_sentence(0.93))         -> the user's turn
    read_response(text)                                      -> sections, classification, stated confidence

A strategy is the instruction of a free answer. `yes_no_question` puts the same instruction in front of a question
whose first token answers it, so that every strategy also has a margin (log-odds of yes against no) and an AUC.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from dataclasses import dataclass, field

from shared.metrics.labels import NEGATIVE, POSITIVE, UNCERTAIN, label_report
from task2_report.cases import sections_of

REPORT = "Write the findings and the impression of this chest radiograph."  # what train.py teaches
CLOSING = "End with one line CLASSIFICATION: normal, pneumonia or uncertain."
YES_NO = "Does this chest X-ray show pneumonia? Answer with one word, yes or no."


@dataclass(frozen=True)
class Strategy:
    text: str  # of the user's turn
    system: str | None = None  # MedGemma 1.5 was trained without system prompts: it is marked there
    wants: tuple = ("classification",)  # what the format asks for: checked for compliance


STRATEGIES = {
    "zero_shot": Strategy(f"Describe this chest X-ray. {CLOSING}"),
    "clinical_role": Strategy(
        f"Describe this chest X-ray and say whether there is pneumonia. {CLOSING}",
        system="You are an experienced paediatric radiologist.",
    ),
    "context_aware": Strategy(
        "Write a report of this chest X-ray with the sections FINDINGS and IMPRESSION. Judge by the image; a separate"
        f" classifier may be wrong. {CLOSING}",
        wants=("findings", "impression", "classification"),
    ),
    "structured": Strategy(
        f"Write a report of this chest X-ray in three parts: FINDINGS:, IMPRESSION:, CLASSIFICATION:. {CLOSING}",
        wants=("findings", "impression", "classification"),
    ),
    "yes_no": Strategy(
        "Is there pneumonia on this chest X-ray? Answer in two lines: CLASSIFICATION: normal or pneumonia, and"
        " CONFIDENCE: a number from 0 to 100 percent.",
        wants=("classification", "confidence"),
    ),
    "differential": Strategy(
        f"Name the three most likely readings of this chest X-ray with what speaks for and against each. {CLOSING}"
    ),
    "uncertainty_aware": Strategy(
        "This chest X-ray has a low resolution. Describe only what can be told at this resolution, say what cannot be"
        f" told, and do not mention lines, tubes or devices. {CLOSING}"
    ),
    "few_shot": Strategy(
        "Two examples of the form.\nFINDINGS: Both lungs are clear. IMPRESSION: No pneumonia. CLASSIFICATION: normal\n"
        "FINDINGS: Hazy opacity in the right lower zone. IMPRESSION: Pneumonia. CLASSIFICATION: pneumonia\n"
        f"Now this chest X-ray, in the same form. {CLOSING}",
        wants=("findings", "impression", "classification"),
    ),
    "report": Strategy(REPORT, wants=("findings",)),
}
CONTEXTS = ("none", "cnn", "swapped", "constant")

# Other words for the same question; no answer should change. The last two turn it round.
PARAPHRASES = (
    (YES_NO, False),
    ("Is pneumonia present on this chest X-ray? Answer with one word, yes or no.", False),
    ("Looking at this film, do you see pneumonia? Answer with one word, yes or no.", False),
    ("Does this film show signs of a lung infection? Answer with one word, yes or no.", False),
    ("Is this chest X-ray free of pneumonia? Answer with one word, yes or no.", True),
    ("Are the lungs on this chest X-ray normal? Answer with one word, yes or no.", True),
)


def cnn_sentence(probability, positive="pneumonia"):
    return f"A separate image classifier gives this film a probability of {probability:.0%} of {positive}."


def context_probability(context, probability):
    """The probability that is told: the CNN's, its opposite, always one half, or None."""
    if context == "none" or probability is None:
        return None
    return {"cnn": probability, "swapped": 1 - probability, "constant": 0.5}[context]


def ask(strategy, context=None, indication=""):
    """-> the user's turn. context: a sentence about the CNN, or None."""
    parts = [STRATEGIES[strategy].text if strategy in STRATEGIES else strategy]
    if indication:
        parts.append(f"Clinical question: {indication}")
    return " ".join([*parts, context] if context else parts)


def yes_no_question(strategy, context=None, indication="", question=YES_NO):
    """The same instruction in front of a question that one word answers."""
    if strategy == "yes_no":
        return ask(question, context, indication)
    before = ask(strategy, context, indication).replace(CLOSING, "").strip()
    return f"{before} First of all: {question}"


# --------------------------------------------------------------------------------------------------- reading responses


@dataclass
class Response:
    text: str  # without thoughts
    sections: dict
    classification: str | None  # normal, pneumonia, uncertain; None: cannot be read, which is not "normal"
    confidence: float | None  # stated, 0 to 1
    complies: bool  # has everything that the strategy asks for
    boxes: list = field(default_factory=list)  # [x0, y0, x1, y1] in 0 to 1000 of the square the model saw, with labels


WORDS = {
    "pneumonia": "positive|abnormal",
    "normal": "normal|negative",
    "uncertain": "uncertain|indeterminate|inconclusive|equivocal|unclear|undetermined",
}
LABEL_CLASS = {POSITIVE: "pneumonia", NEGATIVE: "normal", UNCERTAIN: "uncertain"}
LEANING = re.compile(r"\b(not (?:very )?|un|im)?(?:likely|probabl[ey])\b")
NUMBER = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*(%|percent|/\s*100)?|(0?\.\d+)")


def read_class(text):
    """
    One line -> normal, pneumonia or uncertain; None when none or several are named. Pneumonia is read by the labeller,
    so that "free of pneumonia" is no pneumonia; "likely" and "unlikely" are calls, "possible" is not.
    """
    text = re.sub(r"\bnot (?:\w+ )?normal\b", "abnormal", text.lower().split("\n")[0])
    if re.search(r"\b(?:normal,? pneumonia or uncertain|normal or pneumonia|neither)\b", text):  # the instruction
        return None
    named = {name for name, words in WORDS.items() if re.search(rf"\b(?:{words})\b", text)}
    called = LABEL_CLASS.get(label_report(text)["Pneumonia"])
    leaning = LEANING.search(text)
    if called == "uncertain" and leaning:
        called = "normal" if leaning[1] else "pneumonia"
    named |= {called} - {None}
    return named.pop() if len(named) == 1 else None


def read_confidence(text):
    """ "85 %", "85", "0.85", "85/100" -> 0.85; None when there is no number or one outside 0 to 100."""
    found = NUMBER.search(text)
    if not found:
        return None
    value = float(found[1] or found[3])
    value = value if value <= 1 and not found[2] and "." in found[0] else value / 100
    return value if 0 <= value <= 1 else None


def read_response(text, strategy="structured"):
    sections = sections_of(text)
    said = re.findall(r"(?i)classification\s*[*_]*\s*[:=-]\s*[*_]*\s*([^\n.]*)", text)
    said = said or [sections.get("classification", "")]
    if said == [""] and len(text.split()) <= 6:  # a bare answer, as to a yes/no question
        first = re.match(r"\W*(yes|no)\b", text.lower())
        said = [{"yes": "pneumonia", "no": "normal"}[first[1]] if first else text]
    stated = re.search(r"(?i)confidence\s*[*_]*\s*[:=-]?\s*([^\n]*)", text)
    confidence = read_confidence(stated[1]) if stated else None
    calls = set(map(read_class, said)) - {None}  # two lines that differ are no call
    classification = calls.pop() if len(calls) == 1 else None
    has = {name for name, body in sections.items() if body and name not in ("classification", "confidence")}
    has |= {"classification"} if classification is not None else set()
    has |= {"confidence"} if confidence is not None else set()
    wants = STRATEGIES[strategy].wants if strategy in STRATEGIES else ()
    return Response(text, sections, classification, confidence, set(wants) <= has, read_boxes(text))


BOX = re.compile(r'"box_2d"\s*:\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]')
LABEL = re.compile(r'"label"\s*:\s*"([^"]*)"')


def read_boxes(text):
    """MedGemma's {"box_2d": [y0, x0, y1, x1], "label": ...}, in 0 to 1000 -> [{"box": [x0, y0, x1, y1], "label"}]."""
    found = []
    for part in re.findall(r"\{[^{}]*\}", text):
        if box := BOX.search(part):
            y0, x0, y1, x1 = map(int, box.groups())
            label = LABEL.search(part)
            found.append({"box": [x0, y0, x1, y1], "label": label[1] if label else ""})
    return found


def pixel_box(box, height, width, squared):
    """[x0, y0, x1, y1] in 0 to 1000 of what the model saw -> pixels of the film; squared: it was padded to a square."""
    side = max(height, width)
    high, wide = (side, side) if squared else (height, width)
    top, left = ((side - height) // 2, (side - width) // 2) if squared else (0, 0)
    limits = width, height, width, height
    moved = [v * s / 1000 - o for v, s, o in zip(box, (wide, high) * 2, (left, top) * 2, strict=True)]
    return [round(min(max(v, 0), most)) for v, most in zip(moved, limits, strict=True)]
