"""
Measure a model on medical questions: is it right, does it need the image, and does it look where it should?

Usage:
    python vqa_sft_grpo/evaluate.py --model tiny --data phantom --limit 40  # offline, a minute; untrained
    python vqa_sft_grpo/evaluate.py --compare outputs/vqa_sft_grpo/evaluate/001 outputs/vqa_sft_grpo/evaluate/002
    python vqa_sft_grpo/evaluate.py --dataset slake --sft_ckpt checkpoints/qwen2vl_sft
    python vqa_sft_grpo/evaluate.py --dataset vqa_rad --sft_ckpt checkpoints/qwen2vl_sft --sentence-encoder FOLDER
    python vqa_sft_grpo/evaluate.py --dataset phantom --split train --sft_ckpt ... --export-grpo data/grpo_scored.jsonl

Every row counts: what cannot be read, parsed or loaded is wrong. Intervals draw whole images (95 %). The first prompt
of --prompts is the main one: the controls and the confidence are measured with it, the rest with each of them.

At a glance     one table, a column per prompt: right answers, valid JSON, boxes, coverage and accuracy by the
                similarity of caption and question, answers that change without gold, own and random regions
Compare         --compare A B: that table for two runs (base and trained model) side by side, with paired differences
Answers         scoring.py: closed strict, open exact, clipped recall, precision, F1; a synonym list and two published
                scripts' ways of counting in columns of their own
Controls        question without image, grey image, image of another group, the most frequent answer of the training
                rows
Boxes           share of responses with a box, IoU with the gold region beside the best constant box (chosen on training
                rows)
Confidence      risk-coverage and AURC for the answer's log-probability, caption-question similarity and stability under
                edits
Counterfactual  region removed against K random regions of its size and share of foreground, several fills
                (counterfactual.py): how often the answer changes, and how much less likely the model finds its own
                answer and its whole response. Where a response reasons before it answers, the answer follows from the
                reasoning, and only the response's drop can show that the region mattered. The region is the gold one,
                with the model's own beside it; where no gold one is known the model's own alone, counted apart
                ("self"): a model can choose it to look good.
Redrawn         phantom only: the same film drawn anew without the finding asked about, and without another one
                (prepare_data.py). No fill can leave a trace there, and the right answer is known, so it needs no random
                regions beside it

Writes to the run folder: metrics.json, predictions.jsonl, report.md, report.html (self-contained), figures/*.png,
errors.csv. For research and teaching only; nothing here is medical advice.
"""

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

from shared.data.download import sha256_of
from shared.metrics.statistics import effective_clusters
from shared.report import PHANTOM, markdown_table
from shared.runtime import InputError, not_negative, open_run_dir, pick_device, positive_int, run_facts
from shared.runtime import script, script_parser, seed_everything, write_csv, write_json, write_jsonl
from vqa_sft_grpo.answers import ask, ask_redrawn, load_images, majority_answers, pick_cases, redrawn_strips
from vqa_sft_grpo.answers import run_counterfactual, scores_of, shuffled_images, telling_cases
from vqa_sft_grpo.asking import Answerer, add_model_options, load_model, training_of
from vqa_sft_grpo.counterfactual import FILLS, blank, region_iou
from vqa_sft_grpo.glance import at_a_glance, compare, glance_table, unreadable_note
from vqa_sft_grpo.measures import SMALL_ENCODER, SentenceEncoder, at_thresholds, aurc_row, caption_similarity
from vqa_sft_grpo.measures import case_summary, json_success, measure_boxes, measure_counterfactual, measure_redrawn
from vqa_sft_grpo.measures import paired_difference, risk_coverage, strata, summarise
from vqa_sft_grpo.prompting import STYLES, build_prompt
from vqa_sft_grpo.report import draw_risk_coverage, draw_strip, write_report
from vqa_sft_grpo.rows import NAMES, OFFICIAL, POLICIES, grpo_row, make_rows, read_rows
from vqa_sft_grpo.scoring import SYNONYMS_NAME
from vqa_sft_grpo.sources import load_slake
from vqa_sft_grpo.terms import add_regions

TASK = "vqa_sft_grpo"
CONTROLS = ("question only", "blank image", "shuffled image", "majority answer")
OF_ROW = ("id", "image", "question", "answer_type", "question_type", "content_type", "group", "region")
OF_ANSWER = "response answer level valid boxes caption parsed correct exact recall precision f1".split()


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="VQA-RAD and SLAKE (whichever are there)")
    # --data also takes a file of rows
    g = parser.add_argument_group("rows")
    g.add_argument("--split", default="test", choices=["train", "val", "test"], help="rows to measure on (%(default)s)")
    # fmt: off
    g.add_argument("--policy", default="clean-train", choices=list(POLICIES),
        help="split policy, see prepare_data.py (%(default)s)")
    g.add_argument("--allow-overlap", action="store_true",
        help="accept --policy official, where images of the test set are in training; every result is then marked")
    g.add_argument("--regions", metavar="FILE", help="gold regions of your own, a CSV as train_grpo.py takes it")
    g.add_argument("--studies", type=positive_int, metavar="N", help="phantom: films to ask about (300 for test, 100 "
        "for val, 1000 for train); for other settings make a file with prepare_data.py and give it as --data")
    add_model_options(parser)
    g = parser.add_argument_group("what to measure")
    g.add_argument("--prompts", nargs="+", default=["json", "think"], choices=STYLES,
        help="prompt styles; controls and tests use the first (json think)")
    g.add_argument("--counterfactual-cases", type=not_negative, default=100, metavar="N",
        help="rows for the counterfactual test, drawn by the seed; each takes up to (2 + K) x fills + 2 answers, with "
        "each of --prompts; 0: leave it out (%(default)s)")
    g.add_argument("--random-regions", type=positive_int, default=5, metavar="K",
        help="random regions per case, at least 5 (%(default)s)")
    g.add_argument("--fills", nargs="+", default=list(FILLS), choices=FILLS,
        help="ways to take a region out; at least two (all)")
    g.add_argument("--sentence-encoder", metavar="FOLDER", help="a BERT-like encoder (folder or hub name) for "
        "caption-question similarity, mean pooling (tiny:bert for --model tiny and its adapters, else "
        f"{SMALL_ENCODER}; where that cannot be had the similarity is left out)")
    g.add_argument("--export-grpo", metavar="FILE",
        help="write the rows for train_grpo.py with what was measured; not for test rows")
    g.add_argument("--compare", nargs=2, metavar=("A", "B"),
        help="no model: compare two run folders of this script, about the same rows")
    # fmt: on
    args = parser.parse_args(argv)
    args.prompts, args.fills = list(dict.fromkeys(args.prompts)), list(dict.fromkeys(args.fills))
    args.counterfactual_cases = int(args.counterfactual_cases)
    if args.random_regions < 5:
        parser.error("--random-regions must be at least 5: the difference to fewer is mostly chance")
    if len(args.fills) < 2:
        parser.error("--fills: name at least two, a single one cannot tell its own oddity from the region's")
    if args.export_grpo and args.split == "test":
        parser.error("--export-grpo makes training data: use --split train or val")
    if args.policy == "official" and not args.allow_overlap:
        parser.error(OFFICIAL)
    args.data = args.data if Path(args.data).is_file() else args.data.lower().replace("-", "_")
    if args.data not in NAMES and not Path(args.data).is_file():
        parser.error(f"--data {args.data}: there is no such file or data set; there are {', '.join(NAMES)}")
    if args.dry_run:
        args.device, args.model, args.adapter, args.data = "cpu", "tiny", None, "phantom"
        args.limit, args.max_new_tokens = args.limit or 12, 24
        args.counterfactual_cases = min(args.counterfactual_cases, 3)
    return args


# ----------------------------------------------------------------------------------------------------------------- rows


def load_rows(args):
    """-> (rows to measure, training rows for the majority answer and the constant box, facts for metrics.json)."""
    if Path(args.data).is_file():
        every = read_rows(args.data)
        rows, train_rows = ([row for row in every if row["split"] == split] for split in (args.split, "train"))
        facts = {
            "name": "+".join(sorted({row["dataset"] for row in rows or every})),
            "policy": ", ".join(sorted({row["policy"] for row in every})),
            "overlap": any(row["overlap"] for row in every),
            "source": args.data,
            "sha256": sha256_of(Path(args.data)),
        }
    else:
        options = dict(
            data_dir=args.data_dir, policy=args.policy, seed=args.seed, studies=args.studies,
            image_dir=Path("outputs") / TASK / "phantom_images",
        )  # fmt: skip
        drawn = args.data == "phantom"
        split, limit = (args.split, args.limit) if drawn else ("all", None)
        every, audit = make_rows(args.data, split, **options, limit=limit)
        rows, train_rows = ([row for row in every if row["split"] == s] for s in (args.split, "train"))
        if audit["phantom"] and args.split != "train":
            drawn_rows, _ = make_rows("phantom", "train", **options | {"studies": 200})
            train_rows = [row for row in drawn_rows if row["split"] == "train"]
        facts = {
            "name": "+".join(sorted({row["dataset"] for row in rows})) or args.data,
            "policy": audit["policy"],
            "overlap": audit["overlap"],
            "source": args.data_dir if not audit["phantom"] else "drawn by this project",
        }
        if "slake" in facts["name"] and not any(row["dataset"] == "slake" for row in train_rows):
            # its training images are not there, and the majority answer needs none
            train_rows += load_slake(args.data_dir, allow_missing_images=True).split("train")
    facts["with_given_region"] = add_regions(every, args.regions) if args.regions else 0
    if not rows:
        raise InputError(
            f"{args.data} has no {args.split} rows with their images; make them with prepare_data.py, or take another"
            " --split"
        )
    rows = rows[: args.limit]
    version = f"split {args.split}, policy {facts['policy']}" + (f", first {args.limit} rows" if args.limit else "")
    facts |= {"phantom": any(row["dataset"] == "phantom" for row in rows), "limit": args.limit}
    facts |= {"train_rows": len(train_rows), "version": version}
    return rows, train_rows, facts


# --------------------------------------------------------------------------------------------------------------- script


def evaluate(answerer, rows, images, train_rows, args, encoder=None):
    """
    Everything that is measured, for an Answerer or anything with its generate() and score().
    -> (metrics, one prediction per row, counterfactual cases, records of the main prompt, risk-coverage curves).
    """
    style, k = args.prompts[0], args.random_regions
    answers = ask_with_controls(answerer, rows, images, train_rows, args)
    measured = {
        name: measure_prompt(answerer, rows, images, answers[f"{name} prompt"], name, args, encoder)
        for name in args.prompts
    }
    records, main = answers[f"{style} prompt"], measured[style]
    redrawn = ask_redrawn(answerer, rows, style)
    confidence, curves = measure_confidence(rows, records, main.scores, main.similarity, main.summaries)

    groups, correct = [row["group"] for row in rows], [bool(r["correct"]) for r in records]
    controls = {name: [r["correct"] for r in answers[name]] for name in CONTROLS if name in answers}
    tested = measure_counterfactual(main.cases, rows, args.fills, k)
    counted = {"cases": len(main.cases), "asked_for": args.counterfactual_cases, "random_regions": k}
    predictions = predictions_of(rows, images, answers, measured, redrawn)
    metrics = {
        "n": len(rows),
        "clusters": effective_clusters(groups),
        "main_prompt": style,
        "synonyms": SYNONYMS_NAME,
        "glance": {name: at_a_glance(predictions, name, name == style) for name in args.prompts},
        "rows": {name: summarise(rows, some) for name, some in answers.items()},
        "strata": strata(rows, records),
        "json": {name: json_success(answers[f"{name} prompt"]) for name in args.prompts},
        "boxes": measure_boxes(rows, records, images, train_rows) if style == "json" else None,
        "needs_image": {name: paired_difference(correct, other, groups) for name, other in controls.items()},
        "confidence": confidence,
        "redrawn": measure_redrawn(rows, records, redrawn),
        "counterfactual": {**counted, "fills": args.fills, "not_taken": main.refused, **tested},
    }
    return metrics, predictions, main.cases, records, curves


def measure_prompt(answerer, rows, images, records, style, args, encoder):
    """
    What the answers to one prompt are followed by -> scores (log-probabilities per row), cases of the counterfactual
    test and their summaries by row, how many were refused why, similarity of caption and question per row (or None).
    """
    scores, cases, refused = score_responses(answerer, rows, images, records, style), [], {}
    if args.counterfactual_cases:
        limit, k = args.counterfactual_cases, args.random_regions
        cases, refused = pick_cases(rows, records, images, limit, k, args.seed)
        run_counterfactual(answerer, rows, records, images, cases, style, args.fills, args.seed, scores)
        reasons = [f"{n} {reason} ({source} region)" for source, some in refused.items() for reason, n in some.items()]
        told = f"{len(cases)} cases; not taken: {', '.join(reasons) or 'none'}"
        print(f"counterfactual test, {style} prompt: {told}", flush=True)
    summaries = {case["row"]: case_summary(case, args.fills, args.random_regions) for case in cases}
    similarity = caption_similarity(rows, records, encoder) if encoder else None
    return SimpleNamespace(scores=scores, cases=cases, refused=refused, summaries=summaries, similarity=similarity)


def predictions_of(rows, images, answers, measured, redrawn):
    """-> one dict per row, all that predictions.jsonl and --compare need."""
    predictions = []
    for i, row in enumerate(rows):
        found = {k: row.get(k) for k in OF_ROW} | {"gold": row["answer"]}
        found |= {name: {k: some[i][k] for k in OF_ANSWER if k in some[i]} for name, some in answers.items()}
        found |= {
            field: {k: some[i][k] for k in ("response", "answer")} for field, some in redrawn.items() if i in some
        }
        for style, told in measured.items():
            mine, region = found[f"{style} prompt"], row.get("region") if images[i] is not None else None
            mine["counterfactual"] = told.summaries.get(i)
            mine["answer_logprob"], mine["response_logprob"] = told.scores[i]["answer"], told.scores[i]["response"]
            boxed = region and style == "json"  # the other prompt asks for no boxes
            mine["iou"] = region_iou(mine["boxes"], region, *images[i].shape[:2]) if boxed else None
            if told.similarity:
                mine["caption_similarity"] = told.similarity[i]
        predictions.append(found)
    return predictions


def ask_with_controls(answerer, rows, images, train_rows, args):
    """-> {name of the prompt or control: one record per row}; the first prompt of --prompts is the controls', too."""
    answers = {f"{style} prompt": ask(answerer, rows, images, style) for style in args.prompts}
    style, there = args.prompts[0], {image.shape for image in images if image is not None}
    answers["question only"] = ask(answerer, rows, images, style, with_image=False)
    grey = {shape: blank(next(i for i in images if i is not None and i.shape == shape)) for shape in there}
    answers["blank image"] = ask(answerer, rows, [i if i is None else grey[i.shape] for i in images], style)
    shuffled = shuffled_images(rows, images, args.seed)
    if shuffled is not None:
        answers["shuffled image"] = ask(answerer, rows, shuffled, style)
    majority = majority_answers(rows, train_rows)
    if majority is not None:
        guesses = zip(rows, majority, strict=True)
        answers["majority answer"] = [scores_of(row, answer) | {"answer": answer} for row, answer in guesses]
    for name, records in answers.items():
        say(name, rows, records)
    return answers


def score_responses(answerer, rows, images, records, style):
    """How likely the model finds what it wrote -> per row {"answer", "response"}, None where there is no image."""
    good = [i for i, image in enumerate(images) if image is not None]
    prompts, seen = [build_prompt(rows[i]["question"], style) for i in good], [images[i] for i in good]
    found = dict(zip(good, answerer.score(prompts, seen, [records[i]["response"] for i in good]), strict=True))
    return [found.get(i, {"answer": None, "response": None}) for i in range(len(rows))]


def measure_confidence(rows, records, scores, similarity, summaries):
    """-> (AURC of every signal, over all rows and over the counterfactual cases; curves of risk and coverage)."""
    correct, groups = [bool(r["correct"]) for r in records], [row["group"] for row in rows]
    signals = {f"{part} log-probability": [score[part] for score in scores] for part in ("answer", "response")}
    signals |= {"caption-question similarity": similarity} if similarity else {}
    scopes = {"all rows": (range(len(rows)), signals)}
    tested = sorted(summaries)
    if len(tested) > 1:
        stability = {i: summaries[i]["stability"] for i in tested}
        scopes["counterfactual cases"] = tested, signals | {"stability under random edits": stability}
    confidence, curves = {}, {}
    for scope, (chosen, named) in scopes.items():
        right, of = [correct[i] for i in chosen], [groups[i] for i in chosen]
        values = {name: [signal[i] for i in chosen] for name, signal in named.items()}
        confidence[scope] = {name: aurc_row(v, right, of) for name, v in values.items()}
        curves[scope] = {name: risk_coverage(v, right)[:2] for name, v in values.items()}
    if similarity:
        confidence["thresholds"] = at_thresholds(similarity, signals["answer log-probability"], correct)
        confidence["rows_with_caption"] = sum(s is not None for s in similarity)
    return confidence, curves


def say(name, rows, records):
    right = sum(bool(r["correct"]) for r in records)
    print(f"{name}: {right} of {len(rows)} right, {sum(not r['parsed'] for r in records)} unparsed", flush=True)


def export_rows(rows, records, predictions, style, folder):
    """
    Rows for train_grpo.py with what was measured. delta_cf_*: mean log-probability drops (nats per token), null where
    not measured.
    """
    exported = []
    for row, record, prediction in zip(rows, records, predictions, strict=True):
        tested = prediction[f"{style} prompt"]["counterfactual"] or {}
        measured = {"valid_json": record["valid"], "answer_correct": bool(record["correct"])}
        measured |= {"caption": record["caption"]} | {k: tested.get(k) for k in ("delta_cf_roi", "delta_cf_rand")}
        exported.append(grpo_row(row, folder) | measured)
    return exported


def load_encoder(args, tiny, device):
    """-> (SentenceEncoder or None, its name or None, why there is none). The default may be out of reach."""
    name = args.sentence_encoder or ("tiny:bert" if tiny else SMALL_ENCODER)
    try:
        return SentenceEncoder(name, device), name, None
    except InputError as error:
        why = re.split("[:;] ", str(error).removeprefix("--sentence-encoder: "))[0]  # what follows advises on --model
        instead = "give --sentence-encoder FOLDER, or tiny:bert to try the rest"
        if args.sentence_encoder:
            raise InputError(f"--sentence-encoder: {why}; {instead}") from error
        why = f"the default encoder cannot be had ({why}); {instead}"
    print(f"caption-question similarity is left out: {why}")
    return None, None, why


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    if args.compare:
        return compare(args, started)
    out = Path(args.export_grpo or "")
    if args.export_grpo and out.exists() and not (args.overwrite and out.is_file()):
        raise InputError(f"{args.export_grpo} is there already: replace a file with --overwrite, or name another one")
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    rows, train_rows, data = load_rows(args)
    images, errors = load_images(rows)
    if all(image is None for image in images):
        raise InputError(f"none of the images can be read; {errors[0]['path']}: {errors[0]['error']}")
    print(
        f"{len(rows)} rows of {data['name']} ({data['version']}), {len({row['group'] for row in rows})} image groups;"
        f" {data['train_rows']} training rows for the baselines"
    )
    vlm = load_model(args, device)
    encode, encoder, why = load_encoder(args, vlm.tiny, device)
    run_dir = open_run_dir(args, TASK, "evaluate")

    answerer = Answerer(vlm, args.batch_size, args.max_new_tokens)
    metrics, predictions, cases, records, curves = evaluate(answerer, rows, images, train_rows, args, encode)

    trained_on = training_of(args.adapter) if args.adapter else None
    metrics = {
        "dataset": data, "split": args.split, "seed": args.seed, "n_errors": sum(image is None for image in images),
        "sentence_encoder": encoder, "no_sentence_encoder": why, "policy": data["policy"], "overlap": data["overlap"],
        "unreadable_controls": unreadable_controls(metrics["rows"]), "trained_on": trained_on,
        "warnings": warnings_of(args, vlm, data, trained_on, encoder), **metrics,
        **vlm.facts(), "settings": {k: v for k, v in vars(args).items() if k != "config"},
        **run_facts(started, device),
    }  # fmt: skip
    write_json(run_dir / "metrics.json", metrics)  # numbers first: a picture that fails costs no answers
    write_jsonl(run_dir / "predictions.jsonl", predictions)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    if args.export_grpo:
        told = rows, records, predictions, args.prompts[0]
        write_jsonl(args.export_grpo, export_rows(*told, Path(args.export_grpo).parent))
        print(f"{len(rows)} rows for train_grpo.py in {args.export_grpo}")
    folder = run_dir / "figures"
    where = f"{'PHANTOM, ' if data['phantom'] else ''}{data['name']} {args.split}, {vlm.name}"
    figures = {"risk_coverage": draw_risk_coverage(folder / "risk_coverage.png", curves, where)}
    if cases:
        note = "number: change of the log-probability per token of the original answer; red: changed"
        strips = telling_cases(cases, rows, records, images, args)
        figures["strip"] = draw_strip(folder / "strip.png", strips, f"{where}; {note}")
    if strips := redrawn_strips(rows, records, predictions):
        figures["redrawn"] = draw_strip(folder / "redrawn.png", strips, where)
    write_report(run_dir, metrics, figures)
    unreadable = unreadable_note(metrics["unreadable_controls"])
    for warning in [*metrics["warnings"], *[unreadable] * bool(unreadable)]:
        print(f"*** {warning} ***")
    print(markdown_table(*glance_table(metrics["glance"])))
    names = "report.html, report.md, metrics.json, predictions.jsonl"
    print(f"results in {run_dir}: {names} ({time.time() - started:.0f} s)")


def unreadable_controls(rows):
    """{control: share of its answers that cannot be read} where that is most of them."""
    found = {name: 1 - (rows[name]["parsed"]["value"] or 0) for name in CONTROLS if name in rows}
    return {name: share for name, share in found.items() if share > 0.5}


def warnings_of(args, vlm, data, trained_on, encoder):
    """What a reader must know before the numbers."""
    found = []
    if data["phantom"]:
        found.append(PHANTOM)
    elif trained_on and trained_on.get("phantom"):
        found.append("This model was trained on PHANTOM films, drawn by this project, and not on real images.")
    if vlm.tiny and not args.adapter:
        found.append("The tiny model is untrained: these numbers show that the code runs.")
    if encoder and encoder.startswith("tiny"):
        found.append(f"The sentence encoder {encoder} has random weights: its similarities mean nothing.")
    if data["overlap"]:
        found.append(
            f"OVERLAP: under the policy {data['policy']} images of the test set are in training, so a model trained on"
            " it has seen them."
        )
    if trained_on and trained_on.get("overlap"):
        found.append(
            f"OVERLAP: this model was trained with the policy {trained_on['policy']}, which has images of the test set"
            " in training."
        )
    if args.adapter and trained_on is None:
        found.append(
            "What this model was trained on is not written beside it: whether it has seen these images is unknown."
        )
    if args.split == "train":
        found.append("These are training rows: the numbers say nothing about new images.")
    return found


if __name__ == "__main__":
    main()
