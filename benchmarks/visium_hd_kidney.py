"""Niches of a kidney from real H&E: Visium HD bins, and glomeruli found without molecules.

    python benchmarks/visium_hd_kidney.py DATA/visium_hd_kidney

Tables, features and the figures of each run lie in ``--output``, so a run that was stopped goes on; delete the folder to
begin anew. Writes ``docs/benchmarks/visium_hd_kidney.{md,json}`` and the pictures beside them. The comparison of settings on
validation parts inside the training part, from which the constants below were taken, is repeated first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _kidney
import _readers
import anndata
import numpy as np
import pandas as pd

import histoniche as hn
from histoniche.neighbors import radius_for_density

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatialdata import SpatialData

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
ENCODER = "efficientnet-lite0"
UM_PER_PX = _readers.KIDNEY_UM_PER_PX
"""Resolution of the encoder: that of the image."""
FIELD_OF_VIEW = 224 * UM_PER_PX
"""Width in um of what the encoder sees around a bin."""
SYMMETRIES = 4
"""Mirror images that features are the mean of, as on the pancreas, where they were chosen."""
N_LATENT = 20
N_GENES = 2000
N_TYPES = 12
N_STEPS = 300
"""Of a student, at either width: the least that the package takes by default."""
QUICK_STEPS = 10
K = (6, 10)
MAIN = 16
OTHER = 8
"""Widths in um of the bins of the main table, and of those that are compared with it."""
AGREEMENT = {"ari": 3, "nmi": 3, "jsd": 4}
"""Figures of a model, and the digits that they are shown with."""
FIGURES = [f"{name}{end}" for name in AGREEMENT for end in ("", "_low", "_high")]


# ---------------------------------------------------------------------------------------------------------------- data
def read(data: Path, bin_um: int) -> SpatialData:
    """Bins with the counts of variable genes, their podocyte expression, split and neighbourhoods, and the H&E."""
    sdata = _readers.read_visium_hd_kidney(data, bin_um=bin_um)
    table = sdata["table"]
    _kidney.add_podocyte(table)
    # Two hops of context, and one of consensus. The default, with twice the radius and a whole field of view, would leave
    # nothing above the strip.
    radius = radius_for_density(table.obsm["spatial"], 50)
    hn.pp.spatial_holdout(sdata, field_of_view=FIELD_OF_VIEW, radius=radius, buffer=3 * radius + FIELD_OF_VIEW / 2)
    hn.pp.spatial_neighbors(sdata)
    train = (table.obs["split"] == "train").to_numpy()
    sdata.tables["table"] = table[:, _kidney.variable_genes(table[train], N_GENES)].copy()
    return sdata


def prepared(data: Path, output: Path, bin_um: int) -> SpatialData:
    """The same with molecular and histology embedding and cell types; from ``output`` where it was made before."""
    state = output / f"bins_{bin_um}um.h5ad"
    if state.exists():
        sdata = _readers.read_visium_hd_kidney(data)
        sdata.tables["table"] = anndata.read_h5ad(state)
        return sdata
    sdata = read(data, bin_um)
    hn.tl.molecular_embedding(sdata, method="pca", n_latent=N_LATENT, empty_cells="mean")
    hn.tl.histology_embedding(sdata, encoder=ENCODER, mode="dense", um_per_px=UM_PER_PX, symmetries=SYMMETRIES)
    table = sdata["table"]
    table.obs["bin_type"] = _kidney.bin_types(table.obsm["X_niche_pca"], table.obs["split"] == "train", N_TYPES)
    table.write_h5ad(state.with_suffix(".new"))
    state.with_suffix(".new").replace(state)
    return sdata


# ---------------------------------------------------------------------------------------------------------------- runs
def runs(arguments: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Width of the bins, K and seed of each run."""
    for bin_um in (MAIN,) if arguments.quick else (MAIN, OTHER):
        for k in K:
            for seed in range(1 if arguments.quick else arguments.seeds):
                yield bin_um, k, seed


def run(sdata: SpatialData, bin_um: int, k: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Teacher, student, baselines and glomeruli of one seed; labels go to a file of ``output``."""
    start = time.perf_counter()
    table, output = sdata["table"], arguments.output
    teacher_steps, n_steps = (QUICK_STEPS, QUICK_STEPS) if arguments.quick else (None, N_STEPS)
    hn.tl.nolan(table, n_niches=k, use_rep="X_niche_pca", n_steps=teacher_steps, seed=seed)
    hn.tl.distill_niches(
        table, n_niches=k, encoder=ENCODER, use_rep="X_niche_pca", model_dir=output / f"model_{bin_um}um_k{k}_{seed}",
        overwrite=True, n_steps=n_steps, seed=seed,
    )  # fmt: skip
    hn.tl.evaluate_niches(table, cell_type_key="bin_type", block_um=_kidney.BLOCK, seed=seed)
    figures = table.uns["niche_evaluation"]
    result = {
        "models": {name: {key: float(row[key]) for key in FIGURES} for name, row in figures.iterrows()},
        "teacher_effective": float(table.uns["histoniche"]["nolan"]["params"]["final_effective_niches"]),
        "glomeruli": _kidney.glomeruli(table, bin_um),
        "seconds": round(time.perf_counter() - start, 1),
    }
    labels = {name: table.obs[name] for name in ("niche_teacher", "niche")}
    labels |= {
        "probability": pd.Series(_kidney.niche_probability(table, result["glomeruli"]["niche"]), table.obs_names)
    }
    pd.DataFrame(labels).to_parquet(output / f"labels_{bin_um}um_k{k}_{seed}.parquet")
    return result


def run_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All runs that are not done yet; their results by name."""
    output: Path = arguments.output
    done = output / "runs.json"
    results = json.loads(done.read_text()) if done.exists() else {}
    for bin_um, k, seed in runs(arguments):
        name = f"{bin_um}um.k{k}.{seed}"
        if name in results:
            continue
        sdata = prepared(arguments.data, output, bin_um)
        results[name] = run(sdata, bin_um, k, seed, arguments)
        print(name, json.dumps(results[name]), flush=True)
        write_json(done, results)
    return results


def write_json(path: Path, values: Any) -> None:
    """Write in one move."""
    path.with_suffix(".new").write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".new").replace(path)


# ------------------------------------------------------------------------------------------------------------ pictures
def with_labels(arguments: argparse.Namespace, bin_um: int, k: int) -> SpatialData:
    """The prepared object with teacher, student and probability of seed 0."""
    sdata = prepared(arguments.data, arguments.output, bin_um)
    labels = pd.read_parquet(arguments.output / f"labels_{bin_um}um_k{k}_0.parquet")
    for name in labels:
        sdata["table"].obs[name] = labels[name].to_numpy() if name == "probability" else labels[name].astype("category")
    return sdata


def plots(arguments: argparse.Namespace) -> None:
    """Niche maps of seed 0, and glomeruli."""
    place = arguments.docs / "visium_hd_kidney"
    place.mkdir(parents=True, exist_ok=True)
    for k in K:
        sdata = with_labels(arguments, MAIN, k)
        hn.pl.niche_map(sdata, titles=("teacher (molecules)", "student (H&E)"), save=place / f"niche_map_k{k}.jpg")
    plot_glomeruli(sdata, place / "glomeruli.jpg")


def plot_glomeruli(sdata: SpatialData, save: Path) -> None:
    """H&E, podocyte expression, and the student's probability of the glomerular niche, with the test strip."""
    import matplotlib.pyplot as plt

    table = sdata["table"]
    x, y = table.obsm["spatial"].T
    test = (table.obs["split"] == "test").to_numpy()
    image = sdata["he"]["scale0"]["image"].data.compute().transpose(1, 2, 0)
    extent = (0, image.shape[1] * _readers.KIDNEY_UM_PER_PX, image.shape[0] * _readers.KIDNEY_UM_PER_PX, 0)
    podocyte = _kidney.smoothed(table, table.obs["podocyte"].to_numpy(), MAIN)
    panels = (
        ("H&E", None, None),
        ("NPHS1 + NPHS2 + PODXL (log, smoothed)", podocyte, float(np.quantile(podocyte, 0.99))),
        ("student: probability of the glomerular niche", table.obs["probability"].to_numpy(), 1.0),
    )
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.2), height_ratios=(2.05, 0.62), layout="constrained")
    for row, (low, high) in enumerate(((y.min(), y.max()), (y[test].min(), y[test].max()))):
        for ax, (title, values, _) in zip(axes[row], panels, strict=True):
            ax.imshow(image, extent=extent)
            ax.set(xlim=(x.min(), x.max()), ylim=(high, low), xticks=[], yticks=[])
            if row == 0:
                ax.set_title(title)
                ax.hlines((y[test].min(), y[test].max()), x.min(), x.max(), colors="c", linewidth=1.5)
            elif values is None:
                ax.set_ylabel("test strip")
    figure.draw_without_rendering()  # the layout, from which the size of a bin follows
    for ax, (_, values, top) in ((ax, panel) for row in axes for ax, panel in zip(row, panels, strict=True)):
        if values is not None:
            size = 1.1 * MAIN * 72 * ax.get_window_extent().width / figure.dpi / (x.max() - x.min())
            ax.scatter(x, y, c=values, s=size**2, marker="s", linewidths=0, cmap="magma", vmin=0, vmax=top)
    figure.savefig(save, dpi=110)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------------------- report
GLOMERULI = ("auc_regions", "glomeruli", "glomeruli_found", "false_regions")
GENES = ("podocyte", *_kidney.PODOCYTE)
"""The genes together, and each."""


PAGE = """# Visium HD kidney: niches and glomeruli from real H&E

A crop of 2 x 2 mm of human kidney (Visium HD, FFPE; 10x Genomics) with the section's own **H&E scan**, at 2.008 um/px, coarse
for histology. The unit is a bin, not a cell. The main table is of {main} um bins (sums of 2 x 2 bins of 8 um); bins of {other} um
follow below. The teacher is NOLAN on {n_latent} principal components of {n_genes:,} variable genes, the student sees
EfficientNet-Lite0 (ImageNet weights) dense features at {um_per_px} um/px, means over {symmetries} mirror images, in {steps} steps. Mean ± SD of {seeds} seeds, each with its own teacher.

The second of four horizontal strips is held out: {test:,} test bins of {n:,}, {train:,} for training, {left_out:,} in the
buffer of {buffer:.0f} um on either side: three times the neighbourhoods' radius of {radius:.0f} um, which gives 50 neighbours (two hops of
context, one of consensus), and half of the {field:.0f} um that the encoder sees. So no pixel and no bin of the strip, nor within a radius of
it, is seen in training; the pixels *around* the strip that a test bin's features hold may be. Genes, principal components, teacher, student, types of bins and thresholds come from training bins.
JSD compares compositions of {n_types} k-means clusters of the embedding of single bins, which stand in for cell types.

{models}

Against the teacher, on the test strip. Higher is better for ARI and NMI, lower for JSD. `probe_cell` and `probe_neighborhood` are
logistic regressions on the features of the bin, and of the bin beside its neighbourhood's mean; `histology_nolan` and
`histology_leiden` saw no niche; `coordinates_only` sees positions and no image. Mean ± SD over seeds; in brackets the 95 % interval of seed 0 by spatial block
bootstrap, with blocks of {block:.0f} um, a glomerulus: niches are larger, so the intervals are rather too narrow.

{verdict}

![Niche maps, K = 10](visium_hd_kidney/niche_map_k10.jpg)

![Niche maps, K = 6](visium_hd_kidney/niche_map_k6.jpg)

## Glomeruli

The glomerular niche is the one with the most podocyte expression (NPHS1, NPHS2 and PODXL together, log of counts per 100) on
*training* bins, by the teacher's labels. Below is what the *student* makes of it on the test strip, from H&E alone: the AUC of its
probability of that niche for regions of podocyte expression (Gaussian mean of {smoothing:.0f} um above Otsu's threshold of the
training bins), with the interval of seed 0 in brackets; and glomeruli, regions of at least {least:,.0f} um2 in the strip, of which at least half is predicted.

{glomeruli}

Gene by gene: the AUC of the same probability for single bins with at least one count (many bins inside a glomerulus have none, and
PODXL is also found in vessels), and mean expression (log of counts per 100) inside and outside the predicted niche.

{genes}

![Glomeruli](visium_hd_kidney/glomeruli.jpg)

## Bins of {other} um

{others}

{verdict_other}

Teachers differ between widths of bins, so ARI and NMI of one are not those of the other; the glomeruli can be compared.

## What was tried

On two validation parts inside the training part (its left and its right quarter), means of the two; niches are k-means of
neighbourhood means, where the teacher starts. Embeddings were compared by halves of the counts: niches from one half, and how much better
than the mean their profiles explain the other half on validation bins. Resolutions were compared by a logistic regression on the
bin's features and its neighbourhood's mean; `auc` is for bins of the glomerular niche.

{trials}

## Command

```bash
pip install ".[demo]"
python benchmarks/visium_hd_kidney.py PATH/TO/visium_hd_kidney
```

Runs took {minutes:.1f} minutes on {cores} cores ({machine}), no GPU (wall time: other work on the machine counts too); Python {python}. All figures: `visium_hd_kidney.json`.
"""


def summary(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean and SD over seeds, flat: ``16um.k10.student.ari`` and ``16um.k10.student.ari.sd``."""
    values: dict[str, list[float]] = {}
    for name, result in results.items():
        setting = name.rsplit(".", 1)[0]
        for model, row in result["models"].items():
            for figure in AGREEMENT:
                values.setdefault(f"{setting}.{model}.{figure}", []).append(row[figure])
        for figure in (*GLOMERULI, *(f"{gene}_{figure}" for gene in GENES for figure in ("auc", "inside", "outside"))):
            values.setdefault(f"{setting}.glomeruli.{figure}", []).append(float(result["glomeruli"][figure]))
        values.setdefault(f"{setting}.teacher.effective_niches", []).append(result["teacher_effective"])
        values.setdefault(f"{setting}.seconds", []).append(result["seconds"])
    flat = {}
    for key, found in values.items():
        flat[key] = round(float(np.mean(found)), 4)
        if len(found) > 1:
            flat[f"{key}.sd"] = round(float(np.std(found, ddof=1)), 4)
    return flat


def shown(flat: dict[str, float], key: str, digits: int = 3) -> str:
    """Mean and SD as text."""
    if key not in flat:
        return "-"
    spread = f" ± {flat[f'{key}.sd']:.{digits}f}" if f"{key}.sd" in flat else ""
    return f"{flat[key]:.{digits}f}{spread}"


def models_table(flat: dict[str, float], setting: str, first: dict[str, Any]) -> str:
    """One row per model: mean and SD, and the interval of the first seed."""
    rows = []
    for name, row in first["models"].items():
        cells = [
            f"{shown(flat, f'{setting}.{name}.{figure}', digits)} [{row[f'{figure}_low']:.{digits}f}, {row[f'{figure}_high']:.{digits}f}]"
            for figure, digits in AGREEMENT.items()
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(["| K = " + setting.split(".k")[1] + " | ARI | NMI | JSD |", "|---|---|---|---|", *rows])


def glomeruli_table(flat: dict[str, float], results: dict[str, dict[str, Any]], settings: list[str]) -> str:
    """One row per width of the bins and K."""
    rows = []
    for s in settings:
        g, first = f"{s}.glomeruli.", results[f"{s}.0"]["glomeruli"]
        bin_um, k = s.split(".k")
        found = f"{shown(flat, g + 'glomeruli_found', 1)} of {flat[g + 'glomeruli']:.0f}"
        interval = f"[{first['auc_regions_low']:.3f}, {first['auc_regions_high']:.3f}]"
        rows.append(
            f"| {bin_um}, {k} | {shown(flat, g + 'auc_regions')} {interval} | {found} | {flat[g + 'false_regions']:.1f} |"
        )
    head = "| bins, K | AUC, regions | glomeruli found | regions without one |\n|---|---|---|---|"
    return "\n".join([head, *rows])


def genes_table(flat: dict[str, float], settings: list[str]) -> str:
    """One row per width of the bins, K, and gene."""
    rows = []
    for s in settings:
        for gene in GENES:
            name = f"{s}.glomeruli.{gene}_"
            cells = [shown(flat, name + figure) for figure in ("auc", "inside", "outside")]
            rows.append(
                f"| {s.replace('.k', ', ')} | {'together' if gene == 'podocyte' else gene} | {' | '.join(cells)} |"
            )
    head = "| bins, K | gene | AUC, single bins | expression in the niche | elsewhere |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])


def trials_text(output: Path) -> str:
    """What was tried on the validation part, as tables."""
    if not (output / "trials.json").exists():
        return "Not run: `--quick`."
    trials = json.loads((output / "trials.json").read_text())
    rows = [f"| {t['embedding']} | {t['k']} | {t['gain']:.2f} |" for t in trials["embeddings"]]
    views = [
        f"| {t['view']} | {t['bins']} | {t['k']} | {t['ari']:.3f} | {t['nmi']:.3f} | {t['auc']:.3f} |"
        for t in trials["views"]
    ]
    return "\n".join(
        [
            "| molecular embedding | K | explained, 0.001 nats a count |", "|---|---|---|", *rows, "",
            "| um/px of the encoder | bins | K | ARI | NMI | auc |", "|---|---|---|---|---|---|", *views,
        ]
    )  # fmt: skip


def verdict(flat: dict[str, float], bin_um: int) -> str:
    """Whether the student is above the probes, in words."""
    lines = []
    for k in K:
        s = f"{bin_um}um.k{k}"
        if f"{s}.student.ari" not in flat:
            continue
        best = max(flat[f"{s}.{probe}.ari"] for probe in ("probe_cell", "probe_neighborhood"))
        nmi = max(flat[f"{s}.{probe}.nmi"] for probe in ("probe_cell", "probe_neighborhood"))
        ari, own = flat[f"{s}.student.ari"], flat[f"{s}.student.nmi"]
        ahead = ari > best and own > nmi
        word = "is better than both probes" if ahead else "is **not** better than both probes in both figures"
        lines.append(
            f"K = {k}: the student {word} (ARI {ari - best:+.3f}, NMI {own - nmi:+.3f} to the better one); the teacher ends "
            f"with {flat[f'{s}.teacher.effective_niches']:.1f} effective niches."
        )
    return "\n".join(lines)


def report(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Write the page and the flat figures."""
    flat = summary(results)
    settings = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in results))
    table = anndata.read_h5ad(arguments.output / f"bins_{MAIN}um.h5ad")
    split = table.obs["split"].value_counts()
    origin = table.uns["histoniche"]
    buffer = float(origin["spatial_holdout"]["params"]["buffer"])
    radius = float(table.uns["niche_neighbors"]["params"]["radius"])
    write_json(arguments.docs / "visium_hd_kidney.json", flat)

    def tables(bin_um: int) -> str:
        mine = [s for s in settings if s.startswith(f"{bin_um}um")]
        return "\n\n".join(models_table(flat, s, results[f"{s}.0"]) for s in mine) or "Not run: `--quick`."

    page = PAGE.format(
        main=MAIN, other=OTHER, n=table.n_obs, test=split["test"], train=split["train"], left_out=split["buffer"],
        buffer=buffer, block=_kidney.BLOCK, radius=radius, seeds=arguments.seeds, steps=N_STEPS, um_per_px=UM_PER_PX, symmetries=SYMMETRIES, field=FIELD_OF_VIEW, n_genes=N_GENES, n_latent=N_LATENT,
        n_types=N_TYPES, smoothing=_kidney.SMOOTHING, least=_kidney.LEAST_AREA,
        models=tables(MAIN), others=tables(OTHER), verdict=verdict(flat, MAIN), verdict_other=verdict(flat, OTHER),
        glomeruli=glomeruli_table(flat, results, settings), genes=genes_table(flat, settings), trials=trials_text(arguments.output), cores=os.cpu_count(),
        machine=platform.machine(), python=platform.python_version(),
        minutes=sum(result["seconds"] for result in results.values()) / 60,
    )  # fmt: skip
    (arguments.docs / "visium_hd_kidney.md").write_text(page)
    print(page)


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "PCA, 10 components": {"method": "pca", "n_latent": 10},
    "PCA, 20 components": {"method": "pca", "n_latent": 20},
    "PCA, 40 components": {"method": "pca", "n_latent": 40},
    "scVI, 10 dimensions": {"method": "scvi", "n_latent": 10, "max_epochs": 20},
}
RESOLUTIONS = (2.008, 1.0, 0.5)
VIEWS = [("2.008",), ("1.0",), ("0.5",), ("2.008", "1.0"), ("1.0", "0.5")]


def trials(arguments: argparse.Namespace) -> None:
    """Compare settings on validation parts inside the training part."""
    import _kidney_trials

    found: dict[str, list[dict[str, Any]]] = {"embeddings": [], "views": []}
    for bin_um in (MAIN, OTHER):
        sdata = read(arguments.data, bin_um)
        table = sdata["table"]
        radius = float(table.uns["niche_neighbors"]["params"]["radius"])
        cases = list(_kidney_trials.trials_of(table, radius, 3 * radius + 112))
        if bin_um == MAIN:
            found["embeddings"] = _kidney_trials.embeddings(table, cases, EMBEDDINGS, max(K))
        hn.tl.molecular_embedding(table, method="pca", n_latent=N_LATENT, empty_cells="mean")
        features = {}
        for resolution in RESOLUTIONS:
            hn.tl.histology_embedding(
                sdata, encoder=ENCODER, mode="dense", um_per_px=resolution, key_added="trial",
                store=arguments.output / f"trial_{bin_um}um_{resolution}.zarr",
            )  # fmt: skip
            features[str(resolution)] = table.obsm["trial"]
        for k in K:
            rows = _kidney_trials.views(table, cases, features, VIEWS, k)
            found["views"] += [{"bins": f"{bin_um} um", **row} for row in rows]
    write_json(arguments.output / "trials.json", found)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with bins_8um.h5ad and he.png")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "visium_hd_kidney")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page, figures and pictures go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of one seed, to see that all works; not for figures"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.quick and not (arguments.output / "trials.json").exists():
        trials(arguments)
    results = run_all(arguments)
    plots(arguments)
    report(arguments, results)


if __name__ == "__main__":
    main()
