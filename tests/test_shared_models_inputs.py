"""shared/models/inputs.py: images equal to the processors' own output, image tokens counted, a store of images."""

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, Gemma3ImageProcessor, LlavaImageProcessor, Qwen2VLImageProcessor
from transformers import SiglipImageProcessor

from shared.models.inputs import ImageStore, preprocess_images
from shared.models.passes import features_of, make_prompts
from shared.models.loading import FAMILIES, load_vlm
from shared.phantom import phantom_study
from shared.runtime import InputError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture(scope="module", params=list(FAMILIES))
def vlm(request, cache):
    return load_vlm("tiny:" + request.param)


@pytest.fixture(scope="module")
def films():
    """Grey films of three sizes, and two colour pictures that are not square."""
    rng = np.random.default_rng(0)
    grey = [phantom_study(0, i, size).image for i, size in enumerate((224, 112, 80, 224))]
    return grey + [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((90, 203, 3), (300, 101, 3))]


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
        (torch.zeros(40, 40), "tensors of images must be 8-bit"),
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
    with pytest.raises(InputError, match="ratio must be smaller than 200"):
        preprocess_images(Qwen2VLImageProcessor(), [np.zeros((2, 500), np.uint8)])
    with pytest.raises(InputError, match="pan-and-scan is on"):
        preprocess_images(Gemma3ImageProcessor(do_pan_and_scan=True), [np.zeros((40, 40), np.uint8)])


# --- tokens of images ---


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("gemma3", [(224, 224), (90, 200), (40, 40)], [(4, 4)] * 3),  # always the same square
        # the image's own shape, in cells of 28 px
        ("qwen2vl", [(224, 224), (90, 200), (56, 56), (57, 113)], [(4, 4), (2, 5), (2, 2), (2, 4)]),
        ("llava", [(224, 224), (90, 200), (40, 40)], [(8, 8)] * 3),
    ],
)
def test_image_tokens_for_several_sizes(family, sizes, expected):
    vlm = load_vlm("tiny:" + family)
    films = [np.zeros(s, np.uint8) for s in sizes]
    store = ImageStore(vlm.processor, films)
    for prompt, grid, before in zip(make_prompts(vlm, ["?"] * len(sizes), films), expected, store.grids, strict=True):
        assert prompt.grids == (grid,) == (tuple(before),)
        columns = (prompt.ids == vlm.image_token_id).nonzero()[0]
        assert len(columns) == grid[0] * grid[1] == columns[-1] - columns[0] + 1  # side by side


def test_tokens_are_in_the_order_of_the_grid(vlm):
    """A bright cell moves the features of its own token most: token k is row k // columns, column k % columns."""
    dark = np.zeros((112, 112), np.uint8)
    rows, columns = preprocess_images(vlm.processor, [dark]).grids[0]
    height, width, bright = 112 // rows, 112 // columns, dark.copy()
    bright[1 * height : 2 * height, 2 * width : 3 * width] = 255  # row 1, column 2
    with torch.inference_mode():
        before, after = features_of(vlm, preprocess_images(vlm.processor, [dark, bright]))
    assert int((after - before).norm(dim=1).argmax()) == 1 * columns + 2


# --- the store ---


@pytest.fixture
def files(tmp_path, films):
    paths = []
    for i, film in enumerate(films[:3]):
        Image.fromarray(film).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    return paths


def test_a_store_keeps_what_fits_and_gives_the_same(vlm, films, files):
    wanted = preprocess_images(vlm.processor, [films[i] for i in (2, 0, 2)])
    for budget, kept in ((1.0, "preprocessed"), (3e-4, "decoded"), (1e-9, "on disk")):
        store = ImageStore(vlm.processor, [*files, files[0]], budget)
        assert store.kept == kept and len(store) == 3 and store.number_of == [0, 1, 2, 0] and kept[:4] in str(store)
        found = store.get([2, 0, 2])
        assert torch.equal(found.values, wanted.values) and found.grids == wanted.grids


def test_features_are_computed_once_within_a_budget(vlm, films, files):
    store = ImageStore(vlm.processor, files)
    with torch.no_grad():
        wanted = [features_of(vlm, store.get([n]))[0] for n in range(3)]
    gib = store.cache_features(lambda images: features_of(vlm, images), 1.0, batch_size=2)
    assert gib == sum(f.nbytes for f in wanted) / 2**30
    for kept, alone in zip(store.features, wanted, strict=True):
        torch.testing.assert_close(kept, alone, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="the features of 3 images take .* GiB, more than --cache-gib 1e-06"):
        store.cache_features(lambda images: features_of(vlm, images), 1e-6)


def test_a_store_sees_what_the_reader_sees(vlm, tmp_path):
    """16-bit films are not white and float films not black, and a missing file is named."""
    film = phantom_study(0, 1, 112).image.astype(np.float32)
    Image.fromarray((film * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(film / 255).save(tmp_path / "float.tif")
    store = ImageStore(vlm.processor, [str(tmp_path / "deep.png"), str(tmp_path / "float.tif")])
    for n in range(2):
        assert np.corrcoef(store.read(n)[0].flatten(), film.flatten())[0, 1] > 0.99
    with pytest.raises(InputError, match="nowhere.png: the file does not exist"):
        ImageStore(vlm.processor, ["nowhere.png"])
