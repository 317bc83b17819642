"""MoCo v3: two views of a place are to look alike to the encoder, and unlike other places."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ._mae import need_lightly

if TYPE_CHECKING:
    import numpy as np

_HIDDEN, _OUT = 1024, 256
"""Width of the heads; the paper's 4096 would make them four times as large as a small student."""


class MoCo(nn.Module):
    """An encoder that learns by contrast, with a slow copy of itself that gives the keys.

    Parameters
    ----------
    encoder
        Encoder of the student, of any kind; its last feature map is averaged. Trained in place.
    temperature
        Temperature of the contrast.
    momentum
        Share of the slow copy that stays at the first step; it grows to 1 along a cosine.
    freeze_patches
        Whether a Transformer's projection of patches stays as it is: what keeps MoCo v3 stable.

    References
    ----------
    Chen et al. 2021: arXiv 2104.02057.
    """

    n_views, relights = 2, True

    def __init__(self, encoder: nn.Module, temperature: float, momentum: float, *, freeze_patches: bool) -> None:
        super().__init__()
        modules, self._utils = need_lightly()
        self.temperature, self.momentum = temperature, momentum
        if freeze_patches and isinstance(getattr(encoder, "model", None), VisionTransformer):
            encoder.model.patch_embed.requires_grad_(False)  # noqa: FBT003
        head = modules.MoCoProjectionHead(
            encoder.out_channels[-1], hidden_dim=_HIDDEN, output_dim=_OUT, num_layers=3, batch_norm=True
        )
        self.query = nn.Sequential(_Pooled(encoder), head)
        self.key = deepcopy(self.query).requires_grad_(False)  # noqa: FBT003
        self.predictor = modules.MoCoProjectionHead(
            _OUT, hidden_dim=_HIDDEN, output_dim=_OUT, num_layers=2, batch_norm=True
        )

    def masks(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Nothing is hidden."""
        del rng
        return ()

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, width) of both views, then their keys."""
        queries = [self.predictor(self.query(view)) for view in (first, second)]
        with torch.no_grad():
            keys = [self.key(view) for view in (first, second)]
        return queries[0], queries[1], keys[0], keys[1]

    def loss(self, found: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Any]]:
        """Queries of each view against keys of the other; and the share that finds its own."""
        del batch
        one, right_one = info_nce(found[0], found[3], self.temperature)
        two, right_two = info_nce(found[1], found[2], self.temperature)
        return one + two, {"accuracy": (right_one + right_two) / 2}

    def after_step(self, step: int, n_steps: int) -> None:
        """Move the slow copy towards the encoder."""
        from lightly.utils.scheduler import cosine_schedule

        self._utils.update_momentum(self.query, self.key, cosine_schedule(step, n_steps, self.momentum, 1.0))


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding each query's own key among all keys of a batch.

    lightly's NT-Xent also contrasts queries with queries, which MoCo v3 does not.

    Parameters
    ----------
    queries, keys
        (B, width); the same row is the same place.
    temperature
        Temperature; the loss is multiplied by twice its value, as in MoCo v3.

    Returns
    -------
    The loss, and the share of queries whose own key is the nearest.
    """
    similar = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
    own = torch.arange(len(similar), device=similar.device)
    right = (similar.argmax(dim=1) == own).float().mean()
    return F.cross_entropy(similar / temperature, own) * (2 * temperature), right


class _Pooled(nn.Module):
    """Mean of the last feature map: what the decoder will read, unlike a class token."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.encoder(pixels)
        if isinstance(features, tuple):  # a Transformer's: maps, then prefix tokens
            features = features[0]
        return features[-1].mean(dim=(2, 3))
