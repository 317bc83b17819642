"""One training patch from a field: a random window, turned, scaled and lit differently."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

_ANGLE, _SCALE, _GAMMA, _GAIN = 20.0, (0.8, 1.25), (0.6, 1.6), (0.7, 1.2)
_BLUR, _NOISE = 1.2, 0.06
_SLACK = 1.65
"""Width of the window that is turned, in widths of the patch: what a turned and shrunken patch can see."""


def training_patch(stack: np.ndarray, n_channels: int, size: int, rng: np.random.Generator) -> Tensor:
    """Draw an augmented patch.

    Parameters
    ----------
    stack
        (c + 2, y, x) float32: channels in 0 to 1, then the maps.
    n_channels
        c; the light of these changes.
    size
        Width of the patch in px.
    rng
        Decides everything.

    Returns
    -------
    (c + 2, size, size) float32.
    """
    patch = turned_patch(stack, size, rng)
    return torch.cat([relit(patch[:n_channels], rng), patch[n_channels:]]).clamp(0, 1)


def turned_patch(stack: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """Draw a window of (c, y, x) float32, turned, scaled and mirrored: (c, size, size)."""
    window = random_window(stack, int(np.ceil(_SLACK * size)), size, rng)
    turned = tv.affine(
        torch.from_numpy(window), angle=float(rng.uniform(-_ANGLE, _ANGLE)) + 90.0 * int(rng.integers(4)),
        translate=[0, 0], scale=float(np.exp(rng.uniform(*np.log(_SCALE)))), shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )  # fmt: skip
    patch = tv.center_crop(turned, [size, size])
    if rng.random() < 0.5:
        patch = tv.horizontal_flip(patch)
    return patch


def quarter_turned(maps: Tensor, turns: int, *, mirrored: bool) -> Tensor:
    """Turn (c, y, x) by quarters, then mirror it: the same for pixels and for features of any grid."""
    turned = torch.rot90(maps, turns, (1, 2))
    return turned.flip(2) if mirrored else turned


def random_window(stack: np.ndarray, width: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Window of ``width`` around a random patch of ``size``; what lies beyond the field is its mirror image."""
    corners = [int(rng.integers(max(1, length - size + 1))) - (width - size) // 2 for length in stack.shape[1:]]
    rows = [mirrored(corner, width, length) for corner, length in zip(corners, stack.shape[1:], strict=True)]
    return stack[:, rows[0][:, None], rows[1][None, :]]


def mirrored(start: int, n: int, length: int) -> np.ndarray:
    """Indices ``start ... start + n`` of an axis that goes on as its mirror image at both ends."""
    index = np.abs(np.arange(start, start + n)) if length > 1 else np.zeros(n, dtype=int)
    period = max(1, 2 * (length - 1))
    index = index % period
    return np.where(index < length, index, period - index)


def relit(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Change contrast, brightness and sharpness of channels (c, y, x) in 0 to 1, and add noise."""
    gamma, gain = np.exp(rng.uniform(*np.log(_GAMMA))), rng.uniform(*_GAIN)
    pixels = pixels.clamp(0, 1) ** float(gamma) * float(gain)
    if rng.random() < 0.3:
        pixels = tv.gaussian_blur(pixels, kernel_size=[5, 5], sigma=[float(rng.uniform(0.3, _BLUR))] * 2)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * float(rng.uniform(0, _NOISE))
    return pixels + torch.from_numpy(noise)


def padded(pixels: Tensor, stride: int) -> Tensor:
    """Extend (B, c, y, x) to multiples of the stride, by its mirror image where that is long enough, else by its edge."""
    y, x = (-length % stride for length in pixels.shape[-2:])
    mode = "reflect" if y < pixels.shape[-2] and x < pixels.shape[-1] else "replicate"
    return F.pad(pixels, (0, x, 0, y), mode=mode)
