from __future__ import annotations

import warnings

import numpy as np
import pytest

from histoniche.metrics import Interval, adjusted_rand, block_bootstrap, spatial_blocks
from histoniche.metrics._bootstrap import resample_blocks


def test_blocks_are_squares_of_the_side():
    rng = np.random.default_rng(0)
    xy = rng.uniform(-50, 950, (2000, 2))
    block = spatial_blocks(xy, 250.0)
    assert sorted(set(block)) == list(range(16))
    for b in range(16):
        inside = xy[block == b]
        assert (np.ptp(inside, axis=0) <= 250).all()
    square = [tuple(np.floor((p - xy.min(0)) / 250).astype(int)) for p in xy]
    for i in range(0, 2000, 97):
        assert np.array_equal(block == block[i], [s == square[i] for s in square])


def test_blocks_do_not_span_slides_and_have_no_gaps():
    xy = np.array([[0.0, 0], [1, 1], [0, 0], [5000, 0], [5000, 1]])
    assert spatial_blocks(xy, 100.0).tolist() == [0, 0, 0, 1, 1]
    assert spatial_blocks(xy, 100.0, groups=["a", "a", "b", "b", "b"]).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("xy", "side", "groups", "match"),
    [
        (np.empty((0, 2)), 5.0, None, "at least one cell"),
        (np.array([[0, np.nan]]), 5.0, None, "finite"),
        (np.zeros((3, 3)), 5.0, None, "shape"),
        (np.zeros((3, 2)), 0.0, None, "block_um=0.0"),
        (np.zeros((3, 2)), 5.0, [1, 2], "groups has 2"),
    ],
)
def test_bad_blocks(xy, side, groups, match):
    with pytest.raises(ValueError, match=match):
        spatial_blocks(xy, side, groups=groups)


def test_resamples_draw_as_many_blocks_and_repeat_cells():
    block = np.repeat(np.arange(12), np.arange(1, 13))
    resamples = resample_blocks(block, n_boot=30, seed=1)
    assert resamples.times.shape == (31, 12)
    assert (resamples.times[0] == 1).all()
    assert np.array_equal(resamples.rows(0), np.arange(len(block)))
    assert (resamples.times.sum(1) == 12).all()
    for i in range(1, 31):
        rows = resamples.rows(i)
        assert np.array_equal(np.bincount(rows, minlength=len(block)), resamples.times[i][block])
    assert np.array_equal(resamples.times, resample_blocks(block, n_boot=30, seed=1).times)
    assert not np.array_equal(resamples.times, resample_blocks(block, n_boot=30, seed=2).times)


def test_tables_are_those_of_repeated_cells():
    rng = np.random.default_rng(0)
    block, a, b = rng.integers(0, 9, 400), rng.integers(0, 3, 400), rng.integers(0, 5, 400)
    resamples = resample_blocks(block, n_boot=6)
    tables = resamples.tables(a, b, 4, 5)
    assert tables.shape == (7, 4, 5)
    for i in range(7):
        rows = resamples.rows(i)
        expected = np.zeros((4, 5), dtype=int)
        for row in rows:
            expected[a[row], b[row]] += 1
        assert np.array_equal(tables[i], expected)


def test_interval_is_made_of_quantiles_of_the_replicates():
    rng = np.random.default_rng(0)
    xy, value = rng.uniform(0, 1000, (500, 2)), rng.normal(size=500)
    found = block_bootstrap(xy, lambda rows: value[rows].mean(), block_um=200.0, n_boot=100, confidence=0.8, seed=4)
    assert found.estimate == pytest.approx(value.mean())
    assert found.replicates.shape == (100,)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(found.replicates, [0.1, 0.9])))
    assert found.low < found.estimate < found.high
    again = block_bootstrap(xy, lambda rows: value[rows].mean(), block_um=200.0, n_boot=100, confidence=0.8, seed=4)
    assert np.array_equal(found.replicates, again.replicates)


def test_paired_difference():
    rng = np.random.default_rng(0)
    xy, value = rng.uniform(0, 1000, (500, 2)), rng.normal(size=500)
    a = block_bootstrap(xy, lambda rows: value[rows].mean() + 1, block_um=200.0, n_boot=50)
    b = block_bootstrap(xy, lambda rows: value[rows].mean(), block_um=200.0, n_boot=50)
    gain = a.minus(b)
    assert (gain.estimate, gain.low, gain.high) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="same resamples"):
        a.minus(Interval.of(np.arange(5.0), 0.95))


def test_interval_covers_the_truth_where_cells_of_a_block_are_alike():
    """Blocks of cells with a common error: the block bootstrap covers the mean, a bootstrap of cells would not."""
    covered = {100.0: 0, 1.0: 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        xy = rng.uniform(0, 600, (720, 2))
        square = (xy // 100).astype(int)
        value = rng.normal(size=(6, 6))[square[:, 0], square[:, 1]] + 0.1 * rng.normal(size=720)
        for side in covered:
            found = block_bootstrap(xy, lambda rows, v=value: v[rows].mean(), block_um=side, n_boot=100)
            covered[side] += found.low <= 0 <= found.high
    assert covered[100.0] >= 34
    assert covered[1.0] <= 24


def test_too_few_blocks():
    xy = np.random.default_rng(0).uniform(0, 100, (50, 2))
    with pytest.raises(ValueError, match="smaller block_um"):
        block_bootstrap(xy, len, block_um=200.0)
    with pytest.warns(UserWarning, match="4 blocks only.*smaller block_um"):
        block_bootstrap(xy, len, block_um=60.0, n_boot=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_bootstrap(xy, len, block_um=30.0, n_boot=2)


@pytest.mark.parametrize(("options", "match"), [({"n_boot": 0}, "n_boot=0"), ({"confidence": 95}, "confidence=95")])
def test_bad_parameters(options, match):
    xy = np.random.default_rng(0).uniform(0, 100, (50, 2))
    with pytest.raises(ValueError, match=match):
        block_bootstrap(xy, len, block_um=20.0, **options)


def test_no_global_state():
    xy = np.random.default_rng(0).uniform(0, 100, (50, 2))
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    block_bootstrap(xy, lambda rows: adjusted_rand(rows % 2, rows % 3), block_um=20.0, n_boot=3)
    assert np.array_equal(np.random.get_state()[1], before)
