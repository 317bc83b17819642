from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from histoniche.models import NicheStudent, StudentConfig
from histoniche.neighbors import NeighborGraph, radius_graph

RADIUS = 12.0


@pytest.fixture(scope="module")
def tissue() -> tuple[np.ndarray, NeighborGraph, np.ndarray, np.ndarray]:
    """Stripes of two niches that only the mean over the neighbourhood tells apart."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 150, (1200, 2))
    niche = (xy[:, 0] // 50).astype(int) % 2
    features = rng.normal(size=(1200, 6)).astype(np.float16)
    features[:, 0] += 1.2 * niche.astype(np.float16)
    logits = np.where(niche[:, None] == np.arange(2), 2.0, -2.0).astype(np.float32)
    return features, radius_graph(xy, RADIUS), xy, logits


def student(seed: int = 0, **kwargs: object) -> NicheStudent:
    config = StudentConfig(
        n_features=6, n_niches=2, radius=RADIUS, width=16, depth=2, heads=2, training={"seed": seed}, **kwargs
    )
    return NicheStudent(config)


@pytest.fixture(scope="module")
def trained(tissue: tuple) -> NicheStudent:
    features, graph, xy, logits = tissue
    return student(contract={"encoder": "toy"}).fit(
        features, graph, xy, logits, n_steps=60, batch_size=64, max_tokens=16, lr=1e-2
    )


def test_learns_what_only_the_neighborhood_shows(tissue: tuple, trained: NicheStudent) -> None:
    features, graph, xy, logits = tissue
    found = trained.predict(features, graph, xy)
    cell_alone = ((features[:, 0] > 0.6) == logits.argmax(1)).mean()
    assert (found.argmax(1) == logits.argmax(1)).mean() > 0.88 > cell_alone
    assert trained.history["loss"][-1] < 0.6 * trained.history["loss"][0]


def test_same_seed_same_labels_and_no_trace_in_the_callers_generators(tissue: tuple, trained: NicheStudent) -> None:
    features, graph, xy, logits = tissue
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = student(contract={"encoder": "toy"}).fit(
        features, graph, xy, logits, n_steps=60, batch_size=64, max_tokens=16, lr=1e-2
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    np.testing.assert_array_equal(again.predict(features, graph, xy), trained.predict(features, graph, xy))
    assert again.digest == trained.digest
    other = student().fit(features, graph, xy, logits, n_steps=60, batch_size=64, max_tokens=16, lr=1e-2, seed=1)
    assert other.digest != trained.digest


def test_labels_do_not_depend_on_batch_size_or_order_of_cells(tissue: tuple, trained: NicheStudent) -> None:
    features, graph, xy, _ = tissue
    expected = trained.predict(features, graph, xy)
    np.testing.assert_allclose(trained.predict(features, graph, xy, batch_size=7), expected, atol=1e-4)
    order = np.random.default_rng(3).permutation(len(xy))
    permuted = trained.predict(features[order], radius_graph(xy[order], RADIUS), xy[order])
    np.testing.assert_allclose(permuted, expected[order], atol=1e-4)


def test_only_training_cells_are_read(tissue: tuple) -> None:
    features, graph, xy, logits = tissue
    train = xy[:, 1] < 75
    spoilt = logits.copy()
    spoilt[~train] = np.nan
    settings = {"n_steps": 10, "batch_size": 64, "train_cells": train}
    one = student().fit(features, graph, xy, logits, **settings)
    two = student().fit(features, graph, xy, spoilt, **settings)
    assert one.digest == two.digest


def test_features_from_a_store(tissue: tuple, trained: NicheStudent) -> None:
    features, graph, xy, logits = tissue

    class Store:
        shape = features.shape

        def take(self, cells: np.ndarray) -> np.ndarray:
            assert cells.ndim == 1
            return features[cells]

    np.testing.assert_array_equal(trained.predict(Store(), graph, xy), trained.predict(features, graph, xy))
    settings = {"n_steps": 5, "batch_size": 32}
    assert (
        student().fit(Store(), graph, xy, logits, **settings).digest
        == student().fit(features, graph, xy, logits, **settings).digest
    )


def test_save_and_load(tissue: tuple, trained: NicheStudent, tmp_path: Path) -> None:
    features, graph, xy, _ = tissue
    trained.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    loaded = NicheStudent.load(tmp_path / "model")
    assert loaded.config == trained.config
    np.testing.assert_array_equal(loaded.predict(features, graph, xy), trained.predict(features, graph, xy))
    assert "toy" in (tmp_path / "model" / "README.md").read_text()


def test_nothing_is_overwritten(trained: NicheStudent, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        trained.save(tmp_path / "model")
    trained.save(tmp_path / "model", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="is no model directory"):
        trained.save(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "data.txt").read_text() == "precious"


def test_damaged_models(trained: NicheStudent, tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        NicheStudent.load(path)
    trained.save(path)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="damaged and cannot be read"):
        NicheStudent.load(path)
    flipped = bytearray(weights)
    flipped[-5] ^= 0x10
    (path / "model.safetensors").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"weights are not those that config\.json names"):
        NicheStudent.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        NicheStudent.load(path)
    (path / "model.safetensors").write_bytes(weights)
    config = json.loads((path / "config.json").read_text())
    for change, message in [
        ({"width": 32}, "weights do not fit"),
        ({"class": "Other"}, "holds a 'Other'"),
        ({"format": 99}, "format 99"),
        ({"radius": None}, "lacks"),
    ]:
        (path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            NicheStudent.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged and cannot be read"):
        NicheStudent.load(path)


def test_wrong_number_of_features(tissue: tuple, trained: NicheStudent) -> None:
    features, graph, xy, _ = tissue
    with pytest.raises(ValueError, match="have 5 columns; the student was trained on 6"):
        trained.predict(features[:, :5], graph, xy)


def test_constant_and_extreme_features(tissue: tuple) -> None:
    features, graph, xy, logits = tissue
    constant = features.copy()
    constant[:, 3] = 7
    found = student().fit(constant, graph, xy, logits, n_steps=5, batch_size=32).predict(constant, graph, xy)
    assert np.isfinite(found).all()
    broken = features.astype(np.float32)
    broken[:, 0] = np.inf
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        student().fit(broken, graph, xy, logits, n_steps=5, batch_size=32)


@pytest.mark.parametrize("niches", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_as_many_names_as_niches(niches: list[str], trained: NicheStudent, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be n_niches=2 names"):
        student(niches=niches)
    trained.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "niches": niches}))
    with pytest.raises(ValueError, match=r"is damaged: config\.json .* must be n_niches=2 names"):
        NicheStudent.load(tmp_path / "m")


def test_numbers_of_numpy_are_written(tmp_path: Path) -> None:
    config = StudentConfig(6, 2, np.float32(12), width=np.int64(16), heads=2, training={"scale": np.arange(2)})
    NicheStudent(config).save(tmp_path / "m")
    found = NicheStudent.load(tmp_path / "m").config
    assert (found.width, found.radius, found.training) == (16, 12.0, {"scale": [0, 1]})


def test_settings_of_a_training_are_checked(tissue: tuple) -> None:
    for name, value in {"batch_size": 0, "lr": 0.0, "n_steps": 0, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            student().fit(*tissue, **{name: value})
    with pytest.raises(TypeError, match=r"batch_size=2\.5 must be a whole number"):
        student().fit(*tissue, batch_size=2.5)
    with pytest.raises(ValueError, match="width=16 must be a multiple of the 3 heads: 18"):
        NicheStudent(StudentConfig(6, 2, RADIUS, width=16, heads=3))
