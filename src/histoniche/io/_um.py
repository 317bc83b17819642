"""The micrometre coordinate system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import Affine, Identity, Scale, get_transformation, set_transformation

from histoniche._keys import UM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from spatialdata.transformations import BaseTransformation

_XY = ("x", "y")


def set_um(
    sdata: SpatialData,
    *,
    um_per_unit: float,
    from_coordinate_system: str = "global",
    elements: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Add the micrometre coordinate system to elements that have another one of known scale.

    For objects of other readers: their ``"global"`` is often in pixels of one image.

    Parameters
    ----------
    sdata
        SpatialData. Reads the elements' transformations to ``from_coordinate_system``.
    um_per_unit
        Length of one unit of ``from_coordinate_system`` in um.
    from_coordinate_system
        Coordinate system that the elements already have.
    elements
        Names of images, labels, points or shapes; by default all that have ``from_coordinate_system``.
    overwrite
        Whether an existing transformation to ``"um"`` may be replaced.

    Returns
    -------
    ``None``. Written: the transformation of each element to ``"um"``, in memory. Tables are not changed: coordinates
    in ``obsm["spatial"]`` must be in um already.

    Raises
    ------
    KeyError
        An element that does not exist.
    ValueError
        ``um_per_unit`` is not a positive number; an element without ``from_coordinate_system``, not affine, or with
        ``"um"`` already. Nothing is changed then.
    """
    if not isinstance(sdata, SpatialData):
        msg = f"Expected a SpatialData, got {type(sdata).__name__}."
        raise TypeError(msg)
    if not (np.isfinite(um_per_unit) and um_per_unit > 0):
        msg = f"um_per_unit={um_per_unit!r}: a positive number is needed."
        raise ValueError(msg)
    found = {name: element for kind, name, element in sdata.gen_elements() if kind != "tables"}
    new: dict[str, BaseTransformation] = {}
    for name in _names(found, from_coordinate_system, elements):
        systems = get_transformation(found[name], get_all=True)
        if from_coordinate_system not in systems:
            msg = f"{name!r} has no transformation to {from_coordinate_system!r}, only to {sorted(systems)}."
            raise ValueError(msg)
        if UM in systems and not overwrite:
            msg = f"{name!r} already has a transformation to {UM!r}: pass overwrite=True to replace it."
            raise ValueError(msg)
        try:
            matrix = systems[from_coordinate_system].to_affine_matrix(input_axes=_XY, output_axes=_XY)
        except (ValueError, TypeError, NotImplementedError) as error:
            msg = f"The transformation of {name!r} to {from_coordinate_system!r} is not affine: resample it first."
            raise ValueError(msg) from error
        new[name] = from_matrix(np.diag([um_per_unit, um_per_unit, 1.0]) @ matrix)
    for name, transformation in new.items():
        set_transformation(found[name], transformation, to_coordinate_system=UM)


def _names(found: dict[str, Any], system: str, elements: Sequence[str] | None) -> list[str]:
    if elements is None:
        names = [name for name, element in found.items() if system in get_transformation(element, get_all=True)]
        if not names:
            msg = f"No element has the coordinate system {system!r}: name another with from_coordinate_system=."
            raise ValueError(msg)
        return names
    if isinstance(elements, str):
        msg = f"elements={elements!r} is a string: pass a list of names."
        raise TypeError(msg)
    missing = [name for name in elements if name not in found]
    if missing:
        msg = f"elements={missing!r} are not among images, labels, points and shapes, {sorted(found)}."
        raise KeyError(msg)
    return list(elements)


def from_matrix(matrix: NDArray) -> BaseTransformation:
    """The simplest transformation of spatialdata for an affine matrix (3, 3) of x, y."""
    if np.allclose(matrix, np.eye(3), rtol=0, atol=1e-12):
        return Identity()
    if np.allclose(matrix, np.diag(np.diag(matrix)), rtol=0, atol=1e-12):
        return Scale(np.diag(matrix)[:2], axes=_XY)
    return Affine(matrix, input_axes=_XY, output_axes=_XY)


def check_affine(affine: Any, name: str) -> NDArray:
    """An affine matrix as (3, 3) float64, or an error that names it."""
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape == (2, 3):
        matrix = np.vstack([matrix, [0.0, 0.0, 1.0]])
    if matrix.shape != (3, 3):
        msg = f"{name} has the shape {matrix.shape}; an affine matrix (3, 3) of x, y is needed."
        raise ValueError(msg)
    if not np.isfinite(matrix).all() or not np.allclose(matrix[2], [0, 0, 1], rtol=0, atol=1e-9):
        msg = f"{name} is not affine (finite, last row 0 0 1): {matrix.tolist()}."
        raise ValueError(msg)
    if abs(np.linalg.det(matrix[:2, :2])) < 1e-12:
        msg = f"{name} cannot be inverted: {matrix.tolist()}."
        raise ValueError(msg)
    return matrix
