from __future__ import annotations

import importlib.util
from pathlib import Path

import dask.array as da
import numpy as np
import pytest

from histoniche._sdata import check_inside, coordinates, image, open_target


@pytest.fixture(scope="module")
def readers():
    path = Path(__file__).parents[2] / "benchmarks" / "_readers.py"
    spec = importlib.util.spec_from_file_location("benchmark_readers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_xenium_pancreas(readers, data_dir):
    sdata = readers.read_xenium_pancreas(data_dir / "xenium_pancreas")
    table = sdata.tables["table"]
    assert table.shape == (140702, 377)
    assert len(table.obs["graph_cluster"].cat.categories) == 28
    assert list(table.obs["graph_cluster"].cat.categories[:3]) == ["1", "2", "3"]
    assert table.obs["graph_cluster"].isna().sum() == 508
    found = image(sdata, "morphology", n_channels=None)
    assert found.um_per_px == 0.425
    assert found.pyramid[0].shape == (4, 6885, 17078)
    assert isinstance(found.pyramid[0], da.Array)
    names = list(sdata["morphology"]["scale0"]["image"].coords["c"].values)
    assert names == ["DAPI", "boundary (ATP1A1/CD45/E-Cadherin)", "18S rRNA", "alphaSMA/vimentin"]
    # Nuclei shine in DAPI where the table says that cells are.
    px = check_inside(found, coordinates(open_target(sdata, table_key=None, copy=False)), table.obs_names)
    inside = (np.abs(px - [7000, 3000]) < 500).all(axis=1)
    dapi = found.pyramid[0][0, 2500:3500, 6500:7500].compute()
    at = np.floor(px[inside] - [6500, 2500]).astype(int)
    assert dapi[at[:, 1], at[:, 0]].mean() > 2 * dapi.mean()


def test_visium_hd_kidney(readers, data_dir):
    sdata = readers.read_visium_hd_kidney(data_dir / "visium_hd_kidney")
    found = image(sdata, None)
    assert found.um_per_px == pytest.approx(2.008)
    xy = coordinates(open_target(sdata, table_key=None, copy=False))
    check_inside(found, xy, sdata.tables["table"].obs_names)
    step = np.hypot(*np.diff(xy[:2], axis=0)[0])
    assert step == pytest.approx(8.0, abs=0.2), "bins are 8 um apart"
