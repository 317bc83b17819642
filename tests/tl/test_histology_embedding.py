from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale

import histoniche as hn
from histoniche import encoders

VIT = {"encoder": "timm/vit_tiny_patch16_224", "pretrained": False}
UM = Scale([0.5, 0.5], axes=("x", "y"))


def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 255, (3, 40, 50))
    return np.kron(coarse, np.ones((1, 8, 8))).astype(np.uint8)  # 320 x 400 px, 160 x 200 um


def tissue(image: np.ndarray | None = None, transformation: object = UM, dims: tuple = ("c", "y", "x")) -> SpatialData:
    table = ad.AnnData(np.ones((30, 2), dtype=np.float32))
    table.obsm["spatial"] = np.random.default_rng(1).uniform([5, 5], [195, 155], (30, 2))
    image = pixels() if image is None else image
    parsed = Image2DModel.parse(image, dims=dims, transformations={"um": transformation})
    return SpatialData.init_from_elements({"he": parsed, "table": TableModel.parse(table)})


@pytest.mark.parametrize("mode", ["crop", "dense"])
def test_writes_features_with_their_contract(mode: str) -> None:
    sdata = tissue()
    copy = hn.tl.histology_embedding(sdata, mode=mode, copy=True, **VIT)
    assert set(sdata["table"].obsm) == {"spatial"}
    table = copy["table"]
    features = table.obsm["X_timm-vit_tiny_patch16_224"]
    assert features.shape == (30, 192)
    assert features.dtype == np.float16
    assert len(np.unique(features, axis=0)) == 30
    contract = table.uns["histoniche"]["histology_embedding"]["params"]["contract"]
    assert contract["mode"] == mode
    assert contract["um_per_px"] == 0.5
    assert contract.get("field_of_view_um", 112.0) == 112.0
    assert contract["revision"] == "random-init"


def test_embedded_encoder() -> None:
    sdata = tissue()
    hn.tl.histology_embedding(sdata, encoder="efficientnet-lite0", mode="dense")
    assert sdata["table"].obsm["X_efficientnet-lite0"].shape == (30, 40 + 112)


def test_field_of_view_sets_the_resolution() -> None:
    one, two = tissue(), tissue()
    hn.tl.histology_embedding(one, um_per_px=0.25, **VIT)
    hn.tl.histology_embedding(two, field_of_view=56.0, **VIT)
    key = "X_timm-vit_tiny_patch16_224"
    np.testing.assert_array_equal(one["table"].obsm[key], two["table"].obsm[key])


def test_cells_are_found_in_a_rotated_image(monkeypatch: pytest.MonkeyPatch) -> None:
    # A quarter turn, half a um per px, and a shift: image x runs along um y.
    matrix = np.array([[0, -0.5, 300], [0.5, 0, -20], [0, 0, 1]])
    sdata = tissue(transformation=Affine(matrix, ("x", "y"), ("x", "y")))
    px = np.random.default_rng(2).uniform(0, [400, 320], (30, 2))
    sdata["table"].obsm["spatial"] = px @ matrix[:2, :2].T + matrix[:2, 2]
    seen = {}
    embed = encoders.embed

    def spy(pyramid: tuple, points: np.ndarray, um_per_px: float, *rest: object, **options: object) -> object:
        seen.update(points=points, um_per_px=um_per_px)
        return embed(pyramid, points, um_per_px, *rest, **options)

    monkeypatch.setattr(encoders, "embed", spy)
    hn.tl.histology_embedding(sdata, mode="dense", **VIT)
    np.testing.assert_allclose(seen["points"], px, atol=1e-6)
    assert seen["um_per_px"] == pytest.approx(0.5)


def test_store_is_reused_and_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "features.zarr"
    one, two = tissue(), tissue()
    hn.tl.histology_embedding(one, mode="dense", store=store, **VIT)
    monkeypatch.setattr(encoders.FeatureStore, "write", lambda *_: pytest.fail("computed again"))
    hn.tl.histology_embedding(two, mode="dense", store=store, **VIT)
    key = "X_timm-vit_tiny_patch16_224"
    np.testing.assert_array_equal(one["table"].obsm[key], two["table"].obsm[key])
    with pytest.raises(ValueError, match=r"mode: store 'dense', asked 'crop'"):
        hn.tl.histology_embedding(tissue(), mode="crop", store=store, **VIT)
    moved = tissue()
    moved["table"].obsm["spatial"] += 1
    with pytest.raises(ValueError, match=r"features of other cells or of another image"):
        hn.tl.histology_embedding(moved, mode="dense", store=store, **VIT)
    for chunk in (store / "features" / "c").rglob("*"):
        if chunk.is_file():
            damaged = bytearray(chunk.read_bytes())
            damaged[100] ^= 1
            chunk.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is damaged"):
        hn.tl.histology_embedding(tissue(), mode="dense", store=store, **VIT)


def outside() -> SpatialData:
    sdata = tissue()
    sdata["table"].obsm["spatial"][3] = [250, 50]
    return sdata


def spoilt(value: float, row: int) -> SpatialData:
    sdata = tissue()
    sdata["table"].obsm["spatial"][0] = sdata["table"].obsm["spatial"][row] if row else value
    return sdata


def two_images() -> SpatialData:
    sdata = tissue()
    sdata.images["other"] = sdata.images["he"]
    return sdata


BAD = {
    "image_key": (tissue, {"image_key": "hne"}, KeyError, "image_key='hne' is not among the images"),
    "two_images": (two_images, {}, ValueError, "several images"),
    "rgba": (lambda: tissue(pixels()[[0, 1, 2, 2]]), {}, ValueError, "drop the alpha channel"),
    "grey": (lambda: tissue(pixels()[:1]), {}, ValueError, "it is grey"),
    "uint16": (lambda: tissue(pixels().astype(np.uint16)), {}, ValueError, "has the type uint16"),
    "float": (lambda: tissue(pixels() / 255), {}, ValueError, "has the type float64"),
    "last": (lambda: tissue(np.moveaxis(pixels(), 0, 2).copy()), {}, ValueError, "channels seem to come last"),
    "anisotropic": (lambda: tissue(transformation=Scale([0.5, 0.8], axes=("x", "y"))), {}, ValueError, "stretches"),
    "px_as_um": (lambda: tissue(transformation=Scale([0.1, 0.1], axes=("x", "y"))), {}, ValueError, "lie outside"),
    "outside": (outside, {}, ValueError, "1 of 30 cells lie outside"),
    "nan": (lambda: spoilt(np.nan, 0), {}, ValueError, "1 cells without finite coordinates"),
    "duplicate": (lambda: spoilt(0, 5), {}, ValueError, "1 cells at the coordinates of another cell"),
    "encoder": (tissue, {"encoder": "uni9"}, KeyError, "encoder='uni9' is not known: choose one of"),
    "mode": (tissue, {"mode": "sparse"}, ValueError, "mode='sparse' is unknown"),
    "um_per_px": (tissue, {"um_per_px": 0.0}, ValueError, "um_per_px=0.0 must be positive"),
    "both": (tissue, {"um_per_px": 0.5, "field_of_view": 100.0}, ValueError, "field_of_view=100.0"),
    "weights": (tissue, {"weights": "none.safetensors"}, FileNotFoundError, "does not exist"),
    "in_memory": (tissue, {"in_memory": False}, ValueError, "needs a place for it"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_and_nothing_is_written(what: str, tmp_path: Path) -> None:
    make, arguments, error, message = BAD[what]
    sdata = make()
    with pytest.raises(error, match=message):
        hn.tl.histology_embedding(sdata, **{"mode": "dense", **VIT, **arguments})
    assert set(sdata["table"].obsm) == {"spatial"}
    assert "histoniche" not in sdata["table"].uns


def test_um_per_px_unknown() -> None:
    sdata = tissue()
    sdata.images["he"] = Image2DModel.parse(pixels(), dims=("c", "y", "x"), transformations={"global": Identity()})
    with pytest.raises(ValueError, match=r"it has \['global'\]\), so um/px is unknown: call `hn\.io\.set_um"):
        hn.tl.histology_embedding(sdata, **VIT)
    hn.io.set_um(sdata, um_per_unit=0.5)
    hn.tl.histology_embedding(sdata, mode="dense", **VIT)
    assert "X_timm-vit_tiny_patch16_224" in sdata["table"].obsm


def test_anndata_has_no_image() -> None:
    with pytest.raises(TypeError, match="An image is needed, but an AnnData was given"):
        hn.tl.histology_embedding(tissue()["table"], **VIT)


def two_slides(n_images: int = 2) -> SpatialData:
    """Two slides whose rows alternate, with one image or two."""
    sdata = tissue()
    table = sdata["table"]
    if n_images == 2:
        flipped = Image2DModel.parse(pixels()[:, ::-1, ::-1].copy(), dims=("c", "y", "x"), transformations={"um": UM})
        sdata.images["other"] = flipped
    table.obs["region"] = pd.Categorical(["liver", "lung"] * 15)
    table.obs["cell_id"] = np.arange(30)
    table.uns["spatialdata_attrs"] = {"region": ["liver", "lung"], "region_key": "region", "instance_key": "cell_id"}
    return sdata


def test_one_image_for_several_slides_only_where_it_is_the_only_one() -> None:
    key = "X_timm-vit_tiny_patch16_224"
    one, alone = two_slides(n_images=1), tissue()
    for sdata in (one, alone):
        hn.tl.histology_embedding(sdata, mode="dense", **VIT)
    np.testing.assert_array_equal(one["table"].obsm[key], alone["table"].obsm[key])
    sdata = two_slides()
    for name in (None, "he"):
        message = r"2 slides of the table, \['liver', 'lung'\].*\['he', 'other'\]: give a mapping .*'liver': 'he'"
        with pytest.raises(ValueError, match=message):
            hn.tl.histology_embedding(sdata, image_key=name, mode="dense", **VIT)
    assert key not in sdata["table"].obsm
    # Stains cannot be meant.
    stains = Image2DModel.parse(np.zeros((4, 320, 400), dtype=np.uint16), dims=("c", "y", "x"))
    del sdata.images["other"]
    sdata.images["stains"] = stains
    hn.tl.histology_embedding(sdata, image_key="he", mode="dense", **VIT)
    np.testing.assert_array_equal(sdata["table"].obsm[key], alone["table"].obsm[key])


def test_each_slide_from_its_own_image(tmp_path: Path) -> None:
    key = "X_timm-vit_tiny_patch16_224"
    sdata, names = two_slides(), {"liver": "other", "lung": "he"}
    hn.tl.histology_embedding(sdata, image_key=names, mode="dense", store=tmp_path / "f", **VIT)
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"he", "other"}
    for slide, name in names.items():
        alone = two_slides()
        rows = (alone["table"].obs["region"] == slide).to_numpy()
        table = alone["table"][rows].copy()
        table.uns["spatialdata_attrs"]["region"] = [slide]
        alone.tables["table"] = table
        hn.tl.histology_embedding(alone, image_key=name, mode="dense", **VIT)
        np.testing.assert_array_equal(sdata["table"].obsm[key][rows], alone["table"].obsm[key])
    assert sdata["table"].uns["histoniche"]["histology_embedding"]["inputs"]["image_key"] == names
    sdata["table"].write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(KeyError, match=r"no image for the slides \['lung'\]"):
        hn.tl.histology_embedding(sdata, image_key={"liver": "he"}, **VIT)
    with pytest.raises(ValueError, match="in_memory=False is for one image, image_key names 2"):
        hn.tl.histology_embedding(sdata, image_key=names, in_memory=False, store=tmp_path / "g", **VIT)
    shared = hn.tl.histology_embedding(
        sdata,
        image_key={"liver": "he", "lung": "he"},
        mode="dense",
        in_memory=False,
        store=tmp_path / "g",
        copy=True,
        **VIT,
    )
    np.testing.assert_array_equal(shared["table"].obsm[key][1::2].compute(), sdata["table"].obsm[key][1::2])


def test_coarse_image_warns() -> None:
    coarse = tissue(pixels()[:, ::4, ::4].copy(), Scale([2.0, 2.0], axes=("x", "y")))
    with pytest.warns(UserWarning, match=r"images\['he'\] has 2 um/px and is enlarged to 0\.5 um/px .*um_per_px="):
        hn.tl.histology_embedding(coarse, mode="dense", **VIT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hn.tl.histology_embedding(coarse, mode="dense", um_per_px=1.4, **VIT)


def test_the_call_is_recorded(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
    sdata = tissue()
    hn.tl.histology_embedding(sdata, encoder=VIT["encoder"], mode="dense", weights=weights, batch_size=7)
    sdata["table"].write_h5ad(tmp_path / "a.h5ad")
    entry = ad.read_h5ad(tmp_path / "a.h5ad").uns["histoniche"]["histology_embedding"]
    assert entry["params"]["batch_size"] == 7
    assert entry["params"]["in_memory"]
    assert entry["inputs"]["weights"] == str(weights.resolve())
