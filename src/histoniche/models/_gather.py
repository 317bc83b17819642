"""Rows of features gathered and converted to float32 in one go, without the GIL."""

from __future__ import annotations

import numba
import numpy as np

_KNOWN = {np.dtype(np.float16): np.uint16, np.dtype(np.float32): np.float32, np.dtype(np.float64): np.float64}


def gather_into(features: np.ndarray, rows: np.ndarray, out: np.ndarray, column: int) -> None:
    """Write rows (m,) of features (n, d) to ``out`` (m, >= d), float32, from a column on.

    NumPy takes and converts in two passes over a copy, and its conversion from float16 is slow: the gather alone would
    take a tenth of the time of a training step.
    """
    kind = _KNOWN.get(features.dtype)
    if kind is None or not features.flags.c_contiguous:
        out[:, column : column + features.shape[1]] = features[rows]
        return
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(features):
        msg = f"rows {rows.min()} to {rows.max()} do not lie in features of {len(features)} cells."
        raise IndexError(msg)
    if kind is np.uint16:
        _gather_half(features.view(np.uint16), rows, out, column)
    else:
        _gather(features, rows, out, column)


@numba.njit(nogil=True, cache=True)
def _gather(features, rows, out, column):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        row = rows[i]
        for c in range(features.shape[1]):
            out[i, column + c] = features[row, c]


@numba.njit(nogil=True, cache=True)
def _gather_half(halves, rows, out, column):  # type: ignore[no-untyped-def]
    """Float16 by its bits, since numba has no such type on a CPU.

    Sign and the rest move to their places in a float32, whose exponent counts from 127 and not from 15: the product with
    2 ** 112 corrects that, for the smallest numbers too. Infinity and NaN get the largest exponent first.
    """
    scale = np.float32(2.0**112)
    out_bits = out.view(np.uint32)
    d = halves.shape[1]
    for i in range(len(rows)):
        row, bits, numbers = halves[rows[i]], out_bits[i, column : column + d], out[i, column : column + d]
        for c in range(d):
            half = np.uint32(row[c])
            moved = ((half & np.uint32(0x8000)) << np.uint32(16)) | ((half & np.uint32(0x7FFF)) << np.uint32(13))
            special = np.uint32(0x7F800000) if (half & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
            bits[c] = moved | special
        for c in range(d):  # a loop of its own, so that both are vectorised
            numbers[c] *= scale
