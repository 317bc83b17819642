"""Peak memory of ``hn.seg.segment`` by the size of the image.

    python benchmarks/segment_memory.py

Each size in a process of its own: a lazy synthetic image of discs, a MobileNetV3-small student whose network runs while the maps
are the discs themselves, labels in a store. Writes ``docs/benchmarks/segment_memory.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import dask.array as da
import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

import histoniche as hn
from histoniche import seg

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SIDES = (2048, 4096, 8192, 12288)
CHUNK, PERIOD, RADIUS, UM_PER_PX = 512, 64, 16, 0.5


class Discs(seg.Segmenter):
    """Runs its network, and then returns the discs: a network of random weights would find nothing."""

    def predict_maps(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 2, y, x): foreground where the image is bright."""
        super().predict_maps(pixels)
        bright = (pixels[:, 0] > 0.5).astype(np.float32)
        return np.stack([bright, np.zeros_like(bright)], axis=1)


def image(side: int) -> SpatialData:
    """Lazy image of a side in px, the same chunk again and again."""
    y, x = np.mgrid[:CHUNK, :CHUNK] % PERIOD - PERIOD // 2
    chunk = np.where(y**2 + x**2 < RADIUS**2, 1000, 100).astype(np.uint16)[None]
    chunks = ((1,), (CHUNK,) * (side // CHUNK), (CHUNK,) * (side // CHUNK))
    pixels = da.map_blocks(lambda block_info=None: chunk, chunks=chunks, dtype=np.uint16)  # noqa: ARG005
    um = {"um": Scale([UM_PER_PX, UM_PER_PX], axes=("x", "y"))}
    return SpatialData(
        images={"image": Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["DAPI"], transformations=um)}
    )


def measured(side: int) -> dict[str, float]:
    """Segment an image: peak of the process in MB before and after, seconds, cells."""
    hn.settings.progress = False
    student = Discs(seg.SegmenterConfig("mobilenetv3-small", ["DAPI"], UM_PER_PX), pretrained=False)
    sdata, peak = image(side), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, start = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seg.segment(sdata, student, store=Path(folder) / "labels.zarr")
    return {
        "side": side,
        "cells": len(sdata["cells"]),
        "before_mb": before,
        "peak_mb": peak(),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page and figures go")
    arguments = parser.parse_args()
    rows = []
    for side in SIDES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measured, side).result())
        print(rows[-1], flush=True)
    flat = {
        f"{row['side']:.0f}px.{name}": round(row[name], 1)
        for row in rows
        for name in ("cells", "before_mb", "peak_mb", "seconds")
    }
    (arguments.docs / "segment_memory.json").write_text(json.dumps(flat, indent=1) + "\n")
    lines = [
        f"| {row['side']:.0f} | {row['side'] ** 2 / 1e6:.0f} | {row['cells']:,.0f} | {row['before_mb']:,.0f} | {row['peak_mb']:,.0f} |"
        for row in rows
    ]
    newline = "\n"
    (arguments.docs / "segment_memory.md").write_text(f"""# Memory of segmentation

Peak memory of `hn.seg.segment` by the size of the image: a lazy *synthetic* image of discs, MobileNetV3-small, labels in a store, each size in
a process of its own. *Before*: with imports, student and image. Outlines and table of the cells are in memory and grow with their number.

| side, px | Mpx | cells | before, MB | peak, MB |
|---|---|---|---|---|
{newline.join(lines)}

From {rows[0]["side"] ** 2 / 1e6:.0f} to {rows[-1]["side"] ** 2 / 1e6:.0f} Mpx the image grows {rows[-1]["side"] ** 2 / rows[0]["side"] ** 2:.0f} times, what segmentation takes on top of *before* \
{(rows[-1]["peak_mb"] - rows[-1]["before_mb"]) / (rows[0]["peak_mb"] - rows[0]["before_mb"]):.1f} times.

## Command

```bash
python benchmarks/segment_memory.py
```

{platform.machine()}, no GPU; Python {platform.python_version()}. All figures: `segment_memory.json`.
""")


if __name__ == "__main__":
    main()
