from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from histoniche.models import distillation_loss, self_distillation_loss


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_distillation_loss_by_hand(tau: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(7, 4)), 3 * rng.normal(size=(7, 4))
    p, q = softmax(teacher / tau), softmax(student / tau)
    expected = tau**2 * np.mean([sum(p[i, k] * math.log(p[i, k] / q[i, k]) for k in range(4)) for i in range(7)])
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), tau)
    assert found.item() == pytest.approx(expected)
    assert distillation_loss(torch.from_numpy(teacher) + 5, torch.from_numpy(teacher), tau).item() == pytest.approx(
        0, abs=1e-9
    )


def test_distillation_gradient() -> None:
    teacher = torch.randn(5, 4, dtype=torch.float64)
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, 2.0), (student,))
    distillation_loss(student, teacher, 2.0).backward()
    # The gradient of tau^2 KL is tau (q - p) / B.
    expected = 2.0 * (torch.softmax(student / 2, -1) - torch.softmax(teacher / 2, -1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())


def test_distillation_survives_hard_teachers() -> None:
    teacher = torch.tensor([[400.0, -400.0, 0.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    value = distillation_loss(student, teacher, 1.0)
    value.backward()
    assert value.item() == pytest.approx(math.log(3), rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_self_distillation_pairs_by_hand() -> None:
    rng = np.random.default_rng(1)
    views = [rng.normal(size=(3, 4)) for _ in range(4)]
    total, pairs = 0.0, 0
    for i in range(2):
        for j in range(4):
            if i == j:
                continue
            q, p = softmax(views[i] / 0.05), softmax(views[j] / 0.1)
            total += -(q * np.log(p)).sum(-1).mean()
            pairs += 1
    student = [torch.from_numpy(v) for v in views]
    found = self_distillation_loss(student, student[:2], 0.1, 0.05)
    assert pairs == 6
    assert found.item() == pytest.approx(total / pairs)


def test_self_distillation_gives_the_teacher_no_gradient() -> None:
    teacher = torch.randn(3, 4, requires_grad=True)
    student = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    self_distillation_loss(student, [teacher, teacher], 0.1, 0.05).backward()
    assert teacher.grad is None
    assert all(s.grad is not None and s.grad.abs().sum() > 0 for s in student)
