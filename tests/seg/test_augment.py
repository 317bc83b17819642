"""Training patches: reproducible, in range, maps turned with the image and never relit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histoniche.seg._augment import mirrored, padded, random_window, relit, training_patch


def _stack(height: int = 70, width: int = 50) -> np.ndarray:
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width), dtype=np.float32)
    mask[20:40, 10:30] = 1
    return np.stack([mask * 0.8 + 0.1 * rng.random(mask.shape, dtype=np.float32), mask, 1 - mask])


def test_the_generator_decides_everything() -> None:
    state = torch.get_rng_state()
    first, again, other = (training_patch(_stack(), 1, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 32, 32)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_move_with_the_image_and_keep_their_values() -> None:
    found = torch.cat([training_patch(_stack(), 1, 32, np.random.default_rng(s)).flatten(1) for s in range(40)], dim=1)
    image, mask, rest = found.numpy()
    certain = (mask < 1e-3) | (mask > 1 - 1e-3)
    assert certain.mean() > 0.85  # only edges are between 0 and 1
    np.testing.assert_allclose(mask + rest, 1, atol=1e-5)
    assert np.corrcoef(image, mask)[0, 1] > 0.8


def test_windows_are_parts_of_the_mirrored_field() -> None:
    stack = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    window = random_window(stack, 9, 3, np.random.default_rng(0))
    assert window.shape == (1, 9, 9)
    assert set(np.unique(window)) <= set(np.unique(stack))
    whole = np.pad(stack[0], 12, mode="reflect")
    places = np.lib.stride_tricks.sliding_window_view(whole, (9, 9))
    assert (places == window[0]).all(axis=(2, 3)).any()


@pytest.mark.parametrize(("start", "n", "length"), [(-3, 9, 4), (0, 4, 4), (2, 7, 5), (-9, 30, 3), (-2, 5, 1)])
def test_mirrored_is_numpys_reflection(start: int, n: int, length: int) -> None:
    pad = 40 if length > 1 else 0
    reflected = np.pad(np.arange(length), pad, mode="reflect")
    wanted = [reflected[i + pad] if length > 1 else 0 for i in range(start, start + n)]
    np.testing.assert_array_equal(mirrored(start, n, length), wanted)


def test_light_changes_the_image() -> None:
    pixels = torch.full((1, 16, 16), 0.5)
    means = [float(relit(pixels, np.random.default_rng(seed)).mean()) for seed in range(30)]
    assert min(means) < 0.4
    assert max(means) > 0.55


@pytest.mark.parametrize("shape", [(40, 70), (3, 64), (64, 64)])
def test_padded_to_the_stride(shape: tuple[int, int]) -> None:
    x = torch.rand(1, 1, *shape)
    out = padded(x, 32)
    assert all(length % 32 == 0 for length in out.shape[-2:])
    assert torch.equal(out[..., : shape[0], : shape[1]], x)
