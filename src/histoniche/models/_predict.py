"""Niche logits of all cells from their whole neighbourhoods."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from tqdm.auto import tqdm

from histoniche._compute import ahead, inference_fabric, on_device, preparing_threads
from histoniche._settings import settings
from histoniche.neighbors import NeighborGraph, neighborhood_mean, padded_neighborhoods

from ._features import FeatureSource, take

LEAST_PROBABILITY = 1e-6
_PROJECTED_AT_ONCE = 16_384
_SEED = 0
"""Seed of the subset that cells with more neighbours than tokens see: a constant, so that two runs give the same labels."""


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
        A cell with as many neighbours or more sees a random subset of them. It is drawn by the row of the cell: the same
        in every run and batch, another in a table with its rows in another order, or with some of them.
    batch_size
        Cells at a time; the result does not depend on it.
    description
        Text of the progress bar.

    Returns
    -------
    (n, K) float32.
    """
    n = graph.n_cells
    device = inference_fabric().device
    module = module.to(device).eval()  # type: ignore[attr-defined]
    # Neighbourhoods of a like size share a batch, so that little of it is padding.
    order = np.argsort(graph.counts, kind="stable")

    def make(step: int) -> tuple[Tensor, ...]:
        rows = order[step * batch_size : (step + 1) * batch_size]
        found = padded_neighborhoods(graph, xy, rows, radius, max_tokens=max_tokens, seed=_SEED)
        return on_device((rows, found.index, found.offsets, found.mask), device)

    steps = -(-n // batch_size)
    logits: Tensor | None = None
    with torch.inference_mode():
        projected = _project(module, features, n, device)
        batches = ahead(make, steps, workers=preparing_threads(device))
        for rows, index, offsets, mask in tqdm(batches, total=steps, desc=description, disable=not settings.progress):
            found = module.niches(projected[index], offsets, mask)
            if logits is None:
                logits = torch.empty((n, found.shape[1]), device=device)
            logits[rows] = found.float()  # stays on the device, which need not wait
    return logits.cpu().numpy()  # type: ignore[union-attr]  # _project refuses zero cells


def consensus(graph: NeighborGraph, logits: np.ndarray) -> np.ndarray:
    """Logits of the mean assignment over the discs centred on a cell and on its neighbours.

    Parameters
    ----------
    graph
        Neighbour graph.
    logits
        (n, K) logits of the discs centred on the cells.

    Returns
    -------
    (n, K) float32, the logarithm of the mean of ``softmax(logits)``.
    """
    assignment = neighborhood_mean(graph, softmax(logits, axis=1))
    return np.log(np.maximum(assignment, LEAST_PROBABILITY))


def _project(module: NicheModule, features: np.ndarray | FeatureSource, n: int, device: torch.device) -> Tensor:
    """Projections of all cells, (n, p) on the device; the next features are read while these are projected."""

    def make(step: int) -> Tensor:
        rows = np.arange(step * _PROJECTED_AT_ONCE, min((step + 1) * _PROJECTED_AT_ONCE, n))
        return on_device(take(features, rows), device)

    projected: Tensor | None = None
    for step, block in enumerate(ahead(make, -(-n // _PROJECTED_AT_ONCE), workers=preparing_threads(device))):
        found = module.project(block)
        if projected is None:
            projected = found.new_empty((n, found.shape[1]))
        projected[step * _PROJECTED_AT_ONCE : step * _PROJECTED_AT_ONCE + len(found)] = found
    if projected is None:
        msg = "There are no cells to predict."
        raise ValueError(msg)
    return projected
