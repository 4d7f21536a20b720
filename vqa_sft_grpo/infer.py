"""
Ask a vision-language model about images: the answer, the whole response as it was read, and its boxes drawn on the
image.

Usage:
    python vqa_sft_grpo/infer.py --image film.png --question "Is there a pleural effusion?"
    python vqa_sft_grpo/infer.py --image a.png b.jpg folder/ --question "Is this normal?" "What is abnormal?"  # every question, every image
    python vqa_sft_grpo/infer.py --image film.png --question "..." --sft_ckpt checkpoints/qwen2vl_sft
    python vqa_sft_grpo/infer.py --image film.png --question "..." --model tiny  # untrained: shows the path, answers nothing sensible

Reads PNG, JPEG, TIFF, BMP and .npy, grey or colour (DICOM where pydicom is installed).
Writes to the run folder: answers.jsonl, boxes/*.png with the boxes of a response in the pixels of its image, errors.csv
with the images that could not be used, metrics.json.
For research and teaching only: this is not a medical device, and no output of it is medical advice.
"""

import json
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from PIL import Image, ImageDraw

from shared.data.images import find_images, read_image
from shared.models.inputs import build_inputs, generate_text, preprocess_images, render
from shared.models.loading import FAMILIES, QUANTS, load_vlm
from shared.runtime import InputError, atomic_file, free_gpu, open_run_dir, pick_device, positive_int, read_json
from shared.runtime import run_facts, script, script_parser, seed_everything, write_csv, write_json, write_jsonl
from vqa_sft_grpo.prompting import STYLES, boxes_from_model, build_prompt, parse_response

TASK = "vqa_sft_grpo"
BASE_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


# ------------------------------------------------------------------------------------------------- asking, in batches


class Answerer:
    """
    A model that answers prompts about images, greedily and in batches: generate() and score() keep the order of what
    they are given, and sort by length inside. images: uint8 arrays (H, W) or (H, W, 3), or None for a prompt without
    image.
    """

    def __init__(self, vlm, batch_size=16, max_new_tokens=256):
        self.vlm, self.batch_size, self.max_new_tokens = vlm, batch_size, max_new_tokens

    def generate(self, prompts, images):
        """-> texts."""

        def some(rows):
            return generate_text(self.vlm, self.inputs(prompts, images, rows), max_new_tokens=self.max_new_tokens)

        return self.in_batches(some, [len(p) for p in prompts])

    def score(self, prompts, images, texts):
        """
        How likely the model finds texts it wrote, read with these images -> per text {"answer", "response"}: mean
        log-probability (nats) of the tokens of the answer, and of the whole text without the token that ends it; None
        where there are none. The tokens are those of the text written anew, which can differ from the generated ones.
        """
        placeholders = FAMILIES[self.vlm.family].image_tokens
        fit = [i for i, t in enumerate(texts) if t and not any(p in t for p in placeholders)]
        scores = [{"answer": None, "response": None} for _ in texts]
        found = self.in_batches(
            lambda rows: self.score_batch(prompts, images, texts, [fit[r] for r in rows]),
            [len(prompts[i]) + len(texts[i]) for i in fit],
        )
        for i, score in zip(fit, found, strict=True):
            scores[i] = score
        return scores

    def in_batches(self, work, lengths):
        """
        work(row numbers) -> results, for all rows, longest first, so that a batch too large for the memory fails at
        once.
        """
        order = np.argsort([-n for n in lengths], kind="stable").tolist()
        results, start = [None] * len(lengths), 0
        while start < len(order):
            rows = order[start : start + self.batch_size]
            try:
                done = work(rows)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                done = None  # a new batch is made outside of the except block, which holds on to the old one's memory
            if done is None:
                free_gpu()
                self.batch_size = max(1, self.batch_size // 2)
                print(f"out of memory: going on with batches of {self.batch_size}", flush=True)
                continue
            for row, result in zip(rows, done, strict=True):
                results[row] = result
            start += len(rows)
        return results

    def inputs(self, prompts, images, rows, answers=None):
        """The batch of these rows; an image that several of them show is preprocessed once."""
        shown = [images[r] for r in rows]
        prompts = [prompts[r] for r in rows]
        if all(image is None for image in shown):
            return build_inputs(self.vlm, prompts, None, answers=answers)
        place, distinct = {}, []
        for image in shown:
            if id(image) not in place:
                place[id(image)] = len(distinct)
                distinct.append(image)
        pixels = preprocess_images(self.vlm.processor, distinct)
        return build_inputs(self.vlm, prompts, pixels.pick([place[id(image)] for image in shown]), answers=answers)

    @torch.inference_mode()
    def score_batch(self, prompts, images, texts, rows):
        inputs = self.inputs(prompts, images, rows, answers=[texts[r] for r in rows])
        labels = inputs.tensors.pop("labels")
        keep = int((labels != -100).sum(1).max())  # rows end together: the texts lie in the last columns
        logits = self.vlm.model(**inputs.tensors, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1].float()
        targets = labels[:, -keep:].clamp(min=0)
        logp = (logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)).cpu()  # (B, keep)
        results = []
        for row, values in zip(rows, logp, strict=True):
            in_answer, in_text = self.spans(prompts[row], texts[row], images[row] is not None)
            values = values[keep - len(in_text) :]
            results.append(
                {
                    "answer": float(values[in_answer].mean()) if in_answer.any() else None,
                    "response": float(values[in_text].mean()) if in_text.any() else None,
                }
            )
        return results

    def spans(self, prompt, text, with_image):
        """Which tokens of what follows the prompt belong to the answer, and which to the text -> two bool (tokens,)."""
        processor = self.vlm.processor
        written = render(processor, processor.chat_template, prompt, int(with_image), None, text)[1]
        offsets = self.vlm.tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        begin = max(0, written.find(text))  # a template may put a space in front
        first, last = answer_span(text)

        def touching(a, b):
            return np.array(
                [start < begin + b and end > begin + a and end > start for start, end in offsets], dtype=bool
            )

        return touching(first, last), touching(0, len(text))


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


def model_of(model, adapter, default=BASE_MODEL):
    """
    --model and --adapter -> (model, adapter). An adapter says which model it was trained on; a folder with a whole
    model (tiny models are trained whole) is the model itself.
    """
    if adapter is None:
        return model or default, None
    if (Path(adapter) / "config.json").is_file():
        if model is not None:
            raise InputError(f"{adapter} holds a whole model, not an adapter: leave --model out")
        return adapter, None
    if model is None and (Path(adapter) / "adapter_config.json").is_file():
        model = read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    return model or default, adapter


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


def to_bytes(pixels):
    """float (H, W) or (H, W, 3) in 0..1 -> uint8."""
    return np.rint(pixels * 255).astype(np.uint8)


def draw_boxes(image, boxes, colour=(255, 64, 64), width=448):
    """uint8 image and boxes in its pixels -> RGB picture at least `width` pixels wide, the boxes in outline."""
    picture = Image.fromarray(image).convert("RGB")
    scale = max(1.0, width / picture.width)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle(
            [min(x0, x1), min(y0, y1), max(x0, x1) - 1, max(y0, y1) - 1],
            outline=colour,
            width=max(2, picture.width // 220),
        )
    return picture


def with_caption(picture, text, size=14):
    """The picture with lines of text below it."""
    lines = [
        part
        for line in text.split("\n")
        for part in textwrap.wrap(line, max(10, round(picture.width / (size * 0.5)))) or [""]
    ]
    page = Image.new("RGB", (picture.width, picture.height + round(len(lines) * size * 1.35) + 10), "white")
    page.paste(picture)
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        pen.text((6, picture.height + 5 + i * size * 1.35), line, fill="black", font_size=size)
    return page


# --------------------------------------------------------------------------------------------------------------- script


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("what to ask")
    # fmt: off
    g.add_argument("--image", "--images", nargs="+", default=[], metavar="PATH",
        help="image files, folders (searched through) or glob patterns")
    g.add_argument("--question", "--questions", nargs="+", default=[], metavar="TEXT",
        help="questions; each is asked of every image")
    g.add_argument("--prompt", default="json", choices=STYLES,
        help="json: caption, reasoning, boxes and answer; think: thought, then answer (%(default)s)")
    # fmt: on
    add_model_options(parser)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.device, args.model, args.adapter, args.max_new_tokens = "cpu", "tiny", None, 16
        args.question = args.question or ["Is there a pleural effusion?"]
    elif not args.image or not any(q.strip() for q in args.question):
        parser.error('give at least one --image and one --question "..." (or --dry-run)')
    args.question = [q.strip() for q in args.question if q.strip()]
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    images, errors = {}, []
    if args.dry_run and not args.image:
        from shared.phantom import phantom_study

        images = {f"phantom-{i}": phantom_study(args.seed, i, 224).image for i in range(2)}
    paths = find_images(args.image)[: args.limit] if args.image else []
    for path in paths:
        try:
            images[str(path)] = to_bytes(read_image(path))
        except InputError as error:
            errors.append({"path": str(path), "error": str(error)})
    if not images:
        raise InputError(f"none of the {len(paths)} images could be used; {errors[0]['path']}: {errors[0]['error']}")

    vlm = load_model(args, device)
    run_dir = open_run_dir(args, TASK, "infer")
    answerer = Answerer(vlm, args.batch_size or 16, args.max_new_tokens)
    asked = [(name, question) for name in images for question in args.question]
    texts = answerer.generate([build_prompt(q, args.prompt) for _, q in asked], [images[name] for name, _ in asked])
    rows = [
        answer_row(name, question, text, images[name].shape[:2], args.prompt)
        for (name, question), text in zip(asked, texts, strict=True)
    ]

    for number, row in enumerate(rows):
        if row["boxes"]:
            row["picture"] = f"boxes/{number:04d}_{Path(row['image']).stem}.png"
            (run_dir / "boxes").mkdir(exist_ok=True)
            picture = with_caption(
                draw_boxes(images[row["image"]], row["boxes"]), f"{row['question']}\n{row['answer'] or 'no answer'}"
            )
            with atomic_file(run_dir / row["picture"]) as file:
                picture.save(file, "PNG")
    write_jsonl(run_dir / "answers.jsonl", rows)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    unread = sum(row["answer"] is None for row in rows)
    write_json(
        run_dir / "metrics.json",
        {
            "n": len(rows),
            "n_without_answer": unread,
            "n_errors": len(errors),
            "prompt": args.prompt,
            **vlm.facts(),
            **run_facts(started, device),
        },
    )
    for row in rows[:20]:
        print(
            f"  {row['image']}: {row['question']} -> {row['answer'] if row['answer'] is not None else 'NO ANSWER'}"
            + (f"  {row['picture']}" if row.get("picture") else "")
        )
        if len(rows) == 1:
            print(
                json.dumps(row["data"], ensure_ascii=False)
                if row["data"] is not None
                else f"  as written: {row['response'][:300]}"
            )
    if len(rows) > 20:
        print(f"  ... and {len(rows) - 20} more")
    for error in errors:
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    print(
        f"{len(rows)} questions asked, {unread} without a readable answer, {len(errors)} images skipped; results in"
        f" {run_dir}"
    )


def answer_row(image, question, text, shape, style):
    """One response -> the row of answers.jsonl; boxes in pixels of the image."""
    found = parse_response(text, style)
    return {
        "image": image,
        "question": question,
        "answer": found.answer,
        "data": found.data,
        "boxes": pixel_boxes(found, shape),
        "repair_level": found.level,
        "response": text,
        "picture": None,
    }


def pixel_boxes(response, shape):
    """The boxes of a Response in pixels of an image (height, width), corners in order; those without area go."""
    boxes = boxes_from_model(response.boxes, shape[1], shape[0])
    boxes = [[min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)] for x0, y0, x1, y1 in boxes]
    return [[x0, y0, x1, y1] for x0, y0, x1, y1 in boxes if x1 > x0 and y1 > y0]


if __name__ == "__main__":
    main()
