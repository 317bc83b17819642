"""A field: one image of any number of channels, with the labels of its objects where they are known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STRETCH = (1.0, 99.8)
"""Percentiles of a channel that become 0 and 1."""
_STRETCH_PIXELS = 4_000_000


@dataclass(frozen=True)
class Field:
    """One image, with the labels of its objects where they are known.

    Attributes
    ----------
    name
        Name, unique in a data set; named by errors and in caches.
    image
        (c, y, x) array of a real type, lazy (dask, zarr) or in memory; read window by window.
    channels
        Names of the channels, in the order of ``image``.
    labels
        (y, x) integer array, lazy or in memory: 0 is background, every object has a number of its own. ``None`` where
        objects are unknown.
    um_per_px
        Size of a pixel in um; ``None`` where it is unknown.
    limits
        (c, 2) float: values that become 0 and 1. By default the percentiles 1 and 99.8 of each channel of this image.
    region
        (y, x) bool array, the part of the image that was annotated (a fundus camera's field of view); what lies outside
        is not measured. ``None``: all of it.
    """

    name: str
    image: Any = field(repr=False)
    channels: tuple[str, ...]
    labels: Any | None = field(default=None, repr=False)
    um_per_px: float | None = None
    limits: np.ndarray | None = field(default=None, repr=False)
    region: Any | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or 0 in self.image.shape:
            msg = f"Field {self.name!r}: the image has the shape {self.image.shape}; (c, y, x), none of them 0, is needed."
            raise ValueError(msg)
        if len(self.channels) != self.image.shape[0] or len(set(self.channels)) != len(self.channels):
            msg = (
                f"Field {self.name!r}: {self.image.shape[0]} channels are named {list(self.channels)}; each needs a name "
                "of its own."
            )
            raise ValueError(msg)
        if not (np.issubdtype(self.image.dtype, np.number) and not np.issubdtype(self.image.dtype, np.complexfloating)):
            msg = f"Field {self.name!r}: the image has the type {self.image.dtype}; integers or floats are needed."
            raise TypeError(msg)
        if self.um_per_px is not None and not 0 < self.um_per_px < np.inf:
            msg = f"Field {self.name!r}: um_per_px={self.um_per_px} must be positive."
            raise ValueError(msg)
        if self.labels is not None:
            self._check_labels(self.labels)
        if self.region is not None and (self.region.shape != self.image.shape[1:] or self.region.dtype != bool):
            msg = (
                f"Field {self.name!r}: the region is {self.region.shape} {self.region.dtype}; {self.image.shape[1:]} bool, "
                "as the image, is needed."
            )
            raise ValueError(msg)

    def _check_labels(self, labels: Any) -> None:
        if not np.issubdtype(labels.dtype, np.integer):
            msg = (
                f"Field {self.name!r}: the labels have the type {labels.dtype}; integers, one number an object, are "
                "needed (of a mask of 0 and 1, `skimage.measure.label` makes them)."
            )
            raise TypeError(msg)
        if labels.shape != self.image.shape[1:]:
            msg = f"Field {self.name!r}: labels {labels.shape} do not match the image {self.image.shape[1:]} (y, x)."
            raise ValueError(msg)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in px."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    def crop(self, y: int, x: int, height: int, width: int) -> Field:
        """Part of the field, not read yet; its values are stretched as those of the whole."""
        window = slice(y, y + height), slice(x, x + width)
        labels, region = (None if part is None else part[window] for part in (self.labels, self.region))
        return replace(
            self, name=f"{self.name}[{y}:{y + height},{x}:{x + width}]", image=self.image[(slice(None), *window)],
            labels=labels, limits=self.stretch_limits(), region=region,
        )  # fmt: skip

    def without_labels(self) -> Field:
        """The same image as if nobody had annotated it."""
        return replace(self, labels=None)

    def indices(self, channels: Sequence[str]) -> list[int]:
        """Places of channels in the image; an error that lists what there is where one is missing."""
        missing = [name for name in channels if name not in self.channels]
        if missing:
            msg = f"Field {self.name!r} has no channel {missing[0]!r}; it has {list(self.channels)}."
            raise KeyError(msg)
        return [self.channels.index(name) for name in channels]

    def stretch_limits(self) -> np.ndarray:
        """(c, 2) values of each channel that become 0 and 1; constant channels are an error when they are read."""
        if self.limits is not None:
            return self.limits
        step = max(1, int(np.sqrt(np.prod(self.shape) / _STRETCH_PIXELS)))
        return np.stack([percentile_limits(np.asarray(plane[::step, ::step])) for plane in self.image])

    def read(self, channels: Sequence[str]) -> np.ndarray:
        """Channels of the whole field, (len(channels), y, x) float32, stretched to 0 to 1.

        Raises
        ------
        KeyError
            No such channel.
        ValueError
            A channel that is constant (empty or saturated), or has values that are not finite.
        """
        rows = self.indices(channels)
        limits = self.stretch_limits()[rows]
        pixels = np.stack([np.asarray(self.image[row]) for row in rows]).astype(np.float32)
        for name, plane, (low, high) in zip(channels, pixels, limits, strict=True):
            if not np.isfinite(plane).all():
                msg = f"Field {self.name!r}: channel {name!r} has values that are not finite."
                raise ValueError(msg)
            if not low < high:
                msg = (
                    f"Field {self.name!r}: channel {name!r} is constant (its percentiles {STRETCH[0]} and {STRETCH[1]} are "
                    f"both {low:g}): it is empty or saturated. Leave the field out, or choose another channel."
                )
                raise ValueError(msg)
        return stretch(pixels, limits)

    def read_labels(self) -> np.ndarray:
        """Labels in memory, (y, x) int32; an error where there are none."""
        if self.labels is None:
            msg = f"Field {self.name!r} has no labels."
            raise ValueError(msg)
        return np.asarray(self.labels).astype(np.int32)


def percentile_limits(plane: np.ndarray) -> np.ndarray:
    """Values of a channel that become 0 and 1, (2,) float32."""
    return np.percentile(plane, STRETCH).astype(np.float32)


def stretch(pixels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Scale channels (c, y, x) linearly so that their limits (c, 2) become 0 and 1, and clip; float32."""
    low, high = (limits[:, side, None, None].astype(np.float32) for side in (0, 1))
    return np.clip((pixels.astype(np.float32) - low) / np.maximum(high - low, 1e-12), 0, 1)


def patches(fields: Sequence[Field], size: int, *, step: int | None = None) -> Iterator[Field]:
    """Cut fields into square patches, row by row, without reading them.

    Parameters
    ----------
    fields
        Fields of any size.
    size
        Width of a patch in px. A field that is smaller stays whole; the last patch of a row or column is moved back so
        that it fits.
    step
        Px from patch to patch; ``size`` by default.

    Yields
    ------
    Patches, fields themselves.
    """
    step = step or size
    if size < 1 or step < 1:
        msg = f"size={size} and step={step} must be at least 1."
        raise ValueError(msg)
    for item in fields:
        height, width = item.shape
        if height <= size and width <= size:
            yield item
            continue
        limited = replace(item, limits=item.stretch_limits())
        for y in _starts(height, size, step):
            for x in _starts(width, size, step):
                yield limited.crop(y, x, min(size, height), min(size, width))


def _starts(length: int, size: int, step: int) -> list[int]:
    if length <= size:
        return [0]
    return sorted({*range(0, length - size, step), length - size})


def pixels_digest(image: np.ndarray) -> str:
    """SHA-256 of shape and pixels of an image."""
    sha = hashlib.sha256(f"{image.dtype} {image.shape}\n".encode())
    sha.update(np.ascontiguousarray(image).tobytes())
    return sha.hexdigest()
