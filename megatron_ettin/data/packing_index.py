"""Build and open packing indices, which say which chunks make up each training row of `seq_len` tokens.

It is built once per dataset and length, kept next to the dataset (`rows_1024/`) and memory-mapped by every rank.
`packed` fills rows with whole chunks by best fit (packing.py). `padded` is the original recipe: one chunk a row, cut to
seq_len with its final [SEP] kept; its index is a formula, so `padded_1024/` holds only the counts.

An index carries the fingerprint of the dataset it was made for. It is rebuilt when that differs or when a file has
another length than recorded. Several processes may ask at once: one builds under a file lock, the others wait.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import TEMPORARY, atomic_folder, file_lock, write_json
from megatron_ettin.base.parsing import checked_digest, load_json, with_digest
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.indexed import map_scattered
from megatron_ettin.data.manifest import FileRecord, check_file, file_records
from megatron_ettin.data.packing import DTYPES, read_lengths, write_packed

# batching -> prefix of the index's folder
FOLDERS = {"packed": "rows", "padded": "padded"}
RECORD_FILE = "plan.json"
# raise it when the same chunks would be packed otherwise
VERSION = 1
LENGTHS_AT_ONCE = 1 << 20

IntArray = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackingRecord:
    """The content of plan.json."""

    dataset_fingerprint: str
    seq_len: int
    batching: str
    num_rows: int
    num_tokens: int
    files: dict[str, FileRecord]
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> PackingRecord:
        """Read the record of the index in `folder`.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: it cannot be read.
        """
        raw: dict[str, Any] = checked_digest(load_json((folder / RECORD_FILE).read_text(encoding="utf-8")))
        return cls(**{**raw, "files": file_records(raw["files"])})


@dataclass(frozen=True)
class RowArrays:
    """The rows of a packed index."""

    chunks: IntArray
    """Chunk numbers, row after row."""
    ends: IntArray
    """End of each row's chunks in `chunks`."""
    tokens: IntArray
    """Tokens of each row."""


class PackingIndex:
    """Chunks of each row of one dataset, by the number of the row. It pickles small: no maps.

    Args:
        folder: where the index lies.
        record: the content of its plan.json.
        dataset: the dataset that it was made for.
        arrays: the rows themselves; by default those of a packed index are mapped from its `folder`.
    """

    def __init__(self, folder: Path, record: PackingRecord, dataset: Dataset, arrays: RowArrays | None = None) -> None:
        self.folder = folder
        self.seq_len = record.seq_len
        self.batching = record.batching
        self.num_rows = record.num_rows
        self.num_tokens = record.num_tokens
        self.mean_tokens_per_row = record.num_tokens / record.num_rows
        self.fill = self.mean_tokens_per_row / record.seq_len
        # two indices with one fingerprint have the same chunks in the same rows
        hashes = {name: file.sha256 for name, file in record.files.items()}
        content = json.dumps({**asdict(record), "files": hashes}, sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode("ascii")).hexdigest()
        self.record = record
        self._dataset = dataset
        self._given = arrays
        # None: the formula of `padded`
        self._arrays = map_rows(folder) if arrays is None and record.batching == "packed" else arrays

    @classmethod
    def build_or_open(cls, dataset: Dataset, seq_len: int, batching: str = "packed", workers: int = 1) -> PackingIndex:
        """Open the index of a dataset for rows of `seq_len` tokens, and build it before where none fits.

        Args:
            dataset: the dataset, in whose folder the index is kept.
            seq_len: tokens of a row.
            batching: `packed` or `padded`.
            workers: number of processes that build; the bytes are the same for any number.

        Raises:
            UserError: the rows cannot hold the dataset's chunks, or the index cannot be written.
        """
        check_rows(dataset, seq_len, batching)
        folder = dataset.path / f"{FOLDERS[batching]}_{seq_len}"
        index = cls.open(folder, dataset, seq_len, batching)
        if index is not None:
            return index
        try:
            with file_lock(dataset.path / ".row-plans.lock") as held:
                # another process may have built it while this one waited
                index = cls.open(folder, dataset, seq_len, batching)
                if index is None:
                    if held:
                        remove_leftovers(dataset.path)
                    build_packing_index(folder, dataset, seq_len, batching, workers)
        except OSError as error:
            raise UserError(
                f"packing index {folder}: {error.strerror}; build it where the dataset can be written: "
                f"ettin prepare ... --seq-len {seq_len}"
            ) from None
        index = index or cls.open(folder, dataset, seq_len, batching)
        if index is None:
            raise UserError(f"packing index {folder}: written, but not readable as written; is the file system full?")
        return index

    @classmethod
    def open(cls, folder: Path, dataset: Dataset, seq_len: int, batching: str) -> PackingIndex | None:
        """Open the index in `folder`; return None where it is absent, damaged or another dataset's."""
        try:
            record = PackingRecord.read(folder)
            for name, file in record.files.items():
                check_file(path_in(folder, name, folder / RECORD_FILE), file, content=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
            return None
        wanted = (dataset.fingerprint, seq_len, batching, VERSION)
        if (record.dataset_fingerprint, record.seq_len, record.batching, record.version) != wanted:
            return None
        return cls(folder, record, dataset)

    def __getstate__(self) -> tuple[Path, PackingRecord, Dataset, RowArrays | None]:
        return self.folder, self.record, self._dataset, self._given

    def __setstate__(self, state: tuple[Path, PackingRecord, Dataset, RowArrays | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def chunks_of(self, row: int) -> IntArray:
        """Return the chunk numbers of one row, in the order in which they stand in it."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        if self._arrays is None:
            return np.array([row], dtype=np.int64)
        start = int(self._arrays.ends[row - 1]) if row else 0
        return self._arrays.chunks[start : int(self._arrays.ends[row])]

    def chunks_of_rows(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Look up many rows [n] at once.

        Returns:
            Chunk numbers [m], row after row, and the number of chunks of each row [n].
        """
        if rows.size and not (int(rows.min()) >= 0 and int(rows.max()) < self.num_rows):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {self.num_rows}")
        if self._arrays is None:
            return rows, np.ones_like(rows)
        ends = self._arrays.ends[rows]
        starts = np.where(rows > 0, self._arrays.ends[np.maximum(rows - 1, 0)], 0)
        # a damaged index may go backwards; the reader of an empty row reports it
        counts = np.maximum(ends - starts, 0)
        indices = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        return self._arrays.chunks[indices].astype(np.int64, copy=False), counts

    def tokens_of(self, rows: npt.ArrayLike) -> IntArray:
        """Return the real tokens of each of the rows."""
        wanted = np.asarray(rows, dtype=np.int64)
        if self._arrays is not None:
            return self._arrays.tokens[wanted].astype(np.int64)
        return np.minimum(self._dataset.lengths_of(wanted), self.seq_len)

    def verify(self) -> None:
        """Read every byte. Raises UserError naming the first damaged file."""
        for name, record in self.record.files.items():
            check_file(path_in(self.folder, name, self.folder / RECORD_FILE), record, content=True)


def map_rows(folder: Path) -> RowArrays:
    """Map the files of a packed index."""
    chunks, ends, tokens = (map_scattered(folder / name, dtype) for name, dtype in DTYPES.items())
    return RowArrays(chunks, ends, tokens)


def check_rows(dataset: Dataset, seq_len: int, batching: str) -> None:
    """Raise UserError where rows of `seq_len` tokens cannot hold the dataset's chunks."""
    if batching not in FOLDERS:
        raise UserError(f"data.batching: {batching!r}; allowed: {', '.join(FOLDERS)}")
    if seq_len < 3:
        raise UserError(f"data.seq_len: {seq_len}; a row holds at least [CLS], one token and [SEP]")
    longest = dataset.manifest.longest_chunk_tokens
    if batching == "packed" and longest > seq_len:
        raise UserError(
            f"dataset {dataset.path}: chunks of {longest} tokens (chunk_tokens = {dataset.manifest.chunk_tokens}) do "
            f"not fit rows of data.seq_len = {seq_len}; raise seq_len, prepare with --chunk-tokens {seq_len}, "
            "or use data.batching=padded, which cuts them"
        )


def existing_packing_indices(dataset: Dataset) -> list[PackingIndex]:
    """Return the usable indices of a dataset, sorted by batching and length."""
    indices = []
    for batching, prefix in FOLDERS.items():
        for folder in dataset.path.glob(f"{prefix}_*"):
            length = folder.name.removeprefix(f"{prefix}_")
            if length.isdigit() and (index := PackingIndex.open(folder, dataset, int(length), batching)):
                indices.append(index)
    return sorted(indices, key=lambda index: (index.batching, index.seq_len))


def build_packing_index(folder: Path, dataset: Dataset, seq_len: int, batching: str, workers: int) -> None:
    """Write an index; it takes the place of what was there."""
    with atomic_folder(folder) as building:
        files: dict[str, FileRecord] = {}
        if batching == "packed":
            num_rows, num_tokens, files = write_packed(building, dataset, seq_len, workers)
        else:
            num_rows, num_tokens = dataset.num_chunks, 0
            for first in range(0, num_rows, LENGTHS_AT_ONCE):
                lengths = read_lengths(dataset, first, min(first + LENGTHS_AT_ONCE, num_rows))
                num_tokens += int(np.minimum(lengths, seq_len).sum(dtype=np.int64))
        record = PackingRecord(dataset.fingerprint, seq_len, batching, num_rows, num_tokens, files)
        write_json(building / RECORD_FILE, with_digest(asdict(record)))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed builders have left. Only the holder of the lock may call it."""
    for prefix in (*FOLDERS.values(), "stale"):
        for leftover in folder.glob(f"{TEMPORARY}{prefix}[_-]*"):
            shutil.rmtree(leftover, ignore_errors=True)
