"""shared/models/capture.py: the rows are those of eager attention, and the model does not notice."""

import shared  # noqa: F401, isort: skip  # before transformers
import pytest
import torch
from plain_forward import build_inputs

from shared.models import capture as capture_module
from shared.models.capture import AttentionCapture, WholeAttention, language_model
from shared.models.loading import add_lora, load_vlm
from shared.models.passes import image_columns, make_prompts, margin, sample
from shared.models.tiny import tiny_folder
from shared.phantom import phantom_study

WINDOW = 40  # shorter than the prompt, so that decoding leaves columns behind
NEW = 5


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture(scope="module", params=["gemma3", "qwen2vl", "qwen3vl", "llava"])
def pair(request, cache):
    """The same model twice: with sdpa, and with eager attention to compare with."""
    sizes = dict(sliding_window=WINDOW) if request.param == "gemma3" else {}
    folder = str(tiny_folder("tiny:" + request.param, **sizes))
    return load_vlm(folder), load_vlm(folder, attention="eager")


def batch(vlm):
    """Two questions of different length, so that one is padded."""
    questions = ["Normal?", "Is there a nodule in the right upper zone, or an effusion on the left side?"]
    return build_inputs(vlm, questions, [phantom_study(0, i, 112).image for i in range(2)])


def eager_rows(attention, rows, keys, total):
    """attention (B, H, Q, N) of one layer -> (B, H, rows, keys): what the capture should have found."""
    queries, stored = attention.shape[2:]
    out = torch.zeros(*attention.shape[:2], len(rows), keys.shape[1])
    for r, row in enumerate(rows):
        for b in range(len(attention)):
            for k, column in enumerate(keys[b].tolist()):
                if column >= total - stored:
                    out[b, :, r, k] = attention[b, :, row - (total - queries), column - (total - stored)]
    return out


def test_prompt_and_decoding_equal_eager(pair):
    vlm, eager = pair
    inputs = batch(vlm)
    keys = torch.stack([case[0] for case in inputs.image_positions])
    with torch.inference_mode():
        found = eager.model.generate(
            **inputs.tensors,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    with AttentionCapture(vlm.model, keys=keys) as capture, torch.inference_mode():
        text = vlm.model.generate(**inputs.tensors, max_new_tokens=NEW, min_new_tokens=NEW)
    assert torch.equal(text, found.sequences) and len(capture.steps) == NEW and capture.status == "ok"
    kinds = set()
    for number, step in enumerate(capture.steps):
        total = inputs.length + number
        assert step.rows == [total - 1] and step.weights.shape == (len(capture.layer_kinds), 2, 4, 1, keys.shape[1])
        for layer, attention in enumerate(found.attentions[number]):
            expected = eager_rows(attention, step.rows, keys, total)
            assert (step.weights[layer] - expected).abs().max() < 1e-4
            kinds.add((capture.layer_kinds[layer], attention.shape[3] < total))
    if vlm.family == "gemma3":  # sliding layers were seen with columns left behind, full ones without
        assert (
            ("sliding_attention", True) in kinds
            and ("full_attention", False) in kinds
            and ("full_attention", True) not in kinds
        )
        assert inputs.length > WINDOW


def test_chosen_rows_of_the_prompt_equal_eager(pair):
    """Rows inside the image, where Gemma 3 looks both ways, and inside the text, for every column."""
    vlm, eager = pair
    inputs = batch(vlm)
    image = inputs.image_positions[1][0]
    rows = [int(image[0]), int(image[5]), int(image[-1]) + 3, inputs.length - 2]
    with AttentionCapture(vlm.model, queries=rows) as capture, torch.inference_mode():
        vlm.model(**inputs.tensors)
        attentions = eager.model(**inputs.tensors, output_attentions=True).attentions
    (step,) = capture.steps
    assert step.rows == rows and step.weights.shape[-1] == inputs.length
    for layer, attention in enumerate(attentions):
        expected = attention[:, :, rows]
        real = inputs.tensors["attention_mask"][:, rows].bool()[:, None, :, None]  # rows of padding mean nothing
        assert ((step.weights[layer] - expected) * real).abs().max() < 1e-4
    alive = inputs.tensors["attention_mask"][:, rows].bool()[None, :, None, :]
    torch.testing.assert_close(step.weights.sum(-1), alive.float().expand(step.weights.shape[:-1]))
    ahead = float((step.weights[:, 1, :, 0, int(image[1]) : int(image[-1])]).sum())
    assert (ahead > 0) == (vlm.family == "gemma3")


def test_without_padding_there_is_no_mask_to_read(pair):
    """sdpa then gets a flag instead of a mask; the rows must still be causal."""
    vlm, eager = pair
    inputs = build_inputs(vlm, ["Normal?"], [phantom_study(0, 0, 112).image])
    rows = [3, inputs.length // 2, inputs.length - 1]
    with AttentionCapture(vlm.model, queries=rows) as capture, torch.inference_mode():
        vlm.model(**inputs.tensors)
        attentions = eager.model(**inputs.tensors, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        assert (capture.steps[0].weights[layer] - attention[:, :, rows]).abs().max() < 1e-4


def test_the_model_does_not_notice(pair):
    vlm, _ = pair
    inputs = batch(vlm)
    language = language_model(vlm.model)
    with torch.inference_mode():
        expected = vlm.model(**inputs.tensors).logits
        text = vlm.model.generate(**inputs.tensors, max_new_tokens=NEW)
        with AttentionCapture(vlm.model):
            assert torch.equal(vlm.model(**inputs.tensors).logits, expected)
            assert torch.equal(vlm.model.generate(**inputs.tensors, max_new_tokens=NEW), text)
        assert torch.equal(vlm.model(**inputs.tensors).logits, expected)
    assert (
        language.config._attn_implementation == "sdpa"
        and not language._forward_pre_hooks
        and capture_module._active is None
    )
    with pytest.raises(KeyError), AttentionCapture(vlm.model):
        raise KeyError("in the middle")
    assert (
        language.config._attn_implementation == "sdpa"
        and not language._forward_pre_hooks
        and capture_module._active is None
    )


def test_rows_of_the_engine(pair):
    """sample() reads all but the last token first; one pass over the whole prompt has the prompt's own columns."""
    vlm, eager = pair
    question, film = "Is there a nodule?", phantom_study(0, 0, 112).image
    prompts = make_prompts(vlm, [question], [film])
    expected = build_inputs(eager, [question], [film])
    with torch.inference_mode():
        attentions = eager.model(**expected.tensors, output_attentions=True).attentions
    columns, length = image_columns(vlm, prompts), len(prompts[0])
    with AttentionCapture(vlm.model, keys=columns) as sampled:
        sample(vlm, prompts, max_new_tokens=2)
    with AttentionCapture(vlm.model, queries=[length - 2, length - 1], keys=columns) as whole:
        margin(vlm, prompts, share=False)
    assert [s.rows for s in sampled.steps] == [[length - 2], [length - 1], [length]]
    for layer, attention in enumerate(attentions):
        for r in range(2):
            wanted = attention[0, :, length - 2 + r, columns[0]]
            assert (sampled.steps[r].weights[layer, 0, :, 0] - wanted).abs().max() < 1e-4
            assert (whole.steps[0].weights[layer, 0, :, r] - wanted).abs().max() < 1e-4


def test_whole_attention_has_a_gradient(pair):
    vlm, eager = pair
    prompts = make_prompts(vlm, ["Is there a nodule?"], [phantom_study(0, 0, 112).image])
    plain = margin(vlm, prompts, share=False)
    with torch.inference_mode():
        inputs = build_inputs(eager, ["Is there a nodule?"], [phantom_study(0, 0, 112).image])
        attentions = eager.model(**inputs.tensors, output_attentions=True).attentions
    with WholeAttention(vlm.model) as whole:
        found = margin(vlm, prompts, share=False, gradient=True)
        gradients = torch.autograd.grad(found.sum(), whole.layers)
    assert whole.status == "ok" and (found - plain).abs().max() < 1e-4
    n = inputs.length  # LLaVA's template may write a blank in front of the answer: one column more
    for weights, gradient, attention in zip(whole.layers, gradients, attentions, strict=True):
        assert (weights[..., :n, :n] - attention).abs().max() < 1e-4 and gradient.shape == weights.shape
    assert max(float(g.abs().max()) for g in gradients) > 0
    assert language_model(vlm.model).config._attn_implementation == "sdpa" and capture_module._active is None


def test_several_answers_per_prompt(pair):
    vlm, _ = pair
    inputs = batch(vlm)
    keys = torch.stack([case[0] for case in inputs.image_positions])
    torch.manual_seed(0)
    with AttentionCapture(vlm.model, keys=keys) as capture, torch.inference_mode():
        vlm.model.generate(**inputs.tensors, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    first = capture.steps[0].weights
    assert first.shape[1] == 4 and torch.equal(first[:, 0], first[:, 1]) and not torch.equal(first[:, 1], first[:, 2])


def test_rows_of_generated_tokens_only(pair):
    vlm, _ = pair
    inputs = batch(vlm)
    wanted = [inputs.length + 1, inputs.length + 2]
    with AttentionCapture(vlm.model, queries=wanted, keys=[0, 1, -1]) as capture, torch.inference_mode():
        vlm.model.generate(**inputs.tensors, max_new_tokens=NEW, min_new_tokens=NEW)
    assert [s.rows for s in capture.steps] == [[w] for w in wanted]
    assert (capture.steps[0].weights[..., 2] == 0).all()  # the filler


def test_with_an_adapter():
    vlm = add_lora(load_vlm(str(tiny_folder("tiny:qwen2vl", layers=2, vision_layers=2))))
    vlm.model.eval()
    with AttentionCapture(vlm.model) as capture, torch.inference_mode():
        vlm.model(**batch(vlm).tensors)
    assert capture.status == "ok" and len(capture.layer_kinds) == 2


def test_misuse(pair):
    vlm, eager = pair
    with pytest.raises(ValueError, match="load it with attention='sdpa'"), AttentionCapture(eager.model):
        pass
    with AttentionCapture(vlm.model) as outer:
        with pytest.raises(RuntimeError, match="cannot be nested"), AttentionCapture(vlm.model):
            pass
    assert outer.status == "no_attn" and outer.steps == []


def test_a_planted_pattern_is_found():
    """Keys that point along one axis: the row must find exactly the softmax worked out here, for the right heads."""
    vlm = load_vlm(str(tiny_folder("tiny:qwen2vl", layers=2, vision_layers=2)))
    with AttentionCapture(vlm.model, queries=[3]) as capture:
        capture._start_pass(None, (), {"inputs_embeds": torch.zeros(1, 4, 8)})
        query = torch.zeros(1, 4, 4, 2)
        query[0, :, 3, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])  # four heads, the last row
        key = torch.zeros(1, 2, 4, 2)
        key[0, 0, 1, 0] = 1.0  # heads 0 and 1 share these keys; column 1 stands out
        key[0, 1, 2, 0] = 1.0  # heads 2 and 3: column 2
        layer = type("Layer", (), {"layer_idx": 0})
        capture.record(layer, query, key, None, 1.0)
    found = capture.steps[0].weights[0, 0, :, 0]
    for head, (strength, column) in enumerate([(0.0, 1), (1.0, 1), (2.0, 2), (3.0, 2)]):
        e = torch.tensor(strength).exp()
        expected = torch.full((4,), float(1 / (3 + e)))
        expected[column] = e / (3 + e)
        torch.testing.assert_close(found[head], expected)
