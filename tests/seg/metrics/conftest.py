"""Small random label images."""

from __future__ import annotations

import numpy as np
import pytest


def label_pair(seed, size=14, n=5):
    """Two label images of a few rectangles, the second a disturbed copy of the first, with numbers of its own."""
    rng = np.random.default_rng(seed)
    images = np.zeros((2, size, size), dtype=np.int32)
    for number in range(1, n + 1):
        y, x = rng.integers(0, size - 3, 2)
        height, width = rng.integers(2, 6, 2)
        for image, shift in zip(images, (0, rng.integers(-1, 2)), strict=True):
            if rng.random() < 0.85:
                top, left = max(y + shift, 0), max(x + shift, 0)
                image[top : top + height, left : left + width] = number if image is images[0] else 10 * number
    return images[0], images[1]


@pytest.fixture
def pair_of():
    return label_pair


@pytest.fixture
def relabel():
    """Give objects other numbers, in another order."""

    def change(image, seed=0):
        numbers = np.unique(image[image > 0])
        table = np.zeros(int(image.max()) + 1, dtype=np.int64)
        table[numbers] = 7 * np.random.default_rng(seed).permutation(len(numbers)) + 3
        return table[image]

    return change
