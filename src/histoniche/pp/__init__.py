"""Preprocessing: virtual H&E, neighbourhoods, hold-out."""

from ._spatial_holdout import spatial_holdout
from ._spatial_neighbors import spatial_neighbors
from ._virtual_he import virtual_he

__all__ = ["spatial_holdout", "spatial_neighbors", "virtual_he"]
