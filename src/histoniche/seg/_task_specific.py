"""Task-specific distillation: from a few labelled fields and a large teacher to a small student, stage by stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._alignment import check_alignment
from ._distill import distill, finetune
from ._identity import check_disjoint, fields_in, fingerprints
from ._segmenter import Segmenter
from ._stages import Stages
from ._start import check_batches, check_fields, check_schedule, start_student
from ._synthesize import MOST_IMAGES, check_synthesis, synthesize
from .teachers import SemanticTeacher, tune
from .teachers._lora import check_lora, finetune_lora, target_layers

if TYPE_CHECKING:
    from ._fields import Field
    from .teachers import PromptedTeacher

Options = Mapping[str, Any]

_NOT_DESCRIBED = {"checkpoint", "checkpoint_every", "cache"}
_OURS = {"fields", "teacher", "folder", "checkpoint", "cache"}
"""Arguments of the stages' functions that are no options."""

THIRD_STAGE: Options = {"terms": ("probability", "boundary", "hidden"), "matching": "kl_dice"}
"""How the third stage teaches, unless it is told otherwise: structures of a task may be sparse and thin."""
FOURTH_STAGE: Options = {"lr": 3e-4}
"""At the rate of random weights a few labels undo what the teacher taught."""


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
    4. The student is trained on the labels (:func:`~histoniche.seg.finetune`), at a rate of 3e-4 unless ``finetuning`` says
       otherwise.

    Every stage leaves its result in the folder, and an interrupted one its state (but for the tuning of the decoder, which begins
    anew); the same call goes on from there. Fields, settings and the student's name are checked before the first stage.

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
        Fields that will be measured on. None of their images may be among the others, or among those of the options. A part
        of such an image is not recognised: split by image or region before cutting patches.
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
    check_options({
        "tuning": (tune, tuning), "adaptation": (finetune_lora, adaptation), "synthesis": (synthesize, synthesis),
        "distillation": (distill, distillation), "finetuning": (finetune, finetuning),
    })  # fmt: skip
    if not 0 <= n_synthetic <= MOST_IMAGES:
        msg = f"n_synthetic={n_synthetic} must be 0 to {MOST_IMAGES}."
        raise ValueError(msg)
    among_options = [item for options in (distillation, finetuning) for item in fields_in(options or {})]
    check_disjoint([*labelled, *unlabelled, *among_options], held_out)
    images = [item.without_labels() for item in [*labelled, *unlabelled]]
    channels = check_fields(images, labelled, [], channel, patch_px=patch_px, n_steps=1, batch_size=2)
    common = {"channel": channel, "patch_px": patch_px, "seed": seed}
    adapting = {"patch_px": patch_px, "seed": seed, **(adaptation or {})}
    making = {"n_images": n_synthetic, "size_px": patch_px, "seed": seed, **(synthesis or {})}
    teaching = {**common, "student": student, "pretrained": pretrained, **THIRD_STAGE, **(distillation or {})}
    ending = {**common, **FOURTH_STAGE, **(finetuning or {})}
    stages = Stages(Path(folder))
    if not (stages.folder / "distilled").exists():
        _check_stages(labelled, images, teacher, channels, adapting=adapting, making=making, teaching=teaching)
    _check_training(finetune, ending)
    adapted = adapt_teacher(
        labelled, teacher, stages, tuning=tuning, adaptation=adaptation, patch_px=patch_px, seed=seed
    )
    synthetic = synthesize(images, folder=stages.folder / "synthetic", **making) if n_synthetic else []
    check_disjoint(synthetic, held_out)
    transfer = [*images, *synthetic]
    described = {"teacher": adapted.fingerprint, "fields": fingerprints(transfer), **_described(teaching)}
    distilled = stages.run(
        "distilled", described, Segmenter.load, Segmenter.save,
        lambda state: distill(transfer, teacher=adapted, cache=stages.folder / "outputs", checkpoint=state, **teaching),
    )  # fmt: skip
    described = {"student": distilled.digest, "fields": fingerprints(labelled), **_described(ending)}
    return stages.run(
        "student", described, Segmenter.load, Segmenter.save,
        lambda state: finetune(labelled, student=distilled, checkpoint=state, **ending),
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
    fields = {"teacher": teacher.fingerprint, "fields": fingerprints(labelled)}
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


def _check_stages(
    labelled: Sequence[Field],
    images: Sequence[Field],
    teacher: PromptedTeacher,
    channels: list[str],
    *,
    adapting: Options,
    making: Options,
    teaching: Options,
) -> None:
    """Refuse at once what stages would refuse after those before them have run: settings, packages, weights, grids."""
    if adapting.get("n_steps") != 0:
        given = _with_defaults(finetune_lora, adapting)
        target_layers(teacher, given["targets"])
        check_lora(labelled, **_those_of(check_lora, given))
    if making["n_images"]:
        given = _with_defaults(synthesize, making)
        check_synthesis(images, **_those_of(synthesize, given, but=("folder", "width", "model")))
    given = _check_training(distill, teaching)
    student = start_student(
        given["student"], channels, images[0].um_per_px, pretrained=given["pretrained"], weights=given["weights"],
        seed=given["seed"],
    )  # fmt: skip
    if "hidden" in given["terms"]:
        check_alignment(student, teacher, layers=given["layers"], patch_px=given["patch_px"])


def _check_training(function: Callable[..., Any], options: Options) -> dict[str, Any]:
    """Refuse a schedule out of range; return all settings."""
    given = _with_defaults(function, options)
    check_batches(given["patch_px"], given["n_steps"], given["batch_size"])
    check_schedule(**_those_of(check_schedule, given))
    return given


def _those_of(function: Callable[..., Any], given: Options, but: Sequence[str] = ()) -> dict[str, Any]:
    """Settings that a function has, too."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in names and name not in but}


def _with_defaults(function: Callable[..., Any], options: Options) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **options}


def check_options(given: Mapping[str, tuple[Callable[..., Any], Options | None]]) -> None:
    """Refuse options that their function does not have, or that are not the caller's to set.

    Parameters
    ----------
    given
        By the name of the argument, the function and its options.
    """
    for argument, (function, options) in given.items():
        known = [name for name in inspect.signature(function).parameters if name not in _OURS]
        unknown = [name for name in options or {} if name not in known]
        if unknown:
            msg = f"{argument} has the option {unknown[0]!r}: those of {function.__name__} are {known}."
            raise ValueError(msg)


def _described(options: Options) -> dict[str, Any]:
    """Options that JSON can hold: students and weights by what identifies them, fields by what they hold."""

    def text(value: Any) -> Any:
        if isinstance(value, Segmenter):
            return value.digest
        fields = fields_in({"": value})
        return fingerprints(fields) if fields else value

    return {name: text(value) for name, value in options.items() if name not in _NOT_DESCRIBED}
