"""The baselines of an evaluation, and what several of them share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from histoniche._sdata import coordinates, need_graph, origin, slide_of_cell, streamed_features
from histoniche._settings import settings
from histoniche.models._baselines import (
    BaselineResult,
    cell_and_mean,
    coordinates_only,
    histology_leiden,
    histology_nolan,
    neighborhood_probe_labels,
    probe_labels,
    sample_rows,
)
from histoniche.models._linear_probe import ProbeData, fit_linear_probe
from histoniche.neighbors._graph import separate_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData

    from histoniche._sdata import Target
    from histoniche.models._features import FeatureSource
    from histoniche.neighbors import NeighborGraph

BASELINES = ("histology_nolan", "histology_leiden", "probe_cell", "probe_neighborhood", "coordinates_only")
UNALIGNED = ("histology_nolan", "histology_leiden")
"""Baselines whose niches have no names of their own."""
_MAX_TRAIN = 60_000
_BANDS, _HELD_OUT = 8, (2, 5)
"""Bands along x that the probes' training cells are cut into, and those on which the penalty is chosen."""


def check_baselines(baselines: Sequence[str]) -> None:
    """Refuse baselines that do not exist."""
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        msg = f"baselines has {unknown}, which are unknown; there are {list(BASELINES)}."
        raise ValueError(msg)


@dataclass(frozen=True)
class Inputs:
    """What baselines are fitted on.

    Attributes
    ----------
    features
        (n, d) histology features, in memory or on disk.
    graph, radius
        Neighbour graph, and its radius in um.
    xy, slide
        (n, 2) centroids in um, and the slide of every cell (n,).
    teacher
        (n,) codes of the teacher's niches; only those of training cells are read.
    n_niches
        K.
    train, test
        Rows of the training and the test cells.
    seed, n_steps
        Seed of everything random, and steps of Histology NOLAN.
    """

    features: np.ndarray | FeatureSource
    graph: NeighborGraph
    radius: float
    xy: np.ndarray
    slide: np.ndarray
    teacher: np.ndarray
    n_niches: int
    train: np.ndarray
    test: np.ndarray
    seed: int
    n_steps: int | None

    @cached_property
    def is_train(self) -> np.ndarray:
        """Training cells, (n,) bool."""
        mask = np.zeros(len(self.xy), dtype=bool)
        mask[self.train] = True
        return mask

    @cached_property
    def probe_rows(self) -> np.ndarray:
        """Training cells that the probes are fitted on."""
        return sample_rows(self.train, _MAX_TRAIN, self.seed)

    @cached_property
    def probe_data(self) -> ProbeData:
        """Their features, those of the cell first, then the mean of the neighbourhood."""
        return ProbeData.of(cell_and_mean(self.features, self.graph, self.probe_rows))

    @cached_property
    def held_out(self) -> np.ndarray:
        """Which of them the probes' penalty is chosen on: two wide bands, so that few of them lie beside the others."""
        x = separate_groups(self.xy, self.slide, self.radius)[self.probe_rows, 0]
        rank = np.argsort(np.argsort(x, kind="stable"))
        return np.isin(rank * _BANDS // len(x), _HELD_OUT)


def gather_inputs(
    target: Target,
    features_key: str,
    spatial_key: str,
    *,
    teacher: np.ndarray,
    n_niches: int,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
    n_steps: int | None,
) -> Inputs:
    """Read and check what the baselines need."""
    table = target.table
    return Inputs(
        streamed_features(table, features_key), *need_graph(table), coordinates(target, spatial_key),
        slide_of_cell(table), teacher, n_niches, train, test, seed, n_steps,
    )  # fmt: skip


def features_of_student(table: AnnData, niche_key: str) -> str:
    """Name of the features that the student of a column was given."""
    entry = origin(table, "obs", niche_key) or {}
    key = (entry.get("inputs") or {}).get("features")
    if key is None:
        msg = (
            f"Which features the student of obs[{niche_key!r}] was given is not recorded in uns['histoniche']: name them "
            f"with features_key=; obsm has {sorted(table.obsm)}."
        )
        raise KeyError(msg)
    return str(key).removeprefix("obsm/")


def fit_baselines(baselines: Sequence[str], inputs: Inputs) -> tuple[dict[str, BaselineResult], dict[str, float]]:
    """Niches of the test cells by each baseline, and the seconds that it took."""
    fits, seconds = {}, {}
    for name in tqdm(baselines, desc="Baselines", disable=not settings.progress):
        start = time.perf_counter()
        fits[name] = _FIT[name](inputs)
        seconds[name] = time.perf_counter() - start
    return fits, seconds


def _nolan(x: Inputs) -> BaselineResult:
    options = {} if x.n_steps is None else {"n_steps": int(x.n_steps)}
    result = histology_nolan(
        x.features, x.graph, x.xy, x.n_niches, radius=x.radius, train_cells=x.is_train, seed=x.seed, **options
    )
    result.labels = result.labels[x.test]
    return result


def _leiden(x: Inputs) -> BaselineResult:
    return histology_leiden(x.features, x.n_niches, cells=x.test, seed=x.seed)


def _probe_cell(x: Inputs) -> BaselineResult:
    data = x.probe_data.first(x.features.shape[1])
    probe = fit_linear_probe(data, x.teacher[x.probe_rows], held_out=x.held_out)
    return probe_labels(probe, x.features, x.test)


def _probe_neighborhood(x: Inputs) -> BaselineResult:
    probe = fit_linear_probe(x.probe_data, x.teacher[x.probe_rows], held_out=x.held_out)
    return neighborhood_probe_labels(probe, x.features, x.graph, x.test)


def _coordinates(x: Inputs) -> BaselineResult:
    return coordinates_only(x.xy, x.teacher, x.is_train, rows=x.test, groups=x.slide)


_FIT: dict[str, Callable[[Inputs], BaselineResult]] = {
    "histology_nolan": _nolan,
    "histology_leiden": _leiden,
    "probe_cell": _probe_cell,
    "probe_neighborhood": _probe_neighborhood,
    "coordinates_only": _coordinates,
}
