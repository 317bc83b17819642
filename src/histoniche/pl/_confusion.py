"""Where student and teacher agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from histoniche._sdata import open_target

from ._shared import color_ticks, finish, niches, obs_column

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.figure import Figure
    from spatialdata import SpatialData


def confusion(
    data: SpatialData | AnnData,
    *,
    niche_key: str = "niche",
    teacher_key: str = "niche_teacher",
    split: str | None = "test",
    split_key: str = "split",
    normalize: bool = True,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    table_key: str | None = None,
) -> Figure:
    """Plot how the cells of each of the teacher's niches are spread over the student's.

    Parameters
    ----------
    data
        SpatialData with a table, or the table.
    niche_key, teacher_key
        Categorical columns of ``obs`` with the niches of student (columns) and teacher (rows).
    split
        Part of the cells to use; all with ``None``.
    split_key
        Column of ``obs`` with the split.
    normalize
        Whether to show per cent of the teacher's niche instead of numbers of cells.
    figsize
        Size of the figure in inches.
    save
        File to save the figure to, which is then closed.
    table_key
        Name of the table.

    Returns
    -------
    The figure; nothing is written to ``data``. Niches of the teacher without a cell have an empty row.

    Raises
    ------
    KeyError
        A column is missing.
    ValueError
        No cell of the split has both niches.
    """
    table = open_target(data, table_key=table_key, copy=False, writes=False).table
    teacher, student = niches(table, teacher_key), niches(table, niche_key)
    use = (teacher.codes >= 0) & (student.codes >= 0)
    if split is not None:
        part = obs_column(table, split_key).astype(str).to_numpy()
        use &= part == split
    if not use.any():
        msg = f"No cell has both obs[{teacher_key!r}] and obs[{niche_key!r}]"
        msg += f" where obs[{split_key!r}] is {split!r}." if split is not None else "."
        raise ValueError(msg)
    n_rows, n_columns = len(teacher.names), len(student.names)
    pairs = teacher.codes[use] * n_columns + student.codes[use]
    counts = np.bincount(pairs, minlength=n_rows * n_columns).reshape(n_rows, n_columns)
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)

    size = figsize or (0.44 * n_columns + 2.2, 0.4 * n_rows + 1.4)
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    drawn = ax.imshow(100 * share, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for i, j in np.argwhere(counts > 0):
        text = f"{100 * share[i, j]:.0f}" if normalize else f"{counts[i, j]}"
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if share[i, j] > 0.55 else "black")
    rotation = 90 if max(map(len, student.names)) > 3 else 0
    ax.set_xticks(np.arange(n_columns), student.names, fontsize=8, rotation=rotation)
    ax.set_yticks(np.arange(n_rows), teacher.names, fontsize=8)
    color_ticks(ax.get_xticklabels(), student.colors)
    color_ticks(ax.get_yticklabels(), teacher.colors)
    ax.tick_params(length=0, pad=6)
    ax.set_xlabel(niche_key, labelpad=10)
    ax.set_ylabel(teacher_key, labelpad=10)
    ax.set_title(f"{use.sum():,} {split or 'all'} cells" + ("" if normalize else ", numbers of cells"), fontsize=9)
    figure.colorbar(drawn, ax=ax, label="% of the teacher's niche", aspect=25)
    return finish(figure, save)
