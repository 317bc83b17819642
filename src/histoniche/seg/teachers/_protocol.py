"""What a teacher is: an image in, probability maps out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from histoniche.seg._targets import OUTPUTS, soft_boundary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from histoniche.seg._fields import Field


@dataclass
class Output:
    """What a teacher says of a field.

    Attributes
    ----------
    maps
        (2, y, x) float32: probability of foreground and of boundary.
    features
        Hidden features (c, h, w) by name, where they were asked for.
    """

    maps: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)


@runtime_checkable
class Teacher(Protocol):
    """A frozen model that segments fields.

    Attributes
    ----------
    name
        Name, for records and model cards.
    licence
        Terms of its weights; students inherit the question.
    fingerprint
        Text that changes whenever its outputs would: weights, channels, prompts.
    """

    name: str
    licence: str

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the outputs would."""
        ...

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field."""
        ...


def check_output(output: Output, item: Field, name: str) -> Output:
    """Refuse maps that do not fit the field or are no probabilities."""
    wanted = (len(OUTPUTS), *item.shape)
    maps = np.asarray(output.maps, dtype=np.float32)
    if maps.shape != wanted:
        msg = f"Teacher {name!r} gave maps of the shape {maps.shape} for field {item.name!r}; {wanted} is needed."
        raise ValueError(msg)
    if not (np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1):
        msg = f"Teacher {name!r} gave values outside 0 to 1 for field {item.name!r}: probabilities are needed."
        raise ValueError(msg)
    return Output(maps, output.features)


class CallableTeacher:
    """Any function as a teacher.

    Parameters
    ----------
    function
        Takes channels (c, y, x) float32 in 0 to 1; gives the probability of foreground (y, x), or foreground and
        boundary (2, y, x). Without a boundary, that of the foreground is taken, and objects that touch are one.
    channels
        Channels that it sees, in order.
    name, licence
        For records and model cards.
    fingerprint
        Text that changes whenever its outputs would.
    """

    def __init__(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        channels: Sequence[str],
        *,
        name: str,
        fingerprint: str,
        licence: str = "unknown",
    ) -> None:
        self.function, self.channels, self.name, self.licence = function, tuple(channels), name, licence
        self.fingerprint = f"{name} {fingerprint} {list(self.channels)}"

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field; it has no hidden features to give."""
        if features:
            msg = f"Teacher {self.name!r} is a function, which has no hidden features to give."
            raise ValueError(msg)
        found = np.asarray(self.function(item.read(self.channels)), dtype=np.float32)
        if found.ndim == 2:
            import torch

            found = np.stack([found, soft_boundary(torch.from_numpy(found)).numpy()])
        return check_output(Output(found), item, self.name)
