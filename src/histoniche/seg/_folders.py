"""Folders of the command line: channels that nobody named, and label images that are measured against others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._files import bad, noted, whole_numbers
from ._readers import by_stem, channels_first, read_array, the_only
from ._task_readers import RGB


def channels_of(path: str | Path, *, images: str = "images/*") -> list[str] | None:
    """Channels of images that nobody named, as the first image of a folder tells: red, green and blue, or None for one.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No image, one that cannot be read, or one of another number of channels.
    """
    path = Path(path)
    if not path.is_dir():
        msg = f"{path} is no folder."
        raise FileNotFoundError(msg)
    files = [file for group in by_stem(path, images).values() for file in group]
    if not files:
        msg = f"No file in {path} matches images={images!r}."
        raise ValueError(msg)
    problems: list[str] = []
    with noted(problems):
        array = read_array(files[0])
        if array.ndim == 2:
            return None
        channels_first(array, RGB, files[0].name)
        return list(RGB)
    msg = f"{problems[0]}. Name the channels."
    raise ValueError(msg)


def label_pairs(
    predicted: str | Path, truth: str | Path, *, mask: bool = False
) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """Names and pairs of the label images, (y, x) int32, of two folders; images without an object are as good as others.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No label image; bad files: one without a partner, that cannot be read, of another size, or, without ``mask``, of
        one class.
    """
    folders = [Path(predicted), Path(truth)]
    for folder in folders:
        if not folder.is_dir():
            msg = f"{folder} is no folder."
            raise FileNotFoundError(msg)
    found = [by_stem(folder, "*") for folder in folders]
    names = sorted({name for groups in found for name in groups})
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    problems: list[str] = []
    for name in tqdm(names, "read", disable=not settings.progress):
        pair: list[np.ndarray] = []
        for folder, groups in zip(folders, found, strict=True):
            with noted(problems):
                if name not in groups:
                    bad(f"{name}: no label image of this name in {folder}")
                file = the_only("label image", name, groups, folder)
                pair.append(_measured_labels(read_array(file, palette=True), str(file), mask=mask))
        if len(pair) == 2:
            pairs.append((pair[0], pair[1]))
    if problems or not names:
        msg = "\n- ".join([f"{len(problems)} bad file(s):", *problems]) if names else f"{folders[1]} has no file."
        raise ValueError(msg)
    return names, pairs


def _measured_labels(array: np.ndarray, name: str, *, mask: bool) -> np.ndarray:
    if array.ndim != 2:
        bad(f"{name}: the label image has the size {array.shape}; (y, x) is needed")
    labels = whole_numbers(array.astype(np.uint8) if array.dtype == bool else array, name)
    if mask:
        return (labels > 0).astype(np.int32)
    if array.dtype == bool or (labels.max() in (255, 65535) and len(np.unique(labels)) <= 2):
        bad(f"{name}: a mask of one class, not labels of instances: mask=True (--mask) measures masks")
    return labels
