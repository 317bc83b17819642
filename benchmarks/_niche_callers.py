"""Niche callers that ``domains.py`` compares: NOLAN, baselines and published peers, each as its authors advise.

A caller takes a prepared section and a seed and gives one label a cell. All get the same number of niches K; those with
a resolution instead of K search the resolution that gives K clusters, without looking at any label.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import scanpy as sc
import squidpy as sq
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

import histoniche as hn
from histoniche.models import fit_nolan
from histoniche.neighbors import neighborhood_mean, radius_for_density, radius_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from histoniche.neighbors import NeighborGraph

DEFAULT, NEIGHBORS = 50, 30
"""Neighbours by the default of the package, and fewer, since these sections are thin and hold few cells."""
_LOWEST, _HIGHEST, _ROUNDS, _NARROW = 0.005, 6.0, 12, 1.005


@dataclass(frozen=True)
class Section:
    """A prepared data set: ``adata`` holds log-normalised counts, the latent in ``X_pca`` and published labels."""

    adata: ad.AnnData
    n_niches: int

    @property
    def latent(self) -> np.ndarray:
        return np.asarray(self.adata.obsm["X_pca"], dtype=np.float32)

    @property
    def xy(self) -> np.ndarray:
        return np.asarray(self.adata.obsm["spatial"], dtype=np.float64)

    @property
    def slides(self) -> np.ndarray:
        return self.adata.obs["section"].astype(str).to_numpy()

    def disc_graph(self, target: float) -> tuple[NeighborGraph, float]:
        """Neighbours inside the radius that holds ``target`` cells on average, none across slides."""
        radius = radius_for_density(self.xy, target, groups=self.slides)
        return radius_graph(self.xy, radius, groups=self.slides), radius

    def with_graph(self, x: np.ndarray | None = None, **how: object) -> ad.AnnData:
        """Fresh table over ``x`` (the latent by default) with a graph of squidpy's, none across slides."""
        x = self.latent if x is None else x
        table = ad.AnnData(sparse.csr_matrix(x), obs=self.adata.obs.copy(), obsm={"spatial": self.xy})
        sq.gr.spatial_neighbors(table, library_key="section", coord_type="generic", **how)
        return table

    def with_disc_graph(self, x: np.ndarray | None = None, target: float = NEIGHBORS) -> ad.AnnData:
        """Fresh table over ``x`` with the graph that NOLAN and k-means read."""
        return self.with_graph(x, radius=float(self.disc_graph(target)[1]))


@dataclass(frozen=True)
class Caller:
    """A row of the comparison."""

    key: str
    name: str
    call: Callable[[Section, int], np.ndarray]
    neighborhood: str
    settings: str
    seeded: bool = True
    main: bool = True


def search_resolution(
    cluster: Callable[[list[float]], Sequence[np.ndarray]], n_clusters: int, width: int = 1
) -> np.ndarray:
    """Clusters at the resolution that gives the wished number, or else the nearest number that was met.

    ``width`` resolutions are tried a round, for callers that share work between them.
    """
    low, high = _LOWEST, _HIGHEST
    best, miss = np.empty(0), np.inf
    for _ in range(_ROUNDS):
        tried = np.geomspace(low, high, width + 2)[1:-1].tolist()
        for resolution, labels in zip(tried, cluster(tried), strict=True):
            found = len(np.unique(labels))
            if abs(found - n_clusters) < miss:
                best, miss = labels, abs(found - n_clusters)
            if found < n_clusters:
                low = max(low, resolution)
            elif resolution > low:
                high = min(high, resolution)
        if miss == 0 or high / low < _NARROW:
            break
    return best


def nolan(target: float) -> Callable[[Section, int], np.ndarray]:
    """NOLAN with the defaults of the package."""

    def call(section: Section, seed: int) -> np.ndarray:
        graph, radius = section.disc_graph(target)
        result = fit_nolan(section.latent, graph, section.xy, section.n_niches, radius=radius, seed=seed)
        return result.logits.argmax(1)

    return call


def kmeans(target: float) -> Callable[[Section, int], np.ndarray]:
    """k-means on neighbourhood means."""

    def call(section: Section, seed: int) -> np.ndarray:
        means = neighborhood_mean(section.disc_graph(target)[0], section.latent)
        return KMeans(section.n_niches, n_init=10, random_state=seed).fit_predict(means)

    return call


def leiden(section: Section, seed: int) -> np.ndarray:
    """Leiden on the latent alone."""
    table = ad.AnnData(section.latent)
    sc.pp.neighbors(table, n_neighbors=15, use_rep="X", random_state=seed)

    def cluster(resolutions: list[float]) -> list[np.ndarray]:
        return [_leiden(table, resolution, seed) for resolution in resolutions]

    return search_resolution(cluster, section.n_niches)


def _leiden(table: ad.AnnData, resolution: float, seed: int) -> np.ndarray:
    sc.tl.leiden(table, resolution=resolution, random_state=seed, flavor="igraph", n_iterations=-1, directed=False)
    return table.obs["leiden"].astype(int).to_numpy()


def squidpy_neighborhood(target: int, groups: str) -> Callable[[Section, int], np.ndarray]:
    """Profiles of cell types, published or found by Leiden, clustered by Leiden.

    The nearest neighbours, not a disc: where numbers of neighbours differ, squidpy 1.8 fills up the profile of a cell
    with the type of the last cell of the table.
    """

    def call(section: Section, seed: int) -> np.ndarray:
        del seed  # the flavour has none
        table = section.with_graph(n_neighs=target)
        if groups == "found":
            sc.pp.neighbors(table, n_neighbors=15, use_rep="X")
            table.obs["found"] = _leiden(table, 1.0, 0).astype(str)

        def cluster(resolutions: list[float]) -> list[np.ndarray]:
            sq.gr.calculate_niche(
                table, flavor="neighborhood", groups=groups, n_neighbors=15, resolutions=resolutions, distance=1
            )
            return [table.obs[f"nhood_niche_res={r}"].to_numpy() for r in resolutions]

        return search_resolution(cluster, section.n_niches, width=10)

    return call


def squidpy_utag(target: float, *, genes: bool = False) -> Callable[[Section, int], np.ndarray]:
    """Message passing over the spatial graph, PCA, Leiden."""

    def call(section: Section, seed: int) -> np.ndarray:
        del seed  # the flavour has none
        table = section.with_disc_graph(np.asarray(section.adata.X) if genes else None, target)

        def cluster(resolutions: list[float]) -> list[np.ndarray]:
            sq.gr.calculate_niche(table, flavor="utag", n_neighbors=15, resolutions=resolutions)
            return [table.obs[f"utag_niche_res={r}"].to_numpy() for r in resolutions]

        return search_resolution(cluster, section.n_niches, width=10)

    return call


def _delaunay(section: Section) -> ad.AnnData:
    """CellCharter's graph: Delaunay triangulation without the longest 1 % of its edges."""
    return section.with_graph(delaunay=True, percentile=99)


def squidpy_cellcharter(section: Section, seed: int, *, disc: bool = False) -> np.ndarray:
    """squidpy's simplified CellCharter."""
    table = section.with_disc_graph() if disc else _delaunay(section)
    sq.gr.calculate_niche(
        table, flavor="cellcharter", distance=1 if disc else 3, aggregation="mean", n_components=section.n_niches, random_state=seed
    )  # fmt: skip
    return table.obs["cellcharter_niche"].to_numpy()


def squidpy_cellcharter_disc(section: Section, seed: int) -> np.ndarray:
    """The same on the common neighbourhood."""
    return squidpy_cellcharter(section, seed, disc=True)


def squidpy_spatialleiden(section: Section, seed: int, *, disc: bool = False) -> np.ndarray:
    """Leiden over two layers, latent and space; the latent layer's resolution is searched first, alone."""
    import spatialleiden as sl

    table = section.with_disc_graph() if disc else section.with_graph(n_neighs=10)
    table.obsp["spatial_connectivities"] = sl.distance2connectivity(table.obsp["spatial_distances"])
    sc.pp.neighbors(table, n_neighbors=15, use_rep="X", random_state=seed)
    chosen: list[float] = []

    def latent(resolutions: list[float]) -> list[np.ndarray]:
        chosen.append(resolutions[0])
        sl.leiden(table, resolution=resolutions[0], random_state=seed)
        return [table.obs["leiden"].to_numpy()]

    search_resolution(latent, section.n_niches)

    def space(resolutions: list[float]) -> list[np.ndarray]:
        pair = (chosen[-1], resolutions[0])
        sq.gr.calculate_niche(table, flavor="spatialleiden", resolutions=[pair], layer_ratio=1.8, random_state=seed)
        return [table.obs[f"spatialleiden_res={pair}"].to_numpy()]

    return search_resolution(space, section.n_niches)


def squidpy_spatialleiden_disc(section: Section, seed: int) -> np.ndarray:
    """The same on the common neighbourhood."""
    return squidpy_spatialleiden(section, seed, disc=True)


def cellcharter(section: Section, seed: int, *, disc: bool = False) -> np.ndarray:
    """CellCharter: features of the cell and of its rings of neighbours, Gaussian mixture."""
    import cellcharter as cc

    table = section.with_disc_graph() if disc else _delaunay(section)
    table.obsm["latent"] = section.latent
    cc.gr.aggregate_neighbors(table, n_layers=1 if disc else 3, use_rep="latent", sample_key="section")
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    mixture = cc.tl.Cluster(n_clusters=section.n_niches, random_state=seed, trainer_params=trainer)
    mixture.fit(table, use_rep="X_cellcharter")
    return np.asarray(mixture.predict(table, use_rep="X_cellcharter"))


def cellcharter_disc(section: Section, seed: int) -> np.ndarray:
    """The same on the common neighbourhood."""
    return cellcharter(section, seed, disc=True)


def banksy(section: Section, seed: int, neighbors: int = 15) -> np.ndarray:
    """BANKSY for domains, on genes: neighbourhood mean and azimuthal gradient weighted with lambda = 0.8.

    Each slide has its own matrix, so that features are standardised inside slides (as BANKSY's R package does with
    ``group``); principal components and clusters are those of all slides together.
    """
    from banksy.cluster_methods import LeidenPartition

    matrix = np.empty((section.adata.n_obs, 3 * section.adata.n_vars), dtype=np.float64)
    for slide in np.unique(section.slides):
        cells = section.slides == slide
        matrix[cells] = _banksy_matrix(section.adata[cells], section.xy[cells], neighbors)
    reduced = PCA(20, random_state=seed).fit_transform(matrix)
    partition = LeidenPartition(reduced, num_nn=50, verbose=False)

    def cluster(resolutions: list[float]) -> list[np.ndarray]:
        return [np.asarray(partition.partition(r, n_iterations=-1, seed=seed)[0].dense) for r in resolutions]

    return search_resolution(cluster, section.n_niches)


def _banksy_matrix(adata: ad.AnnData, xy: np.ndarray, neighbors: int) -> np.ndarray:
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy

    table = ad.AnnData(np.asarray(adata.X), obs=adata.obs[[]].copy(), var=adata.var[[]].copy(), obsm={"spatial": xy})
    state = initialize_banksy(
        table, ("x", "y", "spatial"), neighbors, max_m=1, plt_edge_hist=False, plt_nbr_weights=False, plt_theta=False
    )  # fmt: skip
    matrix = generate_banksy_matrix(table, state, [0.8], 1, verbose=False)[1].X
    return np.nan_to_num(np.asarray(matrix))  # genes that a slide lacks have no deviation


def banksy_wide(section: Section, seed: int) -> np.ndarray:
    """The same with the common number of neighbours."""
    return banksy(section, seed, NEIGHBORS)


@contextlib.contextmanager
def quiet() -> object:
    """Run a peer without its prints, progress bars, notices and pictures."""
    before, level = hn.settings.progress, logging.root.manager.disable
    hn.settings.progress = False
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        hn.settings.progress = before
        logging.disable(level)


_DISC, _WIDE = f"disc, {NEIGHBORS}", f"disc, {DEFAULT}"
_GMM = "Gaussian mixture of K components"
_PUBLISHED = "reads the **published cell types**; Leiden over 15 neighbours"
_FOUND = "cell types found by Leiden on the latent, resolution 1"
CALLERS = [
    Caller("nolan", "NOLAN", nolan(DEFAULT), _WIDE, "defaults of the package"),
    Caller("nolan_30", "NOLAN", nolan(NEIGHBORS), _DISC, "the same", main=False),
    Caller("kmeans", "k-means on neighbourhood means", kmeans(DEFAULT), _WIDE, "10 starts"),
    Caller("kmeans_30", "k-means on neighbourhood means", kmeans(NEIGHBORS), _DISC, "10 starts", main=False),
    Caller("cellcharter", "CellCharter", cellcharter, "Delaunay, 3 rings", f"long edges removed, {_GMM}"),
    Caller("cellcharter_disc", "CellCharter", cellcharter_disc, _DISC, f"1 ring, {_GMM}", main=False),
    Caller("banksy", "BANKSY", banksy, "15 nearest (gradient: 30)", "genes; lambda 0.8, 20 PCs, Leiden over 50 shared neighbours"),
    Caller("banksy_30", "BANKSY", banksy_wide, f"{NEIGHBORS} nearest (gradient: 60)", "the same", main=False),
    Caller("squidpy_cellcharter", "squidpy, cellcharter", squidpy_cellcharter, "Delaunay, 3 rings", f"PCA of the rings, {_GMM}"),
    Caller("squidpy_cellcharter_disc", "squidpy, cellcharter", squidpy_cellcharter_disc, _DISC, "1 ring, the same", main=False),
    Caller("squidpy_spatialleiden", "squidpy, spatialleiden", squidpy_spatialleiden, "10 nearest", "edges weighted by distance, layer ratio 1.8"),
    Caller("squidpy_spatialleiden_disc", "squidpy, spatialleiden", squidpy_spatialleiden_disc, _DISC, "the same", main=False),
    Caller("squidpy_utag", "squidpy, utag", squidpy_utag(NEIGHBORS), _DISC, "PCA of neighbourhood means, Leiden over 15 neighbours", seeded=False),
    Caller("squidpy_utag_50", "squidpy, utag", squidpy_utag(DEFAULT), _WIDE, "the same", seeded=False, main=False),
    Caller("squidpy_utag_genes", "squidpy, utag", squidpy_utag(NEIGHBORS, genes=True), f"{_DISC}, genes", "genes in place of the latent", seeded=False, main=False),
    Caller("squidpy_neighborhood", "squidpy, neighborhood", squidpy_neighborhood(NEIGHBORS, "found"), f"{NEIGHBORS} nearest", _FOUND, seeded=False),
    Caller("squidpy_published", "squidpy, neighborhood, published types", squidpy_neighborhood(NEIGHBORS, "cell_type"), f"{NEIGHBORS} nearest", _PUBLISHED, seeded=False, main=False),
    Caller("squidpy_published_50", "squidpy, neighborhood, published types", squidpy_neighborhood(DEFAULT, "cell_type"), f"{DEFAULT} nearest", _PUBLISHED, seeded=False, main=False),
    Caller("leiden", "Leiden without space", leiden, "none", "15 nearest in the latent"),
]  # fmt: skip
READS_LABELS = ("squidpy_published", "squidpy_published_50")
"""Callers that are given published cell types, which the others do not see."""
