from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from histoniche.models._linear_probe import ProbeData, fit_linear_probe


@pytest.fixture(scope="module")
def correlated():
    """Features of very different size, nearly dependent on each other, and niches that they know in part."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(900, 6))
    x = hidden @ rng.normal(size=(6, 24)) + 0.03 * rng.normal(size=(900, 24))
    score = hidden[:, :4] @ rng.normal(size=(4, 4)) + rng.normal(size=(900, 4))
    return (x * np.geomspace(0.01, 100, 24)).astype(np.float32) + 3, np.array([1, 4, 5, 9])[score.argmax(1)]


@pytest.mark.parametrize("penalty", [0.1, 0.001])
def test_equals_logistic_regression_on_standardised_features(correlated, penalty):
    x, y = correlated
    found = fit_linear_probe(ProbeData.of(x.copy()), y, penalties=(penalty,), tolerance=1e-9)
    scaler = StandardScaler().fit(x.astype(float))
    expected = LogisticRegression(C=1 / (penalty * len(y)), tol=1e-8, max_iter=5000).fit(scaler.transform(x), y)
    wanted = expected.predict_proba(scaler.transform(x))
    logits = x @ found.weights + found.intercept
    p = np.exp(logits - logits.max(1, keepdims=True))
    assert np.allclose(p / p.sum(1, keepdims=True), wanted, atol=2e-3)
    assert found.classes.tolist() == [1, 4, 5, 9]
    assert found.info["converged"]
    assert found.info["n_train"] == 900


def test_needs_few_iterations_for_correlated_features(correlated):
    x, y = correlated
    found = fit_linear_probe(ProbeData.of(x.copy()), y, penalties=(1e-4,))
    scaler = StandardScaler().fit(x)
    plain = LogisticRegression(C=1 / (1e-4 * len(y)), max_iter=5000).fit(scaler.transform(x), y)
    assert found.info["n_iterations"] < 0.6 * plain.n_iter_[0]
    one = fit_linear_probe(ProbeData.of(x.copy()), y, penalties=(0.001,), max_iter=1)
    assert not one.info["converged"]


def test_penalty_is_the_best_on_the_cells_held_out():
    """Noise wants a strong penalty; a class between two others is only found with a weak one."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(600, 1))
    y = np.digitize(signal[:, 0], [-0.4, 0.4])
    held = np.arange(600) >= 300
    noisy = np.concatenate([signal + rng.normal(size=(600, 1)), rng.normal(size=(600, 150))], axis=1)
    penalties = (0.3, 0.03, 0.003, 0.0003)
    chosen = []
    for x in (noisy, signal):
        right = []
        for penalty in penalties:
            fit = fit_linear_probe(ProbeData.of(x[~held].astype(np.float32)), y[~held], penalties=(penalty,))
            right.append((fit.classes[(x[held] @ fit.weights + fit.intercept).argmax(1)] == y[held]).mean())
        found = fit_linear_probe(ProbeData.of(x.astype(np.float32)), y, held_out=held, penalties=penalties)
        chosen.append(found.info["penalty"])
        assert right[penalties.index(chosen[-1])] >= max(right) - 0.03
        assert found.info["n_train"] == 600
    assert chosen[0] > chosen[1]


def test_first_features_share_their_statistics(correlated):
    x, y = correlated
    few, all_of = ProbeData.of(x[:, :9].copy()), ProbeData.of(x.copy())
    assert np.allclose(all_of.first(9).gram, few.gram, atol=1e-6)
    a = fit_linear_probe(all_of.first(9), y, penalties=(0.01,), tolerance=1e-9)
    b = fit_linear_probe(few, y, penalties=(0.01,), tolerance=1e-9)
    assert np.allclose(x[:, :9] @ a.weights + a.intercept, x[:, :9] @ b.weights + b.intercept, atol=1e-2)


def test_constant_features_and_bad_input(correlated):
    x, y = correlated
    constant = x.copy()
    constant[:, 3] = 7.5
    found = fit_linear_probe(ProbeData.of(constant), y)
    assert np.isfinite(found.weights).all()
    assert abs(found.weights[3]).max() < 1e-3
    with pytest.raises(ValueError, match="at least two"):
        fit_linear_probe(ProbeData.of(x.copy()), np.ones(900, int))
    with pytest.raises(ValueError, match="all training cells"):
        fit_linear_probe(ProbeData.of(x.copy()), y, held_out=np.ones(900, bool))
    broken = x.copy()
    broken[5, 2] = np.nan
    with pytest.raises(ValueError, match="1 features have NaN"):
        ProbeData.of(broken)
