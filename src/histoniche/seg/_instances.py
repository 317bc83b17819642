"""From probability maps to objects."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed


def instances(
    maps: np.ndarray, *, threshold: float = 0.5, min_depth: float = 1.0, smoothing: float = 1.0, min_area: int = 16
) -> np.ndarray:
    """Separate objects by a watershed on the distance to the predicted boundary.

    Parameters
    ----------
    maps
        (2, y, x) float: probability of foreground and of boundary.
    threshold
        Least probability of foreground.
    min_depth
        Two seeds belong to two objects where the distance to the boundary falls by at least so many px between them. Less
        cuts long and uneven objects, more merges small ones that touch.
    smoothing
        Standard deviation in px of the Gaussian that smooths distances before seeds are sought.
    min_area
        Objects of fewer pixels are dropped.

    Returns
    -------
    (y, x) int32: 0 is background, objects are numbered from 1 without gaps.

    Raises
    ------
    ValueError
        ``min_depth`` is negative.
    """
    if min_depth < 0:
        msg = f"min_depth={min_depth} px must be at least 0."
        raise ValueError(msg)
    foreground, boundary = maps
    mask = foreground > threshold
    if not mask.any():
        return np.zeros(mask.shape, dtype=np.int32)
    inside = mask & (boundary < threshold)
    # A boundary that is likely, but not certain, also keeps seeds away.
    height = ndimage.gaussian_filter(ndimage.distance_transform_edt(inside) + foreground - boundary, smoothing)
    # skimage's h_maxima would keep both of two equal maxima, however shallow the dip between them.
    tops = local_maxima(reconstruction(height - min_depth, height))
    seeds = ndimage.label(tops & inside, np.ones((3, 3)), output=np.int32)[0]
    _seed_the_rest(seeds, mask)
    found = watershed(-height, seeds, mask=mask)
    found[np.bincount(found.ravel())[found] < min_area] = 0
    return renumber(found)


def _seed_the_rest(seeds: np.ndarray, mask: np.ndarray) -> None:
    """Give a seed to each piece of the foreground that has none, for it is too thin to have an inside; in place."""
    # The watershed floods across edges of pixels, not corners: what a seed reaches is a piece by edges. Of the rest, a thin
    # diagonal line is one object.
    pieces, n = ndimage.label(mask)
    seeded = np.zeros(n + 1, dtype=bool)
    seeded[pieces[seeds > 0]] = True
    rest = mask & ~seeded[pieces]
    seeds[rest] = ndimage.label(rest, np.ones((3, 3)))[0][rest] + seeds.max()


def renumber(labels: np.ndarray) -> np.ndarray:
    """Number objects from 1 without gaps, in the order of their numbers; int32."""
    numbers = np.unique(labels)
    numbers = numbers[numbers > 0]
    table = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int32)
    table[numbers] = np.arange(1, len(numbers) + 1)
    return table[labels]
