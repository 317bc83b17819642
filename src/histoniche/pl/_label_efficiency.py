"""How good a student is, by the number of labels that it was made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from ._colors import niche_palette
from ._shared import finish

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour and marker of each way, of Okabe and Ito's colours; the brightest two differ from the rest in lightness as well.
_STYLES = {
    "ts_kd": ("TS-KD", "#D55E00", "o"),
    "task_agnostic_kd": ("task-agnostic KD", "#0072B2", "s"),
    "mae": ("MAE", "#009E73", "^"),
    "mocov3": ("MoCo v3", "#CC79A7", "v"),
    "imagenet": ("ImageNet", "#E69F00", "D"),
    "scratch": ("scratch", "#5A5A5A", "X"),
}
_OTHER_MARKERS = "P*pHhd<>8"
_METRICS = {
    "dice": "Dice",
    "hausdorff95": "Hausdorff 95 distance (lower is better)",
    "missed": "share of fields missed (lower is better)",
    "loss": "loss of the last steps",
}
_LEAST_SPAN = 0.05
"""Least length of the axis of figures, as a share of the largest."""
_KEYS = ["arm", "n_labelled", "seed"]
_DODGE = 0.05
"""Distance of two ways at the same number of labels, in powers of two."""


@dataclass(frozen=True)
class _Way:
    """How a way is drawn, its runs, and their mean and standard deviation for each number of labelled fields."""

    name: str
    color: str
    marker: str
    budgets: np.ndarray
    values: np.ndarray
    means: pd.Series
    spreads: pd.Series


def label_efficiency(
    data: pd.DataFrame,
    *,
    metric: str = "dice",
    arms: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    palette: Mapping[str, str] | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Plot a figure of merit against the number of labelled fields, one line per way to make the student.

    Small dots are single seeds, markers their means, and bars one standard deviation to either side. Where all runs have the same number
    of labelled fields, each way is a row instead.

    Parameters
    ----------
    data
        What :func:`histoniche.seg.compare` returns, or several of them concatenated: one row a run, with the columns ``arm``,
        ``n_labelled``, ``seed`` and the metric.
    metric
        Column to show: ``"dice"``, ``"hausdorff95"``, ``"missed"``, or another one of numbers.
    arms
        Ways to show, in this order; by default all, TS-KD first and training from scratch last.
    names
        Names of ways to print, instead of the usual ones.
    palette
        Colours of ways, instead of the usual ones, which are told apart with any vision.
    figsize
        Size of the figure in inches.
    save
        File to save the figure to, which is then closed.

    Returns
    -------
    The figure; nothing is written to ``data``. A way with a single seed has no bar.

    Raises
    ------
    KeyError
        A column, or one of the ``arms``, is missing.
    TypeError
        No DataFrame.
    ValueError
        No rows; a run that is there twice; values that are no finite numbers, or numbers of labelled fields below 1.
    """
    runs = _checked(data, metric)
    shown = _order(runs, arms)
    runs = runs[runs["arm"].isin(shown)]
    ways = _ways(runs, metric, shown, names or {}, palette or {})
    budgets = sorted(runs["n_labelled"].unique())
    size = figsize or ((4.6, 3.0) if len(budgets) > 1 else (4.2, 0.9 + 0.32 * len(shown)))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    draw = _lines if len(budgets) > 1 else _rows
    for place, way in enumerate(ways):
        draw(ax, way, place, len(ways))
    label = _METRICS.get(metric, metric)
    ax.spines[["top", "right"]].set_visible(False)
    if len(budgets) > 1:
        _axis_of_budgets(ax, budgets)
        ax.set_ylabel(label)
        ax.set_ylim(*_wide_enough(*ax.get_ylim()))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        handles = ax.get_legend_handles_labels()[0]
        order = sorted(range(len(ways)), key=lambda place: -ways[place].means.iloc[-1])  # as lines end, from the top
        figure.legend(
            handles=[handles[place] for place in order], loc="outside right center", frameon=False, fontsize=8
        )
    else:
        _axis_of_ways(ax, [way.name for way in ways], int(budgets[0]))
        ax.set_xlabel(label)
        ax.set_xlim(*_wide_enough(*ax.get_xlim()))
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return finish(figure, save)


def _wide_enough(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis on which a difference that is nothing looks like nothing."""
    missing = _LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


# --------------------------------------------------------------------------------------------------------------- input
def _checked(data: pd.DataFrame, metric: str) -> pd.DataFrame:
    if not isinstance(data, pd.DataFrame):
        msg = f"data is a {type(data).__name__}; the DataFrame that `hn.seg.compare` returns is needed."
        raise TypeError(msg)
    missing = [name for name in _KEYS if name not in data]
    if missing:
        msg = f"data has no column {missing[0]!r}; it has {list(data.columns)}: pass what `hn.seg.compare` returns."
        raise KeyError(msg)
    numbers = [name for name in data.select_dtypes("number") if name not in _KEYS]
    if metric not in numbers:
        msg = f"metric={metric!r} is no column of figures; data has {numbers}."
        raise KeyError(msg)
    if data.empty:
        msg = "data has no rows: there is nothing to plot."
        raise ValueError(msg)
    twice = data[data.duplicated(_KEYS)]
    if len(twice):
        row = twice.iloc[0]
        msg = (
            f"The run arm={row['arm']!r}, n_labelled={row['n_labelled']}, seed={row['seed']} is there more than once: keep one of "
            "them, and plot one data set at a time."
        )
        raise ValueError(msg)
    budgets = data["n_labelled"].to_numpy(dtype=float)
    if not (np.isfinite(data[metric]).all() and (budgets >= 1).all()):
        msg = f"n_labelled must be at least 1 and {metric} finite in every row; drop the rows where they are not."
        raise ValueError(msg)
    return data[[*_KEYS, metric]]


def _order(runs: pd.DataFrame, arms: Sequence[str] | None) -> list[str]:
    """Ways to show, in their order."""
    there = list(dict.fromkeys(runs["arm"]))
    if arms is None:
        return [arm for arm in _STYLES if arm in there] + [arm for arm in there if arm not in _STYLES]
    arms = [arms] if isinstance(arms, str) else list(dict.fromkeys(arms))
    unknown = [arm for arm in arms if arm not in there]
    if unknown or not arms:
        msg = f"arms={arms}: data has no runs of {unknown or 'none'}; it has those of {there}."
        raise KeyError(msg)
    return arms


def _ways(
    runs: pd.DataFrame, metric: str, arms: Sequence[str], names: Mapping[str, str], palette: Mapping[str, str]
) -> list[_Way]:
    taken = {color for _, color, _ in _STYLES.values()}
    free = [color for color in niche_palette(len(taken) + len(arms)) if color not in taken]
    others = [arm for arm in arms if arm not in _STYLES]
    ways = []
    for arm in arms:
        place = others.index(arm) if arm in others else 0
        name, color, marker = _STYLES.get(arm) or (arm, free[place], _OTHER_MARKERS[place % len(_OTHER_MARKERS)])
        mine = runs[runs["arm"] == arm]
        groups = mine.groupby("n_labelled")[metric]
        ways.append(
            _Way(
                names.get(arm, name), palette.get(arm, color), marker, mine["n_labelled"].to_numpy(dtype=float),
                mine[metric].to_numpy(dtype=float), groups.mean(), groups.std(ddof=1).fillna(0),
            )
        )  # fmt: skip
    return ways


# ------------------------------------------------------------------------------------------------------------- drawing
def _lines(ax: Axes, way: _Way, place: int, n: int) -> None:
    """Means over the numbers of labelled fields; ways stand side by side, so that bars do not hide each other."""
    shift = 2.0 ** (_DODGE * (place - (n - 1) / 2))
    ax.plot(
        way.budgets * shift, way.values, ls="none", marker="o", ms=3, mew=0, color=way.color, alpha=0.5, zorder=1,
        gid=f"seeds-{way.name}",
    )  # fmt: skip
    ax.errorbar(
        way.means.index.to_numpy(dtype=float) * shift, way.means, yerr=way.spreads, color=way.color, marker=way.marker,
        ms=5, lw=1.5, elinewidth=1, mec="white", mew=0.6, label=way.name, zorder=2,
    )  # fmt: skip


def _rows(ax: Axes, way: _Way, place: int, n: int) -> None:  # noqa: ARG001 - as _lines
    """One way in a row of its own, seeds just below their mean."""
    ax.plot(
        way.values, np.full(len(way.values), place + 0.22), ls="none", marker="o", ms=3, mew=0, color=way.color,
        alpha=0.55, zorder=1, gid=f"seeds-{way.name}",
    )  # fmt: skip
    ax.errorbar(
        way.means, [place], xerr=way.spreads, color=way.color, marker=way.marker, ms=6, elinewidth=1.2, mec="white",
        mew=0.6, label=way.name, zorder=2,
    )  # fmt: skip


def _axis_of_budgets(ax: Axes, budgets: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(budgets))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(budgets, labels=[f"{n:g}" for n in budgets])
    ax.set_xlabel("labelled fields")


def _axis_of_ways(ax: Axes, names: Sequence[str], n_labelled: int) -> None:
    ax.set_yticks(range(len(names)), labels=names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    ax.grid(axis="x", color="0.9", zorder=0)
    ax.set_axisbelow(True)
    ax.set_title(f"{n_labelled} labelled field{'s' * (n_labelled != 1)}", fontsize=10)
