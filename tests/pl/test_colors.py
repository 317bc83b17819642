from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from histoniche.pl._colors import niche_palette


@pytest.mark.parametrize("n", [0, 1, 10, 24, 60])
def test_all_different_and_valid(n):
    colors = niche_palette(n)
    assert len(colors) == len(set(colors)) == n
    assert all(re.fullmatch(r"#[0-9A-F]{6}", color) for color in colors)


def test_color_depends_on_the_number_alone():
    assert niche_palette(40)[:7] == niche_palette(7)
    assert niche_palette(60)[:40] == niche_palette(40)


def test_told_apart_with_normal_and_with_red_green_blind_vision():
    """Distances in linear RGB after the simulation of Machado 2009."""
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    rgb = np.array([to_rgb(c) for c in niche_palette(10)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for seen in (linear, np.clip(linear @ deutan.T, 0, 1)):
        encoded = seen ** (1 / 2.2)
        distance = np.linalg.norm(encoded[:, None] - encoded[None], axis=2) + np.eye(10)
        assert distance.min() > 0.1
