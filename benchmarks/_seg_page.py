"""Page, figures and pictures of the segmentation benchmark, from the files of its runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _runs import keep_runs
from _seg_data import load_split

import histoniche as hn
from histoniche import seg

if TYPE_CHECKING:
    from pathlib import Path

METRICS = ("dice", "boundary_f", "ap50", "hausdorff95")
RUN = ["data", "arm", "student", "n_labelled", "n_steps", "seed"]
"""What tells runs apart."""
RUNS = "seg_cross_modal/runs.csv"
_NAMES = {"bbbc038": "BBBC038", "pancreas": "Xenium pancreas"}
_UNITS = {"bbbc038": "px", "pancreas": "um"}


def load_runs(out: Path, part: str) -> pd.DataFrame:
    """One row a run."""
    runs = [{"device": "CPU", **json.loads(path.read_text())} for path in sorted((out / part).glob("*.json"))]
    return pd.DataFrame(runs)


def summary(runs: pd.DataFrame, teachers: dict[str, dict[str, dict[str, float]]]) -> pd.DataFrame:
    """Mean, SD and number of seeds of every arm, gap closed and ratio to the teacher.

    The gap is that between no distillation and the teacher for the same student, labels and steps, of the means.
    """
    keys = ["data", "student", "n_labelled", "n_steps", "arm"]
    table = runs.groupby(keys)[list(METRICS)].agg(["mean", "std"])
    table.columns = [name if kind == "mean" else f"{name}.sd" for name, kind in table.columns]
    table["seeds"] = runs.groupby(keys).size()
    table = table.reset_index()
    baseline = table[table["arm"] == "no_kd"].set_index(keys[:-1])
    for row, entry in table.iterrows():
        teacher = teachers[entry["data"]]["teacher"]
        without = tuple(entry[key] for key in keys[:-1])
        table.loc[row, "ratio"] = entry["dice"] / teacher["dice"]
        if without in baseline.index:
            start = baseline.loc[without]
            gap = teacher["dice"] - start["dice"]  # no gap to close where the teacher is no better
            table.loc[row, "gap_closed"] = (entry["dice"] - start["dice"]) / gap if gap > 0 else np.nan
            table.loc[row, "gain_dice"] = entry["dice"] - start["dice"]
            table.loc[row, "gain_ap50"] = entry["ap50"] - start["ap50"]
    return table


def flat(table: pd.DataFrame, teachers: dict, *, n_labelled: int, n_steps: int) -> dict[str, float]:
    """Figures under flat names."""
    figures: dict[str, float] = {}
    for data, reached in teachers.items():
        main = table[(table["data"] == data) & (table["n_labelled"] == n_labelled) & (table["n_steps"] == n_steps)]
        for student in main["student"].unique():
            for metric in METRICS:
                figures[f"{data}.{student}.teacher.{metric}"] = reached["teacher"][metric]
        for _, entry in main.iterrows():
            arm = entry["arm"].replace(", ", "-").replace(" ", "_")
            place = f"{data}.{entry['student']}.{arm}"
            for metric in METRICS:
                figures[f"{place}.{metric}"] = entry[metric]
                figures[f"{place}.{metric}.sd"] = entry[f"{metric}.sd"]
            figures[f"{place}.seeds"] = int(entry["seeds"])
            if arm == "kd":
                figures[f"{place}.gap_closed"] = entry["gap_closed"]
                figures[f"{place}.ratio_to_teacher"] = entry["ratio"]
        best = main[main["arm"] == "kd"]
        best = best[best["seeds"] == best["seeds"].max()]  # a single draw of labels may flatter
        others = table[
            (table["data"] == data) & (table["n_labelled"] == n_labelled) & table["arm"].str.startswith("no_kd")
        ]
        for _, entry in best.iterrows():
            rivals = others[(others["student"] == entry["student"]) & (others["seeds"] >= entry["seeds"])]
            if rivals["n_steps"].nunique() < 2:
                continue  # one schedule is no best one: some baselines overfit with steps
            start = rivals["dice"].max()
            closed = (entry["dice"] - start) / (reached["teacher"]["dice"] - start)
            figures[f"{data}.{entry['student']}.kd.gap_closed_best_baseline"] = closed
            name = f"{data}.best.gap_closed"
            figures[name] = max(closed, figures.get(name, -np.inf))
    return {name: round(float(value), 4) for name, value in figures.items() if np.isfinite(value)}


def _cell(entry: pd.Series, metric: str) -> str:
    sd = entry[f"{metric}.sd"]
    scale = 1 if metric == "hausdorff95" else 3
    return f"{entry[metric]:.{scale}f}" + (f" ± {sd:.{scale}f}" if np.isfinite(sd) else "")


def rows(table: pd.DataFrame, labels: list[str], columns: tuple[str, ...] = METRICS) -> list[str]:
    """Rows of a Markdown table, each beginning with the named columns."""
    lines = []
    for _, entry in table.iterrows():
        cells = [str(entry[name]) for name in labels] + [_cell(entry, metric) for metric in columns]
        if entry["arm"].startswith("no_kd"):
            cells += ["", ""]
        else:
            gap = entry.get("gap_closed", np.nan)
            cells += [f"{gap:.0%}" if np.isfinite(gap) else "no gap", f"{entry['ratio']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(out: Path, folder: Path, *, student: str, n_labelled: int, n_steps: int) -> None:
    """Pictures of held-out fields: teacher, student without and with distillation, truth."""
    for data in _NAMES:
        students = {
            title: out / "test" / f"{data}.{student}.{arm}.{n_labelled}.{n_steps}.0.npz"
            for arm, title in (("no_kd", "no distillation"), ("kd", "student"))
        }
        if not all(path.exists() for path in (out / data / "teacher_test.npz", *students.values())):
            continue  # made elsewhere: the picture in the docs stays
        split = load_split(out / data)
        with np.load(out / data / "teacher_test.npz", allow_pickle=False) as arrays:
            maps = arrays["arr_0"][:2].astype(np.float32)
        shown = {"teacher": [seg.instances(found) for found in maps]}
        for title, path in students.items():
            with np.load(path, allow_pickle=False) as arrays:
                shown[title] = [arrays[f"arr_{i}"] for i in range(2)]
        figure = hn.pl.segmentation(
            split.held_out["test"][:2], segmentations=shown, channels=[split.channel], differences="student"
        )
        figure.savefig(folder / f"{data}.jpg", dpi=110)


def write(out: Path, docs: Path, kept: pd.DataFrame | None, *, settings: dict[str, Any]) -> None:
    """Write page, figures and pictures of the runs that are there."""
    teachers = {data: json.loads((out / data / "teacher.json").read_text()) for data in _NAMES}
    table = summary(keep_runs(pd.concat([load_runs(out, "test"), kept]), docs / RUNS, RUN), teachers)
    n_labelled, n_steps, control = settings["n_labelled"], settings["n_steps"], settings["control"]
    figures = flat(table, teachers, n_labelled=n_labelled, n_steps=n_steps)
    cost, gpu_cost = (
        json.loads((out / name).read_text()) if (out / name).exists() else {} for name in ("cost.json", "cost_gpu.json")
    )
    device = gpu_cost.pop("cost_gpu.device", "")
    (docs / "seg_cross_modal.json").write_text(json.dumps({**figures, **cost, **gpu_cost}, indent=1) + "\n")
    draw(out, docs / "seg_cross_modal", student=control, n_labelled=n_labelled, n_steps=n_steps)
    lines = [*_head(out, settings)]
    for data, name in _NAMES.items():
        lines += _section(data, name, table, teachers[data], settings)
    lines += [*_cost(cost), *_gpu_cost(gpu_cost, device)]
    (docs / "seg_cross_modal.md").write_text("\n".join(lines) + "\n")


def _head(out: Path, settings: dict[str, Any]) -> list[str]:
    fields = {data: json.loads((out / data / "split.json").read_text()) for data in _NAMES}
    counts = {data: {part: len(about[part]) for part in ("transfer", "test")} for data, about in fields.items()}
    return [
        "# Segmentation: one channel taught by more",
        "",
        "A frozen teacher segments images with all that it can see; a student sees the nuclear channel alone. Does it learn more from",
        "the teacher's maps of unlabelled patches than from a few labelled patches alone? Made by",
        "",
        "```bash",
        "python benchmarks/seg_cross_modal.py DATA --out RUNS --jobs 2",
        "```",
        "",
        "and gone on with elsewhere by `--resume`: every run's figures are kept in `seg_cross_modal/runs.csv`. The GPU's cost is measured with `--gpu-cost`.",
        "",
        "How to read it. Every arm of a table has the same student, started from random weights (ImageNet's can be had offline for EfficientNet-Lite0 alone, which has them),",
        f"the same {settings['n_steps']} steps of {settings['batch_size']} patches of {settings['patch_px']} px, augmentation and learning rate (0.004, of 0.002 to 0.006 looked",
        "at on fluorescence images of BBBC038 outside the test images; 0.0005 for Swin-Tiny and 0.002 for EfficientNet-Lite0, not tuned). *No distillation* learns "
        f"{settings['n_labelled']} labelled patches; *distilled* learns the teacher's maps of all transfer patches",
        "and the same labelled patches. Foreground begins at the probability at which Dice is best on the run's own labelled patches for distilled students, at 0.5 for the",
        "others (`hn.seg.best_threshold`, which also asks that the gain over 0.5 exceeds its standard error; {doc}`../segmentation`). Figures are means over held-out images, then mean ± SD over seeds, each with labelled patches of its",
        "own; *no distillation, threshold tuned* decides as distilled students do. *Gap closed* is the gain in Dice over the gap between no distillation and the teacher, at equal steps; `best.gap_closed` in the figures counts from the",
        "baseline's best schedule and threshold instead, among students with the most seeds whose baseline has more than one. *Ratio* is Dice over the teacher's.",
        "HD95 counts an image in which nothing is found with its diagonal. What it all means is read in {doc}`seg_cross_modal_reading`.",
        "",
        f"- **BBBC038** (nuclei; fluorescence, bright-field and stained images, each as one channel in which nuclei are bright): {counts['bbbc038']['transfer']} transfer patches, {counts['bbbc038']['test']} test images (256 px), split by image. Transfer patches are one of each",
        "  image, taken anywhere; labelled ones have three objects or more. The teacher is LiteMedSAM as it comes, never trained on these images, on patches enlarged twice, asked by the box of every nucleus: an *oracle*, on",
        "  transfer patches too. Boxes are weak labels, so transfer patches are not unlabelled for the teacher, only for the student.",
        f"- **Xenium pancreas** (whole cells, the vendor's polygons): {counts['pancreas']['transfer']} transfer patches, {counts['pancreas']['test']} test fields (109 um), from separate parts of the section.",
        "  The teacher sees DAPI, boundary and 18S: LiteMedSAM's frozen image encoder with a decoder, which sees the stains too, trained on 128 labelled patches of a",
        "  third part, without prompts. The student sees DAPI. The part the teacher was tuned on holds neither transfer nor test patches.",
        "",
    ]


_HEADER = "| Dice | boundary F | AP50 | HD95 ({unit}) | gap closed | ratio |"


def _table(entries: pd.DataFrame, labels: dict[str, str], unit: str) -> list[str]:
    titles = " | ".join(labels.values())
    head = f"| {titles} " + _HEADER.format(unit=unit)
    return [head, "|" + " --- |" * (len(labels) + 6), *rows(entries, list(labels))]


def _section(
    data: str, name: str, table: pd.DataFrame, reached: dict[str, dict[str, float]], settings: dict[str, Any]
) -> list[str]:
    n, steps, control, unit = settings["n_labelled"], settings["n_steps"], settings["control"], _UNITS[data]
    mine = table[table["data"] == data].copy()
    order = {arm: i for i, arm in enumerate(["no_kd", *settings["arms"]])}
    mine["arm number"] = mine["arm"].map(order)
    mine = mine.sort_values(["n_steps", "n_labelled", "arm number"])
    mine["name"] = mine["arm"].map(lambda arm: "no distillation" if arm == "no_kd" else settings["names"][arm])
    main = mine[(mine["n_labelled"] == n) & (mine["n_steps"] == steps)]
    lines = [f"## {name}", ""]
    for label, figures in reached.items():
        values = ", ".join(
            f"{title} {figures[key]:.3f}"
            for key, title in (("dice", "Dice"), ("boundary_f", "boundary F"), ("ap50", "AP50"))
        )
        lines.append(f"{label.capitalize()}: {values}, HD95 {figures['hausdorff95']:.1f} {unit}.")
    ranks = {student: i for i, student in enumerate(settings["students"])}
    students = main[main["arm"].isin(["no_kd", "kd"])].sort_values(
        ["student", "arm number"], key=lambda c: c.map(ranks) if c.name == "student" else c
    )
    labels = {"student": "student", "name": "arm", "seeds": "seeds"}
    lines += ["", f"### Students, {n} labelled patches", "", *_table(students, labels, unit), ""]
    picture = f"seg_cross_modal/{data}.jpg"
    lines += [f"![Two held-out fields: teacher, {control} without and with distillation, truth]({picture})", ""]
    controls = main[main["student"] == control]
    if len(controls) > 2:
        lines += [
            f"### Ablations and controls ({control})",
            "",
            *_table(controls, {"name": "arm", "seeds": "seeds"}, unit),
            "",
        ]
    few = mine[(mine["student"] == control) & (mine["n_steps"] == steps) & mine["arm"].isin(["no_kd", "kd"])]
    if few["n_labelled"].nunique() > 1:
        lines += [f"### Number of labelled patches ({control})", ""]
        lines += [*_table(few, {"n_labelled": "labelled", "name": "arm", "seeds": "seeds"}, unit), ""]
    shown = ["no_kd", *settings["arms"][:1], "kd"]
    long = mine[(mine["student"] == control) & (mine["n_labelled"] == n) & mine["arm"].isin(shown)]
    if long["n_steps"].nunique() > 1:
        lines += [f"### Length of the schedule ({control})", ""]
        lines += [*_table(long, {"n_steps": "steps", "name": "arm", "seeds": "seeds"}, unit), ""]
    return lines


def _cost(cost: dict[str, float]) -> list[str]:
    if not cost:
        return []
    names = [key.split(".")[1] for key in cost if key.endswith(".parameters_m")]
    lines = [
        "## Cost", "",
        "One thread of a CPU, images of 256 px, all in one run. The teacher's figure is its image encoder alone: every box it is asked",
        "by costs as much again as a fraction of it.", "",
        "| model | parameters (M) | Mpx/s | Mpx/s, ONNX Runtime | times the teacher's encoder |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in names:
        onnx = cost.get(f"cost.{name}.onnx_mpx_s")
        lines.append(
            f"| {name} | {cost[f'cost.{name}.parameters_m']:.2f} | {cost[f'cost.{name}.mpx_s']:.3f} | "
            f"{'' if onnx is None else f'{onnx:.3f}'} | {cost[f'cost.{name}.mpx_s'] / cost['cost.teacher.mpx_s']:.1f} |"
        )
    box = cost["cost.teacher.s_per_box"]
    return [*lines, "", f"A box costs the teacher {box:.2f} s more.", ""]


def _gpu_cost(cost: dict[str, float], device: str) -> list[str]:
    if not cost:
        return []
    lines = [
        f"The same on one {device}, in mixed precision, from the array on the host to the maps on the host (the teacher's embedding stays on the device):",
        f"one image at a time, which leaves the GPU waiting for the host, and students in batches of {cost['cost_gpu.batch']}.", "",
        "| model | Mpx/s, one at a time | Mpx/s, batches | times the teacher's encoder |", "| --- | --- | --- | --- |",
        f"| teacher | {cost['cost_gpu.teacher.mpx_s']:.1f} |  | 1.0 |",
    ]  # fmt: skip
    for key, many in cost.items():
        if key.endswith(".batch_mpx_s"):
            name = key.split(".")[1]
            ratio = many / cost["cost_gpu.teacher.mpx_s"]
            lines.append(f"| {name} | {cost[f'cost_gpu.{name}.mpx_s']:.1f} | {many:.1f} | {ratio:.1f} |")
    return [*lines, ""]
