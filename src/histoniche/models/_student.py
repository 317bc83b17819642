"""The student: niche logits from the histology of a neighbourhood."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histoniche._random import isolated_rng
from histoniche.neighbors import NeighborGraph, padded_neighborhoods

from ._checks import training_settings, transformer_size
from ._context import context_means, principal_axes
from ._directory import read_directory, weights_digest, write_directory
from ._features import FeatureSource, Joined, rotate, take
from ._losses import distillation_loss
from ._predict import consensus, predict_neighborhoods
from ._training import default_steps, epoch_batches, train
from ._transformer import NeighborhoodTransformer, masked_mean

_STATISTICS_CELLS = 50_000
_HIDDEN = 128
"""Width of the perceptron on a cell's features and context."""


class StudentModule(nn.Module):
    """Transformer over the histology of a neighbourhood, beside a linear path.

    ``logits = A (x, c) + B mean(x) + C mlp(x, c) + D transformer(x)``, with x the features of the cell (or of those of its
    neighbourhood) and c their means over wider surroundings, the cell's context. Without c, the first two terms are the
    linear probe on cell and neighbourhood mean, the strongest simple baseline. C and D start at zero, so the rest
    learns what they cannot say.

    Parameters
    ----------
    n_features, n_context, n_niches
        Length of a cell's features and of its context, and K.
    width, depth, heads
        Size of the Transformer.
    dropout
        Share of the features that are dropped in training; half of it inside perceptron and Transformer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, n_features: int, n_context: int, n_niches: int, *, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features + n_context))
        self.register_buffer("std", torch.ones(n_features + n_context))
        self.n_features, self.width, self.n_niches = n_features, width, n_niches
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(n_features, width)
        self.probe_cell = nn.Linear(n_features + n_context, n_niches)
        self.probe_mean = nn.Linear(n_features, n_niches, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(n_features + n_context, _HIDDEN), nn.GELU(), nn.Dropout(dropout / 2),
            nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(),
        )  # fmt: skip
        self.mlp_out = nn.Linear(_HIDDEN, n_niches, bias=False)
        self.transformer = NeighborhoodTransformer(width, depth, heads, dropout=dropout / 2)
        self.out = nn.Linear(width, n_niches)
        for layer in (self.probe_cell, self.probe_mean, self.mlp_out, self.out):
            nn.init.zeros_(layer.weight)

    def tokens(self, features: Tensor) -> Tensor:
        """What a neighbourhood needs of each of its cells, (..., width + K), from features (..., d)."""
        d = self.n_features
        x = self.dropout((features - self.mean[:d]) / self.std[:d])
        return torch.cat([self.embed(x), self.probe_mean(x)], dim=-1)

    def cell(self, features: Tensor) -> Tensor:
        """What a cell itself says, (..., K), from its features and context (..., d + c)."""
        x = self.dropout((features - self.mean) / self.std)
        return self.probe_cell(x) + self.mlp_out(self.mlp(x))

    def read(self, tokens: Tensor, cell: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K) of tokens (B, T, width + K) and of what the cells themselves say (B, K)."""
        embedded, mean = tokens.split([self.width, self.n_niches], dim=-1)
        return cell + masked_mean(mean, mask) + self.out(self.transformer(embedded, offsets, mask))

    def project(self, features: Tensor) -> Tensor:
        """What neighbourhoods need of cells with features and context (..., d + c), (..., width + 2 K)."""
        return torch.cat([self.tokens(features[..., : self.n_features]), self.cell(features)], dim=-1)

    def niches(self, projected: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K) of neighbourhoods of projected cells."""
        tokens, cell = projected.split([self.width + self.n_niches, self.n_niches], dim=-1)
        return self.read(tokens, cell[:, 0], offsets, mask)

    def forward(self, features: Tensor, cell: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K) of neighbourhoods.

        Features (B, T, d), features and context of the cells themselves (B, d + c), offsets (B, T, 2) in radii, mask (B, T).
        """
        return self.read(self.tokens(features), self.cell(cell), offsets, mask)


@dataclass
class StudentConfig:
    """What a student is made of and what it must be given.

    Attributes
    ----------
    n_features, n_niches
        Length of a cell's features, and K.
    radius
        Radius of the neighbourhoods in um.
    contract
        How the features were made (encoder, revision, pooling, um/px, field of view, normalisation, ...).
    niches
        Names of the niches.
    temperature
        tau of the loss.
    context
        Numbers of hops over which features are averaged as context; a cell reads as far as the largest of them times
        the radius. None if empty.
    context_components
        Principal components that context is made of, where there are more features.
    width, depth, heads, dropout
        Size of the Transformer.
    training
        Settings of the training, and figures measured, for the model card.
    """

    n_features: int
    n_niches: int
    radius: float
    contract: dict[str, Any] = field(default_factory=dict)
    niches: list[str] = field(default_factory=list)
    temperature: float = 2.0
    context: list[int] = field(default_factory=lambda: [2, 4])
    context_components: int = 256
    width: int = 96
    depth: int = 2
    heads: int = 4
    dropout: float = 0.5
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def context_width(self) -> int:
        """Features that are averaged for each number of hops."""
        return min(self.n_features, self.context_components)


class NicheStudent:
    """A trained student: predicts niches from histology features and positions.

    Parameters
    ----------
    config
        Configuration.

    Raises
    ------
    ValueError
        Not as many names as niches, or a width that the heads do not divide.

    Attributes
    ----------
    config
        Configuration, with the feature contract.
    module
        The torch module.
    history
        Figures of the training, one list per figure and one value per step; empty after loading.
    """

    def __init__(self, config: StudentConfig) -> None:
        self.config = config
        self.history: dict[str, list[float]] = {}
        transformer_size(width=config.width, depth=config.depth, heads=config.heads)
        if not config.niches:
            config.niches = [str(k) for k in range(config.n_niches)]
        if len(set(config.niches)) != config.n_niches or len(config.niches) != config.n_niches:
            msg = f"niches={config.niches} must be n_niches={config.n_niches} names, each another."
            raise ValueError(msg)
        with isolated_rng(int(config.training.get("seed", 0))):
            self.module = StudentModule(
                config.n_features,
                len(config.context) * config.context_width,
                config.n_niches,
                width=config.width,
                depth=config.depth,
                heads=config.heads,
                dropout=config.dropout,
            ).eval()
        if self._reduces:
            self.module.register_buffer("context_center", torch.zeros(config.n_features))
            self.module.register_buffer("context_basis", torch.zeros(config.n_features, config.context_width))

    @property
    def _reduces(self) -> bool:
        return bool(self.config.context) and self.config.context_width < self.config.n_features

    def __repr__(self) -> str:
        """One line: niches, features and radius."""
        c = self.config
        encoder = c.contract.get("encoder", "unknown")
        return f"NicheStudent(n_niches={c.n_niches}, encoder={encoder!r}, radius={c.radius:.1f} um)"

    def fit(
        self,
        features: np.ndarray | FeatureSource,
        graph: NeighborGraph,
        xy: np.ndarray,
        teacher_logits: np.ndarray,
        *,
        train_cells: np.ndarray | None = None,
        n_steps: int | None = None,
        batch_size: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        max_tokens: int = 32,
        keep: float = 0.8,
        seed: int = 0,
        description: str = "student",
    ) -> NicheStudent:
        """Train on the teacher's logits.

        Parameters
        ----------
        features
            (n, d) histology features.
        graph
            Neighbour graph at the radius of the configuration.
        xy
            (n, 2) centroids in um.
        teacher_logits
            (n, K); their softmax is the teacher's assignment of the disc centred on each cell. Only those of training cells are
            read.
        train_cells
            (n,) bool; all by default.
        n_steps
            Training steps; by default as many as show each training cell five times, between 300 and 1,500.
        batch_size, lr, weight_decay
            Schedule of the optimiser.
        max_tokens, keep
            Most cells, and the share of the neighbours, that a training neighbourhood keeps.
        seed
            Seed of everything random.
        description
            Text of the progress bar.

        Returns
        -------
        The student itself.
        """
        n_steps, batch_size, lr, seed = training_settings(n_steps=n_steps, batch_size=batch_size, lr=lr, seed=seed)
        rows = np.arange(graph.n_cells) if train_cells is None else np.flatnonzero(train_cells)
        config = self.config
        n_steps = n_steps or default_steps(len(rows), batch_size, epochs=5, least=300, most=1500)
        sample = rows
        if len(rows) > _STATISTICS_CELLS:
            sample = np.sort(np.random.default_rng(seed).choice(rows, _STATISTICS_CELLS, replace=False))
        if self._reduces:
            center, basis = principal_axes(take(features, sample), config.context_width)
            self.module.context_center.copy_(torch.from_numpy(center))
            self.module.context_basis.copy_(torch.from_numpy(basis))
        source = self._with_context(features, graph)
        self._standardise(take(source, sample))
        batches = epoch_batches(rows, batch_size, seed)

        def make(step: int) -> tuple[np.ndarray, ...]:
            centers = batches(step)
            n = padded_neighborhoods(
                graph, xy, centers, config.radius, max_tokens=max_tokens, keep=keep, seed=seed * 1_000_003 + step
            )
            offsets = rotate(n.offsets, np.random.default_rng([seed, 2, step]))
            wanted = teacher_logits[centers].astype(np.float32)
            return take(features, n.index), take(source, centers), offsets, n.mask, wanted

        def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
            *inputs, wanted = batch
            logits = module(*inputs)
            agreement = (logits.detach().argmax(1) == wanted.argmax(1)).float().mean()
            return distillation_loss(logits.float(), wanted, config.temperature), {"agreement": agreement}

        with isolated_rng(seed):
            self.history = train(
                self.module, make, loss, n_steps=n_steps, lr=lr, weight_decay=weight_decay, description=description
            )
        self.module.eval().cpu()
        return self

    def _with_context(self, features: np.ndarray | FeatureSource, graph: NeighborGraph) -> np.ndarray | FeatureSource:
        if not self.config.context:
            return features
        reduction = {}
        if self._reduces:
            reduction = {
                "center": self.module.context_center.cpu().numpy(), "basis": self.module.context_basis.cpu().numpy(),
            }  # fmt: skip
        return Joined(features, context_means(features, graph, self.config.context, **reduction))

    def _standardise(self, sample: np.ndarray) -> None:
        self.module.mean.copy_(torch.from_numpy(sample.mean(axis=0)))
        # A feature that never changes says nothing: it is centred to zero and not blown up.
        std = sample.std(axis=0)
        self.module.std.copy_(torch.from_numpy(np.where(std > 1e-6, std, 1.0).astype(np.float32)))

    def predict(
        self, features: np.ndarray | FeatureSource, graph: NeighborGraph, xy: np.ndarray, *, batch_size: int = 512
    ) -> np.ndarray:
        """Niche logits of all cells.

        Parameters
        ----------
        features
            (n, d) histology features, made as the contract says.
        graph
            Neighbour graph at the radius of the configuration.
        xy
            (n, 2) centroids in um.
        batch_size
            Cells at a time; the result does not depend on it.

        Returns
        -------
        (n, K) float32; their softmax is the predicted assignment: the mean over the discs centred on a cell and on its
        neighbours, as the teacher's is.
        """
        if features.shape[1] != self.config.n_features:
            msg = f"The features have {features.shape[1]} columns; the student was trained on {self.config.n_features}."
            raise ValueError(msg)
        source = self._with_context(features, graph)
        logits = predict_neighborhoods(
            self.module, source, graph, xy, radius=self.config.radius, batch_size=batch_size, description="predict"
        )
        return consensus(graph, logits)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md`` (the model card) to a directory.

        Parameters
        ----------
        path
            Directory, made where it does not exist.
        overwrite
            Whether a model that lies there is replaced.

        Raises
        ------
        FileExistsError
            The directory holds a model and ``overwrite`` is false, or holds something else.
        """
        config = {"class": type(self).__name__, "weights_sha256": self.digest, **asdict(self.config)}
        write_directory(Path(path), config, self.module.state_dict(), self.card(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> NicheStudent:
        """Read a model directory; executes no code from it.

        Parameters
        ----------
        path
            Directory that :meth:`save` wrote.

        Returns
        -------
        The student.

        Raises
        ------
        FileNotFoundError
            The directory or one of its files is missing.
        ValueError
            The files are damaged, do not belong together, or hold another class.
        """
        path = Path(path)
        config, weights = read_directory(path, cls.__name__)
        wanted: dict[str, Any] = {name: config.get(name) for name in StudentConfig.__dataclass_fields__}
        missing = [name for name, value in wanted.items() if value is None]
        if missing:
            msg = (
                f"Model directory {str(path)!r} is damaged: config.json lacks {missing}. Copy or train the model again."
            )
            raise ValueError(msg)
        try:
            student = cls(StudentConfig(**wanted))
        except (TypeError, ValueError) as error:
            msg = f"Model directory {str(path)!r} is damaged: config.json is at odds with itself ({error})"
            raise ValueError(msg) from error
        try:
            student.module.load_state_dict(weights)
        except RuntimeError as error:
            msg = f"Model directory {str(path)!r} is damaged: weights do not fit config.json ({error})."
            raise ValueError(msg) from error
        if config.get("weights_sha256") != student.digest:
            msg = (
                f"Model directory {str(path)!r} is damaged: the weights are not those that config.json names (sha256)."
            )
            raise ValueError(msg)
        return student

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.module)

    def card(self) -> str:
        """Model card: what the student is, what it needs, what was measured."""
        c = self.config
        rows = [f"| {name} | {value} |" for name, value in c.contract.items()]
        figures = [f"| {name} | {value} |" for name, value in c.training.items()]
        return "\n".join(
            [
                "# Niche student", "",
                f"Predicts {c.n_niches} tissue niches of cells from the histology features of their neighbourhoods.", "",
                f"Neighbourhood: all cells within {c.radius:.2f} um. Names: {', '.join(c.niches)}.", "",
                "## Features it must be given", "", "| field | value |", "|---|---|", *rows, "",
                "## Training", "", "| field | value |", "|---|---|", *figures, "",
                "Use: `hn.tl.predict_niches(sdata, model)`. Research use; not a medical device.",
                "The licence of the encoder may reach this model.", "",
            ]
        )  # fmt: skip
