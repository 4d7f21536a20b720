"""
The Snowball stemmer "English" (Porter2) that METEOR 1.5 uses, written from its published description: the metrics must
run without NLTK, whose version differs in words such as "localizer".

    snowball_stem("effusions") -> "effus"     one word, in lower case

Source: snowballstem.org/algorithms/english/stemmer.html. Tests compare it with NLTK, and with the Snowball inside the
METEOR tool over every word of the IU X-ray reports.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import re


def pairs(text):
    """ "a:b c:d" -> {"a": "b", "c": "d"}"""
    return dict(entry.split(":") for entry in text.split())


VOWELS = "aeiouy"
DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
SNOWBALL_WORDS = pairs(  # whole words with a stem of their own
    "skis:ski skies:sky dying:die lying:lie tying:tie idly:idl gently:gentl ugly:ugli early:earli only:onli"
    " singly:singl sky:sky news:news howe:howe atlas:atlas cosmos:cosmos bias:bias andes:andes"
)
STOP_AFTER_1A = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
STEP_2 = pairs(
    "tional:tion enci:ence anci:ance abli:able entli:ent izer:ize ization:ize ational:ate ation:ate ator:ate alism:al"
    " aliti:al alli:al fulness:ful ousli:ous ousness:ous iveness:ive iviti:ive biliti:ble bli:ble ogi:og fulli:ful"
    " lessli:less li:"
)
STEP_3 = pairs("tional:tion ational:ate alize:al icate:ic iciti:ic ical:ic ful: ness: ative:")
STEP_4 = "al ance ence er ic able ible ant ement ment ent ism ate iti ous ive ize ion".split()
SHORT_SYLLABLE = re.compile(r"(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")


def longest_suffix(word, suffixes):
    """
    The longest of the suffixes that the word ends with, or None: only that one is tried, even if its condition fails.
    """
    return max((s for s in suffixes if word.endswith(s)), key=len, default=None)


def after_first_vowel_group(word, start):
    """Index behind the first non-vowel that follows a vowel, at or after `start`."""
    match = re.compile(r"[aeiouy][^aeiouy]").search(word, start)
    return match.end() if match else len(word)


@functools.lru_cache(maxsize=1 << 16)
def snowball_stem(word):
    if len(word) <= 2:
        return word
    if word in SNOWBALL_WORDS:
        return SNOWBALL_WORDS[word]
    word = re.sub(r"(^|[aeiouy])y", r"\1Y", word.removeprefix("'"))  # this y is a consonant
    prefix = re.match(r"gener|commun|arsen", word)
    r1 = prefix.end() if prefix else after_first_vowel_group(word, 0)
    r2 = after_first_vowel_group(word, r1)

    word = re.sub(r"'(s'?)?$", "", word)
    # 1a
    if word.endswith("sses"):
        word = word[:-2]
    elif word.endswith(("ied", "ies")):
        word = word[:-2] if len(word) > 4 else word[:-1]
    elif word.endswith("s") and not word.endswith(("us", "ss")) and re.search(r"[aeiouy]", word[:-2]):
        word = word[:-1]
    if word in STOP_AFTER_1A:
        return word
    # 1b
    suffix = longest_suffix(word, ("eed", "eedly", "ed", "edly", "ing", "ingly"))
    if suffix in ("eed", "eedly"):
        if len(word) - len(suffix) >= r1:
            word = word[: -len(suffix)] + "ee"
    elif suffix and re.search(r"[aeiouy]", word[: -len(suffix)]):
        word = word[: -len(suffix)]
        if word.endswith(("at", "bl", "iz")):
            word += "e"
        elif word.endswith(DOUBLES):
            word = word[:-1]
        elif r1 >= len(word) and SHORT_SYLLABLE.search(word):
            word += "e"
    # 1c
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in VOWELS:
        word = word[:-1] + "i"
    # 2
    suffix = longest_suffix(word, STEP_2)
    if suffix and len(word) - len(suffix) >= r1:
        before = word[: -len(suffix)]
        if not (suffix == "ogi" and not before.endswith("l")) and not (
            suffix == "li" and before[-1:] not in tuple("cdeghkmnrt")
        ):
            word = before + STEP_2[suffix]
    # 3
    suffix = longest_suffix(word, STEP_3)
    if suffix and len(word) - len(suffix) >= (r2 if suffix == "ative" else r1):
        word = word[: -len(suffix)] + STEP_3[suffix]
    # 4
    suffix = longest_suffix(word, STEP_4)
    if suffix and len(word) - len(suffix) >= r2 and not (suffix == "ion" and word[-4:-3] not in ("s", "t")):
        word = word[: -len(suffix)]
    # 5
    if word.endswith("e"):
        if len(word) - 1 >= r2 or (len(word) - 1 >= r1 and not SHORT_SYLLABLE.search(word[:-1])):
            word = word[:-1]
    elif word.endswith("ll") and len(word) - 1 >= r2:
        word = word[:-1]
    return word.replace("Y", "y")
