"""Prompts of promptable teachers: boxes of known objects, or a grid of points and what survives of its masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, masks_to_boxes

from histoniche.seg._targets import boxes_of_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from histoniche.seg._fields import Field

Kind = Literal["boxes", "grid", "detector"]


@dataclass(frozen=True)
class Prompts:
    """How a promptable teacher is asked.

    Attributes
    ----------
    kind
        ``"boxes"``: the box of every labelled object, an *oracle*, since it knows where objects are. ``"grid"``: points on a
        grid, of whose masks those are kept that the teacher believes in, are stable, and overlap no better one.
        ``"detector"``: boxes from a function.
    margin
        Px by which boxes are widened.
    spacing
        Px between the points of a grid.
    least_iou, least_stability
        Predicted IoU, and ratio of the areas above a high and a low threshold, that a mask of a grid point needs.
    most_overlap
        IoU of boxes above which the less certain mask of a grid is dropped.
    most_area
        Share of the image above which a mask of a grid is taken for background.
    detector
        Function of the channels (c, y, x) in 0 to 1 that gives boxes (n, 4): left, top, right, bottom in px. Anything else
        is an error when a field is asked.
    detector_version
        Text that changes whenever the detector's boxes would; needed with a detector, for the cache of a teacher's outputs.
    """

    kind: Kind = "boxes"
    margin: float = 0.0
    spacing: int = 16
    least_iou: float = 0.7
    least_stability: float = 0.85
    most_overlap: float = 0.5
    most_area: float = 0.2
    detector: Callable[[np.ndarray], np.ndarray] | None = None
    detector_version: str = ""

    def __post_init__(self) -> None:
        if self.kind not in {"boxes", "grid", "detector"}:
            msg = f"prompts kind={self.kind!r} is unknown: choose 'boxes', 'grid' or 'detector'."
            raise ValueError(msg)
        if (self.kind == "detector") != (self.detector is not None):
            msg = f"prompts kind={self.kind!r} with detector={self.detector}: a detector belongs to kind='detector', and only there."
            raise ValueError(msg)
        if self.detector is not None and not self.detector_version:
            msg = "prompts with a detector need detector_version=, a text that changes whenever its boxes would."
            raise ValueError(msg)
        if self.spacing < 1 or not 0 < self.most_area <= 1:
            msg = f"prompts spacing={self.spacing} must be at least 1, most_area={self.most_area} in (0, 1]."
            raise ValueError(msg)

    @property
    def fingerprint(self) -> str:
        """All that decides the prompts of a field."""
        if self.kind == "boxes":
            return f"boxes margin={self.margin}"
        if self.kind == "detector":
            return f"detector {self.detector_version} margin={self.margin}"
        return f"grid {self.spacing} {self.least_iou} {self.least_stability} {self.most_overlap} {self.most_area}"

    def boxes(self, item: Field, pixels: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) of a field, widened and clipped to it."""
        if self.detector is not None:
            found = self._checked(self.detector(pixels), item)
        else:
            if item.labels is None:
                msg = (
                    f"Field {item.name!r} has no labels, which prompts='boxes' needs: give labels, or ask with "
                    "Prompts('grid') or a detector."
                )
                raise ValueError(msg)
            found = boxes_of_labels(item.read_labels())
        height, width = item.shape
        widened = found + np.array([-1, -1, 1, 1], dtype=np.float32) * self.margin
        return np.clip(widened, 0, (width, height, width, height))

    def _checked(self, boxes: object, item: Field) -> np.ndarray:
        """Boxes of the detector, (n, 4) float32."""
        what = f"The detector {self.detector_version!r} gave field {item.name!r}"
        needed = "boxes (n, 4), left, top, right, bottom in px, are needed"
        try:
            found = np.asarray(boxes, dtype=np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"{what} no array of numbers ({error}); {needed}: return a NumPy array."
            raise ValueError(msg) from error
        if found.shape == (0,):
            return found.reshape(0, 4)
        if found.ndim != 2 or found.shape[1] != 4:
            more = " without scores or classes" if found.ndim == 2 and found.shape[1] > 4 else ""
            msg = f"{what} an array {found.shape}; {needed}: return the corners alone{more}."
            raise ValueError(msg)
        good = np.isfinite(found).all(axis=1) & (found[:, :2] < found[:, 2:]).all(axis=1)
        if not good.all():
            row = int(np.argmin(good))
            msg = (
                f"{what} the box {found[row].tolist()} (row {row}); {needed}, finite, with left < right and top < bottom: leave "
                "out empty boxes, and turn (x, y, width, height) into corners."
            )
            raise ValueError(msg)
        return found

    def points(self, shape: tuple[int, int]) -> np.ndarray:
        """Grid of points (n, 2), x and y in px."""
        # A side that is shorter than half a step still has a point, in its middle.
        axes = [np.arange(min(self.spacing, length) / 2, length, self.spacing, dtype=np.float32) for length in shape]
        y, x = np.meshgrid(*axes, indexing="ij")
        return np.stack([x.ravel(), y.ravel()], axis=1)

    def believed(self, logits: Tensor, iou: Tensor) -> Tensor:
        """Rows of the masks (n, y, x) of a grid that are certain, stable, not empty and not too large."""
        area = (logits > 0).flatten(1).sum(1)
        stability = (logits > 1).flatten(1).sum(1) / (logits > -1).flatten(1).sum(1).clamp(min=1)
        good = (area > 0) & (area <= self.most_area * logits.shape[-2] * logits.shape[-1])
        return torch.nonzero(good & (iou >= self.least_iou) & (stability >= self.least_stability)).flatten()

    def keep(self, logits: Tensor, iou: Tensor) -> Tensor:
        """Rows of the masks of a grid that are believed and overlap no better one, best first.

        Parameters
        ----------
        logits
            (n, y, x) logits of the masks.
        iou
            (n,) predicted IoU.
        """
        rows = self.believed(logits, iou)
        if not len(rows):
            return rows
        boxes = masks_to_boxes(logits[rows] > 0)
        boxes[:, 2:] += 1
        return rows[batched_nms(boxes, iou[rows], torch.zeros_like(rows), self.most_overlap)]


def chunks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive parts of an array."""
    for start in range(0, len(array), size):
        yield array[start : start + size]
