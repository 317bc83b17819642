"""Readers for the layouts of the benchmark data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import geopandas
import numpy as np
import pandas as pd
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity

import histoniche as hn

KIDNEY_UM_PER_PX = 2.008


def read_xenium_pancreas(folder: str | Path, *, shapes: bool = False, min_counts: int = 0) -> SpatialData:
    """Xenium human pancreas: ``cells.h5ad``, ``cell_boundaries.parquet``, ``morphology.ome.tif``.

    Genes only; ``obs["graph_cluster"]`` categorical; ``obsm["spatial"]`` in um; image ``"morphology"`` lazy, multiscale,
    four stains at 0.425 um/px. Cells are points of a table without ``shapes``, polygons ``"cell_boundaries"`` with it.
    508 of 140,702 cells have no transcript of a gene (and no cluster): ``min_counts=1`` drops them.
    """
    folder = Path(folder)
    table = anndata.read_h5ad(folder / "cells.h5ad")
    table = table[:, (table.var["feature_types"] == "Gene Expression").to_numpy()].copy()
    # The vendor gave cells without transcripts no cluster, spelled "<NA>": they are missing, not a type of their own.
    clusters = table.obs["graph_cluster"].astype(str)
    names = sorted(set(clusters) - {"<NA>"}, key=int)
    table.obs["graph_cluster"] = pd.Categorical(clusters.where(clusters != "<NA>"), categories=names)
    table = table[np.asarray(table.X.sum(axis=1)).ravel() >= min_counts].copy()
    table.obsm["spatial"] = np.asarray(table.obsm["spatial"], dtype=np.float64)
    elements: dict[str, Any] = {}
    if shapes:
        polygons = geopandas.read_parquet(folder / "cell_boundaries.parquet")
        polygons = polygons.loc[table.obs_names]
        elements["cell_boundaries"] = ShapesModel.parse(polygons, transformations={"um": Identity()})
        table.obs["region"] = pd.Categorical(["cell_boundaries"] * table.n_obs)
        table.obs["cell_id"] = table.obs_names.to_numpy()
        table = TableModel.parse(table, region="cell_boundaries", region_key="region", instance_key="cell_id")
    else:
        table = TableModel.parse(table)
    sdata = SpatialData.init_from_elements({**elements, "table": table})
    hn.io.attach_image(sdata, folder / "morphology.ome.tif", key_added="morphology")
    return sdata


def read_visium_hd_kidney(folder: str | Path, *, bin_um: int = 8) -> SpatialData:
    """Visium HD human kidney: ``bins_8um.h5ad`` (bins, not cells) and the H&E ``he.png`` at 2.008 um/px.

    Bins of 16, 24, ... um are sums over whole squares of bins of 8 um, at the mean of their centres.
    """
    folder = Path(folder)
    table = anndata.read_h5ad(folder / "bins_8um.h5ad")
    table.obsm["spatial"] = np.asarray(table.obsm["spatial"], dtype=np.float64) * KIDNEY_UM_PER_PX
    if bin_um != 8:
        table = aggregate_bins(table, bin_um // 8)
    sdata = SpatialData.init_from_elements({"table": TableModel.parse(table)})
    hn.io.attach_image(sdata, folder / "he.png", um_per_px=KIDNEY_UM_PER_PX)
    return sdata


def aggregate_bins(table: anndata.AnnData, factor: int) -> anndata.AnnData:
    """Sum the counts of squares of ``factor`` x ``factor`` bins; incomplete squares, at the edges, are dropped.

    Reads ``obs["array_row"]``, ``obs["array_col"]`` and ``obsm["spatial"]``; the result has the same fields.
    """
    row, column = (table.obs[name].to_numpy() for name in ("array_row", "array_col"))
    squares = np.stack([(row - row.min()) // factor, (column - column.min()) // factor], axis=1)
    squares, member, size = np.unique(squares, axis=0, return_inverse=True, return_counts=True)
    total = sparse.csr_matrix((np.ones(len(member), dtype=np.float32), (member.ravel(), np.arange(len(member)))))
    whole = size == factor**2
    xy = (total @ table.obsm["spatial"]) / size[:, None]
    obs = pd.DataFrame(squares, columns=["array_row", "array_col"], index=[f"{r}_{c}" for r, c in squares])
    summed = sparse.csr_matrix(total @ table.X).astype(np.float32)
    return anndata.AnnData(summed, obs=obs, var=table.var.copy(), obsm={"spatial": xy})[whole].copy()
