"""How training went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from histoniche import _keys
from histoniche._sdata import open_target

from ._shared import finish

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def training_history(
    data: SpatialData | AnnData,
    *,
    key: str = str(_keys.HISTORY),
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    table_key: str | None = None,
) -> Figure:
    """Plot loss and effective number of niches, or agreement, over the steps of training, one row per model.

    Parameters
    ----------
    data
        SpatialData with a table, or the table.
    key
        Entry of ``uns`` with the histories: a mapping from model to a mapping from figure to a 1-d array.
    figsize
        Size of the figure in inches.
    save
        File to save the figure to, which is then closed.
    table_key
        Name of the table.

    Returns
    -------
    The figure; nothing is written to ``data``. Reads ``uns[key]``: what has "loss" in its name is drawn on the left,
    what begins with "effective" or "agreement" on the right, each step in pale and a running mean on top of it; ``"step"``, where it
    is given, is the axis.

    Raises
    ------
    KeyError
        The histories are missing.
    ValueError
        They hold nothing that could be drawn.
    """
    table = open_target(data, table_key=table_key, copy=False, writes=False).table
    if key not in table.uns:
        msg = f"uns[{key!r}] is missing: run `hn.tl.nolan` or `hn.tl.distill_niches`; uns has {sorted(table.uns)}."
        raise KeyError(msg)
    drawable = {model: _curves(history) for model, history in table.uns[key].items()}
    drawable = {model: curves for model, curves in drawable.items() if any(curves)}
    if not drawable:
        msg = f"uns[{key!r}] has no loss and no effective number of niches: {sorted(table.uns[key])}."
        raise ValueError(msg)
    n_columns = 2 if any(right for _, right in drawable.values()) else 1
    size = figsize or (3.8 * n_columns, 2.5 * len(drawable) + 0.2)
    figure, axes = plt.subplots(len(drawable), n_columns, figsize=size, squeeze=False, layout="constrained")
    for row, (model, curves) in zip(axes, drawable.items(), strict=True):
        step = table.uns[key][model].get("step")
        for ax, names in zip(row, curves, strict=False):
            if not names:
                ax.set_axis_off()
                continue
            _draw(ax, {name: np.asarray(table.uns[key][model][name], dtype=float) for name in names}, step)
            label, least = _label(names[0])
            ax.set_ylabel(label)
            ax.set_title(model, fontsize=10)
            if least is not None:
                ax.set_ylim(bottom=least)
    return finish(figure, save)


def _curves(history: Mapping[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """Names of the curves on the left and on the right."""
    names = [name for name, values in history.items() if np.ndim(values) == 1 and len(values) > 0]
    return [n for n in names if "loss" in n], [n for n in names if n.startswith(("effective", "agreement"))][:1]


def _label(name: str) -> tuple[str, float | None]:
    """Label of the y axis, and where it begins where that is known."""
    if name.startswith("effective"):
        return "effective number of niches", 1.0
    return ("agreement with the teacher", 0.0) if name.startswith("agreement") else ("loss", None)


def _draw(ax: Axes, curves: dict[str, np.ndarray], step: np.ndarray | None) -> None:
    for (name, values), color in zip(curves.items(), _COLORS * len(curves), strict=False):
        x = np.asarray(step) if step is not None and len(step) == len(values) else np.arange(1, len(values) + 1)
        window = max(1, len(values) // 40)
        if window > 1:
            ax.plot(x, values, color=color, alpha=0.25, lw=0.7)
        count = np.convolve(np.ones(len(values)), np.ones(window), mode="same")
        ax.plot(x, np.convolve(values, np.ones(window), mode="same") / count, color=color, lw=1.5, label=name)
    ax.set_xlabel("step")
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
