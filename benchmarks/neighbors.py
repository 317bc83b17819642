"""Radius neighbours and neighbourhood means: time, peak memory and growth, beside squidpy and a sparse product.

    python benchmarks/neighbors.py

Every measurement is a process of its own. Writes ``docs/benchmarks/neighbors.{md,json}`` and a plot beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
TARGET = 50
SPACING = 10.0
"""Side in um of the square that a cell has to itself on average in uniform tissue."""
SIZES = [10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000, 4_000_000]
MEANS = {"140,702 x 152, float16": (140_702, 152, "float16"), "1,000,000 x 50, float32": (1_000_000, 50, "float32")}
NAMES = {
    "squidpy": "`squidpy.gr.spatial_neighbors`",
    "public": "`hn.pp.spatial_neighbors`",
    "engine": "`histoniche.neighbors.radius_graph`",
}


def tissue(kind: str, n: int) -> np.ndarray:
    """Centroids in random order, (n, 2) um: uniform, or dense clusters of 2,000 cells on a sparse ground."""
    import numpy as np

    rng = np.random.default_rng(0)
    side = SPACING * np.sqrt(n)
    if kind == "uniform":
        return rng.uniform(0, side, (n, 2))
    centers = rng.uniform(0, side, (max(1, n // 2000), 2))
    xy = centers[rng.integers(0, len(centers), n)] + rng.normal(0, 8 * SPACING, (n, 2))
    ground = rng.random(n) < 0.3
    xy[ground] = rng.uniform(0, side, (int(ground.sum()), 2))
    return xy


def memory() -> tuple[float, float]:
    """Resident memory of this process now and at its highest, MB."""
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return now / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measured(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Time of one call and its peak memory above what the process held before, and what it gives."""
    before, _ = memory()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before_mb": before, "peak_mb": memory()[1] - before}, result


def search(method: str, kind: str, n: int, *, check: bool) -> dict[str, Any]:
    """One search by one method; with ``check`` compare squidpy's edges and distances with ours afterwards."""
    import anndata
    import numpy as np

    from histoniche.neighbors import radius_for_density, radius_graph

    xy = tissue(kind, n)
    radius = radius_for_density(xy, TARGET)
    table, small = anndata.AnnData(obsm={"spatial": xy}), anndata.AnnData(obsm={"spatial": xy[:2000]})
    if method == "engine":

        def call(data: Any) -> Any:
            return radius_graph(data.obsm["spatial"], radius)
    elif method == "public":
        import histoniche as hn

        def call(data: Any) -> Any:
            hn.pp.spatial_neighbors(data, radius=radius)
    else:
        import squidpy

        def call(data: Any) -> Any:
            squidpy.gr.spatial_neighbors(data, coord_type="generic", radius=radius)

    call(small)  # what is imported and loaded at the first call does not count
    figures, graph = measured(lambda: call(table))
    if method == "engine":
        figures["mean_neighbors"] = float(graph.counts.mean())
    if check:
        ours, theirs = radius_graph(xy, radius), table.obsp["spatial_distances"]
        theirs.sort_indices()
        figures["same_edges"] = bool(
            np.array_equal(ours.indptr, theirs.indptr) and np.array_equal(ours.indices, theirs.indices)
        )
        figures["distance_difference_um"] = float(np.abs(ours.distances - theirs.data).max())
    return figures


def growth(kind: str, sizes: list[int]) -> dict[str, float]:
    """Median seconds of the engine over sizes; at one radius, so that the work per cell is the same."""
    from histoniche.neighbors import radius_for_density, radius_graph

    seconds = {}
    radius = radius_for_density(tissue(kind, sizes[len(sizes) // 2]), TARGET)
    for n in sizes:
        xy = tissue(kind, n)
        radius_graph(xy, radius)
        times = [
            measured(lambda xy=xy: radius_graph(xy, radius))[0]["seconds"]
            for _ in range(max(3, min(25, 1_000_000 // n)))
        ]
        seconds[str(n)] = statistics.median(times)
    return seconds


def mean(method: str, shape: str) -> dict[str, Any]:
    """Neighbourhood means, by ours or by a product with the sparse matrix of the graph."""
    import numpy as np
    from scipy import sparse

    from histoniche.neighbors import neighborhood_mean, radius_for_density, radius_graph

    n, d, dtype = MEANS[shape]
    xy = tissue("uniform", n)
    xy = xy[np.lexsort((xy[:, 0], xy[:, 1] // 50))]  # cells in files lie beside their neighbours, strip by strip
    graph = radius_graph(xy, radius_for_density(xy, TARGET))
    features = np.random.default_rng(1).random((n, d), dtype=np.float32).astype(dtype)

    def product() -> np.ndarray:
        near = sparse.csr_matrix((np.ones_like(graph.distances), graph.indices, graph.indptr), shape=(n, n))
        whole = features.astype(np.float32)
        return (near @ whole + whole) / (graph.counts + 1)[:, None].astype(np.float32)

    def ours() -> np.ndarray:
        return neighborhood_mean(graph, features)

    neighborhood_mean(radius_graph(xy[:100], 20.0), features[:100])
    call = ours if method == "ours" else product
    figures, result = measured(call)
    figures["seconds"] = statistics.median([figures["seconds"], *(measured(call)[0]["seconds"] for _ in range(2))])
    rows = np.arange(0, n, n // 50)
    figures["checksum"] = float(result[rows].astype(np.float64).sum())
    return figures


def first_use() -> dict[str, float]:
    """Seconds of the first call in a process, on 1,000 cells."""
    from histoniche.neighbors import radius_graph

    xy = tissue("uniform", 1000)
    return {"seconds": measured(lambda: radius_graph(xy, 40.0))[0]["seconds"]}


def run(task: dict[str, Any], environment: dict[str, str] | None = None) -> Any:
    """Run a task in a process of its own. This process imports nothing heavy: a child would inherit its peak."""
    command = [sys.executable, "-W", "ignore", __file__, "--task", json.dumps(task)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    if out.returncode:
        sys.exit(f"{task} failed:\n{out.stderr}")
    result = json.loads(out.stdout.strip().splitlines()[-1])
    print(task, result, flush=True)
    return result


def perform(task: dict[str, Any]) -> None:
    """The child: do the task and print its figures as the last line."""
    doing = {"search": search, "growth": growth, "mean": mean, "first_use": first_use}
    print(json.dumps(doing[task.pop("do")](**task)))


def compare(n: int, repeats: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Searches by all methods in turn, medians."""
    found: dict[str, dict[str, Any]] = {}
    for kind, times in repeats.items():
        rounds: dict[str, list[dict[str, Any]]] = {method: [] for method in NAMES}
        for turn in range(times):
            for method in NAMES:
                check = method == "squidpy" and turn == 0
                rounds[method].append(run({"do": "search", "method": method, "kind": kind, "n": n, "check": check}))
        for method, values in rounds.items():
            median = {name: statistics.median(v[name] for v in values) for name in ("seconds", "before_mb", "peak_mb")}
            found[f"{kind}.{method}"] = {**values[0], **median}
    return found


def slope(seconds: dict[str, float]) -> float:
    """Exponent of the growth: slope of log time over log cells."""
    import numpy as np

    return float(np.polyfit(np.log([int(n) for n in seconds]), np.log(list(seconds.values())), 1)[0])


def plot(grown: dict[str, dict[str, float]], found: dict[str, dict[str, Any]], n: int, path: Path) -> None:
    """Time over the number of cells, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for kind, marker in (("uniform", "o"), ("clustered", "s")):
        x = [int(size) for size in grown[kind]]
        axes.loglog(
            x, list(grown[kind].values()), marker=marker, label=f"radius_graph, {kind}: slope {slope(grown[kind]):.2f}"
        )
        axes.loglog(n, found[f"{kind}.squidpy"]["seconds"], marker=marker, ls="", color="0.3", label=f"squidpy, {kind}")
        axes.loglog(n, found[f"{kind}.public"]["seconds"], marker=marker, ls="", color="C2", label=f"hn.pp, {kind}")
    axes.set(xlabel="cells", ylabel="seconds", title=f"All neighbours within a radius, {TARGET} on average")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "growth.png", dpi=120)


def report(
    arguments: argparse.Namespace,
    found: dict[str, dict[str, Any]],
    grown: dict[str, dict[str, float]],
    means: dict[str, dict[str, Any]],
    first: dict[str, float],
) -> None:
    """Write the page, the flat figures and the plot."""
    flat: dict[str, Any] = {"cells": arguments.cells}
    for name, values in (*found.items(), *means.items()):
        flat |= {
            f"{name}.{key}": value if isinstance(value, bool) else round(value, 6) for key, value in values.items()
        }
    rows = []
    for kind in ("uniform", "clustered"):
        base = found[f"{kind}.squidpy"]
        for method, label in NAMES.items():
            x = found[f"{kind}.{method}"]
            faster, memory_share = base["seconds"] / x["seconds"], x["peak_mb"] / base["peak_mb"]
            flat |= {
                f"{kind}.{method}.times_faster": round(faster, 2),
                f"{kind}.{method}.memory_share": round(memory_share, 3),
            }
            rows.append(
                f"| {kind} | {label} | {x['seconds']:.2f} | {faster:.1f} | {x['before_mb']:.0f} | {x['peak_mb']:.0f} | {memory_share:.2f} |"
            )
        flat[f"{kind}.slope"] = round(slope(grown[kind]), 3)
    flat |= {f"{kind}.seconds.{n}": round(s, 5) for kind, values in grown.items() for n, s in values.items()}
    flat |= {f"first_use.{name}": round(value, 3) for name, value in first.items()}
    sizes = [f"| {int(n):,} | {grown['uniform'][n]:.4f} | {grown['clustered'][n]:.4f} |" for n in grown["uniform"]]
    mean_rows = []
    for shape in MEANS:
        ours, theirs = means[f"{shape}.ours"], means[f"{shape}.product"]
        mean_rows += [
            f"| {shape} | sparse product | {theirs['seconds']:.2f} | 1.0 | {theirs['peak_mb']:.0f} |",
            f"| {shape} | `neighborhood_mean` | {ours['seconds']:.2f} | {theirs['seconds'] / ours['seconds']:.1f} | {ours['peak_mb']:.0f} |",
        ]
    equal = ", ".join(
        f"{kind}: {'the same edges' if found[f'{kind}.squidpy']['same_edges'] else 'OTHER EDGES'}, distances differ by at most "
        f"{found[f'{kind}.squidpy']['distance_difference_um']:.1g} um"
        for kind in ("uniform", "clustered")
    )
    (arguments.docs / "neighbors.json").write_text(json.dumps(flat, indent=1) + "\n")
    (arguments.docs / "neighbors.md").write_text(page(arguments, rows, sizes, mean_rows, equal, flat))
    plot(grown, found, arguments.cells, arguments.docs / "neighbors")


def page(  # noqa: PLR0917
    arguments: argparse.Namespace,
    rows: list[str],
    sizes: list[str],
    mean_rows: list[str],
    equal: str,
    flat: dict[str, Any],
) -> str:
    """Text of the page."""
    from importlib.metadata import version

    missed = [
        f"{kind} {method}: {flat[f'{kind}.{method}.times_faster']:.1f} times"
        for kind in ("uniform", "clustered")
        for method in ("public", "engine")
        if flat[f"{kind}.{method}.times_faster"] < 8
    ]
    goal = f"missed ({'; '.join(missed)})" if missed else "met by the engine and by the public call"
    newline = "\n"
    return f"""# Neighbourhoods: speed and memory

All pairs of cells at most a radius apart, {TARGET} neighbours on average, {arguments.cells:,} synthetic cells in random order
(random order is the worst case for memory access). *Uniform*: evenly spread. *Clustered*: 70 % of the cells in Gaussian
clusters of 1,400, the rest spread evenly. All methods run in turn on the same coordinates with the same radius, each call in a
process of its own ({arguments.repeats} rounds uniform, {arguments.clustered_repeats} clustered; medians). Times are wall time of one call after a first
call on 2,000 cells. Memory is the peak of the process (`ru_maxrss`) above what it held just before the call (imports and
coordinates, *before*).

| tissue | method | seconds | times as fast as squidpy | before, MB | peak of the call, MB | share of squidpy's |
|---|---|---|---|---|---|---|
{newline.join(rows)}

`hn.pp.spatial_neighbors` also checks the coordinates (finite, no duplicates) and writes connectivities, distances and
provenance to the table. squidpy uses one core; histoniche uses all it may (`NUMBA_NUM_THREADS`).
The goal was 8 times squidpy's speed: {goal}. Results compared in full: {equal} (float32 against float64).

Kernels are compiled by numba on first use and kept on disk: the first call of `radius_graph` on a machine takes
{flat["first_use.compile"]:.1f} s, the first call in every later process {flat["first_use.cached"]:.2f} s.

## Growth

![Seconds over cells](neighbors/growth.png)

| cells | uniform, s | clustered, s |
|---|---|---|
{newline.join(sizes)}

Time grows with the number of cells to the power of {flat["uniform.slope"]:.2f} (uniform) and {flat["clustered.slope"]:.2f} (clustered), fitted over all sizes
(`radius_graph`, one radius, median of at least 3 calls).

## Neighbourhood means

Mean of the features over each cell and its neighbours; cells ordered in strips, as in the files of most instruments. The
sparse product is `(A @ X + X) / n` with SciPy, on a float32 copy of the features where they are float16.

| cells x features | method | seconds | times as fast | peak of the call, MB |
|---|---|---|---|---|
{newline.join(mean_rows)}

## Machine and command

{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, squidpy {version("squidpy")}, numba {version("numba")}, NumPy {version("numpy")}.

```bash
python benchmarks/neighbors.py
```

All figures: `neighbors.json`.
"""


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page, figures and plot go")
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--largest", type=int, default=4_000_000, help="largest size of the growth")
    parser.add_argument("--repeats", type=int, default=3, help="rounds on uniform tissue")
    parser.add_argument("--clustered-repeats", type=int, default=2, help="rounds on clustered tissue")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        perform(json.loads(arguments.task))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        first = {
            kind: run({"do": "first_use"}, {"NUMBA_CACHE_DIR": empty})["seconds"] for kind in ("compile", "cached")
        }
    found = compare(arguments.cells, {"uniform": arguments.repeats, "clustered": arguments.clustered_repeats})
    sizes = [n for n in SIZES if n <= arguments.largest]
    grown = {kind: run({"do": "growth", "kind": kind, "sizes": sizes}) for kind in ("uniform", "clustered")}
    means = {
        f"{shape}.{method}": run({"do": "mean", "method": method, "shape": shape})
        for shape in MEANS
        for method in ("product", "ours")
    }
    for shape in MEANS:
        ours, theirs = means[f"{shape}.ours"]["checksum"], means[f"{shape}.product"]["checksum"]
        if abs(ours - theirs) > 1e-4 * abs(theirs):
            sys.exit(f"{shape}: means differ, {ours} and {theirs}")
    report(arguments, found, grown, means, first)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
