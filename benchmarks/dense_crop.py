"""Dense features beside crops: cells per second, and what a student makes of each.

    python benchmarks/dense_crop.py DATA

DATA holds ``xenium_pancreas`` and ``visium_hd_kidney``. On a part of the pancreas (virtual H&E) and on the kidney (real
H&E, bins of 16 um) every cell is embedded in both modes, students are trained on either, and the speed is measured.
``--tissue`` names the output of ``xenium_pancreas.py``, whose virtual H&E is then used instead of being rendered again.
Features lie in stores and figures in a file, so a run that was stopped goes on; delete the folder ``--output`` to begin
anew. Writes ``docs/benchmarks/dense_crop.{md,json}`` and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _readers
import numpy as np
from spatialdata import SpatialData
from spatialdata.models import TableModel

import histoniche as hn

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
ENCODER = "efficientnet-lite0"
N_NICHES = 10
CROP_PX = 224
MODES: tuple[Literal["dense", "crop"], ...] = ("dense", "crop")


@dataclass(frozen=True)
class Tissue:
    """A tissue to compare on: its name on the page, and the resolution of the encoder in um/px."""

    title: str
    um_per_px: float


TISSUES = {
    "pancreas": Tissue("Xenium pancreas, a part (virtual H&E)", 0.5),
    "kidney": Tissue("Visium HD kidney, bins of 16 um (H&E)", _readers.KIDNEY_UM_PER_PX),
}


# -------------------------------------------------------------------------------------------------------------- tissue
def pancreas(data: Path, tissue: Path | None, n_cells: int) -> SpatialData:
    """The cells around the middle of the section, over its whole height, with their part of the virtual H&E."""
    import spatialdata

    if tissue is not None:
        sdata = spatialdata.read_zarr(tissue / "tissue.zarr")
    else:
        sdata = _readers.read_xenium_pancreas(data / "xenium_pancreas")
        hn.pp.virtual_he(sdata, image_key="morphology")
    table = sdata["table"]
    return part_of(sdata, table[around_middle(table.obsm["spatial"], n_cells)].copy(), "virtual_he", 0.425)


def around_middle(xy: np.ndarray, n_cells: int) -> np.ndarray:
    """The cells nearest to the middle along x, at any height."""
    x = xy[:, 0]
    return np.sort(np.argsort(np.abs(x - (x.min() + x.max()) / 2))[:n_cells])


def part_of(sdata: SpatialData, table: Any, image_key: str, um_per_px: float) -> SpatialData:
    """An object with some cells and the image as wide as they lie."""
    image = sdata[image_key]["scale0"]["image"].data
    columns = table.obsm["spatial"][:, 0] / um_per_px
    low, high = int(columns.min()) - 1, int(columns.max()) + 2
    low = max(low, 0)
    for key in ("niche_connectivities", "niche_distances"):
        table.obsp.pop(key, None)
    table.uns.clear()
    table.obsm["spatial"] = table.obsm["spatial"] - [low * um_per_px, 0]
    part = SpatialData.init_from_elements({"table": TableModel.parse(table)})
    hn.io.attach_image(part, image[:, :, low:high].compute(), um_per_px=um_per_px)
    return part


def prepared(name: str, arguments: argparse.Namespace) -> SpatialData:
    """Cells, image, split, neighbourhoods and molecular embedding; from ``output`` where they were made before."""
    import spatialdata

    place = arguments.output / f"{name}.zarr"
    if place.exists():
        return spatialdata.read_zarr(place)
    if name == "pancreas":
        sdata = pancreas(arguments.data, arguments.tissue, arguments.cells)
        hn.pp.spatial_holdout(sdata)
        hn.pp.spatial_neighbors(sdata)
    else:
        import visium_hd_kidney

        sdata = visium_hd_kidney.read(arguments.data / "visium_hd_kidney", visium_hd_kidney.MAIN)
        near = around_middle(sdata["table"].obsm["spatial"], arguments.cells)
        sdata.tables["table"] = sdata["table"][near].copy()
    hn.tl.molecular_embedding(sdata, method="pca", n_latent=20, empty_cells="mean")
    making = place.with_suffix(".new")
    shutil.rmtree(making, ignore_errors=True)
    sdata.write(making)
    making.rename(place)
    return spatialdata.read_zarr(place)


# --------------------------------------------------------------------------------------------------------------- speed
def speed(sdata: SpatialData, um_per_px: float, n_crops: int) -> dict[str, Any]:
    """Cells per second of both modes, measured in turn; crops on a patch of the cells, at two batch sizes.

    Reading the image, encoding and writing the store count; loading the encoder does not. A crop costs the same
    wherever it lies, so a patch tells their speed; dense mode is given all cells.
    """
    from histoniche import encoders
    from histoniche._sdata import check_inside, coordinates, image, open_target

    target = open_target(sdata, table_key=None, copy=False)
    picture = image(sdata, None)
    points = check_inside(picture, coordinates(target), target.table.obs_names)
    encoder = encoders.load_encoder(ENCODER)
    middle = np.argsort(np.abs(points - points.mean(axis=0)).max(axis=1))[:n_crops]

    def rate(cells: np.ndarray, mode: Literal["crop", "dense"], batch_size: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            encoders.embed(
                picture.pyramid, points[cells], picture.um_per_px, encoder, Path(folder) / "features.zarr",
                mode=mode, target_um_per_px=um_per_px, batch_size=batch_size,
            )  # fmt: skip
            return len(cells) / (time.perf_counter() - start)

    every = np.arange(len(points))
    rate(middle[:32], "crop", 32)  # the first call is slower than those after it
    dense, crop, small = [], [], []
    for _ in range(3):
        dense.append(rate(every, "dense", 64))
        crop.append(rate(middle, "crop", 64))
        small.append(rate(middle, "crop", 8))
    area = float(np.prod(np.ptp(target.table.obsm["spatial"], axis=0))) / 1e6
    return {
        "cells": len(points), "area_mm2": area, "cells_per_mm2": len(points) / area, "dense_cells_per_s": float(np.median(dense)),
        "crop_cells_per_s": float(np.median(crop)), "crop_cells_per_s_batch8": float(np.median(small)),
        "ratio": float(np.median(dense) / np.median(crop)), "ratio_batch8": float(np.median(dense) / np.median(small)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- quality
def embed(sdata: SpatialData, name: str, arguments: argparse.Namespace) -> None:
    """Features of all cells in both modes, in ``obsm["dense"]`` and ``obsm["crop"]``."""
    for mode in MODES:
        hn.tl.histology_embedding(
            sdata, encoder=ENCODER, mode=mode, um_per_px=TISSUES[name].um_per_px, key_added=mode,
            store=arguments.output / f"{name}_{mode}.zarr", batch_size=8,
        )  # fmt: skip


def quality(sdata: SpatialData, seed: int, folder: Path, n_steps: int | None) -> dict[str, dict[str, float]]:
    """ARI and NMI of a student of each mode's features, of the same teacher, on the test strip."""
    table = sdata["table"]
    hn.tl.nolan(table, n_niches=N_NICHES, use_rep="X_niche_pca", seed=seed)
    found = {}
    for mode in MODES:
        hn.tl.distill_niches(
            table, n_niches=N_NICHES, features_key=mode, use_rep="X_niche_pca", model_dir=folder / "model", overwrite=True,
            n_steps=n_steps, seed=seed,
        )  # fmt: skip
        hn.tl.evaluate_niches(table, features_key=mode, baselines=(), seed=seed)
        row = table.uns["niche_evaluation"].loc["student"]
        found[mode] = {"ari": float(row["ari"]), "nmi": float(row["nmi"])}
    return found


def agreement(sdata: SpatialData) -> dict[str, float]:
    """Linear CKA of the two features on the test cells, and how well a ridge regression tells each from the other.

    R2 is the share of the variance of all standardised features together, on test cells, by a regression fitted on
    training cells.
    """
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    table = sdata["table"]
    train, test = ((table.obs["split"] == part).to_numpy() for part in ("train", "test"))
    x: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for mode in MODES:
        values = np.asarray(table.obsm[mode], dtype=np.float32)
        scaler = StandardScaler().fit(values[train])
        x[mode] = scaler.transform(values[train]), scaler.transform(values[test])

    def explained(given: str, wanted: str) -> float:
        model = Ridge(alpha=100.0).fit(x[given][0], x[wanted][0])
        error = ((model.predict(x[given][1]) - x[wanted][1]) ** 2).sum()
        return float(1 - error / ((x[wanted][1] - x[wanted][1].mean(axis=0)) ** 2).sum())

    a, b = (values - values.mean(axis=0) for values in (x[mode][1] for mode in MODES))
    cka = (np.linalg.norm(a.T @ b) ** 2) / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    return {
        "cka": float(cka),
        "r2_crop_from_dense": explained("dense", "crop"),
        "r2_dense_from_crop": explained("crop", "dense"),
    }


# -------------------------------------------------------------------------------------------------------------- report
def run_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All that is not done yet, in the order of the page; results by tissue."""
    done = arguments.output / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(done.read_text()) if done.exists() else {}
    for name, tissue in TISSUES.items():
        sdata = prepared(name, arguments)
        mine = results.setdefault(name, {})
        if "speed" not in mine:
            mine["speed"] = speed(sdata, tissue.um_per_px, arguments.timed_crops)
            print(name, mine["speed"], flush=True)
            write_json(done, results)
        embed(sdata, name, arguments)
        if "agreement" not in mine:
            mine["agreement"] = agreement(sdata)
            print(name, mine["agreement"], flush=True)
        for seed in range(arguments.seeds):
            if str(seed) not in mine.setdefault("students", {}):
                mine["students"][str(seed)] = quality(sdata, seed, arguments.output, arguments.n_steps)
                print(name, seed, mine["students"][str(seed)], flush=True)
                write_json(done, results)
    return results


def write_json(path: Path, values: Any) -> None:
    """Write in one move."""
    path.with_suffix(".new").write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".new").replace(path)


def summary(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Flat figures, mean and SD over seeds."""
    flat: dict[str, float] = {}
    for name, mine in results.items():
        for part in ("speed", "agreement"):
            flat |= {f"{name}.{key}": round(float(value), 4) for key, value in mine[part].items()}
        students = list(mine["students"].values())
        for mode in MODES:
            for figure in ("ari", "nmi"):
                values = [student[mode][figure] for student in students]
                flat[f"{name}.{mode}.{figure}"] = round(float(np.mean(values)), 4)
                flat[f"{name}.{mode}.{figure}.sd"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else 0.0
        less = [student["crop"]["ari"] - student["dense"]["ari"] for student in students]
        flat[f"{name}.crop_minus_dense.ari"] = round(float(np.mean(less)), 4)
        flat[f"{name}.crop_minus_dense.ari.sd"] = round(float(np.std(less, ddof=1)), 4) if len(less) > 1 else 0.0
    return flat


def plot(flat: dict[str, float], save: Path) -> None:
    """Seconds per thousand cells beside ARI."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for ax, figure_of_merit in zip(axes, ("ari", "nmi"), strict=True):
        for name, marker in zip(TISSUES, "os", strict=True):
            cost = [1000 / flat[f"{name}.{mode}_cells_per_s"] for mode in MODES]
            mean = [flat[f"{name}.{mode}.{figure_of_merit}"] for mode in MODES]
            sd = [flat[f"{name}.{mode}.{figure_of_merit}.sd"] for mode in MODES]
            ax.errorbar(cost, mean, sd, marker=marker, capsize=3, label=TISSUES[name].title)
            for mode, x, y in zip(MODES, cost, mean, strict=True):
                ax.annotate(mode, (x, y), xytext=(6, 6), textcoords="offset points")
        ax.set(xscale="log", xlabel="seconds per 1,000 cells", ylabel=f"student's {figure_of_merit.upper()}")
        ax.margins(x=0.15)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(save, dpi=110)
    plt.close(figure)


def tables(flat: dict[str, float]) -> str:
    """Figures of each tissue as tables."""
    parts = []
    for name, tissue in TISSUES.items():
        f = {key.removeprefix(f"{name}."): value for key, value in flat.items() if key.startswith(f"{name}.")}
        rows = [
            f"| {mode} | {f[f'{mode}_cells_per_s']:,.0f} | {f[f'{mode}.ari']:.3f} ± {f[f'{mode}.ari.sd']:.3f} | "
            f"{f[f'{mode}.nmi']:.3f} ± {f[f'{mode}.nmi.sd']:.3f} |"
            for mode in MODES
        ]
        less, fast = f["crop_minus_dense.ari"], f["ratio"]
        words = (
            f"Dense is **{fast:.0f} times** as fast as crops in batches of 64, the default, and {f['ratio_batch8']:.0f} times as fast as "
            f"in batches of 8 ({f['crop_cells_per_s_batch8']:.0f} cells/s): "
            f"{'the goal of 50 is met' if fast >= 50 else 'the goal of 50 is missed'}. ARI of crops less that of dense: {less:+.3f} ± "
            f"{f['crop_minus_dense.ari.sd']:.3f}; {'dense loses no more than 0.01' if less <= 0.01 else 'dense loses more than the 0.01 allowed'}."
        )
        share = 1e6 / f["cells_per_mm2"] / tissue.um_per_px**2
        why = (
            f"A crop has {CROP_PX**2:,} px, and a cell's own share of the tissue {share:,.0f}: {CROP_PX**2 / share:,.0f} times fewer. The margins around "
            "tiles take some of that back, most on a narrow part of a tissue; the last layers, which dense mode leaves out, give some."
        )
        parts.append(
            "\n".join(
                [
                    f"## {tissue.title}", "",
                    f"{f['cells']:,.0f} cells or bins on {f['area_mm2']:.2f} mm2, {f['cells_per_mm2']:,.0f} per mm2; {tissue.um_per_px} um/px.", "",
                    "| mode | cells/s | ARI | NMI |", "|---|---|---|---|", *rows, "", words, why, "",
                    f"Agreement of the two features: linear CKA {f['cka']:.3f}; ridge regression explains {f['r2_crop_from_dense']:.3f} of the "
                    f"variance of crops from dense, and {f['r2_dense_from_crop']:.3f} of dense from crops.",
                ]
            )
        )  # fmt: skip
    return "\n\n".join(parts)


PAGE = """# Dense features beside crops

`mode="crop"` encodes a crop of 224 px around every cell and keeps the pooled 1280 numbers, the published way; `mode="dense"`
encodes tiles once and reads 152 numbers off the feature maps at each cell. EfficientNet-Lite0 (ImageNet weights) both times,
on the image as it is: means over four mirror images, as in the main figures of the pancreas, cost either mode four times as much. What a dense cell costs falls with the density of cells, what a crop costs does not.

{tables}

![Cost beside quality](dense_crop/cost_quality.png)

Cells per second: median of three measurements in turn in one process, with reading the image and writing the features; dense on
all cells, crops on {timed:,} of them in one patch. Students: K = {k}, mean ± SD of {seeds} seeds, ARI and NMI on the second of
four horizontal strips against a NOLAN teacher (20 principal components of the counts) fitted on the same part's training cells; the
same teacher for both modes of a seed. CKA and R2 on test cells, regressions fitted on training cells.

## Command

```bash
pip install ".[demo]"
python benchmarks/dense_crop.py PATH/TO/DATA
```

Measured on {cores} cores ({machine}), no GPU; Python {python}. All figures: `dense_crop.json`.
"""


def report(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Write page, figures and plot."""
    flat = summary(results)
    place = arguments.docs / "dense_crop"
    place.mkdir(parents=True, exist_ok=True)
    plot(flat, place / "cost_quality.png")
    write_json(arguments.docs / "dense_crop.json", flat)
    page = PAGE.format(
        tables=tables(flat), timed=arguments.timed_crops, k=N_NICHES, seeds=arguments.seeds, cores=os.cpu_count(),
        machine=platform.machine(), python=platform.python_version(),
    )  # fmt: skip
    (arguments.docs / "dense_crop.md").write_text(page)
    print(page)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with xenium_pancreas and visium_hd_kidney")
    parser.add_argument("--tissue", type=Path, help="output of xenium_pancreas.py, for its virtual H&E")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "dense_crop")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page, figures and pictures go")
    parser.add_argument("--cells", type=int, default=15_000, help="most cells of a tissue")
    parser.add_argument("--timed-crops", type=int, default=1000, help="crops of one measurement of their speed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-steps", type=int, help="training steps of a student, for a quick trial")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = run_all(arguments)
    report(arguments, results)


if __name__ == "__main__":
    main()
