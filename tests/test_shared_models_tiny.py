"""shared/models/tiny.py: built quickly, found again, whole, and loaded by the classes of the real models."""

import shared  # noqa: F401, isort: skip  # before transformers
import os
import socket
import time

import numpy as np
import pytest
import torch
from plain_forward import build_inputs, generate
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer
from transformers import SiglipVisionModel

from shared.models.loading import FAMILIES, load_vlm
from shared.models.tiny import SIZES, cache_dir, is_tiny, phantom_text, tiny_folder
from shared.runtime import InputError, read_json

VLMS = tuple(FAMILIES)
CLASSES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2vl": "Qwen2VLForConditionalGeneration",
    "qwen25vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3vl": "Qwen3VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "siglip": "SiglipModel",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertModel",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a tiny model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(family, folder):
    auto = AutoModelForImageTextToText if family in VLMS else AutoModelForSeq2SeqLM if family == "t5" else AutoModel
    model = auto.from_pretrained(folder, local_files_only=True)
    processor = (AutoTokenizer if family in ("t5", "bert") else AutoProcessor).from_pretrained(
        folder, local_files_only=True
    )
    return model.eval(), processor


def test_built_in_seconds_small_and_loaded_by_the_real_classes(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVLM_CACHE", str(tmp_path / "fresh"))
    phantom_text()  # the training text of the tokenizers, made once per process
    for family in SIZES:
        start = time.process_time()
        folder = tiny_folder("tiny:" + family)
        assert time.process_time() - start < 3, family
        assert sum(p.stat().st_size for p in folder.iterdir()) < 20e6
        model, processor = load(family, folder)
        assert type(model).__name__ == CLASSES[family]
        parameters = sum(p.numel() for p in model.parameters())
        assert parameters < 3e6 and (family not in VLMS or parameters > 1e6), (family, parameters)
        again, _ = load(family, folder)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_found_again_and_rebuilt_when_damaged():
    folder = tiny_folder("tiny:bert")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_folder("bert") == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])  # cut short
    assert tiny_folder("tiny:bert") == folder and (folder / "model.safetensors").read_bytes() == whole
    (folder / "tokenizer.json").unlink()
    assert tiny_folder("tiny:bert") == folder and (folder / "tokenizer.json").is_file()
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]  # nothing half-built is left


def test_the_name_follows_from_sizes_and_seed():
    folder = tiny_folder("tiny:bert")
    assert tiny_folder("tiny:bert", seed=1) != folder and tiny_folder("tiny:bert", layers=2) != folder
    assert read_json(tiny_folder("tiny:bert", layers=2) / "config.json")["num_hidden_layers"] == 2


def test_random_numbers_of_the_caller_go_on_unchanged():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny_folder("tiny:bert", seed=5, layers=1)
    assert torch.equal(torch.rand(2), expected)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no tiny model 'tiny:gpt'; there are .*tiny:qwen2vl"):
        tiny_folder("tiny:gpt")
    with pytest.raises(InputError, match="tiny:bert has no size 'image_size'; it has hidden"):
        tiny_folder("tiny:bert", image_size=28)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot write .*; set MEDVLM_CACHE"):
        tiny_folder("tiny:bert")


def test_cache_folder(monkeypatch, tmp_path):
    assert is_tiny("tiny") and is_tiny("tiny:t5") and not is_tiny("tinyllama/x")
    monkeypatch.setenv("MEDVLM_CACHE", "here")
    assert cache_dir() == tmp_path / "here"  # absolute, so that a later chdir does not matter
    monkeypatch.delenv("MEDVLM_CACHE")
    assert str(cache_dir()).endswith(os.path.join(".cache", "medvlm-plain"))


@pytest.mark.parametrize("family", VLMS)
def test_tokenizer_is_lossless_and_knows_the_answers(family):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("tiny:" + family), local_files_only=True)
    for text in ("Is there a nodule in the left lung?", "äöü µ 日本 \t\n  x", phantom_text()[0]):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for answer in ("yes", "no"):
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1
    has_bos = not family.startswith("qwen")  # Gemma's and Mistral's tokenizers put <bos> first, Qwen's has none
    assert (tokenizer("yes")["input_ids"][0] == tokenizer.bos_token_id) == has_bos


@pytest.mark.parametrize(("family", "most_unknown"), [("t5", 0.0), ("bert", 0.0), ("siglip", 0.0)])
def test_word_tokenizers(family, most_unknown):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("tiny:" + family), local_files_only=True)
    text = "Small left pleural effusion."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and len(ids) < 12
    assert tokenizer.decode(ids, skip_special_tokens=True).lower().replace(" .", ".") == text.lower()


def test_siglip_vision_tower_alone():
    """CheXQuery takes only the vision tower out of the same folder."""
    folder = tiny_folder("tiny:siglip")
    vision, whole = (
        SiglipVisionModel.from_pretrained(folder, local_files_only=True).eval(),
        AutoModel.from_pretrained(folder, local_files_only=True).eval(),
    )
    pixels = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        alone = vision(pixel_values=pixels)
        torch.testing.assert_close(alone.last_hidden_state, whole.vision_model(pixel_values=pixels).last_hidden_state)
    assert alone.last_hidden_state.shape == (2, 64, 128)


def test_siglip_compares_images_and_texts():
    model, processor = load("siglip", tiny_folder("tiny:siglip"))
    inputs = processor(
        text=["no effusion", "a nodule"],
        images=[torch.zeros(3, 50, 60, dtype=torch.uint8)],
        padding="max_length",
        return_tensors="pt",
    )
    assert model(**inputs).logits_per_image.shape == (1, 2)


def test_t5_reads_and_writes():
    model, tokenizer = load("t5", tiny_folder("tiny:t5"))
    batch = tokenizer(["describe the film", "No effusion."], padding=True, return_tensors="pt")
    loss = model(**batch, labels=tokenizer("clear lungs", return_tensors="pt")["input_ids"].repeat(2, 1)).loss
    loss.backward()
    assert torch.isfinite(loss) and model.generate(**batch, num_beams=2, max_new_tokens=4).shape[0] == 2


# --- the chat templates are those of the real models ---

CONVERSATIONS = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Is there a nodule? "}]}],
    [
        {"role": "system", "content": [{"type": "text", "text": "You read films."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Normal?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "And the heart?"},
    ],
]


@pytest.mark.realdata
@pytest.mark.parametrize(("family", "real"), [("gemma3", "gemma-3"), ("qwen2vl", "Qwen2-VL-2B-Instruct")])
def test_template_writes_what_the_real_one_writes(real_data, family, real):
    template = real_data(f"hub_configs/{real}/chat_template.jinja").read_text()
    processor = AutoProcessor.from_pretrained(tiny_folder("tiny:" + family), local_files_only=True)
    for conversation in CONVERSATIONS:
        for prompt in (True, False):
            ours = processor.apply_chat_template(conversation, add_generation_prompt=prompt, tokenize=False)
            assert ours == processor.apply_chat_template(
                conversation, add_generation_prompt=prompt, tokenize=False, chat_template=template
            )


def test_llava_template():
    processor = AutoProcessor.from_pretrained(tiny_folder("tiny:llava"), local_files_only=True)
    written = processor.apply_chat_template(CONVERSATIONS[1], tokenize=False)
    assert written == "<s>[INST] You read films.\n\n<image>\nNormal? [/INST] yes</s>[INST] And the heart? [/INST]"


# --- they learn ---


@pytest.mark.parametrize("family", VLMS)
def test_learns_what_only_the_image_tells(family):
    """The same question about bright and dark pictures: the loss can only fall to zero through the vision tower."""
    vlm = load_vlm(str(tiny_folder("tiny:" + family, layers=2, vision_layers=2)))
    rng = np.random.default_rng(0)
    pictures = [rng.integers(low, low + 80, (112, 112), dtype=np.uint8) for low in [10, 160] * 4]
    inputs = build_inputs(vlm, ["Bright?"] * 8, pictures, answers=["no", "yes"] * 4)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    vlm.model.train()
    for _ in range(80):
        loss = vlm.model(**inputs.tensors, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if loss < 0.05:
            break
    vlm.model.eval()
    fresh = [rng.integers(low, low + 80, (112, 112), dtype=np.uint8) for low in (160, 10)]
    assert loss < 0.05 and generate(vlm, ["Bright?"] * 2, fresh, 3) == ["yes", "no"]


def test_columns_of_image_tokens_can_be_told_apart():
    """
    Two image tokens side by side differ by a turn of the fastest frequency that the width has; with the real layout it
    is 0.0002 radians.
    """
    rope = load_vlm("tiny:qwen2vl").base.model.language_model.rotary_emb
    assert sum(rope.mrope_section) == len(rope.inv_freq) and len(rope.mrope_section) % 3 == 0
    axis = torch.arange(len(rope.mrope_section)).remainder(3).repeat_interleave(torch.tensor(rope.mrope_section))
    for width_or_height in (1, 2):
        assert rope.inv_freq[axis == width_or_height].max() > 0.3


@pytest.mark.slow
def test_learns_left_from_right():
    """
    One bright patch on each picture, never twice the same picture: learned in 75 steps, and at chance after 300 if the
    columns look alike.
    """
    vlm = load_vlm("tiny:qwen2vl")
    rng = np.random.default_rng(0)

    def pictures(n):
        images, answers = [], []
        for _ in range(n):
            image = rng.integers(40, 120, (112, 112)).astype(np.uint8)
            x, y = rng.integers(0, 87, 2)
            image[y : y + 26, x : x + 26] = 220
            images.append(image)
            answers.append("left" if x + 13 < 56 else "right")
        return images, answers

    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    vlm.model.train()
    losses = []
    for step in range(250):
        images, answers = pictures(16)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 30)
        inputs = build_inputs(vlm, ["Left or right?"] * 16, images, answers=answers)
        loss = vlm.model(**inputs.tensors, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step > 30 and np.mean(losses[-10:]) < 0.1:
            break
    vlm.model.eval()
    images, answers = pictures(100)
    said = generate(vlm, ["Left or right?"] * 100, images, 3)
    assert np.mean([a == b for a, b in zip(said, answers, strict=True)]) > 0.8


@pytest.mark.slow
def test_benchmarks_run_in_their_short_form(tmp_path):
    from benchmarks import loading, tiny_vqa

    rows = tiny_vqa.main(
        ["--steps", "2", "--studies", "24", "--test-studies", "24", "--eval-every", "1", "--out-dir", "vqa"]
    )
    assert set(rows) >= {"its own film", "a grey picture", "another patient's film"}
    saved = read_json(tmp_path / "vqa" / "metrics.json")
    assert (
        saved["dataset"] == "phantom"
        and saved["tiny"]
        and len((tmp_path / "vqa" / "history.jsonl").read_text().splitlines()) == 2
    )
    loading.main(["--small", "--out-dir", "speed"])
    saved = read_json(tmp_path / "speed" / "loading.json")
    assert len(saved["loading"]) == 6 and saved["preprocessing"]
