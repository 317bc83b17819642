from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy.special import softmax
from spatialdata import SpatialData

import histoniche as hn
from histoniche.models import _nolan as engine


def test_finds_the_niches_and_writes_all_fields(embedded: SpatialData) -> None:
    table = embedded["table"]
    assert list(table.obs["niche_teacher"].cat.categories) == ["0", "1", "2"]
    logits = table.obsm["niche_logits_teacher"]
    assert logits.shape == (table.n_obs, 3)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(table.obs["niche_teacher"].cat.codes, logits.argmax(1))
    assert len(table.uns["niche_teacher_colors"]) == 3
    assert hn.metrics.adjusted_rand(table.obs["niche_true"], table.obs["niche_teacher"]) > 0.5
    assert 0.5 < softmax(logits, axis=1).max(1).mean() <= 1
    history = table.uns["niche_history"]["teacher"]
    assert len(history["loss"]) == len(history["effective_niches"]) == 30
    entry = table.uns["histoniche"]["nolan"]
    assert entry["inputs"]["use_rep"] == "X_niche_pca"
    assert 1 < entry["params"]["final_effective_niches"] <= 3


def test_another_embedding_beside_the_teacher(embedded: SpatialData) -> None:
    table = embedded["table"]
    before = table.obs["niche_teacher"].copy()
    hn.tl.nolan(
        embedded, n_niches=4, use_rep="X_efficientnet-lite0", key_added="niche_histology", n_steps=2, batch_size=64
    )
    assert list(table.obs["niche_teacher"]) == list(before)
    assert table.obsm["niche_histology_logits"].shape == (table.n_obs, 4)
    assert {"nolan", "nolan.niche_teacher"} <= set(table.uns["histoniche"])


def test_collapse_is_told(embedded: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine._Occupancy, "update", lambda self, mean: setattr(self, "mean", torch.tensor([1.0, 0, 0]))
    )
    with pytest.warns(UserWarning, match="niches collapsed after 1 steps"):
        hn.tl.nolan(embedded, n_niches=3, use_rep="X_niche_pca", n_steps=5)
    assert embedded["table"].uns["histoniche"]["nolan"]["params"]["collapsed"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_niches": 1}, ValueError, "n_niches=1: at least 2"),
        ({"n_niches": 10_000}, ValueError, "n_niches=10000 is more than the"),
        ({"use_rep": "X_other"}, KeyError, "obsm\\['X_other'\\] is missing; obsm has"),
    ],
)
def test_bad_arguments(embedded: SpatialData, arguments: dict, error: type[Exception], message: str) -> None:
    table = embedded["table"]
    before = table.obsm["niche_logits_teacher"].copy()
    with pytest.raises(error, match=message):
        hn.tl.nolan(embedded, **{"use_rep": "X_niche_pca", **arguments})
    np.testing.assert_array_equal(table.obsm["niche_logits_teacher"], before)


def test_missing_graph_and_nan(tissue: SpatialData, embedded: SpatialData) -> None:
    tissue["table"].obsm["latent"] = np.random.default_rng(0).normal(size=(tissue["table"].n_obs, 3))
    with pytest.raises(KeyError, match=r"run `hn\.pp\.spatial_neighbors` first"):
        hn.tl.nolan(tissue, use_rep="latent")
    embedded["table"].obsm["X_niche_pca"][4, 1] = np.nan
    with pytest.raises(ValueError, match="1 cells with NaN or infinite values"):
        hn.tl.nolan(embedded, use_rep="X_niche_pca")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_niches"), [("starmap_mpfc_3sections", 4), ("osmfish", 11)])
def test_not_below_kmeans_on_annotated_tissue(data_dir: Path, name: str, n_niches: int) -> None:
    adata = ad.read_h5ad(data_dir / "annotated_domains" / f"{name}.h5ad")
    # The published osmFISH table holds some cells more than once.
    adata = adata[~pd.DataFrame(adata.obsm["spatial"]).duplicated(keep=False).to_numpy()].copy()
    regions = adata.obs["domain" if n_niches == 4 else "Region"].astype(str)
    if n_niches == 4:
        adata.obs["section"] = adata.obs["section"].astype("category")
        adata.uns["spatialdata_attrs"] = {"region": None, "region_key": "section", "instance_key": "id"}
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=15)
    hn.pp.spatial_neighbors(adata, target_neighbors=30)
    hn.tl.nolan(adata, n_niches=n_niches, use_rep="X_pca")
    graph = adata.obsp["niche_connectivities"]
    pca = adata.obsm["X_pca"]
    means = (graph @ pca + pca) / (1 + np.asarray(graph.sum(1)))
    from sklearn.cluster import KMeans

    kmeans = KMeans(n_niches, n_init=10, random_state=0).fit_predict(means)
    found = hn.metrics.adjusted_rand(regions, adata.obs["niche_teacher"])
    # The seeds of k-means alone move its score by about 0.01.
    assert found > hn.metrics.adjusted_rand(regions, kmeans) - 0.02
    assert hn.metrics.effective_number(adata.obs["niche_teacher"].cat.codes.to_numpy()) > 0.7 * n_niches


def test_integers_of_numpy_and_names_of_the_niches(embedded: SpatialData) -> None:
    hn.tl.nolan(
        embedded,
        n_niches=np.int64(3),
        use_rep="X_niche_pca",
        n_steps=np.int64(2),
        batch_size=np.int64(64),
        seed=np.int64(1),
    )
    params = embedded["table"].uns["histoniche"]["nolan"]["params"]
    assert (params["n_niches"], params["seed"], params["niches"]) == (3, 1, ["0", "1", "2"])
    assert type(params["seed"]) is int


def test_settings_are_checked(embedded: SpatialData) -> None:
    before = embedded["table"].obsm["niche_logits_teacher"].copy()
    for name, value in {"batch_size": 0, "n_steps": 0, "teacher_temperature": 0.0, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            hn.tl.nolan(embedded, n_niches=3, use_rep="X_niche_pca", **{name: value})
    np.testing.assert_array_equal(embedded["table"].obsm["niche_logits_teacher"], before)
