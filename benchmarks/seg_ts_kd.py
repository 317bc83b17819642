"""A small student with few labels: task-specific distillation beside training from scratch, MAE, MoCo v3 and task-agnostic KD.

    python benchmarks/seg_ts_kd.py DATA --out RUNS [--only chase_db1] [--seeds 0 1 2] [--jobs 2]

DATA holds ``chase_db1``, ``bbbc038`` and ``xenium_pancreas`` (drawn as VIRTUAL H&E). Everything is kept under RUNS, so that a
benchmark that was stopped goes on. Writes ``docs/benchmarks/seg_ts_kd.{md,json}`` and its pictures from whatever runs are
there. ``--validation`` measures on validation fields instead, to choose settings on, and writes no page. ``--large`` is the
configuration for a GPU: SAM ViT-B, long schedules, 3000 synthetic images.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from _ts_data import PATCH, TASKS
from _ts_page import write

from histoniche import seg, settings

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
ARMS = ("scratch", "mae", "mocov3", "task_agnostic_kd", "ts_kd")
SMALL: dict[str, Any] = {
    "tuning": {"n_steps": 200, "batch_size": 4},
    "adaptation": {"n_steps": 30, "batch_size": 2, "rank": 4},
    "pretraining": {"n_steps": 300, "batch_size": 8, "lr": 1e-3},
    "finetuning": {"n_steps": 200, "batch_size": 8, "lr": 1e-3},
}
"""For two cores."""
LARGE: dict[str, Any] = {
    "tuning": {"n_steps": 1000, "batch_size": 8},
    "adaptation": {"n_steps": 2000, "batch_size": 4, "rank": 4},
    "pretraining": {"n_steps": 20000, "batch_size": 64, "lr": 1e-3},
    "finetuning": {"n_steps": 4000, "batch_size": 32, "lr": 1e-3},
}
"""For a GPU."""


def one_task(name: str, data: Path, out: Path, seeds: list[int], *, part: str, large: bool) -> str:
    """Compare the arms on a task, seed by seed."""
    settings.progress = False
    task = TASKS[name](data)
    teacher: seg.teachers.PromptedTeacher
    synthetic: list[seg.Field] = []
    if large:
        teacher = seg.teachers.SAM(task.channels, model="vit_b")
        synthetic = seg.synthesize(
            [item.without_labels() for item in task.fields], folder=out / name / "synthetic", n_images=3000,
            size_px=PATCH, n_steps=20000,
        )  # fmt: skip
    else:
        teacher = seg.teachers.LiteMedSAM(task.channels)
    options = LARGE if large else SMALL
    for stage, n_views in zip(("tuning", "pretraining"), task.views, strict=True):
        options = {**options, stage: {**options[stage], "n_views": n_views}}
    for seed in seeds:
        frame = seg.compare(
            task.fields, test=task.held_out[part], teacher=teacher, folder=out / name / part, synthetic=synthetic, arms=ARMS,
            n_labelled=task.n_labelled, seeds=[seed], channel=task.channels, patch_px=PATCH, **options,
        )  # fmt: skip
        frame.to_csv(out / f"{name}.{part}.{seed}.csv", index=False)
        print(f"{name} seed {seed}\n{frame.to_string(index=False)}", flush=True)
    return name


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=list(TASKS), help="one task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="tasks at a time, each in one thread")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    part = "validation" if args.validation else "test"
    args.out.mkdir(parents=True, exist_ok=True)
    names = [args.only] if args.only else list(TASKS)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(one_task, name, args.data, args.out, args.seeds, part=part, large=args.large) for name in names
        ]
        for job in jobs:
            job.result()
    if not args.validation:
        files = sorted(args.out.glob("*.test.*.csv"))
        runs = pd.concat([pd.read_csv(path).assign(task=path.name.split(".")[0]) for path in files], ignore_index=True)
        write(runs, DOCS, settings=LARGE if args.large else SMALL)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
