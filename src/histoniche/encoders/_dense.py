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

# On tissue, EfficientNet-Lite0's map of stride 32 at the seam of two tiles explains this much of the variance of the same
# map without a seam: nothing with a margin of 64 px, 0.69 with 128, 0.95 with 192, 0.997 with 256.
_CNN_TILE, _CNN_MARGIN = 1536, 256
_BLOCK = 1024
"""Least width in px of the squares whose tiles share one reading of the image, where tiles are smaller."""


def dense_geometry(encoder: Encoder) -> tuple[int, int]:
    """Width of a tile, and of the margin around the part of it that cells are read from, in px."""
    if encoder.fixed_size:
        # A ViT keeps the size it was trained at; an eighth on each side is left to context.
        return encoder.spec.input_px, encoder.spec.input_px // 8
    return _CNN_TILE, _CNN_MARGIN


def dense_block_width(encoder: Encoder) -> int:
    """Width in px of a block: a whole number of the parts of tiles that cells are read from."""
    tile, margin = dense_geometry(encoder)
    core = tile - 2 * margin
    return core * max(1, _BLOCK // core)


def dense_dim(encoder: Encoder) -> int:
    """Length of the dense features of a cell."""
    size = encoder.spec.input_px
    with torch.inference_mode():
        return sum(m.shape[1] for m, _, _ in encoder.maps(torch.zeros(1, 3, size, size, device=encoder.device)))


def embed_tiles(region: Region, points: np.ndarray, encoder: Encoder, batch_size: int) -> np.ndarray:
    """Features (n, d) float32 of points (n, 2) in target px, read off the tiles of a grid that has its origin at 0, 0."""
    size, margin = dense_geometry(encoder)
    members, corners = blocks_of(points, size - 2 * margin)
    corners = corners - margin
    parts = []
    for start in range(0, len(members), batch_size):
        here = slice(start, start + batch_size)
        maps = encoder.maps(region.windows(corners[here], size))
        for i, (cells, corner) in enumerate(zip(members[here], corners[here], strict=True)):
            sampled = [sample_map(m[i : i + 1], stride, shift, points[cells] - corner) for m, stride, shift in maps]
            parts.append(torch.cat(sampled, dim=1))
    out = np.empty((len(points), parts[0].shape[1]), dtype=np.float32)
    out[np.concatenate(members)] = torch.cat(parts).cpu().numpy()
    return out


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


def map_shifts(module: torch.nn.Module, image: Tensor) -> dict[int, float]:
    """Where positions of a CNN's feature maps look.

    A layer that halves the map by a kernel of odd width looks half a pixel to one side: to the right with TensorFlow's
    "same" padding, to the left with torch's; patches that do not overlap look at their own middle.

    Parameters
    ----------
    module
        The network.
    image
        (1, 3, h, w), any image: only sizes are looked at.

    Returns
    -------
    Per stride: how far the middle of what a position sees lies to the right of (and below) the middle of its
    stride x stride square, in px.
    """
    width = image.shape[-1]
    steps: dict[int, tuple[int, int, float]] = {}  # by width of the layer's input: width after it, kernel, shift in px

    def look(layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        stride, kernel, padding, dilation = (
            _first(getattr(layer, name, 1)) for name in ("stride", "kernel_size", "padding", "dilation")
        )
        if stride == 1:
            return
        kernel = (kernel - 1) * dilation + 1
        before, after = inputs[0].shape[-1], output.shape[-1]
        if type(layer).__name__.endswith("Same"):
            padding = max((after - 1) * stride + kernel - before, 0) // 2
        # Beside the main path lie shortcuts of smaller kernels, which the layer on the path outweighs.
        if before not in steps or kernel > steps[before][1]:
            steps[before] = after, kernel, ((kernel - 1) / 2 - padding - (stride - 1) / 2) * width / before

    kinds = (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d)
    hooks = [layer.register_forward_hook(look) for layer in module.modules() if isinstance(layer, kinds)]
    try:
        module(image)
    finally:
        for hook in hooks:
            hook.remove()
    shifts, total = {1: 0.0}, 0.0
    for _, (after, _, shift) in sorted(steps.items(), reverse=True):
        total += shift
        shifts[round(width / after)] = total
    return shifts


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else int(value)
