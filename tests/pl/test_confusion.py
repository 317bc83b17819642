from __future__ import annotations

import warnings

import numpy as np
import pytest

from histoniche.pl import confusion


@pytest.mark.parametrize("normalize", [True, False])
def test_numbers_are_those_of_the_test_cells(table, normalize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = confusion(table, normalize=normalize)
        figure.canvas.draw()
    ax = figure.axes[0]
    test = table.obs[table.obs["split"] == "test"]
    counts = np.array(
        [[((test["niche_teacher"] == str(i)) & (test["niche"] == str(j))).sum() for j in range(3)] for i in range(3)]
    )
    share = counts / counts.sum(1, keepdims=True)
    assert np.allclose(ax.images[0].get_array(), 100 * share)
    texts = {tuple(int(v) for v in t.get_position()): t.get_text() for t in ax.texts}
    for i, j in np.argwhere(counts):
        assert texts[j, i] == (f"{100 * share[i, j]:.0f}" if normalize else str(counts[i, j]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("niche", "niche_teacher")
    assert ax.get_title().startswith(f"{len(test):,} test cells")


def test_all_cells_and_niches_without_cells(table):
    table.obs["niche_teacher"] = table.obs["niche_teacher"].cat.add_categories("3")
    shown = confusion(table, split=None).axes[0].images[0].get_array()
    assert shown.shape == (4, 3)
    assert np.isnan(np.ma.filled(shown.astype(float), np.nan)[3]).all()


def test_bad_input(table):
    with pytest.raises(KeyError, match=r"'nolan'.*niche_teacher"):
        confusion(table, teacher_key="nolan")
    with pytest.raises(ValueError, match="is 'validation'"):
        confusion(table, split="validation")
    table.obs = table.obs.drop(columns="split")
    with pytest.raises(KeyError, match="split"):
        confusion(table)


def test_view(table):
    test = table[table.obs["split"] == "test"]
    assert np.allclose(confusion(test).axes[0].images[0].get_array(), confusion(table).axes[0].images[0].get_array())
