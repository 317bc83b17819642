"""A training that was interrupted ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.models._checkpoint import Checkpoint
from histoniche.models._training import train


class _Stopped(RuntimeError):
    pass


class _Counter:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def _train(path: Path | None, *, stop: int | None = None, fingerprint: str = "a") -> tuple[nn.Module, dict, list[int]]:
    counter = _Counter()

    def batch(step: int) -> np.ndarray:
        if step == stop:
            raise _Stopped
        return np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)

    def loss(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        return (module(x) - 1).square().mean(), {}

    def after(module: nn.Module, step: int) -> bool:
        counter.seen.append(step)
        return False

    with isolated_rng(0):
        module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        keep = None if path is None else Checkpoint(path, fingerprint, every=5, extra=counter)
        history = train(module, batch, loss, n_steps=23, lr=0.01, weight_decay=0.1, after_step=after, checkpoint=keep)
    return module, history, counter.seen


def test_resumed_training_is_bit_identical(tmp_path: Path) -> None:
    whole, history, seen = _train(None)
    path = tmp_path / "deep" / "state.pt"
    with pytest.raises(_Stopped):
        _train(path, stop=13)
    assert path.exists()
    resumed, resumed_history, resumed_seen = _train(path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert history == resumed_history
    assert seen == resumed_seen == list(range(23))
    assert list(path.parent.iterdir()) == [path]


def test_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with pytest.raises(_Stopped):
        _train(path, stop=13)
    with pytest.raises(ValueError, match="belongs to another training"):
        _train(path, fingerprint="b")


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state.pt"
    if content is None:
        with pytest.raises(_Stopped):
            _train(path, stop=13)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        _train(path)


def test_learning_rates_by_name() -> None:
    module = nn.ModuleDict({"slow": nn.Linear(1, 1, bias=False), "fast": nn.Linear(1, 1, bias=False)})
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss(net: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        return sum(p.sum() for p in module.parameters()), {}

    train(
        module, lambda step: np.zeros(1), loss, n_steps=1, lr=0.001, weight_decay=0.0, warmup=1,
        lr_factors={"fast.": 50.0},
    )  # fmt: skip
    moved = {name: float((before[name] - p.detach()).abs().sum()) for name, p in module.named_parameters()}
    # Adam's first step is the learning rate, whatever the gradient.
    assert moved["slow.weight"] == pytest.approx(0.001, rel=1e-3)
    assert moved["fast.weight"] == pytest.approx(0.05, rel=1e-3)
