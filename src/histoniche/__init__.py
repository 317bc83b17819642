"""Molecular tissue niches from H&E alone."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._settings import settings

if TYPE_CHECKING:
    from . import datasets, encoders, io, metrics, models, pl, pp, seg, tl

__version__ = version("histoniche")
__all__ = ["datasets", "encoders", "io", "metrics", "models", "pl", "pp", "seg", "settings", "tl"]

_SUBMODULES = frozenset(__all__) - {"settings"}


def __getattr__(name: str) -> Any:
    # torch, spatialdata and scanpy take many seconds to import: a room is opened when it is first used.
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
