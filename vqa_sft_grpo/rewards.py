"""
What one rollout earns, term by term, and why.

    terms = score_rollouts(rows, texts, settings, frequencies, drops, tokens)  # one dict per rollout; drops: looking.py
    terms[0]["reward"]; print("\\n".join(explain(rows[0], texts[0], terms[0])))

Terms of a rollout; None where a row does not define one (no region, no reasoning): it then counts as nothing.

    gate        1 when the text is one JSON object of the four known fields (or <think>..</think><answer>..</answer>)
                and nothing else, at most in a code fence, without image or chat tokens; else 0
    A answer    0 to 1, see answer_worth.py: 0 for a wrong, hedged or contradicting one, less for words beside it. Times
                the inverse frequency of the gold answer in the training rows, 0.5 to 2
    B box       IoU of all boxes together with the gold region, 0 for none, a placeholder, or more than 60 % of the
                image; times (n + 1) / boxes where there are more than n + 1 boxes for n gold ones; None without gold
    T text      (c + r) / 2, c and r the truth of caption and reasoning, -1 to 1, by what the film shows: text_worth.py.
                0 for none, for one that says nothing, and for one written behind the answer, which it cannot have
                settled. None where the row does not say what the film shows ("findings": all but the phantom): there
                nothing of a caption is checked, and only C of a reasoning
    C contra-   -1 when caption or reasoning contradicts the answer (yes or no, side, zone, organ, modality, negation)
      diction   or says both, else 0; None without either
    V counter-  clip(min(d_roi, 1) - max_k d_rand, -1, 1), in nats: how much less likely the policy finds its OWN answer
      factual   (the sum over its tokens, read after its own caption and reasoning, and with what these say of the
                matter: looking.py) when the gold region is taken out of the image, minus the same for random regions
                of equal area. Of these the one that matters most counts, not their mean: an answer that also hangs on
                something else, which one of four regions happens to cover, must not pass. d_roi is limited by itself,
                so that a large one cannot hide that. Where what is asked about is absent (looking.nothing_to_take_out:
                mostly a gold no) V = clip(-max_k d_rand, -1, 0): regions filled in at random must not turn it into a
                yes (without this a policy may take any filled region for a yes). None without gold region; such a row
                is lent that of another row, for the size
    P penalty   too long + repetition + question or instruction copied + padding, each 0 to 1, together at most 1

composition="gated", the default; f, a, s, v are the four weights divided by their defaults 0.2, 0.4, 0.2, 0.2:

    R = gate (min(1.5 max(1, a), a A (1 + 0.3 v V+)) + 0.25 s B + 0.5 s (T+ + T-) + 0.3 v V-) - 0.2 f P + 0.2 s C
    V+ = max(V, 0) where the answer is right (A before its frequency above 0.5), else 0;    V- = min(V, 0)
    T+ = (max(c, 0) + max(r, 0)) / 2 where the answer is right, else 0;    T- = (min(c, 0) + min(r, 0)) / 2

With the default weights R lies in [-1.2, 2.25]. Only the answer's part is capped at 1.5: a cap on the whole would hide
box and penalties of every right answer whose frequency weight is near 2 (benchmarks/zoo.py: a caption of 300 words then
cost 0.03 instead of 0.2).

composition="additive", the plain weighted sum that is usual, for comparison (what it lets through: benchmarks/zoo.py):

    R = w_format (gate - P) + w_answer A + w_consistency (B + C + T) + w_counterfactual V

Format is a gate and no income: paid for, it would pay every wrong answer alike. V multiplies A: looking at the right
place earns nothing without being right, and being right for another reason costs. V is measured on the gold region (a
model chooses its own box so as to look good) and on this rollout (what is read from a file is the same for all rollouts
of a prompt, so that the group's mean takes it away: the fields IGNORED of older files).

What V is: a counterfactual regulariser that gold regions supervise. It knows more than the answers do (where the
evidence lies), so what it is worth is seen beside other uses of the same regions: docs/results/vqa_sft_grpo.md.

What V can do. Rollouts of one prompt with the same answer after texts that do not name the finding have nearly the same
V: as a number it sets right answers further apart from wrong ones where the model looks at the region, and nearer where
it does not, but hardly one right answer from another. What teaches a policy to look is the other half of the gradient,
through V itself: slope(), images_of_v() and Policy.reward_gradient().
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass


from shared.runtime import InputError
from vqa_sft_grpo.counterfactual import nearest, region_iou, region_mask, whole_boxes
from vqa_sft_grpo.looking import counterfactual_term, gold_of, nothing_to_take_out
from vqa_sft_grpo.answer_worth import accuracy_of
from vqa_sft_grpo.gate import gate_problem, written
from vqa_sft_grpo.prompting import boxes_from_model, check_style, parse_response
from vqa_sft_grpo.scoring import choice, normalise, options_of, score_answer
from vqa_sft_grpo.text_worth import asked_about, contradiction, copying_term, length_term, padding_term
from vqa_sft_grpo.text_worth import repetition_term, truth

COMPOSITIONS = ("gated", "additive")
TERMS = ("format", "answer", "consistency", "counterfactual")
DEFAULT_WEIGHTS = (0.2, 0.4, 0.2, 0.2)
IGNORED = "delta_cf_roi delta_cf_rand valid_json answer_correct".split()  # that evaluate.py --export-grpo wrote
RIGHT = 0.5  # of A, before the frequency: above it V+ counts
MOST = 1.5  # that the answer's part of the reward can be
CAP = 2.0  # of the frequency weight, and 1 / CAP its floor: an answer that is always the same must not be forgotten
TOO_LARGE = 0.6  # share of the image
PLACEHOLDERS = ([0, 0, 100, 100], [0, 0, 1, 1], [0, 0, 10, 10])  # boxes of prompts and examples
BOX, TEXT = 0.25, 0.5  # what a perfect box and a true text add to a right answer

MEANINGS = {  # of what a rollout's dict holds, for the head of a log
    "reward": "what the rollout earned",
    "format": "gate - penalty",
    "answer": "A: accuracy x class_weight",
    "consistency": "B + C + T",
    "counterfactual": "V",
    "gate": "1: exactly one object of known fields, or the two marks; 0 otherwise",
    "gate_why": "why the gate is closed",
    "level": "what had to be mended to read it, prompting.REPAIR_LEVELS",
    "said": "the answer that was read",
    "kind": "yes/no, choice, closed or open",
    "accuracy": "A before the frequency weight",
    "class_weight": "inverse frequency of the gold answer in the training rows, 0.5 to 2",
    "correct": "right by the strict score of the evaluation",
    "parsed": "an answer of the kind asked for",
    "opposite": "contradicts the gold answer",
    "hedged": "leaves a way out",
    "box": "B: IoU with the gold region",
    "box_why": "why it is 0",
    "text": "T: mean of the next two",
    "caption_truth": "c, -1 to 1; 0: no caption, or nothing in it that can be checked",
    "reasoning_truth": "r, the same of the reasoning",
    "text_why": "what they say that is false",
    "contradiction": "C: -1 where caption or reasoning contradicts the answer",
    "contradiction_why": "how",
    "length": "too long, 0 to 1",
    "repetition": "share of repeated words, 0 to 1",
    "copying": "1: a sentence is the question or the instruction",
    "padding": "1: code fence, blank lines, many blanks, a mark many times",
    "penalty": "P: their sum, at most 1",
    "d_roi": "drop of the statement's log-probability without the gold region, nats; None: nothing is taken out",
    "d_rand": "mean of the same over random regions",
    "d_rand_each": "for each of them",
    "explained": "the text before the answer names what is asked about; what it says of it is then part of V",
    "gap_response": "explained ones: drop of the whole response without the region minus mean without random ones",
    "counterfactual_why": "why V is undefined",
}


def parse_weights(weights):
    """
    "0.2,0.4,0.2,0.2" or four numbers, of format, answer, consistency and counterfactual -> tuple of floats; InputError.
    """
    parts = weights.split(",") if isinstance(weights, str) else weights
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != len(TERMS) or not all(0 <= n < math.inf for n in numbers) or not any(numbers):
        raise InputError(
            f"the reward weights are {weights!r}; give four numbers of at least 0, not all 0, for {', '.join(TERMS)}:"
            " 0.2,0.4,0.2,0.2"
        )
    return numbers


@dataclass(frozen=True)
class RewardSettings:
    """
    composition: of COMPOSITIONS. weights: of TERMS, or the text "0.2,0.4,0.2,0.2". max_tokens: the longest response
    that can be sampled.
    """

    composition: str = "gated"
    weights: tuple = DEFAULT_WEIGHTS
    max_tokens: int = 256
    style: str = "json"

    def __post_init__(self):
        object.__setattr__(self, "weights", parse_weights(self.weights))
        check_style(self.style)
        if self.composition not in COMPOSITIONS:
            known = " and ".join(COMPOSITIONS)
            raise InputError(f"there is no reward composition '{self.composition}'; there are {known}")

    def shares(self):
        """The four weights over their defaults."""
        return tuple(w / default for w, default in zip(self.weights, DEFAULT_WEIGHTS, strict=True))


DEFAULT_SETTINGS = RewardSettings()


def ignored_fields(rows):
    """-> one sentence that names the fields of rows of older files that no reward reads, "" where there are none."""
    counts = Counter(name for row in rows for name in IGNORED if name in row)
    named = ", ".join(f"{name} ({n} rows)" for name, n in counts.items())
    why = "ignored, since rewards are measured on each rollout and never read from a file"
    return f"the rows hold {named}: {why}" if named else ""


def answer_type_of(row):
    """Of older files, which do not say: closed when the gold answer is yes or no, or the question offers options."""
    if row.get("answer_type"):
        return row["answer_type"]
    return "closed" if normalise(gold_of(row)) in (["yes"], ["no"]) or options_of(row["question"]) else "open"


# ----------------------------------------------------------------------------------------------------- answer frequency


def answer_class(row):
    """-> (group of questions with the same possible answers, the gold answer's class in it, number of them or None)."""
    return class_of(gold_of(row), answer_type_of(row), row["question"])


@functools.lru_cache(maxsize=8192)
def class_of(gold, answer_type, question):
    kind = score_answer(None, gold, answer_type, question)["kind"]
    said = " ".join(normalise(gold))
    if kind == "choice":
        options = [" ".join(tokens) for tokens, _ in options_of(question)]
        return "choice: " + " | ".join(sorted(options)), options[choice(gold, question)], len(options)
    return kind, said, 2 if kind == "yes/no" else None


class AnswerFrequencies:
    """
    Inverse frequencies of gold answers, from training rows only: rows of another split are left out.

    weight(row) = (n + m) / (m (n_c + 1)) within [1/CAP, CAP]: n training rows of the group (yes/no; questions with the
    same options; open), n_c of them with this answer, m possible answers (open: those that occur). One is added to each
    count, so an answer that never occurred has a weight too. A constant answer to questions with m possible ones earns
    about 1/m on average, however often it is right, and never more than about a half.
    """

    def __init__(self, rows):
        self.counts, self.classes = {}, {}
        for row in rows:
            if row.get("split", "train") == "train":
                group, answer, classes = answer_class(row)
                self.counts.setdefault(group, Counter())[answer] += 1
                self.classes[group] = classes

    def weight(self, row):
        group, answer, classes = answer_class(row)
        if not (counts := self.counts.get(group)):
            return 1.0
        classes = classes or len(counts)
        weight = (counts.total() + classes) / (classes * (counts[answer] + 1))
        return min(CAP, max(1 / CAP, weight))


# ------------------------------------------------------------------------------------------------------------ the terms


def answer_to_score(text, settings=DEFAULT_SETTINGS, row=None):
    """-> the answer of a rollout whose V can matter, else None: behind a closed gate it counts nothing."""
    found = parse_response(text, settings.style)
    return None if gate_problem(text, found, settings.style, row) else found.answer


def box_term(row, found):
    """-> (B, why it is 0). None: the row has no gold region, or one so large that a box says nothing."""
    region, width, height = row.get("region"), row.get("width"), row.get("height")
    if not region or not width or not height:
        return None, ""
    if region_mask(whole_boxes(region, height, width), height, width).mean() > TOO_LARGE:
        return None, ""
    if not found.boxes:
        return 0.0, "no box"
    if any([round(v) for v in box] in PLACEHOLDERS for box in found.boxes):
        return 0.0, "placeholder"
    boxes = nearest(boxes_from_model(found.boxes, width, height))
    inside = whole_boxes(boxes, height, width)
    if not inside:
        return 0.0, "no box with an area inside of the image"
    if region_mask(inside, height, width).mean() > TOO_LARGE:
        return 0.0, f"more than {TOO_LARGE:.0%} of the image"
    value = region_iou(boxes, region, height, width)
    if not value:
        return 0.0, "outside of the gold region"
    allowed = len(region) + 1
    if len(boxes) > allowed:  # boxes of everything are sure to hit something
        return value * allowed / len(boxes), f"{len(boxes)} boxes for {len(region)}"
    return value, ""


def text_term(row, texts, style):
    """texts: {field: text} before the answer -> (T, c, r, why); None, None, None where the row has no findings."""
    if row.get("findings") is None:
        return None, None, None, ""
    caption, reasoning = texts.get("caption", ""), texts.get("reasoning", "")
    if style == "think":
        caption = reasoning
    about = asked_about(row["question"], gold_of(row))
    c, why = truth(caption, row["findings"])
    r, more = truth(reasoning, row["findings"], about or frozenset())
    if about is None:  # nothing on the film settles the question: a true reasoning is not about it
        r = min(r, 0.0)
    return (c + r) / 2, c, r, "; ".join(filter(None, (why, more)))


def contradiction_term(texts, answer, question, kind):
    """texts: {field: text} -> (C, how); None without caption and reasoning."""
    if answer is None or not any(text.strip() for text in texts.values()):
        return None, ""
    how = next(filter(None, (contradiction(text, answer, question, kind) for text in texts.values())), "")
    return (-1.0, how) if how else (0.0, "")


# ------------------------------------------------------------------------------------------------------------- together


def rollout_terms(
    row, text, settings=DEFAULT_SETTINGS, frequencies=None, d_roi=None, d_rand=None, tokens=None, counterfactual_why="",
    explained=None, gap_response=None,
):  # fmt: skip
    """
    Everything about one rollout -> a dict of plain values with the keys of MEANINGS.

    row: question, gold (or answer), and where known answer_type, region, width, height. text: the new tokens, decoded
    without the token that ends them but with all other special tokens, so that these are seen. frequencies:
    AnswerFrequencies, None: no weighting. d_roi: drop of the statement's log-probability without the gold region (not
    read where the gold answer is no); d_rand: of the random ones, a list; None: not measured, V is undefined. tokens:
    number of new tokens; None: words and punctuation marks are counted instead. explained, gap_response: of
    measure_drops, for the log.
    """
    style, question = settings.style, row["question"]
    found = parse_response(text, style)
    why = gate_problem(text, found, style, row)
    accuracy, score, away = accuracy_of(found.answer, gold_of(row), answer_type_of(row), question)
    weight = frequencies.weight(row) if frequencies is not None else 1.0
    data = found.data or {}
    texts = {name: said for name in ("caption", "reasoning") if (said := written(data, name)) is not None}
    before = list(data)[: list(data).index("answer")] if "answer" in data else ()
    parts_of_text = [*texts.values(), found.answer or ""] if found.data else [text]
    box, box_why = box_term(row, found) if style == "json" else (None, "")
    true, c, r, false = text_term(row, {name: texts[name] for name in before if name in texts}, style)
    against, how = contradiction_term(texts, found.answer, question, score["kind"])
    tokens = len(re.findall(r"\w+|[^\w\s]", text)) if tokens is None else tokens
    length, repetition = length_term(tokens, settings.max_tokens), repetition_term(parts_of_text)
    copying, padding = copying_term(parts_of_text, question, style), padding_term(text, parts_of_text)
    penalty = min(1.0, length + repetition + copying + padding)
    value, d_roi, d_rand, cf_why = counterfactual_term(nothing_to_take_out(row), d_roi, d_rand, counterfactual_why)
    known = [part for part in (box, against, true) if part is not None]
    terms = {
        "reward": None,
        "format": float(not why) - penalty,
        "answer": accuracy * weight,
        "consistency": sum(known) if known else None,
        "counterfactual": value,
        "gate": float(not why),
        "gate_why": why,
        "level": found.level,
        "said": found.answer,
        "kind": score["kind"],
        "accuracy": accuracy,
        "class_weight": weight,
        "correct": bool(score["correct"]),
        "parsed": bool(score["parsed"]),
        "opposite": bool(score["contradiction"]),
        "hedged": away,
        "box": box,
        "box_why": box_why,
        "text": true,
        "caption_truth": c,
        "reasoning_truth": r,
        "text_why": false,
        "contradiction": against,
        "contradiction_why": how,
        "length": length,
        "repetition": repetition,
        "copying": copying,
        "padding": padding,
        "penalty": penalty,
        "d_roi": d_roi,
        "d_rand": None if value is None else sum(d_rand) / len(d_rand),
        "d_rand_each": list(d_rand) if d_rand else None,
        "explained": explained,
        "gap_response": gap_response,
        "counterfactual_why": cf_why,
    }
    return terms | {"reward": compose(terms, settings)}


def compose(terms, settings):
    """The terms of a rollout -> its reward, by the formula of settings.composition."""
    return sum(parts(terms, settings).values())


def parts(terms, settings):
    """The summands of the reward, by name: what explain() lists."""
    box, against, v = (terms[name] or 0.0 for name in ("box", "contradiction", "counterfactual"))
    if settings.composition == "additive":
        return {name: weight * (terms[name] or 0.0) for name, weight in zip(TERMS, settings.weights, strict=True)}
    f, a, s, c = settings.shares()
    gate, answer, cap = terms["gate"], a * terms["answer"], MOST * max(1.0, a)
    right, said = terms["accuracy"] > RIGHT, [terms[name] or 0.0 for name in ("caption_truth", "reasoning_truth")]
    looked = max(v, 0.0) if right else 0.0
    alone, together = min(cap, answer), min(cap, answer * (1 + 0.3 * c * looked))
    return {
        "answer": gate * alone,
        "looked at the region": gate * (together - alone),
        "looked elsewhere": gate * 0.3 * c * min(v, 0.0),
        "box": gate * BOX * s * box,
        "true text": gate * TEXT * s * right * sum(max(value, 0.0) for value in said) / 2,
        "false text": gate * TEXT * s * sum(min(value, 0.0) for value in said) / 2,
        "contradiction": 0.2 * s * against,
        "penalty": -0.2 * f * terms["penalty"],
    }


def slope(terms, settings):
    """
    Derivative of a right answer's reward by V; 0 for a wrong answer, where V is undefined or can rise no further, and
    where the answer's part is capped. At V = -1 the reward falls no further, but there a policy needs the slope most:
    it stays.

    V is a function of the policy's own weights, so the gradient of the expected reward has two parts: E[R grad log p],
    p being the probability of the whole rollout, which GRPO estimates, and E[dR/dV grad V]. Both are sums over a
    rollout, and are divided alike (Policy.reward_gradient). The first alone cannot set apart two policies that give the
    same answers.
    Wrong answers are left out of the second: it makes the answer likelier on films with a random region filled in, and
    there it is wrong too.
    """
    v = terms["counterfactual"]
    if v is None or v >= (0 if terms["d_roi"] is None else 1) or terms["accuracy"] <= RIGHT:
        return 0.0
    if settings.composition == "additive":
        return settings.weights[TERMS.index("counterfactual")]
    _, a, _, c = settings.shares()
    answer = a * terms["answer"] if v >= 0 else 1.0
    return terms["gate"] * 0.3 * c * answer if v < 0 or answer * (1 + 0.3 * c * v) < MOST * max(1.0, a) else 0.0


def score_rollouts(rows, texts, settings=DEFAULT_SETTINGS, frequencies=None, drops=None, tokens=None):
    """
    rollout_terms of a batch. drops: of measure_drops, or None: V undefined; tokens: numbers of new tokens, or None.
    """
    n = len(texts)
    terms = []
    for row, text, drop, count in zip(rows, texts, drops or [{}] * n, tokens or [None] * n, strict=True):
        measured = [drop.get("d_roi"), drop.get("d_rand_each"), count, drop.get("counterfactual_why", "")]
        measured += [drop.get("explained"), drop.get("gap_response")]
        terms.append(rollout_terms(row, text, settings, frequencies, *measured))
    return terms


def explain(row, text, terms, settings=DEFAULT_SETTINGS):
    """
    Why a rollout earned what it earned -> lines of text: each summand with what it comes from; they add up to the
    reward.
    """
    t = terms
    hedged_away = ", but hedged: counts 0" if t["hedged"] else ""
    answer = f"'{t['said']}' is {verdict(t)}{hedged_away}; A {t['accuracy']:.2f} x {t['class_weight']:.2f} for how rare"
    answer += " the gold answer is"
    penalty = f"too long {t['length']:.2f}, repetition {t['repetition']:.2f}, copied {t['copying']:.0f}, padding"
    penalty += f" {t['padding']:.0f}"
    box = "no gold region" if not row.get("region") else f"a gold region of more than {TOO_LARGE:.0%} of the image"
    if row.get("region") and settings.style != "json":
        box = f"the {settings.style} prompt asks for no boxes"
    if t["box"] is not None:
        box = f"IoU {t['box']:.2f}" + (f" ({t['box_why']})" if t["box_why"] else "")
    against = "no caption or reasoning"
    if t["contradiction"] is not None:
        against = t["contradiction_why"] or "text and answer agree, or cannot be compared"
    true, false = "nothing is known of the film, and nothing is checked", t["text_why"] or "nothing"
    if t["text"] is not None:
        true = (
            f"caption {t['caption_truth']:+.2f}, reasoning {t['reasoning_truth']:+.2f}; counts for right answers only"
        )
    looked, elsewhere = looks(t)
    summands = parts(t, settings)
    if settings.composition == "additive":
        sources = (f"gate {t['gate']:.0f} - ({penalty})", answer, f"box: {box}; {against}; text: {true}", looked)
    else:
        upwards = "" if t["accuracy"] > RIGHT else "; counts upwards for right answers only"
        sources = (answer, looked + upwards, elsewhere, box, true, false, against, penalty)
    gate = f"  gate {t['gate']:.0f}" + (f": {t['gate_why']}" if t["gate_why"] else "")
    if t["gate_why"] and settings.composition == "gated":
        gate += "; nothing but penalties counts"
    return [
        f"question: {row['question']}",
        f"gold:     {gold_of(row)}",
        f"rollout:  {text.strip()[:500]}",
        f"reward {t['reward']:+.3f} ({settings.composition})",
        gate,
        *(f"  {n:+.3f} {name}: {source}" for (name, n), source in zip(summands.items(), sources, strict=True)),
    ]


def verdict(t):
    """What the answer of these terms is, in words."""
    if t["correct"]:
        return "right"
    if not t["parsed"]:
        return "no answer that can be read"
    if t["opposite"]:
        return "the opposite of the gold answer"
    return f"right in part, squared F1 {t['accuracy']:.2f}" if t["kind"] == "open" else "wrong"


def looks(t):
    """What V says, in words, and whether a random region matters."""
    v = t["counterfactual"]
    if v is None:
        return f"V undefined: {t['counterfactual_why']}", ""
    elsewhere, most = "a random region matters" if v < 0 else "no", max(t["d_rand_each"])
    what = "the answer, with what the text before it says of the matter," if t["explained"] else "the answer"
    if t["d_roi"] is None:
        return (
            f"without a random region {what} loses at most {most:+.3f} nats: V {v:+.2f}; there is nothing to take out"
        ), elsewhere
    return (
        f"without the region {what} loses {t['d_roi']:+.3f} nats, without a random one at most {most:+.3f}: V {v:+.2f}"
    ), elsewhere
