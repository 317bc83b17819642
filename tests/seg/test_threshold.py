"""The threshold at which Dice is best."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from histoniche.seg import Field, best_threshold
from histoniche.seg.metrics import dice


def model_of(maps: dict[str, np.ndarray]) -> Any:
    """Stand-in for a student: foreground of each field by name."""
    return SimpleNamespace(predict_field=lambda item: np.stack([maps[item.name], np.zeros_like(maps[item.name])]))


def field(labels: np.ndarray, name: str = "a", **options: Any) -> Field:
    image = np.random.default_rng(0).integers(0, 255, (1, *labels.shape), dtype=np.uint8)
    return Field(name, image, ("DNA",), labels.astype(np.int32), **options)


def test_of_right_probabilities_it_is_half_the_dice() -> None:
    rng = np.random.default_rng(0)
    probability = rng.beta(0.6, 1.2, (400, 400)).astype(np.float32)
    labels = rng.random(probability.shape) < probability
    found = best_threshold(model_of({"a": probability}), [field(labels)], candidates=np.arange(0.05, 0.95, 0.01))
    reached = dice(probability > found, labels)
    assert found == pytest.approx(reached / 2, abs=0.03)
    assert reached > dice(probability > 0.5, labels) + 0.02


def test_it_is_the_best_of_the_mean_over_fields_if_that_exceeds_its_standard_error() -> None:
    rng = np.random.default_rng(1)
    tried, chosen = [0.2, 0.3, 0.45, 0.6], []
    for _ in range(20):
        fields = [field(rng.random((20, 30)) < rng.uniform(0.2, 0.8), name) for name in "abc"]
        maps = {
            f.name: (0.4 * rng.random(f.shape) + rng.uniform(0.2, 0.5) * f.read_labels()).astype(np.float32)
            for f in fields
        }
        reached = np.array([[dice(maps[f.name] > value, f.read_labels() > 0) for value in tried] for f in fields])
        best = int(np.argmax(reached.mean(axis=0)))
        gain = reached[:, best] - reached[:, 2]
        surely = gain.mean() > gain.std(ddof=1) / np.sqrt(3)
        chosen.append(best if surely else 2)
        assert best_threshold(model_of(maps), fields, candidates=tried) == tried[chosen[-1]]
    assert len(set(chosen)) > 1


def test_one_field_that_gains_does_not_speak_for_another() -> None:
    labels = np.zeros((8, 8), dtype=bool)
    labels[2:6, 2:6] = True
    dim, bright = np.where(labels, 0.4, 0.1).astype(np.float32), np.where(labels, 0.9, 0.1).astype(np.float32)
    fields = [field(labels, name) for name in "abcd"]
    assert best_threshold(model_of(dict(zip("abcd", [dim, bright, bright, bright], strict=True))), fields) == 0.5
    assert best_threshold(model_of(dict.fromkeys("abcd", dim)), fields) == 0.35
    assert best_threshold(model_of({"a": dim}), fields[:1]) == 0.35


def test_of_equally_good_ones_the_nearest_to_a_half() -> None:
    labels = np.zeros((8, 8), dtype=bool)
    labels[2:6, 2:6] = True
    assert best_threshold(model_of({"a": labels.astype(np.float32)}), [field(labels)]) == 0.5


def test_outside_the_region_nothing_counts() -> None:
    labels = np.zeros((8, 8), dtype=bool)
    labels[:, :4] = True
    foreground = np.where(labels, 0.4, 0.1).astype(np.float32)
    foreground[6:] = 0.45  # wrong on the right, and outside
    region = np.ones((8, 8), dtype=bool)
    region[6:] = False
    tried = [0.3, 0.42]
    assert best_threshold(model_of({"a": foreground}), [field(labels, region=region)], candidates=tried) == 0.3


def test_bad_input() -> None:
    labels = np.eye(8, dtype=bool)
    model = model_of({"a": labels.astype(np.float32)})
    with pytest.raises(ValueError, match="given 0 fields"):
        best_threshold(model, [])
    with pytest.raises(ValueError, match=r"candidates=\[1.2\].*between 0 and 1"):
        best_threshold(model, [field(labels)], candidates=[1.2])
    with pytest.raises(ValueError, match="Field 'a' has no labels"):
        best_threshold(model, [field(labels).without_labels()])
