"""Plots of niches, of what they are made of, and of how well they are seen."""

from __future__ import annotations

from ._confusion import confusion
from ._exemplars import exemplars
from ._niche_composition import niche_composition
from ._niche_map import niche_map
from ._training_history import training_history

__all__ = ["confusion", "exemplars", "niche_composition", "niche_map", "training_history"]
