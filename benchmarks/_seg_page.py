"""Page, figures and pictures of the segmentation benchmark, from the files of its runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _seg_data import load_split

import histoniche as hn
from histoniche import seg

if TYPE_CHECKING:
    from pathlib import Path

METRICS = ("dice", "boundary_f", "ap50", "hausdorff95")
_NAMES = {"bbbc038": "BBBC038", "pancreas": "Xenium pancreas"}
_UNITS = {"bbbc038": "px", "pancreas": "um"}


def load_runs(out: Path, part: str) -> pd.DataFrame:
    """One row a run."""
    return pd.DataFrame([json.loads(path.read_text()) for path in sorted((out / part).glob("*.json"))])


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
            table.loc[row, "gap_closed"] = (entry["dice"] - start["dice"]) / (teacher["dice"] - start["dice"])
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
        if len(best):
            figures[f"{data}.best.gap_closed"] = float(best["gap_closed"].max())
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
        if entry["arm"] == "no_kd":
            cells += ["", ""]
        else:
            cells += [f"{entry.get('gap_closed', np.nan):.0%}", f"{entry['ratio']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(out: Path, folder: Path, *, student: str, n_labelled: int, n_steps: int) -> None:
    """Pictures of held-out fields: teacher, student without and with distillation, truth."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in _NAMES:
        if not (out / data / "teacher_test.npz").exists():
            continue
        split = load_split(out / data)
        with np.load(out / data / "teacher_test.npz", allow_pickle=False) as arrays:
            maps = arrays["arr_0"][:2].astype(np.float32)
        shown = {"teacher": [seg.instances(found) for found in maps]}
        for arm, title in (("no_kd", "no distillation"), ("kd", "student")):
            path = out / "test" / f"{data}.{student}.{arm}.{n_labelled}.{n_steps}.0.npz"
            with np.load(path, allow_pickle=False) as arrays:
                shown[title] = [arrays[f"arr_{i}"] for i in range(2)]
        figure = hn.pl.segmentation(
            split.held_out["test"][:2], segmentations=shown, channels=[split.channel], differences="student"
        )
        figure.savefig(folder / f"{data}.png", dpi=110)
