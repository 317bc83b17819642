"""The reader of CHAOS on DICOM and png files made in its published layout."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from histoniche.seg._chaos import read_chaos

pydicom = pytest.importorskip("pydicom")

SHAPE = (10, 12)
LIVER = np.zeros(SHAPE, dtype=bool)
LIVER[2:5, 3:9] = True


def slice_of(level):
    """Stored values of a slice: a ramp that starts at its level."""
    return (level + np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE)).astype(np.int16)


def write_dicom(path, pixels, *, instance=None, spacing=(0.75, 0.75), slope=None, intercept=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    if pixels.ndim == 3:
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    bits = 8 * pixels.dtype.itemsize
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for key, value in {
        "InstanceNumber": instance,
        "PixelSpacing": spacing and list(spacing),
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
    }.items():
        if value is not None:
            setattr(data, key, value)
    data.save_as(path, enforce_file_format=True)


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def ct(scan, numbers, *, dicom="i{:04d},0000b.dcm", start=0):
    """Slices whose level and mask tell their number: the mask of slice n lies n px to the right."""
    for number in numbers:
        file = scan / "DICOM_anon" / dicom.format(number + start)
        write_dicom(file, slice_of(100 * number), instance=number + 1, slope=1, intercept=-1000)
        mask = np.roll(LIVER, number, axis=1) if number else LIVER & False
        write_mask(scan / "Ground" / f"liver_GT_{number:03d}.png", mask)


@pytest.fixture
def chaos(tmp_path):
    rooms = tmp_path / "Train_Sets"
    ct(rooms / "CT" / "10", range(2))
    ct(rooms / "CT" / "2", range(3), dicom="IMG-0001-{:05d}.dcm", start=1)
    for number in (1, 2, 3):
        organs = np.zeros(SHAPE, dtype=np.uint8)
        for row, value in enumerate((63, 126, 189, 252, 58, 30)):
            organs[row, number:] = value
        t1, t2 = (rooms / "MR" / "1" / name for name in ("T1DUAL", "T2SPIR"))
        out, phase = f"IMG-0004-{2 * number - 1:05d}", f"IMG-0004-{2 * number:05d}"
        write_dicom(t1 / "DICOM_anon" / "OutPhase" / f"{out}.dcm", slice_of(10 * number), instance=2 * number - 1)
        write_dicom(t1 / "DICOM_anon" / "InPhase" / f"{phase}.dcm", slice_of(20 * number), instance=2 * number)
        write_mask(t1 / "Ground" / f"{phase}.png", organs)
        # Instance numbers that run the other way round do not matter where names are the same.
        name = f"IMG-0002-{number:05d}"
        write_dicom(t2 / "DICOM_anon" / f"{name}.dcm", slice_of(30 * number), instance=4 - number, slope=0.5)
        write_mask(t2 / "Ground" / f"{name}.png", organs)
    return tmp_path


def test_ct(chaos):
    for path in (chaos, chaos / "Train_Sets"):
        fields = read_chaos(path)
        assert [field.name for field in fields] == ["CT_2:000", "CT_2:001", "CT_2:002", "CT_10:000", "CT_10:001"]
        for field, number in zip(fields, (0, 1, 2, 0, 1), strict=True):
            assert field.channels == ("intensity",)
            assert field.um_per_px == 750
            assert field.image.dtype == np.int16
            assert np.array_equal(field.image[0], slice_of(100 * number) - 1000), "Hounsfield units"
            assert field.labels.dtype == np.int32
            assert np.array_equal(field.labels, np.roll(LIVER, number, axis=1) if number else np.zeros(SHAPE))
    assert [field.name for field in read_chaos(chaos, limit=4)] == [field.name for field in fields[:4]]
    shown = read_chaos(chaos, keep_empty=False)
    assert [field.name for field in shown] == ["CT_2:001", "CT_2:002", "CT_10:001"]
    assert [field.name for field in read_chaos(chaos, keep_empty=False, limit=1)] == ["CT_2:001"]


def test_ct_slices_are_in_the_order_of_numbers(tmp_path):
    """Names without leading zeros: 10 comes after 2."""
    ct(tmp_path / "CT" / "1", range(11), dicom="{}.dcm")
    for number, field in enumerate(read_chaos(tmp_path)):
        assert field.image.min() == 100 * number - 1000
        assert np.array_equal(field.labels, np.roll(LIVER, number, axis=1) if number else np.zeros(SHAPE))


@pytest.mark.parametrize(("modality", "step"), [("T1DUAL-in", 20), ("T1DUAL-out", 10), ("T2SPIR", 15)])
def test_mr(chaos, modality, step):
    everything = ["spleen", "liver", "right kidney", "left kidney"]
    fields = read_chaos(chaos, modality=modality, organs=everything)
    assert [field.name for field in fields] == [f"{modality}_1:00{i}" for i in range(3)]
    for number, field in enumerate(fields, start=1):
        expected = np.zeros(SHAPE)
        for row, value in enumerate((2, 3, 4, 1, 2)):
            expected[row, number:] = value
        assert np.array_equal(field.labels, expected)
        assert field.image[0, 0, 0] == step * number
        assert field.image.dtype == (np.float32 if modality == "T2SPIR" else np.int16)
    half = fields[0].image[0, 0, :3].astype(float)
    assert np.array_equal(half, step + np.arange(3) * (0.5 if modality == "T2SPIR" else 1))
    (one, *_) = read_chaos(chaos, modality=modality, organs=["right kidney"])
    assert np.array_equal(one.labels, (np.arange(10)[:, None] == 1) & (np.arange(12) >= 1))


def test_reports_all_bad_files_at_once(chaos):
    scan = chaos / "Train_Sets" / "CT" / "2"
    ct(scan, range(9), dicom="IMG-0001-{:05d}.dcm", start=1)
    dicom, ground = (
        lambda n: scan / f"DICOM_anon/IMG-0001-{n + 1:05d}.dcm",
        lambda n: scan / f"Ground/liver_GT_{n:03d}.png",
    )
    dicom(1).write_bytes(dicom(1).read_bytes()[:-50])
    dicom(2).write_text("no DICOM")
    write_dicom(dicom(3), slice_of(0), instance=4, spacing=None)
    write_dicom(dicom(4), slice_of(0), instance=5, spacing=(0.5, 0.75))
    write_dicom(dicom(5), np.zeros((*SHAPE, 3), dtype=np.uint8), instance=6)
    write_mask(ground(6), LIVER[1:])
    ground(7).write_bytes(ground(7).read_bytes()[:40])
    write_mask(ground(8), LIVER * np.uint8(3))
    (chaos / "Train_Sets" / "CT" / "10" / "Ground" / "liver_GT_001.png").unlink()
    ct(chaos / "Train_Sets" / "CT" / "3", range(2))
    (chaos / "Train_Sets" / "CT" / "4").mkdir()
    expected = [
        "CT/2/DICOM_anon/IMG-0001-00002.dcm: cannot be read",
        "CT/2/DICOM_anon/IMG-0001-00003.dcm: cannot be read",
        "IMG-0001-00004.dcm: the pixel spacing is missing; two equal numbers of mm",
        r"IMG-0001-00005.dcm: the pixel spacing is \[0.5, 0.75\]",
        r"IMG-0001-00006.dcm: pixels of the shape \(10, 12, 3\); one grey slice",
        r"CT/2/Ground/liver_GT_006.png: the mask has the size \(9, 12\), its image \(10, 12\)",
        "CT/2/Ground/liver_GT_007.png: cannot be read",
        "CT/2/Ground/liver_GT_008.png: the mask has no pixel of 128 or more",
        "CT/4: 0 slices in DICOM_anon, 0 masks in Ground",
        "CT/10: 2 slices in DICOM_anon, but 1 masks in Ground",
    ]
    with pytest.raises(ValueError, match="(?s)10 bad file.*" + ".*".join(expected)):
        read_chaos(chaos)
    with pytest.warns(UserWarning, match="(?s)" + ".*".join(expected)) as caught:
        fields = read_chaos(chaos, on_error="warn")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [field.name for field in fields] == ["CT_2:000", "CT_3:000", "CT_3:001"]


def test_mr_masks_that_are_missing_or_of_other_values(chaos):
    t2 = chaos / "Train_Sets" / "MR" / "1" / "T2SPIR"
    (t2 / "Ground" / "IMG-0002-00001.png").rename(t2 / "Ground" / "IMG-0002-00009.png")
    write_mask(t2 / "Ground" / "IMG-0002-00002.png", LIVER * np.uint8(4))
    expected = [
        "T2SPIR/Ground/IMG-0002-00009.png: no slice T2SPIR/DICOM_anon/IMG-0002-00009.dcm",
        "T2SPIR/DICOM_anon/IMG-0002-00001.dcm: no mask T2SPIR/Ground/IMG-0002-00001.png",
        r"IMG-0002-00002.png: no value of the mask is one of an organ \(\[0, 4\]\); 63, 126, 189, 252 are",
    ]
    with pytest.raises(ValueError, match="(?s)3 bad file.*" + ".*".join(expected)):
        read_chaos(chaos, modality="T2SPIR")
    (t2 / "Ground" / "IMG-0002-00003.png").unlink()
    write_mask(t2 / "Ground" / "IMG-0002-00002.png", LIVER & False)
    with pytest.warns(UserWarning, match="IMG-0002-00003.dcm: no mask"):
        (field,) = read_chaos(chaos, modality="T2SPIR", on_error="warn")
    assert field.name == "T2SPIR_1:001"
    assert not field.labels.any()


def test_orders_that_contradict_each_other(tmp_path):
    for number in range(3):
        write_dicom(tmp_path / f"CT/1/DICOM_anon/i{number}.dcm", slice_of(0), instance=3 - number)
        write_mask(tmp_path / f"CT/1/Ground/liver_GT_{number}.png", LIVER)
    with pytest.raises(ValueError, match="CT/1/DICOM_anon: the instance numbers of the slices contradict the order"):
        read_chaos(tmp_path)


def test_other_errors(chaos, monkeypatch):
    with pytest.raises(ValueError, match=r"modality='MR' is not among \['CT', 'T1DUAL-in', 'T1DUAL-out', 'T2SPIR'\]"):
        read_chaos(chaos, modality="MR")
    with pytest.raises(ValueError, match=r"organs='spleen' is not among \['liver'\]"):
        read_chaos(chaos, organs=["spleen"])
    with pytest.raises(ValueError, match="organs='' is not among"):
        read_chaos(chaos, modality="T2SPIR", organs=[])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_chaos(chaos / "nowhere")
    with pytest.raises(ValueError, match=r"no scans in the layout CT/<scan>/DICOM_anon/\*\.dcm"):
        read_chaos(chaos / "Train_Sets" / "MR")
    for file in chaos.rglob("liver*.png"):
        write_mask(file, LIVER & False)
    with pytest.raises(ValueError, match=r"no field that could be read and shows \['liver'\]"):
        read_chaos(chaos, keep_empty=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match="reading CHAOS needs the package pydicom: pip install"):
        read_chaos(chaos)
