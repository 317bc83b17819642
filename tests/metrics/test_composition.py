from __future__ import annotations

from math import log2

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from histoniche.metrics import composition, composition_jsd


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    niche = rng.integers(0, 4, 300)
    predicted = np.where(rng.random(300) < 0.7, niche, rng.integers(0, 4, 300))
    types = np.array(["T", "B", "acinar", "duct", "islet"])[
        (niche + (rng.random(300) < 0.4) * rng.integers(0, 5, 300)) % 5
    ]
    return niche, predicted, types


def brute_jsd(reference, labels, types, partner):
    """The definition, term by term."""
    total = 0.0
    names = sorted(set(types))
    for niche in set(reference.tolist()):
        weight = sum(r == niche for r in reference) / len(reference)
        ours = [t for r, t in zip(reference, types, strict=True) if r == niche]
        theirs = [t for y, t in zip(labels, types, strict=True) if y == partner.get(niche)]
        if not theirs:
            total += weight
            continue
        for name in names:
            p, q = ours.count(name) / len(ours), theirs.count(name) / len(theirs)
            m = (p + q) / 2
            total += weight * 0.5 * ((p * log2(p / m) if p else 0) + (q * log2(q / m) if q else 0))
    return total


def test_composition_counts_every_cell(cells):
    niche, _, types = cells
    found = composition(niche, types, 6)
    names = sorted(set(types))
    for k in range(4):
        for t, name in enumerate(names):
            assert found[k, t] == pytest.approx(np.mean(types[niche == k] == name))
    assert np.allclose(found[:4].sum(1), 1)
    assert np.isnan(found[4:]).all()


def test_composition_checks_labels():
    with pytest.raises(ValueError, match="from 0 to 1"):
        composition(np.array([0, 2]), np.array(["a", "b"]), 2)
    with pytest.raises(ValueError, match="integers"):
        composition(np.array(["0", "1"]), np.array(["a", "b"]), 2)
    with pytest.raises(ValueError, match="same cells"):
        composition(np.array([0]), np.array(["a", "b"]), 2)


def test_jsd_is_the_definition(cells):
    niche, predicted, types = cells
    same = {k: k for k in range(4)}
    assert composition_jsd(niche, predicted, types) == pytest.approx(brute_jsd(niche, predicted, types.tolist(), same))
    p, q = composition(niche, types, 4), composition(predicted, types, 4)
    scipys = sum(np.mean(niche == k) * jensenshannon(p[k], q[k], base=2) ** 2 for k in range(4))
    assert composition_jsd(niche, predicted, types) == pytest.approx(scipys)


def test_jsd_hungarian_does_not_see_names(cells):
    niche, predicted, types = cells
    names = np.array([12, 3, 40, 7])
    aligned = composition_jsd(niche, predicted, types)
    assert composition_jsd(niche, names[predicted], types, match="hungarian") == pytest.approx(aligned)
    order = np.random.default_rng(1).permutation(len(niche))
    assert composition_jsd(niche[order], predicted[order], types[order]) == pytest.approx(aligned)
    assert composition_jsd(niche.astype(str), predicted.astype(str), types) == pytest.approx(aligned)


def test_jsd_limits(cells):
    niche, _, types = cells
    assert composition_jsd(niche, niche, types) == 0
    # Every niche is one type and the prediction swaps them: nothing in common.
    a = np.array([0, 0, 1, 1])
    assert composition_jsd(a, 1 - a, a) == pytest.approx(1)
    assert composition_jsd(a, 1 - a, a, match="hungarian") == 0


def test_niche_without_match_counts_one(cells):
    niche, predicted, types = cells
    merged = np.where(predicted == 3, 2, predicted)
    same = {k: k for k in range(4)}
    assert composition_jsd(niche, merged, types) == pytest.approx(brute_jsd(niche, merged, types.tolist(), same))
    assert composition_jsd(niche, merged, types) >= np.mean(niche == 3)
    one = np.zeros_like(niche)
    largest = np.bincount(niche).argmax()
    expected = brute_jsd(niche, one, types.tolist(), {int(largest): 0})
    assert composition_jsd(niche, one, types, match="hungarian") == pytest.approx(expected)


def test_jsd_bad_input(cells):
    niche, predicted, types = cells
    with pytest.raises(ValueError, match="'nearest' is unknown"):
        composition_jsd(niche, predicted, types, match="nearest")
    with pytest.raises(ValueError, match="compared by name"):
        composition_jsd(niche.astype(str), predicted, types)
    with pytest.raises(ValueError, match="cell_types has 1"):
        composition_jsd(niche, predicted, types[:1])
