"""The keyed order: position -> (source, row, epoch) as a pure function of counts and keys, in constant memory.

Positions come in blocks of BLOCK_SLOTS. Every block gives each source its fixed number of slots, shuffled by a key of
(seed, phase, block); so a source's slots before a block are a multiplication, and its k-th slot is row
permutation(k mod rows) of epoch k // rows, each epoch with a key of its own.

Proportions hold by construction. With B = BLOCK_SLOTS, a source that has c slots of every block and the exact share s:
- in an aligned block it has c slots, and |c - s B| < 1 (largest remainder);
- in any window of n positions the number of its slots differs from s n by at most n / B + 2 c (1 - c / B). For a part
  of x slots of one block holds between max(0, x + c - B) and min(x, c) of them, which is nowhere further from c x / B
  than c (1 - c / B); a window has two such parts at most, and whole blocks are exact in c; c / B for s adds n / B."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.data.hashing import key64
from megatron_ettin.data.mixture import BLOCK_SLOTS
from megatron_ettin.data.permutation import Permutation

CACHED_BLOCKS = 8
CACHED_PERMUTATIONS = 256

Int64Array = npt.NDArray[np.int64]


class KeyedOrder:
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
