"""The registry of encoders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from histoniche import encoders
from histoniche.encoders import _registry
from histoniche.encoders._registry import HALF, IMAGENET_MEAN

KNOWN = {"uni2-h", "virchow2", "h-optimus-0", "efficientnet-lite0"}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_REGISTRY", dict(_registry._REGISTRY))


@pytest.mark.parametrize("name", ["uni2", "UNI2-h", "", "vit_tiny_patch16_224"])
def test_unknown_name_lists_those_there_are(name: str) -> None:
    with pytest.raises(KeyError) as caught:
        encoders.get(name)
    for known in [repr(name), *KNOWN, "timm/<model name>"]:
        assert known in str(caught.value)


def test_timm_models_are_known_by_their_prefix() -> None:
    spec = encoders.get("timm/vit_tiny_patch16_224")
    assert (spec.name, spec.source, spec.architecture) == (
        "timm/vit_tiny_patch16_224",
        "timm",
        "vit_tiny_patch16_224",
    )
    assert (spec.input_px, spec.mean, spec.std) == (224, HALF, HALF)
    resnet = encoders.get("timm/resnet18")
    assert resnet.mean == IMAGENET_MEAN
    assert encoders.get("timm/test_vit").input_px == 160
    assert "timm/resnet18" not in encoders.list_encoders().index


def test_unknown_timm_model_names_similar_ones() -> None:
    with pytest.raises(KeyError, match=r"timm has no model 'resnet180'.*similar.*resnet18"):
        encoders.get("timm/resnet180")
    with pytest.raises(KeyError, match=r"timm/resnet18.no_such_tag"):
        encoders.get("timm/resnet18.no_such_tag")


def test_duplicates_are_refused_and_change_nothing() -> None:
    before = encoders.get("uni2-h")
    with pytest.raises(ValueError, match="'uni2-h' is registered already"):
        encoders.register(replace(before, dim=7))
    assert encoders.get("uni2-h") is before
    own = encoders.register(replace(before, name="mine", dim=7, input_px=100, um_per_px=0.25))
    assert encoders.get("mine") is own
    assert encoders.list_encoders().loc["mine", "field_of_view"] == 25.0


def test_list_encoders() -> None:
    table = encoders.list_encoders()
    assert list(table.columns) == ["dim", "um_per_px", "field_of_view", "licence", "gated", "source"]
    assert set(table.index) >= KNOWN
    assert table.index.is_unique
    assert table.loc["uni2-h", "dim"] == 1536
    assert table.loc["uni2-h", "gated"]
    assert table.loc["uni2-h", "source"] == "https://huggingface.co/MahmoodLab/UNI2-h"
    assert table.loc["efficientnet-lite0", "dim"] == 1280
    assert not table.loc["efficientnet-lite0", "gated"]
    assert table.loc["efficientnet-lite0", "licence"] == "Apache-2.0"
    # The field of view of the published method: 224 px at 0.5 um/px.
    assert (table.loc[sorted(KNOWN), "field_of_view"] == 112.0).all()
