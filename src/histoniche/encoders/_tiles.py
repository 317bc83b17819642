"""Which part of the image is read for which cells, and reading it at the encoder's resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

_WHITE = 255
"""What lies outside the image: the empty glass beside the tissue."""
_MARGIN = 2
"""Pixels of a level around a region, so that interpolation at its edge finds its neighbours."""


@dataclass(frozen=True)
class Region:
    """A part of one level of the pyramid, in memory.

    Attributes
    ----------
    pixels
        (1, 3, y, x) uint8, or float32 on the device, in 0 to 255.
    low
        Left and top edge in px of the level.
    factor
        Target px per px of the level, along x and y.
    """

    pixels: Tensor
    low: np.ndarray
    factor: np.ndarray

    def to(self, device: torch.device) -> Region:
        """The same on the device, as float32; through pinned memory and without waiting on a GPU."""
        pixels = self.pixels.pin_memory() if device.type == "cuda" else self.pixels
        return Region(pixels.to(device, non_blocking=True).float(), self.low, self.factor)

    def windows(self, corners: np.ndarray, width: int, height: int | None = None) -> Tensor:
        """Cut windows of one size.

        Parameters
        ----------
        corners
            (B, 2) left and top edge in target px, any fraction; pixel i spans i to i + 1.
        width, height
            Size in target px; square without a height.

        Returns
        -------
        (B, 3, height, width) float32 RGB in 0 to 255, averaged over the area of a target pixel where the image is finer,
        bilinear where it is coarser.
        """
        size = (width, width if height is None else height)
        box = np.concatenate([corners, corners + size], axis=1) / np.tile(self.factor, 2) - np.tile(self.low, 2)
        boxes = torch.zeros(len(box), 5)
        boxes[:, 1:] = torch.from_numpy(box)
        samples = max(1, int(np.ceil(1 / self.factor.min() - 1e-6)))
        return roi_align(
            self.pixels.float(), boxes.to(self.pixels.device), size[::-1], sampling_ratio=samples, aligned=True
        )


@dataclass(frozen=True)
class Slide:
    """A pyramid seen at one resolution, the target.

    Attributes
    ----------
    pyramid
        Arrays (3, y, x) uint8, full resolution first; lazy or not.
    scale
        Target px per full-resolution px.
    """

    pyramid: tuple[Any, ...]
    scale: float

    @classmethod
    def at(cls, pyramid: tuple[Any, ...], um_per_px: float, target_um_per_px: float) -> Slide:
        """See an image of ``um_per_px`` at ``target_um_per_px``."""
        return cls(pyramid, um_per_px / target_um_per_px)

    def region(self, low: np.ndarray, high: np.ndarray) -> Region:
        """Read what lies between two corners (x, y) in target px; white outside the image."""
        level, factor = self._level()
        first = np.floor(low / factor).astype(int) - _MARGIN
        last = np.ceil(high / factor).astype(int) + _MARGIN
        return Region(_read(self.pyramid[level], first, last), first, factor)

    def _level(self) -> tuple[int, np.ndarray]:
        """Coarsest level that is at least as fine as the target, and target px per px of it along x and y."""
        best = 0, np.array([self.scale, self.scale])
        for i, image in enumerate(self.pyramid):
            factor = self.scale * _downsampling(self.pyramid[0].shape, image.shape)
            if (factor <= 1 + 1e-3).all():
                best = i, factor
        return best


def _downsampling(full: tuple[int, ...], level: tuple[int, ...]) -> np.ndarray:
    """Full-resolution px per px of a level along x and y.

    Levels are made by averaging whole squares, and an odd row left over is dropped or padded: the ratio of the widths
    is then off by up to a pixel at the far end, and the whole number beside it is right.
    """
    wide, narrow = np.array(full[:0:-1], dtype=float), np.array(level[:0:-1], dtype=float)
    whole = np.round(wide / narrow)
    return np.where(np.abs(wide / whole - narrow) < 1, whole, wide / narrow)


def _read(image: Any, low: np.ndarray, high: np.ndarray) -> Tensor:
    """Region (1, 3, y, x) uint8 of an image, white where it reaches beyond."""
    height, width = image.shape[1:]
    region = torch.full((1, image.shape[0], high[1] - low[1], high[0] - low[0]), _WHITE, dtype=torch.uint8)
    x0, y0 = np.clip(low, 0, (width, height))
    x1, y1 = np.clip(high, 0, (width, height))
    if x1 > x0 and y1 > y0:
        pixels = torch.from_numpy(np.array(image[:, y0:y1, x0:x1], dtype=np.uint8))
        region[0, :, y0 - low[1] : y1 - low[1], x0 - low[0] : x1 - low[0]] = pixels
    return region


def blocks_of(points: np.ndarray, size: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Group points by the square of a grid that they lie in.

    Parameters
    ----------
    points
        (n, 2) in px.
    size
        Width of a square in px.

    Returns
    -------
    The points of each square that has any, row by row, and (n_blocks, 2) left and top edge of the squares.
    """
    square = np.floor(points / size).astype(np.int64)
    order = np.lexsort((square[:, 0], square[:, 1]))
    changes = np.flatnonzero(np.any(np.diff(square[order], axis=0) != 0, axis=1)) + 1
    blocks = np.split(order, changes)
    return blocks, np.array([square[block[0]] for block in blocks]) * size
