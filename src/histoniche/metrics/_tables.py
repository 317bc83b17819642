"""Figures of many contingency tables at once, and their intervals by block bootstrap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import entr

from ._bootstrap import Interval, check_confidence, resample_blocks, spatial_blocks
from ._labels import encode, encode_pair, partners

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import ArrayLike

_ROUNDING = 1e-12
"""Mutual information below this, in nats, is the rounding error of sums of entropies."""


def adjusted_rand_of_tables(tables: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of contingency tables (..., A, B), (...,) float64."""
    t = np.asarray(tables, dtype=np.float64)
    n = t.sum(axis=(-2, -1))
    both, in_a, in_b, pairs = (
        0.5 * values for values in (
            (t * (t - 1)).sum(axis=(-2, -1)), _squares(t.sum(axis=-1)) - n, _squares(t.sum(axis=-2)) - n, n * (n - 1),
        )
    )  # fmt: skip
    expected = in_a * in_b / np.maximum(pairs, 1)
    room = (in_a + in_b) / 2 - expected
    # No room is left only where both partitions have a single class, or every cell its own: they are equal.
    return np.divide(both - expected, room, out=np.ones_like(room), where=room > 0)


def normalized_mutual_info_of_tables(tables: np.ndarray) -> np.ndarray:
    """Normalised mutual information of contingency tables (..., A, B), (...,) float64."""
    t = np.asarray(tables, dtype=np.float64)
    p = t / t.sum(axis=(-2, -1), keepdims=True)
    h_a, h_b = entr(p.sum(axis=-1)).sum(-1), entr(p.sum(axis=-2)).sum(-1)
    mutual = np.maximum(h_a + h_b - entr(p).sum(axis=(-2, -1)), 0)
    mutual[mutual < _ROUNDING] = 0
    return np.divide(mutual, (h_a + h_b) / 2, out=np.ones_like(mutual), where=h_a + h_b > 0)


def _squares(counts: np.ndarray) -> np.ndarray:
    return (counts * counts).sum(axis=-1)


def composition_jsd_of_tables(reference: np.ndarray, labels: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Composition distance of tables of niches and cell types.

    Parameters
    ----------
    reference
        (R, A, T) cells of each niche of the reference and cell type.
    labels
        (R, B, T) the same for the predicted niches.
    partner
        (R, A) predicted niche that belongs to each niche of the reference, -1 where there is none.

    Returns
    -------
    (R,) float64, see :func:`histoniche.metrics.composition_jsd`.
    """
    p_total, q_total = reference.sum(axis=-1), labels.sum(axis=-1)
    p = reference / np.maximum(p_total, 1)[..., None]
    q = labels / np.maximum(q_total, 1)[..., None]
    matched = np.maximum(partner, 0)
    q = np.take_along_axis(q, matched[..., None], axis=1)
    divergence = (entr((p + q) / 2).sum(-1) - (entr(p).sum(-1) + entr(q).sum(-1)) / 2) / np.log(2)
    found = (partner >= 0) & (np.take_along_axis(q_total, matched, axis=1) > 0)
    divergence = np.where(found, np.clip(divergence, 0, 1), 1.0)
    return (p_total * divergence).sum(-1) / p_total.sum(-1)


def hungarian_partners(tables: np.ndarray) -> np.ndarray:
    """Predicted niche matched to each niche of the reference in each contingency table, (R, A) int64, -1 for none."""
    out = np.full(tables.shape[:2], -1, dtype=np.int64)
    for partner, table in zip(out, tables, strict=True):
        # A niche that no cell of this table has takes part in no assignment.
        a, b = np.flatnonzero(table.any(axis=1)), np.flatnonzero(table.any(axis=0))
        rows, columns = linear_sum_assignment(table[np.ix_(a, b)], maximize=True)
        partner[a[rows]] = b[columns]
    return out


def bootstrap_agreement(
    reference: ArrayLike,
    labels: Mapping[str, ArrayLike],
    xy: ArrayLike,
    *,
    block_um: float,
    cell_types: ArrayLike | None = None,
    unaligned: Collection[str] = (),
    n_boot: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> dict[str, dict[str, Interval]]:
    """Agreement of several models with a reference, with intervals by spatial block bootstrap.

    The same figures as :func:`block_bootstrap` gives with :func:`adjusted_rand`, :func:`normalized_mutual_info` and
    :func:`composition_jsd`, from one contingency table per block that is added up for each resample, which is
    thousands of times faster. All models see the same resamples, so that the interval of a difference is paired:
    ``found["student"]["ari"].minus(found["probe"]["ari"])``.

    Parameters
    ----------
    reference
        (n,) niches of the reference, of any kind.
    labels
        (n,) niches of each model, by its name.
    xy
        (n, 2) centroids in um.
    block_um
        Side of a block in um, see :func:`block_bootstrap`.
    cell_types
        (n,) cell types of any kind, for the composition.
    unaligned
        Models whose niches are not named after those of the reference; they are matched to them, in each resample anew,
        by Hungarian assignment.
    n_boot
        Number of resamples.
    confidence
        Share of the replicates inside an interval.
    seed
        Seed of the draws.
    groups
        (n,) slide of each cell; a block never spans two slides.

    Returns
    -------
    For each model ``ari``, ``nmi`` and, with cell types, ``jsd``.

    Raises
    ------
    ValueError
        Different lengths, missing labels, parameters that make no sense, all cells in one block.

    References
    ----------
    See :func:`block_bootstrap`.
    """
    check_confidence(confidence)
    (a, niches), _ = encode_pair(reference, np.zeros(len(np.asarray(xy))), ("reference", "xy"))
    resamples = resample_blocks(spatial_blocks(xy, block_um, groups=groups), n_boot=n_boot, seed=seed)
    types = None if cell_types is None else encode_pair(reference, cell_types, ("reference", "cell_types"))[1]
    of_reference = None if types is None else resamples.tables(a, types[0], len(niches), len(types[1]))
    found = {}
    for name, values in labels.items():
        b, clusters = encode(values, f"labels[{name!r}]")
        if len(b) != len(a):
            msg = f"labels[{name!r}] has {len(b)} cells, reference has {len(a)}: they must be the same cells."
            raise ValueError(msg)
        tables = resamples.tables(a, b, len(niches), len(clusters))
        figures = {"ari": adjusted_rand_of_tables(tables), "nmi": normalized_mutual_info_of_tables(tables)}
        if types is not None and of_reference is not None:
            of_labels = resamples.tables(b, types[0], len(clusters), len(types[1]))
            if name in unaligned:
                partner = hungarian_partners(tables)
            else:
                partner = np.broadcast_to(partners(niches, clusters), (len(tables), len(niches)))
            figures["jsd"] = composition_jsd_of_tables(of_reference, of_labels, partner)
        found[name] = {figure: Interval.of(values, confidence) for figure, values in figures.items()}
    return found
