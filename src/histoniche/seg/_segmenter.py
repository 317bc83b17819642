"""A trained student: from one channel, or a few, to objects; saved as other models of the package are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from histoniche._compute import inference_fabric
from histoniche.models._directory import read_directory, weights_digest, write_directory

from ._augment import padded
from ._fields import STRETCH
from ._instances import instances
from ._students import DECODER_CHANNELS, STUDENTS, build_student, count_parameters, is_plain_vit
from ._targets import OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._fields import Field

_STRIDE = 32


@dataclass
class SegmenterConfig:
    """What a student is made of, and the images that it must be given.

    Attributes
    ----------
    encoder
        Name of the student, or of a timm model.
    channels
        Channels that it sees, in this order.
    um_per_px
        Resolution that it was trained at; ``None`` where that is unknown.
    stretch
        Percentiles of the image that become 0 and 1.
    decoder_channels
        Widths of the decoder.
    outputs
        Maps that it predicts.
    threshold, min_depth, smoothing, min_area
        How objects are made of the maps, see :func:`histoniche.seg.instances`.
    teacher
        Name and licence of the teacher; empty without one.
    training
        Settings of the training, and figures measured, for the model card.

    Raises
    ------
    ValueError
        A value of another type, or out of range.
    """

    encoder: str
    channels: list[str]
    um_per_px: float | None = None
    stretch: list[float] = field(default_factory=lambda: list(STRETCH))
    decoder_channels: list[int] = field(default_factory=lambda: list(DECODER_CHANNELS))
    outputs: list[str] = field(default_factory=lambda: list(OUTPUTS))
    threshold: float = 0.5
    min_depth: float = 1.0
    smoothing: float = 1.0
    min_area: int = 16
    teacher: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that would fail, or give wrong maps, when the student is used."""
        self._need("encoder", _is_text(self.encoder), "a name")
        self._need("channels", _is_list(self.channels, _is_text) and len(set(self.channels)) == len(self.channels) > 0,
                   "a list of one name or more, each once")  # fmt: skip
        self._need("um_per_px", self.um_per_px is None or 0 < _number(self.um_per_px) < np.inf, "positive, or None")
        self._need("stretch", _is_list(self.stretch, _is_number) and len(self.stretch) == 2
                   and 0 <= self.stretch[0] < self.stretch[1] <= 100, "two percentiles that rise, 0 to 100")  # fmt: skip
        widths = self.decoder_channels
        self._need("decoder_channels", _is_list(widths, _is_whole) and len(widths) > 0 and min(widths) > 0,
                   "a list of whole numbers from 1")  # fmt: skip
        self._need("outputs", _is_list(self.outputs, _is_text) and tuple(self.outputs) == OUTPUTS, f"{list(OUTPUTS)}")
        self._need("threshold", 0 <= _number(self.threshold) <= 1, "a number from 0 to 1")
        self._need("min_depth", 0 <= _number(self.min_depth) < np.inf, "a number from 0")
        self._need("smoothing", 0 <= _number(self.smoothing) < np.inf, "a number from 0")
        self._need("min_area", _is_whole(self.min_area) and self.min_area >= 0, "a whole number from 0")
        named = isinstance(self.teacher, dict) and all(map(_is_text, (*self.teacher, *self.teacher.values())))
        self._need("teacher", named and (not self.teacher or {"name", "licence"} <= set(self.teacher)),
                   "a dict of texts, 'name' and 'licence' among them, or empty")  # fmt: skip
        self._need("training", isinstance(self.training, dict), "a dict")
        for name in ("channels", "stretch", "decoder_channels", "outputs"):
            setattr(self, name, list(getattr(self, name)))

    def _need(self, name: str, good: object, needed: str) -> None:
        if not good:
            msg = f"Segmenter configuration: {name}={getattr(self, name)!r}; {needed} is needed."
            raise ValueError(msg)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """The number, or nan, which lies in no range."""
    return float(value) if _is_number(value) else np.nan


def _is_list(values: object, good: Callable[[object], bool]) -> bool:
    return isinstance(values, list | tuple) and all(map(good, values))


class Segmenter:
    """A student that segments one channel, or a few.

    Parameters
    ----------
    config
        Configuration.
    pretrained
        Whether the encoder starts from ImageNet weights; an error where they cannot be had.
    weights
        Local file with the encoder's weights, instead of the hub's.
    seed
        Seed of the weights that are drawn.

    Attributes
    ----------
    config
        Configuration.
    module
        The torch module: (B, c, y, x) in 0 to 1, y and x multiples of 32, to logits (B, 2, y, x).
    history
        Figures of the training, one list per figure and one value per step; empty after loading. ``loss``, the terms by name,
        and where their weights are learnt ``s <term>``: the term's weight is exp(-s) / 2. With validation fields also
        ``validation``, the mean squared error of both maps, one value a look.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        *,
        pretrained: bool = False,
        weights: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.history: dict[str, list[float]] = {}
        self.module: nn.Module = (
            build_student(
                config.encoder, pretrained=pretrained, weights=weights,
                decoder_channels=tuple(config.decoder_channels), n_channels=len(config.channels), seed=seed,
            )
            .to(memory_format=torch.channels_last)
            .eval()
        )  # fmt: skip

    def __repr__(self) -> str:
        """One line: encoder, channels, resolution, parameters."""
        c = self.config
        scale = "unknown um/px" if c.um_per_px is None else f"{c.um_per_px:.3g} um/px"
        seen = ", ".join(c.channels)
        return f"Segmenter({c.encoder!r}, channels=[{seen}], {scale}, {self.n_parameters / 1e6:.1f} M parameters)"

    @property
    def n_parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.module)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.module)

    @torch.inference_mode()
    def predict_maps(self, pixels: np.ndarray) -> np.ndarray:
        """Probability maps of images in memory.

        Parameters
        ----------
        pixels
            (B, c, y, x) float32, channels stretched to 0 to 1.

        Returns
        -------
        (B, 2, y, x) float32: foreground and boundary.
        """
        fabric = inference_fabric()
        module = self.module.to(fabric.device).eval()
        x = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).to(fabric.device)
        with fabric.autocast():
            logits: Tensor = module(padded(x, _STRIDE).contiguous(memory_format=torch.channels_last))
        return logits.float().sigmoid()[..., : x.shape[-2], : x.shape[-1]].cpu().numpy()

    def predict(self, item: Field) -> np.ndarray:
        """Objects of a field that fits into memory; whole slides are for :func:`histoniche.seg.segment`.

        Parameters
        ----------
        item
            Field with the channels of the configuration.

        Returns
        -------
        (y, x) int32: 0 is background.

        Raises
        ------
        KeyError
            The field has no such channel.
        ValueError
            Its um/px is not that of the student.
        """
        return self.instances(self.predict_field(item))

    def predict_field(self, item: Field) -> np.ndarray:
        """Maps of a field that fits into memory.

        Parameters
        ----------
        item
            Field with the channels of the configuration.

        Returns
        -------
        (2, y, x) float32: foreground and boundary. A structure that has no objects, such as vessels, is where foreground
        exceeds the configuration's ``threshold``.

        Raises
        ------
        KeyError
            The field has no such channel.
        ValueError
            Its um/px is not that of the student.
        """
        check_scale(self.config.um_per_px, item.um_per_px, f"field {item.name!r}")
        return self.predict_maps(item.read(self.config.channels, percentiles=self.config.stretch)[None])[0]

    def instances(self, maps: np.ndarray) -> np.ndarray:
        """Objects of maps (2, y, x), with the settings of the configuration: (y, x) int32."""
        c = self.config
        return instances(maps, threshold=c.threshold, min_depth=c.min_depth, smoothing=c.smoothing, min_area=c.min_area)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md`` (the model card) to a directory.

        Parameters
        ----------
        path
            Directory, made where it does not exist.
        overwrite
            Whether a model that lies there is replaced.

        Raises
        ------
        FileExistsError
            The directory holds a model and ``overwrite`` is false, or holds something else.
        """
        config = {"class": type(self).__name__, "weights_sha256": self.digest, **asdict(self.config)}
        write_directory(Path(path), config, self.module.state_dict(), self.card(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Segmenter:
        """Read a model directory; executes no code from it.

        Parameters
        ----------
        path
            Directory that :meth:`save` wrote.

        Returns
        -------
        The student.

        Raises
        ------
        FileNotFoundError
            The directory or one of its files is missing.
        ValueError
            The files are damaged, do not belong together, or hold another class.
        """
        if not isinstance(path, str | Path):
            msg = f"A Segmenter, or the folder of one, is needed, not {type(path).__name__}."
            raise TypeError(msg)
        path = Path(path)
        config, weights = read_directory(path, cls.__name__)
        sha = config.pop("weights_sha256", None)
        try:
            known = {name: config[name] for name in SegmenterConfig.__dataclass_fields__}
            model = cls(SegmenterConfig(**known))
            model.module.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            msg = (
                f"Model directory {str(path)!r} is damaged: its configuration does not fit its weights or is none of a "
                f"student ({error}). Copy or train the model again."
            )
            raise ValueError(msg) from error
        if model.digest != sha:
            msg = f"Model directory {str(path)!r} is damaged: weights and config.json do not belong together."
            raise ValueError(msg)
        return model

    def card(self) -> str:
        """Model card, in Markdown."""
        c = self.config
        paper = f" (published: {STUDENTS[c.encoder][1]:g} M)" if c.encoder in STUDENTS else ""
        seen = ", ".join(f"`{name}`" for name in c.channels)
        kind = "DPT" if is_plain_vit(c.encoder) else "U-Net"
        lines = [
            "# Segmentation student",
            "",
            f"Segments {seen}: {kind} over `{c.encoder}`, {self.n_parameters / 1e6:.2f} M parameters{paper}.",
            "",
            f"- resolution: {'unknown' if c.um_per_px is None else f'{c.um_per_px:g} um/px'}",
            f"- values: percentiles {c.stretch[0]:g} and {c.stretch[1]:g} of the image become 0 and 1",
            f"- maps: {', '.join(c.outputs)}",
            f"- objects: foreground above {c.threshold:g}, seeds {c.min_depth:g} px deep, at least {c.min_area} px",
        ]
        if c.teacher:
            lines += [
                f"- teacher: {c.teacher['name']}; its licence, **{c.teacher['licence']}**, may reach this student",
            ]
        lines += ["", "## Training", ""]
        lines += [f"- {name}: {value}" for name, value in c.training.items()] or ["Not recorded."]
        return "\n".join(lines) + "\n"


def check_scale(expected: float | None, found: float | None, what: str, *, most: float = 1.5) -> None:
    """Refuse images whose um/px is more than ``most`` times finer or coarser than what a model was trained at."""
    if expected is None or found is None:
        if (expected is None) != (found is None):
            msg = (
                f"{what} has um/px {found}, the student was trained at {expected}: where only one is known, objects may have "
                "any size. Give um_per_px, or None for both."
            )
            raise ValueError(msg)
        return
    ratio = max(expected / found, found / expected)
    if ratio > most:
        msg = (
            f"{what} has {found:.4g} um/px, the student was trained at {expected:.4g}: {ratio:.2f} times apart, more than "
            f"{most:g}. Resample the image to the student's resolution."
        )
        raise ValueError(msg)
