"""
A report as it was typed -> the text that shared/metrics/labels.py reads: lower case, single spaces, hyphens and slashes
as spaces, contractions written out, one letter put right in a misspelled finding, and layout as marks (the list of
marks is in phrases.py).

    flatten("No PTX\nSmall effu-\nsion - (?) pneumonia")[0] == "no pneumothorax ¶ small effusion ¦ ¿ pneumonia"
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from functools import lru_cache

from shared.metrics.phrases import BONES, HOW, SIZE, WHAT, WHY

_SHORT = {"ptx": "pneumothorax", "pna": "pneumonia", "consol": "consolidation", "eff": "effusion", "fx": "fracture"}
_SHORT |= {"ddx": "differential diagnosis", "wnl": "within normal limits", "nl": "normal", "pulm": "pulmonary"}
_SHORT |= {"pl": "pleural", "effs": "effusions", "atel": "atelectasis", "cons": "consolidation", "cmg": "cardiomegaly"}
# Words that are also read with one letter too many, too few, wrong or two swapped, if that is no other word.
_SPELLED = (
    "pneumothorax pneumothoraces pneumonia pneumonias consolidation consolidations atelectasis atelectases effusion"
    " effusions edema oedema cardiomegaly opacity opacities nodule nodules fracture fractures pleural infiltrate"
    " infiltrates emphysema pacemaker catheter catheters enlarged enlargement silhouette mediastinum mediastinal"
    " unremarkable congestion without evidence pulmonary thickening unlikely excluded cannot possible probable likely"
    " questionable suspicious borderline resolved removed negative absent normal"
).split()
_OTHER_WORDS = frozenset(
    "opacify opacifies pneumonic pleura pleurae fractured infiltrated effusive silhouettes congestions pacemakers"
    " enlarges exclude excludes evidenced evidences possibly probably questionably resolve resolves remove removes"
    " negatives".split()
)
_CONTRACTION = re.compile(r"(\w+)n['’`]t\b|\b((?:do|did|does|is|was|are|were|has|have|had|could))nt\b")
_PLAIN = re.compile(r"[a-z]+")


def _one_edit_apart(a, b):
    """Is one letter missing, added or different, or are two neighbours swapped?"""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest = (a[i + 1 :], b[i:]), (a[i:], b[i + 1 :]), (a[i + 1 :], b[i + 1 :])
    return any(x == y for x, y in rest) or (a[i : i + 2] == b[i : i + 2][::-1] and a[i + 2 :] == b[i + 2 :])


@lru_cache(maxsize=65536)
def _spell(word):
    """A word with the marks that touch it -> as it is read."""
    word = word.replace("\0", "")
    if "n" in word and "t" in word:
        word = _CONTRACTION.sub(lambda m: {"ca": "can", "wo": "will"}.get(m[1], m[1] or m[2]) + " not", word)
    found = _PLAIN.match(word)
    if not found or word[found.end() :].strip(".,:;"):
        return {"&": "and", "♯": "fracture"}.get(word, word)
    letters = _SHORT.get(found[0], found[0])
    if len(letters) > 3 and letters not in _SPELLED and letters not in _OTHER_WORDS:
        right = (w for w in _SPELLED if w[0] == letters[0] and _one_edit_apart(letters, w))
        letters = next(right, letters)
    return letters + word[found.end() :]


# ------------------------------------------------------------------------------------------------------------ the lines

_BREAK = re.compile(r"\r\n|[\n\r\v\f\x85\u2028\u2029]")
_JOINED = re.compile(r"([A-Za-z]+)-[ \t]*[\r\n]+[ \t]*([a-z]+)")
_BULLET = re.compile(r"\s*(?:[-–—*•·o>+]|\(?\d{1,2}[.)]|\(?[a-h]\))\s")
_FIELD = re.compile(r"\s*[A-Za-z][A-Za-z /]{1,40}:")
_OPEN = re.compile(  # a line that ends so goes on in the next, wherever it was broken
    r"(?:[,-]|\b(?:no|not|of|or|and|nor|the|an?|with|without|in|at|to|for|from|is|are|was|were|has|have|be|been|by|on"
    r"|any))\s*$",
    re.IGNORECASE,
)
_ALONE = re.compile(r"\W*(?:none|nil|absent|negative|normal)\W*$", re.I)
_ANSWER = re.compile(r"(?:[:=?]|\s[–-])\s*\w+$")
_ADJECTIVE = re.compile(rf"\b(?:right|left|bilateral|upper|lower|mid|new|acute|focal|pleural|{SIZE})\s*$", re.I)
_GOES_ON = re.compile(
    r"\s*(?:or|and|nor|of|in|at|on|with|without|is|are|was|were|has|have|to|for|from|but|OR|AND|NOR|OF)\b"
)
_LIST = re.compile(  # "No evidence of:" or "Differential diagnosis:", and bullets below it
    r"(\b(?:no|without|negatives?|for|of|any|(?:absent|possible|uncertain|questionable)(?: findings)?|not present"
    r"|differential(?: diagnos[ei]s)?|considerations?) ?:)"
    rf"([*_ \t]*)((?:\r?\n{_BULLET.pattern}.*)+\n?)",
    re.I,
)
NARROW = 40  # no report is set in lines as short as this


def _mark_lines(text):
    """Each line break -> ¶ where it ends a statement, else a space; as long as before."""

    def joined(found):
        gap = found.start(2) - found.end(1)
        known = (found[1] + found[2]).lower() in _SPELLED
        return found[1] + "\0" * gap + found[2] if known else found[0]

    def listed(found):
        line = found[1] + re.sub(rf"\r?\n{_BULLET.pattern}", lambda bullet: ", ".ljust(len(bullet[0])), found[3])
        # no comma before the first item, and as long as before without the stars behind the colon
        return line.replace(",", " " * (1 + len(found[2])), 1).replace("\n", "¶")

    text = _LIST.sub(listed, _JOINED.sub(joined, text))
    lines = _BREAK.split(text)
    width = max(len(line.strip()) for line in lines)
    mixed = any(line.lstrip()[:1].isupper() for line in lines)
    following = iter(lines)
    line = next(following)

    def mark(found):
        nonlocal line
        before, line = line, next(following)
        return ("¶" if _line_ends(before.strip(), line, width, mixed) else " ").ljust(len(found[0]))

    return _BREAK.sub(mark, text)


def _line_ends(line, following, width, mixed):
    """
    A statement ends before an empty line, a bullet or the next field of a template, where a capital follows a small
    letter, and where the line had room for the next word; it does not where the sentence plainly goes on.
    """
    first, last = following.split()[:1], line.split()[-1:]
    if first and (line.rstrip("*_ ").endswith(":") or _ALONE.match(following)):
        return False  # "Effusion:", and its answer in the next line
    if not first or not last or _BULLET.match(following):
        return True
    first, last = first[0], last[0]
    if _ANSWER.search(line) and first[0].isupper():
        return True  # "Effusion: no", and the next field
    if _OPEN.search(line) or _GOES_ON.match(following):
        return False
    if _FIELD.match(following) or (first[0].isupper() and not first[1:].isupper() and last[0].islower()):
        return True
    if _ADJECTIVE.search(line) or (mixed and first[0].islower()):
        return False
    return width < NARROW or len(line) + 1 + len(first) <= width


# ------------------------------------------------------------------------------------------------------------ the marks

_HYPHENS = "-\u2010\u2011\u2012\u2013\u2014"
_FLAT = dict.fromkeys(_HYPHENS + '/_"“”', " ") | dict.fromkeys("[({", "‹") | dict.fromkeys("])}", "›")
_FLAT = str.maketrans(_FLAT)
_LAYOUT = {
    # "effusion(s)"
    " ": r"\((?:e?s|x)\)",
    # dashes and bars; not the hyphen of "mid- and lower"
    "¦": rf"(?<=\S)[{_HYPHENS}]+(?=\s)(?!\s+(?:and|or|to)\b)|(?<=\s)[{_HYPHENS}]+(?=\s)|[{_HYPHENS}]{{2,}}|—"
    r"|[|•·*=→]+>?|->|(?<=\s)>(?=\s*[a-z])|(?<!\.)\.{2,}(?=\s*[a-z])|…|(?<=\s)\+(?=\s)|\(\+\)|</?[a-z]+ ?/?>"
    r"|(?<=[a-z])–(?=[a-z])|(?:^|(?<=\s))\(?(?:\d{1,2}|[a-h])\)(?=\s)",
    ",": r"(?<=\s)/(?=\s)",
    "no": r"\([-–−]\)|\[\s\]",
    "ø": r"(?<=[a-z:] )[-–−](?=[.,;]|$)|[☐□]",
    "neg": r"(?<!\w)[-–−]ve\b",
    "♯": rf"#(?=\s?(?:(?:right|left|old|\d+(?:st|nd|rd|th)) )*(?:{BONES})\b)|(?<=rib )#|(?<=ribs )#|(?<=clavicle )#",
    # "Effusion? No."
    ":": r"\?(?:[\s¶]*a(?:nswer)?\s*:)?(?=\s*(?:no|none|nil|absent|negative|yes|present|positive)\s*(?:[.,;¶]|$))",
    # a question mark before what it asks, or "+/-"; and one in brackets behind it
    "¿": r"(?<!\w)[(\[]?\s?\?{1,3}[)\]]?(?=\s*(?!(?:at|in|on|of|within|along|near)\b)[a-z])|±|\+/-",
    "?": r"[(\[]\s?\?{1,3}\s?[)\]]",
}
_MARKED = re.compile("|".join(f"({pattern})" for pattern in _LAYOUT.values()))
_UNUSUAL = re.compile(r"[^a-z0-9 .,;:']|\.\.")
_PIECES = re.compile(r"[¶¦‹›¿♯]|[^\s¶¦‹›¿♯]+?[;,]+(?=[a-z])|[^\s¶¦‹›¿♯]+")
# Stars and tags of a word inside a sentence ("there is **no** effusion"), not those of a heading ("**Heart:** large")
_EMPHASIS = re.compile(
    r"(\*{1,3}|<(?:b|i|em|strong|u)>)(?=[a-z]|(?:[Nn]ot?|NOT?|No evidence|Without|Negative for|Absent|Possible|Probable"
    r"|Likely|Questionable|Suspected)\b|(?<=no \*\*)|(?<=No \*\*)|(?<=or \*\*)|(?<=of \*\*))"
    r"([^*<>\n]{1,80})(\*{1,3}|</(?:b|i|em|strong|u)>)"
)


def flatten(text, with_places=False):
    """text -> the flat text; for each of its characters the one of `text` it stands for (else None)."""
    text = _mark_lines(text) if _BREAK.search(text) else text
    text = _EMPHASIS.sub(lambda found: "\0" * len(found[1]) + found[2] + "\0" * len(found[3]), text)
    low = text.lower()
    if len(low) != len(text):  # a few letters grow in lower case, which would move what follows
        low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    if _UNUSUAL.search(low):
        marks = tuple(_LAYOUT)
        low = _MARKED.sub(lambda found: marks[found.lastindex - 1].ljust(len(found[0])), low).translate(_FLAT)
    if not with_places:
        return " ".join(map(_spell, _PIECES.findall(low))), None
    places, words = [], []
    for piece in _PIECES.finditer(low):
        typed, word = [i for i in range(*piece.span()) if low[i] != "\0"], _spell(piece.group())
        words.append(word)
        # a word that is read longer or shorter than it was typed keeps its two ends; the space behind it is its own
        places += [typed[min(i, len(typed) - 1)] for i in range(len(word) - 1)] + [typed[-1], piece.end()]
    return " ".join(words), places


# -------------------------------------------------------------------------------------------------------- the sentences

_START = r"(?:^|(?<=[.;!?¶] ))"
_HEADER = re.compile(
    rf"(?:\b(?P<why>{WHY}) ?:|\b(?P<how>{HOW}) ?:|wet read|final report|\b[a-z]\w+\)? ?:"
    rf"|{_START}(?:(?P<why_line>{WHY})|(?P<how_line>{HOW})|{WHAT}) [¦¶])(?= |$)"
)
_END = re.compile(r"(?<!\bvs)(?<!\bposs)(?<!\bprob)(?<!\bpleural)\.(?!\d)(?!(?<=\bneg\.) for\b)|[;!¶]|(?<=\?)")
_TEXT = re.compile(r"[^\s¶]")


def sentences(flat):
    """Flat text -> (start, end) of the sentences, without the parts that say why and how the film was taken."""
    skip = []
    if ":" in flat or "¶" in flat or "¦" in flat:
        headers = list(_HEADER.finditer(flat))
        for header, following in zip(headers, headers[1:] + [None], strict=False):
            how = header["how"] or header["how_line"]
            if how or header["why"] or header["why_line"]:
                stop = following.start() if following else len(flat)
                word = _TEXT.search(flat, header.end(), stop)  # an empty line may follow the header
                sentence = _END.search(flat, word.start(), stop) if word and (how or not following) else None
                skip.append((header.start(), sentence.end() if sentence else stop))
    at = 0
    for start, stop in [*skip, (len(flat), len(flat))]:
        for found in _END.finditer(flat, at, start):
            yield at, found.start()
            at = found.end()
        yield at, start
        at = stop
