"""Segmentations over images: what the panels hold, and where they lie."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from histoniche.pl import segmentation
from histoniche.pl._segmentation import AGREEMENT, EXTRA, MISSED, _short
from histoniche.seg import Field


def make_field(name="a", shape=(30, 40), um_per_px=0.5, n_channels=1, labels=True):
    rng = np.random.default_rng(0)
    image = rng.random((n_channels, *shape)).astype(np.float32)
    truth = np.zeros(shape, dtype=np.int32)
    truth[5:15, 4:12], truth[5:15, 12:20], truth[20:26, 25:33] = 3, 8, 1_000_000
    channels = ("DAPI", "membrane", "18S", "actin")[:n_channels]
    return Field(name, image, channels, labels=truth if labels else None, um_per_px=um_per_px)


def merged(field):
    """Student: the touching objects are one, the third is missed but for two columns, and a speck is extra."""
    found = np.zeros(field.shape, dtype=np.int32)
    found[5:15, 4:20], found[20:26, 25:27], found[0:2, 30:32] = 1, 2, 3
    return found


@pytest.fixture
def field():
    return make_field()


def outlines(ax):
    return {c.get_gid(): c for c in ax.collections if isinstance(c, LineCollection)}


def grid(figure, n_rows):
    return np.array(figure.axes).reshape(n_rows, -1)


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def scale_bars(ax):
    return [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_gid() == "scale-bar"]


def test_panels_of_one_field(field):
    figure = segmentation(field, segmentations={"teacher": field.labels, "student": merged(field)})
    assert titles(figure) == ["image", "teacher", "student", "truth", "student: differences"]
    assert [len(ax.images) for ax in figure.axes] == [1] * 5
    assert [list(outlines(ax)) for ax in figure.axes] == [
        [], ["outlines-teacher"], ["outlines-student"], ["outlines-truth"], ["outlines-not-found"],
    ]  # fmt: skip
    for ax in figure.axes:
        assert (ax.get_xlim(), ax.get_ylim()) == ((0, 20), (15, 0))  # um, y down
        assert list(ax.images[0].get_extent()) == [0, 20, 15, 0]
    shown = figure.axes[1].images[0]
    assert np.array_equal(shown.get_array(), field.read(["DAPI"])[0])
    assert shown.get_clim() == (0, 1)


def test_outlines_run_along_the_edges_of_objects(field):
    figure = segmentation(field, segmentations={"student": merged(field)}, outline_color="red", linewidth=2)
    lines = outlines(figure.axes[1])["outlines-student"]
    paths = [path.vertices for path in lines.get_paths()]
    assert len(paths) == 3
    boxes = {tuple(np.concatenate([path.min(axis=0), path.max(axis=0)]).tolist()) for path in paths}
    # x0, y0, x1, y1 in um of rows 5 to 15 and columns 4 to 20 of 0.5 um, and so on
    assert boxes == {(2, 2.5, 10, 7.5), (12.5, 10, 13.5, 13), (15, 0, 16, 1)}
    assert all(np.array_equal(path[0], path[-1]) for path in paths)
    assert np.allclose(lines.get_colors(), to_rgba("red"))
    assert lines.get_linewidths() == [2]
    assert len(outlines(figure.axes[2])["outlines-truth"].get_paths()) == 3


def test_parts_and_holes_have_outlines_of_their_own(field):
    ring = np.zeros(field.shape, dtype=np.int64)
    ring[2:9, 2:9], ring[4:7, 4:7] = 5, 0
    ring[20:25, 20:25] = 5
    figure = segmentation(field, segmentations={"ring": ring})
    assert len(outlines(figure.axes[1])["outlines-ring"].get_paths()) == 3


def test_differences_are_those_of_the_pixels(field):
    student, truth = merged(field), field.labels
    figure = segmentation(field, segmentations={"student": student})
    ax = figure.axes[-1]
    pixels = ax.images[0].get_array()
    for y, x in np.ndindex(truth.shape):
        color = {(1, 1): AGREEMENT, (0, 1): MISSED, (1, 0): EXTRA, (0, 0): "white"}[student[y, x] > 0, truth[y, x] > 0]
        assert np.allclose(pixels[y, x], to_rgba(color))
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["agreement", "missed", "extra", "object not found\n(IoU at most 0.5)"]
    faces = [patch.get_facecolor() for patch in legend.get_patches()]
    assert faces == [to_rgba(color) for color in (AGREEMENT, MISSED, EXTRA)]


def test_merged_objects_are_not_found_although_their_pixels_agree(field):
    perfect = segmentation(field, segmentations={"student": field.labels})
    assert not outlines(perfect.axes[-1])["outlines-not-found"].get_paths()
    figure = segmentation(field, segmentations={"student": merged(field)})
    assert len(outlines(figure.axes[-1])["outlines-not-found"].get_paths()) == 3
    partly = np.where(field.labels == 3, 3, merged(field))
    partly[5:15, 12:20] = 0
    figure = segmentation(field, segmentations={"student": partly})
    assert len(outlines(figure.axes[-1])["outlines-not-found"].get_paths()) == 2


def test_which_is_the_truth_and_which_is_compared(field):
    empty = np.zeros(field.shape, dtype=int)
    other = {"student": merged(field), "truth": empty, "expert": field.labels}
    assert titles(segmentation(field, segmentations=other)) == [
        "image", "student", "truth", "expert", "expert: differences",
    ]  # fmt: skip
    figure = segmentation(field, segmentations=other, truth="expert", differences="student")
    assert titles(figure)[-1] == "student: differences"
    assert np.allclose(figure.axes[-1].images[0].get_array()[22, 30], to_rgba(MISSED))
    figure = segmentation(field, segmentations=other, differences=False)
    assert titles(figure) == ["image", "student", "truth", "expert"]
    assert not figure.legends


def test_fields_without_truth(field):
    figure = segmentation(field.without_labels(), segmentations={"student": merged(field)})
    assert titles(figure) == ["image", "student"]
    assert not figure.legends


def test_labels_alone_are_shown(field):
    assert titles(segmentation(field, segmentations={})) == ["image", "truth"]


def test_one_row_a_field():
    fields = [make_field("a"), make_field("b", shape=(60, 40), um_per_px=2)]
    figure = segmentation(fields, segmentations={"student": [merged(field) for field in fields]})
    axes = grid(figure, 2)
    assert axes.shape == (2, 4)
    assert [ax.get_title() for ax in axes[0]] == ["image", "student", "truth", "student: differences"]
    assert [ax.get_title() for ax in axes[1]] == [""] * 4
    assert [row[0].get_ylabel() for row in axes] == ["a", "b"]
    assert [row[0].get_xlim() for row in axes] == [(0, 20), (0, 80)]
    assert [[len(scale_bars(ax)) for ax in row] for row in axes] == [[1, 0, 0, 0]] * 2
    assert [scale_bars(row[0])[0].get_width() for row in axes] == [2, 10]  # um, as the axes
    assert [row[0].texts[-1].get_text() for row in axes] == ["2 µm", "10 µm"]
    assert len(figure.legends) == 1
    assert axes[1, 1].images[0].get_array().shape == (60, 40)


def test_scale_bar_can_be_left_out_and_needs_um(field):
    given = {"student": merged(field)}
    assert not scale_bars(segmentation(field, segmentations=given, scale_bar=False).axes[0])
    figure = segmentation(replace(field, um_per_px=None), segmentations=given)
    assert not scale_bars(figure.axes[0])
    assert figure.axes[0].get_xlim() == (0, 40)  # px


def test_colour_picture_has_no_names_of_channels():
    field = replace(make_field(n_channels=3), channels=("red", "green", "blue"))
    ax = segmentation(field, segmentations={}).axes[0]
    assert not [text for text in ax.texts if text.get_gid() == "channel"]
    np.testing.assert_allclose(ax.images[0].get_array(), np.moveaxis(field.read(field.channels), 0, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "planes"),
    [
        (["18S"], None),
        (["DAPI", "18S"], ["DAPI", "18S", "DAPI"]),
        (["18S", "DAPI", "membrane"], ["18S", "DAPI", "membrane"]),
        (None, ["DAPI", "membrane", "18S"]),
    ],
)
def test_channels(channels, planes):
    field = make_field(n_channels=4)
    ax = segmentation(field, segmentations={}, channels=channels).axes[0]
    shown = ax.images[0].get_array()
    expected = field.read(["18S"])[0] if planes is None else field.read(planes).transpose(1, 2, 0)
    assert np.array_equal(shown, expected)
    named = {text.get_text(): text.get_color() for text in ax.texts if text.get_gid() == "channel"}
    colors = {1: ["white"], 2: ["magenta", "lime"], 3: ["red", "lime", "blue"]}
    expected_names = channels or ["DAPI", "membrane", "18S"]
    assert named == dict(zip(expected_names, colors[len(expected_names)], strict=True))


def test_lazy_fields_and_labels(field):
    import dask.array as da

    lazy = replace(field, image=da.from_array(field.image), labels=da.from_array(field.labels))
    figure = segmentation(lazy, segmentations={"student": da.from_array(merged(field))})
    plain = segmentation(field, segmentations={"student": merged(field)})
    for ours, theirs in zip(figure.axes, plain.axes, strict=True):
        assert np.array_equal(ours.images[0].get_array(), theirs.images[0].get_array())


def test_titles_size_saving_and_nothing_written(field, tmp_path):
    student = merged(field)
    before = student.copy(), field.labels.copy(), field.image.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = segmentation(
            field, segmentations={"student": student}, titles=["1", "2", "3", "4"], figsize=(7, 2),
            save=tmp_path / "new" / "segmentation.png",
        )  # fmt: skip
    assert titles(figure) == ["1", "2", "3", "4"]
    assert figure.get_size_inches().tolist() == [7, 2]
    assert (tmp_path / "new" / "segmentation.png").stat().st_size > 5_000
    for old, new in zip(before, (student, field.labels, field.image), strict=True):
        assert np.array_equal(old, new)


def test_bad_fields(field):
    with pytest.raises(TypeError, match=r"data is a dict; a histoniche.seg.Field"):
        segmentation({}, segmentations={})
    with pytest.raises(ValueError, match="data has no field"):
        segmentation([], segmentations={})
    with pytest.raises(KeyError, match=r"no channel 'actin'; it has \['DAPI'\]"):
        segmentation(field, segmentations={}, channels=["actin"])
    with pytest.raises(ValueError, match="channels has 4 names"):
        segmentation(field, segmentations={}, channels=list("abcd"))
    with pytest.raises(ValueError, match="'DAPI' is constant"):
        segmentation(replace(field, image=field.image * 0), segmentations={})
    with pytest.raises(ValueError, match=r"fields \['b'\] have no labels and others do"):
        segmentation([field, make_field("b", labels=False)], segmentations={"student": [merged(field)] * 2})
    with pytest.raises(ValueError, match="segmentations is empty"):
        segmentation(field.without_labels(), segmentations={})


def test_bad_segmentations(field):
    student = merged(field)
    with pytest.raises(ValueError, match=r"\['student'\] \(29, 40\) does not match field 'a' \(30, 40\)"):
        segmentation(field, segmentations={"student": student[:-1]})
    with pytest.raises(ValueError, match=r"\['student'\] has 1 label images for 2 fields"):
        segmentation([field, field], segmentations={"student": student})
    with pytest.raises(TypeError, match=r"\['student'\] of field 'a' has the type float64"):
        segmentation(field, segmentations={"student": student / 2})
    with pytest.raises(TypeError, match=r"has the type bool.*skimage.measure.label"):
        segmentation(field, segmentations={"student": student > 0})
    with pytest.raises(ValueError, match="has the label -1"):
        segmentation(field, segmentations={"student": student - 1})
    with pytest.raises(KeyError, match=r"truth='expert' is not among the segmentations, \['student'\]"):
        segmentation(field, segmentations={"student": student}, truth="expert")
    for differences in ("teacher", "truth"):
        with pytest.raises(KeyError, match=rf"differences='{differences}'.*\['student'\]"):
            segmentation(field, segmentations={"student": student}, differences=differences)
    with pytest.raises(ValueError, match="differences='student' needs a truth"):
        segmentation(field.without_labels(), segmentations={"student": student}, differences="student")
    with pytest.raises(ValueError, match="titles has 1 names for the 4 panels"):
        segmentation(field, segmentations={"student": student}, titles=["a"])


def test_other_plots_do_without_torch():
    code = "import sys, histoniche.pl; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_long_names_are_shortened() -> None:
    assert _short("a" * 32) == "a" * 32
    assert _short("df4882a8bfacb616" * 4 + "[0:256,0:256]") == "df4882a8bfacb616…16[0:256,0:256]"
    assert len(_short("x" * 80)) == 32
