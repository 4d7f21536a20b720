"""
Fetch a data set of images and texts, or look through it for what its splits share.

Usage:
    python -m shared.data download vqa_rad --data-dir data             # or slake, iu_xray
    python -m shared.data download iu_xray --images                    # its 14 GB of films too
    python -m shared.data audit slake --allow-missing-images           # texts only
    python -m shared.data audit vqa_rad --hash-images --json audit.json
"""

import argparse
import importlib
import os
from pathlib import Path

from shared.runtime import script, write_json

# Data set -> where its download and its audit are, imported when asked for: vqa_sft_grpo imports this package.
SETS = {
    "iu_xray": ("shared.data.iu_xray:download", "shared.data.iu_xray:audit"),
    "vqa_rad": ("vqa_sft_grpo.sources:download_vqa_rad", "vqa_sft_grpo.leaks:audit_vqa_rad"),
    "slake": ("vqa_sft_grpo.sources:download_slake", "vqa_sft_grpo.leaks:audit_slake"),
}


def parse_args(argv=None):
    describe = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(prog="python -m shared.data", description=__doc__, **describe)
    commands = parser.add_subparsers(dest="command", required=True, metavar="download|audit")
    # fmt: off
    for name, text in (("download", "fetch the files"), ("audit", "list what the splits share")):
        g = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        g.add_argument("data", type=str.lower, choices=list(SETS), help="data set")
        g.add_argument("--data-dir", metavar="DIR", default=os.environ.get("MEDVLM_DATA") or "data",
            help="folder of all data sets; $MEDVLM_DATA, else data (%(default)s)")
        if name == "download":
            g.add_argument("--images", action="store_true",
                help="iu_xray: the films too, about 14 GB; the other sets always come with theirs")
            continue
        g.add_argument("--allow-missing-images", action="store_true",
            help="look at the texts also where images are missing")
        g.add_argument("--hash-images", action="store_true",
            help="look for near-identical images too; about 2 ms per image of 256 pixels")
        g.add_argument("--json", metavar="FILE", help="write numbers and ids to this file")
    # fmt: on
    return parser.parse_args(argv)


def summary(value, name=""):
    """Nested results of audits -> printable lines; a list is given by its length."""
    if isinstance(value, dict) and value:
        return [line for key, item in value.items() for line in summary(item, f"{name}{' / ' if name else ''}{key}")]
    return [f"{name}: {len(value) if isinstance(value, (list, dict)) else value}"]


@script
def main(argv=None):
    args = parse_args(argv)
    module, name = SETS[args.data][args.command == "audit"].split(":")
    work = getattr(importlib.import_module(module), name)
    if args.command == "download":
        folder = work(args.data_dir, **({"images": args.images} if args.data == "iu_xray" else {}))
        print(f"{args.data} is in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        return
    found = work(args.data_dir, args.allow_missing_images, args.hash_images)
    print("\n".join(summary(found)))
    if args.json:
        write_json(Path(args.json), found)
        print(f"numbers and ids are in {args.json}")


if __name__ == "__main__":
    main()
