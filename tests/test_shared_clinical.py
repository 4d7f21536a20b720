"""Clinical efficacy: a case worked out by hand, scikit-learn, and the trivial report on the R2Gen test split."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from shared.metrics.clinical import SUBSETS, averages, clinical_efficacy, clinical_interval, positive_matrix
from shared.metrics.labels import CONDITIONS, TOP_FIVE, label_report


def labels(**named):
    return dict.fromkeys(CONDITIONS) | {name.replace("_", " "): value for name, value in named.items()}


def test_a_case_by_hand():
    references = [labels(Edema=1, Atelectasis=-1), labels(Edema=0, Fracture=1), labels(No_Finding=1)]
    hypotheses = [labels(Edema=1), labels(Edema=1, Fracture=-1), labels(No_Finding=1)]
    result = clinical_efficacy(hypotheses, references)
    assert result["n"] == 3
    positive, negative = result["uncertain_positive"], result["uncertain_negative"]
    # doubted counts: true Edema, Atelectasis | Fracture | No Finding; called Edema | Edema, Fracture | No Finding: 3 of
    # 4 and 3 of 4
    assert positive["precision_micro_14"] == positive["recall_micro_14"] == positive["f1_micro_14"] == 3 / 4
    assert positive["f1_macro_14"] == pytest.approx(
        (2 / 3 + 1 + 1) / 14
    )  # Edema 2/3, Fracture 1, No Finding 1, Atelectasis 0
    assert positive["f1_weighted_14"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert positive["f1_example_14"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert positive["f1_micro_13"] == pytest.approx(2 / 3) and positive["f1_micro_5"] == pytest.approx(2 / 4)
    assert positive["exact_match_14"] == pytest.approx(1 / 3) and positive["exact_match_5"] == pytest.approx(1 / 3)
    assert positive["num_without_positive_14"] == 10
    assert positive["per_condition"]["Edema"] == dict(
        tp=1, fp=1, fn=0, tn=1, precision=0.5, recall=1.0, f1=pytest.approx(2 / 3)
    )
    assert positive["per_condition"]["Pneumonia"] == dict(tp=0, fp=0, fn=0, tn=3, precision=None, recall=None, f1=None)
    # doubted does not count: Atelectasis and the called Fracture are gone
    assert (negative["precision_micro_14"], negative["recall_micro_14"]) == (2 / 3, 2 / 3)
    assert negative["exact_match_5"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    reference, hypothesis = rng.random((60, 14)) < rng.random(14) * 0.5, rng.random((60, 14)) < 0.2
    reference[:, 3], hypothesis[:, 4], reference[:5] = False, False, False
    mine = averages(hypothesis, reference)
    for subset, names in SUBSETS.items():
        columns = [CONDITIONS.index(name) for name in names]
        for kind in ("micro", "macro", "weighted", "example"):
            theirs = precision_recall_fscore_support(
                reference[:, columns],
                hypothesis[:, columns],
                average="samples" if kind == "example" else kind,
                zero_division=0,
            )
            for metric, value in zip(("precision", "recall", "f1"), theirs, strict=False):
                assert mine[f"{metric}_{kind}_{subset}"] == pytest.approx(value, abs=1e-12)
    assert {key.rsplit("_", 1)[1] for key in mine} == {"14", "13", "5"} and len(mine) == 3 * 14
    assert len(SUBSETS["13"]) == 13 and "No Finding" not in SUBSETS["13"] and SUBSETS["5"] == TOP_FIVE


def test_perfect_reports_and_reports_that_call_nothing():
    references = [labels(Edema=1), labels(Pneumonia=-1, Edema=1)]
    perfect = clinical_efficacy(references, references)["uncertain_positive"]
    assert perfect["f1_micro_14"] == perfect["f1_example_14"] == perfect["exact_match_14"] == 1.0
    nothing = clinical_efficacy([labels(), labels()], references)["uncertain_positive"]
    assert nothing["f1_micro_14"] == nothing["precision_micro_14"] == nothing["f1_macro_14"] == 0.0


def test_interval_by_study():
    rng = np.random.default_rng(3)
    references = [labels(Edema=int(rng.random() < 0.5), No_Finding=1) for _ in range(80)]
    hypotheses = [labels(Edema=int(rng.random() < 0.5), No_Finding=1) for _ in range(80)]
    interval = clinical_interval("f1_micro_13", hypotheses, references, num_samples=200)
    value = clinical_efficacy(hypotheses, references)["uncertain_positive"]["f1_micro_13"]
    assert interval["value"] == pytest.approx(value) and interval["low"] < value < interval["high"]
    doubled = clinical_interval(
        "f1_micro_13", hypotheses * 2, references * 2, groups=list(range(80)) * 2, num_samples=200
    )
    alone = clinical_interval("f1_micro_13", hypotheses * 2, references * 2, num_samples=200)
    width = {name: r["high"] - r["low"] for name, r in (("once", interval), ("grouped", doubled), ("copies", alone))}
    assert width["copies"] < 0.85 * width["grouped"]  # copies of a study are no new cases
    assert width["grouped"] == pytest.approx(width["once"], rel=0.25)


def test_bad_input():
    with pytest.raises(ValueError, match="as many"):
        clinical_efficacy([labels()], [])
    with pytest.raises(ValueError, match="Edema.*2"):
        clinical_efficacy([labels(Edema=2)], [labels()])
    with pytest.raises(ValueError, match="No Finding.*nothing"):
        clinical_efficacy([{}], [labels()])
    with pytest.raises(ValueError, match="no 'f1'"):
        clinical_interval("f1", [labels()], [labels()])
    with pytest.raises(ValueError, match="uncertain is 'u-ones'"):
        positive_matrix([labels()], "u-ones")


@pytest.mark.realdata
def test_an_all_normal_report_on_the_r2gen_test_split(real_data):
    """It is right on every normal film and finds nothing: a high micro average over 14, and 0 over 13 and over 5."""
    split = json.loads(real_data("iu_xray/r2gen_split_uids.json").read_text())["test"]
    with open(real_data("iu_xray/indiana_reports.csv"), encoding="utf-8", newline="") as file:
        findings = {int(row["uid"]): row["findings"] for row in csv.DictReader(file)}
    references = [label_report(findings[uid]) for uid in split]
    normal = label_report("The heart is normal in size. The lungs are clear. No pneumothorax or pleural effusion.")
    result = clinical_efficacy([normal] * len(split), references)["uncertain_positive"]
    assert len(split) == 590
    assert 0.55 < result["f1_micro_14"] < 0.70 and 0.050 < result["f1_macro_14"] < 0.060
    assert result["f1_micro_13"] == result["f1_micro_5"] == 0.0
