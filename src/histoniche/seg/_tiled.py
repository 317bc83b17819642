"""Whole images: probability maps from overlapping tiles, and objects that no border of a block cuts."""

from __future__ import annotations

import itertools
import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import torch
from dask.utils import SerializableLock
from scipy import ndimage

from histoniche._compute import ahead
from histoniche.encoders._tiles import Region, Slide

from ._augment import mirrored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STRIDE = 32
_LARGEST_HALO = 512
_RESAMPLED_CHUNK = 1024
_MARGIN = 2
"""Pixels around a resampled chunk, so that interpolation at its edge finds its neighbours."""


def tiled_maps(
    plane: Any,
    predict: Callable[[np.ndarray], np.ndarray],
    *,
    tile: int = 512,
    overlap: int = 64,
    batch_size: int = 4,
) -> da.Array:
    """Predict the maps of an image of any size from overlapping tiles, blended so that no seam is left.

    Where two tiles overlap, the outer quarter of each, which lacks its surroundings, is not used, and between them the
    prediction goes smoothly (cosine) from one to the other; the weights add up to 1. Every tile is predicted once where
    the whole array is computed at once. The last tiles of a row or column end where the image ends, at the next multiple
    of 32 (as its mirror image), so that borders of the image look to the network as they do untiled.

    Parameters
    ----------
    plane
        (..., y, x) real array, lazy or in memory: one channel, or several.
    predict
        Makes (B, 2, y, x) float32 of (B, ..., y, x) float32. It is never called by two threads at once.
    tile, overlap
        Width of a tile and of the part that it shares with the next, in px; multiples of 32.
    batch_size
        Tiles predicted at once.

    Returns
    -------
    (2, y, x) float32, lazy. Values do not depend on how ``plane`` is chunked.

    Raises
    ------
    ValueError
        Widths that are no multiples of 32, or tiles less than twice as wide as they overlap.
    """
    if tile % STRIDE or overlap % STRIDE or overlap < STRIDE or tile < 2 * overlap or batch_size < 1:
        msg = (
            f"tile={tile} and overlap={overlap} must be multiples of {STRIDE}, tile at least twice as wide, and "
            f"batch_size={batch_size} at least 1."
        )
        raise ValueError(msg)
    lock = SerializableLock()

    def one_at_a_time(batch: np.ndarray) -> np.ndarray:
        with lock:
            return predict(batch)

    (rows, row_edges), (columns, column_edges) = (_layout(length, tile, overlap) for length in plane.shape[-2:])
    n_full = len(columns) - (len(columns[-1]) < len(columns[0]))  # a narrower last tile is a batch of its own
    firsts = [*range(0, n_full, batch_size), *range(n_full, len(columns))]
    groups = [columns[first:last] for first, last in itertools.pairwise([*firsts, len(columns)])]
    widths = np.diff([*(column_edges[first] for first in firsts), column_edges[-1]]).tolist()
    join, stack = dask.delayed(_join, pure=False), dask.delayed(_blend, pure=False)
    above: list[Any] = [None] * len(groups)
    chunks = []
    for row, height in zip(rows, np.diff(row_edges).tolist(), strict=True):
        strips = [_strip(plane, one_at_a_time, row, group) for group in groups]
        here = [
            join(before, strip, overlap, width)
            for before, strip, width in zip([None, *strips[:-1]], strips, widths, strict=True)
        ]
        chunks.append([
            da.from_delayed(stack(top, piece, overlap, -2, height), (2, height, width), dtype=np.float32)
            for top, piece, width in zip(above, here, widths, strict=True)
        ])  # fmt: skip
        above = here
    return da.block(chunks)


def _layout(length: int, tile: int, overlap: int) -> tuple[list[np.ndarray], list[int]]:
    """Indices that the tiles along an axis read, and the edges of the stretches that each begins."""
    if length <= tile:
        return [mirrored(0, length + -length % STRIDE, length)], [0, length]
    starts = range(0, length - overlap, tile - overlap)
    sizes = [tile] * (len(starts) - 1) + [length - starts[-1] + -(length - starts[-1]) % STRIDE]
    return [mirrored(start, size, length) for start, size in zip(starts, sizes, strict=True)], [*starts, length]


def _strip(plane: Any, predict: Callable[[np.ndarray], np.ndarray], row: np.ndarray, group: list[np.ndarray]) -> Any:
    """Prediction of neighbouring tiles of a row, (B, 2, y, x), delayed."""
    top, left = int(row.min()), int(min(column.min() for column in group))
    window = plane[..., top : int(row.max()) + 1, left : int(max(column.max() for column in group)) + 1]

    def predicted(pixels: np.ndarray) -> np.ndarray:
        batch = [pixels[..., (row - top)[:, None], (column - left)[None]] for column in group]
        return predict(np.stack(batch).astype(np.float32))

    return dask.delayed(predicted, pure=False)(window)


def _join(before: np.ndarray | None, tiles: np.ndarray, overlap: int, width: int) -> np.ndarray:
    """Blend the tiles of a strip from left to right, and the last of the strip before: (2, y, width)."""
    lefts = [None if before is None else before[-1], *tiles[:-1]]
    step = tiles.shape[-1] - overlap
    parts = [_blend(left, here, overlap, -1, step) for left, here in zip(lefts, tiles, strict=True)][:-1]
    last = _blend(lefts[-1], tiles[-1], overlap, -1, width - step * (len(tiles) - 1))
    return np.concatenate([*parts, last], axis=-1)


def _blend(before: np.ndarray | None, here: np.ndarray, overlap: int, axis: int, length: int) -> np.ndarray:
    """First ``length`` px of a tile along an axis; where the tile before covers them too, go from that to this."""
    here = np.moveaxis(here, axis, -1)[..., :length]
    if before is not None:
        place = (np.arange(overlap) + 0.5 - overlap / 4) / (overlap / 2)
        ramp = (0.5 - 0.5 * np.cos(np.pi * np.clip(place, 0, 1))).astype(np.float32)[:length]
        end = np.moveaxis(before, axis, -1)[..., -overlap:][..., :length]
        here = np.concatenate([end + ramp * (here[..., :overlap] - end), here[..., overlap:]], axis=-1)
    return np.moveaxis(here, -1, axis)


class Block(NamedTuple):
    """Objects of one block.

    Attributes
    ----------
    window
        Where it lies, slices of y and x.
    labels
        (y, x) int32 of that window: its new objects, numbered from 1.
    before
        Number of objects written before: object i of the block is object ``before + i`` of the image.
    """

    window: tuple[slice, slice]
    labels: np.ndarray
    before: int


def tiled_labels(
    maps: Any,
    separate: Callable[[np.ndarray], np.ndarray],
    labels: Any,
    *,
    block: int = 1536,
    halo: int = 128,
    least_px: float = 1,
) -> Iterator[Block]:
    """Separate the objects of maps of any size, block by block.

    Each block is seen with a halo, and keeps the objects that reach into it, whole. The halo is widened, up to 512 px, where
    it cuts one of them. An object that an earlier block has written already is left out; where two blocks disagree, the
    earlier one is right: a later object keeps the pixels that are free, if they are more than half of it. Objects of any
    width are so kept whole, up to the widest halo; what is wider is cut, not lost.

    Parameters
    ----------
    maps
        (2, y, x) real array that is read window by window.
    separate
        Makes labels (y, x) of maps (2, y, x) in float32; called in threads.
    labels
        (y, x) int32 array of zeros, in memory or on disk, to which objects are written, numbered from 1 without gaps.
    block, halo
        Width of a block and of what is seen around it, in px.
    least_px
        Objects of fewer pixels are left out.

    Yields
    ------
    The blocks, after they are written.

    Warns
    -----
    UserWarning
        Objects that are wider than the widest halo, and are cut.
    """
    shape = maps.shape[1:]
    cores = [
        tuple(slice(start, min(start + block, length)) for start, length in zip(corner, shape, strict=True))
        for corner in itertools.product(*(range(0, length, block) for length in shape))
    ]
    n, n_cut = 0, 0
    workers = min(len(cores), max(1, min(4, os.cpu_count() or 1)))
    for window, found, cut in ahead(lambda i: _objects(maps, cores[i], separate, halo), len(cores), workers=workers):
        taken = np.asarray(labels[window])
        new = _claim(found, taken, cut, least_px)
        if new.any():
            labels[window] = np.where(new > 0, new + n, taken)
        yield Block(window, new, n)
        n, n_cut = n + int(new.max(initial=0)), n_cut + len(cut)
    if n_cut:
        msg = (
            f"{n_cut} times an object reaches more than {_LARGEST_HALO} px beyond the block that it lies in, and is cut: does "
            "the threshold merge objects?"
        )
        warnings.warn(msg, UserWarning, stacklevel=2)


def _objects(
    maps: Any, core: tuple[slice, ...], separate: Callable[[np.ndarray], np.ndarray], halo: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Window of a block, the objects that reach into the block, and the numbers of those that the window cuts."""
    shape = maps.shape[1:]
    while True:
        y, x = (slice(max(0, c.start - halo), min(n, c.stop + halo)) for c, n in zip(core, shape, strict=True))
        found = separate(np.asarray(maps[:, y, x], dtype=np.float32))
        inside = np.zeros(int(found.max(initial=0)) + 1, dtype=bool)
        inside[
            found[core[0].start - y.start : core[0].stop - y.start, core[1].start - x.start : core[1].stop - x.start]
        ] = True
        at_edge = np.zeros_like(inside)
        for line, within in (
            (found[0], y.start > 0), (found[-1], y.stop < shape[0]),
            (found[:, 0], x.start > 0), (found[:, -1], x.stop < shape[1]),
        ):  # fmt: skip
            if within:
                at_edge[line] = True
        inside[0] = False
        cut = np.flatnonzero(inside & at_edge)
        if not len(cut) or halo >= _LARGEST_HALO:
            return (y, x), np.where(inside[found], found, 0).astype(np.int32), cut
        halo = min(2 * halo, _LARGEST_HALO)


def _claim(found: np.ndarray, taken: np.ndarray, cut: np.ndarray, least_px: float) -> np.ndarray:
    """Objects that are new, without pixels that others hold, numbered from 1 without gaps; int32.

    New is what is free in more than half of its pixels, or, of objects wider than any window, anywhere.
    """
    sizes = np.bincount(found.ravel())
    new = np.where(taken == 0, found, 0)
    left = np.bincount(new.ravel(), minlength=len(sizes))
    keep = 2 * left > sizes
    keep[cut] = True
    keep[0] = False
    for number in np.flatnonzero(keep & (left < sizes)):  # of what others cut in pieces, the largest
        pieces, n = ndimage.label(new == number)
        if n > 1:
            new[(pieces > 0) & (pieces != np.bincount(pieces.ravel())[1:].argmax() + 1)] = 0
    keep &= np.bincount(new.ravel(), minlength=len(sizes)) >= max(1, least_px)
    return (np.cumsum(keep) * keep).astype(np.int32)[new]


def resampled(pyramid: tuple[Any, ...], scale: float) -> da.Array:
    """See one channel of an image at another resolution.

    Parameters
    ----------
    pyramid
        Lazy arrays (y, x), full resolution first.
    scale
        Px of the result per px of the full resolution; the first edges of both are at the same place.

    Returns
    -------
    (y, x) float32, lazy: mean over the area of a pixel where the image is finer, bilinear where it is coarser.
    """
    levels = tuple(level[None] for level in pyramid)
    level, factor = Slide(levels, scale)._level()
    pixels = pyramid[level]
    shape = [max(1, round(length * scale)) for length in pyramid[0].shape]
    chunks = [
        [_resampled_chunk(pixels, factor, np.array([x, y]), shape) for x in range(0, shape[1], _RESAMPLED_CHUNK)]
        for y in range(0, shape[0], _RESAMPLED_CHUNK)
    ]
    return da.block(chunks)


def _resampled_chunk(pixels: Any, factor: np.ndarray, corner: np.ndarray, shape: list[int]) -> da.Array:
    size = np.minimum(_RESAMPLED_CHUNK, shape[::-1] - corner)
    limits = pixels.shape[::-1]
    low = np.clip(np.floor(corner / factor).astype(int) - _MARGIN, 0, limits)
    high = np.clip(np.ceil((corner + size) / factor).astype(int) + _MARGIN, 0, limits)
    width, height = size.tolist()

    def cut(window: np.ndarray) -> np.ndarray:
        region = Region(torch.from_numpy(np.asarray(window, dtype=np.float32))[None, None], low, factor)
        return region.windows(corner[None], width, height)[0, 0].numpy()

    window = pixels[low[1] : high[1], low[0] : high[0]]
    return da.from_delayed(dask.delayed(cut, pure=False)(window), (height, width), dtype=np.float32)
