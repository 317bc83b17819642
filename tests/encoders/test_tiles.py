"""Reading the image at the encoder's resolution, against brute force and linear ramps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histoniche.encoders._tiles import Slide, blocks_of

SLOPE = 4  # a ramp of 4 per px stays whole numbers when 2 or 4 px are averaged


def _windows(slide: Slide, corners: np.ndarray, size: int) -> np.ndarray:
    region = slide.region(corners.min(axis=0), corners.max(axis=0) + size)
    out = region.windows(corners, size)
    assert out.dtype == torch.float32
    assert out.shape == (len(corners), 3, size, size)
    return out.numpy()


def _ramp(height: int, width: int) -> np.ndarray:
    """Channel 0: 4 (x - 1/2) of the pixel's centre; channel 1: the same of y; channel 2: constant."""
    y, x = np.mgrid[:height, :width]
    return (np.stack([x, y, np.full_like(x, 15)]) * SLOPE).astype(np.uint8)


def _halved(image: np.ndarray) -> np.ndarray:
    c, h, w = image.shape
    mean = image[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).mean(axis=(2, 4))
    assert (mean == np.round(mean)).all()
    return mean.astype(np.uint8)


def _expected(corners: np.ndarray, size: int, scale: float) -> np.ndarray:
    """Coordinates of the centres of target pixels in full-resolution px, as ramp values: (B, 2, size, size)."""
    centres = (corners[:, :, None] + np.arange(size) + 0.5) / scale
    x, y = np.repeat(centres[:, 0, None, :], size, axis=1), np.repeat(centres[:, 1, :, None], size, axis=2)
    return SLOPE * (np.stack([x, y], axis=1) - 0.5)


def test_scale_one_and_whole_corners_are_the_pixels_themselves() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 50, 70), dtype=np.uint8)
    slide = Slide.at((image,), 0.5, 0.5)
    assert slide.scale == 1
    # Inside, over each edge, over a corner, and wholly outside.
    corners = np.array([[3, 4], [0, 0], [-5, 7], [66, 20], [10, -6], [12, 45], [-3, -3], [65, 44], [-40, 0], [200, 90]])
    padded = np.full((3, 50 + 400, 70 + 400), 255, dtype=np.uint8)
    padded[:, 200:250, 200:270] = image
    expected = np.stack([padded[:, 200 + y : 209 + y, 200 + x : 209 + x] for x, y in corners])
    np.testing.assert_array_equal(_windows(slide, corners.astype(float), 9), expected)
    for corner, alone in zip(corners, expected, strict=True):
        np.testing.assert_array_equal(_windows(slide, corner[None].astype(float), 9)[0], alone)


@pytest.mark.parametrize("scale", [1.0, 0.93, 0.61, 0.5, 0.34, 0.25, 1.7, 3.0])
def test_ramp_gives_coordinates_at_any_scale_and_corner(scale: float) -> None:
    slide = Slide((_ramp(56, 60),), scale)
    size = 6
    room = np.array([60, 56]) * scale - size - 2 * np.ceil(scale) - 1
    corners = 1 + scale + np.random.default_rng(1).random((20, 2)) * (room - scale)
    got = _windows(slide, corners, size)
    np.testing.assert_allclose(got[:, :2], _expected(corners, size, scale), atol=2e-3)
    np.testing.assert_allclose(got[:, 2], 60, atol=1e-4)


@pytest.mark.parametrize(("scale", "level"), [(1.0, 0), (0.6, 0), (0.5, 1), (0.3, 1), (0.25, 2), (0.2, 2)])
def test_ramp_through_a_pyramid(scale: float, level: int) -> None:
    full = _ramp(56, 60)
    levels = [full, _halved(full), _halved(_halved(full))]
    # Levels that must not be read are noise.
    noise = np.random.default_rng(2)
    pyramid = tuple(
        image if i == level else noise.integers(0, 256, image.shape, dtype=np.uint8) for i, image in enumerate(levels)
    )
    slide = Slide(pyramid, scale)
    size = 4
    room = np.array([60, 56]) * scale - size - 2
    corners = 1 + noise.random((20, 2)) * (room - 1)
    got = _windows(slide, corners, size)
    np.testing.assert_allclose(got[:, :2], _expected(corners, size, scale), atol=2e-3)


def test_odd_widths_of_a_level_shift_nothing() -> None:
    full = _ramp(57, 59)
    slide = Slide((full, _halved(full)), 0.5)
    assert slide.pyramid[1].shape == (3, 28, 29)
    corners = np.array([[1.0, 2.0], [24.0, 23.0]])
    np.testing.assert_allclose(_windows(slide, corners, 4)[:, :2], _expected(corners, 4, 0.5), atol=2e-3)


def test_finer_images_are_averaged_over_the_target_pixel() -> None:
    image = np.random.default_rng(3).integers(0, 256, (3, 40, 40), dtype=np.uint8)
    got = _windows(Slide((image,), 0.5), np.array([[4.0, 3.0]]), 5)[0]
    brute = image[:, 6:16, 8:18].reshape(3, 5, 2, 5, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(got, brute, atol=1e-3)


@pytest.mark.parametrize("scale", [0.37, 1.0, 2.2])
def test_white_outside(scale: float) -> None:
    slide = Slide((np.zeros((3, 40, 40), dtype=np.uint8),), scale)
    far = np.array([[-30.0, 5.0], [5.0, 40 * scale + 9], [40 * scale + 9, -50.0]])
    np.testing.assert_allclose(_windows(slide, far, 8), 255, atol=1e-3)
    # Half in, half out: black and white meet at the edge of the image.
    half = _windows(slide, np.array([[-4.0, 16 * scale]]), 8)[0]
    assert (half[:, :, :3] >= 255 / 2).all()
    np.testing.assert_allclose(half[:, :, :1], 255, atol=1e-3)
    assert (half[:, :, -2:] == 0).all()


def test_lazy_images_are_read_in_part() -> None:
    class Counting:
        shape = (3, 5000, 5000)

        def __init__(self) -> None:
            self.read = 0

        def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
            part = np.full([len(range(*k.indices(n))) for k, n in zip(key, self.shape, strict=True)], 7, dtype=np.uint8)
            self.read += part.size
            return part

    image = Counting()
    assert (_windows(Slide((image,), 1.0), np.array([[100.0, 200.0], [130.0, 220.0]]), 32) == 7).all()
    assert image.read <= 3 * (62 + 6) * (52 + 6)


def test_blocks_cover_every_point_once() -> None:
    points = np.random.default_rng(4).uniform(-150, 700, (500, 2))
    points[:3] = [[0, 0], [100, 100], [-100, 200]]  # on the lines of the grid
    blocks, corners = blocks_of(points, 100)
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(500))
    assert len(np.unique(corners, axis=0)) == len(blocks) == len(corners)
    for block, corner in zip(blocks, corners, strict=True):
        assert ((points[block] >= corner) & (points[block] < corner + 100)).all()
    np.testing.assert_array_equal(corners, corners[np.lexsort(corners.T)])
    (only,), corner = blocks_of(np.array([[250.0, 30.0]]), 100)
    assert only.tolist() == [0]
    assert corner.tolist() == [[200, 0]]
