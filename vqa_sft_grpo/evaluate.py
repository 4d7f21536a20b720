"""
Measure a model on medical questions: is it right, does it need the image, and does it look where it should?

Usage:
    python vqa_sft_grpo/evaluate.py --model tiny --data phantom --limit 40  # offline, a minute; untrained, so it answers nothing
    python vqa_sft_grpo/evaluate.py --dataset slake --sft_ckpt checkpoints/qwen2vl_sft
    python vqa_sft_grpo/evaluate.py --dataset vqa_rad --sft_ckpt checkpoints/qwen2vl_sft --sentence-encoder FOLDER
    python vqa_sft_grpo/evaluate.py --dataset phantom --split train --sft_ckpt ... --export-grpo data/grpo_scored.jsonl

Every row counts: what cannot be read, parsed or loaded is wrong. Intervals draw whole images (95 %). The first prompt
of --prompts is the main one: the controls, the confidence and the counterfactual test are made with it.

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
                reasoning, and only the response's drop can show that the region mattered. The region is the gold one;
                where none is known the model's own, counted apart ("self"): a model can choose it to look good.
Redrawn         phantom only: the same film drawn anew without the finding asked about, and without another one
                (prepare_data.py). No fill can leave a trace there, and the right answer is known, so it needs no random
                regions beside it

Writes to the run folder: metrics.json, predictions.jsonl, report.md, report.html (self-contained), figures/*.png,
errors.csv. For research and teaching only; nothing here is medical advice.
"""

import functools
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np

from shared.data.download import sha256_of
from shared.data.images import read_image
from shared.metrics.statistics import effective_clusters
from shared.models.loading import count_parameters
from shared.runtime import InputError, not_negative, open_run_dir, pick_device, positive_int, read_json, run_facts
from shared.runtime import script, script_parser, seed_everything, write_csv, write_json, write_jsonl
from vqa_sft_grpo.counterfactual import FILLS, blank, fill_region, identity_edits, plan_regions
from vqa_sft_grpo.infer import TASK, Answerer, add_model_options, load_model, pixel_boxes, to_bytes
from vqa_sft_grpo.measures import SentenceEncoder, at_thresholds, aurc_row, caption_similarity, case_summary
from vqa_sft_grpo.measures import json_success, measure_boxes, measure_counterfactual, measure_redrawn
from vqa_sft_grpo.measures import paired_difference, risk_coverage, strata, summarise
from vqa_sft_grpo.rows import NAMES, POLICIES, REDRAWN, grpo_row, make_rows, read_rows
from vqa_sft_grpo.prompting import STYLES, build_prompt, parse_response
from vqa_sft_grpo.report import draw_risk_coverage, draw_strip, write_report
from vqa_sft_grpo.scoring import SYNONYMS_NAME, choice, llava_med_scores, medevalkit_scores, normalise, polarity
from vqa_sft_grpo.scoring import score_answer, score_with_synonyms
from vqa_sft_grpo.sources import load_slake

CONTROLS = ("question only", "blank image", "shuffled image", "majority answer")
CHUNK = 8  # cases whose edited images are in memory together


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
    g.add_argument("--studies", type=positive_int, metavar="N", help="phantom: films to ask about (300 for test, 100 "
        "for val, 1000 for train); for other settings make a file with prepare_data.py and give it as --data")
    add_model_options(parser)
    g = parser.add_argument_group("what to measure")
    g.add_argument("--prompts", nargs="+", default=["json", "think"], choices=STYLES,
        help="prompt styles; controls and tests use the first (json think)")
    g.add_argument("--counterfactual-cases", type=not_negative, default=100, metavar="N",
        help="rows for the counterfactual test, drawn by the seed; each takes (1 + K) x fills + 2 answers; 0: leave "
        "it out (%(default)s)")
    g.add_argument("--random-regions", type=positive_int, default=5, metavar="K",
        help="random regions per case, at least 5 (%(default)s)")
    g.add_argument("--fills", nargs="+", default=list(FILLS), choices=FILLS,
        help="ways to take a region out; at least two (all)")
    g.add_argument("--sentence-encoder", metavar="FOLDER", help="a BERT-like encoder (folder or hub name) for "
        "caption-question similarity, mean pooling; default: tiny:bert for a tiny model, else the similarity is left "
        "out")
    g.add_argument("--export-grpo", metavar="FILE",
        help="write the rows for train_grpo.py with what was measured; not for test rows")
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
        parser.error(
            "--policy official has images and reworded questions of the test set in training: add --allow-overlap if"
            " that is meant, or take clean-train"
        )
    args.data = args.data if Path(args.data).is_file() else args.data.lower().replace("-", "_")
    if args.data not in NAMES and not Path(args.data).is_file():
        parser.error(f"--data {args.data}: there is no such file or data set; there are {', '.join(NAMES)}")
    if args.dry_run:
        args.device, args.model, args.adapter, args.data = "cpu", "tiny", None, "phantom"
        args.limit, args.counterfactual_cases, args.max_new_tokens = (
            args.limit or 12,
            min(args.counterfactual_cases, 3),
            24,
        )
    return args


# ----------------------------------------------------------------------------------------------------------------- rows


def load_rows(args):
    """-> (rows to measure, training rows for the majority answer and the constant box, facts for metrics.json)."""
    if Path(args.data).is_file():
        every = read_rows(args.data)
        rows, train_rows = ([row for row in every if row["split"] == split] for split in (args.split, "train"))
        facts = {
            "name": "+".join(sorted({row["dataset"] for row in every})),
            "policy": ", ".join(sorted({row["policy"] for row in every})),
            "overlap": any(row["overlap"] for row in every),
            "source": args.data,
            "sha256": sha256_of(Path(args.data)),
        }
    else:
        pictures = Path("outputs") / TASK / "phantom_images"
        options = dict(
            data_dir=args.data_dir, policy=args.policy, seed=args.seed, image_dir=pictures, studies=args.studies
        )
        rows, audit = make_rows(
            args.data,
            "all" if args.data != "phantom" else args.split,
            **options,
            limit=args.limit if args.data == "phantom" else None,
        )
        train_rows = [row for row in rows if row["split"] == "train"]
        rows = [row for row in rows if row["split"] == args.split]
        if audit["phantom"] and args.split != "train":
            train_rows = [
                row for row in make_rows("phantom", "train", **options | {"studies": 200})[0] if row["split"] == "train"
            ]
        facts = {
            "name": "+".join(sorted({row["dataset"] for row in rows})) or args.data,
            "policy": audit["policy"],
            "overlap": audit["overlap"],
            "source": args.data_dir if not audit["phantom"] else "drawn by this project",
        }
        if "slake" in facts["name"] and not any(
            row["dataset"] == "slake" for row in train_rows
        ):  # its images are not there, and questions need none
            train_rows += load_slake(args.data_dir, allow_missing_images=True).split("train")
    if not rows:
        raise InputError(
            f"{args.data} has no {args.split} rows with their images; make them with prepare_data.py, or take another"
            " --split"
        )
    rows = rows[: args.limit]
    facts |= {
        "phantom": any(row["dataset"] == "phantom" for row in rows),
        "train_rows": len(train_rows),
        "version": (
            f"split {args.split}, policy {facts['policy']}" + (f", first {args.limit} rows" if args.limit else "")
        ),
    }
    return rows, train_rows, facts


def training_of(adapter):
    """
    What the training run that wrote this folder says of its data -> dict, or None where nothing is written beside it.
    """
    for path in (Path(adapter) / "training.json", Path(adapter).parent / "metrics.json"):
        if path.is_file():
            return read_json(path).get("dataset")
    return None


# --------------------------------------------------------------------------------------------------- asking and scoring


@functools.lru_cache(maxsize=1024)
def load_image(path):
    return to_bytes(read_image(path))


def load_images(rows):
    """-> (uint8 images, None where one cannot be read; errors for errors.csv)."""
    images, errors = [], {}
    for row in rows:
        try:
            images.append(load_image(str(row["image"])))
        except InputError as error:
            images.append(None)
            errors[str(row["image"])] = str(error)
    return images, [{"path": path, "error": error} for path, error in errors.items()]


def ask(answerer, rows, images, style, with_image=True):
    """One record per row, in order; a row without image gets an empty response."""
    good = [i for i, image in enumerate(images) if image is not None]
    prompts = [build_prompt(rows[i]["question"], style) for i in good]
    texts = dict(zip(good, answerer.generate(prompts, [images[i] if with_image else None for i in good]), strict=True))
    return [record_of(row, texts.get(i, ""), style, images[i]) for i, row in enumerate(rows)]


def record_of(row, text, style, image):
    """A response -> what was read from it and how it scores."""
    found = parse_response(text, style)
    caption = found.data.get("caption") if found.data else None
    read = {
        "response": text,
        "answer": found.answer,
        "level": found.level,
        "valid": found.valid,
        "boxes": [] if image is None else pixel_boxes(found, image.shape[:2]),
        "caption": caption.strip() if isinstance(caption, str) and caption.strip() else None,
    }
    return read | scores_of(row, found.answer)


def scores_of(row, answer):
    asked = (row["answer"], row["answer_type"], row["question"])
    score = score_answer(answer, *asked)
    return score | {
        "key": answer_key(answer, row["question"], score["kind"]),
        "synonyms": score_with_synonyms(answer, *asked)["correct"],
        "llava_med": llava_med_scores(answer, *asked[:2]),
        "medevalkit": medevalkit_scores(answer, *asked[:2], row["dataset"]),
    }


def answer_key(answer, question, kind):
    """
    What must stay equal for an answer to be the same one: yes or no, the option, or the normalised words. None:
    unparsed.
    """
    if kind == "yes/no":
        return polarity(answer or "", question)
    words = " ".join(normalise(answer)) or None
    if kind == "choice":
        option = choice(answer or "", question)
        return None if option is None else f"option {option}"
    return words


def shuffled_images(rows, images, seed):
    """Each row gets an image of another group, the same for all rows of a group; None when there is one group only."""
    by_group = {}
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            by_group.setdefault(row["group"], image)
    names = sorted(by_group, key=lambda name: zlib.crc32(f"{seed} {name}".encode()))
    if len(names) < 2:
        return None
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    return [
        None if image is None else by_group[following[row["group"]]] for row, image in zip(rows, images, strict=True)
    ]


def majority_answers(rows, train_rows):
    """
    The most frequent answer that training rows give to the same question, else to questions of the same kind; None
    without training rows.
    """
    if not train_rows:
        return None

    def kind(row):
        return score_answer(None, row["answer"], row["answer_type"], row["question"])["kind"]

    counts = defaultdict(Counter)
    for row in train_rows:
        for key in (" ".join(normalise(row["question"])), ("kind", kind(row)), None):
            counts[key][row["answer"].lower()] += 1
    frequent = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return [
        next(
            frequent[key]
            for key in (" ".join(normalise(row["question"])), ("kind", kind(row)), None)
            if key in frequent
        )
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------- counterfactual


def edit_seed(row, seed):
    """Random regions and noise of a row are the same in every run with this seed, whatever other rows there are."""
    return [seed, zlib.crc32(str(row["id"]).encode())]


def pick_cases(rows, records, images, limit, k, seed):
    """
    Rows for the counterfactual test, drawn by the seed among those with a parsed answer and a region: gold ones first,
    then the model's own boxes. -> (cases, {source: {reason: how many were looked at and not taken}}).
    """
    cases, refused = [], {"gold": Counter(), "self": Counter()}
    usable = [i for i, r in enumerate(records) if r["key"] is not None and images[i] is not None]
    draw = np.random.default_rng(seed)
    for source in ("gold", "self"):
        candidates = [i for i in usable if bool(rows[i].get("region")) == (source == "gold")]
        draw.shuffle(candidates)
        for i in candidates:
            if len(cases) >= limit:
                refused[source]["not looked at"] += 1
                continue
            boxes = rows[i]["region"] if source == "gold" else records[i]["boxes"]
            plan = plan_regions(images[i], boxes, k, edit_seed(rows[i], seed))
            if plan.why:
                refused[source][plan.why if source == "gold" or boxes else "no box of its own"] += 1
            else:
                cases.append({"row": i, "source": source, "plan": plan})
    return cases, {source: dict(counts) for source, counts in refused.items()}


def edits_of(image, plan, fills, seed):
    """
    All edited images of a case -> [((what, fill, number), image)]: identity edits, the region, the random regions.
    """
    edits = [(("identity", name, 0), edited) for name, edited in identity_edits(image).items()]
    for fill in fills:
        for number, boxes in enumerate([plan.roi, *plan.random]):
            edits.append(
                (
                    ("roi" if number == 0 else "random", fill, max(0, number - 1)),
                    fill_region(image, boxes, fill, seed=[*seed, number]),
                )
            )
    return edits


def run_counterfactual(answerer, rows, records, images, cases, style, fills, seed, scores):
    """
    Answer every edited image anew, and score the original response on it. Adds to each case "edits": {(what, fill,
    number): {"answer", "flipped", "unparsed", "wrong_now", "drop", "drop_response"}}. drop: mean log-probability per
    token of the original answer (of the whole original response), original minus edited image.
    """
    for start in range(0, len(cases), CHUNK):
        some = cases[start : start + CHUNK]
        jobs = []
        for case in some:
            i = case["row"]
            jobs += [
                (case, name, image)
                for name, image in edits_of(images[i], case["plan"], fills, edit_seed(rows[i], seed))
            ]
        prompts = [build_prompt(rows[case["row"]]["question"], style) for case, _, _ in jobs]
        pictures = [image for _, _, image in jobs]
        texts = answerer.generate(prompts, pictures)
        rescored = answerer.score(prompts, pictures, [records[case["row"]]["response"] for case, _, _ in jobs])
        for (case, name, image), text, score in zip(jobs, texts, rescored, strict=True):
            i = case["row"]
            now, before = record_of(rows[i], text, style, image), scores[i]
            unparsed = now["key"] is None
            case.setdefault("edits", {})[name] = {
                "answer": now["answer"],
                "unparsed": unparsed,
                "flipped": not unparsed and now["key"] != records[i]["key"],
                "wrong_now": bool(records[i]["correct"]) and not now["correct"],
                **{
                    key: None if None in (before[part], score[part]) else before[part] - score[part]
                    for key, part in (("drop", "answer"), ("drop_response", "response"))
                },
            }
        if len(cases) > CHUNK:
            print(f"  counterfactual cases: {start + len(some)} of {len(cases)}", flush=True)
    return cases


# --------------------------------------------------------------------------------------------------------------- script


def evaluate(answerer, rows, images, train_rows, args, encoder=None):
    """
    Everything that is measured, for an Answerer or anything with its generate() and score().
    -> (metrics, one prediction per row, counterfactual cases, records of the main prompt, risk-coverage curves).
    """
    main_style = args.prompts[0]
    groups = [row["group"] for row in rows]
    answers = {}
    for style in args.prompts:
        answers[f"{style} prompt"] = ask(answerer, rows, images, style)
        say(f"{style} prompt", rows, answers[f"{style} prompt"])
    main_name = f"{main_style} prompt"
    records = answers[main_name]
    shuffled = shuffled_images(rows, images, args.seed)
    answers["question only"] = ask(answerer, rows, images, main_style, with_image=False)
    blanks = {image.shape: blank(image) for image in images if image is not None}
    answers["blank image"] = ask(
        answerer, rows, [None if image is None else blanks[image.shape] for image in images], main_style
    )
    if shuffled is not None:
        answers["shuffled image"] = ask(answerer, rows, shuffled, main_style)
    majority = majority_answers(rows, train_rows)
    if majority is not None:
        answers["majority answer"] = [scores_of(row, answer) for row, answer in zip(rows, majority, strict=True)]
    for name in CONTROLS:
        if name in answers:
            say(name, rows, answers[name])

    # how likely the model finds what it wrote
    good = [i for i, image in enumerate(images) if image is not None]
    scores = [{"answer": None, "response": None} for _ in rows]
    found = answerer.score(
        [build_prompt(rows[i]["question"], main_style) for i in good],
        [images[i] for i in good],
        [records[i]["response"] for i in good],
    )
    for i, score in zip(good, found, strict=True):
        scores[i] = score
    logprob = [score["answer"] for score in scores]

    cases, refused = [], {}
    if args.counterfactual_cases:
        cases, refused = pick_cases(rows, records, images, args.counterfactual_cases, args.random_regions, args.seed)
        for case in cases:
            case["was_correct"] = bool(records[case["row"]]["correct"])
        run_counterfactual(answerer, rows, records, images, cases, main_style, args.fills, args.seed, scores)
        print(f"counterfactual test: {len(cases)} cases; not taken: {refused}", flush=True)
    summaries = {case["row"]: case_summary(case, args.fills, args.random_regions) for case in cases}

    correct = [bool(r["correct"]) for r in records]
    similarity = caption_similarity(rows, records, encoder) if encoder else None
    signals = {
        "answer log-probability": logprob,
        "response log-probability": [score["response"] for score in scores],
    } | ({"caption-question similarity": similarity} if similarity else {})
    tested = sorted(summaries)
    on_cases = {name: [values[i] for i in tested] for name, values in signals.items()} | {
        "stability under random edits": [summaries[i]["stability"] for i in tested]
    }
    redrawn = ask_redrawn(answerer, rows, main_style)
    confidence = {"all rows": {name: aurc_row(values, correct, groups) for name, values in signals.items()}}
    if len(tested) > 1:
        confidence["counterfactual cases"] = {
            name: aurc_row(values, [correct[i] for i in tested], [groups[i] for i in tested])
            for name, values in on_cases.items()
        }
    if similarity:
        confidence["thresholds"] = at_thresholds(similarity, logprob, correct)
        confidence["rows_with_caption"] = sum(s is not None for s in similarity)

    metrics = {
        "n": len(rows),
        "clusters": effective_clusters(groups),
        "main_prompt": main_style,
        "synonyms": SYNONYMS_NAME,
        "rows": {name: summarise(rows, some) for name, some in answers.items()},
        "strata": strata(rows, records),
        "json": {style: json_success(answers[f"{style} prompt"]) for style in args.prompts},
        "boxes": measure_boxes(rows, records, images, train_rows) if main_style == "json" else None,
        "needs_image": {
            name: paired_difference(correct, [r["correct"] for r in answers[name]], groups)
            for name in CONTROLS
            if name in answers
        },
        "confidence": confidence,
        "redrawn": measure_redrawn(rows, records, redrawn),
        "counterfactual": {
            "cases": len(cases),
            "asked_for": args.counterfactual_cases,
            "random_regions": args.random_regions,
            "fills": args.fills,
            "not_taken": refused,
            **measure_counterfactual(cases, rows, args.fills, args.random_regions),
        },
    }
    predictions = []
    for i, row in enumerate(rows):
        kept = (
            "response",
            "answer",
            "level",
            "boxes",
            "caption",
            "parsed",
            "correct",
            "exact",
            "recall",
            "precision",
            "f1",
        )
        predictions.append(
            {
                **{
                    k: row.get(k)
                    for k in (
                        "id",
                        "image",
                        "question",
                        "answer_type",
                        "question_type",
                        "content_type",
                        "group",
                        "region",
                    )
                },
                "gold": row["answer"],
                **{
                    name: {k: r[k] for k in kept if k in r}
                    for name, r in ((name, some[i]) for name, some in answers.items())
                },
                **(
                    {"majority answer": {"answer": majority[i], "correct": answers["majority answer"][i]["correct"]}}
                    if majority
                    else {}
                ),
                **{
                    field: {k: answered[i][k] for k in ("response", "answer")}
                    for field, answered in redrawn.items()
                    if i in answered
                },
                "answer_logprob": logprob[i],
                "response_logprob": scores[i]["response"],
                "caption_similarity": similarity[i] if similarity else None,
                "counterfactual": summaries.get(i),
            }
        )
    curves = {"all rows": {name: risk_coverage(values, correct)[:2] for name, values in signals.items()}}
    if len(tested) > 1:
        curves["counterfactual cases"] = {
            name: risk_coverage(values, [correct[i] for i in tested])[:2] for name, values in on_cases.items()
        }
    return metrics, predictions, cases, records, curves


def ask_redrawn(answerer, rows, style):
    """
    The questions whose film was drawn anew without a finding -> {"redrawn", "redrawn_other": {row number: record}}; a
    film that cannot be read gives no answer.
    """
    asked = {}
    for field in REDRAWN:
        chosen = [i for i, row in enumerate(rows) if row.get(field)]
        some = [rows[i] | {"image": rows[i][field]} for i in chosen]
        asked[field] = (
            dict(zip(chosen, ask(answerer, some, load_images(some)[0], style), strict=True)) if chosen else {}
        )
    return asked


def say(name, rows, records):
    right = sum(bool(r["correct"]) for r in records)
    print(f"{name}: {right} of {len(rows)} right, {sum(not r['parsed'] for r in records)} unparsed", flush=True)


def telling_cases(cases, rows, records, images, args, most=4, least=2):
    """
    Cases for the picture, by rule: the largest and the smallest difference of flip rates, ties by the log-probability
    drops. Each shows the image with its regions, the region taken out by each fill, and the first random region taken
    out.
    """

    def order(case):
        told = case_summary(case, args.fills, args.random_regions)
        drops = [told["delta_cf_roi"], told["delta_cf_rand"]]
        return told["flip_roi"] - told["flip_random"], 0.0 if None in drops else drops[0] - drops[1]

    ranked = sorted(cases, key=order, reverse=True)
    chosen = [("largest difference", c) for c in ranked[:most]] + [
        ("smallest difference", c) for c in ranked[max(most, len(ranked) - least) :]
    ]
    strips = []
    for what, case in chosen:
        i, plan = case["row"], case["plan"]
        row, image = rows[i], images[i]
        outlines = [(box, "tab:blue") for boxes in plan.random for box in boxes] + [(box, "red") for box in plan.roi]
        panels = [
            {
                "image": image,
                "name": f"original ({case['source']} region)",
                "below": f"{records[i]['answer']}",
                "changed": False,
                "boxes": outlines,
            }
        ]
        pictures = dict(edits_of(image, plan, args.fills, edit_seed(row, args.seed)))
        for name in [("roi", fill, 0) for fill in args.fills] + [("random", args.fills[0], 0)]:
            edit = case["edits"][name]
            drop = "" if edit["drop"] is None else f" ({-edit['drop']:+.2f})"
            panels.append(
                {
                    "image": pictures[name],
                    "name": f"without it: {name[1]}" if name[0] == "roi" else f"random: {name[1]}",
                    "below": f"{edit['answer']}{drop}",
                    "changed": edit["flipped"] or edit["unparsed"],
                    "boxes": (
                        [(box, "red") for box in plan.roi]
                        if name[0] == "roi"
                        else [(box, "tab:blue") for box in plan.random[0]]
                    ),
                }
            )
        strips.append({"text": f"{what}: {row['question']} gold: {row['answer']}", "panels": panels})
    return strips


def redrawn_strips(rows, records, predictions, most=2):
    """
    Pictures of films drawn anew: the first two on which the answer follows the finding and nothing else, and the first
    two on which it does not.
    """
    chosen, seen = {True: [], False: []}, set()
    for i, row in enumerate(rows):
        if row["image"] not in seen and all(field in predictions[i] for field in REDRAWN):
            seen.add(row["image"])
            keys = [answer_key(predictions[i][field]["answer"], row["question"], "yes/no") for field in REDRAWN]
            chosen[records[i]["key"] == keys[1] == "yes" and keys[0] == "no"].append((i, keys))
    strips = []
    for i, keys in chosen[True][:most] + chosen[False][:most]:
        row, region = rows[i], [(box, "red") for box in rows[i]["region"]]
        panels = [
            {
                "image": load_image(str(row["image"])),
                "name": "as it is",
                "below": f"{records[i]['answer']}",
                "changed": False,
                "boxes": region,
            }
        ]
        for field, key, name in zip(REDRAWN, keys, ("without it", "without another finding"), strict=True):
            panels.append(
                {
                    "image": load_image(str(row[field])),
                    "name": name,
                    "below": f"{predictions[i][field]['answer']}",
                    "changed": key != records[i]["key"],
                    "boxes": region,
                }
            )
        strips.append({"text": f"{row['question']} gold: {row['answer']}", "panels": panels})
    return strips


def export_rows(rows, records, predictions, folder):
    """
    Rows for train_grpo.py with what was measured. delta_cf_*: mean log-probability drops (nats per token), null where
    not measured.
    """
    exported = []
    for row, record, prediction in zip(rows, records, predictions, strict=True):
        tested = prediction["counterfactual"] or {}
        exported.append(
            grpo_row(row, folder)
            | {
                "valid_json": record["valid"],
                "answer_correct": bool(record["correct"]),
                "caption": record["caption"],
                "delta_cf_roi": tested.get("delta_cf_roi"),
                "delta_cf_rand": tested.get("delta_cf_rand"),
            }
        )
    return exported


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
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
    encoder = args.sentence_encoder or ("tiny:bert" if vlm.tiny else None)
    encode = SentenceEncoder(encoder, device) if encoder else None
    if encoder is None:
        print("caption-question similarity is left out: give --sentence-encoder FOLDER to have it")
    run_dir = open_run_dir(args, TASK, "evaluate")

    answerer = Answerer(vlm, args.batch_size or (64 if count_parameters(vlm.base) < 100e6 else 16), args.max_new_tokens)
    metrics, predictions, cases, records, curves = evaluate(answerer, rows, images, train_rows, args, encode)

    trained_on = training_of(args.adapter) if args.adapter else None
    metrics = {
        "dataset": data,
        "split": args.split,
        "seed": args.seed,
        "n_errors": sum(image is None for image in images),
        "sentence_encoder": encoder,
        "policy": data["policy"],
        "overlap": data["overlap"],
        "trained_on": trained_on,
        "warnings": warnings_of(args, vlm, data, trained_on, encoder),
        **metrics,
        **vlm.facts(),
        "settings": {k: v for k, v in vars(args).items() if k != "config"},
        **run_facts(started, device),
    }
    where = f"{'PHANTOM, ' if data['phantom'] else ''}{data['name']} {args.split}, {vlm.name}"
    figures = {"risk_coverage": draw_risk_coverage(run_dir / "figures" / "risk_coverage.png", curves, where)}
    if cases:
        figures["strip"] = draw_strip(
            run_dir / "figures" / "strip.png",
            telling_cases(cases, rows, records, images, args),
            f"{where}; number: change of the log-probability per token of the original answer; red: changed",
        )
    if strips := redrawn_strips(rows, records, predictions):
        figures["redrawn"] = draw_strip(run_dir / "figures" / "redrawn.png", strips, where)
    write_json(run_dir / "metrics.json", metrics)
    write_jsonl(run_dir / "predictions.jsonl", predictions)
    if errors:
        write_csv(run_dir / "errors.csv", errors)
    write_report(run_dir, metrics, figures)
    if args.export_grpo:
        write_jsonl(args.export_grpo, export_rows(rows, records, predictions, Path(args.export_grpo).parent))
        print(f"{len(rows)} rows for train_grpo.py in {args.export_grpo}")
    for warning in metrics["warnings"]:
        print(f"*** {warning} ***")
    print(
        f"results in {run_dir}: report.html, report.md, metrics.json, predictions.jsonl ({time.time() - started:.0f} s)"
    )


def warnings_of(args, vlm, data, trained_on, encoder):
    """What a reader must know before the numbers."""
    found = []
    if data["phantom"]:
        found.append("PHANTOM: films drawn by this project; nothing here says anything about real images.")
    if vlm.tiny and not args.adapter:
        found.append("The tiny model is untrained: these numbers show that the code runs.")
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
