"""A teacher tuned on labels: it needs no prompt any more, and gives all objects of a field at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from histoniche._compute import make_fabric, to_device
from histoniche._random import isolated_rng
from histoniche._settings import settings
from histoniche.models._training import epoch_batches, train
from histoniche.seg._augment import training_patch
from histoniche.seg._losses import cross_entropy_and_dice
from histoniche.seg._targets import OUTPUTS, maps_of_labels

from ._protocol import Output, check_output
from ._sam import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histoniche.seg._fields import Field

    from ._sam import PromptedTeacher

_WIDTH = 96


class DenseDecoder(nn.Sequential):
    """Reads foreground and boundary off an image embedding (B, d, h, w), at twice its size.

    Parameters
    ----------
    n_features
        d.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__(
            nn.BatchNorm2d(n_features), nn.Conv2d(n_features, _WIDTH, 1), nn.BatchNorm2d(_WIDTH), nn.GELU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.BatchNorm2d(_WIDTH), nn.GELU(),
            nn.ConvTranspose2d(_WIDTH, _WIDTH // 2, 2, stride=2), nn.BatchNorm2d(_WIDTH // 2), nn.GELU(),
            nn.Conv2d(_WIDTH // 2, len(OUTPUTS), 3, padding=1),
        )  # fmt: skip


class SemanticTeacher:
    """A teacher of the SAM family with a decoder of its own, trained to give foreground and boundary without a prompt.

    Made by :func:`tune`. Fields are scaled so that their longer side fills the network's input.

    Parameters
    ----------
    base
        The teacher whose image encoder it has: channels, input, gamma.
    decoder
        The trained decoder; frozen here.
    """

    def __init__(self, base: PromptedTeacher, decoder: nn.Module) -> None:
        self.base, self.name, self.licence, self.channels = base, f"{base.name}-tuned", base.licence, base.channels
        self._fabric = make_fabric()
        self.decoder = decoder.requires_grad_(requires_grad=False).eval().to(self._fabric.device)
        weights = f"{digest(base.module)} {digest(self.decoder)}"
        self.fingerprint = f"{self.name} {weights} {list(self.channels)} gamma={base.gamma}"

    @torch.inference_mode()
    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field; ``features`` adds the image embedding as ``"embedding"``."""
        embedding, inner = self.base.embed(item.read(self.base.named))
        with self._fabric.autocast():
            logits = self.base.unpadded(self.decoder(embedding), inner)
        maps = F.interpolate(logits.float(), size=item.shape, mode="bilinear", align_corners=False).sigmoid()[0]
        hidden = {"embedding": embedding[0].float().cpu().numpy()} if features else {}
        return check_output(Output(maps.cpu().numpy(), hidden), item, self.name)


def tune(
    fields: Sequence[Field],
    *,
    teacher: PromptedTeacher,
    n_steps: int = 300,
    batch_size: int = 8,
    n_views: int = 2,
    patch_px: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> SemanticTeacher:
    """Give a teacher a decoder that needs no prompt, trained on fields with labels.

    The image encoder stays frozen, so every view of a field is encoded once, which is most of the cost. The decoder is
    convolutional and new: SAM's own, asked without a prompt, learns the same far more slowly.

    Parameters
    ----------
    fields
        Fields with labels and the teacher's channels. Transfer and test fields must not be among them.
    teacher
        A teacher of the SAM family; it is left as it is.
    n_steps, batch_size, lr, weight_decay
        Schedule.
    n_views
        Augmented patches of each field.
    patch_px
        Width of a patch, which is scaled to the teacher's input.
    seed
        Decides all that is random.

    Returns
    -------
    The tuned teacher.

    Raises
    ------
    KeyError
        A field without one of the channels.
    ValueError
        No fields, or fields without labels; settings out of range.
    """
    fields = list(fields)
    if not fields or min(n_steps, batch_size, n_views, patch_px) < 1:
        msg = (
            f"tune was given {len(fields)} fields, n_steps={n_steps}, batch_size={batch_size}, n_views={n_views}, "
            f"patch_px={patch_px}: all must be at least 1."
        )
        raise ValueError(msg)
    embeddings, maps = _views(fields, teacher, n_views, patch_px, seed)
    rows = np.tile(np.arange(len(maps)), int(np.ceil(batch_size / len(maps))))
    pick = epoch_batches(rows, batch_size, seed)

    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        return embeddings[pick(step)].astype(np.float32), maps[pick(step)]

    def loss(
        net: nn.Module, batch: tuple[np.ndarray, np.ndarray], device: torch.device
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        embedding, wanted = (to_device(array, device) for array in batch)
        logits = net(embedding)
        logits = F.interpolate(logits.float(), size=wanted.shape[-2:], mode="bilinear", align_corners=False)
        return cross_entropy_and_dice(logits, wanted).mean(), {}

    with isolated_rng(seed):
        decoder = DenseDecoder(embeddings.shape[1])
        train(
            decoder, make, loss, n_steps=n_steps, lr=lr, weight_decay=weight_decay, description=f"tune {teacher.name}"
        )
    return SemanticTeacher(teacher, decoder)


def _views(
    fields: Sequence[Field], teacher: PromptedTeacher, n_views: int, patch_px: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, d, h, w) float16 and maps (n, 2, y, x) float32 of augmented patches."""
    n = len(teacher.named)
    embeddings, maps = [], []
    for row, item in enumerate(tqdm(fields, desc=f"embed for {teacher.name}", disable=not settings.progress)):
        stack = np.concatenate([item.read(teacher.named), maps_of_labels(item.read_labels())])
        for view in range(n_views):
            patch = training_patch(stack, n, patch_px, np.random.default_rng([seed, 4, row, view])).numpy()
            embeddings.append(teacher.embed(patch[:n])[0][0].half().cpu().numpy())
            maps.append(patch[n:])
    return np.stack(embeddings), np.stack(maps)
