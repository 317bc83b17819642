"""Dense features: each tile is encoded once, each cell is read off the feature maps at its centroid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._tiles import blocks_of

if TYPE_CHECKING:
    from ._load import Encoder
    from ._tiles import Region

_CNN_TILE = 1536
_CNN_MARGIN = 256
"""On tissue, EfficientNet-Lite0's map of stride 32 at the seam of two tiles explains this much of the variance of the same map
without a seam: nothing with a margin of 64 px, 0.69 with 128, 0.95 with 192, 0.997 with 256."""
_FINE_STRIDE, _FINE_MARGIN = 16, 176
"""Its maps of strides 8 and 16 see 170 px to either side: with this margin there is no seam at all."""
_BLOCK = 1024
"""Least width in px of the squares whose tiles share one reading of the image, where tiles are smaller."""


def dense_geometry(encoder: Encoder) -> tuple[int, int]:
    """Width of a tile, and of the margin around the part of it that cells are read from, in px."""
    if encoder.fixed_size:
        # A ViT keeps the size it was trained at; an eighth on each side is left to context.
        return encoder.spec.input_px, encoder.spec.input_px // 8
    return _CNN_TILE, _FINE_MARGIN if _is_fine(encoder) else _CNN_MARGIN


def _is_fine(encoder: Encoder) -> bool:
    """Whether the margin covers all that a position sees, so that tiles may end anywhere beyond it."""
    return not encoder.fixed_size and max(encoder.spec.dense_strides) <= _FINE_STRIDE


def dense_block_width(encoder: Encoder) -> int:
    """Width in px of a block: a whole number of the parts of tiles that cells are read from."""
    tile, margin = dense_geometry(encoder)
    core = tile - 2 * margin
    return core * max(1, _BLOCK // core)


def dense_dim(encoder: Encoder) -> int:
    """Length of the dense features of a cell."""
    size = encoder.spec.input_px
    with torch.inference_mode():
        return sum(m.shape[1] for m, _ in encoder.maps(torch.zeros(1, 3, size, size, device=encoder.device)))


def embed_tiles(region: Region, points: np.ndarray, encoder: Encoder, batch_size: int) -> np.ndarray:
    """Features (n, d) float32 of points (n, 2) in target px, read off the tiles of a grid that has its origin at 0, 0."""
    size, margin = dense_geometry(encoder)
    members, corners = blocks_of(points, size - 2 * margin)
    corners = corners - margin
    sizes = np.full((len(members), 2), size)
    if _is_fine(encoder):  # tiles that fit their cells, so one at a time
        batch_size, step = 1, max(encoder.spec.dense_strides)
        fitted = [_fitted(points[cells], corner, margin, step) for cells, corner in zip(members, corners, strict=True)]
        corners, sizes = (np.stack(part) for part in zip(*fitted, strict=True))
    parts = []
    for start in range(0, len(members), batch_size):
        here = slice(start, start + batch_size)
        width, height = sizes[start].tolist()
        maps = encoder.maps(region.windows(corners[here], width, height))
        for i, (cells, corner) in enumerate(zip(members[here], corners[here], strict=True)):
            sampled = [sample_map(m[i : i + 1], stride, points[cells] - corner) for m, stride in maps]
            parts.append(torch.cat(sampled, dim=1))
    out = np.empty((len(points), parts[0].shape[1]), dtype=np.float32)
    out[np.concatenate(members)] = torch.cat(parts).cpu().numpy()
    return out


def _fitted(points: np.ndarray, corner: np.ndarray, margin: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Corner and size (2,) of the part of a tile that its points and the margin around them need.

    It begins and ends a whole number of steps from the tile's corner, so that feature maps have the same positions.
    """
    low = np.floor((points.min(axis=0) - margin - corner) / step) * step
    high = np.ceil((points.max(axis=0) + margin - corner) / step) * step
    return corner + low, (high - low).astype(int)


def sample_map(features: Tensor, stride: float, points: np.ndarray) -> Tensor:
    """Bilinear values of a feature map (1, d, h, w) at points (n, 2) in px of the image, (n, d) float32.

    Position i of the map stands for the point ``(i + 1/2) stride`` of the image. What a position of a CNN can see has its
    middle up to half a stride beside that, because of the padding. Trained on flipped images, though, the network looks
    at the middle: on tissue, maps of EfficientNet-Lite0 and of the mirrored image agree best there (R2 at strides 8, 16
    and 32: 0.60, 0.77, 0.84, against 0.30, 0.58, 0.77 with positions moved to the middle of what they can see).
    """
    extent = torch.tensor([features.shape[3], features.shape[2]], dtype=torch.float32) * stride
    grid = 2 * torch.from_numpy(points).float() / extent - 1
    sampled = F.grid_sample(
        features.float(), grid.to(features.device)[None, None], align_corners=False, padding_mode="border"
    )
    return sampled[0, :, 0].T
