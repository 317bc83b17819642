"""Segmentations beside the image and the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.ndimage import find_objects
from skimage.measure import find_contours

from ._shared import draw_scale_bar, finish, nice_length

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from histoniche.seg import Field

_TRUTH = "truth"
# Of Okabe and Ito's colours, two that are told apart with any vision, and from grey.
AGREEMENT, MISSED, EXTRA = "#C4C4C4", "#D55E00", "#0072B2"
_COLORS_OF_CHANNELS = {1: ("white",), 2: ("magenta", "lime"), 3: ("red", "lime", "blue")}
_PANEL = 2.6
"""Width of a panel in inches."""
_NAME_LENGTH = 32
"""Characters of a name that fit beside a panel."""


@dataclass(frozen=True)
class _Row:
    """What is shown of a field: its pixels (y, x) or (y, x, 3), and its segmentations by name."""

    field: Field
    pixels: np.ndarray
    labels: dict[str, np.ndarray]

    @property
    def unit(self) -> float:
        """Size of a pixel in um, or 1 where it is unknown."""
        return self.field.um_per_px or 1.0


def segmentation(
    data: Field | Sequence[Field],
    *,
    segmentations: Mapping[str, Any],
    truth: str | None = None,
    differences: str | Literal[False] | None = None,
    channels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    outline_color: str = "#F0E442",
    linewidth: float = 0.8,
    scale_bar: bool = True,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Plot fields with the outlines of segmented objects, one row per field, and where one of them differs from the truth.

    The panels of a row are the image, the image with the outlines of each segmentation, and the pixels on which one
    segmentation and the truth agree, which it missed, and which it has in excess. In the last panel objects of the truth are
    outlined that no object of the segmentation matches with an IoU above 0.5: touching cells that were merged show there
    although their pixels agree.

    Parameters
    ----------
    data
        Field, or fields, one per row. Fields are read whole: show a part of a large one with ``Field.crop``. (Of a
        SpatialData object, fields are read first.)
    segmentations
        Label images (y, x) of integers by name, in the order of the panels: of one field an array, of several a sequence
        with an array for each.
    truth
        Name of the segmentation that is the truth. By default ``"truth"``, if there is one of that name, and else the
        labels of the fields, which become the last segmentation.
    differences
        Name of the segmentation that is compared with the truth; by default the last one that is not the truth. ``False``:
        no such panel.
    channels
        Names of at most three channels to show: one in grey, two in magenta and green, three in red, green and blue. By
        default the first three of the first field.
    titles
        Titles of all panels of a row, instead of the names of the segmentations.
    outline_color
        Colour of the outlines.
    linewidth
        Width of the outlines in points.
    scale_bar
        Whether to draw a scale bar below the image of each row; fields without ``um_per_px`` have none.
    figsize
        Size of the figure in inches.
    save
        File to save the figure to, which is then closed.

    Returns
    -------
    The figure; axes are in um, or in px for fields without ``um_per_px``. Nothing is written to ``data``.

    Raises
    ------
    KeyError
        A channel, or the segmentation that ``truth`` or ``differences`` names, is missing.
    ValueError
        No field or segmentation, more than three channels, a segmentation that does not match its field or is not there
        for each, a constant channel, some fields with labels and some without, a wrong number of titles.
    TypeError
        Not a field; labels that are no integers.
    """
    fields = _fields(data)
    shown = _channels(fields, channels)
    labels = _labels(fields, segmentations)
    truth = _add_truth(fields, labels, truth)
    compared = _compared(list(labels), truth, differences)
    panels = ["image", *labels, *([f"{compared}: differences"] if compared else [])]
    if titles is not None and len(titles) != len(panels):
        msg = f"titles has {len(titles)} names for the {len(panels)} panels {panels}."
        raise ValueError(msg)
    rows = [
        _Row(field, _pixels(field.read(shown)), {name: images[i] for name, images in labels.items()})
        for i, field in enumerate(fields)
    ]
    figure, axes = _axes(rows, len(panels), figsize, legend=bool(compared))
    for line, row in zip(axes, rows, strict=True):
        for ax in line:
            _frame(ax, row)
        for ax in line[: 1 + len(labels)]:
            _draw_image(ax, row)
        _name_channels(line[0], shown)
        for ax, (name, image) in zip(line[1:], row.labels.items(), strict=False):
            _outline(ax, image, row.unit, color=outline_color, linewidth=linewidth, gid=f"outlines-{name}")
        if compared and truth:
            _draw_differences(line[-1], row, row.labels[compared], row.labels[truth])
        if scale_bar and row.field.um_per_px is not None:
            draw_scale_bar(line[0], nice_length(row.field.shape[1] * row.unit))
        if len(rows) > 1:
            line[0].set_ylabel(_short(row.field.name), fontsize=9)
    for ax, title in zip(axes[0], titles if titles is not None else panels, strict=True):
        ax.set_title(title, fontsize=10)
    if compared:
        figure.legend(handles=_handles(), loc="outside right center", frameon=False, fontsize=8)
    return finish(figure, save)


# --------------------------------------------------------------------------------------------------------------- input
def _fields(data: Any) -> list[Field]:
    from histoniche.seg import Field  # loads torch, which other plots do without

    if isinstance(data, Field):
        return [data]
    if not isinstance(data, Sequence) or not all(isinstance(item, Field) for item in data):
        msg = f"data is a {type(data).__name__}; a histoniche.seg.Field or a sequence of them is needed."
        raise TypeError(msg)
    if not data:
        msg = "data has no field: there is nothing to plot."
        raise ValueError(msg)
    return list(data)


def _channels(fields: list[Field], channels: Sequence[str] | None) -> list[str]:
    if isinstance(channels, str):
        channels = [channels]
    names = list(channels) if channels is not None else list(fields[0].channels[:3])
    if not 1 <= len(names) <= 3:
        msg = f"channels has {len(names)} names, {names}; one to three can be shown."
        raise ValueError(msg)
    for field in fields:
        field.indices(names)
    return names


def _labels(fields: list[Field], segmentations: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """Label images of each segmentation, one per field."""
    if not segmentations and any(field.labels is None for field in fields):
        msg = "segmentations is empty, and not all fields have labels: there is no outline to plot."
        raise ValueError(msg)
    labels = {}
    for name, given in segmentations.items():
        alone = not isinstance(given, Sequence) and np.ndim(given) == 2
        images = [np.asarray(image) for image in ([given] if alone else given)]
        if len(images) != len(fields):
            msg = f"segmentations[{name!r}] has {len(images)} label images for {len(fields)} fields; each needs one."
            raise ValueError(msg)
        for field, image in zip(fields, images, strict=True):
            _check(name, field, image)
        labels[name] = images
    return labels


def _check(name: str, field: Field, image: np.ndarray) -> None:
    if not np.issubdtype(image.dtype, np.integer):
        msg = (
            f"segmentations[{name!r}] of field {field.name!r} has the type {image.dtype}; integers, one number an object, "
            "are needed (of a mask, `skimage.measure.label` makes them)."
        )
        raise TypeError(msg)
    if image.shape != field.shape:
        msg = f"segmentations[{name!r}] {image.shape} does not match field {field.name!r} {field.shape} (y, x)."
        raise ValueError(msg)
    if image.min() < 0:
        msg = f"segmentations[{name!r}] of field {field.name!r} has the label {image.min()}; 0 is the least."
        raise ValueError(msg)


def _add_truth(fields: list[Field], labels: dict[str, list[np.ndarray]], truth: str | None) -> str | None:
    """Name of the truth, or None; labels of the fields are added to ``labels`` where they are the truth."""
    if truth is not None and truth not in labels:
        msg = f"truth={truth!r} is not among the segmentations, {list(labels)}."
        raise KeyError(msg)
    if truth is not None or _TRUTH in labels:
        return truth or _TRUTH
    without = [field.name for field in fields if field.labels is None]
    if len(without) == len(fields):
        return None
    if without:
        msg = (
            f"The fields {without} have no labels and others do: pass the truth of all as segmentations, or leave the "
            "labels out with `Field.without_labels`."
        )
        raise ValueError(msg)
    images = [field.read_labels() for field in fields]
    for field, image in zip(fields, images, strict=True):
        _check(_TRUTH, field, image)
    labels[_TRUTH] = images
    return _TRUTH


def _compared(names: list[str], truth: str | None, differences: str | Literal[False] | None) -> str | None:
    """Name of the segmentation that is compared with the truth, or None."""
    others = [name for name in names if name != truth]
    if differences is False:
        return None
    if differences is None:
        return others[-1] if truth and others else None
    if truth is None:
        msg = f"differences={differences!r} needs a truth: name a segmentation as truth, or give the fields labels."
        raise ValueError(msg)
    if differences not in others:
        msg = f"differences={differences!r} is not among the segmentations beside the truth, {others}."
        raise KeyError(msg)
    return differences


# ------------------------------------------------------------------------------------------------------------- drawing
def _pixels(planes: np.ndarray) -> np.ndarray:
    """Channels (c, y, x) as a grey image (y, x) or as RGB (y, x, 3)."""
    if len(planes) == 1:
        return planes[0]
    first, second, third = planes if len(planes) == 3 else planes[[0, 1, 0]]
    return np.stack([first, second, third], axis=-1)


def _axes(
    rows: list[_Row], n_panels: int, figsize: tuple[float, float] | None, *, legend: bool
) -> tuple[Figure, np.ndarray]:
    heights = [row.field.shape[0] / row.field.shape[1] for row in rows]
    size = figsize or (
        _PANEL * n_panels + (1.6 if legend else 0.2),
        sum(_PANEL * height + 0.3 for height in heights) + 0.3,
    )
    figure, axes = plt.subplots(
        len(rows), n_panels, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    return figure, axes


def _frame(ax: Axes, row: _Row) -> None:
    height, width = row.field.shape
    ax.set_xlim(0, width * row.unit)
    ax.set_ylim(height * row.unit, 0)  # y points down, as in the image
    ax.set_autoscale_on(False)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _extent(row: _Row) -> tuple[float, float, float, float]:
    height, width = row.field.shape
    return 0, width * row.unit, height * row.unit, 0


def _draw_image(ax: Axes, row: _Row) -> None:
    ax.imshow(row.pixels, cmap="gray", vmin=0, vmax=1, extent=_extent(row), interpolation="antialiased", zorder=0)


def _name_channels(ax: Axes, names: list[str]) -> None:
    """Names of the channels in their colours, in the upper left corner; a colour picture needs none."""
    if [name.lower()[:1] for name in names] == ["r", "g", "b"]:
        return
    for i, (name, color) in enumerate(zip(names, _COLORS_OF_CHANNELS[len(names)], strict=True)):
        ax.annotate(
            name, (0, 1), xycoords="axes fraction", xytext=(3, -3 - 11 * i), textcoords="offset points",
            ha="left", va="top", fontsize=7, color=color, gid="channel",
            bbox={"boxstyle": "square,pad=0.15", "fc": (0, 0, 0, 0.6), "ec": "none"},
        )  # fmt: skip


def _contours(image: np.ndarray, unit: float) -> list[np.ndarray]:
    """Closed outlines (n, 2) of all objects, x and y in um; an object has one for each of its parts and holes."""
    numbers, codes = np.unique(image, return_inverse=True)
    codes = codes.reshape(image.shape).astype(np.int64) + int(numbers[0] != 0)  # 0 background, then without gaps
    outlines = []
    for number, window in enumerate(find_objects(codes), start=1):
        corner = np.array([part.start for part in window])
        padded = np.pad(codes[window] == number, 1)
        # Contours lie between the centres of pixels: with the padding, a pixel's centre is at its number less one half.
        outlines += [(line - 0.5 + corner)[:, ::-1] * unit for line in find_contours(padded.astype(np.float32), 0.5)]
    return outlines


def _outline(ax: Axes, image: np.ndarray, unit: float, *, color: str, linewidth: float, gid: str) -> None:
    lines = LineCollection(
        _contours(image, unit), colors=[color], linewidths=linewidth, rasterized=True, zorder=1, gid=gid
    )
    ax.add_collection(lines, autolim=False)


def _draw_differences(ax: Axes, row: _Row, compared: np.ndarray, truth: np.ndarray) -> None:
    from histoniche.seg.metrics import match_instances

    mine, true = compared > 0, truth > 0
    pixels = np.ones((*truth.shape, 4))
    for where, color in ((mine & true, AGREEMENT), (true & ~mine, MISSED), (mine & ~true, EXTRA)):
        pixels[where] = to_rgba(color)
    ax.imshow(pixels, extent=_extent(row), interpolation="nearest", zorder=0)
    found = match_instances(compared, truth, least_iou=0.5).truth
    lost = np.where(np.isin(truth, found), 0, truth)
    _outline(ax, lost, row.unit, color="black", linewidth=0.5, gid="outlines-not-found")
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("0.7")


def _handles() -> list[Patch | Line2D]:
    parts = (("agreement", AGREEMENT), ("missed", MISSED), ("extra", EXTRA))
    return [
        *[Patch(fc=color, ec="none", label=name) for name, color in parts],
        Line2D([], [], color="black", lw=0.8, label="object not found\n(IoU at most 0.5)"),
    ]


def _short(name: str) -> str:
    """A name that fits beside a panel: of a long one, its beginning and its end."""
    if len(name) <= _NAME_LENGTH:
        return name
    half = _NAME_LENGTH // 2
    return f"{name[:half]}…{name[1 - half :]}"
