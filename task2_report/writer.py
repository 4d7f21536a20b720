"""
A model that writes about films: which one, how many films at a time, what it writes, and how it leans to yes or no.

    writer = Writer(vlm, batch_size=16, max_new_tokens=256)
    writer.write(turns, films)        # [{"text", "tokens", "thoughts", "unfinished"}, ...], greedy
    writer.margins(questions, films)  # log-odds of yes against no, one number each
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np

from shared.data.images import read_pixels
from shared.metrics.labels import CONDITIONS
from shared.models.hub import explained, find_model
from shared.models.loading import QUANTS, count_parameters, load_vlm
from shared.models.memory import read_layout
from shared.models.passes import PartSize, in_parts, make_prompts, margin, sample, stop_tokens, text_of
from shared.models.tiny import is_tiny
from shared.runtime import InputError, bounded, read_json

BASE_MODEL = "google/medgemma-4b-it"
THOUGHTS = ("<unused94>", "<unused95>")  # MedGemma 1.5 thinks aloud between them, even unasked


def add_model_options(parser):
    g = parser.add_argument_group("model")
    # fmt: off
    g.add_argument("--model",
        help=f"hub name, folder or tiny (default: what the adapter was trained on, else {BASE_MODEL})")
    g.add_argument("--adapter", metavar="FOLDER", help="best/ of train.py: a LoRA adapter, or a whole model")
    g.add_argument("--quant", default="auto", choices=["auto", *QUANTS],
        help="weights in 4 or 8 bit; auto: nf4 on a GPU for models above 1 billion parameters (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="computing precision (%(default)s)")
    g.add_argument("--max-new-tokens", type=bounded(int, 1, 4096), default=256, metavar="TOKENS",
        help="longest text that is written (%(default)s)")
    # fmt: on
    return g


def source_of(args):
    """--model and --adapter -> (model to be loaded, adapter to be put on it, or None)."""
    name, adapter = args.model, args.adapter
    if not adapter:
        return name or BASE_MODEL, None
    if (Path(adapter) / "config.json").is_file():  # a tiny model is trained whole
        if name is not None:
            raise InputError(f"{adapter} holds a whole model, not an adapter: leave --model out")
        return adapter, None
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"--adapter {adapter}: no model and no adapter is there; name the best/ of a run of train.py")
    if name is None:
        with explained(f"{adapter} holds no adapter that can be read"):
            told = read_json(Path(adapter) / "adapter_config.json", object)
            name = str(told.get("base_model_name_or_path") or BASE_MODEL)
    return name, adapter


def quant_of(args, name, device):
    if args.quant != "auto":
        return args.quant
    large = device.type == "cuda" and not is_tiny(name) and read_layout(*find_model(name, "gemma3")).parameters > 1e9
    return "nf4" if large else "none"


def load_model(args, device, dtype=None):
    """The options of add_model_options -> VLM."""
    name, adapter = source_of(args)
    quant = quant_of(args, name, device)
    vlm = load_vlm(name, quant=quant, device=device, dtype=dtype or args.dtype, adapter=adapter, family="gemma3")
    if untrained(vlm):
        print("note: this tiny model is untrained, what it writes means nothing")
    return vlm


def untrained(vlm):
    return vlm.tiny and not vlm.adapter


def training_of(folder):
    """training.json beside a trained model or adapter -> dict, {} without one. InputError for a damaged one."""
    path = Path(folder or "") / "training.json"
    if not folder or not path.is_file():
        return {}
    with explained(f"{path} is damaged, or of another version"):
        told = read_json(path, object)
        name, phantom, again = (told["dataset"].get(key) for key in ("name", "phantom", "again"))
        if type(phantom) is not bool or not isinstance(name, str) or not isinstance(again or {}, dict):
            raise ValueError("what it was trained on cannot be read")
        if type(told["indication"]) is not bool or not set(told["conditions"] or ()) <= set(CONDITIONS):
            raise ValueError("indication or conditions cannot be right")
    return told


def is_medgemma15(vlm):
    return "medgemma-1.5" in f"{vlm.name} {vlm.source}".lower()


def to_square_with_zeros(film):
    """uint8 (H, W) or (H, W, 3) -> the film in the middle of a black square, as MedGemma 1.5 was trained."""
    height, width = film.shape[:2]
    down, right = max(0, width - height), max(0, height - width)
    around = [(down // 2, down - down // 2), (right // 2, right - right // 2)] + [(0, 0)] * (film.ndim - 2)
    return np.pad(film, around)


def film_for(vlm, film):
    """A path or a uint8 array -> the same, or for MedGemma 1.5, which was trained so, an array padded to a square."""
    if not is_medgemma15(vlm):
        return film
    return to_square_with_zeros(film if isinstance(film, np.ndarray) else read_pixels(film))


def without_thoughts(ids, begin, end):
    """
    Token ids -> (ids without what stands between the marks, number of ids cut, was the thought left unfinished?). A
    thought that never ends takes the rest with it: nothing of it is an answer.
    """
    if begin is None or begin not in ids:
        return ids, 0, False
    start = ids.index(begin)
    if end not in ids[start:]:
        return ids[:start], len(ids) - start, True
    stop = start + ids[start:].index(end) + 1
    rest, more, unfinished = without_thoughts(ids[stop:], begin, end)
    return ids[:start] + rest, stop - start + more, unfinished


class Writer:
    """films: paths or uint8 arrays, or None for a turn without image; the order of what is given is kept."""

    def __init__(self, vlm, batch_size=None, max_new_tokens=256):
        self.vlm, self.max_new_tokens = vlm, max_new_tokens
        self.size = PartSize(batch_size or (64 if count_parameters(vlm.base) < 100e6 else 4))
        vocabulary = vlm.tokenizer.get_vocab() if is_medgemma15(vlm) else {}
        self.marks = [vocabulary.get(mark) for mark in THOUGHTS]

    def prompts(self, turns, films, system=None):
        pixels = {id(f): read_pixels(f) if isinstance(f, (str, Path)) else f for f in films}  # each looked at once
        ready = {k: film_for(self.vlm, f) if isinstance(f, np.ndarray) else f for k, f in pixels.items()}
        return make_prompts(self.vlm, turns, [ready[id(film)] for film in films], system)

    def write(self, turns, films, system=None):
        """-> [{"text", "tokens" (written), "thoughts" (tokens cut off), "unfinished" (thought or text)}]"""
        stops = stop_tokens(self.vlm)

        def some(rows):
            prompts = self.prompts([turns[r] for r in rows], [films[r] for r in rows], system)
            written = []
            for (ids,) in sample(self.vlm, prompts, 1, self.max_new_tokens)[0]:
                kept, cut, open_end = without_thoughts(ids, *self.marks)
                ended = bool(ids) and ids[-1] in stops
                row = {"text": text_of(self.vlm, kept), "tokens": len(ids), "thoughts": cut}
                written.append(row | {"unfinished": open_end or not ended})
            return written

        return in_parts(some, list(range(len(turns))), self.size)

    def margins(self, questions, films, system=None):
        def some(rows):
            return margin(
                self.vlm, self.prompts([questions[r] for r in rows], [films[r] for r in rows], system)
            ).tolist()

        return in_parts(some, list(range(len(questions))), self.size)
