"""Which cell types niches are made of, and how far two sets of niches differ in that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from ._labels import contingency, encode, encode_pair, partners
from ._tables import composition_jsd_of_tables, hungarian_partners

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def composition(labels: ArrayLike, cell_types: ArrayLike, n_niches: int) -> np.ndarray:
    """Cell type composition of every niche.

    Parameters
    ----------
    labels
        (n,) niche of each cell, integers from 0 to K - 1.
    cell_types
        (n,) cell types of any kind.
    n_niches
        K.

    Returns
    -------
    (K, T) float64, the share of each cell type among the cells of each niche, cell types in sorted order. Rows sum
    to 1; a niche without cells has NaN.

    Raises
    ------
    ValueError
        Niches outside 0 to K - 1, different lengths, missing cell types.
    """
    niche = np.asarray(labels)
    types, values = encode(cell_types, "cell_types")
    if niche.shape != types.shape:
        msg = f"labels has the shape {niche.shape}, cell_types {types.shape}: they must be the same cells."
        raise ValueError(msg)
    if niche.dtype.kind not in "iu" or (niche.size and not 0 <= niche.min() <= niche.max() < n_niches):
        msg = f"labels must be integers from 0 to {n_niches - 1}, one per cell."
        raise ValueError(msg)
    return _frequencies(contingency(niche.astype(np.int64), types, n_niches, len(values)))


def _frequencies(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True).astype(np.float64)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def composition_jsd(
    reference: ArrayLike,
    labels: ArrayLike,
    cell_types: ArrayLike,
    *,
    match: Literal["identity", "hungarian"] = "identity",
) -> float:
    r"""Difference in cell type composition between a reference's niches and predicted ones.

    .. math:: \sum_k w_k \, \mathrm{JSD}_2(p_k \,\|\, q_{m(k)}), \qquad
              \mathrm{JSD}_2(p \,\|\, q) = H_2\big(\tfrac{p + q}{2}\big) - \tfrac{H_2(p) + H_2(q)}{2}

    with :math:`p_k` the cell type composition of niche k of the reference, :math:`q_{m(k)}` that of the predicted
    niche matched to it, and :math:`w_k` the share of the cells that the reference gives to niche k. JSD is the
    Jensen-Shannon *divergence* (not its square root, the distance) to the base 2, so the result lies in [0, 1]. A niche
    of the reference whose match is empty or missing counts 1.

    Parameters
    ----------
    reference, labels
        (n,) labels of any kind.
    cell_types
        (n,) cell types of any kind.
    match
        ``"identity"``: niches of the same name belong together (a distilled student shares the teacher's niches).
        ``"hungarian"``: one-to-one assignment of greatest overlap, see :func:`match_labels` (unaligned clusters).

    Returns
    -------
    0 for equal compositions, 1 for niches that share no cell type.

    Raises
    ------
    ValueError
        Different lengths, no cells, missing labels, unknown ``match``.

    References
    ----------
    Lin 1991, IEEE Transactions on Information Theory 37, 145-151.
    """
    (a, niches), (b, clusters) = encode_pair(reference, labels, ("reference", "labels"))
    _, (types, type_names) = encode_pair(reference, cell_types, ("reference", "cell_types"))
    if match == "identity":
        partner = partners(niches, clusters)
    elif match == "hungarian":
        partner = hungarian_partners(contingency(a, b, len(niches), len(clusters))[None])[0]
    else:
        msg = f"match={match!r} is unknown: 'identity' or 'hungarian'."
        raise ValueError(msg)
    p = contingency(a, types, len(niches), len(type_names))
    q = contingency(b, types, len(clusters), len(type_names))
    return float(composition_jsd_of_tables(p[None], q[None], partner[None])[0])
