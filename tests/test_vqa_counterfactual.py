"""Regions, fills and random regions of the counterfactual test."""

import numpy as np
import pytest
from scipy.sparse.linalg import spsolve

from shared.phantom import phantom_study
from vqa_sft_grpo import counterfactual
from vqa_sft_grpo.counterfactual import FILLS, FOREGROUND, OVERLAP, blank, clusters_of, fill_region, foreground_of
from vqa_sft_grpo.counterfactual import harmonic, identity_edits, plan_regions, region_iou, region_mask, whole_boxes
from vqa_sft_grpo.prompting import boxes_from_model, boxes_to_model


def noisy(shape=(80, 100), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# --- regions ---


def test_boxes_become_whole_pixels_inside_the_image():
    assert whole_boxes([[-3.2, 1.5, 4.1, 6], [90, 10, 120, 20], [200, 200, 220, 220], [5, 5, 5, 9]], 50, 100) == [
        [0, 1, 5, 6],
        [90, 10, 100, 20],
    ]
    assert whole_boxes(None, 5, 5) == []


def test_iou_of_regions_by_hand():
    assert region_iou([[0, 0, 10, 10]], [[5, 0, 15, 10]], 20, 20) == pytest.approx(50 / 150)
    assert region_iou([[0, 0, 10, 10], [5, 0, 15, 10]], [[0, 0, 15, 10]], 20, 20) == 1  # overlapping boxes count once
    assert region_iou([], [[0, 0, 5, 5]], 20, 20) == 0


def test_a_box_written_in_thousandths_comes_back_as_itself():
    """Outwards, 28.99 to 57.01 would be 28 to 58: a small box would lose a tenth of its overlap with itself."""
    for side in (112, 500, 1024):
        for x in range(0, side - 10, 7):
            gold = [[x, 3, x + 10, 12]]
            written = boxes_from_model(boxes_to_model(gold, side, side), side, side)
            if side <= 500:  # from 1,000 pixels on, a thousandth is more than half a pixel
                assert region_iou(written, gold, side, side) == 1
            else:
                assert region_iou(written, gold, side, side) > 0.7
    assert region_iou([[0.4, 0.4, 0.45, 0.45]], [[0, 0, 5, 5]], 20, 20) == 0  # nothing is left of it
    assert whole_boxes([[28.99, 0, 57.01, 3]], 60, 60) == [[28, 0, 58, 3]]  # an edit takes all of the region


def test_boxes_that_touch_move_together():
    groups = clusters_of([[0, 0, 5, 5], [20, 20, 30, 30], [4, 4, 9, 9], [9, 9, 12, 12]])
    assert sorted(len(g) for g in groups) == [1, 3]


@pytest.mark.parametrize("size", [112, 500])
def test_random_regions_keep_the_promises(size):
    planned = 0
    for index in range(12):
        study = phantom_study(3, index, size)
        for name, boxes in study.boxes.items():
            plan = plan_regions(study.image, boxes, k=5, seed=index)
            if plan.why:
                assert plan.random == [], name
                continue
            planned += 1
            roi, foreground = region_mask(plan.roi, size, size), foreground_of(study.image)
            seen = set()
            assert len(plan.random) == 5
            for region in plan.random:
                assert whole_boxes(region, size, size) == region  # inside the image, nothing cut off
                mask = region_mask(region, size, size)
                assert abs(mask.sum() - roi.sum()) <= 0.12 * roi.sum()
                assert region_iou(region, plan.roi, size, size) <= OVERLAP + 0.02  # planned on a coarser grid
                assert abs(foreground[mask].mean() - foreground[roi].mean()) <= FOREGROUND + 0.03
                seen.add(str(region))
            assert len(seen) == 5
    assert planned >= 8


def test_regions_depend_on_the_seed_alone():
    image = phantom_study(0, 3, 112).image
    box = [[20, 40, 50, 70]]
    assert plan_regions(image, box, seed=1).random == plan_regions(image.copy(), box, seed=1).random
    assert plan_regions(image, box, seed=1).random != plan_regions(image, box, seed=2).random


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([[10, 10, 12, 12]], "region too small"),
        ([[0, 0, 90, 80]], "region too large"),
        ([[0, 0, 70, 55]], "infeasible"),
        ([], "no region"),
        (None, "no region"),
        ([[300, 300, 310, 310]], "no region"),
    ],
)
def test_regions_without_a_fair_comparison(boxes, why):
    assert plan_regions(np.full((80, 100), 200, np.uint8), boxes).why == why


def test_black_frame_is_no_place_for_random_regions():
    image = np.zeros((100, 100), np.uint8)
    image[:, 50:] = 150  # the left half is background
    plan = plan_regions(image, [[60, 40, 80, 60]], k=5)
    assert not plan.why
    assert all(box[0] >= 47 for region in plan.random for box in region)  # at most 15 % of the 20 columns may be black


# --- fills ---


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", [(80, 100), (80, 100, 3)])
def test_fills_change_the_region_and_nothing_else(fill, shape):
    image = noisy(shape)
    boxes = [[10, 20, 40, 50], [60, 0, 100, 15]]  # the second reaches two edges of the image
    before = image.copy()
    edited = fill_region(image, boxes, fill, seed=3)
    mask = region_mask(boxes, *shape[:2])
    assert edited.dtype == np.uint8 and edited.shape == shape
    assert (edited[~mask] == image[~mask]).all() and (image == before).all()
    assert (edited[mask] != image[mask]).mean() > 0.9
    assert (edited == fill_region(image, boxes, fill, seed=3)).all()
    if fill == "noise":
        assert (edited != fill_region(image, boxes, fill, seed=4)).any()


def test_ring_fills_by_hand():
    image = np.full((40, 40), 100, np.uint8)
    image[10:20, 10:20] = 250
    for fill in ("inpaint", "mean", "noise"):  # nothing but 100 around it
        assert (fill_region(image, [[10, 10, 20, 20]], fill) == 100).all()
    assert 100 < fill_region(image, [[10, 10, 20, 20]], "blur")[15, 15] < 200  # a cloud stays: that is its nature
    image[:, 20:] = 60  # the ring of the box is 2 wide: 14 x 14 - 100 = 96 pixels, of which 2 columns x 14 are 60
    assert fill_region(image, [[10, 10, 20, 20]], "mean")[15, 15] == round((68 * 100 + 28 * 60) / 96)


def test_ring_looks_past_other_boxes_of_the_region():
    image = noisy((40, 40))
    boxes = [[0, 0, 40, 18], [0, 18, 40, 21]]  # the second touches nothing but the first above; below it is known
    edited = fill_region(image, boxes, "mean")
    assert edited[19, 20] == round(image[21:23].mean())


def test_harmonic_fill_is_exact_for_planes_and_agrees_with_a_direct_solver(monkeypatch):
    rows, columns = np.mgrid[:60, :70]
    plane = 1.5 * rows + 2.0 * columns + 3
    mask = region_mask([[20, 10, 50, 40]], 60, 70)
    assert np.abs(harmonic(plane, mask) - plane[mask]).max() < 0.1
    image = noisy((150, 150)).astype(float)
    mask = region_mask(
        [[0, 20, 100, 130], [90, 60, 120, 150]], 150, 150
    )  # large enough for the coarse start, and at two edges
    assert mask.sum() > counterfactual.COARSE
    found = harmonic(image, mask)
    monkeypatch.setattr(counterfactual, "COARSE", 10**9)
    monkeypatch.setattr(counterfactual, "cg", lambda matrix, right, **options: (spsolve(matrix.tocsc(), right), 0))
    assert np.abs(found - harmonic(image, mask)).max() < 0.5


def test_inpainting_brings_a_film_closer_to_the_one_without_the_finding():
    """The phantom can be drawn without a finding, which is what a fill of its box should come near to."""
    closer = []
    for index in range(60):
        study = phantom_study(1, index, 112)
        for finding in study.truth:
            if finding.kind in ("nodule", "mass", "consolidation", "pneumonia"):
                truth = study.without(finding.name).image.astype(float)
                plan = plan_regions(study.image, study.boxes[finding.name])
                if plan.why != "":
                    continue
                mask = study.masks[finding.name]
                if mask.sum() < 20:
                    continue
                edited = fill_region(study.image, plan.roi, "inpaint")
                closer.append(
                    np.abs(edited[mask] - truth[mask]).mean()
                    < np.abs(study.image[mask].astype(float) - truth[mask]).mean()
                )
    assert len(closer) >= 6 and np.mean(closer) >= 0.7


def test_nothing_and_everything_cannot_be_filled():
    for boxes in ([], [[0, 0, 100, 80]]):
        with pytest.raises(ValueError, match="part of the image"):
            fill_region(noisy(), boxes, "mean")
    with pytest.raises(ValueError, match="no fill"):
        fill_region(noisy(), [[0, 0, 5, 5]], "black")


@pytest.mark.parametrize("shape", [(60, 80), (60, 80, 3)])
def test_identity_edits_and_blank(shape):
    image = phantom_study(0, 1, 80).image[:60]
    image = image if len(shape) == 2 else np.stack([image] * 3, axis=-1)
    edits = identity_edits(image)
    assert all(e.shape == shape and e.dtype == np.uint8 for e in edits.values())
    assert 0 < np.abs(edits["jpeg"].astype(int) - image).mean() < 4
    assert (edits["shift"][:, 1:] == image[:, :-1]).all() and (edits["shift"][:, 0] == image[:, 0]).all()
    assert blank(image).shape == shape and len(np.unique(blank(image))) == 1
