"""Anatomy of the synthetic tissue: which niche lies where, and where its cells are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELL_TYPES = ("acinar", "ductal", "endocrine", "fibroblast", "lymphocyte", "macrophage")

# Share of each cell type in each niche (rows sum to 1): no type is confined to one niche, none rules one alone.
NICHES: dict[str, tuple[float, ...]] = {
    "acinar": (0.72, 0.05, 0.02, 0.08, 0.05, 0.08),
    "stroma": (0.05, 0.05, 0.02, 0.60, 0.12, 0.16),
    "lymphoid": (0.03, 0.03, 0.02, 0.10, 0.68, 0.14),
    "islet": (0.14, 0.04, 0.62, 0.08, 0.04, 0.08),
    "duct": (0.04, 0.50, 0.02, 0.26, 0.10, 0.08),
    "inflamed": (0.30, 0.14, 0.03, 0.18, 0.20, 0.15),
}
_RING = (0.03, 0.85, 0.02, 0.02, 0.05, 0.03)
_BETWEEN_GLANDS = (0.04, 0.06, 0.02, 0.60, 0.16, 0.12)
_DENSITY = {"acinar": 1.0, "stroma": 0.7, "lymphoid": 2.1, "islet": 1.25, "duct": 0.65, "inflamed": 1.2}
_RING_DENSITY = 5.0
_SLOT_UM = 275.0
MARGIN_UM = 8.0


class SmoothNoise:
    """Stationary noise of unit variance that can be evaluated anywhere: a sum of plane waves."""

    def __init__(self, rng: np.random.Generator, wavelength: tuple[float, float], n_waves: int = 14) -> None:
        low, high = wavelength
        length = np.exp(rng.uniform(np.log(low), np.log(high), n_waves))
        angle = rng.uniform(0, 2 * np.pi, n_waves)
        self._k = (2 * np.pi / length * np.array([np.cos(angle), np.sin(angle)])).T
        self._phase = rng.uniform(0, 2 * np.pi, n_waves)

    def __call__(self, x: NDArray, y: NDArray) -> NDArray:
        """Value at x, y in um."""
        total = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(y)), dtype=np.float32)
        for (kx, ky), phase in zip(self._k, self._phase, strict=True):
            total += np.sin(kx * x + ky * y + phase)
        return total * np.float32(np.sqrt(2 / len(self._phase)))


@dataclass
class Site:
    """What the anatomy says about a set of points; every array has the shape of the points."""

    signed: NDArray
    """(n_niches, ...) depth inside each niche in um; the largest one rules."""
    lumen: NDArray
    """Depth inside the nearest lumen in um; negative outside."""
    ring: NDArray
    """Depth inside the nearest gland (epithelium and lumen) in um."""
    radial: NDArray
    """Angle from the centre of the nearest gland."""
    across: NDArray
    """Distance across the fibres of the stroma in um."""
    along: NDArray
    """Distance along them in um."""

    @property
    def niche(self) -> NDArray:
        """Index of the niche."""
        return np.argmax(self.signed, axis=0)


@dataclass
class Anatomy:
    """Layout of a square piece of tissue; drawn once, evaluated anywhere."""

    side: float
    niches: tuple[str, ...]
    rng: np.random.Generator
    centres: dict[str, NDArray] = field(default_factory=dict)
    radii: dict[str, NDArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng
        self._slots = max(4, round(self.side / _SLOT_UM))
        self._pitch = self.side / self._slots
        self._scale = self._pitch / _SLOT_UM
        self._warp = [SmoothNoise(rng, (70 * self._scale, 260 * self._scale)) for _ in range(2)]
        self._fine = SmoothNoise(rng, (25, 70))
        self._draw_blobs()
        self._draw_bands()
        self._draw_glands()

    def _draw_blobs(self) -> None:
        """One blob of every niche in every row of slots, so that every horizontal strip holds every niche."""
        blobs, rng, m = self.niches[2:], self.rng, self._slots
        placed: dict[str, list[tuple[float, float]]] = {name: [] for name in blobs}
        start = int(rng.integers(m))
        for row in range(m):
            for column in range(m):
                place = (column + 2 * row + start) % m % max(4, len(blobs))
                if place < len(blobs):
                    jitter = rng.uniform(-0.1, 0.1, 2)
                    placed[blobs[place]].append(((column + 0.5 + jitter[0]), (row + 0.5 + jitter[1])))
        for name, xy in placed.items():
            self.centres[name] = np.asarray(xy) * self._pitch
            self.radii[name] = rng.uniform(0.36, 0.46, len(xy)) * self._pitch

    def _draw_bands(self) -> None:
        n = max(1, round(self.side / (2 * self._pitch)))
        self._bands = (np.arange(n) + 0.5) / n * self.side + self.rng.uniform(-0.15, 0.15, n) * self._pitch
        self._band_phase = self.rng.uniform(0, 2 * np.pi)
        self._band_width = 0.40 * self._pitch

    def _draw_glands(self) -> None:
        rng = self.rng
        centres, lumens = [np.empty((0, 2))], [np.empty(0)]
        for centre, radius in zip(self.centres.get("duct", ()), self.radii.get("duct", ()), strict=True):
            size = min(1.0, radius / 60)
            n = int(rng.integers(4, 7)) if radius > 60 else 0
            angle = 2 * np.pi * (np.arange(n) + rng.uniform(0, 0.3, n)) / max(n, 1) + rng.uniform(0, 2 * np.pi)
            distance = rng.uniform(0.58, 0.72, n) * radius
            around = centre + distance[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
            centres.append(np.vstack([centre, around]))
            lumens.append(size * np.append(rng.uniform(13, 22), rng.uniform(7, 14, n)))
        self._glands, self._lumens = np.vstack(centres), np.concatenate(lumens)
        self._wobble = rng.uniform(0, 2 * np.pi, (len(self._glands), 2))
        self._wall = 15.0 * min(1.0, self._scale * 1.5)

    def at(self, x: NDArray, y: NDArray) -> Site:
        """Evaluate the anatomy at points in um."""
        amount = 15 * self._scale
        wx, wy = x + amount * self._warp[0](x, y), y + amount * self._warp[1](x, y)
        points = np.stack([wx, wy], axis=-1)
        sway = 0.18 * self._pitch * np.sin(2 * np.pi * wy / (2.3 * self._pitch) + self._band_phase)
        offset = (wx - sway)[..., None] - self._bands
        across = np.take_along_axis(offset, np.abs(offset).argmin(-1)[..., None], -1)[..., 0]
        signed = [np.zeros(np.shape(wx)), self._band_width / 2 - np.abs(across)]
        for name in self.niches[2:]:
            distance, nearest = cKDTree(self.centres[name]).query(points)
            signed.append(self.radii[name][nearest] - distance)
        lumen, ring, radial = self._gland_depth(points, x, y)
        return Site(
            signed=np.stack(signed).astype(np.float32),
            lumen=lumen,
            ring=ring,
            radial=radial,
            across=across + 2.5 * self._fine(x, y),
            along=wy,
        )

    def _gland_depth(self, points: NDArray, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        if not len(self._glands):
            far = np.full(np.shape(x), -1e3)
            return far, far, np.zeros(np.shape(x))
        _, nearest = cKDTree(self._glands).query(points)
        delta = points - self._glands[nearest]
        angle, distance = np.arctan2(delta[..., 1], delta[..., 0]), np.hypot(delta[..., 0], delta[..., 1])
        wobble = self._wobble[nearest]
        shape = 1 + 0.22 * np.sin(2 * angle + wobble[..., 0]) + 0.10 * np.sin(3 * angle + wobble[..., 1])
        lumen = self._lumens[nearest] * shape - distance + 1.2 * self._fine(y, x)
        return lumen, lumen + self._wall, angle

    def _basal(self, site: Site) -> NDArray:
        return (site.ring > 1.5) & (site.lumen < -0.45 * self._wall)

    def density(self, site: Site) -> NDArray:
        """Relative density of cells."""
        of_niche = np.array([_DENSITY[name] for name in self.niches])
        density = of_niche[site.niche]
        if "duct" in self.niches:
            duct = site.niche == self.niches.index("duct")
            # Nuclei of a columnar epithelium lie in the outer half of the wall, away from the lumen.
            density = np.where(duct & (site.ring > -2), 0.0, density)
            density = np.where(duct & self._basal(site), _RING_DENSITY, density)
        return density

    def place_cells(self, n_cells: int) -> NDArray:
        """Centroids of the cells, (n_cells, 2) float64 in um, spaced as their density asks."""
        rng, step = self.rng, 2.0
        centre = np.arange(MARGIN_UM + step / 2, self.side - MARGIN_UM, step)
        grid_x, grid_y = (a.ravel() for a in np.meshgrid(centre, centre))
        weight = self.density(self.at(grid_x, grid_y))
        cumulative = np.cumsum(weight)
        # Systematic sampling along the grid is more even than independent draws; jitter and repulsion hide the grid.
        picks = np.searchsorted(cumulative, (np.arange(n_cells) + rng.uniform()) / n_cells * cumulative[-1])
        jitter = rng.uniform(-step / 2, step / 2, (n_cells, 2))
        xy = np.column_stack([grid_x[picks], grid_y[picks]]) + jitter
        empty = self.density(self.at(xy[:, 0], xy[:, 1])) == 0
        xy[empty] -= 0.99 * jitter[empty]
        spacing = 0.92 * np.sqrt(step**2 * cumulative[-1] / n_cells)
        density = self.density(self.at(xy[:, 0], xy[:, 1]))
        for _ in range(14):
            wanted = spacing / np.sqrt(np.maximum(density, 0.3))
            pairs = cKDTree(xy).query_pairs(float(wanted.max()), output_type="ndarray")
            pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
            delta = xy[pairs[:, 0]] - xy[pairs[:, 1]]
            distance = np.maximum(np.hypot(delta[:, 0], delta[:, 1]), 1e-6)
            missing = np.maximum(0.5 * (wanted[pairs[:, 0]] + wanted[pairs[:, 1]]) - distance, 0)
            push = 0.35 * (missing / distance)[:, None] * delta
            moved = xy.copy()
            np.add.at(moved, pairs[:, 0], push)
            np.add.at(moved, pairs[:, 1], -push)
            moved = np.clip(moved, MARGIN_UM, self.side - MARGIN_UM)
            # Only within tissue of the same kind: repulsion would empty the thin epithelia.
            allowed = self.density(self.at(moved[:, 0], moved[:, 1])) == density
            xy[allowed] = moved[allowed]
        return xy

    def draw_types(self, site: Site) -> NDArray:
        """Cell type of every cell, drawn from the composition of its niche, (n,) int64."""
        share = np.array([NICHES[name] for name in self.niches])[site.niche]
        if "duct" in self.niches:
            duct = site.niche == self.niches.index("duct")
            share = np.where((duct & (site.ring > 0))[:, None], _RING, share)
            share = np.where((duct & (site.ring <= 0))[:, None], _BETWEEN_GLANDS, share)
        cumulative = np.cumsum(share, axis=1)
        draw = self.rng.uniform(0, 1, (len(share), 1)) * cumulative[:, -1:]
        return (draw > cumulative).sum(axis=1)
