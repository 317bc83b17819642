from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity

from histoniche._slides import images_of_cells, rows_of_slides


def table_of(slides: list[str]) -> ad.AnnData:
    table = ad.AnnData(np.ones((len(slides), 1), dtype=np.float32), obs=pd.DataFrame({"region": slides}))
    table.uns["spatialdata_attrs"] = {"region": sorted(set(slides)), "region_key": "region", "instance_key": "id"}
    return table


def object_of(*names: str, n_channels: int = 3) -> SpatialData:
    pixels = np.zeros((n_channels, 20, 20), dtype=np.uint8)
    return SpatialData(
        images={
            name: Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"um": Identity()}) for name in names
        }
    )


def shown(found: list) -> dict[str, list[int]]:
    return {image.key: rows.tolist() for image, rows in found}


def test_rows_of_slides() -> None:
    rows = rows_of_slides(table_of(["b", "a", "b"]))
    assert {slide: cells.tolist() for slide, cells in rows.items()} == {"a": [1], "b": [0, 2]}
    (only,) = rows_of_slides(ad.AnnData(np.ones((4, 1)))).values()
    assert only.tolist() == [0, 1, 2, 3]


def test_images_of_cells() -> None:
    table = table_of(["b", "a", "b", "c"])
    images = object_of("x", "y")
    assert shown(images_of_cells(images, table, {"a": "x", "b": "y", "c": "x"})) == {"x": [1, 3], "y": [0, 2]}
    assert shown(images_of_cells(object_of("x"), table, None)) == {"x": [0, 1, 2, 3]}
    assert shown(images_of_cells(images, table[table.obs["region"] == "b"].copy(), "y")) == {"y": [0, 1]}
    with pytest.raises(ValueError, match=r"image_key='x' is one image for the 3 slides .*\['x', 'y'\]: give a mapping"):
        images_of_cells(images, table, "x")
    with pytest.raises(KeyError, match=r"no image for the slides \['c'\]; it has \['a', 'b'\]"):
        images_of_cells(images, table, {"a": "x", "b": "y"})
    with pytest.raises(KeyError, match="'z' is not among the images"):
        images_of_cells(images, table, {"a": "x", "b": "y", "c": "z"})
