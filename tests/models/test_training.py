from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoniche.models import _training
from histoniche.models._features import Joined, take
from histoniche.models._training import default_steps, epoch_batches, train, warmup_cosine


def fit(n_steps: int, bad: int | None = None, stop: int | None = None) -> tuple[nn.Module, dict[str, list[float]]]:
    module = nn.Linear(3, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)

    def make(step: int) -> np.ndarray:
        x = np.random.default_rng(step).normal(size=(16, 3)).astype(np.float32)
        return x * np.nan if step == bad else x

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        value = (model(x)[:, 0] - x.sum(1)).square().mean()
        return value, {"on_device": 2 * value.detach(), "number": float(len(x))}

    history = train(
        module, make, loss, n_steps=n_steps, lr=0.05, weight_decay=0.0, after_step=lambda _, step: step == stop
    )
    return module, history


def test_learns_and_records_every_step() -> None:
    module, history = fit(150)
    torch.testing.assert_close(module.weight.detach(), torch.ones(1, 3), atol=0.05, rtol=0)
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(
        ("loss", "on_device", "number"), 150
    )
    np.testing.assert_allclose(history["on_device"], 2 * np.array(history["loss"]), rtol=1e-6)
    assert set(history["number"]) == {16.0}
    assert all(type(value) is float for value in history["loss"])


def test_how_often_figures_are_fetched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, history = fit(30)
    monkeypatch.setattr(_training, "_FETCH_EVERY", 1)
    again, often = fit(30)
    assert history == often
    assert torch.equal(module.weight, again.weight)


@pytest.mark.parametrize("stop", [0, 7, 20])
def test_history_is_whole_after_an_early_end(stop: int) -> None:
    assert len(fit(50, stop=stop)[1]["loss"]) == stop + 1


@pytest.mark.parametrize("bad", [0, 5, 29])
def test_bad_loss_names_its_step(bad: int) -> None:
    with pytest.raises(FloatingPointError, match=rf"the loss is nan at step {bad}\. Check the features"):
        fit(30, bad=bad)


def test_bad_gradient_of_a_finite_loss() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        return (model.weight - model.weight).square().sum().sqrt(), {}  # the slope of the root at zero is infinite

    with pytest.raises(FloatingPointError, match="the norm of the gradient is nan at step 0"):
        train(nn.Linear(2, 1), lambda step: (), loss, n_steps=3, lr=0.1, weight_decay=0.0)


def test_epochs_are_permutations_whatever_the_thread() -> None:
    rows = np.arange(100, 141)
    batch = epoch_batches(rows, 8, seed=4)
    alone = [batch(step) for step in range(40)]
    for epoch in range(8):
        together = np.concatenate(alone[5 * epoch : 5 * epoch + 5])
        assert len(np.unique(together)) == 40
        assert np.isin(together, rows).all()
    assert not np.array_equal(alone[0], alone[5])
    shared = epoch_batches(rows, 8, seed=4)
    with ThreadPoolExecutor(8) as pool:
        for one, two in zip(alone, pool.map(shared, range(40)), strict=True):
            np.testing.assert_array_equal(one, two)


def test_take_from_memory_and_from_a_store() -> None:
    features = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float16)

    class Store:
        shape = features.shape

        def take(self, cells: np.ndarray) -> np.ndarray:
            assert len(np.unique(cells)) == len(cells)
            return features[cells]

    cells = np.array([[3, 3, 19], [0, 3, 7]])
    for source in (features, Store()):
        found = take(source, cells)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, features.astype(np.float32)[cells])


def test_default_steps_show_each_cell_so_often_within_bounds() -> None:
    steps = [default_steps(n, 256, epochs=5, least=300, most=1500) for n in (100, 15_360, 25_600, 25_601, 1_000_000)]
    assert steps == [300, 300, 500, 501, 1500]


def test_schedule() -> None:
    factors = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == factors[9] == 1
    assert factors[-1] == pytest.approx(0.01, abs=1e-3)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_every_float16_is_converted_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    cells = np.random.default_rng(0).permutation(256)
    found = take(halves, cells)
    np.testing.assert_array_equal(found, halves.astype(np.float32)[cells])  # NaN is NaN
    np.testing.assert_array_equal(np.signbit(found), np.signbit(halves[cells]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_take_of_other_types_layouts_and_joined_sources(dtype: type) -> None:
    features = (10 * np.random.default_rng(1).normal(size=(30, 6))).astype(dtype)
    cells = np.array([[4, 29], [0, 4]])
    expected = features[cells].astype(np.float32)
    for same in (features, np.asfortranarray(features)):
        np.testing.assert_array_equal(take(same, cells), expected)
    joined = Joined(features, features.astype(np.float32)[:, :2])
    assert joined.shape == (30, 8)
    np.testing.assert_array_equal(take(joined, cells), np.concatenate([expected, expected[..., :2]], -1))
    assert take(features, np.empty(0, dtype=np.int64)).shape == (0, 6)
    with pytest.raises(IndexError):
        take(features, np.array([30]))
