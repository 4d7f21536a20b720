"""Prompts, targets, boxes between pixels and thousandths, and a reader of responses that nothing may break."""

import json
import random
import time

import pytest

from shared.runtime import InputError
from vqa_sft_grpo.prompting import REPAIR_LEVELS, STYLES, VALID_LEVEL, boxes_from_model, boxes_to_model, build_prompt
from vqa_sft_grpo.prompting import build_target, instruction, parse_response

ROW = {
    "question": "Is there an effusion?",
    "width": 200,
    "height": 100,
    "output": json.dumps(
        {"caption": "Chest film.", "reasoning": "Blunt angle.", "boxes": [[20, 50, 100, 100]], "answer": "yes"}
    ),
}


# --- prompts and targets ---


@pytest.mark.parametrize("style", STYLES)
def test_prompt_holds_instruction_and_question(style):
    text = build_prompt("  Is there {an} effusion? ", style)
    assert text.startswith(instruction(style)) and text.endswith("Question: Is there {an} effusion?")
    assert "{units}" not in text and "pixels" not in text


def test_units_differ_between_files_and_model():
    assert "pixels" in instruction("json", units="pixels") and "0 to 1000" in instruction("json")


def test_unknown_style_is_refused():
    for call in (lambda: build_prompt("?", "xml"), lambda: build_target(ROW, "xml")):
        with pytest.raises(InputError, match="no prompt style 'xml'; there are think and json"):
            call()


def test_target_has_model_units_and_reads_back_strictly():
    target = build_target(ROW, "json")
    assert list(json.loads(target)) == ["caption", "reasoning", "boxes", "answer"]
    found = parse_response(target, "json")
    assert (found.level, found.answer, found.boxes, found.valid) == (0, "yes", [[100, 500, 500, 1000]], True)
    assert boxes_from_model(found.boxes, 200, 100) == [[20, 50, 100, 100]]
    think = build_target(ROW, "think")
    assert think == "<think>Chest film. Blunt angle.</think><answer>yes</answer>"
    assert parse_response(think, "think").level == 0 and parse_response(think).answer == "yes"


def test_target_leaves_out_what_is_unknown():
    row = ROW | {"output": '{"answer": "no"}'}
    assert (
        build_target(row, "json") == '{"answer": "no"}'
        and build_target(row, "think") == "<think></think><answer>no</answer>"
    )
    assert parse_response(build_target(row, "think"), "think").level == 0


def test_boxes_there_and_back():
    rng = random.Random(0)
    for _ in range(300):
        width, height = rng.randint(28, 3000), rng.randint(28, 3000)
        x0, x1 = sorted(rng.uniform(0, width) for _ in range(2))
        y0, y1 = sorted(rng.uniform(0, height) for _ in range(2))
        model = boxes_to_model([[x0, y0, x1, y1]], width, height)
        assert all(isinstance(n, int) and 0 <= n <= 1000 for n in model[0])
        back = boxes_from_model(model, width, height)[0]
        for a, b, side in zip(back, (x0, y0, x1, y1), (width, height) * 2, strict=True):
            assert abs(a - b) <= side / 2000 + 1e-9  # half a thousandth
    assert boxes_to_model([[-5, 0, 250, 100]], 200, 100) == [[0, 0, 1000, 1000]]
    assert boxes_from_model([[-10, 0, 2000, 500]], 200, 100) == [[0, 0, 200, 50]]


# --- the ladder of repairs: text, style, level, answer ---

LADDER = [
    ('{"answer": "yes"}', "json", 0, "yes"),
    ('  {"answer": "yes", "boxes": []}\n', "json", 0, "yes"),
    ('{"answer": true}', "json", 0, "yes"),
    ('{"answer": 3}', "json", 0, "3"),
    ('{"answer": "a } b { \\" c"}', "json", 0, 'a } b { " c'),
    ('{"answer": "yes", "answer": "yes"}', "json", 0, "yes"),  # says the same twice
    ('```json\n{"answer": "yes"}\n```', "json", 1, "yes"),
    ('```\n{"answer": "yes"}```', "json", 1, "yes"),
    ('Here it is: {"answer": "yes"}', "json", 2, "yes"),
    ('{"answer": "yes"} I hope this helps', "json", 2, "yes"),
    ('{"answer": "no"} {"answer": "yes"}', "json", 2, "yes"),
    ('{"answer": "yes"} {"caption": "x"}', "json", 2, "yes"),  # the last one with an answer
    ('{ sorry {"answer": "yes"}', "json", 2, "yes"),
    ('{"answer": "yes",}', "json", 3, "yes"),
    ('{"boxes": [[1, 2, 3, 4,],], "answer": "yes"}', "json", 3, "yes"),
    ('{"answer": "left\nlung"}', "json", 3, "left\nlung"),
    ("{'answer': 'yes', 'boxes': None}", "json", 4, "yes"),
    ("{'answer': 'the patient's left'}", "json", 4, "the patient's left"),
    ("{\u201canswer\u201d: \u201cyes\u201d}", "json", 4, "yes"),
    ('{answer: "yes"}', "json", 4, "yes"),
    ('{"answer": yes}', "json", 4, "yes"),
    ('{"answer": "yes"', "json", 5, "yes"),
    ('{"answer": "left lu', "json", 5, "left lu"),
    ('{"answer": "yes", "boxes": [[1, 2, 3, 4], [5, 6', "json", 5, "yes"),
    ('{"answer": "yes", "caption": "an opacity { in', "json", 5, "yes"),
    ('```json\n{"answer": "yes", "capt', "json", 5, "yes"),
    ("The answer is: left lung.", "json", 6, "left lung"),
    ("**Answer:** yes\nanswer: no", "json", 6, "no"),
    ("Answer - yes", "json", 6, "yes"),
    ("The lungs are clear.\n\n### Final answer\n\nNo", "json", 6, "No"),
    ("<think>x</think><final_answer>yes</final_answer>", "think", 2, "yes"),
    ("yes", "json", 6, "yes"),
    ('{"caption": "a "bad" one", "answer": "no"}', "json", 6, "no"),
    ("<think>x</think><answer>yes</answer>", "json", 6, "yes"),  # the other style
    ('{"answer": "yes"}', "think", 6, "yes"),
    ("<think>x</think>\n<answer>yes</answer>", "think", 0, "yes"),
    ("<answer>yes</answer>", "think", 2, "yes"),
    ("Well. <think>x</think><answer>yes</answer>", "think", 2, "yes"),
    ("<think>x</think><answer>yes</answer> Done", "think", 2, "yes"),
    ("<think>x</think><answer>yes", "think", 5, "yes"),
    ("", "json", 7, None),
    ("x" * 500, "json", 7, None),
    ("{}[]", "json", 2, None),
    ('{"caption": "no answer here"}', "json", 0, None),
    ('{"answer": ""}', "json", 0, None),
    # what a reader would find, in another form than asked for: never strict
    ('{"answer": ["yes"]}', "json", 2, "yes"),
    ('{"answer": ["left", "right"]}', "json", 2, "left, right"),
    ('{"answer": {"text": "yes"}}', "json", 2, "yes"),
    ('{"Answer": "yes"}', "json", 2, "yes"),
    ('{"final_answer": "yes"}', "json", 2, "yes"),
    ('{"answer": {}}', "json", 2, None),
    ('{"answer": null}', "json", 0, None),
    ('{"answer": NaN}', "json", 4, None),
    ("{'answer': 'yes', 'x': nan}", "json", 4, "yes"),
    ('{"answer": "yes", "boxes": [[0, 0, -Infinity, 1]]}', "json", 4, "yes"),
    ('{"answer": "yes", "boxes": [[1e308, 2, 3, 4e400]]}', "json", 0, "yes"),
    ("<think>a</think><Answer>yes</Answer>", "think", 2, "yes"),
    ("<THINK>a</THINK><ANSWER>yes</ANSWER>", "think", 2, "yes"),
    ("<answer>Yes</answer><answer>yes</answer>", "think", 2, "yes"),
    ("The answer = left lung", "json", 6, "left lung"),
    ("So it is \\boxed{no}", "json", 6, "no"),
    ("Answer:\nyes", "json", 6, "yes"),
    ("!" * 100, "json", 7, None),
    ('{"response": {"answer": "yes"}}', "json", 2, "yes"),
    ("<think>a</think>yes", "think", 6, "yes"),
    ("Yes<|im_end|>", "json", 6, "Yes"),
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "nodule"}]\n```\nYes', "json", 6, "Yes"),
    ('{"answer": "yes", "boxes": [[1, 2, 3, 4]', "json", 5, "yes"),
    ('{"answer": [{"text": "yes"}]}', "json", 2, "yes"),
    ('{"data": {"result": [{"answer": "yes"}]}}', "json", 2, "yes"),
    ('{"choices": [{"answer": "yes"}, {"answer": "no"}]}', "json", 0, None),
    ("{'answer': 'yes', 'boxes': [(1, 2, 3, 4)]}", "json", 4, "yes"),
    ('{"answer": "yes"; "boxes": []}', "json", 6, "yes"),
    ('"answer": "yes", "boxes": []}', "json", 6, "yes"),
    ('The answer is "yes", or "no"', "json", 6, 'yes", or "no'),  # no second answer is lost
    ("Answer: Yes\nThe answer is based on the image.", "json", 6, "Yes"),
    ("<think>The answer is no", "json", 7, None),  # a thought without its end
    ("<thinking>no</thinking><answer>yes</answer>", "think", 2, "yes"),
    ("\u25c1think\u25b7no\u25c1/think\u25b7yes", "think", 6, "yes"),
    ("<think>x</think><answer>yes<answer>", "think", 5, "yes"),
]


@pytest.mark.parametrize("text, style, level, answer", LADDER)
def test_ladder(text, style, level, answer):
    found = parse_response(text, style)
    assert (found.level, found.answer) == (level, answer)
    assert found.valid == (level <= VALID_LEVEL and answer is not None)
    assert (found.data is None) == (level >= 6)


def test_every_level_is_reached_and_named():
    assert {level for _, _, level, _ in LADDER} == set(REPAIR_LEVELS) == set(range(8))


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"answer": "yes", "answer": "no"}', "two different values for 'answer'"),
        ("{'answer': 'yes', 'answer': 'no'}", "two different values for 'answer'"),
        ('{"answer": "yes", "x": {"a": 1, "a": 2}}', "two different values for 'a'"),
        ('{"answer": "yes", "Answer": "no"}', "two different values for 'Answer'"),
        ('{"answer": "yes", "x": ' + "[" * 20 + "]" * 20 + "}", "nested too deeply"),
        ("<answer>yes</answer><answer>no</answer>", "two different <answer> marks"),
    ],
)
def test_refused_and_not_mended(text, why):
    found = parse_response(text)
    assert (found.data, found.answer, found.boxes, found.level, found.problem, found.valid) == (
        None,
        None,
        [],
        7,
        why,
        False,
    )


@pytest.mark.parametrize(
    "boxes, expected",
    [
        ([[1, 2, 3, 4], [5.5, 6, 7, 8]], [[1, 2, 3, 4], [5.5, 6, 7, 8]]),
        ([1, 2, 3, 4], [[1, 2, 3, 4]]),
        ([{"box": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8], "label": "x"}], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([[9, 9, 1, 1]], [[9, 9, 1, 1]]),  # as written
        ([["100", "200", "300", "400"]], [[100, 200, 300, 400]]),
        (["100, 200, 300.5, 400"], [[100, 200, 300.5, 400]]),
        ("[100, 200, 300, 400]", [[100, 200, 300, 400]]),
        ("(1,2),(3,4) (5,6),(7,8)", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([[100, 200], [300, 400]], [[100, 200, 300, 400]]),
        ([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([{"x0": 1, "y0": 2, "x1": 3, "y1": 4}, {"x1": 1, "y1": 2, "x2": 3, "y2": 4}], [[1, 2, 3, 4]] * 2),
        ([{"xmin": "1", "ymin": "2", "xmax": "3", "ymax": "4"}], [[1, 2, 3, 4]]),
        ({"left lung": [1, 2, 3, 4], "heart": {"bbox": [5, 6, 7, 8]}}, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ({"X0": 1, "y0": 2, "X1": 3, "y1": 4}, [[1, 2, 3, 4]]),
        ([["1,2", "3,4"]], [[1, 2, 3, 4]]),
        ([{"top_left": [1, 2], "bottom_right": [3, 4]}, {"coords": [5, 6, 7, 8]}], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([[1e308, 2, 3, 4]], []),
        ("left lung, 3 cm", []),
        ([[1, 2, 3], ["a", 2, 3, 4], [True, 2, 3, 4], None, [10**9, 0, 1, 1]], []),
        ("whole image", []),
        (None, []),
    ],
)
def test_boxes_as_given(boxes, expected):
    assert parse_response(json.dumps({"answer": "yes", "boxes": boxes})).boxes == expected


@pytest.mark.parametrize(
    "name", ["bbox_2d", "box", "bbox", "bboxes", "box_2d", "bounding_box", "bounding_boxes", "BBox"]
)
def test_boxes_under_other_names(name):
    found = parse_response(json.dumps({"answer": "x", name: [1, 2, 3, 4]}))
    assert (found.boxes, found.answer, found.level) == ([[1, 2, 3, 4]], "x", 0)


MARKED = "<|object_ref_start|>nodule<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"


@pytest.mark.parametrize(
    "text, style, answer, level",
    [
        (f"Yes {MARKED}", "json", "Yes", 6),
        ("Yes nodule(100,200),(300,400)", "json", "Yes nodule", 6),  # decoded without special tokens
        (f"There is a {MARKED} in the lung.", "json", "There is a nodule in the lung.", 6),
        ("No <ref>nodule</ref><box>(100,200),(300,400)</box>", "json", "No", 6),
        ("Left lung, at [100, 200, 300, 400]", "json", "Left lung, at", 6),
        (f'{{"answer": "yes"}} {MARKED}', "json", "yes", 2),
        (f"<think>{MARKED}</think><answer>yes</answer>", "think", "yes", 2),
    ],
)
def test_qwens_own_marks(text, style, answer, level):
    found = parse_response(text, style)
    assert (found.answer, found.boxes, found.level) == (answer, [[100, 200, 300, 400]], level)
    assert not found.valid


def test_a_question_that_nobody_asks_is_refused():
    assert build_prompt("x" * 2000, "json")
    for question in ("x" * 200_000, "\U0001f600" * 3000):
        with pytest.raises(InputError, match="characters; at most 2,000 are asked"):
            build_prompt(question, "json")


def test_the_prompt_itself_is_no_valid_answer():
    for style in STYLES:
        assert (
            not parse_response(build_prompt("Is it?", style), style).valid
            and not parse_response(build_prompt("Is it?", style)).valid
        )


# --- nothing breaks it ---


def check(found, text):
    assert found.data is None or isinstance(found.data, dict)
    assert found.answer is None or (isinstance(found.answer, str) and found.answer.strip())
    assert isinstance(found.boxes, list) and all(len(box) == 4 for box in found.boxes)
    assert found.level in REPAIR_LEVELS
    json.dumps([found.data, found.answer, found.boxes], ensure_ascii=False, allow_nan=False).encode(
        "utf-8"
    )  # can be written to a file


def test_random_bytes_and_odd_inputs():
    rng = random.Random(1)
    for text in (
        None,
        3,
        [],
        b"",
        b'{"answer": "yes"}',
        "\ud800",
        '{"answer": "\\ud800"}',
        '{"\\udc00": 1, "answer": "x"}',
        "\x00",
        "{" + "\u202e" + "}",
    ):
        check(parse_response(text), text)
    assert parse_response(b'{"answer": "yes"}').answer == "yes" and parse_response(None).level == 7
    for _ in range(500):
        text = rng.randbytes(rng.randint(0, 80))
        for style in (None, *STYLES):
            check(parse_response(text, style), text)


def test_fuzzed_objects():
    """Pieces of JSON in random order, and a good response with random cuts, repeats and changes."""
    rng = random.Random(2)
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        ":",
        ",",
        "\\",
        "\n",
        " ",
        '"answer"',
        '"yes"',
        "answer",
        "None",
        "NaN",
        "1e999",
        "-3.5",
        "0" * 30,
        "```",
        "```json\n",
        "<answer>",
        "</answer>",
        "<think>",
        "é",
        "\U0001f600",
        "\\u12",
        "{}",
        "[[1,2,3,4]]",
    ]
    good = json.dumps(
        {
            "caption": "a [b] {c}",
            "reasoning": 'he said "x"',
            "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]],
            "answer": "left lung",
        }
    )
    for _ in range(3000):
        if rng.random() < 0.5:
            text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        else:
            i, j = sorted(rng.sample(range(len(good)), 2))
            text = rng.choice(
                [good[:j], good[i:], good[:i] + good[j:], good[:i] + rng.choice(pieces) + good[i:], good[:j] + good[i:]]
            )
        for style in (None, *STYLES):
            check(parse_response(text, style), text)


def test_every_cut_of_a_good_response_keeps_a_whole_answer():
    good = '{"answer": "left lung", "caption": "x", "boxes": [[1, 2, 3, 4]]}'
    whole = good.index('"left lung"') + len('"left lung"')
    for end in range(whole, len(good)):
        assert parse_response(good[:end], "json").answer == "left lung", good[:end]


MILLION = 1_000_000
HUGE = {
    "open braces": "{" * MILLION,
    "nested objects": '{"a":' * (MILLION // 5),
    "quotes": '"' * MILLION,
    "open strings": '{"a":"' * (MILLION // 6),
    "backslashes": '{"' + "\\" * MILLION,
    "escapes": "{'" + "\\'" * (MILLION // 2),
    "many objects": "{}" * (MILLION // 2),
    "objects never closed": '{"k":[' + "{}," * (MILLION // 3),
    "brackets": '{"a":' + "[" * MILLION,
    "words": "answer: " * (MILLION // 8),
    "answer marks": "<answer>" * (MILLION // 8),
    "thoughts": "<think>" * (MILLION // 7),
    "fences": "```" * (MILLION // 3),
    "spaces": "{" + " " * MILLION + "x",
    "digits": '{"answer":' + "1" * MILLION + "}",
    "long answer": '{"answer":"' + "a" * MILLION + '"}',
    "loose names": "{a:" * (MILLION // 3),
    "emoji": "\U0001f600{'" * (MILLION // 3),
    "answer and spaces": "answer" + " " * MILLION,
    "points": "(1,2),(" * (MILLION // 7),
    "numbers": "[1, 2, 3, " * (MILLION // 10),
    "box marks": "<|box_start|>" * (MILLION // 13),
    "things": "yes <ref>" + "a" * MILLION,
    "half a mark": "<" + " " * MILLION,
    "apostrophes": "{'" + "a'" * (MILLION // 2),
    "boxed": "\\boxed{" * (MILLION // 7),
    "answer in quotes": 'answer: "' + 'a" ,; ' * (MILLION // 6),
    "holders": '{"a":[' * (MILLION // 6),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_megabyte_takes_linear_time(name):
    """
    CPU seconds of 1 MB against 1/8 of it: eight times as much where the time is linear, 64 times where it is quadratic.
    """

    def seconds(text):
        start = time.process_time()
        check(parse_response(text), text)
        return time.process_time() - start

    text = HUGE[name]
    part, whole = seconds(text[: len(text) // 8]), seconds(text)
    assert whole < 0.5 or whole < 24 * part, (part, whole)


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": "yes", "bounding box": [100, 200, 300, 400]}',
        '{"answer": "yes", "coordinates": [100, 200, 300, 400]}',
        '{"answer": "yes", "boxes": [{"x": 100, "y": 200, "width": 200, "height": 200}]}',
        '{"answer": "yes", "boxes": [{"left": 100, "top": 200, "Width": 200, "Height": 200}]}',
        '{"answer": "yes", "boxes": {"mass": [[100, 200, 300, 400]]}}',
        '{"answer": "yes", "boxes": [[[100, 200, 300, 400]]]}',
        '{"finalAnswer": "yes", "boxes": [[100, 200, 300, 400]]}',
        '{"answer": "yes" /* sure */, // a box\n "boxes": [[100, 200, 300, 400]]}',
        '"{\\"answer\\": \\"yes\\", \\"boxes\\": [[100, 200, 300, 400]]}"',
        "yes [[100, 200, 300, 400]]",
        "yes (100, 200, 300, 400)",
        "yes <box>100,200,300,400</box>",
        "yes <bbox>[100,200,300,400]</bbox>",
        "yes <|ref|>nodule<|/ref|><|det|>[[100,200,300,400]]<|/det|>",
        "\\boxed{\\text{yes}} [100, 200, 300, 400]",
        "So the final answer is \\boxed{yes}. [100, 200, 300, 400]",
    ],
)
def test_more_forms_of_boxes_and_objects(text):
    found = parse_response(text, "json")
    assert (found.answer, found.boxes) == ("yes", [[100, 200, 300, 400]])
    assert found.level > 1 or "bounding" in text or "coord" in text or '"boxes": [' in text or "mass" in text


def test_comments_that_never_end_take_no_time():
    for mark in ("// ", "/* ", "/* */ ", "//\n"):
        assert parse_response('{"a": ' + mark * 20_000 + "@").answer is None


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Question: is it large? Answer: no. Question: is it normal? Answer: yes", "yes"),
        ("<answer>yes</answer> <answer>Yes.</answer>", "Yes."),
        ("{«answer»: «yes»}", "yes"),
        ("{„answer“: „yes“}", "yes"),
        ("{「answer」: 「yes」}", "yes"),
        ('{"caption": "x", "answer": [[30, 8, 8, 8, 8, 8, 8, 839, 3, 3', None),  # boxes that never end
        ('{"answer": "answer": [[30, 8, 8, 8, 8, 8, 8, 839, 3, 3', None),
        ("answer: 3 cm", "3 cm"),
        ("Answer: 12, 13", "12, 13"),
    ],
)
def test_answers_that_look_odd(text, answer):
    assert parse_response(text).answer == answer
    eight = parse_response('{"answer": "yes", "boxes": [10, 20, 30, 40, 50, 60, 70, 80]}')
    assert eight.boxes == [[10, 20, 30, 40], [50, 60, 70, 80]]
