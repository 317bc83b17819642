"""Devices, and work prepared while the device is busy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from lightning.fabric import Fabric

B = TypeVar("B")


def make_fabric() -> Fabric:
    """Device and precision from :data:`histoniche.settings`, one process."""
    from lightning.fabric import Fabric

    precision = settings.precision
    if precision == "auto":
        on_gpu = settings.accelerator in {"auto", "cuda", "gpu"} and torch.cuda.is_available()
        precision = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
    return Fabric(accelerator=settings.accelerator, devices=1, precision=precision)  # type: ignore[arg-type]


def ahead(make: Callable[[int], B], n: int) -> Iterator[B]:
    """Yield ``make(0) ... make(n - 1)``, each prepared in a thread while its predecessor is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, 0) if n else None
        for step in range(n):
            current = following.result()  # type: ignore[union-attr]
            following = pool.submit(make, step + 1) if step + 1 < n else None
            yield current


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Move an array to the device; through pinned memory and without waiting on a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
