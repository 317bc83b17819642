from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from histoniche.metrics import adjusted_rand
from histoniche.models import _baselines
from histoniche.models._baselines import (
    histology_leiden,
    histology_nolan,
    linear_probe,
    reduce_features,
    sample_rows,
)
from histoniche.models._nolan import NolanResult
from histoniche.neighbors import radius_graph


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


def test_probe_is_logistic_regression_on_standardised_features(blobs):
    features, labels = blobs
    x = features.astype(np.float64) * np.geomspace(0.01, 100, 20)
    result = linear_probe(x[:600], labels[:600], x[600:])
    scaler = StandardScaler().fit(x[:600])
    expected = LogisticRegression(max_iter=1000, tol=1e-6).fit(scaler.transform(x[:600]), labels[:600])
    assert np.allclose(result.probabilities, expected.predict_proba(scaler.transform(x[600:])), atol=0.02)
    assert (result.labels == labels[600:]).mean() > 0.95
    assert result.info["converged"]
    assert result.info["n_train"] == 600


def test_probe_reports_that_it_did_not_converge_without_warning(blobs):
    features, labels = blobs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = linear_probe(features[:600], labels[:600], features[600:], max_iter=1)
    assert not result.info["converged"]
    assert result.info["n_iterations"] == 1


def test_probe_does_not_change_its_input_and_samples(blobs):
    features, labels = blobs
    x = features.astype(np.float32)
    before = x.copy()
    result = linear_probe(x[:600], labels[:600], x[600:], max_train=200, seed=4)
    assert np.array_equal(x, before)
    assert result.info["n_train"] == 200
    assert np.allclose(result.probabilities.sum(1), 1, atol=1e-5)


def test_probe_knows_only_niches_that_were_trained_on(blobs):
    features, labels = blobs
    train = labels < 3
    result = linear_probe(features[train], labels[train], features)
    assert result.info["classes"].tolist() == [0, 1, 2]
    assert set(result.labels) == {0, 1, 2}
    with pytest.raises(ValueError, match="at least two"):
        linear_probe(features[labels == 2], labels[labels == 2], features)


def test_histology_nolan_reduces_features_and_passes_on_the_training_cells(blobs, monkeypatch):
    features, labels = blobs
    xy = np.random.default_rng(1).uniform(0, 500, (900, 2))
    train = np.arange(900) < 600
    seen = {}

    def fake(reduced, graph, coordinates, n_niches, **options):
        seen.update(options, shape=reduced.shape, n_niches=n_niches)
        return NolanResult(np.log(np.eye(5, dtype=np.float32)[labels] + 1e-3), labels)

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
