"""Generate random rows for a benchmark without a dataset, and measure the chunks of a dataset's rows.

Lengths of chunks are lognormal, as those of documents are. A row is full, or has one chunk under padded batching.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ettin.data.blended_dataset import Row

# standard deviation of the logarithm of a document's length
SPREAD = 1.0
# number of ids, from 0, that are special tokens
SPECIALS = 5
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class SyntheticRows:
    """Random rows with the interface of a dataset. A row is a function of its order index.

    Lengths of chunks are lognormal with mean `chunk_tokens`, but at least 8 and cut at the end of the row.
    """

    seq_len: int
    chunk_tokens: float
    vocab_size: int
    special_ids: tuple[int, ...] = tuple(range(SPECIALS))
    pad_id: int = 3
    mask_id: int = 4
    padded: bool = False

    @functools.cached_property
    def mean_tokens_per_row(self) -> float:
        """Return the mean number of tokens of a row."""
        return float(self.token_counts(range(SAMPLED_ROWS)).mean()) if self.padded else float(self.seq_len)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Accept every model: rows are drawn from its own vocabulary."""

    def token_counts(self, order_indices: Iterable[int]) -> np.ndarray:
        """Return the number of tokens of each row, [rows]."""
        return np.array([len(self.row(int(index)).tokens) for index in order_indices], np.int64)

    def order_indices(self, row_indices: Sequence[int]) -> np.ndarray:
        """Return the order index [rows] of each row, which equals its row index because no row is skipped."""
        return np.asarray(row_indices, np.int64)

    def order_span(self, first: int, end: int) -> tuple[int, int]:
        """Return the span [first, end) unchanged, because no row is skipped."""
        return first, end

    def rows(self, order_indices: Sequence[int]) -> list[Row]:
        """Return the rows with these order indices."""
        return [self.row(int(index)) for index in order_indices]

    def row(self, order_index: int) -> Row:
        """Draw a row by its order index."""
        drawn = np.random.default_rng(order_index)
        lengths: list[int] = []
        while (room := self.seq_len - sum(lengths)) > 0:
            mean = np.log(self.chunk_tokens) - SPREAD**2 / 2
            lengths.append(min(room, max(8, int(drawn.lognormal(mean, SPREAD)))))
        if self.padded:
            lengths = lengths[:1]
        tokens = drawn.integers(SPECIALS, self.vocab_size, sum(lengths))
        return Row(tokens, np.array(lengths, np.int64), 0, order_index, np.arange(len(lengths)), order_index)


def attended_chunk_tokens(dataset: Any) -> float:
    """Return the token-weighted mean length of the chunks in the dataset's first rows.

    Chunks of this length have as many (query, key) pairs per token as the chunks of those rows.
    """
    lengths = np.concatenate([row.lengths for row in dataset.rows(range(SAMPLED_ROWS))]).astype(float)
    return float((lengths**2).sum() / lengths.sum())
