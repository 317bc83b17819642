"""The one training loop: device, precision, schedule and overlapped preparation of batches."""

from __future__ import annotations

import math
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from histoniche._compute import ahead, make_fabric, on_device, preparing_threads
from histoniche._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._checkpoint import Checkpoint

Batch = np.ndarray | tuple[Any, ...] | list[Any]

_FETCH_EVERY = 20
_GRADIENT = "gradient norm"


def warmup_cosine(step: int, n_steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def train(
    module: nn.Module,
    make_batch: Callable[[int], Batch],
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, float | Tensor]]],
    *,
    n_steps: int,
    lr: float,
    weight_decay: float,
    clip: float = 3.0,
    warmup: int | None = None,
    lr_factors: Mapping[str, float] | None = None,
    after_step: Callable[[nn.Module, int], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    description: str = "training",
) -> dict[str, list[float]]:
    """Train a module with AdamW and a warm-up and cosine schedule.

    Parameters
    ----------
    module
        Module, trained in place; only parameters that ask for a gradient.
    make_batch
        Batch of a step, an array or arrays in tuples and lists, made in background threads; must depend on the step alone.
    loss
        Loss of a batch, whose arrays are tensors on the device by then, and figures to record, numbers or scalars on the device.
    n_steps, lr, weight_decay, clip, warmup
        Schedule of the optimiser. Biases, norms and other vectors get no weight decay.
    lr_factors
        Factors of the learning rate of parameters whose name begins with a text; they get no weight decay.
    after_step
        Called after each step with the bare module, for instance to update a teacher; true ends the training.
    checkpoint
        Where the state is kept, and taken up again.
    description
        Text of the progress bar.

    Returns
    -------
    History: one list per figure, one value per step.

    Raises
    ------
    FloatingPointError
        The loss or its gradient is not finite. Figures stay on the device for up to 20 steps, so that it never waits
        for them; so the error comes up to 20 steps late, and names the step.
    """
    fabric = make_fabric()
    # A fused optimiser undoes the scaling of float16's gradients itself, so they could not be clipped.
    fused = fabric.device.type == "cuda" and getattr(fabric._precision, "scaler", None) is None
    optimizer = torch.optim.AdamW(_groups(module, lr, weight_decay, lr_factors or {}), lr=lr, fused=fused or None)
    warmup = max(1, n_steps // 20) if warmup is None else warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, n_steps, warmup))
    wrapped, optimizer = fabric.setup(module, optimizer)
    module.train()
    history: dict[str, list[float]] = {}
    waiting: list[dict[str, float | Tensor]] = []
    first = 0
    if checkpoint is not None:
        first = checkpoint.restore(module, history, optimizer=optimizer, schedule=schedule)
    batches = ahead(
        lambda ahead_step: on_device(make_batch(first + ahead_step), fabric.device), n_steps - first,
        workers=preparing_threads(fabric.device),
    )  # fmt: skip
    bar = tqdm(batches, initial=first, total=n_steps, desc=description, disable=not settings.progress, leave=True)
    for step, batch in enumerate(bar, first):
        value, figures = loss(wrapped, batch)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(value)
        norm = fabric.clip_gradients(wrapped, optimizer, max_norm=clip, error_if_nonfinite=False)
        optimizer.step()
        schedule.step()
        waiting.append({"loss": value.detach(), **figures, _GRADIENT: norm})
        done = after_step is not None and after_step(module, step)
        keep = checkpoint is not None and not done and (step + 1) % checkpoint.every == 0
        if done or keep or step % _FETCH_EVERY == 0 or step + 1 == n_steps:
            _fetch(waiting, history, description, lr)
            bar.set_postfix({name: f"{values[-1]:.3f}" for name, values in history.items()})
        if checkpoint is not None and keep:
            checkpoint.save(step + 1, module, history, optimizer=optimizer, schedule=schedule)
        if done:
            break
    bar.close()
    module.eval()
    return history


def _groups(
    module: nn.Module, lr: float, weight_decay: float, lr_factors: Mapping[str, float]
) -> list[dict[str, object]]:
    """Parameters that ask for a gradient, by learning rate and weight decay."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups: list[dict[str, object]] = []
    for prefix, factor in lr_factors.items():
        names = [name for name in trained if name.startswith(prefix)]
        groups.append({"params": [trained.pop(name) for name in names], "weight_decay": 0.0, "lr": factor * lr})
    groups.append({"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": weight_decay})
    groups.append({"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _fetch(
    waiting: list[dict[str, float | Tensor]], history: dict[str, list[float]], description: str, lr: float
) -> None:
    """Move figures of the last steps from the device to the history, all in one go."""
    on_device = [figure for figures in waiting for figure in figures.values() if isinstance(figure, Tensor)]
    fetched = iter(torch.stack([figure.detach().float().reshape(()) for figure in on_device]).tolist())
    for figures in waiting:
        numbers = {name: next(fetched) if isinstance(f, Tensor) else f for name, f in figures.items()}
        norm = numbers.pop(_GRADIENT)
        if not (math.isfinite(numbers["loss"]) and math.isfinite(norm)):
            what = "the loss" if not math.isfinite(numbers["loss"]) else "the norm of the gradient"
            value = norm if math.isfinite(numbers["loss"]) else numbers["loss"]
            msg = (
                f"{description}: {what} is {value} at step {len(history.get('loss', []))}. "
                f"Check the features for extreme values, or lower lr ({lr})."
            )
            raise FloatingPointError(msg)
        for name, number in numbers.items():
            history.setdefault(name, []).append(number)
    waiting.clear()


def default_steps(n_cells: int, batch_size: int, *, epochs: float, least: int, most: int) -> int:
    """Steps that show each training cell ``epochs`` times, within bounds."""
    return int(np.clip(np.ceil(epochs * n_cells / min(batch_size, n_cells)), least, most))


def epoch_batches(rows: np.ndarray, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Rows of each step: every row once per epoch, in an order that depends on the seed and the epoch alone.

    Parameters
    ----------
    rows
        (m,) rows to draw from.
    batch_size
        Rows of a batch; all of them where there are fewer.
    seed
        Seed of the order.

    Returns
    -------
    Function from the step to its rows, callable in any order and from several threads.
    """
    batch_size = min(batch_size, len(rows))
    per_epoch = len(rows) // batch_size
    cached: dict[int, np.ndarray] = {}
    lock = Lock()

    def batch(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        with lock:
            if epoch not in cached:
                for old in [e for e in cached if abs(e - epoch) > 1]:  # another thread may be an epoch behind
                    del cached[old]
                cached[epoch] = np.random.default_rng([seed, epoch]).permutation(rows)
            order = cached[epoch]
        return order[at * batch_size : (at + 1) * batch_size]

    return batch
