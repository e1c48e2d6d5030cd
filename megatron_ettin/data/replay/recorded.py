"""Compile a data order recorded in files (`data.order=FILE`), and read its rows in its order.

Compiling (exported.py, published.py) writes which chunks make up each row to `order_<key>/` in the first dataset, or to
`$ETTIN_CACHE/orders` if the dataset cannot be written; every rank memory-maps it. Like a packing index it is written
under a lock, renamed into place and checked by the size of its files. Its fingerprint covers the datasets and the
chunks of every row, not the paths of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_json
from megatron_ettin.base.parsing import with_digest
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.default_tokenizer import cache_directory
from megatron_ettin.data.replay.exported import exported_rows
from megatron_ettin.data.replay.files import RecordedRows, common_format, list_order_files
from megatron_ettin.data.replay.published import published_rows
from megatron_ettin.data.row_files import (
    CHUNKS_FILE,
    ENDS_FILE,
    ORDER_DTYPES,
    ROWS_FILE,
    SOURCES_FILE,
    TOKENS_FILE,
    Int64Array,
    OrderRecord,
    RowArrays,
    RowWriter,
    build_once,
    check_rows_exist,
    map_columns,
    read_usable_record,
)


class RecordedSampler:
    """Rows of a recorded order by order index; `open_recorded_sampler` opens one. Its pickle is small.

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
        columns = map_columns(folder, ORDER_DTYPES)
        self._sources, self._rows = columns[SOURCES_FILE], columns[ROWS_FILE]
        self._arrays = RowArrays(columns[CHUNKS_FILE], columns[ENDS_FILE], columns[TOKENS_FILE])

    def __reduce__(self) -> tuple[type[RecordedSampler], tuple[Path, OrderRecord, list[str]]]:
        return type(self), (self.folder, self.record, self.fingerprints)

    @property
    def tokens_by_source(self) -> list[int]:
        """Return the number of this order's tokens from each dataset of the mixture; 0 for a repeated dataset."""
        by_name = dict(zip(self.record.datasets, self.record.tokens, strict=True))
        return [by_name.pop(name, 0) for name in self.fingerprints]

    def locate(self, order_indices: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return (index of the dataset, row in its packing index, epoch) of each order index. The epoch is always 0."""
        wanted = check_rows_exist(order_indices, self.num_rows)
        rows = self._rows[wanted].astype(np.int64)
        return self._source[self._sources[wanted]], rows, np.zeros_like(rows)

    def row_chunks(self, order_indices: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Return the number of chunks of each row [n], and the chunk numbers [m], row after row."""
        chunks, counts = self._arrays.chunks_of_rows(check_rows_exist(order_indices, self.num_rows))
        return counts, chunks

    def token_counts(self, order_indices: npt.ArrayLike) -> Int64Array:
        """Return the number of tokens of each row, without padding."""
        return self._arrays.tokens[check_rows_exist(order_indices, self.num_rows)].astype(np.int64)


def open_recorded_sampler(
    path: str, datasets: Sequence[Dataset], seq_len: int, batching: str, missing: str = "error"
) -> RecordedSampler:
    """Open the order in `path` over these datasets, and compile it first if needed. Raises UserError.

    Args:
        path: `data.order`.
        datasets: the datasets of the mixture.
        seq_len: tokens of a row.
        batching: `packed` or `padded`.
        missing: `skip` leaves out samples that no dataset has, `error` refuses them.
    """
    paths, identity = list_order_files(path)
    fingerprints = [dataset.fingerprint for dataset in datasets]
    content = [OrderRecord.VERSION, seq_len, batching, missing, *fingerprints, *identity]
    key = hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:16]
    parents = (datasets[0].path, cache_directory() / "orders")
    for parent in parents:
        if record := read_order(parent / f"order_{key}", seq_len, batching):
            return RecordedSampler(parent / f"order_{key}", record, fingerprints)
    parent = parents[0] if os.access(parents[0], os.W_OK) else parents[1]
    folder = parent / f"order_{key}"

    def build(building: Path) -> None:
        if common_format(paths) == "exported":
            rows = exported_rows(paths, datasets, seq_len, batching)
        else:
            rows = published_rows(paths, datasets, seq_len, batching, missing)
        compile_order(building, rows, seq_len, batching, datasets)

    try:
        parent.mkdir(parents=True, exist_ok=True)
        record = build_once(
            folder, ".orders.lock", ("order",), read=lambda: read_order(folder, seq_len, batching), build=build
        )
    except OSError as error:
        raise UserError(f"data.order: {folder}: {error.strerror}; it is compiled there from {path}") from None
    return RecordedSampler(folder, record, fingerprints)


def read_order(folder: Path, seq_len: int, batching: str) -> OrderRecord | None:
    """Return the record of a compiled order; None if it is absent, damaged or for other rows."""
    record = read_usable_record(OrderRecord, folder, ORDER_DTYPES)
    return record if record and (record.seq_len, record.batching) == (seq_len, batching) else None


def compile_order(
    building: Path, batches: Iterator[RecordedRows], seq_len: int, batching: str, datasets: Sequence[Dataset]
) -> None:
    """Write the files of a compiled order to the folder `building`. A repeated dataset is recorded once."""
    names: list[str] = []
    tokens: list[int] = []
    skipped, nominal = 0, None
    with RowWriter(building, ORDER_DTYPES) as files:
        for batch in batches:
            for source in batch.sources[np.sort(np.unique(batch.sources, return_index=True)[1])].tolist():
                if datasets[source].fingerprint not in names:
                    names.append(datasets[source].fingerprint)
                    tokens.append(0)
            number = np.asarray([names.index(d.fingerprint) if d.fingerprint in names else -1 for d in datasets])
            sources = number[batch.sources]
            files.append(batch.chunks, batch.chunks_per_row, batch.tokens, sources=sources, rows=batch.rows)
            for i, count in enumerate(np.bincount(sources, batch.tokens, len(names)).tolist()):
                tokens[i] += int(count)
            skipped, nominal = skipped + batch.skipped_samples, batch.nominal_tokens or nominal
        if files.rows == 0:
            raise UserError("data.order: no rows in it that the datasets of data.mixture have")
        record = OrderRecord(
            seq_len=seq_len,
            batching=batching,
            num_rows=files.rows,
            mean_tokens_per_row=nominal or sum(tokens) / files.rows,
            datasets=names,
            tokens=tokens,
            skipped_samples=skipped,
            files=files.finish(),
        )
    write_json(building / OrderRecord.FILE, with_digest(asdict(record)))
