"""The plot of students against numbers of labels shows the means, spreads and seeds of the table."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color, to_hex

from histoniche.pl import label_efficiency
from histoniche.seg._compare import ARMS


def table_of_runs(arms=("scratch", "ts_kd", "mae"), budgets=(2, 4, 16), seeds=(0, 1, 2)):
    rng = np.random.default_rng(0)
    rows = [
        {"arm": arm, "n_labelled": n, "seed": seed, "dice": rng.uniform(0.5, 0.9), "hausdorff95": rng.uniform(5, 50)}
        for seed in seeds
        for n in budgets
        for arm in arms
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def runs():
    return table_of_runs()


def drawn(figure):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    return figure.axes[0]


def means(ax):
    """Lines of the means by the name of their way."""
    return {container.get_label(): container for container in ax.containers}


def seeds(ax):
    return {
        line.get_gid().removeprefix("seeds-"): line for line in ax.lines if str(line.get_gid()).startswith("seeds-")
    }


@pytest.mark.parametrize("metric", ["dice", "hausdorff95"])
def test_values_are_those_of_the_table(runs, metric):
    before = runs.copy()
    ax = drawn(label_efficiency(runs, metric=metric))
    assert list(means(ax)) == ["TS-KD", "MAE", "scratch"], "usual order, whatever that of the table"
    for arm, name in (("ts_kd", "TS-KD"), ("mae", "MAE"), ("scratch", "scratch")):
        line, _, (bars,) = means(ax)[name].lines
        for place, n in enumerate((2, 4, 16)):
            values = runs.loc[(runs["arm"] == arm) & (runs["n_labelled"] == n), metric].to_numpy()
            assert line.get_ydata()[place] == pytest.approx(values.mean())
            assert abs(np.log2(line.get_xdata()[place] / n)) < 0.2, "ways stand beside the number, not on another one"
            (x0, low), (x1, high) = bars.get_segments()[place]
            assert x0 == x1 == pytest.approx(line.get_xdata()[place])
            spread = np.sqrt(((values - values.mean()) ** 2).sum() / 2)
            assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread))
        points = seeds(ax)[name]
        assert np.allclose(points.get_ydata(), runs.loc[runs["arm"] == arm, metric])
    assert ax.get_ylabel().startswith("Dice" if metric == "dice" else "Hausdorff 95")
    pd.testing.assert_frame_equal(runs, before)


def test_axis_has_the_numbers_of_labelled_fields(runs):
    ax = drawn(label_efficiency(runs))
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "4", "16"]
    assert list(ax.get_xticks()) == [2, 4, 16]
    assert len(ax.get_xticks(minor=True)) == 0
    x = [container.lines[0].get_xdata()[1] for container in ax.containers]
    assert len(set(x)) == 3
    assert x[1] == pytest.approx(4), "the middle one of three stands on the number"


def test_legend_lists_ways_as_their_lines_end(runs):
    runs.loc[runs["n_labelled"] == 16, "dice"] = runs["arm"].map({"mae": 0.9, "scratch": 0.8, "ts_kd": 0.7})
    figure = label_efficiency(runs)
    drawn(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["MAE", "scratch", "TS-KD"]
    assert legend.get_window_extent().x0 > figure.axes[0].get_window_extent().x1, "outside of the data"
    colors = [to_hex(handle.lines[0].get_color()) for handle in legend.legend_handles if hasattr(handle, "lines")]
    assert len(set(colors)) == len(colors)


def test_a_way_without_runs_at_a_number_and_a_single_seed(runs):
    runs = runs[~((runs["arm"] == "mae") & (runs["n_labelled"] == 4))]
    runs = runs[(runs["arm"] != "scratch") | (runs["seed"] == 0)]
    ax = drawn(label_efficiency(runs))
    assert len(means(ax)["MAE"].lines[0].get_xdata()) == 2
    segments = np.array(means(ax)["scratch"].lines[2][0].get_segments())
    assert np.array_equal(segments[:, 0], segments[:, 1]), "no spread is made up"


def test_one_number_of_labels_gives_rows():
    runs = table_of_runs(budgets=(4,))
    figure = label_efficiency(runs)
    ax = drawn(figure)
    assert not figure.legends
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["TS-KD", "MAE", "scratch"]
    low, high = ax.get_ylim()
    assert low > high, "the first way is on top"
    for place, (arm, name) in enumerate((("ts_kd", "TS-KD"), ("mae", "MAE"), ("scratch", "scratch"))):
        values = runs.loc[runs["arm"] == arm, "dice"].to_numpy()
        line, _, (bars,) = means(ax)[name].lines
        assert (line.get_xdata()[0], line.get_ydata()[0]) == (pytest.approx(values.mean()), place)
        (start, _), (end, _) = bars.get_segments()[0]
        assert end - start == pytest.approx(2 * values.std(ddof=1))
        assert np.allclose(seeds(ax)[name].get_xdata(), values)
    assert ax.get_xlabel() == "Dice"
    assert ax.get_title() == "4 labelled fields"


def test_ways_names_and_colours_can_be_chosen():
    runs = table_of_runs(arms=("ts_kd", "mine", "other"))
    ax = drawn(label_efficiency(runs, arms=["mine", "ts_kd"], names={"mine": "ours"}, palette={"ts_kd": "black"}))
    assert list(means(ax)) == ["ours", "TS-KD"]
    assert same_color(means(ax)["TS-KD"].lines[0].get_color(), "black")
    ax = drawn(label_efficiency(runs))
    assert list(means(ax)) == ["TS-KD", "mine", "other"]
    styles = {(line.get_color(), line.get_marker()) for line, *_ in (c.lines for c in ax.containers)}
    assert len({color for color, _ in styles}) == len({marker for _, marker in styles}) == 3


def test_every_way_of_compare_has_a_name_a_colour_and_a_marker():
    ax = drawn(label_efficiency(table_of_runs(arms=ARMS)))
    assert list(means(ax)) == ["TS-KD", "task-agnostic KD", "MAE", "MoCo v3", "ImageNet", "scratch"]
    lines = [container.lines[0] for container in ax.containers]
    assert len({to_hex(line.get_color()) for line in lines}) == len({line.get_marker() for line in lines}) == len(ARMS)


def test_saved(runs, tmp_path):
    import matplotlib.pyplot as plt

    figure = label_efficiency(runs, figsize=(5, 4), save=tmp_path / "new" / "plot.png")
    assert tuple(figure.get_size_inches()) == (5, 4)
    assert (tmp_path / "new" / "plot.png").stat().st_size > 1000
    assert not plt.fignum_exists(figure.number)


def test_bad_input(runs):
    with pytest.raises(TypeError, match=r"data is a list.*hn\.seg\.compare"):
        label_efficiency([1])
    with pytest.raises(KeyError, match="no column 'seed'"):
        label_efficiency(runs.drop(columns="seed"))
    for metric in ("iou", "arm", "seed"):
        with pytest.raises(
            KeyError, match=f"metric='{metric}' is no column of figures; data has .'dice', 'hausdorff95'"
        ):
            label_efficiency(runs, metric=metric)
    with pytest.raises(ValueError, match="no rows"):
        label_efficiency(runs[:0])
    with pytest.raises(KeyError, match=r"arms=\['mae', 'nolan'\]: data has no runs of \['nolan'\]"):
        label_efficiency(runs, arms=["mae", "nolan"])
    with pytest.raises(KeyError, match=r"arms=\[\]"):
        label_efficiency(runs, arms=[])
    with pytest.raises(ValueError, match="arm='scratch', n_labelled=2, seed=0 is there more than once"):
        label_efficiency(pd.concat([runs, runs]))
    with pytest.raises(ValueError, match="dice finite"):
        label_efficiency(runs.assign(dice=np.nan))
    with pytest.raises(ValueError, match="n_labelled must be at least 1"):
        label_efficiency(runs.assign(n_labelled=range(len(runs))))


@pytest.mark.parametrize("budgets", [(4,), (4, 16)])
def test_a_difference_that_is_nothing_is_not_blown_up(budgets) -> None:
    runs = table_of_runs(arms=("scratch", "ts_kd"), budgets=budgets, seeds=(0,))
    runs["dice"] = 0.85 + 1e-5 * np.arange(len(runs))
    ax = drawn(label_efficiency(runs))
    low, high = ax.get_xlim() if len(budgets) == 1 else ax.get_ylim()
    assert high - low == pytest.approx(0.05 * 0.85, rel=0.01)
    assert (low + high) / 2 == pytest.approx(0.85, abs=1e-3)
