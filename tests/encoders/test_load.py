"""Loading encoders: weights that fit, and clear words where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from histoniche import encoders
from histoniche.encoders import EncoderAccessError, _load, load_encoder
from histoniche.encoders._lite0 import efficientnet_lite0_weights

TINY = "timm/test_vit"


def _rgb(n: int = 2, size: int = 160) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255


def _tiny_weights(seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own = load_encoder(TINY, pretrained=False).module.state_dict()
    return {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in own.items()}


@pytest.mark.parametrize("name", ["efficientnet-lite0", TINY])
def test_global_generators_are_left_alone(name: str) -> None:
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    load_encoder(name, pretrained=name != TINY)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_efficientnet_lite0_loads_strictly_and_always_the_same() -> None:
    one, two = load_encoder("efficientnet-lite0"), load_encoder("efficientnet-lite0")
    assert one.revision == two.revision
    assert one.revision.startswith("sha256:")
    assert len(one.revision) == len("sha256:") + 16
    assert not one.module.training
    assert not any(p.requires_grad for p in one.module.parameters())
    rgb = _rgb(2, 224)
    with torch.inference_mode():
        pooled = one.pooled(rgb)
        torch.testing.assert_close(pooled, two.pooled(rgb))
    assert pooled.shape == (2, 1280)
    # Every tensor of the file has its place: none is left at its random start.
    random = load_encoder("efficientnet-lite0", pretrained=False).module.state_dict()
    raw = efficientnet_lite0_weights()
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, raw[name]), name
        assert value.numel() == 1 or not torch.equal(value, random[name]), name
    assert {name.split(".")[0] for name in set(raw) - set(random)} == {"classifier"}


def test_normalisation_is_that_of_the_description() -> None:
    encoder = load_encoder("efficientnet-lite0", pretrained=False)
    levels = torch.tensor([0.0, 127.0, 255.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    values = encoder.normalise(levels)[:, :, 0, 0]
    expected = torch.tensor([-127 / 128, 0.0, 1.0]).view(3, 1).expand(3, 3)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def test_uni2_h_has_its_published_size() -> None:
    spec = encoders.get("uni2-h")
    with torch.device("meta"):
        module = _load._create(spec, pretrained=False)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(681.4e6, rel=1e-3)
    assert module.num_features == spec.dim == 1536


@pytest.mark.parametrize(
    "error", [OSError("401 Client Error: gated repo\nmore lines"), RuntimeError(""), ValueError("offline")]
)
def test_no_access_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(EncoderAccessError) as caught:
        load_encoder("uni2-h")
    message = str(caught.value)
    for part in (
        "'uni2-h'",
        "https://huggingface.co/MahmoodLab/UNI2-h",
        "hf auth login",
        "weights=",
        "efficientnet-lite0",
        type(error).__name__,
    ):
        assert part in message
    assert "more lines" not in message
    assert caught.value.__cause__ is error
    with pytest.raises(EncoderAccessError) as ungated:
        load_encoder("h-optimus-0")
    assert "hf auth login" not in str(ungated.value)


def test_gate_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise errors.LocalEntryNotFoundError("cannot find the file on disk and outgoing traffic has been disabled")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(EncoderAccessError, match=r"LocalEntryNotFoundError.*HF_HUB_OFFLINE"):
        load_encoder("virchow2")


def test_random_weights_are_the_same_each_time() -> None:
    torch.random.manual_seed(1)
    one = load_encoder(TINY, pretrained=False)
    torch.rand(5)
    two = load_encoder(TINY, pretrained=False)
    assert one.revision == two.revision == "random-init"
    for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_give_the_same_outputs(tmp_path: Path, suffix: str) -> None:
    weights = _tiny_weights()
    path = tmp_path / f"tiny{suffix}"
    # A classifier may be left over.
    content = {**weights, "head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    if suffix == ".pth":
        torch.save(content, path)
    else:
        save_file(content, path)
    encoder = load_encoder(TINY, weights=path)
    reference = timm.create_model("test_vit", num_classes=0)
    reference.load_state_dict(weights)
    rgb = _rgb()
    with torch.inference_mode():
        expected = reference.eval()(rgb / 255 * 2 - 1)
        torch.testing.assert_close(encoder.pooled(rgb), expected, atol=1e-5, rtol=1e-4)
    assert encoder.spec.dim == expected.shape[1] == 64
    # The revision is that of the tensors, not of the file around them.
    other = tmp_path / "other.safetensors"
    save_file(weights, other)
    assert load_encoder(TINY, weights=str(other)).revision == encoder.revision
    assert encoder.revision.startswith("sha256:")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, other)
    assert load_encoder(TINY, weights=other).revision != encoder.revision


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights = _tiny_weights()
    for wrong in (
        {k: v for k, v in weights.items() if k != "norm.weight"},
        {**weights, "blocks.99.attn.qkv.weight": torch.zeros(3)},
        {**weights, "norm.weight": torch.zeros(65)},
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=r"w\.safetensors' do not fit the architecture"):
            load_encoder(TINY, weights=path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth' does not exist"):
        load_encoder(TINY, weights=tmp_path / "nothing.pth")


class _RunsCode:
    """What a hostile file would hold: an object that touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_objects_in_a_file_are_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"state": _RunsCode(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth' cannot be read.*tensors") as caught:
        load_encoder(TINY, weights=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{name}' cannot be read"):
        load_encoder(TINY, weights=tmp_path / name)


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"a": 1}])
def test_what_is_not_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="state dict"):
        load_encoder(TINY, weights=tmp_path / "w.pth")


# -------------------------------------------------------------------------------------------------------- symmetries
def _moves(n: int) -> list[Any]:
    """The first n symmetries of a square, written out."""
    every = [
        lambda x: x,
        lambda x: x.flip(3),
        lambda x: x.flip(2),
        lambda x: x.flip(2).flip(3),
        lambda x: x.transpose(2, 3),
        lambda x: x.transpose(2, 3).flip(3),
        lambda x: x.transpose(2, 3).flip(2),
        lambda x: x.transpose(2, 3).flip(2).flip(3),
    ]
    return every[:n]


@pytest.mark.parametrize("n", [2, 4, 8])
def test_embeddings_do_not_know_what_is_up(n: int) -> None:
    one, encoder = (load_encoder("efficientnet-lite0", symmetries=symmetries) for symmetries in (1, n))
    rgb = _rgb(2, 96)
    with torch.inference_mode():
        found = encoder.pooled(rgb)
        by_hand = torch.stack([one.pooled(move(rgb)) for move in _moves(n)]).mean(0)
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
        for move in _moves(n):
            torch.testing.assert_close(encoder.pooled(move(rgb)), found, rtol=1e-4, atol=1e-4)
        assert float((one.pooled(rgb.flip(3)) - one.pooled(rgb)).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["efficientnet-lite0", TINY])
@pytest.mark.parametrize("n", [4, 8])
def test_maps_move_with_the_image(name: str, n: int) -> None:
    encoder = load_encoder(name, pretrained=name != TINY, symmetries=n)
    rgb = _rgb(1, 160)
    with torch.inference_mode():
        found = encoder.maps(rgb)
        for move in _moves(n):
            for (moved, stride), (kept, same) in zip(encoder.maps(move(rgb)), found, strict=True):
                assert stride == same
                torch.testing.assert_close(moved, move(kept), rtol=1e-3, atol=1e-3)


def test_maps_of_an_image_that_is_not_square() -> None:
    encoder = load_encoder("efficientnet-lite0", symmetries=8)
    with torch.inference_mode():
        (fine, _), (coarse, _) = encoder.maps(_rgb(1, 160)[:, :, :96])
    assert (fine.shape[2:], coarse.shape[2:]) == ((12, 20), (6, 10))


@pytest.mark.parametrize("symmetries", [0, 3, -1])
def test_numbers_of_symmetries(symmetries: int) -> None:
    with pytest.raises(ValueError, match=f"symmetries={symmetries} must be one of \\[1, 2, 4, 8\\]"):
        load_encoder("efficientnet-lite0", symmetries=symmetries)
