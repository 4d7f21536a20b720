"""
What the text around an answer is worth: caption and reasoning, against the truth, the answer and the prompt.

T truth      where the row says what its film shows ("findings", the phantom only): what caption and reasoning state is
             read by the report labeller (shared/metrics/labels.py) and compared with it, see truth(). Of a row without
             "findings" nothing is known and nothing is checked: there a false caption is worth what a true one is.
C contra-    the text against the answer that follows it, see contradiction(). Of any row; -1 only where words settle
  diction    it, the same for yes and no. What the text leaves open is no contradiction.
P penalties  too long, repetition, copies of the prompt, padding; each 0 to 1.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import itertools
import re

from shared.metrics.labels import NEGATIVE, PARENTS, POSITIVE, UNCERTAIN, label_report
from vqa_sft_grpo.answer_worth import DIMENSIONS, HEDGES, ORGANS
from vqa_sft_grpo.prompting import instruction
from vqa_sft_grpo.scoring import COMMON, NEGATORS, NORMALITY, OPPOSITE, STARTS, asks_for_absence, choice, negated
from vqa_sft_grpo.scoring import normalise, options_of, polarity, words_and_marks

COPIED = 0.8  # of a sentence
BLANKS = 20  # characters of white space in a row; json.dumps(indent=4) writes 13 in a box
SIZE_WORDS = dict.fromkeys("small mild tiny minimal slight mildly slightly".split(), "small")
SIZE_WORDS |= dict.fromkeys("large big huge severe severely extensive".split(), "large")
SIZE_WORDS |= dict.fromkeys(("moderate", "moderately"), "moderate")
DEVICES = "endotracheal nasogastric enteric venous chest pacemaker".split()
# Says that a film is normal as a whole, and that some part of it is, or all
WHOLE = (
    r"\b(?:no|without)(?: (?!other|further|additional|more)\w+){0,2} (?:findings?|abnormalit\w+|disease)\b"
    r"|\bnothing (?:is )?(?:abnormal|wrong)\b|\bnormal (?:frontal )?(?:chest|film|radiograph|x-?ray|study|image)\b"
    r"|\b(?:film|radiograph|x-?ray|study|image) is (?:normal|unremarkable|negative)\b"
)
NORMAL = re.compile(WHOLE + r"|\b(?:normal|unremarkable|healthy|clear|negative)\b", re.IGNORECASE)
WHOLE = re.compile(WHOLE, re.IGNORECASE)
# "The heart is normal", "right lung clear": of a part, and no normal film
PART = re.compile(
    r"[^.,;:\n]*\b(?:left|right|heart|cardiac|mediastin\w+|ribs?|bon[ey]s?|osseous|trachea|aort\w+|hil\w+|ap(?:ex|ices)"
    r"|angles?|(?:hemi)?diaphragms?|vess\w+|vascula\w+|markings)\b[^.,;:\n]*",
    re.IGNORECASE,
)
# What no chest film shows: of the phantom it is false
ELSEWHERE = set(
    "ct mri mr ultrasound sonogram pet mammogram angiogram microscopy endoscopy photograph photo painting brain skull"
    " liver spleen pancreas intestine"
    " knee hand foot ankle wrist elbow hip leg arm tooth teeth breast uterus prostate kidney bladder rectum colon dog"
    " cat horse cow bird fish animal car house tree food".split()
)
EXCLUSIVE = [  # things that cannot be two of these at once; the first PER_IMAGE kinds are of the whole image
    [set(words.split()) for words in kind.split(",")]
    for kind in (
        "ct,mri mr,xray radiograph,ultrasound sonography,pet,mammogram mammography",
        "axial transverse,coronal,sagittal",
        "frontal,lateral",
        "left,right",
        "upper,mid middle,lower",
        "small,moderate,large",
        "hyperdense,hypodense",
        "hyperintense,hypointense",
    )
]
PER_IMAGE = 3
# A text that takes itself back, and what a text concludes
REVOKED = re.compile(
    r"\b(?:none of (?:this|these|that|it)|not (?:true|the case)|untrue|opposite is true|joke|another patient"
    r"|(?:is|are|was|were) (?:false|wrong|incorrect|made up)|ignore (?:this|that|the above)|disregard)\b",
    re.IGNORECASE,
)
CONCLUDED = re.compile(r"\b(?:so|thus|hence|therefore|answer(?: is)?|conclusion)\b[,: ]*([^.;\n]+)", re.IGNORECASE)
SUPPOSED = re.compile(r"\b(?:if|whether|unless)\b[^.,;:\n]*", re.IGNORECASE)  # what states nothing
REFERENCE = set("of to from near beside behind below above next towards around over under than".split())

# -------------------------------------------------------------------------------------------------------------- truth


def ancestors(condition):
    """A condition and those it implies: Pneumonia, Consolidation, Lung Opacity."""
    found = []
    while condition:
        found.append(condition)
        condition = PARENTS.get(condition)
    return found


@functools.lru_cache(maxsize=8192)
def statements(text):
    """
    What a text says of the 14 conditions -> ([(condition, label, words of its part of the sentence, sides named, last
    word of the mention)], whether it says that all is normal, whether it does so beside findings). A part ends at
    commas, "and" and full stops; "left and right" and "left, right" name both sides.
    """
    text = re.sub(r"\b(left|right)(?:\s*(?:,|/|and|or)\s*)+(left|right)\b", "bilateral", text, flags=re.IGNORECASE)
    text = SUPPOSED.sub(" ", text)
    labels, spans = label_report(text, evidence=True)
    found = []
    for span in spans:
        if span["label"] is None or span["condition"] == "No Finding":
            continue
        start = max(m.end() for m in re.finditer(r"^|[,.;:\n]|\band\b", text[: span["start"]], re.IGNORECASE))
        end = re.compile(r"[,.;:\n]|\band\b|$", re.IGNORECASE).search(text, span["end"]).start()
        words = frozenset(words_and_marks(text[start:end]))
        sentence = text[text.rfind(".", 0, start) + 1 : end]
        label = span["label"]
        if label == POSITIVE and (HEDGES - {"or"}) & set(words_and_marks(sentence)):
            label = UNCERTAIN  # "Presumably an effusion"
        sides = frozenset(word for word in ("left", "right", "bilateral") if word in words)
        found.append((span["condition"], label, words, sides, normalise(span["text"])[-1]))
    stated = any(label != NEGATIVE and name != "Support Devices" for name, label, *_ in found)
    normal = bool(NORMAL.search(PART.sub(" ", text))) and not stated and labels["No Finding"] == POSITIVE
    return found, normal, bool(WHOLE.search(text)) and stated


def fits(words, sides, found):
    """Can words beside a condition ("left", "upper", "large") be said of this finding, a dict of row["findings"]?"""
    one = found["side"] in ("left", "right")
    if one and sides and sides != {found["side"]}:
        return False
    heights = {DIMENSIONS[word][1] for word in words if DIMENSIONS.get(word, ("",))[0] == "height"}
    sizes = {SIZE_WORDS[word] for word in words if word in SIZE_WORDS}
    devices = {word for word in DEVICES if word in words} - {"chest" if "tube" not in words else ""}
    if found["zone"] and heights and heights != {found["zone"]} or found["size"] and sizes and sizes != {found["size"]}:
        return False
    return found["condition"] != "Support Devices" or not devices or bool(devices & set(found["kind"].split()))


def truth(text, findings, about=None):
    """
    text: a caption (about None) or a reasoning; findings: row["findings"], dicts of condition, kind, side, zone, size;
    about: the conditions that the question is about, empty: any -> (value from -1 to 1, why).

    value = p r - (1 - p). p: share of what is said that is true: of the findings stated, with side, zone and size where
    these are said, those that are there; a denial of what is there, a normal film that is none, another kind of image
    or part of the body are false. True denials do not count: any number could be had. r, of a caption: share of the
    findings that are named; of a film without: 1 for calling it normal, 1/2 for true denials alone. r, of a reasoning:
    1 where something true is said about `about`, else 0. A text that says nothing which can be checked is worth 0, and
    so is no text.
    """
    said, normal, torn = statements(text)
    there = [(found, ancestors(found["condition"])) for found in findings]
    named, true, false, denied, touched = set(), 0, [], 0, False
    for condition, label, words, sides, _ in said:
        of_it = [n for n, (_, names) in enumerate(there) if condition in names]
        fitting = [n for n in of_it if fits(words, sides, findings[n])]
        if sides == {"bilateral"} and {"left", "right"} <= {findings[n]["side"] for n in of_it}:
            fitting = of_it
        if label == NEGATIVE:
            wrong, denied = bool(fitting), denied + (not fitting)
        else:
            wrong = not fitting
            true += bool(fitting) and label == POSITIVE
        if wrong:
            false.append(("denies " if label == NEGATIVE else "says ") + condition)
        elif label != UNCERTAIN:
            named.update(fitting if label == POSITIVE else ())
            touched |= not about or bool(set(about) & {condition, *(ancestors(condition) if label == POSITIVE else ())})
    abnormal = [found for found in findings if found["condition"] != "Support Devices"]
    if normal and abnormal:
        false.append("says normal")
    elif normal:
        true, touched = true + 1, True
    false += ["says normal beside findings"] * torn
    false += [f"says {word}" for word in sorted(ELSEWHERE & set(words_and_marks(text)))]
    precise = true / (true + len(false)) if true or false else 1.0
    if about is not None:
        recall = float(touched)
    elif findings:
        recall = len(named) / len(findings)
    else:
        recall = 1.0 if normal else 0.5 if denied else 0.0
    return precise * recall - (1 - precise), ", ".join(false)[:120]


@functools.lru_cache(maxsize=8192)
def asked_about(question, answer=""):
    """-> frozenset of the conditions that question and answer name; None where neither asks for a finding."""
    names = {name for text in (question, answer) for name, *_ in conditions_of(text)}
    words = set(words_and_marks(question))
    asks = names or {"abnormal", "abnormality", "finding", "wrong", "device"} & words or NORMALITY & words
    return frozenset(names) if asks else None


def conditions_of(text):
    return [entry for entry in statements(text)[0] if entry[0] != "other"]


# ------------------------------------------------------------------------------------------------------ contradiction


@functools.lru_cache(maxsize=8192)
def contradiction(text, answer, question, kind):
    """-> how caption or reasoning contradicts the answer, "" where it does not, or where words do not settle it."""
    tokens = words_and_marks(text)
    if both := says_both(text, answer, question, kind):
        return both
    if REVOKED.search(text):
        return "the text takes back what it says"
    if any(concludes_otherwise(found[1], answer, question, kind) for found in CONCLUDED.finditer(text)):
        return "the text concludes otherwise"
    if kind == "yes/no":
        mine, theirs = polarity(answer, question), implied(text, question)
        if {"yes", "no"} == theirs:
            return "the text says yes and no"
        return f"the text says {min(theirs)}, the answer {mine}" if mine and theirs and mine not in theirs else ""
    said, denied = set(words_and_marks(answer)), negated(tokens)
    affirmed = set(tokens) - denied - NEGATORS - {"."}
    offered = {token for option, _ in options_of(question) for token in option}
    topic = set(words_and_marks(question)) - COMMON - offered - {".", "or"}
    clauses = [clause for clause in sentences(text) if topic & set(clause) or not set(clause) - COMMON - said - offered]
    near = {token for clause in clauses for token in clause} & affirmed
    for number, things in enumerate(EXCLUSIVE):
        mine = [n for n, words in enumerate(things) if words & said]
        found = affirmed if number < PER_IMAGE or not set(tokens) - COMMON - set().union(*things) else near
        theirs = [n for n, words in enumerate(things) if words & found]
        if len(mine) == 1 and theirs and mine[0] not in theirs and not things[mine[0]] & affirmed:
            return f"the answer says {min(things[mine[0]] & said)}, the text {min(things[theirs[0]] & found)}"
    if kind == "choice" and clauses:
        mine, theirs = choice(answer, question), choice(" . ".join(map(" ".join, clauses)), question)
        if None not in (mine, theirs) and mine != theirs:
            return "the text names another option"
    words = said - negated(words_and_marks(answer)) - COMMON - NEGATORS - {"."}
    if words and words <= denied and not words & affirmed:
        return "the text denies the answer"
    subjects = {word for before, word in zip(["", *tokens], tokens, strict=False) if before not in REFERENCE}
    here, there = ORGANS & said, ORGANS & affirmed & subjects
    if len(here) == len(there) == 1 and here != there and not here & set(tokens):
        return f"the answer is about the {here.pop()}, the text about the {there.pop()}"
    return ""


def concludes_otherwise(conclusion, answer, question, kind):
    """Is a conclusion another answer? An open one is where it is short and shares no word with the answer."""
    if kind in ("yes/no", "choice"):
        read = polarity if kind == "yes/no" else choice
        mine, theirs = read(answer, question), read(conclusion, question)
        return None not in (mine, theirs) and mine != theirs
    said = [word for word in normalise(conclusion) if word not in COMMON]
    return 0 < len(said) <= 4 and not set(said) & (set(normalise(answer)) | set(normalise(question)))


def says_both(text, answer, question, kind):
    """A text that leaves the answer open: all the answers there are side by side, or this one "or" another."""
    options = [" ".join(option) for option, _ in options_of(question)] if kind == "choice" else ["yes", "no"]
    words = "|".join(map(re.escape, options))
    joined = re.search(rf"\b({words})(?: (?:\.|or|and|versus))+ (?!\1)(?:{words})\b", " ".join(words_and_marks(text)))
    if joined and (kind == "choice" or kind == "yes/no" and joined[1] == "yes" or "or" in joined[0].split()):
        return "the text says both"
    said = set(normalise(answer)) - COMMON if kind != "yes/no" else set()
    for clause in sentences(text):
        if said and said <= set(clause) and {"or", "either", "versus"} & set(clause) - set(words_and_marks(question)):
            if not negated(clause) & said:
                return "the text leaves the answer open"
    return ""


def implied(text, question):
    """
    Which answer to a yes or no question a text amounts to -> a set of "yes" and "no", empty where it leaves it open.
    Conditions that the question names are looked up by the report labeller, on the side that it names; a question for
    normality is answered by any finding; else the question's own words count, as a statement or denied.
    """
    turned, question_words = asks_for_absence(question), words_and_marks(question)
    found, normal, _ = statements(text)
    asked = conditions_of(question)
    affirmed, denied = set(), set()
    for name, _, _, sides, _ in asked:
        for condition, label, _, where, word in found:
            if label == POSITIVE and name in ancestors(condition) and (sides & where or not sides or not where):
                affirmed.add((word, where))
            elif label == NEGATIVE and name == condition and (sides == where or not where):
                denied.add((word, where))
    both = any(
        word == other and (not here or not there or here == there) for word, here in affirmed for other, there in denied
    )
    truths = {True} if affirmed else {False} if denied else set()
    truths |= {False} if both else set()  # "Effusion. No effusion.", but not "A nodule, no mass"
    for clause in sentences(text):
        left = [token for token in clause if token not in COMMON | {"answer"}]
        if left in (["yes"], ["no"]):  # "No.", "The answer is no."
            truths.add((left == ["yes"]) != turned)
    tokens = words_and_marks(text)
    affirmed = set(tokens) - negated(tokens)
    for things in EXCLUSIVE[:PER_IMAGE]:  # "Is this a CT?" "It is an MRI."
        mine, theirs = (
            [n for n, words in enumerate(things) if words & some] for some in (set(question_words), affirmed)
        )
        truths |= {False} if len(mine) == 1 and theirs and mine[0] not in theirs else set()
    if not asked:
        wanted = set(question_words) - COMMON - NEGATORS - {".", "look", "call", "appearing"}
        film = not wanted - NORMALITY - {"abnormal", "abnormality", "finding", "chest", "xray", "radiograph", "film"}
        if film and wanted & (NORMALITY | {"abnormal", "abnormality", "finding"}):
            sick = [label for name, label, *_ in found if name != "Support Devices"]
            truths |= {True} if POSITIVE in sick or "abnormal" in words_and_marks(text) and not normal else set()
            truths |= {False} if normal and POSITIVE not in sick else set()
        else:
            truths |= plain_statements(text, wanted, turned)
    return {"yes" if truth != turned else "no" for truth in truths}


def plain_statements(text, wanted, turned):
    """Clauses with all the words that are asked about, or with some turned into their opposites -> True, False."""
    truths = set()
    for clause in sentences(text):
        words, denied = set(clause), negated(clause) | (set(clause) if {"absent", "free"} & set(clause) else set())
        if HEDGES & words or not wanted or {"normal", "abnormal"} <= words:
            continue
        missing = wanted - words
        if not missing:
            truths.add(bool(wanted & denied) == turned)
        elif wanted - missing and all(OPPOSITE.get(word) in words for word in missing):
            truths.add(turned)
    return truths


def sentences(text):
    """-> lists of tokens, one per clause between punctuation marks."""
    clauses = itertools.groupby(words_and_marks(text), key=lambda token: token == ".")
    return [list(tokens) for mark, tokens in clauses if not mark]


# ---------------------------------------------------------------------------------------------------------- penalties


def common_length(a, b):
    """Length of the longest common subsequence of two token lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


@functools.lru_cache(maxsize=2048)
def prompt_sentences(question, style):
    """What can be copied: the sentences of the question, and those of the instruction with at least three words."""
    return [s for s in sentences(question) if len(s) > 2] + [s for s in sentences(instruction(style)) if len(s) > 2]


def copying_term(texts, question, style):
    """
    1.0 where a sentence has more than COPIED of its words in common, in order, with a sentence of the prompt (of the
    longer of the two), else 0.0. To answer in the question's words is no copy: a question is copied as a question, with
    its first word ("Is there an effusion", but not "There is an effusion").
    """
    for text in texts:
        for sentence in sentences(text)[:50]:
            for prompt in prompt_sentences(question, style):
                longer, shorter = max(len(sentence), len(prompt)), min(len(sentence), len(prompt))
                if prompt[0] in STARTS and sentence[0] != prompt[0]:
                    continue
                if shorter > COPIED * longer and common_length(sentence, prompt) > COPIED * longer:
                    return 1.0
    return 0.0


def repetition_term(texts):
    """
    0 to 1: the largest share, over the texts, of words that repeat the one before, or of three words in a row that came
    before (from 8 words on; what is above 0.4, stretched to 0..1: "nodule in the left lung zone, mass in the left lung
    zone" is a list).
    """
    worst = 0.0
    for text in texts:
        words = normalise(text)
        if len(words) > 1:
            worst = max(worst, sum(a == b for a, b in zip(words, words[1:], strict=False)) / (len(words) - 1))
        if len(words) >= 8:
            triples = list(zip(words, words[1:], words[2:], strict=False))
            worst = max(worst, (0.6 - len(set(triples)) / len(triples)) / 0.6)
    return worst


def length_term(tokens, max_tokens):
    """0 up to half of what can be sampled, then rising to 1 at the limit: a rollout that is cut off loses all of it."""
    return min(1.0, max(0.0, tokens / max_tokens - 0.5) * 2)


def padding_term(text, texts):
    """1.0 for a response in a code fence, or with blank lines, BLANKS blanks or four equal marks in a row, else 0.0."""
    blank = re.compile(rf"\s{{{BLANKS + 1},}}|\n\s*\n|([^\w\s{{}}\[\]])(?:\s?\1){{3}}")
    return float(text.lstrip().startswith("```") or any(blank.search(part) for part in (text, *texts)))
