"""
The findings of the phantom: where each kind lies, what it does to the film, and which points its box goes round.

Each kind has a place_... function (geometry in body coordinates, from the anatomy and uniform draws) and a _draw_...
function (its effect on a Canvas, and its mask). Left and right are the patient's; sign -1 is the image's left. A
finding may change the film only inside the box of its outline: the tests hold it to 95 % of the absolute change of
pixels.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
from dataclasses import dataclass, field

import numpy as np

from shared.phantom.body import clip, ellipse, ellipse_points, lung_outline, ramp, splat

ZONES = ("upper", "mid", "lower")
SEVERITIES = ("mild", "moderate", "severe")
SIGN = {"right": -1, "left": 1}

CHRONIC = ("Cardiomegaly", "Enlarged Cardiomediastinum", "Pleural Other", "Fracture")  # in all studies of a patient
ORDER = CHRONIC + (
    "Lung Lesion",
    "Consolidation",
    "Pneumonia",
    "Lung Opacity",
    "Pneumothorax",
    "Edema",
    "Pleural Effusion",
    "Atelectasis",
    "Support Devices",
)


@dataclass
class Finding:
    """One thing that was drawn."""

    condition: str  # one of the 14 CheXpert names
    kind: str  # which drawing, for example "nodule", "pacemaker"
    side: str  # "right", "left", "bilateral", "midline"
    zone: str  # "upper", "mid", "lower", "" where it makes no sense
    severity: str  # "mild", "moderate", "severe"
    shape: dict = field(default_factory=dict, repr=False)  # geometry for the drawing
    outlines: list = field(default_factory=list, repr=False)  # point lists (P, 2); one box each
    depth: float = 0.0  # front (-) to back (+) of the chest, for the lateral view
    chronic: bool = False  # belongs to the patient, so it is in all of their studies

    @property
    def name(self):
        return " ".join(word for word in (self.kind, self.side, self.zone) if word)

    def draw(self, canvas):
        """Write the finding into a Canvas; returns its mask."""
        return DRAW[self.kind](canvas, self.shape)


def _clip_to_cage(frame, points):
    points = points.copy()
    points[:, 1] = np.maximum(points[:, 1], frame.a.apex)
    wall = frame.cage(points[:, 1]) + 0.004
    points[:, 0] = clip(points[:, 0], -wall, wall)
    floor = frame.dome(points[:, 0], lifted=True) + 0.17  # the lung reaches this far behind the dome
    points[:, 1] = np.minimum(points[:, 1], floor)
    return points


def _zone_y(d, frame, zone):
    """A height inside a zone of the lung; zones are thirds between apex and dome."""
    top, low = frame.a.apex, min(frame.p.dome_left, frame.p.dome_right)
    third = (low - top) / 3.0
    i = ZONES.index(zone)
    return top + third * (i + d.u(0.45 if i == 0 else 0.2, 0.7 if i == 2 else 0.8))


def zone_of(frame, y):
    top, low = frame.a.apex, min(frame.p.dome_left, frame.p.dome_right)
    return ZONES[min(2, max(0, int(3.0 * (y - top) / (low - top))))]


def place_blob(d, frame, side, zone, severity, strength=None):
    """Patchy filling of air spaces: a few overlapping ellipses."""
    sign = SIGN[side]
    level = SEVERITIES.index(severity)
    y = _zone_y(d, frame, zone)
    wall = float(frame.cage(np.float64(y)))
    x = sign * (0.16 + (wall - 0.16) * d.u(0.3, 0.72))
    size = (0.14, 0.19, 0.25)[level] * d.u(0.85, 1.15)
    peak = (0.3, 0.46, 0.68)[level] * d.u(0.85, 1.15) if strength is None else strength
    ellipses = [(x, y, size, size * d.u(0.65, 0.95), d.u(-0.6, 0.6), 1.0)]
    for _ in range(4 + level):
        turn, away = d.u(0, 2 * math.pi), size * d.u(0.5, 1.15)
        r = size * d.u(0.45, 0.85)
        cx = x + away * math.cos(turn)
        cx = sign * max(0.12, min(abs(cx), wall - 0.02))
        ellipses.append((cx, y + away * math.sin(turn), r, r * d.u(0.6, 1.0), d.u(-0.8, 0.8), d.u(0.5, 0.9)))
    points = np.concatenate([ellipse_points(*e[:5]) for e in ellipses])
    return {"ellipses": ellipses, "peak": peak, "bronchogram": d.u(0.0, 0.3)}, [_clip_to_cage(frame, points)]


def _draw_blob(c, shape):
    f32 = np.float32
    clear = None
    for cx, cy, a, b, tilt, part in shape["ellipses"]:
        q = np.maximum(ellipse(c, cx, cy, a, b, tilt), 0.0)
        part = 1.0 - f32(part) * q * q
        clear = part if clear is None else clear * part
    pot = 1.0 - clear  # 0 at the rim of the region; texture makes the border ragged
    t = np.minimum(np.maximum(pot * (f32(1.25) + f32(0.5) * c.fine + f32(0.2) * c.coarse), 0.0), 1.0)
    fraction = f32(shape["peak"]) * t * t * (f32(3.0) - f32(2.0) * t)
    if shape["bronchogram"]:  # airways that stay open run like the vessels do
        fraction *= 1.0 - f32(shape["bronchogram"]) * np.minimum(f32(9.0) * c.vessels, 1.0)
    c.fill(fraction)
    return (pot > 0.1) & c.aerated


def place_consolidation(d, frame, side, zone, severity):
    """Dense filling; the airways stay open and show as dark branches (air bronchogram)."""
    shape, outlines = place_blob(d, frame, side, zone, severity, strength=(0.66, 0.78, 0.9)[SEVERITIES.index(severity)])
    shape["bronchogram"] = 0.65
    return shape, outlines


def place_opacity(d, frame, side, zone, severity):
    """Haze without structure: one large faint patch."""
    sign, level = SIGN[side], SEVERITIES.index(severity)
    y = _zone_y(d, frame, zone)
    wall = float(frame.cage(np.float64(y)))
    x = sign * (0.16 + (wall - 0.16) * d.u(0.35, 0.65))
    size = (0.19, 0.23, 0.28)[level] * d.u(0.9, 1.1)
    peak = (0.26, 0.34, 0.44)[level]
    ellipses = [(x, y, size, size * d.u(0.7, 1.0), d.u(-0.6, 0.6), 1.0)]
    return {"ellipses": ellipses, "peak": peak, "bronchogram": 0.0}, [
        _clip_to_cage(frame, ellipse_points(*ellipses[0][:5]))
    ]


def place_ball(d, frame, side, zone, severity, radius):
    """A nodule or mass: round, sharply edged, somewhere between chest wall and hilum."""
    sign = SIGN[side]
    y = _zone_y(d, frame, zone)
    wall = float(frame.cage(np.float64(y)))
    inner = 0.17 + radius
    x = sign * (inner + max(0.0, wall - inner - 0.6 * radius) * d.u(0.15, 0.95))
    spikes = [(d.u(0, 6.28), d.u(0.7, 1.0)) for _ in range(5)]
    parts = [(x + 0.35 * radius * math.cos(t), y + 0.35 * radius * math.sin(t), radius * r * 0.75) for t, r in spikes]
    parts.append((x, y, radius))
    points = np.concatenate([ellipse_points(cx, cy, r, r) for cx, cy, r in parts])
    return {"balls": parts, "radius": radius}, [_clip_to_cage(frame, points)]


def _draw_ball(c, shape):
    best = None
    for cx, cy, r in shape["balls"]:
        q = ellipse(c, cx, cy, r, r)
        best = q if best is None else np.maximum(best, q)
    path = np.sqrt(np.maximum(best, 0.0))
    # A 1 cm nodule takes little of a 15 cm ray; drawn a little denser than water so that it shows, as calcium often
    # does.
    depth = 0.42 + 4.0 * shape["radius"]
    c.extra.append(np.float32(depth) * path * (c.lung > 0))
    return (best > 0.0) & (c.lung > 0)


def place_effusion(d, frame, side, severity):
    """Fluid in the pleural space: a level that climbs towards the chest wall, so the costophrenic angle goes first."""
    sign, level = SIGN[side], SEVERITIES.index(severity)
    a, top = frame.a, float(frame.dome(np.float64(sign * 0.3), lifted=False))
    at_wall = top + (0.06, -0.12, -0.42)[level] + d.u(-0.04, 0.04)
    at_middle = top + (0.17, 0.03, -0.22)[level] + d.u(-0.03, 0.03)
    xs = np.linspace(0.06, a.cage, 48)
    surface = at_middle + (at_wall - at_middle) * (xs / a.cage) ** 3
    dome = frame.dome(sign * xs, lifted=False)
    wet = surface < dome + 0.10  # below that the recess holds so little air that nothing is seen to change
    xs, surface, dome = xs[wet], surface[wet], dome[wet]
    points = np.concatenate([np.stack([sign * xs, surface - 0.01], 1), np.stack([sign * xs, dome + 0.17], 1)])
    return {"sign": sign, "wall": at_wall, "middle": at_middle}, [_clip_to_cage(frame, points)]


def _draw_effusion(c, shape):
    a, sign = c.frame.a, shape["sign"]
    level = shape["middle"] + (shape["wall"] - shape["middle"]) * (np.abs(c.line) / a.cage) ** 3
    level = np.where(sign * c.line > 0, level, 9.0)
    under = (c.y - c.along_x(level)) * np.float32(1 / 0.06)
    c.fill(np.float32(0.95) * np.minimum(np.maximum(under, 0.0), 1.0))
    return (under > 0.3) & c.aerated


def place_pneumothorax(d, frame, side, severity):
    """
    Air between lung and chest wall, at the top first. The lung's own edge shows as a thin line without markings
    beyond.
    """
    sign, level = SIGN[side], SEVERITIES.index(severity)
    a = frame.a
    drop = (0.08, 0.14, 0.24)[level] * d.u(0.9, 1.1)
    gap = (0.07, 0.15, 0.32)[level] * d.u(0.9, 1.1)
    end = (0.0, 0.3, 0.6)[level]
    shape = {"sign": sign, "drop": drop, "gap": gap, "end": end}
    ys = np.linspace(a.apex + 0.004, end, 40)
    wall, edge = frame.cage(ys), _collapsed(frame, shape, ys)
    right, left = frame.medial(ys)
    inner = np.maximum(edge - 0.035, np.minimum(left if sign > 0 else -right, wall) - 0.01)
    keep = wall - edge > 0.003
    points = np.concatenate([np.stack([sign * wall, ys], 1)[keep], np.stack([sign * inner, ys], 1)[keep]])
    return shape, [points]


def _collapsed(frame, shape, y):
    """Half-width of the lung inside a pneumothorax at heights y."""
    taper = clip((shape["end"] - y) / (shape["end"] - frame.a.apex), 0.0, 1.0)
    return frame.cage(y - shape["drop"] * taper) * (1.0 - shape["gap"] * taper**0.8)


def _draw_pneumothorax(c, shape):
    f32 = np.float32
    edge = c.along_y(_collapsed(c.frame, shape, c.line))
    reach = c.along_y((c.line < shape["end"]).astype(np.float32))
    beyond = (shape["sign"] * c.x - edge) * reach
    width = max(0.010, 2.0 / c.n)
    free = ramp(beyond - f32(0.5 * width), width) * reach * (shape["sign"] * c.x > 0)
    c.hide_vessels = 1.0 - free
    c.extra.append(f32(-0.40) * free * c.lung)  # no tissue at all: blacker
    line = np.maximum(1.0 - np.abs(beyond) * f32(1 / max(0.009, 1.2 / c.n)), 0.0) * reach
    c.extra.append(f32(0.6) * line * (c.lung > 0.02) * (shape["sign"] * c.x > 0))
    return (free > 0.5) & c.aerated


def place_thickening(d, frame, side, zone, severity):
    """Pleural thickening: a cap over the apex, or a lens along the side of the chest."""
    sign, level = SIGN[side], SEVERITIES.index(severity)
    a = frame.a
    if zone == "upper":
        drop, wave = (0.07, 0.10, 0.14)[level], d.u(0, 6.28)
        shape = {"sign": sign, "drop": drop, "gap": 0.05, "end": a.apex + 0.42, "cap": True, "wave": wave}
        ys = np.linspace(a.apex + 0.004, shape["end"], 40)
        inner = _collapsed(frame, shape, ys) - 0.03
    else:
        low = float(frame.dome(np.float64(sign * a.cage), lifted=False)) - 0.02
        top = low - (0.42, 0.55, 0.75)[level] * d.u(0.9, 1.1)
        thick, wave = (0.045, 0.06, 0.085)[level], d.u(0, 6.28)
        shape = {"sign": sign, "top": top, "low": low, "thick": thick, "cap": False, "wave": wave}
        ys = np.linspace(top, low, 40)
        inner = frame.cage(ys) - _lens(shape, ys) - 0.005
    wall = frame.cage(ys)
    right, left = frame.medial(ys)
    inner = np.maximum(inner, np.minimum(left if sign > 0 else -right, wall))
    return shape, [np.concatenate([np.stack([sign * wall, ys], 1), np.stack([sign * inner, ys], 1)])]


def _lens(shape, y):
    t = clip((y - shape["top"]) / (shape["low"] - shape["top"]), 0.0, 1.0)
    return shape["thick"] * np.sin(math.pi * t) ** 0.6 * (1.0 + 0.12 * np.sin(9 * t + shape["wave"]))


def _draw_thickening(c, shape):
    frame, sign = c.frame, shape["sign"]
    if shape["cap"]:
        inner = _collapsed(frame, shape, c.line) + 0.02 * np.sin(40 * c.line + shape["wave"]) * (c.line < shape["end"])
        inner = np.where(c.line < shape["end"], inner, 9.0)
    else:
        beside = (c.line > shape["top"]) & (c.line < shape["low"])
        inner = np.where(beside, frame.cage(c.line) - _lens(shape, c.line), 9.0)
    part = ramp(sign * c.x - c.along_y(inner), 0.02)
    c.fill(np.float32(0.85) * part)
    return (part > 0.5) & c.aerated


def place_atelectasis(d, frame, side, zone, severity, kind):
    """Volume loss: the lung that is left without air is dense, and the diaphragm of that side rises."""
    sign, level = SIGN[side], SEVERITIES.index(severity)
    a = frame.a
    if kind == "upper lobe collapse":
        hilum = -0.16 + d.u(-0.04, 0.04)
        rise = (0.10, 0.16, 0.22)[level]  # the fissure is pulled up at the side
        shape = {"sign": sign, "hilum": hilum, "rise": rise, "lift": 0.0}
        ys = np.linspace(a.apex + 0.01, hilum, 24)
        points = np.stack([sign * frame.cage(ys), ys], 1)
        points = np.concatenate([points, [[sign * 0.08, a.apex + 0.05], [sign * 0.08, hilum + 0.02]]])
    else:
        lift = (0.05, 0.08, 0.11)[level]
        if kind == "lower lobe collapse":
            shape = {"sign": sign, "lift": lift, "top": -0.06 + d.u(-0.05, 0.05), "width": (0.26, 0.34, 0.42)[level]}
            own = np.array([[sign * 0.05, shape["top"]], [sign * (0.10 + shape["width"]), frame.p.dome_right + 0.1]])
        else:
            y = frame.p.dome_right - lift - (0.08 if zone == "lower" else 0.36) - d.u(0.0, 0.08)
            wall = float(frame.cage(np.float64(y)))
            x, long = sign * wall, 0.15 + 0.04 * level
            bands = [(x * d.u(0.5, 0.68), y - 0.06 * i, long, 0.013, sign * d.u(-0.3, 0.15)) for i in range(1 + level)]
            shape = {"sign": sign, "lift": lift, "bands": bands}
            own = _clip_to_cage(frame, np.concatenate([ellipse_points(*band) for band in bands]))
        xs = np.linspace(0.08, a.cage, 24)
        low = frame.dome(sign * xs, lifted=False)
        high = np.minimum(low, low - lift * clip(1.2 - ((xs - 0.3) / (a.cage - 0.3)) ** 2, 0, 1))
        points = np.concatenate([own, np.stack([sign * xs, low + 0.14], 1), np.stack([sign * xs, high - 0.005], 1)])
        points = points[np.abs(points[:, 0]) <= a.cage + 0.01]
    return shape, [points]


def _draw_upper_collapse(c, shape):
    x = shape["sign"] * c.line
    t = clip((x - 0.08) / (c.frame.a.cage - 0.08), 0.0, 1.0)
    fissure = np.where(x > 0, shape["hilum"] - shape["rise"] * t - 0.10 * np.sin(math.pi * t), -9.0)
    part = ramp(c.along_x(fissure) - c.y, 0.02)
    c.fill(np.float32(0.78) * part)
    return (part > 0.5) & c.aerated


def _draw_lower_collapse(c, shape):
    x = shape["sign"] * c.x
    outer = 0.10 + shape["width"] * clip((c.line - shape["top"]) / (c.frame.p.dome_right - shape["top"]), 0.0, 1.3)
    part = ramp(c.along_y(outer) - x, 0.03) * ramp(c.y - np.float32(shape["top"]), 0.06) * (x > 0)
    c.fill(np.float32(0.8) * part)
    return (part > 0.5) & c.aerated


def _draw_plate(c, shape):
    total = 0.0
    for band in shape["bands"]:
        total = np.maximum(total, np.maximum(ellipse(c, *band), 0.0))
    c.fill(np.float32(0.55) * np.minimum(np.float32(1.5) * total, 1.0))
    return (total > 0.1) & c.aerated


def place_edema(d, frame, severity):
    """Fluid in the lungs of both sides: haze around the hila, wide vessels, short lines at the bases (Kerley B)."""
    level = SEVERITIES.index(severity)
    lines = []
    for sign in (-1, 1):
        floor = float(frame.dome(np.float64(sign * 0.6), lifted=False))
        for i in range(5 + 2 * level):
            y = floor - 0.06 - 0.045 * i - d.u(0, 0.02)
            wall = float(frame.cage(np.float64(y)))
            lines.append((sign * (wall - 0.012), y, -sign * d.u(0.06, 0.10), d.u(-0.012, 0.012)))
    shape = {"peak": (0.34, 0.5, 0.68)[level], "gain": (1.35, 1.6, 1.9)[level], "lines": lines}
    return shape, [lung_outline(frame, -1), lung_outline(frame, 1)]


def _draw_edema(c, shape):
    f32 = np.float32
    haze = 0.0
    for sign in (-1, 1):
        haze = np.maximum(haze, ellipse(c, sign * 0.22, 0.02, 0.40, 0.50, sign * -0.25))
    haze = np.maximum(haze, 0.0) * np.minimum(np.maximum(1.0 + f32(0.3) * c.fine + f32(0.15) * c.coarse, 0.2), 1.4)
    c.fill(np.minimum(f32(shape["peak"]) * haze, 0.95))
    c.vessel_gain *= shape["gain"]
    t = (np.arange(max(4, c.n // 16)) + 0.5) / max(4, c.n // 16)
    x = np.concatenate([x0 + dx * t for x0, _, dx, _ in shape["lines"]])
    y = np.concatenate([y0 + dy * t for _, y0, _, dy in shape["lines"]])
    length = sum(abs(dx) for _, _, dx, _ in shape["lines"])
    c.extra.append(splat(c.n, c.frame, x, y, 0.0035 * length / len(x), 0.005) * (c.lung > 0.1))
    return c.aerated & (haze > 0.1)


def place_fracture(d, frame, side, severity):
    """A rib broken at the back or side: a gap, and the outer piece stands off."""
    sign, level = SIGN[side], SEVERITIES.index(severity)
    a = frame.a
    rib = 3 + d.integer(5)
    u0 = d.u(0.5, 0.78)
    y = a.rib_first + rib * a.rib_gap + a.rib_drop * (1 - math.sqrt(1 - u0 * u0))
    x = sign * u0 * (float(frame.cage(np.float64(y))) + 0.015)
    step = (0.034, 0.042, 0.052)[level] * d.pick((1, -1))
    reach = 0.10
    shape = {"x": x, "y": y, "sign": sign, "step": step, "reach": reach, "rib": rib}
    low, high = (x, x + sign * reach) if sign > 0 else (x + sign * reach, x)
    points = np.array([[edge, y + dy] for edge in (low - 0.02, high + 0.02) for dy in (-0.065, 0.105)])
    return shape, [points]


def _draw_fracture(c, shape):
    f32 = np.float32
    out = shape["sign"] * (c.x - f32(shape["x"]))  # distance outwards from the break
    near = np.maximum(1.0 - out * f32(1 / shape["reach"]), 0.0) * (out > 0)
    slope = 0.35  # the rib falls outwards; keep to this one rib
    dy = c.y - f32(shape["y"]) - f32(slope) * np.minimum(np.maximum(out, -0.03), shape["reach"])
    this = np.maximum(1.0 - (dy * f32(1 / 0.062)) ** 2, 0.0)
    this = np.minimum(this * f32(2.0), 1.0)
    shift = f32(-shape["step"] / c.frame.a.rib_gap) * near * this
    gap = 1.0 - np.minimum(np.maximum(f32(1.6) - np.abs(out) * f32(1 / 0.013), 0.0), 1.0) * (np.abs(dy) < 0.05)
    if c.rib_shift is None:
        c.rib_shift, c.rib_gap_map = shift, gap
    else:
        c.rib_shift, c.rib_gap_map = c.rib_shift + shift, c.rib_gap_map * gap
    # swelling of soft tissue around the break
    q = np.maximum(ellipse(c, shape["x"] + 0.01 * shape["sign"], shape["y"] + 0.01, 0.035, 0.04), 0.0)
    c.extra.append(f32(0.3) * q)
    return (np.abs(out - 0.03) < 0.06) & (np.abs(dy) < 0.04)


def _curve(points, count):
    """Smooth line through control points (Catmull-Rom), `count` samples: x, y, and the length of a step."""
    p = np.asarray(points, np.float64)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0.0, len(p) - 3 - 1e-9, count)
    i = t.astype(int)
    t = (t - i)[:, None]
    p0, p1, p2, p3 = p[i], p[i + 1], p[i + 2], p[i + 3]
    xy = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t * t + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    step = np.hypot(*np.diff(xy, axis=0, append=xy[-1:] + 1e-6).T)
    return xy[:, 0], xy[:, 1], step


DEVICES = ("endotracheal tube", "central venous catheter", "pacemaker", "chest tube", "nasogastric tube")


def place_device(d, frame, kind, side):
    sign = SIGN.get(side, 1)
    p = frame.p
    turn = p.turn
    tubes, plate = [], None
    if kind == "endotracheal tube":
        tip = -0.40 + d.u(-0.06, 0.03)
        tubes.append(([(0.0, -1.2), (d.u(-0.01, 0.01), -0.85), (0.5 * turn, tip)], 0.022, 1.3))
    elif kind == "nasogastric tube":
        below = [(0.08, p.dome_left - 0.05), (0.22, p.dome_left + 0.14), (0.34, p.dome_left + 0.20)]
        tubes.append(([(0.02, -1.2), (0.012, -0.6), (0.02 + turn, 0.0), *below], 0.014, 0.8))
    elif kind == "central venous catheter":
        tip = (-0.10 + turn, d.u(-0.12, 0.02))
        start = [(0.60, -0.48), (0.40, -0.62), (0.16, -0.55), (-0.03, -0.45)]
        if side == "right":
            jugular, subclavian = [(-0.20, -1.2), (-0.17, -0.85), (-0.13, -0.58)], [(-0.62, -0.50), (-0.40, -0.63)]
            start = jugular if d.chance(0.6) else [*subclavian, (-0.17, -0.55)]
        tubes.append(([*start, (-0.105, -0.32), tip], 0.010, 1.1))
    elif kind == "chest tube":
        wall = float(frame.cage(np.float64(0.2)))
        way = [(wall + 0.18, 0.30), (wall - 0.02, 0.16), (0.48, -0.12), (0.34, d.u(-0.55, -0.4))]
        tubes.append(([(sign * x, y) for x, y in way], 0.026, 0.85))
    else:
        cx, cy = sign * (0.47 + d.u(-0.03, 0.03)), -0.40 + d.u(-0.04, 0.04)
        plate = (cx, cy, 0.095, 0.078, sign * 0.25)
        way = [(cx - sign * 0.03, cy - 0.08), (sign * 0.30, -0.60), (sign * 0.10, -0.50), (-0.09 + turn, -0.30)]
        floor = 0.5 * (p.dome_left + p.dome_right)
        end = [(-0.13 + turn, 0.02), (-0.06 + turn, floor - 0.06), (0.22 + turn, floor + 0.03)]
        tubes.append((way + end, 0.009, 1.3))
        if d.chance(0.5):
            tubes.append(([*way, (-0.155 + turn, 0.0), (-0.11 + turn, -0.04)], 0.009, 1.3))
    points = [np.stack(_curve(path, 40)[:2], 1) for path, _, _ in tubes]
    pad = max(width for _, width, _ in tubes) + 0.004
    points = [np.concatenate([q - pad, q + pad]) for q in points]
    if plate:
        points.append(ellipse_points(plate[0], plate[1], plate[2] * 1.08, plate[3] * 1.08, plate[4]))
    return {"tubes": tubes, "plate": plate}, [np.concatenate(points)]


def _draw_device(c, shape):
    f32 = np.float32
    mask = False
    for path, width, peak in shape["tubes"]:
        x, y, step = _curve(path, max(60, c.n))
        line = splat(c.n, c.frame, x, y, peak * width * step, 0.36 * width)
        c.extra.append(line)
        mask = mask | (line > 0.08 * peak)
    if shape["plate"]:
        cx, cy, a, b, tilt = shape["plate"]
        dx, dy = c.x - f32(cx), c.y - f32(cy)
        ct, st = f32(math.cos(tilt)), f32(math.sin(tilt))
        across, along = (ct * dx + st * dy) * f32(1 / a), (ct * dy - st * dx) * f32(1 / b)
        r = (across**2) ** 2 + (along**2) ** 2  # rounded box
        can = ramp(1.0 - r, 0.25)
        c.extra.append(f32(2.4) * can)
        mask = mask | (can > 0.5)
    return mask


def _draw_heart(c, shape):
    return (c.heart > 0.05) & (c.above > -0.02)


def _draw_mediastinum(c, shape):
    return (c.medial < 0) & (c.y > -0.66) & (c.y < 0.1)


DRAW = {
    "effusion": _draw_effusion,
    "pneumothorax": _draw_pneumothorax,
    "thickening": _draw_thickening,
    "edema": _draw_edema,
    "upper lobe collapse": _draw_upper_collapse,
    "lower lobe collapse": _draw_lower_collapse,
    "plate atelectasis": _draw_plate,
    "rib fracture": _draw_fracture,
    "large heart": _draw_heart,
    "wide mediastinum": _draw_mediastinum,
    **dict.fromkeys(("consolidation", "pneumonia", "opacity"), _draw_blob),
    **dict.fromkeys(("nodule", "mass"), _draw_ball),
    **dict.fromkeys(DEVICES, _draw_device),
}


LEVELS = (35, 40, 25)  # mild, moderate, severe


def place(name, d, frame, severities=LEVELS):
    """Findings of one condition, placed in a frame: truth, geometry and outlines."""
    found = _place(name, d, frame, severities)
    for finding in found:
        finding.depth, finding.chronic = d.u(-0.22, 0.34), name in CHRONIC
    return found


def _place(name, d, frame, severities):
    side = d.pick(("right", "left"))
    severity = d.pick(SEVERITIES, severities)
    if name == "Cardiomegaly":
        level = SEVERITIES.index(severity)
        ratio = (0.56, 0.62, 0.68)[level] + d.u(-0.02, 0.03)
        frame.heart_ratio = max(frame.heart_ratio, ratio)
        points = np.concatenate([ellipse_points(*e) for e in frame.heart()])
        low = max(frame.p.dome_left, frame.p.dome_right) + 0.16
        points[:, 1] = np.minimum(points[:, 1], low)
        return [Finding(name, "large heart", "midline", "", severity, {"ratio": ratio}, [points])]
    if name == "Enlarged Cardiomediastinum":
        frame.widening = width = (0.07, 0.10, 0.14)[SEVERITIES.index(severity)]
        ys = np.linspace(-0.68, 0.14, 24)
        right, left = frame.medial(ys)
        points = np.concatenate([np.stack([right - 0.012, ys], 1), np.stack([left + 0.012, ys], 1)])
        return [Finding(name, "wide mediastinum", "midline", "", severity, {"width": width}, [points])]
    if name == "Pleural Other":
        zone = d.pick(("upper", "lower"))
        shape, outlines = place_thickening(d, frame, side, zone, severity)
        return [Finding(name, "thickening", side, zone, severity, shape, outlines)]
    if name == "Fracture":
        shape, outlines = place_fracture(d, frame, side, severity)
        return [Finding(name, "rib fracture", side, zone_of(frame, shape["y"]), severity, shape, outlines)]
    if name == "Lung Lesion":
        found, taken = [], []
        mass = d.chance(0.4)
        for _ in range(1 if mass else d.pick((1, 2, 3), (70, 20, 10))):
            zone, where = d.pick(ZONES), d.pick(("right", "left"))
            if (where, zone) in taken:
                continue
            taken.append((where, zone))
            radius = d.u(0.09, 0.14) if mass else d.u(0.035, 0.07)  # 1 cm = 0.053; above 3 cm across it is a mass
            size = "moderate" if mass else "mild" if radius < 0.05 else "moderate"
            size = "severe" if radius > 0.12 else size
            shape, outlines = place_ball(d, frame, where, zone, size, radius)
            found.append(Finding(name, "mass" if mass else "nodule", where, zone, size, shape, outlines))
        return found
    if name in ("Consolidation", "Pneumonia", "Lung Opacity"):
        zone = d.pick(ZONES, (25, 35, 40))
        make = {"Consolidation": place_consolidation, "Pneumonia": place_blob, "Lung Opacity": place_opacity}[name]
        shape, outlines = make(d, frame, side, zone, severity)
        return [Finding(name, name.lower().removeprefix("lung "), side, zone, severity, shape, outlines)]
    if name == "Pneumothorax":
        return [Finding(name, "pneumothorax", side, "", severity, *place_pneumothorax(d, frame, side, severity))]
    if name == "Edema":
        return [Finding(name, "edema", "bilateral", "", severity, *place_edema(d, frame, severity))]
    if name == "Pleural Effusion":
        found = [Finding(name, "effusion", side, "lower", severity, *place_effusion(d, frame, side, severity))]
        if d.chance(0.35):
            other, mild = "left" if side == "right" else "right", d.pick(SEVERITIES[: SEVERITIES.index(severity) + 1])
            found.append(Finding(name, "effusion", other, "lower", mild, *place_effusion(d, frame, other, mild)))
        return found
    if name == "Atelectasis":
        kind = d.pick(("plate atelectasis", "lower lobe collapse", "upper lobe collapse"), (55, 25, 20))
        zone = {"p": d.pick(("lower", "mid"), (75, 25)), "l": "lower", "u": "upper"}[kind[0]]
        shape, outlines = place_atelectasis(d, frame, side, zone, severity, kind)
        sign = SIGN[side]
        frame.lift[sign] = max(frame.lift[sign], shape["lift"])
        return [Finding(name, kind, side, zone, severity, shape, outlines)]
    kinds = d.shuffled(DEVICES)[: d.pick((1, 2), (75, 25))]
    found = []
    for kind in kinds:
        where = "midline" if kind in ("endotracheal tube", "nasogastric tube") else d.pick(("right", "left"))
        if kind == "pacemaker":
            where = d.pick(("left", "right"), (85, 15))
        found.append(Finding(name, kind, where, "", "", *place_device(d, frame, kind, where)))
    return found
