"""A small diffusion model of image patches: DDPM training, DDIM sampling."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histoniche._compute import inference_fabric, to_device
from histoniche._random import isolated_rng
from histoniche.models._checkpoint import Checkpoint
from histoniche.models._directory import weights_digest
from histoniche.models._training import train

from ._access import need_package
from ._copies import SYMMETRIES, turned
from ._fields import pixels_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

_Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
NOISE_STEPS = 1000
_EMA_DECAY, _EMA_POWER = 0.9999, 0.75
_BLOCK_ON_GPU = 64
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def _package() -> Any:
    return need_package("diffusers", "diffusers", "synthetic images")


class Diffusion:
    """A diffusion model of patches of one size: diffusers' ``UNet2DModel`` that predicts the velocity.

    The noise follows a cosine schedule that ends in pure noise; only the prediction of the velocity is well posed there.

    Parameters
    ----------
    n_channels
        Channels of the images.
    size_px
        Width of a patch in px, a multiple of ``2 ** (len(width) - 1)``.
    width
        Channels of the network at each resolution, each half the one before; attention at the lowest.
    seed
        Seed of the weights that are drawn.

    Attributes
    ----------
    module
        The network.
    history
        Loss of each training step; empty after loading.
    """

    def __init__(self, n_channels: int, size_px: int, *, width: Sequence[int] = (32, 64, 64), seed: int = 0) -> None:
        least = 2 ** (len(width) - 1)
        if len(width) < 2 or any(w < 8 or w % 8 for w in width):
            msg = f"width={tuple(width)}: two or more multiples of 8 are needed, one a resolution of the network."
            raise ValueError(msg)
        if size_px < 8 or size_px < 2 * least or size_px % least:
            msg = f"size_px={size_px} must be a multiple of {least} (width={tuple(width)} halves it {len(width) - 1} times), at least {max(8, 2 * least)}."
            raise ValueError(msg)
        plain = ["DownBlock2D"] * (len(width) - 1)
        with isolated_rng(seed):
            module = _package().UNet2DModel(
                sample_size=size_px, in_channels=n_channels, out_channels=n_channels, block_out_channels=tuple(width),
                down_block_types=(*plain, "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", *(name.replace("Down", "Up") for name in plain)),
                norm_num_groups=math.gcd(8, *width), num_train_timesteps=NOISE_STEPS,
            )  # fmt: skip
        self._take(module)

    def _take(self, module: nn.Module) -> None:
        self.module: nn.Module = module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        config: Any = self.module.config
        self.n_channels, self.size_px = int(config.in_channels), int(config.sample_size)
        self.history: dict[str, list[float]] = {}

    def __repr__(self) -> str:
        """One line: channels, width of a patch, parameters."""
        n = sum(p.numel() for p in self.module.parameters())
        return f"Diffusion({self.n_channels} channels, {self.size_px} px, {n / 1e6:.2f} M parameters)"

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.module)

    def fit(
        self,
        pixels: Sequence[np.ndarray],
        *,
        n_steps: int,
        batch_size: int,
        lr: float,
        seed: int,
        checkpoint: Path | None = None,
        checkpoint_every: int = 100,
    ) -> None:
        """Train in place; the weights become the moving average of those of all steps.

        Parameters
        ----------
        pixels
            (c, y, x) uint8 of each image, none smaller than a patch.
        n_steps, batch_size, lr
            Schedule.
        seed
            Decides patches, noise and dropout.
        checkpoint, checkpoint_every
            File and number of steps of the state from which an interrupted training goes on; left to the caller to remove.
        """
        scheduler = _scheduler()
        average = need_package("diffusers.training_utils", "diffusers", "synthetic images").EMAModel(
            self.module.parameters(), decay=_EMA_DECAY, use_ema_warmup=True, power=_EMA_POWER, foreach=True
        )

        def make(step: int) -> _Batch:
            return training_batch(pixels, self.size_px, batch_size, np.random.default_rng([seed, 0, step]))

        def velocity_loss(module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
            images, noise, times = batch
            noisy = scheduler.add_noise(images, noise, times).contiguous(memory_format=torch.channels_last)
            predicted = module(noisy, times, return_dict=False)[0]
            return (predicted.float() - scheduler.get_velocity(images, noise, times)).square().mean(), {}

        def follow(module: nn.Module, step: int) -> bool:  # noqa: ARG001
            weights = list(module.parameters())
            if average.shadow_params[0].device != weights[0].device:
                average.to(weights[0].device)
            average.step(weights)
            return False

        keep = None
        if checkpoint is not None:
            about = [repr(self), self.digest, n_steps, batch_size, lr, seed, [pixels_digest(image) for image in pixels]]
            keep = Checkpoint(checkpoint, json.dumps(about), every=checkpoint_every, extra=average)
        with isolated_rng(seed):
            self.history = train(
                self.module, make, velocity_loss, n_steps=n_steps, lr=lr, weight_decay=0.0, clip=1.0, after_step=follow,
                checkpoint=keep, description="diffusion model",
            )  # fmt: skip
        average.copy_to(self.module.parameters())
        self.module.eval().cpu()

    @torch.inference_mode()
    def sample(
        self, numbers: Sequence[int], *, ddim_steps: int, seed: int, block: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Make images, each from noise of its own: a number gives the same image whatever else is asked for.

        Parameters
        ----------
        numbers
            Numbers of the images; they come in ascending order.
        ddim_steps
            Steps from noise to image.
        seed
            Decides the noise, with the number.
        block
            Images made at a time, numbers ``0 ... block - 1`` and so on, whether asked for or not: sums are rounded
            differently in batches of another size. By default 1 on a CPU, else 64.

        Yields
        ------
        Number and image, (c, size_px, size_px) uint8.
        """
        fabric = inference_fabric()
        module = self.module.to(fabric.device).eval()
        block = block or (1 if fabric.device.type == "cpu" else _BLOCK_ON_GPU)
        scheduler = _scheduler()
        scheduler.set_timesteps(ddim_steps)
        asked = set(numbers)
        for first in sorted({number // block * block for number in asked}):
            shape = (self.n_channels, self.size_px, self.size_px)
            made = range(first, first + block)
            noise = [np.random.default_rng([seed, 1, n]).standard_normal(shape, dtype=np.float32) for n in made]
            x = to_device(np.stack(noise), fabric.device)
            for time in scheduler.timesteps:
                with fabric.autocast():
                    velocity = module(x.contiguous(memory_format=torch.channels_last), time, return_dict=False)[0]
                x = scheduler.step(velocity.float(), time, x, return_dict=False)[0]
            images = (x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu().contiguous().numpy()
            yield from ((n, image) for n, image in zip(made, images, strict=True) if n in asked)

    def save(self, path: Path) -> None:
        """Write the model as diffusers does, beside its place and then there; a model in that place is replaced."""
        beside = path.with_name(f"{path.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        self.module.save_pretrained(beside, safe_serialization=True)  # type: ignore[operator]
        _scheduler().save_pretrained(beside)
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)

    @classmethod
    def load(cls, path: str | Path) -> Diffusion:
        """Read a model that :meth:`save` wrote; executes no code from it.

        Parameters
        ----------
        path
            Directory.

        Raises
        ------
        FileNotFoundError
            The directory or one of its files is missing.
        ValueError
            It is damaged, or holds another kind of model.
        """
        path = Path(path)
        for name in (_CONFIG, _WEIGHTS):
            if not (path / name).is_file():
                msg = f"Diffusion model {str(path)!r}: {name} is missing. Give the directory 'model' that synthesize wrote."
                raise FileNotFoundError(msg)
        unet = _package().UNet2DModel
        try:
            module = unet.from_pretrained(path, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False)
        except Exception as error:
            msg = f"Diffusion model {str(path)!r} is damaged and cannot be read ({type(error).__name__}: {error})."
            raise ValueError(msg) from error
        made = cls.__new__(cls)
        made._take(module)
        return made


def _scheduler() -> Any:
    return _package().DDIMScheduler(
        num_train_timesteps=NOISE_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=True,
    )  # fmt: skip


def training_batch(pixels: Sequence[np.ndarray], size: int, n: int, rng: np.random.Generator) -> _Batch:
    """Draw patches, turned and mirrored but not relit, for their statistics are to be learnt.

    Parameters
    ----------
    pixels
        (c, y, x) uint8 of each image; each is shown as often.
    size
        Width of a patch in px.
    n
        Patches.
    rng
        Decides everything.

    Returns
    -------
    Patches (n, c, size, size) float32 in -1 to 1, noise of the same shape, and noise steps (n,) int64.
    """
    patches = []
    for field in rng.integers(len(pixels), size=n):
        image = pixels[field]
        y, x = (int(rng.integers(length - size + 1)) for length in image.shape[1:])
        patches.append(turned(image[:, y : y + size, x : x + size], int(rng.integers(SYMMETRIES))))
    images = np.stack(patches).astype(np.float32) / 127.5 - 1
    return images, rng.standard_normal(images.shape, dtype=np.float32), rng.integers(NOISE_STEPS, size=n)
