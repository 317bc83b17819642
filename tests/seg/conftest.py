"""Small synthetic fields for tests of segmentation."""

from __future__ import annotations

import numpy as np
import pytest

from histoniche.seg import Field


def discs(seed: int, size: int = 96, n: int = 12, radius: int = 8) -> np.ndarray:
    """Label image (size, size) int32 of discs that do not touch."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels, centers = np.zeros((size, size), dtype=np.int32), np.empty((0, 2))
    while len(centers) < n:
        center = rng.uniform(radius, size - radius, 2)
        if len(centers) and np.hypot(*(centers - center).T).min() < 2 * radius + 3:
            n -= rng.random() < 0.05  # no room: fewer discs
            continue
        centers = np.vstack([centers, center])
        labels[(y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2] = len(centers)
    return labels


def nuclei(seed: int, size: int = 96, name: str | None = None) -> Field:
    """Field of bright nuclei with a second stain that fills them, 0.5 um/px."""
    labels = discs(seed, size)
    rng = np.random.default_rng(seed + 1000)
    nucleus = (labels > 0) * 120.0 + rng.normal(20, 4, labels.shape)
    stain = (labels > 0) * 80.0 + rng.normal(30, 4, labels.shape)
    image = np.stack([nucleus, stain]).clip(0, 255).astype(np.uint8)
    return Field(name or f"nuclei{seed}", image, ("DAPI", "membrane"), labels, 0.5)


@pytest.fixture(scope="session")
def fields() -> list[Field]:
    """Six fields of nuclei."""
    return [nuclei(seed) for seed in range(6)]
