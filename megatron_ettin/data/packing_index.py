"""Build and open packing indices, which say which chunks make up each training row of `seq_len` tokens.

An index is built once per dataset and length, kept in the dataset's folder (`rows_1024/`) and memory-mapped by every
rank. `packed` fills rows with whole chunks by best fit (packing.py). `padded` is the original recipe: one chunk a row,
cut to seq_len with its final [SEP] kept. There row i has chunk i, so `padded_1024/` holds only the counts.

An index stores the fingerprint of its dataset. It is rebuilt if the dataset has another one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_json
from megatron_ettin.base.parsing import with_digest
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.manifest import FileRecord
from megatron_ettin.data.packing import read_lengths, write_packed
from megatron_ettin.data.row_files import (
    PACKING_DTYPES,
    Int64Array,
    IntArray,
    PackingRecord,
    RowArrays,
    build_once,
    check_rows_exist,
    map_columns,
    read_usable_record,
)

# batching -> prefix of the index's folder
FOLDERS = {"packed": "rows", "padded": "padded"}
LENGTHS_AT_ONCE = 1 << 20


class PackingIndex:
    """Chunks of each row of one dataset, by row number. Its pickle is small, because it has no mapped files.

    Args:
        folder: where the index lies.
        record: the content of its plan.json.
        dataset: the dataset that it was made for.
        arrays: the columns of the rows; None maps those of a packed index from `folder`.
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
        # None: padded, where row i has chunk i
        self._arrays = arrays
        if arrays is None and record.batching == "packed":
            self._arrays = RowArrays(*map_columns(folder, PACKING_DTYPES).values())

    @classmethod
    def build_or_open(cls, dataset: Dataset, seq_len: int, batching: str = "packed", workers: int = 1) -> PackingIndex:
        """Open the index of a dataset for rows of `seq_len` tokens. Build it first if there is no usable one.

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
            return build_once(
                folder,
                ".row-plans.lock",
                tuple(FOLDERS.values()),
                read=lambda: cls.open(folder, dataset, seq_len, batching),
                build=lambda building: build_packing_index(building, dataset, seq_len, batching, workers),
            )
        except OSError as error:
            raise UserError(
                f"packing index {folder}: {error.strerror}; build it where the dataset can be written: "
                f"ettin prepare ... --seq-len {seq_len}"
            ) from None

    @classmethod
    def open(cls, folder: Path, dataset: Dataset, seq_len: int, batching: str) -> PackingIndex | None:
        """Open the index in `folder`; return None if it is absent, damaged or another dataset's."""
        record = read_usable_record(PackingRecord, folder, PACKING_DTYPES if batching == "packed" else ())
        wanted = (dataset.fingerprint, seq_len, batching)
        if record is None or (record.dataset_fingerprint, record.seq_len, record.batching) != wanted:
            return None
        return cls(folder, record, dataset)

    def __reduce__(self) -> tuple[type[PackingIndex], tuple[Path, PackingRecord, Dataset, RowArrays | None]]:
        return type(self), (self.folder, self.record, self._dataset, self._given)

    def chunks_of_rows(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Look up many rows [n] at once.

        Returns:
            Chunk numbers [m], row after row, and the number of chunks of each row [n].
        """
        check_rows_exist(rows, self.num_rows)
        return (rows, np.ones_like(rows)) if self._arrays is None else self._arrays.chunks_of_rows(rows)

    def tokens_of(self, rows: npt.ArrayLike) -> IntArray:
        """Return the number of tokens of each row, without padding."""
        wanted = np.asarray(rows, dtype=np.int64)
        if self._arrays is not None:
            return self._arrays.tokens[wanted].astype(np.int64)
        return np.minimum(self._dataset.lengths_of(wanted), self.seq_len)


def check_rows(dataset: Dataset, seq_len: int, batching: str) -> None:
    """Raise UserError if `batching` is unknown or rows of `seq_len` tokens cannot hold the dataset's chunks."""
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


def build_packing_index(building: Path, dataset: Dataset, seq_len: int, batching: str, workers: int) -> None:
    """Write the files of an index to the folder `building`."""
    files: dict[str, FileRecord] = {}
    if batching == "packed":
        num_rows, num_tokens, files = write_packed(building, dataset, seq_len, workers)
    else:
        num_rows, num_tokens = dataset.num_chunks, 0
        for first in range(0, num_rows, LENGTHS_AT_ONCE):
            lengths = read_lengths(dataset, first, min(first + LENGTHS_AT_ONCE, num_rows))
            num_tokens += int(np.minimum(lengths, seq_len).sum(dtype=np.int64))
    record = PackingRecord(dataset.fingerprint, seq_len, batching, num_rows, num_tokens, files)
    write_json(building / PackingRecord.FILE, with_digest(asdict(record)))
