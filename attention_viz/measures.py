"""
Numbers of maps, and what a set of answers and maps shows: tables with intervals that draw patients.

Maps are compared on one grid (maps.on_common_grid); p, q: arrays of one shape, not below 0, sum 1. Undefined is None.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import warnings

import numpy as np
from scipy.stats import rankdata

from shared.metrics.statistics import auroc, bootstrap_interval, holm, sign_flip_test

TOP = 0.1  # share of the cells whose mass is top_mass
SINK = 0.1  # a cell with more than this share of the mass, in most images, is a sink
RELIES = 0.1  # below this share of answers that change without the image, a model is called blind to it
SAME = 0.5  # attention "does not change" when the shift is below this share of that between images
DRAWS = 5000


# ------------------------------------------------------------------------------------------------------------ one map


def entropy(p):
    """0: all in one cell, 1: uniform."""
    p = np.ravel(p)
    return float(-(p * np.log(np.maximum(p, 1e-12))).sum() / np.log(len(p)))


def gini(p):
    """0: uniform, towards 1: all in one cell."""
    p, n = np.sort(np.ravel(p)), np.size(p)
    return float((2 * np.arange(1, n + 1) - n - 1) @ p / (n * max(p.sum(), 1e-12)))


def top_mass(p, share=TOP):
    p = np.sort(np.ravel(p))[::-1]
    return float(p[: max(1, round(share * len(p)))].sum())


def js_divergence(p, q):
    """Base 2, without the square root: 0 the same, 1 nowhere together."""
    p, q = np.ravel(p).astype(np.float64), np.ravel(q).astype(np.float64)
    m = (p + q) / 2

    def to_middle(x):
        return np.where(x > 0, x * np.log2(np.maximum(x, 1e-300) / np.maximum(m, 1e-300)), 0).sum()

    return float(max(0.0, (to_middle(p) + to_middle(q)) / 2))


def pearson(p, q):
    """None where one of them is uniform."""
    p, q = np.ravel(p) - np.mean(p), np.ravel(q) - np.mean(q)
    scale = float(np.sqrt((p**2).sum() * (q**2).sum()))
    return float((p * q).sum() / scale) if scale > 1e-12 else None


def spearman(p, q):
    return pearson(rankdata(p), rankdata(q))


def localisation(values, shares):
    """
    Map and share of each cell in the boxes, both (rows, columns) -> hit: share of the peak cell that lies in a box (a
    random point of it), chance: that of a random cell, mass_ratio: mass in the boxes over chance.
    """
    chance = float(shares.mean())
    peaks = values >= values.max() - 1e-12  # of a flat map every cell
    ratio = float((values * shares).sum() / max(values.sum(), 1e-12) / chance) if chance > 0 else None
    return {"hit": float(shares[peaks].mean()), "chance": chance, "mass_ratio": ratio}


def find_sinks(maps):
    """maps (N, rows, columns) of different images -> bool (rows, columns): above SINK of the mass in most of them."""
    maps = np.asarray(maps)
    return ((maps / maps.sum((1, 2), keepdims=True)) > max(SINK, 3 / maps[0].size)).mean(0) > 0.5


def without_sinks(values, sinks):
    """
    The map with these cells as high as the mean of the others, sum 1 again: zeros in the same place of all maps would
    make them alike. None where nothing is left.
    """
    rest = values[~sinks]
    if not len(rest) or rest.sum() <= 1e-9:
        return None
    left = np.where(sinks, rest.mean(), values)
    return left / left.sum()


# ---------------------------------------------------------------------------------------------------- many of them


def known(*columns):
    """Columns of one length -> arrays of the rows in which nothing is None; None where there is no such row."""
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    return [np.array(column) for column in zip(*rows, strict=True)] if rows else None


def interval(metric, *arrays, patients, draws, confidence=0.95, of_sums=True):
    """-> dict(value, low, high, n, patients); no interval where there is one patient."""
    few = len(set(patients)) < 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few patients: the report says it once
        found = bootstrap_interval(metric, *arrays, groups=patients, num_samples=1 if few else draws,
                                   confidence=confidence, of_sums=of_sums)  # fmt: skip
    ends = {k: None if few else found[k] for k in ("low", "high")}
    return {"value": found["value"], **ends, "n": len(patients), "patients": len(set(patients))}


def _ratio(a, b):
    return a / b


def mean_of(values, patients, draws=DRAWS):
    """Mean with its interval, None where nothing is known."""
    rows = known(values, patients)
    if rows is None:
        return None
    return interval(_ratio, rows[0].astype(float), np.ones(len(rows[0])), patients=rows[1], draws=draws)


def ratio_of(a, b, patients, draws=DRAWS, confidence=0.95):
    """sum(a) / sum(b) over rows where both are known, with its interval; None for one patient."""
    rows = known(a, b, patients)
    if rows is None or len(set(rows[2])) < 2:
        return None
    return interval(_ratio, *rows[:2], patients=rows[2], draws=draws, confidence=confidence)


def paired(a, b, patients, draws=DRAWS):
    """Mean of a - b with interval, and p of the sign-flip test over patients; None where nothing is paired."""
    rows = known(a, b, patients)
    if rows is None:
        return None
    differences = rows[0].astype(float) - rows[1]
    test = sign_flip_test(differences, rows[2], seed=0)
    return mean_of(differences, rows[2], draws) | {"p": test["p"], "groups_that_differ": test["num_groups"]}


def auroc_of(labels, scores, patients, draws=DRAWS):
    rows = known(labels, scores, patients)
    if rows is None:
        return None
    draws = draws if auroc(*rows[:2]) is not None else 1
    found = interval(auroc, *rows[:2], patients=rows[2], draws=draws, of_sums=False)
    return found | {"positives": int(rows[0].sum())}


# --------------------------------------------------------------------------------------------------------- the summary


def behaviour(records, draws=DRAWS):
    """
    records: of test cases (evaluate.py, study_record) -> what the answers show: accuracy, flips by kind of wording,
    what changes without the image, the four quadrants.
    """
    rows = [(r, w) for r in records for w in r["wordings"]]
    who = [r["patient_id"] for r, _ in rows]
    cases = [r["patient_id"] for r in records]
    flips = [(r, w) for r, w in rows if w["variant_id"]]
    kinds, of_flips = dict.fromkeys(w["strategy"] for _, w in flips), [r["patient_id"] for r, _ in flips]
    first = [r["wordings"][0] for r in records]
    found = {
        "accuracy": mean_of([w["correct"] for _, w in rows], who, draws),
        "accuracy_original": mean_of([w["correct"] for w in first], cases, draws),
        "says_yes": mean_of([w["answer"] == "yes" for _, w in rows], who, draws),
        "truth_yes": mean_of([w["answer_gt"] == "yes" for _, w in rows], who, draws),
        "flip_rate": mean_of([w["flip"] for _, w in flips], of_flips, draws),
        "flip_by_kind": {
            k: mean_of([w["flip"] if w["strategy"] == k else None for _, w in flips], of_flips, draws) for k in kinds
        },
    }
    for name in ("text_only", "blank", "other"):  # answers that change when the image is taken away or exchanged
        column = [None if r.get(name) is None else (r[name] > 0) != (w["answer"] == "yes")
                  for r, w in zip(records, first, strict=True)]  # fmt: skip
        found[f"changes_{name}"] = mean_of(column, cases, draws)
        right = [None if r.get(name) is None else ((r[name] > 0) == (w["answer_gt"] == "yes"))
                 for r, w in zip(records, first, strict=True)]  # fmt: skip
        found[f"accuracy_{name}"] = mean_of(right, cases, draws)
        if name == "other":
            found["accuracy_above_other"] = paired([w["correct"] for w in first], right, cases, draws)
    quadrants = {f"{a}, {b}": 0 for a in ("consistent", "flips") for b in ("relies on the image", "does not")}
    for r, w in zip(records, first, strict=True):
        if len(r["wordings"]) < 2:
            continue  # asked once: neither consistent nor not
        steady = not any(v["flip"] for v in r["wordings"][1:])
        relies = any(r.get(n) is not None and (r[n] > 0) != (w["answer"] == "yes") for n in ("text_only", "blank"))
        quadrants[f"{'consistent' if steady else 'flips'}, {'relies on the image' if relies else 'does not'}"] += 1
    found["quadrants"], found["without_paraphrase"] = quadrants, sum(len(r["wordings"]) < 2 for r in records)
    yes = [r for r in records if r["wordings"][0]["answer_gt"] == "yes" and r.get("without") is not None]
    right = [r for r in yes if r["wordings"][0]["correct"]]
    who, others = [r["patient_id"] for r in right], [r["without_other"] for r in right]
    found["causal"] = {
        "yes_cases": len(yes),
        "right": len(right),
        "flips_without_finding": mean_of([r["without"] <= 0 for r in right], who, draws),
        "flips_without_other": mean_of([None if m is None else m <= 0 for m in others], who, draws),
        "evidence_using": sum(r["evidence_using"] for r in records),
    }
    return found


def ends(found):
    """-> (low, high) of a share; nothing, or all, of few patients has no width: there the rule of three."""
    three = 3 / found["patients"]
    return min(found["low"], 1 - three), max(found["high"], three)


def verdict(found):
    """behaviour -> "needs the image", "does not need the image", or "undecided", and the sentence that says why."""
    parts = [found[n] for n in ("changes_text_only", "changes_blank", "changes_other") if found[n] is not None]
    causal = found["causal"]["flips_without_finding"]
    if not parts or any(p["low"] is None for p in parts):
        return "undecided", "there are too few patients to tell whether the image matters"
    shares = ", ".join(f"{100 * p['value']:.0f} %" for p in parts)
    told = f"answers change in {shares} of the cases without an image, with a blank one, with another patient's"
    if causal is not None:
        told += f"; right yes answers turn in {100 * causal['value']:.0f} % when the finding is drawn away"
    other, gone = found["changes_other"], [found[f"changes_{n}"] for n in ("text_only", "blank")]
    ignored = other is not None and ends(other)[1] < RELIES and min(ends(p)[1] for p in gone if p) < RELIES
    if ignored and (causal is None or causal["value"] < RELIES):  # a blank image alone may be unlike all it has seen
        return "does not need the image", told
    # answers on no image or on another patient's may change for any reason; a model that needs its film also has more
    # right answers with it than with another patient's
    above, change = found["accuracy_above_other"], other if causal is None else causal
    if above is not None:
        told += (f"; right answers above those with another patient's image: {100 * above['value']:.1f} points "
                 f"[{100 * above['low']:.1f}, {100 * above['high']:.1f}], p = {above['p']:.3f}")  # fmt: skip
    follows = change is not None and change["low"] is not None and ends(change)[0] > RELIES
    if follows and above is not None and above["low"] > 0 and above["p"] < 0.05:
        return "needs the image", told
    return "undecided", told


def localisation_tables(records, methods, draws=DRAWS):
    """
    -> {"evidence-using cases" | "other yes cases" | "all yes cases": {method: hit, chance, hit_over_chance, mass_ratio,
    against_mean_map: hit above that of the method's own mean map over calibration images, paired}}.
    """
    with_boxes = [r for r in records if r["has_boxes"]]
    groups = {"all yes cases": with_boxes}
    if any(r["evidence_using"] for r in records):
        groups = {"evidence-using cases": [r for r in with_boxes if r["evidence_using"]],
                  "other yes cases": [r for r in with_boxes if not r["evidence_using"]]} | groups  # fmt: skip
    tables = {}
    for group, some in groups.items():
        tables[group] = {}
        for method in methods:
            rows = [(r["located"][method], r["patient_id"]) for r in some if method in r["located"]]
            if not rows:
                continue
            located, who = zip(*rows, strict=True)
            of = {k: [found[k] for found in located] for k in ("hit", "chance", "mass_ratio", "null_hit")}
            tables[group][method] = {
                "n": len(rows),
                "hit": mean_of(of["hit"], who, draws),
                "chance": float(np.mean(of["chance"])),
                "hit_over_chance": ratio_of(of["hit"], of["chance"], who, draws),
                "mass_ratio": mean_of(of["mass_ratio"], who, draws),
                "against_mean_map": paired(of["hit"], of["null_hit"], who, draws),
            }
    return tables


def similarity_table(records, methods, draws=DRAWS):
    """How far maps move: {method: {what: {"js", "pearson"}}}; what: a paraphrase, and the nulls."""
    table = {}
    for method in methods:
        table[method] = {}
        kinds = {}
        for r in records:
            for kind, m, js, correlation in r["moved"]:
                if m == method:
                    kinds.setdefault(kind, []).append((js, correlation, r["patient_id"]))
        for kind, rows in kinds.items():
            js, correlation, who = zip(*rows, strict=True)
            table[method][kind] = {"js": mean_of(js, who, draws), "pearson": mean_of(correlation, who, draws)}
    return table


def attention_tests(records, method, draws=DRAWS):
    """
    For one kind of map: is the shift of a paraphrase smaller than between images (paired by case), is it equivalent to
    none (upper end of the 90 % interval of their ratio below SAME, and sign flips at 5 % on one side agree: an interval
    of few patients is too short), and does it foretell flips?
    """
    shifts = {}
    for r in records:
        by = {}
        for kind, m, js, _ in r["moved"]:
            if m == method and js is not None:
                by.setdefault("paraphrase" if kind.startswith("paraphrase") else kind, []).append(js)
        shifts[r["key"]] = {k: float(np.mean(v)) for k, v in by.items()}
    who = [r["patient_id"] for r in records]
    own, other = ([shifts[r["key"]].get(name) for r in records] for name in ("paraphrase", "other patient's image"))
    ratio = ratio_of(own, other, who, draws, confidence=0.9)
    half = paired(own, [None if js is None else SAME * js for js in other], who, draws)
    sure = ratio is not None and ratio["low"] is not None and half["p"] < 0.1
    rows = [(r["wordings"][0], w, r["patient_id"]) for r in records for w in r["wordings"][1:]
            if w["maps"].get(method, {}).get("js") is not None]  # fmt: skip
    flips, patients = [w["flip"] for _, w, _ in rows], [patient for *_, patient in rows]
    predictors = {
        "shift of the map (JS)": [w["maps"][method]["js"] for _, w, _ in rows],
        "small margin (baseline)": [-abs(first["margin"]) for first, *_ in rows],
        "change of text length (baseline)": [abs(len(w["question"]) - len(first["question"])) for first, w, _ in rows],
    }
    return {
        "paraphrase_minus_other_image": paired(own, other, who, draws),
        "paraphrase_over_other_image_90": ratio,
        "equivalent": sure and ratio["high"] < SAME,
        "follows_wording": sure and ratio["low"] > SAME,
        "flip_auroc": {k: auroc_of(flips, v, patients, draws) for k, v in predictors.items()},
    }


def share(wordings, key):
    return float(np.mean([w[key] for w in wordings])) if wordings else None


def compare_models(by_model, draws=DRAWS):
    """{model: records} -> differences between the first and each other one, on cases both have; p adjusted by Holm."""
    names, found = list(by_model), []
    first = {r["key"]: r for r in by_model[names[0]]} if names else {}
    for name in names[1:]:
        pairs = [(first[r["key"]], r) for r in by_model[name] if r["key"] in first]
        for what, key, start in (("accuracy", "correct", 0), ("flip rate", "flip", 1)):
            a, b = ([share(pair[k]["wordings"][start:], key) for pair in pairs] for k in (0, 1))
            result = paired(a, b, [p[0]["patient_id"] for p in pairs], draws)
            if result is not None:
                found.append({"models": [names[0], name], "what": what} | result)
    return found


def with_holm(tests):
    """[(name, result with "p" or None)], one declared family -> {name: result + p_holm}."""
    adjusted = holm([None if t is None else t["p"] for _, t in tests])
    return {name: None if t is None else t | {"p_holm": p} for (name, t), p in zip(tests, adjusted, strict=True)}
