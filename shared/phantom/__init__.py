"""
Chest radiographs drawn from anatomy, with everything about them known: findings, boxes, masks, reports, questions.

    from shared.phantom import phantom_study
    study = phantom_study(seed=0, index=7, size=224)
    study.image, study.truth, study.boxes, study.report, study.questions

    python -m shared.phantom --preview                 # a labelled gallery of films and findings, with reports

Nobody needs to read this package to follow a script. study.py puts a study together, body.py has the anatomy and the
film, findings.py what can be wrong with it, lateral.py the side view, words.py reports and questions.
"""

from shared.phantom.study import DEFAULT, PREVALENCE, TOGETHER, VERSION, PhantomSettings, Study, patient_of
from shared.phantom.study import phantom_classification, phantom_settings, phantom_study

__all__ = ["DEFAULT", "PREVALENCE", "TOGETHER", "VERSION", "PhantomSettings", "Study", "patient_of"]
__all__ += ["phantom_classification", "phantom_settings", "phantom_study"]
