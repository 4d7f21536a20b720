"""shared/models/memory.py: exact counts, and predictions against what really was allocated."""

import shared  # noqa: F401, isort: skip  # before transformers
import re
from dataclasses import replace

import pytest
import torch
from plain_forward import build_inputs
from transformers import AutoModelForImageTextToText

from shared.models import memory
from shared.models.loading import add_lora, count_parameters, load_vlm
from shared.models.hub import FAMILIES
from shared.models.memory import CARDS, GIB, Setting, main, nearest_that_fits, nf4_bytes, predict, read_layout
from shared.models.memory import weight_bytes
from shared.models.passes import logprobs, make_prompts
from shared.models.tiny import tiny_folder
from shared.phantom import phantom_study
from shared.runtime import InputError

VLMS = tuple(FAMILIES)
MEDGEMMA, QWEN = "google/medgemma-4b-it", "Qwen/Qwen2-VL-2B-Instruct"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


def batch(vlm, answers=None):
    return build_inputs(
        vlm, ["Is there a nodule?"] * 2, [phantom_study(0, i, 112).image for i in range(2)], answers=answers
    ).tensors


# --- real sizes ---


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (MEDGEMMA, 4_300_079_472),
        (QWEN, 2_208_985_600),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032),
    ],
)
def test_exact_parameter_counts(name, parameters):
    assert read_layout(name).parameters == parameters


def test_weights_of_medgemma():
    """
    8.60 GB in bf16; 3.23 GB in NF4 was measured once with a really allocated model (3.171 GB and 0.058 GB of scales).
    """
    layout = read_layout(MEDGEMMA)
    assert weight_bytes(layout, "none", torch.bfloat16) == 2 * 4_300_079_472
    nf4 = weight_bytes(layout, "nf4", torch.bfloat16)
    assert nf4 < 3.5e9 and nf4 == pytest.approx(3.229e9, rel=1e-3)
    assert nf4 < weight_bytes(layout, "nf4-text", torch.bfloat16) < weight_bytes(layout, "int8", torch.bfloat16) < 8.6e9
    assert weight_bytes(read_layout(QWEN), "nf4", torch.bfloat16) == pytest.approx(1.54e9, rel=1e-2)


def test_nf4_bytes_by_hand():
    # 64 x 256 weights: 8192 bytes of halves, 256 blocks with a byte each, one group of 256 scales: one float32; tables:
    # 273 float32
    assert nf4_bytes(64 * 256) == 8192 + 256 + 4 + 4 * 273


@pytest.mark.parametrize(
    ("name", "quant", "train", "card", "fits"),
    [
        (MEDGEMMA, "none", "none", "L4 (24 GB)", True),
        (MEDGEMMA, "none", "none", "T4 (16 GB)", False),
        (MEDGEMMA, "nf4", "none", "T4 (16 GB)", True),
        (QWEN, "none", "none", "T4 (16 GB)", True),
        (QWEN, "none", "full", "T4 (16 GB)", False),
        (QWEN, "nf4", "lora", "T4 (16 GB)", True),
    ],
)
def test_what_fits_on_which_card(name, quant, train, card, fits):
    layout = read_layout(name)
    dtype = torch.bfloat16 if "T4" not in card else torch.float32 if name == MEDGEMMA else torch.float16
    setting = Setting(quant=quant, dtype=dtype, train=train)
    total = predict(layout, setting)["total"]
    assert (total <= CARDS[card] * GIB) == fits
    if not fits:
        words = nearest_that_fits(layout, setting, CARDS[card] * GIB)
        assert words.startswith("--")


def test_more_of_anything_needs_more():
    layout = read_layout(QWEN)
    base = Setting(train="lora")
    total = predict(layout, base)["total"]
    for change in (
        dict(batch=2),
        dict(tokens=512),
        dict(rank=64),
        dict(image_size=896),
        dict(checkpointing=False),
        dict(train="full"),
    ):
        assert predict(layout, Setting(**({"train": "lora"} | change)))["total"] > total, change
    assert predict(layout, Setting(new_tokens=2000))["cache"] > predict(layout, Setting())["cache"]


# --- against what is really there ---


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_weights_of_loaded_models(family, quant):
    vlm = load_vlm("tiny:" + family, quant=quant)
    layout = read_layout(tiny_folder("tiny:" + family))
    found = 0
    for p in vlm.model.parameters():  # a tied head comes once
        found += p.untyped_storage().nbytes()
        state = getattr(p, "quant_state", None)
        if state is not None:
            found += sum(
                t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            )
        found += p.SCB.nbytes if getattr(p, "SCB", None) is not None else 0
    assert weight_bytes(layout, quant, torch.float32) == pytest.approx(found, rel=0.01)
    assert layout.parameters == count_parameters(vlm.model)


@pytest.mark.parametrize("family", VLMS)
def test_cache_of_a_generation(family):
    window = 40
    folder = str(tiny_folder("tiny:" + family, **(dict(sliding_window=window) if family == "gemma3" else {})))
    vlm, layout = load_vlm(folder), read_layout(folder)
    inputs = batch(vlm)
    with torch.inference_mode():
        cache = vlm.model.generate(
            **inputs, max_new_tokens=9, min_new_tokens=9, return_dict_in_generate=True
        ).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    image_tokens = memory.image_counts(layout, 112)[0]
    # The last token is never fed back, so 8 of the 9 are in the cache; a sliding layer drops the oldest key before the
    # next step.
    setting = Setting(
        dtype=torch.float32, batch=2, tokens=inputs["input_ids"].shape[1] - image_tokens, new_tokens=8, image_size=112
    )
    assert predict(layout, setting)["cache"] == pytest.approx(found, rel=0.03)


def saved_bytes(vlm, work):
    """What autograd keeps of work() for the backward pass, parameters not counted, each storage once."""
    own, seen, alive = {p.untyped_storage().data_ptr() for p in vlm.model.parameters()}, {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # else another tensor could get the same address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return sum(seen.values())


def trained(family, layers, dtype="float32"):
    """Sizes that the constants were not fitted to -> (model with an adapter, its folder)."""
    sizes = dict(layers=layers, vision_layers=2, hidden=192, mlp=512, heads=6, kv_heads=3)
    folder = tiny_folder("tiny:" + family, **sizes)
    vlm = add_lora(load_vlm(str(folder), dtype=dtype), rank=1, dropout=0.0, checkpointing=False)
    vlm.model.train()
    return vlm, folder


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_a_layer(family, dtype):
    """Two more layers save that much more."""
    found = []
    for layers in (1, 3):
        vlm, _ = trained(family, layers, dtype)
        tensors = batch(vlm, ["yes", "no"])
        found.append(saved_bytes(vlm, lambda: vlm.model(**tensors, use_cache=False)))  # noqa: B023, called at once
    size = 4 if dtype == "float32" else 2
    expected = 2 * tensors["input_ids"].numel() * memory.saved_per_token(family, size, 192, 512, 192, 192)
    assert found[1] - found[0] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("counterfactual", [False, True])
def test_passes_of_grpo(family, counterfactual):
    """
    The update, where three answers share their prompt, and V's gradient, where each stands behind a film of its own:
    two more layers save as much more as the tool says. Answers count: they are longer than the prompt here.
    """
    found, told = [], []
    for layers in (1, 3):
        vlm, folder = trained(family, layers)
        films = [phantom_study(0, i, 112).image for i in range(3 if counterfactual else 1)]
        prompts = make_prompts(vlm, ["Is there a nodule?"] * len(films), films)
        word = vlm.tokenizer(" lung", add_special_tokens=False)["input_ids"][-1]
        groups = [[[word] * 70]] * 3 if counterfactual else [[[word] * 70] * 3]
        found.append(saved_bytes(vlm, lambda: logprobs(vlm, prompts, groups)))  # noqa: B023, called at once
        layout = read_layout(folder)
        setting = Setting(
            dtype=torch.float32, tokens=len(prompts[0]) - memory.image_counts(layout, 112)[0], new_tokens=70,
            image_size=112, train="grpo", rank=1, checkpointing=False, generations=3, counterfactual=counterfactual,
        )  # fmt: skip
        told.append(predict(layout, setting)["activations"])
    assert told[1] - told[0] == pytest.approx(found[1] - found[0], rel=0.15)


def test_grpo_needs_what_its_largest_pass_needs():
    """V's gradient shares no prompt, so it is the largest; answers twice as long, or twice as many, need more."""
    layout, base = read_layout(QWEN), Setting(train="grpo", checkpointing=False)
    need = predict(layout, base)
    without = predict(layout, replace(base, counterfactual=False))
    assert need["activations"] > 1.5 * without["activations"] and need["gradients"] == 2 * without["gradients"]
    for change in (dict(new_tokens=512), dict(generations=8)):
        for setting in (base, replace(base, counterfactual=False)):
            assert predict(layout, replace(setting, **change))["total"] > predict(layout, setting)["total"] + GIB
    assert nearest_that_fits(layout, base, CARDS["T4 (16 GB)"] * GIB) == "gradient checkpointing"
    lora = Setting(train="lora", checkpointing=False)
    assert predict(layout, replace(lora, new_tokens=512))["activations"] > 1.3 * predict(layout, lora)["activations"]


@pytest.mark.parametrize("family", VLMS)
def test_lora_parameters(family):
    vlm = load_vlm("tiny:" + family)
    layout = read_layout(tiny_folder("tiny:" + family))
    assert memory.lora_parameters(layout, 4) == count_parameters(add_lora(vlm, rank=4).model, trainable=True)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_activations_on_a_gpu():
    """Qwen2-VL-2B with random weights: a generation stays below the prediction, and above half of it."""
    layout = read_layout(QWEN)
    model = AutoModelForImageTextToText.from_config(layout.config, dtype=torch.bfloat16).cuda().eval()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model.generate(input_ids=torch.randint(5, 100, (1, 384), device="cuda"), max_new_tokens=256, min_new_tokens=256)
    predicted = predict(layout, Setting())
    assert 0.5 < torch.cuda.max_memory_allocated() / (predicted["total"] - predicted["other"]) < 1.1


# --- the command ---


def test_command(capsys):
    main(["--model", MEDGEMMA, "--quant", "nf4"])
    printed = capsys.readouterr().out
    assert "4,300,079,472 parameters, 256 tokens and 4096 patches per image" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "yes" in line]
    assert len(rows) == 3 and "float32" in rows[0] and "bfloat16" in rows[1]
    main(["--model", MEDGEMMA])
    row = next(line for line in capsys.readouterr().out.splitlines() if "T4" in line)
    assert re.search(r"no; --quant \S+ would", row)


def test_command_on_tiny_and_training(capsys):
    main(["--model", "tiny:qwen2vl", "--train", "lora", "--no-checkpointing", "--image-size", "112", "--quant", "nf4"])
    assert "16 tokens and 64 patches per image" in capsys.readouterr().out


def test_command_refuses(refused):
    assert "--train full needs --quant none" in refused(main, ["--quant", "nf4", "--train", "full"])
    assert "is a text-only model" in refused(main, ["--model", str(tiny_folder("tiny:bert"))])


def test_unknown_models_are_refused():
    with pytest.raises(InputError, match="there is no model folder"):
        read_layout("./nowhere")
