"""Ways to make the same student with few labels, compared: the grid of ways, numbers of labels and seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from histoniche._settings import settings

from . import metrics
from ._distill import distill, finetune
from ._identity import check_disjoint, fields_in, fingerprints
from ._pretrain import pretrain
from ._segmenter import Segmenter
from ._stages import Stages
from ._start import check_fields
from ._task_specific import FOURTH_STAGE, THIRD_STAGE, adapt_teacher, check_options
from .teachers import tune
from .teachers._lora import finetune_lora

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._fields import Field
    from ._task_specific import Options
    from .teachers import PromptedTeacher

ARMS = ("scratch", "imagenet", "mae", "mocov3", "task_agnostic_kd", "ts_kd")
"""Ways to start a student before it is trained on the labels."""
_PRETRAINING = {"n_steps": 1000, "batch_size": 8}
"""The same for all ways, whose functions have defaults of their own."""
_SHARED = {"channel", "patch_px", "student", "pretrained", "weights", "seed"}
"""What makes ways comparable, or is what they differ in."""
_DEFAULT_ARMS = tuple(arm for arm in ARMS if arm != "imagenet")


def compare(
    fields: Sequence[Field],
    *,
    test: Sequence[Field],
    teacher: PromptedTeacher,
    folder: str | Path,
    synthetic: Sequence[Field] = (),
    arms: Sequence[str] = _DEFAULT_ARMS,
    n_labelled: Sequence[int] = (4, 16),
    seeds: Sequence[int] = (0, 1, 2),
    channel: str | Sequence[str] | None = None,
    student: str = "vit-tiny",
    patch_px: int = 128,
    tuning: Options | None = None,
    adaptation: Options | None = None,
    pretraining: Options | None = None,
    finetuning: Options | None = None,
    finetuning_of: Mapping[str, Options] | None = None,
) -> pd.DataFrame:
    """Compare task-specific distillation with what else could make the same student.

    Every way ends with the same training on the same labels (:func:`~histoniche.seg.finetune`), but for what
    ``finetuning_of`` says, and all that pretrain do so for equally many steps of equally large batches on the same images:
    ``"scratch"`` starts from random weights,
    ``"imagenet"`` from those of ImageNet (MAE's own, where the student is ``"vit_base_patch16_224.mae"`` of timm),
    ``"mae"`` and ``"mocov3"`` from :func:`~histoniche.seg.pretrain`,
    ``"task_agnostic_kd"`` from the hidden layers of the untouched teacher, and ``"ts_kd"`` from maps and hidden layers of
    the teacher that was adapted with the labels.

    Parameters
    ----------
    fields
        Fields with labels to train on. A run draws its labelled fields from them; of the others, only the images are used.
    test
        Fields with labels to measure on; their images must not be among the others. Outside a field's ``region`` nothing
        is measured.
    teacher
        A teacher of the SAM family.
    folder
        Where each run is kept, so that an interrupted comparison goes on.
    synthetic
        Further images without labels, of :func:`~histoniche.seg.synthesize`.
    arms
        Ways to compare.
    n_labelled
        Numbers of labelled fields.
    seeds
        Seeds: of the labelled fields drawn, the weights, the patches.
    channel, student, patch_px
        The student, the same everywhere.
    tuning, adaptation
        Further arguments of :func:`~histoniche.seg.teachers.tune` and :func:`~histoniche.seg.finetune_lora`.
    pretraining, finetuning
        Further arguments of the two trainings, the same for all ways: those that :func:`~histoniche.seg.distill` and
        :func:`~histoniche.seg.pretrain` share, and ``n_views``; and those of :func:`~histoniche.seg.finetune`. By default
        1000 steps of 8 patches each; ``"ts_kd"`` ends as :func:`task_specific_distill` does.
    finetuning_of
        Arguments of the last training for single ways, over those of ``finetuning``, such as ``{"scratch": {"lr": 1e-3}}``: a
        student that has learnt before may want a lower rate than one of random weights.

    Returns
    -------
    One row a run: ``arm``, ``n_labelled``, ``seed``, and means over the test fields of ``dice`` and ``hausdorff95`` (um, or px
    where um/px is unknown), and the share of fields ``missed``.

    Raises
    ------
    ValueError
        No fields or test fields, fields without labels of two classes, an unknown way or option, more labels than fields, a
        test image among the others, a folder that belongs to another comparison.
    """
    fields, test = list(fields), list(test)
    of_arms = {arm: dict(options) for arm, options in (finetuning_of or {}).items()}
    unknown = [arm for arm in [*arms, *of_arms] if arm not in ARMS]
    if unknown or not arms or not fields or not test:
        msg = (
            f"compare was given {len(fields)} fields, {len(test)} test fields, arms={list(arms)}, finetuning_of={list(of_arms)}: at "
            f"least one of the first three, and arms of {list(ARMS)}, are needed."
        )
        raise ValueError(msg)
    if not len(n_labelled) or not 1 <= min(n_labelled) <= max(n_labelled) <= len(fields) or not len(seeds):
        msg = (
            f"n_labelled={list(n_labelled)} must lie between 1 and the number of fields, {len(fields)}; seeds={list(seeds)}: at "
            "least one is needed."
        )
        raise ValueError(msg)
    check_options(
        {"tuning": (tune, tuning), "adaptation": (finetune_lora, adaptation), "finetuning": (finetune, finetuning)}
    )
    check_options({f"finetuning_of[{arm!r}]": (finetune, options) for arm, options in of_arms.items()})
    check_options({"pretraining": (distill, pretraining)})
    for name, options in {"pretraining": pretraining, "finetuning": finetuning, **of_arms}.items():
        shared = sorted(_SHARED & set(options or {}))
        if shared:
            msg = f"{name} has the option {shared[0]!r}, which is the same for all ways: give it to compare itself, where it has it."
            raise ValueError(msg)
    check_options({"pretraining": (pretrain, {k: v for k, v in (pretraining or {}).items() if k != "n_views"})})
    check_fields([*fields, *synthetic], [], [], channel, patch_px=patch_px, n_steps=1, batch_size=2)
    check_fields([], fields, test, channel, patch_px=patch_px, n_steps=1, batch_size=2)
    among_options = [
        item for options in (pretraining, finetuning, *of_arms.values()) for item in fields_in(options or {})
    ]
    check_disjoint([*fields, *synthetic, *among_options], test)
    grid = _Grid(
        fields, [*(item.without_labels() for item in fields), *synthetic], test, teacher, Path(folder),
        {"channel": channel, "patch_px": patch_px}, student, tuning, adaptation, {**_PRETRAINING, **(pretraining or {})},
        dict(finetuning or {}), of_arms,
    )  # fmt: skip
    runs = [(arm, n, seed) for seed in seeds for n in n_labelled for arm in arms]
    return pd.DataFrame([grid.run(*run) for run in tqdm(runs, desc="compare", disable=not settings.progress)])


def drawn(fields: Sequence[Field], n: int, seed: int) -> list[Field]:
    """Labelled fields of a run: those of few labels are among those of many."""
    return [fields[row] for row in np.random.default_rng([seed, 11]).permutation(len(fields))[:n]]


def measure_mask(student: Segmenter, fields: Sequence[Field]) -> dict[str, float]:
    """Mean Dice and Hausdorff 95 of the foreground, and the share of fields in which none is found.

    Parameters
    ----------
    student
        The student.
    fields
        Fields with labels; what lies outside their region does not count.
    """
    rows = []
    for item in fields:
        found = student.predict_field(item)[0] > student.config.threshold
        truth = item.read_labels() > 0
        if item.region is not None:
            region = np.asarray(item.region)
            found, truth = found & region, truth & region
        rows.append({
            "dice": metrics.dice(found, truth),
            "hausdorff95": metrics.hausdorff95(found, truth, um_per_px=item.um_per_px or 1.0),
            "missed": float(truth.any() and not found.any()),
        })  # fmt: skip
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@dataclass
class _Grid:
    """What all runs share; each run is a file, each pretraining a directory that several runs may use."""

    fields: list[Field]
    transfer: list[Field]
    test: list[Field]
    teacher: PromptedTeacher
    folder: Path
    common: dict[str, Any]
    student: str
    tuning: Options | None
    adaptation: Options | None
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    finetuning_of: dict[str, dict[str, Any]]

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """What every pretraining is made of."""
        return {
            "transfer": fingerprints(self.transfer), "teacher": self.teacher.fingerprint, "student": self.student,
            **self.common, **self.pretraining,
        }  # fmt: skip

    def run(self, arm: str, n_labelled: int, seed: int) -> dict[str, Any]:
        """Train a student and measure it."""
        labelled = drawn(self.fields, n_labelled, seed)
        stages = Stages(self.folder / f"{arm}-{n_labelled}-{seed}")
        options = {**self.common, "seed": seed, **(FOURTH_STAGE if arm == "ts_kd" else {})}
        options |= {**self.finetuning, **self.finetuning_of.get(arm, {})}
        made_of = {
            **self.made_of, "labelled": fingerprints(labelled), "tuning": self.tuning,
            "adaptation": self.adaptation, "finetuning": options,
        }  # fmt: skip
        trained = stages.run(
            "student", made_of, Segmenter.load, Segmenter.save,
            lambda state: finetune(labelled, student=self._start(arm, labelled, seed), checkpoint=state, **options)
            if arm not in {"scratch", "imagenet"}
            else finetune(labelled, student=self.student, pretrained=arm == "imagenet", checkpoint=state, **options),
        )  # fmt: skip
        measured = self._measured(trained, stages.folder / "measured.json")
        return {"arm": arm, "n_labelled": n_labelled, "seed": seed, **measured}

    def _measured(self, student: Segmenter, path: Path) -> dict[str, float]:
        key = {"student": student.digest, "test": fingerprints(self.test)}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["made of"] == key:
                return dict(kept["figures"])
        figures = measure_mask(student, self.test)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps({"made of": key, "figures": figures}, indent=1), encoding="utf-8")
        beside.replace(path)
        return figures

    def _start(self, arm: str, labelled: list[Field], seed: int) -> Segmenter:
        """Student before it is trained on the labels."""
        options = {**self.common, "student": self.student, "pretrained": False, "seed": seed, **self.pretraining}
        if arm == "ts_kd":
            stages = Stages(self.folder / f"ts_kd-{len(labelled)}-{seed}")
            teacher = adapt_teacher(
                labelled, self.teacher, stages, tuning=self.tuning, adaptation=self.adaptation,
                patch_px=self.common["patch_px"], seed=seed,
            )  # fmt: skip
            return stages.run(
                "distilled", {**self.made_of, **THIRD_STAGE, "teacher": teacher.fingerprint}, Segmenter.load, Segmenter.save,
                lambda state: distill(
                    self.transfer, teacher=teacher, checkpoint=state, cache=self.folder / "outputs",
                    **{**THIRD_STAGE, **options},
                ),
            )  # fmt: skip
        stages = Stages(self.folder / f"{arm}-{seed}")  # labels have no part in it
        if arm == "task_agnostic_kd":
            return stages.run(
                "pretrained", self.made_of, Segmenter.load, Segmenter.save,
                lambda state: distill(
                    self.transfer, teacher=self.teacher, terms=("hidden",), checkpoint=state,
                    cache=self.folder / "outputs", **options,
                ),
            )  # fmt: skip
        options.pop("n_views", None)
        return stages.run(
            "pretrained", self.made_of, Segmenter.load, Segmenter.save,
            lambda state: pretrain(self.transfer, method=arm, checkpoint=state, **options),
        )  # fmt: skip
