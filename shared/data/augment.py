"""
Random changes of a whole batch at once: no Python work per image, on whatever device the batch lies.

The 28-pixel films of the training split are all framed alike, those of the test split are not: without small geometric
changes the network learns the framing (docs/results/task1_classification.md).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math

import torch
import torch.nn.functional as F

STRENGTHS = ("none", "geometry", "full")


def augment(images, generator, strength="full"):
    """
    images float in 0..1 (N, C, H, W), `generator` on the same device -> changed copies, same shape, about 0..1.

    "geometry": rotation up to 10 degrees, shift up to 7 % of the side (2 of 28 pixels), zoom 0.91 to 1.1.
    "full": also gamma, contrast, brightness and noise. There is no mirroring: it would put the heart on the wrong side.
    """
    if strength == "none":
        return images
    n, device = len(images), images.device

    def uniform(low, high):
        return torch.rand(n, 1, 1, 1, generator=generator, device=device) * (high - low) + low

    images = affine(
        images,
        angle=uniform(-10, 10),
        shift_x=uniform(-0.07, 0.07),
        shift_y=uniform(-0.07, 0.07),
        zoom=1.1 ** uniform(-1, 1),
    )
    if strength == "geometry":
        return images
    images = images.clamp(1e-3, 1) ** torch.exp(uniform(-0.25, 0.25))  # exposure
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * torch.exp(uniform(-0.25, 0.25)) + mean + uniform(-0.125, 0.125)
    return images + uniform(0, 0.04) * torch.randn(images.shape, generator=generator, device=device)


def affine(images, angle, shift_x, shift_y, zoom):
    """
    images (N, C, H, W); angle in degrees, shifts as a share of the side, zoom > 1 enlarges: each a number or (N, 1, 1,
    1).
    """
    n = len(images)
    angle, shift_x, shift_y, zoom = (
        torch.as_tensor(v, device=images.device, dtype=images.dtype).expand(n, 1, 1, 1).flatten()
        for v in (angle, shift_x, shift_y, zoom)
    )
    cos, sin = torch.cos(angle * math.pi / 180) / zoom, torch.sin(angle * math.pi / 180) / zoom
    matrix = torch.stack([cos, -sin, 2 * shift_x, sin, cos, 2 * shift_y], dim=1).view(
        n, 2, 3
    )  # output pixel -> input place
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def blur(images):
    """(N, C, H, W) -> the same, smoothed with the 3x3 binomial filter."""
    line = torch.tensor([0.25, 0.5, 0.25], device=images.device, dtype=images.dtype)
    channels = images.shape[1]
    kernel = (line[:, None] * line).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)


def shifted_copies(images, seed=0):
    """
    images uint8 (N, C, H, W) -> {name: float 0..1 (N, C, H, W)}: the images as they are and six fixed changes of
    framing, exposure and sharpness that another hospital's films might show. Validation on these tells recipes, epochs
    and thresholds apart that plain validation, near 0.99 AUC for all of them, cannot.
    """
    generator = torch.Generator().manual_seed(seed)
    x = images.float() / 255
    mean = x.mean((1, 2, 3), keepdim=True)

    def uniform(width):
        return (torch.rand(len(x), 1, 1, 1, generator=generator) * 2 - 1) * width

    copies = {
        "as it is": x,
        "turned and moved": affine(x, uniform(10), uniform(0.07), uniform(0.07), 1.0),
        "zoomed in": affine(x, 0, 0, 0, 1.2),
        "zoomed out": affine(x, 0, 0, 0, 0.85),
        "bright and flat": (x - mean) * 0.7 + mean + 0.1,
        "dark and hard": ((x - mean) * 1.3 + mean).clamp(0, 1) ** 1.4,
        "blurred and noisy": blur(x) + 0.04 * torch.randn(x.shape, generator=generator),
    }
    return {name: copy.clamp(0, 1) for name, copy in copies.items()}
