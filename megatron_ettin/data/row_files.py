"""Write, check and map the files that list the chunks of each row.

A packing index (`rows_1024/plan.json`) and a compiled order (`order_<key>/order.json`) are both a folder of columns
with a JSON record of these files. Such a folder is written under a lock, renamed to its final name and checked by the
sizes of its files. A folder that is absent or damaged is written again. If several processes need it, one writes and
the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import TEMPORARY, atomic_folder, file_lock
from megatron_ettin.base.parsing import checked_digest, load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.indexed import map_file, narrowed
from megatron_ettin.data.manifest import FileRecord, check_size, file_records

IntArray = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]
Dtypes = Mapping[str, np.dtype[Any]]

# column: chunk numbers, row after row
CHUNKS_FILE = "chunks.int64"
# column: for each row, the end of its chunks in CHUNKS_FILE
ENDS_FILE = "ends.int64"
# column: number of tokens of each row
TOKENS_FILE = "tokens.int32"
# column: index of each row's dataset in `OrderRecord.datasets`
SOURCES_FILE = "sources.int16"
# column: number of each row in its dataset's packing index, for the table of `ettin order`
ROWS_FILE = "rows.int64"
# the columns of a packing index
PACKING_DTYPES: Dtypes = {
    CHUNKS_FILE: np.dtype("<i8"),
    ENDS_FILE: np.dtype("<i8"),
    TOKENS_FILE: np.dtype("<i4"),
}
# the columns of a compiled order
ORDER_DTYPES: Dtypes = {
    CHUNKS_FILE: np.dtype("<i8"),
    ENDS_FILE: np.dtype("<i8"),
    SOURCES_FILE: np.dtype("<i2"),
    TOKENS_FILE: np.dtype("<i4"),
    ROWS_FILE: np.dtype("<i8"),
}
# errors that reading an absent or damaged record raises
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, UserError)


@dataclass(frozen=True)
class PackingRecord:
    """The content of a packing index's plan.json."""

    FILE: ClassVar[str] = "plan.json"
    # to be increased when a change of the code packs the same chunks differently
    VERSION: ClassVar[int] = 1

    dataset_fingerprint: str
    seq_len: int
    batching: str
    num_rows: int
    num_tokens: int
    files: dict[str, FileRecord]
    version: int = VERSION


@dataclass(frozen=True)
class OrderRecord:
    """The content of a compiled order's order.json."""

    FILE: ClassVar[str] = "order.json"
    # to be increased when a change of the code compiles the same files differently
    VERSION: ClassVar[int] = 1

    seq_len: int
    batching: str
    num_rows: int
    mean_tokens_per_row: float
    """Mean number of tokens of a row: of the data that an exported order came from, else of these rows."""
    datasets: list[str]
    """Fingerprint of each dataset, in order of first appearance."""
    tokens: list[int]
    """Number of tokens of each dataset."""
    skipped_samples: int
    files: dict[str, FileRecord]
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over the datasets and the chunks of every row."""
        hashes = [self.files[name].sha256 for name in (CHUNKS_FILE, ENDS_FILE, SOURCES_FILE)]
        content = ["given order", self.version, self.seq_len, self.batching, *self.datasets, *hashes]
        return hashlib.sha256(":".join(map(str, content)).encode("ascii")).hexdigest()


Record = TypeVar("Record", PackingRecord, OrderRecord)
Opened = TypeVar("Opened")


def read_record(record_class: type[Record], folder: Path) -> Record:
    """Read the record of a folder. Raises one of UNREADABLE if it is absent or damaged."""
    raw: dict[str, Any] = checked_digest(load_json((folder / record_class.FILE).read_text(encoding="utf-8")))
    return record_class(**{**raw, "files": file_records(raw["files"])})


def read_usable_record(record_class: type[Record], folder: Path, names: Iterable[str]) -> Record | None:
    """Read the record of a folder, and check the sizes of its files.

    Args:
        record_class: the type of the record.
        folder: the folder of the record and its files.
        names: files that the record must list.

    Returns:
        The record; None if it is absent, damaged or of another version, or if a file is missing or has another size.
    """
    try:
        record: Record = read_record(record_class, folder)
        for name in (*names, *record.files):
            check_size(path_in(folder, name, folder / record_class.FILE), record.files[name])
        return record if record.version == record_class.VERSION else None
    except UNREADABLE:
        return None


def build_once(
    folder: Path,
    lock_name: str,
    prefixes: Sequence[str],
    read: Callable[[], Opened | None],
    build: Callable[[Path], None],
) -> Opened:
    """Return the opened content of a folder, and build it first if it is absent or unusable.

    One process builds, under a lock; the others wait for it.

    Args:
        folder: the folder.
        lock_name: name of the lock file next to it.
        prefixes: beginnings of the names of all folders that are built under this lock. The remains of killed builders
            of any of them are removed.
        read: function that opens the content; it returns None if that is unusable.
        build: function that writes the content into the temporary folder that it is given.

    Raises:
        OSError: the folder cannot be written, or cannot be read after it was written.
    """
    with file_lock(folder.parent / lock_name) as held:
        # another process may have built it while this one waited
        result = read()
        if result is None:
            for prefix in (*prefixes, *(f"stale-{prefix}" for prefix in prefixes)) if held else ():
                for leftover in folder.parent.glob(f"{TEMPORARY}{prefix}_*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            with atomic_folder(folder) as building:
                build(building)
    result = result or read()
    if result is None:
        raise OSError(errno.EIO, "written, but not readable as written (is the file system full?)")
    return result


class RowWriter:
    """Writer of columns that computes their checksums while it writes.

    Args:
        folder: the folder of the files.
        dtypes: type of the values in each file, by file name.
        prefix: beginning of the files' names.
    """

    def __init__(self, folder: Path, dtypes: Dtypes, prefix: str = "") -> None:
        self.rows = self.chunks = self.tokens = 0
        self._dtypes = dtypes
        self._hashes = {name: hashlib.sha256() for name in dtypes}
        self._open = contextlib.ExitStack()
        self._streams = {name: self._open.enter_context(open(folder / f"{prefix}{name}", "wb")) for name in dtypes}  # noqa: SIM115

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def append(self, chunks: IntArray, counts: IntArray, tokens: IntArray, **others: IntArray) -> None:
        """Append n rows with m chunks in all.

        Args:
            chunks: chunk numbers [m], row after row.
            counts: number of chunks [n] of each row.
            tokens: number of tokens [n] of each row.
            others: values [n] of the other columns, by the name of the file before its dot.
        """
        columns = {CHUNKS_FILE: chunks, ENDS_FILE: self.chunks + np.cumsum(counts), TOKENS_FILE: tokens}
        for name, dtype in self._dtypes.items():
            values = columns[name] if name in columns else others[name.partition(".")[0]]
            raw = narrowed(values, dtype, name).tobytes()
            self._streams[name].write(raw)
            self._hashes[name].update(raw)
        self.rows += len(counts)
        self.chunks += len(chunks)
        self.tokens += int(tokens.sum(dtype=np.int64))

    def finish(self) -> dict[str, FileRecord]:
        """Force the files to the disk and return the size and sha256 of each."""
        records = {}
        for name, stream in self._streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            records[name] = FileRecord(stream.tell(), self._hashes[name].hexdigest())
        return records


@dataclass(frozen=True)
class RowArrays:
    """Mapped columns of rows: the chunks and the number of tokens of each row."""

    chunks: IntArray
    """Chunk numbers, row after row."""
    ends: IntArray
    """End of each row's chunks in `chunks`."""
    tokens: IntArray
    """Number of tokens of each row."""

    def chunks_of_rows(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the chunk numbers [m] of the rows [n], row after row, and the number of chunks [n] of each row."""
        ends = self.ends[rows]
        starts = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0)
        # a damaged file may have an end before its start; the reader reports the empty row
        counts = np.maximum(ends - starts, 0)
        indices = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        return self.chunks[indices].astype(np.int64, copy=False), counts


def map_columns(folder: Path, dtypes: Dtypes) -> dict[str, npt.NDArray[Any]]:
    """Map the columns in a folder, by file name."""
    return {name: map_file(folder / name, dtype) for name, dtype in dtypes.items()}


def check_rows_exist(rows: npt.ArrayLike, num_rows: int) -> Int64Array:
    """Return row numbers as an array. Raises IndexError if one is not below `num_rows`."""
    wanted = np.asarray(rows, np.int64)
    if wanted.size and not (int(wanted.min()) >= 0 and int(wanted.max()) < num_rows):
        raise IndexError(f"rows {int(wanted.min())} to {int(wanted.max())} of {num_rows}")
    return wanted
