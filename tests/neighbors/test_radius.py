from __future__ import annotations

import numpy as np
import pytest

from histoniche.neighbors import radius_for_density, radius_graph


@pytest.mark.parametrize("target", [5, 30, 80])
def test_mean_count_is_the_target(target: int) -> None:
    rng = np.random.default_rng(0)
    # Tissue with a hole, a dense and a sparse part: a count, not a model of the area, has to give the radius.
    xy = np.concatenate([rng.uniform(0, 300, (3000, 2)), rng.uniform([600, 0], [1200, 300], (1000, 2))])
    radius = radius_for_density(xy, target)
    assert radius_graph(xy, radius).counts.mean() == pytest.approx(target, rel=0.01)


def test_density_and_units() -> None:
    xy = np.random.default_rng(1).uniform(0, 500, (4000, 2))
    radius = radius_for_density(xy, 20)
    assert radius_for_density(xy * 2, 20) == pytest.approx(2 * radius, rel=0.01)
    sparse = radius_for_density(xy[:1000], 20)
    assert sparse > 1.8 * radius


def test_slides_that_overlap_in_space_do_not_add_up() -> None:
    xy = np.random.default_rng(2).uniform(0, 500, (4000, 2))
    groups = np.arange(4000) % 2
    radius = radius_for_density(xy, 20, groups=groups)
    assert radius_graph(xy, radius, groups=groups).counts.mean() == pytest.approx(20, rel=0.01)
    assert radius == pytest.approx(np.sqrt(2) * radius_for_density(xy, 20), rel=0.05)


def test_sample_depends_on_the_seed_alone() -> None:
    xy = np.random.default_rng(3).uniform(0, 5000, (50_000, 2))
    state = np.random.get_state()[1].copy()
    assert radius_for_density(xy, 50, seed=1) == radius_for_density(xy, 50, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert radius_graph(xy, radius_for_density(xy, 50)).counts.mean() == pytest.approx(50, rel=0.01)


def test_too_few_cells() -> None:
    with pytest.raises(ValueError, match="target_neighbors=50 needs more than 51 cells, there are 20"):
        radius_for_density(np.random.default_rng(4).uniform(size=(20, 2)), 50)
    xy = np.random.default_rng(4).uniform(size=(60, 2))
    with pytest.raises(ValueError, match="not reached inside the slides"):
        radius_for_density(xy, 40, groups=np.arange(60) % 4)
