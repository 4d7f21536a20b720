"""
The 14 CheXpert conditions, the four things a label can be, and a labeller that reads them from a report by rules.

    label_report("Stable cardiomegaly. No effusion or pneumothorax; pneumonia cannot be excluded.")
    -> {"Cardiomegaly": 1, "Pleural Effusion": 0, "Pneumothorax": 0, "Pneumonia": -1, ...: None}
    labels, spans = label_report(text, evidence=True)    # which words, and which rule, gave each label

Three orders of the same names are in use, and mixing them up swaps columns without any error: the CheXpert CSV, the
CheXpert labeller's output (Lung Lesion before Lung Opacity) and CheXbert (No Finding last). So labels are dicts by
name here, and an array is made only at the very end, with `to_row(labels, order)`.

Source of names and orders: Irvin et al. 2019, CheXpert (arXiv 1901.07031), and Smit et al. 2020, CheXbert (arXiv
2004.09167). The rules follow what these papers describe (mentions; uncertainty, negation, uncertainty again; positive
beats uncertain beats negative); wordings (shared/metrics/phrases.py) and code are our own. Labels say what a text
states, not what a film shows.

Where rules end: which predicates deny is a closed list ("is not seen", but "is not calcified" denies no nodule), so a
new one ("is nowhere to be found") is not read; nor are comparatives ("bigger than before"), findings with two letters
wrong, statements parted by a tab alone, and references back ("it has resolved"). "No A and B is seen" denies both, "no
A, B is seen" states B.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from functools import lru_cache

from shared.metrics.layout import flatten, sentences
from shared.metrics.phrases import END, NEW, OWN_VERB, SIZE, TABLES, VERB_NEXT, WHAT

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, None  # unknown: the text does not mention it

# Order of the CheXpert CSV, the one used in our files.
CONDITIONS = tuple(
    "No Finding|Enlarged Cardiomediastinum|Cardiomegaly|Lung Opacity|Lung Lesion|Edema|Consolidation|Pneumonia"
    "|Atelectasis|Pneumothorax|Pleural Effusion|Pleural Other|Fracture|Support Devices".split("|")
)

LABELLER_ORDER = CONDITIONS[:3] + ("Lung Lesion", "Lung Opacity") + CONDITIONS[5:]
CHEXBERT_ORDER = CONDITIONS[1:] + ("No Finding",)

# The five that CheXpert's leaderboard and most report papers score.
TOP_FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

# What a condition is a kind of (CheXpert's hierarchy). A positive child makes its parent true of the image, but a
# report that says "edema" has not said "opacity": only labels of images are closed upwards, labels of texts are not.
PARENTS = dict.fromkeys(("Lung Lesion", "Edema", "Consolidation", "Atelectasis"), "Lung Opacity") | {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    "Pneumonia": "Consolidation",
}

_SAME_NAME = {name.lower(): name for name in CONDITIONS}
_SAME_NAME |= dict.fromkeys(("enlarged cardiom.", "enlarged mediastinum"), "Enlarged Cardiomediastinum")
_SAME_NAME |= dict.fromkeys(("airspace opacity", "opacity"), "Lung Opacity")
_SAME_NAME |= dict.fromkeys(("oedema", "pulmonary edema"), "Edema")
_SAME_NAME |= {"lesion": "Lung Lesion", "effusion": "Pleural Effusion", "normal": "No Finding"}
_SAME_NAME |= {"devices": "Support Devices"}


def condition_name(text):
    """Any usual spelling ("pleural_effusion", "Oedema") -> the name in CONDITIONS; ValueError if there is none."""
    key = " ".join(str(text).replace("_", " ").replace("-", " ").lower().split())
    if key not in _SAME_NAME:
        raise ValueError(f"{text!r} is not one of the 14 CheXpert conditions: {', '.join(CONDITIONS)}")
    return _SAME_NAME[key]


def from_row(values, order):
    """Values in a given order of names -> dict by our names. Blank (None, "", NaN) is unknown; else 1, 0 or -1."""
    values = list(values)
    if len(values) != len(order):
        raise ValueError(f"{len(values)} values for {len(order)} condition names")
    labels = dict.fromkeys(CONDITIONS, UNKNOWN)
    for value, name in zip(values, order, strict=True):
        if value is None or value == "" or value != value:  # NaN is not equal to itself
            continue
        number = float(value)
        if number not in (POSITIVE, NEGATIVE, UNCERTAIN):
            raise ValueError(f"label {value!r} of {name}: expected 1, 0, -1 or blank")
        labels[condition_name(name)] = int(number)
    return labels


def to_row(labels, order=CONDITIONS):
    """Dict by name -> list in `order`; names that are missing are unknown (None)."""
    named = {condition_name(name): value for name, value in labels.items()}
    return [named.get(condition_name(name), UNKNOWN) for name in order]


# ------------------------------------------------------------------------------------------------- phrases in sentences


@lru_cache(maxsize=1)
def _matcher():
    """-> the pattern of all phrases; (kind, what) of each group. Compiled at first use."""
    found = [(phrase, (kind, what)) for kind, what, phrases in TABLES for phrase in phrases]
    either, marks = "|".join(f"{phrase}()" for phrase, _ in found), "[,:¦‹›¿]"  # the empty group tells which
    pattern = re.compile(rf"(?:(?<!\w)|(?={marks}))(?:{either})(?:(?<={marks})|(?!\w))")
    return pattern, [None, *(kind for _, kind in found)]


def _tokens(sentence):
    """-> [(kind, what, start, end)] of the phrases found, from left to right."""
    pattern, kinds = _matcher()
    return [(*kinds[found.lastindex], *found.span()) for found in pattern.finditer(sentence)]


# ------------------------------------------------------------------------------------------------------ one sentence

# What a state says of anatomy: its label, and the conditions it speaks of.
_SIZE_OF = {
    "heart": ("Cardiomegaly",),
    "mediastinum": ("Enlarged Cardiomediastinum",),
    "heart and mediastinum": ("Cardiomegaly", "Enlarged Cardiomediastinum"),
}
_STATES = {
    "normal": (NEGATIVE, _SIZE_OF),
    "not enlarged": (NEGATIVE, _SIZE_OF),
    "enlarged": (POSITIVE, _SIZE_OF),
    "prominent": (UNCERTAIN, _SIZE_OF),
    "congested": (POSITIVE, {"vessels": ("Edema",)}),
    "collapsed": (POSITIVE, {"lung": ("Atelectasis",)}),
}
_NEW, _NOTHING_MORE = re.compile(NEW), re.compile(END)
_OWN_VERB, _VERB_NEXT = re.compile(OWN_VERB), re.compile(VERB_NEXT)
_LINK = re.compile(  # "normal size of the heart"
    r"(?: (?:sized?|shape|contour|configuration|appearance|caliber|position|and|of|in|the))* "
)
_OR = re.compile(r"\b(?:or|nor)\b")
_LASTING = re.compile(r"\b(?:whether|that)\b")  # cues that a verb does not end: "whether A is B"
_TITLE = re.compile(r"[ ¦]*(?:\w+ ){0,3}[ ¦]*:.*")  # around the name of a field
_TIP = re.compile(r"\b(?:tips?|ends?|side ?(?:port|hole)s?|portion|aspect|course|one of)\b")
_PAST = re.compile(r" (?:below|beyond|past|distal\w*|in the stomach)\b")
_OTHER_SIDE = re.compile(  # "resolved on the right, but persists on the left"
    r" (?:on|in|at) the (right|left)\b(?: \w+){0,3}?,? (?:but|and) (?:(?:has|is|are) )?"
    rf"(?:{SIZE}|increas\w+|decreas\w+|improv\w+|worse\w*|persist\w*|remains?|unchanged|stable|still|seen|present)"
    r"(?: \w+){0,3}? (?:on|in|at) the (?!\1)(?:right|left)\b"
)
_TO_LARGE = re.compile(r"(?: in size)? (?:to|or) (?:\w+ ){0,2}(?:enlarged|borderline|increased|prominent)\b")


class _Scope:
    """What is open while a sentence is read: a denial, a doubt, or one that says "not described"."""

    def __init__(self):
        self.close()

    def open(self, cue, short=False):
        self.cue, self.short, self.used, self.devices_only = cue, short, False, True

    def close(self):
        self.open(None)


class _Reader:
    """
    Reads one sentence from left to right, one method for each kind of token. A span is a list (condition, label, rule,
    start, end, cue start, cue end); label None: mentioned, but nothing is said of it.
    """

    def __init__(self, sentence):
        self.sentence, self.tokens, self.spans = sentence, _tokens(sentence), []
        self.last_or = max((found.start() for found in _OR.finditer(sentence)), default=-1)
        self.denial, self.doubt, self.silence = self.scopes = _Scope(), _Scope(), _Scope()
        # Places in spans since the last stop; where the last parts of that list begin: after a comma, after a comma or
        # "and"; and the list before a mark, which an answer means ("Lines and tubes: none").
        self.recent, self.item, self.part, self.asked = [], 0, 0, []
        # Anatomy waiting for its state, as (part, start); whether its verb has come; the last token a state has taken
        self.anatomy, self.verb_seen, self.claimed, self.headed = [], False, -1, False
        self.comma_at, self.outside = -1, []

    def read(self):
        for i, (kind, what, start, end) in enumerate(self.tokens):
            handle = getattr(self, kind, None)  # "keep" and "unmention" need none: it is enough that they were read
            if handle:
                handle(i, what, start, end)
        self.borderline()
        self.title()
        if self.sentence.endswith("?"):
            # "opacity (pneumonia?)", "opacity - pneumonia?": what stands behind the mark alone
            asked = self.sentence.rfind("‹") if self.outside else self.sentence.rfind("¦")
            everything = range(len(self.spans))
            targets = [k for k in everything if self.spans[k][3] > asked] or everything
            self.doubt_back(targets, len(self.sentence) - 1, len(self.sentence))
        return tuple(map(tuple, self.spans))

    # --- findings

    def mention(self, i, condition, start, end, label=POSITIVE, rule="mention"):
        span = [condition, label, rule, start, end, None, None]
        device, denial = condition == "Support Devices", self.denial
        if self.silence.cue:
            span[1], span[2], span[5:] = None, "not described", self.silence.cue
        elif denial.cue and not (device and self.device_stands_alone()):
            span[1], span[2], span[5:] = NEGATIVE, "negation", denial.cue
        elif self.doubt.cue:
            span[1], span[2], span[5:] = UNCERTAIN, "uncertainty", self.doubt.cue
        for scope in self.scopes:
            scope.used = True
            scope.devices_only &= device
        self.recent.append(len(self.spans))
        self.spans.append(span)
        if self.verb_seen:
            self.anatomy = []
        if denial.cue and end > self.last_or and (_NEW.match(self.sentence, end + 1) or self.own_verb(i + 1)):
            self.stop(i, condition, start, end)  # "no effusion heart enlarged"

    def device_stands_alone(self):
        """ "No pneumothorax, chest tube in place": a device after a comma is denied in a list of devices only."""
        denial = self.denial
        return denial.used and not denial.devices_only and self.comma_at > max(self.last_or, denial.cue[1])

    def failure(self, i, what, start, end):
        if not self.denial.cue and not self.silence.cue:
            self.mention(i, "Cardiomegaly", start, end, UNCERTAIN, "heart failure")

    # --- anatomy and its states

    def anatomical(self, i, part, start, end):
        self.silence.used = True
        if i > self.claimed:
            if self.verb_seen or self.headed:  # headed: "Mediastinum: the heart is large"
                self.anatomy, self.verb_seen, self.headed = [], False, False
            self.anatomy.append((part, start))

    def state(self, i, state, start, end):
        """Said of the anatomy right behind it, else of the anatomy before it."""
        if state == "normal" and _TO_LARGE.match(self.sentence, end):
            state = "prominent"  # "top normal to mildly enlarged"
        within = self.sentence.startswith("within", start)
        if within and self.kind(i + 1) != "anatomical":
            self.deny_back(self.recent[self.item :], start, end)
        behind = [] if within else self.anatomy_behind(i, end)
        if behind:
            self.claimed, first, end = behind[-1], start, self.tokens[behind[-1]][3]
            parts = [self.tokens[k][1] for k in behind]
        else:
            parts = [part for part, _ in self.anatomy]
            first = self.anatomy[0][1] if self.anatomy else start
            if self.recent and self.spans[self.recent[-1]][3] > first and state != "normal":
                return  # "cardiac silhouette unchanged, effusion increased"
            self.anatomy = []
        label, conditions = _STATES[state]
        for name in dict.fromkeys(name for part in parts for name in conditions.get(part, ())):
            if label == NEGATIVE:
                self.spans.append([name, NEGATIVE, "normal anatomy", first, end, None, None])
            else:
                self.mention(i, name, first, end, label, "enlarged anatomy" if conditions is _SIZE_OF else state)

    def anatomy_behind(self, i, end):
        """-> the tokens of the anatomy right behind a state: "normal heart size and mediastinal contours"."""
        j = i + 1
        if i and self.kind(i - 1) == "anatomical" and self.tokens[i - 1][3] + 1 == self.tokens[i][2]:
            return []  # "heart size normal lungs clear"
        if self.kind(j) != "anatomical" or not _LINK.fullmatch(self.sentence, end, self.tokens[j][2]):
            return []
        if self.anatomy and self.verb_seen and self.kind(j + 1) == "verb":
            return []  # a full stop is missing: "the heart is normal the lungs are clear"
        while self.kind(j) in ("anatomical", "comma"):
            j += 1
        found = [k for k in range(i + 1, j) if self.kind(k) == "anatomical"]
        if len(found) > 1 and self.kind(j) in ("verb", "state"):
            found.pop()  # "normal heart size and the lungs are ...": the last one belongs to what follows
        return found

    def kind(self, i):
        return self.tokens[i][0] if i < len(self.tokens) else None

    def borderline(self):
        """ "Heart size is borderline": the word doubts a large heart even where it stands alone."""
        cue = self.sentence.find("borderline")
        if cue >= 0 and not any(span[0] == "Cardiomegaly" for span in self.spans):
            for kind, what, start, end in self.tokens:
                if kind == "anatomical" and what.startswith("heart"):
                    self.spans.append(["Cardiomegaly", UNCERTAIN, "uncertainty", start, end, cue, cue + 10])

    def title(self):
        """ "Pneumothorax: no pneumothorax": the first is the name of a field, and the field says it again."""
        if self.spans and _TITLE.fullmatch(self.sentence[: self.spans[0][3]] + self.sentence[self.spans[0][4] :]):
            name = self.spans[0][0]
            if any(span[0] == name for span in self.spans[1:]):
                self.spans[0][1:3] = None, "name of a field"

    # --- cues: what they open, and what they say of the findings before them

    def absent(self, i, what, start, end):
        self.denial.open((start, end))

    def unsure(self, i, what, start, end):
        self.doubt.open((start, end))

    def unsure_both(self, i, what, start, end):
        self.doubt_back(self.since_doubt(self.recent[-1:]), start, end)
        self.doubt.open((start, end))

    def unsure_next(self, i, what, start, end):
        self.doubt.open((start, end), short=True)

    def ignore(self, i, what, start, end):
        self.silence.open((start, end), short=True)

    def ignore_rest(self, i, what, start, end):
        self.silence.open((start, end))

    def unsure_back(self, i, what, start, end):
        targets = self.meant(start, end)
        self.doubt_back(self.since_doubt(targets) or targets, start, end)

    def since_doubt(self, targets):
        """ "An opacity may be atelectasis or, less likely, pneumonia": there is no doubt of the opacity."""
        return [k for k in targets if not self.doubt.cue or self.spans[k][3] > self.doubt.cue[0]]

    def absent_back(self, i, what, start, end):
        if _OTHER_SIDE.match(self.sentence, end):
            return
        # "the tip of the tube is not seen", "the tube is not seen below the carina": the tube is there
        tip = _TIP.search(self.sentence, max(0, start - 200), start) or _PAST.match(self.sentence, end)
        targets = [k for k in self.meant(start, end) if not (tip and self.spans[k][0] == "Support Devices")]
        self.deny_back(targets, start, end)

    def ignore_back(self, i, what, start, end):
        for span in (self.spans[k] for k in self.meant(start, end)):
            span[1], span[2], span[5:] = None, "not described", (start, end)

    def meant(self, start, end):
        """
        The findings that a cue behind them means: the whole list in "edema, effusion or pneumonia cannot be excluded"
        and "A and B are not seen", else its last part; none since a mark: those before it. Behind a comma only a cue
        without more means what stands before it: "..., not seen", but "..., not seen on the lateral view".
        """
        plural = self.sentence.startswith(("are ", "were ", "have "), start)
        if plural or (self.recent and self.last_or > self.spans[self.recent[0]][3]):
            return self.recent or self.asked
        targets = self.recent[self.item :]
        other_side = self.recent and self.sentence.startswith(" on the ", end)  # "right effusion, none on the left"
        # "effusion: not seen on this view", "effusion, seen before, is not seen"
        its_own = self.sentence.startswith((": ", ", is ", ", was ", ", has "), start - 2)
        if not targets and (its_own or not other_side and _NOTHING_MORE.match(self.sentence, end)):
            targets = self.recent[self.part :] or self.recent[-1:] or self.asked
        return targets

    def deny_back(self, targets, start, end):
        for span in (self.spans[k] for k in targets):
            if span[1] is not None:  # of the heart's size a failure that has gone says nothing
                span[1] = None if span[2] == "heart failure" else NEGATIVE
                span[2], span[5:] = "negation", (start, end)

    def doubt_back(self, targets, start, end):
        for span in (self.spans[k] for k in targets):
            if span[1] == POSITIVE:
                span[1], span[2], span[5:] = UNCERTAIN, "uncertainty", (start, end)

    # --- what ends a scope

    def comma(self, i, what, start, end):
        self.comma_at, self.item = start, len(self.recent)
        if self.sentence[start] == ",":
            self.part = len(self.recent)
        if start <= self.last_or:
            return
        if self.doubt.short and self.doubt.used:
            self.doubt.close()
        # "may be effusion and mild edema" goes on
        listed = self.doubt.cue and not self.doubt.short and self.sentence[start] == "a"
        if _NEW.match(self.sentence, start) and not listed:
            for scope in self.scopes:
                scope.close()
            self.forget()
        elif self.denial.cue and self.denial.used and self.own_verb(i):
            self.denial.close()
            self.forget()
        elif self.denial.cue and not self.denial.used and self.sentence[slice(*self.denial.cue)] == "not":
            self.denial.close()  # "not well seen on this view, effusion"

    def own_verb(self, i):
        """Does the finding behind this comma or "and" have a verb or state of its own?"""
        comma = False
        while self.kind(i) == "comma":
            comma, i = self.sentence[self.tokens[i][2]] == ",", i + 1
        if self.kind(i) != "mention":
            return False
        end = self.tokens[i][3]
        return bool(_OWN_VERB.match(self.sentence, end) or (comma and _VERB_NEXT.match(self.sentence, end)))

    def verb(self, i, what, start, end):
        self.verb_seen = bool(self.anatomy)
        for scope in self.scopes:
            if not scope.cue or not scope.used or (scope is self.silence and not scope.short):
                continue
            if not _LASTING.search(self.sentence, *scope.cue):
                scope.close()

    def stop(self, i, what, start, end):
        self.denial.close()
        self.doubt.close()
        if self.silence.short:
            self.silence.close()
        self.forget()

    def mark(self, i, what, start, end):
        if self.sentence.startswith((" or ", " nor "), end):
            return
        asked = self.recent[self.part :] or self.asked
        self.headed = self.sentence[start] == ":" and bool(self.anatomy)
        if not any(scope.cue and scope.cue[1] >= start - 1 for scope in self.scopes):  # "negative for: effusion, ..."
            self.stop(i, what, start, end)
        self.asked = asked

    def bracket(self, i, opens, start, end):
        """What stands in brackets is read by itself; behind them the sentence goes on as before."""
        if opens and not self.sentence.startswith((" or ", " nor ", " and "), end):
            self.outside.append([(scope.cue, scope.short, scope.used, scope.devices_only) for scope in self.scopes])
            self.mark(i, None, start, end)
        elif not opens and self.outside:
            for scope, state in zip(self.scopes, self.outside.pop(), strict=True):
                scope.cue, scope.short, scope.used, scope.devices_only = state

    def forget(self):
        self.recent, self.item, self.part, self.asked = [], 0, 0, []


@lru_cache(maxsize=65536)
def _read_sentence(sentence):
    """-> tuple of (condition, label, rule, start, end, cue start, cue end)."""
    return _Reader(sentence).read()


# ----------------------------------------------------------------------------------------------------- the whole report

_RANK = {None: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
_NO_WORD = re.compile(
    rf"(?:\b(?:x+|n|a|na|nan|none|null|nil|name|and|or|unknown|missing|not available|{WHAT})\b|\W|\d|_)*"
)


def label_report(text, evidence=False):
    """
    text: a report, or any part of one -> {condition: 1 stated, 0 denied, -1 doubted, None not mentioned}, the 14 in
    order.

    Among several mentions 1 beats -1 beats 0. No Finding is 1 when none of the other 13 but Support Devices, nor
    another abnormality (OTHERS), is stated or doubted, else None; a text without a word ("", "XXXX", "nan") has no
    labels at all. Sections headed "Indication:" or "History:" are not read, nor is the first sentence after
    "Technique:", "Examination:" or "Comparison:".

    evidence=True -> (labels, spans); a span is a dict with condition ("other": one of OTHERS), label (None: mentioned,
    not described), rule, start, end, text (the mention, in characters of `text`), cue, cue_start, cue_end (the word
    that denies or doubts it, or None).
    """
    if not isinstance(text, str):
        raise TypeError(f"label_report reads a text, got {type(text).__name__}")
    flat, places = flatten(text, evidence)
    labels = dict.fromkeys(CONDITIONS, UNKNOWN)
    spans, abnormal = [], False
    for start, end in sentences(flat):
        sentence = flat[start:end].strip()
        if not sentence:
            continue
        start = flat.index(sentence, start)
        for name, label, rule, first, last, cue_first, cue_last in _read_sentence(sentence):
            abnormal |= label in (POSITIVE, UNCERTAIN) and name != "Support Devices"
            if name != "other" and _RANK[label] > _RANK[labels[name]]:
                labels[name] = label
            if evidence:
                cue = cue_first is not None and (start + cue_first, start + cue_last)
                spans.append(_span(text, places, name, label, rule, (start + first, start + last), cue))
    if not abnormal and not _NO_WORD.fullmatch(flat):
        labels["No Finding"] = POSITIVE
        if evidence:
            whole = dict(start=0, end=len(text), text=text, cue=None, cue_start=None, cue_end=None)
            rule = "nothing abnormal stated or doubted"
            spans.append(dict(condition="No Finding", label=POSITIVE, rule=rule) | whole)
    return (labels, spans) if evidence else labels


def _span(text, places, name, label, rule, mention, cue):
    def where(span):
        return (places[span[0]], places[span[1] - 1] + 1) if span else (None, None)

    start, end = where(mention)
    first, last = where(cue)
    found = dict(condition=name, label=label, rule=rule, start=start, end=end, text=text[start:end])
    return found | dict(cue=text[first:last] if cue else None, cue_start=first, cue_end=last)
