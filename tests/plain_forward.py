"""The plain way, as the tests' reference: the processor's own chat template and tensors, one whole text per row."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from shared.models.inputs import continuation


def as_picture(image):
    return Image.fromarray(np.asarray(image)).convert("RGB")


def plain_inputs(vlm, texts, images=None, system=None):
    """texts with one image, a list of images or None each -> what the processor makes of them, left-padded."""
    images = [None] * len(texts) if images is None else images
    conversations = []
    for text, case in zip(texts, images, strict=True):
        case = [] if case is None else case if isinstance(case, (list, tuple)) else [case]
        content = [{"type": "image", "image": as_picture(image)} for image in case] + [{"type": "text", "text": text}]
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        conversations.append([*turns, {"role": "user", "content": content}])
    return vlm.processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs=dict(padding=True),
    ).to(vlm.device)  # fmt: skip


def build_inputs(vlm, texts, images=None, answers=None):
    """
    plain_inputs as `tensors`, with answers also their labels (-100 in front of an answer); and where the image tokens
    are: image_positions[case][image]: columns of its tokens; length: columns of the batch.
    """
    tensors = dict(plain_inputs(vlm, texts, images))
    if answers is not None:
        rows = [continuation(vlm, answer, end=True)[0] for answer in answers]
        longest, start = max(map(len, rows)), tensors["input_ids"].shape[1]
        new = {
            name: torch.zeros(len(texts), longest + start, dtype=torch.long) for name in tensors if "pixel" not in name
        }
        new = {name: value for name, value in new.items() if "grid" not in name}
        labels = torch.full((len(texts), longest + start), -100)
        for i, row in enumerate(rows):  # shifted to the right, so that all texts end together
            gap = longest - len(row)
            for name in new:
                new[name][i, gap : gap + start] = tensors[name][i]
            new["input_ids"][i, :gap] = vlm.tokenizer.pad_token_id
            new["input_ids"][i, gap + start :] = labels[i, gap + start :] = torch.tensor(row)
            new["attention_mask"][i, gap + start :] = 1
        tensors |= new | {"labels": labels}
    is_image = (tensors["input_ids"] == vlm.image_token_id) & tensors["attention_mask"].bool()
    counts = [
        len(case) if isinstance(case, (list, tuple)) else int(case is not None)
        for case in images or [None] * len(texts)
    ]
    columns = [row.nonzero()[:, 0] for row in is_image]
    where = [list(c.chunk(n)) if n else [] for c, n in zip(columns, counts, strict=True)]  # images of one size
    return SimpleNamespace(tensors=tensors, image_positions=where, length=tensors["input_ids"].shape[1])


def plain_logprobs(vlm, text, image, ids, temperature=1.0, suppress=()):
    """log-probabilities (T,) and entropies (T,) of `ids` after one prompt, by one forward pass over all of it."""
    inputs = plain_inputs(vlm, [text], [image])
    more = torch.tensor([ids], device=vlm.device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            filler = torch.ones_like(more) if name == "attention_mask" else torch.zeros_like(more)
            inputs[name] = torch.cat([inputs[name], filler], 1)
    scores = vlm.model(**inputs, use_cache=False).logits[0, -len(ids) - 1 : -1].float() / temperature
    scores[:, list(suppress)] = -torch.inf
    log = scores.log_softmax(-1)
    return log.gather(1, more[0][:, None])[:, 0], torch.special.entr(log.exp()).sum(1)


def generate(vlm, texts, images=None, max_new_tokens=20):
    """Greedy texts by transformers' own generate()."""
    inputs = build_inputs(vlm, texts, images)
    with torch.inference_mode():
        out = vlm.model.generate(**inputs.tensors, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, inputs.length :]
    return [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
