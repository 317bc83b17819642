"""Export of a student to ONNX, compared with PyTorch before it is kept."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ._access import need_package
from ._segmenter import Segmenter
from ._students import is_plain_vit

if TYPE_CHECKING:
    from typing import Any

_STRIDE = 32
_TOLERANCE = 1e-4
_BATCHES = ((2, 0), (1, 96))
"""Number of images and px beyond the size of the export, in the two comparisons."""


class _Maps(nn.Module):
    """Student with the sigmoid that makes probabilities of its logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module(pixels).sigmoid()


def export_onnx(
    model: Segmenter | str | Path, path: str | Path, *, size: int | None = None, opset: int = 17, verify: bool = True
) -> Path:
    """Write a student as an ONNX model, and check that it gives the same maps.

    Input ``pixels`` (B, c, y, x) float32, channels stretched to 0 to 1; output ``maps`` (B, 2, y, x) float32,
    probability of foreground and boundary. Number, height and width (multiples of 32) are free; Swin needs at least 64 px.
    A student over a plain ViT (vit-tiny) is bound to the tiles of one ``size`` that it is exported for, best that of its
    training's patches. The metadata say what images the model needs: ``um_per_px``, and in JSON the lists ``channels`` (their
    names, in order), ``stretch`` (percentiles) and ``outputs``, how objects are made of the maps, ``instances``, and
    ``teacher`` with its licence.

    Parameters
    ----------
    model
        Student, or its model directory.
    path
        File to write; one that exists is replaced, when the new one is complete.
    size
        Height and width in px that the model is fixed to, a multiple of 32. By default they are free.
    opset
        Version of ONNX's operators.
    verify
        Whether PyTorch and onnxruntime are compared on random images of two sizes (of one where it is fixed).

    Returns
    -------
    The path.

    Raises
    ------
    FileNotFoundError
        No model directory there.
    ImportError
        onnx, or onnxruntime with ``verify``, is missing.
    RuntimeError
        The maps of ONNX and PyTorch differ by more than 1e-4, or the encoder cannot run at other sizes; nothing is written.
    ValueError
        A damaged model; ``size`` is no multiple of 32, or is not given although the encoder is a plain ViT.
    """
    onnx = need_package("onnx", "onnx", "export to ONNX")
    if verify:
        need_package("onnxruntime", "onnxruntime", "the comparison of an ONNX model with PyTorch")
    if size is not None and (size < _STRIDE or size % _STRIDE):
        msg = f"size={size} must be a multiple of {_STRIDE}."
        raise ValueError(msg)
    segmenter = model if isinstance(model, Segmenter) else Segmenter.load(model)
    vit = is_plain_vit(segmenter.config.encoder)
    if vit and size is None:
        msg = (
            f"The encoder {segmenter.config.encoder!r} is bound to one size in ONNX: name the tiles' width with size=."
        )
        raise ValueError(msg)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    module = _Maps(segmenter.module).cpu().eval()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = Path(folder) / "model.onnx"
        n = len(segmenter.config.channels)
        _export(_of_one_size(module, size) if vit and size else module, made, n, size, opset)
        graph = onnx.load(made)
        onnx.helper.set_model_props(graph, _metadata(segmenter))
        onnx.checker.check_model(graph)
        onnx.save(graph, made)
        if verify:
            _compare(module, made, n, size)
        made.replace(path)
    return path


def _of_one_size(module: nn.Module, size: int) -> nn.Module:
    """Copy whose ViT has the position embeddings of a size: ONNX cannot resize them as timm does."""
    copied: Any = copy.deepcopy(module)
    copied.module.encoder.model.set_input_size(img_size=(size, size))
    return copied


def _export(module: nn.Module, path: Path, n_channels: int, size: int | None, opset: int) -> None:
    free = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    example = torch.zeros(2, n_channels, size or 64, size or 96)
    with warnings.catch_warnings(), torch.inference_mode():
        # Tracing is what exports in seconds and on every torch that the package supports; its notices concern the
        # constants that it makes of sizes, and the comparison tells whether one matters.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (example,), str(path), input_names=["pixels"], output_names=["maps"], opset_version=opset,
            dynamic_axes={"pixels": free, "maps": free}, dynamo=False,
        )  # fmt: skip


def _metadata(segmenter: Segmenter) -> dict[str, str]:
    c = segmenter.config
    return {
        "channels": json.dumps(c.channels),
        "um_per_px": "unknown" if c.um_per_px is None else repr(c.um_per_px),
        "stretch": json.dumps(c.stretch),
        "outputs": json.dumps(c.outputs),
        "instances": json.dumps({
            "threshold": c.threshold, "min_depth": c.min_depth, "smoothing": c.smoothing, "min_area": c.min_area,
        }),
        "teacher": json.dumps(c.teacher),
        "weights_sha256": segmenter.digest,
    }  # fmt: skip


def _compare(module: nn.Module, path: Path, n_channels: int, size: int | None) -> None:
    """Refuse a file whose maps are not those of the module."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for n, more in _BATCHES[: 1 if size else None]:
        shape = (n, n_channels, size or 64 + more, size or 96 + more // 3)
        pixels = rng.random(shape, dtype=np.float32)
        with torch.inference_mode():
            expected = module(torch.from_numpy(pixels)).numpy()
        try:
            found = session.run(None, {"pixels": pixels})[0]
        except Exception as error:
            msg = (
                f"The ONNX model cannot run on images {shape}: its encoder is bound to one size. Export it for tiles of that "
                "size with size=."
            )
            raise RuntimeError(msg) from error
        worst = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        if not worst <= _TOLERANCE:
            msg = (
                f"Maps of ONNX and PyTorch differ by {worst:.2g} on images {shape}, more than {_TOLERANCE:g}: nothing was "
                "written. With an encoder that is bound to one size, export with size=."
            )
            raise RuntimeError(msg)
