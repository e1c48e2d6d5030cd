"""Read an order that `ettin order --out` exported: each line is a chunk, and lines of one (step, slot) are a row.

The lines are read in batches and in order. The file's metadata has the fingerprint of each dataset, so datasets that
have moved are found. In a file without this metadata (written by another program), a path names a dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.replay.files import RecordedRows, metadata_of, open_parquet

BATCH_LINES = 1 << 18
COLUMNS = ("step", "slot", "dataset", "chunk")
# optional: carried into the table of `ettin order`
ROW_COLUMN = "row"

Int64Array = npt.NDArray[np.int64]
# column (COLUMNS or ROW_COLUMN) -> values; a dataset is given as its index in the mixture
Lines = dict[str, Int64Array]


def exported_rows(
    paths: Sequence[Path], datasets: Sequence[Dataset], seq_len: int, batching: str
) -> Iterator[RecordedRows]:
    """Yield the rows of the files in order.

    Args:
        paths: the files of the order.
        datasets: the datasets of the mixture.
        seq_len: tokens of a row.
        batching: `packed` or `padded`.

    Raises:
        UserError: a row does not fit; it names file, step and slot.
    """
    first, last = 0, (-1, -1)
    for path in paths:
        notes = metadata_of(path)
        check_notes(path, notes, seq_len, batching)
        for lines in whole_rows(path, datasets, notes.get("datasets") or {}):
            rows = rows_of(path, lines, datasets, seq_len, batching, last)
            last = int(lines["step"][-1]), int(lines["slot"][-1])
            if ROW_COLUMN not in lines:
                rows = replace(rows, rows=np.arange(first, first + len(rows.chunks_per_row)))
            first += len(rows.chunks_per_row)
            yield replace(rows, nominal_tokens=notes.get("mean_tokens_per_row"))


def check_notes(path: Path, notes: dict[str, Any], seq_len: int, batching: str) -> None:
    """Raise UserError if the file's metadata `notes` has another seq_len or batching than this run."""
    for key, ours in (("seq_len", seq_len), ("batching", batching)):
        theirs = notes.get(key, ours)
        if theirs != ours:
            raise UserError(f"data.order: {path} was exported with data.{key}={theirs}, this run has {ours}")


def whole_rows(path: Path, datasets: Sequence[Dataset], fingerprints: dict[str, str]) -> Iterator[Lines]:
    """Yield the lines of a file in batches that end where a row ends."""
    import pyarrow

    file = open_parquet(path)
    names = [*COLUMNS, *([ROW_COLUMN] if ROW_COLUMN in file.schema_arrow.names else [])]
    sources: dict[str, int] = {}
    held: Lines = {name: np.zeros(0, np.int64) for name in names}
    try:
        for batch in file.iter_batches(BATCH_LINES, columns=names):
            lines = {}
            for name in names:
                column = batch.column(name)
                if column.null_count:
                    raise UserError(f"data.order: {path}: a null in column {name}")
                if name == "dataset":
                    column = dataset_indices(path, column, datasets, fingerprints, sources)
                lines[name] = np.concatenate([held[name], np.asarray(column).astype(np.int64)])
            cut = last_row_begins(lines)
            held = {name: values[cut:] for name, values in lines.items()}
            if cut:
                yield {name: values[:cut] for name, values in lines.items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data.order: {path}: damaged ({first_line(error)})") from None
    if len(held["step"]):
        yield held


def last_row_begins(lines: Lines) -> int:
    """Return the index of the first line of the last row, that is of the last (step, slot)."""
    others = np.flatnonzero((lines["step"] != lines["step"][-1]) | (lines["slot"] != lines["slot"][-1]))
    return int(others[-1]) + 1 if others.size else 0


def dataset_indices(
    path: Path, column: Any, datasets: Sequence[Dataset], fingerprints: dict[str, str], known: dict[str, int]
) -> Int64Array:
    """Return the index in the mixture of each line's dataset. `known` caches the indices by name."""
    import pyarrow

    encoded = column if pyarrow.types.is_dictionary(column.type) else column.dictionary_encode()
    table = []
    for name in encoded.dictionary.to_pylist():
        if name not in known:
            known[name] = dataset_index(path, name, datasets, fingerprints.get(name))
        table.append(known[name])
    return np.asarray(table, np.int64)[np.asarray(encoded.indices).astype(np.int64)]


def dataset_index(path: Path, name: str, datasets: Sequence[Dataset], fingerprint: str | None) -> int:
    """Return the index in the mixture of the dataset with this fingerprint; if None, with the path `name`.

    Raises:
        UserError: the mixture does not have it.
    """
    for index, dataset in enumerate(datasets):
        same_path = str(dataset.path) == name or dataset.path.resolve() == Path(name).resolve()
        if dataset.fingerprint == fingerprint if fingerprint else same_path:
            return index
    named = f" (fingerprint {fingerprint[:12]})" if fingerprint else ""
    raise UserError(
        f"data.order: {path}: trains on dataset {name}{named}, which data.mixture does not have; it has "
        + ", ".join(f"{dataset.path} ({dataset.fingerprint[:12]})" for dataset in datasets)
    )


def rows_of(
    path: Path, lines: Lines, datasets: Sequence[Dataset], seq_len: int, batching: str, last: tuple[int, int]
) -> RecordedRows:
    """Make rows from the lines of whole rows. `last` is (step, slot) of the row before. Raises UserError."""
    step, slot, source, chunks = (lines[name] for name in COLUMNS)
    before_step, before_slot = np.append(last[0], step[:-1]), np.append(last[1], slot[:-1])
    begins = (step != before_step) | (slot != before_slot)
    begins[0] = True
    back = np.flatnonzero((step < before_step) | ((step == before_step) & (slot < before_slot)))
    if (step[0], slot[0]) == last:
        back = np.zeros(1, np.int64)
    if back.size:
        i = int(back[0])
        raise UserError(
            f"data.order: {path}: step {step[i]} slot {slot[i]} comes after step {before_step[i]} slot"
            f" {before_slot[i]}; its lines must be sorted by step and slot"
        )
    starts = np.flatnonzero(begins)
    counts = np.diff(np.append(starts, len(step)))
    lengths = np.empty(len(chunks), np.int64)
    for s in np.unique(source).tolist():
        chosen = np.flatnonzero(source == s)
        outside = chosen[(chunks[chosen] < 0) | (chunks[chosen] >= datasets[s].num_chunks)]
        if outside.size:
            i = int(outside[0])
            raise UserError(
                f"data.order: {path}: step {step[i]} slot {slot[i]} has chunk {chunks[i]} of {datasets[s].path}, which"
                f" has {datasets[s].num_chunks:,} chunks"
            )
        lengths[chosen] = datasets[s].lengths_of(chunks[chosen])
    if batching == "padded":
        lengths = np.minimum(lengths, seq_len)
    tokens = np.add.reduceat(lengths, starts)
    mixed = np.maximum.reduceat(source, starts) != np.minimum.reduceat(source, starts)
    faults = {
        "has chunks of two datasets": mixed,
        f"has more tokens than data.seq_len={seq_len}": tokens > seq_len,
        "has several chunks, and data.batching=padded puts one in a row": (counts > 1) & (batching == "padded"),
    }
    for fault, is_faulty in faults.items():
        if is_faulty.any():
            i = int(starts[np.flatnonzero(is_faulty)[0]])
            raise UserError(f"data.order: {path}: the row of step {step[i]} slot {slot[i]} {fault}")
    return RecordedRows(source[starts], counts, chunks, tokens, lines.get(ROW_COLUMN, step)[starts])
