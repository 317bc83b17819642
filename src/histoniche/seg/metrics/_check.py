"""What all metrics demand of their input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def image_pair(predicted: ArrayLike, truth: ArrayLike, *, instances: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Two masks or label images (y, x) of one size.

    Parameters
    ----------
    predicted, truth
        Arrays of booleans or of integers that are not negative.
    instances
        Whether objects are told apart, so that a mask will not do.

    Returns
    -------
    Both as arrays.
    """
    images = np.asarray(predicted), np.asarray(truth)
    for name, image in zip(("predicted", "truth"), images, strict=True):
        _check(name, image, instances=instances)
    if images[0].shape != images[1].shape:
        msg = (
            f"predicted {images[0].shape} and truth {images[1].shape} differ in shape: they must show the same pixels."
        )
        raise ValueError(msg)
    return images


def _check(name: str, image: np.ndarray, *, instances: bool) -> None:
    if np.issubdtype(image.dtype, np.floating):
        holes = " with NaN" if np.isnan(image).any() else ""
        msg = (
            f"{name} has the type {image.dtype}{holes}; integers, one number an object, or a mask of booleans are needed "
            "(of probabilities, a threshold or `histoniche.seg.instances` makes them)."
        )
        raise TypeError(msg)
    if image.dtype == np.bool_ and instances:
        msg = (
            f"{name} is a mask of booleans, which does not tell objects apart; integers, one number an object, are needed "
            "(`skimage.measure.label` makes them)."
        )
        raise TypeError(msg)
    if image.dtype != np.bool_ and not np.issubdtype(image.dtype, np.integer):
        msg = f"{name} has the type {image.dtype}; integers, one number an object, or booleans are needed."
        raise TypeError(msg)
    if image.ndim != 2 or 0 in image.shape:
        msg = f"{name} has the shape {image.shape}; (y, x), none of them 0, is needed."
        raise ValueError(msg)
    if image.dtype != np.bool_ and image.min() < 0:
        msg = f"{name} has the label {image.min()}; labels must not be negative, and 0 is background."
        raise ValueError(msg)


def check_um_per_px(um_per_px: float) -> float:
    """Size of a pixel in um, which must be positive."""
    if not 0 < um_per_px < np.inf:
        msg = f"um_per_px={um_per_px} must be positive."
        raise ValueError(msg)
    return float(um_per_px)


def check_tolerance(tolerance_px: float) -> float:
    """Tolerance in px, which must not be negative."""
    if not 0 <= tolerance_px < np.inf:
        msg = f"tolerance_px={tolerance_px} must be a number of pixels that is not negative."
        raise ValueError(msg)
    return float(tolerance_px)
