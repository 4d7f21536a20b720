"""
shared/models/llava_med.py on tiny checkpoints in the layouts of LLaVA-Med and LLaVA-Rad: the logits stay what they
were.
"""

import shared  # noqa: F401, isort: skip  # before transformers
import re

import numpy as np
import pytest
import torch
from plain_forward import build_inputs
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from shared.models import llava_med, memory
from shared.models.llava_med import convert, load_tokenizer, main, make_config, new_names, read_sentencepiece
from shared.models.loading import load_vlm
from shared.models.passes import make_prompts
from shared.models.tiny import byte_bpe
from shared.phantom import phantom_study
from shared.runtime import InputError, read_json, write_json

VOCAB = 400
REAL_TOWER = llava_med.CLIP_L_336
LANGUAGE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    bos_token_id=1,
    eos_token_id=2,
    vocab_size=VOCAB,
    tie_word_embeddings=False,
)
ORIGINAL = dict(
    mm_hidden_size=64,
    mm_projector_type="mlp2x_gelu",
    mm_use_im_start_end=False,
    mm_use_im_patch_token=False,
    mm_vision_select_feature="patch",
    mm_vision_select_layer=-2,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        patch.setattr(
            llava_med,
            "CLIP_L_336",
            dict(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
                projection_dim=32,
            ),
        )
        yield


def write_tokenizer(folder):
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(VOCAB, special, bos="<s>"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert len(tokenizer) == VOCAB
    tokenizer.save_pretrained(folder)


def random_model(folder, raw):
    """The model that a folder stands for, with random weights; the row of the image token is zero."""
    torch.manual_seed(0)
    config = make_config(folder, raw)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.get_input_embeddings().weight[-1] = 0
        model.get_output_embeddings().weight[-1] = 0
    return model


def old_name(name):
    """A name of transformers -> the name in the original LLaVA code."""
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
        "multi_modal_projector.linear_2", "mm_projector.2"
    )
    return name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.").replace(
        "model.language_model.", "model."
    )


@pytest.fixture(scope="module")
def llava_med_folder(tmp_path_factory, cache):
    """-> (folder in LLaVA-Med's layout, two shards; the model it holds)."""
    folder = tmp_path_factory.mktemp("med") / "llava-med"
    folder.mkdir()
    raw = (
        LANGUAGE
        | ORIGINAL
        | dict(
            model_type="llava_mistral",
            mm_vision_tower="openai/clip-vit-large-patch14-336",
            image_aspect_ratio="pad",
            rope_theta=1e6,
            sliding_window=None,
        )
    )
    write_json(folder / "config.json", raw)
    write_tokenizer(folder)
    model = random_model(folder, raw)
    weights = {old_name(n): (w[:VOCAB] if len(w) == VOCAB + 1 else w).clone() for n, w in model.state_dict().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # stored by old versions, computed today
    names = sorted(weights)
    for i, half in enumerate((names[::2], names[1::2]), start=1):
        save_file(
            {n: weights[n].contiguous() for n in half}, folder / f"model-{i:05d}-of-00002.safetensors", {"format": "pt"}
        )
    index = {n: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, n in enumerate(names)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": index})
    return folder, model


@torch.inference_mode()
def logits(vlm, model=None):
    films = [
        phantom_study(0, 0, 112).image,
        np.ascontiguousarray(phantom_study(0, 1, 112).image[20:90]),
    ]  # one is not square
    inputs = build_inputs(vlm, ["Is there a nodule?", "Normal?"], films)
    return (model or vlm.model)(**inputs.tensors).logits


def test_llava_med_is_loaded_with_its_own_weights(llava_med_folder):
    folder, model = llava_med_folder
    vlm = load_vlm(str(folder))
    assert (
        vlm.family == "llava" and vlm.image_token_id == VOCAB and vlm.model.config.text_config.vocab_size == VOCAB + 1
    )
    assert torch.equal(logits(vlm), logits(vlm, model))
    state = vlm.model.state_dict()
    assert state.keys() == model.state_dict().keys() and all(
        torch.equal(state[n], w) for n, w in model.state_dict().items()
    )
    grids = make_prompts(vlm, ["a"], [np.zeros((40, 90), np.uint8)])[0].grids
    assert vlm.processor.image_processor.do_pad and grids == ((4, 4),)


def test_llava_med_in_four_bits(llava_med_folder):
    folder, model = llava_med_folder
    vlm = load_vlm(str(folder), quant="nf4")
    assert (logits(vlm) - logits(vlm, model)).norm() / logits(vlm, model).norm() < 0.6


def test_llava_med_converted_shard_by_shard(llava_med_folder, tmp_path, capsys):
    folder, model = llava_med_folder
    main([str(folder), str(tmp_path / "new" / "med")])
    assert "converted: " in capsys.readouterr().out
    vlm = load_vlm(str(tmp_path / "new" / "med"))
    assert torch.equal(logits(vlm), logits(vlm, model)) and vlm.image_token_id == VOCAB
    assert len(list((tmp_path / "new" / "med").glob("model-*.safetensors"))) == 2
    again = load_vlm(str(folder))
    assert vlm.tokenizer("[INST] a [/INST]")["input_ids"] == again.tokenizer("[INST] a [/INST]")["input_ids"]
    assert (
        vlm.model.generation_config.eos_token_id == 2 and vlm.processor.chat_template == again.processor.chat_template
    )


def test_a_plain_load_would_have_been_random(llava_med_folder):
    """Why the key map is there: without it transformers only warns."""
    folder, model = llava_med_folder
    _, info = LlavaForConditionalGeneration.from_pretrained(
        folder,
        config=make_config(folder, read_json(folder / "config.json")),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    assert len(info["missing_keys"]) > 20 and len(info["unexpected_keys"]) > 20


def damaged(folder, tmp_path, change):
    """A copy of the folder whose second shard went through `change`."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for p in folder.iterdir():
        (copy / p.name).write_bytes(p.read_bytes())
    weights = change(load_file(copy / "model-00002-of-00002.safetensors"))
    save_file(weights, copy / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = read_json(copy / "model.safetensors.index.json")
    old = {n: f for n, f in index["weight_map"].items() if "00001" in f}
    write_json(
        copy / "model.safetensors.index.json",
        index | {"weight_map": old | dict.fromkeys(weights, "model-00002-of-00002.safetensors")},
    )
    return copy


def test_incomplete_checkpoints_are_refused(llava_med_folder, tmp_path):
    folder, _ = llava_med_folder
    copy = damaged(folder, tmp_path, lambda w: {n: t for n, t in w.items() if "mm_projector" not in n})
    with pytest.raises(InputError, match="missing keys, the first is model.multi_modal_projector"):
        load_vlm(str(copy))
    with pytest.raises(
        InputError, match="is not complete: . weights are missing, the first is model.multi_modal_projector"
    ):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_foreign_weights_are_refused(llava_med_folder, tmp_path):
    copy = damaged(llava_med_folder[0], tmp_path, lambda w: w | {"model.image_newline": torch.zeros(4)})
    with pytest.raises(InputError, match="unexpected keys"):
        load_vlm(str(copy))
    with pytest.raises(InputError, match="the weight model.image_newline has no place in the model"):
        convert(copy, tmp_path / "out")


def test_a_checkpoint_without_tower_takes_it_from_a_folder(llava_med_folder, tmp_path):
    folder, model = llava_med_folder
    clip = {
        old_name(n).removeprefix("model.vision_tower.vision_tower."): w.contiguous()
        for n, w in model.state_dict().items()
        if "vision_tower" in n
    }
    (tmp_path / "clip").mkdir()
    save_file(
        clip | {"text_model.final_layer_norm.weight": torch.zeros(3)},
        tmp_path / "clip" / "model.safetensors",
        {"format": "pt"},
    )
    copy = damaged(folder, tmp_path, lambda w: {n: t for n, t in w.items() if "vision_tower" not in n})
    first = copy / "model-00001-of-00002.safetensors"
    save_file({n: t for n, t in load_file(first).items() if "vision_tower" not in n}, first, {"format": "pt"})
    with pytest.raises(InputError, match="give a folder of openai/clip-vit-large-patch14-336 with --tower"):
        convert(copy, tmp_path / "out")
    convert(copy, tmp_path / "out", tower=tmp_path / "clip")
    vlm = load_vlm(str(tmp_path / "out"))
    assert torch.equal(logits(vlm), logits(vlm, model))


# --- LLaVA-Rad: adapter, projector, tower ---


def timm_tower(model):
    """
    The tower's weights under timm's names, query, key and value in one matrix, as open_clip's training saves them.
    """
    state = {n.removeprefix("model.vision_tower."): w for n, w in model.state_dict().items() if "vision_tower" in n}
    out = {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"]}
    for part in ("weight", "bias"):
        out[f"patch_embed.proj.{part}"] = state[f"embeddings.patch_embeddings.projection.{part}"]
        out[f"norm.{part}"] = state[f"layernorm.{part}"]
    for i in range(3):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."
        for part in ("weight", "bias"):
            out[f"{new}attn.qkv.{part}"] = torch.cat([state[f"{old}attention.{n}_proj.{part}"] for n in "qkv"])
            out[f"{new}attn.proj.{part}"] = state[f"{old}attention.o_proj.{part}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{new}{layer}.{part}"] = state[f"{old}{layer}.{part}"]
        for n in "12":
            out[f"{new}ls{n}.gamma"] = state[f"{old}layer_scale{n}.lambda1"]
    return {"module.visual.trunk." + n: w.clone() for n, w in out.items()}


RAD = (
    LANGUAGE
    | ORIGINAL
    | dict(
        model_type="llava",
        mm_vision_tower="biomedclip_cxr_518",
        image_aspect_ratio="square",
        mm_vision_tower_config="somewhere/tower.json",
        mm_hidden_size=128,
    )
)
TOWER = dict(timm_model_name="vit_base_patch14_dinov2.lvd142m", image_size=56, width=128, layers=3)


@pytest.fixture(scope="module")
def llava_rad(tmp_path_factory, cache):
    """-> (folder in LLaVA-Rad's layout, folder of its base model, the model they make together)."""
    folder, base = tmp_path_factory.mktemp("rad") / "llava-rad", tmp_path_factory.mktemp("rad") / "vicuna"
    folder.mkdir(), base.mkdir()
    write_json(folder / "config.json", RAD)
    write_json(folder / "tower.json", {"embed_dim": 32, "vision_cfg": TOWER, "text_cfg": {}})
    model = random_model(folder, RAD)
    checkpoint = timm_tower(model) | {
        "module.visual.head.proj.weight": torch.zeros(4, 4),
        "module.text.proj.0.weight": torch.zeros(3),
        "module.logit_scale": torch.zeros(()),
    }
    torch.save({"epoch": 3, "name": "run", "state_dict": checkpoint, "optimizer": {}}, folder / "tower_checkpoint.pt")
    state = model.state_dict()
    torch.save(
        {"base_model.model." + old_name(n): w for n, w in state.items() if "projector" in n},
        folder / "non_lora_trainables.bin",
    )
    torch.manual_seed(1)
    adapter, weights = {}, {}
    for name, w in state.items():
        if "language_model" in name or name == "lm_head.weight":
            old = old_name(name)
            weights[old] = (w[:VOCAB] if len(w) == VOCAB + 1 else w).clone()
            if re.search(r"(q|k|v|o|gate|up|down)_proj", old):
                a, b = 0.1 * torch.randn(4, w.shape[1]), 0.1 * torch.randn(w.shape[0], 4)
                weights[old] -= 2.0 * b @ a  # so that base and adapter together are the model
                stem = "base_model.model." + old.removesuffix(".weight")
                adapter |= {stem + ".lora_A.weight": a, stem + ".lora_B.weight": b}
    torch.save(adapter, folder / "adapter_model.bin")
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "bias": "none",
            "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        },
    )
    names = sorted(weights)
    for i, half in enumerate((names[::2], names[1::2]), start=1):
        torch.save({n: weights[n] for n in half}, base / f"pytorch_model-{i:05d}-of-00002.bin")
    write_tokenizer(base)
    return folder, base, model


def test_llava_rad_is_put_together(llava_rad, tmp_path):
    folder, base, model = llava_rad
    vlm = load_vlm(str(convert(folder, tmp_path / "rad", base=base)))
    torch.testing.assert_close(logits(vlm), logits(vlm, model), atol=1e-5, rtol=1e-4)
    grids = make_prompts(vlm, ["a"], [np.zeros((40, 90), np.uint8)])[0].grids
    assert vlm.config.vision_config.model_type == "dinov2" and grids == ((4, 4),)
    assert not getattr(vlm.processor.image_processor, "do_pad", False)  # the central square, not a padded one
    prompt = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Normal?"}]}], tokenize=False
    )
    assert prompt.startswith("<s>A chat between a curious user") and prompt.endswith(
        "polite answers to the user's questions. USER: <image>\nNormal? ASSISTANT:"
    )


def test_llava_rad_is_refused_without_its_parts(llava_rad, tmp_path):
    folder, base, _ = llava_rad
    with pytest.raises(InputError, match="is stored in parts: put them together first with"):
        load_vlm(str(folder))
    with pytest.raises(
        InputError, match="is an adapter on lmsys/vicuna-7b-v1.5: fetch that as well and give its folder with --base"
    ):
        convert(folder, tmp_path / "out")
    with pytest.raises(InputError, match="has no weights of the base model"):
        convert(folder, tmp_path / "out", base=tmp_path)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (None, "the grid of the vision tower is unknown"),
        (TOWER | {"image_size": 0}, "the grid of the vision tower cannot be read from its configuration"),
        (TOWER | {"timm_model_name": "swin"}, "the grid of the vision tower cannot be read from its configuration"),
        (TOWER | {"image_size": 60}, "the grid of the vision tower cannot be read"),  # no multiple of the patch
    ],
)
def test_a_grid_that_cannot_be_read_is_refused(tmp_path, vision, message):
    write_json(tmp_path / "config.json", RAD)
    if vision:
        write_json(tmp_path / "tower.json", {"vision_cfg": vision})
    with pytest.raises(InputError, match=message):
        make_config(tmp_path, RAD)


def test_a_grid_that_contradicts_the_weights_is_refused(llava_rad, tmp_path):
    folder, base, _ = llava_rad
    copy = tmp_path / "copy"
    copy.mkdir()
    for p in folder.iterdir():
        (copy / p.name).write_bytes(p.read_bytes())
    write_json(copy / "tower.json", {"vision_cfg": TOWER | {"image_size": 70}})
    with pytest.raises(InputError, match="pos_embed has the shape .*, and the configuration says"):
        convert(copy, tmp_path / "out", base=base)


def test_the_real_llava_rad_grid(tmp_path):
    write_json(
        tmp_path / "biomedclipcxr_518.json",
        {"vision_cfg": {"timm_model_name": "vit_base_patch14_dinov2", "image_size": 518}},
    )
    config = make_config(tmp_path, RAD)
    assert (
        config.image_seq_length == 37 * 37
        and config.vision_config.hidden_size == 768
        and config.vision_config.num_hidden_layers == 12
    )


@pytest.mark.parity
def test_tower_equals_timm():
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=0.5, num_classes=0
    ).eval()
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14, use_mask_token=False
    )
    ours = Dinov2Model(config).eval()
    state = {}
    for key, tensor in vit.state_dict().items():
        state |= {
            n.removeprefix("model.vision_tower."): t for n, t in new_names("module.visual.trunk." + key, tensor).items()
        }
    ours.load_state_dict(state)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        states = [x]
        for block in vit.blocks:
            states.append(block(states[-1]))
        torch.testing.assert_close(
            ours(pixels, output_hidden_states=True).hidden_states[-2], states[-2], atol=1e-5, rtol=1e-4
        )


# --- what is neither ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mm_projector_type="linear"), "is a LLaVA of another kind"),
        (
            dict(mm_vision_tower="google/siglip-so400m-patch14-384"),
            "needs the vision tower google/siglip-so400m-patch14-384, which is not supported",
        ),
    ],
)
def test_other_llavas_are_refused(llava_med_folder, tmp_path, change, message):
    raw = read_json(llava_med_folder[0] / "config.json") | change
    write_json(tmp_path / "config.json", raw)
    with pytest.raises(InputError, match=message):
        load_vlm(str(tmp_path))


def test_folders_that_cannot_be_converted(llava_med_folder, tmp_path, refused):
    folder, _ = llava_med_folder
    assert "there is no model in" in refused(main, [tmp_path / "nowhere", tmp_path / "out"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "exists and is not empty: give a new folder" in refused(main, [folder, tmp_path / "full"])
    (tmp_path / "plain").mkdir()
    write_json(tmp_path / "plain" / "config.json", {"model_type": "llava"})
    assert "is not in the layout of the original LLaVA code" in refused(main, [tmp_path / "plain", tmp_path / "out"])


# --- the real files that are at hand ---


@pytest.mark.realdata
def test_real_configuration_and_tokenizer(real_data, monkeypatch):
    folder = real_data("hub_configs/llava-med-v1.5-mistral-7b")
    raw = read_json(folder / "config.json")
    monkeypatch.setattr(llava_med, "CLIP_L_336", REAL_TOWER)
    config = make_config(folder, raw)
    assert (
        config.image_token_id == 32000
        and config.image_seq_length == 576
        and config.text_config.rope_parameters["rope_theta"] == 1e6
    )
    assert (
        memory.read_layout(str(folder), raw).parameters
        == memory.read_layout("microsoft/llava-med-v1.5-mistral-7b").parameters
    )
    tokenizer = load_tokenizer(folder, 32000)
    # Worked out with the sentencepiece package, text before and after the image on its own, as the original code does.
    ids = tokenizer("<s>[INST] <image>\nIs there a nodule? [/INST]", add_special_tokens=False)["input_ids"]
    assert ids == [
        1,
        733,
        16289,
        28793,
        28705,
        32000,
        28705,
        13,
        2301,
        736,
        264,
        5460,
        1390,
        28804,
        733,
        28748,
        16289,
        28793,
    ]
    assert (
        tokenizer.decode(tokenizer("Small left effusion, 3 mm; äöü 日本", add_special_tokens=False)["input_ids"])
        == "Small left effusion, 3 mm; äöü 日本"
    )
    with pytest.raises(InputError, match="the tokenizer has 32000 tokens, and the model 32064"):
        load_tokenizer(folder, 32064)


@pytest.mark.realdata
@pytest.mark.parity
def test_tokenizer_equals_sentencepiece(real_data):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    folder = real_data("hub_configs/llava-med-v1.5-mistral-7b")
    reference, ours = (
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")),
        load_tokenizer(folder, 32000),
    )
    for i in range(100):
        text = phantom_study(3, i, 64).report.text
        assert ours(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_damaged_sentencepiece_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff\x01not a model")
    with pytest.raises(InputError, match="is damaged, or is not a SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")
