"""Readers on files made in the published layouts, and on the real BBBC038."""

from __future__ import annotations

import warnings
import zipfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from histoniche.seg._readers import read_bbbc038, read_folder

RNG = np.random.default_rng(0)


def instances(shape=(16, 20), n=3):
    labels = np.zeros(shape, dtype=np.int32)
    for number in range(1, n + 1):
        labels[2 : 2 + number + 2, 5 * number : 5 * number + 3] = number
    return labels


# --------------------------------------------------------------------------------------------------------- BBBC038
def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey(level, shape=(16, 20)):
    """RGBA as in the data set: grey of a level, nuclei 30 brighter on dark, darker on bright ground."""
    plane = np.full(shape, level, dtype=np.uint8)
    plane[instances(shape) > 0] += 30 if level < 100 else 256 - 30
    return np.dstack([plane] * 3 + [np.full(shape, 255, dtype=np.uint8)])


def add(root, name, picture=None, labels=None):
    save(root / name / "images" / f"{name}.png", grey(10) if picture is None else picture)
    labels = instances() if labels is None else labels
    for number in np.unique(labels[labels > 0]):
        save(root / name / "masks" / f"m{number}.png", np.where(labels == number, 255, 0).astype(np.uint8))


def pack(root, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(root).as_posix()}")
        archive.writestr(f"__MACOSX/{prefix}a/images/._a.png", b"x")
    return path


@pytest.fixture
def bbbc038(tmp_path):
    root = tmp_path / "stage1_train"
    for name in ("b", "a"):
        add(root, name)
    coloured = grey(200)
    coloured[..., 1] //= 2
    add(root, "c", grey(220))
    add(root, "d", coloured)
    (root / "a" / "images" / ".DS_Store").write_bytes(b"x")
    (root / "stage1_train_labels.csv").write_text("ImageId,EncodedPixels")
    return root


@pytest.mark.parametrize("layout", ["folder", "zip", "zip in a folder"])
def test_bbbc038(bbbc038, tmp_path, layout):
    path = bbbc038
    if layout != "folder":
        path = pack(bbbc038, tmp_path / "stage1_train.zip", "" if layout == "zip" else "stage1_train/")
    fields = read_bbbc038(path)
    assert [field.name for field in fields] == ["a", "b"]
    for field in fields:
        assert field.channels == ("DNA",)
        assert field.image.dtype == np.uint8
        assert np.array_equal(field.image[0], grey(10)[..., 0])
        assert np.array_equal(field.read_labels(), instances())
    assert [field.name for field in read_bbbc038(path, limit=1)] == ["a"]


def test_bbbc038_kinds_and_inversion(bbbc038):
    (bright,) = read_bbbc038(bbbc038, kinds=["brightfield"])
    (histology,) = read_bbbc038(bbbc038, kinds=["histology"])
    assert [bright.name, histology.name] == ["c", "d"]
    assert np.array_equal(bright.image[0], 255 - grey(220)[..., 0])
    r, g, b = (np.where(instances() > 0, 170, 200) // half for half in (1, 2, 1))
    assert np.abs(histology.image[0] - (255 - (0.299 * r + 0.587 * g + 0.114 * b))).max() <= 0.6
    for field in (bright, histology):
        assert field.image[0][field.labels > 0].min() > field.image[0][field.labels == 0].max()
    every = read_bbbc038(bbbc038, kinds=("fluorescence", "brightfield", "histology"))
    assert [field.name for field in every] == ["a", "b", "c", "d"]


def test_bbbc038_overlaps_go_to_the_later_mask(tmp_path):
    add(tmp_path, "a")
    masks = tmp_path / "a" / "masks"
    late = np.zeros((16, 20), dtype=np.uint8)
    late[3:6, 4:12] = 255
    save(masks / "z.png", late)
    expected = instances()
    expected[late > 0] = 4
    assert np.array_equal(read_bbbc038(tmp_path)[0].labels, expected)
    save(masks / "zz.png", late)
    with pytest.raises(ValueError, match=r"a/masks/z.png: every pixel of the mask lies in later masks"):
        read_bbbc038(tmp_path)


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_bbbc038_reports_all_bad_files_at_once(bbbc038, tmp_path, layout):
    for name in ("e", "f", "g", "h", "i"):
        add(bbbc038, name)
    save(bbbc038 / "e" / "masks" / "m1.png", np.full((8, 8), 255, dtype=np.uint8))
    save(bbbc038 / "e" / "masks" / "m2.png", np.zeros((16, 20), dtype=np.uint8))
    (bbbc038 / "f" / "images" / "f.png").write_bytes((bbbc038 / "f" / "images" / "f.png").read_bytes()[:60])
    (bbbc038 / "f" / "masks" / "m3.png").write_text("no picture")
    (bbbc038 / "g" / "images" / "g.png").unlink()
    for file in (bbbc038 / "h" / "masks").iterdir():
        file.unlink()
    save(bbbc038 / "i" / "images" / "j.png", grey(10))
    path = bbbc038 if layout == "folder" else pack(bbbc038, tmp_path / "a.zip")
    expected = [
        r"e/masks/m1.png: the mask has the size \(8, 8\), its image \(16, 20\)",
        "e/masks/m2.png: the mask has no pixel",
        "f/images/f.png: cannot be read",
        "f/masks/m3.png: cannot be read",
        "g: 0 files in images/; one is needed",
        "h: no masks",
        "i: 2 files in images/; one is needed",
    ]
    with pytest.raises(ValueError, match="(?s)7 bad file.*" + ".*".join(expected) + ".*on_error"):
        read_bbbc038(path)
    with pytest.warns(UserWarning, match="(?s)" + ".*".join(expected)) as caught:
        fields = read_bbbc038(path, on_error="warn")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [field.name for field in fields] == ["a", "b"]


def test_bbbc038_other_errors(bbbc038, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_bbbc038(tmp_path / "nowhere")
    (tmp_path / "cut.zip").write_bytes(pack(bbbc038, tmp_path / "a.zip").read_bytes()[:3000])
    with pytest.raises(ValueError, match="neither a folder nor a whole zip"):
        read_bbbc038(tmp_path / "cut.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in the layout"):
        read_bbbc038(tmp_path / "empty")
    for name in ("a", "b"):
        save(bbbc038 / name / "images" / f"{name}.png", grey(220))
    with pytest.raises(ValueError, match=r"kinds \['fluorescence'\]; there are {'brightfield': 3, 'histology': 1}"):
        read_bbbc038(bbbc038)
    with pytest.raises(ValueError, match="kinds='nuclei' is not among"):
        read_bbbc038(bbbc038, kinds=["nuclei"])
    with pytest.raises(ValueError, match="kinds='' is not among"):
        read_bbbc038(bbbc038, kinds=[])
    with pytest.raises(ValueError, match="on_error='skip' is not among"):
        read_bbbc038(bbbc038, on_error="skip")


def test_bbbc038_real(data_dir):
    path = data_dir / "bbbc038" / "stage1_train.zip"
    fields = read_bbbc038(path, limit=3)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for field in fields:
            masks = sorted(name for name in names if f"/{field.name}/masks/" in name)
            assert len(np.unique(field.labels)) - 1 == field.labels.max() == len(masks)
            with archive.open(masks[0]) as file:
                first = np.asarray(Image.open(file)) > 0
            assert np.array_equal(field.labels == 1, first), "masks of BBBC038 do not overlap"
            inside = field.image[0][field.labels > 0].mean()
            assert inside > 1.5 * field.image[0][field.labels == 0].mean(), "nuclei are bright"
    assert len({field.name for field in fields}) == 3


# ---------------------------------------------------------------------------------------------------------- folders
PIXELS = RNG.integers(0, 60_000, (3, 16, 20)).astype(np.uint16)


def write(path, array, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array, **kwargs)
    elif path.suffix == ".png":
        Image.fromarray(array).save(path)
    else:
        tifffile.imwrite(path, array, photometric="minisblack", **kwargs)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".npy", ".TIF", ".ome.tif"])
@pytest.mark.parametrize("label_suffix", [".png", ".tif", ".npy"])
def test_folder(tmp_path, suffix, label_suffix):
    for name in ("b", "a"):
        write(tmp_path / "images" / f"{name}{suffix}", PIXELS[0])
        write(tmp_path / "labels" / f"{name}{label_suffix}", instances().astype(np.uint16))
    (tmp_path / "images" / ".hidden").touch()
    fields = read_folder(tmp_path, um_per_px=0.25)
    assert [field.name for field in fields] == ["a", "b"]
    for field in fields:
        assert field.channels == ("image",)
        assert field.um_per_px == 0.25
        assert field.image.dtype == np.uint16
        assert np.array_equal(field.image, PIXELS[:1])
        assert field.labels.dtype == np.int32
        assert np.array_equal(field.labels, instances())


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize("last", [True, False])
def test_folder_channels_first_and_last(tmp_path, suffix, last):
    write(tmp_path / f"raw/a{suffix}", PIXELS.transpose(1, 2, 0) if last else PIXELS)
    (field,) = read_folder(tmp_path, images="raw/*", labels=None, channels=["DNA", "actin", "tubulin"])
    assert field.labels is None
    assert field.channels == ("DNA", "actin", "tubulin")
    assert np.array_equal(field.image, PIXELS)


@pytest.mark.parametrize(
    ("array", "channels", "match"),
    [
        (PIXELS, None, r"a.npy: an image of the shape \(3, 16, 20\): no axis is that of the 1 channel"),
        (PIXELS, ["a", "b"], r"no axis is that of the 2 channel\(s\) \['a', 'b'\]"),
        (PIXELS[0], ["a", "b"], r"\(16, 20\): no axis"),
        (PIXELS[:, :, :3], ["a", "b", "c"], r"\(3, 16, 3\): either axis could be that of the 3 channel"),
        (PIXELS[None], ["a", "b", "c"], r"\(1, 3, 16, 20\): no axis"),
        (PIXELS[0] > 9, None, "an image of the type bool"),
        (PIXELS[0] * 1j, None, "an image of the type complex128"),
        (PIXELS[0, :0], None, r"shape \(0, 20\)"),
        (np.array(["a"]), None, "holds <U1; numbers are needed"),
    ],
)
def test_folder_images_that_cannot_be_told(tmp_path, array, channels, match):
    write(tmp_path / "images/a.npy", array)
    with pytest.raises(ValueError, match=match):
        read_folder(tmp_path, labels=None, channels=channels)


BAD_LABELS = {
    "float": (instances().astype(np.float32), "a label image of the type float32; integers"),
    "size": (instances()[:, 1:], r"the label image has the size \(16, 19\), its image \(16, 20\)"),
    "colour": (np.dstack([instances()] * 3), r"has the size \(16, 20, 3\)"),
    "empty": (np.zeros((16, 20), dtype=np.uint8), "the label image has no object"),
    "mask": (
        (instances() > 0) * np.uint8(255),
        r"a mask of one class \(the only value beside 0 is 255\).*measure.label",
    ),
    "mask_one": ((instances() == 2) * np.uint8(255), "a mask of one class"),
    "mask_16bit": ((instances() == 2) * np.uint16(65535), "a mask of one class"),
    "ones": ((instances() > 0).astype(np.uint8), r"a mask of one class \(the only value beside 0 is 1\)"),
    "bool": (instances() == 2, "a mask of one class"),
    "negative": (-instances(), "the labels go from -3 to 0"),
    "large": (instances().astype(np.int64) * 2**31, "0 to 2147483647 is needed"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_folder_bad_labels(tmp_path, kind):
    labels, match = BAD_LABELS[kind]
    write(tmp_path / "images/a.tif", PIXELS[0])
    write(tmp_path / "labels/a.npy", labels)
    with pytest.raises(ValueError, match=f"a.npy: .*{match}"):
        read_folder(tmp_path)


def test_folder_one_object_is_no_mask(tmp_path):
    """What `skimage.measure.label` makes of one object, and a crop of a larger label image."""
    for name, number in (("a", 1), ("b", 7)):
        write(tmp_path / f"images/{name}.tif", PIXELS[0])
        write(tmp_path / f"labels/{name}.tif", (instances() == 2) * np.uint16(number))
    assert [field.labels.max() for field in read_folder(tmp_path)] == [1, 7]


def test_folder_palettes(tmp_path):
    (tmp_path / "images").mkdir()
    picture = Image.fromarray(instances().astype(np.uint8)).convert("P")
    picture.putpalette(list(RNG.integers(0, 255, 768)))
    picture.save(tmp_path / "images/a.png")
    (field,) = read_folder(tmp_path, labels="images/*", channels=["r", "g", "b"])
    assert np.array_equal(field.labels, instances()), "labels are the numbers, whatever colours they are shown in"
    assert np.array_equal(field.image, np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0))


def test_folder_reports_all_bad_files_at_once(tmp_path):
    for name in "abcdefgh":
        write(tmp_path / f"images/{name}.tif", PIXELS[0])
        write(tmp_path / f"labels/{name}.tif", instances())
    (tmp_path / "images/b.tif").write_bytes((tmp_path / "images/b.tif").read_bytes()[:300])
    (tmp_path / "labels/b.tif").write_text("no tif")
    (tmp_path / "images/c.tif").unlink()
    (tmp_path / "labels/d.tif").unlink()
    write(tmp_path / "images/e.npy", PIXELS[0])
    write(tmp_path / "labels/f.npy", instances())
    (tmp_path / "images/g.tif").rename(tmp_path / "images/g.jpg")
    write(tmp_path / "images/h.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "images/h.tif").unlink()
    expected = [
        "b.tif: cannot be read",
        "b.tif: cannot be read",
        "c: no image of this name",
        r"d: no label image of this name \(labels=None or unlabelled=True",
        "images/e.npy, images/e.tif: 2 images of one name",
        "labels/f.npy, labels/f.tif: 2 label images of one name",
        "g.jpg: files of this kind are not read; .png, .tif, .tiff, .npy are",
        "h.npy: cannot be read",
    ]
    with pytest.raises(ValueError, match="(?s)8 bad file.*" + ".*".join(expected)):
        read_folder(tmp_path)
    with pytest.warns(UserWarning, match="(?s)" + ".*".join(expected)):
        fields = read_folder(tmp_path, on_error="warn")
    assert [field.name for field in fields] == ["a"]


def test_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"No file in .* matches images='images/\*'"):
        read_folder(tmp_path)
    write(tmp_path / "images/a.tif", PIXELS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="no field that could be read"):
            read_folder(tmp_path, on_error="warn")


def test_folder_with_images_that_nobody_labelled(tmp_path):
    for name in "abc":
        write(tmp_path / f"pictures/{name}.tif", PIXELS[0])
    write(tmp_path / "drawn/b.png", instances().astype(np.uint8))
    options = {"images": "*", "labels": "*", "labels_path": tmp_path / "drawn"}
    with pytest.raises(
        ValueError, match=r"(?s)a: no label image of this name \(labels=None or unlabelled=True.*c: no label"
    ):
        read_folder(tmp_path / "pictures", **options)
    fields = read_folder(tmp_path / "pictures", **options, unlabelled=True)
    assert [field.name for field in fields] == ["a", "b", "c"]
    assert [field.labels is None for field in fields] == [True, False, True]
    assert np.array_equal(fields[1].labels, instances())
    write(tmp_path / "drawn/d.png", instances().astype(np.uint8))
    with pytest.raises(ValueError, match="d: no image of this name"):
        read_folder(tmp_path / "pictures", **options, unlabelled=True)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_folder(tmp_path / "pictures", labels_path=tmp_path / "nowhere")


@pytest.mark.parametrize("number", [1, 7, 255, True])
def test_folder_of_masks(tmp_path, number):
    mask = instances() > 0
    write(tmp_path / "images/a.tif", PIXELS[0])
    write(tmp_path / "labels/a.npy", mask * np.uint8(number) if number is not True else mask)
    with pytest.raises(ValueError, match=r"a mask of one class.*mask=True reads masks"):
        read_folder(tmp_path)
    (field,) = read_folder(tmp_path, mask=True)
    assert field.labels.dtype == np.int32
    assert np.array_equal(field.labels, mask)
    write(tmp_path / "labels/a.npy", np.zeros((16, 20), dtype=np.uint8))
    with pytest.raises(ValueError, match="no object"):
        read_folder(tmp_path, mask=True)
