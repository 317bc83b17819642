"""A synthetic tissue: transcripts and H&E of the same cells, made from nothing but a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from histoniche._keys import SPATIAL, UM

from ._anatomy import CELL_TYPES, NICHES, Anatomy
from ._staining import render

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIDE_OF_6000_UM = 1100.0
_MIN_CELLS, _MIN_GENES = 100, 4 * len(CELL_TYPES)


def synthetic_tissue(
    n_cells: int = 6000,
    *,
    n_niches: int = 5,
    n_genes: int = 120,
    um_per_px: float = 0.5,
    seed: int = 0,
) -> SpatialData:
    """Make a tissue with known niches: transcript counts and a synthetic H&E image of the same cells.

    The tissue resembles pancreas: acinar lobules, bands of stroma, lymphoid aggregates, islets and ducts with open
    lumens (and, with six niches, inflamed parenchyma). A niche is a property of the neighbourhood: six cell types are
    mixed in proportions of the niche, none is confined to one. Every horizontal quarter of the tissue holds every
    niche. The image is drawn, not photographed: figures made from it say nothing about real tissue.

    Parameters
    ----------
    n_cells
        Number of cells, at least 100. The area grows with it: 6000 cells cover 1.1 x 1.1 mm.
    n_niches
        Number of niches, 2 to 6.
    n_genes
        Number of genes, at least 24; about half of them are markers of a cell type or answer to a niche.
    um_per_px
        Size of a pixel of the image in um, 0.1 to 4.
    seed
        Seed; the same seed gives the same bytes.

    Returns
    -------
    SpatialData, all of whose elements lie in the coordinate system ``"um"``:

    - ``tables["table"]``: ``X`` raw counts (n_cells, n_genes), CSR float32 with integer values; ``obs["cell_type"]``
      and ``obs["niche_true"]``, categorical; ``obsm["spatial"]`` (n_cells, 2) float64, x and y in um;
      ``var["marker_of"]``; annotates the shapes ``"cells"``.
    - ``shapes["cells"]``: circles, radius in um.
    - ``images["he"]``: multiscale RGB uint8 (3, y, x), ``um_per_px`` um/px.
    - ``attrs["synthetic"]`` is ``True``.

    Raises
    ------
    ValueError
        A parameter outside the limits above.
    """
    _check(n_cells, n_niches, n_genes, um_per_px)
    rng = np.random.default_rng(seed)
    side = _SIDE_OF_6000_UM * float(np.sqrt(n_cells / 6000))
    anatomy = Anatomy(side, tuple(NICHES)[:n_niches], rng)
    xy = anatomy.place_cells(n_cells)
    site = anatomy.at(xy[:, 0], xy[:, 1])
    cell_type = anatomy.draw_types(site)
    counts, marker_of = _counts(cell_type, site.niche, n_genes, rng)
    he = render(anatomy, xy, cell_type, site, um_per_px=um_per_px, rng=rng)

    radius = np.array([7.0, 6.0, 5.5, 5.5, 3.8, 5.5])[cell_type] * np.exp(rng.normal(0, 0.08, n_cells))
    table = AnnData(
        X=counts,
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical.from_codes(cell_type, list(CELL_TYPES)),
                "niche_true": pd.Categorical.from_codes(site.niche, list(anatomy.niches)),
                "region": pd.Categorical(["cells"] * n_cells),
                "cell_id": np.arange(n_cells),
            },
            index=[f"cell_{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame({"marker_of": pd.Categorical(marker_of)}, index=[f"gene_{j}" for j in range(n_genes)]),
        obsm={str(SPATIAL): xy},
    )
    scale = Scale([um_per_px, um_per_px], axes=("x", "y"))
    return SpatialData.init_from_elements(
        {
            "he": Image2DModel.parse(
                he,
                dims=("c", "y", "x"),
                c_coords=["r", "g", "b"],
                transformations={UM: scale},
                scale_factors=[2, 2],
                chunks=(3, 512, 512),
            ),
            "cells": ShapesModel.parse(xy, geometry=0, radius=radius, transformations={UM: Identity()}),
            "table": TableModel.parse(table, region="cells", region_key="region", instance_key="cell_id"),
        },
        attrs={"synthetic": True},
    )


def _check(n_cells: int, n_niches: int, n_genes: int, um_per_px: float) -> None:
    limits = {
        "n_cells": (n_cells, _MIN_CELLS, np.inf),
        "n_niches": (n_niches, 2, len(NICHES)),
        "n_genes": (n_genes, _MIN_GENES, np.inf),
        "um_per_px": (um_per_px, 0.1, 4.0),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            msg = f"{name}={value!r} is outside {low} to {high}."
            raise ValueError(msg)


def _counts(cell_type: NDArray, niche: NDArray, n_genes: int, rng: np.random.Generator) -> tuple[csr_matrix, list[str]]:
    """Negative binomial counts, (n, n_genes) CSR float32, and which cell type each gene marks (``"none"``)."""
    n, n_types = len(cell_type), len(CELL_TYPES)
    per_type = max(2, n_genes // 15)
    marked = np.full(n_genes, -1)
    marked[: per_type * n_types] = np.repeat(np.arange(n_types), per_type)
    rng.shuffle(marked)
    profile = np.tile(rng.lognormal(-1.2, 0.8, n_genes), (n_types, 1))
    marker = np.flatnonzero(marked >= 0)
    profile[marked[marker], marker] *= rng.uniform(8, 20, len(marker))
    # A few genes answer to the place, whatever the type of the cell.
    answer = np.ones((niche.max() + 1, n_genes))
    others = np.flatnonzero(marked < 0)
    answering = rng.permutation(others)[: len(others) // 6]
    answer[rng.integers(0, len(answer), len(answering)), answering] = rng.uniform(2, 4, len(answering))
    mean = profile[cell_type] * answer[niche]
    depth = rng.lognormal(np.log(90), 0.35, n)
    mean *= (depth / mean.sum(axis=1))[:, None]
    dispersion = 2.0
    counts = rng.poisson(rng.gamma(dispersion, mean / dispersion)).astype(np.float32)
    empty = np.flatnonzero(counts.sum(axis=1) == 0)
    counts[empty, mean[empty].argmax(axis=1)] = 1
    names = np.append(CELL_TYPES, "none")
    return csr_matrix(counts), names[marked].tolist()
