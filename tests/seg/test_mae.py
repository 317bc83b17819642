"""Masked autoencoder: what the encoder sees, what is predicted, and how the error is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lightly")

from histoniche._random import isolated_rng
from histoniche.seg._mae import MAE, draw_vit
from histoniche.seg._students import build_student

SIZE, PATCH, SIDE = 64, 16, 4


@pytest.fixture
def mae() -> MAE:
    """An autoencoder of two channels over 4 x 4 patches."""
    vit: Any = build_student("vit-tiny", pretrained=False, n_channels=2).encoder.model
    with isolated_rng(0):
        draw_vit(vit)
        return MAE(vit, SIZE, 2, 0.75).eval()


def _batch(mae: MAE, n: int = 2) -> list[Tensor]:
    rng = np.random.default_rng(0)
    masks = [mae.masks(rng) for _ in range(n)]
    pixels = torch.from_numpy(rng.random((n, 2, SIZE, SIZE), dtype=np.float32))
    return [pixels, *(torch.from_numpy(np.stack(part)) for part in zip(*masks, strict=True))]


def _square(number: int) -> tuple[slice, slice]:
    y, x = divmod(number, SIDE)
    return slice(y * PATCH, (y + 1) * PATCH), slice(x * PATCH, (x + 1) * PATCH)


def test_every_patch_is_hidden_or_kept(mae: MAE) -> None:
    rng = np.random.default_rng(1)
    times = np.zeros(SIDE**2)
    for _ in range(400):
        hidden, kept = mae.masks(rng)
        assert len(hidden) == 12
        assert sorted([*hidden, *kept]) == list(range(SIDE**2))
        times[hidden] += 1
    np.testing.assert_allclose(times / 400, 0.75, atol=0.1)  # all places alike


def test_the_encoder_does_not_see_hidden_patches(mae: MAE) -> None:
    pixels, hidden, kept = _batch(mae)
    before = mae.encode(pixels, kept)
    assert before.shape == (2, 1 + 4, 192)
    changed, other = pixels.clone(), pixels.clone()
    for row in range(2):
        for number in hidden[row].tolist():
            changed[row][:, *_square(number)] = 1 - changed[row][:, *_square(number)]
        other[row][:, *_square(int(kept[row, 0]))] *= 0.5
    assert torch.equal(mae.encode(changed, kept), before)
    assert (mae.encode(other, kept) - before).abs().max() > 1e-3


def test_with_all_patches_kept_it_is_timms_own_encoder(mae: MAE) -> None:
    pixels = _batch(mae)[0]
    every = torch.arange(SIDE**2).expand(2, -1)
    torch.testing.assert_close(mae.encode(pixels, every), mae.masked.vit.forward_features(pixels))


def test_loss_is_that_of_normalised_hidden_patches(mae: MAE) -> None:
    pixels, hidden, kept = _batch(mae)
    predicted = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 12, PATCH**2 * 2)).astype(np.float32))
    errors = []
    for row in range(2):
        for place, number in enumerate(hidden[row].tolist()):
            patch = pixels[row][:, *_square(number)].numpy().transpose(1, 2, 0).ravel()  # channels change fastest
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            errors.append(np.square(predicted[row, place].numpy() - target).mean())
    assert float(mae.loss(predicted, [pixels, hidden, kept])[0]) == pytest.approx(np.mean(errors), rel=1e-5)
    nothing = mae.loss(torch.zeros_like(predicted), [pixels, hidden, kept])[0]
    assert float(nothing) == pytest.approx(1, abs=0.01)  # the mean of each patch


def test_gradients_reach_positions_and_all_else_that_is_used(mae: MAE) -> None:
    batch = _batch(mae)
    mae.loss(mae(*batch), batch)[0].backward()
    missing = {name for name, p in mae.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert missing == {"masked.vit.head.weight", "masked.vit.head.bias"}  # timm's classifier, which no student uses
    assert mae.masked.vit.pos_embed.requires_grad


def test_a_masked_batch_is_learnt(mae: MAE) -> None:
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    smooth = np.stack([[np.sin(a * x + b * y), np.cos(a * x + b * y)] for a, b in [(1, 2), (2, -1)]])
    batch = [torch.from_numpy(smooth.astype(np.float32)), *_batch(mae)[1:]]
    mae.train()
    optimizer = torch.optim.AdamW([p for p in mae.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(15):
        value = mae.loss(mae(*batch), batch)[0]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.7


def test_a_ratio_that_hides_all_or_nothing_is_refused() -> None:
    vit: Any = build_student("vit-tiny", pretrained=False).encoder.model
    with pytest.raises(ValueError, match=r"mask_ratio=0\.9 hides 4 of the 4 patches that patch_px=32 has"):
        MAE(vit, 32, 1, 0.9)
