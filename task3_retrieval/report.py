"""The report of evaluate.py as Markdown: tables, intervals, figures."""

from pathlib import Path

HAND_IN = Path("reports/task3_retrieval.md")
CAPTIONS = {
    "visual_results": (
        "Demonstration queries and their nearest training images; three queries picked by hand prove nothing, the table"
        " does"
    ),
    "failures": "Wrong votes, most confident first",
    "precision": "Precision among the first k neighbours",
    "map": "Principal components of the vectors",
    "distances": "Distance to the last voting neighbour",
}


def percent(value):
    return "–" if value is None else f"{100 * value:.1f}"


def decimals(value):
    return "–" if value is None else f"{value:.2f}"


def interval(numbers, prefix=""):
    low, high = numbers[f"{prefix}low"], numbers[f"{prefix}high"]
    return "" if low is None else f" [{percent(low)}, {percent(high)}]"


def p_value(p):
    return "–" if p is None else "p < 0.001" if p < 1e-3 else f"p = {p:.3f}"


def table(rows, label_names):
    """Markdown table, per cent: one line per system."""
    classes = list(enumerate(label_names))[:4]
    columns = [(m, "micro", m) for m in ("P@1", "P@5", "P@10")] + [
        ("mAP", "micro", "AP"),
        ("macro mAP", "macro", "AP"),
        ("R-prec", "micro", "R-prec"),
        ("MRR", "micro", "RR"),
        ("nDCG@10", "micro", "nDCG@10"),
        ("vote", "micro", "vote"),
        ("vote, balanced", "macro", "vote"),
    ]
    columns += [(f"P@5 {name}", c, "P@5") for c, name in classes]
    lines = ["| | " + " | ".join(name for name, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for system, summary in rows.items():
        lines.append(
            f"| {system} | "
            + " | ".join(percent(summary[row].get(metric, {}).get("value")) for _, row, metric in columns)
            + " |"
        )
    return "\n".join(lines)


def interval_table(summary, label_names, floor="difference to raw pixels, cosine"):
    """Headline metrics with their intervals, and the paired difference to pixels."""
    lines = [
        f"| | micro | macro | {' | '.join(label_names[:4])} | {floor} (micro) | {floor} (macro) |",
        "|---" * (5 + len(label_names[:4])) + "|",
    ]
    for metric, name in (
        ("P@1", "P@1"),
        ("P@5", "P@5"),
        ("P@10", "P@10"),
        ("AP", "mAP"),
        ("R-prec", "R-precision"),
        ("RR", "MRR"),
        ("nDCG@10", "nDCG@10"),
        ("vote", "vote accuracy"),
    ):
        cells = [
            f"{percent(summary[row][metric]['value'])}{interval(summary[row][metric])}"
            for row in ("micro", "macro", *range(len(label_names[:4])))
        ]
        cells += [difference(summary[row][metric]) for row in ("micro", "macro")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(numbers):
    if numbers.get("difference") is None:
        return "–"
    return f"{100 * numbers['difference']:+.1f}{interval(numbers, 'difference_')}, {p_value(numbers['p'])}"


def foreign_cell(numbers):
    """AUROC with its interval, and the share warned of; the queries themselves have only the latter."""
    auroc = f"{numbers['auroc']:.3f} [{numbers['low']:.3f}, {numbers['high']:.3f}] " if "auroc" in numbers else ""
    return f"{auroc}({percent(numbers['warned'])})"


def report_text(data, args, embed, measured, labels, figures):
    """The hand-in report as Markdown; {figures} stands for the folder of the pictures."""
    names, title, n = data.label_names, measured["headline"], len(labels[args.queries])
    across, within = measured["tables"]["across"], measured["tables"]["within"]
    split = {"test": "Test", "val": "Validation"}[args.queries]
    text = [f"# {data.name}: retrieval of similar cases", ""]
    if data.phantom:
        text += ["**PHANTOM IMAGES. Drawn by this project; nothing here says anything about real X-rays.**", ""]
    text += [
        (
            f"Vectors: {title} (`{embed.name}`{f', weights `{embed.weights}`' if embed.weights else ''}), {embed.dim}"
            f" numbers per image, {args.metric}{', unit length' if args.metric == 'cosine' else ''}; {data.size}"
            " pixels. Similar = same label. Rankings over the whole gallery, ties by id; a query never finds itself or"
            " a byte-identical copy. All numbers in per cent."
        ),
        "",
        f"## {split} ({n}) searches train ({len(labels['train'])})",
        "",
        table(across, names),
        "",
        f"With 95 % intervals ({measured['intervals']['across']}), {title}:",
        "",
        interval_table(across[title], names),
        "",
    ]
    if measured["against_task1"]:
        rows = measured["against_task1"]
        text += [
            "Trained embedding minus task 1 features, paired: "
            + "; ".join(
                f"{label} {difference(rows[row][metric])}"
                for label, row, metric in (
                    ("P@1", "micro", "P@1"),
                    ("P@5", "micro", "P@5"),
                    ("macro mAP", "macro", "AP"),
                    ("vote", "micro", "vote"),
                )
            )
            + ".",
            "",
        ]
    if measured["vote_auc"]:
        text += [
            "AUC of the share of the vote: "
            + ", ".join(f"{name} {value:.3f}" for name, value in measured["vote_auc"].items())
            + ".",
            "",
        ]
    text += [
        f"## {split} images among themselves, leave one out",
        "",
        table(within, names),
        "",
        f"Intervals for {title} ({measured['intervals']['within']}):",
        "",
        interval_table(within[title], names),
        "",
    ]
    text += [
        (
            "Queries and gallery come from the same source here, which flatters every system; the table above is the"
            " honest one."
        ),
        "",
    ]

    if measured["agreement"]:
        a = measured["agreement"]
        kappa = "" if a["kappa"] is None else f", kappa {a['kappa']:.2f}"
        text += [
            "## Does the vote say what the classifier says?",
            "",
            (
                f"The vote of {args.vote} agrees with task 1's classifier in {percent(a['agree'])}{interval(a)} of the"
                f" queries{kappa}; accuracy: classifier {percent(a['accuracy_classifier'])}, vote"
                f" {percent(a['accuracy_vote'])} ({a['mcnemar']['only_a']} only the vote has right,"
                f" {a['mcnemar']['only_b']} only the classifier; exact McNemar {p_value(a['mcnemar']['p'])}). Where"
                f" they agree {percent(a['accuracy_when_agreed'])} are right; in the {a['num_disagree']} others the"
                f" vote is right in {percent(a['accuracy_vote_when_not'])}."
            ),
            "",
        ]
    e = measured["explanation"]
    text += [
        "## Can the explanation fail?",
        "",
        (
            f"Balanced accuracy of the vote: {percent(e['vote'])}; with shuffled gallery labels"
            f" {percent(e['shuffled_mean'])} (95 % of {e['num_shuffles']} shuffles within {percent(e['shuffled_low'])}"
            f" to {percent(e['shuffled_high'])})."
        ),
    ]
    if "vote_stays_without_neighbours" in e:
        text[-1] += (
            f" With the voting neighbours taken out of the gallery, the next {args.vote} vote the same in"
            f" {percent(e['vote_stays_without_neighbours'])} of the queries (balanced accuracy"
            f" {percent(e['vote_without_neighbours'])})."
        )
    text += [
        "",
        "## A similarity without labels",
        "",
        (
            "A changed copy of each query image searches the unchanged ones; share that finds its own original first"
            " (among the first five)."
        ),
        "",
    ]
    kinds = list(next(iter(measured["view_recall"].values())))
    text += ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    text += [
        f"| {name} | " + " | ".join(f"{percent(rows[k]['R@1'])} ({percent(rows[k]['R@5'])})" for k in kinds) + " |"
        for name, rows in measured["view_recall"].items()
    ]
    text += [
        "",
        "## Foreign images",
        "",
        (
            f"AUROC of the distance to neighbour {measured['foreign'][title]['k']}, foreign images against real"
            " queries; in brackets the share warned of at the limit below which 95 % of the validation images lie."
        ),
        "",
    ]
    kinds = list(measured["foreign"][title]["kinds"])
    text += ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    text += [
        f"| {name} | " + " | ".join(map(foreign_cell, numbers["kinds"].values())) + " |"
        for name, numbers in measured["foreign"].items()
    ]
    text += [
        "",
        "## Hubs and copies",
        "",
        "| k-occurrence, k = 10, in train | skewness | most frequent image | never found | share of the top 1 % |",
        "|---|---|---|---|---|",
    ]
    text += [
        f"| {name} | {decimals(h['skewness'])} | train {h['item']}, {h['max']} times | {percent(h['never'])} |"
        f" {percent(h['top1_percent'])} |"
        for name, both in measured["hubness"].items()
        for h in [both["across"]]
    ]
    d = measured["duplicates"]
    text += [
        "",
        "Byte-identical images: "
        + ", ".join(f"{count} repeats in {split}" for split, count in d["repeats"].items())
        + "; "
        + ", ".join(f"{count} in both {pair.replace('-', ' and ')}" for pair, count in d["shared"].items())
        + f"; {d['conflicting']} with two labels. Pairs in {args.queries}:"
        f" {', '.join('/'.join(map(str, p)) for p in d['pairs'][args.queries]) or 'none'}. Several films of one child"
        " cannot be told from this file.",
        "",
        "| leave one out | P@1 | P@5 | mAP | vote |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | " + " | ".join(percent(row[k]) for k in ("P@1", "P@5", "AP", "vote")) + " |"
            for name, row in d["leave_one_out"].items()
        ),
        "",
        "## Failures",
        "",
        (
            f"{measured['failures']['n']} of {n} votes are wrong; the most confident ones (largest share of the vote,"
            " then lowest average precision):"
            f" {', '.join(f'{args.queries} {q}' for q in measured['failures']['shown']) or 'none'}. All are marked in"
            " predictions.csv."
        ),
        "",
        "## Figures",
        "",
    ]
    for name, file in figures.items():
        text += [f"{CAPTIONS[name]}:", "", f"![{CAPTIONS[name]}]({{figures}}{file})", ""]
    text += ["For research and teaching only; not a medical device, no medical advice.", ""]
    return "\n".join(text)
