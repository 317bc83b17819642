"""What a distilled student must beat: niches from histology alone, linear probes of the features, and position."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from histoniche._random import isolated_rng
from histoniche.neighbors import neighborhood_mean

from ._features import take

if TYPE_CHECKING:
    from histoniche.neighbors import NeighborGraph

    from ._features import FeatureSource
    from ._linear_probe import LinearProbe

_BLOCK = 16_384
"""Rows that are converted to float32 at a time."""
_FIT_ROWS = 50_000
"""Rows that a PCA is fitted on."""
_LEIDEN_RUNS = 24
_LEIDEN_SWEEPS = 2


@dataclass
class BaselineResult:
    """Niches of a baseline.

    Attributes
    ----------
    labels
        (n,) niche of each cell.
    probabilities
        (n, K) float32, where the baseline has them.
    info
        What is worth reporting about the fit.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)


def sample_rows(rows: np.ndarray, n_max: int, seed: int) -> np.ndarray:
    """At most ``n_max`` of the rows, drawn without replacement, in ascending order."""
    if len(rows) <= n_max:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, n_max, replace=False))


def reduce_features(
    features: np.ndarray | FeatureSource,
    n_components: int,
    *,
    rows: np.ndarray | None = None,
    fit_rows: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Principal components of standardised features.

    Parameters
    ----------
    features
        (n, d) of any float type, in memory or on disk, read block by block.
    n_components
        Number of components; fewer where the data have fewer.
    rows
        Cells whose components are wanted; all by default.
    fit_rows
        Cells that mean, deviation and components are fitted on (at most 50,000 of them, drawn at random); by default
        those that are wanted.
    seed
        Seed of the draw and of the decomposition.

    Returns
    -------
    (n, n_components) float32, of the ``rows``.
    """
    rows = np.arange(features.shape[0]) if rows is None else rows
    sample = take(features, sample_rows(rows if fit_rows is None else fit_rows, _FIT_ROWS, seed))
    scaler = StandardScaler(copy=False).fit(sample)
    n_components = min(n_components, *sample.shape)
    pca = PCA(n_components, svd_solver="randomized" if n_components < min(sample.shape) else "full", random_state=seed)
    pca.fit(scaler.transform(sample))
    out = np.empty((len(rows), n_components), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = take(features, rows[start : start + _BLOCK])
        out[start : start + _BLOCK] = pca.transform(scaler.transform(block))
    return out


def cell_and_mean(features: np.ndarray | FeatureSource, graph: NeighborGraph, rows: np.ndarray) -> np.ndarray:
    """Features of some cells beside the mean of their neighbourhoods, the cells included.

    Parameters
    ----------
    features
        (n, d) features, in memory or on disk; all are read once, block by block.
    graph
        Neighbour graph of the n cells.
    rows
        (m,) cells.

    Returns
    -------
    (m, 2 d) float32.
    """
    n, d = features.shape
    out = np.zeros((len(rows), 2 * d), dtype=np.float32)
    ones = sparse.csr_matrix((np.ones(len(graph.indices), dtype=np.float32), graph.indices, graph.indptr), shape=(n, n))
    near = (ones + sparse.identity(n, dtype=np.float32, format="csr"))[rows].tocsc()
    place = np.full(n, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    for start in range(0, n, _BLOCK):
        cells = np.arange(start, min(start + _BLOCK, n))
        block = take(features, cells)
        here = place[cells] >= 0
        out[place[cells[here]], :d] = block[here]
        part = near[:, start : start + _BLOCK].tocsr()
        touched = np.flatnonzero(np.diff(part.indptr))
        out[touched, d:] += part[touched] @ block
    out[:, d:] /= (graph.counts[rows] + 1).astype(np.float32)[:, None]
    return out


def probe_labels(probe: LinearProbe, features: np.ndarray | FeatureSource, rows: np.ndarray) -> BaselineResult:
    """Niches of some cells by a probe of the cell's features.

    Parameters
    ----------
    probe
        Probe of d features.
    features
        (n, d) features, in memory or on disk.
    rows
        (m,) cells.

    Returns
    -------
    Niches (m,) and probabilities (m, K), a column for each of the probe's classes.
    """
    logits = np.empty((len(rows), len(probe.classes)), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = take(features, rows[start : start + _BLOCK])
        logits[start : start + _BLOCK] = block @ probe.weights + probe.intercept
    return BaselineResult(probe.classes[logits.argmax(axis=1)], softmax(logits, axis=1), dict(probe.info))


def neighborhood_probe_labels(
    probe: LinearProbe, features: np.ndarray | FeatureSource, graph: NeighborGraph, rows: np.ndarray
) -> BaselineResult:
    """Niches of some cells by a probe of the cell's features beside the mean of its neighbourhood.

    A mean of projections is the projection of the mean: every cell is projected to K numbers once, and these are
    averaged, so that the means of the features need not be held.

    Parameters
    ----------
    probe
        Probe of 2 d features, of :func:`cell_and_mean`.
    features
        (n, d) features, in memory or on disk.
    graph
        Neighbour graph of the n cells.
    rows
        (m,) cells.

    Returns
    -------
    Niches (m,) and probabilities (m, K), a column for each of the probe's classes.
    """
    n, d = features.shape
    both = np.concatenate([probe.weights[:d], probe.weights[d:]], axis=1)
    projected = np.empty((n, both.shape[1]), dtype=np.float32)
    for start in range(0, n, _BLOCK):
        projected[start : start + _BLOCK] = take(features, np.arange(start, min(start + _BLOCK, n))) @ both
    k = len(probe.classes)
    logits = projected[rows, :k] + neighborhood_mean(graph, projected[:, k:])[rows] + probe.intercept
    return BaselineResult(probe.classes[logits.argmax(axis=1)], softmax(logits, axis=1), dict(probe.info))


def histology_leiden(
    features: np.ndarray | FeatureSource,
    n_clusters: int,
    *,
    cells: np.ndarray | None = None,
    n_pcs: int = 30,
    n_neighbors: int = 15,
    max_cells: int = 50_000,
    seed: int = 0,
) -> BaselineResult:
    """Leiden clusters of histology features, as many as there are niches.

    Principal components of the standardised features, exact k nearest neighbours, edges weighted by the Jaccard index
    of the neighbourhoods, Leiden (igraph's) on modularity with a resolution, found by bisection for the number of
    clusters alone, without any labels.

    Parameters
    ----------
    features
        (n, d) histology features, in memory or on disk.
    n_clusters
        Number of clusters wanted. Where no resolution gives it, the clustering with the nearest number is returned.
    cells
        (m,) cells to cluster, the only ones that are read; all by default.
    n_pcs
        Number of principal components.
    n_neighbors
        Number of neighbours in the graph.
    max_cells
        Cells beyond this number are not clustered: they get the cluster of their nearest clustered cell.
    seed
        Seed of the decomposition, of Leiden and of the draw.

    Returns
    -------
    Clusters (m,) int64, the largest first; ``info`` has the resolution, the number of clusters and of Leiden runs.

    Raises
    ------
    ValueError
        Fewer cells than neighbours or clusters.

    References
    ----------
    Traag, Waltman and van Eck 2019, Scientific Reports 9, 5233.
    """
    cells = np.arange(features.shape[0]) if cells is None else cells
    n = len(cells)
    if n <= max(n_neighbors, n_clusters):
        msg = f"{n} cells are too few for {n_clusters} clusters in a graph of {n_neighbors} neighbours."
        raise ValueError(msg)
    rows = sample_rows(np.arange(n), max_cells, seed)
    reduced = reduce_features(features, n_pcs, rows=cells, fit_rows=cells[rows], seed=seed)
    search = NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute").fit(reduced[rows])
    clusters, info = _leiden(_jaccard_graph(search.kneighbors(return_distance=False)), n_clusters, seed)
    labels = np.empty(n, dtype=np.int64)
    labels[rows] = clusters
    rest = np.setdiff1d(np.arange(n), rows, assume_unique=True)
    if len(rest):
        labels[rest] = clusters[search.kneighbors(reduced[rest], 1, return_distance=False)[:, 0]]
    return BaselineResult(labels, info=info)


def _jaccard_graph(neighbors: np.ndarray) -> sparse.coo_matrix:
    """Undirected graph (upper triangle) of k nearest neighbours, weighted by the overlap of the neighbourhoods."""
    n, k = neighbors.shape
    indptr = np.arange(0, n * (k + 1) + 1, k + 1)
    indices = np.column_stack([np.arange(n), neighbors]).ravel()
    near = sparse.csr_matrix((np.ones(len(indices), dtype=np.float32), indices, indptr), shape=(n, n))
    edges = sparse.triu(near.maximum(near.T), k=1, format="csr")
    shared = (near @ near.T).multiply(edges).tocoo()
    # Every cell is in its own list, so the ends of an edge share at least one cell, and no edge has weight zero.
    shared.data = shared.data / (2 * (k + 1) - shared.data)
    return shared


def _leiden(graph: sparse.coo_matrix, n_clusters: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Clusters (n,), largest first, at the resolution whose number of clusters is nearest to the one wanted."""
    import igraph

    network = igraph.Graph(n=graph.shape[0], edges=np.column_stack([graph.row, graph.col]))

    def run(resolution: float) -> np.ndarray:
        with isolated_rng(seed):
            found = network.community_leiden(
                "modularity", weights=graph.data, resolution=resolution, n_iterations=_LEIDEN_SWEEPS
            )
        clusters = np.asarray(found.membership, dtype=np.int64)
        return np.argsort(np.argsort(-np.bincount(clusters), kind="stable"))[clusters]

    low, high, resolution = 0.0, np.inf, 0.5
    best, best_resolution, best_miss, runs = np.empty(0, dtype=np.int64), np.nan, np.inf, 0
    while best_miss > 0 and runs < _LEIDEN_RUNS and high - low > 1e-4 * resolution:
        clusters = run(resolution)
        runs += 1
        achieved = int(clusters.max()) + 1
        if abs(achieved - n_clusters) < best_miss:
            best, best_resolution, best_miss = clusters, resolution, abs(achieved - n_clusters)
        if achieved < n_clusters:
            low = resolution
        else:
            high = resolution
        if np.isinf(high):
            resolution *= 2
        else:
            resolution = float(np.sqrt(low * high)) if low > 0 else high / 2
    info = {"resolution": best_resolution, "n_clusters": int(best.max()) + 1, "leiden_runs": runs}
    return best, info


def histology_nolan(
    features: np.ndarray | FeatureSource,
    graph: NeighborGraph,
    xy: np.ndarray,
    n_niches: int,
    *,
    radius: float,
    train_cells: np.ndarray,
    n_components: int = 30,
    seed: int = 0,
    **options: Any,
) -> BaselineResult:
    """NOLAN on histology features: the same self-distillation as the teacher's, without molecules.

    Parameters
    ----------
    features
        (n, d) histology features, in memory or on disk; reduced to principal components first, fitted on the training cells.
    graph
        Neighbour graph at ``radius``.
    xy
        (n, 2) centroids in um.
    n_niches
        K.
    radius
        Radius of the neighbourhoods in um.
    train_cells
        (n,) bool, cells that NOLAN and the reduction are fitted on.
    n_components
        Number of principal components.
    seed
        Seed of everything random.
    **options
        Passed on to :func:`fit_nolan`.

    Returns
    -------
    Niches (n,) int64 and their probabilities (n, K) of all cells; ``info`` says whether the niches collapsed.
    """
    from ._nolan import fit_nolan

    reduced = reduce_features(features, n_components, fit_rows=np.flatnonzero(train_cells), seed=seed)
    result = fit_nolan(
        reduced,
        graph,
        xy,
        n_niches,
        radius=radius,
        train_cells=train_cells,
        seed=seed,
        description="Histology NOLAN",
        **options,
    )
    info = {"collapsed": result.collapsed, "n_components": reduced.shape[1]}
    return BaselineResult(result.logits.argmax(axis=1), softmax(result.logits, axis=1), info)


def coordinates_only(
    xy: np.ndarray,
    niches: np.ndarray,
    train_cells: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    n_neighbors: int | None = None,
) -> BaselineResult:
    """Niches from position alone: the vote of the nearest training cells.

    Niches are large and layered, so that where a cell lies says much about its niche, whatever it looks like. Distances
    are measured after both axes were standardised (on the training cells of each slide): where the test cells are a
    strip between two training parts, the votes of both sides then count.

    Parameters
    ----------
    xy
        (n, 2) centroids in um.
    niches
        (n,) niches of the teacher; only those of the training cells are read.
    train_cells
        (n,) bool, training cells.
    rows
        Cells to label; all by default.
    groups
        (n,) slide of each cell; cells of one slide do not vote in another, unless that has no training cells.
    n_neighbors
        Number of votes; by default one in a hundred training cells, between 10 and 100.

    Returns
    -------
    Niches of the ``rows``; ``info`` has the number of votes.

    Raises
    ------
    ValueError
        No training cells.

    References
    ----------
    Cover and Hart 1967, IEEE Transactions on Information Theory 13, 21-27.
    """
    if not train_cells.any():
        msg = "train_cells holds no cell: there is nothing to learn positions from."
        raise ValueError(msg)
    rows = np.arange(len(xy)) if rows is None else rows
    place = _standard_places(xy, train_cells, np.zeros(len(xy), dtype=np.int64) if groups is None else groups)
    n_train = int(train_cells.sum())
    n_neighbors = min(n_neighbors or min(max(n_train // 100, 10), 100), n_train)
    model = KNeighborsClassifier(n_neighbors, algorithm="kd_tree").fit(place[train_cells], niches[train_cells])
    labels = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), _BLOCK):
        labels[start : start + _BLOCK] = model.predict(place[rows[start : start + _BLOCK]])
    return BaselineResult(labels, info={"n_neighbors": n_neighbors})


def _standard_places(xy: np.ndarray, train_cells: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standardised positions (n, 2), slide beside slide with a gap that no neighbour is looked for across."""
    place = np.empty((len(xy), 2))
    values, code = np.unique(groups, return_inverse=True)
    for group in range(len(values)):
        inside = code == group
        fitted = inside & train_cells
        scaler = StandardScaler().fit(xy[fitted if fitted.any() else inside])
        place[inside] = scaler.transform(xy[inside])
    place[:, 0] += code * (4 * np.abs(place).max() + 1)
    return place
