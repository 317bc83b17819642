"""Fill a store with the features of all cells."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from histoniche._compute import ahead, inference_fabric, memory_kept
from histoniche._settings import settings

from ._contract import feature_contract
from ._dense import dense_block_width, dense_dim, dense_geometry, embed_tiles
from ._store import FeatureStore
from ._tiles import Slide, blocks_of

if TYPE_CHECKING:
    from pathlib import Path

    from ._load import Encoder
    from ._tiles import Region

_CROP_BLOCK = 512
"""Width in px of the squares whose cells share one reading of the image in crop mode."""
_SAMPLED_WHOLE = 8192
"""Widest level in px that is read as a whole to tell one image from another."""


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

    Memory is flat in the number of cells and in the size of the image: the pixels of one block of about 1000 px are held,
    and those of the next are read while it is encoded.

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
        Crops, or tiles of one block, at a time; the features do not depend on it, rounding apart.

    Returns
    -------
    The complete store.
    """
    slide = Slide.at(pyramid, um_per_px, target_um_per_px)
    scaled = points * slide.scale
    # What a cell needs of the image reaches this far beyond the block that it lies in.
    width, reach = (
        (dense_block_width(encoder), dense_geometry(encoder)[1])
        if mode == "dense"
        else (_CROP_BLOCK, encoder.spec.input_px / 2)
    )
    blocks, edges = blocks_of(scaled, width)
    fabric = inference_fabric()
    encoder.module.to(fabric.device)
    dim = dense_dim(encoder) if mode == "dense" else crop_dim(encoder)
    contract = feature_contract(encoder, mode, target_um_per_px)
    filled = FeatureStore.open_or_create(store, blocks, dim, contract, fingerprint(pyramid, points, um_per_px))
    missing = [b for b in range(len(blocks)) if not filled.done(b)]
    work = embed_tiles if mode == "dense" else embed_crops

    def read(i: int) -> Region:
        low = edges[missing[i]]
        return slide.region(low - reach, low + width + reach)

    with (
        memory_kept(),
        torch.inference_mode(),
        fabric.autocast(),
        tqdm(
            total=len(points), initial=len(points) - sum(len(blocks[b]) for b in missing), desc=f"{mode} features",
            unit="cell", disable=not settings.progress,
        ) as bar,
    ):  # fmt: skip
        for b, region in zip(missing, ahead(read, len(missing)), strict=True):
            filled.write(b, work(region.to(fabric.device), scaled[blocks[b]], encoder, batch_size))
            bar.update(len(blocks[b]))
    return filled


def crop_dim(encoder: Encoder) -> int:
    """Length of the embedding of a crop."""
    size = encoder.spec.input_px
    with torch.inference_mode():
        return encoder.pooled(torch.zeros(1, 3, size, size, device=encoder.device)).shape[1]


def embed_crops(region: Region, points: np.ndarray, encoder: Encoder, batch_size: int) -> np.ndarray:
    """Embeddings (n, d) float32 of the crops centred on points (n, 2) in target px."""
    size = encoder.spec.input_px
    found = [
        encoder.pooled(region.windows(points[start : start + batch_size] - size / 2, size)).float().cpu().numpy()
        for start in range(0, len(points), batch_size)
    ]
    return np.concatenate(found)


def fingerprint(pyramid: tuple[Any, ...], points: np.ndarray, um_per_px: float) -> str:
    """SHA-256 of the cells' places, the image's size and a sample of its pixels."""
    sha = hashlib.sha256()
    sha.update(np.ascontiguousarray(points, dtype=np.float64).tobytes())
    sha.update(f"{[tuple(level.shape) for level in pyramid]} {um_per_px:.9g}".encode())
    coarsest = pyramid[-1]
    width = max(coarsest.shape[1:])
    if width <= _SAMPLED_WHOLE:
        step = max(1, width // 512)
        sha.update(np.ascontiguousarray(coarsest[:, ::step, ::step]).tobytes())
    else:  # an image without small levels: a few patches, so that it is not read as a whole
        for y in np.linspace(0, coarsest.shape[1] - 64, 5).clip(0).astype(int):
            for x in np.linspace(0, coarsest.shape[2] - 64, 5).clip(0).astype(int):
                sha.update(np.ascontiguousarray(coarsest[:, y : y + 64, x : x + 64]).tobytes())
    return sha.hexdigest()
