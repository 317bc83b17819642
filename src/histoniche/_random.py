"""Randomness that leaves the caller's generators as they were."""

from __future__ import annotations

import operator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch inside the block and restore them after it.

    For libraries that draw from global state (module initialisation, scvi-tools). Own code takes generators.
    """
    import random  # noqa: TID251 - only its state is kept safe here

    import torch

    seed = operator.index(seed)  # Python and torch refuse NumPy's integers
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.random.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
