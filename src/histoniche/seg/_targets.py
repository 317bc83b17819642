"""What a student learns to predict: where objects are, and where one ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

OUTPUTS = ("foreground", "boundary")
"""Probability maps of teachers and students, in this order."""


def soft_boundary(mask: Tensor) -> Tensor:
    """Soft morphological gradient of masks (..., y, x): the largest minus the smallest value among 3 x 3 pixels.

    For a mask of 0 and 1 it is 1 on the pixels on both sides of the edge. Beyond the image, the mask goes on as it ends.
    """
    flat = F.pad(mask.reshape(-1, 1, *mask.shape[-2:]), (1, 1, 1, 1), mode="replicate")
    high, low = F.max_pool2d(flat, 3, stride=1), -F.max_pool2d(-flat, 3, stride=1)
    return (high - low).reshape(mask.shape)


def maps_of_masks(masks: Iterable[Tensor], shape: tuple[int, int]) -> np.ndarray:
    """Foreground and boundary of soft masks, one an object.

    Both are maxima over the objects, each with a boundary of its own, so that objects that touch stay apart.

    Parameters
    ----------
    masks
        Batches (n, y, x) of probabilities.
    shape
        Height and width.

    Returns
    -------
    (2, y, x) float32: foreground and boundary, both 0 without objects.
    """
    maps = torch.zeros(2, *shape)
    for batch in masks:
        if len(batch):
            found = torch.stack([batch.amax(0), soft_boundary(batch).amax(0)]).float().cpu()
            maps = torch.maximum(maps, found)
    return maps.numpy()


def maps_of_labels(labels: np.ndarray) -> np.ndarray:
    """Foreground and boundary of labels: the target of a student that learns from them.

    Parameters
    ----------
    labels
        (y, x) integers, 0 being background.

    Returns
    -------
    (2, y, x) float32, 0 or 1: foreground, and pixels within 3 x 3 of which another object, or the background, begins. Objects
    that touch each have a boundary.
    """
    window = {"size": 3, "mode": "nearest"}
    edges = ndimage.maximum_filter(labels, **window) != ndimage.minimum_filter(labels, **window)
    return np.stack([labels > 0, edges]).astype(np.float32)


def boxes_of_labels(labels: np.ndarray) -> np.ndarray:
    """Boxes of the objects, (n, 4) float32: left, top, right, bottom edge in px, in the order of their numbers."""
    found = [(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(labels) if s is not None]
    return np.array(found, dtype=np.float32).reshape(-1, 4)
