"""Encoders whose right answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoniche.encoders import Encoder, EncoderSpec


class Means(nn.Module):
    """A network whose maps are the means of RGB over squares, and whose embedding is the image itself."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_info = [{"reduction": stride} for stride in strides]
        self.nothing = nn.Parameter(torch.zeros(1))
        self.calls: list[int] = []
        self.fail_at = -1

    def forward(self, x: Tensor) -> Tensor:
        self._call(x)
        return x.contiguous().flatten(1)

    def forward_intermediates(self, x: Tensor, *, indices: list[int], **_: object) -> list[Tensor]:
        self._call(x)
        return [F.avg_pool2d(x, self.feature_info[i]["reduction"]) for i in indices]

    def _call(self, x: Tensor) -> None:
        if len(self.calls) == self.fail_at:
            message = "killed"
            raise KeyboardInterrupt(message)
        self.calls.append(len(x))


def means_encoder(*strides: int, input_px: int = 16) -> Encoder:
    """Encoder of RGB means in 0 to 255, not normalised."""
    spec = EncoderSpec(
        name="means", source="timm", model="means", dim=3 * input_px**2, input_px=input_px,
        mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), dense_strides=strides,
    )  # fmt: skip
    return Encoder(spec, Means(strides).eval(), "sha256:0")


@pytest.fixture
def means() -> Callable[..., Encoder]:
    """Maker of encoders of RGB means, by their strides."""
    return means_encoder


@pytest.fixture
def ramp() -> np.ndarray:
    """Image (3, 180, 240): red is x, green is y, blue is constant; at p px from the edge its value is p - 1/2."""
    y, x = np.mgrid[:180, :240]
    return np.stack([x, y, np.full_like(x, 7)]).astype(np.uint8)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 96 px with margins of 16 px, so that a small image has many."""
    from histoniche.encoders import _dense

    monkeypatch.setattr(_dense, "_CNN_TILE", 96)
    monkeypatch.setattr(_dense, "_CNN_MARGIN", 16)
    monkeypatch.setattr(_dense, "_FINE_MARGIN", 16)
    monkeypatch.setattr(_dense, "_BLOCK", 64)
