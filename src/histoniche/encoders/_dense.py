"""Dense features: each tile is encoded once, each cell is read off the feature maps at its centroid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tiles import Slide, blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from ._load import Encoder

_CNN_TILE, _CNN_MARGIN = 1152, 64


def dense_geometry(encoder: Encoder) -> tuple[int, int]:
    """Width of a tile, and of the margin around the part of it that cells are read from, in px."""
    if encoder.is_vit:
        # A ViT keeps the size it was trained at; an eighth on each side is left to context.
        return encoder.spec.input_px, encoder.spec.input_px // 8
    return _CNN_TILE, _CNN_MARGIN


def dense_blocks(points: np.ndarray, encoder: Encoder) -> tuple[list[np.ndarray], np.ndarray]:
    """Cells of each tile and (n, 2) left and top edges of the tiles, in target px."""
    tile, margin = dense_geometry(encoder)
    blocks, corners = blocks_of(points, tile - 2 * margin)
    return blocks, corners - margin


def dense_dim(encoder: Encoder) -> int:
    """Length of the dense features of a cell."""
    size = encoder.spec.input_px
    with torch.inference_mode():
        return sum(m.shape[1] for m, _, _ in encoder.maps(torch.zeros(1, 3, size, size)))


def read_tile(slide: Slide, corner: np.ndarray, encoder: Encoder) -> Tensor:
    """One tile, (1, 3, tile, tile) float32 in 0 to 255."""
    return slide.windows(corner[None], dense_geometry(encoder)[0])


def sample_tile(tile: Tensor, points: np.ndarray, encoder: Encoder) -> Iterator[Tensor]:
    """Features of cells, one (n, d) tensor per feature map.

    Parameters
    ----------
    tile
        (1, 3, size, size) on the device of the encoder.
    points
        (n, 2) centroids in px of the tile.
    encoder
        The encoder.
    """
    for features, stride, shift in encoder.maps(tile):
        yield sample_map(features, stride, shift, points)


def sample_map(features: Tensor, stride: float, shift: float, points: np.ndarray) -> Tensor:
    """Bilinear values of a feature map (1, d, h, w) at points (n, 2) in px of the image, (n, d) float32.

    Position i of the map stands for the point ``(i + 1/2) stride + shift`` of the image.
    """
    extent = torch.tensor([features.shape[3], features.shape[2]], dtype=torch.float32) * stride
    grid = 2 * (torch.from_numpy(points).float() - shift) / extent - 1
    sampled = F.grid_sample(
        features.float(), grid.to(features.device)[None, None], align_corners=False, padding_mode="border"
    )
    return sampled[0, :, 0].T
