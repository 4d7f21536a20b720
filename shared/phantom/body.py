"""
The body of the phantom: anatomy as numbers, outlines as functions, and the film that X-rays make of them.

All geometry lives in body coordinates: the field of view is [-1, 1] x [-1, 1] (about 38 cm), x grows to the right of
the image, which is the patient's LEFT, and y grows downwards. Each pixel sums the attenuation along its ray: soft
tissue of the trunk, minus the air in the lungs, plus vessels, bones and whatever a finding adds. Then exp(-sum),
scatter, and the film's characteristic curve. Heart, mediastinum, diaphragm and findings that fill alveoli all *remove
air* from the lung, so a consolidation hides the heart border it touches (the silhouette sign) without a rule that says
so.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy.ndimage import gaussian_filter

# Random streams. Separate, so that for example a new sentence in the reports does not move a single rib.
ANATOMY, POSITION, FINDINGS, NOISE, WORDS, QUESTIONS, PATIENTS, CLASSES, CHRONIC_FINDINGS = range(9)

ANGLE = 0.25  # depth of the costophrenic angle below the top of the dome
TREES = 128  # different vessel trees and textures
EXTENT = 1.5  # lookup tables of outlines cover body coordinates -EXTENT .. EXTENT, enough for any rotation and shift


def clip(values, low, high):
    """np.clip without its bookkeeping, which on small arrays takes longer than the work."""
    return np.minimum(np.maximum(values, low), high)


class Draws:
    """Uniform random numbers of one stream, and the few things we make of them."""

    def __init__(self, seed, index, stream):
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, stream])))
        self.values = iter(())

    def u(self, low=0.0, high=1.0):
        value = next(self.values, None)
        if value is None:  # one call of NumPy per 64 numbers: a call costs more than the numbers
            self.values = iter(self.rng.random(64).tolist())
            value = next(self.values)
        return low + (high - low) * value

    def chance(self, p):
        return self.u() < p

    def pick(self, options, weights=None):
        u = self.u()
        if weights is None:
            return options[int(u * len(options))]
        u *= sum(weights)
        for option, weight in zip(options, weights, strict=True):
            u -= weight
            if u < 0:
                return option
        return options[-1]

    def integer(self, n):
        return int(self.u() * n)

    def shuffled(self, items):
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.integer(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


# ------------------------------------------------------------------------------------------------------------ anatomy


def drawn(low, high):
    """A field that is drawn uniformly between two numbers."""
    return field(metadata={"draw": lambda d, so_far: d.u(low, high)})


def drawn_by(draw):
    """A field that is draw(d, so_far): from the stream and the fields before it."""
    return field(metadata={"draw": draw})


def draw_fields(kind, d, **so_far):
    """A dataclass of such fields, in their order; so_far: what the draws of some look at besides."""
    names = [f.name for f in fields(kind)]
    for f in fields(kind):
        so_far[f.name] = f.metadata["draw"](d, so_far)
    return kind(**{name: so_far[name] for name in names})


@dataclass
class Anatomy:
    """One person: lengths in body coordinates (1 = about 19 cm), attenuations in units of the film's curve."""

    breasts: bool = drawn_by(lambda d, so_far: d.chance(0.45))
    cage: float = drawn(0.63, 0.75)  # half-width of the rib cage at its widest
    apex: float = drawn(-0.80, -0.70)  # y of the lung apices
    base: float = drawn(0.50, 0.62)  # y where the rib cage is widest
    body: float = drawn(0.09, 0.2)  # thickness of the trunk wall at the sides
    thick: float = drawn(3.7, 4.5)  # attenuation of the trunk
    shoulder: float = drawn(-0.93, -0.82)  # y of the shoulder line
    neck: float = drawn(0.20, 0.28)  # half-width of the neck
    heart: float = drawn(0.40, 0.485)  # cardiothoracic ratio
    heart_tilt: float = drawn(0.7, 1.0)  # radians; small = lying heart
    knob: float = drawn(0.02, 0.065)  # bulge of the aortic knob
    trunk: float = drawn(0.0, 0.035)  # bulge of the pulmonary trunk
    mediastinum: float = drawn(0.095, 0.125)  # half-width above the heart
    rib_first: float = drawn(-0.80, -0.74)  # y of the first posterior rib at the spine
    rib_gap: float = drawn(0.122, 0.142)  # distance of neighbouring ribs
    rib_drop: float = drawn(0.20, 0.32)  # how far posterior ribs fall towards the side
    rib_half: float = drawn(0.024, 0.031)  # half the height of a rib
    bone: float = drawn(0.75, 1.2)  # mineral content: attenuation of all bones
    vessels: float = drawn(0.75, 1.25)  # strength of the lung markings
    breast: float = drawn_by(lambda d, so_far: d.u(0.35, 0.95) if so_far["breasts"] else 0.0)  # their attenuation
    breast_x: float = drawn(0.36, 0.50)
    breast_y: float = drawn(0.06, 0.26)
    breast_r: float = drawn(0.24, 0.36)
    nipples: float = drawn_by(
        lambda d, so_far: d.u(0.2, 0.4) if d.chance(0.12) else 0.0
    )  # attenuation; they mimic nodules
    gas: float = drawn(0.0, 1.0)  # size of the gastric bubble
    scapula: float = drawn(-0.04, 0.08)  # how far the shoulder blades are rotated out of the lungs
    bend: float = drawn(-0.02, 0.02)  # side bend of the spine
    tree: int = drawn_by(lambda d, so_far: d.integer(TREES))  # which vessel tree and soft-tissue texture


def draw_anatomy(seed, patient):
    return draw_fields(Anatomy, Draws(seed, patient, ANATOMY))


@dataclass
class Position:
    """How this film was taken: patient against detector, breath, exposure."""

    breath: float = drawn(-0.05, 0.06)  # shift of both domes
    angle: float = drawn(-0.06, 0.06)  # radians
    scale: float = drawn(0.93, 1.06)
    shift_x: float = drawn(-0.05, 0.05)
    shift_y: float = drawn(-0.05, 0.07)
    turn: float = drawn(-0.03, 0.03)  # about the long axis: shifts what lies in front against the spine
    dome_right: float = drawn_by(lambda d, so_far: so_far["anatomy"].base - 0.17 + so_far["breath"])
    dome_left: float = drawn_by(lambda d, so_far: so_far["dome_right"] + d.u(0.01, 0.06))
    exposure: float = drawn(-0.35, 0.35)  # shift of the film's curve: > 0 is lighter (underexposed)
    contrast: float = drawn(0.88, 1.18)  # width of the curve: > 1 is flatter
    scatter: float = drawn(0.05, 0.18)
    noise: float = drawn(2.0, 5.0)  # quantum noise in grey levels of a mid-grey
    marker: str = drawn_by(lambda d, so_far: d.pick(["R", "L", ""], [45, 45, 10]))
    marker_x: float = drawn(0.78, 0.9)
    marker_y: float = drawn(-0.93, -0.8)


def draw_position(seed, index, anatomy):
    return draw_fields(Position, Draws(seed, index, POSITION), anatomy=anatomy)


class Frame:
    """
    Geometry of one film without pixels: outlines as functions, and the way from body to image coordinates.

    Boxes come from here, so they are the same at every image size but for the rounding to pixels.
    """

    def __init__(self, anatomy, position):
        self.a, self.p = anatomy, position
        self.cos, self.sin = math.cos(position.angle), math.sin(position.angle)
        self.heart_ratio = anatomy.heart
        self.widening = 0.0  # extra half-width of the upper mediastinum
        self.lift = {-1: 0.0, 1: 0.0}  # raised hemidiaphragm per side (atelectasis), -1 = image left

    def cage(self, y):
        """Inner half-width of the rib cage at height y (float or array)."""
        a = self.a
        t = clip((a.base - y) / (a.base - a.apex), 0.0, 1.0)
        return a.cage * (1.0 - t**2.7) ** 0.62

    def dome(self, x, lifted=True):
        """y of the diaphragm at x: the right dome stands higher, both fall to the side."""
        a, p = self.a, self.p
        s = np.abs(x)
        top = np.where(x < 0, p.dome_right - lifted * self.lift[-1], p.dome_left - lifted * self.lift[1])
        angle = np.where(x < 0, p.dome_right, p.dome_left) + ANGLE  # the costophrenic angle stays where it is
        peak = 0.30
        side = clip((s - peak) / (a.cage - peak), 0.0, 1.2)
        middle = clip((peak - s) / peak, 0.0, 1.0)
        return top + (angle - top) * side**2.5 + 0.07 * middle**2

    def medial(self, y):
        """x of the right and the left border of the mediastinum without the heart, at heights y."""
        a, p = self.a, self.p
        wide = a.mediastinum + 0.10 * clip((y + 0.1) / 0.6, 0.0, 1.0) - 0.02 * np.exp(-(((y + 0.12) / 0.1) ** 2))
        wide = wide + 0.09 * clip((-0.55 - y) / 0.25, 0.0, 1.0) ** 2
        bump = 0.0
        if self.widening:
            bump = self.widening * np.exp(-np.square(np.square((y + 0.27) / 0.27)))
        left = wide + a.knob * np.exp(-(((y + 0.36) / 0.075) ** 2)) + a.trunk * np.exp(-(((y + 0.14) / 0.07) ** 2))
        right = 0.9 * wide
        shift = p.turn * clip((y + 0.6) / 0.6, 0.0, 1.0)
        return -right - 0.8 * bump + shift, left + bump + shift

    def heart(self):
        """Two ellipses (centre x, y, semi-axes, tilt): left ventricle with most of the heart, right atrium."""
        a, p = self.a, self.p
        width = 2.0 * a.cage * self.heart_ratio
        left, right = 0.66 * width, 0.34 * width
        grown = width / (2.0 * a.cage * 0.45)
        floor = 0.5 * (p.dome_right + p.dome_left) + 0.17
        half = 0.5 * (left + 0.15)  # horizontal half-extent of the big ellipse
        tilt, ratio = a.heart_tilt, 0.72 * grown**-0.5  # a large heart is more wide than tall
        long = half / math.sqrt(math.cos(tilt) ** 2 + (ratio * math.sin(tilt)) ** 2)
        tall = math.sqrt((long * math.sin(tilt)) ** 2 + (ratio * long * math.cos(tilt)) ** 2)
        big = (left - half + p.turn, floor - tall, long, ratio * long, tilt)
        wide = 0.08 + 0.07 * grown
        atrium = (-right + wide + p.turn, floor - 0.245 - 0.02 * grown, wide, 0.20 * grown, 0.0)
        return big, atrium

    def to_image(self, x, y):
        """Body coordinates -> image coordinates in [0, 1] (of the image's width and height)."""
        p = self.p
        u = p.scale * (self.cos * x - self.sin * y) + p.shift_x
        v = p.scale * (self.sin * x + self.cos * y) + p.shift_y
        return 0.5 * (u + 1.0), 0.5 * (v + 1.0)


_CIRCLE = np.linspace(0.0, 2 * math.pi, 24, endpoint=False)
_COS, _SIN = np.cos(_CIRCLE), np.sin(_CIRCLE)
_UNIT = np.linspace(0.0, 1.0, 24)


def ellipse_points(cx, cy, a, b, tilt=0.0):
    """24 points (24, 2) on an ellipse."""
    ct, st = math.cos(tilt), math.sin(tilt)
    points = np.empty((24, 2))
    points[:, 0] = cx + a * ct * _COS - b * st * _SIN
    points[:, 1] = cy + a * st * _COS + b * ct * _SIN
    return points


def both(xs, ys, xs2, ys2):
    """Two runs of points as one array (2 n, 2)."""
    points = np.empty((len(xs) + len(xs2), 2))
    points[: len(xs), 0], points[: len(xs), 1] = xs, ys
    points[len(xs) :, 0], points[len(xs) :, 1] = xs2, ys2
    return points


def lung_outline(frame, sign):
    """
    Points around one lung in projection (without the part behind heart and diaphragm); sign -1 is the patient's right.
    """
    ys = _lung_heights(frame, sign)
    right, left = frame.medial(ys)
    wall = frame.cage(ys)
    return both(sign * wall, ys, sign * np.minimum(left if sign > 0 else -right, wall), ys)


def _lung_heights(frame, sign):
    """24 heights from the apex to the costophrenic angle."""
    top = frame.a.apex + 0.005
    low = (frame.p.dome_left if sign > 0 else frame.p.dome_right) + ANGLE
    return top + (low - top) * _UNIT


# ------------------------------------------------------------------------------------------------------------ drawing


@lru_cache(maxsize=16)
def pixel_grid(n):
    """Pixel centres of an n x n image in [-1, 1], as float32."""
    c = ((np.arange(n) + 0.5) * (2.0 / n) - 1.0).astype(np.float32)
    return np.broadcast_to(c, (n, n)), np.broadcast_to(c[:, None], (n, n))


@lru_cache(maxsize=32)
def smooth_matrix(n, nodes):
    """(n, nodes) weights that spread a coarse grid of `nodes` per side over n pixels, smoothly; rows sum to 1."""
    x = (np.arange(n) + 0.5) / n * (nodes - 1)
    w = np.exp(-0.5 * ((x[:, None] - np.arange(nodes)) / 0.62) ** 2)
    return (w / w.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=32)
def mean_matrix(n, nodes):
    """(n, nodes) weights that average n pixels into a coarse grid, smoothly; columns sum to 1."""
    m = smooth_matrix(n, nodes)
    return m / m.sum(0)


@lru_cache(maxsize=TREES)
def _texture_nodes(tree):
    """Random numbers on a coarse and a fine grid."""
    rng = np.random.Generator(np.random.PCG64(tree + 1))
    return tuple(1.5 * rng.standard_normal((nodes, nodes), dtype=np.float32) for nodes in (9, 30))


@lru_cache(maxsize=8)
def textures(tree, n):
    """(coarse, fine): two smooth random fields (n, n) with standard deviation near 1; the same picture at every n."""
    matrices = (smooth_matrix(n, 9), smooth_matrix(n, 30))
    return tuple(m @ nodes @ m.T for m, nodes in zip(matrices, _texture_nodes(tree), strict=True))


def splat(n, frame, x, y, mass, blur):
    """
    Draw points (body coordinates) of given mass (attenuation x area) on an n x n image, blurred by `blur` (body units).

    Mass is kept, so a thin catheter is as heavy at 28 px as it is at 512 px, only more spread out.
    """
    u, v = frame.to_image(x, y)
    u, v = u * n - 0.5, v * n - 0.5
    inside = (u > 0) & (v > 0) & (u < n - 1) & (v < n - 1)
    if not inside.all():
        u, v = u[inside], v[inside]
        mass = mass[inside] if np.ndim(mass) else mass
    iu, iv = u.astype(np.intp), v.astype(np.intp)
    fu, fv = u - iu, v - iv
    at = iv * n + iu
    mass = mass * (n * n / 4.0)
    index = np.concatenate([at, at + 1, at + n, at + n + 1])
    low, high = (1 - fv) * mass, fv * mass
    weight = np.concatenate([(1 - fu) * low, fu * low, (1 - fu) * high, fu * high])
    out = np.bincount(index, weight, n * n).reshape(n, n).astype(np.float32)
    sigma = blur * n / 2.0
    return gaussian_filter(out, sigma, truncate=3.0) if sigma > 0.35 else out


@lru_cache(maxsize=2 * TREES)
def _tree_points(tree, n):
    """
    Vessels of both lungs as points: (x, y, mass) of thick and of thin branches, for a patient who is not turned.

    Branching is the same at every n, but the third generation is left out of small films, where it is far below a
    pixel. There are TREES of them, since growing one takes as long as a tenth of a small film; people differ in much
    else.
    """
    rng = np.random.Generator(np.random.PCG64(tree))
    r = rng.random((2, 9, 4))  # per side and main branch
    r2 = rng.random((2, 9, 4, 3))  # four children each
    side = np.array([-1.0, 1.0])[:, None]
    fan = np.linspace(-1.45, 1.45, 9)
    x = side * (0.150 - 0.03 * (fan / 1.45) ** 2 + 0.03 * (r[..., 0] - 0.5))
    y = np.array([-0.01, -0.08])[:, None] + 0.055 * fan + 0.04 * (r[..., 1] - 0.5)  # the left hilum stands higher
    angle = fan + 0.16 * (r[..., 0] - 0.5)  # 0 = straight to the side, + = down
    length = (0.30 + 0.16 * r[..., 1]) * (1.0 + 0.12 * np.abs(fan))
    curve = 0.7 * (r[..., 2] - 0.5) + 0.25 * fan
    width = 0.036 - 0.014 * r[..., 3]

    def walk(x, y, angle, length, curve, width, t, taper):
        """Position, direction and width at fractions t (last axis) of the way along curved branches."""
        sign = side.reshape((2,) + (1,) * angle.ndim)
        x, y, angle, length, curve, width = (v[..., None] for v in (x, y, angle, length, curve, width))
        cos, sin = np.cos(angle), np.sin(angle)
        along, across = length * t, 0.5 * length * curve * t * t
        return (
            x + sign * (along * cos - across * sin),
            y + along * sin + across * cos,
            angle + curve * t,
            width * (1 - taper * t),
        )

    def points(branch, steps, taper):
        t = (np.arange(steps) + 0.5) / steps
        x, y, _, w = walk(*branch, t, taper)
        mass = w * w * (branch[3] / steps)[..., None]  # cross-section times length of the step
        return x.ravel(), y.ravel(), mass.ravel()

    main = (x, y, angle, length, curve, width)
    thick = points(main, max(8, n // 7), 0.55)
    x, y, angle, width = walk(*main, np.array([0.3, 0.5, 0.75, 1.0]) - 0.15 * r2[..., 0], 0.55)
    angle = angle + np.array([-0.55, 0.55, -0.45, 0.3]) + 0.5 * (r2[..., 1] - 0.5)
    child = (x, y, angle, 0.16 + 0.12 * r2[..., 2], 1.2 * (r2[..., 1] - 0.5), 0.72 * width)
    thin = points(child, max(4, n // 12), 0.5)
    if n > 100:
        r3 = rng.random((2, 9, 4, 3, 3))  # three grandchildren of each child
        x, y, angle, width = walk(*child, np.array([0.4, 0.7, 1.0]) - 0.1 * r3[..., 0], 0.5)
        angle = angle + np.array([-0.5, 0.5, 0.1]) + 0.5 * (r3[..., 1] - 0.5)
        length = 0.09 + 0.09 * r3[..., 2]
        more = points((x, y, angle, length, 0 * angle, 0.72 * width), max(3, n // 22), 0.5)
        thin = tuple(np.concatenate(pair) for pair in zip(thin, more, strict=True))
    return thick, thin


def ramp(d, width):
    """0 .. 1 over `width` around d = 0: a soft edge of given width."""
    return clip(d * np.float32(1.0 / width) + np.float32(0.5), 0.0, 1.0)


class Canvas:
    """The arrays of one rendering, n x n float32, that organs and findings draw on."""

    def __init__(self, frame, n):
        self.frame, self.n = frame, n
        self.edge = max(0.012, 2.0 / n)  # edges are never sharper than a pixel
        gx, gy = pixel_grid(n)
        p = frame.p
        c, s, k = np.float32(frame.cos / p.scale), np.float32(frame.sin / p.scale), np.float32
        self.x = c * (gx - k(p.shift_x)) + s * (gy - k(p.shift_y))
        self.y = c * (gy - k(p.shift_y)) - s * (gx - k(p.shift_x))
        self.cells = 6 * n
        scale = np.float32(self.cells / (2 * EXTENT))
        self.ix = ((self.x + np.float32(EXTENT)) * scale).astype(np.intp)
        self.iy = ((self.y + np.float32(EXTENT)) * scale).astype(np.intp)
        self.line = (np.arange(self.cells) + 0.5) / float(scale) - EXTENT
        self.extra = []  # attenuation maps of findings, added at the end
        self.air = None  # product of (1 - filled fraction) over findings

    def along_y(self, values):
        return values.astype(np.float32).take(self.iy, mode="clip")  # clip: no bounds check, half the time

    def along_x(self, values):
        return values.astype(np.float32).take(self.ix, mode="clip")

    def fill(self, fraction):
        self.air = 1.0 - fraction if self.air is None else self.air * (1.0 - fraction)


def ellipse(c, cx, cy, a, b, tilt=0.0):
    """1 - r^2 of an ellipse: positive inside, 1 at the centre. (a along the tilted axis, b across; all body units)"""
    dx, dy = c.x - np.float32(cx), c.y - np.float32(cy)
    if tilt:
        ct, st = np.float32(math.cos(tilt)), np.float32(math.sin(tilt))
        dx, dy = ct * dx + st * dy, ct * dy - st * dx
    return 1.0 - (dx * np.float32(1.0 / a)) ** 2 - (dy * np.float32(1.0 / b)) ** 2


def render(frame, findings, n, want_masks=False):
    """
    Film of one frame with the given findings: grey values (n, n) float32 in 0 .. 255 without noise, masks, canvas.

    Longer than functions should be: from top to bottom as the ray goes, it shares a dozen arrays that would otherwise
    be handed around. The same holds for _bones and for the lateral film.
    """
    a, p = frame.a, frame.p
    c = Canvas(frame, n)
    x, y, f32 = c.x, c.y, np.float32
    coarse, fine = textures(a.tree, n)
    edge = c.edge

    # -- trunk, neck, shoulders
    line = c.line
    wall = a.cage * (1.0 - 0.12 * clip(-line, 0.0, 1.0)) + a.body
    arms = clip((0.16 - line) / 0.5, 0.0, 1.0)
    outer = wall + (1.5 - wall) * arms * arms * (3 - 2 * arms)
    side = np.abs(x) / c.along_y(outer)
    side *= side
    trunk = np.sqrt(np.maximum(1.0 - side * side * side, 0.0))
    # The shoulder line falls from the neck, steeply at first (trapezius), then flat over the joint, then down the arm.
    away = np.maximum(np.abs(line) - a.neck, 0.0)
    shoulder = a.shoulder + 0.16 * away + 0.9 * np.maximum(away - 0.55, 0.0) ** 1.5 - 0.5 * np.exp(-away / 0.06)
    depth = np.minimum(np.maximum(y - c.along_x(shoulder), 0.0) * f32(1 / 0.45), 1.0)
    level = a.thick * (0.66 + 0.34 * clip((line + 0.9) / 0.7, 0, 1) + 0.12 * clip((line - 0.3) / 0.4, 0, 1))
    trunk *= np.sqrt(depth) * c.along_y(level)
    neck = 0.62 * a.thick * np.sqrt(np.maximum(1.0 - (line * (0.92 / a.neck)) ** 2, 0.0))
    trunk = np.maximum(trunk, c.along_x(neck) * (y < f32(a.apex + 0.3)))

    # -- lungs: how much attenuation their air takes away
    cage = frame.cage(line)
    cage_map = c.along_y(np.maximum(cage, 1e-3))
    u = x / cage_map
    u2 = u * u
    depth_of_lung = a.thick * 0.62 * clip((line - a.apex + 0.02) / 0.45, 0.0, 1.0) ** 0.5
    lung = np.sqrt(np.maximum(1.0 - u2 * u2, 0.0)) * c.along_y(depth_of_lung)
    scatter_source = trunk - 0.75 * lung  # free of findings: see the scatter below
    right, left = frame.medial(line)
    medial = np.maximum(x - c.along_y(left), c.along_y(right) - x)
    outside_medial = ramp(medial, 1.6 * edge)
    dome_map = c.along_x(frame.dome(line))
    above = dome_map - y
    above_dome = ramp(above, edge)
    behind_dome = clip(1.0 + above * f32(1 / 0.16), 0.0, 1.0) * f32(0.22)  # the recess behind the dome
    big, atrium = frame.heart()
    q = np.maximum(ellipse(c, *big), 0.0) + np.maximum(ellipse(c, *atrium), 0.0)
    heart = np.minimum(f32(1.25) * np.sqrt(q), 1.0)
    lung *= outside_medial * np.maximum(above_dome, behind_dome) * (1.0 - f32(0.92) * heart)
    aerated = lung > 0.02 * a.thick

    # -- lung markings
    (x1, y1, m1), (x2, y2, m2) = _tree_points(a.tree, n)
    if n > 100:
        vessels = splat(n, frame, x1 + p.turn, y1, m1, 0.008) + splat(n, frame, x2 + p.turn, y2, m2, 0.004)
    else:  # blurring thick and thin differently would be lost in the pixels
        xy = np.concatenate([x1, x2]) + p.turn, np.concatenate([y1, y2])
        vessels = splat(n, frame, *xy, np.concatenate([m1, m2]), 0.006)

    # -- findings write into the canvas
    c.vessels = vessels
    c.lung, c.u, c.above, c.coarse, c.fine = lung, u, above, coarse, fine
    c.heart, c.medial, c.aerated = heart, medial, aerated
    c.rib_shift = None
    c.vessel_gain = a.vessels
    c.hide_vessels = None
    masks = {}
    for finding in findings:
        drawn = finding.draw(c)
        if want_masks:
            masks[finding.name] = drawn
    if c.air is not None:
        lung = lung * c.air

    vessels *= f32(9.0 * c.vessel_gain)
    markings = np.minimum(lung * f32(1 / (0.5 * a.thick)), 1.0)
    if c.hide_vessels is not None:
        vessels *= c.hide_vessels
    film = trunk - lung * (1.0 + f32(0.035) * fine) + vessels * markings + f32(0.09) * coarse * (trunk > 0.3)

    # -- descending aorta beside the spine, and bones
    aorta = c.along_y(0.22 * clip((line + 0.36) / 0.05, 0, 1))
    film += aorta * c.along_x(ramp(0.045 - np.abs(line - 0.065), 2 * edge))
    film += f32(a.bone) * _bones(c, cage_map) * np.minimum(trunk, 1.0)

    # -- airways, belly, breasts
    windpipe = np.maximum(1.0 - ((line - (0.5 * p.turn + 0.004)) / 0.042) ** 2, 0.0)
    film -= c.along_x(windpipe) * c.along_y(clip((-0.24 - line) / 0.04, 0, 1))
    if n > 100:
        t = (y + f32(0.26)) * f32(1 / 0.16)  # main bronchi; the left one lies flatter
        out = x - f32(p.turn)
        off = (np.abs(out) - np.where(out > 0, f32(0.184), f32(0.136)) * t) * f32(1 / 0.026)
        film -= f32(0.35) * np.maximum(1.0 - off * off, 0.0) * ((t > 0) & (t < 1))
    if a.gas > 0.25:
        gas_y = p.dome_left + 0.06 + 0.09 * a.gas
        bubble = clip(ellipse(c, 0.30, gas_y, 0.07 + 0.11 * a.gas, 0.04 + 0.07 * a.gas, 0.25), 0.0, 1.0)
        film -= f32(1.3) * np.sqrt(bubble) * (1 - above_dome)
    if a.breast or a.nipples:
        ax = np.abs(x)
        if a.breast:
            q = 1.0 - np.square((ax - f32(a.breast_x)) * f32(0.9 / a.breast_r))
            q -= np.square((y - f32(a.breast_y)) * f32(1 / a.breast_r))
            lower = clip((y - f32(a.breast_y - a.breast_r)) * f32(0.8 / a.breast_r), 0.0, 1.0)
            film += f32(a.breast) * np.sqrt(np.maximum(q, 0.0)) * lower
        if a.nipples:
            q = 1.0 - np.square((ax - f32(a.breast_x + 0.06)) * f32(1 / 0.022))
            q -= np.square((y - f32(a.breast_y + 0.12)) * f32(1 / 0.020))
            film += f32(a.nipples) * np.sqrt(np.maximum(q, 0.0))
    for extra in c.extra:
        film += extra

    # -- photons, scatter, film. Scatter is taken from the trunk and its healthy lungs, not from the findings: a finding
    # then changes the film where it lies and nowhere else, which the tests on counterfactual images rely on.
    photons = np.exp(-film)
    step = max(1, n // 28)
    low = scatter_source[step // 2 :: step, step // 2 :: step]
    mean = mean_matrix(low.shape[0], 8)
    spread = mean.T @ np.exp(-np.maximum(low, 0.8)) @ mean
    m = smooth_matrix(n, 8)
    photons += f32(p.scatter) * (m @ spread @ m.T)
    density = -np.log(photons)
    grey = characteristic(density, a, p)
    if p.marker:
        _draw_marker(grey, frame, n)
    return grey, masks, c


def characteristic(density, a, p):
    """Film curve: attenuation -> grey. A logistic curve, like the S of a film's density over log exposure."""
    middle = 0.57 * a.thick - p.exposure
    t = (density - np.float32(middle)) * np.float32(1.0 / (0.92 * p.contrast))
    return np.float32(268.0) / (1.0 + np.exp(-t)) - np.float32(14.0)


def tube_path(d, half):
    """Path through a hollow bone at distance d from its axis (in units of `half`): bright rims, greyer marrow."""
    q = 1.0 - (d * np.float32(1.0 / half)) ** 2
    shell = np.sqrt(clip(q, 0.0, 1.0))
    return shell - np.float32(0.55) * np.sqrt(clip(q - np.float32(0.42), 0.0, 1.0))


@lru_cache(maxsize=16)
def _spine_tables(cells):
    """Along y: bodies with dense end plates, their waist, pedicles, spinous processes. Vertebrae stand 0.118 apart."""
    line = (np.arange(cells) + 0.5) * (2 * EXTENT / cells) - EXTENT

    def from_nearest(shift):
        phase = (line - 0.03) / 0.118 + shift
        return np.abs(phase - np.rint(phase))  # 0 = middle of a vertebra, 0.5 = disc

    within = from_nearest(0.0)
    body = 0.34 - 0.22 * clip((within - 0.40) / 0.05, 0, 1) + 0.22 * np.exp(-(((within - 0.36) / 0.045) ** 2))
    waist = -0.008 * np.cos(2 * math.pi * within)
    pedicles = 0.3 * np.exp(-((from_nearest(0.1) / 0.13) ** 2))
    processes = 0.35 * np.exp(-((from_nearest(-0.3) / 0.14) ** 2))
    return body, waist, pedicles, processes


def _bones(c, cage_map):
    a, p, x, y, line = c.frame.a, c.frame.p, c.x, c.y, c.line
    detail = c.n > 100  # below that, what follows is smaller than a pixel
    f32 = np.float32
    # Ribs. Every rib is an arc y = first + k * gap + drop * (1 - sqrt(1 - u^2)) with u the distance from the spine as
    # a part of the cage, so one array holds "which rib" as a number and all ribs are drawn at once. The front ends
    # come back below: the other arm of the same C.
    cage_out = cage_map + f32(0.015)
    ur = np.abs(x) / cage_out
    root = np.sqrt(clip(1.0 - ur * ur, 0.0, 1.0))
    slope = ur / ((root + f32(0.08)) * cage_out)
    tangent = 1.0 / (root + f32(0.45))  # the ray runs along the rib at the side of the chest
    inside = ur < 1.0
    base = y - f32(a.rib_first)
    rear = (base - f32(a.rib_drop) * (1.0 - root)) * f32(1 / a.rib_gap)
    if c.rib_shift is not None:
        rear += c.rib_shift
    k = np.rint(rear)
    d = (rear - k) * f32(a.rib_gap) / np.sqrt(1.0 + (f32(a.rib_drop) * slope) ** 2)
    bones = f32(0.52) * tube_path(d, a.rib_half) * tangent * (inside & (k >= 0) & (k < 11) & (ur > 0.09))
    front_drop = 2.6 * a.rib_gap
    front = (base - f32(a.rib_drop) - f32(front_drop) * root) * f32(1 / a.rib_gap)
    k = np.rint(front)
    d = (front - k) * f32(a.rib_gap) / np.sqrt(1.0 + (f32(front_drop) * slope) ** 2)
    fade = clip((ur - 0.38) * f32(1 / 0.12), 0.0, 1.0)  # cartilage towards the sternum does not show
    bones += f32(0.27) * tube_path(d, 1.15 * a.rib_half) * tangent * fade * (inside & (k >= 0) & (k < 7))
    if c.rib_shift is not None and c.rib_gap_map is not None:
        bones *= c.rib_gap_map

    # Spine: vertebral bodies with denser end plates, pedicles, spinous processes.
    xs = x - c.along_y(a.bend * np.sin(2.2 * line))
    body, waist, pedicles, processes = _spine_tables(c.cells)
    half = c.along_y(0.068 + 0.02 * clip((line + 0.5) / 1.4, 0, 1) + waist)
    across = np.abs(xs) / half
    column = c.along_y(body) * clip((1.0 - across) * f32(5.0), 0.0, 1.0)
    if detail:
        column += c.along_y(pedicles) * np.exp(-np.square((across - f32(0.58)) * f32(1 / 0.17)))
        column += c.along_y(processes) * np.exp(-np.square(across * f32(1 / 0.16)))
    bones += column

    # Collar bones: S-shaped, thick at both ends.
    s = np.abs(line)
    along = clip((s - 0.05) / 0.72, 0.0, 1.0)
    clavicle = -0.555 - 0.20 * along + 0.05 * np.sin(2 * math.pi * along) + 0.25 * p.turn * np.sign(line)
    steep = np.empty_like(clavicle)
    steep[1:-1] = (clavicle[2:] - clavicle[:-2]) / (line[2] - line[0])
    steep[0] = steep[-1] = 0.0
    half = 0.026 + 0.016 * np.exp(-((along / 0.13) ** 2)) + 0.006 * along
    d = (y - c.along_x(clavicle)) * c.along_x(1.0 / (half * np.sqrt(1.0 + steep**2)))
    ends = (s > 0.055 - p.turn * np.sign(line)) & (s < 0.80)
    bones += f32(0.62) * tube_path(d, 1.0) * c.along_x(ends.astype(np.float32))

    # Shoulder blades, rotated out of the lungs when the film is a good one, and heads of the humerus.
    ax = np.abs(x)
    xo = ax - f32(a.scapula)
    inner = xo - (f32(0.56) + f32(0.16) * clip(y * f32(2.0) + f32(1.0), -0.4, 1.0))
    blade = np.minimum(inner, f32(0.10 - 0.14) - y + f32(0.2) * xo)
    blade = np.minimum(blade, y + f32(0.62 + 0.132) - f32(0.22) * xo)
    blade = np.minimum(blade, f32(0.95) - xo)
    bones += f32(0.12) * clip(blade * f32(1 / 0.02), 0.0, 1.0)
    if detail:
        bones += f32(0.14) * np.exp(-np.square((blade - f32(0.012)) * f32(1 / 0.014)))
    away = xo - f32(0.93)
    head = f32(1.0) - np.square(away * f32(1 / 0.105)) - np.square((y + f32(0.58)) * f32(1 / 0.11))
    bones += f32(0.75) * np.sqrt(clip(head, 0.0, 0.8))
    shaft = np.minimum(f32(0.055) - np.abs(away - f32(0.04) - f32(0.08) * (y + f32(0.5))), y + f32(0.55))
    bones += f32(0.5) * clip(shaft * f32(1 / 0.03), 0.0, 1.0)
    return bones


# Strokes of marker letters in a unit square: corners, one after the other, and the leg of the R.
_LETTERS = {"R": [(0, 1), (0, 0), (0.6, 0), (0.75, 0.25), (0.6, 0.5), (0, 0.5)], "L": [(0, 0), (0, 1), (0.7, 1)]}
_LETTERS = {letter: [(*a, *b) for a, b in pairwise(corners)] for letter, corners in _LETTERS.items()}
_LETTERS["R"].append((0.3, 0.5, 0.8, 1))


@lru_cache(maxsize=8)
def _letter(marker, n):
    """Points of a marker letter, in pixels of an n x n image, from its upper left corner."""
    height = 0.085 * 0.5 * n
    t = np.linspace(0.0, 1.0, max(6, n // 16))
    x = np.concatenate([x0 + (x1 - x0) * t for x0, _, x1, _ in _LETTERS[marker]])
    y = np.concatenate([y0 + (y1 - y0) * t for _, y0, _, y1 in _LETTERS[marker]])
    return (x - 0.4) * height, y * height


def _draw_marker(grey, frame, n):
    """
    A lead letter: R on the patient's right (image left), L on the left. Straight on the detector, not on the body.
    """
    p = frame.p
    side = -1.0 if p.marker == "R" else 1.0
    x, y = _letter(p.marker, n)
    u = x + ((side * p.marker_x + 1.0) * 0.5 * n - 0.5)
    v = y + ((p.marker_y + 1.0) * 0.5 * n - 0.5)
    iu, iv = clip(np.rint(u).astype(int), 0, n - 1), clip(np.rint(v).astype(int), 0, n - 1)
    if n < 112:
        grey[iv, iu] = np.maximum(grey[iv, iu], np.float32(225.0))
        return
    ink = np.zeros_like(grey)
    ink[iv, iu] = 1.0
    ink = np.minimum(gaussian_filter(ink, n / 320.0) * (n / 130.0), 1.0)
    grey += (np.maximum(grey, 225.0) - grey) * ink


def organ_outlines(frame):
    """Organ -> points in body coordinates."""
    a = frame.a
    big, atrium = frame.heart()
    ys = np.concatenate([_lung_heights(frame, -1), _lung_heights(frame, 1), a.apex * (1.0 - _UNIT)])
    right, left = frame.medial(ys)
    wall = frame.cage(ys)
    r, s, m = slice(0, 24), slice(24, 48), slice(48, 72)  # right lung, left lung, mediastinum
    xs = a.cage * (2.0 * _UNIT - 1.0)
    dome = frame.dome(xs)
    long = -1.0 + 1.95 * _UNIT
    bend = a.bend * np.sin(2.2 * long)
    return {
        "right lung": both(-wall[r], ys[r], np.maximum(right[r], -wall[r]), ys[r]),
        "left lung": both(wall[s], ys[s], np.minimum(left[s], wall[s]), ys[s]),
        "heart": np.concatenate([ellipse_points(*big), ellipse_points(*atrium)]),
        "mediastinum": both(right[m], ys[m], left[m], ys[m]),
        "diaphragm": both(xs, dome, xs, dome + 0.05),
        "spine": both(bend - 0.085, long, bend + 0.085, long),
    }


def organ_masks(c, size):
    """Organ -> bool (size, size), from a Canvas. Lungs end at the border of heart and mediastinum."""
    a = c.frame.a
    xs = c.x - c.along_y(a.bend * np.sin(2.2 * c.line))
    below_apex = c.y > a.apex
    beside = c.medial > 0
    big_heart = c.heart > 0.05
    lungs = (c.u * c.u < 1.0) & (c.above > 0) & beside & ~big_heart & below_apex
    names = ("right lung", "left lung", "heart", "mediastinum", "diaphragm", "spine")
    masks = (
        lungs & (c.x < 0),
        lungs & (c.x > 0),
        big_heart,
        ~beside & below_apex & (c.y < 0.0),
        (c.above <= 0) & (c.above > -0.05) & (np.abs(c.x) < a.cage),
        (np.abs(xs) < 0.085) & (c.y > -1.0) & (c.y < 0.95),
    )
    found = dict(zip(names, _shrink(masks, size, 2), strict=True))
    if supersampling(size) > 1:  # a pixel that is half lung, half heart would otherwise be both
        taken = found["heart"] | found["mediastinum"]
        for name in names[:2]:
            found[name] = found[name] & ~taken
    return found


def _shrink(masks, size, enough):
    """Masks drawn at twice the size -> (size, size): true where at least `enough` of the four pixels are."""
    if supersampling(size) == 1:
        return masks
    m = np.array(masks).view(np.uint8)
    return (m[:, ::2, ::2] + m[:, 1::2, ::2] + m[:, ::2, 1::2] + m[:, 1::2, 1::2]) >= enough


def organ_boxes(frame, size):
    """Organ -> pixel box, all at once."""
    outlines = organ_outlines(frame)
    points = np.array(list(outlines.values()))  # (6, 48, 2)
    u, v = frame.to_image(points[..., 0], points[..., 1])
    low = np.stack([u.min(1), v.min(1)], 1).tolist()
    high = np.stack([u.max(1), v.max(1)], 1).tolist()
    return {name: _pixel_box(*lo, *hi, size) for name, lo, hi in zip(outlines, low, high, strict=True)}


def _pixel_box(u0, v0, u1, v1, size):
    # Rounded before floor and ceil: a last-bit difference between platforms must not move a box by a pixel.
    x0, y0 = (min(max(math.floor(round(w * size, 6)), 0), size - 1) for w in (u0, v0))
    x1, y1 = (min(max(math.ceil(round(w * size, 6)), 1), size) for w in (u1, v1))
    return [x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)]


def box_of(frame, points, size):
    """Points in body coordinates -> pixel box [x0, y0, x1, y1] (x1, y1 exclusive), inside the image."""
    u, v = frame.to_image(points[:, 0], points[:, 1])
    return _pixel_box(float(u.min()), float(v.min()), float(u.max()), float(v.max()), size)


def supersampling(size):
    """Small films are drawn at twice their size and averaged, so that a rib is not lost between two pixels."""
    return 2 if size <= 80 else 1


def develop(frame, findings, size, seed, index, want_masks=False):
    """Render at `size`: film uint8 (size, size), masks of findings and of organs as dicts of bool (size, size)."""
    k = supersampling(size)
    grey, masks, canvas = render(frame, findings, size * k, want_masks=want_masks)
    if k > 1 and masks:  # one of four pixels is enough: a catheter is thinner than a pixel
        masks = dict(zip(masks, _shrink(tuple(masks.values()), size, 1), strict=True))
    organs = organ_masks(canvas, size) if want_masks else {}
    return expose(grey, size, frame, [seed, index, NOISE]), masks, organs


def expose(grey, size, frame, stream):
    """Grey values, drawn at `size` or twice that -> the film with its noise, uint8 (size, size)."""
    if len(grey) > size:
        grey = np.float32(0.25) * (grey[::2, ::2] + grey[1::2, ::2] + grey[::2, 1::2] + grey[1::2, 1::2])
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(stream)))
    tone = np.float32(0.45) + grey * np.float32(0.9 / 255)  # fewer photons get through bright parts: more noise there
    grey += rng.standard_normal((size, size), dtype=np.float32) * tone * np.float32(frame.p.noise)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)
