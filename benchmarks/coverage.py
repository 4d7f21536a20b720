"""
How often does each interval of shared/metrics/statistics.py hold the truth, and how often does each test reject in
error?

Usage:
    python benchmarks/coverage.py  # the claim: 1,000 repetitions, minutes on one core
    python benchmarks/coverage.py --repetitions 300 --clusters 5 100 --num-samples 500   # the short form of the tests

Data of known truth are drawn again and again; nominal coverage is 95 %. Clustered rows come in groups of 1 to 11 rows
(as the questions about one image do) whose chances vary from group to group with an intra-cluster correlation of 0.3.
"rows" in a name: the groups are ignored, for contrast. An interval that could not be given, or has no end on one side,
counts as a miss. Prints two markdown tables with Monte Carlo standard errors and writes --out-dir/coverage.json.
"""

import argparse
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy.stats import norm

from shared.metrics.statistics import METHODS, bootstrap_interval, delong_auc, effective_clusters, mcnemar_exact
from shared.metrics.statistics import sign_flip_test, wilson_interval
from shared.runtime import positive_int, run_facts, script, write_json

ICC = 0.3  # of answers to questions about one image; 0 would make groups harmless
LOW, HIGH = 0.93, 0.97  # what counts as holding the nominal 95 %


@dataclass
class Case:
    """One drawn data set: metric (a function of the sums of columns), its true value, and intervals of other kinds."""

    groups: np.ndarray
    columns: list
    metric: object
    truth: float
    others: dict = field(default_factory=dict)  # name -> (low, high)


def draw_groups(rng, num_groups):
    return np.repeat(np.arange(num_groups), rng.integers(1, 12, size=num_groups))


def beta(rng, mean, size):
    """Chances of groups with this mean, so that two rows of one group correlate by ICC."""
    total = 1 / ICC - 1
    return rng.beta(mean * total, (1 - mean) * total, size)


def ratio(a, b):
    return a / b


def independent_share(rng, num_groups):
    right = rng.random(num_groups) < 0.8
    case = Case(np.arange(num_groups), [right, np.ones(num_groups)], ratio, 0.8)
    case.others["Wilson"] = wilson_interval(int(right.sum()), num_groups)
    return case


def clustered_share(rng, num_groups):
    groups = draw_groups(rng, num_groups)
    right = rng.random(len(groups)) < beta(rng, 0.8, num_groups)[groups]
    case = Case(groups, [right, np.ones(len(groups))], ratio, 0.8)
    case.others["Wilson, rows"] = wilson_interval(int(right.sum()), len(groups))
    return case


def skewed_mean(rng, num_groups):
    """Times a gamma factor of the group and one of the row, each of mean 1: skewness of a row 3.0."""
    groups = draw_groups(rng, num_groups)
    x = rng.gamma(2, 0.5, num_groups)[groups] * rng.gamma(2, 0.5, len(groups))
    return Case(groups, [x, np.ones(len(groups))], ratio, 1.0)


def heavy_mean(rng, num_groups):
    """Log-normal factors of group and row: a few groups carry much of the mean."""
    groups = draw_groups(rng, num_groups)
    x = np.exp(rng.normal(size=num_groups)[groups] + rng.normal(size=len(groups)) - 1)
    return Case(groups, [x, np.ones(len(groups))], ratio, 1.0)


def f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn)


def f1_score(rng, num_groups):
    """
    A quarter positive, recall 0.7, one false alarm in ten negatives: tp .175, fp .075, fn .075 -> F1 = .35 / .5 = 0.7.
    """
    groups = draw_groups(rng, num_groups)
    prevalence, recall, alarm = (beta(rng, mean, num_groups)[groups] for mean in (0.25, 0.7, 0.1))
    label = rng.random(len(groups)) < prevalence
    called = rng.random(len(groups)) < np.where(label, recall, alarm)
    return Case(groups, [label & called, ~label & called, label & ~called], f1, 0.7)


def two_models(rng, num_groups, difference):
    """
    Right answers of two models that agree by construction in 60 % of the rows; model b is right in 0.75 - difference.
    """
    groups = draw_groups(rng, num_groups)
    n = len(groups)
    a = rng.random(n) < beta(rng, 0.75, num_groups)[groups]
    other = rng.random(n) < beta(rng, 0.75 - difference / 0.4, num_groups)[groups]
    return groups, a, np.where(rng.random(n) < 0.6, a, other)


def paired_difference(rng, num_groups):
    groups, a, b = two_models(rng, num_groups, 0.04)
    return Case(groups, [a * 1.0 - b, np.ones(len(groups))], ratio, 0.04)


EDGES = np.linspace(
    -1.5, 2.5, 9
)  # scores in ten steps, so that the AUC is a function of sums too: counts per step and class


def auc_of_counts(*counts):
    positive, negative = counts[:10], counts[10:]
    below, wins = 0.0, 0.0
    for p, n in zip(positive, negative, strict=True):
        wins = wins + p * (below + n / 2)
        below = below + n
    return wins / (sum(positive) * below)


def true_auc():
    edges = np.concatenate([[-np.inf], EDGES, [np.inf]])
    return auc_of_counts(*np.diff(norm.cdf(edges - 1)), *np.diff(norm.cdf(edges)))


def auc(rng, groups, group_label):
    """
    Scores are normal, one unit higher for positives; all rows of a group have one label, as the films of one patient
    do.
    """
    num_groups = len(group_label)
    label = group_label[groups]
    within = len(groups) > num_groups  # groups of one row: independent cases
    score = label + (
        np.sqrt(ICC) * rng.normal(size=num_groups)[groups] + np.sqrt(1 - ICC) * rng.normal(size=len(groups))
    )
    step = np.digitize(score, EDGES)
    columns = [(step == s) & (label == y) for y in (1, 0) for s in range(10)]
    case = Case(groups, columns, auc_of_counts, true_auc())
    delong = delong_auc(label, step)
    case.others["DeLong, rows" if within else "DeLong"] = delong["low"], delong["high"]
    return case


def independent_auc(rng, num_groups):
    return auc(rng, np.arange(num_groups), (np.arange(num_groups) < 0.4 * num_groups).astype(int))


def clustered_auc(rng, num_groups):
    return auc(rng, draw_groups(rng, num_groups), (np.arange(num_groups) < 0.4 * num_groups).astype(int))


SCENARIOS = {
    "share 0.8, independent": independent_share,
    "share 0.8, clustered": clustered_share,
    "skewed mean, clustered": skewed_mean,
    "heavy-tailed mean, clustered": heavy_mean,
    "F1 0.7, clustered": f1_score,
    "paired difference 0.04, clustered": paired_difference,
    "AUC 0.76, independent": independent_auc,
    "AUC 0.76, clustered": clustered_auc,
}


def all_intervals(case, num_samples, seed):
    """-> {name: (low, high)}"""

    def interval(groups, method):
        result = bootstrap_interval(
            case.metric, *case.columns, groups=groups, num_samples=num_samples, seed=seed, method=method, of_sums=True
        )
        return result["low"], result["high"]

    result = dict(case.others)
    if not result:  # each kind of data has one interval of independent rows for comparison
        result["percentile, rows"] = interval(None, "percentile")
    return result | {method: interval(case.groups, method) for method in METHODS}


def measure_coverage(draw, num_groups, repetitions, num_samples, seed):
    """-> {interval: dict(coverage, se, undefined, median_width)}, and the mean effective number of groups."""
    rows, effective = {}, []
    for repetition in range(repetitions):
        rng = np.random.default_rng([seed, num_groups, repetition])
        case = draw(rng, num_groups)
        effective.append(effective_clusters(case.groups)["effective_groups"])
        for name, (low, high) in all_intervals(case, num_samples, int(rng.integers(2**31))).items():
            defined = low is not None and high is not None
            rows.setdefault(name, []).append(
                (defined and low <= case.truth <= high, defined, high - low if defined else np.nan)
            )
    result = {}
    for name, values in rows.items():
        covered, defined, width = np.array(values, dtype=float).T
        result[name] = dict(
            coverage=covered.mean(),
            se=standard_error(covered.mean(), repetitions),
            undefined=1 - defined.mean(),
            median_width=np.median(width[defined == 1]) if defined.any() else None,
        )
    return result, float(np.mean(effective))


def measure_tests(num_groups, repetitions, seed):
    """Two equally good models: how often p < 0.05? -> {test: dict(rejected, se)}"""
    rejected = {"sign_flip_test, by group": 0, "sign_flip_test, rows": 0, "mcnemar_exact, rows": 0}
    for repetition in range(repetitions):
        rng = np.random.default_rng([seed, num_groups, repetition, 1])
        groups, a, b = two_models(rng, num_groups, 0.0)
        difference = a * 1.0 - b
        rejected["sign_flip_test, by group"] += sign_flip_test(difference, groups, 999, repetition)["p"] < 0.05
        rejected["sign_flip_test, rows"] += sign_flip_test(difference, None, 999, repetition)["p"] < 0.05
        rejected["mcnemar_exact, rows"] += mcnemar_exact(a, b)["p"] < 0.05
    return {
        name: dict(rejected=count / repetitions, se=standard_error(count / repetitions, repetitions))
        for name, count in rejected.items()
    }


def standard_error(share, n):
    return float(np.sqrt(share * (1 - share) / n))


def percent(share, se):
    return f"{100 * share:.1f} ± {100 * se:.1f}"


def verdict(cells, repetitions):
    """{G: cell} -> where the coverage is outside 93-97 % by more than two Monte Carlo standard errors."""
    short = [g for g, c in cells.items() if c["coverage"] < LOW - 2 * standard_error(LOW, repetitions)]
    wide = [g for g, c in cells.items() if c["coverage"] > HIGH + 2 * standard_error(HIGH, repetitions)]
    words = [f"{word} at {', '.join(map(str, at))}" for word, at in (("too short", short), ("too wide", wide)) if at]
    return "; ".join(words) or "holds"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--repetitions", type=positive_int, default=1000,
        help="data sets per cell; the standard error at 95 %% is 0.7 points with 1000, 1.3 with 300 (%(default)s)")
    parser.add_argument("--clusters", type=positive_int, nargs="+", default=[5, 10, 30, 100, 200], metavar="G",
        help="numbers of groups (%(default)s)")
    parser.add_argument("--num-samples", type=positive_int, default=1000,
        help="bootstrap resamples per interval (%(default)s)")
    # fmt: on
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(argv)
    if min(args.clusters) < 5:
        parser.error("--clusters must be at least 5: with fewer there is nothing to resample")
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    coverage, effective, tests = {}, {}, {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups count like")  # few groups are the point here
        for scenario, draw in SCENARIOS.items():
            for g in args.clusters:
                cells, effective_groups = measure_coverage(draw, g, args.repetitions, args.num_samples, args.seed)
                if scenario.endswith("clustered"):
                    effective[g] = effective_groups
                for name, cell in cells.items():
                    coverage.setdefault(scenario, {}).setdefault(name, {})[g] = cell
            print(f"{scenario}: done after {time.time() - started:.0f} s", file=sys.stderr, flush=True)
        for g in args.clusters:
            for name, cell in measure_tests(g, args.repetitions, args.seed).items():
                tests.setdefault(name, {})[g] = cell
    verdicts = {
        s: {name: verdict(cells, args.repetitions) for name, cells in rows.items()} for s, rows in coverage.items()
    }

    columns = " | ".join(f"G = {g}" for g in args.clusters)
    rule = "|---" * (len(args.clusters) + 1) + "|"
    print(
        f"\nCoverage in % (± Monte Carlo standard error) of intervals of nominal 95 %, {args.repetitions} repetitions;"
        f" in brackets: % of the\nrepetitions without an interval, when above 0.5. {args.clusters} groups of 1 to 11"
        f" rows count like {', '.join(f'{effective[g]:.1f}' for g in args.clusters)} of equal size.\n"
    )
    print(f"| data | interval | {columns} | within 93-97 % (± 2 standard errors)? |\n{rule}---|---|")
    for scenario, rows in coverage.items():
        for name, cells in rows.items():
            texts = [
                percent(c["coverage"], c["se"]) + (f" [{100 * c['undefined']:.0f}]" if c["undefined"] > 0.005 else "")
                for c in cells.values()
            ]
            print(f"| {scenario} | {name} | {' | '.join(texts)} | {verdicts[scenario][name]} |")
    print(
        "\nRejections in % at p < 0.05 between two equally good models on clustered rows (a valid test has at most"
        f" 5)\n\n| test | {columns} |\n{rule}"
    )
    for name, cells in tests.items():
        print(f"| {name} | {' | '.join(percent(c['rejected'], c['se']) for c in cells.values())} |")
    write_json(
        args.out_dir / "coverage.json",
        {
            "nominal": 0.95,
            "icc": ICC,
            "coverage": coverage,
            "verdicts": verdicts,
            "rejection_rates": tests,
            "effective_groups": effective,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            **run_facts(started, "cpu"),
        },
    )
    print(f"\n{time.time() - started:.0f} s; written to {args.out_dir / 'coverage.json'}")


if __name__ == "__main__":
    main()
