"""What all functions that write niches share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from histoniche import _keys
from histoniche.pl._colors import niche_palette


def check_n_niches(n_niches: int, n_cells: int) -> None:
    """Refuse a number of niches that cannot be."""
    if n_niches < 2:
        msg = f"n_niches={n_niches}: at least 2 niches are needed."
        raise ValueError(msg)
    if n_niches > n_cells:
        msg = f"n_niches={n_niches} is more than the {n_cells} cells there are to learn from: choose fewer niches."
        raise ValueError(msg)


def niche_columns(
    logits: np.ndarray, key: str, names: list[str] | None = None
) -> tuple[dict[str, pd.Categorical], dict[str, Any]]:
    """Column of ``obs`` with the most likely niche, and its colours for ``uns``. Niches without a cell stay categories."""
    names = names or [str(k) for k in range(logits.shape[1])]
    labels = pd.Categorical.from_codes(logits.argmax(axis=1), categories=names)
    return {key: labels}, {_keys.colors(key): niche_palette(len(names))}


def confidence(logits: np.ndarray) -> np.ndarray:
    """Largest probability of each cell, (n,) float32."""
    return softmax(logits, axis=1).max(axis=1).astype(np.float32)
