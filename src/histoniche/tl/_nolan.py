"""The teacher: niches from the molecular embedding of neighbourhoods."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from histoniche import _keys
from histoniche._sdata import coordinates, features, need_graph, open_target, train_mask
from histoniche.models import fit_nolan
from histoniche.models._checks import positive, training_settings, whole

from ._niches import check_n_niches, niche_columns

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def nolan(
    data: SpatialData | AnnData,
    *,
    n_niches: int = 10,
    use_rep: str = "X_scVI",
    key_added: str = "niche_teacher",
    n_steps: int | None = None,
    batch_size: int = 128,
    teacher_temperature: float = 0.05,
    consensus: bool = True,
    split_key: str = "split",
    spatial_key: str = "spatial",
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Assign each cell to a niche by self-distillation over the cells around it (NOLAN).

    A small Transformer reads a disc of cells and gives K niche logits; no clustering step follows. It starts at a
    Gaussian mixture of neighbourhood means with one covariance for all niches, and is refined by agreement between
    overlapping discs: two of the full radius and local ones of 0.75 of it, each with some of its cells left out. With
    ``use_rep`` a histology embedding, the result is the baseline *Histology NOLAN*.

    Parameters
    ----------
    data
        SpatialData object, or the table itself.
    n_niches
        Number of niches K.
    use_rep
        Entry of ``obsm`` with the embedding of the cells.
    key_added
        Column of ``obs`` to write.
    n_steps
        Training steps; by default as many as show each training cell 10 times, between 150 and 450.
    batch_size
        Cells of a step.
    teacher_temperature
        Temperature of the assignment of a disc; smaller is harder.
    consensus
        Whether the assignment of a cell is the mean over the discs centred on it and on its neighbours, which training
        holds to be of one niche. It is then graded where niches meet.
    split_key
        Column of ``obs`` with the split: only neighbourhoods of training cells are learnt from. Without it, all.
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
    ``None``, or the copy. Reads ``obsm[use_rep]`` (n, d), ``obsp["niche_distances"]``, ``obsm[spatial_key]`` in um and
    ``obs[split_key]``. Writes:

    ``obs[key_added]``
        Categorical with the K categories "0" to "K-1", numbered by size at the start; colours in
        ``uns[key_added + "_colors"]``.
    ``obsm["niche_logits_teacher"]`` (``obsm[key_added + "_logits"]`` for another ``key_added``)
        (n, K) float32; their softmax is the teacher's assignment.
    ``obsm["niche_logits_teacher_disc"]`` (not for another ``key_added``)
        (n, K) float32; logits of the disc centred on each cell, before the mean over discs: what a student learns.
    ``uns["niche_history"]["teacher"]``
        Loss and effective number of niches, exp(entropy of the mean assignment), of each step.
    ``uns["histoniche"]["nolan"]``
        Provenance.

    Raises
    ------
    KeyError
        The embedding or the neighbour graph is missing.
    ValueError
        K below 2, more niches than training cells, NaN in the embedding or the same embedding of all training cells, a
        graph without an edge, no training cell; steps, batch size or temperature not positive.

    Warns
    -----
    UserWarning
        The niches collapsed in training, and the result is the mixture of neighbourhood means.

    References
    ----------
    Self-distillation: Caron et al. 2021, arXiv 2104.14294. NOLAN as the teacher of histology: arXiv 2604.09076.
    """
    target = open_target(data, table_key=table_key, copy=copy)
    table = target.table
    n_niches = whole("n_niches", n_niches)
    n_steps, batch_size, _, seed = training_settings(n_steps=n_steps, batch_size=batch_size, lr=1.0, seed=seed)
    teacher_temperature = positive("teacher_temperature", teacher_temperature)
    train = train_mask(table, split_key)
    check_n_niches(n_niches, int(train.sum()))
    xy = coordinates(target, spatial_key)
    embedding = features(table, use_rep)
    graph, radius = need_graph(table)
    result = fit_nolan(
        embedding,
        graph,
        xy,
        n_niches,
        radius=radius,
        train_cells=train,
        n_steps=n_steps,
        batch_size=batch_size,
        teacher_temperature=teacher_temperature,
        consensus=consensus,
        seed=seed,
    )
    if result.collapsed:
        warnings.warn(
            f"NOLAN's niches collapsed after {len(result.history['loss'])} steps; obs[{key_added!r}] holds the mixture "
            "of neighbourhood means instead. Fewer niches or another embedding may help.",
            stacklevel=2,
        )
    is_teacher = key_added == str(_keys.TEACHER)
    obs, uns = niche_columns(result.logits, key_added)
    history = {name: np.asarray(values, dtype=np.float32) for name, values in result.history.items()}
    obsm = {str(_keys.TEACHER_LOGITS) if is_teacher else f"{key_added}_logits": result.logits}
    if is_teacher:
        obsm[str(_keys.TEACHER_DISCS)] = result.discs
        uns[str(_keys.HISTORY)] = {**table.uns.get(str(_keys.HISTORY), {}), "teacher": history}
    return target.write(
        "nolan",
        params={
            "n_niches": n_niches, "n_steps": len(result.history["loss"]), "batch_size": batch_size, "seed": seed, "radius": radius,
            "teacher_temperature": teacher_temperature, "consensus": consensus, "collapsed": result.collapsed,
            "final_effective_niches": float(history["effective_niches"][-1]),
            "niches": [str(name) for name in obs[key_added].categories],  # of the logits' columns; obs may lose some
        },
        inputs={"use_rep": use_rep, "split_key": split_key, "spatial_key": spatial_key},
        obs=obs,
        obsm=obsm,
        uns=uns,
    )  # fmt: skip
