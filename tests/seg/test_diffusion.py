"""The diffusion model: training, sampling, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from histoniche.models import _training
from histoniche.seg import _access
from histoniche.seg._copies import turned
from histoniche.seg._diffusion import Diffusion, training_batch

SMALL = {"width": (8, 16), "seed": 0}


def _stripes(n_channels: int = 1) -> list[np.ndarray]:
    """Two images of stripes, 8 px wide."""
    stripes = np.where(np.arange(32) // 8 % 2, 230, 20).astype(np.uint8)
    return [np.tile(stripes, (n_channels, 32, 1)), np.tile(stripes[:, None], (n_channels, 1, 32))]


def _fit(model: Diffusion, n_steps: int = 6, **settings: object) -> Diffusion:
    model.fit(_stripes(model.n_channels), **{"n_steps": n_steps, "batch_size": 4, "lr": 2e-3, "seed": 0, **settings})  # type: ignore[arg-type]
    return model


def _samples(model: Diffusion, numbers: list[int], **settings: int) -> dict[int, np.ndarray]:
    return dict(model.sample(numbers, **{"ddim_steps": 4, "seed": 0, **settings}))


@pytest.fixture(scope="module")
def model() -> Diffusion:
    return _fit(Diffusion(1, 16, **SMALL), 40)  # type: ignore[arg-type]


def test_batches_are_windows_of_the_images_turned_but_not_relit() -> None:
    pixels = [np.random.default_rng(seed).integers(0, 256, (2, 20, 24), dtype=np.uint8) for seed in range(2)]
    images, noise, times = training_batch(pixels, 16, 40, np.random.default_rng(0))
    assert images.shape == noise.shape == (40, 2, 16, 16)
    assert images.dtype == noise.dtype == np.float32
    windows = {
        turned(image[:, y : y + 16, x : x + 16], symmetry).tobytes(): (number, y, x, symmetry)
        for number, image in enumerate(pixels)
        for y in range(5)
        for x in range(9)
        for symmetry in range(8)
    }
    drawn = [windows[((patch + 1) * 127.5).round().astype(np.uint8).tobytes()] for patch in images]
    for position, expected in enumerate([{0, 1}, set(range(5)), set(range(9)), set(range(8))]):
        assert {place[position] for place in drawn} == expected
    assert times.min() >= 0
    assert 800 < times.max() < 1000
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    again = training_batch(pixels, 16, 40, np.random.default_rng(0))
    np.testing.assert_array_equal(again[0], images)


def test_training_lowers_the_loss(model: Diffusion) -> None:
    loss = model.history["loss"]
    assert len(loss) == 40
    assert np.mean(loss[-10:]) < 0.7 * np.mean(loss[:3])


def test_trained_weights_are_the_moving_average(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real_train = _training.train

    def spy(module: torch.nn.Module, *args: object, **kwargs: object) -> dict[str, list[float]]:
        follow = kwargs["after_step"]

        def both(module: torch.nn.Module, step: int) -> bool:
            seen.append(next(module.parameters()).detach().clone())
            return follow(module, step)  # type: ignore[operator]

        return real_train(module, *args, **{**kwargs, "after_step": both})  # type: ignore[arg-type]

    monkeypatch.setattr("histoniche.seg._diffusion.train", spy)
    model = _fit(Diffusion(1, 16, **SMALL), 4)  # type: ignore[arg-type]
    expected = seen[0]  # the first step replaces the weights that were drawn
    for step, weights in enumerate(seen[1:], 1):
        decay = 1 - (1 + step) ** -0.75
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(next(model.module.parameters()).detach(), expected)
    assert not torch.equal(seen[-1], expected)


def test_an_image_is_the_same_whatever_else_is_asked_for(model: Diffusion) -> None:
    few, many = _samples(model, [1]), _samples(model, [3, 0, 1, 2])
    assert list(many) == [0, 1, 2, 3]
    assert many[1].shape == (1, 16, 16)
    assert many[1].dtype == np.uint8
    np.testing.assert_array_equal(few[1], many[1])
    blocks, one_of_block = _samples(model, [0, 1, 2, 3], block=4), _samples(model, [2], block=4)
    np.testing.assert_array_equal(blocks[2], one_of_block[2])
    assert list(one_of_block) == [2]
    for number, image in many.items():  # sums are rounded differently in batches of another size
        np.testing.assert_allclose(image.astype(int), blocks[number].astype(int), atol=1)


def test_images_differ_by_number_seed_and_steps(model: Diffusion) -> None:
    first, second = _samples(model, [0, 1]).values()
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, _samples(model, [0], seed=1)[0])
    assert not np.array_equal(first, _samples(model, [0], ddim_steps=5)[0])


def test_sampling_follows_the_equations(model: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM written out for a network whose velocity says that every image is 0.5."""
    angles = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas = np.cumprod(1 - np.minimum(1 - angles[1:] / angles[:-1], 0.999))

    def velocity(x: torch.Tensor, time: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        alpha = float(alphas[int(time)])
        return ((alpha**0.5 * x - 0.5) / (1 - alpha) ** 0.5,)

    monkeypatch.setattr(model.module, "forward", velocity)
    np.testing.assert_array_equal(_samples(model, [0])[0], np.full((1, 16, 16), 191))  # (0.5 + 1) * 127.5


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _fit(Diffusion(1, 16, **SMALL))  # type: ignore[arg-type]
    place = tmp_path / "training.ckpt"
    real = training_batch
    broken = {"calls": 0}

    def failing(*args: object) -> object:
        broken["calls"] += 1
        if broken["calls"] > 5:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("histoniche.seg._diffusion.training_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        _fit(Diffusion(1, 16, **SMALL), checkpoint=place, checkpoint_every=2)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert place.is_file()
    resumed = _fit(Diffusion(1, 16, **SMALL), checkpoint=place, checkpoint_every=2)  # type: ignore[arg-type]
    assert resumed.digest == whole.digest
    assert resumed.history == whole.history
    with pytest.raises(ValueError, match="another training"):
        _fit(Diffusion(1, 16, **SMALL), 7, checkpoint=place)  # type: ignore[arg-type]


def test_seeds_decide_weights_and_training_and_global_generators_stay() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = (_fit(Diffusion(3, 16, **SMALL), 2) for _ in range(2))  # type: ignore[arg-type]
    _samples(first, [0])
    assert first.digest == second.digest
    assert first.digest != _fit(Diffusion(3, 16, **SMALL), 2, seed=1).digest  # type: ignore[arg-type]
    assert Diffusion(3, 16, width=(8, 16), seed=1).digest != Diffusion(3, 16, width=(8, 16)).digest
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]


def test_saved_models_are_those_that_diffusers_reads(model: Diffusion, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    model.save(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "config.json", "diffusion_pytorch_model.safetensors", "model", "scheduler_config.json",
    ]  # fmt: skip
    loaded = Diffusion.load(tmp_path / "model")
    assert repr(loaded) == repr(model) == "Diffusion(1 channels, 16 px, 0.06 M parameters)"
    assert loaded.digest == model.digest
    np.testing.assert_array_equal(_samples(loaded, [5])[5], _samples(model, [5])[5])
    theirs = UNet2DModel.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.module.parameters())
    assert DDIMScheduler.from_pretrained(tmp_path / "model").config.prediction_type == "v_prediction"


def test_damaged_models_are_refused(model: Diffusion, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        Diffusion.load(tmp_path)
    model.save(tmp_path / "model")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged and cannot be read"):
        Diffusion.load(tmp_path / "model")
    weights.write_bytes(content)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 24]}))
    with pytest.raises(ValueError, match="is damaged and cannot be read"):
        Diffusion.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("width", "size", "text"),
    [
        ((8,), 16, "two or more multiples of 8"), ((8, 12), 16, "two or more multiples of 8"),
        ((8, 16, 16), 18, "must be a multiple of 4"), ((8, 16), 6, "at least 8"),
    ],
)  # fmt: skip
def test_impossible_networks_are_refused(width: tuple[int, ...], size: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Diffusion(1, size, width=width)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(_access, "import_module", fail)
    with pytest.raises(ImportError, match=r"synthetic images needs the package diffusers: pip install"):
        Diffusion(1, 16)
