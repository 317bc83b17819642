"""Agreement of two partitions, and how many niches a partition really has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from ._labels import contingency, encode, encode_pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_SUM_TOLERANCE = 1e-3


def adjusted_rand(reference: ArrayLike, labels: ArrayLike) -> float:
    """Adjusted Rand index of two partitions.

    Parameters
    ----------
    reference, labels
        (n,) labels of any kind, whose names need not agree.

    Returns
    -------
    1 for equal partitions, 0 expected for independent ones; can be negative.

    Raises
    ------
    ValueError
        Different lengths, no cells, missing labels.

    References
    ----------
    Hubert and Arabie 1985, Journal of Classification 2, 193-218.
    """
    (a, _), (b, _) = encode_pair(reference, labels, ("reference", "labels"))
    return float(adjusted_rand_score(a, b))


def normalized_mutual_info(reference: ArrayLike, labels: ArrayLike) -> float:
    """Mutual information of two partitions, divided by the arithmetic mean of their entropies.

    Parameters
    ----------
    reference, labels
        (n,) labels of any kind, whose names need not agree.

    Returns
    -------
    Between 0 (independent) and 1 (equal); not corrected for chance.

    Raises
    ------
    ValueError
        Different lengths, no cells, missing labels.

    References
    ----------
    Vinh, Epps and Bailey 2010, Journal of Machine Learning Research 11, 2837-2854.
    """
    (a, _), (b, _) = encode_pair(reference, labels, ("reference", "labels"))
    return float(normalized_mutual_info_score(a, b, average_method="arithmetic"))


def effective_number(values: ArrayLike) -> float:
    """Effective number of niches, exp(H(mean p)): how many equally large niches would be as diverse.

    Parameters
    ----------
    values
        (n, K) probabilities of niches per cell, whose mean is used; or (K,) floats, such a mean itself; or (n,)
        labels that are not floats, whose frequencies are used.

    Returns
    -------
    Between 1 (all cells in one niche: collapse) and K (all niches equally large).

    Raises
    ------
    ValueError
        No values, or floats that are not probabilities.

    References
    ----------
    Hill number of order 1: Hill 1973, Ecology 54, 427-432.
    """
    array: Any = values if hasattr(values, "dtype") else np.asarray(values)
    if array.ndim == 1 and not (isinstance(array.dtype, np.dtype) and array.dtype.kind == "f"):
        codes, _ = encode(array, "values")
        p = np.bincount(codes).astype(np.float64)
    else:
        p = _mean_probability(np.asarray(array))
    if p.sum() == 0:
        msg = "values is empty: there is no number of niches of no cells."
        raise ValueError(msg)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _mean_probability(p: np.ndarray) -> np.ndarray:
    if p.ndim not in (1, 2) or p.size == 0:
        msg = f"values has the shape {p.shape}; (n, K) or (K,) probabilities, or (n,) labels are needed."
        raise ValueError(msg)
    total = p.sum(axis=-1, dtype=np.float64)
    if not (np.isfinite(total).all() and p.min() >= 0 and np.abs(total - 1).max() <= _SUM_TOLERANCE):
        msg = "values must be probabilities (at least 0, rows that sum to 1): apply a softmax to logits first."
        raise ValueError(msg)
    return p.mean(axis=0, dtype=np.float64) if p.ndim == 2 else p.astype(np.float64)


def match_labels(reference: ArrayLike, labels: ArrayLike) -> dict[Any, Any]:
    """Name the clusters of an unaligned partition after the niches of a reference.

    One-to-one assignment of clusters to niches that maximises the number of cells in agreement.

    Parameters
    ----------
    reference, labels
        (n,) labels of any kind.

    Returns
    -------
    Niche of the reference for each matched cluster, by cluster. Where the numbers differ, the clusters (or niches)
    left over are absent.

    Raises
    ------
    ValueError
        Different lengths, no cells, missing labels.

    References
    ----------
    Hungarian method: Kuhn 1955, Naval Research Logistics Quarterly 2, 83-97.
    """
    (a, niches), (b, clusters) = encode_pair(reference, labels, ("reference", "labels"))
    rows, columns = linear_sum_assignment(contingency(a, b, len(niches), len(clusters)), maximize=True)
    return {_plain(clusters[c]): _plain(niches[r]) for r, c in zip(rows, columns, strict=True)}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
