from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgba, to_rgba_array

from histoniche.pl import niche_map
from histoniche.pl._colors import niche_palette
from histoniche.pl._shared import NOT_ASSIGNED


def cells(ax):
    return [c for c in ax.collections if isinstance(c, EllipseCollection)]


def patches(ax, gid):
    return [p for p in ax.patches if p.get_gid() == gid]


def used(figure):
    return [ax for ax in figure.axes if ax.get_title()]


def test_one_panel_per_key_with_the_colors_of_the_palette(table):
    figure = niche_map(table)
    axes = used(figure)
    assert [ax.get_title() for ax in axes] == ["niche_teacher", "niche"]
    palette = to_rgba_array(niche_palette(3))
    for ax, key in zip(axes, ("niche_teacher", "niche"), strict=True):
        (drawn,) = cells(ax)
        assert drawn.get_rasterized()
        codes = table.obs[key].cat.codes.to_numpy()
        assert np.allclose(drawn.get_offsets(), table.obsm["spatial"])
        assert np.allclose(drawn.get_facecolors(), palette[codes])
        assert not ax.images


def test_the_same_color_whatever_else_is_plotted(table):
    """A niche keeps its colour where other niches have no cell."""
    table.obs.loc[table.obs["niche"] == "0", "niche"] = "2"
    (drawn,) = cells(used(niche_map(table, keys="niche"))[0])
    assert set(map(tuple, drawn.get_facecolors())) == set(map(tuple, to_rgba_array(niche_palette(3))[1:]))


def test_legend_outline_and_scale_bar(table):
    figure = niche_map(table)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "2"]
    test = table.obsm["spatial"][(table.obs["split"] == "test").to_numpy()]
    for ax in used(figure):
        (outline,) = patches(ax, "test-outline")
        (x0, y0), (x1, y1) = outline.get_bbox().get_points()
        assert (x0 <= test.min(0)[0]) and (y0 <= test.min(0)[1])
        assert (x1 >= test.max(0)[0]) and (y1 >= test.max(0)[1])
        (bar,) = patches(ax, "scale-bar")
        assert bar.get_width() == 50  # um, the axes being in um
        assert [t.get_text() for t in ax.texts] == ["50 µm"]
    assert not patches(used(niche_map(table, outline=False))[0], "test-outline")


def test_no_outline_where_test_cells_are_scattered(table):
    table.obs["split"] = np.where(np.arange(table.n_obs) % 2, "test", "train")
    assert not patches(used(niche_map(table))[0], "test-outline")


def test_y_points_down_and_um_are_square(table):
    ax = used(niche_map(table, keys="niche"))[0]
    bottom, top = ax.get_ylim()
    assert bottom > top
    assert ax.get_aspect() == 1


def test_size_is_in_um_and_follows_the_density(table):
    (given,) = cells(used(niche_map(table, keys="niche", size=7.0))[0])
    assert given._widths[0] * 2 == 7.0
    (auto,) = cells(used(niche_map(table, keys="niche"))[0])
    spacing = np.sqrt(400 * 200 / 400)
    assert 0.8 * spacing < auto._widths[0] * 2 < 2 * spacing
    table.obsm["spatial"] *= 10
    (wide,) = cells(used(niche_map(table, keys="niche"))[0])
    assert wide._widths[0] == pytest.approx(10 * auto._widths[0])


def test_missing_niches_are_grey_and_below(table):
    table.obs["niche"] = table.obs["niche"].where(table.obs["split"] == "test")
    figure = niche_map(table, keys="niche")
    (drawn,) = cells(used(figure)[0])
    n_missing = int(table.obs["niche"].isna().sum())
    assert np.allclose(drawn.get_facecolors()[:n_missing], to_rgba(NOT_ASSIGNED))
    assert not np.allclose(drawn.get_facecolors()[n_missing], to_rgba(NOT_ASSIGNED))
    assert [t.get_text() for t in used(figure)[0].get_legend().get_texts()] == ["0", "1", "2", "none"]


def test_image_behind_the_cells_and_alone(sdata):
    figure = niche_map(sdata)
    axes = used(figure)
    assert [ax.get_title() for ax in axes] == ["image", "niche_teacher", "niche"]
    assert [len(cells(ax)) for ax in axes] == [0, 1, 1]
    xy = sdata["table"].obsm["spatial"]
    for ax in axes:
        (drawn,) = ax.images
        x0, x1, y1, y0 = drawn.get_extent()
        assert x0 < xy[:, 0].min() < xy[:, 0].max() < x1
        assert y0 < xy[:, 1].min() < xy[:, 1].max() < y1
        assert x1 - x0 < np.ptp(xy[:, 0]) + 60
    assert np.allclose(cells(axes[1])[0].get_facecolors()[:, 3], 0.75)
    assert not used(niche_map(sdata, image_key=False))[0].images


def test_one_row_per_slide(two_slides):
    figure = niche_map(two_slides)
    assert [ax.get_title() for ax in used(figure)] == [
        f"{slide}: {key}" for slide in ("liver", "lung") for key in ("niche_teacher", "niche")
    ]
    sizes = [len(cells(ax)[0].get_offsets()) for ax in used(figure)]
    n_liver = int((two_slides.obs["region"] == "liver").sum())
    assert sizes == [n_liver, n_liver, two_slides.n_obs - n_liver, two_slides.n_obs - n_liver]


def test_image_of_each_slide(two_slides, image_at):
    from spatialdata import SpatialData

    sdata = SpatialData.init_from_elements({"a": image_at(-20.0), "b": image_at(-10.0)})
    sdata.tables["table"] = two_slides
    figure = niche_map(sdata, keys="niche", image_key={"liver": "a", "lung": "b"})
    assert [len(ax.images) for ax in used(figure)] == [1, 1, 1, 1]


def test_columns_with_other_names_have_their_own_legends(table):
    figure = niche_map(table, keys=("niche", "cell_type"))
    assert not figure.legends
    texts = [[t.get_text() for t in ax.get_legend().get_texts()] for ax in used(figure)]
    assert texts == [["0", "1", "2"], ["B", "T", "duct"]]


def test_draws_into_axes(table):
    figure, ax = plt.subplots()
    assert niche_map(table, keys="niche", ax=ax) is figure
    assert len(cells(ax)) == 1
    with pytest.raises(ValueError, match="there are 2"):
        niche_map(table, ax=ax)


@pytest.mark.parametrize("nested", [False, True])
def test_the_figure_of_given_axes_is_saved_and_stays_open(table, tmp_path, nested):
    figure = plt.figure()
    ax = (figure.subfigures(1, 2)[0] if nested else figure).subplots()
    niche_map(table, keys="niche", ax=ax, save=tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0
    assert plt.fignum_exists(figure.number)


def test_by_default_the_niches_that_exist(table):
    for key in ("niche", "niche_teacher"):
        only = table.copy()
        del only.obs[key]
        (other,) = {"niche", "niche_teacher"} - {key}
        assert [ax.get_title() for ax in used(niche_map(only))] == [other]
    del table.obs["niche"], table.obs["niche_teacher"]
    with pytest.raises(KeyError, match=r"neither 'niche_teacher' nor 'niche'.*keys=.*cell_type"):
        niche_map(table)


def test_view(table, sdata):
    view = table[table.obs["split"] == "test"]
    (drawn,) = cells(used(niche_map(view, keys="niche"))[0])
    assert np.allclose(drawn.get_offsets(), table.obsm["spatial"][(table.obs["split"] == "test").to_numpy()])
    assert view.is_view
    sdata.tables["table"] = sdata["table"][:50]
    assert [len(c.get_offsets()) for ax in used(niche_map(sdata)) for c in cells(ax)] == [50, 50]


def unfit(kind):
    from spatialdata.models import Image2DModel, Image3DModel
    from spatialdata.transformations import Identity

    shape = {"stain": (1, 40, 50), "uint16": (3, 40, 50), "3d": (3, 4, 40, 50)}.get(kind, (3, 40, 50))
    pixels = np.zeros(shape, dtype=np.uint16 if kind == "uint16" else np.uint8)
    model = Image3DModel if kind == "3d" else Image2DModel
    system = "global" if kind == "no um" else "um"
    return model.parse(
        pixels, dims=("c", "z", "y", "x") if kind == "3d" else ("c", "y", "x"), transformations={system: Identity()}
    )


@pytest.mark.parametrize("kind", ["stain", "uint16", "3d", "no um"])
def test_an_unfit_image_is_only_an_error_where_it_was_asked_for(sdata, kind):
    del sdata.images["he"]
    sdata.images["other"] = unfit(kind)
    axes = used(niche_map(sdata))
    assert [ax.get_title() for ax in axes] == ["niche_teacher", "niche"]
    assert not any(ax.images for ax in axes)
    assert np.allclose(cells(axes[0])[0].get_facecolors()[:, 3], 1)
    with pytest.raises(ValueError, match="other"):
        niche_map(sdata, image_key="other")


def test_no_warnings_and_nothing_written(sdata, tmp_path):
    before = set(sdata["table"].uns), set(sdata["table"].obs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        niche_map(sdata, titles=("teacher", "student"), save=tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert (set(sdata["table"].uns), set(sdata["table"].obs)) == before


def test_many_cells_are_quick(table_of):
    import time

    table = table_of(140_000)
    start = time.perf_counter()
    niche_map(table).canvas.draw()
    assert time.perf_counter() - start < 20


def test_bad_input(table, sdata, two_slides):
    with pytest.raises(KeyError, match=r"'nich'.*niche_teacher"):
        niche_map(table, keys="nich")
    with pytest.raises(TypeError, match="AnnData has none"):
        niche_map(table, image_key="he")
    with pytest.raises(KeyError, match=r"'morphology' is not among the images, \['he'\]"):
        niche_map(sdata, image_key="morphology")
    with pytest.raises(ValueError, match="titles has 1 names for 2 keys"):
        niche_map(table, titles=["a"])
    table.obs["niche"] = np.nan
    with pytest.raises(ValueError, match="missing for all cells"):
        niche_map(table, keys="niche")
