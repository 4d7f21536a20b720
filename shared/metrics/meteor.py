"""
METEOR 1.5 with its exact and stem matches, without Java and without its synonym and paraphrase tables.

    statistics = meteor_statistics(hypotheses, references)      # (N, 11) counts, one row per pair of texts
    meteor_from_statistics(statistics.sum(axis=0))              # the corpus score: counts are summed, scores are not
    averaged

Equal, pair by pair, to `meteor-1.5.jar -l en -norm -m 'exact stem' -w '1.0 0.6'` on every pair of IU X-ray reports
tried (six sets of 590, cleaned and as written). The tables that are left out raise the corpus score of the full tool by
0.005 to 0.007 there. Source: Denkowski and Lavie 2014, doi:10.3115/v1/W14-3348; its search and its word rules were
learnt from the tool's published source (github.com/cmu-mtlab/meteor, LGPL), written anew and checked against the tool.

An alignment pairs words one to one. The tool searches for the one with most exact matches, then fewest chunks (runs of
words in the same order in both texts), then the least distance, from left to right with a beam of 40 paths, and cannot
be replaced by an exact search without changing scores. Here the beams of all pairs advance together as rows of NumPy
arrays.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re

import numpy as np

from shared.metrics.stemmers import snowball_stem

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75  # `-t rank`, the default task
STEM_WEIGHT = 0.6
BEAM = 40
MOST_PARTNERS = 2**20  # entries of the table of possible matches of one batch; some arrays are 40 times that

# What the tool counts as a function word. Its rule is a relative frequency above 0.001 in news text; these are the
# words for which its own statistics (SCORE) said so, asked about 41,114 words and marks, among them every one in the IU
# X-ray reports.
FUNCTION_WORDS = frozenset(
    """
    a about after all also an and are as at be been but by can could first for from had has have he her his i if in into
    is it its last more new no not of on one or other out over people s said she so some than that the their there they
    this time to two up was we were what when which who will with would year years you 's 't " $ ' ( ) , - . : ?
    """.split()
)

COLUMNS = tuple(  # of the statistics
    "hypothesis_words reference_words hypothesis_function_words reference_function_words exact_content exact_function"
    " stem stem_function_hypothesis stem_function_reference matches chunks".split()
)

# ---------------------------------------------------------------------------------------------------------------- words

LETTER = "A-Za-zŠŽšžŸÀ-ÖØ-öø-ž"
DOT = "\ue000"  # stands for the dots of an ellipsis while other dots are looked at
STEPS = [
    (re.compile(rf"([^0-9{LETTER}\s.'`,\-‘’{DOT}])"), r" \1 "),  # marks stand alone ...
    (re.compile(r"([^0-9]),([^0-9])"), r"\1 , \2"),  # ... and commas, except inside a number
    (re.compile(r"([0-9]),([^0-9])"), r"\1 , \2"),
    (re.compile(r"([^0-9]),([0-9])"), r"\1 , \2"),
    (re.compile("[`‘’]"), "'"),
    (re.compile("[“”]|''"), ' " '),
    (re.compile("–|--"), "-"),
    (re.compile(rf"([0-9{LETTER}.])-([0-9{LETTER}])"), r"\1 \2"),  # "x-ray" is two words
    (re.compile(rf"([^{LETTER}])'([^{LETTER}])"), r"\1 ' \2"),
    (re.compile(rf"([^0-9{LETTER}])'([{LETTER}])"), r"\1 ' \2"),
    (re.compile(rf"([{LETTER}])'([^{LETTER}])"), r"\1 ' \2"),
    (re.compile(rf"([{LETTER}])'([{LETTER}])"), r"\1 '\2"),
    (re.compile(r"([0-9])'(s)"), r"\1 '\2"),
]
PLAIN = re.compile(r"[a-z0-9]+|\.|,")


def meteor_words(text):
    """
    A text as `-norm` cuts it: lower case, marks apart, no hyphens inside words. A full stop at the end of a word is cut
    off unless a word in lower case follows ("opacity. heart" keeps it), and the dots of "U.S." vanish. The tool also
    keeps the dot of some 140 abbreviations (Dr., a.m.) before capitals; that list is not used here.
    """
    words = text.split()
    if all(PLAIN.fullmatch(word) for word in words):
        return words  # cleaned reports, the usual case: nothing to do
    text = " " + re.sub(r"\.{2,}", lambda dots: f" {DOT * len(dots[0])} ", " ".join(words)) + " "
    for pattern, replacement in STEPS:
        text = pattern.sub(replacement, text)
    words = text.split()
    cut = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if len(word) > 1 and word.endswith("."):
            if "." in word[:-1] and re.search(f"[{LETTER}]", word):
                word = word.replace(".", "")
            elif not "a" <= following[:1] <= "z":
                cut += [word[:-1], "."]
                continue
        cut.append(word)
    return " ".join(cut).replace(DOT, ".").lower().split()


# ------------------------------------------------------------------------------------------------------------ alignment


def possible_matches(hypothesis, reference):
    """
    Lists of words -> for each reference word [(place in the hypothesis, exact?)], exact ones first, in order of place.
    A word whose only partner has no other partner is fixed: its entry is a tuple, not a list, of length 1.
    """
    places, stems, identical = {}, {}, hypothesis == reference
    for i, word in enumerate(hypothesis):
        places.setdefault(word, []).append(i)
        stems.setdefault(snowball_stem(word), []).append(i)
    found, partners = [], [0] * len(hypothesis)
    for word in reference:
        matches = [(i, True) for i in places.get(word, ())]
        if not identical:
            matches += [(i, False) for i in stems.get(snowball_stem(word), ()) if hypothesis[i] != word]
        for i, _ in matches:
            partners[i] += 1
        found.append(matches)
    return [tuple(m) if len(m) == 1 and partners[m[0][0]] == 1 else m for m in found]


def align(pairs, rows=64):
    """
    pairs: [(hypothesis words, reference words)] -> for each pair, arrays over the reference words: place of the partner
    in the hypothesis or -1, and whether it is the same word; and the number of chunks. `rows` pairs are searched
    together. A pair that the search cannot hold (a degenerate text: one word some hundred times) is aligned in order.
    """
    found = [possible_matches(*pair) for pair in pairs]
    width = [max((len(matches) for matches in sentence), default=0) for sentence in found]
    results = [None] * len(pairs)

    def search(batch):
        try:
            aligned = beam_search([found[i] for i in batch], max(len(pairs[i][0]) for i in batch))
        except OverflowError:
            if len(batch) > 1:
                search(batch[: len(batch) // 2])
                search(batch[len(batch) // 2 :])
                return
            aligned = [align_in_order(found[batch[0]])]
        for i, result in zip(batch, aligned, strict=True):
            results[i] = result

    # the widest and longest of a batch set its cost
    alike = sorted(range(len(pairs)), key=lambda i: (width[i], len(found[i])))
    for start in range(0, len(pairs), rows):
        search(alike[start : start + rows])
    return results


def align_in_order(sentence):
    """The alignment of one pair without a search: each reference word takes its first partner that is still free."""
    partner, same, taken = np.full(len(sentence), -1), np.zeros(len(sentence), dtype=bool), set()
    for exact in (True, False):
        for t, matches in enumerate(sentence):
            place = next((i for i, equal in matches if equal == exact and i not in taken), -1)
            if partner[t] < 0 <= place:
                partner[t], same[t] = place, exact
                taken.add(place)
    runs_on = (partner[1:] == partner[:-1] + 1) & (partner[:-1] >= 0)
    return partner, same, int((partner >= 0).sum() - runs_on.sum())


def beam_search(found, hypothesis_length):
    """
    The alignments of one batch; see `align`. B pairs, T reference words, K possible partners, P paths, W words of 64
    bits. A path is one number that sorts as the tool sorts: missing exact matches, chunks, distance, order of
    appearance; OverflowError where it does not fit into 62 bits, or a word has so many partners that memory would not.
    """
    batch, steps = len(found), max(len(sentence) for sentence in found)
    width = max((len(matches) for sentence in found for matches in sentence), default=0)
    if batch * steps * width > MOST_PARTNERS:
        raise OverflowError
    place = np.full((batch, steps, width), -1, dtype=np.int64)
    exact = np.zeros((batch, steps, width), dtype=bool)
    fixed = np.zeros((batch, steps), dtype=bool)
    for b, sentence in enumerate(found):
        for t, matches in enumerate(sentence):
            fixed[b, t] = isinstance(matches, tuple)
            if matches:
                place[b, t, : len(matches)], exact[b, t, : len(matches)] = zip(*matches, strict=True)
    number = (place >= 0).sum(axis=2).max(axis=0, initial=0)  # (T,) partners of the word that has most

    away = np.abs(place - np.arange(steps)[:, None]) * (place >= 0)
    order_bits, count_bits = (BEAM * (width + 1)).bit_length(), steps.bit_length()
    distance_bits = int(away.sum(axis=(1, 2)).max(initial=0)).bit_length()
    if order_bits + distance_bits + 2 * count_bits > 62:
        raise OverflowError
    one_distance, one_chunk = 1 << order_bits, 1 << order_bits + distance_bits
    one_missing, dead = one_chunk << count_bits, np.int64(1) << 62
    # What a match adds to its path: an exact one takes a missing one away; ordinary ones branch off, fixed ones are the
    # path.
    gain = -exact.astype(np.int64) * one_missing
    gain[fixed] += away[fixed] * one_distance
    branching_distance = away * one_distance
    bit = np.uint64(1) << (np.maximum(place, 0) & 63).astype(np.uint64)

    path = np.full((batch, 1), steps * one_missing, dtype=np.int64)
    last = np.full((batch, 1), -1, dtype=np.int64)  # place behind the last match, -1 after a word without partner
    used = np.zeros((batch, hypothesis_length // 64 + 1, 1), dtype=np.uint64)  # (B, W, P) words of the hypothesis taken
    every_row = np.arange(batch)[:, None]
    history = []
    for t in range(steps + 1):
        options, paths = (int(number[t]) if t < steps else 0) + 1, path.shape[1]
        alive = path < dead
        keys = np.empty((batch, options, paths), dtype=np.int64)
        path = path + (last >= 0) * one_chunk  # the open chunk ends, unless the next match continues it
        for k in range(options - 1):
            to = place[:, t, k, None]  # (B, 1)
            taken = used[:, 0] if used.shape[1] == 1 else used[every_row[:, 0], np.maximum(to[:, 0], 0) >> 6]
            free = alive & (to >= 0) & (taken & bit[:, t, k, None] == 0)
            branch = path - (last == to) * one_chunk + gain[:, t, k, None]
            keys[:, k] = np.where(free, branch, dead)
            # The tool adds the distance of each match it tries to the path it branches off from, not to the branch
            # itself: a branch carries the distances of its elder sisters, and the path that leaves the word alone those
            # of all.
            path = path + free * branching_distance[:, t, k, None]
        skips = alive & ~fixed[:, t, None] if t < steps else alive
        keys[:, -1] = np.where(skips, path, dead)
        keys = keys + (np.arange(paths) * options + np.arange(options)[:, None])  # order: path by path, matches first
        keys = keys.reshape(batch, options * paths)
        if keys.shape[1] > 4 * BEAM:
            keys = np.partition(keys, BEAM, axis=1)[:, :BEAM]
        keys = np.sort(keys, axis=1)[:, :BEAM]

        chosen = np.where(keys < dead, keys & (one_distance - 1), 0)
        parent, option = np.divmod(chosen, options)
        path = np.where(keys < dead, keys - chosen, dead)
        history.append((parent, np.where(option == options - 1, -1, option)))
        used = np.take_along_axis(used, parent[:, None, :], axis=2)
        last = np.full(path.shape, -1, dtype=np.int64)
        if options > 1:
            matched = option < options - 1
            option = np.where(matched, option, 0)
            to = place[every_row, t, option]
            last[matched] = to[matched] + 1
            for w in range(used.shape[1]):
                used[:, w] |= np.where(matched & (to >> 6 == w), bit[every_row, t, option], np.uint64(0))

    return trace_back(found, history, place, exact, path[:, 0] // one_chunk % (1 << count_bits))


def trace_back(found, history, place, exact, chunks):
    """Follow the best path of each pair from the end; the last round only closed the open chunk."""
    batch, steps, width = place.shape
    best, rows = np.zeros(batch, dtype=np.int64), np.arange(batch)
    partner, same = np.full((batch, steps), -1, dtype=np.int64), np.zeros((batch, steps), dtype=bool)
    for t in range(steps, -1, -1):
        parent, option = history[t]
        chosen = option[rows, best]
        if t < steps and width:
            partner[:, t] = np.where(chosen >= 0, place[rows, t, chosen], -1)
            same[:, t] = (chosen >= 0) & exact[rows, t, chosen]
        best = parent[rows, best]
    return [(partner[b, : len(sentence)], same[b, : len(sentence)], int(chunks[b])) for b, sentence in enumerate(found)]


# ----------------------------------------------------------------------------------------------------------- statistics


def meteor_statistics(hypotheses, references):
    """Strings (N), strings (N) -> int64 (N, 11), see COLUMNS. Equal pairs are aligned once."""
    words = {text: meteor_words(text) for text in {*hypotheses, *references}}
    function = {text: np.array([w in FUNCTION_WORDS for w in ws], dtype=bool) for text, ws in words.items()}
    pairs = list(dict.fromkeys(zip(hypotheses, references, strict=True)))
    rows = {}
    for pair, (partner, same, chunks) in zip(pairs, align([(words[h], words[r]) for h, r in pairs]), strict=True):
        h, r = function[pair[0]], function[pair[1]]
        matched = partner >= 0
        if len(h) == len(r) == matched.sum() and chunks == 1:
            chunks = 0  # a text matched as a whole is not fragmented
        stem = matched & ~same
        exact_function = int((same & r).sum())
        stem_function = int(h[partner[stem]].sum()), int((stem & r).sum())
        counts = len(h), len(r), h.sum(), r.sum(), same.sum() - exact_function, exact_function, stem.sum()
        rows[pair] = (*counts, *stem_function, matched.sum(), chunks)
    table = [rows[pair] for pair in zip(hypotheses, references, strict=True)]
    return np.array(table, dtype=np.int64).reshape(-1, len(COLUMNS))


def meteor_from_statistics(statistics):
    """(..., 11) counts -> (...) scores. No match, or no words, scores 0."""
    s = dict(zip(COLUMNS, np.moveaxis(np.asarray(statistics, dtype=np.float64), -1, 0), strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = []
        for side in ("hypothesis", "reference"):
            function = s[f"{side}_function_words"]
            length = DELTA * (s[f"{side}_words"] - function) + (1 - DELTA) * function
            stem_function = s[f"stem_function_{side}"]
            content, function = (
                s["exact_content"] + STEM_WEIGHT * (s["stem"] - stem_function),
                s["exact_function"] + STEM_WEIGHT * stem_function,
            )
            sides.append((DELTA * content + (1 - DELTA) * function) / length)
        precision, recall = sides
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        score = mean * (1 - GAMMA * (s["chunks"] / s["matches"]) ** BETA)
    return np.where(s["matches"] > 0, score, 0.0)
