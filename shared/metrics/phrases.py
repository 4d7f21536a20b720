"""
The phrases by which shared/metrics/labels.py reads a report: what is named, and what denies, doubts or ends.

They are regular expressions for text in lower case in which hyphens and slashes are spaces ("right-sided" -> "right
sided", "w/o" -> "w o"), contractions are written out and short forms are spelled ("isn't" -> "is not"). A space stands
for itself, every phrase starts and ends at a word boundary. Where two phrases start at the same word, the one in the
earlier table (order: TABLES), or earlier in its table, is read. " / " stands between phrases: it cannot be in one.
Wordings are our own, after what the papers named in labels.py describe.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)


def phrases(text):
    return " ".join(text.split()).split(" / ")


# Marks that stand in place of layout: ¶ a line that ends, ¦ a dash, bar or bullet, ‹ › brackets, ¿ a question
# mark before what it doubts. END: nothing but a side follows in this part of the sentence.
END = "(?=(?: (?:bilaterally|today|now|currently|on (?:the|either) (?:right|left|side)))? ?(?:$|[,¦‹›?]))"

SIZE = (
    "mild|moderate|severe|marked|minimal|slight|small|large|trace|tiny|massive|subtle|moderately|mildly|severely"
    "|markedly|minimally|slightly"
)
_TEXTURE = (
    "airspace|air space|alveolar|interstitial|parenchymal|pulmonary|lung|focal|patchy|hazy|linear|streaky|vague|faint"
    r"|confluent|ill defined|increased|increasing|retrocardiac|basilar|bibasilar|\w+hilar|lower lobe|upper lobe"
    "|middle lobe|reticular|ground glass|bandlike|platelike|opaque"
)
_TUBES = (
    "endotracheal|et|trach|tracheostomy|tracheal|nasogastric|orogastric|nasoenteric|enteric|enteral|feeding|gastric"
    "|gastrostomy|peg|ng|og|dobb?hoff|chest|thoracostomy|thoracic|pleural|pigtail|drainage|intercostal"
)
_LINES = (
    "central|venous|arterial|picc|ij|jugular|subclavian|femoral|dialysis|support|monitoring|intravenous|iv|swan ganz"
    "|ng|et|hickman|cvp?|tunnell?ed"
)
BONES = "rib|ribs|clavicle|clavicular|vertebral|vertebra|sternal|humeral|humerus|scapular|scapula|spinal|hip|shoulder"

MENTIONS = {
    "Cardiomegaly": phrases("cardiomegaly / cardiomegalic"),
    "Lung Lesion": phrases(r"""
        nodul(?:e|es) / nodular (?:opacit\w+|densit\w+|opacification\w*|focus|foci|lesions?|shadow\w*) /
        (?:lung|pulmonary|parenchymal|cavit\w+|spiculated|hilar|perihilar|pleural based|coin) lesions? / mass(?:es)? /
        lesions?(?= (?:\w+ ){0,3}?(?:in|at|within|of|throughout) (?:\w+ ){0,3}?(?:lungs?|lobes?|zones?|apex|base)\b) /
        masslike / cavit(?:y|ies|ary|ations?) / carcinoma / neoplas\w+ / tumou?rs? / malignan(?:cy|cies) /
        metasta(?:sis|ses|tic)(?: disease| lesions?)?"""),
    "Pneumonia": phrases("""
        (?:broncho|aspiration |atypical |lobar |viral |bacterial )?pneumoni(?:a|as|c) / (?:super)?infections? /
        infect(?:ious|ive)(?: process| etiology)?"""),
    "Lung Opacity": phrases(rf"""
        opaci(?:t|f)\w+ / infiltrat(?:e|es|ion|ions) / (?:airspace|air space|alveolar) (?:disease|process|pattern) /
        (?:(?:{_TEXTURE}) ){{1,5}}densit(?:y|ies) / areas? of (?:increased )?density /
        (?:(?:{_TEXTURE}) ){{0,5}}shadowing / (?:(?:air ?space|alveolar) )changes? /
        (?:increased|prominent|coarse|coarsened|accentuated|thickened|reticular|chronic)(?:
        (?:pulmonary|interstitial|lung|bronchovascular|chronic|bilateral)){{0,4}} (?:markings|pattern) /
        (?:(?:pulmonary|interstitial|lung|bronchovascular) ){{1,4}}markings (?:are|appear|remain)(?: (?!not|no)\w+)?
        (?:increased|prominent|coarse|coarsened|accentuated|thickened) /
        (?:prominence|thickening|coarsening) of the (?:pulmonary |lung )?interstiti\w+ /
        (?<!\bnormal )interstitial (?:prominence|thickening|(?:lung )?disease|abnormality|changes?|process|pattern)(?!
        (?:is|appears) normal) / reticulation\w* / reticulo ?nodular (?:pattern|changes?|disease|shadow\w*) /
        ground glass / white ?out"""),
    "Edema": phrases(r"""
        (?:pulmonary |interstitial |alveolar ){0,3}o?edema /
        (?:pulmonary |central )?(?:vascular |venous )?congestion / (?:pulmonary )?(?:vascular|venous) engorgement /
        cephali[sz]ation / vascular redistribution /
        upper lobe (?:\w+ )?diversion / (?:fluid|volume) overload"""),
    "Consolidation": [r"consolidat\w+"],
    "Atelectasis": phrases(r"""
        atelecta\w+ / atx / collapse / (?:lung )?volume loss / loss of volume /
        collapsed (?:lung|(?:right|left|upper|lower|middle) (?:lung|lobe|upper|lower|middle))"""),
    "Pneumothorax": phrases("(?:hydro|hemo|haemo)?pneumothora(?:x|xes|ces) / pleural air"),
    "Pleural Effusion": phrases(r"""
        pleural (?:or|and|and or) pericardial effusions? / pericardial (?:or|and|and or) pleural effusions? /
        (?:pleural |parapneumonic |subpulmonic ){0,3}effusions? / ha?emothora(?:x|ces) / hydrothora(?:x|ces) / empyema /
        (?:pleural|loculated|layering) (?!air)(?:\w+ )?(?:fluid|collections?) / fissural fluid /
        fluid (?:collections? )?(?:in|within) (?:\w+ ){0,3}?(?:pleural (?:spaces?|cavit(?:y|ies))|fissures?)
    """),
    "Pleural Other": phrases(r"""
        pleural (?:\w+ )?(?:thickening|plaques?|scar\w*|fibrosis|calcifications?|abnormality|disease|tags?) /
        pleuro ?parenchymal (?:scar\w*|thickening) / thickening of the (?:\w+ )?pleura /
        (?:calcified|thickened) pleura\w* / (?:bi)?apical (?:pleural )?(?:thickening|cap\w*) / fibrothorax /
        (?:(?<=usion or )|(?<=usion vs )|(?<=usion versus ))thickening"""),
    "Fracture": phrases(rf"""
        (?:(?:{BONES}|compression|wedge|stress) ){{0,4}}fractur(?:e|es|ed) / (?:compression|wedge) deformit\w+ /
        (?:{BONES}) deformit\w+ / broken (?:{BONES}|bones?) /
        (?:{BONES}|bones?) (?:is|are) broken"""),
    "Support Devices": phrases(rf"""
        (?:{_TUBES}) (?:tip )?(?:tubes?|catheters?|drains?) / tubes?(?:,? (?:and|or) lines?)? / (?:et|ng|og)t /
        dobb?hoff / catheters? / cannula[se]? / (?:{_LINES}) (?:\w+ )?lines? /
        lines?(?= (?:and|or) tubes?| placement|:) / (?<!b )(?<!septal )lines(?= (?:are|remain)
        (?:in (?:\w+ )?(?:place|position)|unchanged|stable)) / vas ?cath / perm ?cath / cordis / icc / acdf /
        (?:pedicle|spinal) (?:screws?|rods?) / plate fixation / picc / (?:cv|uv|ua)c / cvl / ppm /
        port ?a ?cath / mediport / (?:infusion|wall|chest|sided|right|left) ports? / swan ganz / trach /
        pacemakers? / pacers? / pacing / defibrillators? / a?icd / leads? / balloon pump / lvad / stents? / drains? /
        pigtail / tracheostomy / thoracostomy / prosthetic (?:\w+ )?valve / valve (?:replacement|prosthesis) /
        (?:sternal|sternotomy|cerclage) wires? / hardware / sheaths? / iabp / impella / tavr / loop recorder /
        (?:support|monitoring|assist|access|pacing|electronic|implanted|cardiac|medical) (?:\w+ )?devices? /
        devices?(?= ?[:¦]) /
        (?:nerve )?stimulator / arthroplasty"""),
}

# Contain the words of a mention and are none; read before the mentions.
UNMENTIONS = phrases(r"""
    pericardial (?:fluid|effusions?) / (?:nasal|sinus|hepatic|passive) congestion /
    joint effusions? / mass effect / body mass / radio ?opa\w+ / bone density /
    (?:soft tissue|subcutaneous|chest wall|peripheral|leg) o?edema /
    (?<!non )calcified (?:\w+ )?(?:nodul\w+|mass\w*|opacit\w+|densit\w+) / non consolidat\w+ /
    (?:bone|bony|osseous|lytic|sclerotic|blastic|skeletal|vertebral) (?:\w+ )?(?:lesions?|mass\w*|metasta\w+) /
    (?:soft tissue|abdominal|breast|thyroid|adrenal) (?:mass\w*|nodul\w+) / opacified (?:bowel|stomach) /
    collapsed (?:esophagus|stomach) / (?:right|left) (?:atri|ventric)\w+ leads? of /
    heart (?:rate|disease|transplant|valve|border) / (?:right|left) heart(?: border)? / post infectious /
    (?:granulomatous|prior|previous|old|remote|tubercul\w+|healed)(?: \w+)? infection /
    (?:pleural|thoracic|chest|abdominal|peritoneal|gastric|cardiac|left|right) cavit(?:y|ies) /
    (?:(?<=wire )|(?<=wires )|(?<=lead )|(?<=catheter )|(?<=wire is )|(?<=wires are ))fractur\w+ /
    fractured(?= (?:\w+ ){0,2}(?:wires?|leads?|catheters?)) /
    (?:vertebral|vertebral body|endplate|subchondral|compression) collapse / collapse of (?:\w+ ){0,2}vertebra\w*""")

# Heart failure says nothing about the size of the heart but makes a large one likely: uncertain, as the CheXpert
# labeller has it.
FAILURE = phrases("(?:congestive )?(?:heart|cardiac) (?:failure|decompensation) / chf")

# Abnormal, and none of the 13: a report that states one of these has findings.
OTHERS = phrases(r"""
    emphysema\w* / copd / chronic obstructive / bull(?:a|ae|ous) / (?:dextro|levo)?scolio\w+ / kypho\w+ / degenerat\w+ /
    spondylo\w+ / osteophyt\w+ / calcif\w+ / granuloma\w* / hernia\w* / blunt(?:ed|ing) / scar(?:s|red|ring)?""")

# Anatomy that is called normal, enlarged, congested or collapsed. "other" is read so that its "normal" is not taken
# for the heart's.
_PARTS = "(?:contours?|silhouettes?|structures?|shadows?|borders?|outlines?|margins?|size|width)"
ANATOMY = {
    "heart and mediastinum": phrases(rf"""
        (?:heart|cardiac)(?: size| silhouette)?,?(?: hilar,?)? and (?:the )?mediastin\w+(?: {_PARTS})* /
        mediastin\w+ and (?:cardiac|heart)(?: {_PARTS})* / cardiac, mediastinal,?(?: and \w+)?(?: {_PARTS})*"""),
    "mediastinum": phrases(rf"""
        cardio ?(?:mediastin\w+|thymic)(?: and hilar)?(?: {_PARTS})* /
        (?:hilar and |superior |upper )?mediastinal(?: and hilar|, hilar)? {_PARTS} / (?:superior |upper )?mediastinum /
        mediastinal(?= (?:shift or )?(?:widening|enlargement))"""),
    "heart": phrases(rf"""
        heart(?: {_PARTS})? / cardiac(?: and \w+)? {_PARTS} / cardiac(?= enlargement) / cardio ?pericardial silhouette /
        (?:cardio ?thoracic|c ?t) (?:ratio|index) / ctr"""),
    "vessels": phrases(r"pulmonary (?:arter\w+|vascula\w+|vessels?|vein\w*) / vascula\w+ / vessels"),
    "lung": phrases("lungs?(?: fields?| volumes?)? / (?:(?:upper|middle|lower) )?lobes?"),
    "other": phrases(r"""
        pulmonary hila\w* / hil(?:um|a|i|ar) / aorta / aortic / bon(?:e|es|y) / osseous / skelet\w+ / pleura\w* /
        soft tissues? / trachea\w* / (?:hemi)?diaphragms? / thyroid\w* / atri\w+ / ventricul\w+ / ribs? / spine / azygos
    """),
}
_COMPARED = r"(?: in size)?(?= ?(?:$|[,:¦‹›]|since|from|compared|when|with|and)(?:\W|$))"
_PERCENT = r"(?:(?<=ctr )|(?<=ratio )|(?<= is )|(?<= to )|(?<= of )|(?<=about )|(?<=imately ))"  # of a ratio
_NORMALLY = r"than (?:normal|usual|expected|half|50|0\.50?)"
_LARGER = f"(?:larger|bigger|greater|wider|more) {_NORMALLY}"
_BEFORE = "than (?:before|previously|(?:on |in |at |it was (?:on )?)?(?:the |a )?(?:prior|previous|last|earlier))"
ENLARGED = phrases(rf"""
    enlarged / augmented / > ?(?:0?\.5|50) ?%?(?!\d) / 0?\.(?:5[1-9]|[6-9]\d?)(?! ?[cm]m) /
    {_PERCENT}(?:5[1-9]|[6-9]\d)(?:\.\d)? ?% /
    enlargement(?: of)? / widened / broadened / exceeds / widening(?: of)? / dilated /
    wide{END} / big{END} / large(?= (?:heart|cardiac)) / large(?=$|,| and| but| with) /
    {_LARGER} / (?:larger|bigger|wider) {_BEFORE} /
    above (?:the )?(?:upper limits? of )?normal(?: size| limits?| range)? /
    increased(?= (?:heart|cardiac|cardio ?thoracic)) / increased in (?:size|volume|width|diameter|calib(?:er|re)) /
    increased{_COMPARED} / increase in(?: the)?(?: size of the)?(?= (?:heart|cardiac))""")
# Said of heart or mediastinum: uncertain
PROMINENT = phrases("prominent / prominence(?: of)? / fullness(?: of)?")
CONGESTED = phrases("congested / engorged / cephali[sz]ed")
COLLAPSED = phrases("collapsed")
NORMAL = phrases(r"""
    (?:at |near )?(?:the )?upper limits? of normal / (?:top|high|upper|upper limit)(?: of)? normal / normal /
    unremarkable / within (?:(?:\w+ )?limits|normality) / without (?:\w+ )?alterations? / (?:of )?preserved""")
NOT_ENLARGED = phrases(rf"""
    not (?:enlarged|widened|broadened|dilated|increased(?: in size|{END})|{_LARGER}) /
    (?:less|smaller) {_NORMALLY} / (?:below|under|<) ?(?:50|0?\.50?) /
    0?\.[34]\d?(?! ?[cm]m) / {_PERCENT}[34]\d(?:\.\d)? ?%""")

DETECTED = (
    "(?:seen|identified|evident|present|visuali[sz]ed|appreciated|appreciable|demonstrated|detected|apparent|noted"
    "|found|visible|shown|confirmed|perceived|perceptible|perceivable|observed|discernible|discernable|discerned"
    "|documented|recogni[sz]ed|recogni[sz]able|revealed|evidenced|objectified|depicted|displayed|suspected|obvious"
    "|in evidence|a feature)"
)
# Look like a negation or an uncertainty and are none.
_NOT = "(?:no|not|without|never|lack of|yet to|fail(?:s|ed)? to)"
KEEP = phrases(rf"""
    (?:no|not(?: been)? any) (?:other |further |significant |appreciable |interval |substantial |relevant |major |new
    ){{0,4}}(?:change|changes|increase|decrease|improvement|worsening|progression|difference)(?: in| of| from)? /
    no (?:evidence of |interval |further |significant |definite
    ){{0,3}}(?:growth|reduction|loculation|calcification|displacement|kinking|migration|tension(?:
    component)?|complications?)(?: of| in| to| related to| from)+ /
    no (?:\w+ )?enlargement of(?= (?:\w+ ){{0,3}}(?:pneumothorax|effusions?|nodules?|mass|opacity|lesion)\b) /
    (?:no|without)(?= (?:lead|wire|hardware|catheter|tube|line|device)
    (?:fracture|complication|kink|migration|malpos)) /
    (?:should|must|may|to) be (?:removed|taken out) /
    that (?:was|were) not(?: \w+)? {DETECTED}(?= (?:previously|before|earlier|on|in)\b) /
    without (?:significant |interval |substantial ){{0,3}}(?:change|worsening|increase) /
    not (?:significantly |substantially |appreciably
    ){{0,3}}(?:changed|different|increased|decreased|worsened|improved) /
    (?:image|spatial|low|limited|this|pixel) resolution / not only / not necessarily / no doubt / if not /
    (?:probably|likely|perhaps) (?:unchanged|stable|similar|improved) /
    {_NOT}(?: \w+){{0,2}} (?:resolution|resolved?|resolving|clearing|cleared|disappear\w*|subsided?)(?: of)? /
    (?:yet|fail(?:s|ed)?) to (?:clear|resolve) /
    (?:no|not) (?:larger|bigger|wider) {_BEFORE} /
    not(?: been)? (?:previously|formerly) {DETECTED} /
    not(?: been)?(?: \w+)? {DETECTED}(?= (?:previously|before|earlier)\b) /
    not(?: been)?(?: \w+)? {DETECTED}(?= (?:on|in) (?:the |a |any )?(?:prior|previous|earlier|last|old|preceding)\b) /
    (?:(?:near|nearly|almost) (?:complete|total)|partial|incomplete) (?:resolution|clearing)(?: of)? /
    (?:nearly|almost|partially|partly|incompletely|largely|mostly)(?: completely)? (?:resolved|cleared) /
    (?:consistent|compatible|in keeping) with / c w""")
# What follows is looked for, remembered or feared, not described.
IGNORE = phrases(r"""
    (?:eval\w*|assess\w*|look\w*|check|screen\w*) for /
    (?:sensitivity|difficult|hard|unable|able)(?: \w+)? to (?:detect|assess|evaluate) / (?:sensitivity|sensitive) for /
    eval(?:uate)? / assess / rule out / r o / (?:known )?(?:history of|hx of|h o) / risk (?:of|for) /
    (?:evaluation|assessment|detection) of / (?:treat\w*|therapy) (?:for|of) /
    if (?:there (?:is|are|was|were)|(?:continued )?(?:clinical\w*|concern)|symptoms) /
    please (?:exclude|confirm|check|look) / if(?! any| present)(?= (?:\w+ ){1,4}(?:is|are|remains|persists?)\b) /
    to (?:document|ensure|confirm|exclude)""")
# Nothing is said of what was just named
IGNORE_BACK = phrases(rf"""
    (?:is |are )?(?:unable|impossible|not possible|difficult) to (?:\w+ )?(?:assess|evaluate|determine){END} /
    (?:can ?not|could not) be (?:\w+ )?(?:assessed|evaluated|determined) /
    (?:(?:is|are|was|were) )?not (?:\w+ )?(?:assessed|evaluated|applicable|available|reported)(?: on)?{END} /
    (?:(?:is|are|was|were) )?not (?:\w+ )?(?:mentioned|described|addressed|stated|specified){END} /
    (?:(?<=: )|(?<=[¦‹] ))(?:n a|null|unknown){END}""")
# All that follows in the sentence
IGNORE_REST = phrases(r"""
    recommend\w* / consider(?= (?:\w+ ){0,2}(?:ct|mri?|pet|films?|views?|imaging)) / follow ?up / advised /
    correlat(?:e|ion) / please note""")

# Doubts all that follows, until something ends it.
UNSURE = phrases(r"""
    (?:can ?not|could not|not)(?: \w+){0,2} (?:exclude|rule out|r o)(?: \w+ of)? /
    (?:difficult|hard|unable|impossible) to(?: \w+)? (?:exclude|rule out)(?! *(?:$|,|and|given|on|in)) / either /
    not diagnostic (?:of|for) /
    (?:unclear|uncertain|not (?:\w+ )?(?:clear|certain|sure)) (?:whether|if)(?: there (?:is|are))? /
    whether(?: or not)?(?: (?:there|this|it) (?:is|are))? /
    (?:hard|difficult|impossible|unable) to (?:say|tell|know|determine) if(?: there (?:is|are))? /
    (?:possible|probable|likely|conceivable|doubtful|unlikely) that(?: (?:there|this|it) (?:is|are|represents))? /
    (?:felt|thought|believed)(?: \w+)? to (?:be|represent|reflect) /
    (?:possible|potential|likely|probable|differential) (?:\w+ )?(?:diagnos[ei]s|causes?|etiolog(?:y|ies))(?:
    (?:include|includes|including|are|is)|(?= ?:)) / differential(?= ?:) /
    (?:possible|uncertain|questionable|suspected)(?: findings?)?(?=:) /
    (?:considerations?|concerns?)(?: (?:include|includes|including|are)|(?= ?:)) / consideration is /
    (?:can ?not|could not|unable to|not possible to) (?:\w+ )?(?:confirm|verify|diagnose) /
    (?:possibly|probably|presumably|perhaps|potentially) (?:due to|related to|secondary to|from|in the setting of) /
    (?:may|might|could|would|can)(?: \w+){0,2}? (?:be (?:\w+ )?(?:secondary to|due to|related to|in the setting
    of|from|seen (?:with|in(?: (?:\w+ )?patients
    with)?)|associated with)|be|represent|reflect|indicate|suggest|relate|correspond|have|contain) /
    may / might / could /
    (?:often|commonly|frequently|usually|typically|sometimes) (?:associated with|seen (?:with|in)) /
    possibility of / question of / suspicious (?:for|of) / suspicion (?:for|of) /
    (?:probability|likelihood|chance) of / (?:concerning|worrisome) for /
    concern(?:ed|s)?(?: (?:is|for|of|about))+ / c f / consider(?! (?:re|advanc|pull|withdr)) / suggest\w*(?: of)? /
    s o / rais\w+ (?:the )?(?:possibility|question|concern)(?: of| for)? /
    (?:most )?likely (?:represent\w*|reflect\w*|due to|related to|to be|to represent|secondary to) /
    differential (?:\w+ ){0,3}?(?:includ\w+|is) / unlikely(?: to (?:be|represent|reflect))? /
    favou?r\w*(?: to (?:be|represent|reflect))? /
    can ?not (?:be )?(?:differentiated?|distinguish(?:ed)?)(?: from)? / doubt(?:s|ful)? (?:about|of|for)""")
# Doubts what was named before it, too
UNSURE_BOTH = phrases("""
    (?:may|might) or (?:may|might) not(?: be| represent| reflect)? /
    versus / vs / if (?:any|present)(?:, there (?:is|are))? /
    (?:(?:is|are|was|were) )?(?:(?:(?:more|less) )?(?:likely|favou?red|probable|preferred) (?:than|over)|preferred to)
""")
# Doubts the next finding
UNSURE_NEXT = phrases(r"""
    poss(?:ibl[ey])?\.? / prob(?:abl[ey])?\.? / maybe / query / questionable / question(?!:) / suspect(?:ed)? /
    indeterminate for / with or without / borderline / presum(?:ed|ably|ptive) / perhaps / potentially / apparent /
    (?:most |less |more )?likely / doubt / equivocal""")
_VERY = (
    "(?: (?:also|thought|felt|considered|believed|judged|to|be|another|a|very|quite|rather|highly|most|more|less"
    "|somewhat|fairly|extremely|still))*"
)
_DOUBTFUL = (
    "(?:possibl[ey]|probabl[ey]|possibility|suspected|presumed|questioned|questionable|likely|unlikely|doubtful"
    "|favou?red|borderline|consideration|(?:in|on|part of) the differential(?: diagnosis)?|among the possibilities"
    "|considered|equivocal|improbable|conceivable|maybe|suggested(?= on| by))"
)
_SIDED = f"(?: (?:{SIZE}|right|left|bilateral|apical|basal|present))*{END}"
# Doubts what was just named
UNSURE_BACK = phrases(rf"""
    (?:(?:can|could|may|would|is|are) ?)?not(?: \w+){{0,3}} (?:excluded|ruled out) / until proven otherwise /
    (?:can ?not|could not) be (?:\w+ )?confirmed /
    (?:(?<=: )|(?<=¦ ))(?:uncertain|unclear|unsure|indeterminate|suspicious) /
    (?:may|might|could|can) be (?:\w+ )?(?:missed|overlooked|hidden|obscured|masked|occult) / not impossible /
    (?:may|might|could) not be (?:\w+ )?(?:visible|seen|apparent|evident|detect\w+) /
    (?:can ?not be|could not be|not)(?: \w+)? {DETECTED} with (?:\w+ )?(?:certainty|confidence) /
    (?:is|are|would be) (?:not )?(?:the |an? )?(?:(?:most|more|less) )?(?:un)?likely
    (?:diagnosis|cause|etiology|explanation) /
    (?:(?:is|are|would be|remains?) (?:\w+ )?)?(?:difficult|hard|impossible) to (?:\w+ )?(?:exclude|rule out)(?=$|,|
    and| given| on| in) /
    (?:is|are|was|were|remains?|seems?|appears?|looks?|(?:would|could|might|may) be){_VERY} {_DOUBTFUL}(?:
    (?:clinically|present|diagnosis))?(?= ?(?:$|[,:¦‹›])| (?:and|but|given|though|as|in|on|at|by|because)\b) /
    (?:should|could|may|might|must|needs? to|has to) (?:also )?be (?:considered|present|excluded|ruled out|there{END}) /
    (?:could|may|might|would)(?: all| each| both| also)? (?:give|produce|explain|cause|account for|look like|have
    (?:\w+ ){{0,3}}appearance) /
    (?:(?:very|quite|highly|most|more|less) )*{_DOUBTFUL}{_SIDED} /
    can ?not (?:(?:be )?exclude|rule out){_SIDED}""")
_GONE = (
    "(?:resolved|cleared|disappeared|removed|taken out|absent(?!:)|ruled out|excluded|subsided|gone|vanished"
    "|denied|lacking|explanted|negative(?! for)|regressed completely|completely regressed)"
)
_LY = r"(?!near|part|large|most|incomp)\w+ly"
# Denies what was just named. The last one is the answer of a template: "Pneumothorax: none", "effusion no, ...".
ABSENT_BACK = phrases(rf"""
    (?:(?:(?:is|are|was|were|has|have|been|can be)(?: {_LY})?|since|now|also|both|all|completely|entirely|interval)
    )+{_GONE} /
    (?:resolved|removed|taken out|absent|cleared|excluded|ruled out|gone)(?:{END}|(?= and| by| since| in the)) /
    (?:(?:is|are|was|were|has|have)(?: been| again| still| also)?
    )?(?:no (?:longer|more)|not|never|nowhere)(?: been)?(?: (?!an? |likely)\w+)?
    {DETECTED}(?! any|:) /
    (?:is|are) not (?:an? |the |of )?(?:\w+ )?concern{END} / (?:does|do|did) not (?:appear|seem)(?: to be)? {DETECTED} /
    (?:has|have) not (?:recurred|returned|reappeared) /
    (?:can ?|could )(?:not|no longer) be(?: \w+)? {DETECTED} / removal(?! of) / resolution(?! of) /
    (?:no|none|ø|nothing|nil|absent|neg|negative|false|not|nad|n(?<=[:¦‹] n)|0(?<=[:¦‹] 0))(?: (?:evidence|e
    o|signs?|of|for|definite|visible|{DETECTED}))*{END} /
    no acute(?<=[:¦‹] no acute)(?= ?$) / no(?<=: no)(?= (?:\w+ ){{0,2}}\w+:)""")
# Denies all that follows, until something ends it
ABSENT = phrases(r"""
    not agree that(?: there (?:is|are))? / (?:absent|negative) findings?(?=:) / rul(?:es|ing) out / excludes /
    (?<=s )exclude /
    nothing (?:\w+ )?(?:indicative|suggestive|suspicious|concerning)(?: of| for)? /
    argu(?:e|es|ed|ing) (?:strongly )?against / inconsistent with /
    (?:no|not|without)(?: \w+){0,3}? (?:evidence|e o|signs?|indications?|suggestion|suspicion)(?: of| for| to suggest)?
    / resolved / (?:resolution|clearing|disappearance|(?<!for )exclusion|removal|absence|lack) of / absent /
    lacks?(?: (?:any|signs?|evidence|of))* / none of the (?:following|above) / none of / zero / ø / nil /
    (?:nothing|little|not enough|insufficient evidence)(?: \w+)? to (?:suggest|indicate|support) /
    (?:insufficient|little|scant) evidence (?:of|for) / neg(?:ative|\.)? for /
    (?:negatives?|not (?:\w+ )?(?:present|seen|identified|observed|detected))(?=:) /
    free (?:of|from) / clear of / (?:de)?void of / non ?visuali[sz]ation of / without / w o(?:ut)? / sans / no longer /
    no / nor / neither / not / never / rather than / instead of / denies /
    can ?not (?:see|identify|appreciate|detect|find) /
    fail(?:s|ed)? to (?:show|demonstrate|reveal|identify|detect|confirm|visuali[sz]e)""")
# Ends whatever is open
STOP = phrases(r"""
    but / however / although / though / makes? / making / except /
    (?:aside|apart) from / other than / besides / barring / save for / yet / otherwise / which /
    while / whereas / because / since / with / w / after / following / status post / s p /
    there (?:is|are|has|have|was|were|continues|remains) / there(?= may) / (?:and|,) (?:the|there|a|an|this|these) /
    in the (?:setting|presence|context) of / due to / secondary to / (?:related to|accompanying)(?= (?:the|a|known)\b) /
    despite / in spite of / beyond / still / again / (?<!not )positive for""")
VERBS = phrases(r"""
    is / are / was / were / has / have / remains? / appears? / persists? / measur\w+ / shows? / demonstrates? /
    continues? / projects? / noted / seen / identified""")

# After a comma, "and" or a denied finding, these start a new statement: "no effusion, stable cardiomegaly" ...
NEW = (
    rf"(?:(?:,(?: and)?|and) |(?!large))(?:{SIZE}|suggest\w*|likely|probabl[ey]|possibl[ey]|consistent|compatible"
    r"|stable|unchanged|minor|patchy|streaky|persistent|new|increased|increasing|decreased|decreasing|improving"
    r"|improved|worsening|low|right|left|bilateral"
    r"|bibasilar|chronic|old|healed|scattered|multiple|some|prominent|only|just|merely|simply|enlarged"
    r"|heart(?! failure)|cardiac silhouette|the|an?|\d[\d.]* [cm]m)\b"
)
# ... and a finding with a verb or state of its own does: "no effusion and cardiomegaly is stable". "No effusion and
# pneumothorax is seen" denies both.
OWN_VERB = (
    r"(?: ?: |(?: (?:at|in|on|of|along|within) (?:\w+ ){1,4}?| )(?:(?:is|are|was|were) (?:again|still|now|also)"
    rf"|(?:is|are|was|were|has|have)(?! (?:\w+ )?(?:not|no longer|{DETECTED})\b)"
    r"|(?:can|could|is|are) ?not (?:be )?(?:\w+ )?(?:excluded|ruled out)"
    r"|remains?|persists?|continues?|appears?|again|still|unchanged|stable|worse|(?:worsen|increas|decreas|improv)"
    r"(?:ed|ing))\b)"
)
VERB_NEXT = r" (?:(?:is|are|was|were|has|have) (?!(?:\w+ )?(?:not|no longer)\b)|present\b|intact\b|in (?:place|situ)\b)"

# Headed parts of a report that are not read: up to the next header, or their first sentence only.
WHY = r"(?:clinical(?: \w+)?|indications?|history|hx|reason(?: for (?:\w+ )?\w+)?|request|complaints?)"
HOW = r"(?:technique|comparisons?|exam(?:ination)?|procedure)"
WHAT = "(?:findings?|impressions?|conclusions?|opinion|interpretation|report|results?|summary|wet read|final report)"

TABLES = (  # (kind, what, phrases), in the order in which they are tried
    ("unmention", None, UNMENTIONS), ("state", "not enlarged", NOT_ENLARGED), ("keep", None, KEEP),
    ("ignore_back", None, IGNORE_BACK), ("unsure_back", None, UNSURE_BACK), ("absent_back", None, ABSENT_BACK),
    ("ignore_rest", None, IGNORE_REST),
    ("ignore", None, IGNORE), ("unsure_both", None, UNSURE_BOTH), ("unsure", None, UNSURE),
    ("unsure_next", None, [*UNSURE_NEXT, "¿"]), ("state", "normal", NORMAL), ("absent", None, ABSENT),
    ("failure", None, FAILURE), *(("mention", name, found) for name, found in MENTIONS.items()),
    ("mention", "other", OTHERS), *(("anatomical", part, found) for part, found in ANATOMY.items()),
    ("state", "enlarged", ENLARGED), ("state", "prominent", PROMINENT), ("state", "congested", CONGESTED),
    ("state", "collapsed", COLLAPSED), ("stop", None, STOP), ("verb", None, VERBS), ("comma", None, [",", "and"]),
    ("mark", None, [":", "¦"]), ("bracket", True, ["‹"]), ("bracket", False, ["›"]),
)  # fmt: skip
