"""Boxes, grids of points, and what survives of their masks: hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histoniche.seg._fields import Field
from histoniche.seg.teachers import Prompts
from histoniche.seg.teachers._prompts import chunks

SIZE = 40


def make_field(labels: np.ndarray | None) -> Field:
    pixels = np.random.default_rng(0).random((1, 20, 30)).astype(np.float32)
    return Field("field", pixels, ("dapi",), labels)


def two_objects() -> np.ndarray:
    labels = np.zeros((20, 30), dtype=np.int32)
    labels[2:6, 3:10], labels[15:20, 25:30] = 1, 2
    return labels


def squares(*corners: tuple[int, int, int], size: int = SIZE) -> torch.Tensor:
    """Logits of 10 inside squares (y, x, width), -10 outside."""
    logits = torch.full((len(corners), size, size), -10.0)
    for mask, (y, x, width) in zip(logits, corners, strict=True):
        mask[y : y + width, x : x + width] = 10.0
    return logits


# ------------------------------------------------------------------------------------------------------------ boxes
def test_boxes_of_labels_are_widened_and_clipped() -> None:
    item = make_field(two_objects())
    pixels = item.read(("dapi",))
    np.testing.assert_array_equal(Prompts().boxes(item, pixels), [[3, 2, 10, 6], [25, 15, 30, 20]])
    np.testing.assert_array_equal(Prompts(margin=3).boxes(item, pixels), [[0, 0, 13, 9], [22, 12, 30, 20]])


def test_boxes_without_labels_are_an_error_with_the_fix() -> None:
    item = make_field(None)
    with pytest.raises(ValueError, match=r"'field' has no labels.*Prompts\('grid'\) or a detector"):
        Prompts().boxes(item, item.read(("dapi",)))


def test_no_object_gives_no_box() -> None:
    item = make_field(np.zeros((20, 30), dtype=np.int32))
    assert Prompts().boxes(item, item.read(("dapi",))).shape == (0, 4)


def test_a_detector_sees_the_channels_and_its_boxes_are_clipped() -> None:
    seen = []

    def detect(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        return np.array([[-5, 4, 12, 99], [1, 2, 3, 4]])

    item = make_field(None)
    pixels = item.read(("dapi",))
    boxes = Prompts("detector", margin=1, detector=detect, detector_version="1").boxes(item, pixels)
    assert seen[0] is pixels
    np.testing.assert_array_equal(boxes, [[0, 3, 13, 20], [0, 1, 4, 5]])
    nothing = Prompts("detector", detector=lambda pixels: np.empty((0, 4)), detector_version="none")
    assert nothing.boxes(item, pixels).shape == (0, 4)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.ones((4, 5)), r"an array \(4, 5\); boxes \(n, 4\).*the corners alone without scores or classes"),
        (np.array([1, 2, 3, 4]), r"an array \(4,\)"),
        (np.empty((0, 5)), r"an array \(0, 5\)"),
        ([[1, 2, 3, 4], [1, 2]], "no array of numbers"),
        ([[0, 0, 5, 5], [1, 2, 3, float("nan")]], r"the box \[1.0, 2.0, 3.0, nan\] \(row 1\)"),
        ([[0, 0, 5, 5], [7, 2, 3, 4]], r"the box \[7.0, 2.0, 3.0, 4.0\] \(row 1\).*left < right and top < bottom"),
        ([[1, 4, 3, 4]], r"the box .* \(row 0\).*leave out empty boxes, and turn \(x, y, width, height\) into corners"),
    ],
)
def test_what_a_detector_must_not_give_is_refused(boxes: object, message: str) -> None:
    item = make_field(None)
    prompts = Prompts("detector", detector=lambda pixels: boxes, detector_version="mine 2")  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=f"The detector 'mine 2' gave field 'field' {message}"):
        prompts.boxes(item, item.read(("dapi",)))


def test_a_detector_may_give_an_empty_list() -> None:
    item = make_field(None)
    prompts = Prompts("detector", detector=lambda pixels: [], detector_version="1")  # type: ignore[arg-type,return-value]
    assert prompts.boxes(item, item.read(("dapi",))).shape == (0, 4)


# ------------------------------------------------------------------------------------------------------------- grid
def test_points_are_spaced_from_half_a_step_on() -> None:
    points = Prompts("grid", spacing=10).points((20, 30))
    np.testing.assert_array_equal(points, [[5, 5], [15, 5], [25, 5], [5, 15], [15, 15], [25, 15]])


@pytest.mark.parametrize("shape", [(3, 50), (1, 1), (16, 7), (200, 33)])
def test_any_shape_has_points_inside(shape: tuple[int, int]) -> None:
    points = Prompts("grid", spacing=16).points(shape)
    assert len(points)
    assert (points > 0).all()
    assert (points < [shape[1], shape[0]]).all()


def test_the_better_of_two_masks_that_overlap_is_kept() -> None:
    logits = squares((0, 0, 10), (1, 0, 10), (20, 20, 10))  # the first two: IoU 90 / 110
    kept = Prompts("grid").keep(logits, torch.tensor([0.8, 0.9, 0.85]))
    assert kept.tolist() == [1, 2]
    every = Prompts("grid", most_overlap=0.9).keep(logits, torch.tensor([0.8, 0.9, 0.85]))
    assert every.tolist() == [1, 2, 0]  # best first


def test_boxes_of_masks_end_after_their_last_pixel() -> None:
    """Squares of 2 x 2 that share a column: IoU 2 / 6, not that of boxes one pixel too small."""
    logits = squares((5, 5, 2), (5, 6, 2))
    iou = torch.tensor([0.9, 0.8])
    assert Prompts("grid", most_overlap=0.34).keep(logits, iou).tolist() == [0, 1]
    assert Prompts("grid", most_overlap=0.33).keep(logits, iou).tolist() == [0]


def test_masks_that_the_teacher_doubts_are_dropped() -> None:
    logits = squares((0, 0, 5), (20, 20, 5))
    assert Prompts("grid", least_iou=0.7).keep(logits, torch.tensor([0.69, 0.7])).tolist() == [1]


def test_masks_whose_area_hangs_on_the_threshold_are_dropped() -> None:
    logits = squares((0, 0, 10), (20, 20, 10))
    logits[0, 0:2, 0:10] = 0.5  # 80 px above 1, 100 above -1: 0.8
    logits[1, 20, 20:30] = 0.5  # 90 of 100: 0.9
    iou = torch.full((2,), 0.9)
    assert Prompts("grid", least_stability=0.85).keep(logits, iou).tolist() == [1]
    assert sorted(Prompts("grid", least_stability=0.8).keep(logits, iou).tolist()) == [0, 1]


def test_empty_masks_and_background_are_dropped() -> None:
    logits = torch.cat([squares((0, 0, 0)), squares((0, 0, 20)), squares((0, 0, 21))])
    prompts = Prompts("grid", most_area=0.25)  # 400 of 1600 px
    assert prompts.keep(logits, torch.full((3,), 0.9)).tolist() == [1]
    assert prompts.keep(logits[[0]], torch.full((1,), 0.9)).tolist() == []
    assert prompts.keep(logits[:0], torch.empty(0)).tolist() == []


def test_believing_part_by_part_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 10, 10, generator=generator) * 3 - 4
    iou = torch.rand(12, generator=generator)
    prompts = Prompts("grid", least_iou=0.3, least_stability=0.3)
    whole = prompts.believed(logits, iou)
    parts = [prompts.believed(logits[i : i + 5], iou[i : i + 5]) + i for i in range(0, 12, 5)]
    assert 0 < len(whole) < 12
    assert torch.cat(parts).tolist() == whole.tolist()
    assert set(prompts.keep(logits, iou).tolist()) <= set(whole.tolist())


# ----------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "points"}, "kind='points' is unknown: choose 'boxes', 'grid' or 'detector'"),
        ({"kind": "detector"}, "a detector belongs to kind='detector'"),
        ({"kind": "detector", "detector": len}, "need detector_version="),
        ({"kind": "grid", "detector": len}, "a detector belongs to kind='detector'"),
        ({"kind": "grid", "spacing": 0}, "spacing=0 must be at least 1"),
        ({"most_area": 0.0}, r"most_area=0.0 in \(0, 1\]"),
        ({"most_area": 1.5}, r"most_area=1.5 in \(0, 1\]"),
    ],
)
def test_wrong_values_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts(**arguments)


def test_fingerprint_tells_prompts_apart() -> None:
    every = [
        Prompts(), Prompts(margin=2), Prompts("grid"), Prompts("grid", spacing=8), Prompts("grid", least_iou=0.5),
        Prompts("grid", least_stability=0.5), Prompts("grid", most_overlap=0.3), Prompts("grid", most_area=0.5),
        Prompts("detector", detector=make_field, detector_version="a"), Prompts("detector", detector=two_objects, detector_version="b"),
        Prompts("detector", detector=two_objects, margin=1, detector_version="b"),
    ]  # fmt: skip
    assert len({prompts.fingerprint for prompts in every}) == len(every)
    assert Prompts("grid").fingerprint == Prompts("grid").fingerprint


def test_chunks_cover_everything_once() -> None:
    array = np.arange(7)
    parts = list(chunks(array, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), array)
