"""How well a student sees the teacher's niches on held-out tissue, beside the baselines it must beat."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from histoniche import _keys, metrics
from histoniche._sdata import coordinates, features, need_graph, open_target, origin
from histoniche._settings import settings
from histoniche.models._baselines import BaselineResult, histology_leiden, histology_nolan, linear_probe, sample_rows
from histoniche.neighbors import NeighborGraph, neighborhood_mean
from histoniche.pl._colors import niche_palette

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

BASELINES = ("histology_nolan", "histology_leiden", "probe_cell", "probe_neighborhood")
_UNALIGNED = ("histology_nolan", "histology_leiden")
_MAX_TRAIN = 60_000


def evaluate_niches(
    data: SpatialData | AnnData,
    *,
    niche_key: str = "niche",
    teacher_key: str = "niche_teacher",
    features_key: str | None = None,
    cell_type_key: str | None = None,
    annotation_key: str | None = None,
    split_key: str = "split",
    spatial_key: str = "spatial",
    baselines: Sequence[str] = BASELINES,
    n_steps: int | None = None,
    key_added: str = "niche_evaluation",
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Compare student and baselines with the teacher on the test cells.

    Baselines: NOLAN on histology features (``"histology_nolan"``), Leiden on histology features of the test cells
    (``"histology_leiden"``), logistic regression from the features of the cell (``"probe_cell"``) and of the cell
    beside the mean of its neighbourhood (``"probe_neighborhood"``). The probes are trained on the teacher's niches of
    training cells; the first two see no niche at all, and are given the teacher's number of niches.

    Parameters
    ----------
    data
        SpatialData with a table, or the table.
    niche_key
        Column of ``obs`` with the student's niches.
    teacher_key
        Column of ``obs`` with the teacher's niches.
    features_key
        Entry of ``obsm`` with the histology features of the baselines; by default those that the student was given.
    cell_type_key
        Column of ``obs`` with cell types, for the composition of niches.
    annotation_key
        Column of ``obs`` with regions, such as a pathologist's, for the probe of niches; cells without one are left
        out of it.
    split_key
        Column of ``obs`` with the values ``"train"`` and ``"test"``.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    baselines
        Which baselines to fit; none if empty.
    n_steps
        Steps of Histology NOLAN; by default as many as the teacher had.
    key_added
        Name of the table of figures in ``uns``.
    seed
        Seed of everything random.
    table_key
        Name of the table.
    copy
        Whether to return a copy instead of writing to ``data``.

    Returns
    -------
    ``None``, or the copy. Reads ``obs[niche_key]``, ``obs[teacher_key]``, ``obs[split_key]`` and, for the baselines,
    ``obsm[features_key]`` (n, d), ``obsp["niche_distances"]`` and ``obsm[spatial_key]`` in um. Writes:

    ``uns[key_added]``
        DataFrame, one row per model: ``student``, the baselines and, with an annotation, ``teacher``. On test cells:
        ``ari`` and ``nmi`` against the teacher; ``jsd``, the composition distance of :func:`histoniche.metrics.composition_jsd`
        (with ``cell_type_key``; clusters without the teacher's names are matched by Hungarian assignment); ``svm_f1``
        of :func:`histoniche.metrics.svm_probe_f1` (with ``annotation_key``); ``n_niches`` in use and
        ``effective_niches``; ``n_cells``; ``fit_s``, seconds that the baseline took.
    ``obs["niche_<baseline>"]``
        Categorical niches of the test cells, missing elsewhere; clusters carry the name of the niche they match best,
        ``extra_<i>`` those beyond the teacher's number. Colours in ``uns["niche_<baseline>_colors"]``.
    ``uns["histoniche"]["evaluate_niches"]``
        Provenance; ``params["fits"]`` has what the fits reported.

    Raises
    ------
    KeyError
        A column, the features or the neighbour graph is missing.
    ValueError
        No test or training cell, niches missing on those cells, an unknown baseline.

    References
    ----------
    arXiv 2604.09076 (figures and Histology NOLAN, Histology Leiden).
    """
    target = open_target(data, table_key=table_key, copy=copy)
    table = target.table
    columns: dict[str, Any] = {
        "niche_key": niche_key,
        "teacher_key": teacher_key,
        "split_key": split_key,
        "cell_type_key": cell_type_key,
        "annotation_key": annotation_key,
    }
    cells = _cells(table, **columns)
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        msg = f"baselines has {unknown}, which are unknown; there are {list(BASELINES)}."
        raise ValueError(msg)
    predicted: dict[str, np.ndarray] = {"student": cells.niche}
    fits: dict[str, BaselineResult] = {}
    seconds: dict[str, float] = {}
    if baselines:
        features_key = features_key or _features_of_student(table, niche_key)
        n_steps = n_steps or ((origin(table, "obs", teacher_key) or {}).get("params") or {}).get("n_steps")
        inputs = _Inputs(
            features(table, features_key), *need_graph(table), coordinates(target, spatial_key), cells, seed, n_steps
        )
        for name in tqdm(baselines, desc="Baselines", disable=not settings.progress):
            start = time.perf_counter()
            fits[name] = _FIT[name](inputs)
            seconds[name] = time.perf_counter() - start
            predicted[name] = fits[name].labels
    if annotation_key is not None:
        predicted["teacher"] = cells.teacher[cells.test]
    rows = {name: _figures(cells, name, labels, seed) for name, labels in predicted.items()}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    frame["fit_s"] = [seconds.get(name, np.nan) for name in frame.index]
    obs = {f"niche_{name}": _named(cells, name, fit.labels) for name, fit in fits.items()}
    uns = {_keys.colors(key): niche_palette(len(column.categories)) for key, column in obs.items()}
    return target.write(
        "evaluate_niches",
        params={
            "baselines": list(baselines),
            "seed": seed,
            "n_steps": n_steps,
            "fits": {name: fit.info for name, fit in fits.items()},
        },
        inputs={**columns, "features": features_key, "spatial_key": spatial_key},
        obs=obs,
        uns={**uns, key_added: frame},
    )


# ------------------------------------------------------------------------------------------------------------- cells
@dataclass(frozen=True)
class _Cells:
    """What is compared: niches as codes, all of the test cells but for the teacher's."""

    names: list[str]
    teacher: np.ndarray
    train: np.ndarray
    test: np.ndarray
    niche: np.ndarray
    cell_types: pd.Series | None
    annotation: pd.Series | None

    @property
    def reference(self) -> np.ndarray:
        return self.teacher[self.test]


def _cells(
    table: AnnData,
    *,
    niche_key: str,
    teacher_key: str,
    split_key: str,
    cell_type_key: str | None,
    annotation_key: str | None,
) -> _Cells:
    fixes = {
        niche_key: "run `hn.tl.distill_niches`",
        teacher_key: "run `hn.tl.nolan`",
        split_key: "run `hn.pp.spatial_holdout`",
    }
    for key in (niche_key, teacher_key, split_key, cell_type_key, annotation_key):
        if key is not None and key not in table.obs:
            fix = fixes.get(key, "name another column")
            msg = f"obs[{key!r}] is missing: {fix}; obs has {sorted(table.obs.columns)}."
            raise KeyError(msg)
    split = np.asarray(table.obs[split_key].astype(str))
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    for part, rows in (("test", test), ("train", train)):
        if len(rows) == 0:
            msg = f"obs[{split_key!r}] has no cell of the value {part!r}; it has {sorted(set(split))}."
            raise ValueError(msg)
    teacher = table.obs[teacher_key].astype("category")
    niche = table.obs[niche_key].astype("category")
    names = [str(name) for name in teacher.cat.categories]
    extra = [str(name) for name in niche.cat.categories if str(name) not in names]
    niche_codes = pd.Index([*names, *extra]).get_indexer(niche.astype(object).where(niche.notna(), "").astype(str))
    teacher_codes = teacher.cat.codes.to_numpy(dtype=np.int64)
    checks = (
        (niche_key, "test", niche_codes[test]),
        (teacher_key, "test", teacher_codes[test]),
        (teacher_key, "train", teacher_codes[train]),
    )
    for key, part, codes in checks:
        if (codes < 0).any():
            msg = (
                f"obs[{key!r}] is missing for {int((codes < 0).sum())} of {len(codes)} {part} cells: drop these cells."
            )
            raise ValueError(msg)
    cell_types = annotation = None
    if cell_type_key is not None:
        cell_types = table.obs[cell_type_key].iloc[test]
        if cell_types.isna().any():
            msg = (
                f"obs[{cell_type_key!r}] is missing for {int(cell_types.isna().sum())} test cells: name them 'unknown'."
            )
            raise ValueError(msg)
    if annotation_key is not None:
        annotation = table.obs[annotation_key].iloc[test]
        if annotation.nunique() < 2:
            msg = (
                f"obs[{annotation_key!r}] has {annotation.nunique()} class(es) on the test cells: the probe needs two."
            )
            raise ValueError(msg)
    return _Cells(names, teacher_codes, train, test, niche_codes[test].astype(np.int64), cell_types, annotation)


def _features_of_student(table: AnnData, niche_key: str) -> str:
    entry = origin(table, "obs", niche_key) or {}
    key = (entry.get("inputs") or {}).get("features")
    if key is None:
        msg = (
            f"Which features the student of obs[{niche_key!r}] was given is not recorded in uns['histoniche']: name them "
            f"with features_key=; obsm has {sorted(table.obsm)}."
        )
        raise KeyError(msg)
    return str(key).removeprefix("obsm/")


# --------------------------------------------------------------------------------------------------------- baselines
@dataclass(frozen=True)
class _Inputs:
    features: np.ndarray
    graph: NeighborGraph
    radius: float
    xy: np.ndarray
    cells: _Cells
    seed: int
    n_steps: int | None


def _nolan(x: _Inputs) -> BaselineResult:
    train = np.zeros(len(x.xy), dtype=bool)
    train[x.cells.train] = True
    options = {} if x.n_steps is None else {"n_steps": int(x.n_steps)}
    result = histology_nolan(
        x.features, x.graph, x.xy, len(x.cells.names), radius=x.radius, train_cells=train, seed=x.seed, **options
    )
    result.labels = result.labels[x.cells.test]
    return result


def _leiden(x: _Inputs) -> BaselineResult:
    return histology_leiden(x.features[x.cells.test], len(x.cells.names), seed=x.seed)


def _probe_cell(x: _Inputs) -> BaselineResult:
    train = sample_rows(x.cells.train, _MAX_TRAIN, x.seed)
    return linear_probe(x.features[train], x.cells.teacher[train], x.features[x.cells.test], seed=x.seed)


def _probe_neighborhood(x: _Inputs) -> BaselineResult:
    train = sample_rows(x.cells.train, _MAX_TRAIN, x.seed)
    mean = neighborhood_mean(x.graph, x.features)

    def both(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([x.features[rows].astype(np.float32), mean[rows]], axis=1)

    return linear_probe(both(train), x.cells.teacher[train], both(x.cells.test), seed=x.seed)


_FIT: dict[str, Callable[[_Inputs], BaselineResult]] = {
    "histology_nolan": _nolan,
    "histology_leiden": _leiden,
    "probe_cell": _probe_cell,
    "probe_neighborhood": _probe_neighborhood,
}


# ----------------------------------------------------------------------------------------------------------- figures
def _figures(cells: _Cells, name: str, labels: np.ndarray, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "ari": metrics.adjusted_rand(cells.reference, labels),
        "nmi": metrics.normalized_mutual_info(cells.reference, labels),
    }
    if cells.cell_types is not None:
        match: Literal["identity", "hungarian"] = "hungarian" if name in _UNALIGNED else "identity"
        row["jsd"] = metrics.composition_jsd(cells.reference, labels, cells.cell_types, match=match)
    if cells.annotation is not None:
        known = cells.annotation.notna().to_numpy()
        row["svm_f1"] = metrics.svm_probe_f1(labels[known], cells.annotation[known], seed=seed)
    row["n_niches"] = len(np.unique(labels))
    row["effective_niches"] = metrics.effective_number(labels)
    row["n_cells"] = len(labels)
    return row


def _named(cells: _Cells, name: str, labels: np.ndarray) -> pd.Categorical:
    """Niches of all cells: clusters take the name of the niche they match, cells outside the test have none."""
    categories = list(cells.names)
    if name in _UNALIGNED:
        renamed = metrics.match_labels(cells.reference, labels)
        n_extra = 0
        # A cluster beyond the matches takes a niche that is left over, and beyond those a name of its own.
        free = [code for code in range(len(categories)) if code not in renamed.values()]
        for cluster in np.unique(labels).tolist():
            if cluster not in renamed and free:
                renamed[cluster] = free.pop(0)
            elif cluster not in renamed:
                renamed[cluster] = len(categories)
                categories.append(f"extra_{n_extra}")
                n_extra += 1
        labels = np.array([renamed[cluster] for cluster in labels.tolist()], dtype=np.int64)
    codes = np.full(len(cells.teacher), -1, dtype=np.int64)
    codes[cells.test] = labels
    return pd.Categorical.from_codes(codes, categories=categories)
