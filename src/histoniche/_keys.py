"""Every key that the package writes to a table, in one list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Slot = Literal["obs", "obsm", "obsp", "uns"]


@dataclass(frozen=True)
class Key:
    """One key of the table: where it lies, what it holds, which function writes it."""

    slot: Slot
    name: str
    content: str
    written_by: str

    def __str__(self) -> str:
        return self.name


UM = "um"
"""Name of the micrometre coordinate system of every SpatialData object that the package makes or reads."""

SPATIAL = Key("obsm", "spatial", "(n, 2) float64, cell centroids x, y in um", "io.read_xenium")
CONNECTIVITIES = Key(
    "obsp", "niche_connectivities", "(n, n) CSR float32, 1 for two cells within the radius", "pp.spatial_neighbors"
)
DISTANCES = Key("obsp", "niche_distances", "(n, n) CSR float32, distances in um", "pp.spatial_neighbors")
NEIGHBORS = Key(
    "uns",
    "niche_neighbors",
    "squidpy's description of the graph; ``params`` has the radius in um",
    "pp.spatial_neighbors",
)
SPLIT = Key("obs", "split", "categorical: train, test, buffer", "pp.spatial_holdout")
SCVI = Key("obsm", "X_scVI", "(n, n_latent) float32, molecular embedding by scVI", "tl.molecular_embedding")
PCA = Key("obsm", "X_niche_pca", "(n, n_latent) float32, molecular embedding by PCA", "tl.molecular_embedding")
HISTOLOGY = Key("obsm", "X_{encoder}", "(n, d) float16, histology embedding", "tl.histology_embedding")
TEACHER_LOGITS = Key(
    "obsm", "niche_logits_teacher", "(n, K) float32; their softmax is the teacher's assignment", "tl.nolan"
)
TEACHER_DISCS = Key(
    "obsm",
    "niche_logits_teacher_disc",
    "(n, K) float32; the teacher's logits of the disc centred on each cell, which a student learns",
    "tl.nolan",
)
TEACHER = Key("obs", "niche_teacher", "categorical, K categories; colours in uns", "tl.nolan")
LOGITS = Key("obsm", "niche_logits", "(n, K) float32; the student's logits", "tl.distill_niches, tl.predict_niches")
NICHE = Key("obs", "niche", "categorical, K categories; colours in uns", "tl.distill_niches, tl.predict_niches")
CONFIDENCE = Key(
    "obs",
    "niche_confidence",
    "float32 in (0, 1], the student's largest probability",
    "tl.distill_niches, tl.predict_niches",
)
HISTORY = Key(
    "uns",
    "niche_history",
    "``teacher`` and ``student``: one 1-d array per figure, one value per step",
    "tl.nolan, tl.distill_niches",
)
MODEL = Key("uns", "niche_model", "path of the student's model directory", "tl.distill_niches")
BASELINE = Key(
    "obs",
    "niche_{baseline}",
    "categorical, the baseline's niches of the test cells; colours in uns",
    "tl.evaluate_niches",
)
EVALUATION = Key("uns", "niche_evaluation", "DataFrame, one row per model, on the test cells", "tl.evaluate_niches")
PROVENANCE = Key("uns", "histoniche", "one entry per step: parameters, versions, seed, input keys", "every function")

KEYS: tuple[Key, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Key))


def colors(key: str | Key) -> str:
    """Name of the entry of ``uns`` that holds the colours of a categorical column (scanpy's convention)."""
    return f"{key}_colors"


def histology(encoder: str) -> str:
    """Name of the entry of ``obsm`` that holds the features of an encoder."""
    return f"X_{encoder.replace('/', '-').replace(':', '-')}"
