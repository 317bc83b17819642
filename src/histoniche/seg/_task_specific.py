"""Task-specific distillation: from a few labelled fields and a large teacher to a small student, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ._distill import distill, finetune
from ._fields import pixels_digest
from ._segmenter import Segmenter
from ._synthesize import synthesize
from .teachers import SemanticTeacher, tune
from .teachers._lora import finetune_lora

if TYPE_CHECKING:
    from ._fields import Field
    from .teachers import PromptedTeacher

T = TypeVar("T")
Options = Mapping[str, Any]

TASK_TERMS = ("probability", "boundary", "hidden")
"""Terms of the loss of the third stage."""


def task_specific_distill(
    labelled: Sequence[Field],
    *,
    teacher: PromptedTeacher,
    folder: str | Path,
    unlabelled: Sequence[Field] = (),
    held_out: Sequence[Field] = (),
    channel: str | Sequence[str] | None = None,
    student: str | Segmenter = "vit-tiny",
    pretrained: bool = True,
    n_synthetic: int = 1000,
    patch_px: int = 128,
    tuning: Options | None = None,
    adaptation: Options | None = None,
    synthesis: Options | None = None,
    distillation: Options | None = None,
    finetuning: Options | None = None,
    seed: int = 0,
) -> Segmenter:
    """Make a small student for a task of which few images are labelled.

    1. The teacher is adapted to the task with the labels (:func:`~histoniche.seg.teachers.tune`, then
       :func:`~histoniche.seg.finetune_lora`).
    2. A diffusion model of all images makes more of them (:func:`~histoniche.seg.synthesize`).
    3. The student learns the adapted teacher's maps and hidden layers on all of these (:func:`~histoniche.seg.distill`).
    4. The student is trained on the labels (:func:`~histoniche.seg.finetune`).

    Every stage leaves its result in the folder, and an interrupted one its state; the same call goes on from there.

    Parameters
    ----------
    labelled
        Fields with labels.
    teacher
        A teacher of the SAM family; its prompts do not matter.
    folder
        Where the stages are kept: ``tuned``, ``teacher``, ``synthetic``, ``outputs``, ``distilled``, ``student``.
    unlabelled
        More fields of the task; their labels are not read.
    held_out
        Fields that will be measured on. None of their images may be among the others.
    channel
        Channel that the student sees, or several; may be left out where fields have one.
    student
        A name of :func:`histoniche.seg.list_students`, any timm encoder, or a student to start from.
    pretrained
        Whether the student's encoder starts from ImageNet weights.
    n_synthetic
        Synthetic images, 0 to 3000.
    patch_px
        Width of the patches, and of synthetic images, in px.
    tuning, adaptation, synthesis, distillation, finetuning
        Further arguments of the stages' functions, such as ``{"n_steps": 500}``; ``adaptation={"n_steps": 0}`` leaves LoRA
        out, so that only a new decoder is trained.
    seed
        Decides all that is random.

    Returns
    -------
    The student, which also lies in ``folder / "student"``.

    Raises
    ------
    ValueError
        No labels; a held-out image among the others; a folder that belongs to another run; and what the stages refuse.

    References
    ----------
    Liang et al. 2025, arXiv 2503.06976.
    """
    labelled, unlabelled = list(labelled), list(unlabelled)
    if not labelled:
        msg = "task_specific_distill was given no labelled fields."
        raise ValueError(msg)
    check_disjoint([*labelled, *unlabelled], held_out)
    stages = Stages(Path(folder))
    adapted = adapt_teacher(
        labelled, teacher, stages, tuning=tuning, adaptation=adaptation, patch_px=patch_px, seed=seed
    )
    images = [item.without_labels() for item in [*labelled, *unlabelled]]
    synthetic = (
        synthesize(
            images, folder=stages.folder / "synthetic", **{
                "n_images": n_synthetic, "size_px": patch_px, "seed": seed, **(synthesis or {}),
            },
        )
        if n_synthetic
        else []
    )  # fmt: skip
    check_disjoint(synthetic, held_out)
    common = {"channel": channel, "patch_px": patch_px, "seed": seed}
    options = {**common, "student": student, "pretrained": pretrained, "terms": TASK_TERMS, **(distillation or {})}
    transfer = [*images, *synthetic]
    described = {"teacher": adapted.fingerprint, "fields": content_hashes(transfer), **_described(options)}
    distilled = stages.run(
        "distilled", described, Segmenter.load, Segmenter.save,
        lambda state: distill(transfer, teacher=adapted, cache=stages.folder / "outputs", checkpoint=state, **options),
    )  # fmt: skip
    options = {**common, **(finetuning or {})}
    described = {"student": distilled.digest, "fields": content_hashes(labelled, labels=True), **_described(options)}
    return stages.run(
        "student", described, Segmenter.load, Segmenter.save,
        lambda state: finetune(labelled, student=distilled, checkpoint=state, **options),
    )  # fmt: skip


def adapt_teacher(
    labelled: Sequence[Field],
    teacher: PromptedTeacher,
    stages: Stages,
    *,
    tuning: Options | None,
    adaptation: Options | None,
    patch_px: int,
    seed: int,
) -> SemanticTeacher:
    """First stage: a decoder over the frozen encoder, which costs little, then both together."""
    fields = {"teacher": teacher.fingerprint, "fields": content_hashes(labelled, labels=True)}
    options = {"patch_px": patch_px, "seed": seed, **(tuning or {})}
    tuned = stages.run(
        "tuned", {**fields, **_described(options)}, lambda path: SemanticTeacher.load(path, teacher=teacher),
        SemanticTeacher.save, lambda _: tune(labelled, teacher=teacher, **options),
    )  # fmt: skip
    options = {"patch_px": patch_px, "seed": seed, **(adaptation or {})}
    if options.get("n_steps") == 0:
        return tuned
    return stages.run(
        "teacher", {**fields, "tuned": tuned.fingerprint, **_described(options)},
        lambda path: SemanticTeacher.load(path, teacher=teacher), SemanticTeacher.save,
        lambda state: finetune_lora(labelled, teacher=tuned, checkpoint=state, **options),
    )  # fmt: skip


class Stages:
    """A folder with the results of stages, each beside a record of what it was made of.

    Parameters
    ----------
    folder
        The folder, made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            msg = f"folder={str(folder)!r} is a file; a folder is needed."
            raise NotADirectoryError(msg)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        name: str,
        made_of: Options,
        load: Callable[[Path], T],
        save: Callable[[T, Path], None],
        make: Callable[[Path], T],
    ) -> T:
        """Take a stage's result from the folder, or make it and put it there.

        Parameters
        ----------
        name
            Name of the stage and its directory.
        made_of
            Inputs and settings, which JSON can hold; a result made of others is refused.
        load, save
            Read it from a directory, and write it to one.
        make
            Makes it; takes the file for its state while it is made.
        """
        path, record = self.folder / name, self.folder / f"{name}.json"
        wanted = json.loads(json.dumps(dict(made_of), default=str))
        if record.exists():
            found = json.loads(record.read_text(encoding="utf-8"))
            differs = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            if differs:
                key = differs[0]
                msg = (
                    f"{str(path)!r} was made with {key}={_short(found.get(key))}, not {_short(wanted.get(key))}: choose "
                    "another folder, or delete this stage and those that follow it."
                )
                raise ValueError(msg)
            if path.exists():
                return load(path)
        beside = record.with_suffix(".part")
        beside.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        beside.replace(record)  # before the work, so that a state left by other settings is named, not met
        result = make(self.folder / f"{name}.state")
        save(result, path)
        return result


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _described(options: Options) -> dict[str, Any]:
    """Options that JSON can hold: students and weights by what identifies them."""
    return {
        name: value.digest if isinstance(value, Segmenter) else [item.name for item in value] if name == "validation" else value
        for name, value in options.items()
        if name not in {"checkpoint", "checkpoint_every", "cache"}
    }  # fmt: skip


def content_hashes(fields: Sequence[Field], *, labels: bool = False) -> list[str]:
    """Hash of each field's pixels, whatever its name and type: 16 hexadecimal digits of a SHA-256.

    Parameters
    ----------
    fields
        Fields.
    labels
        Whether the labels count too, by 16 digits more.
    """
    return [
        pixels_digest(np.asarray(item.image, dtype=np.float32))[:16]
        + (pixels_digest(item.read_labels())[:16] if labels else "")
        for item in fields
    ]


def check_disjoint(fields: Sequence[Field], held_out: Sequence[Field]) -> None:
    """Refuse fields whose pixels are those of a held-out one, whatever their names."""
    forbidden = dict(zip(content_hashes(held_out), held_out, strict=True))
    for item, sha in zip(fields, content_hashes(fields) if forbidden else [], strict=bool(forbidden)):
        if sha in forbidden:
            msg = (
                f"Field {item.name!r} has the pixels of the held-out field {forbidden[sha].name!r}: leave it out, or what is "
                "measured is no evidence."
            )
            raise ValueError(msg)
