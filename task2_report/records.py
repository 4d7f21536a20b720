"""
One film, one strategy, both opinions: the records of infer.py and evaluate.py.

    judge(writer, names, films, "context_aware", "cnn", opinions)       # -> one dict per film, in order

A record (JSON): image_id, label, strategy, context, model, backend, dtype, quant, resize, prompt, prompt_sha, raw_text
(as the model wrote it, without thoughts), text (the same, with a warning in front where an untrained model wrote it),
findings, impression, classification (normal, pneumonia, uncertain or null), p_yes_logit (log-odds of yes against
no), verbal_confidence, boxes (pixels), cnn (probability, call, feature_norm, map_shape; null without a CNN),
told_probability (what the prompt said of it), claims, unsupported_claims, flags, tokens, thought_tokens, seconds.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import re
import time

import shared  # noqa: F401, isort: skip  # before transformers

from shared.metrics.labels import NEGATIVE, POSITIVE, UNCERTAIN
from shared.models.inputs import token_grid
from task2_report.measures import claims_of, unsupported
from task2_report.prompts import STRATEGIES, ask, cnn_sentence, context_probability, pixel_box, read_response
from task2_report.prompts import yes_no_question
from task2_report.scores import labels_of
from task2_report.writer import is_medgemma15, untrained

CLAIM = ("structure", "polarity", "tier", "span")
UNTRAINED = "[untrained tiny model: these words mean nothing] "


def judge(writer, names, films, strategy, context="none", opinions=None, labels=None, indications=None, margins=True):
    """
    films: uint8 arrays, or None for a prompt without image; opinions: dicts of CNN.opinions; context: none, cnn,
    swapped or constant; margins: also ask the yes/no question.
    """
    vlm, started, n = writer.vlm, time.time(), len(films)
    plan, none = STRATEGIES[strategy], [None] * n
    told = [context_probability(context, o and o["probability"]) for o in opinions or none]
    sentences = [None if p is None else cnn_sentence(p) for p in told]
    clinical = indications or [""] * n
    turns = [ask(strategy, *some) for some in zip(sentences, clinical, strict=True)]
    written = writer.write(turns, films, plan.system)
    odds = none
    if margins:
        questions = [yes_no_question(strategy, *some) for some in zip(sentences, clinical, strict=True)]
        odds = writer.margins(questions, films, plan.system)
    seconds = (time.time() - started) / max(1, n)
    rows = zip(names, films, turns, written, odds, told, opinions or none, labels or none, strict=True)
    return [make_record(vlm, strategy, context, seconds, *row) for row in rows]


def make_record(vlm, strategy, context, seconds, name, film, turn, written, odds, told, opinion, label):
    response = read_response(written["text"], strategy)
    if strategy == "report":
        response.classification = class_of_report(written["text"])
    weights = "untrained, random weights" if untrained(vlm) else vlm.adapter or vlm.source or vlm.name
    squared = is_medgemma15(vlm)
    size = None if film is None else film.shape[:2]
    cnn = {k: v for k, v in opinion.items() if k != "overlay"} if opinion else None
    record = {
        "image_id": name, "label": label, "strategy": strategy, "context": context, "model": vlm.name,
        "backend": f"transformers {vlm.family}: {weights}", "dtype": str(vlm.dtype).removeprefix("torch."),
        "quant": vlm.quant, "resize": resize_of(vlm, size, squared), "prompt": turn,
        "prompt_sha": hashlib.sha256(f"{STRATEGIES[strategy].system}\n{turn}".encode()).hexdigest()[:16],
        "raw_text": written["text"], "text": UNTRAINED * untrained(vlm) + written["text"],
        "findings": response.sections.get("findings", ""), "impression": response.sections.get("impression", ""),
        "classification": response.classification, "p_yes_logit": odds, "verbal_confidence": response.confidence,
        "boxes": [b | {"box": pixel_box(b["box"], *size, squared)} for b in response.boxes if size],
        "cnn": cnn, "told_probability": told,
        "claims": [dict(zip(CLAIM, claim, strict=True)) for claim in claims_of(written["text"])],
        "unsupported_claims": sum(unsupported(written["text"]).values()),
        "complies": response.complies, "tokens": written["tokens"], "thought_tokens": written["thoughts"],
        "seconds": seconds,
    }  # fmt: skip
    return record | {"flags": flags_of(vlm, record, written)}


FINE = re.compile(
    r"\b(?:normal|clear|unremarkable|negative|healthy|no (?:acute|active|abnormal|significant|disease))", re.I
)


def class_of_report(text):
    """
    A report without a CLASSIFICATION line, by its labels: pneumonia where it is stated, uncertain where it is doubted,
    normal where it is denied or the text says that nothing is wrong; else None: another finding says nothing of
    pneumonia, and neither does a text without any.
    """
    labels = labels_of(text)
    if labels["Pneumonia"] in (POSITIVE, UNCERTAIN):
        return "pneumonia" if labels["Pneumonia"] == POSITIVE else "uncertain"
    says_so = NEGATIVE in labels.values() or FINE.search(text)
    fine = labels["Pneumonia"] == NEGATIVE or labels["No Finding"] == POSITIVE and says_so
    return "normal" if fine else None


def resize_of(vlm, size, squared):
    """What becomes of a film, for the record: how many pixels make one image token."""
    if size is None:
        return "no image"
    rows, columns = token_grid(vlm.processor, *size)
    padded = ", padded to a square with zeros" if squared else ""
    return f"{size[0]}x{size[1]}{padded}, seen as {rows}x{columns} image tokens"


def flags_of(vlm, record, written):
    """What a reader must know first, a few words each."""
    cnn, call = record["cnn"], record["classification"]
    flags = {
        "untrained model": untrained(vlm),
        "disagrees with the CNN": bool(cnn and call in ("normal", "pneumonia") and call != cnn["call"]),
        "no classification that can be read": call is None,
        "uncertain": call == "uncertain",
        "format not kept": not record["complies"],
        "text cut off": written["unfinished"],
        "thought trace cut off": written["thoughts"] > 0,
        "system prompt: not as MedGemma 1.5 was trained": bool(
            is_medgemma15(vlm) and STRATEGIES[record["strategy"]].system
        ),
        "the CNN finds the film unlike its training films": bool(cnn and cnn["unlike_training"]),
    }
    return [name for name, there in flags.items() if there]
