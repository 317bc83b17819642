"""Rows of features for neighbourhoods, from memory or from a store on disk."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class FeatureSource(Protocol):
    """Features of n cells that need not lie in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def take(self, cells: np.ndarray) -> np.ndarray:
        """Features (m, d) of some cells."""


def take(features: np.ndarray | FeatureSource, cells: np.ndarray) -> np.ndarray:
    """Features of cells as float32, of the shape of ``cells`` and one axis more."""
    if isinstance(features, np.ndarray):
        return features[cells].astype(np.float32, copy=False)
    unique, inverse = np.unique(cells, return_inverse=True)
    return np.asarray(features.take(unique), dtype=np.float32)[inverse.reshape(cells.shape)]


def rotate(offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn and mirror each neighbourhood at random, (B, T, 2) float32: tissue has no up or down."""
    angle = rng.uniform(0, 2 * np.pi, len(offsets)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    flip = rng.choice(np.array([-1, 1], dtype=np.float32), len(offsets))
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([flip * sin, flip * cos], -1)], 1)
    return np.einsum("bij,btj->bti", turn, offsets)
