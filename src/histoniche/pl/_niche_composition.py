"""Which cell types niches are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from histoniche._sdata import open_target
from histoniche.metrics import composition

from ._shared import color_ticks, finish, niches, obs_column

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.figure import Figure
    from spatialdata import SpatialData


def niche_composition(
    data: SpatialData | AnnData,
    *,
    cell_type_key: str,
    niche_key: str = "niche",
    split: str | None = None,
    split_key: str = "split",
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    table_key: str | None = None,
) -> Figure:
    """Plot the cell type composition of every niche as a heat map, with the number of cells beside it.

    Parameters
    ----------
    data
        SpatialData with a table, or the table.
    cell_type_key
        Column of ``obs`` with cell types.
    niche_key
        Categorical column of ``obs`` with niches.
    split
        Part of the cells to use, for instance ``"test"``; all by default.
    split_key
        Column of ``obs`` with the split.
    figsize
        Size of the figure in inches.
    save
        File to save the figure to, which is then closed.
    table_key
        Name of the table.

    Returns
    -------
    The figure; nothing is written to ``data``. Rows are niches and sum to 100 %; cell types are ordered by the niche
    in which they are most frequent. Cells without niche or cell type are left out.

    Raises
    ------
    KeyError
        A column is missing.
    ValueError
        No cell with both niche and cell type.
    """
    table = open_target(data, table_key=table_key, copy=False, writes=False).table
    niche = niches(table, niche_key)
    types = obs_column(table, cell_type_key)
    use = (niche.codes >= 0) & types.notna().to_numpy()
    if split is not None:
        use &= (obs_column(table, split_key).astype(str) == split).to_numpy()
    if not use.any():
        msg = f"No cell has both obs[{niche_key!r}] and obs[{cell_type_key!r}]" + (f" in {split!r}." if split else ".")
        raise ValueError(msg)
    types = types[use].astype(str)
    share = composition(niche.codes[use], types, len(niche.names))
    counts = np.bincount(niche.codes[use], minlength=len(niche.names))
    names = np.unique(types.to_numpy(dtype=str))
    filled = np.nan_to_num(share)
    order = np.lexsort((-filled.max(axis=0), filled.argmax(axis=0)))

    n_rows, n_columns = share.shape
    size = figsize or (0.32 * n_columns + 3.6, 0.34 * n_rows + 1.6)
    figure, (heat, bars) = plt.subplots(
        1, 2, figsize=size, sharey=True, layout="constrained", width_ratios=[max(0.32 * n_columns, 1.0), 1.1]
    )
    drawn = heat.imshow(share[:, order], aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    heat.set_xticks(np.arange(n_columns), names[order], rotation=90, fontsize=8)
    heat.set_yticks(np.arange(n_rows), niche.names, fontsize=8)
    color_ticks(heat.get_yticklabels(), niche.colors)
    heat.tick_params(length=0, pad=6)
    heat.set_ylabel(niche_key, labelpad=10)
    heat.set_xlabel(cell_type_key)
    bars.barh(np.arange(n_rows), counts, color=niche.colors, height=0.75)
    bars.tick_params(labelleft=False, left=False)
    bars.set_xlabel("cells")
    bars.locator_params(axis="x", nbins=2)
    bars.spines[["top", "right", "left"]].set_visible(False)
    figure.colorbar(
        drawn, ax=bars, label="share of the niche's cells", format=PercentFormatter(1, decimals=0), aspect=18
    )
    return finish(figure, save)
