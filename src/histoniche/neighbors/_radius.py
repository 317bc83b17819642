"""Radius at which a cell has, on average, a wished number of neighbours."""

from __future__ import annotations

import numpy as np

from ._graph import separate_groups
from ._grid import count_around, make_grid, nearest_distance

_SAMPLE = 20_000
_TOLERANCE = 0.002


def radius_for_density(
    xy: np.ndarray, target_neighbors: float, *, groups: np.ndarray | None = None, seed: int = 0
) -> float:
    """Radius whose discs hold a wished number of neighbours on average: large in sparse tissue, small in dense.

    Counts real neighbours (of at most 20,000 cells, drawn at random) and bisects, so that holes and borders of the
    tissue need no model of its area.

    Parameters
    ----------
    xy
        (n, 2) centroids in um.
    target_neighbors
        Wished mean number of neighbours, the cell itself not counted.
    groups
        (n,) slide of each cell.
    seed
        Seed of the sample.

    Returns
    -------
    Radius in um; the mean number of neighbours in the sample differs from the target by at most 0.2 %, or by the
    smallest step that the data allow.
    """
    n = len(xy)
    if not 0 < target_neighbors < n - 1:
        msg = f"target_neighbors={target_neighbors} needs more than {target_neighbors + 1:g} cells, there are {n}."
        raise ValueError(msg)
    extent = float(np.ptp(xy, axis=0).max())
    xy = separate_groups(xy, groups, 2 * extent + 1)
    # Boxes of about eight cells, were they spread evenly.
    grid = make_grid(xy, float(np.sqrt(8 / n) * max(np.sqrt(np.prod(np.ptp(xy, axis=0))), extent / np.sqrt(n))))
    sample = xy
    if n > _SAMPLE:
        sample = xy[np.random.default_rng(seed).choice(n, _SAMPLE, replace=False)]

    k = min(int(np.ceil(target_neighbors)) + 1, n)
    guess = float(np.median(nearest_distance(grid, sample[:2000], k)))
    if not np.isfinite(guess) or guess <= 0:
        guess = extent / 10

    def mean_count(radius: float) -> float:
        return float(count_around(grid, sample, radius).mean()) - 1

    low, high = 0.8 * guess, 1.25 * guess
    while mean_count(low) > target_neighbors:
        low /= 1.5
    while mean_count(high) < target_neighbors:
        high *= 1.5
        if high > 4 * extent:
            msg = (
                f"target_neighbors={target_neighbors} is not reached inside the slides: they hold too few cells. "
                "Give a smaller target or a radius."
            )
            raise ValueError(msg)
    for _ in range(40):
        middle = (low + high) / 2
        found = mean_count(middle)
        if abs(found - target_neighbors) <= _TOLERANCE * target_neighbors:
            return middle
        low, high = (middle, high) if found < target_neighbors else (low, middle)
    return (low + high) / 2
