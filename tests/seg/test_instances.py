"""Objects from probability maps: what is known to be there is found, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from histoniche.seg._instances import instances, renumber
from histoniche.seg._targets import maps_of_labels


def discs(shape: tuple[int, int], centres: list[tuple[float, float]], radius: float) -> np.ndarray:
    """Discs, each pixel that of the nearest centre."""
    pixels = np.stack(np.indices(shape), -1).reshape(-1, 2)
    distance, nearest = cKDTree(centres).query(pixels)
    return np.where(distance <= radius, nearest + 1, 0).reshape(shape).astype(np.int32)


def cells(seed: int, *, gap: float = 0.0) -> np.ndarray:
    """Convex cells that touch: discs cut by their neighbours, at least 11 px apart."""
    rng = np.random.default_rng(seed)
    centres: list[tuple[float, float]] = []
    while len(centres) < 40:
        y, x = rng.uniform(8, 120, size=2)
        if all(np.hypot(y - v, x - u) > 11 + gap for v, u in centres):
            centres.append((y, x))
    return discs((128, 128), centres, 8)


def best_iou(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """For each true object, its IoU with the best found one."""
    scores = []
    for number in np.unique(truth[truth > 0]):
        mask = truth == number
        rivals = np.unique(found[mask])
        ious = [np.sum(mask & (found == r)) / np.sum(mask | (found == r)) for r in rivals if r > 0]
        scores.append(max(ious, default=0.0))
    return np.array(scores)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label images differ in their numbers only."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0)
    return len(pairs) == len(np.unique(a)) == len(np.unique(b)) and bool(np.all((pairs == 0).sum(1) % 2 == 0))


def test_discs_that_touch_are_separated() -> None:
    truth = discs((40, 60), [(20, 18), (20, 34)], 9)
    assert ndimage.label(truth > 0)[1] == 1  # one piece of foreground
    found = instances(maps_of_labels(truth))
    assert found.dtype == np.int32
    assert set(np.unique(found)) == {0, 1, 2}
    assert best_iou(truth, found).min() > 0.95
    np.testing.assert_array_equal(found > 0, truth > 0)


def test_without_their_boundary_they_would_be_one() -> None:
    """What separates flat sides is the boundary, not the shape."""
    labels = np.zeros((30, 40), dtype=np.int32)
    labels[5:25, 5:20], labels[5:25, 20:35] = 1, 2
    maps = maps_of_labels(labels)
    assert best_iou(labels, instances(maps)).min() > 0.95
    merged = maps_of_labels((labels > 0).astype(np.int32))
    assert best_iou(labels, instances(merged, min_depth=20)).min() < 0.6


def test_a_long_uneven_object_stays_whole_unless_the_dip_is_deep() -> None:
    """Two discs of radius 8, joined by a broad neck or by a thin one."""
    for half, n_objects in ((6, {0.25: 2, 1.0: 1}), (3, {1.0: 2, 6.0: 1})):
        labels = (discs((40, 70), [(20, 18), (20, 52)], 8) > 0).astype(np.int32)
        labels[20 - half : 21 + half, 18:52] = 1
        for depth, n in n_objects.items():
            assert instances(maps_of_labels(labels), min_depth=depth).max() == n
    wavy = np.zeros((40, 100), dtype=np.int32)
    for x in range(5, 95):
        half = 7 + int(np.sin(x / 4) > 0)
        wavy[20 - half : 21 + half, x] = 1
    assert instances(maps_of_labels(wavy)).max() == 1
    with pytest.raises(ValueError, match="min_depth=-1"):
        instances(maps_of_labels(wavy), min_depth=-1)


@pytest.mark.parametrize("seed", range(4))
def test_perfect_maps_give_the_cells_back(seed: int) -> None:
    truth = cells(seed)
    found = instances(maps_of_labels(truth))
    assert np.mean(best_iou(truth, found) >= 0.5) >= 0.95
    assert np.mean(best_iou(found, truth) >= 0.5) >= 0.95


@pytest.mark.parametrize("seed", range(4))
def test_labels_have_no_gaps_and_lie_in_the_foreground(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = ndimage.gaussian_filter(rng.random((2, 64, 64)), (0, 2, 2))
    maps = (maps - maps.min()) / np.ptp(maps)
    found = instances(maps, min_area=10)
    assert found.max() > 2
    np.testing.assert_array_equal(np.unique(found[found > 0]), np.arange(1, found.max() + 1))
    assert (maps[0][found > 0] > 0.5).all()
    assert np.bincount(found.ravel())[1:].min() >= 10


def test_a_thin_piece_that_touches_an_object_at_a_corner_is_found() -> None:
    labels = np.zeros((60, 60), dtype=np.int32)
    labels[5:25, 5:25] = labels[25:50, 25:27] = 1  # 400 px, and 50 too thin to have an inside
    found = instances(maps_of_labels(labels))
    np.testing.assert_array_equal(found > 0, labels > 0)
    assert sorted(np.bincount(found.ravel())[1:]) == [50, 400]


def test_a_thin_diagonal_line_is_one_object() -> None:
    labels = np.zeros((60, 60), dtype=np.int32)
    labels[np.arange(10, 50), np.arange(10, 50)] = 1
    np.testing.assert_array_equal(instances(maps_of_labels(labels)), labels)


def test_min_area_is_the_least_that_stays() -> None:
    labels = np.zeros((30, 30), dtype=np.int32)
    labels[3:8, 3:8], labels[15:24, 15:24] = 1, 2  # 25 and 81 px
    maps = maps_of_labels(labels)
    assert instances(maps, min_area=25).max() == 2
    found = instances(maps, min_area=26)
    np.testing.assert_array_equal(found, labels == 2)
    assert not instances(maps, min_area=82).any()


def test_threshold_is_exclusive_and_decides_the_foreground() -> None:
    foreground = np.zeros((20, 20), dtype=np.float32)
    foreground[4:16, 4:16] = 0.4
    maps = np.stack([foreground, np.zeros_like(foreground)])
    assert not instances(maps, threshold=0.4).any()
    np.testing.assert_array_equal(instances(maps, threshold=0.39), foreground > 0)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_empty_maps_give_nothing(value: float) -> None:
    found = instances(np.full((2, 17, 9), value, dtype=np.float32))
    assert found.shape == (17, 9)
    assert found.dtype == np.int32
    assert not found.any()


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_separated_objects_turn_with_the_image(turn: int) -> None:
    truth = cells(5, gap=1.0)
    truth[maps_of_labels(truth)[1] > 0] = 0
    truth = ndimage.label(truth)[0]
    maps = maps_of_labels(truth)
    turned = instances(np.rot90(maps, turn, axes=(1, 2)).copy())
    assert turned.max() > 20
    assert same_partition(np.rot90(instances(maps), turn), turned)


def test_renumber_closes_gaps_in_order() -> None:
    labels = np.array([[0, 7, 7], [3, 0, 900]])
    np.testing.assert_array_equal(renumber(labels), [[0, 2, 2], [1, 0, 3]])
    assert renumber(labels).dtype == np.int32
    assert not renumber(np.zeros((2, 2), dtype=np.int64)).any()
