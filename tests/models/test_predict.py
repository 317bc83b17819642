from __future__ import annotations

import numpy as np
from scipy.special import softmax

from histoniche.models._predict import consensus
from histoniche.neighbors import radius_graph


def test_consensus_is_the_mean_over_the_discs_around() -> None:
    rng = np.random.default_rng(0)
    xy, logits = rng.uniform(0, 100, (200, 2)), rng.normal(size=(200, 4)).astype(np.float32)
    found = consensus(radius_graph(xy, 15.0), logits)
    assignment = softmax(logits, axis=1)
    for cell in range(200):
        near = ((xy - xy[cell]) ** 2).sum(1) <= 15.0**2  # the cell itself included
        np.testing.assert_allclose(found[cell], np.log(assignment[near].mean(0)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(softmax(found, axis=1).sum(1), 1, rtol=1e-5)


def test_consensus_of_a_cell_without_neighbors_is_its_own() -> None:
    logits = np.array([[2.0, -1.0], [0.0, 3.0]], dtype=np.float32)
    found = consensus(radius_graph(np.array([[0.0, 0.0], [100.0, 0.0]]), 10.0), logits)
    np.testing.assert_allclose(softmax(found, axis=1), softmax(logits, axis=1), rtol=1e-5)


def test_consensus_keeps_certain_logits_finite() -> None:
    logits = np.array([[500.0, -500.0], [500.0, -500.0]], dtype=np.float32)
    assert np.isfinite(consensus(radius_graph(np.array([[0.0, 0.0], [1.0, 0.0]]), 10.0), logits)).all()
