from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, get_transformation

from histoniche.io import set_um

XY = ("x", "y")
SHEAR = np.array([[2.0, 0.3, 5.0], [-0.3, 2.0, 7.0], [0, 0, 1]])


def make():
    pixels = np.zeros((3, 40, 40), dtype=np.uint8)
    affine = Affine(SHEAR, input_axes=XY, output_axes=XY)
    return SpatialData.init_from_elements(
        {
            "he": Image2DModel.parse(pixels, transformations={"global": affine}, scale_factors=[2]),
            "cells": ShapesModel.parse(np.ones((4, 2)), geometry=0, radius=1.0, transformations={"global": Identity()}),
            "other": Image2DModel.parse(pixels, transformations={"elsewhere": Identity()}),
        }
    )


def um(sdata, name):
    return get_transformation(sdata[name], to_coordinate_system="um").to_affine_matrix(XY, XY)


def systems(sdata):
    return {name: sorted(get_transformation(element, get_all=True)) for _, name, element in sdata.gen_elements()}


def test_scales_what_has_the_coordinate_system():
    sdata = make()
    assert set_um(sdata, um_per_unit=0.2125) is None
    assert np.allclose(um(sdata, "he"), np.diag([0.2125, 0.2125, 1]) @ SHEAR)
    assert np.allclose(um(sdata, "cells"), np.diag([0.2125, 0.2125, 1]))
    assert systems(sdata) == {"he": ["global", "um"], "cells": ["global", "um"], "other": ["elsewhere"]}


def test_named_elements_and_overwrite():
    sdata = make()
    set_um(sdata, um_per_unit=2.0, from_coordinate_system="elsewhere", elements=["other"])
    assert np.allclose(um(sdata, "other"), np.diag([2, 2, 1]))
    with pytest.raises(ValueError, match="overwrite=True"):
        set_um(sdata, um_per_unit=3.0, from_coordinate_system="elsewhere")
    set_um(sdata, um_per_unit=3.0, from_coordinate_system="elsewhere", overwrite=True)
    assert np.allclose(um(sdata, "other"), np.diag([3, 3, 1]))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"um_per_unit": 0.0}, ValueError, "um_per_unit"),
        ({"um_per_unit": float("nan")}, ValueError, "um_per_unit"),
        ({"um_per_unit": 1.0, "elements": ["he", "nothing"]}, KeyError, "nothing"),
        ({"um_per_unit": 1.0, "elements": "he"}, TypeError, "list of names"),
        ({"um_per_unit": 1.0, "elements": ["he", "other"]}, ValueError, "'other' has no transformation"),
        ({"um_per_unit": 1.0, "from_coordinate_system": "x"}, ValueError, "No element"),
    ],
)
def test_bad_input_changes_nothing(kwargs, error, match):
    sdata = make()
    before = systems(sdata)
    with pytest.raises(error, match=match):
        set_um(sdata, **kwargs)
    assert systems(sdata) == before
