"""Distances of synthetic images from what they were trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.measure import block_reduce

from histoniche.seg import _copies as module
from histoniche.seg._copies import (
    COMPARED_PX,
    copy_ratios,
    draw,
    is_flat,
    nearest,
    patch_grid,
    real_ratios,
    reduced,
    turned,
)


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _variants(patch: np.ndarray) -> list[np.ndarray]:
    """The 8 symmetries, written out."""
    quarter = [patch, patch.swapaxes(1, 2)[:, ::-1], patch[:, ::-1, ::-1], patch.swapaxes(1, 2)[:, :, ::-1]]
    return [*quarter, *[p[:, :, ::-1] for p in quarter]]


def test_the_eight_symmetries_differ_and_are_those_written_out() -> None:
    patch = _noise(0, 2, 5, 5)
    for symmetry, expected in enumerate(_variants(patch)):
        np.testing.assert_array_equal(turned(patch, symmetry), expected)
    assert len({turned(patch, symmetry).tobytes() for symmetry in range(8)}) == 8


def test_patches_are_averaged_to_16_px_and_smaller_ones_stay() -> None:
    large, small = _noise(1, 3, 2, 32, 32), _noise(2, 3, 1, 12, 12)
    assert COMPARED_PX == 16
    np.testing.assert_allclose(reduced(large), block_reduce(large / 255, (1, 1, 2, 2), np.mean), atol=1e-6)
    np.testing.assert_allclose(reduced(small), small / 255, atol=1e-6)


def test_grid_covers_every_field_to_its_edges() -> None:
    pixels = [_noise(3, 1, 40, 33), _noise(4, 1, 16, 16)]
    grid = patch_grid(pixels, 16)
    assert grid.step == 2
    expected = [(0, y, x) for y in range(0, 25, 2) for x in [*range(0, 17, 2), 17]] + [(1, 0, 0)]
    np.testing.assert_array_equal(grid.places, expected)
    np.testing.assert_array_equal(grid.patch(grid.places[-2]), pixels[0][:, 24:40, 17:33])
    np.testing.assert_allclose(grid.compared[5], reduced(pixels[0][None, :, :16, 10:26])[0])


def test_grid_gets_coarser_where_it_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PATCHES", 30)
    grid = patch_grid([_noise(5, 1, 64, 64)], 16)
    assert grid.step == 12  # at 10, 0 to 40 and 48 would be 36
    assert len(grid.places) == 25
    np.testing.assert_array_equal(grid.places[-1], [0, 48, 48])


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Least distance over the symmetries of patches that are not averaged."""
    return min(float(np.sqrt(np.mean((v / 255.0 - b / 255.0) ** 2))) for v in _variants(a))


def test_nearest_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_refined", lambda query, grid, place: (0.25, place + 1))
    pixels = [_noise(6, 2, 40, 40), _noise(7, 2, 36, 44)]
    grid = patch_grid(pixels, 32)
    queries = reduced(_noise(8, 70, 2, 32, 32))  # more than one chunk
    found = nearest(queries, grid)
    for query, row, symmetry in zip(queries, found.rows, found.symmetries, strict=True):
        table = np.array([[np.sqrt(np.mean((v - p) ** 2)) for p in grid.compared] for v in _variants(query)])
        assert table[symmetry, row] == pytest.approx(table.min(), rel=1e-5)
    np.testing.assert_array_equal(found.distances, np.full(70, 0.25))
    np.testing.assert_array_equal(found.places, grid.places[found.rows] + 1)


def test_the_place_is_the_best_of_all_up_to_half_a_step_away() -> None:
    pixels = [_noise(9, 1, 80, 80), _noise(10, 2, 80, 72)[1:]]
    grid = patch_grid(pixels, 64)  # steps of 8
    query = reduced(_noise(11, 1, 1, 64, 64))
    found = nearest(query, grid)
    field, y, x = grid.places[found.rows[0]]
    height, width = pixels[field].shape[1:]
    turned_query = turned(query[0], int(found.symmetries[0]))
    near = {
        (v, u): np.sqrt(np.mean((reduced(pixels[field][None, :, v : v + 64, u : u + 64])[0] - turned_query) ** 2))
        for v in range(max(y - 4, 0), min(y + 4, height - 64) + 1)
        for u in range(max(x - 4, 0), min(x + 4, width - 64) + 1)
    }
    best = min(near, key=near.get)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.places[0], [field, *best])
    assert found.distances[0] == pytest.approx(near[best], rel=1e-5)


@pytest.mark.parametrize("symmetry", range(8))
def test_turned_copies_from_between_the_grid_have_the_distance_0(symmetry: int) -> None:
    smooth = [gaussian_filter(_noise(seed, 1, 40, 40).astype(float), (0, 3, 3)) for seed in (9, 10)]
    pixels = [((image - image.min()) / np.ptp(image) * 255).astype(np.uint8) for image in smooth]
    grid = patch_grid(pixels, 32)  # steps of 4
    copy = np.ascontiguousarray(turned(pixels[1][:, 6:38, 3:35], symmetry))
    found = nearest(reduced(copy[None]), grid)
    assert found.distances[0] == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(found.places[0], [1, 6, 3])
    np.testing.assert_array_equal(turned(copy, int(found.symmetries[0])), grid.patch(found.places[0]))


def test_patches_of_other_fields_are_apart_and_those_excluded_do_not_count() -> None:
    grid = patch_grid([_noise(seed, 1, 20, 20) for seed in (11, 12, 13)], 16)
    apart = grid.apart(np.array([0, 12]))
    np.testing.assert_array_equal(apart, [np.repeat([False, True, True], 9), np.repeat([True, False, True], 9)])
    query = grid.compared[:1]
    assert nearest(query, grid, away_from=[np.array([0])]).places[0, 0] in {1, 2}
    two = nearest(query, grid, away_from=[np.array([0]), np.array([9])])
    assert two.places[0, 0] == 2
    none = nearest(query, grid, away_from=[np.array([0]), np.array([9]), np.array([18])])
    assert none.distances[0] == np.inf


def test_of_few_fields_quarters_that_do_not_overlap_are_apart() -> None:
    grid = patch_grid([_noise(14, 1, 32, 32)], 16)
    corner, other = grid.apart(np.array([0]))[0], grid.places[:, 1:].max(axis=1) == 16
    np.testing.assert_array_equal(corner, other)
    assert sorted(set(grid.groups)) == [0, 1, 2, 3]
    for place, group in zip(grid.places, grid.groups, strict=True):
        assert group == 2 * (place[1] >= 8) + (place[2] >= 8)
    assert not patch_grid([_noise(15, 1, 16, 16)], 16).apart(np.array([0])).any()


def test_ratio_is_that_of_the_nearest_field_to_the_next() -> None:
    pixels = [_noise(seed, 1, 16, 16) for seed in (16, 17, 18)]
    grid = patch_grid(pixels, 16)
    query = _noise(19, 1, 16, 16)
    near = sorted(_distance(query, image) for image in pixels)
    found, others, ratios = copy_ratios(reduced(query[None]), grid)
    assert found.distances[0] == pytest.approx(near[0], rel=1e-5)
    assert others[0] == pytest.approx(near[1], rel=1e-5)
    assert ratios[0] == pytest.approx(near[0] / near[1], rel=1e-5)
    assert copy_ratios(reduced(pixels[1][None]), grid)[2][0] == pytest.approx(0, abs=1e-6)
    twins = patch_grid([pixels[0], pixels[0], pixels[1]], 16)
    assert copy_ratios(reduced(pixels[0][None]), twins)[2][0] == 1  # in two fields: no copy of either
    alone = patch_grid(pixels[:1], 16)
    assert np.isnan(copy_ratios(reduced(query[None]), alone)[2][0])


def test_real_patches_are_compared_with_other_fields_than_their_own() -> None:
    pixels = [_noise(seed, 1, 16, 16) for seed in (20, 21, 22)]
    distances, ratios = real_ratios(patch_grid(pixels, 16))
    pairs = [sorted(_distance(pixels[i], pixels[j]) for j in range(3) if j != i) for i in range(3)]
    np.testing.assert_allclose(distances, [pair[0] for pair in pairs], rtol=1e-5)
    np.testing.assert_allclose(ratios, [pair[0] / pair[1] for pair in pairs], rtol=1e-5)


def test_copies_are_told_from_fresh_images_of_the_same_kind() -> None:
    """Blurred noise of several fields: copies with noise of their own lie below the quantile, new images do not."""
    rng = np.random.default_rng(23)
    images = [gaussian_filter(rng.normal(size=(1, 64, 64)), (0, 2, 2)) for _ in range(5)]
    *training, fresh = [(np.clip(0.5 + image, 0, 1) * 255).astype(np.uint8) for image in images]
    grid = patch_grid(training, 32)
    limit = np.quantile(real_ratios(grid)[1], 0.01)
    for source, lowest, highest in ((training[2], 0.9, 1.0), (fresh, 0.0, 0.1)):
        places = rng.integers(33, size=(40, 2))
        windows = np.stack([source[:, y : y + 32, x : x + 32] for y, x in places])
        noisy = np.clip(windows + rng.normal(0, 5, windows.shape), 0, 255).astype(np.uint8)
        share = np.mean(copy_ratios(reduced(noisy), grid)[2] < limit)
        assert lowest <= share <= highest


def test_flat_patches_are_no_yardstick() -> None:
    flat = np.full((1, 16, 16), 7, dtype=np.uint8)
    np.testing.assert_array_equal(is_flat(reduced(np.stack([flat, _noise(24, 1, 16, 16)]))), [True, False])
    two_tones = np.stack([np.full((16, 16), 0), np.full((16, 16), 255)]).astype(np.uint8)
    assert is_flat(reduced(two_tones[None]))[0]  # each channel shows nothing
    assert not len(real_ratios(patch_grid([flat] * 3, 16))[1])


@pytest.mark.parametrize(("n", "n_channels"), [(3, 1), (12, 3)])
def test_picture_shows_images_above_their_nearest_patches(n: int, n_channels: int, tmp_path: Path) -> None:
    grid = patch_grid([_noise(18, n_channels, 20, 20)], 16)
    images = _noise(19, n, n_channels, 16, 16)
    found, _, ratios = copy_ratios(reduced(images), grid)
    draw(tmp_path / "samples.png", images, grid=grid, found=found, ratios=ratios)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size[1] == pytest.approx(341 * (2 if n > 8 else 1), abs=2)
        assert np.asarray(picture)[..., :3].std() > 30
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


@pytest.mark.parametrize("symmetry", range(8))
def test_patches_are_shown_as_their_images_lie(symmetry: int) -> None:
    patch = _noise(20, 1, 6, 6)
    np.testing.assert_array_equal(module._unturned(turned(patch, symmetry), symmetry), patch)
