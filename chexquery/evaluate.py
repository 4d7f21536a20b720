"""
Measure a trained CheXQuery on test studies: reports beside reports written without looking, and what its queries do.

Usage:
    python chexquery/evaluate.py --checkpoint outputs/chexquery/train/001/phase3/best.pt
    python chexquery/evaluate.py --checkpoint RUN --splits-file outputs/splits/data_splits.json --export-rexrank FILE
    python chexquery/evaluate.py --dry-run                                   # an untrained model, seconds

Expected of these: see chexquery/README.md, where each number stands beside its command.
Writes to the run folder: metrics.json, report.md, report.html, predictions.jsonl (every line's text of every study).

Lines of the table: the model; the same with the film of another patient, and with grey films; one constant report
chosen on validation; the most frequent and a random training report; that of the training film with the most similar
global vector; the best training report with the true labels. Scores are of texts cleaned as R2Gen does, unless
--tokenizer says otherwise. An empty report counts. Phantom: also against what was drawn, and the test of erasing.
"""

import functools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch

from chexquery.cases import Films, add_data_options, load_studies, sections_of
from chexquery.faithfulness import faithfulness, faithfulness_tables
from chexquery.checkpoints import MADE_UP, add_writing_options, open_model
from chexquery.scoring import COLUMNS, consistency, image_use, score_lines
from shared.data.iu_xray import find_iu_xray, rexrank_entries
from shared.metrics.bertscore import bert_score
from shared.metrics.chexbert import load_chexbert
from shared.metrics.clinical import clinical_efficacy, positive_matrix
from shared.metrics.labels import CONDITIONS, label_report
from shared.metrics.report_baselines import baseline_reports
from shared.report import PHANTOM, Report, number, percent, short_path, with_interval
from shared.runtime import InputError, bounded, open_run_dir, positive_int, run_facts, script, script_parser
from shared.runtime import seed_everything, write_json, write_jsonl
from shared.training import settings_of

TASK = "chexquery"


def parse_args(argv=None, again=None):
    """again: of a checkpoint, which studies it was trained on; what is given on the command line wins."""
    parser = script_parser(__doc__, task=TASK, data="IU X-ray")
    g = parser.add_argument_group("what is measured")
    add_data_options(g)
    # fmt: off
    g.add_argument("--split", default="test", choices=["val", "test"], help="studies that are measured (%(default)s)")
    g.add_argument("--tokenizer", default="r2gen", choices=["r2gen", "whitespace"],
        help="how texts are cleaned (%(default)s)")
    g.add_argument("--faithfulness", type=bounded(int, 0, 10**6), default=100, metavar="N",
        help="studies for the tests of queries; 0: none (%(default)s)")
    add_writing_options(parser.add_argument_group("writing"))
    g = parser.add_argument_group("metrics")
    g.add_argument("--num-samples", type=bounded(int, 1, 100_000), default=1000, help="bootstrap samples (%(default)s)")
    g.add_argument("--bertscore-model", metavar="DIR", help="folder of an encoder; without it the column stays empty")
    g.add_argument("--bertscore-layer", type=positive_int, default=17, help="its layer (%(default)s)")
    g.add_argument("--chexbert", nargs=2, metavar=("FILE", "DIR"), help="chexbert.pth and a bert-base-uncased folder")
    g.add_argument("--export-rexrank", metavar="FILE", help="predictions in ReXrank's JSON layout")
    # fmt: on
    parser.set_defaults(**(again or {}))
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.splits_file, args.device, args.films = "phantom", None, "cpu", 32
        args.faithfulness, args.num_samples = 4, 50
    return args


def write_reports(model, films, device, batch_size, source=None, blank=False, silent=False, **decoding):
    """
    Reports on all films -> (texts, Seen parts {"logits", "whole"} as arrays). source: of whose film each report is
    written, indices; blank: grey in place of every film; silent: look only, write nothing.
    """
    source, texts, logits, whole = range(len(films)) if source is None else source, [], [], []
    with torch.inference_mode():
        for start in range(0, len(films), batch_size):
            images, present = films.get(list(source[start : start + batch_size]))
            images = np.full_like(images, 128) if blank else images
            seen = model(torch.from_numpy(images).to(device), torch.from_numpy(present).to(device))
            texts += [] if silent else model.write(seen.tokens, **decoding)[0]
            whole.append(seen.whole.float().cpu().numpy())
            logits += [] if seen.logits is None else [seen.logits.float().cpu().numpy()]
    return texts, {"logits": np.concatenate(logits) if logits else None, "whole": np.concatenate(whole)}


def another_patient(rows):
    """For each row the index of a row of another patient, half the list away; None where all are of one patient."""
    n, patients = len(rows), [row["patient"] for row in rows]
    if len(set(patients)) < 2:
        return None
    turned = [[(i + n // 2 + k) % n for k in range(n)] for i in range(n)]
    return [next(j for j in turned[i] if patients[j] != patients[i]) for i in range(n)]


def make_lines(model, studies, test, args, device, decoding):
    """-> ({line: texts}, parts of the model's own pass)."""
    notes, size = studies.notes, model.image_size
    films = Films(test, size, notes.get("drawn"), args.views)
    run = (model, films, device, args.batch_size)
    texts, seen = write_reports(*run, **decoding)
    lines = {"model": texts}
    if source := another_patient(test):
        lines["shuffled images"] = write_reports(*run, source=source, **decoding)[0]
    lines["blank images"] = write_reports(*run, blank=True, **decoding)[0]
    train, val = studies.split("train"), studies.split("val")
    train_films = Films(train, size, notes.get("drawn"), args.views)
    looked = write_reports(model, train_films, device, args.batch_size, silent=True)[1]
    of = {"train_vectors": looked["whole"], "vectors": seen["whole"]}
    of |= {name: positive_matrix([r["labels"] for r in rows]).astype(int).tolist()
           for name, rows in (("train_labels", train), ("labels", test))}  # fmt: skip
    references = ([r["reference"] for r in rows] for rows in (train, val))
    lines |= baseline_reports(*references, len(test), args.seed, tokenizer=args.tokenizer, **of)
    return lines, seen


def conditions_drawn(notes):
    return list(dict.fromkeys((notes.get("drawn") or {}).get("conditions") or CONDITIONS[1:]))


def make_report(studies, told, args, n, table, sentence, gains, abnormal, agreement, extra, drawn):
    phantom, limit = bool(studies.notes.get("phantom")), args.limit
    warnings = [MADE_UP] * (told["data"]["phantom"] and not phantom) + [f"Measured with --limit {limit}."] * bool(limit)
    warnings += ["Measured on validation studies, on which the model was chosen."] * (args.split == "val")
    report = Report(f"{studies.name}: reports of CheXQuery", phantom, warnings)
    where = f"checkpoint `{short_path(told['path'])}` (phase {told['phase']}), trained on {told['data']['name']}"
    report.text(f"{n} {args.split} studies ({studies.version}); {where}; intervals of 95 %, patients drawn.")
    columns = {name: key for name, key in COLUMNS.items() if key != "f1_micro_drawn" or drawn}
    groups = [list(columns.items())[:8], list(columns.items())[8:]]
    for group in groups:
        report.table(["", *(name for name, _ in group)],
                     [[line, *(with_interval(found.get(key), number) for _, key in group)]
                      for line, found in table.items()])  # fmt: skip
    keys = ("distinct_reports", "distinct_sentences", "share_most_frequent", "self_bleu", "words", "length_ratio")
    report.heading("Diversity")
    report.table(["", *keys], [[line, *(number(found["diversity"][k]) for k in keys)] for line, found in table.items()])
    report.text(f"References: {table['model']['diversity']['reference_distinct_reports']} distinct of {n}.")
    report.heading("Does it use the films?")
    report.table(
        ["micro-F1-13 of the model, minus", "difference"], [[k, with_interval(v, number)] for k, v in gains.items()]
    )
    report.text(f"**{sentence}**")
    report.heading(f"Abnormal studies only ({abnormal['n']})")
    names = {k: v for k, v in COLUMNS.items() if v in ("bleu_4", "rouge_l", "cider", "f1_micro_13", "f1_macro_13")}
    report.table(["", *names], [[line, *(with_interval(found.get(k), number) for k in names.values())]
                                for line, found in abnormal.get("table", {}).items()])  # fmt: skip
    if agreement:
        report.heading("Does the label head say what the text says?")
        kinds = ("both", "head only", "text only", "neither")
        report.table(["", *kinds, "agreement"], [[name, *(row[k] for k in kinds), percent(row["agreement"])]
                                                 for name, row in agreement.items()])  # fmt: skip
    for title, text, header, rows in extra:
        report.heading(title)
        report.text(text)
        report.table(header, rows)
    return report


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    model, told, decoding = open_model(args)
    data = told["data"]
    again = {"section": data["section"], **(data["drawn"] or {}), **data["again"]}
    if not again.get("splits_file"):  # not auto: other studies may be there now
        again["data"] = data["name"]
    if args.splits_file or args.data != "auto":
        again |= {"data": args.data, "splits_file": args.splits_file}
    args = parse_args(argv, again)
    args.views = data["views"]
    studies = load_studies(args)
    device, notes = told["device"], studies.notes
    phantom, test = bool(notes.get("phantom")), studies.split(args.split)
    if phantom:
        print(f"*** {PHANTOM} ***")
    print(studies)
    if not test or not studies.split("train") or not studies.split("val"):
        raise InputError(
            "train, val and test studies are all needed: the lines beside the model come from train and val"
        )
    known = {str(row["patient"]) for row in test} & set(data["patients"])
    if known and studies.name == data["name"]:
        raise InputError(f"{len(known)} of the patients to be measured on were trained on: give the --splits-file or"
                         " the options of the training")  # fmt: skip
    if args.export_rexrank:
        if studies.name != "iu_xray" or args.split != "test":
            raise InputError("--export-rexrank: ReXrank has the test studies of IU X-ray, and these are"
                             f" {args.split} studies of {studies.name}")  # fmt: skip
        find_iu_xray(studies.source)  # the references come from there; not to be missed when all is written
        if Path(args.export_rexrank).exists() and not args.overwrite:
            raise InputError(f"{args.export_rexrank} is there already: give --overwrite to replace it")
    labeller = load_chexbert(*args.chexbert, device) if args.chexbert else None
    run_dir = open_run_dir(args, TASK, "evaluate")
    lines, seen = make_lines(model, studies, test, args, device, decoding)

    references, groups = [row["reference"] for row in test], [row["patient"] for row in test]
    read = labeller.label if labeller else lambda texts: [label_report(text) for text in texts]
    written, true = {name: read(texts) for name, texts in lines.items()}, read(references)
    names = conditions_drawn(notes)
    drawn = (names, np.array([[row["truth"][c] == 1 for c in names] for row in test])) if phantom else None
    bert = None
    if args.bertscore_model:
        score = functools.partial(bert_score, model=args.bertscore_model, layer=args.bertscore_layer, device=device)
        bert = lambda ours, theirs: score(ours, theirs, per_report=True)["bertscore_f1"]  # noqa: E731
    options = {"bert": bert, "tokenizer": args.tokenizer, "num_samples": args.num_samples}
    table, draws = score_lines(lines, references, written, true, groups, drawn, **options)
    gains, sentence = image_use(draws)
    ill = [i for i, labels in enumerate(true) if labels["No Finding"] != 1]
    abnormal = {"n": len(ill)}
    if ill:
        some = [{k: [v[i] for i in ill] for k, v in of.items()} for of in (lines, written)]
        abnormal["table"] = score_lines(some[0], [references[i] for i in ill], some[1], [true[i] for i in ill],
                                        [groups[i] for i in ill], **options)[0]  # fmt: skip
    agreement = consistency(seen["logits"], told["thresholds"], written["model"]) if told.get("thresholds") else None
    some, found = test[: args.faithfulness], None
    if some:
        found = faithfulness(model, some, notes, args, told, device, decoding)

    write_json(run_dir / "metrics.json", {
        "dataset": studies.facts() | {"phantom": phantom}, "trained_on": {k: data[k] for k in ("name", "phantom")},
        "split": args.split, "n": len(test),
        "checkpoint": told["path"],
        "phase": told["phase"], "decoding": decoding, "labels_read_by": "CheXbert" if labeller else "rules",
        "lines": table, "image_use": {"gains": gains, "sentence": sentence}, "abnormal": abnormal,
        "consistency": agreement,
        "clinical": clinical_efficacy(written["model"], true), "faithfulness": found, "seed": args.seed,
        "settings": settings_of(args), **run_facts(started, device),
    })  # fmt: skip
    write_jsonl(run_dir / "predictions.jsonl", [
        {"uid": row["uid"], "reference": row["reference"], **{k: v[i] for k, v in lines.items()}}
        for i, row in enumerate(test)])  # fmt: skip
    extra = faithfulness_tables(found) if found else []
    page = make_report(studies, told, args, len(test), table, sentence, gains, abnormal, agreement, extra, drawn)
    page.write(run_dir, page=True)
    if args.export_rexrank:
        parts = [sections_of(text, notes["section"]) for text in lines["model"]]
        written = {str(row["uid"]): part for row, part in zip(test, parts, strict=True)}
        write_json(args.export_rexrank, rexrank_entries(written, studies.source))
    for line, row in table.items():
        print(f"{line:32s} BLEU-4 {with_interval(row['bleu_4'], number)}  ROUGE-L {number(row['rouge_l']['value'])}"
              f"  micro-F1-13 {with_interval(row['f1_micro_13'], number)}"
              f"  distinct {row['diversity']['distinct_reports']}")  # fmt: skip
    if drawn:
        print(
            f"micro-F1 against what was drawn ({', '.join(names)}):"
            f" {with_interval(table['model']['f1_micro_drawn'], number)}"
        )
    print(f"{sentence}\nresults in {run_dir} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()
