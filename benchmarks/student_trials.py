"""What the student is given and made of, compared on bands inside the training part of the pancreas.

    python benchmarks/student_trials.py DATA/xenium_pancreas --runs OUTPUT_OF_XENIUM_PANCREAS

Takes split, neighbourhoods, features and teacher (first seed, K = 10) from a finished run of ``xenium_pancreas.py`` and looks at
training cells alone: two upright bands are validated on, and cells within ``BUFFER`` um of them are left out. Figures lie in
a file, so a run that was stopped goes on. Writes ``docs/benchmarks/student_trials.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np

import histoniche as hn
from histoniche import metrics
from histoniche.models import NicheStudent, StudentConfig
from histoniche.models._linear_probe import ProbeData, fit_linear_probe
from histoniche.neighbors import neighborhood_mean, radius_graph

if TYPE_CHECKING:
    from anndata import AnnData

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
FEATURES = "X_efficientnet-lite0"
BANDS = ((0.15, 0.30), (0.60, 0.75))
"""Quantiles of x of the training cells between which they are validated on."""
BUFFER = 330.0
N_STEPS = 400
PENALTY = 0.01
"""Of the probes, the same for all features."""
Values = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What is changed: the features, the student's configuration, the way it is fitted."""

    features: tuple[str, ...] = ("frozen",)
    config: tuple[tuple[str, Any], ...] = ()
    fit: tuple[tuple[str, Any], ...] = ()


VARIANTS = {
    "as it is": Variant(),
    "another seed": Variant(fit=(("seed", 1),)),
    "no context": Variant(config=(("context", []),)),
    "context of 2 hops alone": Variant(config=(("context", [2]),)),
    "outlines of the cells beside the features": Variant(features=("frozen", "outlines")),
    "adapted encoder": Variant(features=("adapted",)),
}
PROBED = ("as it is", "adapted encoder")
"""Variants whose features the linear probes are shown on."""


class Trial:
    """The training cells, which of them are fitted on, and the bands that are validated on."""

    def __init__(self, table: AnnData) -> None:
        rows = (table.obs["split"] == "train").to_numpy()
        self.table = table[rows].copy()
        self.xy = np.asarray(self.table.obsm["spatial"])
        self.radius = float(table.uns["niche_neighbors"]["params"]["radius"])
        self.graph = radius_graph(self.xy, self.radius)
        self.logits = np.asarray(self.table.obsm["niche_logits_teacher_disc"])
        self.niche = np.asarray(self.table.obsm["niche_logits_teacher"]).argmax(axis=1)
        x = self.xy[:, 0]
        self.fit, self.bands = np.ones(len(x), dtype=bool), []
        for low, high in (np.quantile(x, band) for band in BANDS):
            self.fit &= (x < low - BUFFER) | (x > high + BUFFER)
            self.bands.append((x >= low) & (x <= high))

    def score(self, labels: np.ndarray) -> dict[str, float]:
        """Mean of the bands."""
        types = self.table.obs["graph_cluster"]
        found = [
            (
                metrics.adjusted_rand(self.niche[band], labels[band]),
                metrics.normalized_mutual_info(self.niche[band], labels[band]),
                metrics.composition_jsd(self.niche[band], labels[band], types[band], match="identity"),
            )
            for band in self.bands
        ]
        return dict(zip(("ari", "nmi", "jsd"), np.mean(found, axis=0).tolist(), strict=True))

    def student(self, features: np.ndarray, variant: Variant) -> dict[str, float]:
        """Fit a student on the cells to fit on."""
        k = self.logits.shape[1]
        config = StudentConfig(features.shape[1], k, self.radius, **dict(variant.config))
        student = NicheStudent(config).fit(
            features, self.graph, self.xy, self.logits, train_cells=self.fit,
            **{"n_steps": N_STEPS, **dict(variant.fit)},
        )  # fmt: skip
        return self.score(student.predict(features, self.graph, self.xy).argmax(axis=1))

    def probe(self, x: np.ndarray) -> dict[str, float]:
        """Fit a linear probe on the cells to fit on."""
        probe = fit_linear_probe(ProbeData.of(x[self.fit].copy()), self.niche[self.fit], penalties=(PENALTY,))
        return self.score(probe.classes[(x @ probe.weights + probe.intercept).argmax(axis=1)])


def outlines(data: Path, trial: Trial) -> np.ndarray:
    """Log area, circularity, log elongation, solidity and log length of the cells' polygons, (n, 5)."""
    import geopandas
    import shapely

    shapes = geopandas.read_parquet(data / "cell_boundaries.parquet").loc[trial.table.obs_names].geometry.to_numpy()
    area = shapely.area(shapes)
    corners, owner = shapely.get_coordinates(shapely.oriented_envelope(shapes), return_index=True)
    first = np.searchsorted(owner, np.arange(len(shapes)))
    sides = np.linalg.norm(np.stack([corners[first + i + 1] - corners[first + i] for i in (0, 1)]), axis=2)
    length, width = sides.max(axis=0), np.maximum(sides.min(axis=0), 1e-3)
    round_, solid = 4 * np.pi * area / shapely.length(shapes) ** 2, area / shapely.area(shapely.convex_hull(shapes))
    return np.stack([np.log(area), round_, np.log(length / width), solid, np.log(length)], axis=1).astype(np.float16)


def features_of(name: str, trial: Trial, arguments: argparse.Namespace) -> np.ndarray:
    """Features of the training cells, (n, d) float16."""
    if name == "frozen":
        return np.asarray(trial.table.obsm[FEATURES])
    if name == "outlines":
        return outlines(arguments.data, trial)
    place = arguments.output / "adapted.npy"
    if not place.exists():
        import _adapt_encoder

        np.save(place, _adapt_encoder.adapted_features(arguments.runs / "tissue.zarr", trial, arguments.output))
    return np.load(place)


def report(results: dict[str, Values], arguments: argparse.Namespace) -> None:
    """Write the page and the flat figures."""
    flat = {f"{name}.{key}": round(value, 4) for name, row in results.items() for key, value in row.items()}
    (arguments.docs / "student_trials.json").write_text(json.dumps(flat, indent=1) + "\n")
    rows = [f"| {name} | {row['ari']:.3f} | {row['nmi']:.3f} | {row['jsd']:.3f} |" for name, row in results.items()]
    newline = "\n"
    (arguments.docs / "student_trials.md").write_text(f"""# What was tried with the student

On the training part of {{doc}}`xenium_pancreas` alone (**virtual** H&E, K = 10, the teacher of seed {arguments.seed}): two upright bands are validated
on, cells within {BUFFER:.0f} um of them left out, students see the rest ({N_STEPS} steps). Mean of the two bands. Far fewer cells than in the
main benchmark, some niches hardly among them: the figures are for comparison with each other, not with that page. More trials, on
other strips, are in {{doc}}`../design`.

| student | ARI | NMI | JSD |
|---|---|---|---|
{newline.join(rows)}

*Adapted encoder*: EfficientNet-Lite0 up to stride 16, trained for 8 epochs on the cells to fit on to tell the scVI latent of the
neighbourhood (mean over 1 and 2 hops) from the map at the cell, with turns, mirror images and changes of stain. It lifts what sees a cell
alone or with its neighbourhood, and lowers a student that reads context, by more than another seed does.

## Command

```bash
pip install ".[demo]"
python benchmarks/student_trials.py PATH/TO/xenium_pancreas --runs benchmarks/output/xenium_pancreas
```

After `xenium_pancreas.py`. {os.cpu_count()} cores ({platform.machine()}), no GPU; Python {platform.python_version()}. All figures: `student_trials.json`.
""")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cell_boundaries.parquet")
    parser.add_argument(
        "--runs", type=Path, default=HERE / "output" / "xenium_pancreas", help="output of xenium_pancreas.py"
    )
    parser.add_argument("--output", type=Path, default=HERE / "output" / "student_trials")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page and figures go")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    hn.settings.progress = False
    done = arguments.output / "results.json"
    results: dict[str, Values] = json.loads(done.read_text()) if done.exists() else {}
    trial = Trial(anndata.read_h5ad(arguments.runs / f"seed{arguments.seed}" / "k10" / "table.h5ad"))

    def keep(name: str, row: Values) -> None:
        results[name] = row
        done.write_text(json.dumps(results, indent=1))
        print(name, row, flush=True)

    for name, variant in VARIANTS.items():
        if name in results:
            continue
        x = np.concatenate([features_of(part, trial, arguments) for part in variant.features], axis=1)
        keep(name, trial.student(x, variant))
        if name in PROBED:
            own = x.astype(np.float32)
            keep(f"{name}: linear probe on the cell", trial.probe(own))
            both = np.concatenate([own, neighborhood_mean(trial.graph, x)], axis=1)
            keep(f"{name}: linear probe on cell and neighbourhood", trial.probe(both))
    report(results, arguments)


if __name__ == "__main__":
    main()
