"""The slides of a table, and the image that the cells of each lie on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ._sdata import Image, image, slide_of_cell

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def rows_of_slides(table: AnnData) -> dict[str, np.ndarray]:
    """Rows of the cells of each slide, by its name (the region that the table annotates)."""
    codes = slide_of_cell(table)
    attrs = table.uns.get("spatialdata_attrs") or {}
    region = table.obs.get(attrs.get("region_key", ""), None)
    slides = {}
    for code in range(int(codes.max()) + 1):
        rows = np.flatnonzero(codes == code)
        slides[str(region.iloc[rows[0]]) if region is not None else "slide"] = rows
    return slides


def images_of_cells(
    sdata: SpatialData, table: AnnData, image_key: str | Mapping[str, str] | None
) -> list[tuple[Image, np.ndarray]]:
    """Images, each with the rows of the cells that lie on it.

    Parameters
    ----------
    sdata
        SpatialData object.
    table
        Its table.
    image_key
        Name of the image of all cells, which may be left out where there is just one; or a mapping from the name of
        the slide to the name of its image.

    Raises
    ------
    KeyError
        No image, none of this name, or a slide that the mapping lacks.
    ValueError
        An image that does not fit (see `image`), or one image for several slides where others might be meant.
    """
    slides = rows_of_slides(table)
    if isinstance(image_key, Mapping):
        missing = [slide for slide in slides if slide not in image_key]
        if missing:
            msg = f"image_key has no image for the slides {missing}; it has {sorted(image_key)}."
            raise KeyError(msg)
        rows_of: dict[str, list[np.ndarray]] = {}
        for slide, rows in slides.items():
            rows_of.setdefault(image_key[slide], []).append(rows)
        return [(image(sdata, key), np.sort(np.concatenate(rows))) for key, rows in rows_of.items()]
    fitting = [key for key in sorted(sdata.images) if len(slides) > 1 and _fits(sdata, key)]
    if len(fitting) > 1:
        example = dict(zip(slides, fitting, strict=False))
        msg = (
            f"image_key={image_key!r} is one image for the {len(slides)} slides of the table, {list(slides)}, and the "
            f"object has several, {fitting}: give a mapping from slide to image, image_key={example}, in which "
            "slides may share an image."
        )
        raise ValueError(msg)
    return [(image(sdata, image_key), np.arange(table.n_obs))]


def _fits(sdata: SpatialData, key: str) -> bool:
    try:
        image(sdata, key)
    except ValueError:
        return False
    return True
