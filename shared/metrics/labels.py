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
beats uncertain beats negative); wordings and code are our own. Labels say what a text states, not what a film shows.
"""

import re
from functools import lru_cache

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, None  # unknown: the text does not mention it

# Order of the CheXpert CSV, the one used in our files.
CONDITIONS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

LABELLER_ORDER = CONDITIONS[:3] + ("Lung Lesion", "Lung Opacity") + CONDITIONS[5:]
CHEXBERT_ORDER = CONDITIONS[1:] + ("No Finding",)

# The five that CheXpert's leaderboard and most report papers score.
TOP_FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

# What a condition is a kind of (CheXpert's hierarchy). A positive child makes its parent true of the image, but a
# report that says "edema" has not said "opacity": only labels of images are closed upwards, labels of texts are not.
PARENTS = {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    "Lung Lesion": "Lung Opacity",
    "Edema": "Lung Opacity",
    "Consolidation": "Lung Opacity",
    "Pneumonia": "Consolidation",
    "Atelectasis": "Lung Opacity",
}

_SAME_NAME = {
    "enlarged cardiom.": "Enlarged Cardiomediastinum",
    "enlarged mediastinum": "Enlarged Cardiomediastinum",
    "airspace opacity": "Lung Opacity",
    "opacity": "Lung Opacity",
    "lesion": "Lung Lesion",
    "oedema": "Edema",
    "pulmonary edema": "Edema",
    "effusion": "Pleural Effusion",
    "normal": "No Finding",
    "devices": "Support Devices",
}
_SAME_NAME.update({name.lower(): name for name in CONDITIONS})


def condition_name(text):
    """
    Any usual spelling ("pleural_effusion", "Oedema") -> the name in CONDITIONS; ValueError if it is none of the 14.
    """
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


# ---------------------------------------------------------------------------------------------- the labeller's phrases
#
# Regular expressions for lower-case text in which hyphens and slashes are spaces ("right-sided" -> "right sided"). A
# space stands for itself, every phrase starts and ends at a word boundary. Where two phrases start at the same word,
# the one in the earlier table, or earlier in its table, is read.

_SIZE = "mild|moderate|severe|marked|minimal|slight|small|large|trace|tiny|massive|subtle|moderately|mildly|severely|markedly|minimally|slightly"
_TEXTURE = (
    "airspace|air"
    " space|alveolar|interstitial|parenchymal|pulmonary|lung|focal|patchy|hazy|linear|streaky|vague|faint|confluent|ill"
    " defined|increased|increasing|retrocardiac|basilar|bibasilar|perihilar|lower lobe|upper lobe|middle"
    " lobe|reticular|ground glass|bandlike|platelike|opaque"
)
_TUBES = (
    "endotracheal|et|trach|tracheostomy|tracheal|nasogastric|orogastric|nasoenteric|enteric|enteral|feeding|gastric|gastrostomy|peg|ng|og|dobb?hoff|chest|"
    "thoracostomy|thoracic|pleural|pigtail|drainage|intercostal"
)
_LINES = (
    "central|venous|arterial|picc|ij|jugular|subclavian|femoral|dialysis|support|monitoring|intravenous|iv|swan"
    " ganz|ng|et"
)
_BONES = "rib|ribs|clavicle|clavicular|vertebral|vertebra|sternal|humeral|humerus|scapular|scapula|spinal|hip|shoulder"

MENTIONS = {
    "Cardiomegaly": [
        "cardiomegaly",
        "cardiomegalic",
        "heart size (?:is|has|appears) (?:mildly |slightly |moderately )?increased",
        "increased (?:heart|cardiac) size",
        "increase in (?:the )?(?:heart|cardiac) size",
        "increase in (?:the )?size of the (?:heart|cardiac silhouette)",
    ],
    "Lung Lesion": [
        r"nodul(?:e|es)",
        r"nodular (?:opacit\w+|densit\w+|opacification\w*|focus|foci|lesions?|shadow\w*)",
        r"(?:lung|pulmonary|parenchymal|cavitary|spiculated|hilar|perihilar|pleural based|coin) lesions?",
        "mass(?:es)?",
        "masslike",
        r"cavit(?:ary|ation)s?",
        "carcinoma",
        r"neoplas\w+",
        "tumou?rs?",
        r"malignan(?:cy|cies)",
        r"metasta(?:sis|ses|tic)(?: disease| lesions?)?",
    ],
    "Pneumonia": [
        r"(?:broncho|aspiration |atypical |lobar |viral |bacterial )?pneumoni(?:a|as|c)",
        "infections?",
        "infect(?:ious|ive)(?: process| etiology)?",
    ],
    "Lung Opacity": [
        r"opaci(?:t|f)\w+",
        r"infiltrat(?:e|es|ion|ions)",
        r"(?:airspace|air space|alveolar) (?:disease|process)",
        rf"(?:(?:{_TEXTURE}) )+densit(?:y|ies)",
        "areas? of (?:increased )?density",
        (
            r"(?:increased|prominent|coarse|coarsened|accentuated|thickened|reticular|chronic|bronchovascular)(?:"
            r" (?:pulmonary|interstitial|lung|bronchovascular|chronic|bilateral))* (?:markings|pattern)"
        ),
        r"(?:prominence|thickening|coarsening) of the (?:pulmonary |lung )?interstiti\w+",
        r"interstitial (?:prominence|thickening|lung disease|disease|abnormality|changes?|process)",
        r"reticulation\w*",
        "ground glass",
        "white ?out",
    ],
    "Edema": [
        r"(?:pulmonary |interstitial |alveolar )*o?edema",
        r"(?:pulmonary )?(?:vascular|venous) (?:congestion|engorgement)",
        "(?:pulmonary|central) congestion",
        "cephalization",
        "vascular redistribution",
        "(?:fluid|volume) overload",
    ],
    "Consolidation": [r"consolidat\w+"],
    "Atelectasis": [
        r"atelecta\w+",
        "collapse",
        r"collapsed (?:lung|(?:right|left|upper|lower|middle) (?:lung|lobe|upper|lower|middle))",
        "volume loss",
        "loss of volume",
    ],
    "Pneumothorax": [r"(?:hydro|hemo|haemo)?pneumothora(?:x|xes|ces)", "pleural air"],
    "Pleural Effusion": [
        "pleural (?:or|and|and or) pericardial effusions?",
        "pericardial (?:or|and|and or) pleural effusions?",
        "(?:pleural |parapneumonic |subpulmonic )*effusions?",
        r"(?:pleural|loculated|layering) (?!air)(?:\w+ )?(?:fluid|collections?)",
        r"ha?emothora(?:x|ces)",
        "hydrothora(?:x|ces)",
        "empyema",
    ],
    "Pleural Other": [
        r"pleural (?:\w+ )?(?:thickening|plaques?|scar\w*|fibrosis|calcifications?|abnormality|disease|tags?)",
        r"pleuro ?parenchymal (?:scar\w*|thickening)",
        r"thickening of the (?:\w+ )?pleura",
        r"calcified pleura\w*",
        r"(?:bi)?apical (?:pleural )?(?:thickening|cap\w*)",
        "fibrothorax",
    ],
    "Fracture": [
        rf"(?:(?:{_BONES}|compression|wedge|stress) )*fractur(?:e|es|ed)",
        r"compression deformit\w+",
        rf"(?:{_BONES}) deformit\w+",
    ],
    "Support Devices": [
        rf"(?:{_TUBES}) (?:tip )?(?:tubes?|catheters?|drains?)",
        "tubes?",
        "ett",
        "dobb?hoff",
        "catheters?",
        "cannulas?",
        rf"(?:{_LINES}) (?:\w+ )?lines?",
        r"lines?(?= (?:and|or) tubes?)",
        "picc",
        "port a cath",
        "portacath",
        "mediport",
        r"(?:infusion|chest wall|chest) port",
        "swan ganz",
        "pacemakers?",
        "pacers?",
        "pacing",
        r"defibrillators?",
        "a?icd",
        "leads?",
        "balloon pump",
        "lvad",
        "stents?",
        "drains?",
        "pigtail",
        "tracheostomy",
        "thoracostomy",
        r"prosthetic (?:\w+ )?valve",
        r"valve (?:replacement|prosthesis)",
        r"(?:sternal|sternotomy|cerclage) wires",
        "hardware",
        r"(?:support|monitoring|assist|pacing|electronic|implanted) (?:\w+ )?devices?",
        "(?:nerve )?stimulator",
        "arthroplasty",
    ],
}

# Contain the words of a mention and are none; read before the mentions.
UNMENTIONS = [
    "pericardial (?:fluid|effusions?)",
    "joint effusions?",
    r"(?:soft tissue|subcutaneous|chest wall|peripheral|leg) o?edema",
    "mass effect",
    "body mass",
    r"calcified (?:\w+ )?(?:nodul\w+|mass\w*|opacit\w+|densit\w+)",
    r"(?:bone|bony|osseous|lytic|sclerotic|blastic|skeletal|vertebral) (?:\w+ )?(?:lesions?|mass\w*|metasta\w+)",
    r"(?:soft tissue|abdominal|breast|thyroid|adrenal) (?:mass\w*|nodul\w+)",
    r"radio ?opa\w+",
    "bone density",
    "opacified (?:bowel|stomach)",
    r"collapsed (?:esophagus|stomach)",
    r"(?:right|left) (?:atri|ventric)\w+ leads? of",
    "heart (?:rate|disease|transplant|valve|border)",
    "(?:right|left) heart(?: border)?",
    "post infectious",
    "(?:granulomatous|prior|previous|old|remote|tuberculous|tuberculosis) infection",
    "(?:vertebral|vertebral body|endplate|subchondral|compression) collapse",
]

# Heart failure says nothing about the size of the heart but makes a large one likely: uncertain, as the CheXpert
# labeller has it.
FAILURE = ["(?:congestive )?(?:heart|cardiac) (?:failure|decompensation)", "chf"]

# Abnormal, and none of the 13: a report that states one of these has findings.
OTHERS = [
    r"emphysema\w*",
    "copd",
    "chronic obstructive",
    r"bull(?:a|ae|ous)",
    r"(?:dextro|levo)?scolio\w+",
    r"kypho\w+",
    r"degenerat\w+",
    r"spondylo\w+",
    r"osteophyt\w+",
    r"calcif\w+",
    r"granuloma\w*",
    r"hernia\w*",
    "blunt(?:ed|ing)",
    r"scar(?:s|red|ring)?",
]

# Anatomy that is called normal or enlarged -> the conditions meant; none: read so that its "normal" is not taken for
# the heart's.
_PARTS = "(?:contours?|silhouettes?|structures?|shadows?|borders?|outlines?|margins?|size|width)"
ANATOMY = {
    ("Cardiomegaly", "Enlarged Cardiomediastinum"): [
        rf"(?:heart|cardiac)(?: size| silhouette)?,?(?: hilar,?)? and (?:the )?mediastin\w+(?: {_PARTS})*",
        rf"mediastin\w+ and (?:cardiac|heart)(?: {_PARTS})*",
        rf"cardiac, mediastinal,?(?: and \w+)?(?: {_PARTS})*",
    ],
    ("Enlarged Cardiomediastinum",): [
        rf"cardio ?mediastin\w+(?: and hilar)?(?: {_PARTS})*",
        rf"(?:hilar and |superior |upper )?mediastinal(?: and hilar|, hilar)? {_PARTS}",
        "(?:superior |upper )?mediastinum",
        "mediastinal(?= (?:widening|enlargement))",
    ],
    ("Cardiomegaly",): [
        rf"heart(?: {_PARTS})?",
        rf"cardiac(?: and \w+)? {_PARTS}",
        "cardiac(?= enlargement)",
        "cardio ?pericardial silhouette",
    ],
    (): [
        "lungs?(?: fields?| volumes?)?",
        r"hil(?:um|a|i|ar)",
        "aorta",
        "aortic",
        r"pulmonary (?:arter\w+|vascula\w+|vessels?|vein\w*|hila\w*)",
        r"vascula\w+",
        "vessels",
        r"bon(?:e|es|y)",
        r"osseous",
        r"skelet\w+",
        r"pleura\w*",
        "soft tissues?",
        r"trachea\w*",
        r"(?:hemi)?diaphragms?",
        r"thyroid\w*",
        r"atri\w+",
        r"ventricul\w+",
        "ribs?",
        "spine",
        "azygos",
    ],
}
ENLARGED = [
    "enlarged",
    "enlargement(?: of)?",
    "widened",
    "widening(?: of)?",
    "dilated",
    "large(?= (?:heart|cardiac))",
    "large(?=$|,| and| but| with)",
]
PROMINENT = ["prominent", "prominence(?: of)?", "fullness(?: of)?"]  # said of the heart or mediastinum: uncertain
NORMAL = [
    "(?:at |near )?(?:the )?upper limits? of normal",
    "(?:top|high|upper|upper limit)(?: of)? normal",
    "normal",
    "unremarkable",
    r"within (?:\w+ )?limits",
    "not enlarged",
]

# Look like a negation or an uncertainty and are none.
KEEP = [
    (
        r"no (?:other |further |significant |appreciable |interval |substantial |relevant |major |new"
        r" )*(?:change|changes|increase|decrease|improvement|worsening|progression|difference)(?: in| of| from)?"
    ),
    r"without (?:significant |interval |substantial )*(?:change|worsening|increase)",
    r"not (?:significantly |substantially |appreciably )*(?:changed|different|increased|decreased|worsened|improved)",
    "not only",
    "not necessarily",
    "no doubt",
    r"(?:near complete|near total|partial|incomplete) (?:resolution|clearing)(?: of)?",
    r"(?:nearly|almost|partially|partly|largely|mostly)(?: completely)? (?:resolved|cleared)",
    r"not (?:completely |fully |entirely |yet )*(?:resolved|cleared)",
    "(?:consistent|compatible|in keeping) with",
]
IGNORE = [  # what follows is looked for, remembered or feared, not described
    r"(?:evaluat\w+|assess\w*|look\w*|check|screen\w*) for",
    r"(?:sensitivity|difficult|hard|unable|able)(?: \w+)? to (?:detect|assess|evaluate)",
    r"(?:sensitivity|sensitive) for",
    "rule out",
    "r o",
    r"history of",
    r"known history of",
    r"(?:evaluation|assessment|detection) of",
    r"(?:treatment|treated|therapy) (?:for|of)",
    r"if (?:there is|clinical\w*|concern|symptoms)",
    "risk (?:of|for)",
    r"to (?:document|ensure|confirm|exclude)",
]
IGNORE_REST = [
    r"recommend\w*",
    "follow ?up",
    "advised",
    r"correlat(?:e|ion)",
    "please note",
]  # all that follows in the sentence

UNSURE = [  # doubts all that follows, until something ends it
    r"(?:can ?not|can't|could not|not)(?: \w+){0,2} (?:exclude|rule out)(?: \w+ of)?",
    r"(?:difficult|hard|unable|impossible) to(?: \w+)? exclude(?! *(?:$|,|and|given|on|in))",
    "not diagnostic of",
    "either",
    r"if any(?:, there (?:is|are))?",
    r"if present(?:, there (?:is|are))?",
    r"(?:possibly|probably|presumably|perhaps|potentially) (?:due to|related to|secondary to|from|in the setting of)",
    (
        r"(?:may|might|could|would|can)(?: \w+){0,2}? (?:be (?:\w+ )?(?:secondary to|due to|related to|in the setting"
        r" of|from)|be|represent|reflect|indicate|suggest|relate|correspond|have|contain)"
    ),
    "may",
    "might",
    "could",
    "possibility of",
    r"question of",
    r"suspicious (?:for|of)",
    "suspicion (?:for|of)",
    r"(?:concerning|worrisome) for",
    r"concern(?:ed)? (?:for|of|about)",
    r"suggest\w*(?: of)?",
    r"rais\w+ (?:the )?(?:possibility|question|concern)(?: of| for)?",
    r"(?:most )?likely (?:represent\w*|reflect\w*|due to|related to|to be|to represent|secondary to)",
    r"differential (?:\w+ ){0,3}?includ\w+",
    "versus",
    "vs",
    r"unlikely(?: to (?:be|represent|reflect))?",
    r"favou?r\w*(?: to (?:be|represent|reflect))?",
    "cannot be (?:differentiated|distinguished) from",
]
UNSURE_NEXT = [  # doubts the next finding
    "possibl[ey]",
    "probabl[ey]",
    "questionable",
    "question",
    "suspect(?:ed)?",
    "equivocal",
    "borderline",
    r"presum(?:ed|ably|ptive)",
    "perhaps",
    "(?:most |less |more )?likely",
    "potentially",
    "apparent",
]
UNSURE_BACK = [  # doubts what was just named
    r"(?:(?:can ?not|can't|could not|is not|are not|not)(?: \w+){0,3} (?:excluded|ruled out))",
    (
        r"(?:(?:is|are|would be|remains?) )?(?:\w+ )?(?:difficult|hard|impossible) to (?:\w+ )?exclude(?=$|,| and|"
        r" given| on| in)"
    ),
    (
        r"(?:is|are|was|were|remains?) (?:also |thought |felt |another )*(?:a"
        r" )?(?:possible|possibility|suspected|presumed|questioned|questionable|likely|probable|unlikely|less"
        r" likely|consideration|in the differential|considered|equivocal)(?=$|,| and| but| given| though| as| in| on|"
        r" at| because)"
    ),
    r"(?:should|could|may|might|must) (?:also )?be (?:considered|present)",
    "likely(?=$|,)",
    "suspected(?=$|,)",
]
ABSENT_BACK = [  # denies what was just named
    (
        r"(?:(?:is|are|was|were|has|have|been|since|now|also|completely|entirely|interval)"
        r" )+(?:resolved|cleared|disappeared|removed|absent|ruled out)"
    ),
    r"(?:resolved|removed|absent|cleared)(?=$|,| and)",
    (
        r"(?:(?:is|are|was|were|has|have) )?(?:no longer|not)(?: \w+)?"
        r" (?:seen|identified|evident|present|visuali[sz]ed|appreciated|demonstrated|detected|apparent|noted|found|visible)"
    ),
    r"can ?not be (?:seen|identified|appreciated)",
    ": (?:none|no|absent|negative|nil)(?=$|,)",
    "removal(?! of)",
    "resolution(?! of)",
]
ABSENT = [  # denies all that follows, until something ends it
    r"(?:no|not|without)(?: \w+){0,3}? (?:evidence|signs?|indications?|suggestion|suspicion)(?: of| for| to suggest)?",
    "resolution of",
    "resolved",
    "removal of",
    "absence of",
    "absent",
    "lack of",
    "negative for",
    "free of",
    "clear of",
    "without",
    "no longer",
    "no",
    "nor",
    "neither",
    "not",
    "never",
    "rather than",
    "instead of",
    "denies",
]
STOP = [  # ends whatever is open
    "but",
    "however",
    "although",
    "though",
    "except",
    "aside from",
    "apart from",
    "other than",
    "yet",
    "otherwise",
    "which",
    "while",
    "whereas",
    "because",
    "since",
    "with",
    "after",
    "following",
    "status post",
    "s p",
    r"there (?:is|are|has|have|was|were|continues|remains)",
    "there(?= may)",
    r"(?:and|,) (?:the|there|a|an|this|these)",
    "in the setting of",
    "due to",
    "secondary to",
    ":",
    "still",
    "again",
]
VERBS = [
    "is",
    "are",
    "was",
    "were",
    "has",
    "have",
    "remains?",
    "appears?",
    r"measur\w+",
    "shows?",
    "demonstrates?",
    "continues?",
    "projects?",
    "noted",
    "seen",
    "identified",
]
# After a comma or "and", these start a new statement: "no effusion, stable cardiomegaly".
NEW = rf"(?:{_SIZE}|suggest\w*|likely|probabl[ey]|possibl[ey]|consistent|compatible|stable|unchanged|persistent|new|increased|increasing|decreased|decreasing|improving|improved|worsening|low|right|left|bilateral|bibasilar|chronic|old|healed|scattered|multiple|some|prominent)\b"

# ----------------------------------------------------------------------------------------------------- the labeller

# Headed parts of a report that are not read: up to the next header, or their first sentence only.
WHY = r"(?:clinical (?:history|indication|information|data)|indications?|history|reason for (?:\w+ )?\w+)"
HOW = r"(?:technique|comparisons?|exam(?:ination)?|procedure)"


@lru_cache(maxsize=1)
def _matchers():
    """
    First letter -> (match function of all phrases that can start with it, kind of each group). Compiled at first use.
    """
    tables = [
        ("unmention", UNMENTIONS),
        ("keep", KEEP),
        ("unsure back", UNSURE_BACK),
        ("absent back", ABSENT_BACK),
        ("ignore rest", IGNORE_REST),
        ("ignore", IGNORE),
    ]
    tables += [
        ("unsure", UNSURE),
        ("unsure next", UNSURE_NEXT),
        ("normal", NORMAL),
        ("absent", ABSENT),
        ("failure", FAILURE),
    ]
    tables += [(("mention", name), phrases) for name, phrases in MENTIONS.items()] + [("others", OTHERS)]
    tables += [(("anatomy", names), phrases) for names, phrases in ANATOMY.items()]
    tables += [
        ("enlarged", ENLARGED),
        ("prominent", PROMINENT),
        ("stop", STOP),
        ("verb", VERBS),
        ("comma", [",", "and"]),
    ]
    by_letter = {}
    for kind, phrases in tables:
        kind = kind if isinstance(kind, tuple) else (kind, None)
        for phrase in phrases:
            for letter in _first_letters(phrase):
                by_letter.setdefault(letter, []).append(
                    (f"{phrase}()", kind)
                )  # the empty group tells which phrase it was
    return {
        letter: (
            re.compile(rf"(?:{'|'.join(phrase for phrase, _ in found)})(?:(?<=[,:])|(?!\w))").match,
            [None] + [kind for _, kind in found],
        )
        for letter, found in by_letter.items()
    }


def _alternatives(pattern):
    """Cut at the | outside brackets."""
    depth, parts = 0, [""]
    for letter in pattern:
        depth += (letter == "(") - (letter == ")")
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _first_letters(pattern):
    """The letters a phrase can start with, so that a word is compared with a tenth of the phrases."""
    if not pattern:
        return set()
    parts = _alternatives(pattern)
    if len(parts) > 1:
        return set().union(*map(_first_letters, parts))
    if pattern.startswith("(?:"):
        depth = end = 0
        while depth or not end:  # to the bracket that closes the first one
            depth += (pattern[end] == "(") - (pattern[end] == ")")
            end += 1
        inside, after = pattern[3 : end - 1], pattern[end:]
        return _first_letters(inside) | (_first_letters(after[1:]) if after[:1] in ("?", "*") else set())
    return {pattern[0]} | (_first_letters(pattern[2:]) if pattern[1:2] == "?" else set())


_WORD = re.compile(r"\w+|[,:]")


def _tokens(sentence):
    """-> [(kind, what, start, end)] of the phrases found, from left to right."""
    matchers, tokens, end = _matchers(), [], 0
    for word in _WORD.finditer(sentence):
        start = word.start()
        if start < end:
            continue
        match, kinds = matchers.get(sentence[start], (None, None))
        found = match(sentence, start) if match else None
        if found:
            end = found.end()
            tokens.append((*kinds[found.lastindex], start, end))
    return tokens


_NEW = re.compile(rf"(?:,(?: and)?|and) (?:{NEW})")
_LINK = re.compile(
    r"(?: (?:size|shape|contour|configuration|appearance|caliber|position|and|of|in|the))* "
)  # "normal size of the heart"
_OR = re.compile(r"\b(?:or|nor)\b")


class _Scope:
    """
    What is open while a sentence is read from left to right: one denial, one doubt, one that says "not described".
    """

    __slots__ = ("cue", "used", "short")

    def __init__(self):
        self.cue, self.used, self.short = None, False, False

    def open(self, cue, short=False):
        self.cue, self.used, self.short = cue, False, short

    def close(self):
        self.cue = None


@lru_cache(maxsize=65536)
def _read_sentence(sentence):
    """
    -> tuple of (condition, label, rule, start, end, cue start, cue end); label None: mentioned, but nothing is said of
    it.
    """
    tokens = _tokens(sentence)
    last_or = max((found.start() for found in _OR.finditer(sentence)), default=-1)
    spans = []
    denial, doubt, silence = _Scope(), _Scope(), _Scope()
    scopes = (denial, doubt, silence)
    recent, list_start = [], 0  # places in spans since the last stop; the first of them after the last comma or "and"
    anatomy, verb_seen, claimed = [], False, -1  # anatomy waiting for its "normal" or "enlarged"
    comma_at = -1

    def mention(condition, start, end, positive=POSITIVE, rule="mention"):
        span = [condition, positive, rule, start, end, None, None]
        device = condition == "Support Devices"
        if silence.cue:
            span[1], span[2], span[5:] = None, "not described", silence.cue
        elif denial.cue and not (device and denial.used and comma_at > max(last_or, denial.cue[1])):
            span[1], span[2], span[5:] = NEGATIVE, "negation", denial.cue
        elif doubt.cue:
            span[1], span[2], span[5:] = UNCERTAIN, "uncertainty", doubt.cue
        for scope in scopes:
            scope.used = True
        recent.append(len(spans))
        spans.append(span)

    def state(i, start, end, value):
        """A "normal" or "enlarged": of the anatomy right behind it, else of the anatomy before it."""
        nonlocal anatomy, claimed
        j = i + 1
        behind = (
            j < len(tokens)
            and tokens[j][0] == "anatomy"
            and _LINK.fullmatch(sentence, end, tokens[j][2])
            and not sentence.startswith("within", start)
        )
        if behind and anatomy and verb_seen and tokens[j + 1 : j + 2] and tokens[j + 1][0] == "verb":
            behind = False  # a full stop is missing: "the heart is normal the lungs are clear"
        if behind:
            first = start
            while j < len(tokens) and tokens[j][0] in ("anatomy", "comma"):
                j += 1
            found = [k for k in range(i + 1, j) if tokens[k][0] == "anatomy"]
            if len(found) > 1 and j < len(tokens) and tokens[j][0] in ("verb", "normal", "enlarged"):
                found.pop()  # "normal heart size and the lungs are ...": the last one belongs to what follows
            claimed = found[-1]
            end = tokens[claimed][3]
            names = [name for k in found for name in tokens[k][1]]
        else:
            names = [name for what, _ in anatomy for name in what]
            first = anatomy[0][1] if anatomy else start
            anatomy = []
        for name in dict.fromkeys(names):
            if value == NEGATIVE:
                spans.append([name, NEGATIVE, "normal anatomy", first, end, None, None])
            else:
                mention(name, first, end, value, "enlarged anatomy")

    for i, (kind, what, start, end) in enumerate(tokens):
        if kind == "mention":
            mention(what, start, end)
            if verb_seen:
                anatomy = []
        elif kind == "anatomy":
            if i > claimed:
                if verb_seen:
                    anatomy, verb_seen = [], False
                anatomy.append((what, start))
        elif kind == "enlarged":
            state(i, start, end, POSITIVE)
        elif kind == "prominent":
            state(i, start, end, UNCERTAIN)
        elif kind == "normal":
            if sentence.startswith("within", start) and not (i + 1 < len(tokens) and tokens[i + 1][0] == "anatomy"):
                _deny_back(spans, recent[list_start:], start, end)
            state(i, start, end, NEGATIVE)
        elif kind == "failure":
            if not denial.cue and not silence.cue:
                mention("Cardiomegaly", start, end, UNCERTAIN, "heart failure")
        elif kind == "others":
            mention("other", start, end)
        elif kind == "absent":
            denial.open((start, end))
        elif kind == "unsure":
            doubt.open((start, end))
            if sentence.startswith(("versus", "vs", "if "), start):  # doubts what was named before it, too
                _doubt_back(spans, recent[-1:], start, end)
        elif kind == "unsure next":
            doubt.open((start, end), short=True)
        elif kind == "ignore" or kind == "ignore rest":
            silence.open((start, end), short=kind == "ignore")
        elif kind == "unsure back" or kind == "absent back":
            # "edema, effusion or pneumonia cannot be excluded", "A and B are not seen": the whole list; else its last
            # part
            whole = sentence.startswith(("are ", "were ", "have "), start) or (recent and last_or > spans[recent[0]][3])
            targets = recent if whole else recent[list_start:]
            if kind == "unsure back":
                _doubt_back(spans, targets, start, end)
            else:
                tip = "tip" in sentence[:start]  # "the tip of the tube is not seen": the tube is there
                _deny_back(spans, [k for k in targets if not (tip and spans[k][0] == "Support Devices")], start, end)
        elif kind == "comma":
            comma_at = start
            list_start = len(recent)
            if doubt.short and doubt.used and start > last_or:
                doubt.close()
            if start > last_or and _NEW.match(sentence, start):
                for scope in scopes:
                    scope.close()
                recent, list_start = [], 0
        elif kind == "verb":
            verb_seen = bool(anatomy)
            for scope in scopes:
                if scope.used and not (scope is silence and not scope.short):
                    scope.close()
        elif kind == "stop":
            denial.close()
            doubt.close()
            if silence.short:
                silence.close()
            recent, list_start = [], 0
    # "Heart size is borderline": the word doubts a large heart even where it stands alone
    if "borderline" in sentence and not any(span[0] == "Cardiomegaly" for span in spans):
        for kind, what, start, end in tokens:
            if kind == "anatomy" and "Cardiomegaly" in what:
                cue = sentence.index("borderline")
                spans.append(["Cardiomegaly", UNCERTAIN, "uncertainty", start, end, cue, cue + len("borderline")])
    return tuple(map(tuple, spans))


def _deny_back(spans, targets, start, end):
    for k in targets:
        if spans[k][1] is not None:
            spans[k][1], spans[k][2], spans[k][5:] = NEGATIVE, "negation", (start, end)


def _doubt_back(spans, targets, start, end):
    for k in targets:
        if spans[k][1] == POSITIVE:
            spans[k][1], spans[k][2], spans[k][5:] = UNCERTAIN, "uncertainty", (start, end)


_HEADER = re.compile(rf"\b(?:(?P<why>{WHY}) ?:|(?P<how>{HOW}) ?:|wet read|final report|[a-z]\w+\)? ?:)(?= |$)")
_END = re.compile(r"(?<!\bvs)\.(?!\d)|[;!?]")
_RANK = {None: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
_FLAT = str.maketrans({c: " " for c in "-/\u2010\u2011\u2012\u2013\u2014_"})


def _sentences(text):
    """
    Flattened text -> (start, end) of the sentences; sections that say why and how the film was taken are left out.
    """
    skip = []
    if ":" in text:
        headers = list(_HEADER.finditer(text))
        for header, following in zip(headers, headers[1:] + [None], strict=False):
            if header["why"] or header["how"]:
                sentence = _END.search(text, header.end())
                ends = [sentence.end() if sentence else len(text), following.start() if following else len(text)]
                skip.append((header.start(), min(ends) if header["how"] or not following else ends[1]))
    pieces, at = [], 0
    for start, stop in skip:
        pieces.append((at, start))
        at = stop
    pieces.append((at, len(text)))
    for piece_start, piece_end in pieces:
        start = piece_start
        for found in _END.finditer(text, piece_start, piece_end):
            yield start, found.start()
            start = found.end()
        yield start, piece_end


def label_report(text, evidence=False):
    """
    text: a report, or any part of one -> {condition: 1 stated, 0 denied, -1 doubted, None not mentioned}, the 14 in
    order.

    Among several mentions 1 beats -1 beats 0. No Finding is 1 when none of the other 13 but Support Devices, nor
    another abnormality (OTHERS), is stated or doubted, else None; a text without a word has no labels at all. Sections
    headed "Indication:" or "History:" are not read, nor is the first sentence after "Technique:", "Examination:" or
    "Comparison:".

    evidence=True -> (labels, spans); a span is a dict with condition ("other": one of OTHERS), label (None: mentioned,
    not described), rule, start, end, text (the mention, in characters of `text`), cue, cue_start, cue_end (the word
    that denies or doubts it, or None).
    """
    if not isinstance(text, str):
        raise TypeError(f"label_report reads a text, got {type(text).__name__}")
    flat, places = _flatten(text, evidence)
    labels = dict.fromkeys(CONDITIONS, UNKNOWN)
    spans, abnormal = [], False
    for start, end in _sentences(flat):
        while start < end and flat[start] == " ":
            start += 1
        if start == end:
            continue
        for name, label, rule, first, last, cue_first, cue_last in _read_sentence(flat[start:end].rstrip()):
            if label == POSITIVE or label == UNCERTAIN:
                abnormal = abnormal or name != "Support Devices"
            if name != "other" and _RANK[label] > _RANK[labels[name]]:
                labels[name] = label
            if evidence:
                spans.append(
                    _span(
                        text,
                        places,
                        name,
                        label,
                        rule,
                        (start + first, start + last),
                        cue_first is not None and (start + cue_first, start + cue_last),
                    )
                )
    if not abnormal and any(map(str.isalpha, flat)):
        labels["No Finding"] = POSITIVE
        if evidence:
            spans.append(
                dict(
                    condition="No Finding",
                    label=POSITIVE,
                    rule="nothing abnormal stated or doubted",
                    start=0,
                    end=len(text),
                    text=text,
                    cue=None,
                    cue_start=None,
                    cue_end=None,
                )
            )
    return (labels, spans) if evidence else labels


def _flatten(text, with_places):
    """
    -> the text in lower case, one space between words, hyphens and slashes as spaces; where its letters stood (or
    None).
    """
    low = text.lower()
    if len(low) != len(text):  # a few letters grow in lower case, which would move what follows
        low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    low = low.translate(_FLAT)
    if not with_places:
        return " ".join(low.split()), None
    places, words = [], []
    for word in re.finditer(r"\S+", low):
        words.append(word.group())
        places += range(word.start(), word.end() + 1)  # the space behind it counts as its own
    return " ".join(words), places


def _span(text, places, name, label, rule, mention, cue):
    def where(span):
        return (places[span[0]], places[span[1] - 1] + 1) if span else (None, None)

    start, end = where(mention)
    cue_start, cue_end = where(cue)
    return dict(
        condition=name,
        label=label,
        rule=rule,
        start=start,
        end=end,
        text=text[start:end],
        cue=text[cue_start:cue_end] if cue else None,
        cue_start=cue_start,
        cue_end=cue_end,
    )
