"""Masked autoencoder: most patches of an image are hidden, and drawn again from the few that are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ._access import need_package

if TYPE_CHECKING:
    from types import ModuleType

    from timm.models.vision_transformer import VisionTransformer

_DECODER_WIDTH, _DECODER_DEPTH, _DECODER_HEADS = 192, 2, 3
"""The students are small, so the decoder that is thrown away afterwards is, too."""


def need_lightly() -> tuple[ModuleType, ModuleType]:
    """Lightly's networks and its helpers, or an error that says how to install it."""
    need_package("lightly", "lightly", "self-supervised pretraining")
    from lightly.models import modules, utils

    return modules, utils


def draw_vit(vit: VisionTransformer) -> None:
    """Draw a Transformer's weights as MAE and MoCo v3 do, in place; from torch's generator.

    Positions start as sines and cosines, and are learnt: the student is used at sizes other than that of the patches.
    """
    modules, utils = need_lightly()
    kernel = vit.patch_embed.proj.weight
    kernel.data = kernel.data.contiguous()  # lightly draws no kernel whose channels come last in memory
    modules.MaskedVisionTransformerTIMM(vit, pos_embed_initialization="skip")  # draws when it is made
    utils.initialize_2d_sine_cosine_positional_embedding(
        vit.pos_embed, num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens
    )
    vit.pos_embed.requires_grad_(True)  # noqa: FBT003


class MAE(nn.Module):
    """An encoder that learns by seeing a quarter of an image's patches and predicting the others.

    Parameters
    ----------
    vit
        timm's Transformer inside the student; trained in place.
    patch_px
        Width of the images.
    n_channels
        Channels of the images.
    mask_ratio
        Share of the Transformer's patches that are hidden.

    References
    ----------
    He et al. 2022: arXiv 2111.06377.
    """

    n_views, relights = 1, False

    def __init__(self, vit: VisionTransformer, patch_px: int, n_channels: int, mask_ratio: float) -> None:
        super().__init__()
        modules, self._utils = need_lightly()
        self.width = int(vit.patch_embed.patch_size[0])
        self.n_patches = (patch_px // self.width) ** 2
        self.n_masked = round(mask_ratio * self.n_patches)
        if not 0 < self.n_masked < self.n_patches:
            msg = (
                f"mask_ratio={mask_ratio} hides {self.n_masked} of the {self.n_patches} patches that patch_px={patch_px} "
                "has: some must be hidden and some left."
            )
            raise ValueError(msg)
        self.n_prefix = int(vit.num_prefix_tokens)
        self.masked = modules.MaskedVisionTransformerTIMM(
            vit, weight_initialization="skip", pos_embed_initialization="skip"
        )
        self.masked.mask_token.requires_grad_(False)  # noqa: FBT003 - hidden patches are left out, not replaced
        self.embed = nn.Linear(vit.embed_dim, _DECODER_WIDTH)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            num_patches=self.n_patches, embed_dim=_DECODER_WIDTH, depth=_DECODER_DEPTH, num_heads=_DECODER_HEADS,
            num_prefix_tokens=self.n_prefix,
        )  # fmt: skip
        self.predict = nn.Linear(_DECODER_WIDTH, self.width**2 * n_channels)

    def masks(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Numbers of the hidden patches of an image, and of those left, row by row in the grid."""
        order = rng.permutation(self.n_patches)
        return np.sort(order[: self.n_masked]), np.sort(order[self.n_masked :])

    def encode(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """Tokens (B, prefix + kept, width) of the patches that are left."""
        return self.masked.encode(pixels, idx_keep=self._tokens(kept))

    def forward(self, pixels: Tensor, hidden: Tensor, kept: Tensor) -> Tensor:
        """Hidden patches (B, n_masked, pixels of a patch), as predicted."""
        utils = self._utils
        latent = self.embed(self.encode(pixels, kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(pixels), self.n_prefix + self.n_patches))
        tokens = utils.set_at_index(tokens, self._tokens(kept), latent.type_as(tokens))
        return self.predict(utils.get_at_index(self.decoder(tokens), hidden + self.n_prefix))

    def loss(self, predicted: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Any]]:
        """Mean squared error of hidden patches, each scaled to mean 0 and variance 1: who knows nothing scores 1.

        Flat patches become 0, which is easily learnt.
        """
        pixels, hidden, _ = batch
        patches = self._utils.patchify(pixels, self.width)
        target = self._utils.normalize_mean_var(self._utils.get_at_index(patches, hidden))
        return (predicted - target).square().mean(), {}

    def after_step(self, step: int, n_steps: int) -> None:
        """Nothing to do."""

    def _tokens(self, kept: Tensor) -> Tensor:
        """Places of the prefix and of kept patches among all tokens."""
        prefix = torch.arange(self.n_prefix, device=kept.device).expand(len(kept), -1)
        return torch.cat([prefix, kept + self.n_prefix], dim=1)
