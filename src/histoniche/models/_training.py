"""The one training loop: device, precision, schedule and overlapped preparation of batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from histoniche._compute import ahead, make_fabric
from histoniche._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable

B = TypeVar("B")


def warmup_cosine(step: int, n_steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def train(
    module: nn.Module,
    make_batch: Callable[[int], B],
    loss: Callable[[nn.Module, B, torch.device], tuple[Tensor, dict[str, float]]],
    *,
    n_steps: int,
    lr: float,
    weight_decay: float,
    clip: float = 3.0,
    warmup: int | None = None,
    after_step: Callable[[nn.Module, int], bool] | None = None,
    description: str = "training",
) -> dict[str, list[float]]:
    """Train a module with AdamW and a warm-up and cosine schedule.

    Parameters
    ----------
    module
        Module, trained in place; only parameters that ask for a gradient.
    make_batch
        Batch of a step, made of arrays in a background thread.
    loss
        Loss of a batch and figures to record; it moves the batch to the device.
    n_steps, lr, weight_decay, clip, warmup
        Schedule of the optimiser. Biases, norms and other vectors get no weight decay.
    after_step
        Called after each step with the bare module, for instance to update a teacher; true ends the training.
    description
        Text of the progress bar.

    Returns
    -------
    History: one list per figure, one value per step.
    """
    fabric = make_fabric()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    warmup = max(1, n_steps // 20) if warmup is None else warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, n_steps, warmup))
    wrapped, optimizer = fabric.setup(module, optimizer)
    module.train()
    history: dict[str, list[float]] = {}
    bar = tqdm(ahead(make_batch, n_steps), total=n_steps, desc=description, disable=not settings.progress, leave=True)
    for step, batch in enumerate(bar):
        value, figures = loss(wrapped, batch, fabric.device)
        if not torch.isfinite(value):
            msg = f"{description}: the loss is {value.item()} at step {step}. Check the features for extreme values, or lower lr ({lr})."
            raise FloatingPointError(msg)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(value)
        fabric.clip_gradients(wrapped, optimizer, max_norm=clip)
        optimizer.step()
        schedule.step()
        for name, figure in {"loss": value.item(), **figures}.items():
            history.setdefault(name, []).append(figure)
        if step % 20 == 0:
            bar.set_postfix({name: f"{values[-1]:.3f}" for name, values in history.items()})
        if after_step is not None and after_step(module, step):
            break
    bar.close()
    module.eval()
    return history


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
    Function from the step to its rows, callable in any order.
    """
    batch_size = min(batch_size, len(rows))
    per_epoch = len(rows) // batch_size
    cached: dict[int, np.ndarray] = {}

    def batch(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        if epoch not in cached:
            cached.clear()
            cached[epoch] = np.random.default_rng([seed, epoch]).permutation(rows)
        return cached[epoch][at * batch_size : (at + 1) * batch_size]

    return batch
