from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import dask.array as da
import numpy as np
import pytest
import torch
from anndata.experimental import read_lazy
from scipy import sparse
from sklearn.metrics import silhouette_score
from spatialdata import SpatialData

import histoniche as hn


@pytest.mark.parametrize("method", ["scvi", "pca"])
def test_cell_types_are_apart(tissue: SpatialData, method: str) -> None:
    table = tissue["table"]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    environment = {name: os.environ.get(name) for name in ("XLA_FLAGS", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    hn.tl.molecular_embedding(tissue, method=method, n_latent=6, max_epochs=40)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])
    assert {name: os.environ.get(name) for name in environment} == environment
    key = {"scvi": "X_scVI", "pca": "X_niche_pca"}[method]
    latent = table.obsm[key]
    assert latent.shape == (table.n_obs, 6)
    assert latent.dtype == np.float32
    # Beside the same cells with their types shuffled, which score about zero.
    types = table.obs["cell_type"].to_numpy()
    shuffled = np.random.default_rng(0).permutation(types)
    assert silhouette_score(latent, types) > 0.1 > silhouette_score(latent, shuffled)
    again = hn.tl.molecular_embedding(tissue, method=method, n_latent=6, max_epochs=40, copy=True)
    np.testing.assert_array_equal(again["table"].obsm[key], latent)
    assert table.uns["histoniche"]["molecular_embedding"]["params"]["method"] == method


@pytest.mark.parametrize("method", ["scvi", "pca"])
def test_only_training_cells_are_fitted(tissue: SpatialData, method: str) -> None:
    table = tissue["table"]
    spoilt = hn.pp.spatial_neighbors(tissue, radius=10.0, copy=True)
    counts = spoilt["table"].X.toarray()
    outside = (table.obs["split"] != "train").to_numpy()
    counts[outside] = counts[outside][:, ::-1]
    spoilt["table"].X = sparse.csr_matrix(counts)
    for sdata in (tissue, spoilt):
        hn.tl.molecular_embedding(sdata, method=method, n_latent=4, max_epochs=2, key_added="latent")
    one, two = table.obsm["latent"], spoilt["table"].obsm["latent"]
    np.testing.assert_allclose(one[~outside], two[~outside], atol=1e-5)
    assert np.abs(one[outside] - two[outside]).max() > 0.1


def test_empty_cells(tissue: SpatialData) -> None:
    table = tissue["table"]
    counts = table.X.toarray()
    counts[[5, 9]] = 0
    table.X = sparse.csr_matrix(counts)
    with pytest.raises(ValueError, match=f"2 cells have no counts, the first is '{table.obs_names[5]}'"):
        hn.tl.molecular_embedding(tissue, method="pca")
    assert "X_niche_pca" not in table.obsm
    hn.tl.molecular_embedding(tissue, method="pca", n_latent=4, empty_cells="mean")
    fitted = (table.obs["split"] == "train").to_numpy() & (counts.sum(1) > 0)
    latent = table.obsm["X_niche_pca"]
    np.testing.assert_allclose(latent[5], latent[fitted].mean(0), atol=1e-5)
    np.testing.assert_array_equal(latent[5], latent[9])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: np.log1p(x), ValueError, "X does not hold raw counts: it has the value"),
        (lambda x: -x, ValueError, "does not hold raw counts"),
        (lambda x: x * np.nan, ValueError, "does not hold raw counts"),
    ],
)
def test_counts_must_be_raw(tissue: SpatialData, change, error: type[Exception], message: str) -> None:
    tissue["table"].X = sparse.csr_matrix(change(tissue["table"].X.toarray()))
    with pytest.raises(error, match=message):
        hn.tl.molecular_embedding(tissue)
    assert set(tissue["table"].obsm) == {"spatial"}


def test_layer_and_method(tissue: SpatialData) -> None:
    table = tissue["table"]
    table.layers["counts"] = table.X.copy()
    table.X = sparse.csr_matrix(np.log1p(table.X.toarray()))
    hn.tl.molecular_embedding(tissue, method="pca", n_latent=3, layer="counts")
    assert table.obsm["X_niche_pca"].shape[1] == 3
    with pytest.raises(KeyError, match="layer='raw' is not among the layers"):
        hn.tl.molecular_embedding(tissue, layer="raw")
    with pytest.raises(ValueError, match="method='umap' is unknown"):
        hn.tl.molecular_embedding(tissue, method="umap")
    with pytest.raises(ValueError, match="n_latent=5000 needs more than"):
        hn.tl.molecular_embedding(tissue, n_latent=5000, layer="counts")


@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("kind", ["dask", "backed", "lazy"])
def test_backed_and_lazy_tables(tmp_path: Path, kind: str, layer: str | None) -> None:
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(2, (80, 12)).astype(np.float32))
    table = ad.AnnData(counts, layers={"counts": counts.copy()})
    table.obs["split"] = np.where(np.arange(80) < 50, "train", "test")
    if kind == "dask":
        lazy = table.copy()
        blocks = da.from_array(counts.toarray(), chunks=(30, 5)).map_blocks(sparse.csr_matrix)
        lazy.X, lazy.layers["counts"] = blocks, blocks
    else:
        table.write_h5ad(tmp_path / "a.h5ad")
        lazy = ad.read_h5ad(tmp_path / "a.h5ad", backed="r") if kind == "backed" else read_lazy(tmp_path / "a.h5ad")
    for adata in (table, lazy):
        hn.tl.molecular_embedding(adata, method="pca", n_latent=5, layer=layer)
    np.testing.assert_allclose(np.asarray(lazy.obsm["X_niche_pca"]), table.obsm["X_niche_pca"], atol=1e-5)
