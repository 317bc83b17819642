"""Which stains the virtual H&E of the pancreas is rendered from: an ablation with one teacher.

    python benchmarks/stains.py DATA/xenium_pancreas --runs OUTPUT_OF_XENIUM_PANCREAS

Takes split, neighbourhoods and teacher (first seed, K = 10) from a finished run of ``xenium_pancreas.py``, renders the image from
other stains, embeds it and distils anew. Features lie in stores and figures in a file, so a run that was stopped goes on.
Writes ``docs/benchmarks/stains.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import _readers
import anndata
from xenium_pancreas import SYMMETRIES

import histoniche as hn

if TYPE_CHECKING:
    from spatialdata import SpatialData

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
ENCODER = "efficientnet-lite0"
MUSCLE, RNA, BOUNDARY = "alphaSMA/vimentin", "18S rRNA", "boundary (ATP1A1/CD45/E-Cadherin)"
EOSIN = {
    "DAPI + 18S": {RNA: 1.0},
    "DAPI + 18S + alphaSMA/vimentin (the default)": {RNA: 0.65, MUSCLE: 0.5},
    "all four": {RNA: 0.65, MUSCLE: 0.5, BOUNDARY: 0.5},
}
N_STEPS = 561
"""Of a student: fewer than in the main run, which shows each training cell five times."""
SHOWN = ("student", "probe_neighborhood", "probe_cell")


def distil(sdata: SpatialData, title: str, at: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Render, embed, distil and evaluate."""
    hn.pp.virtual_he(sdata, image_key="morphology", cytoplasm=EOSIN[title])
    table = sdata["table"]
    hn.tl.histology_embedding(
        sdata, image_key="virtual_he", encoder=ENCODER, mode="dense", symmetries=SYMMETRIES, key_added="stains",
        store=arguments.output / f"features_{at}.zarr",
    )  # fmt: skip
    hn.tl.distill_niches(
        table,
        n_niches=10,
        features_key="stains",
        model_dir=arguments.output / f"model_{at}",
        overwrite=True,
        n_steps=N_STEPS,
        seed=arguments.seed,
    )
    hn.tl.evaluate_niches(
        table, features_key="stains", cell_type_key="graph_cluster", baselines=SHOWN[1:], seed=arguments.seed
    )
    found = table.uns["niche_evaluation"]
    return {f"{model}.{name}": float(found.loc[model, name]) for model in SHOWN for name in ("ari", "nmi", "jsd")}


def report(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """Write the page and the flat figures."""
    flat = {f"{title}.{name}": round(value, 4) for title, row in results.items() for name, value in row.items()}
    (arguments.docs / "stains.json").write_text(json.dumps(flat, indent=1) + "\n")
    rows = [
        f"| {title} | " + " | ".join(f"{row[f'{m}.ari']:.3f} / {row[f'{m}.nmi']:.3f}" for m in SHOWN) + f" | {row['student.jsd']:.4f} |"
        for title, row in results.items()
    ]  # fmt: skip
    newline = "\n"
    (arguments.docs / "stains.md").write_text(f"""# Stains of the virtual H&E

The pancreas of {{doc}}`xenium_pancreas` (test strip, K = 10, the teacher of seed {arguments.seed}), with its **virtual** H&E rendered from other
stains. The boundary stain holds antibodies against E-cadherin and CD45, markers of the very cells that niches are made of, and no H&E
shows them: it is left out by default, and only here to show what it would add.

| rendered from | student, ARI / NMI | probe on cell and neighbourhood | probe on the cell | student's JSD |
|---|---|---|---|---|
{newline.join(rows)}

One seed: differences of 0.01 are noise. Students of {N_STEPS} steps, fewer than on the main page.

## Command

```bash
pip install ".[demo]"
python benchmarks/stains.py PATH/TO/xenium_pancreas --runs benchmarks/output/xenium_pancreas
```

After `xenium_pancreas.py`. {os.cpu_count()} cores ({platform.machine()}), no GPU; Python {platform.python_version()}. All figures: `stains.json`.
""")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cells.h5ad and morphology.ome.tif")
    parser.add_argument(
        "--runs", type=Path, default=HERE / "output" / "xenium_pancreas", help="output of xenium_pancreas.py"
    )
    parser.add_argument("--output", type=Path, default=HERE / "output" / "stains")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page and figures go")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = arguments.output / "results.json"
    results = json.loads(done.read_text()) if done.exists() else {}
    for at, title in enumerate(EOSIN):
        if title not in results:
            sdata = _readers.read_xenium_pancreas(arguments.data)
            del sdata.tables["table"]
            sdata.tables["table"] = anndata.read_h5ad(arguments.runs / f"seed{arguments.seed}" / "k10" / "table.h5ad")
            results[title] = distil(sdata, title, at, arguments)
            done.write_text(json.dumps(results, indent=1))
            print(title, results[title], flush=True)
    report({title: results[title] for title in EOSIN}, arguments)


if __name__ == "__main__":
    main()
