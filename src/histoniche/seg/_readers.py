"""Readers of published data sets and of folders: images with instance labels become fields."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._fields import Field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

OnError = Literal["raise", "warn"]
Kind = Literal["fluorescence", "brightfield", "histology"]

TISSUENET_CHANNELS = ("nuclear", "membrane")
_TISSUENET_LABELS = ("whole_cell", "nuclear")
# A file that is cut, mislabelled or of another format raises any of these in the decoders.
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, EOFError, SyntaxError, RuntimeError, struct.error, zlib.error,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
_SUFFIXES = (".png", ".tif", ".tiff", ".npy")
# Images of BBBC038 are exactly grey, or their channels differ by 15 and more on average; the median of a dark image is
# below 45, of a bright one above 135.
_COLOURED, _BRIGHT = 4, 100
_LARGEST = np.iinfo(np.int32).max


class _BadFileError(Exception):
    """What is wrong with the files of one field."""


def _bad(*problems: str) -> NoReturn:
    raise _BadFileError(*problems)


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Go on after a bad file, and note what is wrong."""
    try:
        yield
    except _BadFileError as error:
        problems += error.args


def _settled(fields: list[Field], problems: list[str], on_error: OnError, path: Path, found: str = "") -> list[Field]:
    """Fields, after all bad files were reported at once."""
    msg = f"{path}: {len(problems)} bad file(s):\n" + "\n".join(f"- {problem}" for problem in problems)
    if problems and on_error == "raise":
        msg += '\nRepair or remove them, or pass on_error="warn" to leave these fields out.'
        raise ValueError(msg)
    if problems:
        warnings.warn(f"{msg}\nTheir fields were left out.", stacklevel=3)
    if not fields:
        msg = f"{path} has no field that could be read{found}."
        raise ValueError(msg)
    return fields


def _check(on_error: OnError, limit: int | None = None, **choices: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in {"on_error": (on_error, get_args(OnError)), **choices}.items():
        if value not in allowed:
            msg = f"{name}={value!r} is not among {list(allowed)}."
            raise ValueError(msg)
    if limit is not None and limit < 1:
        msg = f"limit={limit} must be at least 1, or None for all."
        raise ValueError(msg)


# ------------------------------------------------------------------------------------------------------- TissueNet
def read_tissuenet(
    path: str | Path,
    *,
    channels: Sequence[str] = TISSUENET_CHANNELS,
    target: Literal["whole_cell", "nuclear"] = "whole_cell",
    um_per_px: float | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> list[Field]:
    """Read a split of TissueNet.

    The file has ``X`` (n, y, x, 2), nuclear and membrane channel, and ``y`` (n, y, x, 2), labels of whole cells and of
    nuclei. ``meta``, ``tissue_list``, ``platform_list`` and whatever else it holds are not touched. Images are read one
    by one: only the channels and the labels asked for are kept in memory.

    Parameters
    ----------
    path
        ``tissuenet_v1.x_{train,val,test}.npz``.
    channels
        Channels to keep, of ``"nuclear"`` and ``"membrane"``, in the order wanted.
    target
        Labels to keep.
    um_per_px
        Size of a pixel in um; TissueNet was resampled to about 0.5. The file does not say, so it is unknown (``None``)
        by default.
    on_error
        ``"raise"``: an error that names every image with bad labels; ``"warn"``: a warning, and those are left out.
    limit
        Look only at the first images.

    Returns
    -------
    One field an image, named ``<stem>:<number>``: image (c, y, x), floats as float32; labels (y, x) int32, without any
    object where TissueNet has none.

    Raises
    ------
    FileNotFoundError
        No such file.
    KeyError
        The file lacks ``X`` or ``y``.
    ValueError
        No such channel; a file that is damaged or no npz; arrays of Python objects, or of other shapes; labels that are
        no whole numbers from 0: every such image is named.

    References
    ----------
    Greenwald et al., Whole-cell segmentation of tissue images with human-level performance using large-scale data
    annotation and deep learning, Nature Biotechnology 40, 555 (2022).
    """
    path = Path(path)
    for channel in channels or ("",):
        _check(on_error, limit, target=(target, _TISSUENET_LABELS), channels=(channel, TISSUENET_CHANNELS))
    take = [TISSUENET_CHANNELS.index(name) for name in channels]
    fields: list[Field] = []
    problems: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            (shape, images), (shape_of_labels, labels) = (_npz_rows(archive, key, path) for key in ("X", "y"))
            if shape != shape_of_labels or len(shape) != 4 or shape[-1] != 2 or 0 in shape:
                msg = f"{path}: X {shape} and y {shape_of_labels} must both have the shape (n, y, x, 2)."
                raise ValueError(msg)
            pairs = islice(zip(images, labels, strict=True), limit)
            total = min(shape[0], limit or shape[0])
            for number, (x, y) in enumerate(tqdm(pairs, path.name, total, disable=not settings.progress)):
                name = f"{path.stem}:{number:05d}"
                image = np.ascontiguousarray(x[..., take].transpose(2, 0, 1))
                if np.issubdtype(image.dtype, np.floating):
                    image = image.astype(np.float32, copy=False)
                with _noted(problems):
                    numbers = _whole_numbers(y[..., _TISSUENET_LABELS.index(target)], name)
                    fields.append(Field(name, image, tuple(channels), numbers, um_per_px))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        msg = f"{path} is damaged or no npz file ({error}): download it again."
        raise ValueError(msg) from error
    return _settled(fields, problems, on_error, path)


def _npz_rows(archive: zipfile.ZipFile, key: str, path: Path) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """Shape of an array of an npz file, and its rows one after the other: numpy could only decompress all of it."""
    names = archive.namelist()
    if f"{key}.npy" not in names:
        msg = f"{path} has no array {key!r}; it has {sorted(name.removesuffix('.npy') for name in names)}."
        raise KeyError(msg)
    file = archive.open(f"{key}.npy")
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject or fortran:
        why = "holds Python objects, and loading those could run code" if dtype.hasobject else "is in Fortran order"
        msg = f"{path}: {key!r} {why}: save it again as one array of numbers, `np.ascontiguousarray({key})`."
        raise ValueError(msg)
    size = int(np.prod(shape[1:])) * dtype.itemsize
    return shape, (np.frombuffer(file.read(size), dtype).reshape(shape[1:]) for _ in range(shape[0]))


def _whole_numbers(labels: np.ndarray, name: str) -> np.ndarray:
    """Labels as int32; floats are accepted where they are whole numbers."""
    if not (np.issubdtype(labels.dtype, np.integer) or np.issubdtype(labels.dtype, np.floating)):
        _bad(f"{name}: the labels have the type {labels.dtype}; integers are needed")
    broken = labels[~(np.isfinite(labels) & (labels == np.rint(labels)))]
    if broken.size:
        _bad(f"{name}: the labels are floats that are no whole numbers, such as {broken[0]:g}")
    if labels.size and (labels.min() < 0 or labels.max() > _LARGEST):
        _bad(f"{name}: the labels go from {labels.min():g} to {labels.max():g}; 0 to {_LARGEST} is needed")
    return labels.astype(np.int32)


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
        _check(on_error, limit, kinds=(name, get_args(Kind)))
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
            with _noted(problems):
                pixels, kind = _bbbc038_image(key, members["images"], read)
                seen[kind] += 1
                if kind not in kinds:
                    continue
                shape = pixels.shape
            with _noted(problems):
                labels = _bbbc038_labels(key, sorted(members["masks"]), read, shape)
            if len(problems) == earlier:
                fields.append(Field(key.rsplit("/", 1)[-1], pixels[None], ("DNA",), labels))
    return _settled(fields, problems, on_error, path, f" of the kinds {list(kinds)}; there are {dict(seen)}")


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
        *folder, sort, file = name.split("/")
        if not folder or sort not in ("images", "masks") or "__MACOSX" in folder or file.startswith("."):
            continue
        group = groups["/".join(folder)][sort]
        if file:
            group.append(name)
    return groups


def _bbbc038_image(key: str, names: list[str], read: Callable[[str], bytes]) -> tuple[np.ndarray, Kind]:
    """One bright channel, (y, x) uint8, and the kind of the image."""
    if len(names) != 1:
        _bad(f"{key}: {len(names)} files in images/; one is needed")
    picture = _png(read, names[0])
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
        _bad(f"{key}: no masks")
    problems: list[str] = []
    masks: list[np.ndarray] = []
    for name in names:
        mask = None
        with _noted(problems):
            mask = np.asarray(_png(read, name).convert("L")) > 0
        if mask is None:
            continue
        shape = shape or mask.shape
        if mask.shape != shape:
            problems.append(f"{name}: the mask has the size {mask.shape}, its image {shape} (y, x)")
        elif not mask.any():
            problems.append(f"{name}: the mask has no pixel")
        masks.append(mask)
    if problems or shape is None:
        _bad(*problems)
    labels = np.zeros(shape, dtype=np.int32)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    hidden = np.setdiff1d(np.arange(1, len(names) + 1), labels)
    if hidden.size:
        _bad(*(f"{names[number - 1]}: every pixel of the mask lies in later masks" for number in hidden))
    return labels


def _png(read: Callable[[str], bytes], name: str) -> Image.Image:
    """A picture of 8 bits a channel, as RGB; alpha is dropped."""
    try:
        with Image.open(io.BytesIO(read(name))) as picture:
            picture.load()
    except _UNREADABLE as error:
        _unreadable(name, error)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        _bad(f"{name}: a picture of the mode {picture.mode}; 8 bits a channel are needed")
    return picture.convert("RGB")


def _unreadable(name: str, error: BaseException) -> NoReturn:
    reason = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
    _bad(f"{name}: cannot be read ({reason or type(error).__name__})")


# ---------------------------------------------------------------------------------------------------------- folders
def read_folder(
    path: str | Path,
    *,
    images: str = "images/*",
    labels: str | None = "labels/*",
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
        of a label image; label images of another size, of floats, of one class instead of instances, or without any object.
    """
    path = Path(path)
    _check(on_error)
    if not path.is_dir():
        msg = f"{path} is no folder."
        raise FileNotFoundError(msg)
    names = ("image",) if channels is None else tuple(channels)
    found = {"images": _by_stem(path, images), "labels": {} if labels is None else _by_stem(path, labels)}
    if not found["images"]:
        msg = f"No file in {path} matches images={images!r}."
        raise ValueError(msg)
    fields: list[Field] = []
    problems: list[str] = []
    for stem in tqdm(sorted({*found["images"], *found["labels"]}), path.name, disable=not settings.progress):
        earlier = len(problems)
        image = numbers = None
        with _noted(problems):
            file = _only("image", stem, found["images"], path)
            image = _channels_first(_read_array(file), names, file.name)
        with _noted(problems):
            if labels is not None:
                file = _only("label image", stem, found["labels"], path)
                shape = None if image is None else image.shape[1:]
                numbers = _instances(_read_array(file, palette=True), file.name, shape)
        if image is not None and len(problems) == earlier:
            fields.append(Field(stem, image, names, numbers, um_per_px))
    return _settled(fields, problems, on_error, path)


def _by_stem(path: Path, pattern: str) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.glob(pattern)):
        if file.is_file() and not file.name.startswith("."):
            groups[file.stem.removesuffix(".ome")].append(file)
    return groups


def _only(sort: str, stem: str, found: dict[str, list[Path]], path: Path) -> Path:
    """The one file of a stem."""
    files = found.get(stem, [])
    if not files:
        hint = " (labels=None reads images that have none)" if sort == "label image" else ""
        _bad(f"{stem}: no {sort} of this name{hint}")
    if len(files) > 1:
        _bad(f"{', '.join(file.relative_to(path).as_posix() for file in files)}: {len(files)} {sort}s of one name")
    return files[0]


def _read_array(file: Path, *, palette: bool = False) -> np.ndarray:
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
            _bad(f"{file.name}: files of this kind are not read; {', '.join(_SUFFIXES)} are")
    except _UNREADABLE as error:
        _unreadable(file.name, error)
    if not isinstance(array, np.ndarray) or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        _bad(f"{file.name}: holds {getattr(array, 'dtype', type(array).__name__)}; numbers are needed")
    return array


def _channels_first(array: np.ndarray, names: tuple[str, ...], file: str) -> np.ndarray:
    if array.dtype == bool or np.issubdtype(array.dtype, np.complexfloating) or 0 in array.shape:
        _bad(f"{file}: an image of the type {array.dtype}, shape {array.shape}; integers or floats are needed")
    if array.ndim == 2 and len(names) == 1:
        return array[None]
    first, last = array.ndim == 3 and array.shape[0] == len(names), array.ndim == 3 and array.shape[-1] == len(names)
    if first != last:
        return array if first else np.moveaxis(array, -1, 0)
    what = "either axis could be that of" if first else "no axis is that of"
    _bad(f"{file}: an image of the shape {array.shape}: {what} the {len(names)} channel(s) {list(names)}")


def _instances(array: np.ndarray, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Labels as int32, checked to be instances, and to be of the shape (y, x) of their image where that is known."""
    if array.shape != (shape or array.shape[:2]):
        _bad(f"{name}: the label image has the size {array.shape}, its image {shape or 'two axes'} (y, x)")
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        _bad(f"{name}: a label image of the type {array.dtype}; integers, one number an object, are needed")
    labels = _whole_numbers(array.astype(np.uint8) if array.dtype == bool else array, name)
    numbers = np.unique(labels[labels > 0])
    if not len(numbers):
        _bad(f"{name}: the label image has no object")
    # A field may well hold a single object; numbers of masks, and several pieces of one number, say that it is a mask.
    if len(numbers) == 1 and (
        array.dtype == bool or numbers[0] in (255, 65535) or ndimage.label(labels, np.ones((3, 3)))[1] > 1
    ):
        _bad(
            f"{name}: a mask of one class (the only value beside 0 is {numbers[0]}), not labels of instances; "
            "`skimage.measure.label(mask)` numbers objects that do not touch"
        )
    return labels
