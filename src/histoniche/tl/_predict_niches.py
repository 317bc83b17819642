"""Niches of new tissue from its histology."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from histoniche import _keys
from histoniche._sdata import Target, coordinates, open_target, slide_of_cell, streamed_features
from histoniche.models import NicheStudent
from histoniche.neighbors import radius_graph

from ._distill_niches import contract_of, is_known
from ._histology_embedding import check_contract, embed_histology
from ._niches import confidence, niche_columns

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from spatialdata import SpatialData

    from histoniche.models._features import FeatureSource

_LEAST_NEIGHBORS = 1.0
_UNUSUAL = 3.0
"""Factor between the neighbours that cells have here and had in training beyond which a warning is given."""


def predict_niches(
    data: SpatialData | AnnData,
    model: NicheStudent | str | Path,
    *,
    image_key: str | None = None,
    features_key: str | None = None,
    weights: str | Path | None = None,
    store: str | Path | None = None,
    batch_size: int = 512,
    spatial_key: str = "spatial",
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Predict the niches of cells from an image and their positions; no counts are read.

    The histology embedding is made as the model's feature contract says, or read where it is there and was made so.
    Neighbourhoods have the radius of the model.

    Parameters
    ----------
    data
        SpatialData object with an H&E and a table of cells; or an AnnData that has the embedding already.
    model
        The student, or its directory.
    image_key
        Name of the H&E; may be left out where there is just one image.
    features_key
        Entry of ``obsm`` with the histology embedding; by default the one that the student was trained with, or where
        that is missing the one of its encoder.
    weights, store
        Given to :func:`~histoniche.tl.histology_embedding` where the embedding is missing.
    batch_size
        Cells at a time; the labels do not depend on it.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    table_key
        Name of the table.
    copy
        Whether to return a copy instead of writing to ``data``.

    Returns
    -------
    ``None``, or the copy. Reads the image or ``obsm[features_key]``, and ``obsm[spatial_key]`` in um. Writes:

    ``obs["niche"]``
        Categorical with the niches of the model, colours in ``uns["niche_colors"]``.
    ``obs["niche_confidence"]``
        float32 in (0, 1], the largest probability.
    ``obsm["niche_logits"]``
        (n, K) float32.
    ``obsm[features_key]``
        The histology embedding, where it was missing.
    ``uns["histoniche"]["predict_niches"]``
        Provenance.

    Raises
    ------
    ValueError
        The features or the encoder do not match the model's contract (the differing fields are named), the model is
        damaged, or cells have less than one neighbour within its radius on average, as happens with coordinates in
        smaller units than um.
    KeyError, TypeError
        Image, table or coordinates are missing.
    FileNotFoundError
        The model directory, or a file of it, is missing.

    Warns
    -----
    UserWarning
        Cells have more than 3 times the neighbours that the training cells had on average, or less than a third, as
        happens with coordinates in pixels. Units that are nearer to um than that pass without a word.

    References
    ----------
    Inference from H&E alone: arXiv 2604.09076.
    """
    student = model if isinstance(model, NicheStudent) else NicheStudent.load(model)
    target = open_target(data, table_key=table_key, copy=copy)
    xy = coordinates(target, spatial_key)
    radius = student.config.radius
    graph = radius_graph(xy, radius, groups=slide_of_cell(target.table))
    _check_neighbors(student, float(graph.counts.mean()), spatial_key)
    features_key = features_key or _own_features(student, target.table)
    histology = _histology(
        target, student, features_key, image_key=image_key, weights=weights, store=store, spatial_key=spatial_key
    )
    logits = student.predict(histology, graph, xy, batch_size=batch_size)
    obs, uns = niche_columns(logits, str(_keys.NICHE), student.config.niches)
    return target.write(
        "predict_niches",
        params={"weights_sha256": student.digest, "radius": radius, "contract": student.config.contract},
        inputs={"features": features_key, "image_key": image_key, "spatial_key": spatial_key},
        obs={**obs, str(_keys.CONFIDENCE): confidence(logits)},
        obsm={str(_keys.LOGITS): logits},
        uns=uns,
    )


def _check_neighbors(student: NicheStudent, found: float, spatial_key: str) -> None:
    """Refuse coordinates that cannot be in um, and warn of those that may not be."""
    wanted = float(student.config.training.get("mean_neighbors", float("nan")))
    msg = (
        f"Cells have {found:.2f} neighbours within the model's radius of {student.config.radius:.1f} um on average; "
        f"the model was trained with {wanted:.1f}. Are the coordinates, obsm[{spatial_key!r}], in um?"
    )
    if found < _LEAST_NEIGHBORS:
        raise ValueError(msg)
    if found > _UNUSUAL * wanted or found < wanted / _UNUSUAL:
        warnings.warn(
            f"{msg} If not, multiply them by um per px. If they are, the tissue is of another density, and niches may be wrong.",
            UserWarning,
            stacklevel=3,
        )


def _own_features(student: NicheStudent, table: AnnData) -> str:
    """Entry of ``obsm`` that the student was trained with; that of its encoder where it is missing and can be made."""
    contract, own = student.config.contract, student.config.training.get("features_key")
    if own is not None and (own in table.obsm or not is_known(contract)):
        return str(own)
    return _keys.histology(str(contract.get("encoder")))


def _histology(
    target: Target,
    student: NicheStudent,
    features_key: str,
    *,
    image_key: str | None,
    weights: str | Path | None,
    store: str | Path | None,
    spatial_key: str,
) -> np.ndarray | FeatureSource:
    """Features that keep the model's contract: those of the table, or made now."""
    contract = student.config.contract
    if features_key not in target.table.obsm:
        if not is_known(contract):
            msg = (
                f"obsm[{features_key!r}] is missing, and the model does not know how it is made ({contract}): put the "
                "features there, made as those of the training were, or name their key with features_key=."
            )
            raise KeyError(msg)
        embed_histology(
            target,
            image_key=image_key,
            encoder=contract["encoder"],
            mode=contract["mode"],
            symmetries=int(contract.get("symmetries", 1)),
            um_per_px=contract["um_per_px"],
            weights=weights,
            store=store,
            key_added=features_key,
            spatial_key=spatial_key,
            expected=contract,
        )
    found = contract_of(target.table, features_key)
    if is_known(contract) or is_known(found):  # of two unknown origins nothing but a name could be compared
        check_contract(contract, found, f"obsm[{features_key!r}]")
    return streamed_features(target.table, features_key)
