"""Numbers that a training can be asked for."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any integer type as Python's own, refused below ``least``."""
    try:
        number = operator.index(value)
    except TypeError as error:
        msg = f"{name}={value!r} must be a whole number."
        raise TypeError(msg) from error
    if least is not None and number < least:
        msg = f"{name}={number} must be at least {least}."
        raise ValueError(msg)
    return number


def positive(name: str, value: Any) -> float:
    """A positive and finite number as Python's own."""
    number = float(value)
    if not 0 < number < np.inf:
        msg = f"{name}={value} must be positive and finite."
        raise ValueError(msg)
    return number


def training_settings(*, n_steps: Any, batch_size: Any, lr: Any, seed: Any) -> tuple[int | None, int, float, int]:
    """Steps, batch size, learning rate and seed of a training, checked, in this order."""
    return (
        None if n_steps is None else whole("n_steps", n_steps, 1),
        whole("batch_size", batch_size, 1),
        positive("lr", lr),
        whole("seed", seed, 0),
    )


def transformer_size(*, width: Any, depth: Any, heads: Any) -> tuple[int, int, int]:
    """Width, depth and heads of a Transformer, checked, in this order."""
    width, depth, heads = whole("width", width, 1), whole("depth", depth, 1), whole("heads", heads, 1)
    if width % heads:
        msg = f"width={width} must be a multiple of the {heads} heads: {width + heads - width % heads}, for instance."
        raise ValueError(msg)
    return width, depth, heads
