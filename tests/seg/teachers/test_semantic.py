"""A teacher tuned on labels, so that it needs no prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.seg import Field
from histoniche.seg._augment import turned_patch
from histoniche.seg._targets import maps_of_labels
from histoniche.seg.teachers import LiteMedSAM, PromptedTeacher, Prompts, SemanticTeacher, _semantic, tune
from histoniche.seg.teachers._sam import digest
from histoniche.seg.teachers._semantic import DenseDecoder


class Tiny(PromptedTeacher):
    """A teacher of the SAM family with one layer."""

    def __init__(self, channels: tuple[str | None, ...] = ("DAPI", "membrane")) -> None:
        with isolated_rng(0):
            module = nn.Conv2d(3, 6, 4, stride=4)
        super().__init__(
            module, channels, prompts=Prompts(), name="tiny", licence="CC0", input_px=64, gamma=1.0
        )  # fmt: skip

    def normalise(self, rgb: Tensor) -> Tensor:
        return rgb * 2

    def encode(self, rgb: Tensor) -> Tensor:
        return self.module(rgb)

    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        raise AssertionError


def blobs(seed: int, shape: tuple[int, int] = (64, 64)) -> Field:
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int32)
    for k in range(1, 6):
        y, x = rng.integers(0, shape[0] - 12), rng.integers(0, shape[1] - 12)
        labels[y : y + 12, x : x + 12] = k
    image = np.stack([(labels > 0) * 90 + rng.integers(0, 20, shape), rng.integers(0, 100, shape)]).astype(np.uint8)
    return Field(f"blobs{seed}", image, ("DAPI", "membrane"), labels, 0.5)


@pytest.mark.parametrize(("n_fields", "n_views", "asked"), [(1, None, 96), (5, None, 100), (50, None, 100), (5, 3, 15)])
def test_few_fields_are_shown_in_many_views(
    monkeypatch: pytest.MonkeyPatch, n_fields: int, n_views: int | None, asked: int
) -> None:
    teacher, calls = Tiny(), []
    embed = teacher.embed
    monkeypatch.setattr(teacher, "embed", lambda pixels: calls.append(None) or embed(pixels))
    tune([blobs(s) for s in range(n_fields)], teacher=teacher, n_steps=1, n_views=n_views, patch_px=32)
    assert len(calls) == asked


def test_tuning_learns_the_foreground_and_leaves_the_teacher_alone() -> None:
    base = Tiny()
    before = digest(base.module)
    state = torch.get_rng_state()
    teacher = tune([blobs(s) for s in range(4)], teacher=base, n_steps=80, patch_px=64, lr=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(base.module) == before
    assert not any(p.requires_grad for p in teacher.decoder.parameters())
    item = blobs(9)
    found, truth = teacher(item).maps[0] > 0.5, item.read_labels() > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85
    again = tune([blobs(s) for s in range(4)], teacher=base, n_steps=80, patch_px=64, lr=1e-2)
    assert again.fingerprint == teacher.fingerprint
    other = tune([blobs(s) for s in range(4)], teacher=base, n_steps=1, patch_px=64)
    assert other.fingerprint != teacher.fingerprint


def test_fields_of_another_shape_are_scaled_and_their_padding_cut_off() -> None:
    base = Tiny()
    decoder = DenseDecoder(6).eval()
    teacher = SemanticTeacher(base, decoder)
    item = blobs(1, (32, 48))
    output = teacher(item, features=True)
    assert output.maps.shape == (2, 32, 48)
    assert output.features["embedding"].shape == (6, 11, 16)  # without the padding
    pixels = item.read(["DAPI", "membrane"])
    rgb = torch.from_numpy(np.concatenate([pixels, pixels.mean(0, keepdims=True)]))[None]
    rgb = F.pad(F.interpolate(rgb, size=(43, 64), mode="bilinear") * 2, (0, 0, 0, 21))
    with torch.no_grad():
        # The decoder sees no padding. Its map has twice the size of the embedding, whose 11 rows hold the 43 of the image.
        logits: Tensor = decoder(base.module(rgb)[..., :11, :], rgb[..., :43, :])
    assert logits.shape[2:] == (22, 32)
    wanted = F.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False).sigmoid()[0].numpy()
    np.testing.assert_allclose(output.maps, wanted, atol=1e-5)


def test_the_decoder_sees_what_the_embedding_has_lost() -> None:
    base = Tiny()
    with torch.no_grad():
        base.module.weight.zero_()  # every place has the same embedding
    teacher = tune([blobs(s) for s in range(4)], teacher=base, n_steps=80, patch_px=64, lr=1e-2)
    item = blobs(9)
    found, truth = teacher(item).maps[0] > 0.5, item.read_labels() > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85


def test_every_other_view_keeps_its_light() -> None:
    base, item = Tiny(("DAPI", "membrane")), blobs(0)
    stack = np.concatenate([item.read(base.named), maps_of_labels(item.read_labels())])
    _, images, maps = _semantic._views([item], base, n_views=4, patch_px=32, seed=5)
    for view in range(4):
        plain = turned_patch(stack, 32, np.random.default_rng([5, 4, 0, view])).clamp(0, 1).numpy()
        same = np.allclose(maps[view], plain[2:])
        embedding, _ = base.embed(plain[:2])
        shown = _semantic.beside(base.prepare(plain[:2])[0], embedding)[0].half().numpy()
        assert same
        assert np.allclose(images[view], shown, atol=1e-3) == bool(view % 2)


def test_a_view_is_turned_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((2, 16, 16), dtype=np.float32)
    seen = set()
    for seed in range(40):
        moved, finer = _semantic._turned((maps, maps.repeat(2, 1).repeat(2, 2)), np.random.default_rng(seed))
        np.testing.assert_array_equal(finer[:, ::2, ::2], moved)
        seen.add(moved.tobytes())
    assert len(seen) == 8


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_decoder_says_the_same_in_training_and_in_use(batch_size: int) -> None:
    """But for the two normalisations of its input, whose statistics settle within a few steps."""
    with isolated_rng(0):
        decoder = DenseDecoder(6)
        inputs = torch.rand(batch_size, 6, 8, 8), torch.rand(batch_size, 3, 32, 32)
    layers = [type(layer) for layer in decoder.modules() if isinstance(layer, nn.GroupNorm | nn.BatchNorm2d)]
    assert layers.count(nn.BatchNorm2d) == 2
    for layer in decoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    with torch.no_grad():
        training = decoder(*inputs)
        torch.testing.assert_close(decoder.eval()(*inputs), training)


def test_litemedsam_gets_a_decoder() -> None:
    item = blobs(3)
    teacher = tune([item], teacher=LiteMedSAM(["DAPI"]), n_steps=2, batch_size=2, n_views=1, patch_px=64)
    assert teacher.name == "litemedsam-tuned"
    assert teacher.licence == "Apache-2.0"
    assert teacher(item).maps.shape == (2, 64, 64)


def test_saved_and_loaded_is_the_same_teacher(tmp_path: Path) -> None:
    teacher = tune([blobs(0)], teacher=Tiny(), n_steps=3, patch_px=64)
    teacher.save(tmp_path / "tuned")
    again = SemanticTeacher.load(tmp_path / "tuned", teacher=Tiny())
    assert again.fingerprint == teacher.fingerprint
    np.testing.assert_array_equal(again(blobs(5)).maps, teacher(blobs(5)).maps)
    assert "CC0" in (tmp_path / "tuned" / "README.md").read_text()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        teacher.save(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"trained over 'tiny' with channels \['DAPI', 'membrane'\]"):
        SemanticTeacher.load(tmp_path / "tuned", teacher=Tiny(("DAPI",)))
    other = Tiny()
    with torch.no_grad():
        other.module.bias.add_(1)
    with pytest.raises(ValueError, match="with base_sha256"):
        SemanticTeacher.load(tmp_path / "tuned", teacher=other)


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    tune([blobs(0)], teacher=Tiny(), n_steps=1, patch_px=64).save(tmp_path / "tuned")
    tune([blobs(1)], teacher=Tiny(), n_steps=1, patch_px=64).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(ValueError, match="do not belong together"):
        SemanticTeacher.load(tmp_path / "tuned", teacher=Tiny())
    with pytest.raises(FileNotFoundError, match="is no model directory"):
        SemanticTeacher.load(tmp_path / "none", teacher=Tiny())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="given 0 fields"):
        tune([], teacher=Tiny())
    with pytest.raises(ValueError, match="n_views=0"):
        tune([blobs(0)], teacher=Tiny(), n_views=0)
    with pytest.raises(ValueError, match="has no labels"):
        tune([replace(blobs(0), labels=None)], teacher=Tiny(), n_steps=1)
    with pytest.raises(ValueError, match=r"one class only \(no foreground\)"):
        tune([replace(blobs(0), labels=np.zeros_like(blobs(0).labels))], teacher=Tiny(), n_steps=1)
    with pytest.raises(KeyError, match="no channel 'CD45'"):
        tune([blobs(0)], teacher=Tiny(("CD45",)), n_steps=1)
