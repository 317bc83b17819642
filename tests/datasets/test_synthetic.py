from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.transformations import get_transformation

from histoniche.datasets import synthetic_tissue


def level(sdata, k=0):
    return np.asarray(sdata.images["he"][f"scale{k}"]["image"].data)


@pytest.fixture(scope="module")
def tissue():
    return synthetic_tissue(1500, um_per_px=1.0, seed=3)


def test_same_seed_same_bytes_other_seed_other(tissue):
    again, other = synthetic_tissue(1500, um_per_px=1.0, seed=3), synthetic_tissue(1500, um_per_px=1.0, seed=4)
    a, b, c = tissue["table"], again["table"], other["table"]
    assert a.X.data.tobytes() == b.X.data.tobytes()
    assert a.obsm["spatial"].tobytes() == b.obsm["spatial"].tobytes()
    assert a.obs.equals(b.obs)
    assert level(tissue).tobytes() == level(again).tobytes()
    assert a.obsm["spatial"].tobytes() != c.obsm["spatial"].tobytes()


def test_does_not_touch_the_global_generator():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    synthetic_tissue(100, um_per_px=2.0)
    assert (np.random.get_state()[1] == before).all()


def test_counts_are_raw_and_no_cell_is_empty(tissue):
    table = tissue["table"]
    assert table.X.format == "csr"
    assert table.X.dtype == np.float32
    assert (table.X.data == np.round(table.X.data)).all()
    assert (table.X.data >= 0).all()
    assert np.asarray(table.X.sum(axis=1)).min() >= 1


def test_markers_mark_their_type(tissue):
    table = tissue["table"]
    x = table.X.toarray()
    for cell_type in table.obs["cell_type"].cat.categories:
        genes = (table.var["marker_of"] == cell_type).to_numpy()
        own = (table.obs["cell_type"] == cell_type).to_numpy()
        assert x[own][:, genes].mean() > 3 * x[~own][:, genes].mean()


@pytest.mark.parametrize("n_niches", [2, 5, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_strip_holds_every_niche(n_niches, seed):
    table = synthetic_tissue(3000, n_niches=n_niches, um_per_px=4.0, seed=seed)["table"]
    assert len(table.obs["niche_true"].cat.categories) == n_niches
    y = table.obsm["spatial"][:, 1]
    strip = np.minimum((4 * y / y.max()).astype(int), 3)
    for k in range(4):
        share = table.obs["niche_true"][strip == k].value_counts(normalize=True)
        assert (share > 0.02).all(), share


def test_a_niche_is_a_mixture_and_no_type_is_confined_to_one(tissue):
    obs = tissue["table"].obs
    share = obs.groupby("niche_true", observed=True)["cell_type"].value_counts(normalize=True).unstack(fill_value=0)
    assert (share.max(axis=1) < 0.85).all()
    assert (share > 0).to_numpy().mean() > 0.95


def test_geometry(tissue):
    table = tissue["table"]
    xy = table.obsm["spatial"]
    circles = tissue["cells"]
    assert np.allclose(np.column_stack([circles.geometry.x, circles.geometry.y]), xy)
    assert (circles["radius"] > 1).all()
    assert len(np.unique(xy, axis=0)) == len(xy)
    height, width = level(tissue).shape[1:]
    assert xy.min() > 0
    assert xy.max() < min(height, width)
    matrix = get_transformation(tissue["he"], to_coordinate_system="um").to_affine_matrix(("x", "y"), ("x", "y"))
    assert np.allclose(matrix, np.eye(3))
    joined, matched = sd.join_spatialelement_table(sdata=tissue, spatial_element_names="cells", table_name="table")
    assert len(joined["cells"]) == len(matched) == 1500


def test_nuclei_are_where_the_cells_are(tissue):
    he = level(tissue)
    px = np.floor(tissue["table"].obsm["spatial"]).astype(int)
    red = he[0].astype(float)
    assert red[px[:, 1], px[:, 0]].mean() < red.mean() - 40
    assert he.dtype == np.uint8
    assert (he > 235).all(axis=0).any(), "no white lumen"


def test_marked_as_synthetic_and_round_trips(tissue, tmp_path):
    assert tissue.attrs["synthetic"] is True
    tissue.write(tmp_path / "tissue.zarr")
    again = sd.read_zarr(tmp_path / "tissue.zarr")
    assert bool(again.attrs["synthetic"])
    assert (level(again) == level(tissue)).all()
    assert (level(again, 2) == level(tissue, 2)).all()
    assert again["table"].obs["niche_true"].astype(str).equals(tissue["table"].obs["niche_true"].astype(str))
    assert np.array_equal(again["table"].obsm["spatial"], tissue["table"].obsm["spatial"])


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"n_cells": 10}, "n_cells"),
        ({"n_niches": 1}, "n_niches"),
        ({"n_niches": 9}, "n_niches"),
        ({"n_genes": 3}, "n_genes"),
        ({"um_per_px": 0.0}, "um_per_px"),
    ],
)
def test_bad_parameters(kwargs, name):
    with pytest.raises(ValueError, match=name):
        synthetic_tissue(**kwargs)
