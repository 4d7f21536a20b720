"""The model of CheXQuery: shapes, views, ablations, loss and start token, what each phase trains, checkpoints."""

import pytest
import shared  # noqa: F401, isort: skip  # before transformers
import torch
import torch.nn.functional as F
from transformers import SiglipVisionModel

from chexquery.checkpoints import UNTRAINED, load_model, save_model, untrained
from chexquery.cases import REGIONS
from chexquery.model import build_model, query_starts
from shared.metrics.labels import CONDITIONS
from shared.models.tiny import tiny_folder
from shared.runtime import InputError, load_checkpoint

REPORTS = ["The heart is enlarged. No effusion.", "No pneumothorax is seen."]


def films(n=3, size=56, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 2, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.ones(n, 2, dtype=torch.bool)


@pytest.fixture(scope="module")
def model():
    return untrained()[0]


@pytest.fixture(scope="module")
def pretrained():
    """The tiny models as folders with weights: frozen, with LoRA, as SigLIP and Flan-T5 are."""
    places = {f"{part}_model": str(tiny_folder(f"tiny:{name}"))
              for part, name in (("vision", "siglip"), ("text", "t5"), ("condition", "bert"))}  # fmt: skip
    return build_model(UNTRAINED | places | {"query_init": "text", "num_heads": 4, "lora_alpha": 12.0})


def test_shapes_and_order(model):
    images, present = films()
    seen = model(images, present, maps=True)
    assert seen.tokens.shape == (3, 1 + 3, 64) and seen.logits.shape == (3, 14) and seen.region_logits.shape == (3, 6)
    assert model.names == [*CONDITIONS, *REGIONS]
    assert [m.shape for m in seen.maps] == [
        (3, 2, 20, 2 * 16)
    ]  # 56 / 14 = 4: 16 patches a view, none taken for a class token
    torch.testing.assert_close(seen.maps[0].sum(-1), torch.ones(3, 2, 20))
    assert seen.gate.shape == (3, 1) and ((seen.gate > 0) & (seen.gate < 1)).all()
    torch.testing.assert_close(model(images, present).tokens, seen.tokens)  # with and without maps alike


def test_look_is_the_tower_and_its_pooling_head(model):
    images, present = films(1)
    patches, whole = model.look(images, present)
    pixels = images[0, :, None].float().expand(-1, 3, -1, -1) / 127.5 - 1
    out = model.vision(pixel_values=pixels)
    assert isinstance(model.vision, SiglipVisionModel)
    torch.testing.assert_close(patches[0], out.last_hidden_state.flatten(0, 1))
    torch.testing.assert_close(whole[0], out.pooler_output)
    torch.testing.assert_close(model(images, present).whole[0], (out.pooler_output + model.views).mean(0))


def test_an_absent_view_is_not_seen(model):
    images, present = films(2)
    present[1, 1] = False
    other = images.clone()
    other[1, 1] = 255 - other[1, 1]
    a, b = (model(x, present, maps=True) for x in (images, other))
    torch.testing.assert_close(a.tokens, b.tokens)
    assert a.maps[0][1, ..., 16:].abs().max() == 0 and a.maps[0][0, ..., 16:].min() > 0
    lateral = torch.tensor([[False, True]])
    assert torch.isfinite(model(images[:1], lateral).tokens).all()  # the lateral alone works too


@pytest.mark.parametrize("pool, tokens", [(0, 1), (3, 4), (10, 11), (31, 32)])
def test_number_of_visual_tokens(pool, tokens):
    assert untrained(num_pool_queries=pool)[0](*films(1)).tokens.shape[1] == tokens


def test_visual_tokens_differ_from_the_start(pretrained):
    """Pooling that weighs all queries alike gives one token ten times, and the decoder a mean over 20 queries."""
    with torch.no_grad():
        tokens = pretrained(*films()).tokens[:, 1:]
    alike = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    assert alike[:, ~torch.eye(tokens.shape[1], dtype=torch.bool)].mean() < 0.9


@pytest.mark.parametrize("off, names", [("gate", 20), ("regions", 14), ("conditions", 6), ("query_attention", 20)])
def test_every_part_can_be_switched_off(off, names):
    model = untrained(**{off: False})[0]
    seen = model(*films(1))
    assert len(model.names) == names and seen.queries.shape[1] == names
    assert (seen.gate is None) == (off == "gate") and (seen.logits is None) == (off == "conditions")
    assert (seen.region_logits is None) == (off == "regions")
    parts = {"gate": "fusion.gate", "conditions": "aux", "regions": "region_head", "query_attention": "among"}
    assert not any(f"{parts[off]}." in name for name, _ in model.named_parameters())


def test_no_queries_at_all_are_refused():
    with pytest.raises(InputError, match="leave no queries"):
        untrained(conditions=False, regions=False)


def test_swapped_starts_swap_their_logits(model):
    images, present = films()
    order = list(range(20))
    order[2], order[10] = 10, 2
    plain, swapped = model(images, present), model(images, present, starts=model.queries[order])
    torch.testing.assert_close(swapped.logits, plain.logits[:, order[:14]])
    torch.testing.assert_close(swapped.tokens, plain.tokens)  # pooling has no order: the text cannot change


def test_put_replaces_one_query(model):
    images, present = films()
    plain = model(images, present)
    same = model(images, present, put={4: plain.queries[:, 4]})
    torch.testing.assert_close(same.tokens, plain.tokens)
    other = model(images, present, put={4: torch.zeros(64)})
    assert not torch.allclose(other.logits[:, 4], plain.logits[:, 4])
    torch.testing.assert_close(other.logits[:, 5], plain.logits[:, 5])


# --- queries


def test_text_starts_differ_and_are_repeatable():
    settings = UNTRAINED | {"query_init": "text", "condition_model": "tiny:bert"}
    torch.manual_seed(1)
    a = query_starts(settings, 64)[:14]
    torch.manual_seed(2)
    b = query_starts(settings, 64)[:14]
    torch.testing.assert_close(a, b)  # text, not chance
    cosine = F.normalize(a) @ F.normalize(a).T - torch.eye(14)
    assert cosine.abs().max() < 0.95 and a.std().item() == pytest.approx(1, abs=1e-3)


def test_an_absent_condition_model_is_refused():
    with pytest.raises(InputError, match="./no-such/biobert"):
        untrained(query_init="text", condition_model="./no-such/biobert")


# --- the report


def test_loss_by_hand_with_prompt_and_smoothing():
    model = build_model(UNTRAINED | {"prompt": "The heart", "max_tokens": 30}, REPORTS).eval()
    tokens = model(*films(2)).tokens
    ids = model.encode(REPORTS)
    assert ids[0, :2].tolist() == model.prompt_ids and len(model.prompt_ids) == 2
    log_p = model.decoder_logits(tokens, ids)[0].log_softmax(-1)
    learned = [(i, j) for i in range(2) for j in range(2, ids.shape[1]) if ids[i, j] != -100]  # no prompt, no padding
    plain = -torch.stack([log_p[i, j, ids[i, j]] for i, j in learned]).mean()
    torch.testing.assert_close(model.report_loss(tokens, ids), plain)
    uniform = -torch.stack([log_p[i, j].mean() for i, j in learned]).mean()
    torch.testing.assert_close(model.report_loss(tokens, ids, 0.1), 0.9 * plain + 0.1 * uniform)


@pytest.mark.parametrize("prompt", ["", "The heart"])
def test_writing_starts_as_training_does(prompt):
    """What is written greedily is the most probable continuation under teacher forcing, prompt or not."""
    model = build_model(UNTRAINED | {"prompt": prompt}, REPORTS).eval()
    tokens = model(*films(2)).tokens
    _, ids = model.write(tokens)
    full = torch.cat([torch.tensor(model.prompt_ids, dtype=torch.long).expand(2, -1), ids], 1)
    logits, attention = model.decoder_logits(tokens, full, attention=True)
    best = logits[:, len(model.prompt_ids) :].argmax(-1)
    first_end = [next((j for j, t in enumerate(row) if t == 1), len(row) - 1) for row in ids.tolist()]
    for row, (a, b) in enumerate(zip(best, ids, strict=True)):
        assert a[: first_end[row] + 1].tolist() == b[: first_end[row] + 1].tolist()
    assert ids.shape[1] <= 12 and attention[0].shape[-1] == tokens.shape[1]
    torch.testing.assert_close(attention[0].sum(-1), torch.ones_like(attention[0].sum(-1)))


def test_beams_do_not_change_the_tokens_given(model):
    tokens = model(*films(2)).tokens
    before = tokens.clone()
    assert len(model.write(tokens, beams=3)[0]) == 2 and torch.equal(tokens, before)


def test_vocabulary_comes_from_the_reports(model):
    assert model.tokenizer("The heart is enlarged.", add_special_tokens=False).input_ids.__len__() == 5
    text = "No effusion or pneumothorax is seen."
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 7 and model.tokenizer.decode(ids) == text
    with pytest.raises(InputError, match="no training reports with text"):
        build_model(UNTRAINED, [""])


# --- what is trained


def gradients(model, phase):
    model.freeze(phase)
    model.train()
    model.zero_grad(set_to_none=True)
    size = model.image_size
    seen = model(*films(2, size))
    loss = model.report_loss(seen.tokens, model.encode(REPORTS)) + seen.logits.mean() + seen.region_logits.mean()
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def part_of(name):
    return "lora" if "lora_" in name else name.split(".")[0]


def test_what_each_phase_trains_of_pretrained_models(pretrained):
    assert {part_of(n) for n in gradients(pretrained, 1)} == {
        "views",
        "queries",
        "layers",
        "fusion",
        "aux",
        "region_head",
    }
    two = gradients(pretrained, 2)
    assert {part_of(n) for n in two} == {"views", "queries", "layers", "fusion", "aux", "region_head", "lora"}
    lora = {n for n in two if "lora_" in n}
    assert lora == {n for n, _ in pretrained.named_parameters() if "lora_" in n}  # no adapter without a gradient
    assert {n.split(".")[-4] for n in lora if n.startswith("vision")} == {"q_proj", "v_proj"}
    assert all(".decoder." in n for n in lora if n.startswith("text"))
    three = gradients(pretrained, 3)
    assert {part_of(n) for n in three} == {"views", "queries", "layers", "fusion", "lora", "aux", "region_head"}
    assert all(n.startswith("text") for n in three if "lora_" in n)


def test_lora_matrices_move_from_the_second_step_on(pretrained):
    """B starts at zero, so A has no slope in the first step."""
    gradients(pretrained, 2)
    optimizer = torch.optim.SGD([p for p in pretrained.parameters() if p.requires_grad], lr=0.1)
    slopes = {n: p.grad.abs().max().item() for n, p in pretrained.named_parameters() if "lora_A" in n}
    assert max(slopes.values()) == 0
    optimizer.step()
    gradients(pretrained, 2)
    assert min(p.grad.abs().max().item() for n, p in pretrained.named_parameters() if "lora_A" in n) > 0


def test_lora_settings_reach_the_modules(pretrained):
    layers = [m for m in pretrained.modules() if hasattr(m, "lora_A")]
    assert len(layers) > 8 and {m.scaling["default"] for m in layers} == {12.0 / 4}
    assert {m.r["default"] for m in layers} == {4}


def test_nothing_random_is_frozen(model):
    fresh = untrained()[0]
    names = gradients(fresh, 1)
    assert names == {n for n, _ in fresh.named_parameters()}
    rest = {"views", "queries", "layers", "fusion", "text", "aux", "region_head"}
    assert {part_of(n) for n in gradients(fresh, 3)} == rest


def test_both_pretrained_or_both_tiny():
    with pytest.raises(InputError, match="either both"):
        untrained(vision_model=str(tiny_folder("tiny:siglip")))


# --- checkpoints

SAW = {"name": "phantom", "phantom": True, "section": "findings", "views": ["frontal"], "drawn": {}, "again": {}}
TOLD = {"thresholds": [0.5] * 14, "data": SAW | {"patients": []}, "decoding": [1, 0]}


def test_checkpoint_round_trip_and_refusals(model, pretrained, tmp_path):
    for n, kind in enumerate((model, pretrained)):
        path = tmp_path / f"run{n}" / "phase2" / "best.pt"
        save_model(path, kind.eval(), 2, **TOLD)
        again, told = load_model(tmp_path / f"run{n}")
        images, present = films(2, kind.image_size)
        torch.testing.assert_close(again(images, present).tokens, kind(images, present).tokens)
        assert (
            told["phase"] == 2
            and again.write(again(images, present).tokens)[0] == kind.write(kind(images, present).tokens)[0]
        )
        assert again.names == kind.names
    assert not any("lora" not in n and n.startswith("vision") for n in pretrained.own_state())  # not the base again
    assert model.settings["base"] is None and len(pretrained.settings["base"]) == 2
    with pytest.raises(InputError, match="another size"):
        untrained(num_pool_queries=5)[0].load_own_state({"weights": model.own_state()}, "best.pt")
    with pytest.raises(InputError, match="there is no CheXQuery model"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("part, key, value, words", [
    ("weights", "views", torch.full((2, 64), float("nan")), "NaN or infinite"),
    ("weights", "views", "text", "is damaged"),
    ("chexquery", "num_layers", 10**9, "must be between 1 and 100"),
    ("chexquery", "num_heads", "x", "is damaged"),
    ("chexquery", "image_size", None, "is damaged"),
    ("chexquery", "pieces", "abc", "is damaged"),
    ("chexquery", "base", ["other", "weights"], "another pretrained weights"),
    ("chexquery", "names", [1], "another order"),
    ("data", "views", [], "what it was trained on"),
    (None, "decoding", [10**9, 0], "it writes with"),
    (None, "thresholds", [float("nan")] * 14, "14 thresholds"),
])  # fmt: skip
def test_a_changed_checkpoint_is_refused(model, tmp_path, part, key, value, words):
    save_model(tmp_path / "best.pt", model, 2, **TOLD)
    state = load_checkpoint(tmp_path / "best.pt")
    (state[part] if part else state)[key] = value
    torch.save(state, tmp_path / "best.pt")
    with pytest.raises(InputError, match=words):
        load_model(tmp_path / "best.pt")


def test_sizes_beyond_all_models_are_refused():
    for change in ({"num_layers": 10**6}, {"patch_size": 1, "image_size": 112}, {"prompt": "no " * 100}):
        with pytest.raises(InputError, match="--"):
            untrained(**change)


def test_it_learns_two_studies():
    torch.manual_seed(0)
    model = untrained(max_tokens=20)[0]
    images, present = films(2)
    model.freeze(1), model.train()
    optimizer, ids, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), model.encode(REPORTS), []
    for _ in range(200):
        loss = model.report_loss(model(images, present).tokens, ids)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    assert model.write(model(images, present).tokens)[0] == REPORTS
