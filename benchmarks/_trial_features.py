"""Features of the training cells for ``student_trials.py``: other resolutions, stains, strides, outlines, adapted encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import _adapt_encoder
import anndata
import geopandas
import numpy as np
import shapely
from spatialdata import SpatialData, read_zarr
from spatialdata.models import TableModel
from xenium_pancreas import ENCODER, SYMMETRIES

import histoniche as hn

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr
    from student_trials import Cells, Strip

N_STRIDE_8 = 40
"""The first features are those of stride 8, the others those of stride 16."""
STAINS = {"stain a": (0.8, 1.15, 1.0), "stain b": (1.2, 0.9, 1.15)}
"""Factors of the optical density in red, green and blue."""


class Features:
    """Features by name, (n, d) float16; made once and kept in a folder.

    ``frozen``: those of the run; ``stride 8``, ``stride 16``, ``three strides``: parts of it and more; ``no mirror images``;
    ``0.75 um/px``, ...: of the image at another resolution; ``stain a``, ...: of the image in other stains; ``outlines``: of the
    polygons; ``views`` and ``latent``: by an encoder that was adapted on the cells that a strip's students are fitted on.
    """

    def __init__(self, data: Path, runs: Path, output: Path) -> None:
        self.data, self.runs, self.output = data, runs, output

    def __call__(self, name: str, cells: Cells, strip: Strip) -> np.ndarray:
        """Features of all training cells, for the students of a strip."""
        frozen = np.asarray(cells.table.obsm[f"X_{ENCODER}"])
        if name == "frozen":
            return frozen
        if name == "stride 8":
            return frozen[:, :N_STRIDE_8]
        if name == "stride 16":
            return frozen[:, N_STRIDE_8:]
        if name == "three strides":
            return np.load(self.runs / "features_3.npy", mmap_mode="r")[cells.rows]
        own = f"_{strip.name}" if name in _adapt_encoder.OBJECTIVES else ""
        place = self.output / f"{name.replace(' ', '_').replace('/', '_')}{own}.npy"
        if not place.exists():
            made = self._make(name, cells, strip)
            np.save(place.with_suffix(".new.npy"), made)
            place.with_suffix(".new.npy").replace(place)
        return np.load(place)

    def _make(self, name: str, cells: Cells, strip: Strip) -> np.ndarray:
        if name == "outlines":
            return outlines(self.data / "cell_boundaries.parquet", cells.table.obs_names.to_numpy())
        if name == "no mirror images":
            return self._embed(cells, symmetries=1)
        if name in STAINS:
            return self._embed(cells, gain=STAINS[name])
        if name in _adapt_encoder.OBJECTIVES:
            weights = self.output / f"{name}_{strip.name}.safetensors"
            if not weights.exists():
                _adapt_encoder.adapt(self._image().data.compute(), cells, strip, name, weights)
            return self._embed(cells, weights=weights)
        return self._embed(cells, um_per_px=float(name.removesuffix(" um/px")))

    def _image(self) -> xr.DataArray:
        return read_zarr(self.runs / "tissue.zarr")["virtual_he"]["scale0"]["image"]

    def _embed(
        self,
        cells: Cells,
        *,
        symmetries: int = SYMMETRIES,
        um_per_px: float | None = None,
        gain: tuple[float, ...] | None = None,
        weights: Path | None = None,
    ) -> np.ndarray:
        """Dense features of the image, in other stains where there is a gain."""
        tissue = read_zarr(self.runs / "tissue.zarr")
        table = TableModel.parse(anndata.AnnData(obs=cells.table.obs[["split"]], obsm={"spatial": cells.xy}))
        part = SpatialData.init_from_elements({"virtual_he": tissue["virtual_he"], "table": table})
        if gain is not None:
            image = part["virtual_he"]["scale0"]["image"].data.compute()
            stained = (
                256 * ((image.astype(np.float32) + 1) / 256) ** np.array(gain, dtype=np.float32)[:, None, None] - 1
            )
            del part.images["virtual_he"]
            hn.io.attach_image(
                part, stained.clip(0, 255).astype(np.uint8), um_per_px=_adapt_encoder.IMAGE_UM, key_added="virtual_he"
            )
        hn.tl.histology_embedding(
            part, encoder=ENCODER, mode="dense", symmetries=symmetries, um_per_px=um_per_px, weights=weights, key_added="made"
        )  # fmt: skip
        return np.asarray(part["table"].obsm["made"])


def outlines(polygons: Path, names: np.ndarray) -> np.ndarray:
    """Log area, circularity, log elongation, solidity and log length of the cells' polygons, (n, 5) float16."""
    shapes = geopandas.read_parquet(polygons).loc[names].geometry.to_numpy()
    area = shapely.area(shapes)
    corners, owner = shapely.get_coordinates(shapely.oriented_envelope(shapes), return_index=True)
    first = np.searchsorted(owner, np.arange(len(shapes)))
    sides = np.linalg.norm(np.stack([corners[first + i + 1] - corners[first + i] for i in (0, 1)]), axis=2)
    length, width = sides.max(axis=0), np.maximum(sides.min(axis=0), 1e-3)
    round_, solid = 4 * np.pi * area / shapely.length(shapes) ** 2, area / shapely.area(shapely.convex_hull(shapes))
    return np.stack([np.log(area), round_, np.log(length / width), solid, np.log(length)], axis=1).astype(np.float16)
