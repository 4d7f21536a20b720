"""
model.py and augment.py: shapes, checkpoints that are refused, changes of images that do what they say.
"""

import functools
import math
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision
from sklearn.metrics import balanced_accuracy_score

from shared.data.augment import affine, augment, blur, shifted_copies
from shared.data.image_sets import load_phantom
from shared.runtime import InputError, digest, save_checkpoint
from task1_classification.model import FORMAT, build_model, choose_stem, decision_threshold, find_classifier
from task1_classification.model import fit_typicality, load_classifier, normalise, predict_logits, to_probabilities
from task1_classification.model import untrained_classifier, unusualness

GREY = {"mean": [0.5], "std": [0.25]}


# --- the network ---


@pytest.mark.parametrize(
    "architecture, stem, channels, size, outputs",
    [
        ("resnet18", "auto", 1, 28, 1),
        ("resnet18", "3x3", 3, 28, 8),
        ("resnet18", "3x3-stride2", 1, 64, 14),
        ("resnet18", "7x7", 3, 64, 5),
        ("resnet18", "auto", 1, 128, 1),
        ("resnet50", "auto", 1, 28, 1),
        ("resnet50", "7x7", 3, 28, 9),
    ],
)
def test_shapes(architecture, stem, channels, size, outputs):
    model = build_model(architecture, outputs, channels, size, stem).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(2, channels, size, size))
    assert logits.shape == (2, outputs) and torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "stem, sizes", [("3x3", [28, 14, 7, 4]), ("3x3-stride2", [14, 7, 4, 2]), ("7x7", [7, 4, 2, 1])]
)
def test_map_sizes_at_28_pixels(stem, sizes):
    model, found = build_model(stem=stem).eval(), []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: found.append(output.shape[-1]))
    model(torch.zeros(1, 1, 28, 28))
    assert found == sizes


def test_the_stem_by_size():
    assert [choose_stem("auto", size) for size in (28, 64, 128, 224)] == [
        "3x3-stride2",
        "3x3-stride2",
        "7x7",
        "7x7",
    ] and choose_stem("3x3", 224) == "3x3"


def test_pretrained_weights_answer_to_grey_as_to_the_same_grey_in_colour(monkeypatch):
    torch.manual_seed(0)
    original = torchvision.models.resnet18()
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights: original if weights is not None else None
    )
    colours = original.conv1.weight.clone()
    grey = build_model("resnet18", 1, 1, 224, "7x7", pretrained=True)
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(
        grey.conv1(x),
        torch.nn.functional.conv2d(x.expand(-1, 3, -1, -1), colours, stride=2, padding=3),
        rtol=1e-4,
        atol=1e-5,
    )
    assert grey.fc.out_features == 1


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    def no_network(name, weights):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(
        InputError, match="--pretrained: the ImageNet weights could not be fetched .* or leave --pretrained out"
    ):
        build_model(pretrained=True)


def test_normalise():
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    facts = {"mean": [0.5, 0.2], "std": [0.25, 0.1]}
    expected = torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]])
    torch.testing.assert_close(normalise(images, facts), expected)
    torch.testing.assert_close(normalise(images.float() / 255, facts), expected)


def test_probabilities():
    logits = torch.tensor([[0.0], [2.0]])
    assert to_probabilities(logits, "binary-class").tolist() == pytest.approx([0.5, 0.880797])
    assert to_probabilities(logits, "binary-class", 2.0).tolist() == pytest.approx([0.5, 0.731059])
    several = torch.tensor([[0.0, math.log(3.0)]])
    assert (
        to_probabilities(several, "multi-class").tolist()[0]
        == pytest.approx([0.25, 0.75])
        == to_probabilities(several, "ordinal-regression").tolist()[0]
    )
    assert to_probabilities(several, "multi-label, binary-class").tolist()[0] == pytest.approx([0.5, 0.75])


def test_decision_thresholds():
    p, y = torch.tensor([0.1, 0.2, 0.6, 0.7, 0.8, 0.9]), torch.tensor([0, 0, 0, 1, 1, 1])
    t = decision_threshold(p, y, "binary-class")
    assert 0.6 <= t < 0.7
    assert decision_threshold(torch.zeros(2, 3), torch.tensor([0, 1]), "multi-class") is None
    columns = decision_threshold(
        torch.stack([p, p, 1 - p], dim=1),
        torch.stack([y, torch.zeros(6), 1 - y], dim=1).float(),
        "multi-label, binary-class",
    )
    assert columns[0] == t and columns[1] == 0.5 and balanced_accuracy_score(1 - y, (1 - p).numpy() > columns[2]) == 1


def test_logits_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model, images = build_model().train(), torch.randint(0, 256, (9, 1, 28, 28), dtype=torch.uint8)
    whole = predict_logits(model, images, GREY)
    assert whole.shape == (9, 1) and not model.training and whole.dtype == torch.float32 and not whole.requires_grad
    torch.testing.assert_close(predict_logits(model, images, GREY, batch_size=2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        predict_logits(model, images.float() / 255, GREY, batch_size=4), whole, rtol=1e-4, atol=1e-5
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(normalise(images, GREY)), whole, rtol=1e-4, atol=1e-5)


# --- its checkpoint ---


@functools.cache
def typicality():
    images = torch.randint(0, 256, (40, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return fit_typicality(images[:20], images[20:])


def checkpoint(**changes):
    torch.manual_seed(1)
    model = build_model("resnet18", 3, 3, 28, "3x3")
    model(torch.randn(4, 3, 28, 28))  # other running statistics than those of a new network
    state = {
        "format": FORMAT,
        "architecture": "resnet18",
        "stem": "3x3",
        "num_outputs": 3,
        "channels": 3,
        "image_size": 28,
        "task": "multi-class",
        "label_names": ["a", "b", "c"],
        "state_dict": model.state_dict(),
        "weights_sha256": digest(model.state_dict()),
        "cases": {"train": 4, "val": 4},
        "limit": None,
        "normalisation": {"mean": [0.5] * 3, "std": [0.2] * 3},
        "temperature": 1.5,
        "threshold": None,
        "dataset": {"name": "x", "phantom": True},
        "seed": 0,
        "validation": {},
        "typicality": typicality(),
    }
    return model, state | changes


def test_a_classifier_comes_back_as_it_was():
    model, state = checkpoint()
    save_checkpoint("a.pt", state)
    loaded, facts = load_classifier("a.pt")
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    model = model.to(memory_format=torch.channels_last)
    assert torch.equal(
        predict_logits(loaded, images, facts["normalisation"]), predict_logits(model, images, state["normalisation"])
    )
    assert (
        not loaded.training
        and "state_dict" not in facts
        and facts["label_names"] == ["a", "b", "c"]
        and facts["temperature"] == 1.5
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"format": "task1-classifier-0"},
            "a.pt is a 'task1-classifier-0' file, not a 'task1-classifier-2'; train the classifier again",
        ),
        ({"architecture": "vgg16"}, "holds a vgg16, which this version does not know"),
        ({"architecture": "resnet50"}, "do not fit the resnet50 it says it holds"),
        ({"stem": "7x7"}, "do not fit"),
        ({"num_outputs": 2, "label_names": ["a", "b"]}, "do not fit"),
        ({"state_dict": {}}, "do not fit"),
        ({"state_dict": {"fc.weight": "x"}}, "do not fit"),
        ({"temperature": math.nan}, "no classifier has such values of temperature"),
        ({"temperature": -1.0, "threshold": 0.5}, "no classifier has such values of temperature, threshold"),
        ({"normalisation": {"mean": [0.5] * 3, "std": [0.0, 0.2, 0.2]}}, "such values of normalisation"),
        ({"normalisation": {"mean": [0.5], "std": [0.2]}}, "such values of normalisation"),
        ({"label_names": ["a", "b"]}, "such values of num_outputs"),
        ({"label_names": ["a"]}, "such values of label_names, num_outputs"),
        ({"label_names": "abc"}, "such values of label_names"),
        ({"task": "binary-class", "threshold": 0.5}, "such values of num_outputs"),
        ({"task": "regression"}, "such values of task"),
        ({"channels": 2}, "such values of channels"),
        ({"image_size": 10**9}, "such values of image_size"),
        ({"dataset": {"name": "x"}}, "such values of dataset"),
        ({"dataset": None}, "such values of dataset"),
        ({"typicality": {}}, "such values of typicality"),
        ({"cases": {"train": 3}}, "such values of cases"),
    ],
)
def test_checkpoints_that_do_not_fit(changes, message):
    save_checkpoint("a.pt", checkpoint(**changes)[1])
    with pytest.raises(InputError) as error:
        load_classifier("a.pt")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", [math.nan, 5, -1.0, None, [0.5], "0.5"])
def test_thresholds_that_cannot_be(threshold):
    binary = {"task": "binary-class", "label_names": ["a", "b"], "num_outputs": 1}
    save_checkpoint("a.pt", checkpoint(**binary, threshold=threshold)[1])
    with pytest.raises(InputError, match="no classifier has such values of threshold"):
        load_classifier("a.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model, state = checkpoint()
    state["state_dict"]["fc.bias"][1] = value
    save_checkpoint("a.pt", state | {"weights_sha256": digest(state["state_dict"])})
    with pytest.raises(InputError, match="weights in a.pt are NaN or infinite"):
        load_classifier("a.pt")
    with pytest.raises(InputError, match="2 of 2 images with NaN or infinity"):
        predict_logits(model, torch.zeros(2, 3, 28, 28), state["normalisation"])


def test_other_weights_than_those_that_were_saved_are_refused():
    state = checkpoint()[1]
    state["state_dict"]["fc.bias"] += 1
    save_checkpoint("a.pt", state)
    with pytest.raises(InputError, match="the weights in a.pt are not those that were saved"):
        load_classifier("a.pt")


def test_an_untrained_classifier_is_a_classifier():
    facts = load_classifier(untrained_classifier())[1]
    assert facts["cases"] == {"train": 96, "val": 32} and facts["dataset"]["phantom"] and facts["validation"] == {}


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap-was-run"),)


def test_foreign_damaged_and_pickled_files(tiny_run):
    save_checkpoint("weights.pt", checkpoint()[1]["state_dict"])
    save_checkpoint("whole.pt", checkpoint()[1])
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:50_000])
    torch.save(checkpoint()[1] | {"extra": Trap()}, "code.pt")
    for path, message in [
        ("weights.pt", "is not a task 1 classifier of this script: it lacks format"),
        (tiny_run.run_dir / "last.pt", "it lacks format, architecture"),
        ("cut.pt", "the file is damaged or of another kind"),
        ("code.pt", "it holds pickled Python code, which is never run"),
        ("gone.pt", "there is no task 1 classifier at gone.pt"),
    ]:
        with pytest.raises(InputError) as error:
            load_classifier(path)
        assert message in str(error.value)
    assert not Path("trap-was-run").exists()


@pytest.mark.parametrize("key", ["stem", "num_outputs", "channels", "image_size"])
def test_a_classifier_that_lacks_something_is_refused(key):
    state = checkpoint()[1]
    del state[key]
    save_checkpoint("a.pt", state)
    with pytest.raises(InputError, match=key):
        load_classifier("a.pt")


def test_where_a_classifier_is_looked_for():
    assert find_classifier() is None
    Path("task1_model.pth").touch()
    assert find_classifier() == Path("task1_model.pth")
    Path("models").mkdir()
    Path("models/task1_model.pth").touch()
    assert find_classifier() == Path("models/task1_model.pth")


# --- augmentation ---


def films(n=24, size=28):
    torch.manual_seed(3)
    return blur(blur(torch.rand(n, 1, size, size)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("strength", ["geometry", "full"])
def test_augmentation_is_decided_by_its_generator(strength):
    x = films()
    first = augment(x, generator(), strength)
    assert torch.equal(first, augment(x, generator(), strength)) and not torch.equal(
        first, augment(x, generator(1), strength)
    )
    assert first.shape == x.shape and first.dtype == torch.float32 and torch.isfinite(first).all()
    assert augment(films(5).expand(-1, 3, -1, -1), generator(), strength).shape == (5, 3, 28, 28)


def test_no_augmentation_is_no_change():
    x = films()
    assert torch.equal(augment(x, generator(), "none"), x)


@pytest.mark.parametrize("strength", ["geometry", "full"])
def test_each_image_is_changed_and_differently(strength):
    same = films(1).expand(30, -1, -1, -1)
    changed = augment(same, generator(), strength)
    assert ((changed - same).abs().mean((1, 2, 3)) > 0.003).all()
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 30


def test_ranges():
    x = films(200)
    moved = augment(x, generator(), "geometry")
    assert moved.min() >= x.min() - 1e-5 and moved.max() <= x.max() + 1e-5  # interpolation adds no new values
    full = augment(x, generator(), "full")
    assert -0.7 < full.min() and full.max() < 1.7 and ((full > -0.1) & (full < 1.1)).float().mean() > 0.97
    assert abs((full.mean() - x.mean()).item()) < 0.05  # neither brighter nor darker on average


def test_left_stays_left_and_the_middle_stays_in_the_middle():
    half = torch.zeros(300, 1, 28, 28)
    half[..., :14] = 1
    changed = augment(half, generator(), "full")
    assert (changed[..., :9].mean((1, 2, 3)) > changed[..., -9:].mean((1, 2, 3))).all()
    dot = torch.zeros(2000, 1, 28, 28)
    dot[..., 13:15, 13:15] = 1
    place = augment(dot, generator(), "geometry").sum((0, 1))
    along = torch.arange(28.0)
    for axis in (0, 1):
        assert (place.sum(axis) * along).sum() / place.sum() == pytest.approx(13.5, abs=0.2)


def blob(row, column, size=28):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 4.0)[None, None]


def centre(images):
    """Row and column of the centre of mass of each image."""
    rows, columns = images.sum((1, 3)), images.sum((1, 2))
    along = torch.arange(images.shape[-1], dtype=torch.float32)
    return torch.stack([(rows * along).sum(1), (columns * along).sum(1)], dim=1) / images.sum((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(angle=0, shift_x=0, shift_y=0, zoom=1), (9, 18)),
        (
            dict(angle=0, shift_x=4 / 28, shift_y=0, zoom=1),
            (9, 14),
        ),  # looks 4 pixels further right: the picture moves left
        (dict(angle=0, shift_x=0, shift_y=-4 / 28, zoom=1), (13, 18)),
        (dict(angle=0, shift_x=0, shift_y=0, zoom=1.5), (13.5 - 4.5 * 1.5, 13.5 + 4.5 * 1.5)),
        (
            dict(angle=90, shift_x=0, shift_y=0, zoom=1),
            (9, 9),
        ),  # a quarter turn against the clock: top right goes to top left
        (dict(angle=45, shift_x=0, shift_y=0, zoom=1), (13.5 - 4.5 * 2**0.5, 13.5)),
    ],
)
def test_affine_moves_a_dot(change, expected):
    assert centre(affine(blob(9, 18), **change))[0].tolist() == pytest.approx(expected, abs=0.12)


def test_affine_agrees_with_scipy():
    angle, shift_x, shift_y, zoom, size = 11.0, 0.05, -0.08, 1.15, 28
    image = blob(12, 16) + 0.5 * blob(17, 10)
    ours = affine(image, angle, shift_x, shift_y, zoom)[0, 0].numpy()
    a = math.radians(angle)
    matrix = (
        np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) / zoom
    )  # (row, column) of the output -> of the input
    middle = np.array([(size - 1) / 2] * 2)
    offset = middle - matrix @ middle + np.array([shift_y, shift_x]) * size
    theirs = scipy.ndimage.affine_transform(image[0, 0].numpy(), matrix, offset, order=1)
    np.testing.assert_allclose(ours[4:-4, 4:-4], theirs[4:-4, 4:-4], atol=1e-4)


def test_affine_takes_one_value_per_image():
    shifts = torch.tensor([0.0, 3 / 28, -5 / 28]).view(3, 1, 1, 1)
    columns = centre(affine(blob(14, 14).expand(3, -1, -1, -1), 0, shifts, 0, 1.0))[:, 1]
    assert columns.tolist() == pytest.approx([14, 11, 19], abs=0.05)


def test_blur_is_the_binomial_filter():
    x = torch.zeros(1, 2, 7, 7)
    x[0, 1, 3, 3] = 16
    blurred = blur(x)
    assert blurred[0, 1, 2:5, 2:5].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]] and blurred[0, 0].abs().max() == 0
    torch.testing.assert_close(blur(torch.full((1, 1, 5, 5), 0.3)), torch.full((1, 1, 5, 5), 0.3))


def test_shifted_copies():
    images = (films(12) * 255).round().to(torch.uint8)
    copies = shifted_copies(images)
    names = list(copies)
    assert names[0] == "as it is" and torch.equal(copies["as it is"], images.float() / 255) and len(names) > 4
    again, other = shifted_copies(images), shifted_copies(images, seed=1)
    for name, copy in copies.items():
        assert copy.shape == images.shape and copy.min() >= 0 and copy.max() <= 1
        assert torch.equal(copy, again[name]), "the same for everybody"
        if name != "as it is":
            assert ((copy - copies["as it is"]).abs().mean((1, 2, 3)) > 0.003).all(), name
    assert any(not torch.equal(copies[name], other[name]) for name in names)
    assert shifted_copies(images[:1].expand(-1, 3, -1, -1))[names[1]].shape == (1, 3, 28, 28)


# --- is it a film at all? ---


def test_typicality():
    data = load_phantom(28, {"train": 160, "val": 60, "test": 60})
    model = fit_typicality(data.images["train"], data.images["val"])
    val, test = (unusualness(model, data.images[split]) for split in ("val", "test"))
    assert (val > 1).float().mean() <= 0.05 and (test > 1).float().mean() <= 0.25
    assert (unusualness(model, 255 - data.images["test"]) > 1).float().mean() > 0.9
    assert (
        unusualness(model, torch.randint(0, 256, (20, 1, 28, 28), generator=generator(), dtype=torch.uint8)) > 1
    ).all()
    assert torch.isinf(unusualness(model, torch.full((2, 1, 28, 28), 128, dtype=torch.uint8))).all()
    assert (unusualness(model, data.images["test"].flip(2)) > test).float().mean() > 0.8  # upside down
    torch.testing.assert_close(
        unusualness(model, data.images["test"][:3].expand(-1, 3, -1, -1)), test[:3]
    )  # grey in colour
    save_checkpoint("a.pt", model)  # plain tensors
    assert torch.equal(unusualness(torch.load("a.pt", weights_only=True), data.images["test"]), test)


def test_typicality_of_a_handful_of_images():
    images = load_phantom(28, {"train": 3, "val": 2, "test": 2}).images
    assert torch.isfinite(unusualness(fit_typicality(images["train"], images["val"]), images["test"])).all()
