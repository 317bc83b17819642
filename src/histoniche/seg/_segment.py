"""Segment an image of a SpatialData object into cells."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import zarr
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity
from tqdm.auto import tqdm

from histoniche._keys import SPATIAL, UM
from histoniche._sdata import Target
from histoniche._settings import settings

from ._fields import check_stretch, grid_of_pixels, percentile_limits, stretch
from ._morphology import measure
from ._sdata_fields import channel_image
from ._segmenter import Segmenter, check_scale
from ._tiled import resampled, tiled_labels, tiled_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._tiled import Block

_REGION_PX = 8192
"""Width of the part of the image whose maps are one dask graph: bounds memory on images of any width."""
_LENGTHS = ["perimeter", "major_axis", "minor_axis"]


def segment(
    sdata: SpatialData,
    model: Segmenter | str | Path,
    *,
    image_key: str | None = None,
    channel: str | Sequence[str] | None = None,
    key_added: str = "cells",
    um_per_px: float | None = None,
    resample: bool = False,
    min_area: float | None = None,
    tile_px: int = 512,
    overlap_px: int = 64,
    batch_size: int = 4,
    store: str | Path | None = None,
    copy: bool = False,
) -> SpatialData | None:
    """Segment a whole image with a student, and add cells, their outlines and a table.

    The image is read lazily: once at full resolution for the percentiles that its values are stretched by, of a grid of
    about 4 million pixels, whatever coarser scales it has; then for the maps. Overlapping tiles are predicted and blended,
    in threads that decode the image while the network, one tile batch at a time, uses all cores or the GPU. The maps lie in
    a temporary store on disk (4 bytes a pixel, float16), from which objects are made block by block, so memory hardly
    grows with the image, the labels in memory (4 bytes a pixel, see ``store``) and the cells' outlines apart. No border of a tile or block cuts an
    object.

    Parameters
    ----------
    sdata
        SpatialData object with an image that has a transformation to um.
    model
        Student, or its model directory.
    image_key
        Name of the image; may be left out where there is just one.
    channel
        Channel to segment, or several, where they have other names than those that the student was trained on.
    key_added
        Name of the new shapes, and start of the names of labels and table: letters, digits, ``_``, ``-`` and ``.``.
    um_per_px
        Resolution that the student was trained at, where its configuration does not know it.
    resample
        Whether the image is seen at the student's resolution, whatever its own. Labels then have that resolution too.
        Otherwise pixels are taken as they are, and an image more than 1.5 times finer or coarser is refused.
    min_area
        Objects of a smaller area in um2 are left out, beside those below the ``min_area`` (px) of the student.
    tile_px, overlap_px
        Width of a tile and of what it shares with the next, in px; multiples of 32.
    batch_size
        Tiles predicted at once; the result does not depend on it, rounding apart.
    store
        Directory, which must not exist, in which the labels are kept as a zarr array. The element of ``labels`` is then
        lazy, and the directory must stay where it is until the object is saved. By default labels are in memory.
    copy
        Whether to return a new object and leave ``sdata`` as it is. Elements are shared, not duplicated.

    Returns
    -------
    ``None``, or the new object. Reads ``images[image_key]``. Writes, all or nothing:

    ``labels[f"{key_added}_labels"]``
        (y, x) int32: 0 is background, cell i has the number i, from 1 without gaps.
    ``shapes[key_added]``
        Outer outlines, polygons in um, with the number of the cell as index.
    ``tables[f"{key_added}_table"]``
        Annotates the shapes; no variables. ``obs``: ``cell_id``, ``region``, ``area_um2``, ``perimeter_um``,
        ``major_axis_um``, ``minor_axis_um``, ``eccentricity``, ``solidity``, ``mean_intensity`` (of the image's values in the
        first channel);
        ``obsm["spatial"]``: (n, 2) float64 centroids x, y in um; ``uns["histoniche"]["segment"]``: provenance.

    Raises
    ------
    FileExistsError
        ``store`` exists.
    FileNotFoundError
        No model directory there.
    KeyError
        No such image or channel.
    TypeError
        Not a SpatialData object.
    ValueError
        A damaged model; an image with a z axis, without um/px, or of another um/px than the student's; a name that is taken
        or not allowed; a channel that is empty, saturated or not finite; no object found; sizes out of range.
    """
    if not isinstance(sdata, SpatialData):
        msg = f"Expected a SpatialData, got {type(sdata).__name__}: segment reads an image."
        raise TypeError(msg)
    names = {"labels": f"{key_added}_labels", "shapes": key_added, "tables": f"{key_added}_table"}
    _check_names(sdata, key_added, list(names.values()))
    if min_area is not None and not 0 <= min_area < np.inf:
        msg = f"min_area={min_area} must be an area in um2, 0 or more."
        raise ValueError(msg)
    if store is not None and Path(store).exists():
        msg = f"store={str(store)!r} exists: choose another place for the labels."
        raise FileExistsError(msg)
    if not isinstance(model, Segmenter):
        model = Segmenter.load(model)
    plane = _plane(sdata, model, image_key, channel, um_per_px=um_per_px, resample=resample)
    maps = tiled_maps(plane.pixels, plane.predictor(model), tile=tile_px, overlap=overlap_px, batch_size=batch_size)
    params = {
        "channels": plane.channels, "model": repr(model), "weights_sha256": model.digest, "limits": plane.limits,
        "um_per_px": plane.um_per_px, "resample": resample, "min_area": min_area, "tile_px": tile_px,
        "overlap_px": overlap_px, "store": None if store is None else str(Path(store).resolve()),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="histoniche-") as folder, _beside(store) as made:
        stored = _store_maps(maps, Path(folder) / "maps.zarr", tile_px - overlap_px)
        labels: Any = np.zeros(maps.shape[1:], dtype=np.int32)
        if made is not None:
            labels = zarr.create_array(made, shape=maps.shape[1:], chunks=(512, 512), dtype="int32")
        cells, polygons = _cells(stored, plane, model, min_area or 0.0, labels)
        outlines = gpd.GeoDataFrame(geometry=polygons, index=cells["cell_id"].to_numpy())
        elements = {
            names["shapes"]: ShapesModel.parse(outlines, transformations={UM: Identity()}),
            names["tables"]: _table(cells, key_added, params, plane.key),
        }
        matrix = Affine(plane.px_to_um, input_axes=("x", "y"), output_axes=("x", "y"))
        with _placed(made, store):
            labels = labels if store is None else da.from_zarr(str(store))
            parsed = Labels2DModel.parse(labels, dims=("y", "x"), transformations={UM: matrix})
            return _with_elements(sdata, {names["labels"]: parsed, **elements}, copy=copy)


def _check_names(sdata: SpatialData, key_added: str, names: list[str]) -> None:
    """Refuse names that the object has, or that spatialdata would refuse when all work is done."""
    present = {name.lower(): name for _, name, _ in sdata.gen_elements()}
    tiny = ShapesModel.parse(gpd.GeoDataFrame({"radius": [1.0]}, geometry=[shapely.Point(0, 0)]))
    for name in names:
        try:
            SpatialData().shapes[name] = tiny
        except (KeyError, TypeError, ValueError) as error:
            msg = (
                f"key_added={key_added!r} makes an element named {name!r}, which spatialdata refuses ({error}): use letters, "
                "digits, '_', '-' and '.', no '__' at the beginning, and neither '.' nor '..' alone."
            )
            raise ValueError(msg) from error
        if name.lower() in present:
            found = present[name.lower()]
            case = "" if found == name else f" (key_added={key_added!r} makes {name!r}; case does not tell names apart)"
            msg = f"The object already has an element {found!r}{case}: choose another key_added, or delete it."
            raise ValueError(msg)


@contextmanager
def _beside(store: str | Path | None) -> Iterator[Path | None]:
    """A place for labels on the disk of the store, removed at the end."""
    if store is None:
        yield None
        return
    there = next(parent for parent in Path(store).resolve().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=there, prefix=".histoniche-") as folder:
        yield Path(folder) / "labels.zarr"


@contextmanager
def _placed(made: Path | None, store: str | Path | None) -> Iterator[None]:
    """Move labels to their place, and away again should the rest fail."""
    if made is None or store is None:
        yield
        return
    new = [parent for parent in Path(store).resolve().parents if not parent.exists()]
    try:
        Path(store).parent.mkdir(parents=True, exist_ok=True)
        made.rename(store)
        yield
    except BaseException:
        if not made.exists():
            shutil.rmtree(store)
        with suppress(OSError):  # one that somebody else has put something into
            for parent in new:
                parent.rmdir()
        raise


def _with_elements(sdata: SpatialData, elements: dict[str, Any], *, copy: bool) -> SpatialData | None:
    """Add elements, all or none."""
    if copy:
        rest = {name: element for _, name, element in sdata.gen_elements()}
        return SpatialData.init_from_elements({**rest, **elements}, attrs=dict(sdata.attrs))
    try:
        for name, element in elements.items():
            sdata[name] = element
    except BaseException:
        for name in elements:
            if name in sdata:
                del sdata[name]
        raise
    return None


def as_callable(
    model: Segmenter | str | Path, *, limits: tuple[float, float] | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Wrap a student as a function from image to labels, as other tools want it.

    ``sopa.segmentation.custom_staining_based`` and the like cut an image into patches and merge the objects themselves.

    Parameters
    ----------
    model
        Student, or its model directory.
    limits
        Values of the image that become 0 and 1. By default the student's percentiles of each patch, which makes a patch of
        background brighter than it is: give the limits of the whole image where patches are small.

    Returns
    -------
    Function from (c, y, x), of which the first channel is segmented (as many as the student sees), to labels (y, x) int32; no
    objects in a patch in which a channel's values are all the same.

    Raises
    ------
    FileNotFoundError
        No model directory there.
    ValueError
        A damaged model; limits that do not rise; an image that is not (c, y, x), or has values that are not finite.
    """
    segmenter = model if isinstance(model, Segmenter) else Segmenter.load(model)
    n = len(segmenter.config.channels)
    if limits is not None and not limits[0] < limits[1]:
        msg = f"limits={limits} must rise."
        raise ValueError(msg)

    def segmented(pixels: np.ndarray) -> np.ndarray:
        if np.ndim(pixels) != 3 or 0 in np.shape(pixels) or len(pixels) < n:
            msg = f"The image has the shape {np.shape(pixels)}; (c, y, x) with at least {n} channel(s) is needed."
            raise ValueError(msg)
        plane = np.asarray(pixels[:n], dtype=np.float32)
        if not np.isfinite(plane).all():
            msg = "The image has values that are not finite."
            raise ValueError(msg)
        if limits is None:
            edges = np.percentile(plane, segmenter.config.stretch, axis=(1, 2)).T
        else:
            edges = np.tile(limits, (n, 1))
        if not (edges[:, 0] < edges[:, 1]).all():
            return np.zeros(plane.shape[1:], dtype=np.int32)
        return segmenter.instances(segmenter.predict_maps(stretch(plane, edges)[None])[0])

    return segmented


@dataclass(frozen=True)
class _Plane:
    """Channels of an image, lazy, at the resolution at which they are segmented.

    Attributes
    ----------
    key, channels
        Where they come from.
    pixels
        (c, y, x), lazy.
    limits
        (c, 2) values that become 0 and 1.
    px_to_um
        (3, 3) affine from x, y in px to um.
    um_per_px
        Size of a pixel.
    """

    key: str
    channels: list[str]
    pixels: da.Array
    limits: np.ndarray
    px_to_um: np.ndarray
    um_per_px: float

    def predictor(self, model: Segmenter) -> Callable[[np.ndarray], np.ndarray]:
        """Function from raw pixels (B, c, y, x) to maps."""

        def predict(batch: np.ndarray) -> np.ndarray:
            if not np.isfinite(batch).all():
                msg = f"Channel {self.channels} of images[{self.key!r}] has values that are not finite."
                raise ValueError(msg)
            return model.predict_maps(np.stack([stretch(pixels, self.limits) for pixels in batch]))

        return predict


def _plane(
    sdata: SpatialData,
    model: Segmenter,
    image_key: str | None,
    channel: str | Sequence[str] | None,
    *,
    um_per_px: float | None,
    resample: bool,
) -> _Plane:
    """Find the channels, and see them at the resolution that is asked for."""
    picture, names = channel_image(sdata, image_key)
    where = f"images[{picture.key!r}]"
    channels = _channels(model, channel)
    for name in channels:
        if names.count(name) != 1:
            msg = f"{where} has no channel {name!r} (or several); it has {names}: name one with channel=."
            raise KeyError(msg)
    expected = _resolution(model, um_per_px)
    if expected is None or not resample:
        try:
            check_scale(expected, picture.um_per_px, where)
        except ValueError as error:
            fix = "um_per_px= says what the student was trained at." if expected is None else "resample=True does that."
            msg = f"{error} In hn.seg.segment, {fix}"
            raise ValueError(msg) from error
    planes = {name: tuple(level[names.index(name)] for level in picture.pyramid) for name in channels}
    full = da.stack([pyramid[0] for pyramid in planes.values()])
    limits = _limits(full, model.config.stretch, [f"Channel {name!r} of {where}" for name in channels])
    px_to_um = np.linalg.inv(np.vstack([picture.um_to_px, [0, 0, 1]]))
    if not resample or expected is None:
        return _Plane(picture.key, channels, full, limits, px_to_um, picture.um_per_px)
    scale = picture.um_per_px / expected
    matrix = px_to_um @ np.diag([1 / scale, 1 / scale, 1])
    pixels = da.stack([resampled(pyramid, scale) for pyramid in planes.values()])
    return _Plane(picture.key, channels, pixels, limits, matrix, expected)


def _channels(model: Segmenter, channel: str | Sequence[str] | None) -> list[str]:
    """Channels of the image, in the order in which the student sees them."""
    if channel is None:
        return list(model.config.channels)
    channels = [channel] if isinstance(channel, str) else list(channel)
    if len(channels) != len(model.config.channels):
        msg = f"channel={channels}, but the student sees {len(model.config.channels)}: {model.config.channels}."
        raise ValueError(msg)
    return channels


def _resolution(model: Segmenter, um_per_px: float | None) -> float | None:
    """Um/px that the student was trained at."""
    known = model.config.um_per_px
    if um_per_px is None:
        return known
    if not 0 < um_per_px < np.inf or known not in {None, um_per_px}:
        msg = (
            f"um_per_px={um_per_px} must be positive, and is for students that do not know their resolution; this one was "
            f"trained at {known}."
        )
        raise ValueError(msg)
    return um_per_px


def _limits(image: da.Array, percentiles: list[float], what: list[str]) -> np.ndarray:
    """Values that become 0 and 1, (c, 2) float32."""
    sample = grid_of_pixels(image)
    limits = percentile_limits(sample, percentiles)
    for plane, edges, name in zip(sample, limits, what, strict=True):
        check_stretch(plane, edges, percentiles=percentiles, what=name, leave="Choose another channel")
    return limits


class _Counted:
    """An array on disk that counts the chunks written to it."""

    def __init__(self, array: Any, bar: tqdm) -> None:
        self._array, self._bar = array, bar

    def __setitem__(self, key: Any, value: np.ndarray) -> None:
        self._array[key] = value
        self._bar.update()


def _store_maps(maps: da.Array, path: Path, step: int) -> zarr.Array:
    """Compute maps, region by region, to a temporary array on disk; no two threads write to one of its chunks."""
    chunks = (2, *(min(step, length) for length in maps.shape[1:]))
    stored = zarr.create_array(path, shape=maps.shape, chunks=chunks, dtype="float16")
    n = maps.numblocks[1] * maps.numblocks[2]
    with tqdm(total=n, desc="maps", disable=not settings.progress) as bar:
        for y in _regions(maps.chunks[1]):
            for x in _regions(maps.chunks[2]):
                window = (slice(None), y, x)
                da.store(
                    [maps[window].astype(np.float16)], [_Counted(stored, bar)], regions=[window], lock=False,
                    scheduler="threads",
                )  # fmt: skip
    return stored


def _regions(chunks: tuple[int, ...]) -> list[slice]:
    """Whole chunks, about as many as a region is wide."""
    edges = np.concatenate([[0], np.cumsum(chunks)])
    chosen = [*edges[: -1 : max(1, _REGION_PX // chunks[0])].tolist(), int(edges[-1])]
    return [slice(low, high) for low, high in itertools.pairwise(chosen)]


def _cells(
    maps: zarr.Array, plane: _Plane, model: Segmenter, min_area: float, labels: Any
) -> tuple[pd.DataFrame, np.ndarray]:
    """The cells' measures and outlines in um; their numbers are written to the labels."""
    tables, outlines = [], []
    blocks = tiled_labels(maps, model.instances, labels, least_px=min_area / plane.um_per_px**2)
    for block in tqdm(blocks, desc="cells", disable=not settings.progress):
        if block.labels.any():
            cells, polygons = _measured(block, plane)
            tables.append(cells)
            outlines.append(polygons)
    if not tables:
        msg = (
            f"No object found in channel {plane.channels} of images[{plane.key!r}]: is it the channel and the um/px that "
            f"the student was trained on (threshold {model.config.threshold:g}, min_area {min_area:g} um2)?"
        )
        raise ValueError(msg)
    return pd.concat(tables, ignore_index=True), np.concatenate(outlines)


def _measured(block: Block, plane: _Plane) -> tuple[pd.DataFrame, np.ndarray]:
    """Measures and outlines of the objects of a block, in um."""
    cells, polygons = measure(block.labels, np.asarray(plane.pixels[(0, *block.window)]))
    corner = np.array([block.window[1].start, block.window[0].start])

    def to_um(xy: np.ndarray) -> np.ndarray:
        return (xy + corner) @ plane.px_to_um[:2, :2].T + plane.px_to_um[:2, 2]

    cells["cell_id"] = np.arange(1, len(cells) + 1) + block.before
    cells[["x", "y"]] = to_um(cells[["x", "y"]].to_numpy())
    cells["area"] *= plane.um_per_px**2
    cells[_LENGTHS] *= plane.um_per_px
    return cells, shapely.transform(polygons, to_um)


def _table(cells: pd.DataFrame, region: str, params: dict[str, Any], image_key: str) -> AnnData:
    """Table that annotates the shapes, with provenance."""
    ids = cells["cell_id"].to_numpy()
    table = AnnData(np.empty((len(ids), 0), np.float32), obs=pd.DataFrame({"cell_id": ids}, index=ids.astype(str)))
    table.obs["region"] = pd.Categorical([region] * len(cells))
    table = TableModel.parse(table, region=region, region_key="region", instance_key="cell_id")
    units = {"area": "area_um2", **{name: f"{name}_um" for name in _LENGTHS}}
    measures = [*units, "eccentricity", "solidity", "mean_intensity"]
    obs = {units.get(name, name): cells[name].to_numpy() for name in measures}
    Target(table, table, copied=False).write(
        "segment", params=params, inputs={"image_key": image_key}, obs=obs,
        obsm={SPATIAL: cells[["x", "y"]].to_numpy(dtype=np.float64)},
    )  # fmt: skip
    return table
