"""Distil a teacher into a student, or train a student on labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._alignment import align
from ._fit import EarlyStopping, Stacks, fit
from ._losses import DEFAULT_TERMS, DistillationLoss
from ._segmenter import Segmenter, SegmenterConfig
from ._start import check_fields, check_schedule, listed, middle, start_student
from ._threshold import best_threshold
from .teachers._cache import teach

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._fields import Field
    from ._fit import Alignment
    from ._losses import Matching
    from .teachers import Teacher


def distill(
    fields: Sequence[Field],
    *,
    teacher: Teacher,
    channel: str | Sequence[str] | None = None,
    labelled: Sequence[Field] = (),
    validation: Sequence[Field] = (),
    student: str | Segmenter = "resnet18",
    pretrained: bool = True,
    weights: str | Path | None = None,
    terms: Sequence[str] = DEFAULT_TERMS,
    uncertainty: bool = True,
    matching: Matching = "mse",
    hard: bool = False,
    layers: Mapping[int, str] | None = None,
    n_views: int = 4,
    n_steps: int = 1000,
    batch_size: int = 8,
    patch_px: int = 128,
    labelled_share: float = 0.25,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    patience: int = 5,
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
) -> Segmenter:
    """Distil a frozen teacher, which sees all its channels, into a small student that sees one.

    The teacher segments every field once; the student learns its maps from augmented patches, and, on fields with labels,
    the labels.

    Parameters
    ----------
    fields
        Fields that the teacher segments. Their labels are not learnt, but a teacher that is asked by the boxes of labelled
        objects reads them. They are kept in memory up to 2 GB in all, and beyond read anew for every patch: cut large ones into
        patches first (:func:`patches`).
    teacher
        The teacher.
    channel
        Channel that the student sees, or several in the order in which it sees them; may be left out where fields have
        one.
    labelled
        Fields whose labels are learnt besides, by the term ``"supervised"``; without that they only decide the threshold.
    validation
        Fields with labels on which the best step is chosen and training is stopped early (the middle of each that is wider
        than 1024 px). Without, the last step is taken.
    student
        A name of :func:`histoniche.seg.list_students`, any timm encoder, or a student to train on.
    pretrained, weights
        Whether the encoder starts from ImageNet weights, of the hub or of a local file.
    terms
        Terms of the loss: ``"probability"``, ``"boundary"``, ``"supervised"`` (used where there are labelled fields), and
        ``"hidden"``, the alignment of hidden layers. With ``"hidden"`` alone the teacher is not asked for maps: what any
        task could use is learnt, and a decoder is still to be trained (task-agnostic distillation).
    uncertainty
        Whether the terms' weights are learnt.
    matching
        How the maps are compared: ``"mse"``, ``"kl"`` or ``"kl_dice"``, by which sparse and thin structures are learnt sooner. See
        :class:`DistillationLoss`.
    hard
        Whether the teacher's maps are cut at 0.5 to pseudo-labels: a control.
    layers
        With ``"hidden"``: which of the student's layers are compared with which of the teacher's hidden features, such as
        ``{3: "block11"}``. Layers of a ViT student are blocks 2, 5, 8 and 11, those of a U-Net its three coarsest. By default
        all of them, with blocks of the teacher that are spread evenly.
    n_views
        With ``"hidden"``: patches of each field, turned and scaled, that the teacher sees, and from which the student learns.
        Otherwise the teacher sees whole fields, and patches are new in every step.
    n_steps, batch_size, patch_px, lr, weight_decay
        Schedule; patches of ``patch_px`` px, a multiple of 32.
    labelled_share
        Share of a batch drawn from labelled fields.
    patience
        Looks at the validation fields, one every 5 % of the steps, without improvement that end the training.
    cache
        Directory in which the teacher's maps are kept, and found again.
    checkpoint
        File in which the state is kept every ``checkpoint_every`` steps, and from which an interrupted training goes on.
        On a CPU the result is the same bit for bit. The file stays: delete it when the student is saved.
    checkpoint_every
        Steps.
    seed
        Decides all that is random.

    Returns
    -------
    The student. Its ``config.threshold`` is that of :func:`best_threshold` on the validation fields, else on the labelled
    ones (the middle of each that is wider than 1024 px); 0.5 without either.

    Raises
    ------
    KeyError
        A field without the channel.
    StudentAccessError
        The encoder's weights cannot be had.
    TypeError
        Fields that are none, a teacher that is none.
    ValueError
        No fields; fields of different um/px; images smaller than a patch; constant channels; labels of one class;
        settings out of range; a damaged cache or checkpoint; a teacher without hidden features, layers that one of the two
        does not have, or grids that do not match.

    References
    ----------
    Cross-modal distillation: arXiv 2606.00928; alignment of hidden layers: arXiv 2503.06976; uncertainty weights: Kendall et al. 2018, doi 10.1109/CVPR.2018.00781.
    """
    fields, labelled = listed(fields, "fields"), listed(labelled, "labelled")
    validation = listed(validation, "validation")
    if not fields:
        msg = "distill was given no fields: the teacher has nothing to segment."
        raise ValueError(msg)
    channels = check_fields(
        fields, labelled, validation, channel, patch_px=patch_px, n_steps=n_steps, batch_size=batch_size
    )
    check_schedule(
        lr=lr, weight_decay=weight_decay, patience=patience, checkpoint_every=checkpoint_every, seed=seed, n_views=n_views,
        labelled_share=labelled_share,
    )  # fmt: skip
    loss = DistillationLoss(_terms_with_targets(teacher, terms, labelled), uncertainty=uncertainty, matching=matching)
    segmenter = start_student(
        student, channels, fields[0].um_per_px, pretrained=pretrained, weights=weights, seed=seed,
        teacher={"name": teacher.name, "licence": teacher.licence},
    )  # fmt: skip
    segmenter.config.training = {
        **segmenter.config.training, "terms": list(loss.terms), "uncertainty weights": uncertainty, "matching": matching, "hard": hard,
        "fields": len(fields), "labelled fields": len(labelled), "steps": n_steps, "batch": batch_size, "patch px": patch_px, "seed": seed,
    }  # fmt: skip
    alignment: Alignment | None = None
    hidden: list[list[np.ndarray]] = []
    if "hidden" in loss.terms:
        fields, maps, hidden, alignment = align(
            segmenter, fields, teacher, layers=layers, maps=bool({"probability", "boundary"} & set(loss.terms)),
            n_views=n_views, patch_px=patch_px, cache=cache, seed=seed,
        )  # fmt: skip
    else:
        maps = teach(fields, teacher=teacher, cache=cache)
    if hard:
        maps = [(found > 0.5).astype(np.float32) for found in maps]
    judged = [*(validation or labelled)] if {"probability", "supervised"} & set(loss.terms) else []
    learnt = labelled if "supervised" in loss.terms and labelled_share > 0 else []
    return _run(
        segmenter, Stacks(channels, [*fields, *learnt], maps, hidden), loss, validation, n_steps=n_steps,
        batch_size=batch_size, patch_px=patch_px, labelled_share=labelled_share, lr=lr, weight_decay=weight_decay,
        patience=patience, checkpoint=checkpoint, checkpoint_every=checkpoint_every, seed=seed, description="distil",
        alignment=alignment, judged=judged,
    )  # fmt: skip


def _terms_with_targets(teacher: Teacher, terms: Sequence[str] | str, labelled: list[Field]) -> list[str]:
    """Terms for which there is something to learn; an error where there is none, or no teacher."""
    if not callable(teacher) or not hasattr(teacher, "name"):
        msg = f"teacher={teacher!r} is no teacher: pass one of hn.seg.teachers, such as CallableTeacher(function, ...)."
        raise TypeError(msg)
    terms = [terms] if isinstance(terms, str) else list(terms)
    used = [term for term in terms if term != "supervised" or labelled]
    if terms and not used:
        msg = f"terms={terms} learn from labelled fields alone, and labelled= has none: use finetune, or add terms of the teacher."
        raise ValueError(msg)
    return used


def finetune(
    fields: Sequence[Field],
    *,
    channel: str | Sequence[str] | None = None,
    validation: Sequence[Field] = (),
    student: str | Segmenter = "resnet18",
    pretrained: bool = True,
    weights: str | Path | None = None,
    n_steps: int = 1000,
    batch_size: int = 8,
    patch_px: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    patience: int = 5,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
) -> Segmenter:
    """Train a student on labels alone: the baseline of distillation, or its last stage.

    Parameters
    ----------
    fields
        Fields with labels; large ones are cut into patches first, as for :func:`distill`.
    channel
        Channel that the student sees, or several in the order in which it sees them; may be left out where fields have
        one.
    validation
        Fields with labels on which the best step is chosen and training is stopped early (the middle of each that is wider
        than 1024 px). Without, the last step is taken.
    student
        A name of :func:`histoniche.seg.list_students`, any timm encoder, or a student to train on.
    pretrained, weights
        Whether the encoder starts from ImageNet weights, of the hub or of a local file.
    n_steps, batch_size, patch_px, lr, weight_decay
        Schedule; patches of ``patch_px`` px, a multiple of 32.
    patience
        Looks at the validation fields without improvement that end the training.
    checkpoint, checkpoint_every
        File and steps of the state from which an interrupted training goes on. The file stays: delete it when the student is
        saved.
    seed
        Decides all that is random.

    Returns
    -------
    The student; a copy where one was given. Its ``config.threshold`` is that of :func:`best_threshold` on the validation fields,
    and 0.5 without them.

    Raises
    ------
    KeyError
        A field without the channel.
    StudentAccessError
        The encoder's weights cannot be had.
    TypeError
        Fields that are none.
    ValueError
        No fields, fields without labels or with labels of one class, fields of different um/px, images smaller than a
        patch, constant channels, settings out of range, a damaged checkpoint.
    """
    fields, validation = listed(fields, "fields"), listed(validation, "validation")
    if not fields:
        msg = "finetune was given no fields with labels."
        raise ValueError(msg)
    channels = check_fields([], fields, validation, channel, patch_px=patch_px, n_steps=n_steps, batch_size=batch_size)
    check_schedule(lr=lr, weight_decay=weight_decay, patience=patience, checkpoint_every=checkpoint_every, seed=seed)
    segmenter = start_student(student, channels, fields[0].um_per_px, pretrained=pretrained, weights=weights, seed=seed)
    segmenter.config.training = {
        **segmenter.config.training, "labelled fields": len(fields), "supervised steps": n_steps, "batch": batch_size,
        "patch px": patch_px, "seed": seed,
    }  # fmt: skip
    return _run(
        segmenter, Stacks(channels, fields, []), DistillationLoss(["supervised"], uncertainty=False), validation,
        n_steps=n_steps, batch_size=batch_size, patch_px=patch_px, labelled_share=1.0, lr=lr, weight_decay=weight_decay,
        patience=patience, checkpoint=checkpoint, checkpoint_every=checkpoint_every, seed=seed, description="finetune",
        judged=validation,
    )  # fmt: skip


def _run(
    segmenter: Segmenter,
    stacks: Stacks,
    loss: DistillationLoss,
    validation: Sequence[Field],
    *,
    judged: Sequence[Field],
    patience: int,
    checkpoint: str | Path | None,
    **settings: Any,
) -> Segmenter:
    """Train in place, and choose the threshold on the fields to be judged by."""
    stopping = None
    validation, judged = [[middle(item) for item in fields] for fields in (validation, judged)]
    if validation:
        every = max(1, settings["n_steps"] // 20)
        stopping = EarlyStopping(segmenter, Stacks(segmenter.config.channels, validation, []), every, patience)
    fit(
        segmenter, stacks, loss, stopping=stopping, checkpoint=None if checkpoint is None else Path(checkpoint),
        **settings,
    )  # fmt: skip
    segmenter.config.threshold = best_threshold(segmenter, judged) if judged else SegmenterConfig.threshold
    return segmenter
