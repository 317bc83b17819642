from __future__ import annotations

import warnings

import numpy as np
import pytest

from histoniche.pl import training_history


def test_curves_are_those_of_the_history(table):
    table.uns["niche_history"]["student"] = {"loss": np.full(30, 0.5), "val_loss": np.full(3, 0.7), "lr": np.zeros(30)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = training_history(table)
        figure.canvas.draw()
    loss, niches, student = figure.axes[:3]
    raw, smooth = loss.lines
    assert np.allclose(raw.get_ydata(), np.linspace(2, 1, 100))
    assert np.array_equal(raw.get_xdata(), np.arange(1, 101))
    assert np.allclose(smooth.get_ydata()[5:-5], raw.get_ydata()[5:-5], atol=0.02)
    assert np.allclose(niches.lines[-1].get_ydata(), 2.5)
    assert niches.get_ylabel() == "effective number of niches"
    assert niches.get_ylim()[0] == 1
    assert [t.get_text() for t in student.get_legend().get_texts()] == ["loss", "val_loss"]
    assert [ax.get_title() for ax in (loss, student)] == ["teacher", "student"]


def test_step_is_the_axis(table):
    table.uns["niche_history"] = {"student": {"step": np.arange(10, 60, 10), "loss": np.arange(5.0)}}
    (ax,) = training_history(table).axes
    assert np.array_equal(ax.lines[0].get_xdata(), np.arange(10, 60, 10))


def test_bad_input(table):
    table.uns["niche_history"] = {"teacher": {"lr": np.zeros(3)}}
    with pytest.raises(ValueError, match="no loss"):
        training_history(table)
    del table.uns["niche_history"]
    with pytest.raises(KeyError, match=r"hn\.tl\.nolan"):
        training_history(table)


def test_view(table):
    assert np.allclose(training_history(table[:9]).axes[0].lines[0].get_ydata(), np.linspace(2, 1, 100))
