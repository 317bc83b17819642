"""Fields of a SpatialData object: its image, with labels or with shapes as labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from skimage.draw import polygon
from spatialdata import SpatialData
from spatialdata.models import get_channel_names

from histoniche import _keys, _sdata

from ._fields import Field, checked_int32, grid_of_pixels, percentile_limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import dask.array as da
    import geopandas

Region = tuple[float, float, float, float]


def fields_from_sdata(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    channels: Sequence[str] | None = None,
    labels_key: str | None = None,
    shapes_key: str | None = None,
    regions: Sequence[Region] | None = None,
    name: str | None = None,
) -> list[Field]:
    """Make fields of an image of a SpatialData object, with its labels or shapes as objects.

    Pixels stay lazy. Shapes are rasterised, within the regions only: a pixel belongs to a shape that holds its centre,
    and where shapes overlap the later one wins. Labels of a region take 4 bytes a pixel of it.

    Parameters
    ----------
    sdata
        SpatialData object: image and objects with a transformation to ``"um"``.
    image_key
        Name of the image, of any number of channels; may be left out where there is just one.
    channels
        Channels to keep, in the order wanted; all by default.
    labels_key
        Labels on the grid of the image. Neither labels nor shapes: fields without labels.
    shapes_key
        Polygons or circles. Of multi-polygons and collections every polygon is drawn; holes are left out.
    regions
        ``(x_min, y_min, x_max, y_max)`` in um, one field each: edges are rounded to pixels, so that regions that touch
        share none. Of an image that is rotated in um, the upright window around the region. Default: the whole image.
    name
        Name of the fields, the image's by default; the window in px is appended where there are regions.

    Returns
    -------
    Fields: image (c, y, x) lazy; labels (y, x), lazy where they come from ``labels_key``, of shapes int32: the
    position, from 1, of the shape among those whose bounding box meets the region's. Limits are the
    same in all regions: those of the whole image at full resolution, whatever coarser scales it has.

    Raises
    ------
    KeyError
        No such image, labels, shapes or channels.
    ValueError
        Both labels and shapes; an image with a z axis; no transformation to um; labels on another grid; no shape in a
        region, or a shape without a polygon or radius; a region that is empty, given twice, or reaches beyond the image.
    TypeError
        No SpatialData object, or labels of floats.
    """
    if not isinstance(sdata, SpatialData):
        msg = f"A SpatialData object is needed, got {type(sdata).__name__}."
        raise TypeError(msg)
    if labels_key is not None and shapes_key is not None:
        msg = f"labels_key={labels_key!r} and shapes_key={shapes_key!r} are both given: choose one."
        raise ValueError(msg)
    image, names = channel_image(sdata, image_key)
    rows = _channel_rows(image.key, names, channels)
    chosen = tuple(names[row] for row in rows)
    pixels = image.pyramid[0][rows]
    limits = percentile_limits(grid_of_pixels(pixels))  # of the whole: regions must not be stretched each by itself
    labels = None if labels_key is None else _labels(sdata, labels_key, image)
    shapes = None if shapes_key is None else _Shapes(sdata, shapes_key, image)
    name = name or image.key
    fields: list[Field] = []
    for window, region in _windows(image, regions):
        y, x = window
        found = None
        if labels is not None:
            found = labels[window]
        elif shapes is not None:
            found = shapes.rasterise(window, region)
        label = name if regions is None else f"{name}[{y.start}:{y.stop},{x.start}:{x.stop}]"
        if label in [field.name for field in fields]:
            msg = f"regions: {region} is the same window of pixels as an earlier one."
            raise ValueError(msg)
        fields.append(Field(label, pixels[:, y, x], chosen, found, image.um_per_px, limits))
    return fields


def channel_image(sdata: SpatialData, image_key: str | None) -> tuple[_sdata.Image, list[str]]:
    """An image (c, y, x) of any number of channels, and their names."""
    image = _sdata.image(sdata, image_key, n_channels=None)
    return image, [str(name) for name in get_channel_names(sdata.images[image.key])]


def _channel_rows(key: str, names: list[str], channels: Sequence[str] | None) -> list[int]:
    if channels is None:
        return list(range(len(names)))
    missing = [channel for channel in channels if channel not in names]
    if missing or not channels:
        msg = f"channels={list(channels)}: images[{key!r}] has the channels {names}."
        raise KeyError(msg)
    return [names.index(channel) for channel in channels]


# ---------------------------------------------------------------------------------------------------------- regions
def _windows(
    image: _sdata.Image, regions: Sequence[Region] | None
) -> Iterator[tuple[tuple[slice, slice], Region | None]]:
    """Slices of y and x in px, and the region that they are of."""
    height, width = image.pyramid[0].shape[1:]
    if regions is None:
        yield (slice(0, height), slice(0, width)), None
        return
    if len(regions) == 0:
        msg = "regions is empty: give at least one (x_min, y_min, x_max, y_max) in um, or None for the whole image."
        raise ValueError(msg)
    for region in regions:
        values = np.asarray(region, dtype=np.float64)
        if values.shape != (4,) or not np.isfinite(values).all() or (values[:2] >= values[2:]).any():
            msg = f"regions: {region} is no (x_min, y_min, x_max, y_max) in um with x_min < x_max and y_min < y_max."
            raise ValueError(msg)
        corners = image.to_px(_corners(*values))
        (x0, y0), (x1, y1) = np.rint(corners.min(0)).astype(int), np.rint(corners.max(0)).astype(int)
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            msg = (
                f"regions: {region} um reaches beyond images[{image.key!r}], which spans {_extent(image)} um (x_min, y_min, "
                "x_max, y_max)."
            )
            raise ValueError(msg)
        if x1 == x0 or y1 == y0:
            msg = f"regions: {region} um holds no pixel ({image.um_per_px:.4g} um/px)."
            raise ValueError(msg)
        yield (slice(int(y0), int(y1)), slice(int(x0), int(x1))), region


def _corners(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)


def _extent(image: _sdata.Image) -> list[float]:
    height, width = image.pyramid[0].shape[1:]
    corners = _apply(np.linalg.inv(_square(image.um_to_px)), _corners(0, 0, width, height))
    return [float(value) for value in (*corners.min(0).round(2), *corners.max(0).round(2))]


def _square(affine: np.ndarray) -> np.ndarray:
    return np.vstack([affine, [0, 0, 1]])


def _apply(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Affine (3, 3) applied to points (n, 2)."""
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


# ----------------------------------------------------------------------------------------------------------- labels
def _labels(sdata: SpatialData, key: str, image: _sdata.Image) -> da.Array:
    """Lazy labels, checked to lie on the grid of the image."""
    if key not in sdata.labels:
        msg = f"labels_key={key!r} is not among the labels, {sorted(sdata.labels)}."
        raise KeyError(msg)
    element = sdata.labels[key]
    labels = _sdata._scales(element)[0].data
    shape = image.pyramid[0].shape[1:]
    if not np.issubdtype(labels.dtype, np.integer):
        msg = f"labels[{key!r}] has the type {labels.dtype}; integers, one number an object, are needed."
        raise TypeError(msg)
    if labels.shape != shape:
        msg = (
            f"labels[{key!r}] has the size {labels.shape}, images[{image.key!r}] {shape} (y, x): rasterise the labels on "
            "the grid of the image."
        )
        raise ValueError(msg)
    height, width = shape
    corners = _corners(0, 0, width, height)
    shift = np.abs(image.to_px(_apply(_sdata._um_transformation(element, key), corners)) - corners).max()
    if shift > 0.01:
        msg = (
            f"labels[{key!r}] lies up to {shift:.4g} px from images[{image.key!r}] in {_keys.UM!r}: their "
            "transformations must be the same."
        )
        raise ValueError(msg)
    return labels.map_blocks(
        checked_int32, what=f"labels[{key!r}]", dtype=np.int32, meta=np.empty((0, 0), dtype=np.int32)
    )


# ----------------------------------------------------------------------------------------------------------- shapes
class _Shapes:
    """Polygons or circles, and the affine from their coordinates to pixels of the image."""

    def __init__(self, sdata: SpatialData, key: str, image: _sdata.Image) -> None:
        if key not in sdata.shapes:
            msg = f"shapes_key={key!r} is not among the shapes, {sorted(sdata.shapes)}."
            raise KeyError(msg)
        self.key = key
        self.frame: geopandas.GeoDataFrame = sdata.shapes[key]
        self.to_px = _square(image.um_to_px) @ _sdata._um_transformation(self.frame, key)
        self.margin = 0.0
        if "radius" in self.frame and (self.frame.geom_type == "Point").any():
            self.margin = float(self.frame["radius"].max())

    def rasterise(self, window: tuple[slice, slice], region: Region | None) -> np.ndarray:
        """Labels of the shapes in a window, (y, x) int32."""
        y, x = window
        labels = np.zeros((y.stop - y.start, x.stop - x.start), dtype=np.int32)
        corners = _apply(np.linalg.inv(self.to_px), _corners(x.start, y.start, x.stop, y.stop))
        # Points are searched by their centre, so circles that reach into the window need a margin.
        box = shapely.box(*(corners.min(0) - self.margin), *(corners.max(0) + self.margin))
        rows = np.sort(self.frame.sindex.query(box))
        if not len(rows):
            where = "the image" if region is None else f"the region {region} um"
            msg = f"shapes[{self.key!r}] has no shape in {where}: check the alignment, or choose another region."
            raise ValueError(msg)
        offset = np.array([x.start, y.start])
        for number, row in enumerate(rows, start=1):
            for part in self._polygons(int(row)):
                _draw(labels, part, self.to_px, offset, number)
        return labels

    def _polygons(self, row: int) -> list[shapely.Polygon]:
        geometry = self.frame.geometry.iloc[row]
        if isinstance(geometry, shapely.Point) and "radius" in self.frame:
            # 128 corners: 0.04 % of the area is lost.
            geometry = geometry.buffer(float(self.frame["radius"].iloc[row]), quad_segs=32)
        parts = _parts(geometry)
        if not parts:
            msg = (
                f"shapes[{self.key!r}] has a {geometry.geom_type} without an area, {self.frame.index[row]!r}: polygons, or "
                "points with a radius, are needed."
            )
            raise ValueError(msg)
        return parts


def _parts(geometry: Any) -> list[shapely.Polygon]:
    """All polygons of a geometry, however nested."""
    if isinstance(geometry, shapely.Polygon):
        return [] if geometry.is_empty else [geometry]
    return [part for child in getattr(geometry, "geoms", ()) for part in _parts(child)]


def _draw(labels: np.ndarray, part: shapely.Polygon, to_px: np.ndarray, offset: np.ndarray, number: int) -> None:
    """Set the pixels whose centre lies in a polygon, holes excepted."""
    inside, *holes = (_pixels(ring, to_px, offset, labels.shape) for ring in (part.exterior, *part.interiors))
    for hole in holes:
        inside = np.setdiff1d(inside, hole)
    labels.ravel()[inside] = number


def _pixels(ring: Any, to_px: np.ndarray, offset: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Flat indices of the pixels of a window whose centre lies in a ring."""
    # skimage puts the centre of a pixel at whole numbers, the package at the half between its edges.
    xy = _apply(to_px, shapely.get_coordinates(ring)) - offset - 0.5
    rows, columns = polygon(xy[:, 1], xy[:, 0], shape)
    return rows * shape[1] + columns
