"""
What evaluate.py prints at the end: one table, a column for each prompt; and for two runs, side by side.

    glance = {style: at_a_glance(predictions, style, main=style == "json") for style in ("json", "think")}
    compare(args, started)                                  # args.compare: two run folders of evaluate.py
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import json
from pathlib import Path

from shared.metrics.statistics import FEW_CLUSTERS, holm
from shared.report import PHANTOM, Report, markdown_table, number, p_value, percent, with_interval
from shared.runtime import InputError, open_run_dir, pick_device, read_json, run_facts, write_json
from vqa_sft_grpo.measures import THRESHOLDS, is_open, paired_difference, rate

IN_NUMBERS = ("box IoU with the gold region", "caption-question similarity")  # of values_of; all others are shares


def readable(records):
    """Whether at least half of the answers to a control can be read: one that cannot is wrong, which shows nothing."""
    return 2 * sum(bool(r["parsed"]) for r in records) >= len(records)


def unreadable_note(shares):
    """{control: share of its answers that cannot be read} -> one sentence, or ""."""
    told = ", ".join(f"{name} ({percent(share)} % of the answers)" for name, share in shares.items())
    why = "an answer that cannot be read counts as wrong, so the difference to it shows nothing about the image"
    return f"Unreadable controls: {told}; {why}." * bool(shares)


def values_of(predictions, style, main):
    """
    Rows of predictions.jsonl -> {measure: [value of each row; None where it has none]} of one prompt, in the order of
    the report. main: whether the controls were made with this prompt. Every rate, and every difference between two
    runs, is a mean of these.
    """
    told = [p[f"{style} prompt"] for p in predictions]
    tested = [t["counterfactual"] or {} for t in told]

    def of(source, key):
        return [test[key] if test.get("source") == source else None for test in tested]

    def minus(some, others):
        return [None if None in pair else pair[0] - pair[1] for pair in zip(some, others, strict=True)]

    opened, right = [is_open(p) for p in predictions], [float(t["correct"]) for t in told]
    found = {
        "right": right,
        "right, closed": [None if o else r for r, o in zip(right, opened, strict=True)],
        "right, open (exact)": [t["exact"] if o else None for t, o in zip(told, opened, strict=True)],
        "recall, open": [t["recall"] if o else None for t, o in zip(told, opened, strict=True)],
    }
    controls = {"blank image": "a grey picture", "shuffled image": "the image of another group"} if main else {}
    for control, name in controls.items():
        if control in predictions[0] and readable([p[control] for p in predictions]):
            found[f"right, more than with {name}"] = minus(right, [p[control]["correct"] for p in predictions])
    found["valid form (JSON success)"] = [float(t["valid"]) for t in told]
    found["response has a box"] = [float(bool(t["boxes"])) for t in told]
    found["box IoU with the gold region"] = [t["iou"] for t in told]
    if "caption_similarity" in told[0]:
        similar = [t["caption_similarity"] for t in told]
        found["caption-question similarity"] = similar
        for t in THRESHOLDS:
            kept = [s is not None and s >= t for s in similar]
            found[f"coverage at similarity {t}"] = [float(k) for k in kept]
            found[f"right at similarity {t}"] = [r if k else None for r, k in zip(right, kept, strict=True)]
    gold, own = "answer changes without the gold region", "answer changes without its own boxes"
    found |= {gold: of("gold", "flip_roi"), own + ", same rows": of("gold", "flip_own")}
    found["answer changes without random regions as large as gold"] = of("gold", "flip_random")
    found["gold minus random"] = minus(of("gold", "flip_roi"), of("gold", "flip_random"))
    found |= {own + ", no gold known": of("self", "flip_roi")}
    found["answer changes without random regions as large as own"] = of("self", "flip_random")
    found["own minus random"] = minus(of("self", "flip_roi"), of("self", "flip_random"))
    return {name: values for name, values in found.items() if any(v is not None for v in values)}


def defined(values, groups, others=None):
    """-> (the values that are not None, and where others are given, are not None there either; the same of groups)."""
    kept = [i for i, v in enumerate(values) if v is not None and (others is None or others[i] is not None)]
    return [values[i] for i in kept], [groups[i] for i in kept]


def at_a_glance(predictions, style, main):
    """-> {measure: its mean over the rows that have it, with interval and n}, see values_of."""
    groups = [p["group"] for p in predictions]
    return {name: rate(*defined(values, groups)) for name, values in values_of(predictions, style, main).items()}


def compare_runs(a, b, style, main):
    """
    Two lists of predictions about the same rows, in one order -> {measure: {"a", "b": as at_a_glance gives them,
    "difference": b - a on the rows that have it in both, with interval, sign-flip test and Holm's correction}}.
    """
    groups, both = [p["group"] for p in a], [values_of(run, style, main) for run in (a, b)]
    result = {}
    for name in both[0] | both[1]:
        of_a, of_b = (values.get(name, [None] * len(a)) for values in both)
        found = {"a": rate(*defined(of_a, groups)), "b": rate(*defined(of_b, groups))}
        (xs, kept), (ys, _) = defined(of_a, groups, of_b), defined(of_b, groups, of_a)
        result[name] = found | {"difference": paired_difference(ys, xs, kept)}
    tested = [found["difference"] for found in result.values() if found["difference"]["p"] is not None]
    for found, p in zip(tested, holm([f["p"] for f in tested]), strict=True):
        found["p_holm"] = p
    return result


# ---------------------------------------------------------------------------------------------------------- the tables


def shown(name, found, total=None):
    """A mean with its interval; and its n where that is not `total`."""
    cell = with_interval(found, number if name in IN_NUMBERS else percent)
    return cell if not found["n"] or found["n"] == total else f"{cell}, n = {found['n']}"


def glance_table(glance):
    """{prompt: at_a_glance()} -> (header, rows)."""
    names = dict.fromkeys(name for found in glance.values() for name in found)
    total, nothing = next(iter(glance.values()))["right"]["n"], {"value": None, "n": 0}
    rows = [[name, *(shown(name, found.get(name, nothing), total) for found in glance.values())] for name in names]
    return ["", *(f"{style} prompt" for style in glance)], rows


def glance_section(report, glance):
    report.heading("At a glance")
    report.text(
        "Where n is not said, all rows count. Right at similarity t: among the rows whose caption is that similar to"
        " the question. Own boxes are as large as the model likes, and random regions have the size of the gold one:"
        " compare own with gold, not with random. A control that can mostly not be read is left out."
        " Everything is taken apart below, for the first prompt."
    )
    report.table(*glance_table(glance))


def comparison_table(found):
    """{measure: of compare_runs()} -> (header, rows)."""
    rows = []
    for name, both in found.items():
        change, p = both["difference"], both["difference"].get("p_holm")
        rows.append([name, *(shown(name, both[run]) for run in "ab"), shown(name, change), p_value(p)])
    return ["", "A", "B", "B - A, on the rows that both have", "sign flip after Holm"], rows


def write_comparison(run_dir, runs, found, warnings):
    """
    runs: [metrics of A, of B]; found {prompt: of compare_runs()} -> the tables as they are printed; report.md and
    report.html in run_dir have them too.
    """
    data = runs[0]["dataset"]
    report = Report(f"{data['name']} {runs[0]['split']}: two models on {runs[0]['n']} questions", warnings=warnings)
    names = [f"{run} is `{m['adapter'] or m['model']}`" for run, m in zip("AB", runs, strict=True)]
    report.text(
        f"{'; '.join(names)}. Numbers in percent unless said otherwise, with 95 % intervals that draw whole image"
        " groups; differences are paired, row by row, and tested by flipping their signs in whole groups."
    )
    printed, groups = [], runs[0]["clusters"]["num_groups"]
    few = f" There are only {groups} image groups, so few that the intervals are too short: go by the p values."
    few *= groups < FEW_CLUSTERS
    for style, measures in found.items():
        report.heading(f"{style} prompt")
        report.table(*comparison_table(measures))
        better, worse = [], []
        for name, both in measures.items():
            change = both["difference"]
            if change["p"] is not None and change["p_holm"] <= 0.05:
                (better if change["value"] > 0 else worse).append(name)
        told = [f"{what} in B: {'; '.join(some) or 'nothing'}" for what, some in (("More", better), ("Less", worse))]
        report.text(f"{'. '.join(told)}. For the rest no difference is shown: p after Holm is above 0.05.{few}")
        printed.append(f"{style} prompt\n{markdown_table(*comparison_table(measures))}\n{'. '.join(told)}.{few}")
    report.write(run_dir, page=True)
    return "\n\n".join(printed)


# ------------------------------------------------------------------------------------------------------------ two runs


def read_run(folder):
    """A run folder of evaluate.py -> (metrics, predictions). InputError, one sentence, where it is none."""
    paths = [Path(folder) / name for name in ("metrics.json", "predictions.jsonl")]
    if not all(path.is_file() for path in paths):
        raise InputError(f"{folder} is no run folder of evaluate.py: it lacks metrics.json or predictions.jsonl")
    metrics = read_json(paths[0])
    try:  # a line ends at "\n" and nowhere else: responses hold other ends of lines
        predictions = [json.loads(line) for line in paths[1].read_text("utf-8").split("\n") if line]
    except ValueError as error:
        raise InputError(f"{paths[1]} is damaged ({error}): measure it again") from error
    if "glance" not in metrics:
        raise InputError(f"{folder} was written by an older evaluate.py: measure it again")
    return metrics, predictions


def compare(args, started):
    """--compare A B: the measures of two runs side by side, with paired differences."""
    (first, a), (second, b) = map(read_run, args.compare)
    asked = [[(p["id"], p["question"], p["gold"]) for p in run] for run in (a, b)]
    if asked[0] != asked[1]:
        raise InputError(
            f"{' and '.join(args.compare)} are about different rows ({len(a)} and {len(b)}): measure both with the same"
            " --data, --split, --limit and --seed"
        )
    styles = [style for style in first["glance"] if style in second["glance"]]
    if not styles:
        raise InputError(f"{' and '.join(args.compare)} have no prompt in common: measure both with the same --prompts")
    run_dir = open_run_dir(args, "vqa_sft_grpo", "compare")
    mains = {run["main_prompt"] for run in (first, second)}
    found = {style: compare_runs(a, b, style, mains == {style}) for style in styles}
    warnings = [f"{run}: {w}" for run, m in (("A", first), ("B", second)) for w in m["warnings"] if w != PHANTOM]
    warnings = [PHANTOM] * any(m["dataset"]["phantom"] for m in (first, second)) + warnings
    print(write_comparison(run_dir, [first, second], found, warnings))
    of_runs = [{k: m[k] for k in ("model", "adapter", "dataset", "seed", "date")} for m in (first, second)]
    write_json(run_dir / "metrics.json", {
        "a": of_runs[0], "b": of_runs[1], "n": len(a), "split": first["split"], "warnings": warnings, "compared": found,
        "settings": {"compare": args.compare}, **run_facts(started, pick_device("cpu")[0]),
    })  # fmt: skip
    for warning in warnings:
        print(f"*** {warning} ***")
    print(f"results in {run_dir}: report.html, report.md, metrics.json")
