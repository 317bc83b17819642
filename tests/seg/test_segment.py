"""Cells of a whole image of a SpatialData object."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import shapely
from skimage.measure import regionprops
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation

import histoniche as hn
from histoniche._keys import UM
from histoniche.seg import Field, Segmenter, SegmenterConfig, as_callable, segment
from histoniche.seg import _segment as module
from histoniche.seg._segmenter import check_scale
from histoniche.seg._targets import maps_of_labels

ENCODER = "mobilenetv3_small_050"


class Threshold(Segmenter):
    """Student whose maps are a threshold: what an image shows is what it finds."""

    def __init__(self, um_per_px: float | None = 0.5, **options: Any) -> None:
        config = SegmenterConfig(ENCODER, ["DAPI"], um_per_px=um_per_px, decoder_channels=[8] * 5, **options)
        super().__init__(config, pretrained=False)

    def predict_maps(self, pixels: np.ndarray) -> np.ndarray:
        return np.stack([maps_of_labels((channels[0] > 0.5).astype(int)) for channels in pixels])


@pytest.fixture(scope="module")
def student() -> Threshold:
    return Threshold()


def discs(shape: tuple[int, int] = (200, 300), radius: int = 8, step: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Labels of discs and their centres x, y in px (pixel corner convention)."""
    rng = np.random.default_rng(0)
    y, x = np.indices(shape)
    labels, centres = np.zeros(shape, dtype=np.int32), []
    for cy in range(step // 2, shape[0], step):
        for cx in range(step // 2, shape[1], step):
            dy, dx = rng.integers(-3, 4, 2)
            centres.append((cx + dx + 0.5, cy + dy + 0.5))
            labels[(y - cy - dy) ** 2 + (x - cx - dx) ** 2 <= radius**2] = len(centres)
    return labels, np.array(centres)


def scene(
    labels: np.ndarray, *, transformation: Any = None, channels: tuple[str, ...] = ("18S", "DAPI"), **options: Any
) -> SpatialData:
    """Object whose channel DAPI is 1000 on objects and 100 beside them."""
    pixels = np.stack([np.full_like(labels, 7), 100 + 900 * (labels > 0)])[-len(channels) :].astype(np.uint16)
    transformation = Scale([0.5, 0.5], axes=("x", "y")) if transformation is None else transformation
    image = Image2DModel.parse(
        da.from_array(pixels, chunks=(1, 64, 100)), dims=("c", "y", "x"), c_coords=list(channels),
        transformations={UM: transformation}, **options,
    )  # fmt: skip
    return SpatialData(images={"morphology": image})


def run(sdata: SpatialData, student: Segmenter, **options: Any) -> SpatialData:
    out = segment(sdata, student, copy=True, **{"tile_px": 128, "overlap_px": 32, **options})
    assert out is not None
    return out


def same_objects(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return pairs.shape[1] == a.max() + 1 == b.max() + 1


# ----------------------------------------------------------------------------------------------------------- results
def test_discs_become_cells(student: Threshold) -> None:
    truth, centres = discs()
    sdata = scene(truth)
    out = run(sdata, student)
    assert list(sdata.labels) == list(sdata.shapes) == list(sdata.tables) == []
    found, table, shapes = out["cells_labels"], out["cells_table"], out["cells"]
    labels = np.asarray(found.data)
    assert labels.dtype == np.int32
    assert same_objects(labels, truth)
    matrix = get_transformation(found, UM).to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(matrix, np.diag([0.5, 0.5, 1]))

    order = [truth[labels == n][0] - 1 for n in range(1, labels.max() + 1)]
    assert table.obsm["spatial"].dtype == np.float64
    np.testing.assert_allclose(table.obsm["spatial"], 0.5 * centres[order])
    assert table.obs["cell_id"].tolist() == list(range(1, len(centres) + 1)) == shapes.index.tolist()
    assert table.shape == (len(centres), 0)
    assert table.X.shape == table.shape
    assert (table.obs["region"] == "cells").all()
    assert table.uns["spatialdata_attrs"] == {"region": "cells", "region_key": "region", "instance_key": "cell_id"}

    expected = regionprops(labels)[0]
    assert table.obs["area_um2"].to_numpy() == pytest.approx(np.bincount(labels.ravel())[1:] * 0.25)
    assert table.obs["major_axis_um"].iloc[0] == pytest.approx(expected.axis_major_length * 0.5)
    assert table.obs["minor_axis_um"].iloc[0] == pytest.approx(expected.axis_minor_length * 0.5)
    assert table.obs["perimeter_um"].iloc[0] == pytest.approx(expected.perimeter * 0.5)
    assert table.obs["perimeter_um"].iloc[0] == pytest.approx(2 * np.pi * 8 * 0.5, rel=0.06)
    assert table.obs["eccentricity"].max() < 0.1
    assert table.obs["solidity"].min() > 0.93  # steps of pixels count as dents
    assert (table.obs["mean_intensity"] == 1000).all()


def test_polygons_are_the_pixels_in_um(student: Threshold) -> None:
    truth, _ = discs()
    out = run(scene(truth), student)
    polygons, table = out["cells"].geometry, out["cells_table"]
    assert isinstance(get_transformation(out["cells"], UM), Identity)
    assert polygons.is_valid.all()
    assert (polygons.geom_type == "Polygon").all()
    assert polygons.area.to_numpy() == pytest.approx(table.obs["area_um2"].to_numpy(), rel=0.03)
    np.testing.assert_allclose(shapely.get_coordinates(polygons.centroid), table.obsm["spatial"], atol=0.02)


def test_provenance(student: Threshold) -> None:
    out = run(scene(discs()[0]), student, min_area=2.0)
    entry = out["cells_table"].uns["histoniche"]["segment"]
    assert entry["inputs"] == {"image_key": "morphology"}
    assert entry["params"]["weights_sha256"] == student.digest
    assert entry["params"]["channels"] == ["DAPI"]
    assert entry["params"]["min_area"] == 2.0
    assert entry["params"]["limits"].tolist() == [[100, 1000]]
    assert "obsm/spatial" in entry["outputs"]


def test_saved_and_read_again(student: Threshold, tmp_path: Path) -> None:
    out = run(scene(discs()[0]), student)
    out.write(tmp_path / "a.zarr")
    again = SpatialData.read(tmp_path / "a.zarr")
    np.testing.assert_array_equal(np.asarray(again["cells_labels"].data), np.asarray(out["cells_labels"].data))
    assert again["cells_table"].obs["area_um2"].tolist() == out["cells_table"].obs["area_um2"].tolist()


def test_ready_for_the_niche_side(student: Threshold) -> None:
    truth, _ = discs()
    sdata = scene(truth)
    rgb = np.random.default_rng(0).integers(0, 255, (3, *truth.shape), dtype=np.uint8)
    sdata["he"] = Image2DModel.parse(
        rgb, dims=("c", "y", "x"), transformations={UM: Scale([0.5, 0.5], axes=("x", "y"))}
    )
    assert segment(sdata, student, image_key="morphology") is None
    hn.pp.spatial_neighbors(sdata, table_key="cells_table")
    hn.tl.histology_embedding(
        sdata,
        table_key="cells_table",
        image_key="he",
        encoder=f"timm/{ENCODER}",
        pretrained=False,
        mode="dense",
        um_per_px=0.5,
    )
    table = sdata["cells_table"]
    assert "niche_connectivities" in table.obsp
    assert table.obsm[f"X_timm-{ENCODER}"].shape[0] == table.n_obs == truth.max()


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 3}, {"tile_px": 64}, {"tile_px": 512, "overlap_px": 64}]
)
def test_tiles_and_batches_do_not_matter(student: Threshold, options: dict[str, int]) -> None:
    sdata = scene(discs()[0])
    expected, found = run(sdata, student), run(sdata, student, **options)
    np.testing.assert_array_equal(np.asarray(found["cells_labels"].data), np.asarray(expected["cells_labels"].data))
    np.testing.assert_array_equal(found["cells_table"].obsm["spatial"], expected["cells_table"].obsm["spatial"])


def test_network_gives_the_same_for_any_batch_size() -> None:
    truth, _ = discs()
    network = Segmenter(SegmenterConfig(ENCODER, ["DAPI"], 0.5, decoder_channels=[8] * 5), pretrained=False)
    network.config.threshold = float(np.median(network.predict_maps((truth[None, None] > 0).astype(np.float32))[:, 0]))
    sdata = scene(truth)
    maps = [np.asarray(run(sdata, network, batch_size=n)["cells_labels"].data) > 0 for n in (1, 4)]
    assert 0.01 < maps[0].mean() < 0.99
    assert (maps[0] != maps[1]).mean() < 1e-3


def test_many_regions_and_blocks_are_one_image(student: Threshold, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, _ = discs((400, 500))
    sdata = scene(truth)
    expected = run(sdata, student)
    whole = module.tiled_labels
    monkeypatch.setattr(module, "_REGION_PX", 200)
    monkeypatch.setattr(module, "tiled_labels", lambda *a, **k: whole(*a, **k, block=90, halo=32))
    found = run(sdata, student, tile_px=64)
    assert same_objects(np.asarray(found["cells_labels"].data), np.asarray(expected["cells_labels"].data))
    a, b = (out["cells_table"].obs.assign(
        x=out["cells_table"].obsm["spatial"][:, 0], y=out["cells_table"].obsm["spatial"][:, 1]
    ).sort_values(["y", "x"]) for out in (found, expected))  # fmt: skip
    for name in ("x", "y", "area_um2", "perimeter_um", "solidity", "mean_intensity"):
        np.testing.assert_allclose(a[name], b[name])


def test_images_smaller_than_a_tile(student: Threshold) -> None:
    truth, _ = discs((40, 50))
    assert same_objects(np.asarray(run(scene(truth), student, tile_px=512)["cells_labels"].data), truth)


def test_labels_on_disk(student: Threshold, tmp_path: Path) -> None:
    sdata = scene(discs()[0])
    expected = run(sdata, student)
    found = run(sdata, student, store=tmp_path / "new" / "labels.zarr")
    assert isinstance(found["cells_labels"].data, da.Array)
    np.testing.assert_array_equal(found["cells_labels"].data.compute(), np.asarray(expected["cells_labels"].data))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["labels.zarr"]
    with pytest.raises(FileExistsError, match="exists"):
        run(sdata, student, store=tmp_path / "new" / "labels.zarr")


def test_min_area_in_um2(student: Threshold) -> None:
    truth = np.zeros((100, 100), dtype=np.int32)
    truth[10:20, 10:20], truth[40:70, 40:70] = 1, 2
    out = run(scene(truth), student, min_area=26.0)
    assert out["cells_table"].obs["area_um2"].tolist() == [225.0]
    assert run(scene(truth), student, min_area=25.0)["cells_table"].n_obs == 2


def test_rotated_and_shifted_image(student: Threshold) -> None:
    truth, centres = discs()
    matrix = np.array([[0.0, -0.5, 300.0], [0.5, 0.0, 20.0], [0, 0, 1]])
    out = run(scene(truth, transformation=Affine(matrix, ("x", "y"), ("x", "y"))), student)
    expected = centres @ matrix[:2, :2].T + matrix[:2, 2]
    found = out["cells_table"].obsm["spatial"]
    labels = np.asarray(out["cells_labels"].data)
    order = [truth[labels == n][0] - 1 for n in range(1, labels.max() + 1)]
    np.testing.assert_allclose(found, expected[order])
    np.testing.assert_allclose(shapely.get_coordinates(out["cells"].geometry.centroid), found, atol=0.02)


def test_other_channel_and_model_directory(student: Threshold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, _ = discs()
    Segmenter(student.config, pretrained=False).save(tmp_path / "model")
    monkeypatch.setattr(Segmenter, "predict_maps", Threshold.predict_maps)
    sdata = scene(truth, channels=("nuclei",))
    out = segment(sdata, tmp_path / "model", channel="nuclei", copy=True)
    assert out is not None
    assert same_objects(np.asarray(out["cells_labels"].data), truth)


# -------------------------------------------------------------------------------------------------------- resolution
def test_other_resolution_is_refused_or_resampled() -> None:
    truth, centres = discs((250, 300), radius=16, step=50)
    fine = scene(truth, transformation=Scale([0.25, 0.25], axes=("x", "y")), scale_factors=[2])
    student = Threshold(0.5)
    with pytest.raises(ValueError, match=r"2\.00 times apart, more than 1\.5.* resample=True"):
        run(fine, student)
    assert list(fine.shapes) == []
    out = run(fine, student, resample=True)
    labels = np.asarray(out["cells_labels"].data)
    assert labels.shape == (125, 150)
    matrix = get_transformation(out["cells_labels"], UM).to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(matrix, np.diag([0.5, 0.5, 1]))
    table = out["cells_table"]
    assert table.n_obs == len(centres)
    nearest = np.linalg.norm(table.obsm["spatial"][:, None] - 0.25 * centres[None], axis=2).min(axis=1)
    assert nearest.max() < 0.1
    assert table.obs["area_um2"].to_numpy() == pytest.approx((truth == 1).sum() / 16, rel=0.1)


def test_within_one_and_a_half_pixels_are_taken_as_they_are() -> None:
    truth, _ = discs()
    out = run(scene(truth), Threshold(0.4))
    assert np.asarray(out["cells_labels"].data).shape == truth.shape


def test_unknown_resolution_must_be_named() -> None:
    truth, _ = discs()
    unknown = Threshold(None)
    with pytest.raises(ValueError, match=r"where only one is known.* um_per_px= says"):
        run(scene(truth), unknown)
    assert same_objects(np.asarray(run(scene(truth), unknown, um_per_px=0.5)["cells_labels"].data), truth)
    with pytest.raises(ValueError, match=r"more than 1.5"):
        run(scene(truth), unknown, um_per_px=0.2)
    with pytest.raises(ValueError, match=r"um_per_px=0.3 must be positive.* trained at 0\.5"):
        run(scene(truth), Threshold(0.5), um_per_px=0.3)


# ------------------------------------------------------------------------------------------------------------ limits
def test_a_pyramid_changes_neither_limits_nor_labels(student: Threshold) -> None:
    truth = discs((1024, 1100))[0]
    pixels = np.random.default_rng(0).normal(100, 30, truth.shape) + (truth > 0) * (np.arange(1100) / 2)
    found = []
    for factors in (None, [2]):
        sdata = scene(truth, scale_factors=factors)
        image = Image2DModel.parse(
            np.stack([pixels, pixels]), dims=("c", "y", "x"), c_coords=["18S", "DAPI"], scale_factors=factors,
            transformations={UM: Scale([0.5, 0.5], axes=("x", "y"))},
        )  # fmt: skip
        sdata["morphology"] = image
        out = run(sdata, student)
        found.append(
            (out["cells_table"].uns["histoniche"]["segment"]["params"]["limits"], np.asarray(out["cells_labels"]))
        )
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][0], Field("array", pixels[None], ("DAPI",)).stretch_limits())


# -------------------------------------------------------------------------------------------------------- bad input
def unchanged(sdata: SpatialData) -> bool:
    return [name for _, name, _ in sdata.gen_elements()] == ["morphology"]


def test_no_such_channel_or_image(student: Threshold) -> None:
    sdata = scene(discs()[0])
    with pytest.raises(KeyError, match=r"no channel 'CD3'.*\['18S', 'DAPI'\]"):
        segment(sdata, student, channel="CD3")
    with pytest.raises(KeyError, match="image_key='he'"):
        segment(sdata, student, image_key="he")
    with pytest.raises(TypeError, match="Expected a SpatialData, got ndarray"):
        segment(np.zeros((3, 3)), student)  # type: ignore[arg-type]
    assert unchanged(sdata)


@pytest.mark.parametrize("value", [0, 65535])
def test_empty_and_saturated_channels(student: Threshold, value: int) -> None:
    sdata = scene(discs()[0])
    sdata["morphology"].data = da.full((2, 200, 300), value, dtype=np.uint16)
    with pytest.raises(ValueError, match=f"'DAPI' of .* is constant .* both {value}"):
        segment(sdata, student)
    assert unchanged(sdata)


def test_values_that_are_not_finite(student: Threshold) -> None:
    sdata = scene(discs()[0])
    pixels = np.random.default_rng(0).random((2, 200, 300))
    pixels[1, 100, 100] = np.nan
    sdata["morphology"].data = da.from_array(pixels)
    with pytest.raises(ValueError, match=r"'DAPI' .* not finite"):
        segment(sdata, student)
    plane = module._plane(scene(discs()[0]), student, None, None, um_per_px=None, resample=False)
    with pytest.raises(ValueError, match=r"'DAPI'.* not finite"):  # what the sample of the limits did not see
        plane.predictor(student)(pixels[None, 1:])
    assert unchanged(sdata)


def test_no_object_found(tmp_path: Path) -> None:
    sdata = scene(discs()[0])
    with pytest.raises(ValueError, match=r"No object found in channel .*'DAPI'.* min_area 1e\+06 um2"):
        segment(sdata, Threshold(), min_area=1e6, store=tmp_path / "labels.zarr")
    assert unchanged(sdata)
    assert list(tmp_path.glob("*labels*")) == list(tmp_path.glob(".histoniche*")) == []


@pytest.mark.parametrize("name", ["cells", "cells_labels", "cells_table"])
def test_taken_names(student: Threshold, name: str) -> None:
    sdata = scene(discs()[0])
    sdata[name] = sdata["morphology"]
    with pytest.raises(ValueError, match=f"already has an element '{name}'"):
        segment(sdata, student)
    assert len(list(sdata.gen_elements())) == 2


def test_damaged_model_directory(student: Threshold, tmp_path: Path) -> None:
    sdata = scene(discs()[0])
    with pytest.raises(FileNotFoundError, match="no model directory"):
        segment(sdata, tmp_path / "none")
    Segmenter(student.config, pretrained=False).save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        segment(sdata, tmp_path / "model")
    assert unchanged(sdata)


def test_sizes_out_of_range(student: Threshold) -> None:
    sdata = scene(discs()[0])
    with pytest.raises(ValueError, match="tile=100"):
        segment(sdata, student, tile_px=100)
    with pytest.raises(ValueError, match="min_area=-1"):
        segment(sdata, student, min_area=-1)
    assert unchanged(sdata)


def test_an_error_midway_leaves_nothing(student: Threshold, monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = scene(discs()[0])

    def fails(*_: Any) -> None:
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(module, "measure", fails)
    with pytest.raises(OSError, match="disk full"):
        segment(sdata, student)
    assert unchanged(sdata)


def test_image_without_um(student: Threshold) -> None:
    sdata = scene(discs()[0])
    sdata["morphology"].attrs["transform"] = {"global": Identity()}
    with pytest.raises(ValueError, match="um/px is unknown"):
        segment(sdata, student)


def test_a_volume_is_refused(student: Threshold) -> None:
    volume = Image3DModel.parse(
        np.zeros((1, 3, 50, 50), np.uint8), dims=("c", "z", "y", "x"), c_coords=["DAPI"],
        transformations={UM: Scale([0.5, 0.5], axes=("x", "y"))},
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"images\['volume'\] has the axes \('c', 'z', 'y', 'x'\).*select or project z"
    ):
        segment(SpatialData(images={"volume": volume}), student)


def test_a_sparse_channel_is_not_called_empty(student: Threshold) -> None:
    truth = np.zeros((400, 400), dtype=np.int32)
    truth[100:110, 100:110] = 1
    with pytest.raises(
        ValueError, match=r"'DAPI' of .* same value in more than 98.8 % .* both 100\).*Crop the image to the"
    ):
        segment(scene(truth), student)


# ---------------------------------------------------------------------------------------------------- all or nothing
@pytest.mark.parametrize("key", ["my cells", "a/b", "", ".", "..", "__x", "_", 3.5j])
def test_bad_names_are_refused_before_any_work(
    student: Threshold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    sdata = scene(discs()[0])
    monkeypatch.setattr(module, "tiled_maps", None)
    with pytest.raises(
        ValueError, match=rf"key_added={re.escape(repr(key))} makes .*spatialdata refuses .*: use letters"
    ):
        segment(sdata, student, key_added=key, store=tmp_path / "labels.zarr")
    assert unchanged(sdata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Cells", "CELLS_table", "cells_Labels"])
def test_names_that_differ_in_case_alone_are_taken(student: Threshold, name: str) -> None:
    sdata = scene(discs()[0])
    sdata[name] = sdata["morphology"]
    with pytest.raises(ValueError, match=rf"already has an element '{name}' \(key_added='cells' makes .*case does not"):
        segment(sdata, student)
    assert len(list(sdata.gen_elements())) == 2


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("where", ["_table", "Labels2DModel", "SpatialData"])
def test_an_error_at_the_end_leaves_nothing(
    student: Threshold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, copy: bool
) -> None:
    sdata = scene(discs()[0])

    def fails(*_: Any, **__: Any) -> None:
        msg = "no memory"
        raise MemoryError(msg)

    with monkeypatch.context() as patched:
        if where == "_table":
            patched.setattr(module, "_table", fails)
        elif where == "Labels2DModel":
            patched.setattr(module.Labels2DModel, "parse", fails)
        else:
            patched.setattr(SpatialData, "init_from_elements", fails)
            patched.setattr(type(sdata.tables), "__setitem__", fails)  # labels and shapes are in by then
        with pytest.raises(MemoryError):
            segment(sdata, student, store=tmp_path / "new" / "er" / "labels.zarr", copy=copy)
    assert unchanged(sdata)
    assert not list(tmp_path.iterdir())
    segment(sdata, student, store=tmp_path / "new" / "er" / "labels.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert sdata["cells_labels"].data.max().compute() == sdata["cells_table"].n_obs


# ---------------------------------------------------------------------------------------------------------- callable
def test_as_callable_segments_the_first_channel(student: Threshold) -> None:
    truth, _ = discs()
    function = as_callable(student)
    pixels = np.stack([100 + 900 * (truth > 0), np.zeros_like(truth)]).astype(np.uint16)
    labels = function(pixels)
    assert labels.dtype == np.int32
    assert same_objects(labels, truth)
    assert not function(np.zeros((1, 30, 30))).any()
    assert not as_callable(student, limits=(0, 5000))(pixels).any()  # 1000 is below half of the range
    assert same_objects(as_callable(student, limits=(100, 1000))(pixels), truth)


def test_as_callable_checks_its_input(student: Threshold) -> None:
    with pytest.raises(ValueError, match=r"shape \(30, 30\); \(c, y, x\)"):
        as_callable(student)(np.zeros((30, 30)))
    with pytest.raises(ValueError, match="not finite"):
        as_callable(student)(np.full((1, 30, 30), np.nan))
    with pytest.raises(ValueError, match="must rise"):
        as_callable(student, limits=(5, 5))


def test_scale_rule_is_the_models() -> None:
    check_scale(0.5, 0.74, "x")
    with pytest.raises(ValueError, match=r"1.52 times apart"):
        check_scale(0.5, 0.76, "x")


def test_a_student_of_several_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, _ = discs()
    student = Threshold()
    student.config.channels = ["DAPI", "18S"]
    pixels = np.stack([np.where(truth > 0, 50, 5 + truth % 2), 100 + 900 * (truth > 0)]).astype(np.uint16)
    sdata = scene(truth)
    sdata["morphology"].data = da.from_array(pixels)
    seen: list[np.ndarray] = []

    def noted(self: Threshold, batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        return np.stack([maps_of_labels((channels[0] > 0.5).astype(int)) for channels in batch])

    monkeypatch.setattr(Threshold, "predict_maps", noted)
    out = run(sdata, student)
    assert same_objects(np.asarray(out["cells_labels"]), truth)
    assert seen[0].shape[1] == 2
    assert out["cells_table"].uns["histoniche"]["segment"]["params"]["channels"] == ["DAPI", "18S"]
    assert out["cells_table"].obs["mean_intensity"].to_numpy() == pytest.approx(1000)  # of the first channel
    with pytest.raises(ValueError, match=r"channel=\['DAPI'\], but the student sees 2"):
        segment(sdata, student, channel="DAPI")
    assert same_objects(as_callable(student)(pixels[::-1]), truth)
    with pytest.raises(ValueError, match="at least 2 channel"):
        as_callable(student)(pixels[:1])
