"""
Scores of generated reports against reference reports, equal to the implementations that papers use. No network, no
Java, no weights.

    score_reports(hypotheses, references)                     # {"bleu_1": ..., ..., "meteor_15": ...} of the corpus
    score_reports(hypotheses, references, per_report=True)    # the same names, each an array (N,)
    score_reports(hypotheses, references, tokenizer="r2gen")  # both cleaned as R2Gen does before

Several conventions carry one name and differ by a factor of two. What each number here is:
    bleu_1 .. bleu_4    BLEU of pycocoevalcap: one corpus value, closest reference length, punctuation counts. Equal to
                        1e-9. Neither the mean over reports nor sacreBLEU.
    rouge_l             F of pycocoevalcap (beta 1.2), mean over reports; equal to 1e-9. Google's rouge_score is lower.
    cider               pycocoevalcap's "Cider" (clipped, Gaussian length penalty, times 10), document frequencies from
                        the references given: equal to 1e-9, and only comparable on the same references. One report
                        alone scores 0.
    meteor_15           METEOR 1.5 with exact and stem matches and function words, without its synonym and paraphrase
                        tables; see shared/metrics/meteor.py and, for the gap to the full Java tool, README.md. Counts
                        are summed over the corpus.
NLTK's METEOR (another formula, mean over reports) comes out about twice as high: never print the two under one name.

Tokens are what stands between whitespace, as in all of these packages: "clear." is another word than "clear", and case
counts except for METEOR. So pass texts that are cleaned alike, or name a tokenizer.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import re

import numpy as np

from shared.metrics.meteor import meteor_from_statistics, meteor_statistics

ORDERS = 4  # BLEU and CIDEr use n-grams of 1 to 4 words
METRICS = ("bleu", "rouge_l", "cider", "meteor_15")

# ------------------------------------------------------------------------------------------------------------- cleaning

DROPPED = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")  # ":-\[" is a range, by accident: : ; < = > ? @ [ go, the hyphen stays


def clean_r2gen(text):
    """
    A report as R2Gen cleans it before it is tokenised, trained on and scored, its accidents included, so that scores
    can be compared: lower case, sentences joined by " . ", list numbers and most punctuation gone. Empty sentences
    leave two spaces.
    """
    for _ in range(3):
        text = text.replace("..", ".")
    text = text.replace("1. ", "")  # also at the end of "T11. "
    for before in (". ", " "):
        for number in "2345":
            text = text.replace(f"{before}{number}. ", ". ")
    sentences = []
    for sentence in text.strip().lower().split(". "):
        for mark in "\"/\\'":
            sentence = sentence.replace(mark, "")
        sentences.append(DROPPED.sub("", sentence.strip()))
    return " . ".join(sentences) + " ."


# "r2gen": single spaces, as R2Gen's texts have after encoding and decoding; cleaned texts stay as they are.
TOKENIZERS = {"whitespace": str, "r2gen": lambda text: " ".join(clean_r2gen(text).split())}


def pick_tokenizer(tokenizer, hypotheses=False):
    """
    A name in TOKENIZERS, or a function string -> string -> the function. R2Gen's cleaning closes every text with a full
    stop. That is part of a reference; a hypothesis that is empty or was cut short has not written that word and is not
    paid for it: hypotheses=True leaves it out unless the text ends in one.
    """
    if callable(tokenizer):
        return tokenizer
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"there is no tokenizer '{tokenizer}'; there are {', '.join(TOKENIZERS)}")
    clean = TOKENIZERS[tokenizer]
    if tokenizer == "whitespace" or not hypotheses:
        return clean
    return lambda text: clean(text) if text.rstrip().endswith(".") else clean(text).removesuffix(".").rstrip()


def score_reports(hypotheses, references, tokenizer="whitespace", metrics=METRICS, per_report=False):
    """
    hypotheses: N strings; references: N strings, or N lists of strings. tokenizer: a name in TOKENIZERS, or a function
    string -> string. metrics: any of METRICS; "bleu" gives bleu_1 to bleu_4. -> dict of floats for the corpus, or of
    float64 arrays (N,) with per_report=True. ValueError for empty or unequal lists, and for a report without a
    reference. An empty hypothesis is scored like any other: it gets 0 and counts.
    """
    hypotheses, references = check_reports(hypotheses, references)
    unknown = set(metrics) - set(METRICS)
    if unknown or not metrics:
        named = ", ".join(sorted(unknown)) or "to compute"
        raise ValueError(f"there is no metric {named}; there are {', '.join(METRICS)}")
    clean, clean_reference = (functools.cache(pick_tokenizer(tokenizer, hypotheses=own)) for own in (True, False))
    hypotheses = [clean(text) for text in hypotheses]
    references = [[clean_reference(text) for text in group] for group in references]
    scores = {}
    if "bleu" in metrics or "cider" in metrics:
        grams = NGrams(hypotheses, references)
        if "bleu" in metrics:
            counts = grams.bleu_counts()
            values = bleu_from_counts(counts if per_report else counts.sum(axis=0))
            scores.update({f"bleu_{n + 1}": values[..., n] for n in range(ORDERS)})
        if "cider" in metrics:
            scores["cider"] = grams.cider()
    if "rouge_l" in metrics:
        scores["rouge_l"] = rouge_l(hypotheses, references)
    if "meteor_15" in metrics:
        statistics = best_meteor(hypotheses, references)
        scores["meteor_15"] = meteor_from_statistics(statistics if per_report else statistics.sum(axis=0))
    if per_report:
        return scores
    return {name: float(np.mean(values)) for name, values in scores.items()}


def check_reports(hypotheses, references):
    """-> list of strings, list of lists of strings; ValueError says what is wrong."""
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses and references must be lists of reports, not one string")
    hypotheses, references = list(hypotheses), list(references)
    if len(hypotheses) != len(references):
        raise ValueError(f"hypotheses and references differ in length: {len(hypotheses)} and {len(references)}")
    if not hypotheses:
        raise ValueError("there are no reports to score: hypotheses and references are empty")
    groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in references]
    for i, (hypothesis, group) in enumerate(zip(hypotheses, groups, strict=True)):
        if not group:
            raise ValueError(f"report {i} has no reference")
        wrong = [text for text in [hypothesis, *group] if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"report {i} holds {wrong[0]!r} where a string is needed; write an empty report as ''")
    return hypotheses, groups


def readable(text):
    """Without the lone surrogates of a broken decoding, on which the tokenizers of encoders fail."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------------------------------------- n-grams, BLEU and CIDEr


class NGrams:
    """
    The n-grams of all texts as integers, counted once for BLEU and CIDEr. A document is a hypothesis (number 0 to N-1)
    or a reference (N and up). For each order: `keys`, sorted, document * size + n-gram, and `counts`, how often it
    occurs there.
    """

    def __init__(self, hypotheses, references):
        self.n = len(hypotheses)
        self.group = np.repeat(np.arange(self.n), [len(group) for group in references])  # of each reference: its report
        documents = hypotheses + [text for group in references for text in group]
        vocabulary, coded, ids = {}, {}, []
        for text in documents:
            if text not in coded:
                coded[text] = [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]
            ids += coded[text]
        self.lengths = np.array([len(coded[text]) for text in documents])
        ids, document = np.array(ids, dtype=np.int64), np.repeat(np.arange(len(documents)), self.lengths)
        words_left = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(ids))  # in its document, with it
        grams, self.orders = ids, []
        for order in range(1, ORDERS + 1):
            here = np.flatnonzero(words_left >= order)
            if order > 1:  # a shorter n-gram and one more word
                codes = grams[here] * max(1, len(vocabulary)) + ids[here + order - 1]
                grams = np.zeros_like(ids)
                grams[here] = np.unique(codes, return_inverse=True)[1]
            size = int(grams[here].max(initial=0)) + 1
            keys, counts = np.unique(document[here] * size + grams[here], return_counts=True)
            self.orders.append((keys, counts, size))

    def split(self, keys, counts, size):
        """-> (keys, counts) of the hypotheses; (document, n-gram, counts) of the references."""
        border = np.searchsorted(keys, self.n * size)
        return (keys[:border], counts[:border]), (keys[border:] // size - self.n, keys[border:] % size, counts[border:])

    def bleu_counts(self):
        """-> (N, 10): per order the n-grams found in a reference (clipped), and all; words, best reference length."""
        table = np.zeros((self.n, 2 * ORDERS + 2))
        words, reference_words = self.lengths[: self.n], self.lengths[self.n :]
        for order, (keys, counts, size) in enumerate(self.orders):
            (keys, counts), (reference, gram, reference_counts) = self.split(keys, counts, size)
            clip = lookup(*highest(self.group[reference] * size + gram, reference_counts), keys)
            table[:, order] = np.bincount(keys // size, np.minimum(counts, clip), minlength=self.n)
            table[:, ORDERS + order] = np.maximum(words - order, 0)
        # closest reference length, the shorter of two equally close ones
        ranking = np.lexsort((reference_words, np.abs(reference_words - words[self.group]), self.group))
        first = np.unique(self.group[ranking], return_index=True)[1]
        table[:, -2], table[:, -1] = words, reference_words[ranking[first]]
        return table

    def cider(self, sigma=6.0):
        """-> (N,): tf-idf vectors of each order, clipped, times a Gaussian of the difference in bigrams."""
        num_references = len(self.group)
        similarity = np.zeros(num_references)
        bigrams = np.maximum(self.lengths - 1, 0)
        difference = bigrams[self.group] - bigrams[self.n :]
        for keys, counts, size in self.orders:
            (keys, counts), (reference, gram, reference_counts) = self.split(keys, counts, size)
            reports_with = np.bincount(np.unique(self.group[reference] * size + gram) % size, minlength=size)
            weight = np.log(float(self.n)) - np.log(np.maximum(1.0, reports_with))
            hypothesis_norm = np.sqrt(np.bincount(keys // size, (counts * weight[keys % size]) ** 2, minlength=self.n))
            reference_norm = np.sqrt(
                np.bincount(reference, (reference_counts * weight[gram]) ** 2, minlength=num_references)
            )
            common = np.minimum(lookup(keys, counts, self.group[reference] * size + gram), reference_counts)
            product = np.bincount(reference, common * reference_counts * weight[gram] ** 2, minlength=num_references)
            norms = hypothesis_norm[self.group] * reference_norm
            similarity += np.divide(product, norms, out=np.zeros(num_references), where=norms > 0)
        similarity *= 10 / ORDERS * np.exp(-(difference**2) / (2 * sigma**2))
        return np.bincount(self.group, similarity, minlength=self.n) / np.bincount(self.group, minlength=self.n)


def highest(keys, values):
    """-> sorted distinct keys, the largest value of each."""
    order = np.argsort(keys, kind="stable")
    keys, first = np.unique(keys[order], return_index=True)
    return keys, np.maximum.reduceat(values[order], first) if len(keys) else values


def lookup(keys, values, wanted):
    """Values at the wanted keys (keys sorted), 0 where there is none."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    spot = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[spot] == wanted, values[spot], 0)


def bleu_from_counts(counts):
    """(..., 10) of NGrams.bleu_counts, of reports or summed -> (..., 4). The small numbers are pycocoevalcap's."""
    correct, guessed = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (counts[..., -2:-1] + 1e-15) / (counts[..., -1:] + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


# -------------------------------------------------------------------------------------------------------------- ROUGE-L


def rouge_l(hypotheses, references, beta=1.2):
    """-> (N,). Best precision, best recall over the references, as pycocoevalcap has it; split(" "), not split()."""
    scores = np.zeros(len(hypotheses))
    for i, (hypothesis, group) in enumerate(zip(hypotheses, references, strict=True)):
        words = hypothesis.split(" ")
        where = {}
        for place, word in enumerate(words):
            where[word] = where.get(word, 0) | 1 << place
        others = [text.split(" ") for text in group]
        common = [(longest_common_subsequence(where, len(words), other), len(other)) for other in others]
        precision, recall = max(n for n, _ in common) / len(words), max(n / length for n, length in common)
        if precision > 0:
            scores[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


def longest_common_subsequence(where, length, words):
    """
    Length of the longest common subsequence of two texts; `where` holds, for each word of the first, its places as
    bits. One row of the usual table at a time, held as the bits where it grows (Hyyro 2004): a sum carries through all
    columns at once.
    """
    full = (1 << length) - 1
    row = full
    for word in words:
        places = where.get(word)
        if places:
            hit = row & places
            row = (row + hit | row - hit) & full
    return length - row.bit_count()


# --------------------------------------------------------------------------------------------------------------- METEOR


def best_meteor(hypotheses, references):
    """-> (N, 11) statistics of METEOR 1.5, of the best reference of each report (the first of equal ones)."""
    sizes = [len(group) for group in references]
    repeated = [text for text, size in zip(hypotheses, sizes, strict=True) for _ in range(size)]
    statistics = meteor_statistics(repeated, [text for group in references for text in group])
    scores = meteor_from_statistics(statistics)
    starts = np.cumsum(sizes) - sizes
    best = [start + int(np.argmax(scores[start : start + size])) for start, size in zip(starts, sizes, strict=True)]
    return statistics[best]
