"""The table of all metrics, against the metrics one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from histoniche.seg import metrics
from histoniche.seg.metrics import evaluate

COLUMNS = ["dice", "hausdorff95", "boundary_f", "ap50", "ap75", "pq", "n_true", "n_predicted", "missed"]


def test_one_row_an_image(pair_of):
    pairs = [pair_of(seed) for seed in range(3)]
    table = evaluate(iter(pairs), names=["a", "b", "c"], um_per_px=[0.5, 1, 2], tolerance_px=1)
    assert list(table.columns) == COLUMNS
    assert list(table.index) == ["a", "b", "c"]
    assert table.index.name == "image"
    for (predicted, truth), um_per_px, (_, row) in zip(pairs, (0.5, 1, 2), table.iterrows(), strict=True):
        assert row["dice"] == metrics.dice(predicted, truth)
        assert row["hausdorff95"] == metrics.hausdorff95(predicted, truth, um_per_px=um_per_px)
        assert row["boundary_f"] == metrics.boundary_f(predicted, truth, tolerance_px=1)
        assert row["ap50"] == metrics.average_precision(predicted, truth)
        assert row["ap75"] == metrics.average_precision(predicted, truth, least_iou=0.75)
        assert row["pq"] == metrics.panoptic_quality(predicted, truth)
        assert row["n_predicted"] == len(np.unique(predicted)) - 1
        assert row["n_true"] == len(np.unique(truth)) - 1
        assert not row["missed"]
    assert table["missed"].dtype == bool
    assert pd.api.types.is_integer_dtype(table["n_true"])


def test_only_a_region_is_measured(pair_of):
    predicted, truth = pair_of(0)
    region = np.zeros(truth.shape, dtype=bool)
    region[:, : truth.shape[1] // 2] = True
    inside = [np.where(region, image, 0) for image in (predicted, truth)]
    table = evaluate([(predicted, truth), (predicted, truth)], regions=[region, None])
    pd.testing.assert_frame_equal(table.iloc[:1], evaluate([inside]))
    pd.testing.assert_series_equal(table.iloc[1], evaluate([(predicted, truth)]).iloc[0], check_names=False)
    assert table["n_true"].iloc[0] < table["n_true"].iloc[1]
    with pytest.raises(ValueError, match="regions has 1 entries for 2 pairs"):
        evaluate([(predicted, truth)] * 2, regions=[region])
    for wrong in (region[1:], region.astype(int)):
        with pytest.raises(ValueError, match=r"Image '0': its region is .* a mask \(True, False\)"):
            evaluate([(predicted, truth)], regions=[wrong])


def test_an_empty_prediction_is_missed_and_counts():
    one, empty = np.zeros((30, 40), dtype=int), np.zeros((30, 40), dtype=int)
    one[5:9, 5:9] = 1
    table = evaluate([(empty, one), (empty, empty), (one, empty), (one, one)], um_per_px=2)
    assert list(table.index) == ["0", "1", "2", "3"]
    assert table["missed"].tolist() == [True, False, False, False]
    assert table["hausdorff95"].tolist() == [100, 0, 100, 0]
    for column in ("dice", "boundary_f", "ap50", "ap75", "pq"):
        assert table[column].tolist() == [0, 1, 0, 1]
    assert np.isfinite(table.mean()).all()


def test_bad_input(pair_of):
    pair = pair_of(0)
    with pytest.raises(ValueError, match="no pair"):
        evaluate([])
    with pytest.raises(ValueError, match="names has 1 entries for 2 pairs"):
        evaluate([pair, pair], names=["a"])
    with pytest.raises(ValueError, match="um_per_px has 3 entries for 2 pairs"):
        evaluate([pair, pair], um_per_px=[1, 1, 1])
    with pytest.raises(ValueError, match="names has 'a' more than once"):
        evaluate([pair, pair], names=["a", "a"])
    with pytest.raises(ValueError, match="Image 'b': um_per_px=0 must be positive"):
        evaluate([pair, pair], names=["a", "b"], um_per_px=[1, 0])
    with pytest.raises(ValueError, match="tolerance_px=-1"):
        evaluate([pair], tolerance_px=-1)
    with pytest.raises(TypeError, match="Image 'b': predicted has the type float64"):
        evaluate([pair, (pair[0] / 2, pair[1])], names=["a", "b"])
    with pytest.raises(ValueError, match=r"Image '1': predicted \(14, 14\) and truth \(13, 14\) differ"):
        evaluate([pair, (pair[0], pair[1][:-1])])
