"""Overlap of foregrounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._check import image_pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def dice(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Dice coefficient of two foregrounds: twice their overlap over the sum of their areas.

    Parameters
    ----------
    predicted, truth
        (y, x) masks of booleans, or label images of integers whose foreground is every label above 0.

    Returns
    -------
    0 (no overlap, or just one of the two is empty) to 1 (equal, or both are empty).

    Raises
    ------
    TypeError
        Neither integers nor booleans.
    ValueError
        Shapes differ or are not (y, x); a negative label.

    References
    ----------
    Dice. Measures of the amount of ecologic association between species. Ecology 26, 1945.
    """
    first, second = (image > 0 for image in image_pair(predicted, truth))
    total = np.count_nonzero(first) + np.count_nonzero(second)
    if total == 0:
        return 1.0
    return 2 * np.count_nonzero(first & second) / total
