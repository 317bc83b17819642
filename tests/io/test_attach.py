from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from histoniche._sdata import image
from histoniche.io import attach_image

RGB = np.random.default_rng(0).integers(0, 255, (120, 150, 3), dtype=np.uint8)
ALPHA = np.dstack([RGB, np.full(RGB.shape[:2], 255, dtype=np.uint8)])


@pytest.fixture
def sdata():
    return SpatialData()


def pixels(sdata, key="he"):
    return sdata.images[key]["scale0"]["image"]


def matrix(sdata, key="he"):
    return get_transformation(sdata.images[key], to_coordinate_system="um").to_affine_matrix(("x", "y"), ("x", "y"))


@pytest.mark.parametrize("kind", ["strips", "tiles", "pyramid", "planar", "png"])
def test_colour_files(sdata, tmp_path, kind):
    path = tmp_path / ("he.png" if kind == "png" else "he.tif")
    if kind == "png":
        PillowImage.fromarray(RGB).save(path)
    elif kind == "planar":
        tifffile.imwrite(path, RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    elif kind == "pyramid":
        with tifffile.TiffWriter(path) as file:
            file.write(RGB, photometric="rgb", tile=(32, 32), subifds=1)
            file.write(RGB[::2, ::2], photometric="rgb", tile=(32, 32), subfiletype=1)
    else:
        tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32) if kind == "tiles" else None)
    assert attach_image(sdata, path, um_per_px=0.5) is None
    assert list(pixels(sdata).coords["c"].values) == ["r", "g", "b"]
    assert isinstance(pixels(sdata).data, da.Array)
    assert np.array_equal(pixels(sdata).values, RGB.transpose(2, 0, 1))
    assert np.allclose(matrix(sdata), np.diag([0.5, 0.5, 1]))
    assert image(sdata, None).um_per_px == 0.5


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_alpha_is_dropped_with_a_warning(sdata, tmp_path, suffix):
    path = tmp_path / f"he.{suffix}"
    if suffix == "png":
        PillowImage.fromarray(ALPHA).save(path)
    else:
        tifffile.imwrite(path, ALPHA, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.warns(UserWarning, match=f"alpha channel of 'he.{suffix}'"):
        attach_image(sdata, path, um_per_px=0.5)
    assert np.array_equal(pixels(sdata).values, RGB.transpose(2, 0, 1))


def test_plain_files_may_be_larger_than_pillow_trusts(sdata, tmp_path, monkeypatch):
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 100)
    PillowImage.fromarray(RGB).save(tmp_path / "he.png")
    attach_image(sdata, tmp_path / "he.png", um_per_px=0.5)
    assert np.array_equal(pixels(sdata).values, RGB.transpose(2, 0, 1))
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match="cannot be read"):
        attach_image(sdata, tmp_path / "broken.png", um_per_px=0.5, key_added="broken")
    assert PillowImage.MAX_IMAGE_PIXELS == 100


def test_ome_tells_channels_and_pixel_size(sdata, tmp_path):
    stains = np.random.default_rng(0).integers(0, 4000, (4, 90, 100), dtype=np.uint16)
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": ["DAPI", "b", "c", "d"]},
        "PhysicalSizeX": 425.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.425,
        "PhysicalSizeYUnit": "µm",
    }
    tifffile.imwrite(tmp_path / "m.ome.tif", stains, metadata=metadata, tile=(32, 32))
    attach_image(sdata, tmp_path / "m.ome.tif", key_added="morphology")
    assert list(pixels(sdata, "morphology").coords["c"].values) == ["DAPI", "b", "c", "d"]
    assert np.array_equal(pixels(sdata, "morphology").values, stains)
    assert np.allclose(matrix(sdata, "morphology"), np.diag([0.425, 0.425, 1]))


@pytest.mark.parametrize(("unit", "per_um"), [("CENTIMETER", 1e-4), ("INCH", 1 / 25400)])
def test_resolution_tags(sdata, tmp_path, unit, per_um):
    resolution = 1 / (0.5 * per_um)
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", resolution=(resolution,) * 2, resolutionunit=unit)
    attach_image(sdata, tmp_path / "a.tif")
    assert np.allclose(matrix(sdata), np.diag([0.5, 0.5, 1]), rtol=1e-3)


@pytest.mark.parametrize("resolution", [None, (72, 72), (300, 300)])
def test_unknown_pixel_size(sdata, tmp_path, resolution):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", resolution=resolution, resolutionunit="INCH")
    with pytest.raises(ValueError, match="um/px unknown"):
        attach_image(sdata, tmp_path / "a.tif")
    assert not sdata.images


def test_affine_round_trip(sdata):
    affine = np.array([[0.4, 0.1, 100], [-0.1, 0.4, 50], [0, 0, 1]])
    attach_image(sdata, RGB, dims=("y", "x", "c"), affine=affine[:2])
    assert np.allclose(matrix(sdata), affine)
    px = np.array([[0.0, 0.0], [12.5, 99.5]])
    um = px @ affine[:2, :2].T + affine[:2, 2]
    assert np.allclose(image(sdata, None).to_px(um), px)


def test_arrays_and_names(sdata):
    attach_image(sdata, RGB[..., 0], um_per_px=1.0, key_added="grey", channel_names=["DAPI"])
    assert pixels(sdata, "grey").shape == (1, 120, 150)
    lazy = da.from_array(RGB.transpose(2, 0, 1))
    attach_image(sdata, lazy, um_per_px=1.0, scale_factors=())
    assert np.array_equal(sdata.images["he"].values, RGB.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="pass overwrite=True"):
        attach_image(sdata, lazy, um_per_px=2.0)
    attach_image(sdata, lazy, um_per_px=2.0, overwrite=True)
    assert np.allclose(matrix(sdata), np.diag([2, 2, 1]))


def test_pixels_are_read_when_needed(sdata):
    read = []

    def block(values):
        read.append(values.shape)
        return values

    lazy = da.from_array(RGB.transpose(2, 0, 1), chunks=(3, 40, 50)).map_blocks(
        block, meta=np.empty((0, 0, 0), np.uint8)
    )
    attach_image(sdata, lazy, um_per_px=1.0, chunk_size=40)
    assert not read


@pytest.mark.parametrize(
    ("array", "kwargs", "match"),
    [
        (RGB, {"um_per_px": 1.0}, "channels seem to come last"),
        (RGB, {"um_per_px": 1.0, "dims": ("y", "x")}, "dims"),
        (RGB, {"um_per_px": 1.0, "dims": ("z", "y", "x")}, "dims"),
        (RGB.T, {"um_per_px": -1.0}, "um_per_px"),
        (RGB.T, {}, "um/px unknown"),
        (RGB.T, {"um_per_px": 1.0, "affine": np.eye(3)}, "both"),
        (RGB.T, {"affine": np.eye(4)}, "shape"),
        (RGB.T, {"affine": np.diag([1.0, 0.0, 1.0])}, "inverted"),
        (RGB.T, {"affine": [[1, 0, 0], [0, 1, 0], [0, 1, 1]]}, "not affine"),
        (RGB.T, {"um_per_px": 1.0, "channel_names": ["a", "a", "b"]}, "channel_names"),
        (RGB.T, {"um_per_px": 1.0, "scale_factors": (64, 64)}, "scale_factors"),
    ],
)
def test_bad_input_leaves_the_object_untouched(sdata, array, kwargs, match):
    with pytest.raises(ValueError, match=match):
        attach_image(sdata, array, **kwargs)
    assert not sdata.images


def test_bad_files(sdata, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        attach_image(sdata, tmp_path / "nowhere.tif", um_per_px=1.0)
    (tmp_path / "broken.tif").write_bytes(b"not a tiff")
    with pytest.raises(ValueError, match=r"broken\.tif.*cannot be read"):
        attach_image(sdata, tmp_path / "broken.tif", um_per_px=1.0)
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"broken\.png.*cannot be read"):
        attach_image(sdata, tmp_path / "broken.png", um_per_px=1.0)
    (tmp_path / "a.czi").write_bytes(b"")
    with pytest.raises(ValueError, match="convert it"):
        attach_image(sdata, tmp_path / "a.czi", um_per_px=1.0)
    tifffile.imwrite(tmp_path / "stack.ome.tif", np.zeros((5, 64, 64), np.uint8), metadata={"axes": "ZYX"})
    with pytest.raises(ValueError, match="ZYX"):
        attach_image(sdata, tmp_path / "stack.ome.tif", um_per_px=1.0)


def test_an_element_of_another_kind_keeps_its_name():
    taken = SpatialData(images={"he": Image2DModel.parse(RGB.transpose(2, 0, 1))})
    with pytest.raises(ValueError, match="'he'"):
        attach_image(taken, RGB.transpose(2, 0, 1), um_per_px=1.0)
