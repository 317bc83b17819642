"""Density-adaptive neighbourhoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from histoniche import _keys
from histoniche._sdata import coordinates, open_target, slide_of_cell, train_mask
from histoniche.neighbors import radius_for_density, radius_graph

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def spatial_neighbors(
    data: SpatialData | AnnData,
    *,
    target_neighbors: float = 50,
    radius: float | None = None,
    split_key: str = "split",
    spatial_key: str = "spatial",
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Connect each cell with all cells within a radius that suits the density of the tissue.

    The radius is chosen such that a cell has ``target_neighbors`` neighbours on average: large in sparse tissue, small
    in dense. It is estimated on the training cells alone, where a split is known, and can be given to reuse that of
    another section. Cells of different regions of the table are never neighbours.

    Parameters
    ----------
    data
        SpatialData object, or the table itself.
    target_neighbors
        Wished mean number of neighbours. Not used where ``radius`` is given.
    radius
        Radius in um.
    split_key
        Column of ``obs`` with the split; without it the radius is estimated on all cells.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    seed
        Seed of the sample of cells on which the radius is estimated.
    table_key
        Name of the table.
    copy
        Whether to return a copy instead of writing to ``data``.

    Returns
    -------
    ``None``, or the copy. Reads ``obsm[spatial_key]`` (n, 2) in um and ``obs[split_key]``. Writes, in squidpy's format:

    ``obsp["niche_connectivities"]``
        (n, n) sparse float32, 1 for two cells at most the radius apart; a cell is not its own neighbour.
    ``obsp["niche_distances"]``
        (n, n) sparse float32, distances in um.
    ``uns["niche_neighbors"]``
        Names of the two and ``params`` with ``radius`` (um) and ``mean_neighbors``.
    ``uns["histoniche"]["spatial_neighbors"]``
        Provenance.

    Raises
    ------
    KeyError
        No table or coordinates.
    ValueError
        Missing, infinite or duplicate coordinates; radius or target not positive, or more neighbours than cells.

    References
    ----------
    Expected number of neighbours as the rule for the radius: arXiv 2604.09076.
    """
    target = open_target(data, table_key=table_key, copy=copy)
    xy = coordinates(target, spatial_key)
    groups = slide_of_cell(target.table)
    given = radius
    if radius is None:
        if not target_neighbors > 0:
            msg = f"target_neighbors must be positive, got {target_neighbors}."
            raise ValueError(msg)
        train = train_mask(target.table, split_key)
        radius = radius_for_density(xy[train], target_neighbors, groups=groups[train], seed=seed)
    graph = radius_graph(xy, radius, groups=groups)
    distances = graph.to_csr()
    ones = np.ones_like(distances.data)
    connectivities = sparse.csr_matrix((ones, distances.indices.copy(), distances.indptr.copy()), shape=distances.shape)
    params = {"target_neighbors": target_neighbors if given is None else None, "radius": float(radius), "seed": seed}
    description = {
        "connectivities_key": str(_keys.CONNECTIVITIES),
        "distances_key": str(_keys.DISTANCES),
        "params": {
            "n_neighbors": 6,  # squidpy writes its own default here for a radius graph; its readers ask for the key
            "coord_type": "generic",
            "radius": float(radius),
            "transform": "None",
            "mean_neighbors": float(graph.counts.mean()),
        },
    }
    return target.write(
        "spatial_neighbors",
        params=params,
        inputs={"spatial_key": spatial_key, "split_key": split_key},
        obsp={_keys.CONNECTIVITIES: connectivities, _keys.DISTANCES: distances},
        uns={_keys.NEIGHBORS: description},
    )
