"""CellSAM, through the package of its authors, which is no dependency: token and licence are the user's."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histoniche._compute import inference_fabric
from histoniche.seg._access import TeacherAccessError
from histoniche.seg._targets import maps_of_labels

from ._protocol import Output, check_output
from ._sam import digest

if TYPE_CHECKING:
    from histoniche.seg._fields import Field

TOKEN = "DEEPCELL_ACCESS_TOKEN"
"""Environment variable that the package reads its token from."""
_LICENCE = "CellSAM's modified Apache License 2.0: non-commercial academic use only"
_HELP = (
    "CellSAM is no dependency of this package. Install: pip install git+https://github.com/vanvalenlab/cellSAM.git. Weights: "
    f"make a token at https://users.deepcell.org and set {TOKEN} before the first use, with network; they are then kept in "
    "~/.deepcell/models. Licence: non-commercial academic use only, which students that learn from it inherit."
)


class CellSAM:
    """CellSAM: SAM's ViT-B with a detector of cells, which finds its prompts itself.

    It sees (y, x, 3) with the channels *blank, nuclear, membrane*, in this order, and gives labels, whose maps are 0 or 1.

    Parameters
    ----------
    nuclear
        Nuclear channel.
    membrane
        Channel of membrane or cytoplasm, which shows whole cells; without one, nuclei are segmented.
    model
        Weights, as the package names them: ``"cellsam_general"``, those of the publication, or ``"cellsam_extra"``.
    weights
        File with weights that were had before, read instead; it must hold all parameters, and tensors alone.
    bbox_threshold
        Least confidence, 0 to 1, of a detected cell.

    Raises
    ------
    ImportError
        The package is missing; the message says how to install it, and what the licence allows.
    TeacherAccessError
        Token, network or weights are missing, or weights are damaged or another network's; the message says what to do.

    References
    ----------
    CellSAM: Israel et al. 2023, doi 10.1101/2023.11.17.567630.
    """

    def __init__(
        self,
        nuclear: str,
        *,
        membrane: str | None = None,
        model: str = "cellsam_general",
        weights: Path | str | None = None,
        bbox_threshold: float = 0.4,
    ) -> None:
        if not 0 <= bbox_threshold <= 1:
            msg = f"bbox_threshold={bbox_threshold} must lie in 0 to 1."
            raise ValueError(msg)
        self.channels = (nuclear,) if membrane is None else (nuclear, membrane)
        self.bbox_threshold = bbox_threshold
        self.name, self.licence = model if weights is None else f"cellsam {Path(weights).name}", _LICENCE
        self._package = _import_cellsam()
        self.module = _load(self._package, model, weights).requires_grad_(requires_grad=False).eval()
        # The package knows CPU and CUDA alone.
        self._device = "cuda" if inference_fabric().device.type == "cuda" else "cpu"
        self._weights = digest(self.module)

    @property
    def fingerprint(self) -> str:
        """Weights, channels and threshold."""
        return f"cellsam {self._weights} {list(self.channels)} bbox_threshold={self.bbox_threshold}"

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Segment a field; ``features`` adds the image embedding as ``"embedding"``, which needs a field with cells."""
        image = np.zeros((*item.shape, 3), dtype=np.float32)
        image[..., 1 : 1 + len(self.channels)] = np.moveaxis(item.read(self.channels), 0, -1)
        labels, embedding = self._segment(image)
        if labels.shape != item.shape:
            msg = f"CellSAM gave labels of the shape {labels.shape} for field {item.name!r} of {item.shape}."
            raise ValueError(msg)
        if features and embedding is None:
            msg = f"CellSAM found no cell in field {item.name!r}, and then gives no features: leave the field out."
            raise ValueError(msg)
        hidden = {"embedding": np.asarray(embedding, dtype=np.float32)[0]} if features else {}
        return check_output(Output(maps_of_labels(labels), hidden), item, self.name)

    def _segment(self, image: np.ndarray) -> tuple[np.ndarray, Any]:
        """Labels (y, x) int32 and embedding, ``None`` where no cell was found."""
        nothing = np.zeros(image.shape[:2], dtype=np.int32), None
        try:
            with warnings.catch_warnings():
                # It warns of every doubtful cell that it drops, and of images without cells.
                warnings.filterwarnings("ignore", "Low IOU threshold|No cells detected", UserWarning)
                labels, embedding, _ = self._package.segment_cellular_image(
                    image, model=self.module, normalize=True, bbox_threshold=self.bbox_threshold, device=self._device
                )
        except AttributeError as error:
            # Without any cell, versions up to 0.0.dev1 hand None on to `fill_holes_and_remove_small_masks`.
            if "'NoneType' object has no attribute 'ndim'" not in str(error):
                raise
            return nothing
        return nothing if embedding is None else (np.asarray(labels).astype(np.int32), embedding)


def _import_cellsam() -> Any:
    try:
        return import_module("cellSAM")
    except ImportError as error:
        msg = f"The teacher CellSAM needs the package cellSAM ({error}). {_HELP}"
        raise ImportError(msg) from error


def _load(package: Any, model: str, weights: Path | str | None) -> Any:
    """Have the package load its weights, or say what is missing."""
    if weights is not None:
        return _load_file(package, Path(weights))
    try:
        return package.get_model(model)
    except (OSError, ValueError) as error:  # no token: ValueError; no network or a bad token: errors of requests
        token = "set" if os.environ.get(TOKEN) else "not set"
        msg = f"CellSAM's weights {model!r} cannot be had ({_first_line(error)}; {TOKEN} is {token}). {_HELP}"
        raise TeacherAccessError(msg) from None  # the package puts the token into its errors
    except Exception as error:  # of files that are cut torch raises errors of many types
        msg = f"CellSAM's weights {model!r} are damaged ({_first_line(error)}): delete them there, and load them again. {_HELP}"
        raise TeacherAccessError(msg) from error


def _load_file(package: Any, path: Path) -> Any:
    """Have the package load a file that holds what it needs: it passes over what is missing."""
    if not path.is_file():
        msg = f"CellSAM's weights {str(path)!r} do not exist. {_HELP}"
        raise TeacherAccessError(msg)
    try:
        names = _names_of_weights(path)
        module = package.get_local_model(str(path))
    except Exception as error:  # of files that are cut, or something else, torch raises errors of many types
        msg = f"CellSAM's weights {str(path)!r} are damaged, or none ({_first_line(error)}). {_HELP}"
        raise TeacherAccessError(msg) from error
    copied = any(name.startswith("model_cp.") for name in names)  # a second copy of SAM, which may be left out
    needed = [name for name, _ in module.named_parameters() if copied or not name.startswith("model_cp.")]
    missing = [name for name in needed if name not in names]
    if missing:
        msg = (
            f"CellSAM's weights {str(path)!r} lack {len(missing)} of the {len(needed)} parameters, such as {missing[0]!r}: they "
            f"belong to another network or version. {_HELP}"
        )
        raise TeacherAccessError(msg)
    return module


def _names_of_weights(path: Path) -> set[str]:
    """Names of a file's tensors, which lie at the top or, as the package knows, one level down."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict):
        msg = f"it holds a {type(stored).__name__}, not tensors by name"
        raise TypeError(msg)
    return {str(name) for name in stored}


def _first_line(error: BaseException) -> str:
    return (_without_token(str(error)).strip() or type(error).__name__).split("\n")[0]


def _without_token(text: str) -> str:
    token = os.environ.get(TOKEN)
    return text.replace(token, "***") if token else text
