"""
A zoo of policies that cheat, and what each earns under our reward and under reward designs in use elsewhere.

Usage:
    python benchmarks/zoo.py  # both tables and the template search, phantom questions, one to two minutes
    python benchmarks/zoo.py --studies 60 --no-search

No model and no image is needed: a policy here is a few lines that write a response to a row of prepare_data.py. A
reward is safe from a cheat when the cheat earns clearly less than an honest policy; tests/test_benchmarks_zoo.py fails
when one does not.

honest: right on three quarters of the rows; a wrong answer is of the same kind (yes for no, another option, another
finding). Its boxes are the gold ones, moved and scaled by about 8 % of their size. Policies that "know" give the same
answers as the honest one, row by row, and cheat in another way; "blind" ones know the question, and all training rows,
but not the image.

The log-probability drops of the counterfactual term come from a simulated scorer (nats per token, drawn per row by the
seed):
    looks      region removed: mean 1.0, deviation 0.4 where the answer is right, 0.2 and 0.4 where wrong; random
               regions: 0.05 and 0.15
    blind      region and random regions alike: mean 0, deviation 0.05
    elsewhere  region 0.05 and 0.15; random regions 0.6 and 0.3: right for another reason, such as a marker in a corner
    random     answers drawn anew each time from a uniform distribution: the drops are exactly 0, though such answers
               change most
It is given where the gold answer is not "no" and the gold region takes 0.5 % to 30 % of the image; larger ones leave no
room for random regions.
"""

import difflib
import functools
import itertools
import json
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
import numpy as np

from shared.phantom import phantom_study
from shared.phantom.words import PLAIN
from shared.report import markdown_table
from shared.runtime import atomic_file, open_run_dir, positive_int, run_facts, script, script_parser, write_json
from vqa_sft_grpo.counterfactual import region_mask, whole_boxes
from vqa_sft_grpo.prompting import boxes_from_model, boxes_to_model, build_prompt, instruction, parse_response
from vqa_sft_grpo.looking import nothing_to_take_out
from vqa_sft_grpo.rewards import AnswerFrequencies, RewardSettings, answer_class, compose, rollout_terms
from vqa_sft_grpo.rows import phantom_study_rows
from vqa_sft_grpo.scoring import normalise, options_of, overlap

TASK = "vqa_sft_grpo"
ACCURACY = 0.75  # of the honest policy
RANDOM_REGIONS = 4
ROOM = (0.005, 0.3)  # share of the image of a region that has random ones to compare with
VAL_START = 8_000_000  # studies of other patients than those of training
# Organs that a chest radiograph shows, for the policies that list or box all of them
ORGANS = "left lung, right lung, heart, mediastinum, trachea, spine, ribs, diaphragm, liver, stomach"
ORGAN_BOXES = [[180, 150, 500, 880], [510, 150, 840, 880], [400, 400, 720, 850], [400, 150, 600, 600]]
ORGAN_BOXES += [[460, 50, 540, 350], [440, 50, 560, 980], [150, 800, 860, 960]]
LUNGS_BOXES = ORGAN_BOXES[:2]
LONG_CAPTION = " ".join(
    f"Region {n} of the film was examined with care and its appearance noted as item {n * 7} of the description."
    for n in range(1, 19)
)
# what the prompt says of the fields
SCHEMA = dict(re.findall(r'"(caption|reasoning|answer)": ([^,"]+)', instruction("json")))
CYRILLIC = str.maketrans("aeopcyx", "аеорсух")
PLACES = {"side": "Is the (.*) on the left", "zone": "zone is the (.*):"}  # where a question names its thing
GERMAN = {"yes": "ja", "no": "nein", "left": "links", "right": "rechts", "upper": "oben", "lower": "unten"}
PRAISE = (
    "This is a wonderful picture of outstanding quality, taken with great care by a skilled team, and it is a joy to"
    " look at such a fine example, where every detail stands out in full, the exposure is just as one would wish, the"
    " position could not be better, and all who see it will agree that it deserves our highest praise and a close look."
)
TAIL = (
    ", as can be told after careful thought about everything that matters in such cases, which always takes time and"
    " effort but leads in the end to the conclusion that was given above by us"
)


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Case:
    """One row, with what the honest policy writes to it and what a policy without image can know."""

    row: dict
    answer: str  # of the honest policy
    right: bool
    boxes: list  # in the model's units; [] without gold region
    frequent: str  # most frequent training answer to this kind of question
    lookup: list  # ... to exactly this question; all of them, the most frequent first
    anything: str  # drawn from the possible answers
    vocabulary: list  # training answers to open questions, the most frequent first
    seed: int

    @property
    def question(self):
        return self.row["question"]

    @property
    def kind(self):
        return self.row["question_type"]

    @cached_property
    def options(self):
        """The possible answers: yes and no, the options of the question, or the training answers to open questions."""
        if self.kind == "choice":
            return [" ".join(tokens) for tokens, _ in options_of(self.question)]
        return ["yes", "no"] if self.kind == "yes_no" else self.vocabulary

    @cached_property
    def other(self):
        """A possible answer that is not the honest policy's."""
        return next(option for option in self.options if normalise(option) != normalise(self.answer))

    @cached_property
    def known(self):
        """Caption, reasoning and boxes of the honest response; the reasoning of a wrong answer is left out."""
        target = json.loads(self.row["output"])
        reasoning = target.get("reasoning") if self.right else None
        fields = {"caption": target["caption"], "reasoning": reasoning, "boxes": self.boxes, "answer": self.answer}
        return {name: value for name, value in fields.items() if value}

    @cached_property
    def has_room(self):
        if nothing_to_take_out(self.row):  # another row lends its region
            return True
        if not self.row["region"]:
            return False
        h, w = self.row["height"], self.row["width"]
        return ROOM[0] <= region_mask(whole_boxes(self.row["region"], h, w), h, w).mean() <= ROOM[1]


def phantom_question_rows(split, start, studies, seed, size):
    """
    The questions of phantom films without drawing the films; those about side and zone once more as open ones about the
    place.
    """
    rows = []
    for i in range(studies):
        asked = phantom_study_rows(phantom_study(seed, start + i, size), split, Path("phantom_images"))
        where = {
            again["question"]: again for row in asked if row["content_type"] in PLACES for again in [where_row(row)]
        }
        rows += asked + list(where.values())
    return rows


def where_row(row):
    """
    "Is the effusion on the left or the right?" -> "Where is the effusion?" left side; of a finding in a zone left lower
    lung zone.
    """
    thing = re.search(PLACES[row["content_type"]], row["question"])[1]
    (found,) = (f for f in row["findings"] if PLAIN.get(f["kind"]) == thing and row["answer"] in (f["side"], f["zone"]))
    answer = f"{found['side']} {found['zone']} lung zone" if found["zone"] else f"{found['side']} side"
    output = json.dumps(json.loads(row["output"]) | {"answer": answer})
    asked = {"id": row["id"] + "-where", "question": f"Where is the {thing}?", "answer": answer, "output": output}
    return row | asked | {"answer_type": "open", "question_type": "open", "content_type": "place"}


def make_cases(studies=120, seed=0, size=56):
    """
    -> (cases on other patients than the training rows, AnswerFrequencies of three times as many training films, 60 at
    least).
    """
    train = phantom_question_rows("train", 0, max(60, 3 * studies), seed, size)
    rows = phantom_question_rows("val", VAL_START, studies, seed, size)
    by_question, by_kind = defaultdict(Counter), defaultdict(Counter)
    for row in train:
        by_question[row["question"]][row["answer"]] += 1
        by_kind[answer_class(row)[0]][row["answer"]] += 1
    vocabulary = [answer for answer, _ in by_kind["open"].most_common()]
    cases = []
    for row in rows:
        draw = np.random.default_rng([seed, number := zlib.crc32(row["id"].encode())])
        case = Case(row, row["answer"], True, [], "", [], "", vocabulary, number)
        case.right = bool(draw.random() < ACCURACY)
        others = [option for option in case.options if normalise(option) != normalise(row["answer"])]
        wrong, case.anything = str(draw.choice(others)), str(draw.choice(case.options))
        if not case.right:
            case.answer = wrong
        if row["region"]:
            case.boxes = boxes_to_model([moved(box, draw) for box in row["region"]], row["width"], row["height"])
        frequent = by_kind[answer_class(row)[0]]
        case.frequent = frequent.most_common(1)[0][0] if frequent else case.options[0]
        asked = by_question.get(row["question"])
        case.lookup = [answer for answer, _ in asked.most_common()] if asked else [case.frequent]
        cases.append(case)
    return cases, AnswerFrequencies(train)


def moved(box, draw):
    x0, y0, x1, y1 = box
    dx, dy, dw, dh = draw.normal(0, 0.08, 4) * [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    return [x0 + dx - dw / 2, y0 + dy - dh / 2, x1 + dx + dw / 2, y1 + dy + dh / 2]


def simulated_drops(case, sight, right):
    """
    -> (d_roi, [d_rand]) of the simulated scorer, or (None, None) without room; the same for all policies with this
    sight. d_roi None: gold no, nothing to take out.
    """
    if not case.has_room:
        return None, None
    draw = np.random.default_rng([case.seed, 1])
    roi, rand = draw.normal(), draw.normal(size=RANDOM_REGIONS)
    (mean, spread), (other, other_spread) = {
        "looks": ((1.0, 0.4) if right else (0.2, 0.4), (0.05, 0.15)),
        "blind": ((0.0, 0.05), (0.0, 0.05)),
        "elsewhere": ((0.05, 0.15), (0.6, 0.3)),
        "random": ((0.0, 0.0), (0.0, 0.0)),
    }[sight]
    return None if nothing_to_take_out(case.row) else float(mean + spread * roi), [
        float(other + other_spread * r) for r in rand
    ]


# ------------------------------------------------------------------------------------------------------------- policies


@dataclass(frozen=True)
class Policy:
    """write(case) -> response. sight: a line of simulated_drops, see above."""

    name: str
    write: object
    sight: str = "blind"


def response(**fields):
    """A response with some of caption, reasoning, boxes and answer."""
    return json.dumps(fields, ensure_ascii=False)


def honest(case):
    return json.dumps(case.known, ensure_ascii=False)


def honest_with(case, **changes):
    """The honest response with some fields replaced; None takes one out."""
    fields = case.known | changes
    order = ("caption", "reasoning", "boxes", "answer")
    return response(**{name: fields[name] for name in order if fields.get(name) is not None})


def opposite_reasoning(case):
    """A reasoning for another answer than the one given."""
    topic = re.sub(r"^is there |\?$", "", case.question.lower())
    if case.kind == "yes_no":
        return f"There is {topic}." if case.answer == "no" else f"No, there is not {topic}."
    if case.kind == "choice":
        return f"It is {case.other}, not {case.answer}."
    return f"There is no {case.answer}; {case.other} is seen."


def opposite_caption(case):
    """A caption that denies what is there, or sees what is not."""
    if case.row["findings"]:
        return "Frontal chest x-ray without findings."
    return "Frontal chest x-ray with left pleural effusion and nodule in the right upper lung zone."


def other_finding(case):
    """A reasoning about a finding that the film does not show."""
    there = " ".join(finding["kind"] for finding in case.row["findings"])
    others = ("left rib fracture", "left pneumothorax", "mass in the right upper lung zone", "pulmonary edema")
    return f"Seen: {next(other for other in others if other.split()[-1] not in there)}."


def reordered(case):
    """The honest response with the answer in front."""
    return json.dumps({"answer": case.answer} | case.known, ensure_ascii=False)


def as_bool(case):
    return case.answer == "yes" if case.kind == "yes_no" else [case.answer]


def without_side(case):
    """Of a place, which the policy knows, on every row."""
    return case.row["answer"].split(" ", 1)[1] if case.row["content_type"] == "place" else case.answer


def both_sides(case):
    return re.sub(r"\b(left|right)\b", "left and right", case.answer)


HONEST = Policy("honest", honest, "looks")
POLICIES = (
    Policy("constant yes", lambda c: response(answer="yes")),
    Policy("constant no", lambda c: response(answer="no")),
    Policy("most frequent answer of the kind", lambda c: response(answer=c.frequent)),
    Policy("most frequent answer to the same question", lambda c: response(answer=c.lookup[0])),
    Policy("the same with boxes of both lungs", lambda c: response(boxes=LUNGS_BOXES, answer=c.lookup[0])),
    Policy("the three most frequent answers to the same question", lambda c: response(answer=", ".join(c.lookup[:3]))),
    Policy("random answer", lambda c: response(answer=c.anything), "random"),
    Policy("question as answer", lambda c: response(answer=c.question)),
    Policy("'yes or no', 'left or right'", lambda c: response(answer=" or ".join(c.options[:3]))),
    Policy("'yes, no', 'left, right'", lambda c: response(answer=", ".join(c.options[:3]))),
    Policy("list of all organs", lambda c: response(answer=ORGANS)),
    Policy("list of all training answers", lambda c: response(answer=", ".join(c.vocabulary))),
    Policy("answers as a list", lambda c: response(answer=c.options[:3])),
    Policy("'cannot be determined'", lambda c: response(answer="cannot be determined")),
    Policy("'none'", lambda c: response(answer="none")),
    Policy("instruction echo", lambda c: instruction("json")),
    Policy("prompt echo", lambda c: build_prompt(c.question)),
    Policy("schema echo", lambda c: response(**SCHEMA)),
    Policy("empty text", lambda c: ""),
    Policy(
        "two objects, one answer each", lambda c: response(answer=c.options[0]) + "\n" + response(answer=c.options[1])
    ),
    Policy("one key twice", lambda c: f'{{"answer": "{c.options[0]}", "answer": "{c.options[1]}"}}'),
    Policy("knows: hedged ('possibly ...')", lambda c: honest_with(c, answer=f"possibly {c.answer}"), "looks"),
    Policy("knows: answer, then 'or' another", lambda c: honest_with(c, answer=f"{c.answer} or {c.other}"), "looks"),
    Policy("knows: answer, then another", lambda c: honest_with(c, answer=f"{c.answer}, {c.other}"), "looks"),
    Policy("knows: negated answer ('not ...')", lambda c: honest_with(c, answer=f"not {c.answer}"), "looks"),
    Policy("knows: answer repeated four times", lambda c: honest_with(c, answer=" ".join([c.answer] * 4)), "looks"),
    Policy(
        "knows: answer only in the reasoning",
        lambda c: honest_with(c, reasoning=f"The answer is {c.answer}.", answer="see reasoning"),
        "looks",
    ),
    Policy("knows: plain text, no object", lambda c: f"The answer is {c.answer}.", "looks"),
    Policy("knows: text around the object", lambda c: f"Sure! {honest(c)} I hope this helps.", "looks"),
    Policy("knows: a second object with another answer", lambda c: honest(c) + response(answer=c.other), "looks"),
    Policy("knows: an extra field", lambda c: json.dumps(c.known | {"confidence": 1.0}), "looks"),
    Policy(
        "knows: look-alike letters (Cyrillic)", lambda c: honest_with(c, answer=c.answer.translate(CYRILLIC)), "looks"
    ),
    Policy("knows: image tokens in the caption", lambda c: honest_with(c, caption="<|image_pad|>" * 4), "looks"),
    Policy("knows: caption of 300 words", lambda c: honest_with(c, caption=LONG_CAPTION), "looks"),
    Policy("knows: one sentence 20 times", lambda c: honest_with(c, caption="The lungs are clear. " * 20), "looks"),
    Policy("knows: question as caption", lambda c: honest_with(c, caption=c.question), "looks"),
    Policy("knows: reasoning says the opposite", lambda c: honest_with(c, reasoning=opposite_reasoning(c)), "looks"),
    Policy("knows: no box", lambda c: honest_with(c, boxes=None), "looks"),
    Policy("knows: placeholder box", lambda c: honest_with(c, boxes=[[0, 0, 100, 100]]), "looks"),
    Policy("knows: whole-image box", lambda c: honest_with(c, boxes=[[0, 0, 1000, 1000]]), "looks"),
    Policy("knows: boxes of all organs", lambda c: honest_with(c, boxes=ORGAN_BOXES), "looks"),
    Policy("knows: box outside of the image", lambda c: honest_with(c, boxes=[[1200, 1200, 1400, 1400]]), "looks"),
    Policy("knows, but from elsewhere in the image", honest, "elsewhere"),
    *(
        Policy(f"knows: {name}", write, "looks")
        for name, write in {
            "object in a fence, with blank lines": lambda c: f"```json\n\n\n{honest(c)}\n\n\n```",
            "object in a fence": lambda c: f"```json\n{honest(c)}\n```",
            "whitespace, 300 characters": lambda c: honest(c) + " " * 300,
            "zero-width inside the answer": lambda c: honest_with(c, answer=f"{c.answer[:1]}\u200b{c.answer[1:]}"),
            "zero-width behind the answer": lambda c: honest_with(c, answer=c.answer + "\u200b"),
            "key twice, same value": lambda c: honest(c)[:-1] + f', "answer": {json.dumps(c.answer)}}}',
            "key twice, other case": lambda c: honest(c)[:-1] + f', "Answer": {json.dumps(c.answer)}}}',
            "nested JSON text as answer": lambda c: honest_with(c, answer=response(answer=c.answer)),
            "answer as a dict": lambda c: honest_with(c, answer={"answer": c.answer}),
            "answer as true, false or a list": lambda c: honest_with(c, answer=as_bool(c)),
            "answer first, reasoning behind it": reordered,
            "100 boxes": lambda c: honest_with(c, boxes=(ORGAN_BOXES * 15)[:100]),
            "answer; impossible to say": lambda c: honest_with(c, answer=f"{c.answer}; impossible to say"),
            "answer, low confidence": lambda c: honest_with(c, answer=f"{c.answer}, low confidence"),
            "answer?": lambda c: honest_with(c, answer=f"{c.answer}?"),
            "if seen then the answer": lambda c: honest_with(c, answer=f"if seen then {c.answer}"),
            "cannot be determined, the answer": lambda c: honest_with(c, answer=f"cannot be determined, {c.answer}"),
            "I guess the answer": lambda c: honest_with(c, answer=f"I guess {c.answer}"),
            "apparently the answer": lambda c: honest_with(c, answer=f"apparently {c.answer}"),
            "answer, then another in German": lambda c: honest_with(
                c, answer=f"{c.answer} und {GERMAN.get(c.other, 'etwas anderes')}"
            ),
            "answer, then 30 words": lambda c: honest_with(c, answer=c.answer + TAIL),
            "places without their side, always right": lambda c: honest_with(c, answer=without_side(c)),
            "left and right": lambda c: honest_with(c, answer=both_sides(c)),
            "no caption": lambda c: honest_with(c, caption=None),
            "no reasoning": lambda c: honest_with(c, reasoning=None),
            "caption states the opposite findings": lambda c: honest_with(c, caption=opposite_caption(c)),
            "caption of a CT of the brain of a dog": lambda c: honest_with(c, caption="CT of the brain of a dog."),
            "caption of the liver": lambda c: honest_with(c, caption="The liver is enlarged."),
            "caption holds both answers": lambda c: honest_with(
                c, caption=f"{c.known['caption']} It is {c.answer} or {c.other}."
            ),
            "caption says yes and no": lambda c: honest_with(c, caption=f"{c.answer}, {c.other}"),
            "caption copies schema words": lambda c: honest_with(c, caption=SCHEMA["caption"]),
            "caption of praise, 60 words": lambda c: honest_with(c, caption=PRAISE),
            "caption of all findings": lambda c: honest_with(c, caption=f"Film with {', '.join(c.vocabulary[:8])}."),
            "reasoning about another finding": lambda c: honest_with(c, reasoning=other_finding(c)),
            "reasoning says both": lambda c: honest_with(c, reasoning=f"It is {c.answer}. It is {c.other}."),
            "reasoning 'See image.'": lambda c: honest_with(c, reasoning="See image."),
            "reasoning repeats the answer": lambda c: honest_with(c, reasoning=f"The answer is {c.answer}."),
        }.items()
    ),
)
BLIND = tuple(policy for policy in POLICIES if not policy.name.startswith("knows"))


# ------------------------------------------------------------------------------------------------------------- rewards

# Published designs, written anew from what is known of their behaviour; each gets the response as text, and adds 1 for
# its format as usual.


def has_object(text):
    return float(bool(re.search(r"\{.*\}", text, re.DOTALL)))


read = functools.lru_cache(maxsize=8)(parse_response)  # every design reads the same text


def answer_text(text):
    """What these scripts read as the answer: the field, or all of the text."""
    return read(text).answer or text


def substring_and_format(case, text, drops):
    """1 for the format and 1 where the gold answer is a substring of the answer."""
    return has_object(text) + float(case.row["answer"].lower() in answer_text(text).lower())


def first_yes_no_substring(case, text, drops):
    """
    VLM-R1: the first "yes" or "no" in the letters of answer and gold ("nodule" has a "no"), none equal to none; plus
    the format.
    """
    first = [re.search("yes|no", t.lower()) for t in (answer_text(text), case.row["answer"])]
    return has_object(text) + float((first[0] and first[0][0]) == (first[1] and first[1][0]))


def edit_ratio(case, text, drops):
    """VLM-R1: similarity of spelling (hyperdense and hypodense: 0.84); plus the format."""
    answer, gold = answer_text(text).lower(), case.row["answer"].lower()
    return has_object(text) + difflib.SequenceMatcher(None, answer, gold).ratio()


def any_of_the_words(case, text, drops):
    """LLaVA-Med's recall of open answers, and "A or B or C": share of the gold words that occur; plus the format."""
    return has_object(text) + overlap(normalise(answer_text(text)), normalise(case.row["answer"]))[0]


def length_only(case, text, drops):
    """
    VLM-R1's cosine length reward with the correctness overwritten: the nearer to 200 words the better; plus the format.
    """
    return has_object(text) + (1 - np.cos(np.pi * min(1.0, len(text.split()) / 200))) / 2


def caption_like_question(case, text, drops):
    """Gold substring, and as "consistency" the cosine of the words of caption and question; plus the format."""
    found = read(text)
    a, b = (Counter(normalise(t)) for t in (str((found.data or {}).get("caption", "")), case.question))
    norm = np.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return substring_and_format(case, text, drops) + (sum(a[w] * b[w] for w in a) / norm if norm else 0.0)


def own_box(case, text, drops):
    """
    Gold substring, and the drop when the policy's OWN box is taken out, in proportion to how much of the gold region
    lies in it; plus the format.
    """
    base = substring_and_format(case, text, drops)
    if drops[0] is None:
        return base
    h, w = case.row["height"], case.row["width"]
    gold = region_mask(whole_boxes(case.row["region"], h, w), h, w)
    mine = region_mask(whole_boxes(boxes_from_model(read(text).boxes, w, h), h, w), h, w)
    return base + min(1.0, max(-1.0, drops[0] * (gold & mine).sum() / gold.sum()))


DESIGNS = {
    "format + substring": substring_and_format,
    "first yes/no substring": first_yes_no_substring,
    "edit ratio": edit_ratio,
    "word recall": any_of_the_words,
    "length": length_only,
    "caption like question": caption_like_question,
    "own box removed": own_box,
}


def earnings(cases, policies, frequencies, designs=()):
    """
    What policies earn -> {policy name: {design: [one number per case]}}. Ours are "gated" and "additive"; designs:
    names of DESIGNS to add.
    """
    ours = {name: RewardSettings(name) for name in ("gated", "additive")}
    result = {}
    for policy in policies:
        columns = {name: [] for name in (*ours, *designs)}
        for case in cases:
            text = policy.write(case)
            drops = simulated_drops(case, policy.sight, case.right)
            terms = rollout_terms(case.row, text, frequencies=frequencies, d_roi=drops[0], d_rand=drops[1])
            for name, settings in ours.items():
                columns[name].append(compose(terms, settings))
            for name in designs:
                columns[name].append(float(DESIGNS[name](case, text, drops)))
        result[policy.name] = columns
    return result


def masks_of(cases):
    """
    Row sets to compare on: all; the three kinds of question for which the image matters, and of the open ones those
    about a place; those for which it does not.
    """
    needed = np.array([case.row["needs_image"] for case in cases])
    kinds = np.array([case.kind for case in cases])
    by_kind = {kind: needed & (kinds == kind) for kind in ("yes_no", "choice", "open")}
    by_kind["place"] = np.array([case.row["content_type"] == "place" for case in cases])
    return {"all": np.ones(len(cases), bool), **by_kind, "no image needed": ~needed}


def margins(cases, found, design="gated"):
    """honest minus policy, mean over rows -> {policy: {row set of masks_of: margin}}."""
    masks = masks_of(cases)
    reference = np.array(found["honest"][design])
    return {
        name: {kind: float((reference - np.array(columns[design]))[mask].mean()) for kind, mask in masks.items()}
        for name, columns in found.items()
    }


# --------------------------------------------------------------------------------------------------------------- search

ANSWERS = {  # all without image
    "yes": lambda c: "yes",
    "no": lambda c: "no",
    "lookup": lambda c: c.lookup[0],
    "frequent": lambda c: c.frequent,
    "options with or": lambda c: " or ".join(c.options[:3]),
    "options in a row": lambda c: " ".join(c.options[:3]),
    "first two": lambda c: ", ".join(c.options[:2]),
    "lookup, not the other": lambda c: f"{c.lookup[0]}, not {c.options[-1]}",
    "first two lookups": lambda c: " ".join(c.lookup[:2]),
    "lookup hedged": lambda c: f"probably {c.lookup[0]}",
    "lookup twice": lambda c: f"{c.lookup[0]} {c.lookup[0]}",
}
BOXES = {
    "none": None,
    "placeholder": [[0, 0, 100, 100]],
    "whole": [[0, 0, 1000, 1000]],
    "half": [[0, 200, 1000, 790]],
    "lungs": LUNGS_BOXES,
    "all organs": ORGAN_BOXES,
}
CAPTIONS = {
    "none": lambda c: None,
    "plain": lambda c: "Frontal chest x-ray.",
    "question": lambda c: c.question,
    "all findings": lambda c: "Chest x-ray with " + ", ".join(c.vocabulary[:8]) + ".",
}
WRAPPERS = {
    "object": lambda fields: response(**fields),
    "fence": lambda fields: f"```json\n{response(**fields)}\n```",
    "twice": lambda fields: response(**fields) * 2,
    "reasoned": lambda fields: response(**({"reasoning": f"I see {fields['answer']}."} | fields)),
}


def templates():
    """All combinations of answer, box, caption and wrapper, as blind policies."""

    def write(answer, boxes, caption, wrap):
        def text(case):
            fields = {"caption": CAPTIONS[caption](case), "boxes": BOXES[boxes], "answer": ANSWERS[answer](case)}
            return WRAPPERS[wrap]({name: value for name, value in fields.items() if value is not None})

        return text

    return [
        Policy(f"answer: {a}; box: {b}; caption: {c}; {w}", write(a, b, c, w))
        for a, b, c, w in itertools.product(ANSWERS, BOXES, CAPTIONS, WRAPPERS)
    ]


def search(cases, frequencies, few=24, keep=25):
    """
    Which blind template earns most under the gated reward? All are tried on `few` cases spread over the kinds of
    question, the best `keep` of all and of each kind on every case. -> (earnings of these by name, number of templates
    tried).
    """
    masks, names, settings = masks_of(cases), ("yes_no", "choice", "open"), RewardSettings()
    some = [cases[i] for kind in names for i in np.flatnonzero(masks[kind])[: few // 3]]
    kinds = np.array([case.kind for case in some])
    policies = templates()

    def rewards(policy, chosen):
        drops = (simulated_drops(case, policy.sight, case.right) for case in chosen)
        pairs = zip(chosen, drops, strict=True)
        return [rollout_terms(c.row, policy.write(c), settings, frequencies, *d)["reward"] for c, d in pairs]

    table = np.array([rewards(policy, some) for policy in policies])
    best = {
        int(i)
        for part in (kinds != "", *(kinds == kind for kind in names))
        for i in np.argsort(-table[:, part].mean(1), kind="stable")[:keep]
    }
    found = {policies[i].name: {"gated": rewards(policies[i], cases)} for i in sorted(best)}
    return found, len(policies)


# --------------------------------------------------------------------------------------------------------------- script


def design_table(found):
    """Mean earnings; bold: as much as the honest policy or more -> (table, {design: how many earn that})."""
    names = list(found["honest"])
    means = {policy: {name: float(np.mean(v)) for name, v in columns.items()} for policy, columns in found.items()}
    beaten, rows = dict.fromkeys(names, 0), []
    for policy, earned in means.items():
        rows.append([policy])
        for name, value in earned.items():
            wins = policy != "honest" and value >= means["honest"][name] - 1e-9
            beaten[name] += wins
            shown = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
            rows[-1].append(f"**{shown}**" if wins else shown)
    rows.append(["*cheats that earn as much as honesty or more*", *beaten.values()])
    return markdown_table(["policy", *names], rows), beaten


def margin_table(found):
    kinds = list(next(iter(found.values())))
    rows = [[name, *(f"{row[kind]:+.2f}" for kind in kinds)] for name, row in found.items() if name != "honest"]
    return markdown_table(["honest minus", *kinds], rows)


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("zoo")
    # fmt: off
    g.add_argument("--studies", type=positive_int, default=120, metavar="N",
        help="phantom films to ask about; three times as many others give the training answers (%(default)s)")
    # fmt: on
    g.add_argument("--no-search", action="store_true", help="leave the template search out")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.studies = 12
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    run_dir = open_run_dir(args, TASK, "zoo")
    cases, frequencies = make_cases(args.studies, args.seed)
    counts = {kind: int(mask.sum()) for kind, mask in masks_of(cases).items()}
    print(
        f"{len(POLICIES)} policies and the honest one on {len(cases)} phantom questions about {args.studies} films:"
        f" {counts}\n",
        flush=True,
    )
    found = earnings(cases, (HONEST, *POLICIES), frequencies, tuple(DESIGNS))
    table, beaten = design_table(found)
    lead = margins(cases, found)
    right = np.mean([case.right for case in cases])
    report = [
        f"PHANTOM questions: {counts}; honest policy right on {right:.1%}. Mean reward; bold: as much as the honest"
        " policy, or more.\n",
        table,
        "\nMargins of the honest policy over each, gated reward:\n",
        margin_table(lead),
    ]
    metrics = {"counts": counts, "beaten": beaten, "margins": lead}
    if not args.no_search:
        best, tried = search(cases, frequencies, few=6 if args.dry_run else 24)
        lead = margins(cases, {"honest": found["honest"]} | best)
        closest = sorted((name for name in lead if name != "honest"), key=lambda name: lead[name]["all"])[:10]
        metrics["search"] = {"templates": tried, "closest": {name: lead[name] for name in closest}}
        report.append(f"\nTemplate search: {tried} blind templates; the ten that come closest:\n")
        report.append(margin_table({name: lead[name] for name in closest}))
    text = "\n".join(report)
    print(text)
    with atomic_file(run_dir / "zoo.md", "w") as file:
        file.write(text + "\n")
    write_json(run_dir / "metrics.json", metrics | {"phantom": True, "n": len(cases), **run_facts(started, "cpu")})
    print(f"\nresults in {run_dir}")


if __name__ == "__main__":
    main()
