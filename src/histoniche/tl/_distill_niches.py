"""The main job: teach a student to see the teacher's niches in the histology."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.spatial import cKDTree

from histoniche import _keys, encoders
from histoniche._sdata import (
    Target,
    check_inside,
    coordinates,
    features,
    image,
    need_graph,
    niche_graph,
    open_target,
    origin,
    slide_of_cell,
    streamed_features,
    test_mask,
    train_mask,
)
from histoniche._settings import settings
from histoniche.encoders._load import check_symmetries
from histoniche.models import NicheStudent, StudentConfig
from histoniche.models._checks import positive, training_settings, transformer_size, whole
from histoniche.models._directory import check_free
from histoniche.neighbors import radius_for_density
from histoniche.pp import spatial_neighbors

from ._histology_embedding import histology_embedding
from ._molecular_embedding import molecular_embedding, raw_counts, refuse_empty_cells
from ._niches import check_n_niches, confidence, niche_columns
from ._nolan import nolan
from ._teacher import learnt_from, learnt_key, teacher_names, warn_if_smoothed_twice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

_CONTEXT = (2, 4)
"""Hops of the context, where nothing forbids them."""
_FIELD_OF_VIEW = 112.0
"""Field of view in um where the split is not one of `hn.pp.spatial_holdout`: that of its default."""
_SAME_RADIUS = 1.1
"""Up to so many times the hold-out's radius, that of all cells, the graph's, of training cells, is the one that its buffer was made for."""


def distill_niches(
    data: SpatialData | AnnData,
    *,
    n_niches: int = 10,
    image_key: str | None = None,
    encoder: str = "uni2-h",
    mode: Literal["crop", "dense"] = "crop",
    symmetries: int = 1,
    features_key: str | None = None,
    use_rep: str = "X_scVI",
    layer: str | None = None,
    target_neighbors: float = 50,
    context: Sequence[int] | None = None,
    temperature: float = 2.0,
    width: int = 96,
    depth: int = 2,
    n_steps: int | None = None,
    batch_size: int = 256,
    lr: float = 1e-3,
    store: str | Path | None = None,
    model_dir: str | Path | None = None,
    overwrite: bool = False,
    split_key: str = "split",
    spatial_key: str = "spatial",
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Distil molecular niches into a student that needs the histology alone.

    Runs whichever step before it is missing, with its defaults: :func:`~histoniche.pp.spatial_neighbors`,
    :func:`~histoniche.tl.histology_embedding`, :func:`~histoniche.tl.molecular_embedding` and
    :func:`~histoniche.tl.nolan`. What is there already is used as it is, and a step that is done stays where a later one
    fails. Then a Transformer over the histology of a
    cell's neighbourhood learns the teacher's soft assignment on the training cells, and predicts **all** cells.

    Parameters
    ----------
    data
        SpatialData object with image and counts; or an AnnData that has the histology embedding already.
    n_niches
        Number of niches K.
    image_key
        Name of the H&E; may be left out where there is just one image.
    encoder, mode, symmetries, store
        Given to :func:`~histoniche.tl.histology_embedding` where the embedding is missing.
    features_key
        Entry of ``obsm`` with the histology embedding; by default that of the encoder.
    use_rep
        Entry of ``obsm`` with the molecular embedding. ``"X_scVI"`` and ``"X_niche_pca"`` are made where missing.
    layer
        Layer with the raw counts, ``X`` by default; given to :func:`~histoniche.tl.molecular_embedding` where that
        embedding is missing.
    target_neighbors
        Given to :func:`~histoniche.pp.spatial_neighbors` where the graph is missing. Where
        :func:`~histoniche.pp.spatial_holdout` had the same target, its radius is taken, to which its buffer was made.
    context
        Numbers of hops over which histology features are averaged as the context of a cell; a label reads as far as one
        hop more than the largest of them, times the radius of the graph (that of the hold-out, where the graph's is at most 10 % larger). By default those of 2 and 4 that keep training
        and test cells apart: both without a test strip or with :func:`~histoniche.pp.spatial_holdout`'s
        ``context_hops=4``. What lies between the two parts is its buffer, or where that is less, or ``obs[split_key]``
        is not of its making, the distance between their nearest cells; half a field of view of it (of 112 um where none
        is recorded) is kept free. No context if empty.
    temperature
        tau of the loss.
    width, depth
        Size of the student's Transformer.
    n_steps
        Training steps of the student; by default as many as show each training cell five times, between 300 and 1,500.
    batch_size, lr
        Training of the student.
    model_dir
        Directory for the student; by default one in ``hn.settings.cache_dir``, named after its weights.
    overwrite
        Whether a model that lies in ``model_dir`` is replaced.
    split_key
        Column of ``obs`` with the split; only training cells are learnt from. Without it, all cells.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    seed
        Seed of everything random.
    table_key
        Name of the table.
    copy
        Whether to return a copy instead of writing to ``data``.

    Returns
    -------
    ``None``, or the copy. Reads the fields of the steps before it. Writes what they write where they are missing, and:

    ``obs["niche"]``
        Categorical with the K categories of the teacher, colours in ``uns["niche_colors"]``.
    ``obs["niche_confidence"]``
        float32 in (0, 1], the largest probability of the student.
    ``obsm["niche_logits"]``
        (n, K) float32.
    ``uns["niche_model"]``
        Path of the model directory: ``hn.models.NicheStudent.load(path)``.
    ``uns["niche_history"]["student"]``
        Loss (nats) and agreement with the teacher on the training batch, of each step.
    ``uns["histoniche"]["distill_niches"]``
        Provenance; ``split_digest`` and ``teacher_digest`` are of the split and of the teacher's logits that were learnt from.

    Raises
    ------
    KeyError, ValueError, TypeError
        Any input or setting that is missing or wrong, named with its value and what to do; checked before the first
        step runs. So are logits of discs that are not those of the teacher's labels.
    FileExistsError
        ``model_dir`` holds a model, or something else.

    Warns
    -----
    UserWarning
        Training and test cells lie in each other's neighbourhoods, so that figures on the test cells flatter; the teacher's
        logits of discs are missing, so that the student smooths twice.

    References
    ----------
    Cross-modal knowledge distillation from spatial transcriptomics to histology, arXiv 2604.09076. The loss is
    ``tau^2 * mean_i KL(p_i^teacher || p_i^student)`` at temperature tau.
    """
    target = open_target(data, table_key=table_key, copy=copy)
    features_key = features_key or _keys.histology(encoder)
    n_niches = whole("n_niches", n_niches)
    n_steps, batch_size, lr, seed = training_settings(n_steps=n_steps, batch_size=batch_size, lr=lr, seed=seed)
    width, depth, _ = transformer_size(width=width, depth=depth, heads=StudentConfig.heads)
    size: dict[str, Any] = {"temperature": positive("temperature", temperature), "width": width, "depth": depth}
    common: dict[str, Any] = {
        "n_niches": n_niches, "image_key": image_key, "encoder": encoder, "mode": mode, "symmetries": symmetries,
        "features_key": features_key, "use_rep": use_rep, "layer": layer, "split_key": split_key, "spatial_key": spatial_key,
    }  # fmt: skip
    missing = _check(target, **common)
    radius = _wanted_radius(target, split_key, spatial_key, target_neighbors, seed)
    size["context"] = _context_hops(target, split_key, spatial_key, context, radius)
    if model_dir is not None:
        check_free(Path(model_dir), overwrite=overwrite)
    _run_missing(target, missing, radius=radius, store=store, seed=seed, table_key=table_key, **common)

    table, fit = target.table, {"n_steps": n_steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    student, logits = _teach(table, coordinates(target, spatial_key), features_key, split_key, size=size, fit=fit)
    obs, uns = niche_columns(logits, str(_keys.NICHE), student.config.niches)
    place = Path(model_dir) if model_dir is not None else settings.cache_dir / "models" / student.digest[:16]
    student.save(place, overwrite=overwrite or model_dir is None)
    history = {name: np.asarray(values, dtype=np.float32) for name, values in student.history.items()}
    return target.write(
        "distill_niches",
        params={
            **fit, **size, "n_steps": student.config.training["n_steps"], "n_niches": n_niches,
            "radius": student.config.radius, "weights_sha256": student.digest, **learnt_from(table, split_key, str(_keys.TEACHER_LOGITS)),
        },
        inputs={
            "features": features_key, "teacher": str(_keys.TEACHER_LOGITS), "taught": student.config.training["taught"],
            "split_key": split_key, "spatial_key": spatial_key, "image_key": image_key,
        },
        obs={**obs, str(_keys.CONFIDENCE): confidence(logits)},
        obsm={str(_keys.LOGITS): logits},
        uns={
            **uns,
            str(_keys.MODEL): str(place.resolve()),
            str(_keys.HISTORY): {**table.uns.get(str(_keys.HISTORY), {}), "student": history},
        },
    )  # fmt: skip


def _run_missing(
    target: Target,
    missing: set[str],
    *,
    n_niches: int,
    image_key: str | None,
    encoder: str,
    mode: Literal["crop", "dense"],
    symmetries: int,
    store: str | Path | None,
    features_key: str,
    use_rep: str,
    layer: str | None,
    radius: float,
    split_key: str,
    spatial_key: str,
    seed: int,
    table_key: str | None,
) -> None:
    """Run the steps that are missing; the one that may lack access to its weights before the long ones."""
    common: dict[str, Any] = {"seed": seed, "split_key": split_key, "table_key": table_key}
    if "graph" in missing:
        spatial_neighbors(target.data, radius=radius, spatial_key=spatial_key, **common)
    if "histology" in missing:
        histology_embedding(
            target.sdata, image_key=image_key, encoder=encoder, mode=mode, symmetries=symmetries, store=store,
            key_added=features_key, spatial_key=spatial_key, table_key=table_key,
        )  # fmt: skip
    if "molecules" in missing:
        method: Literal["scvi", "pca"] = "scvi" if use_rep == str(_keys.SCVI) else "pca"
        molecular_embedding(target.data, method=method, layer=layer, **common)
    if "teacher" in missing:
        nolan(target.data, n_niches=n_niches, use_rep=use_rep, spatial_key=spatial_key, **common)


def _teach(
    table: AnnData, xy: np.ndarray, features_key: str, split_key: str, *, size: dict[str, Any], fit: dict[str, Any]
) -> tuple[NicheStudent, np.ndarray]:
    """Train a student on the training cells; the student, and its logits (n, K) of all cells."""
    graph, radius = need_graph(table)
    histology, teacher = streamed_features(table, features_key), features(table, str(_keys.TEACHER_LOGITS))
    train, test = train_mask(table, split_key), test_mask(table, split_key)
    taught = learnt_key(table, graph, train)
    warn_if_smoothed_twice(table, taught)
    config = StudentConfig(
        n_features=histology.shape[1],
        n_niches=teacher.shape[1],
        radius=radius,
        contract=contract_of(table, features_key),
        niches=teacher_names(table, teacher.shape[1]),
        training={**fit, "features_key": features_key, "taught": taught},
        **size,
    )
    student = NicheStudent(config).fit(histology, graph, xy, features(table, taught), train_cells=train, **fit)
    logits = student.predict(histology, graph, xy)
    # For the model card: on what the student was trained, and how often it agrees with the teacher.
    agree = logits.argmax(1) == teacher.argmax(1)
    config.training["n_cells"] = int(train.sum())
    config.training["n_steps"] = len(student.history["loss"])
    config.training["mean_neighbors"] = round(float(graph.counts[train].mean()), 2)
    config.training["agreement_train"] = round(float(agree[train].mean()), 4)
    if test.any():
        config.training["agreement_test"] = round(float(agree[test].mean()), 4)
    return student, logits


def contract_of(table: AnnData, features_key: str) -> dict[str, Any]:
    """How an embedding was made: the contract that its step recorded; for an embedding of unknown origin, its name."""
    entry = origin(table, "obsm", features_key)
    if entry is None or "contract" not in entry["params"]:
        return {"encoder": f"obsm[{features_key!r}], of unknown origin"}
    return {name: _plain(value) for name, value in entry["params"]["contract"].items()}


def is_known(contract: dict[str, Any]) -> bool:
    """Whether a contract says how features are made, and not that this is unknown."""
    return "mode" in contract


def _plain(value: Any) -> Any:
    """Python's own types for what has been through h5ad or zarr."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _check(
    target: Target,
    *,
    n_niches: int,
    image_key: str | None,
    encoder: str,
    mode: str,
    symmetries: int,
    features_key: str,
    use_rep: str,
    layer: str | None,
    split_key: str,
    spatial_key: str,
) -> set[str]:
    """Check every input before anything runs, and name the steps that are missing."""
    table = target.table
    missing = set()
    check_n_niches(n_niches, int(train_mask(table, split_key).sum()))
    xy = coordinates(target, spatial_key)
    if niche_graph(table) is None:
        missing.add("graph")
    if features_key in table.obsm:
        streamed_features(table, features_key)
    else:
        missing.add("histology")
        if mode not in {"crop", "dense"}:
            msg = f"mode={mode!r} is unknown: choose 'crop' or 'dense'."
            raise ValueError(msg)
        check_symmetries(symmetries)
        encoders.get(encoder)
        check_inside(image(target.sdata, image_key), xy, table.obs_names)
    if str(_keys.TEACHER_LOGITS) not in table.obsm:
        missing |= {"teacher"} | _check_molecules(table, use_rep, layer)
        return missing
    found = features(table, str(_keys.TEACHER_LOGITS)).shape[1]
    if found != n_niches:
        msg = (
            f"n_niches={n_niches}, but obsm[{str(_keys.TEACHER_LOGITS)!r}] has {found} niches: run "
            f"`hn.tl.nolan(..., n_niches={n_niches})` anew, or pass n_niches={found}."
        )
        raise ValueError(msg)
    teacher_names(table, n_niches)
    graph = niche_graph(table)
    if graph is not None:
        learnt_key(table, graph[0], train_mask(table, split_key))
    return missing


def _holdout(table: AnnData, split_key: str) -> dict[str, Any]:
    """Parameters of the hold-out that made the split; none where another did."""
    entry = origin(table, "obs", split_key) if split_key in table.obs else None
    params: dict[str, Any] = (entry or {}).get("params", {})
    return params if "buffer" in params else {}


def _wanted_radius(target: Target, split_key: str, spatial_key: str, target_neighbors: float, seed: int) -> float:
    """Radius in um of the graph there is, or that it is to have."""
    found = niche_graph(target.table)
    if found is not None:
        return found[1]
    holdout = _holdout(target.table, split_key)
    if holdout.get("target_neighbors") == target_neighbors:
        return float(holdout["radius"])
    train = train_mask(target.table, split_key)
    xy, slide = coordinates(target, spatial_key)[train], slide_of_cell(target.table)[train]
    return radius_for_density(xy, target_neighbors, groups=slide, seed=seed)


def _apart(target: Target, split_key: str, spatial_key: str) -> float:
    """Distance in um between the nearest training and test cells of a slide."""
    train, test = train_mask(target.table, split_key), test_mask(target.table, split_key)
    xy, slide = coordinates(target, spatial_key), slide_of_cell(target.table)
    least = np.inf
    for number in np.unique(slide[test]):
        one, other = xy[train & (slide == number)], xy[test & (slide == number)]
        if len(one):
            least = min(least, float(cKDTree(one).query(other)[0].min()))
    return least


def _context_hops(
    target: Target, split_key: str, spatial_key: str, wanted: Sequence[int] | None, radius: float
) -> list[int]:
    """Hops of the context: those asked for, checked; by default those that the space between the parts allows."""
    holdout, apart = _holdout(target.table, split_key), _apart(target, split_key, spatial_key)
    buffer = min(float(holdout.get("buffer", np.inf)), apart)
    if apart < radius:
        warnings.warn(
            f"Training and test cells of obs[{split_key!r}] come as near as {apart:.1f} um, less than the radius of "
            f"{radius:.1f} um, so that each sees the other: figures on the test cells flatter the student. Make the split "
            f"with `hn.pp.spatial_holdout(..., radius={radius:.1f})`.",
            UserWarning,
            stacklevel=3,
        )
    margin = float(holdout.get("field_of_view", _FIELD_OF_VIEW)) / 2
    if radius <= _SAME_RADIUS * holdout.get("radius", 0):
        radius = min(radius, float(holdout["radius"]))
    widest = max(np.floor((buffer - margin) / radius - 1 + 1e-6), 0)
    if wanted is None:
        return [hops for hops in _CONTEXT if hops <= widest]
    hops = sorted(set(wanted))
    if any(not isinstance(h, (int, np.integer)) or h < 1 for h in hops):
        msg = f"context={list(wanted)!r} must be whole numbers of hops, from 1."
        raise ValueError(msg)
    if hops and hops[-1] > widest:
        msg = (
            f"context={list(wanted)!r} reads across the buffer of obs[{split_key!r}], {buffer:.0f} um, which leaves "
            f"{widest:.0f} hops of the graph's {radius:.1f} um: run `hn.pp.spatial_holdout(..., "
            f"context_hops={hops[-1]}, radius={radius:.1f})`, or leave out context."
        )
        raise ValueError(msg)
    return [int(h) for h in hops]


def _check_molecules(table: AnnData, use_rep: str, layer: str | None) -> set[str]:
    """Check what the teacher is made from: an embedding, or the counts."""
    if use_rep in table.obsm:
        features(table, use_rep)
        return set()
    if use_rep not in {str(_keys.SCVI), str(_keys.PCA)}:
        msg = f"use_rep={use_rep!r} is not in obsm, which has {sorted(table.obsm)}."
        raise KeyError(msg)
    refuse_empty_cells(table, raw_counts(table, layer))
    return {"molecules"}
