"""
Two stemmers for English words, written from their published descriptions: the metrics that need them must run without
NLTK.

    snowball_stem("effusions") -> "effus"     Snowball "English" (Porter2), used by METEOR 1.5
    porter_stem("effusions")   -> "effus"     Porter 1980 with NLTK's changes, used by NLTK's METEOR

They differ in few words ("generally": "general" here, "gener" there). Both take one word in lower case. Sources:
snowballstem.org/algorithms/english/stemmer.html; Porter 1980, doi:10.1108/eb046814, and the changes that NLTK lists.
Tests compare them with NLTK and with the Snowball inside the METEOR tool over every word of the IU X-ray reports.
"""

import functools
import re

# ---------------------------------------------------------------------------------------------------- Snowball English

VOWELS = "aeiouy"
DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
SNOWBALL_WORDS = {  # whole words with a stem of their own
    "skis": "ski",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "idly": "idl",
    "gently": "gentl",
    "ugly": "ugli",
    "early": "earli",
    "only": "onli",
    "singly": "singl",
} | {word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")}
STOP_AFTER_1A = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
STEP_2 = {
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "abli": "able",
    "entli": "ent",
    "izer": "ize",
    "ization": "ize",
    "ational": "ate",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "aliti": "al",
    "alli": "al",
    "fulness": "ful",
    "ousli": "ous",
    "ousness": "ous",
    "iveness": "ive",
    "iviti": "ive",
    "biliti": "ble",
    "bli": "ble",
    "ogi": "og",
    "fulli": "ful",
    "lessli": "less",
    "li": "",
}
STEP_3 = {
    "tional": "tion",
    "ational": "ate",
    "alize": "al",
    "icate": "ic",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
    "ative": "",
}
STEP_4 = (
    "al",
    "ance",
    "ence",
    "er",
    "ic",
    "able",
    "ible",
    "ant",
    "ement",
    "ment",
    "ent",
    "ism",
    "ate",
    "iti",
    "ous",
    "ive",
    "ize",
    "ion",
)
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


# ----------------------------------------------------------------------------------------------- Porter, as NLTK has it

PORTER_WORDS = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "inning": "inning",
    "innings": "inning",
    "outing": "outing",
    "outings": "outing",
    "canning": "canning",
    "cannings": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}
PORTER_2 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
    ("logi", "log"),
)
PORTER_3 = (("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""))
PORTER_4 = (
    "al",
    "ance",
    "ence",
    "er",
    "ic",
    "able",
    "ible",
    "ant",
    "ement",
    "ment",
    "ent",
    "ion",
    "ou",
    "ism",
    "ate",
    "iti",
    "ous",
    "ive",
    "ize",
)


def shape(word):
    """Each letter as v(owel) or c(onsonant); y is a vowel after a consonant."""
    letters = ""
    for i, letter in enumerate(word):
        letters += "v" if letter in "aeiou" or (letter == "y" and i > 0 and letters[-1] == "c") else "c"
    return letters


def measure(stem):
    return shape(stem).count("vc")  # Porter's m: [C](VC)^m[V]


def ends_cvc(word):
    letters = shape(word)
    return (
        letters.endswith("cvc") and word[-1] not in "wxy"
    ) or letters == "vc"  # the second: two-letter words, NLTK's change


@functools.lru_cache(maxsize=1 << 16)
def porter_stem(word):
    if word in PORTER_WORDS:
        return PORTER_WORDS[word]
    if len(word) <= 2:
        return word
    # 1a
    if word.endswith("ies"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    # 1b
    if word.endswith("ied"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        if measure(word[:-3]) > 0:
            word = word[:-1]
    else:
        suffix = next((s for s in ("ed", "ing") if word.endswith(s) and "v" in shape(word[: -len(s)])), None)
        if suffix:
            word = word[: -len(suffix)]
            if word.endswith(("at", "bl", "iz")):
                word += "e"
            elif len(word) > 1 and word[-1] == word[-2] and shape(word)[-1] == "c":
                word = word if word[-1] in "lsz" else word[:-1]
            elif measure(word) == 1 and ends_cvc(word):
                word += "e"
    # 1c
    if word.endswith("y") and len(word) > 2 and shape(word[:-1])[-1] == "c":
        word = word[:-1] + "i"
    # 2
    while word.endswith("alli") and measure(word[:-4]) > 0:  # then once more, "ationalli" -> "ational" -> "ate"
        word = word[:-2]
    word = porter_replace(word, PORTER_2, lambda stem, suffix: measure(stem + "l" if suffix == "logi" else stem) > 0)
    # 3
    word = porter_replace(word, PORTER_3, lambda stem, suffix: measure(stem) > 0)
    # 4
    word = porter_replace(
        word,
        [(s, "") for s in PORTER_4],
        lambda stem, suffix: measure(stem) > 1 and (suffix != "ion" or stem[-1] in "st"),
    )
    # 5
    if word.endswith("e"):
        stem = word[:-1]
        if measure(stem) > 1 or (measure(stem) == 1 and not ends_cvc(stem)):
            word = stem
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def porter_replace(word, rules, condition):
    """Apply the first rule whose suffix fits; if its condition fails, none."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            return stem + replacement if condition(stem, suffix) else word
    return word
