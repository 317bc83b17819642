"""Folders of the command line: which channels images have, and label images in pairs."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from histoniche.seg._folders import channels_of, label_pairs

LABELS = np.zeros((16, 20), dtype=np.uint16)
LABELS[2:6, 2:6], LABELS[8:12, 8:15] = 1, 300


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
    else:
        tifffile.imwrite(path, array, photometric="minisblack")


# --------------------------------------------------------------------------------------------------------- channels
@pytest.mark.parametrize(
    ("shape", "channels"),
    [((16, 20), None), ((16, 20, 3), ["red", "green", "blue"]), ((3, 16, 20), ["red", "green", "blue"])],
)
def test_channels_of_the_first_image(tmp_path, shape, channels):
    write(tmp_path / "images/b.tif", np.zeros((5, 16, 20), dtype=np.uint8))
    write(tmp_path / "images/a.tif", np.ones(shape, dtype=np.uint8))
    assert channels_of(tmp_path) == channels
    assert channels_of(tmp_path / "images", images="*") == channels


def test_channels_that_cannot_be_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        channels_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"matches images='images/\*'"):
        channels_of(tmp_path)
    write(tmp_path / "images/a.tif", np.ones((5, 16, 20), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a.tif: .*\(5, 16, 20\): no axis.*Name the channels"):
        channels_of(tmp_path)
    (tmp_path / "images/a.tif").write_text("no tif")
    with pytest.raises(ValueError, match=r"a\.tif: cannot be read"):
        channels_of(tmp_path)


# ------------------------------------------------------------------------------------------------------------ pairs
def test_pairs_are_of_one_name(tmp_path):
    for name, found, true in (("b", LABELS, LABELS * 0), ("a", LABELS * 0, LABELS)):
        write(tmp_path / f"found/{name}.tif", found)
        write(tmp_path / f"true/{name}.png", true)
    names, pairs = label_pairs(tmp_path / "found", tmp_path / "true")
    assert names == ["a", "b"]
    assert pairs[0][0].dtype == pairs[0][1].dtype == np.int32
    assert [[image.max() for image in pair] for pair in pairs] == [[0, 300], [300, 0]]
    assert np.array_equal(pairs[0][1], LABELS)


def test_masks_are_measured_as_masks(tmp_path):
    mask = (LABELS > 0) * np.uint8(255)
    write(tmp_path / "found/a.tif", LABELS)
    write(tmp_path / "true/a.png", mask)
    with pytest.raises(ValueError, match=r"a.png: a mask of one class.*mask=True .--mask. measures masks"):
        label_pairs(tmp_path / "found", tmp_path / "true")
    (pair,) = label_pairs(tmp_path / "found", tmp_path / "true", mask=True)[1]
    assert np.array_equal(pair[0], pair[1])
    assert np.array_equal(pair[0], LABELS > 0)


def test_all_bad_files_are_named(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"found/{name}.tif", LABELS)
        write(tmp_path / f"true/{name}.tif", LABELS)
    (tmp_path / "found/a.tif").unlink()
    (tmp_path / "true/b.tif").write_text("no tif")
    write(tmp_path / "found/c.tif", np.stack([LABELS] * 2))
    with pytest.raises(
        ValueError, match=r"(?s)3 bad file.*a: no label image of this name in .*found.*b.tif: cannot.*c.tif"
    ):
        label_pairs(tmp_path / "found", tmp_path / "true")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        label_pairs(tmp_path / "found", tmp_path / "nowhere")
    for folder in ("empty", "void"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="void has no file"):
        label_pairs(tmp_path / "empty", tmp_path / "void")
