from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, Scale, get_transformation

from histoniche.pp._virtual_he import virtual_he

CHANNELS = ["DAPI", "boundary", "18S rRNA", "alphaSMA/vimentin"]
H, E = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def stains(shape=(96, 130), seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.gamma(0.6, 20, (4, *shape)).clip(0, 250).astype(np.uint8)
    pixels[:, :20, :30] = 0
    return pixels


def make(pixels=None, *, scale_factors=None, channels=CHANNELS, chunks=None, **more):
    pixels = stains() if pixels is None else pixels
    shear = Affine([[0.4, 0.01, 5], [-0.01, 0.4, 7], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    element = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=list(channels),
        transformations={"um": shear, "global": Scale([2.0, 2.0], axes=("x", "y"))},
        scale_factors=scale_factors,
        chunks=chunks,
    )
    return SpatialData.init_from_elements({"morphology": element, **more}, attrs={"study": "a"})


def level(sdata, key="virtual_he", k=0):
    return sdata.images[key][f"scale{k}"]["image"]


def reference(pixels, percentile=99.7, a=1.6, g1=0.7, b=1.0, g2=0.6, weights=(0.65, 0.5)):
    scaled = [np.clip(p / np.percentile(p, percentile), 0, 1) for p in pixels.astype(float)]
    cyto = weights[0] * scaled[2] + weights[1] * scaled[3]
    density = a * scaled[0][..., None] ** g1 * H + b * cyto[..., None] ** g2 * E
    return np.moveaxis(255 * np.exp(-density), -1, 0)


@pytest.mark.parametrize("scale_factors", [None, [2]])
def test_equals_the_formula(scale_factors):
    sdata = make(scale_factors=scale_factors)
    assert virtual_he(sdata) is None
    image = level(sdata)
    assert image.dims == ("c", "y", "x")
    assert list(image.coords["c"].values) == ["r", "g", "b"]
    assert image.dtype == np.uint8
    assert np.abs(image.values - reference(stains())).max() <= 0.51
    assert (image.values[:, :20, :30] == 255).all(), "no signal is white"


def test_parameters_reach_the_formula():
    kwargs = {"percentile": 90.0, "a": 1.1, "g1": 0.5, "b": 0.8, "g2": 0.9}
    sdata = make()
    virtual_he(sdata, cytoplasm={"18S rRNA": 0.3, "alphaSMA/vimentin": 0.9}, chunk_size=32, **kwargs)
    assert np.abs(level(sdata).values - reference(stains(), weights=(0.3, 0.9), **kwargs)).max() <= 0.51


def test_pyramid_is_the_mean_of_the_level_above():
    sdata = make()
    virtual_he(sdata, scale_factors=(2, 2))
    full, half = level(sdata).values.astype(float), level(sdata, k=1).values
    mean = full.reshape(3, 48, 2, 65, 2).mean(axis=(2, 4))
    assert np.abs(half - mean).max() <= 1
    assert level(sdata, k=2).shape == (3, 24, 32)


def test_is_lazy_and_a_crop_reads_only_its_chunks():
    pixels, reads = stains((512, 512)), []

    def read(block, block_info=None):
        reads.append(tuple(block_info[0]["chunk-location"]))
        return block

    lazy = da.from_array(pixels, chunks=(1, 64, 64)).map_blocks(
        read, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    sdata = make(lazy)
    reads.clear()
    virtual_he(sdata, chunk_size=64)
    assert isinstance(level(sdata).data, da.Array)
    assert len(reads) <= 3 * 64, "the percentiles read each chunk of the three channels once"
    assert not any(chunk[0] == 1 for chunk in reads), "the boundary stain is not used"
    reads.clear()
    crop = level(sdata).isel(y=slice(70, 100), x=slice(70, 100)).values
    assert len(reads) == 3
    assert np.abs(crop - reference(pixels)[:, 70:100, 70:100]).max() <= 0.51


def test_lies_where_the_source_lies():
    sdata = make(scale_factors=[2])
    virtual_he(sdata)
    for system in ("um", "global"):
        source, new = (
            get_transformation(sdata.images[key], to_coordinate_system=system).to_affine_matrix(("x", "y"), ("x", "y"))
            for key in ("morphology", "virtual_he")
        )
        assert np.array_equal(source, new)


def test_marked_as_virtual_and_round_trips(tmp_path):
    sdata = make()
    virtual_he(sdata, nuclear="DAPI")
    assert sdata.images["virtual_he"].attrs["virtual"] is True
    entry = sdata.attrs["histoniche"]["virtual_he"]["virtual_he"]
    assert entry["inputs"] == {"image_key": "morphology"}
    assert entry["params"]["cytoplasm"] == {"18S rRNA": 0.65, "alphaSMA/vimentin": 0.5}
    assert entry["full_signal"]["DAPI"] == np.percentile(stains()[0], 99.7)
    sdata.write(tmp_path / "s.zarr")
    again = sd.read_zarr(tmp_path / "s.zarr")
    assert (level(again).values == level(sdata).values).all()
    assert again.attrs["histoniche"]["virtual_he"]["virtual_he"]["params"]["a"] == 1.6
    assert again.attrs["study"] == "a"
    matrix = get_transformation(again.images["virtual_he"], to_coordinate_system="um").to_affine_matrix(
        ("x", "y"), ("x", "y")
    )
    assert np.allclose(matrix, [[0.4, 0.01, 5], [-0.01, 0.4, 7], [0, 0, 1]])


def test_copy_leaves_the_object_as_it_was():
    sdata = make()
    new = virtual_he(sdata, copy=True)
    assert set(new.images) == {"morphology", "virtual_he"}
    assert set(sdata.images) == {"morphology"}
    assert sdata.attrs == {"study": "a"}


def test_two_renderings_keep_both_records():
    sdata = make()
    virtual_he(sdata)
    virtual_he(sdata, image_key="morphology", key_added="other", cytoplasm={"18S rRNA": 1.0})
    assert set(sdata.attrs["histoniche"]["virtual_he"]) == {"virtual_he", "other"}


def test_names_of_the_vendor_are_known():
    sdata = make(channels=["DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin"])
    virtual_he(sdata)
    assert np.abs(level(sdata).values - reference(stains())).max() <= 0.51


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"nuclear": "Hoechst"}, KeyError, r"Hoechst.*DAPI.*boundary"),
        ({"cytoplasm": {"eosin": 1.0}}, KeyError, "eosin"),
        ({"cytoplasm": {}}, ValueError, "cytoplasm"),
        ({"cytoplasm": {"18S rRNA": -1.0}}, ValueError, "cytoplasm"),
        ({"image_key": "he"}, KeyError, "he"),
        ({"key_added": "morphology"}, ValueError, "morphology"),
        ({"percentile": 0}, ValueError, "percentile"),
        ({"a": -1.0}, ValueError, "a=-1.0"),
        ({"g2": float("nan")}, ValueError, "g2"),
        ({"scale_factors": (1,)}, ValueError, "scale_factors"),
    ],
)
def test_bad_input_leaves_the_object_untouched(kwargs, error, match):
    sdata = make()
    with pytest.raises(error, match=match):
        virtual_he(sdata, **kwargs)
    assert set(sdata.images) == {"morphology"}
    assert sdata.attrs == {"study": "a"}


def test_missing_default_channels_are_named():
    sdata = make(channels=["DAPI", "x", "y", "z"])
    with pytest.raises(KeyError, match=r"18S rRNA.*'x', 'y', 'z'"):
        virtual_he(sdata)


def test_empty_stain_is_an_error():
    pixels = stains()
    pixels[0] = 0
    with pytest.raises(ValueError, match=r"'DAPI'.*no signal"):
        virtual_he(make(pixels))


def test_an_existing_image_is_kept_unless_overwrite():
    sdata = make()
    virtual_he(sdata)
    before = level(sdata).values
    with pytest.raises(ValueError, match="overwrite=True"):
        virtual_he(sdata, image_key="morphology", a=0.5)
    assert (level(sdata).values == before).all()
    virtual_he(sdata, image_key="morphology", a=0.5, overwrite=True)
    assert (level(sdata).values != before).any()


def test_a_table_alone_is_refused():
    with pytest.raises(TypeError, match="SpatialData"):
        virtual_he(np.zeros(3))
