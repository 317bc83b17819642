"""Settings of the kidney benchmark, compared on validation parts inside the training part.

Made to cost a minute: niches are k-means of neighbourhood means, where the teacher starts, and they are told from the histology by
logistic regression on principal components of the bin's features and of its neighbourhood's mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import histoniche as hn
from histoniche.neighbors import NeighborGraph, neighborhood_mean, radius_graph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

STRIPS = (0, 3)
"""Upright quarters of the training part that are validated on: the two that hold glomeruli."""
N_COMPONENTS = 60
Values = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """The training bins, and which of them are fitted on and validated on."""

    rows: np.ndarray
    graph: NeighborGraph
    fit: np.ndarray
    scored: np.ndarray


def trials_of(table: AnnData, radius: float, buffer: float) -> Iterator[Trial]:
    """One trial for each validation strip; bins within the buffer on either side of it are left out."""
    rows = np.flatnonzero((table.obs["split"] == "train").to_numpy())
    xy = table.obsm["spatial"][rows]
    graph, x = radius_graph(xy, radius), xy[:, 0]
    edges = np.linspace(x.min(), x.max(), 5)
    for strip in STRIPS:
        low, high = edges[strip], edges[strip + 1]
        yield Trial(rows, graph, (x < low - buffer) | (x > high + buffer), (x >= low) & (x <= high))


def niches_of(embedding: np.ndarray, trial: Trial, k: int) -> np.ndarray:
    """k-means of neighbourhood means, fitted on the bins to fit on."""
    means = neighborhood_mean(trial.graph, embedding.astype(np.float32))
    return KMeans(k, n_init=3, random_state=0).fit(means[trial.fit]).predict(means)


def embeddings(table: AnnData, trials: list[Trial], names: dict[str, Values], k: int) -> list[Values]:
    """How much of the expression of validation bins the niches of each embedding explain.

    Each count goes to one of two halves at random. Niches are made from the first; the second of the validation bins is
    scored: log-likelihood per count of the genes' shares in the bin's niche, less that of their shares everywhere, both as
    the bins to fit on have them.
    """
    counts = sparse.csr_matrix(table.X)
    half = counts.copy()
    half.data = np.random.default_rng(0).binomial(counts.data.astype(int), 0.5).astype(np.float32)
    other = sparse.csr_matrix(counts - half)
    half.eliminate_zeros()
    found = []
    for name, options in names.items():
        gains = []
        for trial in trials:
            sub = table[trial.rows].copy()
            sub.X = half[trial.rows]
            sub.obs["split"] = np.where(trial.fit, "train", "test")
            hn.tl.molecular_embedding(sub, **options, empty_cells="mean", key_added="trial")
            niches = niches_of(sub.obsm["trial"], trial, k)
            gains.append(_gain(other[trial.rows], niches, trial))
        found.append({"embedding": name, "k": k, "gain": 1000 * float(np.mean(gains))})
        print(found[-1], flush=True)
    return found


def _gain(counts: sparse.csr_matrix, niches: np.ndarray, trial: Trial) -> float:
    def shares(rows: np.ndarray) -> np.ndarray:
        total = np.asarray(counts[rows].sum(axis=0)).ravel() + 0.1
        return total / total.sum()

    everywhere, gain = shares(trial.fit), 0.0
    for niche in np.unique(niches):
        weight = np.log(shares(trial.fit & (niches == niche)) / everywhere)
        gain += float((counts[trial.scored & (niches == niche)] @ weight).sum())
    return gain / float(counts[trial.scored].sum())


def views(
    table: AnnData, trials: list[Trial], features: dict[str, np.ndarray], combinations: list[tuple[str, ...]], k: int
) -> list[Values]:
    """How well niches are told from the histology at each resolution, or at several together.

    ``auc`` is that of the probability of the niche with the most podocyte expression, for bins of that niche.
    """
    found = []
    scores: dict[tuple[str, ...], list[list[float]]] = {names: [] for names in combinations}
    for trial in trials:
        niches = niches_of(table.obsm["X_niche_pca"][trial.rows], trial, k)
        podocyte = table.obs["podocyte"].to_numpy()[trial.rows]
        glomerular = int(np.argmax([podocyte[trial.fit & (niches == i)].mean() for i in range(k)]))
        reduced = {name: _reduced(values[trial.rows], trial) for name, values in features.items()}
        for names in combinations:
            x = np.concatenate([reduced[name] for name in names], axis=1)
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=100))
            probe.fit(x[trial.fit], niches[trial.fit])
            told, wanted = x[trial.scored], niches[trial.scored]
            chance = probe.predict_proba(told)[:, list(probe.classes_).index(glomerular)]
            labels = probe.predict(told)
            scores[names].append(
                [
                    hn.metrics.adjusted_rand(wanted, labels), hn.metrics.normalized_mutual_info(wanted, labels),
                    float(roc_auc_score(wanted == glomerular, chance)),
                ]
            )  # fmt: skip
    for names in combinations:
        ari, nmi, auc = np.mean(scores[names], axis=0)
        found.append({"view": " and ".join(names), "k": k, "ari": float(ari), "nmi": float(nmi), "auc": float(auc)})
        print(found[-1], flush=True)
    return found


def _reduced(values: np.ndarray, trial: Trial) -> np.ndarray:
    """Principal components of the bin's standardised features, and of its neighbourhood's mean."""
    own = values.astype(np.float32)
    parts = []
    for x in (own, neighborhood_mean(trial.graph, own)):
        reduce = make_pipeline(StandardScaler(), PCA(N_COMPONENTS, random_state=0)).fit(x[trial.fit])
        parts.append(reduce.transform(x))
    return np.concatenate(parts, axis=1)
