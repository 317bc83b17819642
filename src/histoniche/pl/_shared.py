"""What the plots share: niches and their colours, a scale bar, the image behind the cells, saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.patches import Rectangle
from matplotlib.transforms import Affine2D

from histoniche import _keys

from ._colors import niche_palette

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

    from histoniche._sdata import Image

NOT_ASSIGNED = "#D9D9D9"


@dataclass(frozen=True)
class Niches:
    """A categorical column: codes (-1 where missing), names of the categories and their colours (K, 4)."""

    key: str
    codes: np.ndarray
    names: list[str]
    colors: np.ndarray


def niches(table: AnnData, key: str) -> Niches:
    """Read a categorical column of ``obs`` and its colours."""
    column = obs_column(table, key).astype("category")
    names = [str(name) for name in column.cat.categories]
    if not names:
        msg = f"obs[{key!r}] is missing for all cells: there is nothing to plot."
        raise ValueError(msg)
    colors = list(table.uns.get(_keys.colors(key), []))
    if len(colors) < len(names):
        colors = niche_palette(len(names))
    return Niches(key, column.cat.codes.to_numpy(dtype=np.int64), names, to_rgba_array(colors[: len(names)]))


def obs_column(table: AnnData, key: str) -> pd.Series:
    """Column of ``obs``; an error that lists what there is."""
    if key not in table.obs:
        msg = f"obs[{key!r}] is missing; obs has {sorted(table.obs.columns)}."
        raise KeyError(msg)
    return table.obs[key]


def color_ticks(ticks: list[Text], colors: np.ndarray) -> None:
    """Put the names of niches on their colours."""
    for tick, color in zip(ticks, colors, strict=True):
        tick.set_bbox({"boxstyle": "square,pad=0.25", "fc": color, "ec": "none"})
        tick.set_color("white" if color[:3] @ [0.299, 0.587, 0.114] < 0.6 else "black")


def finish(figure: Figure, save: str | Path | None, *, close: bool = True) -> Figure:
    """Save the figure and close it, where a path was given; else it stays open, and pyplot or the notebook shows it.

    Without ``close`` it stays open in any case: a figure of the caller's, who may still draw into it.
    """
    if save is not None:
        path = Path(save)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = figure.figure  # of a subfigure the figure that holds it, else itself
        whole.savefig(path, dpi=200, bbox_inches="tight")
        if close:
            plt.close(whole)
    return figure


def nice_length(extent: float) -> float:
    """Length of a scale bar in um: 1, 2 or 5 times a power of ten, about a fifth of the extent."""
    goal = extent / 5
    power = 10.0 ** np.floor(np.log10(goal))
    return float(max(step * power for step in (1, 2, 5) if step * power <= goal))


def format_length(length: float) -> str:
    """Length in um or mm as text."""
    return f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"


def draw_scale_bar(ax: Axes, length: float) -> None:
    """Scale bar below the axes, at their left end, with its length in um as text beside it."""
    transform = ax.get_xaxis_transform()  # x in um, y as a share of the height of the axes
    left = min(ax.get_xlim())
    inches = ax.figure.bbox.height / ax.figure.dpi * ax.get_position().height
    unit = 0.1 / max(inches, 0.5)
    ax.add_patch(
        Rectangle(
            (left, -1.4 * unit),
            length,
            0.5 * unit,
            transform=transform,
            color="black",
            clip_on=False,
            lw=0,
            gid="scale-bar",
        )
    )
    ax.annotate(
        format_length(length), (left + length, -1.15 * unit), xycoords=transform, xytext=(5, 0),
        textcoords="offset points", ha="left", va="center", fontsize=8, annotation_clip=False,
    )  # fmt: skip


def level_for(image: Image, um_per_px: float) -> int:
    """The smallest level of the pyramid that is at least as fine as ``um_per_px``."""
    width = image.pyramid[0].shape[2]
    fine = [i for i, level in enumerate(image.pyramid) if image.um_per_px * width / level.shape[2] <= um_per_px * 1.01]
    return fine[-1] if fine else 0


def draw_image(ax: Axes, image: Image, box: tuple[float, float, float, float], *, max_px: int = 1200) -> AxesImage:
    """Draw the part of an image within a box (x0, x1, y0, y1 in um), read from a level of the pyramid that suits it."""
    x0, x1, y0, y1 = box
    level = image.pyramid[level_for(image, max(x1 - x0, y1 - y0) / max_px)]
    height, width = level.shape[1:]
    shrink = np.array([width / image.pyramid[0].shape[2], height / image.pyramid[0].shape[1]])
    corners = image.to_px(np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]])) * shrink
    left, top = np.clip(np.floor(corners.min(0)).astype(int), 0, [width, height])
    right, bottom = np.clip(np.ceil(corners.max(0)).astype(int), 0, [width, height])
    pixels = level[:, top:bottom, left:right]
    # A pyramid may end above the wished size: every k-th pixel is enough for the eye, and little is held in memory.
    step = max(1, int(max(pixels.shape[1:]) / (2 * max_px)))
    array = np.asarray(pixels[:, ::step, ::step]).transpose(1, 2, 0)
    linear = np.vstack([image.um_to_px, [0, 0, 1]])
    px_to_um = np.linalg.inv(linear)
    if abs(px_to_um[0, 1]) + abs(px_to_um[1, 0]) < 1e-9 * image.um_per_px:
        ends = np.array([[left, bottom], [right, top]]) / shrink
        (a, b), (c, d) = ends @ px_to_um[:2, :2].T + px_to_um[:2, 2]
        return ax.imshow(array, extent=(a, c, b, d), interpolation="antialiased", zorder=0, aspect="auto")
    drawn = ax.imshow(array, extent=(left, right, bottom, top), zorder=0, aspect="auto")
    scale = Affine2D().scale(*(1 / shrink))
    drawn.set_transform(scale + Affine2D(px_to_um) + ax.transData)
    return drawn


def box_of(xy: np.ndarray, margin: float) -> tuple[float, float, float, float]:
    """Bounding box (x0, x1, y0, y1) of points, widened by a margin in um."""
    low, high = xy.min(axis=0) - margin, xy.max(axis=0) + margin
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])
