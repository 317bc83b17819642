"""Training of a student: on a teacher's maps, on labels, or on both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.models._checkpoint import Checkpoint
from histoniche.models._training import epoch_batches, train

from ._augment import quarter_turned, relit, training_patch
from ._students import hidden_layers
from ._targets import maps_of_labels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ._fields import Field
    from ._losses import DistillationLoss, HiddenAlignment
    from ._segmenter import Segmenter

_Batch = tuple[np.ndarray, ...]
_KEPT_BYTES = 2_000_000_000
_EPOCH_BATCHES = 8
_WEIGHTS_FASTER = 50.0
"""The weights of a loss are learnt this many times faster than the network, or they would stay where they began."""


@dataclass
class Alignment:
    """Which of a student's layers are compared with the teacher's, and how.

    Attributes
    ----------
    layers
        Numbers of the student's layers, in the order of :func:`hidden_layers`.
    distance
        Their distance from the teacher's.
    """

    layers: list[int]
    distance: HiddenAlignment


class Stacks:
    """Channels and maps of fields, read when first asked for and kept while they fit into memory.

    Parameters
    ----------
    channels
        Channels to read.
    fields
        Fields; those with maps first, then those whose labels are the target.
    maps
        (2, y, x) of the first fields.
    hidden
        Hidden features (c, h, w) of each layer, of every field with maps; such fields are patches, seen as they are.
    """

    def __init__(
        self,
        channels: Sequence[str],
        fields: Sequence[Field],
        maps: Sequence[np.ndarray],
        hidden: Sequence[Sequence[np.ndarray]] = (),
    ) -> None:
        self.channels, self.fields, self.maps, self.hidden = list(channels), list(fields), list(maps), list(hidden)
        self._kept: dict[int, np.ndarray] = {}
        self._bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.fields)

    def labelled(self, row: int) -> bool:
        """Whether labels are the target."""
        return row >= len(self.maps)

    def __getitem__(self, row: int) -> np.ndarray:
        """(c + 2, y, x) float32: channels, foreground, boundary."""
        with self._lock:
            if row in self._kept:
                return self._kept[row]
        item = self.fields[row]
        target = maps_of_labels(item.read_labels()) if self.labelled(row) else self.maps[row]
        stack = np.concatenate([item.read(self.channels), target])
        with self._lock:
            if row not in self._kept and self._bytes + stack.nbytes <= _KEPT_BYTES:
                self._kept[row] = stack
                self._bytes += stack.nbytes
        return stack

    def patch(self, row: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Augmented patch (c + 2, size, size), and hidden features that fit it, 0 for fields with labels."""
        n = len(self.channels)
        if not self.hidden:
            return [training_patch(self[row], n, size, rng).numpy()]
        if self.labelled(row):
            nothing = [np.zeros(layer.shape, np.float32) for layer in self.hidden[0]]
            return [training_patch(self[row], n, size, rng).numpy(), *nothing]
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        stack, *hidden = (
            quarter_turned(torch.from_numpy(maps), turns, mirrored=mirrored) for maps in (self[row], *self.hidden[row])
        )
        stack = torch.cat([relit(stack[:n], rng).clamp(0, 1), stack[n:]])
        return [stack.numpy(), *(layer.float().numpy() for layer in hidden)]

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and targets."""
        sha = hashlib.sha256()
        for row in range(len(self)):
            sha.update(np.ascontiguousarray(self[row]).tobytes())
        for layers in self.hidden:
            for layer in layers:
                sha.update(np.ascontiguousarray(layer).tobytes())
        return sha.hexdigest()[:16]


class EarlyStopping:
    """Keeps the best weights, and stops a training that no longer improves on validation fields.

    Parameters
    ----------
    stacks
        Validation fields.
    every
        Steps from one look to the next.
    patience
        Looks without improvement after which training stops.
    """

    def __init__(self, segmenter: Segmenter, stacks: Stacks, every: int, patience: int) -> None:
        self.segmenter, self.stacks, self.every, self.patience = segmenter, stacks, every, patience
        self.best, self.waited, self.history = np.inf, 0, []  # type: ignore[var-annotated]
        self.weights: dict[str, Tensor] = {}

    def __call__(self, module: nn.Module, step: int) -> bool:
        """Look at the student after a step; true ends the training."""
        if (step + 1) % self.every:
            return False
        errors = []
        for row in range(len(self.stacks)):
            stack = self.stacks[row]
            errors.append(float(np.square(self.segmenter.predict_maps(stack[None, :-2])[0] - stack[-2:]).mean()))
        module.train()
        error = float(np.mean(errors))
        self.history.append(error)
        if error < self.best:
            self.best, self.waited = error, 0
            state = self.segmenter.module.state_dict()
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """State to keep."""
        return {"best": float(self.best), "waited": self.waited, "weights": self.weights, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that was kept."""
        self.best, self.waited = state["best"], state["waited"]
        self.weights, self.history = state["weights"], state["history"]


class _Distiller(nn.Module):
    """Student and loss, so that one optimiser trains both."""

    def __init__(self, student: nn.Module, loss: DistillationLoss, alignment: Alignment | None) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self.layers = [] if alignment is None else alignment.layers
        self.alignment = None if alignment is None else alignment.distance

    def forward(
        self, pixels: Tensor, maps: Tensor, labelled: Tensor, *teacher: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.alignment is None:
            return self.loss(self.student(pixels), maps, labelled)
        seen: list[Any] = []
        handle = self.student.encoder.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            logits = self.student(pixels)
        finally:
            handle.remove()
        features = hidden_layers(seen[0])
        hidden = self.alignment([features[layer] for layer in self.layers], teacher)
        return self.loss(logits, maps, labelled, hidden)


def fit(
    segmenter: Segmenter,
    stacks: Stacks,
    loss: DistillationLoss,
    *,
    n_steps: int,
    batch_size: int,
    patch_px: int,
    labelled_share: float,
    lr: float,
    weight_decay: float,
    stopping: EarlyStopping | None,
    checkpoint: Path | None,
    checkpoint_every: int,
    seed: int,
    description: str,
    alignment: Alignment | None = None,
) -> None:
    """Train a student in place.

    Parameters
    ----------
    segmenter
        The student; its ``history`` is set.
    stacks
        What it learns from.
    loss
        The loss.
    n_steps, batch_size, patch_px, lr, weight_decay
        Schedule.
    labelled_share
        Share of a batch that is drawn from fields with labels, where there are others too.
    stopping
        Ends the training early.
    checkpoint, checkpoint_every
        File and number of steps of the state from which an interrupted training goes on; the file stays.
    seed
        Decides patches, their augmentation, and dropout.
    description
        Text of the progress bar.
    alignment
        How hidden features are compared, where the stacks have some.
    """
    pick = _picker(stacks, batch_size, labelled_share, seed)

    def make(step: int) -> _Batch:
        rows = pick(step)
        patches = [
            stacks.patch(row, patch_px, np.random.default_rng([seed, 3, step, place])) for place, row in enumerate(rows)
        ]
        labelled = np.array([stacks.labelled(row) for row in rows], dtype=np.float32)
        pixels, *hidden = (np.stack(arrays) for arrays in zip(*patches, strict=True))
        return pixels, labelled, *hidden

    def batch_loss(module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        patches, labelled, *hidden = batch
        pixels = patches[:, :-2].contiguous(memory_format=torch.channels_last)
        return module(pixels, patches[:, -2:], labelled, *hidden)

    distiller = _Distiller(segmenter.module, loss, alignment)
    keep = None
    if checkpoint is not None:
        settings = [repr(segmenter), segmenter.digest, loss.terms, loss.matching, loss.weights is not None]
        settings += [n_steps, batch_size]
        settings += [patch_px, labelled_share, lr, weight_decay, seed, stacks.fingerprint()]
        settings += [] if alignment is None else [alignment.layers]
        if stopping is not None:
            settings += [stopping.every, stopping.patience, stopping.stacks.fingerprint()]
        keep = Checkpoint(checkpoint, json.dumps(settings), every=checkpoint_every, extra=stopping)
    with isolated_rng(seed):
        segmenter.history = train(
            distiller, make, batch_loss, n_steps=n_steps, lr=lr, weight_decay=weight_decay,
            lr_factors={"loss.": _WEIGHTS_FASTER}, after_step=stopping, checkpoint=keep, description=description,
        )  # fmt: skip
    if stopping is not None and stopping.weights:
        segmenter.module.load_state_dict(stopping.weights)
        segmenter.history["validation"] = list(stopping.history)
    segmenter.module.eval().cpu()


def _picker(stacks: Stacks, batch_size: int, labelled_share: float, seed: int) -> Any:
    """Rows of each step, each list of fields shown evenly."""
    taught = np.arange(len(stacks.maps))
    labelled = np.arange(len(stacks.maps), len(stacks))
    n_labelled = batch_size if not len(taught) else 0
    if len(taught) and len(labelled):
        n_labelled = min(batch_size - 1, max(1, round(labelled_share * batch_size)))
    parts = []
    for number, (rows, n) in enumerate([(taught, batch_size - n_labelled), (labelled, n_labelled)]):
        if n:
            # Few fields are shown several times in a batch, in windows and light of their own; an epoch of many
            # batches wastes few of the fields that do not fill its last one.
            repeated = np.tile(rows, int(np.ceil(_EPOCH_BATCHES * n / len(rows))))
            parts.append(epoch_batches(repeated, n, seed + number))
    return lambda step: np.concatenate([part(step) for part in parts])
