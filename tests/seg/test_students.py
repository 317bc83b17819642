"""Students as they are built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from histoniche.encoders._lite0 import efficientnet_lite0_weights
from histoniche.seg import StudentAccessError, list_students
from histoniche.seg._students import STUDENTS, build_student, count_parameters

WHOLE = {
    "swin-tiny": (29.0, 29.6),
    "resnet18": (12.3, 12.7),
    "efficientnet-b0": (4.3, 4.6),
    "mobilenetv3-small": (1.9, 2.1),
    "vit-tiny": (6.0, 6.3),
    "efficientnet-lite0": (3.7, 3.9),
}


@pytest.mark.parametrize("name", list(STUDENTS))
def test_the_papers_students_see_one_channel(name: str) -> None:
    student = build_student(name, pretrained=False).eval()
    low, high = WHOLE[name]
    assert low < count_parameters(student) / 1e6 < high
    with torch.inference_mode():
        logits = student(torch.rand(1, 1, 64, 64))
        assert student(torch.rand(1, 1, 96, 160)).shape == (1, 2, 96, 160)
    assert logits.shape == (1, 2, 64, 64)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_list_of_students_beside_the_paper() -> None:
    table = list_students()
    assert list(table.index) == list(STUDENTS)
    assert table["paper"].tolist() == [27.0, 11.0, 5.3, 1.5, 5.7, 4.7]
    for name, row in table.iterrows():
        low, high = WHOLE[str(name)]
        assert low < row["whole"] < high
        assert 0.5 * row["paper"] < row["encoder"] < row["whole"]
        assert row["timm_model"] == STUDENTS[str(name)][0]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "timm/mobilenetv3_small_050"])
def test_any_encoder_of_timm(name: str) -> None:
    student = build_student(name, pretrained=False, n_channels=3, decoder_channels=(8, 8, 8, 8, 8)).eval()
    with torch.inference_mode():
        assert student(torch.rand(2, 3, 32, 64)).shape == (2, 2, 32, 64)


def test_seed_decides_the_weights() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        torch.cat(
            [p.flatten() for p in build_student("mobilenetv3_small_050", pretrained=False, seed=seed).parameters()]
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_of_a_local_file(tmp_path: Path) -> None:
    source = timm.create_model("mobilenetv3_small_050", pretrained=False)
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(state, tmp_path / "encoder.safetensors")
    student = build_student("mobilenetv3_small_050", weights=tmp_path / "encoder.safetensors")
    found: dict[str, Any] = student.encoder.state_dict()
    shared = 0
    for name, tensor in found.items():
        key = name.removeprefix("model.")
        if key == "conv_stem.weight":  # one channel: the sum over the colours
            np.testing.assert_allclose(tensor, state[key].sum(1, keepdim=True), atol=1e-6)
        else:
            assert torch.equal(tensor, state[key]), name
        shared += 1
    assert shared > 100


@pytest.mark.parametrize("n_channels", [1, 3])
def test_weights_of_a_local_file_for_a_transformer(tmp_path: Path, n_channels: int) -> None:
    source = timm.create_model("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True)
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(state, tmp_path / "encoder.safetensors")
    student = build_student("vit-tiny", n_channels=n_channels, weights=tmp_path / "encoder.safetensors")
    found = {name.removeprefix("model."): tensor for name, tensor in student.encoder.state_dict().items()}
    assert torch.equal(found["cls_token"], state["cls_token"])
    assert torch.equal(found["blocks.11.mlp.fc2.weight"], state["blocks.11.mlp.fc2.weight"])
    kernel = state["patch_embed.proj.weight"]
    torch.testing.assert_close(
        found["patch_embed.proj.weight"], kernel.sum(1, keepdim=True) if n_channels == 1 else kernel
    )


def test_imagenet_weights_without_a_download(caplog: pytest.LogCaptureFixture) -> None:
    student = build_student("efficientnet-lite0")
    weights = efficientnet_lite0_weights()
    for name, tensor in student.encoder.state_dict().items():
        expected = weights[name.removeprefix("model.")]
        if name == "model.conv_stem.weight":  # one channel: the sum over the colours
            expected = expected.sum(1, keepdim=True)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    # timm warns of weights that it does not need
    assert not [record for record in caplog.records if record.name.startswith("timm")]


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(StudentAccessError, match="is no file"):
        build_student("resnet18", weights=tmp_path / "none.safetensors")


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StudentAccessError, match=r"of the encoder 'resnet18': they belong to another network"):
        build_student("resnet18", weights=tmp_path / "other.safetensors")


def test_unreachable_weights_are_never_silently_random(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        msg = "no network"
        raise OSError(msg)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(StudentAccessError, match=r"'resnet18' cannot be had \(OSError\).*pretrained=False"):
        build_student("resnet18")


def test_unknown_encoder() -> None:
    with pytest.raises(ValueError, match=r"encoder='resnet17' is unknown: choose one of \['efficientnet-b0'"):
        build_student("resnet17", pretrained=False)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ImportError, match=r"a student needs .* pip install \"histoniche\[seg\]\""):
        build_student("resnet18", pretrained=False)


def test_a_vit_reads_features_whatever_their_scale_and_offset() -> None:
    module = build_student("vit-tiny", pretrained=False, seed=3).train()
    with torch.inference_mode():
        features, tokens = module.encoder(torch.rand(3, 1, 64, 64))
        plain = module.decoder(features, tokens)
        far = [50 * maps + 30 * torch.arange(maps.shape[1])[:, None, None] for maps in features]
        torch.testing.assert_close(module.decoder(far, tokens), plain, atol=2e-2, rtol=0)
    module.eval()  # where what was seen in training decides
    assert not torch.allclose(module.decoder(far, tokens), module.decoder(features, tokens), atol=1e-2)
    assert [norm.num_features for norm in module.decoder.norms] == [192] * 4
