"""
The words of the phantom: reports that state labels, and questions with paraphrases.

Every sentence carries the labels it states, and a report's labels are those of its sentences put together, so text and
labels cannot drift apart. Labels of a text follow the CheXpert labeller (Irvin et al. 2019): 1 stated, 0 denied, -1
suspected, None not mentioned; among several mentions positive wins, then suspected, then denied. "Patchy opacity,
consistent with pneumonia" states Lung Opacity and Pneumonia, and says nothing about Consolidation, whatever was drawn:
what the image shows is Study.labels. "No Finding" is 1 when no other condition but Support Devices is stated or
suspected, else None, as that labeller writes it.

Wordings are our own. We keep away from phrases whose label is a matter of taste ("lungs are clear" alone,
"cardiomediastinal silhouette", "costophrenic angles are sharp"), so a labeller can be held to all of them.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from dataclasses import dataclass, field

from shared.metrics.labels import CONDITIONS, NEGATIVE, PARENTS, POSITIVE, UNCERTAIN

C, ECM = "Cardiomegaly", "Enlarged Cardiomediastinum"
OPA, LES, EDE, CON, PNE, ATE = "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"
PTX, EFF, PLE = "Pneumothorax", "Pleural Effusion", "Pleural Other"
FRA, DEV = "Fracture", "Support Devices"

SIZES = {"mild": "small", "moderate": "moderate", "severe": "large", "": ""}
ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely", "": ""}

# Kind of finding -> sentences. {loc} "right lower lung zone", {side}, {size} small/moderate/large, {sev}
# mild/moderate/severe, {adv} mildly..., {cm} centimetres, {rib} sixth. A sentence without a label dict states its own
# condition as positive.
STATED = {
    "large heart": [
        "The heart is {adv} enlarged.",
        "There is {sev} cardiomegaly.",
        "{sev} enlargement of the cardiac silhouette.",
        "Heart size is {adv} enlarged.",
        "The cardiac silhouette is {adv} enlarged.",
        "{sev} cardiomegaly is present.",
    ],
    "wide mediastinum": [
        "The mediastinum is {adv} widened.",
        "There is {sev} widening of the mediastinum.",
        "Widened mediastinal contour.",
        "The superior mediastinum is {adv} widened.",
    ],
    "effusion": [
        "There is a {size} {side} pleural effusion.",
        "{size} {side} pleural effusion.",
        "Blunting of the {side} costophrenic angle, consistent with a {size} pleural effusion.",
        "A {size} pleural effusion is present on the {side}.",
        "There is a {size} amount of pleural fluid on the {side}.",
    ],
    "pneumothorax": [
        "There is a {size} {side} pneumothorax.",
        "{size} {side} pneumothorax, with a visible visceral line.",
        "A {size} pneumothorax is seen on the {side}.",
        "{side}-sided pneumothorax, {size} in size.",
    ],
    "consolidation": [
        "There is {sev} consolidation in the {loc}.",
        "Consolidation is present in the {loc}, with air bronchograms.",
        "{sev} consolidation of the {loc}.",
        "The {loc} is consolidated.",
    ],
    "pneumonia": [
        ("Patchy airspace opacity in the {loc}, consistent with pneumonia.", {OPA: POSITIVE, PNE: POSITIVE}),
        ("Consolidation in the {loc}, compatible with pneumonia.", {CON: POSITIVE, PNE: POSITIVE}),
        "There is pneumonia in the {loc}.",
        "Findings consistent with {sev} pneumonia in the {loc}.",
        ("There is a patchy infiltrate in the {loc}, in keeping with pneumonia.", {OPA: POSITIVE, PNE: POSITIVE}),
    ],
    "opacity": [
        "There is a hazy opacity in the {loc}.",
        "{sev} ill-defined opacity in the {loc}.",
        "Faint airspace opacity is seen in the {loc}.",
        "There is a hazy infiltrate in the {loc}.",
        "An opacity projects over the {loc}.",
    ],
    "nodule": [
        "There is a {cm} cm nodule in the {loc}.",
        "{size} nodule in the {loc}.",
        "A rounded nodule of {cm} cm projects over the {loc}.",
        "A solitary pulmonary nodule is seen in the {loc}.",
    ],
    "mass": [
        "There is a {cm} cm mass in the {loc}.",
        "A large mass is seen in the {loc}.",
        "Rounded mass in the {loc}, measuring {cm} cm.",
        "A {cm} cm lung mass projects over the {loc}.",
    ],
    "edema": [
        "There is {sev} pulmonary edema.",
        "Findings consistent with {sev} pulmonary edema.",
        "{sev} interstitial pulmonary edema with septal lines.",
        "Indistinct pulmonary vessels, consistent with {sev} edema.",
    ],
    "plate atelectasis": [
        "There is platelike atelectasis in the {loc}.",
        "Linear atelectasis in the {loc}, with slight elevation of the {side} hemidiaphragm.",
        "Bands of subsegmental atelectasis are seen in the {loc}.",
        "{sev} atelectasis in the {loc}.",
    ],
    "lower lobe collapse": [
        "There is collapse of the {side} lower lobe.",
        "{side} lower lobe atelectasis with volume loss.",
        "Atelectasis of the {side} lower lobe, with an elevated hemidiaphragm.",
        "{sev} atelectasis of the {side} lower lobe.",
    ],
    "upper lobe collapse": [
        "There is collapse of the {side} upper lobe.",
        "{side} upper lobe atelectasis with volume loss.",
        "{side} upper lobe collapse, with the fissure pulled upwards.",
        "{sev} atelectasis of the {side} upper lobe.",
    ],
    "thickening": [
        "There is {where} pleural thickening on the {side}.",
        "{sev} {where} pleural thickening on the {side}.",
        "{side} {where} pleural thickening.",
    ],
    "rib fracture": [
        "There is a displaced fracture of the {side} {rib} rib.",
        "Displaced {side} {rib} rib fracture.",
        "Fracture of the {rib} rib on the {side}, with a step at the margin.",
        "A fracture is seen in the {side} {rib} rib.",
    ],
    "endotracheal tube": [
        "An endotracheal tube is in place, with its tip above the carina.",
        "Endotracheal tube in standard position.",
        "The tip of the endotracheal tube lies above the carina.",
    ],
    "nasogastric tube": [
        "A nasogastric tube passes below the diaphragm.",
        "Nasogastric tube with its tip in the stomach.",
        "An enteric tube ends in the stomach.",
    ],
    "central venous catheter": [
        "A {side} central venous catheter ends in the superior vena cava.",
        "{side} central line in place.",
        "The tip of the {side} central venous catheter projects over the superior vena cava.",
    ],
    "chest tube": [
        "A {side} chest tube is in place.",
        "{side} thoracostomy tube, directed towards the apex.",
        "There is a chest tube on the {side}.",
    ],
    "pacemaker": [
        "A {side} chest wall pacemaker is present, with leads in the right heart.",
        "{side}-sided pacemaker.",
        "There is a pacemaker with its generator on the {side}.",
    ],
}

SUSPECTED = {
    "large heart": [
        "The heart may be {adv} enlarged.",
        "Possible {sev} cardiomegaly.",
        "Cardiomegaly cannot be excluded.",
    ],
    "wide mediastinum": [
        "The mediastinum may be widened.",
        "Possible widening of the mediastinum.",
        "Mediastinal widening cannot be excluded.",
    ],
    "effusion": [
        "Possible {size} {side} pleural effusion.",
        "A {size} {side} pleural effusion cannot be excluded.",
        "Blunting of the {side} costophrenic angle may represent a {size} pleural effusion.",
    ],
    "pneumothorax": [
        "Possible {size} {side} pneumothorax.",
        "A {size} {side} pneumothorax cannot be excluded.",
        "A line at the {side} apex may represent a pneumothorax.",
    ],
    "consolidation": [
        "Possible consolidation in the {loc}.",
        "Consolidation in the {loc} cannot be excluded.",
        "There may be consolidation in the {loc}.",
    ],
    "pneumonia": [
        "Possible pneumonia in the {loc}.",
        "Pneumonia in the {loc} cannot be excluded.",
        "Findings in the {loc} may represent pneumonia.",
        ("There is a patchy opacity in the {loc}. This may represent pneumonia.", {OPA: POSITIVE, PNE: UNCERTAIN}),
    ],
    "opacity": [
        "Possible faint opacity in the {loc}.",
        "There may be a hazy opacity in the {loc}.",
        "Questionable opacity in the {loc}.",
    ],
    "nodule": [
        "Possible nodule in the {loc}.",
        "A nodule in the {loc} cannot be excluded.",
        "Questionable {cm} cm nodule in the {loc}.",
    ],
    "mass": [
        "Possible mass in the {loc}.",
        "A mass in the {loc} cannot be excluded.",
        "There may be a mass in the {loc}.",
    ],
    "edema": [
        "Possible {sev} pulmonary edema.",
        "{sev} pulmonary edema cannot be excluded.",
        "Prominent vessels may represent {sev} pulmonary edema.",
    ],
    "plate atelectasis": [
        "Streaky lines in the {loc} may represent atelectasis.",
        "Possible atelectasis in the {loc}.",
    ],
    "lower lobe collapse": [
        "Possible {side} lower lobe atelectasis.",
        "{side} lower lobe collapse cannot be excluded.",
    ],
    "upper lobe collapse": [
        "Possible {side} upper lobe atelectasis.",
        "{side} upper lobe collapse cannot be excluded.",
    ],
    "thickening": [
        "Possible {where} pleural thickening on the {side}.",
        "There may be {where} pleural thickening on the {side}.",
    ],
    "rib fracture": [
        "Possible fracture of the {side} {rib} rib.",
        "A fracture of the {side} {rib} rib cannot be excluded.",
    ],
}

# What an earlier film of the same patient showed already, and what it showed that is gone.
UNCHANGED = {
    "large heart": ["Stable {sev} cardiomegaly.", "The heart remains {adv} enlarged.", "Unchanged {sev} cardiomegaly."],
    "wide mediastinum": ["The mediastinum remains widened.", "Unchanged widening of the mediastinum."],
    "thickening": ["Unchanged {where} pleural thickening on the {side}.", "Stable {side} {where} pleural thickening."],
    "rib fracture": [
        "Unchanged fracture of the {side} {rib} rib.",
        "Again seen is a fracture of the {side} {rib} rib.",
    ],
}
RESOLVED = {
    EFF: "The {side} pleural effusion has resolved.",
    PTX: "The previously seen {side} pneumothorax has resolved.",
    CON: "The previously seen consolidation has resolved.",
    EDE: "The pulmonary edema has resolved.",
    ATE: "The previously seen atelectasis has resolved.",
}

SUMMARY = {  # short form for the impression; the suspected form puts "Possible" in front
    "large heart": "cardiomegaly",
    "wide mediastinum": "mediastinal widening",
    "effusion": "{side} pleural effusion",
    "pneumothorax": "{side} pneumothorax",
    "consolidation": "consolidation in the {loc}",
    "pneumonia": "pneumonia in the {loc}",
    "opacity": "opacity in the {loc}",
    "nodule": "nodule in the {loc}",
    "mass": "mass in the {loc}",
    "edema": "pulmonary edema",
    "plate atelectasis": "atelectasis in the {loc}",
    "lower lobe collapse": "{side} lower lobe atelectasis",
    "upper lobe collapse": "{side} upper lobe atelectasis",
    "thickening": "{side} pleural thickening",
    "rib fracture": "{side} rib fracture",
}

DENIED = {
    C: [
        "The heart is normal in size.",
        "Heart size is normal.",
        "Heart size is within normal limits.",
        "No cardiomegaly.",
    ],
    ECM: [
        "The mediastinum is unremarkable.",
        "Mediastinal contours are normal.",
        "The mediastinal contour is within normal limits.",
        "No mediastinal widening.",
    ],
    OPA: [
        "The lungs are clear, with no focal airspace opacity.",
        "Clear lungs without focal opacity.",
        "No focal infiltrate is seen.",
        "The lungs are free of focal airspace opacity.",
    ],
    LES: ["No pulmonary nodule or mass.", "No suspicious lung nodule is seen.", "There is no lung mass."],
    EDE: ["No pulmonary edema.", "There is no evidence of pulmonary edema.", "No overt edema."],
    PNE: ["No evidence of pneumonia.", "No pneumonia."],
    ATE: ["No atelectasis."],
    PLE: ["No pleural thickening."],
    FRA: ["No displaced rib fracture.", "No acute fracture is identified.", "No rib fracture is seen."],
    DEV: ["No lines or tubes are seen."],
}
BOTH_NORMAL = [
    "Heart size and mediastinal contours are within normal limits.",
    "The heart and mediastinum are normal.",
    "The heart is normal in size and the mediastinum is unremarkable.",
]
LISTED = {CON: "focal consolidation", EFF: "pleural effusion", PTX: "pneumothorax", EDE: "pulmonary edema"}
LISTED[PNE] = "pneumonia"
LIST_FRAMES = "No {}.|There is no {}.|There is no evidence of {}.|No evidence of {}.|No {} is seen.|Negative for {}."
LIST_FRAMES = LIST_FRAMES.split("|")

# How often a report denies what is not there; the rest stays unmentioned, as in real reports.
DENIAL_RATE = {C: 0.85, ECM: 0.6, OPA: 0.55, LES: 0.2, EDE: 0.25, PNE: 0.2, ATE: 0.08, PLE: 0.08, FRA: 0.25, DEV: 0.06}
DENIAL_RATE |= {CON: 0.75, EFF: 0.85, PTX: 0.8}

NORMAL_ENDINGS = [
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute disease.",
    "No acute cardiopulmonary findings.",
    "Negative chest radiograph.",
]
INDICATIONS = (
    "Chest pain.|Shortness of breath.|Preoperative evaluation.|Dyspnea.|Follow-up.|Routine examination.|Trauma."
)
INDICATIONS = [*INDICATIONS.split("|"), "Weakness."]
FEVER = "Fever and cough.|Productive cough and fever.|Cough, elevated white count.|Fever, crackles on auscultation."
FEVER = FEVER.split("|")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


@dataclass
class Report:
    """Sections of a report as text, and the labels that the text states (14 names -> 1, 0, -1 or None)."""

    indication: str
    comparison: str
    findings: str
    impression: str
    labels: dict = field(repr=False)

    @property
    def text(self):
        return f"{self.findings} {self.impression}"


def places(finding):
    """Ways to say where a finding is."""
    side, zone = finding.side, finding.zone
    named = {("right", "mid"): "right middle lobe", ("left", "mid"): "lingula"}.get((side, zone), f"{side} {zone} lobe")
    more = {"upper": ["upper lung"], "mid": ["mid lung"], "lower": ["lung base", "base"]}.get(zone, [])
    return [f"{side} {zone} lung zone", f"{side} {zone} zone", named, *(f"{side} {word}" for word in more)]


def _fill(template, finding, d):
    """Put side, place and size of a finding into a sentence."""
    shape = finding.shape
    words = {
        "side": finding.side,
        "sev": finding.severity,
        "size": SIZES[finding.severity],
        "adv": ADVERBS[finding.severity],
        "where": "apical" if finding.zone == "upper" else "lateral",
    }
    if "{loc}" in template:
        words["loc"] = d.pick(places(finding))
    if "{cm}" in template:
        words["cm"] = f"{2 * 19 * shape['radius']:.1f}"  # body unit: 19 cm
    if "{rib}" in template:
        words["rib"] = ORDINALS[shape["rib"]]
    text = template.format(**words)
    return text[0].upper() + text[1:]


def upwards(name):
    """A condition and those it makes true: Pneumonia, Consolidation, Lung Opacity."""
    while name:
        yield name
        name = PARENTS.get(name)


def _combine(labels, new):
    """Several mentions of one condition: stated wins over suspected, suspected over denied."""
    rank = {None: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
    for name, value in new.items():
        if rank[value] > rank[labels[name]]:
            labels[name] = value


def _impression(summary, labels, d):
    """Text of the impression; what its lines state is put into labels. summary: [(line, labels it states)]."""
    if not summary:
        return d.pick(NORMAL_ENDINGS)
    summary = summary if d.chance(0.7) else summary[:2]
    for _, stated in summary:
        _combine(labels, stated)
    lines = [line for line, _ in summary]
    numbered = len(lines) > 1 and d.chance(0.5)
    return " ".join(f"{i}. {line}" for i, line in enumerate(lines, 1)) if numbered else " ".join(lines)


def write_report(study, d, before=()):
    """
    Report of a study. d: uniform draws; before: truth of the previous visit.

    Findings that the report suspects (settings.uncertain) or forgets (settings.omitted) stay in the truth.
    """
    settings = study.settings
    labels = dict.fromkeys(CONDITIONS)
    blocks = {"heart": [], "lungs": [], "pleura": [], "bones": [], "devices": []}
    where = {C: "heart", ECM: "heart", EFF: "pleura", PTX: "pleura", PLE: "pleura", FRA: "bones", DEV: "devices"}
    summary, shown = [], set()

    def say(block, text, stated):
        blocks[block].append(text)
        _combine(labels, stated)

    old = {f.name for f in before}
    for finding in study.truth:
        name, kind = finding.condition, finding.kind
        shown.add(name)
        unsure, forgotten, u = d.chance(settings.uncertain), d.chance(settings.omitted), d.u()
        if forgotten:
            continue
        unsure = unsure and kind in SUSPECTED
        if unsure:
            entry, value = d.pick(SUSPECTED[kind]), UNCERTAIN
        elif finding.name in old and kind in UNCHANGED and u < 0.6:
            entry, value = d.pick(UNCHANGED[kind]), POSITIVE
        else:
            entry, value = d.pick(STATED[kind]), POSITIVE
        text, stated = entry if isinstance(entry, tuple) else (entry, {name: value})
        say(where.get(name, "lungs"), _fill(text, finding, d), stated)
        if kind in SUMMARY:
            line = _fill(("Possible " if unsure else "") + SUMMARY[kind], finding, d) + "."
            summary.append((line, {name: value}))

    # A positive child says something about its parents too: nobody writes "pneumonia" and "no consolidation".
    blocked = set(shown)
    if {CON, PNE, OPA, ATE, EDE, LES} & shown:
        blocked |= {OPA, CON}
    if {CON, OPA} & shown:
        blocked |= {PNE}
    if C in shown:
        blocked |= {ECM}

    gone = {f.condition: f for f in before if f.condition not in blocked and f.condition in RESOLVED}
    for name, finding in gone.items():
        if d.chance(0.5):
            say(where.get(name, "lungs"), _fill(RESOLVED[name], finding, d), {name: NEGATIVE})
            blocked.add(name)

    deny = [name for name, rate in DENIAL_RATE.items() if d.chance(rate) and name not in blocked]
    if C in deny and ECM in deny and d.chance(0.5):
        deny.remove(C)
        deny.remove(ECM)
        say("heart", d.pick(BOTH_NORMAL), {C: NEGATIVE, ECM: NEGATIVE})
    together = d.shuffled([name for name in deny if name in LISTED])
    if len(together) > 1 and d.chance(0.7):
        *words, last = (LISTED[name] for name in together)
        joined = ", ".join(words) + ("," if len(words) > 1 and d.chance(0.5) else "") + " or " + last
        say("pleura", d.pick(LIST_FRAMES).format(joined), dict.fromkeys(together, NEGATIVE))
    else:
        for name in together:
            say(where.get(name, "lungs"), d.pick(LIST_FRAMES).format(LISTED[name]), {name: NEGATIVE})
    for name in deny:
        if name not in LISTED:
            say(where.get(name, "lungs"), d.pick(DENIED[name]), {name: NEGATIVE})

    order = ["heart", "lungs", "pleura", "bones", "devices"]
    if d.chance(0.35):
        order = ["devices", "lungs", "pleura", "heart", "bones"]
    sentences = [s for block in order for s in blocks[block]] or ["Unremarkable examination."]
    impression = _impression(summary, labels, d)
    others = [labels[name] for name in CONDITIONS if name not in ("No Finding", DEV)]
    labels["No Finding"] = None if POSITIVE in others or UNCERTAIN in others else POSITIVE
    indication = d.pick(FEVER if PNE in shown and d.chance(0.8) else INDICATIONS)
    comparison = "Prior chest radiograph." if study.visit else "None."
    return Report(indication, comparison, " ".join(sentences), impression, labels)


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass
class Paraphrase:
    """Another wording. `answer` differs from the question's where a negated wording turns it round."""

    text: str
    strategy: str  # synonym, clause order, register, voice, negation
    answer: str


@dataclass
class Question:
    """One question about one film."""

    text: str
    answer: str
    kind: str  # "closed" (yes, no), "choice" (one of options), "open"
    options: list  # for choice questions
    condition: str  # one of the 14 names, or "" (modality, view)
    content: str  # presence, side, zone, size, abnormality, device, normality, modality, view
    region: list  # pixel boxes the answer needs, or None if no place in the image settles it
    region_name: str  # finding or organ, "" for none
    paraphrases: list = field(repr=False)


NOUNS = {  # condition -> (with article, without)
    ECM: ("an enlarged cardiomediastinal silhouette", "cardiomediastinal enlargement"),
    C: ("an enlarged heart", "cardiomegaly"),
    OPA: ("a lung opacity", "lung opacity"),
    LES: ("a lung nodule or mass", "lung nodules or masses"),
    EDE: ("pulmonary edema", "pulmonary edema"),
    CON: ("consolidation", "consolidation"),
    PNE: ("pneumonia", "pneumonia"),
    ATE: ("atelectasis", "atelectasis"),
    PTX: ("a pneumothorax", "pneumothorax"),
    EFF: ("a pleural effusion", "pleural effusion"),
    PLE: ("pleural thickening", "pleural thickening"),
    FRA: ("a rib fracture", "rib fractures"),
    DEV: ("a support device", "support devices"),
}

PRESENCE_MORE = [  # text, strategy, the answer turns round
    ("Is {a} present?", "synonym", False),
    ("Is {a} visible on this film?", "synonym", False),
    ("On this chest radiograph, is there {a}?", "clause order", False),
    ("Can you see {a} here?", "register", False),
    ("Does this X-ray show {a}?", "voice", False),
    ("Is there any evidence of {n}?", "register", False),
    ("Is {n} absent?", "negation", True),
    ("Is this film free of {n}?", "negation", True),
]
SIDE_MORE = [
    ("Which side is the {n} on, left or right?", "synonym", False),
    ("Left or right: where is the {n}?", "clause order", False),
    ("Does the {n} affect the left or the right side?", "voice", False),
    ("Which side has the {n}, the left or the right?", "register", False),
    ("On this film, is the {n} on the left or the right?", "clause order", False),
    ("Which hemithorax shows the {n}, left or right?", "register", False),
    ("Which side does not show the {n}, left or right?", "negation", True),
]
ZONE_MORE = [
    ("Which zone shows the {n}: upper, mid or lower?", "synonym", False),
    ("Upper, mid or lower: which zone holds the {n}?", "clause order", False),
    ("Where does the {n} lie, in the upper, mid or lower zone?", "register", False),
    ("Which lung zone is affected by the {n}: upper, mid or lower?", "voice", False),
    ("On this film, which zone has the {n}: upper, mid or lower?", "clause order", False),
    ("At what height is the {n}: upper, mid or lower?", "synonym", False),
    ("Which two zones of upper, mid and lower do not show the {n}?", "negation", True),
]
SIZE_MORE = [
    ("What is the size of the {n}?", "synonym", False),
    ("The {n} on this film: how large is it?", "clause order", False),
    ("How big would you call the {n}?", "register", False),
    ("How would the size of the {n} be described?", "voice", False),
    ("Would you call the {n} small, moderate or large?", "register", False),
    ("The {n} is not absent. How large is it?", "negation", False),
]
WHAT_MORE = [
    ("Which abnormality is seen in the {l}?", "synonym", False),
    ("In the {l}, what abnormality is there?", "clause order", False),
    ("What is wrong in the {l}?", "register", False),
    ("What abnormality does the {l} show?", "voice", False),
    ("Name the abnormality in the {l}.", "register", False),
    ("The {l} is not normal. What is seen there?", "negation", False),
]
DEVICE_MORE = [
    ("What device is visible?", "synonym", False),
    ("On this film, which support device is seen?", "clause order", False),
    ("Name the device on this film.", "register", False),
    ("What device does the film show?", "voice", False),
    ("Which line, tube or implant is there?", "synonym", False),
    ("The film is not free of devices. Which one is there?", "negation", False),
]
NORMAL_MORE = [
    ("Does this film look normal?", "synonym", False),
    ("Is this a normal chest radiograph?", "synonym", False),
    ("Apart from devices, is this film normal?", "clause order", False),
    ("Would you call this film normal?", "register", False),
    ("Can this film be called normal?", "voice", False),
    ("Is there anything abnormal on this film?", "negation", True),
    ("Is this film not normal?", "negation", True),
]
MODALITY_MORE = [
    ("Which imaging modality is this?", "synonym", False),
    ("This image: which modality was used?", "clause order", False),
    ("How was this picture made?", "register", False),
    ("By what modality was this image acquired?", "voice", False),
    ("What type of scan is shown?", "register", False),
    ("This is not a photograph. What modality is it?", "negation", False),
]
VIEW_MORE = [
    ("Is the projection frontal or lateral?", "synonym", False),
    ("Frontal or lateral: which view is shown?", "clause order", False),
    ("Would you call this a frontal or a lateral view?", "register", False),
    ("Was this film taken as a frontal or a lateral view?", "voice", False),
    ("Which projection was used, frontal or lateral?", "synonym", False),
    ("Which view is this not, frontal or lateral?", "negation", True),
]

OPPOSITE = {"yes": "no", "no": "yes", "left": "right", "right": "left", "frontal": "lateral", "lateral": "frontal"}
OPPOSITE |= {"upper": "mid and lower", "mid": "upper and lower", "lower": "upper and mid"}

# kind -> what an open question expects
PLAIN = {kind: kind for kind in "pneumothorax consolidation pneumonia opacity nodule mass".split()}
PLAIN |= {"effusion": "pleural effusion", "thickening": "pleural thickening", "rib fracture": "rib fracture"}
PLAIN |= dict.fromkeys(("plate atelectasis", "lower lobe collapse", "upper lobe collapse"), "atelectasis")

# Where one has to look to say that something is absent.
LOOK_AT = {C: ("heart",), ECM: ("mediastinum", "heart")}
LUNGS = ("right lung", "left lung")


def write_questions(study, d, rates):
    """
    Questions about a study. d: uniform draws; rates: how often each condition is true in this hospital.

    Closed questions are asked so that yes and no are equally frequent for each wording: a true condition always, an
    absent one as often as it would have been true. So a model that cannot see does no better than chance. With
    settings.guessable the odd conditions lose their "no" questions and the even ones their "yes" questions.
    """
    labels, boxes, organs = study.labels, study.boxes, study.organ_boxes
    questions = []

    def ask(text, answer, kind, condition, content, region, region_name, more, options=(), **words):
        extra = [Paraphrase(t.format(**words), how, OPPOSITE[answer] if turn else answer) for t, how, turn in more]
        text = text.format(**words)
        questions.append(Question(text, answer, kind, list(options), condition, content, region, region_name, extra))

    shows = {name: [] for name in CONDITIONS}  # findings that make a condition true, through its children too
    for finding in study.drawn:
        for name in upwards(finding.condition):
            shows[name].append(finding)

    for i, name in enumerate(CONDITIONS):
        present, rate, u, guess = labels[name], rates[name], d.u(), d.u()
        wanted = min(1.0, (1.0 - rate) / max(rate, 1e-9)) if present else min(1.0, rate / max(1.0 - rate, 1e-9))
        if u >= wanted:
            continue
        if guess < study.settings.guessable and present != i % 2:
            continue
        answer = "yes" if present else "no"
        if name == "No Finding":
            ask("Is this film normal?", answer, "closed", name, "normality", None, "", NORMAL_MORE)
            continue
        if present:
            region, region_name = [box for f in shows[name] for box in boxes[f.name]], shows[name][0].kind
        else:
            where = LOOK_AT.get(name, LUNGS)
            region, region_name = [organs[o] for o in where], "lungs" if where is LUNGS else where[0]
        a, n = NOUNS[name]
        ask("Is there {a}?", answer, "closed", name, "presence", region, region_name, PRESENCE_MORE, a=a, n=n)

    for f in study.drawn:
        name, kind, region, u = f.condition, f.kind, boxes[f.name], d.u()
        if len(shows[name]) > 1:
            continue  # "the consolidation" must be one thing
        if name == DEV:
            ask("Which support device is present?", kind, "open", name, "device", region, kind, DEVICE_MORE)
        if kind not in PLAIN:
            continue
        n = PLAIN[kind]
        if u < 0.7:
            text, options = "Is the {n} on the left or the right?", ("left", "right")
            ask(text, f.side, "choice", name, "side", region, kind, SIDE_MORE, options, n=n)
        if u > 0.3 and kind in ("consolidation", "pneumonia", "opacity", "nodule", "mass"):
            text, options = "In which zone is the {n}: upper, mid or lower?", ("upper", "mid", "lower")
            ask(text, f.zone, "choice", name, "zone", region, kind, ZONE_MORE, options, n=n)
        if u > 0.5 and kind in ("effusion", "pneumothorax"):
            ask("How large is the {n}?", SIZES[f.severity], "open", name, "size", region, kind, SIZE_MORE, n=n)
        if u < 0.5 and f.zone and kind != "rib fracture" and _alone(f, study.drawn):
            text, place = "What abnormality is seen in the {l}?", f"{f.side} {f.zone} zone"
            ask(text, n, "open", name, "abnormality", region, kind, WHAT_MORE, l=place)

    if d.chance(0.5):
        ask("What imaging modality is this?", "x-ray", "open", "", "modality", None, "", MODALITY_MORE)
    else:
        options = ("frontal", "lateral")
        ask("Is this a frontal or a lateral view?", "frontal", "choice", "", "view", None, "", VIEW_MORE, options)
    return questions


def _alone(finding, others):
    """No other finding lies in the same zone of the same side."""
    sides, zones = (finding.side, "bilateral"), (finding.zone, "")
    return not any(f is not finding and f.condition != DEV and f.side in sides and f.zone in zones for f in others)
