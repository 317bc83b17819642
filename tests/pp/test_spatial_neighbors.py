from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import squidpy as sq
from spatialdata import SpatialData
from spatialdata.models import TableModel

import histoniche as hn


def cells(n: int = 600, *, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    adata = ad.AnnData(np.ones((n, 1), dtype=np.float32))
    adata.obs_names = [f"cell_{i}" for i in range(n)]
    adata.obsm["spatial"] = rng.uniform(0, 300, (n, 2))
    return adata


def test_same_graph_as_squidpy_and_squidpy_reads_it() -> None:
    adata = cells()
    hn.pp.spatial_neighbors(adata, radius=30.0)
    other = adata.copy()
    sq.gr.spatial_neighbors(other, coord_type="generic", radius=30.0)
    np.testing.assert_array_equal(
        adata.obsp["niche_connectivities"].toarray(), other.obsp["spatial_connectivities"].toarray()
    )
    np.testing.assert_allclose(
        adata.obsp["niche_distances"].toarray(), other.obsp["spatial_distances"].toarray(), rtol=1e-5
    )
    assert set(other.uns["spatial_neighbors"]) <= set(adata.uns["niche_neighbors"]) | {"params"}
    adata.obs["half"] = pd.Categorical(np.where(adata.obsm["spatial"][:, 0] < 150, "left", "right"))
    sq.gr.nhood_enrichment(
        adata, cluster_key="half", connectivity_key="niche", n_perms=20, seed=0, show_progress_bar=False
    )
    zscore = adata.uns["half_nhood_enrichment"]["zscore"]
    assert zscore[0, 0] > 10 > -10 > zscore[0, 1]


def test_radius_comes_from_the_training_cells() -> None:
    adata = cells(2000)
    # The right half is thinned out: only the dense left half may decide.
    keep = (adata.obsm["spatial"][:, 0] < 150) | (np.arange(2000) % 8 == 0)
    adata = adata[keep].copy()
    left = adata.obsm["spatial"][:, 0] < 150
    adata.obs["split"] = pd.Categorical(np.where(left, "train", "test"))
    hn.pp.spatial_neighbors(adata, target_neighbors=20)
    both = adata.copy()
    del both.obs["split"]
    hn.pp.spatial_neighbors(both, target_neighbors=20)
    radius = adata.uns["niche_neighbors"]["params"]["radius"]
    assert radius < both.uns["niche_neighbors"]["params"]["radius"]
    alone = adata[left].copy()
    hn.pp.spatial_neighbors(alone, target_neighbors=20)
    assert radius == pytest.approx(alone.uns["niche_neighbors"]["params"]["radius"], rel=1e-6)
    assert alone.uns["niche_neighbors"]["params"]["mean_neighbors"] == pytest.approx(20, rel=0.02)


def test_slides_of_a_spatialdata_object_stay_apart() -> None:
    adata = cells(400)
    adata.obs["region"] = pd.Categorical(np.where(np.arange(400) < 200, "a", "b"))
    adata.obs["id"] = np.arange(400)
    table = TableModel.parse(adata, region=["a", "b"], region_key="region", instance_key="id")
    sdata = SpatialData.init_from_elements({"cells": table})
    hn.pp.spatial_neighbors(sdata, radius=50.0)
    graph = sdata["cells"].obsp["niche_connectivities"].toarray()
    assert graph[:200, :200].sum() > 0
    assert graph[:200, 200:].sum() == 0


def test_copy_and_provenance() -> None:
    adata = cells()
    copy = hn.pp.spatial_neighbors(adata, radius=20.0, copy=True)
    assert "niche_neighbors" in copy.uns
    assert not adata.obsp
    assert not adata.uns
    assert hn.pp.spatial_neighbors(adata, radius=20.0) is None
    entry = adata.uns["histoniche"]["spatial_neighbors"]
    assert entry["params"]["radius"] == 20.0
    assert set(entry["outputs"]) == {"obsp/niche_connectivities", "obsp/niche_distances", "uns/niche_neighbors"}
    assert entry["versions"]["histoniche"] == hn.__version__
    assert adata.write_h5ad is not None


def test_result_can_be_written(tmp_path) -> None:
    adata = cells()
    hn.pp.spatial_neighbors(adata, target_neighbors=10)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert again.uns["niche_neighbors"]["params"]["radius"] == adata.uns["niche_neighbors"]["params"]["radius"]


def spoil(adata: ad.AnnData, what: str) -> dict:
    if what == "nan":
        adata.obsm["spatial"][3, 0] = np.nan
    elif what == "duplicate":
        adata.obsm["spatial"][3] = adata.obsm["spatial"][7]
    elif what == "missing":
        del adata.obsm["spatial"]
    elif what == "shape":
        adata.obsm["spatial"] = adata.obsm["spatial"][:, :1]
    elif what == "no_train":
        adata.obs["split"] = "test"
    elif what == "radius":
        return {"radius": 0.0}
    elif what == "target":
        return {"target_neighbors": 5000}
    return {}


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("nan", ValueError, "1 cells without finite coordinates, the first is 'cell_3'"),
        ("duplicate", ValueError, "at the coordinates of another cell"),
        ("missing", KeyError, "obsm\\['spatial'\\] is missing"),
        ("shape", ValueError, "has the shape"),
        ("no_train", ValueError, "no cell of the value 'train'"),
        ("radius", ValueError, "radius must be positive"),
        ("target", ValueError, "target_neighbors=5000 needs more than"),
    ],
)
def test_bad_input_leaves_the_object_untouched(what: str, error: type[Exception], message: str) -> None:
    adata = cells()
    arguments = spoil(adata, what)
    with pytest.raises(error, match=message):
        hn.pp.spatial_neighbors(adata, **arguments)
    assert not adata.obsp
    assert not adata.uns


def test_tables() -> None:
    one, two = cells(), cells(seed=1)
    with pytest.raises(KeyError, match="has no table"):
        hn.pp.spatial_neighbors(SpatialData())
    sdata = SpatialData.init_from_elements({"one": TableModel.parse(one), "two": TableModel.parse(two)})
    with pytest.raises(ValueError, match="several tables, \\['one', 'two'\\]: name one with table_key"):
        hn.pp.spatial_neighbors(sdata)
    with pytest.raises(KeyError, match="table_key='three' is not among"):
        hn.pp.spatial_neighbors(sdata, table_key="three")
    hn.pp.spatial_neighbors(sdata, table_key="two", radius=20.0)
    assert "niche_neighbors" in sdata["two"].uns
    assert "niche_neighbors" not in sdata["one"].uns
    with pytest.raises(TypeError, match="Expected a SpatialData or an AnnData, got ndarray"):
        hn.pp.spatial_neighbors(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="is a view"):
        hn.pp.spatial_neighbors(one[:100], radius=20.0)
    with pytest.raises(ValueError, match="leave it out"):
        hn.pp.spatial_neighbors(one, table_key="one")
