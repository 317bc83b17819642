"""The main job on a whole Xenium section, from files to map, with its baselines, time and memory.

    python benchmarks/xenium_pancreas.py DATA/xenium_pancreas

For each seed a molecular embedding, and for each seed and number of niches a teacher, a student and the baselines. Each
stage runs in a process of its own, so that its peak memory is its own, and is skipped where it is done already: delete
the folder ``--output`` to begin anew. The first seed and number of niches are timed alone on the machine; what follows
may share it (``--jobs``). At the end ``docs/benchmarks/xenium_pancreas.{md,json}`` and the pictures beside them are written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatialdata import SpatialData

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
ENCODER = "efficientnet-lite0"
CONTEXT_HOPS = 4
SYMMETRIES = 4
"""Features are means over mirror images: a network trained on photographs knows up and down."""
UNSUPERVISED = ("histology_nolan", "histology_leiden")
"""Baselines that are also run on features of three strides: coarser ones cluster better, finer ones teach better."""


@dataclass(frozen=True)
class Job:
    """What a stage is run for; the more is given, the deeper its folder lies."""

    output: Path
    data: Path
    docs: Path
    seed: int | None = None
    n_niches: int | None = None

    @property
    def folder(self) -> Path:
        """Where the table of this job lies."""
        parts = [] if self.seed is None else [f"seed{self.seed}"]
        parts += [] if self.n_niches is None else [f"k{self.n_niches}"]
        return self.output.joinpath(*parts)

    @property
    def name(self) -> str:
        """The folder relative to the output, for the log."""
        return "" if self.folder == self.output else f"{self.folder.relative_to(self.output)}/"

    def read(self) -> SpatialData:
        """The image, and the table of this job or else of the nearest folder above."""
        import anndata
        import spatialdata

        sdata = spatialdata.read_zarr(self.output / "tissue.zarr")
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            if (folder / "table.h5ad").exists():
                del sdata.tables["table"]
                sdata.tables["table"] = anndata.read_h5ad(folder / "table.h5ad")
                break
            if folder == self.output:
                break
        return sdata

    def write(self, sdata: SpatialData) -> None:
        """Write the table in one move."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sdata["table"].write_h5ad(self.folder / "table.new.h5ad")
        (self.folder / "table.new.h5ad").replace(self.folder / "table.h5ad")


def read(job: Job) -> None:
    """Read the vendor's layout, render virtual H&E, write both to zarr."""
    import _readers

    import histoniche as hn

    sdata = _readers.read_xenium_pancreas(job.data)
    table = sdata["table"]
    clusters = table.obs["graph_cluster"].cat.add_categories("none")
    table.obs["graph_cluster"] = clusters.fillna("none")
    hn.pp.virtual_he(sdata, image_key="morphology")
    del sdata.images["morphology"]
    sdata.write(job.output / "tissue.zarr", overwrite=True)


def stage(step: Callable[[SpatialData, Job], None]) -> Callable[[Job], None]:
    """A step between reading and writing of the table."""

    def run(job: Job) -> None:
        sdata = job.read()
        step(sdata, job)
        job.write(sdata)

    return run


@stage
def holdout(sdata: SpatialData, _: Job) -> None:
    """Hold out the second of four strips."""
    import histoniche as hn

    hn.pp.spatial_holdout(sdata, context_hops=CONTEXT_HOPS)


@stage
def neighbors(sdata: SpatialData, _: Job) -> None:
    """Radius for 50 neighbours on the training cells, and the graph."""
    import histoniche as hn

    hn.pp.spatial_neighbors(sdata)


@stage
def histology(sdata: SpatialData, job: Job) -> None:
    """Dense features of the virtual H&E."""
    import histoniche as hn

    hn.tl.histology_embedding(
        sdata, encoder=ENCODER, mode="dense", symmetries=SYMMETRIES, store=job.output / "features.zarr"
    )


@stage
def molecular(sdata: SpatialData, job: Job) -> None:
    """scVI on the training cells."""
    import histoniche as hn

    hn.tl.molecular_embedding(sdata, empty_cells="mean", seed=job.seed)


@stage
def teacher(sdata: SpatialData, job: Job) -> None:
    """NOLAN on the training cells."""
    import histoniche as hn

    hn.tl.nolan(sdata, n_niches=job.n_niches, seed=job.seed)


@stage
def student(sdata: SpatialData, job: Job) -> None:
    """Distil, and predict all cells."""
    import histoniche as hn

    hn.tl.distill_niches(
        sdata, n_niches=job.n_niches, encoder=ENCODER, mode="dense", model_dir=job.folder / "model", overwrite=True,
        seed=job.seed,
    )  # fmt: skip


@stage
def evaluate(sdata: SpatialData, job: Job) -> None:
    """Student and baselines on the test strip."""
    import histoniche as hn

    hn.tl.evaluate_niches(sdata, cell_type_key="graph_cluster", seed=job.seed)


def histology_3_strides(job: Job) -> None:
    """Dense features with stride 32 beside 8 and 16, for the unsupervised baselines."""
    from dataclasses import replace

    import numpy as np

    import histoniche as hn

    usual = hn.encoders.get(ENCODER)
    hn.encoders.register(replace(usual, name=f"{ENCODER}-3-strides", dense_strides=(8, 16, 32)))
    sdata = job.read()
    store = job.output / "features_3.zarr"
    hn.tl.histology_embedding(
        sdata, encoder=f"{ENCODER}-3-strides", mode="dense", symmetries=SYMMETRIES, key_added="three", store=store
    )
    np.save(job.output / "features_3.npy", sdata["table"].obsm["three"])


def unsupervised(job: Job) -> None:
    """The unsupervised baselines on three strides; their figures go to a file."""
    import numpy as np

    import histoniche as hn

    table = job.read()["table"]
    table.obsm["three"] = np.load(job.output / "features_3.npy")
    hn.tl.evaluate_niches(
        table, features_key="three", baselines=UNSUPERVISED, cell_type_key="graph_cluster", n_boot=0, seed=job.seed
    )
    figures = table.uns["niche_evaluation"].loc[list(UNSUPERVISED), ["ari", "nmi", "jsd", "effective_niches"]]
    (job.folder / "unsupervised.json").write_text(figures.to_json(orient="index"))


def plots(job: Job) -> None:
    """Niche maps, composition, confusion, training, exemplars."""
    import histoniche as hn

    sdata = job.read()
    place = job.docs / "xenium_pancreas"
    place.mkdir(parents=True, exist_ok=True)
    hn.pl.niche_map(sdata, image_key="virtual_he", save=place / "niche_map.jpg")
    hn.pl.niche_composition(sdata, cell_type_key="graph_cluster", save=place / "composition.jpg")
    hn.pl.confusion(sdata, save=place / "confusion.jpg")
    hn.pl.training_history(sdata, save=place / "training.jpg")
    hn.pl.exemplars(sdata, image_key="virtual_he", save=place / "exemplars.jpg")


def further_map(job: Job) -> None:
    """Niche map of another number of niches."""
    import histoniche as hn

    save = job.docs / "xenium_pancreas" / f"niche_map_k{job.n_niches}.jpg"
    hn.pl.niche_map(job.read(), image_key="virtual_he", save=save)


ONCE = {"read": read, "holdout": holdout, "neighbors": neighbors, "histology": histology}
PER_SEED = {"molecular": molecular}
PER_RUN = {"teacher": teacher, "student": student, "evaluate": evaluate}
STAGES = {
    **ONCE, **PER_SEED, **PER_RUN, "plots": plots, "further_map": further_map, "histology_3_strides": histology_3_strides,
    "unsupervised": unsupervised,
}  # fmt: skip


class Runner:
    """Runs stages in processes of their own, and logs their seconds and peak memory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.log = arguments.output / "stages.json"
        self.lock = threading.Lock()
        arguments.output.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, float]] = json.loads(self.log.read_text()) if self.log.exists() else {}

    def __call__(self, job: Job, names: list[str], *, alone: bool) -> None:
        """Run stages one after the other; ``alone`` on the machine, or beside others."""
        for name in names:
            key = job.name + name
            if key in self.done:
                print(f"{key}: done before", flush=True)
                continue
            command = [sys.executable, __file__, str(job.data), "--output", str(job.output), "--docs", str(job.docs)]
            for option, value in (("--seeds", job.seed), ("--n-niches", job.n_niches)):
                command += [] if value is None else [option, str(value)]
            environment = dict(os.environ)
            if not alone:
                environment |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "NUMBA")}
            print(f"== {key}", flush=True)
            start = time.perf_counter()
            process = subprocess.Popen([*command, "--stage", name], env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"stage {key} failed")
            seconds, gigabytes = time.perf_counter() - start, usage.ru_maxrss / 1024**2
            with self.lock:
                self.done[key] = {"seconds": round(seconds, 1), "peak_gb": round(gigabytes, 2), "alone": alone}
                self.log.with_suffix(".new").write_text(json.dumps(self.done, indent=1))
                self.log.with_suffix(".new").replace(self.log)
            print(f"== {key}: {seconds:.0f} s, {gigabytes:.2f} GB", flush=True)


def run_all(arguments: argparse.Namespace) -> None:
    """Run the stages that are not done, and write the page."""
    from _pancreas_page import write_page

    runner = Runner(arguments)
    base = Job(arguments.output, arguments.data, arguments.docs)

    def job(seed: int, n_niches: int | None = None) -> Job:
        return Job(base.output, base.data, base.docs, seed, n_niches)

    first = job(arguments.seeds[0], arguments.n_niches[0])
    runner(base, list(ONCE), alone=True)
    runner(job(arguments.seeds[0]), list(PER_SEED), alone=True)
    runner(first, [*PER_RUN, "plots"], alone=True)

    runner(base, ["histology_3_strides"], alone=True)

    def others(seed: int, n_niches: int) -> None:
        runner(job(seed, n_niches), [*PER_RUN, "unsupervised"], alone=arguments.jobs == 1)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for made in [
            pool.submit(runner, job(seed), list(PER_SEED), alone=arguments.jobs == 1) for seed in arguments.seeds
        ]:
            made.result()
        for made in [pool.submit(others, s, k) for s in arguments.seeds for k in arguments.n_niches]:
            made.result()
    for k in arguments.n_niches[1:]:
        runner(job(arguments.seeds[0], k), ["further_map"], alone=True)
    write_page(base.output, base.docs, arguments.seeds, arguments.n_niches, runner.done)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cells.h5ad and morphology.ome.tif")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "xenium_pancreas")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page, figures and pictures go")
    parser.add_argument("--n-niches", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time after the first, with one thread each")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        per_seed = arguments.stage in PER_SEED
        per_run = arguments.stage in PER_RUN or arguments.stage in ("plots", "further_map", "unsupervised")
        STAGES[arguments.stage](
            Job(
                arguments.output,
                arguments.data,
                arguments.docs,
                arguments.seeds[0] if per_seed or per_run else None,
                arguments.n_niches[0] if per_run else None,
            )
        )
    else:
        run_all(arguments)


if __name__ == "__main__":
    main()
