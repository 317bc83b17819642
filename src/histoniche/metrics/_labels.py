"""Labels of cells as integer codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def encode(labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n,) int64 and sorted unique values of labels of any kind; an error where one is missing."""
    labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
    if labels.ndim != 1:
        msg = f"{name} has the shape {labels.shape}; one label per cell, (n,), is needed."
        raise ValueError(msg)
    codes, values = pd.factorize(labels, sort=True)
    if (codes < 0).any():
        msg = f"{name} is missing for {int((codes < 0).sum())} of {len(codes)} cells: leave these cells out."
        raise ValueError(msg)
    return codes.astype(np.int64), np.asarray(values)


def encode_pair(a: Any, b: Any, names: tuple[str, str]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Codes and values of two labellings of the same cells, which must be of the same length and not empty."""
    first, second = encode(a, names[0]), encode(b, names[1])
    if len(first[0]) != len(second[0]):
        msg = f"{names[0]} has {len(first[0])} cells, {names[1]} has {len(second[0])}: they must be the same cells."
        raise ValueError(msg)
    if len(first[0]) == 0:
        msg = f"{names[0]} and {names[1]} have no cells."
        raise ValueError(msg)
    return first, second


def contingency(codes_a: np.ndarray, codes_b: np.ndarray, n_a: int, n_b: int) -> np.ndarray:
    """Number of cells of every pair of labels, (n_a, n_b) int64."""
    return np.bincount(codes_a * n_b + codes_b, minlength=n_a * n_b).reshape(n_a, n_b)


def partners(niches: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Place among the clusters of the one that has a niche's name, (n_niches,) int64; -1 where there is none."""
    if (niches.dtype.kind in "iuf") != (clusters.dtype.kind in "iuf"):
        msg = "Niches are compared by name, but one of reference and labels has numbers, the other has none."
        raise ValueError(msg)
    row_of = {name: row for row, name in enumerate(clusters.tolist())}
    return np.array([row_of.get(name, -1) for name in niches.tolist()], dtype=np.int64)
