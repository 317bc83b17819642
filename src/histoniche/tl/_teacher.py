"""What a table holds of the teacher, and whether it fits together."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from histoniche import _keys
from histoniche._sdata import features, origin
from histoniche.models._predict import consensus

if TYPE_CHECKING:
    from anndata import AnnData

    from histoniche.neighbors import NeighborGraph

_LEAST_AGREEMENT = 0.75
"""Share of the training cells in which discs and labels of one teacher agree at least; less than all, since cells that were selected lose neighbours."""


def learnt_key(table: AnnData, graph: NeighborGraph, train: np.ndarray) -> str:
    """Entry of ``obsm`` that a student learns: the logits of the discs; those of the labels where there are no others.

    The labels are the mean over discs. A student that learnt that mean, and whose labels are a mean over discs as well,
    would smooth twice.
    """
    key, discs = str(_keys.TEACHER_LOGITS), str(_keys.TEACHER_DISCS)
    if discs not in table.obsm:
        return key
    given, niche = features(table, discs), features(table, key)[train].argmax(axis=1)
    if given.shape[1] == table.obsm[key].shape[1]:
        agreement = max((found[train].argmax(axis=1) == niche).mean() for found in (consensus(graph, given), given))
        if agreement >= _LEAST_AGREEMENT:
            return discs
        what = f"agrees with it in {agreement:.0%} of the training cells"
    else:
        what = f"has {given.shape[1]} niches, not {table.obsm[key].shape[1]}"
    msg = (
        f"obsm[{discs!r}] is not what obsm[{key!r}] was made of: it {what}. Run `hn.tl.nolan` anew, or delete "
        f"obsm[{discs!r}] to have the student learn obsm[{key!r}]."
    )
    raise ValueError(msg)


def warn_if_smoothed_twice(table: AnnData, taught: str) -> None:
    """Tell that a student learns labels that are a mean over discs already; those of the user's own are taken as they are."""
    entry = origin(table, "obsm", taught) or {"params": {}}
    if taught == str(_keys.TEACHER_LOGITS) and entry["params"].get("consensus"):
        warnings.warn(
            f"obsm[{str(_keys.TEACHER_DISCS)!r}] is missing, so the student learns obsm[{taught!r}], which is a mean over discs "
            "already, and is smoother than its teacher: run `hn.tl.nolan` anew to have it learn the discs.",
            UserWarning,
            stacklevel=4,
        )


def teacher_names(table: AnnData, n_niches: int) -> list[str]:
    """Names of the columns of the teacher's logits.

    Those that the teacher recorded, since anndata drops categories without a cell from a subset; the categories of the
    column where they were renamed.
    """
    key, logits_key = str(_keys.TEACHER), str(_keys.TEACHER_LOGITS)
    if key not in table.obs:
        msg = f"obs[{key!r}], the niches of obsm[{logits_key!r}], is missing: run `hn.tl.nolan` anew, or put the column back."
        raise KeyError(msg)
    column = table.obs[key]
    if not isinstance(column.dtype, pd.CategoricalDtype):
        msg = (
            f"obs[{key!r}] is {column.dtype}, not categorical, so the order of the niches is unknown: run `hn.tl.nolan` "
            f"anew, or `pd.Categorical(column, categories=[...])` with the {n_niches} names in the order of obsm[{logits_key!r}]."
        )
        raise TypeError(msg)
    found = [str(name) for name in column.cat.categories]
    entry = origin(table, "obsm", logits_key) or {"params": {}}
    recorded = [str(name) for name in entry["params"].get("niches", [])]
    if len(recorded) == n_niches and set(found) <= set(recorded):
        return recorded
    if len(found) == n_niches:
        return found
    msg = (
        f"obs[{key!r}] has {len(found)} categories, {found}, for the {n_niches} columns of obsm[{logits_key!r}]: anndata drops "
        "categories without a cell from a subset. Put them back with `.cat.set_categories([...])`, in the order of the "
        "columns, or run `hn.tl.nolan` anew."
    )
    raise ValueError(msg)


def learnt_from(table: AnnData, split_key: str, logits_key: str) -> dict[str, str]:
    """Digests of split and teacher's logits, by the cells' names: the number of cells, and a sum over them in any order."""
    values = {}
    if split_key in table.obs:
        values["split_digest"] = np.asarray(table.obs[split_key].astype(str), dtype=object)
    if logits_key in table.obsm:
        values["teacher_digest"] = np.asarray(table.obsm[logits_key])
    names = np.asarray(table.obs_names, dtype=object)
    digests = {}
    for name, value in values.items():
        rows = pd.util.hash_pandas_object(pd.DataFrame(value, index=names)).to_numpy(dtype=np.uint64)
        digests[name] = f"{len(rows)}-{int(rows.sum(dtype=np.uint64)):016x}"
    return digests
