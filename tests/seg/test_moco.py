"""MoCo v3: the contrast against a brute-force count, and the slow encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightly")

from histoniche._random import isolated_rng
from histoniche.seg._moco import MoCo, info_nce
from histoniche.seg._students import build_student


def _moco(student: str = "resnet10t", momentum: float = 0.9, *, freeze_patches: bool = True) -> MoCo:
    encoder: Any = build_student(student, pretrained=False).encoder
    with isolated_rng(0):
        return MoCo(encoder, 0.2, momentum, freeze_patches=freeze_patches)


def _views(seed: int = 0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.random((3, 1, 64, 64), dtype=np.float32)) for _ in range(2)]


def _pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(5, 8)).astype(np.float32)
    return keys + rng.normal(size=keys.shape).astype(np.float32), keys


def test_info_nce_is_what_the_formula_says() -> None:
    queries, keys = _pairs()
    losses, right = [], []
    for i, query in enumerate(queries):
        cosines = np.array([query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in keys])
        losses.append(-np.log(np.exp(cosines[i] / 0.3) / np.exp(cosines / 0.3).sum()))
        right.append(np.argmax(cosines) == i)
    value, accuracy = info_nce(torch.from_numpy(queries), torch.from_numpy(keys), 0.3)
    assert float(value) == pytest.approx(2 * 0.3 * np.mean(losses), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(right))


def test_info_nce_does_not_depend_on_order_or_length() -> None:
    queries, keys = (torch.from_numpy(part) for part in _pairs())
    order = torch.tensor([3, 0, 4, 1, 2])
    value = info_nce(queries, keys, 0.2)[0]
    torch.testing.assert_close(info_nce(queries[order], keys[order], 0.2)[0], value)
    torch.testing.assert_close(info_nce(3 * queries, 0.5 * keys, 0.2)[0], value)
    assert not torch.isclose(info_nce(queries, keys[order], 0.2)[0], value)


def test_the_loss_is_symmetric_in_its_views() -> None:
    moco = _moco()
    first, second = _views()
    forth = moco.loss(moco(first, second), [])
    back = moco.loss(moco(second, first), [])
    torch.testing.assert_close(forth[0], back[0])
    torch.testing.assert_close(forth[1], back[1])


def test_queries_of_a_view_meet_keys_of_the_other() -> None:
    moco = _moco()
    queries, keys = _pairs()
    same, other = torch.from_numpy(keys), torch.from_numpy(queries)
    # Queries equal the keys of the other view, so each finds its own; those of the same view would not do.
    value, figures = moco.loss((same, other, other, same), [])
    assert float(figures["accuracy"]) == 1
    best = info_nce(same, same, 0.2)[0] + info_nce(other, other, 0.2)[0]
    torch.testing.assert_close(value, best)


def test_the_slow_encoder_gets_no_gradient_and_moves_by_its_share() -> None:
    moco = _moco()
    for one, two in zip(moco.query.parameters(), moco.key.parameters(), strict=True):
        assert torch.equal(one, two)
    moco.loss(moco(*_views()), [])[0].backward()
    assert not any(p.requires_grad or p.grad is not None for p in moco.key.parameters())
    assert all(p.grad is not None for p in moco.query.parameters())
    with torch.no_grad():
        for parameter in moco.query.parameters():
            parameter += 1
    before = [p.clone() for p in moco.key.parameters()]
    moco.after_step(2, 11)
    share = 1 - (1 - 0.9) * (np.cos(np.pi * 2 / 10) + 1) / 2
    for old, slow, fast in zip(before, moco.key.parameters(), moco.query.parameters(), strict=True):
        torch.testing.assert_close(slow, share * old + (1 - share) * fast)
    last = [p.clone() for p in moco.key.parameters()]
    moco.after_step(10, 11)  # the last step: it stays
    assert all(torch.equal(old, slow) for old, slow in zip(last, moco.key.parameters(), strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_transformers_patches_can_be_frozen(frozen: bool) -> None:
    moco = _moco("vit-tiny", freeze_patches=frozen)
    moco.loss(moco(*_views()), [])[0].backward()
    vit: Any = moco.query[0].encoder.model
    assert (vit.patch_embed.proj.weight.grad is None) == frozen
    assert vit.pos_embed.grad.abs().max() > 0
