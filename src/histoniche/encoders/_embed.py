"""Fill a store with the features of all cells."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from histoniche._compute import ahead, make_fabric
from histoniche._settings import settings

from ._contract import feature_contract
from ._dense import dense_blocks, dense_dim, read_tile, sample_tile
from ._store import FeatureStore
from ._tiles import Slide, blocks_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ._load import Encoder

_CROP_BLOCK = 512
"""Width in px of the squares whose cells share one reading of the image in crop mode."""


def embed(
    pyramid: tuple[Any, ...],
    points: np.ndarray,
    um_per_px: float,
    encoder: Encoder,
    store: str | Path,
    *,
    mode: Literal["crop", "dense"],
    target_um_per_px: float,
    batch_size: int = 64,
) -> FeatureStore:
    """Embed the histology around cells into a store, or finish one that was begun.

    Memory is flat in the number of cells and in the size of the image: one tile or one batch of crops is held, and the
    next is read while it is encoded.

    Parameters
    ----------
    pyramid
        Arrays (3, y, x) uint8, full resolution first; lazy or not.
    points
        (n, 2) centroids x, y in px of the full resolution; pixel i spans i to i + 1.
    um_per_px
        Size of a pixel of the full resolution.
    encoder
        The encoder.
    store
        Directory.
    mode
        ``"crop"``: one crop per cell; ``"dense"``: feature maps of overlapping tiles, read at the centroids.
    target_um_per_px
        Resolution at which the encoder sees the tissue.
    batch_size
        Crops at a time; the features do not depend on it.

    Returns
    -------
    The complete store.
    """
    slide = Slide.at(pyramid, um_per_px, target_um_per_px)
    scaled = points * slide.scale
    if mode == "dense":
        (blocks, corners), dim = dense_blocks(scaled, encoder), dense_dim(encoder)
    else:
        blocks, corners = blocks_of(scaled, _CROP_BLOCK)
        dim = crop_dim(encoder)
    contract = feature_contract(encoder, mode, target_um_per_px)
    filled = FeatureStore.open_or_create(store, blocks, dim, contract, fingerprint(pyramid, points, um_per_px))
    missing = [b for b in range(len(blocks)) if not filled.done(b)]
    fabric = make_fabric()
    encoder.module.to(fabric.device)
    with (
        torch.inference_mode(),
        fabric.autocast(),
        tqdm(
            total=len(points), initial=len(points) - sum(len(blocks[b]) for b in missing), desc=f"{mode} features",
            unit="cell", disable=not settings.progress,
        ) as bar,
    ):  # fmt: skip
        if mode == "dense":
            for b, tile in zip(
                missing,
                ahead(lambda i: _pinned(read_tile(slide, corners[missing[i]], encoder), fabric.device), len(missing)),
                strict=True,
            ):
                parts = sample_tile(tile.to(fabric.device, non_blocking=True), scaled[blocks[b]] - corners[b], encoder)
                filled.write(b, np.concatenate([part.float().cpu().numpy() for part in parts], axis=1))
                bar.update(len(blocks[b]))
        else:
            for b in missing:
                filled.write(b, _crops(slide, scaled[blocks[b]], encoder, fabric.device, batch_size))
                bar.update(len(blocks[b]))
    return filled


def crop_dim(encoder: Encoder) -> int:
    """Length of the embedding of a crop."""
    size = encoder.spec.input_px
    with torch.inference_mode():
        return encoder.pooled(torch.zeros(1, 3, size, size)).shape[1]


def _crops(slide: Slide, points: np.ndarray, encoder: Encoder, device: torch.device, batch_size: int) -> np.ndarray:
    """Embeddings (n, d) of crops centred on points (n, 2) in target px."""
    size = encoder.spec.input_px
    # Cells close together share a batch, so that the region that is read for it is small.
    order = np.lexsort((points[:, 0], np.floor(points[:, 1] / size)))
    starts = range(0, len(points), batch_size)

    def cut(i: int) -> Tensor:
        rows = order[starts[i] : starts[i] + batch_size]
        return _pinned(slide.windows(points[rows] - size / 2, size), device)

    found = [
        encoder.pooled(crops.to(device, non_blocking=True)).float().cpu().numpy() for crops in ahead(cut, len(starts))
    ]
    out = np.empty((len(points), found[0].shape[1]), dtype=np.float32)
    out[order] = np.concatenate(found)
    return out


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def fingerprint(pyramid: tuple[Any, ...], points: np.ndarray, um_per_px: float) -> str:
    """SHA-256 of the cells' places, the image's size and a sample of its pixels."""
    sha = hashlib.sha256()
    sha.update(np.ascontiguousarray(points, dtype=np.float64).tobytes())
    sha.update(f"{[tuple(level.shape) for level in pyramid]} {um_per_px:.9g}".encode())
    coarsest = pyramid[-1]
    step = max(1, max(coarsest.shape[1:]) // 512)
    sha.update(np.ascontiguousarray(coarsest[:, ::step, ::step]).tobytes())
    return sha.hexdigest()
