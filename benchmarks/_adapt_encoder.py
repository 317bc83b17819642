"""A short adaptation of the encoder to the slide for ``student_trials.py``, with molecules or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightly.loss import VICRegLoss
from safetensors.torch import save_file
from scipy.spatial import cKDTree
from torch import Tensor, nn
from xenium_pancreas import ENCODER

from histoniche import encoders
from histoniche._random import isolated_rng
from histoniche.encoders._dense import sample_map
from histoniche.encoders._tiles import Slide
from histoniche.models._training import train
from histoniche.neighbors import neighborhood_mean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from student_trials import Cells, Strip

IMAGE_UM, UM = 0.425, 0.5
"""um/px of the image, and of the encoder."""
TILE, MARGIN, BATCH, STEPS = 512, 32, 4, 120
OBJECTIVES = ("latent", "views")
"""``latent``: from the map at a cell to the scVI latent of its neighbourhood. ``views``: no molecules; the map at a cell is to be
the same in two views of the tile, and to tell cells apart (VICReg, Bardes et al. 2022, arXiv 2105.04906)."""
PROJECTED = 512


class _Adapted(nn.Module):
    """The encoder, its batch statistics as they are, and a head."""

    def __init__(self, encoder: encoders.Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = encoder.module
        self.head = head

    def train(self, mode: bool = True) -> _Adapted:  # noqa: FBT001, FBT002  # torch's signature
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Tensor, points: list[Tensor]) -> Tensor:
        maps = self.encoder.maps(images)
        parts = [
            torch.cat([sample_map(m[i : i + 1], stride, xy.cpu().numpy()) for m, stride in maps], 1)
            for i, xy in enumerate(points)
        ]
        return self.head(torch.cat(parts))


class _Tiles:
    """Random tiles of the image with the cells that are fitted on."""

    def __init__(self, image: np.ndarray, points: np.ndarray) -> None:
        self.slide, self.points, self.tree = Slide.at((image,), IMAGE_UM, UM), points, cKDTree(points)

    def draw(self, rng: np.random.Generator, n_views: int) -> tuple[list[tuple[Tensor, np.ndarray]], np.ndarray]:
        """Views of a tile with the places of its cells, and which cells they are, (m,)."""
        center = self.points[rng.integers(len(self.points))] + rng.uniform(-TILE / 4, TILE / 4, 2)
        corner = center - TILE / 2
        cells = np.asarray(self.tree.query_ball_point(center, TILE / 2 - MARGIN, p=np.inf), dtype=np.int64)
        rgb = self.slide.region(corner, corner + TILE).windows(corner[None], TILE)[0]
        return [_view(rgb, self.points[cells] - corner, rng) for _ in range(n_views)], cells


def _view(rgb: Tensor, xy: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """The tile (3, TILE, TILE) in other stains, turned and mirrored, and the places (m, 2) in it."""
    gain = torch.from_numpy((rng.uniform(0.8, 1.25, (3, 1, 1)) * rng.uniform(0.85, 1.15)).astype(np.float32))
    rgb = 256 * ((rgb + 1) / 256) ** gain - 1
    turns = int(rng.integers(4))
    rgb = torch.rot90(rgb, turns, (1, 2))
    for _ in range(turns):
        xy = np.stack([xy[:, 1], TILE - xy[:, 0]], axis=1)
    if rng.random() < 0.5:
        rgb, xy = rgb.flip(2), np.stack([TILE - xy[:, 0], xy[:, 1]], axis=1)
    return rgb, xy


def adapt(image: np.ndarray, cells: Cells, strip: Strip, objective: str, weights: Path) -> None:
    """Adapt on the cells that the strip's students are fitted on, and write the encoder's weights."""
    rows = np.flatnonzero(strip.fit)
    tiles = _Tiles(image, cells.xy[rows] / UM)
    encoder = encoders.load_encoder(ENCODER)
    encoder.module.requires_grad_(requires_grad=True)
    width = sum(m.shape[1] for m, _ in encoder.maps(torch.zeros(1, 3, 64, 64)))
    with isolated_rng(0):
        if objective == "latent":
            wanted = _latent(cells)[rows]
            norm, drop = nn.LayerNorm(width, elementwise_affine=False), nn.Dropout(0.3)
            module = _Adapted(encoder, nn.Sequential(norm, drop, nn.Linear(width, wanted.shape[1])))
            make, loss = _latent_step(tiles, wanted)
        else:
            layers = [
                nn.Linear(width, PROJECTED),
                nn.BatchNorm1d(PROJECTED),
                nn.ReLU(),
                nn.Linear(PROJECTED, PROJECTED),
            ]
            module = _Adapted(encoder, nn.Sequential(*layers))
            make, loss = _views_step(tiles)
        history = train(
            module, make, loss, n_steps=STEPS, lr=1e-3, weight_decay=0.05, description=f"adapting, {objective}"
        )
    print(
        f"{objective}, {strip.name}: loss {np.mean(history['loss'][:20]):.3f} to {np.mean(history['loss'][-20:]):.3f}",
        flush=True,
    )
    save_file({name: value.cpu().contiguous() for name, value in encoder.module.state_dict().items()}, weights)


def _latent(cells: Cells) -> np.ndarray:
    """Standardised scVI latent of the neighbourhood, means over 1 and 2 hops."""
    one = neighborhood_mean(cells.graph, np.asarray(cells.table.obsm["X_scVI"], dtype=np.float32))
    wanted = np.concatenate([one, neighborhood_mean(cells.graph, one)], axis=1)
    return ((wanted - wanted.mean(axis=0)) / wanted.std(axis=0)).astype(np.float32)


def _batch(views: list[tuple[Tensor, np.ndarray]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Images (B, 3, TILE, TILE) and the places of the cells in each."""
    return np.stack([rgb.numpy() for rgb, _ in views]), [xy for _, xy in views]


def _latent_step(tiles: _Tiles, wanted: np.ndarray) -> tuple[Callable[[int], Any], Callable[..., Any]]:
    def make(step: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([0, step])
        drawn = [tiles.draw(rng, 1) for _ in range(BATCH)]
        return *_batch([views[0] for views, _ in drawn]), np.concatenate([wanted[cells] for _, cells in drawn])

    def loss(module: nn.Module, batch: tuple[Any, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        images, places, target = batch
        return F.mse_loss(module(images, places), target), {}

    return make, loss


def _views_step(tiles: _Tiles) -> tuple[Callable[[int], Any], Callable[..., Any]]:
    vicreg = VICRegLoss()

    def make(step: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([1, step])
        drawn = [tiles.draw(rng, 2)[0] for _ in range(BATCH)]
        return _batch([views[i] for i in (0, 1) for views in drawn])

    def loss(module: nn.Module, batch: tuple[Any, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        one, other = module(*batch).chunk(2)
        return vicreg(one, other), {}

    return make, loss
