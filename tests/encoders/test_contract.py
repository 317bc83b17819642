"""The feature contract."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from histoniche.encoders import Encoder, contract_difference, feature_contract, load_encoder


@pytest.fixture(scope="module")
def cnn() -> Encoder:
    return load_encoder("efficientnet-lite0")


@pytest.fixture(scope="module")
def vit() -> Encoder:
    return load_encoder("timm/test_vit", pretrained=False)


def test_crop_contract(cnn: Encoder) -> None:
    assert feature_contract(cnn, "crop", 0.25) == {
        "encoder": "efficientnet-lite0",
        "revision": cnn.revision,
        "mode": "crop",
        "um_per_px": 0.25,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "pooling": "pooled",
        "field_of_view_um": 56.0,
    }


def test_dense_contract(cnn: Encoder, vit: Encoder) -> None:
    of_cnn, of_vit = feature_contract(cnn, "dense", 0.5), feature_contract(vit, "dense", 0.5)
    assert of_cnn["pooling"] == "bilinear, strides 8, 16"
    assert (of_cnn["tile_px"], of_cnn["margin_px"]) == (1536, 176)
    assert of_vit["pooling"] == "patch tokens"
    assert (of_vit["tile_px"], of_vit["margin_px"]) == (160, 20)
    assert of_vit["revision"] == "random-init"


def test_symmetries_are_part_of_the_contract_where_there_are_any(cnn: Encoder) -> None:
    four = load_encoder("efficientnet-lite0", symmetries=4)
    one, other = feature_contract(cnn, "dense", 0.5), feature_contract(four, "dense", 0.5)
    assert "symmetries" not in one  # as in models that were made before there was a choice
    assert other == {**one, "symmetries": 4}
    assert contract_difference(one, other) == ["symmetries"]


@pytest.mark.parametrize("mode", ["crop", "dense"])
def test_json_round_trip(cnn: Encoder, mode: str) -> None:
    contract = feature_contract(cnn, mode, 0.2125)
    again = json.loads(json.dumps(contract))
    assert again == contract
    assert contract_difference(contract, again) == []


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, []),
        ({"mode": "dense"}, ["mode"]),
        ({"um_per_px": 0.51, "encoder": "uni2-h"}, ["encoder", "um_per_px"]),
        ({"mean": [0.5, 0.5, 0.4]}, ["mean"]),
        ({"mean": [0.5, 0.5]}, ["mean"]),
        ({"extra": 1}, ["extra"]),
        # Numbers agree to six digits, whatever holds them.
        ({"um_per_px": 0.5 * (1 + 1e-8)}, []),
        ({"um_per_px": 0.5 * (1 + 1e-4)}, ["um_per_px"]),
        ({"um_per_px": np.float32(0.5), "tile": np.int64(1152)}, []),
        ({"mean": np.array([0.5, 0.5, 0.5])}, []),
        ({"mean": np.array([0.5, 0.5, 0.5], dtype=np.float32)}, []),
        ({"mean": (0.5, 0.5, 0.5)}, []),
        ({"mean": np.array([0.5, 0.5, 0.6])}, ["mean"]),
        ({"mode": np.str_("crop")}, []),
        ({"um_per_px": "0.5"}, ["um_per_px"]),
        ({"mean": 0.5}, ["mean"]),
    ],
)
def test_differences_are_named_both_ways(change: dict[str, Any], names: list[str]) -> None:
    contract = {"encoder": "a", "mode": "crop", "um_per_px": 0.5, "mean": [0.5, 0.5, 0.5], "tile": 1152}
    assert contract_difference(contract, {**contract, **change}) == names
    assert contract_difference({**contract, **change}, contract) == names


def test_a_missing_field_differs() -> None:
    assert contract_difference({"a": 1, "b": 2}, {"b": 2}) == ["a"]
    assert contract_difference({}, {"b": None, "a": 0}) == ["a", "b"]
