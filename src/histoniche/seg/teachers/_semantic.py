"""A teacher tuned on labels: it needs no prompt any more, and gives all objects of a field at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from histoniche._compute import make_fabric, to_device
from histoniche._random import isolated_rng
from histoniche._settings import settings
from histoniche.models._directory import read_directory, weights_digest, write_directory
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


DECODERS = ("dense", "mask")
"""Decoders that need no prompt: a new convolutional one, or the network's own."""


class SemanticTeacher:
    """A teacher of the SAM family with a decoder trained to give foreground and boundary without a prompt.

    Made by :func:`tune` or :func:`histoniche.seg.finetune_lora`. Fields are scaled so that their longer side fills the
    network's input.

    Parameters
    ----------
    base
        The teacher whose image encoder it has: channels, input, gamma.
    decoder
        The trained decoder; frozen here.
    kind
        ``"dense"`` or ``"mask"``: what the decoder is.
    adapter
        The model of peft around the encoder, where LoRA has adapted it.
    """

    def __init__(
        self, base: PromptedTeacher, decoder: nn.Module, *, kind: str = "dense", adapter: Any | None = None
    ) -> None:
        suffix = "tuned" if adapter is None else "lora"
        self.base, self.name, self.licence, self.channels = base, f"{base.name}-{suffix}", base.licence, base.channels
        self.kind, self.adapter = kind, adapter
        self.history: dict[str, list[float]] = {}
        self._fabric = make_fabric()
        self.decoder = decoder.requires_grad_(requires_grad=False).eval().to(self._fabric.device)
        weights = f"{digest(base.module)} {digest(self.decoder)}"
        self.fingerprint = f"{self.name} {weights} {list(self.channels)} gamma={base.gamma}"

    @torch.inference_mode()
    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field; ``features`` adds what :meth:`hidden` gives."""
        pixels = item.read(self.base.named)
        embedding, inner, hidden = self.base.embed_hidden(pixels) if features else (*self.base.embed(pixels), {})
        with self._fabric.autocast():
            logits = self.base.unpadded(self.decoder(embedding), inner)
        maps = F.interpolate(logits.float(), size=item.shape, mode="bilinear", align_corners=False).sigmoid()[0]
        return check_output(Output(maps.cpu().numpy(), hidden), item, self.name)

    def hidden(self, item: Field) -> dict[str, np.ndarray]:
        """Hidden features of a field, as :meth:`PromptedTeacher.hidden` gives them."""
        return self.base.hidden(item)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write what was trained to a directory: the decoder, and the adapter as peft saves it; not the teacher's weights.

        Parameters
        ----------
        path
            Directory, made where it does not exist.
        overwrite
            Whether a teacher that lies there is replaced.

        Raises
        ------
        FileExistsError
            The directory holds a model and ``overwrite`` is false, or holds something else.
        """
        config = {
            "class": type(self).__name__, "kind": self.kind, "adapter": self.adapter is not None, "base": self.base.name,
            "base_sha256": self._base_digest(), "channels": list(self.channels), "gamma": self.base.gamma,
            "weights_sha256": weights_digest(self.decoder),
        }  # fmt: skip
        card = (
            f"# Tuned teacher\n\nWhat was trained over `{self.base.name}` (licence: {self.licence}): a decoder without prompts"
            f"{'' if self.adapter is None else ', and LoRA adapters of the encoder (`adapter`)'}. It is loaded with that "
            "teacher.\n"
        )
        more = None
        if self.adapter is not None:
            adapter = self.adapter

            def more(folder: Path) -> None:
                adapter.save_pretrained(str(folder / "adapter"), safe_serialization=True)

        write_directory(Path(path), config, self.decoder.state_dict(), card, overwrite=overwrite, more=more)

    def _base_digest(self) -> str:
        """Digest of the teacher's own weights, without adapters."""
        if self.adapter is None:
            return weights_digest(self.base.module)
        return str(self.adapter.histoniche_base_sha256)

    @classmethod
    def load(cls, path: str | Path, *, teacher: PromptedTeacher) -> SemanticTeacher:
        """Read what :meth:`save` wrote, over the teacher that it was trained over; executes no code.

        Parameters
        ----------
        path
            The directory.
        teacher
            The teacher, which stays as it is.

        Returns
        -------
        The tuned teacher.

        Raises
        ------
        FileNotFoundError
            The directory or one of its files is missing.
        ValueError
            The files are damaged, or were trained over another teacher, other channels or another gamma.
        """
        path = Path(path)
        config, weights = read_directory(path, cls.__name__)
        found = {
            "base_sha256": weights_digest(teacher.module),
            "channels": list(teacher.channels),
            "gamma": teacher.gamma,
        }
        for name, value in found.items():
            if config.get(name) != value:
                msg = (
                    f"{str(path)!r} was trained over {config.get('base')!r} with {name} {config.get(name)}, the given teacher "
                    f"has {value}: pass the teacher that it was trained over."
                )
                raise ValueError(msg)
        adapter = None
        if config.get("adapter"):
            from ._lora import load_adapter

            teacher, adapter = load_adapter(path / "adapter", teacher)
        try:
            decoder = make_decoder(str(config.get("kind")), teacher, weights)
        except (KeyError, RuntimeError) as error:
            msg = f"Model directory {str(path)!r} is damaged: its decoder does not fit ({error})."
            raise ValueError(msg) from error
        if weights_digest(decoder) != config.get("weights_sha256"):
            msg = f"Model directory {str(path)!r} is damaged: weights and config.json do not belong together."
            raise ValueError(msg)
        return cls(teacher, decoder, kind=str(config["kind"]), adapter=adapter)


def make_decoder(
    kind: str, teacher: PromptedTeacher, weights: dict[str, Tensor] | None = None, *, n_features: int = 0
) -> nn.Module:
    """Decoder of a kind of :data:`DECODERS`, new (of ``n_features``) or with weights."""
    if kind not in DECODERS:
        msg = f"decoder={kind!r} is not among {list(DECODERS)}."
        raise ValueError(msg)
    if kind == "mask":
        decoder = teacher.unprompted_decoder()
    else:
        decoder = DenseDecoder(len(weights["0.weight"]) if weights is not None else n_features)
    if weights is not None:
        decoder.load_state_dict(weights)
    return decoder.requires_grad_(requires_grad=True)


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
