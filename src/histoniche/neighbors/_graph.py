"""All cells within a radius, by a grid search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ._grid import count_neighbors, fill_neighbors, make_grid, mean_rows, over_ranges

_COLUMNS = 64
_CONVERTED_AT_ONCE = 1 << 24
"""Features that are converted to float32 at a time, unless this were fewer than 64 columns."""


@dataclass(frozen=True)
class NeighborGraph:
    """Neighbours of every cell in compressed rows; a cell is not its own neighbour.

    Attributes
    ----------
    indptr
        (n + 1,) int64, where the neighbours of each cell begin.
    indices
        (n_edges,) int32, the neighbours, ascending within a cell.
    distances
        (n_edges,) float32, distances in um.
    """

    indptr: np.ndarray
    indices: np.ndarray
    distances: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    @property
    def counts(self) -> np.ndarray:
        """Number of neighbours of every cell, (n,) int64."""
        return np.diff(self.indptr)

    def to_csr(self) -> sparse.csr_matrix:
        """Distances as a sparse (n, n) matrix (squidpy's format); shares memory with the graph."""
        return sparse.csr_matrix((self.distances, self.indices, self.indptr), shape=(self.n_cells, self.n_cells))

    @classmethod
    def from_csr(cls, distances: sparse.csr_matrix) -> NeighborGraph:
        """Read the graph from a sparse matrix of distances."""
        distances = sparse.csr_matrix(distances)
        distances.sort_indices()
        return cls(
            distances.indptr.astype(np.int64),
            distances.indices.astype(np.int32, copy=False),
            distances.data.astype(np.float32, copy=False),
        )


def separate_groups(xy: np.ndarray, groups: np.ndarray | None, gap: float) -> np.ndarray:
    """Move the slides apart along x, so that no two of them come closer than ``gap``; (n, 2) float64."""
    xy = np.ascontiguousarray(xy, dtype=np.float64)
    if groups is None or len(xy) == 0:
        return xy
    _, code = np.unique(groups, return_inverse=True)
    n_groups = int(code.max()) + 1
    if n_groups == 1:
        return xy
    low, high = np.full(n_groups, np.inf), np.full(n_groups, -np.inf)
    np.minimum.at(low, code, xy[:, 0])
    np.maximum.at(high, code, xy[:, 0])
    start = np.concatenate([[0.0], np.cumsum(high - low + 2 * gap)[:-1]])
    moved = xy.copy()
    moved[:, 0] += (start - low)[code]
    return moved


def radius_graph(xy: np.ndarray, radius: float, *, groups: np.ndarray | None = None) -> NeighborGraph:
    """Find all pairs of cells at most a radius apart; exact.

    Parameters
    ----------
    xy
        (n, 2) centroids in um.
    radius
        Radius in um; cells exactly that far apart are neighbours.
    groups
        (n,) slide of each cell; cells of different slides are never neighbours.

    Returns
    -------
    The graph, memory proportional to the number of pairs.
    """
    if not radius > 0 or not np.isfinite(radius):
        msg = f"radius must be positive and finite, got {radius} um."
        raise ValueError(msg)
    grid = make_grid(separate_groups(xy, groups, radius), radius)
    indptr = np.zeros(len(xy) + 1, dtype=np.int64)
    np.cumsum(count_neighbors(grid, radius), out=indptr[1:])
    return NeighborGraph(indptr, *fill_neighbors(grid, radius, indptr))


def neighborhood_mean(graph: NeighborGraph, features: np.ndarray, *, include_self: bool = True) -> np.ndarray:
    """Mean of the features over each cell's neighbourhood.

    Parameters
    ----------
    graph
        Neighbour graph of n cells.
    features
        (n, d) features of any float type.
    include_self
        Whether the cell itself counts; a cell without neighbours always stands for itself.

    Returns
    -------
    (n, d) float32.
    """
    n, d = features.shape
    if n != graph.n_cells:
        msg = f"features have {n} rows for the {graph.n_cells} cells of the graph."
        raise ValueError(msg)
    out = np.empty((n, d), dtype=np.float32)
    # Features of another type are converted a few columns at a time, which bounds the memory of the copy.
    plain = features.dtype == np.float32 and features.flags.c_contiguous
    width = d if plain else max(_COLUMNS, _CONVERTED_AT_ONCE // max(n, 1))
    for column in range(0, d, max(width, 1)):
        block = features if plain else np.ascontiguousarray(features[:, column : column + width], dtype=np.float32)

        def kernel(first: int, last: int, block: np.ndarray = block, column: int = column) -> None:
            mean_rows(graph.indptr, graph.indices, block, include_self, first, last, out, column)

        over_ranges(graph.indptr, kernel)
    return out
