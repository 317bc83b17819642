"""Tools: embeddings, teacher, distillation, prediction, evaluation."""

from ._distill_niches import distill_niches
from ._evaluate_niches import evaluate_niches
from ._histology_embedding import histology_embedding
from ._molecular_embedding import molecular_embedding
from ._nolan import nolan
from ._predict_niches import predict_niches

__all__ = [
    "distill_niches",
    "evaluate_niches",
    "histology_embedding",
    "molecular_embedding",
    "nolan",
    "predict_niches",
]
