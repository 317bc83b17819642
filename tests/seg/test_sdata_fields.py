"""Fields of SpatialData objects: regions, labels, and shapes rasterised against a test of every pixel's centre."""

from __future__ import annotations

import dask.array as da
import geopandas
import numpy as np
import pytest
import shapely
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from histoniche.io import attach_image
from histoniche.seg._fields import STRETCH, Field
from histoniche.seg._sdata_fields import fields_from_sdata

CHANNELS = ["DAPI", "boundary", "18S"]
SHAPE = (60, 80)
PIXELS = np.random.default_rng(0).gamma(2, 100, (3, *SHAPE)).astype(np.uint16)
# 0.5 um/px, the first pixel's corner at x, y = 10, 20 um: the image spans 10 to 50 and 20 to 50 um.
TO_UM = Sequence([Scale([0.5, 0.5], axes=("x", "y")), Translation([10, 20], axes=("x", "y"))])
TURNED = Affine([[0, -0.5, 50], [0.5, 0, 10], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
LABELS = (np.arange(60 * 80).reshape(SHAPE) // 97 % 9).astype(np.int32)


def make(*, pixels=PIXELS, to_um=TO_UM, scale_factors=None, **elements):
    image = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=CHANNELS[: len(pixels)],
        transformations={"um": to_um},
        scale_factors=scale_factors,
    )
    return SpatialData.init_from_elements({"morphology": image, **elements})


def labels_element(labels=LABELS, *, to_um=TO_UM, **kwargs):
    return Labels2DModel.parse(labels, dims=("y", "x"), transformations={"um": to_um}, **kwargs)


def polygons_element(geometries, *, to_um=None, **kwargs):
    frame = geopandas.GeoDataFrame(geometry=list(geometries), index=[f"cell{i}" for i in range(len(geometries))])
    return ShapesModel.parse(frame, transformations={"um": to_um or Identity()}, **kwargs)


def centres(matrix=((0.5, 0, 10), (0, 0.5, 20))):
    """Coordinates in um of the centres of all pixels, (y, x) each."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    return [row[0] * x + row[1] * y + row[2] for row in matrix]


def reference(geometries, matrix=((0.5, 0, 10), (0, 0.5, 20)), rows=None):
    """Every pixel asks every shape, in order, whether it holds its centre."""
    labels = np.zeros(SHAPE, dtype=np.int32)
    x, y = centres(matrix)
    for number, row in enumerate(range(len(geometries)) if rows is None else rows, start=1):
        labels[shapely.contains_xy(geometries[row], x, y)] = number
    return labels


def blobs(n=25, seed=1):
    """Overlapping stars, some of which reach beyond the image, which spans 10 to 50 and 20 to 50 um."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    rim = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    centre = rng.uniform((9, 19), (51, 51), (n, 2))
    return [shapely.Polygon(c + rim * rng.uniform(1.5, 5, (12, 1))) for c in centre]


# ------------------------------------------------------------------------------------------------- image and regions
def test_whole_image_without_labels():
    (field,) = fields_from_sdata(make())
    assert field.name == "morphology"
    assert field.channels == tuple(CHANNELS)
    assert field.labels is None
    assert field.um_per_px == pytest.approx(0.5)
    assert isinstance(field.image, da.Array)
    assert np.array_equal(field.image.compute(), PIXELS)
    assert np.allclose(field.limits, np.percentile(PIXELS, STRETCH, axis=(1, 2)).T)


def test_channels_are_chosen_by_name():
    (field,) = fields_from_sdata(make(), channels=["18S", "DAPI"], name="slide")
    assert field.name == "slide"
    assert field.channels == ("18S", "DAPI")
    assert np.array_equal(field.image.compute(), PIXELS[[2, 0]])
    assert np.allclose(field.limits[1], np.percentile(PIXELS[0], STRETCH))
    with pytest.raises(KeyError, match=r"channels=\['actin'\].*has the channels \['DAPI', 'boundary', '18S'\]"):
        fields_from_sdata(make(), channels=["actin"])
    with pytest.raises(KeyError, match=r"channels=\[\]"):
        fields_from_sdata(make(), channels=[])


def test_regions_are_windows_with_the_limits_of_the_whole():
    left, right = (10, 20, 30.1, 50), (30.1, 20, 50, 50)
    fields = fields_from_sdata(make(labels=labels_element()), regions=[left, right], labels_key="labels")
    assert [field.shape for field in fields] == [(60, 40), (60, 40)], "regions that touch share no pixel"
    assert [field.name for field in fields] == ["morphology[0:60,0:40]", "morphology[0:60,40:80]"]
    assert np.array_equal(np.concatenate([field.image.compute() for field in fields], axis=2), PIXELS)
    assert np.array_equal(np.concatenate([field.read_labels() for field in fields], axis=1), LABELS)
    whole = fields_from_sdata(make())[0].read(["DAPI"])
    assert np.array_equal(np.concatenate([field.read(["DAPI"]) for field in fields], axis=2), whole)
    assert np.array_equal(fields[0].limits, fields[1].limits)


def test_regions_of_a_turned_image():
    """x in um falls with y in px, y in um grows with x in px."""
    (field,) = fields_from_sdata(make(to_um=TURNED), regions=[(22, 15, 32, 35)])
    assert np.array_equal(field.image.compute(), PIXELS[:, 36:56, 10:50])


def test_a_pyramid_changes_neither_limits_nor_fields():
    pixels = np.random.default_rng(0).integers(0, 1000, (1, 1200, 1400)).astype(np.uint16)
    sdata = make(pixels=pixels, scale_factors=[2, 2, 2])
    half = sdata.images["morphology"]["scale1"]["image"].to_numpy()
    assert half.shape == (1, 600, 700)
    (field,) = fields_from_sdata(sdata, regions=[(12, 22, 20, 30)])
    (flat,) = fields_from_sdata(make(pixels=pixels), regions=[(12, 22, 20, 30)])
    assert np.array_equal(field.limits, Field("array", pixels, ("DAPI",)).stretch_limits())
    assert np.array_equal(field.limits, flat.limits)
    assert np.array_equal(field.read(["DAPI"]), flat.read(["DAPI"]))
    assert not np.allclose(field.limits[0], np.percentile(half[0], STRETCH), rtol=0.05), "scales differ"


def test_a_volume_is_refused():
    volume = Image3DModel.parse(
        np.zeros((1, 3, 60, 80)), dims=("c", "z", "y", "x"), transformations={"um": Scale([0.5, 0.5], axes=("x", "y"))}
    )
    with pytest.raises(
        ValueError, match=r"images\['volume'\] has the axes \('c', 'z', 'y', 'x'\).*select or project z"
    ):
        fields_from_sdata(SpatialData.init_from_elements({"volume": volume}))


def test_reads_only_the_region():
    def read(block):
        if block.size:
            reads.append(block.shape)
        return block

    reads = []
    lazy = da.from_array(np.tile(PIXELS, (1, 20, 20)), chunks=(3, 60, 80)).map_blocks(read, dtype=np.uint16)
    element = Image2DModel.parse(
        lazy, dims=("c", "y", "x"), c_coords=CHANNELS, transformations={"um": Identity()}, chunks=(3, 60, 80)
    )
    (field,) = fields_from_sdata(SpatialData.init_from_elements({"a": element}), regions=[(85, 65, 155, 115)])
    reads.clear()
    assert np.array_equal(field.image.compute(), PIXELS[:, 5:55, 5:75])
    assert reads == [(3, 60, 80)]


@pytest.mark.parametrize(
    ("regions", "match"),
    [
        ([], "regions is empty"),
        ([(9, 20, 30, 50)], r"\(9, 20, 30, 50\) um reaches beyond images\['morphology'\].*\[10.0, 20.0, 50.0, 50.0\]"),
        ([(10, 20, 30, 51)], "reaches beyond"),
        ([(100, 200, 300, 400)], "reaches beyond"),
        ([(30, 20, 10, 50)], "x_min < x_max"),
        ([(10, 20, 10, 50)], "x_min < x_max"),
        ([(10, 20, float("nan"), 50)], r"is no \(x_min"),
        ([(10, 20, 30)], r"is no \(x_min"),
        ([(10.01, 20, 10.02, 50)], r"holds no pixel \(0.5 um/px\)"),
        ([(10, 20, 30, 50), (10.1, 20, 30, 50)], r"\(10.1, 20, 30, 50\) is the same window"),
    ],
)
def test_bad_regions(regions, match):
    with pytest.raises(ValueError, match=match):
        fields_from_sdata(make(), regions=regions)


def test_unknown_keys_and_contradictions():
    sdata = make(labels=labels_element(), cells=polygons_element(blobs()))
    with pytest.raises(ValueError, match="labels_key='labels' and shapes_key='cells' are both given"):
        fields_from_sdata(sdata, labels_key="labels", shapes_key="cells")
    with pytest.raises(KeyError, match=r"image_key='he' is not among the images, \['morphology'\]"):
        fields_from_sdata(sdata, image_key="he")
    with pytest.raises(KeyError, match=r"labels_key='cells' is not among the labels, \['labels'\]"):
        fields_from_sdata(sdata, labels_key="cells")
    with pytest.raises(KeyError, match=r"shapes_key='labels' is not among the shapes, \['cells'\]"):
        fields_from_sdata(sdata, shapes_key="labels")
    with pytest.raises(TypeError, match="A SpatialData object is needed, got ndarray"):
        fields_from_sdata(PIXELS)


# ----------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("scale_factors", [None, [2]])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels(scale_factors, dtype):
    sdata = make(labels=labels_element(LABELS.astype(dtype), scale_factors=scale_factors))
    (field,) = fields_from_sdata(sdata, labels_key="labels", regions=[(15, 25, 40, 45)])
    assert isinstance(field.labels, da.Array)
    assert field.labels.dtype == np.int32
    assert np.array_equal(field.read_labels(), LABELS[10:50, 10:60])


def test_labels_that_do_not_match():
    half = Scale([0.25, 0.25], axes=("x", "y"))
    with pytest.raises(TypeError, match=r"labels\['labels'\] has the type float32"):
        # The model refuses floats, so they come in after it was checked.
        sdata = make(labels=labels_element())
        sdata.labels["labels"].data = sdata.labels["labels"].data.astype(np.float32)
        fields_from_sdata(sdata, labels_key="labels")
    with pytest.raises(ValueError, match=r"labels\['labels'\] has the size \(30, 80\), .*\(60, 80\)"):
        fields_from_sdata(make(labels=labels_element(LABELS[:30])), labels_key="labels")
    with pytest.raises(ValueError, match=r"labels\['labels'\] lies up to .* px from images\['morphology'\]"):
        fields_from_sdata(make(labels=labels_element(to_um=half)), labels_key="labels")
    shifted = Sequence([TO_UM, Translation([0.5, 0], axes=("x", "y"))])
    with pytest.raises(ValueError, match="lies up to 1 px from"):
        fields_from_sdata(make(labels=labels_element(to_um=shifted)), labels_key="labels")


def test_labels_beyond_int32_are_an_error_not_other_numbers():
    large = LABELS.astype(np.int64) + (LABELS > 0) * np.int64(2**32)
    (field,) = fields_from_sdata(make(labels=labels_element(large)), labels_key="labels")
    with pytest.raises(ValueError, match=r"labels\['labels'\] has numbers from 0 to 42949\d+; 0 to 2147483647"):
        field.read_labels()


# ----------------------------------------------------------------------------------------------------------- shapes
def test_a_square_covers_the_pixels_whose_centre_it_holds():
    square = shapely.box(11, 21, 13, 22)
    (field,) = fields_from_sdata(make(cells=polygons_element([square])), shapes_key="cells")
    expected = np.zeros(SHAPE, dtype=np.int32)
    expected[2:4, 2:6] = 1
    assert field.labels.dtype == np.int32
    assert np.array_equal(field.labels, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_polygons_equal_the_reference(turned):
    shapes = [shape for shape in blobs() if shape.is_valid]
    assert len(shapes) > 20
    matrix = ((0, -0.5, 50), (0.5, 0, 10)) if turned else ((0.5, 0, 10), (0, 0.5, 20))
    sdata = make(cells=polygons_element(shapes), to_um=TURNED if turned else TO_UM)
    (field,) = fields_from_sdata(sdata, shapes_key="cells")
    rows = [i for i, shape in enumerate(shapes) if shape.intersects(shapely.box(*sdata_extent(matrix)))]
    labels, expected = field.labels, reference(shapes, matrix, rows)
    assert len(np.unique(expected)) > 15
    assert np.array_equal(labels, expected)


def sdata_extent(matrix):
    x, y = centres(matrix)
    return x.min() - 0.25, y.min() - 0.25, x.max() + 0.25, y.max() + 0.25


def test_region_is_the_part_of_the_whole_with_numbers_of_its_own():
    shapes = blobs()
    sdata = make(cells=polygons_element(shapes))
    region = (20, 25, 35, 40)
    (whole,) = fields_from_sdata(sdata, shapes_key="cells")
    (part,) = fields_from_sdata(sdata, shapes_key="cells", regions=[region])
    bounds = np.array([shape.bounds for shape in shapes])
    near = (bounds[:, :2] <= region[2:]).all(1) & (bounds[:, 2:] >= region[:2]).all(1)
    whole_rows = np.flatnonzero((bounds[:, :2] <= (50, 50)).all(1) & (bounds[:, 2:] >= (10, 20)).all(1))
    to_row = np.concatenate([[-1], np.flatnonzero(near)])
    assert near.sum() < len(shapes)
    assert part.labels.max() <= near.sum()
    assert np.array_equal(to_row[part.labels], np.concatenate([[-1], whole_rows])[whole.labels[10:40, 20:50]])


def test_shapes_in_other_units_than_um():
    shapes = [shape for shape in blobs() if shape.is_valid]
    halved = [shapely.affinity.scale(shape, 2, 2, origin=(0, 0)) for shape in shapes]
    element = polygons_element(halved, to_um=Scale([0.5, 0.5], axes=("x", "y")))
    (field,) = fields_from_sdata(make(cells=element), shapes_key="cells", regions=[(15, 25, 40, 45)])
    (same,) = fields_from_sdata(make(cells=polygons_element(shapes)), shapes_key="cells", regions=[(15, 25, 40, 45)])
    assert field.labels.max() > 5
    assert np.array_equal(field.labels, same.labels)


def test_later_shapes_win_where_they_overlap():
    boxes = [shapely.box(12, 22, 20, 30), shapely.box(16, 26, 24, 34)]
    (field,) = fields_from_sdata(make(cells=polygons_element(boxes)), shapes_key="cells")
    assert [int((field.labels == number).sum()) for number in (1, 2)] == [256 - 64, 256]


def test_holes_multipolygons_and_nested_collections():
    ring = shapely.box(12, 22, 20, 30).difference(shapely.box(14, 24, 18, 28))
    pair = shapely.MultiPolygon([shapely.box(22, 22, 24, 24), shapely.box(26, 22, 28, 24)])
    line = shapely.LineString([(30, 22), (40, 40)])
    nested = shapely.GeometryCollection(
        [line, shapely.box(30, 30, 32, 32), shapely.GeometryCollection([shapely.box(40, 30, 44, 32)])]
    )
    shapes = [ring, pair, nested]
    (field,) = fields_from_sdata(make(cells=polygons_element(shapes)), shapes_key="cells")
    expected = reference([ring, pair, shapely.union_all([shapely.box(30, 30, 32, 32), shapely.box(40, 30, 44, 32)])])
    assert np.array_equal(field.labels, expected)
    assert [int((expected == number).sum()) for number in (1, 2, 3)] == [192, 32, 48]


@pytest.mark.parametrize("region", [None, (18, 28, 30, 40)])
def test_circles(region):
    xy, radius = np.array([[15.0, 30], [16.5, 34], [33, 38], [51, 21]]), np.array([3.0, 4, 6, 2])
    cells = ShapesModel.parse(xy, geometry=0, radius=radius, transformations={"um": Identity()})
    regions = None if region is None else [region]
    (field,) = fields_from_sdata(make(cells=cells), shapes_key="cells", regions=regions)
    x, y = centres()
    circles = [(x - c[0]) ** 2 + (y - c[1]) ** 2 < r**2 for c, r in zip(xy, radius, strict=True)]
    owner = np.zeros(SHAPE, dtype=int)
    for number, circle in enumerate(circles, start=1):
        owner[circle] = number
    window = (slice(None), slice(None)) if region is None else (slice(16, 40), slice(16, 40))
    expected = owner[window]
    assert len(np.unique(expected)) >= 3
    assert np.array_equal(field.labels > 0, expected > 0), "also circles whose centre lies outside the region"
    pairs = {(int(a), int(b)) for a, b in zip(field.labels.ravel(), expected.ravel(), strict=True)}
    assert len(pairs) == len(np.unique(expected)), "the same objects, each with a number of its own"


def test_shapes_that_cannot_be_drawn():
    sdata = make(cells=polygons_element(blobs()[:1]))
    (name,) = sdata.shapes["cells"].index
    with pytest.raises(ValueError, match=r"shapes\['cells'\] has no shape in the region \(10, 20, 11, 21\) um"):
        far = make(cells=polygons_element([shapely.box(40, 40, 42, 42)]))
        fields_from_sdata(far, shapes_key="cells", regions=[(10, 20, 11, 21)])
    sdata.shapes["cells"].loc[name, "geometry"] = shapely.LineString([(20, 30), (30, 40)])
    with pytest.raises(ValueError, match=r"shapes\['cells'\] has a LineString without an area, 'cell0'"):
        fields_from_sdata(sdata, shapes_key="cells")
    outside = make(cells=polygons_element([shapely.box(400, 400, 420, 420)]))
    with pytest.raises(ValueError, match="has no shape in the image: check the alignment"):
        fields_from_sdata(outside, shapes_key="cells")


def test_shapes_without_um():
    cells = ShapesModel.parse(geopandas.GeoDataFrame(geometry=blobs()), transformations={"global": Identity()})
    with pytest.raises(ValueError, match="'cells' has no transformation to the micrometre coordinate system 'um'"):
        fields_from_sdata(make(cells=cells), shapes_key="cells")


def test_real_pancreas(data_dir):
    """Labelled area against the area of the polygons, in a region that holds collections of polygons too."""
    folder = data_dir / "xenium_pancreas"
    region = (4300.0, 540.0, 4470.0, 660.0)
    frame = geopandas.read_parquet(folder / "cell_boundaries.parquet").cx[region[0] : region[2], region[1] : region[3]]
    assert (frame.geom_type == "GeometryCollection").any()
    sdata = SpatialData.init_from_elements({"cells": ShapesModel.parse(frame, transformations={"um": Identity()})})
    attach_image(sdata, folder / "morphology.ome.tif", key_added="morphology")
    # Limits read all of an image, and this one has no scales stored: a part of it makes the test quick.
    sdata = sdata.query.bounding_box(
        ("x", "y"), min_coordinate=[4200, 440], max_coordinate=[4600, 760], target_coordinate_system="um"
    )
    (field,) = fields_from_sdata(sdata, shapes_key="cells", regions=[region])
    scale = field.um_per_px
    assert scale == pytest.approx(0.425, rel=1e-3)
    assert field.shape == (round(120 / scale), round(170 / scale))
    union = shapely.union_all(frame.geometry.buffer(0)).intersection(shapely.box(*region)).area
    assert (field.labels > 0).sum() * scale**2 == pytest.approx(union, rel=0.03)
    assert len(np.unique(field.labels)) - 1 > 0.97 * len(frame)
    dapi = field.read([field.channels[0]])[0]
    assert dapi[field.labels > 0].mean() > 1.3 * dapi[field.labels == 0].mean(), "nuclei lie in the cells"
