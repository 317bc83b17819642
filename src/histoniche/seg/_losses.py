"""What a student is taught with: the teacher's probabilities, its boundaries, labels, weighted by learnt uncertainty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

TERMS = ("probability", "boundary", "hidden", "supervised")
DEFAULT_TERMS = ("probability", "boundary", "supervised")
Matching = Literal["mse", "kl", "kl_dice"]
MATCHINGS: tuple[Matching, ...] = get_args(Matching)
_BOUND = 8.0


class UncertaintyWeights(nn.Module):
    """Weights of the terms of a loss, learnt with the model.

    The total is sum_k exp(-s_k) L_k / 2 + s_k / 2. Its minimum over s_k is at log L_k, so every term counts alike, whatever
    its scale; a negative total is normal.

    Parameters
    ----------
    n_terms
        Number of terms.
    bound
        s_k is held in [-bound, bound], lest it runs away as a term goes to zero.

    References
    ----------
    Kendall, Gal and Cipolla 2018, doi 10.1109/CVPR.2018.00781.
    """

    def __init__(self, n_terms: int, bound: float = _BOUND) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(n_terms))
        self.bound = bound

    @property
    def bounded(self) -> Tensor:
        """s_k, within bounds."""
        return self.log_variance.clamp(-self.bound, self.bound)

    def forward(self, losses: Tensor) -> Tensor:
        """Total of losses (n_terms,)."""
        with torch.no_grad():  # the parameter itself: a clamp in the graph has no gradient by which it would come back
            self.log_variance.clamp_(-self.bound, self.bound)
        s = self.log_variance
        return ((torch.exp(-s) * losses + s) / 2).sum()


class HiddenAlignment(nn.Module):
    """Distance of a student's hidden features from its teacher's, layer by layer.

    Each of the student's layers is projected to the width of the teacher's; both are normalised over their features at every
    place (LayerNorm without scale), and compared by their mean squared error: 0 where they agree up to scale and offset, 2
    where they have nothing in common.

    Parameters
    ----------
    widths
        Features of each of the student's layers.
    teacher_widths
        Features of the teacher's layer that each is compared with.

    References
    ----------
    Liang et al. 2025, arXiv 2503.06976.
    """

    def __init__(self, widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(widths, teacher_widths, strict=True)
        self.projections = nn.ModuleList(nn.Conv2d(mine, yours, 1) for mine, yours in pairs)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean distance over layers and places, (B,), of features (B, c, h, w) of each layer."""
        errors = []
        for project, mine, yours in zip(self.projections, student, teacher, strict=True):
            error = (_normalised(project(mine)) - _normalised(yours)).square()
            errors.append(error.mean(dim=(1, 2, 3)))
        return torch.stack(errors).mean(dim=0)


def _normalised(features: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the features of every place; (B, h, w, c)."""
    moved = features.float().permute(0, 2, 3, 1)
    return F.layer_norm(moved, moved.shape[-1:])


class DistillationLoss(nn.Module):
    """Loss of maps that a student predicts.

    *probability*: distance of the foreground's probability from the teacher's. *boundary*: that of the probability of a
    boundary, whose boundary is that of each object, so that objects that touch stay apart. *hidden*: distance of hidden features,
    see :class:`HiddenAlignment`. *supervised*: cross-entropy and soft Dice of both maps with those of the labels, on items with
    labels. Where ``uncertainty`` is false, terms are added with weights of one.

    Parameters
    ----------
    terms
        Terms to use, of :data:`TERMS`.
    uncertainty
        Whether weights are learnt.
    matching
        How probabilities are compared: ``"mse"``, mean squared error; ``"kl"``, the Kullback-Leibler divergence in nats, whose
        gradient does not fade where the student is sure; or ``"kl_dice"``, that and the soft Dice loss, for structures that are sparse
        and thin.
    """

    def __init__(
        self,
        terms: Sequence[str] = DEFAULT_TERMS,
        *,
        uncertainty: bool = True,
        matching: Matching = "mse",
    ) -> None:
        super().__init__()
        if matching not in MATCHINGS:
            msg = f"matching={matching!r}: choose one of {list(MATCHINGS)}."
            raise ValueError(msg)
        self.matching = matching
        unknown = [term for term in terms if term not in TERMS]
        if unknown or not terms:
            msg = f"terms={list(terms)}: choose at least one of {list(TERMS)}."
            raise ValueError(msg)
        self.terms = tuple(term for term in TERMS if term in terms)
        self.weights = UncertaintyWeights(len(self.terms)) if uncertainty else None

    def forward(
        self, logits: Tensor, maps: Tensor, labelled: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total, and figures to record.

        Parameters
        ----------
        logits
            (B, 2, y, x) of the student.
        maps
            (B, 2, y, x) targets: the labels' where ``labelled``, else the teacher's.
        labelled
            (B,) 1 for items with labels, 0 for those of the teacher.
        hidden
            (B,) distance of hidden features, where that is a term.
        """
        logits = logits.float()
        taught = 1 - labelled
        figures: dict[str, Tensor] = {}
        for term in self.terms:
            if term == "supervised":
                figures[term] = weighted_mean(cross_entropy_and_dice(logits, maps), labelled)
            elif term == "hidden":
                if hidden is None:
                    msg = 'The term "hidden" needs the distance of hidden features.'
                    raise ValueError(msg)
                figures[term] = weighted_mean(hidden, taught)
            else:
                row = TERMS.index(term)
                figures[term] = weighted_mean(map_distance(logits[:, row], maps[:, row], self.matching), taught)
        losses = torch.stack(list(figures.values()))
        if self.weights is None:
            return losses.sum(), figures
        for term, s in zip(self.terms, self.weights.bounded.detach(), strict=True):
            figures[f"s {term}"] = s
        return self.weights(losses), figures


def map_distance(logits: Tensor, target: Tensor, matching: Matching) -> Tensor:
    """Distance of ``sigmoid(logits)`` (B, y, x) from probabilities, (B,)."""
    if matching == "mse":
        return (logits.sigmoid() - target).square().mean(dim=(1, 2))
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    kl = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy).mean(dim=(1, 2))
    return kl if matching == "kl" else kl + 1 - soft_dice(logits.sigmoid(), target)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (B,) with weights (B,); 0 where all weights are."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def cross_entropy_and_dice(logits: Tensor, maps: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice loss of every item, (B,), mean over its maps."""
    entropy = F.binary_cross_entropy_with_logits(logits, maps, reduction="none").mean(dim=(1, 2, 3))
    return entropy + (1 - soft_dice(logits.sigmoid(), maps)).mean(dim=1)


def soft_dice(probability: Tensor, target: Tensor) -> Tensor:
    """Dice of maps (..., y, x), which need not be 0 or 1, (...,)."""
    overlap = 2 * (probability * target).sum(dim=(-2, -1)) + 1
    return overlap / (probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) + 1)
