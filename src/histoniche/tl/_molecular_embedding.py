"""Molecular embedding of the cells from their counts."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import dask.array as da
import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA

from histoniche import _keys
from histoniche._random import isolated_rng
from histoniche._sdata import open_target, train_mask
from histoniche._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from spatialdata import SpatialData


def molecular_embedding(
    data: SpatialData | AnnData,
    *,
    method: Literal["scvi", "pca"] = "scvi",
    n_latent: int = 10,
    layer: str | None = None,
    empty_cells: Literal["error", "mean"] = "error",
    max_epochs: int | None = None,
    batch_size: int | None = None,
    split_key: str = "split",
    key_added: str | None = None,
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Embed the counts of the cells, fitted on the training cells alone.

    Parameters
    ----------
    data
        SpatialData object, or the table itself.
    method
        ``"scvi"``: latent means of a variational autoencoder (scvi-tools). ``"pca"``: principal components of
        log-normalised counts, quick and without counts in the model.
    n_latent
        Length of the embedding.
    layer
        Layer with the raw counts; ``X`` by default. Counts of a backed or a lazy table are read into memory.
    empty_cells
        Cells without a count say nothing. ``"error"`` refuses them; ``"mean"`` leaves them out of the fit and gives
        them the mean embedding of the training cells.
    max_epochs
        Passes of scVI over the training cells; by default as many as make 4,000 steps, between 5 and 100.
    batch_size
        Cells of a step of scVI; by default a twentieth of the training cells, between 128 and 1,024.
    split_key
        Column of ``obs`` with the split; without it all cells are used.
    key_added
        Entry of ``obsm`` to write; ``X_scVI`` or ``X_niche_pca`` by default.
    seed
        Seed of everything random.
    table_key
        Name of the table.
    copy
        Whether to return a copy instead of writing to ``data``.

    Returns
    -------
    ``None``, or the copy. Reads ``X`` or ``layers[layer]``, and ``obs[split_key]``. Writes:

    ``obsm["X_scVI"]`` (or ``obsm["X_niche_pca"]``, or ``obsm[key_added]``)
        (n, n_latent) float32.
    ``uns["histoniche"]["molecular_embedding"]``
        Provenance.

    Raises
    ------
    KeyError
        The layer does not exist.
    ValueError
        Counts that are missing, negative, not whole numbers, or all zero for a cell; unknown method.

    References
    ----------
    scVI: Lopez et al. 2018, doi 10.1038/s41592-018-0229-2.
    """
    target = open_target(data, table_key=table_key, copy=copy)
    table = target.table
    if method not in {"scvi", "pca"}:
        msg = f"method={method!r} is unknown: choose 'scvi' or 'pca'."
        raise ValueError(msg)
    counts = raw_counts(table, layer)
    train = train_mask(table, split_key)
    if empty_cells != "mean":
        refuse_empty_cells(table, counts)
    empty = np.asarray(counts.sum(axis=1)).ravel() == 0
    fitted = train & ~empty
    if fitted.sum() <= n_latent:
        msg = (
            f"n_latent={n_latent} needs more than {n_latent} training cells with counts, there are {int(fitted.sum())}."
        )
        raise ValueError(msg)
    embed = _scvi if method == "scvi" else _pca
    latent = np.empty((table.n_obs, n_latent), dtype=np.float32)
    latent[~empty] = embed(
        counts[~empty], fitted[~empty], n_latent, max_epochs=max_epochs, batch_size=batch_size, seed=seed
    )
    latent[empty] = latent[fitted].mean(axis=0)
    key = key_added or str(_keys.SCVI if method == "scvi" else _keys.PCA)
    return target.write(
        "molecular_embedding",
        params={
            "method": method, "n_latent": n_latent, "empty_cells": empty_cells, "n_empty": int(empty.sum()),
            "max_epochs": max_epochs, "batch_size": batch_size, "seed": seed,
        },
        inputs={"layer": layer or "X", "split_key": split_key},
        obsm={key: latent},
    )  # fmt: skip


def raw_counts(table: AnnData, layer: str | None) -> sparse.csr_matrix:
    """Counts of the table as a sparse matrix, checked to be raw: whole numbers, none below zero."""
    if layer is not None and layer not in table.layers:
        names = sorted(name for name in table.layers if name is not None)  # anndata 0.13 lists X among them, as None
        msg = f"layer={layer!r} is not among the layers, {names}."
        raise KeyError(msg)
    where = f"layers[{layer!r}]" if layer else "X"
    values = table.layers[layer] if layer else table.X
    if values is None or table.n_vars == 0:
        msg = f"{where} is empty: the molecular embedding needs the raw counts."
        raise ValueError(msg)
    counts = sparse.csr_matrix(_in_memory(values))
    bad = ~np.isfinite(counts.data) | (counts.data < 0) | (counts.data != np.round(counts.data))
    if bad.any():
        msg = (
            f"{where} does not hold raw counts: it has the value {counts.data[bad][0]:.6g}. "
            "Normalised data cannot be used: name the layer with the raw counts, layer=."
        )
        raise ValueError(msg)
    return counts


def _in_memory(values: Any) -> Any:
    """Counts of a backed or a lazy table, read."""
    if isinstance(values, da.Array):
        return values.compute()
    return values.to_memory() if hasattr(values, "to_memory") else values


def refuse_empty_cells(table: AnnData, counts: sparse.csr_matrix) -> None:
    """Raise where a cell has no counts."""
    empty = np.asarray(counts.sum(axis=1)).ravel() == 0
    if empty.any():
        msg = (
            f"{int(empty.sum())} cells have no counts, the first is {table.obs_names[empty][0]!r}: drop them "
            "(`scanpy.pp.filter_cells(adata, min_counts=1)`), or keep them with "
            "`hn.tl.molecular_embedding(..., empty_cells='mean')`."
        )
        raise ValueError(msg)


_SEED_VARIABLES = ("XLA_FLAGS", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Variables of the environment that scvi-tools and Lightning set along with a seed."""


@contextmanager
def _scvi_seeded(seed: int) -> Iterator[None]:
    """Seed scvi-tools and let it give warnings alone; its settings and the environment are put back afterwards."""
    import scvi
    import torch

    loggers = [logging.getLogger(name) for name in ("scvi", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    before, environment = scvi.settings.seed, {name: os.environ.get(name) for name in _SEED_VARIABLES}
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with isolated_rng(seed):
        try:
            scvi.settings.seed = seed
            yield
        finally:
            scvi.settings.seed = None
            if before is not None:
                scvi.settings.seed = before
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _scvi(
    counts: sparse.csr_matrix,
    fitted: np.ndarray,
    n_latent: int,
    *,
    max_epochs: int | None,
    batch_size: int | None,
    seed: int,
) -> np.ndarray:
    import anndata
    import scvi

    n_fitted = int(fitted.sum())
    batch_size = min(batch_size or int(np.clip(n_fitted // 20, 128, 1024)), n_fitted)
    if max_epochs is None:
        max_epochs = int(np.clip(np.ceil(4000 * batch_size / n_fitted), 5, 100))
    with _scvi_seeded(seed):
        training = anndata.AnnData(counts[fitted].astype(np.float32))
        scvi.model.SCVI.setup_anndata(training)
        model = scvi.model.SCVI(training, n_latent=n_latent)
        model.train(
            max_epochs=max_epochs,
            accelerator=settings.accelerator,
            devices=1,
            batch_size=batch_size,
            train_size=1.0,
            enable_progress_bar=settings.progress,
            # A last batch of one cell would break batch normalisation.
            datasplitter_kwargs={"drop_last": n_fitted % batch_size == 1},
            logger=False,
            enable_checkpointing=False,
        )
        everything = anndata.AnnData(counts.astype(np.float32))
        scvi.model.SCVI.setup_anndata(everything)
        latent = model.get_latent_representation(everything, batch_size=4096)
    if not np.isfinite(latent).all():
        msg = "scVI diverged: its embedding is not finite. Lower batch_size, or look for cells with extreme counts."
        raise FloatingPointError(msg)
    return latent


def _pca(
    counts: sparse.csr_matrix,
    fitted: np.ndarray,
    n_latent: int,
    *,
    max_epochs: int | None,
    batch_size: int | None,
    seed: int,
) -> np.ndarray:
    del max_epochs, batch_size
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.median(totals[fitted]) / totals
    logged = (sparse.diags(scale) @ counts).astype(np.float32).tocsr()
    logged.data = np.log1p(logged.data)
    if n_latent > min(logged.shape):
        msg = f"n_latent={n_latent} is more than the {min(logged.shape)} genes or cells."
        raise ValueError(msg)
    pca = PCA(n_latent, svd_solver="arpack" if n_latent < min(logged.shape) else "full", random_state=seed)
    if pca.svd_solver == "full":
        logged = logged.toarray()
    pca.fit(logged[fitted])
    return pca.transform(logged)
