"""Single-channel students of a teacher that sees more: with and without distillation, on held-out images and tissue.

    python benchmarks/seg_cross_modal.py DATA --out RUNS [--jobs 2] [--resume]
    python benchmarks/seg_cross_modal.py DATA --out RUNS --gpu-cost

DATA holds ``bbbc038`` and ``xenium_pancreas``. Every run is a file under RUNS, and so are the teacher's maps, so a benchmark that
was stopped goes on. Writes ``docs/benchmarks/seg_cross_modal.{md,json}``, its pictures and the figures of every run,
``seg_cross_modal/runs.csv``; with ``--resume`` runs that are in there, made with the same settings, are not repeated.
``--validation`` measures on validation images instead, to choose settings on, and writes no page.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _runs import device_name, made_with, read_runs
from _seg_data import (
    FEWEST,
    N_TRANSFER,
    N_TUNE,
    PATCH,
    SPLITS,
    TEST,
    TUNING_STEPS,
    load_split,
    save_split,
    teacher_maps,
)
from _seg_page import RUN, RUNS, write

from histoniche import seg, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from _seg_data import Split

    from histoniche.seg import Field, Segmenter

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SEEDS = (0, 1, 2)
STUDENTS = ("mobilenetv3-small", "efficientnet-b0", "resnet18", "swin-tiny", "efficientnet-lite0")
PRETRAINED = ("efficientnet-lite0",)
"""Students that start from ImageNet weights: those that can be had without a download."""
CONTROL = "mobilenetv3-small"
GPU_BATCH = 64
"""Images of a batch where students are timed on a GPU."""
N_LABELLED, N_STEPS = 4, 600
SETTINGS = {"batch_size": 4, "patch_px": PATCH}
RATES = {"swin-tiny": 5e-4, "efficientnet-lite0": 2e-3}
RATE = 4e-3
"""Learning rates, of all arms alike; chosen on validation images among 0.002, 0.004 and 0.006."""
TUNED, UNSEEN = "no_kd, threshold tuned", "kd, labels unseen"
NO_KD = ("no_kd", TUNED)
"""Arms of labels alone; the second decides what is foreground as distilled students do, on its own labelled patches."""
KD: dict[str, dict[str, Any]] = {
    "kd": {},
    UNSEEN: {"terms": ("probability", "boundary")},
    "kd without boundary term": {"terms": ("probability", "supervised")},
    "kd without probability term": {"terms": ("boundary", "supervised")},
    "kd with fixed weights": {"uncertainty": False},
    "kd of hard pseudo-labels": {"hard": True},
    "kd loss on true labels": {},
}
"""Arms that learn from all transfer patches, and their options."""
THRESHOLD = "best_threshold, one standard error"
"""How distilled students decide what is foreground. On validation images, mean of 18 / 16 runs, Dice of the foreground: BBBC038 0.910 at
0.5, 0.898 at the best threshold of the labelled patches, 0.907 where that must gain more than its standard error; pancreas 0.777,
0.789, 0.785."""
MADE_WITH = made_with(SETTINGS, RATES, RATE, KD, PRETRAINED, N_TRANSFER, N_TUNE, TUNING_STEPS, FEWEST, TEST, THRESHOLD)


@dataclass(frozen=True)
class Run:
    """One training, measured."""

    data: str
    arm: str
    student: str = CONTROL
    n_labelled: int = N_LABELLED
    n_steps: int = N_STEPS
    seed: int = 0

    @property
    def file(self) -> str:
        """Name of its file."""
        arm = self.arm.replace(", ", "-").replace(" ", "_")
        return f"{self.data}.{self.student}.{arm}.{self.n_labelled}.{self.n_steps}.{self.seed}.json"


def runs(seeds: tuple[int, ...]) -> list[Run]:
    """All runs, the table of the students first."""
    table = [
        Run(data, arm, student=student, seed=seed)
        for seed in seeds for student in STUDENTS for data in SPLITS for arm in ("no_kd", "kd")
    ]  # fmt: skip
    controls = [Run(data, arm, seed=seed) for seed in seeds for arm in KD if arm != "kd" for data in SPLITS]
    labels = [
        Run(data, arm, n_labelled=n, seed=seed)
        for seed in seeds for n in (16, 64) for data in SPLITS for arm in ("no_kd", "kd")
    ]  # fmt: skip
    schedules = [
        Run(data, arm, n_steps=n, seed=seed)
        for seed in seeds for n in (N_STEPS // 3, N_STEPS * 2) for data in SPLITS for arm in ("no_kd", "kd")
    ]  # fmt: skip
    early = [
        Run(data, "no_kd", student=student, n_steps=N_STEPS // 3, seed=seed)
        for seed in seeds for student in STUDENTS if student != CONTROL for data in SPLITS
    ]  # fmt: skip
    tuned = [
        Run(data, TUNED, n_steps=n, seed=seed) for seed in seeds for n in (N_STEPS, N_STEPS // 3) for data in SPLITS
    ]  # fmt: skip
    return [*table, *early, *controls, *labels, *schedules, *tuned]


class Truth:
    """Labels in the place of a teacher: what the same loss reaches with them."""

    name, licence, fingerprint = "labels", "none", "labels"

    def __call__(self, item: Field, *, features: bool = False) -> seg.teachers.Output:
        """Maps of the labels."""
        del features
        return seg.teachers.Output(seg.maps_of_labels(item.read_labels()))


def train_student(split: Split, run: Run) -> Segmenter:
    """Train as the arm says; every arm has the same steps, batch and augmentation."""
    options = {**SETTINGS, "channel": split.channel, "student": run.student, "n_steps": run.n_steps, "seed": run.seed}
    options |= {"lr": RATES.get(run.student, RATE), "pretrained": run.student in PRETRAINED}
    labelled = split.labelled(run.n_labelled, run.seed)
    if run.arm in NO_KD:
        student = seg.finetune(labelled, **options)
        if run.arm == TUNED:
            student.config.threshold = seg.best_threshold(student, labelled)
        return student
    if run.arm == UNSEEN:
        labelled = []
    teacher = Truth() if run.arm == "kd loss on true labels" else split.teacher
    return seg.distill(split.transfer, teacher=teacher, labelled=labelled, **options, **KD[run.arm])


def measured(found: list[np.ndarray], fields: list[Field]) -> dict[str, float]:
    """Means over the held-out fields."""
    um = fields[0].um_per_px or 1.0
    frame = seg.metrics.evaluate(
        [(labels, item.read_labels()) for labels, item in zip(found, fields, strict=True)], um_per_px=um
    )
    return {name: float(frame[name].mean()) for name in ("dice", "hausdorff95", "boundary_f", "ap50", "ap75", "pq")}


# ------------------------------------------------------------------------------------------------------------- stages
def prepare(name: str, data: Path, out: Path) -> None:
    """Make a split, tune the teacher, keep its maps of the transfer patches and what it reaches itself."""
    folder = out / name
    if (folder / "teacher.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    split = SPLITS[name](data, folder)
    taught = seg.teachers.teach(split.transfer, teacher=split.teacher, cache=out / "cache")
    save_split(split, taught, folder)
    fields = split.held_out["test"]
    maps = [teacher_maps(split.teacher, item) for item in fields]
    np.savez_compressed(folder / "teacher_test.npz", np.stack(maps).astype(np.float16))
    reached = {"teacher": measured([seg.instances(found) for found in maps], fields)}
    for label, teacher in split.others.items():
        reached[label] = measured([seg.instances(teacher_maps(teacher, item)) for item in fields], fields)
    (folder / "teacher.json").write_text(json.dumps(reached, indent=1))


def one_run(run: Run, out: Path, part: str) -> str:
    """Train a student and measure it."""
    path = out / part / run.file
    if path.exists():
        return run.file
    settings.progress = False
    split = load_split(out / run.data)
    student = train_student(split, run)
    fields = split.held_out[part]
    found = [student.predict(item) for item in fields]
    if run.seed == 0 and run.n_labelled == N_LABELLED and run.n_steps == N_STEPS:
        np.savez_compressed(path.with_suffix(".npz"), *found[:4])
    beside = path.with_suffix(".part")
    about = {**asdict(run), "made_with": MADE_WITH, "threshold": student.config.threshold, "device": device_name()}
    beside.write_text(json.dumps({**about, **measured(found, fields)}, indent=1))
    beside.replace(path)
    return run.file


def measure_cost(out: Path) -> None:
    """Parameters and megapixels a second of teacher and students, on one thread of a CPU, in one run."""
    import tempfile

    import onnxruntime
    import torch

    torch.set_num_threads(1)
    settings.accelerator = "cpu"
    image = np.random.default_rng(0).random((1, TEST, TEST), dtype=np.float32)
    mpx = TEST * TEST / 1e6
    teacher = seg.teachers.LiteMedSAM(["DNA"])
    figures = {
        "cost.teacher.parameters_m": count(teacher.module),
        "cost.teacher.mpx_s": mpx / seconds(lambda: teacher.embed(image)),
    }
    embedding, _ = teacher.embed(image)
    box = torch.tensor([[50.0, 50.0, 90.0, 90.0]])
    with torch.inference_mode():
        figures["cost.teacher.s_per_box"] = seconds(lambda: teacher.decode(embedding, box, boxes=True))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for name in STUDENTS:
        student = seg.Segmenter(seg.SegmenterConfig(encoder=name, channels=["DNA"]))
        figures[f"cost.{name}.parameters_m"] = count(student.module)
        figures[f"cost.{name}.mpx_s"] = mpx / seconds(lambda model=student: model.predict_maps(image[None]))
        with tempfile.TemporaryDirectory() as folder:
            path = seg.export_onnx(student, Path(folder) / "student.onnx")
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: image[None]}
            figures[f"cost.{name}.onnx_mpx_s"] = mpx / seconds(lambda s=session, f=feed: s.run(None, f))
    (out / "cost.json").write_text(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=1))


def measure_gpu_cost(out: Path) -> None:
    """The same on a GPU: one image at a time, as the teacher takes them, and students in batches as well."""
    import torch

    settings.accelerator = "cuda"
    images = np.random.default_rng(0).random((GPU_BATCH, 1, TEST, TEST), dtype=np.float32)
    mpx = TEST * TEST / 1e6
    teacher = seg.teachers.LiteMedSAM(["DNA"])

    def embed() -> None:
        teacher.embed(images[0])
        torch.cuda.synchronize()

    figures: dict[str, Any] = {"cost_gpu.teacher.mpx_s": mpx / seconds(embed)}
    for name in STUDENTS:
        student = seg.Segmenter(seg.SegmenterConfig(encoder=name, channels=["DNA"]))
        one, many = (seconds(lambda model=student, n=n: model.predict_maps(images[:n])) for n in (1, GPU_BATCH))
        figures[f"cost_gpu.{name}.mpx_s"], figures[f"cost_gpu.{name}.batch_mpx_s"] = mpx / one, GPU_BATCH * mpx / many
    figures = {name: round(value, 4) for name, value in figures.items()}
    (out / "cost_gpu.json").write_text(
        json.dumps({"cost_gpu.device": torch.cuda.get_device_name(), "cost_gpu.batch": GPU_BATCH, **figures}, indent=1)
    )


def count(module: Any) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def seconds(call: Callable[[], Any], *, repeats: int = 5) -> float:
    """Shortest of several calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--only", choices=list(SPLITS), help="one data set")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--gpu-cost", action="store_true", help="only the speed of teacher and students on a GPU")
    parser.add_argument("--resume", action="store_true", help="do not repeat the runs of docs/benchmarks")
    args = parser.parse_args()
    part = "validation" if args.validation else "test"
    (args.out / part).mkdir(parents=True, exist_ok=True)
    if args.gpu_cost:
        measure_gpu_cost(args.out)
        return
    names = [args.only] if args.only else list(SPLITS)
    for name in names:
        prepare(name, args.data, args.out)
    kept = read_runs(DOCS / RUNS, MADE_WITH) if args.resume and not args.validation else None
    done_before = set() if kept is None else set(kept[RUN].itertuples(index=False, name=None))
    wanted = [run for run in runs(SEEDS) if run.data in names and astuple(run) not in done_before]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(one_run, run, args.out, part) for run in wanted]
        for number, future in enumerate(done, 1):
            print(f"{number}/{len(wanted)} {future.result()}", flush=True)
    if not args.validation:
        if not (args.out / "cost.json").exists():
            measure_cost(args.out)
        page(args.out, kept)


def page(out: Path, kept: pd.DataFrame | None = None) -> None:
    """Write what the runs show, together with those that were kept."""
    write(
        out, DOCS, kept,
        settings={
            "n_labelled": N_LABELLED, "n_steps": N_STEPS, "control": CONTROL, "students": STUDENTS, "arms": [TUNED, *KD],
            "names": {TUNED: "no distillation, threshold tuned", **{arm: arm.replace("kd", "distilled", 1) for arm in KD}}, "batch_size": SETTINGS["batch_size"],
            "patch_px": PATCH,
        },
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
