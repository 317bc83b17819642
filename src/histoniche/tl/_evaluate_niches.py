"""How well a student sees the teacher's niches on held-out tissue, beside the baselines it must beat."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from histoniche import _keys, metrics
from histoniche._sdata import coordinates, open_target, origin, slide_of_cell
from histoniche.models._checks import whole
from histoniche.pl._colors import niche_palette

from ._baseline_fits import (
    BASELINES,
    UNALIGNED,
    check_baselines,
    features_of_student,
    fit_baselines,
    gather_inputs,
)
from ._teacher import learnt_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

    from histoniche._sdata import Target
    from histoniche.models._baselines import BaselineResult

_BLOCK_RADII = 8
_CONFIDENCE = 0.95
_GAINS = ("ari", "nmi")


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
    block_um: float | None = None,
    n_boot: int = 1000,
    key_added: str = "niche_evaluation",
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Compare student and baselines with the teacher on the test cells.

    Baselines that see no niche, and are given the teacher's number of them: NOLAN on histology features
    (``"histology_nolan"``) and Leiden on histology features of the test cells (``"histology_leiden"``). Baselines
    trained on the teacher's niches of training cells: logistic regression from the features of the cell
    (``"probe_cell"``) and of the cell beside the mean of its neighbourhood (``"probe_neighborhood"``), its penalty
    chosen on two bands of training cells; and the vote of the nearest training cells (``"coordinates_only"``), which sees
    no histology at all.

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
    block_um
        Side in um of the blocks of tissue that are resampled for the intervals; by default 8 radii of the
        neighbourhoods.
    n_boot
        Number of resamples; 0 for no intervals.
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
    ``None``, or the copy. Reads ``obs[niche_key]``, ``obs[teacher_key]``, ``obs[split_key]``, ``obsm[spatial_key]`` in
    um and, for the baselines, ``obsm[features_key]`` (n, d), which may lie on disk, and ``obsp["niche_distances"]``.
    Writes:

    ``uns[key_added]``
        DataFrame, one row per model: ``student``, the baselines and, with an annotation, ``teacher``. On test cells:
        ``ari`` and ``nmi`` against the teacher; ``jsd``, the composition distance of :func:`histoniche.metrics.composition_jsd`
        (with ``cell_type_key``; clusters without the teacher's names are matched by Hungarian assignment), each with
        ``*_low`` and ``*_high``, its 95 % interval by spatial block bootstrap
        (:func:`histoniche.metrics.bootstrap_agreement`); ``svm_f1`` of :func:`histoniche.metrics.svm_probe_f1` (with
        ``annotation_key``); ``n_niches`` in use and ``effective_niches``; ``n_cells``; ``ari_gain`` and ``nmi_gain``,
        the student's figure minus the baseline's, with a paired interval; ``fit_s``, seconds that the baseline took
        (the first of the probes includes what both need).
    ``obs["niche_<baseline>"]``
        Categorical niches of the test cells, missing elsewhere; clusters carry the name of the niche they match best,
        ``extra_<i>`` those beyond the teacher's number. Colours in ``uns["niche_<baseline>_colors"]``.
    ``uns["histoniche"]["evaluate_niches"]``
        Provenance; ``params["fits"]`` has what the fits reported, ``params["block_um"]`` and ``params["n_blocks"]``
        the blocks.

    Raises
    ------
    KeyError
        A column, the features or the neighbour graph is missing.
    ValueError
        No test or training cell, niches missing on those cells, an unknown baseline, ``block_um`` with which all test
        cells lie in one block.

    Warns
    -----
    UserWarning
        ``obs[split_key]`` or the teacher's logits are not those that the student was distilled with, so that it may have
        learnt from test cells, or of other niches. Not told of tables with more or fewer cells than then.

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
    seed = whole("seed", seed, 0)
    cells = _cells(table, **columns)
    _warn_of_changes(table, niche_key, split_key)
    check_baselines(baselines)
    blocks = _blocks(target, cells, spatial_key, block_um, n_boot)
    predicted: dict[str, np.ndarray] = {"student": cells.niche}
    fits: dict[str, BaselineResult] = {}
    seconds: dict[str, float] = {}
    if baselines:
        features_key = features_key or features_of_student(table, niche_key)
        n_steps = n_steps or ((origin(table, "obs", teacher_key) or {}).get("params") or {}).get("n_steps")
        inputs = gather_inputs(
            target, features_key, spatial_key, teacher=cells.teacher, n_niches=len(cells.names), train=cells.train,
            test=cells.test, seed=seed, n_steps=n_steps,
        )  # fmt: skip
        fits, seconds = fit_baselines(baselines, inputs)
        predicted |= {name: fit.labels for name, fit in fits.items()}
    if annotation_key is not None:
        predicted["teacher"] = cells.reference
    frame = _table_of_figures(cells, predicted, blocks, seed)
    frame["fit_s"] = [seconds.get(name, np.nan) for name in frame.index]
    obs = {f"niche_{name}": _named(cells, name, fit.labels) for name, fit in fits.items()}
    uns = {_keys.colors(key): niche_palette(len(column.categories)) for key, column in obs.items()}
    return target.write(
        "evaluate_niches",
        params={
            "baselines": list(baselines),
            "seed": seed,
            "n_steps": n_steps,
            "n_boot": n_boot,
            **({} if blocks is None else {"block_um": blocks.side, "n_blocks": blocks.number}),
            "fits": {name: fit.info for name, fit in fits.items()},
        },
        inputs={**columns, "features": features_key, "spatial_key": spatial_key},
        obs=obs,
        uns={**uns, key_added: frame},
    )


# ------------------------------------------------------------------------------------------------------------ blocks
@dataclass(frozen=True)
class _Blocks:
    """Where the test cells lie, how they are cut into blocks, and how many resamples are drawn."""

    xy: np.ndarray
    slide: np.ndarray
    side: float
    n_boot: int

    @property
    def number(self) -> int:
        return int(metrics.spatial_blocks(self.xy, self.side, groups=self.slide).max()) + 1


def _blocks(target: Target, cells: _Cells, spatial_key: str, block_um: float | None, n_boot: int) -> _Blocks | None:
    """Blocks of the test cells; ``None`` where no interval is wanted, or none can be had."""
    if n_boot == 0:
        return None
    side = block_um
    if side is None:
        neighbors = target.table.uns.get(str(_keys.NEIGHBORS))
        if neighbors is None:
            msg = (
                f"block_um is 8 radii of the neighbourhoods by default, but uns[{str(_keys.NEIGHBORS)!r}] is missing: pass "
                "block_um= (a length in um), run `hn.pp.spatial_neighbors`, or leave intervals out with n_boot=0."
            )
            raise ValueError(msg)
        side = _BLOCK_RADII * float(neighbors["params"]["radius"])
    xy = coordinates(target, spatial_key)[cells.test]
    blocks = _Blocks(xy, slide_of_cell(target.table)[cells.test], float(side), n_boot)
    if blocks.number == 1 and block_um is None:
        warnings.warn(
            f"The test cells lie in one block of {side:.0f} um (8 radii), so there are no intervals: pass a smaller "
            "block_um= for some, or n_boot=0.",
            UserWarning,
            stacklevel=3,
        )
        return None
    if blocks.number == 1:
        msg = f"All test cells lie in one block with block_um={block_um}: pass a smaller one, or n_boot=0."
        raise ValueError(msg)
    return blocks


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


def _warn_of_changes(table: AnnData, niche_key: str, split_key: str) -> None:
    """Warn where split or teacher are not those that the student was distilled with."""
    entry = origin(table, "obs", niche_key) or {"params": {}}
    then = entry["params"]
    if "teacher_digest" not in then:
        return
    logits_key = str(entry["inputs"]["teacher"])
    now = learnt_from(table, split_key, logits_key)
    why = {
        "split_digest": (f"obs[{split_key!r}]", "it may have learnt from test cells"),
        "teacher_digest": (f"obsm[{logits_key!r}]", "it learnt of other niches"),
    }
    for name, (field, consequence) in why.items():
        before, after = str(then.get(name, "none")), now.get(name, "none")
        same_cells = str(then["teacher_digest"]).split("-")[0] == str(table.n_obs)
        if same_cells and before != after:
            warnings.warn(
                f"{field} is not what the student of obs[{niche_key!r}] was distilled with, so {consequence}: run "
                "`hn.tl.distill_niches` anew, or put it back.",
                UserWarning,
                stacklevel=3,
            )


# ----------------------------------------------------------------------------------------------------------- figures
def _table_of_figures(
    cells: _Cells, predicted: dict[str, np.ndarray], blocks: _Blocks | None, seed: int
) -> pd.DataFrame:
    """One row per model."""
    rows = {name: _figures(cells, name, labels, seed) for name, labels in predicted.items()}
    if blocks is not None:
        found = metrics.bootstrap_agreement(
            cells.reference, predicted, blocks.xy, block_um=blocks.side, cell_types=cells.cell_types, unaligned=UNALIGNED,
            n_boot=blocks.n_boot, confidence=_CONFIDENCE, seed=seed, groups=blocks.slide,
        )  # fmt: skip
        for name, row in rows.items():
            intervals = dict(found[name])
            if name in BASELINES:
                intervals |= {f"{key}_gain": found["student"][key].minus(found[name][key]) for key in _GAINS}
            for key, interval in intervals.items():
                row |= {key: interval.estimate, f"{key}_low": interval.low, f"{key}_high": interval.high}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    with_interval = [f"{key}{end}" for key in ("ari", "nmi", "jsd") for end in ("", "_low", "_high")]
    gains = [f"{key}_gain{end}" for key in _GAINS for end in ("", "_low", "_high")]
    order = [*with_interval, "svm_f1", "n_niches", "effective_niches", "n_cells", *gains]
    return frame[[column for column in order if column in frame]]


def _figures(cells: _Cells, name: str, labels: np.ndarray, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "ari": metrics.adjusted_rand(cells.reference, labels),
        "nmi": metrics.normalized_mutual_info(cells.reference, labels),
    }
    if cells.cell_types is not None:
        match: Literal["identity", "hungarian"] = "hungarian" if name in UNALIGNED else "identity"
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
    if name in UNALIGNED:
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
