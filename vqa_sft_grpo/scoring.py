"""
Is this answer right? One strict score for every task, and columns that reproduce what two published scripts compute.

    score_answer("No, the lungs are clear.", "no", "closed", "Is there an effusion?")  -> {"correct": True, "parsed":
    True, ...}

The strict score, in words:
    texts         NFKC, lower case, no articles, no punctuation; number words as digits, English and the usual Latin
                  plurals off; x-ray = xray = x ray, T2-weighted = T2, hyper dense = hyperdense, left-sided = left, lt =
                  left, 5cm = 5 centimetres = 50 mm, 3-5 = 3 to 5, >= 5 = at least 5, larger than 5 = > 5, third = 3rd.
                  No synonyms.
    yes or no     the one answer that the text gives in whole words: "nodule", "normal" and "n" are not "no".
                  "No" before other words ("no evidence of effusion") answers a question about an effusion and no other.
                  Where neither word stands, and the question does not deny: "true", "positive", "present", or "false",
                  "negative", "absent", "none", "neither" beside words of the question only ("There is none"); "not
                  seen"; and the question's own words as a statement, without doubt or denial of them ("The heart is
                  enlarged, with no effusion": yes; with the opposite word: no).
                  Both or neither: not parsed, hence wrong, and counted as unparsed. So are a denied denial ("no
                  evidence of no effusion"), a condition ("if effusion then yes") and what cannot be said ("I cannot say
                  yes").
    A or B        the options are read from the question; exactly one must be named, outside "not ...". Where left and
                  right are options, L and R name them, as in open answers.
    other closed  equal, as for open.
    open          correct = the same words after the above, in any order within each item of a list, and items in any
                  order ("left lung" = "lung, left"; words such as "to" and "without" keep theirs). "It is", "in the"
                  and "are seen" around the answer do not count, nor do words of the question that the answer repeats
                  ("2 lesions" for "2"), except options and opposites. Where the question offers options, to name the
                  right one and nothing else will do. Then recall = precision = F1 = 1; else they count every word at
                  most as often as both texts have it. `contradiction`: the text says the opposite (left for right,
                  upper for lower, hyper- for hypo-, "no mass" for "mass"). Similarity of spelling is never used:
                  opposites differ by two letters.
Every row keeps its place in the denominator; an empty text is a wrong one. All functions take time linear in the text.

score_with_synonyms is the same with the word list SYNONYMS folded first: a column of its own, never the headline.
llava_med_scores and medevalkit_scores do what those scripts do, their faults included: to be read beside published
numbers only.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import re
import unicodedata
from collections import Counter

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty"
).split()
NUMBERS = {word: str(n) for n, word in enumerate(UNITS)}
TENS = {word: f"{n}0" for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
NUMBERS |= TENS
ORDINALS = "first 1st,second 2nd,third 3rd,fourth 4th,fifth 5th,sixth 6th,seventh 7th,eighth 8th,ninth 9th,tenth 10th"
ORDINALS = dict(pair.split() for pair in ORDINALS.split(","))
ARTICLES = {"a", "an", "the"}
NEGATORS = {"no", "not", "without"}
NO_NEGATION = set("doubt question only longer change other further additional".split())  # "no doubt", "not only"
# A negation reaches no further than the next of these
CLAUSE = set(
    ". but however although though except there which that because while i it this he she they we yes no not".split()
)
# Words of questions and answers that do not say what is asked about
COMMON = set(
    "is are was were be been do does did has have had can could would should may this that these those there it its any"
    " evidence sign finding seen see visible present presence shown show noted identified appear appearance demonstrate"
    " look contain include exist image picture film scan in on of at to for from with by and or patient you what which"
    " where who how when as also them".split()
)
OPPOSITE = (
    "left right,upper lower,superior inferior,anterior posterior,medial lateral,proximal distal,with without,increase"
    " decrease,increased decreased,increasing decreasing,normal abnormal,present absent,acute chronic,unilateral"
    " bilateral,healthy unhealthy,symmetric asymmetric,yes no"
)
OPPOSITE = {word: other for pair in OPPOSITE.split(",") for word, other in (pair.split(), pair.split()[::-1])}

# version 2: spellings (BRITISH too), abbreviations, plain equivalents; nothing that a radiologist would call different
SYNONYMS_NAME = "medvlm-vqa-synonyms-2"
SYNONYMS = {
    phrase: word
    for word, phrases in {
        "ct": "computed tomography, computerized tomography, cat scan, ct scan",
        "mri": "magnetic resonance imaging, magnetic resonance, mr, mri scan, mr image",
        "xray": "radiograph, radiography, plain film",
        "chest xray": "chest film, cxr",
        "ultrasound": "ultrasonography, sonography",
        "transverse": "axial",
        "gray": "grey",
        "hemorrhage": "bleeding, bleed",
        "homogeneous": "homogenous",
        "heterogeneous": "heterogenous",
        "radiopaque": "radioopaque",
        "cardiomegaly": "enlarged heart, cardiac enlargement",
        "stroke": "cerebrovascular accident, cva",
        "pa": "posteroanterior, posterior anterior",
        "ap": "anteroposterior, anterior posterior",
        "iv": "intravenous",
        "gi": "gastrointestinal",
        "csf": "cerebrospinal fluid",
        "right side": "right hand side",
        "left side": "left hand side",
        "abdomen": "belly",
        "sagittal": "sagital, saggital",
        "asymmetric": "asymmetrical",
        "symmetric": "symmetrical",
        "yes": "yeah, yep",
        "no": "nope",
    }.items()
    for phrase in phrases.split(", ")
}

# haematoma, oedema, diarrhoea, tumour, centre -> hematoma, edema, diarrhea, tumor, center
BRITISH = re.compile(r"ae(?=[mdcs])|\boe|oe(?=a|liac|t(?:us|al))|(?<=[ml])our(?=s?\b)|(?<=[tb])re\b")

# ---------------------------------------------------------------------------------------------------------------- texts

FOLDS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"\b({'|'.join(TENS)})[\s-]{{1,3}}({'|'.join(UNITS[1:10])})\b", lambda m: TENS[m[1]][0] + NUMBERS[m[2]]),
        (rf"\b(?:{'|'.join(NUMBERS)})\b", lambda m: NUMBERS[m[0]]),
        (rf"\b(?:{'|'.join(ORDINALS)})\b", lambda m: ORDINALS[m[0]]),
        (r"\\[a-z]{2,20}\s?(?=\{)", ""),  # \boxed{yes}
        (r"\b([a-z])\.(?=[a-z]\b(?![a-z]))", r"\1"),  # P.A.
        (r"\b(?:rather than|instead of|as opposed to|other than)\b", " not "),
        (r"[\u2018\u2019]", "'"),
        (r"n't\b", " not"),
        (r"\bcannot\b", "can not"),
        (r"\b(it|that|there)'s\b", r"\1 is"),
        (r"'s\b", ""),
        (r"'", ""),
        (r"\bx[\s-]{0,3}rays?\b", "xray"),
        (r"\b(t[12])[\s-]{0,3}(?:weighted|wi?)\b", r"\1"),
        (r"\b(hyper|hypo|iso|non)[\s-]{1,3}(?=[a-z])", r"\1"),
        (r"\b(left|right)[\s-]{0,3}sided\b", r"\1"),
        (r"\blt\b\.?", "left"),
        (r"\brt\b\.?", "right"),
        (r"centimet(?:er|re)s?\b", "cm"),
        (r"millimet(?:er|re)s?\b", "mm"),
        (r"(?<=\d)(?=(?:cm|mm|ml|kg|mg)\b)", " "),
        (r"\b(?:between|from)\s{1,3}(\d[\d.]{0,9}(?:\s{0,3}[cm]m)?)\s{1,3}(?:and|to)\s{1,3}(?=\d)", r"\1 to "),
        (r"(?<=\d)\s{0,3}([cm]m)\s{0,3}(x|\u00d7|by|to|[-\u2013])\s{0,3}(?=\d{1,9}(?:\.\d{1,9})?\s{0,3}\1)", r" \2 "),
        (r"(?<=\d)\s{0,3}(?:[x\u00d7]|by)\s{0,3}(?=\d)", " x "),
        (r"[≥⩾≧]|>=|=>", " at least "),
        (r"[≤⩽≦]|<=|=<", " at most "),
        (r"<|\b(?:smaller|fewer|lower)\s{1,3}than\b(?=\s{0,3}\d)", " less than "),
        (r">|\b(?:more|larger|bigger|higher)\s{1,3}than\b(?=\s{0,3}\d)", " greater than "),
        (r"(?<=\d)\s{0,3}[-\u2013]\s{0,3}(?=\d)", " to "),
        (r"\u2014|\s[-\u2013]{1,2}\s", " . "),
        (r"(?<![\w.)])[-\u2212](?=\d)", " minus "),
        (r"(?<=\d)\+", " plus "),
        (r"[~\u2248\u223c]", " about "),
        (r"(?<=\d)\s{0,3}/\s{0,3}(?=\d)", " over "),
        (r"%|\bper cent\b", " percent "),
        (r"(?<=\d),(?=\d{3}\b)", ""),
        (r"(?<![\w.])\.(?=\d)", "0."),
        (r"(\.\d{0,20}?[1-9])0{1,20}(?!\d)|\.0{1,20}(?!\d)", r"\1"),
        (r"(?<=\d)\.(?!\d)", " . "),
    )
]
TOKEN = re.compile(r"\d+\.\d+|[^\W_]+|[.,;:!?()/\n]")
MARKS = set(".,;:!?()/\n")
DIGITS = r"\d{1,9}(?:\.\d{1,9})?"
LENGTH = re.compile(rf"(?<![\w.])(?:{DIGITS}\s{{1,3}}(?:to|x|by)\s{{1,3}}){{0,3}}{DIGITS}\s{{1,3}}cm\b")
LATIN = {
    plural: one
    for one, plural in (
        pair.split()
        for pair in (
            "diverticulum diverticula,hilum hila,septum septa,atrium atria,bacterium bacteria,ganglion ganglia,vertebra"
            " vertebrae,scapula scapulae,fistula fistulae,bulla bullae,axilla axillae,papilla papillae,bronchus bronchi"
            ",focus foci,calculus calculi,embolus emboli,thrombus thrombi,sulcus sulci,gyrus gyri,nucleus nuclei"
            ",metastasis metastases,diagnosis diagnoses,stenosis stenoses,prosthesis prostheses,anastomosis anastomoses"
            ",pelvis pelves,testis testes,appendix appendices,cortex cortices,apex apices,lumen lumina,foramen foramina"
            ",thorax thoraces,hemithorax hemithoraces,pneumothorax pneumothoraces,hemothorax hemothoraces,atelectasis"
            " atelectases,thrombosis thromboses,epiphysis epiphyses,metaphysis metaphyses,fossa fossae,maxilla maxillae"
            ",pleura pleurae,alveolus alveoli,meniscus menisci,humerus humeri,radius radii,ramus rami,ostium ostia"
            ",phalanx phalanges,carcinoma carcinomata,hematoma hematomata,does does,perhaps perhaps,towards towards"
            ",pancreas pancreas"
        ).split(",")
    )
}


def folded(text):
    """NFKC, lower case, and the spellings above, lengths in mm; still a text with punctuation."""
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    for pattern, new in FOLDS:
        text = pattern.sub(new, text)

    def in_mm(length):
        return re.sub(DIGITS, lambda n: f"{float(n[0]) * 10:.10g}", length[0])[:-2] + "mm"

    return LENGTH.sub(in_mm, text)


def singular(word):
    """
    "lungs" -> "lung", "masses" -> "mass", "opacities" -> "opacity", "diverticula" -> "diverticulum"; not "mass", "pus",
    "pelvis", "mucous", "does".
    """
    if word in LATIN:
        return LATIN[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1]


def words_and_marks(text):
    """-> tokens of the strict score, every punctuation mark as "."."""
    return list(tokens_of(str(text)))


@functools.lru_cache(maxsize=1024)  # one score looks at its texts several times
def tokens_of(text):
    tokens = []
    for token in TOKEN.findall(folded(text)):
        if token in MARKS:
            tokens.append(".")
        elif token not in ARTICLES:
            tokens.append(singular(token))
    return tuple(tokens)


def normalise(text):
    """-> list of tokens, as compared everywhere in the strict score. Empty only for a text without anything in it."""
    if text is None:
        return []
    tokens = [token for token in words_and_marks(text) if token != "."]
    if not tokens:  # "A", "+"
        tokens = folded(text).split()
    return tokens


def overlap(prediction, gold):
    """Token lists -> (recall, precision, F1) with every token counted at most as often as in both."""
    common = (Counter(prediction) & Counter(gold)).total()
    if not common:
        return 0.0, 0.0, 0.0
    recall, precision = common / len(gold), common / len(prediction)
    return recall, precision, 2 * recall * precision / (recall + precision)


# Words around an answer that are no part of it, and words that bind what stands before to what stands behind
FRAME = set(
    "it this that these those they there answer is are was were in on at seen present visible shown noted".split()
)
FRAME.add("identified")
RELATIONS = NEGATORS | set(
    "to than from above below behind over under into before after with less greater least most".split()
)


SIDES = {"l": "left", "r": "right"}


def with_sides(tokens, others):
    """L and R are left and right where the other tokens speak of left and right."""
    return [SIDES.get(token, token) for token in tokens] if {"left", "right"} & set(others) else tokens


def items_of(text, other, dropped=frozenset()):
    """A text as the items of a list, in order of the alphabet, without its frame -> list of tuples of tokens."""
    tokens = with_sides([token for token in words_and_marks(text) if token not in dropped], words_and_marks(other))
    for end in (0, -1):
        while len(tokens) > 1 and tokens[end] in FRAME | {"."}:
            tokens.pop(end)
    items = [[]]
    for token in tokens:
        if token in (".", "and"):
            items.append([])
        elif token != "of":
            items[-1].append(token)
    return sorted(tuple(item if RELATIONS & set(item) else sorted(item)) for item in items if item)


def same_words(prediction, gold, question=""):
    """Are two texts the same words, by the rules of "open" above?"""
    said, wanted = normalise(prediction), normalise(gold)
    if not said or said == wanted:
        return bool(said)
    repeated = frozenset()
    if not options_of(question):
        repeated = set(normalise(question)) - set(wanted) - NEGATORS - set(OPPOSITE)
    b = items_of(gold, prediction)
    for a in (items_of(prediction, gold), items_of(prediction, gold, repeated)):
        words, others = (sorted(token for item in some for token in item) for some in (a, b))
        if a and a == b:
            return True
        plain = not RELATIONS & set(words) and not {OPPOSITE.get(word) for word in words} & set(words)
        if words and words == others and plain and 1 in (len(a), len(b)):
            return True  # "lung, left": an inversion and no list
    return False


def same_option(prediction, gold, question):
    """Does the question offer options, of which both texts name the same one, the first with no word beside?"""
    right = choice(gold, question)
    beside = set(normalise(prediction)) - set(normalise(gold)) - set(normalise(question)) - COMMON - SHARED
    return right is not None and not beside and choice(prediction or "", question) == right


# ------------------------------------------------------------------------------------------------------- what was meant


def reach(tokens, i, longest=8):
    """
    The tokens that a negation at i speaks of: up to the end of its clause, at most `longest`; [] for a "no" that stands
    alone.
    """
    scope = []
    for token in tokens[i + 1 : i + 1 + longest]:
        goes_on = scope and {token, scope[-1]} & {"that", "think", "believe", "way"}  # "I don't think there is"
        if token in CLAUSE and not goes_on or (not scope and token in ("or", "and")):
            break
        scope.append(token)
    return [] if scope and scope[0] in NO_NEGATION else scope


def negated(tokens):
    """All tokens that some negation reaches."""
    return {token for i, word in enumerate(tokens) if word in NEGATORS for token in reach(tokens, i)}


NORMALITY = set("normal normally healthy clear unremarkable sharp patent intact symmetric symmetrical symmetry".split())
ABSENCE = NEGATORS | {"absent", "absence", "lack"}
DENIERS = NEGATORS | set(
    "free negative absence lack neither nor".split()
)  # "free of effusion", "negative for effusion"
PLAIN = dict.fromkeys("yes true positive present correct affirmative".split(), "yes")
PLAIN |= dict.fromkeys("no false negative absent none neither nothing nil incorrect".split(), "no")
# No answer comes after or with these
UNSURE = set("if unless whether depend unsure uncertain unclear unknown unable impossible undetermined nobody".split())
SAYING = set(
    "sure certain say tell answer confirm determine determined know known conclude assess assessed"
    " exclude excluded rule".split()
)
# A statement with one of these states nothing
DOUBT = set(
    "or unlikely exclude excluded rule ruled denied resolved suspected possible possibly may might could versus maybe"
    " perhaps probably questionable consider history previous missing removed outside"
    " resolution drained concern suspicion prior question hard difficult would insufficient likely probable".split()
)
STATING = set(
    "is are was were has have there show shown see seen present visible noted identified appear look contain include"
    " demonstrate depict reveal exist observed visualized detected".split()
)
MAYBE = set("maybe perhaps possibly possible might could may".split())
# "not one", "not the case", "not part of this picture", "I don't think so", "no sign of either"
BARE = {"1", "all", "true", "correct", "case", "really", "part", "either", "think", "believe", "so", "clearly"}
DENIED_LIST = re.compile(r"\b(?:no|not|without)\b(?:[^.,;:!?\n]{1,60},){1,6}(?=[^.,;:!?\n]{0,60}\bn?or\b)")
PRONOUNS = {"it", "this", "that", "they", "these", "those"}
_FILM = r"(?:chest |attached |medical )?(?:images?|pictures?|films?|scans?|photos?|radiographs?|x-?rays?)\b"
_GIVEN = r"(?:visible|shown|provided|attached|available|displayed|loaded|accessible|included|uploaded|clear enough)"
SEES_NOTHING = re.compile(  # "I cannot see the image" denies no finding
    rf"(?:\bnot|n['’]t|\bcannot|\bunable to|\bnever) (?:\w+ )?(?:see|view|access|open|read|interpret|analy[sz]e|find)"
    rf" (?:(?:the|any|an?|this|that|your) )?{_FILM}"
    rf"|\b{_FILM} (?:is|are|was|were|has|have)(?: not|n['’]t)(?: been)? {_GIVEN}"
    rf"|\bno {_FILM}(?: (?:is|was|has been|to be))?(?: here| {_GIVEN}|[.!]?$)"
)


def scoped_tokens(text):
    """
    Text -> tokens for `polarity`: "-yes/no" behind a question off, the commas of "no A, B or C" read as "or", and
    "free" marked where it denies nothing ("free air"; "free of" and "free from" do).
    """
    text = re.sub(r"[-?]\s{0,3}yes\s{0,3}(?:/|or)\s{0,3}no\b", "?", text.lower())
    tokens = words_and_marks(DENIED_LIST.sub(lambda match: match[0].replace(",", " or"), text))
    pairs = zip(tokens, [*tokens[1:], ""], strict=False)
    return ["free " if word == "free" and after not in ("of", "from") else word for word, after in pairs]


def polarity(text, question=""):
    """
    -> "yes", "no", or None where the text says both or neither; the rules are those of "yes or no" above. A "no" that
    belongs to other words counts when these words are what the question asks about; without a question it counts when
    there is no answer that stands alone.
    """
    if SEES_NOTHING.search(text.lower()):
        return None
    tokens, asked_tokens = scoped_tokens(text), scoped_tokens(question)
    asked = set(asked_tokens) - COMMON - {"."}
    denies = bool((ABSENCE | {"free"}) & set(asked_tokens))
    if denies:  # "Is the film free of effusion?": "no effusion" is no plain no here, "not free of effusion" is
        asked &= ABSENCE - {"no", "not"} | {"free"}
    maybe = MAYBE & set(tokens) - set(asked_tokens)  # "possibly yes", but not "Yes, possibly a cyst"
    if UNSURE & set(tokens) or maybe and not set(tokens) - MAYBE - COMMON - NEGATORS - asked - {"yes", "."}:
        return None
    alone, attached, rest = set(), set(), list(tokens)
    for i, token in enumerate(tokens):
        if token in ("yes", "no") and i and tokens[i - 1] == "not":
            return None
        if token == "yes":
            alone.add("yes")
            rest[i] = ""
        elif token in DENIERS:
            scope = reach(tokens, i)
            end = i + 1 + len(scope)
            stop = tokens[end] if end < len(tokens) else "."
            bare = not set(scope) - COMMON - BARE and (token == "not" or {"evidence", "sign"} & set(scope))
            if token in NEGATORS and (SAYING & set(scope) or denied_denial(token, set(scope), stop, asked)):
                return None
            if token == "no" and not scope and stop not in NO_NEGATION:
                alone.add("no")
                rest[i] = ""
            elif NORMALITY & asked and any(word.startswith("abnormal") for word in scope):
                attached |= {"yes"} if alone else set()  # "Are the lungs normal?" - "Yes, no abnormality of the lungs"
            elif scope and (speaks_of(scope, tokens[max(0, i - 30) : i + 30], asked) if question else token == "no"):
                attached.add("no")
            elif token in NEGATORS and question and not denies and bare and stop not in NO_NEGATION:
                attached.add("no")  # "not seen", "it is not", "there is not one"
            if token in ("no", "without") and scope:  # "There is an effusion but no mass"
                rest[i:end] = ["."] * (end - i)
    said = alone | attached if question or not alone else alone
    rest = [token for token in rest if token]
    if said and question and not denies:  # "No, there is an effusion"
        needed = asked - {"pleural"} or asked  # "No, but there is a small effusion"
        said |= {plainly(rest, asked) or stated(text, rest, asked_tokens, needed)} - {None} if rest else set()
    if said or not question or denies:
        return said.pop() if len(said) == 1 else None
    return plainly(rest, asked) or stated(text, rest, asked_tokens, asked)


def asks_for_absence(question):
    """
    Does yes to this question say that nothing is wrong or nothing is there? True for "Is this film normal?", "Are the
    lungs clear?", "Is it free of effusion?", "Is there no mass?"; not for "Is there a mass?", "Is this film not
    normal?", "Is the heart larger than normal?". Each denial turns it round; several words for normal count once.
    """
    tokens = ["", *scoped_tokens(question)]
    denials = normal = 0
    for before, token in zip(tokens, tokens[1:], strict=False):
        denials += token in ABSENCE or token == "free"
        normal |= token in NORMALITY and before != "than"
    return (denials + normal) % 2 == 1


def speaks_of(scope, around, asked):
    """Does "no" answer? Not "no lung mass" on normal lungs, "not a sagittal plane", nor about one of two sides."""
    wanted, said = asked & NORMALITY or asked - SHARED or asked, set(scope)
    others = asked | {token for token, n in Counter(around).items() if n > scope.count(token)}
    return bool(wanted & said) and not any(OPPOSITE.get(word) in others - said for word in said - asked)


def denied_denial(token, scope, stop, asked):
    """Does the negation deny nothing but the next negation? "no evidence of no effusion", "not without effusion"."""
    if DENIERS & scope - {"neither", "nor"} - asked:
        return True
    return stop in NEGATORS and not scope - COMMON and bool(scope or token != "no")


def plainly(tokens, asked):
    """-> what a text says that has nothing but a word of PLAIN and words of the question, else None."""
    said = {PLAIN[token] for token in tokens if token in PLAIN and token not in asked}
    other = {token for token in tokens if token not in PLAIN} - COMMON - asked - {"."}
    if "no" in said and tokens.count("present"):  # "none present"
        said = {PLAIN[token] for token in tokens if token in PLAIN and token != "present"}
    return said.pop() if len(said) == 1 and not other else None


def stated(text, tokens, asked_tokens, asked):
    """-> yes where a text states what the question asks, no where it states the opposite, else None."""
    said = set(tokens)
    if not asked or "?" in str(text) or tokens[:1] and tokens[0] in STARTS:
        return None
    if said & (DENIERS | DOUBT - asked | {"absent", "or"}) or not said & STATING:
        return None
    last = next(token for token in reversed(asked_tokens) if token in asked)
    needed = {last} if tokens[0] in PRONOUNS else asked
    turned = {word for word in needed - said if OPPOSITE.get(word) in said}
    if any(OPPOSITE.get(word) in said for word in needed & said):
        return None  # "normal and abnormal"
    return "yes" if needed <= said else "no" if turned and needed - said == turned else None


STARTS = set(
    "is are was were do does did would could can should has have which what where who how whose when why".split()
)
WH = {"which", "what", "where", "who", "how", "whose", "when", "why"}
FILLERS = {"just", "only", "either", "in", "on"}
SHARED = set(
    "side zone view plane image scan film region part area modality process appearance projection".split()
)  # of no option in particular


def options_of(question):
    """
    The options of "is it A or B?", "which is it, A, B or C?", "A or B: which is it?" -> list of (tokens, whole). whole:
    the tokens are the whole option; otherwise the rest of the sentence runs on around it and only the word next to "or"
    is certain. [] where the question offers none.
    """
    text = re.sub(r"\b(?:vs\b\.?|versus\b)", " or ", folded(question))
    clauses = [clause for clause in re.split(r"[.?!;:\n()]", text) if re.search(r"\bor\b", clause)]
    if not clauses:
        return []
    parts = [words_and_marks(part) for part in re.split(r",\s{0,3}(?:or\b)?|\bor\b", clauses[-1])]
    parts = [[token for token in part if token != "."] for part in parts]
    parts = [part for part in parts if part]
    while len(parts) > 2 and parts[-1][0] in WH:  # left or right, which is it?
        parts.pop()
    start = max((i for i, part in enumerate(parts[:-1]) if part[0] in STARTS), default=0)
    sentence = bool(parts) and parts[start][0] in STARTS  # the words in front of the first option are not part of it
    if sentence and parts[start][0] in WH and len(parts) - start > 2:  # which is bigger, lung or heart?
        start, sentence = start + 1, False
    parts = parts[start:]
    if len(parts) < 2:
        return []
    while all(len(part) > 1 and part[:-1] != ["no"] for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]  # transverse plane or coronal plane
    for i in range(len(parts)):
        while len(parts[i]) > 1 and parts[i][0] in FILLERS:
            parts[i] = parts[i][1:]
    if not sentence:
        return [(part, True) for part in parts]
    first, last = parts[0], parts[-1]
    first_key = first[-1:]
    last_key = last if last[0] == "no" else next(([token] for token in last if token not in first[-3:]), last[:1])
    return [(first_key, False), *((part, True) for part in parts[1:-1]), (last_key, False)]


def named_options(tokens, options):
    """
    Which of the options a text names: set of numbers. Longer ones first, so that "lower right" does not name "right".
    """
    free, found = list(tokens), set()
    for number in sorted(range(len(options)), key=lambda k: -len(options[k][0])):
        option = options[number][0]
        for i in range(len(free) - len(option) + 1):
            if free[i : i + len(option)] == option:
                found.add(number)
                free[i : i + len(option)] = [None] * len(option)
    if not found:  # "kidney" names the left kidney where no other option has one
        for number, (option, _) in enumerate(options):
            others = {token for k, (other, _) in enumerate(options) if k != number for token in other}
            if (set(option) - others - SHARED - COMMON) & set(tokens):
                found.add(number)
    return found


def choice(text, question):
    """-> number of the one option of the question that the text names (options_of), or None: none, or more than one."""
    options = options_of(question)
    if not options:
        return None
    offered = {token for option, _ in options for token in option}
    tokens = with_sides(words_and_marks(text), offered)
    comparing = words_and_marks(question)  # of "Which is bigger, A or B?"
    denied = set()
    for i, token in enumerate(tokens):
        if token in NEGATORS and token not in offered or token == "than" and tokens[i - 1] in comparing:
            denied |= set(range(i + 1, i + 1 + len(reach(tokens, i))))
    found = named_options([token for i, token in enumerate(tokens) if i not in denied], options)
    return found.pop() if len(found) == 1 else None


def contradicts(prediction, gold):
    """Token lists -> True where the prediction says the opposite of the gold answer, or gold and opposite at once."""
    said, wanted = set(prediction), set(gold)
    swapped = {"hyper": "hypo", "hypo": "hyper"}
    opposites = {OPPOSITE.get(word) or re.sub(r"\Ahyp(?:er|o)", lambda m: swapped[m[0]], word) for word in wanted}
    if (opposites - wanted) & said:
        return True
    gold_denies, prediction_denies = negated(gold), negated(prediction)
    affirmed = wanted - gold_denies - COMMON - NEGATORS
    return bool(affirmed & prediction_denies or (gold_denies - COMMON) & (said - prediction_denies))


# --------------------------------------------------------------------------------------------------------------- scores


def score_answer(prediction, gold, answer_type, question=""):
    """
    prediction: text or None; gold: text; answer_type: "closed", "choice" (scored as closed) or "open", any case;
    question: text, for options and negations. Returns a dict:
        parsed         the text gives an answer of the kind asked for
        correct        the headline: closed: the right one; open: exact
        exact          the same words, by the rules of "open" above
        recall, precision, f1    of words, 0 to 1
        contradiction  says the opposite of the gold answer
        kind           "yes/no", "choice", "closed" (compared as texts) or "open"
    ValueError for another answer_type.
    """
    kind = str(answer_type).strip().lower()
    if kind not in ("closed", "choice", "open"):
        raise ValueError(f"answer_type is {answer_type!r}; it must be closed, choice or open")
    wanted, said = normalise(gold), normalise(prediction)
    exact = same_words(prediction, gold, question) or kind == "open" and same_option(prediction, gold, question)
    recall, precision, f1 = (1.0, 1.0, 1.0) if exact else overlap(said, wanted)
    contradiction = not exact and contradicts(said, wanted)
    parsed, correct = bool(said), exact
    if kind != "open":
        right = choice(gold, question)
        if wanted in (["yes"], ["no"]):
            kind, label = "yes/no", polarity(prediction or "", question)
            parsed, correct = label is not None, label == wanted[0]
            contradiction = parsed and not correct
        elif right is not None:
            kind, label = "choice", choice(prediction or "", question)
            parsed, correct = exact or label is not None, exact or label == right
        else:
            kind = "closed"
    found = {"parsed": parsed, "correct": correct, "exact": exact, "recall": recall, "precision": precision, "f1": f1}
    return found | {"contradiction": contradiction, "kind": kind}


PHRASES = re.compile(rf"\b({'|'.join(sorted(SYNONYMS, key=len, reverse=True))})s?\b".replace(" ", "[ -]"))


def fold_synonyms(text):
    """The text with the phrases of SYNONYMS replaced and American, in the spelling of the strict score."""
    text = BRITISH.sub(lambda match: {"our": "or", "re": "er"}.get(match[0], "e"), folded(text))
    return PHRASES.sub(lambda match: SYNONYMS[match[1].replace("-", " ")], text)


def score_with_synonyms(prediction, gold, answer_type, question=""):
    """score_answer after the word list SYNONYMS_NAME: a column of its own, to be named with that name."""
    return score_answer(
        None if prediction is None else fold_synonyms(prediction),
        fold_synonyms(gold),
        answer_type,
        fold_synonyms(question),
    )


# ----------------------------------------------------------------------- columns that are compatible with other scripts

LLAVA_MED_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
LLAVA_MED_WORDS = {"none": "0", **{word: number for word, number in NUMBERS.items() if int(number) <= 10}}


def llava_med_words(text):
    """
    Words as LLaVA-Med's glossary.py leaves them: a mark is deleted when it stands beside a space anywhere in the text
    (or the text has a comma between digits), else it becomes a space; full stops go unless a digit follows; "none" is
    0, one to ten are digits; articles go. Its list of contractions (dont -> don't) is left out.
    """
    text = str(text).lower()
    result, numbers = text, re.search(r"\d,\d", text)
    for mark in LLAVA_MED_PUNCTUATION:
        result = result.replace(mark, "" if numbers or mark + " " in text or " " + mark in text else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    return [LLAVA_MED_WORDS.get(word, word) for word in result.split() if word not in ARTICLES]


def llava_med_scores(prediction, gold, answer_type):
    """
    One row as LLaVA-Med's llava/eval/run_eval.py counts it (microsoft/LLaVA-Med, commit ad758b6) -> {"closed", "exact",
    "recall", "precision", "f1"}, None where the row does not count. Faults, reproduced:
        closed     right when the gold text is a substring of a prediction that has "yes" or "no" as a substring: "yes
                   or no" is right for both, "it is normal" is right for no. A prediction with "yes" or "no" that is not
                   right is left out of the denominator instead of being wrong, so that a constant "yes" scores 100 %.
        recall     words count as often as the prediction repeats them: "left left left left" for "left lung" is 0.8.
        exact      not a match, but the share of the prediction's words that are distinct gold words.
    Average over the rows that are not None.
    """
    said, wanted = llava_med_words(prediction or ""), llava_med_words(gold)
    scores = dict.fromkeys(("closed", "exact", "recall", "precision", "f1"))
    if str(answer_type).strip().lower() != "open":
        text = " ".join(said)
        if "yes" not in text and "no" not in text:
            return scores | {"closed": 0.0}
        return scores | {"closed": 1.0 if " ".join(wanted) in text else None}
    both = sum(word in set(wanted) for word in said)
    missed = sum(word not in set(said) for word in wanted)
    scores |= {"exact": len(set(wanted) & set(said)) / len(said) if said else 0.0, "recall": 0.0}
    scores |= {"precision": 0.0, "f1": 0.0}
    if both:
        recall, precision = both / (both + missed), both / len(said)
        scores |= {"recall": recall, "precision": precision, "f1": 2 * recall * precision / (recall + precision)}
    return scores


MEDEVALKIT_MARKS = "**answer**:,**answer**,*answer*:,**answer:**,answer is,answer:,final answer,final answer is".split(
    ","
)


def medevalkit_scores(prediction, gold, answer_type, dataset):
    """
    One row as MedEvalKit counts it (alibaba-damo-academy/MedEvalKit, utils/VQA_RAD, utils/SLAKE; its first version,
    without a language model as judge) -> {"closed", "exact", "precision", "recall", "f1"}, None where the row does not
    count. Its choices:
        vqa_rad    closed = the gold answer is yes or no (whatever answer_type says): right when exactly one of the
                   substrings "yes" and "no" is there, and it is the gold one; so "yes, it is abnormal" is unparsed
        slake      closed by answer_type; its test for yes and no never holds for "Yes" and "No", so the whole answer
                   must be equal, full stops aside. (It also mixes English and Chinese rows; pass the rows that you
                   mean.)
        columns    sets of words split at spaces, and the three are printed under each other's names: "precision" is F1,
                   "recall" is precision, "f1" is recall
    dataset: "slake", or anything else for the rules of vqa_rad.
    """
    slake = str(dataset).lower() == "slake"
    text, gold = str(prediction or "").lower(), str(gold)
    if not slake:
        text, gold = text.strip(), gold.lower().strip()
    for mark in MEDEVALKIT_MARKS:
        text = text.split(mark)[-1]
    plain = text.replace("\n", "").replace(".", "")
    scores = dict.fromkeys(("closed", "exact", "precision", "recall", "f1"))
    if slake and str(answer_type).strip().lower() != "open" and gold not in ("yes", "no"):
        return scores | {"closed": float(plain == gold.lower())}
    if gold in ("yes", "no") and (not slake or str(answer_type).strip().lower() != "open"):
        return scores | {"closed": float(("yes" in plain) != ("no" in plain) and gold in plain)}
    said, wanted = set(text.split()), set(gold.lower().split())
    common = len(said & wanted)
    precision, recall = (common / len(said), common / len(wanted)) if common else (0.0, 0.0)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return scores | {"exact": float(text == gold.lower()), "precision": f1, "recall": precision, "f1": recall}


def column_means(rows):
    """[{column: number or None}] -> {column: {"mean", "n"}} over the rows that count; mean None where none does."""
    columns = {}
    for name in rows[0] if rows else ():
        values = [float(row[name]) for row in rows if row[name] is not None]
        columns[name] = {"mean": sum(values) / len(values) if values else None, "n": len(values)}
    return columns
