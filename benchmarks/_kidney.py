"""Parts of the kidney benchmark: genes, types of bins, glomeruli."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.special import softmax
from skimage.filters import threshold_otsu
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score

from histoniche import metrics

if TYPE_CHECKING:
    from anndata import AnnData

PODOCYTE = ("NPHS1", "NPHS2", "PODXL")
LEAST_SHARE = 0.005
"""Genes in a smaller share of the training bins are left out."""
SMOOTHING = 16.0
"""Width in um of the Gaussian that makes regions of podocyte expression from single bins."""
LEAST_AREA = 5000.0
"""um2; smaller regions are not counted as glomeruli (a disc of 80 um across; glomeruli measure 150 to 250 um)."""

BLOCK = 250.0
"""Side in um of the blocks that are resampled for intervals: a glomerulus. Eight radii would leave four blocks in the strip."""


def counts_of(table: AnnData, genes: tuple[str, ...]) -> np.ndarray:
    """Summed counts of genes, (n,)."""
    return np.asarray(table[:, list(genes)].X.sum(axis=1)).ravel()


def log_expression(table: AnnData, genes: tuple[str, ...]) -> np.ndarray:
    """log(1 + counts of the genes per 100 counts of the bin), (n,)."""
    totals = np.asarray(table.X.sum(axis=1)).ravel()
    return np.log1p(100 * counts_of(table, genes) / np.maximum(totals, 1))


def variable_genes(table: AnnData, n_genes: int) -> np.ndarray:
    """(genes,) bool: those with the largest variance of Pearson residuals, of genes that are not too rare."""
    import scanpy

    chosen = np.asarray((table.X > 0).mean(axis=0)).ravel() >= LEAST_SHARE
    found = scanpy.experimental.pp.highly_variable_genes(
        table[:, chosen], flavor="pearson_residuals", n_top_genes=min(n_genes, int(chosen.sum())), inplace=False
    )
    chosen[chosen] = found["highly_variable"].to_numpy()
    return chosen


def bin_types(embedding: np.ndarray, train: pd.Series, n_types: int) -> pd.Categorical:
    """k-means clusters of the molecular embedding of single bins, a stand-in for cell types."""
    clusters = KMeans(n_types, n_init=3, random_state=0).fit(embedding[train.to_numpy()]).predict(embedding)
    return pd.Categorical([f"type {c}" for c in clusters])


def niche_probability(table: AnnData, niche: str) -> np.ndarray:
    """The student's probability of a niche, (n,) float32."""
    column = list(table.obs["niche_teacher"].cat.categories).index(niche)
    return softmax(table.obsm["niche_logits"], axis=1)[:, column]


def on_grid(table: AnnData, values: np.ndarray, fill: float = np.nan) -> np.ndarray:
    """Values of bins as an image (rows, columns); ``fill`` where there is no bin."""
    row, column = (table.obs[name].to_numpy().astype(int) for name in ("array_row", "array_col"))
    out = np.full((row.max() - row.min() + 1, column.max() - column.min() + 1), fill)
    out[row - row.min(), column - column.min()] = values
    return out


def smoothed(table: AnnData, values: np.ndarray, bin_um: int) -> np.ndarray:
    """Gaussian mean of values over the bins around each bin, (n,)."""
    image = on_grid(table, values)
    known = np.isfinite(image)
    mean = ndimage.gaussian_filter(np.where(known, image, 0.0), SMOOTHING / bin_um)
    mean /= np.maximum(ndimage.gaussian_filter(known.astype(float), SMOOTHING / bin_um), 1e-6)
    row, column = (table.obs[name].to_numpy().astype(int) for name in ("array_row", "array_col"))
    return mean[row - row.min(), column - column.min()]


def podocyte_regions(table: AnnData, bin_um: int) -> np.ndarray:
    """(n,) bool: smoothed podocyte expression above Otsu's threshold of the training bins."""
    mean = smoothed(table, table.obs["podocyte"].to_numpy(), bin_um)
    return mean > threshold_otsu(mean[(table.obs["split"] == "train").to_numpy()])


def add_podocyte(table: AnnData) -> None:
    """Podocyte expression and counts to ``obs``: of the three genes together, and of each."""
    for name, genes in {"podocyte": PODOCYTE, **{gene: (gene,) for gene in PODOCYTE}}.items():
        table.obs[name] = log_expression(table, genes)
        table.obs[f"{name}_counts"] = counts_of(table, genes)


def glomeruli(table: AnnData, bin_um: int) -> dict[str, Any]:
    """How well the student finds glomeruli on the test strip, from H&E alone.

    The glomerular niche is the one with the most podocyte expression on training bins, by the teacher's labels. The interval
    of the AUC for regions is by spatial block bootstrap.
    """
    split = table.obs["split"].to_numpy()
    train, test = split == "train", split == "test"
    podocyte = table.obs["podocyte"].to_numpy()
    by_niche = pd.Series(podocyte[train]).groupby(table.obs["niche_teacher"].to_numpy()[train]).mean()
    niche = str(by_niche.idxmax())
    score = niche_probability(table, niche)[test]
    found = (table.obs["niche"].astype(str) == niche).to_numpy()
    wanted = podocyte_regions(table, bin_um)
    regions = metrics.block_bootstrap(
        table.obsm["spatial"][test],
        lambda rows: roc_auc_score(wanted[test][rows], score[rows]),
        block_um=BLOCK,
    )
    return {
        "niche": niche,
        "auc_regions": regions.estimate,
        "auc_regions_low": regions.low,
        "auc_regions_high": regions.high,
        **{
            f"{name}_{figure}": value
            for name in ("podocyte", *PODOCYTE)
            for figure, value in _of_gene(table, name, score, found, test).items()
        },
        "share_positive_bins": float((table.obs["podocyte_counts"].to_numpy()[test] > 0).mean()),
        "share_regions": float(wanted[test].mean()),
        **_objects(table, wanted, found, test, bin_um),
    }


def _of_gene(table: AnnData, name: str, score: np.ndarray, found: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Expression inside and outside the predicted niche on the test strip, and the AUC for bins with at least one count."""
    expression = table.obs[name].to_numpy()
    return {
        "auc": float(roc_auc_score(table.obs[f"{name}_counts"].to_numpy()[test] > 0, score)),
        "inside": float(expression[test & found].mean()) if (test & found).any() else float("nan"),
        "outside": float(expression[test & ~found].mean()),
    }


def _objects(table: AnnData, wanted: np.ndarray, found: np.ndarray, test: np.ndarray, bin_um: int) -> dict[str, int]:
    """Glomeruli of the test strip, how many of them are found, and found regions without a glomerulus."""
    true, predicted = (on_grid(table, mask & test, fill=0) > 0 for mask in (wanted, found))
    count = {"glomeruli": 0, "glomeruli_found": 0, "false_regions": 0}
    labels, n = ndimage.label(true)
    for i in range(1, n + 1):
        here = labels == i
        if here.sum() * bin_um**2 >= LEAST_AREA:
            count["glomeruli"] += 1
            count["glomeruli_found"] += int(predicted[here].mean() >= 0.5)
    labels, n = ndimage.label(predicted)
    for i in range(1, n + 1):
        here = labels == i
        if here.sum() * bin_um**2 >= LEAST_AREA:
            count["false_regions"] += int(not true[here].any())
    return count
