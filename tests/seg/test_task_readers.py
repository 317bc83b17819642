"""Readers of data sets of one task on files made in their published layouts, and on the real CHASE-DB1."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from histoniche.seg._task_readers import read_autooral, read_chase_db1, read_drive, read_kidneyus, read_ph2

RNG = np.random.default_rng(0)
SHAPE = (12, 16)
IMAGE = RNG.integers(0, 255, (*SHAPE, 3)).astype(np.uint8)
MASK = np.zeros(SHAPE, dtype=bool)
MASK[3:9, 4:11] = True


def write(path, array, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kwargs)


def byte(mask):
    return mask * np.uint8(255)


def damage(path):
    path.write_bytes(path.read_bytes()[:40])


def check_colour(field, image=IMAGE, mask=MASK):
    assert field.channels == ("red", "green", "blue")
    assert field.image.dtype == np.uint8
    assert np.array_equal(field.image, image.transpose(2, 0, 1))
    assert field.labels.dtype == np.int32
    assert np.array_equal(field.labels, mask.astype(int))
    assert field.um_per_px is None


# -------------------------------------------------------------------------------------------------------- KidneyUS
def polygon(*corners):
    x, y = zip(*corners, strict=True)
    return {"name": "polygon", "all_points_x": x, "all_points_y": y}


def kidneyus(root, rows, observer=1, folder=""):
    """The csv as the VGG Image Annotator writes it: (file, shape, class) a row; without a class, nothing was drawn."""
    path = root / folder / f"reviewed_labels_{observer}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names.split(","))
        for name, shape, kind in rows:
            text = shape if isinstance(shape, str) else json.dumps(shape)
            attributes = {} if kind is None else {"Anatomy": kind}
            writer.writerow([name, 1, '{"Quality":"Fair"}', 1, 0, text, json.dumps(attributes)])


KIDNEY = polygon((2, 1), (12, 1), (12, 9), (2, 9))
ECHO = polygon((5, 4), (8, 4), (8, 6), (5, 6))
WHOLE = np.zeros(SHAPE, dtype=int)
WHOLE[1:10, 2:13] = 1


@pytest.fixture
def kidneys(tmp_path):
    for name in ("10_IM-1_anon", "2_IM-1_anon", "3_IM-1_anon", "99_IM-1_anon"):
        write(tmp_path / "images" / f"{name}.png", IMAGE[..., 0])
    rows = [
        ("10_IM-1_anon.png", ECHO, "Central Echo Complex"),
        ("10_IM-1_anon.png", KIDNEY, "Capsule"),
        ("2_IM-1_anon.png", {"name": "rect", "x": 3, "y": 2, "width": 4, "height": 5}, "Capsule"),
        ("3_IM-1_anon.png", {}, None),
    ]
    kidneyus(tmp_path, rows, folder="labels")
    return tmp_path


def test_kidneyus(kidneys):
    write(kidneys / "labels" / "reviewed_masks_1" / "capsule" / "2_IM-1_anon.png", IMAGE[..., 0])
    second, tenth = read_kidneyus(kidneys)
    assert [second.name, tenth.name] == ["2_IM-1_anon", "10_IM-1_anon"], (
        "numbers in order; images without regions left out"
    )
    assert tenth.channels == ("intensity",)
    assert np.array_equal(tenth.image, IMAGE[None, ..., 0])
    assert tenth.labels.dtype == np.int32
    assert np.array_equal(tenth.labels, WHOLE)
    box = np.zeros(SHAPE)
    box[2:8, 3:8] = 1
    assert np.array_equal(second.labels, box)
    assert [field.name for field in read_kidneyus(kidneys, limit=1)] == ["2_IM-1_anon"]


def test_kidneyus_classes_and_observers(kidneys):
    both = read_kidneyus(kidneys, classes=["Capsule", "Central Echo Complex"])[1]
    expected = WHOLE.copy()
    expected[4:7, 5:9] = 2
    assert np.array_equal(both.labels, expected), "the later class wins, whatever the order of the rows"
    (echo,) = read_kidneyus(kidneys, classes=["Central Echo Complex"])
    assert np.array_equal(echo.labels, expected == 2)
    covered = read_kidneyus(kidneys, classes=["Central Echo Complex", "Capsule"])[1]
    assert np.array_equal(covered.labels, 2 * WHOLE)
    with pytest.raises(FileNotFoundError, match=r"has no reviewed_labels_2\.csv"):
        read_kidneyus(kidneys, observer=2)
    kidneyus(kidneys, [("99_IM-1_anon.png", ECHO, "Capsule")], observer=2)
    (other,) = read_kidneyus(kidneys, observer=2)
    assert other.name == "99_IM-1_anon"
    assert np.array_equal(other.labels, expected == 2)
    with pytest.raises(ValueError, match=r"no field that could be read with regions of \['Cortex'\]"):
        read_kidneyus(kidneys, classes=["Cortex"])


def test_kidneyus_reports_all_bad_files_at_once(kidneys):
    rows = [
        ("2_IM-1_anon.png", ECHO, "Capsule"),
        ("3_IM-1_anon.png", {"name": "circle", "cx": 1, "cy": 2, "r": 3}, "Capsule"),
        ("3_IM-1_anon.png", "{cut", "Capsule"),
        ("4.png", KIDNEY, "Capsule"),
        ("5.png", KIDNEY, "Capsule"),
        ("6.png", KIDNEY, "Capsule"),
        ("7.png", polygon((40, 40), (50, 40), (50, 50)), "Capsule"),
        ("8.png", {**KIDNEY, "all_points_y": [1, 2]}, "Capsule"),
        ("8.png", polygon((1, 1), (2, 2)), "Capsule"),
        ("9.png", KIDNEY, "Liver"),
        ("11.png", KIDNEY, "Capsule"),
    ]
    kidneyus(kidneys, rows)
    for name in ("5", "6", "7", "8", "9"):
        write(kidneys / f"{name}.png", IMAGE)
    damage(kidneys / "5.png")
    write(kidneys / "more" / "6.png", IMAGE)
    write(kidneys / "11.png", IMAGE[..., 0].astype(np.uint16) * 200)
    expected = [
        r"3_IM-1_anon.png: reviewed_labels_1.csv, row 3: no polygon or rectangle can be read \(a circle\)",
        "3_IM-1_anon.png: reviewed_labels_1.csv, row 4: no polygon",
        r"4: no image \(4.png\)",
        "5.png: cannot be read",
        r"6: 2 files could be the image \(6.png, more/6.png\)",
        r"7.png: reviewed_labels_1.csv, row 8: the region lies outside the image 7.png, \(12, 16\)",
        "8.png: reviewed_labels_1.csv, row 9: no polygon",
        r"8.png: reviewed_labels_1.csv, row 10: .* \(2 corners\)",
        "9.png: reviewed_labels_1.csv, row 11: the class 'Liver' is not among",
        "11.png: a picture of the mode I;16; 8 bits",
    ]
    with pytest.raises(ValueError, match="(?s)10 bad file.*" + ".*".join(expected)):
        read_kidneyus(kidneys)
    with pytest.warns(UserWarning, match="(?s)" + ".*".join(expected)) as caught:
        fields = read_kidneyus(kidneys, on_error="warn")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [field.name for field in fields] == ["2_IM-1_anon"]


def test_kidneyus_other_errors(kidneys):
    with pytest.raises(ValueError, match="classes='kidney' is not among"):
        read_kidneyus(kidneys, classes=["kidney"])
    with pytest.raises(ValueError, match="classes='' is not among"):
        read_kidneyus(kidneys, classes=[])
    with pytest.raises(ValueError, match=r"observer=3 is not among \[1, 2\]"):
        read_kidneyus(kidneys, observer=3)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_kidneyus(kidneys / "nowhere")
    (kidneys / "labels" / "reviewed_labels_1.csv").write_text("filename,region_attributes\n")
    with pytest.raises(
        ValueError, match=r"no column 'region_shape_attributes'; it has \['filename', 'region_attributes'\]"
    ):
        read_kidneyus(kidneys)


# -------------------------------------------------------------------------------------------------------- Autooral
@pytest.fixture
def autooral(tmp_path):
    for split in ("train", "test"):
        for name in ("0002", "0001"):
            write(tmp_path / split.title() / f"data_{split}" / f"{name}.png", IMAGE)
            write(tmp_path / split.title() / f"mask_{split}" / f"{name}.png", byte(MASK))
    (tmp_path / "Train" / "data_train" / ".DS_Store").write_bytes(b"x")
    return tmp_path


def test_autooral(autooral):
    fields = read_autooral(autooral, split="train")
    assert [field.name for field in fields] == ["train:0001", "train:0002"]
    for field in fields:
        check_colour(field)
    names = [field.name for field in read_autooral(autooral)]
    assert names == ["test:0001", "test:0002", "train:0001", "train:0002"]
    assert [field.name for field in read_autooral(autooral / "Test")] == ["test:0001", "test:0002"]
    assert len(read_autooral(autooral, limit=3)) == 3
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        read_autooral(autooral, split="val")


def test_autooral_images_and_masks(tmp_path):
    write(tmp_path / "images" / "a.png", IMAGE)
    write(tmp_path / "masks" / "a.png", MASK.astype(np.uint8))
    (field,) = read_autooral(tmp_path)
    assert field.name == "a"
    check_colour(field)
    write(tmp_path / "Val" / "images" / "b.png", IMAGE)
    write(tmp_path / "Val" / "masks" / "b.jpg", byte(MASK), quality=95)
    (field,) = read_autooral(tmp_path, split="val")
    assert field.name == "val:b"
    check_colour(field)


def test_autooral_reports_all_bad_files_at_once(autooral):
    train = autooral / "Train"
    for name in ("0003", "0004", "0005", "0006", "0007"):
        write(train / "data_train" / f"{name}.png", IMAGE)
        write(train / "mask_train" / f"{name}.png", byte(MASK))
    (train / "mask_train" / "0001.png").unlink()
    write(train / "mask_train" / "0002.png", byte(MASK[1:]))
    damage(train / "data_train" / "0003.png")
    write(train / "mask_train" / "0004.png", byte(MASK & False))
    (train / "data_train" / "0005.png").unlink()
    write(train / "mask_train" / "0006.bmp", byte(MASK))
    write(train / "mask_train" / "0007.png", MASK * np.uint8(3))
    expected = [
        r"train:0001: no mask \(mask_train/0001\.\*\)",
        r"Train/mask_train/0002.png: the mask has the size \(11, 16\), its image \(12, 16\)",
        "Train/data_train/0003.png: cannot be read",
        "Train/mask_train/0004.png: the mask has no pixel",
        r"train:0005: no image \(data_train/0005\.\*\)",
        r"train:0006: 2 files could be the mask \(Train/mask_train/0006.bmp, Train/mask_train/0006.png\)",
        "Train/mask_train/0007.png: the mask has no pixel of 128 or more",
    ]
    with pytest.raises(ValueError, match="(?s)7 bad file.*" + ".*".join(expected)):
        read_autooral(autooral)
    with pytest.warns(UserWarning, match="(?s)" + ".*".join(expected)) as caught:
        fields = read_autooral(autooral, on_error="warn")
    assert caught[0].filename == __file__
    assert [field.name for field in fields] == ["test:0001", "test:0002"]


def test_autooral_without_files(tmp_path):
    with pytest.raises(ValueError, match=r"no images in the layout <Split>/data_<split>/<name>\.png"):
        read_autooral(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_autooral(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="limit=0"):
        read_autooral(tmp_path, limit=0)


# ------------------------------------------------------------------------------------------------------------- PH2
@pytest.fixture
def ph2(tmp_path):
    for name in ("IMD020", "IMD003"):
        folder = tmp_path / "PH2 Dataset images" / name
        write(folder / f"{name}_Dermoscopic_Image" / f"{name}.bmp", IMAGE)
        write(folder / f"{name}_lesion" / f"{name}_lesion.bmp", MASK)
        write(folder / f"{name}_roi" / f"{name}_R1_Label3.bmp", MASK)
    return tmp_path


def test_ph2(ph2):
    for path in (ph2, ph2 / "PH2 Dataset images"):
        fields = read_ph2(path)
        assert [field.name for field in fields] == ["IMD003", "IMD020"]
        for field in fields:
            check_colour(field)
            assert field.region is None
    assert [field.name for field in read_ph2(ph2, limit=1)] == ["IMD003"]


def test_ph2_errors(ph2):
    (ph2 / "PH2 Dataset images" / "IMD003" / "IMD003_lesion" / "IMD003_lesion.bmp").unlink()
    match = r"1 bad file.*\n- IMD003: no mask \(IMD003/IMD003_lesion/IMD003_lesion.bmp\)"
    with pytest.raises(ValueError, match=match):
        read_ph2(ph2)
    with pytest.warns(UserWarning, match=match):
        assert [field.name for field in read_ph2(ph2, on_error="warn")] == ["IMD020"]
    (ph2 / "other").mkdir()
    with pytest.raises(ValueError, match=r"no images in the layout <name>/<name>_Dermoscopic_Image/<name>\.bmp"):
        read_ph2(ph2 / "other")


# ----------------------------------------------------------------------------------------------------------- DRIVE
VIEW = np.ones(SHAPE, dtype=bool)
VIEW[:2] = VIEW[:, -3:] = False


@pytest.fixture
def drive(tmp_path):
    for split, names in (("training", ("22", "21")), ("test", ("01", "02"))):
        for name in names:
            write(tmp_path / split / "images" / f"{name}_{split}.tif", IMAGE)
            write(tmp_path / split / "1st_manual" / f"{name}_manual1.gif", byte(MASK))
            write(tmp_path / split / "mask" / f"{name}_{split}_mask.gif", byte(VIEW))
            if split == "test":
                write(tmp_path / split / "2nd_manual" / f"{name}_manual2.gif", byte(MASK[::-1]))
    return tmp_path


def test_drive(drive):
    for split, observer, names in (("training", 1, ["21", "22"]), ("test", 1, ["01", "02"]), ("test", 2, ["01", "02"])):
        fields = read_drive(drive, split=split, observer=observer)
        assert [field.name for field in fields] == names
        for field in fields:
            check_colour(field, mask=MASK if observer == 1 else MASK[::-1])
            assert field.region.dtype == bool
            assert np.array_equal(field.region, VIEW)
    assert [field.name for field in read_drive(drive, limit=1)] == ["21"]


def test_drive_errors(drive):
    with pytest.raises(ValueError, match='observer=2: the second observer of DRIVE drew in split="test" only'):
        read_drive(drive, observer=2)
    with pytest.raises(ValueError, match="split='train' is not among"):
        read_drive(drive, split="train")
    with pytest.raises(ValueError, match=r"no images in the layout training/images/<name>_training\.tif"):
        read_drive(drive / "test")
    (drive / "training" / "mask" / "21_training_mask.gif").unlink()
    write(drive / "training" / "mask" / "22_training_mask.gif", byte(VIEW[:, 1:]))
    write(drive / "training" / "images" / "23_training.tif", IMAGE)
    damage(drive / "training" / "1st_manual" / "22_manual1.gif")
    expected = [
        r"21: no field of view \(training/mask/21_training_mask.gif\)",
        "training/1st_manual/22_manual1.gif: cannot be read",
        r"training/mask/22_training_mask.gif: the mask has the size \(12, 15\), its image \(12, 16\)",
        r"23: no mask \(training/1st_manual/23_manual1.gif\)",
        "23: no field of view",
    ]
    with pytest.raises(ValueError, match="(?s)5 bad file.*" + ".*".join(expected)):
        read_drive(drive)
    with (
        pytest.warns(UserWarning, match="5 bad file"),
        pytest.raises(ValueError, match="no field that could be read"),
    ):
        read_drive(drive, on_error="warn")


# ------------------------------------------------------------------------------------------------------- CHASE-DB1
def test_chase_db1_errors(tmp_path):
    for name in ("01L", "01R", "02L"):
        write(tmp_path / f"Image_{name}.jpg", IMAGE)
        for observer in ("1st", "2nd"):
            write(tmp_path / f"Image_{name}_{observer}HO.png", MASK)
    (tmp_path / "Image_01L_2ndHO.png").unlink()
    (tmp_path / "Image_01R.jpg").unlink()
    assert [field.name for field in read_chase_db1(tmp_path, limit=1)] == ["01L"]
    match = r"(?s)2 bad file.*01L: no mask \(Image_01L_2ndHO.png\).*01R: no image \(Image_01R.jpg\)"
    with pytest.raises(ValueError, match=match):
        read_chase_db1(tmp_path, observer=2)
    with pytest.warns(UserWarning, match=match):
        assert [field.name for field in read_chase_db1(tmp_path, observer=2, on_error="warn")] == ["02L"]
    with pytest.raises(ValueError, match=r"observer=0 is not among \[1, 2\]"):
        read_chase_db1(tmp_path, observer=0)


@pytest.mark.parametrize("observer", [1, 2])
def test_chase_db1_real(data_dir, observer):
    path = data_dir / "chase_db1"
    fields = read_chase_db1(path, observer=observer)
    assert len(fields) == 28
    assert [field.name for field in fields] == [f"{child:02d}{eye}" for child in range(1, 15) for eye in "LR"]
    assert len({field.name[:2] for field in fields}) == 14
    shares = []
    for field in fields:
        assert field.shape == (960, 999)
        assert field.image.dtype == np.uint8
        assert set(np.unique(field.labels)) == {0, 1}
        assert field.region is None
        shares.append(field.labels.mean())
        vessels, green = field.labels > 0, field.image[1]
        beside = ndimage.binary_dilation(vessels, iterations=5) & ~ndimage.binary_dilation(vessels, iterations=2)
        assert green[vessels].mean() < green[beside].mean() - 2, "vessels are darker than what lies beside them"
    # Measured: 0.0693 and 0.0664 on average, 0.051 to 0.085 over the images.
    assert abs(np.mean(shares) - (0.0693, 0.0664)[observer - 1]) < 1e-4
    assert 0.05 < min(shares) < max(shares) < 0.09
    with Image.open(path / "Image_03R.jpg") as picture:
        assert np.array_equal(fields[5].image, np.asarray(picture).transpose(2, 0, 1))
