from __future__ import annotations

from itertools import permutations
from math import comb, exp, log

import numpy as np
import pandas as pd
import pytest

from histoniche.metrics import adjusted_rand, effective_number, match_labels, normalized_mutual_info


@pytest.fixture(params=[0, 1, 2])
def pair(request):
    rng = np.random.default_rng(request.param)
    a = rng.integers(0, 4, 60)
    b = np.where(rng.random(60) < 0.5, a, rng.integers(0, 6, 60))
    return a, b


def brute_adjusted_rand(a, b):
    """Hubert and Arabie by counting pairs of cells."""
    both = in_a = in_b = 0
    n = len(a)
    for i in range(n):
        for j in range(i + 1, n):
            same_a, same_b = a[i] == a[j], b[i] == b[j]
            both += same_a and same_b
            in_a += same_a
            in_b += same_b
    expected = in_a * in_b / comb(n, 2)
    return (both - expected) / ((in_a + in_b) / 2 - expected)


def brute_nmi(a, b):
    n = len(a)
    mutual = 0.0
    for x in set(a):
        for y in set(b):
            p = sum(1 for i, j in zip(a, b, strict=True) if i == x and j == y) / n
            if p:
                mutual += p * log(p / (np.mean(a == x) * np.mean(b == y)))
    entropy = [-sum(np.mean(v == x) * log(np.mean(v == x)) for x in set(v)) for v in (a, b)]
    return mutual / (sum(entropy) / 2)


def test_adjusted_rand_against_pair_counting(pair):
    assert adjusted_rand(*pair) == pytest.approx(brute_adjusted_rand(*pair))


def test_normalized_mutual_info_against_sums(pair):
    assert normalized_mutual_info(*pair) == pytest.approx(brute_nmi(*pair))


@pytest.mark.parametrize("metric", [adjusted_rand, normalized_mutual_info])
def test_invariant_to_names_and_order_of_cells(pair, metric):
    a, b = pair
    names = np.array(["f", "a", "x", "c", "0", "q"])
    order = np.random.default_rng(5).permutation(len(a))
    assert metric(a, names[b]) == pytest.approx(metric(a, b))
    assert metric(a[order], pd.Categorical(b[order])) == pytest.approx(metric(a, b))
    assert metric(b, a) == pytest.approx(metric(a, b))
    assert metric(a, names[a]) == pytest.approx(1)


@pytest.mark.parametrize("metric", [adjusted_rand, normalized_mutual_info])
def test_bad_labels(metric):
    with pytest.raises(ValueError, match="2 cells, labels has 3"):
        metric([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="labels is missing for 1 of 2"):
        metric(["a", "b"], pd.Categorical(["a", None]))
    with pytest.raises(ValueError, match="no cells"):
        metric([], [])
    with pytest.raises(ValueError, match="shape"):
        metric(np.zeros((3, 2), int), [0, 1, 2])


def test_effective_number():
    assert effective_number(np.repeat([0, 1, 2, 3], 5)) == pytest.approx(4)
    assert effective_number(np.zeros(7, dtype=int)) == pytest.approx(1)
    assert effective_number(np.array(["b", "a", "b", "b"])) == pytest.approx(exp(-0.25 * log(0.25) - 0.75 * log(0.75)))
    # The mean over cells comes first: certain cells in different niches are as diverse as undecided ones.
    assert effective_number(np.eye(3, dtype=np.float32)) == pytest.approx(3)
    assert effective_number(np.array([0.5, 0.5, 0.0])) == pytest.approx(2)
    assert effective_number(np.array([[0.2, 0.8], [0.4, 0.6]])) == pytest.approx(effective_number(np.array([0.3, 0.7])))


@pytest.mark.parametrize(
    "bad", [np.array([[2.0, -1.0]]), np.array([1.0, 2.0]), np.array([np.nan, 1.0]), np.empty((0, 3))]
)
def test_effective_number_wants_probabilities(bad):
    with pytest.raises(ValueError, match="values"):
        effective_number(bad)
    with pytest.raises(ValueError, match="empty"):
        effective_number(np.array([], dtype=int))


@pytest.mark.parametrize("seed", range(4))
def test_match_labels_is_the_best_of_all_assignments(seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 4, 50)
    b = np.where(rng.random(50) < 0.5, (a + 1) % 4, rng.integers(0, 4, 50))
    found = match_labels(a, b)
    agreement = sum(found[y] == x for x, y in zip(a, b, strict=True))
    best = max(sum(order[y] == x for x, y in zip(a, b, strict=True)) for order in permutations(range(4)))
    assert agreement == best
    assert sorted(found.values()) == [0, 1, 2, 3]


def test_match_labels_with_other_numbers_and_names():
    reference = np.array(["0", "0", "0", "1", "1", "2"])
    assert match_labels(reference, [7, 7, 7, 7, 9, 9]) == {7: "0", 9: "1"}
    more = match_labels(["a", "a", "b", "b"], [0, 1, 2, 2])
    assert more[2] == "b"
    assert len(more) == 2
