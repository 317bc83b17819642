"""Means over hops, and what reduces features before them."""

from __future__ import annotations

import numpy as np
import pytest

from histoniche.models._context import context_means, principal_axes
from histoniche.models._features import Joined, take
from histoniche.neighbors import neighborhood_mean, radius_graph


@pytest.fixture
def tissue():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 200, (300, 2))
    return xy, radius_graph(xy, 20.0), rng.normal(size=(300, 5)).astype(np.float32)


def test_hops_are_means_of_means(tissue):
    _, graph, features = tissue
    once = neighborhood_mean(graph, features)
    twice = neighborhood_mean(graph, once)
    found = context_means(features, graph, [1, 2])
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, np.hstack([once, twice]), atol=2e-3)


def test_context_reads_no_further_than_its_hops(tissue):
    xy, graph, features = tissue
    changed = features.copy()
    changed[0] += 100
    difference = np.abs(
        context_means(changed, graph, [3]).astype(float) - context_means(features, graph, [3]).astype(float)
    ).max(axis=1)
    away = np.linalg.norm(xy - xy[0], axis=1)
    assert (difference[away > 3 * 20.0] == 0).all()
    assert (difference[away < 20.0] > 0).all()


def test_a_linear_reduction_commutes_with_the_means(tissue):
    _, graph, features = tissue
    center, basis = principal_axes(features, 2)
    reduced = context_means(features, graph, [2], center=center, basis=basis)
    np.testing.assert_allclose(
        reduced, (context_means(features, graph, [2]).astype(np.float32) - center) @ basis, atol=5e-3
    )


def test_principal_axes_are_those_of_standardised_features():
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)) * [1, 10, 100, 0.1] + 3).astype(np.float32)
    center, basis = principal_axes(x, 4)
    scores = (x - center) @ basis
    covariance = scores.T @ scores / len(x)
    z = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    np.testing.assert_allclose(np.diag(covariance), np.linalg.eigvalsh(z.T @ z / len(z))[::-1], rtol=1e-3, atol=1e-4)


def test_a_constant_feature_reduces_to_nothing():
    x = np.column_stack([np.full(50, 7.0), np.linspace(0, 1, 50)]).astype(np.float32)
    center, basis = principal_axes(x, 2)
    assert np.isfinite(basis).all()
    np.testing.assert_allclose((x - center) @ basis[:, 1], 0, atol=1e-5)


def test_joined_sources_give_rows_side_by_side():
    class Source:
        shape = (10, 2)

        def take(self, cells):
            return np.stack([cells, -cells], axis=-1).astype(np.float16)

    second = np.arange(10, dtype=np.float16)[:, None] * 2
    joined = Joined(Source(), second)
    assert joined.shape == (10, 3)
    cells = np.array([[3, 1], [1, 9]])
    found = take(joined, cells)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0, 0], [3, -3, 6])
    np.testing.assert_array_equal(found[1, 1], [9, -9, 18])
