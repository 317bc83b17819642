"""Dice against a loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest

from histoniche.seg.metrics import dice


@pytest.mark.parametrize("seed", range(10))
def test_loop_over_pixels(seed, pair_of):
    predicted, truth = pair_of(seed)
    both = first = second = 0
    for a, b in zip(predicted.ravel(), truth.ravel(), strict=True):
        both += a > 0 and b > 0
        first += a > 0
        second += b > 0
    expected = 2 * both / (first + second)
    assert dice(predicted, truth) == pytest.approx(expected)
    assert dice(truth, predicted) == dice(predicted, truth)
    assert dice(predicted > 0, truth > 0) == dice(predicted, truth)


def test_hand_made():
    assert dice([[1, 1, 0, 0]], [[0, 5, 5, 0]]) == 0.5
    assert dice([[1, 2, 0]], [[3, 3, 0]]) == 1  # the foreground alone counts
    assert dice([[1, 0]], [[0, 1]]) == 0
    assert dice([[255, 255, 255, 0]], np.array([[255, 0, 0, 0]], dtype=np.uint8)) == 0.5  # sums do not wrap around


def test_empty():
    empty, one = np.zeros((3, 3), dtype=bool), np.eye(3, dtype=int)
    assert dice(empty, empty) == 1
    assert dice(empty, one) == dice(one, empty) == 0
