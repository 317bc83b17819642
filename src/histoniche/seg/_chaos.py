"""Reader of CHAOS, abdominal organs in CT and MR: DICOM slices with masks in png files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._access import need_package
from ._fields import Field
from ._files import UNREADABLE, bad, check, decode, folder_of, mask_of, natural, noted, settled, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._files import OnError

Modality = Literal["CT", "T1DUAL-in", "T1DUAL-out", "T2SPIR"]
Slice = tuple[Path, Path | None]

CHAOS_ORGANS = ("liver", "right kidney", "left kidney", "spleen")
# Of the grey values of MR masks these ranges, without their lower ends, are organs, and all else is background.
_VALUES = {"liver": (55, 70), "right kidney": (110, 135), "left kidney": (175, 200), "spleen": (240, 255)}
_FOLDERS: dict[str, tuple[str, str, str]] = {
    "CT": ("CT", "DICOM_anon", "Ground"),
    "T1DUAL-in": ("MR", "T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground"),
    "T1DUAL-out": ("MR", "T1DUAL/DICOM_anon/OutPhase", "T1DUAL/Ground"),
    "T2SPIR": ("MR", "T2SPIR/DICOM_anon", "T2SPIR/Ground"),
}


def read_chaos(
    path: str | Path,
    *,
    modality: Modality = "CT",
    organs: Sequence[str] = ("liver",),
    keep_empty: bool = True,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read CHAOS, slices of CT and MR scans with the abdominal organs.

    The layout is ``Train_Sets/CT/<scan>/DICOM_anon/*.dcm`` with ``Ground/*.png``, and ``Train_Sets/MR/<scan>/T1DUAL``
    and ``T2SPIR`` with the same folders, where ``T1DUAL/DICOM_anon`` has the folders ``InPhase`` and ``OutPhase``. A
    slice and its mask have the same name (in-phase and T2); where no mask has the name of a slice (CT, out-phase), the
    first slice belongs to the first mask, both in the order of their names, numbers as numbers, and instance numbers
    that contradict this order are an error. Every slice is a field; a scan is one person: split by
    ``field.name.split(":")[0]``, never by slice.

    Parameters
    ----------
    path
        ``Train_Sets``, or the folder that holds it.
    modality
        ``"CT"``, in-phase (``"T1DUAL-in"``) or out-phase (``"T1DUAL-out"``) T1, or ``"T2SPIR"``.
    organs
        Organs to read, of ``"liver"``, ``"right kidney"``, ``"left kidney"`` and ``"spleen"``: the first becomes 1, the
        next 2. CT has the liver only.
    keep_empty
        Keep slices that show none of the organs. A CT slice takes 1.5 MiB in memory.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, scan by scan, both in the order of their numbers.

    Returns
    -------
    Fields named ``<modality>_<scan>:<slice>``, slices from 0: image (1, y, x), channel ``"intensity"``, rescaled as the
    file says (CT: Hounsfield units), int16 where the values are whole numbers, else float32; labels (y, x) int32, 0 and
    the numbers of the organs; um/px of the pixel spacing.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ImportError
        pydicom is missing.
    ValueError
        No such modality or organ; no scan; no slice with the organs; bad files: a slice or mask that is missing or cannot
        be read, masks of another size or of other values, no or unequal pixel spacing, contradicting orders.

    References
    ----------
    Kavur et al., CHAOS Challenge: combined (CT-MR) healthy abdominal organ segmentation, Medical Image Analysis 69,
    101950 (2021). https://doi.org/10.5281/zenodo.3431873
    """
    check(on_error, limit, modality=(modality, get_args(Modality)))
    for organ in organs or ("",):
        check(on_error, limit, organs=(organ, ("liver",) if modality == "CT" else CHAOS_ORGANS))
    need_package("pydicom", "pydicom", "reading CHAOS")
    path = folder_of(path, "Train_Sets")
    room = path / _FOLDERS[modality][0]
    scans = sorted((item for item in room.glob("*") if item.is_dir()), key=lambda item: natural(item.name))
    if not scans:
        msg = f"{path} has no scans in the layout {'/<scan>/'.join(_FOLDERS[modality][:2])}/*.dcm."
        raise ValueError(msg)
    fields: list[Field] = []
    problems: list[str] = []
    for scan in tqdm(scans, f"CHAOS {modality}", disable=not settings.progress):
        for field in _fields_of(scan, modality, organs, problems, path):
            if keep_empty or np.any(field.labels):
                fields.append(field)
            if len(fields) == limit:
                break
        if len(fields) == limit:
            break
    return settled(fields, problems, on_error, path, "" if keep_empty else f" and shows {list(organs)}")


def _fields_of(
    scan: Path, modality: Modality, organs: Sequence[str], problems: list[str], path: Path
) -> Iterator[Field]:
    pairs: list[Slice] = []
    with noted(problems):
        pairs = _pairs(scan, modality, problems, path)
    for number, (file, ground) in enumerate(pairs):
        earlier = len(problems)
        image = labels = None
        with noted(problems):
            image, um_per_px = _slice(file, file.relative_to(path).as_posix())
        with noted(problems):
            where = file.relative_to(path).as_posix()
            if ground is None:
                bad(f"{where}: no mask {_FOLDERS[modality][2]}/{file.stem}.png")
            labels = _organs(ground, modality, organs, None if image is None else image.shape, path)
        if image is not None and len(problems) == earlier:
            yield Field(f"{modality}_{scan.name}:{number:03d}", image[None], ("intensity",), labels, um_per_px)


def _pairs(scan: Path, modality: Modality, problems: list[str], path: Path) -> list[Slice]:
    """Slices of a scan with their masks."""
    _, dicom, ground = _FOLDERS[modality]
    slices, masks = (
        sorted((file for file in (scan / folder).glob(f"*{end}") if not file.name.startswith(".")), key=_order)
        for folder, end in ((dicom, ".dcm"), (ground, ".png"))
    )
    where = scan.relative_to(path).as_posix()
    if not slices or not masks:
        bad(f"{where}: {len(slices)} slices in {dicom}, {len(masks)} masks in {ground}")
    named = {file.stem: file for file in masks}
    if named.keys() & {file.stem for file in slices}:
        alone = named.keys() - {file.stem for file in slices}
        problems += [f"{where}/{ground}/{name}.png: no slice {dicom}/{name}.dcm" for name in sorted(alone)]
        return [(file, named.get(file.stem)) for file in slices]
    if len(slices) != len(masks):
        bad(f"{where}: {len(slices)} slices in {dicom}, but {len(masks)} masks in {ground}")
    numbers = [number for file in slices if (number := _instance(file)) is not None]
    if any(late <= early for early, late in pairwise(numbers)):
        bad(
            f"{where}/{dicom}: the instance numbers of the slices contradict the order of their names, so that their masks "
            "cannot be told; rename the slices in the order of the masks, or give both the same names"
        )
    return list(zip(slices, masks, strict=True))


def _order(file: Path) -> list[str | int]:
    return natural(file.stem)


def _instance(file: Path) -> int | None:
    """Instance number of a slice; what cannot be read is reported with its pixels."""
    pydicom = need_package("pydicom", "pydicom", "reading CHAOS")
    try:
        number = pydicom.dcmread(file, stop_before_pixels=True).get("InstanceNumber")
    except (*UNREADABLE, pydicom.errors.InvalidDicomError):
        return None
    return None if number is None else int(number)


def _slice(file: Path, where: str) -> tuple[np.ndarray, float]:
    """Values (y, x) and um/px of a DICOM file."""
    pydicom = need_package("pydicom", "pydicom", "reading CHAOS")
    try:
        data = pydicom.dcmread(file)
        pixels: Any = data.pixel_array
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        spacing = [float(mm) for mm in data.get("PixelSpacing") or ()]
    except (*UNREADABLE, pydicom.errors.InvalidDicomError, AttributeError) as error:
        unreadable(where, error)
    if pixels.ndim != 2:
        bad(f"{where}: pixels of the shape {pixels.shape}; one grey slice (y, x) is needed")
    if len(spacing) != 2 or not 0 < spacing[0] < np.inf or not np.isclose(spacing[0], spacing[1]):
        bad(f"{where}: the pixel spacing is {spacing or 'missing'}; two equal numbers of mm are needed")
    values = pixels * slope + intercept
    whole = np.iinfo(np.int16).min <= values.min() and values.max() <= np.iinfo(np.int16).max
    if whole and np.array_equal(values, np.rint(values)):
        return values.astype(np.int16), 1000 * spacing[0]
    return values.astype(np.float32), 1000 * spacing[0]


def _organs(
    file: Path, modality: Modality, organs: Sequence[str], shape: tuple[int, ...] | None, path: Path
) -> np.ndarray:
    """Labels (y, x) int32 of a mask; slices without any organ are common."""
    where = file.relative_to(path).as_posix()
    picture = decode(lambda where: (path / where).read_bytes(), where)
    if modality == "CT":
        return mask_of(picture, where, shape, empty=True).astype(np.int32)
    values = np.asarray(picture.convert("L"))
    if shape is not None and values.shape != shape:
        bad(f"{where}: the mask has the size {values.shape}, its image {shape} (y, x)")
    labels = np.zeros(values.shape, dtype=np.int32)
    known = np.zeros(values.shape, dtype=bool)
    for organ, (low, high) in _VALUES.items():
        inside = (low < values) & (values <= high)
        known |= inside
        if organ in organs:
            labels[inside] = list(organs).index(organ) + 1
    if values.any() and not known.any():
        bad(
            f"{where}: no value of the mask is one of an organ ({np.unique(values)[:5].tolist()}); 63, 126, 189, 252 are"
        )
    return labels
