"""Shape and brightness of objects, and their outlines."""

from __future__ import annotations

import numpy as np
import pandas as pd
import shapely
from scipy import ndimage
from skimage.measure import find_contours, regionprops_table

_PROPERTIES = {
    "area": "area", "perimeter": "perimeter", "axis_major_length": "major_axis", "axis_minor_length": "minor_axis",
    "eccentricity": "eccentricity", "intensity_mean": "mean_intensity", "centroid-0": "y", "centroid-1": "x",
}  # fmt: skip


def measure(labels: np.ndarray, intensity: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """Measure objects and draw their outlines.

    Parameters
    ----------
    labels
        (y, x) int, objects numbered from 1 without gaps, each of one piece.
    intensity
        (y, x) values of the image.

    Returns
    -------
    One row an object: ``area``, ``perimeter``, ``major_axis``, ``minor_axis`` (of the ellipse of the same moments),
    ``eccentricity``, ``solidity`` (area over that of the convex hull), ``mean_intensity``, ``y``, ``x`` (centroid; the
    centre of the first pixel is at 0.5, 0.5), in px; and the polygons of their outer outlines, x and y in px.
    """
    properties = [name for name in _PROPERTIES if not name.startswith("centroid")]
    found = regionprops_table(labels, intensity.astype(np.float64), properties=[*properties, "centroid"])
    table = pd.DataFrame({name: found[key] for key, name in _PROPERTIES.items()}).astype(np.float64)
    table[["y", "x"]] += 0.5
    outlines = [
        _outline(labels[place] == number, place[0].start, place[1].start)
        for number, place in enumerate(ndimage.find_objects(labels), start=1)
    ]
    polygons = np.array(outlines, dtype=object)
    hulls = shapely.area(shapely.convex_hull(polygons)) if len(polygons) else np.empty(0)
    table["solidity"] = shapely.area(polygons) / hulls if len(polygons) else hulls
    return table, polygons


def _outline(mask: np.ndarray, y: int, x: int) -> shapely.Polygon:
    """Largest outer contour of a mask whose first pixel is pixel y, x of the image."""
    # Pixels that touch at a corner are joined, as they are in an object.
    contours = find_contours(np.pad(mask, 1).astype(np.float32), 0.5, fully_connected="high")
    rings = [shapely.Polygon(contour[:, ::-1] + (x - 0.5, y - 0.5)) for contour in contours]
    largest = max(rings, key=lambda ring: ring.area)
    return shapely.simplify(largest, 0)  # drops points on straight edges, no others
