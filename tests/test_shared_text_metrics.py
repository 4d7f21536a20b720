"""
Report scores against hand-worked cases, stored values of the reference tools, and the tools themselves where they are
installed.

Random texts over a few words are the hard case for every matcher: they repeat words, share stems, and have many equal
alignments.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shared.data.iu_xray import load_iu_xray
from shared.metrics.meteor import (
    FUNCTION_WORDS,
    align,
    align_in_order,
    meteor_from_statistics,
    meteor_statistics,
    meteor_words,
)
from shared.metrics.report_baselines import best_constant, diversity, most_frequent, random_reports
from shared.metrics.stemmers import snowball_stem
from shared.metrics.text import METRICS, TOKENIZERS, bleu_from_counts, clean_r2gen
from shared.metrics.text import score_reports

WORDS = (
    "the the the . . no is are lung lungs effusion effusions pleural normal clear clearly enlarged enlargement heart"
    " and of , 12 x-ray it's".split()
)
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor_15")


def random_texts(n, seed, longest=25, shortest=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, longest + 1))) for _ in range(n)]


def random_pairs(n, seed, max_references=3):
    rng = np.random.default_rng(seed + 1000)
    return random_texts(n, seed), [
        random_texts(rng.integers(1, max_references + 1), seed + 1 + i, shortest=1) for i in range(n)
    ]


def r2gen_vocabulary(train_reports, min_count=3):
    """-> set of the words that occur at least min_count times in the cleaned training reports (IU X-ray: 759)."""
    counts = Counter(word for text in train_reports for word in clean_r2gen(text).split())
    return {word for word, count in counts.items() if count >= min_count}


def r2gen_reference(text, vocabulary, max_ids=60):
    """
    A report as R2Gen scores against it: cleaned, cut to max_ids ids of which the first is the start sign (so 59 words),
    words outside the vocabulary as <unk>.
    """
    return " ".join(word if word in vocabulary else "<unk>" for word in clean_r2gen(text).split()[: max_ids - 1])


def java_folder():
    """The folder of meteor-1.5.jar; skips without pycocoevalcap or Java."""
    package = pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    return Path(list(package.__path__)[0]) / "meteor"


def java_meteor(hypotheses, references, full=False):
    """
    Strings, strings -> (N, 23) statistics, scores (N,), corpus score of the Java tool; full: with synonyms and
    paraphrases.
    """
    command = ["java", "-Xmx1G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    command += [] if full else ["-m", "exact stem", "-w", "1.0 0.6"]

    def ask(lines):
        return subprocess.run(
            command, input="\n".join(lines) + "\n", text=True, capture_output=True, cwd=java_folder(), check=True
        ).stdout.splitlines()

    lines = ask([f"SCORE ||| {r} ||| {h}" for h, r in zip(hypotheses, references, strict=True)])
    scores = [float(line) for line in ask(["EVAL ||| " + " ||| ".join(lines)])]
    return np.array([line.split() for line in lines], dtype=float), np.array(scores[:-1]), scores[-1]


@pytest.fixture(scope="module")
def iu():
    """Cleaned findings of the R2Gen split, and the references as R2Gen cuts them."""
    folder = os.environ.get("MEDVLM_DATA")
    if not folder or not (Path(folder) / "iu_xray").is_dir():
        pytest.skip("needs the real data: set MEDVLM_DATA to the folder that holds iu_xray")
    studies = load_iu_xray(folder, section="findings", split="r2gen", views=(), allow_missing_images=True)
    raw = {split: [row["report"] for row in studies.split(split)] for split in ("train", "val", "test")}
    vocabulary = r2gen_vocabulary(raw["train"])
    cut = {split: [r2gen_reference(text, vocabulary) for text in texts] for split, texts in raw.items()}
    return {
        "raw": raw,
        "clean": {split: [clean_r2gen(t) for t in texts] for split, texts in raw.items()},
        "cut": cut,
        "vocabulary": vocabulary,
    }


@pytest.fixture
def fixtures(real_data):
    return json.loads(real_data("text_metric_fixtures.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- worked by hand


def test_bleu_by_hand():
    # "a b c d" against "a b d": 3 of 4 words, "a b" of 3 pairs, nothing longer; no brevity penalty
    scores = score_reports(["a b c d"], ["a b d"], metrics=("bleu",))
    assert scores["bleu_1"] == pytest.approx(3 / 4, abs=1e-9) and scores["bleu_2"] == pytest.approx(
        (3 / 4 * 1 / 3) ** 0.5, abs=1e-9
    )
    assert scores["bleu_3"] < 1e-4 and scores["bleu_4"] < 1e-3
    # two words against four: penalty exp(1 - 4/2)
    assert score_reports(["a b"], ["a b c d"], metrics=("bleu",))["bleu_1"] == pytest.approx(np.exp(-1), abs=1e-8)
    # a repeated word counts as often as the reference that has it most often, not more: 2 of 3; the closest length is 3
    assert score_reports(["a a a"], [["a x y", "a a"]], metrics=("bleu",))["bleu_1"] == pytest.approx(2 / 3, abs=1e-9)
    # of lengths 1 and 3, equally far from 2, the shorter counts: no penalty
    assert score_reports(["a b"], [["a b c", "b"]], metrics=("bleu",))["bleu_1"] == pytest.approx(1, abs=1e-8)


def test_bleu_sums_counts_over_the_corpus():
    # 1 of 1 and 1 of 4 words: 2/5, not the mean of 1 and 1/4
    assert score_reports(["a", "a b c d"], ["a", "a x y z"], metrics=("bleu",))["bleu_1"] == pytest.approx(
        2 / 5, abs=1e-9
    )


def test_rouge_l_by_hand():
    # longest common subsequence of "a b c d" and "a c x": "a c"; P = 2/4, R = 2/3, F = 2.44 P R / (R + 1.44 P)
    assert score_reports(["a b c d"], ["a c x"], metrics=("rouge_l",))["rouge_l"] == pytest.approx(
        2.44 * (1 / 3) / (2 / 3 + 1.44 / 2)
    )
    # best precision and best recall come from different references: 2/2 of the first, 1/1 of the second
    assert score_reports(["a b"], [["a b c d", "b"]], metrics=("rouge_l",))["rouge_l"] == pytest.approx(1)
    assert score_reports(["b a"], ["a b"], metrics=("rouge_l",))["rouge_l"] == pytest.approx(0.5)  # order matters


def test_cider_by_hand():
    # Two reports, each equal to its reference; "a" is in both references and weighs 0, "b" and "c" weigh log 2. Orders
    # 1 and 2 agree fully, orders 3 and 4 do not exist: 10 * (1 + 1 + 0 + 0) / 4
    scores = score_reports(["a b", "a c"], ["a b", "a c"], metrics=("cider",), per_report=True)["cider"]
    assert scores == pytest.approx([5, 5])
    # three bigrams too many: exp(-9 / 72); words: clipped "b" once, vectors (2 log 2) and (log 2): 1/2; no pair in
    # common
    assert score_reports(["b b b b b", "a c"], ["a b", "a c"], metrics=("cider",), per_report=True)["cider"][
        0
    ] == pytest.approx(10 / 4 * (1 / 5) * np.exp(-9 / 72))
    assert score_reports(["a b"], ["a b"], metrics=("cider",))["cider"] == 0  # one report alone


def test_meteor_by_hand():
    # lungs, clear match as content words, are and the full stop as function words; "the" and "bilaterally" are left
    # over
    precision = (0.75 * 2 + 0.25 * 2) / (0.75 * 2 + 0.25 * 3)
    recall = (0.75 * 2 + 0.25 * 2) / (0.75 * 3 + 0.25 * 2)
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    expected = mean * (1 - 0.6 * (2 / 4) ** 0.2)  # two chunks, four matches
    assert expected == pytest.approx(0.3571361959, abs=1e-10)
    assert score_reports(["the lungs are clear ."], ["lungs are clear bilaterally ."])["meteor_15"] == pytest.approx(
        expected, abs=1e-12
    )


def test_meteor_stems_count_six_tenths():
    # one word, equal stem: P = R = 0.6, and nothing is fragmented
    assert score_reports(["effusions"], ["effusion"])["meteor_15"] == pytest.approx(0.6, abs=1e-12)


def test_meteor_sums_counts_over_the_corpus():
    hypotheses, references = (
        ["the lungs are clear .", "no effusion ."],
        ["lungs are clear bilaterally .", "there is no effusion ."],
    )
    statistics = meteor_statistics(hypotheses, references)
    scores = score_reports(hypotheses, references, metrics=("meteor_15",))
    assert scores["meteor_15"] == float(meteor_from_statistics(statistics.sum(axis=0)))
    assert scores["meteor_15"] != pytest.approx(meteor_from_statistics(statistics).mean(), abs=1e-3)


def test_alignment_prefers_matches_then_few_chunks():
    hypothesis, reference = "no effusion . no pneumothorax .".split(), "no pneumothorax . no effusion .".split()
    partner, same, chunks = align([(hypothesis, reference)])[0]
    assert partner.tolist() == [3, 4, 5, 0, 1, 2] and same.all() and chunks == 2
    partner, same, chunks = align([("lungs clear".split(), "clear lung opacity".split())])[0]
    assert partner.tolist() == [1, 0, -1] and same.tolist() == [True, False, False] and chunks == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the lungs are clear .", "the lungs are clear ."),
        ("Chest X-ray, PA view.", "chest x ray , pa view ."),
        ("1,000 mL; heart (normal)", "1,000 ml ; heart ( normal )"),
        ("patient's U.S. exam", "patient 's us exam"),
        ("clear. heart", "clear. heart"),  # the tool takes it for an abbreviation
        ("clear. Heart", "clear . heart"),
        ("wait... what", "wait ... what"),
        ("  spaced   out ", "spaced out"),
        ("", ""),
    ],
)
def test_meteor_words(text, words):
    assert meteor_words(text) == words.split()


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.mark.realdata
def test_fixtures(fixtures):
    hypotheses, references = [p["hyp"] for p in fixtures["pairs"]], [p["refs"] for p in fixtures["pairs"]]
    corpus, single = score_reports(hypotheses, references), score_reports(hypotheses, references, per_report=True)
    for order in range(4):
        assert corpus[f"bleu_{order + 1}"] == pytest.approx(fixtures["corpus"]["bleu"][order], abs=1e-9)
        assert single[f"bleu_{order + 1}"] == pytest.approx(fixtures["per_sample"]["bleu"][order], abs=1e-9)
    for name in ("rouge_l", "cider"):
        assert corpus[name] == pytest.approx(fixtures["corpus"][name], abs=1e-9)
        assert single[name] == pytest.approx(fixtures["per_sample"][name], abs=1e-9)
    # the full METEOR; in the third pair alone its tables change the alignment
    gap = single["meteor_15"] - fixtures["per_sample"]["meteor"]
    assert np.abs(np.delete(gap, 2)).max() < 1e-12 and 0.02 < gap[2] < 0.04
    assert abs(corpus["meteor_15"] - fixtures["corpus"]["meteor"]) < 0.004


# --------------------------------------------------------------------------------------------------- reference packages


@pytest.mark.parity
def test_equals_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = random_pairs(300, seed=0)
    hypotheses += ["", " ", "two  spaces", "one"]
    references += [["a"], ["b c"], ["two  spaces here", "two spaces"], ["one"]]
    wanted = dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}
    corpus, single = score_reports(hypotheses, references), score_reports(hypotheses, references, per_report=True)
    score, scores = Bleu(4).compute_score(*wanted, verbose=0)
    for order in range(4):
        assert corpus[f"bleu_{order + 1}"] == pytest.approx(score[order], abs=1e-9)
        assert single[f"bleu_{order + 1}"] == pytest.approx(scores[order], abs=1e-9)
    for name, reference in (("rouge_l", Rouge()), ("cider", Cider())):
        score, scores = reference.compute_score(*wanted)
        assert corpus[name] == pytest.approx(score, abs=1e-9) and single[name] == pytest.approx(scores, abs=1e-9)


ENDINGS = (
    "s es ed ing ly ness ful fulness fulli ation ational ator ization izer alism iviti biliti iveness ousness ement"
    " ment ent ence ance able ible al alli entli ousli eed eedly ies ied y ey e ll ss us ous ive ate icate ical iciti"
    " alize ative sses ion sion tion er est ogi ogy ology 's s' '".split()
)
STARTS = (
    "lung opaci effus consolid cardiomeg pneumothora gener commun arsen dy ly ti sk s feed agre plast motor conflat hop"
    " hopp fall fil fail univers divers a ab yes say by radi log valu oper rate electr hesit digi caller beaut herr inn"
    " proce exce succe early on id ug singl gent new atla bia ande how ow ax tax".split()
)


@pytest.mark.parity
def test_the_stemmer_equals_nltks():
    stem = pytest.importorskip("nltk.stem")
    words = {start + end for start in STARTS for end in ["", *ENDINGS]}
    words |= set("y yy x skies sky innings toy dying ties news".split())
    snowball = stem.snowball.EnglishStemmer()
    # NLTK's Snowball keeps an e after -izer and -ization that the published rules, and METEOR's own Snowball (below),
    # take off
    differing = {w for w in words if snowball_stem(w) != snowball.stem(w)}
    assert len(words) > 3000 and all(w.endswith(("izer", "ization")) for w in differing), differing


@pytest.mark.parity
@pytest.mark.slow
def test_equals_the_java_tool_with_exact_and_stem_matches():
    hypotheses, references = random_texts(150, seed=2, longest=40), random_texts(150, seed=3, longest=40, shortest=1)
    hypotheses[:5] = ["lung", "clearly enlarged", "the " * 50, "It's the patient's X-ray, (1.5 cm).", "no " * 80]
    references[:5] = ["lungs", "clear enlargement", "the lung the heart the", "it's an x ray ; 1.5 cm", "no the " * 40]
    statistics, scores, corpus = java_meteor(hypotheses, references)
    ours = meteor_statistics(hypotheses, references)
    assert np.array_equal(ours[:, :4], statistics[:, :4]) and np.array_equal(ours[:, 9], statistics[:, 21])
    assert np.abs(meteor_from_statistics(ours) - scores).max() < 1e-12
    assert abs(float(meteor_from_statistics(ours.sum(axis=0))) - corpus) < 1e-12


@pytest.mark.parity
@pytest.mark.realdata
@pytest.mark.slow
def test_equals_the_java_tool_on_real_reports(iu):
    for kind in ("clean", "raw"):
        hypotheses, references = random_reports(iu[kind]["train"], 590), iu[kind]["test"]
        _, scores, corpus = java_meteor(hypotheses, references)
        ours = score_reports(hypotheses, references, metrics=("meteor_15",), per_report=True)["meteor_15"]
        assert np.abs(ours - scores).max() < 1e-12
        assert abs(score_reports(hypotheses, references, metrics=("meteor_15",))["meteor_15"] - corpus) < 1e-12


@pytest.mark.parity
@pytest.mark.realdata
@pytest.mark.slow
def test_stems_and_function_words_of_every_word_in_the_reports(iu):
    words = sorted({w for texts in iu["raw"].values() for text in texts for w in meteor_words(text)} | FUNCTION_WORDS)
    folder = java_folder()
    stems = subprocess.run(
        ["java", "-cp", "meteor-1.5.jar", "Stemmer", "en"],
        input="\n".join(words) + "\n",
        text=True,
        capture_output=True,
        cwd=folder,
        check=True,
    ).stdout.splitlines()
    assert len(words) > 1500 and {w: snowball_stem(w) for w in words} == dict(zip(words, stems, strict=True))
    whole = [w for w in words if meteor_words(w) == [w]]
    statistics, _, _ = java_meteor(whole, ["zzz"] * len(whole))
    assert {w for w, row in zip(whole, statistics, strict=True) if row[2] == 1} == {
        w for w in whole if w in FUNCTION_WORDS
    }


# --------------------------------------------------------------------------------------------- the constant of IU X-ray

# sha256 of the cleaned training report whose scores stand in the literature notes of this project (the text may not be
# copied)
KNOWN_CONSTANT = "88159368f87972790df776ce383a2ff1156de70b8ca92bdaf62790177d138314"


@pytest.mark.realdata
def test_r2gen_references(iu):
    assert len(iu["vocabulary"]) == 759
    assert max(len(text.split()) for text in iu["cut"]["test"]) == 59
    assert sum("<unk>" in text for text in iu["cut"]["test"]) > 50


@pytest.mark.realdata
def test_constant_reports_on_the_r2gen_test_split(iu):
    train, test = iu["clean"]["train"], iu["cut"]["test"]
    constant = next(text for text in train if hashlib.sha256(text.encode()).hexdigest() == KNOWN_CONSTANT)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
    scores = score_reports([constant] * len(test), test)
    assert [round(scores[name], 3) for name in names] == [0.490, 0.318, 0.216, 0.149, 0.356, 0.251]
    assert -0.006 < scores["meteor_15"] - 0.206 < -0.004
    scores = score_reports([constant] * len(test), iu["clean"]["test"])  # references that are not cut
    assert [round(scores[name], 3) for name in names] == [0.493, 0.321, 0.218, 0.151, 0.356, 0.247]
    scores = score_reports([most_frequent(train)] * len(test), test)
    # the middle two lie within 0.0005 of the stored, rounded ones
    assert [scores[name] for name in names] == pytest.approx([0.242, 0.147, 0.106, 0.081, 0.312, 0.344], abs=6e-4)
    scores = score_reports(random_reports(train, len(test)), test)
    assert [scores[name] for name in names] == pytest.approx(
        [0.358, 0.202, 0.126, 0.083, 0.292, 0.159], abs=0.015
    )  # other draws


@pytest.mark.realdata
def test_the_best_constant_of_all_training_reports(iu):
    train, val, test = iu["clean"]["train"], iu["cut"]["val"], iu["cut"]["test"]
    known = next(text for text in train if hashlib.sha256(text.encode()).hexdigest() == KNOWN_CONSTANT)
    best = best_constant(train, val)
    on_val = [score_reports([text] * len(val), val, metrics=("bleu",))["bleu_4"] for text in (best, known)]
    assert on_val[0] > on_val[1] + 0.01
    scores = score_reports([best] * len(test), test)
    assert [round(scores[name], 3) for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")] == [
        0.500,
        0.338,
        0.240,
        0.172,
        0.363,
        0.285,
    ]


# ----------------------------------------------------------------------------------------------------------- properties


def test_identical_reports():
    texts = [text for text in random_texts(40, seed=4, shortest=6)]
    scores = score_reports(texts, texts)
    assert all(scores[f"bleu_{n}"] == pytest.approx(1, abs=1e-8) for n in (1, 2, 3, 4))
    assert (
        scores["rouge_l"] == pytest.approx(1)
        and scores["cider"] == pytest.approx(10)
        and scores["meteor_15"] == pytest.approx(1)
    )


def test_the_order_of_reports_changes_nothing():
    hypotheses, references = random_pairs(60, seed=5)
    corpus, single = score_reports(hypotheses, references), score_reports(hypotheses, references, per_report=True)
    order = np.random.default_rng(0).permutation(60)
    shuffled = [hypotheses[i] for i in order], [references[i] for i in order]
    assert score_reports(*shuffled) == pytest.approx(corpus, abs=1e-12)
    again = score_reports(*shuffled, per_report=True)
    assert all(again[name] == pytest.approx(single[name][order], abs=1e-12) for name in NAMES)


def test_a_report_is_scored_alike_alone_and_in_company():  # all but CIDEr, whose weights come from the company
    hypotheses, references = random_pairs(80, seed=6)
    together = score_reports(hypotheses, references, per_report=True)
    for i in (0, 7, 33):
        alone = score_reports([hypotheses[i]], [references[i]], per_report=True)
        assert all(alone[name][0] == pytest.approx(together[name][i], abs=1e-12) for name in NAMES if name != "cider")


def test_another_reference_never_lowers_rouge_or_meteor():
    hypotheses, references = random_pairs(50, seed=7, max_references=1)
    more = [group + [extra] for group, extra in zip(references, random_texts(50, seed=8, shortest=1), strict=True)]
    names = ("rouge_l", "meteor_15")
    before, after = (score_reports(hypotheses, r, metrics=names, per_report=True) for r in (references, more))
    assert all((after[name] >= before[name] - 1e-12).all() for name in names)


def test_scores_lie_in_their_range_and_are_plain_numbers():
    corpus = score_reports(*random_pairs(50, seed=9))
    assert tuple(corpus) == ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l", "meteor_15")
    assert all(type(value) is float and 0 <= value <= (10 if name == "cider" else 1) for name, value in corpus.items())
    json.dumps(corpus)


def test_strings_and_lists_of_one_string_are_the_same():
    hypotheses, references = random_pairs(20, seed=10, max_references=1)
    assert score_reports(hypotheses, references) == score_reports(hypotheses, [group[0] for group in references])


def test_tokenizers():
    scores = score_reports(["Lungs are clear. No effusion."], ["lungs are clear . no effusion ."], tokenizer="r2gen")
    assert scores["bleu_4"] == pytest.approx(1, abs=1e-8) and scores["rouge_l"] == 1
    once = clean_r2gen("Clear. No.")
    assert (
        clean_r2gen(once) != once == TOKENIZERS["r2gen"](once)
    )  # cleaning twice leaves two spaces, the tokenizer does not
    assert score_reports(["Lungs are clear. No effusion."], ["lungs are clear . no effusion ."])["bleu_1"] < 0.5
    assert score_reports(["A"], ["a"], tokenizer=str.lower)["bleu_1"] == pytest.approx(1)


def test_r2gen_pays_no_full_stop_that_was_not_written():
    references = ["The heart is normal. No effusion.", "Clear lungs"]
    for empty in ("", "  \n"):
        scores = score_reports([empty] * 2, references, tokenizer="r2gen")
        assert scores["rouge_l"] == scores["meteor_15"] == scores["cider"] == 0 and scores["bleu_1"] < 1e-9
    cut = "the heart is"  # three words of seven and nothing else
    scores = score_reports([cut], ["The heart is normal. Clear."], tokenizer="r2gen")
    assert scores == score_reports([cut], ["the heart is normal . clear ."])
    assert scores["bleu_1"] == pytest.approx(np.exp(1 - 7 / 3), abs=1e-6)
    assert score_reports(["Clear lungs."], references[1:], tokenizer="r2gen")["rouge_l"] == 1  # a reference is closed
    found = diversity(["", "clear", "Clear."], tokenizer="r2gen")
    assert (found["words"], found["distinct_reports"], found["distinct_sentences"]) == (1, 3, 1)


def test_r2gen_reference_is_cut_and_unknown_words_are_marked():
    vocabulary = r2gen_vocabulary(["Lungs clear. Heart normal."] * 3 + ["Rare."] * 2)
    assert vocabulary == {"lungs", "clear", "heart", "normal", "."}
    assert r2gen_reference("Lungs clear. Rare heart.", vocabulary) == "lungs clear . <unk> heart ."
    assert len(r2gen_reference("lungs " * 100, vocabulary).split()) == 59


def test_small_counts_of_bleu():
    assert bleu_from_counts(np.array([0, 0, 0, 0, 0, 0, 0, 0, 0.0, 5])).tolist() == pytest.approx([0, 0, 0, 0])


# ----------------------------------------------------------------------------------------------------- degenerate input


def test_an_empty_hypothesis_scores_nothing_and_counts():
    single = score_reports(
        ["", "  ", "there is no effusion ."], ["no effusion .", "a", "there is no effusion ."], per_report=True
    )
    assert all(np.abs(single[name][:2]).max() < 1e-6 and single[name][2] > 0.5 for name in NAMES)
    corpus = score_reports(["", "no effusion ."], ["no effusion .", "no effusion ."])
    assert corpus["rouge_l"] == 0.5 and 0 < corpus["bleu_1"] < 0.5  # the missing words cost a brevity penalty
    everything_empty = score_reports([""] * 3, ["a b"] * 3)
    assert all(value < 1e-6 for value in everything_empty.values())


def test_an_empty_reference_is_no_match():
    single = score_reports(["a b", ""], ["", ""], per_report=True)
    assert all(np.isfinite(values).all() for values in single.values()) and single["meteor_15"].max() == 0


def test_a_degenerate_repetition_is_scored():
    scores = score_reports(
        ["the " * 1000, "no effusion"], ["the lungs are clear . the heart is normal .", "no effusion"]
    )
    assert 0 < scores["meteor_15"] < 1 and scores["bleu_1"] < 0.1


def test_one_odd_report_does_not_end_the_scoring_of_all():
    hypotheses, references = random_pairs(80, seed=11, max_references=1)
    single = score_reports(hypotheses, references, per_report=True)
    odd = ["the " * 900, "the " * 20_000, "x" * 100_000, "\ud800 \x00 \u200b", "\n", "the no " * 700]
    targets = ["the " * 901, "the lungs are clear .", "y", "no .", ". . .", "no the " * 800]
    both = score_reports([*hypotheses, *odd], [*references, *targets], per_report=True)
    for name in NAMES:
        assert np.isfinite(both[name]).all() and both[name].max() <= (10 if name == "cider" else 1 + 1e-9)
        assert name == "cider" or (both[name][:80] == single[name]).all()
    # aligned in order, the search being too large: the first 900 words as one run
    recall = 900 / 901
    expected = recall / (0.85 + 0.15 * recall) * (1 - 0.6 * (1 / 900) ** 0.2)
    assert both["meteor_15"][80] == pytest.approx(expected, abs=1e-12)
    assert align_in_order([[(0, True), (2, True)], [(0, True), (1, False), (2, True)], [(1, False)], []])[2] == 3


@pytest.mark.parametrize(
    ("hypotheses", "references", "sentence"),
    [
        ([], [], "empty"),
        (["a"], ["a", "b"], "differ in length: 1 and 2"),
        ("a report", ["a report"], "not one string"),
        (["a"], [[]], "report 0 has no reference"),
        (["a", None], ["a", "b"], "report 1 holds None"),
        (["a"], [float("nan")], "report 0"),
        (["a"], [["a", 3]], "report 0 holds 3"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(hypotheses, references, sentence):
    with pytest.raises(ValueError, match=sentence):
        score_reports(hypotheses, references)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no tokenizer 'ptb'; there are whitespace, r2gen"):
        score_reports(["a"], ["a"], tokenizer="ptb")
    with pytest.raises(ValueError, match="no metric spice"):
        score_reports(["a"], ["a"], metrics=("bleu", "spice"))
    assert METRICS == ("bleu", "rouge_l", "cider", "meteor_15")
