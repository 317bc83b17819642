"""Outputs of teachers, kept on disk by content: a teacher costs far more than the student that learns from it."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm

from histoniche._settings import settings
from histoniche.seg._targets import OUTPUTS

from ._protocol import check_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histoniche.seg._fields import Field

    from ._protocol import Teacher

_FORMAT = 1


def teach(
    fields: Sequence[Field], *, teacher: Teacher, cache: Path | str | None = None, description: str = "teacher"
) -> list[np.ndarray]:
    """Run a teacher over fields, and keep what it says.

    Parameters
    ----------
    fields
        Fields, each small enough for the teacher; cut large ones with :func:`histoniche.seg.patches`.
    teacher
        The teacher.
    cache
        Folder for its outputs, one file a field, made where it is missing. A file is found again by the content of the field
        (what the teacher reads of it, not its name) and the teacher's fingerprint, so that a run that was killed goes on where
        it stopped, and several teachers share a folder.
    description
        Text of the progress bar.

    Returns
    -------
    Maps (2, y, x) float32 in 0 to 1, foreground and boundary, in the order of the fields; rounded to float16, with a
    cache or without.

    Raises
    ------
    ValueError
        A file of the cache is damaged (delete it), or the teacher gives something that is no probability.
    NotADirectoryError
        ``cache`` is a file.
    """
    folder = None if cache is None else _make_folder(Path(cache))
    maps = []
    for item in tqdm(fields, desc=description, disable=not settings.progress):
        path = None if folder is None else folder / f"{output_key(item, teacher)}.safetensors"
        if path is not None and path.exists():
            half = _read(path, item)
        else:
            half = check_output(teacher(item), item, teacher.name).maps.astype(np.float16)
            if path is not None:
                _write(path, half, teacher=teacher.name, field=item.name)
        maps.append(half.astype(np.float32))
    return maps


def output_key(item: Field, teacher: Teacher) -> str:
    """Name of what a teacher says of a field: 32 hexadecimal digits of a SHA-256.

    A teacher that names its ``channels`` reads those alone, and labels where its ``prompts`` are boxes of them. Of any other,
    all that the field has may count.
    """
    sha = hashlib.sha256(f"{_FORMAT}\n{teacher.fingerprint}\n{item.shape}\n".encode())
    channels = getattr(teacher, "channels", None)
    if channels is None:
        sha.update(f"{list(item.channels)} {item.um_per_px}\n".encode())
        _add(sha, item.stretch_limits(), np.float64)
        _add(sha, item.image, np.float32)
    else:
        _add(sha, item.read([name for name in channels if name is not None]), np.float32)
    needs_labels = channels is None or getattr(getattr(teacher, "prompts", None), "kind", None) == "boxes"
    if needs_labels and item.labels is not None:
        _add(sha, item.read_labels(), np.int32)
    return sha.hexdigest()[:32]


def _add(sha: hashlib._Hash, array: np.ndarray, dtype: type) -> None:
    sha.update(np.ascontiguousarray(array, dtype=dtype).tobytes())


def _make_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        msg = f"cache={str(folder)!r} is a file; a folder is needed."
        raise NotADirectoryError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, maps: np.ndarray, **notes: str) -> None:
    """Write beside, then rename, so that no file is ever half written."""
    content = save({"maps": maps}, metadata={**notes, "crc32": _crc(maps)})
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path, item: Field) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as file:
            maps, notes = file.get_tensor("maps"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, item, str(error))) from error
    wanted = (len(OUTPUTS), *item.shape)
    if maps.shape != wanted or maps.dtype != np.float16:
        raise ValueError(_damaged(path, item, f"{maps.shape} {maps.dtype} instead of {wanted} float16"))
    if notes.get("crc32") != _crc(maps):
        raise ValueError(_damaged(path, item, "its checksum is wrong"))
    return maps


def _crc(maps: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(maps).tobytes()):08x}"


def _damaged(path: Path, item: Field, reason: str) -> str:
    return f"Cached output {str(path)!r} of field {item.name!r} is damaged ({reason}): delete this file, and run again."
