"""All cells within a radius, by a grid search."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from scipy import sparse

_COLUMNS = 64
"""Columns of the features that are averaged at a time, which bounds the memory of the float32 working copy."""


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
    xy = separate_groups(xy, groups, radius)
    n = len(xy)
    low = xy.min(axis=0)
    extent = xy.max(axis=0) - low
    # A cell of the grid is never smaller than the radius, and there are never many more of them than points.
    side = max(
        radius * (1 + 1e-9), float(np.sqrt(max(extent[0] * extent[1], 1e-12) / (4 * n + 1024))), extent.max() / 2**20
    )
    n_x, n_y = (np.floor(extent / side).astype(np.int64) + 1).tolist()
    column, row = np.floor((xy - low) / side).astype(np.int64).T
    box = row * n_x + column
    order = np.argsort(box, kind="stable").astype(np.int32)
    start = np.zeros(n_x * n_y + 1, dtype=np.int64)
    np.cumsum(np.bincount(box, minlength=n_x * n_y), out=start[1:])
    sorted_xy, sorted_box = xy[order], box[order]
    del column, row, box

    counts = np.zeros(n, dtype=np.int64)
    _count(sorted_xy, sorted_box, order, start, n_x, n_y, radius * radius, counts)
    indptr = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(counts, out=indptr[1:])
    indices = np.empty(indptr[-1], dtype=np.int32)
    distances = np.empty(indptr[-1], dtype=np.float32)
    _fill(xy, sorted_xy, sorted_box, order, start, n_x, n_y, radius * radius, indptr, indices, distances)
    return NeighborGraph(indptr, indices, distances)


@numba.njit(parallel=True, cache=True)
def _count(xy, box, order, start, n_x, n_y, squared, counts):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    for i in numba.prange(len(xy)):
        x, y = xy[i, 0], xy[i, 1]
        row, column = box[i] // n_x, box[i] % n_x
        first, last = max(column - 1, 0), min(column + 1, n_x - 1)
        found = 0
        for other in range(max(row - 1, 0), min(row + 1, n_y - 1) + 1):
            for j in range(start[other * n_x + first], start[other * n_x + last + 1]):
                dx, dy = xy[j, 0] - x, xy[j, 1] - y
                if dx * dx + dy * dy <= squared:
                    found += 1
        counts[order[i]] = found - 1


@numba.njit(parallel=True, cache=True)
def _fill(raw, xy, box, order, start, n_x, n_y, squared, indptr, indices, distances):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    for i in numba.prange(len(xy)):
        x, y = xy[i, 0], xy[i, 1]
        row, column = box[i] // n_x, box[i] % n_x
        first, last = max(column - 1, 0), min(column + 1, n_x - 1)
        at = indptr[order[i]]
        for other in range(max(row - 1, 0), min(row + 1, n_y - 1) + 1):
            for j in range(start[other * n_x + first], start[other * n_x + last + 1]):
                dx, dy = xy[j, 0] - x, xy[j, 1] - y
                if j != i and dx * dx + dy * dy <= squared:
                    indices[at] = order[j]
                    at += 1
        found = indices[indptr[order[i]] : at]
        found.sort()
        for e in range(indptr[order[i]], at):
            dx, dy = raw[indices[e], 0] - x, raw[indices[e], 1] - y
            distances[e] = np.sqrt(dx * dx + dy * dy)


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
    n = graph.n_cells
    weights = sparse.csr_matrix(
        (np.ones(len(graph.indices), dtype=np.float32), graph.indices, graph.indptr), shape=(n, n)
    )
    alone = np.ones(n, dtype=np.float32) if include_self else (graph.counts == 0).astype(np.float32)
    total = (graph.counts + alone).astype(np.float32)[:, None]
    out = np.empty(features.shape, dtype=np.float32)
    for column in range(0, features.shape[1], _COLUMNS):
        block = np.asarray(features[:, column : column + _COLUMNS], dtype=np.float32)
        out[:, column : column + _COLUMNS] = (weights @ block + alone[:, None] * block) / total
    return out
