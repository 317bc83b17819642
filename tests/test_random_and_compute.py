from __future__ import annotations

import random  # noqa: TID251 - its state must be left alone
import threading
import time

import numpy as np
import pytest
import torch

from histoniche._compute import ahead
from histoniche._random import isolated_rng


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(1))


def test_generators_are_seeded_inside_and_restored_after() -> None:
    expected = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with isolated_rng(3):
        one = draws()
    with pytest.raises(KeyError), isolated_rng(3):
        assert draws() == one
        raise KeyError
    assert random.getstate() == expected[0]
    np.testing.assert_array_equal(np.random.get_state()[1], expected[1])
    assert torch.equal(torch.get_rng_state(), expected[2])
    with isolated_rng(4):
        assert draws() != one


def test_next_item_is_made_while_this_one_is_used() -> None:
    made: list[tuple[int, int]] = []

    def make(i: int) -> int:
        made.append((i, threading.get_ident()))
        return i * i

    seen = []
    for item in ahead(make, 4):
        time.sleep(0.02)
        seen.append((item, len(made)))
    assert seen == [(0, 2), (1, 3), (4, 4), (9, 4)]
    assert threading.get_ident() not in {thread for _, thread in made}
    assert list(ahead(make, 0)) == []


def test_errors_of_the_thread_reach_the_caller() -> None:
    def make(i: int) -> int:
        if i == 1:
            msg = "broken tile"
            raise ValueError(msg)
        return i

    with pytest.raises(ValueError, match="broken tile"):
        list(ahead(make, 3))
