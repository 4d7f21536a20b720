"""The report of evaluate.py as Markdown: tables, intervals, figures."""

from pathlib import Path

HAND_IN = Path("reports/task1_classification_report.md")
BINARY_COLUMNS = ("accuracy", "precision", "recall", "specificity", "f1", "balanced_accuracy", "mcc", "auc", "pr_auc")


def number(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


def p_value(p):
    return "–" if p is None else "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def report_table(rows, task):
    """Markdown table of all rows."""
    if task == "binary-class":
        columns = BINARY_COLUMNS
    elif task.startswith("multi-label"):
        columns = ("macro_auc", "macro_pr_auc", "micro_f1", "macro_f1", "mean_label_accuracy", "exact_match")
    else:
        columns = ("accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1", "mcc", "macro_auc")
        columns += ("quadratic_weighted_kappa", "mean_absolute_error") if task == "ordinal-regression" else ()
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(number(row[c]) for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def report_text(data, args, facts, files, measured, runs, spread, figures):
    """The hand-in report as Markdown; {figures} stands for the folder of the pictures."""
    rows, n = measured["rows"], len(data.images[args.split])
    validation = facts["validation"]
    text = [f"# {data.name}: classification report", ""]
    if data.phantom:
        text += ["**PHANTOM IMAGES. Drawn by this project; nothing here says anything about real X-rays.**", ""]
    text += [
        (
            f"{facts['architecture']} (stem {facts['stem']}), {data.size} pixels, trained from"
            f" {facts['dataset']['source']}; checkpoint `{files[0]}`, seed {facts['seed']}, epoch"
            f" {validation['epoch']}."
        ),
        (
            f"Measured on {n} {args.split} images. Training: {len(data.images['train'])} images, validation:"
            f" {len(data.images['val'])}; validation AUC {validation['val_auc']:.4f}. Epoch, threshold and temperature"
            " were chosen on validation images only."
        ),
        "",
        "## Results",
        "",
        report_table(rows, data.task),
        "",
    ]
    if data.task == "binary-class":
        chosen, against = rows["network, threshold from validation"], measured["against_pixels"]
        text += [
            (
                f"Threshold from validation: {facts['threshold']:.3f}; temperature {facts['temperature']:.3f}."
                f" Probabilities above the threshold are called {data.label_names[1]}."
            ),
            "",
        ]
        text += ["| threshold from validation | value | 95 % interval | method |", "|---|---|---|---|"]
        for name, interval in measured["intervals"].items():
            value = chosen["auc" if name == "auc_bootstrap" else name]
            text.append(
                f"| {name.replace('_', ' ')} | {number(value)} | {number(interval['low'])} to"
                f" {number(interval['high'])} | {interval['method']} |"
            )
        text += [
            "",
            (
                f"Counts: {chosen['tp']} true positives, {chosen['fp']} false positives, {chosen['tn']} true negatives,"
                f" {chosen['fn']} false negatives. Brier score {chosen['brier']:.4f}, expected calibration error"
                f" {chosen['ece']:.4f}."
            ),
            "",
            (
                f"Against the pixel baseline: AUC difference {against['auc']['difference']:.4f}"
                f" [{number(against['auc']['low'], 4)}, {number(against['auc']['high'], 4)}] (DeLong,"
                f" {p_value(against['auc']['p'])}); {against['accuracy']['only_a']} images only the network gets right,"
                f" {against['accuracy']['only_b']} only the baseline (exact McNemar,"
                f" {p_value(against['accuracy']['p'])})."
            ),
            "",
            (
                'The row "prior corrected" adapts the probabilities to the share of ill cases estimated from these'
                " images without their labels (Saerens et al. 2002)."
            ),
            "",
        ]
    else:
        text += [
            (
                f"95 % bootstrap intervals in MedMNIST's definition: AUC {number(measured['intervals']['auc']['low'])}"
                f" to {number(measured['intervals']['auc']['high'])}, accuracy"
                f" {number(measured['intervals']['accuracy']['low'])} to"
                f" {number(measured['intervals']['accuracy']['high'])}."
            ),
            "",
        ]
        table = rows["network"].get("per_class") or rows["network"]["per_label"]
        text += ["| class | n | recall | precision | F1 | AUC |", "|---|---|---|---|---|---|"]
        text += [
            f"| {data.label_names[r['label']]} | {r.get('num_positive', r['n'])} | {number(r.get('recall'))} |"
            f" {number(r.get('precision'))} | {number(r.get('f1'))} | {number(r.get('auc'))} |"
            for r in table
        ] + [""]
    if "medmnist" in measured:
        m = measured["medmnist"]
        text += [
            f"By `medmnist.Evaluator` (threshold 0.5, uncalibrated): AUC {m['auc']:.4f}, ACC {m['accuracy']:.4f}.",
            "",
        ]
    if spread:
        text += [
            f"## Over {len(runs)} seeds ({', '.join(str(r['seed']) for r in runs)})",
            "",
            "| | mean | standard deviation |",
            "|---|---|---|",
        ]
        text += [f"| {k.replace('_', ' ')} | {v['mean']:.4f} | {v['std']:.4f} |" for k, v in spread.items()] + [""]
    text += ["## Figures", ""]
    captions = {
        "confusion": "Confusion matrix",
        "roc_pr": "ROC and precision-recall curves",
        "calibration": "Calibration before and after temperature scaling",
        "failures": "Films chosen by rule, with Grad-CAM",
    }
    for name, file in figures.items():
        text += [f"{captions[name]}:", "", f"![{captions[name]}]({{figures}}{file})", ""]
    size = measured["heat_maps"]["native_size"]
    text += [
        (
            f"The heat maps come from {measured['heat_maps']['layer']} and have {size[1]}x{size[0]} cells; they show"
            " where this layer's evidence for the call lies, not where the disease is."
        ),
        "",
        "For research and teaching only; not a medical device, no medical advice.",
        "",
    ]
    return "\n".join(text)
