"""A short adaptation of the encoder for ``student_trials.py``: from the image of a cell to the latent of its neighbourhood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.spatial import cKDTree
from spatialdata import SpatialData, read_zarr
from spatialdata.models import TableModel
from torch import Tensor, nn

import histoniche as hn
from histoniche import encoders
from histoniche._random import isolated_rng
from histoniche.encoders._dense import sample_map
from histoniche.encoders._tiles import Slide
from histoniche.models._training import train
from histoniche.neighbors import neighborhood_mean

if TYPE_CHECKING:
    from pathlib import Path

    from student_trials import Trial

ENCODER = "efficientnet-lite0"
IMAGE_UM, UM = 0.425, 0.5
"""um/px of the image, and of the encoder."""
TILE, MARGIN, BATCH, EPOCHS = 512, 32, 4, 8
Batch = tuple[Tensor, list[np.ndarray], Tensor]


class _Adapted(nn.Module):
    """The encoder, its batch statistics as they are, and a linear head."""

    def __init__(self, encoder: encoders.Encoder, width: int, n_targets: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = encoder.module
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, n_targets))

    def train(self, mode: bool = True) -> _Adapted:  # noqa: FBT001, FBT002  # torch's signature
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Tensor, points: list[np.ndarray]) -> Tensor:
        maps = self.encoder.maps(images)
        parts = [
            torch.cat([sample_map(m[i : i + 1], stride, xy) for m, stride in maps], 1) for i, xy in enumerate(points)
        ]
        return self.head(self.norm(torch.cat(parts)))


def adapted_features(tissue: Path, trial: Trial, output: Path) -> np.ndarray:
    """Dense features (n, d) float16 of the training cells by an encoder adapted on those to fit on."""
    sdata = read_zarr(tissue)
    weights = output / "adapted.safetensors"
    if not weights.exists():
        _adapt(sdata["virtual_he"]["scale0"]["image"].data.compute(), trial, weights)
    table = TableModel.parse(anndata.AnnData(obs=trial.table.obs[["split"]], obsm={"spatial": trial.xy}))
    part = SpatialData.init_from_elements({"virtual_he": sdata["virtual_he"], "table": table})
    hn.tl.histology_embedding(part, encoder=ENCODER, mode="dense", weights=weights, key_added="adapted")
    return part["table"].obsm["adapted"]


def _adapt(image: np.ndarray, trial: Trial, weights: Path) -> None:
    cells = np.flatnonzero(trial.fit)
    points = trial.xy[cells] / UM
    one = neighborhood_mean(trial.graph, np.asarray(trial.table.obsm["X_scVI"], dtype=np.float32))
    wanted = np.concatenate([one, neighborhood_mean(trial.graph, one)], axis=1)[cells]
    wanted = torch.from_numpy(((wanted - wanted.mean(axis=0)) / wanted.std(axis=0)).astype(np.float32))
    slide, tree = Slide.at((image,), IMAGE_UM, UM), cKDTree(points)
    per_tile = np.mean([len(tree.query_ball_point(p, TILE / 2 - MARGIN, p=np.inf)) for p in points[::500]])

    def make(step: int) -> Batch:
        rng = np.random.default_rng([0, step])
        tiles = [_tile(slide, points, tree, rng) for _ in range(BATCH)]
        return torch.stack([t[0] for t in tiles]), [t[1] for t in tiles], torch.cat([wanted[t[2]] for t in tiles])

    def loss(module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, float | Tensor]]:
        images, xy, target = batch
        return F.mse_loss(module(images.to(device), xy), target.to(device)), {}

    encoder = encoders.load_encoder(ENCODER)
    encoder.module.requires_grad_(requires_grad=True)
    with isolated_rng(0):
        module = _Adapted(encoder, sum(m.shape[1] for m, _ in encoder.maps(torch.zeros(1, 3, 64, 64))), wanted.shape[1])
        n_steps = int(EPOCHS * len(cells) / (BATCH * per_tile))
        history = train(module, make, loss, n_steps=n_steps, lr=1e-3, weight_decay=0.05, description="adapting")
    print(f"adapted in {n_steps} steps, loss {np.mean(history['loss'][-20:]):.3f}", flush=True)
    save_file({name: value.cpu().contiguous() for name, value in encoder.module.state_dict().items()}, weights)


def _tile(
    slide: Slide, points: np.ndarray, tree: cKDTree, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A tile (3, TILE, TILE) in other stains, turned and mirrored, the cells' places in it (m, 2) and which they are."""
    center = points[rng.integers(len(points))] + rng.uniform(-TILE / 4, TILE / 4, 2)
    corner = center - TILE / 2
    cells = np.asarray(tree.query_ball_point(center, TILE / 2 - MARGIN, p=np.inf), dtype=np.int64)
    xy = points[cells] - corner
    rgb = slide.region(corner, corner + TILE).windows(corner[None], TILE)[0]
    gain = torch.from_numpy((rng.uniform(0.8, 1.25, (3, 1, 1)) * rng.uniform(0.85, 1.15)).astype(np.float32))
    rgb = 256 * ((rgb + 1) / 256) ** gain - 1
    turns = int(rng.integers(4))
    rgb = torch.rot90(rgb, turns, (1, 2))
    for _ in range(turns):
        xy = np.stack([xy[:, 1], TILE - xy[:, 0]], axis=1)
    if rng.random() < 0.5:
        rgb, xy = rgb.flip(2), np.stack([TILE - xy[:, 0], xy[:, 1]], axis=1)
    return rgb, xy, cells
