"""Page, figures and picture of the task-specific distillation benchmark."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd
from _runs import keep_runs

import histoniche as hn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = {
    "chase_db1": "CHASE-DB1: retinal vessels, split by child",
    "bbbc038": "BBBC038: nuclei, split by image",
    "pancreas_ducts": "Xenium pancreas: ductal epithelium on VIRTUAL H&E, split by region",
}
ARMS = {
    "scratch": "scratch", "mae": "MAE", "mocov3": "MoCo v3", "task_agnostic_kd": "task-agnostic KD", "ts_kd": "TS-KD",
}  # fmt: skip
_FLAT = {"mocov3": "moco", "hausdorff95": "hd95"}


RUN = ["task", "n_labelled", "arm", "seed"]
MADE = [*RUN, "device"]


def without_stale(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs but for those of earlier settings that were made again."""
    return runs[runs["current"] | ~runs.groupby(RUN)["current"].transform("any")]


def on_one_device(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of each task and number of labels the runs of one device; and all others.

    It is the device with the most ways, then the most runs of them, then of all.
    """
    count = runs.groupby([*RUN[:2], "device"])["arm"].agg(["nunique", "size"]).reset_index()
    count["total"] = count["device"].map(runs["device"].value_counts())
    best = count.sort_values(["nunique", "size", "total"], ascending=False).drop_duplicates(RUN[:2])
    shown = (
        runs.merge(best[[*RUN[:2], "device"]], how="left", on=[*RUN[:2], "device"], indicator=True)["_merge"] == "both"
    )
    return runs[shown.to_numpy()], runs[~shown.to_numpy()]


def complete(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of the numbers of labels for which there is one of every way."""
    ways = runs.groupby(["task", "n_labelled"])["arm"].transform("nunique")
    return runs[ways == len(ARMS)]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, SD and number of seeds of every way."""
    keys = ["task", "n_labelled", "arm"]
    table = runs.groupby(keys)[["dice", "hausdorff95", "missed"]].agg(["mean", "std"])
    table.columns = [name if kind == "mean" else f"{name}.sd" for name, kind in table.columns]
    table["seeds"] = runs.groupby(keys).size()
    table["current"] = runs.groupby(keys)["current"].all()
    return table.reset_index()


def flat(table: pd.DataFrame) -> dict[str, float]:
    """Figures under flat names."""
    figures: dict[str, float] = {}
    for _, row in table.iterrows():
        place = f"{row['task']}.{row['n_labelled']}.{_FLAT.get(row['arm'], row['arm'])}"
        for metric in ("dice", "hausdorff95"):
            name = f"{place}.{_FLAT.get(metric, metric)}"
            figures[name] = round(float(row[metric]), 4)
            if row["seeds"] > 1:
                figures[f"{name}.sd"] = round(float(row[f"{metric}.sd"]), 4)
        figures[f"{place}.seeds"] = int(row["seeds"])
        if not row["current"]:
            figures[f"{place}.earlier_settings"] = 1
    return figures


def flat_cost(table: pd.DataFrame) -> dict[str, float]:
    """Cost of the stages under flat names."""
    return {
        f"cost{'' if 'CPU' in row['device'] else '_gpu'}.{row['stage'].replace(', ', '_').replace(' ', '_').lower()}.{name}": round(
            float(row[name]), 4
        )
        for _, row in table.iterrows()
        for name in ("s_step", "memory_gb")
    }


def _value(row: pd.Series, metric: str, digits: int) -> str:
    spread = f" ± {row[f'{metric}.sd']:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{row[metric]:.{digits}f}{spread}"


def _table(table: pd.DataFrame) -> list[str]:
    lines = ["| labelled | way | Dice | Hausdorff 95 | nothing found | seeds |", "|---|---|---|---|---|---|"]
    for n, rows in table.groupby("n_labelled"):
        for arm, name in ARMS.items():
            for _, row in rows[rows["arm"] == arm].iterrows():
                lines.append(
                    f"| {n} | {name}{'' if row['current'] else ' †'} | {_value(row, 'dice', 3)} | {_value(row, 'hausdorff95', 1)} | {row['missed']:.0%} | "
                    f"{row['seeds']} |"
                )
    return lines


def _repeats(runs: pd.DataFrame, again: pd.DataFrame) -> list[str]:
    """The same draws on two devices, ways side by side."""
    both = again.merge(runs, on=RUN, suffixes=("_again", ""))
    lines = [
        "## The same draws on another device", "", "Dice of each draw of labels; settings and seeds are the same, rounding is not.", "",
        "| task | labelled | seed | device | " + " | ".join(ARMS.values()) + " |", "|---" * (4 + len(ARMS)) + "|",
    ]  # fmt: skip
    for (task, n, seed), draws in both.groupby([*RUN[:2], RUN[3]]):
        devices = [("", draws["device"].iloc[0], draws.drop_duplicates("arm"))]
        devices += [("_again", device, rows) for device, rows in draws.groupby("device_again")]
        for end, device, rows in devices:
            dice = rows.set_index("arm")[f"dice{end}"]
            values = " | ".join(f"{dice[arm]:.3f}" if arm in dice else "" for arm in ARMS)
            lines.append(f"| {NAMES[task].split(':')[0]} | {n} | {seed} | {device} | {values} |")
    return [*lines, ""]


def _ablation(table: pd.DataFrame) -> list[str]:
    lines = [
        "## Ablations of TS-KD", "", "BBBC038, 4 labelled images, one seed. Rank 0 is no LoRA: only a decoder is trained.", "",
        "| rank of LoRA | its steps | unlabelled images | synthetic images | device | Dice | Hausdorff 95 | nothing found |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for _, row in table.iterrows():
        lines.append(
            f"| {row['rank']:.0f} | {row['lora_steps']:.0f} | {row['unlabelled']:.0f} | {row['synthetic']:.0f} | {row['device']} | {row['dice']:.3f} | {row['hausdorff95']:.1f} | "
            f"{row['missed']:.0%} |"
        )
    return [*lines, ""]


def _last_training(table: pd.DataFrame, varied: str, title: str, about: str) -> list[str]:
    """Dice by what was varied of the last training, a table for each task."""
    lines = [f"## {title}", "", about, ""]
    for task, rows in table.groupby("task"):
        values = sorted(rows[varied].unique())
        dice = rows.pivot_table(index="arm", columns=varied, values="dice").reindex(index=list(ARMS), columns=values)
        lines += [f"{NAMES[task]}:", "", "| way | " + " | ".join(f"{value:g}" for value in values) + " |"]
        lines.append("|---" * (len(values) + 1) + "|")
        for arm, name in ARMS.items():
            cells = " | ".join(f"{value:.3f}".replace("nan", "") for value in dice.loc[arm])
            lines.append(f"| {name} | {cells} |")
        lines.append("")
    return lines


def flat_schedules(table: pd.DataFrame) -> dict[str, float]:
    """Dice by length of the last training under flat names."""
    return {
        f"schedule.{row['task']}.{_FLAT.get(row['arm'], row['arm'])}.{row['n_steps']}.dice": round(
            float(row["dice"]), 4
        )
        for _, row in table.iterrows()
    }


def _cost(table: pd.DataFrame) -> list[str]:
    devices = list(dict.fromkeys(table["device"]))
    lines = [
        "## What a step costs", "", "Batches as above; *teacher* encodes one patch. Memory is the peak of the process, on a GPU of what torch had allocated.", "",
        "| stage | " + " | ".join(f"{device}: s a step | memory (GB)" for device in devices) + " |",
        "|---" * (1 + 2 * len(devices)) + "|",
    ]  # fmt: skip
    for stage, rows in table.groupby("stage", sort=False):
        by_device = rows.set_index("device").reindex(devices)
        cells = [f"{row['s_step']:.3f} | {row['memory_gb']:.1f}" for _, row in by_device.iterrows()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return [*lines, ""]


_SAME = {
    "ablation": ["rank", "unlabelled", "synthetic", "lora_steps", "device"], "schedules": ["task", "arm", "n_steps", "lr"],
    "rates": ["task", "arm", "n_steps", "lr"], "cost": ["stage", "device"],
}  # fmt: skip
"""What makes two rows of a table the same measurement."""


def _kept(name: str, table: pd.DataFrame | None, folder: Path, current: str) -> pd.DataFrame | None:
    """Keep a table in the docs; rows of earlier runs stay where they were not measured anew, with the same settings if they say which."""
    path = folder / f"{name}.csv"
    tables = [table] if table is not None else []
    tables += [pd.read_csv(path, dtype={"made_with": str})] if path.exists() else []
    if not tables:
        return None
    kept = pd.concat(tables, ignore_index=True).drop_duplicates(_SAME[name])
    if "made_with" in kept:
        kept = kept[kept["made_with"] == current]
    kept.round(6).to_csv(path, index=False)
    return kept if len(kept) else None


def write(
    runs: pd.DataFrame,
    docs: Path,
    page: str,
    *,
    settings: dict[str, Any],
    digest_of: Callable[[str, str], str],
    **tables: pd.DataFrame | None,
) -> None:
    """Write page, figures and pictures from whatever runs and tables (ablation, schedules, rates, cost) there are."""
    folder = docs / page
    folder.mkdir(exist_ok=True)
    runs = runs.assign(current=[row.made_with == digest_of(row.task, row.arm) for row in runs.itertuples()])
    kept = keep_runs(without_stale(runs).drop(columns="current"), folder / "runs.csv", MADE)
    kept = kept.assign(current=[row.made_with == digest_of(row.task, row.arm) for row in kept.itertuples()])
    runs, again = on_one_device(kept)
    runs = complete(runs)
    ablated = digest_of("bbbc038", "ts_kd")
    ablation, schedules, rates, cost = (_kept(name, tables[name], folder, ablated) for name in _SAME)
    table = summary(runs)
    lines = [
        "# Task-specific distillation with few labels", "",
        f"Command: `python benchmarks/seg_ts_kd.py DATA --out RUNS --seeds 0 1 2 --every-number --jobs 16{' --large' if page.endswith('large') else ''}`; without the last three options, one draw "
        "of the fewest labels, for two cores. Student: ViT-Tiny under a light DPT, random weights at the start. Every way has "
        "the same labels, augmentation and last training, at a rate of its own; those that pretrain do so for equally many steps of equally large "
        "batches on the same images, each at the learning rate that its function has by default. Teacher: " + ("SAM" if page.endswith("large") else "LiteMedSAM") + ", for TS-KD adapted with the "
        "labels of the run (where adaptation has no steps: a new decoder, no LoRA). Mean ± SD over seeds, each of which draws labels, weights and "
        "patches; measured on held-out fields, Hausdorff 95 in px, or um where um/px is known. Runs by device: "
        + ", ".join(f"{device} {n}" for device, n in runs["device"].value_counts().items())
        + f" (float32 where nothing else is said). Numbers of labels that not every way was run with are left out; `{page}/runs.csv` has them."
        + ("" if table["current"].all() else " † made with earlier settings, of which the reading tells; not to be compared with those without."), "",
        "Settings: " + "; ".join(f"{stage} {options}" for stage, options in settings.items()) + ".", "",
        "How the runs came about, what they show and what they do not: {doc}`seg_ts_kd_reading`.", "",
    ]  # fmt: skip
    for task, rows in table.groupby("task"):
        picture = folder / f"{task}.png"
        hn.pl.label_efficiency(runs[runs["task"] == task], save=picture)
        lines += [f"## {NAMES[task]}", "", *_table(rows), "", f"![{task}]({page}/{picture.name})", ""]
    if len(again):
        lines += _repeats(runs, again)
    if ablation is not None:
        lines += _ablation(ablation)
    if schedules is not None:
        about = "Dice of the fewest labels, seed 0, by steps of the last training; the pretraining as above."
        lines += _last_training(schedules, "n_steps", "Length of the last training", about)
    if rates is not None:
        about = "Dice on *validation* fields of the fewest labels, seed 0, by learning rate: what each way's was chosen from."
        lines += _last_training(rates, "lr", "Rate of the last training", about)
    if cost is not None:
        lines += _cost(cost)
    (docs / f"{page}.md").write_text("\n".join(lines), encoding="utf-8")
    figures = flat(table)
    figures |= {} if schedules is None else flat_schedules(schedules)
    figures |= {} if cost is None else flat_cost(cost)
    (docs / f"{page}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
