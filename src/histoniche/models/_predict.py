"""Niche logits of all cells from their whole neighbourhoods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from histoniche._compute import ahead, make_fabric, to_device
from histoniche._settings import settings
from histoniche.neighbors import NeighborGraph, padded_neighborhoods

from ._features import FeatureSource, take

if TYPE_CHECKING:
    from histoniche.neighbors import Neighborhoods

_PROJECTED_AT_ONCE = 16_384
_SEED = 0
"""Seed of the subset that cells with more neighbours than tokens see: a constant, so that labels never change."""


class NicheModule(Protocol):
    """What teacher and student have in common."""

    def project(self, features: Tensor) -> Tensor:
        """(..., d) features to what a neighbourhood needs of each cell."""

    def niches(self, projected: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K)."""


def predict_neighborhoods(
    module: NicheModule,
    features: np.ndarray | FeatureSource,
    graph: NeighborGraph,
    xy: np.ndarray,
    *,
    radius: float,
    max_tokens: int = 256,
    batch_size: int = 512,
    description: str = "niches",
) -> np.ndarray:
    """Logits of all cells from their whole neighbourhoods.

    Each cell is projected once, not once for every neighbourhood it lies in.

    Parameters
    ----------
    module
        Teacher or student.
    features
        (n, d) features.
    graph
        Neighbour graph at ``radius``.
    xy
        (n, 2) centroids in um.
    radius
        Radius in um.
    max_tokens
        Cells with more neighbours see a fixed random subset of them.
    batch_size
        Cells at a time; the result does not depend on it.
    description
        Text of the progress bar.

    Returns
    -------
    (n, K) float32.
    """
    n = graph.n_cells
    device = make_fabric().device
    module = module.to(device).eval()  # type: ignore[attr-defined]
    # Neighbourhoods of a like size share a batch, so that little of it is padding.
    order = np.argsort(graph.counts, kind="stable")

    def make(step: int) -> tuple[np.ndarray, Neighborhoods]:
        rows = order[step * batch_size : (step + 1) * batch_size]
        return rows, padded_neighborhoods(graph, xy, rows, radius, max_tokens=max_tokens, seed=_SEED)

    with torch.inference_mode():
        projected = torch.cat(
            [
                module.project(to_device(take(features, np.arange(at, min(at + _PROJECTED_AT_ONCE, n))), device))
                for at in range(0, n, _PROJECTED_AT_ONCE)
            ]
        )
        logits: np.ndarray | None = None
        steps = -(-n // batch_size)
        for rows, batch in tqdm(ahead(make, steps), total=steps, desc=description, disable=not settings.progress):
            found = module.niches(
                projected[to_device(batch.index, device)],
                to_device(batch.offsets, device),
                to_device(batch.mask, device),
            )
            if logits is None:
                logits = np.empty((n, found.shape[1]), dtype=np.float32)
            logits[rows] = found.float().cpu().numpy()
    if logits is None:
        msg = "There are no cells to predict."
        raise ValueError(msg)
    return logits
