"""
Edits that take a region out of an image, and random regions to compare with: does an answer depend on the place it
should?

    plan = plan_regions(image, boxes, k=5, seed=0)  # boxes: [[x0, y0, x1, y1], ...] in pixels: the region of interest
    if not plan.why:                                # else why there is no fair comparison
        without = fill_region(image, plan.roi, "inpaint")
        others = [fill_region(image, boxes, "inpaint") for boxes in plan.random]

Taking anything out of a picture can change an answer, so a change means nothing alone: it is compared with what the
same edit does in random regions of the same size and about the same share of foreground, elsewhere. Every fill is odd
in its own way (a flat patch is like no film), so there are several, and an effect counts only when they agree.

    inpaint   harmonic: each channel solves Laplace's equation with the pixels around the region as its edge
    mean      the mean of a ring around each box
    blur      Gaussian, half of the box's shorter side: what is large and bright stays as a cloud
    noise     pixels drawn from the ring: its brightness and spread, no shape

Images are uint8 (H, W) or (H, W, 3). All choices come from the seed.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy.sparse import coo_array
from scipy.sparse.linalg import cg

FILLS = ("inpaint", "mean", "blur", "noise")
SMALLEST, LARGEST = 0.005, 0.5  # share of the image: below, hardly anything goes; above, random regions have no room
OVERLAP = 0.1  # a random region covers the region of interest by at most this IoU
FOREGROUND = 0.15  # their shares of foreground differ by at most this
BACKGROUND = 10  # grey value: air outside the body and the black frame of CT and MR images are not brighter
TRIES = 1000
COARSE = 4000  # pixels of a region; more are solved on every second one first
TOLERANCE = 3e-5  # of the conjugate gradients, of the norm of the right side
RASTER = 256  # pixels: places are compared on a grid no finer than this


@dataclass
class Plan:
    """
    roi: whole-pixel boxes; random: k regions, each a list of boxes (empty when infeasible); why: "" or the reason;
    shares of the image.
    """

    roi: list
    random: list
    why: str
    area: float = 0.0
    foreground: float = 0.0


# ------------------------------------------------------------------------------------------------------------- regions


def whole_boxes(boxes, height, width):
    """
    Pixel boxes of any numbers -> whole pixels inside the image, [x0, y0, x1, y1] with x1, y1 one past the last; empty
    ones go.
    """
    whole = []
    for x0, y0, x1, y1 in boxes or ():
        left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
        right, bottom = min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))
        if right > left and bottom > top:
            whole.append([left, top, right, bottom])
    return whole


def region_mask(boxes, height, width):
    """-> bool (height, width), true inside any of the whole-pixel boxes."""
    mask = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def nearest(boxes):
    return [[round(v) for v in box] for box in boxes or ()]


def region_iou(boxes, others, height, width):
    """
    Intersection over union of two regions in pixels, each the union of its boxes; 0 when either is empty. Edges count
    to the nearest pixel: 28.99, of a box written in thousandths, is the gold 29, and rounded outwards it would cover a
    pixel more.
    """
    a, b = (region_mask(whole_boxes(nearest(some), height, width), height, width) for some in (boxes, others))
    union = (a | b).sum()
    return float((a & b).sum() / union) if a.any() and b.any() else 0.0


def foreground_of(image):
    """-> bool (H, W): not background."""
    return (image if image.ndim == 2 else image.max(2)) > BACKGROUND


def plan_regions(image, boxes, k=5, seed=0):
    """
    The region of interest and k random ones of the same shape elsewhere: overlap, foreground and area within the limits
    above, and not twice the same. Boxes that overlap each other move together, others each on their own. -> Plan;
    with fewer than k found in 1,000 tries it is infeasible: a baseline of what happened to fit would be no fair one.
    """
    height, width = image.shape[:2]
    roi = whole_boxes(boxes, height, width)
    if not roi:
        return Plan([], [], "no region")
    step = -(-max(height, width) // RASTER)
    foreground = foreground_of(image)[::step, ::step]
    shape = foreground.shape

    def raster(some):
        return region_mask([[-(-v // step) for v in box] for box in some], *shape)

    wanted = raster(roi)
    area = float(wanted.mean())
    if area < SMALLEST or area > LARGEST:
        return Plan(roi, [], "region too small" if area < SMALLEST else "region too large", area)
    share = float(foreground[wanted].mean())
    clusters = clusters_of(roi)
    rng = np.random.default_rng(seed)
    chosen, masks = [], []
    for _ in range(TRIES):
        moved = []
        for cluster in clusters:
            x0, y0 = min(b[0] for b in cluster), min(b[1] for b in cluster)
            x1, y1 = max(b[2] for b in cluster), max(b[3] for b in cluster)
            dx, dy = int(rng.integers(width - (x1 - x0) + 1)) - x0, int(rng.integers(height - (y1 - y0) + 1)) - y0
            moved += [[b[0] + dx, b[1] + dy, b[2] + dx, b[3] + dy] for b in cluster]
        mask = raster(moved)
        if abs(mask.mean() - area) > 0.1 * area or abs(foreground[mask].mean() - share) > FOREGROUND:
            continue
        if iou(mask, wanted) > OVERLAP or any(iou(mask, other) > 0.5 for other in masks):
            continue
        chosen.append(moved)
        masks.append(mask)
        if len(chosen) == k:
            return Plan(roi, chosen, "", area, share)
    return Plan(roi, [], "infeasible", area, share)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def clusters_of(boxes):
    """Boxes -> lists of boxes that overlap or touch, directly or through others."""

    def touch(a, b):
        return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]

    clusters = []
    for box in boxes:
        near = [c for c in clusters if any(touch(box, b) for b in c)]
        clusters = [c for c in clusters if c not in near] + [[box, *(b for c in near for b in c)]]
    return clusters


# --------------------------------------------------------------------------------------------------------------- fills


def fill_region(image, boxes, fill, seed=0):
    """
    The image with a region (whole-pixel boxes) filled by one of FILLS -> a new uint8 array; all other pixels stay.
    """
    if fill not in FILLS:
        raise ValueError(f"there is no fill {fill!r}; there are {', '.join(FILLS)}")
    mask = region_mask(boxes, *image.shape[:2])
    if mask.all() or not mask.any():
        raise ValueError("a region to fill must cover a part of the image, not all and not nothing")
    result = image.astype(np.float64)
    rng = np.random.default_rng(seed)
    if fill == "inpaint":
        result[mask] = harmonic(result, mask)
    for x0, y0, x1, y1 in boxes if fill != "inpaint" else ():
        if fill == "blur":
            result[y0:y1, x0:x1] = blurred(image, x0, y0, x1, y1)
            continue
        ring = ring_pixels(image, mask, x0, y0, x1, y1)
        result[y0:y1, x0:x1] = (
            ring.mean(0) if fill == "mean" else ring[rng.integers(len(ring), size=(y1 - y0, x1 - x0))]
        )
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def ring_pixels(image, mask, x0, y0, x1, y1):
    """
    Pixels around a box and outside the region -> (n,) or (n, 3). The ring is a fifth of the box wide, and wider if it
    is all region.
    """
    height, width = mask.shape
    margin = max(2, (min(x1 - x0, y1 - y0) + 4) // 5)
    while True:
        part = slice(max(0, y0 - margin), y1 + margin), slice(max(0, x0 - margin), x1 + margin)
        outside = ~mask[part]
        if outside.any():
            return image[part][outside]
        margin *= 2


def blurred(image, x0, y0, x1, y1):
    """
    The box of the blurred image, computed from its surroundings only. Pillow's blur takes the same time for any radius.
    """
    sigma = max(2.0, min(x1 - x0, y1 - y0) / 2)
    reach = int(np.ceil(2.5 * sigma))
    top, left = max(0, y0 - reach), max(0, x0 - reach)
    part = Image.fromarray(np.ascontiguousarray(image[top : y1 + reach, left : x1 + reach]))
    smooth = np.asarray(part.filter(ImageFilter.GaussianBlur(sigma)))
    return smooth[y0 - top : y1 - top, x0 - left : x1 - left]


def harmonic(image, mask):
    """
    Values (n,) or (n, 3) of the masked pixels of a float image (H, W) or (H, W, 3) for which each is the mean of its
    neighbours; neighbours beyond the edge of the image do not count. Conjugate gradients, to less than half a grey
    value; a large region is solved on every second pixel first, where they start from.
    """
    rows, columns = np.nonzero(mask)
    number = np.full(mask.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    channels = image[..., None] if image.ndim == 2 else image
    neighbours = np.zeros(len(rows))
    edge = np.zeros((len(rows), channels.shape[2]))  # sum of the known neighbours
    known = np.zeros(len(rows))
    pairs = []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        y, x = rows + down, columns + right
        inside = np.flatnonzero((y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1]))
        neighbours[inside] += 1
        other = number[y[inside], x[inside]]
        outer = inside[other < 0]
        known[outer] += 1
        edge[outer] += channels[y[outer], x[outer]]
        pairs.append((inside[other >= 0], other[other >= 0]))
    here = np.arange(len(rows))
    i, j = np.concatenate([here, *(p[0] for p in pairs)]), np.concatenate([here, *(p[1] for p in pairs)])
    matrix = coo_array((np.concatenate([neighbours, -np.ones(len(i) - len(rows))]), (i, j))).tocsr()
    start = np.tile(edge.sum(0) / known.sum(), (len(rows), 1))
    if len(rows) > COARSE and mask[::2, ::2].any() and not mask[::2, ::2].all():
        coarse = channels[::2, ::2].copy()
        coarse[mask[::2, ::2]] = harmonic(coarse, mask[::2, ::2])
        start = coarse[rows // 2, columns // 2]  # known pixels of the coarse image serve at the rim
    solved = [cg(matrix, e, x0=s, rtol=TOLERANCE, maxiter=20_000)[0] for e, s in zip(edge.T, start.T, strict=True)]
    return solved[0] if image.ndim == 2 else np.stack(solved, axis=1)


# -------------------------------------------------------------------------------------------- edits that change nothing


def identity_edits(image):
    """
    {"jpeg": saved as JPEG of quality 95 and read again, "shift": moved right by one pixel}. An answer that changes here
    changes by itself: no flip rate below this floor means anything.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    with Image.open(buffer) as picture:
        jpeg = np.array(picture)
    return {"jpeg": jpeg, "shift": np.concatenate([image[:, :1], image[:, :-1]], axis=1)}


def blank(image):
    """A grey picture of the same size: what is answered from the question alone, in the presence of an image."""
    return np.full_like(image, 128)
