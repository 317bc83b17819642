"""What every training of a student begins with: fields and settings that are fit for it, and the student itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._fields import STRETCH, Field
from ._segmenter import Segmenter, SegmenterConfig, check_scale

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LEAST_PATCH = 32
_JUDGED_PX = 1024


def listed(fields: Sequence[Field], argument: str) -> list[Field]:
    """Fields as a list; a single one, or something else, is an error."""
    given: Any = fields
    if isinstance(given, Field):
        msg = f"{argument} is a single field: pass a list of them, [{given.name}]."
        raise TypeError(msg)
    found = list(given)
    wrong = [type(item).__name__ for item in found if not isinstance(item, Field)]
    if wrong:
        msg = f"{argument} must be a list of hn.seg.Field, and holds {wrong[0]}."
        raise TypeError(msg)
    return found


def check_fields(
    taught: Sequence[Field],
    labelled: Sequence[Field],
    validation: Sequence[Field],
    channel: str | Sequence[str] | None,
    *,
    patch_px: int,
    n_steps: int,
    batch_size: int,
) -> list[str]:
    """Refuse what would fail, or teach nothing, later on.

    Parameters
    ----------
    taught, labelled, validation
        Fields that a teacher segments, and that are learnt or judged by their labels.
    channel
        What the student sees.
    patch_px, n_steps, batch_size
        Settings.

    Returns
    -------
    The channels.
    """
    check_batches(patch_px, n_steps, batch_size)
    every = [*taught, *labelled, *validation]
    if channel is None:
        if len(every[0].channels) != 1:
            msg = f"Fields have the channels {list(every[0].channels)}: name the student's with channel=."
            raise ValueError(msg)
        channel = every[0].channels[0]
    channels = [channel] if isinstance(channel, str) else list(channel)
    if not channels or len(set(channels)) < len(channels):
        msg = f"channel={channels}: one channel, or several different ones, are needed."
        raise ValueError(msg)
    for item in every:
        item.indices(channels)
        if min(item.shape) < patch_px:
            msg = f"Field {item.name!r} is {item.shape[0]} x {item.shape[1]} px, smaller than a patch: patch_px={patch_px}."
            raise ValueError(msg)
        if item.um_per_px != every[0].um_per_px:
            check_scale(every[0].um_per_px, item.um_per_px, f"field {item.name!r}", most=1.1)
        low, high = item.stretch_limits()[item.indices(channels)].T
        if not (low < high).all():
            item.read(channels)  # says what is wrong with it
    for item in [*labelled, *validation]:
        foreground = (item.read_labels() > 0).mean()
        if foreground in {0, 1}:
            msg = (
                f"Field {item.name!r}: its labels have one class only ({'no' if not foreground else 'all'} foreground)."
            )
            raise ValueError(msg)
    return channels


def check_batches(patch_px: int, n_steps: int, batch_size: int) -> None:
    """Refuse patches that no student can take, and batches that no training can."""
    if patch_px < _LEAST_PATCH or patch_px % _LEAST_PATCH or n_steps < 1 or batch_size < 2:
        msg = (
            f"patch_px={patch_px} must be a multiple of {_LEAST_PATCH}, n_steps={n_steps} at least 1, "
            f"batch_size={batch_size} at least 2."
        )
        raise ValueError(msg)


def check_schedule(
    *,
    lr: float,
    weight_decay: float,
    patience: int,
    checkpoint_every: int,
    seed: int,
    n_views: int = 1,
    labelled_share: float = 0.5,
) -> None:
    """Refuse settings out of range."""
    least = {
        "patience": (patience, 1),
        "checkpoint_every": (checkpoint_every, 1),
        "n_views": (n_views, 1),
        "seed": (seed, 0),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            msg = f"{name}={value} must be at least {lowest}."
            raise ValueError(msg)
    if not 0 < lr < np.inf or not 0 <= weight_decay < np.inf or not 0 <= labelled_share <= 1:
        msg = (
            f"lr={lr} must be positive, weight_decay={weight_decay} 0 or more, labelled_share={labelled_share} 0 to 1."
        )
        raise ValueError(msg)


def start_student(
    student: str | Segmenter,
    channels: list[str],
    um_per_px: float | None,
    *,
    pretrained: bool,
    weights: str | Path | None,
    seed: int,
    teacher: dict[str, str] | None = None,
) -> Segmenter:
    """Make a new student, or a copy of the given one, for it is the caller's.

    Parameters
    ----------
    student
        Name, or student to start from; that keeps its teachers, whose licences may reach it, beside the new one.
    channels, um_per_px
        What it sees.
    pretrained, weights, seed
        Weights of a new one.
    teacher
        Name and licence of the teacher.

    Returns
    -------
    The student.
    """
    if isinstance(student, str):
        config = SegmenterConfig(
            encoder=student, channels=channels, um_per_px=um_per_px, stretch=list(STRETCH), teacher=teacher or {}
        )
        return Segmenter(config, pretrained=pretrained, weights=weights, seed=seed)
    if student.config.channels != channels:
        msg = f"channel={channels}, but the student was trained on {student.config.channels}."
        raise ValueError(msg)
    if list(student.config.stretch) != list(STRETCH):
        msg = (
            f"The student sees values between the percentiles {list(student.config.stretch)}, training those between {list(STRETCH)}: it cannot be "
            "trained on."
        )
        raise ValueError(msg)
    check_scale(student.config.um_per_px, um_per_px, "the fields")
    taught = _both(student.config.teacher, teacher or {})
    copied = Segmenter(SegmenterConfig(**{**vars(student.config), "teacher": taught}))
    copied.module.load_state_dict(student.module.state_dict())
    return copied


def _both(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Names and licences of all teachers that a student has had."""
    if not before or not now:
        return now or before
    return {
        key: before[key] if now[key] in before[key].split("; ") else f"{before[key]}; {now[key]}" for key in now
    }  # fmt: skip


def middle(item: Field) -> Field:
    """Middle of a field that is too large to be segmented at once."""
    height, width = (min(length, _JUDGED_PX) for length in item.shape)
    return item.crop((item.shape[0] - height) // 2, (item.shape[1] - width) // 2, height, width)
