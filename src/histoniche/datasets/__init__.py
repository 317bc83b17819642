"""Data sets that come with the package: no download, no vendor licence."""

from __future__ import annotations

from ._synthetic import synthetic_tissue

__all__ = ["synthetic_tissue"]
