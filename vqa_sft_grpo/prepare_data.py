r"""
Questions about images -> one file of rows for training and evaluation: VQA-RAD, SLAKE or the phantom, split without
leaks.

Usage:
    python vqa_sft_grpo/prepare_data.py --output data/train.json --dataset both --split train
    python vqa_sft_grpo/prepare_data.py --output data/test.json --dataset vqa_rad --split test \
        --grpo_output data/grpo_data.jsonl
    python vqa_sft_grpo/prepare_data.py --output data/phantom.json --dataset phantom --split all --studies 400

Writes --output, one JSON object per line; beside it <name>.audit.json (what the splits share, counts, checksums,
settings), and for the phantom the folder phantom_images/. A file that is there already needs --overwrite. `--split
train` holds the rows to train on ("split": "train") and the validation rows taken from them ("split": "val"); test rows
come with `--split test`, all of them with `--split all`.

What a row holds is said in vqa_sft_grpo/rows.py.

Policies (--policy); validation is a tenth of the training images, SLAKE's own for SLAKE:
    clean-train       official test set; training rows only of images that are in no test set (VQA-RAD: 1,152 rows, 111
                      images)
    image-disjoint    all rows split anew, 70/10/20, by image and cluster of near-identical images
    official-noframe  as published without VQA-RAD's rows in stock wording (1,797 rows); test images stay in training
    official          as published: 284 of VQA-RAD's 451 test questions are in training, reworded; needs --allow-overlap
The phantom is split by patient under each of them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before torchvision
from shared.phantom.findings import ORDER
from shared.phantom import phantom_settings
from shared.runtime import InputError, fraction, not_negative, positive_int, script, script_parser
from shared.runtime import write_json, write_jsonl
from vqa_sft_grpo.rows import NAMES, OFFICIAL, POLICIES, SPLITS, grpo_row, make_rows, write_rows

TASK = "vqa_sft_grpo"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="VQA-RAD and SLAKE (whichever are there)")
    g = parser.add_argument_group("rows", "--data (or --dataset) is vqa_rad, slake, both, phantom or auto, in any case")
    # fmt: off
    g.add_argument("--split", default="train", choices=list(SPLITS),
        help="train: training and validation rows (%(default)s)")
    g.add_argument("--policy", default="clean-train", choices=list(POLICIES),
        help="what may be trained on, see above (%(default)s)")
    g.add_argument("--allow-overlap", action="store_true",
        help="accept that --policy official trains on images and questions of the test set")
    g = parser.add_argument_group("output")
    g.add_argument("--output", metavar="FILE",
        help="rows, one JSON object per line (default: <split>.json in --out-dir, else in data/)")
    g.add_argument("--grpo-output", metavar="FILE",
        help="also write rows for train_grpo.py: image_path, question, gold, region, group, answer_type, split")
    g = parser.add_argument_group("phantom")
    g.add_argument("--studies", type=positive_int, metavar="N", help="films of training (or of the split asked for); "
        "validation and, with --split all, test get a tenth and three tenths (1000 train, 100 val, 300 test)")
    g.add_argument("--image-size", type=int, default=112, metavar="N", help="pixels per side, 28 to 512 (%(default)s)")
    g.add_argument("--conditions", nargs="+", metavar="NAME", help=f"draw and ask about these only: {', '.join(ORDER)}")
    g.add_argument("--prevalence", type=fraction, metavar="P",
        help="chance of each condition in patients who are not well, 0 to 1 (default: its own, 0.07 to 0.2)")
    g.add_argument("--severities", type=not_negative, nargs=3, metavar="W",
        help="weights of mild, moderate and severe findings: 0 0 1 is an easy course (default: 35 40 25)")
    # fmt: on
    args = parser.parse_args(argv)
    args.data = args.data.lower().replace("-", "_")
    if args.dry_run:
        args.data, args.studies, args.image_size, args.overwrite = "phantom", args.studies or 8, 56, True
        args.out_dir = args.out_dir or str(Path("outputs") / TASK / "prepare_data" / "dry-run")
    if args.data not in NAMES:
        parser.error(f"--data {args.data}: there is no such data set; there are {', '.join(NAMES)}")
    if args.policy == "official" and not args.allow_overlap:
        parser.error(OFFICIAL)
    if not 28 <= args.image_size <= 512:
        parser.error(f"--image-size must be between 28 and 512 pixels, not {args.image_size}")
    of_phantom = (args.studies, args.conditions, args.prevalence, args.severities)
    if args.data not in ("phantom", "auto") and any(value is not None for value in of_phantom):
        parser.error("--studies, --conditions, --prevalence and --severities are for --data phantom")
    if args.severities and not any(args.severities):
        parser.error("--severities needs one weight above 0")
    if args.output is None:
        args.output = str(Path(args.out_dir or "data") / f"{args.split}.json")
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    output, grpo = Path(args.output), Path(args.grpo_output) if args.grpo_output else None
    audit_path = output.parent / f"{output.stem}.audit.json"
    if grpo and grpo.resolve() in (output.resolve(), audit_path.resolve()):
        raise InputError(f"--output and --grpo-output must be two files, and {audit_path} is that of the audit")
    for path in filter(None, (output, grpo, audit_path)):
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} is there already: replace it with --overwrite, or name another file")
    rows, audit = make_rows(
        args.data,
        args.split,
        args.data_dir,
        args.policy,
        args.seed,
        image_dir=output.parent / "phantom_images",
        studies=args.studies,
        image_size=args.image_size,
        settings=phantom_settings(args.conditions, args.prevalence, args.severities),
        limit=args.limit,
    )
    write_rows(output, rows)
    if grpo:
        write_jsonl(grpo, [grpo_row(row, grpo.parent) for row in rows])
    write_json(audit_path, audit | {"settings": {k: v for k, v in vars(args).items() if k != "config"}})
    print_audit(audit)
    files = ", ".join(str(path) for path in (output, grpo) if path)
    print(f"{len(rows)} rows in {files}; the audit with all numbers is in {audit_path}")


def print_audit(audit):
    """The audit in a few lines; the file has all of it."""
    shares = "training shares images with the test set" if audit["overlap"] else "no test image is in training"
    print(f"policy {audit['policy']}; {shares}")
    for name, found in audit.get("data", {}).items():
        parts = [f"{split} {found['counts'].get(split, 0)} rows on {n} images" for split, n in found["images"].items()]
        print(f"{name}: {found['version']}; {', '.join(parts)}")
        left_out = ", ".join(f"{n} ({reason})" for reason, n in found["left_out"].items() if n)
        print(f"  left out: {left_out or 'nothing'}")
        for pair, numbers in found["images in two splits"].items():
            print(f"  images in both {pair.replace(', ', ' and ')}: {numbers['shared']}")
        for key, value in found.items():
            if isinstance(value, dict) and "rows" in value and "of" in value:
                print(f"  {key}: {value['rows']} of {value['of']}")
        print(
            f"  in train: {found['train rows that repeat another']['repeats']} repeats,"
            f" {found['conflicting answers in train']['pairs']} questions with conflicting answers"
        )
    for note in audit["absent"]:
        print(f"*** not in these rows: {note} ***")
    for split, counts in audit["counts"].items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts["by answer type"].items())
        yes = counts["closed answers"]
        print(
            f"{split}: {counts['rows']} rows ({kinds}; yes {yes['yes']}, no {yes['no']}, other closed {yes['other']})"
            f" on {counts['images']} images, {counts['with region']} with a region"
        )


if __name__ == "__main__":
    main()
