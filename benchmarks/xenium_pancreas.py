"""The main job on a whole Xenium section, from files to map, with its baselines, time and memory.

    python benchmarks/xenium_pancreas.py DATA/xenium_pancreas

Each stage runs in a process of its own, so that its peak memory is its own, and is skipped where it is done already:
delete the folder ``--output`` to begin anew. The last stage writes ``docs/benchmarks/xenium_pancreas.{md,json}`` and
the pictures beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatialdata import SpatialData

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
ENCODER = "efficientnet-lite0"
FEATURES = f"X_{ENCODER}"


def read(output: Path, data: Path) -> None:
    """Read the vendor's layout, render virtual H&E, write both to zarr."""
    import _readers

    import histoniche as hn

    sdata = _readers.read_xenium_pancreas(data)
    table = sdata["table"]
    clusters = table.obs["graph_cluster"].cat.add_categories("none")
    table.obs["graph_cluster"] = clusters.fillna("none")
    hn.pp.virtual_he(sdata, image_key="morphology")
    del sdata.images["morphology"]
    sdata.write(output / "tissue.zarr", overwrite=True)


def with_table(step: Callable[[SpatialData, argparse.Namespace], None]) -> Callable[[Path, argparse.Namespace], None]:
    """Read image and table, run a step, and write the table back in one move."""

    def stage(output: Path, arguments: argparse.Namespace) -> None:
        import anndata
        import spatialdata

        sdata = spatialdata.read_zarr(output / "tissue.zarr")
        state = output / "table.h5ad"
        if state.exists():
            del sdata.tables["table"]
            sdata.tables["table"] = anndata.read_h5ad(state)
        step(sdata, arguments)
        sdata["table"].write_h5ad(output / "table.new.h5ad")
        (output / "table.new.h5ad").replace(state)

    return stage


@with_table
def holdout(sdata: SpatialData, _: argparse.Namespace) -> None:
    """Hold out the second of four strips."""
    import histoniche as hn

    hn.pp.spatial_holdout(sdata)


@with_table
def neighbors(sdata: SpatialData, _: argparse.Namespace) -> None:
    """Radius for 50 neighbours on the training cells, and the graph."""
    import histoniche as hn

    hn.pp.spatial_neighbors(sdata)


@with_table
def histology(sdata: SpatialData, arguments: argparse.Namespace) -> None:
    """Dense features of the virtual H&E."""
    import histoniche as hn

    hn.tl.histology_embedding(sdata, encoder=ENCODER, mode="dense", store=arguments.output / "features.zarr")


@with_table
def molecular(sdata: SpatialData, arguments: argparse.Namespace) -> None:
    """scVI on the training cells."""
    import histoniche as hn

    hn.tl.molecular_embedding(sdata, empty_cells="mean", seed=arguments.seed)


@with_table
def teacher(sdata: SpatialData, arguments: argparse.Namespace) -> None:
    """NOLAN on the training cells."""
    import histoniche as hn

    hn.tl.nolan(sdata, n_niches=arguments.n_niches, seed=arguments.seed)


@with_table
def student(sdata: SpatialData, arguments: argparse.Namespace) -> None:
    """Distil, and predict all cells."""
    import histoniche as hn

    hn.tl.distill_niches(
        sdata,
        n_niches=arguments.n_niches,
        encoder=ENCODER,
        mode="dense",
        model_dir=arguments.output / "model",
        overwrite=True,
        seed=arguments.seed,
    )


@with_table
def evaluate(sdata: SpatialData, arguments: argparse.Namespace) -> None:
    """Student and baselines on the test strip."""
    import histoniche as hn

    hn.tl.evaluate_niches(sdata, cell_type_key="graph_cluster", seed=arguments.seed)


@with_table
def plots(sdata: SpatialData, arguments: argparse.Namespace) -> None:
    """Niche maps, composition, confusion, training, exemplars."""
    import histoniche as hn

    place = arguments.docs / "xenium_pancreas"
    place.mkdir(parents=True, exist_ok=True)
    hn.pl.niche_map(sdata, image_key="virtual_he", save=place / "niche_map.jpg")
    hn.pl.niche_composition(sdata, cell_type_key="graph_cluster", save=place / "composition.jpg")
    hn.pl.confusion(sdata, save=place / "confusion.jpg")
    hn.pl.training_history(sdata, save=place / "training.jpg")
    hn.pl.exemplars(sdata, image_key="virtual_he", save=place / "exemplars.jpg")


STAGES = {
    "read": None,
    "holdout": holdout,
    "neighbors": neighbors,
    "histology": histology,
    "molecular": molecular,
    "teacher": teacher,
    "student": student,
    "evaluate": evaluate,
    "plots": plots,
}


def run_stage(name: str, arguments: argparse.Namespace) -> None:
    """Run one stage in this process."""
    if name == "read":
        read(arguments.output, arguments.data)
    else:
        STAGES[name](arguments.output, arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Run the stages that are not done, each in its own process, and write the report."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "stages.json"
    wanted = {"n_niches": arguments.n_niches, "seed": arguments.seed}
    done = json.loads(log.read_text()) if log.exists() else {"settings": wanted, "stages": {}}
    if done["settings"] != wanted:
        sys.exit(f"{arguments.output} holds a run with {done['settings']}, not {wanted}: name another --output.")
    for name in STAGES:
        if name in done["stages"]:
            print(f"{name}: done before", flush=True)
            continue
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--stage", name])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"stage {name} failed")
        seconds, gigabytes = time.perf_counter() - start, usage.ru_maxrss / 1024**2
        done["stages"][name] = {"seconds": round(seconds, 1), "peak_gb": round(gigabytes, 2)}
        (arguments.output / "stages.new.json").write_text(json.dumps(done, indent=1))
        (arguments.output / "stages.new.json").replace(log)
        print(f"== {name}: {seconds:.0f} s, {gigabytes:.2f} GB", flush=True)
    report(arguments, done["stages"])


def report(arguments: argparse.Namespace, stages: dict[str, dict[str, float]]) -> None:
    """Write the page and the flat figures."""
    import anndata

    table = anndata.read_h5ad(arguments.output / "table.h5ad")
    figures = table.uns["niche_evaluation"]
    origin = table.uns["histoniche"]
    radius = float(table.uns["niche_neighbors"]["params"]["radius"])
    total = sum(s["seconds"] for s in stages.values())
    peak = max(s["peak_gb"] for s in stages.values())
    split = table.obs["split"].value_counts()
    k = f"k{arguments.n_niches}"
    flat = {
        f"{k}.{model}.{name}": round(float(row[name]), 4)
        for model, row in figures.iterrows()
        for name in ("ari", "nmi", "jsd")
    }
    flat |= {f"seconds.{name}": s["seconds"] for name, s in stages.items()} | {"seconds.total": round(total, 1)}
    flat |= {f"peak_gb.{name}": s["peak_gb"] for name, s in stages.items()} | {"peak_gb.max": peak}
    (arguments.docs / "xenium_pancreas.json").write_text(json.dumps(flat, indent=1) + "\n")
    rows = [
        f"| {model} | {row['ari']:.3f} | {row['nmi']:.3f} | {row['jsd']:.4f} | {int(row['n_niches'])} | {row['effective_niches']:.2f} |"
        for model, row in figures.iterrows()
    ]
    times = [f"| {name} | {s['seconds']:.0f} | {s['peak_gb']:.2f} |" for name, s in stages.items()]
    nolan = origin["nolan"]["params"]
    page = f"""# Xenium pancreas: from files to map

One whole Xenium section of human pancreas ({table.n_obs:,} cells; data CC BY 4.0, 10x Genomics). The H&E is **virtual**:
rendered from the section's own DAPI, 18S and alphaSMA/vimentin stains (`hn.pp.virtual_he`), not scanned. EfficientNet-Lite0
(ImageNet weights) dense features at 0.5 um/px; scVI and NOLAN fitted on training cells; K = {arguments.n_niches};
radius {radius:.1f} um (50 neighbours on average on training cells). One run, seed {arguments.seed}.

The second of four horizontal strips is held out ({split["test"]:,} test cells, {split["train"]:,} for training,
{split["buffer"]:,} in the buffer of {float(origin["spatial_holdout"]["params"]["buffer"]):.0f} um on either side). No
setting was chosen on the test strip. The vendor's clusters stand in for cell types in JSD.

| on the test strip, against the teacher | ARI | NMI | JSD | niches in use | effective niches |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Higher is better for ARI and NMI, lower for JSD (composition; definition: `hn.metrics.composition_jsd`). The probes are
logistic regressions on the features of the cell, and of the cell beside its neighbourhood's mean; they and the student saw
the teacher's niches of training cells. Histology NOLAN and Histology Leiden saw no niche. The teacher ended with
{float(nolan["final_effective_niches"]):.2f} effective niches of {arguments.n_niches}.

![Niche maps of teacher and student](xenium_pancreas/niche_map.jpg)

![Composition](xenium_pancreas/composition.jpg)

![Confusion on the test strip](xenium_pancreas/confusion.jpg)

![Crops of virtual H&E of each niche](xenium_pancreas/exemplars.jpg)

![Training](xenium_pancreas/training.jpg)

## Time and memory

Whole processes, imports and reading included, on {os.cpu_count()} cores ({platform.machine()}), no GPU; Python
{platform.python_version()}. In total {total / 60:.1f} minutes; the largest process peaked at {peak:.2f} GB.

| stage | seconds | peak memory, GB |
|---|---|---|
{chr(10).join(times)}

## Command

```bash
pip install ".[demo]"
python benchmarks/xenium_pancreas.py PATH/TO/xenium_pancreas
```

Every stage is resumed where a run was stopped. All figures: `xenium_pancreas.json`.
"""
    (arguments.docs / "xenium_pancreas.md").write_text(page)
    print(figures.to_string(), f"\ntotal {total / 60:.1f} min, peak {peak:.2f} GB")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cells.h5ad and morphology.ome.tif")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "xenium_pancreas")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page, figures and pictures go")
    parser.add_argument("--n-niches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments)
    else:
        run_all(arguments)


if __name__ == "__main__":
    main()
