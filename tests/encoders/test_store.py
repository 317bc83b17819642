"""The feature store: layout, bounded memory, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from histoniche.encoders import FeatureStore, _store

DIM = 5
CONTRACT = {"encoder": "e", "revision": "sha256:0", "mode": "crop", "um_per_px": 0.5, "mean": [0.5, 0.5, 0.5]}
SIZES = (300, 256, 1, 700)  # two chunks, one exactly, one nearly empty, three


@pytest.fixture
def blocks() -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(sum(SIZES))
    return np.split(order, np.cumsum(SIZES)[:-1])


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(sum(SIZES), DIM)).astype(np.float16)


@pytest.fixture
def store(tmp_path: Path, blocks: list[np.ndarray], features: np.ndarray) -> FeatureStore:
    made = FeatureStore.create(tmp_path / "f.zarr", blocks, DIM, CONTRACT, "print")
    for b, cells in enumerate(blocks):
        made.write(b, features[cells])
    return made


def _chunk_file(store: FeatureStore, chunk: int) -> Path:
    return store.path / "features" / "c" / str(chunk) / "0"


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_blocks_fill_whole_chunks_and_come_back_in_the_order_of_cells(
    store: FeatureStore, features: np.ndarray
) -> None:
    again = FeatureStore(store.path)
    assert again.is_complete
    assert again.n_blocks == len(SIZES)
    assert len(again) == sum(SIZES)
    assert again.shape == features.shape
    assert again.contract == CONTRACT
    assert again.fingerprint == "print"
    got = again.to_numpy()
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, features)
    # 300 cells take two chunks of 256, 256 one, 1 one, 700 three; each is a file of its own, with four bytes of checksum.
    files = sorted((store.path / "features" / "c").rglob("0"), key=lambda p: int(p.parent.name) if p.is_file() else -1)
    assert [p.parent.name for p in files if p.is_file()] == [str(i) for i in range(7)]
    assert {p.stat().st_size for p in files if p.is_file()} == {256 * DIM * 2 + 4}


def test_take_any_cells_in_any_order_with_repeats(store: FeatureStore, features: np.ndarray) -> None:
    cells = np.random.default_rng(2).integers(0, len(store), 400)
    np.testing.assert_array_equal(store.take(cells), features[cells])
    np.testing.assert_array_equal(store.take(np.array([5])), features[[5]])
    assert store.take(np.array([], dtype=np.int64)).shape == (0, DIM)
    np.testing.assert_array_equal(store.take(np.arange(len(store))), store.to_numpy())


def test_memory_of_take_is_bounded(store: FeatureStore, features: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_bytes = 256 * DIM * 2
    monkeypatch.setattr(_store, "_CACHE_BYTES", 2 * chunk_bytes + 1)
    reads: list[int] = []
    read = FeatureStore._read
    monkeypatch.setattr(FeatureStore, "_read", lambda self, chunk: (reads.append(chunk), read(self, chunk))[1])
    cells = np.arange(len(store))
    np.testing.assert_array_equal(store.take(cells), features)
    assert sorted(reads) == list(range(7))
    assert sum(values.nbytes for values in store._cache.values()) <= 2 * chunk_bytes + 1
    assert list(store._cache) == [5, 6]
    # What was used last stays: 5 is read from memory, 0 from disk, and 6, the oldest, makes room.
    reads.clear()
    rows = {chunk: cells[store._row_of_cell // 256 == chunk][:1] for chunk in (0, 5, 6)}
    for chunk in (5, 0, 5, 6):
        np.testing.assert_array_equal(store.take(rows[chunk]), features[rows[chunk]])
    assert reads == [0, 6]


def test_unfinished_store_is_not_taken_for_whole(
    tmp_path: Path, blocks: list[np.ndarray], features: np.ndarray
) -> None:
    made = FeatureStore.create(tmp_path / "f.zarr", blocks, DIM, CONTRACT, "print")
    made.write(1, features[blocks[1]])
    made.write(3, features[blocks[3]])
    again = FeatureStore(made.path)
    assert not again.is_complete
    assert [again.done(b) for b in range(4)] == [False, True, False, True]
    with pytest.raises(ValueError, match=r"unfinished \(2 of 4 blocks are missing"):
        again.to_numpy()
    with pytest.raises(ValueError, match=r"unfinished|missing"):
        again.take(blocks[0][:3])
    np.testing.assert_array_equal(again.take(blocks[1]), features[blocks[1]])
    resumed = FeatureStore.open_or_create(made.path, blocks, DIM, CONTRACT, "print")
    resumed.write(0, features[blocks[0]])
    resumed.write(2, features[blocks[2]])
    np.testing.assert_array_equal(resumed.to_numpy(), features)


def test_a_kill_between_chunk_and_marker_leaves_the_block_undone(
    tmp_path: Path, blocks: list[np.ndarray], features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FeatureStore.create(tmp_path / "f.zarr", blocks, DIM, CONTRACT, "print")

    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if Path(target).parent.name == "done":  # zarr renames its chunks in the same way, in a thread of its own
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            made.write(0, features[blocks[0]])
    assert not FeatureStore(made.path).done(0)
    for b, cells in enumerate(blocks):
        made.write(b, features[cells])
    np.testing.assert_array_equal(FeatureStore(made.path).to_numpy(), features)


@pytest.mark.parametrize(("chunk", "block"), [(1, 0), (2, 1), (6, 3)])
def test_a_flipped_byte_is_found_and_the_chunk_named(store: FeatureStore, chunk: int, block: int) -> None:
    file = _chunk_file(store, chunk)
    content = bytearray(file.read_bytes())
    content[123] ^= 1
    file.write_bytes(content)
    again = FeatureStore(store.path)
    where = rf"damaged, chunk {chunk} \(block {block}\).*Delete it"
    with pytest.raises(ValueError, match=where):
        again.to_numpy()
    with pytest.raises(ValueError, match=where):
        again.take(np.flatnonzero(again._row_of_cell // 256 == chunk)[:1])


@pytest.mark.parametrize("harm", ["deleted", "truncated", "emptied"])
def test_a_lost_chunk_is_found_and_named(store: FeatureStore, harm: str) -> None:
    file = _chunk_file(store, 4)
    if harm == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 if harm == "truncated" else 0])
    with pytest.raises(ValueError, match=r"damaged, chunk 4 \(block 3\)"):
        FeatureStore(store.path).to_numpy()


def test_damaged_head(store: FeatureStore) -> None:
    head = store.path / "histoniche.json"
    content = head.read_text(encoding="utf-8")
    head.write_text(content[: len(content) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match="damaged: it cannot be read"):
        FeatureStore(store.path)
    with pytest.raises(ValueError, match="damaged"):
        FeatureStore.open_or_create(store.path, [np.arange(3)], DIM, CONTRACT, "print")
    without = json.loads(content)
    del without["starts"]
    head.write_text(json.dumps(without), encoding="utf-8")
    with pytest.raises(ValueError, match=r"damaged.*starts"):
        FeatureStore(store.path)
    head.unlink()
    with pytest.raises(FileNotFoundError, match=r"histoniche.json is missing"):
        FeatureStore(store.path)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no feature store at"):
        FeatureStore(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_other_features_are_refused_by_name_and_nothing_is_overwritten(
    store: FeatureStore, blocks: list[np.ndarray]
) -> None:
    before = _snapshot(store.path)
    with pytest.raises(ValueError, match=r"um_per_px: store 0\.5, asked 0\.25\): choose another place"):
        FeatureStore.open_or_create(store.path, blocks, DIM, {**CONTRACT, "um_per_px": 0.25}, "print")
    with pytest.raises(ValueError, match="encoder: store 'e', asked 'f', revision: store 'sha256:0', asked None"):
        other = {k: v for k, v in CONTRACT.items() if k != "revision"} | {"encoder": "f"}
        FeatureStore.open_or_create(store.path, blocks, DIM, other, "print")
    with pytest.raises(ValueError, match="other cells or of another image"):
        FeatureStore.open_or_create(store.path, blocks, DIM, CONTRACT, "another")
    with pytest.raises(ValueError, match="in other blocks"):
        FeatureStore.open_or_create(store.path, blocks[::-1], DIM, CONTRACT, "print")
    assert FeatureStore.open_or_create(store.path, blocks, DIM, CONTRACT, "print").is_complete
    assert _snapshot(store.path) == before
    assert [p.name for p in store.path.parent.iterdir()] == [store.path.name]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_features_that_float16_cannot_hold(tmp_path: Path, blocks: list[np.ndarray], bad: float) -> None:
    made = FeatureStore.create(tmp_path / "f.zarr", blocks, DIM, CONTRACT, "print")
    values = np.zeros((SIZES[0], DIM), dtype=np.float32)
    values[7, 2] = bad
    with pytest.raises(FloatingPointError, match="block 0 are not finite in float16"):
        made.write(0, values)
    assert not made.done(0)
    assert not _chunk_file(made, 0).exists()


def test_an_empty_folder_becomes_the_store_and_a_full_one_is_left_alone(
    tmp_path: Path, blocks: list[np.ndarray]
) -> None:
    (tmp_path / "empty").mkdir()
    made = FeatureStore.open_or_create(tmp_path / "empty", blocks, DIM, CONTRACT, "print")
    assert made.shape == (sum(SIZES), DIM)
    assert FeatureStore(tmp_path / "empty").fingerprint == "print"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"no feature store at .*full"):
        FeatureStore.open_or_create(tmp_path / "full", blocks, DIM, CONTRACT, "print")
    assert _snapshot(tmp_path / "full") == {"notes.txt": b"mine"}
