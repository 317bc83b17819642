"""Interrupted training goes on where it was, bit for bit on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


class Stateful(Protocol):
    """What has a state of tensors, numbers and texts beside that of the module."""

    def state_dict(self) -> dict[str, Any]:
        """State to keep."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that was kept."""
        ...


@dataclass
class Checkpoint:
    """Where and how often the state of a training is kept.

    Attributes
    ----------
    path
        File; removed by whoever asked for the training, when its result is safe.
    fingerprint
        Text that describes the training; a file of another one is refused.
    every
        Steps from one state to the next.
    extra
        What else has a state, such as early stopping.
    """

    path: Path
    fingerprint: str
    every: int = 100
    extra: Stateful | None = None

    def save(self, step: int, module: nn.Module, history: dict[str, list[float]], **states: Stateful) -> None:
        """Keep the state after ``step`` steps; a file of an earlier step is replaced when this one is complete."""
        content = {
            "fingerprint": self.fingerprint, "step": step, "module": module.state_dict(), "history": history,
            "rng": torch.get_rng_state(), "extra": self.extra.state_dict() if self.extra else {},
            **{name: state.state_dict() for name, state in states.items()},
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.part")
        torch.save(content, beside)
        beside.replace(self.path)

    def restore(self, module: nn.Module, history: dict[str, list[float]], **states: Stateful) -> int:
        """Take up a kept state; 0 where there is none, else the number of steps that were done.

        Raises
        ------
        ValueError
            The file is damaged, or belongs to another training.
        """
        if not self.path.exists():
            return 0
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            fingerprint = content["fingerprint"]
        except Exception as error:
            msg = (
                f"Checkpoint {str(self.path)!r} is damaged ({type(error).__name__}: {error}): delete it to start again."
            )
            raise ValueError(msg) from error
        if fingerprint != self.fingerprint:
            msg = (
                f"Checkpoint {str(self.path)!r} belongs to another training (other data, settings or seed): choose another "
                "place, or delete it to start again."
            )
            raise ValueError(msg)
        module.load_state_dict(content["module"])
        for name, state in states.items():
            state.load_state_dict(content[name])
        if self.extra:
            self.extra.load_state_dict(content["extra"])
        history.update(content["history"])
        torch.set_rng_state(content["rng"])
        return int(content["step"])
