"""Engine: Transformer over neighbourhoods, teacher (NOLAN), student, losses, training, save and load."""

from ._losses import distillation_loss, self_distillation_loss
from ._nolan import NolanResult, fit_nolan
from ._student import NicheStudent, StudentConfig
from ._transformer import NeighborhoodTransformer

__all__ = [
    "NeighborhoodTransformer",
    "NicheStudent",
    "NolanResult",
    "StudentConfig",
    "distillation_loss",
    "fit_nolan",
    "self_distillation_loss",
]
