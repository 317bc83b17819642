"""NOLAN: self-distillation over discs of cells whose output is the niche logits."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from histoniche._random import isolated_rng
from histoniche.metrics import effective_number
from histoniche.neighbors import NeighborGraph, neighborhood_mean, padded_neighborhoods

from ._checks import training_settings, whole
from ._features import rotate, take
from ._losses import self_distillation_loss
from ._predict import LEAST_PROBABILITY, predict_neighborhoods
from ._predict import consensus as consensus_logits
from ._training import default_steps, epoch_batches, train
from ._transformer import NeighborhoodTransformer, masked_mean

if TYPE_CHECKING:
    from collections.abc import Callable

_View = tuple[np.ndarray, np.ndarray, np.ndarray]

_START_CELLS = 200_000
_REGULARIZATION = 0.01
"""Share of the mean variance of neighbourhood means that is added to the variances inside niches."""
_START_TEMPERATURE = 0.05
"""Temperature at which the assignment at the start is the mixture's own posterior."""
_COLLAPSED = 0.5
"""Training stops where the effective number of niches falls below this share of what it started from."""
_LOOK_EVERY = 20
"""Steps from one look at that to the next: a look makes a GPU's host wait for it."""


class Nolan(nn.Module):
    """Niche logits of a neighbourhood: minus its squared distance to each prototype.

    ``logits_k = -|metric (mean of tokens) + f(tokens) - prototype_k|^2 / scale + bias_k``, where f is a Transformer
    whose last layer starts at zero, and metric, prototypes and bias are those of a Gaussian mixture of neighbourhood
    means: training starts at that mixture and moves on from there. Divided by the teacher's temperature the logits are
    such that their softmax is the teacher's own assignment.

    Parameters
    ----------
    prototypes
        (K, d) prototypes in the metric.
    center, spread
        (d,) mean and one number, the root mean square deviation of the features.
    scale
        Scale of the squared distances.
    width, depth, heads
        Size of the Transformer.
    metric
        (d, d) linear map of centred features to where niches are round; by default a division by ``spread``.
    bias
        (K,) what large niches are given in advance; by default nothing. It is not trained, since it could only run
        away with the largest niche.
    """

    def __init__(
        self,
        prototypes: Tensor,
        center: Tensor,
        spread: float,
        scale: float,
        *,
        width: int,
        depth: int,
        heads: int,
        metric: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(prototypes.clone())
        self.register_buffer("center", center.clone())
        self.register_buffer("spread", torch.tensor(spread))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("metric", torch.eye(len(center)) / spread if metric is None else metric.clone())
        self.register_buffer("bias", torch.zeros(len(prototypes)) if bias is None else bias.clone())
        self.embed = nn.Linear(prototypes.shape[1], width)
        self.transformer = NeighborhoodTransformer(width, depth, heads)
        self.out = nn.Linear(width, prototypes.shape[1])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def project(self, features: Tensor) -> Tensor:
        """What a neighbourhood needs of each cell, (..., d + width): its features in the metric, and embedded."""
        z = features - self.center
        return torch.cat([z @ self.metric, self.embed(z / self.spread)], dim=-1)

    def niches(self, projected: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K) of neighbourhoods of projected cells."""
        z, tokens = projected.split([len(self.center), projected.shape[-1] - len(self.center)], dim=-1)
        x = masked_mean(z, mask) + self.out(self.transformer(tokens, offsets, mask))
        return -(x.unsqueeze(1) - self.prototypes).square().sum(-1) / self.scale + self.bias

    def forward(self, features: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K) of neighbourhoods: features (B, T, d), offsets (B, T, 2) in radii, mask (B, T)."""
        return self.niches(self.project(features), offsets, mask)


@dataclass
class NolanResult:
    """What a fit of NOLAN gives.

    Attributes
    ----------
    logits
        (n, K) float32 logits of all cells; their softmax is the teacher's assignment.
    discs
        (n, K) float32 logits of the discs centred on the cells, before the mean over discs; ``logits`` itself without consensus.
    start
        (n,) niches of the mixture of neighbourhood means, where training started.
    history
        One list per figure, one value per step: loss and effective number of niches.
    collapsed
        Whether training was stopped, and undone, because the niches collapsed.
    """

    logits: np.ndarray
    discs: np.ndarray
    start: np.ndarray
    history: dict[str, list[float]] = field(default_factory=dict)
    collapsed: bool = False


def fit_nolan(
    features: np.ndarray,
    graph: NeighborGraph,
    xy: np.ndarray,
    n_niches: int,
    *,
    radius: float,
    train_cells: np.ndarray | None = None,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    n_steps: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.04,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    momentum: float = 0.99,
    keep: float = 0.7,
    max_tokens: int = 32,
    local_views: int = 2,
    consensus: bool = True,
    seed: int = 0,
    description: str = "NOLAN",
) -> NolanResult:
    """Fit NOLAN and give the niche logits of all cells.

    Parameters
    ----------
    features
        (n, d) embedding of every cell.
    graph
        Neighbour graph at ``radius``.
    xy
        (n, 2) centroids in um.
    n_niches
        K.
    radius
        Radius of the global discs in um; local discs have 0.75 of it.
    train_cells
        (n,) bool, cells whose neighbourhoods are learnt from; all by default.
    width, depth, heads
        Size of the Transformer.
    n_steps
        Training steps; by default as many as show each training cell 10 times, between 150 and 450.
    batch_size, lr, weight_decay
        Schedule of the optimiser.
    student_temperature, teacher_temperature
        Temperatures of the two sides.
    momentum
        Momentum of the teacher's exponential moving average, rising to 1 on a cosine.
    keep
        Share of the neighbours that a view keeps.
    max_tokens
        Most cells of a view in training.
    local_views
        Number of local discs beside the two global ones.
    consensus
        Whether the assignment of a cell is the mean over the discs centred on it and on its neighbours, the views that
        training holds to be of one niche, instead of that of its own disc alone.
    seed
        Seed of everything random.
    description
        Text of the progress bar.

    Returns
    -------
    Logits, history and whether the niches collapsed.

    Raises
    ------
    ValueError
        A graph without an edge, features that are the same in all training cells, settings that cannot be.

    References
    ----------
    Multi-crop self-distillation after Caron et al. 2021 (arXiv 2104.14294), over discs of cells.
    """
    n_steps, batch_size, lr, seed = training_settings(n_steps=n_steps, batch_size=batch_size, lr=lr, seed=seed)
    n_niches = whole("n_niches", n_niches, 2)
    train_rows = np.arange(graph.n_cells) if train_cells is None else np.flatnonzero(train_cells)
    n_steps = n_steps or default_steps(len(train_rows), batch_size, epochs=10, least=150, most=450)
    module, start = _warm_start(features, graph, train_rows, n_niches, width=width, depth=depth, heads=heads, seed=seed)
    teacher = copy.deepcopy(module).requires_grad_(requires_grad=False).eval()
    untrained = copy.deepcopy(teacher)
    views = _views(
        features, graph, xy, train_rows, radius,
        batch_size=batch_size, keep=keep, max_tokens=max_tokens, local_views=local_views, seed=seed,
    )  # fmt: skip
    occupancy = _Occupancy(np.bincount(start[train_rows], minlength=n_niches) / len(train_rows))

    def loss(student: nn.Module, views: list[tuple[Tensor, ...]]) -> tuple[Tensor, dict[str, float | Tensor]]:
        teacher.to(views[0][0].device)
        with torch.no_grad():
            targets = [teacher(*view) for view in views[:2]]
            occupancy.update(torch.softmax(targets[0] / teacher_temperature, dim=-1).mean(0).float())
        value = self_distillation_loss(
            [student(*view) for view in views], targets, student_temperature, teacher_temperature
        )
        return value, {"effective_niches": occupancy.effective}

    def follow(student: nn.Module, step: int) -> bool:
        current = 1 - (1 - momentum) * 0.5 * (1 + np.cos(np.pi * step / n_steps))
        get_ema_multi_avg_fn(current)(list(teacher.parameters()), list(student.parameters()), None)
        return step % _LOOK_EVERY == 0 and occupancy.collapsed

    with isolated_rng(seed):
        history = train(
            module, views, loss, n_steps=n_steps, lr=lr, weight_decay=weight_decay, after_step=follow,
            description=description,
        )  # fmt: skip
    fitted = untrained if occupancy.collapsed else teacher
    discs = predict_neighborhoods(fitted, features, graph, xy, radius=radius) / teacher_temperature
    logits = consensus_logits(graph, discs) if consensus else discs
    return NolanResult(logits, discs, start, history, occupancy.collapsed)


def _check_signal(features: np.ndarray, graph: NeighborGraph, train_rows: np.ndarray) -> None:
    """Refuse what no niches can be found in."""
    if not len(graph.indices):
        msg = (
            f"No two of the {graph.n_cells} cells are neighbours, so there are no neighbourhoods: use a larger radius."
        )
        raise ValueError(msg)
    first = features[train_rows[0]]
    if not any((features[block] != first).any() for block in np.array_split(train_rows, len(train_rows) // 65_536 + 1)):
        msg = (
            f"The features of all {len(train_rows)} training cells are the same, so there are no niches to find: "
            "check the embedding."
        )
        raise ValueError(msg)


class _Occupancy:
    """Running mean of the teacher's assignment, on its device, to notice a collapse."""

    def __init__(self, start: np.ndarray) -> None:
        self.mean = torch.from_numpy(start.astype(np.float32))
        self.start = effective_number(start)

    @property
    def effective(self) -> Tensor:
        """Exponential of the entropy, a scalar."""
        share = self.mean / self.mean.sum()
        return torch.special.entr(share).sum().exp()

    @property
    def collapsed(self) -> bool:
        return float(self.effective) < _COLLAPSED * self.start

    def update(self, mean: Tensor) -> None:
        self.mean = 0.95 * self.mean.to(mean.device) + 0.05 * mean


def _warm_start(
    features: np.ndarray,
    graph: NeighborGraph,
    train_rows: np.ndarray,
    n_niches: int,
    *,
    width: int,
    depth: int,
    heads: int,
    seed: int,
) -> tuple[Nolan, np.ndarray]:
    """Module that reproduces a mixture of neighbourhood means, and its niches (n,)."""
    _check_signal(features, graph, train_rows)
    means = neighborhood_mean(graph, features)
    rows = train_rows
    if len(rows) > _START_CELLS:
        rows = np.random.default_rng(seed).choice(rows, _START_CELLS, replace=False)
    mixture = _mixture(means[rows].astype(np.float64), n_niches, seed)
    start = mixture.predict(means)
    order = np.argsort(-np.bincount(start[train_rows], minlength=n_niches), kind="stable")
    start = np.argsort(order)[start]  # niches are numbered by size, largest first
    sample = np.asarray(take(features, rows), dtype=np.float32)
    center = sample.mean(0)
    spread = float(np.sqrt(((sample - center) ** 2).mean()))
    metric = mixture.precisions_cholesky_
    prototypes = (mixture.means_[order] - center) @ metric
    bias = _START_TEMPERATURE * np.log(np.maximum(mixture.weights_[order], LEAST_PROBABILITY))
    with isolated_rng(seed):
        module = Nolan(
            torch.from_numpy(prototypes.astype(np.float32)),
            torch.from_numpy(center),
            spread,
            2 / _START_TEMPERATURE,  # a Gaussian's log density is minus half the squared distance
            width=width,
            depth=depth,
            heads=heads,
            metric=torch.from_numpy(metric.astype(np.float32)),
            bias=torch.from_numpy(bias.astype(np.float32)),
        )
    return module, start


def _mixture(x: np.ndarray, n_niches: int, seed: int) -> GaussianMixture:
    """Gaussian mixture of rows (m, d) with one covariance for all niches, started at k-means.

    k-means holds niches to be round in the space of the embedding. They are not: cell types that come and go inside
    every niche stretch all of them alike. One common covariance measures distances in units of that. It stays with the
    partition that k-means found, by the largest differences there are, and draws its borders anew; the likeliest mixture
    of all may be one that separates slides.
    """
    kmeans = KMeans(n_niches, n_init=10, random_state=seed).fit(x)
    inside = x - kmeans.cluster_centers_[kmeans.labels_]
    least = _REGULARIZATION * x.var(axis=0).mean() + np.finfo(np.float32).tiny
    mixture = GaussianMixture(
        n_niches,
        covariance_type="tied",
        reg_covar=least,
        weights_init=np.bincount(kmeans.labels_, minlength=n_niches) / len(x),
        means_init=kmeans.cluster_centers_,
        precisions_init=np.linalg.inv(inside.T @ inside / len(x) + least * np.eye(x.shape[1])),
        random_state=seed,
    )
    with warnings.catch_warnings():
        # As a start, the mixture need not have converged to the last digit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(x)


def _views(
    features: np.ndarray,
    graph: NeighborGraph,
    xy: np.ndarray,
    train_rows: np.ndarray,
    radius: float,
    *,
    batch_size: int,
    keep: float,
    max_tokens: int,
    local_views: int,
    seed: int,
) -> Callable[[int], list[_View]]:
    """Views of each step, (tokens, offsets, mask) each: a disc, a second one and local ones around random neighbours of the first disc's cell."""
    batches = epoch_batches(train_rows, batch_size, seed)
    is_train = np.zeros(graph.n_cells, dtype=bool)
    is_train[train_rows] = True

    def view(centers: np.ndarray, view_seed: int, rng: np.random.Generator, within: float) -> _View:
        n = padded_neighborhoods(
            graph, xy, centers, radius, max_tokens=max_tokens, seed=view_seed, keep=keep, within=within
        )
        return take(features, n.index), rotate(n.offsets, rng), n.mask

    def make(step: int) -> list[_View]:
        rng = np.random.default_rng([seed, 1, step])
        centers = batches(step)
        base = (seed * 1_000_003 + step) * 16
        made = [view(centers, base, rng, 1.0)]
        for number in range(1, 2 + local_views):
            counts = graph.counts[centers]
            drawn = graph.indptr[centers] + (rng.random(len(centers)) * counts).astype(np.int64)
            near = np.where(counts > 0, graph.indices[np.minimum(drawn, len(graph.indices) - 1)], centers)
            near = np.where(is_train[near], near, centers)
            made.append(view(near, base + number, rng, 1.0 if number == 1 else 0.75))
        return made

    return make
