"""
Does attention mean anything? Questions in several wordings: what models answer, where they look, and what of that
stands against the nulls.

Usage:
    python attention_viz/evaluate.py --csv questions.csv --n_studies 100 --output_dir results    # MedGemma, LLaVA-Med
    python attention_viz/evaluate.py --models tiny --n_studies 20     # offline: the phantom's set, untrained models
    python attention_viz/evaluate.py --models FOLDER OTHER --conditions "Pleural Effusion" Pneumothorax --severe
    python attention_viz/evaluate.py --csv questions.csv --faithfulness 20
    python attention_viz/evaluate.py --resume results
    python attention_viz/evaluate.py --export FOLDER --n_studies 20        # the phantom's set as such a CSV, no model
    python attention_viz/evaluate.py --dry-run

--csv: see attention_viz/cases.py for the columns; without it the phantom's set, and PHANTOM on everything, which
--real-only refuses. Models are loaded one after the other. Heads, sinks, mean maps and the best kind of map come from
--calibration of the patients, and are reported on the others.
Writes to the run folder: report.md and report.html, stats.json, maps.csv (a row per model, wording and kind of map),
answers.csv, records/*.jsonl (a line per study; what --resume goes on from), maps/*.npz, figures/, errors.csv.
For research and teaching only: this is not a medical device, and no output of it is medical advice.
"""

import hashlib
import json
import random
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
from PIL import Image
from tqdm import tqdm

from attention_viz import measures
from attention_viz.cases import export_csv, phantom_cases, phantom_settings, read_cases
from attention_viz.faithful import faithfulness, randomisation
from attention_viz.maps import METHODS, NEUTRAL, OF_ROWS, PAIR, TINY_PAIR, Map, ask_all, attention_map
from attention_viz.maps import SIDE, check_colormap, choose_heads, on_common_grid, shares_in_boxes
from attention_viz.report import read_maps, summarise, write_results
from shared.models.hub import explained, find_model
from shared.models.loading import QUANTS, digest_of, load_vlm
from shared.models.passes import PartSize, in_parts, make_prompts, margin
from shared.report import PHANTOM, short_path
from shared.runtime import InputError, add_resume, atomic_file, bounded, fraction, free_gpu, open_run_dir, pick_device
from shared.runtime import positive_int, read_json, record, run_facts, script, script_parser, seed_everything
from shared.runtime import write_json
from shared.training import StopSignal, refuse_other_settings, settings_of

TASK = "attention_viz"
UNRELATED = "Is this a photograph of a dog?"
DEFAULT_METHODS = [m for m in METHODS if m not in ("max", "own_box")]


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK)
    g = parser.add_argument_group("questions")
    # fmt: off
    g.add_argument("--csv", metavar="FILE", help="questions about your images; default: the phantom's set")
    g.add_argument("--n-studies", type=bounded(int, 1, 100_000), default=100, metavar="N",
        help="studies, not rows (%(default)s)")
    g.add_argument("--real-only", action="store_true", help="refuse the phantom")
    g.add_argument("--conditions", nargs="+", metavar="NAME", help="phantom: draw and ask about these only")
    g.add_argument("--severe", action="store_true", help="phantom: severe findings only, for small models")
    g.add_argument("--guessable", type=fraction, default=0.0,
        help="phantom: share of the questions whose words tell the answer (%(default)s)")
    g.add_argument("--image-size", type=positive_int, default=224, help="phantom: pixels per side (%(default)s)")
    g.add_argument("--variants", type=positive_int, default=6, help="phantom: wordings of each (%(default)s)")
    g.add_argument("--export", metavar="FOLDER", help="phantom: write the set as CSV and images there, and stop")
    g = parser.add_argument_group("models")
    g.add_argument("--models", "--model", nargs="+", default=PAIR, metavar="NAME",
        help="hub names, folders or tiny (the tiny pair) (%(default)s)")
    g.add_argument("--quant", default="none", choices=QUANTS, help="weights in 4 or 8 bit (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=16,
        help="prompts at a time; halved by itself when memory runs out (%(default)s)")
    g = parser.add_argument_group("maps and statistics")
    g.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=list(METHODS),
        help="kinds of map; those of attention rows for all wordings, the others for the original one (%(default)s)")
    g.add_argument("--query", default="last", choices=["last", "finding"],
        help="row of the attention: the token that predicts the answer, or the finding's words (%(default)s)")
    g.add_argument("--calibration", type=fraction, default=0.3,
        help="share of the patients on whom heads, sinks, mean maps and the best map are chosen (%(default)s)")
    g.add_argument("--num-heads", type=positive_int, default=3, help="heads that are chosen (%(default)s)")
    g.add_argument("--faithfulness", type=bounded(int, 0, 10**6), default=0, metavar="N",
        help="test cases for deletion, insertion and parameter randomisation (%(default)s)")
    g.add_argument("--bootstrap", type=bounded(int, 1, 100_000), default=5000, metavar="N",
        help="resamples of patients for each interval (%(default)s)")
    g.add_argument("--colormap", default="hot", help="a colour map of matplotlib, for the panels (%(default)s)")
    # fmt: on
    add_resume(g)
    args = parser.parse_args(argv)
    if args.dry_run and args.csv is not None:
        parser.error("--dry-run asks about films of the phantom: leave it or --csv out")
    if args.dry_run:
        args.device, args.models, args.n_studies, args.bootstrap = "cpu", ["tiny:gemma3"], 6, 200
        args.image_size = 112
    if args.csv is None and args.real_only:
        parser.error("--real-only needs --csv: without it the questions are about the phantom")
    if args.csv is not None and (args.export or args.conditions or args.severe or args.guessable):
        parser.error("--export, --conditions, --severe and --guessable are for the phantom: leave them or --csv out")
    check_colormap(args.colormap)
    if args.export and (Path(args.export) / "questions.csv").exists() and not args.overwrite:
        raise InputError(f"{args.export} holds a questions.csv already: give --overwrite to replace it")
    if not 0 < args.calibration < 1:
        parser.error("--calibration must lie between 0 and 1")
    args.methods = list(dict.fromkeys((["mean"] if "relative" in args.methods else []) + args.methods))
    args.models = TINY_PAIR if args.models == ["tiny"] else args.models
    args.n_studies = min(args.n_studies, args.limit or args.n_studies)
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    if args.csv is None:
        settings = phantom_settings(args.conditions, args.severe, args.guessable)
        cases = phantom_cases(args.n_studies, args.seed, settings, args.image_size, args.variants)
        errors, notes = [], []
    else:
        cases, errors, notes = read_cases(args.csv, args.n_studies)
    phantom = any(case.phantom for case in cases)
    if phantom and args.real_only:
        raise InputError(f"--real-only: {args.csv} has films of the phantom (its column source); leave their rows out")
    if args.export:
        print(f"{len(cases)} questions in {export_csv(cases, args.export)}")
        return
    cases, pixels = read_images(cases, errors, notes)
    calibration = split_patients(cases, args.calibration, args.seed)
    device, _ = pick_device(args.device)
    run_dir = open_run_dir(args, TASK, "evaluate") if args.resume else None
    if run_dir:
        refuse_other_settings(settings_of(args), read_json(run_dir / "settings.json"), run_dir)
    for name in args.models:
        find_model(name)  # is the second one there? Not to be found out when the first is done
    if phantom:
        print(f"*** {PHANTOM} ***")
    for note in notes:
        print(f"note: {note}")
    wordings, others = sum(len(c.wordings) for c in cases), {c.patient_id for c in cases} - calibration
    print(f"{len(cases)} questions in {wordings} wordings; {len(calibration)} patients for calibration, "
          f"{len(others)} for the report; {len(errors)} rows left out")  # fmt: skip
    models = {}
    with StopSignal() as stop:
        for name in args.models:
            vlm = load_vlm(name, quant=args.quant, device=device)
            run_dir = run_dir or open_run_dir(args, TASK, "evaluate")  # --overwrite: not before there is a model
            shown = short_path(name) if Path(name).is_dir() else name
            label = shown if shown not in models else f"{shown} ({len(models) + 1})"
            found = run_model(vlm, len(models), cases, pixels, calibration, args, run_dir, stop)
            models[label] = {"facts": vlm.facts()} | found
            del vlm
            free_gpu()
    stats = summarise(models, cases, pixels, args) | {"phantom": phantom, "notes": notes, "errors": len(errors)}
    stats |= {"settings": settings_of(args), **run_facts(started, device)}
    write_json(run_dir / "stats.json", stats)
    write_results(run_dir, stats, models, cases, pixels, errors, args)
    for name, found in stats["models"].items():
        print(f"{name}{' (untrained)' * found['tiny']}: {found['verdict']['says']} ({found['verdict']['because']})")
    print(f"results in {run_dir}")


def read_images(cases, errors, notes):
    """
    -> (cases whose image can be read, {key: uint8 image}); the others get a row in errors. Boxes of another image, or
    of one in another size, are no boxes of this: the case goes on without, and notes tell how many.
    """
    pixels, beyond = {}, 0
    for case in cases:
        try:
            image = pixels[case.key] = case.pixels()
        except InputError as error:
            errors.append({"line": "", "study_id": case.study_id, "error": f"{case.image}: {error}"})
            continue
        height, width = image.shape[:2]
        if any(min(b) < -1 or b[2] > width + 1 or b[3] > height + 1 for b in case.boxes):  # 1: rounded outwards
            case.boxes, beyond = [], beyond + 1
    if beyond:
        notes.append(f"{beyond} questions have a region that reaches beyond the image: they count as without boxes.")
    cases = [case for case in cases if case.key in pixels]
    patients = len({case.patient_id for case in cases})
    if patients < 2:
        raise InputError(f"there are images of {patients} patients that can be read, and two are needed to compare"
                         + (f"; {errors[-1]['error']}" if errors else ""))  # fmt: skip
    return cases, pixels


def split_patients(cases, share, seed):
    """-> patients for calibration: a random share, at least one, and never all."""
    patients = sorted({case.patient_id for case in cases})
    random.Random(seed).shuffle(patients)
    return set(patients[: min(len(patients) - 1, max(1, round(share * len(patients))))])


# ----------------------------------------------------------------------------------------------------------- one model


def run_model(vlm, number, cases, pixels, calibration, args, run_dir, stop):
    """-> dict(records, maps, heads, sinks, faithfulness); what a resumed run has already is read."""
    path, folder = run_dir / "records" / f"{number}.jsonl", run_dir / "maps" / str(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = PartSize(args.batch_size)
    chosen_path = run_dir / "records" / f"{number}-chosen.json"
    text = repr([(c.key, c.patient_id, c.wordings, c.boxes, zlib.crc32(pixels[c.key].tobytes())) for c in cases])
    of = [hashlib.sha256(text.encode()).hexdigest(), digest_of(vlm.source)]
    if not chosen_path.exists():
        chosen = choose(vlm, [c for c in cases if c.patient_id in calibration], pixels, args, size)
        write_json(chosen_path, chosen | {"of": of})
    with explained(f"{chosen_path.parent} is damaged; start a new run"):
        chosen, done = read_json(chosen_path), read_records(path)
        if not all(isinstance(r["wordings"], list) and isinstance(r["moved"], list) for r in done.values()):
            raise ValueError("a record lacks its wordings")
        sinks = None if chosen["sinks"] is None else np.array(chosen["sinks"], bool)
        if chosen["of"] != of:
            raise InputError(f"{run_dir} was begun on other questions, images or weights of {vlm.name}; start a new"
                             " run")  # fmt: skip
    text_only = {}
    with open(path, "a", encoding="utf-8") as file:
        for i, case in enumerate(tqdm(cases, desc=vlm.name[-30:], unit="study", file=sys.stderr)):
            if case.key in done:
                continue
            other = next((c for c in cases[i + 1 :] + cases[:i] if c.patient_id != case.patient_id), None)
            found, maps = study_record(vlm, case, pixels, other, chosen["heads"], sinks, text_only, args, size)
            found["calibration"] = case.patient_id in calibration
            with atomic_file(folder / f"{i:05d}.npz") as out:
                np.savez_compressed(out, **{k: v.astype(np.float16) for k, v in maps.items()})
            found["maps_file"] = str((folder / f"{i:05d}.npz").relative_to(run_dir))
            file.write(json.dumps(found, default=float) + "\n")
            file.flush()
            record(path)
            done[case.key] = found
            if stop.requested():
                stop.exit(run_dir)
    records = [done[case.key] for case in cases]
    maps = read_maps(run_dir, records)
    faith = None
    if args.faithfulness:
        some = [c for c in cases if c.patient_id not in calibration][: args.faithfulness]
        faith = faithfulness(vlm, some, pixels, chosen["heads"], args)
        faith["randomisation"] = randomisation(vlm, some, pixels, args)
    return {"records": records, "maps": maps, "heads": chosen["heads"], "sinks": sinks, "faithfulness": faith}


def read_records(path):
    """Lines of an interrupted run -> {key: record}; a line that was cut short is taken off the file."""
    if not path.exists():
        return {}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in found)
    return {r["key"]: r for r in found}


def choose(vlm, cases, pixels, args, size):
    """Calibration cases -> {"heads": [[layer, head]], "sinks": cells of the grid or None, "grid"}."""
    asked = ask_in_parts(vlm, [(pixels[c.key], c.wordings[0]["question"], finding_of(c, args)) for c in cases], size)
    rows = [a.rows[args.query] for a in asked if args.query in a.rows]
    grids = {a.grid for a in asked}
    if not rows or len(grids) > 1:  # Qwen: grids follow the images, so no cell is the same one in all of them
        return {"heads": [], "sinks": None, "grid": None}
    sinks = measures.find_sinks([r.mean((0, 1)).reshape(asked[0].grid) for r in rows])
    return {"heads": choose_heads(rows, args.num_heads), "sinks": sinks.tolist(), "grid": asked[0].grid}


# ----------------------------------------------------------------------------------------------------------- one study


def study_record(vlm, case, pixels, other, heads, sinks, text_only, args, size):
    """-> (record: what is told of this question, maps: {name: (16, 16)} of the original wording and its nulls)."""
    image = pixels[case.key]
    words = [w["question"] for w in case.wordings]
    blank = np.full_like(image, round(float(image.mean())))
    extra = [("unrelated", image, UNRELATED), ("neutral", image, NEUTRAL), ("blank", blank, words[0])]
    extra += [("other", pixels[other.key], words[0])] if other is not None else []
    extra += [(k, getattr(case, k), words[0]) for k in ("without", "without_other") if getattr(case, k) is not None]
    finding = finding_of(case, args)
    asked = [(image, w, finding) for w in words] + [(seen, question, finding) for _, seen, question in extra]
    asked = ask_in_parts(vlm, asked, size)
    own, beside = asked[: len(words)], dict(zip([e[0] for e in extra], asked[len(words) :], strict=True))
    for a in asked:
        a.neutral = beside["neutral"]
    without_image(vlm, words, text_only, size)
    found = {
        "key": case.key, "study_id": case.study_id, "patient_id": case.patient_id, "finding": case.finding,
        "status": own[0].status, "has_boxes": bool(case.boxes), "wordings": [], "moved": [], "located": {},
        "text_only": text_only[words[0]],
        **{k: beside[k].margin for k in ("blank", "other", "without", "without_other") if k in beside},
    }  # fmt: skip
    maps, shares = {}, shares_in_boxes(case.boxes, (SIDE, SIDE), (0, 0, *image.shape[1::-1]))
    for w, a in zip(case.wordings, own, strict=True):
        row = dict(w) | {"answer": a.answer, "margin": a.margin, "text_only_margin": text_only[w["question"]]}
        same = w["answer_gt"] == case.wordings[0]["answer_gt"]  # else the other answer is expected
        row |= {"correct": a.answer == w["answer_gt"], "flip": (a.answer == own[0].answer) != same, "maps": {}}
        for method in args.methods:
            if method not in OF_ROWS and (w["variant_id"] or not case.boxes and method != "gradient_weighted"):
                continue
            for name, grid, told in variants_of(attention_map(a, method, args.query, heads), sinks):
                row["maps"][name] = told
                if grid is not None:
                    told |= {k: getattr(measures, k)(grid) for k in ("entropy", "gini", "top_mass")}
                    if w["variant_id"]:
                        shift(found["moved"], told, maps.get(name), grid, f"paraphrase: {w['strategy']}", name)
                    else:
                        maps[name] = grid
                        found["located"][name] = measures.localisation(grid, shares)
        found["wordings"].append(row)
    nearby = {"other": "other patient's image", "blank": "blank image", "unrelated": "unrelated question"}
    for key, kind in nearby.items():
        for method in [m for m in args.methods if m in OF_ROWS] if key in beside else ():
            for name, grid, _ in variants_of(attention_map(beside[key], method, args.query, heads), sinks):
                if grid is not None:
                    shift(found["moved"], {}, maps.get(name), grid, kind, name)
                    if key == "other":
                        maps[f"other: {name}"] = grid
    maps["null: intensity"] = nulls(image, maps, found["moved"], case.key)
    found["located"]["null: intensity"] = measures.localisation(maps["null: intensity"], shares)
    first = found["wordings"][0]
    right = first["correct"] and first["answer_gt"] == "yes" and "without" in found
    found["without_other"] = found.get("without_other")
    found["evidence_using"] = bool(right and found["without"] <= 0 and (found["without_other"] or 1) > 0)
    return found, maps


def finding_of(case, args):
    return case.finding if args.query == "finding" else ""


def ask_in_parts(vlm, asked, size):
    """asked: (image, question, finding) -> Cases."""

    def some(part):
        images, questions, findings = zip(*part, strict=True)
        return ask_all(vlm, images, questions, findings=findings)

    return in_parts(some, asked, size)


def without_image(vlm, questions, known, size):
    """Margins of questions asked without any image; each question once per run."""
    new = [q for q in dict.fromkeys(questions) if q not in known]
    margins = in_parts(lambda some: margin(vlm, make_prompts(vlm, some)).tolist(), new, size)
    known |= dict(zip(new, margins, strict=True))


def variants_of(found, sinks):
    """A Map -> (name, map on the common grid or None, what is told of it), once more without the sinks of `mean`."""
    told = {"status": found.status, "image_mass": found.image_mass}
    if found.values is None:
        return [(found.method, None, told)]
    sink = float(found.values[sinks].sum()) if sinks is not None and sinks.shape == found.values.shape else None
    told |= {"sink_mass": sink, "top_cell": float(found.values.max())}
    out = [(found.method, on_common_grid(found), told)]
    if found.method == "mean" and sinks is not None and sinks.any():
        left = measures.without_sinks(found.values, sinks)
        rest = None if left is None else Map(left.astype(np.float32), "ok", found.view, found.size)
        grid = None if rest is None else on_common_grid(rest)
        out.append(("mean_without_sinks", grid, {"status": "zero" if left is None else "ok", "sink_mass": 0.0}))
    return out


def shift(moved, told, before, after, kind, name):
    """How far a map went from that of the original wording: into `told` and the list `moved`."""
    if before is None:
        return
    told["js"], told["pearson"] = measures.js_divergence(before, after), measures.pearson(before, after)
    told["spearman"] = measures.spearman(before, after)
    moved.append([kind, name, told["js"], told["pearson"]])


def nulls(image, maps, moved, key):
    """-> the film's own brightness as a map; into `moved` how far it, and the shuffled cells, are from each map."""
    grey = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    intensity = np.array(grey, np.float32)
    intensity /= max(intensity.sum(), 1e-9)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    for name in [n for n in maps if not n.startswith("other: ")]:
        mixed = rng.permutation(maps[name].ravel()).reshape(SIDE, SIDE)
        moved.append(["cells shuffled", name, measures.js_divergence(maps[name], mixed), None])
        moved.append(["brightness of the film", name, measures.js_divergence(maps[name], intensity),
                      measures.pearson(maps[name], intensity)])  # fmt: skip
    return intensity


if __name__ == "__main__":
    main()
