"""Reader of TissueNet, a published data set of cells and nuclei in multiplexed tissue images."""

from __future__ import annotations

import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._fields import Field
from ._files import check, noted, settled, whole_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._files import OnError

TISSUENET_CHANNELS = ("nuclear", "membrane")
_TISSUENET_LABELS = ("whole_cell", "nuclear")


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
        check(on_error, limit, target=(target, _TISSUENET_LABELS), channels=(channel, TISSUENET_CHANNELS))
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
                with noted(problems):
                    numbers = whole_numbers(y[..., _TISSUENET_LABELS.index(target)], name)
                    fields.append(Field(name, image, tuple(channels), numbers, um_per_px))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        msg = f"{path} is damaged or no npz file ({error}): download it again."
        raise ValueError(msg) from error
    return settled(fields, problems, on_error, path)


def _npz_rows(archive: zipfile.ZipFile, key: str, path: Path) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """Shape of an array of an npz file, and its rows one after the other: numpy could only decompress all of it."""
    names = archive.namelist()
    if f"{key}.npy" not in names:
        msg = f"{path} has no array {key!r}; it has {sorted(name.removesuffix('.npy') for name in names)}."
        raise KeyError(msg)
    file = archive.open(f"{key}.npy")
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except ValueError as error:
        msg = f"{path}: its array {key!r} is damaged ({error}): download it again."
        raise ValueError(msg) from error
    if dtype.hasobject or fortran:
        why = "holds Python objects, and loading those could run code" if dtype.hasobject else "is in Fortran order"
        msg = f"{path}: {key!r} {why}: save it again as one array of numbers, `np.ascontiguousarray({key})`."
        raise ValueError(msg)
    if not np.issubdtype(dtype, np.number):
        msg = f"{path}: {key!r} has the type {dtype}; numbers are needed: save it again as an array of numbers."
        raise ValueError(msg)
    return shape, _rows(file, shape, dtype, f"{path}: its array {key!r}")


def _rows(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, what: str) -> Iterator[np.ndarray]:
    size = int(np.prod(shape[1:])) * dtype.itemsize
    for number in range(shape[0]):
        row = file.read(size)
        if len(row) < size:
            msg = f"{what} is damaged: it ends within image {number} of {shape[0]}. Download it again."
            raise ValueError(msg)
        yield np.frombuffer(row, dtype).reshape(shape[1:])
