"""Figures of merit of niche maps: arrays in, numbers out."""

from __future__ import annotations

from ._agreement import adjusted_rand, effective_number, match_labels, normalized_mutual_info
from ._composition import composition, composition_jsd
from ._probe import svm_probe_f1

__all__ = [
    "adjusted_rand",
    "composition",
    "composition_jsd",
    "effective_number",
    "match_labels",
    "normalized_mutual_info",
    "svm_probe_f1",
]
