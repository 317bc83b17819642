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
    its best threshold near 0.5. What few fields say is uncertain, and a threshold far off costs more than one at 0.5: with several
    fields, the best is taken only where its mean gain in Dice exceeds the standard error of that gain.

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
    One of the candidates: the best, of equally good ones that nearest to 0.5; or that nearest to 0.5 of all, where the best gains too
    little over it.

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
    reached = np.zeros((len(fields), len(tried)))
    for row, item in zip(reached, fields, strict=True):
        truth = item.read_labels() > 0
        foreground = model.predict_field(item)[0]
        seen = np.ones(truth.shape, dtype=bool) if item.region is None else np.asarray(item.region, dtype=bool)
        row[:] = [dice((foreground > value) & seen, truth & seen) for value in tried]
    nearest_first = sorted(range(len(tried)), key=lambda i: abs(tried[i] - 0.5))
    means = reached.mean(axis=0)
    best = next(i for i in nearest_first if np.isclose(means[i], means.max(), rtol=0, atol=1e-9))
    default = nearest_first[0]
    if len(fields) > 1:
        gain = reached[:, best] - reached[:, default]
        if gain.mean() <= gain.std(ddof=1) / np.sqrt(len(gain)):
            return tried[default]
    return tried[best]
