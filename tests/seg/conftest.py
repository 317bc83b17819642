"""Small synthetic fields for tests of segmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.seg import Field
from histoniche.seg.teachers import PromptedTeacher, Prompts


def discs(seed: int, size: int = 96, n: int = 12, radius: int = 8) -> np.ndarray:
    """Label image (size, size) int32 of discs that do not touch."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels, centers = np.zeros((size, size), dtype=np.int32), np.empty((0, 2))
    while len(centers) < n:
        center = rng.uniform(radius, size - radius, 2)
        if len(centers) and np.hypot(*(centers - center).T).min() < 2 * radius + 3:
            n -= rng.random() < 0.05  # no room: fewer discs
            continue
        centers = np.vstack([centers, center])
        labels[(y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2] = len(centers)
    return labels


def nuclei(seed: int, size: int = 96, name: str | None = None) -> Field:
    """Field of bright nuclei with a second stain that fills them, 0.5 um/px."""
    labels = discs(seed, size)
    rng = np.random.default_rng(seed + 1000)
    nucleus = (labels > 0) * 120.0 + rng.normal(20, 4, labels.shape)
    stain = (labels > 0) * 80.0 + rng.normal(30, 4, labels.shape)
    image = np.stack([nucleus, stain]).clip(0, 255).astype(np.uint8)
    return Field(name or f"nuclei{seed}", image, ("DAPI", "membrane"), labels, 0.5)


@pytest.fixture(scope="session")
def fields() -> list[Field]:
    """Six fields of nuclei."""
    return [nuclei(seed) for seed in range(6)]


class Encoder(nn.Module):
    """Four blocks of a linear layer over cells of 4 px."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, rgb: Tensor) -> Tensor:
        maps = self.embed(rgb).permute(0, 2, 3, 1)
        for layer in self.layers:
            maps = maps + torch.tanh(layer(maps))
        return maps.permute(0, 3, 1, 2)


class Tiny(PromptedTeacher):
    """A teacher of the SAM family with that encoder."""

    lora_targets = r"layers\.\d"

    def __init__(self) -> None:
        with isolated_rng(0):
            net = Encoder()
        super().__init__(net, ("DAPI",), prompts=Prompts(), name="tiny", licence="CC0", input_px=64, gamma=1.0)

    def encode(self, rgb: Tensor) -> Tensor:
        return self.module(rgb)

    def blocks(self) -> list[nn.Module]:
        return list(self.module.layers)

    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        raise AssertionError


@pytest.fixture(scope="session")
def tiny_teacher() -> type[Tiny]:
    """Makes a teacher that costs nothing."""
    return Tiny
