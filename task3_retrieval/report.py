"""The report of evaluate.py: one function per section, from the numbers in metrics.json."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

from shared.report import Report, number, p_value, percent, short_path, with_interval

HAND_IN = Path("reports/task3_retrieval.md")
CAPTIONS = {
    "visual_results": (
        "Demonstration queries and their nearest training images; queries picked by hand prove nothing, the table does."
    ),
    "failures": "Wrong votes, most confident first.",
    "precision": "Precision among the first k neighbours.",
    "map": "Principal components of the vectors.",
    "distances": "Distance to the last voting neighbour.",
}
METRICS = {"P@1": "P@1", "P@5": "P@5", "P@10": "P@10", "AP": "mAP", "R-prec": "R-precision", "RR": "MRR"}
METRICS |= {"nDCG@10": "nDCG@10", "vote": "vote accuracy"}
COLUMNS = [(m, "micro", m) for m in ("P@1", "P@5", "P@10")]
COLUMNS += [("mAP", "micro", "AP"), ("macro mAP", "macro", "AP"), ("vote", "micro", "vote")]
COLUMNS += [("vote, balanced", "macro", "vote")]


def systems_table(rows, label_names):
    """-> header and rows, per cent: one line per system."""
    columns = COLUMNS + [(f"P@5 {name}", c, "P@5") for c, name in enumerate(label_names[:4])]
    values = {
        system: [percent(summary[row].get(metric, {}).get("value")) for _, row, metric in columns]
        for system, summary in rows.items()
    }
    return ["", *(name for name, _, _ in columns)], [[system, *cells] for system, cells in values.items()]


def difference(numbers):
    if numbers.get("difference") is None:
        return "–"
    found = {"value": numbers["difference"], **{f"{end}": numbers[f"difference_{end}"] for end in ("low", "high")}}
    return f"{'+' if found['value'] > 0 else ''}{with_interval(found)}, {p_value(numbers['p'])}"


def add_protocol(report, rows, title, label_names, how):
    """The table of all systems, and the headline's own numbers with intervals and differences to raw pixels."""
    summary = rows[title]
    report.table(*systems_table(rows, label_names))
    report.text(f"With 95 % intervals ({how}), {title}; differences to raw pixels, cosine, are paired:")
    groups = {"micro": "micro", "macro": "macro"} | dict(enumerate(label_names[:4]))
    header = ["", *groups.values(), "difference, micro", "difference, macro"]
    lines = []
    for metric, name in METRICS.items():
        cells = [with_interval(summary[group][metric]) for group in groups]
        lines.append([name, *cells, *(difference(summary[group][metric]) for group in ("micro", "macro"))])
    report.table(header, lines)


def add_agreement(report, found, k):
    report.heading("Does the vote say what the classifier says?")
    kappa = "" if found["kappa"] is None else f", kappa {number(found['kappa'], 2)}"
    both = found["mcnemar"]
    report.text(
        f"The vote of {k} agrees with task 1's classifier in {with_interval(found | {'value': found['agree']})} of the"
        f" queries{kappa}; accuracy:"
        f" classifier {percent(found['accuracy_classifier'])}, vote {percent(found['accuracy_vote'])}"
        f" ({both['only_a']} only the vote has right, {both['only_b']} only the classifier; exact McNemar"
        f" {p_value(both['p'])}). Where they agree {percent(found['accuracy_when_agreed'])} are right; in the"
        f" {found['num_disagree']} others the vote is right in {percent(found['accuracy_vote_when_not'])}."
    )


def add_explanation(report, found, k):
    report.heading("Can the explanation fail?")
    text = (
        f"Balanced accuracy of the vote: {percent(found['vote'])}; with shuffled gallery labels"
        f" {percent(found['shuffled_mean'])} (95 % of {found['num_shuffles']} shuffles within"
        f" {percent(found['shuffled_low'])} to {percent(found['shuffled_high'])})."
    )
    if "vote_stays_without_neighbours" in found:
        text += (
            f" With the voting neighbours taken out of the gallery, the next {k} vote the same in"
            f" {percent(found['vote_stays_without_neighbours'])} of the queries (balanced accuracy"
            f" {percent(found['vote_without_neighbours'])})."
        )
    report.text(text)


def add_similarity(report, view_recall, foreign, title):
    report.heading("A similarity without labels")
    report.text(
        "A changed copy of each query image searches the unchanged ones; share that finds its own original first (among"
        " the first five)."
    )
    kinds = list(view_recall[title])
    cells = {n: [f"{percent(r[k]['R@1'])} ({percent(r[k]['R@5'])})" for k in kinds] for n, r in view_recall.items()}
    report.table(["", *kinds], [[name, *row] for name, row in cells.items()])
    report.heading("Foreign images")
    report.text(
        f"AUROC of the distance to neighbour {foreign[title]['k']}, foreign images against real queries; in brackets"
        " the share warned of at the limit below which 95 % of the validation images lie."
    )
    lines = []
    for name, found in foreign.items():
        kinds = found["kinds"].values()
        cells = ["" if "auroc" not in of else with_interval(of | {"value": of["auroc"]}, number) for of in kinds]
        shares = [percent(of["warned"]) for of in kinds]
        lines.append([name, *(f"{auroc} ({warned})".strip() for auroc, warned in zip(cells, shares, strict=True))])
    report.table(["", *foreign[title]["kinds"]], lines)


def add_hubs_and_copies(report, hubs, copies, queries):
    report.heading("Hubs and copies")
    header = ["neighbours of 10, in train", "skewness", "most frequent image", "never found", "share of the top 1 %"]
    lines = [
        [name, number(h["skewness"], 2), f"train {h['item']}, {h['max']} times", percent(h["never"])]
        + [percent(h["top1_percent"])]
        for name, h in ((name, both["across"]) for name, both in hubs.items())
    ]
    report.table(header, lines)
    repeats = ", ".join(f"{count} repeats in {split}" for split, count in copies["repeats"].items())
    shared = ", ".join(f"{count} in both {pair.replace('-', ' and ')}" for pair, count in copies["shared"].items())
    pairs = ", ".join("/".join(map(str, pair)) for pair in copies["pairs"][queries]) or "none"
    report.text(
        f"Byte-identical images: {repeats}; {shared}; {copies['conflicting']} with two labels. Pairs in {queries}:"
        f" {pairs}. Several images of one patient cannot be told from this data."
    )
    names = ("P@1", "P@5", "AP", "vote")
    lines = [[way, *(percent(row[name]) for name in names)] for way, row in copies["leave_one_out"].items()]
    report.table(["leave one out", "P@1", "P@5", "mAP", "vote"], lines)


def make_report(study, args, embed, measured, figures, warnings):
    """-> Report, with everything that metrics.json holds and the figures {name: path}."""
    data, names, title = study.data, study.names, measured["headline"]
    tables, intervals, n = measured["tables"], measured["intervals"], len(study.y)
    split = {"test": "Test", "val": "Validation"}[study.queries]
    report = Report(f"{data.name}: retrieval of similar cases", data.phantom, warnings)
    weights = f", weights `{short_path(embed.weights)}`" if embed.weights and embed.trained_on else ""
    trained_on = f", trained on {embed.trained_on}" if embed.trained_on else ""
    report.text(
        f"Vectors: {title} (`{embed.name}`{weights}{trained_on}), {embed.dim} numbers per image, {args.metric}"
        f"{', unit length' if args.metric == 'cosine' else ''}; {data.size} pixels. Similar = same label. Rankings over"
        " the whole gallery, ties by id; a query never finds itself or a byte-identical copy. All numbers in per cent."
    )
    report.heading(f"{split} ({n}) searches train ({len(study.gallery)})")
    add_protocol(report, tables["across"], title, names, intervals["across"])
    if measured["against_task1"]:
        rows = measured["against_task1"]
        shown = {"P@1": ("micro", "P@1"), "P@5": ("micro", "P@5"), "macro mAP": ("macro", "AP")}
        shown["vote"] = ("micro", "vote")
        pairs = "; ".join(f"{label} {difference(rows[row][metric])}" for label, (row, metric) in shown.items())
        report.text(f"Trained embedding minus task 1 features, paired: {pairs}.")
    if measured["vote_auc"]:
        values = ", ".join(f"{name} {number(value)}" for name, value in measured["vote_auc"].items())
        report.text(f"AUC of the share of the vote: {values}.")
    report.heading(f"{split} images among themselves, leave one out")
    report.text(
        "Queries and gallery come from the same source here, which flatters every system; the table above is the honest"
        " one."
    )
    add_protocol(report, tables["within"], title, names, intervals["within"])
    if measured["agreement"]:
        add_agreement(report, measured["agreement"], study.k)
    add_explanation(report, measured["explanation"], study.k)
    add_similarity(report, measured["view_recall"], measured["foreign"], title)
    add_hubs_and_copies(report, measured["hubness"], measured["duplicates"], study.queries)
    report.heading("Failures")
    shown = ", ".join(f"{study.queries} {q}" for q in measured["failures"]["shown"]) or "none"
    report.text(
        f"{measured['failures']['n']} of {n} votes are wrong; the most confident ones (largest share of the vote, then"
        f" lowest average precision): {shown}. All are marked in predictions.csv."
    )
    report.heading("Figures")
    for name, path in figures.items():
        report.figure(path, CAPTIONS[name])
    return report
