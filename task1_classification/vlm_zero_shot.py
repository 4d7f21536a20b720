"""
Ask a vision-language model as it is about every label of every film; or compare films with statements (dual encoder).

Usage:
    python task1_classification/vlm_zero_shot.py --data films.csv                          # MedGemma 4B
    python task1_classification/vlm_zero_shot.py --data films.csv --model google/medsiglip-448
    python task1_classification/vlm_zero_shot.py --data films.csv --text                   # also answers as text
    python task1_classification/vlm_zero_shot.py --model tiny:siglip --data phantom        # offline
    python task1_classification/vlm_zero_shot.py --dry-run

A question is answered by the log-odds of the answer's first token, yes against no in all their spellings (1 and 0, A
and B): one pass, no text to be parsed. Several wordings, each also with the answers in the other order, are averaged.
Content-free films (black, grey, noise) say how much of a yes comes from the words alone: their mean is subtracted from
every wording and label. That moves the share of yes, and no AUC.
A dual encoder is asked by statements: similarity of the film to "... with X" minus that to "... without X".
--text also writes answers, for comparison; a parser reads 1, 0 or nothing in them, and nothing is never a guess.

Writes to the run folder: predictions.csv (film, label, truth, score, raw score, answer), metrics.json (of validation
only: AUC of every wording, share of yes, unparsed). The films are those of val and test; nothing is fitted or chosen.
"""

import argparse
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from shared.data.images import read_pixels
from shared.models.hub import QUANTS
from shared.models.loading import DTYPES
from shared.models.inputs import as_pixels, preprocess_images
from shared.models.passes import PartSize, in_parts, make_prompts, margin, write
from shared.models.tiny import is_tiny
from shared.report import number, percent
from shared.runtime import InputError, open_run_dir, pick_device, positive_int, run_facts, script
from shared.runtime import script_parser, seed_everything, write_csv, write_json
from shared.training import settings_of
from task1_classification.vlm_data import add_film_options, auc_by_label, films_of, mean_of, measure_line
from task1_classification.vlm_model import load_encoder

TASK = "task1_classification"
DEFAULT = "google/medgemma-4b-it"
YES_NO = dict(yes=("yes", "Yes", "YES"), no=("no", "No", "NO"))
ONE_ZERO = dict(yes=("1", "yes", "Yes"), no=("0", "no", "No"))
# name -> question, spellings; those that differ in the order of the answers alone stand in pairs
QUESTIONS = {
    "1-0": ("Is there {x} in this X-ray? Answer 1 or 0.", ONE_ZERO),
    "0-1": ("Is there {x} in this X-ray? Answer 0 or 1.", ONE_ZERO),
    "yes-no": ("Does this chest X-ray show {x}? Answer yes or no.", YES_NO),
    "no-yes": ("Does this chest X-ray show {x}? Answer no or yes.", YES_NO),
    "A-B": ("Which is true of this chest X-ray? A: {x} is present. B: {x} is absent. Answer A or B.",
            dict(yes=("A",), no=("B",))),
    "B-A": ("Which is true of this chest X-ray? A: {x} is absent. B: {x} is present. Answer A or B.",
            dict(yes=("B",), no=("A",))),
}  # fmt: skip
NORMAL = {  # "Is there No Finding" asks for nothing
    "1-0": "Is this X-ray normal? Answer 1 or 0.",
    "0-1": "Is this X-ray normal? Answer 0 or 1.",
    "yes-no": "Is this chest X-ray normal? Answer yes or no.",
    "no-yes": "Is this chest X-ray normal? Answer no or yes.",
    "A-B": "Which is true of this chest X-ray? A: it is normal. B: it is abnormal. Answer A or B.",
    "B-A": "Which is true of this chest X-ray? A: it is abnormal. B: it is normal. Answer A or B.",
}
STATEMENTS = (
    ("a chest X-ray with {x}", "a chest X-ray without {x}"),
    ("{x}", "no {x}"),
    ("there is evidence of {x}", "there is no evidence of {x}"),
)
NORMAL_STATEMENTS = (
    ("a normal chest X-ray", "an abnormal chest X-ray"),
    ("no acute finding", "an acute finding"),
    ("the lungs and the heart are normal", "the lungs or the heart are abnormal"),
)
WORDS = {  # what a label is called in a question
    "Lung Opacity": "a lung opacity",
    "Lung Lesion": "a lung nodule or mass",
    "Pleural Other": "pleural thickening or another pleural abnormality",
    "Fracture": "a fracture",
    "Enlarged Cardiomediastinum": "an enlarged mediastinum",
    "Support Devices": "a support device such as a line, a tube or a pacemaker",
    "Granuloma": "a calcified granuloma",
}


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="a table of vlm_prepare.py or iu_xray")
    add_film_options(parser)
    # fmt: off
    g = parser.add_argument_group("model")
    g.add_argument("--model", default=DEFAULT, help="hub name, folder, tiny:gemma3, tiny:siglip, ... (%(default)s)")
    g.add_argument("--quant", default="none", choices=QUANTS, help="how the weights are held (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="to compute in (%(default)s)")
    g = parser.add_argument_group("questions")
    g.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS), metavar="NAME",
        help=f"which wordings to average: {', '.join(QUESTIONS)} (all)")
    g.add_argument("--calibrate", action=argparse.BooleanOptionalAction, default=True,
        help="subtract what black, grey and noise are given (default)")
    g.add_argument("--text", action="store_true", help="also write the answer to the first wording, and parse it")
    g.add_argument("--batch-size", type=positive_int, default=64, help="questions per pass (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    args.questions = list(dict.fromkeys(args.questions))
    if args.dry_run:
        args.data, args.device, args.films, args.severe = "phantom", "cpu", 8, True
        args.model = args.model if is_tiny(args.model) else "tiny:gemma3"
    return args


# ------------------------------------------------------------------------------------------------------------ questions


def words_of(label):
    return WORDS.get(label, label.lower())


def question(name, label):
    text = NORMAL[name] if label.lower() in ("no finding", "normal") else QUESTIONS[name][0].format(x=words_of(label))
    return text[0].upper() + text[1:]


def statements(label):
    pairs = NORMAL_STATEMENTS if label.lower() in ("no finding", "normal") else STATEMENTS
    return [tuple(text.format(x=words_of(label)) for text in pair) for pair in pairs]


POSITIVE, NEGATIVE = ("1", "yes", "present", "true"), ("0", "no", "absent", "false")
DENIED = re.compile(r"\bthere (?:is|are) no (?!way\b|doubt\b|image\b|answer\b|information\b)")
MIDDLE = POSITIVE[1:] + NEGATIVE[2:]  # words that answer wherever they stand; a "no" may deny anything


def parse_answer(text):
    """
    What a model wrote to a question for 1 or 0 -> 1, 0, or None where it says neither or both: "1", "**1**",
    "Answer: 0", "No.", "Yes, a small one", "There is no effusion", but not "10", "1 or 0" or "I am not sure".
    """
    plain = re.sub(r"[*_`#\"'()\[\]]", "", str(text)).strip().lower()
    plain = re.sub(r"^(?:the )?(?:final )?answer(?: is)?\s*[:=-]?\s*", "", plain)
    found = re.findall(r"\w+(?:\.\d+)?", plain)  # whole tokens; 0.5 is neither
    if not found or re.match(r"(?:1|yes)\s*(?:or|/|and)\s*(?:0|no)\b|(?:0|no)\s*(?:or|/|and)\s*(?:1|yes)\b", plain):
        return None
    if found[0] in POSITIVE[:2] or found[0] in NEGATIVE[:2]:
        return int(found[0] in POSITIVE)
    if DENIED.search(plain):
        return 0
    last = [word for word in found[-1:] if word in POSITIVE + NEGATIVE]  # "I would say no"
    sides = {word in POSITIVE for word in [*(word for word in found if word in MIDDLE), *last]}
    if sides == {True} and "not" in found:
        return None
    return int(sides.pop()) if len(sides) == 1 else None


def content_free(size, seed=0):
    """Films that show nothing -> uint8 arrays (H, W): black, grey, noise."""
    noise = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return [np.zeros(size, np.uint8), np.full(size, 128, np.uint8), noise]


# --------------------------------------------------------------------------------------------------------------- models


def ask_vlm(vlm, images, labels, names, size, text=False):
    """
    images: of some films -> margins float32 (n, L, wordings) in nats, and answers as text, n lists of L, or None. The
    tower sees each film once, and what the questions to it have in common is computed once.
    """
    texts = [question(name, label) for name in names for label in labels]
    prompts = make_prompts(vlm, texts * len(images), [image for image in images for _ in texts])
    found = np.empty((len(images), len(labels), len(names)), np.float32)
    for k, name in enumerate(names):
        some = [p for i in range(len(images)) for p in prompts[i * len(texts) + k * len(labels) :][: len(labels)]]
        spellings = QUESTIONS[name][1]
        scores = in_parts(lambda part, s=spellings: margin(vlm, part, **s).cpu().tolist(), some, size)
        found[:, :, k] = np.reshape(scores, (len(images), len(labels)))
    if not text:
        return found, None
    first = [p for i in range(len(images)) for p in prompts[i * len(texts) :][: len(labels)]]
    written = in_parts(lambda part: write(vlm, part, 12), first, size)
    return found, [written[i : i + len(labels)] for i in range(0, len(written), len(labels))]


class Statements:
    """Paired statements about all labels as vectors of a dual encoder; call it with images -> (n, L, pairs)."""

    @torch.no_grad()
    def __init__(self, encoder, labels):
        self.encoder = encoder
        pairs = [statements(label) for label in labels]
        texts = [text for some in pairs for pair in some for text in pair]
        padding = "longest" if encoder.family == "clip" else "max_length"  # SigLIP was trained on padded texts
        ids = encoder.processor.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
        ids = ids.to(encoder.device)
        if encoder.family != "clip":
            ids.pop("attention_mask", None)
        found = normalised(encoder.dual.get_text_features(**ids))
        self.texts = found.view(len(labels), -1, 2, found.shape[-1])

    @torch.no_grad()
    def __call__(self, images):
        ready = preprocess_images(self.encoder.processor, images)
        seen = normalised(self.encoder.dual.get_image_features(pixel_values=ready.values.to(self.encoder.device)))
        near = torch.einsum("nd,lpsd->nlps", seen, self.texts) * self.encoder.dual.logit_scale.exp()
        return (near[..., 0] - near[..., 1]).float().cpu().numpy()


def normalised(found):
    """transformers 5 wraps these features in an output object."""
    return F.normalize(found if torch.is_tensor(found) else found.pooler_output, dim=-1)


def pixels_of(image):
    """A path or an array -> uint8 tensor, read by the one reader."""
    return as_pixels(image if isinstance(image, np.ndarray) else read_pixels(image))


# -------------------------------------------------------------------------------------------------------------- results


def facts_of(films, rows, margins, raw, answers, names):
    """Numbers on validation films, for a first look: the real ones are vlm_evaluate.py's."""
    val = np.array([films.rows[row]["split"] == "val" for row in rows])
    truth, margins, raw = films.truth[rows][val], margins[val], raw[val]

    def macro(scores):
        return mean_of(auc_by_label(truth, scores, films.labels).values())

    def share(cells):
        return float(cells.mean()) if cells.size else None

    told = {"val_auc_of_wording": {name: macro(margins[:, :, k]) for k, name in enumerate(names)}}
    told["val_auc"] = macro(margins.mean(2))
    told["share_of_yes"] = {"raw": share(raw.mean(2) > 0), "calibrated": share(margins.mean(2) > 0)}
    pairs = [(names.index(a), names.index(b)) for a, b in (("1-0", "0-1"), ("yes-no", "no-yes"), ("A-B", "B-A"))
             if a in names and b in names]  # fmt: skip
    told["flipped_by_order"] = {
        f"{names[a]} / {names[b]}": share((raw[:, :, a] > 0) != (raw[:, :, b] > 0)) for a, b in pairs
    }
    if answers is not None:
        told["unparsed"] = share(np.array([[a is None for a in some] for some in answers])[val])
    return told


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device, args.dtype)
    films = films_of(args, TASK)
    rows = films.rows_of("val", "test")
    if not len(rows):
        raise InputError(f"{films.name} has no film in val or test: there is nothing to ask about")
    encoder = load_encoder(args.model, args.quant, args.dtype, device)
    if encoder.vlm is None and args.text:
        raise InputError(f"--text: {args.model} is a dual encoder and writes nothing")
    run_dir = open_run_dir(args, TASK, "vlm_zero_shot")
    names = args.questions if encoder.vlm else [f"statement {k + 1}" for k in range(len(STATEMENTS))]
    size, compare = PartSize(args.batch_size), None if encoder.vlm else Statements(encoder, films.labels)

    def ask(images, text=False):
        if compare is not None:
            return compare(images), None
        return ask_vlm(encoder.vlm, images, films.labels, names, size, text)

    at_once = 4 if encoder.vlm else args.batch_size
    found, written = [], []
    for start in tqdm(range(0, len(rows), at_once), desc="asking", leave=False, disable=None):
        images = [pixels_of(films.rows[i]["image"]) for i in rows[start : start + at_once]]
        margins, texts = ask(images, args.text)
        found.append(margins)
        written += texts or []
    raw = np.concatenate(found)
    if not np.isfinite(raw).all():
        raise InputError(f"the answers of {args.model} are not finite: its weights are damaged, or overflow in --dtype")
    bias = ask(content_free(tuple(images[0].shape[-2:]), args.seed))[0].mean(0) if args.calibrate else 0 * raw[0]
    margins = raw - bias
    answers = [[parse_answer(text) for text in some] for some in written] if args.text else None
    lines = []
    for n, i in enumerate(rows):
        row = films.rows[i]
        for j, label in enumerate(films.labels):
            truth = films.truth[i, j]
            line = {k: row[k] for k in ("id", "patient", "split")} | {
                "label": label, "truth": "" if np.isnan(truth) else int(truth),
                "score": float(margins[n, j].mean()), "raw_score": float(raw[n, j].mean()),
            }  # fmt: skip
            if args.text:
                line |= {"answer": "" if answers[n][j] is None else answers[n][j], "text": written[n][j]}
            lines.append(line)
    write_csv(run_dir / "predictions.csv", lines)
    told = facts_of(films, rows, margins, raw, answers, names)
    write_json(run_dir / "metrics.json", {
        "dataset": films.facts(), "split": "val", "mode": "zero-shot", **encoder.facts(), "wordings": names,
        "untrained": is_tiny(args.model), **told, "bias": np.asarray(bias).mean(-1) if args.calibrate else None,
        "seconds_per_film": (time.time() - started) / len(rows), "seed": args.seed, "settings": settings_of(args),
        **run_facts(started, device),
    })  # fmt: skip
    print(f"on validation: macro-AUC {number(told['val_auc'])}, {percent(told['share_of_yes']['calibrated'])} % yes"
          + (f", {percent(told['unparsed'])} % of the texts unparsed" if args.text else "")
          + f"\n{measure_line(run_dir, films, args)}\nresults in {run_dir}"
          f" ({time.time() - started:.0f} s)")  # fmt: skip


if __name__ == "__main__":
    main()
