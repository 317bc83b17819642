"""Hold out a strip of the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from histoniche._sdata import coordinates, open_target, slide_of_cell
from histoniche.neighbors import radius_for_density

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_CATEGORIES = ["train", "test", "buffer"]


def strips(xy: np.ndarray, groups: np.ndarray, n_strips: int, test_strip: int, buffer: float) -> np.ndarray:
    """Codes 0 train, 1 test, 2 buffer of cells, (n,) int8: horizontal strips of equal height, per slide.

    The buffer lies outside the test strip, on both sides of it.
    """
    codes = np.zeros(len(xy), dtype=np.int8)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        y = xy[rows, 1]
        edges = np.linspace(y.min(), y.max(), n_strips + 1)
        low, high = edges[test_strip], edges[test_strip + 1]
        inside = (y >= low) & ((y < high) if test_strip < n_strips - 1 else (y <= high))
        near = ~inside & (y >= low - buffer) & (y <= high + buffer)
        codes[rows[inside]], codes[rows[near]] = 1, 2
    return codes


def spatial_holdout(
    data: SpatialData | AnnData,
    *,
    n_strips: int = 4,
    test_strip: int = 1,
    buffer: float | None = None,
    field_of_view: float = 112.0,
    context_hops: int = 2,
    target_neighbors: float = 50,
    radius: float | None = None,
    key_added: str = "split",
    spatial_key: str = "spatial",
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Split the tissue into training cells, a test strip and a buffer between them.

    The slide (each slide, where the table has several) is cut into horizontal strips of equal height, counted from
    the smallest y, which is the top of the image. The second is the test strip by default: it touches no edge of the
    tissue. Cells within the buffer on either side of it belong to neither part. It keeps what a training cell may have
    seen (the cells of its neighbourhood and of its context, and half a field of view around them) away from the test
    cells, and the other way round; and neighbourhoods of training and test cells, with their crops, apart.

    Parameters
    ----------
    data
        SpatialData object, or the table itself.
    n_strips
        Number of strips.
    test_strip
        The strip to hold out, 0 is the topmost.
    buffer
        Width of the buffer in um. By default the larger of ``2 * radius + field_of_view``, with which no pixel and no
        cell that a training neighbourhood can hold lies in a test cell's neighbourhood or crops, and of
        ``(context_hops + 1) * radius + field_of_view / 2``, with which no cell of one part lies in the context of a cell
        of the other, nor in that of the neighbours whose predictions a label is the mean of. This holds for
        neighbourhoods of the radius meant here; :func:`histoniche.pp.spatial_neighbors` estimates its own on the training
        cells, which is larger where they are few, unless it is given this one (``params["radius"]``, below). A smaller
        buffer is refused below ``max(field_of_view / 2, radius)``.
    field_of_view
        Width of a crop in um.
    context_hops
        Hops of the widest context that a student is to read. Wider context sees more, and costs training cells:
        4 suits whole slides; the buffer of 2 leaves :func:`histoniche.tl.distill_niches` two hops.
    target_neighbors
        Mean number of neighbours, from which the radius is estimated where it is not given.
    radius
        Radius of the neighbourhoods in um; by default the one with ``target_neighbors``, over all cells.
    key_added
        Column of ``obs`` to write.
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
    ``None``, or the copy. Reads ``obsm[spatial_key]`` (n, 2) in um. Writes:

    ``obs[key_added]``
        Categorical with the categories train, test and buffer.
    ``uns["histoniche"]["spatial_holdout"]``
        Provenance, with ``buffer`` and ``radius`` in um in its ``params``.

    Raises
    ------
    KeyError
        No table or coordinates.
    ValueError
        A strip that does not exist, less than no hop, a buffer that leaks, a test strip or training part without cells.

    References
    ----------
    Within-slide hold-out of arXiv 2604.09076 (4 strips, the second is the test strip), with a wider buffer.
    """
    target = open_target(data, table_key=table_key, copy=copy)
    xy = coordinates(target, spatial_key)
    groups = slide_of_cell(target.table)
    if n_strips < 2 or not 0 <= test_strip < n_strips:
        msg = f"test_strip={test_strip} of n_strips={n_strips}: at least 2 strips are needed, and 0 <= test_strip < n_strips."
        raise ValueError(msg)
    if context_hops < 0:
        msg = f"context_hops={context_hops} must not be negative: 0 for a student without context."
        raise ValueError(msg)
    given = radius
    if radius is None:
        radius = radius_for_density(xy, target_neighbors, groups=groups, seed=seed)
    least = max(field_of_view / 2, radius)
    if buffer is None:
        buffer = max(2 * radius + field_of_view, (context_hops + 1) * radius + field_of_view / 2)
    if not buffer >= least:
        msg = (
            f"buffer={buffer} um leaks: at least {least:.1f} um are needed, the larger of half a field of view "
            f"({field_of_view / 2:.1f} um) and the radius of the neighbourhoods ({radius:.1f} um)."
        )
        raise ValueError(msg)
    codes = strips(xy, groups, n_strips, test_strip, buffer)
    for code, name in enumerate(_CATEGORIES[:2]):
        if not (codes == code).any():
            msg = (
                f"No cell is left for {name!r} with n_strips={n_strips}, test_strip={test_strip} and "
                f"buffer={buffer:.1f} um: choose another strip or fewer strips."
            )
            raise ValueError(msg)
    split = pd.Categorical.from_codes(codes, categories=_CATEGORIES)
    return target.write(
        "spatial_holdout",
        params={
            "n_strips": n_strips, "test_strip": test_strip, "buffer": float(buffer), "radius": float(radius),
            "target_neighbors": target_neighbors if given is None else None, "field_of_view": field_of_view, "seed": seed,
        },
        inputs={"spatial_key": spatial_key},
        obs={key_added: split},
    )  # fmt: skip
