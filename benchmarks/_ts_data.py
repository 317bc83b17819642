"""Tasks of the task-specific distillation benchmark: fields to train on, and held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _readers import read_xenium_pancreas
from scipy import ndimage

import histoniche as hn
from histoniche import seg

if TYPE_CHECKING:
    from pathlib import Path

    from spatialdata import SpatialData

    from histoniche.seg import Field

PATCH = 128
"""Width in px of a patch."""
VIEWS = {"chase_db1": 4, "bbbc038": 2, "pancreas_ducts": 1}
"""Patches of each field that a teacher shows to students."""
N_LABELLED = {"chase_db1": (2, 4, 8), "bbbc038": (4, 16, 40), "pancreas_ducts": (4, 16)}
"""Numbers of labelled fields."""
DUCTAL = ("EPCAM", "KRT7", "CFTR", "EHF")
BANDS = {"train": (0.0, 0.55), "validation": (0.58, 0.70), "test": (0.73, 1.0)}
"""Parts of the height of the pancreas."""


@dataclass
class Task:
    """One task.

    Attributes
    ----------
    channels
        What teacher and student see.
    fields
        Fields of which a run labels some; of the others it uses the images.
    held_out
        ``"validation"``, to choose settings on, and ``"test"``.
    n_labelled
        Numbers of labelled fields.
    n_views
        Patches of each field that a teacher shows to students.
    """

    channels: list[str]
    fields: list[Field]
    held_out: dict[str, list[Field]]
    n_labelled: tuple[int, ...]
    n_views: int


def halved(item: Field) -> Field:
    """Field at half its resolution: mean of 2 x 2 px, foreground where half of them are."""
    y, x = (length // 2 for length in item.shape)
    image = np.asarray(item.image)[:, : 2 * y, : 2 * x].reshape(-1, y, 2, x, 2).mean(axis=(2, 4))
    labels = item.read_labels()[: 2 * y, : 2 * x].reshape(y, 2, x, 2).mean(axis=(1, 3)) >= 0.5
    um = None if item.um_per_px is None else 2 * item.um_per_px
    return seg.Field(item.name, image.round().astype(np.uint8), item.channels, labels.astype(np.int32), um)


def chase_db1(data: Path) -> Task:
    """Retinal vessels of CHASE-DB1, first observer; children 1 to 8 teach, 9 and 10 validate, 11 to 14 test.

    At full resolution: at half of it most vessels are 1 to 3 px wide, and a Transformer over cells of 16 px hardly learns them
    (2 labels, 300 steps from random weights, Dice on validation images: 0.242, at full resolution 0.508).
    """
    every = seg.read_chase_db1(data / "chase_db1")
    parts = {"train": range(1, 9), "validation": range(9, 11), "test": range(11, 15)}
    train, validation, test = (
        [item for item in every if int(item.name[:2]) in children] for children in parts.values()
    )
    return Task(
        ["red", "green", "blue"],
        train,
        {"validation": validation, "test": test},
        N_LABELLED["chase_db1"],
        VIEWS["chase_db1"],
    )


def bbbc038(data: Path) -> Task:
    """Nuclei of BBBC038, all kinds of images as grey, split by image; one square of 256 px of each."""
    every = seg.read_bbbc038(data / "bbbc038" / "stage1_train.zip", kinds=("fluorescence", "brightfield", "histology"))
    images = [item for item in every if min(item.shape) >= 2 * PATCH]
    rng = np.random.default_rng(38)
    images = [images[row] for row in rng.permutation(len(images))]
    squares = [
        item.crop(*(int(rng.integers(length - 2 * PATCH + 1)) for length in item.shape), 2 * PATCH, 2 * PATCH)
        for item in images
    ]
    fields = [item for item in squares[52:] if len(np.unique(item.read_labels())) > 3][:48]
    return Task(
        ["DNA"], fields, {"test": squares[:24], "validation": squares[24:36]}, N_LABELLED["bbbc038"], VIEWS["bbbc038"]
    )


def pancreas_ducts(data: Path) -> Task:
    """Ductal epithelium (normal and tumour) of the Xenium pancreas on VIRTUAL H&E at 0.85 um/px, split by parts of its height.

    A cell is ductal where its vendor's cluster is among those with the highest mean of four marker genes; the structure is
    the union of these cells' outlines, gaps below 5 um closed.
    """
    sdata = read_xenium_pancreas(data / "xenium_pancreas", shapes=True)
    ductal = _ductal_cells(sdata)
    polygons = sdata["cell_boundaries"]
    xy = np.asarray(sdata["table"].obsm["spatial"])
    hn.pp.virtual_he(sdata, image_key="morphology", key_added="he")
    sdata["ducts"] = polygons[ductal]
    (whole,) = seg.fields_from_sdata(sdata, image_key="he")
    um = whole.um_per_px or 1.0

    def take(part: str, n: int, width: int, seed: int) -> list[Field]:
        """Squares around cells drawn at random from a part, a tenth to nine tenths of whose cells are ductal."""
        low, high = (edge * whole.shape[0] * um for edge in BANDS[part])
        half, right = width * um, whole.shape[1] * um
        inside = (xy[:, 1] > low + half) & (xy[:, 1] < high - half) & (xy[:, 0] > half) & (xy[:, 0] < right - half)
        rng = np.random.default_rng(seed)
        regions: list[tuple[float, ...]] = []
        while len(regions) < n:
            x, y = np.round(xy[rng.choice(np.flatnonzero(inside))] / um - width).astype(int)
            region = (x * um, y * um, (x + 2 * width) * um, (y + 2 * width) * um)
            here = ((xy >= region[:2]) & (xy < region[2:])).all(axis=1)
            if 0.1 < ductal[here].mean() < 0.9:
                regions.append(region)
        found = []
        for item in seg.fields_from_sdata(sdata, image_key="he", shapes_key="ducts", regions=regions):
            closed = ndimage.binary_closing(np.pad(item.read_labels() > 0, 12), iterations=6)[12:-12, 12:-12]
            found.append(halved(replace(item, image=np.asarray(item.image), labels=closed.astype(np.int32))))
        return found

    held_out = {"test": take("test", 16, 256, 3), "validation": take("validation", 8, 256, 2)}
    return Task(
        list(whole.channels),
        take("train", 48, PATCH, 1),
        held_out,
        N_LABELLED["pancreas_ducts"],
        VIEWS["pancreas_ducts"],
    )


def _ductal_cells(sdata: SpatialData) -> np.ndarray:
    """Which cells belong to the clusters that express the markers most: half as much as the highest cluster, or more."""
    table = sdata["table"]
    counts = np.asarray(table[:, list(DUCTAL)].X.sum(axis=1)).ravel()
    clusters = table.obs["graph_cluster"]
    means = pd.Series(counts).groupby(clusters.to_numpy(), observed=True).mean()
    chosen = means.index[means >= means.max() / 2]
    return clusters.isin(chosen).to_numpy()


TASKS = {"chase_db1": chase_db1, "bbbc038": bbbc038, "pancreas_ducts": pancreas_ducts}
