"""The pieces of a segmentation student's training."""

from __future__ import annotations

import numpy as np
import pytest

from histoniche.seg import Field, maps_of_labels
from histoniche.seg import _fit as module
from histoniche.seg._fit import Stacks, _picker


def _stacks(fields: list[Field], n_taught: int) -> Stacks:
    maps = [np.full((2, 96, 96), 0.25, dtype=np.float32)] * n_taught
    return Stacks(["DAPI"], fields, maps)


def test_stacks_hold_the_teachers_maps_or_those_of_labels(fields: list[Field]) -> None:
    stacks = _stacks(fields, 4)
    assert [stacks.labelled(row) for row in range(6)] == [False] * 4 + [True] * 2
    assert (stacks[1][1:] == 0.25).all()
    np.testing.assert_array_equal(stacks[5][1:], maps_of_labels(fields[5].read_labels()))
    np.testing.assert_array_equal(stacks[5][:1], fields[5].read(["DAPI"]))


def test_what_does_not_fit_into_memory_is_read_again(fields: list[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    one = 3 * 96 * 96 * 4
    monkeypatch.setattr(module, "_KEPT_BYTES", 2 * one)
    stacks = _stacks(fields, 0)
    whole = [stacks[row].copy() for row in range(6)]
    assert len(stacks._kept) == 2
    for row in range(6):
        np.testing.assert_array_equal(stacks[row], whole[row])


@pytest.mark.parametrize(
    ("n_taught", "share", "labelled"), [(4, 0.25, 2), (4, 0.0, 1), (4, 1.0, 7), (6, 0.5, 0), (0, 0.5, 8)]
)
def test_batches_mix_the_teachers_fields_and_labelled_ones(
    fields: list[Field], n_taught: int, share: float, labelled: int
) -> None:
    stacks = _stacks(fields, n_taught)
    pick = _picker(stacks, 8, share, seed=0)
    seen = np.concatenate([pick(step) for step in range(30)])
    for step in range(5):
        rows = pick(step)
        assert len(rows) == 8
        assert sum(stacks.labelled(row) for row in rows) == labelled
        np.testing.assert_array_equal(rows, pick(step))
    counts = np.bincount(seen, minlength=6)
    for part in (counts[:n_taught], counts[n_taught:] if labelled else []):
        if len(part):
            assert max(part) - min(part) <= 0.2 * max(part)


def test_fingerprint_follows_pixels_and_targets(fields: list[Field]) -> None:
    assert _stacks(fields, 2).fingerprint() == _stacks(fields, 2).fingerprint()
    assert _stacks(fields, 2).fingerprint() != _stacks(fields, 3).fingerprint()
    assert _stacks(fields[:3], 2).fingerprint() != _stacks(fields[:2], 2).fingerprint()
