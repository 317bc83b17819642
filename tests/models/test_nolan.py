from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.cluster import KMeans

from histoniche.metrics import adjusted_rand, effective_number
from histoniche.models import fit_nolan
from histoniche.models._nolan import _mixture, _Occupancy, _warm_start
from histoniche.models._predict import predict_neighborhoods
from histoniche.neighbors import NeighborGraph, neighborhood_mean, radius_graph

RADIUS = 12.0
QUICK = {"n_steps": 40, "batch_size": 64, "width": 16, "max_tokens": 16}


@pytest.fixture(scope="module")
def tissue() -> tuple[np.ndarray, NeighborGraph, np.ndarray, np.ndarray]:
    """Three bands of unequal width, each with its own mix of three cell types."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 150, (1500, 2))
    band = np.digitize(xy[:, 1], [75, 120])
    mix = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]])
    cell_type = np.array([rng.choice(3, p=mix[b]) for b in band])
    features = (3 * np.eye(3)[cell_type] + rng.normal(size=(1500, 3))).astype(np.float32)
    return features, radius_graph(xy, RADIUS), xy, band


def test_finds_niches_that_cells_alone_do_not_show(tissue: tuple) -> None:
    features, graph, xy, band = tissue
    result = fit_nolan(features, graph, xy, 3, radius=RADIUS, **QUICK)
    assert result.logits.shape == (1500, 3)
    assert result.logits.dtype == np.float32
    found = adjusted_rand(band, result.logits.argmax(1))
    assert found > 0.75
    assert found >= adjusted_rand(band, result.start)
    assert adjusted_rand(band, features.argmax(1)) < 0.4
    assert not result.collapsed
    # Numbered by size, the largest first.
    assert list(np.argsort(-np.bincount(result.start))) == [0, 1, 2]


def test_logits_are_on_the_scale_of_the_teachers_own_temperature(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    soft = fit_nolan(
        features, graph, xy, 3, radius=RADIUS, teacher_temperature=0.5, consensus=False, **{**QUICK, "n_steps": 1}
    )
    hard = fit_nolan(
        features, graph, xy, 3, radius=RADIUS, teacher_temperature=0.05, consensus=False, **{**QUICK, "n_steps": 1}
    )
    np.testing.assert_allclose(hard.logits, 10 * soft.logits, rtol=1e-2, atol=1e-2)
    assert softmax(hard.logits, axis=1).max(1).mean() > softmax(soft.logits, axis=1).max(1).mean()


def test_consensus_is_the_mean_over_the_discs_around_a_cell(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    quick = {**QUICK, "n_steps": 2, "teacher_temperature": 0.3}
    alone = softmax(fit_nolan(features, graph, xy, 3, radius=RADIUS, consensus=False, **quick).logits, axis=1)
    found = softmax(fit_nolan(features, graph, xy, 3, radius=RADIUS, **quick).logits, axis=1)
    for cell in (0, 700, 1499):
        rows = np.append(graph.indices[graph.indptr[cell] : graph.indptr[cell + 1]], cell)
        np.testing.assert_allclose(found[cell], alone[rows].mean(0), atol=1e-4)


def test_the_start_measures_distance_in_units_of_the_spread_inside_niches() -> None:
    # Niches of unequal size at the corners of a triangle, all stretched along one direction that tells nothing of them.
    rng = np.random.default_rng(0)
    niche = rng.choice(3, 1200, p=[0.5, 0.3, 0.2])
    corners = np.array([[0, 0], [3, 0], [1.5, 2.6]])
    x = corners[niche] + rng.normal(size=(1200, 1)) + 0.2 * rng.normal(size=(1200, 2))
    mixture = _mixture(x, 3, 0)
    assert adjusted_rand(niche, mixture.predict(x)) > 0.95
    assert adjusted_rand(niche, KMeans(3, n_init=10, random_state=0).fit_predict(x)) < 0.7
    np.testing.assert_allclose(np.sort(mixture.weights_), [0.2, 0.3, 0.5], atol=0.04)
    np.testing.assert_allclose(mixture.covariances_[0, 1], 1, atol=0.15)


def test_without_training_the_assignment_is_the_posterior_of_the_mixture(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    module, start = _warm_start(features, graph, np.arange(1500), 3, width=8, depth=1, heads=2, seed=0)
    logits = predict_neighborhoods(module, features, graph, xy, radius=RADIUS) / 0.05
    means = neighborhood_mean(graph, features)
    posterior = _mixture(means.astype(np.float64), 3, 0).predict_proba(means)
    np.testing.assert_allclose(np.sort(softmax(logits, axis=1), axis=1), np.sort(posterior, axis=1), atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(1), start)


def test_scale_and_shift_of_the_embedding_do_not_matter(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    one = fit_nolan(features, graph, xy, 3, radius=RADIUS, **QUICK)
    two = fit_nolan(features * 50 + 7, graph, xy, 3, radius=RADIUS, **QUICK)
    assert adjusted_rand(one.logits.argmax(1), two.logits.argmax(1)) > 0.97


def test_same_seed_same_niches_and_no_trace(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    state = torch.get_rng_state()
    one = fit_nolan(features, graph, xy, 3, radius=RADIUS, seed=5, **QUICK)
    two = fit_nolan(features, graph, xy, 3, radius=RADIUS, seed=5, **QUICK)
    np.testing.assert_array_equal(one.logits, two.logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_cells_outside_the_training_part_do_not_train(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    train = xy[:, 0] < 100
    far = xy[:, 0] > 100 + RADIUS
    spoilt = features.copy()
    spoilt[far] = 100.0
    quick = {**QUICK, "n_steps": 10}
    one = fit_nolan(features, graph, xy, 3, radius=RADIUS, train_cells=train, **quick)
    two = fit_nolan(spoilt, graph, xy, 3, radius=RADIUS, train_cells=train, **quick)
    inside = xy[:, 0] < 100 - 2 * RADIUS
    np.testing.assert_array_equal(one.logits[inside], two.logits[inside])


def test_collapse_is_noticed_and_undone(tissue: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    features, graph, xy, _ = tissue
    monkeypatch.setattr(_Occupancy, "update", lambda self, mean: setattr(self, "mean", torch.tensor([1.0, 0, 0])))
    result = fit_nolan(features, graph, xy, 3, radius=RADIUS, consensus=False, **QUICK)
    assert result.collapsed
    assert len(result.history["loss"]) == 1
    np.testing.assert_array_equal(result.logits.argmax(1), result.start)
    assert effective_number(result.logits.argmax(1)) > 2


def test_without_neighbors_or_differences_there_are_no_niches(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    with pytest.raises(ValueError, match="No two of the 1500 cells are neighbours"):
        fit_nolan(features, radius_graph(xy, 1e-6), xy, 3, radius=1e-6, **QUICK)
    with pytest.raises(ValueError, match="features of all 1500 training cells are the same"):
        fit_nolan(np.ones_like(features), graph, xy, 3, radius=RADIUS, **QUICK)


def test_integers_of_numpy(tissue: tuple) -> None:
    features, graph, xy, _ = tissue
    one = fit_nolan(features, graph, xy, 3, radius=RADIUS, seed=2, **{**QUICK, "n_steps": 2})
    numbers = {name: np.int64(value) for name, value in {**QUICK, "n_steps": 2}.items()}
    two = fit_nolan(features, graph, xy, np.int64(3), radius=RADIUS, seed=np.int64(2), **numbers)
    np.testing.assert_array_equal(one.logits, two.logits)
