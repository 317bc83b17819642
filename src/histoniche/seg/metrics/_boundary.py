"""How far boundaries lie apart."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries

from histoniche.seg._access import need_package

from ._check import check_tolerance, check_um_per_px, image_pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def hausdorff95(predicted: ArrayLike, truth: ArrayLike, *, um_per_px: float = 1.0) -> float:
    """95th percentile of the Hausdorff distance between the surfaces of two foregrounds, in um.

    The surface is every foreground pixel that has a neighbour above, below, left or right that is background or lies
    outside the image. In each direction the 95th percentile (linearly interpolated) of the distances from the pixels of
    one surface to the nearest of the other is taken; the larger of the two is returned. MONAI computes it, and for an
    empty image gives NaN or infinity, which it then leaves out of means: that flatters models that miss. Here an empty
    image counts.

    Parameters
    ----------
    predicted, truth
        (y, x) masks of booleans, or label images of integers whose foreground is every label above 0.
    um_per_px
        Size of a pixel in um.

    Returns
    -------
    Distance in um, 0 for equal foregrounds. Where just one of the two is empty, the diagonal of the image, which is
    more than any distance within it; where both are, 0.

    Raises
    ------
    ImportError
        MONAI, of the extra ``seg``, is missing.
    TypeError
        Neither integers nor booleans.
    ValueError
        Shapes differ or are not (y, x); a negative label; ``um_per_px`` is not positive.

    References
    ----------
    Huttenlocher, Klanderman & Rucklidge. Comparing images using the Hausdorff distance. IEEE TPAMI 15, 1993.
    """
    images = image_pair(predicted, truth)
    scale = check_um_per_px(um_per_px)
    masks = [image > 0 for image in images]
    filled = [bool(mask.any()) for mask in masks]
    if not all(filled):
        return float(np.hypot(*masks[0].shape)) * scale if any(filled) else 0.0
    metrics = need_package("monai.metrics", "monai", "hausdorff95")
    one_hot = [mask[None, None] for mask in masks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
        found = metrics.compute_hausdorff_distance(*one_hot, include_background=True, percentile=95)
    return float(found) * scale


def boundary_f(predicted: ArrayLike, truth: ArrayLike, *, tolerance_px: float = 2.0) -> float:
    """F score of the boundaries of objects: harmonic mean of the shares of both boundaries that lie near the other.

    The boundary is every pixel of an object that has a neighbour (up, down, left, right) in another object or in the
    background, so that touching objects that are merged lose part of it. The edge of the image is no boundary.

    Parameters
    ----------
    predicted, truth
        (y, x) label images of integers, or masks of booleans, which count as one object.
    tolerance_px
        Distance in px up to which a pixel of a boundary agrees with the nearest of the other.

    Returns
    -------
    0 to 1. 0 where just one of the two has a boundary. Where neither has one, 1 if both are empty or both filled by a
    single object, and else 0.

    Raises
    ------
    TypeError
        Neither integers nor booleans.
    ValueError
        Shapes differ or are not (y, x); a negative label; ``tolerance_px`` is negative.

    References
    ----------
    Csurka, Larlus & Perronnin. What is a good evaluation measure for semantic segmentation? BMVC 2013.
    """
    images = image_pair(predicted, truth)
    tolerance = check_tolerance(tolerance_px)
    first, second = (find_boundaries(image, connectivity=1, mode="inner", background=0) for image in images)
    if not (first.any() or second.any()):
        return float((images[0][0, 0] > 0) == (images[1][0, 0] > 0))
    if not (first.any() and second.any()):
        return 0.0
    precision = np.mean(distance_transform_edt(~second)[first] <= tolerance)
    recall = np.mean(distance_transform_edt(~first)[second] <= tolerance)
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0
