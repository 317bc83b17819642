"""What a step of each stage of task-specific distillation costs: time and memory, each stage in a process of its own."""

from __future__ import annotations

import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from _ts_data import PATCH

from histoniche import seg, settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAGES = ("teacher", "tune", "finetune_lora", "synthesize", "distill", "pretrain, MAE", "pretrain, MoCo v3", "finetune")
FEW, MORE = 2, 8
FEW_ON_GPU, MORE_ON_GPU = 10, 60
"""Steps of two short trainings; their difference is the time of a step, without what comes before."""


def _field(seed: int) -> seg.Field:
    rng = np.random.default_rng(seed)
    labels = np.zeros((PATCH, PATCH), dtype=np.int32)
    labels[32:64, 32:64], labels[70:100, 60:90] = 1, 2
    image = np.where(labels > 0, 180, 40) + rng.integers(0, 40, labels.shape)
    return seg.Field(f"field{seed}", image[None].astype(np.uint8), ("DNA",), labels)


def _calls(settings_of: dict[str, Any], *, large: str | None) -> dict[str, Callable[[int], object]]:
    """What runs each stage for some steps."""
    teacher = seg.teachers.SAM(["DNA"], model=large) if large else seg.teachers.LiteMedSAM(["DNA"])
    fields = [_field(seed) for seed in range(2)]
    student = {"student": "vit-tiny", "pretrained": False, "channel": "DNA", "patch_px": PATCH}
    batch = {stage: {"batch_size": options["batch_size"]} for stage, options in settings_of.items()}
    terms = ("probability", "boundary", "hidden")

    def synthesize(n_steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            seg.synthesize(fields, folder=f"{folder}/made", n_images=1, size_px=PATCH, n_steps=n_steps, ddim_steps=1)

    def distill(n_steps: int) -> None:
        tuned = seg.teachers.tune(fields[:1], teacher=teacher, n_steps=1, n_views=1, batch_size=1)
        seg.distill(
            fields[:1], teacher=tuned, terms=terms, n_views=1, n_steps=n_steps, **student, **batch["pretraining"]
        )

    return {
        "teacher": lambda n: [teacher.embed(fields[0].read(["DNA"])) for _ in range(n)],
        "tune": lambda n: seg.teachers.tune(fields[:1], teacher=teacher, n_steps=n, n_views=1, **batch["tuning"]),
        "finetune_lora": lambda n: seg.finetune_lora(fields, teacher=teacher, n_steps=n, **batch["adaptation"]),
        "synthesize": synthesize,
        "distill": distill,
        "pretrain, MAE": lambda n: seg.pretrain(fields, method="mae", n_steps=n, **student, **batch["pretraining"]),
        "pretrain, MoCo v3": lambda n: seg.pretrain(fields, method="mocov3", n_steps=n, **student, **batch["pretraining"]),
        "finetune": lambda n: seg.finetune(fields, n_steps=n, **student, **batch["finetuning"]),
    }  # fmt: skip


def stage_cost(stage: str, settings_of: dict[str, Any], *, large: str | None) -> dict[str, Any]:
    """Seconds of a step and peak memory of a stage; without a GPU called in a fresh process."""
    settings.progress = False
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        torch.set_num_threads(1)
    few, more = (FEW_ON_GPU, MORE_ON_GPU) if on_gpu else (FEW, MORE)
    call, taken = _calls(settings_of, large=large)[stage], []
    for n_steps in (1, few, more):  # the first warms up
        start = time.perf_counter()
        call(n_steps)
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    memory = (
        torch.cuda.max_memory_allocated() / 1e9 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    return {
        "stage": stage, "s_step": (taken[-1] - taken[-2]) / (more - few), "memory_gb": memory,
        "device": torch.cuda.get_device_name() if on_gpu else "one thread of a CPU",
    }  # fmt: skip


def measure(out: Path, settings_of: dict[str, Any], *, large: str | None) -> None:
    """Measure all stages and write ``cost.csv``, or ``cost_gpu.csv``."""
    on_gpu = torch.cuda.is_available()
    rows = []
    for stage in STAGES:
        if on_gpu:  # torch itself counts what it allocates: one process will do
            rows.append(stage_cost(stage, settings_of, large=large))
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(stage_cost, stage, settings_of, large=large).result())
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(out / ("cost_gpu.csv" if on_gpu else "cost.csv"), index=False)
