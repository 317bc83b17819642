"""Which probability of foreground counts as foreground."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .metrics import dice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._fields import Field
    from ._segmenter import Segmenter

CANDIDATES = tuple(np.round(np.arange(0.2, 0.81, 0.05), 2).tolist())


def best_threshold(model: Segmenter, fields: Sequence[Field], *, candidates: Sequence[float] = CANDIDATES) -> float:
    """Threshold of the foreground's probability at which mean Dice is best on fields with labels.

    A student that matches probabilities by their squared error says 0.5 where half of such pixels are foreground. Dice is best at
    a lower threshold, half of the Dice that is reached if the probabilities are right. One that was trained on a soft Dice has
    its best threshold near 0.5.

    Parameters
    ----------
    model
        The student; it is left as it is. Take the threshold with ``model.config.threshold = ...``.
    fields
        Fields with labels and the student's channels. What lies outside a field's ``region`` does not count.
    candidates
        Thresholds to choose from, each above 0 and below 1.

    Returns
    -------
    One of the candidates; of equally good ones that nearest to 0.5.

    Raises
    ------
    KeyError
        A field without one of the student's channels.
    ValueError
        No fields, a field without labels, no candidates or some out of range; another um/px than the student's.

    References
    ----------
    Lipton et al. 2014, arXiv 1402.1892.
    """
    fields, tried = list(fields), [float(value) for value in candidates]
    if not fields or not tried or not all(0 < value < 1 for value in tried):
        msg = (
            f"best_threshold was given {len(fields)} fields and candidates={tried}: at least one field with labels, and one "
            "candidate between 0 and 1, are needed."
        )
        raise ValueError(msg)
    reached = np.zeros(len(tried))
    for item in fields:
        truth = item.read_labels() > 0
        foreground = model.predict_field(item)[0]
        seen = np.ones(truth.shape, dtype=bool) if item.region is None else np.asarray(item.region, dtype=bool)
        reached += [dice((foreground > value) & seen, truth & seen) for value in tried]
    best = np.flatnonzero(np.isclose(reached, reached.max(), rtol=0, atol=1e-9))
    return min((tried[i] for i in best), key=lambda value: abs(value - 0.5))
