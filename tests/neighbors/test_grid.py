from __future__ import annotations

import threading

import numba
import numpy as np
import pytest

from histoniche.neighbors import neighborhood_mean, radius_graph
from histoniche.neighbors._grid import _merge, count_around, make_grid, nearest_distance, over_ranges


def tissue(seed: int = 0) -> np.ndarray:
    """A dense cluster, a sparse ground, empty parts, and cells at the same place."""
    rng = np.random.default_rng(seed)
    xy = np.concatenate([rng.normal(40, 3, (500, 2)), rng.uniform(0, 300, (400, 2)), [[900.0, 5.0]] * 3])
    return xy[rng.permutation(len(xy))]


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@pytest.mark.parametrize("radius", [0.5, 6.0, 100.0, 2000.0])
def test_clustered_tissue_against_brute_force(radius: float) -> None:
    xy = tissue()
    graph = radius_graph(xy, radius)
    near = distances(xy, xy) <= radius
    np.fill_diagonal(near, val=False)
    rows, columns = np.nonzero(near)  # row by row, ascending: the order the graph promises
    np.testing.assert_array_equal(np.repeat(np.arange(len(xy)), graph.counts), rows)
    np.testing.assert_array_equal(graph.indices, columns)
    np.testing.assert_allclose(graph.distances, distances(xy, xy)[near], rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    xy = tissue(1)
    features = np.random.default_rng(0).normal(size=(len(xy), 5)).astype(np.float32)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", threads)
        graph = radius_graph(xy, 9.0)
        found.append((graph.indptr, graph.indices, graph.distances, neighborhood_mean(graph, features)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("box", [0.7, 20.0, 5000.0])
def test_counts_and_nearest_at_any_radius(box: float) -> None:
    xy = tissue(2)
    grid = make_grid(xy, box)
    sample = xy[::7]
    expected = distances(sample, xy)
    for radius in (0.1, 8.0, 70.0, 3000.0):
        np.testing.assert_array_equal(count_around(grid, sample, radius), (expected <= radius).sum(1))
    for k in (1, 2, 50, len(xy)):
        np.testing.assert_allclose(nearest_distance(grid, sample, k), np.sort(expected, 1)[:, k - 1], atol=1e-9)


def test_lattice_counts_at_ties() -> None:
    lattice = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), -1).reshape(-1, 2)
    for box in (0.5, 1.0, 2.0):
        assert count_around(make_grid(lattice, box), np.array([[4.0, 4.0]]), 2.0)[0] == 13


def test_merge() -> None:
    rng = np.random.default_rng(3)
    for n_a, n_b in ((0, 0), (0, 4), (5, 0), (7, 11)):
        values = rng.permutation(n_a + n_b)
        a, b = np.zeros(n_a + 1, dtype=np.int64), np.zeros(n_b + 1, dtype=np.int64)
        a[:n_a], b[:n_b] = np.sort(values[:n_a]), np.sort(values[n_a:])
        out = np.full(n_a + n_b + 1, -1)
        assert _merge(a, n_a, b, n_b, out) == n_a + n_b
        np.testing.assert_array_equal(out[:-1], np.arange(n_a + n_b))


@pytest.mark.parametrize("work", [[0, 0, 0, 0], [0, 1], [0, 0, 50, 50, 51], list(range(0, 900, 3))])
def test_ranges_cover_everything_once(work: list[int]) -> None:
    seen: list[int] = []
    lock = threading.Lock()

    def kernel(first: int, last: int) -> None:
        with lock:
            seen.extend(range(first, last))

    over_ranges(np.array(work), kernel)
    assert sorted(seen) == list(range(len(work) - 1))


def test_errors_in_threads_reach_the_caller() -> None:
    def kernel(first: int, last: int) -> None:
        msg = f"{first} to {last}"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="0 to 1"):
        over_ranges(np.array([0, 1]), kernel)
