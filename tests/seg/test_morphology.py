"""Shape, brightness and outlines of objects."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from histoniche.seg._morphology import measure


def test_rectangle_by_hand() -> None:
    labels = np.zeros((20, 30), dtype=np.int32)
    labels[4:10, 5:17] = 1
    intensity = np.arange(600.0).reshape(20, 30)
    table, polygons = measure(labels, intensity)
    row = table.iloc[0]
    assert row["area"] == 72
    assert (row["y"], row["x"]) == (7.0, 11.0)
    assert row["major_axis"] == pytest.approx(4 * np.sqrt((12**2 - 1) / 12))
    assert row["minor_axis"] == pytest.approx(4 * np.sqrt((6**2 - 1) / 12))
    assert row["eccentricity"] == pytest.approx(np.sqrt(1 - (6**2 - 1) / (12**2 - 1)))
    assert row["mean_intensity"] == intensity[4:10, 5:17].mean()
    assert row["perimeter"] == pytest.approx(2 * (12 + 6) - 4)  # between the centres of its outer pixels
    assert row["solidity"] == pytest.approx(1)
    assert polygons[0].bounds == (5, 4, 17, 10)
    assert polygons[0].area == 72 - 4 / 8  # the corners are cut
    assert len(polygons[0].exterior.coords) == 9  # eight corners, closed: nothing on straight edges


def test_solidity_of_an_angle_and_outline_of_a_ring() -> None:
    labels = np.zeros((60, 120), dtype=np.int32)
    labels[5:45, 5:15] = labels[35:45, 5:45] = 1
    labels[10:50, 60:100] = 2
    labels[20:40, 70:90] = 0
    table, polygons = measure(labels, labels)
    assert table["area"].tolist() == [700, 1200]
    assert table["solidity"].iloc[0] == pytest.approx(700 / (1600 - 30 * 30 / 2), rel=0.02)
    assert polygons[1].area == 1600 - 0.5  # the outer outline
    assert table["mean_intensity"].tolist() == [1, 2]


def test_outlines_of_any_shape_are_simple_and_hold_the_pixels() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((40, 400), dtype=np.int32)
    for number in range(1, 11):  # random walks: thin, with corners that touch diagonally
        y, x = 20, 40 * number - 20
        for _ in range(150):
            labels[np.clip(y, 1, 38), np.clip(x, 40 * number - 38, 40 * number - 2)] = number
            step = rng.integers(-1, 2)
            y, x = (y + step, x) if rng.random() < 0.5 else (y, x + step)
            y, x = int(np.clip(y, 1, 38)), int(np.clip(x, 40 * number - 38, 40 * number - 2))
    table, polygons = measure(labels, labels)
    assert len(table) == len(polygons) == 10
    for number, polygon in enumerate(polygons, start=1):
        assert polygon.is_valid
        assert polygon.is_simple
        rows, columns = np.nonzero(labels == number)
        assert shapely.contains_xy(polygon, columns + 0.5, rows + 0.5).all()


def test_parts_that_touch_at_a_corner_are_one_outline() -> None:
    labels = np.zeros((40, 100), dtype=np.int32)
    labels[5:15, 5:15] = labels[15:25, 15:25] = 1
    labels[np.arange(5, 35), np.arange(50, 80)] = 2
    table, polygons = measure(labels, labels)
    assert table["area"].tolist() == [200, 30]
    assert [polygon.is_valid for polygon in polygons] == [True, True]
    assert polygons[0].bounds == (5, 5, 25, 25)
    assert polygons[0].area == 200 - 6 / 8 + 2 / 8  # six corners are cut, at the seventh and eighth two are filled
    # Of squares whole at the corners the hull has 300 px; cut, it is narrower by half a diagonal of a pixel on two sides.
    assert table["solidity"].iloc[0] == pytest.approx(199.5 / 289.5)
    assert polygons[1].bounds == (50, 5, 80, 35)
    y, x = np.nonzero(labels == 2)
    assert shapely.contains_xy(polygons[1], x + 0.5, y + 0.5).all()
    assert table["solidity"].iloc[1] > 0.9


def test_one_pixel() -> None:
    labels = np.zeros((3, 3), dtype=np.int32)
    labels[0, 2] = 1
    table, polygons = measure(labels, labels)
    assert (table["y"].iloc[0], table["x"].iloc[0]) == (0.5, 2.5)
    assert polygons[0].is_valid
    assert polygons[0].centroid.coords[0] == (2.5, 0.5)
