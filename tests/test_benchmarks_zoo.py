"""
No cheat earns what honesty earns: policies one by one, all combinations of templates, and what happens when a
protection is taken out.
"""

import json
import re

import numpy as np
import pytest

from benchmarks import zoo
from vqa_sft_grpo import answer_worth, gate, rewards
from vqa_sft_grpo.prompting import parse_response
from vqa_sft_grpo.looking import nothing_to_take_out
from vqa_sft_grpo.rewards import RewardSettings, rollout_terms

KINDS = ("all", "yes_no", "choice", "open", "place")
# What the honest policy is ahead by, at least, overall and for each kind of question that needs the image
BLIND, FORM, BOX = 0.2, 0.1, 0.08
# Cheats that are none on other kinds of question: there these give the honest response, or a better one
ONLY = {"knows: places without their side, always right": ("place",), "knows: left and right": ("choice", "place")}
# "The answer is nodule." is a true reasoning
ONLY |= dict.fromkeys(
    ("knows: reasoning repeats the answer", "knows: reasoning says both"), ("all", "yes_no", "choice")
)
BOX_CHEATS = {policy.name for policy in zoo.POLICIES if "box" in policy.name and policy.name.startswith("knows")}


@pytest.fixture(scope="module")
def cases():
    return zoo.make_cases(studies=24, seed=0)


@pytest.fixture(scope="module")
def found(cases):
    return zoo.earnings(*cases[:1], (zoo.HONEST, *zoo.POLICIES), cases[1])


def wanted(name):
    return BLIND if not name.startswith("knows") else BOX if name in BOX_CHEATS else FORM


def ahead(found):
    """{name: kind} of cheats that are not clearly behind."""
    return {
        (name, kind): row[kind]
        for name, row in found.items()
        for kind in ONLY.get(name, KINDS)
        if name != "honest" and row[kind] < wanted(name)
    }


def test_rows(cases):
    counts = {kind: int(mask.sum()) for kind, mask in zoo.masks_of(cases[0]).items()}
    assert counts["yes_no"] > 60 and counts["choice"] > 10 and counts["open"] > 10, counts
    assert 0.65 < np.mean([case.right for case in cases[0]]) < 0.85
    assert (
        len({case.row["group"] for case in cases[0]} & {f"P0-{n:06d}" for n in range(1000)}) == 0
    )  # other patients than training
    terms = [rollout_terms(case.row, zoo.honest(case)) for case in cases[0]]
    assert all(
        t["gate"] == 1 and not t["penalty"] and not t["hedged"] and t["correct"] == case.right
        for t, case in zip(terms, cases[0], strict=True)
    )
    assert np.mean([t["box"] for t in terms if t["box"] is not None]) > 0.6


def test_zoo_has_what_was_asked_for():
    assert (
        len(zoo.POLICIES) >= 78
        and len({policy.name for policy in zoo.POLICIES}) == len(zoo.POLICIES)
        and len(zoo.BLIND) >= 16
    )
    assert len(BOX_CHEATS) == 6 and set(zoo.SCHEMA) == {"caption", "reasoning", "answer"}


@pytest.mark.parametrize("policy", [policy.name for policy in zoo.POLICIES])
def test_no_cheat_reaches_honesty(policy, cases, found):
    row = zoo.margins(cases[0], found)[policy]
    for kind in ONLY.get(policy, KINDS):
        assert row[kind] >= wanted(policy), f"{policy} comes within {row[kind]:.3f} of the honest policy on {kind}"


def test_blind_policies_may_only_tie_where_no_image_is_needed(cases, found):
    """
    Where the answer is always the same, the constant is right: more often than the honest policy, which errs on a
    quarter.
    """
    lead = zoo.margins(cases[0], found)
    assert lead["most frequent answer to the same question"]["no image needed"] <= 0.2
    assert (
        max(np.mean(np.array(found[p.name]["gated"])[zoo.masks_of(cases[0])["no image needed"]]) for p in zoo.BLIND)
        <= 0.6
    )


def test_search(cases):
    best, tried = zoo.search(*cases, few=9, keep=8)
    assert tried >= 1000 and len(best) >= 8
    honest = zoo.earnings(cases[0], (zoo.HONEST,), cases[1])["honest"]
    for name, row in zoo.margins(cases[0], {"honest": honest} | best).items():
        assert name == "honest" or all(row[kind] >= BLIND for kind in KINDS), (name, row)


@pytest.mark.slow
def test_search_on_other_films():
    cases, frequencies = zoo.make_cases(studies=60, seed=2)
    best, _ = zoo.search(cases, frequencies, few=12, keep=12)
    found = zoo.earnings(cases, (zoo.HONEST, *zoo.POLICIES), frequencies)
    near = ahead(zoo.margins(cases, found))
    # about thirty questions: a caption left out or empty costs less where a wrong choice has taken all the rest
    empty = {("knows: no caption", "choice"), ("knows: caption of praise, 60 words", "choice")}
    assert set(near) <= empty and all(margin > 0.05 for margin in near.values()), near
    assert all(
        row[kind] >= BLIND
        for name, row in zoo.margins(cases, {"honest": found["honest"]} | best).items()
        if name != "honest"
        for kind in KINDS
    )


# --- designs in use elsewhere: the zoo finds their holes ---


@pytest.mark.parametrize(
    "design, cheats",
    [
        (
            "format + substring",
            ["'yes or no', 'left or right'", "answers as a list", "one key twice", "knows: caption of 300 words"],
        ),
        ("first yes/no substring", ["knows: hedged ('possibly ...')", "knows: whole-image box"]),
        ("edit ratio", ["knows: text around the object", "knows: image tokens in the caption"]),
        ("word recall", ["'yes or no', 'left or right'", "'yes, no', 'left, right'"]),
        ("length", ["knows: caption of 300 words", "knows: one sentence 20 times"]),
        ("caption like question", ["knows: question as caption"]),
        ("own box removed", ["knows: whole-image box"]),
    ],
)
def test_published_designs_are_beaten(design, cheats, cases):
    policies = [policy for policy in zoo.POLICIES if policy.name in cheats]
    found = zoo.earnings(cases[0], (zoo.HONEST, *policies), cases[1], (design,))
    honest = np.mean(found["honest"][design])
    for name in cheats:
        assert np.mean(found[name][design]) >= honest - 1e-9, name


def test_first_substring_reads_no_in_nodule(cases):
    case = next(case for case in cases[0] if case.row["answer"] == "no")
    design = zoo.DESIGNS["first yes/no substring"]
    assert (
        design(case, json.dumps({"answer": "nodule"}), (None, None))
        == 2
        == design(case, json.dumps({"answer": "unknown"}), (None, None))
    )
    opened = next(case for case in cases[0] if "yes" not in case.row["answer"] and "no" not in case.row["answer"])
    assert design(opened, json.dumps({"answer": "rubbish"}), (None, None)) == 2  # none equals none
    assert rollout_terms(case.row, json.dumps({"answer": "nodule"}))["reward"] == 0


# --- each protection is needed: without it a cheat reaches honesty ---


@pytest.mark.parametrize(
    "module, name, value, cheat",
    [
        (answer_worth, "HEDGES", set(), "knows: hedged ('possibly ...')"),
        (answer_worth, "HEDGES", set(), "knows: answer, low confidence"),
        (answer_worth, "MARKS", re.compile("(?!)"), "knows: answer?"),
        (answer_worth, "OTHER_LANGUAGES", set(), "knows: answer, then another in German"),
        (answer_worth, "words_beside", lambda *a: 0, "knows: answer, then 30 words"),
        (answer_worth, "place_share", lambda *a: 1.0, "knows: places without their side, always right"),
        (rewards, "TOO_LARGE", 2.0, "knows: whole-image box"),
        (rewards, "copying_term", lambda *a: 0.0, "knows: question as caption"),
        (rewards, "repetition_term", lambda *a: 0.0, "knows: answer repeated four times"),
        (rewards, "padding_term", lambda *a: 0.0, "knows: whitespace, 300 characters"),
        (rewards, "contradiction_term", lambda *a: (None, ""), "knows: reasoning says the opposite"),
        (rewards, "text_term", lambda *a: (None, None, None, ""), "knows: no caption"),
        (rewards, "text_term", lambda *a: (None, None, None, ""), "knows: reasoning about another finding"),
        (rewards, "text_term", lambda *a: (None, None, None, ""), "knows: answer first, reasoning behind it"),
        (rewards, "length_term", lambda *a: 0.0, "knows: caption of 300 words"),
        (rewards, "gate_problem", lambda *a: "", "knows: an extra field"),
        (gate, "keys_twice", lambda *a: False, "knows: key twice, same value"),
    ],
)
def test_without_a_protection(module, name, value, cheat, cases, found, monkeypatch):
    monkeypatch.setattr(module, name, value)
    answer_worth.accuracy_of.cache_clear()
    weaker = zoo.earnings(cases[0], (zoo.HONEST, next(p for p in zoo.POLICIES if p.name == cheat)), cases[1])
    answer_worth.accuracy_of.cache_clear()
    kind = ONLY.get(cheat, ("all",))[0]
    before, after = (zoo.margins(cases[0], some)[cheat][kind] for some in (found, weaker))
    assert after < 0.85 * before


def test_being_right_for_another_reason_costs(cases, found):
    """The same text, word for word: only the counterfactual term can tell, and without its weight nothing does."""
    name = "knows, but from elsewhere in the image"
    assert zoo.margins(cases[0], found)[name]["all"] >= 0.1
    policy = next(p for p in zoo.POLICIES if p.name == name)
    without = RewardSettings(weights="0.2,0.4,0.2,0")
    for case in cases[0][:40]:
        texts = [p.write(case) for p in (zoo.HONEST, policy)]
        earned = [
            rollout_terms(case.row, t, without, cases[1], *zoo.simulated_drops(case, p.sight, case.right))["reward"]
            for t, p in zip(texts, (zoo.HONEST, policy), strict=True)
        ]
        assert texts[0] == texts[1] and earned[0] == earned[1]


def test_simulated_scorer(cases):
    room = [case for case in cases[0] if case.has_room]
    assert len(room) > 30 and all(
        zoo.simulated_drops(c, "looks", True) == (None, None) for c in cases[0] if not c.has_room
    )
    assert all(
        (zoo.simulated_drops(c, "looks", True)[0] is None) == nothing_to_take_out(c.row) for c in room
    )  # where the answer is no, nothing is taken out
    some = [case for case in room if not nothing_to_take_out(case.row)]
    means = {
        (sight, right): np.mean(
            [[d[0], np.mean(d[1])] for c in some if (d := zoo.simulated_drops(c, sight, right))], axis=0
        )
        for sight in ("looks", "blind", "elsewhere", "random")
        for right in (True, False)
    }
    assert means["looks", True] == pytest.approx([1.0, 0.05], abs=0.2) and means["looks", False] == pytest.approx(
        [0.2, 0.05], abs=0.2
    )
    assert means["blind", True] == pytest.approx([0, 0], abs=0.03) and means["elsewhere", True] == pytest.approx(
        [0.05, 0.6], abs=0.1
    )
    assert tuple(means["random", False]) == (0, 0)


def test_opposite_reasoning_is_understood_as_one(cases):
    policy = next(p for p in zoo.POLICIES if p.name == "knows: reasoning says the opposite")
    terms = [rollout_terms(case.row, policy.write(case)) for case in cases[0]]
    assert np.mean([t["contradiction"] == -1 for t in terms]) > 0.9


# --- script ---


def test_script(own_folder, capsys):
    zoo.main(["--dry-run"])
    (folder,) = own_folder.glob("outputs/vqa_sft_grpo/zoo/*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["phantom"] and metrics["beaten"]["gated"] == 0 and metrics["beaten"]["format + substring"] > 3
    assert len(metrics["search"]["closest"]) == 10 and metrics["search"]["templates"] >= 1000
    text = (folder / "zoo.md").read_text()
    assert (
        all(policy.name in text for policy in zoo.POLICIES) and "**" in text and text.strip() in capsys.readouterr().out
    )
    assert all(parse_response(zoo.honest(case)).level == 0 for case in zoo.make_cases(3)[0])
