"""
Numbers of a set of written reports, each with a bootstrap interval, and whether they show that the films were used.

    scores = score_lines({"model": texts, "blank images": others}, references, labels)     # {line: {metric: interval}}
    image_use(draws)                                                                        # -> a sentence

The unit that is drawn is the patient. All lines are resampled alike, so differences are paired.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import numpy as np

from chexquery.cases import closed_upwards
from shared.metrics.clinical import SUBSETS, positive_matrix
from shared.metrics.labels import CONDITIONS
from shared.metrics.meteor import meteor_from_statistics
from shared.metrics.report_baselines import diversity
from shared.metrics.statistics import percentile_interval, resample_counts
from shared.metrics.text import NGrams, best_meteor, bleu_from_counts, pick_tokenizer, rouge_l

COLUMNS = {  # what the table shows -> its key
    "BLEU-1": "bleu_1", "BLEU-2": "bleu_2", "BLEU-3": "bleu_3", "BLEU-4": "bleu_4", "ROUGE-L": "rouge_l",
    "METEOR 1.5": "meteor_15", "CIDEr": "cider", "BERTScore F1": "bertscore_f1", "micro-F1-14": "f1_micro_14",
    "macro-F1-14": "f1_macro_14", "micro-F1-13": "f1_micro_13", "macro-F1-13": "f1_macro_13",
    "micro-F1-5": "f1_micro_5", "macro-F1-5": "f1_macro_5", "weighted-F1-14": "f1_weighted_14",
    "example-F1-14": "f1_example_14", "micro-F1, drawn": "f1_micro_drawn",
}  # fmt: skip


class Resamples:
    """How often each report is drawn, (M, N), the first row once each: one set for all lines."""

    def __init__(self, n, groups=None, num_samples=1000, seed=0):
        drawn = resample_counts(n, num_samples, seed, groups)
        self.counts = np.vstack([np.ones((1, n)), *(c[None] for c in drawn)])

    def sums(self, table):
        """(N, ...) -> (M + 1, ...)"""
        return np.tensordot(self.counts, np.asarray(table, dtype=np.float64), axes=(1, 0))

    def mean(self, values):
        return self.sums(values) / self.counts.sum(1)


def interval(draws):
    """(M + 1,), the first the value itself -> {"value", "low", "high"}"""
    low, high, _ = percentile_interval(draws[1:])
    return {"value": float(draws[0]), "low": low, "high": high}


def f1_draws(found, true, resamples, columns):
    """bool (N, C) twice -> {"micro", "macro", "weighted", "example": (M + 1,)} over these columns."""
    found, true = found[:, columns], true[:, columns]
    tp, support, called = (resamples.sums(a) for a in (found & true, true, found))
    each = np.divide(2 * tp, support + called, out=np.zeros_like(tp), where=support + called > 0)
    both = (support + called).sum(1)
    row_tp, row_both = (found & true).sum(1), found.sum(1) + true.sum(1)
    weight = support.sum(1)
    return {
        "micro": np.divide(2 * tp.sum(1), both, out=np.zeros_like(both), where=both > 0),
        "macro": each.mean(1),
        "weighted": np.divide((each * support).sum(1), weight, out=np.zeros_like(weight), where=weight > 0),
        "example": resamples.mean(np.divide(2 * row_tp, row_both, out=np.zeros(len(found)), where=row_both > 0)),
    }


def line_draws(texts, references, written, true, resamples, tokenizer="r2gen", drawn=None, bert=None):
    """
    One line of the table -> {metric: (M + 1,)}. written, true: label dicts of the texts and the references. drawn:
    (names, bool (N, C)): conditions that a phantom film shows, for the score against what was drawn. bert: texts,
    references -> (N,).
    """
    clean, clean_reference = pick_tokenizer(tokenizer, hypotheses=True), pick_tokenizer(tokenizer)
    ours, theirs = [clean(t) for t in texts], [[clean_reference(t)] for t in references]
    grams = NGrams(ours, theirs)
    bleu = bleu_from_counts(resamples.sums(grams.bleu_counts()))
    found = {f"bleu_{n + 1}": bleu[:, n] for n in range(4)}
    found |= {"rouge_l": resamples.mean(rouge_l(ours, theirs)), "cider": resamples.mean(grams.cider())}
    found["meteor_15"] = meteor_from_statistics(resamples.sums(best_meteor(ours, theirs)))
    if bert is not None:
        found["bertscore_f1"] = resamples.mean(bert(texts, references))
    h, r = positive_matrix(written), positive_matrix(true)
    for subset, names in SUBSETS.items():
        for kind, draws in f1_draws(h, r, resamples, [CONDITIONS.index(name) for name in names]).items():
            found[f"f1_{kind}_{subset}"] = draws
    if drawn is not None:
        names, shown = drawn
        told = positive_matrix([closed_upwards(labels) for labels in written])  # a film with edema shows an opacity
        told = told[:, [CONDITIONS.index(name) for name in names]]
        found["f1_micro_drawn"] = f1_draws(told, shown, resamples, list(range(len(names))))["micro"]
    return found


def score_lines(
    lines, references, written, true, groups=None, drawn=None, bert=None, tokenizer="r2gen", num_samples=1000
):
    """
    lines {name: N texts}, references N texts; written {name: N label dicts}, true N label dicts -> (table {name:
    {metric: {"value", "low", "high"}}}, draws {name: {metric: (M + 1,)}} for differences between lines). CIDEr's word
    weights are those of these references in every resample.
    """
    resamples = Resamples(len(references), groups, num_samples)
    draws = {name: line_draws(texts, references, written[name], true, resamples, tokenizer, drawn, bert)
             for name, texts in lines.items()}  # fmt: skip
    table = {name: {key: interval(value) for key, value in found.items()} for name, found in draws.items()}
    for name, texts in lines.items():
        table[name]["diversity"] = diversity(texts, references, tokenizer)
    return table, draws


def image_use(draws, key="f1_micro_13", line="model", others=("shuffled images", "blank images", "constant")):
    """-> ({other line: interval of the difference}, one sentence: do these numbers show that the films are used?)."""
    gains = {name: interval(draws[line][key] - draws[name][key]) for name in others if name in draws}
    lost = [name for name, gain in gains.items() if gain["low"] is None or gain["low"] <= 0]
    if not lost:
        return (
            gains,
            f"The model uses the films: its {key} lies above that with {', '.join(gains)}, each interval above 0.",
        )
    return gains, (
        f"These numbers do not show that the model uses the films: its {key} is not clearly above that of"
        f" {', '.join(lost)}."
    )


def consistency(logits, thresholds, written):
    """
    Does the label head say what the text says? logits (N, 14), thresholds (14,), written: labels read from the texts ->
    {condition: {"both", "head only", "text only", "neither", "agreement"}} of the 13 without No Finding, and "all".
    """
    head = 1 / (1 + np.exp(-logits)) > np.asarray(thresholds)
    text, found = positive_matrix(written), {}
    pairs = {"both": head & text, "head only": head & ~text, "text only": ~head & text, "neither": ~head & ~text}
    for name, columns in {**{c: [j] for j, c in enumerate(CONDITIONS) if j}, "all": list(range(1, 14))}.items():
        row = {kind: int(values[:, columns].sum()) for kind, values in pairs.items()}
        found[name] = row | {"agreement": (row["both"] + row["neither"]) / sum(row.values())}
    return found
