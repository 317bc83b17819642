"""Teachers adapted by LoRA."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.seg import Field, finetune_lora
from histoniche.seg.teachers import LiteMedSAM, PromptedTeacher, Prompts, SemanticTeacher, tune
from histoniche.seg.teachers._lora import _adapted, target_layers
from histoniche.seg.teachers._sam import digest


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x.transpose(1, 2)).transpose(1, 2)).chunk(3, -1)
        return x + self.proj(torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Conv2d(3, 8, 4, stride=4), _Attention()

    def forward(self, rgb: Tensor) -> Tensor:
        maps = self.embed(rgb)
        return self.attn(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)


class Tiny(PromptedTeacher):
    """A teacher of the SAM family with one layer of attention."""

    lora_targets = r"attn\.qkv"

    def __init__(self) -> None:
        with isolated_rng(0):
            module = _Net()
        super().__init__(module, ("DAPI",), prompts=Prompts(), name="tiny", licence="CC0", input_px=32, gamma=1.0)

    def encode(self, rgb: Tensor) -> Tensor:
        return self.module(rgb)

    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        raise AssertionError


SHORT: dict[str, Any] = {"n_steps": 6, "batch_size": 2, "patch_px": 32, "lr": 5e-3}


def blobs(seed: int) -> Field:
    rng = np.random.default_rng(seed)
    labels = np.zeros((48, 48), dtype=np.int32)
    for k in range(1, 5):
        y, x = rng.integers(0, 36, 2)
        labels[y : y + 12, x : x + 12] = k
    return Field(f"blobs{seed}", ((labels > 0) * 90 + rng.integers(0, 60, labels.shape))[None], ("DAPI",), labels)


def test_adapters_start_as_nothing_and_are_what_is_trained() -> None:
    base = Tiny()
    adapted, model = _adapted(base, 3, 3.0, None, 0)
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(adapted.encode(image), base.encode(image))
    trained = {name: p.shape for name, p in adapted.module.named_parameters() if p.requires_grad}
    assert sorted(trained) == ["attn.qkv.lora_A.default.weight", "attn.qkv.lora_B.default.weight"]
    assert trained["attn.qkv.lora_A.default.weight"] == (3, 8)
    assert trained["attn.qkv.lora_B.default.weight"] == (24, 3)
    assert model.peft_config["default"].lora_alpha == 3.0


def test_the_update_is_that_of_the_paper() -> None:
    adapted, _ = _adapted(Tiny(), 2, 6.0, None, 0)
    layer = adapted.module.attn.qkv
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
        x = torch.randn(5, 8)
        update = layer.lora_B.default.weight @ layer.lora_A.default.weight
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 6.0 / 2 * x @ update.T, atol=1e-5, rtol=1e-5)


def test_adaptation_learns_and_leaves_the_teacher_and_its_norms_alone() -> None:
    base = Tiny()
    before, state = digest(base.module), torch.get_rng_state()
    teacher = finetune_lora(
        [blobs(s) for s in range(4)], teacher=base, rank=4, n_steps=60, batch_size=4, patch_px=32, lr=5e-3
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(base.module) == before
    assert np.mean(teacher.history["loss"][-5:]) < 0.75 * np.mean(teacher.history["loss"][:5])
    assert teacher.name == "tiny-lora"
    assert teacher.base.module.attn.qkv.lora_B["default"].weight.abs().max() > 0
    torch.testing.assert_close(teacher.base.module.attn.norm.running_mean, base.module.attn.norm.running_mean)
    assert not any(p.requires_grad for p in [*teacher.base.module.parameters(), *teacher.decoder.parameters()])


def test_a_tuned_teachers_decoder_is_trained_on() -> None:
    tuned = tune([blobs(0)], teacher=Tiny(), n_steps=5, patch_px=32)
    before = digest(tuned.decoder)
    teacher = finetune_lora([blobs(0)], teacher=tuned, **{**SHORT, "lr": 1e-9})
    assert digest(tuned.decoder) == before
    kernel = "embedding.1.weight"
    torch.testing.assert_close(
        teacher.decoder.state_dict()[kernel], tuned.decoder.state_dict()[kernel], atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="'tiny-lora' has adapters already"):
        finetune_lora([blobs(0)], teacher=teacher, **SHORT)


def test_same_seed_same_teacher() -> None:
    one, two, other = (finetune_lora([blobs(0)], teacher=Tiny(), seed=seed, **SHORT) for seed in (1, 1, 2))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_interrupted_adaptation_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from histoniche.seg.teachers import _lora

    whole = finetune_lora([blobs(0)], teacher=Tiny(), **SHORT)
    path, loss, calls = tmp_path / "state.pt", _lora._loss, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            msg = "killed"
            raise RuntimeError(msg)
        return loss(*args)

    monkeypatch.setattr(_lora, "_loss", failing)
    with pytest.raises(RuntimeError, match="killed"):
        finetune_lora([blobs(0)], teacher=Tiny(), checkpoint=path, checkpoint_every=2, **SHORT)
    monkeypatch.setattr(_lora, "_loss", loss)
    with pytest.raises(ValueError, match="belongs to another training"):
        finetune_lora([blobs(1)], teacher=Tiny(), checkpoint=path, checkpoint_every=2, **SHORT)
    resumed = finetune_lora([blobs(0)], teacher=Tiny(), checkpoint=path, checkpoint_every=2, **SHORT)
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.history == whole.history
    assert path.exists()  # until the teacher is safe


def test_saved_as_peft_does_and_loaded_over_the_same_teacher(tmp_path: Path) -> None:
    teacher = finetune_lora([blobs(0)], teacher=Tiny(), **SHORT)
    teacher.save(tmp_path / "task")
    files = {path.name for path in (tmp_path / "task" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    weights = load_file(tmp_path / "task" / "adapter" / "adapter_model.safetensors")
    assert sorted(weights) == ["base_model.model.attn.qkv.lora_A.weight", "base_model.model.attn.qkv.lora_B.weight"]
    base = Tiny()
    state = torch.get_rng_state()
    again = SemanticTeacher.load(tmp_path / "task", teacher=base)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint == teacher.fingerprint
    np.testing.assert_array_equal(again(blobs(3)).maps, teacher(blobs(3)).maps)
    assert digest(base.module) == digest(Tiny().module)
    again.save(tmp_path / "copy")  # it still knows what it was trained over
    assert SemanticTeacher.load(tmp_path / "copy", teacher=base).fingerprint == teacher.fingerprint


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    finetune_lora([blobs(0)], teacher=Tiny(), **SHORT).save(tmp_path / "task")
    weights = tmp_path / "task" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:40])
    with pytest.raises(ValueError, match="is damaged, or belongs to another network"):
        SemanticTeacher.load(tmp_path / "task", teacher=Tiny())
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        SemanticTeacher.load(tmp_path / "task", teacher=Tiny())


def test_litemedsam_with_its_own_decoder() -> None:
    base = LiteMedSAM(["DAPI"])
    teacher = finetune_lora(
        [blobs(3)], teacher=base, decoder="mask", n_steps=1, batch_size=1, patch_px=32,
        targets=r"image_encoder\.layers\.3\..*\.attn\.qkv",
    )  # fmt: skip
    adapted = [name for name, _ in teacher.base.module.named_modules() if name.endswith("lora_A")]
    assert adapted == [f"image_encoder.layers.3.blocks.{k}.attn.qkv.lora_A" for k in range(2)]
    output = teacher(blobs(4), features=True)
    assert output.maps.shape == (2, 48, 48)
    assert output.features["block3"].shape == (320, 64, 64)


def test_only_linear_layers_of_the_encoder_are_adapted() -> None:
    teacher = LiteMedSAM(["DAPI"])
    found = target_layers(teacher, r"image_encoder\.layers\.3\..*")
    linear = {name for name, layer in teacher.module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert found
    assert set(found) <= linear
    everything = [name for name, _ in teacher.module.named_modules() if name.startswith("image_encoder.layers.3.")]
    assert len(found) < len(everything)
    with pytest.raises(
        ValueError, match=r"layers outside the image encoder \(image_encoder\) of 'litemedsam', such as 'mask_decoder"
    ):
        target_layers(teacher, r"mask_decoder\..*q_proj")


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    item = blobs(0)
    with pytest.raises(
        ValueError, match=r"targets='attn\.q' match no linear layer of 'tiny'; it has 2, such as \['attn\.qkv'"
    ):
        finetune_lora([item], teacher=Tiny(), targets=r"attn.q", **SHORT)
    with pytest.raises(ValueError, match=r"targets='\(' is no regular expression: missing \)"):
        finetune_lora([item], teacher=Tiny(), targets="(", **SHORT)
    with pytest.raises(ValueError, match="given 0 fields"):
        finetune_lora([], teacher=Tiny(), **SHORT)
    with pytest.raises(ValueError, match="rank=0"):
        finetune_lora([item], teacher=Tiny(), rank=0, **SHORT)
    for name, value in (("alpha", 0.0), ("lr", 0.0), ("checkpoint_every", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            finetune_lora([item], teacher=Tiny(), **{**SHORT, name: value})
    with pytest.raises(ValueError, match="has no labels"):
        finetune_lora([replace(item, labels=None)], teacher=Tiny(), **SHORT)
    with pytest.raises(ValueError, match=r"one class only \(all foreground\)"):
        finetune_lora([replace(item, labels=np.ones((48, 48), dtype=np.int32))], teacher=Tiny(), **SHORT)
    with pytest.raises(ValueError, match="decoder='other' is not among"):
        finetune_lora([item], teacher=Tiny(), decoder="other", **SHORT)
    with pytest.raises(ValueError, match='no decoder that works without a prompt: choose decoder="dense"'):
        finetune_lora([item], teacher=Tiny(), decoder="mask", **SHORT)
    with pytest.raises(KeyError, match="no channel 'DAPI'"):
        finetune_lora([replace(item, channels=("H",))], teacher=Tiny(), **SHORT)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs the package peft: pip install \"histoniche\[seg\]\""):
        finetune_lora([item], teacher=Tiny(), **SHORT)
