"""The data order: position -> row -> tokens, for any position, in constant memory.

Either the keyed order of a mixture (keyed.py), a pure function, or an order given in files (`data.order=FILE`,
replay.py), which is compiled once and memory-mapped. Nothing depends on the number of ranks and a resume needs no
state: the position is the state. An encoder and a decoder with one fingerprint read the same rows.

Rows for evaluation that hold chunks of one source each, so that a loss by source is exact.

A training row mixes the INPUTs of `ettin prepare`; here the chunks of each are packed by themselves, in memory and on
every process alike. It is meant for held-out sets: 24 bytes a chunk, and a document looked up for each. A dataset of
more than MOST_CHUNKS chunks is not told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import Config
from megatron_ettin.config.values import Skips, parse_skips
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.mixture import BLOCK_SLOTS, FORMS, MixtureEntry, SourceEpochs, resolve_mixture, slot_counts
from megatron_ettin.data.packing import pack
from megatron_ettin.data.packing_index import (
    PackingIndex,
    PackingRecord,
    RowArrays,
    build_or_open_packing_index,
    check_rows,
)
from megatron_ettin.data.replay.recorded import RecordedSampler, open_recorded_sampler
from megatron_ettin.data.sampler import ShuffledSampler

ORDER_VERSION = 1  # raise it when the same inputs would give another order
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One training row."""

    tokens: npt.NDArray[np.integer]  # real tokens, chunk after chunk; at most seq_len
    lengths: Int64Array  # tokens of each chunk
    source: int  # place in the mixture
    row: int  # of the source's row plan
    chunks: Int64Array  # global chunk numbers within the source's dataset
    position: int


class RowLocation(NamedTuple):
    """Where one row comes from."""

    source: int
    row: int
    chunks: Int64Array


@dataclass(frozen=True)
class LocatedRows:
    """Where n rows of m chunks in all come from."""

    source: Int64Array  # [n]
    row: Int64Array  # [n]
    counts: Int64Array  # [n]: chunks of each row
    chunks: Int64Array  # [m]: chunk numbers within the row's dataset, row after row


class BlendedDataset:
    """Rows by position; see `open_corpus`. `plans` holds a row plan for each dataset under the keyed order and nothing
    under a given one, which names chunks. `nominal_tokens`: mean tokens a row instead of the data's own. `skips`:
    places of the order that are left out. It pickles small: paths and records, no maps.

    A run counts its rows without those that are left out; `place_of` says where in the order they are, and every other
    method takes such places."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plans: Sequence[PackingIndex],
        order: ShuffledSampler | RecordedSampler,
        seq_len: int,
        batching: str,
        nominal_tokens: float | None = None,
        skips: Skips = (),
    ) -> None:
        self.datasets = list(datasets)
        self.plans = list(plans)
        self.order = order
        self.seq_len = seq_len
        self.batching = batching
        tokenizer = datasets[0].manifest.tokenizer
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self.vocab_size = tokenizer.vocab_size
        self.special_ids = tokenizer.special_ids
        self.pad_id, self.mask_id = tokenizer.pad_id, tokenizer.mask_id
        if isinstance(order, RecordedSampler):
            self.num_rows = order.num_rows
            self.mean_tokens_per_row = order.mean_tokens_per_row
            self.fingerprint = order.fingerprint
        else:
            self.num_rows = sum(plan.num_rows for plan in plans)
            slot_tokens = sum(c * plan.mean_tokens_per_row for c, plan in zip(order.counts, plans, strict=True))
            self.mean_tokens_per_row = slot_tokens / BLOCK_SLOTS
            self.fingerprint = self._keyed_fingerprint(order)
        self.skips = skips
        self.unskipped_fingerprint = self.fingerprint
        if skips:
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} without {skips}".encode()).hexdigest()
        self.nominal_tokens = nominal_tokens
        if nominal_tokens is not None:
            self.mean_tokens_per_row = nominal_tokens

    def __getstate__(self) -> dict[str, Any]:
        names = ("datasets", "plans", "order", "seq_len", "batching", "nominal_tokens", "skips")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def end(self) -> int | None:
        """How many rows a run has in a given order; None where there is no last one."""
        if not isinstance(self.order, RecordedSampler):
            return None
        left_out = sum(min(end, self.order.num_rows) - min(first, self.order.num_rows) for first, end in self.skips)
        return self.order.num_rows - left_out

    def place_of(self, counted: npt.ArrayLike) -> Int64Array:
        """Positions in the order of a run's rows by their number: rows left out are not counted."""
        places = np.array(counted, np.int64)
        for first, end in self.skips:
            places = np.where(places >= first, places + (end - first), places)
        return places

    def span_of(self, first: int, end: int) -> tuple[int, int]:
        """[first, end) of a run's rows as places of the order; what is left out between them included."""
        places = self.place_of([first, max(first, end - 1)]).tolist()
        return places[0], places[1] + (end > first)

    @property
    def skipped_samples(self) -> int:
        """Samples of a given order that are left out because no dataset has them."""
        return self.order.record.skipped_samples if isinstance(self.order, RecordedSampler) else 0

    @property
    def counts(self) -> list[int]:
        """Slots of each source in every block of the keyed order."""
        return self.order.counts if isinstance(self.order, ShuffledSampler) else []

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(source, row, epoch) of each position >= 0."""
        return self.order.locate(positions)

    def row(self, position: int) -> Row:
        """The row at one position."""
        return self.rows([position])[0]

    def rows(self, positions: Sequence[int] | Int64Array) -> list[Row]:
        """The rows at several positions: one look-up for all."""
        return [self._read(place, int(p)) for place, p in zip(self.places(positions), positions, strict=True)]

    def places(self, positions: Sequence[int] | Int64Array) -> list[RowLocation]:
        """Source, row and chunks of the rows at the positions. Reads no tokens."""
        placed = self.placed(positions)
        chunks = np.split(placed.chunks, np.cumsum(placed.counts)[:-1]) if len(placed.counts) else []
        return list(map(RowLocation, placed.source.tolist(), placed.row.tolist(), chunks))

    def placed(self, positions: Sequence[int] | Int64Array) -> LocatedRows:
        """`places` as arrays."""
        wanted = np.asarray(positions, np.int64)
        source, row, _ = self.locate(wanted)
        if isinstance(self.order, RecordedSampler):
            return LocatedRows(source, row, *self.order.chunks_at(wanted))
        counts = np.zeros_like(row)
        of_source: list[tuple[npt.NDArray[np.bool_], Int64Array]] = []
        for s in np.unique(source).tolist():
            chosen = source == s
            found, counts[chosen] = self.plans[s].chunks_of_rows(row[chosen])
            of_source.append((chosen, found))
        chunks = np.empty(int(counts.sum()), np.int64)
        for chosen, found in of_source:
            chunks[np.repeat(chosen, counts)] = found
        return LocatedRows(source, row, counts, chunks)

    def lengths_of(self, placed: LocatedRows) -> Int64Array:
        """Tokens [m] that each chunk of the placed rows has in its row: no more than the row under `padded`."""
        source = np.repeat(placed.source, placed.counts)
        lengths = np.empty(source.shape, np.int64)
        for s in np.unique(source).tolist():
            lengths[source == s] = self.datasets[s].lengths_of(placed.chunks[source == s])
        return np.minimum(lengths, self.seq_len)

    def tokens_at(self, positions: npt.ArrayLike) -> Int64Array:
        """Real tokens of the rows at the positions, without reading the rows."""
        source, row, _ = self.locate(positions)
        if isinstance(self.order, RecordedSampler):
            return self.order.tokens_at(positions)
        tokens = np.empty_like(row)
        for i in np.unique(source).tolist():
            tokens[source == i] = self.plans[i].tokens_of(row[source == i])
        return tokens

    def epochs(self, run_tokens: int) -> list[SourceEpochs]:
        """How often each dataset is read in a run of `run_tokens` tokens."""
        names = [str(dataset.path) for dataset in self.datasets]
        if isinstance(self.order, RecordedSampler):
            tokens: list[float] = list(self.order.tokens_by_source)
            sizes = [dataset.num_tokens for dataset in self.datasets]
            run_tokens = min(run_tokens, round(sum(tokens)))
        else:
            tokens = [c * plan.mean_tokens_per_row for c, plan in zip(self.order.counts, self.plans, strict=True)]
            sizes = [plan.num_tokens for plan in self.plans]
        shares = [count / sum(tokens) for count in tokens]
        columns = zip(names, shares, sizes, strict=True)
        return [SourceEpochs(name, share, size, share * run_tokens / size) for name, share, size in columns]

    def _read(self, place: RowLocation, position: int) -> Row:
        dataset = self.datasets[place.source]
        pieces = [dataset.chunk(chunk) for chunk in place.chunks.tolist()]
        if len(pieces[0]) > self.seq_len:  # padded batching only: cut, but let the row end as it would have
            ends_in_sep = pieces[0][-1] == dataset.manifest.tokenizer.sep_id
            kept = self.seq_len - 1 if ends_in_sep else self.seq_len
            pieces = [np.concatenate([pieces[0][:kept], pieces[0][-1:] if ends_in_sep else pieces[0][:0]])]
        lengths = np.asarray([len(piece) for piece in pieces], dtype=np.int64)
        return Row(np.concatenate(pieces), lengths, place.source, place.row, place.chunks, position)

    def _keyed_fingerprint(self, order: ShuffledSampler) -> str:
        content: list[object] = ["order", ORDER_VERSION, order.seed, order.phase, self.seq_len, self.batching]
        for dataset, plan, count in zip(self.datasets, self.plans, order.counts, strict=True):
            content += [dataset.fingerprint, plan.fingerprint, count]
        return hashlib.sha256(":".join(str(part) for part in content).encode("utf-8")).hexdigest()


def open_blended_dataset(
    mixture: Sequence[MixtureEntry],
    seq_len: int,
    batching: str,
    seed: int,
    phase: str,
    nominal_tokens: float | None = None,
    skips: Skips = (),
) -> BlendedDataset:
    """The keyed order of a mixture (`parse_mixture`). Row plans that are not there are built."""
    datasets = open_datasets(mixture)
    plans = [build_or_open_packing_index(dataset, seq_len, batching) for dataset in datasets]
    rows = [plan.num_rows for plan in plans]
    counts = slot_counts(mixture, rows, [plan.mean_tokens_per_row for plan in plans])
    return BlendedDataset(
        datasets, plans, ShuffledSampler(counts, rows, seed, phase), seq_len, batching, nominal_tokens, skips
    )


def open_run_dataset(config: Config) -> BlendedDataset:
    """What a run reads: its mixture in the keyed order, or in the order of `data.order`'s files. Raises UserError."""
    data = resolve_mixture(config.data)
    mixture = [MixtureEntry(**entry) for entry in data.mixture]
    if data.order == "keyed":
        seed, phase = config.run.seed, config.run.phase
        nominal, skips = data.mean_tokens_per_row, parse_skips(data.skip)
        return open_blended_dataset(mixture, data.seq_len, data.batching, seed, phase, nominal, skips)
    datasets = open_datasets(mixture)
    order = open_recorded_sampler(data.order, datasets, data.seq_len, data.batching, data.order_missing)
    skips = parse_skips(data.skip)
    return BlendedDataset(datasets, [], order, data.seq_len, data.batching, data.mean_tokens_per_row, skips)


def open_datasets(mixture: Sequence[MixtureEntry]) -> list[Dataset]:
    """Open the datasets of a mixture. Raises UserError where they differ in their tokenizer."""
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


MOST_CHUNKS = 1 << 24
CHUNKS_AT_ONCE = 1 << 16


def open_by_source(path: str, seq_len: int, batching: str, seed: int, phase: str) -> dict[str, BlendedDataset]:
    """Rows of each INPUT of a dataset, by its name, in a keyed order of their own. A dataset of one INPUT, or of too
    many chunks, is one entry: its ordinary rows under the name "". Raises UserError."""
    dataset = open_dataset(path)
    check_rows(dataset, seq_len, batching)
    if len(dataset.manifest.sources) < 2 or dataset.num_chunks > MOST_CHUNKS:
        plans = {"": build_or_open_packing_index(dataset, seq_len, batching)}
    else:
        plans = {name: plan_of(dataset, name, chunks, seq_len, batching) for name, chunks in by_source(dataset).items()}
    return {name: one_source(dataset, plan, seed, phase) for name, plan in plans.items()}


def one_source(dataset: Dataset, plan: PackingIndex, seed: int, phase: str) -> BlendedDataset:
    order = ShuffledSampler([BLOCK_SLOTS], [plan.num_rows], seed, phase)
    return BlendedDataset([dataset], [plan], order, plan.seq_len, plan.batching)


def by_source(dataset: Dataset) -> dict[str, npt.NDArray[np.int64]]:
    """The chunks of each INPUT that has any, in the manifest's order: a document's file begins with its name."""
    names = [source.name for source in dataset.manifest.sources]
    number = {name: i for i, name in enumerate(names)}
    source_of = np.empty(dataset.num_chunks, np.int32)
    for first in range(0, dataset.num_chunks, CHUNKS_AT_ONCE):
        chunks = np.arange(first, min(first + CHUNKS_AT_ONCE, dataset.num_chunks))
        files = dataset.documents_of(chunks).source
        source_of[chunks] = [number.get(file.partition("/")[0], -1) for file in files]
    found = {name: np.flatnonzero(source_of == i) for name, i in number.items()}
    found["(other)"] = np.flatnonzero(source_of < 0)
    return {name: chunks for name, chunks in found.items() if len(chunks)}


def plan_of(dataset: Dataset, name: str, chunks: npt.NDArray[np.int64], seq_len: int, batching: str) -> PackingIndex:
    """A row plan in memory over some of a dataset's chunks."""
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
