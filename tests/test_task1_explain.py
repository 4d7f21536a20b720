"""explain.py: Grad-CAM by hand and against pytorch-grad-cam, and no hook left behind."""

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from shared.runtime import InputError
from task1_classification.explain import GradCAM, deepest_layer, overlay
from task1_classification.model import build_model


class Tiny(nn.Module):
    """One convolution, its mean, one linear layer: Grad-CAM of `conv` can be worked out by hand."""

    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(outputs)
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, outputs)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def images(n=3, channels=1, size=28):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(5))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def resnet():
    """A network with running statistics of its own, so that its maps are not all alike."""
    torch.manual_seed(0)
    model = build_model("resnet18", 3).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 1, 28, 28))
    return model.eval()


def test_by_hand():
    model, x = Tiny(3), images(size=6)
    with GradCAM(model, "conv") as cam:
        raw, maps = cam(x, [2, 0, 1], normalised=False), cam(x, [2, 0, 1])
    activation = model.conv(x).detach()
    for i, target in enumerate([2, 0, 1]):
        # the logit is sum_k w_k mean(A_k): its gradient is w_k / 36 everywhere, and so is the channel's weight
        expected = sum(model.fc.weight[target, k].item() / 36 * activation[i, k] for k in range(4)).relu()
        torch.testing.assert_close(raw[i], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(maps[i], expected / expected.max(), rtol=1e-4, atol=1e-6)


def test_without_targets_the_called_class_is_explained(resnet):
    x = images(6)
    with GradCAM(resnet, "layer2") as cam:
        torch.testing.assert_close(cam(x), cam(x, resnet(x).argmax(1)))


def test_one_logit_is_explained_by_its_sign():
    model, x = Tiny(1), images(4, size=6)
    with GradCAM(model, "conv") as cam:
        ill, normal, called = (
            cam(x, [1] * 4, normalised=False),
            cam(x, torch.zeros(4, dtype=torch.int64), normalised=False),
            cam(x, normalised=False),
        )
    evidence = sum(model.fc.weight[0, k].item() / 36 * model.conv(x).detach()[:, k] for k in range(4))
    torch.testing.assert_close(ill, evidence.relu(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(normal, (-evidence).relu(), rtol=1e-4, atol=1e-7)
    positive = model(x)[:, 0] > 0
    assert torch.equal(called, torch.where(positive[:, None, None], ill, normal))


def test_a_map_without_evidence_is_zero():
    model = Tiny(1)
    nn.init.zeros_(model.fc.weight)
    with GradCAM(model, "conv") as cam:
        maps = cam(images())
    assert torch.equal(maps, torch.zeros_like(maps))


def test_a_batch_equals_its_images_one_by_one(resnet):
    x = images(5)
    with GradCAM(resnet, "layer3") as cam:
        together = cam(x, normalised=False)
        alone = torch.cat([cam(image[None], normalised=False) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)


def test_hooks_are_gone_afterwards(resnet):
    assert hooks(resnet) == 0
    with GradCAM(resnet, "layer2") as cam:
        assert hooks(resnet) == 1
        cam(images())
    assert hooks(resnet) == 0 and cam.activation is None
    with pytest.raises(ZeroDivisionError), GradCAM(resnet, "layer2"):
        _ = 1 / 0
    with pytest.raises(RuntimeError), GradCAM(resnet) as cam:  # an image with too many channels
        cam(images(channels=3))
    assert hooks(resnet) == 0
    with pytest.raises(RuntimeError, match="with block"):
        cam(images())
    with pytest.raises(InputError):
        GradCAM(resnet, "layer9")
    assert hooks(resnet) == 0


def test_gradients_and_mode_of_the_network_are_left_alone(resnet):
    x = images()
    with GradCAM(resnet) as cam:
        cam(x)
    assert all(p.grad is None for p in resnet.parameters()) and not x.requires_grad and not resnet.training


def test_frozen_weights_and_no_grad(resnet):
    x = images()
    with GradCAM(resnet) as cam:
        free = cam(x)
        for parameter in resnet.parameters():
            parameter.requires_grad_(False)
        try:
            with torch.no_grad():
                torch.testing.assert_close(cam(x), free)
        finally:
            for parameter in resnet.parameters():
                parameter.requires_grad_(True)


@pytest.mark.parametrize(
    "stem, size, layer, side",
    [
        ("3x3-stride2", 28, "layer2", 7),
        ("3x3", 28, "layer3", 7),
        ("7x7", 28, "layer1", 7),
        ("3x3-stride2", 64, "layer3", 8),
        ("7x7", 224, "layer4", 7),
    ],
)
def test_auto_takes_the_deepest_layer_with_a_map_worth_drawing(stem, size, layer, side):
    model = build_model(image_size=size, stem=stem).eval()
    assert deepest_layer(model, size, 1) == layer and hooks(model) == 0
    with GradCAM(model, image_size=size) as cam:
        assert cam.name == layer and cam(images(1, size=size)).shape == (1, side, side)


def test_any_layer_by_name(resnet):
    for name, side in (("conv1", 14), ("layer1.0", 14), ("layer2.1.conv2", 7), ("layer4", 2)):
        with GradCAM(resnet, name) as cam:
            maps = cam(images())
        assert maps.shape == (3, side, side) and maps.min() >= 0 and maps.max() <= 1, name


def test_a_layer_before_an_in_place_operation(resnet):
    def maps(inplace):
        for module in resnet.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        with GradCAM(resnet, "layer2.0.bn1") as cam:
            return cam(images(), normalised=False)

    try:
        torch.testing.assert_close(maps(True), maps(False))
    finally:
        maps(True)


def test_a_stock_resnet_ends_in_a_constant_at_28_pixels():
    with GradCAM(build_model(stem="7x7"), "layer4") as cam:
        maps = cam(images(5))
    assert maps.shape == (5, 1, 1) and set(maps.flatten().tolist()) <= {0.0, 1.0}


def test_layers_that_have_no_map(resnet):
    with pytest.raises(InputError, match=r"layer 'fc' gives \(3, 3\), not a map"), GradCAM(resnet, "fc") as cam:
        cam(images())
    for name in ("layer9", "", "layer1.7"):
        with pytest.raises(
            InputError, match="the network has no layer .*; its stages are conv1, .*layer4, avgpool, fc"
        ):
            GradCAM(resnet, name)
    assert hooks(resnet) == 0


# --- the picture ---


@pytest.mark.parametrize("channels", [1, 3])
def test_a_zero_map_leaves_the_film_as_it_is(channels):
    films = torch.randint(0, 256, (2, channels, 28, 28), dtype=torch.uint8)
    picture = overlay(films, torch.zeros(2, 7, 7))
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, films.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def test_overlay():
    films = torch.full((2, 1, 28, 28), 100, dtype=torch.uint8)
    maps = torch.zeros(2, 7, 7)
    maps[0, 1, 5] = 1
    pictures = overlay(films, maps, scale=4)
    assert pictures.shape == (2, 112, 112, 3) and (pictures[1] == 100).all()
    changed = (pictures[0] != 100).any(-1)
    rows, columns = np.nonzero(changed)
    assert (
        10 <= rows.mean() <= 38 and abs(rows.mean() - 23.5) < 1.5 and abs(columns.mean() - 87.5) < 1.5
    )  # cell (1, 5): rows 16-31, columns 80-95
    full = overlay(films[:1], torch.ones(1, 1, 1), strength=1.0)
    hottest = (np.array(matplotlib.colormaps["inferno"](1.0)[:3]) * 255).round().astype(np.uint8)
    assert (full == hottest).all()


# --- against the reference ---


@pytest.mark.parity
@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "layer4", "layer2.0", "conv1"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_agrees_with_pytorch_grad_cam(layer, outputs):
    reference = pytest.importorskip(
        "pytorch_grad_cam", reason="comparing with pytorch-grad-cam needs requirements-dev.txt"
    )
    from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget, ClassifierOutputTarget

    torch.manual_seed(2)
    model, x, classes = build_model("resnet18", outputs).eval(), images(4), [1, 0, 1, 0]
    module = model.get_submodule(layer)
    targets = [(BinaryClassifierOutputTarget if outputs == 1 else ClassifierOutputTarget)(c) for c in classes]
    with reference.GradCAM(model=model, target_layers=[module]) as theirs:
        logits = theirs.activations_and_grads(x.clone().requires_grad_())
        sum(target(output) for target, output in zip(targets, logits, strict=True)).sum().backward()
        activations, gradients = (
            theirs.activations_and_grads.activations[0].numpy(),
            theirs.activations_and_grads.gradients[0].numpy(),
        )
        expected = np.maximum(
            theirs.get_cam_image(x, module, targets, activations, gradients, False), 0
        )  # before resizing
    with GradCAM(model, layer) as cam:
        ours = cam(x, torch.tensor(classes), normalised=False).numpy()
    assert expected.max() > 0
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1.0, expected.max()), rtol=1e-4)
