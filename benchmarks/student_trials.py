"""What the student is given, made of and taught by: one change at a time, on strips inside the training part of the pancreas.

    python benchmarks/student_trials.py DATA/xenium_pancreas --runs OUTPUT_OF_XENIUM_PANCREAS --jobs 2

Takes split, neighbourhoods, features and teachers (first seed) from a finished run of ``xenium_pancreas.py`` and looks at
training cells alone: all that lies above the test strip, and the lower half of what lies below it, are each predicted by
students of the rest, cells within ``BUFFER`` um left out. Features and answers lie in ``--output``, so a run that was stopped
goes on. Writes ``docs/benchmarks/student_trials.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import torch
from _adapt_encoder import STEPS as ADAPT_STEPS
from _trial_features import STAINS, Features
from scipy.special import softmax
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import histoniche as hn
from histoniche import metrics
from histoniche.models import NicheStudent, StudentConfig
from histoniche.models._linear_probe import ProbeData, fit_linear_probe
from histoniche.neighbors import NeighborGraph, neighborhood_mean, radius_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
BUFFER = 330.0
N_STEPS = 300
PENALTY = 0.01
"""Of the probes, the same for all features."""
DECAY = 0.98
BASE_SEEDS = 3
FIGURES = ("ari", "nmi", "jsd")


# --------------------------------------------------------------------------------------------------------- what is tried
def _hard(logits: np.ndarray) -> np.ndarray:
    return np.log(np.eye(logits.shape[1], dtype=np.float32)[logits.argmax(axis=1)] + 1e-6)


def _half_hard(logits: np.ndarray) -> np.ndarray:
    return np.log(0.5 * softmax(logits, axis=1) + 0.5 * np.exp(_hard(logits)))


LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda logits: logits,
    "doubled": lambda logits: 2 * logits,
    "half hard": _half_hard,
    "hard": _hard,
}


@dataclass(frozen=True)
class Variant:
    """What is changed: features, those of further views of the training cells, labels, configuration, fit, and after it."""

    features: tuple[str, ...] = ("frozen",)
    views: tuple[str, ...] = ()
    labels: str = "as they are"
    discs: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    n_steps: int = N_STEPS
    averaged: bool = False
    seed: int = 0
    members: int = 1
    probe: str = ""


GROUPS: dict[str, dict[str, Variant]] = {
    "": {
        "as it is": Variant(),
        "another seed": Variant(seed=1),
        "a third seed": Variant(seed=2),
        "linear probe on the cell": Variant(probe="cell"),
        "linear probe on cell and neighbourhood": Variant(probe="neighborhood"),
    },
    "Context: means over hops of the neighbour graph, beside the neighbourhood of radius r; 2 and 4 as it is": {
        "none": Variant(config={"context": []}),
        "1 (r)": Variant(config={"context": [1]}),
        "2 (2r)": Variant(config={"context": [2]}),
        "1 and 2": Variant(config={"context": [1, 2]}),
        "4": Variant(config={"context": [4]}),
    },
    "Features: strides 8 and 16 at 0.5 um/px, four mirror images, as it is": {
        "stride 8 alone": Variant(("stride 8",)),
        "stride 16 alone": Variant(("stride 16",)),
        "strides 8, 16 and 32": Variant(("three strides",)),
        "the image without mirror images": Variant(("no mirror images",)),
        "0.35 um/px": Variant(("0.35 um/px",)),
        "0.75 um/px": Variant(("0.75 um/px",)),
        "1.0 um/px": Variant(("1.0 um/px",)),
        "0.5 and 1.0 um/px": Variant(("frozen", "1.0 um/px")),
        "outlines of the cells beside the features": Variant(("frozen", "outlines")),
        "changes of stain in training": Variant(views=tuple(STAINS)),
        "encoder adapted without molecules": Variant(("views",)),
        "encoder adapted to the scVI latent": Variant(("latent",)),
    },
    "Student: 2 layers of width 96, half of the features dropped, as it is": {
        "4 layers": Variant(config={"depth": 4}),
        "width 192": Variant(config={"width": 192}),
        "a quarter dropped": Variant(config={"dropout": 0.25}),
    },
    "Loss: tau = 2, the teacher's logits of discs, as it is": {
        "tau = 1": Variant(config={"temperature": 1.0}),
        "teacher's logits doubled": Variant(labels="doubled"),
        "hard labels for half of the loss, tau = 1": Variant(labels="half hard", config={"temperature": 1.0}),
        "hard labels, tau = 1": Variant(labels="hard", config={"temperature": 1.0}),
        "the teacher's mean over discs": Variant(discs=False),
    },
    f"Schedule: {N_STEPS} steps, as it is": {
        **{f"{n} steps": Variant(n_steps=n) for n in (600, 900, 1500)},
        f"moving average of the weights, decay {DECAY}": Variant(averaged=True),
        "mean of three students": Variant(members=BASE_SEEDS),
    },
}
VARIANTS = {name: variant for group in GROUPS.values() for name, variant in group.items()}


# ----------------------------------------------------------------------------------------------------------------- cells
@dataclass(frozen=True)
class Strip:
    """Which cells its students are fitted on, which are scored, and which these lie among."""

    name: str
    fit: np.ndarray
    scored: np.ndarray
    around: np.ndarray


class Cells:
    """The training cells of a run, with the teacher's niches."""

    def __init__(self, table: anndata.AnnData) -> None:
        self.rows = np.flatnonzero((table.obs["split"] == "train").to_numpy())
        self.table = table[self.rows].copy()
        self.xy = np.asarray(self.table.obsm["spatial"])
        self.radius = float(table.uns["niche_neighbors"]["params"]["radius"])
        self.logits = np.asarray(self.table.obsm["niche_logits_teacher"])
        self.disc_logits = np.asarray(self.table.obsm["niche_logits_teacher_disc"])
        self.niche = self.logits.argmax(axis=1)

    @cached_property
    def graph(self) -> NeighborGraph:
        """Neighbours among the training cells."""
        return radius_graph(self.xy, self.radius)

    @cached_property
    def strips(self) -> list[Strip]:
        """All above the test strip, and the lower half of what is below it."""
        y = self.xy[:, 1]
        ordered = np.sort(y)
        gap = int(np.argmax(np.diff(ordered)))
        upper = y <= ordered[gap]
        middle = np.median(y[~upper])
        return [
            Strip("upper", ~upper, upper, upper),
            Strip("lower", upper | (y < middle - BUFFER), ~upper & (y >= middle), ~upper),
        ]

    def score(self, labels: np.ndarray, strip: Strip) -> dict[str, float]:
        """Agreement of the labels (m,) of a strip's cells with the teacher's."""
        wanted = self.niche[strip.scored]
        types = self.table.obs["graph_cluster"][strip.scored]
        return {
            "ari": metrics.adjusted_rand(wanted, labels),
            "nmi": metrics.normalized_mutual_info(wanted, labels),
            "jsd": metrics.composition_jsd(wanted, labels, types, match="identity"),
        }


# ------------------------------------------------------------------------------------------------------------------ runs
@contextmanager
def averaged_weights(module: nn.Module) -> Iterator[None]:
    """Training inside leaves the module with the moving average of its weights."""
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    handle = register_optimizer_step_post_hook(lambda *_: average.update_parameters(module))
    try:
        yield
    finally:
        handle.remove()
    module.load_state_dict(average.module.state_dict())


def student(variant: Variant, cells: Cells, strip: Strip, features: Features, seed: int) -> np.ndarray:
    """A student's assignment (m, K) float32 of the cells of a strip."""
    x = np.concatenate([features(name, cells, strip) for name in variant.features], axis=1)
    views = [x, *(features(name, cells, strip) for name in variant.views)]
    labels = LABELS[variant.labels](cells.disc_logits if variant.discs else cells.logits)
    # Further views are further cells, far away, so that each has its own neighbours.
    xy = np.concatenate([cells.xy + np.array([1e6 * i, 0]) for i in range(len(views))])
    config = StudentConfig(x.shape[1], labels.shape[1], cells.radius, **variant.config)
    made = NicheStudent(config)
    with averaged_weights(made.module) if variant.averaged else nullcontext():
        made.fit(
            np.concatenate(views), radius_graph(xy, cells.radius) if variant.views else cells.graph, xy,
            np.concatenate([labels] * len(views)), train_cells=np.concatenate([strip.fit] * len(views)),
            n_steps=variant.n_steps, seed=seed,
        )  # fmt: skip
    around, xy = strip.around, cells.xy[strip.around]
    logits = made.predict(np.ascontiguousarray(x[around]), radius_graph(xy, cells.radius), xy)
    return softmax(logits[strip.scored[around]], axis=1)


def probe(variant: Variant, cells: Cells, strip: Strip, features: Features) -> np.ndarray:
    """Niches (m,) of the cells of a strip by a linear probe."""
    x = np.concatenate([features(name, cells, strip) for name in variant.features], axis=1)
    if variant.probe == "neighborhood":
        x = np.concatenate([x, neighborhood_mean(cells.graph, x)], axis=1)
    x = x.astype(np.float32)
    fitted = fit_linear_probe(ProbeData.of(x[strip.fit].copy()), cells.niche[strip.fit], penalties=(PENALTY,))
    return fitted.classes[(x[strip.scored] @ fitted.weights + fitted.intercept).argmax(axis=1)]


class Trials:
    """All variants for one number of niches; answers and figures are kept in a folder."""

    def __init__(self, arguments: argparse.Namespace, n_niches: int) -> None:
        self.n_niches, self.output = n_niches, arguments.output
        self.cells = Cells(anndata.read_h5ad(arguments.runs / f"seed{arguments.seed}" / f"k{n_niches}" / "table.h5ad"))
        self.features = Features(arguments.data, arguments.runs, arguments.output)

    def figures(self, name: str) -> Path:
        """Where the figures of a variant lie."""
        return self.output / f"k{self.n_niches}" / f"{_slug(name)}.json"

    def run(self, name: str) -> None:
        """Fit and score a variant, where that was not done before."""
        if self.figures(name).exists():
            return
        found = [self.cells.score(self._labels(name, strip), strip) for strip in self.cells.strips]
        mean = {figure: float(np.mean([row[figure] for row in found])) for figure in FIGURES}
        print(f"K = {self.n_niches}, {name}:", json.dumps(mean), flush=True)
        _write(self.figures(name), lambda place: place.write_text(json.dumps(mean)))

    def _labels(self, name: str, strip: Strip) -> np.ndarray:
        variant = VARIANTS[name]
        if variant.probe:
            return probe(variant, self.cells, strip, self.features)
        seeds = range(variant.seed, variant.seed + variant.members)
        return np.mean([self._answers(variant, strip, seed) for seed in seeds], axis=0).argmax(axis=1)

    def _answers(self, variant: Variant, strip: Strip, seed: int) -> np.ndarray:
        """A student's assignment; that of the students as they are is kept, for their mean."""
        if replace(variant, seed=0, members=1) != Variant():
            return student(variant, self.cells, strip, self.features, seed)
        place = self.output / f"k{self.n_niches}" / f"{strip.name}_{seed}.npy"
        if not place.exists():
            made = student(variant, self.cells, strip, self.features, seed)
            _write(place, lambda new: np.save(new, made))
        return np.load(place)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "_" for c in name)


def _write(place: Path, write: Callable[[Path], Any]) -> None:
    """Write in one move."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f"new_{place.name}")
    write(new)
    new.replace(place)


_TRIALS: dict[int, Trials] = {}


def _prepare(arguments: argparse.Namespace) -> None:
    """What a process needs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.jobs))
    hn.settings.progress = False
    _TRIALS.update({k: Trials(arguments, k) for k in arguments.n_niches})


def _run(k: int, name: str) -> None:
    _TRIALS[k].run(name)


def run_all(arguments: argparse.Namespace) -> None:
    """Features first, as students share them; then students, several at a time."""
    _prepare(arguments)
    trials = next(iter(_TRIALS.values()))
    for name in dict.fromkeys(name for v in VARIANTS.values() for name in (*v.features, *v.views)):
        for strip in trials.cells.strips:
            trials.features(name, trials.cells, strip)
    with ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(arguments,)
    ) as pool:
        for done in [pool.submit(_run, k, name) for k in arguments.n_niches for name in VARIANTS]:
            done.result()


# ---------------------------------------------------------------------------------------------------------------- report
PAGE = """# What was tried with the student

On the training part of {{doc}}`xenium_pancreas` alone (**virtual** H&E, the teachers of seed {seed}), one change at a time. All that lies
above the test strip, and the lower half of what lies below it, are each predicted by a student of the rest, {buffer:.0f} um away, in
{steps} steps, which is short; mean of the two. Far fewer cells to learn from than in the main benchmark: the figures are for comparison
with each other, not with that page. Three students that differ in their seed alone: SD of {spread}.
Adapted encoders and changes of stain see the image of the cells that the students are fitted on, and no other.

{tables}

*Changes of stain in training*: the student learns from features of the image and of two others, whose optical densities of red, green and blue are
multiplied by {stains}. *Encoder adapted*: EfficientNet-Lite0 up to stride 16, {adapt} steps of four tiles of 512 px with turns, mirror images and changes
of stain; without molecules by VICReg ([arXiv 2105.04906](https://arxiv.org/abs/2105.04906)) on two views of each cell, or to tell the scVI latent of the neighbourhood (means over 1 and 2
hops). *Hard labels*: the likeliest niche of a disc.

## Command

```bash
pip install ".[demo,seg]"
python benchmarks/student_trials.py PATH/TO/xenium_pancreas --runs benchmarks/output/xenium_pancreas --jobs 2
```

After `xenium_pancreas.py`. {cores} cores ({machine}), no GPU; Python {python}. All figures: `student_trials.json`.
"""


def report(arguments: argparse.Namespace) -> None:
    """Write the page and the flat figures."""
    ks = sorted(arguments.n_niches)
    found = {
        (name, k): json.loads(_TRIALS[k].figures(name).read_text()) for name in VARIANTS for k in ks
    }  # fmt: skip
    flat = {
        f"k{k}.{name}.{figure}": round(value, 4) for (name, k), row in found.items() for figure, value in row.items()
    }
    (arguments.docs / "student_trials.json").write_text(json.dumps(flat, indent=1) + "\n")
    head = "| " + " | ".join(["", *(f"K = {k}: ARI | NMI | JSD" for k in ks)]) + " |\n|" + "---|" * (1 + 3 * len(ks))
    tables = []
    for title, variants in GROUPS.items():
        rows = [
            " | ".join([f"| {name}", *(f"{found[name, k][figure]:.3f}" for k in ks for figure in FIGURES)]) + " |"
            for name in variants
        ]
        tables.append("\n".join([*([f"**{title}**", ""] if title else []), head, *rows]))
    seeds = [name for name, variant in VARIANTS.items() if replace(variant, seed=0) == Variant()]
    spread = {k: {f: np.std([found[name, k][f] for name in seeds], ddof=1) for f in FIGURES} for k in ks}
    page = PAGE.format(
        seed=arguments.seed, buffer=BUFFER, steps=N_STEPS, tables="\n\n".join(tables),
        spread="; ".join(f"{', '.join(f'{v:.3f} in {f.upper()}' for f, v in spread[k].items())} (K = {k})" for k in ks),
        stains=" and ".join(str(gain) for gain in STAINS.values()), adapt=ADAPT_STEPS,
        cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(),
    )  # fmt: skip
    (arguments.docs / "student_trials.md").write_text(page)
    print(page)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cell_boundaries.parquet")
    parser.add_argument(
        "--runs", type=Path, default=HERE / "output" / "xenium_pancreas", help="output of xenium_pancreas.py"
    )
    parser.add_argument("--output", type=Path, default=HERE / "output" / "student_trials")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page and figures go")
    parser.add_argument("--seed", type=int, default=0, help="of the teachers")
    parser.add_argument("--n-niches", type=int, nargs="+", default=[20], help="of the teachers")
    parser.add_argument("--jobs", type=int, default=1, help="students at a time")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    run_all(arguments)
    report(arguments)


if __name__ == "__main__":
    main()
