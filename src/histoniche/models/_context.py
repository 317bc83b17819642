"""What lies around a neighbourhood: means of the features over ever wider surroundings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histoniche.neighbors import NeighborGraph, neighborhood_mean

from ._features import take

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._features import FeatureSource

_BLOCK = 16_384
"""Rows that are converted to float32 at a time."""


def context_means(
    features: np.ndarray | FeatureSource,
    graph: NeighborGraph,
    hops: Sequence[int],
    *,
    center: np.ndarray | None = None,
    basis: np.ndarray | None = None,
) -> np.ndarray:
    """Features averaged over h hops: the mean over the neighbourhood, of that the mean over the neighbourhood, and so on.

    After h hops the weights of the cells around are close to a Gaussian of standard deviation ``radius * sqrt(h) / 2``
    along either axis, and zero beyond ``h * radius``. Their cost grows with h, that of a disc as wide with its square.

    Parameters
    ----------
    features
        (n, d) features.
    graph
        Neighbour graph of the n cells.
    hops
        Numbers of hops, at least 1.
    center, basis
        (d,) and (d, c): the means are taken of ``(features - center) @ basis``; of the features themselves by default.

    Returns
    -------
    (n, len(hops) * c) float16, the columns of the first number of hops first; c = d without a basis.
    """
    n, d = features.shape
    reduced = np.empty((n, d if basis is None else basis.shape[1]), dtype=np.float32)
    for start in range(0, n, _BLOCK):
        block = take(features, np.arange(start, min(start + _BLOCK, n)))
        reduced[start : start + _BLOCK] = block if basis is None else (block - center) @ basis
    width = reduced.shape[1]
    out = np.empty((n, len(hops) * width), dtype=np.float16)
    for hop in range(1, max(hops, default=0) + 1):
        reduced = neighborhood_mean(graph, reduced)
        for at in np.flatnonzero(np.asarray(hops) == hop):
            out[:, at * width : (at + 1) * width] = reduced
    return out


def principal_axes(sample: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre (d,) and axes (d, n_components), float32, of standardised features, deviations included.

    Parameters
    ----------
    sample
        (m, d) features.
    n_components
        Number of axes, at most d.

    Returns
    -------
    ``center`` and ``basis`` of :func:`context_means`. Columns are ordered by variance, and signs are fixed.
    """
    center = sample.mean(axis=0, dtype=np.float64)
    std = sample.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6, std, 1.0)
    x = (sample - center) / scale
    _, axes = np.linalg.eigh(x.T @ x / len(x))
    axes = axes[:, ::-1][:, :n_components]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return center.astype(np.float32), (axes / scale[:, None]).astype(np.float32)
