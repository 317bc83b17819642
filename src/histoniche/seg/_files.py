"""What readers of data sets share: bad files are noted and reported at once, pictures are decoded, arguments checked."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._fields import Field

OnError = Literal["raise", "warn"]

# A file that is cut, mislabelled or of another format raises any of these in the decoders.
UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, EOFError, SyntaxError, RuntimeError, struct.error, zlib.error,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
_LARGEST = np.iinfo(np.int32).max


class BadFileError(Exception):
    """What is wrong with the files of one field."""


def bad(*problems: str) -> NoReturn:
    raise BadFileError(*problems)


@contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Go on after a bad file, and note what is wrong."""
    try:
        yield
    except BadFileError as error:
        problems += error.args


def settled(fields: list[Field], problems: list[str], on_error: OnError, path: Path, found: str = "") -> list[Field]:
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


def check(on_error: OnError, limit: int | None = None, **choices: tuple[object, Sequence[object]]) -> None:
    for name, (value, allowed) in {"on_error": (on_error, get_args(OnError)), **choices}.items():
        if value not in allowed:
            msg = f"{name}={value!r} is not among {list(allowed)}."
            raise ValueError(msg)
    if limit is not None and limit < 1:
        msg = f"limit={limit} must be at least 1, or None for all."
        raise ValueError(msg)


def natural(name: str) -> list[str | int]:
    """Key that sorts names with numbers as people do: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def whole_numbers(labels: np.ndarray, name: str) -> np.ndarray:
    """Labels as int32; floats are accepted where they are whole numbers."""
    if not (np.issubdtype(labels.dtype, np.integer) or np.issubdtype(labels.dtype, np.floating)):
        bad(f"{name}: the labels have the type {labels.dtype}; integers are needed")
    broken = labels[~(np.isfinite(labels) & (labels == np.rint(labels)))]
    if broken.size:
        bad(f"{name}: the labels are floats that are no whole numbers, such as {broken[0]:g}")
    if labels.size and (labels.min() < 0 or labels.max() > _LARGEST):
        bad(f"{name}: the labels go from {labels.min():g} to {labels.max():g}; 0 to {_LARGEST} is needed")
    return labels.astype(np.int32)


def decode(read: Callable[[str], bytes], name: str) -> Image.Image:
    """A picture of 8 bits a channel, as RGB; alpha is dropped."""
    try:
        with Image.open(io.BytesIO(read(name))) as picture:
            picture.load()
    except UNREADABLE as error:
        unreadable(name, error)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        bad(f"{name}: a picture of the mode {picture.mode}; 8 bits a channel are needed")
    return picture.convert("RGB")


def unreadable(name: str, error: BaseException) -> NoReturn:
    reason = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
    bad(f"{name}: cannot be read ({reason or type(error).__name__})")


def mask_of(picture: Image.Image, name: str, shape: tuple[int, ...] | None, *, empty: bool = False) -> np.ndarray:
    """Mask (y, x) bool of a picture of 0 and 1, or of 0 and 255 (anything from 128 up, so that a jpg will do)."""
    values = np.asarray(picture.convert("L"))
    mask = values >= (1 if values.max() == 1 else 128)
    if shape is not None and mask.shape != tuple(shape):
        bad(f"{name}: the mask has the size {mask.shape}, its image {tuple(shape)} (y, x)")
    if not mask.any() and (values.any() or not empty):
        bad(f"{name}: the mask has no pixel" + " of 128 or more" * bool(values.any()))
    return mask


def folder_of(path: str | Path, *inside: str) -> Path:
    """The folder, or the first of those inside that is there; an error where there is none."""
    path = Path(path)
    if not path.is_dir():
        msg = f"{path} is no folder."
        raise FileNotFoundError(msg)
    return next((path / name for name in inside if (path / name).is_dir()), path)
