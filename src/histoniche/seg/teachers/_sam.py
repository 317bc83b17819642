"""Teachers of the SAM family: an image encoder, asked by boxes or points."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoniche._compute import inference_fabric
from histoniche.models._directory import weights_digest
from histoniche.seg._targets import maps_of_masks

from ._prompts import Prompts, chunks
from ._protocol import Output, check_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from histoniche.seg._fields import Field

_GRID_KEPT_AT = 256
"""Width in px at which masks of a grid are compared."""


def to_rgb(pixels: np.ndarray, channels: Sequence[str | None]) -> np.ndarray:
    """Lay channels on red, green and blue.

    Parameters
    ----------
    pixels
        (c, y, x) in 0 to 1, the channels that have a name, in their order.
    channels
        One name: grey. Two: red and green, and their mean as blue. Three: red, green, blue, where ``None`` stays black.
    """
    if len(channels) == 1:
        return np.repeat(pixels, 3, axis=0)
    if len(channels) == 2:
        return np.concatenate([pixels, pixels.mean(axis=0, keepdims=True)])
    rows = iter(pixels)
    return np.stack([next(rows) if name is not None else np.zeros(pixels.shape[1:], np.float32) for name in channels])


def _as_map(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Features of a block as (B, c, h, w)."""
    tokens = output[0] if isinstance(output, tuple) else output
    if tokens.ndim == 3:
        side = math.isqrt(tokens.shape[1])
        tokens = tokens.unflatten(1, (side, side))
    return tokens.permute(0, 3, 1, 2)


def digest(module: nn.Module) -> str:
    """SHA-256 of all weights, first 16 hexadecimal digits."""
    return weights_digest(module)[:16]


class PromptedTeacher(ABC):
    """A network of the SAM family.

    Fields are scaled so that their longer side fills the network's input; cut large images into patches first
    (:func:`histoniche.seg.patches`).

    Parameters
    ----------
    module
        The network; frozen here.
    channels
        One to three channels, see :func:`to_rgb`.
    prompts
        How it is asked.
    name, licence
        For records and model cards.
    input_px
        Width of its input.
    gamma
        Exponent of the values in 0 to 1 that it sees: below 1, dim objects become visible.
    batch_size
        Prompts at a time.
    """

    lora_targets = ""
    """Regular expression of the names of the encoder's layers that LoRA adapts."""

    def __init__(
        self,
        module: nn.Module,
        channels: Sequence[str | None],
        *,
        prompts: Prompts,
        name: str,
        licence: str,
        input_px: int,
        gamma: float = 0.5,
        batch_size: int = 16,
    ) -> None:
        channels = [channels] if isinstance(channels, str) else list(channels)
        if not 1 <= len(channels) <= 3 or not any(channels):
            msg = f"channels={channels}: one to three are needed, to be seen as grey or as red, green and blue."
            raise ValueError(msg)
        if not isinstance(prompts, Prompts):
            msg = f"prompts={prompts!r} must be hn.seg.teachers.Prompts, such as Prompts('grid')."
            raise TypeError(msg)
        self.channels, self.prompts, self.name, self.licence = tuple(channels), prompts, name, licence
        self.input_px, self.gamma, self.batch_size = input_px, gamma, batch_size
        self._fabric = inference_fabric()
        module = module.requires_grad_(requires_grad=False).eval().to(self._fabric.device)
        self.module = module.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        self._weights = digest(self.module)

    @property
    def fingerprint(self) -> str:
        """Weights, channels, gamma and prompts."""
        return f"{self.name} {self._weights} {list(self.channels)} gamma={self.gamma} {self.prompts.fingerprint}"

    def normalise(self, rgb: Tensor) -> Tensor:
        """Image (1, 3, h, w) in 0 to 1 as the network wants it, before zeros are padded; as it is by default."""
        return rgb

    @abstractmethod
    def encode(self, rgb: Tensor) -> Tensor:
        """Embedding (1, d, h, w) of a normalised image (1, 3, input, input), zero where it is padded."""

    @abstractmethod
    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        """Logits (n, m, h, w) and predicted IoU (n, m) of m masks for each box (n, 4) or point (n, 2) in px of the input."""

    @property
    def named(self) -> list[str]:
        """Channels to read: those of red, green and blue that are not left black."""
        return [name for name in self.channels if name is not None]

    def blocks(self) -> list[nn.Module]:
        """Parts of the image encoder, in order, whose outputs are hidden features: (B, h * w, c), or (B, h, w, c)."""
        return []

    def unprompted_decoder(self) -> nn.Module:
        """Copy of the network's own decoder that asks without a prompt: logits (B, 2, h', w').

        It takes embeddings (B, d, h, w), and images, which it does not need, as every decoder without prompts does.
        """
        msg = f'The teacher {self.name!r} has no decoder that works without a prompt: choose decoder="dense".'
        raise ValueError(msg)

    def prepare(self, pixels: np.ndarray) -> tuple[Tensor, list[int]]:
        """Named channels (c, y, x) in 0 to 1 as the network's input (1, 3, input, input), and what they fill of it."""
        rgb = torch.from_numpy(to_rgb(pixels, self.channels) ** self.gamma)[None].to(self._fabric.device)
        scale = self.input_px / max(rgb.shape[-2:])
        inner = [max(1, round(length * scale)) for length in rgb.shape[-2:]]
        rgb = self.normalise(F.interpolate(rgb, size=inner, mode="bilinear", antialias=scale < 1))
        rgb = F.pad(rgb, (0, self.input_px - inner[1], 0, self.input_px - inner[0]))
        return rgb.contiguous(memory_format=torch.channels_last), inner

    @torch.inference_mode()
    def embed(self, pixels: np.ndarray) -> tuple[Tensor, list[int]]:
        """Embed the named channels of an image.

        Parameters
        ----------
        pixels
            (c, y, x) float32 in 0 to 1.

        Returns
        -------
        Embedding (1, d, h, w) on the device, and the height and width that the image fills of the network's input.
        """
        rgb, inner = self.prepare(pixels)
        with self._fabric.autocast():
            embedding = self.encode(rgb)
        return embedding, inner

    def hidden(self, item: Field) -> dict[str, np.ndarray]:
        """Hidden features of a field, (c, h, w) float32: ``"block0"`` and so on, and ``"embedding"``."""
        return self.embed_hidden(item.read(self.named))[2]

    def embed_hidden(self, pixels: np.ndarray) -> tuple[Tensor, list[int], dict[str, np.ndarray]]:
        """Embedding as :meth:`embed` gives it, and the hidden features of the part that the image fills."""
        found: dict[str, Tensor] = {}
        handles = [
            block.register_forward_hook(lambda _, __, output, name=f"block{i}": found.update({name: _as_map(output)}))
            for i, block in enumerate(self.blocks())
        ]
        try:
            embedding, inner = self.embed(pixels)
        finally:
            for handle in handles:
                handle.remove()
        found["embedding"] = embedding
        hidden = {name: self.unpadded(maps, inner)[0].float().cpu().numpy() for name, maps in found.items()}
        return embedding, inner, hidden

    @torch.inference_mode()
    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field; ``features`` adds what :meth:`hidden` gives."""
        pixels = item.read(self.named)
        embedding, inner, hidden = self.embed_hidden(pixels) if features else (*self.embed(pixels), {})
        maps = maps_of_masks(self._masks(item, pixels, embedding, inner), item.shape)
        return check_output(Output(maps, hidden), item, self.name)

    def _masks(self, item: Field, pixels: np.ndarray, embedding: Tensor, inner: list[int]) -> Iterator[Tensor]:
        """Soft masks (n, y, x) at the size of the field, batch by batch."""
        ratio = np.array([inner[1] / item.shape[1], inner[0] / item.shape[0]], dtype=np.float32)
        if self.prompts.kind == "grid":
            kept = self._of_grid(embedding, self.prompts.points(item.shape) * ratio, inner)
            if not len(kept[0]):
                return
            for logits, iou in zip(kept[0].split(self.batch_size), kept[1].split(self.batch_size), strict=True):
                yield self._sized(logits, item.shape).sigmoid() * iou.clamp(0, 1)[:, None, None]
            return
        for boxes in chunks(self.prompts.boxes(item, pixels) * np.tile(ratio, 2), self.batch_size):
            logits, iou = self._decode(embedding, boxes, boxes_given=True)
            best = iou.argmax(1)
            logits = logits[torch.arange(len(logits)), best]
            yield self._sized(self.unpadded(logits, inner), item.shape).sigmoid()

    def _of_grid(self, embedding: Tensor, points: np.ndarray, inner: list[int]) -> tuple[Tensor, Tensor]:
        logits, ious = [], []
        for part in chunks(points, self.batch_size):
            found, iou = self._decode(embedding, part, boxes_given=False)
            found = self.unpadded(found.flatten(0, 1), inner)
            size = [min(length, _GRID_KEPT_AT) for length in found.shape[-2:]]
            found, iou = F.interpolate(found[None], size=size, mode="bilinear")[0], iou.flatten()
            # What is dropped anyway is not held: a grid has thousands of masks.
            rows = self.prompts.believed(found, iou)
            logits.append(found[rows])
            ious.append(iou[rows])
        every, iou = torch.cat(logits), torch.cat(ious)
        rows = self.prompts.keep(every, iou)
        return every[rows], iou[rows]

    def _decode(self, embedding: Tensor, prompts: np.ndarray, *, boxes_given: bool) -> tuple[Tensor, Tensor]:
        with self._fabric.autocast():
            logits, iou = self.decode(embedding, torch.from_numpy(prompts).to(embedding.device), boxes=boxes_given)
        return logits.float(), iou.float()

    def unpadded(self, logits: Tensor, inner: list[int]) -> Tensor:
        """Cut off the padding of maps (..., h, w) that cover the whole input."""
        height, width = (max(1, round(length * logits.shape[-1] / self.input_px)) for length in inner)
        return logits[..., :height, :width]

    @staticmethod
    def _sized(logits: Tensor, shape: tuple[int, int]) -> Tensor:
        return F.interpolate(logits[None], size=shape, mode="bilinear", align_corners=False)[0]
