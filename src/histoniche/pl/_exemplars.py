"""What niches look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dask
import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
from scipy.spatial import KDTree

from histoniche import _keys
from histoniche._sdata import Image, coordinates, open_target
from histoniche._slides import images_of_cells, rows_of_slides

from ._shared import finish, format_length, level_for, niches, obs_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_CROP_PX = 160
"""Crops are read from the coarsest level of the pyramid that has at least this many pixels for one."""
_CANDIDATES = (0.1, 0.3, 1.0)
"""Exemplars come from the first of these shares of a niche's cells, the most confident ones, in which crops need not overlap."""
_LEAST_CELLS = 0.25
"""Crops with fewer cells than this share of the niche's median are left out: they show a cell that lies astray."""
_HALVINGS = 12


def exemplars(
    sdata: SpatialData,
    *,
    image_key: str | Mapping[str, str] | None = None,
    niche_key: str = "niche",
    by: str | None = str(_keys.CONFIDENCE),
    n: int = 6,
    field_of_view: float = 112.0,
    spatial_key: str = "spatial",
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    table_key: str | None = None,
) -> Figure:
    """Plot crops of the image around typical cells of every niche, one row per niche.

    Typical are cells with a high value of ``by``; from the highest tenth those are taken that lie apart, or from
    more of them where crops would overlap. Cells astray, with a quarter or less of the cells that a crop of their niche
    usually holds, are left out. Only the crops are read from the image.

    Parameters
    ----------
    sdata
        SpatialData with table and image.
    image_key
        Name of the image; may be left out where there is just one. For several slides in the table, each with its own
        image, a mapping from the name of the slide (its region in the table) to the name of its image.
    niche_key
        Categorical column of ``obs`` with niches.
    by
        Numerical column of ``obs`` that ranks the cells; with ``None`` the order of the table does.
    n
        Number of crops per niche.
    field_of_view
        Side of a crop in um.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    figsize
        Size of the figure in inches.
    save
        File to save the figure to, which is then closed.
    table_key
        Name of the table.

    Returns
    -------
    The figure; nothing is written to ``sdata``. Niches without a cell whose crop lies within the image have no row.

    Raises
    ------
    KeyError
        A column, the table or the image is missing, or a slide in ``image_key``.
    ValueError
        No crop lies within its image, ``n`` or ``field_of_view`` is not positive, an image that is not RGB uint8 with a
        place in um, or one image for several slides where the object has others that might be meant.
    """
    target = open_target(sdata, table_key=table_key, copy=False, writes=False)
    if n < 1 or not field_of_view > 0:
        msg = f"n={n} crops of field_of_view={field_of_view} um: both must be positive."
        raise ValueError(msg)
    niche = niches(target.table, niche_key)
    rank = np.zeros(len(niche.codes)) if by is None else obs_column(target.table, by).to_numpy(dtype=np.float64)
    xy = coordinates(target, spatial_key)
    sources = images_of_cells(target.sdata, target.table, image_key)
    inside = np.zeros(len(xy), dtype=bool)
    for source, rows in sources:
        inside[rows] = _inside(source, xy[rows], field_of_view)
    crowd = _crowd(xy, rows_of_slides(target.table).values(), field_of_view)
    chosen = {}
    for k in range(len(niche.names)):
        cells = np.flatnonzero((niche.codes == k) & inside & np.isfinite(rank))
        if len(cells):
            cells = cells[crowd[cells] >= _LEAST_CELLS * np.median(crowd[cells])]
            chosen[k] = cells[_spread(xy[cells], rank[cells], n, field_of_view)]
    if not chosen:
        keys = [source.key for source, _ in sources]
        msg = f"No crop of {field_of_view:g} um around a cell lies within the images {keys}: choose a smaller field_of_view."
        raise ValueError(msg)
    crops = _crops(sources, xy, np.concatenate(list(chosen.values())), field_of_view)
    size = figsize or (1.1 * n + 0.8, 1.1 * len(chosen) + 0.4)
    figure, axes = plt.subplots(len(chosen), n, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    for row, (k, cells) in zip(axes, chosen.items(), strict=True):
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        for ax, cell in zip(row, cells.tolist(), strict=False):
            ax.imshow(crops[cell], extent=(0, field_of_view, field_of_view, 0), interpolation="antialiased")
        row[0].set_ylabel(
            niche.names[k], rotation=0, ha="right", va="center", labelpad=8, fontsize=9,
            bbox={"boxstyle": "square,pad=0.3", "fc": niche.colors[k], "ec": "none"},
            color="white" if niche.colors[k][:3] @ [0.299, 0.587, 0.114] < 0.6 else "black",
        )  # fmt: skip
    figure.suptitle(f"{niche_key}: crops of {format_length(field_of_view)}", fontsize=9)
    return finish(figure, save)


def _inside(source: Image, xy: np.ndarray, field_of_view: float) -> np.ndarray:
    """Cells whose crop lies within the image, (n,) bool."""
    px, half = source.to_px(xy), field_of_view / source.um_per_px / 2
    height, width = source.pyramid[0].shape[1:]
    return np.asarray(((px >= half) & (px <= np.array([width, height]) - half)).all(axis=1))


def _crowd(xy: np.ndarray, slides: Iterable[np.ndarray], field_of_view: float) -> np.ndarray:
    """Cells of the same slide in the crop around each cell, (n,) int64."""
    crowd = np.zeros(len(xy), dtype=np.int64)
    for rows in slides:
        points = xy[rows]
        crowd[rows] = KDTree(points).query_ball_point(points, field_of_view / 2, p=np.inf, return_length=True)
    return crowd


def _spread(xy: np.ndarray, rank: np.ndarray, n: int, least: float) -> np.ndarray:
    """Positions of n cells of high rank, in this order, that lie apart, if possible by ``least``.

    The distance asked for is halved until n cells keep it; where that makes it less than ``least``, cells of lower rank are
    let in first.
    """
    order = np.argsort(-rank, kind="stable")
    if len(order) <= n:
        return order
    for share in _CANDIDATES:
        candidates = order[: max(n, int(share * len(order)))]
        points = xy[candidates]
        apart = float(np.linalg.norm(np.ptp(points, axis=0))) / 2
        for _ in range(_HALVINGS):
            if apart < least and share < _CANDIDATES[-1]:
                break
            chosen = _apart(points, n, apart)
            if len(chosen) == n:
                return candidates[chosen]
            apart /= 2
    return order[:n]


def _apart(points: np.ndarray, n: int, distance: float) -> list[int]:
    """The first points, at most n, that lie further than a distance from those before them."""
    chosen: list[int] = []
    near = np.zeros(len(points), dtype=bool)
    while len(chosen) < n and not near.all():
        chosen.append(int(near.argmin()))
        near |= np.linalg.norm(points - points[chosen[-1]], axis=1) <= distance
    return chosen


def _crops(
    sources: list[tuple[Image, np.ndarray]], xy: np.ndarray, cells: np.ndarray, field_of_view: float
) -> dict[int, np.ndarray]:
    """Crop (side, side, 3) around each of the cells, read in one go."""
    lazy: dict[int, da.Array] = {}
    for source, rows in sources:
        level = source.pyramid[level_for(source, field_of_view / _CROP_PX)]
        shrink = np.array([level.shape[2] / source.pyramid[0].shape[2], level.shape[1] / source.pyramid[0].shape[1]])
        side = max(1, round(field_of_view / source.um_per_px * float(shrink[0])))
        here = np.intersect1d(cells, rows)
        corner = np.round(source.to_px(xy[here]) * shrink - side / 2).astype(int)
        corner = np.clip(corner, 0, np.maximum(np.array([level.shape[2], level.shape[1]]) - side, 0))
        for cell, (x, y) in zip(here.tolist(), corner.tolist(), strict=True):
            lazy[cell] = level[:, y : y + side, x : x + side]
    return {cell: np.asarray(crop).transpose(1, 2, 0) for cell, crop in dask.compute(lazy)[0].items()}
