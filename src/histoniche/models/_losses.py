"""Losses of the two distillations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Temperature-softened Kullback-Leibler loss, ``tau^2 * mean_i KL(p_i^teacher || p_i^student)``.

    Parameters
    ----------
    student, teacher
        (B, K) logits; ``softmax(logits)`` is the assignment at temperature 1.
    temperature
        tau; both sides are divided by it, and tau squared keeps the size of the gradient.

    Returns
    -------
    Scalar, in nats.

    References
    ----------
    Hinton et al. 2015, arXiv 1503.02531; arXiv 2604.09076 for niches.
    """
    target = F.log_softmax(teacher / temperature, dim=-1)
    found = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


def self_distillation_loss(
    student: list[Tensor], teacher: list[Tensor], student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy between the teacher's global views and all other views of the student, averaged over pairs.

    Parameters
    ----------
    student
        (B, K) logits of every view, the global ones first and in the order of ``teacher``.
    teacher
        (B, K) logits of the global views; they get no gradient.
    student_temperature, teacher_temperature
        Temperatures of the two sides.

    Returns
    -------
    Scalar, in nats.

    References
    ----------
    Caron et al. 2021, DINO, arXiv 2104.14294, equation 3; without its running centre.
    """
    log_p = [F.log_softmax(view / student_temperature, dim=-1) for view in student]
    losses = []
    for i, view in enumerate(teacher):
        q = F.softmax(view.detach() / teacher_temperature, dim=-1)
        losses += [-(q * other).sum(-1).mean() for j, other in enumerate(log_p) if j != i]
    return sum(losses[1:], losses[0]) / len(losses)
