"""attention_viz/maps.py: spans, grids, every map against a plain computation, a status where there is none."""

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import pytest
import torch
from PIL import Image
from plain_forward import build_inputs

from attention_viz import maps as maps_module
from attention_viz.maps import METHODS, Map, ask, ask_all, attention_map, boxes_in, cell_of, choose_heads, filled
from attention_viz.maps import gradient_at, image_span, on_common_grid, over_pixels, overlay, shares_in_boxes
from attention_viz.maps import tokens_of, view_of
from shared.models.inputs import preprocess_images
from shared.models.loading import load_vlm
from shared.models.passes import Prompt, make_prompts
from shared.phantom import phantom_study
from shared.runtime import InputError

QUESTION = "Is there a pleural effusion?"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture(scope="module", params=["gemma3", "llava", "qwen2vl", "qwen25vl", "qwen3vl"])
def vlm(request, cache):
    return load_vlm("tiny:" + request.param)


@pytest.fixture(scope="module")
def film():
    return np.ascontiguousarray(phantom_study(0, 3, 224).image[:, 20:200])  # 224 high, 180 wide


@pytest.fixture(scope="module")
def case(vlm, film):
    return ask(vlm, film, QUESTION, finding="pleural effusion")


# ------------------------------------------------------------------------------------------------------------ geometry


def test_a_bright_square_comes_back_to_its_place(vlm):
    """Cells of the grid are painted on the image; the pixels that the model gets differ in exactly these cells."""
    image = np.full((168, 112 if vlm.spec.rope or vlm.family == "gemma3" else 140), 60, np.uint8)
    before = make_prompts(vlm, [QUESTION], [image])[0].grids[0]
    view = view_of(vlm.processor, *image.shape)
    chosen = np.zeros(before, bool)
    chosen[1:3, 1] = True
    painted = filled(image, before, view, chosen, "mean")
    assert np.array_equal(painted, image)  # grey on grey
    r, c = cell_of(before, view, np.arange(image.shape[1]) + 0.5, np.arange(image.shape[0]) + 0.5)
    painted[(chosen[r[:, None], c]) & (r >= 0)[:, None] & (c >= 0)] = 255
    one, two = (preprocess_images(vlm.processor, [x]) for x in (image, painted))
    difference = (two.values - one.values).abs()
    if two.grid_thw is None:
        side = difference.shape[-1]
        cells = difference.sum(1)[0].reshape(before[0], side // before[0], before[1], side // before[1]).amax((1, 3))
        inner = difference.sum(1)[0].reshape(before[0], side // before[0], before[1], side // before[1]).mean((1, 3))
    else:
        cells = inner = difference.reshape(before[0] * before[1], -1).mean(1).reshape(before)
    found = (inner > 0.5 * inner.max()).numpy()
    assert np.array_equal(found, chosen) and cells.max() > 0  # IoU 1


def test_what_the_model_sees(vlm):
    x0, y0, x1, y1 = view_of(vlm.processor, 200, 100)
    assert (x0, y0, x1, y1) == ((0, 50, 100, 150) if vlm.family == "llava" else (0, 0, 100, 200))


def test_a_padded_view_goes_beyond_the_image():
    class Pads:
        class image_processor:
            do_pad, do_center_crop, size, crop_size = True, True, {"shortest_edge": 336}, {"height": 336, "width": 336}

    assert view_of(Pads, 200, 100) == (-50, 0, 150, 200)


def test_shares_and_common_grid_by_hand():
    shares = shares_in_boxes([[0, 0, 50, 100], [25, 0, 75, 50]], (2, 2), (0, 0, 100, 100))
    assert np.allclose(shares, [[1, 0.5], [1, 0]])
    values = np.array([[0.5, 0.25], [0.25, 0]], np.float32)
    whole = on_common_grid(Map(values, "ok", (0, 0, 100, 100), (100, 100)), side=4)
    assert np.allclose(whole[:2, :2], 0.125) and whole.sum() == pytest.approx(1) and (whole[2:, 2:] == 0).all()
    cut = on_common_grid(Map(values, "ok", (0, 50, 100, 150), (200, 100)), side=4)  # the middle half of a high image
    assert (cut[[0, 3]] == 0).all() and np.allclose(cut[1:3, 0], [0.25, 0.125])
    large = over_pixels(Map(values, "ok", (0, 50, 100, 150), (200, 100)))
    assert large.shape == (200, 100) and (large[:50] == 0).all() and large.max() == pytest.approx(1)
    assert large.argmax() // 100 < 100 and large.argmax() % 100 < 50


# --------------------------------------------------------------------------------------------------------- attention


def eager_attentions(vlm, film, question):
    eager = load_vlm(vlm.source, attention="eager")
    inputs = build_inputs(eager, [question], [film])
    with torch.inference_mode():
        return eager.model(**inputs.tensors, output_attentions=True).attentions, inputs


def test_rows_and_layers_are_those_of_eager_attention(vlm, film, case):
    attentions, inputs = eager_attentions(vlm, film, QUESTION)
    columns, length = inputs.image_positions[0][0], inputs.length
    assert torch.equal(columns, torch.from_numpy(case.columns)) and case.status == "ok"
    stacked = torch.stack([a[0] for a in attentions])  # (layers, heads, L, L)
    last = stacked[:, :, length - 1, columns]
    assert np.abs(case.rows["last"] - last.numpy()).max() < 1e-4
    mean = last.mean((0, 1)).reshape(case.grid)
    assert np.abs(attention_map(case, "mean").values - (mean / mean.sum()).numpy()).max() < 1e-5
    words = tokens_of(case, "pleural effusion")
    assert words and vlm.tokenizer.decode(case.prompt.ids[words]).strip().rstrip("?") == "pleural effusion"
    assert np.abs(case.rows["finding"] - stacked[:, :, words][..., columns].mean(2).numpy()).max() < 1e-4
    quarter = last[-max(1, len(last) // 4) :].mean((0, 1)).reshape(case.grid)
    found = attention_map(case, "last_quarter").values
    assert np.abs(found - (quarter / quarter.sum()).numpy()).max() < 1e-5
    rollout, eye = None, torch.eye(length)
    for attention in stacked.mean(1):
        step = 0.5 * attention + 0.5 * eye
        rollout = step if rollout is None else step @ rollout
    expected = rollout[length - 1, columns].reshape(case.grid)
    found = attention_map(case, "rollout").values
    assert np.abs(found - (expected / expected.sum()).numpy()).max() < 1e-4


def test_a_batch_equals_single_questions(vlm, film):
    other = phantom_study(0, 5, 150).image
    questions = ["Normal?", "Is there a nodule in the right upper zone, or an effusion on the left side?"]
    together = ask_all(vlm, [film, other], questions)
    for image, question, found in zip((film, other), questions, together, strict=True):
        alone = ask_all(vlm, [image], [question])[0]
        assert np.abs(alone.rows["last"] - found.rows["last"]).max() < 1e-5
        assert alone.margin == pytest.approx(found.margin, abs=1e-4) and alone.answer == found.answer


def test_the_answers_own_tokens(vlm, film, case):
    found = attention_map(case, "mean", "answer")
    assert found.status == "ok" and 0 < found.image_mass < 1
    assert case.rows["answer"].shape == case.rows["last"].shape


def test_gradient_weighted_by_hand(film):
    vlm = load_vlm("tiny:qwen2vl")
    case, eager = ask(vlm, film, QUESTION), load_vlm(vlm.source, attention="eager")
    inputs = build_inputs(eager, [QUESTION], [film])
    found = eager.model(**inputs.tensors, output_attentions=True)
    ids = maps_module.answer_sides(vlm)
    scores = found.logits[0, -1]
    target = scores[ids[1]].logsumexp(0) - scores[ids[2]].logsumexp(0)
    assert float(target) == pytest.approx(case.margin, abs=1e-3)
    gradients = torch.autograd.grad(target * (1 if case.margin > 0 else -1), found.attentions)
    total = torch.eye(inputs.length)
    for attention, gradient in zip(found.attentions, gradients, strict=True):
        total = total + (attention[0] * gradient[0]).relu().mean(0) @ total
    expected = total[-1, case.columns].detach().reshape(case.grid)
    got = attention_map(case, "gradient_weighted").values
    assert np.abs(got - (expected / expected.sum()).numpy()).max() < 1e-3


def test_pixel_gradients_follow_the_margin(vlm, case):
    """The gradient along the pixels is what a small step along them does; along the way from grey they add up."""
    ready = preprocess_images(vlm.processor, [case.image])

    def at(values):
        images = maps_module.Images(values, ready.grids, ready.grid_thw)
        return float(maps_module.toward_answer(case, maps_module.prompts_with(case, images)))

    step = 1e-2
    slope = (at(ready.values * (1 + step)) - at(ready.values * (1 - step))) / (2 * step)
    found = float((gradient_at(case, ready, ready.values) * ready.values).sum())
    assert found == pytest.approx(slope, rel=0.05, abs=2e-3)
    grey = np.full_like(case.image, round(float(case.image.mean())))
    base = preprocess_images(vlm.processor, [grey]).values
    way = [gradient_at(case, ready, base + (ready.values - base) * (k + 0.5) / 40) for k in range(40)]
    total = float((sum(way) / 40 * (ready.values - base)).sum())
    assert total == pytest.approx(at(ready.values) - at(base), rel=0.05, abs=5e-3)


def test_every_method_has_a_map_or_a_status(vlm, case):
    for method in METHODS:
        found = attention_map(case, method, heads=[(0, 1), (1, 2)])
        assert (found.values is None) == (found.status != "ok")
        expected = {"own_box": "no_box"} | ({"grad_cam": "unsupported"} if vlm.family == "qwen25vl" else {})
        assert found.status == expected.get(method, "ok"), method
        if found.values is not None:
            assert found.values.shape == case.grid and found.values.sum() == pytest.approx(1, abs=1e-4)
            assert found.values.min() >= 0
    tower = vlm.base.get_submodule(vlm.spec.projector[0])
    assert not tower._forward_pre_hooks


def test_occlusion_finds_the_cell_that_matters(vlm, film, case, monkeypatch):
    grid, view = case.grid, case.view

    def answers(case, images):  # the answer depends on one cell alone
        wanted = np.zeros(grid, bool)
        wanted[1, 2] = True
        r, c = cell_of(grid, view, np.arange(film.shape[1]) + 0.5, np.arange(film.shape[0]) + 0.5)
        there = wanted[r[:, None], c] & (r >= 0)[:, None] & (c >= 0)
        return np.array([abs(case.margin) - float((image[there] != film[there]).any()) for image in images])

    monkeypatch.setattr(maps_module, "answers_to", answers)
    found = attention_map(case, "occlusion").values
    assert np.unravel_index(found.argmax(), grid) == (1, 2) and found.max() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------ statuses


def test_failures_have_a_status_and_no_map(vlm, film, case, monkeypatch):
    assert attention_map(case, "heads").status == "no_heads"
    for method in ("mean", "rollout"):
        assert attention_map(ask_all(vlm, [film], [QUESTION])[0], method, "finding").status == "no_query"
    assert attention_map(case, "rollout", "answer").status == "unsupported"
    assert attention_map(ask_all(vlm, [film], [QUESTION])[0], "relative").status == "no_query"
    short = Prompt(np.delete(case.prompt.ids, case.columns[3]), case.prompt.grids, case.prompt.features)
    assert image_span(vlm, short)[1] == "span_mismatch"
    two = make_prompts(vlm, [QUESTION], [[film, film]])[0]
    assert image_span(vlm, two)[1] == "span_mismatch"
    broken = maps_module.Case(vlm, film, QUESTION, short, case.columns[:0], "span_mismatch")
    for method in METHODS:
        assert attention_map(broken, method).status == "span_mismatch"
    with pytest.raises(InputError, match="there is no map to draw: span_mismatch"):
        overlay(film, attention_map(broken))
    with pytest.raises(InputError, match="there is no map 'atention'"):
        attention_map(case, "atention")
    with pytest.raises(InputError, match="no colour map 'hott'"):
        overlay(film, attention_map(case), "hott")
    monkeypatch.setattr(maps_module.AttentionCapture, "record", lambda *arguments: None)
    hidden = ask_all(vlm, [film], [QUESTION])[0]
    assert hidden.status == "no_attn" and attention_map(hidden).values is None and np.isfinite(hidden.margin)


def test_numbers_that_are_not_finite_are_named(vlm, film, monkeypatch):
    record = maps_module.AttentionCapture.pick
    monkeypatch.setattr(maps_module.AttentionCapture, "pick", lambda *a: record(*a) * float("nan"))
    assert ask_all(vlm, [film], [QUESTION])[0].status == "nan"


def test_boxes_as_models_write_them():
    assert boxes_in("see [100, 200, 500, 600]") == [[0.1, 0.2, 0.5, 0.6]]
    assert boxes_in("<|box_start|>(100,200),(500,600)<|box_end|>") == [[0.1, 0.2, 0.5, 0.6]]
    assert boxes_in("[500, 200, 100, 600] (1, 2) [1, 2, 3] 4000") == []


def test_a_written_box_becomes_a_map(vlm, case, monkeypatch):
    monkeypatch.setattr(maps_module, "text_of", lambda *a, **o: "[[0, 0, 500, 1000]]")
    found = attention_map(case, "own_box")
    assert found.status == "ok" and found.values[:, : case.grid[1] // 2].sum() > 0.6


def test_heads_are_those_that_look_at_one_place():
    rows = np.full((3, 2, 4, 16), 0.01)
    rows[:, 1, 3, 5] += 1.0  # looks much, at one place
    rows[:, 0, 2] = 0.2  # looks much, everywhere
    rows[:, 0, 0] = 0.0
    rows[:, 0, 0, 1] = 1e-4  # at one place, but hardly at the image
    assert choose_heads(list(rows), 1) == [(1, 3)] and (0, 0) not in choose_heads(list(rows), 3)


def test_overlay_keeps_size_and_colours_the_peak(film):
    values = np.zeros((4, 4), np.float32)
    values[1, 1] = 1
    picture = overlay(film, Map(values, "ok", (0, 0, 180, 224), film.shape))
    assert picture.shape == (224, 180, 3) and picture.dtype == np.uint8
    changed = (picture.astype(int) - film[..., None]).any(-1)
    assert changed[84, 67] and not changed[200, 170]
    Image.fromarray(picture)
