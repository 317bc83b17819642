"""10x Xenium output, in um."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import get_transformation, set_transformation

from histoniche._keys import SPATIAL, UM

from ._attach import parse_image
from ._pixels import open_image
from ._um import check_affine, set_um

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_REQUIRED = ("experiment.xenium", "cells.zarr.zip", "cell_feature_matrix.h5", "cells.parquet")
# First file of the focus image by version of the vendor's software: 4, then 2 and 3, then 1.
_MORPHOLOGY = (
    "morphology_focus/ch0000_dapi.ome.tif",
    "morphology_focus/morphology_focus_0000.ome.tif",
    "morphology_focus.ome.tif",
)
_STAINS = {1: ["DAPI"], 4: ["DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin"]}


def read_xenium(
    path: str | Path,
    *,
    he: str | Path | None = None,
    he_affine: str | Path | ArrayLike | None = None,
    morphology: bool = True,
    shapes: bool = True,
    transcripts: bool = False,
    min_counts: int = 0,
) -> SpatialData:
    """Read the output folder of a 10x Xenium run into one micrometre coordinate system.

    Table, shapes and transcripts are read by :func:`spatialdata_io.xenium`, images lazily, tile by tile.

    Parameters
    ----------
    path
        Output folder, with ``experiment.xenium``, ``cells.zarr.zip``, ``cell_feature_matrix.h5``, ``cells.parquet``.
    he
        H&E image of the same section (OME-TIFF).
    he_affine
        Matrix (3, 3) from pixels of the H&E to pixels of the morphology image, or the path of the
        ``*_imagealignment.csv`` of Xenium Explorer, which holds it. Needed with ``he``.
    morphology
        Whether to read the morphology focus image (DAPI, and the stains of the multimodal kit).
    shapes
        Whether to read the polygons of cells and nuclei; otherwise cells are circles of the same area.
    transcripts
        Whether to read the transcripts (lazy, large).
    min_counts
        Cells with fewer counts are dropped.

    Returns
    -------
    SpatialData, all of whose elements lie in the coordinate system ``"um"``:

    - ``tables["table"]``: raw counts of genes (n, n_genes); ``obsm["spatial"]`` (n, 2) float64, x and y in um;
      annotates ``shapes["cell_boundaries"]`` or ``shapes["cell_circles"]``.
    - ``shapes["cell_boundaries"]`` and, where the folder has them, ``shapes["nucleus_boundaries"]``; or
      ``shapes["cell_circles"]``.
    - ``images["morphology_focus"]``, ``images["he"]`` multiscale; ``points["transcripts"]``.

    Raises
    ------
    FileNotFoundError
        The folder, or a file in it, is missing.
    ValueError
        No pixel size in ``experiment.xenium``; ``he`` without ``he_affine``; no cell left.
    """
    path = Path(path)
    pixel_size = _pixel_size(path)
    images = {}
    if (he is None) != (he_affine is None):
        msg = "he= and he_affine= belong together: the image, and how it lies over the morphology image."
        raise ValueError(msg)
    if he is not None and he_affine is not None:
        to_um = np.diag([pixel_size, pixel_size, 1.0]) @ _read_affine(he_affine)
        images["he"] = parse_image(he, um_per_px=None, affine=to_um)
    if morphology:
        images["morphology_focus"] = _morphology(path, pixel_size)

    from spatialdata_io import xenium

    with warnings.catch_warnings():
        # Its table annotates labels that are not read here; the annotation is set below.
        warnings.filterwarnings("ignore", message=".*table is annotating.*|.*annotates.*")
        sdata = xenium(
            path,
            cells_boundaries=shapes,
            nucleus_boundaries=shapes and (path / "nucleus_boundaries.parquet").is_file(),
            cells_as_circles=not shapes,
            cells_labels=False,
            nucleus_labels=False,
            transcripts=transcripts,
            morphology_mip=False,
            morphology_focus=False,
            aligned_images=False,
        )
    set_um(sdata, um_per_unit=pixel_size)
    elements = {name: element for kind, name, element in sdata.gen_elements() if kind != "tables"}
    region = "cell_boundaries" if shapes else "cell_circles"
    table = _table(sdata.tables["table"], elements[region], region, min_counts)
    kept = set(table.obs["cell_id"])
    for name, element in elements.items():
        # One frame only: the vendor's "global" is in pixels of the morphology image.
        to_um = get_transformation(element, to_coordinate_system=UM)
        if name in {"cell_boundaries", "cell_circles", "nucleus_boundaries"} and len(kept) < len(element):
            ids = pd.Index(element.get("cell_id", element.index))
            elements[name] = element[ids.isin(kept)].copy()
        set_transformation(elements[name], {UM: to_um}, set_all=True)
    return SpatialData.init_from_elements({**elements, **images, "table": table}, attrs=dict(sdata.attrs))


def _pixel_size(path: Path) -> float:
    if not path.is_dir():
        msg = f"There is no folder {str(path)!r}."
        raise FileNotFoundError(msg)
    missing = [name for name in _REQUIRED if not (path / name).exists()]
    if missing:
        msg = f"{str(path)!r} is not a whole Xenium output folder: {missing} are missing."
        raise FileNotFoundError(msg)
    specs = json.loads((path / "experiment.xenium").read_text(encoding="utf-8"))
    size = specs.get("pixel_size")
    if not isinstance(size, int | float) or not np.isfinite(size) or size <= 0:
        msg = f"experiment.xenium has pixel_size={size!r}, so um/px is unknown: a positive number is needed."
        raise ValueError(msg)
    return float(size)


def _read_affine(affine: str | Path | ArrayLike) -> NDArray:
    if not isinstance(affine, str | Path):
        return check_affine(affine, "he_affine")
    if not Path(affine).is_file():
        msg = f"There is no file he_affine={str(affine)!r}."
        raise FileNotFoundError(msg)
    try:
        matrix = np.loadtxt(affine, delimiter=",", dtype=np.float64, ndmin=2)
    except ValueError as error:
        msg = f"he_affine={str(affine)!r} is not a matrix of numbers (3 rows of 3, commas between): {error}."
        raise ValueError(msg) from error
    return check_affine(matrix, f"he_affine={str(affine)!r}")


def _morphology(path: Path, pixel_size: float) -> Any:
    file = next((path / name for name in _MORPHOLOGY if (path / name).is_file()), None)
    if file is None:
        msg = f"{str(path)!r} has no morphology image ({', '.join(_MORPHOLOGY)}): pass morphology=False."
        raise FileNotFoundError(msg)
    pixels = open_image(file)
    names = pixels.channels or _STAINS.get(len(pixels.data))
    factors = [2] * min(3, max(0, int(np.log2(min(pixels.data.shape[1:]) / 128))))
    return parse_image(file, um_per_px=pixel_size, affine=None, channel_names=names, scale_factors=factors)


def _table(table: Any, element: Any, region: str, min_counts: int) -> Any:
    counts = np.asarray(table.X.sum(axis=1)).ravel()
    known = np.asarray(table.obs["cell_id"].isin(element.index))
    if not known.all():
        msg = f"{int((~known).sum())} cells of the table have no shape in {region!r}: the folder is not consistent."
        raise ValueError(msg)
    keep = counts >= min_counts
    if not keep.any():
        msg = f"min_counts={min_counts!r} leaves none of {len(keep)} cells: the largest has {counts.max():.0f} counts."
        raise ValueError(msg)
    table = table[keep].copy()
    table.uns.pop(TableModel.ATTRS_KEY, None)
    table.obs["region"] = pd.Categorical([region] * table.n_obs)
    table.obsm[str(SPATIAL)] = np.asarray(table.obsm[str(SPATIAL)], dtype=np.float64)
    return TableModel.parse(table, region=region, region_key="region", instance_key="cell_id")
