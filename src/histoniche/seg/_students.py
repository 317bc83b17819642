"""Students: U-Nets over small encoders, or a light DPT over a plain vision Transformer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from histoniche._random import isolated_rng
from histoniche.encoders._lite0 import efficientnet_lite0_weights

from ._access import StudentAccessError, need_package
from ._targets import OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DECODER_CHANNELS = (128, 64, 32, 16, 16)
"""Half as wide as the library's: on 2 cores a third faster."""
_LITE0 = "efficientnet-lite0"
_CLASSIFIER = ("conv_head.", "bn2.", "classifier.")
"""Beginnings of the names of its weights that a segmenter has no use for."""
STUDENTS = {
    "swin-tiny": ("swin_tiny_patch4_window7_224", 27.0),
    "resnet18": ("resnet18", 11.0),
    "efficientnet-b0": ("efficientnet_b0", 5.3),
    "mobilenetv3-small": ("mobilenetv3_small_100", 1.5),
    "vit-tiny": ("vit_tiny_patch16_224", 5.7),
    _LITE0: ("tf_efficientnet_lite0", 4.7),
}
"""Names of students: model of timm, and millions of parameters as the papers, or its authors (ViT, Lite0), give them."""
_KERNEL_NDIM = 4
"""Dimensions of the kernel of a convolution of images."""


def build_student(
    encoder: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    decoder_channels: tuple[int, ...] = DECODER_CHANNELS,
    n_channels: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Make a network of segmentation-models-pytorch over an encoder of timm.

    A U-Net; over a plain vision Transformer a DPT, which reads four of its blocks, each feature of which is brought to mean 0 and
    standard deviation 1 first.

    Parameters
    ----------
    encoder
        A name of :data:`STUDENTS`, or of any timm model that gives feature maps.
    pretrained
        Whether the encoder starts from timm's ImageNet weights, fetched from the hub; an error where they cannot be had. Those
        of ``"efficientnet-lite0"`` lie in a package (extra ``demo``) and need no download.
    weights
        Local file with the encoder's weights, instead of the hub's (``.safetensors``, or ``.pth`` that holds tensors alone).
    decoder_channels
        Width of the five levels of the U-Net's decoder; those of a DPT follow from the first.
    n_channels
        Channels of the image.
    seed
        Seed of the weights that are drawn.

    Returns
    -------
    Module from (B, n_channels, y, x), y and x multiples of 32, to logits (B, 2, y, x).

    Raises
    ------
    ImportError
        segmentation-models-pytorch, or the package with the weights of EfficientNet-Lite0, is missing.
    StudentAccessError
        The encoder's weights cannot be had.
    ValueError
        No such encoder.
    """
    smp = need_package("segmentation_models_pytorch", "segmentation-models-pytorch", "a student")
    import timm

    name = STUDENTS[encoder][0] if encoder in STUDENTS else encoder.removeprefix("timm/")
    if not timm.is_model(name):
        msg = f"student encoder={encoder!r} is unknown: choose one of {sorted(STUDENTS)}, or a timm model by name."
        raise ValueError(msg)
    options: dict[str, Any] = {}
    if weights is not None:
        if not Path(weights).is_file():
            msg = f"weights={str(weights)!r} of the student's encoder {encoder!r} is no file."
            raise StudentAccessError(msg)
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    elif pretrained and encoder == _LITE0:
        kept = {name: w for name, w in efficientnet_lite0_weights().items() if not name.startswith(_CLASSIFIER)}
        options["pretrained_cfg_overlay"] = {"state_dict": kept}
    if "swin" in name:  # windows do not depend on the size of the image, if asked not to
        options |= {"img_size": 224, "strict_img_size": False}
    if is_plain_vit(name):
        network, width = smp.DPT, decoder_channels[0]
        options |= {
            "dynamic_img_size": True, "decoder_readout": "ignore", "decoder_fusion_channels": width // 4,
            "decoder_intermediate_channels": (width // 4, width // 2, width, width),
        }  # fmt: skip
    else:
        network = smp.Unet
        options["decoder_channels"] = decoder_channels
    try:
        with isolated_rng(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = network(
                f"tu-{name}", encoder_weights=True if pretrained or weights is not None else None,
                in_channels=n_channels, classes=len(OUTPUTS), **options,
            )  # fmt: skip
    except KeyError as error:  # some versions of timm look for the first layer by its name
        if weights is None:
            raise
        msg = (
            f"weights={str(weights)!r} lack {error} of the encoder {encoder!r}: they belong to another network. Pass weights "
            "of timm's model of that name."
        )
        raise StudentAccessError(msg) from error
    except ValueError as error:
        msg = f"The encoder {encoder!r} gives no maps that a decoder could read ({error}): choose another, see hn.seg.list_students()."
        raise ValueError(msg) from error
    except (OSError, RuntimeError) as error:
        if not (pretrained or weights is not None):
            raise
        msg = (
            f"The ImageNet weights of the student's encoder {encoder!r} cannot be had ({type(error).__name__}): connect to "
            f"the Hugging Face hub, pass weights= with a local file, take {_LITE0!r}, whose weights need no download, or pass "
            "pretrained=False to start from random weights."
        )
        raise StudentAccessError(msg) from error
    if is_plain_vit(name):
        module.decoder = Calibrated(module.decoder, module.encoder.out_channels)
    if weights is not None:
        _check_loaded(module.encoder, Path(weights), encoder)
    return module


class Calibrated(nn.Module):
    """A DPT's decoder whose features have mean 0 and standard deviation 1.

    Where a Transformer was pretrained, what differs from place to place is a few percent of its features: their mean is far
    larger (after 250 steps of MAE, standard deviation 28 over all of a block's output, 0.7 over places), and a decoder that
    starts at random hardly learns to see past it.

    Parameters
    ----------
    decoder
        The decoder; of the features and their tokens.
    widths
        Features of each block.

    References
    ----------
    Normalisation without scale and offset before a decoder: He et al. 2022, arXiv 2111.06377, appendix A.1.
    """

    def __init__(self, decoder: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.decoder = decoder
        # Scales of 1 and offsets of 0 that stay, since ONNX cannot do without.
        self.norms = nn.ModuleList(nn.BatchNorm2d(width).requires_grad_(requires_grad=False) for width in widths)

    def forward(self, features: Sequence[Tensor], tokens: Any) -> Tensor:
        """Decode features (B, c, h, w) of the blocks; the tokens beside them are handed on."""
        return self.decoder([norm(maps) for norm, maps in zip(self.norms, features, strict=True)], tokens)


def is_plain_vit(encoder: str) -> bool:
    """Whether an encoder is a Transformer of one resolution, whose blocks a DPT reads."""
    return STUDENTS.get(encoder, (encoder, 0))[0].removeprefix("timm/").startswith(("vit_", "deit"))


def hidden_layers(output: Any) -> list[Tensor]:
    """Features (B, c, h, w) that a student's encoder hands on: the four blocks of a ViT, the three coarsest of a U-Net."""
    return list(output[0]) if isinstance(output, tuple) else list(output)[-3:]


def _check_loaded(encoder: nn.Module, path: Path, name: str) -> None:
    """Refuse a file that did not give the encoder its weights: timm passes over what does not fit."""
    stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    known = {tensor.float().numpy().tobytes() for tensor in stored.values() if isinstance(tensor, torch.Tensor)}
    several = [p.detach().float() for p in encoder.parameters() if p.ndim > 1]
    # The first convolution is made to fit the number of channels, so it may differ from the file's.
    first = next(i for i, parameter in enumerate(several) if parameter.ndim == _KERNEL_NDIM)
    kernels = [parameter.numpy().tobytes() for i, parameter in enumerate(several) if i != first]
    found = sum(kernel in known for kernel in kernels)
    if found < len(kernels):
        msg = (
            f"weights={str(path)!r} hold {found} of the {len(kernels)} kernels of the encoder {name!r}: they belong to "
            "another network. Pass weights of timm's model of that name."
        )
        raise StudentAccessError(msg)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def list_students() -> pd.DataFrame:
    """Parameters of the papers' students and of EfficientNet-Lite0, in millions, as built here and as the papers give them.

    The papers count encoders, some with the classifier that a U-Net drops; the decoder comes on top.

    Returns
    -------
    One row a student: ``timm_model``, ``encoder``, ``whole``, ``paper``.
    """
    rows = {}
    for name, (model, paper) in STUDENTS.items():
        module = build_student(name, pretrained=False)
        rows[name] = {
            "timm_model": model, "encoder": count_parameters(module.encoder) / 1e6,
            "whole": count_parameters(module) / 1e6, "paper": paper,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("student")
