"""vlm_model.py: the tower's tokens and the projector of every family, what is trained and what is not."""

import numpy as np
import pytest
import torch

from shared.models.inputs import preprocess_images
from shared.models.loading import FAMILIES
from shared.models.passes import features_of
from shared.phantom import phantom_study
from shared.runtime import InputError
from task1_classification.vlm_data import phantom_films
from task1_classification.vlm_model import Bank, check_gradients, class_weights, inputs_of, load_encoder, lora_weights
from task1_classification.vlm_model import make_probe, make_store, masked_loss, matching_rank, put_lora, random_like


@pytest.fixture(scope="module")
def images():
    return [phantom_study(0, i, 112).image for i in range(3)]


@pytest.fixture(scope="module")
def films():
    return phantom_films(8, 56)


@pytest.fixture(scope="module")
def llava(films):
    encoder = load_encoder("tiny:llava")
    return encoder, Bank(encoder, make_store(encoder, films), 1.0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_projecting_the_towers_tokens_gives_what_the_language_model_gets(family, images):
    encoder = load_encoder(f"tiny:{family}")
    ready = preprocess_images(encoder.processor, images)
    tokens, width = encoder.tower(ready), encoder.vlm.config.get_text_config().hidden_size
    seen = encoder.project(encoder.projector, tokens)
    assert len(tokens) == len(seen) == 3
    for mine, whole in zip(seen, features_of(encoder.vlm, ready), strict=True):
        if family == "qwen25vl":  # its tower works in windows; a mean does not depend on the order of tokens
            mine, whole = mine.mean(0), whole.mean(0)
        torch.testing.assert_close(mine, whole[..., :width])


@torch.no_grad()
def test_llavas_tokens_are_those_of_the_last_layer_but_one_without_the_class_token(llava, images):
    encoder, _ = llava
    ready = preprocess_images(encoder.processor, images)
    states = encoder.vlm.base.model.vision_tower(ready.values, output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.stack(encoder.tower(ready)), states[-2][:, 1:])


def test_bare_tiny_is_gemma_and_a_dual_encoder_has_a_tower_alone(images):
    assert load_encoder("tiny").family == "gemma3"
    encoder = load_encoder("tiny:siglip")
    assert encoder.tower(preprocess_images(encoder.processor, images))[0].shape == (64, 128)
    with pytest.raises(InputError, match="has no projector"):
        encoder.projector  # noqa: B018
    with pytest.raises(InputError, match="dual encoder"):
        load_encoder("tiny:siglip", quant="nf4")


@torch.no_grad()
def test_the_bank_says_the_same_whether_it_keeps_tokens_or_not(llava, films):
    encoder, bank = llava
    other = Bank(encoder, make_store(encoder, films), 1e-6, batch_size=3)
    assert bank.keeps and not other.keeps
    torch.testing.assert_close(bank.means([5, 1]), other.means([5, 1]))
    for a, b in zip(bank.tokens([3, 0]), other.tokens([3, 0]), strict=True):
        torch.testing.assert_close(a, b)
    seen = torch.stack([t.mean(0) for t in encoder.project(encoder.projector, bank.tokens([5, 1]))])
    torch.testing.assert_close(bank.means([5, 1]), seen)


def probes(llava, films, mode):
    encoder, bank = llava
    probe = make_probe(encoder, mode, 14, bank.behind.shape[1], seed=0)
    if mode != "cnn":
        probe.standardise(bank.behind)
    if mode == "random-projector":
        bank.look_through(probe)
    return encoder, bank, probe, inputs_of(mode, bank, films, np.arange(4), encoder)


@torch.no_grad()
def test_c_and_d_begin_as_b(llava, films):
    encoder, _, b, x = probes(llava, films, "projector-head")
    torch.nn.init.normal_(b.head.weight)
    for mode in ("projector", "lora"):
        _, _, other, y = probes(llava, films, mode)
        other.load_state_dict(b.state_dict(), strict=False)
        torch.testing.assert_close(other(y), b(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["head", "projector-head", "random-projector", "projector", "lora", "cnn"])
def test_gradients_reach_what_is_trained_and_nothing_else(llava, films, mode):
    encoder, _, _, _ = probes(llava, films, "projector")
    take_off = put_lora(encoder, 2, 0) if mode == "lora" else lambda: None
    try:
        _, _, probe, x = probes(llava, films, mode)
        if hasattr(probe, "head"):
            torch.nn.init.normal_(probe.head.weight, std=0.1)  # a head of zeros lets no gradient through yet
        masked_loss(probe(x), torch.from_numpy(films.truth[:4]), torch.ones(14)).backward()
        assert check_gradients(mode, probe, encoder)
        if mode in ("projector", "lora"):  # B learned nothing: no gradient passes its head of zeros yet
            kept = probe.head.weight.detach().clone()
            torch.nn.init.zeros_(probe.head.weight)
            assert not check_gradients(mode, probe, encoder)
            probe.head.weight.data.copy_(kept)
        if mode == "projector":
            probe.projector.zero_grad()
            with pytest.raises(RuntimeError, match="no gradient reaches the projector"):
                check_gradients(mode, probe, encoder)
        if mode == "lora":
            encoder.vlm.base.model.vision_tower.requires_grad_(True)
            with pytest.raises(RuntimeError, match="is frozen and has a gradient"):
                check_gradients(mode, probe, encoder)
    finally:
        take_off()
        encoder.vlm.base.requires_grad_(False)
        encoder.vlm.base.zero_grad()


@torch.no_grad()
def test_adapters_come_off_again(llava, images):
    encoder, _ = llava
    ready = preprocess_images(encoder.processor, images)
    before, rank = encoder.tower(ready), matching_rank(encoder)
    take_off = put_lora(encoder, rank, 0)
    adapters = sum(p.numel() for p in lora_weights(encoder).values())
    projector = sum(p.numel() for p in encoder.projector.parameters())
    assert abs(adapters - projector) < projector / rank  # as many as a whole rank allows
    for p in lora_weights(encoder).values():
        p.normal_()
    assert (encoder.tower(ready)[0] - before[0]).abs().max() > 0.01
    take_off()
    torch.testing.assert_close(encoder.tower(ready), before)


def test_a_random_projector_is_another_one_of_the_same_shape(llava):
    encoder, _ = llava
    first, same, other = (random_like(encoder.projector, seed) for seed in (0, 0, 1))
    shapes = [p.shape for p in encoder.projector.parameters()]
    assert [p.shape for p in first.parameters()] == shapes
    weight = [next(p for p in m.parameters() if p.ndim > 1) for m in (first, same, other, encoder.projector)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], weight[3]) and 0.8 < weight[0].std() * weight[0].shape[1] ** 0.5 < 1.2


def test_unknown_entries_are_left_out_of_the_loss():
    """Two known entries: -log sigmoid(0) = log 2 with weight 3, and -log(1 - sigmoid(1)) = 1.3133; mean of the two."""
    nan = float("nan")
    logits, truth = torch.tensor([[0.0, 5.0], [1.0, -9.0]]), torch.tensor([[1.0, nan], [0.0, nan]])
    loss = masked_loss(logits, truth, torch.tensor([3.0, 1.0]))
    assert loss.item() == pytest.approx((3 * 0.693147 + 1.313262) / 2, abs=1e-5)
    assert masked_loss(logits, torch.full_like(truth, nan), torch.ones(2)) == 0
    weights = class_weights(torch.tensor([[1.0, 0, nan], [0, 0, 1], [0, 0, 1], [0, 0, 1]]))
    assert weights.tolist() == pytest.approx([3, 4, 1 / 20], rel=1e-6)
