"""What tells fields apart: whether a result was made of these, and whether one shows the image of another."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ._fields import Field, pixels_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def fields_in(options: Mapping[str, Any]) -> list[Field]:
    """Fields among the values of options."""
    lists = [value for value in options.values() if isinstance(value, list | tuple)]
    return [item for values in lists for item in values if isinstance(item, Field)]


def fingerprints(fields: Sequence[Field]) -> list[str]:
    """Digest of all of each field but its name: 32 hexadecimal digits of a SHA-256."""
    found = []
    for item in fields:
        parts = [pixels_digest(np.asarray(item.image)), pixels_digest(item.stretch_limits().astype(np.float64))]
        parts += [pixels_digest(np.asarray(part)) for part in (item.labels, item.region) if part is not None]
        about = [*parts, *item.channels, item.labels is None, item.um_per_px]
        found.append(hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32])
    return found


def content_hashes(item: Field) -> set[str]:
    """What identifies the image of a field, whatever its name, its other channels, and the scale of its values.

    Parameters
    ----------
    item
        The field.

    Returns
    -------
    Digest of each channel's ranks of values, 16 hexadecimal digits of a SHA-256; channels of one value have none.
    """
    hashes = set()
    for plane in np.asarray(item.image):
        ranks = np.unique(plane, return_inverse=True)[1].reshape(plane.shape)
        if ranks.max() > 0:
            hashes.add(pixels_digest(ranks.astype(np.int64))[:16])
    return hashes


def check_disjoint(fields: Sequence[Field], held_out: Sequence[Field]) -> None:
    """Refuse fields that show the image of a held-out one, whatever their names, types and channels."""
    forbidden = {sha: item for item in held_out for sha in content_hashes(item)}
    for item in fields if forbidden else []:
        for sha in content_hashes(item) & set(forbidden):
            msg = (
                f"Field {item.name!r} has the pixels of the held-out field {forbidden[sha].name!r}: leave it out, or what is "
                "measured is no evidence."
            )
            raise ValueError(msg)
