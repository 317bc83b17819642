"""Open image files lazily and find out what they say of channels and pixel size."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import tifffile
import zarr
from PIL import Image as PillowImage

_TIFF_SUFFIXES = frozenset({".tif", ".tiff", ".btf", ".svs", ".ndpi", ".scn", ".qptiff"})
_PLAIN_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_UM_PER_RESOLUTION_UNIT = {2: 25400.0, 3: 10000.0}
# Resolution tags often hold a printer's 72 or 300 dpi: only what a microscope can have made is believed.
_PLAUSIBLE_UM_PER_PX = (0.02, 20.0)
_CHUNK = 1024


@dataclass(frozen=True)
class Pixels:
    """An image as its file describes it.

    Attributes
    ----------
    data
        Lazy array (c, y, x).
    channels
        Names of the channels, where the file tells them.
    um_per_px
        Size of a pixel in x and y in um, where the file tells it.
    """

    data: da.Array
    channels: list[str] | None
    um_per_px: tuple[float, float] | None


def open_image(path: str | Path) -> Pixels:
    """Open an image file; pixels of TIFF files are read when they are needed.

    Parameters
    ----------
    path
        TIFF (OME-TIFF, SVS and other tiled slides that tifffile reads; first series, full resolution), PNG or JPEG.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file cannot be read as a 2D image.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There is no image file {str(path)!r}."
        raise FileNotFoundError(msg)
    suffix = path.suffix.lower()
    if suffix in _TIFF_SUFFIXES:
        return _open_tiff(path)
    if suffix in _PLAIN_SUFFIXES:
        return _open_plain(path)
    msg = (
        f"{path.name!r}: images are read from {sorted(_TIFF_SUFFIXES | _PLAIN_SUFFIXES)}; convert it, or pass an array."
    )
    raise ValueError(msg)


def _open_tiff(path: Path) -> Pixels:
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            axes, page = series.axes, series.keyframe
            ome = _ome(file.ome_metadata)
            um_per_px = _ome_size(ome) or _tag_size(file, page)
            channels = _ome_channels(ome)
        store = tifffile.imread(path, aszarr=True, series=0, level=0)
    except (tifffile.TiffFileError, IndexError) as error:
        msg = f"{str(path)!r} cannot be read as TIFF: {error}."
        raise ValueError(msg) from error
    array = zarr.open(store, mode="r")
    native = dict(zip(axes, array.chunks, strict=True))
    chunks = tuple(native[axis] * max(1, _CHUNK // native[axis]) if axis in "YX" else native[axis] for axis in axes)
    data, axes = _to_cyx(da.from_zarr(array, chunks=chunks), axes, path)
    if "S" in axes:
        # Samples of one pixel are colours; separate channels (C) may be stains.
        data, channels = _drop_alpha(data, path), None
        if len(data) == 3:
            channels = ["r", "g", "b"]
    if channels is not None and len(channels) != len(data):
        channels = None
    return Pixels(data, channels, um_per_px)


def _to_cyx(data: da.Array, axes: str, path: Path) -> tuple[da.Array, str]:
    for axis in [a for a in axes if a not in "CSYX" or (a == "C" and "S" in axes)]:
        place = axes.index(axis)
        if data.shape[place] != 1:
            msg = (
                f"{path.name!r} has the axes {axes} {data.shape}; a 2D image is needed: project or select {axis} first."
            )
            raise ValueError(msg)
        data, axes = data.squeeze(axis=place), axes.replace(axis, "")
    if not {"Y", "X"} <= set(axes):
        msg = f"{path.name!r} has the axes {axes}; y and x are needed."
        raise ValueError(msg)
    channel = next((a for a in axes if a in "CS"), None)
    if channel is None:
        return data[None], axes
    return data.transpose([axes.index(channel), axes.index("Y"), axes.index("X")]), axes


def _drop_alpha(data: da.Array, path: Path) -> da.Array:
    if len(data) != 4:
        return data
    warnings.warn(f"The alpha channel of {path.name!r} is dropped.", stacklevel=5)
    return data[:3]


def _open_plain(path: Path) -> Pixels:
    # These formats have no tiles: any pixel needs the whole image decoded, so it is decoded once, now.
    limit = PillowImage.MAX_IMAGE_PIXELS
    PillowImage.MAX_IMAGE_PIXELS = None  # whole slides are larger than Pillow trusts
    try:
        with PillowImage.open(path) as file:
            convert = file.mode in {"P", "CMYK", "YCbCr"}
            pixels = np.asarray(file.convert("RGBA" if "transparency" in file.info else "RGB") if convert else file)
    except OSError as error:
        msg = f"{str(path)!r} cannot be read as an image: {error}."
        raise ValueError(msg) from error
    finally:
        PillowImage.MAX_IMAGE_PIXELS = limit
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    data = da.from_array(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0), chunks=(-1, _CHUNK, _CHUNK))
    data = _drop_alpha(data, path)
    return Pixels(data, ["r", "g", "b"] if len(data) == 3 else None, None)


def _ome(xml: str | None) -> dict[str, Any]:
    """``Pixels`` of the first image of the OME description; empty where there is none."""
    if not xml:
        return {}
    images = tifffile.xml2dict(xml).get("OME", {}).get("Image", {})
    first = images[0] if isinstance(images, list | tuple) else images
    return first.get("Pixels", {})


def _ome_size(ome: dict[str, Any]) -> tuple[float, float] | None:
    sizes = []
    for axis in "XY":
        size = ome.get(f"PhysicalSize{axis}")
        factor = _UM_PER_UNIT.get(str(ome.get(f"PhysicalSize{axis}Unit", "µm")))
        if not size or factor is None:
            return None
        sizes.append(float(size) * factor)
    return sizes[0], sizes[1]


def _ome_channels(ome: dict[str, Any]) -> list[str] | None:
    channels = ome.get("Channel", [])
    channels = channels if isinstance(channels, list | tuple) else [channels]
    names = [str(channel["Name"]) for channel in channels if channel.get("Name")]
    return names if names and len(names) == len(channels) and len(set(names)) == len(names) else None


def _tag_size(file: tifffile.TiffFile, page: Any) -> tuple[float, float] | None:
    """Pixel size by the vendor's description or the resolution tags."""
    if file.is_svs:
        found = re.search(r"MPP\s*=\s*([0-9.]+)", page.description)
        if found:
            return float(found[1]), float(found[1])
    unit = (file.imagej_metadata or {}).get("unit", "") if file.is_imagej else ""
    unit = "µm" if unit == "\\u00B5m" else unit
    tag = page.tags.get("ResolutionUnit")
    factor = _UM_PER_UNIT.get(unit) or _UM_PER_RESOLUTION_UNIT.get(int(tag.value) if tag else 0)
    sizes = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        if factor is None or tag is None or not all(tag.value):
            return None
        sizes.append(factor * tag.value[1] / tag.value[0])
    low, high = _PLAUSIBLE_UM_PER_PX
    return (sizes[0], sizes[1]) if all(low <= size <= high for size in sizes) else None
