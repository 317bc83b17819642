"""Features on disk: written block by block, resumed after a kill, never half-written and taken for whole.

Layout of the zarr group: ``features`` (rows, d) float16 in chunks of whole blocks, each with a CRC-32C checksum;
``row_of_cell`` (n,) int64; ``done/<block>`` an empty file per finished block, made when its chunks are on disk. The
cells of a block fill whole chunks (the rest is padding), so that no chunk is ever written twice.
"""

from __future__ import annotations

import json
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from ._contract import contract_difference

_CHUNK_ROWS = 256
_CACHE_BYTES = 1 << 30
_FORMAT = 1


class FeatureStore:
    """Features of n cells on disk; see the module for the layout.

    Parameters
    ----------
    path
        Directory of a complete or unfinished store.

    Raises
    ------
    FileNotFoundError
        There is no store.
    ValueError
        The store is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "histoniche.json").is_file():
            msg = f"There is no feature store at {str(self.path)!r}: histoniche.json is missing."
            raise FileNotFoundError(msg)
        try:
            head = json.loads((self.path / "histoniche.json").read_text(encoding="utf-8"))
            group = zarr.open_group(self.path, mode="r+")
            self._features, self._row_of_cell = group["features"], np.asarray(group["row_of_cell"][:])
            self.contract: dict[str, Any] = head["contract"]
            self.fingerprint: str = head["fingerprint"]
            self._starts = np.asarray(head["starts"], dtype=np.int64)
            written_by = head["format"]
        except Exception as error:  # zarr and json raise many kinds for damaged files
            what = "it cannot be read"
            raise self._damaged(what, error) from error
        if written_by != _FORMAT:
            msg = f"The feature store {str(self.path)!r} has the format {written_by}, this version reads {_FORMAT}: choose another place."
            raise ValueError(msg)
        rows = self._row_of_cell
        if self._features.shape[0] != self._starts[-1] or (
            len(rows) and not 0 <= rows.min() <= rows.max() < self._starts[-1]
        ):
            what = f"its {len(self._features)} rows do not fit its blocks and cells"
            raise self._damaged(what)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def create(
        cls, path: str | Path, blocks: list[np.ndarray], dim: int, contract: dict[str, Any], fingerprint: str
    ) -> FeatureStore:
        """Make an empty store.

        Parameters
        ----------
        path
            Directory that does not exist yet, or is empty.
        blocks
            The cells of each block; together every cell once.
        dim
            Length of the features.
        contract
            How the features are made.
        fingerprint
            Of what: cells, image and transformation.
        """
        path = Path(path)
        starts, row_of_cell = _layout(blocks)
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        group = zarr.open_group(making, mode="w-", zarr_format=3)
        group.create_array(
            "features",
            shape=(int(starts[-1]), dim),
            chunks=(_CHUNK_ROWS, dim),
            dtype="float16",
            fill_value=float("nan"),
            serializer=BytesCodec(),
            compressors=Crc32cCodec(),
        )
        group.create_array("row_of_cell", data=row_of_cell, chunks=(max(1, len(row_of_cell)),))
        (making / "done").mkdir()
        head = {"format": _FORMAT, "contract": contract, "fingerprint": fingerprint, "starts": starts.tolist()}
        (making / "histoniche.json").write_text(json.dumps(head), encoding="utf-8")
        if path.is_dir():
            path.rmdir()  # fails where it is not empty
        making.rename(path)
        return cls(path)

    @classmethod
    def open_or_create(
        cls, path: str | Path, blocks: list[np.ndarray], dim: int, contract: dict[str, Any], fingerprint: str
    ) -> FeatureStore:
        """Resume the store of the same features, or make one; a store of other features is never touched."""
        path = Path(path)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return cls.create(path, blocks, dim, contract, fingerprint)
        store = cls(path)
        differing = contract_difference(store.contract, contract)
        if differing:
            details = ", ".join(f"{k}: store {store.contract.get(k)!r}, asked {contract.get(k)!r}" for k in differing)
            msg = f"The feature store {str(path)!r} holds other features ({details}): choose another place."
            raise ValueError(msg)
        if store.fingerprint != fingerprint:
            msg = f"The feature store {str(path)!r} holds the features of other cells or of another image: choose another place."
            raise ValueError(msg)
        starts, row_of_cell = _layout(blocks)
        if (
            store.shape[1] != dim
            or not np.array_equal(starts, store._starts)
            or not np.array_equal(row_of_cell, store._row_of_cell)
        ):
            msg = f"The feature store {str(path)!r} has its cells in other blocks, as another version of histoniche makes them: choose another place."
            raise ValueError(msg)
        return store

    @property
    def dtype(self) -> np.dtype:
        """float16."""
        return np.dtype(np.float16)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self._row_of_cell), self._features.shape[1]

    def __len__(self) -> int:
        """Number of cells."""
        return len(self._row_of_cell)

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self._starts) - 1

    def done(self, block: int) -> bool:
        """Whether a block is on disk."""
        return (self.path / "done" / str(block)).exists()

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are on disk."""
        return all(self.done(block) for block in range(self.n_blocks))

    def write(self, block: int, features: np.ndarray) -> None:
        """Write the features of a block, (cells of the block, d), and mark it as done.

        Raises
        ------
        FloatingPointError
            A feature is NaN, or too large for float16.
        """
        with np.errstate(over="ignore"):
            half = np.asarray(features).astype(np.float16)
        if not np.isfinite(half).all():
            msg = f"Features of block {block} are not finite in float16 (largest {np.abs(features).max():.4g}): the encoder does not suit the image."
            raise FloatingPointError(msg)
        start, end = self._starts[block], self._starts[block + 1]
        padded = np.zeros((end - start, half.shape[1]), dtype=np.float16)
        padded[: len(half)] = half
        self._features[start:end] = padded
        marker = self.path / "done" / str(block)
        marker.with_suffix(".new").touch()
        marker.with_suffix(".new").replace(marker)

    def take(self, cells: np.ndarray) -> np.ndarray:
        """Features of cells, (len(cells), d) float16; a bounded number of chunks is kept in memory."""
        rows = self._row_of_cell[cells]
        out = np.empty((len(rows), self.shape[1]), dtype=np.float16)
        chunk_of = rows // _CHUNK_ROWS
        order = np.argsort(chunk_of, kind="stable")
        cuts = np.flatnonzero(np.diff(chunk_of[order])) + 1
        for part in np.split(order, cuts):
            if len(part):
                chunk = int(chunk_of[part[0]])
                out[part] = self._chunk(chunk)[rows[part] - chunk * _CHUNK_ROWS]
        return out

    def to_numpy(self) -> np.ndarray:
        """All features, (n, d) float16, in memory."""
        unfinished = [block for block in range(self.n_blocks) if not self.done(block)]
        if unfinished:
            raise self._unfinished(unfinished)
        out = np.empty(self.shape, dtype=np.float16)
        cell_of_row = np.full(self._features.shape[0], -1, dtype=np.int64)
        cell_of_row[self._row_of_cell] = np.arange(len(self))
        for chunk in range(self._features.shape[0] // _CHUNK_ROWS):
            cells = cell_of_row[chunk * _CHUNK_ROWS : (chunk + 1) * _CHUNK_ROWS]
            out[cells[cells >= 0]] = self._read(chunk)[cells >= 0]
        return out

    def _chunk(self, chunk: int) -> np.ndarray:
        if chunk in self._cache:
            self._cache.move_to_end(chunk)
            return self._cache[chunk]
        values = self._read(chunk)
        self._cache[chunk] = values
        while len(self._cache) * values.nbytes > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return values

    def _read(self, chunk: int) -> np.ndarray:
        if not self.done(self._block_of(chunk)):
            raise self._unfinished([self._block_of(chunk)])
        try:
            values = self._features[chunk * _CHUNK_ROWS : (chunk + 1) * _CHUNK_ROWS]
        except Exception as error:  # a checksum or the file system, by way of zarr
            what = "the chunk cannot be read"
            raise self._damaged(what, error, chunk) from error
        if not np.isfinite(values).all():
            what = "the chunk is missing"
            raise self._damaged(what, chunk=chunk)
        return values

    def _unfinished(self, blocks: list[int]) -> ValueError:
        msg = (
            f"The feature store {str(self.path)!r} is unfinished ({len(blocks)} of {self.n_blocks} blocks are missing, "
            f"the first is {blocks[0]}): run its step again."
        )
        return ValueError(msg)

    def _damaged(self, what: str, error: Exception | None = None, chunk: int | None = None) -> ValueError:
        which = "" if chunk is None else f", chunk {chunk} (block {self._block_of(chunk)})"
        cause = "" if error is None else f" ({type(error).__name__}: {error})"
        msg = (
            f"The feature store {str(self.path)!r} is damaged{which}: {what}{cause}. Delete it and run "
            "`hn.tl.histology_embedding` again."
        )
        return ValueError(msg)

    def _block_of(self, chunk: int) -> int:
        return int(np.searchsorted(self._starts, chunk * _CHUNK_ROWS, side="right")) - 1


def _layout(blocks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """First row of each block and the end, (n_blocks + 1,) int64; row of each cell, (n,) int64."""
    padded = [-(-len(block) // _CHUNK_ROWS) * _CHUNK_ROWS for block in blocks]
    starts = np.concatenate([[0], np.cumsum(padded)]).astype(np.int64)
    row_of_cell = np.empty(sum(len(block) for block in blocks), dtype=np.int64)
    for start, block in zip(starts[:-1], blocks, strict=True):
        row_of_cell[block] = start + np.arange(len(block))
    return starts, row_of_cell
