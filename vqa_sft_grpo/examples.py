"""
From prepared rows to what shared/models/tuning.py trains on: one Example per row and prompt style, the answer and
the boxes with weights of their own.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import re

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np

from shared.models.inputs import check_text, continuation, prompt_ids
from shared.models.tuning import Example
from shared.runtime import InputError
from vqa_sft_grpo.prompting import build_prompt, build_target

MARKS = {"json": '"answer":', "think": "<answer>"}  # where the answer begins in a target
BOXES = re.compile(r'(?<="boxes": )\[\[[\d, \[\]]*\]\]')


def make_examples(vlm, rows, store, styles, max_length=2048, answer_weight=1.0, box_weight=1.0):
    """
    rows of prepare_data.py, store.number_of[i] being the image of row i -> Examples, row by row, style by style.
    answer_weight, box_weight: weights in the loss of the tokens of the answer itself and of the boxes; all others have
    1. InputError, with the numbers, for an example longer than max_length tokens: cutting it would leave image tokens
    without their features, or an answer without its end.
    """
    tokens_of = functools.cache(functools.partial(prompt_ids, vlm))
    examples = []
    for i, row in enumerate(rows):
        grid = tuple(store.grids[store.number_of[i]])
        for style in styles:
            target = build_target(row, style)
            check_text(vlm, target)
            ids, places = continuation(vlm, target, end=True)
            characters = np.ones(len(target) + 1, np.float32)  # the last: of what ends the answer
            if boxes := style == "json" and BOXES.search(target):
                characters[boxes.start() : boxes.end()] = box_weight
            characters[target.rfind(MARKS[style]) + len(MARKS[style]) :] = answer_weight
            weights = np.array([characters[min(max(last - 1, 0), len(target))] for _, last in places], np.float32)
            prompt = tokens_of(build_prompt(row["question"], style), (grid,))
            example = Example(i, style, store.number_of[i], prompt, np.array(ids, np.int32), weights)
            if example.length > max_length:
                tokens = grid[0] * grid[1]
                raise InputError(
                    f"row {i} ({row['image']}) has {example.length} tokens, {tokens} of the image,"
                    f" {len(prompt) - tokens} of the question and {len(ids)} of the answer, and --max-length is"
                    f" {max_length}: raise it, or lower --max-pixels; nothing is ever cut off"
                )
            examples.append(example)
    return examples
