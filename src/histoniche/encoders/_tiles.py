"""Which part of the image is read for which cells, and reading it at the encoder's resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

_WHITE = 255.0
"""What lies outside the image: the empty glass beside the tissue."""


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

    def windows(self, corners: np.ndarray, size: int) -> Tensor:
        """Cut square windows.

        Parameters
        ----------
        corners
            (B, 2) left and top edge in target px, any fraction; pixel i spans i to i + 1.
        size
            Width in target px.

        Returns
        -------
        (B, 3, size, size) float32 RGB in 0 to 255, averaged over the area of a target pixel where the image is finer;
        white outside the image.
        """
        level, factor = self._level()
        image = self.pyramid[level]
        box = np.concatenate([corners, corners + size], axis=1) / np.tile(factor, 2)  # in px of the level
        margin = 2
        low = np.floor(box[:, :2].min(axis=0)).astype(int) - margin
        high = np.ceil(box[:, 2:].max(axis=0)).astype(int) + margin
        region = _read(image, low, high)
        boxes = torch.from_numpy((box - np.tile(low, 2)).astype(np.float32))
        boxes = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
        return roi_align(
            region, boxes, size, sampling_ratio=max(1, int(np.ceil(1 / factor.min() - 1e-6))), aligned=True
        )

    def _level(self) -> tuple[int, np.ndarray]:
        """Coarsest level that is at least as fine as the target, and target px per px of it along x and y."""
        full = np.array(self.pyramid[0].shape[:0:-1], dtype=float)
        best = 0, np.array([self.scale, self.scale])
        for i, image in enumerate(self.pyramid):
            factor = self.scale * full / np.array(image.shape[:0:-1], dtype=float)
            if (factor <= 1 + 1e-3).all():
                best = i, factor
        return best


def _read(image: Any, low: np.ndarray, high: np.ndarray) -> Tensor:
    """Region (1, 3, y, x) float32 of an image, white where it reaches beyond."""
    height, width = image.shape[1:]
    region = torch.full((1, image.shape[0], high[1] - low[1], high[0] - low[0]), _WHITE)
    x0, y0 = np.clip(low, 0, (width, height))
    x1, y1 = np.clip(high, 0, (width, height))
    if x1 > x0 and y1 > y0:
        pixels = torch.from_numpy(np.ascontiguousarray(image[:, y0:y1, x0:x1]))
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
