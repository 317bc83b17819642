"""Whole images tile by tile: no seams, no object cut."""

from __future__ import annotations

import threading

import dask.array as da
import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label

from histoniche.seg._instances import instances
from histoniche.seg._segmenter import Segmenter, SegmenterConfig
from histoniche.seg._targets import maps_of_labels
from histoniche.seg._tiled import resampled, tiled_labels, tiled_maps


def box(batch: np.ndarray) -> np.ndarray:
    """Translation-invariant maps that see 3 px around a pixel."""
    mean = ndimage.uniform_filter(batch, (0, 7, 7), mode="mirror")
    return np.stack([mean, 1 - mean**2], axis=1)


def image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(300, 420), (64, 64), (65, 257), (20, 700), (1, 5), (192, 320)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles_of_a_local_predictor_are_the_whole(shape: tuple[int, int], batch_size: int) -> None:
    plane = image(*shape)
    found = tiled_maps(plane, box, tile=128, overlap=32, batch_size=batch_size)
    assert found.shape == (2, *shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.compute(scheduler="threads"), box(plane[None])[0], atol=1e-6)


@pytest.mark.parametrize("chunks", [(300, 420), (37, 100)])
def test_chunks_of_the_image_do_not_matter(chunks: tuple[int, int]) -> None:
    plane = image(300, 420)
    expected = tiled_maps(plane, box, tile=128, overlap=32).compute(scheduler="synchronous")
    lazy = tiled_maps(da.from_array(plane, chunks=chunks), box, tile=128, overlap=32)
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), expected)


def test_a_part_needs_only_its_tiles_and_each_is_predicted_once() -> None:
    seen: list[int] = []

    def counted(batch: np.ndarray) -> np.ndarray:
        seen.append(len(batch))
        return box(batch)

    maps = tiled_maps(image(1000, 1000), counted, tile=128, overlap=32, batch_size=2)
    np.testing.assert_allclose(maps[:, :50, :50].compute(), box(image(1000, 1000)[None])[0][:, :50, :50], atol=1e-6)
    assert sum(seen) == 2
    seen.clear()
    maps.compute(scheduler="threads")
    assert sum(seen) == 11 * 11  # starts 0, 96, ..., 960


def test_blending_goes_smoothly_from_tile_to_tile() -> None:
    calls = iter(range(100))

    def level(batch: np.ndarray) -> np.ndarray:
        return np.stack([np.full((2, *tile.shape), next(calls), dtype=np.float32) for tile in batch])

    row = tiled_maps(image(10, 320), level, tile=128, overlap=64, batch_size=1).compute(scheduler="synchronous")[0, 0]
    # Tiles start at 0, 64, 128, 192; where two overlap, the outer quarter of each (16 px) is not used.
    values = row[[0, 64 + 50, 128 + 50, 192 + 50]].tolist()
    assert sorted(values) == [0, 1, 2, 3]
    for first, before, here in zip((64, 128, 192), values[:-1], values[1:], strict=True):
        assert (row[first : first + 16] == before).all()
        assert (row[first + 48 : first + 64] == here).all()
        between = (row[first : first + 64] - before) / (here - before)
        assert (np.diff(between) >= 0).all()
        assert np.diff(between).max() < 0.06
        np.testing.assert_allclose(between + between[::-1], 1, atol=1e-6)


def test_threads_never_share_the_predictor() -> None:
    busy = threading.Lock()

    def alone(batch: np.ndarray) -> np.ndarray:
        assert busy.acquire(blocking=False)
        try:
            return box(batch)
        finally:
            busy.release()

    tiled_maps(image(500, 500), alone, tile=64, overlap=32, batch_size=1).compute(scheduler="threads", num_workers=4)


def test_tiled_student_is_the_whole_without_seams() -> None:
    student = Segmenter(SegmenterConfig("resnet18", ["DAPI"], decoder_channels=[16, 8, 8, 8, 8]), pretrained=False)
    smooth = ndimage.gaussian_filter(image(320, 448), 3)
    plane = (smooth - smooth.min()) / np.ptp(smooth)
    whole = student.predict_maps(plane[None, None])[0]
    tiled = tiled_maps(plane[None], student.predict_maps, tile=256, overlap=128).compute(scheduler="synchronous")
    difference = np.abs(tiled - whole)
    assert difference.mean() < 0.001 * whole.std()
    assert difference.max() < 0.05 * whole.std()
    columns = np.abs(np.diff(tiled - whole, axis=2)).mean(axis=(0, 1))
    assert columns.max() < 0.005 * whole.std()  # no line where tiles meet
    cut = np.concatenate(
        [student.predict_maps(plane[None, None, :, x : x + 128])[0] for x in range(0, 448, 128)], axis=-1
    )
    assert np.abs(np.diff(cut - whole, axis=2)).mean(axis=(0, 1)).max() > whole.std()  # which tiles side by side have


@pytest.mark.parametrize(
    ("tile", "overlap", "batch"), [(100, 32, 1), (128, 20, 1), (64, 64, 1), (128, 0, 1), (128, 32, 0)]
)
def test_sizes_out_of_range(tile: int, overlap: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"tile={tile} and overlap={overlap} must be multiples of 32"):
        tiled_maps(image(300, 300), box, tile=tile, overlap=overlap, batch_size=batch)


# ---------------------------------------------------------------------------------------------------------- objects
def discs(shape: tuple[int, int], radius: int = 8, step: int = 25, seed: int = 0) -> np.ndarray:
    """Labels of discs on a grid, each moved at random, none touching."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    found = np.zeros(shape, dtype=np.int32)
    for cy in range(step // 2, shape[0], step):
        for cx in range(step // 2, shape[1], step):
            dy, dx = rng.integers(-3, 4, 2)
            found[(y - cy - dy) ** 2 + (x - cx - dx) ** 2 <= radius**2] = found.max() + 1
    return found


def run(maps: np.ndarray, **options: float) -> np.ndarray:
    labels = np.zeros(maps.shape[1:], dtype=np.int32)
    total = 0
    for block in tiled_labels(maps, instances, labels, **options):  # type: ignore[arg-type]
        assert block.before == total
        inside = block.labels > 0
        np.testing.assert_array_equal(labels[block.window][inside], block.labels[inside] + block.before)
        total += int(block.labels.max(initial=0))
    np.testing.assert_array_equal(np.unique(labels), np.arange(total + 1))
    return labels


def same_objects(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label images are the same up to numbers."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return pairs.shape[1] == a.max() + 1 == b.max() + 1


def test_one_block_is_the_untiled_result() -> None:
    maps = np.clip(maps_of_labels(discs((120, 150))) + 0.3 * image(2, 120, 150), 0, 1)
    np.testing.assert_array_equal(run(maps), instances(maps))


@pytest.mark.parametrize("block", [40, 64, 100])
def test_blocks_cut_no_disc(block: int) -> None:
    truth = discs((200, 260))
    found = run(maps_of_labels(truth), block=block, halo=32)
    whole = instances(maps_of_labels(truth))
    assert whole.max() == truth.max()
    assert same_objects(found, whole)


def test_halo_is_widened_for_large_objects() -> None:
    truth = discs((400, 400), radius=60, step=130)
    found = run(maps_of_labels(truth), block=50, halo=8)
    assert same_objects(found, instances(maps_of_labels(truth)))


def test_touching_objects_are_the_same_in_blocks() -> None:
    noise = ndimage.gaussian_filter(image(400, 400), 4)
    foreground = (noise > np.median(noise)).astype(np.float32)
    maps = np.stack([foreground, np.zeros_like(foreground)])
    whole, found = instances(maps), run(maps, block=120, halo=64)
    assert whole.max() > 50
    shared = sum(np.array_equal(whole == n, found == found[whole == n][0]) for n in range(1, whole.max() + 1))
    assert shared >= 0.95 * whole.max()
    assert found.max() == pytest.approx(whole.max(), rel=0.02)
    assert (found > 0).sum() >= 0.99 * (whole > 0).sum()


def test_objects_beyond_the_widest_halo_are_told() -> None:
    maps = np.zeros((2, 8, 1400), dtype=np.float32)
    maps[0, 2:6] = 1
    labels = np.zeros((8, 1400), dtype=np.int32)

    def one(window: np.ndarray) -> np.ndarray:
        return label(window[0] > 0.5).astype(np.int32)

    with pytest.warns(UserWarning, match="14 times an object reaches more than 512 px"):
        blocks = list(tiled_labels(maps, one, labels, block=100, halo=32))
    assert len(blocks) == 14
    assert ((labels > 0) == (maps[0] > 0)).all()


def test_where_blocks_disagree_the_earlier_is_right() -> None:
    labels = np.zeros((10, 40), dtype=np.int32)

    def drifting(window: np.ndarray) -> np.ndarray:
        found = np.zeros(window.shape[1:], dtype=np.int32)
        if window.shape[2] == 25:
            found[:, 10:22] = 1 if window[0, 0, 0] == 0 else 0
            if window[0, 0, 0] != 0:  # the second block starts at x = 15 and sees the object end at 25, and another
                found[:, 3:10], found[:, 12:16] = 1, 2
        return found

    maps = np.broadcast_to(np.arange(40, dtype=np.float32), (2, 10, 40))
    blocks = list(tiled_labels(maps, drifting, labels, block=20, halo=5, least_px=1))
    assert labels[0].tolist() == [0] * 10 + [1] * 12 + [0] * 5 + [2] * 4 + [0] * 9
    assert [block.labels.max() for block in blocks] == [1, 1]


def test_small_objects_are_left_out() -> None:
    truth = np.zeros((60, 60), dtype=np.int32)
    truth[5:15, 5:15], truth[30:50, 30:50] = 1, 2
    found = run(maps_of_labels(truth), least_px=200)
    assert found.max() == 1
    assert found[40, 40] == 1
    assert found[10, 10] == 0


# -------------------------------------------------------------------------------------------------------- resolution
def test_resampling_averages_areas() -> None:
    plane = image(64, 96)
    found = resampled((da.from_array(plane),), 0.5).compute()
    np.testing.assert_allclose(found, plane.reshape(32, 2, 48, 2).mean(axis=(1, 3)), atol=1e-6)


def test_resampling_a_ramp_keeps_places() -> None:
    y, x = np.indices((300, 2500), dtype=np.float32)
    ramp = 3 * (x + 0.5) + 5 * (y + 0.5)
    found = resampled((da.from_array(ramp, chunks=(100, 700)),), 0.7).compute()
    assert found.shape == (210, 1750)
    ty, tx = np.indices(found.shape)
    expected = (3 * (tx + 0.5) + 5 * (ty + 0.5)) / 0.7
    np.testing.assert_allclose(found[2:-2, 2:-2], expected[2:-2, 2:-2], rtol=1e-4)  # also across chunks of 1024


def test_resampling_reads_the_coarsest_level_that_is_fine_enough() -> None:
    pyramid = tuple(da.full((64 // f, 64 // f), f) for f in (1, 2, 4))
    assert (resampled(pyramid, 0.3).compute() == 2).all()
    assert (resampled(pyramid, 0.25).compute() == 4).all()
    assert (resampled(pyramid, 2.0).compute() == 1).all()
