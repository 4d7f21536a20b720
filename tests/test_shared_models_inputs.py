"""shared/models/inputs.py: equal to the processors' own output, padded on the left, image tokens counted and found."""

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, Gemma3ImageProcessor, LlavaImageProcessor, Qwen2VLImageProcessor
from transformers import SiglipImageProcessor

from shared.models import inputs as inputs_module
from shared.models.inputs import Images, build_inputs, decode, generate_text, preprocess_images
from shared.models.loading import load_vlm
from shared.phantom import phantom_study
from shared.runtime import InputError

VLMS = ("gemma3", "qwen2vl", "llava")
QUESTIONS = ["Is there a nodule?", "Is the effusion on the left or the right side of this film?", "Normal?"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture(scope="module", params=VLMS)
def vlm(request, cache):
    return load_vlm("tiny:" + request.param)


@pytest.fixture(scope="module")
def films():
    """Grey films of three sizes, and two colour pictures that are not square."""
    rng = np.random.default_rng(0)
    grey = [phantom_study(0, i, size).image for i, size in enumerate((224, 112, 80, 224))]
    return grey + [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((90, 203, 3), (300, 101, 3))]


def conversation(question, image):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.fromarray(image).convert("RGB")},
                {"type": "text", "text": question},
            ],
        }
    ]


# --- images ---


def test_images_equal_the_processor(vlm, films):
    expected = vlm.processor.image_processor(
        images=[Image.fromarray(f).convert("RGB") for f in films], return_tensors="pt"
    )
    for given in (films, [Image.fromarray(f) for f in films], [torch.from_numpy(f) for f in films]):
        images = preprocess_images(vlm.processor, given)
        assert torch.equal(images.values, expected["pixel_values"])
    if "image_grid_thw" in expected:
        assert torch.equal(images.grid_thw, expected["image_grid_thw"])
    assert len(images) == len(films)


@pytest.mark.parametrize(
    "ip",
    [
        Gemma3ImageProcessor(size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        Qwen2VLImageProcessor(),  # the limits of the real model
        LlavaImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_pad=True
        ),  # LLaVA-Med's "pad"
        LlavaImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        LlavaImageProcessor(
            size={"shortest_edge": 100}, crop_size={"height": 112, "width": 112}
        ),  # a crop larger than the image
        CLIPImageProcessor(do_normalize=False),
        SiglipImageProcessor(),
    ],
    ids=["gemma3", "qwen2vl", "llava-pad", "llava-crop", "llava-enlarged", "clip-plain", "siglip"],
)
def test_real_image_settings_equal_the_processor(ip, films):
    some = films[:1] + films[4:]
    expected = ip(images=[Image.fromarray(f).convert("RGB") for f in some], return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess_images(ip, some).values, expected)


@pytest.mark.realdata
def test_gemma_settings_of_the_hub(real_data, films):
    ip = Gemma3ImageProcessor.from_pretrained(real_data("hub_configs/gemma-3"))
    expected = ip(
        images=[Image.fromarray(f).convert("RGB") for f in films[4:]], return_tensors="pt", do_pan_and_scan=False
    )["pixel_values"]
    assert torch.equal(preprocess_images(ip, films[4:]).values, expected) and expected.shape[-1] == 896


def test_without_torchvision_the_processor_does_it(vlm, films, monkeypatch):
    ours = preprocess_images(vlm.processor, films)
    monkeypatch.setattr(inputs_module, "tv", None)
    other = preprocess_images(vlm.processor, films)
    assert torch.equal(ours.values, other.values) and ours.grids == other.grids


def test_picked_images_are_those_images(vlm, films):
    images = preprocess_images(vlm.processor, films)
    rows = [4, 0, 4, 2]
    expected = preprocess_images(vlm.processor, [films[r] for r in rows])
    picked = images.pick(rows)
    assert torch.equal(picked.values, expected.values) and picked.grids == expected.grids
    assert len(images.pick([])) == 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((40, 40), np.float32), "images must be 8-bit"),
        (np.zeros((40, 40, 4), np.uint8), "an image has the shape"),
        ("film.png", "an image is a PIL image, an array or a tensor, not str"),
    ],
)
def test_images_that_cannot_be_used(vlm, image, message):
    with pytest.raises(InputError, match=message):
        preprocess_images(vlm.processor, [image])


def test_more_refusals_of_images(vlm):
    with pytest.raises(InputError, match="there are no images"):
        preprocess_images(vlm.processor, [])
    with pytest.raises(InputError, match="at most 200 to 1"):
        preprocess_images(Qwen2VLImageProcessor(), [np.zeros((2, 500), np.uint8)])
    with pytest.raises(InputError, match="pan-and-scan is on"):
        preprocess_images(Gemma3ImageProcessor(do_pan_and_scan=True), [np.zeros((40, 40), np.uint8)])


# --- text and image tokens ---


def test_batch_equals_the_processor(vlm, films):
    some = films[:3]
    ours = build_inputs(vlm, QUESTIONS, some)
    theirs = vlm.processor.apply_chat_template(
        [conversation(q, f) for q, f in zip(QUESTIONS, some, strict=True)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(padding=True),
    )
    assert set(ours.tensors) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours.tensors[name], value), name
    tokenizer = vlm.tokenizer
    if tokenizer.bos_token_id is not None:  # one start token, not two
        assert (ours.tensors["input_ids"] == tokenizer.bos_token_id).sum() == 3


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("gemma3", [(224, 224), (90, 200), (40, 40)], [(4, 4)] * 3),  # always the same square
        (
            "qwen2vl",
            [(224, 224), (90, 200), (56, 56), (57, 113)],
            [(4, 4), (2, 5), (2, 2), (2, 4)],
        ),  # the image's own shape, in cells of 28 px
        ("llava", [(224, 224), (90, 200), (40, 40)], [(8, 8)] * 3),
    ],
)
def test_image_tokens_for_several_sizes(family, sizes, expected):
    vlm = load_vlm("tiny:" + family)
    inputs = build_inputs(vlm, ["Normal?"] * len(sizes), [np.zeros(s, np.uint8) for s in sizes])
    for case, grid in enumerate(expected):
        ids = inputs.tensors["input_ids"][case]
        assert inputs.grids[case] == [grid]
        columns = inputs.image_positions[case][0]
        assert len(columns) == grid[0] * grid[1] and (ids[columns] == vlm.image_token_id).all()
        assert (ids == vlm.image_token_id).sum() == len(columns)


def test_positions_are_in_the_order_of_the_grid(vlm):
    """A bright cell moves the features of its own token most: token k is row k // columns, column k % columns."""
    dark = np.zeros((112, 112), np.uint8)
    rows, columns = build_inputs(vlm, ["Normal?"], [dark]).grids[0][0]
    features = []
    for image in (dark, dark.copy()):
        if len(features):
            height, width = 112 // rows, 112 // columns
            image[1 * height : 2 * height, 2 * width : 3 * width] = 255  # row 1, column 2
        x = build_inputs(vlm, ["Normal?"], [image]).tensors
        with torch.inference_mode():
            out = vlm.model.get_image_features(
                pixel_values=x["pixel_values"],
                **({"image_grid_thw": x["image_grid_thw"]} if "image_grid_thw" in x else {}),
            )
        out = out.pooler_output if hasattr(out, "pooler_output") else out
        features.append((out[0] if isinstance(out, (list, tuple)) else out).reshape(rows * columns, -1))
    moved = (features[1] - features[0]).norm(dim=1)
    assert int(moved.argmax()) == 1 * columns + 2


def test_cases_with_no_image_and_with_two(vlm, films):
    inputs = build_inputs(vlm, QUESTIONS, [None, [films[1], films[2]], films[1]])
    assert [len(case) for case in inputs.grids] == [0, 2, 1]
    assert [len(p) for p in inputs.image_positions] == [0, 2, 1]
    first, second = inputs.image_positions[1]
    assert first[-1] < second[0]
    with torch.inference_mode():
        assert torch.isfinite(vlm.model(**inputs.tensors).logits).all()


def test_text_alone(vlm):
    inputs = build_inputs(vlm, QUESTIONS)
    assert "pixel_values" not in inputs.tensors and inputs.grids == [[], [], []]
    assert len(generate_text(vlm, inputs, max_new_tokens=2)) == 3


def test_labels_are_the_answer_and_what_ends_it(vlm, films):
    end = {"gemma3": "<end_of_turn>", "qwen2vl": "<|im_end|>", "llava": "</s>"}[vlm.family]
    prompt = build_inputs(vlm, QUESTIONS, films[:3])
    inputs = build_inputs(vlm, QUESTIONS, films[:3], answers=["yes", "the left side", "no"], system="Answer briefly.")
    for row, answer in zip(inputs.tensors["labels"], ["yes", "the left side", "no"], strict=True):
        learned = row[row != -100]
        assert vlm.tokenizer.decode(learned).strip() == answer + end
        assert (row != -100).nonzero()[0, 0] == len(row) - len(learned)  # nothing after the answer
    assert inputs.length > prompt.length
    assert torch.isfinite(vlm.model(**inputs.tensors).loss)


def test_the_prompt_of_training_is_that_of_generation(vlm, films):
    prompt = build_inputs(vlm, QUESTIONS[:1], films[:1], system="Be brief.").tensors["input_ids"][0]
    trained = build_inputs(vlm, QUESTIONS[:1], films[:1], answers=["yes"], system="Be brief.").tensors["input_ids"][0]
    assert torch.equal(trained[: len(prompt)], prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(questions=["a", "b"]), "2 questions and 1 images"),
        (dict(answers=["a", "b"]), "1 questions and 2 answers"),
        (dict(questions=["what is {image}?"]), "stands for an image; take it out"),
        (dict(answers=["{image}"]), "stands for an image; take it out"),
    ],
)
def test_text_and_images_that_do_not_fit(vlm, films, change, message):
    token = vlm.tokenizer.image_token
    given = dict(questions=["Normal?"], images=films[:1]) | {
        k: [t.replace("{image}", token) for t in v] for k, v in change.items()
    }
    with pytest.raises(InputError, match=message):
        build_inputs(vlm, **given)


def test_a_template_without_or_with_two_places_is_refused(vlm, films, monkeypatch):
    whole = vlm.processor.chat_template
    mark = {"gemma3": "<start_of_image>", "qwen2vl": "<|image_pad|>", "llava": "<image>"}[vlm.family]
    for template, places in ((whole.replace(mark, ""), 0), (whole.replace(mark, mark + " " + mark), 2)):
        monkeypatch.setattr(vlm.processor, "chat_template", template)
        with pytest.raises(InputError, match=f"room for {places} images, and there are 1"):
            build_inputs(vlm, ["Normal?"], films[:1])


def test_image_tokens_that_are_not_the_grids_are_refused(vlm, films):
    images = preprocess_images(vlm.processor, films[:1])
    wrong = torch.zeros(1, 10, dtype=torch.bool)
    wrong[0, 2:5] = True
    with pytest.raises(InputError, match="case 0 has 3 image tokens, and its images need"):
        inputs_module.positions_of(wrong, [images.grids])
    wrong[:] = False
    wrong[0, [1, 2, 4, 5]] = True
    with pytest.raises(InputError, match="do not stand together"):
        inputs_module.positions_of(wrong, [[(2, 2)]])


# --- what the model makes of it ---


def test_left_padded_batch_equals_single_cases(vlm, films):
    with torch.inference_mode():
        together = vlm.model(**build_inputs(vlm, QUESTIONS, films[:3]).tensors).logits[:, -1]
        for i in range(3):
            alone = vlm.model(**build_inputs(vlm, QUESTIONS[i : i + 1], films[i : i + 1]).tensors).logits[:, -1]
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    texts = generate_text(vlm, build_inputs(vlm, QUESTIONS, films[:3]), max_new_tokens=5)
    assert texts == [
        generate_text(vlm, build_inputs(vlm, [q], [f]), max_new_tokens=5)[0]
        for q, f in zip(QUESTIONS, films[:3], strict=True)
    ]


def test_pixels_change_the_logits(vlm):
    black, white = np.zeros((112, 112), np.uint8), np.full((112, 112), 255, np.uint8)
    with torch.inference_mode():
        a, b = (vlm.model(**build_inputs(vlm, ["Normal?"], [image]).tensors).logits[0, -1] for image in (black, white))
    assert (a - b).abs().max() > 0.02


def test_sampling_never_writes_image_tokens(vlm, films):
    """
    An untrained model picks every token about equally often; a placeholder in the answer would break the next forward
    pass.
    """
    inputs = build_inputs(vlm, QUESTIONS, films[:3])
    torch.manual_seed(0)
    with torch.inference_mode():
        out = vlm.model.generate(
            **inputs.tensors, do_sample=True, temperature=5.0, top_k=0, max_new_tokens=60, num_return_sequences=8
        )
    new = out[:, inputs.length :]
    banned = torch.tensor(vlm.model.generation_config.suppress_tokens)
    assert vlm.image_token_id in banned and new.numel() > 1000 and not torch.isin(new, banned).any()
    assert len(decode(vlm, out, inputs.length)) == 24


def test_repeat_keeps_cases_together(vlm, films):
    inputs = build_inputs(vlm, QUESTIONS, [films[1], None, [films[4], films[2]]])
    again = build_inputs(
        vlm,
        [q for q in QUESTIONS for _ in range(2)],
        [x for case in ([films[1]], None, [films[4], films[2]]) for x in (case, case)],
    )
    twice = inputs.repeat(2)
    assert twice.grids == again.grids
    for name, value in again.tensors.items():
        assert torch.equal(twice.tensors[name], value), name


def test_images_type_is_checked_by_number(vlm, films):
    with pytest.raises(InputError, match="1 questions and 2 images"):
        build_inputs(vlm, ["Normal?"], Images(torch.zeros(2, 3, 8, 8), [(1, 1)] * 2))
