"""Compile a data order recorded in files (`data.order=FILE`), and read its rows in its order.

Compiling (exported.py, published.py) writes which chunks make up each row to `order_<key>/` in the first dataset, or to
`$ETTIN_CACHE/orders` where the dataset cannot be written; every rank memory-maps it. Like a packing index it is written
under a lock, renamed into place and checked by the size of its files. Its fingerprint covers the datasets and the
chunks of every row, not where the files lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import TEMPORARY, atomic_folder, file_lock, fsync, write_json
from megatron_ettin.base.parsing import checked_digest, load_json, with_digest
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.default_tokenizer import cache_directory
from megatron_ettin.data.indexed import map_scattered, narrowed
from megatron_ettin.data.manifest import FileRecord, check_file, file_records, record_of
from megatron_ettin.data.replay.exported import exported_rows
from megatron_ettin.data.replay.files import RecordedRows, common_format, open_order_files
from megatron_ettin.data.replay.published import published_rows

# raise it when the same files would be compiled otherwise
VERSION = 1
RECORD_FILE = "order.json"
# file -> the type of its values: one for each chunk of a row in the first file, one for each row in the others
COLUMNS: dict[str, np.dtype[Any]] = {
    # chunk numbers, row after row
    "chunks.int64": np.dtype("<i8"),
    # where the row's chunks end in chunks.int64
    "ends.int64": np.dtype("<i8"),
    # index of the row's dataset in `OrderRecord.datasets`
    "sources.int16": np.dtype("<i2"),
    "tokens.int32": np.dtype("<i4"),
    # number of the row in its dataset's packing index, for the table of `ettin order`
    "rows.int64": np.dtype("<i8"),
}
# the files that the fingerprint covers
CONTENT = ("chunks.int64", "ends.int64", "sources.int16")
READERS = {"exported": exported_rows, "published": published_rows}

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OrderRecord:
    """The content of a compiled order's order.json."""

    seq_len: int
    batching: str
    num_rows: int
    mean_tokens_per_row: float
    """Nominal tokens of a row: those of the data that an exported order came from, else those of these rows."""
    datasets: list[str]
    """Fingerprints, in order of appearance."""
    tokens: list[int]
    """Tokens of each dataset."""
    skipped_samples: int
    files: dict[str, FileRecord]
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> OrderRecord:
        """Read the record of the compiled order in `folder`.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: it cannot be read.
        """
        raw: dict[str, Any] = checked_digest(load_json((folder / RECORD_FILE).read_text(encoding="utf-8")))
        return cls(**{**raw, "files": file_records(raw["files"])})

    @property
    def fingerprint(self) -> str:
        """sha256 over the datasets and the chunks of every row."""
        hashes = [self.files[name].sha256 for name in CONTENT]
        content = ["given order", self.version, self.seq_len, self.batching, *self.datasets, *hashes]
        return hashlib.sha256(":".join(map(str, content)).encode("ascii")).hexdigest()


class RecordedSampler:
    """Rows by order index, as `open_recorded_sampler` compiled them. It pickles small.

    Args:
        folder: where the compiled order lies.
        record: the content of its order.json.
        fingerprints: fingerprints of the mixture's datasets.
    """

    def __init__(self, folder: Path, record: OrderRecord, fingerprints: Sequence[str]) -> None:
        self.folder = folder
        self.record = record
        self.fingerprints = list(fingerprints)
        self.num_rows = record.num_rows
        self.mean_tokens_per_row = record.mean_tokens_per_row
        self.fingerprint = record.fingerprint
        self._source = np.asarray([self.fingerprints.index(name) for name in record.datasets], np.int64)
        maps = [map_scattered(folder / name, dtype) for name, dtype in COLUMNS.items()]
        self._chunks, self._ends, self._sources, self._tokens, self._rows = maps

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "record": self.record, "fingerprints": self.fingerprints}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def tokens_by_source(self) -> list[int]:
        """Tokens of each of the mixture's datasets."""
        by_name = dict(zip(self.record.datasets, self.record.tokens, strict=True))
        return [by_name.pop(name, 0) for name in self.fingerprints]

    def locate(self, order_indices: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return (source, row, epoch 0) of each order index."""
        wanted = self._checked(order_indices)
        rows = self._rows[wanted].astype(np.int64)
        return self._source[self._sources[wanted]], rows, np.zeros_like(rows)

    def row_chunks(self, order_indices: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Return the number of chunks [n] of each row [n], and the chunk numbers [m], row after row."""
        wanted = self._checked(order_indices)
        starts = np.where(wanted > 0, self._ends[np.maximum(wanted - 1, 0)], 0)
        counts = self._ends[wanted] - starts
        ends = np.cumsum(counts)
        return counts, self._chunks[np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)]

    def token_counts(self, order_indices: npt.ArrayLike) -> Int64Array:
        """Return the real tokens of each row."""
        return self._tokens[self._checked(order_indices)].astype(np.int64)

    def _checked(self, order_indices: npt.ArrayLike) -> Int64Array:
        wanted = np.asarray(order_indices, np.int64)
        if wanted.size and not (int(wanted.min()) >= 0 and int(wanted.max()) < self.num_rows):
            raise IndexError(f"order indices {int(wanted.min())} to {int(wanted.max())} of {self.num_rows} rows")
        return wanted


def open_recorded_sampler(
    path: str, datasets: Sequence[Dataset], seq_len: int, batching: str, missing: str = "error"
) -> RecordedSampler:
    """Open the order in `path` over these datasets, and compile it first unless that was done.

    Args:
        path: `data.order`.
        datasets: the datasets of the mixture.
        seq_len: tokens of a row.
        batching: `packed` or `padded`.
        missing: `skip` leaves out samples that no dataset has, `error` refuses them.
    """
    files = open_order_files(path)
    fingerprints = [dataset.fingerprint for dataset in datasets]
    content = [VERSION, seq_len, batching, missing, *fingerprints, *files.identity]
    key = hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:16]
    parents = (datasets[0].path, cache_directory() / "orders")
    for parent in parents:
        if record := read_record(parent / f"order_{key}", seq_len, batching):
            return RecordedSampler(parent / f"order_{key}", record, fingerprints)
    parent = parents[0] if os.access(parents[0], os.W_OK) else parents[1]
    folder = parent / f"order_{key}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with file_lock(parent / ".orders.lock"):
            # another process may have compiled it while this one waited
            record = read_record(folder, seq_len, batching)
            if record is None:
                rows = READERS[common_format(files)](files, datasets, seq_len, batching, missing)
                build_order(folder, rows, seq_len, batching, datasets)
    except OSError as error:
        raise UserError(f"data.order: {folder}: {error.strerror}; it is compiled there from {path}") from None
    record = record or read_record(folder, seq_len, batching)
    if record is None:
        raise UserError(f"data.order: {folder}: written, but not readable as written; is the file system full?")
    return RecordedSampler(folder, record, fingerprints)


def read_record(folder: Path, seq_len: int, batching: str) -> OrderRecord | None:
    """Return the record of a compiled order; None where it is absent or damaged."""
    try:
        record = OrderRecord.read(folder)
        for name in COLUMNS:
            check_file(path_in(folder, name, folder / RECORD_FILE), record.files[name], content=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return record if (record.seq_len, record.batching, record.version) == (seq_len, batching, VERSION) else None


def build_order(
    folder: Path, rows: Iterator[RecordedRows], seq_len: int, batching: str, datasets: Sequence[Dataset]
) -> None:
    """Write a compiled order; it takes the place of a damaged one. Only the holder of the lock may call it."""
    for prefix in ("", "stale-"):
        for leftover in folder.parent.glob(f"{TEMPORARY}{prefix}{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    with atomic_folder(folder) as building:
        figures = write_columns(building, rows, datasets)
        files = {name: record_of(building / name) for name in COLUMNS}
        record = OrderRecord(seq_len=seq_len, batching=batching, files=files, **figures)
        write_json(building / RECORD_FILE, with_digest(asdict(record)))


def write_columns(folder: Path, rows: Iterator[RecordedRows], datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Write COLUMNS, batch by batch; return the figures of the record. A repeated dataset counts as its first."""
    names: list[str] = []
    tokens: list[int] = []
    num_rows = num_chunks = skipped = 0
    nominal: float | None = None
    with contextlib.ExitStack() as stack:
        streams = {column: stack.enter_context(open(folder / column, "wb")) for column in COLUMNS}
        for batch in rows:
            for source in batch.sources[np.sort(np.unique(batch.sources, return_index=True)[1])].tolist():
                if datasets[source].fingerprint not in names:
                    names.append(datasets[source].fingerprint)
                    tokens.append(0)
            number = np.asarray([names.index(d.fingerprint) if d.fingerprint in names else -1 for d in datasets])
            ends = num_chunks + np.cumsum(batch.counts)
            columns = (batch.chunks, ends, number[batch.sources], batch.tokens, batch.rows)
            for (name, stream), values in zip(streams.items(), columns, strict=True):
                stream.write(narrowed(np.asarray(values), COLUMNS[name], name).tobytes())
            for i, count in enumerate(np.bincount(number[batch.sources], batch.tokens, len(names)).tolist()):
                tokens[i] += int(count)
            num_rows, num_chunks = num_rows + len(batch.counts), num_chunks + len(batch.chunks)
            skipped, nominal = skipped + batch.skipped_samples, batch.nominal_tokens or nominal
    for column in COLUMNS:
        fsync(folder / column)
    if num_rows == 0:
        raise UserError("data.order: no rows in it that the datasets of data.mixture have")
    mean = nominal or sum(tokens) / num_rows
    return {
        "num_rows": num_rows, "mean_tokens_per_row": mean, "datasets": names, "tokens": tokens,
        "skipped_samples": skipped,
    }  # fmt: skip
