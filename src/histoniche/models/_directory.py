"""A model directory: ``config.json``, ``model.safetensors`` and a model card. Loading executes no code."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1


def write_directory(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    card: str,
    *,
    overwrite: bool,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write a model directory, whole or not at all.

    It is made beside its place and moved there when complete, so that a model of the same name survives a failure.
    ``more`` writes further files to the directory that it is given.
    """
    check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = Path(folder) / "model"
        made.mkdir()
        (made / CONFIG).write_text(
            json.dumps({"format": FORMAT, **config}, indent=2, default=_plain) + "\n", encoding="utf-8"
        )
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, made / WEIGHTS)
        (made / CARD).write_text(card, encoding="utf-8")
        if more is not None:
            more(made)
        if path.exists():
            path.rename(Path(folder) / "replaced")
        made.rename(path)


def _plain(value: Any) -> Any:
    """Python's own type for NumPy's numbers and arrays."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    msg = f"A configuration cannot hold {value!r}, a {type(value).__name__}."
    raise TypeError(msg)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds something else, or a model that must not be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / CONFIG).is_file():
        msg = f"model directory {str(path)!r} exists and is no model directory: choose another place."
        raise FileExistsError(msg)
    if not overwrite:
        msg = f"model directory {str(path)!r} holds a model already: choose another place, or pass overwrite=True."
        raise FileExistsError(msg)


def read_directory(path: Path, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read configuration and weights of a model of the class ``expected``."""
    if not (path / CONFIG).is_file():
        msg = f"{str(path)!r} is no model directory: {CONFIG} is missing."
        raise FileNotFoundError(msg)
    if not (path / WEIGHTS).is_file():
        msg = f"Model directory {str(path)!r} is damaged: {WEIGHTS} is missing. Copy or train the model again."
        raise FileNotFoundError(msg)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(path / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        msg = f"Model directory {str(path)!r} is damaged and cannot be read ({error}). Copy or train the model again."
        raise ValueError(msg) from error
    if not isinstance(config, dict) or config.get("class") != expected:
        found = config.get("class") if isinstance(config, dict) else config
        msg = f"Model directory {str(path)!r} holds a {found!r}, not a {expected!r}."
        raise ValueError(msg)
    if config.get("format") != FORMAT:
        msg = f"Model directory {str(path)!r} has the format {config.get('format')!r}; this version reads {FORMAT}."
        raise ValueError(msg)
    return config, weights


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
