from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from histoniche.pl import niche_composition
from histoniche.pl._colors import niche_palette


def test_heat_map_and_counts_are_those_of_the_cells(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = niche_composition(table, cell_type_key="cell_type")
        figure.canvas.draw()
    heat, bars = figure.axes[:2]
    names = [t.get_text() for t in heat.get_xticklabels()]
    assert sorted(names) == ["B", "T", "duct"]
    shown = heat.images[0].get_array()
    for k in range(3):
        rows = table.obs["niche"] == str(k)
        for j, name in enumerate(names):
            assert shown[k, j] == pytest.approx((table.obs["cell_type"][rows] == name).mean())
        assert bars.patches[k].get_width() == rows.sum()
        assert bars.patches[k].get_facecolor() == to_rgba(niche_palette(3)[k])
    assert (heat.get_xlabel(), heat.get_ylabel(), bars.get_xlabel()) == ("cell_type", "niche", "cells")


def test_split_missing_and_empty_niches(table):
    table.obs.loc[table.obs.index[:50], "cell_type"] = np.nan
    table.obs.loc[table.obs["niche"] == "1", "niche"] = "0"
    figure = niche_composition(table, cell_type_key="cell_type", split="test")
    heat, bars = figure.axes[:2]
    use = (table.obs["split"] == "test") & table.obs["cell_type"].notna()
    assert sum(p.get_width() for p in bars.patches) == use.sum()
    assert np.isnan(heat.images[0].get_array()[1].astype(float).filled(np.nan)).all()


def test_bad_input(table):
    with pytest.raises(KeyError, match=r"'type'.*cell_type"):
        niche_composition(table, cell_type_key="type")
    with pytest.raises(ValueError, match="No cell has both"):
        niche_composition(table, cell_type_key="cell_type", split="validation")


def test_view(table):
    test = table[table.obs["split"] == "test"]
    whole = niche_composition(table, cell_type_key="cell_type", split="test")
    shown = niche_composition(test, cell_type_key="cell_type")
    assert np.allclose(shown.axes[0].images[0].get_array(), whole.axes[0].images[0].get_array())
    assert [p.get_width() for p in shown.axes[1].patches] == [p.get_width() for p in whole.axes[1].patches]
