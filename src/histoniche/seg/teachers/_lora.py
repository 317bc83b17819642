"""A teacher adapted to a task: low-rank updates of its image encoder's attention, and a decoder that needs no prompt."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.models._checkpoint import Checkpoint
from histoniche.models._directory import weights_digest
from histoniche.models._training import epoch_batches, train
from histoniche.seg._access import need_package
from histoniche.seg._augment import training_patch
from histoniche.seg._fields import pixels_digest
from histoniche.seg._losses import cross_entropy_and_dice
from histoniche.seg._targets import maps_of_labels

from ._semantic import SemanticTeacher, make_decoder, two_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histoniche.seg._fields import Field

    from ._sam import PromptedTeacher

_Batch = tuple[np.ndarray, np.ndarray]
_DECODER_FASTER = 3.0
"""A new decoder has further to go than the adapters of a trained encoder."""


def finetune_lora(
    fields: Sequence[Field],
    *,
    teacher: PromptedTeacher | SemanticTeacher,
    rank: int = 4,
    alpha: float | None = None,
    targets: str | None = None,
    decoder: str = "dense",
    n_steps: int = 200,
    batch_size: int = 4,
    patch_px: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    seed: int = 0,
) -> SemanticTeacher:
    """Adapt a teacher of the SAM family to a task, by LoRA in its image encoder and a decoder that needs no prompt.

    The first stage of task-specific distillation. Every step encodes new augmented patches and goes back through the
    encoder: on a CPU, :func:`histoniche.seg.teachers.tune`, which leaves the encoder as it is, costs a tenth.

    Parameters
    ----------
    fields
        Fields with labels and the teacher's channels. Transfer and test fields must not be among them.
    teacher
        A teacher of the SAM family; or what :func:`~histoniche.seg.teachers.tune` made of one, whose decoder is trained on.
        It is left as it is.
    rank
        Rank of the updates.
    alpha
        Updates are scaled by ``alpha / rank``; ``rank`` by default.
    targets
        Regular expression that the whole name of a linear layer of the network must match to be adapted. By default the
        attention of every block of the image encoder.
    decoder
        ``"dense"``: a new convolutional decoder; ``"mask"``: the network's own, all of it trained and asked without a
        prompt. Ignored where the teacher has one already.
    n_steps, batch_size, lr, weight_decay
        Schedule; a new ``"dense"`` decoder learns three times faster.
    patch_px
        Width of a patch, which is scaled to the teacher's input.
    checkpoint, checkpoint_every
        File and steps of the state from which an interrupted training goes on. The file stays: delete it when the teacher is
        saved.
    seed
        Decides all that is random.

    Returns
    -------
    The adapted teacher, its ``history`` being the loss of every step.

    Raises
    ------
    ImportError
        peft is missing.
    KeyError
        A field without one of the channels.
    ValueError
        No fields, or fields without labels or with labels of one class; ``targets`` that match no layer; settings out of
        range.

    References
    ----------
    LoRA: Hu et al. 2022, arXiv 2106.09685; on SAM: Zhang and Liu 2023, arXiv 2304.13785; as a teacher: Liang et al. 2025,
    arXiv 2503.06976.
    """
    fields = list(fields)
    check_lora(
        fields, rank=rank, alpha=alpha, n_steps=n_steps, batch_size=batch_size, patch_px=patch_px, lr=lr,
        checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    start = teacher if isinstance(teacher, SemanticTeacher) else None
    if start is not None and start.adapter is not None:
        msg = f"The teacher {start.name!r} has adapters already: pass the teacher that it was made of."
        raise ValueError(msg)
    base, adapter = _adapted(start.base if start else teacher, rank, rank if alpha is None else alpha, targets, seed)  # type: ignore[arg-type]
    stacks = [np.concatenate([item.read(base.named), maps_of_labels(two_classes(item))]) for item in fields]
    with isolated_rng(seed):
        kind = start.kind if start else decoder
        head = copy.deepcopy(start.decoder) if start else make_decoder(kind, base, n_features=_width(base))
        network = _Adapted(base, head.requires_grad_(requires_grad=True))
        faster = {"decoder.": _DECODER_FASTER} if kind == "dense" and start is None else {}
        keep = None
        if checkpoint is not None:
            sha = [weights_digest(network), *map(pixels_digest, stacks)]
            settings = [rank, alpha, targets, kind, n_steps, batch_size, patch_px, lr, weight_decay, seed, sha]
            keep = Checkpoint(Path(checkpoint), json.dumps(settings), every=checkpoint_every)
        history = train(
            network, _batches(stacks, base, batch_size, patch_px, seed), _loss, n_steps=n_steps, lr=lr,
            weight_decay=weight_decay, lr_factors=faster, checkpoint=keep,
            description=f"adapt {base.name}",
        )  # fmt: skip
    base.module.requires_grad_(requires_grad=False)
    adapted = SemanticTeacher(base, head, kind=kind, adapter=adapter)
    adapted.history = history
    return adapted


def check_lora(
    fields: Sequence[Field],
    *,
    rank: int,
    alpha: float | None,
    n_steps: int,
    batch_size: int,
    patch_px: int,
    lr: float,
    checkpoint_every: int,
    seed: int,
) -> None:
    """Refuse settings of :func:`finetune_lora` out of range, and a missing peft."""
    if not fields or min(rank, n_steps, batch_size, patch_px) < 1:
        msg = (
            f"finetune_lora was given {len(fields)} fields, rank={rank}, n_steps={n_steps}, batch_size={batch_size}, "
            f"patch_px={patch_px}: all must be at least 1."
        )
        raise ValueError(msg)
    if not (alpha is None or alpha > 0) or not lr > 0 or checkpoint_every < 1 or seed < 0:
        msg = f"alpha={alpha} and lr={lr} must be positive, checkpoint_every={checkpoint_every} at least 1, seed={seed} 0 or more."
        raise ValueError(msg)
    need_package("peft", "peft", "LoRA")


class _Adapted(nn.Module):
    """Encoder and decoder, of which the encoder always runs as it does in use: norms and dropout are not trained."""

    def __init__(self, base: PromptedTeacher, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = base.module, decoder
        self._encode = base.encode

    def train(self, mode: bool = True) -> _Adapted:  # noqa: FBT001, FBT002 (torch's signature)
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, rgb: Tensor) -> Tensor:
        return self.decoder(self._encode(rgb), rgb)


def _batches(stacks: list[np.ndarray], base: PromptedTeacher, batch_size: int, patch_px: int, seed: int) -> Any:
    """Function from a step to images (B, 3, input, input) and maps (B, 2, y, x)."""
    n = len(base.named)
    pick = epoch_batches(np.tile(np.arange(len(stacks)), int(np.ceil(8 * batch_size / len(stacks)))), batch_size, seed)

    def make(step: int) -> _Batch:
        images, maps = [], []
        for place, row in enumerate(pick(step)):
            patch = training_patch(stacks[row], n, patch_px, np.random.default_rng([seed, 5, step, place])).numpy()
            images.append(base.prepare(patch[:n])[0][0].cpu().numpy())
            maps.append(patch[n:])
        return np.stack(images), np.stack(maps)

    return make


def _loss(net: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
    rgb, wanted = batch
    logits = net(rgb.contiguous(memory_format=torch.channels_last))
    logits = F.interpolate(logits.float(), size=wanted.shape[-2:], mode="bilinear", align_corners=False)
    return cross_entropy_and_dice(logits, wanted).mean(), {}


def _width(base: PromptedTeacher) -> int:
    """Features of the embedding."""
    return int(base.embed(np.zeros((len(base.named), 64, 64), dtype=np.float32))[0].shape[1])


def _adapted(
    teacher: PromptedTeacher, rank: int, alpha: float, targets: str | None, seed: int
) -> tuple[PromptedTeacher, Any]:
    """Copy of a teacher with adapters that do nothing yet, and the model of peft that holds them."""
    peft = need_package("peft", "peft", "LoRA")
    base = copy.copy(teacher)
    sha = weights_digest(teacher.module)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=target_layers(teacher, targets), lora_dropout=0.0, bias="none"
    )
    with isolated_rng(seed):
        adapter = peft.get_peft_model(copy.deepcopy(teacher.module), config)
    return _around(base, adapter, sha), adapter


def target_layers(teacher: PromptedTeacher, targets: str | None) -> list[str]:
    """Names of the linear layers of a teacher's image encoder that are adapted.

    Parameters
    ----------
    teacher
        The teacher.
    targets
        Regular expression of whole names; by default the teacher's own.

    Returns
    -------
    Names, as the network lists them.

    Raises
    ------
    ValueError
        No regular expression, none that matches a layer, or one that matches a layer outside the image encoder, which is all that
        the trained decoder sees.
    """
    pattern = teacher.lora_targets if targets is None else targets
    try:
        expression = re.compile(pattern)
    except re.error as error:
        msg = f"targets={pattern!r} is no regular expression: {error}."
        raise ValueError(msg) from error
    names = {id(module): name for name, module in teacher.module.named_modules()}
    encoders = {names[id(block)].split(".")[0] for block in teacher.blocks()}
    layers = [name for name, module in teacher.module.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in layers if expression.fullmatch(name)]
    if not found:
        msg = (
            f"targets={pattern!r} match no linear layer of {teacher.name!r}; it has {len(layers)}, such as {layers[:3]}. The "
            "expression must match the whole name."
        )
        raise ValueError(msg)
    outside = [name for name in found if encoders and name.split(".")[0] not in encoders]
    if outside:
        msg = (
            f"targets={pattern!r} match {len(outside)} layers outside the image encoder ({', '.join(sorted(encoders))}) of "
            f"{teacher.name!r}, such as {outside[0]!r}, which would learn nothing: only the encoder is adapted, a decoder is trained whole."
        )
        raise ValueError(msg)
    return found


def _around(base: PromptedTeacher, adapter: Any, sha: str) -> PromptedTeacher:
    adapter.histoniche_base_sha256 = sha
    base.module = adapter.get_base_model()
    return base


def load_adapter(folder: Path, teacher: PromptedTeacher) -> tuple[PromptedTeacher, Any]:
    """Copy of a teacher with adapters that peft saved, as safetensors alone, and the model of peft."""
    peft = need_package("peft", "peft", "LoRA")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            msg = f"{str(folder)!r} is damaged: {name} is missing. Copy or train the teacher again."
            raise FileNotFoundError(msg)
    sha = weights_digest(teacher.module)
    try:
        with isolated_rng(0):  # new layers are drawn before they are filled
            adapter = peft.PeftModel.from_pretrained(copy.deepcopy(teacher.module), str(folder), local_files_only=True)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        msg = f"{str(folder)!r} is damaged, or belongs to another network ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    adapter.requires_grad_(requires_grad=False).eval()
    return _around(copy.copy(teacher), adapter, sha), adapter
