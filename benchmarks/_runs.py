"""Figures of single runs that are kept in the docs, so that a benchmark can be gone on with on another machine."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from pathlib import Path


def device_name() -> str:
    """What a run is made on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def made_with(*shared: Any) -> str:
    """Digest of settings that all runs share: figures made with others are not taken for theirs."""
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:8]


def read_runs(path: Path, digest: str) -> pd.DataFrame | None:
    """Runs made with these settings, one a row; None where there are none."""
    if not path.exists():
        return None
    runs = pd.read_csv(path, dtype={"made_with": str})
    runs = runs[runs["made_with"] == digest]
    return runs if len(runs) else None


def keep_runs(runs: pd.DataFrame, path: Path, keys: list[str]) -> pd.DataFrame:
    """Write runs, the first of those of equal keys; return them."""
    runs = runs.drop_duplicates(keys).sort_values(keys).reset_index(drop=True)
    path.parent.mkdir(exist_ok=True)
    runs.round(6).to_csv(path, index=False)
    return runs
