"""Confidence intervals for figures of a tissue: cells are not independent, blocks of tissue nearly are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

_FEW_BLOCKS = 8
"""With fewer blocks than this a percentile interval is too narrow to be relied on."""


@dataclass(frozen=True)
class Interval:
    """A figure, its confidence interval, and the replicates that the interval is made of.

    Attributes
    ----------
    estimate
        The figure of all cells.
    low, high
        Ends of the percentile interval.
    replicates
        (n_boot,) float64, the figure of every resample.
    confidence
        Share of the replicates inside the interval.
    """

    estimate: float
    low: float
    high: float
    replicates: np.ndarray
    confidence: float

    @classmethod
    def of(cls, values: np.ndarray, confidence: float) -> Interval:
        """Interval of a figure of all cells, ``values[0]``, and of its replicates, ``values[1:]``."""
        replicates = np.asarray(values[1:], dtype=np.float64)
        low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2])
        return cls(float(values[0]), float(low), float(high), replicates, confidence)

    def minus(self, other: Interval) -> Interval:
        """Interval of a difference, paired: both figures must come from the same resamples."""
        if len(self.replicates) != len(other.replicates) or self.confidence != other.confidence:
            msg = (
                f"{len(self.replicates)} replicates ({self.confidence:g}) and {len(other.replicates)} "
                f"({other.confidence:g}) are not of the same resamples."
            )
            raise ValueError(msg)
        differences = self.replicates - other.replicates
        return Interval.of(np.concatenate([[self.estimate - other.estimate], differences]), self.confidence)


@dataclass(frozen=True)
class BlockResamples:
    """Resamples of blocks of cells.

    Attributes
    ----------
    block
        (n,) int64, block of every cell, from 0.
    times
        (1 + n_boot, n_blocks) int64, how often each resample holds each block; row 0 holds every block once: the
        tissue itself.
    """

    block: np.ndarray
    times: np.ndarray

    def rows(self, resample: int) -> np.ndarray:
        """Cells of a resample, (m,) int64, a cell as often as its block was drawn."""
        return np.repeat(np.arange(len(self.block)), self.times[resample][self.block])

    def tables(self, a: np.ndarray, b: np.ndarray, n_a: int, n_b: int) -> np.ndarray:
        """Contingency tables of two codings of the cells in every resample, (1 + n_boot, n_a, n_b) int64.

        They are sums of one table per block, so that a resample costs nothing per cell.
        """
        n_blocks = self.times.shape[1]
        flat = np.bincount((self.block * n_a + a) * n_b + b, minlength=n_blocks * n_a * n_b).reshape(n_blocks, -1)
        used = np.flatnonzero(flat.any(axis=0))
        out = np.zeros((len(self.times), n_a * n_b), dtype=np.int64)
        # Counts of cells are exact in float64, whose matrix product is the fast one.
        out[:, used] = np.rint(self.times.astype(np.float64) @ flat[:, used].astype(np.float64))
        return out.reshape(-1, n_a, n_b)


def spatial_blocks(xy: ArrayLike, block_um: float, *, groups: ArrayLike | None = None) -> np.ndarray:
    """Cut a tissue into square blocks.

    Parameters
    ----------
    xy
        (n, 2) centroids in um.
    block_um
        Side of a block in um. The grid begins at the smallest x and y.
    groups
        (n,) slide of each cell; a block never spans two slides.

    Returns
    -------
    (n,) int64, block of each cell; blocks without cells have no number.

    Raises
    ------
    ValueError
        No cells, coordinates that are not finite, a side that is not positive, different lengths.
    """
    xy = np.asarray(xy, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) == 0 or not np.isfinite(xy).all():
        msg = f"xy has the shape {xy.shape}; finite coordinates (n, 2) in um of at least one cell are needed."
        raise ValueError(msg)
    if not (block_um > 0 and np.isfinite(block_um)):
        msg = f"block_um={block_um} must be a positive length in um."
        raise ValueError(msg)
    slide = np.zeros(len(xy), dtype=np.int64)
    if groups is not None:
        slide = np.unique(np.asarray(groups), return_inverse=True)[1]
        if len(slide) != len(xy):
            msg = f"groups has {len(slide)} cells, xy has {len(xy)}: they must be the same cells."
            raise ValueError(msg)
    low = np.full((int(slide.max()) + 1, 2), np.inf)
    np.minimum.at(low, slide, xy)
    square = np.floor((xy - low[slide]) / block_um).astype(np.int64)
    return np.unique(np.column_stack([slide, square]), axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def resample_blocks(block: np.ndarray, *, n_boot: int, seed: int = 0) -> BlockResamples:
    """Draw resamples of blocks with replacement, each of as many blocks as there are.

    Parameters
    ----------
    block
        (n,) int64, block of every cell, from 0; of :func:`spatial_blocks`.
    n_boot
        Number of resamples.
    seed
        Seed of the draws.

    Returns
    -------
    The resamples, and the tissue itself before them.

    Raises
    ------
    ValueError
        A single block, or no resamples.
    """
    n_blocks = int(block.max()) + 1
    if n_boot < 1:
        msg = f"n_boot={n_boot}: at least one resample is needed."
        raise ValueError(msg)
    if n_blocks < 2:
        msg = "All cells lie in one block, which leaves nothing to resample: pass a smaller block_um."
        raise ValueError(msg)
    if n_blocks < _FEW_BLOCKS:
        warnings.warn(
            f"The cells lie in {n_blocks} blocks only: intervals from fewer than {_FEW_BLOCKS} are too narrow. Pass a "
            "smaller block_um, though not below the scale on which errors are alike, or read them as hints.",
            UserWarning,
            stacklevel=2,
        )
    drawn = np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=n_boot)
    return BlockResamples(block, np.concatenate([np.ones((1, n_blocks), dtype=np.int64), drawn]))


def block_bootstrap(
    xy: ArrayLike,
    statistic: Callable[[np.ndarray], float],
    *,
    block_um: float,
    n_boot: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Interval:
    """Confidence interval of any figure of the cells of a tissue, by spatial block bootstrap.

    Cells near each other are alike, so that n cells are worth far fewer than n independent ones, and an interval from
    resampled cells is far too narrow. Here the tissue is cut into square blocks, as many blocks as there are drawn
    with replacement, and the figure computed anew from the cells of the blocks that were drawn. The interval reaches
    from the (1 - confidence) / 2 to the (1 + confidence) / 2 quantile of these replicates.

    Parameters
    ----------
    xy
        (n, 2) centroids in um.
    statistic
        The figure, given rows of cells (m,) int64 in which a cell stands as often as it was drawn, such as
        ``lambda rows: adjusted_rand(teacher[rows], student[rows])``.
    block_um
        Side of a block in um: larger than the distance over which errors are alike, and small enough for a good
        number of blocks.
    n_boot
        Number of resamples.
    confidence
        Share of the replicates inside the interval.
    seed
        Seed of the draws. With the same cells, blocks and seed the resamples are the same, and the difference of two
        figures has a paired interval: :meth:`Interval.minus`.
    groups
        (n,) slide of each cell; a block never spans two slides.

    Returns
    -------
    The figure of all cells, its interval and the replicates.

    Raises
    ------
    ValueError
        Coordinates, side, confidence or number of resamples that make no sense; all cells in one block.

    References
    ----------
    Hall 1985, Stochastic Processes and their Applications 20, 231-246; Lahiri 2003, Resampling Methods for Dependent
    Data, chapter 12.
    """
    check_confidence(confidence)
    resamples = resample_blocks(spatial_blocks(xy, block_um, groups=groups), n_boot=n_boot, seed=seed)
    values = [float(statistic(resamples.rows(i))) for i in range(n_boot + 1)]
    return Interval.of(np.array(values), confidence)


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is not a share."""
    if not 0 < confidence < 1:
        msg = f"confidence={confidence} must lie between 0 and 1, such as 0.95."
        raise ValueError(msg)
