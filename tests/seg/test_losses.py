"""Losses of segmentation students: values, gradients, learnt weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histoniche.seg import DistillationLoss, UncertaintyWeights
from histoniche.seg._losses import DEFAULT_TERMS, HiddenAlignment, cross_entropy_and_dice


def _inputs(seed: int = 0, n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(n, 2, 6, 5)))
    maps = torch.from_numpy(rng.random((n, 2, 6, 5)))
    return logits, maps, torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)[:n]


def test_terms_against_plain_numpy() -> None:
    logits, maps, labelled = _inputs()
    _, figures = DistillationLoss(uncertainty=False)(logits.float(), maps.float(), labelled.float())
    p, t = 1 / (1 + np.exp(-logits.numpy())), maps.numpy()
    for row, term in enumerate(("probability", "boundary")):
        wanted = np.mean([np.mean((p[i, row] - t[i, row]) ** 2) for i in (0, 2)])
        assert float(figures[term]) == pytest.approx(wanted, rel=1e-5)
    supervised = []
    for i in (1, 3):
        entropy = -np.mean(t[i] * np.log(p[i]) + (1 - t[i]) * np.log(1 - p[i]))
        dice = [(2 * (p[i, k] * t[i, k]).sum() + 1) / (p[i, k].sum() + t[i, k].sum() + 1) for k in (0, 1)]
        supervised.append(entropy + 1 - np.mean(dice))
    assert float(figures["supervised"]) == pytest.approx(np.mean(supervised), rel=1e-5)


def test_kl_against_plain_numpy_and_the_extremes() -> None:
    logits, maps, labelled = _inputs()
    maps[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    _, figures = DistillationLoss(uncertainty=False, matching="kl")(logits.float(), maps.float(), labelled.float())
    p, t = 1 / (1 + np.exp(-logits.numpy())), maps.numpy()
    kl = sum(np.where(t_ > 0, t_ * np.log(np.maximum(t_, 1e-300) / p_), 0) for t_, p_ in ((t, p), (1 - t, 1 - p)))
    for row, term in enumerate(("probability", "boundary")):
        wanted = np.mean([kl[i, row].mean() for i in (0, 2)])
        assert float(figures[term]) == pytest.approx(wanted, rel=1e-5)
        dice = [(2 * (p[i, row] * t[i, row]).sum() + 1) / (p[i, row].sum() + t[i, row].sum() + 1) for i in (0, 2)]
        both = DistillationLoss((term,), uncertainty=False, matching="kl_dice")(
            logits.float(), maps.float(), labelled.float()
        )
        assert float(both[0]) == pytest.approx(wanted + 1 - np.mean(dice), rel=1e-5)


def test_kl_pulls_back_a_student_that_is_sure_of_nothing() -> None:
    maps = torch.ones(1, 2, 4, 4)
    size = {}
    for matching in ("mse", "kl"):
        logits = torch.full((1, 2, 4, 4), -8.0, requires_grad=True)
        DistillationLoss(("probability",), uncertainty=False, matching=matching)(logits, maps, torch.zeros(1))[
            0
        ].backward()
        size[matching] = float(-logits.grad[0, 0].sum())
    assert size["kl"] == pytest.approx(1, abs=1e-3)  # the derivative is p - t
    assert size["mse"] < 1e-3


def test_unknown_matching() -> None:
    with pytest.raises(ValueError, match=r"matching='l1': choose one of \['mse', 'kl', 'kl_dice'\]"):
        DistillationLoss(matching="l1")


@pytest.mark.parametrize("terms", [*[(term,) for term in DEFAULT_TERMS], DEFAULT_TERMS])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("matching", ["mse", "kl", "kl_dice"])
def test_gradients(terms: tuple[str, ...], uncertainty: bool, matching: str) -> None:
    loss = DistillationLoss(terms, uncertainty=uncertainty, matching=matching).double()
    logits, maps, labelled = _inputs(1)
    # The loss computes in float32, as training does: the gradient is compared at that precision.
    logits.requires_grad_()
    loss(logits, maps, labelled)[0].backward()
    rng = np.random.default_rng(2)
    direction = torch.from_numpy(rng.normal(size=logits.shape))
    step = 1e-2
    with torch.no_grad():
        up, down = (loss(logits + sign * step * direction, maps, labelled)[0].double() for sign in (1, -1))
    numeric = float(up - down) / (2 * step)
    assert float((logits.grad * direction).sum()) == pytest.approx(numeric, rel=2e-2, abs=1e-4)


def test_gradient_of_the_supervised_loss_in_double_precision() -> None:
    logits, maps, _ = _inputs(3, n=2)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy_and_dice(x, maps), (logits,))


@pytest.mark.parametrize("matching", ["mse", "kl", "kl_dice"])
def test_perfect_prediction_is_the_minimum(matching: str) -> None:
    maps = (torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    loss = DistillationLoss(uncertainty=False, matching=matching)
    labelled = torch.tensor([0.0, 1.0])
    total, _ = loss((maps * 2 - 1) * 30, maps, labelled)
    assert float(total) == pytest.approx(0, abs=1e-4)
    worse, _ = loss((maps * 2 - 1) * -30, maps, labelled)
    assert float(worse) > 2


def test_an_absent_kind_of_items_adds_nothing() -> None:
    logits, maps, _ = _inputs()
    nobody = torch.zeros(4)
    _, figures = DistillationLoss(uncertainty=False)(logits, maps, nobody)
    assert float(figures["supervised"]) == 0
    assert float(figures["probability"]) > 0


def test_uncertainty_weights_find_the_logarithm_of_the_losses() -> None:
    losses = torch.tensor([0.02, 1.5, 0.3])
    weights = UncertaintyWeights(3)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weights(losses).backward()
        optimizer.step()
    np.testing.assert_allclose(weights.bounded.detach().numpy(), np.log(losses.numpy()), atol=0.01)
    wanted = sum((np.exp(-s) * x + s) / 2 for s, x in zip(np.log(losses.numpy()), losses.numpy(), strict=True))
    assert float(weights(losses).detach()) == pytest.approx(float(wanted), abs=1e-3)


def test_uncertainty_weights_are_bounded_and_logged() -> None:
    loss = DistillationLoss(("probability",))
    assert loss.weights is not None
    with torch.no_grad():
        loss.weights.log_variance.fill_(-50)
    logits, maps, labelled = _inputs()
    total, figures = loss(logits, maps, labelled)
    assert float(figures["s probability"]) == -8
    assert torch.isfinite(total)


def test_a_weight_comes_back_from_its_bound() -> None:
    weights = UncertaintyWeights(1)
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    ends = []
    for value in (1e-6, 0.5):
        for _ in range(300):
            optimizer.zero_grad()
            weights(torch.tensor([value])).backward()
            optimizer.step()
        ends.append(float(weights.bounded.detach()))
    assert ends == [-8, pytest.approx(np.log(0.5), abs=0.01)]


@pytest.mark.parametrize("terms", [(), ("probability", "colour")])
def test_unknown_terms(terms: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="choose at least one of"):
        DistillationLoss(terms)


# ------------------------------------------------------------------------------------------------- hidden features
def test_hidden_distance_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, yours = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 6, 4, 5, generator=generator)
    alignment = HiddenAlignment([3], [6])
    weight, bias = (p.detach().numpy() for p in alignment.projections[0].parameters())
    projected = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], mine.numpy()) + bias[:, None, None]

    def normalised(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)

    expected = np.square(normalised(projected) - normalised(yours.numpy())).mean((1, 2, 3))
    np.testing.assert_allclose(alignment([mine], [yours]).detach().numpy(), expected, rtol=1e-4)


def test_hidden_distance_ignores_scale_and_offset_and_averages_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 3, 3, generator=generator)
    alignment = HiddenAlignment([4, 4], [4, 4])
    with torch.no_grad():
        for projection in alignment.projections:
            projection.weight.copy_(torch.eye(4)[:, :, None, None])
            projection.bias.zero_()
    same = alignment([features, features], [5 * features + 2, features])
    assert same.max() < 1e-4
    far = alignment([features, features], [-features, features])
    np.testing.assert_allclose(far.detach(), torch.full((2,), 2.0), atol=1e-3)  # (2x)^2 of variance 1, over two layers


def test_hidden_distance_counts_only_what_the_teacher_saw() -> None:
    loss = DistillationLoss(["hidden"], uncertainty=False)
    logits, maps = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    total, figures = loss(logits, maps, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 50.0, 3.0]))
    assert total.item() == figures["hidden"].item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="needs the distance of hidden features"):
        loss(logits, maps, torch.zeros(3))


def test_hidden_distance_has_a_gradient() -> None:
    alignment = HiddenAlignment([2], [3]).double()
    mine = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    yours = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = alignment.projections[0].weight
    alignment([mine], [yours]).sum().backward()
    step = 1e-2
    with torch.no_grad():
        weight[0, 0] += step
        above = alignment([mine], [yours]).sum()
        weight[0, 0] -= 2 * step
        below = alignment([mine], [yours]).sum()
    assert weight.grad is not None
    assert weight.grad[0, 0].item() == pytest.approx(float(above - below) / (2 * step), rel=0.02)
