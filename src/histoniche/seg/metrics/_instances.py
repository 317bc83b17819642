"""Which objects are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ._check import image_pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Matches:
    """Objects of a prediction and of the truth, matched one to one.

    Attributes
    ----------
    predicted, truth
        (tp,) labels of the matched objects, pair by pair.
    iou
        (tp,) float64: intersection over union of each pair.
    n_predicted, n_true
        Numbers of objects.
    """

    predicted: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    n_predicted: int
    n_true: int

    @property
    def tp(self) -> int:
        """Objects that are found."""
        return len(self.iou)

    @property
    def fp(self) -> int:
        """Predicted objects that match none of the truth."""
        return self.n_predicted - self.tp

    @property
    def fn(self) -> int:
        """Objects of the truth that match none of the prediction."""
        return self.n_true - self.tp

    @property
    def average_precision(self) -> float:
        """TP / (TP + FP + FN); 1 where there is no object at all."""
        total = self.tp + self.fp + self.fn
        return self.tp / total if total else 1.0

    @property
    def panoptic_quality(self) -> float:
        """Sum of the IoU over TP + FP / 2 + FN / 2; 1 where there is no object at all."""
        total = self.tp + self.fp / 2 + self.fn / 2
        return float(self.iou.sum() / total) if total else 1.0


@dataclass(frozen=True)
class Overlaps:
    """Pairs of objects that share pixels: positions in the labels of both images, and their IoU."""

    labels: tuple[np.ndarray, np.ndarray]
    rows: np.ndarray
    columns: np.ndarray
    iou: np.ndarray

    def match(self, least_iou: float) -> Matches:
        """Match objects one to one; see ``match_instances``."""
        if not 0 <= least_iou < 1:
            msg = f"least_iou={least_iou} must be at least 0 and less than 1."
            raise ValueError(msg)
        use = np.flatnonzero(self.iou > least_iou)
        if least_iou < 0.5:  # above one half no object can have two partners
            use = use[_assign(self.rows[use], self.columns[use], self.iou[use])]
        predicted, truth = self.labels
        return Matches(
            predicted[self.rows[use]], truth[self.columns[use]], self.iou[use], len(predicted), len(truth)
        )  # fmt: skip


def overlaps(predicted: ArrayLike, truth: ArrayLike) -> Overlaps:
    """Count the pixels that objects of two label images share; memory grows with the pairs that touch, not with all."""
    labels, codes, areas = zip(*map(_objects, image_pair(predicted, truth, instances=True)), strict=True)
    both = (codes[0] >= 0) & (codes[1] >= 0)
    pairs, shared = np.unique(codes[0][both] * max(len(labels[1]), 1) + codes[1][both], return_counts=True)
    rows, columns = np.divmod(pairs, max(len(labels[1]), 1))
    return Overlaps(labels, rows, columns, shared / (areas[0][rows] + areas[1][columns] - shared))


def _objects(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the objects, the position of each pixel's label among them (-1: background), and their areas."""
    labels, codes, areas = np.unique(image.ravel(), return_inverse=True, return_counts=True)
    background = int(labels[0] == 0)
    return labels[background:], codes.astype(np.int64) - background, areas[background:]


def _assign(rows: np.ndarray, columns: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Positions of the pairs of a one-to-one matching with the most pairs and, among these, the largest sum of IoU."""
    if len(rows) == 0:
        return np.zeros(0, dtype=np.int64)
    n_rows, n = int(rows.max()) + 1, int(rows.max()) + int(columns.max()) + 2
    # Objects that are linked by no chain of overlaps do not compete: small dense problems instead of a large one.
    part = connected_components(
        coo_array((np.ones(len(rows)), (rows, columns + n_rows)), shape=(n, n)), directed=False
    )[1]
    order = np.argsort(part[rows], kind="stable")
    ends = np.flatnonzero(np.diff(part[rows][order])) + 1
    chosen = []
    for pairs in np.split(order, ends):
        _, i = np.unique(rows[pairs], return_inverse=True)
        _, j = np.unique(columns[pairs], return_inverse=True)
        gain, place = np.zeros((i.max() + 1, j.max() + 1)), np.full((i.max() + 1, j.max() + 1), -1)
        gain[i, j] = 1 + iou[pairs] / (2 * min(gain.shape))  # the second term never outweighs a pair
        place[i, j] = pairs
        best = place[linear_sum_assignment(gain, maximize=True)]
        chosen.append(best[best >= 0])
    return np.sort(np.concatenate(chosen))


def match_instances(predicted: ArrayLike, truth: ArrayLike, *, least_iou: float = 0.5) -> Matches:
    """Match predicted objects to those of the truth, one to one, by intersection over union.

    From ``least_iou=0.5`` on an object cannot match two. Below, the matching with the most pairs is taken, and among these
    the one with the largest sum of IoU (Hungarian assignment).

    Parameters
    ----------
    predicted, truth
        (y, x) label images of integers: 0 is background, every object has a number of its own.
    least_iou
        IoU that a pair must exceed (not just reach, as in the challenge of BBBC038); at least 0 and less than 1.

    Returns
    -------
    Matches with ``tp``, ``fp``, ``fn``, the labels of each pair and its ``iou``.

    Raises
    ------
    TypeError
        No integers: floats, or masks, which do not tell objects apart.
    ValueError
        Shapes differ or are not (y, x); a negative label; ``least_iou`` is out of range.
    """
    return overlaps(predicted, truth).match(least_iou)


def average_precision(predicted: ArrayLike, truth: ArrayLike, *, least_iou: float = 0.5) -> float:
    """Precision at an IoU as in the challenge of BBBC038: TP / (TP + FP + FN).

    Parameters
    ----------
    predicted, truth
        (y, x) label images of integers: 0 is background, every object has a number of its own.
    least_iou
        IoU that an object must exceed to count as found; at least 0 and less than 1.

    Returns
    -------
    0 to 1; 1 where both images are empty, 0 where just one is.

    Raises
    ------
    TypeError
        No integers: floats, or masks, which do not tell objects apart.
    ValueError
        Shapes differ or are not (y, x); a negative label; ``least_iou`` is out of range.

    References
    ----------
    Caicedo et al. Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl. Nature Methods 16, 2019.
    """
    return match_instances(predicted, truth, least_iou=least_iou).average_precision


def panoptic_quality(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Panoptic quality of one class: sum of the IoU of matched objects over TP + FP / 2 + FN / 2; matches exceed 0.5.

    Parameters
    ----------
    predicted, truth
        (y, x) label images of integers: 0 is background, every object has a number of its own.

    Returns
    -------
    0 to 1; 1 where both images are empty, 0 where just one is.

    Raises
    ------
    TypeError
        No integers: floats, or masks, which do not tell objects apart.
    ValueError
        Shapes differ or are not (y, x); a negative label.

    References
    ----------
    Kirillov, He, Girshick, Rother & Dollar. Panoptic segmentation. CVPR 2019.
    """
    return match_instances(predicted, truth, least_iou=0.5).panoptic_quality
