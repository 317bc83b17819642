"""Rows of features for neighbourhoods, from memory or from a store on disk."""

from __future__ import annotations

from threading import Lock
from typing import Any, Protocol

import numpy as np

from ._gather import gather_into

_STORE = Lock()
"""Stores keep a cache and are read by one thread at a time."""


class FeatureSource(Protocol):
    """Features of n cells that need not lie in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def take(self, cells: np.ndarray) -> np.ndarray:
        """Features (m, d) of some cells."""


class Lazy:
    """Features in an array that computes what is indexed, such as dask's.

    Parameters
    ----------
    array
        (n, d) features.
    """

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""
        return tuple(self.array.shape)

    def take(self, cells: np.ndarray) -> np.ndarray:
        """Features (m, d) of some cells."""
        return np.asarray(self.array[cells])


class Joined:
    """Features of the same cells from two sources, side by side.

    Parameters
    ----------
    first, second
        (n, d1) and (n, d2) features.
    """

    def __init__(self, first: np.ndarray | FeatureSource, second: np.ndarray | FeatureSource) -> None:
        self.first, self.second = first, second

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d1 + d2)."""
        return self.first.shape[0], self.first.shape[1] + self.second.shape[1]

    def take(self, cells: np.ndarray) -> np.ndarray:
        """Features of cells as float32, of the shape of ``cells`` and one axis more."""
        return take(self, cells)


def take(features: np.ndarray | FeatureSource, cells: np.ndarray) -> np.ndarray:
    """Features of cells as float32, of the shape of ``cells`` and one axis more."""
    cells = np.asarray(cells)
    out = np.empty((cells.size, features.shape[1]), dtype=np.float32)
    _take_into(features, cells.ravel(), out, 0)
    return out.reshape(*cells.shape, features.shape[1])


def _take_into(features: np.ndarray | FeatureSource, rows: np.ndarray, out: np.ndarray, column: int) -> None:
    """Write features of rows (m,) to ``out`` (m, ...) from a column on."""
    if isinstance(features, np.ndarray):
        gather_into(features, rows, out, column)
    elif isinstance(features, Joined):
        _take_into(features.first, rows, out, column)
        _take_into(features.second, rows, out, column + features.first.shape[1])
    else:
        unique, inverse = np.unique(rows, return_inverse=True)
        with _STORE:
            found = np.asarray(features.take(unique))
        gather_into(np.ascontiguousarray(found), inverse, out, column)


def rotate(offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn and mirror each neighbourhood at random, (B, T, 2) float32: tissue has no up or down."""
    angle = rng.uniform(0, 2 * np.pi, len(offsets)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    flip = rng.choice(np.array([-1, 1], dtype=np.float32), len(offsets))
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([flip * sin, flip * cos], -1)], 1)
    return np.einsum("bij,btj->bti", turn, offsets)
