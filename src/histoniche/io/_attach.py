"""Add an image to an object, with its place in um."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

from histoniche._keys import UM

from ._pixels import Pixels, open_image
from ._um import check_affine, from_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


def attach_image(
    sdata: SpatialData,
    image: str | Path | np.ndarray | da.Array,
    *,
    um_per_px: float | None = None,
    affine: ArrayLike | None = None,
    key_added: str = "he",
    dims: Sequence[str] | None = None,
    channel_names: Sequence[str] | None = None,
    scale_factors: Sequence[int] = (2, 2, 2),
    chunk_size: int = 1024,
    overwrite: bool = False,
) -> None:
    """Add an image with its place in um.

    Parameters
    ----------
    sdata
        SpatialData.
    image
        Path of a TIFF (OME-TIFF, tiled slides; lazy, the full resolution of the first series), PNG or JPEG; or an
        array. The alpha channel of colour files is dropped with a warning.
    um_per_px
        Size of a pixel in um, for an image whose first pixel has its corner at 0, 0 um. By default as the file says
        (OME, SVS, ImageJ, resolution tags).
    affine
        Instead: matrix (3, 3) or (2, 3) from x, y in pixels to x, y in um (pixel corner convention: the centre of the
        first pixel is 0.5, 0.5).
    key_added
        Name of the image.
    dims
        Axes of an array, a permutation of ``("c", "y", "x")`` or of ``("y", "x")``; by default channels first.
    channel_names
        Names of the channels; by default as the file says, and ``r, g, b`` for colour.
    scale_factors
        Factors of the pyramid, each relative to the level before.
    chunk_size
        Side of the chunks in pixels.
    overwrite
        Whether an image of the name ``key_added`` may be replaced.

    Returns
    -------
    ``None``. Written: ``images[key_added]``, multiscale, lazy, with a transformation to ``"um"``.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        um/px unknown or not positive, both ``um_per_px`` and ``affine``, ``affine`` not invertible, ``key_added``
        taken, axes or channels that do not fit. ``sdata`` is unchanged then.
    """
    if not isinstance(sdata, SpatialData):
        msg = f"Expected a SpatialData, got {type(sdata).__name__}."
        raise TypeError(msg)
    if key_added in sdata and not (overwrite and key_added in sdata.images):
        fix = "pass overwrite=True or another key_added" if key_added in sdata.images else "choose another key_added"
        msg = f"The object already has an element {key_added!r}: {fix}."
        raise ValueError(msg)
    element = parse_image(
        image,
        um_per_px=um_per_px,
        affine=affine,
        dims=dims,
        channel_names=channel_names,
        scale_factors=scale_factors,
        chunk_size=chunk_size,
    )
    if key_added in sdata.images:
        del sdata.images[key_added]
    sdata.images[key_added] = element


def parse_image(
    image: str | Path | np.ndarray | da.Array,
    *,
    um_per_px: float | None,
    affine: ArrayLike | None,
    dims: Sequence[str] | None = None,
    channel_names: Sequence[str] | None = None,
    scale_factors: Sequence[int] = (2, 2, 2),
    chunk_size: int = 1024,
) -> Any:
    """Image element with a transformation to um; parameters as in :func:`attach_image`."""
    if isinstance(image, str | Path):
        if dims is not None:
            msg = f"dims={tuple(dims)!r} was given with a file, which tells its axes itself: leave it out."
            raise ValueError(msg)
        pixels = open_image(image)
        name = repr(Path(image).name)
    else:
        pixels, name = _from_array(image, dims), "the array"
    matrix = _px_to_um(pixels, um_per_px, affine, name)
    channels = list(channel_names) if channel_names is not None else pixels.channels
    if channels is not None and (len(channels) != len(pixels.data) or len(set(channels)) != len(channels)):
        msg = f"channel_names={channels!r} for {name}: {len(pixels.data)} different names are needed."
        raise ValueError(msg)
    total, smallest = int(np.prod(list(scale_factors) or [1])), min(pixels.data.shape[1:])
    if any(factor < 2 for factor in scale_factors) or total > smallest:
        msg = (
            f"scale_factors={tuple(scale_factors)!r} do not fit an image of {pixels.data.shape[1:]} px: each must be at "
            "least 2, and their product no larger than the image."
        )
        raise ValueError(msg)
    return Image2DModel.parse(
        pixels.data.rechunk((-1, chunk_size, chunk_size)),
        dims=("c", "y", "x"),
        c_coords=channels,
        transformations={UM: from_matrix(matrix)},
        scale_factors=list(scale_factors) or None,
        chunks=(len(pixels.data), chunk_size, chunk_size),
    )


def _from_array(image: Any, dims: Sequence[str] | None) -> Pixels:
    if not isinstance(image, np.ndarray | da.Array):
        msg = f"image is a {type(image).__name__}: pass a path, a NumPy or a dask array."
        raise TypeError(msg)
    if dims is None:
        dims = {2: ("y", "x"), 3: ("c", "y", "x")}.get(image.ndim, ())
        if image.ndim == 3 and image.shape[2] in (3, 4) and image.shape[0] > 4:
            msg = f"The array has the shape {image.shape}: its channels seem to come last, pass dims=('y', 'x', 'c')."
            raise ValueError(msg)
    dims = tuple(dims)
    if len(dims) != image.ndim or sorted(dims) not in (["x", "y"], ["c", "x", "y"]):
        msg = (
            f"dims={dims!r} do not fit an array of the shape {image.shape}: name its axes, as in dims=('y', 'x', 'c')."
        )
        raise ValueError(msg)
    data = image if isinstance(image, da.Array) else da.from_array(image)
    if len(dims) == 2:
        data, dims = data[None], ("c", *dims)
    data = data.transpose([dims.index(axis) for axis in "cyx"])
    colour = len(data) == 3 and data.dtype == np.uint8
    return Pixels(data, ["r", "g", "b"] if colour else None, None)


def _px_to_um(pixels: Pixels, um_per_px: float | None, affine: ArrayLike | None, name: str) -> NDArray:
    if affine is not None:
        if um_per_px is not None:
            msg = "um_per_px and affine were both given: the affine holds the pixel size, leave um_per_px out."
            raise ValueError(msg)
        return check_affine(affine, "affine")
    size = pixels.um_per_px if um_per_px is None else (um_per_px, um_per_px)
    if size is None:
        msg = f"um/px unknown: {name} does not tell the size of its pixels. Pass um_per_px= or affine=."
        raise ValueError(msg)
    if not all(np.isfinite(value) and value > 0 for value in size):
        msg = f"um_per_px={size!r}: a positive number is needed."
        raise ValueError(msg)
    return np.diag([*size, 1.0])
