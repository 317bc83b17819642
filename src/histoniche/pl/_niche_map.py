"""Maps of niches on the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from histoniche import _keys
from histoniche._sdata import coordinates, image, open_target
from histoniche._slides import rows_of_slides

from ._shared import NOT_ASSIGNED, Niches, box_of, draw_image, draw_scale_bar, finish, nice_length, niches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from histoniche._sdata import Image

_SAMPLE = 4000
_LABEL_ROWS = 24


def niche_map(
    data: SpatialData | AnnData,
    *,
    keys: str | Sequence[str] | None = None,
    image_key: str | Mapping[str, str] | Literal[False] | None = None,
    titles: Sequence[str] | None = None,
    size: float | None = None,
    alpha: float | None = None,
    split_key: str = "split",
    outline: bool = True,
    spatial_key: str = "spatial",
    ncols: int | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
    table_key: str | None = None,
) -> Figure:
    """Plot niches where the cells lie, one panel per column and slide, in colours that stay the same in all plots.

    Parameters
    ----------
    data
        SpatialData with a table, or the table.
    keys
        Categorical columns of ``obs``, by default those of ``niche_teacher`` and ``niche`` that exist. Missing values are
        light grey.
    image_key
        Image behind the cells, read from a level of its pyramid that suits the figure; a first panel shows it alone.
        By default the image of ``data``, where there is one slide and one image, RGB (uint8) and with a place in um, and
        else none. For several slides a mapping from the name of the slide (its region in the table) to the name of its image.
        ``False``: no image.
    titles
        Titles of the columns, instead of ``keys``.
    size
        Diameter of a cell in um; by default from the density of the cells, so that they fill the tissue.
    alpha
        Opacity of the cells; by default 1, and 0.75 on an image.
    split_key
        Column of ``obs`` with the split.
    outline
        Whether to outline the test cells, where ``obs[split_key]`` exists and they fill a rectangle of the tissue.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    ncols
        Number of columns of panels; by default wide slides are put below each other, others side by side.
    figsize
        Size of the figure in inches.
    ax
        Axes to draw the only panel into (one key, one slide, no image panel).
    save
        File to save the figure to, which is then closed, unless ``ax`` was given.
    table_key
        Name of the table.

    Returns
    -------
    The figure; nothing is written to ``data``. Reads ``obs[keys]``, ``uns["<key>_colors"]``, ``obs[split_key]`` and
    ``obsm[spatial_key]`` in um.

    Raises
    ------
    KeyError
        A column, a table or an image is missing, or, without ``keys``, both columns.
    ValueError
        No cell with a niche, an image that was asked for and is not RGB uint8 with a place in um, one image for several
        slides, ``ax`` for several panels.
    TypeError
        An image was asked for with an AnnData.
    """
    target = open_target(data, table_key=table_key, copy=False, writes=False)
    keys = _keys_to_show(target.table, keys)
    shown = [niches(target.table, key) for key in keys]
    xy = coordinates(target, spatial_key)
    slides = rows_of_slides(target.table)
    images = _images(data, image_key, list(slides))
    names = list(titles) if titles is not None else keys
    if len(names) != len(keys):
        msg = f"titles has {len(names)} names for {len(keys)} keys."
        raise ValueError(msg)
    panels = [
        (slide, column, f"{slide}: {name}" if len(slides) > 1 else name)
        for slide in slides
        for column, name in [*([(None, "image")] if images else []), *zip(shown, names, strict=True)]
    ]
    if ax is not None and len(panels) > 1:
        msg = f"ax takes one panel, and there are {len(panels)}: leave ax out, or plot one key without image."
        raise ValueError(msg)
    diameter = size if size is not None else _diameter(xy, list(slides.values()))
    boxes = {slide: box_of(xy[rows], diameter) for slide, rows in slides.items()}
    if ax is None:
        figure, axes = _figure(list(boxes.values()), len(panels), len(panels) // len(slides), ncols, figsize)
    else:
        figure, axes = ax.figure, [ax]
    split = target.table.obs[split_key].astype(str).to_numpy() if outline and split_key in target.table.obs else None
    opacity = alpha if alpha is not None else (0.75 if images else 1.0)
    for axes_, (slide, column, title) in zip(axes, panels, strict=False):
        _frame(axes_, boxes[slide], title)
        rows = slides[slide]
        if slide in images:
            draw_image(axes_, images[slide], boxes[slide])
        if column is not None:
            _cells(
                axes_,
                xy[rows],
                column.codes[rows],
                column=column,
                diameter=diameter,
                alpha=opacity,
                grey=slide not in images,
            )
        if split is not None:
            _outline(axes_, xy[rows], split[rows], diameter)
    for axes_ in axes[len(panels) :]:
        axes_.set_axis_off()
    for axes_, (slide, _, _) in zip(axes, panels, strict=False):
        draw_scale_bar(axes_, nice_length(boxes[slide][1] - boxes[slide][0]))
    _legends(figure, axes, panels, shown, missing=not images)
    return finish(figure, save, close=ax is None)


def _keys_to_show(table: AnnData, keys: str | Sequence[str] | None) -> list[str]:
    """Columns to plot; by default those with the niches of teacher and student that exist."""
    if keys is not None:
        return [keys] if isinstance(keys, str) else list(keys)
    found = [key for key in map(str, (_keys.TEACHER, _keys.NICHE)) if key in table.obs]
    if not found:
        msg = (
            f"obs has neither {str(_keys.TEACHER)!r} nor {str(_keys.NICHE)!r}: name the columns to plot with keys=; "
            f"obs has {sorted(table.obs.columns)}."
        )
        raise KeyError(msg)
    return found


def _images(
    data: SpatialData | AnnData, image_key: str | Mapping[str, str] | Literal[False] | None, slides: list[str]
) -> dict[str, Image]:
    """Image of each slide; empty without images."""
    if image_key is None and isinstance(data, SpatialData) and len(data.images) == len(slides) == 1:
        try:
            return {slides[0]: image(data, None)}
        except ValueError:  # stains, or an image without a place in um: nobody asked for it
            return {}
    if image_key is None or image_key is False:
        return {}
    if not isinstance(data, SpatialData):
        msg = "An image was asked for, but an AnnData has none: pass the SpatialData object."
        raise TypeError(msg)
    if isinstance(image_key, str):
        if len(slides) > 1:
            msg = f"There are {len(slides)} slides, {slides}: give image_key as a mapping from slide to image."
            raise ValueError(msg)
        return {slides[0]: image(data, image_key)}
    missing = [slide for slide in slides if slide not in image_key]
    if missing:
        msg = f"image_key has no image for the slides {missing}; it has {sorted(image_key)}."
        raise KeyError(msg)
    return {slide: image(data, image_key[slide]) for slide in slides}


def _diameter(xy: np.ndarray, slides: list[np.ndarray]) -> float:
    """Diameter in um at which cells of the sparser tissue touch: from the distance to the sixth neighbour."""
    spacing = []
    for rows in slides:
        if len(rows) < 8:
            continue
        points = xy[rows]
        some = points[:: max(1, len(points) // _SAMPLE)]
        sixth = cKDTree(points).query(some, k=7)[0][:, 6]
        spacing.append(np.quantile(sixth, 0.75) * np.sqrt(np.pi / 6))
    return float(1.25 * np.median(spacing)) if spacing else 10.0


def _figure(
    boxes: list[tuple[float, float, float, float]],
    n_panels: int,
    per_slide: int,
    ncols: int | None,
    figsize: tuple[float, float] | None,
) -> tuple[Figure, list[Axes]]:
    aspect = max(b[1] - b[0] for b in boxes) / max(b[3] - b[2] for b in boxes)
    if ncols is None:
        ncols = per_slide if len(boxes) > 1 else (1 if aspect > 1.8 else min(per_slide, 3))
    nrows = -(-n_panels // ncols)
    if figsize is None:
        width = min(5.0 if ncols > 1 else 8.0, 14 / ncols)
        figsize = (width * ncols + 1.2, (width / aspect + 0.55) * nrows)
    figure, axes = plt.subplots(nrows, ncols, figsize=figsize, squeeze=False, layout="constrained")
    return figure, list(axes.ravel())


def _frame(ax: Axes, box: tuple[float, float, float, float], title: str) -> None:
    ax.set_xlim(box[0], box[1])
    ax.set_ylim(box[3], box[2])  # y points down, as in the image
    ax.set_autoscale_on(False)
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(title, fontsize=10)


def _cells(
    ax: Axes, xy: np.ndarray, codes: np.ndarray, *, column: Niches, diameter: float, alpha: float, grey: bool
) -> None:
    """Draw cells as discs of a size in um. Cells without a niche lie below the others, and are left out on an image."""
    order = np.concatenate([np.flatnonzero(codes < 0) if grey else [], np.flatnonzero(codes >= 0)]).astype(np.int64)
    colors = np.concatenate([column.colors, [to_rgba(NOT_ASSIGNED)]])[codes[order]]
    colors[:, 3] *= alpha
    ax.add_collection(
        EllipseCollection(
            [diameter], [diameter], [0], units="xy", offsets=xy[order], offset_transform=ax.transData,
            facecolors=colors, linewidths=0, rasterized=True, zorder=1, gid=f"cells-{column.key}",
        ),
        autolim=False,
    )  # fmt: skip


def _outline(ax: Axes, xy: np.ndarray, split: np.ndarray, margin: float) -> None:
    test = split == "test"
    if not test.any():
        return
    x0, x1, y0, y1 = box_of(xy[test], margin / 2)
    inside = (xy[:, 0] >= x0) & (xy[:, 0] <= x1) & (xy[:, 1] >= y0) & (xy[:, 1] <= y1)
    if (inside & (split == "train")).any():
        return
    ax.add_patch(
        Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            ec="black",
            lw=1.2,
            ls=(0, (4, 2)),
            zorder=2,
            gid="test-outline",
            clip_on=False,
        )
    )


def _legends(
    figure: Figure,
    axes: list[Axes],
    panels: list[tuple[str, Niches | None, str]],
    shown: list[Niches],
    *,
    missing: bool,
) -> None:
    """One legend for the figure where all columns have the same names and colours, else one beside each panel."""
    first = shown[0]
    grey = missing and any((column.codes < 0).any() for column in shown)
    shared = all(column.names == first.names and np.array_equal(column.colors, first.colors) for column in shown)
    if shared and len(panels) > 1:
        handles = _handles(first, grey=grey)
        figure.legend(handles=handles, loc="outside right center", title="niche", **_legend_style(len(handles)))
        return
    for ax, (_, column, _) in zip(axes, panels, strict=False):
        if column is not None:
            handles = _handles(column, grey=missing and bool((column.codes < 0).any()))
            style = _legend_style(len(handles))
            ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0, **style)


def _legend_style(n: int) -> dict[str, object]:
    return {"frameon": False, "fontsize": 8, "title_fontsize": 8, "ncols": -(-n // _LABEL_ROWS), "handletextpad": 0.2}


def _handles(column: Niches, *, grey: bool) -> list[Line2D]:
    entries = list(zip(column.names, column.colors, strict=True))
    if grey:
        entries.append(("none", np.asarray(to_rgba(NOT_ASSIGNED))))
    return [
        Line2D([], [], ls="", marker="o", ms=7, mec="none", color=tuple(color), label=name) for name, color in entries
    ]
