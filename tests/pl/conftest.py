from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, TableModel
from spatialdata.transformations import Affine

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def make_table(n=400, seed=0):
    rng = np.random.default_rng(seed)
    xy = rng.uniform([100, 50], [500, 250], (n, 2))
    niche = (xy[:, 0] > 300).astype(int) + (xy[:, 1] > 150)
    student = np.where(rng.random(n) < 0.8, niche, rng.integers(0, 3, n))
    names = ["0", "1", "2"]
    y = xy[:, 1]
    return AnnData(
        obs=pd.DataFrame(
            {
                "niche_teacher": pd.Categorical.from_codes(niche, names),
                "niche": pd.Categorical.from_codes(student, names),
                "niche_confidence": rng.random(n).astype(np.float32),
                "cell_type": pd.Categorical(np.array(["B", "T", "duct"])[rng.integers(0, 3, n)]),
                "split": pd.Categorical(np.where(y < 100, "train", np.where((y > 120) & (y < 180), "test", "buffer"))),
            },
            index=[f"c{i}" for i in range(n)],
        ),
        obsm={"spatial": xy},
        uns={"niche_history": {"teacher": {"loss": np.linspace(2, 1, 100), "effective_niches": np.full(100, 2.5)}}},
    )


@pytest.fixture
def table():
    return make_table()


def make_image(um_per_px, shift):
    """RGB pyramid whose red channel holds x and whose green channel holds y, both in units of 4 px."""
    height, width = 800, 1000
    pixels = np.zeros((3, height, width), dtype=np.uint8)
    pixels[0] = np.arange(width)[None, :] // 4
    pixels[1] = np.arange(height)[:, None] // 4
    matrix = [[um_per_px, 0, shift], [0, um_per_px, shift], [0, 0, 1]]
    return Image2DModel.parse(
        pixels, dims=("c", "y", "x"), scale_factors=[2, 2],
        transformations={"um": Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))},
    )  # fmt: skip


@pytest.fixture
def table_of():
    return make_table


@pytest.fixture
def image_at():
    return lambda shift: make_image(0.6, shift)


@pytest.fixture
def sdata(table):
    """Image of 1000 x 800 px at 0.6 um/px that begins at (-20, -20) um."""
    return SpatialData.init_from_elements({"he": make_image(0.6, -20.0), "table": TableModel.parse(table)})


@pytest.fixture
def two_slides():
    table = make_table()
    left = table.obsm["spatial"][:, 0] < 300
    table.obsm["spatial"][~left, 0] -= 100
    table.obs["region"] = pd.Categorical(np.where(left, "liver", "lung"))
    table.obs["cell_id"] = np.arange(table.n_obs)
    table.uns["spatialdata_attrs"] = {"region": ["liver", "lung"], "region_key": "region", "instance_key": "cell_id"}
    return table
