"""
A model that is asked about images, as evaluate.py, infer.py and the trainers' validation do: which one, how many at a
time, what it writes, and how likely it finds what it wrote.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from tqdm import tqdm

from shared.models.loading import QUANTS, count_parameters, load_vlm
from shared.models.passes import PartSize, in_parts, make_prompts, score, write
from shared.models.tiny import SIZES, tiny_folder
from shared.runtime import InputError, command, positive_int, read_json, resume_dir
from vqa_sft_grpo.prompting import boxes_from_model, parse_response
from vqa_sft_grpo.rows import NAMES

BASE_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


def model_of(model, adapter, default=BASE_MODEL):
    """
    --model and --adapter -> (model, adapter). An adapter says which model it was trained on; a folder with a whole
    model (tiny models are trained whole) is the model itself.
    """
    if adapter is None:
        return model or default, None
    if model is None and not Path(adapter).is_dir():
        raise InputError(f"there is no folder {adapter}: train one first, or check --sft-ckpt")
    if (Path(adapter) / "config.json").is_file():
        if model is not None:
            raise InputError(f"{adapter} holds a whole model, not an adapter: leave --model out")
        return adapter, None
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        best = Path(adapter) / "best"
        raise InputError(
            f"{adapter} is neither an adapter nor a model: it holds no adapter_config.json and no config.json"
            + (f"; the model of that run is {best}" if best.is_dir() else "")
        )
    if model is None:
        model = read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
        family = Path(model or "").name.rpartition("-")[0]  # a tiny model by its name, wherever it was built
        if family in SIZES and Path(model).name == tiny_folder(f"tiny:{family}").name:
            model = f"tiny:{family}"
    return model or default, adapter


def check_resume(args):
    """Refuses --resume of a run that is not there, before a model is loaded with other settings than the run's."""
    place = args.out_dir if args.resume is True else args.resume
    if place and not (resume_dir(place) / "settings.json").is_file():
        raise InputError(f"--resume: there is no run in {place}; leave --resume out to start one")


def load_model(args, device):
    """The options of add_model_options -> VLM."""
    name, adapter = model_of(args.model, args.adapter)
    vlm = load_vlm(name, quant=args.quant, device=device, adapter=adapter, family="qwen2vl")
    if vlm.tiny and not adapter:
        print("note: this tiny model is untrained, its answers mean nothing")
    return vlm


def add_model_options(parser):
    g = parser.add_argument_group("model")
    # fmt: off
    g.add_argument("--model",
        help=f"hub name, folder or tiny (default: what the adapter was trained on, else {BASE_MODEL})")
    g.add_argument("--adapter", "--sft-ckpt", dest="adapter", metavar="FOLDER",
        help="trained by train_sft.py or train_grpo.py: a LoRA adapter, or a whole model")
    g.add_argument("--quant", default="none", choices=QUANTS, help="weights in 4 or 8 bit (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, help="prompts at a time; halved by itself when memory runs out "
        "(16; evaluate.py: 64 for models below 100 M parameters)")
    g.add_argument("--max-new-tokens", type=positive_int, default=256, metavar="TOKENS",
        help="longest response (%(default)s)")
    # fmt: on
    return g


def limit_pixels(processor, most):
    """Images of Qwen2-VL keep their shape and are scaled down to this area; the other families have one size."""
    size = getattr(processor.image_processor, "size", None) or {}
    if getattr(processor.image_processor, "merge_size", None) and size["longest_edge"] > most:
        least = min(size["shortest_edge"], most)
        processor.image_processor.size = dict(size) | {"longest_edge": most, "shortest_edge": least}


def training_of(adapter):
    """What the training run that wrote this folder says of its data -> dict, or None where nothing is beside it."""
    for path in (Path(adapter) / "training.json", Path(adapter).parent / "metrics.json"):
        if path.is_file():
            return read_json(path).get("dataset")
    return None


def how_to_measure(checkpoint, facts, prompts, conditions=None):
    """
    The commands that measure a trained model on rows that it was not trained on, one a line, and a line before them:
    test rows, or where there are none, of rows made elsewhere, those for validation. facts: those of the rows (see the
    trainers' load_rows); conditions: those that the phantom was drawn with, None for all.
    """
    lines, split, names = [], "test", facts["name"].split("+")
    data = facts.get("test_file") or ("both" if len(names) > 1 else names[0])
    if not facts.get("test_file") and not set(names) <= set(NAMES):
        data, split = facts["source"], "val"
    if conditions:
        data = f"{Path(checkpoint).parent / 'test_rows.json'}"
        drawn = ["--data", "phantom", "--split", "test", "--conditions", *conditions, "--output", data]
        lines.append(command("vqa_sft_grpo/prepare_data.py", *drawn))
    asked = ["--sft_ckpt", checkpoint, "--data", data, *["--split", "val"] * (split == "val"), "--prompts", *prompts]
    told = f"measure it on {'test' if split == 'test' else 'validation'} rows with"
    return "\n  ".join([told, *lines, command("vqa_sft_grpo/evaluate.py", *asked)])


class Answerer:
    """
    A model that answers prompts about images, greedily and in batches: generate() and score() keep the order of what
    they are given, and sort by length inside. images: uint8 arrays (H, W) or (H, W, 3), or None for a prompt without
    image.
    """

    def __init__(self, vlm, batch_size=None, max_new_tokens=256):
        self.vlm, self.max_new_tokens = vlm, max_new_tokens
        self.size = PartSize(batch_size or (64 if count_parameters(vlm.base) < 100e6 else 16))

    def generate(self, prompts, images):
        """-> texts."""

        def some(rows):
            batch = make_prompts(self.vlm, [prompts[r] for r in rows], [images[r] for r in rows])
            return write(self.vlm, batch, self.max_new_tokens)

        return self.longest_first(some, list(range(len(prompts))), [len(p) for p in prompts])

    @torch.no_grad()
    def score(self, prompts, images, texts):
        """
        How likely the model finds texts it wrote, read with these images -> per text {"answer", "response"}: mean
        log-probability (nats) of the tokens of the answer, and of the whole text without the token that ends it; None
        where there are none. The tokens are those of the text written anew, which can differ from the generated ones.
        """

        def some(rows):
            batch = make_prompts(self.vlm, [prompts[r] for r in rows], [images[r] for r in rows])
            spans = [[[answer_span(texts[r]), (0, len(texts[r]))]] for r in rows]
            found = score(self.vlm, batch, [[texts[r]] for r in rows], spans).tolist()
            return [{"answer": none_if_nan(answer), "response": none_if_nan(whole)} for answer, whole in found]

        placeholders = self.vlm.spec.image_tokens
        fit = [i for i, text in enumerate(texts) if text and not any(p in text for p in placeholders)]
        scores = [{"answer": None, "response": None} for _ in texts]
        for i, found in zip(fit, self.longest_first(some, fit, [len(prompts[i] + texts[i]) for i in fit]), strict=True):
            scores[i] = found
        return scores

    def longest_first(self, work, rows, lengths):
        """work(some rows) -> results in the order of rows; a batch too large for the memory fails at once."""
        order = sorted(range(len(rows)), key=lambda k: -lengths[k])
        with tqdm(total=len(rows), leave=False, disable=None, unit="row") as bar:  # shown in a terminal only

            def watched(part):
                found = work(part)
                bar.update(len(part))
                return found

            done = in_parts(watched, [rows[k] for k in order], self.size)
        results = dict(zip(order, done, strict=True))
        return [results[k] for k in range(len(rows))]


def none_if_nan(value):
    return None if value != value else value


def answer_span(text):
    """
    Where the answer stands in a response -> (first, one past the last) character; all of the text if it cannot be
    found.
    """
    answer = parse_response(text).answer
    if answer:
        mark = text.lower().rfind("answer")
        for start in (text.find(answer, mark) if mark >= 0 else -1, text.rfind(answer)):
            if start >= 0:
                return start, start + len(answer)
    return 0, len(text)


def pixel_boxes(response, shape):
    """The boxes of a Response in pixels of an image (height, width), corners in order; those without area go."""
    boxes = boxes_from_model(response.boxes, shape[1], shape[0])
    boxes = [[min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)] for x0, y0, x1, y1 in boxes]
    return [[x0, y0, x1, y1] for x0, y0, x1, y1 in boxes if x1 > x0 and y1 > y0]
