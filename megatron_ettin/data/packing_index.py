"""Row plans: which chunks make up each training row of `seq_len` tokens. Built once per dataset and length, kept beside
it (`rows_1024/`), memory-mapped by every rank.

`packed` fills rows with whole chunks by best fit (packing.py, row_building.py). `padded` is the original recipe: one
chunk a row, cut to seq_len with its final [SEP] kept; its plan is a formula, so `padded_1024/` holds only the counts.
A plan carries the fingerprint of the dataset it was made for and is rebuilt when that differs or a file is not as long
as it says. Several processes may ask at once: one builds under a file lock, the others wait and read."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import current_umask, file_lock, fsync, publish_folder
from megatron_ettin.base.parsing import checked_digest, load_json, with_digest
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.indexed import map_scattered
from megatron_ettin.data.manifest import (
    FileRecord,
    check_file,
    file_records,
    write_json_durably,
)
from megatron_ettin.data.packing import CHUNKS_FILE, ENDS_FILE, TOKENS_FILE, read_lengths, write_packed

FOLDERS = {"packed": "rows", "padded": "padded"}  # batching -> prefix of the plan's folder
PLAN_FILE = "plan.json"
VERSION = 1  # raise it when the same chunks would be packed otherwise
BESIDE = ".tmp-"  # begins the name of a plan that is not finished
COUNTED_CHUNKS = 1 << 20  # lengths of a padded plan that are read at once

IntArray = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackingRecord:
    """plan.json."""

    dataset_fingerprint: str
    seq_len: int
    batching: str
    num_rows: int
    num_tokens: int
    files: dict[str, FileRecord]
    version: int = VERSION


@dataclass(frozen=True)
class RowArrays:
    """The rows of a packed plan."""

    chunks: IntArray  # chunk numbers, row after row
    ends: IntArray  # for each row, where its chunks end in `chunks`
    tokens: IntArray  # of each row


class PackingIndex:
    """See `ensure_row_plan`. `arrays` are the rows themselves; a plan on disk is mapped from its `folder` instead."""

    def __init__(self, folder: Path, record: PackingRecord, dataset: Dataset, arrays: RowArrays | None = None) -> None:
        self.folder = folder
        self.seq_len = record.seq_len
        self.batching = record.batching
        self.num_rows = record.num_rows
        self.num_tokens = record.num_tokens
        self.mean_tokens_per_row = record.num_tokens / record.num_rows
        self.fill = self.mean_tokens_per_row / record.seq_len
        # Two plans with one fingerprint have the same chunks in the same rows.
        hashes = {name: file.sha256 for name, file in record.files.items()}
        content = json.dumps({**asdict(record), "files": hashes}, sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode("ascii")).hexdigest()
        self.record = record
        self._dataset = dataset
        self._given = arrays
        mapped = arrays is None and record.batching == "packed"
        self._arrays = map_rows(folder) if mapped else arrays  # None: the formula of `padded`

    def __getstate__(self) -> tuple[Path, PackingRecord, Dataset, RowArrays | None]:  # maps do not travel
        return self.folder, self.record, self._dataset, self._given

    def __setstate__(self, state: tuple[Path, PackingRecord, Dataset, RowArrays | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def chunks_of(self, row: int) -> IntArray:
        """Global chunk numbers of one row, in the order they stand in it."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        if self._arrays is None:
            return np.array([row], dtype=np.int64)
        start = int(self._arrays.ends[row - 1]) if row else 0
        return self._arrays.chunks[start : int(self._arrays.ends[row])]

    def chunks_of_rows(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(chunk numbers, row after row; how many each row has) of many rows [n]: one look-up for all."""
        if rows.size and not (int(rows.min()) >= 0 and int(rows.max()) < self.num_rows):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {self.num_rows}")
        if self._arrays is None:
            return rows, np.ones_like(rows)
        ends = self._arrays.ends[rows]
        starts = np.where(rows > 0, self._arrays.ends[np.maximum(rows - 1, 0)], 0)
        counts = np.maximum(ends - starts, 0)  # a damaged plan may go backwards; an empty row is told by its reader
        places = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        return self._arrays.chunks[places].astype(np.int64, copy=False), counts

    def tokens_of(self, rows: npt.ArrayLike) -> IntArray:
        """Real tokens of each of the rows."""
        wanted = np.asarray(rows, dtype=np.int64)
        if self._arrays is not None:
            return self._arrays.tokens[wanted].astype(np.int64)
        return np.minimum(self._dataset.lengths_of(wanted), self.seq_len)

    def verify(self) -> None:
        """Read every byte; UserError names the first damaged file."""
        for name, record in self.record.files.items():
            check_file(path_in(self.folder, name, self.folder / PLAN_FILE), record, content=True)


def map_rows(folder: Path) -> RowArrays:
    files = {CHUNKS_FILE: "<i8", ENDS_FILE: "<i8", TOKENS_FILE: "<i4"}
    return RowArrays(*(map_scattered(folder / name, dtype) for name, dtype in files.items()))


def build_or_open_packing_index(
    dataset: Dataset, seq_len: int, batching: str = "packed", workers: int = 1
) -> PackingIndex:
    """The row plan of a dataset for rows of `seq_len` tokens; builds it when there is none that fits, with so many
    processes and the same bytes for any number of them. Raises UserError where chunks and rows do not go together."""
    check_rows(dataset, seq_len, batching)
    folder = packing_index_folder(dataset, seq_len, batching)
    plan = open_packing_index(folder, dataset, seq_len, batching)
    if plan is not None:
        return plan
    try:
        with file_lock(dataset.path / ".row-plans.lock") as alone:
            plan = open_packing_index(folder, dataset, seq_len, batching)  # somebody may have built it while we waited
            if plan is None:
                if alone:
                    remove_leftovers(dataset.path)
                build_packing_index(folder, dataset, seq_len, batching, workers)
    except OSError as error:
        raise UserError(
            f"row plan {folder}: {error.strerror}; build it where the dataset can be written: "
            f"ettin prepare ... --seq-len {seq_len}"
        ) from None
    plan = plan or open_packing_index(folder, dataset, seq_len, batching)
    if plan is None:
        raise UserError(f"row plan {folder}: written, but not readable as written; is the file system full?")
    return plan


def packing_index_folder(dataset: Dataset, seq_len: int, batching: str) -> Path:
    return dataset.path / f"{FOLDERS[batching]}_{seq_len}"


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
    """The usable plans beside a dataset, by batching and length."""
    plans = []
    for batching, prefix in FOLDERS.items():
        for folder in dataset.path.glob(f"{prefix}_*"):
            length = folder.name.removeprefix(f"{prefix}_")
            if length.isdigit() and (plan := open_packing_index(folder, dataset, int(length), batching)):
                plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.batching, plan.seq_len))


def packing_record(folder: Path) -> PackingRecord:
    """What the plan in `folder` says of itself. Raises OSError, ValueError, KeyError, TypeError or AttributeError where
    that cannot be read."""
    raw: dict[str, Any] = checked_digest(load_json((folder / PLAN_FILE).read_text(encoding="utf-8")))
    return PackingRecord(**{**raw, "files": file_records(raw["files"])})


def open_packing_index(folder: Path, dataset: Dataset, seq_len: int, batching: str) -> PackingIndex | None:
    """The plan in `folder`, or None where it is absent, damaged or another dataset's."""
    try:
        record = packing_record(folder)
        for name, file in record.files.items():
            check_file(path_in(folder, name, folder / PLAN_FILE), file, content=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    asked = (dataset.fingerprint, seq_len, batching, VERSION)
    if (record.dataset_fingerprint, record.seq_len, record.batching, record.version) != asked:
        return None
    return PackingIndex(folder, record, dataset)


def build_packing_index(folder: Path, dataset: Dataset, seq_len: int, batching: str, workers: int) -> None:
    """Write the plan beside and rename it into place; whatever stood there goes."""
    building = Path(tempfile.mkdtemp(prefix=f"{BESIDE}{folder.name}-", dir=dataset.path))
    try:
        building.chmod(0o777 & ~current_umask())  # mkdtemp makes it private; other users train on it too
        if batching == "packed":
            num_rows, num_tokens, files = write_packed(building, dataset, seq_len, workers)
        else:
            num_rows, num_tokens, files = dataset.num_chunks, padded_tokens(dataset, seq_len), {}
        record = PackingRecord(dataset.fingerprint, seq_len, batching, num_rows, num_tokens, files)
        write_json_durably(building / PLAN_FILE, with_digest(asdict(record)))
        fsync(building)
        stale = building.with_name(f"{BESIDE}stale-{building.name.removeprefix(BESIDE)}")
        publish_folder(building, folder, aside=stale)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def padded_tokens(dataset: Dataset, seq_len: int) -> int:
    """Tokens of all chunks, each cut to `seq_len`."""
    total = 0
    for first in range(0, dataset.num_chunks, COUNTED_CHUNKS):
        lengths = read_lengths(dataset, first, min(first + COUNTED_CHUNKS, dataset.num_chunks))
        total += int(np.minimum(lengths, seq_len).sum(dtype=np.int64))
    return total


def remove_leftovers(folder: Path) -> None:
    """Remove what builders that were killed have left; only for the one that holds the lock."""
    for prefix in (*FOLDERS.values(), "stale"):
        for leftover in folder.glob(f"{BESIDE}{prefix}[_-]*"):
            shutil.rmtree(leftover, ignore_errors=True)
