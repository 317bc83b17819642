"""Devices, and work prepared while the device is busy."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.fabric import Fabric

B = TypeVar("B")

_THREADS_FOR_GPU = 4
_FABRICS: dict[tuple[str, str], Fabric] = {}
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``."""
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own thresholds end up once a large array was freed."""
_KEEPING: list[None] = []
"""One item for each that keeps memory now."""
_KEEPING_LOCK = Lock()


def make_fabric() -> Fabric:
    """Device and precision from :data:`histoniche.settings`, one process; for training, which changes its state."""
    from lightning.fabric import Fabric

    precision = settings.precision
    if precision == "auto":
        on_gpu = settings.accelerator in {"auto", "cuda", "gpu"} and torch.cuda.is_available()
        precision = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
    return Fabric(accelerator=settings.accelerator, devices=1, precision=precision)  # type: ignore[arg-type]


def inference_fabric() -> Fabric:
    """The same, made once: making it takes as long as a small network needs for an image, and announces its precision."""
    wanted = (settings.accelerator, settings.precision)
    if wanted not in _FABRICS:
        _FABRICS[wanted] = make_fabric()
    return _FABRICS[wanted]


def ahead(make: Callable[[int], B], n: int, *, workers: int = 1) -> Iterator[B]:
    """Yield ``make(0) ... make(n - 1)`` in order, each prepared in a thread while its predecessors are used.

    Parameters
    ----------
    make
        Makes an item; its result must depend on the number alone.
    n
        Number of items.
    workers
        Threads, and items that are prepared ahead.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        following = deque(pool.submit(make, step) for step in range(min(workers, n)))
        for step in range(n):
            current = following.popleft().result()
            if step + workers < n:
                following.append(pool.submit(make, step + workers))
            yield current
            del current  # not to hold it while waiting for the next
    finally:  # also where the caller stops early: what has not begun is not needed
        pool.shutdown(wait=True, cancel_futures=True)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Move an array to the device; through pinned memory and without waiting on a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device(batch: Any, device: torch.device) -> Any:
    """Arrays in tuples and lists, however nested, as tensors on the device.

    Called by the threads that prepare batches: copying to pinned memory takes as long as a step of a small model.
    """
    if isinstance(batch, np.ndarray):
        return to_device(batch, device)
    return type(batch)(on_device(part, device) for part in batch)


def preparing_threads(device: torch.device) -> int:
    """Threads that prepare batches for a device, and batches that lie ready for it."""
    return _THREADS_FOR_GPU if device.type == "cuda" else 1


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory for the next allocation while this lasts, on Linux; at the end it goes back to the system.

    glibc maps every array above 32 MB anew and gives it back when it is freed, so that a network with large maps waits for the
    system to clear each of its activations page by page. Nothing is changed where another C library is in use, or where the
    user has set glibc's malloc in the environment.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    with _KEEPING_LOCK:
        if not _KEEPING:
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, -1)
        _KEEPING.append(None)
    try:
        yield
    finally:
        with _KEEPING_LOCK:
            _KEEPING.pop()
            if not _KEEPING:
                for parameter, value in _USUAL.items():
                    libc.mallopt(parameter, value)
                libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and the user has not set its malloc."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # no libraries to look into, as on Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
