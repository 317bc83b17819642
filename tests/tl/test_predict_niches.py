from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from spatialdata import SpatialData

import histoniche as hn
from histoniche.models import NicheStudent
from histoniche.neighbors import radius_graph

QUICK = {"n_niches": 3, "encoder": "efficientnet-lite0", "n_steps": 40, "batch_size": 64, "width": 32}
FEATURES = "X_efficientnet-lite0"


@pytest.fixture(scope="module")
def distilled(embedded_tissue: SpatialData, tmp_path_factory: pytest.TempPathFactory) -> SpatialData:
    place = tmp_path_factory.mktemp("models") / "student"
    return hn.tl.distill_niches(embedded_tissue, model_dir=place, copy=True, **QUICK)


@pytest.fixture
def model(distilled: SpatialData) -> Path:
    return Path(distilled["table"].uns["niche_model"])


def test_image_and_positions_are_enough(distilled: SpatialData, model: Path, tissue: SpatialData) -> None:
    table = tissue["table"]
    table.X = None
    table.layers.clear()
    for column in list(table.obs.columns):
        if column not in {"region", "cell_id"}:
            del table.obs[column]
    assert set(table.obsm) == {"spatial"}
    assert hn.tl.predict_niches(tissue, model) is None
    expected = distilled["table"]
    np.testing.assert_allclose(table.obsm["niche_logits"], expected.obsm["niche_logits"], atol=1e-3)
    assert list(table.obs["niche"]) == list(expected.obs["niche"])
    assert list(table.uns["niche_colors"]) == list(expected.uns["niche_colors"])
    assert table.obsm[FEATURES].dtype == np.float16
    assert {"histology_embedding", "predict_niches"} <= set(table.uns["histoniche"])


def test_new_tissue(model: Path) -> None:
    new = hn.datasets.synthetic_tissue(n_cells=700, n_niches=3, n_genes=60, seed=11)
    new["table"].X = None
    hn.tl.predict_niches(new, NicheStudent.load(model))
    table = new["table"]
    assert hn.metrics.adjusted_rand(table.obs["niche_true"], table.obs["niche"]) > 0.25
    assert table.obs["niche_confidence"].between(1 / 3 - 1e-6, 1).all()


def test_features_are_made_with_the_symmetries_of_the_training(tissue: SpatialData, tmp_path: Path) -> None:
    trained = hn.datasets.synthetic_tissue(n_cells=400, n_niches=3, n_genes=60, seed=2)
    options = {**QUICK, "n_steps": 3, "use_rep": "X_niche_pca", "target_neighbors": 12, "mode": "dense"}
    hn.tl.distill_niches(trained, symmetries=2, model_dir=tmp_path / "m", **options)
    assert NicheStudent.load(tmp_path / "m").config.contract["symmetries"] == 2
    hn.tl.predict_niches(tissue, tmp_path / "m")
    assert tissue["table"].uns["histoniche"]["histology_embedding"]["params"]["contract"]["symmetries"] == 2
    hn.tl.histology_embedding(tissue, encoder="efficientnet-lite0", mode="dense")
    with pytest.raises(ValueError, match="symmetries: model 2, here None"):
        hn.tl.predict_niches(tissue, tmp_path / "m")


def test_batch_size_does_not_matter(embedded: SpatialData, model: Path) -> None:
    one = hn.tl.predict_niches(embedded, model, batch_size=33, copy=True)["table"]
    two = hn.tl.predict_niches(embedded, model, batch_size=2048, copy=True)["table"]
    assert list(one.obs["niche"]) == list(two.obs["niche"])
    assert "niche" not in embedded["table"].obs


@pytest.mark.parametrize(
    ("field", "value"), [("um_per_px", 0.25), ("revision", "sha256:0000"), ("mode", "crop"), ("mean", [0.1, 0.1, 0.1])]
)
def test_features_that_break_the_contract(embedded: SpatialData, model: Path, field: str, value: object) -> None:
    table = embedded["table"]
    table.uns["histoniche"]["histology_embedding"]["params"]["contract"] = {
        **table.uns["histoniche"]["histology_embedding"]["params"]["contract"],
        field: value,
    }
    with pytest.raises(ValueError, match=f"does not keep the model's feature contract \\({field}: model"):
        hn.tl.predict_niches(embedded, model)
    assert "niche" not in table.obs


def test_features_of_unknown_origin(embedded: SpatialData, model: Path) -> None:
    table = embedded["table"]
    table.obsm["mine"] = table.obsm[FEATURES]
    with pytest.raises(ValueError, match="does not keep the model's feature contract"):
        hn.tl.predict_niches(embedded, model, features_key="mine")


def test_other_weights_are_refused_before_embedding(tissue: SpatialData, model: Path, tmp_path: Path) -> None:
    student = NicheStudent.load(model)
    student.config.contract = {**student.config.contract, "revision": "sha256:of-another-release"}
    with pytest.raises(ValueError, match="revision: model 'sha256:of-another-release', here 'sha256:"):
        hn.tl.predict_niches(tissue, student)
    assert FEATURES not in tissue["table"].obsm


def test_coordinates_in_px(embedded: SpatialData, model: Path) -> None:
    embedded["table"].obsm["spatial"] *= 50
    with pytest.raises(ValueError, match="Are the coordinates, obsm\\['spatial'\\], in um"):
        hn.tl.predict_niches(embedded, model)


def test_damaged_model(embedded: SpatialData, model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no model directory"):
        hn.tl.predict_niches(embedded, tmp_path / "none")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_niches": 7}))
    with pytest.raises(ValueError, match="is damaged"):
        hn.tl.predict_niches(embedded, copy)


def test_missing_image(tissue: SpatialData, model: Path) -> None:
    del tissue.images["he"]
    with pytest.raises(KeyError, match="has no image"):
        hn.tl.predict_niches(tissue, model)
    with pytest.raises(TypeError, match="An image is needed"):
        hn.tl.predict_niches(tissue["table"].copy(), model)


@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_unusual_density_is_told(embedded: SpatialData, model: Path, factor: float) -> None:
    student = NicheStudent.load(model)
    wanted = student.config.training["mean_neighbors"]
    embedded["table"].obsm["spatial"] *= factor
    counts = radius_graph(embedded["table"].obsm["spatial"], student.config.radius).counts
    assert not 1 / 3 < counts.mean() / wanted < 3
    with pytest.warns(
        UserWarning, match=f"have {counts.mean():.2f} neighbours .* trained with {wanted:.1f}.* um per px"
    ):
        hn.tl.predict_niches(embedded, student)


def test_density_as_in_training_is_no_news(embedded: SpatialData, model: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Cells have")
        hn.tl.predict_niches(embedded, model)


def test_student_of_features_of_ones_own(embedded: SpatialData, tmp_path: Path) -> None:
    adata = embedded["table"].copy()
    adata.obsm["X_mine"] = np.asarray(adata.obsm[FEATURES], dtype=np.float32)
    options = {**QUICK, "n_steps": 3, "features_key": "X_mine"}
    hn.tl.distill_niches(adata, model_dir=tmp_path / "m", **options)
    expected = adata.obsm["niche_logits"].copy()
    for key in (None, "X_theirs"):
        other = adata.copy()
        del other.obsm["niche_logits"], other.uns["histoniche"]["distill_niches"]
        if key is not None:
            other.obsm[key] = other.obsm.pop("X_mine")
        hn.tl.predict_niches(other, tmp_path / "m", features_key=key)
        np.testing.assert_allclose(other.obsm["niche_logits"], expected, atol=1e-5)
        assert other.uns["histoniche"]["predict_niches"]["inputs"]["features"] == (key or "X_mine")
    # Features that are known to be an encoder's are not those of an unknown one.
    with pytest.raises(ValueError, match="does not keep the model's feature contract"):
        hn.tl.predict_niches(adata, tmp_path / "m", features_key=FEATURES)
    del adata.obsm["X_mine"]
    with pytest.raises(KeyError, match=r"X_mine.* is missing.*features_key="):
        hn.tl.predict_niches(adata, tmp_path / "m")
