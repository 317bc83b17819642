"""All metrics of many images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._boundary import boundary_f, hausdorff95
from ._check import check_tolerance
from ._instances import overlaps
from ._overlap import dice

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike


def evaluate(
    pairs: Iterable[tuple[ArrayLike, ArrayLike]],
    *,
    names: Sequence[str] | None = None,
    regions: Sequence[ArrayLike | None] | None = None,
    um_per_px: float | Sequence[float] = 1.0,
    tolerance_px: float = 2.0,
) -> pd.DataFrame:
    """Measure predicted label images against the truth, image by image.

    Nothing is pooled: ``evaluate(...).mean()`` is the mean over images, in which an image of few objects weighs as much
    as one of many.

    Parameters
    ----------
    pairs
        Pairs of a predicted and a true label image, (y, x) integers, 0 being background; lazy ones are read in turn.
    names
        Name of each image, each just once; numbers from 0 by default.
    regions
        For each image a mask (y, x) of what is measured, such as the field of view of an eye's ground
        (:attr:`histoniche.seg.Field.region`), or None for all of it. Outside it counts as background in both.
    um_per_px
        Size of a pixel in um, of all images or of each. With the default of 1, ``hausdorff95`` is in px.
    tolerance_px
        Tolerance of ``boundary_f`` in px.

    Returns
    -------
    One row an image, the index ``image`` being its name, with the columns ``dice``, ``hausdorff95`` (um),
    ``boundary_f``, ``ap50``, ``ap75`` (``average_precision`` at an IoU above 0.5 and 0.75), ``pq``, ``n_true``,
    ``n_predicted`` (numbers of objects) and ``missed`` (nothing is predicted although there are objects).

    Raises
    ------
    ImportError
        MONAI, of the extra ``seg``, is missing.
    TypeError
        No integers: floats, or masks, which do not tell objects apart. The message names the image.
    ValueError
        No pair; shapes differ; a negative label; ``um_per_px`` or ``tolerance_px`` is out of range; ``names``, ``regions`` or
        ``um_per_px`` are not one for each pair; a name twice.
    """
    check_tolerance(tolerance_px)
    pairs = list(pairs)
    if not pairs:
        msg = "There is no pair to evaluate."
        raise ValueError(msg)
    index = list(names) if names is not None else list(map(str, range(len(pairs))))
    scales = list(um_per_px) if isinstance(um_per_px, Sequence | np.ndarray) else [um_per_px] * len(pairs)
    masks = [None] * len(pairs) if regions is None else list(regions)
    for label, values in (("names", index), ("regions", masks), ("um_per_px", scales)):
        if len(values) != len(pairs):
            msg = f"{label} has {len(values)} entries for {len(pairs)} pairs; one for each is needed."
            raise ValueError(msg)
    if len(set(index)) != len(index):
        twice = next(name for name in index if index.count(name) > 1)
        msg = f"names has {twice!r} more than once; every image needs a name of its own."
        raise ValueError(msg)
    rows = [
        _measure(name, pair, region, um_per_px=scale, tolerance_px=tolerance_px)
        for name, pair, region, scale in zip(index, pairs, masks, scales, strict=True)
    ]
    return pd.DataFrame(rows, index=pd.Index(index, name="image"))


def _measure(
    name: str, pair: tuple[ArrayLike, ArrayLike], region: ArrayLike | None, *, um_per_px: float, tolerance_px: float
) -> dict[str, Any]:
    """All figures of one image; errors name it."""
    try:
        predicted, truth = (np.asarray(image) for image in pair)  # lazy arrays are read once
        if region is not None:
            predicted, truth = _within(np.asarray(region), predicted, truth)
        shared = overlaps(predicted, truth)
        half = shared.match(0.5)
        return {
            "dice": dice(predicted, truth),
            "hausdorff95": hausdorff95(predicted, truth, um_per_px=um_per_px),
            "boundary_f": boundary_f(predicted, truth, tolerance_px=tolerance_px),
            "ap50": half.average_precision,
            "ap75": shared.match(0.75).average_precision,
            "pq": half.panoptic_quality,
            "n_true": half.n_true,
            "n_predicted": half.n_predicted,
            "missed": half.n_predicted == 0 < half.n_true,
        }
    except (TypeError, ValueError) as error:
        msg = f"Image {name!r}: {error}"
        raise type(error)(msg) from error


def _within(region: np.ndarray, *labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Label images with nothing outside a region."""
    if region.dtype != bool or any(region.shape != image.shape for image in labels):
        msg = f"its region is {region.dtype} of shape {region.shape}: a mask (True, False) of the image's shape is needed, {labels[0].shape}."
        raise ValueError(msg)
    return tuple(np.where(region, image, 0).astype(image.dtype) for image in labels)
