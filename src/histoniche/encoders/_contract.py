"""The feature contract: everything that decides what an embedding means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ._load import Encoder


def feature_contract(encoder: Encoder, mode: str, um_per_px: float) -> dict[str, Any]:
    """How features are made, as plain values that JSON and zarr can hold.

    Parameters
    ----------
    encoder
        The loaded encoder.
    mode
        ``"crop"`` or ``"dense"``.
    um_per_px
        Resolution at which the encoder sees the tissue.

    Returns
    -------
    Contract: encoder, revision, mode, pooling, um/px, normalisation, and the field of view in um of a crop or the tile
    and margin in px of dense mode; the number of symmetries where it is not 1.
    """
    from ._dense import dense_geometry

    spec = encoder.spec
    contract: dict[str, Any] = {
        "encoder": spec.name,
        "revision": encoder.revision,
        "mode": mode,
        "um_per_px": float(um_per_px),
        "mean": [float(v) for v in spec.mean],
        "std": [float(v) for v in spec.std],
    }
    if encoder.symmetries > 1:  # a model whose contract does not speak of them was made of the image alone
        contract["symmetries"] = encoder.symmetries
    if mode == "crop":
        return {**contract, "pooling": "pooled", "field_of_view_um": float(spec.input_px * um_per_px)}
    tile, margin = dense_geometry(encoder)
    pooling = "patch tokens" if encoder.is_vit else "bilinear, strides " + ", ".join(str(s) for s in spec.dense_strides)
    return {**contract, "pooling": pooling, "tile_px": tile, "margin_px": margin}


def contract_difference(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the fields in which two contracts differ.

    Parameters
    ----------
    wanted, found
        The contracts.

    Returns
    -------
    Sorted names; empty where they agree. Numbers agree to six digits.
    """
    names = sorted(set(wanted) | set(found))
    return [name for name in names if not (name in wanted and name in found and _same(wanted[name], found[name]))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple | np.ndarray) and isinstance(b, list | tuple | np.ndarray):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float | np.number) and isinstance(b, int | float | np.number):
        return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-12)
    return bool(a == b)
