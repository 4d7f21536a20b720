"""The plain way, as the tests' reference: the processor's own chat template and tensors, one whole text per row."""

import numpy as np
import torch
from PIL import Image


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
    inputs = plain_inputs(vlm, texts, images)
    with torch.inference_mode():
        out = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
