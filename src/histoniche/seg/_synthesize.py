"""Synthetic images in the likeness of a few real ones, kept as a data set with its provenance."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from histoniche._settings import settings

from ._access import need_package
from ._copies import COMPARED_PX, QUANTILE, SHARE, copy_ratios, draw, is_flat, patch_grid, real_ratios, reduced
from ._diffusion import NOISE_STEPS, Diffusion
from ._fields import Field, pixels_digest
from ._synthetic_store import CHECKPOINT, IMAGES, MODEL, PICTURE, RECORD, Store

if TYPE_CHECKING:
    from collections.abc import Sequence


MOST_IMAGES = 3000
_SCALE_TOLERANCE = 1.1
_DDIM_STEPS = [n for n in range(1, NOISE_STEPS + 1) if NOISE_STEPS % n == 0]


def synthesize(
    fields: Sequence[Field],
    *,
    folder: str | Path,
    n_images: int = 1000,
    size_px: int = 64,
    channels: Sequence[str] | None = None,
    n_steps: int = 2000,
    batch_size: int = 8,
    lr: float = 1e-3,
    width: Sequence[int] = (32, 64, 64),
    ddim_steps: int = 50,
    model: Diffusion | str | Path | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
) -> list[Field]:
    """Train a diffusion model on a few fields and make images like theirs, a transfer set for distillation.

    The model sees random windows of the stretched images, turned and mirrored; never labels.

    Each synthetic image is compared with all patches of the fields (turned and mirrored, averaged to 16 px). An image made afresh is
    about as near to one field as to another, a copy much nearer to one: where the ratio of both distances is below the 1 %
    quantile of that of real patches (compared without their own field), the image may be a copy. Copies are reported, not dropped.

    The folder holds ``images/``, ``synthetic.json`` (provenance, hash of each image, its nearest training patch), ``model/``
    (as diffusers writes it) and ``samples.png``, a picture to look at: synthetic images above their nearest training patches.
    A call that was interrupted goes on where it was, and one that asks for more images adds them.

    Parameters
    ----------
    fields
        Real images, at least as large as ``size_px``. All labels are ignored.
    folder
        Where the data set is kept: a new or empty folder, or one of the same fields and settings.
    n_images
        Number of images, 0 to 3000. With 0 nothing is trained or written.
    size_px
        Width of the images in px, a multiple of ``2 ** (len(width) - 1)``.
    channels
        Channels to make; by default all, which the fields must then share.
    n_steps, batch_size, lr
        Schedule of the training.
    width
        Channels of the network at each of its resolutions, multiples of 8.
    ddim_steps
        Steps from noise to image, a divisor of the 1000 of the diffusion: others would leave noise in the images.
    model
        Instead of training: a trained model, or the directory ``model`` of another folder.
    checkpoint_every
        Training steps from one saved state to the next.
    seed
        Decides all that is random. On a CPU the images are the same bit for bit, whatever ``n_images``.

    Returns
    -------
    ``n_images`` fields named ``synthetic-00000`` and so on: (c, size_px, size_px) uint8 in memory, limits 0 and 255, the um/px of
    the training fields, no labels.

    Raises
    ------
    FileNotFoundError
        ``model`` names no model.
    ImportError
        diffusers is missing.
    KeyError
        A field without one of the channels.
    ValueError
        No fields; fields of different channels or um/px; images smaller than ``size_px``; constant channels; settings out of
        range; a model of another kind; a folder that holds something else, or images of other fields or settings.

    Warns
    -----
    UserWarning
        More than 5 % of the images may be copies, or too few training patches lie apart, so that copies cannot be told.

    References
    ----------
    Ho et al. 2020, arXiv 2006.11239 (DDPM); Song et al. 2021, arXiv 2010.02502 (DDIM); Salimans and Ho 2022, arXiv 2202.00512
    (prediction of the velocity); Liang et al., arXiv 2503.06976 (synthetic transfer sets).
    """
    fields = list(fields)
    names = check_synthesis(
        fields, channels=channels, size_px=size_px, n_images=n_images, n_steps=n_steps, batch_size=batch_size,
        ddim_steps=ddim_steps, checkpoint_every=checkpoint_every, lr=lr, seed=seed,
    )  # fmt: skip
    if n_images == 0:
        return []
    if model is None:
        diffusion = Diffusion(len(names), size_px, width=width, seed=seed)
    else:
        diffusion = model if isinstance(model, Diffusion) else Diffusion.load(model)
    if (diffusion.n_channels, diffusion.size_px) != (len(names), size_px):
        msg = f"model={diffusion!r} does not make images of the channels {names} and size_px={size_px}."
        raise ValueError(msg)
    pixels = [np.round(item.read(names) * 255).astype(np.uint8) for item in fields]
    trained: dict[str, Any] = {"n_steps": int(n_steps), "batch_size": int(batch_size), "lr": float(lr)}
    trained["width"] = [int(w) for w in width]
    if model is not None:
        trained = {"model": diffusion.digest}
    store, scale = Store(Path(folder)), fields[0].um_per_px
    store.open(
        {
            "size_px": int(size_px), "channels": names, "um_per_px": None if scale is None else float(scale), **trained,
            "ddim_steps": int(ddim_steps), "seed": int(seed),
        },
        [{"name": item.name, "sha256": pixels_digest(image)} for item, image in zip(fields, pixels, strict=True)],
    )  # fmt: skip
    missing = store.missing(n_images)
    if missing:
        if model is None:
            diffusion = _trained(
                diffusion, store, pixels, n_steps=n_steps, batch_size=batch_size, lr=lr, seed=seed,
                checkpoint_every=checkpoint_every,
            )  # fmt: skip
        elif not (store.folder / MODEL).exists():
            diffusion.save(store.folder / MODEL)
        made = diffusion.sample(missing, ddim_steps=ddim_steps, seed=seed)
        for number, image in tqdm(made, total=len(missing), desc="synthesize", disable=not settings.progress):
            store.write(number, image)
    if missing or not store.finished(n_images):
        _compare(store, fields, pixels, n_images)
    _warn(store.record["copies"])
    return read_synthetic(folder)[:n_images]


def read_synthetic(folder: str | Path) -> list[Field]:
    """Read the images that :func:`histoniche.seg.synthesize` made.

    Parameters
    ----------
    folder
        Folder of the data set.

    Returns
    -------
    Fields, as ``synthesize`` returns them.

    Raises
    ------
    FileNotFoundError
        There is no ``synthetic.json``, or an image is missing.
    ValueError
        ``synthetic.json`` is damaged, an image is not the one that it lists, or images lie there that it does not list.
    """
    store = Store(Path(folder))
    store.load()
    about = store.record["settings"]
    listed = store.record["images"]
    extra = sorted({path.name for path in (store.folder / IMAGES).glob("*.*")} - {Path(i["file"]).name for i in listed})
    extra = [name for name in extra if not name.endswith(".part")]
    if extra:
        msg = (
            f"{str(store.folder)!r} holds {len(extra)} images that {RECORD} does not list, such as {extra[0]}: making them was "
            "interrupted. Call synthesize again with the same settings to finish."
        )
        raise ValueError(msg)
    found = []
    for number, entry in enumerate(listed):
        image = store.read(number)
        if pixels_digest(image) != entry["sha256"]:
            msg = f"{str(store.path(number))!r} is not the image that {RECORD} lists. Call synthesize again to make it anew."
            raise ValueError(msg)
        limits = np.tile(np.array([0, 255], dtype=np.float32), (len(image), 1))
        name = f"synthetic-{number:05d}"
        found.append(Field(name, image, tuple(about["channels"]), um_per_px=about["um_per_px"], limits=limits))
    return found


def _trained(
    diffusion: Diffusion, store: Store, pixels: list[np.ndarray], *, checkpoint_every: int, **schedule: Any
) -> Diffusion:
    """The model of the folder; trained where there is none."""
    place, checkpoint = store.folder / MODEL, store.folder / CHECKPOINT
    sha = store.record["weights_sha256"]
    if sha is None:
        diffusion.fit(pixels, checkpoint=checkpoint, checkpoint_every=checkpoint_every, **schedule)
        diffusion.save(place)
        store.record["weights_sha256"] = diffusion.digest
        store.save()
    else:
        diffusion = Diffusion.load(place)
        if diffusion.digest != sha:
            msg = f"{str(place)!r} is not the model that {RECORD} lists: delete the folder to start again."
            raise ValueError(msg)
    checkpoint.unlink(missing_ok=True)
    return diffusion


def _compare(store: Store, fields: list[Field], pixels: list[np.ndarray], n: int) -> None:
    """Find the nearest training patch of each image; complete the record, and draw the picture."""
    size = store.record["settings"]["size_px"]
    images = np.stack([store.read(number) for number in range(max(n, len(store.record["images"])))])
    compared, grid = reduced(images), patch_grid(pixels, size)
    found, others, ratios = copy_ratios(compared, grid)
    real_rms, real = real_ratios(grid)
    limit = float(np.quantile(real, QUANTILE)) if len(real) else None
    copies = np.zeros(len(images), dtype=bool) if limit is None else (ratios < limit) & ~is_flat(compared)
    draw(store.folder / PICTURE, images, grid=grid, found=found, ratios=ratios)
    store.record["images"] = [
        {
            "file": store.path(number).relative_to(store.folder).as_posix(), "sha256": pixels_digest(images[number]),
            "nearest_rms": _number(found.distances[number]), "other_rms": _number(others[number]),
            "ratio": _number(ratios[number]), "may_be_copy": bool(copies[number]),
            "nearest_field": fields[field].name, "nearest_yx": [int(y), int(x)], "symmetry": int(found.symmetries[number]),
        }
        for number, (field, y, x) in enumerate(found.places)
    ]  # fmt: skip
    store.record["copies"] = {
        "compared_px": min(COMPARED_PX, size), "grid_step_px": grid.step, "n_training_patches": len(grid.places),
        "real_rms_median": _median(real_rms), "synthetic_rms_median": _median(found.distances),
        "real_ratio_median": _median(real), "synthetic_ratio_median": _median(ratios[np.isfinite(ratios)]),
        "quantile": QUANTILE, "real_ratio_at_quantile": limit, "n_may_be_copies": int(copies.sum()),
        "share_may_be_copies": float(copies.mean()), "warned_above_share": SHARE,
    }  # fmt: skip
    store.save()


def _number(value: float) -> float | None:
    """A number as JSON knows it."""
    return float(value) if np.isfinite(value) else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _warn(copies: dict[str, Any]) -> None:
    if copies["real_ratio_at_quantile"] is None:
        text = (
            "Whether synthetic images are copies cannot be told: too few patches of the training fields lie apart and "
            "show something. Give more or larger fields, and look at samples.png."
        )
    elif copies["share_may_be_copies"] > SHARE:
        text = (
            f"{copies['n_may_be_copies']} synthetic images ({copies['share_may_be_copies']:.0%}) may be copies: they are "
            f"much nearer to one training field than to all others (the ratio is below {copies['real_ratio_at_quantile']:.2g}, as of "
            f"{QUANTILE:.0%} of real patches). Look at samples.png; more fields or fewer n_steps make copies rarer."
        )
    else:
        return
    warnings.warn(text, UserWarning, stacklevel=3)


def check_synthesis(
    fields: Sequence[Field], *, channels: Sequence[str] | None, size_px: int, n_images: int, **schedule: Any
) -> list[str]:
    """Refuse what :func:`synthesize` would: fields, settings, a missing diffusers. Returns the channels to make."""
    names = _check_fields(list(fields), channels, size_px)
    _check_settings(n_images=n_images, **schedule)
    if n_images:
        need_package("diffusers", "diffusers", "the diffusion model")
    return names


def _check_fields(fields: list[Field], channels: Sequence[str] | None, size_px: int) -> list[str]:
    if not fields:
        msg = "synthesize was given no fields: there is nothing to learn from."
        raise ValueError(msg)
    if isinstance(channels, str):
        channels = [channels]
    names = list(fields[0].channels if channels is None else channels)
    if not names or len(set(names)) < len(names):
        msg = f"channels={names}: one channel, or several different ones, are needed."
        raise ValueError(msg)
    scale = fields[0].um_per_px
    for item in fields:
        if channels is None and set(item.channels) != set(names):
            msg = (
                f"Field {item.name!r} has the channels {list(item.channels)}, field {fields[0].name!r} has {names}: name those "
                "to make with channels=."
            )
            raise ValueError(msg)
        item.indices(names)
        if min(item.shape) < size_px:
            msg = f"Field {item.name!r} is {item.shape[0]} x {item.shape[1]} px, smaller than size_px={size_px}: lower size_px."
            raise ValueError(msg)
        found = item.um_per_px
        unlike = (found is None) != (scale is None)
        if unlike or (found and scale and max(found / scale, scale / found) > _SCALE_TOLERANCE):
            msg = (
                f"Field {item.name!r} has um/px {found}, field {fields[0].name!r} has {scale}: resample the images to one "
                "resolution, or give um_per_px to all of them or to none."
            )
            raise ValueError(msg)
    return names


def _check_settings(
    *, n_images: int, n_steps: int, batch_size: int, ddim_steps: int, checkpoint_every: int, lr: float, seed: int
) -> None:
    if not isinstance(n_images, int | np.integer) or not 0 <= n_images <= MOST_IMAGES:
        msg = f"n_images={n_images} must be 0 to {MOST_IMAGES}, a whole number."
        raise ValueError(msg)
    if min(n_steps, batch_size, checkpoint_every) < 1 or ddim_steps not in _DDIM_STEPS or seed < 0 or not lr > 0:
        msg = (
            f"n_steps={n_steps}, batch_size={batch_size} and checkpoint_every={checkpoint_every} must be at least 1, "
            f"ddim_steps={ddim_steps} one of {_DDIM_STEPS}, seed={seed} 0 or more, lr={lr} positive."
        )
        raise ValueError(msg)
