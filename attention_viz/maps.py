"""
Where a vision-language model looks when it answers a question about an image: one function for every kind of map.

    vlm = load_vlm("google/medgemma-4b-it", device="cuda")
    case = ask(vlm, read_pixels("film.png"), "Is there a pleural effusion?")     # case.answer, case.margin
    found = attention_map(case, "gradient_weighted")                             # found.values, found.status
    Image.fromarray(overlay(case.image, found)).save("map.png")

What a map says depends on its method (METHODS); none says by itself why the model answered. A map is the token grid of
the image (Gemma 3: 16 x 16; LLaVA: 24 x 24 of its square; Qwen: as many cells as the image is large), not below 0, with
the sum 1; `view` is what of the image the grid covers. Whatever fails has a status in place of a map, never a uniform
or made-up one.

A query is a row of the attention: "last", the token that predicts the answer; "finding", the tokens of the words that
name what is asked about; "answer", the rows that predict what the model writes (row p - 1 for token p).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import re
from dataclasses import dataclass, field

import shared  # noqa: F401, isort: skip  # before transformers
import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from shared.models.capture import AttentionCapture, WholeAttention
from shared.models.inputs import Images, preprocess_images
from shared.models.loading import VLM
from shared.models.passes import Prompt, answer_sides, features_of, in_parts, logprobs, make_prompts, margin
from shared.models.passes import padded, sample, text_of
from shared.runtime import InputError

METHODS = {
    "mean": "attention, mean of all layers and heads",
    "max": "attention, the largest of all layers and heads",
    "last_quarter": "attention, mean of the last quarter of the layers",
    "heads": "attention, mean of the heads chosen on calibration patients (choose_heads)",
    "relative": "attention, mean, divided by that of a neutral question (arXiv 2502.17422)",
    "rollout": "attention of all layers multiplied, the residual stream as half (arXiv 2005.00928)",
    "gradient_weighted": "attention times its gradient where positive, through all layers (arXiv 2103.15679)",
    "input_gradient": "gradient by the pixels times the pixels",
    "integrated_gradients": "the same along the way from a grey picture (arXiv 1703.01365)",
    "grad_cam": "Grad-CAM on what the vision tower hands over (arXiv 1610.02391)",
    "occlusion": "how far the answer falls when a part of the image is grey",
    "own_box": "the box that the model itself writes, where it writes one",
}
PAIR = ["google/medgemma-4b-it", "microsoft/llava-med-v1.5-mistral-7b"]  # what is compared unless models are named
TINY_PAIR = ["tiny:gemma3", "tiny:llava"]  # "tiny"
OF_ROWS = ("mean", "max", "last_quarter", "heads", "relative")  # read off one pass that runs as always
NEUTRAL = "Describe this image."
BOX_REQUEST = "{} Give the box [x0, y0, x1, y1] of the place that settles it, from 0 to 1000."
SIDE = 16  # of the common grid on which maps are measured and compared
WINDOWS = 8  # occlusion greys at most so many parts along a side
PARTS = 16  # images that go through the model at a time


@dataclass
class Case:
    """One question about one image, as the model took it."""

    vlm: VLM
    image: np.ndarray  # uint8 (H, W) or (H, W, 3)
    question: str
    prompt: Prompt
    columns: np.ndarray  # of the image tokens in the prompt; empty without status "ok"
    status: str  # ok, span_mismatch, no_attn or nan
    margin: float = float("nan")  # log-odds of yes against no, nats
    finding: str = ""  # words of the question that name what is asked about
    rows: dict = field(default_factory=dict)  # query -> float32 (layers, heads, cells), shares of all attention
    neutral: "Case | None" = None

    @property
    def grid(self):
        return self.prompt.grids[0]

    @property
    def answer(self):
        return "yes" if self.margin > 0 else "no"

    @property
    def view(self):
        return view_of(self.vlm.processor, *self.image.shape[:2])


@dataclass
class Map:
    values: np.ndarray | None  # float32 (rows, columns), sum 1; None where status is not "ok"
    status: str  # ok, span_mismatch, no_attn, nan, no_query, no_heads, no_box, zero, unsupported
    view: tuple  # x0, y0, x1, y1: what the grid covers, in pixels of the image; beyond it where the model pads
    size: tuple  # (height, width) of the image
    method: str = ""
    image_mass: float | None = None  # share of the query's attention that goes to the image at all


# ----------------------------------------------------------------------------------------------------------- geometry


def view_of(processor, height, width):
    """What the grid of an image of this size covers, (x0, y0, x1, y1) in its pixels: whole, square cut or padded."""
    ip = processor.image_processor
    side = max(height, width) if getattr(ip, "do_pad", None) and not getattr(ip, "merge_size", None) else None
    if side is None and getattr(ip, "do_center_crop", None):
        side = min(height, width) * min(1.0, ip.crop_size["height"] / dict(ip.size)["shortest_edge"])
    if side is None:
        return 0.0, 0.0, float(width), float(height)
    x0, y0 = (width - side) / 2, (height - side) / 2
    return x0, y0, x0 + side, y0 + side


def cell_of(grid, view, xs, ys):
    """Points of the image, x (N,) and y (M,) -> number of the row (M,) and column (N,) of their cell, -1 outside."""
    found = []
    for points, count, low, high in ((ys, grid[0], view[1], view[3]), (xs, grid[1], view[0], view[2])):
        place = np.floor((np.asarray(points) - low) / (high - low) * count).astype(int)
        found.append(np.where((place >= 0) & (place < count), place, -1))
    return found


def shares_in_boxes(boxes, grid, view, fine=16):
    """boxes in pixels of the image -> float (rows, columns): share of each cell that lies in any of them."""
    xs = view[0] + (np.arange(grid[1] * fine) + 0.5) * (view[2] - view[0]) / (grid[1] * fine)
    ys = view[1] + (np.arange(grid[0] * fine) + 0.5) * (view[3] - view[1]) / (grid[0] * fine)
    inside = np.zeros((len(ys), len(xs)), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((ys >= y0) & (ys < y1))[:, None] & ((xs >= x0) & (xs < x1))
    return inside.reshape(grid[0], fine, grid[1], fine).mean((1, 3))


def on_common_grid(found, side=SIDE, fine=16):
    """A Map -> float32 (side, side) over the whole image, sum 1: by area, so that grids of any kind can be compared."""
    height, width = found.size
    points = (np.arange(side * fine) + 0.5) / (side * fine)
    r, c = cell_of(found.values.shape, found.view, points * width, points * height)
    dense = found.values[r[:, None], c] * ((r >= 0)[:, None] & (c >= 0))
    small = dense.reshape(side, fine, side, fine).mean((1, 3))
    return (small / max(small.sum(), 1e-12)).astype(np.float32)


def over_pixels(found):
    """A Map -> float32 (H, W) in 0..1 on the image, enlarged bilinearly; 0 where the model sees nothing."""
    (height, width), (x0, y0, x1, y1) = found.size, found.view
    xs = ((torch.arange(width) + 0.5) - x0) / (x1 - x0) * 2 - 1
    ys = ((torch.arange(height) + 0.5) - y0) / (y1 - y0) * 2 - 1
    points = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], -1)[None].float()
    values = torch.from_numpy(found.values / max(float(found.values.max()), 1e-12))[None, None]
    large = F.grid_sample(values, points, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    return (large * (points[0].abs() <= 1).all(-1)).numpy()


def check_colormap(name):
    if name not in matplotlib.colormaps:
        raise InputError(f"matplotlib has no colour map {name!r}; try hot, inferno or viridis")


def overlay(image, found, colormap="hot", strength=0.55):
    """uint8 image and Map -> uint8 (H, W, 3): the image, coloured where the map is high. InputError without a map."""
    if found.values is None:
        raise InputError(f"there is no map to draw: {found.status}")
    check_colormap(colormap)
    heat = over_pixels(found)[..., None]
    base = (image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)) / 255
    color = matplotlib.colormaps[colormap](heat[..., 0])[..., :3]
    share = strength * np.sqrt(heat)
    return ((base * (1 - share) + color * share) * 255).round().astype(np.uint8)


def shortened(text, most):
    """The text in at most `most` characters, without its middle: folders of models differ at the end or the start."""
    left = (most - 1) // 2
    return text if len(text) <= most else f"{text[:left]}…{text[len(text) + left + 1 - most :]}"


# -------------------------------------------------------------------------------------------------------------- asking


def image_span(vlm, prompt):
    """Columns of the image tokens -> int (cells,), and "ok"; empty and "span_mismatch" unless they are one image."""
    columns = np.flatnonzero(prompt.ids == vlm.image_token_id)
    fits = len(prompt.grids) == 1 and len(columns) == prompt.grids[0][0] * prompt.grids[0][1]
    if not fits or columns[-1] - columns[0] + 1 != len(columns):
        return columns[:0], "span_mismatch"
    return columns, "ok"


def ask(vlm, image, question, finding=""):
    """One image (uint8 array) and one question -> Case; finding: words whose tokens are the query "finding"."""
    case, neutral = ask_all(vlm, [image] * 2, [question, NEUTRAL], [finding, ""])
    case.neutral = neutral
    return case


@torch.no_grad()
def ask_all(vlm, images, questions, findings=None):
    """Several in one pass -> Cases, with the rows "last" and "finding" and the margin; the same image is seen once."""
    prompts = make_prompts(vlm, questions, images)
    before = answer_sides(vlm)[0]  # what the template writes in front of an answer
    cases, queries = [], []
    asked = zip(images, questions, findings or [""] * len(prompts), prompts, strict=True)
    for image, question, finding, prompt in asked:
        columns, status = image_span(vlm, prompt)
        cases.append(Case(vlm, np.asarray(image), question, prompt, columns, status, finding=finding))
        queries.append({"last": [len(prompt) + len(before) - 1], "finding": tokens_of(cases[-1], finding)})
    found = record_rows(cases, queries, lambda: margin(vlm, prompts, share=False).tolist())
    for case, value in zip(cases, found, strict=True):
        case.margin = value
    return cases


def record_rows(cases, queries, run):
    """queries: of each case {name: columns}; run(): the pass over these cases -> what it returns. Fills case.rows."""
    wanted = sorted({q for query in queries for columns in query.values() for q in columns})
    keys = padded([case.columns for case in cases], -1)
    with AttentionCapture(cases[0].vlm.model, queries=wanted, keys=keys) as capture:
        result = run()
    steps, status = capture.steps, capture.status
    for b, (case, query) in enumerate(zip(cases, queries, strict=True)):
        if case.status != "ok":
            continue
        case.status = status if status != "nan" or not torch.isfinite(steps[0].weights[:, b]).all() else "ok"
        if case.status != "ok":
            continue
        weights = steps[0].weights[:, b, :, :, : len(case.columns)]  # (layers, heads, rows, cells)
        for name, columns in query.items():
            if columns:
                case.rows[name] = weights[:, :, [wanted.index(q) for q in columns]].mean(2).numpy()
    return result


def tokens_of(case, words):
    """Columns of the prompt's tokens behind the image that touch these words; [] where they do not occur."""
    words = re.sub(r"\s", "", words).lower()
    if not words or not len(case.columns):
        return []
    first = int(case.columns[-1]) + 1
    pieces = [re.sub(r"\s", "", case.vlm.tokenizer.decode([i])).lower() for i in case.prompt.ids[first:].tolist()]
    begin = "".join(pieces).rfind(words)  # blanks are left out, since some tokenizers lose them token by token
    if begin < 0:
        return []
    ends = np.cumsum([len(p) for p in pieces])
    return [first + k for k, p in enumerate(pieces) if p and ends[k] > begin and ends[k] - len(p) < begin + len(words)]


@torch.no_grad()
def record_answer(case, max_new_tokens=24):
    """Fills the row "answer": mean over what the model writes, greedily."""
    written = sample(case.vlm, [case.prompt], 1, max_new_tokens)[0][0][0]
    first = len(case.prompt) - 1
    query = {"answer": list(range(first, first + len(written)))}
    record_rows([case], [query], lambda: logprobs(case.vlm, [case.prompt], [[written]], share=False))


# ---------------------------------------------------------------------------------------------------------------- maps


def attention_map(case, method="mean", query="last", heads=()):
    """
    Case -> Map by one of METHODS. query: last, finding or answer, for the attention methods; the others explain the
    answer that was given (margin towards it). heads: [(layer, head)], for method "heads".
    """
    if method not in METHODS:
        raise InputError(f"there is no map {method!r}; there are {', '.join(METHODS)}")
    found = Map(None, case.status, case.view, case.image.shape[:2], method)
    if case.status != "ok":
        return found
    if method in OF_ROWS:
        if query == "answer" and "answer" not in case.rows:
            record_answer(case)
        if query not in case.rows:
            found.status = "no_query"
            return found
        values = of_rows(case, method, case.rows[query], heads)
        found.image_mass = float(case.rows[query].sum(-1).mean())
    elif method in ("rollout", "gradient_weighted"):
        values = through_layers(case, method, query)
    else:
        makers = [input_gradient, integrated_gradients, grad_cam, occlusion, own_box]
        values = {maker.__name__: maker for maker in makers}[method](case)
    if isinstance(values, str):
        found.status = values
    elif not np.isfinite(values).all():
        found.status = "nan"
    elif values.sum() <= 0:
        found.status = "zero"
    else:
        found.values = (values / values.sum()).astype(np.float32)
    return found


def of_rows(case, method, rows, heads=()):
    """rows (layers, heads, cells) -> (rows, columns) of the grid, or a status."""
    if method == "max":
        flat = rows.max((0, 1))
    elif method == "last_quarter":
        flat = rows[-max(1, len(rows) // 4) :].mean((0, 1))
    elif method == "heads":
        if not len(heads):
            return "no_heads"
        flat = np.mean([rows[layer, head] for layer, head in heads], 0)
    else:
        flat = rows.mean((0, 1))
    if method == "relative":
        if case.neutral is None or "last" not in case.neutral.rows:
            return "no_query"
        other = case.neutral.rows["last"].mean((0, 1))
        flat = flat / np.maximum(other, 1e-3 * other.mean())
    return flat.reshape(case.grid)


def choose_heads(rows, k=3):
    """
    rows: of calibration cases (layers, heads, cells) -> [(layer, head)], the k with the lowest mean spatial entropy
    among the half that gives the image most attention (after arXiv 2503.06287).
    """
    rows = np.stack(rows)
    mass = rows.sum(-1).mean(0)
    p = rows / np.maximum(rows.sum(-1, keepdims=True), 1e-12)
    spread = -(p * np.log(np.maximum(p, 1e-12))).sum(-1).mean(0)
    spread[mass < np.median(mass)] = np.inf
    order = np.argsort(spread, axis=None, kind="stable")[:k]
    return [tuple(int(i) for i in np.unravel_index(place, spread.shape)) for place in order]


def toward_answer(case, prompts):
    """Differentiable margin towards the answer that was given, (P,)."""
    found = margin(case.vlm, prompts, share=False, gradient=torch.is_grad_enabled())
    return found if case.margin > 0 else -found


def through_layers(case, method, query):
    if query == "answer":
        return "unsupported"
    last = [len(case.prompt) + len(answer_sides(case.vlm)[0]) - 1]
    row = tokens_of(case, case.finding) if query == "finding" else last
    if not row:
        return "no_query"
    with torch.set_grad_enabled(method == "gradient_weighted"), WholeAttention(case.vlm.model) as whole:
        target = toward_answer(case, [case.prompt])
        gradients = torch.autograd.grad(target.sum(), whole.layers) if method == "gradient_weighted" else None
    if whole.status != "ok":
        return whole.status
    total = None
    for i, weights in enumerate(whole.layers):
        weights = weights[0].detach()
        eye = torch.eye(weights.shape[-1], device=weights.device)
        total = eye if total is None else total
        if gradients is None:
            total = (0.5 * weights.mean(0) + 0.5 * eye) @ total
        else:
            total = total + (gradients[i][0] * weights).relu().mean(0) @ total
    return total[row].mean(0)[torch.from_numpy(case.columns).to(total.device)].cpu().numpy().reshape(case.grid)


def prompts_with(case, images):
    """Images of this case's size -> its prompt about each of them."""
    return [Prompt(case.prompt.ids, case.prompt.grids, (features,)) for features in features_of(case.vlm, images)]


def in_cells(case, heat, thw):
    """heat: one number per pixel (1, H, W), or per entry of patch rows (N, K) -> (rows, columns)."""
    if thw is None:
        return F.adaptive_avg_pool2d(heat[None].float(), case.grid)[0, 0].cpu().numpy()
    return heat.float().reshape(case.grid[0] * case.grid[1], -1).sum(1).cpu().numpy().reshape(case.grid)


def gradient_at(case, ready, values):
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        target = toward_answer(case, prompts_with(case, Images(values, ready.grids, ready.grid_thw))).sum()
        return torch.autograd.grad(target, values)[0].float()


def input_gradient(case, steps=0):
    """steps > 0: the mean gradient along the way from a grey picture, times the difference from it."""
    ready = preprocess_images(case.vlm.processor, [case.image])
    values, base = ready.values, 0.0
    if steps:
        base = preprocess_images(case.vlm.processor, [np.full_like(case.image, round(float(case.image.mean())))]).values
        way = [base + (values - base) * (k + 0.5) / steps for k in range(steps)]
        gradient = sum(gradient_at(case, ready, v) for v in way) / steps
    else:
        gradient = gradient_at(case, ready, values)
    heat = gradient * (values - base)
    heat = heat.sum(1).abs() if ready.grid_thw is None else heat.sum(1, keepdim=True).abs()
    return in_cells(case, heat, ready.grid_thw)


def integrated_gradients(case, steps=12):
    return input_gradient(case, steps)


def grad_cam(case):
    if case.vlm.family == "qwen25vl":
        return "unsupported"  # its tower hands patches over in the order of its windows
    kept = []

    def keep(module, args):
        handed = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        kept.append(handed)
        return (handed, *args[1:])

    hook = case.vlm.base.get_submodule(case.vlm.spec.projector[0]).register_forward_pre_hook(keep)
    try:
        with torch.enable_grad():
            ready = preprocess_images(case.vlm.processor, [case.image])
            target = toward_answer(case, prompts_with(case, ready)).sum()
            gradient = torch.autograd.grad(target, kept[0])[0]
    finally:
        hook.remove()
    patches, gradient = (x.detach().float().reshape(-1, x.shape[-1]) for x in (kept[0], gradient))
    heat = (patches @ gradient.mean(0)).relu()
    if ready.grid_thw is None:
        side = round(len(heat) ** 0.5)
        return in_cells(case, heat.reshape(1, side, side), None)
    return in_cells(case, heat[:, None], ready.grid_thw)


def filled(image, grid, view, cells, fill="mean"):
    """
    The image with some cells (bool (rows, columns)) filled: mean, the grey of the whole image; blur, the image smoothed
    until only light and dark are left.
    """
    height, width = image.shape[:2]
    r, c = cell_of(grid, view, np.arange(width) + 0.5, np.arange(height) + 0.5)
    hidden = cells[r[:, None], c] & (r >= 0)[:, None] & (c >= 0)
    out = image.copy()
    if fill == "mean":
        out[hidden] = image.mean((0, 1)).round().astype(np.uint8)
        return out
    small = torch.from_numpy(image.reshape(height, width, -1)).permute(2, 0, 1)[None].float()
    smooth = F.interpolate(F.adaptive_avg_pool2d(small, 4), (height, width), mode="bilinear", align_corners=False)
    out[hidden] = smooth[0].permute(1, 2, 0).reshape(image.shape).round().byte().numpy()[hidden]
    return out


@torch.no_grad()
def answers_to(case, images, batch_size=PARTS):
    """Margins towards the given answer for other images of the same size, such as filled ones, float (N,)."""

    def some(part):
        ready = preprocess_images(case.vlm.processor, part)
        return toward_answer(case, prompts_with(case, ready)).tolist()

    return np.array(in_parts(some, list(images), batch_size))


def occlusion(case):
    rows, columns = case.grid
    r, c = (np.arange(n) // -(-n // WINDOWS) for n in case.grid)
    number = r[:, None] * (c[-1] + 1) + c
    images = [filled(case.image, case.grid, case.view, number == k) for k in range(int(number.max()) + 1)]
    falls = abs(case.margin) - answers_to(case, images)
    return np.maximum(falls, 0)[number].reshape(rows, columns)


@torch.no_grad()
def own_box(case, max_new_tokens=96):
    prompt = make_prompts(case.vlm, [BOX_REQUEST.format(case.question)], [case.image])
    text = text_of(case.vlm, sample(case.vlm, prompt, 1, max_new_tokens)[0][0][0], skip_special_tokens=False)
    height, width = case.image.shape[:2]
    boxes = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in boxes_in(text)]
    return shares_in_boxes(boxes, case.grid, case.view) if boxes else "no_box"


def boxes_in(text):
    """Boxes from 0 to 1000 in a response, as [a, b, c, d] or (a, b), (c, d) -> lists x0, y0, x1, y1 in 0..1."""
    number = r"\s*(\d{1,4})\s*"
    found = re.findall(rf"[\[(]{number},{number}(?:[\])]\s*,\s*[\[(]|,){number},{number}[\])]", text)
    boxes = [[int(n) / 1000 for n in numbers] for numbers in found]
    return [b for b in boxes if b[0] < b[2] <= 1 and b[1] < b[3] <= 1]
