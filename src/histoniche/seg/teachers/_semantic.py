"""A teacher tuned on labels: it needs no prompt any more, and gives all objects of a field at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from histoniche._compute import inference_fabric, memory_kept
from histoniche._random import isolated_rng
from histoniche._settings import settings
from histoniche.models._directory import read_directory, weights_digest, write_directory
from histoniche.models._training import epoch_batches, train
from histoniche.seg._augment import quarter_turned, training_patch, turned_patch
from histoniche.seg._losses import cross_entropy_and_dice
from histoniche.seg._targets import OUTPUTS, maps_of_labels

from ._protocol import Output, check_output
from ._sam import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histoniche.seg._fields import Field

    from ._sam import PromptedTeacher

_WIDTH = 64
_IMAGE_WIDTHS = (16, 32, 64)
_GROUPS = 8
_VIEWS, _LEAST_VIEWS = 96, 2
"""Patches of all fields together, and of each, that a decoder is tuned on."""
_Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


class DenseDecoder(nn.Module):
    """Reads foreground and boundary off an image embedding and the image itself, at twice the embedding's size.

    An embedding has one place for several pixels, and an encoder trained on other images may have dropped what separates
    cells that touch. So a small U-Net sees the image, and is given the embedding where it has its size and half of it.

    Parameters
    ----------
    n_features
        Features of the embedding.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        fine, middle, coarse = _IMAGE_WIDTHS
        self.embedding = nn.Sequential(nn.BatchNorm2d(n_features), *_convolution(n_features, _WIDTH, 1))
        self.down = nn.ModuleList([
            nn.Sequential(nn.BatchNorm2d(3), *_convolution(3, fine), *_convolution(fine, fine)),
            nn.Sequential(*_convolution(fine, middle), *_convolution(middle, middle)),
            nn.Sequential(*_convolution(middle, coarse), *_convolution(coarse, coarse)),
        ])  # fmt: skip
        self.up = nn.ModuleList([
            nn.Sequential(*_convolution(coarse + _WIDTH, _WIDTH)),
            nn.Sequential(*_convolution(_WIDTH + middle + _WIDTH, _WIDTH), *_convolution(_WIDTH, middle)),
            nn.Sequential(*_convolution(middle + fine, middle), nn.Conv2d(middle, len(OUTPUTS), 3, padding=1)),
        ])  # fmt: skip

    def forward(self, embedding: Tensor, rgb: Tensor) -> Tensor:
        """Logits (B, 2, 2h, 2w) of embeddings (B, d, h, w) of images (B, 3, y, x), as the encoder sees them."""
        fine = self.down[0](beside(rgb, embedding))
        middle = self.down[1](F.max_pool2d(fine, 2))
        coarse = self.down[2](F.max_pool2d(middle, 2, ceil_mode=True))
        seen = self.embedding(embedding)
        found = self.up[0](torch.cat([coarse, F.avg_pool2d(seen, 2, ceil_mode=True)], dim=1))
        found = self.up[1](torch.cat([_sized(found, middle), middle, seen], dim=1))
        return self.up[2](torch.cat([_sized(found, fine), fine], dim=1))


def _convolution(n_in: int, n_out: int, width: int = 3) -> list[nn.Module]:
    """A layer whose normalisation does not depend on the batch: a decoder is tuned on few views, four or eight at a time."""
    return [nn.Conv2d(n_in, n_out, width, padding=width // 2), nn.GroupNorm(_GROUPS, n_out), nn.GELU()]


def _sized(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


def beside(rgb: Tensor, embedding: Tensor) -> Tensor:
    """Image (B, 3, y, x) at twice the size of its embedding (B, d, h, w)."""
    size = [2 * length for length in embedding.shape[-2:]]
    return (
        F.interpolate(rgb.float(), size=size, mode="bilinear", antialias=True) if list(rgb.shape[-2:]) != size else rgb
    )


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
        self._fabric = inference_fabric()
        self.decoder = decoder.requires_grad_(requires_grad=False).eval().to(self._fabric.device)
        weights = f"{digest(base.module)} {digest(self.decoder)}"
        self.fingerprint = f"{self.name} {weights} {list(self.channels)} gamma={base.gamma}"

    @torch.inference_mode()
    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field; ``features`` adds what :meth:`hidden` gives."""
        pixels = item.read(self.base.named)
        embedding, inner, hidden = self.base.embed_hidden(pixels) if features else (*self.base.embed(pixels), {})
        rgb, _ = self.base.prepare(pixels)
        with self._fabric.autocast():
            if self.kind == "dense":  # padding would be part of what the decoder normalises by
                logits = self.decoder(self.base.unpadded(embedding, inner), rgb[..., : inner[0], : inner[1]])
            else:
                logits = self.base.unpadded(self.decoder(embedding, rgb), inner)
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
            with isolated_rng(0):  # new layers are drawn before they are filled
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
        decoder = DenseDecoder(len(weights["embedding.0.weight"]) if weights is not None else n_features)
    if weights is not None:
        decoder.load_state_dict(weights)
    return decoder.requires_grad_(requires_grad=True)


def tune(
    fields: Sequence[Field],
    *,
    teacher: PromptedTeacher,
    n_steps: int = 300,
    batch_size: int = 8,
    n_views: int | None = None,
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
        Augmented patches of each field. By default as many as make 96 of all fields together, and two at least: a decoder tuned on more
        patches is a better teacher.
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
        No fields, or fields without labels or with labels of one class; settings out of range.
    """
    fields = list(fields)
    if n_views is None:
        n_views = max(_LEAST_VIEWS, -(-_VIEWS // max(1, len(fields))))
    if not fields or min(n_steps, batch_size, n_views, patch_px) < 1:
        msg = (
            f"tune was given {len(fields)} fields, n_steps={n_steps}, batch_size={batch_size}, n_views={n_views}, "
            f"patch_px={patch_px}: all must be at least 1."
        )
        raise ValueError(msg)
    embeddings, images, maps = _views(fields, teacher, n_views, patch_px, seed)
    rows = np.tile(np.arange(len(maps)), int(np.ceil(batch_size / len(maps))))
    pick = epoch_batches(rows, batch_size, seed)

    def make(step: int) -> _Batch:
        rng = np.random.default_rng([seed, 7, step])
        views = [_turned((embeddings[row], images[row], maps[row]), rng) for row in pick(step)]
        embedding, rgb, wanted = (np.stack(part).astype(np.float32) for part in zip(*views, strict=True))
        return embedding, rgb, wanted

    def loss(net: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        embedding, rgb, wanted = batch
        logits = net(embedding, rgb)
        logits = F.interpolate(logits.float(), size=wanted.shape[-2:], mode="bilinear", align_corners=False)
        return cross_entropy_and_dice(logits, wanted).mean(), {}

    with isolated_rng(seed):
        decoder = DenseDecoder(embeddings.shape[1])
        train(
            decoder, make, loss, n_steps=n_steps, lr=lr, weight_decay=weight_decay, description=f"tune {teacher.name}"
        )
    return SemanticTeacher(teacher, decoder)


def _turned(arrays: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Arrays (c, y, x) of one view, of any grids, mirrored and turned by quarters together: views are few, as each is encoded."""
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    return [quarter_turned(torch.from_numpy(array), turns, mirrored=mirrored).numpy() for array in arrays]


def two_classes(item: Field) -> np.ndarray:
    """Labels of a field, (y, x) int32, some of them foreground and some not."""
    labels = item.read_labels()
    share = (labels > 0).mean()
    if share in {0, 1}:
        msg = f"Field {item.name!r}: its labels have one class only ({'no' if not share else 'all'} foreground)."
        raise ValueError(msg)
    return labels


@memory_kept()
def _views(fields: Sequence[Field], teacher: PromptedTeacher, n_views: int, patch_px: int, seed: int) -> _Batch:
    """Embeddings (n, d, h, w) and images beside them (n, 3, 2h, 2w) float16, maps (n, 2, y, x) float32 of augmented patches.

    The light of every other one is left as it is: views are few, and where all are noisy, a decoder fails on what is not, such as the
    black around the eye's ground.
    """
    n = len(teacher.named)
    embeddings, images, maps = [], [], []
    for row, item in enumerate(tqdm(fields, desc=f"embed for {teacher.name}", disable=not settings.progress)):
        stack = np.concatenate([item.read(teacher.named), maps_of_labels(two_classes(item))])
        for view in range(n_views):
            rng = np.random.default_rng([seed, 4, row, view])
            if view % 2:
                patch = turned_patch(stack, patch_px, rng).clamp(0, 1).numpy()
            else:
                patch = training_patch(stack, n, patch_px, rng).numpy()
            embedding, _ = teacher.embed(patch[:n])
            embeddings.append(embedding[0].half().cpu().numpy())
            images.append(beside(teacher.prepare(patch[:n])[0], embedding)[0].half().cpu().numpy())
            maps.append(patch[n:])
    return np.stack(embeddings), np.stack(images), np.stack(maps)
