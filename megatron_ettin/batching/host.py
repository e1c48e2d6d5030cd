"""Make a micro-batch in host memory: read its rows, label them and lay them out in arrays.

It is a pure function of (configuration, data, step, index) and imports neither torch nor Megatron, so that a loader's
worker process starts at once. Rows are spread evenly over ranks and micro-batches (config/layouts.py); a slot that is
left over is an empty row: all padding, no labels, not counted. Packed rows have `row_tokens` positions each. Rows of
padded batching are laid end to end, and only the padding at the micro-batch's end is computed for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import RankError
from megatron_ettin.batching.objectives import MaskingCollator, ObjectiveMix
from megatron_ettin.config.flops import attended_pairs
from megatron_ettin.config.layouts import RowSplit
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.data.blended_dataset import BlendedDataset, Row
from megatron_ettin.data.sampler import BatchSizes


@dataclass(frozen=True)
class HostBatch:
    """Rows of one forward pass in host memory; arrays [rows, buffer tokens], or [1, tokens] of rows laid end to end."""

    input_ids: npt.NDArray[np.int64]
    """Token ids."""
    labels: npt.NDArray[np.int64]
    """Token id to predict at each position, or IGNORE."""
    lengths: tuple[tuple[int, ...], ...]
    """Chunk lengths of each row of the arrays."""
    slots: tuple[int, ...]
    """Slot of each row within the step; of each chunk where rows are laid end to end."""
    tokens: int
    """Number of tokens without padding."""
    pairs: tuple[int, int]
    """Number of attended (query, key) pairs of one global and of one local layer."""
    causal_places: int
    """Number of positions of the arrays in causal rows, which come first."""
    flat: bool = False
    """True if the rows, of one chunk each, are laid end to end."""


@dataclass(frozen=True)
class HostBatches:
    """Micro-batches of any step for one data-parallel rank. Pickles small: it travels to worker processes."""

    corpus: BlendedDataset
    """Rows of the run."""
    sizes: BatchSizes
    """Number of rows of each step."""
    label: MaskingCollator
    """Makes inputs and labels of a row."""
    kinds: ObjectiveMix
    """Row objective of each slot."""
    windows: Mapping[bool, int]
    """Attention window of a local layer: in causal rows (True) and in others (False)."""
    row_tokens: int
    """Tokens of a row on the device, padding included."""
    micro_batch_rows: int
    """Largest number of rows of a micro-batch."""
    dp: int
    """Data-parallel degree."""
    dp_rank: int
    """Data-parallel rank."""
    group: int
    """Number of which a rank's micro-batches are a multiple."""
    fixed: bool = False
    """True if micro-batches have exactly `micro_batch_rows` rows, empty ones included, in every step."""
    flat_multiple: int = 0
    """Lay rows end to end and pad to a multiple of so many tokens; 0: each row gets `row_tokens` positions."""
    equal: bool = False
    """True if all micro-batches of a step have equally many tokens, as pipeline stages need."""

    def split(self, rows: int) -> RowSplit:
        """Return how so many rows are shared out over ranks and micro-batches."""
        return RowSplit.of(rows, self.dp, self.micro_batch_rows, self.group, self.fixed)

    def count(self, step: int) -> int:
        """Return the number of micro-batches that a rank runs at `step`."""
        return self.split(self.sizes.size_at(step)).count

    def make(self, step: int, index: int) -> HostBatch:
        """Make this rank's micro-batch `index` of `step`. Raises RankError where the data cannot be read."""
        first, end = self.sizes.span(step)
        split = self.split(end - first)
        slots, rows = self.share(split, index, first)
        least = self.longest(split, range(split.count), first) if self.equal else 0
        return self.lay_out(rows, slots, self.kinds.causal_rows(self.sizes, step), least)

    def longest(self, split: RowSplit, indices: Iterable[int], first: int = 0) -> int:
        """Return the real tokens of the longest of these micro-batches of this rank."""
        found = 0
        for index in indices:
            order_indices = self.corpus.order_indices([first + slot for slot in split.slots(self.dp_rank, index)])
            found = max(found, int(self.corpus.token_counts(order_indices).sum()) if len(order_indices) else 0)
        return found

    def share(self, split: RowSplit, index: int, first: int = 0) -> tuple[range, list[Row | None]]:
        """Return the slots of this rank's micro-batch `index` and their rows, None for an empty slot.

        Args:
            split: how the step's rows are shared out.
            index: number of the micro-batch within the step.
            first: row index of the step's first row.

        Raises:
            RankError: the data cannot be read.
        """
        slots = split.slots(self.dp_rank, index)
        rows = self.rows([first + slot for slot in slots])
        return range(slots.start, slots.start + split.size), [*rows, *[None] * (split.size - len(rows))]

    def rows(self, row_indices: Sequence[int]) -> list[Row]:
        """Read rows of the run by their row indices. Raises RankError where the data cannot be read."""
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

    def lay_out(self, rows: Sequence[Row | None], slots: Sequence[int], causal_slots: int, least: int = 0) -> HostBatch:
        """Label rows and lay them out.

        Args:
            rows: the rows; None is an empty one.
            slots: slot of each row within the step.
            causal_slots: the slots below are causal.
            least: tokens, padding included, that rows laid end to end have at least.
        """
        lengths = tuple(tuple(row.lengths.tolist()) if row is not None else () for row in rows)
        causal_rows = sum(slot < causal_slots for slot in slots)
        tokens, pairs = [], np.zeros(2, np.int64)
        for causal, part in ((True, lengths[:causal_rows]), (False, lengths[causal_rows:])):
            real = np.array([n for row in part for n in row], dtype=np.int64)
            tokens.append(int(real.sum()))
            pairs += [attended_pairs(real, causal, window).sum() for window in (None, self.windows[causal])]
        if self.flat_multiple:
            places = max(1, -(-max(sum(tokens), least) // self.flat_multiple)) * self.flat_multiple
            starts, shape = np.cumsum([0, *map(sum, lengths)]), (1, places)
            causal_places = tokens[0] if causal_rows < len(rows) else places
        else:
            starts, shape = np.arange(len(rows)) * self.row_tokens, (len(rows), self.row_tokens)
            causal_places = causal_rows * self.row_tokens
        input_ids, labels = np.full(shape, self.corpus.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        for row, slot, start in zip(rows, slots, starts.tolist(), strict=False):
            if row is not None:
                own = slice(start, start + len(row.tokens))
                kind = self.kinds.of_slot(slot, causal_slots)
                found = self.label(row.tokens, row.lengths, row.order_index, kind)
                input_ids.reshape(-1)[own], labels.reshape(-1)[own] = found
        all_pairs = int(pairs[0]), int(pairs[1])
        if self.flat_multiple:
            lengths = (tuple(n for row in lengths for n in row),)
            slots = [slot for row, slot in zip(rows, slots, strict=True) if row is not None for _ in row.lengths]
        return HostBatch(
            input_ids, labels, lengths, tuple(slots), sum(tokens), all_pairs, causal_places, self.flat_multiple > 0
        )

    def _check(self, row: Row) -> None:
        """Raise RankError where a row shows damage. A GPU stops without a message at an id that has no embedding."""
        largest, smallest = (int(row.tokens.max()), int(row.tokens.min())) if len(row.tokens) else (0, -1)
        if len(row.tokens) > self.row_tokens or largest >= self.corpus.vocab_size or smallest < 0:
            raise RankError(
                f"dataset {self.corpus.datasets[row.source].path}: row {row.row} (chunks {row.chunks.tolist()[:8]}) has"
                f" {len(row.tokens)} tokens, the largest {largest}; a row holds {self.row_tokens}, the vocabulary ends"
                f" with {self.corpus.vocab_size - 1}: damaged; `ettin inspect --verify` tells where"
            )
