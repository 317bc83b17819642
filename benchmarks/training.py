"""Training and prediction of student and NOLAN: throughput of the package's loop against the bare model.

    python benchmarks/training.py [--device cuda --predicted 200000]

Loop and bare model take turns in one process, so that both see the same machine. Writes
``docs/benchmarks/training.{md,json}``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import histoniche as hn
from histoniche._compute import make_fabric
from histoniche.models import NicheStudent, StudentConfig, fit_nolan
from histoniche.models._features import FeatureSource, take
from histoniche.models._losses import distillation_loss, self_distillation_loss
from histoniche.models._nolan import Nolan
from histoniche.models._predict import predict_neighborhoods
from histoniche.models._student import StudentModule
from histoniche.neighbors import NeighborGraph, radius_for_density, radius_graph

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
NICHES, LATENT = 10, 10
SKIPPED, MEASURED = 3, 8
"""Steps of a round: the first ones follow a pause, in which batches were prepared for nothing."""
PHASES = ["forward", "loss, backward, clipping", "optimiser", "between steps"]


class Enough(Exception):
    """Ends a training after the last round."""


class TakeTurns:
    """Watches a training by hooks; after some steps stops it and runs the bare model on the same tensors.

    Parameters
    ----------
    kind
        Class of the module that is trained.
    views
        Forward passes with gradient in one step.
    bare_loss
        Loss of a step from module, teacher and views.
    rounds
        Number of turns.
    fabric
        Device and precision.
    """

    def __init__(
        self, kind: type[nn.Module], views: int, bare_loss: Callable[..., Tensor], rounds: int, fabric: Any
    ) -> None:
        self.kind, self.views, self.bare_loss, self.rounds, self.fabric = kind, views, bare_loss, rounds, fabric
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.phases: dict[str, list[dict[str, float]]] = {"loop": [], "bare": []}
        self.inputs: list[tuple[Tensor, ...]] = []
        self.calls = self.steps = 0
        self.watching = True
        self.module: nn.Module | None = None
        self.teacher: nn.Module | None = None
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.begin = self.last = now

    def _now(self) -> float:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _stamp(self, phase: str) -> None:
        now = time.perf_counter()
        self.spent[phase] += now - self.last
        self.last = now

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pass begins."""
        if not (self.watching and isinstance(module, self.kind)):
            return
        if not module.training:
            self.teacher = module
        elif self.calls % self.views == 0:
            self._step_begins(module)
        self._stamp("between steps" if self.first else "forward")
        self.first = False
        if module.training:
            self.calls += 1
            self.inputs = [*self.inputs, inputs][-self.views :]

    first = True

    def after(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        """Forward pass ends."""
        if self.watching and isinstance(module, self.kind):
            self._stamp("forward")

    def optimizer_begins(self, *_: Any) -> None:
        """Optimiser begins."""
        if self.watching:
            self._stamp("loss, backward, clipping")

    def optimizer_ends(self, *_: Any) -> None:
        """Optimiser ends."""
        if self.watching:
            self._stamp("optimiser")
            self.first = True

    def _step_begins(self, module: nn.Module) -> None:
        if self.steps == SKIPPED:
            self._reset(self._now())
        if self.steps == SKIPPED + MEASURED:
            self.loop.append((self._now() - self.begin) / MEASURED)
            self.phases["loop"].append({name: value / MEASURED for name, value in self.spent.items()})
            self.watching = False
            self._bare_turn(module)
            self.watching = True
            self.steps = 0
            if len(self.bare) == self.rounds:
                raise Enough
        self.steps += 1

    def _bare_turn(self, module: nn.Module) -> None:
        if self.module is None:
            self.module = copy.deepcopy(module)
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
            self.inputs = [tuple(x.detach().clone() for x in view) for view in self.inputs]
        for step in range(1 + MEASURED):
            if step == 1:
                self._reset(self._now())
            with self.fabric.autocast():
                outputs = self.bare_loss(self.module, self.teacher, self.inputs)
            self._stamp("forward")
            self.optimizer.zero_grad(set_to_none=True)
            outputs.backward()
            self._stamp("loss, backward, clipping")
            self.optimizer.step()
            self._stamp("optimiser")
        self.bare.append((self._now() - self.begin) / MEASURED)
        self.phases["bare"].append({name: value / MEASURED for name, value in self.spent.items()})

    def watch(self, training: Callable[[], Any]) -> None:
        """Run a training under the hooks, until there are enough rounds."""
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self.before),
            nn.modules.module.register_module_forward_hook(self.after),
            torch_optimizer.register_optimizer_step_pre_hook(self.optimizer_begins),
            torch_optimizer.register_optimizer_step_post_hook(self.optimizer_ends),
        ]
        try:
            training()
        except Enough:
            return
        finally:
            for hook in hooks:
                hook.remove()

    def figures(self, batch_size: int) -> dict[str, Any]:
        """Medians over the rounds."""
        ratios = [bare / loop for bare, loop in zip(self.bare, self.loop, strict=True)]
        return {
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "loop_cells_per_s": batch_size / statistics.median(self.loop),
            "bare_cells_per_s": batch_size / statistics.median(self.bare),
            **{
                f"{who}_ms.{name}": 1e3 * statistics.median(turn[name] for turn in turns)
                for who, turns in self.phases.items()
                for name in PHASES
            },
        }


class Data:
    """Synthetic tissue: positions, graph, histology features, latent, teacher."""

    def __init__(self, n: int, d: int) -> None:
        rng = np.random.default_rng(0)
        self.xy = rng.uniform(0, 10 * np.sqrt(n), (n, 2))
        self.radius = radius_for_density(self.xy, 50)
        self.graph: NeighborGraph = radius_graph(self.xy, self.radius)
        self.features = rng.standard_normal((n, d), dtype=np.float32).astype(np.float16)
        self.latent = rng.standard_normal((n, LATENT), dtype=np.float32)
        self.teacher = rng.standard_normal((n, NICHES), dtype=np.float32)


def new_student(data: Data) -> NicheStudent:
    """Student of the default size."""
    return NicheStudent(StudentConfig(data.features.shape[1], NICHES, data.radius))


def train_student(data: Data, rounds: int, batch_size: int) -> dict[str, Any]:
    """Student training against the bare model."""
    fabric = make_fabric()
    wanted = torch.from_numpy(data.teacher[:batch_size]).to(fabric.device)

    def bare_loss(module: nn.Module, _teacher: nn.Module, views: list[tuple[Tensor, ...]]) -> Tensor:
        return distillation_loss(module(*views[0]).float(), wanted, 2.0)

    turns = TakeTurns(StudentModule, 1, bare_loss, rounds, fabric)
    turns.watch(
        lambda: new_student(data).fit(
            data.features, data.graph, data.xy, data.teacher, n_steps=100_000, batch_size=batch_size
        )
    )
    return turns.figures(batch_size)


def train_nolan(data: Data, rounds: int, batch_size: int) -> tuple[dict[str, Any], Nolan]:
    """NOLAN training (four views of the student, two of the teacher) against the bare model; and the module."""

    def bare_loss(module: nn.Module, teacher: nn.Module, views: list[tuple[Tensor, ...]]) -> Tensor:
        with torch.no_grad():
            targets = [teacher(*view).float() for view in views[:2]]
        return self_distillation_loss([module(*view).float() for view in views], targets, 0.1, 0.05)

    turns = TakeTurns(Nolan, 4, bare_loss, rounds, make_fabric())
    turns.watch(
        lambda: fit_nolan(
            data.latent, data.graph, data.xy, NICHES, radius=data.radius, n_steps=100_000, batch_size=batch_size
        )
    )
    return turns.figures(batch_size), turns.module


def predict(module: Any, features: np.ndarray | FeatureSource, part: Data, rounds: int) -> dict[str, Any]:
    """Prediction of all cells against the bare model on the same tensors, projections included in both."""
    device = make_fabric().device
    n, original = len(part.xy), module.niches
    batches: list[tuple[Tensor, ...]] = []

    def keep(*inputs: Tensor) -> Tensor:
        batches.append(inputs)
        return original(*inputs)

    def loop() -> None:
        predict_neighborhoods(module, features, part.graph, part.xy, radius=part.radius)

    def seconds(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    module.niches = keep
    loop()
    del module.niches
    blocks = [
        torch.from_numpy(take(features, np.arange(at, min(at + 16_384, n)))).to(device) for at in range(0, n, 16_384)
    ]

    def bare() -> None:
        with torch.inference_mode():
            for block in blocks:
                module.project(block)
            for inputs in batches:
                original(*inputs)

    times = [(seconds(loop), seconds(bare)) for _ in range(rounds)]
    ratios = [b / a for a, b in times]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "loop_cells_per_s": n / statistics.median(a for a, _ in times),
        "bare_cells_per_s": n / statistics.median(b for _, b in times),
    }


def report(arguments: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Write the page and the flat figures."""
    on_gpu = arguments.device == "cuda"
    name = "training_cuda" if on_gpu else "training"
    flat = {f"{job}.{key}": round(float(value), 4) for job, figures in found.items() for key, value in figures.items()}
    (arguments.docs / f"{name}.json").write_text(json.dumps(flat, indent=1) + "\n")
    labels = {
        "student_training": "student, training",
        "nolan_training": "NOLAN, training",
        "student_prediction": "student, prediction",
        "nolan_prediction": "NOLAN, prediction",
    }
    rows = [
        f"| {label} | {x['loop_cells_per_s']:,.0f} | {x['bare_cells_per_s']:,.0f} | {x['ratio']:.3f} | {x['ratio_low']:.3f} to {x['ratio_high']:.3f} |"
        for job, label in labels.items()
        for x in [found[job]]
    ]
    phases = [
        f"| {labels[job]} | {phase} | {x[f'loop_ms.{phase}']:.1f} | {x[f'bare_ms.{phase}']:.1f} | {100 * x[f'loop_ms.{phase}'] / sum(x[f'loop_ms.{p}'] for p in PHASES):.1f} |"
        for job in ("student_training", "nolan_training")
        for x in [found[job]]
        for phase in PHASES
    ]
    outside = {job: f"{1 - x['ratio']:.0%}" for job, x in found.items()}
    missed = [f"{labels[job]} {x['ratio']:.2f}" for job, x in found.items() if x["ratio"] < 0.9]
    goal = f"missed by {'; '.join(missed)}" if missed else "met by all four"
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores ({platform.machine()}), no GPU"
    newline = "\n"
    command = "python benchmarks/training.py"
    if on_gpu:
        command += f" --device cuda --predicted {arguments.predicted} --rounds {arguments.rounds}"
    host = (
        "\nTimes of phases are those of the host, which runs ahead of the GPU; the ratios are measured with the GPU waited for.\n"
        if on_gpu
        else ""
    )
    (
        arguments.docs / f"{name}.md"
    ).write_text(f"""# Training and prediction: the loop against the bare model{" (GPU)" if on_gpu else ""}

How much of the model's own speed the package reaches. *Loop*: `NicheStudent.fit`, `fit_nolan` and prediction as users call
them: neighbourhoods, features and random turns made for every batch, schedule, clipping, checks, history. *Bare*: the same
module on tensors that lie ready on the device, of the same shapes and dtype: in training forward, loss, backward and AdamW
(NOLAN: four views, and the teacher's forward on two), in prediction projection and forward. Synthetic tissue, {arguments.cells:,} cells x
{arguments.features} float16 features of the student, and their context beside them ({LATENT} latent dimensions for NOLAN), 50 neighbours on average; default sizes of models and batches
(student 256 cells, NOLAN 128). The context is made once before training or prediction and is not part of either. Prediction: {arguments.predicted:,} cells with whole neighbourhoods. Loop and bare take turns in one
process, {arguments.rounds} rounds of {MEASURED} steps in training and {arguments.predict_rounds} in prediction; medians, and the range of the ratio over rounds.

| job | loop, cells/s | bare, cells/s | ratio | range |
|---|---|---|---|---|
{newline.join(rows)}

The goal was a ratio of 0.9: {goal}. A ratio above 1 is noise.

## Where a step goes

Milliseconds per step (medians over rounds; time stamps from hooks before and after the model and the optimiser). *Between steps* is
what the model waits for: the next batch from the background thread, its move to the device, schedule, figures, and NOLAN's
moving average. The bare loop has its loss under *forward* and no clipping.

| job | phase | loop, ms | bare, ms | share of the loop, % |
|---|---|---|---|---|
{newline.join(phases)}

Of the prediction {outside["student_prediction"]} (student) and {outside["nolan_prediction"]} (NOLAN) is outside the model: 1 less the ratio.
{host}
## Machine and command

{machine}; {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {version("torch")}, precision {make_fabric()._precision.precision}.

```bash
{command}
```

All figures: `{name}.json`.
""")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page and figures go")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=152)
    parser.add_argument("--predicted", type=int, default=20_000, help="cells of the prediction")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--predict-rounds", type=int, default=4)
    arguments = parser.parse_args()
    hn.settings.accelerator = arguments.device
    hn.settings.progress = False
    start = time.perf_counter()
    data = Data(arguments.cells, arguments.features)
    part = Data(arguments.predicted, arguments.features)
    found = {"student_training": train_student(data, arguments.rounds, 256)}
    print(json.dumps(found, indent=1), f"{time.perf_counter() - start:.0f} s", flush=True)
    found["nolan_training"], nolan = train_nolan(data, arguments.rounds, 128)
    print(json.dumps(found["nolan_training"], indent=1), f"{time.perf_counter() - start:.0f} s", flush=True)
    student = new_student(part)
    source = student._with_context(part.features, part.graph)
    found["student_prediction"] = predict(student.module, source, part, arguments.predict_rounds)
    found["nolan_prediction"] = predict(nolan, part.latent, part, arguments.predict_rounds)
    report(arguments, found)
    print(json.dumps(found, indent=1), f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
