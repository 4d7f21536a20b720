"""
Ask a vision-language model about images: the answer, the whole response as it was read, and its boxes drawn on the
image.

Usage:
    python vqa_sft_grpo/infer.py --image film.png --question "Is there a pleural effusion?"
    python vqa_sft_grpo/infer.py --image a.png b.jpg folder/ --question "Is this normal?" "What is abnormal?"
    python vqa_sft_grpo/infer.py --image film.png --question "..." --sft_ckpt checkpoints/qwen2vl_sft
    python vqa_sft_grpo/infer.py --image film.png --question "..." --model tiny    # untrained: shows the path

Reads PNG, JPEG, TIFF, BMP and .npy, grey or colour (DICOM where pydicom is installed).
Writes to the run folder: answers.jsonl, boxes/*.png with the boxes of a response in the pixels of its image, errors.csv
with the images that could not be used, metrics.json.
For research and teaching only: this is not a medical device, and no output of it is medical advice.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

from shared.data.images import find_images, read_pixels
from shared.report import PHANTOM
from shared.runtime import InputError, atomic_file, open_run_dir, pick_device, run_facts, script, script_parser
from shared.runtime import seed_everything, write_csv, write_json, write_jsonl
from vqa_sft_grpo.asking import Answerer, add_model_options, load_model, pixel_boxes, training_of
from vqa_sft_grpo.pictures import draw_boxes, with_caption
from vqa_sft_grpo.prompting import STYLES, build_prompt, check_question, parse_response

TASK = "vqa_sft_grpo"


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
    args.question = [check_question(q.strip()) for q in args.question if q.strip()]
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    images, errors = load(args)
    trained_on = training_of(args.adapter) if args.adapter else None
    phantom = (args.dry_run and not args.image) or bool(trained_on and trained_on.get("phantom"))
    vlm = load_model(args, device)
    run_dir = open_run_dir(args, TASK, "infer")

    asked = [(name, question) for name in images for question in args.question]
    answerer = Answerer(vlm, args.batch_size or 16, args.max_new_tokens)
    texts = answerer.generate([build_prompt(q, args.prompt) for _, q in asked], [images[name] for name, _ in asked])
    shapes = [images[name].shape[:2] for name, _ in asked]
    rows = [answer_row(*a, text, shape, args.prompt) for a, text, shape in zip(asked, texts, shapes, strict=True)]

    unread = sum(row["answer"] is None for row in rows)
    write_jsonl(run_dir / "answers.jsonl", rows)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    write_json(run_dir / "metrics.json", {
        "n": len(rows), "n_without_answer": unread, "n_errors": len(errors), "prompt": args.prompt, "phantom": phantom,
        "trained_on": trained_on, **vlm.facts(), **run_facts(started, device),
    })  # fmt: skip
    for number, row in enumerate(rows):
        if row["boxes"]:
            row["picture"] = f"boxes/{number:04d}_{Path(row['image']).stem[:50]}.png"
            caption = f"{row['question']}\n{row['answer'] or 'no answer'}" + "\nPHANTOM" * phantom
            with atomic_file(run_dir / row["picture"]) as file:
                with_caption(draw_boxes(images[row["image"]], row["boxes"]), caption).save(file, "PNG")
    write_jsonl(run_dir / "answers.jsonl", rows)  # again, now with the names of the pictures

    if phantom:
        print(
            f"*** {PHANTOM if args.dry_run else 'This model was trained on PHANTOM films, drawn by this project.'} ***"
        )
    for row in rows[:20]:
        answer = "NO ANSWER" if row["answer"] is None else row["answer"]
        print(f"  {row['image']}: {row['question']} -> {answer}  {row['picture'] or ''}".rstrip())
    if len(rows) == 1:
        data = rows[0]["data"]
        print(f"  as written: {rows[0]['response'][:300]}" if data is None else json.dumps(data, ensure_ascii=False))
    if len(rows) > 20:
        print(f"  ... and {len(rows) - 20} more")
    for error in errors:
        print(f"  skipped {error['path']}: {error['error']}", file=sys.stderr)
    print(
        f"{len(rows)} questions asked, {unread} without a readable answer, {len(errors)} images skipped;"
        f" results in {run_dir}"
    )


def load(args):
    """-> ({name: uint8 image}, rows of errors.csv)."""
    images, errors = {}, []
    if args.dry_run and not args.image:
        from shared.phantom import phantom_study

        return {f"phantom-{i}": phantom_study(args.seed, i, 224).image for i in range(2)}, errors
    paths = find_images(args.image)[: args.limit]
    for path in paths:
        try:
            images[str(path)] = read_pixels(path)
        except InputError as error:
            errors.append({"path": str(path), "error": str(error)})
    if not images:
        raise InputError(f"none of the {len(paths)} images could be used; {errors[0]['path']}: {errors[0]['error']}")
    return images, errors


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


if __name__ == "__main__":
    main()
