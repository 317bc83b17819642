"""How near synthetic images come to those that their model was trained on: a guard against copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view

from ._fields import _starts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COMPARED_PX = 16
"""Width to which patches are averaged before they are compared: a copy that is shifted a little stays near."""
QUANTILE = 0.01
"""A ratio below this quantile of those of real patches, see :func:`copy_ratios`, counts as a copy."""
SHARE = 0.05
"""Share of copies above which a warning is given."""
FLAT = 0.02
"""Patches whose compared pixels deviate less than this from their mean are alike by nature: no copies, no yardstick."""
SYMMETRIES = 8
_STEPS = 8
_MOST_PATCHES, _MOST_QUERIES, _CHUNK = 50_000, 1000, 32
_SHOWN = 8
_LEAST_FIELDS = 3


def turned(patch: np.ndarray, symmetry: int) -> np.ndarray:
    """Turn (..., y, x) by ``symmetry % 4`` quarters, and mirror it where ``symmetry`` is 4 or more."""
    patch = np.rot90(patch, symmetry % 4, axes=(-2, -1))
    return patch[..., ::-1] if symmetry >= 4 else patch


def reduced(patches: np.ndarray) -> np.ndarray:
    """Patches (n, c, y, x) uint8 averaged to at most 16 px, float32 in 0 to 1."""
    width = min(COMPARED_PX, patches.shape[-1])
    return F.adaptive_avg_pool2d(torch.from_numpy(patches.astype(np.float32) / 255), width).numpy()


@dataclass(frozen=True)
class PatchGrid:
    """Patches of fields on a dense grid.

    Attributes
    ----------
    pixels
        (c, y, x) uint8 of each field.
    size
        Width of a patch in px.
    step
        Px from patch to patch.
    places
        (n, 3) int: field, y and x of each patch.
    groups
        (n,) int: the field; of fewer than three fields, the quarter of a field.
    compared
        (n, c, k, k) float32, the patches as they are compared.
    """

    pixels: Sequence[np.ndarray]
    size: int
    step: int
    places: np.ndarray
    groups: np.ndarray
    compared: np.ndarray

    def patch(self, place: np.ndarray) -> np.ndarray:
        """Pixels of the patch at field, y and x: (c, size, size) uint8."""
        field, y, x = place
        return self.pixels[field][:, y : y + self.size, x : x + self.size]

    def apart(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), n) bool: patches of another group than that of each row, that do not overlap with it."""
        here = self.places[rows][:, None]
        beside = (np.abs(self.places[None, :, 1:] - here[..., 1:]) >= self.size).any(axis=2)
        return (self.groups != self.groups[rows][:, None]) & (beside | (self.places[:, 0] != here[..., 0]))


@dataclass(frozen=True)
class Nearest:
    """What was found for each of q queries.

    Attributes
    ----------
    distances
        (q,) root of the mean squared difference of compared pixels, 0 to 1; infinite where no patch counts.
    rows
        (q,) row of the grid.
    places
        (q, 3) field, y and x of the nearest patch, which lies up to half a step from the grid's.
    symmetries
        (q,) which of the 8 symmetries turns the query into it.
    """

    distances: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    symmetries: np.ndarray


def patch_grid(pixels: Sequence[np.ndarray], size: int) -> PatchGrid:
    """Patches every eighth of their width; on a coarser grid where they would be more than 50 000.

    Parameters
    ----------
    pixels
        (c, y, x) uint8 of each field.
    size
        Width of a patch in px.
    """
    unit = step = max(1, size // _STEPS)
    while _n_patches(pixels, size, step) > _MOST_PATCHES and step < max(max(p.shape[1:]) for p in pixels):
        step += unit
    found, compared = [], []
    for number, image in enumerate(pixels):
        windows = sliding_window_view(image, (size, size), axis=(1, 2))  # type: ignore[call-overload]
        xs = _starts(image.shape[2], size, step)
        for y in _starts(image.shape[1], size, step):
            found += [(number, y, x) for x in xs]
            compared.append(reduced(windows[:, y, xs].swapaxes(0, 1)))
    places = np.array(found)
    groups = places[:, 0]
    if len(pixels) < _LEAST_FIELDS:
        middles = np.array([image.shape[1:] for image in pixels])[groups] - size
        groups = 4 * groups + (2 * places[:, 1:] >= middles) @ np.array([2, 1])
    return PatchGrid(pixels, size, step, places, groups, np.concatenate(compared))


def _n_patches(pixels: Sequence[np.ndarray], size: int, step: int) -> int:
    return sum(int(np.prod([len(_starts(length, size, step)) for length in image.shape[1:]])) for image in pixels)


def is_flat(compared: np.ndarray) -> np.ndarray:
    """(n,) bool: compared patches (n, c, k, k) that show next to nothing."""
    deviation = compared - compared.mean(axis=(2, 3), keepdims=True)
    return np.sqrt(np.square(deviation).mean(axis=(1, 2, 3))) < FLAT


def nearest(queries: np.ndarray, grid: PatchGrid, *, away_from: Sequence[np.ndarray] = ()) -> Nearest:
    """Nearest patch of a grid, over all turns and mirror images; then of all that lie up to half a step beside it.

    Parameters
    ----------
    queries
        (q, c, k, k) float32, as they are compared.
    grid
        Patches.
    away_from
        Lists of q rows of the grid: only patches that are :meth:`PatchGrid.apart` from all of these count.
    """
    rows, symmetries = (np.zeros(len(queries), dtype=np.int64) for _ in range(2))
    counts = np.ones(len(queries), dtype=bool)
    flat = torch.from_numpy(grid.compared.reshape(len(grid.compared), -1))
    norms = flat.square().sum(dim=1)
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        variants = np.stack([turned(queries[part], symmetry) for symmetry in range(SYMMETRIES)])
        asked = torch.from_numpy(variants.reshape(SYMMETRIES, variants.shape[1], -1))
        scores = (
            norms - 2 * asked @ flat.T
        )  # squared distance but for the norm of the query, the same for every variant
        for excluded in away_from:
            scores[:, torch.from_numpy(~grid.apart(excluded[part]))] = torch.inf
        by_patch, by_symmetry = scores.min(dim=0)
        best, row = by_patch.min(dim=1)
        symmetries[part] = by_symmetry[torch.arange(len(row)), row].numpy()
        rows[part], counts[part] = row.numpy(), torch.isfinite(best).numpy()
    distances, places = np.full(len(queries), np.inf), grid.places[rows]
    for number in np.flatnonzero(counts):
        query = turned(queries[number], int(symmetries[number]))
        distances[number], places[number] = _refined(query, grid, places[number])
    return Nearest(distances, rows, places, symmetries)


def _refined(query: np.ndarray, grid: PatchGrid, place: np.ndarray) -> tuple[float, np.ndarray]:
    """Distance and place of the nearest patch up to half a step from a place."""
    field, slack = place[0], grid.step // 2
    windows = sliding_window_view(grid.pixels[field], (grid.size,) * 2, axis=(1, 2))  # type: ignore[call-overload]
    first = np.maximum(place[1:] - slack, 0)
    around = windows[:, first[0] : place[1] + slack + 1, first[1] : place[2] + slack + 1]
    n_y, n_x = around.shape[1:3]
    compared = reduced(np.moveaxis(around, 0, 2).reshape(n_y * n_x, len(query), grid.size, grid.size))
    distances = np.sqrt(np.square(compared - query, dtype=np.float64).mean(axis=(1, 2, 3)))
    y, x = divmod(int(distances.argmin()), n_x)
    return float(distances.min()), np.array([field, first[0] + y, first[1] + x])


def copy_ratios(
    queries: np.ndarray, grid: PatchGrid, *, own: np.ndarray | None = None
) -> tuple[Nearest, np.ndarray, np.ndarray]:
    """How much nearer a query is to one training field than to all others.

    An image that was made afresh is about as near to two fields; a copy is much nearer to one. Distances alone do not tell them
    apart, since patches that show little are near to many.

    Parameters
    ----------
    queries
        (q, c, k, k) float32, as they are compared.
    grid
        Patches.
    own
        (q,) rows of the queries, where they are patches of the grid: what is not apart from these does not count.

    Returns
    -------
    The nearest patches; distances (q,) to the nearest that are apart from those; and the ratio of both distances (q,), not a number
    where there is no second.
    """
    away = [] if own is None else [own]
    first = nearest(queries, grid, away_from=away)
    others = nearest(queries, grid, away_from=[*away, first.rows]).distances
    exists = np.isfinite(first.distances) & np.isfinite(others)
    ratios = np.where(exists & (others == 0), 1.0, np.nan)
    np.divide(first.distances, others, out=ratios, where=exists & (others > 0))
    return first, others, ratios


def real_ratios(grid: PatchGrid) -> tuple[np.ndarray, np.ndarray]:
    """Distance of real patches to the nearest of another group, and :func:`copy_ratios` of them without their own group.

    Of at most 1000 patches, evenly spread over the grid; flat ones, and those without counterparts, are left out.
    """
    rows = np.flatnonzero(~is_flat(grid.compared))
    if not len(rows):
        return np.empty(0), np.empty(0)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_QUERIES)).round().astype(int))]
    found, _, ratios = copy_ratios(grid.compared[rows], grid, own=rows)
    known = np.isfinite(ratios)
    return found.distances[known], ratios[known]


def draw(path: Path, images: np.ndarray, *, grid: PatchGrid, found: Nearest, ratios: np.ndarray) -> None:
    """Draw the first images (n, c, y, x), and those of the lowest ratios, above what was found for them."""
    from matplotlib.figure import Figure

    blocks = [np.arange(len(images))[:_SHOWN]]
    if len(images) > _SHOWN:
        blocks.append(np.argsort(ratios, kind="stable")[:_SHOWN])
    figure = Figure(figsize=(1.25 * _SHOWN, 3.1 * len(blocks)))
    axes = figure.subplots(2 * len(blocks), _SHOWN, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.95, wspace=0.05, hspace=0.15)
    for axis in axes.flat:
        axis.axis("off")
    for block, numbers in enumerate(blocks):
        for column, number in enumerate(numbers):
            real = _unturned(grid.patch(found.places[number]), int(found.symmetries[number]))
            for line, (image, title) in enumerate(
                [
                    (images[number], f"synthetic {number}"),
                    (real, f"{found.distances[number]:.3f} away, ratio {ratios[number]:.2f}"),
                ]
            ):
                shown = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
                axis = axes[2 * block + line, column]
                axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axis.set_title(title, fontsize=7)
    beside = path.with_name(f"{path.name}.part")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(path)


def _unturned(patch: np.ndarray, symmetry: int) -> np.ndarray:
    """Turn a patch as the synthetic image lies."""
    return np.rot90(patch[..., ::-1] if symmetry >= 4 else patch, -(symmetry % 4), axes=(-2, -1))
