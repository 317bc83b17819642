"""Package-wide settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path


def _cache_dir() -> Path:
    root = os.environ.get("HISTONICHE_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "histoniche"


@dataclass
class Settings:
    """Settings shared by all functions.

    Attributes
    ----------
    cache_dir
        Folder for models and feature stores that were given no place of their own
        (environment variable ``HISTONICHE_CACHE_DIR``; default ``~/.cache/histoniche``).
    accelerator
        Device, as Lightning Fabric names it: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
    precision
        ``"auto"`` (bfloat16 mixed precision on a GPU that has it, float32 elsewhere) or a precision of Lightning Fabric.
    progress
        Whether long work shows a progress bar.
    """

    cache_dir: Path = field(default_factory=_cache_dir)
    accelerator: str = "auto"
    precision: str = "auto"
    progress: bool = True


settings = Settings()
