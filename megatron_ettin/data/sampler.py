"""Shuffle the rows of a mixture, and share them out over the steps.

The order maps an order index to (source, row, epoch) by a pure function of counts and keys, in constant memory. Order
indices come in blocks of BLOCK_SLOTS. Every block gives each source its fixed number of slots, shuffled by a key of
(seed, phase, block). So a multiplication gives the number of a source's slots before a block. Its k-th slot is row
permutation(k mod rows) of epoch k // rows. Each epoch has its own key.

Proportions hold by construction. Let a source have c of the B = BLOCK_SLOTS slots of a block, and the exact share s.
Then |c - s B| < 1 (largest remainder). In any window of n slots, the number of the source's slots differs from s n by
at most n / B + 2 c (1 - c / B). docs/mixtures.md has the proof.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_ettin.config.schema import BatchConfig
from megatron_ettin.data.hashing import Permutation, key64
from megatron_ettin.data.mixture import BLOCK_SLOTS

CACHED_BLOCKS = 8
CACHED_PERMUTATIONS = 256

Int64Array = npt.NDArray[np.int64]


class ShuffledSampler:
    """Rows of several sources in shuffled order, by order index.

    Args:
        counts: slots of each source in every block, BLOCK_SLOTS in all.
        rows: number of rows of each source.
        seed: seed of the run.
        phase: phase of the run, which is part of every key.
    """

    def __init__(self, counts: Sequence[int], rows: Sequence[int], seed: int, phase: str) -> None:
        if sum(counts) != BLOCK_SLOTS or len(counts) != len(rows):
            raise ValueError(f"{list(counts)} slots of {len(rows)} sources: their sum must be {BLOCK_SLOTS}")
        self.counts = list(counts)
        self.num_rows = list(rows)
        self.seed = seed
        self.phase = phase
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._shuffled_block)
        self._permutation = lru_cache(maxsize=CACHED_PERMUTATIONS)(self._keyed_permutation)

    def __reduce__(self) -> tuple[type[ShuffledSampler], tuple[list[int], list[int], int, str]]:
        # without the caches
        return type(self), (self.counts, self.num_rows, self.seed, self.phase)

    def locate(self, order_indices: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return (index of the source, row, epoch) of each order index, in the shape of `order_indices`."""
        given = np.asarray(order_indices, dtype=np.int64)
        flat = np.atleast_1d(given).ravel()
        if flat.size and int(flat.min()) < 0:
            raise IndexError(f"order index {int(flat.min())}: order indices begin at 0")
        source, occurrence = self._source_and_occurrence(flat)
        epoch, index = np.divmod(occurrence, np.asarray(self.num_rows, np.int64)[source])
        row = np.empty_like(index)
        for s in np.unique(source).tolist():
            of_source = source == s
            for e in np.unique(epoch[of_source]).tolist():
                chosen = of_source & (epoch == e)
                row[chosen] = self._permutation(s, e)(index[chosen]).astype(np.int64)
        return source.reshape(given.shape), row.reshape(given.shape), epoch.reshape(given.shape)

    def _source_and_occurrence(self, order_indices: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the source of each order index, and the number of that source's slots before it."""
        if len(self.counts) == 1:
            return np.zeros_like(order_indices), order_indices
        source, occurrence = np.empty_like(order_indices), np.empty_like(order_indices)
        blocks, slots = np.divmod(order_indices, BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            source_of_slot, occurrence_of_slot = self._block(block)
            source[chosen] = source_of_slot[slots[chosen]]
            occurrence[chosen] = occurrence_of_slot[slots[chosen]]
        before: Int64Array = np.asarray(self.counts, np.int64)[source] * blocks
        return source, occurrence + before

    def _shuffled_block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """Return the source of each slot of a block, and the number of that source's slots before it in the block."""
        ordered = np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)
        shuffle = Permutation(BLOCK_SLOTS, key64("block", self.seed, self.phase, block))
        source = ordered[shuffle(np.arange(BLOCK_SLOTS)).astype(np.int64)]
        by_source = np.argsort(source, kind="stable")
        occurrence = np.empty_like(source)
        occurrence[by_source] = np.concatenate([np.arange(count, dtype=np.int64) for count in self.counts])
        return source, occurrence

    def _keyed_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.num_rows[source], key64("rows", self.seed, self.phase, source, epoch))


# most levels of a batch warm-up
WARMUP_LEVELS = 32


@dataclass(frozen=True)
class BatchSizes:
    """Number of rows and range of row indices of every step.

    A batch warm-up counts nominal tokens (rows x the mean tokens a row) and grows in equal levels, each lasting an
    equal share of the warm-up's tokens. That is a closed form: the rows of any step are known without those before it.
    Steps count from 0.
    """

    rows: tuple[int, ...]
    """Rows of a step at each level, the full batch last."""
    first_step: tuple[int, ...]
    """First step of each level."""

    @classmethod
    def of(cls, batch: BatchConfig, mean_tokens_per_row: float) -> BatchSizes:
        """Plan the batch sizes of a run."""
        full, low = batch.global_batch_rows, batch.warmup_min_rows
        levels = min(WARMUP_LEVELS, full - low) if batch.warmup_tokens else 0
        rows, first = [], [0]
        for level in range(levels):
            rows.append(low + (full - low) * level // levels)
            tokens_per_step = rows[-1] * mean_tokens_per_row
            first.append(first[-1] + math.ceil(batch.warmup_tokens / levels / tokens_per_step))
        return cls((*rows, full), tuple(first))

    def level(self, step: int) -> int:
        """Return the level of the warm-up that `step` belongs to."""
        return bisect.bisect_right(self.first_step, step) - 1

    def size_at(self, step: int) -> int:
        """Return the number of rows of `step`."""
        return self.rows[self.level(step)]

    def rows_before(self, step: int) -> int:
        """Return the row index at which `step` begins."""
        level = self.level(step)
        passed = sum(rows * (self.first_step[i + 1] - self.first_step[i]) for i, rows in enumerate(self.rows[:level]))
        return passed + self.rows[level] * (step - self.first_step[level])

    def span(self, step: int) -> tuple[int, int]:
        """Return the row indices [first, end) of `step`."""
        begin = self.rows_before(step)
        return begin, begin + self.size_at(step)

    def steps_for(self, rows: float) -> int:
        """Return the smallest number of steps that together have at least `rows` rows."""
        # upper bound of the bisection: all steps at the smallest batch
        steps = math.ceil(rows / min(self.rows))
        return bisect.bisect_left(range(steps + 1), rows, key=self.rows_before)

    def steps_within(self, rows: int) -> int:
        """Return the largest number of steps that together have at most `rows` rows."""
        # upper bound of the bisection: all steps at the smallest batch
        steps = rows // min(self.rows)
        return bisect.bisect_right(range(steps + 1), rows, key=self.rows_before) - 1
