"""shared/models/loading.py: what is loaded, in which numbers, and how it refuses."""

import shared  # noqa: F401, isort: skip  # before transformers
import copy
import json
import shutil
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from plain_forward import build_inputs
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, SiglipVisionModel, T5ForConditionalGeneration

from shared.models import hub, loading, memory
from shared.models.loading import add_lora, choose_dtype, count_parameters, find_model, load_part, load_vlm, save_vlm
from shared.models.loading import digest_of, unfreeze
from shared.models.tiny import tiny_folder
from shared.phantom import phantom_study
from shared.runtime import InputError, read_json, write_json

VLMS = tuple(hub.FAMILIES)
SMALL = dict(layers=2, vision_layers=2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture(params=VLMS)
def family(request):
    return request.param


def batch(vlm, answers=None):
    questions = ["Is there a nodule?", "Is this film normal?"]
    return build_inputs(vlm, questions, [phantom_study(0, i, 112).image for i in range(2)], answers=answers).tensors


@torch.inference_mode()
def logits(vlm):
    return vlm.model(**batch(vlm)).logits[:, -1].float()


def relative(a, b):
    return float((a - b).norm() / b.norm())


# --- whole and quantised ---


def test_tiny_by_name_and_by_family(capsys):
    vlm = load_vlm("tiny", family="llava")
    assert vlm.family == "llava" and vlm.tiny and not vlm.model.training
    printed = capsys.readouterr().out
    assert "model: tiny (llava, 1.7 M parameters), weights as they are, computing in float32 (exact" in printed
    facts = vlm.facts()
    assert facts["parameters"] == count_parameters(vlm.model) and json.dumps(facts)


# Random weights have no structure that survives rounding, so these bounds are loose; trained models lose far less.
@pytest.mark.parametrize(("quant", "bound"), [("nf4", 0.6), ("nf4-text", 0.6), ("int8", 0.1)])
def test_quantised_models_stay_close(family, quant, bound):
    whole = logits(load_vlm("tiny:" + family))
    vlm = load_vlm("tiny:" + family, quant=quant)
    assert relative(logits(vlm), whole) < bound
    kind = bnb.nn.Linear8bitLt if quant == "int8" else bnb.nn.Linear4bit
    quantised = [n for n, m in vlm.model.named_modules() if isinstance(m, kind)]
    tower, projector = loading.FAMILIES[family].tower, loading.FAMILIES[family].projector
    assert any("language_model" in n for n in quantised) and "lm_head" not in quantised
    assert any(n.startswith(tower) for n in quantised) == (quant != "nf4-text")
    assert not any(n.startswith(projector) for n in quantised)
    layout = memory.read_layout(tiny_folder("tiny:" + family))
    assert set(quantised) == {
        n for n, _, _ in layout.linears if memory.is_quantised(n, quant, family)
    }  # what the prediction counts
    assert count_parameters(vlm.model) == layout.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_asked_for(dtype):
    vlm = load_vlm("tiny:qwen2vl", dtype=str(dtype).removeprefix("torch."))
    assert {p.dtype for p in vlm.model.parameters()} == {dtype} and torch.isfinite(logits(vlm)).all()


def test_widths_that_the_packed_processor_path_refuses():
    """48 is no multiple of 64, as SigLIP's 4304 is none: with the guard it works, in evaluation too."""
    folder = tiny_folder("tiny:llava", mlp=80, vision_mlp=48, **SMALL)
    vlm, whole = load_vlm(str(folder), quant="nf4"), load_vlm(str(folder))
    assert relative(logits(vlm), logits(whole)) < 0.6


def gradients(vlm):
    torch.manual_seed(0)
    vlm.model.train()
    vlm.model(**batch(vlm, ["yes", "no"]), use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad(set_to_none=True)
    vlm.model.eval()
    return found


@pytest.mark.parametrize("quant", ["nf4", "nf4-text", "int8"])
def test_training_after_evaluation_is_exact(quant):
    vlm = load_vlm(str(tiny_folder("tiny:qwen2vl", **SMALL)), quant=quant)
    torch.manual_seed(0)
    add_lora(vlm, rank=4, dropout=0.0)
    before, fresh = logits(vlm), gradients(vlm)
    assert torch.equal(logits(vlm), before)
    vlm.model.generate(**batch(vlm), max_new_tokens=3)
    again = gradients(vlm)
    assert fresh.keys() == again.keys() and all(torch.equal(fresh[n], again[n]) for n in fresh)
    assert torch.equal(logits(vlm), before)


def test_gradient_checkpointing_changes_nothing():
    vlm = load_vlm(str(tiny_folder("tiny:gemma3", **SMALL)), quant="nf4")
    torch.manual_seed(0)
    add_lora(vlm, rank=4, dropout=0.0, checkpointing=False)
    plain = gradients(vlm)
    vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(vlm)
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-text", "int8"])
def test_saving_after_evaluation_is_exact(quant, tmp_path):
    vlm = load_vlm(str(tiny_folder("tiny:gemma3", **SMALL)), quant=quant)
    expected = logits(vlm)
    vlm.model.save_pretrained(tmp_path / "saved")
    vlm.processor.save_pretrained(tmp_path / "saved")
    again = load_vlm(str(tmp_path / "saved"))  # the folder says itself how it is stored
    assert again.quant == quant and torch.equal(logits(again), expected)
    assert torch.equal(logits(vlm), expected)  # the model that was saved is whole, too
    if quant == "nf4":
        with pytest.raises(InputError, match="is stored in nf4 and cannot become int8"):
            load_vlm(str(tmp_path / "saved"), quant="int8")


# --- adapters ---


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_lora_learns_and_leaves_the_base_untouched(family, quant, tmp_path):
    vlm = load_vlm(str(tiny_folder("tiny:" + family, **SMALL)), quant=quant)
    base = {n: p.clone() for n, p in vlm.model.state_dict().items() if isinstance(p, torch.Tensor)}
    torch.manual_seed(0)
    add_lora(vlm, rank=8, dropout=0.0)
    trainable = [n for n, p in vlm.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n and "language_model" in n for n in trainable)
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-2)
    inputs = batch(vlm, ["yes", "no"])
    losses = []
    for _ in range(16):
        loss = vlm.model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = {
        n.replace("base_layer.", ""): p
        for n, p in vlm.base.state_dict().items()
        if "lora_" not in n and isinstance(p, torch.Tensor)
    }
    assert base.keys() == after.keys() and all(torch.equal(base[n], after[n]) for n in base)

    vlm.model.eval()
    expected = logits(vlm)
    save_vlm(vlm, tmp_path / "adapter")
    again = load_vlm(vlm.name, quant=quant, adapter=tmp_path / "adapter")
    assert torch.equal(logits(again), expected) and again.adapter.endswith("adapter")
    assert not any(p.requires_grad for n, p in again.model.named_parameters() if "lora_" in n)
    with again.model.disable_adapter():
        assert torch.equal(logits(again), logits(load_vlm(vlm.name, quant=quant)))
    on = load_vlm(vlm.name, quant=quant, adapter=tmp_path / "adapter", trainable_adapter=True)
    assert any(p.requires_grad for p in on.model.parameters())


def test_the_processor_beside_an_adapter_is_taken(tmp_path):
    """The adapter was trained on images of another size than the model's own processor makes."""
    vlm = add_lora(load_vlm(str(tiny_folder("tiny:qwen2vl", **SMALL))), rank=4)
    own = dict(vlm.processor.image_processor.size)
    vlm.model.save_pretrained(tmp_path / "adapter")
    assert dict(load_vlm(vlm.name, adapter=tmp_path / "adapter").processor.image_processor.size) == own  # none is there
    vlm.processor.image_processor.size = own | {"longest_edge": own["longest_edge"] // 4}
    vlm.processor.save_pretrained(tmp_path / "adapter")
    again = load_vlm(vlm.name, adapter=tmp_path / "adapter")
    assert dict(again.processor.image_processor.size) == own | {"longest_edge": own["longest_edge"] // 4}
    assert again.tokenizer.padding_side == "left"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, cache):
    """-> (name of a model, folder of an adapter trained on it)."""
    name = str(tiny_folder("tiny:qwen2vl", **SMALL))
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_vlm(add_lora(load_vlm(name), rank=4), folder)
    return name, folder


def test_adapters_that_do_not_fit(adapter, tmp_path):
    name, folder = adapter
    other = str(tiny_folder("tiny:qwen2vl", hidden=64, mlp=128, heads=2, kv_heads=1, **SMALL))
    again = str(tiny_folder("tiny:qwen2vl", seed=1, **SMALL))  # equal shapes, other numbers
    for model in (other, again):
        with pytest.raises(InputError, match="was trained on other weights than those of .*: give --model the one"):
            load_vlm(model, adapter=folder)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "base.json").unlink()  # an adapter from elsewhere has none
    assert torch.equal(logits(load_vlm(name, adapter=bare)), logits(load_vlm(name)))  # a new adapter changes nothing
    with pytest.raises(InputError, match="the adapter .* does not fit .*: give --model the one it was trained on"):
        load_vlm(other, adapter=bare)
    with pytest.raises(InputError, match="there is no adapter folder"):
        load_vlm(name, adapter=tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no adapter: there is no adapter_config.json"):
        load_vlm(name, adapter=name)
    with pytest.raises(InputError, match="holds an adapter, not a model: .* this folder with --adapter"):
        load_vlm(str(folder))
    (bare / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no adapter: there is no adapter_model.safetensors"):
        load_vlm(name, adapter=bare)


def test_digest_of_large_weights(tmp_path):
    """Of more than 64 MiB only blocks are read; other numbers in a tenth of it are enough."""
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as weights:
        weights.truncate(2**26 + 100)
    before = digest_of(tmp_path)
    assert before == digest_of(tmp_path)
    with open(file, "r+b") as weights:
        weights.seek(2**25)
        weights.write(b"1" * (2**26 // 10))
    assert before != digest_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"x." + key: value for key, value in w.items()}, "28 missing keys, the first is base_model"),
        (lambda w: dict(list(w.items())[1:]), "1 missing keys"),
        (lambda w: w | {"base_model.model.more.lora_A.weight": torch.zeros(2, 2)}, "1 unexpected keys"),
        (lambda w: {key: value * torch.nan for key, value in w.items()}, "numbers that are not finite"),
    ],
)
def test_weights_of_an_adapter_are_checked(adapter, tmp_path, change, message):
    name, folder = adapter
    file = shutil.copytree(folder, tmp_path / "copy") / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(InputError, match=message):
        load_vlm(name, adapter=file.parent)


@pytest.mark.parametrize(
    "change",
    [{"peft_type": "FOO"}, {"peft_type": None}, {"r": -1}, {"r": "many"}, {"target_modules": None}, {"r": 10**12}, []],
    ids=str,
)
def test_settings_of_an_adapter_are_checked(adapter, tmp_path, change):
    name, folder = adapter
    file = shutil.copytree(folder, tmp_path / "copy") / "adapter_config.json"
    write_json(file, read_json(file) | change if change else change)
    with pytest.raises(InputError, match="does not fit") as stop:
        load_vlm(name, adapter=file.parent)
    assert "\n" not in str(stop.value)


def test_pickled_weights_are_not_run(adapter, copied, tmp_path):
    name, folder = adapter
    folder = shutil.copytree(folder, tmp_path / "copy")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": print}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="does not fit .*Weights only load failed"):
        load_vlm(name, adapter=folder)
    (copied / "model.safetensors").unlink()
    torch.save({"x": print, "filler": torch.zeros(10**6)}, copied / "pytorch_model.bin")
    with pytest.raises(InputError, match="are damaged or cut short|no weights that can be read"):
        load_vlm(str(copied))


def test_lora_on_any_module():
    """SigLIP's attention, and T5's decoder alone: its encoder is not used where image tokens take its place."""
    vision = add_lora(load_part(SiglipVisionModel, "tiny:siglip", unused_weights=True), 4, layers=r".*(q_proj|v_proj)")
    t5 = add_lora(load_part(T5ForConditionalGeneration, "tiny:t5"), 4, layers=r".*decoder.*\.(q|v)", dropout=0.0)
    for model, layers, lacks in ((vision, 4 * 2, "k_proj"), (t5, 3 * 2 * 2, "encoder.block")):
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(names) == 2 * layers and all("lora_" in n for n in names) and not any(lacks in n for n in names)
    everywhere = add_lora(load_part(T5ForConditionalGeneration, "tiny:t5"), 4)
    assert count_parameters(everywhere, trainable=True) > count_parameters(t5, trainable=True)
    assert not any("lm_head" in n for n, p in everywhere.named_parameters() if p.requires_grad)
    states = vision(pixel_values=torch.rand(1, 3, 112, 112)).last_hidden_state  # tiny: both are 128 wide
    t5(encoder_outputs=(states,), labels=torch.tensor([[5, 1]])).loss.backward()
    for model in (vision, t5):
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    with pytest.raises(InputError, match="LoRA cannot be put on nothing"):
        add_lora(load_part(AutoModel, "tiny:bert"), layers="nothing")


def test_unfreeze(family, tmp_path):
    vlm = load_vlm(str(tiny_folder("tiny:" + family, **SMALL)))
    parts = {}
    for part in ("tower", "projector", "language"):
        vlm.model.requires_grad_(False)
        found = unfreeze(vlm, part)
        parts[part] = {n for n, p in vlm.model.named_parameters() if p.requires_grad}
        assert len(found) == len(parts[part]) > 0
    every = [n for n, _ in vlm.model.named_parameters()]
    assert sorted(n for names in parts.values() for n in names) == sorted(every)  # each in exactly one part
    assert all(n.startswith(vlm.spec.projector) for n in parts["projector"])
    adapters = count_parameters(add_lora(vlm, rank=4).model, trainable=True)
    projector = sum(p.numel() for p in unfreeze(vlm, "projector"))  # also beside an adapter, below peft's wrapper
    assert count_parameters(vlm.model, trainable=True) == adapters + projector
    with pytest.raises(
        InputError, match="has no part 'head' that could be trained; there are tower, projector, language"
    ):
        unfreeze(vlm, "head")


def test_what_unfreeze_cannot_do(tmp_path):
    vlm = add_lora(load_vlm(str(tiny_folder("tiny:llava", **SMALL)), quant="nf4"), rank=4)
    with pytest.raises(InputError, match="--quant nf4 holds the language in whole numbers"):
        unfreeze(vlm, "language")
    unfreeze(vlm, "projector")
    with pytest.raises(ValueError, match="the other trained parameters would be lost"):
        save_vlm(vlm, tmp_path / "adapter")


# --- dtype ---


@pytest.mark.parametrize(
    ("family_name", "major", "expected"),
    [
        ("gemma3", 7, torch.float32),
        ("qwen2vl", 7, torch.float16),
        ("llava", 7, torch.float16),
        ("gemma3", 8, torch.bfloat16),
        ("qwen2vl", 9, torch.bfloat16),
    ],
)
def test_dtype_follows_gpu_and_family(monkeypatch, family_name, major, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    dtype, why = choose_dtype(family_name, "cuda", 4e9)
    assert dtype == expected and ("no bfloat16" in why) == (major == 7)
    if major == 7:
        with pytest.raises(InputError, match="Tesla T4 does not compute bfloat16: use --dtype float"):
            choose_dtype(family_name, "cuda", 4e9, "bfloat16")


def test_dtype_without_gpu():
    assert choose_dtype("gemma3", "cpu", 2e6)[0] == torch.float32
    assert choose_dtype("gemma3", "cpu", 4e9)[0] == torch.bfloat16
    with pytest.raises(InputError, match="Gemma 3 overflows in float16"):
        load_vlm("tiny:gemma3", dtype="float16")
    with pytest.raises(InputError, match="--dtype float16 is for GPUs.* use float32 or bfloat16"):
        load_vlm("tiny:qwen2vl", dtype=torch.float16)
    with pytest.raises(InputError, match="there is no --dtype int8; there are auto, float32, bfloat16, float16"):
        load_vlm("tiny:qwen2vl", dtype="int8")


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "torch sees .* so there is no cuda:99"), ("gpu", "there is no device gpu: use cpu, cuda, mps")],
)
def test_devices_that_are_not_there(device, message):
    with pytest.raises(InputError, match=message):
        load_vlm("tiny:qwen2vl", device=device)


# --- refusals ---


def http_error(kind, status):
    return kind("hub says no", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(GatedRepoError, 403),
            (
                "is gated: accept its licence at https://huggingface.co/google/medgemma-4b-it, then set HF_TOKEN or run"
                " `hf auth login`; .*tiny"
            ),
        ),
        (http_error(RepositoryNotFoundError, 404), "is not on the Hugging Face hub, or is private"),
        (http_error(RemoteEntryNotFoundError, 404), "has no config.json, so it is not a model for transformers"),
        (
            LocalEntryNotFoundError("offline"),
            (
                "is not on this computer and the hub cannot be reached: accept its licence at .*medgemma-4b-it, fetch"
                " it elsewhere with `hf download"
            ),
        ),
        (ConnectionError("no route"), "is not on this computer and the hub cannot be reached"),
        (Exception("an error of the HTTP library"), "is not on this computer and the hub cannot be reached"),
    ],
)
def test_models_that_cannot_be_had(monkeypatch, capsys, error, message):
    def download(*args, **options):
        raise error

    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    monkeypatch.setattr(hub, "get_hf_file_metadata", download)
    with pytest.raises(InputError, match=message) as stop:
        load_vlm("google/medgemma-4b-it")
    assert "\n" not in str(stop.value) and "hf_secret" not in str(stop.value) + capsys.readouterr().out


def test_offline_is_named(monkeypatch):
    def download(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "get_hf_file_metadata", download)
    with pytest.raises(
        InputError,
        match="Qwen/Qwen2-VL-2B-Instruct is not on this computer and HF_HUB_OFFLINE is set: fetch it elsewhere",
    ):
        find_model("Qwen/Qwen2-VL-2B-Instruct")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "just_a_word", "a/b/c", "a" * 5000, "~nobody/x"])
def test_folders_that_are_not_there(name):
    with pytest.raises(InputError, match=f"there is no model folder {name[:200]}"):
        find_model(name)


def test_the_same_command_with_tiny(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["task2_report/train.py", "--model", "google/medgemma-4b-it", "--epochs", "3", "--base_model=x"]
    )
    assert hub.try_tiny() == "; to try the same without it: python task2_report/train.py --epochs 3 --model tiny"
    monkeypatch.setattr("sys.argv", ["-c"])
    assert hub.try_tiny() == "; --model tiny works without it"


@pytest.fixture
def copied(tmp_path):
    """A copy of a tiny model, to be damaged."""
    return shutil.copytree(tiny_folder("tiny:llava", **SMALL), tmp_path / "model")


def test_folder_without_processor(copied):
    (copied / "processor_config.json").unlink()
    with pytest.raises(InputError, match="has no complete processor.*: copy preprocessor_config.json"):
        load_vlm(str(copied))


def test_folder_without_template_or_tokenizer(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template that can be used .*: copy .*chat_template.jinja"):
        load_vlm(str(copied))
    (copied / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no complete processor"):
        load_vlm(str(copied))


def test_text_only_and_unknown_models(copied):
    with pytest.raises(InputError, match=r"is a text-only model \(bert\): it cannot see images"):
        load_vlm(str(tiny_folder("tiny:bert")))
    write_json(copied / "config.json", read_json(copied / "config.json") | {"model_type": "idefics3"})
    with pytest.raises(InputError, match="is of the family idefics3, which nobody has tried with these scripts"):
        load_vlm(str(copied))
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match="holds no model: there is no config.json"):
        load_vlm(str(copied))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ([], [], "is not a model's configuration: it holds a list"),
        (["_attn_implementation"], "owner/kernel", "asks for owner/kernel .*never fetched or run"),
        (["text_config", "_attn_implementation"], "paged|owner/kernel", "never fetched or run"),
        (["vision_config", "attn_implementation"], {"": "kernels-community/x"}, "never fetched or run"),
        (["text_config", "num_hidden_layers"], 10**9, "cannot be right: num_hidden_layers is 1000000000"),
        (["text_config", "hidden_size"], -5, "cannot be right: hidden_size is -5"),
        (["text_config", "hidden_size"], 999_936, "describes .* parameters, and its weights are"),
        (["text_config", "hidden_size"], "big", "no model can be built after its config.json"),
        (["text_config", "num_attention_heads"], 7, "is not a complete model of its class"),
        (["text_config"], [1], "no model can be built after its config.json"),
        (["image_token_index"], 3, "tokenizer and config.json have different image tokens"),
        (["quantization_config"], [1], r"weights quantised by \[1\] are not supported"),
    ],
)
def test_configurations_that_cannot_be_right(copied, monkeypatch, path, value, message):
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", None)  # would fail another way
    config = read_json(copied / "config.json")
    if path:
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    write_json(copied / "config.json", config if path else value)
    with pytest.raises(InputError, match=message) as stop:
        load_vlm(str(copied))
    assert "\n" not in str(stop.value)


def test_other_files_that_cannot_be_right(copied):
    (copied / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="has no token that ends a text: eos_token_id in generation_config.json is"):
        load_vlm(str(copied))
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    with pytest.raises(InputError, match="holds a model and an adapter: move the adapter to a folder of its own"):
        load_vlm(str(copied))
    (copied / "chat_template.jinja").write_text("{% bad")
    with pytest.raises(InputError, match="has no chat template that can be used"):
        load_vlm(str(copied))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "cut short", "no file"])
def test_weights_that_are_not_those_of_the_model(copied, damage):
    path = copied / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    if damage == "missing":
        save_file({n: w for n, w in weights.items() if n != name}, path, {"format": "pt"})
    elif damage == "unexpected":
        save_file(weights | {"model.something_else": torch.zeros(3)}, path, {"format": "pt"})
    elif damage == "shape":
        save_file(weights | {name: torch.zeros(3)}, path, {"format": "pt"})
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.unlink()
    message = {
        "missing": "is not a complete model of its class: 1 missing keys",
        "unexpected": "is not a complete model of its class: 1 unexpected keys",
        "shape": "is not a complete model of its class: 1 mismatched keys, the first is ",
        "cut short": "are damaged or cut short",
        "no file": "has no weights that can be read",
    }[damage]
    with pytest.raises(InputError, match=message) as stop:
        load_vlm(str(copied))
    assert "\n" not in str(stop.value)


def test_quantisation_that_cannot_be_had(monkeypatch):
    with pytest.raises(InputError, match="there is no --quant gptq; there are none, nf4, nf4-text, int8"):
        load_vlm("tiny:qwen2vl", quant="gptq")
    with pytest.raises(InputError, match="bitsandbytes does not run on Apple GPUs"):
        loading.quantisation("nf4", "gemma3", torch.float32, "mps")


def test_a_layer_that_cannot_hold_four_bits(monkeypatch):
    forward = bnb.nn.Linear4bit.forward

    def fussy(self, x):
        if self.out_features == 64:
            raise AssertionError("N must be divisible by block_n")
        return forward(self, x)

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", fussy)
    with pytest.raises(
        InputError,
        match=(
            r"the layer .*k_proj \(128 -> 64\) cannot be held in --quant nf4 here \(N must be .*\); use --quant"
            r" nf4-text or none"
        ),
    ):
        load_vlm("tiny:qwen2vl", quant="nf4")


def test_too_little_memory_is_said_before(monkeypatch):
    layout = memory.read_layout("google/medgemma-4b-it")
    told = ("google/medgemma-4b-it", layout)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 6 * 2**30)
    said = memory.too_large(*told, "none", "cpu", torch.bfloat16)
    assert said.startswith("WARNING: google/medgemma-4b-it will need about")
    assert said.endswith("6.0 GiB are free on cpu; --quant int8 would fit")
    assert memory.too_large(*told, "nf4", "cpu", torch.bfloat16) == ""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    assert "no setting of these scripts fits" in memory.too_large(*told, "nf4", "cpu", torch.bfloat16)


# --- single encoders and decoders ---


def test_parts_load_the_same_way():
    assert type(load_part(AutoModel, "tiny:bert", device="cpu")).__name__ == "BertModel"
    assert load_part(T5ForConditionalGeneration, "tiny:t5").training is False
    with pytest.raises(InputError, match="there is no model folder nothing"):
        load_part(AutoModel, "nothing")


def test_a_part_of_a_folder_needs_leave():
    """The text tower of SigLIP is left over when only the vision tower is wanted; that has to be said."""
    with pytest.raises(InputError, match="unexpected keys"):
        load_part(SiglipVisionModel, "tiny:siglip")
    assert load_part(SiglipVisionModel, "tiny:siglip", unused_weights=True).config.image_size == 112


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_on_a_gpu(quant):
    on_cpu = load_vlm("tiny:qwen2vl")
    vlm = load_vlm("tiny:qwen2vl", quant=quant, device="cuda")
    assert next(vlm.model.parameters()).is_cuda and relative(logits(vlm).cpu(), logits(on_cpu)) < 0.6
    copy.deepcopy(vlm.facts())
