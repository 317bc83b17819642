"""The reader of TissueNet on files made in its published layout."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from histoniche.seg._tissuenet import read_tissuenet

RNG = np.random.default_rng(0)


def instances(shape=(16, 20), n=3):
    labels = np.zeros(shape, dtype=np.int32)
    for number in range(1, n + 1):
        labels[2 : 2 + number + 2, 5 * number : 5 * number + 3] = number
    return labels


def tissuenet(path, *, save=np.savez_compressed, **changes):
    """The key layout of TissueNet 1.1: the type of the published X is float32, of y int32; meta is a table of objects."""
    x = RNG.random((3, 16, 20, 2), dtype=np.float32)
    y = np.stack([np.stack([instances(n=3), instances(n=2)], axis=-1)] * 3)
    y[2] = 0
    arrays = {
        "X": x,
        "y": y,
        "tissue_list": np.array(["breast", "gi", "skin"]),
        "platform_list": np.array(["codex", "codex", "mibi"]),
        "meta": np.array([["filename", "specimen"], ["a.tif", None]], dtype=object),
        **changes,
    }
    save(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("target", ["whole_cell", "nuclear"])
def test_tissuenet(tmp_path, save, target):
    path = tmp_path / "tissuenet_v1.1_val.npz"
    arrays = tissuenet(path, save=save)
    fields = read_tissuenet(path, target=target, um_per_px=0.5)
    assert [field.name for field in fields] == [f"tissuenet_v1.1_val:0000{i}" for i in range(3)]
    for i, field in enumerate(fields):
        assert field.channels == ("nuclear", "membrane")
        assert field.um_per_px == 0.5
        assert np.array_equal(field.image, arrays["X"][i].transpose(2, 0, 1))
        assert np.array_equal(field.read_labels(), arrays["y"][i, ..., int(target == "nuclear")])
        assert field.labels.dtype == np.int32
    assert fields[2].labels.max() == 0, "TissueNet has images without cells"


def test_tissuenet_channels_limit_and_types(tmp_path):
    path = tmp_path / "test.npz"
    x = RNG.random((3, 16, 20, 2))
    y = np.stack([np.stack([instances()] * 2, axis=-1)] * 3).astype(float)
    tissuenet(path, X=x, y=y, meta=None, tissue_list=None)
    fields = read_tissuenet(path, channels=["membrane"], limit=2)
    assert len(fields) == 2
    assert fields[1].channels == ("membrane",)
    assert fields[1].um_per_px is None
    assert fields[1].image.dtype == np.float32
    assert np.allclose(fields[1].image[0], x[1, ..., 1])
    assert np.array_equal(fields[1].labels, instances()), "floats that are whole numbers are labels"
    both = read_tissuenet(path, channels=["membrane", "nuclear"])[0]
    assert np.allclose(both.image, x[0, ..., ::-1].transpose(2, 0, 1))


def test_tissuenet_names_every_image_with_bad_labels(tmp_path):
    y = tissuenet(tmp_path / "whole.npz")["y"].astype(float)
    y[0, 3, 3, 0] = 1.5
    y[2, 1, 1, 0] = np.nan
    path = tmp_path / "bad.npz"
    tissuenet(path, y=y)
    with pytest.raises(ValueError, match=r"(?s)2 bad file.*bad:00000.*such as 1.5.*bad:00002.*such as nan"):
        read_tissuenet(path)
    assert len(read_tissuenet(path, target="nuclear")) == 3, "the other labels are whole"
    with pytest.warns(UserWarning, match=r"(?s)bad:00000.*bad:00002"):
        fields = read_tissuenet(path, on_error="warn")
    assert [field.name for field in fields] == ["bad:00001"]
    y = np.nan_to_num(np.floor(y))
    y[1, 1, 1, 0] = -1
    tissuenet(path, y=y)
    with pytest.raises(ValueError, match=r"bad:00001: the labels go from -1 to 3"):
        read_tissuenet(path)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"X": None}, KeyError, r"no array 'X'; it has \['meta', .*'y'\]"),
        ({"y": np.zeros((3, 16, 20, 1))}, ValueError, r"X \(3, 16, 20, 2\) and y \(3, 16, 20, 1\) must both"),
        ({"X": np.zeros((3, 2, 16, 20)), "y": np.zeros((3, 2, 16, 20))}, ValueError, r"shape \(n, y, x, 2\)"),
        ({"y": np.array([np.zeros((16, 20, 2)), None], dtype=object)}, ValueError, "'y' holds Python objects"),
        ({"y": np.zeros((2, 20, 16, 3)).T}, ValueError, "'y' is in Fortran order"),
    ],
)
def test_tissuenet_other_layouts(tmp_path, changes, error, match):
    tissuenet(tmp_path / "a.npz", **changes)
    with pytest.raises(error, match=match):
        read_tissuenet(tmp_path / "a.npz")


def member(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (b"nonsense" * 9, r"a.npz: its array 'X' is damaged \(the magic string"),
        (member(RNG.random((3, 16, 20, 2)))[:-6000], r"a.npz: its array 'X' is damaged: it ends within image 1 of 3"),
        (member(np.full((3, 16, 20, 2), "1")), r"a.npz: 'X' has the type <U1; numbers are needed"),
    ],
)
def test_tissuenet_damaged_members_name_the_file(tmp_path, x, match):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("X.npy", x)
        archive.writestr("y.npy", member(np.zeros((3, 16, 20, 2), dtype=np.int32)))
    with pytest.raises(ValueError, match=match):
        read_tissuenet(tmp_path / "a.npz")


def test_tissuenet_damaged_or_missing_file_and_bad_arguments(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError):
        read_tissuenet(path)
    tissuenet(path)
    with pytest.raises(ValueError, match=r"channels='dapi' is not among \['nuclear', 'membrane'\]"):
        read_tissuenet(path, channels=["dapi"])
    with pytest.raises(ValueError, match="target='cell' is not among"):
        read_tissuenet(path, target="cell")
    with pytest.raises(ValueError, match="limit=0"):
        read_tissuenet(path, limit=0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or no npz"):
        read_tissuenet(path)
    path.write_bytes(whole[:400] + b"\xff" * 40 + whole[440:])
    with pytest.raises(ValueError, match="damaged or no npz"):
        read_tissuenet(path)
