"""
Where did the network look? Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) for any layer and whole batches.

    with GradCAM(model, "auto", image_size=28) as cam:      # the hook is gone when the block ends
        maps = cam(images)                                   # (N, h, w) in 0..1, at the layer's own size
    pictures = overlay(images, maps)

A map has the size of its layer: 7x7 at 28 pixels means that every cell covers 4x4 pixels, whatever the enlarged picture
suggests. A stock ResNet-18 ends in a 1x1 map at 28 pixels, where Grad-CAM is a constant.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from shared.runtime import InputError

MIN_MAP = 7  # cells per side that "auto" asks for


class GradCAM:
    """Maps of one layer of `model`: a dotted name, or "auto": the deepest ResNet stage with a map of 7x7 or more."""

    def __init__(self, model, layer="auto", image_size=28, channels=1):
        self.model = model.eval()
        modules = dict(model.named_modules())
        layer = deepest_layer(model, image_size, channels) if layer == "auto" else layer
        if layer not in modules or layer == "":
            stages = ", ".join(name for name, _ in model.named_children())
            raise InputError(f"the network has no layer '{layer}'; its stages are {stages}")
        self.name, self.module, self.hook, self.activation = layer, modules[layer], None, None

    def __enter__(self):
        self.hook = self.module.register_forward_hook(self.keep)
        return self

    def __exit__(self, *exception):
        self.hook.remove()
        self.hook = self.activation = None

    def keep(self, module, inputs, output):
        self.activation = output  # an in-place ReLU that follows changes the copy
        return output.clone() if isinstance(output, torch.Tensor) else None

    def __call__(self, images, targets=None, normalised=True):
        """
        images float (N, C, H, W), already normalised for the network; targets (N,) int class per image, by default the
        class the network calls. A network with one logit (binary) is explained by +logit for class 1 and -logit for
        class 0. -> maps (N, h, w), 0 where nothing speaks for the class; each divided by its maximum unless
        normalised=False.
        """
        if self.hook is None:
            raise RuntimeError("use GradCAM in a with block: with GradCAM(model) as cam: ...")
        with torch.enable_grad():
            logits = self.model(images.detach().requires_grad_())  # also reaches layers whose weights are frozen
            if self.activation.ndim != 4:
                raise InputError(f"layer '{self.name}' gives {tuple(self.activation.shape)}, not a map (N, C, h, w)")
            both = torch.cat([-logits, logits], dim=1) if logits.shape[1] == 1 else logits
            targets = both.argmax(1) if targets is None else torch.as_tensor(targets, device=logits.device)
            score = both.gather(1, targets[:, None]).sum()  # images do not meet in eval mode: one backward serves all
            (gradient,) = torch.autograd.grad(score, self.activation)
        weights = gradient.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        maps = (weights * self.activation.detach()).sum(1).relu()  # (N, h, w)
        self.activation = None
        if normalised:
            maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
        return maps


def deepest_layer(model, image_size, channels):
    """Name of the last of layer1..layer4 whose map at this image size is at least MIN_MAP cells wide."""
    stages = {getattr(model, name): name for name in ("layer1", "layer2", "layer3", "layer4")}
    wide, weight = ["layer1"], next(model.parameters())

    def note(module, inputs, output):
        wide.extend([stages[module]] * (output.shape[-1] >= MIN_MAP))

    hooks = [stage.register_forward_hook(note) for stage in stages]
    try:
        with torch.inference_mode():
            model(weight.new_zeros(1, channels, image_size, image_size))
    finally:
        for hook in hooks:
            hook.remove()
    return wide[-1]


def overlay(images, maps, strength=0.45, scale=1):
    """
    images uint8 (N, C, H, W), maps (N, h, w) in 0..1 -> uint8 (N, H * scale, W * scale, 3): the image in grey (or
    colour) under the map, enlarged bilinearly; the colour gets stronger with the map, so that the film stays visible.
    """
    size = (images.shape[2] * scale, images.shape[3] * scale)
    base = F.interpolate(images.float() / 255, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    base = base.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    heat = F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    heat = heat.clamp(0, 1).cpu().numpy()
    color = matplotlib.colormaps["inferno"](heat)[..., :3]
    share = strength * np.sqrt(heat)[..., None] + 0.0
    return ((base * (1 - share) + color * share) * 255).round().astype(np.uint8)
