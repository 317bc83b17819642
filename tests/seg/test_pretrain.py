"""Pretraining on images alone: what the result holds, what decides it, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightly")

from histoniche.seg import Field, Segmenter, SegmenterConfig, finetune, pretrain
from histoniche.seg import _pretrain as engine

SMALL: dict[str, Any] = {"channel": "DAPI", "batch_size": 2, "patch_px": 64, "n_steps": 2}
METHODS: list[dict[str, Any]] = [{"method": "mae"}, {"method": "mocov3", "student": "resnet10t"}]


def _encoder(model: Segmenter) -> dict[str, torch.Tensor]:
    module: Any = model.module
    return module.encoder.state_dict()


def _decoder(model: Segmenter) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.module.state_dict().items() if not name.startswith("encoder.")}


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _bowl(seed: int) -> Field:
    """A smooth image, darkest near its middle; turned or mirrored it stays what it is."""
    middle = np.random.default_rng(seed).uniform(28, 36, 2)
    y, x = np.mgrid[:64, :64]
    return Field(f"bowl{seed}", np.hypot(y - middle[0], x - middle[1])[None].astype(np.float32), ("DAPI",))


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_is_trained_and_the_decoder_is_fresh(fields: list[Field], method: dict[str, Any]) -> None:
    given = Segmenter(SegmenterConfig(method.get("student", "vit-tiny"), ["DAPI"], 0.5), seed=5)
    given.config.training = {"note": "kept"}
    before = given.digest
    model = pretrain(fields, **{**SMALL, **method, "student": given}, seed=3)
    assert given.digest == before
    moved = {name for name, tensor in _encoder(given).items() if not torch.equal(tensor, _encoder(model)[name])}
    assert {"model.pos_embed", "model.blocks.0.attn.qkv.weight", "model.patch_embed.proj.weight"} <= moved or (
        method["method"] == "mocov3" and "model.conv1.0.weight" in moved
    )
    drawn = Segmenter(SegmenterConfig(given.config.encoder, ["DAPI"], 0.5), seed=3)
    assert _equal(_decoder(model), _decoder(drawn))
    assert not _equal(_decoder(model), _decoder(given))
    assert all(p.requires_grad for name, p in model.module.named_parameters() if not name.startswith("decoder.norms."))
    assert not model.module.training
    assert model.config.training["note"] == "kept"
    assert model.config.training["pretraining"] == method["method"]
    assert model.config.training["pretraining steps"] == 2
    assert ("pretraining mask ratio" in model.config.training) == (method["method"] == "mae")
    assert "labelled fields" not in model.config.training
    assert set(model.history) == {"loss"} | ({"accuracy"} if method["method"] == "mocov3" else set())
    assert len(model.history["loss"]) == 2
    assert model.predict(fields[0]).shape == (96, 96)  # another size than that of the patches


def test_it_goes_on_from_the_given_encoder_and_finetuning_from_the_result(fields: list[Field]) -> None:
    given = Segmenter(SegmenterConfig("vit-tiny", ["DAPI"], 0.5), seed=5)
    model = pretrain(fields[:2], **{**SMALL, "student": given, "lr": 1e-12})
    for name, tensor in _encoder(given).items():
        torch.testing.assert_close(_encoder(model)[name], tensor, rtol=0, atol=1e-9)
    model = pretrain(fields[:2], **SMALL)
    tuned = finetune(fields[:1], channel="DAPI", student=model, n_steps=1, batch_size=2, patch_px=64, lr=1e-12)
    for name, tensor in _encoder(model).items():
        torch.testing.assert_close(_encoder(tuned)[name], tensor, rtol=0, atol=1e-9)
    assert tuned.config.training["pretraining"] == "mae"


def test_mae_predicts_smooth_images_better_than_their_mean() -> None:
    model = pretrain([_bowl(seed) for seed in range(4)], batch_size=4, patch_px=64, n_steps=25, lr=1e-3)
    assert model.history["loss"][0] > 1
    assert np.mean(model.history["loss"][-5:]) < 0.8


def test_mae_of_a_fresh_student_starts_from_regular_positions(fields: list[Field]) -> None:
    model = pretrain(fields[:2], **{**SMALL, "lr": 1e-12})
    positions = _encoder(model)["model.pos_embed"][0, 1:].reshape(14, 14, 192)
    # Half of the numbers are sines and cosines of the row, the other half of the column: each is constant along one axis.
    along = torch.minimum(positions.std(dim=0).amax(dim=0), positions.std(dim=1).amax(dim=0))
    assert float(along.max()) < 1e-5
    assert float(positions.abs().max()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_encoder_and_no_global_state(fields: list[Field], method: dict[str, Any]) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    one, two, other = (pretrain(fields[:3], **SMALL, **method, seed=seed) for seed in (3, 3, 4))
    assert one.digest == two.digest != other.digest
    assert one.history == two.history
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_bit_for_bit(
    fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    arguments = {**SMALL, **method, "n_steps": 4}
    whole = pretrain(fields[:3], **arguments)
    path, original, calls = tmp_path / "state.pt", engine.random_window, []

    def failing(*given: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) > 2 * 3:
            msg = "killed"
            raise RuntimeError(msg)
        return original(*given)

    arguments |= {"checkpoint": path, "checkpoint_every": 2}
    monkeypatch.setattr(engine, "random_window", failing)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(fields[:3], **arguments)
    monkeypatch.setattr(engine, "random_window", original)
    assert path.exists()
    with pytest.raises(ValueError, match="belongs to another training"):
        pretrain(fields[1:4], **arguments)
    with pytest.raises(ValueError, match="belongs to another training"):
        pretrain(fields[:3], **{**arguments, "lr": 1e-5})
    resumed = pretrain(fields[:3], **arguments)
    assert resumed.digest == whole.digest
    assert resumed.history == whole.history
    assert path.exists()  # until the student is safe


def test_labels_are_not_read_and_several_channels_are_seen(fields: list[Field]) -> None:
    arguments: dict[str, Any] = {**SMALL, "channel": ["membrane", "DAPI"], "n_steps": 1}
    bare = pretrain([item.without_labels() for item in fields[:2]], **arguments)
    assert bare.digest == pretrain(fields[:2], **arguments).digest
    assert bare.config.channels == ["membrane", "DAPI"]
    assert _encoder(bare)["model.patch_embed.proj.weight"].shape == (192, 2, 16, 16)


def test_views_are_parts_of_the_window() -> None:
    y, x = np.mgrid[:64, :64].astype(np.float32) / 100
    window = np.stack([y, x, np.full_like(y, 0.3)])
    spans = []
    for seed in range(40):
        view = engine._view(window, np.random.default_rng(seed), relights=False)
        assert view.shape == window.shape
        assert view.dtype == np.float32
        np.testing.assert_allclose(view[2], 0.3, rtol=1e-5)
        assert -1e-6 <= view.min() <= view.max() <= 0.63 + 1e-6
        height, width = (np.ptp(part) / 0.63 for part in view[:2])
        spans.append(height * width)
        steps = [np.abs(np.diff(view[0], axis=axis)).mean() for axis in (0, 1)]
        assert min(steps) < 1e-6 < max(steps)  # upright or on its side, never in between
    assert 0.3 < min(spans) < 0.55  # 0.4 of the area, less the rim
    assert 0.85 < max(spans) <= 1
    lit = engine._view(window, np.random.default_rng(0), relights=True)
    assert abs(lit[2].mean() - 0.3) > 0.01
    assert 0 <= lit.min() <= lit.max() <= 1


def test_no_field_is_twice_in_a_batch_where_there_are_enough() -> None:
    pick = engine._picker(7, 4, 0)
    batches = [pick(step) for step in range(20)]
    assert all(len(set(batch)) == 4 for batch in batches)
    assert set(np.concatenate(batches)) == set(range(7))
    few = engine._picker(3, 4, 0)
    assert np.bincount(np.concatenate([few(step) for step in range(8)]), minlength=3).min() >= 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "dino"}, ValueError, r"method='dino' is unknown: choose one of \['mae', 'mocov3'\]"),
        ({"student": "resnet10t"}, ValueError, "plain vision Transformer, which student='resnet10t' is not"),
        (
            {"student": "deit_tiny_distilled_patch16_224"},
            ValueError,
            "plain vision Transformer, which student='deit_tiny",
        ),
        (
            {"student": "vit_small_patch14_dinov2"},
            ValueError,
            "multiple of the patches of 'vit_small_patch14_dinov2', 14",
        ),
        ({"student": "nothing"}, ValueError, "student encoder='nothing' is unknown"),
        ({"patch_px": 72}, ValueError, "patch_px=72 must be a multiple of 32"),
        ({"patch_px": 128}, ValueError, "is 96 x 96 px, smaller than a patch: patch_px=128"),
        ({"mask_ratio": 1.0}, ValueError, "mask_ratio=1.0 must lie between 0 and 1"),
        ({"mask_ratio": 0.0}, ValueError, "mask_ratio=0.0 must lie between 0 and 1"),
        ({"mask_ratio": 0.99}, ValueError, "mask_ratio=0.99 hides 16 of the 16 patches"),
        ({"batch_size": 1}, ValueError, "batch_size=1 at least 2"),
        ({"n_steps": 0}, ValueError, "n_steps=0 at least 1"),
        ({"method": "mocov3", "temperature": 0.0}, ValueError, "temperature=0.0 must be positive"),
        ({"method": "mocov3", "momentum": 1.5}, ValueError, "momentum=1.5 between 0 and 1"),
        ({"channel": "GFP"}, KeyError, "has no channel 'GFP'"),
        ({"channel": None}, ValueError, "name the student's with channel="),
    ],
)
def test_bad_settings(fields: list[Field], change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pretrain(fields[:2], **{**SMALL, **change})


def test_no_fields_and_fields_that_hold_nothing(fields: list[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pretrain was given no fields"):
        pretrain([])
    flat = replace(fields[1], name="flat", image=np.zeros((2, 96, 96), np.uint8))

    def never(*_: Any, **__: Any) -> Any:
        pytest.fail("training began")

    monkeypatch.setattr(engine, "train", never)
    with pytest.raises(ValueError, match="Field 'flat': channel 'DAPI' is constant"):
        pretrain([*fields[:2], flat], **SMALL)


def test_a_missing_package_is_named(fields: list[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(ImportError, match=r'self-supervised pretraining needs .* pip install "histoniche\[seg\]"'):
        pretrain(fields[:2], **SMALL)
