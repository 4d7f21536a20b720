"""
From the records of evaluate.py to stats.json, tables, figures and a report whose sentences follow from the numbers.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np

from attention_viz import measures
from attention_viz.maps import METHODS, OF_ROWS, SIDE, Map, overlay, shares_in_boxes, shortened
from shared.metrics.statistics import effective_clusters
from shared.report import Report, number, p_value, percent, save_figure, with_interval
from shared.runtime import InputError, write_csv

BEHAVIOUR = {
    "accuracy": "accuracy, all wordings",
    "accuracy_original": "accuracy, original wording",
    "accuracy_text_only": "the same without an image",
    "accuracy_blank": "with a blank image",
    "accuracy_other": "with another patient's image",
    "says_yes": "says yes",
    "truth_yes": "truth is yes",
    "changes_text_only": "answer changes without an image",
    "changes_blank": "with a blank image",
    "changes_other": "with another patient's image",
    "flip_rate": "answer flips with the wording",
}
SHAPE = ("entropy", "gini", "top_mass", "image_mass")
FEW = 5  # evidence-using calibration cases below which the best map is chosen on all cases with boxes


# ------------------------------------------------------------------------------------------------------------- numbers


def summarise(models, cases, pixels, args):
    """models: {name: run_model's} -> the contents of stats.json; all numbers are of patients not in calibration."""
    boxes = {c.key: shares_in_boxes(c.boxes, (SIDE, SIDE), (0, 0, *pixels[c.key].shape[1::-1])) for c in cases}
    found = {name: summary_of(model, boxes, args) for name, model in models.items()}
    tests = {name: [r for r in model["records"] if not r["calibration"]] for name, model in models.items()}
    differences, family = measures.compare_models(tests, args.bootstrap), []
    for name, one in found.items():
        group = "evidence-using cases" if "evidence-using cases" in one["localisation"] else "all yes cases"
        located = one["localisation"].get(group, {}).get(one["best_map"])
        family.append((f"{name}: best map above its mean map, {group}", located and located["against_mean_map"]))
        moved = one["attention"]["paraphrase_minus_other_image"]
        family.append((f"{name}: maps move less by wording than by image", moved))
    family += [(f"{d['what']}: {d['models'][0]} minus {d['models'][1]}", d) for d in differences]
    some = next(iter(tests.values()))
    patients = effective_clusters([r["patient_id"] for r in some])
    return {
        "n_cases": len(some),
        "n_wordings": sum(len(r["wordings"]) for r in some),
        "clusters": {"groups": patients["num_groups"], "effective": patients["effective_groups"],
                     "warning": patients["warning"]},
        "models": found,
        "tests": measures.with_holm(family),
        "bootstrap": args.bootstrap,
    }  # fmt: skip


def summary_of(model, boxes, args):
    records, draws = model["records"], args.bootstrap
    locate_mean_maps(records, boxes, model["maps"])
    tested, chosen_on = ([r for r in records if r["calibration"] is part] for part in (False, True))
    methods = list(dict.fromkeys(m for r in records for m in r["located"]))
    behaviour = measures.behaviour(tested, draws)
    says, because = measures.verdict(behaviour)
    rows = [m for m in methods if m in OF_ROWS or m == "mean_without_sinks"]
    evidence = [r for r in chosen_on if r["evidence_using"] and r["has_boxes"]]
    some = evidence if len(evidence) >= FEW else [r for r in chosen_on if r["has_boxes"]]
    best = best_map(some, [m for m in methods if not m.startswith("null")])
    kind = "mean_without_sinks" if "mean_without_sinks" in rows else "mean" if "mean" in rows else None
    sinks = None if model["sinks"] is None else int(model["sinks"].sum())
    return {
        **model["facts"],
        "status": dict(Counter(r["status"] for r in records)),
        "statuses_by_map": statuses(tested),
        "heads": model["heads"],
        "sinks": sinks,
        "sink_mass": measures.mean_of(*column(tested, "mean", "sink_mass"), draws),
        "behaviour": behaviour,
        "verdict": {"says": says, "because": because},
        "best_map": best,
        "best_map_chosen_on": f"{len(some)} calibration cases" if best else "nothing: no boxes are known",
        "localisation": measures.localisation_tables(tested, methods, draws),
        "similarity": measures.similarity_table(tested, rows, draws),
        "attention_of": kind,
        "attention": measures.attention_tests(tested, kind, draws),
        "shape": {m: {k: measures.mean_of(*column(tested, m, k), draws) for k in SHAPE}
                  for m in methods if not m.startswith("null")},
        "faithfulness": model["faithfulness"],
    }  # fmt: skip


def column(records, method, name):
    """Of the original wordings -> (values, patients)."""
    pairs = [(r["wordings"][0]["maps"].get(method, {}).get(name), r["patient_id"]) for r in records]
    return [v for v, _ in pairs], [p for _, p in pairs]


def statuses(records):
    found = {}
    for r in records:
        for method, told in r["wordings"][0]["maps"].items():
            found.setdefault(method, Counter())[told["status"]] += 1
    return {m: dict(c) for m, c in found.items()}


def locate_mean_maps(records, boxes, maps):
    """Into each record: how well the mean map over calibration images (no look at this one) hits, per kind of map."""
    total = {}
    for r in records:
        if r["calibration"]:
            for name, grid in maps[r["key"]].items():
                total.setdefault(name, []).append(grid.astype(np.float32))
    for r in records:
        for name, told in r["located"].items():
            mean = np.mean(total[name], 0) if name in total else None
            told["null_hit"] = None if mean is None else measures.localisation(mean, boxes[r["key"]])["hit"]


def best_map(records, methods):
    """Highest hit rate over chance on calibration cases -> its name, None without any."""
    ratios = {}
    for method in methods:
        rows = [r["located"][method] for r in records if method in r["located"]]
        chance = sum(x["chance"] for x in rows)
        if chance > 0:
            ratios[method] = sum(x["hit"] for x in rows) / chance
    return max(ratios, key=ratios.get, default=None)


# --------------------------------------------------------------------------------------------------------------- files


def write_results(run_dir, stats, models, cases, pixels, errors, args):
    write_tables(run_dir, models, errors)
    figures = {
        "Original wording: the film with its boxes, then its maps.":
            draw_panels(run_dir, stats, models, cases, pixels, args),
        "How far maps move (log axis): by wording, and by what should move them.": draw_moves(run_dir, stats, models),
        "Hit rate over chance on test cases with boxes; 1 is chance.": draw_forest(run_dir, stats),
    }  # fmt: skip
    write_report(stats, figures).write(run_dir, page=True)


def write_tables(run_dir, models, errors):
    fixed = "study_id patient_id finding".split()
    answers, rows = [], []
    for name, model in models.items():
        for r in model["records"]:
            for w in r["wordings"]:
                told = {k: v for k, v in w.items() if k != "maps"}
                head = {"model": name} | {k: r[k] for k in fixed} | {"calibration": r["calibration"]}
                answers.append(head | told | {"evidence_using": r["evidence_using"]})
                for method, m in w["maps"].items():
                    place = r["located"].get(method, {}) if not w["variant_id"] and r["has_boxes"] else {}
                    rows.append(head | {"variant_id": w["variant_id"], "method": method, **m, **place})
    names = dict.fromkeys(k for row in rows for k in row)
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    for name, lines in (("answers", answers), ("maps", rows), ("errors", errors)):
        if lines:
            write_csv(run_dir / f"{name}.csv", lines)


# -------------------------------------------------------------------------------------------------------------- report


def write_report(stats, figures):
    few = stats["clusters"]["warning"]
    warned = [f"{name} is an untrained tiny model: its rows mean nothing." for name, m in stats["models"].items()
              if m["tiny"]]  # fmt: skip
    report = Report("Attention under paraphrase", stats["phantom"], warned)
    lines = [f"{stats['n_cases']} questions in {stats['n_wordings']} wordings, of patients that nothing was chosen on.",
             f"Intervals of 95 % draw patients, {stats['bootstrap']} times.", *stats["notes"]]  # fmt: skip
    lines += [f"{stats['errors']} rows were left out (errors.csv)."] if stats["errors"] else []
    report.text(" ".join([*lines, f"**{few}**" if few else ""]))
    report.heading("Does the answer need the image?")
    for name, m in stats["models"].items():
        report.text(f"**{name}: {m['verdict']['says']}** ({m['verdict']['because']}).")
        yes = m["behaviour"]["says_yes"]
        if yes and not 0.1 <= yes["value"] <= 0.9:
            report.text(f"**{name} says yes to {percent(yes['value'])} % of the questions: consistency means little.**")
    told = [m["behaviour"] for m in stats["models"].values()]
    rows = [[label, *(with_interval(t[key]) for t in told)] for key, label in BEHAVIOUR.items()]
    for kind in dict.fromkeys(k for t in told for k in t["flip_by_kind"]):
        rows.append([f"flips: {kind}", *(with_interval(t["flip_by_kind"].get(kind)) for t in told)])
    rows += [[f"cases: {q}", *(t["quadrants"][q] for t in told)] for q in told[0]["quadrants"]]
    if any(t["without_paraphrase"] for t in told):
        rows.append(["cases: no paraphrase, in none of these", *(t["without_paraphrase"] for t in told)])
    causal = [t["causal"] for t in told]
    rows.append(["right yes: flips when the finding is drawn away",
                 *(with_interval(c["flips_without_finding"]) for c in causal)])  # fmt: skip
    rows.append(["right yes: flips when another is", *(with_interval(c["flips_without_other"]) for c in causal)])
    rows.append(["evidence-using cases", *(f"{c['evidence_using']} of {c['yes_cases']}" for c in causal)])
    report.table(["%", *stats["models"]], rows)
    for name, m in stats["models"].items():
        model_section(report, name, m)
    report.heading("The declared family of tests")
    tested = [[name, *(["–"] * 3 if t is None else [with_interval(t, number), p_value(t["p"]), p_value(t["p_holm"])])]
              for name, t in stats["tests"].items()]  # fmt: skip
    report.table(["", "difference", "sign flips", "Holm"], tested)
    for caption, path in figures.items():
        if path is not None:
            report.figure(path, caption)
    return report


def model_section(report, name, m):
    report.heading(name)
    wrong = {k: v for k, v in m["status"].items() if k != "ok"}
    if wrong:
        told = ", ".join(f"{k}: {v}" for k, v in wrong.items())
        report.text(f"**No attention for {sum(wrong.values())} cases ({told}): they have answers and no maps.**")
    gone = [f"`{method}` {status}: {n}" for method, found in m["statuses_by_map"].items() for status, n in found.items()
            if status not in ("ok", *wrong)]  # fmt: skip
    if gone:
        report.text(f"Maps that could not be made, of test cases: {', '.join(gone)}.")
    if m["sinks"]:
        held = with_interval(m["sink_mass"])
        report.text(f"{m['sinks']} cell(s) of the mean map are sinks, which hold {held} % of it whatever the image."
                    " `mean_without_sinks` leaves them out.")  # fmt: skip
    elif m["sinks"] == 0:
        report.text("No sink: no cell stands out in most calibration images.")
    for group, table in m["localisation"].items():
        if not table:
            continue
        n = max(row["n"] for row in table.values())
        report.text(f"Where the boxes are known, {group} (n = {n}). Best on calibration: `{m['best_map'] or 'none'}`.")
        rows = [[k, with_interval(of["hit"]), percent(of["chance"]), with_interval(of["hit_over_chance"], number),
                 with_interval(of["mass_ratio"], number), with_interval(of["against_mean_map"])]
                for k, of in sorted(table.items(), key=lambda kv: -(kv[1]["hit_over_chance"] or {"value": 0})["value"])
                ]  # fmt: skip
        head = ["map", "hit %", "chance %", "hit / chance", "mass in boxes / chance", "hit above its mean map, %"]
        report.table(head, rows)
    report.text(best_sentence(m))
    if m["similarity"]:
        rows = []
        for kind in dict.fromkeys(k for t in m["similarity"].values() for k in t):
            moved = [t.get(kind, {}).get("js") for t in m["similarity"].values()]
            rows.append([kind, *(with_interval(js, lambda v: number(v, 4)) for js in moved)])
        report.text("How far maps move from the original wording's (Jensen-Shannon, base 2, 0 to 1):")
        report.table(["against", *m["similarity"]], rows)
    report.text(attention_sentence(m))
    rows = [[k, with_interval(v, number)] for k, v in m["attention"]["flip_auroc"].items()]
    report.text("Does it foretell that a paraphrase flips the answer? AUROC, 0.5 is chance:")
    report.table(["", "AUROC"], rows)
    if m["faithfulness"]:
        faithful_tables(report, m["faithfulness"])


def best_sentence(m):
    group = next(iter(m["localisation"]), None)
    row = m["localisation"].get(group, {}).get(m["best_map"])
    if row is None:
        return "No boxes are known, so no map can be called better than another."
    above, ratio = row["against_mean_map"], row["hit_over_chance"]
    if ratio is None or above is None or above["low"] is None:
        return f"`{m['best_map']}`: too few patients for an interval."
    times = f"{number(ratio['value'], 1)} times chance, {group}"
    if above["low"] > 0 and ratio["low"] > 1:
        return f"`{m['best_map']}` finds the place: {times}, and more often than the mean map over other images."
    return f"`{m['best_map']}` is not shown to find the place: {times}, above the mean map by {with_interval(above)} %."


def attention_sentence(m):
    found = m["attention"]
    moved, ratio = found["paraphrase_minus_other_image"], found["paraphrase_over_other_image_90"]
    if moved is None or ratio is None:
        return "How maps move cannot be said: too few of them."
    share = f"{number(ratio['value'])} [{number(ratio['low'])}, {number(ratio['high'])}]"
    start = f"`{m['attention_of']}`: a paraphrase moves the map {share} times as far as another image (90 % interval)"
    if found["equivalent"]:
        return f"{start}: attention does not change by more than {measures.SAME:g} of that, so it counts as unchanged."
    if moved["p"] < 0.05 and moved["value"] < 0:
        return f"{start}: less than an image does, but not shown to be unchanged."
    if found["follows_wording"]:
        return (f"{start}: more than {measures.SAME:g} of that, so the map follows the wording as well as the image,"
                " and says little about the image.")  # fmt: skip
    return (f"{start} in {ratio['n']} cases of {ratio['patients']} patients, {p_value(moved['p'])}: too few to tell"
            " whether the map follows the wording or the image.")  # fmt: skip


def faithful_tables(report, found):
    sides = [(what, side) for what in ("deletion", "insertion") for side in ("right", "wrong")]
    rows = [[k, *(with_interval(t.get(what, {}).get(side), number) for what, side in sides)]
            for k, t in found["methods"].items()]  # fmt: skip
    report.text(f"Faithfulness on {found['n']} cases: gap to random orders in shares of the margin; above 0 is"
                " faithful.")  # fmt: skip
    report.table(["map", *map(", ".join, sides)], rows)
    if found["randomisation"]:
        names = list(dict.fromkeys(k for t in found["randomisation"].values() for k in t))
        rows = [[m, *(number(t.get(k)) for k in names)] for m, t in found["randomisation"].items()]
        report.text("Correlation with the map of the trained weights when the weights of the last layers are shuffled;"
                    " a sane map falls below that of other images:")  # fmt: skip
        report.table(["map", *names], rows)


# ------------------------------------------------------------------------------------------------------------- figures


def draw_panels(run_dir, stats, models, cases, pixels, args, most=3):
    """A line per model and case: up to `most` test cases, those with boxes first."""
    by_key, lines = {c.key: c for c in cases}, []
    for name, model in models.items():
        some = [r for r in model["records"] if not r["calibration"] and model["maps"][r["key"]]]
        some = sorted(some, key=lambda r: (not r["evidence_using"], not r["has_boxes"]))[:most]
        lines += [(name, r, model["maps"][r["key"]]) for r in some]
    if not lines:
        return None
    tried = [[m for m in (*METHODS, "mean_without_sinks") if m in r["wordings"][0]["maps"]] for _, r, _ in lines]
    most = 1 + max(map(len, tried))
    wide = -(-most // -(-most // 7))  # a line of more than seven pictures goes on below
    rows = [-(-(1 + len(methods)) // wide) for methods in tried]
    size = (1.9 * wide, 2.1 * sum(rows) + 0.5)
    figure, axes = plt.subplots(sum(rows), wide, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (name, r, maps) in enumerate(lines):
        image, w = pixels[r["key"]], r["wordings"][0]
        line = axes[sum(rows[:i]) :].flat[: 1 + len(tried[i])]
        line[0].imshow(image, cmap="gray")
        for x0, y0, x1, y1 in by_key[r["key"]].boxes:
            line[0].add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="cyan", linewidth=1))
        boxless = "" if r["has_boxes"] else "\nother maps: only where a box is known"
        told = f"{shortened(name, 30)}\n{r['finding']}: {w['answer']} (truth {w['answer_gt']}){boxless}"
        line[0].set_title(told, fontsize=6)
        for axis, method in zip(line[1:], tried[i], strict=True):
            if method in maps:
                grid = maps[method].astype(np.float32)
                whole = Map(grid, "ok", (0, 0, *image.shape[1::-1]), image.shape[:2])
                axis.imshow(overlay(image, whole, args.colormap))
            else:
                why = f"no map: {w['maps'][method]['status']}"
                axis.text(0.5, 0.5, why, ha="center", va="center", fontsize=6, transform=axis.transAxes)
            axis.set_title(method, fontsize=6)
        for axis in line:
            axis.axis("on")
            axis.set_xticks([])
            axis.set_yticks([])
    return save_figure(figure, run_dir / "figures" / "panels.png", "Where models looked", stats["phantom"])


def draw_moves(run_dir, stats, models):
    """Box plots of the Jensen-Shannon divergence, one panel per model; log axis: what moves them differs by 1,000."""
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 3.6), layout="constrained", squeeze=False)
    for axis, (name, model) in zip(axes[0], models.items(), strict=True):
        method, groups = stats["models"][name]["attention_of"], {}
        for r in model["records"]:
            for kind, m, js, _ in r["moved"] if not r["calibration"] else ():
                if m == method and js is not None:
                    groups.setdefault("paraphrase" if kind.startswith("paraphrase") else kind, []).append(max(js, 1e-6))
        if groups:
            axis.set_xscale("log")
            axis.boxplot(list(groups.values()), orientation="horizontal", showfliers=False)
            axis.set_yticks(range(1, len(groups) + 1), [f"{k} (n = {len(v)})" for k, v in groups.items()], fontsize=7)
        axis.set_title(f"{shortened(name, 40)}: {method}", fontsize=8)
        axis.set_xlabel("Jensen-Shannon divergence to the original's map, at least 0.000001", fontsize=8)
    return save_figure(figure, run_dir / "figures" / "moves.png", "How far maps move", stats["phantom"])


def draw_forest(run_dir, stats):
    """
    Hit rate over chance with intervals, per model and map, on one group for all models: the evidence-using cases where
    each model has some of two patients, else all yes cases.
    """

    def rows_of(m, group):
        return {k: row["hit_over_chance"] for k, row in m["localisation"].get(group, {}).items()
                if row["hit_over_chance"]}  # fmt: skip

    groups = ("evidence-using cases", "all yes cases")
    group = next((g for g in groups if all(rows_of(m, g) for m in stats["models"].values())), groups[1])
    found = {name: rows_of(m, group) for name, m in stats["models"].items()}
    lines = [(f"{shortened(name, 24)}: {method} (n = {row['n']})", row)
             for name, rows in found.items() for method, row in rows.items()]  # fmt: skip
    if not lines:
        return None
    absent = [f"{shortened(name, 40)}: too few for an interval" for name, rows in found.items() if not rows]
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(lines) + 1.2), layout="constrained")
    for place, (_, found) in enumerate(reversed(lines)):
        axis.plot([found["low"], found["high"]], [place, place], color="C0")
        axis.plot(found["value"], place, "o", color="C0", markersize=4)
    axis.set_yticks(range(len(lines)), [label for label, _ in reversed(lines)], fontsize=7)
    axis.axvline(1, color="grey", linestyle=":")
    axis.set_xlabel("\n".join([f"hit rate over chance, {group}", *absent]))
    return save_figure(figure, run_dir / "figures" / "forest.png", "Which maps find the place", stats["phantom"])


def read_maps(run_dir, records):
    """{key: {name: (16, 16)}} of the original wordings; InputError where a file of the run is gone."""
    found = {}
    for r in records:
        try:
            with np.load(run_dir / r["maps_file"]) as data:
                found[r["key"]] = {name: data[name] for name in data.files}
        except (OSError, ValueError) as error:
            raise InputError(f"{run_dir / r['maps_file']} cannot be read; start a new run") from error
    return found
