"""What a student's hidden layers are compared with: views of fields, seen by the teacher once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histoniche._random import isolated_rng

from ._augment import turned_patch
from ._fields import Field
from ._fit import Alignment
from ._losses import HiddenAlignment
from ._students import hidden_layers
from .teachers._cache import teach_hidden

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from ._segmenter import Segmenter


def views(fields: Sequence[Field], *, channels: Sequence[str], n_views: int, patch_px: int, seed: int) -> list[Field]:
    """Cut fields into patches, turned and scaled, each a field of its own.

    Features cannot be turned or scaled as pixels can; so what a teacher's hidden layers say is learnt on patches that are
    drawn beforehand, and later only mirrored, turned by quarters and lit differently.

    Parameters
    ----------
    fields
        Fields.
    channels
        Channels to keep.
    n_views
        Patches of each field.
    patch_px
        Their width in px.
    seed
        Decides all that is random.

    Returns
    -------
    ``n_views`` fields for each, without labels, float32 in 0 to 1.
    """
    limits = np.tile(np.array([0.0, 1.0], dtype=np.float32), (len(channels), 1))
    found = []
    for row, item in enumerate(fields):
        pixels = item.read(channels)
        for view in range(n_views):
            patch = turned_patch(pixels, patch_px, np.random.default_rng([seed, 6, row, view])).clamp(0, 1)
            found.append(Field(f"{item.name}:{view}", patch.numpy(), tuple(channels), None, item.um_per_px, limits))
    return found


def align(
    segmenter: Segmenter,
    fields: Sequence[Field],
    teacher: Any,
    *,
    layers: Mapping[int, str] | None,
    maps: bool,
    n_views: int,
    patch_px: int,
    cache: str | Path | None,
    seed: int,
) -> tuple[list[Field], list[np.ndarray], list[list[np.ndarray]], Alignment]:
    """Ask a teacher for maps and hidden features of views.

    Parameters
    ----------
    segmenter
        The student.
    fields
        Fields.
    teacher
        Teacher with hidden features.
    layers
        Which of the student's layers are compared with which of the teacher's, by name; by default all of them with blocks
        of the teacher that are spread evenly, the last with the last.
    maps
        Whether maps are asked for too.
    n_views, patch_px, seed
        See :func:`views`.
    cache
        Directory of the teacher's outputs.

    Returns
    -------
    Views, their maps (2, y, x), their hidden features (c, h, w) float16 by layer, and the comparison.

    Raises
    ------
    ValueError
        Layers that the student or the teacher does not have; grids that do not match.
    """
    channels = list(dict.fromkeys([*segmenter.config.channels, *filter(None, getattr(teacher, "channels", ()))]))
    cut = views(fields, channels=channels, n_views=n_views, patch_px=patch_px, seed=seed)
    mine, pairs, grids = _matched(segmenter, teacher, layers, patch_px)
    asked = teach_hidden(cut, teacher=teacher, layers=grids, maps=maps, cache=cache)
    # They are most of the memory, and have been rounded to float16 anyway.
    hidden = [[output[name].astype(np.float16) for name in pairs.values()] for output in asked]
    nothing = np.zeros((2, patch_px, patch_px), dtype=np.float32)
    with isolated_rng(seed):
        distance = HiddenAlignment([mine[layer][0] for layer in pairs], [len(layer) for layer in hidden[0]])
    return cut, [output.get("maps", nothing) for output in asked], hidden, Alignment(list(pairs), distance)


def check_alignment(segmenter: Segmenter, teacher: Any, *, layers: Mapping[int, str] | None, patch_px: int) -> None:
    """Refuse what :func:`align` would, for the price of one patch: layers that are missing, grids that do not match."""
    *_, grids = _matched(segmenter, teacher, layers, patch_px)
    channels = list(dict.fromkeys(filter(None, getattr(teacher, "channels", ())))) or segmenter.config.channels
    limits = np.tile(np.array([0.0, 1.0], dtype=np.float32), (len(channels), 1))
    patch = np.zeros((len(channels), patch_px, patch_px), dtype=np.float32)
    blank = Field("a patch", patch, tuple(channels), None, segmenter.config.um_per_px, limits)
    teach_hidden([blank], teacher=teacher, layers=grids, maps=False)


def _matched(
    segmenter: Segmenter, teacher: Any, layers: Mapping[int, str] | None, patch_px: int
) -> tuple[list[tuple[int, tuple[int, int]]], dict[int, str], dict[str, tuple[int, int]]]:
    """Width and grid of the student's layers, which of the teacher's each is compared with, and on which grid."""
    mine = _layers_of(segmenter.module, len(segmenter.config.channels), patch_px)
    pairs = _pairs(len(mine), teacher) if layers is None else dict(layers)
    unknown = [layer for layer in pairs if not 0 <= layer < len(mine)]
    if unknown or not pairs or len(set(pairs.values())) < len(pairs):
        msg = f"layers={pairs}: the student has the layers 0 to {len(mine) - 1}, each for another of the teacher's."
        raise ValueError(msg)
    return mine, pairs, {name: mine[layer][1] for layer, name in pairs.items()}


def _layers_of(module: nn.Module, n_channels: int, patch_px: int) -> list[tuple[int, tuple[int, int]]]:
    """Width and grid of each layer of a student, for patches of a width."""
    with torch.inference_mode():
        found = hidden_layers(module.eval().encoder(torch.zeros(1, n_channels, patch_px, patch_px)))
    return [(int(layer.shape[1]), (int(layer.shape[2]), int(layer.shape[3]))) for layer in found]


def _pairs(n: int, teacher: Any) -> dict[int, str]:
    """The teacher's blocks, spread evenly over the student's layers."""
    base = getattr(teacher, "base", teacher)
    n_blocks = len(base.blocks()) if hasattr(base, "blocks") else 0
    if n_blocks < n:
        msg = (
            f"Teacher {teacher.name!r} has {n_blocks} blocks with hidden features for {n} layers of the student: say with "
            "layers= which are compared, or leave the term 'hidden' out."
        )
        raise ValueError(msg)
    return {layer: f"block{round((layer + 1) * n_blocks / n) - 1}" for layer in range(n)}
