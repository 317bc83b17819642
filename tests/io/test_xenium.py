from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from spatialdata import get_centroids, read_zarr, transform
from spatialdata.transformations import get_transformation

from histoniche._sdata import coordinates, image, open_target
from histoniche.io import read_xenium

PIXEL_SIZE = 0.2125


def complete(toy, folder, version="1.7.0.0"):
    """The toy bundle with the two files that it lacks: specifications, and the cell identifiers in zarr."""
    shutil.copytree(toy, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    specs = {"pixel_size": PIXEL_SIZE, "analysis_sw_version": f"xenium-{version}"}
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    ids = pd.read_parquet(folder / "cells.parquet")["cell_id"].astype(str)
    letters = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
    prefix = [int(cell.split("-")[0].translate(letters), 16) for cell in ids]
    with zarr.storage.ZipStore(folder / "cells.zarr.zip", mode="w") as store:
        root = zarr.create_group(store=store, zarr_format=2)
        root.create_array("cell_id", data=np.column_stack([prefix, np.ones(len(ids))]).astype(np.uint32))
        if version >= "1.3":
            root.create_array("seg_mask_value", data=np.arange(1, len(ids) + 1, dtype=np.uint32))
        names = {"column_names": ["z_level"]}
        root.create_array("cell_summary", data=np.zeros((len(ids), 1)), attributes=names)
    return folder


@pytest.fixture(scope="module")
def bundle(data_dir, tmp_path_factory):
    return complete(data_dir / "toy_bundles" / "xenium", tmp_path_factory.mktemp("xenium") / "outs")


@pytest.fixture(scope="module")
def sdata(bundle):
    return read_xenium(bundle)


def test_centroids_are_those_of_the_vendor(bundle, sdata):
    with gzip.open(bundle / "cells.csv.gz") as file:
        cells = pd.read_csv(file).set_index("cell_id")
    table = sdata.tables["table"]
    expected = cells.loc[table.obs["cell_id"].astype(str), ["x_centroid", "y_centroid"]].to_numpy()
    assert np.allclose(table.obsm["spatial"], expected, atol=1e-5)
    assert np.array_equal(coordinates(open_target(sdata, table_key=None, copy=False)), table.obsm["spatial"])


def test_counts_are_raw_counts_of_genes(sdata):
    table = sdata.tables["table"]
    assert table.shape == (526, 27)
    assert (table.X.data == np.round(table.X.data)).all()
    assert set(table.var["feature_types"]) == {"Gene Expression"}


@pytest.mark.parametrize("region", ["cell_boundaries", "nucleus_boundaries"])
def test_polygons_lie_in_um_where_the_cells_are(sdata, region):
    table = sdata.tables["table"]
    centroids = get_centroids(sdata.shapes[region], coordinate_system="um").compute()
    centroids = centroids.reindex(table.obs["cell_id"].astype(str))[["x", "y"]].to_numpy()
    distance = np.hypot(*(centroids - table.obsm["spatial"]).T)
    assert np.median(distance) < 2 if region == "cell_boundaries" else np.median(distance) < 4
    if region == "cell_boundaries":
        assert (distance < 2).mean() > 0.99
    area = transform(sdata.shapes[region], to_coordinate_system="um").area
    reported = table.obs["cell_area" if region == "cell_boundaries" else "nucleus_area"].to_numpy()
    assert np.corrcoef(area.reindex(table.obs["cell_id"].astype(str)), reported)[0, 1] > 0.95


def test_one_coordinate_system(sdata):
    assert sdata.coordinate_systems == ["um"]


def test_image_pixels_lie_in_um(bundle, sdata):
    pixels = tifffile.imread(bundle / "morphology_focus.ome.tif")
    found = image(sdata, "morphology_focus", n_channels=None)
    assert np.isclose(found.um_per_px, PIXEL_SIZE)
    assert np.array_equal(found.pyramid[0].compute()[0], pixels)
    um = np.array([[20.3, 41.7]])
    column, row = np.floor(found.to_px(um)[0]).astype(int)
    assert (column, row) == (int(20.3 / PIXEL_SIZE), int(41.7 / PIXEL_SIZE))


def test_table_annotates_the_polygons(sdata, tmp_path):
    table = sdata.tables["table"]
    assert table.uns["spatialdata_attrs"]["region"] == "cell_boundaries"
    without = sdata.tables["table"].copy()
    del without.obsm["spatial"]
    again = type(sdata).init_from_elements({"cell_boundaries": sdata["cell_boundaries"], "table": without})
    xy = coordinates(open_target(again, table_key=None, copy=False))
    assert np.median(np.hypot(*(xy - table.obsm["spatial"]).T)) < 1
    sdata.write(tmp_path / "x.zarr")
    back = read_zarr(tmp_path / "x.zarr")
    assert np.array_equal(back.tables["table"].obsm["spatial"], table.obsm["spatial"])
    assert back.coordinate_systems == ["um"]


def test_circles_instead_of_polygons_and_no_image(bundle):
    sdata = read_xenium(bundle, shapes=False, morphology=False)
    assert set(sdata.shapes) == {"cell_circles"}
    assert not sdata.images
    circles = transform(sdata.shapes["cell_circles"], to_coordinate_system="um")
    table = sdata.tables["table"]
    assert np.allclose(np.column_stack([circles.geometry.x, circles.geometry.y]), table.obsm["spatial"])
    assert np.allclose(np.pi * circles["radius"] ** 2, table.obs["cell_area"])


def test_min_counts_drops_cells_and_their_shapes(bundle, sdata):
    counts = np.asarray(sdata.tables["table"].X.sum(axis=1)).ravel()
    least = int(np.median(counts))
    few = read_xenium(bundle, min_counts=least, morphology=False)
    assert few.tables["table"].n_obs == (counts >= least).sum()
    assert set(few.shapes["cell_boundaries"].index) == set(few.tables["table"].obs["cell_id"])
    assert few.coordinate_systems == ["um"]
    with pytest.raises(ValueError, match="min_counts=1000000"):
        read_xenium(bundle, min_counts=10**6, morphology=False)


def test_oldest_layout(data_dir, tmp_path):
    folder = complete(data_dir / "toy_bundles" / "xenium", tmp_path / "outs", version="1.0.2.0")
    sdata = read_xenium(folder, transcripts=True)
    x = transform(sdata.points["transcripts"], to_coordinate_system="um")["x"].compute()
    raw = pd.read_parquet(folder / "transcripts.parquet")["x_location"]
    assert np.allclose(np.sort(x), np.sort(raw), atol=1e-3)
    assert sdata.tables["table"].n_obs == 526


@pytest.mark.parametrize("as_file", [True, False])
def test_he_lies_by_its_alignment(bundle, tmp_path, as_file):
    rng = np.random.default_rng(0)
    he = rng.integers(0, 255, (160, 200, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "he.ome.tif", he, photometric="rgb", tile=(64, 64))
    matrix = np.array([[1.2, 0.1, 30], [-0.1, 1.2, 40], [0, 0, 1]])
    np.savetxt(tmp_path / "he_imagealignment.csv", matrix, delimiter=",")
    affine = tmp_path / "he_imagealignment.csv" if as_file else matrix
    sdata = read_xenium(bundle, he=tmp_path / "he.ome.tif", he_affine=affine, shapes=False)
    found = get_transformation(sdata.images["he"], to_coordinate_system="um").to_affine_matrix(("x", "y"), ("x", "y"))
    assert np.allclose(found[:2], PIXEL_SIZE * matrix[:2])
    pyramid = image(sdata, "he")
    assert np.array_equal(pyramid.pyramid[0].compute(), he.transpose(2, 0, 1))
    px = np.array([[17.5, 23.5]])
    um = (px @ matrix[:2, :2].T + matrix[:2, 2]) * PIXEL_SIZE
    assert np.allclose(pyramid.to_px(um), px)


def test_what_is_missing_is_named(data_dir, bundle, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiment\.xenium.*cells\.zarr\.zip"):
        read_xenium(data_dir / "toy_bundles" / "xenium")
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_xenium(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="he_affine"):
        read_xenium(bundle, he="he.tif")
    with pytest.raises(FileNotFoundError, match=r"align\.csv"):
        read_xenium(bundle, he="he.tif", he_affine=tmp_path / "align.csv")
    (tmp_path / "bad.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="not a matrix"):
        read_xenium(bundle, he="he.tif", he_affine=tmp_path / "bad.csv")


def test_unknown_pixel_size(data_dir, tmp_path):
    folder = complete(data_dir / "toy_bundles" / "xenium", tmp_path / "outs")
    (folder / "experiment.xenium").write_text("{}")
    with pytest.raises(ValueError, match="um/px is unknown"):
        read_xenium(folder)
