from __future__ import annotations

import warnings

import numpy as np
import pytest

from histoniche.pl import exemplars
from histoniche.pl._exemplars import _crowd, _spread


def crops(figure, k, n):
    return [ax.images[0].get_array() for ax in figure.axes[k * n : (k + 1) * n] if ax.images]


def test_crops_show_the_cells_of_their_niche(sdata):
    table = sdata["table"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = exemplars(sdata, n=4, field_of_view=48.0)
        figure.canvas.draw()
    assert len(figure.axes) == 12
    # Red and green of the pixel in the middle are its place, so each crop gives away its cell.
    xy = table.obsm["spatial"]
    for k in range(3):
        assert figure.axes[4 * k].get_ylabel() == str(k)
        found = crops(figure, k, 4)
        assert len(found) == 4
        for crop in found:
            assert crop.shape == (80, 80, 3)
            place = crop[40, 40, :2].astype(float) * 4 * 0.6 - 20
            near = np.linalg.norm(xy - place, axis=1) < 4
            assert (table.obs["niche"][near] == str(k)).any()
            tops = table.obs["niche_confidence"][table.obs["niche"] == str(k)].nlargest(20).index
            assert set(table.obs_names[near]) & set(tops)


def test_deterministic(sdata):
    first, second = exemplars(sdata, n=3), exemplars(sdata, n=3)
    for a, b in zip(first.axes, second.axes, strict=True):
        assert np.array_equal(a.images[0].get_array(), b.images[0].get_array())


def test_spread_prefers_rank_and_distance():
    xy = np.array([[0, 0], [1, 0], [100, 0], [101, 0], [50, 80], *[[10, 10]] * 45], dtype=float)
    rank = np.array([1.0, 0.99, 0.98, 0.97, 0.96, *np.linspace(0.5, 0.1, 45)])
    assert sorted(_spread(xy, rank, 3, 10.0)) == [0, 2, 4]
    assert _spread(xy, rank, 1, 10.0).tolist() == [0]
    assert _spread(xy[:2], rank[:2], 5, 10.0).tolist() == [0, 1]
    assert len(set(_spread(np.zeros((60, 2)), np.ones(60), 4, 10.0))) == 4


def test_spread_lets_in_lower_ranks_before_crops_overlap():
    xy = np.concatenate([np.random.default_rng(0).uniform(0, 20, (30, 2)), np.arange(1, 171)[:, None] * [50.0, 0.0]])
    rank = np.linspace(1, 0, 200)  # the highest tenth lies within 20 um
    chosen = xy[_spread(xy, rank, 4, 40.0)]
    distances = np.linalg.norm(chosen[:, None] - chosen[None], axis=2)[np.triu_indices(4, 1)]
    assert distances.min() >= 40
    close = xy[_spread(xy, rank, 4, 5.0)]
    assert np.abs(close).max() <= 20


def test_cells_astray_are_no_exemplars(sdata):
    table = sdata["table"]
    xy = table.obsm["spatial"]
    # The surest cell of niche 0 lies where no other does.
    cell = np.flatnonzero(table.obs["niche"] == "0")[0]
    alone = xy.max(axis=0) - np.array([60.0, 60.0])
    others = np.abs(xy - alone).max(axis=1) > 50
    others[cell] = True
    table.obs.loc[table.obs_names[cell], "niche_confidence"] = 1.0
    xy[cell] = alone
    sdata.tables["table"] = table[others].copy()
    for crop in crops(exemplars(sdata, n=2, field_of_view=48.0), 0, 2):
        place = crop[40, 40, :2].astype(float) * 4 * 0.6 - 20
        assert np.linalg.norm(place - alone) > 4


def test_niches_without_cells_and_edges(sdata):
    table = sdata["table"]
    table.obs.loc[table.obs["niche"] == "1", "niche"] = "0"
    figure = exemplars(sdata, n=2)
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ["0", "2"]
    figure = exemplars(sdata, n=2, by=None, field_of_view=200.0)
    for ax in figure.axes:
        height, width, _ = ax.images[0].get_array().shape
        assert height == width


def test_bad_input(sdata, table):
    with pytest.raises(ValueError, match="choose a smaller"):
        exemplars(sdata, field_of_view=5000.0)
    with pytest.raises(ValueError, match="both must be positive"):
        exemplars(sdata, n=0)
    with pytest.raises(KeyError, match=r"'certainty'.*niche_confidence"):
        exemplars(sdata, by="certainty")
    with pytest.raises(TypeError, match="AnnData"):
        exemplars(table)


def two_images(sdata, two_slides, image_at):
    sdata.images["other"] = image_at(-10.0)
    del sdata.tables["table"]
    sdata.tables["table"] = two_slides
    return sdata


def test_each_slide_shows_its_own_image(sdata, two_slides, image_at):
    sdata = two_images(sdata, two_slides, image_at)
    with pytest.raises(ValueError, match=r"\['he', 'other'\]: give a mapping"):
        exemplars(sdata, image_key="he")
    figure = exemplars(sdata, image_key={"liver": "he", "lung": "other"}, n=4, field_of_view=48.0)
    table = sdata["table"]
    shift = np.where(table.obs["region"] == "liver", 20.0, 10.0)[:, None]
    seen = (table.obsm["spatial"] + shift) / 0.6 / 4  # what the middle of a cell's crop shows
    slides = set()
    for k in range(3):
        for crop in crops(figure, k, 4):
            of_niche = np.flatnonzero(table.obs["niche"] == str(k))
            distance = np.abs(seen[of_niche] - crop[40, 40, :2]).max(axis=1)
            assert distance.min() <= 1.5
            slides.add(table.obs["region"].iloc[of_niche[distance.argmin()]])
    assert slides == {"liver", "lung"}


def test_crowding_is_that_of_the_own_slide():
    near = np.array([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0], [0.5, 0.0], [0.6, 0.0], [0.7, 0.0]])
    slides = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    assert _crowd(near, slides, 10.0).tolist() == [2, 2, 1, 3, 3, 3]


def test_view(sdata):
    sdata.tables["table"] = sdata["table"][sdata["table"].obs["niche"] != "1"]
    assert [ax.get_ylabel() for ax in exemplars(sdata, n=2).axes[::2]] == ["0", "2"]
