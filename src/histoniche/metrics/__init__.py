"""Figures of merit of niche maps: arrays in, numbers out."""

from __future__ import annotations

from ._agreement import adjusted_rand, effective_number, match_labels, normalized_mutual_info
from ._bootstrap import Interval, block_bootstrap, spatial_blocks
from ._composition import composition, composition_jsd
from ._probe import svm_probe_f1
from ._tables import bootstrap_agreement

__all__ = [
    "Interval",
    "adjusted_rand",
    "block_bootstrap",
    "bootstrap_agreement",
    "composition",
    "composition_jsd",
    "effective_number",
    "match_labels",
    "normalized_mutual_info",
    "spatial_blocks",
    "svm_probe_f1",
]
