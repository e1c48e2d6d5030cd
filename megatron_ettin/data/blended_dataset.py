"""Look up the rows that a run trains on by their index in the data order, in constant memory.

The order is a `ShuffledSampler` over a mixture, which is a pure function, or a `RecordedSampler` over an order in files
(`data.order=FILE`), which is compiled once and memory-mapped. Nothing depends on the number of ranks, and a resume
needs no state but the step. An encoder and a decoder with one fingerprint read the same rows.

Two indices name a row. `order_index` counts the rows of the data order. `row_index` counts the rows of the run, without
those that `data.skip` leaves out. The two are equal if nothing is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import Config
from megatron_ettin.config.values import Skips, parse_skips
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.mixture import BLOCK_SLOTS, FORMS, MixtureEntry, SourceEpochs, resolve_mixture, slot_counts
from megatron_ettin.data.packing import pack
from megatron_ettin.data.packing_index import PackingIndex, check_rows
from megatron_ettin.data.replay.recorded import RecordedSampler, open_recorded_sampler
from megatron_ettin.data.row_files import PackingRecord, RowArrays
from megatron_ettin.data.sampler import ShuffledSampler

# raise it when the same inputs would give another order
ORDER_VERSION = 1
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Tokens of one training row, with the chunks that they come from."""

    tokens: npt.NDArray[np.integer]
    """Token ids without padding, chunk after chunk; at most seq_len."""
    lengths: Int64Array
    """Number of tokens of each chunk."""
    source: int
    """Index of the row's dataset in the mixture."""
    row: int
    """Number of the row in its dataset's packing index."""
    chunks: Int64Array
    """Chunk numbers within the dataset."""
    order_index: int
    """Index of the row in the data order."""


@dataclass(frozen=True)
class LocatedRows:
    """Origin of n rows with m chunks in all."""

    source: Int64Array
    """Index [n] of each row's dataset in the mixture."""
    row: Int64Array
    """Number [n] of each row in its dataset's packing index."""
    counts: Int64Array
    """Number of chunks of each row [n]."""
    chunks: Int64Array
    """Chunk numbers [m] within the row's dataset, row after row."""


@dataclass(eq=False)
class BlendedDataset:
    """Rows of one or several datasets in the order of a sampler. Its pickle has no mapped files, so it is small."""

    datasets: list[Dataset]
    """Datasets of the mixture."""
    packing_indices: list[PackingIndex]
    """Packing index of each dataset; empty under a recorded order, which lists chunks itself."""
    order: ShuffledSampler | RecordedSampler
    """Sampler that maps order indices to rows."""
    nominal_tokens: float | None = None
    """Mean number of tokens of a row to plan with; None uses the mean of the data."""
    skips: Skips = ()
    """Ranges [first, end) of order indices that are skipped."""

    def __post_init__(self) -> None:
        rows = self.order.record if isinstance(self.order, RecordedSampler) else self.packing_indices[0].record
        self.seq_len, self.batching = rows.seq_len, rows.batching
        tokenizer = self.datasets[0].manifest.tokenizer
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self.vocab_size = tokenizer.vocab_size
        self.special_ids = tokenizer.special_ids
        self.pad_id, self.mask_id = tokenizer.pad_id, tokenizer.mask_id
        if isinstance(self.order, RecordedSampler):
            self.num_rows = self.order.num_rows
            self.mean_tokens_per_row = self.order.mean_tokens_per_row
            self.fingerprint = self.order.fingerprint
        else:
            parts = list(zip(self.datasets, self.packing_indices, self.order.counts, strict=True))
            self.num_rows = sum(index.num_rows for index in self.packing_indices)
            self.mean_tokens_per_row = sum(n * index.mean_tokens_per_row for _, index, n in parts) / BLOCK_SLOTS
            seed, phase = self.order.seed, self.order.phase
            content: list[object] = ["order", ORDER_VERSION, seed, phase, self.seq_len, self.batching]
            for dataset, index, count in parts:
                content += [dataset.fingerprint, index.fingerprint, count]
            self.fingerprint = hashlib.sha256(":".join(str(part) for part in content).encode("utf-8")).hexdigest()
        self.unskipped_fingerprint = self.fingerprint
        if self.skips:
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} without {self.skips}".encode()).hexdigest()
        if self.nominal_tokens is not None:
            self.mean_tokens_per_row = self.nominal_tokens

    def __reduce__(self) -> tuple[type[BlendedDataset], tuple[Any, ...]]:
        return type(self), (self.datasets, self.packing_indices, self.order, self.nominal_tokens, self.skips)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError if `vocab_size`, the model's, differs from that of the datasets' tokenizer."""
        if self.vocab_size != vocab_size:
            raise UserError(
                f"model.vocab_size: {vocab_size}, but the dataset's tokenizer has {self.vocab_size} entries;"
                f" set model.vocab_size={self.vocab_size} or prepare the data with the model's tokenizer"
            )

    @property
    def row_limit(self) -> int | None:
        """Number of rows that a run can read from a recorded order; None for a shuffled order, which has no end."""
        if not isinstance(self.order, RecordedSampler):
            return None
        left_out = sum(min(end, self.order.num_rows) - min(first, self.order.num_rows) for first, end in self.skips)
        return self.order.num_rows - left_out

    def order_indices(self, row_indices: npt.ArrayLike) -> Int64Array:
        """Return the order index of each row of the run."""
        return order_indices(row_indices, self.skips)

    def order_span(self, first: int, end: int) -> tuple[int, int]:
        """Return the range [begin, end) of order indices that covers the run's rows [first, end).

        It includes the rows between them that `data.skip` leaves out.
        """
        begin, last = self.order_indices([first, max(first, end - 1)]).tolist()
        return begin, last + (end > first)

    @property
    def skipped_samples(self) -> int:
        """Number of samples of a recorded order that are left out because no dataset has them."""
        return self.order.record.skipped_samples if isinstance(self.order, RecordedSampler) else 0

    def locate(self, order_indices: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return (index of the dataset, row in its packing index, epoch) of each order index."""
        return self.order.locate(order_indices)

    def row(self, order_index: int) -> Row:
        """Read the row at an order index."""
        return self.rows([order_index])[0]

    def rows(self, order_indices: Sequence[int] | Int64Array) -> list[Row]:
        """Read the rows at several order indices, with one look-up for all."""
        located = self.locate_rows(order_indices)
        chunks = np.split(located.chunks, np.cumsum(located.counts)[:-1]) if len(located.counts) else []
        columns = zip(located.source.tolist(), located.row.tolist(), chunks, map(int, order_indices), strict=True)
        return [self._read(*origin) for origin in columns]

    def locate_rows(self, order_indices: Sequence[int] | Int64Array) -> LocatedRows:
        """Return source, row and chunks of several rows, without reading tokens."""
        wanted = np.asarray(order_indices, np.int64)
        source, row, _ = self.locate(wanted)
        if isinstance(self.order, RecordedSampler):
            return LocatedRows(source, row, *self.order.row_chunks(wanted))
        counts = np.zeros_like(row)
        by_source: list[tuple[npt.NDArray[np.bool_], Int64Array]] = []
        for s in np.unique(source).tolist():
            chosen = source == s
            own, counts[chosen] = self.packing_indices[s].chunks_of_rows(row[chosen])
            by_source.append((chosen, own))
        chunks = np.empty(int(counts.sum()), np.int64)
        for chosen, own in by_source:
            chunks[np.repeat(chosen, counts)] = own
        return LocatedRows(source, row, counts, chunks)

    def chunk_lengths(self, located: LocatedRows) -> Int64Array:
        """Return the number of tokens of each chunk [m] in its row. `padded` batching cuts a chunk to `seq_len`."""
        source = np.repeat(located.source, located.counts)
        lengths = np.empty(source.shape, np.int64)
        for s in np.unique(source).tolist():
            lengths[source == s] = self.datasets[s].lengths_of(located.chunks[source == s])
        return np.minimum(lengths, self.seq_len)

    def token_counts(self, order_indices: npt.ArrayLike) -> Int64Array:
        """Return the number of tokens of each row without padding. The rows are not read."""
        if isinstance(self.order, RecordedSampler):
            return self.order.token_counts(order_indices)
        source, row, _ = self.locate(order_indices)
        tokens = np.empty_like(row)
        for s in np.unique(source).tolist():
            tokens[source == s] = self.packing_indices[s].tokens_of(row[source == s])
        return tokens

    def epochs(self, run_tokens: int) -> list[SourceEpochs]:
        """Return how often each dataset is read in a run of `run_tokens` tokens."""
        names = [str(dataset.path) for dataset in self.datasets]
        if isinstance(self.order, RecordedSampler):
            tokens: list[float] = list(self.order.tokens_by_source)
            sizes = [dataset.num_tokens for dataset in self.datasets]
            run_tokens = min(run_tokens, round(sum(tokens)))
        else:
            tokens = [
                c * index.mean_tokens_per_row for c, index in zip(self.order.counts, self.packing_indices, strict=True)
            ]
            sizes = [index.num_tokens for index in self.packing_indices]
        shares = [count / sum(tokens) for count in tokens]
        columns = zip(names, shares, sizes, strict=True)
        return [SourceEpochs(name, share, size, share * run_tokens / size) for name, share, size in columns]

    def _read(self, source: int, row: int, chunks: Int64Array, order_index: int) -> Row:
        dataset = self.datasets[source]
        parts = [dataset.chunk(chunk) for chunk in chunks.tolist()]
        # padded batching only: cut a chunk that is too long, but keep its final [SEP]
        if len(parts[0]) > self.seq_len:
            ends_in_sep = parts[0][-1] == dataset.manifest.tokenizer.sep_id
            kept = self.seq_len - 1 if ends_in_sep else self.seq_len
            parts = [np.concatenate([parts[0][:kept], parts[0][-1:] if ends_in_sep else parts[0][:0]])]
        lengths = np.asarray([len(part) for part in parts], dtype=np.int64)
        return Row(np.concatenate(parts), lengths, source, row, chunks, order_index)


def order_indices(row_indices: npt.ArrayLike, skips: Skips) -> Int64Array:
    """Return the order index of each row of a run whose order leaves out the ranges `skips`."""
    indices = np.array(row_indices, np.int64)
    for first, end in skips:
        indices = np.where(indices >= first, indices + (end - first), indices)
    return indices


def open_blended_dataset(
    mixture: Sequence[MixtureEntry], seq_len: int, batching: str, seed: int, phase: str
) -> BlendedDataset:
    """Open a mixture (`parse_mixture`) in shuffled order. Missing packing indices are built."""
    datasets = open_datasets(mixture)
    indices = [PackingIndex.build_or_open(dataset, seq_len, batching) for dataset in datasets]
    rows = [index.num_rows for index in indices]
    counts = slot_counts(mixture, rows, [index.mean_tokens_per_row for index in indices])
    return BlendedDataset(datasets, indices, ShuffledSampler(counts, rows, seed, phase))


def open_run_dataset(config: Config) -> BlendedDataset:
    """Open the rows of a run: its mixture in shuffled order, or in the order of `data.order`. Raises UserError."""
    data = resolve_mixture(config.data)
    mixture = [MixtureEntry(**entry) for entry in data.mixture]
    if data.order == "keyed":
        dataset = open_blended_dataset(mixture, data.seq_len, data.batching, config.run.seed, config.run.phase)
    else:
        datasets = open_datasets(mixture)
        order = open_recorded_sampler(data.order, datasets, data.seq_len, data.batching, data.order_missing)
        dataset = BlendedDataset(datasets, [], order)
    return replace(dataset, nominal_tokens=data.mean_tokens_per_row, skips=parse_skips(data.skip))


def open_datasets(mixture: Sequence[MixtureEntry]) -> list[Dataset]:
    """Open the datasets of a mixture. Raises UserError if their tokenizers differ."""
    if not mixture:
        raise UserError(f"data.mixture: empty; give {FORMS}")
    datasets = [open_dataset(entry.path) for entry in mixture]
    first = datasets[0]
    for dataset in datasets[1:]:
        ours, theirs = first.manifest.tokenizer, dataset.manifest.tokenizer
        if ours.fingerprint != theirs.fingerprint:
            raise UserError(
                f"data.mixture: {first.path} has tokenizer {ours.name} ({ours.fingerprint[:12]}) and {dataset.path} "
                f"has {theirs.name} ({theirs.fingerprint[:12]}); all datasets of a mixture share one tokenizer"
            )
    return datasets


MAX_CHUNKS_BY_SOURCE = 1 << 24
CHUNKS_AT_ONCE = 1 << 16


def open_by_source(path: str, seq_len: int, batching: str, seed: int, phase: str) -> dict[str, BlendedDataset]:
    """Open a dataset for evaluation, with rows that hold chunks of one INPUT each, so that a loss by source is exact.

    Rows for training mix the INPUTs of `ettin prepare`. This function packs the chunks of each INPUT separately, in
    memory and in every process. It is meant for held-out sets: it takes 24 bytes a chunk and looks up each document.

    Returns:
        INPUT -> its rows in shuffled order. A dataset with one INPUT, or with more than MAX_CHUNKS_BY_SOURCE chunks,
        has one entry: "" -> its ordinary rows.

    Raises:
        UserError: the dataset cannot be read, or rows of `seq_len` cannot hold its chunks.
    """
    dataset = open_dataset(path)
    check_rows(dataset, seq_len, batching)
    if len(dataset.manifest.sources) < 2 or dataset.num_chunks > MAX_CHUNKS_BY_SOURCE:
        indices = {"": PackingIndex.build_or_open(dataset, seq_len, batching)}
    else:
        by_source = chunks_by_source(dataset)
        indices = {name: pack_source(dataset, name, own, seq_len, batching) for name, own in by_source.items()}
    samplers = {name: ShuffledSampler([BLOCK_SLOTS], [index.num_rows], seed, phase) for name, index in indices.items()}
    return {name: BlendedDataset([dataset], [index], samplers[name]) for name, index in indices.items()}


def chunks_by_source(dataset: Dataset) -> dict[str, Int64Array]:
    """Return INPUT -> its chunk numbers, in the manifest's order, without INPUTs that have none.

    A document's file is named "INPUT/path". Chunks of files with another name come last, under "(other)".
    """
    number = {source.name: i for i, source in enumerate(dataset.manifest.sources)}
    source_of = np.empty(dataset.num_chunks, np.int32)
    for first in range(0, dataset.num_chunks, CHUNKS_AT_ONCE):
        chunks = np.arange(first, min(first + CHUNKS_AT_ONCE, dataset.num_chunks))
        files = dataset.documents_of(chunks).source
        source_of[chunks] = [number.get(file.partition("/")[0], -1) for file in files]
    by_source = {name: np.flatnonzero(source_of == i) for name, i in number.items()}
    by_source["(other)"] = np.flatnonzero(source_of < 0)
    return {name: chunks for name, chunks in by_source.items() if len(chunks)}


def pack_source(dataset: Dataset, name: str, chunks: Int64Array, seq_len: int, batching: str) -> PackingIndex:
    """Return a packing index in memory over the given chunks of a dataset; `name` becomes part of its fingerprint."""
    lengths = np.minimum(dataset.lengths_of(chunks), seq_len)
    if batching == "padded":
        order, counts = np.arange(len(chunks)), np.ones(len(chunks), np.int64)
    else:
        windows = list(pack(lengths, seq_len))
        order = np.concatenate([members for members, _ in windows])
        counts = np.concatenate([count for _, count in windows])
    ends = np.cumsum(counts)
    tokens = np.add.reduceat(lengths[order], ends - counts)
    fingerprint = f"{dataset.fingerprint}:{name}"
    record = PackingRecord(fingerprint, seq_len, batching, len(counts), int(tokens.sum()), {})
    return PackingIndex(Path(), record, dataset, RowArrays(chunks[order], ends, tokens))
