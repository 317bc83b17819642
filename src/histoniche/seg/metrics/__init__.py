"""Figures of merit of segmentations: masks and label images in, numbers out."""

from __future__ import annotations

from ._boundary import boundary_f, hausdorff95
from ._evaluate import evaluate
from ._instances import Matches, average_precision, match_instances, panoptic_quality
from ._overlap import dice

__all__ = [
    "Matches",
    "average_precision",
    "boundary_f",
    "dice",
    "evaluate",
    "hausdorff95",
    "match_instances",
    "panoptic_quality",
]
