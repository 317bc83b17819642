"""Fields of the segmentation benchmark: who teaches, what is learnt from, and what is only measured on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from _readers import read_xenium_pancreas

from histoniche import seg
from histoniche.seg.teachers import LiteMedSAM, Output, Prompts, SemanticTeacher, tune

if TYPE_CHECKING:
    from pathlib import Path

    import dask.array as da
    from xarray import DataTree

    from histoniche.seg import Field
    from histoniche.seg.teachers import Teacher

PATCH = 128
"""Width in px of a patch that is labelled, or that the teacher segments."""
TEST = 256
"""Width in px of a field that is measured on."""
N_TRANSFER, N_TUNE, TUNING_STEPS = {"bbbc038": 280, "pancreas": 192}, 128, 400
FEWEST = 3
"""A labelled patch has so many objects, or more; transfer patches may be empty, as images may."""
STAINS = ("DAPI", "boundary", "18S")
BANDS = {"tune": (0.0, 0.28), "transfer": (0.30, 0.60), "validation": (0.62, 0.70), "test": (0.72, 1.0)}
"""Parts of the height of the pancreas: labels that the teacher was tuned on, patches that it teaches on, held-out parts.

Tumour lies on the left and lobules on the right, so bands from left to right hold all tissues."""


@dataclass
class Split:
    """Fields of one data set.

    Attributes
    ----------
    channel
        What students see.
    transfer
        Patches that the teacher segments; a run's labelled patches are drawn from them too.
    held_out
        ``"validation"`` and ``"test"``: fields of images, or parts of the tissue, that nothing else is drawn from.
    teacher
        The teacher.
    others
        Other teachers to be measured beside it.
    """

    channel: str
    transfer: list[Field]
    held_out: dict[str, list[Field]]
    teacher: Teacher
    others: dict[str, Teacher]

    def labelled(self, n: int, seed: int) -> list[Field]:
        """Labelled patches of a run, drawn from those with some objects."""
        worth = [item for item in self.transfer if len(np.unique(item.read_labels())) > FEWEST]
        return [worth[row] for row in np.random.default_rng([seed, 11]).permutation(len(worth))[:n]]


def bbbc038(data: Path, folder: Path) -> Split:
    """BBBC038, all kinds of images, split by image; the teacher is LiteMedSAM as it comes, asked by boxes (oracle)."""
    del folder
    every = seg.read_bbbc038(data / "bbbc038" / "stage1_train.zip", kinds=("fluorescence", "brightfield", "histology"))
    images = [item for item in every if min(item.shape) >= TEST]
    rng = np.random.default_rng(38)
    images = [images[row] for row in rng.permutation(len(images))]
    held_out = {"test": images[:24], "validation": images[24:36]}
    held_out = {part: [item.crop(0, 0, TEST, TEST) for item in fields] for part, fields in held_out.items()}
    transfer = []
    for item in images[52 : 52 + N_TRANSFER["bbbc038"]]:
        y, x = (int(rng.integers(length - PATCH + 1)) for length in item.shape)
        transfer.append(item.crop(y, x, PATCH, PATCH))
    teacher = LiteMedSAM(["DNA"], prompts=Prompts("boxes"))
    return Split("DNA", transfer, held_out, teacher, {})


def pancreas(data: Path, folder: Path) -> Split:
    """Xenium pancreas, whole cells, split by parts of its height.

    The teacher is LiteMedSAM on three stains with a decoder trained on labelled patches of a part of its own, kept in the folder.
    """
    sdata = read_xenium_pancreas(data / "xenium_pancreas", shapes=True)
    xy = np.asarray(sdata.tables["table"].obsm["spatial"])
    (whole,) = seg.fields_from_sdata(sdata, image_key="morphology")
    um = whole.um_per_px or 1.0
    names = dict(zip(whole.channels, (*STAINS, "alphaSMA/vimentin"), strict=True))
    # The figures were made with the contrast of a coarse scale, not with that of the full resolution.
    limits = replace(whole, image=coarse_scale(sdata["morphology"]), limits=None).stretch_limits()

    def take(part: str, n: int, width: int, seed: int) -> list[Field]:
        """Squares around cells drawn at random from a part, the whole square inside it."""
        low, high = (edge * whole.shape[0] * um for edge in BANDS[part])
        half, right = width * um / 2, whole.shape[1] * um
        inside = (xy[:, 1] > low + half) & (xy[:, 1] < high - half) & (xy[:, 0] > half) & (xy[:, 0] < right - half)
        centers = xy[np.random.default_rng(seed).choice(np.flatnonzero(inside), n, replace=False)]
        corners = np.round(centers / um - width / 2).astype(int)
        regions = [(x * um, y * um, (x + width) * um, (y + width) * um) for x, y in corners]
        found = seg.fields_from_sdata(sdata, image_key="morphology", shapes_key="cell_boundaries", regions=regions)
        return [
            replace(item, image=np.asarray(item.image), channels=tuple(names[c] for c in item.channels), limits=limits)
            for item in found
        ]

    untuned = LiteMedSAM(STAINS, prompts=Prompts("boxes"))
    if not (folder / "tuned").exists():
        tune(take("tune", N_TUNE, PATCH, 1), teacher=untuned, n_steps=TUNING_STEPS).save(folder / "tuned")
    teacher = SemanticTeacher.load(folder / "tuned", teacher=untuned)
    held_out = {"test": take("test", 24, TEST, 4), "validation": take("validation", 10, TEST, 3)}
    return Split(
        "DAPI",
        take("transfer", N_TRANSFER["pancreas"], PATCH, 2),
        held_out,
        teacher,
        {"boxes, not tuned": untuned},
    )


def coarse_scale(tree: DataTree) -> da.Array:
    """Coarsest scale (c, y, x) of an image with at least 250,000 pixels."""
    scales = [next(iter(tree[name].ds.values())).data for name in tree.children]
    return next(scale for scale in reversed(scales) if scale[0].size >= 250_000)


def teacher_maps(teacher: Teacher, item: Field) -> np.ndarray:
    """Maps (2, y, x) of a larger field, patch by patch; boxes are cut where a patch ends."""
    maps = np.zeros((2, *item.shape), dtype=np.float32)
    for y in range(0, item.shape[0], PATCH):
        for x in range(0, item.shape[1], PATCH):
            patch = item.crop(y, x, PATCH, PATCH)
            maps[:, y : y + PATCH, x : x + PATCH] = teacher(patch).maps
    return maps


class Recorded:
    """What a teacher said of fields, by their name: so that it is made, and asked, once."""

    def __init__(self, teacher: dict[str, str], maps: dict[str, np.ndarray]) -> None:
        self.name, self.licence, self.fingerprint = teacher["name"], teacher["licence"], teacher["fingerprint"]
        self.maps = maps

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        """Maps of a field."""
        del features
        return Output(self.maps[item.name].astype(np.float32))


def save_split(split: Split, maps: list[np.ndarray], folder: Path) -> None:
    """Keep fields, the teacher's maps of the transfer fields, and who the teacher is."""
    for part, fields in {"transfer": split.transfer, **split.held_out}.items():
        arrays = {}
        for i, item in enumerate(fields):
            arrays |= {f"{i}.image": np.asarray(item.image), f"{i}.labels": item.read_labels()}
            arrays[f"{i}.limits"] = item.stretch_limits()
        np.savez_compressed(folder / f"{part}.npz", **arrays)
    np.savez_compressed(folder / "maps.npz", np.stack(maps).astype(np.float16))
    about = {
        "channel": split.channel, "channels": list(split.transfer[0].channels), "um_per_px": split.transfer[0].um_per_px,
        **{part: [item.name for item in fields] for part, fields in {"transfer": split.transfer, **split.held_out}.items()},
        "teacher": {name: getattr(split.teacher, name) for name in ("name", "licence", "fingerprint")},
    }  # fmt: skip
    (folder / "split.json").write_text(json.dumps(about, indent=1))


def load_split(folder: Path) -> Split:
    """Read what :func:`save_split` kept."""
    about = json.loads((folder / "split.json").read_text())
    parts = {}
    for part in ("transfer", "validation", "test"):
        with np.load(folder / f"{part}.npz", allow_pickle=False) as arrays:
            parts[part] = [
                seg.Field(
                    name, arrays[f"{i}.image"], tuple(about["channels"]), arrays[f"{i}.labels"], about["um_per_px"],
                    arrays[f"{i}.limits"],
                )
                for i, name in enumerate(about[part])
            ]  # fmt: skip
    with np.load(folder / "maps.npz", allow_pickle=False) as arrays:
        maps = dict(zip(about["transfer"], arrays["arr_0"], strict=True))
    return Split(about["channel"], parts.pop("transfer"), parts, Recorded(about["teacher"], maps), {})


SPLITS = {"bbbc038": bbbc038, "pancreas": pancreas}
