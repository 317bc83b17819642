"""How wide intervals of the spatial block bootstrap are, by the side of a block.

    python benchmarks/block_size.py OUTPUT_OF_XENIUM_PANCREAS

Reads the evaluated table of the first seed at K = 10 from a finished run of ``xenium_pancreas.py``; nothing is trained. Writes
``docs/benchmarks/block_size.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import anndata
import numpy as np

import histoniche as hn

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SIDES = (20, 50, 100, 200, 300, 340, 500, 1000)
"""Sides of a block in um; 340 is near 8 radii, the default."""
FIGURES = ("ari", "nmi", "jsd")
RIVAL = "probe_neighborhood"


def widths(path: Path) -> list[dict[str, float]]:
    """Width of the 95 % interval of the student's figures, and of its gain in ARI over the stronger probe, for each side."""
    table = anndata.read_h5ad(path)
    test = table[table.obs["split"] == "test"]
    xy = np.asarray(test.obsm["spatial"])
    labels = {"student": test.obs["niche"], RIVAL: test.obs[f"niche_{RIVAL}"]}
    rows = []
    for side in SIDES:
        found = hn.metrics.bootstrap_agreement(
            test.obs["niche_teacher"], labels, xy, block_um=side, cell_types=test.obs["graph_cluster"]
        )
        gain = found["student"]["ari"].minus(found[RIVAL]["ari"])
        row = {"side": side, "blocks": len(np.unique(hn.metrics.spatial_blocks(xy, side)))}
        row |= {figure: found["student"][figure].high - found["student"][figure].low for figure in FIGURES}
        rows.append({**row, "ari_gain": gain.high - gain.low})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="output of xenium_pancreas.py")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page and figures go")
    arguments = parser.parse_args()
    rows = widths(arguments.runs / "seed0" / "k10" / "table.h5ad")
    flat = {
        f"{row['side']:.0f}um.{name}": round(row[name], 4) for row in rows for name in ("blocks", *FIGURES, "ari_gain")
    }
    (arguments.docs / "block_size.json").write_text(json.dumps(flat, indent=1) + "\n")
    lines = [
        f"| {row['side']:.0f} | {row['blocks']:,.0f} | {row['ari']:.3f} | {row['nmi']:.3f} | {row['jsd']:.4f} | {row['ari_gain']:.3f} |"
        for row in rows
    ]
    newline = "\n"
    (arguments.docs / "block_size.md").write_text(f"""# Size of the blocks of the bootstrap

Width of 95 % intervals on the test strip of {{doc}}`xenium_pancreas` (7 x 0.7 mm, radius 43 um; seed 0, K = 10): the student's figures, and its gain
in ARI over the stronger probe. The default of `hn.tl.evaluate_niches` is 8 radii, near 340 um. What it means: {{doc}}`../metrics`.

| side, um | blocks | ARI | NMI | JSD | ARI gain |
|---|---|---|---|---|---|
{newline.join(lines)}

## Command

```bash
python benchmarks/block_size.py benchmarks/output/xenium_pancreas
```

After `xenium_pancreas.py`. All figures: `block_size.json`.
""")


if __name__ == "__main__":
    main()
