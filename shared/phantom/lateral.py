"""
The lateral view of the phantom: the same patient from the side, front of the body at the left of the image.

Plainer than the frontal film: y is the frontal film's y, z runs from the breastbone (-) to the back (+). Findings
appear at their own height and at the depth that was drawn for them; what a lateral film cannot show well (a small
pneumothorax, a rib fracture, a widened mediastinum) is left out of it, as it is in practice.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math

import numpy as np

from shared.phantom.body import NOISE, characteristic, clip, expose, mean_matrix, pixel_grid, ramp, smooth_matrix
from shared.phantom.body import supersampling, textures, tube_path

LATERAL_NOISE = NOISE + 1000


def _findings(findings, z, y, fine, lung, floor, n):
    """What the findings leave of the air, and what attenuation they add: two maps (n, n)."""
    f32 = np.float32
    keep, extra = 1.0, 0.0
    for finding in findings:
        shape, depth = finding.shape, f32(finding.depth)
        level = {"mild": 0.6, "moderate": 0.8, "severe": 1.0}.get(finding.severity, 0.8)
        if "ellipses" in shape:
            for _, cy, ra, rb, _, part in shape["ellipses"]:
                q = np.maximum(1.0 - ((z - depth) * f32(1 / ra)) ** 2 - ((y - f32(cy)) * f32(1 / rb)) ** 2, 0.0)
                keep = keep * (1.0 - f32(0.6 * shape["peak"] * part) * q * (1 + f32(0.3) * fine * (q > 0)))
        elif "balls" in shape:
            _, cy, radius = shape["balls"][-1]
            q = 1.0 - ((z - depth) ** 2 + (y - f32(cy)) ** 2) * f32(1 / radius**2)
            extra = extra + f32(0.4 + 4.0 * radius) * np.sqrt(np.maximum(q, 0.0)) * (lung > 0)
        elif finding.kind == "effusion":  # the recess behind fills first
            fluid = (
                f32(floor + 0.40 - 0.75 * level)
                - f32(0.25) * clip(z - 0.1, 0.0, 1.0)
                + f32(0.6) * clip(0.1 - z, 0.0, 1.0)
            )
            keep = keep * (1.0 - f32(0.55) * ramp(y - fluid, 0.05))
        elif finding.kind == "edema":
            haze = np.maximum(1.0 - ((z - 0.02) / 0.42) ** 2 - (y / 0.5) ** 2, 0.0)
            keep = keep * (1.0 - f32(0.5 * level) * haze * clip(1 + 0.3 * fine, 0.2, 1.5))
        elif finding.kind == "lower lobe collapse":
            keep = keep * (1.0 - f32(0.45) * ramp(z - f32(0.16) + f32(0.3) * (y - 0.3), 0.05) * ramp(y, 0.1))
        elif finding.kind == "upper lobe collapse":
            keep = keep * (1.0 - f32(0.4) * ramp(f32(-0.25) - y - f32(0.3) * (z + 0.1), 0.05))
        elif finding.kind == "plate atelectasis":
            for _, cy, ra, rb, _ in shape["bands"]:
                q = np.maximum(1.0 - ((z - depth) * f32(1 / ra)) ** 2 - ((y - f32(cy)) * f32(1 / rb)) ** 2, 0.0)
                keep = keep * (1.0 - f32(0.4) * q)
        elif finding.kind == "pacemaker":
            cy = shape["plate"][1]
            extra = extra + f32(2.4) * ramp(f32(0.02) - np.abs(z + f32(0.50)), 0.01) * ramp(
                f32(0.085) - np.abs(y - f32(cy)), 0.01
            )
            lead = np.abs(np.hypot((z + f32(0.28)) * f32(1.2), y - f32(0.08)) - f32(0.30))
            extra = extra + f32(1.0) * clip(1 - lead * f32(1 / max(0.008, 1 / n)), 0.0, 1.0) * (z > f32(-0.30))
        elif finding.kind == "endotracheal tube":
            tip = shape["tubes"][0][0][-1][1]
            extra = extra + f32(0.8) * clip(
                1 - np.abs(z - f32(0.06) - f32(0.12) * (y + 0.5)) * f32(1 / 0.014), 0.0, 1.0
            ) * (y < f32(tip))
    return keep, extra


def lateral_film(frame, findings, size, seed, index):
    """uint8 (size, size). Longer than functions should be, for the reason that body.render gives."""
    a, p = frame.a, frame.p
    n = size * supersampling(size)
    gx, gy = pixel_grid(n)
    f32 = np.float32
    z = (gx - f32(0.5 * p.shift_x)) * f32(1 / p.scale)
    y = (gy - f32(p.shift_y)) * f32(1 / p.scale)
    coarse, fine = textures(a.tree, n)
    edge = max(0.012, 2.0 / n)

    # -- trunk: from the breastbone, which slants forward downwards, to the back; neck and arms above
    front = f32(-0.44) - f32(0.20) * clip(y + 0.6, 0.0, 0.9) + f32(0.9) * clip(f32(-0.62) - y, 0.0, 0.3)
    back = f32(0.60) + f32(0.07) * np.cos(f32(2.2) * (y + 0.15)) - f32(0.8) * clip(f32(-0.68) - y, 0.0, 0.3)
    inside = np.minimum(z - front + f32(0.6 * a.body), back - z + f32(0.35 * a.body))
    trunk = (
        f32(1.25 * a.thick)
        * np.sqrt(clip(inside * f32(1 / 0.5), 0.0, 1.0))
        * (f32(0.8) + f32(0.2) * clip((y + 0.7) * 2, 0.0, 1.0))
    )
    arm = clip(1.0 - ((z - f32(0.10)) * f32(1 / 0.34)) ** 2 - ((y + f32(1.02)) * f32(1 / 0.42)) ** 2, 0.0, 1.0)
    trunk += f32(0.7) * np.sqrt(arm)

    # -- lungs: between breastbone and back, above two domes that fall steeply behind
    top = f32(a.apex + 0.02) + f32(1.5) * (z - f32(0.08)) ** 2
    domes = []
    for peak in (p.dome_right - 0.01, p.dome_left + 0.01):
        behind = clip(z + f32(0.12), 0.0, 1.0)
        domes.append(f32(peak) + f32(0.75) * behind * behind + f32(0.18) * clip(-0.12 - z, 0.0, 1.0))
    air = 0.0
    for dome in domes:
        inner = np.minimum(np.minimum(z - front - f32(0.03), back - z - f32(0.05)), y - top)
        air = air + f32(0.5) * ramp(dome - y, edge) * np.sqrt(clip(inner * f32(1 / 0.34), 0.0, 1.0))
    lung = f32(0.66 * a.thick) * air

    # -- heart in front, below; great vessels above it
    grow = frame.heart_ratio / 0.45
    ct, st = f32(math.cos(0.7)), f32(math.sin(0.7))
    floor = min(p.dome_left, p.dome_right)
    dz, dy = z + f32(0.26 - 0.08 * (grow - 1)), y - f32(floor - 0.16 * math.sqrt(grow))
    q = 1.0 - ((ct * dz + st * dy) * f32(1 / (0.33 * grow))) ** 2 - ((ct * dy - st * dz) * f32(1 / (0.25 * grow))) ** 2
    heart = np.minimum(f32(1.05) * np.sqrt(np.maximum(q, 0.0)), 1.0)
    arch = np.abs(np.hypot(z - f32(0.10), (y + f32(0.20)) * f32(0.9)) - f32(0.17))  # aorta, up, over and down
    vessels = f32(0.6) * clip(1.0 - arch * f32(1 / 0.055), 0.0, 1.0) * clip((f32(-0.12) - y) * f32(8.0), 0.0, 1.0)
    vessels += (
        f32(0.4) * clip(1.2 - np.abs(z - f32(0.27)) * f32(1 / 0.05), 0.0, 1.0) * clip((y + 0.2) * f32(8.0), 0.0, 1.0)
    )
    hilum = clip(1.0 - ((z - f32(0.02)) * f32(1 / 0.17)) ** 2 - ((y + f32(0.06)) * f32(1 / 0.15)) ** 2, 0.0, 1.0)
    vessels += f32(0.7) * hilum * (f32(1.0) + f32(0.35) * fine)
    lung *= (1.0 - f32(0.85) * heart) * (1.0 - f32(0.42) * clip(vessels, 0.0, 1.0))

    keep, extra = _findings(findings, z, y, fine, lung, floor, n)
    lung = lung * keep

    film = trunk - lung * (1 + f32(0.08) * fine) + extra + f32(0.08) * coarse * (trunk > 0.3)

    # -- airway, spine, ribs, breastbone
    film -= (
        f32(0.55)
        * clip(1 - ((z - f32(0.06) - f32(0.12) * (y + 0.5)) * f32(1 / 0.045)) ** 2, 0.0, 1.0)
        * (y < f32(-0.2))
    )
    zs = z - (back - f32(0.14))
    gap = f32(0.118)
    phase = (y - f32(0.03)) / gap
    within = np.abs(phase - np.rint(phase))
    body = (
        f32(0.42)
        - f32(0.30) * clip((within - 0.40) / 0.05, 0.0, 1.0)
        + f32(0.25) * np.exp(-(((within - f32(0.36)) / f32(0.045)) ** 2))
    )
    film += f32(a.bone) * body * clip((1.0 - np.abs(zs) * f32(1 / 0.085)) * 5, 0.0, 1.0)
    slant = (y - f32(0.75) * (z - f32(0.1)) * f32(-0.8)) * f32(1 / a.rib_gap) + f32(0.8) * z
    d = (slant - np.rint(slant)) * f32(a.rib_gap * 0.85)
    film += f32(0.30 * a.bone) * tube_path(d, a.rib_half) * ramp(inside - f32(0.5 * a.body), 0.05) * (y < f32(0.65))
    film += (
        f32(0.6 * a.bone)
        * clip(1 - np.abs(z - front + f32(0.015)) * f32(1 / 0.028), 0.0, 1.0)
        * (y > f32(-0.55))
        * (y < f32(0.3))
    )
    if a.gas > 0.25:
        q = (
            1.0
            - ((z + f32(0.1)) * f32(1 / (0.10 + 0.1 * a.gas))) ** 2
            - ((y - f32(p.dome_left + 0.16)) * f32(1 / 0.07)) ** 2
        )
        film -= f32(0.9) * np.sqrt(np.maximum(q, 0.0))

    photons = np.exp(-film)
    spread, mean = smooth_matrix(n, 8), mean_matrix(n, 8)
    photons += f32(p.scatter) * (spread @ (mean.T @ np.exp(-np.maximum(trunk, 0.8)) @ mean) @ spread.T)
    grey = characteristic(-np.log(photons) - f32(0.12 * a.thick), a, p)
    return expose(grey, size, frame, [seed, index, LATERAL_NOISE])
