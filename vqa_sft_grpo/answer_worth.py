"""
A of the reward: what an answer is worth, between 0 and 1. Stricter than the score of the evaluation (scoring.py).

    value, score, away = accuracy_of("left lung", "left upper lobe", "open", "Where is the nodule?")

closed   1 for the right label; each word that belongs neither to the gold answer, nor to the question, nor to what
         descriptions are made of (PLAIN: places, sizes, organs, "there is") takes BESIDE off, and so does each of PLAIN
         after the sixth. So "yes", "yes, a small one" and "No, the lungs are clear" are worth 1, "yes und nein" and
         thirty words less.
open     squared F1 of words, less for items of a list that share no word with the gold answer: to list k candidates
         must earn less than to guess one of them (1/k). Where the gold answer has places they are compared as places:
         side, height, depth and middle one by one, each bound to its thing where several are named ("Right Lung, Left"
         is not "Left Lung, Right"). Another one: 0; some of several: their share; left out: LEFT_OUT, which is less
         than a guess earns. Items in any order.
either   0 for what hedges (a word of HEDGES that the gold answer does not have, "?", "...", "not sure", "cannot be
         determined"), names an answer in another language, or contradicts the gold answer.
"""

import functools
import re

from vqa_sft_grpo.scoring import COMMON, FRAME, NEGATORS, SAYING, UNSURE, normalise, score_answer, words_and_marks

if __name__ == "__main__":
    raise SystemExit(__doc__)

BESIDE = 0.15  # of A, for each word beside a closed answer
LEFT_OUT = 0.3  # of A, where the gold answer says a side (or height, ...) and this one says none
HEDGES = UNSURE | (SAYING - {"answer", "sure", "certain", "known"})
HEDGES |= set(
    "or either maybe perhaps possibly possible probably probable likely unlikely might may could would versus vs guess"
    " guessing apparent apparently seem seemingly presume presumed presumably suppose supposed supposedly suspect"
    " suspected suspicion suspicious think believe assume assuming assumption provided confidence confident chance odd"
    " percent probability indeterminate inconclusive equivocal ambiguous questionable doubt doubtful conceivably"
    " potential potentially arguably tentative tentatively speculative speculate hopefully supposing otherwise"
    " alternatively hard difficult hypothetically allegedly reportedly".split()
)
# "not sure" hedges, and "can not be determined"; "can not be seen" does not
NOT_SURE = set("sure certain clear possible known definite obvious evident confident".split())
SEEING = set("seen see visible identified detected found appreciated".split())
# yes, no, left and right in other languages
OTHER_LANGUAGES = set(
    "ja nein jein oui non si nee nej nei sim nao tak nie da njet nyet kylla ei evet hayir igen nem ano hai iie shi bu"
    " ne ya tidak haan nahi naam link recht gauche droite izquierda derecha sinistra destra"
    " esquerda direita lewy prawy lewa prawa levo pravo oben unten haut bas arriba abajo sopra sotto und oder ou y"
    " oppure lub ili eller vielleicht".split()
)
ITEM_ENDS = re.compile(r"[,;/\n]|\.(?!\d)|\band\b", re.IGNORECASE)
MARKS = re.compile(r"\?|\.\.|\u2026")
SIZES = set("small moderate large big tiny huge mild severe minimal slight mildly severely slightly extensive".split())
ORGANS = set(
    "lung heart liver spleen kidney stomach bladder brain colon intestine rectum esophagus trachea pancreas aorta spine"
    " larynx eye".split()
)
DIMENSIONS = {  # word -> (dimension, what it says)
    word: (dimension, value)
    for dimension, values in {
        "side": {"left": "left", "right": "right", "left right": "bilateral both"},
        "height": {"upper": "upper superior top apical apex", "lower": "lower inferior bottom base"}
        | {"mid": "mid middle"},
        "depth": {"front": "anterior front ventral", "back": "posterior back dorsal"},
        "middle": {"medial": "medial central center centre", "lateral": "lateral peripheral"},
    }.items()
    for value, words in values.items()
    for word in words.split()
}
PLAIN = COMMON | FRAME | NEGATORS | SIZES | ORGANS | set(DIMENSIONS) | set(str(n) for n in range(10))
PLAIN |= set(
    "yes no true positive present correct false negative absent none side sided zone lobe field hemithorax chest"
    " pleural mediastinum diaphragm rib bone abdomen pelvis film normal abnormal clear unremarkable enlarged acute"
    " chronic finding abnormality disease".split()
)


@functools.lru_cache(maxsize=8192)  # the rollouts of a group give few different answers
def accuracy_of(answer, gold, answer_type, question):
    """-> (A before the frequency, dict of score_answer, hedged)."""
    score = score_answer(answer, gold, answer_type, question)
    if answer is None:
        return 0.0, score, False
    away = hedged(answer, gold, question)
    if away or score["contradiction"]:
        return 0.0, score, away
    if score["kind"] != "open":
        return float(score["correct"]) * max(0.0, 1 - BESIDE * words_beside(answer, gold, question)), score, away
    if score["exact"]:
        return 1.0, score, away
    apart, wanted = spread(answer), spread(gold)
    score_apart = score_answer(apart, wanted, answer_type, question)
    return score_apart["f1"] ** 2 * place_share(apart, wanted) * listed_share(apart, wanted), score, away


def hedged(answer, gold, question=""):
    """The answer leaves a way out, or a second answer, that the gold answer does not have."""
    tokens, allowed = words_and_marks(answer), set(normalise(gold))
    text = " ".join(tokens).replace("no doubt", "").replace("without doubt", "")
    if (HEDGES | OTHER_LANGUAGES) & set(text.split()) - allowed or MARKS.search(answer) and not MARKS.search(gold):
        return True
    if "not" in allowed:
        return False
    unsure = any(f"not {word}" in text for word in NOT_SURE - set(normalise(question)))
    return unsure or "can not" in text and not SEEING & set(tokens)


def words_beside(answer, gold, question):
    """How many words of a closed answer are beside it: see above."""
    others = [word for word in normalise(answer) if word not in {*normalise(gold), *normalise(question)}]
    plain = sum(word in PLAIN for word in others)
    return len(others) - plain + max(0, plain - 6)


def spread(text):
    """ "left and right lung", "both lungs" -> "left lung and right lung": both places belong to what follows."""
    place = "|".join(sorted(DIMENSIONS, key=len, reverse=True))
    text = re.sub(r"\b(?:bilateral|both)\b(\s+\w+)?", r"left\1 and right\1", text.lower())
    return re.sub(rf"\b({place}) and ({place})\s+(?!and\b)(\w+)", r"\1 \3 and \2 \3", text)


def listed_share(answer, gold):
    """n / (n + m) where m items of a list have no word of the gold answer's n items: a second candidate, a third."""
    wanted, items = set(normalise(gold)), [normalise(item) for item in re.split(ITEM_ENDS, answer)]
    number = sum(bool(normalise(item)) for item in re.split(ITEM_ENDS, gold))
    beside = sum(bool(set(item) - COMMON) and not set(item) & wanted for item in items)
    return number / (number + beside) if number else 1.0


def places_of(text):
    """-> {dimension: set of (words of the thing, value)}: the places that a text names, and of what."""
    found = {}
    for item in re.split(ITEM_ENDS, text.lower()):
        tokens = normalise(item)
        thing = frozenset(token for token in tokens if token not in DIMENSIONS) - COMMON
        for dimension, values in (DIMENSIONS[token] for token in tokens if token in DIMENSIONS):
            found.setdefault(dimension, set()).update((thing, value) for value in values.split())
    return found


def place_share(answer, gold):
    """0 to 1: how far the places of an open answer are those of the gold answer; 1 where that has none."""
    said, wanted, share = places_of(answer), places_of(gold), 1.0
    for dimension, right in wanted.items():
        mine = said.get(dimension)
        if not mine:
            share *= LEFT_OUT
            continue
        alone = len(right) == len(mine) == 1  # then what the place belongs to is left to the words
        both = sum(any(v == value and (alone or t == thing or t & thing) for t, v in mine) for thing, value in right)
        share *= both / (len(mine) + len(right) - both) if both <= len(mine) else 0.0
    return share
