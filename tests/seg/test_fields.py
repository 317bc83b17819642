"""Fields: what is refused, the stretch, crops and patches."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from histoniche.seg._fields import STRETCH, Field, patches, percentile_limits, pixels_digest, stretch


def make(shape=(2, 40, 50), **changes):
    pixels = np.random.default_rng(0).gamma(2, 100, shape)
    labels = np.arange(shape[1] * shape[2]).reshape(shape[1:])
    return Field(**{"name": "a", "image": pixels, "channels": ("DNA", "membrane"), "labels": labels, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"image": np.zeros((4, 4))}, ValueError, r"'a'.*shape \(4, 4\)"),
        ({"image": np.zeros((2, 0, 4))}, ValueError, r"shape \(2, 0, 4\)"),
        ({"channels": ("DNA",)}, ValueError, r"2 channels are named \['DNA'\]"),
        ({"channels": ("DNA", "DNA")}, ValueError, "each needs a name"),
        ({"channels": "RG"}, ValueError, "2 channels are named 'RG'; each needs a name of its own, in a tuple"),
        ({"image": np.zeros((2, 40, 50), dtype=complex)}, TypeError, "complex128"),
        ({"image": np.zeros((2, 40, 50), dtype=bool)}, TypeError, "bool"),
        ({"labels": np.zeros((40, 50))}, TypeError, "labels have the type float64"),
        ({"labels": np.zeros((40, 50), dtype=bool)}, TypeError, "skimage.measure.label"),
        ({"labels": np.zeros((50, 40), dtype=int)}, ValueError, r"labels \(50, 40\) do not match the image \(40, 50\)"),
        ({"um_per_px": 0}, ValueError, "um_per_px=0 must be positive"),
        ({"um_per_px": float("nan")}, ValueError, "um_per_px=nan"),
    ],
)
def test_bad_fields_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        make(**changes)


def test_read_stretches_percentiles_to_0_and_1():
    field = make()
    read = field.read(["membrane", "DNA"])
    assert read.dtype == np.float32
    for plane, row in zip(read, (1, 0), strict=True):
        low, high = np.percentile(field.image[row], STRETCH)
        assert np.allclose(plane, np.clip((field.image[row] - low) / (high - low), 0, 1), atol=1e-5)
    assert read.min() == 0
    assert read.max() == 1


def test_stretch_does_not_depend_on_unit_and_offset():
    field = make()
    other = make(image=field.image * 7 + 1000)
    assert np.allclose(field.read(["DNA"]), other.read(["DNA"]), atol=1e-4)


def test_stretch_clips_and_survives_equal_limits():
    pixels = np.array([[[-5.0, 0, 5, 10, 20]]])
    assert np.allclose(stretch(pixels, np.array([[0, 10]])), [[[0, 0, 0.5, 1, 1]]])
    assert np.isfinite(stretch(pixels, np.array([[5, 5]]))).all()
    limits = percentile_limits(np.arange(2002).reshape(2, 7, 143))
    assert np.allclose(limits, [[10, 998], [1011, 1999]])
    assert limits.dtype == np.float32
    assert np.allclose(percentile_limits(np.arange(1001).reshape(1, 7, 143), [5, 50]), [[50, 500]])


def test_limits_of_large_images_come_from_a_grid_of_pixels():
    plane = np.tile(np.arange(2200, dtype=np.float32), (2 * 2200, 1))[:, :2200]
    field = Field("large", np.stack([plane, 3 * plane]), ("a", "b"))
    limits = field.stretch_limits()
    assert np.allclose(limits[0], np.percentile(plane, STRETCH), atol=2)
    assert np.allclose(limits[1], 3 * limits[0])


def test_limits_of_a_lazy_image_are_read_once():
    def read(block):
        reads.append(block.shape)
        return block

    reads = []
    pixels = make().image
    lazy = da.from_array(pixels, chunks=(2, 20, 25)).map_blocks(read, meta=np.empty((0, 0, 0)))
    assert np.array_equal(make(image=lazy).stretch_limits(), make().stretch_limits())
    assert reads == [(2, 20, 25)] * 4, "channels share chunks"


@pytest.mark.parametrize("value", [0, 255])
def test_constant_channels_are_an_error(value):
    pixels = make().image
    pixels[1] = value
    field = make(image=pixels)
    assert field.read(["DNA"]).shape == (1, 40, 50), "the other channel can be read"
    with pytest.raises(ValueError, match=rf"'a': channel 'membrane' is constant .*both {value}"):
        field.read(["DNA", "membrane"])


def test_values_that_are_not_finite_are_an_error():
    pixels = make().image
    pixels[0, 3, 4] = np.nan
    with pytest.raises(ValueError, match="'DNA' has values that are not finite"):
        make(image=pixels, limits=np.array([[0, 1], [0, 1]])).read(["DNA"])
    field = make(image=pixels)
    for found in (field, field.crop(10, 10, 20, 20)):
        with pytest.raises(ValueError, match="channel 'DNA' has values that are not finite"):
            found.read(["DNA"])
    with pytest.raises(ValueError, match=r"not finite elsewhere .* nan and nan.*give Field\(limits=\.\.\.\)"):
        field.crop(10, 10, 20, 20).read(["DNA"])
    assert np.isfinite(field.crop(10, 10, 20, 20).read(["membrane"])).all()


def test_a_sparse_channel_is_not_called_empty():
    pixels = np.zeros((1, 200, 200), dtype=np.uint16)
    pixels[0, 100:105, 100:105] = 500
    message = r"channel 'DNA' has the same value in more than 98.8 % .*both 0\).*Crop .*tissue, or give Field\(limits="
    with pytest.raises(ValueError, match=message):
        Field("a", pixels, ("DNA",)).read(["DNA"])
    assert Field("a", pixels, ("DNA",), limits=np.array([[0, 500]])).read(["DNA"]).sum() == 25


def test_unknown_channel_and_missing_labels():
    field = make()
    with pytest.raises(KeyError, match=r"no channel 'actin'; it has \['DNA', 'membrane'\]"):
        field.read(["DNA", "actin"])
    bare = field.without_labels()
    assert bare.labels is None
    assert field.labels is not None, "the field itself is left as it was"
    with pytest.raises(ValueError, match=r"'a' has no labels: give Field\(labels=\.\.\.\)"):
        bare.read_labels()


@pytest.mark.parametrize(("value", "dtype"), [(-1, np.int64), (2**31, np.int64), (2**32, np.uint64), (-5, np.int16)])
def test_labels_that_would_become_other_numbers_are_an_error(value, dtype):
    labels = np.zeros((40, 50), dtype=dtype)
    labels[3, 4] = value
    edges = rf"from {min(value, 0)} to {max(value, 0)}; 0 to 2147483647 is needed: relabel"
    for given in (labels, da.from_array(labels)):
        with pytest.raises(ValueError, match=f"Field 'a': the label image has numbers {edges}"):
            make(labels=given).read_labels()
    labels[3, 4] = 5
    assert make(labels=labels).read_labels().dtype == np.int32


def test_crop_is_a_window_of_the_whole_with_its_limits():
    field = make(um_per_px=0.5)
    crop = field.crop(5, 7, 20, 30)
    assert crop.shape == (20, 30)
    assert crop.name == "a[5:25,7:37]"
    assert crop.um_per_px == 0.5
    assert np.array_equal(crop.read(["DNA"]), field.read(["DNA"])[:, 5:25, 7:37])
    assert np.array_equal(crop.read_labels(), field.read_labels()[5:25, 7:37])
    twice = crop.crop(1, 2, 4, 5)
    assert np.array_equal(twice.read(["DNA"]), field.read(["DNA"])[:, 6:10, 9:14])
    own = make(image=field.image[:, 5:25, 7:37], labels=None)
    assert not np.allclose(own.read(["DNA"]), crop.read(["DNA"])), "by its own limits it would look different"


def test_crop_of_a_dask_image_is_lazy():
    def read(block):
        reads.append(block.shape)
        return block

    reads = []
    pixels = make().image
    lazy = da.from_array(pixels, chunks=(1, 10, 10)).map_blocks(read, meta=np.empty((0, 0, 0)))
    field = make(image=lazy, labels=None, limits=make().stretch_limits())
    crop = field.crop(10, 10, 10, 10)
    assert not reads
    assert np.array_equal(crop.read(["DNA"]), make().read(["DNA"])[:, 10:20, 10:20])
    assert reads == [(1, 10, 10)]


@pytest.mark.parametrize(("size", "step"), [(16, None), (16, 8), (45, None), (40, None), (50, None), (7, 5)])
def test_patches_cover_everything_and_fit(size, step):
    field = make()
    seen = np.zeros(field.shape, dtype=int)
    found = list(patches([field], size, step=step))
    for patch in found:
        numbers = patch.read_labels()
        assert patch.shape == (min(size, 40), min(size, 50))
        assert np.array_equal(patch.read(["DNA"]).ravel(), field.read(["DNA"]).ravel()[numbers.ravel()])
        seen.ravel()[numbers.ravel()] += 1
    assert seen.min() == 1
    assert len({patch.name for patch in found}) == len(found)


def test_patches_leave_small_fields_whole_and_do_not_read():
    small = make((2, 10, 12))
    assert list(patches([small], 12)) == [small]
    counts = [len(list(patches([make()], size))) for size in (10, 20, 25, 49)]
    assert counts == [4 * 5, 2 * 3, 2 * 2, 2]
    with pytest.raises(ValueError, match="size=0"):
        list(patches([small], 0))
    with pytest.raises(ValueError, match="step=-1"):
        list(patches([small], 4, step=-1))


def test_region_is_cut_and_checked() -> None:
    region = np.zeros((6, 8), dtype=bool)
    region[2:4, 3:5] = True
    item = Field("a", np.arange(48.0).reshape(1, 6, 8), ("grey",), region=region)
    np.testing.assert_array_equal(item.crop(2, 3, 3, 3).region, region[2:5, 3:6])
    with pytest.raises(ValueError, match=r"the region is \(6, 8\) int64; \(6, 8\) bool"):
        Field("a", item.image, ("grey",), region=region.astype(int))


def test_digest_follows_pixels_and_shape() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert pixels_digest(image) == pixels_digest(image.copy())
    assert len({pixels_digest(i) for i in (image, image.reshape(4, 4, 4), image + 1)}) == 3
