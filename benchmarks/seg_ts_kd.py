"""A small student with few labels: task-specific distillation beside training from scratch, MAE, MoCo v3 and task-agnostic KD.

    python benchmarks/seg_ts_kd.py DATA --out RUNS --jobs 2                                          # two cores
    python benchmarks/seg_ts_kd.py DATA --out RUNS --jobs 16 --seeds 0 1 2 --every-number            # a GPU
    python benchmarks/seg_ts_kd.py DATA --out RUNS --ablations
    python benchmarks/seg_ts_kd.py DATA --out RUNS --schedules [--only chase_db1]
    python benchmarks/seg_ts_kd.py DATA --out RUNS --rates --validation [--only chase_db1]
    python benchmarks/seg_ts_kd.py DATA --out RUNS --cost

DATA holds ``chase_db1``, ``bbbc038`` and ``xenium_pancreas`` (drawn as VIRTUAL H&E). The first is one draw of the fewest labels of
each task, the second three draws of every number. Several processes share a GPU well under NVIDIA's MPS. Everything is kept under
RUNS, so that a benchmark that was stopped goes on. Writes ``docs/benchmarks/seg_ts_kd.{md,json}``, its pictures and the figures of
every run, ``seg_ts_kd/runs.csv``, from whatever runs are there. Runs of that file that were not made again stay, and are marked
where their settings were others; with ``--resume`` those made with the same settings are not repeated. ``--validation`` measures on
validation fields instead, to choose settings on, and of the page writes the rates alone. ``--large [vit_h]`` is a configuration for
SAM, whose weights are asked for at the hub: long schedules, LoRA, 3000 synthetic images; it wants a folder RUNS of its own, and
has a page of its own, ``seg_ts_kd_large``.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from _runs import device_name, made_with
from _ts_cost import measure as measure_stages
from _ts_data import N_LABELLED, PATCH, TASKS, VIEWS
from _ts_page import RUN, write

from histoniche import seg, settings
from histoniche.seg._compare import drawn, measure_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _ts_data import Task

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
ARMS = ("scratch", "mae", "mocov3", "task_agnostic_kd", "ts_kd")
BY_COST = ("ts_kd", "mocov3", "task_agnostic_kd", "mae", "scratch")
SMALL: dict[str, Any] = {
    "tuning": {"n_steps": 600, "batch_size": 4},
    "adaptation": {"n_steps": 0, "batch_size": 2},
    "pretraining": {"n_steps": 1000, "batch_size": 8},
    "finetuning": {"n_steps": 400, "batch_size": 4, "lr": 1e-3},
    "finetuning_of": {"ts_kd": {"lr": 3e-4}},
}
"""For two cores: 7 s a step of LoRA are left out, see ``LORA``. How long the last training takes decides what pretraining is worth: see
``--schedules``; at which rate, too: see ``--rates``. Each way pretrains at the learning rate that its function has by default
(distillation 1e-3, MAE 1e-4, MoCo v3 3e-4): at 1e-3 MAE left students that found no vessel on validation images of CHASE-DB1 (seed 1)."""
PRECISION = "32-true"
"""What tells places apart is a few percent of a pretrained Transformer's features, which bfloat16 rounds to half a percent."""
LORA = {"n_steps": 40, "batch_size": 2, "lr": 3e-4}
"""Adaptation of the ablation on two cores."""
LORA_ON_GPU = {"n_steps": 300, "batch_size": 4, "lr": 3e-4}
SYNTHESIS = {"n_images": 1000, "n_steps": 1200}
"""Adaptation and synthetic images of the ablation on a GPU."""
LARGE: dict[str, Any] = {
    "tuning": {"n_steps": 1000, "batch_size": 8},
    "adaptation": {"n_steps": 2000, "batch_size": 4, "rank": 4},
    "pretraining": {"n_steps": 20000, "batch_size": 64},
    "finetuning": {"n_steps": 4000, "batch_size": 32, "lr": 1e-3},
    "finetuning_of": {"ts_kd": {"lr": 3e-4}},
}
LARGE_SYNTHESIS = {"n_images": 3000, "n_steps": 20000}
"""For SAM on a GPU."""
TUNING_VIEWS = 96
"""Patches that the teacher's decoder is tuned on, shared by the labelled fields."""
ABLATED = "bbbc038"
"""Task of the ablations, with its fewest labels and the first seed."""
RANKS = (0, 4, 16)
"""Ranks of LoRA; 0 leaves it out, so that only a decoder is trained."""
UNLABELLED = (0, 20, 44)
"""Unlabelled fields in the transfer set, beside the labelled ones."""
SYNTHETIC = (0, 250, 1000)
"""Synthetic images in the transfer set, all unlabelled fields beside them; only on a GPU."""
SCHEDULES = (0.25, 1, 4)
"""Lengths of the last training, in those of the settings, for every way: what a rival would gain by patience."""


def options_of(task: Task, n_labelled: int, *, large: str | None) -> dict[str, Any]:
    """Settings of the stages for a task and a number of labelled fields."""
    options = LARGE if large else SMALL
    views = {"tuning": max(1, TUNING_VIEWS // n_labelled), "pretraining": task.n_views}
    return options | {stage: {**options[stage], "n_views": n_views} for stage, n_views in views.items()}


RATES = (3e-4, 1e-3)
"""Rates of the last training that each way's was chosen from."""


@cache
def task_of(name: str, data: Path) -> Task:
    """A task, made once in a process."""
    return TASKS[name](data)


@cache
def teacher_of(channels: tuple[str, ...], *, large: str | None) -> seg.teachers.PromptedTeacher:
    """The teacher, loaded once in a process."""
    return seg.teachers.SAM(channels, model=large) if large else seg.teachers.LiteMedSAM(channels)


def synthetic_fields(name: str, data: Path, out: Path, **options: Any) -> list[seg.Field]:
    """Synthetic images of a task, made where they are not yet there."""
    images = [item.without_labels() for item in task_of(name, data).fields]
    return seg.synthesize(images, folder=out / name / "synthetic", size_px=PATCH, **options)


def ablate(data: Path, out: Path, *, part: str, large: str | None) -> None:
    """Vary one thing at a time: rank, unlabelled fields, synthetic images. Each measured is a line of a table."""
    settings.progress, settings.precision = False, PRECISION
    task, on_gpu = task_of(ABLATED, data), large or torch.cuda.is_available()
    options = options_of(task, task.n_labelled[0], large=large)
    teacher = teacher_of(tuple(task.channels), large=large)
    lora = options["adaptation"] if large else LORA_ON_GPU if on_gpu else LORA
    labelled = drawn(task.fields, task.n_labelled[0], 0)
    rest = [item for item in task.fields if item.name not in {other.name for other in labelled}]
    made = synthetic_fields(ABLATED, data, out, **(LARGE_SYNTHESIS if large else SYNTHESIS)) if on_gpu else []
    rank = 4 if on_gpu else 0
    wanted = [(value, len(rest), 0) for value in RANKS]
    wanted += [(rank, value, 0) for value in UNLABELLED if value < len(rest)]
    wanted += [(rank, len(rest), value) for value in SYNTHETIC if on_gpu and value]
    rows = []
    for rank, n_unlabelled, n_synthetic in wanted:
        student = seg.task_specific_distill(
            labelled, teacher=teacher, unlabelled=[*rest[:n_unlabelled], *made[:n_synthetic]], held_out=task.held_out[part],
            folder=out / "ablation" / f"rank{rank}-{n_unlabelled}-{n_synthetic}", channel=task.channels, pretrained=False,
            n_synthetic=0, patch_px=PATCH, tuning=options["tuning"],
            adaptation={**lora, "rank": rank} if rank else {"n_steps": 0}, distillation=options["pretraining"],
            finetuning={**options["finetuning"], **options["finetuning_of"].get("ts_kd", {})},
        )  # fmt: skip
        row = {"rank": rank, "unlabelled": n_unlabelled, "synthetic": n_synthetic, "device": device_name()}
        row |= {"lora_steps": lora["n_steps"] if rank else 0, "made_with": digest(ABLATED, "ts_kd", large=large)}
        rows.append({**row, **measure_mask(student, task.held_out[part])})
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(out / f"ablation.{part}.csv", index=False)


def vary_last_training(
    name: str,
    data: Path,
    out: Path,
    path: Path,
    *,
    part: str,
    large: str | None,
    lengths: Sequence[float],
    rates: Sequence[float],
) -> None:
    """Repeat the last training of the first comparison of a task, shorter and longer or at other rates. Each measured is a line of a table.

    Without rates, each way has its own.
    """
    settings.progress, settings.precision = False, PRECISION
    task = task_of(name, data)
    options = LARGE if large else SMALL
    n_labelled, folder = task.n_labelled[0], out / name
    labelled = drawn(task.fields, n_labelled, 0)
    kept = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["arm"], row["n_steps"], row["lr"]) for row in kept}
    starts = {arm: folder / f"{arm}-0" / "pretrained" for arm in ARMS}
    starts |= {"ts_kd": folder / f"ts_kd-{n_labelled}-0" / "distilled"}
    missing = [str(starts[arm]) for arm in ARMS if arm != "scratch" and not starts[arm].exists()]
    if missing:
        msg = f"{missing[0]} is missing: run the comparison of {name} with this RUNS first, without further options."
        raise FileNotFoundError(msg)
    for length, arm in product(lengths, ARMS):
        own = {**options["finetuning"], **options["finetuning_of"].get(arm, {})}
        n_steps = round(length * own["n_steps"])
        for lr in rates or [own["lr"]]:
            if (arm, n_steps, lr) in done:
                continue
            student = seg.finetune(
                labelled, channel=task.channels, patch_px=PATCH, pretrained=False, **{**own, "n_steps": n_steps, "lr": lr},
                student="vit-tiny" if arm == "scratch" else seg.Segmenter.load(starts[arm]),
            )  # fmt: skip
            kept.append(
                {"task": name, "arm": arm, "n_steps": n_steps, "lr": lr, **measure_mask(student, task.held_out[part])}
            )
            print(kept[-1], flush=True)
            pd.DataFrame(kept).to_csv(path, index=False)


def digest(task: str, arm: str, *, large: str | None) -> str:
    """What tells a run of a way on a task, made with these settings, from those of others."""
    options = LARGE if large else SMALL
    used = ["finetuning"] if arm == "scratch" else ["pretraining", "finetuning"]
    used += ["tuning", "adaptation"] if arm == "ts_kd" else []
    views = [VIEWS[task] if arm in {"task_agnostic_kd", "ts_kd"} else 0, TUNING_VIEWS if arm == "ts_kd" else 0]
    shared = [
        PATCH,
        "calibrated DPT",
        "CHASE-DB1 whole",
        "kl_dice",
        PRECISION,
        f"SAM {large}" if large else "LiteMedSAM",
    ]
    return made_with([options[stage] for stage in used], options["finetuning_of"].get(arm, {}), views, shared)


@dataclass(frozen=True)
class Job:
    """What can run beside others: a way and a seed of a task, for numbers of labels that share a pretraining."""

    task: str
    arm: str
    seed: int
    numbers: tuple[int, ...]


def jobs_of(names: Sequence[str], seeds: Sequence[int], kept: set[tuple[Any, ...]], *, every_number: bool) -> list[Job]:
    """All that is not kept, the longest first. Labels have no part in what MAE, MoCo v3 and task-agnostic KD start from."""
    jobs = []
    for arm, name, seed in product(BY_COST, names, seeds):
        every = N_LABELLED[name] if every_number else N_LABELLED[name][:1]
        left = tuple(n for n in every if (name, n, arm, seed) not in kept)
        jobs += [Job(name, arm, seed, part) for part in (((n,) for n in left) if arm == "ts_kd" else (left,)) if part]
    return jobs


def compare_one(job: Job, data: Path, out: Path, *, part: str, large: str | None) -> None:
    """Make the students of a job, and measure them."""
    settings.progress, settings.precision = False, PRECISION
    task = task_of(job.task, data)
    synthetic = synthetic_fields(job.task, data, out, **LARGE_SYNTHESIS) if large else []
    for n_labelled in job.numbers:
        frame = seg.compare(
            task.fields, test=task.held_out[part], teacher=teacher_of(tuple(task.channels), large=large), folder=out / job.task,
            synthetic=synthetic, arms=[job.arm], n_labelled=[n_labelled], seeds=[job.seed], channel=task.channels, patch_px=PATCH,
            **options_of(task, n_labelled, large=large),
        )  # fmt: skip
        frame = frame.assign(task=job.task, made_with=digest(job.task, job.arm, large=large), device=device_name())
        frame.to_csv(out / f"{job.task}.{part}.{n_labelled}.{job.arm}.{job.seed}.csv", index=False)
        print(frame.to_string(index=False, header=False), flush=True)


def read_tables(folder: Path, pattern: str) -> pd.DataFrame | None:
    """Tables of files, one below the other; None where there are none."""
    tables = [pd.read_csv(path, dtype={"made_with": str}) for path in sorted(folder.glob(pattern))]
    return pd.concat(tables, ignore_index=True) if tables else None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=list(TASKS), help="one task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draws of labels")
    parser.add_argument("--every-number", action="store_true", help="not the fewest labels alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in one thread")
    parser.add_argument("--ablations", action="store_true", help="the ablations, instead of the comparison")
    parser.add_argument(
        "--schedules", action="store_true", help="shorter and longer last trainings, after the comparison"
    )
    parser.add_argument("--rates", action="store_true", help="last trainings at several rates, after the comparison")
    parser.add_argument("--cost", action="store_true", help="time and memory of each stage, instead of the comparison")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument(
        "--large", nargs="?", const="vit_b", choices=["vit_b", "vit_l", "vit_h"], help="SAM as the teacher"
    )
    parser.add_argument("--resume", action="store_true", help="do not repeat the runs of docs/benchmarks")
    args = parser.parse_args()
    part = "validation" if args.validation else "test"
    settings.precision = PRECISION
    page = "seg_ts_kd_large" if args.large else "seg_ts_kd"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.ablations:
        ablate(args.data, args.out, part=part, large=args.large)
    if args.cost:
        measure_stages(args.out, LARGE if args.large else SMALL, large=args.large)
    for name in [args.only] if args.only else list(TASKS):
        for wanted, kind, lengths, rates in (
            (args.schedules, "schedules", SCHEDULES, ()), (args.rates, "rates", (1,), RATES),
        ):  # fmt: skip
            if wanted:
                vary_last_training(
                    name, args.data, args.out, args.out / f"{kind}.{name}.{part}.csv", part=part, large=args.large,
                    lengths=lengths, rates=rates,
                )  # fmt: skip
    before = read_tables(DOCS / page, "runs.csv")
    before = pd.DataFrame(columns=[*RUN, "made_with"]) if before is None else before
    same = [row.made_with == digest(row.task, row.arm, large=args.large) for row in before.itertuples()]
    resumed = args.resume and part == "test"
    kept = set(before.loc[same if resumed else [], RUN].itertuples(index=False, name=None))
    names = (
        [] if args.ablations or args.schedules or args.rates or args.cost else [args.only] if args.only else list(TASKS)
    )
    if args.large:
        for name in names:  # before the processes that share them
            synthetic_fields(name, args.data, args.out, **LARGE_SYNTHESIS)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        run = partial(compare_one, data=args.data, out=args.out, part=part, large=args.large)
        jobs = [pool.submit(run, job) for job in jobs_of(names, args.seeds, kept, every_number=args.every_number)]
        for job in jobs:
            job.result()
    runs = read_tables(args.out, "*.test.*.csv")
    if (args.validation and not args.rates) or (runs is None and before.empty):
        return
    more = {
        name: read_tables(args.out, pattern)
        for name, pattern in (
            ("ablation", "ablation.test.csv"), ("schedules", "schedules.*.test.csv"),
            ("rates", "rates.*.validation.csv"), ("cost", "cost*.csv"),
        )
    }  # fmt: skip
    write(
        before if runs is None else pd.concat([runs, before], ignore_index=True), DOCS, page,
        settings=LARGE if args.large else SMALL, digest_of=partial(digest, large=args.large), **more,
    )  # fmt: skip


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
        torch.set_num_threads(1)
    main()
