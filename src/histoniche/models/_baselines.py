"""What a distilled student must beat: niches from histology alone, and linear probes of the features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

if TYPE_CHECKING:
    from histoniche.neighbors import NeighborGraph

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
    features: np.ndarray, n_components: int, *, fit_rows: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Principal components of standardised features.

    Parameters
    ----------
    features
        (n, d) of any float type, converted block by block.
    n_components
        Number of components; fewer where the data have fewer.
    fit_rows
        Rows that mean, deviation and components are fitted on (at most 50,000 of them, drawn at random); all by
        default.
    seed
        Seed of the draw and of the decomposition.

    Returns
    -------
    (n, n_components) float32.
    """
    rows = np.arange(len(features)) if fit_rows is None else fit_rows
    sample = np.asarray(features[sample_rows(rows, _FIT_ROWS, seed)], dtype=np.float32)
    scaler = StandardScaler(copy=False).fit(sample)
    n_components = min(n_components, *sample.shape)
    pca = PCA(n_components, svd_solver="randomized" if n_components < min(sample.shape) else "full", random_state=seed)
    pca.fit(scaler.transform(sample))
    out = np.empty((len(features), n_components), dtype=np.float32)
    for start in range(0, len(features), _BLOCK):
        block = np.array(features[start : start + _BLOCK], dtype=np.float32)
        out[start : start + _BLOCK] = pca.transform(scaler.transform(block))
    return out


def histology_leiden(
    features: np.ndarray,
    n_clusters: int,
    *,
    n_pcs: int = 30,
    n_neighbors: int = 15,
    max_cells: int = 50_000,
    seed: int = 0,
) -> BaselineResult:
    """Leiden clusters of histology features, as many as there are niches.

    Principal components of the standardised features, exact k nearest neighbours, edges weighted by the Jaccard index
    of the neighbourhoods, Leiden with the Reichardt-Bornholdt quality function. The resolution is found by bisection
    for the number of clusters alone, without any labels.

    Parameters
    ----------
    features
        (n, d) histology features.
    n_clusters
        Number of clusters wanted. Where no resolution gives it, the clustering with the nearest number is returned.
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
    Clusters (n,) int64, the largest first; ``info`` has the resolution, the number of clusters and of Leiden runs.

    Raises
    ------
    ValueError
        Fewer cells than neighbours or clusters.

    References
    ----------
    Traag, Waltman and van Eck 2019, Scientific Reports 9, 5233.
    """
    n = len(features)
    if n <= max(n_neighbors, n_clusters):
        msg = f"{n} cells are too few for {n_clusters} clusters in a graph of {n_neighbors} neighbours."
        raise ValueError(msg)
    rows = sample_rows(np.arange(n), max_cells, seed)
    reduced = reduce_features(features, n_pcs, fit_rows=rows, seed=seed)
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
    import leidenalg

    network = igraph.Graph(n=graph.shape[0], edges=np.column_stack([graph.row, graph.col]))

    def run(resolution: float) -> np.ndarray:
        found = leidenalg.find_partition(
            network,
            leidenalg.RBConfigurationVertexPartition,
            weights=graph.data,
            resolution_parameter=resolution,
            n_iterations=_LEIDEN_SWEEPS,
            seed=seed,
        )
        return np.asarray(found.membership, dtype=np.int64)

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
    features: np.ndarray,
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
        (n, d) histology features; reduced to principal components first, fitted on the training cells.
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
    logits = result.logits - result.logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    info = {"collapsed": result.collapsed, "n_components": reduced.shape[1]}
    return BaselineResult(result.logits.argmax(axis=1), probabilities, info)


def linear_probe(
    train_x: np.ndarray,
    train_labels: np.ndarray,
    test_x: np.ndarray,
    *,
    seed: int = 0,
    max_train: int = 60_000,
    max_iter: int = 200,
    regularization: float = 1.0,
) -> BaselineResult:
    """Multinomial logistic regression from standardised features to niches.

    Parameters
    ----------
    train_x
        (n, d) features of the training cells.
    train_labels
        (n,) their niches.
    test_x
        (m, d) features of the cells to label.
    seed
        Seed of the draw of training cells.
    max_train
        Most training cells that are used, drawn at random.
    max_iter
        Most iterations of the solver (L-BFGS).
    regularization
        Inverse strength C of the quadratic penalty.

    Returns
    -------
    Niches (m,) and probabilities (m, K), a column for each niche in ``info["classes"]``. ``info`` also has the number
    of training cells and iterations, and whether the solver converged.

    Raises
    ------
    ValueError
        Training cells of a single niche, or features that are not finite.
    """
    rows = sample_rows(np.arange(len(train_labels)), max_train, seed)
    y = np.asarray(train_labels)[rows]
    if len(np.unique(y)) < 2:
        msg = f"The training cells all lie in niche {np.unique(y).tolist()}: a probe needs at least two."
        raise ValueError(msg)
    x = np.array(train_x[rows], dtype=np.float32)
    scaler = StandardScaler(copy=False)
    x = scaler.fit_transform(x)
    model = LogisticRegression(C=regularization, max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    converged = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    probabilities = np.empty((len(test_x), len(model.classes_)), dtype=np.float32)
    for start in range(0, len(test_x), _BLOCK):
        block = np.array(test_x[start : start + _BLOCK], dtype=np.float32)
        probabilities[start : start + _BLOCK] = model.predict_proba(scaler.transform(block))
    info = {
        "classes": model.classes_,
        "n_train": len(rows),
        "n_iterations": int(model.n_iter_[0]),
        "converged": converged,
    }
    return BaselineResult(model.classes_[probabilities.argmax(axis=1)], probabilities, info)
