"""Readers of BBBC038 and of folders: images with instance labels become fields."""

from __future__ import annotations

import zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._fields import Field
from ._files import UNREADABLE, bad, check, decode, noted, settled, unreadable, whole_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._files import OnError

Kind = Literal["fluorescence", "brightfield", "histology"]

_SUFFIXES = (".png", ".tif", ".tiff", ".npy")
# Images of BBBC038 are exactly grey, or their channels differ by 15 and more on average; the median of a dark image is
# below 45, of a bright one above 135.
_COLOURED, _BRIGHT = 4, 100


# --------------------------------------------------------------------------------------------------------- BBBC038
def read_bbbc038(
    path: str | Path,
    *,
    kinds: Sequence[Kind] = ("fluorescence",),
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read BBBC038, the nuclei of the 2018 Data Science Bowl.

    The layout is ``<id>/images/<id>.png`` and ``<id>/masks/*.png``, one mask a nucleus. Masks are numbered from 1 in
    the order of their file names; where they overlap, the later number wins. The data set mixes three kinds of images,
    told apart by colour (channels differ by more than 4 on average) and by the median of their luminance (100):
    ``"fluorescence"`` is grey on dark; ``"brightfield"``, grey on bright, and ``"histology"``, coloured, become one
    channel as well, 255 minus the luminance, so that nuclei are bright in all of them.

    Parameters
    ----------
    path
        The folder that holds the folders ``<id>``, or ``stage1_train.zip``, which is read without unpacking it.
    kinds
        Kinds of images to read.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.
    limit
        Stop after as many fields, in the order of their ids.

    Returns
    -------
    Fields named by their id: image (1, y, x) uint8, channel ``"DNA"``; labels (y, x) int32; um/px is unknown.

    Raises
    ------
    FileNotFoundError
        No such folder or file.
    ValueError
        No zip file; no image, or none of these kinds; bad files: no image, or several; an image without masks; an
        image or mask that cannot be read; a mask of another size, without any pixel, or hidden by later ones.

    References
    ----------
    Caicedo et al., Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl, Nature Methods 16, 1247
    (2019). https://bbbc.broadinstitute.org/BBBC038
    """
    path = Path(path)
    for name in kinds or ("",):
        check(on_error, limit, kinds=(name, get_args(Kind)))
    fields: list[Field] = []
    problems: list[str] = []
    seen: Counter[str] = Counter()
    with _members(path) as (names, read):
        groups = _bbbc038_groups(names)
        if not groups:
            msg = f"{path} has no images in the layout <id>/images/<id>.png, <id>/masks/*.png."
            raise ValueError(msg)
        for key, members in tqdm(sorted(groups.items()), desc="BBBC038", disable=not settings.progress):
            if len(fields) == limit:
                break
            shape, earlier = None, len(problems)
            with noted(problems):
                pixels, kind = _bbbc038_image(key, members["images"], read)
                seen[kind] += 1
                if kind not in kinds:
                    continue
                shape = pixels.shape
            with noted(problems):
                labels = _bbbc038_labels(key, sorted(members["masks"]), read, shape)
            if len(problems) == earlier:
                fields.append(Field(key.rsplit("/", 1)[-1], pixels[None], ("DNA",), labels))
    return settled(fields, problems, on_error, path, f" of the kinds {list(kinds)}; there are {dict(seen)}")


@contextmanager
def _members(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Names of what lies in a folder or zip file, those of folders with a slash at the end, and a function that reads."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() + "/" * file.is_dir() for file in path.rglob("*")]
        yield names, lambda name: (path / name).read_bytes()
        return
    if not path.is_file():
        msg = f"{path} does not exist."
        raise FileNotFoundError(msg)
    if not zipfile.is_zipfile(path):
        msg = f"{path} is neither a folder nor a whole zip file: download it again."
        raise ValueError(msg)
    with zipfile.ZipFile(path) as archive:
        yield archive.namelist(), archive.read


def _bbbc038_groups(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Files of every id, its images apart from its masks."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"images": [], "masks": []})
    for name in names:
        *folder, sort, file = ["", *name.split("/")]  # beside the folders may lie a table, or what a system leaves
        folder = folder[1:]
        if not folder or sort not in ("images", "masks") or "__MACOSX" in folder or file.startswith("."):
            continue
        group = groups["/".join(folder)][sort]
        if file:
            group.append(name)
    return groups


def _bbbc038_image(key: str, names: list[str], read: Callable[[str], bytes]) -> tuple[np.ndarray, Kind]:
    """One bright channel, (y, x) uint8, and the kind of the image."""
    if len(names) != 1:
        bad(f"{key}: {len(names)} files in images/; one is needed")
    picture = decode(read, names[0])
    rgb = np.asarray(picture).astype(np.int16)
    luminance = np.asarray(picture.convert("L"))
    if (rgb.max(-1) - rgb.min(-1)).mean() > _COLOURED:
        return 255 - luminance, "histology"
    if np.median(luminance) > _BRIGHT:
        return 255 - luminance, "brightfield"
    return luminance, "fluorescence"


def _bbbc038_labels(
    key: str, names: list[str], read: Callable[[str], bytes], shape: tuple[int, ...] | None
) -> np.ndarray:
    """Labels (y, x) int32; where the image is bad and has no shape, masks are checked on their own."""
    if not names:
        bad(f"{key}: no masks")
    problems: list[str] = []
    masks: list[np.ndarray] = []
    for name in names:
        mask = None
        with noted(problems):
            mask = np.asarray(decode(read, name).convert("L")) > 0
        if mask is None:
            continue
        shape = shape or mask.shape
        if mask.shape != shape:
            problems.append(f"{name}: the mask has the size {mask.shape}, its image {shape} (y, x)")
        elif not mask.any():
            problems.append(f"{name}: the mask has no pixel")
        masks.append(mask)
    if problems or shape is None:
        bad(*problems)
    labels = np.zeros(shape, dtype=np.int32)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    hidden = np.setdiff1d(np.arange(1, len(names) + 1), labels)
    if hidden.size:
        bad(*(f"{names[number - 1]}: every pixel of the mask lies in later masks" for number in hidden))
    return labels


# ---------------------------------------------------------------------------------------------------------- folders
def read_folder(
    path: str | Path,
    *,
    images: str = "images/*",
    labels: str | None = "labels/*",
    labels_path: str | Path | None = None,
    unlabelled: bool = False,
    mask: bool = False,
    channels: Sequence[str] | None = None,
    um_per_px: float | None = None,
    on_error: OnError = "raise",
) -> list[Field]:
    """Read a folder of images and label images, paired by the stem of their file names.

    Parameters
    ----------
    path
        The folder.
    images
        Pattern of the images, relative to the folder: png, tif, tiff, npy. Files that begin with a dot are ignored.
    labels
        Pattern of the label images: 0 is background, every object has a number of its own. ``None``: there are none.
    labels_path
        Folder that ``labels`` is relative to, where that is not ``path``.
    unlabelled
        Whether an image without a label image is read too, as a field without labels.
    mask
        Whether label images are masks of one class: what is not 0 becomes 1.
    channels
        Names of the channels. An image of several channels may be (c, y, x) or (y, x, c): the channels are the only one
        of the two axes that is as long as this list. ``None``: images have no axis of channels, their one channel is
        called ``"image"``.
    um_per_px
        Size of a pixel of all images in um; what a tif says is not read.
    on_error
        ``"raise"``: an error that names every bad file; ``"warn"``: a warning that does, and their fields are left out.

    Returns
    -------
    Fields named by their stem: image (c, y, x) of the type of the file, memory-mapped where it is an npy; labels (y, x)
    int32.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No image; bad files: images that cannot be read or whose channels cannot be told; no label image, or no image
        of a label image; label images of another size, of floats, of one class instead of instances (without ``mask``), or
        without any object.
    """
    path, label_folder = Path(path), Path(path if labels_path is None else labels_path)
    check(on_error)
    for folder in (path, label_folder):
        if not folder.is_dir():
            msg = f"{folder} is no folder."
            raise FileNotFoundError(msg)
    names = ("image",) if channels is None else tuple(channels)
    found = {"images": by_stem(path, images), "labels": {} if labels is None else by_stem(label_folder, labels)}
    if not found["images"]:
        msg = f"No file in {path} matches images={images!r}."
        raise ValueError(msg)
    fields: list[Field] = []
    problems: list[str] = []
    for stem in tqdm(sorted({*found["images"], *found["labels"]}), path.name, disable=not settings.progress):
        earlier = len(problems)
        image = numbers = None
        with noted(problems):
            file = the_only("image", stem, found["images"], path)
            image = channels_first(read_array(file), names, file.name)
        with noted(problems):
            if labels is not None and not (unlabelled and stem not in found["labels"]):
                file = the_only("label image", stem, found["labels"], label_folder)
                shape = None if image is None else image.shape[1:]
                numbers = _label_image(read_array(file, palette=True), file.name, shape, mask=mask)
        if image is not None and len(problems) == earlier:
            fields.append(Field(stem, image, names, numbers, um_per_px))
    return settled(fields, problems, on_error, path)


def by_stem(path: Path, pattern: str) -> dict[str, list[Path]]:
    """Files that a pattern matches, by their names without an ending."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.glob(pattern)):
        if file.is_file() and not file.name.startswith("."):
            groups[file.stem.removesuffix(".ome")].append(file)
    return groups


def the_only(sort: str, stem: str, found: dict[str, list[Path]], path: Path) -> Path:
    """The one file of a stem."""
    files = found.get(stem, [])
    if not files:
        hint = " (labels=None or unlabelled=True reads images that have none)" if sort == "label image" else ""
        bad(f"{stem}: no {sort} of this name{hint}")
    if len(files) > 1:
        bad(f"{', '.join(file.relative_to(path).as_posix() for file in files)}: {len(files)} {sort}s of one name")
    return files[0]


def read_array(file: Path, *, palette: bool = False) -> np.ndarray:
    """Array of a file; with ``palette``, a png of coloured numbers gives its numbers."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".png":
            with Image.open(file) as picture:
                array = np.asarray(picture.convert("RGB") if picture.mode == "P" and not palette else picture)
        elif suffix in (".tif", ".tiff"):
            array = tifffile.imread(file)
        elif suffix == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            bad(f"{file.name}: files of this kind are not read; {', '.join(_SUFFIXES)} are")
    except UNREADABLE as error:
        unreadable(file.name, error)
    if not isinstance(array, np.ndarray) or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        bad(f"{file.name}: holds {getattr(array, 'dtype', type(array).__name__)}; numbers are needed")
    return array


def channels_first(array: np.ndarray, names: tuple[str, ...], file: str) -> np.ndarray:
    """Image (c, y, x) of a file's array."""
    if array.dtype == bool or np.issubdtype(array.dtype, np.complexfloating) or 0 in array.shape:
        bad(f"{file}: an image of the type {array.dtype}, shape {array.shape}; integers or floats are needed")
    if array.ndim == 2 and len(names) == 1:
        return array[None]
    first, last = array.ndim == 3 and array.shape[0] == len(names), array.ndim == 3 and array.shape[-1] == len(names)
    if first != last:
        return array if first else np.moveaxis(array, -1, 0)
    what = "either axis could be that of" if first else "no axis is that of"
    bad(f"{file}: an image of the shape {array.shape}: {what} the {len(names)} channel(s) {list(names)}")


def _label_image(array: np.ndarray, name: str, shape: tuple[int, ...] | None, *, mask: bool) -> np.ndarray:
    """Labels as int32, of instances or of a mask, and of the shape (y, x) of their image where that is known."""
    if array.shape != (shape or array.shape[:2]):
        bad(f"{name}: the label image has the size {array.shape}, its image {shape or 'two axes'} (y, x)")
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        bad(f"{name}: a label image of the type {array.dtype}; integers, one number an object, are needed")
    labels = whole_numbers(array.astype(np.uint8) if array.dtype == bool else array, name)
    if not (labels > 0).any():
        bad(f"{name}: the label image has no object")
    if mask:
        return (labels > 0).astype(np.int32)
    numbers = np.unique(labels[labels > 0])
    # A field may well hold a single object; numbers of masks, and several pieces of one number, say that it is a mask.
    if len(numbers) == 1 and (
        array.dtype == bool or numbers[0] in (255, 65535) or ndimage.label(labels, np.ones((3, 3)))[1] > 1
    ):
        bad(
            f"{name}: a mask of one class (the only value beside 0 is {numbers[0]}), not labels of instances; "
            "`skimage.measure.label(mask)` numbers objects that do not touch, mask=True reads masks as they are"
        )
    return labels
