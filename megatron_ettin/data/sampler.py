"""The keyed order: position -> (source, row, epoch) as a pure function of counts and keys, in constant memory.

Positions come in blocks of BLOCK_SLOTS. Every block gives each source its fixed number of slots, shuffled by a key of
(seed, phase, block); so a source's slots before a block are a multiplication, and its k-th slot is row
permutation(k mod rows) of epoch k // rows, each epoch with a key of its own.

Proportions hold by construction. With B = BLOCK_SLOTS, a source that has c slots of every block and the exact share s:
- in an aligned block it has c slots, and |c - s B| < 1 (largest remainder);
- in any window of n positions the number of its slots differs from s n by at most n / B + 2 c (1 - c / B). For a part
  of x slots of one block holds between max(0, x + c - B) and min(x, c) of them, which is nowhere further from c x / B
  than c (1 - c / B); a window has two such parts at most, and whole blocks are exact in c; c / B for s adds n / B.

How many rows each step trains on, and so which positions of the data order are its own.

Batch warm-up counts nominal tokens (rows x the mean tokens a row) and grows in equal levels, each lasting an equal
share of the warm-up's tokens: a closed form, so that any step's rows are known without the steps before it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.config.schema import BatchConfig
from megatron_ettin.data.hashing import Permutation, key64
from megatron_ettin.data.mixture import BLOCK_SLOTS

CACHED_BLOCKS = 8
CACHED_PERMUTATIONS = 256

Int64Array = npt.NDArray[np.int64]


class ShuffledSampler:
    """`counts`: slots of each source in every block, BLOCK_SLOTS in all. `rows`: rows of each source."""

    def __init__(self, counts: Sequence[int], rows: Sequence[int], seed: int, phase: str) -> None:
        if sum(counts) != BLOCK_SLOTS or len(counts) != len(rows):
            raise ValueError(f"{list(counts)} slots of {len(rows)} sources: their sum must be {BLOCK_SLOTS}")
        self.counts = list(counts)
        self.num_rows = list(rows)
        self.seed = seed
        self.phase = phase
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._shuffled_block)
        self._permutation = lru_cache(maxsize=CACHED_PERMUTATIONS)(self._keyed_permutation)

    def __getstate__(self) -> dict[str, Any]:  # the caches do not travel to other processes
        return {"counts": self.counts, "rows": self.num_rows, "seed": self.seed, "phase": self.phase}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(source, row, epoch) of each position >= 0, in the shape of `positions`."""
        given = np.asarray(positions, dtype=np.int64)
        flat = np.atleast_1d(given).ravel()
        if flat.size and int(flat.min()) < 0:
            raise IndexError(f"position {int(flat.min())}: positions begin at 0")
        source, turn = self._source_and_turn(flat)
        epoch, place = np.divmod(turn, np.asarray(self.num_rows, np.int64)[source])
        row = np.empty_like(place)
        for s in np.unique(source).tolist():
            of_source = source == s
            for e in np.unique(epoch[of_source]).tolist():
                chosen = of_source & (epoch == e)
                row[chosen] = self._permutation(s, e)(place[chosen]).astype(np.int64)
        return source.reshape(given.shape), row.reshape(given.shape), epoch.reshape(given.shape)

    def _source_and_turn(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The source of each position, and how many slots that source had before it."""
        if len(self.counts) == 1:
            return np.zeros_like(positions), positions
        source, turn = np.empty_like(positions), np.empty_like(positions)
        blocks, slots = np.divmod(positions, BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            source_of_slot, turn_of_slot = self._block(block)
            source[chosen] = source_of_slot[slots[chosen]]
            turn[chosen] = turn_of_slot[slots[chosen]]
        before: Int64Array = np.asarray(self.counts, np.int64)[source] * blocks
        return source, turn + before

    def _shuffled_block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """For each slot of a block: its source, and the source's slots before it within the block."""
        ordered = np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)
        shuffle = Permutation(BLOCK_SLOTS, key64("block", self.seed, self.phase, block))
        source = ordered[shuffle(np.arange(BLOCK_SLOTS)).astype(np.int64)]
        by_source = np.argsort(source, kind="stable")
        turn = np.empty_like(source)
        turn[by_source] = np.concatenate([np.arange(count, dtype=np.int64) for count in self.counts])
        return source, turn

    def _keyed_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.num_rows[source], key64("rows", self.seed, self.phase, source, epoch))


WARMUP_LEVELS = 32  # batch sizes that a warm-up passes through


@dataclass(frozen=True)
class BatchSizes:
    """Rows of every step. Warm-up grows in equal levels, each lasting an equal share of the warm-up's tokens."""

    rows: tuple[int, ...]  # of each level, the full batch last
    first_step: tuple[int, ...]  # of each level

    @classmethod
    def of(cls, batch: BatchConfig, mean_tokens_per_row: float) -> BatchSizes:
        full, low = batch.global_batch_rows, batch.warmup_min_rows
        levels = min(WARMUP_LEVELS, full - low) if batch.warmup_tokens else 0
        rows, first = [], [0]
        for level in range(levels):
            rows.append(low + (full - low) * level // levels)
            tokens_a_step = rows[-1] * mean_tokens_per_row
            first.append(first[-1] + math.ceil(batch.warmup_tokens / levels / tokens_a_step))
        return cls((*rows, full), tuple(first))

    def level(self, step: int) -> int:
        return bisect.bisect_right(self.first_step, step) - 1

    def size_at(self, step: int) -> int:
        """Rows of `step` (steps count from 0)."""
        return self.rows[self.level(step)]

    def rows_before(self, step: int) -> int:
        """Position in the data order where `step` begins."""
        level = self.level(step)
        passed = sum(rows * (self.first_step[i + 1] - self.first_step[i]) for i, rows in enumerate(self.rows[:level]))
        return passed + self.rows[level] * (step - self.first_step[level])

    def span(self, step: int) -> tuple[int, int]:
        """[first, end) positions of `step`."""
        begin = self.rows_before(step)
        return begin, begin + self.size_at(step)

    def steps_for(self, rows: float) -> int:
        """Steps until so many rows have been trained on."""
        steps = math.ceil(rows / min(self.rows))  # at most as many
        return bisect.bisect_left(range(steps + 1), rows, key=self.rows_before)

    def steps_within(self, rows: int) -> int:
        """Whole steps that so many rows are enough for."""
        steps = rows // min(self.rows)  # at least as many
        return bisect.bisect_right(range(steps + 1), rows, key=self.rows_before) - 1
