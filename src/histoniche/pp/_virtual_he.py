"""Render fluorescent stains as haematoxylin and eosin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, get_channel_names
from spatialdata.transformations import get_transformation

from histoniche._sdata import _scales, _serialisable, _versions, resolve_image_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# Optical density of the dyes in red, green and blue (Ruifrok and Johnston 2001, normalised as QuPath does for eosin).
HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.07, 0.99, 0.11)

# The cytoplasmic stains of the Xenium multimodal kit under the names that its files carry.
_DEFAULT_CYTOPLASM = ((("18S rRNA", "18S"), 0.65), (("alphaSMA/vimentin", "AlphaSMA/Vimentin"), 0.5))
_MAX_SAMPLES = 2**24


def virtual_he(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    nuclear: str = "DAPI",
    cytoplasm: Mapping[str, float] | None = None,
    key_added: str = "virtual_he",
    percentile: float = 99.7,
    a: float = 1.6,
    g1: float = 0.7,
    b: float = 1.0,
    g2: float = 0.6,
    scale_factors: Sequence[int] = (2, 2, 2),
    chunk_size: int = 1024,
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | None:
    """Render a multi-stain fluorescence image as virtual H&E.

    The nuclear stain is drawn as haematoxylin and the weighted sum of the others as eosin, as two dyes absorb light
    (Beer-Lambert): ``rgb = 255 exp(-(a n^g1 H + b c^g2 E))`` with ``n`` and ``c = sum(w_i s_i)`` from stains that were
    divided by their percentile and clipped to 0..1, ``H = (0.65, 0.70, 0.29)`` and ``E = (0.07, 0.99, 0.11)``. No
    signal is white, as glass is. The image is lazy: pixels are computed when they are read. Only the percentiles are
    computed at once, from at most 2^24 evenly spaced pixels of the full resolution.

    It is a rendering, not a stain: call it *virtual H&E* wherever a figure made from it is reported.

    Parameters
    ----------
    sdata
        SpatialData with a multi-stain image. Reads ``images[image_key]`` and its channel names.
    image_key
        Name of that image; may be left out where there is just one.
    nuclear
        Channel drawn as haematoxylin.
    cytoplasm
        Weight of every channel drawn as eosin. By default the interior stains of the Xenium multimodal kit, 0.65 of
        ``"18S rRNA"`` (or ``"18S"``) and 0.5 of ``"alphaSMA/vimentin"`` (or ``"AlphaSMA/Vimentin"``).
    key_added
        Name of the new image.
    percentile
        Percentile of each stain that counts as full signal, above 0 up to 100.
    a, g1
        Strength and exponent of haematoxylin.
    b, g2
        Strength and exponent of eosin.
    scale_factors
        Factors of the pyramid, each relative to the level before.
    chunk_size
        Side of the chunks of the new image in pixels.
    overwrite
        Whether an image of the name ``key_added`` may be replaced.
    copy
        Whether to return a new object and leave ``sdata`` as it is. Elements are shared, not duplicated.

    Returns
    -------
    ``None``, or the new object with ``copy=True``. Written: ``images[key_added]``, multiscale RGB uint8 (3, y, x) in
    every coordinate system of the source, with ``attrs["virtual"] = True`` and ``attrs["rendered_from"]`` while in
    memory; ``attrs["histoniche"]["virtual_he"][key_added]``: parameters, percentiles, source, versions (saved
    with the object).

    Raises
    ------
    KeyError
        No image, or none of this name; a channel that the image does not have.
    ValueError
        Several images and no name; a parameter outside its limits; ``key_added`` taken; a stain without signal.

    References
    ----------
    Ruifrok and Johnston (2001), Quantification of histochemical staining by color deconvolution. Giacomelli et al.
    (2016), Virtual hematoxylin and eosin transillumination microscopy using epi-fluorescence imaging.
    """
    if not isinstance(sdata, SpatialData):
        msg = f"Expected a SpatialData, got {type(sdata).__name__}: virtual_he reads an image."
        raise TypeError(msg)
    params = {"percentile": percentile, "a": a, "g1": g1, "b": b, "g2": g2, "scale_factors": list(scale_factors)}
    _check_params(params, chunk_size)
    key = resolve_image_key(sdata, image_key)
    _check_free(sdata, key_added, source=key, overwrite=overwrite)
    names = [str(name) for name in get_channel_names(sdata.images[key])]
    weights = _cytoplasm_weights(cytoplasm, names, key)
    channels = [_channel(nuclear, names, key), *(_channel(name, names, key) for name in weights)]

    pixels = _scales(sdata.images[key])[0].transpose("c", "y", "x").data
    stains = pixels[channels]
    full = _full_signal(stains, percentile, [names[i] for i in channels], key)
    stains = stains.rechunk({0: -1, 1: chunk_size, 2: chunk_size})
    rgb = da.map_blocks(
        render_he,
        stains,
        full=full,
        weights=np.asarray(list(weights.values()), dtype=np.float32),
        strengths=(a, g1, b, g2),
        dtype=np.uint8,
        chunks=((3,), *stains.chunks[1:]),
        meta=np.empty((0, 0, 0), dtype=np.uint8),
    )
    element = Image2DModel.parse(
        rgb,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations=dict(get_transformation(sdata.images[key], get_all=True)),
        scale_factors=list(scale_factors) or None,
        chunks=(3, chunk_size, chunk_size),
    )
    element.attrs["virtual"] = True
    element.attrs["rendered_from"] = key
    entry = {
        "params": _serialisable({**params, "nuclear": nuclear, "cytoplasm": weights}),
        "inputs": {"image_key": key},
        "outputs": [f"images/{key_added}"],
        "full_signal": {names[i]: float(value) for i, value in zip(channels, full, strict=True)},
        "versions": _versions(),
    }
    return _write(sdata, key_added, element, entry, copy=copy)


def render_he(
    stains: NDArray, *, full: NDArray, weights: NDArray, strengths: tuple[float, float, float, float]
) -> NDArray:
    """Virtual H&E of a block of stains.

    Parameters
    ----------
    stains
        Nuclear stain first, then those of the cytoplasm, (1 + k, y, x).
    full
        Value of each stain that counts as full signal, (1 + k,).
    weights
        Weights of the cytoplasmic stains, (k,).
    strengths
        ``a, g1, b, g2``.

    Returns
    -------
    (3, y, x) uint8.
    """
    a, g1, b, g2 = strengths
    if stains.size == 0:
        return np.empty((3, *stains.shape[1:]), dtype=np.uint8)
    nucleus = _scaled(stains[0], full[0])
    cyto = np.zeros_like(nucleus)
    for stain, value, weight in zip(stains[1:], full[1:], weights, strict=True):
        cyto += np.float32(weight) * _scaled(stain, value)
    haema = np.float32(a) * nucleus ** np.float32(g1)
    eosin = np.float32(b) * cyto ** np.float32(g2)
    out = np.empty((3, *nucleus.shape), dtype=np.uint8)
    for channel, (h, e) in enumerate(zip(HAEMATOXYLIN, EOSIN, strict=True)):
        out[channel] = np.rint(255 * np.exp(-(haema * np.float32(h) + eosin * np.float32(e))))
    return out


def _scaled(stain: NDArray, full: float) -> NDArray:
    return np.clip(stain.astype(np.float32) / np.float32(full), 0, 1)


def _full_signal(stains: da.Array, percentile: float, names: list[str], key: str) -> NDArray:
    """Percentile of every stain, (k,) float64, from evenly spaced pixels: exact where the image is small."""
    height, width = stains.shape[1:]
    step = max(1, int(np.ceil(np.sqrt(height * width / _MAX_SAMPLES))))
    full = np.empty(len(stains))
    for i, name in enumerate(names):
        full[i] = np.percentile(stains[i, ::step, ::step].compute(), percentile)
        if not np.isfinite(full[i]) or full[i] <= 0:
            msg = (
                f"Channel {name!r} of images[{key!r}] has no signal: its {percentile}th percentile is {full[i]}. "
                "Is the right channel named, or is nearly all of the image empty (then raise percentile=)?"
            )
            raise ValueError(msg)
    return full


def _check_params(params: Mapping[str, Any], chunk_size: int) -> None:
    if not 0 < params["percentile"] <= 100:
        msg = f"percentile={params['percentile']!r} is outside 0 to 100."
        raise ValueError(msg)
    for name in ("a", "g1", "b", "g2"):
        if not (np.isfinite(params[name]) and params[name] > 0):
            msg = f"{name}={params[name]!r}: a positive number is needed."
            raise ValueError(msg)
    if chunk_size < 16 or any(factor < 2 for factor in params["scale_factors"]):
        msg = (
            f"chunk_size={chunk_size!r} must be at least 16, scale_factors={params['scale_factors']!r} at least 2 each."
        )
        raise ValueError(msg)


def _check_free(sdata: SpatialData, key_added: str, *, source: str, overwrite: bool) -> None:
    if key_added == source:
        msg = f"key_added={key_added!r} is the image to be rendered: choose another name."
        raise ValueError(msg)
    if key_added in sdata and not (overwrite and key_added in sdata.images):
        fix = "pass overwrite=True or another key_added" if key_added in sdata.images else "choose another key_added"
        msg = f"The object already has an element {key_added!r}: {fix}."
        raise ValueError(msg)


def _cytoplasm_weights(cytoplasm: Mapping[str, float] | None, names: list[str], key: str) -> dict[str, float]:
    if cytoplasm is None:
        weights = {}
        for aliases, weight in _DEFAULT_CYTOPLASM:
            present = [alias for alias in aliases if alias in names]
            _channel(present[0] if present else aliases[0], names, key)
            weights[present[0]] = weight
        return weights
    if not cytoplasm or any(not np.isfinite(w) or w < 0 for w in cytoplasm.values()) or not sum(cytoplasm.values()):
        msg = f"cytoplasm={dict(cytoplasm)!r}: give the weight of one channel or more, none negative, not all zero."
        raise ValueError(msg)
    return {str(name): float(weight) for name, weight in cytoplasm.items()}


def _channel(name: str, names: list[str], key: str) -> int:
    if names.count(name) != 1:
        problem = "several channels" if name in names else "no channel"
        msg = (
            f"images[{key!r}] has {problem} {name!r}; its channels are {names}: name others with nuclear= and "
            "cytoplasm={...}, or name the channels when the image is attached (channel_names=)."
        )
        raise KeyError(msg)
    return names.index(name)


def _write(
    sdata: SpatialData, key_added: str, element: Any, entry: dict[str, Any], *, copy: bool
) -> SpatialData | None:
    attrs = dict(sdata.attrs)
    ours = dict(attrs.get("histoniche", {}))
    ours["virtual_he"] = {**ours.get("virtual_he", {}), key_added: entry}
    attrs["histoniche"] = ours
    if copy:
        elements = {name: value for _, name, value in sdata.gen_elements() if name != key_added}
        return SpatialData.init_from_elements({**elements, key_added: element}, attrs=attrs)
    if key_added in sdata.images:
        del sdata.images[key_added]
    sdata.images[key_added] = element
    sdata.attrs = attrs
    return None
