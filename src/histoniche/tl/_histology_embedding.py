"""Histology embedding of cells from an image."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dask.array as da
import numpy as np

from histoniche import _keys, encoders
from histoniche._sdata import Image, Target, check_inside, coordinates, open_target
from histoniche._slides import images_of_cells

if TYPE_CHECKING:
    from spatialdata import SpatialData

_COARSER = 1.5
"""An image is said to be too coarse where its pixels are more than so many times those that the encoder should see."""


def histology_embedding(
    sdata: SpatialData,
    *,
    image_key: str | Mapping[str, str] | None = None,
    encoder: str = "uni2-h",
    mode: Literal["crop", "dense"] = "crop",
    symmetries: int = 1,
    um_per_px: float | None = None,
    field_of_view: float | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    store: str | Path | None = None,
    in_memory: bool = True,
    batch_size: int = 64,
    key_added: str | None = None,
    spatial_key: str = "spatial",
    table_key: str | None = None,
    copy: bool = False,
) -> SpatialData | None:
    """Embed the histology around each cell with a frozen image encoder.

    ``mode="crop"`` encodes one crop per cell, centred on it (224 px at the encoder's um/px): the published way, and the
    reference. Cells lie about 10 um apart, so neighbouring crops are nearly the same pixels, encoded again and again.
    ``mode="dense"`` encodes overlapping tiles once and reads each cell's features off the feature maps (of a CNN at
    several strides; of a ViT, the patch tokens) at its centroid; it is many times faster.

    The image is read lazily, tile by tile, and what lies outside it is white. Features go to a zarr store block by
    block, so memory is flat in the number of cells while they are made.

    Parameters
    ----------
    sdata
        SpatialData object with an H&E image (RGB, uint8) and a table.
    image_key
        Name of the image; may be left out where there is just one. For several slides in the table, each with its own
        image, a mapping from the name of the slide (its region in the table) to the name of its image.
    encoder
        Name in :func:`histoniche.encoders.list_encoders`, or ``"timm/<model>"``.
    mode
        ``"crop"`` or ``"dense"``.
    symmetries
        Mirror images and quarter turns of the image that features are the mean over: 1 (the image alone), 2, 4 or 8. Tissue has
        no up or down, but features of a network trained on photographs do; for those 4 is worth its four times the work.
    um_per_px
        Resolution at which the encoder sees the tissue; by default the one it was trained at.
    field_of_view
        Width of a crop in um, instead of ``um_per_px``, which it sets: the encoder's width in px is given.
    weights
        Local file with the weights, instead of the hub's.
    pretrained
        False gives random weights: for tests of the machinery, never for results.
    store
        Directory of a feature store to fill, to finish where a run was stopped, or to read where it is complete. By
        default a temporary one, removed afterwards. With several images there is one in it for each, named after it.
    in_memory
        Whether the finished features are read into memory. Otherwise the entry of ``obsm`` is a lazy array over
        ``store``, from which student and prediction read batch by batch; the store must then stay where it is. Only for
        one image.
    batch_size
        Crops, or small tiles, at a time; the features do not depend on it, rounding apart.
    key_added
        Entry of ``obsm`` to write; ``X_<encoder>`` by default.
    spatial_key
        Entry of ``obsm`` with the centroids in um.
    table_key
        Name of the table.
    copy
        Whether to return a copy instead of writing to ``sdata``.

    Returns
    -------
    ``None``, or the copy. Reads ``images[image_key]`` and ``obsm[spatial_key]`` in um. Writes:

    ``obsm["X_<encoder>"]``
        (n, d) float16: the pooled embedding of the crop, or the values of the feature maps.
    ``uns["histoniche"]["histology_embedding"]``
        Provenance; ``params["contract"]`` says all that decides what the features mean.

    Raises
    ------
    EncoderAccessError
        The weights cannot be had; the message says how to get them.
    FloatingPointError
        Features that are not finite in float16.
    KeyError
        No such encoder, image or table; a slide without image in ``image_key``.
    ValueError
        An image that is not RGB uint8, without an affine transformation to um, or that does not hold all cells; a
        feature store that is damaged or holds other features; unknown mode; ``um_per_px``,
        ``field_of_view`` or ``batch_size`` not positive, or both of the first two; another number of symmetries;
        ``in_memory=False`` without ``store``, or with several images; one image for several slides where the object has
        others that might be meant.

    Warns
    -----
    UserWarning
        The image is coarser than 1.5 times the um/px that the encoder should see.

    References
    ----------
    Crops of 112 um and UNI2-h: arXiv 2604.09076; UNI: Chen et al. 2024, doi 10.1038/s41591-024-02857-3.
    """
    if field_of_view is not None:
        if um_per_px is not None or not 0 < field_of_view < float("inf"):
            msg = f"field_of_view={field_of_view} must be positive, and um_per_px={um_per_px} be left out with it."
            raise ValueError(msg)
        um_per_px = field_of_view / encoders.get(encoder).input_px
    target = open_target(sdata, table_key=table_key, copy=copy)
    return embed_histology(
        target, image_key=image_key, encoder=encoder, mode=mode, symmetries=symmetries, um_per_px=um_per_px, weights=weights,
        pretrained=pretrained, store=store, in_memory=in_memory, batch_size=batch_size, key_added=key_added, spatial_key=spatial_key,
    )  # fmt: skip


def embed_histology(
    target: Target,
    *,
    image_key: str | Mapping[str, str] | None,
    encoder: str,
    mode: Literal["crop", "dense"],
    symmetries: int = 1,
    um_per_px: float | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    store: str | Path | None = None,
    in_memory: bool = True,
    batch_size: int = 64,
    key_added: str | None = None,
    spatial_key: str = "spatial",
    expected: dict[str, Any] | None = None,
) -> SpatialData | None:
    """Do the work of :func:`histology_embedding`; with a contract that must be kept, before anything is embedded."""
    if mode not in {"crop", "dense"}:
        msg = f"mode={mode!r} is unknown: choose 'crop' or 'dense'."
        raise ValueError(msg)
    spec = encoders.get(encoder)
    resolution = spec.um_per_px if um_per_px is None else um_per_px
    if not 0 < resolution < float("inf"):
        msg = f"um_per_px={um_per_px} must be positive."
        raise ValueError(msg)
    if not in_memory and store is None:
        msg = "in_memory=False leaves the features in their store, so it needs a place for it: store=."
        raise ValueError(msg)
    if batch_size < 1:
        msg = f"batch_size={batch_size} must be at least 1."
        raise ValueError(msg)
    xy = coordinates(target, spatial_key)
    pictures = images_of_cells(target.sdata, target.table, image_key)
    if not in_memory and len(pictures) > 1:
        msg = f"in_memory=False is for one image, image_key names {len(pictures)}: leave it out, or split the table by slide."
        raise ValueError(msg)
    points = [check_inside(picture, xy[rows], target.table.obs_names[rows]) for picture, rows in pictures]
    for picture, _ in pictures:
        _warn_if_coarse(picture, resolution, encoder)
    loaded = encoders.load_encoder(spec, weights=weights, pretrained=pretrained, symmetries=symmetries)
    contract = encoders.feature_contract(loaded, mode, resolution)
    if expected is not None:
        check_contract(expected, contract, f"encoder {encoder!r}")
    with tempfile.TemporaryDirectory(prefix="histoniche-") as folder:
        place = Path(store) if store is not None else Path(folder) / "features.zarr"
        filled = [
            encoders.embed(
                picture.pyramid, px, picture.um_per_px, loaded, place if len(pictures) == 1 else place / picture.key,
                mode=mode, target_um_per_px=resolution, batch_size=batch_size,
            )
            for (picture, _), px in zip(pictures, points, strict=True)
        ]  # fmt: skip
        values = _in_order_of_cells(filled, [rows for _, rows in pictures]) if in_memory else _lazy(filled[0])
    return target.write(
        "histology_embedding",
        params={
            "contract": contract, "store": str(place.resolve()) if store is not None else None,
            # An array with other rows has another name, so that the store is read for the cells it was made of alone.
            "lazy_name": values.name if isinstance(values, da.Array) else None, "in_memory": in_memory, "batch_size": batch_size,
        },
        inputs={
            "image_key": dict(image_key) if isinstance(image_key, Mapping) else pictures[0][0].key,
            "spatial_key": spatial_key, "weights": str(Path(weights).resolve()) if weights is not None else None,
        },
        obsm={key_added or _keys.histology(encoder): values},
    )  # fmt: skip


def _warn_if_coarse(picture: Image, resolution: float, encoder: str) -> None:
    if picture.um_per_px > _COARSER * resolution:
        msg = (
            f"images[{picture.key!r}] has {picture.um_per_px:.3g} um/px and is enlarged to {resolution:.3g} um/px for "
            f"encoder {encoder!r}: the detail that it should see is missing, and features are not like those of finer "
            "images. Attach the image at its full resolution, or embed all slides, those of training too, with um_per_px= "
            "near that of the coarsest."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)


def _in_order_of_cells(stores: list[encoders.FeatureStore], rows: list[np.ndarray]) -> np.ndarray:
    """Features of all cells, (n, d) float16, from the stores of their images."""
    if len(stores) == 1:
        return stores[0].to_numpy()
    values = np.empty((sum(len(cells) for cells in rows), stores[0].shape[1]), dtype=np.float16)
    for store, cells in zip(stores, rows, strict=True):
        values[cells] = store.to_numpy()
    return values


def _lazy(store: encoders.FeatureStore) -> da.Array:
    """The store as an array (n, d) that is read when it is needed, by one thread at a time."""
    return da.from_array(_Rows(store), chunks=(4096, -1), name=False, lock=True)


class _Rows:
    """A store as dask sees it: an array that is read row by row."""

    ndim = 2

    def __init__(self, store: encoders.FeatureStore) -> None:
        self._store = store
        self.shape, self.dtype = store.shape, np.dtype(np.float16)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        return self._store.take(np.arange(self.shape[0])[key[0]])[:, key[1]]


def check_contract(expected: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Refuse features made in another way than a model was trained on; the message names each field that differs."""
    differing = encoders.contract_difference(expected, found)
    if differing:
        details = ", ".join(f"{name}: model {expected.get(name)!r}, here {found.get(name)!r}" for name in differing)
        msg = (
            f"{what} does not keep the model's feature contract ({details}): make the features as the model's "
            "config.json says, with `hn.tl.histology_embedding`."
        )
        raise ValueError(msg)
