"""
Numbers of maps, and what a set of answers and maps shows: tables with intervals that draw patients.

Maps are compared on one grid (maps.on_common_grid); p, q: arrays of one shape, not below 0, sum 1. Undefined is None.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np
from scipy.stats import rankdata

from shared.metrics.statistics import bootstrap_interval, effective_clusters, holm, sign_flip_test

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


def localisation(values, shares, inside):
    """
    Map, share of each cell in the boxes, share of each cell on the image, all (rows, columns) -> hit: share of the peak
    cell that lies in a box (a random point of it), chance: that of a random cell, mass_ratio: mass in the boxes over
    chance.
    """
    chance = float(shares.sum() / max(inside.sum(), 1e-12))
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


def auroc(labels, scores):
    """Ties count half; None without both classes."""
    labels = np.asarray(labels, bool)
    n = int(labels.sum())
    if n in (0, len(labels)):
        return None
    return float((rankdata(scores)[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


# ---------------------------------------------------------------------------------------------------- many of them


def mean_of(values, patients, draws=DRAWS, seed=0):
    """Mean with its interval -> dict(value, low, high, n, patients), None where nothing is known."""
    pairs = [(v, p) for v, p in zip(values, patients, strict=True) if v is not None]
    if not pairs:
        return None
    values, who = np.array([float(v) for v, _ in pairs]), np.array([p for _, p in pairs])
    found = {"value": float(values.mean()), "low": None, "high": None, "n": len(values), "patients": len(set(who))}
    if found["patients"] > 1:
        ones, options = np.ones(len(values)), dict(groups=who, num_samples=draws, seed=seed, of_sums=True)
        interval = bootstrap_interval(_ratio, values, ones, **options)
        found |= {"low": interval["low"], "high": interval["high"]}
    return found


def _ratio(a, b):
    return a / b


def ratio_of(a, b, patients, draws=DRAWS, confidence=0.95, seed=0):
    """sum(a) / sum(b) over rows where both are known, with its interval."""
    rows = [(x, y, p) for x, y, p in zip(a, b, patients, strict=True) if x is not None and y is not None]
    if len({p for *_, p in rows}) < 2:
        return None
    x, y, p = (np.array(column) for column in zip(*rows, strict=True))
    found = bootstrap_interval(
        _ratio, x, y, groups=p, num_samples=draws, confidence=confidence, seed=seed, of_sums=True
    )
    return {
        "value": found["value"],
        "low": found["low"],
        "high": found["high"],
        "n": len(rows),
        "patients": len(set(p)),
    }


def paired(a, b, patients, draws=DRAWS, seed=0):
    """Mean of a - b with interval, and p of the sign-flip test over patients; None where nothing is paired."""
    rows = [(x - y, p) for x, y, p in zip(a, b, patients, strict=True) if x is not None and y is not None]
    if not rows:
        return None
    differences, who = zip(*rows, strict=True)
    found = mean_of(differences, who, draws, seed)
    test = sign_flip_test(np.array(differences, float), np.array(who), seed=seed)
    return found | {"p": test["p"], "groups_that_differ": test["num_groups"]}


def auroc_of(labels, scores, patients, draws=DRAWS, seed=0):
    rows = [(x, s, p) for x, s, p in zip(labels, scores, patients, strict=True) if s is not None]
    if not rows:
        return None
    x, s, p = (np.array(column) for column in zip(*rows, strict=True))
    if auroc(x, s) is None or len(set(p)) < 2:
        return {"value": auroc(x, s), "low": None, "high": None, "n": len(x), "positives": int(x.sum())}
    found = bootstrap_interval(auroc, x, s, groups=p, num_samples=draws, seed=seed)
    return {k: found[k] for k in ("value", "low", "high")} | {"n": len(x), "positives": int(x.sum())}


def clusters(patients):
    found = effective_clusters(np.array(patients))
    return {"groups": found["num_groups"], "effective": found["effective_groups"], "warning": found["warning"]}


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
    kinds = dict.fromkeys(w["strategy"] for _, w in flips)
    first = [r["wordings"][0] for r in records]
    found = {
        "accuracy": mean_of([w["correct"] for _, w in rows], who, draws),
        "accuracy_original": mean_of([w["correct"] for w in first], cases, draws),
        "says_yes": mean_of([w["answer"] == "yes" for _, w in rows], who, draws),
        "truth_yes": mean_of([w["answer_gt"] == "yes" for _, w in rows], who, draws),
        "flip_rate": mean_of([w["flip"] for _, w in flips], [r["patient_id"] for r, _ in flips], draws),
        "flip_by_kind": {
            k: mean_of(
                *zip(*[(w["flip"], r["patient_id"]) for r, w in flips if w["strategy"] == k], strict=True), draws
            )
            for k in kinds
        },
    }
    for name in ("text_only", "blank", "other"):  # answers that change when the image is taken away or exchanged
        column = [None if r.get(name) is None else (r[name] > 0) != (w["answer"] == "yes")
                  for r, w in zip(records, first, strict=True)]  # fmt: skip
        found[f"changes_{name}"] = mean_of(column, cases, draws)
        right = [None if r.get(name) is None else ((r[name] > 0) == (w["answer_gt"] == "yes"))
                 for r, w in zip(records, first, strict=True)]  # fmt: skip
        found[f"accuracy_{name}"] = mean_of(right, cases, draws)
    quadrants = {f"{a}, {b}": 0 for a in ("consistent", "flips") for b in ("relies on the image", "does not")}
    for r, w in zip(records, first, strict=True):
        steady = not any(v["flip"] for v in r["wordings"][1:])
        relies = any(r.get(n) is not None and (r[n] > 0) != (w["answer"] == "yes") for n in ("text_only", "blank"))
        quadrants[f"{'consistent' if steady else 'flips'}, {'relies on the image' if relies else 'does not'}"] += 1
    found["quadrants"] = quadrants
    yes = [r for r in records if r["wordings"][0]["answer_gt"] == "yes" and r.get("without") is not None]
    right = [r for r in yes if r["wordings"][0]["correct"]]
    who = [r["patient_id"] for r in right]
    found["causal"] = {
        "yes_cases": len(yes),
        "right": len(right),
        "flips_without_finding": mean_of([r["without"] <= 0 for r in right], who, draws),
        "flips_without_other": mean_of(
            [None if r["without_other"] is None else r["without_other"] <= 0 for r in right], who, draws
        ),
        "evidence_using": sum(r["evidence_using"] for r in records),
    }
    return found


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
    ignored = other is not None and other["high"] < RELIES and min(p["high"] for p in gone if p) < RELIES
    if ignored and (causal is None or causal["value"] < RELIES):  # a blank image alone may be unlike all it has seen
        return "does not need the image", told
    strong = causal is not None and causal["low"] is not None and causal["low"] > RELIES
    # answers on no image or on another patient's may change for any reason, right ones that follow the finding may not
    if strong or (causal is None and other is not None and other["low"] > RELIES):
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
            of = {k: [found[k] for found, _ in rows] for k in ("hit", "chance", "mass_ratio", "null_hit")}
            who = [patient for _, patient in rows]
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
        rows = [(r["patient_id"], kind, js, r_) for r in records for kind, m, js, r_ in r["moved"] if m == method]
        for kind in dict.fromkeys(kind for _, kind, _, _ in rows):
            some = [(who, js, r_) for who, k, js, r_ in rows if k == kind]
            who, js, correlation = zip(*some, strict=True)
            table[method][kind] = {"js": mean_of(js, who, draws), "pearson": mean_of(correlation, who, draws)}
    return table


def attention_tests(records, method, draws=DRAWS):
    """
    For one kind of map: is the shift of a paraphrase smaller than between images (paired by case), is it equivalent to
    none (upper end of the 90 % interval of their ratio below SAME), and does it foretell flips?
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
    rows = [(r, w) for r in records for w in r["wordings"] if w["variant_id"] and method in w["maps"]]
    rows = [(r, w) for r, w in rows if w["maps"][method].get("js") is not None]
    flips, patients = [w["flip"] for _, w in rows], [r["patient_id"] for r, _ in rows]
    first = {r["key"]: r["wordings"][0] for r in records}
    predictors = {
        "shift of the map (JS)": [w["maps"][method]["js"] for _, w in rows],
        "small margin (baseline)": [-abs(first[r["key"]]["margin"]) for r, _ in rows],
        "change of text length (baseline)": [
            abs(len(w["question"]) - len(first[r["key"]]["question"])) for r, w in rows
        ],
    }
    same = ratio is not None and ratio["high"] is not None and ratio["high"] < SAME
    return {
        "paraphrase_minus_other_image": paired(own, other, who, draws),
        "paraphrase_over_other_image_90": ratio,
        "equivalent": bool(same),
        "flip_auroc": {k: auroc_of(flips, v, patients, draws) for k, v in predictors.items()},
    }


def compare_models(by_model, draws=DRAWS):
    """{model: records} -> differences between the first and each other one, on cases both have; p adjusted by Holm."""
    names, found = list(by_model), []
    first = {r["key"]: r for r in by_model[names[0]]} if names else {}
    for name in names[1:]:
        pairs = [(first[r["key"]], r) for r in by_model[name] if r["key"] in first]
        measures = {
            "accuracy": lambda r: float(np.mean([w["correct"] for w in r["wordings"]])),
            "flip rate": lambda r: (
                float(np.mean([w["flip"] for w in r["wordings"][1:]])) if r["wordings"][1:] else None
            ),
        }
        for what, of in measures.items():
            a, b = ([of(pair[k]) for pair in pairs] for k in (0, 1))
            result = paired(a, b, [p[0]["patient_id"] for p in pairs], draws)
            if result is not None:
                found.append({"models": [names[0], name], "what": what} | result)
    return found


def with_holm(tests):
    """[(name, result with "p" or None)], one declared family -> {name: result + p_holm}."""
    adjusted = holm([None if t is None else t["p"] for _, t in tests])
    return {name: None if t is None else t | {"p_holm": p} for (name, t), p in zip(tests, adjusted, strict=True)}
