from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse
from scipy.special import softmax
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, TableModel
from spatialdata.transformations import Affine, Identity

import histoniche as hn
from histoniche._sdata import open_target, streamed_features
from histoniche.models import NicheStudent
from histoniche.models._features import take
from histoniche.tl import _distill_niches

QUICK = {"n_niches": 3, "encoder": "efficientnet-lite0", "mode": "dense", "n_steps": 40, "batch_size": 64, "width": 32}


def snapshot(sdata: SpatialData) -> dict:
    table = sdata["table"]
    return {
        "obs": list(table.obs.columns),
        "obsm": sorted(table.obsm),
        "obsp": sorted(table.obsp),
        "uns": sorted(table.uns),
        "steps": sorted(table.uns.get("histoniche", {})),
        "images": sorted(sdata.images),
    }


def test_runs_every_missing_step(tissue: SpatialData, tmp_path: Path) -> None:
    # Few genes and cells: PCA stands in for scVI to be quick.
    assert (
        hn.tl.distill_niches(tissue, use_rep="X_niche_pca", target_neighbors=12, model_dir=tmp_path / "model", **QUICK)
        is None
    )
    table = tissue["table"]
    logits = table.obsm["niche_logits"]
    assert logits.shape == (table.n_obs, 3)
    assert not table.obs["niche"].isna().any()
    np.testing.assert_array_equal(table.obs["niche"].cat.codes, logits.argmax(1))
    np.testing.assert_allclose(table.obs["niche_confidence"], softmax(logits, axis=1).max(1), rtol=1e-5)
    assert list(table.obs["niche"].cat.categories) == list(table.obs["niche_teacher"].cat.categories)
    assert list(table.uns["niche_colors"]) == list(table.uns["niche_teacher_colors"])
    assert {"teacher", "student"} == set(table.uns["niche_history"])
    steps = {"spatial_holdout", "spatial_neighbors", "histology_embedding", "molecular_embedding", "nolan"}
    assert set(table.uns["histoniche"]) == steps | {"distill_niches"}
    test = (table.obs["split"] == "test").to_numpy()
    assert hn.metrics.adjusted_rand(table.obs["niche_teacher"][test], table.obs["niche"][test]) > 0.3
    # The model is reachable from the table, and on disk.
    student = NicheStudent.load(table.uns["niche_model"])
    assert Path(table.uns["niche_model"]) == (tmp_path / "model").resolve()
    assert student.config.contract["encoder"] == "efficientnet-lite0"
    assert student.config.radius == pytest.approx(table.uns["niche_neighbors"]["params"]["radius"])
    assert student.config.training["agreement_test"] > 0.5
    # And everything can be written and read.
    tissue.write(tmp_path / "tissue.zarr")
    again = sd.read_zarr(tmp_path / "tissue.zarr")["table"]
    assert list(again.obs["niche"]) == list(table.obs["niche"])
    assert again.uns["histoniche"]["distill_niches"]["params"]["temperature"] == 2.0


def test_same_seed_same_labels_whatever_was_there_before(embedded: SpatialData) -> None:
    one = hn.tl.distill_niches(embedded, copy=True, **QUICK)
    two = hn.tl.distill_niches(embedded, copy=True, **QUICK)
    other = hn.tl.distill_niches(embedded, copy=True, seed=1, **QUICK)
    np.testing.assert_array_equal(one["table"].obsm["niche_logits"], two["table"].obsm["niche_logits"])
    assert (one["table"].obsm["niche_logits"] != other["table"].obsm["niche_logits"]).any()
    assert "niche" not in embedded["table"].obs
    # Without a place of its own the model lies in the cache, under the name of its weights.
    place = Path(one["table"].uns["niche_model"])
    assert place.parent == (hn.settings.cache_dir / "models").resolve()
    assert place == Path(two["table"].uns["niche_model"])


def test_beats_shuffled_teacher(embedded: SpatialData) -> None:
    real = hn.tl.distill_niches(embedded, copy=True, **QUICK)["table"]
    table = embedded["table"]
    order = np.random.default_rng(0).permutation(table.n_obs)
    test = (table.obs["split"] == "test").to_numpy()
    truth = table.obs["niche_teacher"].copy()
    table.obsm["niche_logits_teacher"] = table.obsm["niche_logits_teacher"][order]
    del table.obsm["niche_logits_teacher_disc"]  # no longer those of the labels
    with pytest.warns(UserWarning, match="niche_logits_teacher_disc'\\] is missing"):
        hn.tl.distill_niches(embedded, **QUICK)
    shuffled = hn.metrics.adjusted_rand(truth[test], table.obs["niche"][test])
    assert abs(shuffled) < 0.15
    assert hn.metrics.adjusted_rand(truth[test], real.obs["niche"][test]) > shuffled + 0.25


def test_anndata_with_an_embedding_is_enough(embedded: SpatialData) -> None:
    adata = embedded["table"].copy()
    hn.tl.distill_niches(adata, features_key="X_efficientnet-lite0", **QUICK)
    assert "niche" in adata.obs
    del adata.obsm["X_efficientnet-lite0"]
    with pytest.raises(TypeError, match="An image is needed, but an AnnData was given"):
        hn.tl.distill_niches(adata, **QUICK)


def image_of(sdata: SpatialData) -> np.ndarray:
    return np.asarray(next(iter(sdata["he"]["scale0"].values())))


def spoil(sdata: SpatialData, what: str) -> dict:
    table, pixels = sdata["table"], image_of(sdata)
    um = {"um": Affine(np.diag([0.5, 0.5, 1]), ("x", "y"), ("x", "y"))}
    if what == "normalised":
        table.X = sparse.csr_matrix(np.log1p(table.X.toarray()))
    elif what == "empty_cell":
        counts = table.X.toarray()
        counts[0] = 0
        table.X = sparse.csr_matrix(counts)
    elif what == "no_image":
        del sdata.images["he"]
    elif what == "two_images":
        sdata.images["other"] = sdata.images["he"]
    elif what == "outside":
        table.obsm["spatial"][0] = [-50, -50]
    elif what == "nan":
        table.obsm["spatial"][0] = np.nan
    elif what == "no_um":
        sdata.images["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"px": Identity()})
    elif what == "uint16":
        sdata.images["he"] = Image2DModel.parse(pixels.astype(np.uint16), dims=("c", "y", "x"), transformations=um)
    elif what == "rgba":
        rgba = np.concatenate([pixels, pixels[:1]])
        sdata.images["he"] = Image2DModel.parse(rgba, dims=("c", "y", "x"), transformations=um)
    elif what == "grey":
        sdata.images["he"] = Image2DModel.parse(pixels[:1], dims=("c", "y", "x"), transformations=um)
    elif what == "channels_last":
        last = np.ascontiguousarray(np.moveaxis(pixels, 0, 2))
        sdata.images["he"] = Image2DModel.parse(last, dims=("c", "y", "x"), transformations=um)
    elif what == "second_table":
        sdata.tables["second"] = TableModel.parse(table.copy())
    elif what == "no_test":
        table.obs["split"] = "test"
    return {
        "image_key": {"image_key": "she"},
        "k1": {"n_niches": 1},
        "many": {"n_niches": 100_000},
        "encoder": {"encoder": "uni3"},
        "rep": {"use_rep": "X_unknown"},
        "table_key": {"table_key": "cells"},
    }.get(what, {})


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("normalised", ValueError, "does not hold raw counts"),
        ("empty_cell", ValueError, "1 cells have no counts"),
        ("no_image", KeyError, "has no image"),
        ("two_images", ValueError, "several images, \\['he', 'other'\\]"),
        ("image_key", KeyError, "image_key='she' is not among the images"),
        ("outside", ValueError, "cells lie outside images\\['he'\\]"),
        ("nan", ValueError, "1 cells without finite coordinates"),
        ("no_um", ValueError, "um/px is unknown"),
        ("uint16", ValueError, "has the type uint16"),
        ("rgba", ValueError, "drop the alpha channel"),
        ("grey", ValueError, "it is grey"),
        ("channels_last", ValueError, "channels seem to come last"),
        ("second_table", ValueError, "several tables"),
        ("table_key", KeyError, "table_key='cells' is not among the tables"),
        ("no_test", ValueError, "no cell of the value 'train'"),
        ("k1", ValueError, "at least 2 niches"),
        ("many", ValueError, "more than the"),
        ("encoder", KeyError, "encoder='uni3' is not known"),
        ("rep", KeyError, "use_rep='X_unknown' is not in obsm"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    tissue: SpatialData, what: str, error: type[Exception], message: str
) -> None:
    arguments = spoil(tissue, what)
    before = snapshot(tissue)
    with pytest.raises(error, match=message):
        hn.tl.distill_niches(tissue, **{**QUICK, **arguments})
    assert snapshot(tissue) == before


def test_gated_encoder_says_how_to_get_it(tissue: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def refuse(*_: object, **__: object) -> None:
        msg = "401 Client Error: access to model MahmoodLab/UNI2-h is restricted"
        raise OSError(msg)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        hn.encoders.EncoderAccessError, match=r"institutional address.*hf auth login.*efficientnet-lite0"
    ):
        hn.tl.distill_niches(tissue, n_niches=3)
    # What ran before is whole; nothing later was begun.
    assert "X_uni2-h" not in tissue["table"].obsm
    assert "niche_teacher" not in tissue["table"].obs


def test_other_number_of_niches_than_the_teacher(embedded: SpatialData) -> None:
    with pytest.raises(ValueError, match="n_niches=5, but obsm\\['niche_logits_teacher'\\] has 3 niches"):
        hn.tl.distill_niches(embedded, **{**QUICK, "n_niches": 5})


def test_no_model_is_overwritten(embedded: SpatialData, tmp_path: Path) -> None:
    hn.tl.distill_niches(embedded, model_dir=tmp_path / "model", **{**QUICK, "n_steps": 2})
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        hn.tl.distill_niches(embedded, model_dir=tmp_path / "model", **{**QUICK, "n_steps": 3})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


def test_features_left_on_disk_teach_the_same_student(embedded: SpatialData, tmp_path: Path) -> None:
    in_memory = hn.tl.distill_niches(embedded, copy=True, **{**QUICK, "n_steps": 6})["table"]
    key = "X_efficientnet-lite0"
    expected = embedded["table"].obsm[key]
    hn.tl.histology_embedding(
        embedded, encoder="efficientnet-lite0", mode="dense", store=tmp_path / "store.zarr", in_memory=False
    )
    lazy = embedded["table"].obsm[key]
    assert not isinstance(lazy, np.ndarray)
    np.testing.assert_array_equal(np.asarray(lazy), expected)
    hn.tl.distill_niches(embedded, **{**QUICK, "n_steps": 6})
    np.testing.assert_array_equal(embedded["table"].obsm["niche_logits"], in_memory.obsm["niche_logits"])
    with pytest.raises(ValueError, match="needs a place for it: store="):
        hn.tl.histology_embedding(embedded, encoder="efficientnet-lite0", mode="dense", in_memory=False)


def test_context_is_what_the_buffer_allows(embedded: SpatialData, tmp_path: Path) -> None:
    """The buffer of two radii and a field of view leaves two hops; without a split, nothing forbids four."""
    holdout = embedded["table"].uns["histoniche"]["spatial_holdout"]["params"]
    hn.pp.spatial_neighbors(embedded, radius=1.09 * holdout["radius"])  # training cells alone give a little more
    hn.tl.distill_niches(embedded, model_dir=tmp_path / "with", **QUICK)
    del embedded["table"].obs["split"]
    hn.tl.distill_niches(embedded, model_dir=tmp_path / "without", **QUICK)
    hn.tl.distill_niches(embedded, model_dir=tmp_path / "none", context=[], **QUICK)
    assert [NicheStudent.load(tmp_path / name).config.context for name in ("with", "without", "none")] == [
        [2],
        [2, 4],
        [],
    ]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ([4], "context=\\[4\\] reads across the buffer"),
        ([0, 1], "whole numbers of hops"),
        ([1.5], "whole numbers of hops"),
    ],
)
def test_bad_context(embedded: SpatialData, context: list, message: str) -> None:
    before = snapshot(embedded)
    with pytest.raises(ValueError, match=message):
        hn.tl.distill_niches(embedded, context=context, **QUICK)
    assert snapshot(embedded) == before


def test_context_is_measured_in_radii_of_the_graph(embedded: SpatialData) -> None:
    """A graph of a larger radius than the hold-out's reads further than its buffer was made for."""
    params = embedded["table"].uns["histoniche"]["spatial_holdout"]["params"]
    hn.pp.spatial_neighbors(embedded, radius=1.5 * params["radius"])
    with pytest.raises(ValueError, match=rf"leaves 1 hops of the graph's {1.5 * params['radius']:.1f} um"):
        hn.tl.distill_niches(embedded, context=[2], **QUICK)


def hops_of(adata: ad.AnnData, radius: float, wanted: list[int] | None = None) -> list[int]:
    return _distill_niches._context_hops(
        open_target(adata, table_key=None, copy=False), "split", "spatial", wanted, radius
    )


def test_context_without_provenance_is_checked_against_the_cells() -> None:
    """Of a split of unknown origin, the space between the nearest training and test cells of a slide counts."""
    column = np.arange(0, 100, 10.0)
    rows = [0.0, 10.0, 20.0, 300.0]
    adata = ad.AnnData(np.ones((40, 1), dtype=np.float32))
    adata.obsm["spatial"] = np.array([[x, y] for y in rows for x in column])
    adata.obs["split"] = pd.Categorical(np.repeat(["train", "train", "buffer", "test"], 10))
    # 290 um, less 56 um, are 7.8 radii of 30 um and 3.9 of 60 um: less the hop of consensus, 6 and 2 hops.
    assert hops_of(adata, 30.0) == [2, 4]
    assert hops_of(adata, 60.0) == [2]
    with pytest.raises(ValueError, match="290 um, which leaves 2 hops"):
        hops_of(adata, 60.0, [3])
    # On different slides, cells are never near one another.
    adata.obs["region"] = np.repeat(["a", "b"], [30, 10])
    adata.uns["spatialdata_attrs"] = {"region": ["a", "b"], "region_key": "region", "instance_key": "id"}
    assert hops_of(adata, 1000.0, [9]) == [9]


def test_split_without_any_space_is_told() -> None:
    adata = ad.AnnData(np.ones((60, 1), dtype=np.float32))
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 100, (60, 2))
    adata.obs["split"] = np.tile(["train", "test"], 30)
    with pytest.warns(UserWarning, match=r"less than the radius of 30\.0 um.*flatter the student"):
        assert hops_of(adata, 30.0) == []


def test_missing_graph_takes_the_radius_of_the_holdout_with_the_same_target() -> None:
    adata = ad.AnnData(np.ones((900, 1), dtype=np.float32))
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 300, (900, 2))
    hn.pp.spatial_holdout(adata, target_neighbors=12, field_of_view=10.0)
    params = adata.uns["histoniche"]["spatial_holdout"]["params"]
    target = open_target(adata, table_key=None, copy=False)
    same = _distill_niches._wanted_radius(target, "split", "spatial", 12, 0)
    other = _distill_niches._wanted_radius(target, "split", "spatial", 20, 0)
    assert same == params["radius"]
    hn.pp.spatial_neighbors(adata, target_neighbors=20)
    assert other == adata.uns["niche_neighbors"]["params"]["radius"] > 1.2 * same


# ----------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("width", 97, "width=97 must be a multiple of the 4 heads: 100"),
        ("depth", 0, "depth=0 must be at least 1"),
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("n_steps", 0, "n_steps=0 must be at least 1"),
        ("lr", -1.0, "lr=-1.0 must be positive"),
        ("temperature", 0.0, "temperature=0.0 must be positive"),
        ("seed", -1, "seed=-1 must be at least 0"),
        ("mode", "tiles", "mode='tiles' is unknown"),
        ("symmetries", 3, "symmetries=3 must be one of"),
        ("layer", "raw", "layer='raw' is not among the layers"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(
    tissue: SpatialData, setting: str, value: object, message: str
) -> None:
    before = snapshot(tissue)
    with pytest.raises((ValueError, KeyError), match=message):
        hn.tl.distill_niches(tissue, use_rep="X_niche_pca", **{**QUICK, setting: value})
    assert snapshot(tissue) == before


def test_integers_of_numpy(embedded: SpatialData, tmp_path: Path) -> None:
    plain = hn.tl.distill_niches(embedded, copy=True, seed=3, **{**QUICK, "n_steps": 3})
    numbers = {name: np.int64(value) if isinstance(value, int) else value for name, value in QUICK.items()}
    hn.tl.distill_niches(embedded, seed=np.int64(3), model_dir=tmp_path / "m", **{**numbers, "n_steps": np.int64(3)})
    np.testing.assert_array_equal(embedded["table"].obsm["niche_logits"], plain["table"].obsm["niche_logits"])
    assert NicheStudent.load(tmp_path / "m").config.training["seed"] == 3


def test_counts_in_a_layer(embedded: SpatialData) -> None:
    adata = embedded["table"].copy()
    expected = adata.obsm["X_niche_pca"]
    del adata.obsm["X_niche_pca"], adata.obsm["niche_logits_teacher"]
    adata.layers["counts"] = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    with pytest.raises(ValueError, match="layer="):
        hn.tl.distill_niches(adata, use_rep="X_niche_pca", **QUICK)
    made = {}

    def stop(table: ad.AnnData, **_: object) -> None:
        made["X"] = table.obsm["X_niche_pca"]
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(_distill_niches, "nolan", stop)
        hn.tl.distill_niches(adata, use_rep="X_niche_pca", layer="counts", **QUICK)
    np.testing.assert_allclose(np.abs(made["X"][:, :8]), np.abs(expected), atol=1e-3)


def test_selected_cells_keep_their_features_on_disk(embedded: SpatialData, tmp_path: Path) -> None:
    key, table = "X_efficientnet-lite0", embedded["table"]
    in_memory = table.obsm[key]
    hn.tl.histology_embedding(
        embedded, encoder="efficientnet-lite0", mode="dense", store=tmp_path / "store.zarr", in_memory=False
    )
    assert type(streamed_features(table.copy(), key)).__name__ == "FeatureStore"
    order = np.random.default_rng(0).permutation(table.n_obs)
    for rows in (order, order[:300]):
        some = table[rows].copy()
        assert not isinstance(some.obsm[key], np.ndarray)
        np.testing.assert_array_equal(take(streamed_features(some, key), np.arange(len(rows))), in_memory[rows])
    some = table[order].copy()
    plain = some.copy()
    plain.obsm[key] = in_memory[order]
    for adata in (some, plain):
        hn.tl.distill_niches(adata, **{**QUICK, "n_steps": 2})
    np.testing.assert_array_equal(some.obsm["niche_logits"], plain.obsm["niche_logits"])
