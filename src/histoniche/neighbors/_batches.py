"""Neighbourhoods of a batch of cells as padded arrays, without Python lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from ._graph import NeighborGraph


@dataclass(frozen=True)
class Neighborhoods:
    """Padded neighbourhoods of B cells with T tokens each; token 0 is the cell itself.

    Attributes
    ----------
    index
        (B, T) int64, rows of the tokens' cells; padding repeats the cell itself.
    mask
        (B, T) bool, true where there is a token.
    offsets
        (B, T, 2) float32, positions relative to the cell in units of the radius; 0 at padding.
    """

    index: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray


def padded_neighborhoods(
    graph: NeighborGraph,
    xy: np.ndarray,
    centers: np.ndarray,
    radius: float,
    *,
    max_tokens: int,
    seed: int = 0,
    within: float = 1.0,
    keep: float = 1.0,
) -> Neighborhoods:
    """Gather the neighbourhoods of some cells.

    Where a cell has more neighbours than tokens, a random subset is taken. It depends on the seed and the cell alone,
    so it is the same whatever the batch.

    Parameters
    ----------
    graph
        Neighbour graph at ``radius``.
    xy
        (n, 2) float64 centroids in um.
    centers
        (B,) rows of the cells.
    radius
        Radius in um.
    max_tokens
        Most tokens of a neighbourhood, the cell included.
    seed
        Seed of the subsets.
    within
        Share of the radius within which neighbours count (a smaller disc).
    keep
        Share of the neighbours to keep.

    Returns
    -------
    Padded arrays, as wide as the largest neighbourhood needs.
    """
    centers = np.ascontiguousarray(centers, dtype=np.int64)
    counts = graph.indptr[centers + 1] - graph.indptr[centers]
    # `keep` only shortens rows further, and it may be short of a disc that `within` makes smaller.
    widest = int(np.ceil(keep * counts.max())) if len(centers) else 0
    n_tokens = 1 + min(widest, max_tokens - 1)
    index = np.empty((len(centers), n_tokens), dtype=np.int64)
    mask = np.empty((len(centers), n_tokens), dtype=np.bool_)
    offsets = np.empty((len(centers), n_tokens, 2), dtype=np.float32)
    _gather(
        graph.indptr, graph.indices, graph.distances, xy, centers, radius, np.float32(within * radius) if within < 1 else np.float32(np.inf),
        keep, np.uint64(seed), index, mask, offsets,
    )  # fmt: skip
    return Neighborhoods(index, mask, offsets)


@numba.njit(cache=True, inline="always")
def _mix(state):  # type: ignore[no-untyped-def]
    """One step of splitmix64: a well-mixed number from a counter."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _gather(indptr, indices, distances, xy, centers, radius, reach, keep, seed, index, mask, offsets):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    n_tokens = index.shape[1]
    golden = np.uint64(0x9E3779B97F4A7C15)
    buffer = np.empty(0, dtype=np.int32)
    for b in range(len(centers)):
        center = centers[b]
        start, end = indptr[center], indptr[center + 1]
        if end - start > len(buffer):
            buffer = np.empty(2 * (end - start), dtype=np.int32)
        found = 0
        for e in range(start, end):
            if distances[e] <= reach:
                buffer[found] = indices[e]
                found += 1
        taken = min(int(np.ceil(keep * found)), n_tokens - 1)
        if taken < found:
            state = _mix(seed * golden + np.uint64(center) + np.uint64(1))
            for k in range(taken):
                state += golden
                swap = k + int(_mix(state) % np.uint64(found - k))
                buffer[k], buffer[swap] = buffer[swap], buffer[k]
        index[b, 0] = center
        mask[b, 0] = True
        offsets[b, 0, 0] = 0
        offsets[b, 0, 1] = 0
        for t in range(1, n_tokens):
            if t <= taken:
                other = buffer[t - 1]
                index[b, t] = other
                mask[b, t] = True
                offsets[b, t, 0] = (xy[other, 0] - xy[center, 0]) / radius
                offsets[b, t, 1] = (xy[other, 1] - xy[center, 1]) / radius
            else:
                index[b, t] = center
                mask[b, t] = False
                offsets[b, t, 0] = 0
                offsets[b, t, 1] = 0
