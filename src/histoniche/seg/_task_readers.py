"""Readers of published data sets of one task: colour or ultrasound images, every pixel with its class."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._fields import Field
from ._files import bad, check, decode, folder_of, mask_of, natural, noted, settled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._files import OnError

RGB = ("red", "green", "blue")
KIDNEYUS_CLASSES = ("Capsule", "Cortex", "Medulla", "Central Echo Complex")
_KIDNEYUS_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")
_VIEW = "field of view"

Case = dict[str, tuple[str, list[Path]]]
"""Of every sort of file of a field, the name it should have, and the files that have it."""


def read_kidneyus(
    path: str | Path,
    *,
    classes: Sequence[str] = ("Capsule",),
    observer: Literal[1, 2] = 1,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read KidneyUS, the open kidney ultrasound data set.

    The layout is a folder of png images, and ``reviewed_labels_1.csv`` and ``reviewed_labels_2.csv``, polygons of two
    sonographers as the VGG Image Annotator writes them, beside the images or in ``labels``. The kidney is the class
    ``"Capsule"``; cortex, medulla and central echo complex lie within it. Images in which the sonographer drew none of
    the classes (47 without any) are left out. A patient may have several images: split by the number before the first
    ``_`` of the name, never by image.

    Parameters
    ----------
    path
        The folder of the images, or one above it.
    classes
        Classes to read, of ``"Capsule"``, ``"Cortex"``, ``"Medulla"`` and ``"Central Echo Complex"``: the first becomes
        1, the next 2; where they overlap, the later one wins.
    observer
        Whose labels.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, in the order of their names, numbers as numbers.

    Returns
    -------
    Fields named by their file without its ending: image (1, y, x) uint8, channel ``"intensity"``; labels (y, x) int32,
    0 and the numbers of the classes; um/px is unknown.

    Raises
    ------
    FileNotFoundError
        No such folder, or no csv of this observer.
    ValueError
        No such class or observer; a csv without the columns; no image with these classes; bad files: an image that is
        missing, occurs twice or cannot be read; a region that is no polygon or rectangle, of an unknown class, or
        outside the image.

    References
    ----------
    Singla et al., The open kidney ultrasound data set, arXiv:2206.06657 (2022). https://github.com/rsingla92/kidneyUS
    """
    for name in classes or ("",):
        check(on_error, limit, classes=(name, KIDNEYUS_CLASSES), observer=(observer, (1, 2)))
    path = folder_of(path)
    table = f"reviewed_labels_{observer}.csv"
    rows = _via_rows(path, table)
    # The repository holds masks under the same names.
    images: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.rglob("*.png")):
        if not any(part.startswith("reviewed_masks") for part in file.relative_to(path).parts):
            images[file.name].append(file)
    fields: list[Field] = []
    problems: list[str] = []
    for name in tqdm(sorted(rows, key=natural), desc="KidneyUS", disable=not settings.progress):
        if len(fields) == limit:
            break
        earlier = len(problems)
        regions: list[tuple[int, list[tuple[float, float]], str]] = []
        with noted(problems):
            regions = _via_regions(rows[name], classes, table)
        if not regions:
            continue
        with noted(problems):
            file = _the_one({"image": (name, images[name])}, "image", Path(name).stem, path)
            where = file.relative_to(path).as_posix()
            pixels = np.asarray(decode(lambda where: (path / where).read_bytes(), where).convert("L"))
            labels = _draw(regions, pixels.shape, name)
        if len(problems) == earlier:
            fields.append(Field(Path(name).stem, pixels[None], ("intensity",), labels))
    return settled(fields, problems, on_error, path, f" with regions of {list(classes)} in {table}")


def _via_rows(path: Path, table: str) -> dict[str, list[tuple[int, dict[str, str]]]]:
    """Rows of every image, with their numbers in the csv."""
    file = next((file for file in (path / table, path / "labels" / table) if file.is_file()), None)
    if file is None:
        msg = f"{path} has no {table}, nor has its folder labels: it comes from https://github.com/rsingla92/kidneyUS."
        raise FileNotFoundError(msg)
    rows: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in _KIDNEYUS_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            msg = f"{file} has no column {missing[0]!r}; it has {list(reader.fieldnames or ())}."
            raise ValueError(msg)
        for number, row in enumerate(reader, start=2):
            rows[row["filename"]].append((number, row))
    return rows


def _via_regions(
    rows: list[tuple[int, dict[str, str]]], classes: Sequence[str], table: str
) -> list[tuple[int, list[tuple[float, float]], str]]:
    """Regions of the classes, in their order: class, corners (x, y), and the row for messages."""
    regions = []
    problems: list[str] = []
    for number, row in rows:
        where = f"{row['filename']}: {table}, row {number}"
        with noted(problems):
            try:
                shape, attributes = (json.loads(row[key] or "") for key in _KIDNEYUS_COLUMNS[1:])
                if not shape:
                    continue
                corners, name = _corners(shape), attributes.get("Anatomy")
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                bad(f"{where}: no polygon or rectangle can be read ({error or type(error).__name__})")
            if name not in KIDNEYUS_CLASSES:
                bad(f"{where}: the class {name!r} is not among {list(KIDNEYUS_CLASSES)}")
            if name in classes:
                regions.append((list(classes).index(name) + 1, corners, where))
    if problems:
        bad(*problems)
    return sorted(regions, key=lambda region: region[0])


def _corners(shape: dict[str, Any]) -> list[tuple[float, float]]:
    if shape["name"] == "rect":
        x, y, width, height = (float(shape[key]) for key in ("x", "y", "width", "height"))
        return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    if shape["name"] != "polygon":
        msg = f"a {shape['name']}"
        raise ValueError(msg)
    corners = [(float(x), float(y)) for x, y in zip(shape["all_points_x"], shape["all_points_y"], strict=True)]
    if len(corners) < 3:
        msg = f"{len(corners)} corners"
        raise ValueError(msg)
    return corners


def _draw(regions: list[tuple[int, list[tuple[float, float]], str]], shape: tuple[int, ...], name: str) -> np.ndarray:
    """Labels (y, x) int32: filled polygons with their outlines (the published masks: Dice 0.999)."""
    canvas = np.zeros(shape, dtype=np.int32)
    problems = []
    for number, corners, where in regions:
        mask = Image.new("1", (shape[1], shape[0]))
        ImageDraw.Draw(mask).polygon(corners, fill=1, outline=1)
        inside = np.asarray(mask)
        if not inside.any():
            problems.append(f"{where}: the region lies outside the image {name}, {tuple(shape)} (y, x)")
        canvas[inside] = number
    if problems:
        bad(*problems)
    return canvas


def read_autooral(
    path: str | Path,
    *,
    split: str | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read Autooral, photographs of oral ulcers.

    The layout is, for every split, a folder of images and one of masks with the same names:
    ``Train/data_train/0001.png`` and ``Train/mask_train/0001.png``; folders ``images`` and ``masks`` are taken as well,
    and the folder that holds them names the split. A patient may have several images: the workbooks of the data set tell
    which, and splits within ``"train"`` should follow them.

    Parameters
    ----------
    path
        The folder of the data set.
    split
        Split to read, named by the end of the folder of its images (``"train"``); ``None``: all.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, in the order of their names, numbers as numbers.

    Returns
    -------
    Fields named ``<split>:<file>``: image (3, y, x) uint8; labels (y, x) int32, 1 in ulcers; um/px is unknown.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No folders of this layout, or none of this split; bad files: an image without a mask or a mask without an image,
        or several of one name; one that cannot be read; a mask of another size, or without any pixel.

    References
    ----------
    Jiang et al., A high-order focus interaction model and oral ulcer dataset for oral ulcer segmentation, Scientific
    Reports 14, 20085 (2024). https://github.com/wurenkai/HF-UNet-and-Autooral-dataset
    """
    check(on_error, limit)
    path = folder_of(path)
    found: dict[tuple[Path, str, str], str] = {}
    for folder in sorted(item for item in path.rglob("*") if item.is_dir()):
        if folder.name in ("images", "masks"):
            found[folder.parent, "images", "masks"] = "" if folder.parent == path else folder.parent.name.lower()
        elif match := re.fullmatch(r"(?:data|mask)_(\w+)", folder.name):
            found[folder.parent, f"data_{match[1]}", f"mask_{match[1]}"] = match[1]
    chosen = {key: name for key, name in found.items() if split in (None, name)}
    if found and not chosen:
        msg = f"{path} has no split {split!r}; it has {sorted(set(found.values()))}."
        raise ValueError(msg)
    cases: dict[str, Case] = {}
    for (parent, images, masks), name in chosen.items():
        layout = {"image": f"{images}/{{name}}.*", "mask": f"{masks}/{{name}}.*"}
        cases |= {f"{name}:{key}" if name else key: case for key, case in _cases(parent, layout).items()}
    return settled(*_read_cases(cases, path, "<Split>/data_<split>/<name>.png, mask_<split>", limit), on_error, path)


def read_ph2(path: str | Path, *, on_error: OnError = "raise", limit: int | None = None) -> list[Field]:
    """Read PH2, dermoscopic images of skin lesions.

    The layout is ``PH2 Dataset images/IMD***/IMD***_Dermoscopic_Image/IMD***.bmp`` and, for the lesion,
    ``IMD***/IMD***_lesion/IMD***_lesion.bmp``.

    Parameters
    ----------
    path
        The folder ``PH2 Dataset images``, or the one that holds it.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, in the order of their names.

    Returns
    -------
    Fields named ``IMD***``: image (3, y, x) uint8; labels (y, x) int32, 1 in the lesion; um/px is unknown.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No images of this layout; bad files: an image without a mask or a mask without an image; one that cannot be read;
        a mask of another size, or without any pixel.

    References
    ----------
    Mendonça et al., PH2: a dermoscopic image database for research and benchmarking, EMBC 2013, 5437.
    """
    check(on_error, limit)
    path = folder_of(path, "PH2 Dataset images")
    image, mask = "{name}/{name}_Dermoscopic_Image/{name}.bmp", "{name}/{name}_lesion/{name}_lesion.bmp"
    return settled(*_read_cases(_cases(path, {"image": image, "mask": mask}), path, image, limit), on_error, path)


def read_drive(
    path: str | Path,
    *,
    split: Literal["training", "test"] = "training",
    observer: Literal[1, 2] = 1,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read DRIVE, fundus photographs with their vessels.

    The layout is ``training/images/21_training.tif``, ``training/1st_manual/21_manual1.gif`` and
    ``training/mask/21_training_mask.gif``, the field of view; likewise ``test/images/01_test.tif``, with a second
    observer in ``test/2nd_manual/01_manual2.gif``. What lies outside the field of view is no part of the task:
    ``Field.region`` says so; :func:`~histoniche.seg.compare` and :func:`~histoniche.seg.best_threshold` measure inside it. In
    training it is background.

    Parameters
    ----------
    path
        The folder that holds ``training`` and ``test``.
    split
        Which of them.
    observer
        Whose labels; the second observer drew in ``"test"`` only.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, in the order of their names.

    Returns
    -------
    Fields named by their number (``"21"``): image (3, y, x) uint8; labels (y, x) int32, 1 in vessels; region (y, x)
    bool, the field of view; um/px is unknown.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        The second observer of the training images; no images of this layout; bad files: an image, mask or field of view
        that is missing or cannot be read, of another size, or without any pixel. Some downloads have no masks of the
        test images.

    References
    ----------
    Staal et al., Ridge-based vessel segmentation in color images of the retina, IEEE Transactions on Medical Imaging
    23, 501 (2004).
    """
    check(on_error, limit, split=(split, ("training", "test")), observer=(observer, (1, 2)))
    path = folder_of(path)
    if (split, observer) == ("training", 2):
        msg = 'observer=2: the second observer of DRIVE drew in split="test" only.'
        raise ValueError(msg)
    layout = {
        "image": f"{split}/images/{{name}}_{split}.tif",
        "mask": f"{split}/{('1st', '2nd')[observer - 1]}_manual/{{name}}_manual{observer}.gif",
        _VIEW: f"{split}/mask/{{name}}_{split}_mask.gif",
    }
    return settled(*_read_cases(_cases(path, layout), path, layout["image"], limit), on_error, path)


def read_chase_db1(
    path: str | Path,
    *,
    observer: Literal[1, 2] = 1,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read CHASE-DB1, fundus photographs of both eyes of 14 children with their vessels.

    The layout is ``Image_01L.jpg``, ``Image_01L_1stHO.png`` and ``Image_01L_2ndHO.png``. The child is the start of the
    name, ``field.name[:2]``: split by child, never by image, as the two eyes of a child look alike. The data set has no
    mask of the field of view.

    Parameters
    ----------
    path
        The folder of the images.
    observer
        Whose labels.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, in the order of their names.

    Returns
    -------
    Fields named by child and eye (``"01L"``): image (3, y, x) uint8; labels (y, x) int32, 1 in vessels; um/px is
    unknown.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No images of this layout; bad files: an image without a mask or a mask without an image; one that cannot be read;
        a mask of another size, or without any pixel.

    References
    ----------
    Fraz et al., An ensemble classification-based approach applied to retinal blood vessel segmentation, IEEE
    Transactions on Biomedical Engineering 59, 2538 (2012).
    """
    check(on_error, limit, observer=(observer, (1, 2)))
    path = folder_of(path)
    layout = {"image": "Image_{name}.jpg", "mask": f"Image_{{name}}_{('1st', '2nd')[observer - 1]}HO.png"}
    return settled(*_read_cases(_cases(path, layout), path, layout["image"], limit), on_error, path)


# ------------------------------------------------------------------------------------------- images with their masks
def _cases(path: Path, layout: dict[str, str]) -> dict[str, Case]:
    """Files of every field, by the name in the patterns of each sort; ``*`` stands for any ending."""
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for sort, pattern in layout.items():
        first, *others = (re.escape(part).replace(r"\*", r"[^/.]+") for part in pattern.split("{name}"))
        expression = re.compile(f"{first}(?P<name>[^/]+)" + "(?P=name)".join(others))
        for file in sorted(path.glob(pattern.replace("{name}", "*"))):
            match = expression.fullmatch(file.relative_to(path).as_posix())
            if match and not match["name"].startswith("."):
                found[match["name"]][sort].append(file)
    return {
        name: {sort: (pattern.replace("{name}", name), files[sort]) for sort, pattern in layout.items()}
        for name, files in found.items()
    }


def _read_cases(cases: dict[str, Case], path: Path, layout: str, limit: int | None) -> tuple[list[Field], list[str]]:
    """Fields, and what is wrong with the files of the others."""
    if not cases:
        msg = f"{path} has no images in the layout {layout.replace('{name}', '<name>')}."
        raise ValueError(msg)

    def read(where: str) -> bytes:
        return (path / where).read_bytes()

    fields: list[Field] = []
    problems: list[str] = []
    for name in tqdm(sorted(cases, key=natural), path.name, disable=not settings.progress):
        if len(fields) == limit:
            break
        earlier = len(problems)
        image: np.ndarray | None = None
        masks: dict[str, np.ndarray] = {}
        for sort in cases[name]:
            with noted(problems):
                file = _the_one(cases[name], sort, name, path)
                where = file.relative_to(path).as_posix()
                picture = decode(read, where)
                if sort == "image":
                    image = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
                else:
                    masks[sort] = mask_of(picture, where, None if image is None else image.shape[1:])
        if image is not None and len(problems) == earlier:
            labels = masks["mask"].astype(np.int32)
            fields.append(Field(name, image, RGB, labels, region=masks.get(_VIEW)))
    return fields, problems


def _the_one(case: Case, sort: str, name: str, path: Path) -> Path:
    expected, files = case[sort]
    if not files:
        bad(f"{name}: no {sort} ({expected})")
    if len(files) > 1:
        bad(f"{name}: {len(files)} files could be the {sort} ({', '.join(str(f.relative_to(path)) for f in files)})")
    return files[0]
