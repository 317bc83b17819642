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
_LARGEST = np.iinfo(np.int32).max


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
        (c, 2) float: values that become 0 and 1. By default the percentiles 1 and 99.8 of each channel of this image, where
        it is large of a grid of about 4 million of its pixels.
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
        if (
            isinstance(self.channels, str)
            or len(self.channels) != self.image.shape[0]
            or len(set(self.channels)) != len(self.channels)
        ):
            named = repr(self.channels) if isinstance(self.channels, str) else list(self.channels)
            msg = (
                f"Field {self.name!r}: {self.image.shape[0]} channels are named {named}; each needs a name of its "
                "own, in a tuple."
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

    def stretch_limits(self, percentiles: Sequence[float] = STRETCH) -> np.ndarray:
        """(c, 2) values of each channel that become 0 and 1; constant channels are an error when they are read."""
        if self.limits is not None:
            return self.limits
        return percentile_limits(grid_of_pixels(self.image), percentiles)

    def read(self, channels: Sequence[str], *, percentiles: Sequence[float] = STRETCH) -> np.ndarray:
        """Channels of the whole field, (len(channels), y, x) float32, stretched to 0 to 1: by limits if it has some, else percentiles.

        Raises
        ------
        KeyError
            No such channel.
        ValueError
            A channel that is constant (empty or saturated) or nearly so, or has values that are not finite.
        """
        rows = self.indices(channels)
        limits = self.stretch_limits(percentiles)[rows]
        pixels = np.stack([np.asarray(self.image[row]) for row in rows]).astype(np.float32)
        for name, plane, edges in zip(channels, pixels, limits, strict=True):
            check_stretch(
                plane, edges, percentiles=percentiles, what=f"Field {self.name!r}: channel {name!r}",
                leave="Leave the field out, or choose another channel", limit="give Field(limits=...)",
            )  # fmt: skip
        return stretch(pixels, limits)

    def read_labels(self) -> np.ndarray:
        """Labels in memory, (y, x) int32; an error where there are none, or numbers that are none of int32."""
        if self.labels is None:
            msg = f"Field {self.name!r} has no labels: give Field(labels=...), or leave it out where labels are needed."
            raise ValueError(msg)
        return checked_int32(np.asarray(self.labels), f"Field {self.name!r}: the label image")


def grid_of_pixels(image: Any) -> np.ndarray:
    """Pixels (c, y, x) of an image, lazy or not, about 4 million a channel; of all channels at once: they share chunks."""
    step = max(1, int(np.sqrt(np.prod(image.shape[1:]) / _STRETCH_PIXELS)))
    return np.asarray(image[:, ::step, ::step])


def percentile_limits(pixels: np.ndarray, percentiles: Sequence[float] = STRETCH) -> np.ndarray:
    """Values of channels (c, y, x) that become 0 and 1, (c, 2) float32."""
    return np.stack([np.percentile(plane, percentiles).astype(np.float32) for plane in pixels])


def check_stretch(
    plane: np.ndarray,
    limits: np.ndarray,
    *,
    percentiles: Sequence[float],
    what: str,
    leave: str,
    limit: str | None = None,
) -> None:
    """Refuse a channel that cannot be stretched, and say why.

    Parameters
    ----------
    plane
        Pixels.
    limits
        (2,) values that become 0 and 1.
    percentiles
        What the limits are, of the whole image.
    what
        The channel, for the error.
    leave, limit
        What to do without the channel, and, where that can be done, how other limits are given.
    """
    if not np.isfinite(plane).all():
        msg = f"{what} has values that are not finite. {leave}."
        raise ValueError(msg)
    low, high = limits
    if not np.isfinite(limits).all():
        msg = (
            f"{what} has values that are not finite elsewhere in the image, so its limits are {low:g} and {high:g}. {leave}"
            f"{'' if limit is None else f', or {limit}'}."
        )
        raise ValueError(msg)
    if low < high:
        return
    first, last = percentiles
    both = f"its percentiles {first:g} and {last:g} are both {low:g}"
    if plane.min() == plane.max():
        msg = f"{what} is constant ({both}): it is empty or saturated. {leave}."
    else:
        msg = (
            f"{what} has the same value in more than {last - first:g} % of its pixels ({both}), too many to be stretched. Crop "
            f"the image to the tissue{'' if limit is None else f', or {limit}'}."
        )
    raise ValueError(msg)


def checked_int32(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels as int32; numbers that a cast alone would turn into others are an error."""
    if labels.size and (labels.min() < 0 or labels.max() > _LARGEST):
        msg = f"{what} has numbers from {labels.min()} to {labels.max()}; 0 to {_LARGEST} is needed: relabel them."
        raise ValueError(msg)
    return labels.astype(np.int32)


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
