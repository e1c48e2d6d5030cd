"""Export what each step trained on or will train on: documents and spans as a table, or the arrays that the model saw.

Both are functions of the run's configuration and its datasets; neither torch nor a run is needed. Steps are numbered as
in metrics.jsonl: the first is 1. A table is made of many rows at once, in memory that does not grow with the number of
steps. The arrays that the model saw are all in memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import atomic_path
from megatron_ettin.base.text import counted
from megatron_ettin.batching.objectives import ObjectiveMix, dataset_collator
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE, ROW_OBJECTIVES
from megatron_ettin.config.values import first_and_end
from megatron_ettin.data.blended_dataset import BlendedDataset, Row, open_run_dataset
from megatron_ettin.data.replay.files import METADATA_KEY
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.runs.directory import CONFIG, RunDirectory

COLUMNS = (
    "step", "slot", "position", "dataset", "row", "chunk", "source", "document", "document_index", "start_token",
    "end_token", "row_start",
)  # fmt: skip
ROWS_AT_ONCE = 16_384

# an int64 array or a list of strings for each of COLUMNS
Table = dict[str, Any]


def open_run(path: Path) -> tuple[Config, BlendedDataset]:
    """Open configuration and data of a run directory, a checkpoint or a config.yaml. Raises UserError."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no config.yaml; give a run directory, a checkpoint or a resolved config")
    config = from_yaml(file)
    return config, open_run_dataset(config)


def check_same_order(path: Path, corpus: BlendedDataset) -> None:
    """Raise UserError if the run directory `path` recorded another order than its datasets give today."""
    recorded = RunDirectory(path).order.get("fingerprint")
    # not a run directory, or not started: nothing is recorded
    if isinstance(recorded, str) and recorded != corpus.fingerprint:
        raise UserError(
            f"{path}: was trained in order {recorded[:12]}, its datasets now give {corpus.fingerprint[:12]}: a dataset"
            " or packing index was changed since, so they do not show what the run read"
        )


def parse_steps(text: str) -> range:
    """Parse `A:B` as steps A to B - 1, and `A` as step A alone. Raises UserError."""
    span = first_and_end(text)
    if span is None:
        raise UserError(f"--steps: {text!r} is not A:B (steps A to B - 1) or a single step")
    if not 1 <= span[0] < span[1]:
        raise UserError(f"--steps: {text!r} is empty or begins before 1, the first step of metrics.jsonl")
    if span[1] > sys.maxsize:
        raise UserError(f"--steps: {text!r}; no run has so many steps")
    return range(*span)


def batch_sizes(config: Config, corpus: BlendedDataset, steps: range) -> BatchSizes:
    """Return the number of rows of every step. Raises UserError if a recorded order ends before `steps` do."""
    sizes = BatchSizes.of(config.batch, corpus.mean_tokens_per_row)
    if corpus.row_limit is not None and sizes.rows_before(steps.stop - 1) > corpus.row_limit:
        raise UserError(
            f"--steps: {steps.start}:{steps.stop}, but the order of {config.data.order} ends with step"
            f" {sizes.steps_within(corpus.row_limit):,} ({counted(corpus.row_limit, 'row')})"
        )
    return sizes


def iter_rows(sizes: BatchSizes, steps: range) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (step, batch slot, row index) [n] of every row of `steps`, at most ROWS_AT_ONCE at a time."""
    first, end = sizes.rows_before(steps.start - 1), sizes.rows_before(steps.stop - 1)
    while first < end:
        stop = min(end, first + ROWS_AT_ONCE)
        # counted from 0
        step = sizes.steps_within(first)
        first_rows = [sizes.rows_before(step)]
        while first_rows[-1] < stop:
            first_rows.append(sizes.rows_before(step + len(first_rows)))
        row_index = np.arange(first, stop)
        index = np.searchsorted(first_rows, row_index, side="right") - 1
        yield step + index + 1, row_index - np.asarray(first_rows)[index], row_index
        first = stop


def tables(config: Config, corpus: BlendedDataset, steps: range) -> Iterator[Table]:
    """Yield tables with one line for each chunk: its document, its token span, its start in the row.

    `end_token` is exclusive and, like `start_token`, counts the document's own tokens: [CLS] and [SEP] of the chunk are
    in `row_start` only.
    """
    for step, batch_slot, row_index in iter_rows(batch_sizes(config, corpus, steps), steps):
        yield table_of(corpus, step, batch_slot, corpus.order_indices(row_index))


def table_of(corpus: BlendedDataset, step: np.ndarray, batch_slot: np.ndarray, order_index: np.ndarray) -> Table:
    """Return the lines of n rows from their steps, batch slots and order indices [n]."""
    located = corpus.locate_rows(order_index)
    lengths = corpus.chunk_lengths(located)
    ends = np.cumsum(lengths)
    n = len(located.chunks)
    row_begins = np.append(ends - lengths, 0)[np.cumsum(located.counts) - located.counts]
    source, row = np.repeat(located.source, located.counts), np.arange(len(step)).repeat(located.counts)
    names, files, ids = (np.empty(n, object) for _ in range(3))
    index, start, specials = (np.empty(n, np.int64) for _ in range(3))
    for s in np.unique(source).tolist():
        chosen = np.flatnonzero(source == s)
        spans = corpus.datasets[s].documents_of(located.chunks[chosen])
        names[chosen] = str(corpus.datasets[s].path)
        files[chosen], ids[chosen] = spans.source, spans.document_id
        index[chosen], start[chosen], specials[chosen] = spans.document, spans.start_token, spans.special_tokens
    columns = (
        step[row], batch_slot[row], order_index[row], names.tolist(), located.row[row], located.chunks, files.tolist(),
        ids.tolist(), index, start, start + lengths - specials, ends - lengths - row_begins[row],
    )  # fmt: skip
    return dict(zip(COLUMNS, columns, strict=True))


def spans(config: Config, corpus: BlendedDataset, steps: range) -> Iterator[dict[str, Any]]:
    """Yield the lines of `tables`, a dict for each chunk."""
    for table in tables(config, corpus, steps):
        columns = [column if isinstance(column, list) else column.tolist() for column in table.values()]
        for values in zip(*columns, strict=True):
            yield dict(zip(COLUMNS, values, strict=True))


def write_parquet(
    out: Path, config: Config, corpus: BlendedDataset, steps: range, names: Mapping[str, str] | None = None
) -> int:
    """Write the lines of `tables` to a parquet file and return their number.

    The file notes what is needed to train in this order elsewhere (`data.order=FILE`): the datasets' fingerprints, rows
    and nominal tokens.

    Args:
        out: the file.
        config: configuration of the run.
        corpus: rows of the run.
        steps: steps whose rows are written, counted from 1.
        names: names to write instead of the datasets' paths, by path.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    named = names or {}
    notes = {
        "datasets": {
            named.get(str(dataset.path), str(dataset.path)): dataset.fingerprint for dataset in corpus.datasets
        },
        "seq_len": corpus.seq_len,
        "batching": corpus.batching,
        "mean_tokens_per_row": corpus.mean_tokens_per_row,
        "fingerprint": corpus.fingerprint,
    }
    strings = ("dataset", "source", "document")
    fields = [pa.field(name, pa.string() if name in strings else pa.int64(), nullable=False) for name in COLUMNS]
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(notes).encode("utf-8")})
    count = 0
    with _output(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for table in tables(config, corpus, steps):
            table["dataset"] = [named.get(path, path) for path in table["dataset"]]
            writer.write_table(pa.table(table, schema=schema))
            count += len(table["step"])
    return count


def step_rows(config: Config, corpus: BlendedDataset, steps: range) -> Iterator[tuple[int, int, Row]]:
    """Yield (step, batch slot, row) of every row of `steps` in order."""
    for step, batch_slot, row_index in iter_rows(batch_sizes(config, corpus, steps), steps):
        rows = corpus.rows(corpus.order_indices(row_index))
        yield from zip(step.tolist(), batch_slot.tolist(), rows, strict=True)


def write_batches(out: Path, config: Config, corpus: BlendedDataset, steps: range) -> int:
    """Write exactly what the model sees as .npz and return the number of rows n.

    The arrays are step [n]; causal [n], whether the row is causal; input_ids and labels [n, seq_len] (-100 for
    tokens that are not predicted, shifted already for clm and mntp); spans [m, 3]: index of the row, first token and
    end of every chunk. All arrays are held in memory: 16 bytes for each token of a row.
    """
    collate, mix = dataset_collator(config, corpus), ObjectiveMix.of(config, corpus.mean_tokens_per_row)
    sizes = batch_sizes(config, corpus, steps)
    n = sizes.rows_before(steps.stop - 1) - sizes.rows_before(steps.start - 1)
    input_ids = np.full((n, config.data.seq_len), corpus.pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE)
    numbers, causal, boundaries = np.empty(n, np.int64), np.empty(n, np.bool_), []
    for i, (step, batch_slot, row) in enumerate(step_rows(config, corpus, steps)):
        objective = mix.row_objective(batch_slot, mix.causal_rows(sizes, step - 1))
        numbers[i], causal[i], real = step, ROW_OBJECTIVES[objective].causal, len(row.tokens)
        input_ids[i, :real], labels[i, :real] = collate(row.tokens, row.lengths, row.order_index, objective)
        ends = np.cumsum(row.lengths)
        boundaries += [(i, int(end - length), int(end)) for end, length in zip(ends, row.lengths, strict=True)]
    with _output(out) as temporary, open(temporary, "wb") as file:
        spans = np.array(boundaries)
        np.savez(file, step=numbers, causal=causal, input_ids=input_ids, labels=labels, spans=spans)
    return n


@contextlib.contextmanager
def _output(out: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` after the block. Raises UserError if the file system refuses."""
    try:
        with atomic_path(out, durable=False, per_process=True) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
