"""Multinomial logistic regression from features to niches, for many correlated features and many cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import log_softmax

_BLOCK = 16_384
"""Rows whose products are formed at a time."""
PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Strengths of the quadratic penalty that are tried, strongest first."""

_WORSE = 0.01
"""Accuracy below the best at which weaker penalties are no longer tried."""


@dataclass
class ProbeData:
    """Standardised features of the training cells, and what fits on them share.

    Attributes
    ----------
    z
        (m, d) float32 standardised features.
    mean, std
        (d,) float32 of the features; a feature that never changes has std 1.
    gram
        (d, d) float64, mean of the products of the standardised features.
    """

    z: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    gram: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> ProbeData:
        """Standardise features (m, d) of float32 in place."""
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        features -= mean
        std = np.sqrt(np.einsum("ij,ij->j", features, features, dtype=np.float64) / len(features)).astype(np.float32)
        if not np.isfinite(std).all():
            msg = f"{int((~np.isfinite(std)).sum())} features have NaN or infinite values."
            raise ValueError(msg)
        std[std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1
        features /= std
        gram = np.zeros((features.shape[1],) * 2)
        for start in range(0, len(features), _BLOCK):
            block = features[start : start + _BLOCK]
            gram += block.T @ block
        return cls(features, mean, std, gram / len(features))

    def first(self, n_features: int) -> ProbeData:
        """The same of the first features alone; shares memory."""
        n = n_features
        return ProbeData(self.z[:, :n], self.mean[:n], self.std[:n], self.gram[:n, :n])


@dataclass
class LinearProbe:
    """A fitted probe: ``logits = features @ weights + intercept``, of features as they are (not standardised).

    Attributes
    ----------
    weights, intercept
        (d, K) and (K,) float32.
    classes
        (K,) niche of each column.
    info
        What is worth reporting about the fit.
    """

    weights: np.ndarray
    intercept: np.ndarray
    classes: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)


def fit_linear_probe(
    data: ProbeData,
    labels: np.ndarray,
    *,
    held_out: np.ndarray | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    max_iter: int = 200,
    tolerance: float = 1e-4,
) -> LinearProbe:
    r"""Fit a multinomial logistic regression whose penalty is chosen on a part of the training cells.

    Minimises :math:`\mathrm{mean}_i(-\log p_i) + \tfrac{\lambda}{2} \lVert W \rVert^2` over weights W of standardised
    features, by L-BFGS in coordinates in which the curvature at the start is the same in all directions: features of
    images, and means over neighbourhoods, are so correlated that the solver needs several times the iterations without.
    For each :math:`\lambda`, strongest first, a model is fitted without the cells held out, until the share of these that
    it gets right falls by a hundredth; then the best is fitted to all cells.

    Parameters
    ----------
    data
        Features of the training cells.
    labels
        (m,) their niches.
    held_out
        (m,) bool, training cells on which the penalty is chosen, apart from the others in space. Without them the
        first penalty is taken.
    penalties
        Values of :math:`\lambda` to try, strongest first.
    max_iter
        Most iterations of a fit.
    tolerance
        A fit ends where an iteration lowers the loss by less than this share of it; ten times as much while the
        penalty is chosen.

    Returns
    -------
    The probe; ``info`` has the penalty, the number of training cells, the iterations of the last fit and whether it
    converged.

    Raises
    ------
    ValueError
        Training cells of a single niche, or all of them held out.

    References
    ----------
    Liu and Nocedal 1989, Mathematical Programming 45, 503-528 (L-BFGS); the curvature after Boehning 1992, Annals of the
    Institute of Statistical Mathematics 44, 197-200.
    """
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        msg = f"The training cells all lie in niche {classes.tolist()}: a probe needs at least two."
        raise ValueError(msg)
    curvature = data.gram / len(classes)
    everywhere = np.ones(len(y), dtype=np.float32)
    penalty, start = penalties[0], np.zeros((data.z.shape[1] + 1, len(classes)))
    if held_out is not None and held_out.any() and len(penalties) > 1:
        seen = (~held_out).astype(np.float32)
        if not seen.any():
            msg = "held_out holds all training cells: leave some to fit on."
            raise ValueError(msg)
        best = -1.0
        for tried in penalties:
            found, _ = _minimize(data.z, y, seen, tried, curvature, start, max_iter, 10 * tolerance)
            right = float((_logits(data.z[held_out], found).argmax(1) == y[held_out]).mean())
            if right < best - _WORSE:
                break
            if right > best:
                best, penalty, start = right, tried, found
    coefficients, result = _minimize(data.z, y, everywhere, penalty, curvature, start, max_iter, tolerance)
    weights = (coefficients[:-1] / data.std[:, None]).astype(np.float32)
    intercept = (coefficients[-1] - (data.mean / data.std) @ coefficients[:-1]).astype(np.float32)
    info = {
        "penalty": penalty,
        "n_train": len(y),
        "n_iterations": int(result.nit),
        "converged": bool(result.success),
    }
    return LinearProbe(weights, intercept, classes, info)


def _logits(z: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    c = coefficients.astype(np.float32)
    return z @ c[:-1] + c[-1]


def _minimize(  # noqa: PLR0917
    z: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    penalty: float,
    curvature: np.ndarray,
    start: np.ndarray,
    max_iter: int,
    tolerance: float,
) -> tuple[np.ndarray, Any]:
    """Coefficients (d + 1, K), the intercept last, that minimise the weighted mean loss; and what the solver says."""
    factor = cholesky(curvature + penalty * np.eye(len(curvature)), lower=True)
    share = weight / weight.sum(dtype=np.float64)
    rows = np.arange(len(y))

    def coefficients_of(v: np.ndarray) -> np.ndarray:
        v = v.reshape(start.shape)
        return np.concatenate([solve_triangular(factor, v[:-1], lower=True, trans="T"), v[-1:]])

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        c = coefficients_of(v)
        log_p = log_softmax(_logits(z, c), axis=1)
        value = -float(share @ log_p[rows, y]) + 0.5 * penalty * float((c[:-1] ** 2).sum())
        residual = np.exp(log_p, out=log_p)
        residual[rows, y] -= 1
        residual *= share[:, None]
        gradient = (z.T @ residual).astype(np.float64) + penalty * c[:-1]
        gradient = solve_triangular(factor, gradient, lower=True)
        return value, np.concatenate([gradient, residual.sum(axis=0, dtype=np.float64)[None]]).ravel()

    v = np.concatenate([factor.T @ start[:-1], start[-1:]]).ravel()
    options = {"maxiter": max_iter, "ftol": tolerance, "gtol": 1e-7}
    result = minimize(loss, v, jac=True, method="L-BFGS-B", options=options)
    return coefficients_of(result.x), result
