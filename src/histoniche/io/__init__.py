"""Vendor output and slides into SpatialData, in one micrometre coordinate system."""

from __future__ import annotations

from ._attach import attach_image
from ._um import set_um
from ._xenium import read_xenium

__all__ = ["attach_image", "read_xenium", "set_um"]
