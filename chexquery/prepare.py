"""
Prepare the studies that CheXQuery trains on: IU X-ray or the phantom, split by patient, with labels and an audit.

Usage:
    python chexquery/prepare.py --splits-file outputs/splits/data_splits.json                  # IU X-ray, R2Gen's split
    python chexquery/prepare.py --splits-file FILE --split patient --section findings+impression --reports xml
    python chexquery/prepare.py --splits-file FILE --data phantom --films 4000
    python chexquery/prepare.py --dry-run

Where IU X-ray has to be: --data-dir; `python -m shared.data download iu_xray` fetches its reports.
Writes the rows as JSON (fields: chexquery/cases.py), and prints what the splits share: patients, and reports of val and
test that stand in train word for word.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

from chexquery.cases import add_data_options, audit, iu_rows, phantom_rows, read_splits, write_splits
from shared.metrics.chexbert import load_chexbert
from shared.metrics.labels import CONDITIONS
from shared.report import PHANTOM
from shared.runtime import DataNotFound, InputError, script, script_parser

TASK = "chexquery"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="IU X-ray")
    # fmt: off
    g = parser.add_argument_group("rows")
    add_data_options(g)
    g.add_argument("--split", default="r2gen", choices=["r2gen", "patient"],
        help="IU X-ray: R2Gen's 2,069 / 296 / 590 studies, or 70/15/15 of all patients (%(default)s)")
    g.add_argument("--reports", default="auto", choices=["auto", "csv", "xml"],
        help="IU X-ray: which files (%(default)s)")
    g.add_argument("--chexbert", nargs=2, metavar=("FILE", "DIR"),
        help="chexbert.pth and a bert-base-uncased folder, for --labels chexbert")
    # fmt: on
    args = parser.parse_args(argv)
    if args.labels == "chexbert" and not args.chexbert:
        parser.error("--labels chexbert needs --chexbert FILE DIR: chexbert.pth and a bert-base-uncased folder")
    if args.dry_run:
        args.data, args.films, args.splits_file = "phantom", 32, args.splits_file or "outputs/splits/dry-run.json"
    if args.out_dir:
        parser.error("prepare.py writes one file and no run folder: name it with --splits-file, not --out-dir")
    if not args.splits_file:
        args.splits_file = "outputs/splits/data_splits.json"
    return args


def make_rows(args):
    name = args.data.lower()
    if name not in ("auto", "iu_xray", "phantom"):
        raise InputError(f"--data {args.data}: there are auto, iu_xray and phantom")
    if name != "phantom":
        labeller = load_chexbert(*args.chexbert).label if args.labels == "chexbert" else None
        try:
            return iu_rows(args.data_dir, args.section, args.split, args.reports, args.labels, labeller, args.seed)
        except DataNotFound as error:
            if name != "auto":
                raise
            print(f"no IU X-ray ({error}): drawing the phantom")
    return phantom_rows(args.films, args.phantom_seed, args.section, args.labels, conditions=args.conditions,
                        prevalence=args.prevalence, severe=args.severe)  # fmt: skip


@script
def main(argv=None):
    args = parse_args(argv)
    path = Path(args.splits_file)
    if path.exists() and not (args.overwrite or args.dry_run):
        raise InputError(f"{path} is there already: give --overwrite to replace it, or another --splits-file")
    studies = make_rows(args)
    if args.limit:
        studies.limit(args.limit)
    if studies.notes["phantom"]:
        print(f"*** {PHANTOM} ***")
    print(studies)
    write_splits(path, studies)
    studies, found = read_splits(path), audit(studies.rows)  # read as training will read it, with its refusals
    for split in ("train", "val", "test"):
        rows = studies.split(split)
        counts = {name: sum(row["labels"][name] == 1 for row in rows) for name in CONDITIONS}
        print(f"{split}: {len(rows)} studies, {found['reports'][split]['distinct']} distinct reports; stated: "
              + ", ".join(f"{name} {n}" for name, n in counts.items() if n))  # fmt: skip
    for split, again in found["reports that occur in train"].items():
        print(f"reports of {split} that stand in train word for word: {again['rows']} of {again['of']}")
    print(f"rows in {path}")


if __name__ == "__main__":
    main()
