from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from geopandas import GeoDataFrame
from shapely import Point
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from histoniche import _sdata


def target_of(adata: ad.AnnData) -> _sdata.Target:
    return _sdata.open_target(adata, table_key=None, copy=False)


def cells(n: int = 5) -> ad.AnnData:
    adata = ad.AnnData(np.ones((n, 2), dtype=np.float32))
    adata.obs_names = [f"cell_{i}" for i in range(n)]
    return adata


def sdata_with(pixels: np.ndarray, transformation: object, **parse: object) -> SpatialData:
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"um": transformation}, **parse)
    return SpatialData.init_from_elements({"he": image})


# ------------------------------------------------------------------------------------------------------------- writing
def test_write_is_everything_or_nothing() -> None:
    adata = cells()
    target = target_of(adata)
    with pytest.raises(RuntimeError, match=r"obsm\['b'\] has 4 rows for 5 cells"):
        target.write("step", params={}, obs={"a": np.zeros(5)}, obsm={"b": np.zeros((4, 2))})
    assert not len(adata.obs.columns)
    assert not adata.uns


def test_provenance_can_be_written_and_names_the_origin(tmp_path) -> None:
    adata = cells()
    params = {"none": None, "n": 3, "x": 0.5, "list": ["a", "b"], "empty": [], "deep": {"flag": True, "none": None}}
    target_of(adata).write("step", params=params, inputs={"read": "X"}, obsm={"one": np.zeros((5, 1))})
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    entry = _sdata.origin(again, "obsm", "one")
    assert entry["params"]["n"] == 3
    assert list(entry["params"]["list"]) == ["a", "b"]
    assert "none" not in entry["params"]
    assert entry["inputs"]["read"] == "X"
    assert _sdata.origin(again, "obsm", "two") is None
    # A second run with another key keeps the origin of the first, a rerun of the same replaces it.
    target_of(again).write("step", params={"n": 4}, obsm={"two": np.zeros((5, 1))})
    target_of(again).write("step", params={"n": 5}, obsm={"two": np.zeros((5, 1))})
    assert _sdata.origin(again, "obsm", "one")["params"]["n"] == 3
    assert _sdata.origin(again, "obsm", "two")["params"]["n"] == 5
    assert set(again.uns["histoniche"]) == {"step", "step.one"}


def embed(adata: ad.AnnData, key: str, um_per_px: float) -> None:
    target_of(adata).write("embedding", params={"um_per_px": um_per_px}, obsm={key: np.zeros((adata.n_obs, 1))})


@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr"])
def test_origin_of_a_field_is_the_last_step_that_wrote_it(tmp_path, kind: str) -> None:
    adata = cells()
    embed(adata, "X_he", 0.5)
    embed(adata, "X_other", 1.0)
    embed(adata, "X_he", 1.0)
    if kind == "h5ad":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad")
    elif kind == "zarr":
        adata.write_zarr(tmp_path / "a.zarr")
        adata = ad.read_zarr(tmp_path / "a.zarr")
    entries = dict(adata.uns["histoniche"])
    for order in (list(entries), list(reversed(entries)), sorted(entries), sorted(entries, reverse=True)):
        adata.uns["histoniche"] = {name: entries[name] for name in order}
        assert _sdata.origin(adata, "obsm", "X_he")["params"]["um_per_px"] == 1.0
        assert _sdata.origin(adata, "obsm", "X_other")["params"]["um_per_px"] == 1.0
    assert {name: list(entry["outputs"]) for name, entry in entries.items()} == {
        "embedding": ["obsm/X_he"], "embedding.X_other": ["obsm/X_other"],
    }  # fmt: skip


def test_step_that_overwrites_one_field_of_another_takes_that_alone() -> None:
    adata = cells()
    target_of(adata).write("one", params={}, obs={"a": np.zeros(5), "b": np.zeros(5)})
    target_of(adata).write("two", params={}, obs={"b": np.ones(5)})
    assert list(adata.uns["histoniche"]["one"]["outputs"]) == ["obs/a"]
    target_of(adata).write("two", params={}, obs={"a": np.ones(5)})
    assert {name: list(e["outputs"]) for name, e in adata.uns["histoniche"].items()} == {
        "two.b": ["obs/b"], "two": ["obs/a"],
    }  # fmt: skip


def test_copy_of_spatialdata_shares_images_but_not_the_table() -> None:
    sdata = sdata_with(np.zeros((3, 8, 8), dtype=np.uint8), Identity())
    sdata.tables["table"] = TableModel.parse(cells())
    target = _sdata.open_target(sdata, table_key=None, copy=True)
    out = target.write("step", params={}, obs={"a": np.arange(5)})
    assert "a" in out["table"].obs
    assert "a" not in sdata["table"].obs
    assert out["he"] is sdata["he"]


# --------------------------------------------------------------------------------------------------------- coordinates
def test_centroids_of_shapes_in_um() -> None:
    points = np.random.default_rng(0).uniform(0, 100, (5, 2))
    shapes = GeoDataFrame({"geometry": [Point(p) for p in points], "radius": 1.0}, index=[f"s{i}" for i in range(5)])
    scale = Scale([0.5, 0.5], axes=("x", "y"))
    adata = cells()
    adata.obs["region"] = pd.Categorical(["cells"] * 5)
    adata.obs["id"] = ["s3", "s1", "s0", "s4", "s2"]
    table = TableModel.parse(adata, region="cells", region_key="region", instance_key="id")
    sdata = SpatialData.init_from_elements(
        {"cells": ShapesModel.parse(shapes, transformations={"um": scale}), "table": table}
    )
    xy = _sdata.coordinates(_sdata.open_target(sdata, table_key=None, copy=False))
    np.testing.assert_allclose(xy, 0.5 * points[[3, 1, 0, 4, 2]])
    sdata["table"].obs["id"] = ["s3", "s1", "s0", "s4", "gone"]
    with pytest.raises(ValueError, match="1 cells without finite coordinates, the first is 'cell_4'"):
        _sdata.coordinates(_sdata.open_target(sdata, table_key=None, copy=False))
    with pytest.raises(KeyError, match="neither obsm"):
        plain = SpatialData.init_from_elements({"table": TableModel.parse(cells())})
        _sdata.coordinates(_sdata.open_target(plain, table_key=None, copy=False))


# -------------------------------------------------------------------------------------------------------------- images
def test_rotated_and_scaled_image() -> None:
    angle = np.deg2rad(30)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 7], [np.sin(angle), np.cos(angle), -3], [0, 0, 1]])
    rotation[:2, :2] *= 0.25
    sdata = sdata_with(np.zeros((3, 40, 60), dtype=np.uint8), Affine(rotation, ("x", "y"), ("x", "y")))
    image = _sdata.image(sdata, None)
    assert image.um_per_px == pytest.approx(0.25)
    px = np.array([[0.0, 0.0], [60, 40], [12.5, 30.25]])
    um = px @ rotation[:2, :2].T + rotation[:2, 2]
    np.testing.assert_allclose(image.to_px(um), px, atol=1e-9)
    np.testing.assert_allclose(_sdata.check_inside(image, um, ["a", "b", "c"]), px, atol=1e-9)
    with pytest.raises(ValueError, match=r"1 of 1 cells lie outside images\['he'\] \(60 x 40 px"):
        _sdata.check_inside(image, um[:1] - 20, ["a"])


def test_pyramid_and_sequences() -> None:
    um = Sequence([Scale([2.0, 2.0], axes=("x", "y")), Translation([5, 6], axes=("x", "y"))])
    sdata = sdata_with(np.zeros((3, 64, 32), dtype=np.uint8), um, scale_factors=[2, 2])
    image = _sdata.image(sdata, "he")
    assert [level.shape for level in image.pyramid] == [(3, 64, 32), (3, 32, 16), (3, 16, 8)]
    np.testing.assert_allclose(image.to_px(np.array([[5.0, 6], [7, 6]])), [[0, 0], [1, 0]])


@pytest.mark.parametrize(
    ("transformation", "message"),
    [
        (Scale([0.5, 1.0], axes=("x", "y")), "stretches its axes differently"),
        (Affine(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]]), ("x", "y"), ("x", "y")), "cannot be inverted"),
    ],
)
def test_transformations_that_cannot_be_used(transformation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sdata.image(sdata_with(np.zeros((3, 8, 8), dtype=np.uint8), transformation), "he")


def test_transformation_that_is_not_affine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Warp:
        def to_affine_matrix(self, **_: object) -> None:
            msg = "not affine"
            raise ValueError(msg)

    monkeypatch.setattr(_sdata, "get_transformation", lambda *_, **__: {"um": Warp()})
    with pytest.raises(ValueError, match="is a Warp, which is not affine"):
        _sdata.image(sdata_with(np.zeros((3, 8, 8), dtype=np.uint8), Identity()), "he")


def test_image_must_be_2d() -> None:
    pixels = np.zeros((3, 4, 20, 20), dtype=np.uint8)
    for factors in (None, [2]):
        stack = Image3DModel.parse(pixels, dims=("c", "z", "y", "x"), scale_factors=factors)
        with pytest.raises(ValueError, match=r"images\['he'\] has the axes .*'z'.* a 2D image \(c, y, x\) is needed"):
            _sdata.image(SpatialData.init_from_elements({"he": stack}), None)


def test_views_are_refused_only_where_results_would_be_lost() -> None:
    view = cells()[:3]
    assert _sdata.open_target(view, table_key=None, copy=False, writes=False).table is view
    with pytest.raises(ValueError, match="is a view"):
        target_of(view)
