"""Files of a synthetic data set; each is written beside its place and renamed."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ._fields import pixels_digest

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = 1
RECORD, IMAGES, MODEL, CHECKPOINT, PICTURE = "synthetic.json", "images", "model", "training.ckpt", "samples.png"


class Store:
    """Files of a synthetic data set; each is written beside its place and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {}

    def open(self, about: dict[str, Any], fields: list[dict[str, str]]) -> None:
        """Take up a folder of the same settings and fields, or begin one."""
        if (self.folder / RECORD).exists():
            self.load()
            old = {**self.record["settings"], "fields": self.record["training_fields"]}
            new = {**about, "fields": fields}
            differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            if differing:
                parts = [
                    "other training fields" if name == "fields" else f"{name}={old.get(name)}, not {new.get(name)}"
                    for name in differing
                ]
                msg = (
                    f"folder={str(self.folder)!r} holds synthetic images made with {'; '.join(parts)}. Choose another folder, "
                    "or delete this one to start again."
                )
                raise ValueError(msg)
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            msg = f"folder={str(self.folder)!r} holds something else (no {RECORD}): choose a new or an empty folder."
            raise ValueError(msg)
        packages = {name: version(name) for name in ("histoniche", "diffusers", "torch", "numpy")}
        self.record = {
            "format": _FORMAT, "synthetic": True, "settings": about, "training_fields": fields, "packages": packages,
            "weights_sha256": about.get("model"), "copies": None, "images": [],
        }  # fmt: skip
        self.save()

    def load(self) -> None:
        """Read the record, and refuse one that is damaged."""
        path = self.folder / RECORD
        if not path.is_file():
            msg = f"{str(self.folder)!r} is no synthetic data set: {RECORD} is missing."
            raise FileNotFoundError(msg)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != _FORMAT or not record["synthetic"]:
                msg = f"format {record['format']}"
                raise ValueError(msg)
            _ = record["settings"]["channels"], record["settings"]["um_per_px"], record["training_fields"]
            _ = record["copies"], record["weights_sha256"], [(i["file"], i["sha256"]) for i in record["images"]]
        except (KeyError, TypeError, ValueError) as error:
            msg = (
                f"{str(path)!r} is damaged ({type(error).__name__}: {error}): delete the folder to start again, or get a whole "
                "copy."
            )
            raise ValueError(msg) from error
        self.record = record

    def save(self) -> None:
        """Write the record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"{RECORD}.part"
        beside.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.folder / RECORD)

    def path(self, number: int) -> Path:
        """Place of an image."""
        kind = "png" if len(self.record["settings"]["channels"]) in {1, 3} else "tif"
        return self.folder / IMAGES / f"{number:05d}.{kind}"

    def write(self, number: int, image: np.ndarray) -> None:
        """Write an image (c, y, x)."""
        path = self.path(number)
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(f"{path.name}.part")
        if path.suffix == ".png":
            Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)).save(beside, format="png")
        else:
            import tifffile

            tifffile.imwrite(beside, image, photometric="minisblack", planarconfig="separate", metadata={"axes": "CYX"})
        beside.replace(path)

    def read(self, number: int) -> np.ndarray:
        """Read an image, (c, y, x) uint8."""
        path = self.path(number)
        if not path.is_file():
            msg = f"{str(path)!r} is missing. Call synthesize again to make it anew."
            raise FileNotFoundError(msg)
        about = self.record["settings"]
        shape = (len(about["channels"]), about["size_px"], about["size_px"])
        try:
            if path.suffix == ".png":
                with Image.open(path) as opened:
                    image = np.asarray(opened)
                image = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
            else:
                import tifffile

                image = tifffile.imread(path)
        except Exception as error:
            msg = f"{str(path)!r} is damaged ({error}). Call synthesize again to make it anew."
            raise ValueError(msg) from error
        if image.shape != shape or image.dtype != np.uint8:
            msg = f"{str(path)!r} is {image.shape} {image.dtype}, not {shape} uint8. Call synthesize again to make it anew."
            raise ValueError(msg)
        return np.ascontiguousarray(image)

    def missing(self, n: int) -> list[int]:
        """Numbers of images that are not there, cannot be read, or are not those of the record."""
        listed = self.record["images"]
        missing = []
        for number in range(max(n, len(listed))):
            try:
                digest = pixels_digest(self.read(number))
            except (FileNotFoundError, ValueError):
                missing.append(number)
                continue
            if number < len(listed) and listed[number]["sha256"] != digest:
                missing.append(number)
        return missing

    def finished(self, n: int) -> bool:
        """Whether record and picture know ``n`` images."""
        return len(self.record["images"]) >= n and (self.folder / PICTURE).is_file()
