"""How many rows each step trains on, and so which positions of the data order are its own.

Batch warm-up counts nominal tokens (rows x the mean tokens a row) and grows in equal levels, each lasting an equal
share of the warm-up's tokens: a closed form, so that any step's rows are known without the steps before it."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from megatron_ettin.config.schema import BatchConfig

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
