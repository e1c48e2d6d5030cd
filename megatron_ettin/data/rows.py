"""Row plans: which chunks make up each training row of `seq_len` tokens. Built once per dataset and length, kept beside
it (`rows_1024/`), memory-mapped by every rank.

`packed` fills rows with whole chunks by best fit (packing.py). `padded` is the original recipe: one chunk a row, cut to
seq_len with its final [SEP] kept; its plan is a formula, so `padded_1024/` holds only the counts. A plan carries the
fingerprint of the dataset it was made for and is rebuilt when that differs or a file is not as long as it says.
Several processes may ask at once: one builds under a file lock, the others wait and read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.manifest import FileRecord, check_file, record_of, sync_directory, write_json_durably
from megatron_ettin.data.packing import pack

FOLDERS = {"packed": "rows", "padded": "padded"}  # batching -> prefix of the plan's folder
VERSION = 1  # raise it when the same chunks would be packed otherwise
CHUNKS_FILE = "chunks.int64"  # chunk numbers, row after row
ENDS_FILE = "ends.int64"  # for each row, where its chunks end in CHUNKS_FILE
TOKENS_FILE = "tokens.int32"  # tokens of each row

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class PlanRecord:
    """plan.json."""

    dataset_fingerprint: str
    seq_len: int
    batching: str
    num_rows: int
    num_tokens: int
    files: dict[str, FileRecord]
    version: int = VERSION


class RowPlan:
    """See `ensure_row_plan`."""

    def __init__(self, folder: Path, record: PlanRecord, dataset: Dataset) -> None:
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
        self._record = record
        self._dataset = dataset
        if record.batching == "packed":
            self._chunks = np.asarray(np.memmap(folder / CHUNKS_FILE, mode="r", dtype="<i8"))
            self._ends = np.asarray(np.memmap(folder / ENDS_FILE, mode="r", dtype="<i8"))
            self._tokens = np.asarray(np.memmap(folder / TOKENS_FILE, mode="r", dtype="<i4"))

    def chunks_of(self, row: int) -> IntArray:
        """Global chunk numbers of one row, in the order they stand in it."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        if self.batching == "padded":
            return np.array([row], dtype=np.int64)
        start = int(self._ends[row - 1]) if row else 0
        return self._chunks[start : int(self._ends[row])]

    def tokens_of(self, rows: npt.ArrayLike) -> IntArray:
        """Real tokens of each of the rows."""
        wanted = np.asarray(rows, dtype=np.int64)
        if self.batching == "packed":
            return self._tokens[wanted].astype(np.int64)
        return np.minimum(self._dataset.lengths_of(wanted), self.seq_len)

    def verify(self) -> None:
        """Read every byte; UserError names the first damaged file."""
        for name, record in self._record.files.items():
            check_file(self.folder / name, record, content=True)


def ensure_row_plan(dataset: Dataset, seq_len: int, batching: str = "packed") -> RowPlan:
    """The row plan of a dataset for rows of `seq_len` tokens; builds it when there is none that fits."""
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
    folder = dataset.path / f"{FOLDERS[batching]}_{seq_len}"
    plan = open_plan(folder, dataset, seq_len, batching)
    if plan is not None:
        return plan
    try:
        with file_lock(dataset.path / ".row-plans.lock"):
            plan = open_plan(folder, dataset, seq_len, batching)  # somebody may have built it while we waited
            if plan is None:
                build_plan(folder, dataset, seq_len, batching)
    except OSError as error:
        raise UserError(
            f"row plan {folder}: {error.strerror}; build it where the dataset can be written: "
            f"ettin prepare ... --seq-len {seq_len}"
        ) from None
    plan = plan or open_plan(folder, dataset, seq_len, batching)
    if plan is None:
        raise UserError(f"row plan {folder}: written, but not readable as written; is the file system full?")
    return plan


def existing_plans(dataset: Dataset) -> list[RowPlan]:
    """The usable plans beside a dataset, by batching and length."""
    plans = []
    for batching, prefix in FOLDERS.items():
        for folder in dataset.path.glob(f"{prefix}_*"):
            length = folder.name.removeprefix(f"{prefix}_")
            if length.isdigit() and (plan := open_plan(folder, dataset, int(length), batching)):
                plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.batching, plan.seq_len))


def open_plan(folder: Path, dataset: Dataset, seq_len: int, batching: str) -> RowPlan | None:
    """The plan in `folder`, or None where it is absent, damaged or another dataset's."""
    try:
        raw: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        raw["files"] = {name: FileRecord(**record) for name, record in raw["files"].items()}
        record = PlanRecord(**raw)
        for name, file in record.files.items():
            check_file(folder / name, file, content=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    asked = (dataset.fingerprint, seq_len, batching, VERSION)
    if (record.dataset_fingerprint, record.seq_len, record.batching, record.version) != asked:
        return None
    return RowPlan(folder, record, dataset)


def build_plan(folder: Path, dataset: Dataset, seq_len: int, batching: str) -> None:
    """Write the plan beside and rename it into place; whatever stood there goes."""
    building = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=dataset.path))
    try:
        building.chmod(0o777 & ~current_umask())  # mkdtemp makes it private; other users train on it too
        lengths = dataset.chunk_lengths
        if batching == "packed":
            num_rows, num_tokens = write_rows(building, lengths, seq_len)
            files = {name: record_of(building / name) for name in (CHUNKS_FILE, ENDS_FILE, TOKENS_FILE)}
        else:
            num_rows, num_tokens, files = len(lengths), int(np.minimum(lengths, seq_len).sum(dtype=np.int64)), {}
        record = PlanRecord(dataset.fingerprint, seq_len, batching, num_rows, num_tokens, files)
        write_json_durably(building / "plan.json", asdict(record))
        sync_directory(building)
        if folder.exists():
            stale = Path(tempfile.mkdtemp(prefix=f".tmp-stale-{folder.name}-", dir=dataset.path))
            os.rename(folder, stale / folder.name)
            shutil.rmtree(stale, ignore_errors=True)
        os.rename(building, folder)
        sync_directory(dataset.path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_rows(folder: Path, lengths: IntArray, seq_len: int) -> tuple[int, int]:
    """Pack into the three files of a plan, window by window; returns (rows, tokens)."""
    with contextlib.ExitStack() as stack:
        names = (CHUNKS_FILE, ENDS_FILE, TOKENS_FILE)
        chunks_out, ends_out, tokens_out = (stack.enter_context(open(folder / name, "wb")) for name in names)
        num_chunks = num_rows = num_tokens = 0
        for chunks, counts in pack(lengths, seq_len):
            ends = np.cumsum(counts)
            tokens = np.add.reduceat(np.asarray(lengths[chunks], np.int64), ends - counts)
            chunks_out.write(chunks.astype("<i8").tobytes())
            ends_out.write((ends + num_chunks).astype("<i8").tobytes())
            tokens_out.write(tokens.astype("<i4").tobytes())
            num_chunks += len(chunks)
            num_rows += len(counts)
            num_tokens += int(tokens.sum())
        for stream in (chunks_out, ends_out, tokens_out):
            stream.flush()
            os.fsync(stream.fileno())
    return num_rows, num_tokens


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time. Where the file system has no locks, nothing waits: the renames keep readers safe."""
    with open(path, "a") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
