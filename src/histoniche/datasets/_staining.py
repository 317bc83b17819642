"""Draw the synthetic tissue as haematoxylin and eosin would stain it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.spatial import cKDTree

from ._anatomy import CELL_TYPES, Anatomy, Site, SmoothNoise

if TYPE_CHECKING:
    from numpy.typing import NDArray

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], dtype=np.float32)
EOSIN = np.array([0.07, 0.99, 0.11], dtype=np.float32)

# Per cell type: half axes of the nucleus in um, their spread (log), optical density, its spread (log).
# The spreads overlap, as they do in tissue: a nucleus alone does not tell its type.
_NUCLEI = {
    "acinar": (3.3, 3.0, 0.13, 1.00, 0.18),
    "ductal": (4.3, 2.7, 0.15, 1.10, 0.18),
    "endocrine": (3.3, 2.9, 0.13, 0.85, 0.18),
    "fibroblast": (6.2, 1.5, 0.25, 1.15, 0.22),
    "lymphocyte": (2.7, 2.5, 0.12, 1.60, 0.15),
    "macrophage": (3.9, 2.6, 0.20, 0.90, 0.22),
}
# Per cell type: eosin and haematoxylin (RNA) of the cytoplasm.
_CYTOPLASM = {
    "acinar": (0.52, 0.26),
    "ductal": (0.36, 0.12),
    "endocrine": (0.24, 0.07),
    "fibroblast": (0.38, 0.04),
    "lymphocyte": (0.16, 0.14),
    "macrophage": (0.32, 0.06),
}
# Per niche: share of the fibres, and of the cytoplasm, in what lies between nuclei.
_MATRIX = {
    "acinar": (0.06, 1.0),
    "stroma": (1.0, 0.15),
    "lymphoid": (0.22, 0.7),
    "islet": (0.06, 1.0),
    "duct": (0.85, 0.2),
    "inflamed": (0.45, 0.7),
}


def render(
    anatomy: Anatomy, xy: NDArray, cell_type: NDArray, site: Site, *, um_per_px: float, rng: np.random.Generator
) -> NDArray:
    """Synthetic H&E of the tissue, (3, height, width) uint8.

    Parameters
    ----------
    anatomy
        Layout of the tissue.
    xy
        Centroids in um, (n, 2).
    cell_type
        Index of the cell type, (n,).
    site
        The anatomy at the centroids.
    um_per_px
        Size of a pixel in um.
    rng
        Generator.

    Returns
    -------
    Channels first; pixel (0, 0) has its corner at 0, 0 um. ``rgb = 255 exp(-(h H + e E))`` (Beer-Lambert).
    """
    n_px = int(np.ceil(anatomy.side / um_per_px))
    nuclei = _nuclei(xy, cell_type, site, n_px=n_px, um_per_px=um_per_px, rng=rng)
    haema, eosin = _background(anatomy, xy, cell_type, n_px=n_px, um_per_px=um_per_px, rng=rng)
    # A nucleus displaces the cytoplasm that it lies in.
    cover = np.clip(nuclei / 0.7, 0, 1)
    haema = haema * (1 - cover) + nuclei
    eosin = eosin * (1 - 0.55 * cover)
    sigma = 0.35 / um_per_px
    haema, eosin = gaussian_filter(haema, sigma), gaussian_filter(eosin, sigma)
    image = np.empty((3, n_px, n_px), dtype=np.uint8)
    for channel in range(3):
        light = np.exp(-(haema * HAEMATOXYLIN[channel] + eosin * EOSIN[channel]))
        light = 246 * light + rng.standard_normal(light.shape, dtype=np.float32) * 2.0
        image[channel] = np.clip(light, 0, 255).astype(np.uint8)
    return image


def _nuclei(
    xy: NDArray, cell_type: NDArray, site: Site, *, n_px: int, um_per_px: float, rng: np.random.Generator
) -> NDArray:
    """Optical density of the nuclei, (n_px, n_px) float32."""
    shape = np.array([_NUCLEI[name] for name in CELL_TYPES])[cell_type]
    n = len(xy)
    size = np.exp(rng.normal(0, 1, n) * shape[:, 2])
    stretch = np.exp(rng.normal(0, 1, n) * shape[:, 2] * 0.6)
    a, b = shape[:, 0] * size * stretch, shape[:, 1] * size / stretch
    dark = shape[:, 3] * np.exp(rng.normal(0, 1, n) * shape[:, 4])
    angle = _orientation(cell_type, site, rng)
    cos, sin = np.cos(angle), np.sin(angle)
    chromatin = _tile(rng, 0.45 / um_per_px)
    density = np.zeros((n_px, n_px), dtype=np.float32)
    reach = int(np.ceil(1.25 * a.max() / um_per_px))
    dy, dx = (d.ravel() for d in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    for start in range(0, n, 2000):
        rows = slice(start, start + 2000)
        px = np.floor(xy[rows] / um_per_px).astype(np.int64)
        ix, iy = px[:, :1] + dx, px[:, 1:] + dy
        ux = (ix + 0.5) * um_per_px - xy[rows, :1]
        uy = (iy + 0.5) * um_per_px - xy[rows, 1:]
        along = (ux * cos[rows, None] + uy * sin[rows, None]) / a[rows, None]
        across = (uy * cos[rows, None] - ux * sin[rows, None]) / b[rows, None]
        radius = np.hypot(along, across)
        inside = (radius < 1.2) & (ix >= 0) & (iy >= 0) & (ix < n_px) & (iy < n_px)
        soft = np.minimum(0.35, 0.5 * um_per_px / b[rows, None])
        edge = np.clip((1 + soft - radius) / (2 * soft), 0, 1)
        rim = 1 + 0.28 * np.exp(-(((radius - 0.88) / 0.16) ** 2))
        which = np.arange(start, start + len(px))[:, None]
        grain = 1 + 0.22 * chromatin[(iy + 97 * which) % 512, (ix + 57 * which) % 512]
        value = (dark[rows, None] * edge * rim * grain).astype(np.float32)
        np.maximum.at(density, (iy[inside], ix[inside]), value[inside])
    return density


def _orientation(cell_type: NDArray, site: Site, rng: np.random.Generator) -> NDArray:
    """Angle of the long axis: fibroblasts lie along fibres and around glands, epithelium stands on its membrane."""
    angle = rng.uniform(0, np.pi, len(cell_type))
    spread = rng.normal(0, 0.25, len(cell_type))
    fibroblast = cell_type == CELL_TYPES.index("fibroblast")
    near_gland = site.ring > -25
    angle = np.where(fibroblast, np.where(near_gland, site.radial + np.pi / 2, np.pi / 2) + 1.4 * spread, angle)
    epithelium = (cell_type == CELL_TYPES.index("ductal")) & (site.ring > 0)
    return np.where(epithelium, site.radial + spread, angle)


def _background(
    anatomy: Anatomy, xy: NDArray, cell_type: NDArray, *, n_px: int, um_per_px: float, rng: np.random.Generator
) -> tuple[NDArray, NDArray]:
    """Haematoxylin and eosin of everything but nuclei, two (n_px, n_px) float32."""
    step = max(1, round(1.0 / um_per_px))
    n_low = -(-n_px // step)
    centre = ((np.arange(n_low) + 0.5) * step * um_per_px).astype(np.float32)
    x, y = np.meshgrid(centre, centre)
    there = anatomy.at(x, y)
    weight = np.exp((there.signed - there.signed.max(axis=0)) / 3.0)
    weight /= weight.sum(axis=0)
    matrix = np.array([_MATRIX[name] for name in anatomy.niches], dtype=np.float32)
    fibre_share, cell_share = (np.tensordot(matrix[:, i], weight, axes=1) for i in range(2))

    distance, nearest = cKDTree(xy).query(np.stack([x, y], axis=-1), k=2)
    membrane = 1 - 0.55 * np.exp(-(((distance[..., 1] - distance[..., 0]) / 1.6) ** 2))
    cytoplasm = np.array([_CYTOPLASM[name] for name in CELL_TYPES], dtype=np.float32)[cell_type]
    cytoplasm *= np.exp(rng.normal(0, 0.12, (len(xy), 1))).astype(np.float32)
    own = cytoplasm[nearest[..., 0]] * membrane[..., None]
    reach = np.clip(1.25 - distance[..., 0] / 14, 0.1, 1)

    fibre = _fibres(there, rng)
    eosin = 0.75 * fibre_share * fibre + cell_share * reach * own[..., 0]
    haema = 0.05 * fibre_share * fibre + cell_share * reach * own[..., 1]
    if "duct" in anatomy.niches:
        duct = np.clip(there.signed[anatomy.niches.index("duct")] / 6 + 0.5, 0, 1)
        duct *= there.niche == anatomy.niches.index("duct")
        wall = duct * np.clip(there.ring / 2 + 0.5, 0, 1)
        open_ = duct * np.clip(there.lumen / 1.5 + 0.5, 0, 1)
        apical = wall * np.exp(-(((there.lumen + 2) / 2.0) ** 2))
        eosin = eosin * (1 - wall) + wall * (0.40 * membrane + 0.25 * apical)
        haema = haema * (1 - wall) + wall * 0.12
        eosin, haema = eosin * (1 - open_) + 0.01, haema * (1 - open_)
    clefts = _clefts(anatomy, x, y, rng) * np.clip(1 - 2 * fibre_share, 0, 1)
    stain = 1 + 0.07 * SmoothNoise(rng, (200, 900))(x, y)
    keep = (1 - clefts) * stain
    grain = _tile(rng, 0.8 / um_per_px)
    index = np.arange(n_px) % 512
    fine = 1 + 0.17 * grain[np.ix_(index, index)]
    return _enlarge(haema * keep, step, n_px) * fine, _enlarge(eosin * keep, step, n_px) * fine


def _fibres(there: Site, rng: np.random.Generator) -> NDArray:
    """Collagen: noise drawn out along the fibres, concentric around glands."""
    tile = _tile(rng, 1.5)
    straight = _lookup(tile, there.across / 0.8, there.along / 11)
    bundles = _lookup(tile, there.across / 2.2 + 100, there.along / 22)
    round_ = _lookup(tile, there.ring / 0.8, there.radial * 12)
    near = np.clip((there.ring + 30) / 10, 0, 1)
    texture = straight * (1 - near) + round_ * near
    gaps = np.clip(1.6 + _lookup(tile, there.across / 1.6 + 300, there.along / 14), 0.08, 1)
    return np.clip(0.68 + 0.22 * texture + 0.16 * bundles, 0.05, 1.8) * gaps


def _clefts(anatomy: Anatomy, x: NDArray, y: NDArray, rng: np.random.Generator) -> NDArray:
    """White gaps between the lobules, (…) in 0..1."""
    n = max(8, round((anatomy.side / 85) ** 2))
    seeds = rng.uniform(0, anatomy.side, (n, 2))
    wx, wy = x + 6 * SmoothNoise(rng, (25, 80))(x, y), y + 6 * SmoothNoise(rng, (25, 80))(x, y)
    distance, _ = cKDTree(seeds).query(np.stack([wx, wy], axis=-1), k=2)
    width = 1.6 + 1.2 * SmoothNoise(rng, (80, 300))(x, y)
    return 0.85 * np.clip(width - (distance[..., 1] - distance[..., 0]) / 2, 0, 1)


def _tile(rng: np.random.Generator, sigma: float) -> NDArray:
    """Periodic smooth noise of unit variance, (512, 512) float32."""
    noise = gaussian_filter(rng.standard_normal((512, 512)), max(sigma, 0.3), mode="wrap")
    return (noise / noise.std()).astype(np.float32)


def _lookup(tile: NDArray, rows: NDArray, columns: NDArray) -> NDArray:
    return map_coordinates(tile, np.stack([rows, columns]), order=1, mode="grid-wrap")


def _enlarge(low: NDArray, step: int, n_px: int) -> NDArray:
    if step == 1:
        return low[:n_px, :n_px].astype(np.float32)
    return zoom(low.astype(np.float32), step, order=1, mode="grid-constant", grid_mode=True)[:n_px, :n_px]
