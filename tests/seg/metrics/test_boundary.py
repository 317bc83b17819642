"""Distances of boundaries against loops over all pairs of pixels."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest

from histoniche.seg.metrics import boundary_f, hausdorff95

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def boundary_pixels(image, *, edge):
    """Pixels of objects beside another label; ``edge`` says whether outside of the image counts as background."""
    height, width = image.shape
    found = []
    for y in range(height):
        for x in range(width):
            around = [
                image[y + dy, x + dx] if 0 <= y + dy < height and 0 <= x + dx < width else (0 if edge else image[y, x])
                for dy, dx in STEPS
            ]
            if image[y, x] > 0 and any(other != image[y, x] for other in around):
                found.append((y, x))
    return found


def nearest(points, others):
    return [min(math.dist(point, other) for other in others) for point in points]


def percentile95(values):
    values = sorted(values)
    place = 0.95 * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


@pytest.mark.parametrize("seed", range(10))
def test_hausdorff_is_the_larger_of_the_two_directed_percentiles(seed, pair_of):
    predicted, truth = pair_of(seed, n=2 + seed % 3)
    first, second = (boundary_pixels((image > 0).astype(int), edge=True) for image in (predicted, truth))
    directed = percentile95(nearest(first, second)), percentile95(nearest(second, first))
    assert hausdorff95(predicted, truth) == pytest.approx(max(directed), rel=1e-6)
    assert hausdorff95(truth, predicted) == hausdorff95(predicted, truth)


def test_hausdorff_directions_differ():
    """A far speck that is only predicted weighs in one direction alone, and decides."""
    truth = np.zeros((5, 30), dtype=int)
    truth[2, 2:6] = 1
    predicted = truth.copy()
    predicted[2, 25] = 2
    assert percentile95([0, 0, 0, 0]) == 0
    assert hausdorff95(predicted, truth) == pytest.approx(percentile95([0, 0, 0, 0, 20]))


def test_hausdorff_of_a_shifted_square_in_um():
    image = np.zeros((40, 40), dtype=int)
    image[10:20, 10:20] = 1
    moved = np.roll(image, 3, axis=1)
    assert hausdorff95(image, moved) == pytest.approx(3)
    assert hausdorff95(image, moved, um_per_px=0.25) == pytest.approx(0.75)
    assert hausdorff95(image, moved, um_per_px=0.5) == 2 * hausdorff95(image, moved, um_per_px=0.25)
    assert hausdorff95(image, image) == 0
    assert hausdorff95(image > 0, moved > 0) == hausdorff95(image, moved)


def test_hausdorff_sees_the_foreground_alone(pair_of, relabel):
    predicted, truth = pair_of(3)
    assert hausdorff95(relabel(predicted), truth) == hausdorff95(predicted, truth)
    split = np.ones((8, 8), dtype=int)
    split[:, 4:] = 2
    assert hausdorff95(split, np.ones((8, 8), dtype=int)) == 0


def test_hausdorff_of_empty_images_is_the_diagonal():
    empty, one = np.zeros((30, 40), dtype=int), np.zeros((30, 40), dtype=int)
    one[0, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hausdorff95(empty, one, um_per_px=2) == hausdorff95(one, empty, um_per_px=2) == 100
        assert hausdorff95(empty, empty, um_per_px=2) == 0


def test_hausdorff_of_far_corners_is_less_than_the_diagonal():
    first, second = np.zeros((2, 30, 40), dtype=int)
    first[0, 0] = second[-1, -1] = 1
    assert hausdorff95(first, second) == pytest.approx(math.hypot(29, 39))
    assert hausdorff95(first, second) < hausdorff95(first, np.zeros_like(first))


def test_hausdorff_without_monai_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    with pytest.raises(ImportError, match=r"hausdorff95 needs the package monai.*histoniche\[seg\]"):
        hausdorff95([[1]], [[1]])


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 2])
@pytest.mark.parametrize("seed", range(8))
def test_boundary_f_against_loops(seed, tolerance, pair_of):
    predicted, truth = pair_of(seed)
    first, second = (boundary_pixels(image, edge=False) for image in (predicted, truth))
    precision = np.mean([distance <= tolerance for distance in nearest(first, second)])
    recall = np.mean([distance <= tolerance for distance in nearest(second, first)])
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert boundary_f(predicted, truth, tolerance_px=tolerance) == pytest.approx(expected)
    assert boundary_f(truth, predicted, tolerance_px=tolerance) == pytest.approx(expected)


def test_boundary_f_does_not_depend_on_numbers(pair_of, relabel):
    predicted, truth = pair_of(1)
    assert boundary_f(relabel(predicted, 1), relabel(truth, 2)) == boundary_f(predicted, truth)
    assert boundary_f(truth, relabel(truth)) == 1


def test_merged_objects_lose_the_boundary_between_them():
    truth = np.zeros((21, 40), dtype=int)
    truth[3:18, 4:20], truth[3:18, 20:36] = 1, 2
    merged = (truth > 0).astype(int)
    outer = len(boundary_pixels(merged, edge=False))
    inner = len(boundary_pixels(truth, edge=False)) - outer
    assert inner == 2 * 13
    expected = 2 * (outer / (outer + inner)) / (1 + outer / (outer + inner))
    assert boundary_f(merged, truth, tolerance_px=0) == pytest.approx(expected)
    assert boundary_f(merged, truth > 0) == 1


def test_boundary_f_within_the_tolerance_is_perfect():
    image = np.zeros((30, 30), dtype=int)
    image[10:20, 10:20] = 1
    moved = np.roll(image, 2, axis=0)
    assert boundary_f(image, moved, tolerance_px=2) == 1
    assert boundary_f(image, moved, tolerance_px=1.9) < 1
    assert boundary_f(image, np.roll(image, 15, axis=0), tolerance_px=2) == 0


def test_boundary_f_without_boundaries():
    empty, full = np.zeros((6, 6), dtype=int), np.ones((6, 6), dtype=int)
    one = empty.copy()
    one[2:4, 2:4] = 1
    assert boundary_f(empty, empty) == boundary_f(full, 2 * full) == 1
    assert boundary_f(empty, full) == boundary_f(full, empty) == 0
    assert boundary_f(empty, one) == boundary_f(one, empty) == boundary_f(full, one) == 0
