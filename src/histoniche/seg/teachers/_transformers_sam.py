"""SAM itself, as the package transformers has it: ViT-B, ViT-L or ViT-H, by name or from local files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from histoniche.seg._access import TeacherAccessError, need_package
from histoniche.seg._targets import OUTPUTS

from ._prompts import Prompts
from ._sam import PromptedTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence

SAM_MODELS = {"vit_b": "facebook/sam-vit-base", "vit_l": "facebook/sam-vit-large", "vit_h": "facebook/sam-vit-huge"}
"""Short names of SAM's published weights."""
# What SAM was trained with, on values of 0 to 255.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class SAM(PromptedTeacher):
    """Segment Anything: a plain ViT of 91, 308 or 636 M parameters that sees 1024 px.

    Parameters
    ----------
    channels
        One to three channels, laid on grey or red, green, blue.
    model
        ``"vit_b"``, ``"vit_l"``, ``"vit_h"``, or the name of a repository of the Hugging Face hub with weights of the
        same architecture as safetensors.
    weights
        Folder with ``config.json`` and ``model.safetensors``, which is read instead of the hub.
    prompts
        How it is asked: boxes by default.
    gamma
        Exponent of the values that it sees.
    batch_size
        Prompts at a time.
    licence
        Terms of the weights; SAM's own by default.

    Raises
    ------
    ImportError
        The package transformers is missing; the message says how to install it.
    TeacherAccessError
        The weights cannot be had; the message says how to get them.
    ValueError
        The weights are damaged, or those of another architecture.

    References
    ----------
    Segment Anything: Kirillov et al. 2023, doi 10.1109/ICCV51070.2023.00371.
    """

    lora_targets = r".*vision_encoder\.layers\.\d+\.attn\.qkv"

    def __init__(
        self,
        channels: Sequence[str | None],
        *,
        model: str = "facebook/sam-vit-base",
        weights: Path | str | None = None,
        prompts: Prompts | None = None,
        gamma: float = 0.5,
        batch_size: int = 16,
        licence: str = "Apache-2.0",
    ) -> None:
        model = SAM_MODELS.get(model, model)
        net = build_sam(model, weights)
        super().__init__(
            net, channels, prompts=prompts or Prompts(), name=model if weights is None else f"sam {Path(weights).name}",
            licence=licence, input_px=int(net.config.vision_config.image_size), gamma=gamma, batch_size=batch_size,
        )  # fmt: skip

    def normalise(self, rgb: Tensor) -> Tensor:
        """Mean 0 and standard deviation 1 over the images that SAM was trained on."""
        mean, std = (rgb.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return (rgb * 255 - mean) / std

    def encode(self, rgb: Tensor) -> Tensor:
        """Image embedding, (1, 256, 64, 64)."""
        return self.module.vision_encoder(rgb)[0]

    def blocks(self) -> list[nn.Module]:
        """The blocks of the ViT."""
        return list(self.module.vision_encoder.layers)

    def unprompted_decoder(self) -> nn.Module:
        """Copy of the decoder, asked without a prompt."""
        return _Unprompted(self.module)

    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        """One mask a box, three a point."""
        if boxes:
            asked = {"input_boxes": prompts[None]}
        else:
            foreground = torch.ones(1, len(prompts), 1, dtype=torch.int64, device=prompts.device)
            asked = {"input_points": prompts[None, :, None], "input_labels": foreground}
        found = self.module(image_embeddings=embedding, multimask_output=not boxes, **asked)
        return found.pred_masks[0], found.iou_scores[0]


class _Unprompted(nn.Module):
    """SAM's decoder without a prompt; two of the masks that it proposes are foreground and boundary."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = copy.deepcopy(net.prompt_encoder), copy.deepcopy(net.mask_decoder)
        self.register_buffer("position", net.get_image_wide_positional_embeddings().detach().clone())

    def forward(self, embedding: Tensor, rgb: Tensor) -> Tensor:
        del rgb
        sparse, dense = self.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=None)
        masks = self.mask_decoder(
            image_embeddings=embedding, image_positional_embeddings=self.position.repeat(len(embedding), 1, 1, 1),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense.expand(len(embedding), -1, -1, -1),
            multimask_output=True,
        )[0]  # fmt: skip
        return masks[:, 0, : len(OUTPUTS)]


def build_sam(model: str, weights: Path | str | None) -> nn.Module:
    """Load SAM from the hub or a folder: safetensors alone, every weight or an error."""
    package = need_package("transformers", "transformers", f"the teacher {model!r}")
    source = model if weights is None else str(weights)
    if weights is not None and not (Path(weights) / "config.json").is_file():
        msg = f"weights={source!r} is no folder with config.json and model.safetensors. {_how_to_get(model)}"
        raise TeacherAccessError(msg)
    try:
        net, report = package.SamModel.from_pretrained(
            source, use_safetensors=True, local_files_only=weights is not None, output_loading_info=True
        )
    except OSError as error:
        where = "the hub" if weights is None else f"the folder {source!r}"
        msg = f"The weights of {model!r} cannot be had from {where} ({_first_line(error)}). {_how_to_get(model)}"
        raise TeacherAccessError(msg) from error
    except (SafetensorError, RuntimeError) as error:
        msg = f"The weights of {source!r} are damaged, or not SAM's ({_first_line(error)}). {_how_to_get(model)}"
        raise ValueError(msg) from error
    # transformers fills what is missing with random numbers.
    absent = sorted(report["missing_keys"])
    if absent:
        msg = (
            f"The weights of {source!r} are not those of a whole SAM: {len(absent)} are missing, {absent[0]!r} among them. "
            f"{_how_to_get(model)}"
        )
        raise ValueError(msg)
    return net.float()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _how_to_get(model: str) -> str:
    return (
        f"On a machine with network, run `hf download {model} config.json model.safetensors --local-dir sam`, copy the folder "
        "and pass weights='sam'. With HF_HUB_OFFLINE=1 only what the local cache of the hub has is looked for."
    )
