"""Pretraining of a student's encoder on images alone: the baselines of task-specific distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from histoniche._random import isolated_rng
from histoniche.models._checkpoint import Checkpoint
from histoniche.models._training import epoch_batches, train

from ._augment import random_window, relit
from ._fit import Stacks
from ._mae import MAE, draw_vit, need_lightly
from ._moco import MoCo
from ._segmenter import Segmenter, SegmenterConfig
from ._start import check_fields, check_schedule, start_student

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ._fields import Field

_METHODS = {"mae": (1e-4, 0.05), "mocov3": (3e-4, 0.1)}
"""Learning rate and weight decay of each method, for the AdamW of small batches."""
_AREA, _ASPECT = (0.4, 1.0), (3 / 4, 4 / 3)
_EPOCH_BATCHES = 8
_WINDOW, _VIEW, _MASK = 5, 6, 7
"""Numbers that keep the draws of a place apart."""


def pretrain(
    fields: Sequence[Field],
    *,
    method: str = "mae",
    channel: str | Sequence[str] | None = None,
    student: str | Segmenter = "vit-tiny",
    pretrained: bool = False,
    weights: str | Path | None = None,
    n_steps: int = 1000,
    batch_size: int = 16,
    patch_px: int = 128,
    lr: float | None = None,
    weight_decay: float | None = None,
    mask_ratio: float = 0.75,
    temperature: float = 0.2,
    momentum: float = 0.99,
    freeze_patches: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
) -> Segmenter:
    """Pretrain a student's encoder on images without labels and without a teacher.

    What distillation must beat: :func:`histoniche.seg.finetune` then goes on from ``student=`` the result.

    Parameters
    ----------
    fields
        Fields; labels are not read.
    method
        ``"mae"``: predict hidden patches (plain vision Transformers only); ``"mocov3"``: tell places apart by two views of
        each (any encoder). MoCo contrasts the places of a batch, so it gains from large batches of many fields.
    channel
        Channel that the student sees, or several in the order in which it sees them; may be left out where fields have
        one.
    student
        A name of :func:`histoniche.seg.list_students`, any timm encoder, or a student whose encoder is trained on.
    pretrained, weights
        Whether the encoder starts from ImageNet weights, of the hub or of a local file. Without, a Transformer's weights
        are drawn as MAE and MoCo v3 draw them.
    n_steps, batch_size, patch_px
        Schedule; patches of ``patch_px`` px, a multiple of 32 and of the Transformer's patches.
    lr, weight_decay
        Of AdamW; 1e-4 and 0.05 for MAE, 3e-4 and 0.1 for MoCo v3 by default.
    mask_ratio
        Share of patches that MAE hides.
    temperature, momentum
        MoCo's temperature, and the share of its slow encoder that stays at the first step (it grows to 1).
    freeze_patches
        Whether MoCo leaves a Transformer's projection of patches as it was drawn, for stability.
    checkpoint
        File in which the state is kept every ``checkpoint_every`` steps, and from which an interrupted training goes on.
        On a CPU the result is the same bit for bit.
    checkpoint_every
        Steps.
    seed
        Decides all that is random.

    Returns
    -------
    The student: its encoder is pretrained, its decoder freshly drawn. ``history`` has ``loss``, of MAE the error of
    normalised patches (1: nothing learnt; less where patches are flat), and of MoCo besides ``accuracy``, the share of views that find their twin.

    Raises
    ------
    ImportError
        lightly is missing.
    KeyError
        A field without the channel.
    StudentAccessError
        The encoder's weights cannot be had.
    ValueError
        No fields; an unknown method; MAE of an encoder that is no plain vision Transformer; fields of different um/px;
        images smaller than a patch; constant channels; settings out of range; a damaged checkpoint.

    References
    ----------
    MAE: He et al. 2022, arXiv 2111.06377; MoCo v3: Chen et al. 2021, arXiv 2104.02057.
    """
    fields = list(fields)
    _check_settings(fields, method, mask_ratio=mask_ratio, temperature=temperature, momentum=momentum)
    channels = check_fields(fields, [], [], channel, patch_px=patch_px, n_steps=n_steps, batch_size=batch_size)
    check_schedule(
        lr=1.0 if lr is None else lr,
        weight_decay=weight_decay or 0.0,
        patience=1,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    need_lightly()
    start = start_student(student, channels, fields[0].um_per_px, pretrained=pretrained, weights=weights, seed=seed)
    vit = _plain_vit(start, method, patch_px)
    with isolated_rng(seed):
        if vit is not None and isinstance(student, str) and not pretrained and weights is None:
            draw_vit(vit)
        engine: MAE | MoCo
        if vit is not None and method == "mae":
            engine = MAE(vit, patch_px, len(channels), mask_ratio)
        else:
            engine = MoCo(start.module.encoder, temperature, momentum, freeze_patches=freeze_patches)
    rate, decay = _METHODS[method]
    rate, decay = rate if lr is None else lr, decay if weight_decay is None else weight_decay
    own = {"mask ratio": mask_ratio}
    if method == "mocov3":
        own = {"temperature": temperature, "momentum": momentum, "frozen patches": freeze_patches}
    settings = {
        "pretraining": method, "pretraining fields": len(fields), "pretraining steps": n_steps,
        "pretraining batch": batch_size, "pretraining patch px": patch_px, "pretraining lr": rate,
        "pretraining weight decay": decay, **{f"pretraining {name}": value for name, value in own.items()},
        "pretraining seed": seed,
    }  # fmt: skip
    # A field of no maps: the channels are all that is read.
    stacks = Stacks(channels, fields, [np.empty((0, *item.shape), np.float32) for item in fields])
    path = None if checkpoint is None else Path(checkpoint)
    described = json.dumps([repr(start), start.digest, settings, stacks.fingerprint()])  # reads all: errors come early
    keep = None if path is None else Checkpoint(path, described, every=checkpoint_every)
    history = _train(
        engine, stacks, n_steps=n_steps, batch_size=batch_size, patch_px=patch_px, lr=rate, weight_decay=decay,
        checkpoint=keep, seed=seed, description=f"pretrain ({method})",
    )  # fmt: skip
    result = Segmenter(SegmenterConfig(**vars(start.config)), seed=seed)
    result.module.encoder.load_state_dict(start.module.encoder.cpu().state_dict())
    result.config.training = {**start.config.training, **settings}
    result.history = history
    return result


def _train(
    engine: MAE | MoCo,
    stacks: Stacks,
    *,
    n_steps: int,
    batch_size: int,
    patch_px: int,
    seed: int,
    **options: Any,
) -> dict[str, list[float]]:
    """Train an engine in place; windows, views and masks depend on the seed, the step and the place alone."""
    pick = _picker(len(stacks), batch_size, seed)

    def make(step: int) -> tuple[np.ndarray, ...]:
        places = []
        for place, row in enumerate(pick(step)):
            drawn = [seed, _WINDOW, step, place]
            window = random_window(stacks[row], patch_px, patch_px, np.random.default_rng(drawn))
            views = [
                _view(window, np.random.default_rng([seed, _VIEW, step, place, view]), relights=engine.relights)
                for view in range(engine.n_views)
            ]
            places.append((*views, *engine.masks(np.random.default_rng([seed, _MASK, step, place]))))
        return tuple(np.stack(part) for part in zip(*places, strict=True))

    def batch_loss(module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        return engine.loss(module(*batch), batch)

    def after_step(_: nn.Module, step: int) -> bool:
        engine.after_step(step, n_steps)
        return False

    with isolated_rng(seed):
        return train(engine, make, batch_loss, n_steps=n_steps, after_step=after_step, **options)


def _view(window: np.ndarray, rng: np.random.Generator, *, relights: bool) -> np.ndarray:
    """Part of a window (c, y, x), enlarged to its size, turned, mirrored, and lit differently if asked to."""
    size = window.shape[-1]
    area, aspect = rng.uniform(*_AREA), float(np.exp(rng.uniform(*np.log(_ASPECT))))
    height, width = (min(size, max(1, round(size * (area * ratio) ** 0.5))) for ratio in (aspect, 1 / aspect))
    top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
    view = tv.resized_crop(
        torch.from_numpy(window), top, left, height, width, [size, size], interpolation=InterpolationMode.BILINEAR
    )
    view = torch.rot90(view, int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        view = tv.horizontal_flip(view)
    if relights:
        view = relit(view, rng)
    return view.clamp(0, 1).numpy()


def _picker(n_fields: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Rows of each step. Where there are enough fields none is twice in a batch: MoCo would tell it from itself."""
    rows = np.arange(n_fields)
    if n_fields < batch_size:
        rows = np.tile(rows, int(np.ceil(_EPOCH_BATCHES * batch_size / n_fields)))
    return epoch_batches(rows, batch_size, seed)


def _plain_vit(segmenter: Segmenter, method: str, patch_px: int) -> VisionTransformer | None:
    """The Transformer of timm inside a student, if it is one that both methods can train."""
    vit: Any = getattr(segmenter.module.encoder, "model", None)
    # Not what inherits from it: distilled ones have tokens that lightly does not know.
    if type(vit) is not VisionTransformer or vit.pos_embed is None:
        if method == "mae":
            msg = (
                f"method='mae' hides patches of a plain vision Transformer, which student={segmenter.config.encoder!r} is "
                "not: choose 'vit-tiny' or another such model of timm, or method='mocov3'."
            )
            raise ValueError(msg)
        return None
    width = int(vit.patch_embed.patch_size[0])
    if patch_px % width:
        msg = f"patch_px={patch_px} must be a multiple of the patches of {segmenter.config.encoder!r}, {width} px."
        raise ValueError(msg)
    return vit


def _check_settings(
    fields: Sequence[Field], method: str, *, mask_ratio: float, temperature: float, momentum: float
) -> None:
    """Refuse what no training can use."""
    if not fields:
        msg = "pretrain was given no fields: there is nothing to learn from."
        raise ValueError(msg)
    if method not in _METHODS:
        msg = f"method={method!r} is unknown: choose one of {sorted(_METHODS)}."
        raise ValueError(msg)
    if not 0 < mask_ratio < 1:
        msg = f"mask_ratio={mask_ratio} must lie between 0 and 1."
        raise ValueError(msg)
    if not (temperature > 0 and 0 <= momentum <= 1):
        msg = f"temperature={temperature} must be positive, and momentum={momentum} between 0 and 1."
        raise ValueError(msg)
