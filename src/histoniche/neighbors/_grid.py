"""Kernels of the radius search: cells sorted by the box of a grid, boxes searched row by row.

All kernels release the GIL and are called from threads, one range of boxes each. Numba's own parallel loops are not
used: they take longer to compile, and its default threading layer ends the process where two threads enter it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

_RANGES_PER_THREAD = 8
"""Dense and empty parts of a tissue even out over the threads."""

_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Grid:
    """Cells sorted by the box they lie in; boxes are at least a radius wide.

    Attributes
    ----------
    x, y
        (n,) float64 centroids in um, box by box.
    order
        (n,) int32, the cell at each place; ascending within a box.
    start
        (n_x * n_y + 1,) int64, where each box begins; boxes are numbered row by row.
    n_x, n_y
        Boxes along x and y.
    low
        (2,) corner of the first box in um.
    side
        Width of a box in um.
    """

    x: np.ndarray
    y: np.ndarray
    order: np.ndarray
    start: np.ndarray
    n_x: int
    n_y: int
    low: np.ndarray
    side: float


def make_grid(xy: np.ndarray, radius: float) -> Grid:
    """Sort cells (n, 2), float64, into boxes."""
    n = len(xy)
    low = xy.min(axis=0)
    extent = xy.max(axis=0) - low
    # A box is never smaller than the radius, and there are never many more of them than cells.
    side = max(
        radius * (1 + 1e-9), float(np.sqrt(max(extent[0] * extent[1], 1e-12) / (4 * n + 1024))), extent.max() / 2**20
    )
    n_x, n_y = (np.floor(extent / side).astype(np.int64) + 1).tolist()
    start = np.zeros(n_x * n_y + 1, dtype=np.int64)
    x, y, order = np.empty(n), np.empty(n), np.empty(n, dtype=np.int32)
    _sort(xy, low[0], low[1], side, n_x, start, x, y, order)
    return Grid(x, y, order, start, n_x, n_y, low, side)


def over_ranges(before: np.ndarray, kernel: Callable[[int, int], None]) -> None:
    """Call ``kernel(first, last)`` from threads, for ranges of about equal work that together are all items.

    Parameters
    ----------
    before
        (m + 1,) work before each of m items, and in all.
    kernel
        Must release the GIL.
    """
    threads = numba.config.NUMBA_NUM_THREADS
    wanted = np.linspace(before[0], before[-1], threads * _RANGES_PER_THREAD + 1)[1:-1]
    cuts = np.unique([0, *np.searchsorted(before, wanted).tolist(), len(before) - 1])
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(kernel, a, b) for a, b in pairwise(cuts.tolist())]:
            done.result()


def count_neighbors(grid: Grid, radius: float) -> np.ndarray:
    """Number of neighbours of every cell, (n,) int64."""
    counts = np.empty(len(grid.x), dtype=np.int64)

    def kernel(first: int, last: int) -> None:
        _count(grid.x, grid.y, grid.order, grid.start, grid.n_x, grid.n_y, radius * radius, first, last, counts)

    over_ranges(grid.start[:: grid.n_x], kernel)
    return counts


def count_around(grid: Grid, points: np.ndarray, radius: float) -> np.ndarray:
    """Number of cells at most any radius from some points (m, 2), (m,) int64; a cell at a point counts."""
    counts = np.empty(len(points), dtype=np.int64)
    _count_around(grid.x, grid.y, grid.start, grid.n_x, grid.n_y, grid.low, grid.side, points, radius, counts)
    return counts


def nearest_distance(grid: Grid, points: np.ndarray, k: int) -> np.ndarray:
    """Distance in um from points (m, 2) to their k-th nearest cell, (m,) float64; k is at most the number of cells."""
    nearest = np.empty(len(points))
    _nearest(grid.x, grid.y, grid.start, grid.n_x, grid.n_y, grid.low, grid.side, points, k, nearest)
    return nearest


def fill_neighbors(grid: Grid, radius: float, indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours, ascending within a cell, and their distances: int32 and float32, as long as ``indptr`` says."""
    indices = np.empty(indptr[-1], dtype=np.int32)
    distances = np.empty(indptr[-1], dtype=np.float32)

    def kernel(first: int, last: int) -> None:
        _fill(
            grid.x, grid.y, grid.order, grid.start, grid.n_x, grid.n_y, radius * radius, first, last,
            indptr, indices, distances,
        )  # fmt: skip

    over_ranges(grid.start[:: grid.n_x], kernel)
    return indices, distances


@numba.njit(nogil=True, cache=True)
def _sort(xy, low_x, low_y, side, n_x, start, x, y, order):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Counting sort: as many passes over the cells as there are arrays, and no comparison."""
    n = len(xy)
    box = np.empty(n, dtype=np.int64)
    for i in range(n):
        box[i] = int(np.floor((xy[i, 1] - low_y) / side)) * n_x + int(np.floor((xy[i, 0] - low_x) / side))
        start[box[i] + 1] += 1
    for b in range(1, len(start)):
        start[b] += start[b - 1]
    place = start[:-1].copy()
    for i in range(n):
        at = place[box[i]]
        place[box[i]] += 1
        x[at], y[at], order[at] = xy[i, 0], xy[i, 1], i


@numba.njit(nogil=True, cache=True)
def _count(x, y, order, start, n_x, n_y, squared, first, last, counts):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    for row in range(first, last):
        for column in range(n_x):
            left, right = max(column - 1, 0), min(column + 1, n_x - 1) + 1
            for i in range(start[row * n_x + column], start[row * n_x + column + 1]):
                found = 0
                for other in range(max(row - 1, 0), min(row + 1, n_y - 1) + 1):
                    a, b = start[other * n_x + left], start[other * n_x + right]
                    for j in range(a, b):
                        dx, dy = x[j] - x[i], y[j] - y[i]
                        found += dx * dx + dy * dy <= squared
                counts[order[i]] = found - 1


@numba.njit(nogil=True, cache=True)
def _merge(a, n_a, b, n_b, out):  # type: ignore[no-untyped-def]
    """Merge two ascending runs without a branch that depends on their values; one place after each is overwritten."""
    a[n_a] = _LAST
    b[n_b] = _LAST
    i, j = 0, 0
    for k in range(n_a + n_b):
        one, other = a[i], b[j]
        out[k] = min(one, other)
        i += int(one < other)
        j += int(one >= other)
    return n_a + n_b


@numba.njit(nogil=True, cache=True)
def _merge_column(order, start, n_x, n_y, row, column, spare, box, out):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Cells of the boxes above, at and below a place, ascending, as ``cell << 32 | place``; returns how many."""
    n = 0
    for other in range(max(row - 1, 0), min(row + 1, n_y - 1) + 1):
        a, b = start[other * n_x + column], start[other * n_x + column + 1]
        for j in range(a, b):
            box[j - a] = (np.int64(order[j]) << 32) | j
        for k in range(n):
            spare[k] = out[k]
        n = _merge(spare, n, box, b - a, out)
    return n


@numba.njit(nogil=True, cache=True)
def _widest(start, n_x, n_y, row):  # type: ignore[no-untyped-def]
    """Most cells in three boxes, one above the other, of a row."""
    widest = 0
    for column in range(n_x):
        n = 0
        for other in range(max(row - 1, 0), min(row + 1, n_y - 1) + 1):
            n += start[other * n_x + column + 1] - start[other * n_x + column]
        widest = max(widest, n)
    return widest


@numba.njit(nogil=True, cache=True)
def _fill(x, y, order, start, n_x, n_y, squared, first, last, indptr, indices, distances):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Candidates of a box are sorted once for all its cells, so that their rows come out sorted."""
    for row in range(first, last):
        widest = _widest(start, n_x, n_y, row)
        columns = np.empty((3, widest + 1), dtype=np.int64)  # sorted candidates left of, at and right of the box
        sizes = np.zeros(3, dtype=np.int64)
        box, spare = np.empty(widest + 1, dtype=np.int64), np.empty(2 * widest + 1, dtype=np.int64)
        keys, near = np.empty(3 * widest, dtype=np.int64), np.empty(3 * widest, dtype=np.int32)
        near_x, near_y, squares = np.empty(3 * widest), np.empty(3 * widest), np.empty(3 * widest)
        taken = np.empty(3 * widest, dtype=np.int32)
        sizes[0] = _merge_column(order, start, n_x, n_y, row, 0, spare, box, columns[0])
        for column in range(n_x):
            following = (column + 1) % 3
            sizes[following] = 0
            if column + 1 < n_x:
                sizes[following] = _merge_column(
                    order, start, n_x, n_y, row, column + 1, spare, box, columns[following]
                )
            begin, end = start[row * n_x + column], start[row * n_x + column + 1]
            if begin == end:
                continue
            n = _merge(columns[0], sizes[0], columns[1], sizes[1], spare)
            n = _merge(spare, n, columns[2], sizes[2], keys)
            for k in range(n):
                place = keys[k] & 0xFFFFFFFF
                near[k], near_x[k], near_y[k] = keys[k] >> 32, x[place], y[place]
            for i in range(begin, end):
                cell, found = order[i], 0
                for k in range(n):
                    dx, dy = near_x[k] - x[i], near_y[k] - y[i]
                    squares[k] = dx * dx + dy * dy
                for k in range(n):  # no branch: what is not taken is overwritten by the next
                    taken[found] = k
                    found += (squares[k] <= squared) & (near[k] != cell)
                at = indptr[cell]
                for e in range(found):
                    indices[at + e] = near[taken[e]]
                    distances[at + e] = np.sqrt(squares[taken[e]])


@numba.njit(nogil=True, cache=True, inline="always")
def _box_range(value, radius, low, side, n):  # type: ignore[no-untyped-def]
    """First box, and the one after the last, that reach within a radius of a coordinate."""
    reach = radius * (1 + 1e-9) + 1e-9 * side  # rounding must not leave a box out
    first, last = np.floor((value - reach - low) / side), np.floor((value + reach - low) / side)
    return int(min(max(first, 0), n)), int(max(min(last + 1, n), 0))


@numba.njit(nogil=True, cache=True)
def _count_around(x, y, start, n_x, n_y, low, side, points, radius, counts):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    squared = radius * radius
    for p in range(len(points)):
        left, right = _box_range(points[p, 0], radius, low[0], side, n_x)
        top, bottom = _box_range(points[p, 1], radius, low[1], side, n_y)
        found = 0
        for row in range(top, bottom):
            for j in range(start[row * n_x + left], start[row * n_x + right]):
                dx, dy = x[j] - points[p, 0], y[j] - points[p, 1]
                found += dx * dx + dy * dy <= squared
        counts[p] = found


@numba.njit(nogil=True, cache=True)
def _nearest(x, y, start, n_x, n_y, low, side, points, k, nearest):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    for p in range(len(points)):
        radius = side
        while True:  # a wider circle until it holds k cells
            left, right = _box_range(points[p, 0], radius, low[0], side, n_x)
            top, bottom = _box_range(points[p, 1], radius, low[1], side, n_y)
            most = 0
            for row in range(top, bottom):
                most += start[row * n_x + right] - start[row * n_x + left]
            squares, found = np.empty(most), 0
            for row in range(top, bottom):
                for j in range(start[row * n_x + left], start[row * n_x + right]):
                    dx, dy = x[j] - points[p, 0], y[j] - points[p, 1]
                    square = dx * dx + dy * dy
                    if square <= radius * radius:
                        squares[found] = square
                        found += 1
            if found >= k:
                nearest[p] = np.sqrt(np.partition(squares[:found], k - 1)[k - 1])
                break
            radius *= 1.5


@numba.njit(nogil=True, cache=True)
def mean_rows(indptr, indices, features, include_self, first, last, out, column):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Mean of the features over the neighbourhoods of some cells, to ``out`` from a column on."""
    width = features.shape[1]
    total = np.empty(width, dtype=np.float32)
    for i in range(first, last):
        total[:] = 0
        for e in range(indptr[i], indptr[i + 1]):
            other = indices[e]
            for c in range(width):
                total[c] += features[other, c]
        n = indptr[i + 1] - indptr[i]
        if include_self or n == 0:
            n += 1
            for c in range(width):
                total[c] += features[i, c]
        for c in range(width):
            out[i, column + c] = total[c] / np.float32(n)
