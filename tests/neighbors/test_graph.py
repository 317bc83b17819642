from __future__ import annotations

import numpy as np
import pytest

from histoniche.neighbors import NeighborGraph, neighborhood_mean, radius_graph


def brute_force(xy: np.ndarray, radius: float) -> np.ndarray:
    distances = np.sqrt(((xy[:, None] - xy[None]) ** 2).sum(-1))
    np.fill_diagonal(distances, np.inf)
    return distances


@pytest.mark.parametrize(
    ("n", "extent", "radius"), [(400, 100, 9.0), (400, 100, 300.0), (60, 1e5, 50.0), (2, 1, 2.0), (1, 1, 1)]
)
def test_exact_against_brute_force(n: int, extent: float, radius: float) -> None:
    xy = np.random.default_rng(n).uniform(-extent, extent, (n, 2))
    expected = brute_force(xy, radius)
    graph = radius_graph(xy, radius)
    found = graph.to_csr().toarray()
    np.testing.assert_array_equal(found > 0, expected <= radius)
    np.testing.assert_allclose(found[found > 0], expected[expected <= radius], rtol=1e-5)
    np.testing.assert_array_equal(graph.counts, (expected <= radius).sum(1))
    assert graph.to_csr().has_sorted_indices


def test_a_line_and_a_lattice_with_ties() -> None:
    # Neighbours exactly at the radius count: the four of a lattice point, and those on the line through all.
    lattice = np.stack(np.meshgrid(np.arange(7.0), np.arange(5.0)), -1).reshape(-1, 2)
    counts = radius_graph(lattice, 1.0).counts.reshape(5, 7)
    assert counts[2, 3] == 4
    assert counts[0, 0] == 2
    line = np.column_stack([np.arange(50.0), np.zeros(50)])
    assert radius_graph(line, 2.0).counts[25] == 4


def test_groups_are_never_connected() -> None:
    rng = np.random.default_rng(1)
    xy = rng.uniform(0, 50, (300, 2))
    groups = rng.integers(0, 3, 300)
    found = radius_graph(xy, 10.0, groups=groups).to_csr().toarray()
    expected = (brute_force(xy, 10.0) <= 10.0) & (groups[:, None] == groups[None])
    np.testing.assert_array_equal(found > 0, expected)
    np.testing.assert_allclose(found[expected], brute_force(xy, 10.0)[expected], rtol=1e-4)


def test_rotation_permutation_and_scale() -> None:
    rng = np.random.default_rng(2)
    xy = rng.uniform(0, 100, (500, 2))
    graph = radius_graph(xy, 11.0).to_csr().toarray()
    angle = 0.7
    turned = xy @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) + 1e4
    np.testing.assert_allclose(radius_graph(turned, 11.0).to_csr().toarray(), graph, atol=1e-4)
    order = rng.permutation(500)
    np.testing.assert_array_equal(radius_graph(xy[order], 11.0).to_csr().toarray(), graph[np.ix_(order, order)])
    np.testing.assert_allclose(radius_graph(xy * 3, 33.0).to_csr().toarray(), 3 * graph, rtol=1e-5)


@pytest.mark.parametrize("radius", [0.0, -1.0, np.nan, np.inf])
def test_bad_radius(radius: float) -> None:
    with pytest.raises(ValueError, match="radius must be positive and finite"):
        radius_graph(np.zeros((3, 2)), radius)


def test_csr_round_trip() -> None:
    graph = radius_graph(np.random.default_rng(3).uniform(0, 50, (200, 2)), 8.0)
    again = NeighborGraph.from_csr(graph.to_csr())
    for name in ("indptr", "indices", "distances"):
        np.testing.assert_array_equal(getattr(again, name), getattr(graph, name))


@pytest.mark.parametrize("include_self", [True, False])
def test_neighborhood_mean_against_a_loop(include_self: bool) -> None:
    rng = np.random.default_rng(4)
    xy = rng.uniform(0, 60, (150, 2))
    features = rng.normal(size=(150, 70)).astype(np.float16)
    near = brute_force(xy, 7.0) <= 7.0
    found = neighborhood_mean(radius_graph(xy, 7.0), features, include_self=include_self)
    for i in range(150):
        rows = np.flatnonzero(near[i])
        if include_self or len(rows) == 0:
            rows = np.append(rows, i)
        np.testing.assert_allclose(found[i], features[rows].astype(float).mean(0), atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_neighborhood_mean_of_every_layout(dtype: type) -> None:
    rng = np.random.default_rng(5)
    graph = radius_graph(rng.uniform(0, 60, (150, 2)), 7.0)
    features = rng.normal(size=(150, 200)).astype(dtype)
    expected = neighborhood_mean(graph, features.astype(np.float32))
    assert expected.dtype == np.float32
    for same in (features, np.asfortranarray(features), np.repeat(features, 2, axis=1)[:, ::2]):
        np.testing.assert_allclose(neighborhood_mean(graph, same), expected, rtol=1e-6)
    assert neighborhood_mean(graph, features[:, :0]).shape == (150, 0)
    with pytest.raises(ValueError, match="features have 149 rows for the 150 cells"):
        neighborhood_mean(graph, features[1:])
