"""Make a micro-batch in host memory: read its rows, label them and lay them out in arrays.

It is a pure function of (configuration, data, step, index) and imports neither torch nor Megatron, so that a loader's
worker process starts at once. Each data-parallel rank and each pipeline stage makes its own, without communication.
Rows are spread evenly over ranks and micro-batches (config/layouts.py). A slot without a row gets an empty row, which
has padding and no labels and is not counted. Packed rows have `row_tokens` positions each. Rows of padded batching are
laid end to end, so the only padding is at the end of the micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ettin.base.errors import RankError
from megatron_ettin.batching.objectives import MaskingCollator, ObjectiveMix, dataset_collator
from megatron_ettin.config.flops import attended_pairs
from megatron_ettin.config.layouts import RowSplit, full_batch_split, has_fixed_shapes, micro_batch_group
from megatron_ettin.config.schema import Config, PrecisionConfig
from megatron_ettin.config.tables import IGNORE, PRECISIONS, ROW_OBJECTIVES
from megatron_ettin.data.blended_dataset import BlendedDataset, Row
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.model.boundaries import ChunkBoundaries, HostArray, pin_arrays
from megatron_ettin.parallel.env import Topology


def token_multiple(precision: PrecisionConfig, topology: Topology) -> int:
    """Return the number that the tokens of a row on the device must be a multiple of.

    Every parallel axis divides such a number of tokens, and the slice of each rank consists of whole quantisation
    blocks of the precision.
    """
    multiple = PRECISIONS[precision.name].multiple
    blocks = 16 if multiple == 1 else math.lcm(16, multiple) * topology.tp
    return math.lcm(blocks * topology.cp, topology.tp * topology.cp)


def row_tokens(config: Config, topology: Topology) -> int:
    """Return the tokens of a row on the device: seq_len rounded up to a multiple of `token_multiple`."""
    multiple = token_multiple(config.precision, topology)
    return -(-config.data.seq_len // multiple) * multiple


@dataclass(frozen=True)
class HostBatch:
    """Inputs and labels of one forward pass in host memory. A `MicroBatch` is its copy on the device."""

    input_ids: HostArray
    """Token ids [rows, row tokens / cp]; [1, tokens / cp] if rows are laid end to end."""
    labels: HostArray
    """Token ids to predict [n]."""
    label_positions: HostArray
    """Flat positions of the labels in `input_ids` [n]."""
    causal_labels: int
    """Number of labels in causal rows; these labels come first."""
    boundaries: ChunkBoundaries
    """Boundaries of the chunks."""
    tokens: int
    """Number of tokens of the whole rows, not only of this rank's slices, without padding."""
    pairs: tuple[int, int]
    """Number of attended (query, key) pairs of the whole rows: in one global layer, in one local layer."""

    def pin_memory(self) -> HostBatch:
        """Return a copy in page-locked memory. The pinning thread of torch's DataLoader calls this method."""
        return dataclasses.replace(pin_arrays(self), boundaries=pin_arrays(self.boundaries))


@dataclass(frozen=True)
class HostBatches:
    """Maker of the micro-batches of any step for one rank. Its pickle is small, for the worker processes."""

    corpus: BlendedDataset
    """Rows of the run."""
    sizes: BatchSizes
    """Number of rows of each step."""
    collator: MaskingCollator
    """Maker of a row's inputs and labels."""
    objectives: ObjectiveMix
    """Row objective of each slot."""
    windows: Mapping[bool, int]
    """Attention window of a local layer in tokens: in causal rows (True) and in others (False)."""
    row_tokens: int
    """Tokens of a row on the device, padding included."""
    micro_batch_rows: int
    """Largest number of rows of a micro-batch."""
    dp: int = 1
    """Data-parallel degree."""
    dp_rank: int = 0
    """Data-parallel rank."""
    context: tuple[int, int] = (0, 1)
    """Rank and degree of context parallelism."""
    group: int = 1
    """The number of micro-batches of a rank is a multiple of this."""
    fixed: bool = False
    """True if micro-batches have exactly `micro_batch_rows` rows, empty ones included, in every step."""
    flat_multiple: int = 0
    """Lay rows end to end and pad to a multiple of this many tokens; 0 gives each row `row_tokens` positions."""
    equal_lengths: bool = False
    """True if all micro-batches of a step have the same number of tokens, which pipeline stages need."""

    @classmethod
    def of(
        cls, config: Config, corpus: BlendedDataset, topology: Topology, dp_rank: int = 0, cp_rank: int = 0
    ) -> HostBatches:
        """Return the maker for one rank. Raises UserError if model and dataset differ in vocabulary size."""
        fixed = has_fixed_shapes(config)
        flat = config.data.batching == "padded" and not fixed
        return cls(
            corpus,
            BatchSizes.of(config.batch, corpus.mean_tokens_per_row),
            dataset_collator(config, corpus),
            ObjectiveMix.of(config, corpus.mean_tokens_per_row),
            config.windows,
            row_tokens(config, topology),
            full_batch_split(config, topology.dp).size if fixed else config.batch.micro_batch_rows,
            topology.dp,
            dp_rank,
            (cp_rank, topology.cp),
            micro_batch_group(config.parallel),
            fixed,
            token_multiple(config.precision, topology) if flat else 0,
            flat and topology.pp > 1,
        )

    def split(self, rows: int) -> RowSplit:
        """Return how `rows` rows are divided over ranks and micro-batches."""
        return RowSplit.of(rows, self.dp, self.micro_batch_rows, self.group, self.fixed)

    def count(self, step: int) -> int:
        """Return the number of micro-batches that a rank runs at `step`, always a multiple of `group`."""
        return self.split(self.sizes.size_at(step)).count

    def make(self, step: int, index: int) -> HostBatch:
        """Make this rank's micro-batch `index` of `step`. Raises RankError if the data cannot be read."""
        first, end = self.sizes.span(step)
        split = self.split(end - first)
        slots, rows = self.share(split, index, first)
        min_tokens = self.longest(split, range(split.count), first) if self.equal_lengths else 0
        return self.lay_out(rows, slots, self.objectives.causal_rows(self.sizes, step), min_tokens)

    def make_held_out(self, split: RowSplit, index: int, min_tokens: int = 0) -> HostBatch:
        """Make this rank's micro-batch `index` of evaluation rows, all of one objective. `min_tokens` as in `lay_out`.

        Raises:
            RankError: the data cannot be read.
        """
        _, rows = self.share(split, index)
        causal = ROW_OBJECTIVES[self.objectives.row_objectives[0]].causal
        return self.lay_out(rows, range(len(rows)), len(rows) if causal else 0, min_tokens)

    def longest(self, split: RowSplit, indices: Iterable[int], first: int = 0) -> int:
        """Return the largest number of tokens without padding in one of this rank's micro-batches `indices`.

        `first` is the row index of the step's first row.
        """
        longest = 0
        for index in indices:
            order_indices = self.corpus.order_indices([first + slot for slot in split.slots(self.dp_rank, index)])
            longest = max(longest, int(self.corpus.token_counts(order_indices).sum()) if len(order_indices) else 0)
        return longest

    def share(self, split: RowSplit, index: int, first: int = 0) -> tuple[range, list[Row | None]]:
        """Return the slots of this rank's micro-batch `index` and their rows, None for an empty slot.

        Args:
            split: division of the step's rows over ranks and micro-batches.
            index: number of the micro-batch within the step.
            first: row index of the step's first row.

        Raises:
            RankError: the data cannot be read.
        """
        slots = split.slots(self.dp_rank, index)
        rows = self.rows([first + slot for slot in slots])
        return range(slots.start, slots.start + split.size), [*rows, *[None] * (split.size - len(rows))]

    def rows(self, row_indices: Sequence[int]) -> list[Row]:
        """Read rows of the run by their row indices. Raises RankError if the data cannot be read."""
        order_indices = self.corpus.order_indices(row_indices).tolist()
        try:
            rows = self.corpus.rows(order_indices) if order_indices else []
        except OSError as error:
            raise RankError(
                f"{error.filename or 'data'}: cannot be read any more ({error.strerror or error})"
            ) from None
        except IndexError as error:
            raise RankError(
                f"data: {error} at order indices {order_indices}: a packing index or an order is damaged"
            ) from None
        for row in rows:
            self._check(row)
        return rows

    def lay_out(
        self, rows: Sequence[Row | None], slots: Sequence[int], causal_slots: int, min_tokens: int = 0
    ) -> HostBatch:
        """Mask and label rows, and lay them out in the arrays of one micro-batch.

        Args:
            rows: the rows; None for an empty slot.
            slots: slot of each row within the step.
            causal_slots: number of causal slots, which come first in the step.
            min_tokens: least number of tokens, padding included, if rows are laid end to end.
        """
        lengths: list[list[int]] = [row.lengths.tolist() if row is not None else [] for row in rows]
        causal_rows = sum(slot < causal_slots for slot in slots)
        tokens, pairs = [], np.zeros(2, np.int64)
        for causal, part in ((True, lengths[:causal_rows]), (False, lengths[causal_rows:])):
            real = np.array([n for row in part for n in row], dtype=np.int64)
            tokens.append(int(real.sum()))
            pairs += [attended_pairs(real, causal, window).sum() for window in (None, self.windows[causal])]
        if self.flat_multiple:
            width = max(1, -(-max(sum(tokens), min_tokens) // self.flat_multiple)) * self.flat_multiple
            starts, shape = np.cumsum([0, *map(sum, lengths)]), (1, width)
            causal_tokens = tokens[0] if causal_rows < len(rows) else width
        else:
            starts, shape = np.arange(len(rows)) * self.row_tokens, (len(rows), self.row_tokens)
            causal_tokens = causal_rows * self.row_tokens
        input_ids, labels = np.full(shape, self.corpus.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        for row, slot, start in zip(rows, slots, starts.tolist(), strict=False):
            if row is not None:
                own = slice(start, start + len(row.tokens))
                objective = self.objectives.row_objective(slot, causal_slots)
                inputs, targets = self.collator(row.tokens, row.lengths, row.order_index, objective)
                input_ids.reshape(-1)[own], labels.reshape(-1)[own] = inputs, targets
        if self.flat_multiple:
            lengths = [[n for row in lengths for n in row]]
            slots = [slot for row, slot in zip(rows, slots, strict=True) if row is not None for _ in row.lengths]
        flat = self.flat_multiple > 0
        boundaries = ChunkBoundaries.of(lengths, shape[1], slots, causal_tokens, self.context, flat)
        ours = slice(boundaries.slice_start, boundaries.slice_start + boundaries.slice_tokens)
        own_labels = labels[:, ours].reshape(-1)
        label_positions = np.flatnonzero(own_labels != IGNORE)
        return HostBatch(
            input_ids=np.ascontiguousarray(input_ids[:, ours]),
            labels=own_labels[label_positions],
            label_positions=label_positions,
            causal_labels=boundaries.count_causal(label_positions),
            boundaries=boundaries,
            tokens=sum(tokens),
            pairs=(int(pairs[0]), int(pairs[1])),
        )

    def _check(self, row: Row) -> None:
        """Raise RankError if a row is damaged, because a GPU stops without a message at an id without embedding."""
        largest, smallest = (int(row.tokens.max()), int(row.tokens.min())) if len(row.tokens) else (0, -1)
        if len(row.tokens) > self.row_tokens or largest >= self.corpus.vocab_size or smallest < 0:
            raise RankError(
                f"dataset {self.corpus.datasets[row.source].path}: row {row.row} (chunks {row.chunks.tolist()[:8]}) has"
                f" {len(row.tokens)} tokens, the largest {largest}; a row holds {self.row_tokens}, the vocabulary ends"
                f" with {self.corpus.vocab_size - 1}: damaged; `ettin inspect --verify` tells where"
            )
