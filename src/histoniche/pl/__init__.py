"""Plots of niches, of what they are made of, of how well they are seen, of segmentations, and of what labels are worth."""

from __future__ import annotations

from ._confusion import confusion
from ._exemplars import exemplars
from ._label_efficiency import label_efficiency
from ._niche_composition import niche_composition
from ._niche_map import niche_map
from ._segmentation import segmentation
from ._training_history import training_history

__all__ = [
    "confusion",
    "exemplars",
    "label_efficiency",
    "niche_composition",
    "niche_map",
    "segmentation",
    "training_history",
]
