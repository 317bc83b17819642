"""Input that no metric takes, and what the errors say."""

from __future__ import annotations

import numpy as np
import pytest

from histoniche.seg import metrics

EMPTY = np.zeros((4, 5), dtype=int)
ALL = [
    metrics.dice, metrics.hausdorff95, metrics.boundary_f, metrics.match_instances, metrics.average_precision,
    metrics.panoptic_quality,
]  # fmt: skip
OF_OBJECTS = [metrics.match_instances, metrics.average_precision, metrics.panoptic_quality]


@pytest.mark.parametrize("metric", ALL)
def test_bad_images(metric):
    with pytest.raises(ValueError, match=r"predicted \(4, 5\) and truth \(5, 4\) differ"):
        metric(EMPTY, EMPTY.T)
    with pytest.raises(ValueError, match=r"truth has the shape \(1, 4, 5\)"):
        metric(EMPTY, EMPTY[None])
    with pytest.raises(ValueError, match=r"predicted has the shape \(0, 5\)"):
        metric(EMPTY[:0], EMPTY[:0])
    with pytest.raises(ValueError, match="truth has the label -2"):
        metric(EMPTY, EMPTY - 2)
    with pytest.raises(TypeError, match="predicted has the type float32; integers"):
        metric(EMPTY.astype(np.float32), EMPTY)
    with pytest.raises(TypeError, match="truth has the type float64 with NaN"):
        metric(EMPTY, np.full(EMPTY.shape, np.nan))
    with pytest.raises(TypeError, match="predicted has the type complex128"):
        metric(EMPTY.astype(complex), EMPTY)


@pytest.mark.parametrize("metric", OF_OBJECTS)
def test_masks_do_not_tell_objects_apart(metric):
    with pytest.raises(TypeError, match=r"truth is a mask of booleans.*skimage.measure.label"):
        metric(EMPTY, EMPTY > 0)


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_um_per_px_must_be_positive(value):
    with pytest.raises(ValueError, match=f"um_per_px={value} must be positive"):
        metrics.hausdorff95(EMPTY, EMPTY, um_per_px=value)


@pytest.mark.parametrize("value", [-0.5, np.nan])
def test_tolerance_must_not_be_negative(value):
    with pytest.raises(ValueError, match=f"tolerance_px={value}"):
        metrics.boundary_f(EMPTY, EMPTY, tolerance_px=value)


@pytest.mark.parametrize("value", [-0.1, 1, np.nan])
def test_iou_out_of_range(value):
    with pytest.raises(ValueError, match=f"least_iou={value}"):
        metrics.average_precision(EMPTY, EMPTY, least_iou=value)
