from __future__ import annotations

import numpy as np

from histoniche.neighbors import padded_neighborhoods, radius_graph

RADIUS = 10.0


def tissue(n: int = 400) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 80, (n, 2))


def test_whole_neighborhoods_and_offsets() -> None:
    xy = tissue()
    graph = radius_graph(xy, RADIUS)
    centers = np.array([5, 3, 399, 0])
    n = padded_neighborhoods(graph, xy, centers, RADIUS, max_tokens=1000)
    index, mask, offsets = n.index, n.mask, n.offsets
    assert index.shape == mask.shape == offsets.shape[:2] == (4, graph.counts[centers].max() + 1)
    for row, center in enumerate(centers):
        expected = set(graph.indices[graph.indptr[center] : graph.indptr[center + 1]])
        assert index[row, 0] == center
        assert set(index[row, 1:][mask[row, 1:]]) == expected
        np.testing.assert_allclose(
            offsets[row][mask[row]], (xy[index[row][mask[row]]] - xy[center]) / RADIUS, atol=1e-6
        )
        assert (offsets[row][~mask[row]] == 0).all()
        assert (index[row][~mask[row]] == center).all()


def test_subsets_depend_on_cell_and_seed_alone() -> None:
    xy = tissue()
    graph = radius_graph(xy, RADIUS)
    several = padded_neighborhoods(graph, xy, np.arange(50), RADIUS, max_tokens=6, seed=3)
    for cell in (0, 17, 49):
        alone = padded_neighborhoods(graph, xy, np.array([cell]), RADIUS, max_tokens=6, seed=3)
        width = alone.index.shape[1]
        np.testing.assert_array_equal(alone.index[0], several.index[cell, :width])
    other = padded_neighborhoods(graph, xy, np.arange(50), RADIUS, max_tokens=6, seed=4)
    assert (other.index != several.index).any()


def test_subsets_are_drawn_without_replacement_and_evenly() -> None:
    xy = tissue()
    graph = radius_graph(xy, RADIUS)
    center = int(np.argmax(graph.counts))
    neighbors = graph.indices[graph.indptr[center] : graph.indptr[center + 1]]
    drawn = np.zeros(400)
    for seed in range(2000):
        n = padded_neighborhoods(graph, xy, np.array([center]), RADIUS, max_tokens=6, seed=seed)
        index, mask = n.index, n.mask
        found = index[0, 1:][mask[0, 1:]]
        assert len(set(found)) == 5
        drawn[found] += 1
    expected = 2000 * 5 / len(neighbors)
    np.testing.assert_allclose(drawn[neighbors], expected, atol=6 * np.sqrt(expected))
    assert drawn.sum() == 10_000


def test_smaller_disc_and_share_kept() -> None:
    xy = tissue()
    graph = radius_graph(xy, RADIUS)
    local = padded_neighborhoods(graph, xy, np.arange(400), RADIUS, max_tokens=1000, within=0.75)
    distance = np.linalg.norm(local.offsets, axis=-1)
    assert distance.max() <= 0.75 + 1e-6
    inner = radius_graph(xy, 0.75 * RADIUS)
    np.testing.assert_array_equal(local.mask.sum(1) - 1, inner.counts)
    kept = padded_neighborhoods(graph, xy, np.arange(400), RADIUS, max_tokens=1000, keep=0.5)
    np.testing.assert_array_equal(kept.mask.sum(1) - 1, np.ceil(0.5 * graph.counts))


def test_cell_without_neighbors() -> None:
    xy = np.array([[0.0, 0], [100, 100]])
    n = padded_neighborhoods(radius_graph(xy, 1.0), xy, np.array([1]), 1.0, max_tokens=10)
    np.testing.assert_array_equal(n.index, [[1]])
    np.testing.assert_array_equal(n.mask, [[True]])
