from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

import histoniche as hn
from histoniche._sdata import origin


def cells(n: int = 4000, *, height: float = 1000.0) -> ad.AnnData:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(np.ones((n, 1), dtype=np.float32))
    adata.obsm["spatial"] = rng.uniform(0, [400, height], (n, 2))
    return adata


@pytest.mark.parametrize("field_of_view", [20.0, 60.0])
def test_nothing_of_a_test_cell_is_seen_in_training(field_of_view: float) -> None:
    adata = cells()
    hn.pp.spatial_holdout(adata, target_neighbors=15, field_of_view=field_of_view)
    hn.pp.spatial_neighbors(adata, target_neighbors=15)
    radius = adata.uns["niche_neighbors"]["params"]["radius"]
    xy = adata.obsm["spatial"]
    split = adata.obs["split"].to_numpy()
    graph = adata.obsp["niche_connectivities"].toarray().astype(bool)
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    # Cells: whatever a training neighbourhood holds lies in no test cell's neighbourhood.
    seen = graph[train].any(axis=0)
    seen[train] = True
    needed = graph[test].any(axis=0)
    needed[test] = True
    assert not (seen & needed).any()
    # Pixels: the crops of all those cells do not overlap either.
    apart = np.abs(xy[seen][:, None] - xy[needed][None]).max(-1)
    assert apart.min() >= field_of_view
    assert cdist(xy[train], xy[test]).min() > 2 * radius * 0.99


def test_the_second_of_four_strips_from_the_top() -> None:
    adata = cells()
    hn.pp.spatial_holdout(adata, target_neighbors=15, field_of_view=20.0)
    y = adata.obsm["spatial"][:, 1]
    edges = np.linspace(y.min(), y.max(), 5)
    test = adata.obs["split"] == "test"
    np.testing.assert_array_equal(test, (y >= edges[1]) & (y < edges[2]))
    assert list(adata.obs["split"].cat.categories) == ["train", "test", "buffer"]
    buffer = adata.uns["histoniche"]["spatial_holdout"]["params"]["buffer"]
    away = np.maximum(edges[1] - y, y - edges[2])
    np.testing.assert_array_equal(adata.obs["split"] == "buffer", ~test & (away <= buffer))


def test_last_strip_holds_the_last_cell() -> None:
    adata = cells()
    hn.pp.spatial_holdout(adata, n_strips=3, test_strip=2, target_neighbors=15, field_of_view=20.0)
    assert adata.obs["split"].iloc[np.argmax(adata.obsm["spatial"][:, 1])] == "test"


def test_each_slide_is_cut_on_its_own() -> None:
    adata = cells()
    adata.obsm["spatial"][2000:, 1] += 50_000
    adata.obs["region"] = pd.Categorical(np.where(np.arange(4000) < 2000, "a", "b"))
    adata.uns["spatialdata_attrs"] = {"region": ["a", "b"], "region_key": "region", "instance_key": "id"}
    hn.pp.spatial_holdout(adata, target_neighbors=15, field_of_view=20.0)
    for rows in (slice(0, 2000), slice(2000, 4000)):
        share = (adata.obs["split"].iloc[rows] == "test").mean()
        assert 0.2 < share < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer": 10.0}, "buffer=10.0 um leaks: at least 56.0 um"),
        ({"test_strip": 4}, "test_strip=4 of n_strips=4"),
        ({"n_strips": 1, "test_strip": 0}, "at least 2 strips"),
        ({"buffer": 2000.0}, "No cell is left for 'train'"),
        ({"buffer": float("nan")}, "leaks"),
        ({"context_hops": -1}, "context_hops=-1"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    adata = cells()
    with pytest.raises(ValueError, match=message):
        hn.pp.spatial_holdout(adata, target_neighbors=15, **arguments)
    assert not len(adata.obs.columns)
    assert not adata.uns


def test_wider_context_asks_for_a_wider_buffer() -> None:
    def buffer(hops: int) -> tuple[float, float]:
        adata = cells()
        hn.pp.spatial_holdout(adata, target_neighbors=15, field_of_view=20.0, context_hops=hops)
        params = adata.uns["histoniche"]["spatial_holdout"]["params"]
        return params["buffer"], params["radius"]

    for hops in (0, 1):
        found, radius = buffer(hops)
        assert found == pytest.approx(2 * radius + 20)
    for hops in (2, 4):
        found, radius = buffer(hops)
        assert found == pytest.approx((hops + 1) * radius + 10)


def test_empty_test_strip() -> None:
    adata = cells()
    y = adata.obsm["spatial"][:, 1]
    adata = adata[(y < 200) | (y > 700)].copy()
    with pytest.raises(ValueError, match="No cell is left for 'test'"):
        hn.pp.spatial_holdout(adata, target_neighbors=15)


def test_copy() -> None:
    adata = cells()
    copy = hn.pp.spatial_holdout(adata, target_neighbors=15, copy=True)
    assert "split" in copy.obs
    assert "split" not in adata.obs


def test_two_splits_keep_their_own_provenance() -> None:
    adata = cells()
    for key, width in (("split", 40.0), ("other", 60.0), ("split", 50.0)):
        hn.pp.spatial_holdout(adata, target_neighbors=15, field_of_view=20.0, buffer=width, key_added=key)
    for key, width in (("split", 50.0), ("other", 60.0)):
        found = origin(adata, "obs", key)["params"]
        assert (found["buffer"], found["target_neighbors"]) == (width, 15)
    assert set(adata.uns["histoniche"]) == {"spatial_holdout", "spatial_holdout.other"}
    adata.uns["histoniche"] = dict(reversed(adata.uns["histoniche"].items()))
    assert origin(adata, "obs", "split")["params"]["buffer"] == 50.0
