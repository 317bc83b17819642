"""The only room that knows SpatialData and AnnData: what to read from, and one way to write back."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from anndata import AnnData
from spatialdata import SpatialData, get_centroids
from spatialdata.transformations import get_transformation
from xarray import DataTree

from . import _keys
from .neighbors import NeighborGraph

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr

    from .models._features import FeatureSource

_RECORDED_VERSIONS = ("histoniche", "anndata", "spatialdata", "numpy", "torch", "timm", "scvi-tools", "igraph")


# ---------------------------------------------------------------------------------------------------------- tables
@dataclass
class Target:
    """The object a public function was given, its table, and where results go.

    Nothing is written before :meth:`write`, which writes everything or nothing.
    """

    data: SpatialData | AnnData
    table: AnnData
    copied: bool

    @property
    def sdata(self) -> SpatialData:
        """The SpatialData object; an error where only a table was given."""
        if isinstance(self.data, SpatialData):
            return self.data
        msg = "An image is needed, but an AnnData was given: pass the SpatialData object that holds table and image."
        raise TypeError(msg)

    def write(
        self,
        step: str,
        *,
        params: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        **slots: Mapping[Any, Any],
    ) -> SpatialData | AnnData | None:
        """Write results to the slots of the table with their provenance.

        Parameters
        ----------
        step
            Name of the public function, the entry in ``uns["histoniche"]``.
        params
            Parameters of the call.
        inputs
            Names of the fields read.
        **slots
            ``obs``, ``obsm``, ``obsp``, ``uns``: mapping of key to value.

        Returns
        -------
        What the public function returns: the copy, or ``None``.
        """
        n = self.table.n_obs
        for slot in ("obs", "obsm", "obsp"):
            for key, value in slots.get(slot, {}).items():
                rows = len(value) if slot == "obs" else value.shape[0]
                if rows != n:
                    msg = f"{slot}[{str(key)!r}] has {rows} rows for {n} cells."
                    raise RuntimeError(msg)
        for slot, values in slots.items():
            store = getattr(self.table, slot)
            for key, value in values.items():
                store[str(key)] = value
        entry: dict[str, Any] = {
            "params": _serialisable(params),
            "inputs": _serialisable(inputs or {}),
            "outputs": [f"{slot}/{key}" for slot, values in slots.items() for key in values],
            "versions": _versions(),
        }
        entries = _without(self.table.uns.get(str(_keys.PROVENANCE), {}), entry["outputs"], step)
        self.table.uns[str(_keys.PROVENANCE)] = {**entries, step: entry}
        return self.data if self.copied else None


def _without(entries: Mapping[str, Any], outputs: list[str], step: str) -> dict[str, Any]:
    """Entries without their claims to fields that a step has written; those with none left are dropped."""
    out: dict[str, Any] = {}
    for name, entry in entries.items():
        left = [field for field in entry["outputs"] if field not in outputs]
        if left and name == step:
            # The same function with another key_added: its other results are still there, so their origin stays too.
            name = f"{step}.{left[0].split('/')[-1]}"
            while name in entries:
                name += "_"
        if left:
            out[name] = {**entry, "outputs": left}
    return out


def _versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _serialisable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce parameters to what h5ad and zarr can hold; ``None`` is left out."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            out[str(key)] = _serialisable(value)
        elif isinstance(value, bool | int | float | str | np.ndarray | np.generic):
            out[str(key)] = value
        elif isinstance(value, list | tuple) and not value:
            continue  # an empty list has no type that h5ad could keep
        elif isinstance(value, list | tuple) and all(isinstance(v, bool | int | float | str) for v in value):
            out[str(key)] = list(value)
        else:
            out[str(key)] = str(value)
    return out


def origin(table: AnnData, slot: str, key: str) -> dict[str, Any] | None:
    """Entry of ``uns["histoniche"]`` of the step that wrote a field, or ``None`` where the package did not write it."""
    for entry in reversed(list(table.uns.get(str(_keys.PROVENANCE), {}).values())):
        if f"{slot}/{key}" in list(entry["outputs"]):
            return entry
    return None


def open_target(data: SpatialData | AnnData, *, table_key: str | None, copy: bool, writes: bool = True) -> Target:
    """Resolve the table of the object that a public function was given.

    Parameters
    ----------
    data
        SpatialData object, or an AnnData where no image is needed.
    table_key
        Name of the table; may be left out where there is just one.
    copy
        Whether results go to a copy. Only the table is copied; images and shapes are shared with the original.
    writes
        Whether there are results to write: then a view is refused, in which they would be lost.
    """
    if isinstance(data, AnnData):
        if table_key is not None:
            msg = f"table_key={table_key!r} was given with an AnnData, which is itself the table: leave it out."
            raise ValueError(msg)
        table = data.copy() if copy else data
        return Target(table, _checked(table, writes=writes), copy)
    if not isinstance(data, SpatialData):
        msg = f"Expected a SpatialData or an AnnData, got {type(data).__name__}."
        raise TypeError(msg)
    table_key = _resolve_table_key(data, table_key)
    if copy:
        elements = {name: element for _, name, element in data.gen_elements() if name != table_key}
        data = SpatialData.init_from_elements(
            {**elements, table_key: data.tables[table_key].copy()}, attrs=dict(data.attrs)
        )
    return Target(data, _checked(data.tables[table_key], writes=writes), copy)


def _resolve_table_key(sdata: SpatialData, table_key: str | None) -> str:
    tables = sorted(sdata.tables)
    if not tables:
        msg = "The SpatialData object has no table: add one with the cells (see `hn.io.read_xenium`)."
        raise KeyError(msg)
    if table_key is None:
        if len(tables) > 1:
            msg = f"The SpatialData object has several tables, {tables}: name one with table_key=."
            raise ValueError(msg)
        return tables[0]
    if table_key not in tables:
        msg = f"table_key={table_key!r} is not among the tables, {tables}."
        raise KeyError(msg)
    return table_key


def _checked(table: AnnData, *, writes: bool) -> AnnData:
    if writes and table.is_view:
        msg = "The table is a view of another AnnData, so results would be lost: pass a copy (`adata = adata[...].copy()`)."
        raise ValueError(msg)
    if table.n_obs == 0:
        msg = "The table has no cells."
        raise ValueError(msg)
    if not table.obs_names.is_unique:
        msg = "obs_names are not unique: call `.obs_names_make_unique()` first."
        raise ValueError(msg)
    return table


# ------------------------------------------------------------------------------------------------------- coordinates
def coordinates(target: Target, spatial_key: str = "spatial") -> np.ndarray:
    """Centroids of the cells, (n, 2) float64, x and y in um, checked.

    Read from ``obsm[spatial_key]``, or from the shapes that annotate the table, in the micrometre coordinate system.
    """
    table = target.table
    if spatial_key in table.obsm:
        xy = np.asarray(table.obsm[spatial_key], dtype=np.float64)
        where = f"obsm[{spatial_key!r}]"
    elif isinstance(target.data, SpatialData):
        xy, where = _centroids_of_region(target.data, table)
    else:
        msg = f"obsm[{spatial_key!r}] is missing: put the centroids (x, y in um) there, or name their key with spatial_key=."
        raise KeyError(msg)
    if xy.ndim != 2 or xy.shape[1] < 2:
        msg = f"{where} has the shape {xy.shape}; (n_cells, 2) is needed."
        raise ValueError(msg)
    xy = np.ascontiguousarray(xy[:, :2])
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        msg = f"{where} has {int(bad.sum())} cells without finite coordinates, the first is {table.obs_names[bad][0]!r}: drop them."
        raise ValueError(msg)
    groups = slide_of_cell(table)
    order = np.lexsort((xy[:, 1], xy[:, 0], groups))
    repeated = (np.diff(groups[order]) == 0) & (np.diff(xy[order], axis=0) == 0).all(axis=1)
    if repeated.any():
        cell = table.obs_names[order[:-1][repeated][0]]
        msg = (
            f"{where} has {int(repeated.sum())} cells at the coordinates of another cell, the first at those of {cell!r}: "
            "drop the duplicates (are several slides in one table without a region column?)."
        )
        raise ValueError(msg)
    return xy


def _centroids_of_region(sdata: SpatialData, table: AnnData) -> tuple[np.ndarray, str]:
    attrs = table.uns.get("spatialdata_attrs")
    if not attrs:
        msg = "The table has neither obsm['spatial'] nor a region that it annotates, so cells have no coordinates."
        raise KeyError(msg)
    xy = np.full((table.n_obs, 2), np.nan)
    for region in np.unique(np.asarray(table.obs[attrs["region_key"]].astype(str))):
        rows = np.flatnonzero(table.obs[attrs["region_key"]].astype(str) == region)
        if region not in sdata:
            names = sorted(name for _, name, _ in sdata.gen_elements())
            msg = f"The table annotates the region {region!r}, which the SpatialData object lacks; it has {names}."
            raise KeyError(msg)
        element = sdata[region]
        _um_transformation(element, region)
        frame = get_centroids(element, coordinate_system=_keys.UM).compute()
        frame.index = frame.index.astype(str)
        if not frame.index.is_unique:
            msg = f"The shapes {region!r} have several instances of the same id, {frame.index[frame.index.duplicated()][0]!r}."
            raise ValueError(msg)
        instances = table.obs[attrs["instance_key"]].iloc[rows].astype(str)
        xy[rows] = frame.reindex(instances)[["x", "y"]].to_numpy()
    return xy, f"centroids of {attrs['region']!r}"


def slide_of_cell(table: AnnData) -> np.ndarray:
    """Integer code of the slide of every cell (the region that it annotates), (n,) int64; 0 where there is one slide."""
    attrs = table.uns.get("spatialdata_attrs")
    if not attrs or attrs["region_key"] not in table.obs:
        return np.zeros(table.n_obs, dtype=np.int64)
    return np.unique(np.asarray(table.obs[attrs["region_key"]].astype(str)), return_inverse=True)[1].astype(np.int64)


def train_mask(table: AnnData, split_key: str) -> np.ndarray:
    """Training cells, (n,) bool: ``obs[split_key] == "train"``, or all cells where there is no split."""
    if split_key not in table.obs:
        return np.ones(table.n_obs, dtype=bool)
    mask = np.asarray(table.obs[split_key].astype(str)) == "train"
    if not mask.any():
        msg = f"obs[{split_key!r}] has no cell of the value 'train'; it has {sorted(set(table.obs[split_key].astype(str)))}."
        raise ValueError(msg)
    return mask


def test_mask(table: AnnData, split_key: str) -> np.ndarray:
    """Test cells, (n,) bool: ``obs[split_key] == "test"``; none where there is no split."""
    if split_key not in table.obs:
        return np.zeros(table.n_obs, dtype=bool)
    return np.asarray(table.obs[split_key].astype(str)) == "test"


def features(table: AnnData, key: str) -> np.ndarray:
    """Embedding ``obsm[key]`` as an array (n, d), checked to be finite."""
    if key not in table.obsm:
        msg = f"obsm[{key!r}] is missing; obsm has {sorted(table.obsm)}."
        raise KeyError(msg)
    values = np.asarray(table.obsm[key])
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
        msg = f"obsm[{key!r}] must be a float array (n, d), got {values.dtype} {values.shape}."
        raise ValueError(msg)
    bad = ~np.isfinite(values.sum(axis=1, dtype=np.float32))
    if bad.any():
        msg = f"obsm[{key!r}] has {int(bad.sum())} cells with NaN or infinite values, the first is {table.obs_names[bad][0]!r}."
        raise ValueError(msg)
    return values


def streamed_features(table: AnnData, key: str) -> np.ndarray | FeatureSource:
    """As :func:`features`; an embedding that was left on disk is read from its store, batch by batch."""
    if not isinstance(table.obsm.get(key), da.Array):
        return features(table, key)
    params = (origin(table, "obsm", key) or {}).get("params") or {}
    if "lazy_name" not in params:
        return features(table, key)
    if params["lazy_name"] != table.obsm[key].name:
        # Cells were selected or reordered: the store still has them all, as they were.
        from .models._features import Lazy

        return Lazy(table.obsm[key])
    from .encoders import FeatureStore

    return FeatureStore(params["store"])


def niche_graph(table: AnnData) -> tuple[NeighborGraph, float] | None:
    """Neighbour graph of the table and its radius in um, or ``None`` where `hn.pp.spatial_neighbors` has not run."""
    if str(_keys.DISTANCES) not in table.obsp or str(_keys.NEIGHBORS) not in table.uns:
        return None
    radius = float(table.uns[str(_keys.NEIGHBORS)]["params"]["radius"])
    return NeighborGraph.from_csr(table.obsp[str(_keys.DISTANCES)]), radius


def need_graph(table: AnnData) -> tuple[NeighborGraph, float]:
    """As :func:`niche_graph`, with an error where there is none."""
    found = niche_graph(table)
    if found is None:
        msg = f"obsp[{str(_keys.DISTANCES)!r}] is missing: run `hn.pp.spatial_neighbors` first."
        raise KeyError(msg)
    return found


# ------------------------------------------------------------------------------------------------------------ images
@dataclass(frozen=True)
class Image:
    """An RGB image and where its pixels lie, as the engines need it.

    Attributes
    ----------
    key
        Name of the image in the SpatialData object.
    pyramid
        Lazy arrays (c, y, x), full resolution first.
    um_to_px
        (2, 3) affine from x, y in um to x, y in pixels of the full resolution (pixel corner convention: the centre
        of the first pixel is at 0.5, 0.5).
    um_per_px
        Size of a pixel of the full resolution in um.
    """

    key: str
    pyramid: tuple[da.Array, ...]
    um_to_px: np.ndarray
    um_per_px: float

    def to_px(self, xy: np.ndarray) -> np.ndarray:
        """Pixel coordinates (x, y) of the full resolution of points in um, (n, 2) float64."""
        return xy @ self.um_to_px[:, :2].T + self.um_to_px[:, 2]


def image(sdata: SpatialData, image_key: str | None, *, n_channels: int | None = 3) -> Image:
    """Resolve an image, its pyramid and its place in um.

    Parameters
    ----------
    sdata
        SpatialData object.
    image_key
        Name of the image; may be left out where there is just one.
    n_channels
        Number of channels needed; 3 also asks for uint8. ``None``: any image.

    Raises
    ------
    KeyError
        No image, or none of this name.
    ValueError
        Several images and no name; an image that is not 2D, or not RGB uint8; no, non-affine or strongly anisotropic
        transformation to the micrometre coordinate system.
    """
    key = resolve_image_key(sdata, image_key)
    element = sdata.images[key]
    scales = _scales(element)
    if scales[0].ndim != 3:
        msg = f"images[{key!r}] has the axes {scales[0].dims} {scales[0].shape}; a 2D image (c, y, x) is needed: select or project z."
        raise ValueError(msg)
    if n_channels is not None:
        _check_rgb(key, scales[0], n_channels)
    px_to_um = _um_transformation(element, key)
    um_per_px = np.linalg.svd(px_to_um[:2, :2], compute_uv=False)
    if um_per_px[-1] <= 0 or um_per_px[0] / um_per_px[-1] > 1.05:
        msg = (
            f"The transformation of images[{key!r}] to {_keys.UM!r} stretches its axes differently "
            f"({um_per_px[0]:.4g} and {um_per_px[-1]:.4g} um/px): resample the image to square pixels."
        )
        raise ValueError(msg)
    inverse = np.linalg.inv(px_to_um)
    return Image(key, tuple(scale.data for scale in scales), inverse[:2], float(np.sqrt(np.prod(um_per_px))))


def resolve_image_key(sdata: SpatialData, image_key: str | None) -> str:
    """Name of the image to use; an error that lists what there is where it is unclear."""
    images = sorted(sdata.images)
    if not images:
        msg = "The SpatialData object has no image: add the H&E with `hn.io.attach_image`."
        raise KeyError(msg)
    if image_key is None:
        if len(images) > 1:
            msg = f"The SpatialData object has several images, {images}: name one with image_key=."
            raise ValueError(msg)
        return images[0]
    if image_key not in images:
        msg = f"image_key={image_key!r} is not among the images, {images}."
        raise KeyError(msg)
    return image_key


def _scales(element: xr.DataArray | DataTree) -> list[xr.DataArray]:
    if isinstance(element, DataTree):
        return [next(iter(element[name].ds.values())) for name in element.children]
    return [element]


def _check_rgb(key: str, pixels: xr.DataArray, n_channels: int) -> None:
    c, y, x = pixels.shape
    if c != n_channels:
        if x in (3, 4) and y > 4:
            fix = "its channels seem to come last: parse it with `Image2DModel.parse(array, dims=('y', 'x', 'c'))`"
        elif c == 4:
            fix = "drop the alpha channel of RGBA (keep the first three), or render four stains with `hn.pp.virtual_he`"
        elif c == 1:
            fix = "it is grey: histology encoders need the three colours of H&E"
        else:
            fix = "render multi-stain images with `hn.pp.virtual_he`"
        msg = f"images[{key!r}] has the shape (c, y, x) = {(c, y, x)}; {n_channels} channels (RGB) are needed: {fix}."
        raise ValueError(msg)
    if pixels.dtype != np.uint8:
        msg = (
            f"images[{key!r}] has the type {pixels.dtype}; RGB in uint8 (0 to 255) is needed: "
            "rescale it, and say so in your methods."
        )
        raise ValueError(msg)


def _um_transformation(element: Any, key: str) -> np.ndarray:
    """Affine matrix (3, 3) from the element's own coordinates x, y to um."""
    transformations = get_transformation(element, get_all=True)
    if _keys.UM not in transformations:
        msg = (
            f"{key!r} has no transformation to the micrometre coordinate system {_keys.UM!r} (it has "
            f"{sorted(transformations)}), so um/px is unknown: call `hn.io.set_um(sdata, um_per_unit=...)`, or attach "
            "images with `hn.io.attach_image`."
        )
        raise ValueError(msg)
    try:
        matrix = transformations[_keys.UM].to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))
    except (ValueError, TypeError, NotImplementedError) as error:
        msg = (
            f"The transformation of {key!r} to {_keys.UM!r} is a {type(transformations[_keys.UM]).__name__}, which is "
            "not affine: resample the image into the frame of the cells first."
        )
        raise ValueError(msg) from error
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:2, :2])) < 1e-12:
        msg = f"The transformation of {key!r} to {_keys.UM!r} cannot be inverted: {matrix.tolist()}."
        raise ValueError(msg)
    return matrix


def check_inside(image_: Image, xy: np.ndarray, names: Any) -> np.ndarray:
    """Pixel coordinates of the cells; an error where any lies outside the image."""
    px = image_.to_px(xy)
    height, width = image_.pyramid[0].shape[1:]
    edge = 1e-6  # a cell exactly on the edge may be rounded beyond it
    outside = (px < -edge).any(axis=1) | (px[:, 0] > width + edge) | (px[:, 1] > height + edge)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        msg = (
            f"{int(outside.sum())} of {len(px)} cells lie outside images[{image_.key!r}] ({width} x {height} px at "
            f"{image_.um_per_px:.4g} um/px), the first is {names[first]!r} at x, y = {xy[first].round(1).tolist()} um: "
            "check the alignment, or drop those cells."
        )
        raise ValueError(msg)
    return px
