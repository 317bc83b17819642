"""Outputs of teachers, kept on disk by content: a teacher costs far more than the student that learns from it."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm

from histoniche._compute import memory_kept
from histoniche._settings import settings
from histoniche.seg._targets import OUTPUTS

from ._protocol import check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from histoniche.seg._fields import Field

    from ._protocol import Teacher

_FORMAT = 2


@memory_kept()
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
        found = _kept(
            path, item, teacher.name, {"maps": (len(OUTPUTS), *item.shape)},
            lambda item=item: {"maps": check_output(teacher(item), item, teacher.name).maps},  # type: ignore[misc]
        )  # fmt: skip
        maps.append(found["maps"])
    return maps


@memory_kept()
def teach_hidden(
    fields: Sequence[Field],
    *,
    teacher: Any,
    layers: Mapping[str, tuple[int, int]],
    maps: bool = True,
    cache: Path | str | None = None,
    description: str = "teacher",
) -> list[dict[str, np.ndarray]]:
    """Run a teacher over fields, and keep its maps and hidden features.

    Parameters
    ----------
    fields
        Fields.
    teacher
        A teacher with a method ``hidden``.
    layers
        Names of hidden features, and the grid (h, w) to whose cells they are averaged.
    maps
        Whether its maps are asked for, which may cost more.
    cache, description
        As in :func:`teach`.

    Returns
    -------
    For every field ``"maps"`` (2, y, x), where asked for, and the features (c, h, w) by name; float32, rounded to float16.

    Raises
    ------
    ValueError
        A teacher without hidden features, or without one of those; a grid finer than the teacher's.
    """
    if not hasattr(teacher, "hidden"):
        msg = f"Teacher {teacher.name!r} has no hidden features to align with: leave the term 'hidden' out."
        raise ValueError(msg)
    folder = None if cache is None else _make_folder(Path(cache))
    outputs = []
    for item in tqdm(fields, desc=description, disable=not settings.progress):
        asked = hashlib.sha256(f"{output_key(item, teacher)} {sorted(layers.items())} {maps}".encode()).hexdigest()
        path = None if folder is None else folder / f"{asked[:32]}.safetensors"
        shapes: dict[str, tuple[int, ...]] = {name: (-1, *grid) for name, grid in layers.items()}
        if maps:
            shapes["maps"] = (len(OUTPUTS), *item.shape)
        outputs.append(
            _kept(path, item, teacher.name, shapes, lambda item=item: _asked(item, teacher, layers, maps=maps))  # type: ignore[misc]
        )
    return outputs


def _asked(item: Field, teacher: Any, layers: Mapping[str, tuple[int, int]], *, maps: bool) -> dict[str, np.ndarray]:
    found = {}
    if maps:
        output = check_output(teacher(item, features=True), item, teacher.name)
        found["maps"], hidden = output.maps, output.features
    else:
        hidden = teacher.hidden(item)
    for name, grid in layers.items():
        if name not in hidden:
            msg = f"Teacher {teacher.name!r} has no hidden features {name!r}; it has {sorted(hidden)}."
            raise ValueError(msg)
        found[name] = _pooled(hidden[name], grid, f"{name!r} of teacher {teacher.name!r}")
    return found


def _pooled(features: np.ndarray, grid: tuple[int, int], what: str) -> np.ndarray:
    """Average features (c, h, w) to a coarser grid that divides theirs."""
    height, width = features.shape[1:]
    if height % grid[0] or width % grid[1]:
        msg = (
            f"The student's grid {grid[0]} x {grid[1]} does not match that of {what}, {height} x {width}, of which it must be "
            "a divisor: choose another patch_px, or align other layers."
        )
        raise ValueError(msg)
    cells = features.reshape(len(features), grid[0], height // grid[0], grid[1], width // grid[1])
    return cells.mean(axis=(2, 4))


def _kept(
    path: Path | None,
    item: Field,
    teacher: str,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What a file holds, or what is made and then written to it; rounded to float16 either way."""
    if path is not None and path.exists():
        half = _read(path, item, shapes)
    else:
        # safetensors writes memory as it lies: what is not contiguous would be scrambled.
        half = {name: np.ascontiguousarray(array, dtype=np.float16) for name, array in make().items()}
        if path is not None:
            _write(path, half, teacher=teacher, field=item.name)
    return {name: array.astype(np.float32) for name, array in half.items()}


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


def _write(path: Path, arrays: dict[str, np.ndarray], **notes: str) -> None:
    """Write beside, then rename, so that no file is ever half written."""
    content = save(arrays, metadata={**notes, "crc32": _crc(arrays)})
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path, item: Field, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays, notes = {name: file.get_tensor(name) for name in shapes}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, item, str(error))) from error
    for name, wanted in shapes.items():
        array = arrays[name]
        fits = len(array.shape) == len(wanted) and all(w in {-1, n} for n, w in zip(array.shape, wanted, strict=True))
        if not fits or array.dtype != np.float16:
            raise ValueError(_damaged(path, item, f"{array.shape} {array.dtype} instead of {wanted} float16"))
    if notes.get("crc32") != _crc(arrays):
        raise ValueError(_damaged(path, item, "its checksum is wrong"))
    return arrays


def _crc(arrays: dict[str, np.ndarray]) -> str:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return f"{crc:08x}"


def _damaged(path: Path, item: Field, reason: str) -> str:
    return f"Cached output {str(path)!r} of field {item.name!r} is damaged ({reason}): delete this file, and run again."
