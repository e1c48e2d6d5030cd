"""An order given in files, compiled once: `data.order=FILE` trains on its rows, in its order.

Compiling (replay_exported.py, replay_published.py) writes which chunks make up each row to `order_<key>/` beside the
first dataset, or to `$ETTIN_CACHE/orders` where that cannot be written; every rank memory-maps it. Like a row plan it
is written under a lock, renamed into place and checked by the size of its files. Its fingerprint covers the datasets
and the chunks of every row, not where the files lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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
from megatron_ettin.data.default_tokenizer import cache_directory
from megatron_ettin.data.indexed import map_scattered, narrowed
from megatron_ettin.data.manifest import (
    FileRecord,
    check_file,
    file_records,
    record_of,
    write_json_durably,
)
from megatron_ettin.data.replay.exported import exported_rows
from megatron_ettin.data.replay.files import RecordedRows, kind_of_files, open_order_files
from megatron_ettin.data.replay.published import published_rows

VERSION = 1  # raise it when the same files would be compiled otherwise
RECORD_FILE = "order.json"
# file -> its type; the first is one an entry of a row, the others one a row
COLUMNS: dict[str, np.dtype] = {
    "chunks.int64": np.dtype("<i8"),  # chunk numbers, row after row
    "ends.int64": np.dtype("<i8"),  # where the row's chunks end in chunks.int64
    "sources.int16": np.dtype("<i2"),  # the row's dataset: its place in `OrderRecord.datasets`
    "tokens.int32": np.dtype("<i4"),
    "rows.int64": np.dtype("<i8"),  # the number the row has in the dataset's row plan, for the table of `ettin order`
}
CONTENT = ("chunks.int64", "ends.int64", "sources.int16")  # what the fingerprint covers
KINDS = {"exported": exported_rows, "published": published_rows}

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OrderRecord:
    """order.json."""

    seq_len: int
    batching: str
    num_rows: int
    mean_tokens_per_row: float  # nominal: of the corpus that an exported order came from, else of these rows
    datasets: list[str]  # fingerprints, in order of appearance
    tokens: list[int]  # of each of them
    skipped_samples: int
    files: dict[str, FileRecord]
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        hashes = [self.files[name].sha256 for name in CONTENT]
        content = ["given order", self.version, self.seq_len, self.batching, *self.datasets, *hashes]
        return hashlib.sha256(":".join(map(str, content)).encode("ascii")).hexdigest()


class RecordedSampler:
    """Rows by position, as `open_given_order` compiled them. It pickles small."""

    def __init__(self, folder: Path, record: OrderRecord, fingerprints: Sequence[str]) -> None:
        self.folder = folder
        self.record = record
        self.fingerprints = list(fingerprints)  # of the mixture's datasets
        self.num_rows = record.num_rows
        self.mean_tokens_per_row = record.mean_tokens_per_row
        self.fingerprint = record.fingerprint
        self._source = np.asarray([self.fingerprints.index(name) for name in record.datasets], np.int64)
        maps = [map_scattered(folder / name, kind) for name, kind in COLUMNS.items()]
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

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(source, row, epoch 0) of each position."""
        wanted = self._checked(positions)
        rows = self._rows[wanted].astype(np.int64)
        return self._source[self._sources[wanted]], rows, np.zeros_like(rows)

    def chunks_at(self, positions: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """(chunks of each row [n], chunk numbers, row after row [m]) of positions [n]."""
        wanted = self._checked(positions)
        starts = np.where(wanted > 0, self._ends[np.maximum(wanted - 1, 0)], 0)
        counts = self._ends[wanted] - starts
        ends = np.cumsum(counts)
        return counts, self._chunks[np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)]

    def tokens_at(self, positions: npt.ArrayLike) -> Int64Array:
        """Real tokens of the rows at the positions."""
        return self._tokens[self._checked(positions)].astype(np.int64)

    def _checked(self, positions: npt.ArrayLike) -> Int64Array:
        wanted = np.asarray(positions, np.int64)
        if wanted.size and not (int(wanted.min()) >= 0 and int(wanted.max()) < self.num_rows):
            raise IndexError(f"positions {int(wanted.min())} to {int(wanted.max())} of an order of {self.num_rows}")
        return wanted


def open_recorded_sampler(
    path: str, datasets: Sequence[Dataset], seq_len: int, batching: str, missing: str = "error"
) -> RecordedSampler:
    """The order in `path` over these datasets; compiles it unless that was done before. Raises UserError."""
    files = open_order_files(path)
    fingerprints = [dataset.fingerprint for dataset in datasets]
    content = [VERSION, seq_len, batching, missing, *fingerprints, *files.identity]
    key = hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:16]
    places = (datasets[0].path, cache_directory() / "orders")
    for place in places:
        if record := read_record(place / f"order_{key}", seq_len, batching):
            return RecordedSampler(place / f"order_{key}", record, fingerprints)
    place = places[0] if os.access(places[0], os.W_OK) else places[1]
    folder = place / f"order_{key}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with file_lock(place / ".orders.lock"):
            record = read_record(folder, seq_len, batching)  # another process may have compiled it while we waited
            if record is None:
                rows = KINDS[kind_of_files(files)](files, datasets, seq_len, batching, missing)
                build_order(folder, rows, seq_len, batching, datasets)
    except OSError as error:
        raise UserError(f"data.order: {folder}: {error.strerror}; it is compiled there from {path}") from None
    record = record or read_record(folder, seq_len, batching)
    if record is None:
        raise UserError(f"data.order: {folder}: written, but not readable as written; is the file system full?")
    return RecordedSampler(folder, record, fingerprints)


def order_record(folder: Path) -> OrderRecord:
    """What the compiled order in `folder` says of itself. Raises OSError, ValueError, KeyError, TypeError or
    AttributeError where that cannot be read."""
    raw: dict[str, Any] = checked_digest(load_json((folder / RECORD_FILE).read_text(encoding="utf-8")))
    return OrderRecord(**{**raw, "files": file_records(raw["files"])})


def read_record(folder: Path, seq_len: int, batching: str) -> OrderRecord | None:
    """The record of a compiled order, or None where it is absent or damaged."""
    try:
        record = order_record(folder)
        for name in COLUMNS:
            check_file(path_in(folder, name, folder / RECORD_FILE), record.files[name], content=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return record if (record.seq_len, record.batching, record.version) == (seq_len, batching, VERSION) else None


def build_order(
    folder: Path, rows: Iterator[RecordedRows], seq_len: int, batching: str, datasets: Sequence[Dataset]
) -> None:
    """Write the rows beside and rename them into place. The caller holds the lock, so what a killed process left
    half-written can go."""
    for left in folder.parent.glob(f".tmp-{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    try:
        building.chmod(0o777 & ~current_umask())  # mkdtemp makes it private; other users train on it too
        figures = write_columns(building, rows, datasets)
        files = {name: record_of(building / name) for name in COLUMNS}
        record = OrderRecord(seq_len=seq_len, batching=batching, files=files, **figures)
        write_json_durably(building / RECORD_FILE, with_digest(asdict(record)))
        fsync(building)
        # a folder that is there is damaged
        publish_folder(building, folder, aside=folder.with_name(f".tmp-{folder.name}-replaced"))
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_columns(folder: Path, rows: Iterator[RecordedRows], datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Write COLUMNS, batch by batch; returns what the record says of them. A repeated dataset counts as its first."""
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
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    if num_rows == 0:
        raise UserError("data.order: no rows in it that the datasets of data.mixture have")
    mean = nominal or sum(tokens) / num_rows
    return {
        "num_rows": num_rows, "mean_tokens_per_row": mean, "datasets": names, "tokens": tokens,
        "skipped_samples": skipped,
    }  # fmt: skip
