from __future__ import annotations

import os
import random  # noqa: TID251 - its state must be left alone
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from histoniche import settings
from histoniche._compute import ahead, inference_fabric, make_fabric, on_device
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


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_order_does_not_depend_on_the_workers(workers: int) -> None:
    running, most, lock = [0], [0], threading.Lock()

    def make(i: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002 * (i % 3))  # later items may be ready first
        with lock:
            running[0] -= 1
        return i

    assert list(ahead(make, 12, workers=workers)) == list(range(12))
    assert most[0] <= workers


def test_what_has_not_begun_is_not_made_after_an_early_end() -> None:
    made: list[int] = []

    def make(i: int) -> int:
        made.append(i)
        return i

    items = ahead(make, 1000, workers=2)
    assert next(items) == 0
    items.close()
    assert len(made) <= 3


def test_seed_of_numpy_is_that_of_python() -> None:
    with isolated_rng(3):
        expected = draws()
    with isolated_rng(np.int64(3)):
        assert draws() == expected


def test_arrays_of_a_batch_become_tensors_wherever_they_lie() -> None:
    batch = [(np.ones(2, np.float32), np.array([True])), (np.arange(3), ())]
    first, second = on_device(batch, torch.device("cpu"))
    torch.testing.assert_close(first[0], torch.ones(2))
    torch.testing.assert_close(first[1], torch.tensor([True]))
    torch.testing.assert_close(second[0], torch.arange(3))
    assert second[1] == ()
    assert isinstance(first, tuple)


def test_inference_shares_a_fabric_until_settings_change(monkeypatch: pytest.MonkeyPatch) -> None:
    first = inference_fabric()
    assert inference_fabric() is first
    assert make_fabric() is not first
    monkeypatch.setattr(settings, "precision", "bf16-mixed")
    other = inference_fabric()
    assert other is not first
    assert other._precision.precision == "bf16-mixed"


_ALLOCATE = """
import resource, torch
from histoniche._compute import _glibc, memory_kept
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.full((48 << 18,), 1.0)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
usual = faults()
with memory_kept():
    for _ in range(5):  # arrays find their places
        faults()
    with memory_kept():
        pass
    kept = faults()
    resident = int(open("/proc/self/statm").read().split()[1])
freed = resident - int(open("/proc/self/statm").read().split()[1])
print(_glibc() is not None, usual, kept, freed * resource.getpagesize(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc is told")
@pytest.mark.parametrize("set_by_user", [False, True])
def test_freed_memory_is_kept_and_given_back(set_by_user: bool) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))
    }
    if set_by_user:
        environment["MALLOC_ARENA_MAX"] = "2"
    done = subprocess.run(
        [sys.executable, "-c", _ALLOCATE], env=environment, capture_output=True, text=True, check=True
    )
    told, *numbers = done.stdout.split()
    usual, kept, freed, after = map(int, numbers)
    if told == "False":
        if not set_by_user:
            pytest.skip("another C library")
        assert kept > usual / 2
        return
    assert not set_by_user
    assert kept < usual / 20
    assert after > usual / 8  # a hole that is left serves some
    assert freed > 40e6
