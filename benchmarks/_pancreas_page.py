"""The page and the flat figures of ``xenium_pancreas.py``."""

from __future__ import annotations

import json
import os
import platform
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import scanpy as sc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

MODELS = ("student", "probe_neighborhood", "probe_cell", "coordinates_only", "histology_nolan", "histology_leiden")
FIGURES = ("ari", "nmi", "jsd")
DIGITS = {"ari": 3, "nmi": 3, "jsd": 4}
PROBES = ("probe_cell", "probe_neighborhood")
GOALS = {10: {"ari": 0.65, "nmi": 0.62, "jsd": 0.005}, 20: {"ari": 0.55, "nmi": 0.60, "jsd": 0.007}}
RATIOS = {"histology_nolan": 2.2, "histology_leiden": 3.2}
"""Goals: figures of the student, and its ARI as a multiple of that of the unsupervised baselines."""


def write_page(
    output: Path, docs: Path, seeds: Sequence[int], n_niches: Sequence[int], stages: dict[str, dict[str, Any]]
) -> None:
    """Write ``xenium_pancreas.md`` and ``xenium_pancreas.json``."""
    tables = {(k, s): anndata.read_h5ad(output / f"seed{s}" / f"k{k}" / "table.h5ad") for k in n_niches for s in seeds}
    runs = {key: table.uns["niche_evaluation"] for key, table in tables.items()}
    first = tables[n_niches[0], seeds[0]]
    flat: dict[str, float] = {}
    for k in n_niches:
        for model in MODELS:
            for figure in FIGURES:
                values = np.array([runs[k, s].loc[model, figure] for s in seeds], dtype=float)
                flat[f"k{k}.{model}.{figure}"] = round(float(values.mean()), 4)
                flat[f"k{k}.{model}.{figure}.sd"] = round(float(values.std(ddof=1)), 4) if len(seeds) > 1 else 0.0
    unsupervised = {
        (k, s): json.loads((output / f"seed{s}" / f"k{k}" / "unsupervised.json").read_text())
        for k in n_niches
        for s in seeds
    }
    for k in n_niches:
        for model in unsupervised[k, seeds[0]]:
            for figure in FIGURES:
                values = np.array([unsupervised[k, s][model][figure] for s in seeds])
                flat[f"k{k}.{model}_3_strides.{figure}"] = round(float(values.mean()), 4)
                flat[f"k{k}.{model}_3_strides.{figure}.sd"] = (
                    round(float(values.std(ddof=1)), 4) if len(seeds) > 1 else 0.0
                )
    times = _timed_stages(stages, seeds[0], n_niches[0])
    flat |= {f"seconds.{name}": s["seconds"] for name, s in times.items()}
    flat |= {f"peak_gb.{name}": s["peak_gb"] for name, s in times.items()}
    flat["seconds.total"] = round(sum(s["seconds"] for s in times.values()), 1)
    flat["peak_gb.max"] = max(s["peak_gb"] for s in times.values())
    (docs / "xenium_pancreas.json").write_text(json.dumps(flat, indent=1) + "\n")
    sections = [
        _head(first, seeds),
        _goals(flat, n_niches),
        *(_quality(k, seeds, runs, flat, tables) for k in n_niches),
        _NICHES_HEAD,
        *(_niches(k, tables[k, seeds[0]]) for k in n_niches),
        _pictures(n_niches, seeds[0]),
        _time(times, flat),
    ]
    (docs / "xenium_pancreas.md").write_text("\n".join(sections))


def _timed_stages(stages: dict[str, dict[str, Any]], seed: int, n_niches: int) -> dict[str, dict[str, float]]:
    """Stages of one job from files to map, all of which had the machine for themselves."""
    names = {
        **{name: name for name in ("read", "holdout", "neighbors", "histology")},
        "molecular": f"seed{seed}/molecular",
        **{name: f"seed{seed}/k{n_niches}/{name}" for name in ("teacher", "student", "evaluate", "plots")},
    }
    return {name: stages[key] for name, key in names.items()}


def _head(table: AnnData, seeds: Sequence[int]) -> str:
    origin = table.uns["histoniche"]
    split = table.obs["split"].value_counts()
    hops = np.asarray(origin["distill_niches"]["params"]["context"]).tolist()
    return f"""# Xenium pancreas: from files to map

One whole Xenium section of human pancreas ({table.n_obs:,} cells; data CC BY 4.0, 10x Genomics). The H&E is **virtual**:
rendered from the section's own DAPI, 18S and alphaSMA/vimentin stains (`hn.pp.virtual_he`), not scanned. EfficientNet-Lite0
(ImageNet weights) dense features ({table.obsm["X_efficientnet-lite0"].shape[1]}) at 0.5 um/px,
means over {int(origin["histology_embedding"]["params"]["contract"].get("symmetries", 1))} mirror images. Mean and standard deviation
of {len(seeds)} seeds, each with its own scVI, teacher, student and baselines. Neighbourhoods: radius
{float(table.uns["niche_neighbors"]["params"]["radius"]):.1f} um (50 neighbours on average on training cells); the student's
context: means over {hops} hops.

The second of four horizontal strips is held out ({split["test"]:,} test cells, {split["train"]:,} for training,
{split["buffer"]:,} in the buffer of {float(origin["spatial_holdout"]["params"]["buffer"]):.0f} um on either side). scVI, teacher
and student learn from training cells alone. Settings were chosen on strips inside the training part (see {{doc}}`../design`). The
vendor's clusters stand in for cell types in JSD. Definitions: {{doc}}`../metrics`.
"""


def _goals(flat: dict[str, float], n_niches: Sequence[int]) -> str:
    """The goals that were set before, and whether they are met."""
    rows = []

    def row(k: int, what: str, goal: str, found: float, digits: int, *, met: bool) -> None:
        rows.append(f"| {k} | {what} | {goal} | {found:.{digits}f} | {'met' if met else '**missed**'} |")

    for k in (k for k in n_niches if k in GOALS):
        ari, nmi = flat[f"k{k}.student.ari"], flat[f"k{k}.student.nmi"]
        for figure, goal in GOALS[k].items():
            found = flat[f"k{k}.student.{figure}"]
            met = found <= goal if figure == "jsd" else found >= goal
            row(
                k, figure.upper(), f"at {'most' if figure == 'jsd' else 'least'} {goal}", found, DIGITS[figure], met=met
            )
        more = min(min(ari - flat[f"k{k}.{p}.ari"], nmi - flat[f"k{k}.{p}.nmi"]) for p in PROBES)
        row(k, "least gain over a probe, ARI or NMI", "above 0", more, 3, met=more > 0)
        for model, goal in RATIOS.items():
            ratio = ari / max(flat[f"k{k}.{model}.ari"], flat[f"k{k}.{model}_3_strides.ari"])
            row(
                k,
                f"ARI as a multiple of {model}'s (its better features)",
                f"at least {goal}",
                ratio,
                2,
                met=ratio >= goal,
            )
    return f"""## Against the goals

| K | figure | goal | mean of seeds | |
|---|---|---|---|---|
{chr(10).join(rows)}

For comparison, the paper reports ARI / NMI of 0.615 / 0.603 (K = 10) and 0.500 / 0.579 (K = 20), the mean of 16 sections with UNI2-h on
scanned H&E (arXiv 2604.09076); teachers, tissue and encoder differ, and the paper does not define its JSD. Where the figures are lost:
{{doc}}`xenium_pancreas_niches`.
"""


def _pm(flat: dict[str, float], key: str, digits: int) -> str:
    return f"{flat[key]:.{digits}f} ± {flat[f'{key}.sd']:.{digits}f}"


def _quality(
    k: int,
    seeds: Sequence[int],
    runs: dict[tuple[int, int], pd.DataFrame],
    flat: dict[str, float],
    tables: dict[tuple[int, int], AnnData],
) -> str:
    rows, gains = [], []
    for model in MODELS:
        row = runs[k, seeds[0]].loc[model]
        cells = [
            f"{_pm(flat, f'k{k}.{model}.{f}', DIGITS[f])} [{row[f'{f}_low']:.{DIGITS[f]}f}, {row[f'{f}_high']:.{DIGITS[f]}f}]"
            for f in FIGURES
        ]
        effective = np.mean([runs[k, s].loc[model, "effective_niches"] for s in seeds])
        rows.append(f"| {model} | {' | '.join(cells)} | {effective:.2f} |")
        if model != "student":
            cells = []
            for f in ("ari", "nmi"):
                values = np.array([runs[k, s].loc[model, f"{f}_gain"] for s in seeds], dtype=float)
                low, high = row[f"{f}_gain_low"], row[f"{f}_gain_high"]
                cells.append(f"{values.mean():+.3f} ± {values.std(ddof=1):.3f} [{low:+.3f}, {high:+.3f}]")
            ratio = flat[f"k{k}.student.ari"] / flat[f"k{k}.{model}.ari"]
            gains.append(f"| {model} | {' | '.join(cells)} | {ratio:.2f} |")
    for model in MODELS[-2:]:
        name = f"k{k}.{model}_3_strides"
        three = " | ".join(_pm(flat, f"{name}.{f}", DIGITS[f]) for f in FIGURES)
        rows.append(f"| {model}, three strides | {three} | |")
        ratio = flat[f"k{k}.student.ari"] / flat[f"{name}.ari"]
        more = [flat[f"k{k}.student.{f}"] - flat[f"{name}.{f}"] for f in ("ari", "nmi")]
        gains.append(f"| {model}, three strides | {more[0]:+.3f} | {more[1]:+.3f} | {ratio:.2f} |")
    effective = [float(tables[k, s].uns["histoniche"]["nolan"]["params"]["final_effective_niches"]) for s in seeds]
    return f"""## K = {k}

| on the test strip, against the teacher | ARI | NMI | JSD | effective niches |
|---|---|---|---|---|
{chr(10).join(rows)}

| the student's gain over | ARI | NMI | ratio of ARI |
|---|---|---|---|
{chr(10).join(gains)}

Mean ± SD over seeds; in brackets the 95 % interval of seed {seeds[0]} by spatial block bootstrap, paired for gains. The teacher's
effective number of niches: {", ".join(f"{e:.2f}" for e in effective)}. *Three strides*: the unsupervised baselines on 472 features, of
stride 32 beside 8 and 16. Finer features teach a student better, coarser ones cluster better: a student is to be compared with both.
"""


_NICHES_HEAD = """## What the niches are

The teacher's niches of the first seed: their size, their commonest clusters of the vendor's, and the genes that set them apart
(t-test on log-normalised counts, best six). What they look like: {doc}`xenium_pancreas_niches`.
"""


def _niches(k: int, table: AnnData) -> str:
    """What the teacher's niches are made of: clusters and marker genes."""
    counts = table.copy()
    counts = counts[np.asarray(counts.X.sum(axis=1)).ravel() > 0].copy()
    sc.pp.normalize_total(counts, target_sum=100)
    sc.pp.log1p(counts)
    sc.tl.rank_genes_groups(counts, "niche_teacher", method="t-test_overestim_var", n_genes=6)
    names = counts.uns["rank_genes_groups"]["names"]
    rows = []
    for niche in counts.obs["niche_teacher"].cat.categories:
        here = counts.obs["niche_teacher"] == niche
        top = counts.obs.loc[here, "graph_cluster"].value_counts(normalize=True).head(3)
        clusters = ", ".join(f"{name} ({share:.0%})" for name, share in top.items())
        rows.append(f"| {niche} | {int(here.sum()):,} | {clusters} | {', '.join(names[niche])} |")
    return f"""K = {k}:

| niche | cells | clusters | genes |
|---|---|---|---|
{chr(10).join(rows)}
"""


def _pictures(n_niches: Sequence[int], seed: int) -> str:
    further = "".join(f"\n![Niche maps, K = {k}](xenium_pancreas/niche_map_k{k}.jpg)\n" for k in n_niches[1:])
    return f"""Pictures of K = {n_niches[0]}, seed {seed}:

![Niche maps of teacher and student](xenium_pancreas/niche_map.jpg)

![Composition](xenium_pancreas/composition.jpg)

![Confusion on the test strip](xenium_pancreas/confusion.jpg)

![Crops of virtual H&E of each niche](xenium_pancreas/exemplars.jpg)

![Training](xenium_pancreas/training.jpg)

The maps of other K, same seed:
{further}"""


def _time(times: dict[str, dict[str, float]], flat: dict[str, float]) -> str:
    total = flat["seconds.total"]
    rows = [
        f"| {name} | {s['seconds']:.0f} | {s['seconds'] / total:.0%} | {s['peak_gb']:.2f} |"
        for name, s in times.items()
    ]
    return f"""## Time and memory

One job from files to map (the first seed and K), each stage a whole process, imports and reading included, alone on
{os.cpu_count()} cores ({platform.machine()}), no GPU; Python {platform.python_version()}. In total {total / 60:.1f} minutes; the
largest process peaked at {flat["peak_gb.max"]:.2f} GB.

| stage | seconds | share | peak memory, GB |
|---|---|---|---|
{chr(10).join(rows)}

## Command

```bash
pip install ".[demo]"
python benchmarks/xenium_pancreas.py PATH/TO/xenium_pancreas
```

Every stage is resumed where a run was stopped; `--jobs 2` makes the runs after the first two at a time. All figures:
`xenium_pancreas.json`.
"""
