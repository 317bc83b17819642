from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba_array

from histoniche._sdata import image
from histoniche.pl._colors import niche_palette
from histoniche.pl._shared import draw_image, finish, format_length, level_for, nice_length, niches


@pytest.mark.parametrize(("extent", "length"), [(1000, 200), (7000, 1000), (450, 50), (5000, 1000), (26, 5)])
def test_nice_length(extent, length):
    assert nice_length(extent) == pytest.approx(length)


def test_format_length():
    assert format_length(200) == "200 µm"
    assert format_length(2000) == "2 mm"


def test_niches_reads_colors_of_uns_or_the_palette(table):
    assert np.allclose(niches(table, "niche").colors, to_rgba_array(niche_palette(3)))
    table.uns["niche_colors"] = ["red", "green", "blue"]
    assert np.allclose(niches(table, "niche").colors, to_rgba_array(["red", "green", "blue"]))
    with pytest.raises(KeyError, match=r"obs\['nich'\] is missing; obs has .*niche_teacher"):
        niches(table, "nich")


def test_level_for_is_the_coarsest_fine_enough(sdata):
    he = image(sdata, "he")
    assert [level_for(he, um) for um in (0.1, 0.6, 1.0, 1.2, 2.0, 2.4, 50)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("max_px", [1200, 40])
def test_image_lies_where_it_should(sdata, max_px):
    """Colours are pixel coordinates, so a place in um can be read off and compared, at any level of the pyramid."""
    he = image(sdata, "he")
    _, ax = plt.subplots()
    drawn = draw_image(ax, he, (100, 400, 50, 250), max_px=max_px)
    x0, x1, y1, y0 = drawn.get_extent()
    pixel = 0.6 * (1 if max_px == 1200 else 4)
    assert (x0, x1, y0, y1) == pytest.approx((100, 400, 50, 250), abs=pixel)
    array = drawn.get_array()
    for fx, fy in ((0.25, 0.25), (0.5, 0.9)):
        red, green = array[int(fy * array.shape[0]), int(fx * array.shape[1])][:2]
        x, y = x0 + fx * (x1 - x0), y0 + fy * (y1 - y0)
        assert int(red) * 4 * 0.6 - 20 == pytest.approx(x, abs=6)
        assert int(green) * 4 * 0.6 - 20 == pytest.approx(y, abs=6)


def test_rotated_image_is_drawn_through_its_affine(sdata):
    he = image(sdata, "he")
    turn = np.array([[0.8, -0.6, 100.0], [0.6, 0.8, 20.0]])
    turned = type(he)(he.key, he.pyramid, turn, 1.0)
    _, ax = plt.subplots()
    drawn = draw_image(ax, turned, (100, 200, 50, 150))
    to_um = drawn.get_transform() - ax.transData
    px = turned.to_px(np.array([[150.0, 100.0]]))
    assert np.allclose(to_um.transform(px), [[150, 100]])


def test_finish_saves_and_closes(tmp_path):
    figure, _ = plt.subplots()
    assert finish(figure, None) is figure
    assert plt.fignum_exists(figure.number)
    finish(figure, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").stat().st_size > 0
    assert not plt.fignum_exists(figure.number)
