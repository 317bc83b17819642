from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from histoniche.metrics import (
    adjusted_rand,
    block_bootstrap,
    bootstrap_agreement,
    composition_jsd,
    normalized_mutual_info,
)
from histoniche.metrics._labels import contingency
from histoniche.metrics._tables import adjusted_rand_of_tables, hungarian_partners, normalized_mutual_info_of_tables


@pytest.fixture(scope="module")
def tissue():
    """Patchy niches, so that some are absent from some resamples; a student, and clusters without names."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 900, (700, 2))
    square = (xy // 300).astype(int)
    niche = np.where(rng.random(700) < 0.9, (square @ [1, 3]) % 5, rng.integers(0, 5, 700))
    niche[:2] = 5  # a rare niche
    student = np.where(rng.random(700) < 0.7, niche, rng.integers(0, 5, 700))
    cluster = np.where(rng.random(700) < 0.6, (niche * 7 + 3) % 8, rng.integers(0, 8, 700))
    types = np.array(["a", "b", "c"])[np.where(rng.random(700) < 0.6, niche % 3, rng.integers(0, 3, 700))]
    return xy, niche, student, cluster, types


def test_the_same_as_repeating_cells(tissue):
    xy, niche, student, cluster, types = tissue
    options = {"block_um": 200.0, "n_boot": 40, "seed": 3}
    found = bootstrap_agreement(
        niche, {"student": student, "leiden": cluster}, xy, cell_types=types, unaligned=["leiden"], **options
    )
    for name, labels, match in (("student", student, "identity"), ("leiden", cluster, "hungarian")):
        slow = {
            "ari": lambda rows, labels=labels: adjusted_rand(niche[rows], labels[rows]),
            "nmi": lambda rows, labels=labels: normalized_mutual_info(niche[rows], labels[rows]),
            "jsd": lambda rows, labels=labels, match=match: composition_jsd(
                niche[rows], labels[rows], types[rows], match=match
            ),
        }
        assert list(found[name]) == list(slow)
        for figure, statistic in slow.items():
            expected = block_bootstrap(xy, statistic, **options)
            assert found[name][figure].estimate == pytest.approx(expected.estimate)
            assert np.allclose(found[name][figure].replicates, expected.replicates, rtol=1e-9, atol=1e-12)
            assert (found[name][figure].low, found[name][figure].high) == pytest.approx((expected.low, expected.high))
    gain = found["student"]["ari"].minus(found["leiden"]["ari"])
    expected = block_bootstrap(
        xy,
        lambda rows: adjusted_rand(niche[rows], student[rows]) - adjusted_rand(niche[rows], cluster[rows]),
        **options,
    )
    assert np.allclose(gain.replicates, expected.replicates)


def test_names_of_any_kind_and_no_cell_types(tissue):
    xy, niche, student, _, types = tissue
    names = np.array([f"niche {k}" for k in range(6)])
    options = {"block_um": 200.0, "n_boot": 5}
    numbers = bootstrap_agreement(niche, {"m": student}, xy, cell_types=types, **options)["m"]
    words = bootstrap_agreement(
        pd.Categorical(names[niche]), {"m": pd.Series(names[student])}, xy, cell_types=types, **options
    )["m"]
    assert words["jsd"].low == pytest.approx(numbers["jsd"].low)
    assert list(bootstrap_agreement(niche, {"m": student}, xy, **options)["m"]) == ["ari", "nmi"]


def test_slides_are_cut_apart(tissue):
    xy, niche, student, *_ = tissue
    one = bootstrap_agreement(niche, {"m": student}, xy, block_um=300.0, n_boot=20)["m"]["ari"]
    slide = (xy[:, 0] > 420).astype(int)
    two = bootstrap_agreement(niche, {"m": student}, xy, block_um=300.0, n_boot=20, groups=slide)["m"]["ari"]
    assert one.estimate == two.estimate
    assert not np.array_equal(one.replicates, two.replicates)


@pytest.mark.parametrize("seed", range(30))
def test_odd_tables(seed):
    """A few cells, empty rows and columns, constant and equal partitions: as scikit-learn has it."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    a = rng.integers(0, rng.integers(1, 4), n)
    b = a if seed % 3 == 0 else rng.integers(0, rng.integers(1, 4), n)
    table = contingency(a, b, 5, 4)
    assert adjusted_rand_of_tables(table[None])[0] == pytest.approx(adjusted_rand(a, b), abs=1e-12)
    assert normalized_mutual_info_of_tables(table[None])[0] == pytest.approx(normalized_mutual_info(a, b), abs=1e-9)


def test_partners_leave_out_what_no_cell_has():
    tables = np.array([[[5, 1, 0], [0, 0, 0], [9, 0, 0]], [[0, 0, 0], [0, 0, 3], [0, 2, 0]]])
    assert hungarian_partners(tables).tolist() == [[1, -1, 0], [-1, 2, 1]]


def test_bad_input(tissue):
    xy, niche, student, _, types = tissue
    with pytest.raises(ValueError, match=r"labels\['m'\] has 3 cells"):
        bootstrap_agreement(niche, {"m": student[:3]}, xy, block_um=100.0)
    with pytest.raises(ValueError, match="xy has 3"):
        bootstrap_agreement(niche, {"m": student}, xy[:3], block_um=100.0)
    with pytest.raises(ValueError, match="cell_types has 3"):
        bootstrap_agreement(niche, {"m": student}, xy, cell_types=types[:3], block_um=100.0)
    with pytest.raises(ValueError, match="by name"):
        bootstrap_agreement(niche, {"m": student.astype(str)}, xy, cell_types=types, block_um=100.0)
    with pytest.raises(ValueError, match="confidence=2"):
        bootstrap_agreement(niche, {"m": student}, xy, block_um=100.0, confidence=2)
