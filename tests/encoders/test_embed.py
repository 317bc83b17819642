"""Filling a store: crops, resuming, precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from histoniche import encoders
from histoniche.encoders import Encoder, FeatureStore, _embed
from histoniche.encoders._embed import fingerprint
from histoniche.encoders._tiles import Region, Slide

Make = Callable[..., Encoder]
POINTS = np.random.default_rng(0).uniform((0, 0), (240, 180), (300, 2))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    monkeypatch.setattr(_embed, "_CROP_BLOCK", 64)


def embed(
    image: np.ndarray, encoder: Encoder, place: Path, points: np.ndarray = POINTS, **changed: Any
) -> FeatureStore:
    arguments: dict[str, Any] = {"mode": "crop", "target_um_per_px": 0.5, "um_per_px": 0.5} | changed
    return encoders.embed((image,), points, encoder=encoder, store=place, **arguments)


def test_crops_are_centred_on_their_cells(means: Make, tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (3, 180, 240), dtype=np.uint8)
    whole = np.floor(POINTS)  # crops that begin at whole pixels, so that they are plain slices
    found = embed(image, means(), tmp_path / "s", whole, batch_size=7).to_numpy().reshape(-1, 3, 16, 16)
    padded = np.pad(image, ((0, 0), (8, 8), (8, 8)), constant_values=255)
    for crop, (x, y) in zip(found, whole.astype(int), strict=True):
        np.testing.assert_allclose(crop, padded[:, y : y + 16, x : x + 16], atol=0.13)


def test_crops_at_half_the_resolution_are_means_of_four_pixels(means: Make, tmp_path: Path) -> None:
    image = np.random.default_rng(2).integers(0, 256, (3, 180, 240), dtype=np.uint8)
    points = np.array([[100.0, 60.0], [60.0, 120.0]])
    found = embed(image, means(), tmp_path / "s", points, um_per_px=0.25).to_numpy().reshape(-1, 3, 16, 16)
    for crop, (x, y) in zip(found, points.astype(int), strict=True):
        part = image[:, y - 16 : y + 16, x - 16 : x + 16].reshape(3, 16, 2, 16, 2).mean(axis=(2, 4))
        np.testing.assert_allclose(crop, part, atol=0.13)


@pytest.mark.parametrize("mode", ["crop", "dense"])
def test_neither_batch_nor_order_nor_company_changes_a_cell(
    ramp: np.ndarray, means: Make, tmp_path: Path, mode: str
) -> None:
    first = embed(ramp, means(4, 8), tmp_path / "a", mode=mode, batch_size=64)
    assert first.n_blocks > 5
    order = np.random.default_rng(3).permutation(len(POINTS))[:100]
    other = embed(ramp, means(4, 8), tmp_path / "b", POINTS[order], mode=mode, batch_size=3)
    np.testing.assert_allclose(other.to_numpy().astype(float), first.take(order).astype(float), atol=0.13)


def files_of(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def reused_calls(image: np.ndarray, means: Make, place: Path, mode: str) -> list[int]:
    """Images given to the network where the store is complete already: one at a time, none of a cell."""
    encoder = means(4, 8)
    embed(image, encoder, place, mode=mode)
    assert set(encoder.module.calls) == {1}
    assert len(encoder.module.calls) <= 2
    return encoder.module.calls


@pytest.mark.parametrize("mode", ["crop", "dense"])
def test_a_killed_run_is_finished_and_nothing_is_made_twice(
    ramp: np.ndarray, means: Make, tmp_path: Path, mode: str
) -> None:
    through = embed(ramp, means(4, 8), tmp_path / "through", mode=mode)
    killed = means(4, 8)
    killed.module.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        embed(ramp, killed, tmp_path / "killed", mode=mode)
    half = FeatureStore(tmp_path / "killed")
    done = [b for b in range(half.n_blocks) if half.done(b)]
    assert 0 < len(done) < half.n_blocks
    assert not half.is_complete
    with pytest.raises(ValueError, match="unfinished"):
        half.to_numpy()
    # What a kill in the midst of a write leaves: bytes of a chunk whose block is not marked as done.
    chunk = next(
        p for p in files_of(tmp_path / "through") if p.startswith("features/c") and p not in files_of(half.path)
    )
    (half.path / chunk).parent.mkdir(parents=True, exist_ok=True)
    (half.path / chunk).write_bytes((through.path / chunk).read_bytes()[:99])

    fresh = means(4, 8)
    finished = embed(ramp, fresh, tmp_path / "killed", mode=mode)
    assert finished.is_complete
    assert files_of(finished.path) == files_of(through.path)
    whole = means(4, 8)
    embed(ramp, whole, tmp_path / "again", mode=mode)
    # What a complete store still asks of the network: the length of the features and where its maps look.
    beforehand = len(reused_calls(ramp, means, tmp_path / "killed", mode))
    assert len(fresh.module.calls) - beforehand == len(whole.module.calls) - beforehand - len(done)
    assert files_of(finished.path) == files_of(through.path)


@pytest.mark.parametrize("mode", ["crop", "dense"])
def test_only_blocks_that_were_not_written_are_read_again(
    ramp: np.ndarray, means: Make, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = embed(ramp, means(4, 8), tmp_path / "through", mode=mode)
    reads: list[tuple[float, ...]] = []
    region, write = Slide.region, FeatureStore.write

    def counted(self: Slide, low: np.ndarray, high: np.ndarray) -> Region:
        reads.append((*low, *high))
        return region(self, low, high)

    def full_disk(self: FeatureStore, block: int, features: np.ndarray) -> None:
        if block == 3:
            raise OSError("no space left")
        write(self, block, features)

    monkeypatch.setattr(Slide, "region", counted)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "write", full_disk)
        with pytest.raises(OSError, match="no space left"):
            embed(ramp, means(4, 8), tmp_path / "stopped", mode=mode)
    stopped = FeatureStore(tmp_path / "stopped")
    assert [b for b in range(stopped.n_blocks) if stopped.done(b)] == [0, 1, 2]
    written = set(reads[:3])
    reads.clear()
    finished = embed(ramp, means(4, 8), tmp_path / "stopped", mode=mode)
    assert len(reads) == len(set(reads)) == finished.n_blocks - 3
    assert not set(reads) & written
    assert files_of(finished.path) == files_of(through.path)
    reads.clear()
    embed(ramp, means(4, 8), tmp_path / "stopped", mode=mode)
    assert reads == []


def test_a_store_of_something_else_is_refused_and_left_alone(ramp: np.ndarray, means: Make, tmp_path: Path) -> None:
    embed(ramp, means(4, 8), tmp_path / "s")
    before = files_of(tmp_path / "s")
    with pytest.raises(ValueError, match=r"um_per_px: store 0\.5, asked 0\.6"):
        embed(ramp, means(4, 8), tmp_path / "s", target_um_per_px=0.6)
    with pytest.raises(ValueError, match=r"mode: store 'crop', asked 'dense'"):
        embed(ramp, means(4, 8), tmp_path / "s", mode="dense")
    with pytest.raises(ValueError, match="other cells or of another image"):
        embed(ramp, means(4, 8), tmp_path / "s", POINTS + 0.5)
    with pytest.raises(ValueError, match="other cells or of another image"):
        embed(ramp[:, ::-1], means(4, 8), tmp_path / "s")
    assert files_of(tmp_path / "s") == before


def test_a_store_in_other_blocks_is_refused(
    ramp: np.ndarray, means: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(ramp, means(), tmp_path / "s")
    monkeypatch.setattr(_embed, "_CROP_BLOCK", 32)
    with pytest.raises(ValueError, match="other blocks"):
        embed(ramp, means(), tmp_path / "s")


def test_features_too_large_for_float16_are_an_error(ramp: np.ndarray, means: Make, tmp_path: Path) -> None:
    encoder = means()
    encoder.spec = encoder.spec.__class__(**{**encoder.spec.__dict__, "std": (1e-6,) * 3})
    with pytest.raises(FloatingPointError, match=r"not finite in float16 \(largest"):
        embed(ramp, encoder, tmp_path / "s")
    assert not FeatureStore(tmp_path / "s").done(0)


def test_fingerprint_tells_images_and_cells_apart(ramp: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ramp.copy()
    other[:, 80:120, 80:120] = 0
    for limit in (8192, 100):  # the second reads patches alone
        monkeypatch.setattr(_embed, "_SAMPLED_WHOLE", limit)
        same = fingerprint((ramp,), POINTS, 0.5)
        assert same == fingerprint((ramp.copy(),), POINTS.copy(), 0.5)
        assert (
            len(
                {
                    same,
                    fingerprint((other,), POINTS, 0.5),
                    fingerprint((ramp,), POINTS[::-1], 0.5),
                    fingerprint((ramp,), POINTS, 0.4),
                }
            )
            == 4
        )
