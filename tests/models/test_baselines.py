from __future__ import annotations

import numpy as np
import pytest

from histoniche.metrics import adjusted_rand
from histoniche.models import _baselines
from histoniche.models._baselines import (
    cell_and_mean,
    coordinates_only,
    histology_leiden,
    histology_nolan,
    neighborhood_probe_labels,
    probe_labels,
    reduce_features,
    sample_rows,
)
from histoniche.models._linear_probe import LinearProbe
from histoniche.models._nolan import NolanResult
from histoniche.neighbors import neighborhood_mean, radius_graph


class Source:
    """Features that are read some cells at a time, as from a store."""

    def __init__(self, features):
        self.features, self.shape, self.most = features, features.shape, 0

    def take(self, cells):
        self.most = max(self.most, len(cells))
        return self.features[cells]


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 900)
    centers = rng.normal(size=(5, 20)) * 2
    return (centers[labels] + rng.normal(size=(900, 20))).astype(np.float16), labels


def test_leiden_finds_the_blobs_and_their_number(blobs):
    features, labels = blobs
    result = histology_leiden(features, 5, seed=1)
    assert result.info["n_clusters"] == 5
    assert set(result.labels) == set(range(5))
    assert adjusted_rand(labels, result.labels) > 0.98
    assert np.array_equal(np.argsort(-np.bincount(result.labels), kind="stable"), np.arange(5))


def test_leiden_searches_the_resolution():
    features = np.random.default_rng(0).uniform(size=(600, 2))  # one connected sheet, which can be cut anywhere
    found = {k: histology_leiden(features, k).info for k in (3, 9)}
    assert [found[k]["n_clusters"] for k in (3, 9)] == [3, 9]
    assert found[3]["resolution"] < found[9]["resolution"]


def test_leiden_is_deterministic_and_ignores_global_state(blobs):
    features, _ = blobs
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = histology_leiden(features, 6, seed=3)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    assert np.array_equal(first.labels, histology_leiden(features, 6, seed=3).labels)


def test_leiden_of_a_sample_labels_the_rest(blobs):
    features, labels = blobs
    result = histology_leiden(features, 5, max_cells=400)
    assert len(result.labels) == 900
    assert adjusted_rand(labels, result.labels) > 0.95


def test_leiden_returns_the_nearest_number_where_none_fits():
    """Two groups of identical cells far apart are never one cluster."""
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 100])
    assert histology_leiden(features, 1, n_neighbors=10).info["n_clusters"] == 2


def test_leiden_needs_enough_cells():
    with pytest.raises(ValueError, match="10 cells are too few"):
        histology_leiden(np.zeros((10, 3)), 2)


def test_jaccard_graph_against_sets():
    rng = np.random.default_rng(0)
    neighbors = np.stack([rng.choice([j for j in range(12) if j != i], 4, replace=False) for i in range(12)])
    graph = _baselines._jaccard_graph(neighbors).toarray()
    lists = [{i, *row} for i, row in enumerate(neighbors.tolist())]
    for i in range(12):
        for j in range(12):
            linked = i < j and (j in lists[i] or i in lists[j])
            expected = len(lists[i] & lists[j]) / len(lists[i] | lists[j]) if linked else 0
            assert graph[i, j] == pytest.approx(expected)


def test_reduce_features_is_a_pca_of_the_fitted_rows(blobs):
    features = blobs[0].astype(np.float32)
    rows = np.arange(300)
    found = reduce_features(blobs[0], 20, fit_rows=rows)
    assert found.dtype == np.float32
    z = (features - features[rows].mean(0)) / features[rows].std(0)
    assert np.allclose(found.std(0), np.sort(found.std(0))[::-1], rtol=0.2)
    # All components together are a rotation: distances are kept.
    assert np.allclose(np.linalg.norm(found[:50, None] - found[None, :50], axis=2), np.linalg.norm(z[:50, None] - z[None, :50], axis=2), atol=0.02)  # fmt: skip
    changed = blobs[0].copy()
    changed[300:] = 0
    assert np.allclose(
        reduce_features(changed, 5, fit_rows=rows)[:300], reduce_features(blobs[0], 5, fit_rows=rows)[:300]
    )


def test_sample_rows():
    rows = np.arange(10, 30)
    assert sample_rows(rows, 50, 0) is rows
    drawn = sample_rows(rows, 5, 0)
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(rows)
    assert np.array_equal(drawn, np.sort(drawn))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_baselines, "_BLOCK", 128)


def test_cell_and_mean_against_the_whole(blobs, small_blocks):
    xy = np.random.default_rng(1).uniform(0, 500, (900, 2))
    graph = radius_graph(xy, 30.0)
    rows = np.random.default_rng(2).choice(900, 300, replace=False)
    source = Source(blobs[0])
    found = cell_and_mean(source, graph, rows)
    assert source.most <= 128
    assert np.array_equal(found[:, :20], blobs[0][rows].astype(np.float32))
    assert np.allclose(found[:, 20:], neighborhood_mean(graph, blobs[0])[rows], atol=1e-5)
    assert np.array_equal(found, cell_and_mean(blobs[0], graph, rows))


def test_probes_label_cells_without_holding_their_means(blobs, small_blocks):
    rng = np.random.default_rng(1)
    graph = radius_graph(rng.uniform(0, 500, (900, 2)), 30.0)
    rows = rng.choice(900, 300, replace=False)
    probe = LinearProbe(
        rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32), np.array([2, 5, 7])
    )
    x = cell_and_mean(blobs[0], graph, rows)
    expected = x @ probe.weights + probe.intercept
    source = Source(blobs[0])
    found = neighborhood_probe_labels(probe, source, graph, rows)
    assert source.most <= 128
    assert (found.labels == probe.classes[expected.argmax(1)]).mean() > 0.99
    p = np.exp(expected - expected.max(1, keepdims=True))
    assert np.allclose(found.probabilities, p / p.sum(1, keepdims=True), atol=1e-3)
    alone = LinearProbe(probe.weights[:20], probe.intercept, probe.classes)
    expected = probe.classes[(x[:, :20] @ alone.weights + alone.intercept).argmax(1)]
    assert np.array_equal(probe_labels(alone, Source(blobs[0]), rows).labels, expected)


def test_reduced_features_and_leiden_from_disk(blobs, small_blocks):
    cells = np.arange(0, 900, 2)
    assert np.array_equal(
        reduce_features(Source(blobs[0]), 4, rows=cells), reduce_features(blobs[0][cells], 4)
    )  # fmt: skip
    found = histology_leiden(Source(blobs[0]), 5, cells=cells)
    assert np.array_equal(found.labels, histology_leiden(blobs[0][cells], 5).labels)


def test_coordinates_only_is_the_vote_of_the_nearest_training_cells():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1, (300, 2)) * [2000, 500]
    niches = np.where(xy[:, 0] < 1000, 3, 8)
    train = (xy[:, 1] < 150) | (xy[:, 1] > 350)
    rows = np.flatnonzero((xy[:, 1] > 200) & (xy[:, 1] < 300))
    found = coordinates_only(xy, niches, train, rows=rows, n_neighbors=5)
    z = (xy - xy[train].mean(0)) / xy[train].std(0)
    for row, label in zip(rows, found.labels, strict=True):
        nearest = np.argsort(((z[train] - z[row]) ** 2).sum(1))[:5]
        assert label == np.bincount(niches[train][nearest]).argmax()
    assert (found.labels == niches[rows]).mean() > 0.9
    changed = np.where(train, niches, 0)
    assert np.array_equal(found.labels, coordinates_only(xy, changed, train, rows=rows, n_neighbors=5).labels)


def test_coordinates_of_one_slide_do_not_vote_in_another():
    rng = np.random.default_rng(0)
    xy = np.tile(rng.uniform(0, 1000, (200, 2)), (2, 1))
    slide = np.repeat([0, 1], 200)
    niches = (xy[:, 0] > 500) ^ (slide == 1)
    train = np.tile(np.arange(200) < 150, 2)
    found = coordinates_only(xy, niches.astype(int), train, groups=slide, n_neighbors=9)
    assert (found.labels == niches).mean() > 0.95
    assert found.info["n_neighbors"] == 9
    assert coordinates_only(xy, niches.astype(int), train).info["n_neighbors"] == 10
    with pytest.raises(ValueError, match="train_cells holds no cell"):
        coordinates_only(xy, niches.astype(int), np.zeros(400, bool))


def test_histology_nolan_reduces_features_and_passes_on_the_training_cells(blobs, monkeypatch):
    features, labels = blobs
    xy = np.random.default_rng(1).uniform(0, 500, (900, 2))
    train = np.arange(900) < 600
    seen = {}

    def fake(reduced, graph, coordinates, n_niches, **options):
        seen.update(options, shape=reduced.shape, n_niches=n_niches)
        logits = np.log(np.eye(5, dtype=np.float32)[labels] + 1e-3)
        return NolanResult(logits, logits, labels)

    monkeypatch.setattr("histoniche.models._nolan.fit_nolan", fake)
    result = histology_nolan(
        features, radius_graph(xy, 40.0), xy, 5, radius=40.0, train_cells=train, n_components=7, seed=9, n_steps=3
    )
    assert seen["shape"] == (900, 7)
    assert seen["n_niches"] == 5
    assert seen["train_cells"] is train
    assert (seen["radius"], seen["seed"], seen["n_steps"]) == (40.0, 9, 3)
    assert np.array_equal(result.labels, labels)
    assert np.allclose(result.probabilities.sum(1), 1)


def test_histology_nolan_with_the_real_thing(blobs):
    features, _ = blobs
    xy = np.random.default_rng(1).uniform(0, 500, (900, 2))
    train = xy[:, 0] < 300
    result = histology_nolan(
        features,
        radius_graph(xy, 40.0),
        xy,
        3,
        radius=40.0,
        train_cells=train,
        n_components=5,
        n_steps=2,
        batch_size=32,
    )
    assert result.probabilities.shape == (900, 3)
    assert set(result.labels) <= {0, 1, 2}
