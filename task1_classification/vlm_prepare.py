"""
Make the table of films and labels that the other vlm_ scripts read, and say what is in it.

Usage:
    python task1_classification/vlm_prepare.py                       # IU X-ray, 14 labels from its index, 70/15/15
    python task1_classification/vlm_prepare.py --labels mesh9 --split r2gen
    python task1_classification/vlm_prepare.py --data phantom --films 2000 --severe
    python task1_classification/vlm_prepare.py --dry-run

Writes to the run folder: films.csv (a row per frontal film), images/ (phantom and MedMNIST: their films as PNG),
mapping.csv (index terms -> labels), report.md and metrics.json (counts per label and split, agreement of the index with
what the report labeller reads, patients and films in two splits, what was left out).

--labels mesh14   the 14 CheXpert names, from the index terms with their qualifiers
         mesh9    the nine of earlier work
         reports  the 14 names as the report labeller reads them in findings and impression
Unknown is empty: reports that nobody indexed, and with `reports` what is only suspected or has no text.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import numpy as np
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from shared.data.image_sets import SPLITS
from shared.data.iu_xray import mesh_labels
from shared.report import Report, number, percent
from shared.runtime import InputError, atomic_file, command, fraction, open_run_dir, pick_device
from shared.runtime import run_facts, script, script_parser, write_csv, write_json
from task1_classification.vlm_data import MAPPINGS, add_film_options, films_of, text_labels

TASK = "task1_classification"


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="iu_xray")
    add_film_options(parser)
    g = parser.add_argument_group("splits")
    share = "IU X-ray: of the patients (0.7 0.15 0.15)"
    g.add_argument("--shares", nargs=3, type=fraction, metavar=("TRAIN", "VAL", "TEST"), help=share)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.films, args.image_size = "phantom", 16, 64
    if args.shares and (abs(sum(args.shares) - 1) > 1e-6 or min(args.shares) <= 0):
        parser.error(f"--shares must add up to 1, each above 0, not {' '.join(map(str, args.shares))}")
    if args.shares and args.split == "r2gen":
        parser.error("--split r2gen is R2Gen's own: leave --shares out")
    return args


def write_table(films, run_dir):
    """films.csv, and films that are no files yet as PNG."""
    lines = []
    for row, truth in zip(films.rows, films.truth, strict=True):
        image = row["image"]
        if isinstance(image, np.ndarray):
            name = f"images/{row['split']}-{row['id'].removeprefix(row['split'] + '-')}.png"
            with atomic_file(run_dir / name) as file:
                Image.fromarray(image).save(file, "PNG")
        else:
            name = str(Path(image).absolute())
        line = {"id": row["id"], "patient": row["patient"], "split": row["split"], "image": name}
        line |= {"study": films.name, "report": row["report"]}
        lines.append(line | {n: "" if np.isnan(v) else int(v) for n, v in zip(films.labels, truth, strict=True)})
    write_csv(run_dir / "films.csv", lines)


def counts(films):
    """-> a row per label: films known, positive and their share in each split."""
    rows = []
    for j, label in enumerate(films.labels):
        row = {"label": label}
        for split in SPLITS:
            known = films.truth[films.rows_of(split), j]
            known = known[~np.isnan(known)]
            row |= {f"{split}_known": len(known), f"{split}_positive": int(known.sum())}
            row[f"{split}_share"] = float(known.mean()) if len(known) else None
        rows.append(row)
    return rows


def agreement(films):
    """
    Index against report labeller, one film of each study where both know -> a row per condition: counts and kappa.
    Neither is the truth: the labeller reads what is written, the index leaves things out.
    """
    first = {row["patient"]: row for row in films.rows}.values()
    pairs = [(mesh_labels(row["mesh"], MAPPINGS["mesh14"]), text_labels(row["report"])) for row in first]
    rows = []
    for name in MAPPINGS["mesh14"]:
        both = np.array([(a[name], b[name]) for a, b in pairs if None not in (a[name], b[name])], int).reshape(-1, 2)
        varied = all(len(set(column)) > 1 for column in both.T)
        cells = {"both": both.all(1), "index only": both[:, 0] > both[:, 1], "text only": both[:, 0] < both[:, 1]}
        row = {"label": name, "studies": len(both)} | {key: int(cell.sum()) for key, cell in cells.items()}
        rows.append(row | {"kappa": float(cohen_kappa_score(*both.T)) if varied else None})
    return rows


def audit(films):
    """What may not happen, and how much there is of it."""
    places = {}
    for row in films.rows:
        places.setdefault(row["patient"], set()).add(row["split"])
    _, films_each = np.unique(films.column("patient"), return_counts=True)
    return {
        "patients in two splits": sum(len(found) > 1 for found in places.values()),
        "patients with more than one film": int((films_each > 1).sum()),
        "films with no known label": int(np.isnan(films.truth).all(1).sum()),
        "films without a report": sum(not row["report"] for row in films.rows),
        "films whose index says that their quality is poor": sum(
            any("Technical Quality" in item for item in row.get("mesh", ())) for row in films.rows
        ),
    }


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    device, _ = pick_device("cpu")
    shares = dict(zip(SPLITS, args.shares, strict=True)) if args.shares else None
    films = films_of(args, shares=shares)
    if not all(len(films.rows_of(split)) for split in SPLITS):
        raise InputError(f"{films.name} has no film in one of train, val and test: change --shares or --limit")
    run_dir = open_run_dir(args, TASK, "vlm_prepare")
    write_table(films, run_dir)
    table, found, compared = counts(films), audit(films), agreement(films) if "mesh" in films.rows[0] else []
    mapping = films.notes.get("mapping")
    if mapping:
        write_csv(run_dir / "mapping.csv", [{"label": k, "index terms": v} for k, v in mapping.items()])
    limited = [f"Made with --limit {args.limit}: the counts are not those of the data set."] * bool(args.limit)
    report = Report(f"{films.name}: films and labels", films.phantom, limited)
    report.text(str(films) + "; " + ", ".join(f"{value} {name}" for name, value in found.items()) + ".")
    for reason, n in films.notes.get("left_out", {}).items():
        report.text(f"Left out: {n} studies, {reason}.") if n else None
    header = ["label", *(f"{split}: positive of known" for split in SPLITS), "share in test"]
    lines = []
    for row in table:
        cells = [f"{row[f'{s}_positive']} of {row[f'{s}_known']}" for s in SPLITS]
        lines.append([row["label"], *cells, percent(row["test_share"])])
    report.table(header, lines)
    if mapping:
        report.heading("From index terms to labels")
        report.text("A head, and qualifiers that must be there as well; unindexed reports are unknown.")
        report.table(["label", "items, any of which makes it positive"], list(mapping.items()))
    if compared:
        report.heading("Index against report labeller")
        report.text("Positive in both, in one only, of the studies where both know; neither is the truth.")
        keys = ("label", "studies", "both", "index only", "text only")
        report.table([*keys, "kappa"], [[*(row[k] for k in keys), number(row["kappa"])] for row in compared])
        for row in compared:
            print(f"  {row['label']:28} both {row['both']:4}  index only {row['index only']:4}  text only"
                  f" {row['text only']:4}  kappa {number(row['kappa'])}")  # fmt: skip
    report.write(run_dir)
    write_json(run_dir / "metrics.json", {
        "dataset": films.facts(), "counts": table, "audit": found, "agreement": compared, **run_facts(started, device),
    })  # fmt: skip
    print(f"table: {run_dir / 'films.csv'}\nnext: {command(f'{TASK}/vlm_train.py', '--data', run_dir / 'films.csv')}")


if __name__ == "__main__":
    main()
