"""Probability maps of masks and labels, against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histoniche.seg._targets import boxes_of_labels, maps_of_labels, maps_of_masks, soft_boundary


def random_labels(seed: int, shape: tuple[int, int] = (23, 31), n: int = 9) -> np.ndarray:
    """Rectangles that touch and cover each other, some at the edge."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int32)
    for number in range(1, n + 1):
        y, x = rng.integers(0, shape[0] - 2), rng.integers(0, shape[1] - 2)
        labels[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = number
    return labels


def windows(array: np.ndarray) -> np.ndarray:
    """All 3 x 3 windows (y, x, 9), the edge repeated, by a loop."""
    padded = np.pad(array, 1, mode="edge")
    height, width = array.shape
    return np.array([[padded[y : y + 3, x : x + 3].ravel() for x in range(width)] for y in range(height)])


def one_hot(labels: np.ndarray) -> torch.Tensor:
    numbers = np.unique(labels[labels > 0])
    return torch.from_numpy(np.stack([labels == number for number in numbers]).astype(np.float32))


def test_soft_boundary_is_the_range_of_nine_pixels() -> None:
    mask = np.random.default_rng(0).random((2, 3, 11, 7)).astype(np.float32)
    found = soft_boundary(torch.from_numpy(mask)).numpy()
    assert found.shape == mask.shape
    for index in np.ndindex(2, 3):
        around = windows(mask[index])
        np.testing.assert_array_equal(found[index], around.max(-1) - around.min(-1))


def test_soft_boundary_of_a_square_is_on_both_sides_of_its_edge() -> None:
    mask = torch.zeros(9, 9)
    mask[3:6, 3:6] = 1
    expected = torch.zeros(9, 9)
    expected[2:7, 2:7] = 1
    expected[4, 4] = 0
    torch.testing.assert_close(soft_boundary(mask), expected)


def test_an_object_that_leaves_the_image_has_no_boundary_there() -> None:
    mask = torch.zeros(6, 8)
    mask[:, :4] = 1
    expected = torch.zeros(6, 8)
    expected[:, 3:5] = 1
    torch.testing.assert_close(soft_boundary(mask), expected)
    assert not soft_boundary(torch.ones(5, 5)).any()


def test_soft_boundary_has_a_gradient() -> None:
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_boundary, mask)


@pytest.mark.parametrize("seed", range(5))
def test_maps_of_labels_against_a_loop(seed: int) -> None:
    labels = random_labels(seed)
    maps = maps_of_labels(labels)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps[0], labels > 0)
    np.testing.assert_array_equal(maps[1], np.ptp(windows(labels), axis=-1) > 0)


@pytest.mark.parametrize("seed", range(5))
def test_maps_of_labels_are_those_of_their_masks(seed: int) -> None:
    labels = random_labels(seed)
    masks = one_hot(labels)
    np.testing.assert_array_equal(maps_of_labels(labels), maps_of_masks([masks], labels.shape))
    np.testing.assert_array_equal(maps_of_labels(labels), maps_of_masks(masks.split(2), labels.shape))


def test_maps_do_not_depend_on_numbers() -> None:
    labels = random_labels(7)
    rng = np.random.default_rng(0)
    table = np.concatenate([[0], rng.permutation(np.arange(1, 10)) * 1000])
    np.testing.assert_array_equal(maps_of_labels(labels), maps_of_labels(table[labels]))


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_maps_turn_with_the_image(turn: int) -> None:
    labels = random_labels(3)
    np.testing.assert_array_equal(
        maps_of_labels(np.rot90(labels, turn)), np.rot90(maps_of_labels(labels), turn, axes=(1, 2))
    )


def test_objects_that_touch_keep_a_boundary() -> None:
    labels = np.zeros((10, 12), dtype=np.int32)
    labels[2:8, 2:6], labels[2:8, 6:10] = 1, 2
    foreground, boundary = maps_of_labels(labels)
    assert foreground[2:8, 2:10].all()
    assert boundary[2:8, 5:7].all()
    # Inside one object, there is none.
    assert not boundary[4:6, 4].any()
    union = soft_boundary(torch.from_numpy(foreground)).numpy()
    assert not union[4:6, 5:7].any()


def test_soft_masks_take_the_maximum_over_objects() -> None:
    masks = torch.rand(5, 9, 8, generator=torch.Generator().manual_seed(1))
    maps = maps_of_masks([masks[:2], masks[2:2], masks[2:]], (9, 8))
    np.testing.assert_array_equal(maps[0], masks.numpy().max(0))
    edges = [np.ptp(windows(mask), axis=-1) for mask in masks.numpy()]
    np.testing.assert_allclose(maps[1], np.max(edges, axis=0), rtol=1e-6)


def test_nothing_gives_zeros() -> None:
    for maps in (maps_of_masks([], (4, 5)), maps_of_labels(np.zeros((4, 5), dtype=np.int32))):
        assert maps.shape == (2, 4, 5)
        assert maps.dtype == np.float32
        assert not maps.any()
    assert boxes_of_labels(np.zeros((4, 5), dtype=np.int32)).shape == (0, 4)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_labels_against_a_loop(seed: int) -> None:
    labels = random_labels(seed)
    labels[labels == 4] = 0  # a gap in the numbers
    expected = []
    for number in np.unique(labels[labels > 0]):
        y, x = np.nonzero(labels == number)
        expected.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    boxes = boxes_of_labels(labels)
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes, expected)
