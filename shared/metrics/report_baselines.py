"""
What every table of report scores needs beside the model: reports written without looking, numbers that show a collapse.

    best_constant(train, val_references)              one report for everybody, chosen on validation
    most_frequent(train)                              the mode of the training reports
    random_reports(train, n, seed)                    one training report each, drawn at random
    nearest_reports(train, train_vectors, vectors)    the report of the most similar training image
    oracle_reports(train, train_labels, labels)       the true labels in canned words: the best constant of the reports
                                                      with these labels
    baseline_reports(...)                             all of these, by name
    diversity(hypotheses, references)                 distinct reports and sentences, share of the most frequent,
                                                      self-BLEU, lengths

A model that does not beat the constant has learnt the style of the reports; one that writes few distinct reports has
collapsed, whatever its BLEU. The texts come from training reports; the constant is chosen with validation references;
none sees test reports.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from collections import Counter

import numpy as np

from shared.metrics.text import ORDERS, NGrams, bleu_from_counts, check_reports, pick_tokenizer


# fmt: off
def baseline_reports(train, val_references, n, seed=0, train_vectors=None, vectors=None, train_labels=None, labels=None,
                     tokenizer="whitespace"):
    # fmt: on
    """-> {name: n reports}; the nearest neighbour needs both vectors, the oracle train_labels and labels."""
    baselines = {
        "constant": [best_constant(train, val_references, tokenizer)] * n,
        "most frequent": [most_frequent(train)] * n,
        "random": random_reports(train, n, seed),
    }
    if vectors is not None:
        baselines["nearest neighbour"] = nearest_reports(train, train_vectors, vectors)
    if labels is not None:
        baselines["oracle labels, canned report"] = oracle_reports(train, train_labels, labels, tokenizer)
    for name, reports in baselines.items():
        if len(reports) != n:
            raise ValueError(f"the baseline '{name}' has {len(reports)} reports for {n} cases")
    return baselines


def best_constant(candidates, references, tokenizer="whitespace", metric="bleu_4"):
    """
    The candidate that scores best as the answer to every report of `references` (N strings or lists of strings, of
    validation). metric: bleu_1 to bleu_4. Of equally good ones the first. Every candidate is scored, in one pass over
    the references.
    """
    if metric not in [f"bleu_{order}" for order in range(1, ORDERS + 1)]:
        raise ValueError(f"a constant is chosen by bleu_1 to bleu_{ORDERS}, not by '{metric}'")
    clean, candidates = pick_tokenizer(tokenizer), list(dict.fromkeys(candidates))
    clean_candidate = pick_tokenizer(tokenizer, hypotheses=True)
    if not candidates:
        raise ValueError("there are no candidates to choose from")
    references = check_reports([""] * len(references), references)[1]
    groups = [[clean(text).split() for text in group] for group in references]
    # The j-th time that a candidate uses an n-gram counts in every report of which one reference has it j times or
    # more.
    reports_with = Counter()
    for group in groups:
        reports_with.update(set().union(*(numbered_grams(words) for words in group)))
    lengths = [sorted({len(words) for words in group}) for group in groups]
    scores, n = [], len(groups)
    for words in (clean_candidate(text).split() for text in candidates):
        counts = np.zeros(2 * ORDERS + 2)
        for key in numbered_grams(words):
            counts[len(key[0]) - 1] += reports_with[key]
        counts[ORDERS : 2 * ORDERS] = [n * max(0, len(words) - order) for order in range(ORDERS)]
        counts[-2:] = n * len(words), sum(min(group, key=lambda length: abs(length - len(words))) for group in lengths)
        scores.append(bleu_from_counts(counts)[int(metric[-1]) - 1])
    return candidates[int(np.argmax(scores))]


def numbered_grams(words):
    """{(n-gram, 1), (the same n-gram, 2), ...} for all orders."""
    orders = range(1, ORDERS + 1)
    counts = Counter(tuple(words[i : i + order]) for order in orders for i in range(len(words) - order + 1))
    return {(gram, j) for gram, count in counts.items() for j in range(1, count + 1)}


def most_frequent(reports):
    """The report that occurs most often; of equally frequent ones the first."""
    if not reports:
        raise ValueError("there are no reports to choose from")
    return Counter(reports).most_common(1)[0][0]


def random_reports(reports, n, seed=0):
    """n reports, each drawn with equal probability from all (with repetition): frequent reports come often."""
    if not reports:
        raise ValueError("there are no reports to choose from")
    return [reports[i] for i in np.random.default_rng(seed).integers(len(reports), size=n)]


def nearest_reports(reports, vectors, queries):
    """Reports (N), their vectors (N, D), queries (Q, D) -> Q reports, by cosine similarity; of equal ones the first."""
    vectors, queries = np.asarray(vectors, dtype=np.float32), np.asarray(queries, dtype=np.float32)
    (n, d), q = (vectors.shape, queries.shape) if vectors.ndim == queries.ndim == 2 else ((0, 0), (0, 0))
    if n != len(reports) or not n or d != q[1]:
        sizes = f"{len(reports)} reports, vectors {vectors.shape} and queries {queries.shape}"
        raise ValueError(f"{sizes} do not fit: need (N, D) and (Q, D)")
    length, query_length = np.linalg.norm(vectors, axis=1), np.linalg.norm(queries, axis=1)
    if not (np.isfinite(length).all() and np.isfinite(query_length).all() and length.all() and query_length.all()):
        raise ValueError("a vector is zero or not finite and has no neighbours")
    vectors = vectors / length[:, None]
    return [reports[int(np.argmax(vectors @ query))] for query in queries]


def oracle_reports(reports, train_labels, labels, tokenizer="whitespace"):
    """
    For each row of labels the canned report of the training reports with the very same labels: the one among them that
    answers all of them best (BLEU-4). Where none has them, that of the label set with the fewest differences (of
    several, the most frequent). Rows are sequences of comparable values. Give 0 and 1: with "negative" and "not
    mentioned" kept apart, labels tell how a report is worded, not what the image shows, and on IU X-ray BLEU-4 more
    than doubles.
    """
    if len(reports) != len(train_labels) or not len(reports):
        sizes = f"{len(reports)} reports and {len(train_labels)} rows of labels"
        raise ValueError(f"{sizes}: need one row for each report, and some")
    groups = {}
    for report, row in zip(reports, train_labels, strict=True):
        groups.setdefault(tuple(row), []).append(report)
    wanted = [tuple(row) for row in labels]
    if len({len(row) for row in [*groups, *wanted]}) > 1:
        raise ValueError("the rows of labels differ in length")
    by_size = sorted(groups, key=lambda row: -len(groups[row]))

    def nearest_to(row):
        return min(by_size, key=lambda other: sum(a != b for a, b in zip(row, other, strict=True)))

    nearest = {row: nearest_to(row) for row in set(wanted)}
    canned = {row: best_constant(groups[row], groups[row], tokenizer) for row in set(nearest.values())}
    return [canned[nearest[row]] for row in wanted]


# ----------------------------------------------------------------------------------------------- diversity and collapse


def diversity(hypotheses, references=None, tokenizer="whitespace"):
    """
    -> dict: n, distinct_reports, distinct_sentences (of `sentences`), share_most_frequent (of the n reports), words
    (mean per report), self_bleu (mean BLEU-4 of each report against all others: 1 when all are equal, None for one
    report), and with references length_ratio (words, against the closest reference) and reference_distinct_reports (of
    the first references).
    """
    groups = check_reports(hypotheses, [""] * len(hypotheses) if references is None else references)[1]
    clean = pick_tokenizer(tokenizer, hypotheses=True)
    hypotheses = [clean(text) for text in hypotheses]
    sentences = [part for text in hypotheses for part in re.split(r"\s*\.(?:\s+|$)", text.strip()) if part.strip()]
    words = sum(len(text.split()) for text in hypotheses)
    found = {
        "n": len(hypotheses),
        "distinct_reports": len(set(hypotheses)),
        "sentences": len(sentences),
        "distinct_sentences": len(set(sentences)),
        "share_most_frequent": max(Counter(hypotheses).values()) / len(hypotheses),
        "words": words / len(hypotheses),
        "self_bleu": self_bleu(hypotheses),
    }
    if references is not None:
        clean = pick_tokenizer(tokenizer)
        groups = [[clean(text) for text in group] for group in groups]
        closest = NGrams(hypotheses, groups).bleu_counts()[:, -1].sum()
        found["length_ratio"] = float(words / closest) if closest else None
        found["reference_distinct_reports"] = len({group[0] for group in groups})
    return found


def self_bleu(hypotheses):
    """Mean BLEU-4 of the reports with all other reports as references (Zhu et al. 2018); None for one report."""
    n = len(hypotheses)
    if n < 2:
        return None
    grams = NGrams(hypotheses, [[]] * n)
    table = np.zeros((n, 2 * ORDERS + 2))
    for order, (keys, counts, size) in enumerate(grams.orders):
        # The others' highest count of an n-gram is the highest of all; for the report that holds it, the second
        # highest.
        ranking = np.lexsort((-counts, keys % size))
        gram, ranked = keys[ranking] % size, counts[ranking]
        start = np.flatnonzero(np.r_[True, gram[1:] != gram[:-1]]) if len(gram) else np.zeros(0, dtype=int)
        clip = np.repeat(ranked[start], np.diff(np.r_[start, len(gram)]))
        same_as_next = np.r_[gram[1:] == gram[:-1], False]
        clip[start] = np.where(same_as_next[start], ranked[np.minimum(start + 1, len(gram) - 1)], 0)
        table[:, order] = np.bincount(keys[ranking] // size, np.minimum(ranked, clip), minlength=n)
        table[:, ORDERS + order] = np.maximum(grams.lengths - order, 0)
    lengths = np.unique(grams.lengths)
    repeated = np.bincount(grams.lengths)
    table[:, -2] = grams.lengths
    for i, length in enumerate(grams.lengths):
        others = lengths if repeated[length] > 1 else lengths[lengths != length]
        table[i, -1] = others[np.argmin(np.abs(others - length))]
    return float(bleu_from_counts(table)[:, -1].mean())
