from __future__ import annotations

import numpy as np
import pytest
import torch

from histoniche._random import isolated_rng
from histoniche.models import NeighborhoodTransformer
from histoniche.models._features import rotate
from histoniche.models._nolan import Nolan
from histoniche.models._student import StudentModule
from histoniche.models._transformer import masked_mean


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2, 1:] = False
    return torch.randn(5, 9, 16, generator=generator), torch.randn(5, 9, 2, generator=generator), mask


class StudentOfCells(StudentModule):
    """A student whose context of a cell is three of its features."""

    def forward(self, features, offsets, mask):
        return super().forward(features, torch.cat([features[:, 0], features[:, 0, :3]], dim=-1), offsets, mask)

    def project(self, features):
        return super().project(torch.cat([features, features[..., :3]], dim=-1))


def modules() -> list[torch.nn.Module]:
    made = [
        NeighborhoodTransformer(16, 2, 4),
        StudentOfCells(16, 3, 3, width=8, depth=2, heads=2, dropout=0.5),
        Nolan(torch.randn(3, 16), torch.randn(16), 2.0, 1.5, width=8, depth=1, heads=2),
    ]
    for module in made:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        module.eval()
    return made


@pytest.mark.parametrize("which", [0, 1, 2])
def test_order_of_neighbors_and_padding_do_not_matter(which: int, batch: tuple) -> None:
    with isolated_rng(1):
        module = modules()[which]
    tokens, offsets, mask = batch
    expected = module(tokens, offsets, mask)
    order = torch.tensor([0, 5, 3, 8, 1, 7, 2, 4, 6])
    torch.testing.assert_close(module(tokens[:, order], offsets[:, order], mask[:, order]), expected)
    filled = tokens.masked_fill(~mask[..., None], 77.0)
    torch.testing.assert_close(module(filled, offsets, mask), expected)
    torch.testing.assert_close(module(tokens[1:2, :4], offsets[1:2, :4], mask[1:2, :4]), expected[1:2])
    # The cell itself is not just one of its neighbours.
    swapped = torch.tensor([1, 0, *range(2, 9)])
    assert not torch.allclose(module(tokens[:, swapped], offsets[:, swapped], mask[:, swapped])[0], expected[0])


@pytest.mark.parametrize("which", [1, 2])
def test_projecting_first_is_the_same(which: int, batch: tuple) -> None:
    module = modules()[which]
    torch.testing.assert_close(module.niches(module.project(batch[0]), *batch[1:]), module(*batch))


def test_masked_mean(batch: tuple) -> None:
    tokens, _, mask = batch
    expected = torch.stack([t[m].mean(0) for t, m in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(masked_mean(tokens, mask), expected)


def test_rotation_keeps_distances_and_angles() -> None:
    offsets = np.random.default_rng(0).normal(size=(200, 6, 2)).astype(np.float32)
    turned = rotate(offsets, np.random.default_rng(1))
    gram = np.einsum("bti,bsi->bts", offsets, offsets)
    np.testing.assert_allclose(np.einsum("bti,bsi->bts", turned, turned), gram, atol=1e-4)
    cross = offsets[:, 0, 0] * offsets[:, 1, 1] - offsets[:, 0, 1] * offsets[:, 1, 0]
    mirrored = np.sign(cross) != np.sign(turned[:, 0, 0] * turned[:, 1, 1] - turned[:, 0, 1] * turned[:, 1, 0])
    assert 60 < mirrored.sum() < 140


def test_student_starts_as_a_linear_probe(batch: tuple) -> None:
    module = StudentOfCells(16, 3, 3, width=8, depth=2, heads=2, dropout=0.0).eval()
    tokens, offsets, mask = batch
    torch.testing.assert_close(module(tokens, offsets, mask), module.probe_cell.bias.expand(5, 3) + module.out.bias)


def test_nolan_starts_as_distance_to_prototypes(batch: tuple) -> None:
    prototypes, center = torch.randn(3, 16), torch.randn(16)
    module = Nolan(prototypes, center, 2.0, 1.5, width=8, depth=1, heads=2)
    tokens, offsets, mask = batch
    x = (masked_mean(tokens, mask) - center) / 2.0
    expected = -((x[:, None] - prototypes[None]) ** 2).sum(-1) / 1.5
    torch.testing.assert_close(module(tokens, offsets, mask), expected, rtol=1e-4, atol=1e-5)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="heads must divide width"):
        NeighborhoodTransformer(16, 2, 3)
