"""Matching of objects against loops over all pairs and all assignments."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from histoniche.seg.metrics import average_precision, match_instances, panoptic_quality


def table_of_iou(predicted, truth):
    """IoU of every predicted with every true object, by sets of pixels."""
    table = {}
    for i in np.unique(predicted[predicted > 0]).tolist():
        for j in np.unique(truth[truth > 0]).tolist():
            first, second = set(np.flatnonzero(predicted == i)), set(np.flatnonzero(truth == j))
            table[i, j] = len(first & second) / len(first | second)
    return table


def best_matching(table, least_iou):
    """Most pairs, then the largest sum of IoU, over all assignments."""
    rows, columns = (sorted({key[side] for key in table}) for side in (0, 1))
    best = []
    for order in permutations([*columns, *[None] * len(rows)], len(rows)):
        pairs = [(i, j) for i, j in zip(rows, order, strict=True) if j is not None and table[i, j] > least_iou]
        if (len(pairs), sum(table[p] for p in pairs)) > (len(best), sum(table[p] for p in best)):
            best = pairs
    return best


@pytest.mark.parametrize("least_iou", [0, 0.2, 0.35, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(12))
def test_all_assignments(seed, least_iou, pair_of):
    predicted, truth = pair_of(seed, size=10, n=4)
    table = table_of_iou(predicted, truth)
    best = best_matching(table, least_iou)
    found = match_instances(predicted, truth, least_iou=least_iou)
    pairs = list(zip(found.predicted.tolist(), found.truth.tolist(), strict=True))
    assert len(set(found.predicted)) == len(set(found.truth)) == len(pairs)
    assert found.iou == pytest.approx([table[pair] for pair in pairs])
    n_predicted, n_true = (len({key[side] for key in table}) for side in (0, 1))
    assert (found.tp, found.fp, found.fn) == (len(best), n_predicted - len(best), n_true - len(best))
    assert found.iou.sum() == pytest.approx(sum(table[pair] for pair in best))
    if least_iou >= 0.5:
        assert sorted(pairs) == sorted(key for key, iou in table.items() if iou > least_iou)
    total = n_predicted + n_true - len(best)
    assert average_precision(predicted, truth, least_iou=least_iou) == pytest.approx(len(best) / total)


@pytest.mark.parametrize("seed", range(12))
def test_panoptic_quality_by_its_definition(seed, pair_of):
    predicted, truth = pair_of(seed)
    table = table_of_iou(predicted, truth)
    hits = [iou for iou in table.values() if iou > 0.5]
    n_predicted, n_true = (len({key[side] for key in table}) for side in (0, 1))
    expected = sum(hits) / (len(hits) + (n_predicted - len(hits)) / 2 + (n_true - len(hits)) / 2)
    assert panoptic_quality(predicted, truth) == pytest.approx(expected)
    assert panoptic_quality(truth, predicted) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_quality_of_torchmetrics(seed, pair_of):
    import torch
    from torchmetrics.functional import detection

    predicted, truth = pair_of(seed)
    # Category 1 for objects, 0 (a "stuff") for background; the second plane numbers the objects.
    images = [
        torch.from_numpy(np.stack([image > 0, image], axis=-1).astype(np.int64))[None] for image in (predicted, truth)
    ]
    theirs = detection.panoptic_quality(*images, things={1}, stuffs={0}, return_per_class=True)
    assert panoptic_quality(predicted, truth) == pytest.approx(theirs.ravel()[0].item(), rel=1e-5)


def test_hand_made():
    truth = np.array([[1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 3, 3, 0, 0]])
    guess = np.array([[1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 0, 0, 9, 9]])
    found = match_instances(guess, truth, least_iou=0.5)
    assert (found.tp, found.fp, found.fn, found.n_predicted, found.n_true) == (2, 1, 1, 3, 3)
    assert found.iou.tolist() == [3 / 4, 4 / 5]
    assert average_precision(guess, truth) == 2 / 4
    assert average_precision(guess, truth, least_iou=0.75) == 1 / 5  # 0.75 is reached by one, and exceeded by the other
    assert panoptic_quality(guess, truth) == pytest.approx((3 / 4 + 4 / 5) / 3)


def test_an_iou_of_one_half_is_no_hit():
    """Two halves merged have an IoU of one half with both: neither is found, as in the challenge of BBBC038."""
    truth, merged = np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 1]])
    assert average_precision(merged, truth) == panoptic_quality(merged, truth) == 0
    found = match_instances(merged, truth, least_iou=0.49)
    assert (found.tp, found.fp, found.fn) == (1, 0, 1)


def test_low_thresholds_take_the_most_pairs():
    """Greedy matching by IoU would give the first true object to the second predicted one, and leave two unmatched."""
    truth = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    guess = np.array([[5, 5, 4, 4, 4, 4, 4, 0, 0, 0]])
    iou = table_of_iou(guess, truth)
    assert iou[4, 1] > iou[5, 1] > 0.2
    assert iou[4, 1] > iou[4, 2] > 0.2
    found = match_instances(guess, truth, least_iou=0.2)
    assert list(zip(found.predicted, found.truth, strict=True)) == [(4, 2), (5, 1)]


def test_numbers_do_not_matter(pair_of, relabel):
    predicted, truth = pair_of(4)
    for least_iou in (0.1, 0.5):
        first = match_instances(predicted, truth, least_iou=least_iou)
        second = match_instances(relabel(predicted, 1), relabel(truth, 2), least_iou=least_iou)
        assert first.iou.size
        assert np.allclose(np.sort(first.iou), np.sort(second.iou))
        assert (first.tp, first.fp, first.fn) == (second.tp, second.fp, second.fn)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_identical_is_perfect(dtype, pair_of, relabel):
    truth = pair_of(2)[1].astype(dtype)
    found = match_instances(relabel(truth), truth)
    assert found.tp == len(np.unique(truth)) - 1
    assert (found.fp, found.fn) == (0, 0)
    assert average_precision(truth, truth, least_iou=0.99) == panoptic_quality(relabel(truth), truth) == 1


def test_empty():
    empty, full = np.zeros((3, 3), dtype=int), np.full((3, 3), 4)
    assert average_precision(empty, empty) == panoptic_quality(empty, empty) == 1
    assert average_precision(full, full) == panoptic_quality(full, full) == 1  # no background at all
    for pair in ((empty, full), (full, empty)):
        assert average_precision(*pair) == panoptic_quality(*pair) == 0
        for least_iou in (0.1, 0.5):
            found = match_instances(*pair, least_iou=least_iou)
            assert (found.tp, found.fp + found.fn) == (0, 1)


def test_huge_labels_and_many_objects_need_little():
    """Memory for all pairs of 40,000 objects would be 12 GB."""
    truth = np.arange(1, 40_001).reshape(200, 200).repeat(2, axis=0).repeat(2, axis=1) * 10**12
    for least_iou in (0.1, 0.5):
        found = match_instances(truth[::-1], truth, least_iou=least_iou)
        assert (found.tp, found.fp, found.fn) == (40_000, 0, 0)
